# SPDX-License-Identifier: Apache-2.0
"""Instructions of three kernels, counted by callgrind and compared with what they took when this was written.

A slower kernel is seen without a clock.  Counts are those of one compiler: with another one there is nothing
to compare.  After a change that is meant, the message has the new figures for ``instructions.json``.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from helpers import HANGS_S
from sanitize.__main__ import build
from sanitize.__main__ import compiler as compiler_command

HERE = Path(__file__).resolve().parent
ISA = "avx2"  # callgrind knows no AVX-512
KERNELS = ("NT-Xent, 512 x 64", "attend and tiles, 128 x 2048 x 64, online", "EMA and enqueue")
WITHIN = 0.03


def _compiler() -> str:
    command = [compiler_command(), "-dumpfullversion", "-dumpversion"]
    return (
        f"g++ {subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()}"
    )


@pytest.mark.campaign
@pytest.mark.skipif(shutil.which("valgrind") is None, reason="needs valgrind")
def test_instructions() -> None:
    kept = json.loads((HERE / "instructions.json").read_text("utf-8"))
    if kept["compiler"] != _compiler():
        pytest.skip(f"counted with {kept['compiler']}, this is {_compiler()}")
    program = build("none", ISA, "-O3")
    counts = {}
    for number, name in enumerate(KERNELS):
        done = subprocess.run(
            [
                "valgrind",
                "--tool=callgrind",
                "--callgrind-out-file=/dev/null",
                str(program),
                "count",
                str(number),
            ],
            check=True,
            capture_output=True,
            text=True,
            timeout=HANGS_S,
        )
        counts[name] = int(re.findall(r"Collected : (\d+)", done.stderr)[0])
    changed = {
        name: count / kept["instructions"].get(name, count / 2) - 1
        for name, count in counts.items()
    }
    assert all(abs(x) <= WITHIN for x in changed.values()), f"{changed}\n{json.dumps(counts)}"
