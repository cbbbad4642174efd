# SPDX-License-Identifier: Apache-2.0
"""Whole losses composed from the primitives of a backend that has no whole losses of its own.

The contract is that of ``contrastive.py``, whose ``WholeLosses`` the CPU implements in one call; tests
hold the two against each other.  Everything here is below autograd.
"""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple, cast

import torch
from torch import Tensor

from sslkernels.backends.arithmetic import NEG_INF, fixed_sum
from sslkernels.backends.interface import (
    Contrastive,
    Kept,
    Kind,
    Problem,
    RowState,
    State,
    Thresholds,
    Tiles,
    Wanted,
)
from sslkernels.ops import normalization
from sslkernels.ops.normalization import UnitRows, unit_rows, unit_rows_backward
from sslkernels.ops.pairwise import nonzero_scale
from sslkernels.ops.rows import (
    accumulate_rows_,
    add_class_dots_gradient_,
    class_dots,
    dots,
    segments,
)

Gradients = tuple[Tensor | None, Tensor | None, Tensor, Tensor | None]


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
        if layout == "classes":
            if problem.normalize:
                side = unit_rows(backend, a)
                a, sides = side.unit, (side, side)
            rows = a.to(torch.bfloat16) if problem.bf16 else a
            ids = torch.arange(n, device=a.device)
            return cls(Tiles(rows, None, problem.scale, None, ids), a, a, sides)
        if problem.normalize:
            halves: tuple[Tensor | None, Tensor | None] = (None, None)
            if problem.joined:  # in one buffer from the start
                joint = a.new_empty((2 * n, a.shape[1]), dtype=normalization.operand_dtype(a))
                halves = (joint[:n], joint[n:])
            sides = unit_rows(backend, a, halves[0]), unit_rows(backend, b, halves[1])
            a, b = sides[0].unit, sides[1].unit
        elif problem.joined:
            joint = torch.cat((a, b))
        q, k = (a, b) if joint is None else (joint, None)
        if problem.bf16:
            q, k = q.to(torch.bfloat16), None if k is None else k.to(torch.bfloat16)
        ids_q, ids_k = problem.ids_q, problem.ids_k
        if layout != "bank":
            ids = torch.arange(n, device=a.device) if ids_q is None else ids_q
            ids_q, ids_k = (ids, ids) if joint is None else (torch.cat((ids, ids)), None)
        return cls(Tiles(q, k, problem.scale, problem.bias, ids_q, ids_k), a, b, sides)


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


def kind(problem: Problem) -> Kind:
    """Of the tiles."""
    return "softplus" if problem.layout == "sigmoid" else "lse"


def _one_in(problem: Problem) -> Tensor:
    """[N]: 1 / how many other rows have the label of a row, 0 where none has."""
    index = segments(_labels(problem))
    ones = torch.ones((problem.n, 1), dtype=problem.acc, device=problem.a.device)
    others = accumulate_rows_(torch.zeros_like(ones), index, ones)[index, 0] - 1
    return torch.where(others > 0, 1 / others, 0.0)


def _labels(problem: Problem) -> Tensor:
    if problem.ids_q is None:
        raise ValueError("contrastive: layout 'classes' needs ids_q, got None")
    return problem.ids_q


class _Head(NamedTuple):
    """What the head sees, by reduced row."""

    row: Tensor  # [R] the negatives
    logit: Tensor  # [R] the positive's
    # [R] of the positive: layout "decoupled"; "classes": 0 where a row has none, and no loss.
    weight: Tensor | float

    @classmethod
    def make(cls, problem: Problem, lse: Tensor, positive: Tensor) -> _Head:
        logit = positive * problem.scale
        if problem.bias is not None:
            logit = logit + problem.bias
        weight = _one_in(problem) if problem.layout == "classes" else None
        if problem.sigma > 0:
            weight = 2 - problem.n * torch.softmax(positive / problem.sigma, 0)
        if len(lse) > problem.n:
            logit = logit.repeat(2)
            weight = weight if weight is None else weight.repeat(2)
        return cls(lse, logit, 1.0 if weight is None else weight)

    def loss(self, layout: str) -> Tensor:
        """[R]."""
        if layout == "decoupled":
            return self.row.masked_fill(self.row == NEG_INF, 0.0) - self.weight * self.logit
        if layout == "classes":
            none = cast(Tensor, self.weight) == 0
            return torch.where(none, 0.0, self.row - self.weight * self.logit)
        negatives = -self.logit if layout == "sigmoid" else self.row - self.logit
        loss = torch.nn.functional.softplus(negatives, threshold=40.0)
        return loss + self.row if layout == "sigmoid" else loss

    def terms(self, problem: Problem) -> int | Tensor:
        """What the mean of the loss divides by."""
        if problem.layout == "classes":
            return fixed_sum((cast(Tensor, self.weight) != 0).to(problem.acc)).clamp(min=1)
        return max(1, problem.outputs)

    def slopes(self, layout: str) -> tuple[Tensor, Tensor]:
        """[R] each: the derivative by ``row``, and minus the one by ``logit``."""
        one = torch.ones_like(self.logit)
        if layout == "decoupled":
            return one, one * self.weight
        if layout == "classes":
            return (self.weight != 0) * one, one * self.weight
        negatives = -self.logit if layout == "sigmoid" else self.row - self.logit
        probability = torch.sigmoid(negatives)
        return (one if layout == "sigmoid" else probability), probability


