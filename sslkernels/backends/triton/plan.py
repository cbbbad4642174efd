# SPDX-License-Identifier: Apache-2.0
"""What every launcher shares: how much to split, where partial results go, which flags a tile has."""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
from torch import Tensor

from . import configs, kernels
from .configs import Config
from .runtime import launch

# The floor of the slot bounds, in 4-byte words: 64 MiB.  Without it a small problem could not be
# split over a whole device.
SLOT_WORDS = 1 << 24
# A panel of G may have this many elements (128 MiB of bfloat16), or as many as y.  Every panel reads y
# twice: with D rows in a panel that is as many bytes as writing and reading its G, with fewer rows it
# would be more than all the rest, and more rows would save little.
PANEL_WORDS = 1 << 26
# gridDim.y and z of CUDA.
GRID_LIMIT = 65535
# Column tiles a program should at least visit, so that loading its rows pays.
MIN_TILES = 4
COMBINE_BLOCK = 256


def vector(t: Tensor | None) -> Tensor | None:
    """Kernels index vectors with stride 1; an expanded gradient (stride 0) is laid out once."""
    return None if t is None else t.contiguous()


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


def packed(*operands: Tensor) -> tuple[Tensor, ...]:
    """Operands as tiles are read: adjacent features, rows and start aligned, D = ``packed_width``.

    Other layouts (transposed, expanded, an odd D, a slice that starts anywhere) would be read element by
    element in every tile, which also costs registers.  They are copied once, O((N + M) * D), and a D that
    does not fit is filled up with zeros, which add nothing to a product; see ``trimmed``.
    """
    width = configs.packed_width(operands[0].shape[1], operands[0].dtype)
    return tuple(_packed(x, width) for x in operands)


def _packed(x: Tensor, width: int) -> Tensor:
    N, D = x.shape
    if D < width:
        return torch.nn.functional.pad(x, (0, width - D))
    aligned = x.stride(0) * x.element_size() % configs.ROW_BYTES == 0 and x.data_ptr() % 16 == 0
    if N == 0 or (aligned and x.stride(1) == 1):
        return x
    return x.clone(memory_format=torch.contiguous_format)


def trimmed(x: Tensor, D: int) -> Tensor:
    """A result without the features that ``packed`` added."""
    return x if x.shape[1] == D else x[:, :D].contiguous()


def alignment(*operands: Tensor) -> int:
    """The largest power of two, to 16, that divides D and the row strides (in elements)."""
    return math.gcd(16, *(n for t in operands for n in (t.shape[1], t.stride(0))))


def tile_flags(config: Config, x: Tensor, y: Tensor) -> dict[str, Any]:
    """The compile-time arguments that every kernel of S tiles takes."""
    D = x.shape[1]
    block_d, num_d = configs.chunks(config, D)
    return {
        "EVEN_D": D == block_d * num_d,
        "ALIGN": alignment(x, y),
        "PRECISION": configs.precision() if x.dtype == torch.float32 else "ieee",
        "NUM_D": num_d if config.hold_x else 1,  # a loop over D is not part of what is compiled
        "BLOCK_N": config.block_n,
        "BLOCK_M": config.block_m,
        "BLOCK_D": block_d,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }


def splits_for(device: torch.device, row_blocks: int, tiles: int, most: int) -> tuple[int, int]:
    """How many programs share one row block, and the column tiles each of them visits.

    Enough to give every multiprocessor a few programs, but never fewer than ``MIN_TILES`` tiles a
    program nor more than ``most`` splits (the memory bound).  Depends on shapes and the device
    model only: the same machine gives the same bits.
    """
    wanted = triton.cdiv(configs.target_programs(device), max(row_blocks, 1))
    splits = max(1, min(wanted, tiles // MIN_TILES, most))
    per_split = max(1, triton.cdiv(tiles, splits))
    return max(1, triton.cdiv(tiles, per_split)), per_split


def slot_words(N: int, M: int, D: int) -> int:
    """Words of partial results that a call may hold: O((N + M) * D)."""
    return max((N + M) * D, SLOT_WORDS)


class Slots:
    """Partial results [slots, length]: running maximum (lse only), sum, rank (if asked)."""

    def __init__(self, kind: int, has_rank: bool, slots: int, length: int, device: torch.device):
        self.kind = kind
        self.s: Tensor = torch.empty(slots, length, dtype=torch.float32, device=device)
        self.m: Tensor | None = torch.empty_like(self.s) if kind == 0 else None
        self.rank: Tensor | None = torch.empty_like(self.s, dtype=torch.int32) if has_rank else None

    def clear(self, slot: int) -> None:
        """Make one slot the neutral element, to be folded into."""
        self.s[slot].zero_()
        if self.m is not None:
            self.m[slot].fill_(float("-inf"))
        if self.rank is not None:
            self.rank[slot].zero_()

    def pointers(self, slot: int) -> tuple[Tensor | None, Tensor, Tensor | None]:
        """Maxima, sums and ranks of one slot."""
        return (
            None if self.m is None else self.m[slot],
            self.s[slot],
            None if self.rank is None else self.rank[slot],
        )

    def combine(  # noqa: D102
        self,
        out: Tensor | None,  # None: fold into slot ``first``
        rank: Tensor | None,
        first: int,
        last: int,
        triangle: tuple[int, int, Config] | None = None,  # first column slot, its row block, tiles
    ) -> None:
        length = self.s.shape[1]
        first_col_slot, first_block, config = triangle or (last, 0, None)
        launch(
            kernels.combine_kernel,
            (triton.cdiv(length, COMBINE_BLOCK),),
            self.s.device,
            out,
            rank,
            self.m,
            self.s,
            self.rank,
            length,
            first,
            last,
            first_col_slot,
            first_block,
            KIND=self.kind,
            TRIANGLE=config is not None,
            HAS_RANK=self.rank is not None,
            FINAL=out is not None,
            BLOCK_N=1 if config is None else config.block_n,
            BLOCK_M=1 if config is None else config.block_m,
            BLOCK_L=COMBINE_BLOCK,
        )
