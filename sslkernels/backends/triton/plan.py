# SPDX-License-Identifier: Apache-2.0
"""What every launcher shares: how much to split, where partial results go, which flags a tile has."""

from __future__ import annotations

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
# The most elements of a panel of G, 128 MiB of bfloat16: a few hundred rows for M = 256k, enough for
# the product's tiles.  More would only be read back from further away.
PANEL_WORDS = 1 << 26
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


def tile_flags(config: Config, x: Tensor, y: Tensor) -> dict[str, Any]:
    """The compile-time arguments that every kernel of S tiles takes."""
    D = x.shape[1]
    block_d, num_d = configs.chunks(config, D)
    return {
        "EVEN_M": y.shape[0] % config.block_m == 0,
        "EVEN_D": D == block_d * num_d,
        "PRECISION": configs.precision() if x.dtype == torch.float32 else "ieee",
        "NUM_D": num_d,
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
        self.s = torch.empty(slots, length, dtype=torch.float32, device=device)
        self.m = torch.empty_like(self.s) if kind == 0 else None
        self.rank = torch.empty_like(self.s, dtype=torch.int32) if has_rank else None

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
