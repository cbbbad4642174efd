# SPDX-License-Identifier: Apache-2.0
"""Exponential moving averages of a network, as BYOL, MoCo and DINO use for their target."""

from __future__ import annotations

import copy
import math
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from sslkernels._loading import AllOrNothing
from sslkernels._numbers import type_name
from sslkernels.functional import _checks as checks
from sslkernels.ops import ema as _ops
from sslkernels.ops.eager import are_plain, bump_versions, is_plain_eager, watch, watch_slots

Decay = float | Callable[[int], float]


def ema_update_(
    targets: Iterable[Tensor],
    sources: Iterable[Tensor],
    decay: float,
    *,
    stochastic_rounding: bool = False,
    seed: int = 0,
    step: int = 0,
) -> None:
    """Average a list of tensors into another, in place and in one call.

    For each pair ``target = decay * target + (1 - decay) * source``, evaluated as
    ``fma(decay, target, (1 - decay) * source)`` in float32 (float64 if either side is float64) and
    rounded once to the target's dtype; 1 - decay is computed in double precision.  The result has
    the same bits for any number of threads.  Autograd does not record it; version counters move.

    Rounded to nearest, a 16-bit target stands still as soon as the change is below half the spacing
    of its numbers: bfloat16 at decay 0.999 never moves from 1.0 towards 1.5.  With
    ``stochastic_rounding`` it is rounded up or down with the probability that makes it right on
    average.

    Args:
        targets: Tensors of dtype float32, float64, bfloat16 or float16, any shape, strides and
            device. Their memory must not overlap (pass tied tensors once).
        sources: As many, with the shapes and devices of the targets; dtypes may differ.
        decay: In [0, 1].
        stochastic_rounding: For bfloat16 and float16 targets; others ignore it.
        seed: Key of the random bits (64 bits).
        step: Counter of the random bits: another step gives other bits.

    Raises:
        TypeError: If an entry is no tensor of these dtypes, or an argument no number.
        ValueError: If lengths, shapes or devices differ, memory overlaps, or decay is outside
            [0, 1].

    Example:
        >>> import torch
        >>> from sslkernels import ema_update_
        >>> target, online = torch.zeros(3), torch.ones(3)
        >>> ema_update_([target], [online], decay=0.5)
        >>> target
        tensor([0.5000, 0.5000, 0.5000])
    """
    op = "ema_update_"
    _ops.update(
        _list(op, "targets", targets),
        _list(op, "sources", sources),
        decay,
        checks.flag(op, "stochastic_rounding", stochastic_rounding),
        checks.integer(op, "seed", seed),
        checks.integer(op, "step", step),
    )


def _list(op: str, name: str, values: Iterable[Tensor]) -> list[Tensor]:
    """A list of what should be tensors; one tensor or array alone would be taken apart by rows."""
    if isinstance(values, (Tensor, np.ndarray)):
        raise TypeError(f"{op}: {name} must be a list of tensors, got one {type(values).__name__}")
    return list(values)


def cosine_decay(base: float, total_steps: int, final: float = 1.0) -> Callable[[int], float]:
    """BYOL's schedule of the decay: from base to final along half a cosine.

    ``decay(k) = final - (final - base) * (cos(pi * k / total_steps) + 1) / 2``, which for final = 1
    is equation 4 of Grill et al. 2020 (arXiv:2006.07733):
    ``1 - (1 - base) * (cos(pi k / K) + 1) / 2``.

    Args:
        base: Decay at step 0, in [0, 1]; the paper uses 0.996 for 1000 epochs, 0.99 for 300.
        total_steps: At least 1; later steps keep final.
        final: Decay at the end, in [0, 1].

    Returns:
        A callable step → decay, to hand to ``EMA``.

    Raises:
        TypeError: If an argument is no number, or total_steps no integer.
        ValueError: If an argument is out of range.

    Example:
        >>> from sslkernels import cosine_decay
        >>> schedule = cosine_decay(0.99, total_steps=100)
        >>> schedule(0), schedule(50), schedule(100)
        (0.99, 0.995, 1.0)
    """
    op = "cosine_decay"
    base, final = checks.number(op, "base", base), checks.number(op, "final", final)
    for name, value in (("base", base), ("final", final)):
        if not 0.0 <= value <= 1.0:
            raise ValueError(f"{op}: {name} must be in [0, 1], got {value}")
    return _CosineDecay(base, checks.integer(op, "total_steps", total_steps, 1), final)


class _CosineDecay:
    """See ``cosine_decay``; a class, so that an EMA that holds one can be pickled and copied."""

    def __init__(self, base: float, total_steps: int, final: float) -> None:
        self.base, self.total_steps, self.final = base, total_steps, final

    def __call__(self, step: int) -> float:
        progress = min(max(step, 0), self.total_steps) / self.total_steps
        return self.final - (self.final - self.base) * (math.cos(math.pi * progress) + 1.0) / 2.0

    def __repr__(self) -> str:
        return f"cosine_decay({self.base}, {self.total_steps}, final={self.final})"


