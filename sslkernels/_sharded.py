# SPDX-License-Identifier: Apache-2.0
"""What an EMA needs to know of sharded networks: FSDP2 and other DTensors, and FSDP1.

A DTensor is averaged through its local part, which is a plain tensor.  Both kinds of FSDP keep whole
parameters after a forward pass, for the backward pass that usually follows: shards that are written
meanwhile would not be seen by the next forward pass, so they are put away first (``reshard``).
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


def is_dtensor(x: Tensor) -> bool:
    """Whether a tensor is spread over ranks."""
    return hasattr(type(x), "to_local") and hasattr(x, "placements")


@torch.no_grad()
def local(x: Tensor) -> Tensor:
    """The part of a DTensor on this rank, the same object each time; another tensor as it is."""
    if not is_dtensor(x):
        return x
    part: Tensor = x.to_local()  # type: ignore[attr-defined]
    return part


def is_local(part: Tensor, x: Tensor) -> bool:
    """Whether ``part`` still is the local part of a DTensor, told cheaply."""
    return getattr(x, "_local_tensor", None) is part


def runs(x: Tensor) -> list[tuple[int, int]]:
    """Where the local part of a tensor lies in the whole: (first element, elements) of each run.

    Elements are counted as in a contiguous tensor; the runs follow each other in the local part.

    Raises:
        ValueError: If the part is strided, or sharded in another way than by ``Shard``.
    """
    if not is_dtensor(x):
        return [(0, x.numel())]
    utils = sys.modules.get("torch.distributed.tensor._utils")
    if utils is None:  # torch 2.4
        utils = sys.modules["torch.distributed._tensor._utils"]
    part, placements = local(x), x.placements  # type: ignore[attr-defined]
    if not part.is_contiguous() or any(
        type(p).__name__ not in ("Shard", "Replicate") for p in placements
    ):
        raise ValueError(
            "EMA: with stochastic_rounding shards must be contiguous and placed by Shard, got "
            f"strides {list(part.stride())} and {list(placements)}"
        )
    if not part.numel():
        return []
    mesh = x.device_mesh  # type: ignore[attr-defined]
    _, offset = utils.compute_local_shape_and_global_offset(x.shape, mesh, placements)
    cut = [d for d in range(x.ndim) if part.shape[d] != x.shape[d]]
    last = max(cut, default=0)  # what follows this dimension is whole
    length = math.prod(part.shape[last:])
    strides = [math.prod(x.shape[d + 1 :]) for d in range(x.ndim)]
    starts = itertools.product(*(range(n) for n in part.shape[:last]))
    base = sum(o * s for o, s in zip(offset, strides, strict=True))
    return [(base + sum(map(int.__mul__, at, strides)), length) for at in starts]


def layout(x: Tensor) -> tuple[Any, ...]:
    """How a tensor is spread over ranks; equal for tensors whose local parts belong together."""
    return (x.device_mesh, tuple(x.placements)) if is_dtensor(x) else ()  # type: ignore[attr-defined]


def describe(x: Tensor) -> str:
    """Shape and place, for a message."""
    placed = f" sharded {list(x.placements)}" if is_dtensor(x) else ""  # type: ignore[attr-defined]
    return f"{list(x.shape)} on {x.device}{placed}"


def is_fsdp1(module: nn.Module) -> bool:
    """Whether a module is a FullyShardedDataParallel."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # not imported: there is none
    return fsdp is not None and isinstance(module, fsdp.FullyShardedDataParallel)


def is_fsdp2(module: nn.Module) -> bool:
    """Whether ``fully_shard`` was applied to a module."""
    return hasattr(type(module), "set_requires_gradient_sync") and hasattr(type(module), "reshard")


def sharded_modules(*networks: nn.Module) -> list[nn.Module]:
    """The modules of networks that ``reshard`` has to look at."""
    return [m for net in networks for m in net.modules() if is_fsdp2(m) or is_fsdp1(m)]


def reshard(modules: Sequence[nn.Module]) -> None:
    """Make parameters the local shards, and the next forward pass gather them again."""
    for module in modules:
        if is_fsdp2(module):
            module.reshard()  # type: ignore[operator]
            continue
        handle: Any = getattr(module, "_handle", None)
        ready = getattr(module, "_is_root", None) is not None  # False before the first forward pass
        if handle is None or not ready or not handle.uses_sharded_strategy:
            continue
        if not handle.needs_unshard():
            from torch.distributed.fsdp import _runtime_utils

            _runtime_utils._reshard(module, handle, True)


class Weights(nn.Module):
    """Copies of the parameters and buffers of a network under the same names, without its code."""

    def __init__(self, network: nn.Module) -> None:
        """See the class."""
        super().__init__()
        self._copy(network, {})

    def _copy(self, network: nn.Module, seen: dict[int, Any]) -> None:
        for name, parameter in network._parameters.items():
            if parameter is not None and id(parameter) not in seen:  # tied ones stay tied
                copied = nn.Parameter(parameter.detach().clone(), requires_grad=False)
                seen[id(parameter)] = copied
            self.register_parameter(name, None if parameter is None else seen[id(parameter)])
        for name, buffer in network._buffers.items():
            persistent = name not in network._non_persistent_buffers_set
            value = None if buffer is None else buffer.detach().clone()
            self.register_buffer(name, value, persistent=persistent)
        for name, child in network._modules.items():
            if child is None:
                self.add_module(name, None)
                continue
            if id(child) not in seen:
                seen[id(child)] = Weights.__new__(Weights)
                nn.Module.__init__(seen[id(child)])
                seen[id(child)]._copy(child, seen)
            self.add_module(name, seen[id(child)])

    def forward(self, *_: Any, **__: Any) -> Any:
        """There is nothing to call."""
        raise RuntimeError(
            "EMA: the average of a network that was sharded before holds weights only; call the "
            "online network inside `with ema.swapped(online):`, or make the EMA before fully_shard "
            "and apply fully_shard to ema.module as well"
        )
