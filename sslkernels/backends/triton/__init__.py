# SPDX-License-Identifier: Apache-2.0
"""Triton backend: the tile engine for NVIDIA and AMD GPUs.

The functions are those of ``backends/interface.py``, for CUDA (or ROCm) tensors.  The kernels compute
float32, bfloat16 and float16.  **float64 goes to the chunked backend**, which serves every device:
FP64 tiles would be a second set of kernels for a case that only tests have.  ``reroute(q)`` gives the
reason, and the first such call logs it.  Importing this package does not import Triton;
``available()`` says whether the kernels can run here.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .. import chunked
from ..interface import (
    Attend,
    Extremes,
    Kind,
    PairwiseBackward,
    PairwiseForward,
    RowState,
    Thresholds,
    Tiles,
    Wanted,
)
from ..updates_torch import CopyPlan as CopyPlan

__all__ = [
    "CopyPlan",
    "EmaPlan",
    "attend",
    "available",
    "enqueue_",
    "extremes",
    "normalize_rows",
    "normalize_rows_backward",
    "pairwise_backward",
    "pairwise_forward",
    "reroute",
    "why_unavailable",
]

_LOG = logging.getLogger("sslkernels")
_UPDATES = ("EmaPlan", "ema_update_", "enqueue_", "normalize_rows", "normalize_rows_backward")


def why_unavailable() -> str:
    """Why no kernel of this backend can run in this process; an empty string when one can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    triton = importlib.import_module("triton")
    if triton.knobs.runtime.interpret:
        return ""
    if not torch.cuda.is_available():
        return "torch.cuda.is_available() is False and TRITON_INTERPRET is not set"
    if torch.version.hip is None and torch.cuda.get_device_capability() < (8, 0):
        major, minor = torch.cuda.get_device_capability()
        return (
            f"the tile engine needs compute capability 8.0 or newer, this GPU has {major}.{minor}"
        )
    return ""


def available() -> bool:
    """Whether the kernels can run: a GPU is present, or Triton's interpreter is on."""
    return not why_unavailable()


def reroute(q: Tensor) -> str:
    """Why a call with q [N, D] is computed by the chunked backend; an empty string when it is not."""
    if q.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"the kernels compute float32, bfloat16 and float16, not {q.dtype}"
    if q.shape[1] == 0:
        return "D = 0 leaves nothing to multiply"
    return ""


@functools.cache
def _log_once(reason: str) -> None:
    _LOG.info("tiles use backend 'chunked' in place of 'triton' (%s)", reason)


def _engine(q: Tensor) -> ModuleType:
    """The module that computes for these operands."""
    reason = reroute(q)
    if reason:
        _log_once(reason)
        return chunked
    return importlib.import_module(".launch", __name__)


def __getattr__(name: str) -> Any:
    """EMA, enqueue and row normalisation: loaded on first use, because they import Triton."""
    if name in _UPDATES:
        return getattr(importlib.import_module(".updates", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def pairwise_forward(
    kind: Kind, tiles: Tiles, want_col: bool, thresholds: Thresholds
) -> PairwiseForward:
    """See ``Backend.pairwise_forward``."""
    return _engine(tiles.q).pairwise_forward(kind, tiles, want_col, thresholds)


def pairwise_backward(
    kind: Kind, tiles: Tiles, row: RowState, col: RowState | None, wanted: Wanted
) -> PairwiseBackward:
    """See ``Backend.pairwise_backward``."""
    return _engine(tiles.q).pairwise_backward(kind, tiles, row, col, wanted)


def attend(tiles: Tiles, threshold: Tensor | None) -> Attend:
    """See ``Backend.attend``."""
    return _engine(tiles.q).attend(tiles, threshold)


def extremes(tiles: Tiles) -> Extremes:
    """See ``Backend.extremes``."""
    return _engine(tiles.q).extremes(tiles)
