# SPDX-License-Identifier: Apache-2.0
"""Losses with negatives from every rank: 2, 3 and 4 gloo processes against one process.

Ranks hold different numbers of samples, one of three holds none.  Four processes are started once; they
do everything, in groups of two and three of them and all together, and hand their tensors back.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import distributed_cases as cases
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from distributed_cases import CASES, MODES, REDUCTIONS, SIZES, WORLD
from helpers import HANGS_S, SLACK, check_budget, threads
from torch import Tensor, nn

import sslkernels as ssl

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="torch without gloo")
LAST = WORLD - 1  # the rank that is killed


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the ranks, all of which have ended, left what they found."""
    folder = tmp_path_factory.mktemp("ranks")
    context = mp.get_context("spawn")
    ranks = [context.Process(target=cases.worker, args=(r, str(folder))) for r in range(WORLD)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(HANGS_S)
    codes = [process.exitcode for process in ranks]
    assert codes[:LAST] == [0] * LAST, f"a rank failed, see its traceback above: {codes}"
    assert codes[LAST] == -9, "the last rank was killed by its own hand"
    return folder


@pytest.fixture(scope="module")
def processes(folder: Path) -> list[Any]:
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(WORLD)]


@pytest.fixture(params=sorted(SIZES))
def results(request: pytest.FixtureRequest, processes: list[Any]) -> tuple[int, list[Any]]:
    """A world size and what each of its ranks computed."""
    world = request.param
    return world, [processes[rank][world] for rank in range(world)]


def joined(case: cases.Case, parts: list[Tensor]) -> Tensor:
    """Rows of every rank in the order of one process."""
    if case.blocks == 1:
        return torch.cat(parts)
    blocks = [part.view(case.blocks, -1) for part in parts]
    return torch.cat(blocks, 1).flatten()


def together(case: cases.Case, ranks: list[list[Tensor]], reduction: str) -> list[Tensor]:
    """What the ranks computed, as loss and gradients of one process.

    Gradients follow the average over ranks, so those of local rows are W times those of the joined
    batch; with "none" each rank differentiates its own rows, and the sum over ranks is the whole.
    """
    world = len(ranks)
    value, d1, d2, dscale, dbias = zip(*ranks, strict=True)
    part = 1 if reduction == "none" else world
    return [
        joined(case, list(value)) if reduction == "none" else value[0],
        torch.cat(d1) / part,
        torch.cat(d2) / part,
        torch.stack(dscale).sum() / part,
        torch.stack(dbias).sum() / part,
    ]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", CASES)
def test_ranks_together_are_one_process(results: Any, name: str, mode: str) -> None:
    """Loss and every gradient within the error budget of the joined batch."""
    world, ranks = results
    case = CASES[name]
    trials = [(torch.float64, reduction) for reduction in REDUCTIONS]
    trials += [(torch.float32, "mean"), (torch.bfloat16, "mean")]
    for dtype, reduction in trials:
        per_rank = [rank[name, mode, dtype, reduction] for rank in ranks]
        if reduction != "none":
            same = all(torch.equal(found[0], per_rank[0][0]) for found in per_rank)
            assert same, "the same bits of the loss on every rank"
        z1, z2, labels = cases.embeddings(world, dtype)
        seed: Any = 0.7
        if reduction == "none":
            seed = joined(case, list(cases.row_weights(case, world)))
        eager = cases.outcome(case.reference, (z1, z2), labels, seed, reduction=reduction)
        wide = (z1.double(), z2.double())
        truth = cases.outcome(case.reference, wide, labels, seed, reduction=reduction)
        ours = together(case, per_rank, reduction)
        for what, o, e, t in zip(
            ("loss", "dz1", "dz2", "dscale", "dbias"), ours, eager, truth, strict=True
        ):
            label = f"{name} {mode} {reduction} {dtype} {what}"
            slack = min(SLACK[dtype], 2e-6) if what == "loss" else SLACK[dtype]
            check_budget(o, e, t, slack, label, 2e-2 if t.ndim else 1.0)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", CASES)
