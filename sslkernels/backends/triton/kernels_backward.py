# SPDX-License-Identifier: Apache-2.0
"""Backward tile kernels: fused, or by panels of G.

The rules every kernel keeps are in ``tiles.py``.
"""

import triton
import triton.language as tl

from .tiles import (
    CALM_SPREAD,
    HALF_LIFT,
    KIND_LSE,
    aligned,
    dot_chunks,
    dot_streamed,
    exp,
    id_range,
    ids_may_meet,
    load_chunks,
    load_ids,
    sigmoid,
    tile_dot,
    tile_range,
)

# dx_i = scale * sum_j G_ij y_j with S recomputed and
#
#   lse:       G_ij = drow_i exp(S_ij - row_i) + dcol_j exp(S_ij - col_j)
#   softplus:  G_ij = (drow_i + dcol_j) sigmoid(S_ij)
#
# In self mode col = row and dcol = drow, and because S is symmetric this is G + G^T: the whole
# gradient for one recomputed tile and one product, 4 N^2 D FLOPs.
#
# Two ways to the same sums.  *Fused*: one program keeps dx of its rows, [BLOCK_N, D] float32, on chip
# and G never leaves it.  Where that block would not fit (large D) the tile has to become so narrow
# that reading y bounds the kernel, so *panels* waste less: one kernel writes G for as many rows as
# the memory bound allows, a second multiplies it with y as an ordinary tiled product.


@triton.jit
def _load_side(lse_ptr, grad_ptr, index, ok, lift, KIND: tl.constexpr):
    """(lse, lifted gradient) of rows or columns; neutral where not ok."""
    grad = tl.load(grad_ptr + index, mask=ok, other=0.0) * lift
    lse = grad
    if KIND == KIND_LSE:
        lse = tl.load(lse_ptr + index, mask=ok, other=float("inf"))
        # Nothing allowed: exp(S - inf) = 0, where exp(S + inf) would be inf.
        lse = tl.where(lse == float("-inf"), float("inf"), lse)
    return lse, grad


@triton.jit
def _lse_range(lse):
    """Smallest and largest log-sum-exp of a block, where +inf stands for "nothing allowed"."""
    return tl.min(lse, 0), tl.max(tl.where(lse == float("inf"), float("-inf"), lse), 0)


@triton.jit
def _gradient_tile(
    s, row, drow, col, dcol, row_low, row_high, ids_x, ids_y_ptr, cols, M, edge,
    KIND: tl.constexpr, HAS_ROW: tl.constexpr, HAS_COL: tl.constexpr, HAS_IDS: tl.constexpr,
):  # fmt: skip
    """G of one tile; excluded and padded pairs are 0.

    Where the log-sum-exps of rows and columns lie close together one exponential is enough:
    drow_i exp(S - row_i) + dcol_j exp(S - col_j) = exp(S - c) (a_i + b_j) with a_i = drow_i exp(c - row_i).
    """
    if KIND == KIND_LSE:
        if HAS_ROW and HAS_COL:
            col_low, col_high = _lse_range(col)
            low = tl.minimum(row_low, col_low)
            high = tl.maximum(row_high, col_high)
            # low = inf: nothing allowed anywhere, and inf - inf would be NaN below.
            if (high - low <= CALM_SPREAD) & (low < float("inf")):
                middle = 0.5 * (low + high)
                a = drow * exp(middle - row)
                b = dcol * exp(middle - col)
                g = exp(s - middle) * (a[:, None] + b[None, :])
            else:
                g = drow[:, None] * exp(s - row[:, None]) + dcol[None, :] * exp(s - col[None, :])
        elif HAS_ROW:
            g = drow[:, None] * exp(s - row[:, None])
        else:
            g = dcol[None, :] * exp(s - col[None, :])
    else:
        g = sigmoid(s)
        if HAS_ROW and HAS_COL:
            g = (drow[:, None] + dcol[None, :]) * g
        elif HAS_ROW:
            g = drow[:, None] * g
        else:
            g = dcol[None, :] * g
    # Last of all, so that such a pair has G = 0 whatever exp made of it.
    if edge:
        if HAS_IDS:
            ids_y = load_ids(ids_y_ptr, cols, M)
            g = tl.where(ids_x[:, None] == ids_y[None, :], 0.0, g)
        g = tl.where((cols < M)[None, :], g, 0.0)
    return g


