# SPDX-License-Identifier: Apache-2.0
"""Launching on the right device, and a record of launches for tests."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from . import configs


@dataclass
class Launch:
    """One recorded kernel launch: which kernel, its grid, its compile-time flags, its operands."""

    kernel: str
    grid: tuple[int, ...]
    flags: dict[str, Any] = field(default_factory=dict)
    operand: torch.dtype | None = None  # of the first matrix among the inputs, x
    arguments: dict[str, Any] = field(default_factory=dict)  # the numbers among them


_recording: list[Launch] | None = None


@contextlib.contextmanager
def recorded_launches() -> Iterator[list[Launch]]:
    """Collect the launches made inside the block, so that a test can prove which branch ran."""
    global _recording
    previous, _recording = _recording, []
    try:
        yield _recording
    finally:
        _recording = previous


def launch(
    kernel: Any, grid: tuple[int, ...], device: torch.device, *args: Any, **flags: Any
) -> None:
    """Launch on the device of the tensors (Triton launches on the current one)."""
    if _recording is not None:
        named = dict(zip((n for n in kernel.arg_names if n not in flags), args, strict=False))
        x = named.get("x_ptr")
        operand = x.dtype if isinstance(x, torch.Tensor) else None
        numbers = {name: value for name, value in named.items() if isinstance(value, int)}
        _recording.append(Launch(kernel.__name__, grid, dict(flags), operand, numbers))
    options = configs.compiler_options(configs.arch_of(device), configs.overlaps())
    if device.type != "cuda":
        kernel[grid](*args, **options, **flags)
        return
    with torch.cuda.device(device.index):  # of a number it need not ask what it means
        kernel[grid](*args, **options, **flags)
