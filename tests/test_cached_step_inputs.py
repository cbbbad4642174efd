# SPDX-License-Identifier: Apache-2.0
"""cached_step with what people have: functions of modules, dicts, tuples, results to pick from."""

from __future__ import annotations

import copy
import functools
import sys
import threading
import types
from collections import OrderedDict, UserDict, namedtuple
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import sslkernels as ssl
from sslkernels import cached_step

N, D_IN, D = 11, 6, 4


def loss_fn(z1: Tensor, z2: Tensor) -> Tensor:
    return ssl.reference.nt_xent_loss(z1, z2, 0.3)


class Net(nn.Module):
    """BatchNorm, a buffer of its own, dropout: everything that a second pass could disturb."""

    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.body = nn.Sequential(nn.Linear(D_IN, 8), nn.BatchNorm1d(8), nn.Dropout(0.2))
        self.head = nn.Linear(8, D)
        self.register_buffer("calls", torch.zeros(()))
        self.double()
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) / 2)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.head(self.body(x))

    def encode(self, x: Tensor) -> Tensor:
        return self.forward(x)


def views(n: int = N) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(n, D_IN, generator=generator, dtype=torch.float64) for _ in range(2)]


def accumulated(net: nn.Module, x: list[Tensor], micro: int = 4) -> Tensor:
    """The truth: one graph through the micro-batches."""
    z = [torch.cat([net(part) for part in view.split(micro)]) for view in x]
    loss = loss_fn(*z)
    loss.backward()
    return loss.detach()


def facts(net: nn.Module) -> dict[str, Tensor]:
    grads = {f"grad {n}": p.grad for n, p in net.named_parameters() if p.grad is not None}
    return {**grads, **dict(net.named_buffers())}


def agree(net: nn.Module, call: Callable[[], Tensor], x: list[Tensor] | None = None) -> None:
    """Loss, gradients, buffers and the generator after ``call`` are those of plain accumulation."""
    twin = copy.deepcopy(net)
    state = torch.get_rng_state()
    truth = accumulated(twin, views() if x is None else x)
    after = torch.get_rng_state()
    torch.set_rng_state(state)
    loss = call()
    assert torch.equal(torch.get_rng_state(), after)
    torch.testing.assert_close(loss, truth, rtol=1e-11, atol=1e-14)
    torch.testing.assert_close(facts(net), facts(twin), rtol=1e-11, atol=1e-14)


# ------------------------------------------------------------------------------------- callables

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
}  # fmt: skip


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


# ---------------------------------------------------------------------------------------- inputs


