# SPDX-License-Identifier: Apache-2.0
"""Stochastic rounding from float32 to 16 bits in plain torch, with counter-based random bits.

The same numbers are produced, bit for bit, by ``csrc/cpu/philox.h`` and by ``csrc/cuda/ema.cu``;
this file is what runs on a device for which neither exists.

Random bits: Philox4x32-10 (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2,
3", SC 2011), key = (seed low, seed high), counter = (group low, group high, step, tensor index),
where group is element // 4: each of the four words of the output goes to one element, number
element % 4.  It depends on nothing but these numbers, so neither the number of threads nor the order
of the work changes a result.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MASK32 = 0xFFFFFFFF
_MULTIPLIER_0 = 0xD2511F53
_MULTIPLIER_1 = 0xCD9E8D57
_WEYL_0 = 0x9E3779B9
_WEYL_1 = 0xBB67AE85
_ROUNDS = 10


def _multiply(x: Tensor, multiplier: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of x * multiplier, for x < 2^32 held in int64."""
    low_part = x * (multiplier & 0xFFFF)
    high_part = x * (multiplier >> 16)
    high = (high_part + (low_part >> 16)) >> 16
    low = (low_part + ((high_part & 0xFFFF) << 16)) & _MASK32
    return high, low


def philox_words(
    numel: int,
    seed: int,
    step: int,
    tensor_index: int,
    device: torch.device | str = "cpu",
    first: int = 0,
) -> Tensor:
    """The words of Philox4x32-10 for the elements first … first + numel - 1, four elements a counter.

    Args:
        numel: How many elements.
        seed: Key, 64 bits are used.
        step: Third counter word, 32 bits are used.
        tensor_index: Fourth counter word, 32 bits are used.
        device: Where the result lives.
        first: Number of the first element.

    Returns:
        [numel] int64 with values below 2^32.
    """
    first_group, skipped = divmod(first, 4)
    groups = -(-(skipped + numel) // 4)
    group = torch.arange(first_group, first_group + groups, dtype=torch.int64, device=device)
    k0, k1 = seed & _MASK32, (seed >> 32) & _MASK32
    words = philox(group, step & _MASK32, tensor_index & _MASK32, k0, k1)
    return torch.stack(words, 1).view(-1)[skipped : skipped + numel]


def philox(
    element: Tensor, third: int, fourth: int, k0: int | Tensor, k1: int | Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four output words of Philox4x32-10, int64 with values below 2^32.

    Args:
        element: int64, the first two words of the counter.
        third: The third word.
        fourth: The fourth.
        k0: First word of the key.
        k1: Second word of the key.
    """
    c0, c1 = element & _MASK32, element >> 32
    c2, c3 = torch.full_like(element, third), torch.full_like(element, fourth)
    for _ in range(_ROUNDS):
        high_0, low_0 = _multiply(c0, _MULTIPLIER_0)
        high_1, low_1 = _multiply(c2, _MULTIPLIER_1)
        c0, c1, c2, c3 = high_1 ^ c1 ^ k0, low_1, high_0 ^ c3 ^ k1, low_0
        k0, k1 = (k0 + _WEYL_0) & _MASK32, (k1 + _WEYL_1) & _MASK32
    return c0, c1, c2, c3


def round_stochastic(x: Tensor, words: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounds float32 to bfloat16 or float16, to either neighbour, and right on average.

    With n bits to drop from the significand m, the result is (m + r) >> n, where r holds the n
    highest bits of the random word.  bfloat16 always drops 16; float16 drops 13, and more below
    2^-14, where its spacing stays 2^-24.  A value that is representable is never changed; a NaN
    gives a NaN.

    Args:
        x: float32, any shape.
        words: int64 random words below 2^32, as many as x has elements.
        dtype: torch.bfloat16 or torch.float16.

    Returns:
        A tensor of the shape of x and the dtype asked for.
    """
    bits = x.contiguous().view(torch.int32).to(torch.int64) & _MASK32
    words = words.view(x.shape)
    magnitude = bits & 0x7FFFFFFF
    sign = (bits >> 16) & 0x8000
    if dtype == torch.bfloat16:
        half = (magnitude + (words >> 16)) >> 16
        quiet_nan = 0x7FC0
    elif dtype == torch.float16:
        exponent = magnitude >> 23
        # Bits to drop: 13 for exponents of at least 113 (2^-14); one more for each step below.
        drop = (13 + (113 - exponent).clamp(min=0)).clamp(max=62)
        significand = (magnitude & 0x7FFFFF) | torch.where(exponent > 0, 0x800000, 0)
        random = torch.where(
            drop <= 32, words >> (32 - drop).clamp(min=0), words << (drop - 32).clamp(min=0)
        )
        small = (significand + random) >> drop
        normal = (magnitude + (words >> 19) - (112 << 23)) >> 13
        half = torch.where(exponent >= 113, normal, small).clamp(max=0x7C00)
        quiet_nan = 0x7E00
    else:
        raise TypeError(f"round_stochastic: dtype must be bfloat16 or float16, got {dtype}")
    half = torch.where(magnitude > 0x7F800000, quiet_nan, half | sign)
    half = torch.where(half >= 0x8000, half - 0x10000, half)
    return half.to(torch.int16).view(dtype)
