# SPDX-License-Identifier: Apache-2.0
"""The modules behind a callable, their buffers, and whether backward synchronises gradients."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.nn.parameter import is_lazy

# How many steps from a callable a module may be: the attribute of an object in a list in a closure.
_DEPTH = 6
_LEAVES = (str, bytes, int, float, complex, Tensor, type, type(None), torch.dtype, torch.device)


def modules_behind(callables: Iterable[Any]) -> list[nn.Module]:
    """Modules that callables are, are methods of, or refer to, outermost ones only, each once.

    Looked through are ``functools.partial``, methods and their objects, closures, default arguments,
    the globals that the code names, wrapped and compiled functions, attributes and containers.
    """
    finder = _Finder()
    for each in callables:
        finder.visit(each, _DEPTH)
    inner = {id(m) for root in finder.found.values() for m in root.modules() if m is not root}
    return [root for key, root in finder.found.items() if key not in inner]


class _Finder:
    def __init__(self) -> None:
        self.found: dict[int, nn.Module] = {}
        self._seen: dict[int, Any] = {}  # keeps what it has seen alive, so that no id is used twice

    def visit(self, obj: Any, depth: int) -> None:
        if isinstance(obj, nn.Module):
            self.found[id(obj)] = obj
            return
        if depth == 0 or id(obj) in self._seen or isinstance(obj, (*_LEAVES, ModuleType)):
            return
        self._seen[id(obj)] = obj
        for value in self._within(obj):
            self.visit(value, depth - 1)

    def _within(self, obj: Any) -> Iterator[Any]:
        """What an object refers to that may be used when it is called."""
        if isinstance(obj, functools.partial):
            yield from (obj.func, *obj.args, *obj.keywords.values())
        elif isinstance(obj, MethodType):
            yield from (obj.__self__, obj.__func__)
        elif isinstance(obj, FunctionType):
            yield from _function(obj)
        elif isinstance(obj, Mapping):
            yield from obj.values()
        elif isinstance(obj, (list, tuple, set, frozenset)):
            yield from obj
        else:
            yield type(obj).__dict__.get("__call__")
        yield from getattr(obj, "__dict__", {}).values()  # also __wrapped__ and what compile keeps


def _function(function: FunctionType) -> Iterator[Any]:
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # not assigned yet
            continue
    yield from function.__defaults__ or ()
    yield from (function.__kwdefaults__ or {}).values()
    if (function.__module__ or "").partition(".")[0] == "torch":
        return
    names = set(_names(function.__code__))
    for name in names:
        value = function.__globals__.get(name)
        if isinstance(value, ModuleType):  # a file of the user's: what it is asked for
            if value.__name__.partition(".")[0] != "torch":
                yield from (vars(value)[n] for n in names if n in vars(value))
        else:
            yield value


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):  # a function within
            yield from _names(constant)


class Buffers:
    """Buffers of modules as they were when they were kept."""

    def __init__(self) -> None:
        """See the class."""
        self._modules: set[int] = set()
        self._kept: list[tuple[nn.Module, str, Tensor, Tensor]] = []

    def keep(self, module: nn.Module) -> None:
        """Copy the buffers of one module, not of those inside, unless that has been done.

        Raises:
            ValueError: If the module is lazy and has not been called yet.
        """
        if id(module) in self._modules:
            return
        self._modules.add(id(module))
        for name, buffer in module._buffers.items():
            if buffer is None:
                continue
            if is_lazy(buffer):
                raise ValueError(
                    f"cached_step: modules must be initialised, got a {type(module).__name__} that "
                    "has not been called yet; call the encoder once before"
                )
            self._kept.append((module, name, buffer, buffer.clone()))

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Put buffers back on leaving, both those changed in place and those replaced."""
        try:
            yield
        finally:
            with torch.no_grad():
                for module, name, buffer, value in self._kept:
                    buffer.copy_(value)
                    module._buffers[name] = buffer


@contextmanager
def before_calls(
    modules: Iterable[nn.Module] | None, visit: Callable[[nn.Module], None]
) -> Iterator[None]:
    """Call ``visit(module)`` before each call of the modules; None: of all that this thread calls."""
    own = threading.get_ident()

    def before(module: nn.Module, _: Any) -> None:
        if not torch.compiler.is_compiling() and threading.get_ident() == own:
            visit(module)

    with ExitStack() as stack:
        if modules is None:
            stack.callback(register_module_forward_pre_hook(before).remove)
        for module in modules or ():
            stack.callback(module.register_forward_pre_hook(before).remove)
        yield


def is_synchronised(module: nn.Module) -> bool:
    """Whether the backward pass of a module communicates: DDP, FSDP, FSDP2."""
    names = ("no_sync", "set_requires_gradient_sync")
    return any(hasattr(type(module), name) for name in names)


def synchronised(roots: Iterable[nn.Module]) -> list[nn.Module]:
    """The outermost modules whose backward pass communicates."""
    found: list[nn.Module] = []
    for root in roots:
        found += [root] if is_synchronised(root) else synchronised(root.children())
    return found


@contextmanager
def no_sync(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Gradients stay on this rank."""
    with ExitStack() as stack:
        for module in modules:
            if hasattr(type(module), "no_sync"):
                stack.enter_context(module.no_sync())  # type: ignore[operator]
            else:
                module.set_requires_gradient_sync(False)  # type: ignore[operator]
                stack.callback(module.set_requires_gradient_sync, True)  # type: ignore[arg-type]
        yield
