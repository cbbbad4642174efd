# SPDX-License-Identifier: Apache-2.0
"""EMA and queue updates on NVIDIA GPUs: addresses and sizes handed to ``sslkernels._cuda``.

Importing this module raises ImportError when the extension was not built (``SSLKERNELS_CUDA``, see
csrc/cuda/build.py) or when torch is a ROCm build, whose "cuda" tensors the extension can't serve.
It does not need a driver or a GPU; ``why_unavailable(device)`` asks for them.

Every function launches one kernel on the current stream of the device of its tensors, whatever the
current device is, and waits for nothing.  Version counters are the caller's business.  What has
been verified and how is in docs/cuda.md.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sslkernels.backends import devices

if torch.version.hip is not None:
    raise ImportError("sslkernels._cuda is for NVIDIA GPUs and this torch is built for ROCm")
try:
    from sslkernels import _cuda
except ImportError as _error:
    raise ImportError(
        f"sslkernels._cuda is not usable: {_error}; build it with nvcc on PATH and SSLKERNELS_CUDA=1"
    ) from _error

# csrc/cuda/launchers.h: enum Dtype
_DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
_MASK32, _MASK64 = (1 << 32) - 1, (1 << 64) - 1


def why_unavailable(device: torch.device) -> str:
    """See ``Backend.why_unavailable``.

    The extension brings its own CUDA runtime along.  It works with a driver of the same major version
    or a newer one.  On a device that no machine code was compiled for, the driver compiles the newest
    intermediate code instead, for which it must be as new as the compiler in its minor version too.
    """
    if device.type != "cuda":
        return f"it serves CUDA tensors only, not {device.type!r}"
    reason = devices.no_gpu()
    if reason:
        return reason
    runtime, driver = _cuda.RUNTIME_VERSION, _cuda.driver_version()
    if driver // 1000 < runtime // 1000:
        return (
            f"sslkernels._cuda was built with CUDA {_release(runtime)}, for which this driver "
            f"(CUDA {_release(driver)}) is too old; build it with an older nvcc or update the driver"
        )
    gpu = devices.gpu(device)
    capability = gpu.capability or 0
    if any(arch // 10 == capability // 10 and arch <= capability for arch in _cuda.ARCHS):
        return ""
    has = f"has no code for {gpu.name} (compute capability {capability / 10})"
    build = f"build it with SSLKERNELS_CUDA_ARCHS={capability}"
    if capability < max(_cuda.ARCHS):
        return f"sslkernels._cuda {has}; {build}"
    if driver < runtime:
        return (
            f"sslkernels._cuda {has}, and this driver (CUDA {_release(driver)}) can't compile that "
            f"of CUDA {_release(runtime)}; {build}"
        )
    return ""


def _release(version: int) -> str:
    """12.4 for CUDA's 12040."""
    return f"{version // 1000}.{version % 1000 // 10}"


def _place(op: str, name: str, x: Tensor) -> tuple[int, int]:
    """Device number and handle of its current stream.

    Raises:
        ValueError: The tensor is not on a CUDA device.
    """
    if x.device.type != "cuda":
        raise ValueError(f"{op}: {name} must be on a CUDA device, got {x.device}")
    index = x.device.index
    return index, torch.cuda.current_stream(index).cuda_stream


def _dtype(op: str, name: str, x: Tensor) -> int:
    code = _DTYPES.get(x.dtype)
    if code is None:
        raise TypeError(
            f"{op}: {name} must be float32, float64, bfloat16 or float16, got {x.dtype}"
        )
    return code


