# SPDX-License-Identifier: Apache-2.0
"""Forward tile kernel for losses whose two sides both need gradients, and what combines its slots.

The rules every kernel keeps (overlapping blocks, one constant shift, slots instead of atomics) are in
``tiles.py``; which tiles a program visits, and which pairs of them count, in ``pairs.py``.
"""

import triton
import triton.language as tl

from .pairs import (
    any_wide,
    first_multiple,
    folded,
    folded_block,
    leave_out,
    real_branch,
    share_of_line,
    share_of_triangle,
    slots_of,
    span_of,
)
from .tiles import (
    EXCLUDE_IDS,
    EXCLUDE_PERIOD,
    HUGE,
    KIND_LSE,
    LN_2,
    LOG2_E,
    TINY,
    constant_shift,
    dot_chunks,
    dot_coming,
    dot_streamed,
    exp,
    finite_or_zero,
    kernel,
    load_block,
    softplus2,
    wait_turn,
)

# ---- forward -------------------------------------------------------------------------------------


@triton.jit
def fold(t, FOLD: tl.constexpr):
    """Add rows of a [cols, rows] tile that one thread holds, so that sums over cols need few registers.

    In the layout of mma.sync and wgmma a thread holds rows r and r + 8 of every 16.  The rest of the sum
    waits until the sweep is over.
    """
    if FOLD:
        t = tl.sum(tl.reshape(t, (t.shape[0] // 16, 2, 8, t.shape[1])), 1)
    return t


@triton.jit
def unfold(t, FOLD: tl.constexpr):
    """The sum over cols of what ``fold`` left."""
    if FOLD:
        t = tl.sum(t, 0)
    return tl.sum(t, 0)


@triton.jit
def _sweep(
    row_s_ptr, row_rank_ptr, col_s_ptr, col_rank_ptr, row_slot, col_slot, x_ptr, y_ptr, scale_ptr,
    bias_ptr, short_x_ptr, short_y_ptr, span_x_ptr, span_y_ptr, threshold_row_ptr, threshold_col_ptr,
    N, M, period, chunks, block, lo, hi,
    KIND: tl.constexpr, TRIANGLE: tl.constexpr, HAS_COL: tl.constexpr, HAS_BIAS: tl.constexpr,
    EXCLUDE: tl.constexpr, HAS_RANK_ROW: tl.constexpr, HAS_RANK_COL: tl.constexpr,
    STRIDE_X: tl.constexpr, STRIDE_Y: tl.constexpr, D: tl.constexpr, HOLD_X: tl.constexpr,
    PREFETCH: tl.constexpr, FOLD: tl.constexpr, PRECISION: tl.constexpr, NUM_D: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One held block against tiles [lo, hi) of the swept side.

    A tile is [cols, rows]: the held side lies along N of the product, where its sums need no shuffle.
    """
    x_start = block * BLOCK_N
    rows = x_start + tl.arange(0, BLOCK_N)
    row_ok = rows < N
    scale = tl.load(scale_ptr)
    shift = 0.0
    if KIND == KIND_LSE:
        shift = constant_shift(scale)
    k = scale * LOG2_E
    offset = -shift * LOG2_E
    if HAS_BIAS:
        offset += tl.load(bias_ptr) * LOG2_E
    if HOLD_X:
        xs = load_block(x_ptr, x_start, BLOCK_N, STRIDE_X, D, BLOCK_D, NUM_D)
    if EXCLUDE == EXCLUDE_IDS:
        short_x = tl.load(short_x_ptr + rows)
        low_x, high_x = span_of(span_x_ptr, x_start, BLOCK_N)
    if HAS_RANK_ROW:
        threshold_row = tl.load(threshold_row_ptr + rows)
        threshold_row = (threshold_row - shift) * LOG2_E
        row_rank = fold(tl.zeros((BLOCK_M, BLOCK_N), tl.int32), FOLD)
    row_s = fold(tl.zeros((BLOCK_M, BLOCK_N), tl.float32), FOLD)
    # Differences j - i of the tile lie in [low, low + BLOCK_M + BLOCK_N - 2].
    low = lo * BLOCK_M - (block + 1) * BLOCK_N + 1
    multiple = low
    if EXCLUDE % 2 == 1:
        multiple = first_multiple(low, period)
    if PREFETCH > 0:
        coming = load_block(y_ptr, lo * BLOCK_M, BLOCK_M, STRIDE_Y, D, BLOCK_D, PREFETCH)
    for tile in tl.range(lo, hi, disable_licm=HOLD_X and D > 256):
        y_start = tile * BLOCK_M
        cols = y_start + tl.arange(0, BLOCK_M)
        col_ok = cols < M
        # Columns from M on are -inf at no cost: the constant of their multiply-add is.
        constant = tl.where(col_ok, offset, float("-inf"))
        if PREFETCH > 0:
            y_next = tl.minimum(tile + 1, hi - 1) * BLOCK_M
            t, coming = dot_coming(
                xs, coming, y_ptr, y_start, y_next, True, BLOCK_M, STRIDE_Y, D, PREFETCH, NUM_D, BLOCK_D,
                PRECISION,
            )  # fmt: skip
        elif HOLD_X:
            ys = load_block(y_ptr, y_start, BLOCK_M, STRIDE_Y, D, BLOCK_D, NUM_D)
            t = dot_chunks(ys, xs, NUM_D, PRECISION)
        else:
            t = dot_streamed(
                y_ptr, x_ptr, y_start, x_start, chunks, BLOCK_M, BLOCK_N, STRIDE_Y, STRIDE_X, D,
                BLOCK_D, PRECISION,
            )  # fmt: skip
        t = t * k + constant[:, None]
        # Masks, each where it concerns this tile.
        if HAS_COL and not TRIANGLE:
            if (block + 1) * BLOCK_N > N:  # rows from N on must not enter the columns
                real_branch(scale_ptr)
                t = tl.where(row_ok[None, :], t, float("-inf"))
        if EXCLUDE % 2 == 1:
            if multiple < low + (BLOCK_M + BLOCK_N - 1):
                if EXCLUDE == EXCLUDE_PERIOD:
                    apart = cols[:, None] - rows[None, :]
                    t = tl.where(apart != multiple, t, float("-inf"))
                else:
                    same = (cols % period)[:, None] == (rows % period)[None, :]
                    t = tl.where(same, float("-inf"), t)
        if EXCLUDE == EXCLUDE_IDS:
            low_y, high_y = span_of(span_y_ptr, y_start, BLOCK_M)
            if (low_y <= high_x) & (high_y >= low_x):
                short_y = tl.load(short_y_ptr + cols)
                t = tl.where(short_y[:, None] != short_x[None, :], t, float("-inf"))
        if KIND == KIND_LSE:
            p = tl.exp2(t)
        else:
            p = softplus2(t)
        row_s += fold(p, FOLD)
        if HAS_RANK_ROW:
            row_rank += fold((t > threshold_row[None, :]).to(tl.int32), FOLD)
        if HAS_COL:
            # Tiles at the diagonal count for their rows, in both orders, and not for their columns.
            if TRIANGLE:
                col_ok = col_ok & (tile * BLOCK_M >= (block + 1) * BLOCK_N)
            tl.store(col_s_ptr + col_slot + cols, tl.sum(p, 1), mask=col_ok)
            if HAS_RANK_COL:
                threshold_col = tl.load(threshold_col_ptr + cols)
                threshold_col = (threshold_col - shift) * LOG2_E
                above = tl.sum((t > threshold_col[:, None]).to(tl.int32), 1)
                tl.store(col_rank_ptr + col_slot + cols, above, mask=col_ok)
        low += BLOCK_M
        if EXCLUDE % 2 == 1:
            multiple = tl.where(multiple < low, multiple + period, multiple)

    tl.store(row_s_ptr + row_slot + rows, unfold(row_s, FOLD), mask=row_ok)
    if HAS_RANK_ROW:
        tl.store(row_rank_ptr + row_slot + rows, unfold(row_rank, FOLD), mask=row_ok)


@kernel
def forward_kernel(
    row_s_ptr,  # [row slots, N] sum of exp(S - c) or of softplus(S)
    row_rank_ptr,  # [row slots, N] int32
    col_s_ptr,  # [G, M] one slot for each held block of this launch
    col_rank_ptr,  # [G, M] int32
    x_ptr,  # [N, D]
    y_ptr,  # [M, D]
    scale_ptr,  # 0-d
    bias_ptr,  # 0-d
    short_x_ptr,  # [N] int32: low halves of the ids
    short_y_ptr,  # [M] int32
    span_x_ptr,  # [spans of N, 2] int32: smallest and largest short id
    span_y_ptr,  # [spans of M, 2] int32
    threshold_row_ptr,  # [N]
    threshold_col_ptr,  # [M]
    N,
    M,
    period,
    chunks,  # of D: tl.cdiv(D, BLOCK_D)
    share,  # tiles of a program
    total,  # int64: tiles of the launch
    first_block,  # index of the first held block: launches go group by group
    blocks,  # held blocks of this launch
    KIND: tl.constexpr,
    TRIANGLE: tl.constexpr,  # x is y: visit one triangle and let (i, j) count for row j as well
    HAS_COL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EXCLUDE: tl.constexpr,
    HAS_RANK_ROW: tl.constexpr,
    HAS_RANK_COL: tl.constexpr,
    STRIDE_X: tl.constexpr,
    STRIDE_Y: tl.constexpr,
    D: tl.constexpr,
    HOLD_X: tl.constexpr,  # keep the block of x on chip; else stream both sides by chunks
    PREFETCH: tl.constexpr,  # chunks of y that wait in registers, not in shared memory
    FOLD: tl.constexpr,
    PRECISION: tl.constexpr,
    NUM_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Row (and column) reductions over the tiles: log-sum-exp or sum of softplus, and ranks."""
    wait_turn()
    RATIO: tl.constexpr = BLOCK_N // BLOCK_M
    tiles = tl.cdiv(M, BLOCK_M)
    line_block = tiles
    if TRIANGLE:
        line_block = folded(first_block, blocks, tiles, RATIO)
    first, lo, left, last, slot = share_of_line(share, line_block, total)
    if TRIANGLE:  # two held blocks of each pair
        near = tiles - (first_block + first) * RATIO
        second = lo >= near
        start, _ = folded_block(
            first_block + tl.where(second, blocks - 1 - first, first),
            first_block,
            blocks,
            tiles,
            RATIO,
        )
        slot = tl.program_id(0) - (start // share).to(tl.int32)
        lo = tl.where(second, lo - near, lo)
        first = 2 * first + tl.where(second, 1, 0)
        last = 2 * last + 1
    for part in range(first, last + 1):
        skipped = 0
        length = tiles
        wanted = left > 0
        if TRIANGLE:
            pair = part // 2
            block = first_block + tl.where(part % 2 == 0, pair, blocks - 1 - pair)
            skipped = block * RATIO
            length = tiles - skipped
            # An odd number of blocks leaves the middle one without a partner.
            wanted = wanted & ((part % 2 == 0) | (2 * pair != blocks - 1))
        else:
            block = first_block + part
        if wanted:
            hi = tl.minimum(lo + left, length)
            row_slot = slot.to(tl.int64) * N
            col_slot = (block - first_block).to(tl.int64) * M
            _sweep(
                row_s_ptr, row_rank_ptr, col_s_ptr, col_rank_ptr, row_slot, col_slot, x_ptr, y_ptr,
                scale_ptr, bias_ptr, short_x_ptr, short_y_ptr, span_x_ptr, span_y_ptr,
                threshold_row_ptr, threshold_col_ptr, N, M, period, chunks,
                block, skipped + lo, skipped + hi, KIND, TRIANGLE, HAS_COL, HAS_BIAS, EXCLUDE, HAS_RANK_ROW,
                HAS_RANK_COL, STRIDE_X, STRIDE_Y, D, HOLD_X, PREFETCH, FOLD,
                PRECISION, NUM_D, BLOCK_N, BLOCK_M, BLOCK_D,
            )  # fmt: skip
            left -= hi - lo
            lo = lo * 0
            slot = slot * 0


# ---- combine -------------------------------------------------------------------------------------


@triton.jit
def _rows_again(
    x_ptr, y_ptr, scale, ids_x_ptr, ids_y_ptr, period, threshold, start, M, chunks,
    EXCLUDE: tl.constexpr, HAS_RANK: tl.constexpr,
    STRIDE_X: tl.constexpr, STRIDE_Y: tl.constexpr, D: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """(lse, rank) of rows from ``start`` on with a running maximum and ids of 64 bits."""
    rows = start + tl.arange(0, BLOCK_N)
    m = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_N,), tl.float32)
    rank = tl.zeros((BLOCK_N,), tl.int64)
    for tile in range(0, tl.cdiv(M, BLOCK_M)):
        s = dot_streamed(
            x_ptr, y_ptr, start, tile * BLOCK_M, chunks, BLOCK_N, BLOCK_M, STRIDE_X, STRIDE_Y, D,
            BLOCK_D, PRECISION,
        ) * scale  # fmt: skip
        cols = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        s = tl.where((cols < M)[None, :], s, float("-inf"))
        s = leave_out(s, rows, cols, ids_x_ptr, ids_y_ptr, period, EXCLUDE)
        m_new = tl.maximum(m, tl.max(s, 1))
        shift = finite_or_zero(m_new)
        total = total * exp(m - shift) + tl.sum(exp(s - shift[:, None]), 1)
        m = m_new
        if HAS_RANK:
            rank += tl.sum((s > threshold[:, None]).to(tl.int32), 1).to(tl.int64)
    return m + tl.log2(total) * LN_2, rank  # -inf where nothing was allowed: log2(0)


@kernel
def combine_kernel(
    out_ptr,  # [L]: lse or sum if FINAL, else unused
    rank_ptr,  # [L] int64 if FINAL, else unused
    s_ptr,  # [slots, L]: row slots, or one that holds folded columns, then one for each held block
    part_rank_ptr,  # [slots, L] int32
    x_ptr,  # [L, D] the side these sums belong to
    y_ptr,  # [M, D] the other one
    scale_ptr,  # 0-d
    ids_x_ptr,  # [L] int64
    ids_y_ptr,  # [M] int64
    wide_ptr,  # [wide_count] int32: whether an id was cut
    threshold_ptr,  # [L]
    positive_ptr,  # [pairs]; only with LOSS, as what follows
    loss_ptr,  # [programs] sums over the rows of a program, or [L] with PER_ROW
    L,
    M,
    period,
    wide_count,
    pairs,  # the positive of row r is that of pair r % pairs
    divisor,
    chunks,
    row_slots,  # the first so many slots are of the held side
    first_col,  # the first slot of columns; those between hold what was folded
    last,  # end of the slots
    share,  # tiles of a program of the forward kernel; a triangle has capacity instead
    capacity,  # programs of a launch of it, at most
    first_block,  # held block of slot first_col
    group,  # held blocks of a launch
    row_blocks,  # held blocks of all launches
    tiles,  # of a held block; in a triangle of the first one
    KIND: tl.constexpr,
    TRIANGLE: tl.constexpr,  # a held block has columns right of its diagonal only
    ROWS: tl.constexpr,  # there are slots of the held side: as many as programs shared a block
    HAS_RANK: tl.constexpr,
    FINAL: tl.constexpr,  # else fold the columns of a launch into slot first_col - 1
    LOSS: tl.constexpr,  # go on to softplus(lse - scale * positive)
    PER_ROW: tl.constexpr,
    EXCLUDE: tl.constexpr,
    STRIDE_X: tl.constexpr,
    STRIDE_Y: tl.constexpr,
    D: tl.constexpr,
    PRECISION: tl.constexpr,
    HELD: tl.constexpr,  # rows of a held block of the forward kernel
    RATIO: tl.constexpr,  # and how many of its tiles begin a held block
    SLOTS: tl.constexpr,  # added up at a time
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Add up the slots of each element, in a fixed tree of SLOTS at a time.

    Sums that no constant shift could serve, and ids that 32 bits could not, show here: such rows are
    computed again.
    """
    wait_turn()
    begin = tl.program_id(0) * BLOCK_N
    index = begin + tl.arange(0, BLOCK_N)
    ok = index < L
    block = index // HELD
    used = tl.zeros((BLOCK_N,), tl.int32)
    if ROWS:
        origin = block // group * group  # where the launch began
        if TRIANGLE:
            count = tl.minimum(group, row_blocks - origin)
            start, length = folded_block(block, origin, count, tiles, RATIO)
            # Every launch is dealt anew: its blocks are shorter than those of the one before.
            share = share_of_triangle(origin, count, tiles, capacity, RATIO)
        else:
            start = (block - origin).to(tl.int64) * tiles
            length = tiles
        used = slots_of(start, length, share)
    total = tl.zeros((BLOCK_N,), tl.float32)
    rank = tl.zeros((BLOCK_N,), tl.int64)
    low = 0
    if not FINAL:
        low = first_col - 1
    for base in range(low, last, SLOTS):
        # All of them at once: a thread has SLOTS * BLOCK_N / 128 loads on the way, whatever their number.
        slot = base + tl.arange(0, SLOTS)
        written = ok[None, :] & (slot < last)[:, None]
        if ROWS:
            written = written & ((slot >= row_slots)[:, None] | (slot[:, None] < used[None, :]))
        if TRIANGLE:
            behind = block[None, :] > (first_block + slot - first_col)[:, None]
            written = written & ((slot < first_col)[:, None] | behind)
        offset = slot.to(tl.int64)[:, None] * L + index[None, :]
        total += tl.sum(tl.load(s_ptr + offset, mask=written, other=0.0), 0)
        if HAS_RANK:
            part = tl.load(part_rank_ptr + offset, mask=written, other=0)
            rank += tl.sum(part, 0).to(tl.int64)
    if FINAL:
        if KIND == KIND_LSE:
            scale = tl.load(scale_ptr)
            lse = constant_shift(scale) + tl.log2(total) * LN_2
            lost = ok & (((total >= TINY) & (total <= HUGE)) == 0)
            if EXCLUDE == EXCLUDE_IDS:
                lost = lost | (any_wide(wide_ptr, wide_count) != 0)
            if tl.max(lost.to(tl.int32), 0) != 0:
                threshold = total
                if HAS_RANK:
                    threshold = tl.load(threshold_ptr + index)
                again, rank_again = _rows_again(
                    x_ptr, y_ptr, scale, ids_x_ptr, ids_y_ptr, period, threshold, begin, M, chunks,
                    EXCLUDE, HAS_RANK, STRIDE_X, STRIDE_Y, D, PRECISION, BLOCK_N, BLOCK_M, BLOCK_D,
                )  # fmt: skip
                lse = tl.where(lost, again, lse)
                rank = tl.where(lost, rank_again, rank)
            total = lse
            if LOSS:
                positive = tl.load(positive_ptr + index % pairs, mask=ok, other=0.0)
                loss = softplus2((lse - scale * positive) * LOG2_E) / divisor
                if PER_ROW:
                    tl.store(loss_ptr + index, loss, mask=ok)
                else:
                    tl.store(loss_ptr + tl.program_id(0), tl.sum(tl.where(ok, loss, 0.0), 0))
        tl.store(out_ptr + index, total, mask=ok)
        if HAS_RANK:
            tl.store(rank_ptr + index, rank, mask=ok)
    else:
        offset = tl.cast(first_col - 1, tl.int64) * L + index
        tl.store(s_ptr + offset, total, mask=ok)
        if HAS_RANK:
            tl.store(part_rank_ptr + offset, rank.to(tl.int32), mask=ok)
