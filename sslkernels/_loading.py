# SPDX-License-Identifier: Apache-2.0
"""State dicts that are loaded entirely or not at all.

``nn.Module.load_state_dict`` copies what fits and raises afterwards, so that a refused checkpoint leaves
half of itself behind.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


class AllOrNothing(nn.Module):
    """A module whose own ``load_state_dict`` changes nothing when it raises.

    As part of a larger module it follows that module's ``load_state_dict``.
    """

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Load everything, or raise and change nothing.

        Where names and shapes do not agree with those of this module, its tensors are copied first.

        Args:
            state_dict: As ``state_dict`` returned it.
            strict: Whether names must be the same on both sides.
            assign: Whether to keep the tensors of state_dict instead of copying from them.

        Returns:
            The missing and the unexpected keys, as torch does.

        Raises:
            RuntimeError, ValueError, TypeError: If it does not fit.
        """
        kept = None if _fits(self, state_dict) else _Copy(self)
        try:
            return super().load_state_dict(state_dict, strict, assign)
        except BaseException:
            if kept is not None:
                kept.restore()
            raise


def _fits(module: nn.Module, state: Mapping[str, Any]) -> bool:
    """Whether loading is nothing but copies between plain tensors of the same shapes."""
    for name, child in module.named_modules():
        own_way = name and not type(child)._load_from_state_dict.__module__.startswith("torch.")
        if own_way or child._load_state_dict_pre_hooks or child._load_state_dict_post_hooks:
            return False
    own = module.state_dict(keep_vars=True)
    return own.keys() == state.keys() and all(
        type(a) in (Tensor, nn.Parameter)
        and type(b) in (Tensor, nn.Parameter)
        and a.shape == b.shape
        and a.is_meta == b.is_meta
        for a, b in ((own[name], state[name]) for name in own)
    )


class _Copy:
    """Everything that loading may change in a module."""

    def __init__(self, module: nn.Module) -> None:
        """See the class."""
        self._dicts: list[tuple[dict[str, Any], dict[str, Any]]] = []
        self._values: dict[int, tuple[Tensor, Tensor]] = {}
        self._extra: list[tuple[nn.Module, Any]] = []
        for child in module.modules():
            for slots in (vars(child), child._parameters, child._buffers):
                self._dicts.append((slots, dict(slots)))
            for x in (*child._parameters.values(), *child._buffers.values()):
                if x is not None and not x.is_meta:
                    self._values[id(x)] = (x, x.detach().clone())
            if type(child).get_extra_state is not nn.Module.get_extra_state:
                self._extra.append((child, child.get_extra_state()))

    @torch.no_grad()
    def restore(self) -> None:
        """Put every object back into its place, and its values into every tensor."""
        for slots, before in self._dicts:
            slots.clear()
            slots.update(before)
        for tensor, value in self._values.values():
            tensor.copy_(value)
        for child, state in self._extra:
            child.set_extra_state(state)
