# SPDX-License-Identifier: Apache-2.0
"""torch-ema's ``ExponentialMovingAverage``, updated by our op; nothing here needs it (tested: 0.3).

What is better than the original (docs/migration/averages.md): a step is one call that allocates
nothing, 16-bit averages are accumulated in float32 and rounded once, tensors of integers are copied.
"""

from __future__ import annotations

import contextlib
import copy
import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from sslkernels.integrations import _glue as glue
from sslkernels.integrations import _ops as ops
from sslkernels.integrations._patching import Peer

__all__ = ["ExponentialMovingAverage"]

_Parameters = Iterable[Tensor] | None


class ExponentialMovingAverage:
    """An average of parameters, which are held by weak references.

    After n updates the decay is min(decay, (1 + n) / (10 + n)), or always ``decay``.

    Args:
        parameters: To be averaged, also those that require no gradient; they are copied.
        decay: In [0, 1].
        use_num_updates: Whether the decay grows with the number of updates.

    Raises:
        ValueError: If decay is outside of [0, 1].
    """

    def __init__(
        self, parameters: Iterable[Tensor], decay: float, use_num_updates: bool = True
    ) -> None:
        self.decay: float = _decay(decay)
        self.num_updates: int | None = 0 if use_num_updates else None
        parameters = list(parameters)
        self.shadow_params: list[Tensor] = [p.detach().clone() for p in parameters]
        self.collected_params: list[Tensor] | None = None
        self._params_refs = [weakref.ref(p) for p in parameters]

    @glue.torch_errors
    def update(self, parameters: _Parameters = None) -> None:
        """Move the averages towards parameters.

        Args:
            parameters: As many as are averaged; None for those of the constructor, as everywhere below.

        Raises:
            ValueError: If their number or shapes are others, or one of the constructor's is gone.
        """
        values = self._get_parameters(parameters)
        decay = self.decay
        if self.num_updates is not None:
            self.num_updates += 1
            decay = min(decay, (1 + self.num_updates) / (10 + self.num_updates))
        ops.average_(self.shadow_params, values, decay)

    def copy_to(self, parameters: _Parameters = None) -> None:
        """Write the averages into parameters."""
        _copy(self.shadow_params, self._get_parameters(parameters))

    def store(self, parameters: _Parameters = None) -> None:
        """Keep a copy of parameters for ``restore``."""
        self.collected_params = [p.detach().clone() for p in self._get_parameters(parameters)]

    def restore(self, parameters: _Parameters = None) -> None:
        """Write what ``store`` kept into parameters.

        Raises:
            RuntimeError: If nothing was stored.
        """
        if self.collected_params is None:
            raise RuntimeError("ExponentialMovingAverage: restore needs a store before it")
        _copy(self.collected_params, self._get_parameters(parameters))

    @contextlib.contextmanager
    def average_parameters(self, parameters: _Parameters = None) -> Iterator[None]:
        """A block in which parameters hold the averages; then they are what they were."""
        held = self._get_parameters(parameters)
        self.store(held)
        self.copy_to(held)
        try:
            yield
        finally:
            self.restore(held)

    def to(self, device: Any = None, dtype: torch.dtype | None = None) -> None:
        """Move the averages and what was stored; integers keep their dtype."""

        def moved(tensors: list[Tensor]) -> list[Tensor]:
            return [t.to(device, dtype if t.is_floating_point() else None) for t in tensors]

        self.shadow_params = moved(self.shadow_params)
        if self.collected_params is not None:
            self.collected_params = moved(self.collected_params)

    def state_dict(self) -> dict[str, Any]:
        """References to the averages, the stored parameters, the decay and the number of updates."""
        names = ("decay", "num_updates", "shadow_params", "collected_params")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a copy of a state, on the devices and in the dtypes of the parameters.

        Raises:
            ValueError: If the state is none of as many parameters.
        """
        state = copy.deepcopy(state_dict)
        decay, updates = _decay(state["decay"]), state["num_updates"]
        if not (updates is None or isinstance(updates, int)):
            raise glue.PeerAssertionError(
                f"ExponentialMovingAverage: num_updates must be an int or None, got {updates!r}"
            )
        shadow, collected = state["shadow_params"], state["collected_params"]
        for name, tensors in (("shadow_params", shadow), ("collected_params", collected)):
            if tensors is None and name == "collected_params":
                continue
            if not (isinstance(tensors, list) and all(isinstance(t, Tensor) for t in tensors)):
                raise glue.PeerAssertionError(
                    f"ExponentialMovingAverage: {name} must be a list of tensors, got {tensors!r}"
                )
        if collected is not None and len(collected) != len(shadow):
            raise glue.PeerAssertionError(
                f"ExponentialMovingAverage: collected_params must be {len(shadow)} tensors "
                f"as shadow_params are, got {len(collected)}"
            )
        if len(shadow) != len(self._params_refs):
            raise ValueError(
                "ExponentialMovingAverage: the state must hold as many parameters as are averaged "
                f"({len(self._params_refs)}), got {len(shadow)}"
            )
        held = [reference() for reference in self._params_refs]
        living = [p for p in held if p is not None]
        if len(living) == len(held):
            shadow = [t.to(p.device, p.dtype) for t, p in zip(shadow, living, strict=True)]
            if collected is not None:
                pairs = zip(collected, living, strict=True)
                collected = [t.to(p.device, p.dtype) for t, p in pairs]
        self.decay, self.num_updates = decay, updates
        self.shadow_params, self.collected_params = shadow, collected

    def _get_parameters(self, parameters: _Parameters) -> list[Tensor]:
        if parameters is None:
            held = [reference() for reference in self._params_refs]
            living: list[Tensor] = [p for p in held if p is not None]
            if len(living) != len(held):
                raise ValueError(
                    "ExponentialMovingAverage: the parameters of the constructor must be alive or "
                    f"others be given, got {len(held) - len(living)} that are gone"
                )
            return living
        given: list[Tensor] = list(parameters)
        if len(given) != len(self.shadow_params):
            raise ValueError(
                "ExponentialMovingAverage: parameters must be as many as are averaged "
                f"({len(self.shadow_params)}), got {len(given)}"
            )
        return given


def _decay(decay: float) -> float:
    if decay < 0.0 or decay > 1.0:
        raise ValueError(f"ExponentialMovingAverage: decay must be in [0, 1], got {decay}")
    return decay


@torch.no_grad()
def _copy(sources: list[Tensor], targets: list[Tensor]) -> None:
    for source, target in zip(sources, targets, strict=True):
        target.data.copy_(source)


PEER = Peer(
    name="torch_ema",
    package="torch_ema",
    distribution="torch-ema",
    tested=("0.3",),
    swaps={"torch_ema.ema.ExponentialMovingAverage": ExponentialMovingAverage},
)
