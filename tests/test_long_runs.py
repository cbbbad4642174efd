# SPDX-License-Identifier: Apache-2.0
"""Many steps of enqueue, average and loss: memory, drift, and counters beyond 2^31 keys."""

from __future__ import annotations

import resource

import pytest
import torch
from torch import Tensor, nn

import sslkernels
from sslkernels import reference

SIZE, N, D = 24, 7, 5


def resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


class Model:
    """What the queue and the average should hold, in float64, one key at a time."""

    def __init__(self, weight: Tensor) -> None:
        self.queue = torch.zeros(SIZE, D, dtype=torch.float64)
        self.average = weight.double().clone()
        self.position = 0

    def step(self, keys: Tensor, weight: Tensor, decay: float) -> None:
        self.queue, self.position = reference.enqueue(self.queue, self.position, keys.double())
        self.average.mul_(decay).add_(weight.double(), alpha=1 - decay)


def check_steps(steps: int, compare_every: int) -> None:
    torch.manual_seed(0)
    online = nn.Linear(D, D, bias=False)
    ema, queue = sslkernels.EMA(online, 0.99), sslkernels.KeyQueue(SIZE, D)
    model = Model(online.weight.detach())
    batches = [torch.randn(N, D) for _ in range(64)]
    drift = [1e-3 * torch.randn(D, D) for _ in range(64)]
    seen = []
    for step in range(steps):
        x = batches[step % 64]
        query = online(x)
        keys = ema.module(x).detach()
        if len(queue):
            loss = sslkernels.info_nce_loss(query, keys, queue.keys, 0.2)
            (gradient,) = torch.autograd.grad(loss, online.weight)
            with torch.no_grad():
                online.weight.add_(gradient, alpha=-1e-3).add_(drift[step % 64]).mul_(0.999)
        queue.enqueue(keys)
        ema.update(online)
        model.step(keys, online.weight.detach(), 0.99)
        if step % compare_every == compare_every - 1:
            assert int(queue.queue_ptr) == model.position == (step + 1) * N % SIZE
            torch.testing.assert_close(queue.queue.double(), model.queue, atol=1e-6, rtol=1e-6)
            # The average rounds once a step and forgets with 0.99: 100 roundings in all.
            torch.testing.assert_close(
                ema.module.weight.detach().double(), model.average, atol=1e-5, rtol=1e-5
            )
            assert bool(loss.isfinite())
            seen.append(resident_bytes())
    # What a process has after a quarter it has at the end, but for a page here and there.
    assert seen[-1] <= seen[len(seen) // 4] + (4 << 20), [x >> 10 for x in seen]


@pytest.mark.parametrize(
    "steps", [800, pytest.param(200_000, marks=pytest.mark.campaign)], ids=lambda n: f"{n} steps"
)
def test_steps_without_growth_or_drift(steps: int, one_thread: None) -> None:
    check_steps(steps, steps // 16)


@pytest.mark.parametrize("start", [2**31 - 3, 2**32 - 3, 2**44 - 3, 2**62])
def test_an_average_beyond_steps_of_32_bits(start: int) -> None:
    """The step is part of the random bits of stochastic rounding: its lower 32 bits count."""
    source = [torch.full((257,), 1.001)]
    found = []
    for step in (start, start % 2**32):
        targets = [torch.ones(257, dtype=torch.bfloat16)]
        for i in range(6):
            sslkernels.ema_update_(
                targets, source, 0.5, stochastic_rounding=True, seed=3, step=step + i
            )
        found.append(targets[0])
    assert torch.equal(*found)


@pytest.mark.parametrize("start", [2**31 - 10, 2**31 + 5, 2**32 - 10, 2**40])
def test_a_queue_beyond_2_to_the_31_keys(on_engine: str, start: int) -> None:
    """A queue of that many rows would be needed to count there; the op takes the counter as it is."""
    queue, other = torch.zeros(SIZE, D), torch.zeros(SIZE, D)
    counters = [torch.tensor([start]), torch.tensor([start % SIZE])]
    fills = [torch.tensor([0]), torch.tensor([0])]
    for step in range(6):
        keys = torch.randn(N, D)
        for memory, counter, fill in zip((queue, other), counters, fills, strict=True):
            torch.ops.sslkernels.queue_enqueue_(memory, counter, fill, keys, True)
        assert int(counters[0]) == (start + (step + 1) * N) % SIZE == int(counters[1])
    assert torch.equal(queue, other) and [int(f) for f in fills] == [SIZE, SIZE]
