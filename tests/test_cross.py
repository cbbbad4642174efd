# SPDX-License-Identifier: Apache-2.0
"""The CPU kernels on 64-bit Arm: cross-compiled, run under qemu, compared with x86-64 number by number.

Its 128-bit vectors come from the same ``simd.h`` as those of the baseline here.
"""

from __future__ import annotations

import platform
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from helpers import HANGS_S

ROOT = Path(__file__).resolve().parents[1]
CROSS, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
# Sums in another order and fused multiply-adds; temperatures of 0.01 multiply them by 100.
TOLERANCE = {0: 2e-5, 1: 1e-12, 2: 2e-2, 3: 4e-3}  # by dtype: float32, float64, bfloat16, float16


def _compiled(compiler: str, output: Path, *flags: str) -> Path:
    included = (ROOT / "csrc/cpu/others.cpp").read_text()
    sources = [str(p) for p in sorted((ROOT / "csrc/cpu").glob("*.cpp")) if p.name not in included]
    command = [compiler, "-std=c++17", "-O2", "-fopenmp", "-Icsrc", "-Wall", "-Wextra", "-Werror"]
    command += ["-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi"]
    command += ["-DSSLK_ISA_NS=baseline", *flags, "tests/cross/kernels.cpp", "csrc/dispatch.cpp"]
    command += ["csrc/memory.cpp", *sources, "-o", str(output)]
    subprocess.run(command, cwd=ROOT, check=True, timeout=HANGS_S)
    return output


def _lines(*command: str) -> list[list[str]]:
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=HANGS_S)
    return [line.split() for line in done.stdout.splitlines()]


@pytest.mark.campaign
@pytest.mark.skipif(platform.machine() != "x86_64", reason="compares with x86-64")
@pytest.mark.skipif(
    shutil.which(CROSS) is None or shutil.which(EMULATOR) is None,
    reason=f"needs {CROSS} and {EMULATOR} (Debian: g++-aarch64-linux-gnu, qemu-user)",
)
def test_arm_computes_the_same_numbers(tmp_path: Path) -> None:
    here = _lines(str(_compiled("g++", tmp_path / "here")))
    there = _lines(EMULATOR, str(_compiled(CROSS, tmp_path / "there", "-static")))
    assert len(here) == len(there) > 700
    case, dtype, size, different = [""], 0, 1.0, 0
    for ours, theirs in zip(here, there, strict=True):
        assert ours[0] == theirs[0] and len(ours) == len(theirs)
        if ours[0] == "contrastive":
            assert ours == theirs
            case, dtype = ours, int(ours[2])
            continue
        if ours[0] in ("rank", "max_same", "min_other", "pointer"):
            assert ours == theirs, case
            continue
        x, y = (np.array([float(v) for v in line[1:]]) for line in (ours, theirs))
        assert np.isfinite(x).all(), (case, ours[0])
        size = max(np.abs(x).max(), size if ours[0] == "dbias" else 1e-3)
        assert np.abs(x - y).max() <= TOLERANCE[dtype] * size, (case, ours[0])
        different += int((x != y).any())
    assert different > 0, "both processors rounded everything alike: was it the same program?"
