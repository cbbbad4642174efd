# SPDX-License-Identifier: Apache-2.0
"""Numbers and flags as people pass them: Python's, NumPy's, arrays of no dimension."""

from __future__ import annotations

import numbers
from typing import Any

import numpy as np


def type_name(value: Any) -> str:
    """What came, for a message: of a NumPy array also how to make a tensor of it."""
    if isinstance(value, np.ndarray):
        return "numpy.ndarray; use torch.from_numpy"
    return type(value).__name__


def _plain(value: Any) -> Any:
    """A number or bool of NumPy, or in an array of no dimension, as Python's."""
    return (
        value.item() if isinstance(value, (np.generic, np.ndarray)) and value.ndim == 0 else value
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def number(op: str, name: str, value: Any, expected: str = "a number") -> float:
    """A number of Python or NumPy as a float (a tensor would be a host sync)."""
    if type(value) is float:  # the usual case
        return value
    value = _plain(value)
    if not _is_number(value):
        raise TypeError(f"{op}: {name} must be {expected}, got {type_name(value)}")
    return float(value)


def positive(op: str, name: str, value: Any) -> float:
    """A number above 0 (NaN is not) as a float."""
    value = number(op, name, value)
    if not value > 0:
        raise ValueError(f"{op}: {name} must be > 0, got {value}")
    return value


def integer(op: str, name: str, value: Any, minimum: int | None = None) -> int:
    """An integer of Python or NumPy that is at least ``minimum``, as an int."""
    if type(value) is not int:
        plain = _plain(value)
        if isinstance(plain, bool) or not isinstance(plain, numbers.Integral):
            least = "" if minimum is None else f" of at least {minimum}"
            raise TypeError(f"{op}: {name} must be an integer{least}, got {value!r}")
        value = int(plain)
    if minimum is not None and value < minimum:
        raise ValueError(f"{op}: {name} must be an integer of at least {minimum}, got {value}")
    return value


def flag(op: str, name: str, value: Any) -> bool:
    """True or False of Python or NumPy, as a bool."""
    if value is True or value is False:
        return value
    value = _plain(value)
    if not isinstance(value, bool):
        raise TypeError(f"{op}: {name} must be True or False, got {value!r}")
    return value
