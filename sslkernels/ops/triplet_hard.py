# SPDX-License-Identifier: Apache-2.0
"""The batch-hard triplet loss as one torch op, ``hard_triplets``.

    loss_i = max(d(x_i, x_p) - d(x_i, x_n) + margin, 0),    p the farthest row with the label of i,
                                                             n the nearest one with another

Mining compares what |x|^2 + |y|^2 - 2 <x, y> leaves of dot products; the distances of the chosen rows
are computed from the rows, which does not cancel.  Equal rows have distance 0 and gradient 0.  The CPU
backend does it in one call; elsewhere it is composed here from ``extremes`` and torch's operations on
chunks of rows.
"""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from sslkernels.backends.arithmetic import accumulation_dtype, fixed_sum
from sslkernels.backends.interface import Tiles, Triplets, TripletState
from sslkernels.ops import registry
from sslkernels.ops._library import Gradient, Op, no_autocast
from sslkernels.ops.normalization import EPS, UnitRows, unit_rows, unit_rows_backward
from sslkernels.ops.rows import accumulate_rows_, chunks, dots


class HardTriplets(NamedTuple):
    """What the op returns."""

    loss: Tensor  # 0-d, accumulation dtype
    chosen: Tensor  # this and the next three: see TripletState
    distance: Tensor
    norm: Tensor
    share: Tensor

    @property
    def state(self) -> TripletState:
        """What backward needs."""
        return TripletState(self.chosen, self.distance, self.norm, self.share)


class TripletGradients(NamedTuple):
    """Of z ([0] where not wanted) and of the margin."""

    dz: Tensor
    dmargin: Tensor


# ------------------------------------------------------------------------- composition in torch


def _mine(backend: ModuleType, z: Tensor, ids: Tensor, cosine: bool) -> Tensor:
    """[2, N]: the hardest positives and negatives of (for cosine: unit) rows, -1 where there is none."""
    acc = accumulation_dtype(z.dtype)
    if cosine:  # d = 1 - S falls with the dot product
        tiles = Tiles(z, None, z.new_full((), -1.0, dtype=acc), ids_q=ids)
    else:
        # d^2 - |x|^2 = |y|^2 - 2 <x, y>.  Distances do not change with the origin, and around the mean
        # less cancels.
        wide = z.to(acc)
        centred = wide - wide.mean(0)
        square = dots(centred, centred)
        tiles = Tiles(centred, None, wide.new_full((), -2.0), square, ids_q=ids)
    return torch.stack(tuple(backend.extremes(tiles)))


def distances(z: Tensor, index: Tensor, cosine: bool) -> Tensor:
    """[N]: of row i from row index[i], accumulation dtype; not differentiable.

    Args:
        z: [N, D]; for ``cosine`` normalised.
        index: [N] int64 in [0, N).
        cosine: 1 - <x, y> instead of the Euclidean distance.
    """
    acc = accumulation_dtype(z.dtype)
    d = z.new_empty(z.shape[0], dtype=acc)
    for c in chunks(z):
        own, other = z[c].to(acc), z.index_select(0, index[c]).to(acc)
        if cosine:
            d[c] = 1 - other.mul_(own).sum(1)
        else:
            d[c] = torch.linalg.vector_norm(other.sub_(own), dim=1)
    return d


def add_distances_gradient_(
    dz: Tensor, z: Tensor, index: Tensor, cosine: bool, d: Tensor, g: Tensor
) -> None:
    """dz += the gradient of ``distances``, whose result was d, with g [N] that of d."""
    for c in chunks(z):
        own, other = z[c].to(g.dtype), z.index_select(0, index[c]).to(g.dtype)
        if cosine:
            weight = -g[c, None]
            dz[c].add_(other.mul_(weight))  # dz[c] += ... would copy dz[c] onto itself as well
            accumulate_rows_(dz, index[c], own * weight)
        else:
            weight = torch.where(d[c] == 0, 0.0, g[c] / d[c])[:, None]
            away = other.sub_(own).mul_(weight)
            dz[c].sub_(away)
            accumulate_rows_(dz, index[c], away)


def _terms(problem: Triplets, state: TripletState) -> Tensor:
    """[N]: 0 without a positive or a negative."""
    near, far = state.distance
    valid = (state.chosen >= 0).all(0)
    return torch.where(valid, torch.relu(near - far + problem.margin), 0.0)


