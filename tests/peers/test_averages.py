# SPDX-License-Identifier: Apache-2.0
"""torch's and timm's averaged models and ours side by side."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from side_by_side import check_same_error, check_signature, check_state, peer
from torch import nn
from torch.optim import swa_utils

import sslkernels
from sslkernels.integrations import timm as our_timm
from sslkernels.integrations import torch as our_torch

TORCH = {name: getattr(swa_utils, name) for name in our_torch.__all__}


def network(dtype: torch.dtype = torch.float32) -> nn.Module:
    net = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Linear(7, 3, bias=False))
    return net.to(dtype)


def train(net: nn.Module) -> None:
    with torch.no_grad():
        for tensor in net.state_dict().values():
            # Upwards: a running variance must stay above 0.
            tensor.add_(torch.rand_like(tensor) if tensor.is_floating_point() else 1)


def check_close(mine: nn.Module, other: nn.Module, skip: str = "no such name") -> None:
    for (name, a), b in zip(mine.state_dict().items(), other.state_dict().values(), strict=True):
        if skip not in name:
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", TORCH)
def test_signatures_of_torch(name: str) -> None:
    mine, other = getattr(our_torch, name), TORCH[name]
    if name == "AveragedModel":
        check_state(mine(network()), other(network()))
        assert mine.__name__ == other.__name__
    else:
        check_signature(mine, other)


@pytest.mark.parametrize("use_buffers", [False, True])
@pytest.mark.parametrize("kind", ["mean", "ema", "swa", "avg_fn"])
def test_averaged_model(kind: str, use_buffers: bool) -> None:
    if kind == "swa" and use_buffers:
        pytest.skip("torch's raises an error; see test_integer_buffers_of_a_mean")

    def keywords(source: Any) -> dict[str, Any]:
        if kind == "ema":
            return {"multi_avg_fn": source("get_ema_multi_avg_fn")(0.9)}
        if kind == "swa":
            return {"multi_avg_fn": source("get_swa_multi_avg_fn")()}
        return {"avg_fn": lambda a, m, n: 0.3 * a + 0.7 * m} if kind == "avg_fn" else {}

    net = network()
    mine = our_torch.AveragedModel(
        net, use_buffers=use_buffers, **keywords(partial(getattr, our_torch))
    )
    other = TORCH["AveragedModel"](net, use_buffers=use_buffers, **keywords(TORCH.__getitem__))
    for _ in range(5):
        train(net)
        mine.update_parameters(net)
        other.update_parameters(net)
        check_close(mine, other, "num_batches_tracked" if use_buffers else "no such name")
    assert mine.multi_avg_fn is None or kind in ("ema", "swa")
    x = torch.randn(4, 5)
    torch.testing.assert_close(mine.eval()(x), other.eval()(x))


def test_integer_buffers_are_copied() -> None:
    """Better than torch: the average of a counter, rounded down, stands still."""
    net = network()
    averages = [
        cls(net, multi_avg_fn=function(0.999), use_buffers=True)
        for cls, function in (
            (our_torch.AveragedModel, our_torch.get_ema_multi_avg_fn),
            (TORCH["AveragedModel"], TORCH["get_ema_multi_avg_fn"]),
        )
    ]
    for _ in range(50):
        train(net)
        for average in averages:
            average.update_parameters(net)
    counts = [int(a.module[1].num_batches_tracked) for a in averages]
    assert counts[0] == 50 and counts[1] < 25


def test_integer_buffers_of_a_mean() -> None:
    """Better than torch, whose function of lists can't divide integers."""
    net = network()
    mine = our_torch.AveragedModel(
        net, multi_avg_fn=our_torch.get_swa_multi_avg_fn(), use_buffers=True
    )
    other = TORCH["AveragedModel"](
        net, multi_avg_fn=TORCH["get_swa_multi_avg_fn"](), use_buffers=True
    )
    other.update_parameters(net)
    with pytest.raises(RuntimeError, match="Integer division"):
        other.update_parameters(net)
    means = []
    for _ in range(4):
        train(net)
        mine.update_parameters(net)
        means.append(net[1].running_mean.clone())
    assert int(mine.module[1].num_batches_tracked) == 4
    torch.testing.assert_close(mine.module[1].running_mean, torch.stack(means).mean(0))


