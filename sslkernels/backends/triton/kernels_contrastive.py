# SPDX-License-Identifier: Apache-2.0
"""What NT-Xent needs around the tiles: its rows before, its loss and its gradients after them.

Few launches are the point: at a few hundred rows a loss is bound by them.  So rows are normalised, laid
out and paired by one kernel, the loss is made where slots are combined, and one kernel gathers what the
programs of the backward pass left, adds the positives and takes the gradient through the norm.

Rows r and r + n are the views of one sample; <a_i, b_i> is that of the rows as they are before the tiles
round them (``EXACT``), as in ``ops/composed.py``.
"""

import triton
import triton.language as tl

from .kernels_backward import center_of
from .pairs import slots_of
from .tiles import (
    CALM_CENTER,
    CALM_SPREAD,
    HALF_LIFT,
    LOG2_E,
    exp,
    kernel,
    sigmoid2,
    tree_sum,
    wait_turn,
)


@triton.jit
def _chunk_of(
    x_ptr, rows, ok, chunk,
    D: tl.constexpr, STRIDE_N: tl.constexpr, STRIDE_D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """[rows, BLOCK_D] float32: one chunk of features of some rows."""
    features = chunk * BLOCK_D + tl.arange(0, BLOCK_D)
    ptrs = x_ptr + rows.to(tl.int64)[:, None] * STRIDE_N + features.to(tl.int64)[None, :] * STRIDE_D
    return tl.load(ptrs, mask=ok[:, None] & (features < D)[None, :], other=0.0).to(tl.float32)


@triton.jit
def _divisor(
    x_ptr, rows, ok, eps,
    D: tl.constexpr, STRIDE_N: tl.constexpr, STRIDE_D: tl.constexpr,
    NORMALIZE: tl.constexpr, NUM_D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """(Norm, what rows are divided by): as ``updates.normalize_kernel``; 1 without NORMALIZE."""
    divisor = tl.full((BLOCK_N,), 1.0, tl.float32)
    norm = divisor
    if NORMALIZE:
        square = tl.zeros((BLOCK_N,), tl.float32)
        for chunk in tl.static_range(NUM_D):
            x = _chunk_of(x_ptr, rows, ok, chunk, D, STRIDE_N, STRIDE_D, BLOCK_D)
            square += tl.sum(x * x, 1)
        norm = tl.sqrt(square)
        divisor = tl.where(norm < eps, tl.full((BLOCK_N,), 0.0, tl.float32) + eps, norm)
    return norm, divisor


@triton.jit
def _unit_chunk(
    x_ptr, rows, ok, chunk, divisor,
    D: tl.constexpr, STRIDE_N: tl.constexpr, STRIDE_D: tl.constexpr,
    NORMALIZE: tl.constexpr, EXACT: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One chunk of unit rows, rounded to EXACT."""
    x = _chunk_of(x_ptr, rows, ok, chunk, D, STRIDE_N, STRIDE_D, BLOCK_D)
    if NORMALIZE:
        x = x / divisor[:, None]
    return x.to(EXACT)


@kernel
def prepare_kernel(
    unit_ptr,  # [whole blocks of 2n, WIDTH] operands of the tiles
    positive_ptr,  # [n]
    inv_ptr,  # [2n]
    logit_ptr,  # [2n] scale * positive; only with HAS_LOGIT
    a_ptr,  # [n, D]
    b_ptr,  # [n, D]
    scale_ptr,  # 0-d
    n,
    filled,  # n and the rows of zeros that fill up the last block
    eps,
    NORMALIZE: tl.constexpr,
    HAS_LOGIT: tl.constexpr,
    EXACT: tl.constexpr,
    D: tl.constexpr,
    STRIDE_AN: tl.constexpr,
    STRIDE_AD: tl.constexpr,
    STRIDE_BN: tl.constexpr,
    STRIDE_BD: tl.constexpr,
    WIDTH: tl.constexpr,
    NUM_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Both views of some samples: unit rows, what they were multiplied with, positives."""
    wait_turn()
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    ok = rows < n
    _, divisor_a = _divisor(
        a_ptr, rows, ok, eps, D, STRIDE_AN, STRIDE_AD, NORMALIZE, NUM_D, BLOCK_N, BLOCK_D
    )
    _, divisor_b = _divisor(
        b_ptr, rows, ok, eps, D, STRIDE_BN, STRIDE_BD, NORMALIZE, NUM_D, BLOCK_N, BLOCK_D
    )
    positive = tl.zeros((BLOCK_N,), tl.float32)
    out = unit_ptr + rows.to(tl.int64)[:, None] * WIDTH
    second = tl.cast(n, tl.int64) * WIDTH
    for chunk in tl.static_range(NUM_D):
        u = _unit_chunk(
            a_ptr, rows, ok, chunk, divisor_a, D, STRIDE_AN, STRIDE_AD, NORMALIZE, EXACT, BLOCK_D
        )
        v = _unit_chunk(
            b_ptr, rows, ok, chunk, divisor_b, D, STRIDE_BN, STRIDE_BD, NORMALIZE, EXACT, BLOCK_D
        )
        positive += tl.sum(u.to(tl.float32) * v.to(tl.float32), 1)
        features = chunk * BLOCK_D + tl.arange(0, BLOCK_D)
        there = (features < WIDTH)[None, :]
        kind = unit_ptr.dtype.element_ty
        tl.store(out + features[None, :], u.to(kind), mask=ok[:, None] & there)
        # Behind the last row of b are the zeros that fill up its block.
        tl.store(
            out + second + features[None, :], v.to(kind), mask=(rows < filled)[:, None] & there
        )
    tl.store(positive_ptr + rows, positive, mask=ok)
    tl.store(inv_ptr + rows, 1.0 / divisor_a, mask=ok)
    tl.store(inv_ptr + n + rows, 1.0 / divisor_b, mask=ok)
    if HAS_LOGIT:
        logit = tl.load(scale_ptr) * positive
        tl.store(logit_ptr + rows, logit, mask=ok)
        tl.store(logit_ptr + n + rows, logit, mask=ok)


@kernel
def sum_kernel(
    out_ptr,  # 0-d
    parts_ptr,  # [count]
    divisor_ptr,  # 0-d; only with DIVIDE
    count,
    DIVIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sum of partial sums, in one order."""
    wait_turn()
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, count, BLOCK):
        index = start + tl.arange(0, BLOCK)
        total += tl.load(parts_ptr + index, mask=index < count, other=0.0)
    found = tl.sum(total, 0)
    if DIVIDE:
        found = found / tl.load(divisor_ptr)
    tl.store(out_ptr, found)


# ---- backward ------------------------------------------------------------------------------------


@triton.jit
def _row_weight(
    lse_ptr, positive_ptr, dloss_ptr, scale_ptr, rows, ok, n, factor, PER_ROW: tl.constexpr
):
    """(lse, w = dloss sigmoid(lse - p)): d loss / d lse, and minus d loss / d p."""
    lse = tl.load(lse_ptr + rows, mask=ok, other=float("-inf"))
    positive = tl.load(positive_ptr + rows % n, mask=ok, other=0.0)
    if PER_ROW:
        dloss = tl.load(dloss_ptr + rows, mask=ok, other=0.0)
    else:
        dloss = tl.load(dloss_ptr) * factor
    return lse, sigmoid2((lse - tl.load(scale_ptr) * positive) * LOG2_E) * dloss


@kernel
def lift_pairs_kernel(
    lift_ptr,  # [1]
    lse_ptr,  # [2n]
    positive_ptr,  # [n]
    dloss_ptr,  # 0-d, or [2n] with PER_ROW
    scale_ptr,  # 0-d
    n,
    factor,
    PER_ROW: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``kernels_backward.lift_kernel`` of row weights that nobody has written yet."""
    wait_turn()
    peak = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, 2 * n, BLOCK):
        rows = start + tl.arange(0, BLOCK)
        ok = rows < 2 * n
        _, weight = _row_weight(
            lse_ptr, positive_ptr, dloss_ptr, scale_ptr, rows, ok, n, factor, PER_ROW
        )
        size = tl.abs(weight)
        peak = tl.maximum(peak, tl.where(ok & (size < float("inf")), size, 0.0))
    largest = tl.max(peak, 0)
    exponent = (largest.to(tl.int32, bitcast=True) >> 23) - 126
    exponent = tl.minimum(tl.maximum(tl.where(largest == 0.0, 0, exponent), -100), 100)
    tl.store(lift_ptr, ((127 - exponent) << 23).to(tl.float32, bitcast=True))


@kernel
def weigh_pairs_kernel(
    unit_ptr,  # [whole blocks of 2n, WIDTH]
    row_weight_ptr,  # [whole] float32: w
    weight_ptr,  # [whole] float32: w exp(c - lse)
    lse_out_ptr,  # [whole] float32: lse, filled up
    calm_ptr,  # [whole / SPAN] int32
    a_ptr,  # [n, D]
    b_ptr,  # [n, D]
    lse_ptr,  # [2n]
    positive_ptr,  # [n]
    dloss_ptr,  # 0-d, or [2n] with PER_ROW
    scale_ptr,  # 0-d
    lift_ptr,  # [1]; only with HAS_LIFT
    n,
    whole,
    eps,
    factor,
    NORMALIZE: tl.constexpr,
    PER_ROW: tl.constexpr,
    HAS_LIFT: tl.constexpr,
    EXACT: tl.constexpr,
    D: tl.constexpr,
    STRIDE_AN: tl.constexpr,
    STRIDE_AD: tl.constexpr,
    STRIDE_BN: tl.constexpr,
    STRIDE_BD: tl.constexpr,
    WIDTH: tl.constexpr,
    NUM_D: tl.constexpr,
    BLOCK_N: tl.constexpr,  # SPAN
    BLOCK_D: tl.constexpr,
):
    """One span of rows of both views: unit rows again, and their weights (``weigh_kernel``)."""
    wait_turn()
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    ok = rows < 2 * n
    lse, row_weight = _row_weight(
        lse_ptr, positive_ptr, dloss_ptr, scale_ptr, rows, ok, n, factor, PER_ROW
    )
    row_weight = tl.where(ok, row_weight, 0.0)
    weight = row_weight
    if HAS_LIFT:
        weight = weight * (tl.load(lift_ptr) * HALF_LIFT)
    lse = tl.where(ok, lse, float("inf"))
    nothing = tl.abs(lse) == float("inf")
    center = center_of(lse_ptr)
    away = tl.where(nothing, 0.0, lse - center)
    spread = tl.where(tl.abs(center) <= CALM_CENTER, CALM_SPREAD, -1.0)
    tl.store(calm_ptr + tl.program_id(0), tl.min((tl.abs(away) <= spread).to(tl.int32), 0))
    tl.store(row_weight_ptr + rows, row_weight, mask=rows < whole)
    tl.store(weight_ptr + rows, tl.where(nothing, 0.0, weight * exp(-away)), mask=rows < whole)
    tl.store(lse_out_ptr + rows, lse, mask=rows < whole)
    # A span may hold rows of both views.
    of_a, of_b = rows < n, ok & (rows >= n)
    _, divisor_a = _divisor(
        a_ptr, rows, of_a, eps, D, STRIDE_AN, STRIDE_AD, NORMALIZE, NUM_D, BLOCK_N, BLOCK_D
    )
    _, divisor_b = _divisor(
        b_ptr, rows - n, of_b, eps, D, STRIDE_BN, STRIDE_BD, NORMALIZE, NUM_D, BLOCK_N, BLOCK_D
    )
    out = unit_ptr + rows.to(tl.int64)[:, None] * WIDTH
    for chunk in tl.static_range(NUM_D):
        u = _unit_chunk(
            a_ptr, rows, of_a, chunk, divisor_a, D, STRIDE_AN, STRIDE_AD, NORMALIZE, EXACT, BLOCK_D
        )
        v = _unit_chunk(
            b_ptr,
            rows - n,
            of_b,
            chunk,
            divisor_b,
            D,
            STRIDE_BN,
            STRIDE_BD,
            NORMALIZE,
            EXACT,
            BLOCK_D,
        )
        features = chunk * BLOCK_D + tl.arange(0, BLOCK_D)
        kind = unit_ptr.dtype.element_ty
        unit = tl.where(of_a[:, None], u.to(kind), v.to(kind))
        tl.store(
            out + features[None, :],
            unit,
            mask=(rows < whole)[:, None] & (features < WIDTH)[None, :],
        )


@triton.jit
def _gathered(
    parts_ptr, rows, ok, chunk, N, share, tiles,
    WIDTH: tl.constexpr, HELD: tl.constexpr, SLOTS: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """[rows, BLOCK_D]: the sum of what programs that shared a block left, in a fixed tree."""
    features = chunk * BLOCK_D + tl.arange(0, BLOCK_D)
    mask = ok[:, None] & (features < WIDTH)[None, :]
    at = rows.to(tl.int64)[:, None] * WIDTH + features[None, :]
    if SLOTS == 1:
        return tl.load(parts_ptr + at, mask=mask, other=0.0)
    else:
        used = slots_of((rows // HELD).to(tl.int64) * tiles, tiles, share)
        total = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
        for base in range(0, tl.max(used, 0), SLOTS):
            parts = ()
            for i in tl.static_range(SLOTS):
                part = parts_ptr + tl.cast(base + i, tl.int64) * N * WIDTH
                here = mask & (base + i < used)[:, None]
                parts = parts + (tl.load(part + at, mask=here, other=0.0),)
            total += tree_sum(parts, SLOTS)
        return total


@triton.jit
def _finished_chunk(
    parts_ptr, x_ptr, other_ptr, rows, ok, first, chunk, divisor, other_divisor, pull, N, share, tiles,
    D: tl.constexpr, STRIDE_XN: tl.constexpr, STRIDE_XD: tl.constexpr, STRIDE_ON: tl.constexpr,
    STRIDE_OD: tl.constexpr, NORMALIZE: tl.constexpr, EXACT: tl.constexpr, WIDTH: tl.constexpr,
    HELD: tl.constexpr, SLOTS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """(Unit rows, gradient of the unit rows) of one view: tiles, and the positive's pull."""
    dx = _gathered(
        parts_ptr, first + rows, ok, chunk, N, share, tiles, WIDTH, HELD, SLOTS, BLOCK_N, BLOCK_D
    )
    unit = _unit_chunk(
        x_ptr, rows, ok, chunk, divisor, D, STRIDE_XN, STRIDE_XD, NORMALIZE, EXACT, BLOCK_D
    )
    other = _unit_chunk(
        other_ptr,
        rows,
        ok,
        chunk,
        other_divisor,
        D,
        STRIDE_ON,
        STRIDE_OD,
        NORMALIZE,
        EXACT,
        BLOCK_D,
    )
    return unit.to(tl.float32), dx - pull[:, None] * other.to(tl.float32)


@triton.jit
def _finish_view(
    dx_ptr, parts_ptr, x_ptr, other_ptr, rows, ok, first, norm, divisor, other_divisor, pull, N, share,
    tiles, eps,
    D: tl.constexpr, STRIDE_XN: tl.constexpr, STRIDE_XD: tl.constexpr, STRIDE_ON: tl.constexpr,
    STRIDE_OD: tl.constexpr, NORMALIZE: tl.constexpr, WANT: tl.constexpr, WANT_ALONG: tl.constexpr,
    EXACT: tl.constexpr, WIDTH: tl.constexpr, HELD: tl.constexpr, SLOTS: tl.constexpr, NUM_D: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Write the gradient of one view; returns <u, du> of its rows."""
    TWICE: tl.constexpr = NORMALIZE or WANT_ALONG  # the sums come before the gradient
    along = tl.zeros((BLOCK_N,), tl.float32)
    kept = tl.zeros((BLOCK_N,), tl.float32)
    if TWICE:
        for chunk in tl.static_range(NUM_D):
            unit, dunit = _finished_chunk(
                parts_ptr, x_ptr, other_ptr, rows, ok, first, chunk, divisor, other_divisor, pull, N,
                share, tiles, D, STRIDE_XN, STRIDE_XD, STRIDE_ON, STRIDE_OD, NORMALIZE, EXACT, WIDTH, HELD,
                SLOTS, BLOCK_N, BLOCK_D,
            )  # fmt: skip
            along += tl.sum(unit * dunit, 1)
            if NORMALIZE:
                x = _chunk_of(x_ptr, rows, ok, chunk, D, STRIDE_XN, STRIDE_XD, BLOCK_D)
                kept += tl.sum(x / divisor[:, None] * dunit, 1)
        kept = tl.where(norm < eps, 0.0, kept)  # below eps the norm is a constant
    if WANT:
        for chunk in tl.static_range(NUM_D):
            if NUM_D > 1 or not TWICE:
                _, dunit = _finished_chunk(
                    parts_ptr, x_ptr, other_ptr, rows, ok, first, chunk, divisor, other_divisor, pull, N,
                    share, tiles, D, STRIDE_XN, STRIDE_XD, STRIDE_ON, STRIDE_OD, NORMALIZE, EXACT, WIDTH,
                    HELD, SLOTS, BLOCK_N, BLOCK_D,
                )  # fmt: skip
            dx = dunit
            if NORMALIZE:
                x = _chunk_of(x_ptr, rows, ok, chunk, D, STRIDE_XN, STRIDE_XD, BLOCK_D)
                dx = (dunit - x / divisor[:, None] * kept[:, None]) / divisor[:, None]
            features = chunk * BLOCK_D + tl.arange(0, BLOCK_D)
            at = rows.to(tl.int64)[:, None] * D + features[None, :]
            mask = ok[:, None] & (features < D)[None, :]
            tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=mask)
    return along


@kernel
def finish_kernel(
    da_ptr,  # [n, D] dtype of a
    along_ptr,  # [programs] float32: what this view adds to dscale * scale; only with WANT_DSCALE
    parts_ptr,  # [slots, rows of the pass, WIDTH] float32
    a_ptr,  # [n, D]
    b_ptr,  # [n, D]
    row_weight_ptr,  # [2n]
    scale_ptr,  # 0-d
    db_ptr,  # [n, D]
    n,
    first_a,  # row of parts where a begins
    first_b,
    N,  # rows of a slot
    share,
    tiles,
    eps,
    NORMALIZE: tl.constexpr,
    WANT_A: tl.constexpr,
    WANT_B: tl.constexpr,
    WANT_DSCALE: tl.constexpr,
    EXACT: tl.constexpr,
    D: tl.constexpr,
    STRIDE_AN: tl.constexpr,
    STRIDE_AD: tl.constexpr,
    STRIDE_BN: tl.constexpr,
    STRIDE_BD: tl.constexpr,
    WIDTH: tl.constexpr,
    HELD: tl.constexpr,
    SLOTS: tl.constexpr,
    NUM_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Gradients of both views of some samples, through the norm; program axis 1: a, b.

    With u, v the unit rows: du = dX - scale (w_i + w_{i+n}) v, da = (du - u <u, du>) / |a|.
    """
    wait_turn()
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    ok = rows < n
    pull = tl.load(row_weight_ptr + rows, mask=ok, other=0.0)
    pull += tl.load(row_weight_ptr + n + rows, mask=ok, other=0.0)
    pull = pull * tl.load(scale_ptr)
    norm_a, divisor_a = _divisor(
        a_ptr, rows, ok, eps, D, STRIDE_AN, STRIDE_AD, NORMALIZE, NUM_D, BLOCK_N, BLOCK_D
    )
    norm_b, divisor_b = _divisor(
        b_ptr, rows, ok, eps, D, STRIDE_BN, STRIDE_BD, NORMALIZE, NUM_D, BLOCK_N, BLOCK_D
    )
    along_all = tl.zeros((BLOCK_N,), tl.float32)
    if WANT_A or WANT_DSCALE:
        if tl.program_id(1) == 0:
            along_all = _finish_view(
                da_ptr, parts_ptr, a_ptr, b_ptr, rows, ok, first_a, norm_a, divisor_a, divisor_b, pull, N,
                share, tiles, eps, D, STRIDE_AN, STRIDE_AD, STRIDE_BN, STRIDE_BD, NORMALIZE, WANT_A,
                WANT_DSCALE, EXACT, WIDTH, HELD, SLOTS, NUM_D, BLOCK_N, BLOCK_D,
            )  # fmt: skip
    if WANT_B or WANT_DSCALE:
        if tl.program_id(1) == tl.num_programs(1) - 1:
            along_all = _finish_view(
                db_ptr, parts_ptr, b_ptr, a_ptr, rows, ok, first_b, norm_b, divisor_b, divisor_a, pull, N,
                share, tiles, eps, D, STRIDE_BN, STRIDE_BD, STRIDE_AN, STRIDE_AD, NORMALIZE, WANT_B,
                WANT_DSCALE, EXACT, WIDTH, HELD, SLOTS, NUM_D, BLOCK_N, BLOCK_D,
            )  # fmt: skip
    if WANT_DSCALE:
        at = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
        tl.store(along_ptr + at, 0.5 * tl.sum(tl.where(ok, along_all, 0.0), 0))
