# SPDX-License-Identifier: Apache-2.0
"""Uniformity of unit rows as one torch op, ``uniformity``: the log of the mean over pairs of a Gaussian.

    -t ||x - y||^2 = 2t <x, y> - 2t     so     loss = log sum_i exp(row_i) - 2t - log(N (N - 1)),

row_i the log-sum-exp of 2t <x_i, x_j> over the other rows.  The gradient by row_i is its softmax weight, and
backward recomputes unit rows and tiles: three vectors are kept.
"""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sslkernels.backends.arithmetic import accumulation_dtype, fixed_sum
from sslkernels.backends.interface import RowState, Thresholds, Tiles, Wanted
from sslkernels.ops import normalization, registry
from sslkernels.ops._library import Gradient, Op, no_autocast
from sslkernels.ops.normalization import EPS
from sslkernels.ops.tangents import tile_tangent
from sslkernels.ops.unit import unit_backward


class Uniformity(NamedTuple):
    """Results of the op."""

    loss: Tensor  # 0-d acc
    norm: Tensor  # [N] acc: what rows were divided by
    row: Tensor  # [N] acc: log-sum-exp of a row's tiles
    weight: Tensor  # [N] acc: d loss / d row


def _unit(backend: ModuleType, z: Tensor) -> tuple[Tensor, Tensor]:
    """[N, D], [N]: rows by their norms, and these, in the accumulation dtype."""
    _, unit, norm = normalization.unit_rows(backend, z)
    return unit.to(norm.dtype), norm


def _tiles(unit: Tensor, t: float) -> Tiles:
    ids = torch.arange(len(unit), device=unit.device)
    return Tiles(unit, None, unit.new_full((), 2 * t), ids_q=ids)


def _short_rows(unit: Tensor, t: float) -> tuple[Tensor, Tensor]:
    """[N], 0-d: what log-sums of short rows lack, and the log of what pairs of two of them still lack then.

    ||x||^2 is not 1 there but s: 0 for rows of zeros and without features, almost 0 where the norm is below
    the 1e-12 that it is divided by.  A pair then counts (1 + u_x) (1 + u_y) times, u = exp(t (1 - s)) - 1: a
    row's sum 1 + 2u times, in its own place and in those of the others, and pairs of short rows lack u_x u_y.
    """
    square = unit.square().sum(1)
    # A NaN is not short: it must reach the loss through its row.
    more = torch.where(square < 0.5, torch.expm1(t * (1 - square)), 0.0)
    pairs = (more.sum().square() - more.square().sum()).clamp(min=0)
    return torch.log1p(2 * more), pairs.log()


def _forward(z: Tensor, t: float) -> Uniformity:
    backend, n = registry.resolve(z.device), len(z)
    unit, norm = _unit(backend, z)
    with no_autocast(z.device):
        row = backend.pairwise_forward("lse", _tiles(unit, t), False, Thresholds()).row
    log_weight, missing = row, None
    # Short, or so long that 1 / norm is 0.  Asking a GPU would make the host wait.
    if not z.is_cpu or not bool(((norm >= EPS) & norm.isfinite()).all()):
        more, missing = _short_rows(unit, t)
        log_weight = row + more
    largest = log_weight.amax()
    weight = (log_weight - largest).exp()
    total = fixed_sum(weight)
    if missing is not None:
        total = total + (missing - largest).exp()
    loss = total.log() + largest - (2 * t + math.log(n * (n - 1)))
    return Uniformity(loss, norm, row, weight / total)


def _fake(z: Tensor, t: float) -> Uniformity:
    loss = z.new_empty((), dtype=accumulation_dtype(z.dtype))
    return Uniformity(loss, *(loss.new_empty((z.shape[0],)) for _ in range(3)))


def _backward(
    z: Tensor, norm: Tensor, row: Tensor, weight: Tensor, t: float, dloss: Tensor
) -> Tensor:
    backend = registry.resolve(z.device)
    with no_autocast(z.device):  # unit rows are gone before the gradient of z needs memory
        dunit, _, _ = backend.pairwise_backward(
            "lse",
            _tiles(_unit(backend, z)[0], t),
            RowState(row, weight * dloss),
            None,
            Wanted(True, False),
        )
    return unit_backward(z, norm, dunit)


BACKWARD = Op(
    "uniformity_backward(Tensor z, Tensor norm, Tensor row, Tensor weight, float t, Tensor dloss) -> Tensor",
    _backward,
    lambda z, *_: z.new_empty(z.shape),
)


def _gradient(
    z: Tensor, t: float, norm: Tensor, row: Tensor, weight: Tensor, dloss: Tensor, *_: Any
) -> dict[str, Tensor]:
    return {"z": BACKWARD.below(z, norm, row, weight, t, dloss)}


def _tangent(
    z: Tensor, t: float, norm: Tensor, row: Tensor, weight: Tensor, dz: Tensor, *_: Any
) -> tuple[Tensor]:
    unit = normalization.divide(z, norm)
    dunit = normalization.project(unit, norm, dz.to(norm.dtype))
    tiles = _tiles(unit, t)
    moved = Tiles(dunit, None, torch.zeros_like(tiles.scale))
    drow = tile_tangent("lse", tiles, moved, row, None)[0]
    return (fixed_sum(weight * drow),)


UNIFORMITY = Op(
    "uniformity(Tensor z, float t) -> Uniformity",
    _forward,
    _fake,
    values=(Uniformity,),
    gradient=Gradient(
        ("z",),
        ("loss",),
        lambda z, t, out: (z, t, out.norm, out.row, out.weight),
        _gradient,
        _tangent,
    ),
)


def uniformity(z: Tensor, t: float) -> Tensor:
    """0-d: uniformity of the rows of z [N, D], N >= 2, divided by their norms; see the module."""
    loss: Tensor = UNIFORMITY(z, t).loss
    return loss
