# SPDX-License-Identifier: Apache-2.0
"""State dicts: tensors only, loaded entirely or not at all; copies, pickles, and what can't be copied."""

from __future__ import annotations

import copy
import io
import pickle
import threading
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import sslkernels as ssl

State = dict[str, Any]


class Odd(nn.Module):
    """Has an extra state, as quantised layers do."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3))
        self.calls = 0

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.calls)

    def set_extra_state(self, state: Tensor) -> None:
        self.calls = int(state)


def _net() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), Odd())


def _ema(online: nn.Module | None = None) -> ssl.EMA:
    net = _net() if online is None else online
    ema = ssl.EMA(net, 0.9, stochastic_rounding=True)
    for _ in range(3):
        ema.update(net)
    return ema


def _queue(size: int = 8, labels: bool = False) -> ssl.KeyQueue:
    queue = ssl.KeyQueue(size, 4, labels=labels)
    queue.enqueue(torch.randn(5, 4), torch.arange(5) if labels else None)
    return queue


def _moco(size: int = 8) -> ssl.MoCoLoss:
    loss = ssl.MoCoLoss(size, 4, nn.Parameter(torch.rand(1) + 0.1))
    loss.queue.enqueue(torch.randn(5, 4))
    return loss


class Parent(nn.Module):
    """A queue and an average in a larger module, with which they are saved."""

    def __init__(self, size: int = 8) -> None:
        super().__init__()
        self.loss = _moco(size)
        self.ema = _ema()


STATEFUL: dict[str, Callable[[], nn.Module]] = {
    "EMA": _ema,
    "EMA of a queue": lambda: _ema(nn.ModuleList((nn.Linear(4, 3), _queue()))),
    "KeyQueue": _queue,
    "KeyQueue labels": lambda: _queue(labels=True),
    "MoCoLoss": _moco,
    "NTXentLoss": lambda: ssl.NTXentLoss(nn.Parameter(torch.rand(()) + 0.1)),
    "TripletLoss": lambda: ssl.TripletLoss(torch.rand(1) + 0.1),
    "Parent": Parent,
}


def facts(module: nn.Module) -> list[Any]:
    """All that a failed load must leave as it is."""
    state = [x.clone() for x in module.state_dict().values()]
    identity = [id(x) for x in (*module.parameters(), *module.buffers())]
    lengths = [len(m) for m in module.modules() if isinstance(m, ssl.KeyQueue)]
    steps = [(m.step, m.seed) for m in module.modules() if isinstance(m, ssl.EMA)]
    calls = [m.calls for m in module.modules() if isinstance(m, Odd)]
    return [state, identity, lengths, steps, calls]


def unchanged(before: list[Any], after: list[Any]) -> bool:
    return before[1:] == after[1:] and all(map(torch.equal, before[0], after[0]))


@pytest.mark.parametrize("name", STATEFUL)
def test_state_dicts_hold_tensors_only(name: str) -> None:
    """What safetensors, {k: v.cpu()} and weights_only loading take; the round trip is exact."""
    module = STATEFUL[name]()
    state = {k: v.cpu().contiguous() for k, v in module.state_dict().items()}
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    other = STATEFUL[name]()
    result = other.load_state_dict(torch.load(file, weights_only=True))
    assert not result.missing_keys and not result.unexpected_keys
    left, right = facts(other), facts(module)
    assert left[2:] == right[2:] and all(map(torch.equal, left[0], right[0]))


@pytest.mark.parametrize("name", STATEFUL)
def test_copies_and_pickles(name: str) -> None:
    """Of modules that have been used."""
    module = STATEFUL[name]()
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        left, right = facts(twin), facts(module)
        assert left[2:] == right[2:] and all(map(torch.equal, left[0], right[0]))
        assert not set(left[1]) & set(right[1])


# ---------------------------------------------------------------------------- loads that must fail


def _without(suffix: str) -> Callable[[State], State]:
    def change(state: State) -> State:
        assert any(k.endswith(suffix) for k in state)
        return {k: v for k, v in state.items() if not k.endswith(suffix)}

    return change


def _with(suffix: str, value: Any) -> Callable[[State], State]:
    def change(state: State) -> State:
        assert any(k.endswith(suffix) for k in state)
        return {k: value if k.endswith(suffix) else v for k, v in state.items()}

    return change


def _extra(key: str) -> Callable[[State], State]:
    return lambda state: {**state, key: torch.zeros(1)}


# name, how the state of another such module is changed, the message, whether strict=False fails too
FAILURES: list[tuple[str, Callable[[State], State], str, bool]] = [
    ("KeyQueue", lambda s: _queue(4).state_dict(), r"queue must have shape \[8, 4\].*size 8", True),
    ("KeyQueue", _with("queue", torch.randn(8, 3)), r"got \[8, 3\]", True),
    ("KeyQueue", _with("queue", torch.ones(8, 4).int()), "queue must be floating-point", True),
    ("KeyQueue", _with("queue", np.ones((8, 4))), "queue must be a tensor, got numpy", True),
    ("KeyQueue", _with("queue_ptr", torch.tensor([1.5])), "queue_ptr must be integer", True),
    ("KeyQueue", _with("queue_ptr", torch.tensor([8])), r"queue_ptr must be in \[0, 7\]", True),
    (
        "KeyQueue",
        _with("queue_ptr", torch.tensor([1, 2])),
        r"queue_ptr must have shape \[1\]",
        True,
    ),
    ("KeyQueue", _with("fill", torch.tensor([-1])), r"fill must be in \[0, 8\]", True),
    ("KeyQueue", _without("fill"), "fill", True),
    ("KeyQueue", _without("queue"), "queue", True),
    ("KeyQueue", _extra("other"), "Unexpected.*other", False),
    ("KeyQueue", lambda s: _queue(labels=True).state_dict(), "Unexpected.*labels", False),
    ("KeyQueue labels", lambda s: _queue().state_dict(), "labels", True),
    ("KeyQueue labels", _with("labels", torch.ones(8)), "labels must be integer", True),
    ("KeyQueue labels", _with("labels", torch.arange(4)), r"labels must have shape \[8\]", True),
    ("MoCoLoss", lambda s: _moco(4).state_dict(), r"queue.queue must have shape \[8, 4\]", True),
    ("MoCoLoss", _with("temperature", torch.ones(2)), "size mismatch for temperature", True),
    ("MoCoLoss", _with("queue.queue_ptr", torch.tensor([-1])), "queue.queue_ptr must be in", True),
    ("MoCoLoss", _without("temperature"), "Missing.*temperature", False),
    ("NTXentLoss", _with("temperature", torch.ones(3)), "size mismatch", True),
    ("TripletLoss", lambda s: {"margin": s["margin"], "x": s["margin"]}, "Unexpected", False),
    ("EMA", _with("1.running_var", torch.ones(4)), "size mismatch", True),
    ("EMA", _with("2.weight", torch.ones(4)), "size mismatch", True),
    ("EMA", _without("step"), "Missing.*step", False),
    ("EMA", _without("1.running_var"), "Missing.*running_var", False),
    ("EMA", _extra("module.x"), "Unexpected.*module.x", False),
    ("EMA", _with("step", torch.tensor(1.5)), "step must be one integer", True),
    ("EMA", _with("seed", torch.tensor([1, 2])), "seed must be one integer", True),
    ("EMA", _with("step", "3"), "step must be an integer", True),
    ("EMA", lambda s: _net().state_dict(), "Missing.*step", False),
    ("EMA of a queue", _with("1.fill", torch.tensor([9])), "fill must be in", True),
    ("EMA of a queue", _without("1.fill"), "fill", True),
]


@pytest.mark.parametrize("assign", [False, True], ids=["copy", "assign"])
@pytest.mark.parametrize(
    ("name", "change", "message", "always"),
    FAILURES,
    ids=[f"{name}-{message}" for name, _, message, _ in FAILURES],
)
def test_a_failed_load_changes_nothing(
    name: str, change: Callable[[State], State], message: str, always: bool, assign: bool
) -> None:
    """The message names the entry, and the module is what it was; also without strict."""
    module, other = STATEFUL[name](), STATEFUL[name]()
    state = change(other.state_dict())
    before = facts(module)
    for strict in (True, False) if always else (True,):
        with pytest.raises((RuntimeError, ValueError, TypeError), match=f"(?s){message}"):
            module.load_state_dict(state, strict=strict, assign=assign)
        assert unchanged(before, facts(module))
    module.load_state_dict(other.state_dict())  # the good one still loads
    assert all(map(torch.equal, facts(module)[0], facts(other)[0]))


def test_a_queue_in_a_larger_module_is_loaded_as_one() -> None:
    """torch loads the rest of a model whose queue does not fit; the queue stays coherent."""
    module = Parent()
    before = facts(module.loss.queue)
    for state in (
        Parent(size=4).state_dict(),
        _without("queue.fill")(Parent().state_dict()),
        _without("queue.queue")(Parent().state_dict()),
    ):
        for strict in (True, False):
            with pytest.raises(RuntimeError, match=r"loss\.queue\."):
                module.load_state_dict(state, strict=strict)
            assert unchanged(before, facts(module.loss.queue))
    # No entry of it at all: strict=False means to leave it alone.
    rest = {k: v for k, v in Parent().state_dict().items() if "queue" not in k}
    result = module.load_state_dict(rest, strict=False)
    assert len(result.missing_keys) == 3 and all("queue" in k for k in result.missing_keys)
    assert unchanged(before, facts(module.loss.queue))


def test_missing_keys_are_reported_without_strict() -> None:
    """As torch does, and nothing changes."""
    for module in (_queue(), _ema()):
        before = facts(module)
        result = module.load_state_dict({}, strict=False)
        missing = {k for k in module.state_dict() if not k.endswith("num_batches_tracked")}
        assert set(result.missing_keys) == missing
        assert unchanged(before, facts(module))
    queue, labelled = _queue(), _queue(labels=True).state_dict()
    assert queue.load_state_dict(labelled, strict=False).unexpected_keys == ["labels"]
    assert torch.equal(queue.queue, labelled["queue"])


def test_other_float_dtypes_are_converted() -> None:
    """As torch does for parameters."""
    source = ssl.KeyQueue(8, 4, dtype=torch.bfloat16)
    source.enqueue(torch.randn(5, 4))
    queue = _queue()
    queue.load_state_dict(source.state_dict())
    assert queue.queue.dtype == torch.float32 and torch.equal(queue.queue, source.queue.float())


# ---------------------------------------------------------------------------------- old state dicts


def test_state_dicts_of_an_ema_from_before() -> None:
    """Step and seed were a dict under ``_extra_state``."""
    ema = ssl.EMA(nn.Linear(2, 1), 0.9)
    old = {
        "module.weight": torch.tensor([[1.5, -2.0]]),
        "module.bias": torch.tensor([0.25]),
        "_extra_state": {"step": 17, "seed": 4611686018427387000},
    }
    ema.load_state_dict(old)
    assert (ema.step, ema.seed) == (17, 4611686018427387000)
    assert torch.equal(ema.module.weight, old["module.weight"])
    new = ema.state_dict()
    assert list(new) == ["step", "seed", "module.weight", "module.bias"]
    assert new["step"].dtype == new["seed"].dtype == torch.int64 and new["step"].shape == ()
    assert int(new["seed"]) == 4611686018427387000

    parent = nn.ModuleDict({"target": ssl.EMA(nn.Linear(2, 1), 0.9)})
    parent.load_state_dict({f"target.{k}": v for k, v in old.items()})
    assert parent["target"].step == 17
    before = facts(ema)
    for broken in ({"step": 3}, {}, None):
        with pytest.raises(RuntimeError, match=r"Missing key.*seed"):
            ema.load_state_dict({**old, "_extra_state": broken})
        assert unchanged(before, facts(ema))


@pytest.mark.parametrize(
    ("state", "kind", "message"),
    [
        (
            {"queue": np.ones((4, 8)), "queue_ptr": 0},
            TypeError,
            "queue must be a tensor, got numpy",
        ),
        ({"queue": torch.ones(4, 8).int()}, TypeError, "dtype must be float32"),
        ({"queue": torch.ones(4, 8), "queue_ptr": torch.tensor([1, 2])}, TypeError, "one integer"),
        ({"queue": torch.ones(4, 8), "queue_ptr": torch.tensor([1.0])}, TypeError, "one integer"),
        ({"queue": torch.ones(4, 8), "queue_ptr": torch.tensor(8)}, ValueError, r"in \[0, 8\)"),
        ({"queue": torch.ones(4, 8, 1)}, ValueError, r"must be \[dim, size\]"),
        ({"queue": torch.ones(4, 0)}, ValueError, r"must be \[dim, size\]"),
        ([("queue", torch.ones(4, 8))], TypeError, "state_dict must be a mapping, got list"),
    ],
)
def test_from_moco_refuses(state: Any, kind: type, message: str) -> None:
    with pytest.raises(kind, match=message):
        ssl.KeyQueue.from_moco(state)


# ------------------------------------------------------------------------ what can't be deep-copied


def _old_weight_norm() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.Sequential(nn.Linear(4, 4), nn.utils.weight_norm(nn.Linear(4, 4)))


def _kept_activation() -> nn.Module:
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    net[1].last = net[0](torch.ones(1, 4))
    return net


def _kept_in_a_dict() -> nn.Module:
    net = nn.Sequential(nn.Linear(4, 4))
    net[0].cache = {"x": net[0](torch.ones(1, 4))}
    return net


def _lock() -> nn.Module:
    net = nn.Sequential(nn.Linear(4, 4))
    net.guard = threading.Lock()
    return net


def _file() -> nn.Module:
    net = nn.Sequential(nn.Linear(4, 4))
    net[0].log = open(__file__, encoding="utf-8")  # noqa: SIM115
    return net


def _generator() -> nn.Module:
    net = nn.Sequential(nn.Linear(4, 4))
    net[0].stream = (x for x in range(3))
    return net


def _buffer() -> nn.Module:
    net = nn.Sequential(nn.Linear(4, 4))
    net[0].register_buffer("state", net[0](torch.ones(1, 4)))
    return net


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_old_weight_norm, r"1\.weight .*computed with gradient.*parametrizations\.weight_norm"),
        (_kept_activation, r"1\.last .*computed with gradient.*\.detach\(\)"),
        (_kept_in_a_dict, r"0\.cache \(dict\)"),
        (_lock, r"guard \(lock\).*cannot pickle.*__deepcopy__"),
        (_file, r"0\.log \(TextIOWrapper\)"),
        (_generator, r"0\.stream \(generator\)"),
        (_buffer, r"0\.state .*computed with gradient"),
    ],
)
def test_what_stands_in_the_way_of_a_copy(make: Callable[[], nn.Module], message: str) -> None:
    """The attribute and what to do."""
    net = make()
    with pytest.raises(TypeError, match=f"EMA: online must be a network .* but {message}"):
        ssl.EMA(net)
    if hasattr(net[0], "log"):
        net[0].log.close()


def test_what_the_messages_advise_works() -> None:
    """The new weight_norm; an activation that was dropped."""
    net = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)))
    net(torch.ones(1, 4)).sum().backward()
    ema = ssl.EMA(net, 0.5)
    ema.update(net)
    torch.testing.assert_close(ema(torch.ones(1, 4)), net(torch.ones(1, 4)))
    kept = _kept_activation()
    kept[1].last = None
    ssl.EMA(kept).update(kept)


@pytest.mark.parametrize("online", [np.ones(3), lambda x: x, None, {"weight": torch.ones(2)}])
def test_ema_of_no_module(online: Any) -> None:
    with pytest.raises(TypeError, match=r"EMA: online must be an nn\.Module, got "):
        ssl.EMA(online)
