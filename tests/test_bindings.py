# SPDX-License-Identifier: Apache-2.0
"""Arguments of the C++ extension go by name: none can change places, be forgotten or be misspelt."""

from __future__ import annotations

import ast
import gc
import inspect
import random
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

_C = pytest.importorskip("sslkernels._C", reason="the C++ extension is not built")

from sanitize.bindings import signatures  # noqa: E402

from sslkernels.backends import autoencoders_cpu, cpu, updates_cpu  # noqa: E402
from sslkernels.backends.interface import (  # noqa: E402
    Kept,
    Paired,
    Problem,
    RowState,
    Thresholds,
    Tiles,
    Triplets,
    Vae,
    VaeWanted,
    Wanted,
)

PACKAGE = Path(__file__).resolve().parents[1] / "sslkernels"
CALLERS = [
    PACKAGE / name
    for name in (
        "backends/autoencoders_cpu.py",
        "backends/cpu.py",
        "backends/updates_cpu.py",
        "ops/eager.py",
    )
]


# ---- What the module says, what its types say, what callers write --------------------------------


def public() -> Iterator[tuple[str, Any]]:
    """Functions and methods of the module that have a signature, which constructors have not."""
    for name, value in vars(_C).items():
        if inspect.isbuiltin(value):
            yield name, value
        elif inspect.isclass(value):
            for method in vars(value):
                if not method.startswith("_"):
                    yield f"{name}.{method}", getattr(value, method)


def test_types_are_those_of_the_module() -> None:
    typed = signatures()
    classes = {name for name, value in vars(_C).items() if inspect.isclass(value)}
    assert {name for name, _ in public()} | classes == set(typed)
    for name, value in public():
        arguments = typed[name]
        want = {
            a.arg: d is None
            for a, d in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
        }
        signature = inspect.signature(value)
        got = {
            p.name: p.default is p.empty
            for p in signature.parameters.values()
            if p.kind is p.KEYWORD_ONLY
        }
        assert list(got.items()) == list(want.items()), name
        positional = [p for p in signature.parameters.values() if p.kind is p.POSITIONAL_ONLY]
        assert len(positional) == len(arguments.posonlyargs) + len(arguments.args), name


def calls() -> list[tuple[str, ast.Call]]:
    found = []
    for path in CALLERS:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and isinstance(node.func.value, ast.Name)
                and node.func.value.id == "_C"
            ):
                found.append((node.func.attr, node))
    return found


def test_calls_are_short_enough_to_be_fast() -> None:
    """Of more than 15 names, or with **, Python makes a dict and a new tuple for every call."""
    found = calls()
    assert len(found) > 20
    slow = {
        name
        for name, call in found
        if len(call.args) + 2 * len(call.keywords) > 30 or any(k.arg is None for k in call.keywords)
    }
    # A watch is made once; the paired loss reads N M D numbers.
    assert slow == {"TensorWatch", "paired_forward", "paired_backward"}


# ---- Calls that are wrong ------------------------------------------------------------------------


def kept(**changed: Any) -> int:
    return _C.kept_tiles(**{"layout": "joint", "dtype": "float32", "n": 64, "d": 128, **changed})


def test_names_are_checked() -> None:
    assert kept() >= 64 * 127  # every pair of 128 rows
    with pytest.raises(TypeError, match="^kept_tiles: there is no argument 'D'$"):
        kept(D=32)
    with pytest.raises(TypeError, match="^kept_tiles: argument 'd' is missing$"):
        _C.kept_tiles(layout="joint", dtype="float32", n=64)
    with pytest.raises(TypeError, match="^kept_tiles: argument 'layout' is missing$"):
        _C.kept_tiles()
    with pytest.raises(TypeError, match="^kept_tiles: arguments are given by name and 0 without"):
        _C.kept_tiles("joint", "float32", 64, 32)
    with pytest.raises(TypeError, match="^EmaPlan: argument 'sources' is missing$"):
        _C.EmaPlan(targets=[])
    with pytest.raises(TypeError, match="^SlotWatch: arguments are given by name and 0 without"):
        _C.SlotWatch([])
    with pytest.raises(TypeError, match="^run: argument 'decay' is missing$"):
        updates_cpu.EmaPlan([], [])._plan.run()
    with pytest.raises(TypeError, match="^attend: the first argument must be what tiles"):
        _C.attend(None, lse=0, mean_key=0, threshold=0, rank=0)
    with pytest.raises(TypeError, match="^attend: arguments are given by name and 1 without one"):
        _C.attend(lse=0, mean_key=0, threshold=0, rank=0)
    x = torch.zeros(1, 1)
    paired = cpu._paired(Paired(x, x, None, torch.ones(())))
    with pytest.raises(TypeError, match="^attend: the first argument must be what tiles"):
        _C.attend(paired, lse=0, mean_key=0, threshold=0, rank=0)


