# SPDX-License-Identifier: Apache-2.0
"""Raises in a sub-interpreter, where importing torch hangs or ends the process; imported before torch."""

from __future__ import annotations

import importlib
from types import ModuleType


def _interpreters() -> ModuleType | None:
    """The module of Python 3.13, or the one before it."""
    for name in ("_interpreters", "_xxsubinterpreters"):
        try:
            return importlib.import_module(name)
        except ImportError:
            pass
    return None


def is_main() -> bool:
    """Whether this is the interpreter that the process began with."""
    known = _interpreters()
    return known is None or known.get_current() == known.get_main()


if not is_main():
    raise ImportError(
        "sslkernels: torch can't be used in a sub-interpreter; use a process (multiprocessing)"
    )
