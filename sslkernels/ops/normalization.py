# SPDX-License-Identifier: Apache-2.0
"""Rows x / max(|x|, 1e-12) below autograd: by the backend's kernel where it has one, else in plain torch.

For use inside ops.  Losses that are composed of ops take the differentiable ``rows.unit_rows``.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sslkernels.backends.arithmetic import accumulation_dtype

EPS = 1e-12  # smallest norm that a row is divided by, as in torch.nn.functional.normalize


class UnitRows(NamedTuple):
    """Normalised rows and what their gradient needs."""

    x: Tensor  # [N, D] as given
    unit: Tensor  # [N, D]
    norm: Tensor  # [N] accumulation dtype: |x|


def operand_dtype(x: Tensor) -> torch.dtype:
    """Of normalised rows: accumulation dtype on CPUs; on GPUs halves stay halves, for the tensor cores."""
    return accumulation_dtype(x.dtype) if x.device.type == "cpu" else x.dtype


def row_kernel(backend: ModuleType, name: str, x: Tensor) -> Any | None:
    """``backend.name`` of ``interface.RowKernels``, or None: x is torch's to normalise.

    float64 always is: no backend multiplies it on a GPU either.
    """
    return None if x.dtype == torch.float64 else getattr(backend, name, None)


def divide(x: Tensor, norm: Tensor, out: Tensor | None = None) -> Tensor:
    """[N, D]: x / max(norm, EPS), dtype of norm [N] unless ``out`` has another."""
    return torch.div(x.to(norm.dtype), norm.clamp(min=EPS)[:, None], out=out)


def project(unit: Tensor, norm: Tensor, dunit: Tensor) -> Tensor:
    """[N, D]: the gradient of x / max(|x|, EPS) for dunit; below EPS the norm is a constant."""
    along = torch.where(norm < EPS, 0.0, (unit * dunit).sum(1))
    return (dunit - unit * along[:, None]) / norm.clamp(min=EPS)[:, None]


def unit_rows(backend: ModuleType, x: Tensor, out: Tensor | None = None) -> UnitRows:
    """Normalise rows; not differentiable.

    Args:
        backend: Chosen by the caller; its ``normalize_rows`` is used if it has one.
        x: [N, D], any floating dtype and strides.
        out: [N, D] contiguous, where the rows go; by default a new tensor of ``operand_dtype``.
    """
    if out is None:
        out = torch.empty(x.shape, dtype=operand_dtype(x), device=x.device)
    kernel = row_kernel(backend, "normalize_rows", x)
    if kernel is not None:
        return UnitRows(x, *kernel(x, EPS, out))
    norm = torch.linalg.vector_norm(x.to(accumulation_dtype(x.dtype)), dim=1)
    return UnitRows(x, divide(x, norm, out), norm)


def unit_rows_backward(backend: ModuleType, rows: UnitRows, dunit: Tensor) -> Tensor:
    """[N, D]: d(x / max(|x|, EPS)); below EPS the norm is a constant.  Dtype of x or wider.

    Args:
        backend: As given to ``unit_rows``.
        rows: What ``unit_rows`` returned.
        dunit: [N, D] incoming gradient.
    """
    kernel = row_kernel(backend, "normalize_rows_backward", rows.x)
    if kernel is not None:
        dx: Tensor = kernel(dunit, rows.x, rows.norm, EPS)
        return dx
    return project(rows.unit.to(rows.norm.dtype), rows.norm, dunit)
