# SPDX-License-Identifier: Apache-2.0
"""The tile engine as torch ops: ``pairwise``, ``attend`` and ``extremes``.

The ops add to the primitives of ``backends/interface.py`` what torch asks for: schemas, fakes,
autograd and the gradient of ``scale``.  They take inputs as they are; the checks that users see are
in ``sslkernels.functional``.

The gradient of the scale comes from that of q: with S_ij = scale * <q_i, k_j> + bias,

    dq_i = scale * sum_j G_ij k_j     so     dscale = sum_ij G_ij <q_i, k_j> = sum_i <q_i, dq_i> /
    scale

(half of it in self mode, where dq collects both sides).  A scale of 0 would divide 0 by 0, so the
backend is then given ``TINY`` in its place, with which S is the same to the last bit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sslkernels.backends.chunked import accumulation_dtype, fixed_sum
from sslkernels.backends.interface import Attend, Extremes, Kind, PairwiseForward
from sslkernels.ops import registry
from sslkernels.ops._library import (
    below_autograd,
    define,
    implement,
    no_autocast,
    once_differentiable,
)
from sslkernels.ops.rows import dots

# exp(TINY * <q, k>) is 1 for any representable dot product that is not itself near 1e13; TINY *
# TINY and the products with gradients stay far from float32's smallest normal number, 1e-38.
TINY = 1e-20

define(
    "pairwise(str kind, Tensor q, Tensor? k, Tensor scale, Tensor? bias, Tensor? ids_q, "
    "Tensor? ids_k, bool want_col, Tensor? threshold_row, Tensor? threshold_col) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)
define(
    "pairwise_backward(str kind, Tensor q, Tensor? k, Tensor scale, Tensor? bias, Tensor? ids_q, "
    "Tensor? ids_k, Tensor row, Tensor? col, Tensor drow, Tensor? dcol, bool want_dq, "
    "bool want_dk, bool want_dscale) -> (Tensor, Tensor, Tensor, Tensor)"
)
define(
    "attend(Tensor q, Tensor k, Tensor scale, Tensor? ids_q, Tensor? ids_k, Tensor? threshold) "
    "-> (Tensor, Tensor, Tensor)"
)
define(
    "extremes(Tensor q, Tensor? k, Tensor scale, Tensor? bias_k, Tensor ids_q, Tensor? ids_k) "
    "-> (Tensor, Tensor)"
)


# ---------------------------------------------------------------------------------- kernels


def _pairwise(
    kind: Kind,
    q: Tensor,
    k: Tensor | None,
    scale: Tensor,
    bias: Tensor | None,
    ids_q: Tensor | None,
    ids_k: Tensor | None,
    want_col: bool,
    threshold_row: Tensor | None,
    threshold_col: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    with no_autocast(q.device):
        return tuple(
            registry.resolve(q.device).pairwise_forward(
                kind, q, k, scale, bias, ids_q, ids_k, want_col, threshold_row, threshold_col
            )
        )


def tile_gradients(
    kind: Kind,
    q: Tensor,
    k: Tensor | None,
    scale: Tensor,
    bias: Tensor | None,
    ids_q: Tensor | None,
    ids_k: Tensor | None,
    row: Tensor,
    col: Tensor | None,
    drow: Tensor,
    dcol: Tensor | None,
    want_dq: bool,
    want_dk: bool,
    want_dscale: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, scale and bias in the accumulation dtype; [0] or 0 where not wanted.

    Those of q and k belong to the caller, who may go on adding to them.
    """
    if want_dscale:
        scale = torch.where(scale == 0, torch.full_like(scale, TINY), scale)
    with no_autocast(q.device):
        dq, dk, dbias = registry.resolve(q.device).pairwise_backward(
            kind,
            q,
            k,
            scale,
            bias,
            ids_q,
            ids_k,
            row,
            col,
            drow,
            dcol,
            want_dq or (want_dscale and not want_dk),
            want_dk,
        )
    dscale = torch.zeros_like(scale)
    if want_dscale:
        operand, gradient = (q, dq) if k is None or want_dq or not want_dk else (k, dk)
        dscale = fixed_sum(dots(operand, gradient)) / scale
        if k is None:
            dscale = dscale / 2
    return (dq if want_dq else dq.new_empty(0)), dk, dscale, dbias


