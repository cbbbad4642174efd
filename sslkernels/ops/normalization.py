# SPDX-License-Identifier: Apache-2.0
"""Rows x / max(|x|, 1e-12) below autograd: by the backend's kernel where it has one, else in plain torch.

For use inside ops.  Losses that are composed of ops take the differentiable ``rows.unit_rows``.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sslkernels.backends.chunked import accumulation_dtype

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
    wide = x.to(accumulation_dtype(x.dtype))
    norm = torch.linalg.vector_norm(wide, dim=1)
    return UnitRows(x, torch.div(wide, norm.clamp(min=EPS)[:, None], out=out), norm)


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
    x_hat = rows.unit.to(rows.norm.dtype)
    along = torch.where(rows.norm < EPS, 0.0, (x_hat * dunit).sum(1))
    return (dunit - x_hat * along[:, None]) / rows.norm.clamp(min=EPS)[:, None]
