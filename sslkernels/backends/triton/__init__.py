# SPDX-License-Identifier: Apache-2.0
"""Triton backend: the tile engine for NVIDIA and AMD GPUs.

The functions are those of ``backends/interface.py``, for CUDA (or ROCm) tensors.  The kernels compute
float32, bfloat16 and float16.  **float64 goes to the chunked backend**, which serves every device:
FP64 tiles would be a second set of kernels for a case that only tests have.  ``reroute(q)`` gives the
reason, and the first such call logs it.  One pass over elements (VAE, noise, feature maps) is plain
torch for float64.  Importing this package does not import Triton; ``why_unavailable(device)`` says
whether the kernels can run there.
"""

from __future__ import annotations

import functools
import importlib
import logging
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .. import chunked, devices
from ..arithmetic import widest
from ..interface import (
    Attend,
    Contrastive,
    Extremes,
    Kept,
    Kind,
    PairwiseBackward,
    PairwiseForward,
    Problem,
    RowState,
    Thresholds,
    Tiles,
    Vae,
    VaeGradients,
    VaeTerms,
    VaeWanted,
    Wanted,
)
from ..updates_torch import CopyPlan as CopyPlan

__all__ = [
    "CopyPlan",
    "EmaPlan",
    "attend",
    "contrastive_backward",
    "contrastive_forward",
    "enqueue_",
    "extremes",
    "features_backward",
    "features_forward",
    "normalize_rows",
    "normalize_rows_backward",
    "pairwise_backward",
    "pairwise_forward",
    "reparameterize",
    "reparameterize_backward",
    "reroute",
    "serves_contrastive",
    "vae_backward",
    "vae_forward",
    "why_unavailable",
]

_LOG = logging.getLogger("sslkernels")
_UPDATES = ("EmaPlan", "ema_update_", "enqueue_", "normalize_rows", "normalize_rows_backward")


# The oldest Triton that keeps the kernels of sm_80 and sm_90 within their budgets (docs/gpu.md): 3.6 spills
# up to 184 bytes, 3.4 up to 656.  And the GPUs that the tables of configs.py are for: 99 KB of shared
# memory in a program; MFMA and waves of 64.
OLDEST_TRITON = (3, 7)
OLDEST_CAPABILITY = 80
# Those that configs.py has a table for, compiled within the budgets; Thor (11.0) is a Blackwell.
CAPABILITIES = (80, 86, 87, 89, 90, 100, 103, 110, 120, 121)
AMD = ("gfx90a", "gfx942", "gfx950")


def why_unavailable(device: torch.device) -> str:
    """See ``Backend.why_unavailable``."""
    if device.type not in ("cpu", "cuda"):
        return f"it serves CUDA tensors, not {device.type!r}"
    installed = devices.triton()
    if installed is None:
        return "the package 'triton' is not installed"
    if installed.error:
        return f"triton can't be imported ({installed.error})"
    if installed.release < OLDEST_TRITON:
        oldest = ".".join(map(str, OLDEST_TRITON))
        return f"its kernels need Triton {oldest} or newer, installed is {installed.version}"
    if devices.interpreting():
        return ""
    if device.type == "cpu":
        return "it serves CPU tensors only in Triton's interpreter (set TRITON_INTERPRET=1)"
    reason = devices.no_gpu()
    if reason:
        return reason
    gpu = devices.gpu(device)
    if gpu.capability is None:
        if gpu.arch not in AMD:
            return f"its kernels are for AMD's {', '.join(AMD)}, {gpu.name} is {gpu.arch}"
    elif gpu.capability < OLDEST_CAPABILITY:
        return (
            f"its tiles need the shared memory of compute capability {OLDEST_CAPABILITY / 10} or "
            f"newer, {gpu.name} has {gpu.capability / 10}"
        )
    elif gpu.capability not in CAPABILITIES:
        known = ", ".join(f"{c / 10}" for c in CAPABILITIES)
        return (
            f"its tables of tiles are for compute capabilities {known}, {gpu.name} has "
            f"{gpu.capability / 10}"
        )
    return ""


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


@functools.cache
def _module(name: str) -> ModuleType:
    """Loaded on first use, because it may import Triton."""
    return importlib.import_module(name, __name__)


def _engine(q: Tensor) -> ModuleType:
    """The module that computes for these operands."""
    reason = reroute(q)
    if reason:
        _log_once(reason)
        return chunked
    return _module(".launch")


def __getattr__(name: str) -> Any:
    """EMA, enqueue and row normalisation."""
    if name in _UPDATES:
        return getattr(_module(".updates"), name)
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


def serves_contrastive(problem: Problem) -> bool:
    """Whether ``contrastive_forward`` and ``contrastive_backward`` compute a problem."""
    if reroute(problem.a):
        return False
    return _module(".contrastive").serves(problem)


def contrastive_forward(
    problem: Problem, want_rank: bool, keep_tiles: bool
) -> tuple[Contrastive, Tensor | None]:
    """See ``WholeLosses``; logits are never kept."""
    module = _module(".contrastive")
    return module.contrastive_forward(problem, want_rank), None


def contrastive_backward(
    problem: Problem, kept: Kept, dloss: Tensor, wanted: Wanted
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """See ``WholeLosses``."""
    module = _module(".contrastive")
    return module.contrastive_backward(problem, kept, dloss, wanted)


def attend(tiles: Tiles, threshold: Tensor | None) -> Attend:
    """See ``Backend.attend``."""
    return _engine(tiles.q).attend(tiles, threshold)


def extremes(tiles: Tiles) -> Extremes:
    """See ``Backend.extremes``."""
    return _engine(tiles.q).extremes(tiles)


def _elements(module: str, *tensors: Tensor) -> ModuleType:
    """The module that makes one pass over these elements: Triton's, or torch's where one is float64."""
    if widest(*tensors) == torch.float64:
        return _module("..autoencoders_torch")
    return _module(module)


def vae_forward(problem: Vae) -> VaeTerms:
    """See ``Autoencoders.vae_forward``."""
    return _elements(".autoencoders", problem.x).vae_forward(problem)


def vae_backward(problem: Vae, drec: Tensor, dkl: Tensor, wanted: VaeWanted) -> VaeGradients:
    """See ``Autoencoders.vae_backward``."""
    return _elements(".autoencoders", problem.x).vae_backward(problem, drec, dkl, wanted)


def reparameterize(mean: Tensor, log_variance: Tensor, seed: Tensor) -> Tensor:
    """See ``Autoencoders.reparameterize``."""
    return _elements(".autoencoders", mean).reparameterize(mean, log_variance, seed)


def reparameterize_backward(log_variance: Tensor, seed: Tensor, dz: Tensor) -> Tensor:
    """See ``Autoencoders.reparameterize_backward``."""
    module = _elements(".autoencoders", log_variance)
    return module.reparameterize_backward(log_variance, seed, dz)


def features_forward(
    features: list[Tensor], targets: list[Tensor], smooth: bool, beta: float
) -> Tensor:
    """See ``Autoencoders.features_forward``."""
    module = _elements(".features", *features, *targets)
    return module.features_forward(features, targets, smooth, beta)


def features_backward(
    features: list[Tensor],
    targets: list[Tensor],
    smooth: bool,
    beta: float,
    dout: Tensor,
    wanted: list[bool],
) -> list[Tensor | None]:
    """See ``Autoencoders.features_backward``."""
    module = _elements(".features", *features, *targets)
    return module.features_backward(features, targets, smooth, beta, dout, wanted)
