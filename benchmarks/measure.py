# SPDX-License-Identifier: Apache-2.0
"""What runs in a process of its own: times of one op, or the peak memory of one contender.

``python -m benchmarks.measure`` reads a job as JSON from stdin and prints its result as the last
line.  ``runner.py`` starts it, because thread binding and the allocator are fixed at start.
"""

from __future__ import annotations

import ctypes
import gc
import json
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import Case
from benchmarks.ceilings import cpu_extension, measure_ceilings
from benchmarks.contender import Contender, Missing
from benchmarks.contenders import CONTENDERS

TOLERANCE = {"float64": 1e-9, "float32": 1e-3, "bfloat16": 3e-2, "float16": 5e-3}
MIN_ROUNDS, MAX_ROUNDS = 5, 200
MIN_SAMPLE = 5e-3  # seconds: shorter calls are repeated within one sample
WARM_UP = 0.1  # seconds: a sample of shorter calls follows one that does not count
L2_FLUSH_BYTES = 256 << 20
LINE_EXCHANGES = 4000  # some milliseconds at most

Record = dict[str, Any]


class WrongResult(Exception):
    """A contender's result differs from float64 by more than its tolerance."""


def verify(name: str, case: Case, contender: Contender, truth: list[Tensor]) -> float:
    """The largest relative error, by norm, over loss and gradients or over updated tensors."""
    results = contender.results()
    if len(results) != len(truth):
        raise WrongResult(f"{name}: {len(results)} results for {len(truth)}")
    limit = contender.tolerance or TOLERANCE[case.dtype]
    worst = 0.0
    for got, want in zip(results, truth, strict=True):
        error = torch.linalg.vector_norm(got.double() - want)
        worst = max(worst, float(error / torch.linalg.vector_norm(want).clamp(min=1e-30)))
        if not worst <= limit:  # also for NaN
            raise WrongResult(f"relative error {worst:.2e} against float64, allowed {limit:.0e}")
    return worst


def make(name: str, case: Case) -> Contender:
    """A contender with inputs of its own."""
    table = CONTENDERS[case.op]
    if name not in table:
        raise Missing(f"no such contender of {case.op}; there are {', '.join(table)}")
    return table[name](case, case.inputs())


def _timer(device: str) -> Callable[[Callable[[], object], int], float]:
    """A function (step, repeats) -> seconds a call."""
    if device != "cuda":

        def on_cpu(step: Callable[[], object], repeats: int) -> float:
            start = time.perf_counter()
            for _ in range(repeats):
                step()
            return (time.perf_counter() - start) / repeats

        return on_cpu
    flush = torch.empty(L2_FLUSH_BYTES, dtype=torch.int8, device=device)

    def on_gpu(step: Callable[[], object], repeats: int) -> float:
        total = 0.0
        for _ in range(repeats):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            flush.zero_()  # the step finds its inputs in memory, as in training
            begin.record()
            step()
            end.record()
            end.synchronize()
            total += begin.elapsed_time(end) * 1e-3
        return total / repeats

    return on_gpu


def _line_timer(case: Case) -> Callable[[], float] | None:
    """Seconds in which a cache line goes to the other core and back; None: one thread, or a GPU."""
    extension = cpu_extension()
    if extension is None or case.device != "cpu" or torch.get_num_threads() < 2:
        return None
    return lambda: float(extension.round_trip(exchanges=LINE_EXCHANGES))


