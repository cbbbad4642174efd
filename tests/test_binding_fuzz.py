# SPDX-License-Identifier: Apache-2.0
"""Calls of the C++ module that are wrong somehow end in an exception: tests/sanitize/bindings.py."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import HANGS_S

_C = pytest.importorskip("sslkernels._C", reason="the C++ extension is not built")

FUZZER = Path(__file__).parent / "sanitize" / "bindings.py"


@pytest.mark.parametrize(
    ("calls", "seed"),
    [(3000, 0), pytest.param(200_000, 1, marks=pytest.mark.campaign)],
    ids=["few", "many"],
)
def test_wrong_calls_end_in_an_exception(calls: int, seed: int) -> None:
    """In a process without torch, which a crash takes along."""
    words = ["--examples", str(calls), "--seed", str(seed)]
    done = subprocess.run(
        [sys.executable, str(FUZZER), str(_C.__file__), *words],
        capture_output=True,
        text=True,
        timeout=HANGS_S,
    )
    assert done.returncode == 0, f"status {done.returncode}\n{done.stdout}\n{done.stderr[-2000:]}"
    # Calls that are refused before a kernel is reached would test nothing.
    summary = re.search(
        r"(\d+) calls, (\d+) with a result; results from (\d+) functions", done.stdout
    )
    assert summary is not None, done.stdout
    made, with_result, functions = map(int, summary.groups())
    assert made == calls and with_result > calls // 4 and functions >= 35