@triton.jit
def backward_kernel(
    dx_ptr,  # [SPLITS, N, D] float32
    dbias_ptr,  # [SPLITS, row blocks] float32
    x_ptr,  # [N, D]
    y_ptr,  # [M, D]
    scale_ptr,  # 0-d
    bias_ptr,  # 0-d
    lift_ptr,  # 0-d: power of two that brings max |drow|, |dcol| near 1; only with HAS_LIFT
    ids_x_ptr,  # [N] int64
    ids_y_ptr,  # [M] int64
    row_ptr,  # [N] lse of the rows
    drow_ptr,  # [N]
    col_ptr,  # [M] lse of the columns
    dcol_ptr,  # [M]
    N,
    M,
    D,
    tiles_per_split,
    stride_xn,
    stride_xd,
    stride_yn,
    stride_yd,
    KIND: tl.constexpr,
    HAS_ROW: tl.constexpr,
    HAS_COL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_IDS: tl.constexpr,
    HAS_LIFT: tl.constexpr,  # float16: G is rounded to float16 for the product and would underflow
    WANT_DBIAS: tl.constexpr,
    EVEN_D: tl.constexpr,
    ALIGN: tl.constexpr,  # divides D and the row strides
    PRECISION: tl.constexpr,
    NUM_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The fused way: dx of BLOCK_N rows stays on chip while the program sweeps y."""
    D = aligned(D, ALIGN)
    stride_xn = aligned(stride_xn, ALIGN)
    stride_yn = aligned(stride_yn, ALIGN)
    row_start = tl.program_id(0) * BLOCK_N
    rows = row_start + tl.arange(0, BLOCK_N)
    row_ok = rows < N
    scale = tl.load(scale_ptr)
    if HAS_BIAS:
        bias = tl.load(bias_ptr)
    lift = 1.0
    if HAS_LIFT:
        lift = tl.load(lift_ptr)
    # Stand-ins for what the flags leave out; no operation reads them.
    ids_x = rows
    row = scale
    drow = scale
    row_low = scale
    row_high = scale
    if HAS_IDS:
        ids_x = load_ids(ids_x_ptr, rows, N)
        id_low, id_high = id_range(ids_x)
    if HAS_ROW:
        row, drow = _load_side(row_ptr, drow_ptr, rows, row_ok, lift, KIND)
        if KIND == KIND_LSE and HAS_COL:
            row_low, row_high = _lse_range(row)
    xs = load_chunks(x_ptr, rows, row_ok, stride_xn, stride_xd, D, BLOCK_D, NUM_D, EVEN_D)

    accs = ()
    for _ in tl.static_range(NUM_D):
        accs = accs + (tl.zeros((BLOCK_N, BLOCK_D), tl.float32),)
    g_sum = tl.zeros((BLOCK_N,), tl.float32)
    lo, hi = tile_range(row_start, tl.cdiv(M, BLOCK_M), tiles_per_split, BLOCK_M, False)
    for tile in range(lo, hi):
        cols = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        col_ok = cols < M
        ys = load_chunks(y_ptr, cols, col_ok, stride_yn, stride_yd, D, BLOCK_D, NUM_D, EVEN_D)
        s = dot_chunks(xs, ys, NUM_D, PRECISION) * scale
        if HAS_BIAS:
            s += bias
        col = scale
        dcol = scale
        if HAS_COL:
            col, dcol = _load_side(col_ptr, dcol_ptr, cols, col_ok, lift, KIND)
        edge = (tile + 1) * BLOCK_M > M
        if HAS_IDS:
            edge = edge | ids_may_meet(id_low, id_high, load_ids(ids_y_ptr, cols, M))
        g = _gradient_tile(
            s, row, drow, col, dcol, row_low, row_high, ids_x, ids_y_ptr, cols, M, edge,
            KIND, HAS_ROW, HAS_COL, HAS_IDS,
        )  # fmt: skip
        if WANT_DBIAS:
            g_sum += tl.sum(g, 1)
        if HAS_LIFT:
            g = g * HALF_LIFT
        g = g.to(x_ptr.dtype.element_ty)
        sums = ()
        for c in tl.static_range(NUM_D):
            sums = sums + (tile_dot(g, ys[c], accs[c], PRECISION),)
        accs = sums

    factor = scale
    if HAS_LIFT:
        factor = scale / (lift * HALF_LIFT)  # a power of two: exact
    slot = (tl.program_id(1).to(tl.int64) * N + rows) * D
    for c in tl.static_range(NUM_D):
        features = c * BLOCK_D + tl.arange(0, BLOCK_D)
        mask = row_ok[:, None] & (features < D)[None, :]
        tl.store(dx_ptr + slot[:, None] + features[None, :], accs[c] * factor, mask=mask)
    if WANT_DBIAS:
        total = tl.sum(tl.where(row_ok, g_sum, 0.0), 0) / lift
        tl.store(dbias_ptr + tl.program_id(1) * tl.num_programs(0) + tl.program_id(0), total)


@triton.jit
def panel_kernel(
    g_ptr,  # [rows of the panel, stride_gn] in the operand dtype
    dbias_ptr,  # [programs] float32
    x_ptr,  # [N, D]
    y_ptr,  # [M, D]
    scale_ptr,  # 0-d
    bias_ptr,  # 0-d
    lift_ptr,  # 0-d
    ids_x_ptr,  # [N] int64
    ids_y_ptr,  # [M] int64
    row_ptr,  # [N]
    drow_ptr,  # [N]
    col_ptr,  # [M]
    dcol_ptr,  # [M]
    N,
    M,
    D,
    first_block,  # the first row block of the panel
    row_blocks,  # of the panel
    stride_gn,
    stride_xn,
    stride_xd,
    stride_yn,
    stride_yd,
    KIND: tl.constexpr,
    HAS_ROW: tl.constexpr,
    HAS_COL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_IDS: tl.constexpr,
    HAS_LIFT: tl.constexpr,
    WANT_DBIAS: tl.constexpr,
    EVEN_D: tl.constexpr,
    ALIGN: tl.constexpr,  # divides D and the row strides
    PRECISION: tl.constexpr,
    NUM_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The panel way, first half: one tile of G a program, written in the operand dtype.

    Row blocks vary fastest: the programs of one wave share a few tiles of y.  The columns between M and
    stride_gn are written too, with 0, so that every access to G is aligned whatever M is.
    """
    D = aligned(D, ALIGN)
    stride_xn = aligned(stride_xn, ALIGN)
    stride_yn = aligned(stride_yn, ALIGN)
    block = tl.program_id(0) % row_blocks
    tile = tl.program_id(0) // row_blocks
    row_start = (first_block + block) * BLOCK_N
    rows = row_start + tl.arange(0, BLOCK_N)
    row_ok = rows < N
    cols = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    col_ok = cols < M
    scale = tl.load(scale_ptr)
    s = dot_streamed(
        x_ptr, y_ptr, rows, row_ok, cols, col_ok, stride_xn, stride_xd, stride_yn, stride_yd, D,
        BLOCK_N, BLOCK_M, BLOCK_D, EVEN_D, PRECISION,
    ) * scale  # fmt: skip
    if HAS_BIAS:
        s += tl.load(bias_ptr)
    lift = 1.0
    if HAS_LIFT:
        lift = tl.load(lift_ptr)
    row = scale
    drow = scale
    col = scale
    dcol = scale
    row_low = scale
    row_high = scale
    ids_x = rows
    if HAS_ROW:
        row, drow = _load_side(row_ptr, drow_ptr, rows, row_ok, lift, KIND)
        if KIND == KIND_LSE and HAS_COL:
            row_low, row_high = _lse_range(row)
    if HAS_COL:
        col, dcol = _load_side(col_ptr, dcol_ptr, cols, col_ok, lift, KIND)
    edge = (tile + 1) * BLOCK_M > M
    if HAS_IDS:
        ids_x = load_ids(ids_x_ptr, rows, N)
        id_low, id_high = id_range(ids_x)
        edge = edge | ids_may_meet(id_low, id_high, load_ids(ids_y_ptr, cols, M))
    g = _gradient_tile(
        s, row, drow, col, dcol, row_low, row_high, ids_x, ids_y_ptr, cols, M, edge,
        KIND, HAS_ROW, HAS_COL, HAS_IDS,
    )  # fmt: skip
    if WANT_DBIAS:
        total = tl.sum(tl.sum(tl.where(row_ok[:, None], g, 0.0), 1), 0) / lift
        tl.store(dbias_ptr + tl.program_id(0), total)
    if HAS_LIFT:
        g = g * HALF_LIFT
    panel_rows = tl.cast(block, tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    ptrs = g_ptr + panel_rows[:, None] * stride_gn + cols[None, :]
    tl.store(ptrs, g.to(g_ptr.dtype.element_ty), mask=row_ok[:, None] & (cols < stride_gn)[None, :])


@triton.jit
def product_kernel(
    dx_ptr,  # [SPLITS, N, D] float32
    g_ptr,  # [N, stride_gn]
    y_ptr,  # [M, D]
    factor_ptr,  # 0-d
    lift_ptr,  # 0-d
    N,
    M,
    D,
    tiles_per_split,
    split_stride,  # words between two splits of dx
    stride_gn,
    stride_yn,
    stride_yd,
    HAS_LIFT: tl.constexpr,
    ALIGN: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,  # the summed side
    BLOCK_D: tl.constexpr,
):
    """The panel way, second half: dx = factor * G y, one [BLOCK_N, BLOCK_D] block a program.

    Program axes: feature blocks (fastest, so that neighbours share rows of G), row blocks, splits.
    """
    D = aligned(D, ALIGN)
    stride_yn = aligned(stride_yn, ALIGN)
    rows = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_ok = rows < N
    features = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    feature_ok = features < D
    acc = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    lo = tl.program_id(2) * tiles_per_split
    hi = tl.minimum(lo + tiles_per_split, tl.cdiv(M, BLOCK_M))
    for tile in range(lo, hi):
        cols = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        col_ok = cols < M
        # Both sides are masked: a 0 on one side does not undo a NaN on the other.  G is 0 from M on.
        g_mask = row_ok[:, None] & (cols < stride_gn)[None, :]
        g = tl.load(
            g_ptr + rows.to(tl.int64)[:, None] * stride_gn + cols[None, :], mask=g_mask, other=0.0
        )
        ptrs = (
            y_ptr
            + cols.to(tl.int64)[:, None] * stride_yn
            + features.to(tl.int64)[None, :] * stride_yd
        )
        y = tl.load(ptrs, mask=col_ok[:, None] & feature_ok[None, :], other=0.0)
        acc = tile_dot(g, y, acc, PRECISION)
    factor = tl.load(factor_ptr)
    if HAS_LIFT:
        factor = factor / (tl.load(lift_ptr) * HALF_LIFT)  # a power of two: exact
    slot = tl.program_id(2).to(tl.int64) * split_stride + rows.to(tl.int64) * D
    mask = row_ok[:, None] & feature_ok[None, :]
    tl.store(dx_ptr + slot[:, None] + features[None, :], acc * factor, mask=mask)
