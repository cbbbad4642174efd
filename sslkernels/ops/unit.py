# SPDX-License-Identifier: Apache-2.0
"""Normalised rows as a torch op, ``unit_rows``: y = x / max(|x|, 1e-12).

dx = (dy - y <y, dy>) / |x|,   below 1e-12, where the norm is a constant, dy / 1e-12
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from sslkernels.backends.arithmetic import accumulation_dtype
from sslkernels.ops import normalization, registry
from sslkernels.ops._library import Gradient, Op
from sslkernels.ops.normalization import EPS
from sslkernels.ops.rows import chunks


class Unit(NamedTuple):
    """Rows and what they were divided by."""

    unit: Tensor  # [N, D]
    norm: Tensor  # [N] accumulation dtype


def _unit(x: Tensor) -> Unit:
    _, unit, norm = normalization.unit_rows(registry.resolve(x.device), x)
    return Unit(unit, norm)


def _unit_fake(x: Tensor) -> Unit:
    y = x.new_empty(x.shape, dtype=normalization.operand_dtype(x))
    return Unit(y, x.new_empty((x.shape[0],), dtype=accumulation_dtype(x.dtype)))


def unit_backward(x: Tensor, norm: Tensor, dy: Tensor) -> Tensor:
    """[N, D]: the gradient by x for dy; below autograd."""
    kernel = normalization.row_kernel(registry.resolve(x.device), "normalize_rows_backward", x)
    if kernel is not None:
        by_kernel: Tensor = kernel(dy, x, norm, EPS)
        return by_kernel
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    for c in chunks(x):
        unit = normalization.divide(x[c], norm[c])
        dx[c] = normalization.project(unit, norm[c], dy[c].to(norm.dtype))
    return dx


UNIT_BACKWARD = Op(
    "unit_rows_backward(Tensor x, Tensor norm, Tensor dy) -> Tensor",
    unit_backward,
    lambda x, norm, dy: torch.empty_like(x, memory_format=torch.contiguous_format),
)


def _unit_gradient(x: Tensor, norm: Tensor, dy: Tensor, _: Any) -> dict[str, Tensor]:
    if not torch.is_grad_enabled():
        return {"x": UNIT_BACKWARD.below(x, norm, dy)}
    return {"x": _derivative(x, norm.dtype, dy).to(x.dtype)}


def _derivative(x: Tensor, acc: torch.dtype, direction: Tensor) -> Tensor:
    """(I - y y^T) / |x|, which is symmetric, times a direction: in torch's ops, for second derivatives.

    It is the loss that has none, or has them.
    """
    norm = torch.linalg.vector_norm(x.to(acc), dim=1)
    return normalization.project(normalization.divide(x, norm), norm, direction.to(acc))


def _unit_tangent(x: Tensor, norm: Tensor, dx: Tensor) -> tuple[Tensor]:
    return (_derivative(x, norm.dtype, dx).to(normalization.operand_dtype(x)),)


UNIT = Op(
    "unit_rows(Tensor x) -> Unit",
    _unit,
    _unit_fake,
    values=(Unit,),
    gradient=Gradient(
        ("x",), ("unit",), lambda x, out: (x, out.norm), _unit_gradient, _unit_tangent, twice=True
    ),
)


def unit_rows(x: Tensor) -> Tensor:
    """[N, D]: x / max(|x|, 1e-12) by rows, differentiable twice.

    Halves are normalised in float32: in float16 the 1e-12 would be 0 and a zero row NaN.  The result
    has the accumulation dtype on CPUs; on GPUs halves are halves again, for the tensor cores.

    Args:
        x: [N, D], any floating dtype.
    """
    out: Tensor = UNIT(x).unit
    return out
