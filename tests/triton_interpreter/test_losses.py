# SPDX-License-Identifier: Apache-2.0
"""Every loss of the library through its ops on the Triton backend, against the reference."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from dense import randn
from helpers import SLACK, check_loss
from torch import Tensor

import sslkernels
from sslkernels import reference
from sslkernels.backends import triton as backend
from sslkernels.backends.interface import Kept, Problem, Wanted
from sslkernels.backends.triton import contrastive
from sslkernels.backends.triton.runtime import recorded_launches
from sslkernels.ops import normalization


def _labels() -> Tensor:
    return torch.arange(66) // 3 % 11


def _loss(module: object, name: str) -> Callable[..., Tensor]:
    function = getattr(module, name)
    return {
        "nt_xent_loss": partial(function, temperature=0.07),
        "info_nce_loss": partial(function, temperature=0.07),
        "clip_loss": function,
        "siglip_loss": function,
        "dcl_loss": partial(function, temperature=0.1),
        "sup_con_loss": lambda z: function(z, _labels(), 0.1),
        "triplet_loss": lambda z: function(z, _labels(), 0.5, mining="hard"),
    }[name]


def _inputs(name: str, dtype: torch.dtype) -> list[Tensor]:
    z1, z2, bank = (randn(n, 40, seed=i) for i, n in enumerate((66, 66, 50)))
    z2 = z1 + 0.5 * z2
    if name in ("clip_loss", "siglip_loss"):
        z1, z2 = (torch.nn.functional.normalize(z, dim=1) for z in (z1, z2))
    z1, z2, bank = z1.to(dtype), z2.to(dtype), bank.to(dtype)
    return {
        "info_nce_loss": [z1, z2, bank],
        "clip_loss": [z1, z2, torch.tensor(14.0)],
        "siglip_loss": [z1, z2, torch.tensor(10.0), torch.tensor(-10.0)],
        "sup_con_loss": [z1],
        "triplet_loss": [z1],
    }.get(name, [z1, z2])


def _as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Normalised halves are halves again, which CPU tensors are spared."""
    monkeypatch.setattr(normalization, "operand_dtype", lambda x: x.dtype)
    monkeypatch.setattr(contrastive, "exact_dtype", lambda x: x.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("n", [1, 33, 66, 260])
def test_nt_xent_by_row_numbers(n: int, dtype: torch.dtype) -> None:
    """Loss, ranks and gradients where several multiples of n lie in a tile, and where at most one does."""
    a = randn(n, 16, seed=1).to(dtype)
    b = (a.float() + 0.5 * randn(n, 16, seed=2)).to(dtype)
    problem = Problem("joint", a, b, None, torch.tensor(5.0))
    assert backend.serves_contrastive(problem)
    found, _ = backend.contrastive_forward(problem, True, False)
    kept, one = Kept(found.state, None), torch.tensor(1.0)
    grads = backend.contrastive_backward(problem, kept, one, Wanted(True, True, True))[:3]
    leaves = [x.double().requires_grad_() for x in (a, b, problem.scale)]
    z = torch.nn.functional.normalize(torch.cat(leaves[:2]), dim=1)
    s = (z @ z.T * leaves[2]).masked_fill(torch.eye(2 * n, dtype=torch.bool), -torch.inf)
    labels = (torch.arange(2 * n) + n) % (2 * n)
    loss = torch.nn.functional.cross_entropy(s, labels)
    assert abs(found.loss - loss) < 1e-6
    if dtype == torch.float32:
        assert torch.equal(found.rank, (s > s.gather(1, labels[:, None])).sum(1))
    slack = {torch.float32: 2e-7, torch.float16: 4e-6}[dtype]
    for ours, true in zip(grads, torch.autograd.grad(loss, leaves), strict=True):
        assert (ours.double() - true).abs().max() < slack * (1 + 20 / n)
    alone = backend.contrastive_backward(problem, kept, one, Wanted(True, False))
    assert torch.allclose(alone[0].float(), grads[0].float(), rtol=2e-3, atol=1e-6)
    assert alone[1] is None and alone[2] is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("name", "kernels"),
    [
        ("nt_xent_loss", {"forward_kernel", "backward_kernel"}),
        ("info_nce_loss", {"forward_kernel", "backward_kernel"}),
        ("clip_loss", {"forward_kernel", "backward_kernel"}),
        ("siglip_loss", {"forward_kernel", "backward_kernel"}),
        ("dcl_loss", {"forward_kernel", "backward_kernel"}),
        ("sup_con_loss", {"forward_kernel", "backward_kernel"}),
        ("triplet_loss", {"extremes_kernel"}),
    ],
)
def test_loss(
    name: str, kernels: set[str], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loss and gradients within the budget, by the kernels that the loss is made of."""
    _as_on_a_gpu(monkeypatch)
    inputs = _inputs(name, dtype)
    with sslkernels.backend("triton"), recorded_launches() as log:
        # Rows that are rounded after normalisation: the loss is as exact as they are.
        check_loss(
            _loss(sslkernels, name),
            _loss(reference, name),
            inputs,
            name=name,
            loss_slack=None if dtype == torch.float32 else SLACK[dtype] / 4,
        )
    assert kernels <= {entry.kernel for entry in log}
    if name != "triplet_loss":  # distances stay float32: their differences decide who is hardest
        assert {entry.operand for entry in log if entry.kernel in kernels} == {dtype}


def test_moco_step() -> None:
    """A loss against the queue, then enqueue: keys without gradient go through attend."""
    query, key, bank = (randn(n, 24, seed=i) for i, n in enumerate((20, 20, 70)))
    with sslkernels.backend("triton"), recorded_launches() as log:
        leaf = query.clone().requires_grad_()
        queue = sslkernels.KeyQueue(100, 24).to(query.device)
        queue.enqueue(bank)
        loss = sslkernels.info_nce_loss(leaf, key, queue.keys, 0.07)
        queue.enqueue(key)  # before backward: nothing of the queue is kept
        loss.backward()
    assert "attend_kernel" in {entry.kernel for entry in log}
    truth = query.double().requires_grad_()
    unit_bank = torch.nn.functional.normalize(bank.double(), dim=1)
    true_loss = reference.info_nce_loss(truth, key.double(), unit_bank, 0.07)
    true_loss.backward()
    assert torch.allclose(loss.double(), true_loss, rtol=1e-6)
    assert torch.allclose(leaf.grad.double(), truth.grad, rtol=1e-4, atol=1e-7)


def test_metrics_and_info() -> None:
    """Ranks from the same pass; info() names the backend."""
    z1, z2 = _inputs("nt_xent_loss", torch.float32)
    with sslkernels.backend("triton"):
        assert sslkernels.info().backends[f"{z1.device.type}/tiles"].startswith("triton")
        _, metrics = sslkernels.nt_xent_loss(z1, z2, return_metrics=True)
    _, true_metrics = reference.nt_xent_loss(z1.double(), z2.double(), return_metrics=True)
    for ours, truth in zip(metrics, true_metrics, strict=True):
        assert torch.allclose(ours.double(), truth, rtol=1e-5)
