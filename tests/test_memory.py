# SPDX-License-Identifier: Apache-2.0
"""Memory as a function of shapes: bytes are counted, not measured, so that no allocator has a say.

Tensors are counted by torch's profiler, the workspaces of the C++ kernels by the extension.  One test asks
the system, in a process of its own, whether the count is what a process then holds.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import threads
from peaks import Training
from torch import Tensor, nn

import sslkernels as ours
from sslkernels import reference

_C = pytest.importorskip("sslkernels._C", reason="the C++ extension is not built")

ROOT = Path(__file__).resolve().parents[1]


def pair(n: int, d: int) -> list[Tensor]:
    return [nn.functional.normalize(torch.randn(n, d), dim=1) for _ in range(2)]


def training(name: str, module: Any, n: int, d: int) -> Training:
    a, b = pair(n, d)
    labels = torch.arange(n) % max(2, n // 8)
    if name == "nt_xent":
        return Training(lambda x, y: module.nt_xent_loss(x, y, 0.1), a, b)
    if name == "info_nce":
        return Training(lambda x, y: module.info_nce_loss(x, y, temperature=0.1), a, b)
    if name == "clip":
        return Training(lambda x, y: module.clip_loss(x, y, 10.0), a, b)
    if name == "siglip":
        return Training(lambda x, y: module.siglip_loss(x, y, 10.0, -10.0), a, b)
    if name == "sup_con":
        return Training(lambda x: module.sup_con_loss(x, labels, 0.1), a)
    if name == "dcl":
        return Training(lambda x, y: module.dcl_loss(x, y, 0.1), a, b)
    if name == "uniformity":
        return Training(module.uniformity_loss, a)
    assert name == "triplet"
    return Training(lambda x: module.triplet_loss(x, labels), a)


# How many times less than eager PyTorch at N = 4096, D = 128, where a matrix of all pairs is 64 MiB.
SHARES = {
    "nt_xent": 60,
    "info_nce": 20,
    "clip": 25,
    "siglip": 25,
    "sup_con": 25,
    "dcl": 30,
    "triplet": 25,
}


@pytest.mark.parametrize("name", SHARES)
def test_peak_is_a_share_of_eager(name: str, tmp_path: Path) -> None:
    with threads(2):
        mine = training(name, ours, 4096, 128).peak(tmp_path)
    # Eager holds a N^2 + b N bytes: both numbers from two sizes that are quick.
    small, double = (training(name, reference, n, 128).peak(tmp_path) for n in (512, 1024))
    square = (double - 2 * small) / 2
    eager = 64 * square + 8 * (small - square)
    assert SHARES[name] * mine <= eager, f"{mine / 2**20:.1f} of {eager / 2**20:.1f} MiB"


@pytest.mark.parametrize("name", [*SHARES, "uniformity"])
def test_peak_is_a_function_of_shapes(name: str, tmp_path: Path) -> None:
    """The same bytes whatever ran before, and about twice as many for twice N or twice D."""
    with threads(2):
        first = training(name, ours, 1024, 64).peak(tmp_path)
        more_rows = training(name, ours, 2048, 64).peak(tmp_path)
        more_features = training(name, ours, 1024, 128).peak(tmp_path)
        training(name, ours, 300, 40).peak(tmp_path)
        _C.release_workspaces()
        assert training(name, ours, 1024, 64).peak(tmp_path) == first
    assert more_rows < 2.1 * first and more_features < 2.1 * first


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_halves_are_not_copied(dtype: torch.dtype, tmp_path: Path) -> None:
    """The float32 gradient of both views before it is rounded, the gradients, and little else."""
    n, d = 4096, 128
    a, b = (x.to(dtype) for x in pair(n, d))
    with threads(2):
        peak = Training(ours.nt_xent_loss, a, b).peak(tmp_path)
    assert peak < (4 + 2) * 2 * n * d + 2.5 * 2**20


def test_negatives_of_every_query_are_not_copied(tmp_path: Path) -> None:
    """32 MiB of bfloat16 keys: in float32 they would be 64."""
    query = torch.randn(512, 128, dtype=torch.bfloat16)
    keys = torch.randn(512, 256, 128, dtype=torch.bfloat16)
    with threads(1):
        step = Training(
            lambda q: ours.info_nce_loss(q, q, keys, 0.1, negative_mode="paired"), query
        )
        assert step.peak(tmp_path) < 2 * 2**20


# ---- What the system sees --------------------------------------------------------------------------

RESIDENT = """
import ctypes, gc, sys, tempfile
from pathlib import Path
import torch
from test_memory import ours, training, _C
def status(field):
    text = Path("/proc/self/status").read_text()
    return int(text.split(field + ":")[1].split()[0]) * 1024
torch.set_num_threads(2)
name = sys.argv[1]
loss = training(name, ours, 4096, 128)
extra = []
for _ in range(4):
    loss.step()
    for leaf in loss.leaves:
        leaf.grad = None
    gc.collect()
    _C.release_workspaces()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    loss.step()
    extra.append(status("VmHWM") - before)
with tempfile.TemporaryDirectory() as folder:
    print(min(extra[1:]), loss.peak(Path(folder)))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
@pytest.mark.parametrize("name", ["clip", "nt_xent"])
def test_the_count_is_what_a_process_holds(name: str) -> None:
    """Torch's large tensors are mapped as the workspaces are: glibc is told where large begins."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", RESIDENT, name],
        env={**os.environ, "PYTHONPATH": path, "MALLOC_MMAP_THRESHOLD_": "65536"},
        capture_output=True,
        text=True,
        check=False,
    )
    if "clear_refs" in done.stderr or "malloc_trim" in done.stderr:
        pytest.skip("the peak can't be reset here")
    assert done.returncode == 0, done.stderr
    resident, counted = map(int, done.stdout.split()[-2:])
    # Arrays of a workspace begin and end within pages, and its gaps are not touched.
    assert 0.7 * counted < resident < counted + 2**20, f"{resident}, counted {counted}"
