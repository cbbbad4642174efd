# SPDX-License-Identifier: Apache-2.0
"""Argument checks of the loss functions; each costs about a microsecond.

Every message names the op, the argument, what must hold and what came.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from sslkernels._numbers import flag as flag
from sslkernels._numbers import integer as integer
from sslkernels._numbers import number as number
from sslkernels._numbers import positive as positive
from sslkernels._numbers import type_name
from sslkernels._ranks import MODES
from sslkernels.backends import devices
from sslkernels.backends.arithmetic import accumulation_dtype
from sslkernels.ops.eager import is_plain_eager

_DTYPES = frozenset((torch.float64, torch.float32, torch.bfloat16, torch.float16))
_REDUCTIONS = ("mean", "sum", "none")


def _dtype(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")


def check_tensor(op: str, name: str, x: Any) -> None:
    """A tensor, or a TypeError."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type_name(x)}")


def check_matrix(op: str, name: str, x: Tensor, ndim: int = 2) -> None:
    """A floating-point tensor with ``ndim`` dimensions, or a TypeError/ValueError."""
    check_floating(op, name, x)
    if x.ndim != ndim:
        raise ValueError(f"{op}: {name} must have {ndim} dimensions, got shape {list(x.shape)}")


def check_floating(op: str, name: str, x: Tensor) -> None:
    """A floating-point tensor of any shape, or a TypeError."""
    check_tensor(op, name, x)
    if x.dtype not in _DTYPES:
        raise TypeError(
            f"{op}: {name} must be float64, float32, bfloat16 or float16, got {_dtype(x)}"
        )


def check_samples(op: str, name: str, x: Tensor) -> None:
    """A floating-point tensor [N, ...], or a TypeError/ValueError."""
    check_floating(op, name, x)
    if x.ndim < 2:
        raise ValueError(f"{op}: {name} must have at least 2 dimensions, got shape {list(x.shape)}")


def check_alike(op: str, name_a: str, a: Tensor, name_b: str, b: Tensor) -> None:
    """b: a floating-point tensor of the shape and device of a; dtypes may differ (``widen``)."""
    check_floating(op, name_b, b)
    if a.shape != b.shape:
        raise ValueError(
            f"{op}: {name_a} and {name_b} must have the same shape, "
            f"got {list(a.shape)} and {list(b.shape)}"
        )
    check_device(op, name_a, a, name_b, b)


def check_device(op: str, name_a: str, a: Tensor, name_b: str, b: Tensor) -> None:
    """The same device."""
    if a.device != b.device:
        raise ValueError(
            f"{op}: {name_a} and {name_b} must be on the same device, got {a.device} and {b.device}"
        )


def check_pair(op: str, name_a: str, a: Tensor, name_b: str, b: Tensor) -> None:
    """Two matrices of the same shape and device; dtypes may differ (``widen``)."""
    check_matrix(op, name_a, a)
    check_matrix(op, name_b, b)
    check_alike(op, name_a, a, name_b, b)


