# SPDX-License-Identifier: Apache-2.0
"""Normalised rows of the CPU's kernel against float64, and what losses that are composed of them take."""

from __future__ import annotations

import pytest
import torch
from helpers import check_budget, poisoned, threads
from torch import Tensor

from sslkernels.backends import cpu
from sslkernels.ops import normalization
from sslkernels.ops.unit import UNIT, unit_rows

EPS = 1e-12
HALVES = (torch.bfloat16, torch.float16)
SIZES = [(1, 1), (3, 7), (5, 16), (64, 33), (300, 129), (7, 1000), (0, 4), (4, 0)]


def made(n: int, d: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=generator).to(dtype)


def dense(x: Tensor, dunit: Tensor, acc: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Unit rows, norms and the gradient by torch's own operations."""
    leaf = x.to(acc).requires_grad_()
    norm = torch.linalg.vector_norm(leaf, dim=1)
    unit = leaf / norm.clamp(min=EPS)[:, None]
    (dx,) = torch.autograd.grad(unit, leaf, dunit.to(acc))
    return unit.detach(), norm.detach(), dx


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_rows_and_gradients(size: tuple[int, int], dtype: torch.dtype, isa: str) -> None:
    """Within the error of eager torch; nothing between or behind the rows is read."""
    x, dunit = made(*size, dtype), made(*size, torch.float32, 1)
    given, incoming = (poisoned(t) if t.numel() else t for t in (x, dunit))
    unit, norm = cpu.normalize_rows(given, EPS, torch.full(size, torch.nan))
    dx = cpu.normalize_rows_backward(incoming, given, norm, EPS)
    assert dx.dtype == dtype and norm.dtype == torch.float32
    eager, truth = dense(x, dunit, torch.float32), dense(x, dunit, torch.float64)
    for name, ours, one, other in zip(
        ("unit", "norm", "dx"), (unit, norm, dx), eager, truth, strict=True
    ):
        slack = 2e-6 if ours.dtype == torch.float32 else 2.0 ** (-8 if dtype is HALVES[0] else -11)
        check_budget(ours.float(), one, other, slack, name)


@pytest.mark.parametrize("unit_dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_dtypes_may_differ(dtype: torch.dtype, unit_dtype: torch.dtype, isa: str) -> None:
    """Of rows, unit rows and incoming gradients: each is float32 rounded once."""
    x = made(9, 20, dtype)
    wide, _ = cpu.normalize_rows(x.float(), EPS, None)
    unit, norm = cpu.normalize_rows(x, EPS, torch.empty(9, 20, dtype=unit_dtype))
    assert torch.equal(unit, wide.to(unit_dtype))
    dunit = made(9, 20, unit_dtype, 1)
    dx = cpu.normalize_rows_backward(dunit, x, norm, EPS)
    assert torch.equal(
        dx, cpu.normalize_rows_backward(dunit.float(), x.float(), norm, EPS).to(dtype)
    )
    assert torch.equal(cpu.normalize_rows_backward(dunit.double(), x, norm, EPS), dx)


def test_rows_without_a_direction(isa: str) -> None:
    """Zeros, rows shorter than eps, whose norm is a constant, one feature, and what is no number."""
    x = torch.zeros(6, 5)
    x[1, 2], x[2], x[3, 0], x[4, 1] = 1e-14, 1e-13, torch.inf, torch.nan
    x[5] = 1e19
    dunit = torch.linspace(-1, 1, 30).view(6, 5)
    unit, norm = cpu.normalize_rows(x, EPS, None)
    dx = cpu.normalize_rows_backward(dunit, x, norm, EPS)
    for ours, theirs in zip((unit, norm, dx), dense(x, dunit, torch.float32), strict=True):
        torch.testing.assert_close(ours, theirs, equal_nan=True)
    one = made(100, 1, torch.float32)
    unit, norm = cpu.normalize_rows(one, EPS, None)
    assert torch.equal(unit, one.sign())
    assert not cpu.normalize_rows_backward(made(100, 1, torch.float32, 1), one, norm, EPS).any()


def test_any_strides_and_threads(isa: str) -> None:
    x, dunit = made(900, 70, torch.float32), made(900, 70, torch.float32, 1)
    unit, norm = cpu.normalize_rows(x, EPS, None)
    dx = cpu.normalize_rows_backward(dunit, x, norm, EPS)
    for n_threads in (1, 2, 5):
        for other, given in ((x.t().contiguous().t(), dunit), (x, dunit.t().contiguous().t())):
            with threads(n_threads):
                again = cpu.normalize_rows(other, EPS, None)
                assert torch.equal(cpu.normalize_rows_backward(given, other, norm, EPS), dx)
            assert torch.equal(again[0], unit) and torch.equal(again[1], norm)
    row = made(1, 70, torch.float32)
    spread, _ = cpu.normalize_rows(row.expand(4, 70), EPS, None)
    assert torch.equal(spread, cpu.normalize_rows(row.repeat(4, 1), EPS, None)[0])
    one = torch.ones(()).expand(900, 70)
    got = cpu.normalize_rows_backward(one, x, norm, EPS)
    assert torch.equal(got, cpu.normalize_rows_backward(torch.ones(900, 70), x, norm, EPS))


def test_the_op_takes_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward; float64 and second derivatives are torch's."""
    seen = []
    for name in ("normalize_rows", "normalize_rows_backward"):
        kernel = getattr(cpu, name)
        monkeypatch.setattr(
            cpu, name, lambda *a, name=name, kernel=kernel: (seen.append(name), kernel(*a))[1]
        )
    for dtype, expected in (
        (torch.float32, ["normalize_rows", "normalize_rows_backward"]),
        (torch.float64, []),
    ):
        x = made(6, 8, torch.float32).to(dtype).requires_grad_()
        unit_rows(x).square().sum().backward()
        assert seen == expected
        seen.clear()
    x = made(6, 8, torch.float32).requires_grad_()
    (dx,) = torch.autograd.grad(unit_rows(x)[:, 0].sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(dx.square().sum(), x)
    leaf = x.detach().requires_grad_()
    (dy,) = torch.autograd.grad(
        torch.nn.functional.normalize(leaf)[:, 0].sum(), leaf, create_graph=True
    )
    torch.testing.assert_close(second, torch.autograd.grad(dy.square().sum(), leaf)[0])
    assert seen == ["normalize_rows"]
    assert UNIT(x.detach()).norm.shape == (6,)


def test_rows_below_autograd() -> None:
    """As losses that are one op use it: into a buffer that is there."""
    x, buffer = made(5, 6, torch.bfloat16), torch.empty(7, 6)
    rows = normalization.unit_rows(cpu, x, buffer[1:6])
    assert rows.unit.data_ptr() == buffer[1:].data_ptr()
    torch.testing.assert_close(buffer[1:6].square().sum(1), torch.ones(5))


def test_wrong_calls_are_errors() -> None:
    from sslkernels import _C

    call = dict(dtype="float64", d=2, n=1, x=None, x_stride=2, eps=EPS, n_threads=1)
    with pytest.raises(ValueError, match="unit_forward: x has no address"):
        _C.unit_forward(**call, unit_dtype="float32", unit=None, norm=None)
    call |= dict(n=0)
    with pytest.raises(
        ValueError, match="unit_forward: dtypes must be float32, bfloat16 or float16"
    ):
        _C.unit_forward(**call, unit_dtype="float32", unit=None, norm=None)
    call |= dict(dtype="float32")
    with pytest.raises(ValueError, match="unit_backward: dtypes must be float32, bfloat16 or"):
        _C.unit_backward(
            **call, dunit_dtype="float64", dunit=None, dunit_stride=2, norm=None, dx=None
        )
