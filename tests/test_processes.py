# SPDX-License-Identifier: Apache-2.0
"""Other processes and interpreters: workers by fork and by spawn, sub-interpreters, no OpenMP.

``docs/torch.md`` lists what is true.  A kernel that waits for threads that are gone waits for ever.
"""

from __future__ import annotations

import io
import multiprocessing
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import HANGS_S, threads
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import sslkernels

_C = pytest.importorskip("sslkernels._C", reason="the C++ extension is not built")

ROOT = Path(__file__).resolve().parents[1]
METHODS = [
    pytest.param(method, marks=pytest.mark.slow if method != "fork" else ())
    for method in multiprocessing.get_all_start_methods()
]


def made(seed: int = 0) -> list[Tensor]:
    """Enough rows for every kernel to use its threads."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(300, 48, generator=generator) for _ in range(3)]


def work(x: Tensor, y: Tensor, z: Tensor) -> list[Tensor]:
    """Losses, gradients and updates.  torch's own operations in it are too small for its threads."""
    found = []
    losses = (
        lambda a: sslkernels.nt_xent_loss(a, y),
        lambda a: sslkernels.info_nce_loss(a, y, z, 0.1),
        lambda a: sslkernels.sup_con_loss(a, torch.arange(len(a)) % 7),
        lambda a: sslkernels.byol_loss(a, y),
        lambda a: sslkernels.info_nce_loss(
            a[:50], y[:50], z.view(50, 6, 48), 0.5, negative_mode="paired"
        ),
        lambda a: sslkernels.vae_loss(a, y.sigmoid(), x, z * 0.1),
        lambda a: sslkernels.feature_reconstruction_loss([a], [y]),
    )
    for loss in losses:
        leaf = x.detach().requires_grad_()
        value = loss(leaf)
        found += [value.detach(), *torch.autograd.grad(value, leaf)]
    # torch would fill as many elements with its own threads, which a forked child lacks too.
    source, target = (torch.from_numpy(np.full(70_001, v, np.float32)) for v in (1, 0))
    targets = [target, y.clone()]
    sslkernels.ema_update_(targets, [source, x], 0.25)
    queue = sslkernels.KeyQueue(500, 48)
    queue.enqueue(z)
    return [*found, *targets, queue.keys.clone()]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    """Without torch, whose threads a forked child lacks."""
    return all(np.array_equal(x.numpy(), y.numpy()) for x, y in zip(a, b, strict=True))


def send(connection: Any, n_threads: int, times: int) -> None:
    """In the child: everything, some times, as bytes (a tensor would be sent as shared memory)."""
    torch.set_num_threads(n_threads)
    for _ in range(times):
        connection.send([x.numpy() for x in work(*made())])


@pytest.mark.parametrize("n_threads", [1, 3])
@pytest.mark.parametrize("method", METHODS)
def test_children_compute_the_same_bits(method: str, n_threads: int) -> None:
    """After the parent has used its threads, which a forked child does not have."""
    with threads(2):
        want = work(*made())
        context = multiprocessing.get_context(method)
        ours, theirs = context.Pipe()
        child = context.Process(target=send, args=(theirs, n_threads, 3))
        child.start()
        theirs.close()
        for _ in range(3):
            assert ours.poll(HANGS_S), "the child hangs"
            assert same([torch.from_numpy(x) for x in ours.recv()], want)
        child.join()
        assert child.exitcode == 0
        assert same(work(*made()), want)  # and the parent goes on


def test_a_child_of_a_child() -> None:
    """Each forks after it has used threads."""
    with threads(2):
        want = work(*made())
        child = os.fork()
        if child == 0:
            status = 1
            try:
                if same(work(*made()), want):
                    grandchild = os.fork()
                    if grandchild == 0:
                        os._exit(0 if same(work(*made()), want) else 1)
                    status = os.waitstatus_to_exitcode(os.waitpid(grandchild, 0)[1])
            finally:
                os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_an_error_comes_out_of_a_forked_child() -> None:
    """Of a call that runs on a thread of its own there."""
    out = torch.zeros(1)
    child = os.fork()
    if child == 0:
        try:
            _C.features_forward(
                features=[0],
                targets=[],
                sizes=[1],
                dtypes=["float32"],
                target_dtypes=["float32"],
                n=1,
                smooth=False,
                beta=1.0,
                wide=False,
                n_threads=1,
                out=out.data_ptr(),
            )
        except ValueError as error:
            os._exit(0 if "the same length" in str(error) else 2)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


