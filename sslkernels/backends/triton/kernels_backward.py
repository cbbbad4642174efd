# SPDX-License-Identifier: Apache-2.0
"""Backward tile kernels: fused, or by panels of G.

The rules every kernel keeps are in ``tiles.py``; which tiles a program visits, and which pairs of them
count, in ``pairs.py``.
"""

import triton
import triton.language as tl

from .pairs import any_wide, first_multiple, real_branch, share_of_line, slots_of, span_of
from .tiles import (
    CALM_CENTER,
    CALM_SPREAD,
    EXCLUDE_IDS,
    EXCLUDE_PERIOD,
    HALF_LIFT,
    KIND_LSE,
    LOG2_E,
    SPAN,
    dot_chunks,
    dot_coming,
    dot_streamed,
    exp,
    finite_or_zero,
    kernel,
    load_block,
    load_chunk,
    sigmoid2,
    store_chunk,
    tile_dot,
    tree_sum,
    wait_turn,
)

# dx_i = scale * sum_j G_ij y_j with S recomputed and
#
#   lse:       G_ij = drow_i exp(S_ij - row_i) + dcol_j exp(S_ij - col_j)
#   softplus:  G_ij = (drow_i + dcol_j) sigmoid(S_ij)
#
# In self mode col = row and dcol = drow, and because S is symmetric this is G + G^T: the whole
# gradient for one recomputed tile and one product, 4 N^2 D FLOPs.
#
# Where both sides have a gradient and their log-sum-exps lie close to one c, one exponential is enough:
# G_ij = exp(S_ij - c) (a_i + b_j) with the weights a_i = drow_i exp(c - row_i), which ``weigh_kernel``
# computes once a row.  It also says for which blocks of rows that holds; other tiles take two.
#
# Two ways to the same sums.  *Fused*: one program keeps dx of its rows, [BLOCK_N, D] float32, on chip
# and G never leaves it.  Where that block would not fit (large D) the tile has to become so narrow
# that reading y bounds the kernel, so *panels* waste less: one kernel writes G for as many rows as
# the memory bound allows, a second multiplies it with y as an ordinary tiled product.


@triton.jit
def _largest(ptr, count, BLOCK: tl.constexpr):
    """The largest finite magnitude."""
    peak = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, count, BLOCK):
        index = start + tl.arange(0, BLOCK)
        size = tl.abs(tl.load(ptr + index, mask=index < count, other=0.0))
        peak = tl.maximum(peak, tl.where(size < float("inf"), size, 0.0))
    return tl.max(peak, 0)


@kernel
def lift_kernel(
    lift_ptr,  # [1]
    drow_ptr,  # [N]
    dcol_ptr,  # [M]
    N,
    M,
    BLOCK: tl.constexpr,
):
    """The power of two that brings the largest finite gradient into [1/2, 1); 1 if all are 0."""
    wait_turn()
    peak = tl.maximum(_largest(drow_ptr, N, BLOCK), _largest(dcol_ptr, M, BLOCK))
    exponent = (peak.to(tl.int32, bitcast=True) >> 23) - 126
    exponent = tl.minimum(tl.maximum(tl.where(peak == 0.0, 0, exponent), -100), 100)
    tl.store(lift_ptr, ((127 - exponent) << 23).to(tl.float32, bitcast=True))


@triton.jit
def center_of(center_ptr):
    """c: one log-sum-exp for all of them; not below -60, so that exp(0 - c) is finite for zero rows."""
    return tl.maximum(finite_or_zero(tl.load(center_ptr)), -60.0)


