# SPDX-License-Identifier: Apache-2.0
"""Simulates the CPU schedule for more threads than this machine has: a table for docs/cpu.md.

    python -m benchmarks.schedule

The order in which blocks meet, and who has them meet, is that of ``csrc/cpu/schedule.h`` itself
(``schedule.cpp`` plays it); time is not simulated but counted: a product of two blocks is one unit,
and at a barrier everybody waits for the busiest thread.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LAYOUTS = ("triangle", "rectangle")
SIZES, THREADS = (1024, 4096, 8192, 65536), (8, 32, 64, 128)
BLOCK, GROUP, DIM = 64, 4, 128  # rows of a block and blocks of a group with AVX-512 at D = 128


@dataclass(frozen=True)
class Result:
    """One play; bytes are those of gradients in float32."""

    layout: str
    rows: int
    threads: int
    work: int
    busiest: int
    barriers: int
    moved: int
    meetings: int

    @property
    def efficiency(self) -> float:
        """Work over what the threads could have done in the time of the busiest."""
        return self.work / (self.threads * self.busiest)

    @property
    def moved_bytes(self) -> int:
        """Gradients that one thread wrote last and another one adds to."""
        return self.moved * BLOCK * DIM * 4


def compile_simulator(folder: Path) -> Path:
    """The program; raises RuntimeError where there is no compiler."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        raise RuntimeError("benchmarks.schedule: a C++ compiler is needed, got none; set CXX")
    program = folder / "schedule"
    flags = ["-std=c++17", "-O2", "-fopenmp", "-Wno-psabi", "-DSSLK_ISA_NS=baseline"]
    source = ROOT / "benchmarks" / "schedule.cpp"
    subprocess.run(
        [compiler, *flags, f"-I{ROOT / 'csrc'}", "-o", str(program), str(source)], check=True
    )
    return program


def simulate(program: Path, layout: str, rows: int, threads: int) -> Result:
    """One play of ``rows`` rows, for a rectangle on both sides."""
    arguments = [layout, str(-(-rows // BLOCK)), str(GROUP), str(threads)]
    done = subprocess.run([str(program), *arguments], check=True, capture_output=True, text=True)
    return Result(layout, rows, threads, *map(int, done.stdout.split()))


def table(results: list[Result]) -> str:
    """Markdown: efficiency and bytes by layout and N, a column for each number of threads."""
    lines = ["| layout | N | " + " | ".join(f"{t} threads" for t in THREADS) + " |"]
    lines.append("|---|---|" + "---|" * len(THREADS))
    for layout in LAYOUTS:
        for rows in SIZES:
            here = [r for r in results if (r.layout, r.rows) == (layout, rows)]
            cells = [f"{100 * r.efficiency:.0f} %, {r.moved_bytes / 2**20:,.0f} MB" for r in here]
            lines.append(f"| {layout} | {rows} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> int:
    """Command line."""
    with tempfile.TemporaryDirectory() as folder:
        program = compile_simulator(Path(folder))
        results = [
            simulate(program, layout, rows, threads)
            for layout in LAYOUTS
            for rows in SIZES
            for threads in THREADS
        ]
    print(table(results))
    for r in results:
        print(f"{r.layout} {r.rows} {r.threads}: {r.barriers} barriers, {r.meetings} meetings")
    return 0


if __name__ == "__main__":
    sys.exit(main())
