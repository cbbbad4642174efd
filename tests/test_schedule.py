# SPDX-License-Identifier: Apache-2.0
"""The order in which blocks of rows meet: csrc/cpu/schedule.h, compiled with a harness of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from helpers import HANGS_S

from benchmarks import schedule

ROOT = Path(__file__).resolve().parents[1]
COMPILER = shutil.which(os.environ.get("CXX", "g++"))


@pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")
def test_blocks_meet_once_alone_and_in_one_order(tmp_path: Path) -> None:
    source, program = ROOT / "tests/schedule_check.cpp", tmp_path / "schedule_check"
    flags = [
        "-std=c++17",
        "-O1",
        "-fopenmp",
        "-Wno-psabi",
        "-DSSLK_ISA_NS=baseline",
        f"-I{ROOT / 'csrc'}",
    ]
    subprocess.run(
        [str(COMPILER), *flags, "-o", str(program), str(source)], check=True, timeout=HANGS_S
    )
    done = subprocess.run(
        [str(program)], capture_output=True, text=True, check=False, timeout=HANGS_S
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")
def test_simulated_threads(tmp_path: Path) -> None:
    """One thread shares nothing; many do the same work; the table of the documentation is what comes out."""
    program = schedule.compile_simulator(tmp_path)
    for layout, pairs, work in (
        ("triangle", 64 * 65 // 2, 4 * 64 * 63 // 2 + 3 * 64),
        ("rectangle", 4096, 4 * 4096),
    ):
        alone = schedule.simulate(program, layout, 4096, 1)
        assert (alone.meetings, alone.work, alone.busiest) == (pairs, work, work)
        assert alone.moved == 0 and alone.efficiency == 1
        many = schedule.simulate(program, layout, 4096, 32)
        assert many.work == work and many.moved > 0 and 0.9 < many.efficiency < 1.0001
        crowd = schedule.simulate(program, layout, 1024, 128)
        assert crowd.efficiency < 0.2
    results = [
        schedule.simulate(program, layout, rows, threads)
        for layout in schedule.LAYOUTS
        for rows in schedule.SIZES
        for threads in schedule.THREADS
    ]
    assert schedule.table(results) in (ROOT / "docs/cpu.md").read_text("utf-8")
