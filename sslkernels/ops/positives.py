# SPDX-License-Identifier: Apache-2.0
"""Tiles and positives as one torch op, ``with_positives``: the gradients of both in one buffer.

    row_i        over the tiles of S_ij = scale * <q_i, k_j> + bias, as ``pairwise`` has it
    positive_i   <q_i, k_i>; in self mode the sum of <q_i, q_j> over the other rows of the class of i

The same from ``pairwise`` and a product of rows is two gradients of each input that autograd adds,
alive together.  Here the second is added to the first in chunks of rows.  The positive has no scale:
what a loss does with it is arithmetic on [N].
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from sslkernels.backends.chunked import accumulation_dtype
from sslkernels.backends.interface import Kind
from sslkernels.ops import registry
from sslkernels.ops._library import (
    below_autograd,
    define,
    implement,
    no_autocast,
    once_differentiable,
)
from sslkernels.ops.pairwise import tile_gradients
from sslkernels.ops.rows import add_class_dots_gradient_, chunks, class_dots, dots

_SHARED = "str kind, Tensor q, Tensor? k, Tensor scale, Tensor? bias, Tensor ids, Tensor? classes"
define(f"with_positives({_SHARED}) -> (Tensor row, Tensor positive)")
define(
    f"with_positives_backward({_SHARED}, Tensor row, Tensor drow, Tensor dpositive, bool want_dq, "
    "bool want_dk, bool want_dscale) -> (Tensor, Tensor, Tensor, Tensor)"
)


class WithPositives(NamedTuple):
    """[N] each, accumulation dtype."""

    row: Tensor
    positive: Tensor


def _forward(
    kind: Kind, q: Tensor, k: Tensor | None, scale: Tensor, bias: Tensor | None, ids: Tensor,
    classes: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    with no_autocast(q.device):
        if k is not None:
            positive = dots(q, k)
        else:
            positive = class_dots(q.to(accumulation_dtype(q.dtype)), _given(classes))
        row, *_ = registry.resolve(q.device).pairwise_forward(
            kind, q, k, scale, bias, ids, None if k is None else ids, False, None, None
        )
    return row, positive


def _backward(
    kind: Kind, q: Tensor, k: Tensor | None, scale: Tensor, bias: Tensor | None, ids: Tensor,
    classes: Tensor | None, row: Tensor, drow: Tensor, dpositive: Tensor, want_dq: bool,
    want_dk: bool, want_dscale: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dq, dk, dscale, dbias = tile_gradients(
        kind, q, k, scale, bias, ids, None if k is None else ids, row, None, drow, None, want_dq,
        want_dk, want_dscale,
    )  # fmt: skip
    acc = row.dtype
    if k is None:
        if want_dq:
            add_class_dots_gradient_(dq, q.to(acc), _given(classes), dpositive)
    else:
        for c in chunks(q):
            weight = dpositive[c, None]
            if want_dq:
                dq[c].addcmul_(k[c].to(acc), weight)
            if want_dk:
                dk[c].addcmul_(q[c].to(acc), weight)
    return dq.to(q.dtype), dk.to(q.dtype), dscale, dbias


def _given(classes: Tensor | None) -> Tensor:
    if classes is None:
        raise ValueError("with_positives: self mode (k None) needs classes, got None")
    return classes


def _forward_fake(
    kind: str, q: Tensor, k: Tensor | None, scale: Tensor, bias: Tensor | None, ids: Tensor,
    classes: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    row = q.new_empty((q.shape[0],), dtype=accumulation_dtype(q.dtype))
    return row, torch.empty_like(row)


def _backward_fake(
    kind: str, q: Tensor, k: Tensor | None, scale: Tensor, bias: Tensor | None, ids: Tensor,
    classes: Tensor | None, row: Tensor, drow: Tensor, dpositive: Tensor, want_dq: bool,
    want_dk: bool, want_dscale: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dq = q.new_empty(q.shape if want_dq else (0,))
    dk = q.new_empty(k.shape if want_dk and k is not None else (0,))
    zero = row.new_empty(())
    return dq, dk, zero, torch.empty_like(zero)


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kind: str, *inputs: Tensor | None) -> Any:
        with below_autograd():
            row, positive = torch.ops.sslkernels.with_positives.default(kind, *inputs)
        ctx.kind, ctx.backend = kind, registry.override()
        ctx.save_for_backward(*inputs, row)
        return row, positive

    @staticmethod
    @once_differentiable("sslkernels::with_positives")
    def backward(ctx: Any, drow: Tensor, dpositive: Tensor) -> Any:
        *inputs, row = ctx.saved_tensors
        _, need_q, need_k, need_scale, need_bias, *_ = ctx.needs_input_grad
        with below_autograd(), registry.backend(ctx.backend):
            dq, dk, dscale, dbias = torch.ops.sslkernels.with_positives_backward.default(
                ctx.kind, *inputs, row, drow, dpositive, need_q, need_k, need_scale
            )
        return (
            None,
            dq if need_q else None,
            dk if need_k else None,
            dscale if need_scale else None,
            dbias if need_bias else None,
            None,
            None,
        )


implement("with_positives", _forward, _forward_fake, _Function.apply, inputs=(1, 2, 3, 4))
implement("with_positives_backward", _backward, _backward_fake)


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
    return WithPositives(
        *torch.ops.sslkernels.with_positives.default(kind, q, k, scale, bias, ids, classes)
    )
