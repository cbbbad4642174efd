# SPDX-License-Identifier: Apache-2.0
"""The whole-loss ops ``contrastive`` and ``regression``: every layout against the composed path."""

from __future__ import annotations

import pytest
import torch
from flat import JOINED, LAYOUTS, RANKED, contrastive, own_arguments
from helpers import check_loss
from torch import Tensor

import sslkernels
from sslkernels.backends.interface import State
from sslkernels.ops import registry

_C = pytest.importorskip("sslkernels._C", reason="the C++ extension is not built")

TOLERANCE = {torch.float32: 5e-5, torch.float64: 1e-11, torch.bfloat16: 1e-2}


def run(backend: str, layout: str, reduction: str, *inputs: Tensor | None) -> list[Tensor]:
    """Loss, lse and gradients of a, b, scale and, where there is one, bias."""
    a, b, scale = (x.clone().requires_grad_() for x in inputs[:3] if x is not None)
    bank, weight = inputs[3:]
    own = own_arguments(layout, len(a), scale.dtype)
    with registry.backend(backend):
        out = contrastive(
            layout,
            a,
            b,
            bank,
            scale=scale,
            reduction=reduction,
            want_rank=layout in RANKED,
            **own,
        )
        out.loss.backward(weight if reduction == "none" else None)
    lse = State.split(out.state, len(a)).lse
    leaves = [x for x in (a, b, scale, own.get("bias")) if x is not None and x.grad is not None]
    return [out.loss.detach(), lse.detach(), *(x.grad for x in leaves)]


# (2, 3): less than a tile; (33, 24): half a block and one; (65, 129): odd rows, one feature too many;
# (130, 100): several blocks; (576, 16): whole blocks and vectors of every instruction set, for which
# gradients are accumulated in the results themselves.
@pytest.mark.parametrize("shape", [(2, 3), (33, 24), (65, 129), (130, 100), (576, 16)], ids=str)
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
            weight = torch.randn(2 * n if layout in JOINED else n, dtype=acc)
            ours = run("cpu", layout, reduction, a, b, scale, bank, weight)
            wide = [x if x is None else x.double() for x in (a, b, scale, bank, weight)]
            truth = run("chunked", layout, reduction, *wide)
            for name, (x, y) in enumerate(zip(ours, truth, strict=True)):
                error = (x.double() - y).abs().max().item()
                size = max(y.abs().max().item(), 1e-3)
                assert error <= TOLERANCE[dtype] * size, (name, isa, layout, reduction, error, size)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (1, 2)], ids=str)
def test_some_gradients(isa: str, layout: str, wanted: tuple[int, ...]) -> None:
    """Of a, b and scale, each alone too, where results double as scratch: the same as with all."""
    torch.manual_seed(0)
    inputs = [torch.randn(576, 16), torch.randn(576, 16), torch.tensor(5.0)]
    bank = torch.randn(70, 16) if layout == "bank" else None
    grads = []
    for chosen in (wanted, (0, 1, 2)):
        leaves = [x.clone().requires_grad_(i in chosen) for i, x in enumerate(inputs)]
        own = own_arguments(layout, 576)
        if layout == "classes" and wanted == (1,):
            return  # there is no b
        contrastive(layout, leaves[0], leaves[1], bank, scale=leaves[2], **own).loss.backward()
        grads.append([x.grad for x in leaves])
    for i, (x, y) in enumerate(zip(*grads, strict=True)):
        if layout == "classes" and i == 1:
            continue
        assert (x is None) == (i not in wanted)
        if x is not None:
            # One side alone is another pass over the tiles, in another order.
            torch.testing.assert_close(x, y, rtol=2e-5, atol=2e-6 * y.abs().max().item())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(layout: str) -> None:
    a, b = (torch.randn(5, 8, requires_grad=True) for _ in range(2))
    bank = torch.randn(7, 8) if layout == "bank" else None
    scale = torch.tensor(5.0, requires_grad=True)
    torch.library.opcheck(
        torch.ops.sslkernels.contrastive.default,
        (
            *(layout, a, b.detach() if layout == "classes" else b, bank, scale),
            *(torch.tensor([0, 1, 0, 0, 2]) if layout == "classes" else None, None),
            *(True, "mean", False),
            torch.tensor(0.5, requires_grad=True) if layout == "sigmoid" else None,
            0.5 if layout == "decoupled" else 0.0,
            layout in RANKED,
        ),
    )


def test_opcheck_regression() -> None:
    p, t = torch.randn(5, 8, requires_grad=True), torch.randn(5, 8)
    for cosine in (False, True):
        torch.library.opcheck(torch.ops.sslkernels.regression.default, (p, t, "none", cosine))


def test_many_blocks() -> None:
    """Enough rows for several blocks to share one packing, which no small case reaches."""
    torch.manual_seed(0)
    z1, z2 = (torch.randn(4130, 16, requires_grad=True) for _ in range(2))
    got = torch.autograd.grad(sslkernels.nt_xent_loss(z1, z2, 0.5), (z1, z2))
    with sslkernels.backend("chunked"):
        want = torch.autograd.grad(sslkernels.nt_xent_loss(z1, z2, 0.5), (z1, z2))
    for x, y in zip(got, want, strict=True):
        assert (x - y).abs().max() <= 2e-5 * y.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_halves_are_packed_by_groups(
    isa: str, layout: str, normalize: bool, dtype: torch.dtype
) -> None:
    """16-bit rows are widened group by group: several groups, the last one ragged."""
    torch.manual_seed(0)
    n = 1161 if layout in JOINED else 2323
    size = 1.0 if normalize else 0.2
    inputs = [size * torch.randn(n, 24) for _ in range(2)]
    bank = (size * torch.randn(2500, 24)).to(dtype) if layout == "bank" else None
    inputs = [x.to(dtype) for x in inputs]

    def loss(a: Tensor, b: Tensor) -> Tensor:
        scale = torch.tensor(
            5.0, dtype=torch.float64 if a.dtype == torch.float64 else torch.float32
        )
        keys = None if bank is None else bank.to(a.dtype)
        own = own_arguments(layout, n, scale.dtype)
        return contrastive(layout, a, b, keys, scale=scale, normalize=normalize, **own).loss

    def chunked(a: Tensor, b: Tensor) -> Tensor:
        with sslkernels.backend("chunked"):
            return loss(a, b)

    check_loss(loss, chunked, inputs, name=f"{layout} {isa}")