class Worked(Dataset[list[Tensor]]):
    """Samples that are computed with the library, as a dataset of hard negatives would be."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> list[Tensor]:
        return work(*made(index))


@pytest.mark.parametrize("method", METHODS)
def test_workers_of_a_data_loader(method: str) -> None:
    with threads(2):
        want = [work(*made(i)) for i in range(4)]
        loader = DataLoader(
            Worked(), batch_size=None, num_workers=2, multiprocessing_context=method
        )
        for found, truth in zip(loader, want, strict=True):
            assert same(found, truth)


# ---- sub-interpreters ------------------------------------------------------------------------------

SUBINTERPRETER = """
import sys
import {before}
try:
    import _interpreters
except ImportError:
    import _xxsubinterpreters as old
    one = old.create(isolated={isolated})
    try:
        old.run_string(one, "import sslkernels")
    except old.RunFailedError as error:
        print(error)
else:
    one = _interpreters.create("isolated" if {isolated} else "legacy")
    raised = _interpreters.exec(one, "import sslkernels")
    print(raised.formatted)
"""


@pytest.mark.parametrize("before", ["sys", "sslkernels"])
@pytest.mark.parametrize("isolated", [True, False])
def test_a_subinterpreter_is_refused(isolated: bool, before: str) -> None:
    """torch can't be imported in one: without the error the process hangs or dies."""
    code = SUBINTERPRETER.format(isolated=isolated, before=before)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        capture_output=True,
        text=True,
        timeout=HANGS_S,
        check=True,
    )
    assert "sslkernels: torch can't be used in a sub-interpreter" in done.stdout


# ---- OpenMP ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", ["1", "2"])
def test_fewer_threads_than_were_asked_for(limit: str) -> None:
    """OpenMP may give fewer: the shares of the missing ones must be computed too."""
    code = (
        "import torch, test_processes as t\n"
        "torch.set_num_threads(4)\n"
        "import sys; torch.save(t.work(*t.made()), sys.stdout.buffer)"
    )
    environment = {
        **os.environ,
        "OMP_THREAD_LIMIT": limit,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
    }
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        stdout=subprocess.PIPE,
        timeout=HANGS_S,
        check=True,
    )
    assert same(torch.load(io.BytesIO(done.stdout)), work(*made()))


WITHOUT_OPENMP = """
import ctypes, sys
from importlib.abc import MetaPathFinder

class NoRuntime(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "sslkernels._C":
            raise ImportError("_C.abi3.so: undefined symbol: GOMP_parallel")

sys.meta_path.insert(0, NoRuntime())
whole = ctypes.CDLL

def load(name, *arguments, **options):
    if str(name).startswith("libgomp"):
        raise OSError(f"{name}: cannot open shared object file")
    return whole(name, *arguments, **options)

ctypes.CDLL = load
import torch, sslkernels
x, y = torch.eye(4), torch.eye(4).flip(0)
assert sslkernels.nt_xent_loss(x, y).isfinite()
print(sslkernels.info())
try:
    sslkernels.set_backend("cpu")
    sslkernels.nt_xent_loss(x, y)
except RuntimeError as error:
    print(error)
"""


def test_without_a_runtime_of_openmp_plain_torch_takes_over() -> None:
    """And says why; who asks for the kernels gets an error."""
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_OPENMP],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=HANGS_S,
        check=True,
    )
    reason = "it could not be loaded (OpenMP: torch has loaded no runtime, and libgomp.so.1: "
    assert f"cpu/tiles       chunked (backend 'cpu': {reason}" in done.stdout
    assert reason in done.stdout.splitlines()[-1]  # the error


def test_the_page_lists_what_is_tested() -> None:
    page = ROOT.joinpath("docs/torch.md").read_text("utf-8").split("<!-- processes -->")[1]
    listed = re.findall(r"^\| ([^|]+?) \|", page, re.MULTILINE)[1:]
    assert listed == [
        "`fork` after the parent has used threads",
        "`spawn`, `forkserver`",
        "workers of a `DataLoader`",
        "sub-interpreters",
        "no runtime of OpenMP",
        "fewer threads than asked for (`OMP_THREAD_LIMIT`)",
    ]
