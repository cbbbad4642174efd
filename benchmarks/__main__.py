# SPDX-License-Identifier: Apache-2.0
"""Measure this library beside what else one would use, on this machine, in one run.

    python -m benchmarks                          the headline run, 2 to 4 minutes
    python -m benchmarks --full                   every op, size and contender
    python -m benchmarks --op moco --sizes 4096 65536 --batch 32
    python -m benchmarks readme --csv benchmarks/results/bench.csv    tables of README from a CSV
    python -m benchmarks report --csv benchmarks/results/bench.csv    table and plots from a CSV

Writes bench.csv, bench.md and plots into --out.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from benchmarks import report, runner
from benchmarks.cases import OPS

SIZES = {"moco": [4096, 65536], "enqueue": [65536], "ema": [40, 161], "features": [16]}
LOSS_SIZES = [128, 512, 2048]


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        "python -m benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("command", nargs="?", default="run", choices=("run", "readme", "report"))
    p.add_argument("--op", choices=OPS, nargs="+", help="only these ops, at --sizes")
    p.add_argument("--sizes", type=int, nargs="+", help="N, K or number of tensors: see cases.py")
    p.add_argument("--dim", type=int, default=128)
    p.add_argument("--batch", type=int, default=256, help="queries of moco, keys of enqueue")
    p.add_argument(
        "--dtype", default="float32", choices=("float32", "float64", "bfloat16", "float16")
    )
    p.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    p.add_argument("--threads", type=int, default=torch.get_num_threads())
    p.add_argument("--no-bind", action="store_true", help="let the system move threads about")
    p.add_argument("--contenders", nargs="+", help="only these; default: all of the op")
    p.add_argument("--memory", action="store_true", help="with --op: extra peak memory as well")
    p.add_argument("--full", action="store_true", help="every op, size and contender")
    p.add_argument("--time", type=float, default=1.0, help="seconds for each case's rounds")
    p.add_argument("--out", type=Path, default=Path("runs/bench"))
    p.add_argument("--csv", type=Path, default=runner.ROOT / "benchmarks" / "results" / "bench.csv")
    p.add_argument("--readme", type=Path, default=runner.ROOT / "README.md")
    return p


def main(arguments: list[str] | None = None) -> int:
    """Command line."""
    p = parser()
    args = p.parse_args(arguments)
    if args.command == "readme":
        report.write_readme(report.read_csv(args.csv), args.readme)
        return 0
    if args.command == "report":
        report.write_all(report.read_csv(args.csv), args.csv.parent)
        return 0
    if args.sizes and not args.op:
        p.error("--sizes needs --op")
    base = {"dim": args.dim, "batch": args.batch, "dtype": args.dtype, "device": args.device}
    if args.op:
        jobs = []
        for op in args.op:
            sizes = args.sizes or SIZES.get(op, LOSS_SIZES)
            jobs += runner.custom_plan(op, sizes, base, args.contenders, args.memory or args.full)
    else:
        plan = runner.full_plan if args.full else runner.headline_plan
        jobs = plan(base, args.contenders)
    rows = runner.run_jobs(jobs, args.device, args.threads, args.time, not args.no_bind)
    args.out.mkdir(parents=True, exist_ok=True)
    report.write_csv(rows, args.out / "bench.csv")
    print("\n" + report.write_all(report.read_csv(args.out / "bench.csv"), args.out))
    return 1 if any(row["metric"] in ("wrong", "failed") for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
