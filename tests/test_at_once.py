# SPDX-License-Identifier: Apache-2.0
"""Of a small batch the gradients come with the value: same bits, handed out once."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from flat import LAYOUTS, contrastive, own_arguments
from torch import Tensor

from sslkernels.backends import chunked, cpu
from sslkernels.backends.interface import Problem, Wanted
from sslkernels.ops import contrastive as ops

_C = pytest.importorskip("sslkernels._C", reason="the C++ extension is not built")

SMALL = [layout for layout in LAYOUTS if layout != "bank"]
DTYPES = (torch.float32, torch.float64)


@pytest.fixture
def backward_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one with every backward pass of the kernels."""
    calls: list[int] = []
    kernel = cpu.contrastive_backward

    def counted(*args: Any) -> Any:
        calls.append(1)
        return kernel(*args)

    monkeypatch.setattr(cpu, "contrastive_backward", counted)
    return calls


def inputs_of(layout: str, n: int, d: int, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    torch.manual_seed(0)
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    named: dict[str, Any] = {
        "a": torch.randn(n, d, dtype=dtype, requires_grad=True),
        "b": torch.randn(n, d, dtype=dtype, requires_grad=layout != "classes"),
        "scale": torch.tensor(7.0, dtype=acc, requires_grad=True),
    }
    return named | own_arguments(layout, n, acc)


def loss_of(layout: str, named: dict[str, Any], **more: Any) -> Tensor:
    return contrastive(layout, **named, **more).loss


def leaves(named: dict[str, Any]) -> list[Tensor]:
    return [x for x in named.values() if isinstance(x, Tensor) and x.requires_grad]


def by_two_calls(layout: str, named: dict[str, Any], reduction: str) -> Tensor:
    """The loss by the registered op, whose backward pass is a call of its own."""
    b = named["a"].detach() if layout == "classes" else named["b"]
    problem = Problem(layout, **named | {"b": b}, bank=None, reduction=reduction)
    return ops.CONTRASTIVE.default(*problem, False)[0]


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", SMALL)
def test_same_bits_as_two_calls(
    isa: str, layout: str, dtype: torch.dtype, reduction: str, backward_calls: list[int]
) -> None:
    for n, d in ((0, 5), (1, 1), (2, 129), (17, 7), (33, 100), (64, 128), (91, 96)):
        for wanted in (slice(None), slice(0, 1), slice(1, 2)):
            named = inputs_of(layout, n, d, dtype)
            inputs = leaves(named)[wanted]
            for x in leaves(named):
                x.requires_grad_(any(x is y for y in inputs))
            ours, other = (
                loss_of(layout, named, reduction=reduction),
                by_two_calls(layout, named, reduction),
            )
            assert torch.equal(ours, other)
            for factor in (1.0, 0.25, -65536.0):  # powers of two round nothing
                incoming = torch.tensor(factor, dtype=ours.dtype)
                ours = loss_of(layout, named, reduction=reduction)
                backward_calls.clear()
                found = torch.autograd.grad(ours, inputs, incoming)
                assert not backward_calls
                expected = torch.autograd.grad(other, inputs, incoming, retain_graph=True)
                for x, y in zip(found, expected, strict=True):
                    assert torch.equal(x, y) and x.dtype == y.dtype
                    assert x.stride() == y.stride()


@pytest.mark.parametrize("layout", SMALL)
def test_a_factor_that_rounds_is_the_kernels(layout: str, backward_calls: list[int]) -> None:
    """A multiplied gradient would have other bits than those of the second backward pass."""
    named = inputs_of(layout, 40, 33)
    for factor in (0.3, -3.0, 0.0, math.inf, math.nan):
        incoming = torch.tensor(factor)
        backward_calls.clear()
        loss = loss_of(layout, named)
        found = [
            torch.autograd.grad(loss, leaves(named), incoming, retain_graph=True) for _ in "ab"
        ]
        assert len(backward_calls) == 2
        other = by_two_calls(layout, named, "mean")
        expected = torch.autograd.grad(other, leaves(named), incoming)
        for x, y, z in zip(*found, expected, strict=True):
            torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)
            torch.testing.assert_close(x, z, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("layout", SMALL)
def test_handed_out_once(layout: str, backward_calls: list[int]) -> None:
    """A second backward pass computes again: whoever got the gradients may have written to them."""
    named = inputs_of(layout, 30, 20)
    inputs = leaves(named)
    loss = loss_of(layout, named)
    first = torch.autograd.grad(loss, inputs, retain_graph=True)
    kept = [x.clone() for x in first]
    for x in first:
        x.zero_()
    assert not backward_calls
    second = torch.autograd.grad(loss, inputs, retain_graph=True)
    third = torch.autograd.grad(loss, inputs, torch.tensor(0.5))
    assert len(backward_calls) == 2
    for x, y, z in zip(kept, second, third, strict=True):
        assert torch.equal(x, y) and torch.equal(x / 2, z)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, inputs)


