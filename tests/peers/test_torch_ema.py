# SPDX-License-Identifier: Apache-2.0
"""torch-ema's average and ours side by side."""

from __future__ import annotations

import copy
import inspect
from functools import partial
from typing import Any

import pytest
import torch
from side_by_side import check_same_error, peer
from torch import nn

import sslkernels
from sslkernels.integrations import torch_ema as ours

theirs = peer("torch_ema.ema")
Ours, Theirs = ours.ExponentialMovingAverage, theirs.ExponentialMovingAverage


def network(dtype: torch.dtype = torch.float32) -> nn.Module:
    return nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Linear(7, 3, bias=False)).to(dtype)


def train(net: nn.Module) -> None:
    with torch.no_grad():
        for p in net.parameters():
            p.add_(torch.randn_like(p))


def both(net: nn.Module, *args: Any) -> tuple[Any, Any]:
    return Ours(net.parameters(), *args), Theirs(net.parameters(), *args)


def check_close(mine: Any, other: Any) -> None:
    a, b = mine.state_dict(), other.state_dict()
    assert list(a) == list(b)
    torch.testing.assert_close(a, b)


def test_signatures() -> None:
    for name, function in inspect.getmembers(Theirs, inspect.isfunction):
        if not name.startswith("_") or name == "__init__":
            parameters = [
                [(p.name, p.kind, p.default) for p in inspect.signature(f).parameters.values()]
                for f in (getattr(Ours, name), function)
            ]
            assert parameters[0] == parameters[1], name
    net = network()
    assert set(vars(both(net, 0.9)[0])) == set(vars(both(net, 0.9)[1]))


@pytest.mark.parametrize("decay", [0, 0.5, 0.999, 1])
@pytest.mark.parametrize("use_num_updates", [True, False])
@pytest.mark.parametrize("explicit", [True, False])
def test_updates(decay: float, use_num_updates: bool, explicit: bool) -> None:
    net = network()
    mine, other = both(net, decay, use_num_updates)
    for _ in range(12):
        train(net)
        for average in (mine, other):
            average.update(net.parameters() if explicit else None)
        check_close(mine, other)
    before = copy.deepcopy(net.state_dict())
    held = []
    for average in (mine, other):
        average.store(net.parameters() if explicit else None)
        average.copy_to(net.parameters() if explicit else None)
        held.append(copy.deepcopy(net.state_dict()))
        average.restore(net.parameters() if explicit else None)
        torch.testing.assert_close(net.state_dict(), before, rtol=0, atol=0)
        with average.average_parameters():
            torch.testing.assert_close(net.state_dict(), held[-1], rtol=0, atol=0)
        torch.testing.assert_close(net.state_dict(), before, rtol=0, atol=0)
    torch.testing.assert_close(*held)