def test_ranks_of_columns_need_columns() -> None:
    """The kernel once wrote thresholds to where it had no memory."""
    x, out, counts = torch.ones(3, 2), torch.empty(3), torch.empty(3, dtype=torch.int64)
    handle = cpu._tiles("lse", Tiles(x, x.clone(), scale=torch.ones(())))
    with pytest.raises(ValueError, match="^pairwise_forward: threshold_col needs col"):
        _C.pairwise_forward(
            handle,
            row=out.data_ptr(),
            col=None,
            threshold_row=None,
            threshold_col=out.data_ptr(),
            rank_row=None,
            rank_col=counts.data_ptr(),
        )


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        (
            {"layout": "Joint"},
            ValueError,
            "layout must be one of joint, cross, both, bank, decoupled, sigmoid, classes, got 'Joint'",
        ),
        (
            {"layout": 0},
            TypeError,
            "layout must be one of joint, cross, both, bank, decoupled, sigmoid, classes, got 0",
        ),
        ({"dtype": "\ud800"}, ValueError, "dtype must be one of float32, "),
        ({"n": 64.0}, TypeError, "n must be an integer of 64 bits, got 64.0"),
        ({"n": 2**63}, TypeError, "n must be an integer of 64 bits, got 9223372036854775808"),
        ({"n": None}, TypeError, "n must be an integer of 64 bits, got None"),
    ],
)
def test_values_are_checked(changed: dict[str, Any], error: type, message: str) -> None:
    with pytest.raises(error) as caught:
        kept(**changed)
    assert str(caught.value).startswith(f"kept_tiles: {message}")


def test_other_kinds_of_values_are_checked() -> None:
    with pytest.raises(TypeError, match="^peak_flops: bf16 must be True or False, got 1$"):
        _C.peak_flops(bf16=1, n_threads=1)
    with pytest.raises(TypeError, match="n_threads must be an integer of 32 bits, got 4294967296"):
        _C.peak_flops(bf16=False, n_threads=2**32)
    for address in (-1, 1.0, "0", 2**64):
        with pytest.raises(TypeError, match="^extremes: bias_k must be an address or None, got "):
            _C.extremes(tiles(), bias_k=address, max_same=0, min_other=0)
    plan = updates_cpu.EmaPlan([], [])._plan
    run = {"decay": 0.5, "stochastic_rounding": False, "seed": 0, "step": 0, "n_threads": 1}
    plan.run(**{**run, "seed": 2**64 - 1})
    for seed in (-1, 2**64, 0.5):
        with pytest.raises(TypeError, match="^run: seed must be an integer of 64 bits without"):
            plan.run(**{**run, "seed": seed})
    with pytest.raises(TypeError, match="^run: decay must be a number, got 'half'$"):
        plan.run(**{**run, "decay": "half"})
    lists = dict.fromkeys(("targets", "sources", "sizes", "target_dtypes", "source_dtypes"), [])
    with pytest.raises(TypeError, match="^EmaPlan: sizes must be a list, got "):
        _C.EmaPlan(**{**lists, "sizes": ()})
    with pytest.raises(ValueError, match="^EmaPlan: target_dtypes must be one of float32, "):
        _C.EmaPlan(**{**lists, "target_dtypes": ["int8"]})
    with pytest.raises(ValueError, match="^EmaPlan: the lists must have the same length$"):
        _C.EmaPlan(**{**lists, "sizes": [1]})
    for places in ({"indices": [0]}, {"firsts": [0]}, {"indices": [0], "firsts": []}):
        with pytest.raises(ValueError, match="^EmaPlan: the lists must have the same length$"):
            _C.EmaPlan(**lists, **places)
    with pytest.raises(TypeError, match="^SlotWatch: dicts must be a list of dicts, got 3 in it$"):
        _C.SlotWatch(dicts=[3])


def tiles() -> Any:
    x = torch.zeros(1, 1)
    return cpu._tiles("lse", Tiles(x, None, torch.ones(())))


# ---- Order does not matter, names do -------------------------------------------------------------


