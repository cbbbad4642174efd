# SPDX-License-Identifier: Apache-2.0
"""BYOL's regression 2 - 2 cos(prediction, target) as one torch op, ``regression``.

    loss_i = 2 - 2 <p_i, t_i> / (max(|p_i|, eps) max(|t_i|, eps))

Differentiable once in the prediction; the target gets no gradient.  The CPU backend does it in one call;
elsewhere it is a few torch operations.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from sslkernels.backends.arithmetic import accumulation_dtype, fixed_sum
from sslkernels.ops import registry
from sslkernels.ops._library import Gradient, Op
from sslkernels.ops.normalization import EPS


class Regression(NamedTuple):
    """Results of the op."""

    loss: Tensor  # 0-d or [N], accumulation dtype
    state: Tensor  # [N, 3]: norms of prediction and target, cosine


def _norm(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=1, keepdim=True).clamp(min=EPS)


def _forward(prediction: Tensor, target: Tensor, reduction: str) -> Regression:
    fused = getattr(registry.resolve(prediction.device), "regression_forward", None)
    if fused is not None:
        return Regression(*fused(prediction, target, reduction))
    acc = accumulation_dtype(prediction.dtype)
    p, t = prediction.to(acc), target.to(acc)
    norm_p, norm_t = _norm(p), _norm(t)
    p, t = p / norm_p, t / norm_t
    cosine = (p * t).sum(1, keepdim=True)
    # |p_hat - t_hat|^2 = 2 - 2 cos keeps its digits when the two agree; it needs unit vectors, which a row
    # whose norm overflows does not become: x / inf = 0.
    gap = (p - t).square().sum(1)
    unit = (norm_p > EPS) & (norm_t > EPS) & (norm_p < torch.inf) & (norm_t < torch.inf)
    loss = torch.where(unit[:, 0], gap, 2 - 2 * cosine[:, 0])
    state = torch.cat((norm_p, norm_t, cosine), 1)
    if reduction != "none":
        n = loss.numel()
        loss = fixed_sum(loss)
        loss = loss / max(1, n) if reduction == "mean" else loss
    return Regression(loss, state)


def _backward(
    prediction: Tensor, target: Tensor, reduction: str, state: Tensor, dloss: Tensor
) -> Tensor:
    fused = getattr(registry.resolve(prediction.device), "regression_backward", None)
    if fused is not None:
        by_kernel: Tensor = fused(prediction, target, reduction, state, dloss)
        return by_kernel
    norm_p, norm_t, cosine = state[:, :1], state[:, 1:2], state[:, 2:]
    p, t = prediction.to(state.dtype), target.to(state.dtype)
    along = torch.where(norm_p > EPS, cosine, torch.zeros_like(cosine))
    factor = -2 / norm_p * (dloss[:, None] if reduction == "none" else dloss)
    if reduction == "mean":
        factor = factor / max(1, prediction.shape[0])
    return (factor * (t / norm_t - along * (p / norm_p))).to(prediction.dtype)


def _fake(prediction: Tensor, target: Tensor, reduction: str) -> Regression:
    acc, n = accumulation_dtype(prediction.dtype), prediction.shape[0]
    return Regression(
        prediction.new_empty((n,) if reduction == "none" else (), dtype=acc),
        prediction.new_empty((n, 3), dtype=acc),
    )


BACKWARD = Op(
    "regression_backward(Tensor prediction, Tensor target, str reduction, Tensor state, Tensor dloss) "
    "-> Tensor",
    _backward,
    lambda prediction, *_: prediction.new_empty(prediction.shape),
)


def _gradient(
    prediction: Tensor, target: Tensor, reduction: str, state: Tensor, dloss: Tensor, *_: Any
) -> dict[str, Tensor]:
    return {"prediction": BACKWARD.below(prediction, target, reduction, state, dloss)}


def _tangent(
    prediction: Tensor,
    target: Tensor,
    reduction: str,
    state: Tensor,
    dprediction: Tensor | None,
    *_: Any,
) -> tuple[Tensor]:
    # Every row has a loss of its own: the tangent is <gradient, tangent>, row by row.
    acc, n = state.dtype, state.shape[0]
    if dprediction is None:
        rows = state.new_zeros(n)
    else:
        gradient = BACKWARD.below(prediction, target, "none", state, state.new_ones(n))
        rows = (gradient.to(acc) * dprediction.to(acc)).sum(1)
    if reduction == "none":
        return (rows,)
    return (fixed_sum(rows) / (max(1, n) if reduction == "mean" else 1),)


REGRESSION = Op(
    "regression(Tensor prediction, Tensor target, str reduction) -> Regression",
    _forward,
    _fake,
    values=(Regression,),
    gradient=Gradient(
        ("prediction",),
        ("loss",),
        lambda prediction, target, reduction, out: (prediction, target, reduction, out.state),
        _gradient,
        _tangent,
    ),
)


def regression(prediction: Tensor, target: Tensor, reduction: str = "mean") -> Tensor:
    """2 - 2 cos by rows, reduced; see the module."""
    loss: Tensor = REGRESSION(prediction, target, reduction).loss
    return loss
