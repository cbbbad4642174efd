# SPDX-License-Identifier: Apache-2.0
"""What launchers share: operands, pairs that are left out, how tiles are dealt, flags of a tile."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from . import configs, kernels, pairs
from .configs import Config
from .runtime import launch
from .sizes import cdiv, next_power_of_2

# The floor of the slot bounds, in 4-byte words: 64 MiB.  Without it a small problem could not be
# split over a whole device.
SLOT_WORDS = 1 << 24
# A panel of G may have this many elements (128 MiB of bfloat16), or as many as y.  Every panel reads y
# twice: with D rows in a panel that is as many bytes as writing and reading its G, with fewer rows it
# would be more than all the rest, and more rows would save little.
PANEL_WORDS = 1 << 26
# Rows of a program of the combine kernel: with 128 slots at a time 32 loads a thread are on the way.
COMBINE_ROWS = 32
# Operands have a multiple of this many rows (``packed``): no configuration has larger blocks.
WHOLE = 128
NARROW_SPANS = 16  # of 64 ids: what one program of narrow_kernel and weigh_kernel reads
SPAN = 64


def vector(t: Tensor | None) -> Tensor | None:
    """Kernels index vectors with stride 1 and read whole blocks of them.

    An expanded gradient (stride 0) is laid out once; one that ends within a block is filled up with zeros.
    """
    if t is None or len(t) % WHOLE == 0:
        return None if t is None else t.contiguous()
    return torch.nn.functional.pad(t, (0, -len(t) % WHOLE))


def empty_vector(n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A vector that kernels write and others read a block at a time."""
    return torch.empty(n + -n % WHOLE, dtype=dtype, device=device)


def check(name: str, q: Tensor, k: Tensor | None) -> None:
    """Raise a TypeError or ValueError for operands that the kernels do not serve."""
    if q.dtype not in configs.DTYPES:
        raise TypeError(
            f"{name}: the triton backend computes float32, bfloat16 and float16, got {q.dtype}; "
            "use the chunked backend for float64"
        )
    if q.device.type != "cuda" and not configs.interpreting():
        raise ValueError(
            f"{name}: the triton backend needs CUDA tensors, got {q.device}; on a CPU it runs only in "
            "Triton's interpreter (TRITON_INTERPRET=1, set before triton is imported)"
        )
    if k is not None and (k.dtype != q.dtype or k.device != q.device):
        raise ValueError(
            f"{name}: q and k must have the same dtype and device, got {q.dtype} on {q.device} and "
            f"{k.dtype} on {k.device}"
        )


# ---- operands ------------------------------------------------------------------------------------


def packed(*operands: Tensor, repeat: bool = False) -> tuple[Tensor, ...]:
    """Operands as tiles are read: adjacent features, rows and start aligned, D = ``packed_width``.

    Other layouts (transposed, expanded, an odd D, a slice that starts anywhere) would be read element by
    element in every tile, which also costs registers.  They are copied once, O((N + M) * D), and a D that
    does not fit is filled up with zeros, which add nothing to a product; see ``trimmed``.  Rows that are no
    whole blocks are copied as well and filled up with zeros, or with the last one (``repeat``).
    """
    width = configs.packed_width(operands[0].shape[1], operands[0].dtype)
    return tuple(_packed(x, width, repeat) for x in operands)


def _packed(x: Tensor, width: int, repeat: bool) -> Tensor:
    N, D = x.shape
    if N == 0:
        return x.new_empty(0, width)
    if D < width or N % WHOLE:
        # Views of the whole buffer: what is behind row N is there to be read.
        buffer = x.new_empty(N + -N % WHOLE, width)
        buffer[:N, :D] = x
        buffer[N:, :D] = x[N - 1] if repeat else 0.0
        buffer[:, D:] = 0.0
        return buffer[:N]
    aligned = x.stride(0) * x.element_size() % configs.ROW_BYTES == 0 and x.data_ptr() % 16 == 0
    if aligned and x.stride(1) == 1:
        return x
    return x.clone(memory_format=torch.contiguous_format)


def trimmed(x: Tensor, D: int) -> Tensor:
    """A result without the features that ``packed`` added."""
    return x if x.shape[1] == D else x[:, :D].contiguous()


def tile_flags(
    config: Config, dtype: torch.dtype, D: int, stride_x: int, stride_y: int
) -> dict[str, Any]:
    """The compile-time arguments that every kernel of S tiles takes.

    Raises:
        ValueError: If a block is larger than what operands are filled up to.
    """
    if WHOLE % config.block_n or WHOLE % config.block_m:
        raise ValueError(
            f"triton backend: block_n and block_m must divide {WHOLE}, got {config.block_n} and "
            f"{config.block_m}"
        )
    block_d, num_d = configs.chunks(config, D)
    return {
        "STRIDE_X": stride_x,
        "STRIDE_Y": stride_y,
        "D": D,
        "PRECISION": configs.precision() if dtype == torch.float32 else "ieee",
        "NUM_D": num_d if config.hold_x else 1,  # a loop over D is not part of what is compiled
        "BLOCK_N": config.block_n,
        "BLOCK_M": config.block_m,
        "BLOCK_D": block_d,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }


