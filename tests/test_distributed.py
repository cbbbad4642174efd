# SPDX-License-Identifier: Apache-2.0
"""Losses with negatives from every rank: 2 and 3 gloo processes against one process.

Ranks hold different numbers of samples.  All is float64, so that "equal" is equal to rounding.
Three processes are started once; they do everything, first all together, then two of them in a
group of their own, and hand their tensors back.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

import sslkernels
from sslkernels import distributed

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="torch without gloo")

SIZES = {2: (4, 3), 3: (3, 1, 5)}  # samples of each rank
D_IN, D = 7, 5
LOSSES = ("nt_xent", "clip")
REDUCTIONS = ("mean", "sum", "none")


class Model(nn.Module):
    """A linear encoder and a log scale, so that DDP sees the temperature as well."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.weight = nn.Parameter(torch.randn(D, D_IN, generator=generator, dtype=torch.float64))
        self.log_scale = nn.Parameter(torch.tensor(1.1, dtype=torch.float64))

    def forward(self, x1: Tensor, x2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return x1 @ self.weight.T, x2 @ self.weight.T, self.log_scale.exp()


def batch(world: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    x1 = torch.randn(sum(SIZES[world]), D_IN, generator=generator, dtype=torch.float64)
    return x1, x1 + 0.3 * torch.randn(x1.shape, generator=generator, dtype=torch.float64)


def row_weights(loss: str, world: int) -> tuple[Tensor, ...]:
    """Uneven gradients for the rows of reduction "none", one vector a rank."""
    views = 2 if loss == "nt_xent" else 1
    generator = torch.Generator().manual_seed(3)
    return tuple(
        torch.rand(n * views, generator=generator, dtype=torch.float64) for n in SIZES[world]
    )


def local_loss(
    loss: str, z1: Tensor, z2: Tensor, scale: Tensor, reduction: str, group: Any
) -> Tensor:
    function = distributed.global_nt_xent if loss == "nt_xent" else distributed.global_clip
    return function(z1, z2, scale, True, reduction, group)


def joined_loss(loss: str, z1: Tensor, z2: Tensor, scale: Tensor, reduction: str) -> Tensor:
    """Plain PyTorch on the joined batch."""
    if loss == "nt_xent":
        return sslkernels.reference.nt_xent_loss(z1, z2, 1 / scale, reduction=reduction)
    return sslkernels.reference.clip_loss(z1, z2, scale, normalize=True, reduction=reduction)


def worker(rank: int, folder: str) -> None:
    if sys.platform == "linux":  # a host name that does not resolve must not matter
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=max(SIZES))
    pair = dist.new_group([0, 1])
    out = {3: compute(rank, 3, True, pair if rank == 2 else "world")}
    if rank < 2:
        out[2] = compute(rank, 2, pair, "world")
    torch.save(out, Path(folder) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def compute(rank: int, world: int, group: Any, wrong_group: Any) -> dict[Any, Any]:
    """Everything that the tests look at, on one rank of a group."""
    out: dict[Any, Any] = {}
    x1, x2 = (x.split(SIZES[world])[rank] for x in batch(world))

    for loss in LOSSES:
        for reduction in REDUCTIONS:
            model = Model()
            value = local_loss(loss, *model(x1, x2), reduction, group)
            upstream = (
                row_weights(loss, world)[rank] if reduction == "none" else value.new_tensor(0.7)
            )
            value.backward(upstream)
            out[loss, reduction] = value.detach(), model.weight.grad, model.log_scale.grad

        ddp = nn.parallel.DistributedDataParallel(
            Model(), process_group=None if group is True else group
        )
        value = local_loss(loss, *ddp(x1, x2), "mean", group)
        value.backward()
        out[loss, "ddp"] = value.detach(), ddp.module.weight.grad, ddp.module.log_scale.grad

    z1, z2, _ = Model()(x1, x2)
    zero = torch.zeros((), dtype=torch.float64, requires_grad=True)
    local_loss("nt_xent", z1, z2, zero, "mean", group).backward()
    out["zero scale"] = zero.grad

    # bfloat16 rows as they are, and a rank without any rows.
    rows = (len(x1) if rank else 0, D)
    half = torch.full(rows, 0.5, dtype=torch.bfloat16, requires_grad=True)
    value = distributed.global_clip(half, half.detach(), torch.tensor(1.0), False, "mean", group)
    value.backward()
    out["bfloat16"] = value.detach(), half.grad

    out["public"] = (
        sslkernels.nt_xent_loss(x1, x2, 0.4, group=group),
        sslkernels.clip_loss(x1, x2, 2.0, normalize=True, group=group),
    )

    errors = []
    dtype = torch.float32 if rank else torch.float64
    for a, b, where in (
        (x1[:, : D_IN - rank], x2[:, : D_IN - rank], group),
        (x1.to(dtype), x2.to(dtype), group),
        (x1, x2, wrong_group),
    ):
        try:
            local_loss("nt_xent", a, b, torch.tensor(1.0, dtype=a.dtype), "mean", where)
            errors.append("none")
        except (TypeError, ValueError) as error:
            errors.append(f"{type(error).__name__}: {error}")
    out["errors"] = errors
    return out


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(worker, (str(folder),), nprocs=max(SIZES))
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(max(SIZES))]


@pytest.fixture(params=sorted(SIZES))
def results(request: pytest.FixtureRequest, processes: list[Any]) -> tuple[int, list[Any]]:
    """A world size and what each of its ranks computed."""
    world = request.param
    return world, [processes[rank][world] for rank in range(world)]


def expected(loss: str, reduction: str, world: int) -> tuple[Tensor, Tensor, Tensor]:
    model = Model()
    value = joined_loss(loss, *model(*batch(world)), "mean" if reduction == "ddp" else reduction)
    if reduction == "none":
        weights = row_weights(loss, world)
        value.backward(joined(loss, weights))
    else:
        value.backward(torch.tensor(1.0 if reduction == "ddp" else 0.7, dtype=torch.float64))
    return value.detach(), model.weight.grad, model.log_scale.grad


def joined(loss: str, rows: Any) -> Tensor:
    """Rows of every rank in the order of one process: all first views, then all second views."""
    if loss == "clip":
        return torch.cat(list(rows))
    halves = [r.chunk(2) for r in rows]
    return torch.cat([h[0] for h in halves] + [h[1] for h in halves])


def close(ours: Tensor, truth: Tensor) -> None:
    torch.testing.assert_close(ours, truth, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("reduction", [*REDUCTIONS, "ddp"])
@pytest.mark.parametrize("loss", LOSSES)
def test_ranks_together_are_one_process(results: Any, loss: str, reduction: str) -> None:
    world, ranks = results
    value, dweight, dlog_scale = expected(loss, reduction, world)
    ours = [rank[loss, reduction] for rank in ranks]
    if reduction == "none":
        close(joined(loss, [o[0] for o in ours]), value)
    else:
        close(ours[0][0], value)
        assert all(torch.equal(o[0], ours[0][0]) for o in ours), "the same bits on every rank"
    # "none" is a loss of local rows: the average over ranks is 1/W of the sum over all rows.
    factor = 1 / world if reduction == "none" else 1.0
    close(torch.stack([o[1] for o in ours]).mean(0), factor * dweight)
    close(torch.stack([o[2] for o in ours]).mean(), factor * dlog_scale)
    if reduction != "ddp":
        assert not torch.allclose(ours[0][1], ours[1][1]), "gradients of local rows only"


def test_a_scale_of_zero_has_a_gradient(results: Any) -> None:
    world, ranks = results
    z1, z2, _ = Model()(*batch(world))
    scale = torch.zeros((), dtype=torch.float64, requires_grad=True)
    z = nn.functional.normalize(torch.cat((z1, z2)).detach(), dim=1)
    n = len(z1)
    logits = (z @ z.T * scale).masked_fill(torch.eye(2 * n, dtype=torch.bool), -torch.inf)
    nn.functional.cross_entropy(logits, torch.arange(2 * n).roll(n)).backward()
    close(torch.stack([rank["zero scale"] for rank in ranks]).mean(), scale.grad)
    assert scale.grad.abs() > 1e-3


def test_halves_and_a_rank_without_rows(results: Any) -> None:
    """All rows equal: log of the number of pairs, and equal forces that cancel."""
    world, ranks = results
    total = sum(SIZES[world][1:])
    for index, rank in enumerate(ranks):
        value, gradient = rank["bfloat16"]
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, torch.tensor(float(total)).log())
        assert gradient.shape == (SIZES[world][index] if index else 0, D)
        assert gradient.dtype == torch.bfloat16
        assert gradient.float().abs().sum() < 1e-5


def test_public_functions_take_a_group(results: Any) -> None:
    world, ranks = results
    x1, x2 = batch(world)
    for rank in ranks:
        close(rank["public"][0], sslkernels.reference.nt_xent_loss(x1, x2, 0.4))
        close(rank["public"][1], sslkernels.reference.clip_loss(x1, x2, 2.0, normalize=True))


def test_every_rank_raises(results: Any) -> None:
    _, ranks = results
    for index, rank in enumerate(ranks):
        shapes, dtypes, group = rank["errors"]
        assert shapes.startswith("ValueError: nt_xent_loss: D and dtype must be the same")
        assert f"rank 1: [{SIZES[len(ranks)][1]}, {D_IN - 1}] torch.float64" in shapes
        assert dtypes.startswith("ValueError: nt_xent_loss: D and dtype") and "float32" in dtypes
        if index == 2:
            assert group.startswith("ValueError: nt_xent_loss: group must contain this process")
        else:
            assert group.startswith("TypeError: nt_xent_loss: group must be a torch.distributed")


@pytest.mark.parametrize(
    ("function", "op"),
    [(distributed.global_nt_xent, "nt_xent_loss"), (distributed.global_clip, "clip_loss")],
)
def test_without_initialised_processes(function: Any, op: str) -> None:
    x = torch.randn(3, 4)
    with pytest.raises(ValueError, match=f"{op}: group needs torch.distributed to be initialised"):
        function(x, x, torch.tensor(1.0), True, "mean", True)


@pytest.fixture
def one_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A group of this process alone."""
    if sys.platform == "linux":
        monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def leaves() -> tuple[Tensor, Tensor, Tensor]:
    z1, z2 = (torch.randn(6, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    return z1, z2, torch.tensor(3.0, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("loss", LOSSES)
def test_gradients_by_differences(
    one_rank: None, loss: str, normalize: bool, reduction: str
) -> None:
    function = distributed.global_nt_xent if loss == "nt_xent" else distributed.global_clip

    def value(z1: Tensor, z2: Tensor, scale: Tensor) -> Tensor:
        return function(z1, z2, scale, normalize, reduction, True)

    assert torch.autograd.gradcheck(value, leaves())


@pytest.mark.parametrize("loss", LOSSES)
def test_second_derivatives_raise(one_rank: None, loss: str) -> None:
    z1, z2, scale = leaves()
    value = local_loss(loss, z1, z2, scale, "mean", True)
    (first,) = torch.autograd.grad(value, z1, create_graph=True)
    with pytest.raises(RuntimeError, match="sslkernels::global_loss: second derivatives"):
        first.sum().backward()


def test_no_rows_and_one_row(one_rank: None) -> None:
    """No negatives: loss 0 and gradient 0."""
    for loss in LOSSES:
        for n in (0, 1):
            z = torch.ones(n, 4, dtype=torch.float64, requires_grad=True)
            scale = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
            value = local_loss(loss, z, z, scale, "mean", True)
            value.backward()
            assert value.item() == 0
            assert not z.grad.any() and z.grad.shape == z.shape and scale.grad.item() == 0


@pytest.mark.slow  # imports torch._dynamo
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # dynamo's own
def test_compiled_code_may_call_it(one_rank: None) -> None:
    def doubled(z1: Tensor, z2: Tensor, scale: Tensor) -> Tensor:
        return 2 * local_loss("nt_xent", 3 * z1, z2, scale, "mean", True)

    inputs = leaves()
    value, expected = torch.compile(doubled, backend="eager")(*inputs), doubled(*inputs)
    assert torch.equal(value, expected)
    for ours, eager in zip(
        torch.autograd.grad(value, inputs), torch.autograd.grad(expected, inputs), strict=True
    ):
        assert torch.equal(ours, eager)