class Encoding(UserDict):
    """A tokenizer's result: a UserDict with attributes and ``.to``."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self.data[name]
        except KeyError as error:
            raise AttributeError(name) from error

    def to(self, device: Any) -> Encoding:
        return Encoding({k: v.to(device) for k, v in self.data.items()})


class Duck:
    """Keys and items, and no kind of Mapping."""

    def __init__(self, **values: Any) -> None:
        self._values = values

    def keys(self) -> Any:
        return self._values.keys()

    def items(self) -> Any:
        return self._values.items()

    def __getitem__(self, key: str) -> Any:
        return self._values[key]

    def to(self, device: Any) -> Duck:
        return self


Pair = namedtuple("Pair", ["x", "scale"])


class Keywords(Net):
    """Like a transformer: named tensors."""

    def forward(self, x: Tensor, scale: Tensor | None = None, flag: bool = False) -> Tensor:
        assert scale is None or len(scale) == len(x)
        return super().forward(x if scale is None else x * scale) * (1 if flag else 1)


class OneMapping(Net):
    """Like a sentence transformer: one dict."""

    kind: type = dict

    def forward(self, batch: Any, **more: Any) -> Tensor:
        assert type(batch) is self.kind and not more
        scale = batch["scale"]
        return super().forward(batch["x"] * (scale[0] if isinstance(scale, list) else scale))


class Positional(Net):
    """Several tensors in order."""

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        return super().forward(x * scale)


class OneSequence(Net):
    """All tensors in one argument."""

    kind: type = tuple

    def forward(self, batch: Any) -> Tensor:
        assert type(batch) is self.kind
        return super().forward(batch[0] * batch[1])


def _of_kind(cls: type, kind: type) -> Net:
    net = cls()
    net.kind = kind
    return net


SCALE = torch.linspace(0.5, 2, N, dtype=torch.float64)[:, None]
INPUTS: dict[str, tuple[Callable[[], Net], Callable[[Tensor], Any]]] = {
    "dict": (Keywords, lambda x: {"x": x, "scale": SCALE}),
    "dict with a flag": (Keywords, lambda x: {"x": x, "scale": SCALE, "flag": True}),
    "ordered dict": (Keywords, lambda x: OrderedDict(x=x, scale=SCALE)),
    "encoding": (Keywords, lambda x: Encoding(x=x, scale=SCALE)),
    "duck": (Keywords, lambda x: Duck(x=x, scale=SCALE)),
    "one dict": (lambda: _of_kind(OneMapping, dict), lambda x: {"x": x, "scale": SCALE}),
    "one ordered dict": (
        lambda: _of_kind(OneMapping, OrderedDict),
        lambda x: OrderedDict(x=x, scale=SCALE),
    ),
    "one encoding": (
        lambda: _of_kind(OneMapping, Encoding),
        lambda x: Encoding(x=x, scale=SCALE),
    ),
    "nested": (
        lambda: _of_kind(OneMapping, dict),
        lambda x: {"x": x, "scale": [SCALE, "words", None]},
    ),
    "tuple": (Positional, lambda x: (x, SCALE)),
    "list": (Positional, lambda x: [x, SCALE]),
    "named tuple": (Positional, lambda x: Pair(x, SCALE)),
    "one tuple": (lambda: _of_kind(OneSequence, tuple), lambda x: (x, SCALE)),
    "one list": (lambda: _of_kind(OneSequence, list), lambda x: [x, SCALE]),
    "one named tuple": (lambda: _of_kind(OneSequence, Pair), lambda x: Pair(x, SCALE)),
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "wrap"),
    [
        *((name, wrap) for name in INPUTS for wrap in ("module", "method", "partial")),
        ("encoding", "compiled"),
        ("one tuple", "compiled"),
    ],
)
def test_inputs(name: str, wrap: str) -> None:
    """As keywords or positions where the encoder takes them, else as one argument of the same type."""
    make, view = INPUTS[name]
    net, plain = make(), Net()
    x = [view(v) for v in views()]
    agree_with = [v * SCALE for v in views()]
    encoder: Any = net
    if wrap == "method":
        encoder = net.forward
    elif wrap == "partial":
        encoder = functools.partial(net)
    elif wrap == "compiled":
        torch.compiler.reset()
        encoder = torch.compile(net, backend="eager")
    plain.load_state_dict(net.state_dict())
    state = torch.get_rng_state()
    truth = torch.cat([plain(p) for p in agree_with[0].split(4)])
    other = torch.cat([plain(p) for p in agree_with[1].split(4)])
    loss_fn(truth, other).backward()
    torch.set_rng_state(state)
    cached_step(encoder, x, loss_fn, 4)
    torch.testing.assert_close(facts(net), facts(plain), rtol=1e-11, atol=1e-14)


def test_gradients_of_tensors_in_a_dict() -> None:
    net, x = Keywords().eval(), [v.requires_grad_() for v in views()]
    loss_fn(*(net(v, SCALE) for v in x)).backward()
    expected = [v.grad.clone() for v in x]
    for v in x:
        v.grad = None
    cached_step(net, [{"x": v, "scale": SCALE} for v in x], loss_fn, 3)
    torch.testing.assert_close([v.grad for v in x], expected, rtol=1e-11, atol=1e-14)


def test_what_has_no_rows_is_handed_on() -> None:
    seen = []

    def encode(batch: dict[str, Any]) -> Tensor:
        seen.append((batch["t"], batch["text"], batch["none"], len(batch["x"])))
        return batch["x"] * weight

    weight = torch.ones((), dtype=torch.float64, requires_grad=True)
    t = torch.tensor(3)
    x = [{"x": v, "t": t, "text": "abc", "none": None} for v in views()]
    cached_step(encode, x, loss_fn, 4)
    assert weight.grad is not None and [s[3] for s in seen] == [4, 4, 3] * 4
    assert all(s[0] is t and s[1:3] == ("abc", None) for s in seen)


def test_views_of_different_length() -> None:
    """Queries against more passages than there are queries."""

    def retrieval(q: Tensor, p: Tensor) -> Tensor:
        return ssl.reference.info_nce_loss(q, p[: len(q)], p[len(q) :])

    net, twin = Net().eval(), Net().eval()
    queries, passages = views()[0][:5], torch.cat(views())
    retrieval(twin(queries), twin(passages)).backward()
    cached_step(net, [queries, passages], retrieval, 4)
    assert int(net.calls) == 2 + 6
    for ours, truth in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, truth.grad, rtol=1e-11, atol=1e-14)


# --------------------------------------------------------------------------------------- outputs


class Result(OrderedDict):
    """A transformer's result: keys, indices and attributes."""

    def __getattr__(self, name: str) -> Any:
        return self[name]

    def __getitem__(self, key: Any) -> Any:
        return list(self.values())[key] if isinstance(key, int) else super().__getitem__(key)


