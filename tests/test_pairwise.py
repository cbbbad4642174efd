# SPDX-License-Identifier: Apache-2.0
"""The tile engine on every backend and instruction set against dense matrices in float64."""

from __future__ import annotations

import pytest
import torch
from flat import attend, extremes, pairwise
from helpers import check_budget, check_loss, poisoned, threads
from pairwise_truth import DTYPES, NEG_INF, dense, ids_for, make, scalars, weighted, weights
from torch import Tensor

from sslkernels.backends.interface import RowState, Thresholds, Tiles, Wanted
from sslkernels.ops import registry

# (N, M, D): one row, one column, lane and block sizes and their neighbours, a wide row, a tall
# matrix that needs more than one block, and dimensions that are no power of two.
SIZES = [
    (1, 1, 1),
    (2, 3, 8),
    (3, 1, 24),
    (63, 65, 100),
    (64, 64, 128),
    (65, 127, 129),
    (127, 63, 24),
    (130, 130, 32),
    (5, 300, 768),
    (300, 5, 8),
    (700, 411, 16),
    (75, 70, 1100),  # long rows: a panel is taken in several steps
]
SELF_SIZES = [
    (1, 8),
    (2, 1),
    (3, 24),
    (63, 128),
    (64, 64),
    (65, 100),
    (127, 8),
    (130, 129),
    (700, 32),
    (75, 1100),
]