def _pairwise_backward(kind: Kind, q: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dq, dk, dscale, dbias = tile_gradients(kind, q, *args)
    return dq.to(q.dtype), dk.to(q.dtype), dscale, dbias


def _attend(
    q: Tensor,
    k: Tensor,
    scale: Tensor,
    ids_q: Tensor | None,
    ids_k: Tensor | None,
    threshold: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    with no_autocast(q.device):
        return tuple(registry.resolve(q.device).attend(q, k, scale, ids_q, ids_k, threshold))


def _extremes(
    q: Tensor,
    k: Tensor | None,
    scale: Tensor,
    bias_k: Tensor | None,
    ids_q: Tensor,
    ids_k: Tensor | None,
) -> tuple[Tensor, Tensor]:
    with no_autocast(q.device):
        return tuple(registry.resolve(q.device).extremes(q, k, scale, bias_k, ids_q, ids_k))


# ------------------------------------------------------------------------------------ fakes


def _ints(like: Tensor, n: Any) -> Tensor:
    return like.new_empty((n,), dtype=torch.int64)


def _pairwise_fake(
    kind: str,
    q: Tensor,
    k: Tensor | None,
    scale: Tensor,
    bias: Tensor | None,
    ids_q: Tensor | None,
    ids_k: Tensor | None,
    want_col: bool,
    threshold_row: Tensor | None,
    threshold_col: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    acc = accumulation_dtype(q.dtype)
    m = q.shape[0] if k is None else k.shape[0]
    return (
        q.new_empty((q.shape[0],), dtype=acc),
        q.new_empty((m if want_col else 0,), dtype=acc),
        _ints(q, 0 if threshold_row is None else q.shape[0]),
        _ints(q, 0 if threshold_col is None else m),
    )


def _pairwise_backward_fake(
    kind: str,
    q: Tensor,
    k: Tensor | None,
    scale: Tensor,
    bias: Tensor | None,
    ids_q: Tensor | None,
    ids_k: Tensor | None,
    row: Tensor,
    col: Tensor | None,
    drow: Tensor,
    dcol: Tensor | None,
    want_dq: bool,
    want_dk: bool,
    want_dscale: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dq = q.new_empty(q.shape if want_dq else (0,))
    dk = q.new_empty(k.shape if want_dk and k is not None else (0,))
    zero = q.new_empty((), dtype=accumulation_dtype(q.dtype))
    return dq, dk, zero, torch.empty_like(zero)


def _attend_fake(
    q: Tensor,
    k: Tensor,
    scale: Tensor,
    ids_q: Tensor | None,
    ids_k: Tensor | None,
    threshold: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    acc = accumulation_dtype(q.dtype)
    n = q.shape[0]
    return (
        q.new_empty((n,), dtype=acc),
        q.new_empty(q.shape, dtype=acc),
        _ints(q, 0 if threshold is None else n),
    )


def _extremes_fake(
    q: Tensor,
    k: Tensor | None,
    scale: Tensor,
    bias_k: Tensor | None,
    ids_q: Tensor,
    ids_k: Tensor | None,
) -> tuple[Tensor, Tensor]:
    return _ints(q, q.shape[0]), _ints(q, q.shape[0])


# --------------------------------------------------------------------------------- autograd


class _Pairwise(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        kind: str,
        q: Tensor,
        k: Tensor | None,
        scale: Tensor,
        bias: Tensor | None,
        ids_q: Tensor | None,
        ids_k: Tensor | None,
        want_col: bool,
        threshold_row: Tensor | None,
        threshold_col: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        with below_autograd():
            row, col, rank_row, rank_col = torch.ops.sslkernels.pairwise.default(
                kind, q, k, scale, bias, ids_q, ids_k, want_col, threshold_row, threshold_col
            )
        ctx.kind, ctx.want_col, ctx.backend = kind, want_col, registry.override()
        ctx.save_for_backward(q, k, scale, bias, ids_q, ids_k, row, col if want_col else None)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(rank_row, rank_col, *(() if want_col else (col,)))
        return row, col, rank_row, rank_col

    @staticmethod
    @once_differentiable("sslkernels::pairwise")
    def backward(ctx: Any, drow: Tensor | None, dcol: Tensor | None, *_: Any) -> Any:
        q, k, scale, bias, ids_q, ids_k, row, col = ctx.saved_tensors
        _, need_q, need_k, need_scale, need_bias, *_ = ctx.needs_input_grad
        if drow is None and dcol is None:
            return (None,) * 10
        if drow is None:
            drow = torch.zeros_like(row)
        with below_autograd(), registry.backend(ctx.backend):
            dq, dk, dscale, dbias = torch.ops.sslkernels.pairwise_backward.default(
                ctx.kind,
                q,
                k,
                scale,
                bias,
                ids_q,
                ids_k,
                row,
                None if dcol is None else col,
                drow,
                dcol,
                need_q,
                need_k,
                need_scale,
            )
        return (
            None,
            dq if need_q else None,
            dk if need_k else None,
            dscale if need_scale else None,
            dbias if need_bias else None,
            *(None,) * 5,
        )


class _AttendFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        scale: Tensor,
        ids_q: Tensor | None,
        ids_k: Tensor | None,
        threshold: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        with below_autograd():
            lse, mean_key, rank = torch.ops.sslkernels.attend.default(
                q, k, scale, ids_q, ids_k, threshold
            )
        ctx.backend = registry.override()
        ctx.save_for_backward(q, scale, mean_key)  # nothing of the keys
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(mean_key, rank)
        return lse, mean_key, rank

    @staticmethod
    @once_differentiable("sslkernels::attend")
    def backward(ctx: Any, dlse: Tensor | None, *_: Any) -> Any:
        if dlse is None:
            return (None,) * 6
        q, scale, mean_key = ctx.saved_tensors
        need_q, need_k, need_scale, *_ = ctx.needs_input_grad
        if need_k:
            raise RuntimeError(
                "sslkernels::attend: the keys get no gradient, pass k.detach() "
                "(or use sslkernels::pairwise, whose keys do)"
            )
        weighted = mean_key * dlse[:, None]
        dq = (weighted * scale).to(q.dtype) if need_q else None
        dscale = fixed_sum((weighted * q.to(weighted.dtype)).sum(1)) if need_scale else None
        return dq, None, dscale, None, None, None


implement("pairwise", _pairwise, _pairwise_fake, _Pairwise.apply, inputs=(1, 2, 3, 4))
implement("pairwise_backward", _pairwise_backward, _pairwise_backward_fake)
implement("attend", _attend, _attend_fake, _AttendFunction.apply, inputs=(0, 1, 2))
implement("extremes", _extremes, _extremes_fake)


# ------------------------------------------------------------------------- public functions


def pairwise(
    kind: Kind,
    q: Tensor,
    k: Tensor | None = None,
    *,
    scale: Tensor,
    bias: Tensor | None = None,
    ids_q: Tensor | None = None,
    ids_k: Tensor | None = None,
    want_col: bool = False,
    threshold_row: Tensor | None = None,
    threshold_col: Tensor | None = None,
) -> PairwiseForward:
    """Row (and column) reductions over S_ij = scale * <q_i, k_j> (+ bias), S never in memory.

    Differentiable once in q, k, scale and bias, through ``row`` and ``col``.

    Args:
        kind: "lse" (log-sum-exp) or "softplus" (sum of softplus).
        q: [N, D], any floating dtype and strides.
        k: [M, D] of the same dtype and device, or None for self mode (k = q).
        scale: 0-d, accumulation dtype (float64 for float64 inputs, otherwise float32).
        bias: 0-d, accumulation dtype, kind "softplus" only.
        ids_q: [N] int64; pairs with ids_q[i] == ids_k[j] are left out.
        ids_k: [M] int64; None in self mode.
        want_col: Whether to reduce columns too (not in self mode, where they equal the rows).
        threshold_row: [N]; ``rank_row`` counts the allowed j with S_ij above it.
        threshold_col: [M]; the same for columns, needs want_col.

    Returns:
        PairwiseForward(row, col, rank_row, rank_col); what was not asked for is empty.

    Raises:
        ValueError: If kind and bias, or self mode and want_col, do not go together.
    """
    if kind not in ("lse", "softplus"):
        raise ValueError(f"pairwise: kind must be 'lse' or 'softplus', got {kind!r}")
    if bias is not None and kind == "lse":
        raise ValueError("pairwise: bias needs kind 'softplus', got kind 'lse'")
    if k is None and want_col:
        raise ValueError("pairwise: want_col must be False in self mode (row and col are equal)")
    if threshold_row is not None:
        threshold_row = threshold_row.detach()
    if threshold_col is not None:
        threshold_col = threshold_col.detach()
    return PairwiseForward(
        *torch.ops.sslkernels.pairwise.default(
            kind, q, k, scale, bias, ids_q, ids_k, want_col, threshold_row, threshold_col
        )
    )


def attend(
    q: Tensor,
    k: Tensor,
    *,
    scale: Tensor,
    ids_q: Tensor | None = None,
    ids_k: Tensor | None = None,
    threshold: Tensor | None = None,
) -> Attend:
    """Row LSE over keys that need no gradient; its gradient is finished in the forward pass.

    Nothing of k is kept for backward, so k may be overwritten right after the call.
    Differentiable once in q and scale, through ``lse``.

    Args:
        q: [N, D], any floating dtype and strides.
        k: [M, D] of the same dtype and device, not requiring grad.
        scale: 0-d, accumulation dtype.
        ids_q: [N] int64; pairs with ids_q[i] == ids_k[j] are left out.
        ids_k: [M] int64.
        threshold: [N]; ``rank`` counts the allowed j with S_ij above it.

    Returns:
        Attend(lse, mean_key, rank).
    """
    if threshold is not None:
        threshold = threshold.detach()
    return Attend(*torch.ops.sslkernels.attend.default(q, k, scale, ids_q, ids_k, threshold))


def extremes(
    q: Tensor,
    k: Tensor | None = None,
    *,
    scale: Tensor,
    bias_k: Tensor | None = None,
    ids_q: Tensor,
    ids_k: Tensor | None = None,
) -> Extremes:
    """Per row, the arg-max of S over keys with the same id and the arg-min over the others.

    Args:
        q: [N, D], any floating dtype and strides.
        k: [M, D] of the same dtype and device, or None for self mode.
        scale: 0-d, accumulation dtype.
        bias_k: [M], accumulation dtype, added to column j.
        ids_q: [N] int64.
        ids_k: [M] int64; None in self mode.

    Returns:
        Extremes(max_same, min_other): int64 indices, -1 where there is none.
    """
    return Extremes(*torch.ops.sslkernels.extremes.default(q, k, scale, bias_k, ids_q, ids_k))
