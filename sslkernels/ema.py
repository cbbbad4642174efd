# SPDX-License-Identifier: Apache-2.0
"""Exponential moving averages of a network, as BYOL, MoCo and DINO use for their target."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from sslkernels._ema_networks import ModulePlan, Pairs, copied, unwrap
from sslkernels._loading import AllOrNothing
from sslkernels._numbers import type_name
from sslkernels._sharded import reshard, sharded_modules
from sslkernels.functional import _checks as checks
from sslkernels.ops import ema as _ops
from sslkernels.ops.eager import is_plain_eager

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
    if stochastic_rounding is not False:  # or nothing depends on them
        stochastic_rounding = checks.flag(op, "stochastic_rounding", stochastic_rounding)
        seed, step = checks.integer(op, "seed", seed, 0), checks.integer(op, "step", step, 0)
    _ops.update(
        _list(op, "targets", targets),
        _list(op, "sources", sources),
        decay,
        stochastic_rounding,
        seed,
        step,
    )


def _list(op: str, name: str, values: Iterable[Tensor]) -> list[Tensor]:
    """A list of what should be tensors; one tensor or array alone would be taken apart by rows."""
    if type(values) is not list and isinstance(values, (Tensor, np.ndarray)):
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


class EMA(AllOrNothing):
    """A copy of a network whose weights are the moving average of the network's.

    ``update`` sets ``target = decay * target + (1 - decay) * online`` for every parameter in one
    call of a fused kernel (see ``ema_update_`` for arithmetic and rounding).  Parameters are
    written in place and never rebound, so optimisers, flat buffers and CUDA graphs that hold them
    stay right.

    Sharded networks are averaged shard by shard, without communication.  With ``fully_shard`` (FSDP2)
    make the EMA first and apply ``fully_shard`` to ``ema.module`` as to the network; made of a network
    that is sharded already, the EMA holds weights only, for ``swapped``.  With
    FullyShardedDataParallel (FSDP1) make the EMA first, then ``ema.module = FSDP(ema.module, ...)`` as
    the network.  Other DTensors (tensor parallelism) need nothing.  State dicts go through
    ``torch.distributed.checkpoint``, and come back on any number of ranks.

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

    # 2: stochastic rounding uses all four words of a counter; an average of version 1 goes on with new bits.
    _version = 2

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
        self.stochastic_rounding: bool = checks.flag(
            "EMA", "stochastic_rounding", stochastic_rounding
        )
        self.step = 0
        # Drawn from torch's generator, so that torch.manual_seed decides it.
        self.seed: int = int(torch.randint(2**62, ()).item()) if stochastic_rounding else 0
        self.module: nn.Module = copied(unwrap(online)).requires_grad_(False)
        if dtype is not None:
            self.module.to(dtype=dtype)
        self._plan: ModulePlan | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the averaged network."""
        return self.module(*args, **kwargs)

    def update(self, online: nn.Module, step: int | None = None) -> None:
        """Move the average towards a network; call it after the optimiser's step.

        Args:
            online: A network with the parameter names and shapes of the one given at construction.
            step: Index of this update, handed to a callable decay.  None counts updates from 0.

        Raises:
            TypeError: If online is no module.
            ValueError: If names, shapes, devices or shards of parameters or buffers differ, or the
                decay is outside [0, 1].
        """
        step = self.step if step is None else checks.integer("EMA.update", "step", step, 0)
        decay = _ops.check_decay(
            "EMA.update", self.decay(step) if callable(self.decay) else self.decay
        )
        plan = self._plan
        if plan is None or not plan.run(online, decay, self.stochastic_rounding, self.seed, step):
            self._plan = None
            with torch.no_grad():
                pairs = self._pairs("EMA.update", online)
                pairs.run(decay, self.stochastic_rounding, self.seed, step)
                if is_plain_eager():
                    self._plan = pairs.plan(self, online)
        self.__dict__["step"] = step + 1  # nn.Module.__setattr__ takes longer than a small update

    def _pairs(self, op: str, online: nn.Module) -> Pairs:
        if not isinstance(online, nn.Module):
            raise TypeError(f"{op}: online must be an nn.Module, got {type_name(online)}")
        pairs = Pairs(op, self.module, unwrap(online), self.buffers_policy)
        if self.stochastic_rounding:
            pairs.cut()
        return pairs

    @contextmanager
    def swapped(self, online: nn.Module) -> Iterator[nn.Module]:
        """Lend a network the averaged weights, for evaluation.

        On leaving it has its own again, to the last bit.  The average stays what it is.  Takes memory
        for one more copy of the network's parameters (of the local shards where it is sharded), and
        does not communicate.  Not for between a forward and its backward pass.

        Args:
            online: The network; parameters and, unless ``buffers="ignore"``, buffers are lent to it,
                in its own dtypes.  What is done to them inside is undone.

        Yields:
            online.

        Raises:
            TypeError: If online is no module.
            ValueError: If names, shapes, devices or shards of parameters or buffers differ.

        Example:
            >>> import torch
            >>> from sslkernels import EMA
            >>> online = torch.nn.Linear(4, 2)
            >>> ema = EMA(online)
            >>> with ema.swapped(online) as averaged:
            ...     averaged(torch.randn(3, 4)).shape
            torch.Size([3, 2])
        """
        pairs = self._pairs("EMA.swapped", online)
        sources = [*pairs.sources, *pairs.copy_sources]
        averages = [*pairs.targets, *pairs.copy_targets]
        own = [x.detach().clone() for x in sources]
        try:
            _copy(sources, averages)
            yield online
        finally:
            # The forward passes inside may have left whole parameters behind.
            reshard(sharded_modules(unwrap(online)))
            _copy(sources, own)

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in _COUNTERS:
            destination[prefix + name] = torch.tensor(
                getattr(self, name), dtype=torch.int64, device="cpu"
            )

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


@torch.no_grad()
def _copy(targets: list[Tensor], sources: list[Tensor]) -> None:
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source)
