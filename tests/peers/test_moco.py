# SPDX-License-Identifier: Apache-2.0
"""The official MoCo model and ours side by side, in a process group of one.

The official code is no package: put its checkout on PYTHONPATH to run this.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from side_by_side import check_signature, check_state, peer
from torch import Tensor, nn

import sslkernels
from sslkernels.integrations import moco as ours

theirs: Any = peer("moco.builder")
Theirs = theirs.MoCo


class Tiny(nn.Module):
    """No BatchNorm: the official code shuffles the batch."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.body, self.fc = nn.Linear(5, 7), nn.Linear(7, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.body(x).relu())


@pytest.fixture
def one_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """What the official code takes for granted: a process group, and a device called cuda."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", os.environ.get("GLOO_SOCKET_IFNAME", "lo"))
    monkeypatch.setattr(Tensor, "cuda", lambda self, *_: self)
    dist.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("mlp", [False, True])
def test_training(mlp: bool, one_process: None) -> None:
    models = []
    for cls in (ours.MoCo, Theirs):
        torch.manual_seed(3)
        models.append(cls(Tiny, dim=6, K=16, m=0.9, T=0.2, mlp=mlp))
    mine, other = models
    check_state(mine, other)
    fused = copy.deepcopy(mine)
    optimizers = [torch.optim.SGD(m.encoder_q.parameters(), lr=0.1) for m in (mine, other, fused)]
    for _ in range(9):
        x, y = torch.randn(4, 5), torch.randn(4, 5)
        (logits, labels), (logits_, labels_) = mine(x, y), other(x, y)
        torch.testing.assert_close(logits, logits_, rtol=1e-4, atol=1e-5)
        assert torch.equal(labels, labels_)
        values = [
            nn.functional.cross_entropy(logits, labels),
            nn.functional.cross_entropy(logits_, labels_),
            fused.loss(x, y),
        ]
        for value, optimizer in zip(values, optimizers, strict=True):
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
        for a, b, c in zip(*(m.state_dict().values() for m in (mine, other, fused)), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(c, b, rtol=1e-4, atol=1e-5)


def test_signature_and_patch() -> None:
    check_signature(ours.MoCo, Theirs)
    with sslkernels.patch("moco"):
        assert theirs.MoCo is ours.MoCo
    assert theirs.MoCo is Theirs


def test_a_partial_batch(one_process: None) -> None:
    """Better than theirs, which asserts that the batch divides the queue."""
    model, other = ours.MoCo(Tiny, dim=6, K=16), Theirs(Tiny, dim=6, K=16)
    x = torch.randn(3, 5)
    assert model.loss(x, x).isfinite() and int(model.queue_ptr) == 3
    with pytest.raises(AssertionError):
        other(x, x)
