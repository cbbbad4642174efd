# SPDX-License-Identifier: Apache-2.0
"""What the backends ask about GPUs and about Triton before they say that they can serve a device.

The facts are gathered here and nowhere else, each device by its number: two GPUs of one machine may
differ.  Asking initialises CUDA, as any tensor on the device has done.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import re
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Gpu:
    """One GPU as torch sees it."""

    name: str
    arch: str  # "sm_90"; with ROCm "gfx942"
    multiprocessors: int

    @property
    def capability(self) -> int | None:
        """The compute capability times ten, 90 for sm_90; None with ROCm."""
        return int(self.arch[3:]) if self.arch.startswith("sm_") else None


@dataclass(frozen=True)
class Triton:
    """The installed Triton."""

    version: str
    error: str = ""  # why it can't be imported

    @property
    def release(self) -> tuple[int, int]:
        """Major and minor version; (0, 0) if the version has no such form."""
        found = re.match(r"(\d+)\.(\d+)", self.version)
        return (int(found[1]), int(found[2])) if found else (0, 0)


def no_gpu() -> str:
    """Why this process has no GPU; an empty string when it has one."""
    if torch.version.cuda is None and torch.version.hip is None:
        return f"this torch ({torch.__version__}) is built without CUDA"
    if not torch.cuda.is_available():
        return "torch.cuda.is_available() is False: no GPU, or no driver that this torch can use"
    return ""


def count() -> int:
    """How many GPUs this process can use."""
    return 0 if no_gpu() else torch.cuda.device_count()


def index_of(device: torch.device) -> int:
    """Number of a CUDA device; that of the current one where the device has none."""
    return torch.cuda.current_device() if device.index is None else device.index


def gpu(device: torch.device) -> Gpu:
    """The facts of a CUDA device, which must exist."""
    return _gpu(index_of(device))


@functools.cache
def _gpu(index: int) -> Gpu:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip is not None:
        arch = str(properties.gcnArchName).split(":")[0]
    else:
        arch = f"sm_{properties.major}{properties.minor}"
    return Gpu(properties.name, arch, int(properties.multi_processor_count))


@functools.cache
def driver() -> int:
    """The CUDA version that the driver serves, 12040 for 12.4; 0 without one, or where torch can't say."""
    if torch.version.cuda is None or no_gpu():
        return 0
    ask = getattr(torch._C, "_cuda_getDriverVersion", None)
    return 0 if ask is None else int(ask())


def capturing(device: torch.device) -> bool:
    """Whether the current stream of a device records a CUDA graph instead of running what it is given."""
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


@functools.cache
def triton() -> Triton | None:
    """The installed Triton, None where there is none."""
    if importlib.util.find_spec("triton") is None:
        return None
    try:
        module = importlib.import_module("triton")
    except Exception as error:  # whatever a foreign package raises: it can't be used
        return Triton("unknown", f"{type(error).__name__}: {error}")
    return Triton(str(getattr(module, "__version__", "unknown")))


def interpreting() -> bool:
    """Whether Triton (3.4 or newer) runs kernels in its interpreter."""
    return bool(importlib.import_module("triton").knobs.runtime.interpret)