def test_gradients_accumulate_in_parameters() -> None:
    """``backward`` may take the tensors as they are; the next step must not write to the last one's."""
    named = inputs_of("joint", 16, 8)
    a = named["a"]
    loss_of("joint", named).backward()
    first, kept = a.grad, a.grad.clone()
    loss_of("joint", named).backward()
    assert torch.equal(a.grad, 2 * kept)
    a.grad = None
    loss_of("joint", named).backward()
    assert torch.equal(a.grad, kept) and first is not a.grad


def test_what_changed_since_forward_is_refused() -> None:
    named = inputs_of("cross", 16, 8)
    a = named["a"] = named["a"].clone()
    loss = loss_of("cross", named)
    with torch.no_grad():
        a += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_transforms_of_backward() -> None:
    """A second derivative raises, also where the first was at hand; batches of them work."""
    named = inputs_of("joint", 16, 8)
    a = named["a"]
    (first,) = torch.autograd.grad(loss_of("joint", named), a)
    (again,) = torch.autograd.grad(loss_of("joint", named), a, create_graph=True)
    assert torch.equal(first, again)
    with pytest.raises(RuntimeError, match="second derivatives"):
        again.sum().backward()
    incoming = torch.tensor([1.0, 0.5, -2.0])
    (rows,) = torch.autograd.grad(loss_of("joint", named), a, incoming, is_grads_batched=True)
    assert torch.equal(rows, first * incoming[:, None, None])


@pytest.mark.parametrize("layout", SMALL)
def test_strided_rows(layout: str) -> None:
    """Gradients are contiguous whatever the rows were; rows that are copied outlive the call."""
    named = inputs_of(layout, 24, 10)
    expected = torch.autograd.grad(loss_of(layout, named), leaves(named))
    for place in (
        lambda x: torch.cat((x, x), 1)[:, : x.shape[1]],
        lambda x: x.t().contiguous().t(),
        lambda x: torch.stack((x, x), 2)[:, :, 0],
    ):
        moved = dict(named)
        for name in ("a", "b"):
            moved[name] = place(named[name].detach()).requires_grad_(named[name].requires_grad)
        found = torch.autograd.grad(loss_of(layout, moved), leaves(moved))
        for x, y in zip(found, expected, strict=True):
            assert torch.equal(x, y) and x.is_contiguous()


def test_where_two_calls_are_better() -> None:
    def at_once(
        n: int = 32, d: int = 64, dtype: torch.dtype = torch.float32, **changed: Any
    ) -> bool:
        x, scale = torch.randn(n, d, dtype=dtype), torch.tensor(5.0, dtype=torch.float32)
        scale = scale.double() if dtype == torch.float64 else scale
        problem = Problem(
            **{"layout": "joint", "a": x, "b": x, "bank": None, "scale": scale} | changed
        )
        return cpu.contrastive_at_once(problem, Wanted(True, True)) is not None

    assert at_once() and at_once(dtype=torch.float64) and at_once(reduction="sum")
    assert at_once(n=127) and not at_once(n=128)  # 256 rows of 64: 2^22 multiply-adds
    assert at_once(n=255, layout="cross") and not at_once(n=256, layout="cross")
    assert not at_once(dtype=torch.bfloat16) and not at_once(dtype=torch.float16)  # rounded already
    assert not at_once(reduction="none") and not at_once(bf16=True)
    assert not at_once(layout="bank", bank=torch.randn(9, 64))
    assert not hasattr(chunked, "contrastive_at_once")


@pytest.mark.parametrize(
    "changed", [{"layout": "bank"}, {"reduction": "none"}], ids=lambda x: next(iter(x))
)
def test_binding_refuses(changed: dict[str, str]) -> None:
    x, scale, da = torch.randn(4, 8), torch.tensor(5.0), torch.empty(4, 8)
    problem = Problem(**{"layout": "cross", "a": x, "b": x, "bank": None, "scale": scale} | changed)
    with pytest.raises(ValueError, match="^contrastive_at_once: it takes no layout 'bank' and no"):
        _C.contrastive_at_once(
            cpu._contrastive(problem, x, x),
            state=torch.empty(16).data_ptr(),
            loss=torch.empty(4).data_ptr(),
            da=da.data_ptr(),
            db=None,
            want_dscale=False,
        )
