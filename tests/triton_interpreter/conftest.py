# SPDX-License-Identifier: Apache-2.0
"""Tests of the Triton kernels: in Triton's interpreter, or on a GPU.

The interpreter is chosen when Triton is first imported, so these files are collected only in a process
that was started with TRITON_INTERPRET=1 (``tests/test_triton_interpreter.py`` starts it) or with
SSLKERNELS_TEST_DEVICE=cuda (``make gpu-check`` does).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl

DEVICE = os.environ.get("SSLKERNELS_TEST_DEVICE", "cpu")
INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore_glob = [] if INTERPRETING or DEVICE == "cuda" else ["test_*.py"]
if DEVICE == "cuda" and not INTERPRETING:
    collect_ignore_glob = ["test_order.py"]  # it drives the interpreter


def _round_bfloat16_as_compiled_code_does() -> None:
    """To the nearest, ties to even.  The interpreter cuts digits off, which shrinks every number."""
    builder = interpreter.InterpreterBuilder
    cast_impl = builder.cast_impl

    def cast(self: Any, src: Any, dst_type: Any) -> Any:
        if (src.dtype.scalar, dst_type.scalar) != (tl.float32, tl.bfloat16):
            return cast_impl(self, src, dst_type)
        bits = np.ascontiguousarray(src.data).view(np.uint32).astype(np.uint64)
        nearest = bits + 0x7FFF + (bits >> 16 & 1)
        rounded = np.where(np.isnan(src.data), bits | 0x400000, nearest) >> 16
        return interpreter.TensorHandle(rounded.astype(np.uint16), tl.bfloat16)

    builder.cast_impl = cast


def _multiply_alike_in_every_shape() -> None:
    """Products of float32 tiles are summed in float64 and rounded once.

    NumPy's BLAS chooses its kernel by processor and shape, so that a similarity may have other bits in
    the backward pass, whose tiles have other shapes, than in the forward pass: where logits are large,
    log-sum-exp and similarity then no longer agree.  A GPU adds the products of float32 along k in every
    shape.
    """
    builder = interpreter.InterpreterBuilder
    create_dot = builder.create_dot

    def dot(self: Any, a: Any, b: Any, d: Any, *rest: Any) -> Any:
        if a.data.dtype != np.float32 or b.data.dtype != np.float32:
            return create_dot(self, a, b, d, *rest)
        product = np.matmul(a.data, b.data, dtype=np.float64).astype(d.data.dtype)
        return interpreter.TensorHandle(product + d.data, d.dtype.scalar)

    builder.create_dot = dot


if INTERPRETING:
    import quick
    from triton.runtime import interpreter

    quick.install()
    _round_bfloat16_as_compiled_code_does()
    _multiply_alike_in_every_shape()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """NumPy warns where a GPU is silent: exp2 of a huge number is inf, log2(0) is -inf."""
    for item in items:
        item.add_marker(pytest.mark.filterwarnings("ignore::RuntimeWarning"))
        # On a GPU the references use operations without a deterministic version; torch says so.
        item.add_marker(pytest.mark.filterwarnings("ignore:.*does not have a deterministic"))


@pytest.fixture(autouse=True)
def _poisoned_allocations() -> Iterator[None]:
    """torch.empty returns NaN (and the largest integer): what no kernel wrote must not be read."""
    torch.use_deterministic_algorithms(True, warn_only=DEVICE == "cuda")
    try:
        with torch.device(DEVICE):
            yield
    finally:
        torch.use_deterministic_algorithms(False)
