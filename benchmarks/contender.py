# SPDX-License-Identifier: Apache-2.0
"""What a contender is, and how one is made of a loss function."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from benchmarks.cases import Case

Inputs = dict[str, Any]


class Missing(Exception):
    """A contender can't run here or at this shape; the text says why."""


@dataclass
class Contender:
    """``step`` is what is timed; ``results`` runs it once and returns what ``Case.truth`` does."""

    step: Callable[[], object]
    results: Callable[[], list[Tensor]]
    tolerance: float | None = None  # relative error; None: that of the inputs' dtype
    leaves: list[Tensor] = field(default_factory=list)  # whose .grad a step leaves behind
    forward: Callable[[], object] | None = None  # the first part of a step, where a step has two


Factory = Callable[[Case, Inputs], Contender]


def import_module(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise Missing(f"import {module}: {error}") from None


def load_lightly(module: str) -> Any:
    """A module of lightly, also where torchvision is not installed.

    lightly's packages import torchvision for other models and losses.  Without it the file of the
    wanted module is executed as it is, around the ``__init__`` files of its packages; of
    ``lightly.models.utils`` it needs only a gather across processes, which a benchmark in one
    process never calls.
    """
    if importlib.util.find_spec("torchvision") is not None or "lightly" in sys.modules:
        return import_module(module)
    spec = importlib.util.find_spec("lightly")
    if spec is None or not spec.submodule_search_locations:
        raise Missing("import lightly: it is not installed")
    root = Path(next(iter(spec.submodule_search_locations)))
    for name in ("lightly", "lightly.loss", "lightly.models", "lightly.models.modules"):
        package = types.ModuleType(name)
        package.__path__ = [str(root.joinpath(*name.split(".")[1:]))]
        sys.modules.setdefault(name, package)
    utils = types.ModuleType("lightly.models.utils")
    sys.modules.setdefault(utils.__name__, utils)
    sys.modules["lightly.models"].__dict__["utils"] = sys.modules[utils.__name__]
    return import_module(module)


def loss_contender(
    x: Inputs, call: Callable[..., Tensor], tolerance: float | None = None
) -> Contender:
    leaves: list[Tensor] = x["leaves"]

    def step() -> Tensor:
        for leaf in leaves:
            leaf.grad = None
        loss = call(*leaves)
        loss.backward()
        return loss

    def results() -> list[Tensor]:
        loss = step().detach().clone()
        return [loss, *(leaf.grad.clone() for leaf in leaves if leaf.grad is not None)]

    return Contender(step, results, tolerance, leaves, lambda: call(*leaves))
