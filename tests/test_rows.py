# SPDX-License-Identifier: Apache-2.0
"""Ops on rows in float64."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import check_loss, threads
from torch import Tensor

from sslkernels.ops import rows
from sslkernels.ops.distances import two_distances
from sslkernels.ops.unit import unit_rows

ROOT = Path(__file__).resolve().parents[1]
CLASSES = torch.tensor([0, 1, 0, 2, 2, 2, 3, 1, 0])


@pytest.fixture(params=[False, True], ids=["one chunk", "many chunks"])
def chunked_rows(request, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inputs of a few rows in one chunk, and in chunks of one to three rows."""
    if request.param:
        monkeypatch.setattr(rows, "CPU_CHUNK", 16)


def matrix(n: int, d: int, seed: int = 0) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


# ----------------------------------------------------------------------------------- unit rows


@pytest.mark.usefixtures("chunked_rows")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_unit_rows(dtype: torch.dtype) -> None:
    """As torch's normalize in float32; rows of zeros and below eps; rows with a stride."""
    x = matrix(7, 5)
    if dtype != torch.float16:  # its range is smaller than the gradient of such rows
        x[2], x[3], x[4] = 0, 1e15 * x[3], 1e-20 * x[4]
    wide = torch.zeros(7, 11, dtype=dtype)
    wide[:, ::2][:, :5] = x.to(dtype)
    weight = matrix(7, 5, 1)
    check_loss(
        lambda z: (unit_rows(z) * weight).sum(1),
        lambda z: (F.normalize(z if z.dtype == torch.float64 else z.float()) * weight).sum(1),
        [wide[:, ::2][:, :5]],
    )


def test_unit_rows_of_nan() -> None:
    """A NaN stays in its row, in both directions."""
    x = matrix(3, 4)
    x[1, 2] = torch.nan
    y = unit_rows(x.requires_grad_())
    (dx,) = torch.autograd.grad(y.sum(), x)
    for result in (y, dx):
        assert result.isnan().any(1).tolist() == [False, True, False]


# --------------------------------------------------------------------------------- two distances


def distances(z: Tensor, first: Tensor, second: Tensor, cosine: bool) -> Tensor:
    """[2, N] with plain indexing."""
    wide = z if z.dtype == torch.float64 else z.float()
    if cosine:
        return torch.stack([1 - (wide * wide[index]).sum(1) for index in (first, second)])
    return torch.stack([(wide - wide[index]).norm(dim=1) for index in (first, second)])


@pytest.mark.usefixtures("chunked_rows")
@pytest.mark.parametrize("cosine", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_two_distances(dtype: torch.dtype, cosine: bool) -> None:
    """Rows that are chosen often, never, by themselves (distance 0), and equal rows."""
    z = matrix(9, 6)
    z[7] = z[1]
    first, second = torch.tensor([3, 7, 3, 3, 4, 0, 3, 1, 8]), torch.arange(9).flip(0)
    weight = matrix(2, 9, 1)
    check_loss(
        lambda x: (torch.stack(two_distances(x, first, second, cosine=cosine)) * weight).sum(),
        lambda x: (distances(x, first, second, cosine) * weight).sum(),
        [z.to(dtype)],
    )


def test_two_distances_of_equal_rows_have_gradient_0() -> None:
    z = torch.ones(3, 4, requires_grad=True)
    d, _ = two_distances(z, torch.tensor([1, 2, 0]), torch.arange(3), cosine=False)
    (dz,) = torch.autograd.grad(d.sum(), z)
    assert d.tolist() == [0, 0, 0] and not dz.any()


# ---------------------------------------------------------------------------------- the torch ops


def op_inputs() -> dict[str, tuple[Callable, tuple]]:
    """Arguments of each op that reach every branch of its schema."""
    ops = torch.ops.sslkernels
    z, k = (matrix(9, 5, s).double().requires_grad_() for s in (0, 1))
    scale, bias = (torch.full((), v).double().requires_grad_() for v in (2.0, 0.3))
    ids, first, v = torch.arange(9), CLASSES, matrix(9, 1).double()[:, 0]
    plain = [x.detach() for x in (z, k, scale, bias)]
    return {
        "accumulate_rows": (ops.accumulate_rows, (z, CLASSES, 4)),
        "take_rows": (ops.take_rows, (z, CLASSES)),
        "unit_rows": (ops.unit_rows, (z,)),
        "unit_rows half": (ops.unit_rows, (plain[0].half().requires_grad_(),)),
        "unit_rows_backward": (ops.unit_rows_backward, (plain[0], v.abs(), plain[1])),
        "two_distances": (ops.two_distances, (z, first, ids, False)),
        "two_distances cosine": (ops.two_distances, (z, first, ids, True)),
        "two_distances_backward": (
            ops.two_distances_backward,
            (plain[0], first, ids, False, v.abs(), v.abs(), v, None),
        ),
    }


@pytest.mark.parametrize("name", list(op_inputs()))
def test_opcheck(name: str) -> None:
    """Schema, fake, autograd registration and AOT dispatch, with dynamic shapes."""
    op, arguments = op_inputs()[name]
    torch.library.opcheck(op.default, arguments)


@pytest.mark.usefixtures("chunked_rows")
def test_gradcheck() -> None:
    z, k = (matrix(9, 3, s).double().requires_grad_() for s in (0, 1))
    scale, bias = (torch.full((), v).double().requires_grad_() for v in (1.5, 0.3))
    check = torch.autograd.gradcheck
    first, second = CLASSES, torch.arange(9).roll(1)
    assert check(unit_rows, (z,))
    assert torch.autograd.gradgradcheck(unit_rows, (z,))
    assert check(lambda z: two_distances(z, first, second, cosine=True), (z,))
    far = torch.arange(9).roll(2)
    assert check(lambda z: two_distances(z, far, second, cosine=False), (z,))


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("two_distances", lambda z: two_distances(z, CLASSES, CLASSES, cosine=True)[0]),
    ],
)
def test_second_derivative_raises(name: str, function: Callable) -> None:
    z = matrix(9, 4).requires_grad_()
    (first,) = torch.autograd.grad(function(z).square().sum(), z, create_graph=True)
    with pytest.raises(RuntimeError, match=f"sslkernels::{name}: second derivatives"):
        first.sum().backward()


def test_one_output_used() -> None:
    """The other's gradient is absent, not an error and not garbage."""
    z = matrix(9, 4)
    for i in range(2):
        leaf = z.clone().requires_grad_()
        pick = two_distances(leaf, CLASSES, CLASSES.flip(0), cosine=True)[i]
        (got,) = torch.autograd.grad(pick.sum(), leaf)
        (want,) = torch.autograd.grad(
            distances(leaf, CLASSES, CLASSES.flip(0), True)[i].sum(), leaf
        )
        torch.testing.assert_close(got, want)


def test_same_bits_for_any_number_of_threads() -> None:
    """Several chunks and several threads' shares of each."""
    z = matrix(2000, 150)
    first, second = (
        torch.randint(2000, (2000,), generator=torch.Generator().manual_seed(s)) for s in range(2)
    )

    def run() -> list[Tensor]:
        leaf = z.clone().requires_grad_()
        unit = unit_rows(leaf)
        out = [
            *two_distances(unit, first, second, cosine=False),
        ]
        return [*out, *torch.autograd.grad(sum(x.sum() for x in out), leaf)]

    with threads(1):
        one = run()
    with threads(2):
        assert all(torch.equal(a, b) for a, b in zip(run(), one, strict=True))
