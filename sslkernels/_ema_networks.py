# SPDX-License-Identifier: Apache-2.0
"""What an EMA does with networks: copy one, match two by name, and repeat an update cheaply."""

from __future__ import annotations

import copy
import re
import weakref
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sslkernels._sharded import (
    Weights,
    describe,
    is_fsdp1,
    is_fsdp2,
    is_local,
    layout,
    local,
    reshard,
    runs,
    sharded_modules,
)
from sslkernels.ops import ema as _ops
from sslkernels.ops.eager import are_plain, bump_versions, is_plain_eager, watch, watch_slots

if TYPE_CHECKING:
    from sslkernels.ema import EMA


def unwrap(module: nn.Module) -> nn.Module:
    """The network inside torch.compile (``_orig_mod``) and DataParallel (``module``)."""
    within = inside(module)
    return module if within is None else unwrap(within)


def inside(module: nn.Module) -> nn.Module | None:
    wrappers = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    name = "module" if isinstance(module, wrappers) else "_orig_mod"
    return module._modules.get(name)


def _names(named: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Tensors by name, without the segments that wrappers put into names of submodules."""
    return {_WRAPPER.sub("", name): tensor for name, tensor in named}


# torch.compile, FSDP1 and activation checkpointing.
_WRAPPER = re.compile(r"(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")


def copied(online: nn.Module) -> nn.Module:
    """A copy, or a TypeError that says what stands in the way."""
    if any(map(is_fsdp1, online.modules())):
        raise TypeError(
            "EMA: online can't be copied once FullyShardedDataParallel has wrapped it; make the EMA "
            "before, and then wrap ema.module as the network is wrapped"
        )
    if any(map(is_fsdp2, online.modules())):
        reshard(sharded_modules(online))
        return Weights(online)
    try:
        return copy.deepcopy(online)
    except Exception as error:
        path, value, reason = _obstacle(online) or ("itself", online, error)
        if isinstance(value, Tensor):
            what = "a tensor that was computed with gradient"
            advice = (
                "delete it, or set it to None or .detach() it, before the EMA is made; "
                "of torch.nn.utils.weight_norm use torch.nn.utils.parametrizations.weight_norm"
            )
        else:
            what = type(value).__name__
            advice = (
                "set it to None while the EMA is made, or give its owner a __deepcopy__ or "
                "__getstate__ that leaves it out"
            )
        raise TypeError(
            f"EMA: online must be a network that copy.deepcopy can copy, but {path} "
            f"({what}) is in the way ({type(reason).__name__}: {reason}); {advice}"
        ) from error


def _obstacle(online: nn.Module) -> tuple[str, Any, Exception] | None:
    """The first attribute of a submodule that can't be deep-copied: where, what and why not."""
    for name, module in online.named_modules():
        for attribute, value in vars(module).items():
            if attribute == "_modules":
                continue
            entries = {attribute: value}
            if attribute in ("_parameters", "_buffers") or "hooks" in attribute:
                entries = {f"{attribute}[{k!r}]": v for k, v in value.items()} if value else {}
                if attribute in ("_parameters", "_buffers"):
                    entries = dict(value)
            for key, entry in entries.items():
                try:
                    copy.deepcopy(entry)
                except Exception as error:
                    return (f"{name}.{key}" if name else key), entry, error
    return None


class Pairs:
    """The tensors to average and to copy, matched by name; of DTensors their local parts."""

    def __init__(self, op: str, target: nn.Module, online: nn.Module, buffers: str) -> None:
        self.op = op
        self.modules = (target, online)
        self.sharded = sharded_modules(target, online)
        reshard(self.sharded)
        self.spread: list[tuple[Tensor, Tensor]] = []  # DTensors with their local parts
        self.wholes: list[Tensor] = []  # of each target
        self.places: list[tuple[int, int]] | None = None  # see ``cut``
        self.views = False  # complex parameters are averaged through real views
        self.targets: list[Tensor] = []
        self.sources: list[Tensor] = []
        self.copy_targets: list[Tensor] = []
        self.copy_sources: list[Tensor] = []
        self._match("parameters", target.named_parameters(), online.named_parameters(), True)
        if buffers != "ignore":
            average = buffers == "average"
            self._match("buffers", target.named_buffers(), online.named_buffers(), average)

    def _match(
        self,
        kind: str,
        targets: Iterable[tuple[str, Tensor]],
        sources: Iterable[tuple[str, Tensor]],
        average: bool,
    ) -> None:
        by_name, online = _names(targets), _names(sources)
        if by_name.keys() != online.keys():
            missing = sorted(by_name.keys() - online.keys())[:3]
            extra = sorted(online.keys() - by_name.keys())[:3]
            raise ValueError(
                f"{self.op}: the online network must have the {kind} of the averaged one, got "
                f"none named {missing} and unexpected {extra}"
            )
        for name, target in by_name.items():
            source = online[name]
            if (
                target.shape != source.shape
                or target.device != source.device
                or layout(target) != layout(source)
            ):
                raise ValueError(
                    f"{self.op}: {name!r} must have the shape, device and shards of its average, "
                    f"got {describe(source)} and {describe(target)}"
                )
            whole, target, source = target, self._local(target), self._local(source)
            if average and target.is_complex() and source.is_complex():
                target, source = torch.view_as_real(target), torch.view_as_real(source)
                self.views = True
            if average and target.is_floating_point() and source.is_floating_point():
                self.wholes.append(whole)
                self.targets.append(target)
                self.sources.append(source)
            else:
                self.copy_targets.append(target)
                self.copy_sources.append(source)

    def _local(self, x: Tensor) -> Tensor:
        part = local(x)
        if part is not x:
            self.spread.append((x, part))
        return part

    def cut(self) -> None:
        """Cut shards into runs of the whole tensor, so that random bits are those of the whole."""
        if not any(local(whole) is not whole for whole in self.wholes):
            return
        parts: list[tuple[Tensor, Tensor, tuple[int, int]]] = []
        counts: dict[torch.device, int] = {}
        for whole, target, source in zip(self.wholes, self.targets, self.sources, strict=True):
            index = counts.get(target.device, 0)
            counts[target.device] = index + 1
            if target.dtype not in (torch.bfloat16, torch.float16) or local(whole) is whole:
                parts.append((target, source, (index, 0)))
                continue
            if not source.is_contiguous():
                raise ValueError(
                    "EMA: with stochastic_rounding shards must be contiguous, got strides "
                    f"{list(source.stride())}"
                )
            start = 0
            for first, length in runs(whole):
                part = slice(start, start + length)
                start += length
                parts.append((target.view(-1)[part], source.view(-1)[part], (index, first)))
        self.targets, self.sources = [p[0] for p in parts], [p[1] for p in parts]
        self.places = [p[2] for p in parts]

    def run(self, decay: float, stochastic_rounding: bool, seed: int, step: int) -> None:
        """Update through the op, and copy the rest."""
        if self.places is not None:
            update = _ops.Update(self.targets, self.sources, places=self.places)
            update.run(decay, stochastic_rounding, seed, step)
            bump_versions(self.targets)
        elif self.targets:
            _ops.call_op(self.targets, self.sources, decay, stochastic_rounding, seed, step)
        for target, source in zip(self.copy_targets, self.copy_sources, strict=True):
            target.copy_(source)

    def tensors(self) -> list[Tensor]:
        """All whose memory a plan relies on."""
        pairs = [*self.targets, *self.sources, *self.copy_targets, *self.copy_sources]
        return [*pairs, *(part for _, part in self.spread)]

    def plan(self, owner: EMA, online: nn.Module) -> ModulePlan | None:
        """Something that repeats ``run`` cheaply, or None where it can't be."""
        tensors = self.tensors()
        if self.views or not are_plain(*tensors):
            return None
        seen = watch(tensors)
        update = _ops.Update(
            self.targets, self.sources, self.copy_targets, self.copy_sources, self.places
        )
        # Replacing a parameter, a buffer, a submodule or what is wrapped changes one of these
        # dicts.
        dicts = [
            slot
            for root in self.modules
            for module in root.modules()
            for slot in (module._parameters, module._buffers, module._modules)
        ]
        wrapper: nn.Module | None = online
        while wrapper is not None and wrapper is not self.modules[1]:
            dicts.append(wrapper._modules)
            wrapper = inside(wrapper)
        slots = watch_slots([owner._modules, *dicts])
        if seen is None or slots is None or not update.reusable:
            return None
        return ModulePlan(self, owner, online, update, seen, slots)


class ModulePlan:
    """A repeated update of one online network."""

    def __init__(
        self, pairs: Pairs, owner: EMA, online: nn.Module, update: Any, seen: Any, slots: Any
    ) -> None:
        self._update, self._seen, self._slots = update, seen, slots
        self._sharded, self._spread = pairs.sharded, pairs.spread
        self._targets = [*pairs.targets, *pairs.copy_targets]
        self._tensors = pairs.tensors()
        # The plan holds parameters of the online network; it must not outlive the network.
        owner_ref = weakref.ref(owner)

        def forget(_: object) -> None:
            ema = owner_ref()
            if ema is not None:
                ema._plan = None

        self._online = weakref.ref(online, forget)

    def run(
        self, online: nn.Module, decay: float, stochastic_rounding: bool, seed: int, step: int
    ) -> bool:
        """Update and return True, or return False when the plan is out of date."""
        if self._sharded:
            reshard(self._sharded)
        if (
            self._online() is not online
            or not is_plain_eager()
            or (self._spread and not all(is_local(part, x) for x, part in self._spread))
            or not self._slots.unchanged()
            or not self._seen.unchanged(self._tensors, [])
            or not self._update.serves()
        ):
            return False
        self._update.run(decay, stochastic_rounding, seed, step)
        bump_versions(self._targets)
        return True
