# SPDX-License-Identifier: Apache-2.0
"""Every loss against its plain twin: values, gradients, hostile inputs, messages, determinism."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from helpers import check_loss, poisoned, threads
from loss_cases import CASES, ON_TILES, Case, negatives, unit_pair, views
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import sslkernels as ssl
from sslkernels import reference
from sslkernels.backends import arithmetic

# (N, D): one and two samples, neighbours of lane and block sizes, D that is no power of two.
SIZES = [(1, 8), (2, 1), (3, 24), (63, 100), (64, 128), (65, 129), (127, 8), (130, 32), (5, 768)]
TEMPERATURES = [0.01, 0.05, 0.07, 0.1, 0.2, 0.5, 1.0]
HALVES = [torch.bfloat16, torch.float16]


EVERY = pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)


@pytest.mark.parametrize("size", SIZES, ids=str)
@EVERY
def test_against_float64_truth(case: Case, size) -> None:
    """Loss and all gradients in float32, within the error budget."""
    inputs = case.make(*size)
    loss = case.call(ssl, inputs)
    check_loss(
        lambda *x: case.call(ssl, list(x)),
        lambda *x: case.call(reference, list(x)),
        inputs,
        slack=5e-6,
        name=f"{case.name} {size}",
        dloss=torch.linspace(0.5, 1.5, loss.numel()).view(loss.shape),
    )


@EVERY
def test_in_many_small_blocks(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of a few rows: what is carried from block to block, and which diagonal is whose."""
    monkeypatch.setattr(arithmetic, "MIN_BLOCK", 512)
    monkeypatch.setattr(arithmetic, "MAX_BLOCK", 512)
    with ssl.backend("chunked"):
        check_loss(
            lambda *x: case.call(ssl, list(x)).sum(),
            lambda *x: case.call(reference, list(x)).sum(),
            case.make(65, 24),
            slack=5e-6,
            name=case.name,
        )


@pytest.mark.parametrize("case", ON_TILES, ids=lambda c: c.name)
def test_on_every_engine(on_engine: str, case: Case) -> None:
    """The losses that use the tiles, on each backend and instruction set."""
    for size in ((3, 24), (65, 129)):
        inputs = case.make(*size)
        loss = case.call(ssl, inputs)
        check_loss(
            lambda *x: case.call(ssl, list(x)),
            lambda *x: case.call(reference, list(x)),
            inputs,
            slack=5e-6,
            name=f"{on_engine} {case.name} {size}",
            dloss=torch.linspace(0.5, 1.5, loss.numel()).view(loss.shape),
        )


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@EVERY
def test_halves(case: Case, dtype: torch.dtype) -> None:
    """Half inputs: a float32 loss, accumulated in float32, and gradients of the input dtype."""
    inputs = [x.to(dtype) if x.ndim else x for x in case.make(33, 40)]
    loss = case.call(ssl, inputs)
    assert loss.dtype == torch.float32
    check_loss(
        lambda *x: case.call(ssl, list(x)),
        lambda *x: case.call(reference, list(x)),
        inputs,
        name=f"{case.name} {dtype}",
        dloss=torch.linspace(0.5, 1.5, loss.numel()).view(loss.shape),
    )


@EVERY
def test_gradcheck(case: Case) -> None:
    """Against finite differences in float64."""
    inputs = [x.double().requires_grad_() for x in case.make(6, 4)]
    if case.name.startswith(("byol", "simsiam")):
        count = 1 if case.name.startswith("byol_loss") and len(inputs) == 2 else 2
        fixed = {i for i in range(len(inputs)) if i not in ((0,) if count == 1 else (0, 2))}
        inputs = [x.detach() if i in fixed else x for i, x in enumerate(inputs)]
    inputs = [x.detach() if i in case.targets else x for i, x in enumerate(inputs)]
    if case.keywords.get("sigma"):  # the weights of DCLW carry no gradient on purpose
        inputs = [*(x.detach() for x in inputs[:2]), inputs[2]]
    assert torch.autograd.gradcheck(lambda *x: case.call(ssl, list(x)), inputs)


