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
from typing import NamedTuple

import torch
from torch import Tensor

from sslkernels.backends.arithmetic import accumulation_dtype, fixed_sum, row_blocks
from sslkernels.ops._library import Gradient, Op, no_autocast

INF = float("inf")


class Mining(NamedTuple):
    """Which triplets there are."""

    z: Tensor  # [N, D]; for cosine normalised
    ids: Tensor  # [N] int64 labels
    margin: Tensor  # 0-d, added to d(a, p) - d(a, n)
    # One negative a pair (a, p): the nearest farther than p, else the farthest; or every triplet.
    semihard: bool
    cosine: bool  # d = 1 - <x, y> instead of the Euclidean distance


class MinedTriplets(NamedTuple):
    """Sums by anchor."""

    loss: Tensor  # [N] accumulation dtype: sum of max(d(a, p) - d(a, n) + margin, 0)
    active: Tensor  # [N] int64: how many of those terms are positive
    terms: Tensor  # [N] int64: how many there are


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


def _forward(mining: Mining) -> MinedTriplets:
    z, n = mining.z, len(mining.z)
    loss = torch.zeros(n, dtype=accumulation_dtype(z.dtype), device=z.device)
    active = torch.zeros(n, dtype=torch.int64, device=z.device)
    count = torch.zeros_like(active)
    with no_autocast(z.device):
        for block in _blocks(z.to(_wide(z)), mining.ids, mining.cosine):
            n_positives = block.positive.sum(1, keepdim=True)
            if mining.semihard:
                terms, _ = _semihard(block, mining.margin)
                violations = terms > 0
                pairs = n_positives * (block.n_negatives > 0)
            else:
                limit = block.d + mining.margin
                violations = _violations(block, limit)
                prefix = torch.nn.functional.pad(block.negatives.cumsum(1), (1, 0))
                terms = violations * limit - prefix.gather(1, violations)
                pairs = n_positives * block.n_negatives
            loss[block.rows] = terms.sum(1).to(loss.dtype)
            active[block.rows] = violations.sum(1)
            count[block.rows] = pairs[:, 0]
    return MinedTriplets(loss, active, count)


def _violations(block: _Block, limit: Tensor) -> Tensor:
    """[B, N] int64: how many negatives are nearer than each positive and the margin."""
    return torch.searchsorted(block.negatives, limit).masked_fill_(~block.positive, 0)


def _backward(mining: Mining, dloss: Tensor) -> Tensor:
    z, ids = mining.z, mining.ids
    wide = z.to(_wide(z))
    dz = torch.zeros_like(wide, memory_format=torch.contiguous_format)
    with no_autocast(z.device):
        for block in _blocks(wide, ids, mining.cosine):
            rows, d = block.rows, block.d
            if mining.semihard:
                terms, place = _semihard(block, mining.margin)
                weight = (terms > 0).to(d.dtype)
                # Small whole numbers: their sum is exact in any order.
                weight.scatter_add_(1, block.order.gather(1, place), -weight)
            else:
                limit = d + mining.margin
                weight = torch.searchsorted(block.negatives, limit)
                limits = limit.masked_fill(~block.positive, -INF).sort(1).values
                pulled = torch.searchsorted(limits, d, right=True) - limits.shape[1]
                weight = torch.where(block.positive, weight, pulled)
                own = (ids[rows, None] == ids) & ~block.positive
                weight = weight.masked_fill_(own, 0).to(d.dtype)
            weight.mul_(dloss[rows, None])
            if mining.cosine:
                dz[rows] -= weight @ wide
                dz.addmm_(weight.T, wide[rows], alpha=-1)
                continue
            weight = torch.where(d > 0, weight / d, 0.0)  # d distance = (x - y) / distance
            dz[rows] += weight.sum(1, keepdim=True) * wide[rows] - weight @ wide
            dz += weight.sum(0)[:, None] * wide
            dz.addmm_(weight.T, wide[rows], alpha=-1)
    return dz.to(z.dtype)


def _fake(mining: Mining) -> MinedTriplets:
    z, n = mining.z, mining.z.shape[0]
    ints = z.new_empty((n,), dtype=torch.int64)
    loss = z.new_empty((n,), dtype=accumulation_dtype(z.dtype))
    return MinedTriplets(loss, ints, torch.empty_like(ints))


def _tangent(mining: Mining, active: Tensor, tangents: Mining) -> tuple[Tensor]:
    """The terms are linear in the distances, so theirs are summed as the terms were."""
    z = mining.z.to(_wide(mining.z))
    dz = torch.zeros_like(z) if tangents.z is None else tangents.z.to(z.dtype)
    acc = accumulation_dtype(mining.z.dtype)
    parts = [torch.zeros(0, dtype=acc, device=z.device)]
    along = (z * dz).sum(1)
    with no_autocast(z.device):
        for block in _blocks(z, mining.ids, mining.cosine):
            rows = block.rows
            moved = -(z[rows] @ dz.T + dz[rows] @ z.T)
            if not mining.cosine:
                moved = (moved + along[rows, None] + along) / block.d
                moved = torch.where(block.d > 0, moved, 0.0)
            sorted_moved = moved.gather(1, block.order)
            if mining.semihard:
                terms, place = _semihard(block, mining.margin)
                total = torch.where(terms > 0, moved - sorted_moved.gather(1, place), 0.0)
            else:
                violations = _violations(block, block.d + mining.margin)
                prefix = torch.nn.functional.pad(sorted_moved.cumsum(1), (1, 0))
                total = violations * moved - prefix.gather(1, violations)
            parts.append(total.sum(1).to(acc))
    total = torch.cat(parts)
    return (total if tangents.margin is None else total + (tangents.margin * active).to(acc),)


BACKWARD = Op(
    "mined_triplets_backward(*Mining, Tensor dloss) -> Tensor",
    _backward,
    lambda mining, dloss: mining.z.new_empty(mining.z.shape),
    values=(Mining,),
)


def _gradient(mining: Mining, active: Tensor, dloss: Tensor, need: Mining) -> dict[str, Tensor]:
    found = {}
    if need.z:
        found["z"] = BACKWARD.below(mining, dloss)
    if need.margin:
        found["margin"] = fixed_sum(dloss * active).to(mining.margin.dtype)
    return found


MINED_TRIPLETS = Op(
    "mined_triplets(*Mining) -> MinedTriplets",
    _forward,
    _fake,
    values=(Mining, MinedTriplets),
    gradient=Gradient(
        ("z", "margin"), ("loss",), lambda mining, out: (mining, out.active), _gradient, _tangent
    ),
)


def mined_triplets(
    z: Tensor, ids: Tensor, margin: float | Tensor, *, semihard: bool, cosine: bool
) -> MinedTriplets:
    """Triplet terms summed by anchor, differentiable once in z and margin; see ``Mining``."""
    if not isinstance(margin, Tensor):
        margin = torch.full((), margin, dtype=_wide(z), device=z.device)
    mining = Mining(z, ids, margin.to(_wide(z)), semihard, cosine)
    result: MinedTriplets = MINED_TRIPLETS(mining)
    return result
