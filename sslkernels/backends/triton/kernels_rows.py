# SPDX-License-Identifier: Apache-2.0
"""Tile kernels that finish in the forward pass: attend (queue loss) and extremes (hard mining).

The rules every kernel keeps are in ``tiles.py``.
"""

import triton
import triton.language as tl

from .tiles import (
    HALF_LIFT,
    LARGEST,
    NO_INDEX,
    aligned,
    dot_chunks,
    dot_streamed,
    exp,
    finite_or_zero,
    id_range,
    ids_may_meet,
    load_chunks,
    load_ids,
    tile_dot,
    tile_range,
)

# ---- attend: the queue loss ----------------------------------------------------------------------


@triton.jit
def attend_kernel(
    m_ptr,  # [SPLITS, N]
    s_ptr,  # [SPLITS, N]
    part_rank_ptr,  # [SPLITS, N] int32
    acc_ptr,  # [SPLITS, N, D] float32: sum_j exp(S_ij - m_i) y_j
    x_ptr,  # [N, D]
    y_ptr,  # [M, D]
    scale_ptr,  # 0-d
    ids_x_ptr,  # [N] int64
    ids_y_ptr,  # [M] int64
    threshold_ptr,  # [N]
    N,
    M,
    D,
    tiles_per_split,
    stride_xn,
    stride_xd,
    stride_yn,
    stride_yd,
    HAS_IDS: tl.constexpr,
    HAS_RANK: tl.constexpr,
    HAS_LIFT: tl.constexpr,  # float16: weights below 6e-5 would be rounded as subnormals
    EVEN_D: tl.constexpr,
    ALIGN: tl.constexpr,  # divides D and the row strides
    PRECISION: tl.constexpr,
    NUM_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Log-sum-exp of the rows and the softmax-weighted sum of y in one pass (online softmax)."""
    D = aligned(D, ALIGN)
    stride_xn = aligned(stride_xn, ALIGN)
    stride_yn = aligned(stride_yn, ALIGN)
    row_start = tl.program_id(0) * BLOCK_N
    rows = row_start + tl.arange(0, BLOCK_N)
    row_ok = rows < N
    scale = tl.load(scale_ptr)
    if HAS_IDS:
        ids_x = load_ids(ids_x_ptr, rows, N)
        id_low, id_high = id_range(ids_x)
    if HAS_RANK:
        threshold = tl.load(threshold_ptr + rows, mask=row_ok, other=float("inf"))
    xs = load_chunks(x_ptr, rows, row_ok, stride_xn, stride_xd, D, BLOCK_D, NUM_D, EVEN_D)

    accs = ()
    for _ in tl.static_range(NUM_D):
        accs = accs + (tl.zeros((BLOCK_N, BLOCK_D), tl.float32),)
    m = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_N,), tl.float32)
    rank = tl.zeros((BLOCK_N,), tl.int32)
    lo, hi = tile_range(row_start, tl.cdiv(M, BLOCK_M), tiles_per_split, BLOCK_M, False)
    for tile in range(lo, hi):
        cols = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        col_ok = cols < M
        ys = load_chunks(y_ptr, cols, col_ok, stride_yn, stride_yd, D, BLOCK_D, NUM_D, EVEN_D)
        s = dot_chunks(xs, ys, NUM_D, PRECISION) * scale
        edge = (tile + 1) * BLOCK_M > M
        if HAS_IDS:
            edge = edge | ids_may_meet(id_low, id_high, load_ids(ids_y_ptr, cols, M))
        if edge:
            if HAS_IDS:
                ids_y = load_ids(ids_y_ptr, cols, M)
                s = tl.where(ids_x[:, None] == ids_y[None, :], float("-inf"), s)
            s = tl.where(col_ok[None, :], s, float("-inf"))
        if HAS_RANK:
            rank += tl.sum((s > threshold[:, None]).to(tl.int32), 1)

        m_new = tl.maximum(m, tl.max(s, 1))
        shift = finite_or_zero(m_new)
        p = exp(s - shift[:, None])
        rescale = exp(m - shift)
        total = total * rescale + tl.sum(p, 1)
        m = m_new
        if HAS_LIFT:
            p = p * HALF_LIFT
        p = p.to(x_ptr.dtype.element_ty)
        sums = ()
        for c in tl.static_range(NUM_D):
            sums = sums + (tile_dot(p, ys[c], accs[c] * rescale[:, None], PRECISION),)
        accs = sums

    slot = tl.program_id(1).to(tl.int64) * N + rows
    tl.store(m_ptr + slot, m, mask=row_ok)
    tl.store(s_ptr + slot, total, mask=row_ok)
    if HAS_RANK:
        tl.store(part_rank_ptr + slot, rank, mask=row_ok)
    factor = 1.0
    if HAS_LIFT:
        factor = 1.0 / HALF_LIFT
    for c in tl.static_range(NUM_D):
        features = c * BLOCK_D + tl.arange(0, BLOCK_D)
        mask = row_ok[:, None] & (features < D)[None, :]
        tl.store(acc_ptr + slot[:, None] * D + features[None, :], accs[c] * factor, mask=mask)


@triton.jit
def attend_combine_kernel(
    mean_ptr,  # [N, D] float32
    m_ptr,  # [splits, N]
    s_ptr,  # [splits, N]
    acc_ptr,  # [splits, N, D]
    N,
    D,
    splits,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """mean_i = sum_p w_ip acc_ip / sum_p w_ip s_ip with w_ip = exp(m_ip - max_p m_ip)."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_ok = rows < N
    features = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask = row_ok[:, None] & (features < D)[None, :]
    m = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_N,), tl.float32)
    acc = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for p in range(splits):
        slot = tl.cast(p, tl.int64) * N + rows
        m_part = tl.load(m_ptr + slot, mask=row_ok, other=float("-inf"))
        s_part = tl.load(s_ptr + slot, mask=row_ok, other=0.0)
        a_part = tl.load(acc_ptr + slot[:, None] * D + features[None, :], mask=mask, other=0.0)
        m_new = tl.maximum(m, m_part)
        shift = finite_or_zero(m_new)
        old = exp(m - shift)
        new = exp(m_part - shift)
        total = total * old + s_part * new
        acc = acc * old[:, None] + a_part * new[:, None]
        m = m_new
    # Nothing allowed: acc is 0 and so is the mean.
    mean = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    tl.store(mean_ptr + rows[:, None] * D + features[None, :], mean, mask=mask)


