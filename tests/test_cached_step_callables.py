# SPDX-License-Identifier: Apache-2.0
"""cached_step with functions, methods, objects and compiled code, in training and evaluation."""

from __future__ import annotations

import copy
import functools
import sys
import threading
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from cached_step_cases import D_IN, Net, accumulated, agree, facts, loss_fn, views
from torch import Tensor, nn

import sslkernels as ssl
from sslkernels import cached_step

GLOBAL: dict[str, Any] = {}  # filled by the fixture: code refers to it by name
net_in_a_global: Any = None
elsewhere = types.ModuleType("somebodys_models")
hidden = types.ModuleType("nobody_knows")


class Trainer:
    """Holds a network, as trainers do."""

    def __init__(self, net: Net, deep: bool = False) -> None:
        self.parts = {"nets": [net]} if deep else net
        self.deep = deep

    def _net(self) -> Net:
        return self.parts["nets"][0] if self.deep else self.parts

    def encode(self, x: Tensor) -> Tensor:
        return self._net()(x)

    __call__ = encode


class Slots:
    """Without a __dict__."""

    __slots__ = ("net",)

    def __init__(self, net: Net) -> None:
        self.net = net

    def __call__(self, x: Tensor) -> Tensor:
        return self.net(x)


def decorated(function: Callable) -> Callable:
    @functools.wraps(function)
    def wrapper(*args: Any) -> Any:
        return function(*args)

    return wrapper


def apply(model: Net, x: Tensor) -> Tensor:
    return model(x)


def apply_last(x: Tensor, *, model: Net) -> Tensor:
    return model(x)


def through_a_function(x: Tensor) -> Tensor:
    return calls_the_global(x)


def calls_the_global(x: Tensor) -> Tensor:
    return net_in_a_global(x)


def imports_inside(x: Tensor) -> Tensor:
    return sys.modules["nobody_knows"].net(x)


def _closure(net: Net) -> Callable:
    def encode(x: Tensor) -> Tensor:
        return net(x)

    return encode


def _nested(net: Net) -> Callable:
    def encode(x: Tensor) -> Tensor:
        return torch.stack([row for row in (lambda y: net(y))(x)])

    return encode


def _unbound(net: Net) -> Callable:
    def encode(x: Tensor) -> Tensor:
        if x is None:
            late = None  # noqa: F841
        return net(x) if x is not None else empty

    if net is None:
        empty = None
    return encode


CALLABLES: dict[str, Callable[[Net], Any]] = {
    "module": lambda net: net,
    "function": _closure,
    "empty cell": _unbound,
    "lambda in lambda": _nested,
    "bound method": lambda net: net.encode,
    "forward": lambda net: net.forward,
    "partial of a function": lambda net: functools.partial(apply, net),
    "partial by keyword": lambda net: functools.partial(apply_last, model=net),
    "partial of a method": lambda net: functools.partial(net.encode),
    "partial of a lambda": lambda net: functools.partial(lambda m, x: m(x), net),
    "default argument": lambda net: lambda x, model=net: model(x),
    "keyword default": lambda net: lambda x, *, model=net: model(x),
    "decorated": lambda net: decorated(net.encode),
    "global": lambda net: lambda x: net_in_a_global(x),
    "global of a function": lambda net: through_a_function,
    "global in a dict": lambda net: lambda x: GLOBAL["net"](x),
    "attribute of a python module": lambda net: lambda x: elsewhere.net(x),
    "method of an object": lambda net: Trainer(net).encode,
    "object": lambda net: Trainer(net),
    "object with slots": lambda net: Slots(net),
    "lambda of an object": lambda net: (lambda trainer: lambda x: trainer.encode(x))(Trainer(net)),
    "deep in an object": lambda net: Trainer(net, deep=True).encode,
    "list": lambda net: (lambda nets: lambda x: nets[0](x))([net]),
    "hidden": lambda net: imports_inside,
    "submodules": lambda net: lambda x: (net.calls.add_(1), net.head(net.body(x)))[1],
    "compiled module": lambda net: torch.compile(net, backend="eager"),
    "compiled method": lambda net: torch.compile(net.encode, backend="eager"),
    "compiled function": lambda net: torch.compile(_closure(net), backend="eager"),
    "lambda of a compiled module": lambda net: (lambda c: lambda x: c(x))(
        torch.compile(net, backend="eager")
    ),
    "functional_call": lambda net: functools.partial(
        lambda m, p, x: torch.func.functional_call(m, p, (x,)), net, dict(net.named_parameters())
    ),
}


@pytest.fixture
def net(monkeypatch: pytest.MonkeyPatch) -> Iterator[Net]:
    net = Net()
    monkeypatch.setitem(GLOBAL, "net", net)
    monkeypatch.setattr(sys.modules[__name__], "net_in_a_global", net)
    monkeypatch.setattr(elsewhere, "net", net, raising=False)
    monkeypatch.setattr(hidden, "net", net, raising=False)
    monkeypatch.setitem(sys.modules, "nobody_knows", hidden)
    yield net


@pytest.mark.parametrize("name", CALLABLES)
def test_callables(name: str, net: Net) -> None:
    """BatchNorm's statistics move once a micro-batch, whatever leads to the network."""
    if "compiled" in name:
        torch.compiler.reset()
    encoder = CALLABLES[name](net)
    agree(net, lambda: cached_step(encoder, views(), loss_fn, 4))
    assert int(net.calls) == 6


