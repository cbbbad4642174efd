# SPDX-License-Identifier: Apache-2.0
"""EMA and queue updates on the CPU: addresses and sizes handed to the C++ extension."""

from __future__ import annotations

import torch
from torch import Tensor

from sslkernels import _C

# csrc/bindings.h: Names<DType>
DTYPES = {
    torch.float32: "float32",
    torch.float64: "float64",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
}


class EmaPlan:
    """target = decay * target + (1 - decay) * source over contiguous pairs of tensors, in one call.

    It holds addresses, not tensors: the caller keeps the tensors alive and makes a new plan when
    one of them moves.

    Args:
        targets: Contiguous CPU tensors of a floating dtype, not overlapping.
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
        self._plan = _C.EmaPlan(
            targets=[x.data_ptr() for x in targets],
            sources=[x.data_ptr() for x in sources],
            sizes=[x.numel() for x in targets],
            target_dtypes=[DTYPES[x.dtype] for x in targets],
            source_dtypes=[DTYPES[x.dtype] for x in sources],
            indices=[index for index, _ in places or ()],
            firsts=[first for _, first in places or ()],
        )

    def run(
        self, decay: float, *, stochastic_rounding: bool = False, seed: int = 0, step: int = 0
    ) -> None:
        """Update every target in place."""
        self._plan.run(
            decay=decay,
            stochastic_rounding=stochastic_rounding,
            seed=seed,
            step=step,
            n_threads=torch.get_num_threads(),
        )


class CopyPlan:
    """target = source over contiguous pairs of the same dtype, any dtype, in one call.

    Args:
        targets: Contiguous CPU tensors, not overlapping.
        sources: As many, of the same sizes and dtypes.
    """

    def __init__(self, targets: list[Tensor], sources: list[Tensor]) -> None:
        """See the class."""
        self._plan = _C.CopyPlan(
            targets=[x.data_ptr() for x in targets],
            sources=[x.data_ptr() for x in sources],
            bytes=[x.numel() * x.element_size() for x in targets],
        )

    def run(self) -> None:
        """Copy every source."""
        self._plan.run()


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
        queue=queue.data_ptr(),
        queue_dtype=DTYPES[queue.dtype],
        size=size,
        dim=dim,
        ptr=queue_ptr.data_ptr(),
        fill=fill.data_ptr(),
        keys=keys.data_ptr(),
        keys_dtype=DTYPES[keys.dtype],
        n=keys.shape[0],
        keys_stride=keys.stride(0),
        normalize=normalize,
        queue_labels=None if queue_labels is None else queue_labels.data_ptr(),
        labels=None if labels is None else labels.data_ptr(),
        n_threads=torch.get_num_threads(),
    )
