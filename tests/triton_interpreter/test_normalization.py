# SPDX-License-Identifier: Apache-2.0
"""Losses on the Triton backend normalise by its kernels: counted, and held to float64."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from dense import randn
from helpers import SLACK, check_budget, check_loss
from torch import Tensor

import sslkernels
from sslkernels import reference
from sslkernels.backends import triton as backend
from sslkernels.backends.triton import contrastive
from sslkernels.backends.triton.runtime import recorded_launches
from sslkernels.ops import normalization
from sslkernels.ops.unit import unit_rows

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
N, D = 22, 40

Loss = Callable[..., Tensor]


def _labels() -> Tensor:
    return torch.arange(N) // 2 % 7


# name: (loss of a module and rows, how many inputs, launches of the forward kernel in the forward pass and
# in the backward pass, launches of the backward kernel).  Losses in one op normalise again in backward
# and keep nothing but their inputs; the others keep the rows.
LOSSES: dict[str, tuple[Callable[[object], Loss], int, int, int, int]] = {
    "nt_xent": (lambda m: lambda a, b: m.nt_xent_loss(a, b, 0.2), 2, 0, 0, 0),  # kernels of its own
    "nt_xent, 3 views": (lambda m: lambda *v: m.nt_xent_loss(v, temperature=0.2), 3, 1, 0, 1),
    "info_nce": (lambda m: lambda a, b: m.info_nce_loss(a, b, None, 0.2), 2, 2, 2, 2),
    "info_nce, learned bank": (lambda m: lambda *x: m.info_nce_loss(*x, 0.2), 3, 3, 0, 3),
    "info_nce, paired": (
        lambda m: lambda *x: m.info_nce_loss(*x, 0.2, negative_mode="paired"),
        3,
        3,
        3,
        3,
    ),
    "clip": (lambda m: lambda a, b: m.clip_loss(a, b, 5.0, normalize=True), 2, 2, 2, 2),
    "siglip": (lambda m: lambda a, b: m.siglip_loss(a, b, 5.0, -3.0, normalize=True), 2, 2, 2, 2),
    "dcl": (lambda m: lambda a, b: m.dcl_loss(a, b, 0.2), 2, 2, 2, 2),
    "sup_con": (lambda m: lambda a: m.sup_con_loss(a, _labels(), 0.2), 1, 1, 1, 1),
    "triplet": (
        lambda m: lambda a: m.triplet_loss(a, _labels(), 0.5, mining="hard", normalize=True),
        1,
        1,
        1,
        1,
    ),
    "alignment": (lambda m: lambda a, b: m.alignment_loss(a, b), 2, 2, 0, 2),
    "uniformity": (lambda m: lambda a: m.uniformity_loss(a), 1, 1, 1, 1),
    "simsiam": (lambda m: lambda *x: m.simsiam_loss(*x), 4, 4, 0, 2),
}
EVERY = pytest.mark.parametrize("name", LOSSES)


def _rows(count: int, dtype: torch.dtype) -> list[Tensor]:
    """Views of the same samples, of norms from 1e-2 to 1e2."""
    base = randn(N, D, seed=0)
    length = torch.logspace(-2, 2, N)[:, None]
    return [((base + 0.5 * randn(N, D, seed=i + 1)) * length).to(dtype) for i in range(count)]


def _inputs(name: str, dtype: torch.dtype) -> list[Tensor]:
    views = _rows(LOSSES[name][1], dtype)
    if name == "info_nce, paired":  # [N, 4, D]
        views[2] = torch.stack([views[2].roll(i, 0) for i in range(4)], 1)
    return views


def _in_a_wider_buffer(x: Tensor) -> Tensor:
    """The same values with NaN between the rows; the gradient reaches x."""
    return torch.cat((x, torch.full_like(x[..., :3], torch.nan)), -1)[..., : x.shape[-1]]


def _column_by_column(x: Tensor) -> Tensor:
    return x.transpose(-1, -2).contiguous().transpose(-1, -2)


def _counted(log: list) -> Counter[str]:
    return Counter(entry.kernel for entry in log if entry.kernel.startswith("normalize"))


def _refuse(*_: object, **__: object) -> Tensor:
    raise AssertionError("rows were normalised by torch")


@EVERY
def test_the_kernels_run_and_torch_does_not(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Launches of forward and backward pass, exactly; torch's own normalisation would raise."""
    loss, _, forward, again, backward = LOSSES[name]
    leaves = [x.requires_grad_() for x in _inputs(name, torch.float32)]
    monkeypatch.setattr(torch.nn.functional, "normalize", _refuse)
    if name != "triplet":  # whose distances are norms
        monkeypatch.setattr(torch.linalg, "vector_norm", _refuse)
    with sslkernels.backend("triton"):
        with recorded_launches() as log:
            value = loss(sslkernels)(*leaves)
        assert _counted(log) == Counter(normalize_kernel=forward)
    with recorded_launches() as log:  # the backward pass remembers the backend
        value.backward()
    assert _counted(log) == +Counter(normalize_kernel=again, normalize_backward_kernel=backward)


