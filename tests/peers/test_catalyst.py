# SPDX-License-Identifier: Apache-2.0
"""catalyst's contrastive losses and ours side by side."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from side_by_side import check_same, check_same_error, check_signature, check_state, leaves, peer

import sslkernels
from sslkernels.integrations import catalyst as ours

theirs = peer("catalyst.contrib.losses")
KINDS = ["in", "out"]


def both(name: str, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
    return tuple(getattr(module, name)(*args, **kwargs) for module in (ours, theirs))  # type: ignore[return-value]


def test_signatures() -> None:
    for name in ours.__all__:
        check_signature(getattr(ours, name), getattr(theirs, name))
        check_state(*both(name, 0.1))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("tau", [0.5, 0.1, 1, -0.3])
@pytest.mark.parametrize("shape", [(1, 4), (2, 1), (9, 8), (33, 20)])
def test_nt_xent(shape: Any, tau: float, reduction: str) -> None:
    inputs = leaves(shape, shape)
    dloss = torch.rand(2 * shape[0]) if reduction == "none" else None
    slack = 1e-4 if shape[1] == 1 else None  # the gradient is 0
    check_same(*both("NTXentLoss", tau, reduction), inputs, dloss=dloss, slack=slack)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("tau", [0.5, 0.1, 1, -0.3])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "targets", [[0, 0], [2, 1, 2, 1, 1], [0] * 7, list(range(12)) * 3, [0.5, 0.25, 0.5, 0.25]]
)
def test_supervised(targets: Any, kind: str, tau: float, reduction: str) -> None:
    mine, other = both("SupervisedContrastiveLoss", tau, reduction, kind)
    (x,) = leaves((len(targets), 16))
    dloss = torch.rand(len(targets)) if reduction == "none" else None
    labels = torch.tensor(targets)
    slack = 1e-4 if len(set(targets)) == 1 else None  # the gradient is 0
    check_same(lambda z: mine(z, labels), lambda z: other(z, labels), [x], dloss=dloss, slack=slack)


@pytest.mark.parametrize("kind", ["NTXentLoss", *KINDS])
def test_tau_may_be_a_tensor_that_is_learnt(kind: str) -> None:
    x, y = leaves((8, 16), (8, 16))
    labels = torch.tensor([0, 1, 1, 0, 2, 2, 2, 0])

    def loss(module: Any, tau: Any) -> Any:
        if kind == "NTXentLoss":
            return module.NTXentLoss(tau)(x.to(tau), y.to(tau))
        return module.SupervisedContrastiveLoss(tau, pos_aggregation=kind)(x.to(tau), labels)

    check_same(partial(loss, ours), partial(loss, theirs), [torch.tensor(0.3)])


def test_errors() -> None:
    for name in ours.__all__:
        check_same_error(*(partial(getattr(m, name), 0.1, "median") for m in (ours, theirs)))
    x, labels = torch.rand(4, 3), torch.tensor([0, 0, 1, 1])
    mine, other = both("NTXentLoss", 0.1)
    check_same_error(partial(mine, x, x[:2]), partial(other, x, x[:2]))
    mine, other = both("NTXentLoss", 0)
    check_same_error(partial(mine, x, x), partial(other, x, x))
    classes = [m.SupervisedContrastiveLoss for m in (ours, theirs)]
    for arguments in ((0,), (0.1, "mean", "both")):
        check_same_error(*(partial(c, *arguments) for c in classes))
    mine, other = (c(0.1) for c in classes)
    check_same_error(partial(mine, x, labels[:2]), partial(other, x, labels[:2]))
    check_same_error(partial(mine, x, torch.arange(4)), partial(other, x, torch.arange(4)))


@pytest.mark.parametrize("kind", ["NTXentLoss", *KINDS])
def test_a_small_tau_is_better(kind: str) -> None:
    """Their exp(1/tau) overflows in float32 below 0.0113, and drowns the others from 0.07 on."""
    x = torch.nn.functional.normalize(torch.randn(16, 32), dim=1)
    labels = torch.arange(8).repeat(2)

    def loss(module: Any, tau: float, z: Any) -> Any:
        if kind == "NTXentLoss":
            return module.NTXentLoss(tau)(z[:8], z[8:])
        return module.SupervisedContrastiveLoss(tau, pos_aggregation=kind)(z, labels)

    for tau, tolerance in ((0.05, 1e-4), (0.01, 1e-3)):
        truth = loss(theirs, 10 * tau, x.double())  # in float64 theirs is exact there
        torch.testing.assert_close(loss(ours, 10 * tau, x).double(), truth, rtol=1e-5, atol=1e-5)
        exact = loss(ours, tau, x.double())
        torch.testing.assert_close(
            loss(ours, tau, x).double(), exact, rtol=tolerance, atol=tolerance
        )
    error = [float((loss(m, 0.05, x) - loss(ours, 0.05, x.double())).abs()) for m in (ours, theirs)]
    assert error[1] > 100 * error[0]
    assert not loss(theirs, 0.01, x).isfinite()


def test_half_precision_is_rounded_once() -> None:
    for dtype in (torch.float16, torch.bfloat16):
        x, y = leaves((9, 8), (9, 8))
        x, y = x.to(dtype), y.to(dtype)
        loss = ours.NTXentLoss(0.1)(x, y)
        assert loss.dtype == dtype
        truth = theirs.NTXentLoss(0.1)(x.double(), y.double())
        torch.testing.assert_close(loss, truth.to(dtype))


def test_patch() -> None:
    originals = [getattr(theirs, name) for name in ours.__all__]
    with sslkernels.patch("catalyst"):
        for name in ours.__all__:
            assert getattr(theirs, name) is getattr(ours, name)
    assert [getattr(theirs, name) for name in ours.__all__] == originals
