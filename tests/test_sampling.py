# SPDX-License-Identifier: Apache-2.0
"""Draws have the probabilities that they should, estimates are unbiased, and cells are nearest centres."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from helpers import engine, engines
from torch.utils.data import DataLoader, TensorDataset

import sslkernels
from sslkernels import StratifiedSampler, k_means

stats = pytest.importorskip("scipy.stats", reason="comes with the packages of the trainers")

SIZES = [1, 4, 25, 170]  # of the cells; seeds below are fixed, so that no test depends on luck
CELLS = torch.tensor([7, 3, 5, 9]).repeat_interleave(torch.tensor(SIZES))[
    torch.randperm(200, generator=torch.Generator().manual_seed(3))
]
P = {7: 0.1, 3: 0.2, 5: 0.3, 9: 0.4}
DRAWS = 40_000
# By epoch, of the sampler of test_draws_are_the_same_everywhere.
FIRST_DRAWS = {0: [9, 8, 0, 5, 8, 7, 9, 9, 7, 7, 8, 3], 7: [9, 9, 3, 6, 9, 9, 5, 7, 5, 9, 2, 9]}


def sampler(**options: Any) -> StratifiedSampler:
    return StratifiedSampler(CELLS, DRAWS, P, **options)


def test_cells_and_samples_have_their_probabilities() -> None:
    for epoch in range(3):
        drawn = sampler(seed=1).draw(epoch)
        assert drawn.dtype == torch.int64 and drawn.shape == (DRAWS,)
        found = torch.bincount(drawn, minlength=200).double()
        expected = torch.tensor([DRAWS * P[int(c)] / (CELLS == c).sum() for c in CELLS])
        assert stats.chisquare(found.numpy(), expected.numpy()).pvalue > 0.001


def table_of(a: np.ndarray, b: np.ndarray, kinds: int) -> np.ndarray:
    table = np.zeros((kinds, kinds))
    np.add.at(table, (a, b), 1)
    return table


def test_draws_are_independent() -> None:
    """Of those before them, of the next epoch and of a neighbouring seed: cells, and samples in a cell."""
    first, later, other = (
        s.draw(epoch)
        for s, epoch in ((sampler(seed=1), 0), (sampler(seed=1), 1), (sampler(seed=2), 0))
    )
    lagged = [(first[:-k], first[k:]) for k in (1, 2, 3, 16)]
    cell = torch.searchsorted(torch.tensor(sorted(P)), CELLS)
    member = CELLS == 9
    part = torch.full((200,), -1)  # five groups of the 170 samples of the largest cell
    part[member] = torch.arange(170) % 5
    for a, b in (*lagged, (first, later), (first, other)):
        assert stats.chi2_contingency(table_of(cell[a].numpy(), cell[b].numpy(), 4)).pvalue > 0.001
        both = member[a] & member[b]
        found = table_of(part[a[both]].numpy(), part[b[both]].numpy(), 5)
        assert found.sum() > 5000 and stats.chi2_contingency(found).pvalue > 0.001


def test_the_sample_does_not_depend_on_the_draws_of_cells() -> None:
    """The two numbers of a draw: which sample of cell 9 it is, given the cell of the draw before."""
    drawn = sampler(seed=6).draw()
    cell = torch.searchsorted(torch.tensor(sorted(P)), CELLS)
    here = torch.nonzero(CELLS[drawn[1:]] == 9)[:, 0]
    half = (torch.cumsum(CELLS == 9, 0) > 85)[drawn[1:][here]].long()
    table = np.zeros((4, 2))
    np.add.at(table, (cell[drawn[here]].numpy(), half.numpy()), 1)
    assert stats.chi2_contingency(table).pvalue > 0.001


def test_duplicates_come_as_often_as_independent_draws_have_them() -> None:
    """Equal neighbours and different samples of an epoch, against their exact expectations."""
    chance = torch.tensor([P[int(c)] / (CELLS == c).sum() for c in CELLS], dtype=torch.float64)
    drawn = sampler(seed=9).draw()
    equal = int((drawn[1:] == drawn[:-1]).sum())
    expected = float(chance.square().sum()) * (DRAWS - 1)
    assert (
        stats.chisquare([equal, DRAWS - 1 - equal], [expected, DRAWS - 1 - expected]).pvalue > 0.001
    )
    own = StratifiedSampler(CELLS, 200, P, seed=9)
    different = torch.tensor([float(own.draw(e).unique().numel()) for e in range(400)])
    mean = float((1 - (1 - chance) ** 200).sum())
    assert mean < 130 and abs(different.mean() - mean) < 3.5 * different.std() / 400**0.5


@pytest.mark.parametrize("moment", [1, 2])
def test_weights_make_estimates_unbiased(moment: int) -> None:
    """The mean and the second moment, from 1000 small samples; unweighted ones are far off."""
    f = (torch.arange(200, dtype=torch.float64) / 50 + CELLS).pow(moment)
    own = StratifiedSampler(CELLS, 50, P, seed=5)
    estimates, plain = [], []
    for epoch in range(1000):
        drawn = own.draw(epoch)
        estimates.append((own.weights[drawn] * f[drawn]).mean())
        plain.append(f[drawn].mean())
    for found, holds in ((torch.stack(estimates), True), (torch.stack(plain), False)):
        error = abs(found.mean() - f.mean()) / (found.std() / 1000**0.5)
        assert (error < 3.5) == holds, error
    one = StratifiedSampler(CELLS, 50, P).weights
    assert torch.allclose(one[CELLS == 9], torch.tensor(170 / (200 * 0.4), dtype=torch.float64))


def test_the_variance_of_the_data_has_an_unbiased_estimate() -> None:
    """Of f over the data: weighted squares, less the products of different draws for the squared mean.

    The variance of the estimated mean has one too, by the deviation of the weighted values.
    """
    f = torch.arange(200, dtype=torch.float64) / 50 + CELLS
    own, n, times = StratifiedSampler(CELLS, 40 * 4000, P, seed=12), 40, 4000
    drawn = own.draw().view(times, n)
    g = own.weights[drawn] * f[drawn]
    squared_mean = (g.sum(1).square() - g.square().sum(1)) / (n * (n - 1))
    estimates = (own.weights[drawn] * f[drawn].square()).mean(1) - squared_mean
    chance = 1 / (200 * own.weights)
    exact = (chance * (own.weights * f - f.mean()).square()).sum() / n
    data = f.var(correction=0)
    for found, truth, holds in (
        (estimates, data, True),
        (f[drawn].var(1), data, False),  # without weights
        (g.var(1) / n, exact, True),
        (f[drawn].var(1) / n, exact, False),
    ):
        error = abs(found.mean() - truth) / (found.std() / times**0.5)
        assert (error < 3.5) == holds, error
    # The estimated means themselves: a variance of 4000 values is good to 2.3 %.
    assert g.mean(1).var() == pytest.approx(float(exact), rel=0.1)


def test_the_variance_is_that_of_independent_draws() -> None:
    f = torch.arange(200, dtype=torch.float64)
    own = StratifiedSampler(CELLS, 64, P, seed=8)
    chance = 1 / (200 * own.weights)
    mean = f.mean()
    expected = (chance * (own.weights * f - mean).square()).sum() / 64
    found = torch.stack(
        [(own.weights[d] * f[d]).mean() for d in (own.draw(e) for e in range(2000))]
    )
    assert found.var() / expected == pytest.approx(1, abs=0.12)  # 4 standard errors


def test_an_epoch_is_a_function_of_seed_and_epoch() -> None:
    a, b = sampler(seed=4), sampler(seed=4)
    torch.manual_seed(0)
    assert torch.equal(a.draw(2), b.draw(2))
    before = torch.get_rng_state()
    a.set_epoch(2)
    assert list(a) == b.draw(2).tolist()
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(a.draw(2), a.draw(3))
    assert not torch.equal(a.draw(2), sampler(seed=5).draw(2))
    assert len(set(list(a))) < len(a)  # with replacement
    assert not torch.equal(sampler(seed=0).draw(1), sampler(seed=1).draw(0))


def test_draws_are_the_same_everywhere() -> None:
    """The numbers themselves: another version, machine or process has them too, and workers of a loader."""
    own = StratifiedSampler([0] * 6 + [1] * 3 + [2], 12, [0.2, 0.3, 0.5], seed=2026)
    assert own.draw(0).tolist() == FIRST_DRAWS[0] and own.draw(7).tolist() == FIRST_DRAWS[7]
    data = TensorDataset(torch.arange(10))
    for workers in (0, 2):
        loader = DataLoader(data, batch_size=5, sampler=own, num_workers=workers)
        assert torch.cat([rows for (rows,) in loader]).tolist() == FIRST_DRAWS[0]


@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_ranks_share_one_sequence(world: int, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = StratifiedSampler(CELLS, 100, P, seed=3)
    parts = [
        StratifiedSampler(CELLS, 100, P, seed=3, rank=r, world_size=world) for r in range(world)
    ]
    each = -(-100 // world)
    assert [len(p) for p in parts] == [each] * world
    mixed = torch.tensor([list(p) for p in parts]).T.flatten()
    assert torch.equal(mixed, parts[0].draw()) and len(mixed) == each * world
    if world == 1:
        assert torch.equal(mixed, whole.draw())
    for name, value in (
        ("is_initialized", True),
        ("get_rank", world - 1),
        ("get_world_size", world),
    ):
        monkeypatch.setattr(torch.distributed, name, lambda value=value: value)
    assert list(StratifiedSampler(CELLS, 100, P, seed=3)) == list(parts[-1])


def test_a_loader_draws_by_cells() -> None:
    data = TensorDataset(torch.arange(200), CELLS)
    own = StratifiedSampler(CELLS.numpy().astype(np.int16), 2000, seed=2)
    loader = DataLoader(data, batch_size=50, sampler=own)
    assert len(loader) == 40
    cells = torch.cat([cell for _, cell in loader])
    shares = [(cells == c).double().mean().item() for c in (3, 5, 7, 9)]
    assert shares == pytest.approx([0.25] * 4, abs=0.04)
    assert own.values.tolist() == [3, 5, 7, 9]
    assert torch.equal(own.values[own.cells], CELLS)
    alone = StratifiedSampler([4, 4, 4], 5)
    assert alone.weights.tolist() == [1, 1, 1] and set(alone) <= {0, 1, 2}


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (([0.5, 1.0],), {}, "cells must be integers, got torch.float32"),
        (([],), {}, "cells must"),
        (([[1]],), {}, "cells must have shape [N] with N >= 1, got [1, 1]"),
        (([1, 2], 0), {}, "num_samples must be an integer of at least 1, got 0"),
        (([1, 2], 4, [1.0]), {}, "probabilities must have shape [2], one for each cell, got [1]"),
        (([1, 2], 4, [1.0, 0.0]), {}, "finite and greater than 0, got 0.0"),
        (([1, 2], 4, [1.0, float("nan")]), {}, "finite and greater than 0, got nan"),
        (([1, 2], 4, {1: 0.5, 3: 0.5}), {}, "cell 2 is in one of the two only"),
        (([1, 2],), {"rank": 2, "world_size": 2}, "rank must be less than world_size 2, got 2"),
        (([1, 2],), {"seed": -1}, "seed must be"),
    ],
)
def test_bad_arguments_are_named(arguments: Any, options: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=re.escape(message)) as caught:
        StratifiedSampler(*arguments, **options)
    assert str(caught.value).startswith("StratifiedSampler: ")


# ---- k-means -------------------------------------------------------------------------------------


def lloyd(x: torch.Tensor, k: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition, in float64 with a matrix of distances."""
    x = x.double()
    centres = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[:k]].clone()
    for _ in range(50):
        cells = torch.cdist(x, centres).argmin(1)
        for c in cells.unique():
            centres[c] = x[cells == c].mean(0)
    return torch.cdist(x, centres).argmin(1), centres


