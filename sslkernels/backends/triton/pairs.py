# SPDX-License-Identifier: Apache-2.0
"""Which pairs of a tile count, and which tiles a program visits.

**Pairs.**  Ids are 64 bits wide, a compare of 64 bits costs two instructions and its operands twice the
registers.  So ``narrow_kernel`` takes the low halves once and says whether that lost anything; it also
notes the smallest and largest id of every SPAN rows, by which a tile knows that none of its pairs can be
equal.  Where ids are row numbers modulo a period, a tile knows it without reading anything.

**Tiles.**  All tiles of a launch lie on one line, held block after held block, and every program takes
``share`` of them in a row: whatever the shape, no program has more than one tile more to do than another.  A
block that several programs share has a slot for each of them, in order.  A triangle is folded first: the
p-th held block from the front and the p-th from the back together have as many tiles for every p.
"""

import triton
import triton.language as tl

from .tiles import EXCLUDE_IDS, SPAN, kernel, wait_turn


@triton.jit
def real_branch(ptr):
    """Keep a branch a branch: the compiler turns cheap ones into selections, which every tile pays for.

    It may not execute a volatile read that the program does not reach.
    """
    tl.load(ptr, volatile=True)


@triton.jit
def first_multiple(low, period):
    """Smallest multiple of the period that is not below ``low``."""
    multiple = low // period * period  # towards 0
    return tl.where(multiple < low, multiple + period, multiple)


@triton.jit
def span_of(span_ptr, first, ROWS: tl.constexpr):
    """(Smallest, largest) short id of ROWS rows from ``first`` on, which is a multiple of ROWS."""
    span = first // SPAN
    low = tl.load(span_ptr + span * 2)
    high = tl.load(span_ptr + span * 2 + 1)
    for i in tl.static_range(1, (ROWS + SPAN - 1) // SPAN):
        low = tl.minimum(low, tl.load(span_ptr + (span + i) * 2))
        high = tl.maximum(high, tl.load(span_ptr + (span + i) * 2 + 1))
    return low, high


@triton.jit
def any_wide(wide_ptr, count):
    """Whether some id does not fit into 32 bits: ``narrow_kernel`` left a flag for each of its programs."""
    found = 0
    for start in range(0, count, 256):
        index = start + tl.arange(0, 256)
        found = found | tl.max(tl.load(wide_ptr + index, mask=index < count, other=0), 0)
    return found


@triton.jit
def leave_out(s, rows, cols, ids_x_ptr, ids_y_ptr, period, EXCLUDE: tl.constexpr):
    """-inf for pairs of equal ids, all 64 bits of them; rows along axis 0."""
    if EXCLUDE % 2 == 1:
        s = tl.where((rows % period)[:, None] != (cols % period)[None, :], s, float("-inf"))
    if EXCLUDE == EXCLUDE_IDS:
        wide_x = tl.load(ids_x_ptr + rows)
        wide_y = tl.load(ids_y_ptr + cols)
        s = tl.where(wide_x[:, None] != wide_y[None, :], s, float("-inf"))
    return s


@kernel
def narrow_kernel(
    short_ptr,  # [count] int32
    span_ptr,  # [programs * SPANS, 2] int32
    wide_ptr,  # [programs] int32
    ids_ptr,  # [count] int64
    count,
    SPANS: tl.constexpr,  # a program reads SPANS * SPAN ids
):
    """Low halves of ids, the smallest and largest of every SPAN, and whether 32 bits were too few."""
    wait_turn()
    span = tl.program_id(0) * SPANS + tl.arange(0, SPANS)
    index = span[:, None] * SPAN + tl.arange(0, SPAN)[None, :]
    ok = index < count
    ids = tl.load(ids_ptr + index, mask=ok, other=0)
    short = ids.to(tl.int32)
    tl.store(short_ptr + index, short, mask=ok)
    low = tl.min(tl.where(ok, short, 0x7FFFFFFF), 1)
    high = tl.max(tl.where(ok, short, -0x80000000), 1)
    # Also those beyond the ids, which are empty: a block has whole spans.
    tl.store(span_ptr + span * 2, low)
    tl.store(span_ptr + span * 2 + 1, high)
    wide = tl.max(tl.max((short.to(tl.int64) != ids).to(tl.int32), 1), 0)
    tl.store(wide_ptr + tl.program_id(0), wide)


# ---- the line of tiles ---------------------------------------------------------------------------


@triton.jit
def share_of_line(share, tiles, total):
    """What this program takes of a line of blocks of ``tiles`` tiles.

    Returns:
        (First block, its first tile, how many tiles from there on, last block, slot of the first block).
        Blocks after the first begin with this program, so that it writes their slot 0.
    """
    # 64 bits once, and not in a loop: a line may be longer than 2^31.
    begin = tl.program_id(0).to(tl.int64) * share
    first = begin // tiles
    lo = (begin - first * tiles).to(tl.int32)
    count = tl.minimum(tl.cast(total, tl.int64) - begin, share).to(tl.int32)
    slot = tl.program_id(0) - (first * tiles // share).to(tl.int32)
    first = first.to(tl.int32)
    return first, lo, count, first + (lo + count - 1) // tiles, slot


@triton.jit
def slots_of(start, length, share):
    """How many programs share a block whose tiles are [start, start + length) of the line."""
    return ((start + length - 1) // share - start // share + 1).to(tl.int32)


@triton.jit
def folded(first_block, blocks, tiles, RATIO: tl.constexpr):
    """Tiles of each pair of held blocks: the p-th from the front and the p-th from the back.

    Block b begins at its diagonal, tile b * RATIO, and has ``tiles`` less that many.
    """
    return 2 * tiles - (2 * first_block + blocks - 1) * RATIO


@triton.jit
def folded_block(block, first_block, blocks, tiles, RATIO: tl.constexpr):
    """(Start on the line, number of tiles) of a held block of a folded triangle."""
    place = block - first_block
    mirror = blocks - 1 - place
    pair = tl.minimum(place, mirror)
    start = pair.to(tl.int64) * folded(first_block, blocks, tiles, RATIO)
    near = tiles - (first_block + pair) * RATIO
    return start + tl.where(place > mirror, near, 0), tiles - block * RATIO


@triton.jit
def share_of_triangle(first_block, blocks, tiles, capacity, RATIO: tl.constexpr):
    """Tiles of a program where ``capacity`` of them share a folded triangle: as ``plan.triangle``."""
    skipped = RATIO * (blocks.to(tl.int64) * (2 * first_block + blocks - 1)) // 2
    total = blocks.to(tl.int64) * tiles - skipped
    return tl.maximum((total + capacity - 1) // capacity, 1)
