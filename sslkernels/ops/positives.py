# SPDX-License-Identifier: Apache-2.0
"""Tiles and positives as one torch op, ``with_positives``: the gradients of both in one buffer.

    row_i        over the tiles of S, as ``pairwise`` has it
    positive_i   <q_i, k_i>; in self mode the sum of <q_i, q_j> over the other rows of the class of i

The same from ``pairwise`` and a product of rows is two gradients of each input that autograd adds,
alive together.  Here the second is added to the first in chunks of rows.  The positive has no scale:
what a loss does with it is arithmetic on [N].
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from sslkernels.backends.interface import Kind, RowState, Thresholds, Tiles, Wanted
from sslkernels.ops import registry
from sslkernels.ops._library import Gradient, Op, no_autocast
from sslkernels.ops.pairwise import TileGradients, fake_gradients, tile_gradients
from sslkernels.ops.rows import accumulate_rows, add_class_dots_gradient_, chunks, class_dots, dots
from sslkernels.ops.tangents import tile_tangent


class WithPositives(NamedTuple):
    """[N] each, accumulation dtype."""

    row: Tensor
    positive: Tensor


def _given(classes: Tensor | None) -> Tensor:
    if classes is None:
        raise ValueError("with_positives: self mode (k None) needs classes, got None")
    return classes


# --------------------------------------------------------------------------------------- backward


def _backward(
    kind: Kind, tiles: Tiles, classes: Tensor | None, row: RowState, dpositive: Tensor, want: Wanted
) -> TileGradients:
    q, k, acc = tiles.q, tiles.k, tiles.acc
    dq, dk, dscale, dbias = tile_gradients(kind, tiles, row, None, want)
    if k is None:
        if want.dq:
            add_class_dots_gradient_(dq, q.to(acc), _given(classes), dpositive)
    else:
        for c in chunks(q):
            weight = dpositive[c, None]
            if want.dq:
                dq[c].addcmul_(k[c].to(acc), weight)
            if want.dk:
                dk[c].addcmul_(q[c].to(acc), weight)
    return TileGradients(dq.to(q.dtype), dk.to(q.dtype), dscale, dbias)


def _backward_fake(
    kind: Kind, tiles: Tiles, classes: Tensor | None, row: RowState, dpositive: Tensor, want: Wanted
) -> TileGradients:
    return fake_gradients(tiles, want)


BACKWARD = Op(
    "with_positives_backward(str kind, *Tiles, Tensor? classes, RowState row, Tensor dpositive, "
    "Wanted want) -> TileGradients",
    _backward,
    _backward_fake,
    values=(TileGradients,),
)


# ---------------------------------------------------------------------------------------- forward


def _forward(kind: Kind, tiles: Tiles, classes: Tensor | None) -> WithPositives:
    q, k = tiles.q, tiles.k
    with no_autocast(q.device):
        if k is not None:
            positive = dots(q, k)
        else:
            positive = class_dots(q.to(tiles.acc), _given(classes))
        found = registry.resolve(q.device).pairwise_forward(kind, tiles, False, Thresholds())
    return WithPositives(found.row, positive)


def _fake(kind: Kind, tiles: Tiles, classes: Tensor | None) -> WithPositives:
    row = tiles.q.new_empty((tiles.n,), dtype=tiles.acc)
    return WithPositives(row, torch.empty_like(row))


def _save(kind: Kind, tiles: Tiles, classes: Tensor | None, out: WithPositives) -> Any:
    return kind, tiles, classes, out.row


def _gradient(
    kind: Kind,
    tiles: Tiles,
    classes: Tensor | None,
    row: Tensor,
    drow: Tensor | None,
    dpositive: Tensor | None,
    _: Any,
    need: Any,
    *__: Any,
) -> dict[str, Tensor]:
    drow, dpositive = (torch.zeros_like(row) if g is None else g for g in (drow, dpositive))
    want = Wanted(need.q, need.k, need.scale)
    found = BACKWARD.below(kind, tiles, classes, RowState(row, drow), dpositive, want)
    return dict(zip(("q", "k", "scale", "bias"), found, strict=True))


def _tangent(
    kind: Kind, tiles: Tiles, classes: Tensor | None, row: Tensor, _: Any, tangents: Tiles, *__: Any
) -> tuple[Tensor, ...]:
    d_row, _ = tile_tangent(kind, tiles, tangents, row, None)
    q = tiles.q.to(tiles.acc)
    zero = torch.zeros_like(q)
    dq, dk = (zero if t is None else t.to(tiles.acc) for t in (tangents.q, tangents.k))
    if tiles.k is not None:
        return d_row, (dq * tiles.k + q * dk).sum(1)
    index = _given(classes)
    sums, d_sums = (accumulate_rows(x, index, tiles.n)[index] - x for x in (q, dq))
    return d_row, (dq * sums + q * d_sums).sum(1)


WITH_POSITIVES = Op(
    "with_positives(str kind, *Tiles, Tensor? classes) -> WithPositives",
    _forward,
    _fake,
    values=(WithPositives,),
    gradient=Gradient(("q", "k", "scale", "bias"), ("row", "positive"), _save, _gradient, _tangent),
)


def with_positives(
    kind: Kind,
    q: Tensor,
    k: Tensor | None = None,
    *,
    scale: Tensor,
    bias: Tensor | None = None,
    classes: Tensor | None = None,
) -> WithPositives:
    """Row reductions over all pairs but (i, i), and the positives, differentiable once.

    Args:
        kind: "lse" or "softplus", as in ``pairwise``.
        q: [N, D], any floating dtype and strides.
        k: [N, D] of the same dtype and device; None for self mode (k = q).
        scale: 0-d, accumulation dtype.
        bias: 0-d, accumulation dtype, kind "softplus" only.
        classes: [N] int64 in [0, N), self mode only.
    """
    ids = torch.arange(q.shape[0], device=q.device)
    tiles = Tiles(q, k, scale, bias, ids, None if k is None else ids)
    result: WithPositives = WITH_POSITIVES(kind, tiles, classes)
    return result
