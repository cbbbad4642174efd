# SPDX-License-Identifier: Apache-2.0
"""MONAI's contrastive loss and ours side by side."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from side_by_side import check_same, check_same_error, check_signature, check_state, leaves, peer

import sslkernels
from sslkernels.integrations import monai as ours

theirs = peer("monai.losses.contrastive")
Theirs = theirs.ContrastiveLoss


def test_signature() -> None:
    check_signature(ours.ContrastiveLoss, Theirs)
    check_state(ours.ContrastiveLoss(), Theirs())
    for cls in (ours.ContrastiveLoss, Theirs):
        with pytest.warns(UserWarning, match="batch_size"):
            cls(batch_size=4)


@pytest.mark.parametrize("temperature", [0.5, 0.05, 1, -0.3])
@pytest.mark.parametrize("shape", [(1, 4), (2, 1), (9, 8), (33, 20)])
def test_loss(shape: Any, temperature: float) -> None:
    slack = 1e-5 if temperature == 0.05 else None  # float32 of logits to 20
    inputs = leaves(shape, shape)
    check_same(ours.ContrastiveLoss(temperature), Theirs(temperature), inputs, slack=slack)


def test_temperatures_as_tensors() -> None:
    a, b = leaves((9, 8), (9, 8))
    check_same(
        lambda t: ours.ContrastiveLoss(t)(a.to(t), b.to(t)),
        lambda t: Theirs(t)(a.to(t), b.to(t)),
        [torch.tensor(0.2)],
    )
    several = torch.rand(18) + 0.1
    torch.testing.assert_close(ours.ContrastiveLoss(several)(a, b), Theirs(several)(a, b))


def test_errors() -> None:
    for shapes in ([(4, 3, 2), (4, 3, 2)], [(4, 3), (5, 3)], [(4,), (4,)]):
        a, b = (torch.ones(shape) for shape in shapes)
        check_same_error(lambda: ours.ContrastiveLoss()(a, b), lambda: Theirs()(a, b))  # noqa: B023


def test_a_small_temperature_and_half_precision_are_better() -> None:
    a, b = leaves((9, 8), (9, 8))
    for dtype, temperature in ((torch.float32, 0.01), (torch.float16, 0.08)):
        x, y = a.to(dtype), b.to(dtype)
        truth = Theirs(temperature)(x.double(), y.double())
        assert not Theirs(temperature)(x, y).isfinite()
        loss = ours.ContrastiveLoss(temperature)(x, y)
        assert loss.dtype == dtype
        torch.testing.assert_close(loss.double(), truth, rtol=1e-3, atol=1e-3)
    assert Theirs()(a[:0], b[:0]).isnan() and ours.ContrastiveLoss()(a[:0], b[:0]) == 0


def test_patch() -> None:
    import monai

    with sslkernels.patch("monai"):
        assert monai.losses.ContrastiveLoss is ours.ContrastiveLoss
        assert theirs.ContrastiveLoss is ours.ContrastiveLoss
    assert monai.losses.ContrastiveLoss is Theirs
