# SPDX-License-Identifier: Apache-2.0
"""InfoNCE with negatives of its own for every query as one torch op, ``paired``.

    loss_i = log(1 + exp(lse_i - s_i)),   lse_i over scale * <q_i, k_im>,   s_i = scale * <q_i, p_i>
    w_i = dloss_i sigmoid(lse_i - s_i) = d/d lse_i = -d/d s_i

Each key serves one query, so there is no matrix product to gain from: the keys are read once in forward,
which also makes their softmax-weighted mean (all that the gradient of the query needs), and once more in
backward only when they get a gradient of their own; otherwise they are not kept.  Differentiable once.
The CPU backend does it in one call; elsewhere it is torch operations on blocks of queries, around the row
kernels of the backend where it has them.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sslkernels.backends.arithmetic import NEG_INF, fixed_sum, row_blocks
from sslkernels.backends.interface import Paired, PairedState
from sslkernels.ops import registry
from sslkernels.ops._library import Gradient, Op, forward_mode, no_autocast
from sslkernels.ops.normalization import EPS, UnitRows, unit_rows, unit_rows_backward


class PairedLoss(NamedTuple):
    """What the op returns; all but rank in the accumulation dtype."""

    loss: Tensor  # 0-d or [N]
    lse: Tensor  # this and the next three: see PairedState
    positive: Tensor
    norms: Tensor
    mean_key: Tensor
    rank: Tensor  # [N] int64, how many negatives are above the positive
    negative_similarity: Tensor  # 0-d, mean <query_i, negative_im> without scale

    @property
    def state(self) -> PairedState:
        """What backward needs."""
        return PairedState(self.lse, self.positive, self.norms, self.mean_key)


class PairedGradients(NamedTuple):
    """[0] where not wanted."""

    dquery: Tensor  # [N, D]
    dpositive: Tensor  # [N, D]
    dnegatives: Tensor  # [N, M, D]
    dscale: Tensor  # 0-d


# ------------------------------------------------------------------------- composition in torch


class _Block(NamedTuple):
    """The negatives of a block of queries."""

    rows: slice
    keys: Tensor  # [rows, M, D] normalised, accumulation dtype
    units: UnitRows | None  # the same as [rows * M, D]; None without normalize
    cosine: Tensor  # [rows, M]
    excluded: Tensor  # [rows, M] bool


def _wide_unit(backend: ModuleType, x: Tensor, acc: torch.dtype) -> UnitRows:
    """Rows in the accumulation dtype: none of them goes to tensor cores."""
    return unit_rows(backend, x, torch.empty(x.shape, dtype=acc, device=x.device))


def _blocks(backend: ModuleType, problem: Paired, q: Tensor, keys: Tensor) -> Iterator[_Block]:
    """Negatives in blocks of a few megabytes; q: the (normalised) queries, keys: the negatives."""
    n, m, d = keys.shape
    ids_q, ids_k = problem.ids_q, problem.ids_k
    for rows in row_blocks(n, m * d, 1):
        own, units = keys[rows], None
        if problem.normalize:
            units = _wide_unit(backend, own.flatten(0, 1), q.dtype)
            own = units.unit.view(own.shape)
        own = own.to(q.dtype)
        cosine = (own @ q[rows, :, None]).squeeze(2)
        excluded = torch.zeros_like(cosine, dtype=torch.bool)
        if ids_q is not None and ids_k is not None:
            excluded = ids_q[rows, None] == ids_k[rows]
        yield _Block(rows, own, units, cosine, excluded)


def _softmax(logits: Tensor, lse: Tensor, excluded: Tensor) -> Tensor:
    """[rows, M]: exact zeros for what is excluded, also where everything is."""
    return torch.exp(logits - lse[:, None]).masked_fill(excluded, 0.0)


def _negatives(problem: Paired) -> Tensor:
    if problem.negative_keys is None:
        raise ValueError("paired: negative_keys must be given, got None")
    return problem.negative_keys


def _composed_forward(backend: ModuleType, problem: Paired) -> PairedLoss:
    query, positive_key, scale = problem.query, problem.positive_key, problem.scale
    normalize, reduction, acc = problem.normalize, problem.reduction, problem.acc
    n, d = query.shape
    norms = query.new_ones(2 * n, dtype=acc)
    if normalize:
        units = [_wide_unit(backend, x, acc) for x in (query, positive_key)]
        norms = torch.cat([side.norm for side in units]).clamp(min=EPS)
        q, p = (side.unit for side in units)
    else:
        q, p = query.to(acc), positive_key.to(acc)
    positive = (q * p).sum(1)
    lse, mean_key = q.new_full((n,), NEG_INF), q.new_zeros(n, d)
    rank = torch.zeros(n, dtype=torch.int64, device=q.device)
    similarity, allowed = q.new_zeros(n), q.new_zeros(n)
    for block in _blocks(backend, problem, q, _negatives(problem)):
        rows, excluded = block.rows, block.excluded
        logits = (block.cosine * scale).masked_fill(excluded, NEG_INF)
        if logits.shape[1] > 0:
            lse[rows] = torch.logsumexp(logits, 1)
        weight = _softmax(logits, lse[rows], excluded)
        # A product with 0 would let the NaN of an excluded key through.
        keys = block.keys.masked_fill(excluded[:, :, None], 0.0)
        mean_key[rows] = (weight[:, None, :] @ keys).squeeze(1)
        rank[rows] = (logits > (positive[rows] * scale)[:, None]).sum(1)
        similarity[rows] = block.cosine.masked_fill(excluded, 0.0).sum(1)
        allowed[rows] = (~excluded).sum(1).to(acc)
    loss = torch.nn.functional.softplus(lse - positive * scale, threshold=40.0)
    mean_similarity = fixed_sum(similarity) / fixed_sum(allowed).clamp(min=1)
    if reduction != "none":
        loss = fixed_sum(loss) / (max(1, n) if reduction == "mean" else 1)
    return PairedLoss(loss, lse, positive, norms, mean_key, rank, mean_similarity)


def _composed_backward(
    backend: ModuleType,
    problem: Paired,
    state: PairedState,
    dloss: Tensor,
    want_query: bool,
    want_positive: bool,
) -> PairedGradients:
    query, positive_key, negative_keys = problem.query, problem.positive_key, problem.negative_keys
    scale, normalize, reduction = problem.scale, problem.normalize, problem.reduction
    lse, positive, _, mean_key = state
    n, acc = query.shape[0], lse.dtype
    units_q = units_p = None
    if normalize:
        units_q = _wide_unit(backend, query, acc)
        units_p = _wide_unit(backend, positive_key, acc)
    q = query.to(acc) if units_q is None else units_q.unit
    p = positive_key.to(acc) if units_p is None else units_p.unit

    def finish(units: UnitRows | None, gradient: Tensor) -> Tensor:
        """The gradient of what was given from that of the rows used."""
        if units is not None:
            gradient = unit_rows_backward(backend, units, gradient)
        return gradient.to(query.dtype)

    weight = torch.sigmoid(lse - positive * scale) * dloss
    weight = (weight / max(1, n) if reduction == "mean" else weight)[:, None]
    gap = mean_key - p
    dquery, dpositive, dnegatives = (query.new_empty(0) for _ in range(3))
    if want_query:
        dquery = finish(units_q, scale * weight * gap)
    if want_positive:
        dpositive = finish(units_p, -scale * weight * q)
    if negative_keys is not None:
        dnegatives = torch.empty_like(negative_keys, memory_format=torch.contiguous_format)
        for block in _blocks(backend, problem, q, negative_keys):
            rows, excluded = block.rows, block.excluded
            share = weight[rows] * scale * _softmax(block.cosine * scale, lse[rows], excluded)
            g = (share[:, :, None] * q[rows, None, :]).flatten(0, 1)
            g = finish(block.units, g).view(block.keys.shape)
            dnegatives[rows] = g.masked_fill(excluded[:, :, None], 0.0)
    dscale = fixed_sum(weight[:, 0] * (q * gap).sum(1))
    return PairedGradients(dquery, dpositive, dnegatives, dscale)


# --------------------------------------------------------------------------------------- backward


def _backward(
    problem: Paired, state: PairedState, dloss: Tensor, want_query: bool, want_positive: bool
) -> PairedGradients:
    backend = registry.resolve(problem.query.device)
    arguments = (problem, state, dloss, want_query, want_positive)
    fused = getattr(backend, "paired_backward", None)
    if fused is not None:
        return PairedGradients(*fused(*arguments))
    with no_autocast(problem.query.device):
        return _composed_backward(backend, *arguments)


def _backward_fake(
    problem: Paired, state: PairedState, dloss: Tensor, want_query: bool, want_positive: bool
) -> PairedGradients:
    query, negatives = problem.query, problem.negative_keys
    return PairedGradients(
        query.new_empty(query.shape if want_query else (0,)),
        query.new_empty(query.shape if want_positive else (0,)),
        query.new_empty((0,) if negatives is None else negatives.shape),
        torch.empty_like(problem.scale),
    )


BACKWARD = Op(
    "paired_backward(*Paired, *PairedState, Tensor dloss, bool want_query, bool want_positive) "
    "-> PairedGradients",
    _backward,
    _backward_fake,
    values=(PairedGradients,),
)


# ---------------------------------------------------------------------------------------- forward


def _forward(problem: Paired) -> PairedLoss:
    backend = registry.resolve(problem.query.device)
    fused = getattr(backend, "paired_forward", None)
    if fused is not None:
        state: PairedState
        loss, state, rank, similarity = fused(problem)
        return PairedLoss(loss, *state, rank, similarity)
    with no_autocast(problem.query.device):
        return _composed_forward(backend, problem)


def _fake(problem: Paired) -> PairedLoss:
    query, n, acc = problem.query, problem.n, problem.acc
    return PairedLoss(
        query.new_empty((n,) if problem.reduction == "none" else (), dtype=acc),
        query.new_empty((n,), dtype=acc),
        query.new_empty((n,), dtype=acc),
        query.new_empty((2 * n,), dtype=acc),
        query.new_empty(query.shape, dtype=acc),
        query.new_empty((n,), dtype=torch.int64),
        query.new_empty((), dtype=acc),
    )


def _save(problem: Paired, out: PairedLoss) -> Any:
    keys = problem.negative_keys
    if keys is not None and not keys.requires_grad and not forward_mode():
        # Keys without a gradient are not kept: they may be overwritten before backward.
        problem = problem._replace(negative_keys=None, ids_q=None, ids_k=None)
    return problem, out.state


def _gradient(
    problem: Paired, state: PairedState, dloss: Tensor, need: Paired
) -> dict[str, Tensor]:
    if not need.negative_keys:
        problem = problem._replace(negative_keys=None)
    names = ("query", "positive_key", "negative_keys", "scale")
    found = BACKWARD.below(problem, state, dloss, need.query, need.positive_key)
    return dict(zip(names, found, strict=True))


def _tangent(problem: Paired, state: PairedState, tangents: Paired) -> tuple[Tensor]:
    # Every query has a loss of its own: the tangent is <gradient, tangent>, row by row.
    acc, n = problem.acc, problem.n
    each = problem._replace(reduction="none")
    found = BACKWARD.below(each, state, state.lse.new_ones(n), True, True)
    rows = state.lse.new_zeros(n)
    gradients = (found.dquery, found.dpositive, found.dnegatives)
    moved = (tangents.query, tangents.positive_key, tangents.negative_keys)
    for gradient, tangent in zip(gradients, moved, strict=True):
        if tangent is not None and n > 0:
            rows = rows + (gradient.to(acc) * tangent.to(acc)).reshape(n, -1).sum(1)
    if tangents.scale is not None:
        weight = torch.sigmoid(state.lse - state.positive * problem.scale)
        unit = problem.query.to(acc) / state.norms[:n, None]
        rows = rows + weight * ((unit * state.mean_key).sum(1) - state.positive) * tangents.scale
    if problem.reduction == "none":
        return (rows,)
    return (fixed_sum(rows) / (max(1, n) if problem.reduction == "mean" else 1),)


PAIRED = Op(
    "paired(*Paired) -> PairedLoss",
    _forward,
    _fake,
    values=(PairedLoss,),
    gradient=Gradient(
        ("query", "positive_key", "negative_keys", "scale"), ("loss",), _save, _gradient, _tangent
    ),
)


def paired(problem: Paired) -> PairedLoss:
    """InfoNCE of query i against positive i and its own M negatives; see the module and ``Paired``.

    Differentiable once in query, positive_key, negative_keys and scale, through ``loss``.  Negative
    keys that need no gradient may be overwritten between forward and backward.
    """
    result: PairedLoss = PAIRED(problem)
    return result
