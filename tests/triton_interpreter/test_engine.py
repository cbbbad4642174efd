# SPDX-License-Identifier: Apache-2.0
"""Every tile kernel in the interpreter against float64, and which branch ran."""

from __future__ import annotations

import os

import dense
import pytest
import torch
from dense import Case, randn
from helpers import SLACK, check_budget
from torch import Tensor

from sslkernels.backends import triton as backend
from sslkernels.backends.interface import RowState, Thresholds, Tiles, Wanted
from sslkernels.backends.triton import configs, gradients, launch
from sslkernels.backends.triton.runtime import recorded_launches

# (N, M or None for self mode, D).  The interpreter's tiles are 64 x 32 x 64: one row, tiles -1, +0, +1
# and two and a bit, a queue longer than the batch, D below 16, no power of two, and over a chunk; whole
# blocks of 128, which are read as they are, from among NaN.
SIZES = [
    (1, 1, 1),
    (2, 3, 8),
    (3, 70, 24),
    (63, 64, 100),
    (64, 63, 128),
    (65, 127, 129),
    (130, 65, 24),
    (5, 33, 768),
    (128, 256, 60),
    (1, None, 8),
    (2, None, 1),
    (64, None, 64),
    (65, None, 100),
    (130, None, 24),
    (127, None, 129),
]
SHORT = [(3, 70, 24), (65, 127, 129), (1, None, 8), (130, None, 24)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
DEVICE = os.environ.get("SSLKERNELS_TEST_DEVICE", "cpu")


def poisoned_rows(x: Tensor) -> Tensor:
    """The same values with NaN before, behind and between the rows, which start on 16 bytes."""
    rows, D = x.shape
    buffer = torch.full((rows + 6, 32 + D + -D % 16), torch.nan, dtype=x.dtype, device=x.device)
    view = buffer[3 : rows + 3, 16 : 16 + D]
    view.copy_(x)
    return view


def make(
    N: int,
    M: int | None,
    D: int,
    kind: str = "lse",
    dtype: torch.dtype = torch.float32,
    scale: float = 7.0,
    ids: str = "many",
) -> Case:
    """About unit rows, some keys equal to queries; every operand inside NaN-filled memory.

    Where D allows it the rows are aligned, so that the kernels read them (and not a packed copy).
    """
    q = randn(N, D, seed=1000 * N + D) / D**0.5
    k = None
    if M is not None:
        k = randn(M, D, seed=1000 * N + D + 1) / D**0.5
        planted = min(N, M) // 2
        k[:planted] = q[:planted]
    ids_q = ids_k = None
    if ids == "many":
        # Duplicates; the first row has the id of every even key, the last row excludes nothing.
        ids_q = torch.arange(N) // 2
        if k is not None:
            ids_k = torch.arange(M) % 2 * (1 + torch.arange(M) // 3)
    elif ids == "all":
        ids_q = torch.zeros(N, dtype=torch.int64)
        ids_k = None if M is None else torch.zeros(M, dtype=torch.int64)
    return Case(
        kind,
        poisoned_rows(q.to(dtype)),
        None if k is None else poisoned_rows(k.to(dtype)),
        torch.tensor(scale),
        torch.tensor(-1.5) if kind == "softplus" else None,
        ids_q,
        ids_k,
    )


def forward(case: Case, want_col: bool = False, *thresholds: Tensor | None):
    """pairwise_forward of a case."""
    return backend.pairwise_forward(case.kind, case.tiles, want_col, Thresholds(*thresholds))


def between(case: Case, dim: int) -> Tensor:
    """A threshold in the middle of each row's (column's) similarities, and away from all of them."""
    s, _ = dense.similarities(case, torch.float64)
    ordered = s.sort(dim).values
    middle = ordered.shape[dim] // 2
    low = ordered.select(dim, max(middle - 1, 0))
    return (0.5 * (low + ordered.select(dim, middle)) - 1e-3).float()


@pytest.mark.parametrize("ids", ["none", "many", "all"])
@pytest.mark.parametrize("kind", ["lse", "softplus"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_forward(size, kind: str, ids: str) -> None:
    """Rows, columns and ranks; everything excluded gives -inf or 0."""
    case = make(*size, kind, ids=ids)
    cross = case.k is not None
    row_threshold = between(case, 1)
    col_threshold = between(case, 0) if cross else None
    got = forward(case, cross, row_threshold, col_threshold)
    for ours, dim, name in ((got.row, 1, "row"), (got.col, 0, "col")):
        if dim == 0 and not cross:
            assert got.col.numel() == 0
            continue
        eager, truth = (dense.reduce(case, dim, t) for t in (torch.float32, torch.float64))
        check_budget(ours, eager, truth, 2e-6, name, floor=1.0)
    assert torch.equal(got.rank_row, dense.ranks(case, row_threshold, 1))
    if col_threshold is not None:
        assert torch.equal(got.rank_col, dense.ranks(case, col_threshold, 0))


@pytest.mark.parametrize("panels", [False, True], ids=["fused", "panels"])
@pytest.mark.parametrize("kind", ["lse", "softplus"])
@pytest.mark.parametrize(
    ("size", "ids"),
    [*((size, "many") for size in SIZES), *((size, "all") for size in SHORT)],
    ids=str,
)
def test_backward(size, kind: str, ids: str, panels: bool) -> None:
    """Dq, dk, dbias; non-uniform incoming gradients; the branch that ran."""
    case = make(*size, kind, ids=ids)
    cross = case.k is not None
    drow, dcol = torch.linspace(-1.0, 2.0, size[0]), torch.linspace(-2.0, 1.0, case.M)
    with configs.override(**({"fused": None} if panels else {})), recorded_launches() as log:
        got = backward(case, drow, dcol if cross else None, True, cross)
    fused = not panels and has_fused(case)
    names = {entry.kernel for entry in log} & {"backward_kernel", "panel_kernel", "product_kernel"}
    assert names == ({"backward_kernel"} if fused else {"panel_kernel", "product_kernel"})
    wanted = [
        dense.gradients(case, drow, dcol if cross else None, t)
        for t in (torch.float32, torch.float64)
    ]
    for ours, eager, truth, name in zip(got, *wanted, ("dq", "dk", "dbias"), strict=True):
        if name == "dbias" and kind == "lse":
            assert ours.item() == 0.0
        elif name == "dbias":
            # A sum of N * M terms of both signs: rounding goes with the sum of their magnitudes.
            size = dense.gradients(case, drow.abs(), dcol.abs() if cross else None, torch.float64)[
                2
            ]
            check_budget(ours, eager, truth, 3e-7, name, floor=size.item())
        elif name != "dk" or cross:
            check_budget(ours, eager, truth, SLACK[torch.float32], name)
    assert cross or got.dk.numel() == 0


def has_fused(case: Case) -> bool:
    """Whether the table has a fused configuration for these operands."""
    return configs.choose("fused", case.q.device, case.q.shape[1], case.q.dtype) is not None


def backward(case: Case, drow: Tensor, dcol: Tensor | None, want_dq: bool, want_dk: bool):
    """pairwise_backward with the log-sum-exps of the forward pass, as in training."""
    row, col = forward(case, dcol is not None)[:2]
    columns = None if dcol is None else RowState(col, dcol)
    return backend.pairwise_backward(
        case.kind, case.tiles, RowState(row, drow), columns, Wanted(want_dq, want_dk)
    )


@pytest.mark.parametrize("panels", [False, True], ids=["fused", "panels"])
@pytest.mark.parametrize("ids", ["none", "many", "all"])
@pytest.mark.parametrize("size", [size for size in SIZES if size[1] is not None], ids=str)
def test_attend(size, ids: str, panels: bool) -> None:
    """Log-sum-exp, mean key and rank in one pass, or by panels."""
    case = make(*size, ids=ids)
    threshold = between(case, 1)
    with configs.override(**({"fused": None} if panels else {})), recorded_launches() as log:
        got = backend.attend(case.tiles, threshold)
    fused = not panels and has_fused(case)
    assert ("attend_kernel" in {entry.kernel for entry in log}) == fused
    for ours, of, name in (
        (got.lse, lambda t: dense.reduce(case, 1, t), "lse"),
        (got.mean_key, lambda t: dense.mean_key(case, t), "mean key"),
    ):
        check_budget(ours, of(torch.float32), of(torch.float64), 2e-6, name, floor=1.0)
    assert torch.equal(got.rank, dense.ranks(case, threshold, 1))


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_extremes(size) -> None:
    """Hardest positive and negative; ties (planted equal rows) go to the smallest index."""
    case = make(*size)
    case.ids_q = torch.arange(size[0]) % 3
    if case.k is not None:
        case.ids_k = torch.arange(case.M) % 4
    # Binary fractions: every product and sum is exact, so that ties are ties.
    case.q.copy_((case.q * 8).round() / 8)
    if case.k is not None:
        case.k.copy_((case.k * 8).round() / 8)
    for bias in (None, torch.arange(case.M) % 5 * 0.5):
        got = backend.extremes(case.tiles._replace(bias=bias))
        same, other = dense.extremes(case, bias)
        assert torch.equal(got.max_same, same)
        assert torch.equal(got.min_other, other)


@pytest.mark.parametrize("period", [16, 32, 33])
def test_ties_between_tiles(period: int) -> None:
    """Every key comes again after a while, in the same place of a later tile too: the first one counts."""
    case = make(40, 200, 8)
    case.q.copy_((case.q * 8).round() / 8)  # exact products
    case.k.copy_((case.k[:period].repeat(13, 1)[:200] * 8).round() / 8)
    case.ids_q, case.ids_k = torch.arange(40) % 3, torch.arange(200) % period % 4
    for programs in (1, 64):  # all tiles in one, or each in its own
        with configs.override(programs=programs):
            got = backend.extremes(case.tiles._replace(bias=None))
        for ours, true in zip(got, dense.extremes(case, None), strict=True):
            assert torch.equal(ours, true) and ours.max() < period


@pytest.mark.parametrize("size", SHORT, ids=str)
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_halves(size, dtype: torch.dtype) -> None:
    """Half operands: float32 results; gradients no worse than the rounding of G."""
    case = make(*size, dtype=dtype)
    cross = case.k is not None
    got = forward(case, cross)
    for ours, dim in ((got.row, 1), (got.col, 0)):
        if dim == 1 or cross:
            assert ours.dtype == torch.float32
            eager, truth = (dense.reduce(case, dim, t) for t in (torch.float32, torch.float64))
            check_budget(ours, eager, truth, 2e-6, "lse", floor=1.0)
    # Gradients of the size of a mean over many rows: 1e-7 and less must survive float16.
    drow, dcol = torch.linspace(1e-7, 3e-7, size[0]), torch.linspace(2e-7, 1e-7, case.M)
    for tables in ({}, {"fused": None}):
        with configs.override(**tables):
            dq, dk, _ = backward(case, drow, dcol if cross else None, True, cross)
        eager, truth = (
            dense.gradients(case, drow, dcol if cross else None, t)
            for t in (torch.float32, torch.float64)
        )
        check_budget(dq, eager[0], truth[0], SLACK[dtype], "dq", floor=0.0)
        if cross:
            check_budget(dk, eager[1], truth[1], SLACK[dtype], "dk", floor=0.0)
            got_attend = backend.attend(case.tiles._replace(bias=None), None)
            truth_key = dense.mean_key(case, torch.float64)
            check_budget(
                got_attend.mean_key, truth_key.float(), truth_key, SLACK[dtype], "mean key"
            )


@pytest.mark.parametrize("scale", [1e-3, 100.0, 1e4, -1e4])
@pytest.mark.parametrize("size", SHORT[:2] + SHORT[3:], ids=str)
def test_logits_of_any_size(size, scale: float) -> None:
    """Logits to +-1e4: an online maximum, never a bare exponential, and no padded column in it."""
    case = make(*size, scale=scale)
    cross = case.k is not None
    got = forward(case, cross)
    eager, truth = (dense.reduce(case, 1, t) for t in (torch.float32, torch.float64))
    check_budget(got.row, eager, truth, 2e-6, "row", floor=1.0)
    drow = torch.linspace(-1.0, 2.0, size[0])
    row = got.row  # as in training: the lse of the forward pass
    dq = backend.pairwise_backward(
        "lse", case.tiles, RowState(row, drow), None, Wanted(True, False)
    ).dq
    eager, truth = (dense.gradients(case, drow, None, t)[0] for t in (torch.float32, torch.float64))
    # S is rounded to float32 before the exponential: |S| * 2^-24 is its relative error, in eager too.
    check_budget(dq, eager, truth, max(2e-6, abs(scale) * 6e-7), "dq")


@pytest.mark.parametrize("folded", [False, True], ids=["one launch", "folds"])
@pytest.mark.parametrize("size", [(70, 100, 24), (100, None, 24)], ids=str)
def test_shared_blocks_and_folds(size, folded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs that share a block, column slots folded several times, panels of one block."""
    case = make(*size)
    cross = case.k is not None
    thresholds = (between(case, 1), between(case, 0) if cross else None)
    drow, dcol = torch.linspace(-1.0, 2.0, size[0]), torch.linspace(-2.0, 1.0, case.M)
    dcol = dcol if cross else None
    if folded:
        for module in (launch, gradients):
            monkeypatch.setattr(module, "slot_words", lambda N, M, D: 3 * 100 * 2)
    small = configs.Config(16, 16, 16, 4, 1)
    tables = {name: small for name in configs.TABLES}
    # 4 of 7 tiles a program: blocks of the second launch are shared otherwise than those of the first.
    programs = 6 if folded else 64
    with configs.override(programs=programs, **tables), recorded_launches() as log:
        got = forward(case, cross, *thresholds)
    launches = [entry for entry in log if entry.kernel == "forward_kernel"]
    assert len(launches) == 1 if not folded else len(launches) > 1
    assert any(not entry.flags.get("FINAL", True) for entry in log) == folded
    assert launches[0].grid[0] > launches[0].arguments["blocks"], "no block is shared"
    for ours, dim in ((got.row, 1), (got.col, 0)):
        if dim == 1 or cross:
            eager, truth = (dense.reduce(case, dim, t) for t in (torch.float32, torch.float64))
            check_budget(ours, eager, truth, 2e-6, "lse", floor=1.0)
    assert torch.equal(got.rank_row, dense.ranks(case, thresholds[0], 1))
    if cross:
        assert torch.equal(got.rank_col, dense.ranks(case, thresholds[1], 0))

    eager, truth = (dense.gradients(case, drow, dcol, t) for t in (torch.float32, torch.float64))
    for panels in (False, True):
        tables["fused"] = None if panels else small
        with configs.override(programs=64, **tables), recorded_launches() as log:
            grads = backward(case, drow, dcol, True, cross)
        if panels:
            assert (sum(entry.kernel == "panel_kernel" for entry in log) > 2) == folded
        elif not folded:
            assert "gather_kernel" in {entry.kernel for entry in log}
        for ours, plain, true in zip(grads[: 1 + cross], eager, truth, strict=False):
            check_budget(ours, plain, true, SLACK[torch.float32], "gradient")
        if cross:
            with configs.override(programs=64, **tables):
                attended = backend.attend(case.tiles, thresholds[0])
                best = backend.extremes(
                    case.tiles._replace(ids_q=torch.arange(70) % 3, ids_k=torch.arange(100) % 4)
                )
            check_budget(
                attended.mean_key,
                dense.mean_key(case, torch.float32),
                dense.mean_key(case, torch.float64),
                2e-6,
                "mean key",
            )
            assert torch.equal(attended.rank, dense.ranks(case, thresholds[0], 1))
            labelled = Case(
                "lse", case.q, case.k, case.scale, None, torch.arange(70) % 3, torch.arange(100) % 4
            )
            for ours, true in zip(best, dense.extremes(labelled, None), strict=True):
                assert torch.equal(ours, true)


@pytest.mark.parametrize(
    "layout", ["transposed", "every second", "expanded rows", "expanded features", "offset"]
)
def test_strides(layout: str) -> None:
    """Any strides give what a contiguous copy gives, bit for bit, and inputs stay as they are."""
    N, D = 66, 40
    base = randn(2 * N, 2 * D, seed=5)
    x = {
        "transposed": base[:D, :N].T,
        "every second": base[::2, ::2],
        "expanded rows": base[:1, :D].expand(N, D),
        "expanded features": base[:N, :1].expand(N, D),
        "offset": base[3 : N + 3, 1 : D + 1],
    }[layout]
    before = base.clone()
    other = randn(50, D, seed=6)
    drow, dcol = torch.ones(()).expand(N), torch.ones(()).expand(50)  # stride 0
    results = []
    for operand in (x, x.contiguous()):
        case = Case("lse", operand, other, torch.tensor(0.1), None, None, None)
        grads = backward(case, drow, dcol, True, True)
        panel = configs.override(fused=None)
        with panel:
            by_panels = backward(case, drow, dcol, True, True)
        attended = backend.attend(case.tiles, None)
        best = backend.extremes(case.tiles._replace(k=None, ids_q=torch.arange(N) % 7))
        results.append([*forward(case, True)[:2], *grads[:2], *by_panels[:2], *attended[:2], *best])
    for ours, contiguous in zip(*results, strict=True):
        assert torch.equal(ours, contiguous)
    assert torch.equal(base, before)


def test_uniform_and_zero_gradients() -> None:
    """Stride-0 gradients equal their dense copies; a zero gradient gives zero, in float16 too."""
    for dtype in DTYPES:
        case = make(65, 40, 24, dtype=dtype)
        one = torch.tensor(0.25)
        expanded = backward(case, one.expand(65), one.expand(40), True, True)
        dense_ones = backward(case, one.repeat(65), one.repeat(40), True, True)
        zero = backward(case, torch.zeros(65), torch.zeros(40), True, True)
        for a, b, c in zip(expanded[:2], dense_ones[:2], zero[:2], strict=True):
            assert torch.equal(a, b) and not c.any() and a.any()


@pytest.mark.parametrize("want", [(True, False), (False, True), (False, False)], ids=str)
@pytest.mark.parametrize("kind", ["lse", "softplus"])
def test_what_is_not_asked_for_is_empty(kind: str, want: tuple[bool, bool]) -> None:
    """One gradient, or dbias alone."""
    case = make(40, 33, 8, kind)
    drow, dcol = torch.linspace(-1, 1, 40), torch.linspace(-1, 2, 33)
    got = backward(case, drow, dcol, *want)
    eager, truth = (dense.gradients(case, drow, dcol, t) for t in (torch.float32, torch.float64))
    for ours, wanted, plain, true in zip(got[:2], want, eager[:2], truth[:2], strict=True):
        assert ours.numel() == (true.numel() if wanted else 0)
        if wanted:
            check_budget(ours, plain, true, SLACK[torch.float32], "gradient")
    if kind == "softplus":
        check_budget(got.dbias, truth[2].float(), truth[2], 2e-6, "dbias")


@pytest.mark.parametrize("panels", [False, True], ids=["fused", "panels"])
def test_only_columns_have_a_gradient(panels: bool) -> None:
    """Drow = 0 with a column gradient, and dcol = None."""
    case = make(40, 33, 8)
    with configs.override(**({"fused": None} if panels else {})):
        for drow, dcol in ((torch.zeros(40), torch.ones(33)), (torch.ones(40), None)):
            got = backward(case, drow, dcol, True, True)
            eager, truth = (
                dense.gradients(case, drow, dcol, t) for t in (torch.float32, torch.float64)
            )
            for ours, plain, true in zip(got[:2], eager[:2], truth[:2], strict=True):
                check_budget(ours, plain, true, SLACK[torch.float32], "gradient")


@pytest.mark.parametrize("where", ["q", "k"])
def test_nan_reaches_what_depends_on_it(where: str) -> None:
    """A NaN row of q spoils its own row and every column; nothing else is touched."""
    case = make(70, 40, 24, ids="none")
    (case.q if where == "q" else case.k)[3, 5] = torch.nan
    got = forward(case, True)
    attended = backend.attend(case.tiles, None)
    rows, cols = (got.row, got.col) if where == "q" else (got.col, got.row)
    assert rows[3].isnan() and int(rows.isnan().sum()) == 1
    assert cols.isnan().all()
    assert torch.equal(attended.lse.isnan(), got.row.isnan())
    assert torch.equal(attended.mean_key.isnan().all(1), got.row.isnan())
    grads = backward(case, torch.ones(70), None, True, True)
    assert grads.dq[3].isnan().all() if where == "q" else grads.dq.isnan().any(1).all()
    labels = torch.zeros(70, dtype=torch.int64)
    ids = torch.arange(40) % 2  # 1 of key 3, another id than that of the queries
    picked = backend.extremes(case.tiles._replace(ids_q=labels, ids_k=ids))
    swapped = backend.extremes(case.tiles._replace(ids_q=labels, ids_k=1 - ids))
    if where == "k":
        assert (picked.min_other == 3).all() and (swapped.max_same == 3).all()


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)], ids=str)
def test_empty_operands(shape: tuple[int, int]) -> None:
    """No rows or no columns: neutral results, no crash."""
    q, k, scale = torch.zeros(shape[0], 8), torch.zeros(shape[1], 8), torch.tensor(1.0)
    tiles = Tiles(q, k, scale)
    above = Thresholds(torch.zeros(shape[0]), torch.zeros(shape[1]))
    got = backend.pairwise_forward("lse", tiles, True, above)
    assert (got.row == -torch.inf).all() and (got.col == -torch.inf).all()
    assert not got.rank_row.any() and not got.rank_col.any()
    row = RowState(None, torch.ones(shape[0]))
    grads = backend.pairwise_backward("softplus", tiles, row, None, Wanted(True, True))
    assert grads.dq.shape == q.shape and grads.dk.shape == k.shape
    assert not grads.dq.any() and not grads.dk.any() and grads.dbias.item() == 0.0
    for tables in ({}, {"fused": None}):
        with configs.override(**tables):
            attended = backend.attend(tiles, None)
        assert (attended.lse == -torch.inf).all() and not attended.mean_key.any()
    ids_q, ids_k = (
        torch.zeros(shape[0], dtype=torch.int64),
        torch.zeros(shape[1], dtype=torch.int64),
    )
    picked = backend.extremes(tiles._replace(ids_q=ids_q, ids_k=ids_k))
    assert (picked.max_same == -1).all() and (picked.min_other == -1).all()


@pytest.mark.skipif(DEVICE != "cpu", reason="the shapes are those of the interpreter's tiles")
def test_branches_of_a_tile() -> None:
    """The flags that shapes decide: the chunks, what waits in registers, x held or streamed, self mode."""
    seen = {}
    for size in (
        (640, 64, 64),
        (640, 64, 60),
        (640, 64, 33),
        (640, 64, 128),
        (640, 64, 256),
        (640, None, 64),
    ):
        with recorded_launches() as log:
            forward(make(*size, dtype=torch.float16, ids="none"))
        flags = log[0].flags
        assert log[0].kernel == "forward_kernel"
        keys = ("D", "NUM_D", "PREFETCH", "HOLD_X", "TRIANGLE", "BLOCK_N")
        seen[size] = tuple(flags[key] for key in keys)
    assert seen == {
        (640, 64, 64): (64, 1, 0, True, False, 64),
        (640, 64, 60): (60, 1, 0, True, False, 64),
        (640, 64, 33): (48, 1, 0, True, False, 64),  # filled up
        (640, 64, 128): (128, 2, 2, True, False, 64),
        (640, 64, 256): (256, 1, 0, False, False, 64),
        (640, None, 64): (64, 1, 0, True, True, 64),
    }
    # Few tiles, and ranks: fewer held rows.
    for size, ranks in (((64, 64, 64), False), ((640, 64, 64), True)):
        case = make(*size, ids="none")
        with recorded_launches() as log:
            forward(case, False, between(case, 1) if ranks else None, None)
        assert log[0].flags["BLOCK_N"] == 32


def test_float64_goes_to_the_chunked_backend(caplog: pytest.LogCaptureFixture) -> None:
    """The documented rule, visible in the log, and nothing else is rerouted."""
    q = torch.randn(5, 3, dtype=torch.float64)
    assert "float64" in backend.reroute(q) and not backend.reroute(q.float())
    with caplog.at_level("INFO", logger="sslkernels"), recorded_launches() as log:
        tiles = Tiles(q, None, torch.tensor(1.0, dtype=torch.float64))
        got = backend.pairwise_forward("lse", tiles, False, Thresholds())
    assert got.row.dtype == torch.float64 and not log
    assert torch.allclose(got.row, (q @ q.T).logsumexp(1), rtol=1e-14)


def test_wrong_devices_and_dtypes_are_refused() -> None:
    """Errors that name the function, what must hold and what came."""
    q = torch.randn(4, 3)
    with pytest.raises(ValueError, match=r"attend: q and k must have the same dtype and device"):
        launch.attend(Tiles(q, q.half(), torch.tensor(1.0)), None)
    with pytest.raises(TypeError, match=r"attend: .* got torch.float64"):
        launch.attend(Tiles(q.double(), q.double(), torch.tensor(1.0)), None)
    with pytest.raises(ValueError, match=r"tables are .* got sideways"):
        with configs.override(sideways=None):
            pass
    with pytest.raises(ValueError, match=r"fp32_precision must be one of"):
        with configs.override(fp32_precision="fp8"):
            pass


def test_float32_products_are_exact_unless_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ieee by default, whatever torch's own switch says; tf32 by override or environment only."""
    case = make(5, 4, 8)

    def precision() -> str:
        with recorded_launches() as log:
            forward(case)
        (entry,) = (entry for entry in log if entry.kernel == "forward_kernel")
        return entry.flags["PRECISION"]

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        assert precision() == "ieee"
    finally:
        torch.set_float32_matmul_precision(before)
    with configs.override(fp32_precision="tf32"):
        assert precision() == "tf32"
    monkeypatch.setenv("SSLKERNELS_TRITON_FP32", "tf32x3")
    assert precision() == "tf32x3"
    monkeypatch.setenv("SSLKERNELS_TRITON_FP32", "fast")
    with pytest.raises(ValueError, match="SSLKERNELS_TRITON_FP32"):
        precision()
