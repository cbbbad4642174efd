# SPDX-License-Identifier: Apache-2.0
"""The ring: 64 simulated ranks against one process, and memory for any number of ranks."""

from __future__ import annotations

from pathlib import Path

import distributed_cases as cases
import pytest
import torch
from distributed_cases import CASES
from helpers import threads
from peaks import Training
from simulated_ranks import LonelyRank, ThreadRank, World
from torch import Tensor

from benchmarks import distributed_model
from benchmarks.distributed_model import Step
from sslkernels import _ranks

RANKS = 64
ROWS = [(3 * rank) % 4 for rank in range(RANKS)]  # 0 to 3 samples a rank


@pytest.fixture(autouse=True)
def simulated(monkeypatch: pytest.MonkeyPatch) -> None:
    """The group is a simulated rank."""
    monkeypatch.setattr(_ranks, "connect", lambda op, group: group)


def batch() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(8)
    z1 = torch.randn(sum(ROWS), 6, generator=generator, dtype=torch.float64)
    z2 = z1 + 0.5 * torch.randn(z1.shape, generator=generator, dtype=torch.float64)
    return z1, z2, torch.randint(9, (len(z1),), generator=generator)


@pytest.mark.parametrize("name", ["nt_xent", "dclw", "info_nce ids", "clip", "siglip", "sup_con"])
def test_64_ranks_are_one_process(name: str) -> None:
    """Loss and gradients; every rank sent its blocks 63 times in each of the two passes."""
    case = CASES[name]
    shares = [x.split(ROWS) for x in batch()]

    def step(rank: ThreadRank) -> list[Tensor]:
        z1, z2, labels = (x[rank.rank] for x in shares)
        found = cases.outcome(case.ours, (z1, z2), labels, 1.0, group=rank, group_mode="ring")
        assert rank.steps == 2 * (RANKS - 1)
        return found

    value, d1, d2, dscale, dbias = zip(*World(RANKS).run(step), strict=True)
    z1, z2, labels = batch()
    truth = cases.outcome(case.reference, (z1, z2), labels, 1.0)
    ours = [torch.cat(d1), torch.cat(d2), torch.stack(dscale).sum(), torch.stack(dbias).sum()]
    assert all(torch.equal(x, value[0]) for x in value)
    torch.testing.assert_close(value[0], truth[0], rtol=1e-12, atol=1e-13)
    torch.testing.assert_close([x / RANKS for x in ours], truth[1:], rtol=1e-11, atol=1e-13)


def test_auto_takes_the_ring_for_large_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    z = torch.randn(8, 16)
    for limit, ring in ((4 * 8 * 16 * 4, False), (4 * 8 * 16 * 4 - 1, True)):
        monkeypatch.setattr(_ranks, "GATHER_BYTES", limit)
        rank = LonelyRank(4)
        CASES["clip"].ours(z, z, None, torch.tensor(1.0), None, group=rank)
        assert (rank.shifts > 0) == ring


N, D = 256, 32
BLOCK = N * D * 4  # bytes


def peak(name: str, ranks: int, mode: str, folder: Path) -> int:
    """Bytes that a step of one rank holds at once beyond its inputs."""
    n, d = N, D
    generator = torch.Generator().manual_seed(9)
    x, y = (torch.randn(n, d, generator=generator) for _ in range(2))
    labels = torch.arange(n) % 50
    rank = LonelyRank(ranks)

    def loss(a: Tensor, b: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        return CASES[name].ours(a, b, labels, scale, bias, group=rank, group_mode=mode)

    with threads(2):
        return Training(loss, x, y, torch.tensor(5.0), torch.tensor(-5.0)).peak(folder)


@pytest.mark.parametrize("name", ["nt_xent", "dclw", "info_nce", "clip", "siglip", "sup_con"])
def test_memory_does_not_grow_with_the_number_of_ranks(name: str, tmp_path: Path) -> None:
    """But for the table of the ranks' sizes, which is a few numbers a rank."""
    few, many = (peak(name, ranks, "ring", tmp_path) for ranks in (3, 9))
    table = 6 * 16 * 8
    assert few < 40 * BLOCK, few
    assert many <= few + table, (few, many)


def test_memory_of_gathering_grows(tmp_path: Path) -> None:
    """What the test above would see."""
    few, many = (peak("clip", ranks, "gather", tmp_path) for ranks in (3, 9))
    assert many > few + 6 * BLOCK


@pytest.mark.parametrize("loss", ["nt_xent", "clip"])
@pytest.mark.parametrize("mode", cases.MODES)
def test_the_model_counts_what_is_sent(loss: str, mode: str) -> None:
    for ranks in (3, 8):
        rank = LonelyRank(ranks)
        z = torch.randn(N, D)
        cases.outcome(CASES[loss].ours, (z, z), torch.arange(N), 1.0, group=rank, group_mode=mode)
        assert rank.sent == Step(loss, ranks, N, D, element=4).sent(mode)


@pytest.mark.parametrize("loss", ["nt_xent", "clip"])
def test_the_model_of_memory_grows_as_the_code_does(loss: str, tmp_path: Path) -> None:
    """Per rank, gathered; blocks of the backend and of the loss itself come on top, as of one rank."""
    model, counted = (
        [size(ranks) for ranks in (3, 9)]
        for size in (
            lambda ranks: Step(loss, ranks, N, D, element=4).held("gather"),
            lambda ranks: peak(loss, ranks, "gather", tmp_path),
        )
    )
    growth = (counted[1] - counted[0]) / (model[1] - model[0])
    assert 0.5 < growth < 2, (model, counted)
    ring = Step(loss, 9, N, D, element=4).held("ring")
    assert ring < peak(loss, 9, "ring", tmp_path)
    assert ring == Step(loss, 4096, N, D, element=4).held("ring")


def test_the_document_holds_the_generated_table(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert distributed_model.main(["--check"]) == 0, capsys.readouterr().out
    monkeypatch.setattr(distributed_model, "LINK", 1e9)
    assert distributed_model.main(["--check"]) == 1
