# SPDX-License-Identifier: Apache-2.0
"""Distances of row i from two chosen rows as a torch op, ``two_distances``.

d_i = |z_i - z_j|  (gradient (z_i - z_j) / d_i, 0 where the two are equal)  or  1 - <z_i, z_j>
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from sslkernels.backends.arithmetic import accumulation_dtype
from sslkernels.ops._library import Gradient, Op
from sslkernels.ops.rows import accumulate_rows_, chunks


class Pairs(NamedTuple):
    """Row i with rows first[i] and second[i]."""

    z: Tensor  # [N, D]; for cosine normalised
    first: Tensor  # [N] int64 in [0, N)
    second: Tensor  # [N] int64 in [0, N)
    cosine: bool  # 1 - <x, y> instead of the Euclidean distance


class Distances(NamedTuple):
    """[N] each, accumulation dtype."""

    first: Tensor
    second: Tensor


class DistanceGradients(NamedTuple):
    """Incoming gradients; None where there is none."""

    first: Tensor | None
    second: Tensor | None


def _distances(pairs: Pairs) -> Distances:
    z, acc = pairs.z, accumulation_dtype(pairs.z.dtype)
    d = Distances(*(z.new_empty(z.shape[0], dtype=acc) for _ in range(2)))
    for c in chunks(z):
        own = z[c].to(acc)
        for out, index in zip(d, (pairs.first, pairs.second), strict=True):
            other = z.index_select(0, index[c]).to(acc)
            if pairs.cosine:
                out[c] = 1 - other.mul_(own).sum(1)
            else:
                out[c] = torch.linalg.vector_norm(other.sub_(own), dim=1)
    return d


def _distances_fake(pairs: Pairs) -> Distances:
    out = pairs.z.new_empty((pairs.z.shape[0],), dtype=accumulation_dtype(pairs.z.dtype))
    return Distances(out, torch.empty_like(out))


def _distances_backward(pairs: Pairs, d: Distances, g: DistanceGradients | None) -> Tensor:
    z, acc = pairs.z, accumulation_dtype(pairs.z.dtype)
    dz = torch.zeros_like(z, dtype=acc, memory_format=torch.contiguous_format)
    indices = (pairs.first, pairs.second)
    for index, distance, weights in zip(indices, d, g or (None, None), strict=True):
        if weights is None:
            continue
        for c in chunks(z):
            own, other = z[c].to(acc), z.index_select(0, index[c]).to(acc)
            if pairs.cosine:
                weight = -weights[c, None]
                dz[c].add_(other.mul_(weight))  # dz[c] += ... would copy dz[c] onto itself as well
                accumulate_rows_(dz, index[c], own * weight)
            else:
                weight = torch.where(distance[c] == 0, 0.0, weights[c] / distance[c])[:, None]
                away = other.sub_(own).mul_(weight)
                dz[c].sub_(away)
                accumulate_rows_(dz, index[c], away)
    return dz.to(z.dtype)


DISTANCES_BACKWARD = Op(
    "two_distances_backward(*Pairs, Distances d, DistanceGradients? g) -> Tensor",
    _distances_backward,
    lambda pairs, d, g: torch.empty_like(pairs.z, memory_format=torch.contiguous_format),
    values=(Pairs, Distances, DistanceGradients),
)


def _distances_gradient(
    pairs: Pairs, d: Distances, g_first: Tensor | None, g_second: Tensor | None, _: Any
) -> dict[str, Tensor]:
    return {"z": DISTANCES_BACKWARD.below(pairs, d, DistanceGradients(g_first, g_second))}


def _distances_tangent(pairs: Pairs, d: Distances, tangents: Pairs) -> tuple[Tensor, ...]:
    z, dz, acc = pairs.z, tangents.z, d.first.dtype
    found = []
    for index, distance in zip((pairs.first, pairs.second), d, strict=True):
        parts = [torch.zeros_like(distance[:0])]
        for c in chunks(z):
            own, d_own = z[c].to(acc), dz[c].to(acc)
            other, d_other = (x.index_select(0, index[c]).to(acc) for x in (z, dz))
            if pairs.cosine:
                parts.append(-(own * d_other + other * d_own).sum(1))
            else:
                along = ((own - other) * (d_own - d_other)).sum(1)
                parts.append(torch.where(distance[c] == 0, 0.0, along / distance[c]))
        found.append(torch.cat(parts))
    return tuple(found)


DISTANCES = Op(
    "two_distances(*Pairs) -> Distances",
    _distances,
    _distances_fake,
    values=(Pairs, Distances),
    gradient=Gradient(
        ("z",),
        ("first", "second"),
        lambda pairs, out: (pairs, out),
        _distances_gradient,
        _distances_tangent,
    ),
)


def two_distances(
    z: Tensor, first: Tensor, second: Tensor, *, cosine: bool
) -> tuple[Tensor, Tensor]:
    """Distances of row i from rows first[i] and second[i], [N] each, differentiable once.

    Computed from the two rows: no cancellation.  Equal rows have distance 0 and gradient 0.

    Args:
        z: [N, D]; for ``cosine`` normalised.
        first: [N] int64 in [0, N).
        second: The same.
        cosine: 1 - <x, y> instead of the Euclidean distance.
    """
    d: Distances = DISTANCES(Pairs(z, first, second, cosine))
    return d
