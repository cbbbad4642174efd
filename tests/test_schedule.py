# SPDX-License-Identifier: Apache-2.0
"""The order in which blocks of rows meet: csrc/cpu/schedule.h, compiled with a harness of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from helpers import HANGS_S

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
