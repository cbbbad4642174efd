# SPDX-License-Identifier: Apache-2.0
"""Branches that values decide, layouts that are copied, offsets beyond 2^31.

A branch inside a kernel leaves no trace in the log of launches.  Here each is shown to run by moving its
threshold: with ``HUGE`` or ``CALM_SPREAD`` out of reach the other branch runs everywhere, which changes
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
from sslkernels.backends.triton import configs, kernels, kernels_backward, kernels_rows, plan
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
@pytest.mark.parametrize("scale", [0.5, 7.0, 90.0, 1e4])
@pytest.mark.parametrize("size", [(130, 100, 24), (200, None, 24)], ids=str)
def test_rows_that_no_constant_shift_serves(size, scale: float, monkeypatch) -> None:
    """They are computed again with a running maximum, and only they: both ways are right."""
    case = make(*size, scale=scale)
    cross = case.k is not None
    thresholds = (between(case, 1), between(case, 0) if cross else None)
    as_shipped = forward(case, cross, *thresholds)
    monkeypatch.setattr(kernels, "HUGE", tl.constexpr(0.0))
    always = forward(case, cross, *thresholds)
    for got in (as_shipped, always):
        _check_forward(case, got)
        assert torch.equal(got.rank_row, dense.ranks(case, thresholds[0], 1))
    same = torch.isfinite(as_shipped.row) & (as_shipped.row == always.row)
    if scale == 1e4:  # sums of logits of thousands are inf or 0
        assert float(same.float().mean()) > 0.8
    else:
        assert float(same.float().mean()) < 0.8
    if cross:
        assert torch.equal(as_shipped.rank_col, always.rank_col)


@interpreter_only
@pytest.mark.parametrize("scale", [7.0, 1e4])
def test_attended_rows_that_no_constant_shift_serves(scale: float, monkeypatch) -> None:
    """The same for the weighted mean of the keys."""
    case = make(70, 100, 24, scale=scale)
    threshold = between(case, 1)
    as_shipped = backend.attend(case.tiles, threshold)
    monkeypatch.setattr(kernels_rows, "HUGE", tl.constexpr(0.0))
    always = backend.attend(case.tiles, threshold)
    for got in (as_shipped, always):
        for ours, of, name in (
            (got.lse, lambda t: dense.reduce(case, 1, t), "lse"),
            (got.mean_key, lambda t: dense.mean_key(case, t), "mean"),
        ):
            slack = 2e-6 * max(1.0, scale / 100)
            check_budget(ours, of(torch.float32), of(torch.float64), slack, name, floor=1.0)
        assert torch.equal(got.rank, dense.ranks(case, threshold, 1))
    assert torch.equal(as_shipped.mean_key, always.mean_key) == (scale == 1e4)


@pytest.mark.parametrize("where", ["q", "k"])
def test_ids_of_64_bits(where: str) -> None:
    """Equal low halves are not equal ids, forward and backward; negative ids are small ones."""
    for size in ((70, 100, 24), (100, None, 24)):
        case = make(*size)
        cross = case.k is not None
        case.ids_q = torch.arange(size[0]) % 5 - 2
        case.ids_k = torch.arange(case.M) % 7 - 3 if cross else None
        if where == "q":
            case.ids_q[::3] += 1 << 32
        elif cross:
            case.ids_k[::2] -= 5 << 33
        thresholds = (between(case, 1), between(case, 0) if cross else None)
        got = forward(case, cross, *thresholds)
        _check_forward(case, got)
        assert torch.equal(got.rank_row, dense.ranks(case, thresholds[0], 1))
        drow, dcol = torch.linspace(-1.0, 2.0, size[0]), torch.linspace(-2.0, 1.0, case.M)
        grads = backward(case, drow, dcol if cross else None, True, cross)
        eager, truth = (
            dense.gradients(case, drow, dcol if cross else None, t)
            for t in (torch.float32, torch.float64)
        )
        for ours, plain, true in zip(grads[: 1 + cross], eager, truth, strict=False):
            check_budget(ours, plain, true, SLACK[torch.float32], "gradient")
        if cross:
            attended = backend.attend(case.tiles, thresholds[0])
            truth_key = dense.mean_key(case, torch.float64)
            check_budget(attended.mean_key, truth_key.float(), truth_key, 2e-6, "mean key")
            assert torch.equal(attended.rank, dense.ranks(case, thresholds[0], 1))


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
    monkeypatch.setattr(kernels, "span_of", lambda ptr, first, rows: (first, first))
    assert not torch.allclose(forward(case).row.double(), truth, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("D", [1, 7, 24, 33, 64, 66, 100, 300, 320])
def test_layouts_are_read_or_copied(D: int, dtype: torch.dtype) -> None:
    """Halves in rows of whole 8 bytes are read as they are; the rest is copied and filled with 0."""
    widths = {
        torch.float32: {1: 32, 7: 32, 24: 32, 33: 64, 66: 96, 100: 128},
        torch.float16: {1: 16, 7: 16, 33: 48, 66: 80},
    }[dtype]
    x = randn(128, D, seed=3).to(dtype)
    (same,) = plan.packed(x)
    assert same.shape[1] == {300: 320, **widths}.get(D, D)
    fits = same.shape[1] == D
    assert (same is x) == fits
    aligned, shifted = poisoned_rows(x), poisoned(x)
    assert (plan.packed(aligned)[0] is aligned) == fits
    others = (shifted, x.T.contiguous().T, x[:1].expand(128, D), x[:, :1].expand(128, D), x[:9])
    for other in others:
        (copy,) = plan.packed(other)
        assert torch.equal(copy[:, :D], other) and not copy[:, D:].any()
        assert copy.stride(1) == 1 and copy.data_ptr() % 16 == 0
        assert copy.stride(0) * copy.element_size() % 8 == 0
    # What is behind the rows is there to be read: zeros, or the last row again.
    for repeat in (False, True):
        (copy,) = plan.packed(x[:9], repeat=repeat)
        whole = copy.as_strided((128, copy.shape[1]), copy.stride())
        assert torch.equal(whole[9:, :D], (x[8] * repeat).expand(119, D))
    assert plan.trimmed(same, D).shape == (128, D) and plan.trimmed(same, D).is_contiguous()


def test_vectors_have_whole_blocks() -> None:
    """Stride 1 and a multiple of the largest block; behind the end zeros."""
    one = torch.ones(())
    assert torch.equal(plan.vector(one.expand(130)), torch.cat((torch.ones(130), torch.zeros(126))))
    whole = torch.ones(256)
    assert plan.vector(whole) is whole and plan.vector(None) is None


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
    """Rows 2^26 elements apart: the last begins beyond 2^32.  Bit for bit what dense rows give."""
    N, D = 128, 24
    x = randn(N, D, seed=8).half()
    y = randn(7, D, seed=9).half()
    scale, ids = torch.tensor(3.0), torch.arange(N) // 2
    far = _far_apart(x, (1 << 26) + 64, tmp_path, "x")
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
            assert any(entry.flags.get("STRIDE_X") == operand.stride(0) for entry in log)
        found += forward(case, True)[:2]
        found += backend.extremes(case.tiles._replace(k=None, ids_q=ids))
        results.append(found)
    for dense_rows, far_rows in zip(*results, strict=True):
        assert torch.equal(dense_rows, far_rows)
