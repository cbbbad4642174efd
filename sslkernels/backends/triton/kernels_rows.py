# SPDX-License-Identifier: Apache-2.0
"""Tile kernels that finish in the forward pass: attend (queue loss) and extremes (hard mining).

The rules every kernel keeps are in ``tiles.py``; which tiles a program visits, and which pairs of them
count, in ``pairs.py``.
"""

import triton
import triton.language as tl

from .pairs import any_wide, leave_out, real_branch, share_of_line, slots_of, span_of
from .tiles import (
    EXCLUDE_IDS,
    HALF_LIFT,
    HUGE,
    LARGEST,
    LN_2,
    LOG2_E,
    NO_INDEX,
    TINY,
    constant_shift,
    dot_chunks,
    dot_streamed,
    exp,
    finite_or_zero,
    kernel,
    load_block,
    load_chunk,
    store_chunk,
    tile_dot,
    tree_sum,
    wait_turn,
)

# ---- attend: the queue loss ----------------------------------------------------------------------


@kernel
def attend_kernel(
    m_ptr,  # [slots, N] running maximum; only with ONLINE
    s_ptr,  # [slots, N]
    part_rank_ptr,  # [slots, N] int32
    acc_ptr,  # [slots, N, D] float32: sum_j exp(S_ij - c) y_j
    x_ptr,  # [N, D]
    y_ptr,  # [M, D]
    scale_ptr,  # 0-d
    short_x_ptr,  # [N] int32
    short_y_ptr,  # [M] int32
    span_x_ptr,  # [spans of N, 2] int32
    span_y_ptr,  # [spans of M, 2] int32
    threshold_ptr,  # [N]
    N,
    M,
    share,
    total,  # int64
    EXCLUDE: tl.constexpr,
    HAS_RANK: tl.constexpr,
    ONLINE: tl.constexpr,  # float16, whose weights must be relative to the largest of their row
    STRIDE_X: tl.constexpr,
    STRIDE_Y: tl.constexpr,
    D: tl.constexpr,
    PRECISION: tl.constexpr,
    NUM_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Sums of exponentials of the rows, and of y weighted with them, in one pass.

    c is one constant, or the running maximum of the row if ONLINE (online softmax).
    """
    wait_turn()
    tiles = tl.cdiv(M, BLOCK_M)
    first, lo, left, last, slot = share_of_line(share, tiles, total)
    scale = tl.load(scale_ptr)
    shift = constant_shift(scale)
    if ONLINE:
        shift = 0.0
    k = scale * LOG2_E
    for block in range(first, last + 1):
        hi = tl.minimum(lo + left, tiles)
        x_start = block * BLOCK_N
        rows = x_start + tl.arange(0, BLOCK_N)
        row_ok = rows < N
        if EXCLUDE == EXCLUDE_IDS:
            low_x, high_x = span_of(span_x_ptr, x_start, BLOCK_N)
        if HAS_RANK:
            threshold = tl.load(threshold_ptr + rows)
            threshold = (threshold - shift) * LOG2_E
        xs = load_block(x_ptr, x_start, BLOCK_N, STRIDE_X, D, BLOCK_D, NUM_D)
        accs = ()
        for _ in tl.static_range(NUM_D):
            accs = accs + (tl.zeros((BLOCK_N, BLOCK_D), tl.float32),)
        m = tl.full((BLOCK_N,), float("-inf"), tl.float32)
        s = tl.zeros((BLOCK_N,), tl.float32)
        rank = tl.zeros((BLOCK_N,), tl.int32)
        for tile in tl.range(lo, hi, disable_licm=D > 256):
            y_start = tile * BLOCK_M
            ys = load_block(y_ptr, y_start, BLOCK_M, STRIDE_Y, D, BLOCK_D, NUM_D)
            t = dot_chunks(xs, ys, NUM_D, PRECISION) * k - shift * LOG2_E
            if y_start + BLOCK_M > M:
                real_branch(scale_ptr)
                cols = y_start + tl.arange(0, BLOCK_M)
                t = tl.where((cols < M)[None, :], t, float("-inf"))
            if EXCLUDE == EXCLUDE_IDS:
                low_y, high_y = span_of(span_y_ptr, y_start, BLOCK_M)
                if (low_y <= high_x) & (high_y >= low_x):
                    short_x = tl.load(short_x_ptr + x_start + tl.arange(0, BLOCK_N))
                    short_y = tl.load(short_y_ptr + y_start + tl.arange(0, BLOCK_M))
                    t = tl.where(short_x[:, None] != short_y[None, :], t, float("-inf"))
            if HAS_RANK:
                rank += tl.sum((t > threshold[:, None]).to(tl.int32), 1)
            if ONLINE:
                m_new = tl.maximum(m, tl.max(t, 1))
                against = finite_or_zero(m_new)
                p = tl.exp2(t - against[:, None])
                rescale = tl.exp2(m - against)
                s = s * rescale + tl.sum(p, 1)
                m = m_new
                p = p * HALF_LIFT
            else:
                p = tl.exp2(t)
                s += tl.sum(p, 1)
            p = p.to(x_ptr.dtype.element_ty)
            sums = ()
            for c in tl.static_range(NUM_D):
                acc = accs[c]
                if ONLINE:
                    acc = acc * rescale[:, None]
                sums = sums + (tile_dot(p, ys[c], acc, PRECISION),)
            accs = sums

        at = slot.to(tl.int64) * N + x_start
        if ONLINE:
            tl.store(m_ptr + at + tl.arange(0, BLOCK_N), m, mask=row_ok)
        tl.store(s_ptr + at + tl.arange(0, BLOCK_N), s, mask=row_ok)
        if HAS_RANK:
            tl.store(part_rank_ptr + at + tl.arange(0, BLOCK_N), rank, mask=row_ok)
        factor = 1.0
        if ONLINE:
            factor = 1.0 / HALF_LIFT
        for c in tl.static_range(NUM_D):
            store_chunk(acc_ptr, at, c, accs[c] * factor, row_ok, D, BLOCK_D)
        left -= hi - lo
        lo = lo * 0
        slot = slot * 0


@triton.jit
def _attend_again(
    x_ptr, y_ptr, scale, ids_x_ptr, ids_y_ptr, threshold, start, feature, M, chunks,
    EXCLUDE: tl.constexpr, HAS_RANK: tl.constexpr,
    STRIDE_X: tl.constexpr, STRIDE_Y: tl.constexpr, D: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """(lse, mean, rank) with a running maximum and ids of 64 bits; BLOCK_D features of the mean."""
    m = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_N,), tl.float32)
    rank = tl.zeros((BLOCK_N,), tl.int64)
    acc = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    rows = start + tl.arange(0, BLOCK_N)
    for tile in range(0, tl.cdiv(M, BLOCK_M)):
        s = dot_streamed(
            x_ptr, y_ptr, start, tile * BLOCK_M, chunks, BLOCK_N, BLOCK_M, STRIDE_X, STRIDE_Y, D,
            BLOCK_D, PRECISION,
        ) * scale  # fmt: skip
        cols = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        s = tl.where((cols < M)[None, :], s, float("-inf"))
        s = leave_out(s, rows, cols, ids_x_ptr, ids_y_ptr, M, EXCLUDE)
        m_new = tl.maximum(m, tl.max(s, 1))
        shift = finite_or_zero(m_new)
        p = exp(s - shift[:, None])
        rescale = exp(m - shift)
        total = total * rescale + tl.sum(p, 1)
        m = m_new
        if HAS_RANK:
            rank += tl.sum((s > threshold[:, None]).to(tl.int32), 1).to(tl.int64)
        y = load_chunk(y_ptr, tile * BLOCK_M, feature, BLOCK_M, STRIDE_Y, D, BLOCK_D)
        if y.dtype == tl.float16:
            p = p * HALF_LIFT
        acc = tile_dot(p.to(y.dtype), y, acc * rescale[:, None], PRECISION)
    if x_ptr.dtype.element_ty == tl.float16:
        acc = acc * (1.0 / HALF_LIFT)
    lse = m + tl.log2(total) * LN_2
    return lse, acc / tl.where(total == 0.0, 1.0, total)[:, None], rank


@kernel
def attend_combine_kernel(
    lse_ptr,  # [N] float32
    mean_ptr,  # [N, D] float32
    rank_ptr,  # [N] int64
    m_ptr,  # [slots, N]; only with ONLINE
    s_ptr,  # [slots, N]
    part_rank_ptr,  # [slots, N] int32
    acc_ptr,  # [slots, N, D]
    x_ptr,  # [N, D]
    y_ptr,  # [M, D]
    scale_ptr,  # 0-d
    ids_x_ptr,  # [N] int64
    ids_y_ptr,  # [M] int64
    wide_ptr,  # [wide_count] int32
    threshold_ptr,  # [N]
    N,
    M,
    wide_count,
    chunks,
    share,
    tiles,  # of a held block
    HAS_RANK: tl.constexpr,
    EXCLUDE: tl.constexpr,
    ONLINE: tl.constexpr,
    STRIDE_X: tl.constexpr,
    STRIDE_Y: tl.constexpr,
    D: tl.constexpr,
    PRECISION: tl.constexpr,
    HELD: tl.constexpr,  # rows of a held block, a multiple of BLOCK_N
    SLOTS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """lse, rank and mean_i = sum_p w_ip acc_ip / sum_p w_ip s_ip, SLOTS partial results at a time.

    w = 1 where every slot has the same shift, exp(m_ip - max_p m_ip) if ONLINE.  Program axis 1: features.
    """
    wait_turn()
    begin = tl.program_id(0) * BLOCK_N
    rows = begin + tl.arange(0, BLOCK_N)
    row_ok = rows < N
    features = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask = row_ok[:, None] & (features < D)[None, :]
    used = slots_of((begin // HELD).to(tl.int64) * tiles, tiles, share)
    m = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    s = tl.zeros((BLOCK_N,), tl.float32)
    acc = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    rank = tl.zeros((BLOCK_N,), tl.int64)
    for base in range(0, used, SLOTS):
        weights = ()
        m_new = m
        if ONLINE:
            for i in tl.static_range(SLOTS):
                slot = tl.cast(base + i, tl.int64) * N + rows
                ok = row_ok & (base + i < used)
                weights = weights + (tl.load(m_ptr + slot, mask=ok, other=float("-inf")),)
            for i in tl.static_range(SLOTS):
                m_new = tl.maximum(m_new, weights[i])
        against = finite_or_zero(m_new)
        sums = ()
        accs = ()
        ranks = ()
        for i in tl.static_range(SLOTS):
            slot = tl.cast(base + i, tl.int64) * N + rows
            ok = row_ok & (base + i < used)
            part = tl.load(s_ptr + slot, mask=ok, other=0.0)
            at = slot[:, None] * D + features[None, :]
            part_acc = tl.load(acc_ptr + at, mask=mask & (base + i < used), other=0.0)
            if ONLINE:
                weight = tl.exp2(weights[i] - against)
                part = part * weight
                part_acc = part_acc * weight[:, None]
            sums = sums + (part,)
            accs = accs + (part_acc,)
            if HAS_RANK:
                ranks = ranks + (tl.load(part_rank_ptr + slot, mask=ok, other=0),)
        if ONLINE:
            rescale = tl.exp2(m - against)
            s = s * rescale
            acc = acc * rescale[:, None]
            m = m_new
        s += tree_sum(sums, SLOTS)
        acc += tree_sum(accs, SLOTS)
        if HAS_RANK:
            rank += tree_sum(ranks, SLOTS).to(tl.int64)
    scale = tl.load(scale_ptr)
    if ONLINE:
        lse = (m + tl.log2(s)) * LN_2
        lost = rows < 0
    else:
        lse = constant_shift(scale) + tl.log2(s) * LN_2
        lost = row_ok & (((s >= TINY) & (s <= HUGE)) == 0)
    # Nothing allowed: acc is 0 and so is the mean.
    mean = acc / tl.where(s == 0.0, 1.0, s)[:, None]
    if EXCLUDE == EXCLUDE_IDS:
        lost = lost | (any_wide(wide_ptr, wide_count) != 0)
    if EXCLUDE == EXCLUDE_IDS or not ONLINE:
        if tl.max(lost.to(tl.int32), 0) != 0:
            threshold = s
            if HAS_RANK:
                threshold = tl.load(threshold_ptr + rows)
            lse_again, mean_again, rank_again = _attend_again(
                x_ptr, y_ptr, scale, ids_x_ptr, ids_y_ptr, threshold, begin,
                tl.program_id(1), M, chunks, EXCLUDE, HAS_RANK, STRIDE_X, STRIDE_Y, D,
                PRECISION, BLOCK_N, BLOCK_M, BLOCK_D,
            )  # fmt: skip
            lse = tl.where(lost, lse_again, lse)
            mean = tl.where(lost[:, None], mean_again, mean)
            rank = tl.where(lost, rank_again, rank)
    tl.store(mean_ptr + rows.to(tl.int64)[:, None] * D + features[None, :], mean, mask=mask)
    if tl.program_id(1) == 0:
        tl.store(lse_ptr + rows, lse, mask=row_ok)
        if HAS_RANK:
            tl.store(rank_ptr + rows, rank, mask=row_ok)


# ---- extremes ------------------------------------------------------------------------------------


@triton.jit
def _keep_best(value, index, tile_value, tile_index):
    """The larger value; of equal values the smaller index."""
    better = (tile_value > value) | ((tile_value == value) & (tile_index < index))
    return tl.where(better, tile_value, value), tl.where(better, tile_index, index)


@triton.jit
def _candidates(s, same):
    """(S where ids are equal, -S where they differ), -inf elsewhere.

    A NaN counts as +inf, so that it is picked and shows in the loss (torch.argmax does the same).
    Candidates are at least -LARGEST, so that -inf says "no candidate" and no mask has to be kept.
    """
    nan = s != s
    up = tl.maximum(tl.where(nan, float("inf"), s), -LARGEST)
    down = tl.maximum(tl.where(nan, float("inf"), -s), -LARGEST)
    return tl.where(same, up, float("-inf")), tl.where(same, float("-inf"), down)


@triton.jit
def _better(value, index, candidates, tile):
    """Keep the larger candidate of each place of the tiles, the earlier one of equal ones."""
    return tl.maximum(value, candidates), tl.where(candidates > value, tile, index)


@triton.jit
def _best_of_places(value, index, BLOCK_M: tl.constexpr):
    """The best of each row and its smallest index (NO_INDEX if there is none)."""
    best = tl.max(value, 1)
    cols = index * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
    found = tl.min(tl.where(value == best[:, None], cols, NO_INDEX), 1)
    return best, tl.where(best == float("-inf"), NO_INDEX, found)


@kernel
def extremes_kernel(
    value_ptr,  # [2, slots, N] float32: max over equal ids; max of -S over different ids
    index_ptr,  # [2, slots, N] int32
    x_ptr,  # [N, D]
    y_ptr,  # [M, D]
    scale_ptr,  # 0-d
    bias_y_ptr,  # [M]
    ids_x_ptr,  # [N] int64
    ids_y_ptr,  # [M] int64
    N,
    M,
    chunks,
    share,
    total,  # int64
    slots,
    SELF: tl.constexpr,  # j = i is no candidate
    HAS_BIAS: tl.constexpr,
    STRIDE_X: tl.constexpr,
    STRIDE_Y: tl.constexpr,
    D: tl.constexpr,
    HOLD_X: tl.constexpr,
    PRECISION: tl.constexpr,
    NUM_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Arg-max of S over equal ids and arg-min over different ids, for each row.

    Rows of y from M on repeat the last one, here alone: a candidate again, which changes nothing.
    """
    wait_turn()
    tiles = tl.cdiv(M, BLOCK_M)
    first, lo, left, last, slot = share_of_line(share, tiles, total)
    scale = tl.load(scale_ptr)
    for block in range(first, last + 1):
        hi = tl.minimum(lo + left, tiles)
        x_start = block * BLOCK_N
        rows = x_start + tl.arange(0, BLOCK_N)
        row_ok = rows < N
        ids_x = tl.load(ids_x_ptr + rows)
        if HOLD_X:
            xs = load_block(x_ptr, x_start, BLOCK_N, STRIDE_X, D, BLOCK_D, NUM_D)
        # Of each place of a tile the best so far and in which tile it was: rows are compared at the end.
        same_value = tl.full((BLOCK_N, BLOCK_M), float("-inf"), tl.float32)
        other_value = tl.full((BLOCK_N, BLOCK_M), float("-inf"), tl.float32)
        same_tile = tl.zeros((BLOCK_N, BLOCK_M), tl.int32)
        other_tile = tl.zeros((BLOCK_N, BLOCK_M), tl.int32)
        for tile in range(lo, hi):
            y_start = tile * BLOCK_M
            cols = y_start + tl.arange(0, BLOCK_M)
            if HOLD_X:
                ys = load_block(y_ptr, y_start, BLOCK_M, STRIDE_Y, D, BLOCK_D, NUM_D)
                s = dot_chunks(xs, ys, NUM_D, PRECISION) * scale
            else:
                s = dot_streamed(
                    x_ptr, y_ptr, x_start, y_start, chunks, BLOCK_N, BLOCK_M, STRIDE_X, STRIDE_Y, D,
                    BLOCK_D, PRECISION,
                ) * scale  # fmt: skip
            known = tl.minimum(cols, M - 1)
            if HAS_BIAS:
                s += tl.load(bias_y_ptr + known)[None, :]
            same, other = _candidates(s, ids_x[:, None] == tl.load(ids_y_ptr + known)[None, :])
            if SELF:
                if (y_start < x_start + BLOCK_N) & (y_start + BLOCK_M > x_start):
                    real_branch(scale_ptr)
                    same = tl.where(rows[:, None] != known[None, :], same, float("-inf"))
            same_value, same_tile = _better(same_value, same_tile, same, tile)
            other_value, other_tile = _better(other_value, other_tile, other, tile)
        same_best, same_index = _best_of_places(same_value, same_tile, BLOCK_M)
        other_best, other_index = _best_of_places(other_value, other_tile, BLOCK_M)

        at = slot.to(tl.int64) * N + rows
        second = tl.cast(slots, tl.int64) * N
        tl.store(value_ptr + at, same_best, mask=row_ok)
        tl.store(index_ptr + at, same_index, mask=row_ok)
        tl.store(value_ptr + second + at, other_best, mask=row_ok)
        tl.store(index_ptr + second + at, other_index, mask=row_ok)
        left -= hi - lo
        lo = lo * 0
        slot = slot * 0


@kernel
def extremes_combine_kernel(
    index_out_ptr,  # [2, N] int64
    value_ptr,  # [2, slots, N]
    index_ptr,  # [2, slots, N] int32
    N,
    share,
    tiles,
    slots,
    HELD: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    """Best of the slots; -1 where no slot had a candidate.  Program axis 1: max, min."""
    wait_turn()
    rows = tl.program_id(0) * BLOCK_L + tl.arange(0, BLOCK_L)
    row_ok = rows < N
    which = tl.program_id(1).to(tl.int64)
    used = slots_of((rows // HELD).to(tl.int64) * tiles, tiles, share)
    value = tl.full((BLOCK_L,), float("-inf"), tl.float32)
    index = tl.full((BLOCK_L,), NO_INDEX, tl.int32)
    for p in range(0, slots):
        ok = row_ok & (p < used)
        slot = (which * slots + p) * N + rows
        part_value = tl.load(value_ptr + slot, mask=ok, other=float("-inf"))
        part_index = tl.load(index_ptr + slot, mask=ok, other=NO_INDEX)
        value, index = _keep_best(value, index, part_value, part_index)
    index = tl.where(index == NO_INDEX, -1, index).to(tl.int64)
    tl.store(index_out_ptr + which * N + rows, index, mask=row_ok)