class EmaPlan:
    """target = decay * target + (1 - decay) * source over pairs of tensors, one launch a run.

    The table of addresses is built here and copied to the device once, so make the plan outside of
    a CUDA graph's capture; ``run`` may be captured.  The plan holds addresses, not tensors: the
    caller keeps the tensors alive and makes a new plan when one of them moves.

    Computed as ``fma(decay, target, (1 - decay) * source)`` in float32, or float64 if either side
    is float64; 1 - decay is formed in float64.  No element is touched twice: same inputs, same
    bits.

    Args:
        targets: Contiguous CUDA tensors of one device, float32, float64, bfloat16 or float16.
            Their memory must not overlap; a source may be its own target.
        sources: As many, of the same sizes and on the same device; dtypes may differ.

    Raises:
        TypeError: A dtype is not one of the four.
        ValueError: Lengths, sizes or devices differ, a tensor is not contiguous or not on a CUDA
            device, or its address is no multiple of its element size.
    """

    HOLDS_NO_TENSORS = True  # of the caller
    COPIES_TABLE = True  # to the device, which a stream that captures a graph can't

    def __init__(self, targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
        """See the class."""
        op = "ema_update_"
        if len(targets) != len(sources):
            raise ValueError(
                f"{op}: targets and sources must have the same length, "
                f"got {len(targets)} and {len(sources)}"
            )
        self._n_chunks = 0
        if not targets:
            return
        self._device = targets[0].device
        _, self._made_on = _place(op, "targets[0]", targets[0])
        pairs = []
        for i, (target, source) in enumerate(zip(targets, sources, strict=True)):
            dtypes = _dtype(op, f"targets[{i}]", target), _dtype(op, f"sources[{i}]", source)
            if target.numel() != source.numel():
                raise ValueError(
                    f"{op}: targets[{i}] and sources[{i}] must have the same number of elements, "
                    f"got {target.numel()} and {source.numel()}"
                )
            for name, x in (("targets", target), ("sources", source)):
                if x.device != self._device:
                    raise ValueError(
                        f"{op}: {name}[{i}] must be on {self._device} like targets[0], "
                        f"got {x.device}"
                    )
                if not x.is_contiguous():
                    raise ValueError(
                        f"{op}: {name}[{i}] must be contiguous, got strides {list(x.stride())}"
                    )
                if x.data_ptr() % x.element_size():
                    raise ValueError(
                        f"{op}: the address of {name}[{i}] must be a multiple of "
                        f"{x.element_size()} bytes, got {x.data_ptr():#x}"
                    )
            pairs.append((target.data_ptr(), source.data_ptr(), target.numel(), *dtypes))
        table, self._n_chunks, self._chunks_offset = _cuda.build_ema_table(pairs)
        self._table = torch.frombuffer(bytearray(table), dtype=torch.uint8).to(self._device)

    def run(
        self,
        decay: float | Tensor,
        *,
        stochastic_rounding: bool = False,
        seed: int = 0,
        step: int = 0,
        rng_state: Tensor | None = None,
    ) -> None:
        """Update every target in place.

        Args:
            decay: In [0, 1]: a number, or one float32 or float64 on the device.  A tensor is read
                by the kernel, so a CUDA graph that is replayed follows a schedule written to it.
                Its value can't be checked without a synchronisation and isn't.
            stochastic_rounding: Of bfloat16 and float16 targets; others ignore it.  The random bits
                depend on seed, step, position of the pair in the list and of the element in it.
            seed: Key of the random bits, 64 bits are used.
            step: Counter of the random bits, 32 bits are used.
            rng_state: int64 [2] on the device, seed and step, in place of the two numbers.  The
                kernel reads it and adds 1 to the step, so that a replayed graph gets new bits.

        Raises:
            TypeError: decay or rng_state has the wrong dtype.
            ValueError: decay is a number outside [0, 1], or a tensor on another device or with more
                than one element; rng_state likewise; or rng_state is given without
                stochastic_rounding.
            RuntimeError: CUDA refused the launch.
        """
        op = "ema_update_"
        decay_ptr, decay_dtype, value = 0, 0, 0.0
        if isinstance(decay, Tensor):
            if decay.dtype not in (torch.float32, torch.float64):
                raise TypeError(
                    f"{op}: decay as a tensor must be float32 or float64, got {decay.dtype}"
                )
        else:
            value = float(decay)
            if not 0.0 <= value <= 1.0:
                raise ValueError(f"{op}: decay must be in [0, 1], got {value}")
        if rng_state is not None:
            if not stochastic_rounding:
                raise ValueError(f"{op}: rng_state must come with stochastic_rounding=True")
            if rng_state.dtype != torch.int64:
                raise TypeError(f"{op}: rng_state must be int64, got {rng_state.dtype}")
        if self._n_chunks == 0:
            return
        if isinstance(decay, Tensor):
            if decay.numel() != 1 or decay.device != self._device:
                raise ValueError(
                    f"{op}: decay as a tensor must be one number on {self._device}, "
                    f"got {list(decay.shape)} on {decay.device}"
                )
            decay_ptr, decay_dtype = decay.data_ptr(), _DTYPES[decay.dtype]
        if rng_state is not None and (
            rng_state.shape != (2,)
            or rng_state.device != self._device
            or not rng_state.is_contiguous()
        ):
            raise ValueError(
                f"{op}: rng_state must be contiguous [2] on {self._device}, "
                f"got {list(rng_state.shape)} on {rng_state.device}"
            )
        index, stream = _place(op, "targets", self._table)
        if stream != self._made_on:
            # Else the allocator might hand the table to others while this stream still reads it.
            self._table.record_stream(torch.cuda.current_stream(index))
        table = self._table.data_ptr()
        _cuda.ema_update(
            tensors=table,
            chunks=table + self._chunks_offset,
            n_chunks=self._n_chunks,
            decay=value,
            decay_ptr=decay_ptr,
            decay_dtype=decay_dtype,
            stochastic=stochastic_rounding,
            seed=seed & _MASK64,
            step=step & _MASK32,
            rng_state=0 if rng_state is None else rng_state.data_ptr(),
            device=index,
            stream=stream,
        )


def ema_update_(
    targets: Sequence[Tensor],
    sources: Sequence[Tensor],
    decay: float | Tensor,
    plan: EmaPlan | None = None,
    *,
    stochastic_rounding: bool = False,
    seed: int = 0,
    step: int = 0,
    rng_state: Tensor | None = None,
) -> None:
    """Average sources into targets in one launch, with a plan made now or before; see ``EmaPlan``.

    Args:
        targets: As for ``EmaPlan``; not looked at when there is a plan.
        sources: As for ``EmaPlan``; not looked at when there is a plan.
        decay: As for ``EmaPlan.run``.
        plan: A plan of these tensors; None makes one, which copies its table to the device.
        stochastic_rounding: As for ``EmaPlan.run``.
        seed: As for ``EmaPlan.run``.
        step: As for ``EmaPlan.run``.
        rng_state: As for ``EmaPlan.run``.

    Raises:
        TypeError, ValueError, RuntimeError: As for ``EmaPlan`` and ``EmaPlan.run``.
    """
    if plan is None:
        plan = EmaPlan(targets, sources)
    plan.run(
        decay, stochastic_rounding=stochastic_rounding, seed=seed, step=step, rng_state=rng_state
    )


def enqueue_(
    queue: Tensor,  # [K, D]
    queue_ptr: Tensor,  # [1] or 0-d int64
    fill: Tensor,  # [1] or 0-d int64
    keys: Tensor,  # [N, D]
    normalize: bool,
    queue_labels: Tensor | None = None,  # [K] int64
    labels: Tensor | None = None,  # [N] int64
    eps: float = 1e-12,
) -> None:
    """Normalise, cast, write behind the pointer with wrap-around, and advance: one launch.

    Key i goes to row (queue_ptr + i) mod K; of more than K keys the newest K are written.  Then
    queue_ptr = (queue_ptr + N) mod K and fill = min(fill + N, K), on the device.  A key is stored
    as ``x / max(||x||_2, eps)``, computed in float32 (float64 if keys or queue are float64), or as
    it is.

    The contract of the arguments is that of ``sslkernels.ops.queue``, which has checked them:
    devices, shapes and dtypes fit, queue and queue_labels are contiguous, keys do not overlap with
    the queue.

    Raises:
        TypeError: keys or queue are not float32, float64, bfloat16 or float16.
        ValueError: queue is not on a CUDA device.
        RuntimeError: CUDA refused the launch.
    """
    op = "enqueue_"
    queue_dtype, key_dtype = _dtype(op, "queue", queue), _dtype(op, "keys", keys)
    index, stream = _place(op, "queue", queue)
    if keys.stride(1) != 1 and keys.shape[1] != 1:
        keys = keys.contiguous()
    if labels is not None:
        labels = labels.contiguous()
    _cuda.enqueue(
        queue=queue.data_ptr(),
        queue_dtype=queue_dtype,
        keys=keys.data_ptr(),
        key_dtype=key_dtype,
        queue_labels=0 if queue_labels is None else queue_labels.data_ptr(),
        labels=0 if labels is None else labels.data_ptr(),
        queue_ptr=queue_ptr.data_ptr(),
        fill=fill.data_ptr(),
        N=keys.shape[0],
        D=queue.shape[1],
        K=queue.shape[0],
        key_stride=keys.stride(0),
        normalize=normalize,
        eps=eps,
        device=index,
        stream=stream,
    )
