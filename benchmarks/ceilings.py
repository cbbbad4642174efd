# SPDX-License-Identifier: Apache-2.0
"""What this machine can do at most: multiply-adds and bytes a second, measured in the same run.

FMA: ``sslkernels._C.fma_gflops(threads)`` where the extension has it; else ``fma_peak.c``, compiled
on the spot; else, and on GPUs, the best matrix product of torch, which is a lower bound.  The
record says which.  All figures are the best of many short runs: a ceiling is what is possible.
"""

from __future__ import annotations

import ctypes
import importlib
import platform
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

import sslkernels

SECONDS = 1.0
FMA_ITERATIONS = 400_000
GEMM_N = 2048
STREAM_BYTES = 64 << 20
SOURCE = Path(__file__).with_name("fma_peak.c")


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


def _compiled_fma(threads: int) -> float | None:
    """FLOP/s of fma_peak.c on all threads together; None without an x86 processor or compiler."""
    compiler = shutil.which("gcc") or shutil.which("clang")
    if compiler is None or platform.machine() not in ("x86_64", "AMD64"):
        return None
    width = 64 if "avx512" in " ".join(sslkernels.info().available_isas) else 32
    with tempfile.TemporaryDirectory() as folder:
        library = str(Path(folder) / "fma_peak.so")
        command = [compiler, "-O3", "-march=native", f"-DBYTES={width}", "-shared", "-fPIC"]
        done = subprocess.run(
            [*command, "-o", library, str(SOURCE)], capture_output=True, check=False
        )
        if done.returncode:
            return None
        chains = ctypes.CDLL(library).fma_chains
    chains.argtypes, chains.restype = [ctypes.c_long], ctypes.c_float
    with ThreadPoolExecutor(threads) as pool:
        seconds = _best(lambda: list(pool.map(chains, [FMA_ITERATIONS] * threads)), "cpu")
    return threads * FMA_ITERATIONS * 16 * (width // 4) * 2 / seconds


def _record(name: str, rate: float, unit: str, note: str) -> dict[str, Any]:
    return {"provider": name, "metric": "ceiling", "values": [rate] * 3, "unit": unit, "note": note}


def measure_ceilings(device: str, threads: int) -> list[dict[str, Any]]:
    """Records ``fma``, ``sgemm`` (FLOP/s), ``copy`` and ``ema`` (bytes/s)."""
    a, b, c = (torch.randn(GEMM_N, GEMM_N, device=device) for _ in range(3))
    sgemm = 2 * GEMM_N**3 / _best(lambda: torch.mm(a, b, out=c), device)
    fma, how = None, ""
    if device == "cpu":
        try:
            extension: Any = importlib.import_module("sslkernels._C")
        except ImportError:
            extension = None
        if hasattr(extension, "fma_gflops"):
            fma, how = extension.fma_gflops(threads) * 1e9, "sslkernels._C.fma_gflops"
        else:
            fma, how = _compiled_fma(threads), "compiled loop of multiply-adds"
        if fma is not None and fma < sgemm:
            fma, how = sgemm, f"torch.mm, faster than the {how} in this run"
    if fma is None:
        fma, how = sgemm, "no multiply-add loop here: torch.mm in float32, a lower bound"
    elements = STREAM_BYTES // 4
    x, y = (torch.randn(elements, device=device) for _ in range(2))
    copy = 2 * STREAM_BYTES / _best(lambda: y.copy_(x), device)
    update = 3 * STREAM_BYTES / _best(lambda: y.lerp_(x, 0.01), device)
    size = f"{STREAM_BYTES >> 20} MB"
    return [
        _record("fma", fma, "FLOP/s", how),
        _record("sgemm", sgemm, "FLOP/s", f"torch.mm, {GEMM_N} square, float32"),
        _record("copy", copy, "B/s", f"torch copy_, {size}, read + write"),
        _record("bandwidth", max(update, copy), "B/s", f"best of copy_ and lerp_, {size}"),
    ]