@kernel
def weigh_kernel(
    weight_ptr,  # [whole] float32
    calm_ptr,  # [whole / SPAN] int32
    lse_ptr,  # [count]
    grad_ptr,  # [count]
    center_ptr,  # its first element is c
    lift_ptr,  # [1] power of two, only with HAS_LIFT
    count,
    whole,  # count filled up to whole blocks; what is behind count gets 0
    HAS_LIFT: tl.constexpr,
    SPANS: tl.constexpr,
):
    """Weights of G for rows or columns, grad exp(c - lse), and where one c may stand for all of them."""
    wait_turn()
    span = tl.program_id(0) * SPANS + tl.arange(0, SPANS)
    index = span[:, None] * SPAN + tl.arange(0, SPAN)[None, :]
    ok = index < count
    weight = tl.load(grad_ptr + index, mask=ok, other=0.0)
    if HAS_LIFT:
        weight = weight * (tl.load(lift_ptr) * HALF_LIFT)
    lse = tl.load(lse_ptr + index, mask=ok, other=float("inf"))
    nothing = tl.abs(lse) == float("inf")
    center = center_of(center_ptr)
    away = tl.where(nothing, 0.0, lse - center)
    # A NaN is not calm: it must reach what depends on it by the exact way.
    spread = tl.where(tl.abs(center) <= CALM_CENTER, CALM_SPREAD, -1.0)
    calm = tl.min((tl.abs(away) <= spread).to(tl.int32), 1)
    tl.store(calm_ptr + span, calm, mask=span * SPAN < whole)
    tl.store(weight_ptr + index, tl.where(nothing, 0.0, weight * exp(-away)), mask=index < whole)


@triton.jit
def _side(
    lse_ptr, grad_ptr, weight_ptr, lift, index,
    KIND: tl.constexpr, WEIGHED: tl.constexpr,
):  # fmt: skip
    """(log-sum-exp, weight) of rows or columns; with WEIGHED c stands for every log-sum-exp."""
    if WEIGHED:
        weight = tl.load(weight_ptr + index)
        return weight, weight
    weight = tl.load(grad_ptr + index) * lift
    lse = weight
    if KIND == KIND_LSE:
        lse = tl.load(lse_ptr + index)
        # Nothing allowed: exp(S - inf) = 0, where exp(S + inf) would be inf.
        lse = tl.where(lse == float("-inf"), float("inf"), lse)
    return lse, weight