def test_the_case_of_the_report() -> None:
    """Eight rows in micro-batches of two."""
    m = nn.BatchNorm1d(4)
    cached_step(lambda x: m(x), [torch.eye(4), torch.eye(4) + 1], ssl.nt_xent_loss, 2)
    assert int(m.num_batches_tracked) == 4


def test_one_function_a_view() -> None:
    """Each with a network of its own."""
    first, second = Net(), Net()
    twins = copy.deepcopy(first), copy.deepcopy(second)
    state = torch.get_rng_state()
    z = [torch.cat([n(p) for p in v.split(4)]) for n, v in zip(twins, views(), strict=True)]
    loss_fn(*z).backward()
    torch.set_rng_state(state)
    cached_step([lambda x: first(x), second.encode], views(), loss_fn, 4)
    for ours, twin in zip((first, second), twins, strict=True):
        torch.testing.assert_close(facts(ours), facts(twin), rtol=1e-11, atol=1e-14)


def test_modules_can_be_named(net: Net) -> None:
    """For a method of a module that comes from where nobody looks."""

    def encode(x: Tensor) -> Tensor:
        return sys.modules["nobody_knows"].net.encode(x)

    for modules in (net, [net], (m for m in [net])):
        net.zero_grad()
        agree(
            net,
            lambda modules=modules: cached_step(encode, views(), loss_fn, 4, modules=modules),
        )


def runs_another_in_a_thread(x: Tensor) -> None:
    sys.modules["nobody_knows"].other(x)


def test_other_threads_are_left_alone(net: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    """What runs elsewhere meanwhile keeps its buffers."""
    other = nn.BatchNorm1d(D_IN).double()
    monkeypatch.setattr(hidden, "other", other, raising=False)

    def encode(x: Tensor) -> Tensor:
        thread = threading.Thread(target=runs_another_in_a_thread, args=(x.detach(),))
        thread.start()
        thread.join()
        return sys.modules["nobody_knows"].net(x)

    cached_step(encode, views(), loss_fn, 4)
    assert int(net.calls) == 6 and int(other.num_batches_tracked) == 12


def test_no_hook_stays_behind(net: Net) -> None:
    """Not even when the encoder fails."""
    from torch.nn.modules import module

    def fails(x: Tensor) -> Tensor:
        net_in_a_global(x)
        raise KeyError("no")

    before = {k: v.clone() for k, v in net.named_buffers()}
    for encode in (fails, lambda x: sys.modules["nobody_knows"].net(x[:, :3])):
        with pytest.raises((KeyError, RuntimeError)):
            cached_step(encode, views(), loss_fn, 4)
    assert not module._global_forward_pre_hooks and not net._forward_pre_hooks
    torch.testing.assert_close(dict(net.named_buffers()), before)


def test_lazy_modules_have_to_be_called_first() -> None:
    encoder = nn.Sequential(nn.Linear(6, 4), nn.LazyBatchNorm1d()).double()
    with pytest.raises(ValueError, match="initialised, got a LazyBatchNorm1d.*call the encoder"):
        cached_step(encoder, views(), loss_fn, 4)
    encoder(views()[0])
    cached_step(encoder, views(), loss_fn, 4)
    assert int(encoder[1].num_batches_tracked) == 7


# ------------------------------------------------------------------------------------ evaluation


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("kind", ["module", "function", "bound method"])
def test_without_grad_it_evaluates(mode: Callable, kind: str, net: Net) -> None:
    """One forward pass: the loss, the buffers and the generator as after one; no gradient."""
    encoder, calls = CALLABLES[kind](net), []
    twin = copy.deepcopy(net)
    state = torch.get_rng_state()
    net.register_forward_pre_hook(lambda module, args: calls.append(len(args[0])))
    with mode():
        expected = loss_fn(*(torch.cat([twin(p) for p in v.split(4)]) for v in views()))
        after = torch.get_rng_state()
        torch.set_rng_state(state)
        loss = cached_step(encoder, views(), loss_fn, 4)
    assert torch.equal(loss, expected) and not loss.requires_grad
    assert torch.equal(torch.get_rng_state(), after)
    assert all(p.grad is None for p in net.parameters())
    torch.testing.assert_close(dict(net.named_buffers()), dict(twin.named_buffers()))
    assert kind == "bound method" or calls == [4, 4, 3] * 2


def test_evaluation_of_computed_views() -> None:
    """Only a gradient would make them a mistake."""
    net = Net().eval()
    x = [(v.requires_grad_() * 2) for v in views()]
    with torch.no_grad():
        torch.testing.assert_close(
            cached_step(net, x, loss_fn, 4), loss_fn(*(net(v) for v in x)), rtol=1e-11, atol=1e-14
        )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("kind", ["module", "function", "hidden"])
def test_dropout_on_a_device(kind: str, net: Net) -> None:
    """The generator of the device, too."""
    net.cuda()
    encoder = CALLABLES[kind](net)
    x = [v.cuda() for v in views()]
    twin, state = copy.deepcopy(net), torch.cuda.get_rng_state()
    accumulated(twin, x)
    after = torch.cuda.get_rng_state()
    torch.cuda.set_rng_state(state)
    cached_step(encoder, x, loss_fn, 4)
    assert torch.equal(torch.cuda.get_rng_state(), after)
    torch.testing.assert_close(facts(net), facts(twin), rtol=1e-9, atol=1e-12)
