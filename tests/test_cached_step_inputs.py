# SPDX-License-Identifier: Apache-2.0
"""cached_step with dicts, tuples, views of different length, and results to pick from."""

from __future__ import annotations

import functools
from collections import OrderedDict, UserDict, namedtuple
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from cached_step_cases import N, Net, agree, facts, loss_fn, views
from torch import Tensor

import sslkernels as ssl
from sslkernels import cached_step

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
}


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
