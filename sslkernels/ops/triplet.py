# SPDX-License-Identifier: Apache-2.0
"""Semi-hard and all triplets in blocks of rows: O(N^2 log N) time, O(N * D) memory, never N^3.

For a block of anchors the distances to all rows are computed, the negatives of each anchor sorted,
and each positive looked up in them by binary search.  Prefix sums then give the sum over all the
negatives that a positive violates.  The backward pass does the same again and turns counts into
weights of distances.

Distances are computed in float64 (float32 where a device has no float64): |x|^2 + |y|^2 - 2 <x, y>
cancels, and in float32 would leave an error of 3e-4 in the distance of two nearly equal unit
vectors.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sslkernels.backends.chunked import accumulation_dtype, row_blocks
from sslkernels.ops._library import (
    below_autograd,
    define,
    implement,
    no_autocast,
    once_differentiable,
)

INF = float("inf")

define(
    "mined_triplets(Tensor z, Tensor ids, Tensor margin, bool semihard, bool cosine) "
    "-> (Tensor, Tensor, Tensor)"
)
define(
    "mined_triplets_backward(Tensor z, Tensor ids, Tensor margin, bool semihard, bool cosine, "
    "Tensor dloss) -> Tensor"
)


def _wide(z: Tensor) -> torch.dtype:
    return torch.float32 if z.device.type == "mps" else torch.float64


class _Block(NamedTuple):
    """A block of anchors; everything [B, N] unless said otherwise."""

    rows: slice
    d: Tensor  # distances
    positive: Tensor  # bool
    negatives: Tensor  # distances of the negatives, ascending, then inf
    order: Tensor  # int64: the columns of ``negatives``
    n_negatives: Tensor  # [B, 1] int64


def _blocks(z: Tensor, ids: Tensor, cosine: bool) -> Iterator[_Block]:
    """z: [N, D] wide."""
    n, d = z.shape
    square = z.square().sum(1)
    for rows in row_blocks(n, n, d // 8):  # about eight arrays of a block are alive at once
        dot = z[rows] @ z.T
        if cosine:
            distance = 1 - dot
        else:
            total = square[rows, None] + square
            squared = total - 2 * dot
            # Equal points: what rounding leaves is no distance, and has no direction.
            squared.masked_fill_(squared < 8 * torch.finfo(z.dtype).eps * total, 0.0)
            distance = squared.sqrt_()
        same = ids[rows, None] == ids
        negatives, order = distance.masked_fill(same, INF).sort(1)
        n_negatives = (~same).sum(1, keepdim=True)
        positive = same
        positive.diagonal(rows.start).fill_(False)
        yield _Block(rows, distance, positive, negatives, order, n_negatives)


def _semihard(block: _Block, margin: Tensor) -> tuple[Tensor, Tensor]:
    """Terms [B, N] of the pairs (anchor, positive), and where their negative is in the order."""
    place = torch.searchsorted(block.negatives, block.d, right=True)
    # None farther than the positive: the farthest negative.
    place = torch.minimum(place, block.n_negatives - 1).clamp_(min=0)
    terms = (block.d - block.negatives.gather(1, place) + margin).clamp_(min=0)
    return terms.masked_fill_(~(block.positive & (block.n_negatives > 0)), 0.0), place


def _mined_triplets(
    z: Tensor, ids: Tensor, margin: Tensor, semihard: bool, cosine: bool
) -> tuple[Tensor, Tensor, Tensor]:
    n = len(z)
    loss = torch.zeros(n, dtype=accumulation_dtype(z.dtype), device=z.device)
    active = torch.zeros(n, dtype=torch.int64, device=z.device)
    count = torch.zeros_like(active)
    with no_autocast(z.device):
        for block in _blocks(z.to(_wide(z)), ids, cosine):
            n_positives = block.positive.sum(1, keepdim=True)
            if semihard:
                terms, _ = _semihard(block, margin)
                violations = terms > 0
                pairs = n_positives * (block.n_negatives > 0)
            else:
                limit = block.d + margin
                violations = torch.searchsorted(block.negatives, limit)
                violations.masked_fill_(~block.positive, 0)
                prefix = torch.nn.functional.pad(block.negatives.cumsum(1), (1, 0))
                terms = violations * limit - prefix.gather(1, violations)
                pairs = n_positives * block.n_negatives
            loss[block.rows] = terms.sum(1).to(loss.dtype)
            active[block.rows] = violations.sum(1)
            count[block.rows] = pairs[:, 0]
    return loss, active, count


def _mined_triplets_backward(
    z: Tensor, ids: Tensor, margin: Tensor, semihard: bool, cosine: bool, dloss: Tensor
) -> Tensor:
    wide = z.to(_wide(z))
    dz = torch.zeros_like(wide, memory_format=torch.contiguous_format)
    with no_autocast(z.device):
        for block in _blocks(wide, ids, cosine):
            rows, d = block.rows, block.d
            if semihard:
                terms, place = _semihard(block, margin)
                weight = (terms > 0).to(d.dtype)
                # Small whole numbers: their sum is exact in any order.
                weight.scatter_add_(1, block.order.gather(1, place), -weight)
            else:
                limit = d + margin
                weight = torch.searchsorted(block.negatives, limit)
                limits = limit.masked_fill(~block.positive, -INF).sort(1).values
                pulled = torch.searchsorted(limits, d, right=True) - limits.shape[1]
                weight = torch.where(block.positive, weight, pulled)
                own = (ids[rows, None] == ids) & ~block.positive
                weight = weight.masked_fill_(own, 0).to(d.dtype)
            weight.mul_(dloss[rows, None])
            if cosine:
                dz[rows] -= weight @ wide
                dz.addmm_(weight.T, wide[rows], alpha=-1)
                continue
            weight = torch.where(d > 0, weight / d, 0.0)  # d distance = (x - y) / distance
            dz[rows] += weight.sum(1, keepdim=True) * wide[rows] - weight @ wide
            dz += weight.sum(0)[:, None] * wide
            dz.addmm_(weight.T, wide[rows], alpha=-1)
    return dz.to(z.dtype)


def _fake(
    z: Tensor, ids: Tensor, margin: Tensor, semihard: bool, cosine: bool
) -> tuple[Tensor, Tensor, Tensor]:
    n = z.shape[0]
    ints = z.new_empty((n,), dtype=torch.int64)
    return z.new_empty((n,), dtype=accumulation_dtype(z.dtype)), ints, torch.empty_like(ints)


def _backward_fake(
    z: Tensor, ids: Tensor, margin: Tensor, semihard: bool, cosine: bool, dloss: Tensor
) -> Tensor:
    return z.new_empty(z.shape)


class _Mined(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, ids: Tensor, margin: Tensor, *options: Any) -> Any:
        args = (z, ids, margin)
        with below_autograd():
            loss, active, count = torch.ops.sslkernels.mined_triplets.default(*args, *options)
        ctx.options = options
        ctx.save_for_backward(*args)
        ctx.mark_non_differentiable(active, count)
        return loss, active, count

    @staticmethod
    @once_differentiable("sslkernels::mined_triplets")
    def backward(ctx: Any, dloss: Tensor, *_: Any) -> Any:
        with below_autograd():
            dz = torch.ops.sslkernels.mined_triplets_backward.default(
                *ctx.saved_tensors, *ctx.options, dloss
            )
        return dz, None, None, None, None


implement("mined_triplets", _mined_triplets, _fake, _Mined.apply, inputs=(0,))
implement("mined_triplets_backward", _mined_triplets_backward, _backward_fake)


class MinedTriplets(NamedTuple):
    """Sums by anchor."""

    loss: Tensor  # [N] accumulation dtype: sum of max(d(a, p) - d(a, n) + margin, 0)
    active: Tensor  # [N] int64: how many of those terms are positive
    terms: Tensor  # [N] int64: how many there are


def mined_triplets(
    z: Tensor, ids: Tensor, margin: float | Tensor, *, semihard: bool, cosine: bool
) -> MinedTriplets:
    """Triplet terms summed by anchor, differentiable once in z.

    Args:
        z: [N, D]; for ``cosine`` normalised.
        ids: [N] int64 labels.
        margin: Added to d(a, p) - d(a, n); a number or a 0-d tensor, whose gradient is ``active``.
        semihard: One negative a pair (a, p): the nearest farther than p, else the farthest of all.
            Otherwise every triplet.
        cosine: d = 1 - <x, y> instead of the Euclidean distance.
    """
    if isinstance(margin, Tensor):
        margin = margin.detach().to(_wide(z))
    else:
        margin = torch.full((), margin, dtype=_wide(z), device=z.device)
    return MinedTriplets(
        *torch.ops.sslkernels.mined_triplets.default(z, ids, margin, semihard, cosine)
    )
