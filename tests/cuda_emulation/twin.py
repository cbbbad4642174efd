# SPDX-License-Identifier: Apache-2.0
"""Plain numpy twins of the kernels' arithmetic, as docs/cuda.md defines it, and 16-bit formats.

A bfloat16 or float16 array is a uint16 array of its bits here; the dtype travels as the code of
csrc/cuda/launchers.h: 0 float32, 1 float64, 2 bfloat16, 3 float16.
"""

from __future__ import annotations

import numpy as np

FLOAT32, FLOAT64, BFLOAT16, FLOAT16 = range(4)
NAMES = ("float32", "float64", "bfloat16", "float16")
STORAGE = (np.float32, np.float64, np.uint16, np.uint16)

_MASK32 = np.uint64(0xFFFFFFFF)


def widen(x: np.ndarray, dtype: int) -> np.ndarray:
    """The values of an array as float64."""
    if dtype == BFLOAT16:
        return (x.astype(np.uint32) << np.uint32(16)).view(np.float32).astype(np.float64)
    if dtype == FLOAT16:
        return x.view(np.float16).astype(np.float64)
    return x.astype(np.float64)


def narrow(x: np.ndarray, dtype: int) -> np.ndarray:
    """Values rounded to nearest even, in the storage of a dtype; 16 bits go through float32."""
    if dtype == BFLOAT16:
        single = x.astype(np.float32)
        bits = single.view(np.uint32).astype(np.uint64)
        rounded = (
            bits + np.uint64(0x7FFF) + ((bits >> np.uint64(16)) & np.uint64(1))
        ) >> np.uint64(16)
        return np.where(np.isnan(single), 0x7FFF, rounded).astype(np.uint16)
    if dtype == FLOAT16:
        with np.errstate(over="ignore"):
            return x.astype(np.float32).astype(np.float16).view(np.uint16)
    return x.astype(STORAGE[dtype])


def philox_words(n: int, seed: int, step: int, tensor: int, first: int = 0) -> np.ndarray:
    """[n] uint64: words of Philox4x32-10 for elements first .. first + n - 1, four to a counter."""
    group = np.array([(first + i) // 4 for i in range(n)], dtype=np.uint64)
    c0, c1 = group & _MASK32, group >> np.uint64(32)
    c2, c3 = np.full_like(group, step), np.full_like(group, tensor)
    k0, k1 = seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF
    for _ in range(10):
        product0, product1 = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0 = (product1 >> np.uint64(32)) ^ c1 ^ np.uint64(k0)
        c2 = (product0 >> np.uint64(32)) ^ c3 ^ np.uint64(k1)
        c1, c3 = product1 & _MASK32, product0 & _MASK32
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    which = [(first + i) % 4 for i in range(n)]
    return np.stack((c0, c1, c2, c3))[which, np.arange(n)] if n else c0


def round_stochastic(x: np.ndarray, words: np.ndarray, dtype: int) -> np.ndarray:
    """float32 values to 16 bits, with the exact integers of Python, one element at a time.

    x = m * 2^e with an integer m of 24 bits; the spacing of the 16-bit format at x is 2^s, so that
    k = s - e bits of m are dropped.  The result is floor((m + r) / 2^k) * 2^s, where r holds the k
    highest bits of the word (all 32 and zeros behind them when k > 32).
    """
    digits, least = (7, -133) if dtype == BFLOAT16 else (10, -24)
    out = np.empty(x.shape, np.uint16)
    for i, (value, word) in enumerate(zip(x.astype(np.float32), words, strict=True)):
        if not np.isfinite(value):
            out[i] = narrow(np.array([value]), dtype)[0]
            continue
        bits = int(value.view(np.uint32))
        exponent, mantissa = (bits >> 23) & 0xFF, bits & 0x7FFFFF
        m, e = (mantissa | 0x800000, exponent - 150) if exponent else (mantissa, -149)
        spacing = max(least, (exponent or 1) - 127 - digits)
        k = spacing - e
        r = int(word) >> (32 - k) if k <= 32 else int(word) << (k - 32)
        magnitude = ((m + r) >> k) * 2.0**spacing  # exact in float64
        rounded = narrow(np.array([magnitude]), dtype)[0]  # exact, or infinity above the largest
        out[i] = int(rounded) | (bits >> 16 & 0x8000)
    return out


def ema(
    target: np.ndarray,
    target_dtype: int,
    source: np.ndarray,
    source_dtype: int,
    decay: float,
    words: np.ndarray | None = None,
) -> np.ndarray:
    """fma(decay, target, (1 - decay) * source), rounded once; stochastically with words."""
    wide = FLOAT64 in (target_dtype, source_dtype)
    acc = np.float64 if wide else np.float32
    t, s = widen(target, target_dtype), widen(source, source_dtype)
    with np.errstate(all="ignore"):
        take = acc(1.0 - decay) * s.astype(acc)
        # The product of two float32 is exact in longdouble (64 bits of significand or more); for
        # float64 it may not be, which costs a unit in the last place once in thousands.
        exact = np.longdouble(acc(decay)) * t.astype(np.longdouble) + take.astype(np.longdouble)
        mean = exact.astype(acc)
        if words is not None and target_dtype in (BFLOAT16, FLOAT16):
            return round_stochastic(mean.astype(np.float32), words, target_dtype)
    return narrow(mean, target_dtype)


def enqueue(
    queue: np.ndarray,  # [K, D] float64
    labels: np.ndarray,  # [K] int64
    ptr: int,
    fill: int,
    keys: np.ndarray,  # [N, D] float64
    new_labels: np.ndarray,  # [N] int64
    normalize: bool,
    eps: float,
) -> tuple[int, int]:
    """The definition, row by row, in place; returns the new pointer and fill."""
    for row, label in zip(keys, new_labels, strict=True):
        if normalize:
            norm = np.sqrt(np.sum(row * row))
            row = row / (eps if norm < eps else norm)
        queue[ptr], labels[ptr] = row, label
        ptr, fill = (ptr + 1) % len(queue), min(fill + 1, len(queue))
    return ptr, fill
