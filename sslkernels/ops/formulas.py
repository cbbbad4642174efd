# SPDX-License-Identifier: Apache-2.0
"""Losses that have no op of their own: their rows, composed of ops, before any reduction.

Arguments have been checked; the public functions in ``sslkernels.functional`` have the formulas, the
papers and the reductions.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from sslkernels._types import ContrastiveMetrics
from sslkernels.backends.arithmetic import accumulation_dtype
from sslkernels.backends.interface import Thresholds, Tiles
from sslkernels.ops import heads
from sslkernels.ops.pairwise import pairwise
from sslkernels.ops.uniformity import uniformity as unit_uniformity

# ------------------------------------------------------------------------------- softmax family


def multiview(
    views: tuple[Tensor, ...], scale: Tensor, normalize: bool, want_metrics: bool
) -> tuple[Tensor, ContrastiveMetrics | None]:
    """[V * N]: NT-Xent of V >= 2 views; with metrics V - 1 passes count ranks of as many positives a row."""
    v, n = len(views), len(views[0])
    z = heads.unit(torch.cat(views), normalize)  # [V * N, D]
    tiles = Tiles(z, None, scale, ids_q=torch.arange(n, device=z.device).repeat(v))
    z_views = torch.split(z, n) if n else (z,) * v
    # Each unordered pair of views once; similarity[a][b] is the column of positives of view a.
    similarity: list[list[Tensor]] = [[] for _ in range(v)]
    for a in range(v):
        for b in range(a + 1, v):
            dot = heads.dots(z_views[a], z_views[b])
            similarity[a].append(dot)
            similarity[b].append(dot)
    # columns[c]: [V * N], for every row its c-th positive.
    columns = [torch.cat([similarity[a][c] for a in range(v)]) for c in range(v - 1)]
    above = Thresholds(columns[0] * scale) if want_metrics else None
    lse, _, rank, _ = pairwise("lse", tiles, above=above)
    losses = [heads.nll(lse, column * scale) for column in columns]
    loss = losses[0] if v == 2 else torch.stack(losses).mean(0)
    if not want_metrics:
        return loss, None
    with torch.no_grad():
        ranks = [rank]
        for column in columns[1:]:
            ranks.append(pairwise("lse", tiles, above=Thresholds(column * scale)).rank_row)
        negative = heads.mean_negative(z, z, tiles.ids_q, tiles.ids_q)
        return loss, heads.metrics(torch.cat(ranks), torch.cat(columns), negative)


def learned_bank(
    query: Tensor,
    positive_key: Tensor,
    negative_keys: Tensor,
    scale: Tensor,
    ids: tuple[Tensor | None, Tensor | None],
    normalize: bool,
    want_metrics: bool,
) -> tuple[Tensor, ContrastiveMetrics | None]:
    """[N]: InfoNCE with shared negative keys that need a gradient."""
    q, k, negatives = (heads.unit(x, normalize) for x in (query, positive_key, negative_keys))
    similarity = heads.dots(q, k)
    positive = similarity * scale
    above = Thresholds(positive) if want_metrics else None
    lse, _, rank, _ = pairwise("lse", Tiles(q, negatives, scale, None, *ids), above=above)
    loss = heads.nll(lse, positive)
    if not want_metrics:
        return loss, None
    return loss, heads.metrics(rank, similarity, heads.mean_negative(q, negatives, *ids))


# ------------------------------------------------------------------------------------- geometry


def alignment(z1: Tensor, z2: Tensor, alpha: float, normalize: bool) -> Tensor:
    """[N]: ||z1_i - z2_i||^alpha."""
    acc = accumulation_dtype(z1.dtype)
    difference = heads.unit(z1, normalize).to(acc) - heads.unit(z2, normalize).to(acc)
    squared = difference.square().sum(1)
    if alpha != 2:
        apart = squared != 0  # true for NaN
        squared = torch.where(apart, torch.where(apart, squared, 1.0).pow(alpha / 2), 0.0)
    return squared


def uniformity(z: Tensor, t: float, normalize: bool) -> Tensor:
    """0-d: log of the mean over pairs of exp(-t ||z_i - z_j||^2)."""
    n = len(z)
    if n < 2:
        return heads.unit(z, normalize).to(accumulation_dtype(z.dtype)).sum() * 0
    if normalize:
        return unit_uniformity(z, t)
    z = z.to(accumulation_dtype(z.dtype))
    ids = torch.arange(n, device=z.device)
    # The squared norms become two more features; distances do not change with the origin.
    z = z - z.mean(0)
    square = z.square().sum(1, keepdim=True)
    one = torch.ones_like(square)
    q, k = torch.cat((2 * z, -square, -one), 1), torch.cat((z, one, square), 1)
    lse = pairwise("lse", Tiles(q, k, z.new_full((), t), None, ids, ids)).row
    largest = lse.detach().amax()
    total = heads.reduce((lse - largest).exp(), "sum").log() + largest
    return total - math.log(n * (n - 1))


def cosine(prediction: Tensor, target: Tensor) -> Tensor:
    """[N]: cos(prediction_i, target_i)."""
    return heads.dots(heads.unit(prediction, True), heads.unit(target, True))


# ------------------------------------------------------------------------------------ distances


def euclidean(a: Tensor, b: Tensor) -> Tensor:
    """[N]: ||a_i - b_i|| in the accumulation dtype; gradient 0 where they are equal."""
    acc = accumulation_dtype(a.dtype)
    distance: Tensor = torch.linalg.vector_norm(a.to(acc) - b.to(acc), dim=1)
    return distance


def margins(
    same: Tensor, different: Tensor, margin: float | Tensor, form: str, eps: float
) -> Tensor:
    """[N]: the margin loss of two distances."""
    if form == "relative":
        return F.relu(same - different + margin)
    floor = margin.abs() if isinstance(margin, Tensor) else abs(margin)
    return F.relu(torch.maximum(same, different + margin) - floor + eps)


def contrastive_pairs(a: Tensor, b: Tensor, same: Tensor, margin: float | Tensor) -> Tensor:
    """[N]: d^2 / 2 where ``same``, max(margin - d, 0)^2 / 2 elsewhere."""
    acc = accumulation_dtype(a.dtype)
    difference = a.to(acc) - b.to(acc)
    # Not the square of the distance, which has no second derivative at 0.
    squared = difference.square().sum(1)
    short = F.relu(margin - torch.linalg.vector_norm(difference, dim=1)).square()
    return torch.where(same, squared, short) / 2
