# SPDX-License-Identifier: Apache-2.0
"""EMA and enqueue on a GPU: verified against float64, then timed against what else there is.

    python -m benchmarks.cuda_updates [--csv FILE] [--seconds S] [--dry-run]

Contenders take turns within one run; reported are the median and the 20th and 80th percentile of a
call, measured between two events around a batch of calls on a busy stream, and GB/s by the bytes
that an update must move (12 an element for a float32 EMA; see benchmarks/cuda_bytes.py).
``--dry-run`` uses CPU tensors, small sizes and the host's clock: it shows that this program works
and no more.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import sslkernels
from benchmarks.cuda_bytes import resnet50_sizes

DECAY = 0.999
FIELDS = (
    "op provider shape dtype metric unit p50 p20 p80 gb_per_s device backend torch sha date"
).split()


@dataclass
class Contender:
    """One way to do an update, on state of its own."""

    name: str
    step: Callable[[], Any]
    result: Callable[[], Tensor]  # what one step from the start gives, to compare with the truth


@dataclass
class Case:
    """One update at one size."""

    op: str
    shape: str
    dtype: str
    needed_bytes: int
    truth: Tensor  # float64
    tolerance: float
    contenders: list[Contender]


def flat(tensors: Sequence[Tensor]) -> Tensor:
    """All elements in one float64 vector."""
    return torch.cat([t.reshape(-1).double() for t in tensors])


def ema_case(name: str, sizes: Sequence[int], target_dtype: torch.dtype, device: str) -> Case:
    """float32 sources into targets of a dtype; the same start for every contender."""
    generator = torch.Generator(device).manual_seed(0)
    start = [torch.randn(n, generator=generator, device=device).to(target_dtype) for n in sizes]
    sources = [torch.randn(n, generator=generator, device=device) for n in sizes]
    truth = DECAY * flat(start) + (1 - DECAY) * flat(sources)
    same = target_dtype == torch.float32

    def contender(label: str, step: Callable[[list[Tensor]], Any]) -> Contender:
        targets = [t.clone() for t in start]
        return Contender(label, lambda: step(targets), lambda: flat(targets))

    def loop(targets: list[Tensor]) -> None:
        for t, s in zip(targets, sources, strict=True):
            t.mul_(DECAY).add_(s.to(t.dtype), alpha=1 - DECAY)

    def rebinding_loop(targets: list[Tensor]) -> None:
        for t, s in zip(targets, sources, strict=True):
            t.data = t.data * DECAY + s.data.to(t.dtype) * (1 - DECAY)

    def foreach(targets: list[Tensor]) -> None:
        cast = sources if same else [s.to(target_dtype) for s in sources]
        torch._foreach_lerp_(targets, cast, weight=1 - DECAY)

    contenders = [
        contender("sslkernels", lambda t: sslkernels.ema_update_(t, sources, DECAY)),
        contender("foreach_lerp", foreach),
        contender("loop_mul_add", loop),
        contender("loop_data", rebinding_loop),
    ]
    if not same:
        contenders.insert(
            1,
            contender(
                "sslkernels_stochastic",
                lambda t: sslkernels.ema_update_(t, sources, DECAY, stochastic_rounding=True),
            ),
        )
    bytes_each = 2 * start[0].element_size() + 4
    tolerance = 1e-6 if same else 2 * torch.finfo(target_dtype).eps
    shape = f"{name}: {len(sizes)} tensors, {sum(sizes)} elements"
    dtype = str(target_dtype).removeprefix("torch.")
    return Case("ema", shape, dtype, bytes_each * sum(sizes), truth, tolerance, contenders)


def enqueue_case(N: int, D: int, K: int, device: str) -> Case:
    """float32 keys into an empty queue; the result compared is the first N rows."""
    generator = torch.Generator(device).manual_seed(0)
    keys = torch.randn(N, D, generator=generator, device=device)
    truth = torch.nn.functional.normalize(keys.double(), dim=1).reshape(-1)
    ours = sslkernels.KeyQueue(K, D).to(device)
    queue, ptr = torch.zeros(K, D, device=device), torch.zeros(1, dtype=torch.int64, device=device)
    columns, moco_ptr = torch.zeros(D, K, device=device), ptr.clone()

    def torch_rows() -> None:
        rows = (ptr + torch.arange(N, device=device)).remainder_(K)
        queue.index_copy_(0, rows, torch.nn.functional.normalize(keys, dim=1))
        ptr.add_(N).remainder_(K)

    def moco() -> None:
        at = int(moco_ptr)
        columns[:, at : at + N] = torch.nn.functional.normalize(keys, dim=1).T
        moco_ptr[0] = (at + N) % K

    def moco_with_clone() -> None:
        columns.clone()
        moco()

    rows = [
        Contender("sslkernels", lambda: ours.enqueue(keys), lambda: ours.queue[:N].reshape(-1)),
        Contender("torch_rows", torch_rows, lambda: queue[:N].reshape(-1)),
        Contender("official_moco", moco, lambda: columns[:, :N].T.reshape(-1)),
        Contender("official_moco_clone", moco_with_clone, lambda: columns[:, :N].T.reshape(-1)),
    ]
    return Case("enqueue", f"N={N} D={D} K={K}", "float32", 8 * N * D, truth, 1e-6, rows)


def verify(case: Case) -> None:
    """One step of every contender against float64.

    Raises:
        RuntimeError: A contender is off by more than its tolerance.
    """
    for contender in case.contenders:
        contender.step()
        error = (contender.result().double() - case.truth).abs()
        relative = (error / (case.truth.abs() + 1.0)).max().item()
        if not relative <= case.tolerance:
            raise RuntimeError(
                f"{case.op} {case.shape} {case.dtype}: {contender.name} is off by {relative:.3e}, "
                f"more than {case.tolerance:.1e}"
            )


def time_batch(step: Callable[[], Any], calls: int, on_gpu: bool) -> float:
    """Seconds a call within one batch."""
    if not on_gpu:
        begin = time.perf_counter()
        for _ in range(calls):
            step()
        return (time.perf_counter() - begin) / calls
    begin_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin_event.record()
    for _ in range(calls):
        step()
    end_event.record()
    end_event.synchronize()
    return begin_event.elapsed_time(end_event) / 1e3 / calls


def measure(case: Case, seconds: float, on_gpu: bool) -> dict[str, list[float]]:
    """Times of every contender, one batch each in turn until the time is used up."""
    calls = {}
    for contender in case.contenders:
        for _ in range(3):
            contender.step()
        calls[contender.name] = max(1, int(2e-3 / max(time_batch(contender.step, 3, on_gpu), 1e-9)))
    times: dict[str, list[float]] = {c.name: [] for c in case.contenders}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[case.contenders[0].name]) < 5:
        for contender in case.contenders:
            times[contender.name].append(time_batch(contender.step, calls[contender.name], on_gpu))
    return times


def cases(device: str, small: bool) -> list[Callable[[], Case]]:
    """What is measured; made one after another, since each holds several copies of a model."""
    resnet = resnet50_sizes()
    models = {"ResNet-50": resnet, "40 tensors of 64": [64] * 40}
    if small:
        models = {"a few": [1000, 7, 33], "40 tensors of 64": [64] * 40}
    out: list[Callable[[], Case]] = []
    for name, sizes in models.items():
        for dtype in (torch.float32, torch.bfloat16):
            out.append(lambda n=name, s=sizes, d=dtype: ema_case(n, s, d, device))
    for N, D, K in ((8, 16, 64),) if small else ((256, 128, 65536), (4096, 256, 65536)):
        out.append(lambda N=N, D=D, K=K: enqueue_case(N, D, K, device))
    return out


def git_sha() -> str:
    """The commit, or "unknown" outside of a repository."""
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parent,
    )
    return done.stdout.strip() or "unknown"


def run(device: str, seconds: float, small: bool) -> list[dict[str, Any]]:
    """Rows of the CSV; each case verified first."""
    on_gpu = device == "cuda"
    facts = {
        "device": torch.cuda.get_device_name() if on_gpu else "cpu (dry run)",
        "backend": sslkernels.info().backends[f"{device}/updates"],
        "torch": torch.__version__,
        "sha": git_sha(),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    }
    rows = []
    for make in cases(device, small):
        case = make()
        verify(case)
        for provider, seen in measure(case, seconds, on_gpu).items():
            values = torch.tensor(seen, dtype=torch.float64)
            p20, p50, p80 = values.quantile(torch.tensor([0.2, 0.5, 0.8]).double()).tolist()
            row = {"op": case.op, "provider": provider, "shape": case.shape, "dtype": case.dtype}
            row |= {"metric": "time", "unit": "us", "p50": f"{p50 * 1e6:.2f}"}
            row |= {"p20": f"{p20 * 1e6:.2f}", "p80": f"{p80 * 1e6:.2f}"}
            row |= {"gb_per_s": f"{case.needed_bytes / p50 / 1e9:.1f}", **facts}
            rows.append(row)
            print(
                f"{case.op:8} {case.shape:46} {case.dtype:9} {provider:22} {row['p50']:>9} us "
                f"[{row['p20']}, {row['p80']}] {row['gb_per_s']:>8} GB/s"
            )
    return rows


@torch.no_grad()
def main(arguments: Sequence[str] | None = None) -> int:
    """Run and write."""
    parser = argparse.ArgumentParser(description="EMA and enqueue on a GPU")
    parser.add_argument("--csv", type=Path, help="where to write the rows")
    parser.add_argument("--seconds", type=float, default=1.0, help="time for each case")
    parser.add_argument("--dry-run", action="store_true", help="small sizes on the CPU")
    options = parser.parse_args(arguments)
    if not options.dry_run and not torch.cuda.is_available():
        print("cuda_updates: no CUDA device; --dry-run shows that the program works")
        return 2
    device = "cpu" if options.dry_run else "cuda"
    rows = run(
        device, min(options.seconds, 0.01) if options.dry_run else options.seconds, options.dry_run
    )
    if options.csv is not None:
        with options.csv.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, FIELDS)
            writer.writeheader()
            writer.writerows(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
