# SPDX-License-Identifier: Apache-2.0
"""Row normalisation, EMA and enqueue in Triton, for a GPU without the compiled CUDA extension.

Formulas and roundings are those of ``backends/cuda.py``: norms and averages in float32, or float64 if
either side is float64.  One launch for a list of tensors (two for an enqueue: the pointer may only
move when every program has read it), no host sync, safe to capture once the plan exists.
"""

# Triton reads annotations of kernel arguments itself, so no `from __future__ import annotations`.

import struct
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .runtime import launch
from .sizes import cdiv, next_power_of_2
from .tiles import wait_turn

_TL_DTYPES = {
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}
# Elements of one program.  4096 float32 are 16 KB a side: enough loads in flight for 128 threads, and
# a ResNet-50's 161 tensors make about 6,300 programs.
EMA_BLOCK = 4096
_ROW_BLOCK_D = 1024


@triton.jit
def _convert(x, DTYPE: tl.constexpr):
    """x in another dtype; between float64 and bfloat16 by way of float32, which both sides know."""
    if x.dtype == tl.bfloat16 or DTYPE == tl.bfloat16:
        x = x.to(tl.float32)
    return x.to(DTYPE)


# ---- row normalisation ---------------------------------------------------------------------------


# N is not specialised on: a last batch of 255 rows compiles nothing.
@triton.jit(do_not_specialize=["N"])
def normalize_kernel(
    unit_ptr,  # [N, D] contiguous
    norm_ptr,  # [N] acc
    x_ptr,  # [N, D]
    N,
    D,
    stride_n,
    stride_d,
    eps,
    ACC: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """unit = x / max(||x||, eps), row by row."""
    wait_turn()
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)  # int64: times a stride
    row_ok = rows < N
    square = tl.zeros((BLOCK_N,), ACC)
    for start in range(0, D, BLOCK_D):
        features = start + tl.arange(0, BLOCK_D)
        mask = row_ok[:, None] & (features < D)[None, :]
        ptrs = x_ptr + rows[:, None] * stride_n + features.to(tl.int64)[None, :] * stride_d
        x = _convert(tl.load(ptrs, mask=mask, other=0.0), ACC)
        square += tl.sum(x * x, 1)
    norm = tl.sqrt(square)
    tl.store(norm_ptr + rows, norm, mask=row_ok)
    # Not tl.maximum, which may drop a NaN.
    divisor = tl.where(norm < eps, tl.full((BLOCK_N,), 0.0, ACC) + eps, norm)
    for start in range(0, D, BLOCK_D):
        features = start + tl.arange(0, BLOCK_D)
        mask = row_ok[:, None] & (features < D)[None, :]
        ptrs = x_ptr + rows[:, None] * stride_n + features.to(tl.int64)[None, :] * stride_d
        x = _convert(tl.load(ptrs, mask=mask, other=0.0), ACC)
        unit = _convert(x / divisor[:, None], unit_ptr.dtype.element_ty)
        tl.store(unit_ptr + rows[:, None] * D + features[None, :], unit, mask=mask)


@triton.jit(do_not_specialize=["N"])
def normalize_backward_kernel(
    dx_ptr,  # [N, D] contiguous
    dunit_ptr,  # [N, D]
    x_ptr,  # [N, D]
    norm_ptr,  # [N] acc
    N,
    D,
    stride_gn,
    stride_gd,
    stride_xn,
    stride_xd,
    eps,
    ACC: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """dx = (dunit - unit <unit, dunit>) / norm; where norm < eps the divisor is a constant: dunit / eps."""
    wait_turn()
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)  # int64: times a stride
    row_ok = rows < N
    norm = tl.load(norm_ptr + rows, mask=row_ok, other=1.0)
    tiny = norm < eps
    divisor = tl.where(tiny, tl.full((BLOCK_N,), 0.0, ACC) + eps, norm)
    along = tl.zeros((BLOCK_N,), ACC)
    for start in range(0, D, BLOCK_D):
        features = start + tl.arange(0, BLOCK_D)
        mask = row_ok[:, None] & (features < D)[None, :]
        x_ptrs = x_ptr + rows[:, None] * stride_xn + features.to(tl.int64)[None, :] * stride_xd
        g_ptrs = dunit_ptr + rows[:, None] * stride_gn + features.to(tl.int64)[None, :] * stride_gd
        unit = _convert(tl.load(x_ptrs, mask=mask, other=0.0), ACC) / divisor[:, None]
        along += tl.sum(unit * _convert(tl.load(g_ptrs, mask=mask, other=0.0), ACC), 1)
    along = tl.where(tiny, 0.0, along)
    for start in range(0, D, BLOCK_D):
        features = start + tl.arange(0, BLOCK_D)
        mask = row_ok[:, None] & (features < D)[None, :]
        x_ptrs = x_ptr + rows[:, None] * stride_xn + features.to(tl.int64)[None, :] * stride_xd
        g_ptrs = dunit_ptr + rows[:, None] * stride_gn + features.to(tl.int64)[None, :] * stride_gd
        # Not x times along / norm^2, which is rounded: what cancels must cancel (all of it for D = 1).
        unit = _convert(tl.load(x_ptrs, mask=mask, other=0.0), ACC) / divisor[:, None]
        dunit = _convert(tl.load(g_ptrs, mask=mask, other=0.0), ACC)
        dx = (dunit - unit * along[:, None]) / divisor[:, None]
        dx = _convert(dx, dx_ptr.dtype.element_ty)
        tl.store(dx_ptr + rows[:, None] * D + features[None, :], dx, mask=mask)


