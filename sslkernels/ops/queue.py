# SPDX-License-Identifier: Apache-2.0
"""The op ``sslkernels::queue_enqueue_``: normalise, cast, write, wrap, advance, in one call.

Key i of the batch goes to row (ptr + i) mod K; of a batch larger than the queue only the newest K
are written.  Then ptr = (ptr + N) mod K and fill = min(fill + N, K).  The pointer is read and
written where it lives, on the device.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sslkernels.backends import devices
from sslkernels.ops import registry
from sslkernels.ops._library import refuse_transforms
from sslkernels.ops.eager import are_plain, bump_versions, is_plain_eager, watch

_FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

_LIBRARY = torch.library.Library("sslkernels", "FRAGMENT")
_LIBRARY.define(
    "queue_enqueue_(Tensor(a!) queue, Tensor(b!) queue_ptr, Tensor(c!) fill, Tensor keys, "
    "bool normalize, Tensor(d!)? queue_labels=None, Tensor? labels=None) -> ()",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _check(
    queue: Tensor,
    queue_ptr: Tensor,
    fill: Tensor,
    keys: Tensor,
    queue_labels: Tensor | None,
    labels: Tensor | None,
) -> None:
    """Raises TypeError or ValueError unless the keys fit into the queue."""
    op = "enqueue"
    if not isinstance(keys, Tensor):
        raise TypeError(f"{op}: keys must be a tensor, got {type(keys).__name__}")
    if queue.dim() != 2 or not queue.is_contiguous() or queue.shape[0] == 0:
        raise ValueError(
            f"{op}: queue must be a contiguous [K, D] tensor with K > 0, got {list(queue.shape)} "
            f"with strides {list(queue.stride())}"
        )
    if keys.dim() != 2 or keys.shape[1] != queue.shape[1]:
        raise ValueError(
            f"{op}: keys must have shape [N, {queue.shape[1]}], got {list(keys.shape)}"
        )
    if keys.dtype not in _FLOATING or queue.dtype not in _FLOATING:
        raise TypeError(
            f"{op}: keys and queue must be float32, float64, bfloat16 or float16, "
            f"got {keys.dtype} and {queue.dtype}"
        )
    if keys.device != queue.device:
        raise ValueError(
            f"{op}: keys must be on the device of the queue, got {keys.device} and {queue.device}"
        )
    for name, counter in (("queue_ptr", queue_ptr), ("fill", fill)):
        if counter.numel() != 1 or counter.dtype != torch.int64 or counter.device != queue.device:
            raise ValueError(
                f"{op}: {name} must be one int64 number on {queue.device}, got "
                f"{list(counter.shape)} {counter.dtype} on {counter.device}"
            )
    if (queue_labels is None) != (labels is None):
        raise ValueError(
            f"{op}: labels must be given if and only if the queue holds labels, got "
            f"{'none' if labels is None else 'labels'} for a queue "
            f"{'without' if queue_labels is None else 'with'} labels"
        )
    if labels is not None and queue_labels is not None:
        if labels.shape != keys.shape[:1] or labels.dtype.is_floating_point or labels.is_complex():
            raise ValueError(
                f"{op}: labels must be integers of shape [{keys.shape[0]}], "
                f"got {list(labels.shape)} {labels.dtype}"
            )
        if labels.device != queue.device:
            raise ValueError(
                f"{op}: labels must be on the device of the queue, got {labels.device} and "
                f"{queue.device}"
            )
        if (
            queue_labels.shape != queue.shape[:1]
            or queue_labels.dtype != torch.int64
            or not queue_labels.is_contiguous()
        ):
            raise ValueError(
                f"{op}: queue_labels must be contiguous int64 of shape [{queue.shape[0]}], "
                f"got {list(queue_labels.shape)} {queue_labels.dtype}"
            )


def _impl(
    queue: Tensor,
    queue_ptr: Tensor,
    fill: Tensor,
    keys: Tensor,
    normalize: bool,
    queue_labels: Tensor | None = None,
    labels: Tensor | None = None,
) -> None:
    _check(queue, queue_ptr, fill, keys, queue_labels, labels)
    if keys.shape[0] == 0:
        return
    if queue.device.type != "meta" and _same_storage(keys, queue):
        keys = keys.clone()  # keys read from the queue itself must not change while it is written
    if labels is not None and labels.dtype != torch.int64:
        labels = labels.to(torch.int64)
    backend = registry.resolve(queue.device, "updates")
    backend.enqueue_(queue, queue_ptr, fill, keys, normalize, queue_labels, labels)
    bump_versions([x for x in (queue, queue_ptr, fill, queue_labels) if x is not None])


def _fake(
    queue: Tensor,
    queue_ptr: Tensor,
    fill: Tensor,
    keys: Tensor,
    normalize: bool,
    queue_labels: Tensor | None = None,
    labels: Tensor | None = None,
) -> None:
    _check(queue, queue_ptr, fill, keys, queue_labels, labels)


_LIBRARY.impl("queue_enqueue_", _impl, "CompositeExplicitAutograd")
_LIBRARY.impl("queue_enqueue_", torch.library.fallthrough_kernel, "Autograd")
torch.library.register_fake("sslkernels::queue_enqueue_", _fake, lib=_LIBRARY)


def enqueue_(
    queue: Tensor,
    queue_ptr: Tensor,
    fill: Tensor,
    keys: Tensor,
    normalize: bool,
    queue_labels: Tensor | None = None,
    labels: Tensor | None = None,
) -> None:
    """Enqueue, without the dispatcher where nothing needs it.

    Args:
        queue: [K, D] contiguous, float32, float64, bfloat16 or float16; written.
        queue_ptr: One int64 number, the row to write next; written.
        fill: One int64 number, how many rows are valid; written.
        keys: [N, D], any floating dtype and strides, on the device of the queue.
        normalize: Write x / max(||x||, 1e-12), with float32 (float64) accumulation.
        queue_labels: [K] int64, or None; written.
        labels: [N] integers, given if and only if queue_labels is.

    Raises:
        TypeError, ValueError: If an argument does not fit; nothing is written then.
    """
    arguments = (queue, queue_ptr, fill, keys, normalize, queue_labels, labels)
    if is_plain_eager() and are_plain(queue, keys):
        _impl(*arguments)
    else:
        if not isinstance(keys, Tensor):  # the dispatcher's own message lists all arguments
            raise TypeError(f"enqueue: keys must be a tensor, got {type(keys).__name__}")
        refuse_transforms("enqueue")
        torch.ops.sslkernels.queue_enqueue_(*arguments)


class EnqueuePlan:
    """A repeated enqueue into one queue without labels on the CPU, its state checked once.

    Args:
        queue: As for ``enqueue_``.
        queue_ptr: As for ``enqueue_``.
        fill: As for ``enqueue_``.
    """

    def __init__(self, queue: Tensor, queue_ptr: Tensor, fill: Tensor) -> None:
        """See the class."""
        self._state = [queue, queue_ptr, fill]
        self._requested = registry.requested()
        self._seen: Any = None  # None: the plan is of no use here
        backend = registry.resolve(queue.device, "updates")
        if backend.__name__ == "sslkernels.backends.cpu" and are_plain(*self._state):
            _check(queue, queue_ptr, fill, queue[:0], None, None)
            self._write = backend.enqueue_
            self._dim = queue.shape[1]
            self._seen = watch(self._state)

    def run(self, keys: Tensor, normalize: bool) -> bool:
        """Enqueue and return True; or do nothing and return False: ``enqueue_`` looks closer."""
        if (
            self._seen is None
            or not is_plain_eager()
            or not are_plain(keys)
            or keys.dim() != 2
            or keys.shape[1] != self._dim
            or keys.shape[0] == 0
            or keys.dtype not in _FLOATING
            or not keys.is_cpu
            or registry.requested() != self._requested
            or not self._seen.unchanged(self._state, [])
            or _same_storage(keys, self._state[0])
        ):
            return False
        self._write(*self._state, keys, normalize, None, None)
        bump_versions(self._state)
        return True


def capturing(queue: Tensor) -> bool:
    """Whether what is done to a queue now is recorded in a CUDA graph, and not done."""
    return devices.capturing(queue.device)


def _same_storage(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
