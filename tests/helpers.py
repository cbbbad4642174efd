# SPDX-License-Identifier: Apache-2.0
"""What the tests share: the error budget, backends and instruction sets, hostile inputs."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import sslkernels

# After that many seconds a process hangs.  Far more than any needs, however busy the machine: a limit that
# tells slow from fast would be a test of the machine.
HANGS_S = 3600

# Relative slack of the budget by dtype of the inputs: a few units in the last place of the
# accumulation dtype, times the length of sums; for halves the rounding of the gradient itself.
SLACK = {
    torch.float64: 1e-12,
    torch.float32: 2e-6,
    torch.bfloat16: 8e-3,
    torch.float16: 1e-3,
}


def leave_group() -> None:
    """The end of a process of a gloo group, without Python's clean-up.

    Threads of the group may still hold tensors of a finished collective, and abort the process when they
    ask an interpreter that is being taken down for its lock.
    """
    torch.distributed.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)


def check_budget(
    ours: Tensor,
    eager: Tensor,
    truth: Tensor,
    slack: float = 2e-6,
    name: str = "",
    floor: float = 2e-2,
) -> None:
    """|ours - truth| <= |eager - truth| + slack, in the maximum norm, with all figures on failure.

    Args:
        ours: The result under test.
        eager: Plain PyTorch in the same dtype.
        truth: float64.
        slack: Relative to the largest |truth|.
        name: What is compared, for the message.
        floor: Smallest magnitude that slack is taken of, so that a truth of 0 leaves some room.
    """
    assert ours.shape == truth.shape, f"{name}: shape {list(ours.shape)} for {list(truth.shape)}"
    ours, eager, truth = (x.detach().cpu().double() for x in (ours, eager, truth))
    if not truth.numel():
        return
    finite = truth.isfinite()
    same_kind = torch.equal(ours.nan_to_num(0.0)[~finite], truth.nan_to_num(0.0)[~finite])
    assert same_kind and bool(ours[finite].isfinite().all()), (
        f"{name}: NaN or inf where the truth has none (or the other way round); "
        f"{int((~ours.isfinite()).sum())} bad of {ours.numel()}"
    )
    if not bool(finite.any()):
        return
    error = (ours - truth)[finite].abs().max().item()
    eager_error = (eager - truth)[finite].nan_to_num(nan=torch.inf).abs().max().item()
    size = truth[finite].abs().max().item()
    limit = eager_error + slack * max(size, floor)
    assert error <= limit, (
        f"{name}: max abs error {error:.3e} "
        f"(relative to the largest value: {error / max(size, 1e-300):.3e}) "
        f"> eager {eager_error:.3e} + slack {slack:.1e} * {max(size, floor):.3e}"
    )


def check_loss(
    ours: Callable[..., Tensor],
    reference: Callable[..., Tensor],
    inputs: list[Tensor],
    *,
    slack: float | None = None,
    loss_slack: float | None = None,
    name: str = "",
    dloss: Tensor | None = None,
) -> None:
    """Loss and every gradient within the error budget.

    Args:
        ours: The function under test, called with ``inputs``.
        reference: Its plain twin, called with the same in the same dtype and in float64.
        inputs: Floating-point tensors; all of them get gradients.
        slack: By default that of the dtype of the first input.
        loss_slack: By default the smaller of slack and 2e-6.
        name: What is compared.
        dloss: Incoming gradient; ones by default.
    """
    slack = SLACK[inputs[0].dtype] if slack is None else slack
    results = []
    for function, wide in ((ours, False), (reference, False), (reference, True)):
        leaves = [(x.double() if wide else x).detach().clone().requires_grad_() for x in inputs]
        loss = function(*leaves)
        seed = torch.ones_like(loss) if dloss is None else dloss.to(loss.dtype)
        results.append((loss, torch.autograd.grad(loss, leaves, seed, allow_unused=True)))
    (loss, grads), (eager, eager_grads), (truth, true_grads) = results
    # The loss is accumulated in float32 even for halves.
    loss_slack = min(slack, 2e-6) if loss_slack is None else loss_slack
    check_budget(loss, eager, truth, loss_slack, f"{name} loss", floor=1.0)
    for i, (g, e, t) in enumerate(zip(grads, eager_grads, true_grads, strict=True)):
        if t is None:
            assert g is None or not bool(g.any()), f"{name}: input {i} should get no gradient"
            continue
        assert g is not None, f"{name}: input {i} got no gradient"
        assert g.dtype == inputs[i].dtype, f"{name}: gradient {i} is {g.dtype}"
        # The gradient of a scalar is a sum over everything, in which most may cancel; the terms of
        # a small one, a temperature, are of the order of 1 / T^2.
        floor = 2e-2 if inputs[i].ndim else max(1.0, min(1e4, 1 / max(1e-9, float(inputs[i]) ** 2)))
        check_budget(g, e, t, slack, f"{name} gradient of input {i}", floor)


def outcome(call: Callable[[list[Tensor]], Tensor], inputs: list[Tensor]) -> list[Tensor]:
    """The loss and a gradient for every input, zero where there is none."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    loss = call(leaves)
    grads = torch.autograd.grad(loss.sum(), leaves, allow_unused=True)
    filled = [torch.zeros_like(x) if g is None else g for g, x in zip(grads, leaves, strict=True)]
    return [loss, *filled]


