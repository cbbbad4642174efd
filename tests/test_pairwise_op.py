# SPDX-License-Identifier: Apache-2.0
"""The tile engine as a torch op: opcheck, gradcheck, compile, autocast, refusals."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from flat import attend, pairwise
from helpers import SLACK
from pairwise_truth import DTYPES, dense, make, scalars
from torch import Tensor

import sslkernels


def op_inputs() -> dict[str, tuple[Callable, tuple]]:
    """Arguments of each op that reach every branch of its schema."""
    ops = torch.ops.sslkernels
    q, k = (x.double().requires_grad_() for x in make(6, 7, 5))
    scale, bias = (x.requires_grad_() for x in scalars(q.dtype, 2.0, 0.3))
    ids_q, ids_k = torch.arange(6), torch.arange(7) % 4
    row_at, col_at = torch.zeros(6).double(), torch.zeros(7).double()
    row = dense("lse", q, k, scale)[0].detach()
    plain = [x.detach() for x in (q, k, scale, bias)]
    return {
        "pairwise lse": (
            ops.pairwise,
            ("lse", q, k, scale, None, ids_q, ids_k, True, row_at, col_at),
        ),
        "pairwise self": (
            ops.pairwise,
            ("lse", q, None, scale, None, ids_q, None, False, None, None),
        ),
        "pairwise softplus": (
            ops.pairwise,
            ("softplus", q, k, scale, bias, None, None, False, None, None),
        ),
        "pairwise half": (
            ops.pairwise,
            (
                "lse",
                q.detach().half().requires_grad_(),
                None,
                scale.detach().float(),
                None,
                ids_q,
                None,
                False,
                None,
                None,
            ),
        ),
        "pairwise_backward": (
            ops.pairwise_backward,
            (
                "lse",
                *plain[:3],
                None,
                ids_q,
                ids_k,
                row,
                torch.ones_like(row),
                None,
                None,
                True,
                True,
                True,
            ),
        ),
        "attend": (ops.attend, (q, k.detach(), scale, None, ids_q, ids_k, row_at)),
        "extremes": (ops.extremes, (plain[0], None, plain[2], None, ids_q, None)),
        "accumulate_rows": (ops.accumulate_rows, (q, ids_q % 3, 3)),
        "take_rows": (ops.take_rows, (q, ids_k)),
        "mined_triplets": (ops.mined_triplets, (q, ids_q % 2, torch.tensor(0.2), True, False)),
        "mined_triplets_backward": (
            ops.mined_triplets_backward,
            (plain[0], ids_q % 2, torch.tensor(0.2), False, True, row_at + 1),
        ),
    }


@pytest.mark.parametrize("name", list(op_inputs()))
@pytest.mark.parametrize("backend", ["chunked", None])
def test_opcheck(name: str, backend: str | None) -> None:
    """Schema, fake, autograd registration and AOT dispatch, with dynamic shapes."""
    op, arguments = op_inputs()[name]
    with sslkernels.backend(backend):
        torch.library.opcheck(op.default, arguments)


@pytest.mark.parametrize("kind", ["lse", "softplus"])
def test_gradcheck(on_engine: str, kind: str) -> None:
    """Against finite differences in float64, every differentiable input."""
    q, k = (x.double().requires_grad_() for x in make(5, 7, 3))
    scale, bias = (x.double().requires_grad_() for x in scalars(q.dtype, 2.0, 0.3))
    ids_q, ids_k = torch.arange(5) % 2, torch.arange(7) % 4
    extra = (bias,) if kind == "softplus" else ()

    def cross(q, k, scale, *bias):
        return pairwise(
            kind,
            q,
            k,
            scale=scale,
            bias=bias[0] if bias else None,
            ids_q=ids_q,
            ids_k=ids_k,
            want_col=True,
        )[:2]

    assert torch.autograd.gradcheck(cross, (q, k, scale, *extra))
    assert torch.autograd.gradcheck(
        lambda q, s: pairwise(kind, q, scale=s, ids_q=torch.arange(5)).row, (q, scale)
    )
    assert torch.autograd.gradcheck(
        lambda q, s: attend(q, k.detach(), scale=s, ids_q=ids_q, ids_k=ids_k).lse, (q, scale)
    )


def test_second_derivative_raises() -> None:
    """Instead of being silently zero; the first with create_graph is fine."""
    q, k = (x.requires_grad_() for x in make(5, 6, 3))
    scale = torch.tensor(2.0)
    for value in (pairwise("lse", q, k, scale=scale).row, attend(q, k.detach(), scale=scale).lse):
        (first,) = torch.autograd.grad(value.sum(), q, create_graph=True)
        assert first.requires_grad
        with pytest.raises(RuntimeError, match="second derivatives are not implemented"):
            first.sum().backward()


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_fullgraph(dynamic: bool) -> None:
    """The ops inside a compiled function, forward and backward, without a graph break."""
    weight = torch.randn(8, 8, requires_grad=True)

    def model(x: Tensor, y: Tensor) -> Tensor:
        out = pairwise("lse", x @ weight, y @ weight, scale=torch.full((), 3.0), want_col=True)
        near = attend(x @ weight, y, scale=torch.full((), 3.0))
        return out.row.sum() + out.col.mean() + near.lse.sum()

    compiled = torch.compile(model, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for n, m in ((6, 9), (12, 5)):
        x, y = torch.randn(n, 8), torch.randn(m, 8)
        (expected,) = torch.autograd.grad(model(x, y), weight)
        (got,) = torch.autograd.grad(compiled(x, y), weight)
        torch.testing.assert_close(got, expected)


def test_autocast_leaves_the_engine_alone(on_engine: str) -> None:
    """float32 operands are multiplied in float32 under autocast."""
    q, k = make(30, 40, 16)
    scale = torch.tensor(10.0)

    def run() -> list[Tensor]:
        leaf = q.clone().requires_grad_()
        out = pairwise("lse", leaf, k, scale=scale, want_col=True)
        return [*out[:2], *attend(q, k, scale=scale)[:2], *torch.autograd.grad(out.row.sum(), leaf)]

    expected = run()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = run()
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "max"}, "kind must be 'lse' or 'softplus', got 'max'"),
        ({"kind": "lse", "bias": torch.tensor(1.0)}, "bias needs kind 'softplus'"),
        ({"kind": "lse", "want_col": True}, "want_col must be False in self mode"),
    ],
)
def test_bad_combinations(arguments: dict, message: str) -> None:
    """What does not go together is refused."""
    with pytest.raises(ValueError, match=message):
        pairwise(q=torch.ones(2, 2), scale=torch.tensor(1.0), **arguments)


def test_ranks_of_columns_need_columns() -> None:
    """Where columns are not reduced there is nothing to count beside."""
    q, k = torch.ones(3, 2), torch.ones(4, 2)
    with pytest.raises(ValueError, match="above.col needs want_col=True"):
        pairwise("lse", q, k, scale=torch.tensor(1.0), threshold_col=torch.zeros(4))


def test_attend_refuses_keys_that_require_grad() -> None:
    """Their gradient would silently be missing."""
    q, k = (x.requires_grad_() for x in make(3, 4, 2))
    with pytest.raises(RuntimeError, match="keys get no gradient"):
        attend(q, k, scale=torch.tensor(1.0)).lse.sum().backward()


def test_slack_table_covers_every_dtype() -> None:
    """helpers.SLACK is what the budget of a dtype is looked up in."""
    assert set(SLACK) == set(DTYPES)
