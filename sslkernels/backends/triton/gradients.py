# SPDX-License-Identifier: Apache-2.0
"""dx = factor * G y, fused or by panels of G: see the comment above the kernels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import configs, kernels_backward
from .plan import (
    NARROW_SPANS,
    PANEL_WORDS,
    SPAN,
    WHOLE,
    Excluded,
    Line,
    chunk_count,
    empty_vector,
    line,
    ratio_of,
    slot_words,
    slots_at_a_time,
    tile_flags,
)
from .runtime import launch
from .sizes import cdiv, next_power_of_2


def _lift(drow: Tensor | None, dcol: Tensor | None) -> Tensor:
    """[1]: the power of two that brings the largest finite |gradient| into [1/2, 1); 1 if all are 0."""
    given = [g for g in (drow, dcol) if g is not None]
    lift = torch.empty(1, dtype=torch.float32, device=given[0].device)
    launch(
        kernels_backward.lift_kernel, (1,), lift.device, lift, given[0], given[-1], len(given[0]),
        len(given[-1]), BLOCK=4096, num_warps=8,
    )  # fmt: skip
    return lift


@dataclass
class Side:
    """What G needs of its rows or of its columns."""

    vectors: Tensor  # [n, D]
    lse: Tensor | None
    grad: Tensor | None


@dataclass
class Weights:
    """One factor a row of a side, and for which spans of rows it may be used."""

    weight: Tensor  # [n]
    calm: Tensor  # [spans] int32

    @classmethod
    def make(cls, side: Side, center: Tensor, lift: Tensor | None) -> Weights:
        """One launch; the first element of ``center`` is c."""
        if side.lse is None or side.grad is None:
            raise ValueError("triton backend: weights need a log-sum-exp and a gradient")
        n = len(side.vectors)
        weight = empty_vector(n, torch.float32, side.grad.device)
        calm = torch.empty(len(weight) // SPAN, dtype=torch.int32, device=weight.device)
        launch(
            kernels_backward.weigh_kernel, (cdiv(n, NARROW_SPANS * SPAN),), weight.device,
            weight, calm, side.lse, side.grad, center, lift, n, len(weight), HAS_LIFT=lift is not None,
            SPANS=NARROW_SPANS,
        )  # fmt: skip
        return cls(weight, calm)


def gradient(
    kind: int,
    x: Side,
    y: Side,
    scale: Tensor,
    bias: Tensor | None,
    factor: Tensor,
    excluded: Excluded,
    want_dbias: bool,
) -> tuple[Tensor, Tensor | None]:
    """dx [N, D] = factor * G y and sum G, where the rows of G belong to x."""
    N, D = x.vectors.shape
    M, device, dtype = y.vectors.shape[0], x.vectors.device, x.vectors.dtype
    if N == 0 or M == 0 or (x.grad is None and y.grad is None):
        zero = torch.zeros((), dtype=torch.float32, device=device) if want_dbias else None
        return torch.zeros(N, D, dtype=torch.float32, device=device), zero
    lift = _lift(x.grad, y.grad) if dtype == torch.float16 else None
    weighed = None
    if kind == 0 and x.lse is not None and x.grad is not None and y.grad is not None:
        weights = Weights.make(x, x.lse, lift)
        weighed = (x.lse, weights, weights if y is x else Weights.make(y, x.lse, lift))
    parts, total, shared, held = partial_gradient(
        kind, x, y, scale, bias, factor, excluded, want_dbias, lift, weighed
    )
    return parts[0] if shared is None else gathered(parts, shared, held), total


@configs.planned
def fused_tiles(
    device: torch.device, dtype: torch.dtype, N: int, M: int, D: int, stride_x: int, stride_y: int
) -> tuple[Line, int, dict[str, Any]] | None:
    """(How tiles are dealt, rows of a held block, flags) of backward and attend; None: by panels."""
    config = configs.choose("fused", device, D, dtype)
    if config is None:
        return None
    shared = line(
        cdiv(N, config.block_n), cdiv(M, config.block_m), configs.capacity(device, config),
        slot_words(N, M, D) // (N * D),
    )  # fmt: skip
    return shared, config.block_n, tile_flags(config, dtype, D, stride_x, stride_y)


def partial_gradient(
    kind: int,
    x: Side,
    y: Side,
    scale: Tensor,
    bias: Tensor | None,
    factor: Tensor,
    excluded: Excluded,
    want_dbias: bool,
    lift: Tensor | None,
    weighed: tuple[Tensor, Weights, Weights] | None,
) -> tuple[Tensor, Tensor | None, Line | None, int]:
    """``gradient`` whose last sum is left to the caller.

    Args:
        kind: As for ``gradient``, which the arguments are those of; there are rows, columns and gradients.
        x: Rows.
        y: Columns.
        scale: 0-d.
        bias: 0-d or None.
        factor: What dx is multiplied with.
        excluded: Pairs that are left out.
        want_dbias: Whether to sum G.
        lift: A power of two, for float16.
        weighed: The log-sum-exp that stands for all, weights of the rows and of the columns; where both
            sides have a gradient.

    Returns:
        (Partial sums [slots, N, D], sum G or None, how they were dealt, rows of a held block); dealt None:
        there is one slot, and it is complete.
    """
    N, D = x.vectors.shape
    M, device, dtype = y.vectors.shape[0], x.vectors.device, x.vectors.dtype
    center, weights_x, weights_y = (None, None, None) if weighed is None else weighed
    inputs = (
        x.vectors, y.vectors, scale, bias, factor, center, lift,
        None if weights_x is None else weights_x.weight, None if weights_y is None else weights_y.weight,
        None if weights_x is None else weights_x.calm, None if weights_y is None else weights_y.calm,
        x.lse, x.grad, y.lse, y.grad, *excluded.ids(), *excluded.shorts(), excluded.wide,
    )  # fmt: skip
    sizes = (N, M, excluded.period, excluded.wide_count)
    flags = {
        "KIND": kind,
        "HAS_ROW": x.grad is not None,
        "HAS_COL": y.grad is not None,
        "HAS_BIAS": bias is not None,
        "EXCLUDE": excluded.mode,
        "HAS_LIFT": lift is not None,
        "WANT_DBIAS": want_dbias,
    }
    fused = fused_tiles(device, dtype, N, M, D, x.vectors.stride(0), y.vectors.stride(0))
    if fused is None:
        dx, total = _by_panels(x is y, x.vectors, y.vectors, inputs, sizes, flags, factor, lift)
        return dx[None], total, None, 1
    shared, held, tiles = fused
    parts = torch.empty(shared.slots, N, D, dtype=torch.float32, device=device)
    sums = torch.empty(shared.programs, dtype=torch.float32, device=device) if want_dbias else None
    launch(
        kernels_backward.backward_kernel, (shared.programs,), device, parts, sums, *inputs, *sizes,
        shared.share, shared.total, **flags, **tiles,
    )  # fmt: skip
    total = None if sums is None else sums.sum()
    return parts, total, shared if shared.slots > 1 else None, held


def gathered_by(shared: Line | None) -> tuple[int, int]:
    """(Tiles of a program, tiles of a block): by which a kernel knows who shared a block."""
    return (1, 1) if shared is None else (shared.share, shared.tiles)


def gathered(
    parts: Tensor, shared: Line, held: int, out: Tensor | None = None, features: int = 0
) -> Tensor:
    """[N, D]: the sum of what programs that shared a block left in ``parts`` [slots, N, D].

    Args:
        parts: Partial sums; a block that fewer programs shared has written fewer of them.
        shared: How the tiles were dealt.
        held: Rows of a block.
        out: Where the sum goes.
        features: Of a block; 0: all.
    """
    if shared.slots == 1:
        return parts[0]
    _, N, D = parts.shape
    dx = torch.empty_like(parts[0]) if out is None else out
    rows = min(held, 16)
    width = min(128, features or next_power_of_2(D))
    launch(
        kernels_backward.gather_kernel,
        (cdiv(N, rows), cdiv(D, width)),
        parts.device,
        dx,
        parts,
        N,
        shared.share,
        shared.tiles,
        cdiv(D, features) if features else 1,
        D=D,
        HELD=held,
        FEATURES=features or next_power_of_2(D),
        SLOTS=slots_at_a_time(shared.slots),
        BLOCK_N=rows,
        BLOCK_D=width,
    )
    return dx


def _by_panels(
    same: bool,
    x: Tensor,
    y: Tensor,
    inputs: tuple[Tensor | None, ...],
    sizes: tuple[int, ...],
    flags: dict[str, Any],
    factor: Tensor,
    lift: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """The same by panels of G: rows * M words at a time, within the memory bound."""
    (N, D), M, device, dtype = x.shape, y.shape[0], x.device, x.dtype
    config, product = (
        configs.require("panel", device, D, dtype),
        configs.require("product", device, D, dtype),
    )
    words = min(slot_words(N, M, D), max(PANEL_WORDS, M * D))
    row_blocks, tiles = cdiv(N, config.block_n), cdiv(M, config.block_m)
    blocks = max(1, min(row_blocks, words // (M * config.block_n)))
    # G = G^T: one triangle of it is computed where all of it is there at once.
    symmetric = same and blocks == row_blocks
    if symmetric:
        ratio_of(config)  # raises where a tile would reach below the held block
    ld = M + -M % WHOLE
    panel = torch.empty(min(N, blocks * config.block_n), ld, dtype=dtype, device=device)
    dx = torch.empty(N, D, dtype=torch.float32, device=device)
    # One tile a program; where x is held as many as make one wave.
    share = 1
    if config.hold_x:
        programs = configs.capacity(device, config) * (2 if symmetric else 1)
        share = cdiv(tiles, max(1, programs // blocks))
    starts = range(0, row_blocks, blocks)
    grids = [min(blocks, row_blocks - first) * cdiv(tiles, share) for first in starts]
    sums = None
    if flags["WANT_DBIAS"]:
        sums = torch.empty(sum(grids), dtype=torch.float32, device=device)
    panel_flags = tile_flags(config, dtype, D, x.stride(0), y.stride(0))
    for number, first_block in enumerate(starts):
        here = min(blocks, row_blocks - first_block)
        start = first_block * config.block_n
        rows = min(N - start, here * config.block_n)
        launch(
            kernels_backward.panel_kernel,
            (grids[number],),
            device,
            panel,
            None if sums is None else sums[sum(grids[:number]) :],
            *inputs[:4],
            *inputs[5:],
            *sizes,
            chunk_count(panel_flags),
            share,
            first_block,
            here,
            ld,
            SYMMETRIC=symmetric,
            HOLD_X=config.hold_x,
            PREFETCH=config.prefetch,
            **flags,
            **panel_flags,
        )
        width, feature_blocks = configs.chunks(product, D)
        shared = line(
            feature_blocks * cdiv(rows, product.block_n),
            cdiv(M, product.block_m),
            configs.capacity(device, product),
            max(1, words // (rows * D)),
        )
        out = dx[start : start + rows]
        parts = out[None]
        if shared.slots > 1:
            parts = torch.empty(shared.slots, rows, D, dtype=torch.float32, device=device)
        launch(
            kernels_backward.product_kernel,
            (shared.programs,),
            device,
            parts,
            panel,
            y,
            factor,
            lift,
            rows,
            M,
            shared.share,
            shared.total,
            feature_blocks,
            ld,
            HAS_LIFT=lift is not None,
            STRIDE_Y=y.stride(0),
            D=D,
            PRECISION=configs.precision() if dtype == torch.float32 else "ieee",
            BLOCK_N=product.block_n,
            BLOCK_M=product.block_m,
            BLOCK_D=width,
            num_warps=product.num_warps,
            num_stages=product.num_stages,
        )
        if shared.slots > 1:
            gathered(parts, shared, product.block_n, out, width)
    return dx, None if sums is None else sums.sum()
