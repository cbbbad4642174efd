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

The backend of the table is asked whether it can serve *this device* (``why_unavailable``): its module
may be missing, the GPU may lack what the kernels need, the driver or Triton may be too old.  Two GPUs
of one machine are asked about separately.  Where it can't, ``chunked`` (plain torch in blocks) takes
over and one line says so through ``logging.getLogger("sslkernels")``.  A choice made by the user
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
from sslkernels.backends import devices

Family = Literal["tiles", "updates"]

FAMILIES: dict[str, tuple[str, ...]] = {
    "cpu": ("tiles", "updates"),
    "triton": ("tiles", "updates"),
    "cuda": ("updates",),
    "chunked": ("tiles", "updates"),
}
# Best first.  CUDA C++ is compiled only where nvcc is; Triton's updates need no compiler.
_AUTOMATIC = {
    ("cpu", "tiles"): ("cpu",),
    ("cpu", "updates"): ("cpu",),
    ("cuda", "tiles"): ("triton",),
    ("cuda", "updates"): ("cuda", "triton"),
}
_LOG = logging.getLogger("sslkernels")

_override: ContextVar[str | None] = ContextVar("sslkernels_backend", default=None)
_cache: dict[tuple[torch.device, str | None, str], ModuleType] = {}
_logged: set[tuple[torch.device, str]] = set()


def _known(name: str | None, where: str) -> str | None:
    if name in (None, "", "auto"):
        return None
    if name not in FAMILIES:
        raise ValueError(
            f"{where}: backend must be one of {sorted(FAMILIES)} or None, got {name!r}"
        )
    return name


_process: str | None = _known(os.environ.get("SSLKERNELS_BACKEND"), "SSLKERNELS_BACKEND")


def _why_not(name: str, device: torch.device) -> str:
    """Why a backend can't serve a device; an empty string when it can."""
    try:
        module = importlib.import_module(f"sslkernels.backends.{name}")
    except ImportError as error:
        return f"it could not be loaded ({error})"
    return str(module.why_unavailable(device))


def _choose(device: torch.device, name: str | None, family: str) -> tuple[str, str]:
    """Name of the backend and the reason, without logging anything."""
    if name is not None and family in FAMILIES[name]:
        reason = _why_not(name, device)
        if reason:
            raise RuntimeError(
                f"sslkernels: backend {name!r} was asked for but {reason}; "
                "set_backend(None) chooses automatically"
            )
        return name, "asked for"
    candidates = _AUTOMATIC.get((device.type, family))
    if candidates is None:
        return "chunked", f"no kernels for {device.type!r} yet"
    refusals: dict[str, list[str]] = {}  # reason -> backends
    chosen = "chunked"
    for candidate in candidates:
        reason = _why_not(candidate, device)
        if not reason:
            chosen = candidate
            break
        refusals.setdefault(reason, []).append(repr(candidate))
    told = (f"backend {' and '.join(names)}: {reason}" for reason, names in refusals.items())
    return chosen, "; ".join(told) or "automatic"


def _load(device: torch.device, name: str | None, family: str) -> ModuleType:
    chosen, reason = _choose(device, name, family)
    if chosen != name and (device, family) not in _logged:
        _logged.add((device, family))
        # A CPU without the C++ extension is a broken installation: warn.  The rest is information.
        broken = chosen == "chunked" and device.type == "cpu"
        _LOG.log(
            logging.WARNING if broken else logging.INFO,
            "%s on %r tensors use backend %r (%s)",
            family,
            str(device),
            chosen,
            reason,
        )
    return importlib.import_module(f"sslkernels.backends.{chosen}")