def test_positive_of_each_magnitude(isa: str) -> None:
    """One negative whose logit is 0: relative to log(1 + exp(-s)) and to its derivative, in float64."""
    s = torch.linspace(-60.0, 60.0, 4001, dtype=torch.float64)[:, None].requires_grad_()
    one = torch.ones(1, 1, dtype=torch.float64)
    loss = contrastive(
        "bank", s, one.expand(4001, 1), 0 * one, scale=one[0, 0], normalize=False, reduction="none"
    ).loss
    (slope,) = torch.autograd.grad(loss.sum(), s)
    exact = s.detach()[:, 0]
    truth = exact.neg().clamp(min=0) + exact.abs().neg().exp().log1p()
    for got, right in ((loss, truth), (slope[:, 0], -exact.neg().sigmoid())):
        allowed = 1e-15 * (1 + exact.abs()) * right.abs()
        assert bool(((got - right).abs() <= allowed).all())


BF16_TOLERANCE = 4e-2


@pytest.mark.skipif(not _C.has_bf16(), reason="the processor lacks AVX512-BF16")
@pytest.mark.parametrize("shape", [(1, 1), (2, 3), (33, 31), (65, 129), (300, 100)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale", [5.0, 200.0])
def test_bfloat16_arithmetic(layout: str, shape, dtype: torch.dtype, scale: float) -> None:
    """Close to float64, and closer to it than to anything when the operands are bfloat16 already."""
    torch.manual_seed(0)
    n, d = shape
    a, b = (torch.randn(n, d).to(dtype).requires_grad_() for _ in range(2))
    bank = torch.randn(2 * n + 3, d).to(dtype) if layout == "bank" else None
    factor = torch.tensor(scale, requires_grad=True)
    own = own_arguments(layout, n)
    out = contrastive(layout, a, b, bank, scale=factor, bf16=True, **own)
    names = ("da", "dscale") if layout == "classes" else ("da", "db", "dscale")
    inputs = (a, factor) if layout == "classes" else (a, b, factor)
    grads = torch.autograd.grad(out.loss, inputs)
    with sslkernels.backend("chunked"):
        wide = [x.detach().double().requires_grad_() for x in (a, b, factor)]
        keys = None if bank is None else bank.double()
        own = own_arguments(layout, n, torch.float64)
        truth = contrastive(layout, *wide[:2], keys, scale=wide[2], **own)
        true_grads = torch.autograd.grad(
            truth.loss, [wide[0], wide[2]] if len(names) == 2 else wide
        )
    # Rounded similarities are off by 2^-8, which the scale multiplies.
    assert abs(out.loss.item() - truth.loss.item()) <= 2**-8 * scale
    if scale > 100:
        return  # exp(200 * 2^-8) is no small error: only finite
    for name, x, y in zip(names, grads, true_grads, strict=True):
        assert x.isfinite().all(), name
        error = (x.double() - y).norm().item()
        floor = 2e-2 if name == "dscale" else 1e-4  # a sum that may cancel
        assert error <= BF16_TOLERANCE * max(y.norm().item(), floor), (name, error, y.norm().item())


@pytest.mark.skipif(not _C.has_bf16(), reason="the processor lacks AVX512-BF16")
def test_bfloat16_positives_are_exact() -> None:
    """Aligned views at a small temperature: a rounded positive would be off by tens of percent."""
    torch.manual_seed(0)
    z = torch.randn(64, 128)
    inputs = [z, z + 1e-3 * torch.randn_like(z)]
    results = []
    for dtype, compute in ((torch.float32, torch.bfloat16), (torch.float64, None)):
        leaves = [x.to(dtype).requires_grad_() for x in inputs]
        loss = sslkernels.nt_xent_loss(*leaves, 0.07, compute_dtype=compute)
        results.append([loss, *torch.autograd.grad(loss, leaves)])
    for x, y in zip(*results, strict=True):
        assert (x.double() - y).norm() <= 0.1 * y.norm()


def test_bfloat16_is_refused_where_it_can_not_be() -> None:
    a = torch.randn(4, 8)
    with pytest.raises(ValueError, match="compute_dtype must be None or torch.bfloat16"):
        sslkernels.nt_xent_loss(a, a, compute_dtype=torch.float16)
    with pytest.raises(ValueError, match="compute_dtype must be None for float64"):
        sslkernels.nt_xent_loss(a.double(), a.double(), compute_dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="compute_dtype works with two views"):
        sslkernels.nt_xent_loss([a, a, a], compute_dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="compute_dtype must be None for paired"):
        sslkernels.info_nce_loss(
            a, a, torch.randn(4, 3, 8), negative_mode="paired", compute_dtype=torch.bfloat16
        )
    before = _C.isa()
    _C.set_isa("baseline")
    try:
        with pytest.raises(RuntimeError, match="AVX512-BF16"):
            sslkernels.nt_xent_loss(a, a, compute_dtype=torch.bfloat16)
    finally:
        _C.set_isa(before)


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
