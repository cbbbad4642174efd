# SPDX-License-Identifier: Apache-2.0
"""The only place that chooses a backend.

A backend is a module of ``sslkernels.backends``.  It provides one or both *families* of primitives:

* ``"tiles"``: the tile engine of ``backends/interface.py`` and everything fused on top of it;
* ``"updates"``: EMA over a list of tensors, queue enqueue.

The automatic choice, by device type of the tensors:

============  ====================  =====================
device        tiles                 updates
============  ====================  =====================
cpu           cpu                   cpu
cuda          triton                cuda, else triton
others        chunked               chunked
============  ====================  =====================

When the module in the table can't be loaded, ``chunked`` (plain torch in blocks) takes over and one
line says so through ``logging.getLogger("sslkernels")``.  A choice made by the user
(``set_backend``, ``backend(...)``, the environment variable ``SSLKERNELS_BACKEND``) never falls
back: it raises with the reason when the backend is missing or can't serve the device.  It decides
the families that the backend has; the other family stays automatic (``"cuda"`` has no tiles).

``set_backend`` and the environment variable are process-wide.  ``backend(...)`` is a context
variable: it counts in the current thread (and asyncio task) only.  Ops remember the context's
choice for their backward pass, which autograd may run in another thread.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from types import ModuleType
from typing import Literal

import torch

from sslkernels._version import __version__

Family = Literal["tiles", "updates"]

FAMILIES: dict[str, tuple[str, ...]] = {
    "cpu": ("tiles", "updates"),
    "triton": ("tiles", "updates"),
    "cuda": ("updates",),
    "chunked": ("tiles", "updates"),
}
_AUTOMATIC = {
    ("cpu", "tiles"): "cpu",
    ("cpu", "updates"): "cpu",
    ("cuda", "tiles"): "triton",
    ("cuda", "updates"): "cuda",
}
_LOG = logging.getLogger("sslkernels")

_override: ContextVar[str | None] = ContextVar("sslkernels_backend", default=None)
_cache: dict[tuple[str, str | None, str], ModuleType] = {}
_logged: set[tuple[str, str]] = set()


def _known(name: str | None, where: str) -> str | None:
    if name in (None, "", "auto"):
        return None
    if name not in FAMILIES:
        raise ValueError(
            f"{where}: backend must be one of {sorted(FAMILIES)} or None, got {name!r}"
        )
    return name


_process: str | None = _known(os.environ.get("SSLKERNELS_BACKEND"), "SSLKERNELS_BACKEND")


def _why_not(name: str, device_type: str) -> str | None:
    """Why a backend can't serve a device type, or None when it can."""
    if name == "chunked":
        return None
    if name == "cpu" and device_type != "cpu":
        return f"it serves CPU tensors only, not {device_type!r}"
    if name == "cuda" and device_type != "cuda":
        return f"it serves CUDA tensors only, not {device_type!r}"
    if name == "triton":
        if device_type == "cpu" and os.environ.get("TRITON_INTERPRET", "0") != "1":
            return "it serves CPU tensors only in Triton's interpreter (set TRITON_INTERPRET=1)"
        if device_type not in ("cpu", "cuda"):
            return f"it serves CUDA tensors, not {device_type!r}"
        if importlib.util.find_spec("triton") is None:
            return "the package 'triton' is not installed"
    try:
        importlib.import_module(f"sslkernels.backends.{name}")
    except ImportError as error:
        return f"it could not be loaded ({error})"
    return None


def _choose(device_type: str, name: str | None, family: str) -> tuple[str, str]:
    """Name of the backend and the reason, without loading or logging anything."""
    if name is not None and family in FAMILIES[name]:
        reason = _why_not(name, device_type)
        if reason is not None:
            raise RuntimeError(
                f"sslkernels: backend {name!r} was asked for but {reason}; "
                "set_backend(None) chooses automatically"
            )
        return name, "asked for"
    best = _AUTOMATIC.get((device_type, family))
    if best is None:
        return "chunked", f"no kernels for {device_type!r} yet"
    reason = _why_not(best, device_type)
    if reason is not None:
        # CUDA C++ is compiled only where nvcc is; Triton's updates need no compiler.
        other = (
            "triton" if best == "cuda" and _why_not("triton", device_type) is None else "chunked"
        )
        return other, f"backend {best!r}: {reason}"
    return best, "automatic"


def _load(device_type: str, name: str | None, family: str) -> ModuleType:
    chosen, reason = _choose(device_type, name, family)
    if chosen != name and (device_type, family) not in _logged:
        _logged.add((device_type, family))
        # A CPU without the C++ extension is a broken installation: warn.  The rest is information.
        broken = chosen == "chunked" and device_type == "cpu"
        _LOG.log(
            logging.WARNING if broken else logging.INFO,
            "%s on %r tensors use backend %r (%s)",
            family,
            device_type,
            chosen,
            reason,
        )
    module = importlib.import_module(f"sslkernels.backends.{chosen}")
    _cache[device_type, name, family] = module
    return module


