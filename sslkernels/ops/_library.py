# SPDX-License-Identifier: Apache-2.0
"""What every op file shares: the library fragment, autocast and second-derivative guards."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

LIB = torch.library.Library("sslkernels", "FRAGMENT")
_AUTOCAST_DEVICES = ("cpu", "cuda", "xpu", "mps")
_NOTHING = nullcontext()


def define(schema: str) -> None:
    """Define an op that torch.compile may put into a graph."""
    LIB.define(schema, tags=(torch.Tag.pt2_compliant_tag,))


def implement(
    name: str,
    kernel: Callable[..., Any],
    fake: Callable[..., Any],
    apply: Callable[..., Any] | None = None,
    inputs: tuple[int, ...] = (),
) -> None:
    """Register an op that ``define`` has declared.

    Args:
        name: Without the namespace.
        kernel: For every device; chooses the backend itself.
        fake: Shapes and dtypes.
        apply: ``apply`` of the autograd.Function around the op; None: the op is not differentiable.
        inputs: Which arguments it is differentiable in: where none needs a gradient, ``apply`` is
            not called.
    """
    LIB.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"sslkernels::{name}", fake, lib=LIB)
    if apply is None:
        return
    op = getattr(torch.ops.sslkernels, name).default

    def autograd(*args: Any) -> Any:
        if needs_grad(*(args[i] for i in inputs)):
            return apply(*args)
        with below_autograd():
            return op(*args)

    LIB.impl(name, autograd, "Autograd")


def below_autograd() -> AbstractContextManager[Any]:
    """Dispatch to the kernels below autograd."""
    return torch._C._AutoDispatchBelowAutograd()


def no_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Matrix products inside an op keep the dtype that the op chose."""
    if device.type in _AUTOCAST_DEVICES and torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return _NOTHING


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether autograd has to record an op on these tensors."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


class _SecondDerivative(torch.autograd.Function):
    """Passes first derivatives on, and raises when somebody differentiates them."""

    @staticmethod
    def forward(ctx: Any, name: str, *grads: Tensor) -> tuple[Tensor, ...]:
        ctx.name = name
        return tuple(g.view_as(g) for g in grads)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        raise RuntimeError(
            f"{ctx.name}: second derivatives are not implemented; "
            "sslkernels.reference has a version that torch can differentiate twice"
        )


def once_differentiable(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator of an autograd.Function's backward: a second derivative raises, naming the op."""

    def decorate(backward: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(ctx: Any, *grads: Tensor | None) -> Any:
            if not torch.is_grad_enabled():
                return backward(ctx, *grads)
            with torch.no_grad():
                outputs = list(backward(ctx, *grads))
            where = [i for i, out in enumerate(outputs) if isinstance(out, Tensor)]
            marked = [outputs[i].detach().requires_grad_() for i in where]
            for i, out in zip(where, _SecondDerivative.apply(name, *marked), strict=True):
                outputs[i] = out
            return tuple(outputs)

        return wrapper

    return decorate
