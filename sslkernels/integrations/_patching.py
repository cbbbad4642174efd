# SPDX-License-Identifier: Apache-2.0
"""``patch`` and ``unpatch``: swap classes of an installed library for ours, and back.

A name that a module bound by ``from lightly.loss import NTXentLoss`` is a copy of the reference, so
replacing the attribute of lightly's module does not reach it.  ``patch`` therefore looks through the
namespaces of all loaded modules for the original object itself (``is``), replaces each, and remembers
where.  Instances that exist, and subclasses that were defined before, stay what they are.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
import logging
import os
import sys
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

LOG = logging.getLogger("sslkernels.integrations")

# Name of a library → the module here that describes it (its ``PEER``).
PEERS = {
    "catalyst": "catalyst",
    "info_nce": "info_nce",
    "lightly": "lightly",
    "moco": "moco",
    "monai": "monai",
    "open_clip": "open_clip",
    "pytorch_metric_learning": "pytorch_metric_learning",
    "sentence_transformers": "sentence_transformers",
    "solo_learn": "solo_learn",
    "timm": "timm",
    "torch": "torch",
    "torch_ema": "torch_ema",
}

_LOCK = threading.RLock()
_ACTIVE: dict[str, _Applied] = {}


@dataclass(frozen=True)
class Peer:
    """A library and what of it we replace.

    Args:
        name: What ``patch`` is called with, also the name of the extra.
        package: The module to import.
        distribution: Whose version counts; None where there is none.
        tested: Versions that the tests have run with.
        swaps: Dotted path of an object of the library → ours.
        install: How to get a tested version, where it is no extra of this package.
        unversioned: It has no version: what its classes take must be what ours take.
    """

    name: str
    package: str
    distribution: str | None
    tested: tuple[str, ...]
    swaps: Mapping[str, Any]
    install: str | None = None
    unversioned: bool = False


@dataclass
class _Applied:
    """What ``patch`` did to one library."""

    peer: Peer
    version: str
    pairs: dict[str, tuple[Any, Any]] = field(default_factory=dict)  # path → (original, ours)
    places: list[tuple[Any, str, str]] = field(default_factory=list)  # namespace, key, path
    deliberate: list[tuple[Any, str]] = field(default_factory=list)  # held ours before


class Patch:
    """What ``patch`` returns: leave it alone, or use it as a context manager.

    Leaving the ``with`` block undoes what this call did, and nothing that was patched before it.
    """

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names: tuple[str, ...] = names

    def __enter__(self) -> Patch:
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()

    def undo(self) -> None:
        """Put the originals back."""
        if self.names:  # unpatch() without a name would undo everything
            unpatch(*self.names)
        self.names = ()

    def __repr__(self) -> str:
        return f"sslkernels.patch{self.names!r}"


def patch(*peers: str, force: bool | None = None) -> Patch:
    """Replace classes and functions of installed libraries by ours, everywhere they are in use.

    Names in every loaded module that refer to one of the originals are rebound, and one log line
    (logger ``sslkernels.integrations``) says what was replaced.  Instances that exist already, and
    subclasses defined before, keep the original: patch before you build the model.  Patching twice
    does nothing.

    With the environment variable ``SSLKERNELS_DISABLE=1`` nothing is replaced, which a log line says.

    Args:
        peers: Names of libraries: "lightly", "pytorch_metric_learning", "open_clip",
            "sentence_transformers", "solo_learn", "info_nce", "monai", "catalyst", "timm", "torch",
            "torch_ema", "moco".
        force: Try a version that has not been tested; None asks the environment variable
            ``SSLKERNELS_PATCH_FORCE``.  Classes that such a version lacks are left out.

    Returns:
        A ``Patch``, which as a context manager undoes this call when the block is left.

    Raises:
        TypeError: If no library is named.
        ValueError: If a name is unknown.
        ModuleNotFoundError: If a library is not installed.
        RuntimeError: If its version is not one that was tested, without ``force``.  Nothing is
            replaced when any of the libraries is refused.

    Example:
        >>> import sslkernels
        >>> with sslkernels.patch("torch"):
        ...     from torch.optim.swa_utils import AveragedModel
        >>> AveragedModel.__module__
        'torch.optim.swa_utils'
    """
    if not peers:
        raise TypeError(f"sslkernels.patch: name at least one library of {sorted(PEERS)}")
    names = tuple(dict.fromkeys(_known("patch", name) for name in peers))
    if _flag("SSLKERNELS_DISABLE"):
        LOG.warning(
            "sslkernels.patch: nothing replaced in %s (SSLKERNELS_DISABLE)", ", ".join(names)
        )
        return Patch(())
    force = _flag("SSLKERNELS_PATCH_FORCE") if force is None else bool(force)
    with _LOCK:
        new = [_prepare(name, force) for name in names if name not in _ACTIVE]
        for applied in new:
            _apply(applied)
    return Patch(tuple(applied.peer.name for applied in new))


def unpatch(*peers: str) -> None:
    """Undo ``patch``: all of it, or for the named libraries.

    Names that modules imported after ``patch`` are put back too.  What is not patched is left alone.

    Args:
        peers: Names as for ``patch``; none for all.

    Raises:
        ValueError: If a name is unknown.
    """
    names = [_known("unpatch", name) for name in peers] or list(_ACTIVE)
    with _LOCK:
        for name in names:
            applied = _ACTIVE.pop(name, None)
            if applied is not None:
                _undo(applied)


def patched() -> dict[str, tuple[str, ...]]:
    """The libraries that are patched, each with the paths of what is replaced."""
    return {name: tuple(applied.pairs) for name, applied in _ACTIVE.items()}


def original(path: str) -> Any:
    """The object of a library at a dotted path, also while ours stands there.

    Raises:
        ModuleNotFoundError: If the library is not installed.
    """
    for applied in _ACTIVE.values():
        if path in applied.pairs:
            return applied.pairs[path][0]
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


# ---------------------------------------------------------------------------------------- parts


def _flag(variable: str) -> bool:
    return os.environ.get(variable, "").strip().lower() not in ("", "0", "false", "no", "off")


def _known(op: str, name: str) -> str:
    plain = str(name).replace("-", "_")
    if plain not in PEERS:
        raise ValueError(
            f"sslkernels.{op}: the library must be one of {sorted(PEERS)}, got {name!r}"
        )
    return plain


def _prepare(name: str, force: bool) -> _Applied:
    """Find the originals; nothing is changed yet."""
    peer: Peer = importlib.import_module(f"sslkernels.integrations.{PEERS[name]}").PEER
    try:
        importlib.import_module(peer.package)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != peer.package.split(".")[0]:
            raise  # it is there, and something that it needs is not
        raise ModuleNotFoundError(
            f"sslkernels.patch: {peer.package.partition('.')[0]!r} is not installed; "
            + (peer.install or f"pip install 'sslkernels[{peer.name}]' brings a tested version")
        ) from None
    version = _version(peer)
    if version.split("+")[0] not in peer.tested and not force and not peer.unversioned:
        raise RuntimeError(
            f"sslkernels.patch: {peer.name} {version} has not been tested (tested: "
            f"{', '.join(peer.tested) or 'none'}), its classes may take or return something else; "
            "patch(..., force=True) or SSLKERNELS_PATCH_FORCE=1 tries it anyway"
        )
    applied = _Applied(peer, version)
    missing = []
    for path, ours in peer.swaps.items():
        try:
            theirs = original(path)
        except (ModuleNotFoundError, AttributeError):
            missing.append(path)
            continue
        if peer.unversioned and not force and _names(theirs) != _names(ours):
            raise RuntimeError(
                f"sslkernels.patch: {path} must take {_names(ours)}, got {_names(theirs)}; "
                "patch(..., force=True) or SSLKERNELS_PATCH_FORCE=1 tries it anyway"
            )
        applied.pairs[path] = (theirs, ours)
    if missing and not force:
        raise RuntimeError(
            f"sslkernels.patch: {peer.name} {version} must have {', '.join(missing)}, and does not"
        )
    if missing:
        LOG.warning("sslkernels.patch: %s %s has no %s", peer.name, version, ", ".join(missing))
    return applied


def _names(function: Any) -> list[str]:
    return list(inspect.signature(function).parameters)


def _version(peer: Peer) -> str:
    # What the package says of itself first: it may be a checkout in front of an installed one.
    version = getattr(sys.modules[peer.package.partition(".")[0]], "__version__", None)
    if version is None and peer.distribution is not None:
        try:
            version = importlib.metadata.version(peer.distribution)
        except importlib.metadata.PackageNotFoundError:
            pass
    return "of unknown version" if version is None else str(version)


def _namespaces() -> Iterator[dict[str, Any]]:
    """Those of all loaded modules but ours, which hold the originals on purpose."""
    for name, module in list(sys.modules.items()):
        if name != "sslkernels" and not name.startswith("sslkernels."):
            namespace = getattr(module, "__dict__", None) if module is not None else None
            if isinstance(namespace, dict):
                yield namespace


def _apply(applied: _Applied) -> None:
    wanted = {id(theirs): path for path, (theirs, _) in applied.pairs.items()}
    ours = {id(mine) for _, mine in applied.pairs.values()}
    modules = set()
    for namespace in _namespaces():
        for key, value in list(namespace.items()):
            if id(value) in ours:
                applied.deliberate.append((namespace, key))
            path = wanted.get(id(value))
            if path is not None:
                namespace[key] = applied.pairs[path][1]
                applied.places.append((namespace, key, path))
                modules.add(str(namespace.get("__name__")))
    _ACTIVE[applied.peer.name] = applied
    LOG.warning(
        "sslkernels.patch: %s %s: %s replaced in %d modules",
        applied.peer.name,
        applied.version,
        ", ".join(path.rpartition(".")[2] for path in applied.pairs),
        len(modules),
    )
    _tell_of_subclasses(applied)


def _tell_of_subclasses(applied: _Applied) -> None:
    """Subclasses made before the patch keep their base: say which."""
    theirs = [pair[0] for pair in applied.pairs.values() if isinstance(pair[0], type)]
    kept = []
    sub: type
    for cls in theirs:
        for sub in type.__subclasses__(cls):
            if sub not in theirs and not sub.__module__.startswith("sslkernels."):
                kept.append(f"{sub.__module__}.{sub.__qualname__}")
    if kept:
        LOG.info("sslkernels.patch: defined before and left as they are: %s", ", ".join(kept))


def _undo(applied: _Applied) -> None:
    mine = {id(ours): theirs for theirs, ours in applied.pairs.values()}
    for namespace, key, path in applied.places:
        theirs, ours = applied.pairs[path]
        if namespace.get(key) is ours:
            namespace[key] = theirs
    # What was imported in the meantime, except where ours had been put on purpose.
    deliberate = {(id(namespace), key) for namespace, key in applied.deliberate}
    for namespace in _namespaces():
        for key, value in list(namespace.items()):
            if id(value) in mine and (id(namespace), key) not in deliberate:
                namespace[key] = mine[id(value)]