def _unwrap(module: nn.Module) -> nn.Module:
    """The network inside torch.compile (``_orig_mod``) and DataParallel (``module``)."""
    inside = _inside(module)
    return module if inside is None else _unwrap(inside)


def _inside(module: nn.Module) -> nn.Module | None:
    wrappers = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    name = "module" if isinstance(module, wrappers) else "_orig_mod"
    return module._modules.get(name)


def _names(named: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Tensors by name, without the segment that torch.compile puts into names of submodules."""
    return {name.replace("_orig_mod.", ""): tensor for name, tensor in named}


def _copied(online: nn.Module) -> nn.Module:
    """A deep copy, or a TypeError that says what stands in the way."""
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


class EMA(AllOrNothing):
    """A copy of a network whose weights are the moving average of the network's.

    ``update`` sets ``target = decay * target + (1 - decay) * online`` for every parameter in one
    call of a fused kernel (see ``ema_update_`` for arithmetic and rounding).  Parameters are
    written in place and never rebound, so optimisers, flat buffers and CUDA graphs that hold them
    stay right.

    Calling the EMA calls the averaged network.  It stays in the mode (train or eval) that the
    online network had; call ``.eval()`` if the target should use running statistics.

    ``state_dict`` holds the averaged network under ``module.``, and ``step`` and ``seed`` as int64
    tensors.

    Args:
        online: The network to follow; it may be wrapped in DistributedDataParallel or
            torch.compile. It is deep-copied; the copy requires no gradient.
        decay: A float in [0, 1], or a callable step → float such as ``cosine_decay(...)``.
        buffers: "copy" copies buffers of the online network, as BatchNorm statistics usually are;
            "average" averages floating buffers and copies the others (an average of the integer
            ``num_batches_tracked`` is meaningless); "ignore" leaves all buffers alone.
        dtype: dtype of the averaged network's floating parameters and buffers, for example
            torch.float32 for a bfloat16 online network.  None keeps those of the online network.
        stochastic_rounding: Round bfloat16 and float16 averages stochastically; without it they
            stand still at usual decays.  Bits depend on the seed and the step only.

    Raises:
        ValueError: If decay or buffers is out of range.
        TypeError: If online is no module or can't be deep-copied (the message names the attribute),
            or dtype is no floating dtype.

    Example:
        >>> import torch
        >>> from sslkernels import EMA
        >>> online = torch.nn.Linear(4, 2)
        >>> ema = EMA(online, decay=0.99)
        >>> with torch.no_grad():  # an optimiser would do this
        ...     _ = online.weight.add_(1.0)
        >>> ema.update(online)
        >>> ema(torch.randn(3, 4)).shape
        torch.Size([3, 2])
    """

    def __init__(
        self,
        online: nn.Module,
        decay: Decay = 0.999,
        *,
        buffers: Literal["copy", "average", "ignore"] = "copy",
        dtype: torch.dtype | None = None,
        stochastic_rounding: bool = False,
    ) -> None:
        """See the class."""
        super().__init__()
        if not isinstance(online, nn.Module):
            raise TypeError(f"EMA: online must be an nn.Module, got {type_name(online)}")
        if buffers not in ("copy", "average", "ignore"):
            raise ValueError(f"EMA: buffers must be 'copy', 'average' or 'ignore', got {buffers!r}")
        if dtype is not None and dtype not in _ops.FLOATING:
            raise TypeError(
                f"EMA: dtype must be float32, float64, bfloat16, float16 or None, got {dtype}"
            )
        self.decay: Decay = decay if callable(decay) else _ops.check_decay("EMA", decay)
        self.buffers_policy = buffers
        self.stochastic_rounding = checks.flag("EMA", "stochastic_rounding", stochastic_rounding)
        self.step = 0
        # Drawn from torch's generator, so that torch.manual_seed decides it.
        self.seed = int(torch.randint(2**62, ()).item()) if stochastic_rounding else 0
        self.module = _copied(_unwrap(online)).requires_grad_(False)
        if dtype is not None:
            self.module.to(dtype=dtype)
        self._plan: _ModulePlan | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the averaged network."""
        return self.module(*args, **kwargs)

    def update(self, online: nn.Module, step: int | None = None) -> None:
        """Move the average towards a network; call it after the optimiser's step.

        Args:
            online: A network with the parameter names and shapes of the one given at construction.
            step: Index of this update, handed to a callable decay.  None counts updates from 0.

        Raises:
            ValueError: If names, shapes or devices of parameters or buffers differ, or the decay is
                outside [0, 1].
        """
        step = self.step if step is None else checks.integer("EMA.update", "step", step)
        decay = _ops.check_decay(
            "EMA.update", self.decay(step) if callable(self.decay) else self.decay
        )
        plan = self._plan
        if plan is None or not plan.run(online, decay, self.stochastic_rounding, self.seed, step):
            self._plan = None
            with torch.no_grad():
                pairs = _Pairs(self.module, _unwrap(online), self.buffers_policy)
                pairs.run(decay, self.stochastic_rounding, self.seed, step)
                if is_plain_eager():
                    self._plan = pairs.plan(self, online)
        self.__dict__["step"] = step + 1  # nn.Module.__setattr__ takes longer than a small update

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in _COUNTERS:
            destination[prefix + name] = torch.tensor(getattr(self, name), dtype=torch.int64)

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Take step and seed; older state dicts have them as an extra state, a dict."""
        rest = dict(state_dict)
        old = rest.pop(prefix + "_extra_state", None)
        found = {}
        for name in _COUNTERS:
            value = rest.pop(prefix + name, None)
            if value is None and isinstance(old, Mapping):
                value = old.get(name)
            if value is not None:
                found[name] = _counter(prefix + name, value)
            elif strict:
                missing_keys.append(prefix + name)
        super()._load_from_state_dict(
            rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if len(found) == len(_COUNTERS):
            self.__dict__.update(found)

    def __getstate__(self) -> dict[str, Any]:
        """Pickles and deep copies leave the cached addresses out."""
        return {**self.__dict__, "_plan": None}

    def extra_repr(self) -> str:
        """Arguments, for ``print``."""
        return (
            f"decay={self.decay}, buffers={self.buffers_policy!r}, "
            f"stochastic_rounding={self.stochastic_rounding}"
        )


# Attributes of an EMA that are entries of its state dict.
_COUNTERS = ("step", "seed")


def _counter(key: str, value: Any) -> int:
    """A step or seed of a state dict."""
    if isinstance(value, Tensor):
        if value.numel() != 1 or value.is_floating_point() or value.is_meta:
            raise TypeError(
                f"EMA.load_state_dict: {key} must be one integer, got {list(value.shape)} "
                f"{value.dtype} on {value.device}"
            )
        value = int(value)
    return checks.integer("EMA.load_state_dict", key, value)


class _Pairs:
    """The tensors to average and to copy, matched by name."""

    def __init__(self, target: nn.Module, online: nn.Module, buffers: str) -> None:
        self.modules = (target, online)
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
                f"EMA.update: the online network must have the {kind} of the averaged one, got "
                f"none named {missing} and unexpected {extra}"
            )
        for name, target in by_name.items():
            source = online[name]
            if target.shape != source.shape or target.device != source.device:
                raise ValueError(
                    f"EMA.update: {name!r} must have the shape and device of its average, got "
                    f"{list(source.shape)} on {source.device} and {list(target.shape)} on "
                    f"{target.device}"
                )
            if average and target.is_complex() and source.is_complex():
                target, source = torch.view_as_real(target), torch.view_as_real(source)
                self.views = True
            if average and target.is_floating_point() and source.is_floating_point():
                self.targets.append(target)
                self.sources.append(source)
            else:
                self.copy_targets.append(target)
                self.copy_sources.append(source)

    def run(self, decay: float, stochastic_rounding: bool, seed: int, step: int) -> None:
        """Update through the op, and copy the rest."""
        if self.targets:
            _ops.call_op(self.targets, self.sources, decay, stochastic_rounding, seed, step)
        for target, source in zip(self.copy_targets, self.copy_sources, strict=True):
            target.copy_(source)

    def plan(self, owner: EMA, online: nn.Module) -> _ModulePlan | None:
        """Something that repeats ``run`` cheaply, or None where it can't be."""
        tensors = [*self.targets, *self.sources, *self.copy_targets, *self.copy_sources]
        if self.views or not are_plain(*tensors):
            return None
        seen = watch(tensors)
        update = _ops.Update(self.targets, self.sources, self.copy_targets, self.copy_sources)
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
            wrapper = _inside(wrapper)
        slots = watch_slots([owner._modules, *dicts])
        if seen is None or slots is None or not update.reusable:
            return None
        return _ModulePlan(self, owner, online, update, seen, slots)


class _ModulePlan:
    """A repeated update of one online network."""

    def __init__(
        self, pairs: _Pairs, owner: EMA, online: nn.Module, update: Any, seen: Any, slots: Any
    ) -> None:
        self._update, self._seen, self._slots = update, seen, slots
        self._targets = [*pairs.targets, *pairs.copy_targets]
        self._tensors = [*pairs.targets, *pairs.sources, *pairs.copy_targets, *pairs.copy_sources]
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
        if (
            self._online() is not online
            or not is_plain_eager()
            or not self._slots.unchanged()
            or not self._seen.unchanged(self._tensors, [])
            or not self._update.serves()
        ):
            return False
        self._update.run(decay, stochastic_rounding, seed, step)
        bump_versions(self._targets)
        return True