def measure_times(
    case: Case, names: list[str], budget: float, rounds: int | None = None
) -> list[Record]:
    """Verify all, warm up all, then time them in turn until ``budget`` seconds are used.

    ``rounds``: at least that many, ``MIN_ROUNDS`` if it is None; 0 verifies only.
    """
    rounds = MIN_ROUNDS if rounds is None else rounds
    truth = case.truth()
    records: list[Record] = []
    ready: dict[str, Contender] = {}
    for name in names:
        try:
            contender = make(name, case)
            error = verify(name, case, contender, truth)
        except (Missing, WrongResult) as problem:
            kind = "missing" if isinstance(problem, Missing) else "wrong"
            records.append({"provider": name, "metric": kind, "note": str(problem)})
            continue
        except torch.cuda.OutOfMemoryError:
            raise  # whose memory it was is not known: the caller decides who is left out
        except Exception as problem:
            # Whatever a library raises: the others are measured all the same.
            note = f"{type(problem).__name__}: {problem}"[:300]
            records.append({"provider": name, "metric": "failed", "note": note})
            continue
        ready[name] = contender
        records.append({"provider": name, "metric": "error", "values": [error] * 3, "unit": "1"})
    del truth
    if not ready or rounds == 0:
        return records
    timer = _timer(case.device)
    repeats: dict[str, int] = {}
    warm: dict[str, bool] = {}
    for name, contender in ready.items():
        timer(contender.step, 1)  # the second call, after verify
        once = timer(contender.step, 1)
        repeats[name] = max(1, min(1000, int(MIN_SAMPLE / max(once, 1e-7))))
        warm[name] = once < WARM_UP
    samples: dict[str, list[float]] = {name: [] for name in ready}
    line_timer = _line_timer(case)
    round_trips: list[float] = []
    order = list(ready)
    shuffle = random.Random(0).shuffle
    gc.collect()
    gc.disable()
    start = time.perf_counter()
    for done in range(MAX_ROUNDS):
        if done >= rounds and time.perf_counter() - start > budget:
            break
        if line_timer is not None:
            round_trips.append(line_timer())
        shuffle(order)  # nobody always follows the same neighbour
        for name in order:
            if warm[name]:  # the caches are what another contender left
                timer(ready[name].step, 1)
            samples[name].append(timer(ready[name].step, repeats[name]))
    gc.enable()
    for name, seconds in samples.items():
        p25, p50, p75 = statistics.quantiles(seconds, n=4, method="inclusive")
        records.append(
            {
                "provider": name,
                "metric": "time",
                "values": [p25, p50, p75],
                "unit": "s",
                "note": f"{len(seconds)} rounds of {repeats[name]}",
            }
        )
    if round_trips:
        values = statistics.quantiles(round_trips, n=4, method="inclusive")
        records.append(
            {"provider": "cache line", "metric": "round_trip", "values": values, "unit": "s"}
        )
    return records


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text("ascii").splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise Missing(f"/proc/self/status has no {field}")


def measure_memory(case: Case, name: str) -> list[Record]:
    """Peak of resident memory (allocated memory on a GPU) over that before the step, in bytes.

    A step that ran before has loaded libraries and compiled code; what it freed goes back to the
    system, so that nothing is hidden in pages that the allocator or our kernels kept.
    """
    record: Record = {"provider": name, "metric": "extra_memory", "unit": "B"}
    try:
        contender = make(name, case)
        contender.step()
        for leaf in contender.leaves:
            leaf.grad = None
        gc.collect()
        if case.device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            contender.step()
            torch.cuda.synchronize()
            extra = torch.cuda.max_memory_allocated() - before
        else:
            if not hasattr(ctypes.CDLL(None), "malloc_trim"):
                raise Missing("peak memory needs glibc's malloc_trim")
            ctypes.CDLL(None).malloc_trim(0)
            extension = cpu_extension()
            if extension is not None:
                extension.release_workspaces()
            try:
                Path("/proc/self/clear_refs").write_text("5", "ascii")
            except OSError as error:
                raise Missing(f"the peak can't be reset: {error}") from None
            before = _status("VmRSS")
            contender.step()
            extra = _status("VmHWM") - before
    except Missing as problem:
        return [{**record, "metric": "missing", "note": str(problem)}]
    return [{**record, "values": [max(0, extra)] * 3}]


def main() -> int:
    """Run the job on stdin."""
    job = json.load(sys.stdin)
    torch.set_num_threads(job["threads"])
    if job["kind"] == "ceilings":
        result: list[Record] = measure_ceilings(job["device"], job["threads"])
    elif job["kind"] == "memory":
        result = measure_memory(Case(**job["case"]), job["names"][0])
    else:
        result = measure_times(Case(**job["case"]), job["names"], job["budget"])
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
