# SPDX-License-Identifier: Apache-2.0
"""The op ``sslkernels::ema_update_`` and the plans that make a repeated update cheap.

    target = decay * target + (1 - decay) * source

Two ways lead to the same kernel:

* the op, registered with torch (schema with its mutation declared, fake, no gradient).  It is what
  ``torch.compile``, tensor subclasses and dispatch modes see.  Passing two lists of tensors through
  the dispatcher and checking them costs more than updating a small model.
* ``update``: in plain eager mode the checks are made once and kept as a *plan* of addresses.  Every
  call compares the identity and the address of each tensor with the plan, so that a parameter that
  was moved, loaded by assignment or replaced is noticed, and the plan is made again.

A compiled graph calls the op with tensors that are other objects each time.  Plans of the op are
therefore found by what they depend on: addresses, sizes, dtypes.

**CUDA graphs.**  A graph replays launches with the addresses that they were given, the table of a plan
among them.  So a plan that ran while a stream was capturing is kept until the process ends, whatever
becomes of the tensors (a table has 16 bytes for 4096 elements).  It must have been made before, for its
table is copied to the device: the first update of a list raises an error inside of a capture.  Decay, seed
and step are part of what is captured.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sslkernels._numbers import number, type_name
from sslkernels.backends import devices, updates_torch
from sslkernels.ops import registry
from sslkernels.ops._library import refuse_transforms
from sslkernels.ops.eager import WRITES_LISTS, are_plain, bump_versions, is_plain_eager, watch

FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

_LIBRARY = torch.library.Library("sslkernels", "FRAGMENT")
_LIBRARY.define(
    "ema_update_(Tensor(a!)[] targets, Tensor[] sources, float decay, "
    "bool stochastic_rounding=False, int seed=0, int step=0) -> ()",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def check_decay(op: str, decay: float) -> float:
    """A decay as a float in [0, 1].

    Raises:
        TypeError: If it is no number.
        ValueError: If it is outside [0, 1].
    """
    value = decay
    if type(decay) is not float:
        value = float(decay) if isinstance(decay, Tensor) else number(op, "decay", decay)
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{op}: decay must be in [0, 1], got {value}")
    return value


def check_pairs(op: str, targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Raises TypeError or ValueError unless every source can be averaged into its target."""
    if len(targets) != len(sources):
        raise ValueError(
            f"{op}: targets and sources must have the same length, "
            f"got {len(targets)} and {len(sources)}"
        )
    for index, (target, source) in enumerate(zip(targets, sources, strict=True)):
        if not isinstance(target, Tensor) or not isinstance(source, Tensor):
            raise TypeError(
                f"{op}: targets[{index}] and sources[{index}] must be tensors, "
                f"got {type_name(target)} and {type_name(source)}"
            )
        if target.dtype not in FLOATING or source.dtype not in FLOATING:
            raise TypeError(
                f"{op}: targets[{index}] and sources[{index}] must be float32, float64, bfloat16 "
                f"or float16, got {target.dtype} and {source.dtype} (copy integer tensors instead)"
            )
        if target.shape != source.shape:
            raise ValueError(
                f"{op}: targets[{index}] and sources[{index}] must have the same shape, "
                f"got {list(target.shape)} and {list(source.shape)}"
            )
        if target.device != source.device:
            raise ValueError(
                f"{op}: targets[{index}] and sources[{index}] must be on the same device, "
                f"got {target.device} and {source.device}"
            )


def _is_dense(x: Tensor) -> bool:
    """Whether the elements fill one block of memory without gaps or repetitions, in any order."""
    expected = 1
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size == 1:
            continue
        if stride != expected:
            return False
        expected *= size
    return True


def _has_repeated_elements(x: Tensor) -> bool:
    """Whether indices of a strided tensor may share an address (expanded or overlapping views)."""
    extent = 0
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size == 1:
            continue
        if stride <= extent:
            return True
        extent += stride * (size - 1)
    return False