def test_errors_of_torch() -> None:
    for decay in (-0.1, 1.1):
        check_same_error(
            partial(our_torch.get_ema_multi_avg_fn, decay),
            partial(TORCH["get_ema_multi_avg_fn"], decay),
        )
    both = {"avg_fn": print, "multi_avg_fn": print}
    check_same_error(
        partial(our_torch.AveragedModel, network(), **both),
        partial(TORCH["AveragedModel"], network(), **both),
    )


def test_patch_of_torch() -> None:
    with sslkernels.patch("torch"):
        assert swa_utils.AveragedModel is our_torch.AveragedModel
    assert swa_utils.AveragedModel is TORCH["AveragedModel"]


# -------------------------------------------------------------------------------------------- timm


@pytest.fixture
def theirs() -> Any:
    pytest.importorskip("timm", exc_type=ImportError)
    return peer("timm.utils").ModelEmaV3


def test_signature_of_timm(theirs: Any) -> None:
    check_signature(our_timm.ModelEmaV3, theirs)
    check_state(our_timm.ModelEmaV3(network()), theirs(network()))


@pytest.mark.parametrize(
    "keywords",
    [
        {"decay": 0.9},
        {"decay": 0.9, "exclude_buffers": True},
        {"decay": 0.9, "foreach": False},
        {"use_warmup": True, "min_decay": 0.2, "update_after_step": 2},
        {"use_warmup": True, "warmup_gamma": 2.0, "warmup_power": 0.75},
        {"decay": 0.9, "dtype": torch.float64},
        {"decay": 0.9, "device": torch.device("cpu")},
    ],
)
@pytest.mark.parametrize("counted", [False, True])
def test_timm(theirs: Any, keywords: dict[str, Any], counted: bool) -> None:
    net = network()
    mine, other = our_timm.ModelEmaV3(net, **keywords), theirs(net, **keywords)
    for step in range(8):
        train(net)
        for average in (mine, other):
            average.update(net, step if counted else None)
        assert mine.get_decay(step) == other.get_decay(step)
        check_close(mine, other)
    train(net)
    mine.set(net)
    other.set(net)
    check_close(mine, other)
    x = torch.randn(4, 5, dtype=keywords.get("dtype"))
    torch.testing.assert_close(mine(x), other(x))


def test_timm_in_16_bits_moves_on_average(theirs: Any) -> None:
    """bfloat16 in both; float16, which theirs rounds to nearest and leaves where it is, in ours."""
    for dtype, theirs_moves in ((torch.bfloat16, True), (torch.float16, False)):
        net = nn.Linear(64, 64, bias=False).to(dtype)
        nn.init.constant_(net.weight, 1.0)
        averages = [cls(net, decay=0.9999) for cls in (our_timm.ModelEmaV3, theirs)]
        nn.init.constant_(net.weight, 1.5)
        for _ in range(200):
            for average in averages:
                average.update(net)
        expected = 1.5 - 0.5 * 0.9999**200
        moved = [float(a.module.weight.detach().float().mean()) for a in averages]
        assert moved[0] == pytest.approx(expected, abs=2e-3)
        assert (moved[1] > 1.005) == theirs_moves


def test_patch_of_timm(theirs: Any) -> None:
    import timm.utils

    with sslkernels.patch("timm"):
        assert timm.utils.ModelEmaV3 is our_timm.ModelEmaV3
    assert timm.utils.ModelEmaV3 is theirs
    copied = copy.deepcopy(our_timm.ModelEmaV3(network()))
    copied.update(network())
