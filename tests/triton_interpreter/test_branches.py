# SPDX-License-Identifier: Apache-2.0
"""Branches that values decide, layouts that are copied, offsets beyond 2^31.

A branch inside a kernel leaves no trace in the log of launches.  Here each is shown to run by moving its
threshold: with ``CALM_RANGE`` or ``CALM_SPREAD`` below 0 the other branch runs everywhere, which changes
the last bits where the first one ran before, and none where it did not.

Mutants that these tests and ``test_engine.py`` were seen to kill are listed in ``docs/gpu.md``.
"""

from __future__ import annotations

import os
from pathlib import Path

import dense
import pytest
import torch
import triton.language as tl
from dense import Case, randn
from helpers import SLACK, check_budget, poisoned
from test_engine import backward, between, forward, make, poisoned_rows
from torch import Tensor

from sslkernels.backends import triton as backend
from sslkernels.backends.interface import RowState, Wanted
from sslkernels.backends.triton import configs, kernels, kernels_backward, plan
from sslkernels.backends.triton.runtime import recorded_launches

DEVICE = os.environ.get("SSLKERNELS_TEST_DEVICE", "cpu")
interpreter_only = pytest.mark.skipif(
    DEVICE != "cpu", reason="a compiled kernel keeps the constant it was compiled with"
)


def _check_forward(case: Case, got) -> None:
    for ours, dim in ((got.row, 1), (got.col, 0)):
        if dim == 1 or case.k is not None:
            eager, truth = (dense.reduce(case, dim, t) for t in (torch.float32, torch.float64))
            check_budget(ours, eager, truth, 2e-6, f"dim {dim}", floor=1.0)


@interpreter_only
@pytest.mark.parametrize("scale", [0.5, 7.0, 1e4])
@pytest.mark.parametrize("size", [(130, 100, 24), (200, None, 24)], ids=str)
def test_calm_tiles_of_the_forward_pass(size, scale: float, monkeypatch) -> None:
    """One exponential for rows and columns where S spans little, two elsewhere: both right."""
    case = make(*size, scale=scale, ids="none")
    cross = case.k is not None
    if not cross:  # ascending ids: only tiles at the diagonal exclude pairs
        case.ids_q = torch.arange(size[0]) // 2
    thresholds = (between(case, 1), between(case, 0) if cross else None)
    as_shipped = forward(case, cross, *thresholds)
    monkeypatch.setattr(kernels, "CALM_RANGE", tl.constexpr(-1.0))
    never = forward(case, cross, *thresholds)
    for got in (as_shipped, never):
        _check_forward(case, got)
        assert torch.equal(got.rank_row, dense.ranks(case, thresholds[0], 1))
    assert torch.equal(as_shipped.row, never.row) == (scale == 1e4)
    if cross:
        assert torch.equal(as_shipped.col, never.col) == (scale == 1e4)
        assert torch.equal(as_shipped.rank_col, never.rank_col)


@interpreter_only
@pytest.mark.parametrize("panels", [False, True], ids=["fused", "panels"])
@pytest.mark.parametrize("spread", [0.0, 10.0, 40.0])
@pytest.mark.parametrize("size", [(70, 100, 24), (100, None, 24)], ids=str)
def test_calm_tiles_of_the_backward_pass(size, spread: float, panels: bool, monkeypatch) -> None:
    """One exponential where log-sum-exps lie close together, two elsewhere; and where none is finite."""
    case = make(*size, ids="many")
    cross = case.k is not None
    # Longer rows have larger log-sum-exps.
    case.q.mul_(torch.linspace(1.0, 1.0 + spread, size[0])[:, None])
    drow, dcol = torch.linspace(-1.0, 2.0, size[0]), torch.linspace(-2.0, 1.0, case.M)
    dcol = dcol if cross else None
    lse = dense.reduce(case, 1, torch.float64)
    reach = lse.max() - lse.min()
    results = []
    for limit in (16.0, -1.0):
        monkeypatch.setattr(kernels_backward, "CALM_SPREAD", tl.constexpr(limit))
        with configs.override(**({"fused": None} if panels else {})):
            results.append(backward(case, drow, dcol, True, cross))
    eager, truth = (dense.gradients(case, drow, dcol, t) for t in (torch.float32, torch.float64))
    for got in results:
        for ours, plain, true in zip(got[: 1 + cross], eager, truth, strict=False):
            check_budget(ours, plain, true, SLACK[torch.float32], "gradient")
    same = torch.equal(results[0].dq, results[1].dq)
    if reach < 15.0:
        assert not same, "the calm branch did not run"
    if spread == 40.0:
        assert reach > 32.0 and not torch.equal(lse, lse.mean().expand_as(lse))


