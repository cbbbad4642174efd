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

from sslkernels.backends.chunked import NEG_INF, accumulation_dtype, fixed_sum, row_blocks
from sslkernels.ops import registry
from sslkernels.ops._library import (
    below_autograd,
    define,
    implement,
    no_autocast,
    once_differentiable,
)
from sslkernels.ops.normalization import EPS, UnitRows, unit_rows, unit_rows_backward

define(
    "paired(Tensor query, Tensor positive_key, Tensor negative_keys, Tensor scale, Tensor? ids_q, "
    "Tensor? ids_k, bool normalize, str reduction) -> (Tensor loss, Tensor lse, Tensor positive, "
    "Tensor norms, Tensor mean_key, Tensor rank, Tensor negative_similarity)"
)
define(
    "paired_backward(Tensor query, Tensor positive_key, Tensor? negative_keys, Tensor scale, "
    "Tensor? ids_q, Tensor? ids_k, bool normalize, str reduction, Tensor lse, Tensor positive, "
    "Tensor norms, Tensor mean_key, Tensor dloss, bool want_query, bool want_positive) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)


class Paired(NamedTuple):
    """What the op returns; all but rank in the accumulation dtype."""

    loss: Tensor  # 0-d or [N]
    lse: Tensor  # [N] log-sum-exp over the negatives
    positive: Tensor  # [N] <query_i, positive_i> of the (normalised) rows, without scale
    norms: Tensor  # [2N] what the rows of query and positive_key were divided by
    mean_key: Tensor  # [N, D] softmax-weighted mean of the negatives
    rank: Tensor  # [N] int64, how many negatives are above the positive
    negative_similarity: Tensor  # 0-d, mean <query_i, negative_im> without scale


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


def _blocks(
    backend: ModuleType, q: Tensor, negative_keys: Tensor, ids_q: Tensor | None,
    ids_k: Tensor | None, normalize: bool,
) -> Iterator[_Block]:  # fmt: skip
    """Negatives in blocks of a few megabytes; q: the (normalised) queries."""
    n, m, d = negative_keys.shape
    for rows in row_blocks(n, m * d, 1):
        keys, units = negative_keys[rows], None
        if normalize:
            units = _wide_unit(backend, keys.flatten(0, 1), q.dtype)
            keys = units.unit.view(keys.shape)
        keys = keys.to(q.dtype)
        cosine = (keys @ q[rows, :, None]).squeeze(2)
        excluded = torch.zeros_like(cosine, dtype=torch.bool)
        if ids_q is not None and ids_k is not None:
            excluded = ids_q[rows, None] == ids_k[rows]
        yield _Block(rows, keys, units, cosine, excluded)


def _softmax(logits: Tensor, lse: Tensor, excluded: Tensor) -> Tensor:
    """[rows, M]: exact zeros for what is excluded, also where everything is."""
    return torch.exp(logits - lse[:, None]).masked_fill(excluded, 0.0)


def _composed_forward(
    backend: ModuleType, query: Tensor, positive_key: Tensor, negative_keys: Tensor, scale: Tensor,
    ids_q: Tensor | None, ids_k: Tensor | None, normalize: bool, reduction: str,
) -> Paired:  # fmt: skip
    n, d = query.shape
    acc = accumulation_dtype(query.dtype)
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
    for block in _blocks(backend, q, negative_keys, ids_q, ids_k, normalize):
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
    return Paired(loss, lse, positive, norms, mean_key, rank, mean_similarity)


def _composed_backward(
    backend: ModuleType, query: Tensor, positive_key: Tensor, negative_keys: Tensor | None,
    scale: Tensor, ids_q: Tensor | None, ids_k: Tensor | None, normalize: bool, reduction: str,
    lse: Tensor, positive: Tensor, norms: Tensor, mean_key: Tensor, dloss: Tensor,
    want_query: bool, want_positive: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
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
        for block in _blocks(backend, q, negative_keys, ids_q, ids_k, normalize):
            rows, excluded = block.rows, block.excluded
            share = weight[rows] * scale * _softmax(block.cosine * scale, lse[rows], excluded)
            g = (share[:, :, None] * q[rows, None, :]).flatten(0, 1)
            g = finish(block.units, g).view(block.keys.shape)
            dnegatives[rows] = g.masked_fill(excluded[:, :, None], 0.0)
    dscale = fixed_sum(weight[:, 0] * (q * gap).sum(1))
    return dquery, dpositive, dnegatives, dscale


# --------------------------------------------------------------------------------------- kernels


def _forward(query, positive_key, negative_keys, scale, ids_q, ids_k, normalize, reduction):  # type: ignore[no-untyped-def]
    args = (query, positive_key, negative_keys, scale, ids_q, ids_k, normalize, reduction)
    backend = registry.resolve(query.device)
    fused = getattr(backend, "paired_forward", None)
    if fused is not None:
        return fused(*args)
    with no_autocast(query.device):
        return tuple(_composed_forward(backend, *args))


def _backward(query, *args):  # type: ignore[no-untyped-def]
    backend = registry.resolve(query.device)
    fused = getattr(backend, "paired_backward", None)
    if fused is not None:
        return fused(query, *args)
    with no_autocast(query.device):
        return _composed_backward(backend, query, *args)


def _forward_fake(query, positive_key, negative_keys, scale, ids_q, ids_k, normalize, reduction):  # type: ignore[no-untyped-def]
    acc = accumulation_dtype(query.dtype)
    n = query.shape[0]
    return (
        query.new_empty((n,) if reduction == "none" else (), dtype=acc),
        query.new_empty((n,), dtype=acc),
        query.new_empty((n,), dtype=acc),
        query.new_empty((2 * n,), dtype=acc),
        query.new_empty(query.shape, dtype=acc),
        query.new_empty((n,), dtype=torch.int64),
        query.new_empty((), dtype=acc),
    )


def _backward_fake(
    query: Tensor, positive_key: Tensor, negative_keys: Tensor | None, scale: Tensor,
    ids_q: Tensor | None, ids_k: Tensor | None, normalize: bool, reduction: str, lse: Tensor,
    positive: Tensor, norms: Tensor, mean_key: Tensor, dloss: Tensor, want_query: bool,
    want_positive: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return (
        query.new_empty(query.shape if want_query else (0,)),
        query.new_empty(query.shape if want_positive else (0,)),
        query.new_empty((0,) if negative_keys is None else negative_keys.shape),
        torch.empty_like(scale),
    )


# -------------------------------------------------------------------------------------- autograd


class _PairedFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args):  # type: ignore[no-untyped-def]
        with below_autograd():
            out = torch.ops.sslkernels.paired.default(*args)
        query, positive_key, negative_keys, scale, ids_q, ids_k, normalize, reduction = args
        ctx.plain = (normalize, reduction, registry.override())
        loss, *state, rank, similarity = out
        # Keys without a gradient are not kept: they may be overwritten before backward.
        kept = (negative_keys, ids_q, ids_k) if ctx.needs_input_grad[2] else (None, None, None)
        ctx.save_for_backward(query, positive_key, kept[0], scale, *kept[1:], *state)
        ctx.mark_non_differentiable(*state, rank, similarity)
        ctx.set_materialize_grads(False)
        return out

    @staticmethod
    @once_differentiable("sslkernels::paired")
    def backward(ctx: Any, dloss, *_):  # type: ignore[no-untyped-def]
        if dloss is None:
            return (None,) * 8
        normalize, reduction, backend = ctx.plain
        inputs, state = ctx.saved_tensors[:6], ctx.saved_tensors[6:]
        need_query, need_positive, need_negatives, need_scale, *_ = ctx.needs_input_grad
        with below_autograd(), registry.backend(backend):
            dquery, dpositive, dnegatives, dscale = torch.ops.sslkernels.paired_backward.default(
                *inputs, normalize, reduction, *state, dloss, need_query, need_positive
            )
        return (
            dquery if need_query else None,
            dpositive if need_positive else None,
            dnegatives if need_negatives else None,
            dscale if need_scale else None,
            *(None,) * 4,
        )


implement("paired", _forward, _forward_fake, _PairedFunction.apply, inputs=(0, 1, 2, 3))
implement("paired_backward", _backward, _backward_fake)


def paired(
    query: Tensor,
    positive_key: Tensor,
    negative_keys: Tensor,
    *,
    scale: Tensor,
    ids_q: Tensor | None = None,
    ids_k: Tensor | None = None,
    normalize: bool = True,
    reduction: str = "mean",
) -> Paired:
    """InfoNCE of query i against positive i and its own M negatives; see the module.

    Differentiable once in query, positive_key, negative_keys and scale, through ``loss``.

    Args:
        query: [N, D], any floating dtype; rows may be strided.
        positive_key: [N, D] of the same dtype and device.
        negative_keys: [N, M, D] of the same; one that needs no gradient may be overwritten between
            forward and backward.
        scale: 0-d, accumulation dtype (float64 for float64 inputs, otherwise float32).
        ids_q: [N] int64; negative (i, m) is left out where ids_q[i] == ids_k[i, m].  None: none is.
        ids_k: [N, M] int64.
        normalize: Divide rows by max(norm, 1e-12) first.
        reduction: "mean", "sum" or "none".
    """
    return Paired(
        *torch.ops.sslkernels.paired.default(
            query, positive_key, negative_keys, scale, ids_q, ids_k, normalize, reduction
        )
    )