def ratio_of(config: Config) -> int:
    """Tiles that begin a held block: a triangle is visited by whole tiles.

    Raises:
        ValueError: If a tile has more swept rows than held ones.
    """
    if config.block_n % config.block_m:
        raise ValueError(
            "triton backend: block_n must be a multiple of block_m where one triangle is visited, "
            f"got {config.block_n} and {config.block_m}"
        )
    return config.block_n // config.block_m


def slots_at_a_time(slots: int) -> int:
    """How many partial results a combine kernel loads before it adds: enough to hide their latency.

    Two values and no more, because each is another binary.  Four whole shares of a block are five in a last
    batch that is not whole: the same binary takes both.
    """
    return 4 if slots < 4 else 16


def combined_at_a_time(slots: int) -> int:
    """The same for the combine kernel of the forward pass, whose partial results are single numbers."""
    return 16 if slots <= 16 else 128


@configs.planned
def again_flags(
    device: torch.device,
    dtype: torch.dtype,
    D: int,
    stride_x: int,
    stride_y: int,
    rows: int,
    slots: int,
) -> dict[str, Any]:
    """Compile-time arguments of a combine kernel: those of the tiles it may have to compute again."""
    half = dtype != torch.float32
    return {
        "STRIDE_X": stride_x,
        "STRIDE_Y": stride_y,
        "D": D,
        "PRECISION": "ieee" if half else configs.precision(),
        "SLOTS": slots,
        "BLOCK_N": rows,
        "BLOCK_M": 64 if half else 32,
        "BLOCK_D": min(64 if half else 32, max(16, next_power_of_2(D))),
        "num_warps": 4,
        "num_stages": 2,
    }


def chunk_count(flags: dict[str, Any]) -> int:
    """Chunks of D in a loop over them."""
    return int(cdiv(flags["D"], flags["BLOCK_D"]))


# ---- pairs that are left out ---------------------------------------------------------------------


@dataclass(frozen=True)
class Ids:
    """Ids of one side, as they are and as tiles compare them: see ``pairs.py``."""

    ids: Tensor  # [n] int64
    short: Tensor  # [n] int32
    span: Tensor  # [spans, 2] int32


@dataclass(frozen=True)
class Excluded:
    """Which pairs are left out: none, multiples of a period, or equal ids."""

    mode: int = 0  # pairs.EXCLUDE_*
    period: int = 0
    x: Ids | None = None
    y: Ids | None = None
    wide: Tensor | None = None  # [wide_count] int32
    wide_count: int = 0

    @classmethod
    def by_period(cls, period: int) -> Excluded:
        """Pairs whose row numbers differ by a multiple of the period: nothing has to be read."""
        return cls(1 if period >= 2 * WHOLE else 3, period)

    @classmethod
    def by_ids(cls, ids_x: Tensor | None, ids_y: Tensor | None) -> Excluded:
        """Pairs of equal ids; ids_y None: the same as ids_x.  One or two launches."""
        if ids_x is None:
            return cls()
        sides = [ids_x] + ([] if ids_y is None else [ids_y])
        per_program = NARROW_SPANS * SPAN
        programs = [cdiv(len(ids), per_program) for ids in sides]
        wide = torch.empty(sum(programs), dtype=torch.int32, device=ids_x.device)
        made = []
        for ids, count, first in zip(sides, programs, (0, programs[0]), strict=False):
            short = empty_vector(len(ids), torch.int32, ids.device)
            span = torch.empty(count * NARROW_SPANS, 2, dtype=torch.int32, device=ids_x.device)
            whole = cast(Tensor, vector(ids))
            if count:
                launch(
                    pairs.narrow_kernel, (count,), ids_x.device, short, span, wide[first:], whole,
                    len(ids), SPANS=NARROW_SPANS,
                )  # fmt: skip
            made.append(Ids(whole, short, span))
        return cls(2, 0, made[0], made[-1], wide, len(wide))

    def swapped(self) -> Excluded:
        """The same with the roles of the sides exchanged."""
        return Excluded(self.mode, self.period, self.y, self.x, self.wide, self.wide_count)

    def shorts(self) -> tuple[Tensor | None, ...]:
        """short_x, short_y, span_x, span_y."""
        if self.x is None or self.y is None:
            return (None,) * 4
        return self.x.short, self.y.short, self.x.span, self.y.span

    def ids(self) -> tuple[Tensor | None, Tensor | None]:
        """ids_x, ids_y."""
        return (None, None) if self.x is None or self.y is None else (self.x.ids, self.y.ids)


# ---- how tiles are dealt -------------------------------------------------------------------------


@dataclass(frozen=True)
class Line:
    """The tiles of a launch on one line (``pairs.py``), dealt in equal shares."""

    blocks: int  # held blocks
    tiles: int  # of a held block; in a triangle of the first one
    total: int
    share: int  # of one program
    slots: int  # most programs that share a block

    @property
    def programs(self) -> int:
        """The grid."""
        return int(cdiv(self.total, self.share))


