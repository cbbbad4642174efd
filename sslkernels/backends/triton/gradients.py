# SPDX-License-Identifier: Apache-2.0
"""dx = factor * G y, fused or by panels of G: see the comment above the kernels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from . import configs, kernels_backward
from .plan import GRID_LIMIT, PANEL_WORDS, alignment, slot_words, splits_for, tile_flags
from .runtime import launch


def _lift(drow: Tensor | None, dcol: Tensor | None) -> Tensor:
    """Power of two that brings the largest finite |gradient| into [1/2, 1); 1 if all are 0."""
    peaks = [
        torch.where(torch.isfinite(g), g.abs(), 0.0).amax() for g in (drow, dcol) if g is not None
    ]
    peak = peaks[0] if len(peaks) == 1 else torch.maximum(peaks[0], peaks[1])
    exponent = torch.frexp(peak).exponent.clamp(-100, 100)
    return torch.ldexp(torch.ones_like(peak), -exponent)


@dataclass
class Side:
    """What G needs of its rows or of its columns."""

    vectors: Tensor  # [n, D]
    ids: Tensor | None
    lse: Tensor | None
    grad: Tensor | None


def gradient(
    kind: int,
    x: Side,
    y: Side,
    scale: Tensor,
    bias: Tensor | None,
    factor: Tensor,
    want_dbias: bool,
) -> tuple[Tensor, Tensor | None]:
    """dx [N, D] = factor * G y and sum G, where the rows of G belong to x."""
    N, D = x.vectors.shape
    M, device, dtype = y.vectors.shape[0], x.vectors.device, x.vectors.dtype
    if N == 0 or M == 0 or (x.grad is None and y.grad is None):
        zero = torch.zeros((), dtype=torch.float32, device=device) if want_dbias else None
        return torch.zeros(N, D, dtype=torch.float32, device=device), zero
    lift = _lift(x.grad, y.grad) if dtype == torch.float16 else None
    sides = (x.ids, y.ids, x.lse, x.grad, y.lse, y.grad)
    inputs = (x.vectors, y.vectors, scale, bias, lift, *sides)
    flags = {
        "KIND": kind,
        "HAS_ROW": x.grad is not None,
        "HAS_COL": y.grad is not None,
        "HAS_BIAS": bias is not None,
        "HAS_IDS": x.ids is not None,
        "HAS_LIFT": lift is not None,
        "WANT_DBIAS": want_dbias,
    }
    config = configs.choose("fused", device, D, dtype)
    if config is None:
        return _by_panels(x.vectors, y.vectors, inputs, flags, factor, lift)
    row_blocks, tiles = triton.cdiv(N, config.block_n), triton.cdiv(M, config.block_m)
    splits, per_split = splits_for(
        device, row_blocks, tiles, max(1, slot_words(N, M, D) // (N * D))
    )
    parts = torch.empty(splits, N, D, dtype=torch.float32, device=device)
    sums = (
        torch.empty(splits, row_blocks, dtype=torch.float32, device=device) if want_dbias else None
    )
    launch(
        kernels_backward.backward_kernel,
        (row_blocks, splits),
        device,
        parts,
        sums,
        *inputs,
        N,
        M,
        D,
        per_split,
        *x.vectors.stride(),
        *y.vectors.stride(),
        **flags,
        **tile_flags(config, x.vectors, y.vectors),
    )
    dx = parts[0] if splits == 1 else parts.sum(0)
    return dx, None if sums is None else sums.sum()


def _by_panels(
    x: Tensor,
    y: Tensor,
    inputs: tuple[Tensor | None, ...],
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
    row_blocks, tiles = triton.cdiv(N, config.block_n), triton.cdiv(M, config.block_m)
    blocks = max(1, min(row_blocks, words // (M * config.block_n)))
    blocks = min(blocks, GRID_LIMIT * product.block_n // config.block_n)
    ld = triton.cdiv(M, 16) * 16  # rows stay aligned to 32 bytes and more
    panel = torch.empty(min(N, blocks * config.block_n), ld, dtype=dtype, device=device)
    dx = torch.empty(N, D, dtype=torch.float32, device=device)
    want_dbias = flags["WANT_DBIAS"]
    sums = (
        torch.empty(row_blocks * tiles, dtype=torch.float32, device=device) if want_dbias else None
    )
    for first_block in range(0, row_blocks, blocks):
        here = min(blocks, row_blocks - first_block)
        start = first_block * config.block_n
        rows = min(N - start, here * config.block_n)
        launch(
            kernels_backward.panel_kernel,
            (here * tiles,),
            device,
            panel,
            None if sums is None else sums[first_block * tiles :],
            *inputs,
            N,
            M,
            D,
            first_block,
            here,
            ld,
            *x.stride(),
            *y.stride(),
            **flags,
            **tile_flags(config, x, y),
        )
        width, feature_blocks = configs.chunks(product, D)
        out_blocks = triton.cdiv(rows, product.block_n)
        splits, per_split = splits_for(
            device,
            feature_blocks * out_blocks,
            triton.cdiv(M, product.block_m),
            max(1, words // (rows * D)),
        )
        out = dx[start : start + rows]
        parts = (
            torch.empty(splits, rows, D, dtype=torch.float32, device=device) if splits > 1 else out
        )
        launch(
            kernels_backward.product_kernel,
            (feature_blocks, out_blocks, splits),
            device,
            parts,
            panel,
            y,
            factor,
            lift,
            rows,
            M,
            D,
            per_split,
            rows * D,
            ld,
            *y.stride(),
            HAS_LIFT=lift is not None,
            ALIGN=alignment(y),
            PRECISION=configs.precision() if dtype == torch.float32 else "ieee",
            BLOCK_N=product.block_n,
            BLOCK_M=product.block_m,
            BLOCK_D=width,
            num_warps=product.num_warps,
            num_stages=product.num_stages,
        )
        if splits > 1:
            torch.sum(parts, 0, out=out)
    return dx, None if sums is None else sums.sum()