def widen(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in the widest of their dtypes, themselves where they have it already.

    bfloat16 with float16 is float32.  Gradients come back in the dtype of each tensor.
    """
    dtype = tensors[0].dtype
    for x in tensors:
        if x.dtype is not dtype:
            break
    else:
        return tensors
    for x in tensors:
        dtype = torch.promote_types(dtype, x.dtype)
    return tuple(x.to(dtype) for x in tensors)


def check_reduction(op: str, reduction: str, allowed: tuple[str, ...] = _REDUCTIONS) -> None:
    """One of the reductions that the op has."""
    if reduction not in allowed:
        raise ValueError(f"{op}: reduction must be one of {list(allowed)}, got {reduction!r}")


def check_group_mode(op: str, mode: str) -> None:
    """One of the ways to meet the rows of other ranks."""
    check_choice(op, "group_mode", mode, MODES)


def check_ids(
    op: str, name: str, ids: Tensor, shape: tuple[int, ...], device: torch.device
) -> Tensor:
    """Integer ids or labels of a given shape on a given device, returned as int64."""
    check_tensor(op, name, ids)
    if ids.dtype.is_floating_point or ids.dtype.is_complex or ids.dtype == torch.bool:
        raise TypeError(f"{op}: {name} must be integers, got {_dtype(ids)}")
    if ids.shape != shape:
        raise ValueError(f"{op}: {name} must have shape {list(shape)}, got {list(ids.shape)}")
    if ids.device != device:
        raise ValueError(f"{op}: {name} must be on {device} like the features, got {ids.device}")
    return ids.to(torch.int64)


def check_scalar_shape(op: str, name: str, value: Tensor) -> None:
    """One number: FSDP wants parameters to have a dimension, others give them none."""
    if value.shape not in ((), (1,)):
        raise ValueError(
            f"{op}: {name} must be a number or a tensor of shape [] or [1], "
            f"got shape {list(value.shape)}"
        )


def scalar(op: str, name: str, value: float | Tensor, like: Tensor) -> Tensor:
    """A number or a tensor of shape [] or [1] as a 0-d tensor, accumulation dtype of ``like``.

    A tensor keeps its autograd history.  It must be on the device of ``like``.
    """
    acc = accumulation_dtype(like.dtype)
    if type(value) is not float and isinstance(value, Tensor):  # the former answers sooner
        check_scalar_shape(op, name, value)
        if value.device != like.device:
            raise ValueError(
                f"{op}: {name} must be on {like.device} like the features, got {value.device}"
            )
        return value.to(acc) if value.ndim == 0 else value.to(acc).reshape(())
    value = number(op, name, value, "a number or a tensor of shape [] or [1]")
    if is_plain_eager():
        if like.is_cpu:
            return _kept_scalar(value, acc, like.device, 0)
        # Filled on the stream that it is used on.  What a capture makes is the graph's.
        if like.is_cuda and not devices.capturing(like.device):
            stream = torch.cuda.current_stream(like.device).cuda_stream
            return _kept_scalar(value, acc, like.device, stream)
    # full, not tensor: a fill kernel instead of a copy from the host.
    return torch.full((), value, dtype=acc, device=like.device)


@functools.lru_cache(maxsize=64)
def _kept_scalar(value: float, dtype: torch.dtype, device: torch.device, stream: int) -> Tensor:
    """Made once: nobody writes to it, and a temperature hardly ever changes.

    An ordinary tensor, though the first call may be an evaluation: autograd saves no inference tensor.
    """
    with torch.inference_mode(False):
        return torch.full((), value, dtype=dtype, device=device)


def number_or_scalar(op: str, name: str, value: float | Tensor, like: Tensor) -> float | Tensor:
    """A number as a float, or a tensor of shape [] or [1] as a 0-d tensor (``scalar``)."""
    return scalar(op, name, value, like) if isinstance(value, Tensor) else number(op, name, value)


def inverse_temperature(op: str, temperature: float | Tensor, like: Tensor) -> Tensor:
    """1 / temperature as a 0-d tensor of the accumulation dtype.

    Numbers must be > 0.  The value of a tensor is not inspected, that would be a host sync.
    """
    if type(temperature) is not float and isinstance(temperature, Tensor):
        return scalar(op, "temperature", temperature, like).reciprocal()
    return scalar(op, "temperature", 1.0 / positive(op, "temperature", temperature), like)


def check_compute_dtype(op: str, compute_dtype: torch.dtype | None, like: Tensor) -> bool:
    """Whether bfloat16 was asked for; None is the accumulation dtype."""
    if compute_dtype is None:
        return False
    if compute_dtype != torch.bfloat16:
        raise ValueError(f"{op}: compute_dtype must be None or torch.bfloat16, got {compute_dtype}")
    if like.dtype == torch.float64:
        raise ValueError(f"{op}: compute_dtype must be None for float64 inputs, got bfloat16")
    return True


def no_compute_dtype(op: str, bf16: bool) -> None:
    """Losses over ranks multiply in the accumulation dtype."""
    if bf16:
        raise ValueError(f"{op}: compute_dtype must be None with group")


def check_choice(op: str, name: str, value: str, allowed: tuple[str, ...]) -> None:
    """One of a few strings."""
    if value not in allowed:
        raise ValueError(f"{op}: {name} must be one of {list(allowed)}, got {value!r}")
