# SPDX-License-Identifier: Apache-2.0
"""The results of Triton's interpreter in less than half of its time.

Three parts that have nothing to do with what a kernel computes took most of it: the search for the
functions of the language that the interpreter replaces, at each call inside of a kernel; a table of all
types for each question about one; a check of sums and products for overflow, in ten operations on tensors,
whose answer is dropped unless kernels are debugged.  Here it is one comparison, and it counts.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


@cache
def _builtins(package: Any) -> tuple[str, ...]:
    """Names of a module or class of the language that the interpreter replaces."""
    return tuple(name for name in dir(package) if tl.core.is_builtin(getattr(package, name, None)))


def _patch_builtin(package: Any, builder: Any, scope: Any) -> None:
    """Without a search, and without a look at each name where all are replaced already."""
    names = _builtins(package)
    if names and tl.core.is_builtin(getattr(package, names[0])):
        for name in names:
            interpreter._patch_attr(package, name, getattr(package, name), builder, scope)


_patch_lang = interpreter._patch_lang
_language_of: dict[Any, list[Any]] = {}


def _patch_once(function: Any) -> Any:
    """Nothing for a function inside of a kernel whose modules of the language are replaced already."""
    if function not in _language_of:
        seen = function.__globals__.values()
        _language_of[function] = [part for part in (tl, tl.core) if any(v is part for v in seen)]
    for part in _language_of[function]:
        if tl.core.is_builtin(getattr(part, _builtins(part)[0])):
            return _patch_lang(function)
    return interpreter._LangPatchScope()


def _check_overflow(lhs: Any, rhs: Any, operation: Callable[..., Any]) -> None:
    """Fails where indices overflow: sums and products of signed integers below 64 bits.

    Unsigned ones are bit patterns, whose arithmetic may wrap.
    """
    kind = lhs.type.scalar
    if kind.int_bitwidth >= 64 or kind.is_int_unsigned():
        return
    exact = {"add": np.add, "sub": np.subtract, "mul": np.multiply}[operation.__name__](
        lhs.handle.data, rhs.handle.data, dtype=np.int64
    )
    if exact.min() < kind.get_int_min_value() or exact.max() > kind.get_int_max_value():
        raise OverflowError(f"int{kind.int_bitwidth} overflow in {operation.__name__}")


_numpy_type = interpreter._get_np_dtype
_numpy_type_of_scalar = cache(_numpy_type)


def _get_np_dtype(kind: Any) -> np.dtype:
    """One look-up for a scalar; types of pointers have no hash."""
    return _numpy_type_of_scalar(kind) if type(kind) is tl.dtype else _numpy_type(kind)


def install() -> None:
    """Change the interpreter of this process."""
    interpreter._patch_builtin = _patch_builtin
    interpreter._patch_lang = _patch_once
    interpreter._get_np_dtype = _get_np_dtype
    interpreter.interpreter_semantic.binary_op_sanitize_overflow_impl = _check_overflow
