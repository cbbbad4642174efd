# SPDX-License-Identifier: Apache-2.0
"""EMA and queue updates in plain torch: what runs on a device that has no kernel for them.

The formulas and roundings are those of ``csrc/cpu/ema.cpp`` and ``csrc/cpu/queue.cpp``, except that
a fused multiply-add may be rounded twice here (one unit in the last place).
"""

from __future__ import annotations

import torch
from torch import Tensor

from sslkernels.backends.rounding import philox_words, round_stochastic

# Elements handled at a time, so that the temporaries stay at a few MB whatever the model's size.
_BLOCK = 1 << 20


class EmaPlan:
    """target = decay * target + (1 - decay) * source over contiguous pairs of tensors.

    Args:
        targets: Contiguous tensors of a floating dtype, on one device.
        sources: As many, of the same sizes; dtypes may differ.
        places: For the random bits, of which tensor each target is a part, and where in it the part
            begins; None: they are tensors 0, 1, 2, ..., all from their beginning.
    """

    def __init__(
        self,
        targets: list[Tensor],
        sources: list[Tensor],
        places: list[tuple[int, int]] | None = None,
    ) -> None:
        """See the class."""
        places = [(index, 0) for index in range(len(targets))] if places is None else places
        self._pairs = [
            (place, target.detach().view(-1), source.detach().view(-1))
            for place, target, source in zip(places, targets, sources, strict=True)
        ]

    def run(
        self, decay: float, *, stochastic_rounding: bool = False, seed: int = 0, step: int = 0
    ) -> None:
        """Update every target in place."""
        for (index, first), target, source in self._pairs:
            stochastic = stochastic_rounding and target.dtype in (torch.bfloat16, torch.float16)
            words = None
            if stochastic:
                words = philox_words(target.numel(), seed, step, index, target.device, first)
            for begin in range(0, target.numel(), _BLOCK):
                part = slice(begin, begin + _BLOCK)
                mixed = _mix(target[part], source[part], decay)
                if words is not None:
                    mixed = round_stochastic(mixed.to(torch.float32), words[part], target.dtype)
                target[part].copy_(mixed)


class CopyPlan:
    """target = source over pairs of tensors of any dtype.

    Args:
        targets: Tensors on one device, not overlapping.
        sources: As many, of the same shapes.
    """

    def __init__(self, targets: list[Tensor], sources: list[Tensor]) -> None:
        """See the class."""
        self._targets = [x.detach() for x in targets]
        self._sources = [x.detach() for x in sources]

    def run(self) -> None:
        """Copy every source."""
        torch._foreach_copy_(self._targets, self._sources)


def _mix(target: Tensor, source: Tensor, decay: float) -> Tensor:
    """decay * target + (1 - decay) * source in float32, or in float64 if either side is float64."""
    wide = torch.float64 in (target.dtype, source.dtype)
    acc = torch.float64 if wide else torch.float32
    return (source.to(acc) * (1.0 - decay)).add_(target.to(acc), alpha=decay)


def enqueue_(
    queue: Tensor,  # [K, D]
    queue_ptr: Tensor,  # [1] int64
    fill: Tensor,  # [1] int64
    keys: Tensor,  # [N, D]
    normalize: bool,
    queue_labels: Tensor | None,  # [K] int64
    labels: Tensor | None,  # [N] int64
) -> None:
    """Write keys behind the pointer, wrap, and advance; no host sync.

    The contract is that of ``sslkernels.ops.queue``, which has checked the arguments.
    """
    size, n_keys = queue.shape[0], keys.shape[0]
    skipped = max(n_keys - size, 0)  # only the newest `size` keys would survive
    kept = keys[skipped:]
    if normalize:
        wide = torch.float64 in (keys.dtype, queue.dtype)
        kept = torch.nn.functional.normalize(
            kept.to(torch.float64 if wide else torch.float32), dim=1, eps=1e-12
        )
    offsets = torch.arange(skipped, n_keys, device=queue.device)
    # Reduced first: a pointer of a damaged state, of any 64 bits, may not overflow.
    rows = (queue_ptr.remainder(size) + offsets).remainder_(size)
    queue.index_copy_(0, rows, kept.to(queue.dtype))
    if queue_labels is not None and labels is not None:
        queue_labels.index_copy_(0, rows, labels[skipped:])
    queue_ptr.remainder_(size).add_(n_keys).remainder_(size)
    fill.clamp_(min=0, max=size).add_(n_keys).clamp_(max=size)
