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


# ---------------------------------------------------------------------------------- the torch ops


def op_inputs() -> dict[str, tuple[Callable, tuple]]:
    """Arguments of each op that reach every branch of its schema."""
    ops = torch.ops.sslkernels
    z, k = (matrix(9, 5, s).double().requires_grad_() for s in (0, 1))
    norm = matrix(9, 1).double()[:, 0].abs()
    plain = [x.detach() for x in (z, k)]
    return {
        "accumulate_rows": (ops.accumulate_rows, (z, CLASSES, 4)),
        "take_rows": (ops.take_rows, (z, CLASSES)),
        "unit_rows": (ops.unit_rows, (z,)),
        "unit_rows half": (ops.unit_rows, (plain[0].half().requires_grad_(),)),
        "unit_rows_backward": (ops.unit_rows_backward, (plain[0], norm, plain[1])),
        "uniformity": (ops.uniformity, (z, 2.0)),
        "uniformity half": (ops.uniformity, (plain[0].half().requires_grad_(), 2.0)),
        "uniformity_backward": (
            ops.uniformity_backward,
            (plain[0], norm, norm, norm, 2.0, norm[0]),
        ),
    }


@pytest.mark.parametrize("name", list(op_inputs()))
def test_opcheck(name: str) -> None:
    """Schema, fake, autograd registration and AOT dispatch, with dynamic shapes."""
    op, arguments = op_inputs()[name]
    torch.library.opcheck(op.default, arguments)


@pytest.mark.usefixtures("chunked_rows")
def test_gradcheck() -> None:
    z = matrix(9, 3).double().requires_grad_()
    assert torch.autograd.gradcheck(unit_rows, (z,))
    assert torch.autograd.gradgradcheck(unit_rows, (z,))


def test_same_bits_for_any_number_of_threads() -> None:
    """Several chunks and several threads' shares of each."""
    z, weight = matrix(2000, 150), matrix(2000, 150, 1)

    def run() -> list[Tensor]:
        leaf = z.clone().requires_grad_()
        unit = unit_rows(leaf)
        return [unit, *torch.autograd.grad((unit * weight).sum(), leaf)]

    with threads(1):
        one = run()
    with threads(2):
        assert all(torch.equal(a, b) for a, b in zip(run(), one, strict=True))