@pytest.mark.parametrize("panels", [False, True], ids=["fused", "panels"])
def test_rows_without_any_pair_among_others(panels: bool) -> None:
    """Log-sum-exps of -inf beside finite ones: no gradient there, the right one elsewhere."""
    case = make(40, 50, 24, ids="none")
    case.ids_q = torch.arange(40)
    case.ids_q[::3] = 99
    case.ids_k = torch.full((50,), 99)
    case.ids_k[40:] = 99
    drow, dcol = torch.linspace(-1.0, 2.0, 40), torch.linspace(-2.0, 1.0, 50)
    with configs.override(**({"fused": None} if panels else {})):
        got = backward(case, drow, dcol, True, True)
    eager, truth = (dense.gradients(case, drow, dcol, t) for t in (torch.float32, torch.float64))
    assert not got.dq[::3].any() and got.dq[1].any()
    for ours, plain, true in zip(got[:2], eager, truth, strict=False):
        check_budget(ours, plain, true, SLACK[torch.float32], "gradient")
    # A row or column whose log-sum-exp is -inf has no gradient, also where no id says why.
    case = make(40, 50, 24, ids="none")
    row, col = forward(case, True)[:2]
    row[3], col[7] = -torch.inf, -torch.inf
    weights = drow.clone(), dcol.clone()
    weights[0][3], weights[1][7] = 0.0, 0.0
    with configs.override(**({"fused": None} if panels else {})):
        got = backend.pairwise_backward(
            "lse", case.tiles, RowState(row, drow), RowState(col, dcol), Wanted(True, True)
        )
    eager, truth = (dense.gradients(case, *weights, t) for t in (torch.float32, torch.float64))
    for ours, plain, true in zip(got[:2], eager, truth, strict=False):
        check_budget(ours, plain, true, SLACK[torch.float32], "gradient")


@interpreter_only
def test_a_tile_is_masked_only_where_ids_can_meet(monkeypatch) -> None:
    """Ranges of ids decide: with the test for them broken, excluded pairs are counted."""
    case = make(130, None, 24, ids="none")
    case.ids_q = torch.arange(130) // 2
    truth = dense.reduce(case, 1, torch.float64)
    assert torch.allclose(forward(case).row.double(), truth, rtol=1e-6)
    # Ids that are far apart in the order of rows: every pair of blocks has to be looked at.
    case.ids_q = torch.arange(130) % 65
    truth = dense.reduce(case, 1, torch.float64)
    assert torch.allclose(forward(case).row.double(), truth, rtol=1e-6)
    monkeypatch.setattr(kernels, "ids_may_meet", lambda low, high, ids: tl.min(ids, 0) < low)
    assert not torch.allclose(forward(case).row.double(), truth, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("D", [1, 7, 24, 33, 64, 66, 100, 300, 320])
def test_layouts_are_read_or_copied(D: int, dtype: torch.dtype) -> None:
    """Halves in rows of whole 8 bytes are read as they are; the rest is copied and filled with 0."""
    widths = {
        torch.float32: {1: 32, 7: 32, 24: 32, 33: 64, 66: 96, 100: 128},
        torch.float16: {1: 16, 7: 16, 33: 48, 66: 80},
    }[dtype]
    x = randn(9, D, seed=3).to(dtype)
    (same,) = plan.packed(x)
    assert same.shape[1] == {300: 320, **widths}.get(D, D)
    fits = same.shape[1] == D
    assert (same is x) == fits
    aligned, shifted = poisoned_rows(x), poisoned(x)
    assert (plan.packed(aligned)[0] is aligned) == fits
    for other in (shifted, x.T.contiguous().T, x[:1].expand(9, D), x[:, :1].expand(9, D)):
        (copy,) = plan.packed(other)
        assert torch.equal(copy[:, :D], other) and not copy[:, D:].any()
        assert copy.stride(1) == 1 and copy.data_ptr() % 16 == 0
        assert copy.stride(0) * copy.element_size() % 8 == 0
    assert plan.trimmed(same, D).shape == (9, D) and plan.trimmed(same, D).is_contiguous()
    for flag in (1, 2, 4, 8, 16):
        view = torch.zeros(3, 64)[:, : 16 + flag]
        assert plan.alignment(view) == (16 if flag == 16 else flag)


def _far_apart(rows: Tensor, pitch: int, folder: Path, name: str) -> Tensor:
    """The same rows, ``pitch`` elements from one to the next: in a sparse file, or on the device."""
    n = (len(rows) - 1) * pitch + rows.shape[1]
    if DEVICE == "cpu":
        flat = torch.from_file(str(folder / name), shared=True, size=n, dtype=rows.dtype)
    else:
        flat = torch.zeros(n, dtype=rows.dtype)
    view = flat.as_strided(rows.shape, (pitch, 1))
    view.copy_(rows)
    return view


def test_offsets_beyond_31_bits(tmp_path: Path) -> None:
    """Rows 2^30 elements apart: the sixth begins beyond 2^32.  Bit for bit what dense rows give."""
    N, D = 6, 24
    x = randn(N, D, seed=8).half()
    y = randn(7, D, seed=9).half()
    scale, ids = torch.tensor(3.0), torch.arange(N) // 2
    far = _far_apart(x, (1 << 30) + 64, tmp_path, "x")
    assert plan.packed(far)[0] is far and far.stride(0) * (N - 1) > 1 << 32
    results = []
    for operand in (x, far):
        case = Case("lse", operand, y, scale, None, None, None)
        turned = Case("lse", y, operand, scale, None, None, None)
        found = []
        for tables in ({}, {"fused": None}):
            with configs.override(**tables), recorded_launches() as log:
                for c in (case, turned):
                    drow, dcol = torch.ones(len(c.q)), torch.ones(c.M)
                    found += backward(c, drow, dcol, True, True)[:2]
                    found += backend.attend(c.tiles, None)[:2]
            assert any(entry.flags.get("ALIGN") == 8 for entry in log)
        found += forward(case, True)[:2]
        found += backend.extremes(case.tiles._replace(k=None, ids_q=ids))
        results.append(found)
    for dense_rows, far_rows in zip(*results, strict=True):
        assert torch.equal(dense_rows, far_rows)