def forward(backend: ModuleType, problem: Problem, want_rank: bool) -> Contrastive:
    """See ``interface.WholeLosses.contrastive_forward``; logits are never kept."""
    n, layout, reduction = problem.n, problem.layout, problem.reduction
    tiles, exact_a, exact_b, sides = _Rows.make(backend, problem)
    if layout == "classes":
        positive = class_dots(exact_a.to(problem.acc), segments(_labels(problem)))
    else:
        positive = dots(exact_a, exact_b)
    above = positive * problem.scale if want_rank else None
    mean_key = None
    if layout == "bank":
        keys = _keys(backend, problem, tiles.q)
        lse, mean_key, rank = backend.attend(tiles._replace(k=keys), above)
    elif tiles.k is None:
        thresholds = Thresholds(None if above is None else above.repeat(2))
        lse, _, rank, _ = backend.pairwise_forward("lse", tiles, False, thresholds)
    else:
        both = layout == "both"
        thresholds = Thresholds(above, above if both else None)
        lse, col, rank, rank_col = backend.pairwise_forward(kind(problem), tiles, both, thresholds)
        if both:
            lse, rank = torch.cat((lse, col)), torch.cat((rank, rank_col))
    head = _Head.make(problem, lse, positive)
    per_row = head.loss(layout)
    if layout == "both":
        per_row = (per_row[:n] + per_row[n:]) / 2
    loss = per_row if reduction == "none" else fixed_sum(per_row)
    if reduction == "mean":
        loss = loss / head.terms(problem)
    if sides is None:
        inv = torch.ones(2 * n, dtype=problem.acc, device=problem.a.device)
    else:
        inv = 1.0 / torch.cat([side.norm for side in sides]).clamp(min=normalization.EPS)
        if layout == "classes":
            inv[n:] = 1.0
    state = torch.cat((lse, positive, inv))
    return Contrastive(loss, state, mean_key, rank if want_rank else None)


def row_gradients(problem: Problem, state: State, dloss: Tensor) -> tuple[Tensor, Tensor]:
    """[R] each: the gradient of the reduced row, and minus that of the positive's logit."""
    head = _Head.make(problem, state.lse, state.positive)
    if problem.reduction == "mean":
        dloss = dloss / head.terms(problem)
    if problem.layout == "both":
        dloss = (dloss.repeat(2) if problem.reduction == "none" else dloss) / 2
    by_row, pull = head.slopes(problem.layout)
    return by_row * dloss, pull * dloss


def backward(
    backend: ModuleType, problem: Problem, kept: Kept, dloss: Tensor, want: Wanted
) -> Gradients:
    """See ``interface.WholeLosses.contrastive_backward``."""
    if want.dscale:  # it is divided by
        problem = problem._replace(scale=nonzero_scale(problem.scale))
    n, layout, scale = problem.n, problem.layout, problem.scale
    state = State.split(kept.state, n)
    from_tiles = torch.zeros_like(scale)
    tiles, exact_a, exact_b, sides = _Rows.make(backend, problem)
    weight, pull = row_gradients(problem, state, dloss)
    pair = (pull[:n] + pull[n:] if len(pull) > n else pull)[:, None]
    wa, wb = exact_a.to(weight.dtype), exact_b.to(weight.dtype)
    if kept.mean_key is not None:
        ga, gb = scale * weight[:, None] * kept.mean_key, torch.zeros_like(wb)
    elif tiles.k is None:
        row = RowState(state.lse, weight)
        g = backend.pairwise_backward("lse", tiles, row, None, Wanted(True, False)).dq
        ga, gb = g[:n], g[n:]
    else:
        row, col = RowState(state.lse[:n], weight[:n]), None
        if layout == "both":
            col = RowState(state.lse[n:], weight[n:])
        wanted = Wanted(want.dq or want.dscale, want.dk)
        ga, gb, from_tiles = backend.pairwise_backward(kind(problem), tiles, row, col, wanted)
    dbias = None if problem.bias is None else from_tiles - fixed_sum(pull)
    dscale = torch.zeros_like(scale)
    da = db = None
    if layout == "classes":
        add_class_dots_gradient_(ga, wa, segments(_labels(problem)), -scale * pull)
        da, along = ga, (wa * ga).sum(1) / 2
        if want.dscale:
            dscale = fixed_sum(along) / scale
    elif want.dq or want.dscale or problem.joined:
        da = ga - scale * pair * wb
        along = (wa * da).sum(1)
        if problem.joined:
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
        dbias,
    )