def test_ddp_has_the_gradients_of_the_joined_batch(results: Any, name: str, mode: str) -> None:
    """Encoder, temperature and bias, as DDP's averaging leaves them on every rank."""
    world, ranks = results
    x1, x2, labels = cases.batch(world)
    model = cases.Model()
    z1, z2, *scalars = model(x1, x2)
    value = CASES[name].reference(z1, z2, labels, *scalars)
    value.backward()
    truth = [value.detach(), *(p.grad for p in model.parameters())]
    for rank in ranks:
        torch.testing.assert_close(rank[name, mode, "ddp"], truth, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("name", CASES)
def test_every_backend_serves_the_ring(results: Any, name: str) -> None:
    world, ranks = results
    z1, z2, labels = cases.embeddings(world, torch.float64)
    truth = cases.outcome(CASES[name].reference, (z1, z2), labels, 0.7)
    ours = together(CASES[name], [rank[name, "chunked"] for rank in ranks], "mean")
    torch.testing.assert_close(ours, truth, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("mode", MODES)
def test_the_same_bits_again(results: Any, mode: str) -> None:
    for rank in results[1]:
        assert all(rank[name, mode, "same bits"] for name in CASES)


@pytest.mark.parametrize("name", ["nt_xent", "clip", "siglip"])
def test_fifty_steps_follow_one_process(processes: list[Any], name: str) -> None:
    """float32, two ranks with unequal shares: losses and weights within 1e-5."""
    with threads(1):
        losses, parameters = cases.training(CASES[name].reference, None, {})
    assert losses[-1] < 0.9 * losses[0], "it trains"
    for rank in processes[:2]:
        ours, weights = rank[2]["training", name]
        torch.testing.assert_close(ours, losses, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(weights, parameters, rtol=1e-5, atol=1e-5)


# --------------------------------------------------------------------------------------- failures


@pytest.mark.parametrize("mode", MODES)
def test_a_nan_on_one_rank_is_nan_on_all(results: Any, mode: str) -> None:
    """The loss, and the gradients that are NaN in one process."""
    world, ranks = results
    z1, z2, labels = cases.embeddings(world, torch.float32)
    for name, case in CASES.items():
        assert all(rank["nan", mode][name][0].isnan() for rank in ranks)
        ours = together(case, [rank["nan", mode][name] for rank in ranks], "mean")
        alone = cases.outcome(case.ours, (cases.poisoned(z1), z2), labels, 1.0)
        assert alone[1][0].isnan().all()
        for what, o, a in zip(("loss", "dz1", "dz2", "dscale"), ours, alone, strict=False):
            assert torch.equal(o.isnan(), a.isnan()), f"{name}: {what} {o} {a}"


@pytest.mark.parametrize("mode", MODES)
def test_a_scale_of_zero_has_a_gradient(results: Any, mode: str) -> None:
    world, ranks = results
    z1, z2, _ = cases.embeddings(world, torch.float64)
    zero = torch.zeros((), dtype=torch.float64, requires_grad=True)
    ssl.reference.clip_loss(z1, z2, zero, normalize=True).backward()
    ours = torch.stack([rank["zero scale", mode] for rank in ranks]).mean()
    torch.testing.assert_close(ours, zero.grad, rtol=1e-11, atol=1e-13)
    assert zero.grad.abs() > 1e-3


@pytest.mark.parametrize("mode", MODES)
def test_every_rank_raises_and_names_both(results: Any, mode: str) -> None:
    """Ranks that differ would hang, or compute something else."""
    world, ranks = results
    n = SIZES[world]
    functions = {name: name.split()[0].replace("dclw", "dcl") + "_loss" for name in CASES}
    functions["three views"] = "nt_xent_loss"
    for rank in ranks:
        for name, op in functions.items():
            shapes, dtypes, gradients, losses = rank["errors", mode][name]
            must = f"ValueError: {op}: D and dtype must be the same on every rank of group, got "
            rows = 2 if name == "sup_con" else 1
            assert shapes.startswith(must), shapes
            assert f"rank 0: [{rows * n[0]}, {cases.D}] torch.float64" in shapes
            assert f"rank 1: [{rows * n[1]}, {cases.D - 1}] torch.float64" in shapes
            assert dtypes.startswith(must) and "torch.float64, rank 1:" in dtypes
            assert dtypes.endswith("torch.float32")
            assert gradients == (
                f"ValueError: {op}: whether the first features require grad must be the same on "
                "every rank of group, got rank 0: True, rank 1: False"
            )
            assert losses.endswith("got rank 0: dcl_loss, rank 1: clip_loss"), losses
        (views,) = rank["errors", mode]["views"]
        assert "the number of views must be" in views and views.endswith("rank 0: 3, rank 1: 2")
        group, modes = rank["errors", mode]["group"]
        assert group == "" or "group must " in group
        assert modes.endswith("got rank 0: ring, rank 1: auto")


def test_the_wrong_group(processes: list[Any]) -> None:
    said = [rank[WORLD]["errors", "ring"]["group"][0] for rank in processes]
    for text in said[1:]:
        assert text.startswith("TypeError: nt_xent_loss: group must be a torch.distributed"), text


def test_a_rank_that_is_killed_is_an_error_on_the_others(folder: Path) -> None:
    for rank in range(LAST):
        for said in torch.load(folder / f"killed{rank}.pt"):
            assert "Error" in said and "nothing was raised" not in said, said


# ------------------------------------------------------------------------------------------ queue


def test_queues_of_all_ranks_are_one(processes: list[Any]) -> None:
    """The same bits on every rank, those of one queue that gets all keys in the order of ranks."""
    for labelled in (False, True):
        for dtype in (torch.float32, torch.bfloat16):
            one = ssl.KeyQueue(cases.QUEUE_SIZE, cases.KEY_DIM, dtype=dtype, labels=labelled)
            digests = []
            for step in cases.key_batches(dtype):
                keys, labels = (torch.cat(parts) for parts in zip(*step, strict=True))
                one.enqueue(keys, labels if labelled else None)
                digests.append(one.digest())
            assert len(set(digests)) == len(digests) - 1, "only the empty step changes nothing"
            for rank in processes:
                found, collectives = rank[WORLD]["queue"][f"{labelled} {dtype}"]
                assert found == digests
                # The first step and the one with the largest batch so far say how much will come.
                assert collectives == [2, 1, 1, 1, 2, 1]


def test_a_queue_refuses_keys_that_differ(processes: list[Any]) -> None:
    for rank in processes:
        shapes, dtypes = rank[WORLD]["queue"]["errors"]
        must = "ValueError: enqueue: D and dtype of keys must be the same on every rank of group, "
        assert shapes == must + "got rank 0: [2, 3] torch.float32, rank 1: [2, 4] torch.float32"
        assert dtypes == must + "got rank 0: [2, 3] torch.float32, rank 2: [2, 3] torch.float16"
        assert rank[WORLD]["queue"]["untouched"]


# -------------------------------------------------------------------------------------- sampling


def test_ranks_share_the_draws_of_an_epoch(processes: list[Any]) -> None:
    """Real processes: rank r has every W-th draw from r on of what one process draws, each epoch anew."""
    one = ssl.StratifiedSampler([5] * 9 + [2] * 2, 32, [0.7, 0.3], seed=11)  # 30, rounded up
    epochs = [one.draw(epoch) for epoch in range(3)]
    assert len({tuple(e.tolist()) for e in epochs}) == 3
    for rank, found in enumerate(processes):
        for epoch, rows in zip(epochs, found[WORLD]["sampler"], strict=True):
            assert torch.equal(rows, epoch[rank::WORLD])


# ------------------------------------------------------------------------------------- one process


@pytest.mark.parametrize("name", CASES)
def test_without_initialised_processes(name: str) -> None:
    x, y = torch.randn(3, 4), torch.arange(3)
    with pytest.raises(ValueError, match="_loss: group needs torch.distributed to be initialised"):
        CASES[name].ours(x, x, y, torch.tensor(1.0), torch.tensor(0.0), group=True)


@pytest.mark.parametrize("name", CASES)
def test_an_unknown_mode(name: str) -> None:
    x, y = torch.randn(3, 4), torch.arange(3)
    with pytest.raises(ValueError, match=r"_loss: group_mode must be one of \['auto', 'gather'"):
        CASES[name].ours(x, x, y, torch.tensor(1.0), torch.tensor(0.0), group_mode="star")
    with pytest.raises(ValueError, match="NTXentLoss: group_mode must be one of"):
        ssl.NTXentLoss(group_mode="star")


@pytest.fixture
def one_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A group of this process alone."""
    if sys.platform == "linux":
        monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def leaves() -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    z1, z2 = (
        torch.randn(6, 4, dtype=torch.float64, generator=generator, requires_grad=True)
        for _ in range(2)
    )
    numbers = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (3.0, -0.5))
    return [z1, z2, *numbers]


def on_one_rank(name: str, **keywords: Any) -> Any:
    labels = torch.tensor([0, 1, 0, 2, 1, 0])

    def value(z1: Tensor, z2: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        return CASES[name].ours(z1, z2, labels, scale, bias, group=True, **keywords)

    return value


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("name", sorted(set(CASES) - {"info_nce fixed keys", "dclw"}))
def test_gradients_by_differences(one_rank: None, name: str, reduction: str) -> None:
    assert torch.autograd.gradcheck(on_one_rank(name, reduction=reduction), leaves())


@pytest.mark.parametrize("name", CASES)
def test_second_derivatives_raise(one_rank: None, name: str) -> None:
    inputs = leaves()
    (first,) = torch.autograd.grad(on_one_rank(name)(*inputs), inputs[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="sslkernels::global_loss: second derivatives"):
        first.sum().backward()


def test_transforms_are_refused(one_rank: None) -> None:
    for name in CASES:
        with pytest.raises(RuntimeError, match="_loss: group does not work in transforms"):
            torch.func.grad(on_one_rank(name))(*leaves())


@pytest.mark.parametrize("name", CASES)
def test_no_rows_and_one_row(one_rank: None, name: str) -> None:
    """As in one process without a group, gradients too."""
    case = CASES[name]
    for n in (0, 1):
        z = torch.ones(n, 4, dtype=torch.float64)
        labels = torch.zeros(n, dtype=torch.int64)
        ours = cases.outcome(case.ours, (z, z), labels, 1.0, group=True)
        alone = cases.outcome(case.ours, (z, z), labels, 1.0)
        torch.testing.assert_close(ours, alone, rtol=1e-12, atol=1e-14)


def test_what_does_not_go_with_a_group(one_rank: None) -> None:
    x = torch.randn(3, 4)
    for keywords in (
        {"negative_keys": x},
        {"compute_dtype": torch.bfloat16},
        {"return_metrics": True},
    ):
        with pytest.raises(ValueError, match="info_nce_loss: group works without negative_keys"):
            ssl.info_nce_loss(x, x, group=True, **keywords)


def test_modules_pass_the_group_on(one_rank: None) -> None:
    z1, z2, scale, bias = (x.detach() for x in leaves())
    labels = torch.tensor([0, 1, 0, 2, 1, 0])
    modules: list[tuple[type[nn.Module], tuple[Any, ...]]] = [
        (ssl.NTXentLoss, (z1, z2)),
        (ssl.InfoNCELoss, (z1, z2)),
        (ssl.CLIPLoss, (z1, z2, scale)),
        (ssl.SigLIPLoss, (z1, z2, scale, bias)),
        (ssl.SupConLoss, (z1, labels)),
        (ssl.DCLLoss, (z1, z2)),
    ]
    for module, inputs in modules:
        with_group = module(group=True, group_mode="ring")
        assert "group_mode='ring'" in repr(with_group)
        torch.testing.assert_close(with_group(*inputs), module()(*inputs), rtol=1e-12, atol=1e-14)


@pytest.mark.slow  # imports torch._dynamo
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # dynamo's own
def test_compiled_code_may_call_it(one_rank: None) -> None:
    def doubled(z1: Tensor, z2: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        return 2 * on_one_rank("nt_xent")(3 * z1, z2, scale, bias)

    inputs = leaves()
    value, expected = torch.compile(doubled, backend="eager")(*inputs), doubled(*inputs)
    assert torch.equal(value, expected)
    for ours, eager in zip(
        torch.autograd.grad(value, inputs, allow_unused=True),
        torch.autograd.grad(expected, inputs, allow_unused=True),
        strict=True,
    ):
        assert (ours is None and eager is None) or torch.equal(ours, eager)
