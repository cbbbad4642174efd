# SPDX-License-Identifier: Apache-2.0
"""Calls of the C++ module that are wrong somehow end in an exception: tests/sanitize/bindings.py.

What libFuzzer found (tests/sanitize/fuzz.py, which needs clang) is in tests/test_bindings.py.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import HANGS_S
from sanitize import fuzz

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


def test_bytes_of_the_fuzzer_are_calls(tmp_path: Path) -> None:
    """Any bytes are calls, and no bytes are none; few of them reach most functions."""
    paths = [tmp_path / str(i) for i in range(60)]
    for i, path in enumerate(paths):
        path.write_bytes(bytes((i * 37 + k * (11 + i)) % 256 for k in range(7 * i)))
    command = [sys.executable, str(FUZZER), str(_C.__file__), "--bytes", *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANGS_S)
    assert done.returncode == 0, done.stderr[-2000:]
    outcomes = done.stdout.splitlines()[-1]
    assert len(set(re.findall(r"result from (\w+)", outcomes))) > 15, outcomes
    assert "Error from" in outcomes, outcomes


def test_the_fuzzer_says_that_it_needs_clang(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLANG", "clang-of-nowhere")
    with pytest.raises(
        SystemExit, match=r"fuzz: needs clang with libFuzzer, and there is no clang"
    ):
        fuzz.clang()