def resolve(device: torch.device, family: Family = "tiles") -> ModuleType:
    """The backend module that serves tensors on a device (cached: well below 1 µs a call).

    Args:
        device: Device of the tensors.
        family: "tiles" (the engine) or "updates" (EMA, enqueue).

    Raises:
        RuntimeError: If the backend that the user asked for is missing or can't serve the device.
    """
    key = (device, requested(), family)
    try:
        return _cache[key]
    except KeyError:
        module = _load(*key)
    if device.type != "cuda" or device.index is not None:  # else it is the current one of this call
        _cache[key] = module
    return module


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
        ValueError: If the name is unknown.
        RuntimeError: If the backend can serve no device of this machine.  Where it can serve some,
            a call with tensors on another one raises.

    Example:
        >>> import sslkernels
        >>> sslkernels.set_backend("chunked")
        >>> sslkernels.set_backend(None)
    """
    global _process
    known = _known(name, "set_backend")
    if known is not None:
        asked = _devices() if devices.count() else [*_devices(), torch.device("cuda")]
        refusals = {str(device): _why_not(known, device) for device in asked}
        if all(refusals.values()):
            reasons = "; ".join(f"{device}: {reason}" for device, reason in refusals.items())
            raise RuntimeError(f"set_backend: {known!r} can serve no device here ({reasons})")
    _process = known
    _cache.clear()


@contextmanager
def backend(name: str | None) -> Iterator[None]:
    """Use a backend inside a ``with`` block; blocks nest, and the old choice returns on exceptions.

    The choice holds for the current thread; whether the backend can serve a device is asked at the
    first call with tensors on it.  None means "as outside of any block": ``set_backend``
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
    openmp: bool  # the CPU extension is built with it; without, it computes on one thread
    cuda_extension: bool  # sslkernels._cuda is built
    cuda_device: str | None
    asked_for: str | None  # by backend(...), set_backend or SSLKERNELS_BACKEND
    backends: dict[str, str]  # "device/family" -> "backend (reason)"; "cuda" is the current device

    def __str__(self) -> str:
        """One fact a line."""
        available = ", ".join(self.available_isas)
        threads = str(self.threads)
        if self.cpu_extension and not self.openmp:
            threads += " of torch, 1 of the CPU extension (built without OpenMP)"
        lines = [
            f"sslkernels {self.version} (python {self.python}, torch {self.torch})",
            f"  CPU extension   {'built' if self.cpu_extension else 'not built'}",
            f"  ISA             {self.isa or '-'} (available: {available or '-'})",
            f"  threads         {threads}",
            f"  triton          {self.triton or 'not installed'}",
            f"  CUDA extension  {'built' if self.cuda_extension else 'not built'}",
            f"  CUDA device     {self.cuda_device or 'none'}",
            f"  asked for       {self.asked_for or 'automatic'}",
        ]
        lines += [f"  {key:<15} {value}" for key, value in self.backends.items()]
        return "\n".join(lines)


def _devices() -> list[torch.device]:
    """The CPU and every GPU of this machine."""
    return [torch.device("cpu"), *(torch.device("cuda", i) for i in range(devices.count()))]


def _spec_exists(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def info() -> Info:
    """Versions, instruction sets, threads, and which backend each device type gets and why.

    Example:
        >>> import sslkernels
        >>> print(sslkernels.info())  # doctest: +ELLIPSIS
        sslkernels ...
    """
    isa, available, built, openmp = None, (), False, False
    if not _why_not("cpu", torch.device("cpu")):
        extension = importlib.import_module("sslkernels._C")
        isa, available, built = extension.isa(), tuple(extension.available_isas()), True
        openmp = extension.has_openmp()
    triton = devices.triton()
    name = _override.get() or _process
    backends = {}
    several = _devices()[1:] if devices.count() > 1 else []
    for device in (torch.device("cpu"), torch.device("cuda"), *several, torch.device("mps")):
        for family in ("tiles", "updates"):
            try:
                chosen, reason = _choose(device, name, family)
                backends[f"{device}/{family}"] = f"{chosen} ({reason})"
            except RuntimeError as error:
                backends[f"{device}/{family}"] = f"none ({error})"
    return Info(
        version=__version__,
        python=platform.python_version(),
        torch=torch.__version__,
        triton=triton.version if triton else None,
        cpu_extension=built,
        isa=isa,
        available_isas=available,
        threads=torch.get_num_threads(),
        openmp=openmp,
        cuda_extension=_spec_exists("sslkernels._cuda"),
        cuda_device=torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        asked_for=name,
        backends=backends,
    )
