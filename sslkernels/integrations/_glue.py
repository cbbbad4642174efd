# SPDX-License-Identifier: Apache-2.0
"""What the drop-ins share: hand-over to the original, errors of the peer's type, scalars."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from sslkernels.integrations._patching import LOG, original

_F = TypeVar("_F", bound=Callable[..., Any])


class ShapeError(ValueError, RuntimeError, IndexError):
    """Arguments that do not fit.  Ours is a ValueError; in a peer torch raises one of the others."""


class PeerAssertionError(ValueError, AssertionError):
    """Where the peer asserts; unlike an assertion it stays under ``python -O``."""


class DtypeError(TypeError, RuntimeError):
    """A wrong dtype: ours is a TypeError, what torch raises in the peer a RuntimeError."""


def torch_errors(function: _F) -> _F:
    """Checks of ours raise what code that expects torch's RuntimeError catches too."""

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except (RuntimeError, AssertionError, ZeroDivisionError):
            raise
        except ValueError as error:
            raise ShapeError(*error.args) from None
        except TypeError as error:
            raise DtypeError(*error.args) from None

    return wrapped  # type: ignore[return-value]


@functools.cache
def say(what: str, why: str) -> None:
    """Log that the original computes something; each reason once."""
    LOG.warning("%s: handed over to the original (%s)", what, why)


def hand_over(path: str, why: str) -> Any:
    """The original at a dotted path, for what ours does not do; each reason is logged once.

    Raises:
        ModuleNotFoundError: If the peer is not installed, with what it is needed for.
    """
    name = path.rpartition(".")[2]
    try:
        theirs = original(path)
    except ImportError as error:
        raise ModuleNotFoundError(
            f"{name}: {why} needs the original of {path.partition('.')[0]}, "
            f"which can't be imported here ({error})"
        ) from None
    say(name, why)
    return theirs


def temperature_like(value: float | Tensor, like: Tensor) -> float | Tensor:
    """A temperature of any sign or shape [1] as the functions of this library take it.

    They refuse numbers <= 0, and do not look at the value of a tensor.
    """
    if isinstance(value, Tensor):
        return value.reshape(()).to(like.device)
    if value > 0:
        return value
    return torch.full(
        (), value, dtype=torch.promote_types(like.dtype, torch.float32), device=like.device
    )


def as_peer(loss: Any, *inputs: Tensor) -> Tensor:
    """The loss in the dtype that plain torch would return: that of the inputs, except in autocast.

    It has been accumulated in float32 at least, and is rounded here once.
    """
    dtype = functools.reduce(torch.promote_types, (x.dtype for x in inputs))
    if loss.dtype == dtype or torch.is_autocast_enabled(loss.device.type):
        return cast(Tensor, loss)
    return cast(Tensor, loss.to(dtype))


def world_size() -> int:
    """Of the default process group; 1 without one."""
    dist = torch.distributed
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """In the default process group; 0 without one."""
    return torch.distributed.get_rank() if world_size() > 1 else 0
