# SPDX-License-Identifier: Apache-2.0
"""Losses over several ranks: the cases, and what each rank computes for ``test_distributed.py``."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from helpers import HANGS_S
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset

import sslkernels as ssl
from sslkernels import reference

SIZES = {2: (4, 3), 3: (3, 0, 5), 4: (2, 4, 1, 3)}  # samples of each rank
WORLD = max(SIZES)
D_IN, D, CLASSES = 7, 5, 3
MODES = ("gather", "ring")
REDUCTIONS = ("mean", "sum", "none")
STEPS = 50


class Case(NamedTuple):
    """A loss: called with (z1, z2, labels, scale, bias) and keywords."""

    ours: Callable[..., Tensor]
    reference: Callable[..., Tensor]
    blocks: int = 1  # rows of "none" are those of cat(z1, z2): two blocks
    rows: int = 1  # of "none" for a sample


def both(call: Callable[..., Tensor], **facts: Any) -> Case:
    """A case from a call of a module's functions."""

    def of(module: Any) -> Callable[..., Tensor]:
        return lambda *inputs, **keywords: call(module, *inputs, **keywords)

    return Case(of(ssl), of(reference), **facts)


CASES = {
    "nt_xent": both(
        lambda m, a, b, y, s, t, **kw: m.nt_xent_loss(a, b, 1 / s, **kw), blocks=2, rows=2
    ),
    "dcl": both(lambda m, a, b, y, s, t, **kw: m.dcl_loss(a, b, 1 / s, **kw), blocks=2, rows=2),
    "dclw": both(
        lambda m, a, b, y, s, t, **kw: m.dcl_loss(a, b, 1 / s, sigma=0.5, **kw),
        blocks=2,
        rows=2,
    ),
    "three views": both(
        lambda m, a, b, y, s, t, **kw: m.nt_xent_loss(
            (a, b, (a - 2 * b).tanh()), None, 1 / s, **kw
        ),
        blocks=3,
        rows=3,
    ),
    "info_nce": both(lambda m, a, b, y, s, t, **kw: m.info_nce_loss(a, b, None, 1 / s, **kw)),
    "info_nce ids": both(
        lambda m, a, b, y, s, t, **kw: m.info_nce_loss(a, b, None, 1 / s, query_ids=y, **kw)
    ),
    "info_nce fixed keys": both(
        lambda m, a, b, y, s, t, **kw: m.info_nce_loss(a, b.detach(), None, 1 / s, **kw)
    ),
    "clip": both(lambda m, a, b, y, s, t, **kw: m.clip_loss(a, b, s, normalize=True, **kw)),
    "siglip": both(lambda m, a, b, y, s, t, **kw: m.siglip_loss(a, b, s, t, normalize=True, **kw)),
    "siglip no bias": both(
        lambda m, a, b, y, s, t, **kw: m.siglip_loss(a, b, s, None, normalize=True, **kw)
    ),
    "sup_con": both(
        lambda m, a, b, y, s, t, **kw: m.sup_con_loss(torch.stack((a, b), 1), y, 1 / s, **kw),
        rows=2,
    ),
}


class Model(nn.Module):
    """A linear encoder, a log scale and a bias, so that DDP sees those of the loss as well."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        weight = torch.randn(D, D_IN, generator=generator, dtype=torch.float64)
        self.weight = nn.Parameter(weight.to(dtype))
        self.log_scale = nn.Parameter(torch.tensor(1.1, dtype=dtype))
        self.bias = nn.Parameter(torch.tensor(-0.7, dtype=dtype))

    def forward(self, x1: Tensor, x2: Tensor) -> tuple[Tensor, ...]:
        # All parameters take part, so that DDP misses none in the losses without a bias.
        return (
            x1 @ self.weight.T,
            x2 @ self.weight.T,
            self.log_scale.exp() + 0 * self.bias,
            self.bias + 0,
        )


def batch(world: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Two views and labels of the joined batch."""
    generator = torch.Generator().manual_seed(2)
    n = sum(SIZES[world])
    x1 = torch.randn(n, D_IN, generator=generator, dtype=torch.float64)
    x2 = x1 + 0.3 * torch.randn(x1.shape, generator=generator, dtype=torch.float64)
    labels = torch.randint(CLASSES, (n,), generator=generator)
    return x1.to(dtype), x2.to(dtype), labels


