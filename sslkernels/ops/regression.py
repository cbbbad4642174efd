# SPDX-License-Identifier: Apache-2.0
"""BYOL's regression 2 - 2 cos(prediction, target) as one torch op, ``regression``.

    loss_i = 2 - 2 <p_i, t_i> / (max(|p_i|, eps) max(|t_i|, eps))

With ``cosine`` it is SimSiam's -cos(prediction, target), half of that without the constant, and with all of
its digits near 0.  Differentiable twice in the prediction; the target gets no gradient.  The CPU backend
does it in one call; elsewhere it is a few torch operations.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from sslkernels.backends.arithmetic import accumulation_dtype
from sslkernels.ops import heads, normalization, registry
from sslkernels.ops._library import Gradient, Op
from sslkernels.ops.normalization import EPS


class Regression(NamedTuple):
    """Results of the op."""

    loss: Tensor  # 0-d or [N], accumulation dtype
    state: Tensor  # [N, 3]: norms of prediction and target, cosine


def _norm(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=1, keepdim=True).clamp(min=EPS)


def _forward(prediction: Tensor, target: Tensor, reduction: str, cosine: bool) -> Regression:
    fused = getattr(registry.resolve(prediction.device), "regression_forward", None)
    if fused is not None:
        return Regression(*fused(prediction, target, reduction, cosine))
    acc = accumulation_dtype(prediction.dtype)
    p, t = prediction.to(acc), target.to(acc)
    norm_p, norm_t = _norm(p), _norm(t)
    p, t = p / norm_p, t / norm_t
    dots = (p * t).sum(1, keepdim=True)
    # |p_hat - t_hat|^2 = 2 - 2 cos keeps its digits when the two agree; it needs unit vectors, which a row
    # whose norm overflows does not become: x / inf = 0.
    gap = (p - t).square().sum(1)
    unit = (norm_p > EPS) & (norm_t > EPS) & (norm_p < torch.inf) & (norm_t < torch.inf)
    loss = -dots[:, 0] if cosine else torch.where(unit[:, 0], gap, 2 - 2 * dots[:, 0])
    return Regression(heads.reduce(loss, reduction), torch.cat((norm_p, norm_t, dots), 1))


def _backward(
    prediction: Tensor, target: Tensor, reduction: str, cosine: bool, state: Tensor, dloss: Tensor
) -> Tensor:
    fused = getattr(registry.resolve(prediction.device), "regression_backward", None)
    if fused is not None:
        by_kernel: Tensor = fused(prediction, target, reduction, cosine, state, dloss)
        return by_kernel
    norm_p, norm_t, dots = state[:, :1], state[:, 1:2], state[:, 2:]
    p, t = prediction.to(state.dtype), target.to(state.dtype)
    along = torch.where(norm_p > EPS, dots, torch.zeros_like(dots))
    factor = (-1 if cosine else -2) / norm_p * (dloss[:, None] if reduction == "none" else dloss)
    if reduction == "mean":
        factor = factor / max(1, prediction.shape[0])
    return (factor * (t / norm_t - along * (p / norm_p))).to(prediction.dtype)


def _fake(prediction: Tensor, target: Tensor, reduction: str, cosine: bool) -> Regression:
    acc, n = accumulation_dtype(prediction.dtype), prediction.shape[0]
    return Regression(
        prediction.new_empty((n,) if reduction == "none" else (), dtype=acc),
        prediction.new_empty((n, 3), dtype=acc),
    )


BACKWARD = Op(
    "regression_backward(Tensor prediction, Tensor target, str reduction, bool cosine, Tensor state, "
    "Tensor dloss) -> Tensor",
    _backward,
    lambda prediction, *_: prediction.new_empty(prediction.shape),
)


def _slopes(prediction: Tensor, target: Tensor, acc: torch.dtype, cosine: bool) -> Tensor:
    """[N, D]: the gradient of every row's loss in torch's ops, for tangents and second derivatives."""
    p, t = prediction.to(acc), target.detach().to(acc)
    norm = torch.linalg.vector_norm(p, dim=1)
    unit = normalization.divide(p, norm)
    other = normalization.divide(t, torch.linalg.vector_norm(t, dim=1))
    return normalization.project(unit, norm, other) * (-1.0 if cosine else -2.0)


def _gradient(
    prediction: Tensor,
    target: Tensor,
    reduction: str,
    cosine: bool,
    state: Tensor,
    dloss: Tensor,
    *_: Any,
) -> dict[str, Tensor]:
    if not torch.is_grad_enabled():
        return {"prediction": BACKWARD.below(prediction, target, reduction, cosine, state, dloss)}
    each = dloss[:, None] if reduction == "none" else dloss
    each = each / max(1, state.shape[0]) if reduction == "mean" else each
    slopes = each * _slopes(prediction, target, state.dtype, cosine)
    return {"prediction": slopes.to(prediction.dtype)}


def _tangent(
    prediction: Tensor,
    target: Tensor,
    reduction: str,
    cosine: bool,
    state: Tensor,
    dprediction: Tensor | None,
    *_: Any,
) -> tuple[Tensor]:
    if dprediction is None:
        return (heads.reduce(state.new_zeros(state.shape[0]), reduction),)
    slopes = _slopes(prediction, target, state.dtype, cosine)
    return (heads.reduce((slopes * dprediction.to(state.dtype)).sum(1), reduction),)


REGRESSION = Op(
    "regression(Tensor prediction, Tensor target, str reduction, bool cosine) -> Regression",
    _forward,
    _fake,
    values=(Regression,),
    gradient=Gradient(
        ("prediction",),
        ("loss",),
        lambda prediction, target, reduction, cosine, out: (
            prediction, target, reduction, cosine, out.state,
        ),
        _gradient,
        _tangent,
        twice=True,
    ),
)  # fmt: skip


def in_one_call(x: Tensor) -> bool:
    """Whether the backend of the device has the regression; a graph of torch.compile takes the op on CPUs."""
    if torch.compiler.is_compiling():
        return x.is_cpu
    return hasattr(registry.resolve(x.device), "regression_forward")


def regression(
    prediction: Tensor, target: Tensor, reduction: str = "mean", cosine: bool = False
) -> Tensor:
    """2 - 2 cos by rows, or -cos, reduced; see the module."""
    loss: Tensor = REGRESSION(prediction, target, reduction, cosine).loss
    return loss