@pytest.mark.parametrize("ids", ["none", "diagonal", "many"])
@pytest.mark.parametrize("kind", ["lse", "softplus"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_rows_columns_and_gradients(on_engine: str, size, kind: str, ids: str) -> None:
    """Both reductions and the gradients of q, k, scale and bias."""
    n, m, d = size
    q, k = make(n, m, d)
    ids_q, ids_k = ids_for(n, m, ids)
    inputs = [q, k, *scalars(q.dtype, 7.0, -1.5 if kind == "softplus" else None)]

    def ours(q, k, scale, bias=None):
        out = pairwise(kind, q, k, scale=scale, bias=bias, ids_q=ids_q, ids_k=ids_k, want_col=True)
        return weighted([out.row, out.col])

    def reference(q, k, scale, bias=None):
        return weighted(list(dense(kind, q, k, scale, bias, ids_q, ids_k)[:2]))

    check_loss(ours, reference, inputs, slack=5e-6, name=f"{on_engine} {kind} {size} {ids}")
    scale, bias = inputs[2], inputs[3] if kind == "softplus" else None
    out = pairwise(kind, q, k, scale=scale, bias=bias, ids_q=ids_q, ids_k=ids_k, want_col=True)
    wide = [None if x is None else x.double() for x in (q, k, scale, bias)]
    true = dense(kind, *wide, ids_q, ids_k)
    for name, value, truth in (("row", out.row, true[0]), ("col", out.col, true[1])):
        check_budget(value, truth, truth, 2e-6, f"{on_engine} {kind} {size} {name}", floor=1.0)
    assert not len(out.rank_row) and not len(out.rank_col)


@pytest.mark.parametrize("ids", ["diagonal", "many", "none"])
@pytest.mark.parametrize("kind", ["lse", "softplus"])
@pytest.mark.parametrize("size", SELF_SIZES, ids=str)
def test_self_mode(on_engine: str, size, kind: str, ids: str) -> None:
    """k = q: the gradient of q has both sides, that of the scale is counted once."""
    n, d = size
    q, _ = make(n, n, d)
    ids_q, _ = ids_for(n, n, ids)
    inputs = [q, *scalars(q.dtype, 5.0)]

    def ours(q, scale):
        return weighted([pairwise(kind, q, scale=scale, ids_q=ids_q).row])

    def reference(q, scale):
        return weighted([dense(kind, q, None, scale, None, ids_q)[0]])

    check_loss(ours, reference, inputs, slack=5e-6, name=f"{on_engine} self {kind} {size} {ids}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", ["self", "cross", "attend"])
def test_dtypes(on_engine: str, dtype: torch.dtype, mode: str) -> None:
    """Halves accumulate in float32; results have the accumulation dtype, gradients the input's."""
    q, k = make(65, 70, 100, dtype)
    ids_q, ids_k = ids_for(65, 70, "diagonal")
    acc = torch.promote_types(dtype, torch.float32)
    scale = scalars(dtype, 10.0)
    if mode == "self":
        inputs = [q, *scale]

        def ours(q, scale):
            row = pairwise("lse", q, scale=scale, ids_q=ids_q).row
            assert row.dtype == acc
            return weighted([row])

        def reference(q, scale):
            return weighted([dense("lse", q, None, scale, None, ids_q)[0]])
    elif mode == "cross":
        inputs = [q, k, *scale]

        def ours(q, k, scale):
            out = pairwise("lse", q, k, scale=scale, ids_q=ids_q, ids_k=ids_k, want_col=True)
            assert out.row.dtype == out.col.dtype == acc
            return weighted([out.row, out.col])

        def reference(q, k, scale):
            return weighted(list(dense("lse", q, k, scale, None, ids_q, ids_k)[:2]))
    else:
        inputs = [q, *scale]

        def ours(q, scale):
            lse = attend(q, k, scale=scale, ids_q=ids_q, ids_k=ids_k).lse
            assert lse.dtype == acc
            return weighted([lse])

        def reference(q, scale):
            return weighted([dense("lse", q, k.to(q.dtype), scale, None, ids_q, ids_k)[0]])

    check_loss(ours, reference, inputs, name=f"{on_engine} {mode} {dtype}")


@pytest.mark.parametrize("ids", ["none", "diagonal", "many"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_attend(on_engine: str, size, ids: str) -> None:
    """lse, the weighted mean key, and the gradients of q and scale."""
    n, m, d = size
    q, k = make(n, m, d)
    ids_q, ids_k = ids_for(n, m, ids)
    inputs = [q, *scalars(q.dtype, 12.0)]

    def ours(q, scale):
        return weighted([attend(q, k, scale=scale, ids_q=ids_q, ids_k=ids_k).lse])

    def reference(q, scale):
        return weighted([dense("lse", q, k.to(q), scale, None, ids_q, ids_k)[0]])

    check_loss(ours, reference, inputs, slack=5e-6, name=f"{on_engine} attend {size} {ids}")
    out = attend(q, k, scale=inputs[1], ids_q=ids_q, ids_k=ids_k)
    s = dense("lse", q.double(), k.double(), inputs[1].double(), None, ids_q, ids_k)[2]
    mean_key = s.softmax(1).nan_to_num(0.0) @ k.double()
    check_budget(out.mean_key, mean_key, mean_key, 5e-6, f"{on_engine} mean_key {size} {ids}")


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("ids", ["none", "diagonal", "many"])
def test_ranks(on_engine: str, size, ids: str) -> None:
    """Counts of allowed S above a threshold, up to ties within rounding."""
    n, m, d = size
    q, k = make(n, m, d)
    ids_q, ids_k = ids_for(n, m, ids)
    (scale,) = scalars(q.dtype, 3.0)
    row_at, col_at = torch.linspace(-0.5, 0.9, n), torch.linspace(0.9, -0.5, m)
    out = pairwise(
        "lse",
        q,
        k,
        scale=scale,
        ids_q=ids_q,
        ids_k=ids_k,
        want_col=True,
        threshold_row=row_at,
        threshold_col=col_at,
    )
    rank = attend(q, k, scale=scale, ids_q=ids_q, ids_k=ids_k, threshold=row_at).rank
    s = dense("lse", q.double(), k.double(), scale.double(), None, ids_q, ids_k)[2]
    for got, at, matrix in (
        (out.rank_row, row_at, s),
        (rank, row_at, s),
        (out.rank_col, col_at, s.T),
    ):
        assert got.dtype == torch.int64
        low = (matrix > at.double()[:, None] + 2e-6).sum(1)
        high = (matrix > at.double()[:, None] - 2e-6).sum(1)
        assert bool(((low <= got) & (got <= high)).all()), f"{on_engine} {size} {ids}"
    if n > 2 and ids == "none":
        assert int(out.rank_row.sum()) > 0
    with_self = pairwise("lse", q, scale=scale, threshold_row=row_at).rank_row
    s = dense("lse", q.double(), None, scale.double())[2]
    assert bool((with_self <= (s > row_at.double()[:, None] - 2e-6).sum(1)).all())
    assert bool((with_self >= (s > row_at.double()[:, None] + 2e-6).sum(1)).all())


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sign", [-2.0, 2.0])  # 2: a row would be its own best positive
def test_extremes(on_engine: str, size, dtype: torch.dtype, sign: float) -> None:
    """Hard positives and negatives, with and without a bias, in both modes."""
    n, m, d = size
    q, k = make(n, m, d, dtype)
    (scale,) = scalars(dtype, sign)
    bias = torch.linspace(0.0, 0.5, m, dtype=scale.dtype)
    ids_q, ids_k = torch.arange(n) % 4, torch.arange(m) % 3
    cases = [(k, None, ids_k), (k, bias, ids_k), (None, None, None), (None, bias, None)]
    for keys, bias_k, ids in cases:
        if keys is None and bias_k is not None:
            bias_k = torch.linspace(0.0, 0.5, n, dtype=scale.dtype)
        out = extremes(q, keys, scale=scale, bias_k=bias_k, ids_q=ids_q, ids_k=ids)
        s = dense("lse", q.double(), None if keys is None else k.double(), scale.double())[2]
        s = s if bias_k is None else s + bias_k.double()
        same = ids_q[:, None] == (ids_q if ids is None else ids)
        other = ~same
        if keys is None:
            same.fill_diagonal_(False)
        for got, mask, fill, best in (
            (out.max_same, same, NEG_INF, "amax"),
            (out.min_other, other, -NEG_INF, "amin"),
        ):
            assert got.dtype == torch.int64
            assert torch.equal(got >= 0, mask.any(1)), f"{on_engine} {size}"
            found = got >= 0
            assert bool(mask[found, got[found]].all()), f"{on_engine} {size}: not allowed"
            extreme = getattr(s.masked_fill(~mask, fill), best)(1)[found]
            torch.testing.assert_close(s[found, got[found]], extreme, atol=2e-5, rtol=0)


def test_extremes_ties_go_to_the_smallest_index(on_engine: str) -> None:
    """All-equal rows: every choice is a tie."""
    q = torch.ones(70, 8)
    ids = torch.arange(70) % 7
    (scale,) = scalars(q.dtype, 1.0)
    out = extremes(q, scale=scale, ids_q=ids)
    first_same = torch.where(torch.arange(70) < 7, torch.arange(70) + 7, ids)
    first_other = torch.where(ids == 0, 1, 0)
    assert torch.equal(out.max_same, first_same) and torch.equal(out.min_other, first_other)


CLASSES = {
    "interleaved": lambda n: torch.arange(n) % 11,
    "three": lambda n: torch.arange(n) * 7919 % 3,  # most tiles have one id in rows and columns
    "one": lambda n: torch.zeros(n, dtype=torch.int64),
    "single rows": lambda n: torch.arange(n) * 2**40,
    "runs": lambda n: (torch.arange(n) // 37 * 5) % 9 - 4,
}


@pytest.mark.parametrize("classes", CLASSES)
@pytest.mark.parametrize("with_bias", [False, True])
def test_extremes_of_classes(on_engine: str, classes: str, with_bias: bool) -> None:
    """Values are small integers: exact, and full of ties, which the smallest index wins."""
    n = 301
    generator = torch.Generator().manual_seed(3)
    z = torch.randint(-1, 2, (n, 16), generator=generator).float()
    bias = torch.randint(0, 4, (n,), generator=generator).float() if with_bias else None
    ids = CLASSES[classes](n)
    (scale,) = scalars(z.dtype, -2.0)
    out = extremes(z, scale=scale, bias_k=bias, ids_q=ids)
    value = -2 * z @ z.T + (0 if bias is None else bias)
    same = ids[:, None] == ids
    other = ~same
    same.fill_diagonal_(False)
    for got, mask, sign in ((out.max_same, same, 1), (out.min_other, other, -1)):
        best = (sign * value).masked_fill(~mask, NEG_INF)
        first = (best == best.amax(1, keepdim=True)).int().argmax(1)
        assert torch.equal(got, torch.where(mask.any(1), first, -1)), f"{on_engine} {classes}"


def layouts(x: Tensor) -> dict[str, Tensor]:
    """The same values (of equal rows for "expanded") in other memory."""
    wide = torch.empty(x.shape[0], 2 * x.shape[1], dtype=x.dtype)
    wide[:, ::2] = x
    odd = torch.empty(x.numel() + 1, dtype=x.dtype)[1:].view_as(x).copy_(x)
    return {
        "strided": wide[:, ::2],
        "transposed": x.T.contiguous().T,
        "poisoned": poisoned(x),
        "misaligned": odd,
        "expanded": x[:1].expand_as(x),
        "expanded columns": x[:, :1].expand_as(x),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "layout", ["strided", "transposed", "poisoned", "misaligned", "expanded", "expanded columns"]
)
def test_layouts(on_engine: str, layout: str, dtype: torch.dtype) -> None:
    """Any strides, and NaN around the data, give what contiguous inputs give."""
    q, k = (layouts(x)[layout] for x in make(67, 71, 37, dtype))
    (scale,) = scalars(dtype, 4.0)
    ids_q, ids_k = ids_for(67, 71, "diagonal")
    drow, dcol = weights(67, 71)

    def run(q: Tensor, k: Tensor) -> list[Tensor]:
        q, k = q.detach().requires_grad_(), k.detach().requires_grad_()
        out = pairwise("lse", q, k, scale=scale, ids_q=ids_q, ids_k=ids_k, want_col=True)
        grads = torch.autograd.grad([out.row, out.col], [q, k], [drow, dcol])
        own = pairwise("lse", q, scale=scale, ids_q=ids_q).row
        near = attend(q, k.detach(), scale=scale)
        hard = extremes(q, k, scale=scale, ids_q=ids_q % 5, ids_k=ids_k % 5)
        own_grad = torch.autograd.grad([own, near.lse], [q], [drow, drow])
        return [*out[:2], *grads, own, *own_grad, *near[:2], *hard]

    for got, expected in zip(run(q, k), run(q.contiguous(), k.contiguous()), strict=True):
        torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-5)


def test_stride_0_gradients(on_engine: str) -> None:
    """row.sum() hands an expanded scalar to the backward pass."""
    q, k = make(65, 66, 40)
    (scale,) = scalars(q.dtype, 4.0)

    def gradients(dense_seed: bool) -> list[Tensor]:
        leaves = [x.clone().requires_grad_() for x in (q, k)]
        out = pairwise("lse", *leaves, scale=scale, want_col=True)
        near = attend(leaves[0], k, scale=scale)
        if dense_seed:
            seeds = [torch.full((n,), 2.0) for n in (65, 66, 65)]
        else:
            seeds = [torch.tensor(2.0).expand(n) for n in (65, 66, 65)]
        return list(torch.autograd.grad([out.row, out.col, near.lse], leaves, seeds))

    for got, expected in zip(gradients(False), gradients(True), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("output", ["row", "col"])
def test_one_output_used(on_engine: str, output: str) -> None:
    """The gradient of an unused output is nothing, not garbage."""
    q, k = make(33, 65, 24)

    def ours(q, k, scale):
        return getattr(pairwise("lse", q, k, scale=scale, want_col=True), output).sum()

    def reference(q, k, scale):
        return dense("lse", q, k, scale)[0 if output == "row" else 1].sum()

    check_loss(ours, reference, [q, k, *scalars(q.dtype, 4.0)], name=f"{on_engine} {output}")


@pytest.mark.parametrize("kind", ["lse", "softplus"])
def test_scale_zero_and_negative(on_engine: str, kind: str) -> None:
    """dscale needs no division by the scale that could be 0 / 0."""
    q, k = make(20, 30, 16)
    for value in (0.0, -3.0):
        check_loss(
            lambda q, k, s: weighted(list(pairwise(kind, q, k, scale=s, want_col=True)[:2])),
            lambda q, k, s: weighted(list(dense(kind, q, k, s)[:2])),
            [q, k, *scalars(q.dtype, value)],
            name=f"{on_engine} {kind} scale {value}",
        )
        check_loss(
            lambda q, s: weighted([pairwise(kind, q, scale=s).row]),
            lambda q, s: weighted([dense(kind, q, None, s)[0]]),
            [q, *scalars(q.dtype, value)],
            name=f"{on_engine} {kind} self scale {value}",
        )


@pytest.mark.parametrize("scale", [1e4, -1e4])
@pytest.mark.parametrize("kind", ["lse", "softplus"])
def test_huge_logits(on_engine: str, kind: str, scale: float) -> None:
    """Logits to +-1e4, all of one sign too: no overflow, no padding that wins the maximum."""
    q = torch.nn.functional.normalize(make(67, 67, 20)[0].abs() + 0.1, dim=1)
    k = torch.nn.functional.normalize(make(69, 69, 20)[0].abs() + 0.1, dim=1)
    check_loss(
        lambda q, k, s: weighted(list(pairwise(kind, q, k, scale=s, want_col=True)[:2])),
        lambda q, k, s: weighted(list(dense(kind, q, k, s)[:2])),
        [q, k, *scalars(q.dtype, scale)],
        slack=2e-3,  # one ulp of a logit of 1e4 is 1e-3, and moves exp by that much
        name=f"{on_engine} {kind} scale {scale}",
    )
    lse = attend(q, k, scale=torch.tensor(scale)).lse
    true = dense("lse", q.double(), k.double(), torch.tensor(scale).double())[0]
    check_budget(lse, true, true, 1e-6, f"{on_engine} attend scale {scale}")


def test_column_maxima_that_move(on_engine: str) -> None:
    """Each of 700 rows has its own magnitude, up or down by 1e4: online maxima follow."""
    q, k = make(700, 411, 16)
    rising = torch.linspace(0.0, 1.0, 700).square()
    for size in (rising, rising.flip(0)):
        rows = q * size[:, None]
        scale = torch.tensor(5e3)
        out = pairwise("lse", rows, k, scale=scale, want_col=True)
        true = dense("lse", rows.double(), k.double(), scale.double())
        check_budget(out.col, true[1], true[1], 1e-6, f"{on_engine} col")
        check_budget(out.row, true[0], true[0], 1e-6, f"{on_engine} row")


def test_nan_reaches_what_depends_on_it(on_engine: str) -> None:
    """A NaN in a row of q poisons that row and, through S, every column; other rows stay clean."""
    q, k = make(66, 70, 16)
    q[3, 5] = torch.nan
    (scale,) = scalars(q.dtype, 2.0)
    out = pairwise("lse", q, k, scale=scale, want_col=True)
    bad = torch.arange(66) == 3
    assert torch.equal(out.row.isnan(), bad)
    assert bool(out.col.isnan().all())
    near = attend(q, k, scale=scale)
    assert torch.equal(near.lse.isnan(), bad)
    assert torch.equal(near.mean_key.isnan().any(1), bad)
    assert bool(pairwise("lse", q, scale=scale).row.isnan().all())
    leaf = q.clone().requires_grad_()
    pairwise("softplus", leaf, k, scale=scale).row.sum().backward()
    assert leaf.grad is not None and torch.equal(leaf.grad.isnan().any(1), bad)
    # To the bit: no other exponential for all rows because of one.
    clean = q.clone()
    clean[3] = 0
    same = pairwise("lse", clean, k, scale=scale, want_col=True)
    for got, expected in ((out.row, same.row), (near.lse, attend(clean, k, scale=scale).lse)):
        assert torch.equal(got[~bad], expected[~bad])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_softplus_and_logistic_of_each_magnitude(on_engine: str, dtype: torch.dtype) -> None:
    """One similarity a row, from -60 to 60: relative to log(1 + exp(s)) and to its derivative."""
    s = torch.linspace(-60.0, 60.0, 4001, dtype=dtype)[:, None]
    s = torch.cat((s, torch.tensor([[0.0], [1e-30], [-1e-8]], dtype=dtype)))
    q, one = s.clone().requires_grad_(), torch.ones(1, 1, dtype=dtype)
    row = pairwise("softplus", q, one, scale=torch.tensor(1.0, dtype=dtype)).row
    (slope,) = torch.autograd.grad(row.sum(), q)
    exact = s.double()[:, 0]
    truth = exact.clamp(min=0) + exact.abs().neg().exp().log1p()
    room = 4e-7 if dtype == torch.float32 else 1e-15
    # exp of a rounded argument: |s| roundings.
    allowed = room * (1 + exact.abs()) * truth
    assert bool(((row.double() - truth).abs() <= allowed).all())
    derivative = exact.sigmoid()
    allowed = room * (1 + exact.abs()) * derivative
    assert bool(((slope.double()[:, 0] - derivative).abs() <= allowed).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("logit", [0.0, -3.0, -30.0, 2.0], ids=str)
def test_softplus_of_many_columns(on_engine: str, dtype: torch.dtype, logit: float) -> None:
    """Products of 1 + e are taken out before they overflow, and keep the digits of a small e."""
    q, k = torch.full((70, 1), logit, dtype=dtype), torch.ones(9001, 1, dtype=dtype)
    k -= torch.rand(k.shape, generator=torch.Generator().manual_seed(0), dtype=dtype) / 8
    one = torch.tensor(1.0, dtype=dtype)
    room = (4e-7 if dtype == torch.float32 else 2e-15) * (1 + abs(logit))  # as above
    for x, y in ((q, k), (k, q)):
        out = pairwise("softplus", x, y, scale=one, want_col=True)
        alone = pairwise("softplus", x, y, scale=one).row
        truth = torch.nn.functional.softplus(x.double() @ y.double().T, threshold=1e9)
        for got, exact in ((out.row, truth.sum(1)), (out.col, truth.sum(0)), (alone, truth.sum(1))):
            assert bool(((got.double() - exact).abs() <= room * exact).all())


@pytest.mark.parametrize("which", [0, 63, 64, 129])
def test_one_long_row_decides_how_all_are_summed(on_engine: str, which: int) -> None:
    """Whether one shift serves all logits depends on the longest row, wherever it is."""
    q, k = make(130, 130, 16)
    (scale,) = scalars(q.dtype, 2.0)
    q[which] = 400 * k[which]
    for x, y in ((q, k), (k, q), (q, None)):
        got = pairwise("lse", x, y, scale=scale).row
        wide = [None if v is None else v.double() for v in (x, y)]
        true = dense("lse", *wide, scale.double())[0]
        check_budget(got, true, true, 2e-6, f"{on_engine} {which}", floor=1.0)
    near, true = attend(k, q, scale=scale), dense("lse", k.double(), q.double(), scale.double())[0]
    check_budget(near.lse, true, true, 2e-6, f"{on_engine} {which} attend", floor=1.0)


@pytest.mark.parametrize("size", [(0, 5, 3), (5, 0, 3), (0, 0, 3)], ids=str)
def test_empty(on_engine: str, size) -> None:
    """Nothing to reduce over is -inf (lse) or 0 (softplus, mean key), and no gradient."""
    n, m, d = size
    q, k = torch.randn(n, d, requires_grad=True), torch.randn(m, d, requires_grad=True)
    (scale,) = scalars(q.dtype, 2.0)
    out = pairwise("lse", q, k, scale=scale, want_col=True)
    assert out.row.shape == (n,) and out.col.shape == (m,)
    assert bool((out.row == NEG_INF).all()) and bool((out.col == NEG_INF).all())
    soft = pairwise("softplus", q, k, scale=scale, want_col=True)
    assert not bool(soft.row.any()) and not bool(soft.col.any())
    grads = torch.autograd.grad(
        [out.row, out.col, soft.row, soft.col],
        [q, k],
        [torch.zeros_like(x) for x in (out.row, out.col, soft.row, soft.col)],
    )
    assert all(g.shape == x.shape and not bool(g.any()) for g, x in zip(grads, (q, k), strict=True))
    near = attend(q.detach(), k.detach(), scale=scale)
    assert bool((near.lse == NEG_INF).all()) and not bool(near.mean_key.any())
    hard = extremes(
        q.detach(),
        k.detach(),
        scale=scale,
        ids_q=torch.zeros(n, dtype=torch.int64),
        ids_k=torch.zeros(m, dtype=torch.int64),
    )
    assert bool((hard.max_same == -1).all()) and bool((hard.min_other == -1).all())


@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_rows_and_columns_that_are_empty_to_their_caller(on_engine: str, scale: float) -> None:
    """The term of a log-sum-exp of -inf is 0, though there are pairs; one shift for all logits, or none."""
    tiles = Tiles(*make(70, 65, 24), torch.tensor(scale))
    backend = registry.resolve(tiles.q.device)
    row, col = backend.pairwise_forward("lse", tiles, True, Thresholds())[:2]
    drow, dcol = torch.linspace(-1.0, 2.0, 70), torch.linspace(-2.0, 1.0, 65)
    empty_row, empty_col = torch.arange(70) % 3 == 0, torch.arange(65) % 5 == 0

    def gradients(rows: RowState, columns: RowState | None) -> list[Tensor]:
        return list(backend.pairwise_backward("lse", tiles, rows, columns, Wanted(True, True))[:2])

    rows = RowState(row.masked_fill(empty_row, NEG_INF), drow)
    dq = gradients(rows, None)[0]
    assert not dq[empty_row].any() and dq[~empty_row].any(1).all()
    said = gradients(rows, RowState(col.masked_fill(empty_col, NEG_INF), dcol))
    weightless = gradients(
        RowState(row, drow.masked_fill(empty_row, 0.0)),
        RowState(col, dcol.masked_fill(empty_col, 0.0)),
    )
    for got, expected in zip(said, weightless, strict=True):
        assert torch.equal(got, expected)


def test_same_bits_for_any_number_of_threads(on_engine: str) -> None:
    """And from run to run."""
    q, k = make(1030, 517, 48)
    leaves = [x.clone().requires_grad_() for x in (q, k)]
    scale = torch.tensor(9.0, requires_grad=True)
    ids = torch.arange(1030)

    def run() -> list[Tensor]:
        out = pairwise("lse", *leaves, scale=scale, want_col=True)
        own = pairwise("lse", leaves[0], scale=scale, ids_q=ids)
        near = attend(leaves[0], k, scale=scale)
        hard = extremes(q, scale=scale.detach(), ids_q=ids % 10)
        outputs = [out.row, out.col, own.row, near.lse]
        grads = torch.autograd.grad(outputs, [*leaves, scale], weights(1030, 517, 1030, 1030))
        return [*outputs, *grads, near.mean_key, *hard]

    with threads(1):
        one = run()
    for n_threads in (2, 3, 7, 16):
        with threads(n_threads):
            for a, b in zip(run(), one, strict=True):
                assert torch.equal(a, b), f"{on_engine}: {n_threads} threads"


def test_inputs_are_not_written(on_engine: str) -> None:
    """Neither values nor version counters of inputs move."""
    q, k = make(40, 50, 12)
    scale, bias = scalars(q.dtype, 3.0, 0.5)
    ids_q, ids_k = ids_for(40, 50, "many")
    given = [q, k, scale, bias, ids_q, ids_k]
    before = [(x.clone(), x._version) for x in given]
    leaves = [x.requires_grad_() for x in (q, k, scale, bias)]
    out = pairwise(
        "softplus", q, k, scale=scale, bias=bias, ids_q=ids_q, ids_k=ids_k, want_col=True
    )
    torch.autograd.grad([out.row, out.col], leaves, weights(40, 50))
    attend(q.detach(), k.detach(), scale=scale.detach(), ids_q=ids_q, ids_k=ids_k)
    extremes(q.detach(), k.detach(), scale=scale.detach(), ids_q=ids_q, ids_k=ids_k)
    for x, (value, version) in zip(given, before, strict=True):
        assert torch.equal(x, value) and x._version == version


def test_attend_keeps_nothing_of_the_keys(on_engine: str) -> None:
    """Keys overwritten between forward and backward change no gradient."""
    q, k = make(10, 40, 8)
    scale = torch.tensor(5.0)

    def gradient(overwrite: bool) -> Tensor:
        leaf, keys = q.clone().requires_grad_(), k.clone()
        lse = attend(leaf, keys, scale=scale).lse
        if overwrite:
            keys.fill_(torch.nan)
        return torch.autograd.grad(lse.sum(), leaf)[0]

    assert torch.equal(gradient(True), gradient(False))
