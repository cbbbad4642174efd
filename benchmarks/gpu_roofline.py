# SPDX-License-Identifier: Apache-2.0
"""A roofline on paper: the least time the GPU kernels can take by the data sheets.

**A model, never a measurement.**  A kernel takes at least as long as the slowest of: its products on
the matrix units, its bytes from device memory (each operand once), its exponentials.  What the model
leaves out (reads of tiles from the L2 cache, comparisons, the fill of the pipeline, launches) only adds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from sslkernels.backends.triton.plan import PANEL_WORDS, SLOT_WORDS


@dataclass(frozen=True)
class Device:
    """Dense peaks of a data sheet."""

    name: str
    half_flops: float  # bfloat16 and float16 on matrix units, without sparsity
    fp32_flops: float  # float32 without TF32
    bytes_per_s: float
    exps_per_s: float  # multiprocessors * exponentials a clock * boost clock


# NVIDIA H100 SXM, H200 SXM and B200 (HGX) data sheets; 16 exponentials a clock and multiprocessor from the
# throughput table of the CUDA C++ programming guide.  AMD MI300X data sheet; CDNA 3 runs
# transcendentals at a quarter of the rate of its 64 lanes.
DEVICES = (
    Device("H100", 989e12, 67e12, 3.35e12, 132 * 16 * 1.98e9),
    Device("H200", 989e12, 67e12, 4.8e12, 132 * 16 * 1.98e9),
    Device("B200", 2250e12, 75e12, 8.0e12, 148 * 16 * 1.965e9),
    Device("MI300X", 1307e12, 163e12, 5.3e12, 304 * 16 * 2.1e9),
)


@dataclass(frozen=True)
class Work:
    """What a kernel must do at least."""

    flops: float
    bytes: float
    exps: float


def _operands(N: int, M: int, D: int, size: int) -> float:
    return float(size * (N + M) * D)


def _panels(N: int, M: int, D: int, size: int) -> float:
    """Where the gradient goes by panels (D > 512, float32 > 64; Hopper): G, and y twice for each panel."""
    if D <= 512 and not (size == 4 and D > 64):
        return 0.0
    words = min(max((N + M) * D, SLOT_WORDS), max(PANEL_WORDS, M * D))
    panels = max(1, -(-N * M // words))
    return 2.0 * size * N * M + 2.0 * size * M * D * panels


# name -> work(N, M, D, bytes of an element).  Self mode has M = N and reads one operand.  Exponentials:
# one a pair, where the logits (forward) or log-sum-exps (backward) of a tile lie close together; else two.
KERNELS: dict[str, Callable[[int, int, int, int], Work]] = {
    "forward, self (NT-Xent, SupCon): one triangle, rows and columns": lambda N, M, D, b: Work(
        N * N * D, b * N * D + 4 * N, N * N / 2
    ),
    "backward, self: G + G^T in one pass": lambda N, M, D, b: Work(
        4 * N * N * D, (b + 4) * N * D + _panels(N, N, D, b), N * N
    ),
    "forward, rows and columns (CLIP)": lambda N, M, D, b: Work(
        2 * N * M * D, _operands(N, M, D, b) + 4 * (N + M), N * M
    ),
    "backward, both sides (CLIP): dq and dk": lambda N, M, D, b: Work(
        8 * N * M * D,
        2 * _operands(N, M, D, b) + 4 * (N + M) * D + _panels(N, M, D, b) + _panels(M, N, D, b),
        2 * N * M,
    ),
    "attend (MoCo): forward and gradient": lambda N, M, D, b: Work(
        (6 if _panels(N, M, D, b) else 4) * N * M * D,
        _operands(N, M, D, b) + 4 * N * D + _panels(N, M, D, b),
        N * M,
    ),
    "extremes (batch-hard triplet)": lambda N, M, D, b: Work(2 * N * M * D, b * N * D + 16 * N, 0),
}

# (kernel prefix, N, M, D): what the methods use.
SHAPES = (
    ("forward, self", 1024, 1024, 128),
    ("backward, self", 1024, 1024, 128),
    ("forward, self", 8192, 8192, 128),
    ("backward, self", 8192, 8192, 128),
    ("forward, self", 65536, 65536, 256),
    ("backward, self", 65536, 65536, 256),
    ("forward, rows", 32768, 32768, 512),
    ("backward, both", 32768, 32768, 512),
    ("forward, rows", 262144, 262144, 1024),
    ("backward, both", 262144, 262144, 1024),
    ("attend", 256, 65536, 128),
    ("extremes", 4096, 4096, 256),
)


def bound(device: Device, work: Work, size: int) -> tuple[float, str]:
    """Least time in seconds and what it is spent on."""
    peak = device.fp32_flops if size == 4 else device.half_flops
    times = {
        "products": work.flops / peak,
        "bytes": work.bytes / device.bytes_per_s,
        "exponentials": work.exps / device.exps_per_s,
    }
    reason = max(times, key=lambda key: times[key])
    return times[reason], reason


def _time(seconds: float) -> str:
    for unit, scale in (("s", 1.0), ("ms", 1e3), ("µs", 1e6)):
        if seconds * scale >= 1.0:
            return f"{seconds * scale:.3g} {unit}"
    return f"{seconds * 1e6:.2g} µs"


def table() -> list[str]:
    """Markdown lines: least time and its reason (P products, B bytes, E exponentials)."""
    lines = [
        "| kernel | N | M | D | dtype | GFLOP | MB | G exp | "
        + " | ".join(device.name for device in DEVICES)
        + " |",
        "|---|" + "---:|" * (7 + len(DEVICES)),
    ]
    for prefix, N, M, D in SHAPES:
        name, work_of = next((k, v) for k, v in KERNELS.items() if k.startswith(prefix))
        for dtype, size in (("bfloat16", 2), ("float32", 4)):
            work = work_of(N, M, D, size)
            cells = []
            for device in DEVICES:
                seconds, reason = bound(device, work, size)
                cells.append(f"{_time(seconds)} {reason[0].upper()}")
            lines.append(
                f"| {name.split(':')[0]} | {N} | {M} | {D} | {dtype} | {work.flops / 1e9:.4g} | "
                f"{work.bytes / 1e6:.4g} | {work.exps / 1e9:.3g} | " + " | ".join(cells) + " |"
            )
    return lines


if __name__ == "__main__":
    print("\n".join(table()))