def test_the_block_restores_after_an_error() -> None:
    net = network()
    average = both(net, 0.9)[0]
    train(net)
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(KeyError), average.average_parameters():
        raise KeyError
    torch.testing.assert_close(net.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize("stored", [True, False])
def test_states_load_both_ways(stored: bool) -> None:
    net = network()
    mine, other = both(net, 0.9)
    for average in (mine, other):
        for _ in range(3):
            train(net)
            average.update()
        if stored:
            with torch.no_grad():  # theirs keeps a graph else, and can't be copied
                average.store()
    for source, target in ((mine, other), (other, mine)):
        copied = type(target)(net.parameters(), 0.5)
        copied.load_state_dict(source.state_dict())
        check_close(copied, source)
        source.update()  # the copy is one
        assert not torch.equal(copied.shadow_params[0], source.shadow_params[0])


def test_dtypes() -> None:
    """Averages in another dtype than the parameters, and a state that is cast to theirs."""
    net = network()
    mine, other = both(net, 0.9)
    for average in (mine, other):
        with torch.no_grad():
            average.store()
        average.to(dtype=torch.float64)
        assert {t.dtype for t in average.shadow_params + average.collected_params} == {
            torch.float64
        }
    for _ in range(4):
        train(net)
        mine.update()
        other.update()
        check_close(mine, other)
    for average in (mine, other):
        average.load_state_dict(average.state_dict())
        assert {t.dtype for t in average.shadow_params} == {torch.float32}


def test_16_bits_and_integers_are_better() -> None:
    weight = nn.Parameter(torch.randn(64, 64).bfloat16())
    mine, other = Ours([weight], 0.9, False), Theirs([weight], 0.9, False)
    before = weight.detach().double()
    with torch.no_grad():
        weight.add_(torch.randn_like(weight))
    truth = 0.9 * before + 0.1 * weight.detach().double()
    errors = []
    for average in (mine, other):
        average.update()
        errors.append((average.shadow_params[0] - truth).abs())
    assert bool((errors[0] <= errors[1] + 1e-6).all())  # ours is the nearest that there is
    assert errors[0].sum() < errors[1].sum()
    counter = nn.Parameter(torch.tensor([1, 2]), requires_grad=False)
    mine, other = Ours([counter], 0.9), Theirs([counter], 0.9)
    counter.data.add_(5)
    with pytest.raises(RuntimeError):
        other.update()
    mine.update()
    assert mine.shadow_params[0].tolist() == [6, 7]


def test_errors() -> None:
    net = network()
    for decay in (-0.1, 1.1):
        check_same_error(*(partial(c, net.parameters(), decay) for c in (Ours, Theirs)))
    mine, other = both(net, 0.9)
    for name in ("update", "copy_to", "store"):
        few = list(net.parameters())[:1]
        check_same_error(*(partial(getattr(a, name), few) for a in (mine, other)))
    check_same_error(mine.restore, other.restore)
    wide = [nn.Parameter(torch.ones(2, 2, 2)) for _ in net.parameters()]
    check_same_error(partial(mine.update, wide), partial(other.update, wide))
    good = Theirs(net.parameters(), 0.9).state_dict()
    for wrong in (
        {"decay": 2.0},
        {"num_updates": 1.5},
        {"shadow_params": "none"},
        {"shadow_params": [1] * 5},
        {"shadow_params": good["shadow_params"][:1]},
        {"collected_params": "none"},
        {"collected_params": [1] * 5},
        {"collected_params": good["shadow_params"][:1]},
    ):
        check_same_error(*(partial(a.load_state_dict, good | wrong) for a in (mine, other)))


def test_parameters_that_are_gone() -> None:
    mine, other = both(network(), 0.9)
    for name in ("update", "copy_to", "store"):
        check_same_error(*(getattr(a, name) for a in (mine, other)))


def test_what_is_stored_can_be_saved() -> None:
    """Theirs keeps the graph of the copies, which deepcopy refuses."""
    mine, other = both(network(), 0.9)
    net = network()
    for average in (mine, other):
        average.store(net.parameters())
    with pytest.raises(RuntimeError, match="deepcopy"):
        copy.deepcopy(other.state_dict())
    copy.deepcopy(mine.state_dict())


def test_a_refused_state_changes_nothing() -> None:
    """Theirs takes over the decay and the averages before it looks at their number."""
    net = network()
    mine, other = both(net, 0.9)
    wrong = Theirs(list(net.parameters())[:2], 0.5).state_dict()
    for average in (mine, other):
        with pytest.raises(ValueError, match=r".*"):
            average.load_state_dict(wrong)
    assert (mine.decay, len(mine.shadow_params)) == (0.9, 5)
    assert (other.decay, len(other.shadow_params)) == (0.5, 2)


def test_patch() -> None:
    import torch_ema

    with sslkernels.patch("torch_ema"):
        assert torch_ema.ExponentialMovingAverage is Ours
    assert torch_ema.ExponentialMovingAverage is Theirs
