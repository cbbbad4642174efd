# SPDX-License-Identifier: Apache-2.0
"""What this machine can do at most: multiply-adds and bytes a second, measured in the same run.

FMA: chains of multiply-adds in registers (``csrc/cpu/peak.cpp``), float32 and, where the processor
has them, bfloat16 products; on GPUs, or without the extension, the best matrix product of torch, which
is a lower bound.  The record says which.  All figures are the best of many short runs: a ceiling is
what is possible.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable
from typing import Any

import torch

SECONDS = 1.0
GEMM_N = 2048
STREAM_BYTES = 256 << 20  # 64 MB are still half in a large L3 cache: 150 instead of 110 GB/s


def _best(run: Callable[[], object], device: str, seconds: float = SECONDS) -> float:
    """Least seconds of one call within the given time."""
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return best


def cpu_extension() -> Any:
    """``sslkernels._C``, or None where it was not built."""
    try:
        return importlib.import_module("sslkernels._C")
    except ImportError:
        return None


def _record(name: str, rate: float, unit: str, note: str) -> dict[str, Any]:
    return {"provider": name, "metric": "ceiling", "values": [rate] * 3, "unit": unit, "note": note}


def measure_ceilings(device: str, threads: int) -> list[dict[str, Any]]:
    """Records fma, sgemm and, where there is such a unit, bf16 (FLOP/s); copy and bandwidth (B/s)."""
    a, b, c = (torch.randn(GEMM_N, GEMM_N, device=device) for _ in range(3))
    sgemm = 2 * GEMM_N**3 / _best(lambda: torch.mm(a, b, out=c), device)
    extension = cpu_extension() if device == "cpu" else None
    fma, how = sgemm, "no multiply-add loop here: torch.mm in float32, a lower bound"
    if extension is not None:
        fma, how = extension.peak_flops(bf16=False, n_threads=threads), "multiply-adds in registers"
    records = [_record("fma", fma, "FLOP/s", how)]
    if extension is not None and extension.has_bf16():
        rate = extension.peak_flops(bf16=True, n_threads=threads)
        records.append(_record("bf16", rate, "FLOP/s", "bfloat16 pairs in registers"))
    elements = STREAM_BYTES // 4
    x, y = (torch.randn(elements, device=device) for _ in range(2))
    copy = 2 * STREAM_BYTES / _best(lambda: y.copy_(x), device)
    update = 3 * STREAM_BYTES / _best(lambda: y.lerp_(x, 0.01), device)
    size = f"{STREAM_BYTES >> 20} MB"
    return [
        *records,
        _record("sgemm", sgemm, "FLOP/s", f"torch.mm, {GEMM_N} square, float32"),
        _record("copy", copy, "B/s", f"torch copy_, {size}, read + write"),
        _record("bandwidth", max(update, copy), "B/s", f"best of copy_ and lerp_, {size}"),
    ]
