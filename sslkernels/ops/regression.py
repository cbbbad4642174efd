# SPDX-License-Identifier: Apache-2.0
"""BYOL's regression 2 - 2 cos(prediction, target) as one torch op, ``regression``.

    loss_i = 2 - 2 <p_i, t_i> / (max(|p_i|, eps) max(|t_i|, eps))

Differentiable once in the prediction; the target gets no gradient.  The CPU backend does it in one call;
elsewhere it is a few torch operations.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sslkernels.backends.chunked import accumulation_dtype, fixed_sum
from sslkernels.ops import registry
from sslkernels.ops._library import below_autograd, define, implement, once_differentiable
from sslkernels.ops.normalization import EPS

define("regression(Tensor prediction, Tensor target, str reduction) -> (Tensor loss, Tensor state)")
define(
    "regression_backward(Tensor prediction, Tensor target, str reduction, Tensor state, Tensor dloss) "
    "-> Tensor"
)


def _norm(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=1, keepdim=True).clamp(min=EPS)


def _forward(prediction: Tensor, target: Tensor, reduction: str) -> tuple[Tensor, Tensor]:
    fused = getattr(registry.resolve(prediction.device), "regression_forward", None)
    if fused is not None:
        return fused(prediction, target, reduction)
    acc = accumulation_dtype(prediction.dtype)
    p, t = prediction.to(acc), target.to(acc)
    norm_p, norm_t = _norm(p), _norm(t)
    p, t = p / norm_p, t / norm_t
    cosine = (p * t).sum(1, keepdim=True)
    # |p_hat - t_hat|^2 = 2 - 2 cos keeps its digits when the two agree; it needs unit vectors.
    gap = (p - t).square().sum(1)
    unit = (norm_p > EPS) & (norm_t > EPS)
    loss = torch.where(unit[:, 0], gap, 2 - 2 * cosine[:, 0])
    state = torch.cat((norm_p, norm_t, cosine), 1)
    if reduction != "none":
        n = loss.numel()
        loss = fixed_sum(loss)
        loss = loss / max(1, n) if reduction == "mean" else loss
    return loss, state


def _backward(
    prediction: Tensor, target: Tensor, reduction: str, state: Tensor, dloss: Tensor
) -> Tensor:
    fused = getattr(registry.resolve(prediction.device), "regression_backward", None)
    if fused is not None:
        return fused(prediction, target, reduction, state, dloss)
    norm_p, norm_t, cosine = state[:, :1], state[:, 1:2], state[:, 2:]
    p, t = prediction.to(state.dtype), target.to(state.dtype)
    along = torch.where(norm_p > EPS, cosine, torch.zeros_like(cosine))
    factor = -2 / norm_p * (dloss[:, None] if reduction == "none" else dloss)
    if reduction == "mean":
        factor = factor / max(1, prediction.shape[0])
    return (factor * (t / norm_t - along * (p / norm_p))).to(prediction.dtype)


def _forward_fake(prediction, target, reduction):  # type: ignore[no-untyped-def]
    acc = accumulation_dtype(prediction.dtype)
    n = prediction.shape[0]
    return (
        prediction.new_empty((n,) if reduction == "none" else (), dtype=acc),
        prediction.new_empty((n, 3), dtype=acc),
    )


def _backward_fake(prediction, target, reduction, state, dloss):  # type: ignore[no-untyped-def]
    return prediction.new_empty(prediction.shape)


class _Regression(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, prediction, target, reduction):  # type: ignore[no-untyped-def]
        with below_autograd():
            loss, state = torch.ops.sslkernels.regression.default(prediction, target, reduction)
        ctx.reduction, ctx.backend = reduction, registry.override()
        ctx.save_for_backward(prediction, target, state)
        ctx.mark_non_differentiable(state)
        ctx.set_materialize_grads(False)
        return loss, state

    @staticmethod
    @once_differentiable("sslkernels::regression")
    def backward(ctx: Any, dloss, *_):  # type: ignore[no-untyped-def]
        if dloss is None or not ctx.needs_input_grad[0]:
            return None, None, None
        prediction, target, state = ctx.saved_tensors
        with below_autograd(), registry.backend(ctx.backend):
            gradient = torch.ops.sslkernels.regression_backward.default(
                prediction, target, ctx.reduction, state, dloss
            )
        return gradient, None, None


implement("regression", _forward, _forward_fake, _Regression.apply, inputs=(0,))
implement("regression_backward", _backward, _backward_fake)


def regression(prediction: Tensor, target: Tensor, reduction: str = "mean") -> Tensor:
    """2 - 2 cos by rows, reduced; see the module."""
    return torch.ops.sslkernels.regression.default(prediction, target, reduction)[0]