def _row_blocks(D: int) -> dict[str, int]:
    """Rows and features of a program: about 1024 elements, eight a thread."""
    block_d = min(_ROW_BLOCK_D, max(16, next_power_of_2(D)))
    return {"BLOCK_N": max(1, _ROW_BLOCK_D // block_d), "BLOCK_D": block_d}


def _acc(*dtypes: torch.dtype) -> torch.dtype:
    return torch.float64 if torch.float64 in dtypes else torch.float32


def normalize_rows(
    x: Tensor, eps: float = 1e-12, out: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """x / max(||x||_2, eps) for each row, and the norms.

    Args:
        x: [N, D] float64, float32, bfloat16 or float16, any strides.
        eps: Smallest divisor, applied in the accumulation dtype (1e-12 would be 0 in float16).
        out: [N, D] contiguous, any floating dtype, where the rows go; by default a new tensor in the
            dtype of x.

    Returns:
        unit [N, D], contiguous; norm [N] float32 (float64 for float64).

    Raises:
        ValueError: If out is not contiguous or has another shape than x.
    """
    N, D = x.shape
    acc = _acc(x.dtype)
    if out is not None and (out.shape != x.shape or not out.is_contiguous()):
        raise ValueError(
            f"normalize_rows: out must be contiguous and {list(x.shape)}, "
            f"got {list(out.shape)} with strides {list(out.stride())}"
        )
    unit = torch.empty(N, D, dtype=x.dtype, device=x.device) if out is None else out
    norm = torch.zeros(N, dtype=acc, device=x.device)
    if N == 0 or D == 0:
        return unit, norm
    blocks = _row_blocks(D)
    grid = (cdiv(N, blocks["BLOCK_N"]),)
    launch(
        normalize_kernel, grid, x.device, unit, norm, x, N, D, *x.stride(), eps,
        ACC=_TL_DTYPES[acc], **blocks,
    )  # fmt: skip
    return unit, norm


def normalize_rows_backward(dunit: Tensor, x: Tensor, norm: Tensor, eps: float = 1e-12) -> Tensor:
    """Gradient of ``normalize_rows``.

    Args:
        dunit: [N, D] incoming gradient, any floating dtype and strides (stride 0 too).
        x: [N, D] the input.
        norm: [N] as returned by ``normalize_rows``.
        eps: As given to ``normalize_rows``.

    Returns:
        dx [N, D] in the dtype of x, contiguous.
    """
    N, D = x.shape
    dx = torch.empty(N, D, dtype=x.dtype, device=x.device)
    if N == 0 or D == 0:
        return dx
    blocks = _row_blocks(D)
    grid = (cdiv(N, blocks["BLOCK_N"]),)
    launch(
        normalize_backward_kernel, grid, x.device, dx, dunit, x, norm, N, D, *dunit.stride(),
        *x.stride(), eps, ACC=_TL_DTYPES[norm.dtype], **blocks,
    )  # fmt: skip
    return dx


# ---- EMA -----------------------------------------------------------------------------------------


@triton.jit
def _words(group, seed, step, tensor):
    """Random words of the elements of groups: four each, see ``backends/rounding.py``."""
    zero = (group * 0).to(tl.uint32)
    low, high = group.to(tl.uint32), (group >> 32).to(tl.uint32)
    word_0, word_1, word_2, word_3 = tl.philox(
        seed, low, high, zero + step.to(tl.uint32), zero + tensor.to(tl.uint32)
    )
    words = tl.join(tl.join(word_0, word_2), tl.join(word_1, word_3))
    return tl.reshape(words, (4 * group.shape[0],))


@triton.jit
def _round_stochastic(x, word, DTYPE: tl.constexpr):
    """float32 to a neighbour in 16 bits: ``rounding.round_stochastic`` has the definition."""
    bits = x.to(tl.uint32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    if DTYPE == tl.bfloat16:
        half = (magnitude + (word >> 16)) >> 16
        nan = 0x7FC0
    else:
        exponent = (magnitude >> 23).to(tl.int32)
        # 13 bits are dropped from 2^-14 on, and one more for each power of two below.
        drop = tl.minimum(126 - tl.maximum(exponent, 1), 62)
        significand = (magnitude & 0x7FFFFF) | tl.where(exponent > 0, 0x800000, 0).to(tl.uint32)
        wide = word.to(tl.int64)
        few = wide >> tl.maximum(32 - drop, 0).to(tl.int64)
        many = wide << tl.maximum(drop - 32, 0).to(tl.int64)
        random = tl.where(drop <= 32, few, many)
        small = (significand.to(tl.int64) + random) >> tl.maximum(drop, 0).to(tl.int64)
        normal = (magnitude + (word >> 19) - (112 << 23)) >> 13
        half = tl.minimum(tl.where(exponent >= 113, normal, small.to(tl.uint32)), 0x7C00)
        nan = 0x7E00
    half = tl.where(magnitude > 0x7F800000, nan, half | ((bits >> 16) & 0x8000))
    return half.to(tl.uint16).to(DTYPE, bitcast=True)


@triton.jit(do_not_specialize=["decay_bits", "rest_bits", "seed", "step"])
def ema_kernel(
    address_ptr,  # [tensors, 2] int64: addresses of target and source
    numel_ptr,  # [tensors] int64
    tensor_ptr,  # [programs] int32: which tensor
    start_ptr,  # [programs] int64: its first element
    place_ptr,  # [tensors] int32: its place in the list, for the random words
    decay_ptr,  # 0-d float; only with HAS_DECAY_PTR
    decay_bits,  # float64 as int64: Triton would round a float argument to float32
    rest_bits,  # 1 - decay likewise
    seed,  # 64 bits
    step,  # 32 bits
    HAS_DECAY_PTR: tl.constexpr,
    STOCHASTIC: tl.constexpr,  # targets of 16 bits are rounded with random words
    TARGET: tl.constexpr,
    SOURCE: tl.constexpr,
    ACC: tl.constexpr,
    ALIGNED: tl.constexpr,  # every address is a multiple of 16 bytes
    BLOCK: tl.constexpr,
):
    """target = fma(decay, target, (1 - decay) * source) over a table of tensors."""
    wait_turn()
    program = tl.program_id(0)
    tensor = tl.load(tensor_ptr + program)
    start = tl.load(start_ptr + program)
    target_ptr = tl.load(address_ptr + 2 * tensor).to(tl.pointer_type(TARGET))
    source_ptr = tl.load(address_ptr + 2 * tensor + 1).to(tl.pointer_type(SOURCE))
    if ALIGNED:
        target_ptr = tl.multiple_of(target_ptr, 16)
        source_ptr = tl.multiple_of(source_ptr, 16)
    if HAS_DECAY_PTR:
        wide = tl.load(decay_ptr).to(tl.float64)
        decay = wide.to(ACC)
        rest = (1.0 - wide).to(ACC)
    else:
        decay = tl.cast(decay_bits, tl.int64).to(tl.float64, bitcast=True).to(ACC)
        rest = tl.cast(rest_bits, tl.int64).to(tl.float64, bitcast=True).to(ACC)
    offsets = tl.multiple_of(start, BLOCK) + tl.arange(0, BLOCK)
    mask = offsets < tl.load(numel_ptr + tensor)
    target = _convert(tl.load(target_ptr + offsets, mask=mask, other=0.0), ACC)
    source = _convert(tl.load(source_ptr + offsets, mask=mask, other=0.0), ACC)
    mixed = tl.fma(tl.zeros((BLOCK,), ACC) + decay, target, rest * source)
    if STOCHASTIC:
        group = start // 4 + tl.arange(0, BLOCK // 4)
        words = _words(
            group, tl.cast(seed, tl.int64), tl.cast(step, tl.int64), tl.load(place_ptr + tensor)
        )
        rounded = _round_stochastic(mixed.to(tl.float32), words, TARGET)
    else:
        rounded = _convert(mixed, TARGET)
    tl.store(target_ptr + offsets, rounded, mask=mask)


def _bits(value: float) -> int:
    return int(struct.unpack("<q", struct.pack("<d", value))[0])


class EmaPlan:
    """target = decay * target + (1 - decay) * source over pairs of tensors, a launch per dtype pair.

    The tables of addresses are built here and copied to the device once: make the plan outside of a
    CUDA graph's capture, ``run`` may be captured.  The plan holds addresses, not tensors: the caller
    keeps the tensors alive and makes a new plan when one of them moves.

    Args:
        targets: Contiguous tensors of one device, float32, float64, bfloat16 or float16, whose memory
            does not overlap.
        sources: As many, of the same sizes; dtypes may differ.
    """

    HOLDS_NO_TENSORS = True  # of the caller
    COPIES_TABLE = True  # to the device, which a stream that captures a graph can't

    def __init__(self, targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
        """See the class."""
        self._groups: list[dict[str, Any]] = []
        kinds: dict[tuple[torch.dtype, torch.dtype], list[tuple[int, Tensor, Tensor]]] = {}
        for place, (target, source) in enumerate(zip(targets, sources, strict=True)):
            if target.numel():
                kinds.setdefault((target.dtype, source.dtype), []).append((place, target, source))
        for (target_dtype, source_dtype), pairs in kinds.items():
            device = pairs[0][1].device
            addresses = [[t.data_ptr(), s.data_ptr()] for _, t, s in pairs]
            tensors, starts = [], []
            for index, (_, target, _) in enumerate(pairs):
                for start in range(0, target.numel(), EMA_BLOCK):
                    tensors.append(index)
                    starts.append(start)
            tables = (
                (addresses, torch.int64),
                ([target.numel() for _, target, _ in pairs], torch.int64),
                (tensors, torch.int32),
                (starts, torch.int64),
                ([place for place, _, _ in pairs], torch.int32),
            )
            self._groups.append(
                {
                    "device": device,
                    "tables": tuple(
                        torch.tensor(values, dtype=dtype, device="cpu").to(device)
                        for values, dtype in tables
                    ),
                    "flags": {
                        "TARGET": _TL_DTYPES[target_dtype],
                        "SOURCE": _TL_DTYPES[source_dtype],
                        "ACC": _TL_DTYPES[_acc(target_dtype, source_dtype)],
                        "ALIGNED": all(a % 16 == 0 for pair in addresses for a in pair),
                        "BLOCK": EMA_BLOCK,
                    },
                    "narrow": target_dtype in (torch.bfloat16, torch.float16),
                }
            )

    def run(
        self,
        decay: float | Tensor,
        *,
        stochastic_rounding: bool = False,
        seed: int = 0,
        step: int = 0,
    ) -> None:
        """Update every target in place.

        Args:
            decay: In [0, 1]: a number, or one float32 or float64 on the device, which a replayed CUDA
                graph reads anew.
            stochastic_rounding: Of bfloat16 and float16 targets; others ignore it.  The random bits are
                those of every other backend.
            seed: Key of the random bits, 64 bits are used.
            step: Counter of the random bits, 32 bits are used.
        """
        by_tensor = isinstance(decay, Tensor)
        value = 0.0 if isinstance(decay, Tensor) else float(decay)
        for group in self._groups:
            launch(
                ema_kernel,
                (len(group["tables"][2]),),
                group["device"],
                *group["tables"],
                decay if by_tensor else None,
                _bits(value),
                _bits(1.0 - value),
                _signed(seed),
                step & 0xFFFFFFFF,
                HAS_DECAY_PTR=by_tensor,
                STOCHASTIC=stochastic_rounding and group["narrow"],
                **group["flags"],
            )


def _signed(seed: int) -> int:
    """The low 64 bits as what an int64 argument takes."""
    low = seed & 0xFFFFFFFFFFFFFFFF
    return low - (1 << 64) if low >> 63 else low


def ema_update_(
    targets: Sequence[Tensor], sources: Sequence[Tensor], decay: float | Tensor
) -> None:
    """One update without keeping the plan; see ``EmaPlan``."""
    EmaPlan(targets, sources).run(decay)


# ---- enqueue -------------------------------------------------------------------------------------


@triton.jit
def _wrapped(position, K):
    """position mod K in [0, K): a negative one, of a damaged state, must not write outside of the queue."""
    position = position % K  # of the sign of position, as in C
    return tl.where(position < 0, position + K, position)


@triton.jit
def enqueue_kernel(
    queue_ptr,  # [K, D] contiguous
    labels_ptr,  # [K] int64
    position_ptr,  # one int64
    keys_ptr,  # [N, D]
    new_labels_ptr,  # [N] int64
    N,
    K,
    D,
    first,  # keys before it would be overwritten by later ones
    stride_n,
    stride_d,
    eps,
    NORMALIZE: tl.constexpr,
    HAS_LABELS: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Key i goes to row (position + i) mod K; a key is stored as x / max(||x||, eps) or as it is."""
    wait_turn()
    keys = first + tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    key_ok = keys < N
    slots = (_wrapped(tl.load(position_ptr), K) + keys) % K  # once a key, not in a loop
    divisor = tl.full((BLOCK_N,), 1.0, ACC)
    if NORMALIZE:
        square = tl.zeros((BLOCK_N,), ACC)
        for start in range(0, D, BLOCK_D):
            features = start + tl.arange(0, BLOCK_D)
            mask = key_ok[:, None] & (features < D)[None, :]
            ptrs = keys_ptr + keys[:, None] * stride_n + features.to(tl.int64)[None, :] * stride_d
            x = _convert(tl.load(ptrs, mask=mask, other=0.0), ACC)
            square += tl.sum(x * x, 1)
        norm = tl.sqrt(square)
        divisor = tl.where(norm < eps, tl.full((BLOCK_N,), 0.0, ACC) + eps, norm)
    for start in range(0, D, BLOCK_D):
        features = start + tl.arange(0, BLOCK_D)
        mask = key_ok[:, None] & (features < D)[None, :]
        ptrs = keys_ptr + keys[:, None] * stride_n + features.to(tl.int64)[None, :] * stride_d
        x = _convert(tl.load(ptrs, mask=mask, other=0.0), ACC)
        if NORMALIZE:
            x = x / divisor[:, None]
        out = queue_ptr + slots[:, None] * D + features[None, :]
        tl.store(out, _convert(x, queue_ptr.dtype.element_ty), mask=mask)
    if HAS_LABELS:
        tl.store(
            labels_ptr + slots, tl.load(new_labels_ptr + keys, mask=key_ok, other=0), mask=key_ok
        )


@triton.jit
def advance_kernel(position_ptr, fill_ptr, N, K):
    """position = (position + N) mod K, fill = min(fill + N, K): after every program has read them."""
    wait_turn()
    position = _wrapped(tl.load(position_ptr), K) + N
    fill = tl.minimum(tl.maximum(tl.load(fill_ptr), 0), K) + N
    tl.store(position_ptr, position % K)
    tl.store(fill_ptr, tl.minimum(fill, K))


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
    """Normalise, cast, write behind the pointer with wrap-around, and advance, on the device.

    Key i goes to row (queue_ptr + i) mod K; of more than K keys the newest K are written.  Then
    queue_ptr = (queue_ptr + N) mod K and fill = min(fill + N, K).  The contract of the arguments is
    that of ``sslkernels.ops.queue``, which has checked them.
    """
    (K, D), N = queue.shape, keys.shape[0]
    if N == 0:
        return
    first = max(N - K, 0)
    blocks = _row_blocks(max(D, 1))
    launch(
        enqueue_kernel,
        (cdiv(N - first, blocks["BLOCK_N"]),),
        queue.device,
        queue,
        queue_labels,
        queue_ptr,
        keys,
        None if labels is None else labels.contiguous(),
        N,
        K,
        D,
        first,
        *keys.stride(),
        eps,
        NORMALIZE=normalize,
        HAS_LABELS=queue_labels is not None and labels is not None,
        ACC=_TL_DTYPES[_acc(queue.dtype, keys.dtype)],
        **blocks,
    )
    launch(advance_kernel, (1,), queue.device, queue_ptr, fill, N, K)
