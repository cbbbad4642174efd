# SPDX-License-Identifier: Apache-2.0
"""The whole-loss ops ``contrastive`` and ``regression``: every layout against the composed path."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor

import sslkernels
from sslkernels.ops import registry
from sslkernels.ops.contrastive import contrastive

_C = pytest.importorskip("sslkernels._C", reason="the C++ extension is not built")

LAYOUTS = ("joint", "cross", "both", "bank")
TOLERANCE = {torch.float32: 5e-5, torch.float64: 1e-11, torch.bfloat16: 1e-2}


@pytest.fixture(params=_C.available_isas())
def isa(request: pytest.FixtureRequest) -> str:
    """Every instruction set that this processor has."""
    before = _C.isa()
    _C.set_isa(request.param)
    yield request.param
    _C.set_isa(before)


def run(backend: str, layout: str, reduction: str, *inputs: Tensor | None) -> list[Tensor]:
    """Loss, lse and gradients of a, b and scale."""
    a, b, scale = (x.clone().requires_grad_() for x in inputs[:3] if x is not None)
    bank, weight = inputs[3:]
    with registry.backend(backend):
        out = contrastive(layout, a, b, bank, scale=scale, reduction=reduction, want_rank=True)
        out.loss.backward(weight if reduction == "none" else None)
    return [out.loss.detach(), out.lse.detach(), a.grad, b.grad, scale.grad]


# (2, 3): less than a tile; (33, 24): half a block and one; (65, 129): odd rows, one feature too many;
# (130, 100): several blocks.
@pytest.mark.parametrize("shape", [(2, 3), (33, 24), (65, 129), (130, 100)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_agrees_with_the_composition(isa: str, layout: str, shape, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    n, d = shape
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    a = torch.randn(n, d, dtype=torch.float64)
    b = (a + 0.5 * torch.randn(n, d, dtype=torch.float64)).to(dtype)
    a = a.to(dtype)
    bank = torch.randn(150, d, dtype=torch.float64).to(dtype) if layout == "bank" else None
    for reduction in ("mean", "sum", "none"):
        for temperature in (1.0, 0.1, 0.03):  # the last one needs the online maximum
            scale = torch.tensor(1 / temperature, dtype=acc)
            weight = torch.randn(2 * n if layout == "joint" else n, dtype=acc)
            ours = run("cpu", layout, reduction, a, b, scale, bank, weight)
            wide = [x if x is None else x.double() for x in (a, b, scale, bank, weight)]
            truth = run("chunked", layout, reduction, *wide)
            for name, x, y in zip(("loss", "lse", "da", "db", "dscale"), ours, truth, strict=True):
                error = (x.double() - y).abs().max().item()
                size = max(y.abs().max().item(), 1e-3)
                assert error <= TOLERANCE[dtype] * size, (name, isa, layout, reduction, error, size)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(layout: str) -> None:
    a, b = (torch.randn(5, 8, requires_grad=True) for _ in range(2))
    bank = torch.randn(7, 8) if layout == "bank" else None
    scale = torch.tensor(5.0, requires_grad=True)
    torch.library.opcheck(
        torch.ops.sslkernels.contrastive.default,
        (layout, a, b, bank, scale, None, None, True, "mean", True),
    )


def test_opcheck_regression() -> None:
    p, t = torch.randn(5, 8, requires_grad=True), torch.randn(5, 8)
    torch.library.opcheck(torch.ops.sslkernels.regression.default, (p, t, "none"))


def test_many_blocks() -> None:
    """Enough rows for several blocks to share one packing, which no small case reaches."""
    torch.manual_seed(0)
    z1, z2 = (torch.randn(4130, 16, requires_grad=True) for _ in range(2))
    got = torch.autograd.grad(sslkernels.nt_xent_loss(z1, z2, 0.5), (z1, z2))
    with sslkernels.backend("chunked"):
        want = torch.autograd.grad(sslkernels.nt_xent_loss(z1, z2, 0.5), (z1, z2))
    for x, y in zip(got, want, strict=True):
        assert (x - y).abs().max() <= 2e-5 * y.abs().max()


def test_queue_may_change_before_backward() -> None:
    torch.manual_seed(0)
    q, k, queue = torch.randn(9, 12), torch.randn(9, 12), torch.randn(40, 12)
    grads = []
    for overwrite in (False, True):
        leaf, bank = q.clone().requires_grad_(), queue.clone()
        loss = sslkernels.info_nce_loss(leaf, k, bank, 0.1)
        if overwrite:
            bank.fill_(float("nan"))
        loss.backward()
        grads.append(leaf.grad)
    assert torch.equal(*grads)


def test_same_bits_for_any_number_of_threads() -> None:
    torch.manual_seed(0)
    z1, z2 = (torch.randn(700, 40, requires_grad=True) for _ in range(2))
    results = []
    threads = torch.get_num_threads()
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            loss = sslkernels.nt_xent_loss(z1, z2, 0.1)
            results.append((loss.detach(), *torch.autograd.grad(loss, (z1, z2))))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


PEAK = """
import torch, sslkernels
z1, z2 = (torch.randn(4096, 128, requires_grad=True) for _ in range(2))
sslkernels.nt_xent_loss(z1[:64], z2[:64]).backward()
z1.grad, z2.grad = torch.zeros(4096, 128), torch.zeros(4096, 128)
def peak():
    text = open("/proc/self/status").read()
    return int(text.split("VmHWM:")[1].split()[0]) / 1024
before = peak()
sslkernels.nt_xent_loss(z1, z2).backward()
print(peak() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
def test_peak_memory() -> None:
    """NT-Xent of 8192 rows: N x N floats alone would be 256 MB."""
    out = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, check=True)
    assert float(out.stdout) < 40
