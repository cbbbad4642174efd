# SPDX-License-Identifier: Apache-2.0
"""Pixels of any number type to bytes: which range of values becomes 0 to 255."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from ssltrain.config import parse_range
from ssltrain.errors import UserError

DEPTHS = (8, 10, 12, 14, 16)  # bits of the sensors whose files hold 16
# What a number type means by itself. Other types have no usual range.
TYPE_RANGES = {"u1": (0.0, 255.0), "u2": (0.0, 65535.0), "f": (0.0, 1.0), "b1": (0.0, 1.0)}


class Extent(NamedTuple):
    """The least and the greatest value of pixels, and whether they are floats."""

    low: float
    high: float
    is_float: bool

    def join(self, other: Extent | None) -> Extent:
        """The extent of both."""
        if other is None:
            return self
        return Extent(
            min(self.low, other.low), max(self.high, other.high), self.is_float or other.is_float
        )


def extent(array: np.ndarray) -> Extent:
    """The extent of an array of numbers.

    Raises:
        UserError: a value is infinite or not a number.
    """
    is_float = array.dtype.kind == "f"
    if not array.size:
        return Extent(0.0, 0.0, is_float)
    low, high = float(array.min()), float(array.max())
    if not (math.isfinite(low) and math.isfinite(high)):
        raise UserError("has pixels that are infinite or not a number")
    return Extent(low, high, is_float)


def choose_range(found: Extent, asked: str) -> str:
    """The range for pixels of more than 8 bits whose values span ``found``.

    ``auto`` becomes ``0:1`` for floats between these, and for integers from 0 on the range of the
    smallest usual depth that holds them: 8, 10, 12, 14 or 16 bits.

    Raises:
        UserError: ``auto`` cannot tell. The message is what follows the name of the source.
    """
    if asked != "auto":
        return asked
    low, high, is_float = found
    if is_float and 0 <= low and high <= 1:
        return "0:1"
    if not is_float and low >= 0:
        for bits in DEPTHS:
            if high < 2**bits:
                return f"0:{2**bits - 1}"
    raise UserError(
        f"has pixels from {low:g} to {high:g}, and nothing says which are black and white; give "
        f"--pixel-range {low:g}:{high:g}, or --pixel-range image for the range of each image"
    )


def to_bytes(array: np.ndarray, pixel_range: str) -> np.ndarray:
    """Scale one image to uint8, rounding to nearest; values outside the range are clipped.

    Args:
        array: numbers of any type and shape.
        pixel_range: ``LOW:HIGH``, ``image``, or ``type``.

    Raises:
        UserError: ``type`` for a type without a range of its own.
    """
    low, high = _bounds(array, pixel_range)
    scaled = (array.astype(np.float64) - low) * (255.0 / (high - low))
    return np.rint(scaled).clip(0, 255).astype(np.uint8)


def _bounds(array: np.ndarray, pixel_range: str) -> tuple[float, float]:
    given = parse_range(pixel_range)
    if given is not None:
        return given
    if pixel_range == "image":
        found = extent(array)
        return found.low, found.high if found.high > found.low else found.low + 1
    kind = array.dtype.kind
    own = TYPE_RANGES.get("f" if kind == "f" else f"{kind}{array.dtype.itemsize}")
    if own is None:
        raise UserError(
            f"has pixels of type {array.dtype.name}, which has no range of its own; give "
            "--pixel-range LOW:HIGH, or --pixel-range image for the range of each image"
        )
    return own
