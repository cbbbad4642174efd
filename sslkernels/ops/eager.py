# SPDX-License-Identifier: Apache-2.0
"""When the dispatcher may be bypassed, and what has to be done by hand then.

An update of a small model, or the loss of a small batch, is bound by the overhead of torch's
dispatcher.  In plain eager mode with plain tensors the kernels are called directly; tracing,
dispatch modes and tensor subclasses go through the registered op.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _get_current_dispatch_mode

_C: ModuleType | None = None
try:
    import sslkernels.backends.cpu  # noqa: F401  loads the extension next to torch's OpenMP
    from sslkernels import _C as _extension

    _C = _extension
except ImportError:  # the registry reports the missing extension; plans are then not kept
    pass

# Torch 2.4 knows lists of tensors that are written to neither in bump_version nor in functionalization.
WRITES_LISTS = not torch.__version__.startswith("2.4.")
_PLAIN = (Tensor, torch.nn.Parameter)
_is_wrapper = torch._C._functorch.is_functorch_wrapped_tensor
# Those of torch.autograd.grad(is_grads_batched=True).
_is_batched = torch._C._functorch.is_legacy_batchedtensor


def is_plain_eager() -> bool:
    """Whether no tracer, dispatch mode, functorch transform or forward-mode AD wants to see the op."""
    return (
        not torch.compiler.is_compiling()
        and _get_current_dispatch_mode() is None
        and not torch._C._are_functorch_transforms_active()
        and not torch._C._is_tracing()
        and forward_ad._current_level < 0
    )


def are_plain(*tensors: Any) -> bool:
    """Whether all are plain tensors with memory of their own; None is.

    Subclasses, meta tensors and what a transform of torch.func left behind are not.
    """
    for x in tensors:
        if x is None:
            continue
        if type(x) not in _PLAIN or x.is_meta or _is_wrapper(x) or _is_batched(x):
            return False
    return True


def bump_versions(tensors: Sequence[Tensor]) -> None:
    """Tell autograd that tensors were written through their addresses."""
    if WRITES_LISTS:
        torch.autograd.graph.increment_version(tensors)
    else:
        for tensor in tensors:
            torch.autograd.graph.increment_version(tensor)


@functools.cache
def _torch_interface() -> dict[str, int] | None:
    """Addresses by name of five functions of torch's stable C interface, or None where torch lacks one.

    Asking a tensor for its address through Python takes as long as updating 64 elements; asked 80
    times, it would be the whole cost of the update.
    """
    names = ("data_ptr", "numel", "dtype", "dim", "strides")
    try:
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        functions = {name: getattr(library, f"aoti_torch_get_{name}") for name in names}
    except (OSError, AttributeError):
        return None
    return {name: ctypes.cast(f, ctypes.c_void_p).value or 0 for name, f in functions.items()}


def watch(tensors: Sequence[Tensor]) -> Any | None:
    """An object whose ``unchanged(a, b)`` says that a + b are these tensors, in the same memory.

    Compared are the objects, their addresses, dtypes, numbers of elements and strides.  None where
    that can't be told cheaply: the plan must then be made for each call.
    """
    functions = _torch_interface()
    if _C is None or functions is None:
        return None
    try:
        return _C.TensorWatch(tensors=list(tensors), **functions)
    except RuntimeError:  # tensors without memory of their own (functorch wrappers)
        return None


def watch_slots(dicts: Sequence[dict[str, Any]]) -> Any | None:
    """An object whose ``unchanged()`` says that no dict got, lost or replaced an entry."""
    return None if _C is None else _C.SlotWatch(dicts=list(dicts))