class Renamed:
    """``_C`` whose functions get their keyword arguments in another order and two names exchanged."""

    def __init__(self, function: str = "", pair: tuple[str, str] = ("", "")) -> None:
        self.function, self.pair, self.seen = function, pair, 0

    def __getattr__(self, name: str) -> Any:
        value = getattr(_C, name)
        if not (inspect.isbuiltin(value) or inspect.isclass(value)):
            return value

        def call(*args: Any, **given: Any) -> Any:
            if name == self.function:
                a, b = self.pair
                given = {**given, a: given[b], b: given[a]}
                self.seen += 1
            items = list(given.items())
            random.shuffle(items)
            return value(*args, **dict(items))

        return call


def everything() -> dict[str, list[Tensor | None]]:
    """Results of every kernel by the functions that it is called with, for as many queries as keys."""
    torch.manual_seed(0)
    n, d = 12, 7
    a, b, bank, negatives = (
        torch.randn(n, d),
        torch.randn(n, d),
        torch.randn(n, d),
        torch.randn(n, n, d),
    )
    ids_a, ids_b = torch.randint(3, (n,)), torch.randint(3, (n,))
    scale, bias, w, v = torch.tensor(3.0), torch.tensor(-1.0), torch.rand(n), torch.rand(n)
    results: dict[str, list[Tensor | None]] = {}
    tiles = Tiles(a, b, scale, bias, ids_a, ids_b)
    out = cpu.pairwise_forward("lse", tiles, True, Thresholds(w, v))
    results["pairwise_forward"] = list(out)
    results["pairwise_backward"] = list(
        cpu.pairwise_backward(
            "lse", tiles, RowState(out.row, w), RowState(out.col, v), Wanted(True, True)
        )
    )
    results["attend"] = list(cpu.attend(tiles, w))
    results["extremes"] = list(cpu.extremes(tiles._replace(bias=w)))
    results["tiles"] = [x for name in ("pairwise_forward", "attend") for x in results[name]]
    for layout, keys in (("cross", None), ("bank", bank)):
        ids = (None, None) if keys is None else (ids_a, ids_b)
        problem = Problem(layout, a, b, keys, scale, *ids, True, "none", False, None, 0.0)
        out, kept_tiles = cpu.contrastive_forward(problem, True, True)
        left = Kept(out.state, out.mean_key, kept_tiles)
        grads = cpu.contrastive_backward(problem, left, w, Wanted(True, True, True))
        results[f"contrastive_forward:{layout}"] = [*out, kept_tiles]
        results[f"contrastive_backward:{layout}"] = list(grads)
    problem = Problem("sigmoid", a, b, None, scale, None, None, True, "none", False, bias)
    out, _ = cpu.contrastive_forward(problem, False, False)
    at_once = cpu.contrastive_at_once(problem._replace(reduction="sum"), Wanted(True, True))
    assert at_once is not None
    out, gradients = at_once
    results["contrastive_at_once"] = [*out, gradients.da, gradients.db, gradients.dbias]
    results["contrastive"] = [*results["contrastive_forward:cross"], out.loss]
    unit, norm = cpu.normalize_rows(a, 1e-12, None)
    results["unit_forward"] = [unit, norm]
    results["unit_backward"] = [cpu.normalize_rows_backward(b, a, norm, 1e-12)]
    loss, state = cpu.regression_forward(a, b, "none", False)
    results["regression_forward"] = results["regression"] = [loss, state]
    results["regression_backward"] = [cpu.regression_backward(a, b, "none", False, state, w)]
    ids_k = torch.randint(3, (n, n))
    paired = Paired(a, b, negatives, scale, ids_a, ids_k, False, "none")
    loss, left, rank, similarity = cpu.paired_forward(paired)
    results["paired_forward"] = results["paired"] = [loss, *left, rank, similarity]
    paired = paired._replace(ids_q=None, ids_k=None)
    results["paired_backward"] = list(cpu.paired_backward(paired, left, w, True, True))
    triplets = Triplets(a, ids_a, scale, True, False, "sum")
    loss, left = cpu.triplet_forward(triplets)
    results["triplet_forward"] = results["triplet"] = [loss, *left]
    results["triplet_backward"] = list(cpu.triplet_backward(triplets, left, w[0], True))
    vae = Vae(a, b, bank, a + 1, b - 1, torch.rand(d), "gaussian")
    wanted = VaeWanted(True, True, True, True, True)
    results["vae_forward"] = results["vae"] = list(cpu.vae_forward(vae))
    results["vae_backward"] = list(cpu.vae_backward(vae, w, v, wanted))
    seed = torch.tensor(5)
    results["reparameterize"] = [
        cpu.reparameterize(a, b, seed),
        cpu.reparameterize_backward(a, seed, b),
    ]
    maps, others = [a, bank], [b, a + 1]
    distances = cpu.features_forward(maps, others, True, 0.5)
    results["features_forward"] = [distances]
    results["features_backward"] = cpu.features_backward(
        maps, others, True, 0.5, distances, [True, True]
    )
    pointer, fill = torch.tensor([5]), torch.tensor([n])
    queue, labels = bank.clone(), torch.arange(n)
    cpu.enqueue_(queue, pointer, fill, a, False, labels, ids_a)
    results["enqueue"] = [queue, pointer, fill, labels]
    target, source = a.clone(), b.clone()
    cpu.EmaPlan([target], [source]).run(0.75)
    results["EmaPlan"] = [target, source]
    target, source = a.clone(), b.clone()
    cpu.CopyPlan([target], [source]).run()
    results["CopyPlan"] = [target, source]
    return results


