# SPDX-License-Identifier: Apache-2.0
"""Row and column reductions over the tiles as one torch op, ``pairwise``.

    lse:       row_i = log sum_j exp(S_ij)          softplus:  row_i = sum_j log(1 + exp(S_ij))

over the allowed pairs, and the same over i for columns.  Backward recomputes the tiles as G
(``backends/interface.py``): dq = scale * G k, dk = scale * G^T q.  The gradient of the scale comes from
that of q: with S_ij = scale * <q_i, k_j> + bias,

    dq_i = scale * sum_j G_ij k_j     so     dscale = sum_ij G_ij <q_i, k_j> = sum_i <q_i, dq_i> / scale

(half of it in self mode, where dq collects both sides).  A scale of 0 would divide 0 by 0, so the
backend is then given ``TINY`` in its place, with which S is the same to the last bit.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from sslkernels.backends.arithmetic import fixed_sum
from sslkernels.backends.interface import Kind, PairwiseForward, RowState, Thresholds, Tiles, Wanted
from sslkernels.ops import registry
from sslkernels.ops._library import Gradient, Op, no_autocast
from sslkernels.ops.rows import dots
from sslkernels.ops.tangents import tile_tangent

# exp(TINY * <q, k>) is 1 for any representable dot product that is not itself near 1e13; TINY *
# TINY and the products with gradients stay far from float32's smallest normal number, 1e-38.
TINY = 1e-20


class TileGradients(NamedTuple):
    """Gradients of q, k, scale and bias; [0] or 0 where not wanted."""

    dq: Tensor  # [N, D]
    dk: Tensor  # [M, D]
    dscale: Tensor  # 0-d acc
    dbias: Tensor  # 0-d acc


def nonzero_scale(scale: Tensor) -> Tensor:
    """The scale, or what stands for 0 where something is divided by it."""
    return torch.where(scale == 0, torch.full_like(scale, TINY), scale)


def tile_gradients(
    kind: Kind, tiles: Tiles, row: RowState, col: RowState | None, want: Wanted
) -> TileGradients:
    """Gradients in the accumulation dtype; those of q and k belong to the caller, who may add to them."""
    if want.dscale:
        tiles = tiles._replace(scale=nonzero_scale(tiles.scale))
    q, k = tiles.q, tiles.k
    with no_autocast(q.device):
        dq, dk, dbias = registry.resolve(q.device).pairwise_backward(
            kind, tiles, row, col, Wanted(want.dq or (want.dscale and not want.dk), want.dk)
        )
    dscale = torch.zeros_like(tiles.scale)
    if want.dscale:
        operand, gradient = (q, dq) if k is None or want.dq or not want.dk else (k, dk)
        dscale = fixed_sum(dots(operand, gradient)) / tiles.scale
        if k is None:
            dscale = dscale / 2
    return TileGradients(dq if want.dq else dq.new_empty(0), dk, dscale, dbias)


def fake_gradients(tiles: Tiles, want: Wanted) -> TileGradients:
    """Shapes of the gradients, in the dtypes of their inputs."""
    q, k = tiles.q, tiles.k
    zero = q.new_empty((), dtype=tiles.acc)
    return TileGradients(
        q.new_empty(q.shape if want.dq else (0,)),
        q.new_empty(k.shape if want.dk and k is not None else (0,)),
        zero,
        torch.empty_like(zero),
    )


# --------------------------------------------------------------------------------------- backward


def _backward(
    kind: Kind, tiles: Tiles, row: RowState, col: RowState | None, want: Wanted
) -> TileGradients:
    dq, dk, dscale, dbias = tile_gradients(kind, tiles, row, col, want)
    return TileGradients(dq.to(tiles.q.dtype), dk.to(tiles.q.dtype), dscale, dbias)


def _backward_fake(
    kind: Kind, tiles: Tiles, row: RowState, col: RowState | None, want: Wanted
) -> TileGradients:
    return fake_gradients(tiles, want)


BACKWARD = Op(
    "pairwise_backward(str kind, *Tiles, RowState row, RowState? col, Wanted want) -> TileGradients",
    _backward,
    _backward_fake,
    values=(TileGradients,),
)


# ---------------------------------------------------------------------------------------- forward


def _forward(kind: Kind, tiles: Tiles, want_col: bool, above: Thresholds | None) -> PairwiseForward:
    with no_autocast(tiles.q.device):
        result: PairwiseForward = registry.resolve(tiles.q.device).pairwise_forward(
            kind, tiles, want_col, above or Thresholds()
        )
    return result


def _fake(kind: Kind, tiles: Tiles, want_col: bool, above: Thresholds | None) -> PairwiseForward:
    above = above or Thresholds()
    q, n, m = tiles.q, tiles.n, tiles.m
    return PairwiseForward(
        q.new_empty((n,), dtype=tiles.acc),
        q.new_empty((m if want_col else 0,), dtype=tiles.acc),
        q.new_empty((0 if above.row is None else n,), dtype=torch.int64),
        q.new_empty((0 if above.col is None else m,), dtype=torch.int64),
    )


def _save(kind: Kind, tiles: Tiles, want_col: bool, above: Any, out: PairwiseForward) -> Any:
    return kind, tiles, out.row, out.col if want_col else None


def _gradient(
    kind: Kind,
    tiles: Tiles,
    row: Tensor,
    col: Tensor | None,
    drow: Tensor | None,
    dcol: Tensor | None,
    _: Any,
    need: Any,
    *__: Any,
) -> dict[str, Tensor]:
    columns = None if dcol is None or col is None else RowState(col, dcol)
    drow = torch.zeros_like(row) if drow is None else drow
    want = Wanted(need.q, need.k, need.scale)
    found = BACKWARD.below(kind, tiles, RowState(row, drow), columns, want)
    return dict(zip(("q", "k", "scale", "bias"), found, strict=True))


def _tangent(
    kind: Kind,
    tiles: Tiles,
    row: Tensor,
    col: Tensor | None,
    _: Any,
    tangents: Tiles | None,
    *__: Any,
) -> tuple[Tensor | None, ...]:
    if tangents is None:  # of the thresholds alone
        return torch.zeros_like(row), row.new_zeros(0 if col is None else tiles.m)
    return tile_tangent(kind, tiles, tangents, row, col)


PAIRWISE = Op(
    "pairwise(str kind, *Tiles, bool want_col, Thresholds threshold) -> PairwiseForward",
    _forward,
    _fake,
    gradient=Gradient(("q", "k", "scale", "bias"), ("row", "col"), _save, _gradient, _tangent),
)


def pairwise(
    kind: Kind, tiles: Tiles, *, want_col: bool = False, above: Thresholds | None = None
) -> PairwiseForward:
    """Row (and column) reductions over S, which is never in memory.

    Differentiable once in q, k, scale and bias, through ``row`` and ``col``.

    Args:
        kind: "lse" (log-sum-exp) or "softplus" (sum of softplus).
        tiles: What S is; a bias for kind "softplus" only.
        want_col: Whether to reduce columns too (not in self mode, where they equal the rows).
        above: Thresholds; ``rank_row`` counts the allowed j with S_ij above that of row i,
            ``rank_col`` the same for columns, which needs want_col.

    Returns:
        PairwiseForward(row, col, rank_row, rank_col); what was not asked for is empty.

    Raises:
        ValueError: If kind and bias, self mode and want_col, or thresholds of columns and want_col do
            not go together.
    """
    if kind not in ("lse", "softplus"):
        raise ValueError(f"pairwise: kind must be 'lse' or 'softplus', got {kind!r}")
    if tiles.bias is not None and kind == "lse":
        raise ValueError("pairwise: bias needs kind 'softplus', got kind 'lse'")
    if tiles.k is None and want_col:
        raise ValueError("pairwise: want_col must be False in self mode (row and col are equal)")
    if above is not None:
        if above.col is not None and tiles.k is not None and not want_col:
            raise ValueError(
                "pairwise: above.col needs want_col=True, got thresholds and want_col=False"
            )
        above = Thresholds(*(None if x is None else x.detach() for x in above))
    result: PairwiseForward = PAIRWISE(kind, tiles, want_col, above)
    return result