@triton.jit
def _is_calm(calm_ptr, first, last):
    """Whether every span of rows [first, last) may be weighed."""
    end = tl.cdiv(last, SPAN)
    calm = 1
    for start in range(first // SPAN, end, 256):
        index = start + tl.arange(0, 256)
        calm = calm & tl.min(tl.load(calm_ptr + index, mask=index < end, other=1), 0)
    return calm


@triton.jit
def _gradient_tile(
    s, scale_ptr, bias_ptr, lift, weight_x, row, calm, weight_y, row_ptr, drow_ptr, col_ptr, dcol_ptr,
    low_x, high_x, wide, short_x_ptr, short_y_ptr, span_y_ptr, ids_x_ptr, ids_y_ptr, x_start,
    y_start, low, multiple, M, period,
    KIND: tl.constexpr, HAS_ROW: tl.constexpr, HAS_COL: tl.constexpr, HAS_BIAS: tl.constexpr,
    EXCLUDE: tl.constexpr, HAS_LIFT: tl.constexpr, WANT_DBIAS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """G of one tile [rows, cols] from products s; pairs that are left out are 0.

    Columns from M on only have to be finite: they are multiplied with rows of zeros.  What only some tiles
    need is loaded where they need it: it would cost registers in all of them.
    """
    scale = tl.load(scale_ptr)
    k = scale * LOG2_E
    # Where a row or column has its own log-sum-exp the difference is taken before the change of base:
    # logits of 1e4 lose nothing to it.
    if KIND == KIND_LSE:
        if HAS_ROW and HAS_COL:
            if calm != 0:
                g = tl.exp2(s * k - row) * (weight_x[:, None] + weight_y[None, :])
            else:
                rows = x_start + tl.arange(0, BLOCK_N)
                cols = y_start + tl.arange(0, BLOCK_M)
                lse, drow = _side(row_ptr, drow_ptr, drow_ptr, lift, rows, KIND, False)
                s = s * scale
                g = exp(s - lse[:, None]) * drow[:, None]
                col, dcol = _side(col_ptr, dcol_ptr, dcol_ptr, lift, cols, KIND, False)
                g += exp(s - col[None, :]) * dcol[None, :]
                g = tl.where((cols < M)[None, :], g, 0.0)
        elif HAS_ROW:
            g = exp(s * scale - row[:, None]) * weight_x[:, None]
        else:
            cols = y_start + tl.arange(0, BLOCK_M)
            col, dcol = _side(col_ptr, dcol_ptr, dcol_ptr, lift, cols, KIND, False)
            g = exp(s * scale - col[None, :]) * dcol[None, :]
    else:
        bias = 0.0
        if HAS_BIAS:
            bias = tl.load(bias_ptr) * LOG2_E
        g = sigmoid2(s * k + bias)
        if HAS_ROW and HAS_COL:
            g = g * (weight_x[:, None] + weight_y[None, :])
        elif HAS_ROW:
            g = g * weight_x[:, None]
        else:
            g = g * weight_y[None, :]
    # Products with the zero rows from M on vanish by themselves, unless G may be too large for its dtype;
    # the sum of G does not.
    if HAS_LIFT or WANT_DBIAS or (KIND == KIND_LSE and not HAS_COL):
        if y_start + BLOCK_M > M:
            real_branch(scale_ptr)
            cols = y_start + tl.arange(0, BLOCK_M)
            g = tl.where((cols < M)[None, :], g, 0.0)
    # Last of all, so that such a pair has G = 0 whatever exp made of it.
    if EXCLUDE % 2 == 1:
        if multiple < low + (BLOCK_M + BLOCK_N - 1):
            rows = x_start + tl.arange(0, BLOCK_N)
            cols = y_start + tl.arange(0, BLOCK_M)
            if EXCLUDE == EXCLUDE_PERIOD:
                g = tl.where(cols[None, :] - rows[:, None] != multiple, g, 0.0)
            else:
                g = tl.where((cols % period)[None, :] != (rows % period)[:, None], g, 0.0)
    if EXCLUDE == EXCLUDE_IDS:
        low_y, high_y = span_of(span_y_ptr, y_start, BLOCK_M)
        if (low_y <= high_x) & (high_y >= low_x) & (wide == 0):
            short_x = tl.load(short_x_ptr + x_start + tl.arange(0, BLOCK_N))
            short_y = tl.load(short_y_ptr + y_start + tl.arange(0, BLOCK_M))
            g = tl.where(short_x[:, None] != short_y[None, :], g, 0.0)
    if EXCLUDE == EXCLUDE_IDS:
        if wide != 0:
            ids_x = tl.load(ids_x_ptr + x_start + tl.arange(0, BLOCK_N))
            ids_y = tl.load(ids_y_ptr + y_start + tl.arange(0, BLOCK_M))
            g = tl.where(ids_x[:, None] != ids_y[None, :], g, 0.0)
    return g


@triton.jit
def _held(
    weight_x_ptr, calm_x_ptr, calm_y_ptr, row_ptr, drow_ptr, center_ptr, span_x_ptr, wide_ptr,
    wide_count, lift, x_start, y_first, y_last, N,
    KIND: tl.constexpr, HAS_ROW: tl.constexpr, HAS_COL: tl.constexpr, EXCLUDE: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """What tiles need to know of their rows: (lse or c, weight, calm, lowest id, highest id, wide)."""
    WEIGHED: tl.constexpr = KIND == KIND_LSE and HAS_ROW and HAS_COL
    # Stand-ins for what the flags leave out; no operation reads them.
    row, weight, calm, low, high, wide = lift, lift, 0, 0, 0, 0
    rows = x_start + tl.arange(0, BLOCK_N)
    if HAS_ROW:
        row, weight = _side(row_ptr, drow_ptr, weight_x_ptr, lift, rows, KIND, WEIGHED)
    if WEIGHED:
        row = center_of(center_ptr) * LOG2_E
        calm = _is_calm(calm_x_ptr, x_start, tl.minimum(x_start + BLOCK_N, N))
        calm = calm & _is_calm(calm_y_ptr, y_first, y_last)
    if EXCLUDE == EXCLUDE_IDS:
        low, high = span_of(span_x_ptr, x_start, BLOCK_N)
        wide = any_wide(wide_ptr, wide_count)
    return row, weight, calm, low, high, wide


@triton.jit
def _swept_weight(
    weight_y_ptr, dcol_ptr, lift, y_start,
    KIND: tl.constexpr, HAS_ROW: tl.constexpr, HAS_COL: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Weights of the columns of a tile, or a stand-in where it has none."""
    cols = y_start + tl.arange(0, BLOCK_M)
    weight = lift
    if HAS_COL:
        if KIND != KIND_LSE:
            weight = tl.load(dcol_ptr + cols) * lift
        elif HAS_ROW:
            weight = tl.load(weight_y_ptr + cols)
    return weight


@kernel
def backward_kernel(
    dx_ptr,  # [slots, N, D] float32
    dbias_ptr,  # [programs] float32
    x_ptr,  # [N, D]
    y_ptr,  # [M, D]
    scale_ptr,  # 0-d
    bias_ptr,  # 0-d
    factor_ptr,  # one number that dx is multiplied with
    center_ptr,  # its first element is c; only where both sides have a gradient
    lift_ptr,  # [1] power of two that brings max |drow|, |dcol| near 1; only with HAS_LIFT
    weight_x_ptr,  # [N] float32, see weigh_kernel
    weight_y_ptr,  # [M]
    calm_x_ptr,  # [spans of N] int32
    calm_y_ptr,  # [spans of M]
    row_ptr,  # [N] lse of the rows
    drow_ptr,  # [N]
    col_ptr,  # [M] lse of the columns
    dcol_ptr,  # [M]
    ids_x_ptr,  # [N] int64
    ids_y_ptr,  # [M] int64
    short_x_ptr,  # [N] int32
    short_y_ptr,  # [M] int32
    span_x_ptr,  # [spans of N, 2] int32
    span_y_ptr,  # [spans of M, 2] int32
    wide_ptr,  # [wide_count] int32
    N,
    M,
    period,
    wide_count,
    share,  # tiles of a program
    total,  # int64: tiles of the launch
    KIND: tl.constexpr,
    HAS_ROW: tl.constexpr,
    HAS_COL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EXCLUDE: tl.constexpr,
    HAS_LIFT: tl.constexpr,  # float16: G is rounded to float16 for the product and would underflow
    WANT_DBIAS: tl.constexpr,
    STRIDE_X: tl.constexpr,
    STRIDE_Y: tl.constexpr,
    D: tl.constexpr,
    PRECISION: tl.constexpr,
    NUM_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The fused way: dx of BLOCK_N rows stays on chip while the program sweeps y."""
    wait_turn()
    tiles = tl.cdiv(M, BLOCK_M)
    first, lo, left, last, slot = share_of_line(share, tiles, total)
    lift = 1.0
    if HAS_LIFT:
        lift = tl.load(lift_ptr) * HALF_LIFT
    dbias = 0.0
    # Of this loop only where ids are compared (float16 spilled 56 bytes): else the tiles take longer.
    for block in tl.range(first, last + 1, disable_licm=D > 256 and EXCLUDE == EXCLUDE_IDS):
        hi = tl.minimum(lo + left, tiles)
        x_start = block * BLOCK_N
        row, weight_x, calm, low_x, high_x, wide = _held(
            weight_x_ptr, calm_x_ptr, calm_y_ptr, row_ptr, drow_ptr, center_ptr, span_x_ptr, wide_ptr,
            wide_count, lift, x_start, lo * BLOCK_M, tl.minimum(hi * BLOCK_M, M), N, KIND, HAS_ROW, HAS_COL,
            EXCLUDE, BLOCK_N,
        )  # fmt: skip
        xs = load_block(x_ptr, x_start, BLOCK_N, STRIDE_X, D, BLOCK_D, NUM_D)
        accs = ()
        for _ in tl.static_range(NUM_D):
            accs = accs + (tl.zeros((BLOCK_N, BLOCK_D), tl.float32),)
        g_sum = tl.zeros((BLOCK_N,), tl.float32)
        low = lo * BLOCK_M - (block + 1) * BLOCK_N + 1
        multiple = low
        if EXCLUDE % 2 == 1:
            multiple = first_multiple(low, period)
        for tile in tl.range(lo, hi, disable_licm=D > 256):
            y_start = tile * BLOCK_M
            ys = load_block(y_ptr, y_start, BLOCK_M, STRIDE_Y, D, BLOCK_D, NUM_D)
            weight_y = _swept_weight(
                weight_y_ptr, dcol_ptr, lift, y_start, KIND, HAS_ROW, HAS_COL, BLOCK_M
            )
            g = _gradient_tile(
                dot_chunks(xs, ys, NUM_D, PRECISION), scale_ptr, bias_ptr, lift, weight_x, row,
                calm, weight_y, row_ptr, drow_ptr, col_ptr, dcol_ptr, low_x, high_x, wide,
                short_x_ptr, short_y_ptr, span_y_ptr, ids_x_ptr, ids_y_ptr, x_start, y_start, low,
                multiple, M, period, KIND, HAS_ROW, HAS_COL, HAS_BIAS, EXCLUDE, HAS_LIFT, WANT_DBIAS, BLOCK_N,
                BLOCK_M,
            )  # fmt: skip
            if WANT_DBIAS:
                g_sum += tl.sum(g, 1)
            g = g.to(x_ptr.dtype.element_ty)
            sums = ()
            for c in tl.static_range(NUM_D):
                sums = sums + (tile_dot(g, ys[c], accs[c], PRECISION),)
            accs = sums
            low += BLOCK_M
            if EXCLUDE % 2 == 1:
                multiple = tl.where(multiple < low, multiple + period, multiple)

        row_ok = x_start + tl.arange(0, BLOCK_N) < N
        factor = tl.load(factor_ptr) / lift  # a power of two: exact
        first_row = slot.to(tl.int64) * N + x_start
        for c in tl.static_range(NUM_D):
            store_chunk(dx_ptr, first_row, c, accs[c] * factor, row_ok, D, BLOCK_D)
        if WANT_DBIAS:
            dbias += tl.sum(tl.where(row_ok, g_sum, 0.0), 0) / lift
        left -= hi - lo
        lo = lo * 0
        slot = slot * 0
    if WANT_DBIAS:
        tl.store(dbias_ptr + tl.program_id(0), dbias)


@kernel
def gather_kernel(
    dx_ptr,  # [N, D] float32
    parts_ptr,  # [slots, N, D] float32
    N,
    share,
    tiles,
    feature_blocks,
    D: tl.constexpr,
    HELD: tl.constexpr,  # rows of a held block
    FEATURES: tl.constexpr,  # and its features
    SLOTS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Add up what the programs that shared a block left, in a fixed tree."""
    wait_turn()
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    features = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    ok = (rows < N)[:, None] & (features < D)[None, :]
    # A program works on one held block.
    block = (tl.program_id(0) * BLOCK_N) // HELD * feature_blocks
    block += (tl.program_id(1) * BLOCK_D) // FEATURES
    used = slots_of(block.to(tl.int64) * tiles, tiles, share)
    at = rows.to(tl.int64)[:, None] * D + features[None, :]
    total = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for base in range(0, used, SLOTS):
        parts = ()
        for i in tl.static_range(SLOTS):
            part = parts_ptr + tl.cast(base + i, tl.int64) * N * D
            parts = parts + (tl.load(part + at, mask=ok & (base + i < used), other=0.0),)
        total += tree_sum(parts, SLOTS)
    tl.store(dx_ptr + at, total, mask=ok)


@triton.jit
def _row_length(stride):
    """That of G, in whole 128: a launch does not say so, and of an argument ``multiple_of`` is lost."""
    return tl.multiple_of(stride.to(tl.int64), 128)


@kernel
def panel_kernel(
    g_ptr,  # [rows of the panel, stride_gn] in the operand dtype
    dbias_ptr,  # [programs] float32
    x_ptr,  # [N, D]
    y_ptr,  # [M, D]
    scale_ptr,  # 0-d
    bias_ptr,  # 0-d
    center_ptr,  # its first element is c
    lift_ptr,  # [1]
    weight_x_ptr,  # [N]
    weight_y_ptr,  # [M]
    calm_x_ptr,  # [spans of N] int32
    calm_y_ptr,  # [spans of M] int32
    row_ptr,  # [N]
    drow_ptr,  # [N]
    col_ptr,  # [M]
    dcol_ptr,  # [M]
    ids_x_ptr,  # [N] int64
    ids_y_ptr,  # [M] int64
    short_x_ptr,  # [N] int32
    short_y_ptr,  # [M] int32
    span_x_ptr,  # [spans of N, 2] int32
    span_y_ptr,  # [spans of M, 2] int32
    wide_ptr,  # [wide_count] int32
    N,
    M,
    period,
    wide_count,
    chunks,
    share,  # tiles of a program
    first_block,  # the first row block of the panel
    row_blocks,  # of the panel
    stride_gn,  # M filled up to whole blocks
    KIND: tl.constexpr,
    HAS_ROW: tl.constexpr,
    HAS_COL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EXCLUDE: tl.constexpr,
    HAS_LIFT: tl.constexpr,
    WANT_DBIAS: tl.constexpr,
    SYMMETRIC: tl.constexpr,  # one panel holds all of G = G^T: compute one triangle, write both
    STRIDE_X: tl.constexpr,
    STRIDE_Y: tl.constexpr,
    D: tl.constexpr,
    HOLD_X: tl.constexpr,
    PREFETCH: tl.constexpr,
    PRECISION: tl.constexpr,
    NUM_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The panel way, first half: tiles of G of one held block, written in the operand dtype.

    Row blocks vary fastest: the programs of one wave share a few tiles of y.
    """
    wait_turn()
    RATIO: tl.constexpr = BLOCK_N // BLOCK_M
    tiles = tl.cdiv(M, BLOCK_M)
    block = tl.program_id(0) % row_blocks
    lo = tl.program_id(0) // row_blocks * share
    if SYMMETRIC:  # nearly half of the programs find nothing to do
        lo += block * RATIO
    if lo >= tiles:
        if WANT_DBIAS:
            tl.store(dbias_ptr + tl.program_id(0), 0.0)
        return
    hi = tl.minimum(lo + share, tiles)
    held = first_block + block
    x_start = held * BLOCK_N
    rows = x_start + tl.arange(0, BLOCK_N)
    row_ok = rows < N
    panel_rows = (block * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    length = _row_length(stride_gn)
    lift = 1.0
    if HAS_LIFT:
        lift = tl.load(lift_ptr) * HALF_LIFT
    row, weight_x, calm, low_x, high_x, wide = _held(
        weight_x_ptr, calm_x_ptr, calm_y_ptr, row_ptr, drow_ptr, center_ptr, span_x_ptr, wide_ptr,
        wide_count, lift, x_start, lo * BLOCK_M, tl.minimum(hi * BLOCK_M, M), N, KIND, HAS_ROW, HAS_COL,
        EXCLUDE, BLOCK_N,
    )  # fmt: skip
    if HOLD_X:
        xs = load_block(x_ptr, x_start, BLOCK_N, STRIDE_X, D, BLOCK_D, NUM_D)
        coming = load_block(y_ptr, lo * BLOCK_M, BLOCK_M, STRIDE_Y, D, BLOCK_D, PREFETCH)
    dbias = 0.0
    for tile in tl.range(lo, hi, disable_licm=True):
        y_start = tile * BLOCK_M
        cols = y_start + tl.arange(0, BLOCK_M)
        low = y_start - x_start - BLOCK_N + 1
        multiple = low
        if EXCLUDE % 2 == 1:
            multiple = first_multiple(low, period)
        weight_y = _swept_weight(
            weight_y_ptr, dcol_ptr, lift, y_start, KIND, HAS_ROW, HAS_COL, BLOCK_M
        )
        if HOLD_X:
            y_next = tl.minimum(tile + 1, hi - 1) * BLOCK_M
            s, coming = dot_coming(
                xs, coming, y_ptr, y_start, y_next, False, BLOCK_M, STRIDE_Y, D, PREFETCH, NUM_D, BLOCK_D,
                PRECISION,
            )  # fmt: skip
        else:
            s = dot_streamed(
                x_ptr, y_ptr, x_start, y_start, chunks, BLOCK_N, BLOCK_M, STRIDE_X, STRIDE_Y, D,
                BLOCK_D, PRECISION,
            )  # fmt: skip
        g = _gradient_tile(
            s, scale_ptr, bias_ptr, lift, weight_x, row, calm, weight_y, row_ptr, drow_ptr,
            col_ptr, dcol_ptr, low_x, high_x, wide, short_x_ptr, short_y_ptr, span_y_ptr, ids_x_ptr,
            ids_y_ptr, x_start, y_start, low, multiple, M, period, KIND, HAS_ROW, HAS_COL, HAS_BIAS,
            EXCLUDE, HAS_LIFT, WANT_DBIAS, BLOCK_N, BLOCK_M,
        )  # fmt: skip
        twice = tile * BLOCK_M >= (held + 1) * BLOCK_N
        if WANT_DBIAS:
            part = tl.sum(tl.sum(tl.where(row_ok[:, None], g, 0.0), 1), 0)
            if SYMMETRIC:
                part = tl.where(twice, 2.0 * part, part)
            dbias += part
        g = g.to(g_ptr.dtype.element_ty)
        tl.store(g_ptr + panel_rows[:, None] * length + cols[None, :], g, mask=row_ok[:, None])
        if SYMMETRIC:
            if twice:
                mirror = g_ptr + cols.to(tl.int64)[:, None] * length + rows[None, :]
                tl.store(mirror, tl.trans(g), mask=(cols < M)[:, None] & row_ok[None, :])
    if WANT_DBIAS:
        tl.store(dbias_ptr + tl.program_id(0), dbias / lift)


@kernel
def product_kernel(
    dx_ptr,  # [slots, N, D] float32
    g_ptr,  # [N, stride_gn], as ``panel_kernel`` wrote it
    y_ptr,  # [M, D]
    factor_ptr,  # one number
    lift_ptr,  # [1]
    N,
    M,
    share,  # tiles of a program
    total,  # int64: tiles of the launch
    feature_blocks,
    stride_gn,
    HAS_LIFT: tl.constexpr,
    STRIDE_Y: tl.constexpr,
    D: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,  # the summed side
    BLOCK_D: tl.constexpr,
):
    """The panel way, second half: dx = factor * G y, [BLOCK_N, BLOCK_D] blocks.

    Feature blocks vary fastest along the line of tiles, so that neighbours share rows of G.
    """
    wait_turn()
    tiles = tl.cdiv(M, BLOCK_M)
    length = _row_length(stride_gn)
    first, lo, left, last, slot = share_of_line(share, tiles, total)
    factor = tl.load(factor_ptr)
    if HAS_LIFT:
        factor = factor / (tl.load(lift_ptr) * HALF_LIFT)  # a power of two: exact
    for part in range(first, last + 1):
        hi = tl.minimum(lo + left, tiles)
        block = part // feature_blocks
        feature = part % feature_blocks
        x_start = block * BLOCK_N
        rows = x_start + tl.arange(0, BLOCK_N)
        row_ok = rows < N
        panel_rows = tl.minimum(rows, N - 1).to(tl.int64)
        acc = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
        for tile in range(lo, hi):
            cols = tile * BLOCK_M + tl.arange(0, BLOCK_M)
            g = tl.load(g_ptr + panel_rows[:, None] * length + cols[None, :])
            y = load_chunk(y_ptr, tile * BLOCK_M, feature, BLOCK_M, STRIDE_Y, D, BLOCK_D)
            acc = tile_dot(g, y, acc, PRECISION)
        first_row = slot.to(tl.int64) * N + x_start
        store_chunk(dx_ptr, first_row, feature, acc * factor, row_ok, D, BLOCK_D)
        left -= hi - lo
        lo = lo * 0
        slot = slot * 0
