# SPDX-License-Identifier: Apache-2.0
"""Tile kernels for losses whose two sides both need gradients: forward, combine, backward.

The rules every kernel keeps (64-bit rows, masks, base-2 state, slots instead of atomics) are in
``tiles.py``.
"""

import triton
import triton.language as tl

from .tiles import (
    HALF_LIFT,
    KIND_LSE,
    LN_2,
    dot_chunks,
    dot_streamed,
    exp,
    finite_or_zero,
    load_chunks,
    sigmoid,
    softplus,
    tile_dot,
    tile_range,
)

# ---- forward -------------------------------------------------------------------------------------


@triton.jit
def forward_kernel(
    row_m_ptr,  # [SPLITS, N] running maximum (kind lse)
    row_s_ptr,  # [SPLITS, N] running sum
    row_rank_ptr,  # [SPLITS, N] int32
    col_m_ptr,  # [G, M] one slot for each row block of this launch
    col_s_ptr,  # [G, M]
    col_rank_ptr,  # [G, M] int32
    x_ptr,  # [N, D]
    y_ptr,  # [M, D]
    scale_ptr,  # 0-d
    bias_ptr,  # 0-d
    ids_x_ptr,  # [N] int64
    ids_y_ptr,  # [M] int64
    threshold_row_ptr,  # [N]
    threshold_col_ptr,  # [M]
    N,
    M,
    D,
    tiles_per_split,
    first_block,  # index of the row block of program 0: launches go group by group
    stride_xn,
    stride_xd,
    stride_yn,
    stride_yd,
    KIND: tl.constexpr,
    TRIANGLE: tl.constexpr,  # x is y: visit j >= i and let (i, j), i < j, count for row j as well
    HAS_COL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_IDS: tl.constexpr,
    HAS_RANK_ROW: tl.constexpr,
    HAS_RANK_COL: tl.constexpr,
    EVEN_M: tl.constexpr,
    EVEN_D: tl.constexpr,
    HOLD_X: tl.constexpr,  # keep the block of x on chip; else stream both sides by chunks
    PRECISION: tl.constexpr,
    NUM_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Row (and column) reductions over the tiles: log-sum-exp or sum of softplus, and ranks."""
    row_start = (first_block + tl.program_id(0)) * BLOCK_N
    rows = row_start + tl.arange(0, BLOCK_N)
    row_ok = rows < N
    scale = tl.load(scale_ptr)
    if HAS_BIAS:
        bias = tl.load(bias_ptr)
    if HAS_IDS:
        ids_x = tl.load(ids_x_ptr + rows, mask=row_ok, other=0)
    if HAS_RANK_ROW:
        threshold_row = tl.load(threshold_row_ptr + rows, mask=row_ok, other=float("inf"))
    if HOLD_X:
        xs = load_chunks(x_ptr, rows, row_ok, stride_xn, stride_xd, D, BLOCK_D, NUM_D, EVEN_D)

    row_m = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    row_s = tl.zeros((BLOCK_N,), tl.float32)
    row_rank = tl.zeros((BLOCK_N,), tl.int32)
    lo, hi = tile_range(row_start, tl.cdiv(M, BLOCK_M), tiles_per_split, BLOCK_M, TRIANGLE)
    for tile in range(lo, hi):
        cols = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        col_ok = cols < M
        if HOLD_X:
            ys = load_chunks(y_ptr, cols, col_ok, stride_yn, stride_yd, D, BLOCK_D, NUM_D, EVEN_D)
            s = dot_chunks(xs, ys, NUM_D, PRECISION) * scale
        else:
            s = dot_streamed(
                x_ptr, y_ptr, rows, row_ok, cols, col_ok, stride_xn, stride_xd, stride_yn, stride_yd, D,
                BLOCK_N, BLOCK_M, BLOCK_D, NUM_D, EVEN_D, PRECISION,
            ) * scale  # fmt: skip
        if HAS_BIAS:
            s += bias
        # Excluded pairs become -inf, which is the neutral element of both kinds and below every
        # threshold: softplus(-inf) = 0.
        if HAS_IDS:
            ids_y = tl.load(ids_y_ptr + cols, mask=col_ok, other=0)
            s = tl.where(ids_x[:, None] == ids_y[None, :], float("-inf"), s)
        if not EVEN_M:
            s = tl.where(col_ok[None, :], s, float("-inf"))
        if TRIANGLE:
            s_row = tl.where(cols[None, :] >= rows[:, None], s, float("-inf"))
        else:
            s_row = s

        if KIND == KIND_LSE:
            m_new = tl.maximum(row_m, tl.max(s_row, 1))
            shift = finite_or_zero(m_new)
            p = exp(s_row - shift[:, None])
            row_s = row_s * exp(row_m - shift) + tl.sum(p, 1)
            row_m = m_new
        else:
            row_s += tl.sum(softplus(s_row), 1)
        if HAS_RANK_ROW:
            row_rank += tl.sum((s_row > threshold_row[:, None]).to(tl.int32), 1)

        if HAS_COL:
            slot = tl.program_id(0).to(tl.int64) * M
            if TRIANGLE:  # the diagonal was counted with the rows
                s_col = tl.where(
                    (cols[None, :] > rows[:, None]) & row_ok[:, None], s, float("-inf")
                )
            else:
                s_col = tl.where(row_ok[:, None], s, float("-inf"))
            if KIND == KIND_LSE:
                col_m = tl.max(s_col, 0)
                p = exp(s_col - finite_or_zero(col_m)[None, :])
                tl.store(col_m_ptr + slot + cols, col_m, mask=col_ok)
                tl.store(col_s_ptr + slot + cols, tl.sum(p, 0), mask=col_ok)
            else:
                tl.store(col_s_ptr + slot + cols, tl.sum(softplus(s_col), 0), mask=col_ok)
            if HAS_RANK_COL:
                threshold_col = tl.load(threshold_col_ptr + cols, mask=col_ok, other=float("inf"))
                above = (s_col > threshold_col[None, :]).to(tl.int32)
                tl.store(col_rank_ptr + slot + cols, tl.sum(above, 0), mask=col_ok)

    slot = tl.program_id(1).to(tl.int64) * N
    if KIND == KIND_LSE:
        tl.store(row_m_ptr + slot + rows, row_m, mask=row_ok)
    tl.store(row_s_ptr + slot + rows, row_s, mask=row_ok)
    if HAS_RANK_ROW:
        tl.store(row_rank_ptr + slot + rows, row_rank, mask=row_ok)


@triton.jit
def combine_kernel(
    out_ptr,  # [L]: lse or sum if FINAL, else unused
    rank_ptr,  # [L] int64 if FINAL, else unused
    m_ptr,  # [slots, L]
    s_ptr,  # [slots, L]
    part_rank_ptr,  # [slots, L] int32
    L,
    first_slot,
    last_slot,
    first_col_slot,  # from here on a slot holds the columns of one row block
    first_block,  # the row block of slot first_col_slot
    KIND: tl.constexpr,
    TRIANGLE: tl.constexpr,  # a column slot left of the diagonal was never written: skip it
    HAS_RANK: tl.constexpr,
    FINAL: tl.constexpr,  # else fold the slots into first_slot
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    """Add up the slots of each element in ascending order."""
    index = tl.program_id(0).to(tl.int64) * BLOCK_L + tl.arange(0, BLOCK_L)
    ok = index < L
    m = tl.full((BLOCK_L,), float("-inf"), tl.float32)
    s = tl.zeros((BLOCK_L,), tl.float32)
    rank = tl.zeros((BLOCK_L,), tl.int64)
    for slot in range(first_slot, last_slot):
        written = ok
        if TRIANGLE:
            first_tile = (first_block + slot - first_col_slot) * BLOCK_N // BLOCK_M
            written = ok & (index // BLOCK_M >= tl.where(slot < first_col_slot, 0, first_tile))
        offset = tl.cast(slot, tl.int64) * L + index
        s_part = tl.load(s_ptr + offset, mask=written, other=0.0)
        if KIND == KIND_LSE:
            m_part = tl.load(m_ptr + offset, mask=written, other=float("-inf"))
            m_new = tl.maximum(m, m_part)
            shift = finite_or_zero(m_new)
            s = s * exp(m - shift) + s_part * exp(m_part - shift)
            m = m_new
        else:
            s += s_part
        if HAS_RANK:
            rank += tl.load(part_rank_ptr + offset, mask=written, other=0).to(tl.int64)
    if FINAL:
        if KIND == KIND_LSE:
            s = m + tl.log2(s) * LN_2  # -inf where nothing was allowed: log2(0)
        tl.store(out_ptr + index, s, mask=ok)
        if HAS_RANK:
            tl.store(rank_ptr + index, rank, mask=ok)
    else:
        offset = tl.cast(first_slot, tl.int64) * L + index
        if KIND == KIND_LSE:
            tl.store(m_ptr + offset, m, mask=ok)
        tl.store(s_ptr + offset, s, mask=ok)
        if HAS_RANK:
            tl.store(part_rank_ptr + offset, rank.to(tl.int32), mask=ok)


# ---- backward ------------------------------------------------------------------------------------
#
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
def _gradient_tile(
    s, row, drow, col, dcol, ids_x, ids_y, col_ok,
    KIND: tl.constexpr, HAS_ROW: tl.constexpr, HAS_COL: tl.constexpr, HAS_IDS: tl.constexpr,
    EVEN_M: tl.constexpr,
):  # fmt: skip
    """G of one tile; excluded and padded pairs are 0."""
    if KIND == KIND_LSE:
        if HAS_ROW:
            g = drow[:, None] * exp(s - row[:, None])
            if HAS_COL:
                g += dcol[None, :] * exp(s - col[None, :])
        else:
            g = dcol[None, :] * exp(s - col[None, :])
    else:
        if HAS_ROW:
            g = drow[:, None] * sigmoid(s)
            if HAS_COL:
                g = (drow[:, None] + dcol[None, :]) * sigmoid(s)
        else:
            g = dcol[None, :] * sigmoid(s)
    # Last of all, so that such a pair has G = 0 whatever exp made of it.
    if HAS_IDS:
        g = tl.where(ids_x[:, None] == ids_y[None, :], 0.0, g)
    if not EVEN_M:
        g = tl.where(col_ok[None, :], g, 0.0)
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
    EVEN_M: tl.constexpr,
    EVEN_D: tl.constexpr,
    PRECISION: tl.constexpr,
    NUM_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The fused way: dx of BLOCK_N rows stays on chip while the program sweeps y."""
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
    if HAS_IDS:
        ids_x = tl.load(ids_x_ptr + rows, mask=row_ok, other=0)
    if HAS_ROW:
        row, drow = _load_side(row_ptr, drow_ptr, rows, row_ok, lift, KIND)
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
        ids_y = cols
        col = scale
        dcol = scale
        if HAS_COL:
            col, dcol = _load_side(col_ptr, dcol_ptr, cols, col_ok, lift, KIND)
        if HAS_IDS:
            ids_y = tl.load(ids_y_ptr + cols, mask=col_ok, other=0)
        g = _gradient_tile(
            s, row, drow, col, dcol, ids_x, ids_y, col_ok, KIND, HAS_ROW, HAS_COL, HAS_IDS, EVEN_M
        )
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
    EVEN_M: tl.constexpr,
    EVEN_D: tl.constexpr,
    PRECISION: tl.constexpr,
    NUM_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The panel way, first half: one tile of G a program, written in the operand dtype.

    Row blocks vary fastest: the programs of one wave share a few tiles of y.
    """
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
        BLOCK_N, BLOCK_M, BLOCK_D, NUM_D, EVEN_D, PRECISION,
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
    ids_x = rows
    ids_y = cols
    if HAS_ROW:
        row, drow = _load_side(row_ptr, drow_ptr, rows, row_ok, lift, KIND)
    if HAS_COL:
        col, dcol = _load_side(col_ptr, dcol_ptr, cols, col_ok, lift, KIND)
    if HAS_IDS:
        ids_x = tl.load(ids_x_ptr + rows, mask=row_ok, other=0)
        ids_y = tl.load(ids_y_ptr + cols, mask=col_ok, other=0)
    g = _gradient_tile(
        s, row, drow, col, dcol, ids_x, ids_y, col_ok, KIND, HAS_ROW, HAS_COL, HAS_IDS, EVEN_M
    )
    if WANT_DBIAS:
        total = tl.sum(tl.sum(tl.where(row_ok[:, None], g, 0.0), 1), 0) / lift
        tl.store(dbias_ptr + tl.program_id(0), total)
    if HAS_LIFT:
        g = g * HALF_LIFT
    panel_rows = tl.cast(block, tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    ptrs = g_ptr + panel_rows[:, None] * stride_gn + cols[None, :]
    tl.store(ptrs, g.to(g_ptr.dtype.element_ty), mask=row_ok[:, None] & col_ok[None, :])


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
    EVEN_M: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,  # the summed side
    BLOCK_D: tl.constexpr,
):
    """The panel way, second half: dx = factor * G y, one [BLOCK_N, BLOCK_D] block a program.

    Program axes: feature blocks (fastest, so that neighbours share rows of G), row blocks, splits.
    """
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
        # Both sides are masked: a 0 on one side does not undo a NaN on the other.
        g_mask = row_ok[:, None]
        if not EVEN_M:
            g_mask = row_ok[:, None] & col_ok[None, :]
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
