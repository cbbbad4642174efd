# SPDX-License-Identifier: Apache-2.0
"""open_clip's losses and ours side by side; on several ranks in test_several_ranks.py."""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from side_by_side import check_same, check_same_error, check_signature, check_state, leaves, peer
from torch import Tensor

import sslkernels
from sslkernels.integrations import open_clip as ours

theirs = peer("open_clip.loss")
THEIRS: dict[str, Any] = {"ClipLoss": theirs.ClipLoss, "SigLipLoss": theirs.SigLipLoss}
SIZES = [(1, 8), (2, 3), (9, 8), (64, 33)]


def features(size: tuple[int, int]) -> list[Tensor]:
    return [F.normalize(x, dim=1) for x in leaves(size, size)]


def test_signatures() -> None:
    """Those of the installed version; ``chunk_size`` came with 4, ``use_horovod`` went."""
    for name, extra in (("ClipLoss", "use_horovod"), ("SigLipLoss", "chunk_size")):
        mine, other = getattr(ours, name), THEIRS[name]
        found = inspect.signature(mine).parameters
        expected = inspect.signature(other).parameters
        assert [(p.name, p.kind, p.default) for p in found.values() if p.name in expected] == [
            (p.name, p.kind, p.default) for p in expected.values()
        ]
        assert set(found) - set(expected) <= {extra}
        assert inspect.signature(mine.forward).parameters.keys() == (
            inspect.signature(other.forward).parameters.keys()
        )
        check_state(mine(), other())
    check_signature(ours.ClipLoss, ours.ClipLoss)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("scale", [1.0, 14.3, 100.0])
def test_clip(size: tuple[int, int], scale: float) -> None:
    inputs = [*features(size), torch.tensor(scale)]
    for keywords in ({}, {"cache_labels": True}, {"local_loss": True, "gather_with_grad": True}):
        check_same(ours.ClipLoss(**keywords), theirs.ClipLoss(**keywords), inputs)
    mine, other = ours.ClipLoss(), theirs.ClipLoss()
    check_same(lambda x, y: mine(x, y, scale), lambda x, y: other(x, y, scale), inputs[:2])
    bias = torch.tensor(-3.0)
    check_same(
        lambda *x: mine(*x, output_dict=True)["contrastive_loss"],
        lambda *x: other(*x, output_dict=True)["contrastive_loss"],
        [*inputs, bias],
    )
    assert mine(*inputs, output_dict=True).keys() == other(*inputs, output_dict=True).keys()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("scale", "bias"), [(1.0, 0.0), (10.0, -10.0), (100.0, -20.0)])
def test_siglip(size: tuple[int, int], scale: float, bias: float) -> None:
    inputs = [*features(size), torch.tensor(scale), torch.tensor(bias)]
    mine, other = ours.SigLipLoss(), theirs.SigLipLoss()
    check_same(mine, other, inputs)
    check_same(ours.SigLipLoss(chunk_size=5), other, inputs)
    check_same(
        lambda *x: mine(*x, output_dict=True)["contrastive_loss"],
        lambda *x: other(*x, output_dict=True)["contrastive_loss"],
        inputs,
    )
    for last in (None, bias):
        check_same(
            lambda *x, last=last: mine(*x, last), lambda *x, last=last: other(*x, last), inputs[:3]
        )
    check_same(
        lambda *x: mine._loss(*x, negative_only=True),
        lambda *x: other._loss(*x, negative_only=True),
        inputs,
    )


def test_tensors_of_shape_1() -> None:
    x, y = features((9, 8))
    for scale in (torch.tensor([7.0]), torch.tensor(7.0)):
        torch.testing.assert_close(ours.ClipLoss()(x, y, scale), theirs.ClipLoss()(x, y, scale))
        torch.testing.assert_close(
            ours.SigLipLoss()(x, y, scale, -scale), theirs.SigLipLoss()(x, y, scale, -scale)
        )