@EVERY
def test_same_bits_for_any_number_of_threads(case: Case) -> None:
    """More than one block of rows and more than one thread's share."""
    inputs = [x.requires_grad_() for x in case.make(700, 16)]

    def run() -> list[Tensor]:
        loss = case.call(ssl, inputs)
        wanted = [x for x in inputs if x.requires_grad]
        grads = torch.autograd.grad(loss.sum(), wanted, allow_unused=True)
        return [loss, *(g for g in grads if g is not None)]

    with threads(1):
        one = run()
    with threads(2):
        for a, b in zip(run(), one, strict=True):
            assert torch.equal(a, b), case.name


class LargestTensor(TorchDispatchMode):
    """Remembers the largest tensor that any op of torch returned."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, Tensor):
                self.numel = max(self.numel, x.numel())
        return out


@EVERY
def test_nothing_of_n_by_n_between_the_ops(case: Case) -> None:
    """No op in forward or backward returns, and autograd keeps, nothing that grows as N * N."""
    n, d = 1500, 4
    leaves = [x.requires_grad_() for x in case.make(n, d)]
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with LargestTensor() as largest, torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        case.call(ssl, leaves).sum().backward()
    assert largest.numel <= 12 * n * d, f"{case.name}: {largest.numel} elements"
    assert sum(kept.values()) <= 40 * n * d * 4, f"{case.name}: {sum(kept.values())} bytes"


@EVERY
def test_strided_and_poisoned_inputs(case: Case) -> None:
    """Rows in the middle of NaN: the same result as contiguous inputs."""
    inputs = case.make(37, 20)
    hostile = [poisoned(x) if x.ndim == 2 else x for x in inputs]
    torch.testing.assert_close(
        case.call(ssl, hostile), case.call(ssl, inputs), atol=1e-6, rtol=1e-6
    )


@EVERY
def test_degenerate_inputs_stay_finite(case: Case) -> None:
    """Zero rows, all-equal rows, opposite rows, one row, none: finite losses and gradients."""
    n, d = 6, 8
    shapes = case.make(n, d)
    equal, zero = torch.ones(d), torch.zeros(d)

    def filled(row: Tensor, flip: bool = False) -> list[Tensor]:
        out = []
        for i, x in enumerate(shapes):
            sign = -1.0 if flip and i % 2 else 1.0
            out.append(x if x.ndim == 0 else (sign * row).expand(x.shape).clone())
        return out

    cases = {
        "equal": filled(equal),
        "zero": filled(zero),
        "opposite": filled(equal, flip=True),
        "one": case.make(1, d),
        "none": [x[:0] if x.ndim else x for x in shapes],
    }
    for name, inputs in cases.items():
        leaves = [x.detach().clone().requires_grad_() for x in inputs]
        loss = case.call(ssl, leaves)
        assert bool(loss.isfinite().all()), f"{case.name} {name}: {loss}"
        grads = torch.autograd.grad(loss.sum(), leaves, allow_unused=True)
        for i, grad in enumerate(grads):
            assert grad is None or bool(grad.isfinite().all()), f"{case.name} {name} gradient {i}"


@EVERY
def test_nan_input_gives_nan(case: Case) -> None:
    """Never a wrong number."""
    inputs = case.make(6, 8)
    inputs[0] = inputs[0].clone()
    inputs[0].view(-1)[0] = torch.nan
    loss = case.call(ssl, inputs)
    assert bool(loss.isnan().any()), case.name


@EVERY
def test_compile_fullgraph(case: Case) -> None:
    """Inside a model, forward and backward, without a graph break."""
    inputs = case.make(6, 8)
    weight = torch.eye(8).mul_(1.5).requires_grad_()

    def model(*x: Tensor) -> Tensor:
        return case.call(ssl, [y @ weight if y.ndim else y for y in x]).sum()

    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    (expected,) = torch.autograd.grad(model(*inputs), weight)
    (got,) = torch.autograd.grad(compiled(*inputs), weight)
    torch.testing.assert_close(got, expected)


@EVERY
def test_autocast_gives_float32(case: Case) -> None:
    """Like cross_entropy: the loss of float32 features does not change under autocast."""
    inputs = case.make(12, 16)
    expected = case.call(ssl, inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = case.call(ssl, inputs)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-6)


# ------------------------------------------------------------------------ temperatures, extremes


@pytest.mark.parametrize("temperature", [1e-3, *TEMPERATURES, 10.0])
@pytest.mark.parametrize("noise", [0.0, 0.01, 0.5], ids=lambda x: f"noise {x}")
def test_temperatures(on_engine: str, temperature: float, noise: float) -> None:
    """NT-Xent, InfoNCE, CLIP, SupCon and DCL over temperatures, aligned views included."""
    z1, z2 = views(65, 32, noise=noise)
    queue = negatives(65, 32)
    for name, ours, truth in (
        (
            "nt_xent_loss",
            lambda a, b: ssl.nt_xent_loss(a, b, temperature),
            lambda a, b: reference.nt_xent_loss(a, b, temperature),
        ),
        (
            "info_nce_loss",
            lambda a, b: ssl.info_nce_loss(a, b, queue, temperature),
            lambda a, b: reference.info_nce_loss(a, b, queue.to(a.dtype), temperature),
        ),
        (
            "clip_loss",
            lambda a, b: ssl.clip_loss(a, b, 1 / temperature, normalize=True),
            lambda a, b: reference.clip_loss(a, b, 1 / temperature, normalize=True),
        ),
        (
            "dcl_loss",
            lambda a, b: ssl.dcl_loss(a, b, temperature),
            lambda a, b: reference.dcl_loss(a, b, temperature),
        ),
    ):
        # The rounding of a logit of 1 / T moves exp by eps / T.
        slack = 5e-6 + 2e-7 / temperature
        check_loss(ours, truth, [z1, z2], slack=slack, name=f"{on_engine} {name} T={temperature}")


def test_aligned_views_keep_their_gradient(on_engine: str) -> None:
    """Close views at T = 0.02, where the softmax of eager float32 rounds to 1."""
    z, noisy = views(256, 128, noise=0.2)

    def gradient(function: Callable, a: Tensor, b: Tensor) -> Tensor:
        a = a.clone().requires_grad_()
        return torch.autograd.grad(function(a, b, 0.02), a)[0].double()

    truth = gradient(reference.nt_xent_loss, z.double(), noisy.double())
    error = (gradient(ssl.nt_xent_loss, z, noisy) - truth).norm() / truth.norm()
    eager = (gradient(reference.nt_xent_loss, z, noisy) - truth).norm() / truth.norm()
    assert error < 1e-3 and eager > 0.1, f"{on_engine}: ours {error:.1e}, eager {eager:.1e}"


def test_opposite_positives_at_low_temperature(on_engine: str) -> None:
    """z2 = -z1 at T = 0.01: losses of about 200, whose gradient others lose."""
    z = views(64, 32)[0]
    check_loss(
        lambda a, b: ssl.nt_xent_loss(a, b, 0.01),
        lambda a, b: reference.nt_xent_loss(a, b, 0.01),
        [z, -z],
        slack=2e-5,
        name=f"{on_engine} opposite",
    )
    assert ssl.nt_xent_loss(z, -z, 0.01) > 100


@pytest.mark.parametrize("scale", [1e4, -1e4])
def test_logits_to_1e4(on_engine: str, scale: float) -> None:
    """CLIP and SigLIP with logits of +-1e4."""
    x, y = unit_pair(65, 16)
    check_loss(
        lambda a, b: ssl.clip_loss(a, b, scale),
        lambda a, b: reference.clip_loss(a, b, scale),
        [x, y],
        slack=2e-3,
        name=f"{on_engine} clip {scale}",
    )
    check_loss(
        lambda a, b: ssl.siglip_loss(a, b, scale, -10.0),
        lambda a, b: reference.siglip_loss(a, b, scale, -10.0),
        [x, y],
        slack=2e-3,
        name=f"{on_engine} siglip {scale}",
    )
