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
    """One recorded kernel launch: which kernel, its grid and its compile-time flags."""

    kernel: str
    grid: tuple[int, ...]
    flags: dict[str, Any] = field(default_factory=dict)


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
        _recording.append(Launch(kernel.__name__, grid, dict(flags)))
    guard = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    with guard:
        kernel[grid](*args, **configs.compiler_options(configs.arch_of(device)), **flags)
