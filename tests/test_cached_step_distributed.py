# SPDX-License-Identifier: Apache-2.0
"""cached_step under DDP and FSDP2, 2 gloo processes: one reduction a step, and the right gradient.

Two processes are started once; they do everything and hand their findings back.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from helpers import HANGS_S, leave_group
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import sslkernels as ssl
from sslkernels import cached_step

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="torch without gloo")

WORLD, D_IN, D = 2, 6, 4
SIZES = (7, 5)  # samples of each rank, in micro-batches of 2: not as many on both


class Encoder(nn.Module):
    def __init__(self, seed: int = 1) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(D_IN, 8), nn.Tanh(), nn.Linear(8, D)).double()
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def batch() -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(sum(SIZES), D_IN, generator=generator, dtype=torch.float64) for _ in "ab"]


def joined(z1: Tensor, z2: Tensor) -> Tensor:
    return ssl.nt_xent_loss(z1, z2, 0.3, group=True)


class Trainer:
    """Two networks in one object: a method of it refers to both."""

    def __init__(self, first: Any, second: Any) -> None:
        self.first, self.second = first, second

    def encode_first(self, x: Tensor) -> Tensor:
        return self.first(x)

    def encode_second(self, x: Tensor) -> Tensor:
        return self.second(x)


def from_elsewhere(x: Tensor) -> Tensor:
    return sys.modules["nobody_knows"](x)


ENCODERS: dict[str, Callable[[Any], Any]] = {
    "module": lambda ddp: ddp,
    "function": lambda ddp: lambda x: ddp(x),
    "bound method": lambda ddp: ddp.forward,
    "partial": lambda ddp: functools.partial(ddp),
    "partial of a function": lambda ddp: functools.partial(lambda m, x: m(x), ddp),
    "inside another": lambda ddp: nn.Sequential(nn.Identity(), ddp),
    "one a view": lambda ddp: [lambda x: ddp(x), ddp],
    "frozen second": lambda ddp: [
        Trainer(ddp, _frozen()).encode_first,
        Trainer(ddp, _frozen()).encode_second,
    ],
    "hidden": lambda ddp: sys.modules.__setitem__("nobody_knows", ddp) or from_elsewhere,
}


def _frozen() -> Encoder:
    return Encoder(seed=3).requires_grad_(False)


def counting_ddp(module: nn.Module) -> tuple[nn.Module, list[int]]:
    """DDP that counts the all-reduces of its buckets."""
    ddp = nn.parallel.DistributedDataParallel(module)
    reductions: list[int] = []

    def count(state, bucket):  # type: ignore[no-untyped-def]  # DDP compares annotations
        reductions.append(bucket.index())
        work = dist.all_reduce(bucket.buffer(), async_op=True)
        return work.get_future().then(lambda future: future.value()[0] / WORLD)

    ddp.register_comm_hook(None, count)
    return ddp, reductions


class Communication(TorchDispatchMode):
    """Names of the collectives that were called."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func.namespace == "c10d":
            self.ops.append(str(func))
        return func(*args, **(kwargs or {}))


def _fsdp2(rank: int, views: list[Tensor]) -> dict[str, Any]:
    from torch.distributed.fsdp import fully_shard

    module = Encoder()
    fully_shard(module)
    # FSDP communicates in each forward pass: as many micro-batches on every rank.
    with Communication() as communicated:
        losses = [
            cached_step(module, views, joined, 4),
            cached_step(lambda x: module(x), views, joined, 4),
        ]
    grads = [p.grad.full_tensor() for p in module.parameters()]
    return {"losses": losses, "ops": communicated.ops, "grads": grads}


def worker(rank: int, folder: str) -> None:
    if sys.platform == "linux":  # a host name that does not resolve must not matter
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        f"file://{folder}/store",
        rank=rank,
        world_size=WORLD,
        timeout=timedelta(seconds=HANGS_S),
    )
    start = sum(SIZES[:rank])
    views = [x[start : start + SIZES[rank]] for x in batch()]
    found: dict[str, Any] = {}
    for name, wrap in ENCODERS.items():
        module = Encoder()
        ddp, reductions = counting_ddp(module)
        loss = cached_step(wrap(ddp), views, joined, 2)
        once = len(reductions)
        with ddp.no_sync():  # what the caller accumulates stays on the rank
            cached_step(wrap(ddp), views, joined, 2)
        with torch.no_grad():
            evaluated = cached_step(wrap(ddp), views, joined, 2)
        found[name] = {
            "loss": loss,
            "evaluated": evaluated,
            "reductions": (once, len(reductions)),
            "grads": [p.grad for p in module.parameters()],
        }
    # The gradient of one step alone, without what no_sync added.
    for name, wrap in ENCODERS.items():
        module = Encoder()
        ddp, _ = counting_ddp(module)
        cached_step(wrap(ddp), views, joined, 2)
        found[name]["grads"] = [p.grad for p in module.parameters()]
    if hasattr(torch.distributed.fsdp, "fully_shard"):
        found["fsdp2"] = _fsdp2(rank, views)
    torch.save(found, f"{folder}/{rank}.pt")
    leave_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = str(tmp_path_factory.mktemp("ranks"))
    mp.spawn(worker, (folder,), nprocs=WORLD)
    return [torch.load(f"{folder}/{rank}.pt") for rank in range(WORLD)]


def truth(second: nn.Module | None) -> tuple[Tensor, list[Tensor]]:
    """One process, the joined batch."""
    module, (x, y) = Encoder(), batch()
    loss = ssl.reference.nt_xent_loss(module(x), (second or module)(y), 0.3)
    loss.backward()
    return loss.detach(), [p.grad for p in module.parameters()]


@pytest.mark.parametrize("name", ENCODERS)
def test_one_reduction_and_the_gradient_of_the_joined_batch(
    found: list[dict[str, Any]], name: str
) -> None:
    """However the encoder is wrapped; none inside the caller's own no_sync or without grad."""
    loss, grads = truth(_frozen() if name == "frozen second" else None)
    for rank in found:
        assert rank[name]["reductions"] == (1, 1)
        torch.testing.assert_close(rank[name]["loss"], loss, rtol=1e-11, atol=1e-14)
        torch.testing.assert_close(rank[name]["evaluated"], loss, rtol=1e-11, atol=1e-14)
        torch.testing.assert_close(rank[name]["grads"], grads, rtol=1e-10, atol=1e-13)


def test_fsdp2(found: list[dict[str, Any]]) -> None:
    """One reduce-scatter a step."""
    if "fsdp2" not in found[0]:
        pytest.skip("torch without fully_shard")
    loss, grads = truth(None)
    for rank in found:
        for value in rank["fsdp2"]["losses"]:
            torch.testing.assert_close(value, loss, rtol=1e-11, atol=1e-14)
        ops = rank["fsdp2"]["ops"]
        assert sum("reduce_scatter" in op for op in ops) == 2, ops
        torch.testing.assert_close(
            rank["fsdp2"]["grads"], [2 * g for g in grads], rtol=1e-10, atol=1e-13
        )
