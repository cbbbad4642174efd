# SPDX-License-Identifier: Apache-2.0
"""What the tests of cached_step share: a network that a second pass would disturb, and the truth."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

import sslkernels as ssl

N, D_IN, D = 11, 6, 4


def loss_fn(z1: Tensor, z2: Tensor) -> Tensor:
    return ssl.reference.nt_xent_loss(z1, z2, 0.3)


class Net(nn.Module):
    """BatchNorm, a buffer of its own, dropout: everything that a second pass could disturb."""

    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.body = nn.Sequential(nn.Linear(D_IN, 8), nn.BatchNorm1d(8), nn.Dropout(0.2))
        self.head = nn.Linear(8, D)
        self.register_buffer("calls", torch.zeros(()))
        self.double()
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) / 2)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.head(self.body(x))

    def encode(self, x: Tensor) -> Tensor:
        return self.forward(x)


def views(n: int = N) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(n, D_IN, generator=generator, dtype=torch.float64) for _ in range(2)]


def accumulated(net: nn.Module, x: list[Tensor], micro: int = 4) -> Tensor:
    """The truth: one graph through the micro-batches."""
    z = [torch.cat([net(part) for part in view.split(micro)]) for view in x]
    loss = loss_fn(*z)
    loss.backward()
    return loss.detach()


def facts(net: nn.Module) -> dict[str, Tensor]:
    grads = {f"grad {n}": p.grad for n, p in net.named_parameters() if p.grad is not None}
    return {**grads, **dict(net.named_buffers())}


def agree(net: nn.Module, call: Callable[[], Tensor], x: list[Tensor] | None = None) -> None:
    """Loss, gradients, buffers and the generator after ``call`` are those of plain accumulation."""
    twin = copy.deepcopy(net)
    state = torch.get_rng_state()
    truth = accumulated(twin, views() if x is None else x)
    after = torch.get_rng_state()
    torch.set_rng_state(state)
    loss = call()
    assert torch.equal(torch.get_rng_state(), after)
    torch.testing.assert_close(loss, truth, rtol=1e-11, atol=1e-14)
    torch.testing.assert_close(facts(net), facts(twin), rtol=1e-11, atol=1e-14)
