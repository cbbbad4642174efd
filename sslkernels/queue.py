# SPDX-License-Identifier: Apache-2.0
"""The queue of keys that MoCo contrasts with."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sslkernels import _ranks
from sslkernels._loading import AllOrNothing
from sslkernels._numbers import type_name
from sslkernels.functional import _checks as checks
from sslkernels.ops import queue as _ops


class KeyQueue(AllOrNothing):
    """A first-in first-out queue of the newest ``size`` keys, as in MoCo (arXiv:1911.05722).

    All state is in buffers and so in the state dict: ``queue`` [size, dim], ``queue_ptr`` (the row
    that is written next) and ``fill`` (how many rows are valid), both int64, and ``labels`` [size]
    int64 if asked for (-1 where empty).  They are loaded together or, where one does not fit or is
    missing, not at all.  Key i of a batch goes to row (queue_ptr + i) mod size;
    sizes need not divide, and of a batch larger than the queue the newest ``size`` keys stay.

    The loss for a batch must be computed before the batch is enqueued, or each positive is one of
    its own negatives; ``MoCoLoss`` does both in that order.

    An enqueue may be captured in a CUDA graph: the pointer lives on the device, so every replay goes on
    where the one before ended.  From then on ``len`` and ``keys`` ask the device how many rows are valid
    (a synchronisation) until the queue is full, which a replay does not change.  The shape of ``keys`` is
    part of what a graph captures, so reading them during a capture is an error until the queue is full.

    Args:
        size: K, how many keys are held.
        dim: D, their dimension.
        dtype: dtype of the stored keys: float32, float64, bfloat16 or float16.
        normalize: Store x / max(||x||, 1e-12), accumulated in float32 (float64 for float64 keys or
            queue) and cast afterwards.  With False keys are stored as they are given.
        gather: Under torch.distributed, enqueue the keys of every rank in the order of ranks, so
            that all ranks hold the same queue, which ``digest`` tells.  Ranks may pass different
            numbers of keys, also none.  A step is one collective; the first, and one whose largest
            batch is larger than all before, is two.  The numbers of keys are read on the host.
        labels: Keep an integer label (class or sample id) with each key.

    Raises:
        ValueError: If size or dim is below 1.
        TypeError: If size or dim is no integer or dtype no floating dtype of the list.

    Example:
        >>> import torch
        >>> from sslkernels import KeyQueue
        >>> queue = KeyQueue(size=5, dim=2)
        >>> queue.enqueue(torch.randn(3, 2))
        >>> len(queue), queue.keys.shape
        (3, torch.Size([3, 2]))
        >>> queue.enqueue(torch.randn(4, 2))
        >>> len(queue), int(queue.queue_ptr)
        (5, 2)
    """

    queue: Tensor
    queue_ptr: Tensor
    fill: Tensor
    labels: Tensor | None

    def __init__(
        self,
        size: int,
        dim: int,
        *,
        dtype: torch.dtype = torch.float32,
        normalize: bool = True,
        gather: bool = False,
        labels: bool = False,
    ) -> None:
        """See the class."""
        super().__init__()
        size = checks.integer("KeyQueue", "size", size, 1)
        dim = checks.integer("KeyQueue", "dim", dim, 1)
        if dtype not in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
            raise TypeError(
                f"KeyQueue: dtype must be float32, float64, bfloat16 or float16, got {dtype}"
            )
        self.size: int = size
        self.dim: int = dim
        self.normalize: bool = checks.flag("KeyQueue", "normalize", normalize)
        self.gather: bool = checks.flag("KeyQueue", "gather", gather)
        labels = checks.flag("KeyQueue", "labels", labels)
        self.register_buffer("queue", torch.zeros(size, dim, dtype=dtype))
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.int64))
        self.register_buffer("fill", torch.zeros(1, dtype=torch.int64))
        self.register_buffer(
            "labels", torch.full((size,), -1, dtype=torch.int64) if labels else None
        )
        # Copy of `fill` on the host, so that len() and keys need no synchronisation with a device.
        # It counts as long as the tensor and its version are those that were seen.
        self._n_valid = 0
        self._fill_seen: tuple[Tensor, int] = (self.fill, self.fill._version)
        # Whether a CUDA graph holds an enqueue: replays change the tensors and tell nobody.
        self._replays: bool = False
        self._plan: _ops.EnqueuePlan | None = None
        self._gather_rows = _ranks.PackedGather()

    def enqueue(self, keys: Tensor, labels: Tensor | None = None) -> None:
        """Normalise, cast and write a batch of keys; one call, without gradient or host sync.

        A NaN or inf in a key makes that row NaN, and every loss computed with the queue NaN until
        the row is overwritten: check keys first if the encoder may diverge.  A zero row stays zero.

        Args:
            keys: [N, dim], any floating dtype and strides, N >= 0, on the device of the queue.
            labels: [N] integers; required if the queue was made with ``labels=True``.

        Raises:
            TypeError, ValueError: If shapes, dtypes or devices do not fit; nothing is written then.
                With ``gather`` ranks that differ in D or dtype raise everywhere.
        """
        checks.check_tensor("enqueue", "keys", keys)
        if labels is not None:
            checks.check_tensor("enqueue", "labels", labels)
        if self.gather and dist.is_available() and dist.is_initialized():
            keys, labels = self._of_all_ranks(keys, labels)
        before = len(self)
        if labels is not None or self._plan is None or not self._plan.run(keys, self.normalize):
            self._enqueue(keys, labels)
        if not torch.compiler.is_compiling() and _ops.capturing(self.queue):
            self.__dict__["_replays"] = True
            self._remember(before)  # nothing has been written yet
        else:
            self._remember(min(before + keys.shape[0], self.size))

    @torch.no_grad()
    def _of_all_ranks(self, keys: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor | None]:
        checks.check_matrix("enqueue", "keys", keys)
        if labels is not None:
            labels = checks.check_ids("enqueue", "labels", labels, (len(keys),), keys.device)
        return self._gather_rows("enqueue", _ranks.connect("enqueue", True), keys, labels)

    @torch.no_grad()
    def _enqueue(self, keys: Tensor, labels: Tensor | None) -> None:
        """Check everything, enqueue, and plan the next one."""
        queue_labels = self.labels
        _ops.enqueue_(
            self.queue, self.queue_ptr, self.fill, keys, self.normalize, queue_labels, labels
        )
        if queue_labels is None and not torch.compiler.is_compiling():
            self.__dict__["_plan"] = _ops.EnqueuePlan(self.queue, self.queue_ptr, self.fill)

    @property
    def keys(self) -> Tensor:
        """[len(queue), dim]: the valid rows, a view of ``queue`` (in order of rows, not of age).

        The view changes when keys are enqueued; clone it to keep it.

        Raises:
            RuntimeError: If a CUDA graph is being captured and the queue is not full.
        """
        return self.queue[: self._shape_of_keys()]

    @property
    def key_labels(self) -> Tensor:
        """[len(queue)] int64: the labels of ``keys``.

        Raises:
            RuntimeError: If the queue was made without labels; as for ``keys``.
        """
        if self.labels is None:
            raise RuntimeError("KeyQueue: this queue holds no labels; make it with labels=True")
        return self.labels[: self._shape_of_keys()]

    def _shape_of_keys(self) -> int:
        count = len(self)
        if count < self.size and not torch.compiler.is_compiling() and _ops.capturing(self.queue):
            raise RuntimeError(
                "KeyQueue: the number of keys is part of what a CUDA graph captures and would stay "
                f"{count} in every replay; fill the queue before the capture (its size is {self.size})"
            )
        return count

    def __len__(self) -> int:
        """How many rows are valid."""
        if not torch.compiler.is_compiling():
            fill = self._buffers["fill"]
            seen, version = self._fill_seen
            if fill is None:
                raise RuntimeError("KeyQueue: the buffer 'fill' was removed")
            if seen is not fill or version != fill._version:  # moved, loaded or written by others
                self._remember(min(max(int(fill), 0), self.size))
            elif self._replays and self._n_valid < self.size and not _ops.capturing(self.queue):
                self._remember(min(max(int(fill), 0), self.size))
        return self._n_valid

    def __bool__(self) -> bool:
        """A module is true, also when it is empty."""
        return True

    def _remember(self, n_valid: int) -> None:
        if torch.compiler.is_compiling():
            self._n_valid = n_valid
            return
        # Around nn.Module.__setattr__, whose checks take longer than the enqueue.
        fill = self.fill
        self.__dict__["_n_valid"] = n_valid
        self.__dict__["_fill_seen"] = (fill, fill._version)

    def digest(self) -> str:
        """SHA-256 of the state, in hexadecimal: equal for queues that are equal to the last bit.

        The state goes to the host.  With ``gather`` all ranks have the same; compare them, say, with
        ``torch.distributed.all_gather_object``.
        """
        found = hashlib.sha256()
        for name, buffer in self.named_buffers():
            found.update(f"{name} {buffer.dtype} {list(buffer.shape)}".encode())
            found.update(buffer.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return found.hexdigest()

    @torch.no_grad()
    def reset(self) -> None:
        """Empty the queue."""
        self.queue.zero_()
        self.queue_ptr.zero_()
        self.fill.zero_()
        if self.labels is not None:
            self.labels.fill_(-1)

    def __getstate__(self) -> dict[str, Any]:
        """Pickles and deep copies leave the cached addresses out."""
        return {**self.__dict__, "_plan": None}

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
        """Load all entries, or report why not and load none.

        Raises:
            ValueError: If the pointer or the fill lies outside of the queue.
        """
        names = [name for name, buffer in self._buffers.items() if buffer is not None]
        given = {name: state_dict[prefix + name] for name in names if prefix + name in state_dict}
        errors = [
            f"KeyQueue.load_state_dict: {prefix + name} {error}."
            for name, value in given.items()
            if (error := self._misfit(name, value)) is not None
        ]
        missing = [prefix + name for name in names if name not in given]
        if given and missing:
            errors.append(
                f"KeyQueue.load_state_dict: the entries of a queue belong together, missing {missing}."
            )
        if not errors:
            for name, limit in (("queue_ptr", self.size - 1), ("fill", self.size)):
                value = given.get(name)
                if value is not None and not value.is_meta and not 0 <= int(value) <= limit:
                    raise ValueError(
                        f"KeyQueue.load_state_dict: {prefix + name} must be in [0, {limit}] for a "
                        f"queue of {self.size} keys, got {int(value)}"
                    )
        if not errors and not missing:
            super()._load_from_state_dict(
                state_dict,
                prefix,
                local_metadata,
                strict,
                missing_keys,
                unexpected_keys,
                error_msgs,
            )
            return
        error_msgs += errors
        if strict:
            missing_keys += missing
            unexpected_keys += [
                key
                for key in state_dict
                if key.startswith(prefix) and key.removeprefix(prefix) not in names
            ]

    def _misfit(self, name: str, value: Any) -> str | None:
        """What is wrong with a value for a buffer, or None."""
        buffer = self._buffers[name]
        if not isinstance(value, Tensor) or buffer is None:
            return f"must be a tensor, got {type_name(value)}"
        if value.shape != buffer.shape:
            return (
                f"must have shape {list(buffer.shape)} (the queue is of size {self.size} and dim "
                f"{self.dim}), got {list(value.shape)}"
            )
        if buffer.is_floating_point() != value.is_floating_point() or value.dtype == torch.bool:
            kind = "floating-point" if buffer.is_floating_point() else "integer"
            return f"must be {kind}, got {value.dtype}"
        return None

    def extra_repr(self) -> str:
        """Arguments, for ``print``."""
        return (
            f"{self.size}, {self.dim}, dtype={self.queue.dtype}, normalize={self.normalize}, "
            f"gather={self.gather}, labels={self.labels is not None}"
        )

    @classmethod
    def from_moco(cls, state_dict: Mapping[str, Any], *, gather: bool = False) -> KeyQueue:
        """The queue of a checkpoint of the official MoCo code.

        It stores ``queue`` as [dim, size], filled with random unit vectors from the start, so the
        queue returned is full.

        Args:
            state_dict: With the entries ``queue`` and ``queue_ptr``, possibly prefixed by
                ``module.``; a whole checkpoint with an entry ``state_dict`` is fine too.
            gather: As for the constructor.

        Raises:
            KeyError: If there is no queue in it.
            TypeError: If the queue or the pointer is no tensor of a dtype that fits.
            ValueError: If the queue is not [dim, size] or the pointer is outside of it.
        """
        op = "KeyQueue.from_moco"
        if not isinstance(state_dict, Mapping):
            raise TypeError(f"{op}: state_dict must be a mapping, got {type_name(state_dict)}")
        if isinstance(state_dict.get("state_dict"), Mapping):
            state_dict = state_dict["state_dict"]
        prefix = next((p for p in ("", "module.") if f"{p}queue" in state_dict), None)
        if prefix is None:
            raise KeyError(
                f"{op}: state_dict must hold 'queue' or 'module.queue', got keys such "
                f"as {list(state_dict)[:5]}"
            )
        stored = state_dict[f"{prefix}queue"]
        checks.check_tensor(op, f"{prefix}queue", stored)
        if stored.dim() != 2 or not stored.numel():
            raise ValueError(f"{op}: {prefix}queue must be [dim, size], got {list(stored.shape)}")
        dim, size = stored.shape
        pointer = state_dict.get(f"{prefix}queue_ptr", 0)
        if isinstance(pointer, Tensor):
            if pointer.numel() != 1 or pointer.is_floating_point():
                raise TypeError(
                    f"{op}: {prefix}queue_ptr must be one integer, got {list(pointer.shape)} "
                    f"{pointer.dtype}"
                )
            pointer = int(pointer)
        pointer = checks.integer(op, f"{prefix}queue_ptr", pointer)
        if not 0 <= pointer < size:
            raise ValueError(f"{op}: {prefix}queue_ptr must be in [0, {size}), got {pointer}")
        queue = cls(size, dim, dtype=stored.dtype, gather=gather).to(stored.device)
        with torch.no_grad():
            queue.queue.copy_(stored.t())
            queue.queue_ptr.fill_(pointer)
            queue.fill.fill_(size)
        return queue