def test_a_queue_is_normalised_by_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once, in the forward pass; nothing of it is left for the backward pass."""
    monkeypatch.setattr(torch.nn.functional, "normalize", _refuse)
    monkeypatch.setattr(torch.linalg, "vector_norm", _refuse)
    query, key, bank = _rows(3, torch.float32)
    query.requires_grad_()
    with sslkernels.backend("triton"), recorded_launches() as log:
        value = sslkernels.info_nce_loss(query, key, bank, 0.2)
        assert _counted(log) == Counter(normalize_kernel=3)
        value.backward()
    assert _counted(log) == Counter(normalize_kernel=5, normalize_backward_kernel=1)


@EVERY
@pytest.mark.parametrize(
    ("dtype", "as_on_a_gpu"),
    [(dtype, False) for dtype in DTYPES] + [(dtype, True) for dtype in DTYPES[1:]],
    ids=str,
)
@pytest.mark.parametrize("layout", [_in_a_wider_buffer, _column_by_column])
def test_losses_and_gradients(
    name: str,
    dtype: torch.dtype,
    as_on_a_gpu: bool,
    layout: Callable[[Tensor], Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Within the budget, from strided rows whose norms span four decades.

    As on a GPU normalised halves are halves again: the loss is then as exact as they are.
    """
    loss_slack = None
    if as_on_a_gpu:
        monkeypatch.setattr(normalization, "operand_dtype", lambda x: x.dtype)
        monkeypatch.setattr(contrastive, "exact_dtype", lambda x: x.dtype)
        loss_slack = SLACK[dtype] / 4
    make, *_ = LOSSES[name]
    with sslkernels.backend("triton"), recorded_launches() as log:
        # Gradients of a row are of the order of 1 / its norm: each size of rows is held to its own.
        for sized in (slice(0, N), slice(N // 2, N)):
            check_loss(
                lambda *x, at=sized: make(sslkernels)(*(layout(_only(y, at)) for y in x)),
                lambda *x, at=sized: make(reference)(*(_only(y, at) for y in x)),
                _inputs(name, dtype),
                name=name,
                loss_slack=loss_slack,
            )
    ran = {entry.kernel for entry in log}
    own = {"prepare_kernel", "weigh_pairs_kernel", "finish_kernel"}
    assert (own if name == "nt_xent" else {"normalize_kernel", "normalize_backward_kernel"}) <= ran


def _only(x: Tensor, at: slice) -> Tensor:
    """x whose gradient is that of some rows."""
    chosen = torch.zeros(len(x), dtype=torch.bool)
    chosen[at] = True
    return torch.where(chosen.view(-1, *[1] * (x.ndim - 1)), x, x.detach())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "name", ["nt_xent", "info_nce", "info_nce, paired", "clip", "siglip", "sup_con"]
)
def test_rows_below_the_smallest_norm(name: str, dtype: torch.dtype) -> None:
    """A zero row and one of norm 1e-13 are divided by 1e-12, a constant: gradients of 1e12."""
    make, *_ = LOSSES[name]
    inputs = _inputs(name, dtype)
    for x in inputs:
        first = x.view(N, -1, D)[:, 0]  # of paired negatives, which have others beside them
        first[3] = 0.0
        first[5] *= 1e-13 / first[5].float().norm()  # in float16: 0 as well
    results = []
    for module, wide in ((sslkernels, False), (reference, True)):
        leaves = [(x.double() if wide else x.clone()).requires_grad_() for x in inputs]
        with sslkernels.backend("triton"):
            loss = make(module)(*leaves)
            results.append((loss, torch.autograd.grad(loss, leaves)))
    (loss, grads), (truth, true_grads) = results
    check_budget(loss, truth, truth, 2e-6, f"{name} loss", floor=1.0)
    tiny = torch.zeros(N, dtype=torch.bool)
    tiny[3] = tiny[5] = True
    assert true_grads[0][tiny].abs().max() > 1e6
    for got, true in zip(grads, true_grads, strict=True):
        got, true = got.double(), true.to(dtype).double()  # 1e12 is inf in float16
        assert torch.allclose(got[tiny], true[tiny], rtol=4 * SLACK[dtype], atol=1e4)
        check_budget(got[~tiny], true[~tiny], true[~tiny], SLACK[dtype], f"{name} gradient")


def test_float64_and_other_backends_keep_torch() -> None:
    """No kernel for float64 rows, nor where another backend was asked for."""
    (x,) = _rows(1, torch.float32)
    with recorded_launches() as log:
        with sslkernels.backend("triton"):
            wide = sslkernels.sup_con_loss(x.double(), _labels(), 0.2)
        with sslkernels.backend("chunked"):
            plain = sslkernels.sup_con_loss(x, _labels(), 0.2)
    assert _counted(log) == Counter()
    assert torch.allclose(wide, reference.sup_con_loss(x.double(), _labels(), 0.2), rtol=1e-12)
    assert torch.allclose(plain.double(), wide, rtol=1e-5)


def test_nothing_to_normalise_launches_nothing() -> None:
    """No rows, or rows of no features: the right shapes, norms of 0."""
    for n, d in ((0, 8), (3, 0)):
        x = torch.zeros(n, d)
        with recorded_launches() as log:
            unit, norm = backend.normalize_rows(x)
            dx = backend.normalize_rows_backward(x, x, norm)
        assert not log and unit.shape == dx.shape == (n, d) and not norm.any()


def test_rows_go_where_they_are_wanted() -> None:
    """Into a part of a larger buffer, in another dtype; a buffer that does not fit is refused."""
    (x,) = _rows(1, torch.float16)
    buffer = torch.full((N + 2, D), torch.nan)
    unit, norm = backend.normalize_rows(x, 1e-12, buffer[1:-1])
    assert unit.data_ptr() == buffer[1:].data_ptr() and norm.dtype == torch.float32
    assert torch.allclose(buffer[1:-1], torch.nn.functional.normalize(x.float(), dim=1), rtol=1e-6)
    assert buffer[0].isnan().all() and buffer[-1].isnan().all()
    for bad in (torch.empty(N, D + 1)[:, :D], torch.empty(N + 1, D)):
        with pytest.raises(ValueError, match="normalize_rows: out must be contiguous and"):
            backend.normalize_rows(x, 1e-12, bad)


@pytest.mark.parametrize("name", ["nt_xent", "sup_con", "siglip"])
def test_compiled(name: str) -> None:
    """In one graph, with the kernels in it."""
    make, _, forward, again, backward = LOSSES[name]
    leaves = [x.requires_grad_() for x in _inputs(name, torch.float32)]
    torch.compiler.reset()
    with sslkernels.backend("triton"):
        expected = torch.autograd.grad(make(sslkernels)(*leaves), leaves)
        compiled = torch.compile(make(sslkernels), fullgraph=True, backend="aot_eager")
        with recorded_launches() as log:
            got = torch.autograd.grad(compiled(*leaves), leaves)
    for ours, eager in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, eager)
    counted = _counted(log)
    assert counted["normalize_kernel"] == forward + again
    assert counted["normalize_backward_kernel"] == backward