class Plain:
    """An object with an attribute."""

    def __init__(self, z: Tensor) -> None:
        self.z = z


OUTPUTS: dict[str, tuple[Callable[[Tensor], Any], Any]] = {
    "dict": (lambda z: {"a": 1, "z": z}, "z"),
    "result by key": (lambda z: Result(a=1, z=z), "z"),
    "result by index": (lambda z: Result(a=1, z=z), 1),
    "attribute": (Plain, "z"),
    "tuple": (lambda z: (None, z), 1),
    "from the end": (lambda z: (None, z), -1),
    "numpy index": (lambda z: [None, z], np.int64(1)),
    "callable": (lambda z: {"z": z[:, None]}, lambda r: r["z"].mean(1)),
    "one a view": (lambda z: {"z": z}, ["z", lambda r: r["z"]]),
    "tensor by callable": (lambda z: z * 2, lambda z: z / 2),
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_outputs(name: str) -> None:
    result, output = OUTPUTS[name]
    net = Net()
    agree(net, lambda: cached_step(lambda x: result(net(x)), views(), loss_fn, 4, output=output))


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


# ---------------------------------------------------------------------------------------- errors

X = views()[0]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"views": {"x": X}}, TypeError, "views must be a sequence of views, got one dict"),
        ({"views": 3}, TypeError, "views must be a sequence of views, got one int"),
        ({"views": [X, np.ones((3, 6))]}, TypeError, r"views\[1\] must be a tensor.*from_numpy"),
        ({"views": [{}]}, TypeError, r"views\[0\] must be a tensor, or a mapping.*got dict"),
        ({"views": [{"text": ["a"]}]}, TypeError, r"views\[0\] must be a tensor, or a mapping"),
        ({"views": [torch.ones(())]}, ValueError, r"views\[0\] must have at least one row"),
        (
            {"views": [{"x": X, "y": [X[:3]]}]},
            ValueError,
            r"the same number of rows, got 11 in views\[0\]\['x'\] and 3 in views\[0\]\['y'\]\[0\]",
        ),
        (
            {"views": [{"x": X, "y": X[:0]}]},
            ValueError,
            r"views\[0\]\['y'\] must have at least one row, got shape \[0, 6\]",
        ),
        (
            {"views": [(X, X.clone().requires_grad_() * 2)]},
            ValueError,
            r"views\[0\]\[1\] must be a leaf or detached",
        ),
        ({"encoder": 3}, TypeError, "encoder must be callable, got int"),
        ({"encoder": [Net(), None]}, TypeError, r"encoder\[1\] must be callable, got NoneType"),
        ({"output": ["z"]}, ValueError, "output must be one or one for each view, got 1 for 2"),
        ({"modules": [Net(), 3]}, TypeError, r"modules\[1\] must be an nn\.Module, got int"),
        (
            {"encoder": lambda x: {"z": x}},
            TypeError,
            r"must return a tensor, got dict with \['z'\]; say with output= what",
        ),
        ({"encoder": lambda x: (x, x)}, TypeError, "must return a tensor, got tuple; say with"),
        ({"encoder": lambda x: (x, 1), "output": 1}, TypeError, "must return a tensor, got int"),
        ({"encoder": lambda x: {"z": x}, "output": "y"}, KeyError, "y"),
    ],
)
def test_errors(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {
        "encoder": Net(),
        "views": views(),
        "loss_fn": loss_fn,
        "micro_batch": 4,
    }
    with pytest.raises(error, match=message):
        cached_step(**(arguments | change))