def same(a: list[Tensor | None], b: list[Tensor | None]) -> bool:
    return all((x is y) or torch.equal(x, y) for x, y in zip(a, b, strict=True))  # type: ignore[arg-type]


@pytest.fixture
def renamed(monkeypatch: pytest.MonkeyPatch) -> Callable[[Renamed], None]:
    def install(module: Renamed) -> None:
        monkeypatch.setattr(cpu, "_C", module)
        monkeypatch.setattr(updates_cpu, "_C", module)
        monkeypatch.setattr(autoencoders_cpu, "_C", module)

    return install


def test_order_does_not_matter(renamed: Callable[[Renamed], None]) -> None:
    want = everything()
    renamed(Renamed())
    got = everything()
    assert got.keys() == want.keys()
    assert not [name for name in want if not same(got[name], want[name])]


# Arrays of the same size: exchanged, they give wrong numbers and no crash.
@pytest.mark.parametrize(
    ("function", "pair"),
    [
        ("tiles", ("q", "k")),
        ("tiles", ("ids_q", "ids_k")),
        ("tiles", ("scale", "bias")),
        ("pairwise_forward", ("row", "col")),
        ("pairwise_forward", ("threshold_row", "threshold_col")),
        ("pairwise_forward", ("rank_row", "rank_col")),
        ("pairwise_backward", ("row", "col")),
        ("pairwise_backward", ("drow", "dcol")),
        ("pairwise_backward", ("dq", "dk")),
        ("attend", ("lse", "threshold")),
        ("extremes", ("max_same", "min_other")),
        ("contrastive", ("a", "b")),
        ("contrastive", ("normalize", "bf16")),
        ("contrastive", ("scale", "bias")),
        ("contrastive_backward", ("da", "db")),
        ("contrastive_at_once", ("da", "db")),
        ("contrastive_at_once", ("loss", "dbias")),
        ("regression", ("prediction", "target")),
        ("paired", ("query", "positive_key")),
        ("paired_forward", ("lse", "positive")),
        ("paired_forward", ("row_stride", "key_stride")),
        ("paired_backward", ("lse", "positive")),
        ("paired_backward", ("dquery", "dpositive")),
        ("triplet", ("normalize", "cosine")),
        ("triplet_forward", ("loss", "share")),
        ("vae", ("x", "spread")),
        ("vae_forward", ("mean", "log_variance")),
        ("vae_forward", ("reconstruction", "kl")),
        ("vae_backward", ("drec", "dkl")),
        ("vae_backward", ("dreconstruction", "dx")),
        ("vae_backward", ("dreconstruction", "dspread")),
        ("vae_backward", ("dmean", "dlog_variance")),
        ("features_backward", ("features", "targets")),
        ("enqueue", ("ptr", "fill")),
        ("enqueue", ("labels", "queue_labels")),
        ("EmaPlan", ("targets", "sources")),
        ("CopyPlan", ("targets", "sources")),
    ],
)
def test_two_names_exchanged_are_seen(
    function: str, pair: tuple[str, str], renamed: Callable[[Renamed], None]
) -> None:
    want = everything()
    module = Renamed(function, pair)
    renamed(module)
    try:
        got = everything()
    except ValueError as error:  # one is null in some call, or not what the other may be
        assert f"{function}: " in str(error)
        return
    assert module.seen
    changed = [name for name in want if not same(got[name], want[name])]
    assert any(name.partition(":")[0] == function for name in changed), changed


# ---- Call sites ----------------------------------------------------------------------------------


def test_more_call_sites_than_are_remembered() -> None:
    """Each has a tuple of names of its own, and the names come in another order."""
    sites = []
    for i in range(12):
        names = random.sample(["layout", "dtype", "n", "d"], 4)
        source = ", ".join(f"{name}={name}" for name in names)
        space: dict[str, Any] = {"_C": _C}
        exec(f"def f(layout, dtype, n, d): return _C.kept_tiles({source})", space)
        sites.append((space["f"], i + 1))
    for _ in range(3):
        random.shuffle(sites)
        for f, n in sites:
            assert f("cross", "float32", n, 8) == kept(layout="cross", n=n, d=8)
        with pytest.raises(TypeError):
            _C.kept_tiles(layout="cross", dtype="float32", n=1, d=8, m=1)