# ---- extremes ------------------------------------------------------------------------------------


@triton.jit
def _keep_best(value, index, tile_value, tile_index):
    """The larger value; of equal values the smaller index."""
    better = (tile_value > value) | ((tile_value == value) & (tile_index < index))
    return tl.where(better, tile_value, value), tl.where(better, tile_index, index)


@triton.jit
def _tile_best(s, no_candidate, cols):
    """Largest candidate of each row of a tile and its smallest index (NO_INDEX if there is none).

    A NaN counts as +inf, so that it is picked and shows in the loss (torch.argmax does the same).
    Candidates are at least -LARGEST, so that -inf says "no candidate" and no mask has to be kept.
    """
    value = tl.where(s != s, float("inf"), s)
    value = tl.where(value < -LARGEST, -LARGEST, value)
    value = tl.where(no_candidate, float("-inf"), value)
    best = tl.max(value, 1)
    index = tl.min(tl.where(value == best[:, None], cols[None, :].to(tl.int32), NO_INDEX), 1)
    return best, tl.where(best == float("-inf"), NO_INDEX, index)


@triton.jit
def extremes_kernel(
    value_ptr,  # [2, SPLITS, N] float32: max over equal ids; max of -S over different ids
    index_ptr,  # [2, SPLITS, N] int32
    x_ptr,  # [N, D]
    y_ptr,  # [M, D]
    scale_ptr,  # 0-d
    bias_y_ptr,  # [M]
    ids_x_ptr,  # [N] int64
    ids_y_ptr,  # [M] int64
    N,
    M,
    D,
    tiles_per_split,
    stride_xn,
    stride_xd,
    stride_yn,
    stride_yd,
    SELF: tl.constexpr,  # j = i is no candidate
    HAS_BIAS: tl.constexpr,
    EVEN_M: tl.constexpr,
    EVEN_D: tl.constexpr,
    ALIGN: tl.constexpr,
    HOLD_X: tl.constexpr,
    PRECISION: tl.constexpr,
    NUM_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Arg-max of S over equal ids and arg-min over different ids, for each row."""
    D = aligned(D, ALIGN)
    stride_xn = aligned(stride_xn, ALIGN)
    stride_yn = aligned(stride_yn, ALIGN)
    row_start = tl.program_id(0) * BLOCK_N
    rows = row_start + tl.arange(0, BLOCK_N)
    row_ok = rows < N
    scale = tl.load(scale_ptr)
    ids_x = tl.load(ids_x_ptr + rows, mask=row_ok, other=0)
    if HOLD_X:
        xs = load_chunks(x_ptr, rows, row_ok, stride_xn, stride_xd, D, BLOCK_D, NUM_D, EVEN_D)

    same_value = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    same_index = tl.full((BLOCK_N,), NO_INDEX, tl.int32)
    other_value = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    other_index = tl.full((BLOCK_N,), NO_INDEX, tl.int32)
    lo, hi = tile_range(row_start, tl.cdiv(M, BLOCK_M), tiles_per_split, BLOCK_M, False)
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
            s += tl.load(bias_y_ptr + cols, mask=col_ok, other=0.0)[None, :]
        ids_y = tl.load(ids_y_ptr + cols, mask=col_ok, other=0)
        same = ids_x[:, None] == ids_y[None, :]
        not_same = ids_x[:, None] != ids_y[None, :]
        not_other = same
        if not EVEN_M:
            not_same = not_same | (cols >= M)[None, :]
            not_other = not_other | (cols >= M)[None, :]
        if SELF:
            not_same = not_same | (rows[:, None] == cols[None, :])
        tile_value, tile_index = _tile_best(s, not_same, cols)
        same_value, same_index = _keep_best(same_value, same_index, tile_value, tile_index)
        tile_value, tile_index = _tile_best(-s, not_other, cols)
        other_value, other_index = _keep_best(other_value, other_index, tile_value, tile_index)

    slot = tl.program_id(1).to(tl.int64) * N + rows
    second = tl.num_programs(1).to(tl.int64) * N
    tl.store(value_ptr + slot, same_value, mask=row_ok)
    tl.store(index_ptr + slot, same_index, mask=row_ok)
    tl.store(value_ptr + second + slot, other_value, mask=row_ok)
    tl.store(index_ptr + second + slot, other_index, mask=row_ok)


@triton.jit
def extremes_combine_kernel(
    index_out_ptr,  # [2, N] int64
    value_ptr,  # [2, splits, N]
    index_ptr,  # [2, splits, N] int32
    N,
    splits,
    BLOCK_L: tl.constexpr,
):
    """Best of the splits; -1 where no split had a candidate.  Program axis 1: max, min."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_L + tl.arange(0, BLOCK_L)
    row_ok = rows < N
    which = tl.program_id(1).to(tl.int64)
    value = tl.full((BLOCK_L,), float("-inf"), tl.float32)
    index = tl.full((BLOCK_L,), NO_INDEX, tl.int32)
    for p in range(splits):
        slot = (which * splits + p) * N + rows
        part_value = tl.load(value_ptr + slot, mask=row_ok, other=float("-inf"))
        part_index = tl.load(index_ptr + slot, mask=row_ok, other=NO_INDEX)
        value, index = _keep_best(value, index, part_value, part_index)
    index = tl.where(index == NO_INDEX, -1, index).to(tl.int64)
    tl.store(index_out_ptr + which * N + rows, index, mask=row_ok)