def test_a_bias_gets_a_gradient_of_zero() -> None:
    """Which it does not matter for CLIP, but DDP waits for a gradient of every parameter."""
    bias = torch.tensor(2.0, requires_grad=True)
    ours.ClipLoss()(*features((9, 8)), 3.0, bias).backward()
    assert bias.grad == 0


def test_what_is_handed_over(caplog: pytest.LogCaptureFixture) -> None:
    x, y = features((9, 8))
    bias = torch.randn(9)
    torch.testing.assert_close(ours.ClipLoss()(x, y, 3.0, bias), theirs.ClipLoss()(x, y, 3.0, bias))
    torch.testing.assert_close(
        ours.SigLipLoss()(x, y, 3.0, bias), theirs.SigLipLoss()(x, y, 3.0, bias)
    )

    class Mine(ours.ClipLoss):
        def get_logits(self, *args: Any, **kwargs: Any) -> Any:
            return tuple(2 * logits for logits in super().get_logits(*args, **kwargs))

    class Other(ours.SigLipLoss):
        def get_logits(self, *args: Any, **kwargs: Any) -> Any:
            return 2 * super().get_logits(*args, **kwargs)

    torch.testing.assert_close(Mine()(x, y, 3.0), theirs.ClipLoss()(x, y, 6.0))
    torch.testing.assert_close(Other()(x, y, 3.0, -4.0), theirs.SigLipLoss()(x, y, 6.0, -8.0))
    assert "handed over" in caplog.text
    assert torch.equal(
        ours.ClipLoss().get_ground_truth(x.device, 4),
        theirs.ClipLoss().get_ground_truth(x.device, 4),
    )
    assert torch.equal(
        ours.SigLipLoss().get_ground_truth("cpu", x.dtype, 4, True),
        theirs.SigLipLoss().get_ground_truth("cpu", x.dtype, 4, True),
    )


def test_dtypes() -> None:
    x, y = features((64, 32))
    for name, rest in (("ClipLoss", (20.0,)), ("SigLipLoss", (10.0, -10.0))):
        for dtype in (torch.bfloat16, torch.float16):
            a, b = x.to(dtype), y.to(dtype)
            loss, other = getattr(ours, name)()(a, b, *rest), THEIRS[name]()(a, b, *rest)
            truth = THEIRS[name]()(a.double(), b.double(), *rest)
            assert loss.dtype == other.dtype == dtype
            assert abs(loss - truth) <= abs(other - truth) + 4e-3 * truth
            with torch.autocast("cpu", dtype):
                a, b = getattr(ours, name)()(x, y, *rest), THEIRS[name]()(x, y, *rest)
            assert abs(a - b) < 2e-2 * b


def test_errors() -> None:
    x, y = features((9, 8))
    for name, rest in (("ClipLoss", (3.0,)), ("SigLipLoss", (3.0, -1.0))):
        for a, b in ((x, y[:, :5]), (x, y[:4])):
            check_same_error(
                partial(getattr(ours, name)(), a, b, *rest), partial(THEIRS[name](), a, b, *rest)
            )
    check_same_error(
        partial(ours.SigLipLoss, dist_impl="ring"), partial(theirs.SigLipLoss, dist_impl="ring")
    )


def test_patch() -> None:
    import open_clip.factory

    with sslkernels.patch("open_clip"):
        import open_clip

        assert open_clip.ClipLoss is open_clip.factory.ClipLoss is ours.ClipLoss
        assert open_clip.factory.SigLipLoss is ours.SigLipLoss
        x, y = features((9, 8))
        # Subclasses of before keep their base.
        caption = open_clip.CoCaLoss(1.0, 1.0)(
            x, y, torch.randn(9, 4, 11), torch.randint(1, 11, (9, 4)), 3.0
        )
        assert caption[0].isfinite()
    assert open_clip.factory.ClipLoss is THEIRS["ClipLoss"]
