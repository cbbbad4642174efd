# SPDX-License-Identifier: Apache-2.0
"""Forward tile kernels for losses whose two sides both need gradients, and what combines their slots.

The rules every kernel keeps (64-bit rows, masks, base-2 state, slots instead of atomics) are in
``tiles.py``.
"""

import triton
import triton.language as tl

from .tiles import (
    CALM_RANGE,
    KIND_LSE,
    LN_2,
    aligned,
    dot_chunks,
    dot_streamed,
    exp,
    finite_or_zero,
    id_range,
    ids_may_meet,
    load_chunks,
    load_ids,
    softplus,
    tile_range,
)

# ---- forward -------------------------------------------------------------------------------------


@triton.jit
def _add_to_rows(s, row_m, row_s, KIND: tl.constexpr):
    """Running (maximum, sum) of the rows with one more tile; excluded pairs are -inf."""
    if KIND == KIND_LSE:
        m_new = tl.maximum(row_m, tl.max(s, 1))
        shift = finite_or_zero(m_new)
        p = exp(s - shift[:, None])
        row_s = row_s * exp(row_m - shift) + tl.sum(p, 1)
        row_m = m_new
    else:
        row_s += tl.sum(softplus(s), 1)
    return row_m, row_s


@triton.jit
def _reduce_columns(s, KIND: tl.constexpr):
    """(Maximum, sum) of the columns of one tile."""
    if KIND == KIND_LSE:
        col_m = tl.max(s, 0)
        col_s = tl.sum(exp(s - finite_or_zero(col_m)[None, :]), 0)
    else:
        col_s = tl.sum(softplus(s), 0)
        col_m = col_s
    return col_m, col_s


@triton.jit
def _count_above(s, threshold, AXIS: tl.constexpr):
    """How many of each row (axis 1) or column (axis 0) exceed its threshold."""
    if AXIS == 1:
        above = s > threshold[:, None]
    else:
        above = s > threshold[None, :]
    return tl.sum(above.to(tl.int32), AXIS)


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
    EVEN_D: tl.constexpr,
    ALIGN: tl.constexpr,  # divides D and the row strides
    HOLD_X: tl.constexpr,  # keep the block of x on chip; else stream both sides by chunks
    PRECISION: tl.constexpr,
    NUM_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Row (and column) reductions over the tiles: log-sum-exp or sum of softplus, and ranks.

    A tile that no mask can concern and whose logits span little is *calm*: one exponential serves its
    rows and its columns.  For NT-Xent and CLIP those are nearly all tiles, and at D = 128 exponentials
    cost more than products.
    """
    D = aligned(D, ALIGN)
    stride_xn = aligned(stride_xn, ALIGN)
    stride_yn = aligned(stride_yn, ALIGN)
    row_start = (first_block + tl.program_id(0)) * BLOCK_N
    rows = row_start + tl.arange(0, BLOCK_N)
    row_ok = rows < N
    scale = tl.load(scale_ptr)
    if HAS_BIAS:
        bias = tl.load(bias_ptr)
    if HAS_IDS:
        ids_x = load_ids(ids_x_ptr, rows, N)
        id_low, id_high = id_range(ids_x)
    if HAS_RANK_ROW:
        threshold_row = tl.load(threshold_row_ptr + rows, mask=row_ok, other=float("inf"))
    if HOLD_X:
        xs = load_chunks(x_ptr, rows, row_ok, stride_xn, stride_xd, D, BLOCK_D, NUM_D, EVEN_D)

    row_m = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    row_s = tl.zeros((BLOCK_N,), tl.float32)
    row_rank = tl.zeros((BLOCK_N,), tl.int32)
    slot = tl.program_id(0).to(tl.int64) * M
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
                BLOCK_N, BLOCK_M, BLOCK_D, EVEN_D, PRECISION,
            ) * scale  # fmt: skip
        if HAS_BIAS:
            s += bias
        # Does any mask concern this tile?  Padding, ids in common, the diagonal.
        edge = (tile + 1) * BLOCK_M > M
        if HAS_COL:
            edge = edge | (row_start + BLOCK_N > N)
        if TRIANGLE:
            edge = edge | (tile * BLOCK_M < row_start + BLOCK_N)
        if HAS_IDS:
            edge = edge | ids_may_meet(id_low, id_high, load_ids(ids_y_ptr, cols, M))
        if HAS_RANK_COL:
            threshold_col = tl.load(threshold_col_ptr + cols, mask=col_ok, other=float("inf"))

        if HAS_COL:
            calm = edge == 0
            if KIND == KIND_LSE:
                top = tl.max(s)
                bottom = tl.min(s)
                calm = calm & (top - bottom <= CALM_RANGE)
            if calm:
                if KIND == KIND_LSE:
                    shift = 0.5 * (top + bottom)
                    p = exp(s - shift)
                    col_m = tl.zeros((BLOCK_M,), tl.float32) + shift
                    m_new = tl.maximum(row_m, shift)
                    row_s = row_s * exp(row_m - m_new) + tl.sum(p, 1) * exp(shift - m_new)
                    row_m = m_new
                else:
                    p = softplus(s)
                    col_m = tl.zeros((BLOCK_M,), tl.float32)
                    row_s += tl.sum(p, 1)
                col_s = tl.sum(p, 0)
                if HAS_RANK_ROW:
                    row_rank += _count_above(s, threshold_row, 1)
                if HAS_RANK_COL:
                    col_rank = _count_above(s, threshold_col, 0)
            else:
                # Excluded pairs become -inf, which is the neutral element of both kinds and below
                # every threshold: softplus(-inf) = 0.
                if HAS_IDS:
                    ids_y = load_ids(ids_y_ptr, cols, M)
                    s = tl.where(ids_x[:, None] == ids_y[None, :], float("-inf"), s)
                s = tl.where(col_ok[None, :] & row_ok[:, None], s, float("-inf"))
                s_row = s
                if TRIANGLE:  # the diagonal counts once, with the rows; its ids exclude it
                    s = tl.where(cols[None, :] > rows[:, None], s, float("-inf"))
                    if HAS_IDS:
                        s_row = s
                    else:
                        s_row = tl.where(cols[None, :] >= rows[:, None], s_row, float("-inf"))
                row_m, row_s = _add_to_rows(s_row, row_m, row_s, KIND)
                col_m, col_s = _reduce_columns(s, KIND)
                if HAS_RANK_ROW:
                    row_rank += _count_above(s_row, threshold_row, 1)
                if HAS_RANK_COL:
                    col_rank = _count_above(s, threshold_col, 0)
            if KIND == KIND_LSE:
                tl.store(col_m_ptr + slot + cols, col_m, mask=col_ok)
            tl.store(col_s_ptr + slot + cols, col_s, mask=col_ok)
            if HAS_RANK_COL:
                tl.store(col_rank_ptr + slot + cols, col_rank, mask=col_ok)
        else:
            if edge:
                if HAS_IDS:
                    ids_y = load_ids(ids_y_ptr, cols, M)
                    s = tl.where(ids_x[:, None] == ids_y[None, :], float("-inf"), s)
                s = tl.where(col_ok[None, :], s, float("-inf"))
            row_m, row_s = _add_to_rows(s, row_m, row_s, KIND)
            if HAS_RANK_ROW:
                row_rank += _count_above(s, threshold_row, 1)

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