def resolve(device: torch.device, family: Family = "tiles") -> ModuleType:
    """The backend module that serves tensors on a device (cached: well below 1 µs a call).

    Args:
        device: Device of the tensors.
        family: "tiles" (the engine) or "updates" (EMA, enqueue).

    Raises:
        RuntimeError: If the backend that the user asked for is missing or can't serve the device.
    """
    key = (device.type, requested(), family)
    try:
        return _cache[key]
    except KeyError:
        return _load(*key)


def requested() -> str | None:
    """The backend asked for here and now, None when the choice is automatic (about 0.1 µs)."""
    return _override.get() or _process


def override() -> str | None:
    """The backend set by an enclosing ``backend(...)``, to hand to the backward pass."""
    return _override.get()


def set_backend(name: str | None) -> None:
    """Choose the backend of the whole process; None returns to the automatic choice.

    Args:
        name: "cpu", "triton", "cuda", "chunked" or None.

    Raises:
        ValueError: If the name is unknown.  Whether the backend is available shows at the first
            call, because that depends on the device of the tensors.

    Example:
        >>> import sslkernels
        >>> sslkernels.set_backend("chunked")
        >>> sslkernels.set_backend(None)
    """
    global _process
    _process = _known(name, "set_backend")
    _cache.clear()


@contextmanager
def backend(name: str | None) -> Iterator[None]:
    """Use a backend inside a ``with`` block; blocks nest, and the old choice returns on exceptions.

    The choice holds for the current thread.  None means "as outside of any block": ``set_backend``
    and ``SSLKERNELS_BACKEND`` count again.  The backward pass of an op uses the backend that the
    block gave to its forward pass.

    Args:
        name: "cpu", "triton", "cuda", "chunked" or None.

    Raises:
        ValueError: If the name is unknown.

    Example:
        >>> import sslkernels, torch
        >>> with sslkernels.backend("chunked"):
        ...     loss = sslkernels.nt_xent_loss(torch.randn(8, 4), torch.randn(8, 4))
    """
    token = _override.set(_known(name, "backend"))
    try:
        yield
    finally:
        _override.reset(token)


@dataclass(frozen=True)
class Info:
    """What is installed, what is active and why; ``print`` it."""

    version: str
    python: str
    torch: str
    triton: str | None  # version, or None when not installed
    cpu_extension: bool  # sslkernels._C is built and loads
    isa: str | None  # instruction set in use
    available_isas: tuple[str, ...]
    threads: int
    cuda_extension: bool  # sslkernels._cuda is built
    cuda_device: str | None
    asked_for: str | None  # by backend(...), set_backend or SSLKERNELS_BACKEND
    backends: dict[str, str]  # "device/family" -> "backend (reason)"

    def __str__(self) -> str:
        """One fact a line."""
        available = ", ".join(self.available_isas)
        lines = [
            f"sslkernels {self.version} (python {self.python}, torch {self.torch})",
            f"  CPU extension   {'built' if self.cpu_extension else 'not built'}",
            f"  ISA             {self.isa or '-'} (available: {available or '-'})",
            f"  threads         {self.threads}",
            f"  triton          {self.triton or 'not installed'}",
            f"  CUDA extension  {'built' if self.cuda_extension else 'not built'}",
            f"  CUDA device     {self.cuda_device or 'none'}",
            f"  asked for       {self.asked_for or 'automatic'}",
        ]
        lines += [f"  {key:<15} {value}" for key, value in self.backends.items()]
        return "\n".join(lines)


def _spec_exists(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def info() -> Info:
    """Versions, instruction sets, threads, and which backend each device type gets and why.

    Example:
        >>> import sslkernels
        >>> print(sslkernels.info())  # doctest: +ELLIPSIS
        sslkernels ...
    """
    isa, available, built = None, (), False
    if _why_not("cpu", "cpu") is None:
        extension = importlib.import_module("sslkernels._C")
        isa, available, built = extension.isa(), tuple(extension.available_isas()), True
    triton_version = None
    if _spec_exists("triton"):
        triton_version = getattr(importlib.import_module("triton"), "__version__", "unknown")
    name = _override.get() or _process
    backends = {}
    for device_type in ("cpu", "cuda", "mps"):
        for family in ("tiles", "updates"):
            try:
                chosen, reason = _choose(device_type, name, family)
                backends[f"{device_type}/{family}"] = f"{chosen} ({reason})"
            except RuntimeError as error:
                backends[f"{device_type}/{family}"] = f"none ({error})"
    return Info(
        version=__version__,
        python=platform.python_version(),
        torch=torch.__version__,
        triton=triton_version,
        cpu_extension=built,
        isa=isa,
        available_isas=available,
        threads=torch.get_num_threads(),
        cuda_extension=_spec_exists("sslkernels._cuda"),
        cuda_device=torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        asked_for=name,
        backends=backends,
    )