def test_calls_while_a_value_is_read() -> None:
    """Reading a number may run Python code, which may call the same function from elsewhere."""

    class Number:
        def __index__(self) -> int:
            for _ in range(8):
                assert kept(n=3) == kept(n=3)
            return 64

    assert _C.kept_tiles(n=Number(), layout="joint", dtype="float32", d=128) == kept()


def test_calls_leave_nothing_behind() -> None:
    def work() -> None:
        kept(n=5)
        tiles()
        updates_cpu.EmaPlan([], []).run(0.5)
        updates_cpu.CopyPlan([], []).run()
        _C.SlotWatch(dicts=[{"a": object()}]).unchanged()
        for bad in ({"n": "x"}, {"q": 1}, {"layout": ""}):
            try:
                kept(**bad)
            except (TypeError, ValueError):
                pass

    for _ in range(50):
        work()
    gc.collect()
    before = sys.getallocatedblocks()
    for _ in range(1000):
        work()
    gc.collect()
    assert sys.getallocatedblocks() - before < 500


def test_threads_call_at_once() -> None:
    failed: list[BaseException] = []

    def work(n: int) -> None:
        try:
            x = torch.randn(n, 5)
            want = cpu.attend(Tiles(x, x, torch.ones(())), None).lse
            for _ in range(200):
                assert kept(n=n) == _C.kept_tiles(layout="joint", dtype="float32", n=n, d=128)
                assert torch.equal(cpu.attend(Tiles(x, x, torch.ones(())), None).lse, want)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in (3, 8, 13)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed


def test_a_watch_in_a_cycle_is_collected() -> None:
    class Model:
        pass

    model = Model()
    model.watch = _C.SlotWatch(dicts=[vars(model), {"model": model}])  # type: ignore[attr-defined]
    assert not model.watch.unchanged()  # type: ignore[attr-defined]  # it was stored afterwards
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


# ---- What the fuzzer found (tests/sanitize/fuzz.py); the sanitizers run these tests too ------------


@pytest.mark.parametrize("op", ["features_forward", "features_backward"])
def test_sizes_beyond_memory_are_refused_without_rows(op: str) -> None:
    """No rows of 2^63 - 1 elements are no elements, but their blocks were counted."""
    x = torch.zeros(64)
    more: dict[str, Any] = {"out": x.data_ptr()}
    if op == "features_backward":
        more = {"dout": x.data_ptr(), "gradients": [x.data_ptr()]}
    with pytest.raises(ValueError, match=rf"{op}: sizes must be from 0 to 2\^47"):
        getattr(_C, op)(
            features=[x.data_ptr()],
            targets=[x.data_ptr()],
            sizes=[2**63 - 1],
            dtypes=["float32"],
            target_dtypes=["float32"],
            n=0,
            smooth=False,
            beta=1.0,
            wide=False,
            n_threads=1,
            **more,
        )


def test_rows_of_no_elements_need_no_address() -> None:
    """Their strides were added to null, which C++ does not allow."""
    scale, losses, rank = torch.ones(1), torch.zeros(6), torch.zeros(6, dtype=torch.int64)
    lse, positive, norms, state = (torch.zeros(64) for _ in range(4))
    nothing = {"d": 0, "n": 6, "n_threads": 1, "dtype": "float32", "reduction": "none"}
    paired = _C.paired(
        normalize=True,
        query=None,
        query_stride=5,
        positive_key=None,
        positive_stride=5,
        scale=scale.data_ptr(),
        ids_q=None,
        ids_k=None,
        **nothing,
    )
    _C.paired_forward(
        paired,
        negatives=None,
        m=2,
        row_stride=9,
        key_stride=3,
        lse=lse.data_ptr(),
        positive=positive.data_ptr(),
        norms=norms.data_ptr(),
        mean_key=None,
        loss=losses.data_ptr(),
        rank=rank.data_ptr(),
    )
    torch.testing.assert_close(losses, torch.full((6,), 3.0).log())
    regression = _C.regression(
        prediction=None, prediction_stride=5, target=None, target_stride=5, **nothing
    )
    _C.regression_forward(regression, state=state.data_ptr(), loss=losses.data_ptr())
    assert losses.tolist() == [2.0] * 6