def line(blocks: int, tiles: int, capacity: int, most_slots: int) -> Line:
    """Every held block against every tile.

    Args:
        blocks: Held blocks.
        tiles: Of each.
        capacity: Programs that run at once: more would wait for a second wave.
        most_slots: Programs that may share a block: the memory bound.
    """
    share = max(1, cdiv(blocks * tiles, capacity))
    if most_slots < 2:
        share = cdiv(share, tiles) * tiles
    elif most_slots == 2:
        share = max(share, tiles - 1)
    else:
        share = max(share, (tiles - 2) // (most_slots - 1) + 1)
    return Line(blocks, tiles, blocks * tiles, share, _slots(tiles, share))


def _slots(length: int, share: int) -> int:
    """Most programs that can share a block of so many tiles, wherever it begins on the line."""
    if share % length == 0:
        return 1
    if length % share == 0:
        return length // share
    return (length - 2) // share + 2 if length > 1 else 1


def folded_line(first: int, blocks: int, tiles: int, ratio: int, share: int) -> Line:
    """A triangle: block b has ``tiles`` less b * ratio; blocks first, ..., first + blocks - 1."""
    total = blocks * tiles - ratio * (blocks * first + blocks * (blocks - 1) // 2)
    longest = tiles - first * ratio
    slots = (longest - 2) // share + 2 if longest > 1 else 1
    return Line(blocks, tiles, total, share, slots)


def triangle(first: int, blocks: int, tiles: int, ratio: int, capacity: int) -> Line:
    """``folded_line`` in as many shares as programs run at once; ``pairs.share_of_triangle`` knows it too."""
    total = folded_line(first, blocks, tiles, ratio, 1).total
    return folded_line(first, blocks, tiles, ratio, max(1, cdiv(total, capacity)))


def slot_words(N: int, M: int, D: int) -> int:
    """Words of partial results that a call may hold: O((N + M) * D)."""
    return max((N + M) * D, SLOT_WORDS)


@dataclass(frozen=True)
class Loss:
    """What the last combine kernel makes of log-sum-exps: softplus(lse_r - scale * positive_r mod n)."""

    positive: Tensor  # [n], or longer
    n: int
    loss: Tensor  # [rows], or one sum a program of the combine kernel
    divisor: float
    per_row: bool


class Sums:
    """Partial sums [slots, length] of one side, and ranks if asked.

    Row slots come first (as many as programs share a block), then a slot of folded columns if there are
    several launches, then a slot for each held block of a launch.
    """

    def __init__(self, slots: int, length: int, has_rank: bool, device: torch.device) -> None:
        """See the class."""
        self.s: Tensor = torch.empty(slots, length, dtype=torch.float32, device=device)
        self.rank: Tensor | None = torch.empty_like(self.s, dtype=torch.int32) if has_rank else None

    def clear(self, slot: int) -> None:
        """Make one slot zero, to be folded into."""
        self.s[slot].zero_()
        if self.rank is not None:
            self.rank[slot].zero_()

    def at(self, slot: int) -> tuple[Tensor, Tensor | None]:
        """Sums and ranks from a slot on."""
        if slot == 0:
            return self.s, self.rank
        return self.s[slot:], None if self.rank is None else self.rank[slot:]

    def combine(  # noqa: D102
        self,
        kind: int,
        out: Tensor | None,  # None: fold columns into slot first_col - 1
        rank: Tensor | None,
        x: Tensor,
        y: Tensor,
        scale: Tensor,
        excluded: Excluded,
        threshold: Tensor | None,
        config: Config,
        shared: Line,
        capacity: int,
        row_slots: int,  # 0: no slots of the held side
        first_col: int,
        last: int,
        first_block: int,
        group: int,
        triangle: bool,
        loss: Loss | None = None,
    ) -> None:
        length = self.s.shape[1]
        flags = again_flags(
            x.device, x.dtype, x.shape[1], x.stride(0), y.stride(0), COMBINE_ROWS,
            combined_at_a_time(last),
        )  # fmt: skip
        launch(
            kernels.combine_kernel,
            (cdiv(length, COMBINE_ROWS),),
            self.s.device,
            out,
            rank,
            self.s,
            self.rank,
            x,
            y,
            scale,
            *excluded.ids(),
            excluded.wide,
            threshold,
            None if loss is None else loss.positive,
            None if loss is None else loss.loss,
            length,
            y.shape[0],
            excluded.period,
            excluded.wide_count,
            1 if loss is None else loss.n,
            1.0 if loss is None else loss.divisor,
            chunk_count(flags),
            row_slots,
            first_col,
            last,
            shared.share,
            capacity,
            first_block,
            group,
            cdiv(length, config.block_n) if row_slots else 0,
            shared.tiles,
            KIND=kind,
            TRIANGLE=triangle,
            ROWS=row_slots > 0,
            HAS_RANK=self.rank is not None,
            FINAL=out is not None,
            LOSS=loss is not None,
            PER_ROW=loss is not None and loss.per_row,
            EXCLUDE=excluded.mode,
            HELD=config.block_n,
            RATIO=config.block_n // config.block_m,
            **flags,
        )
