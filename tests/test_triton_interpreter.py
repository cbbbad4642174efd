# SPDX-License-Identifier: Apache-2.0
"""Starts the tests of ``tests/triton_interpreter`` in processes of their own.

Triton decides when it is imported whether its kernels run in the interpreter, and other tests of this
process import it without.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import HANGS_S

pytest.importorskip("triton", reason="the GPU backend needs triton (pip install triton)")

TESTS = Path(__file__).parent
# Two processes at a time, of about the same length.
GROUPS = {
    "engine": ["test_engine.py"],
    "others": [
        "test_branches.py",
        "test_hopper.py",
        "test_order.py",
        "test_updates.py",
        "test_losses.py",
        "test_normalization.py",
        "test_nothing.py",
        "test_autoencoders.py",
        "test_random.py",
    ],
}


ENVIRONMENT = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
ENVIRONMENT.pop("SSLKERNELS_BACKEND", None)


def test_every_file_is_in_a_group() -> None:
    files = {path.name for path in (TESTS / "triton_interpreter").glob("test_*.py")}
    assert files == {name for names in GROUPS.values() for name in names}


@pytest.mark.early
@pytest.mark.slow
def test_kernels_in_the_interpreter(capfd: pytest.CaptureFixture[str]) -> None:
    """Both groups side by side; the output of a group that failed is shown."""
    running = {}
    for group, names in GROUPS.items():
        files = [str(TESTS / "triton_interpreter" / name) for name in names]
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files]
        running[group] = subprocess.Popen(
            command,
            cwd=TESTS.parent,
            env=ENVIRONMENT,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
    failed = []
    try:
        for group, process in running.items():
            output, _ = process.communicate(timeout=HANGS_S)
            if process.returncode or " passed" not in output:
                failed.append(f"--- {group} (exit {process.returncode})\n{output[-6000:]}")
    finally:
        for process in running.values():
            process.kill()
    assert not failed, "\n".join(failed)


@pytest.mark.campaign
def test_a_thousand_random_cases_in_the_interpreter() -> None:
    """Those of every kind that tests/triton_interpreter/test_random.py has."""
    file = str(TESTS / "triton_interpreter" / "test_random.py")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "campaign", file],
        cwd=TESTS.parent,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=HANGS_S,
    )
    assert done.returncode == 0, done.stdout[-6000:]
