# SPDX-License-Identifier: Apache-2.0
"""Whole losses composed from the primitives of a backend that has no whole losses of its own.

The contract is that of ``contrastive.py``, whose ``WholeLosses`` the CPU implements in one call; tests
hold the two against each other.  Everything here is below autograd.
"""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from sslkernels.backends.arithmetic import fixed_sum
from sslkernels.backends.interface import (
    Contrastive,
    Kept,
    Problem,
    RowState,
    State,
    Thresholds,
    Tiles,
    Wanted,
)
from sslkernels.ops import normalization
from sslkernels.ops.normalization import UnitRows, unit_rows, unit_rows_backward
from sslkernels.ops.rows import dots

Gradients = tuple[Tensor | None, Tensor | None, Tensor]


class _Rows(NamedTuple):
    """Both views, as the tiles see them."""

    tiles: Tiles  # layout "bank": without the keys
    exact_a: Tensor  # [N, D] tile operands without ``bf16``
    exact_b: Tensor
    sides: tuple[UnitRows, UnitRows] | None  # None without normalize

    @classmethod
    def make(cls, backend: ModuleType, problem: Problem) -> _Rows:
        layout, a, b, n = problem.layout, problem.a, problem.b, problem.n
        joint, sides = None, None
        if problem.normalize:
            halves: tuple[Tensor | None, Tensor | None] = (None, None)
            if layout == "joint":  # in one buffer from the start
                joint = a.new_empty((2 * n, a.shape[1]), dtype=normalization.operand_dtype(a))
                halves = (joint[:n], joint[n:])
            sides = unit_rows(backend, a, halves[0]), unit_rows(backend, b, halves[1])
            a, b = sides[0].unit, sides[1].unit
        elif layout == "joint":
            joint = torch.cat((a, b))
        q, k = (a, b) if joint is None else (joint, None)
        if problem.bf16:
            q, k = q.to(torch.bfloat16), None if k is None else k.to(torch.bfloat16)
        ids_q, ids_k = problem.ids_q, problem.ids_k
        if layout != "bank":
            ids = torch.arange(n, device=a.device) if ids_q is None else ids_q
            ids_q, ids_k = (ids, ids) if joint is None else (torch.cat((ids, ids)), None)
        return cls(Tiles(q, k, problem.scale, None, ids_q, ids_k), a, b, sides)


def _keys(backend: ModuleType, problem: Problem, like: Tensor) -> Tensor:
    """The bank as the tiles see it, in the dtype of the queries."""
    bank = problem.bank
    if bank is None:
        raise ValueError("contrastive: layout 'bank' needs bank, got None")
    if not problem.normalize:
        return bank.to(like.dtype)
    keys = torch.empty(bank.shape, dtype=like.dtype, device=bank.device)
    unit_rows(backend, bank, out=keys)
    return keys


def forward(backend: ModuleType, problem: Problem, want_rank: bool) -> Contrastive:
    """See ``interface.WholeLosses.contrastive_forward``; logits are never kept."""
    n, layout, reduction = problem.n, problem.layout, problem.reduction
    tiles, exact_a, exact_b, sides = _Rows.make(backend, problem)
    positive = dots(exact_a, exact_b)
    logit = positive * problem.scale
    above = logit if want_rank else None
    mean_key = None
    if layout == "bank":
        keys = _keys(backend, problem, tiles.q)
        lse, mean_key, rank = backend.attend(tiles._replace(k=keys), above)
    elif layout == "joint":
        thresholds = Thresholds(None if above is None else above.repeat(2))
        lse, _, rank, _ = backend.pairwise_forward("lse", tiles, False, thresholds)
    else:
        both = layout == "both"
        thresholds = Thresholds(above, above if both else None)
        lse, col, rank, rank_col = backend.pairwise_forward("lse", tiles, both, thresholds)
        if both:
            lse, rank = torch.cat((lse, col)), torch.cat((rank, rank_col))
    logit = logit.repeat(2) if len(lse) > n else logit
    per_row = torch.nn.functional.softplus(lse - logit, threshold=40.0)
    if layout == "both":
        per_row = (per_row[:n] + per_row[n:]) / 2
    loss = per_row if reduction == "none" else fixed_sum(per_row)
    if reduction == "mean":
        loss = loss / max(1, per_row.numel())
    if sides is None:
        inv = torch.ones(2 * n, dtype=problem.acc, device=problem.a.device)
    else:
        inv = 1.0 / torch.cat([side.norm for side in sides]).clamp(min=normalization.EPS)
    state = torch.cat((lse, positive, inv))
    return Contrastive(loss, state, mean_key, rank if want_rank else None)


def row_weights(problem: Problem, state: State, dloss: Tensor) -> Tensor:
    """[R]: w_r = dloss_r sigmoid(lse_r - p_r), the gradient of lse_r and minus that of p_r."""
    logit = state.positive * problem.scale
    two = len(state.lse) > problem.n
    weight = torch.sigmoid(state.lse - (logit.repeat(2) if two else logit))
    if problem.reduction == "mean":
        dloss = dloss / max(1, problem.outputs)
    both = problem.layout == "both"
    weight = weight * (dloss.repeat(2) if both and problem.reduction == "none" else dloss)
    return weight / 2 if both else weight


def backward(
    backend: ModuleType, problem: Problem, kept: Kept, dloss: Tensor, want: Wanted
) -> Gradients:
    """See ``interface.WholeLosses.contrastive_backward``."""
    n, layout, scale = problem.n, problem.layout, problem.scale
    state = State.split(kept.state, n)
    tiles, exact_a, exact_b, sides = _Rows.make(backend, problem)
    weight = row_weights(problem, state, dloss)
    pair = (weight[:n] + weight[n:] if len(weight) > n else weight)[:, None]
    wa, wb = exact_a.to(weight.dtype), exact_b.to(weight.dtype)
    if kept.mean_key is not None:
        ga, gb = scale * weight[:, None] * kept.mean_key, torch.zeros_like(wb)
    elif layout == "joint":
        row = RowState(state.lse, weight)
        g = backend.pairwise_backward("lse", tiles, row, None, Wanted(True, False)).dq
        ga, gb = g[:n], g[n:]
    else:
        row, col = RowState(state.lse[:n], weight[:n]), None
        if layout == "both":
            col = RowState(state.lse[n:], weight[n:])
        wanted = Wanted(want.dq or want.dscale, want.dk)
        ga, gb, _ = backend.pairwise_backward("lse", tiles, row, col, wanted)
    dscale = torch.zeros_like(scale)
    da = db = None
    if want.dq or want.dscale or layout == "joint":
        da = ga - scale * pair * wb
        along = (wa * da).sum(1)
        if layout == "joint":
            along = (along + (wb * (gb - scale * pair * wa)).sum(1)) / 2
        if want.dscale:
            dscale = fixed_sum(along) / scale
    if want.dk:
        db = gb - scale * pair * wa
    da = da if want.dq else None
    if sides is not None:
        da = None if da is None else unit_rows_backward(backend, sides[0], da)
        db = None if db is None else unit_rows_backward(backend, sides[1], db)
    return (
        None if da is None else da.to(problem.a.dtype),
        None if db is None else db.to(problem.b.dtype),
        dscale,
    )