def assert_alike(
    got: list[Tensor], want: list[Tensor], where: str = "", tolerance: float = 1e-5
) -> None:
    for i, (g, w) in enumerate(zip(got, want, strict=True)):
        near = torch.allclose(g.double(), w.double(), tolerance, tolerance, equal_nan=True)
        assert g.shape == w.shape and near, f"{where}: result {i} is {g}, not {w}"


def available_isas() -> list[str]:
    """Instruction sets of the CPU extension, or nothing when it isn't built."""
    return list(sslkernels.info().available_isas)


def engines() -> list[str]:
    """Names for ``engine``: "chunked", "cpu:<isa>" for each instruction set."""
    return ["chunked", *(f"cpu:{isa}" for isa in available_isas())]


@contextmanager
def instruction_set(isa: str) -> Iterator[None]:
    """Run a block on one of ``available_isas()``."""
    extension: Any = importlib.import_module("sslkernels._C")
    before = extension.isa()
    extension.set_isa(isa)
    try:
        yield
    finally:
        extension.set_isa(before)


@contextmanager
def engine(name: str) -> Iterator[None]:
    """Run a block on one of ``engines()``; the instruction set is restored."""
    backend, _, isa = name.partition(":")
    with instruction_set(isa) if isa else nullcontext(), sslkernels.backend(backend):
        yield


def poisoned(x: Tensor) -> Tensor:
    """The same values in the middle of a NaN-filled buffer.

    Rows are longer than D: what is read past a row or past the last row shows up as NaN.
    """
    rows, columns = x.shape
    buffer = torch.full((rows + 6, columns + 5), torch.nan, dtype=x.dtype, device=x.device)
    buffer[3 : rows + 3, 2 : columns + 2] = x
    return buffer[3 : rows + 3, 2 : columns + 2]


@contextmanager
def threads(n: int) -> Iterator[None]:
    """Run a block with n threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# In a process of its own: who imports pip takes setuptools' distutils away from torch's compiler.
_IN_PLACE = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import in_place
in_place.install(Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4])
"""


def install_in_place(packages: Path, scripts: Path, python: str) -> None:
    """What the Makefile's set-up does: the .pth file and the commands."""
    ci = Path(__file__).resolve().parents[1] / ".ci"
    arguments = [str(ci), str(packages), str(scripts), python]
    subprocess.run([sys.executable, "-c", _IN_PLACE, *arguments], check=True, timeout=HANGS_S)
