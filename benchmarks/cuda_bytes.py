# SPDX-License-Identifier: Apache-2.0
"""What EMA and enqueue must move and launch on a GPU, ours and others': a model, not a measurement.

Bytes are counted from what each operation reads and writes once, caches assumed to hold nothing
between two launches and everything within one.  Launches are counted from the calls: one a
pointwise or reduction op, and for ``torch._foreach_*`` as ATen cuts lists into launches.  Times are
bytes over the nominal bandwidth, the least there can be.

    python -m benchmarks.cuda_bytes           print the tables
    python -m benchmarks.cuda_bytes --write   put them into docs/cuda.md
    python -m benchmarks.cuda_bytes --check   exit with 1 if docs/cuda.md is not up to date
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "cuda.md"
BEGIN, END = "<!-- begin benchmarks/cuda_bytes.py -->", "<!-- end benchmarks/cuda_bytes.py -->"

BANDWIDTH = 3.35e12  # bytes/s, H100 SXM by its data sheet
EMA_CHUNK = 4096  # elements, csrc/cuda/launchers.h
EMA_TENSOR_BYTES, EMA_CHUNK_BYTES = 40, 16  # rows of the plan's table, csrc/cuda/launchers.h

# ATen/native/cuda/MultiTensorApply.cuh, lists of depth 2: elements a chunk, and tensors and chunks
# a launch with 4 KB of kernel arguments (CUDA 12 builds) and with 32 KB (CUDA 13 builds).
FOREACH_CHUNK = 65536
FOREACH_LIMITS = {"4 KB arguments": (64, 320), "32 KB arguments": (448, 2240)}


def resnet50_sizes() -> list[int]:
    """Elements of the 161 parameters of ResNet-50 in order: 25,557,032 in all."""
    sizes = [64 * 3 * 49, 64, 64]
    channels = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            out = 4 * width
            for n_in, n_out, kernel in (
                (channels, width, 1),
                (width, width, 9),
                (width, out, 1),
            ):
                sizes += [n_in * n_out * kernel, n_out, n_out]
            if block == 0:
                sizes += [channels * out, out, out]
            channels = out
    return [*sizes, 1000 * channels, 1000]


def foreach_launches(sizes: Sequence[int], max_tensors: int, max_chunks: int) -> int:
    """Launches of a ``torch._foreach`` op on two lists."""
    launches = tensors = chunks = 0
    for n in sizes:
        n_chunks = math.ceil(n / FOREACH_CHUNK)
        tensors += 1 if n_chunks else 0
        for chunk in range(n_chunks):
            chunks += 1
            last = chunk == n_chunks - 1
            if (tensors == max_tensors and last) or chunks == max_chunks:
                launches += 1
                tensors, chunks = (0 if last else 1), 0
    return launches + (1 if chunks else 0)


@dataclass(frozen=True)
class Row:
    """One way to do an update."""

    name: str
    launches: int | str
    total_bytes: float
    least: float  # bytes that any way of doing the same must move
    note: str = ""

    def cells(self, unit: float) -> list[str]:
        """Cells of the table; ``unit`` is what the bytes are divided by (elements)."""
        return [
            self.name,
            str(self.launches),
            f"{self.total_bytes / unit:.1f}",
            f"{self.total_bytes / 1e6:.1f}",
            f"{self.total_bytes / BANDWIDTH * 1e6:.1f}",
            f"{self.total_bytes / self.least:.2f}",
            self.note,
        ]


def ema_rows() -> tuple[list[Row], int]:
    """EMA of ResNet-50, float32 unless said otherwise; rows and the number of elements."""
    sizes = resnet50_sizes()
    n, count = sum(sizes), len(sizes)
    chunks = sum(math.ceil(size / EMA_CHUNK) for size in sizes)
    table = count * EMA_TENSOR_BYTES + chunks * EMA_CHUNK_BYTES
    foreach = {k: foreach_launches(sizes, *limits) for k, limits in FOREACH_LIMITS.items()}
    a_launch = " or ".join(str(v) for v in foreach.values())
    single, mixed, half = 12 * n, 10 * n, 6 * n
    return [
        Row("ours: read t, s; write t", 1, single + table, single, "and the table of the plan"),
        Row("`torch._foreach_lerp_`", a_launch, single, single,
            "4 KB or 32 KB of kernel arguments"),
        Row("timm `ModelEmaV3`, foreach", f"{a_launch}, + 53", single, single,
            "the same, and a copy for each integer buffer"),
        Row("loop: `t.mul_(d).add_(s, alpha=1-d)`", 2 * count, 20 * n, single,
            "t makes two round trips"),
        Row("loop: `t.data = t.data*d + s.data*(1-d)`", 3 * count, 28 * n, single,
            "two temporaries; rebinds memory"),
        Row("ours, float32 average of bfloat16", 1, mixed + table, mixed, "read 4 + 2, write 4"),
        Row("the same by a cast and `_foreach_lerp_`", 2 * foreach["4 KB arguments"], 18 * n, mixed,
            "the float32 copy is written and read"),
        Row("ours, bfloat16, stochastic rounding", 1, half + table, half,
            "bound by arithmetic, see above"),
    ], n  # fmt: skip


def queue_rows(N: int = 256, D: int = 128, K: int = 65536) -> tuple[list[Row], int]:
    """Enqueue of N float32 keys into K rows; rows and the number of elements of the batch."""
    n = N * D
    normalise = 4 * (n + N) + 8 * N + 4 * (n + N + n)  # norm; clamp; division
    counters = 4 * 8
    least = 8 * n
    return [
        Row("ours", 1, least + counters, least, "no host sync"),
        Row("torch on [K, D] (backend `chunked`)", 11, normalise + least + 48 * N + 2 * counters,
            least, "no host sync; 48 N for the row numbers"),
        Row("official MoCo, [D, K]", 5, normalise + least + counters, least,
            "`int(queue_ptr)` waits for the device"),
        Row("official MoCo with `queue.clone()`", 6, normalise + least + counters + 8 * K * D,
            least, "as in each of its training steps"),
    ], n  # fmt: skip


def optimiser_rows() -> tuple[list[Row], int]:
    """Optimiser step and EMA, apart and in one kernel, float32."""
    n = sum(resnet50_sizes())
    sgd, adam = 28 * n, 36 * n
    return [
        Row(
            "SGD with momentum, then EMA",
            2,
            32 * n,
            sgd,
            "read p, g, m, write p, m; read p, t, write t",
        ),
        Row("SGD with momentum and EMA, one kernel", 1, sgd, sgd, "p is not read again"),
        Row(
            "AdamW (fused), then EMA",
            2,
            40 * n,
            adam,
            "read p, g, m, v, write p, m, v; read p, t, write t",
        ),
        Row("AdamW and EMA, one kernel", 1, adam, adam, "p is not read again"),
    ], n


def table(title: str, rows: Sequence[Row], unit: int) -> Iterator[str]:
    """Lines of a Markdown table."""
    head = ["", "launches", "B / element", "MB", "µs at 3.35 TB/s", "× least", ""]
    yield from (f"**{title}**", "", f"| {' | '.join(head)} |", "|" + "---|" * len(head))
    for row in rows:
        yield f"| {' | '.join(row.cells(unit))} |"
    yield ""


def report() -> str:
    """All tables as Markdown."""
    sizes = resnet50_sizes()
    ema, n = ema_rows()
    queue, n_queue = queue_rows()
    optimiser, _ = optimiser_rows()
    lines = [
        *table(f"EMA of ResNet-50 ({len(sizes)} tensors, {n:,} elements)", ema, n),
        *table("Enqueue, N = 256, D = 128, K = 65536, float32", queue, n_queue),
        *table("Optimiser step and EMA of ResNet-50, float32", optimiser, n),
    ]
    return "\n".join(lines).rstrip()


def updated(text: str) -> str:
    """The document with fresh tables between its marks."""
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"{DOCUMENT.name} must contain {BEGIN!r} and {END!r} once each")
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{report()}\n{END}{rest.split(END)[1]}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Print, write or check."""
    parser = argparse.ArgumentParser(description="model of bytes moved by the CUDA updates")
    parser.add_argument("--write", action="store_true", help="put the tables into docs/cuda.md")
    parser.add_argument("--check", action="store_true", help="exit 1 if docs/cuda.md is stale")
    options = parser.parse_args(arguments)
    if not (options.write or options.check):
        print(report())
        return 0
    text = DOCUMENT.read_text(encoding="utf-8")
    fresh = updated(text)
    if options.write:
        DOCUMENT.write_text(fresh, encoding="utf-8")
    elif fresh != text:
        print(f"{DOCUMENT.name} is stale: run python -m benchmarks.cuda_bytes --write")
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