def _check_overlap(op: str, targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Raises ValueError when an element would be written twice, or read after it was written.

    A source may be its own target, and several sources may share memory.
    """
    spans = []  # first byte, byte behind the last, is it a target, index
    for index, (target, source) in enumerate(zip(targets, sources, strict=True)):
        if target.numel() == 0:
            continue
        begin, end = _span(target)
        if end - begin != target.numel() * target.element_size() and _has_repeated_elements(target):
            raise ValueError(
                f"{op}: targets[{index}] has elements that share memory (an expanded view, strides "
                f"{list(target.stride())}), so it can't be updated in place"
            )
        spans.append((begin, end, True, index))
        read = _span(source)
        itself = read == (begin, end) and source.stride() == target.stride()
        if not itself or source.dtype != target.dtype:
            spans.append((*read, False, index))
    spans.sort()
    end_of_target = end_of_any = 0  # furthest byte seen so far
    last_target = last_any = -1
    for begin, end, is_target, index in spans:
        if begin < end_of_target or (is_target and begin < end_of_any):
            other = last_target if begin < end_of_target else last_any
            raise ValueError(
                f"{op}: memory of targets must not overlap with another target or source, but "
                f"{'targets' if is_target else 'sources'}[{index}] overlaps with entry {other}; "
                "pass tied tensors once"
            )
        if end > end_of_any:
            end_of_any, last_any = end, index
        if is_target and end > end_of_target:
            end_of_target, last_target = end, index


def _span(x: Tensor) -> tuple[int, int]:
    """First address of a tensor and the one behind its last element."""
    begin = x.data_ptr()
    if x.is_contiguous():
        return begin, begin + x.numel() * x.element_size()
    last = sum(stride * (size - 1) for stride, size in zip(x.stride(), x.shape, strict=True))
    return begin, begin + (last + 1) * x.element_size()


def _copies(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> Any:
    """A plan that copies; the extension's where it can copy every pair as bytes."""
    as_bytes = all(
        t.device.type == "cpu" and t.dtype == s.dtype and t.is_contiguous() and s.is_contiguous()
        for t, s in zip(targets, sources, strict=True)
    )
    module = registry.resolve(targets[0].device, "updates") if as_bytes else updates_torch
    return getattr(module, "CopyPlan", updates_torch.CopyPlan)(list(targets), list(sources))


class Update:
    """A checked list of pairs, ready to run: by device and with strided pairs taken care of.

    Args:
        targets: Tensors of floating dtypes; any strides, devices may differ between pairs.
        sources: As many; the shape and device of each are those of its target.
        copy_targets: Tensors of any dtype to be overwritten.
        copy_sources: As many, of the shapes and devices of copy_targets.
        places: Where targets are parts of larger tensors (shards), of which tensor of its device each
            is a part, and where in it the part begins: the random bits are then those of the whole.

    Raises:
        TypeError, ValueError: If a pair can't be averaged.
    """

    def __init__(
        self,
        targets: Sequence[Tensor],
        sources: Sequence[Tensor],
        copy_targets: Sequence[Tensor] = (),
        copy_sources: Sequence[Tensor] = (),
        places: Sequence[tuple[int, int]] | None = None,
    ) -> None:
        """See the class."""
        op = "ema_update_"
        check_pairs(op, targets, sources)
        by_device: dict[torch.device, list[int]] = {}
        for index, target in enumerate(targets):
            by_device.setdefault(target.device, []).append(index)
        self._gpus = [device for device in by_device if device.type == "cuda"]
        # The tensor index that seeds stochastic rounding counts over the pairs of one device.
        self._parts: list[Any] = []
        self._requested = registry.requested()
        self._copied_back: list[tuple[Tensor, Tensor]] = []
        # False: copies were made of strided tensors, which are good for one call.
        self.reusable: bool = True
        self._kept: list[Tensor] = []  # those copies: plans hold addresses only
        for device, indices in by_device.items():
            on_device = [targets[i] for i in indices], [sources[i] for i in indices]
            _check_overlap(op, *on_device)
            pairs = [self._flatten(*pair) for pair in zip(*on_device, strict=True)]
            backend: Any = registry.resolve(device, "updates")
            lists = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
            if getattr(backend.EmaPlan, "COPIES_TABLE", False) and devices.capturing(device):
                raise RuntimeError(
                    f"{op}: this list of tensors is updated for the first time while a CUDA graph is "
                    "being captured, and its table of addresses would have to be copied to "
                    f"{device}; update once before the capture, with tensors that stay where they are"
                )
            if places is None:
                plan = backend.EmaPlan(*lists)
            else:  # the kernels of GPUs know whole tensors only
                backend = backend if device.type == "cpu" else updates_torch
                plan = backend.EmaPlan(*lists, [places[i] for i in indices])
            self._parts.append(plan)
        self._copies = [_copies(copy_targets, copy_sources)] if copy_targets else []

    def _flatten(self, target: Tensor, source: Tensor) -> tuple[Tensor, Tensor]:
        """Contiguous tensors for a pair; memory order where both are dense and laid out alike."""
        target, source = target.detach(), source.detach()
        if target.is_contiguous() and source.is_contiguous():
            return target, source
        if target.stride() == source.stride() and _is_dense(target):
            n = target.numel()
            return target.as_strided((n,), (1,)), source.as_strided((n,), (1,))
        self.reusable = False
        if not target.is_contiguous():
            strided, target = target, target.contiguous()
            self._copied_back.append((strided, target))
        source = source.contiguous()
        self._kept += [target, source]
        return target, source

    @property
    def keepable(self) -> bool:
        """Whether it holds addresses and no tensors, neither copies nor the caller's own."""
        return self.reusable and all(
            getattr(plan, "HOLDS_NO_TENSORS", False) for plan in self._parts
        )

    def serves(self) -> bool:
        """Whether the backend asked for is still the one that this plan was made with."""
        return registry.requested() == self._requested

    def run(self, decay: float, stochastic_rounding: bool, seed: int, step: int) -> None:
        """Update every target in place; version counters are the caller's business."""
        if self._gpus and any(devices.capturing(device) for device in self._gpus):
            _CAPTURED.add(self)
        for plan in self._parts:
            plan.run(decay, stochastic_rounding=stochastic_rounding, seed=seed, step=step)
        for strided, copy in self._copied_back:
            strided.copy_(copy)
        for plan in self._copies:
            plan.run()


def _on_gpu(tensors: Sequence[Tensor]) -> bool:
    """Where a plan costs a copy that the host waits for."""
    return len(tensors) > 0 and tensors[0].device.type == "cuda"


def _places_in_memory(tensors: Sequence[Tensor]) -> tuple[Any, ...]:
    """All that a plan depends on, whichever objects the tensors are."""
    return tuple((x.data_ptr(), x.dtype, x.device, x.shape, x.stride()) for x in tensors)


def _impl(
    targets: list[Tensor],
    sources: list[Tensor],
    decay: float,
    stochastic_rounding: bool = False,
    seed: int = 0,
    step: int = 0,
) -> None:
    decay = check_decay("ema_update_", decay)
    plan, key = None, None
    if _on_gpu(targets) and are_plain(*targets, *sources):
        key = (_places_in_memory(targets), _places_in_memory(sources))
        plan = _OP_PLANS.get(key)
    if plan is None or not plan.serves():
        plan = Update(targets, sources)
        if key is not None and plan.keepable:
            _keep(_OP_PLANS, key, plan)
    plan.run(decay, stochastic_rounding, seed, step)
    bump_versions(targets)


def _fake(
    targets: list[Tensor],
    sources: list[Tensor],
    decay: float,
    stochastic_rounding: bool = False,
    seed: int = 0,
    step: int = 0,
) -> None:
    check_pairs("ema_update_", targets, sources)


_LIBRARY.impl("ema_update_", _impl, "CompositeExplicitAutograd")
_LIBRARY.impl("ema_update_", torch.library.fallthrough_kernel, "Autograd")
torch.library.register_fake("sslkernels::ema_update_", _fake, lib=_LIBRARY)

# Plans of `update`, by the first tensors of the lists, and of the op, by addresses; of the latter those
# only that hold no tensor.
_PLANS: dict[tuple[int, int, int], tuple[Any, Update]] = {}
_OP_PLANS: dict[Any, Update] = {}
_MAX_PLANS = 16
# Plans whose addresses a CUDA graph may replay: see the module.
_CAPTURED: set[Update] = set()


def _keep(plans: dict[Any, Any], key: Any, plan: Any) -> None:
    """Keep a plan in place of the oldest one."""
    plans.pop(key, None)
    while len(plans) >= _MAX_PLANS:
        del plans[next(iter(plans))]
    plans[key] = plan


def call_op(
    targets: list[Tensor],
    sources: list[Tensor],
    decay: float,
    stochastic_rounding: bool,
    seed: int,
    step: int,
) -> None:
    """The op as torch sees it."""
    torch.ops.sslkernels.ema_update_(targets, sources, decay, stochastic_rounding, seed, step)


if not WRITES_LISTS:  # torch.compile then runs it between two graphs
    call_op = torch.compiler.disable(call_op)


def update(
    targets: list[Tensor],
    sources: list[Tensor],
    decay: float,
    stochastic_rounding: bool = False,
    seed: int = 0,
    step: int = 0,
) -> None:
    """Run the update the cheapest way that is right for these tensors."""
    decay = check_decay("ema_update_", decay)
    if is_plain_eager() and targets and sources:
        key = (id(targets[0]), id(sources[0]), len(targets))
        known = _PLANS.get(key)
        if known is not None and known[0].unchanged(targets, sources) and known[1].serves():
            known[1].run(decay, stochastic_rounding, seed, step)
            bump_versions(targets)
            return
        if are_plain(*targets, *sources):
            plan = Update(targets, sources)
            seen = watch([*targets, *sources]) if plan.reusable else None
            if seen is not None:
                _keep(_PLANS, key, (seen, plan))
            with torch.no_grad():
                plan.run(decay, stochastic_rounding, seed, step)
            bump_versions(targets)
            return
    check_pairs("ema_update_", targets, sources)  # the dispatcher's own messages name no argument
    refuse_transforms("ema_update_")
    with torch.no_grad():
        call_op(targets, sources, decay, stochastic_rounding, seed, step)