def test_opcheck_and_second_derivative() -> None:
    """The registered ops; a derivative of the gradient is torch's."""
    (x,) = _rows(1, torch.float32)
    dunit = randn(N, D, seed=9)
    with sslkernels.backend("triton"):
        torch.library.opcheck(torch.ops.sslkernels.unit_rows.default, (x.requires_grad_(),))
        _, norm = torch.ops.sslkernels.unit_rows.default(x.detach())
        torch.library.opcheck(
            torch.ops.sslkernels.unit_rows_backward.default, (x.detach(), norm, dunit)
        )
        with recorded_launches() as log:
            unit = unit_rows(x)
            (first,) = torch.autograd.grad((unit * dunit).sum(), x, create_graph=True)
            (second,) = torch.autograd.grad(first.square().sum(), x)
        assert _counted(log) == Counter(normalize_kernel=1)
    truth = x.detach().double().requires_grad_()
    true_unit = torch.nn.functional.normalize(truth, dim=1)
    (true_first,) = torch.autograd.grad(
        (true_unit * dunit.double()).sum(), truth, create_graph=True
    )
    (true_second,) = torch.autograd.grad(true_first.square().sum(), truth)
    assert torch.allclose(first.double(), true_first, rtol=1e-4, atol=1e-6)
    assert torch.allclose(second.double(), true_second, rtol=1e-3, atol=1e-4)
