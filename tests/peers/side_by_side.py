# SPDX-License-Identifier: Apache-2.0
"""A peer's class or function and ours, side by side."""

from __future__ import annotations

import importlib
import inspect
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import check_loss
from torch import Tensor, nn


def peer(module: str) -> Any:
    """A module of a peer; the tests of the file that asks for it skip where it can't be imported."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what libraries say of each other while they are imported
        try:
            return importlib.import_module(module)
        except ImportError as error:
            pytest.skip(f"{module} can't be imported: {error}", allow_module_level=True)


def _parameters(function: Any) -> list[tuple[str, Any, Any]]:
    found = inspect.signature(function).parameters.values()
    return [(p.name, p.kind, p.default) for p in found]


def check_signature(ours: Any, theirs: Any) -> None:
    """The same names, kinds and defaults of arguments, in the constructor and in ``forward``."""
    assert ours.__name__ == theirs.__name__
    assert _parameters(ours) == _parameters(theirs)
    if inspect.isclass(ours) and issubclass(ours, nn.Module):
        assert _parameters(ours.forward) == _parameters(theirs.forward)


def check_same(
    ours: Callable[..., Tensor],
    theirs: Callable[..., Tensor],
    inputs: list[Tensor],
    *,
    slack: float | None = None,
    loss_slack: float | None = None,
    dloss: Tensor | None = None,
) -> None:
    """Value and gradients: |ours - truth| <= |theirs - truth| + slack, truth theirs in float64."""
    check_loss(ours, theirs, inputs, slack=slack, loss_slack=loss_slack, dloss=dloss)


def check_same_error(ours: Callable[[], Any], theirs: Callable[[], Any]) -> None:
    """Both raise, and what catches the error of theirs catches that of ours."""
    with pytest.raises(Exception) as of_theirs:  # noqa: PT011
        theirs()
    with pytest.raises(of_theirs.type):
        ours()


def check_state(ours: nn.Module, theirs: nn.Module) -> None:
    """State dicts of the same keys, shapes and dtypes, that load both ways."""
    described = [
        {key: (value.shape, value.dtype) for key, value in module.state_dict().items()}
        for module in (ours, theirs)
    ]
    assert described[0] == described[1]
    ours.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())


def leaves(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Random tensors; every second one correlates with the one before, as views do."""
    made: list[Tensor] = []
    for shape in shapes:
        x = torch.randn(shape, dtype=dtype)
        if made and made[-1].shape == x.shape and len(made) % 2:
            x = made[-1] + 0.5 * x
        made.append(x)
    return made
