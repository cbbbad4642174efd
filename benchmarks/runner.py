# SPDX-License-Identifier: Apache-2.0
"""Plans the measurements, starts a process for each, and turns their records into rows of a CSV."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

import sslkernels
from benchmarks.cases import Case
from benchmarks.contenders import CONTENDERS, OURS

ROOT = Path(__file__).resolve().parents[1]
COLUMNS = (
    "op", "provider", "mode", "metric", "unit", "shape", "size", "dim", "batch", "dtype",
    "allocator", "p25", "p50", "p75", "note", "device", "cpu", "isa", "threads", "torch",
    "sslkernels", "commit", "date",
)  # fmt: skip
DEFAULT, KEPT = "default", "pages kept"
# glibc keeps what is freed: no page is given back to the system and faulted in again.
KEEP_PAGES = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(1 << 46),
    "MALLOC_TOP_PAD_": str(64 << 20),
}
Row = dict[str, Any]


@dataclass
class Job:
    """One process: times of one case, or the memory of one contender."""

    case: Case
    names: list[str]
    kind: str = "time"
    allocator: str = DEFAULT
    # Contenders of the op that this run leaves out, with the reason.
    left_out: dict[str, str] = field(default_factory=dict)


def times(case: Case, only: Iterable[str] | None, skip: dict[str, str], **kwargs: Any) -> Job:
    """A job with every contender of the op, or with those of ``only``."""
    table = CONTENDERS[case.op]
    elsewhere = {n for other in CONTENDERS.values() for n in other} - set(table)
    asked = table if only is None else [n for n in only if n not in elsewhere]
    names = [n for n in asked if n not in skip]
    left_out = {n: skip[n] for n in table if n in skip and (only is None or n in only)}
    return Job(case, names, left_out=left_out, **kwargs)


HEADLINE_SKIP = "left out of the headline run at this size; --full has it"
BIG = ("chunked", "eager", "lightly", "sslkernels", "torch.compile")


def headline_plan(base: dict[str, Any], only: list[str] | None) -> list[Job]:
    """2 to 4 minutes on two cores."""

    def case(op: str, size: int, **changes: Any) -> Case:
        return Case(op, size, **{**base, **changes})

    def wanted(names: Iterable[str]) -> list[str]:
        return [n for n in names if only is None or n in only]

    jobs = []
    slow = {"pytorch-metric-learning": HEADLINE_SKIP}
    compiled = {"torch.compile": HEADLINE_SKIP}
    for size in (64, 128, 256, 512, 2048, 4096, 8192):
        skip = {} if size == 256 else dict(slow)
        skip |= {} if size in (2048, 8192) else compiled
        jobs.append(times(case("nt_xent", size), only, skip))
    for size, dim in ((2002, 128), (2048, 100), (2048, 129)):
        skip = {n: HEADLINE_SKIP for n in CONTENDERS["nt_xent"] if n not in ("sslkernels", "eager")}
        jobs.append(times(case("nt_xent", size, dim=dim), only, skip))
    for size in (4096, 8192):
        skip = {n: HEADLINE_SKIP for n in CONTENDERS["nt_xent"] if n not in BIG}
        skip |= {} if size == 8192 else compiled
        jobs.append(times(case("nt_xent", size), only, skip, allocator=KEPT))
    jobs.append(times(case("moco", 65536), only, {}))
    jobs.append(times(case("enqueue", 65536), only, {}))
    jobs += [times(case("ema", size), only, {}) for size in (40, 161)]
    jobs += [
        times(case(op, 2048), only, compiled | slow)
        for op in ("info_nce", "clip", "siglip", "sup_con", "triplet")
    ]
    made = [case("features", 16), case("adversarial", 256, dim=900)]
    made += [case(op, 4096, dim=784) for op in ("vae", "vae_step", "reparameterize")]
    jobs += [times(c, only, compiled) for c in made]
    usual = (OURS, "eager", "torch.nn.functional")
    jobs += [Job(c, [n], "memory") for c in made for n in wanted(usual) if n in CONTENDERS[c.op]]
    jobs += [Job(case("nt_xent", 8192), [name], "memory") for name in wanted(BIG)]
    moco = (OURS, "eager", "MoCo [D, K]")
    jobs += [Job(case("moco", 65536), [name], "memory") for name in wanted(moco)]
    return jobs


def full_plan(base: dict[str, Any], only: list[str] | None) -> list[Job]:
    """Every op, contender and doubling: tens of minutes."""

    def case(op: str, size: int, **changes: Any) -> Case:
        return Case(op, size, **{**base, **changes})

    jobs = []
    doublings = [64 << i for i in range(10)]  # 64 to 32768
    eager_memory = {
        n: "N x N matrices of several GB" for n in ("eager", "lightly", "torch.compile")
    }
    for size in doublings:
        jobs.append(times(case("nt_xent", size), only, eager_memory if size > 16384 else {}))
    for size, dim in ((2002, 128), (2048, 100), (2048, 129), (2048, 512), (130, 24)):
        jobs.append(times(case("nt_xent", size, dim=dim), only, {}))
    jobs += [
        times(case("nt_xent", size), only, {}, allocator=KEPT) for size in (2048, 4096, 8192, 16384)
    ]
    for dtype in ("float64", "bfloat16"):
        jobs.append(times(case("nt_xent", 2048, dtype=dtype), only, {}))
    jobs += [times(case("moco", 4096 << i), only, {}) for i in range(7)]
    jobs += [times(case("moco", 65536, batch=batch), only, {}) for batch in (1, 32)]
    jobs += [times(case("enqueue", 65536, batch=batch), only, {}) for batch in (32, 256)]
    jobs += [times(case("ema", size), only, {}) for size in (40, 161)]
    for op in ("info_nce", "clip", "siglip", "sup_con", "triplet"):
        jobs += [times(case(op, size), only, {}) for size in (256, 1024, 2048, 4096)]
    made = [case("features", size) for size in (4, 16)]
    made += [case("adversarial", size, dim=900) for size in (16, 256)]
    for op in ("vae", "vae_step", "reparameterize"):
        made += [case(op, size, dim=784) for size in (128, 4096)]
    jobs += [times(c, only, {}) for c in made]
    jobs += [
        Job(c, [n], "memory") for c in made for n in CONTENDERS[c.op] if only is None or n in only
    ]
    for size in (512, 1024, 2048, 4096, 8192, 16384):
        jobs += [
            Job(case("nt_xent", size), [n], "memory")
            for n in CONTENDERS["nt_xent"]
            if only is None or n in only
        ]
    jobs += [
        Job(case("moco", 65536), [n], "memory")
        for n in CONTENDERS["moco"]
        if only is None or n in only
    ]
    return jobs


def custom_plan(
    op: str, sizes: list[int], base: dict[str, Any], only: list[str] | None, memory: bool
) -> list[Job]:
    """What the command line asks for; unknown contenders come back as missing."""
    jobs = [times(Case(op, size, **base), only, {}) for size in sizes]
    if memory:
        jobs += [
            Job(Case(op, size, **base), [name], "memory")
            for size in sizes
            for name in (only or CONTENDERS[op])
        ]
    return jobs


def _run(job: dict[str, Any], threads: int, allocator: str, bind: bool) -> list[Row]:
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONWARNINGS": "ignore"}
    for name in ("OMP_PROC_BIND", "OMP_PLACES", *KEEP_PAGES):
        environment.pop(name, None)
    if bind:
        environment |= {"OMP_PROC_BIND": "close", "OMP_PLACES": "cores"}
    if allocator == KEPT:
        environment |= KEEP_PAGES
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.measure"],
        input=json.dumps({**job, "threads": threads}),
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        problem = f"the process ended with {done.returncode}: {last[:300]}"
        return [
            {"provider": name, "metric": "failed", "note": problem}
            for name in job.get("names", ["ceilings"])
        ]
    result: list[Row] = json.loads(done.stdout.splitlines()[-1])
    return result


def machine(device: str, threads: int) -> Row:
    """The columns that say where, with what and when."""
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        for line in Path("/proc/cpuinfo").read_text("utf-8").splitlines():
            if line.startswith("model name"):
                cpu = line.split(":", 1)[1].strip()
                break
    git = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else device,
        "cpu": cpu,
        "isa": sslkernels.info().isa,
        "threads": threads,
        "torch": torch.__version__,
        "sslkernels": sslkernels.__version__,
        "commit": git.stdout.strip() or "unknown",
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }


def _derived(case: Case, row: Row, ceilings: dict[str, float]) -> list[Row]:
    """Rate and share of the ceiling from a time; quartiles swap their places."""
    multiply_adds = "bf16" if row["provider"] == "sslkernels bf16" else "fma"
    for work, metric, unit, ceiling in (
        (case.flops, "rate", "FLOP/s", multiply_adds),
        (case.bytes_moved, "rate", "B/s", "bandwidth"),
    ):
        if work is None:
            continue
        quartiles = {a: work / row[b] for a, b in (("p25", "p75"), ("p50", "p50"), ("p75", "p25"))}
        rows = [{**row, **quartiles, "metric": metric, "unit": unit, "note": ""}]
        if case.dtype == "float32" and ceiling in ceilings:
            shares = {k: 100 * v / ceilings[ceiling] for k, v in quartiles.items()}
            rows.append({**row, **shares, "metric": "share", "unit": f"% of {ceiling}", "note": ""})
        return rows
    return []


def run_jobs(
    jobs: list[Job],
    device: str,
    threads: int,
    budget: float,
    bind: bool = True,
    say: Callable[[str], None] = print,
) -> list[Row]:
    """Run all jobs one after the other; one row a metric."""
    where = machine(device, threads)
    ceilings: dict[str, float] = {}
    rows: list[Row] = []

    def measure_ceilings() -> list[Row]:
        # Not bound: the threads of the loop are no OpenMP threads, they would share one core.
        records = _run({"kind": "ceilings", "device": device}, threads, DEFAULT, bind=False)
        for record in records:
            if "values" in record:
                name = record["provider"]
                ceilings[name] = max(ceilings.get(name, 0.0), record["values"][1])
        return records

    def finish(case: Case | None, allocator: str, records: list[Row]) -> None:
        for record in records:
            row = {**dict.fromkeys(COLUMNS, ""), **where, "allocator": allocator}
            if case is not None:
                row |= {k: v for k, v in asdict(case).items() if k in COLUMNS}
                row |= {"mode": case.mode, "shape": case.shape}
            values = record.get("values", ["", "", ""])
            row |= dict(zip(("p25", "p50", "p75"), values, strict=True))
            row |= {k: record.get(k, "") for k in ("provider", "metric", "unit", "note")}
            rows.append(row)
            if case is not None and row["metric"] == "time":
                rows.extend(_derived(case, row, ceilings))

    start = time.monotonic()
    first = measure_ceilings()
    results = []
    for index, job in enumerate(jobs):
        case = asdict(job.case)
        records = (
            _run(
                {"kind": job.kind, "case": case, "names": job.names, "budget": budget},
                threads,
                job.allocator,
                bind,
            )
            if job.names
            else []
        )
        records += [
            {"provider": n, "metric": "left out", "note": why} for n, why in job.left_out.items()
        ]
        results.append((job, records))
        say(
            f"[{time.monotonic() - start:5.0f} s] {index + 1}/{len(jobs)} {job.case.op} "
            f"{job.case.shape} {job.kind} ({job.allocator})"
        )
        for record in records:
            if record["metric"] in ("wrong", "failed"):
                say(f"    {record['provider']} {record['metric']}: {record['note']}")
    again = measure_ceilings()  # a disturbed first reading must not flatter anyone
    for record in again if "values" in again[0] else first:
        if "values" in record:
            record["values"] = [ceilings[record["provider"]]] * 3
        finish(None, DEFAULT, [record])
    for job, records in results:
        finish(job.case, job.allocator, records)
    return rows
