# SPDX-License-Identifier: Apache-2.0
"""When the dispatcher may be bypassed, and what has to be done by hand then.

An update of a small model is bound by the overhead of passing lists of tensors through torch's
dispatcher.  In plain eager mode with plain tensors the kernels are called directly; tracing, dispatch
modes and tensor subclasses go through the registered op.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

try:
    from sslkernels import _C
except ImportError:  # the registry reports the missing extension; plans are then not cached
    _C = None

_PLAIN = (Tensor, torch.nn.Parameter)


def is_plain_eager() -> bool:
    """Whether no tracer and no dispatch mode wants to see the op."""
    return not torch.compiler.is_compiling() and _get_current_dispatch_mode() is None


def are_plain(*tensors: Any) -> bool:
    """Whether all are plain tensors with memory of their own, not subclasses or meta tensors."""
    return all(type(x) in _PLAIN and not x.is_meta for x in tensors)


def bump_versions(tensors: Sequence[Tensor]) -> None:
    """Tell autograd that tensors were written through their addresses."""
    torch.autograd.graph.increment_version(tensors)


def watch(tensors: Sequence[Tensor]) -> Any | None:
    """An object whose ``unchanged(a, b)`` says that a + b are these tensors at these addresses.

    None when the extension is missing, or when a tensor has no address (functorch wrappers).
    """
    if _C is None:
        return None
    try:
        return _C.AddressWatch(list(tensors), Tensor.data_ptr)
    except RuntimeError:
        return None


def watch_slots(dicts: Sequence[dict[str, Any]]) -> Any | None:
    """An object whose ``unchanged()`` says that no dict got, lost or replaced an entry."""
    return None if _C is None else _C.SlotWatch(list(dicts))