@pytest.mark.parametrize("name", engines())
@pytest.mark.parametrize(("n", "k", "d"), [(60, 3, 2), (203, 9, 17), (31, 31, 5), (40, 1, 3)])
def test_k_means_is_lloyds(name: str, n: int, k: int, d: int) -> None:
    generator = torch.Generator().manual_seed(n)
    x = torch.randn(n, d, generator=generator) + 4 * torch.randint(3, (n, 1), generator=generator)
    with engine(name):
        found = k_means(x, k, iterations=50, seed=2)
        again = k_means(x, k, iterations=50, seed=2)
    cells, centres = lloyd(x, k, 2)
    assert torch.equal(found.cells, cells)
    torch.testing.assert_close(found.centres.double(), centres, rtol=1e-5, atol=1e-5)
    inertia = (x.double() - centres[cells]).square().sum(1).mean()
    assert found.inertia.item() == pytest.approx(inertia.item(), rel=1e-5, abs=1e-9)
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))


def test_k_means_keeps_empty_centres_and_takes_halves() -> None:
    x = torch.zeros(6, 3)
    found = k_means(x, 4)
    assert found.inertia == 0 and found.centres.isfinite().all()
    halves = torch.randn(50, 8).bfloat16()
    whole = k_means(halves.float(), 5, normalize=True)
    own = k_means(halves, 5, normalize=True)
    assert own.centres.dtype == torch.float32 and torch.equal(own.cells, whole.cells)
    for arguments, message in (((x, 7), "at most the 6 rows"), ((x, 0), "clusters must be an")):
        with pytest.raises(ValueError, match=f"k_means: .*{message}"):
            k_means(*arguments)


def test_cells_of_embeddings_fit_the_sampler() -> None:
    x = torch.cat([torch.randn(n, 4) * 0.1 + 10 * i for i, n in enumerate((50, 5, 45))])
    cells = sslkernels.k_means(x, 3, seed=1).cells
    own = StratifiedSampler(cells, 300)
    assert sorted(torch.bincount(own.cells).tolist())[-1] <= 95
    chance = 1 / (len(x) * own.weights)
    assert chance.sum() == pytest.approx(1)