def row_weights(case: Case, world: int) -> tuple[Tensor, ...]:
    """Uneven gradients for the rows of reduction "none", one vector a rank."""
    generator = torch.Generator().manual_seed(3)
    return tuple(
        torch.rand(n * case.rows, generator=generator, dtype=torch.float64) for n in SIZES[world]
    )


def embeddings(world: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """The joined batch as it comes from the encoder."""
    x1, x2, labels = batch(world)
    z1, z2, *_ = Model()(x1, x2)
    return z1.detach().to(dtype), z2.detach().to(dtype), labels


def outcome(
    loss: Callable[..., Tensor],
    z: tuple[Tensor, Tensor],
    labels: Tensor,
    upstream: Tensor | float,
    **keywords: Any,
) -> list[Tensor]:
    """Loss and gradients of z1, z2, scale and bias."""
    dtype = z[0].dtype
    acc = torch.promote_types(dtype, torch.float32)
    numbers = (torch.tensor(3.0, dtype=acc), torch.tensor(-0.7, dtype=acc))
    leaves = [x.clone().requires_grad_() for x in (*z, *numbers)]
    value = loss(leaves[0], leaves[1], labels, *leaves[2:], **keywords)
    seed = torch.as_tensor(upstream, dtype=value.dtype).expand(value.shape)
    gradients = torch.autograd.grad(value, leaves, seed, materialize_grads=True)
    return [value.detach(), *gradients]


# ------------------------------------------------------------------------------------------ ranks


class Communication(TorchDispatchMode):
    """Names of the collectives that were called."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func.namespace == "c10d":
            self.ops.append(str(func))
        return func(*args, **(kwargs or {}))


@contextmanager
def process_group(folder: str, rank: int, world: int) -> Iterator[None]:
    """A gloo group that meets in a file: no port is chosen."""
    if sys.platform == "linux":  # a host name that does not resolve must not matter
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        f"file://{folder}/store",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=HANGS_S),
    )
    yield


def worker(rank: int, folder: str) -> None:
    """Everything that the tests look at; then the last rank dies in the middle of a step."""
    with process_group(folder, rank, WORLD):
        groups = {n: dist.new_group(list(range(n))) for n in SIZES if n < WORLD}
        doomed = dist.new_group(timeout=timedelta(seconds=HANGS_S))
        out: dict[Any, Any] = {}
        for world in SIZES:
            group = groups.get(world, True)
            if rank < world:
                out[world] = compute(rank, world, group, "world" if rank else groups[2])
        torch.save(out, Path(folder) / f"{rank}.pt")
        dist.barrier()
        torch.save(killed(rank, doomed), Path(folder) / f"killed{rank}.pt")
        sys.stdout.flush()
        os._exit(0)  # a group with a dead member cannot be left in peace


def compute(rank: int, world: int, group: Any, wrong_group: Any) -> dict[Any, Any]:
    out: dict[Any, Any] = {}
    for mode in MODES:
        keywords = {"group": group, "group_mode": mode}
        for name, case in CASES.items():
            for dtype in (torch.float64, torch.float32, torch.bfloat16):
                z1, z2, labels = (x.split(SIZES[world])[rank] for x in embeddings(world, dtype))
                for reduction in REDUCTIONS if dtype == torch.float64 else ("mean",):
                    seed = row_weights(case, world)[rank] if reduction == "none" else 0.7
                    found = outcome(
                        case.ours, (z1, z2), labels, seed, reduction=reduction, **keywords
                    )
                    out[name, mode, dtype, reduction] = found
            again = outcome(case.ours, (z1, z2), labels, 0.7, **keywords)
            out[name, mode, "same bits"] = all(map(torch.equal, again, found))
            out[name, mode, "ddp"] = ddp_gradients(case, rank, world, group, keywords)
        out["nan", mode] = with_nan(rank, world, keywords)
        out["zero scale", mode] = zero_scale(rank, world, keywords)
        out["errors", mode] = errors(rank, world, keywords, wrong_group)
    with ssl.backend("chunked"):
        z1, z2, labels = (x.split(SIZES[world])[rank] for x in embeddings(world, torch.float64))
        for name, case in CASES.items():
            out[name, "chunked"] = outcome(
                case.ours, (z1, z2), labels, 0.7, group=group, group_mode="ring"
            )
    if world == 2:
        for name, mode in (("nt_xent", "ring"), ("clip", "gather"), ("siglip", "ring")):
            keywords = {"group": group, "group_mode": mode}
            out["training", name] = training(CASES[name].ours, rank, keywords)
    if world == WORLD:
        out["queue"] = queue(rank)
        out["sampler"] = drawn()
    return out


def drawn() -> list[Tensor]:
    """What a loader of this rank gets in three epochs, rank and size being those of the group."""
    sampler = ssl.StratifiedSampler([5] * 9 + [2] * 2, 30, [0.7, 0.3], seed=11)
    loader = DataLoader(TensorDataset(torch.arange(11)), batch_size=4, sampler=sampler)
    epochs = []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        epochs.append(torch.cat([rows for (rows,) in loader]))
    return epochs


def ddp_gradients(
    case: Case, rank: int, world: int, group: Any, keywords: dict[str, Any]
) -> list[Tensor]:
    """Of the parameters under DDP: encoder, log scale, bias."""
    x1, x2, labels = (x.split(SIZES[world])[rank] for x in batch(world))
    ddp = nn.parallel.DistributedDataParallel(
        Model(), process_group=None if group is True else group
    )
    z1, z2, *scalars = ddp(x1, x2)
    value = case.ours(z1, z2, labels, *scalars, **keywords)
    value.backward()
    return [value.detach(), *(p.grad for p in ddp.module.parameters())]


def with_nan(rank: int, world: int, keywords: dict[str, Any]) -> dict[str, list[Tensor]]:
    """Loss and gradients of this rank, the first row of rank 0 having a NaN."""
    z1, z2, labels = (x.split(SIZES[world])[rank] for x in embeddings(world, torch.float32))
    z1 = poisoned(z1) if rank == 0 else z1
    return {
        name: outcome(case.ours, (z1, z2), labels, 1.0, **keywords) for name, case in CASES.items()
    }


def poisoned(z: Tensor) -> Tensor:
    z = z.clone()
    z[0, 0] = torch.nan
    return z


def zero_scale(rank: int, world: int, keywords: dict[str, Any]) -> Tensor:
    """The gradient of a scale of 0, for CLIP."""
    z1, z2, _ = (x.split(SIZES[world])[rank] for x in embeddings(world, torch.float64))
    zero = torch.zeros((), dtype=torch.float64, requires_grad=True)
    ssl.clip_loss(z1, z2, zero, normalize=True, **keywords).backward()
    return zero.grad


def errors(
    rank: int, world: int, keywords: dict[str, Any], wrong_group: Any
) -> dict[str, list[str]]:
    """What each loss raises on this rank."""
    z1, z2, labels = (x.split(SIZES[world])[rank] for x in embeddings(world, torch.float64))
    scale, bias = torch.tensor(3.0, dtype=torch.float64), torch.tensor(0.0, dtype=torch.float64)
    dtype = torch.float32 if rank else torch.float64
    found: dict[str, list[str]] = {}
    for name, case in CASES.items():
        trials: list[Any] = [
            lambda a, b: (a[:, : D - rank], b[:, : D - rank]),
            lambda a, b: (a.to(dtype), b.to(dtype)),
            lambda a, b: (a.clone().requires_grad_(rank == 0), b),
        ]
        said = []
        for change in trials:
            said.append(message(case.ours, *change(z1, z2), labels, scale, bias, **keywords))
        other = CASES["clip" if rank else "dcl"].ours
        said.append(message(other, z1, z2, labels, scale, bias, **keywords))
        found[name] = said
    one = CASES["nt_xent"].ours
    mode = {"group_mode": "auto" if rank else "ring"}
    views = (z1, z2) if rank else (z1, z2, z2)
    found["views"] = [message(lambda: ssl.nt_xent_loss(views, None, 0.1, **keywords))]
    found["group"] = [
        message(one, z1, z2, labels, scale, bias, group=wrong_group)
        if wrong_group == "world" or rank not in dist.get_process_group_ranks(wrong_group)
        else "",
        message(one, z1, z2, labels, scale, bias, **keywords | mode),
    ]
    return found


def message(call: Callable[..., Any], *inputs: Any, **keywords: Any) -> str:
    try:
        call(*inputs, **keywords)
    except (TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


class Encoder(nn.Module):
    """For 50 steps of training in float32."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(4)
            self.net = nn.Sequential(nn.Linear(D_IN, 16), nn.Tanh(), nn.Linear(16, D))
        self.log_scale = nn.Parameter(torch.tensor(1.0))
        self.bias = nn.Parameter(torch.tensor(-1.0))

    def forward(self, x1: Tensor, x2: Tensor) -> tuple[Tensor, ...]:
        return self.net(x1), self.net(x2), self.log_scale.exp() + 0 * self.bias, self.bias + 0


def training(
    loss: Callable[..., Tensor], rank: int | None, keywords: dict[str, Any]
) -> tuple[Tensor, list[Tensor]]:
    """Losses of the steps and the last parameters, on a rank of two or (None) in one process."""
    module = Encoder()
    model: Any = module
    if rank is not None:
        model = nn.parallel.DistributedDataParallel(module, process_group=keywords["group"])
    # A rate at which training is not chaotic: at twice that, plain PyTorch with another order of
    # sums is 1e-3 away after 50 steps.
    optimizer = torch.optim.SGD(module.parameters(), lr=0.05)
    generator = torch.Generator().manual_seed(5)
    losses = []
    for _ in range(STEPS):
        x1 = torch.randn(24, D_IN, generator=generator)
        x2 = x1 + 0.3 * torch.randn(24, D_IN, generator=generator)
        labels = torch.zeros(24, dtype=torch.int64)
        if rank is not None:  # unequal shares
            rows = slice(0, 10) if rank == 0 else slice(10, 24)
            x1, x2, labels = x1[rows], x2[rows], labels[rows]
        z1, z2, *scalars = model(x1, x2)
        value = loss(z1, z2, labels, *scalars, **keywords)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        losses.append(value.detach())
    return torch.stack(losses), [p.detach() for p in module.parameters()]


# -------------------------------------------------------------------------------------- the queue

QUEUE_SIZE, KEY_DIM = 11, 3
BATCHES = ((4, 3, 4, 2), (4, 4, 4, 4), (1, 0, 2, 3), (0, 0, 0, 0), (5, 1, 0, 0), (0, 4, 0, 1))


def key_batches(dtype: torch.dtype) -> list[list[tuple[Tensor, Tensor]]]:
    """For each step, keys and labels of each rank."""
    generator = torch.Generator().manual_seed(6)
    return [
        [
            (
                torch.randn(n, KEY_DIM, generator=generator).to(dtype),
                torch.randint(9, (n,), generator=generator),
            )
            for n in sizes
        ]
        for sizes in BATCHES
    ]


def queue(rank: int) -> dict[str, Any]:
    """Digests of queues that gather, how often they communicated, and what they refuse."""
    found: dict[str, Any] = {}
    for labelled in (False, True):
        for dtype in (torch.float32, torch.bfloat16):
            held = ssl.KeyQueue(QUEUE_SIZE, KEY_DIM, dtype=dtype, gather=True, labels=labelled)
            digests, collectives = [], []
            for step in key_batches(dtype):
                keys, labels = step[rank]
                with Communication() as communicated:
                    held.enqueue(keys, labels if labelled else None)
                digests.append(held.digest())
                collectives.append(len(communicated.ops))
            found[f"{labelled} {dtype}"] = (digests, collectives)
    held = ssl.KeyQueue(QUEUE_SIZE, KEY_DIM, gather=True)
    before = held.digest()
    dtype = torch.float16 if rank == 2 else torch.float32
    found["errors"] = [
        message(held.enqueue, torch.ones(2, KEY_DIM + (rank == 1))),
        message(held.enqueue, torch.ones(2, KEY_DIM, dtype=dtype)),
    ]
    found["untouched"] = held.digest() == before
    return found


# ----------------------------------------------------------------------------------- a rank that dies


def killed(rank: int, group: Any) -> list[str]:
    """The last rank dies between forward and backward; what the others' steps raise."""
    z = torch.randn(4, D, requires_grad=True)
    said = []
    loss = ssl.info_nce_loss(z, z + 0.1, group=group, group_mode="ring")
    if rank == WORLD - 1:
        os.kill(os.getpid(), signal.SIGKILL)
    for call in (loss.backward, lambda: ssl.clip_loss(z, z, 1.0, group=group, group_mode="gather")):
        try:
            call()
            said.append("nothing was raised")
        except RuntimeError as error:
            said.append("".join(traceback.format_exception_only(error)))
    return said
