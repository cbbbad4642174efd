# SPDX-License-Identifier: Apache-2.0
"""EMA and queue updates on the CPU: addresses and sizes handed to the C++ extension."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from sslkernels import _C

# csrc/sslkernels.h: enum class DType
_DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}


class EmaPlan:
    """target = decay * target + (1 - decay) * source over contiguous pairs of tensors, in one call.

    It holds addresses, not tensors: the caller keeps the tensors alive and makes a new plan when
    one of them moves.

    Args:
        targets: Contiguous CPU tensors of a floating dtype, not overlapping.
        sources: As many, of the same sizes; dtypes may differ.
    """

    def __init__(self, targets: list[Tensor], sources: list[Tensor]) -> None:
        """See the class."""
        self._plan = _C.EmaPlan(
            _table(
                [
                    (t.data_ptr(), s.data_ptr(), t.numel(), _DTYPES[t.dtype], _DTYPES[s.dtype])
                    for t, s in zip(targets, sources, strict=True)
                ],
                columns=5,
            )
        )

    def run(
        self, decay: float, *, stochastic_rounding: bool = False, seed: int = 0, step: int = 0
    ) -> None:
        """Update every target in place."""
        self._plan.run(decay, stochastic_rounding, seed, step, torch.get_num_threads())


class CopyPlan:
    """target = source over contiguous pairs of the same dtype, any dtype, in one call.

    Args:
        targets: Contiguous CPU tensors, not overlapping.
        sources: As many, of the same sizes and dtypes.
    """

    def __init__(self, targets: list[Tensor], sources: list[Tensor]) -> None:
        """See the class."""
        self._table = _table(
            [
                (t.data_ptr(), s.data_ptr(), t.numel() * t.element_size())
                for t, s in zip(targets, sources, strict=True)
            ],
            columns=3,
        )

    def run(self) -> None:
        """Copy every source."""
        _C.copy_all(self._table)


def _table(rows: list[tuple[int, ...]], columns: int) -> np.ndarray:
    return np.array(rows, dtype=np.int64).reshape(len(rows), columns)


def enqueue_(
    queue: Tensor,  # [K, D]
    queue_ptr: Tensor,  # [1] int64
    fill: Tensor,  # [1] int64
    keys: Tensor,  # [N, D]
    normalize: bool,
    queue_labels: Tensor | None,  # [K] int64
    labels: Tensor | None,  # [N] int64
) -> None:
    """Normalise, cast, write behind the pointer with wrap-around, and advance: one call.

    The contract is that of ``sslkernels.ops.queue``, which has checked the arguments.
    """
    if keys.stride(1) != 1:
        keys = keys.contiguous()
    if labels is not None:
        labels = labels.contiguous()
    size, dim = queue.shape
    _C.enqueue(
        queue.data_ptr(),
        _DTYPES[queue.dtype],
        size,
        dim,
        queue_ptr.data_ptr(),
        fill.data_ptr(),
        keys.data_ptr(),
        _DTYPES[keys.dtype],
        keys.shape[0],
        keys.stride(0),
        normalize,
        0 if queue_labels is None else queue_labels.data_ptr(),
        0 if labels is None else labels.data_ptr(),
        torch.get_num_threads(),
    )