def composed_forward(backend: ModuleType, problem: Triplets) -> tuple[Tensor, TripletState]:
    """See ``interface.WholeLosses.triplet_forward``."""
    z, acc, n = problem.z, problem.acc, problem.n
    unit, norm = z, z.new_ones(n, dtype=acc)
    if problem.normalize:
        _, unit, norm = unit_rows(backend, z)
        norm = norm.clamp(min=EPS)
    chosen = z.new_empty((2, 0), dtype=torch.int64)
    if n > 0:
        chosen = _mine(backend, unit, problem.ids, problem.cosine)
    valid = (chosen >= 0).all(0)
    found = [distances(unit, index.clamp(min=0), problem.cosine) for index in chosen]
    distance = torch.where(valid, torch.stack(found), 0.0)
    state = TripletState(chosen, distance, norm, norm.new_ones(()))
    terms = _terms(problem, state)
    share = state.share
    if problem.reduction != "sum":
        counted = terms > 0 if problem.reduction == "mean_nonzero" else valid
        share = share / counted.sum().clamp(min=1)
    # A NaN distance is neither the largest nor the smallest: mining alone would pass over it.
    if z.numel() > 0:
        share = share + torch.linalg.vector_norm(unit.to(acc), float("inf")) * 0
    return fixed_sum(terms) * share, state._replace(share=share)


def composed_backward(
    backend: ModuleType, problem: Triplets, state: TripletState, dloss: Tensor, want_z: bool
) -> tuple[Tensor | None, Tensor]:
    """See ``interface.WholeLosses.triplet_backward``."""
    z, cosine = problem.z, problem.cosine
    weight = torch.where(_terms(problem, state) == 0, 0.0, dloss * state.share)
    dmargin = fixed_sum(weight)
    if not want_z:
        return None, dmargin
    rows = unit_rows(backend, z) if problem.normalize else None
    unit = z if rows is None else rows.unit
    dz = torch.zeros_like(unit, dtype=weight.dtype, memory_format=torch.contiguous_format)
    signed = (weight, -weight)
    for index, d, g in zip(state.chosen, state.distance, signed, strict=True):
        add_distances_gradient_(dz, unit, index.clamp(min=0), cosine, d, g)
    if rows is not None:
        dz = unit_rows_backward(backend, UnitRows(*rows), dz)
    return dz.to(z.dtype), dmargin


# --------------------------------------------------------------------------------------- backward


def _backward(
    problem: Triplets, state: TripletState, dloss: Tensor, want_z: bool
) -> TripletGradients:
    backend, z = registry.resolve(problem.z.device), problem.z
    fused = getattr(backend, "triplet_backward", None)
    if fused is not None:
        dz, dmargin = fused(problem, state, dloss, want_z)
    else:
        with no_autocast(z.device):
            dz, dmargin = composed_backward(backend, problem, state, dloss, want_z)
    return TripletGradients(z.new_empty(0) if dz is None else dz, dmargin)


def _backward_fake(
    problem: Triplets, state: TripletState, dloss: Tensor, want_z: bool
) -> TripletGradients:
    z = problem.z
    return TripletGradients(
        z.new_empty(z.shape if want_z else (0,)), z.new_empty((), dtype=problem.acc)
    )


BACKWARD = Op(
    "hard_triplets_backward(*Triplets, *TripletState, Tensor dloss, bool want_z) -> TripletGradients",
    _backward,
    _backward_fake,
    values=(TripletGradients,),
)


# ---------------------------------------------------------------------------------------- forward


def _forward(problem: Triplets) -> HardTriplets:
    backend = registry.resolve(problem.z.device)
    fused = getattr(backend, "triplet_forward", None)
    if fused is not None:
        loss, state = fused(problem)
        return HardTriplets(loss, *state)
    with no_autocast(problem.z.device):
        loss, state = composed_forward(backend, problem)
    return HardTriplets(loss, *state)


def _fake(problem: Triplets) -> HardTriplets:
    z, n, acc = problem.z, problem.n, problem.acc
    return HardTriplets(
        z.new_empty((), dtype=acc),
        z.new_empty((2, n), dtype=torch.int64),
        z.new_empty((2, n), dtype=acc),
        z.new_empty((n,), dtype=acc),
        z.new_empty((), dtype=acc),
    )


def _gradient(
    problem: Triplets, state: TripletState, dloss: Tensor, need: Triplets
) -> dict[str, Tensor]:
    found = BACKWARD.below(problem, state, dloss, need.z)
    return {"z": found.dz, "margin": found.dmargin}


def _tangent(problem: Triplets, state: TripletState, tangents: Triplets) -> tuple[Tensor]:
    # The loss is a number: its tangent is <gradient, tangent>.
    found = BACKWARD.below(problem, state, torch.ones_like(state.share), tangents.z is not None)
    total = torch.zeros_like(state.share)
    if tangents.z is not None:
        total = total + fixed_sum((found.dz.to(problem.acc) * tangents.z.to(problem.acc)).sum(1))
    if tangents.margin is not None:
        total = total + found.dmargin * tangents.margin
    return (total,)


HARD_TRIPLETS = Op(
    "hard_triplets(*Triplets) -> HardTriplets",
    _forward,
    _fake,
    values=(HardTriplets,),
    gradient=Gradient(
        ("z", "margin"),
        ("loss",),
        lambda problem, out: (problem, out.state),
        _gradient,
        _tangent,
    ),
)


def hard_triplets(problem: Triplets) -> HardTriplets:
    """The batch-hard triplet loss, differentiable once in z and margin; see the module and ``Triplets``."""
    result: HardTriplets = HARD_TRIPLETS(problem)
    return result
