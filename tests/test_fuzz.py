# SPDX-License-Identifier: Apache-2.0
"""Random sizes, dtypes, layouts, temperatures and values: the right number, or the same error, everywhere.

``make test`` runs a few cases, always the same.  More of them, and others:

    python -m pytest tests/test_fuzz.py --fuzz-examples 2000 --fuzz-seed 7

A failure prints the argument that runs its case alone: ``--fuzz-case '{...}'``.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from fuzz_cases import (
    CHOOSING,
    DTYPES,
    ELEMENTWISE,
    LAYOUTS,
    LOSSES,
    ORDINARY,
    SEEDS,
    SIZES,
    LossCase,
    laid_out,
    loss_cases,
    tensors,
)
from helpers import engine, engines
from hypothesis import HealthCheck, given, note, settings
from hypothesis import seed as seeded
from hypothesis import strategies as st
from torch import Tensor

import sslkernels
from sslkernels import reference
from sslkernels.backends import chunked, updates_torch
from sslkernels.backends.interface import RowState, Thresholds, Tiles, Wanted

EPS = {name: torch.finfo(dtype).eps for name, dtype in DTYPES.items()}


def run(
    request: pytest.FixtureRequest,
    strategy: st.SearchStrategy[Any],
    check: Callable[..., None],
    few: int,
) -> None:
    """``check`` on some cases of a strategy, as many and of such a seed as the command line says."""
    examples, chosen = (request.config.getoption(f"--fuzz-{x}") for x in ("examples", "seed"))

    def test(case: Any) -> None:
        if hasattr(case, "line"):
            note(f"this case alone: --fuzz-case '{case.line()}'")
        check(case)

    options = settings(
        max_examples=examples or few,
        derandomize=chosen is None,
        database=None,
        deadline=None,
        print_blob=False,
        suppress_health_check=list(HealthCheck),
    )
    decorated = options(given(case=strategy)(test))
    (decorated if chosen is None else seeded(chosen)(decorated))()


# ---- losses --------------------------------------------------------------------------------------

Outcome = tuple[str, Any]


def outcome(module: Any, case: LossCase, given: dict[str, Tensor]) -> Outcome:
    """("value", [loss, gradients]) or ("error", its type and message)."""
    leaves = {k: v.detach().requires_grad_(v.is_floating_point()) for k, v in given.items()}
    try:
        loss = LOSSES[case.loss](module, leaves, case)
    except (TypeError, ValueError, RuntimeError) as error:
        return "error", (type(error).__name__, str(error))
    floats = [x for x in leaves.values() if x.requires_grad]
    weights = torch.linspace(0.5, 1.5, max(1, loss.numel()), dtype=loss.dtype)[: loss.numel()]
    total = (loss.view(-1) * weights).sum()
    if not total.requires_grad:
        return "value", [loss.detach()]
    grads = torch.autograd.grad(total, floats, allow_unused=True)
    return "value", [loss.detach(), *(None if g is None else g for g in grads)]


def largest_logit(case: LossCase, given: dict[str, Tensor]) -> float:
    """A bound of |S|, of which rounding is a share."""
    scale = 2.0 if case.loss == "uniformity" else 1 / case.temperature
    if case.loss in ("adversarial byol", "contrastive kl"):  # of unit rows
        return scale
    if "triplet" in case.loss or case.loss.startswith(ELEMENTWISE):
        return 1.0
    if case.loss in ("byol", "simsiam", "alignment", "contrastive", "margin"):
        return 1.0
    if case.normalize:
        return scale
    norms = [
        x.double().norm(dim=-1).amax()
        for x in given.values()
        if x.is_floating_point() and x.numel()
    ]
    return float(max([scale, *(scale * float(a * b) for a, b in itertools.product(norms, norms))]))


def close(
    case: LossCase, what: str, got: Tensor, eager: Tensor, truth: Tensor, slack: float, floor: float
) -> None:
    """The error budget, where float arithmetic of plain torch gives a number at all."""
    assert got.shape == truth.shape, f"{what}: shape {list(got.shape)}, not {list(truth.shape)}"
    got, eager, truth = got.double(), eager.double(), truth.double()
    sane = truth.isfinite() & eager.isfinite()
    if not sane.any():
        return
    assert bool(got[sane].isfinite().all()), f"{what}: NaN or inf where plain torch has a number"
    size = float(truth[sane].abs().max())
    error = float((got - truth)[sane].abs().max())
    limit = float((eager - truth)[sane].abs().max()) + slack * max(size, floor)
    assert error <= limit, f"{what}: error {error:.3e} > {limit:.3e}, largest value {size:.3e}"


def check_loss(case: LossCase, names: Sequence[str] | None = None) -> None:
    """The right number on each of some engines, all of them by default, or the same error."""
    made = tensors(case)
    truth_kind, truth = outcome(
        reference, case, {k: v.double() if v.is_floating_point() else v for k, v in made.items()}
    )
    assert truth_kind == "value", f"the definition raised {truth}"
    _, eager = outcome(reference, case, made)
    found = {}
    for name in names or engines():
        with engine(name):
            found[name] = outcome(sslkernels, case, made)
    kinds = {name: kind for name, (kind, _) in found.items()}
    assert len(set(kinds.values())) == 1, f"not the same outcome everywhere: {found}"
    first = next(iter(found.values()))
    if first[0] == "error":
        assert all(result == first for result in found.values()), f"different errors: {found}"
        raise AssertionError(f"refused: {first[1]}")
    logit = largest_logit(case, made)
    acc_eps = 2**-52 if case.dtype == "float64" else 2**-23
    slack = 24 * acc_eps * (4 + logit)
    ordinary = case.values in ORDINARY and slack < 0.05
    for name, (_, results) in found.items():
        where = f"{case.loss} on {name}"
        loss, *grads = results
        finite = [r[0].isfinite() for r in (truth, eager)]
        if case.values in ("inf", "-inf", "huge") and not case.normalize:
            continue  # logits of infinity have limits, which the definition does not take
        lonely = case.loss == "sup_con" and len(made["labels"].unique()) == case.n
        assert lonely or not bool((loss.isfinite() & ~finite[0] & ~finite[1]).any()), (
            f"{where}: a number where the definition has none"
        )
        if case.values in ("nan", "inf", "-inf"):
            same = torch.equal(loss.isfinite(), first[1][0].isfinite())
            assert same, f"{where}: NaN in other places than on {next(iter(found))}"
            continue
        if not ordinary:
            rough = slack if case.values == "mixed" else max(slack, 1e-4)
            if case.values == "huge" and case.loss in ("triplet semihard", "triplet all"):
                continue  # squares of distances overflow, where the definition has none
            if rough < 0.05:
                close(case, f"{where}, loss", loss, eager[0], truth[0], rough, 1.0 + logit)
            continue
        if (
            case.loss == "triplet all"
        ):  # |x|^2 + |y|^2 - 2 <x, y> in float64: rows nearer than 1e-8 are one
            slack = max(slack, 1e-7)
        if case.loss != "triplet semihard":  # which negative is chosen may depend on a rounding
            # A sum over the rows, which may cancel: 1 - cos is rounded in each.
            terms = max(1.0, case.n) if case.loss == "triplet hard cosine" else 1.0
            close(case, f"{where}, loss", loss, eager[0], truth[0], slack, terms)
        if case.loss.startswith(CHOOSING):
            continue
        for i, (got, e, t) in enumerate(zip(grads, eager[1:], truth[1:], strict=True)):
            if t is None or e is None:
                assert got is None or not bool(got.any()), f"{where}: gradient {i} from nowhere"
                continue
            got = torch.zeros_like(t) if got is None else got
            terms = (1 + logit) / (len(t) if case.reduction == "mean" and len(t) else 1)
            terms *= case.n if case.loss == "siglip" else 1  # which is no mean over its negatives
            grad_slack = slack + 2 * EPS[case.dtype]
            close(case, f"{where}, gradient {i}", got, e, t, grad_slack, terms)


def test_losses(request: pytest.FixtureRequest) -> None:
    line = request.config.getoption("--fuzz-case")
    if line:
        check_loss(LossCase.of(line))
        return
    run(request, loss_cases(list(LOSSES)), check_loss, 120)


# ---- the primitives ------------------------------------------------------------------------------


def _shape(minimum: int = 0) -> st.SearchStrategy[int]:
    return SIZES.filter(lambda n: n >= minimum)


TILES = st.fixed_dictionaries(
    {
        "kind": st.sampled_from(("lse", "softplus")),
        "n": SIZES,
        "m": st.one_of(st.none(), SIZES, st.just(5000)),
        "d": SIZES,
        "double": st.booleans(),
        "scale": st.sampled_from((1.0, -3.0, 0.0, 14.3, 100.0, 1e3)),
        "ids": st.sampled_from((0, 1, 2, 9, 1000)),  # how many classes; 0: no ids
        "far": st.booleans(),
        "col": st.booleans(),
        "seed": SEEDS,
    }
)


def everything(
    backend: Any, case: dict[str, Any], tiles: Tiles, drow: Tensor, dcol: Tensor
) -> dict[str, Any]:
    """What a backend makes of tiles, by name."""
    kind, col = case["kind"], case["col"] and not tiles.is_self
    out = backend.pairwise_forward(kind, tiles, col, Thresholds(drow, dcol if col else None))
    found = {f"forward.{k}": v for k, v in out._asdict().items()}
    rows, columns = RowState(out.row, drow), RowState(out.col, dcol) if col else None
    for want in itertools.product((False, True), repeat=2):
        if want[1] and tiles.is_self:
            continue
        back = backend.pairwise_backward(kind, tiles, rows, columns, Wanted(*want))
        found |= {f"dq {want}": back.dq} if want[0] else {}
        found |= {f"dk {want}": back.dk} if want[1] else {}
        found |= {f"dbias {want}": back.dbias} if tiles.bias is not None else {}
    if kind == "lse" and not tiles.is_self:
        found |= {f"attend.{k}": v for k, v in backend.attend(tiles, drow)._asdict().items()}
    if kind == "lse" and tiles.ids_q is not None:
        near = backend.extremes(tiles._replace(bias=dcol))
        found |= {f"extremes.{k}": v for k, v in near._asdict().items()}
    return found


def check_tiles(case: dict[str, Any]) -> None:
    from sslkernels.backends import cpu

    generator = torch.Generator().manual_seed(case["seed"])
    n, m, d = case["n"], case["m"], case["d"]
    n = min(n, 40) if m == 5000 else n
    dtype = torch.float64 if case["double"] else torch.float32

    def random(*shape: int) -> Tensor:
        x = torch.randn(shape, generator=generator, dtype=torch.float64)
        return (x / max(1, d) ** 0.5 if len(shape) == 2 else x).to(dtype)

    q, k = random(n, d), None if m is None else random(m, d)
    columns = n if m is None else m
    drow, dcol = random(n), random(columns)
    ids_q, ids_k = None, None
    if case["ids"]:
        far = 2**40 + 1 if case["far"] else 1
        ids_q = torch.randint(0, case["ids"], (n,), generator=generator) * far - (far > 1) * 2**62
        ids_k = None
        if m is not None:
            ids_k = (
                torch.randint(0, case["ids"], (m,), generator=generator) * far - (far > 1) * 2**62
            )
    bias = random()[None].sum() if case["kind"] == "softplus" else None
    tiles = Tiles(q, k, torch.tensor(case["scale"], dtype=dtype), bias, ids_q, ids_k)
    wide = Tiles(*(x.double() if x is not None and x.is_floating_point() else x for x in tiles))
    truth = everything(chunked, case, wide, drow.double(), dcol.double())
    logit = 1 + abs(case["scale"]) * 3
    slack = 40 * (2**-52 if case["double"] else 2**-23) * logit * (1 + max(n, columns) / 500)
    found = {}
    for name in engines()[1:]:
        with engine(name):
            found[name] = everything(cpu, case, tiles, drow, dcol)
    with engine("chunked"):
        found["chunked"] = everything(chunked, case, tiles, drow, dcol)
    # -inf, exactly, where nothing is allowed; counts and indices up to what rounding decides.
    s = wide.q @ (wide.q if wide.k is None else wide.k).T * wide.scale
    for name, results in found.items():
        for what, got in results.items():
            want, where = truth[what], f"{what} on {name}"
            assert got.shape == want.shape, f"{where}: {list(got.shape)} for {list(want.shape)}"
            if what.startswith("extremes"):
                assert torch.equal(got < 0, want < 0), f"{where}: a candidate too many or too few"
                if not s.shape[1]:
                    continue
                values = s + dcol.double()
                at, best = (values.gather(1, x.clamp(min=0)[:, None]) for x in (got, want))
                assert bool(((at - best).abs() <= slack * 4).all()), f"{where}: not the extreme"
            elif "rank" in what:
                margin = (s - (dcol.double() if "col" in what else drow.double()[:, None])).abs()
                close_ones = (margin < slack * 4).sum(0 if "col" in what else 1)
                if len(got):
                    assert bool(((got - want).abs() <= close_ones).all()), f"{where}: {got} {want}"
            else:
                assert torch.equal(got == -torch.inf, want == -torch.inf), f"{where}: -inf"
                finite = want.isfinite()
                largest = float(want[finite].abs().max()) if finite.any() else 0.0
                size = max(largest, 1e-3 if what.startswith("d") else 1.0)
                terms = size + (logit * 4 if what.startswith("d") else 0)
                worst = (got.double() - want)[finite].abs()
                assert not worst.numel() or float(worst.max()) <= slack * terms, (
                    f"{where}: error {float(worst.max()):.2e} of {size:.2e}"
                )


def test_tiles(request: pytest.FixtureRequest) -> None:
    run(request, TILES, check_tiles, 40)


# ---- updates ---------------------------------------------------------------------------------------

QUEUES = st.fixed_dictionaries(
    {
        "size": st.one_of(st.integers(1, 9), st.sampled_from((64, 255))),
        "d": _shape(1),
        "n": SIZES,
        "keys": st.sampled_from(list(DTYPES)),
        "queue": st.sampled_from(list(DTYPES)),
        "ptr": st.one_of(st.integers(0, 300), st.integers(-(2**63), 2**63 - 1)),
        "fill": st.one_of(st.integers(0, 300), st.integers(-(2**63), 2**63 - 1)),
        "normalize": st.booleans(),
        "strided": st.booleans(),
        "labels": st.booleans(),
        "seed": SEEDS,
    }
)


def check_queue(case: dict[str, Any], names: Sequence[str] | None = None) -> None:
    generator = torch.Generator().manual_seed(case["seed"])
    size, d, n = case["size"], case["d"], case["n"]
    keys = torch.randn((n, 3 * d if case["strided"] else d), generator=generator)
    keys = keys.to(DTYPES[case["keys"]])[:, :: 3 if case["strided"] else 1]
    before = torch.randn((size, d), generator=generator).to(DTYPES[case["queue"]])
    labels = torch.randint(-(2**62), 2**62, (n,), generator=generator) if case["labels"] else None
    want, at = reference.enqueue(before, case["ptr"] % size, keys, normalize=case["normalize"])
    calls = {"plain torch": updates_torch.enqueue_}
    for name in names or engines():
        calls[name] = torch.ops.sslkernels.queue_enqueue_
    for name, call in calls.items():
        queue, ptr, fill = before.clone(), torch.tensor([case["ptr"]]), torch.tensor([case["fill"]])
        own = torch.full((size,), -1) if case["labels"] else None
        with engine("chunked" if name == "plain torch" else name):
            call(queue, ptr, fill, keys, case["normalize"], own, labels)
        if n == 0:
            assert torch.equal(queue, before), f"{name}: written by no keys"
            continue
        assert int(ptr) == at, f"{name}: pointer {int(ptr)}, not {at}"
        filled = min(size, max(0, case["fill"]) + n)
        assert int(fill) == filled, f"{name}: fill {int(fill)}, not {filled}"
        # The definition normalises in the accumulation dtype of the keys.
        coarse = max(EPS[case["queue"]], 2**-52 if case["keys"] == "float64" else 2**-22)
        torch.testing.assert_close(
            queue.double(),
            want.double(),
            atol=4 * coarse,
            rtol=4 * coarse,
            msg=lambda m: f"{name}: {m}",  # noqa: B023
        )
        if own is not None and labels is not None:
            kept = {(case["ptr"] + i) % size: int(labels[i]) for i in range(n)}
            assert all(int(own[row]) == label for row, label in kept.items()), name


def test_queues(request: pytest.FixtureRequest) -> None:
    run(request, QUEUES, check_queue, 60)


AVERAGES = st.fixed_dictionaries(
    {
        "sizes": st.lists(st.one_of(SIZES, st.sampled_from((4096, 70001))), max_size=5),
        "target": st.sampled_from(list(DTYPES)),
        "source": st.sampled_from(list(DTYPES)),
        "offset": st.integers(0, 3),
        "decay": st.one_of(st.sampled_from((0.0, 1.0, 0.999)), st.floats(0, 1)),
        "large": st.sampled_from((1.0, 1e-40, 1e30, math.inf, math.nan)),
        "seed": SEEDS,
    }
)


def check_average(case: dict[str, Any], names: Sequence[str] | None = None) -> None:
    generator = torch.Generator().manual_seed(case["seed"])

    def some(size: int, dtype: str) -> Tensor:
        x = torch.randn(size + case["offset"], generator=generator, dtype=torch.float64)
        if size:
            x[case["offset"]] *= case["large"]
        return x.to(DTYPES[dtype])[case["offset"] :]

    sources = [some(size, case["source"]) for size in case["sizes"]]
    befores = [some(size, case["target"]) for size in case["sizes"]]
    want = [x.clone() for x in befores]
    reference.ema_update_(want, sources, case["decay"])
    results = []
    for name in names or engines():
        memory = [torch.full((len(x) + 2 + case["offset"],), 7.0, dtype=x.dtype) for x in befores]
        targets = [m[1 + case["offset"] : -1] for m in memory]
        for target, before in zip(targets, befores, strict=True):
            target.copy_(before)
        with engine(name):
            sslkernels.ema_update_(targets, sources, case["decay"])
        for m in memory:
            assert m[case["offset"]] == 7 and m[-1] == 7, f"{name}: written outside"
        wide = "float64" in (case["target"], case["source"])
        eps = max(EPS[case["target"]], 2**-52 if wide else 2**-23)
        for got, truth, *terms in zip(targets, want, befores, sources, strict=True):
            got, truth, before, source = (x.double() for x in (got, truth, *terms))
            finite = truth.isfinite()
            assert torch.equal(got[~finite].nan_to_num(), truth[~finite].nan_to_num()), name
            # Absolute too, and a share of the terms, which may cancel.
            terms = case["decay"] * before.abs() + (1 - case["decay"]) * source.abs()
            slack = eps * (16 + 4 * terms)
            assert bool(((got - truth).abs() <= slack)[finite].all()), f"{name}: {got} {truth}"
        results.append([t.clone() for t in targets])
    for other in results[2:]:  # the instruction sets: bit for bit
        for a, b in zip(other, results[1], strict=True):
            assert torch.equal(a.nan_to_num(), b.nan_to_num())


def test_averages(request: pytest.FixtureRequest) -> None:
    run(request, AVERAGES, check_average, 40)


# ---- noise -----------------------------------------------------------------------------------------

NOISE = st.fixed_dictionaries(
    {
        "n": st.one_of(st.integers(0, 9), st.integers(0, 70)),
        "d": st.integers(0, 9),
        "mean": st.sampled_from(list(DTYPES)),
        "variance": st.sampled_from(list(DTYPES)),
        "layouts": st.tuples(*[st.sampled_from(LAYOUTS)] * 2),
        "spread": st.sampled_from((0.0, 1.0, 9.0)),
        "number": st.one_of(st.integers(-(2**63), 2**64 - 1), st.sampled_from((0, -1, 2**32))),
        "seed": SEEDS,
    }
)


def check_noise(case: dict[str, Any], names: Sequence[str] | None = None) -> None:
    """The definition by Philox in Python's integers: value, and gradients by the chain rule."""
    generator = torch.Generator().manual_seed(case["seed"])
    given = []
    for dtype, layout, factor in zip(
        ("mean", "variance"), case["layouts"], (1.0, case["spread"]), strict=True
    ):
        x = factor * torch.randn(case["n"], case["d"], generator=generator)
        given.append(laid_out(x.to(DTYPES[case[dtype]]), layout))
    mean, variance = (x.double() for x in given)
    noise = reference.normal_noise(mean.numel(), case["number"] % 2**64).view(mean.shape)
    moved = (variance / 2).exp() * noise
    wide = "float64" in (case["mean"], case["variance"])
    for name in names or engines():
        leaves = [x.detach().requires_grad_() for x in given]
        with engine(name):
            z = sslkernels.reparameterize(*leaves, case["number"])
            dz = torch.randn(z.shape, generator=generator.manual_seed(1)).to(z.dtype)
            grads = torch.autograd.grad(z, leaves, dz)
        wanted = (mean + moved, dz.double(), dz.double() * moved / 2)
        for what, got, want in zip(("z", "dmean", "dvariance"), (z, *grads), wanted, strict=True):
            assert got.shape == want.shape
            kind = torch.finfo(got.dtype)
            # Where a uniform number is near 1, its logarithm is a rounding of it: absolute, too.
            slack = (1e-13 if wide else 3e-5) * (1 + (variance / 2).exp())
            slack += kind.eps * (want.abs() + kind.smallest_normal)
            fits = want.to(got.dtype).isfinite()
            assert bool(((got.double() - want).abs() <= slack)[fits].all()), f"{what} on {name}"


def test_noise(request: pytest.FixtureRequest) -> None:
    run(request, NOISE, check_noise, 40)


# ---- what is refused -------------------------------------------------------------------------------

WRONG: dict[str, Callable[[Tensor], Any]] = {
    "None": lambda x: None,
    "a list": lambda x: x.tolist(),
    "a number": lambda x: 3.0,
    "text": lambda x: "x",
    "integers": lambda x: x.long(),
    "bool": lambda x: x > 0,
    "complex": lambda x: x * 1j,
    "8 bits": lambda x: x.to(torch.float8_e4m3fn),
    "one dimension": lambda x: x[0],
    "three dimensions": lambda x: x[None],
    "another length": lambda x: x[:-1],
    "another width": lambda x: x[:, :-1],
    "another device": lambda x: x.to("meta"),
}
ARGUMENTS = {
    "nt_xent_loss": ("z1", "z2"),
    "info_nce_loss": ("query", "positive_key", "negative_keys"),
    "clip_loss": ("image_features", "text_features"),
    "siglip_loss": ("image_features", "text_features"),
    "sup_con_loss": ("z", "labels"),
    "dcl_loss": ("z1", "z2"),
    "byol_loss": ("prediction", "target"),
    "simsiam_loss": ("prediction_1", "z_2", "prediction_2", "z_1"),
    "triplet_loss": ("z", "labels"),
    "margin_loss": ("z_i", "z_j", "z_k", "z_l"),
    "contrastive_loss": ("a", "b", "same"),
    "alignment_loss": ("z1", "z2"),
    "uniformity_loss": ("z",),
}
NUMBERS = {
    "temperature": (0, -1.0, math.nan, "0.1", None, torch.ones(2), 1j, [0.1]),
    "logit_scale": ("1", None, torch.ones(2), 1j),
    "logit_bias": ("1", torch.ones(2), 1j),
    "sigma": (0.0, -1.0, math.nan, "1"),
    "margin": ("1", None, torch.ones(3)),
    "reduction": ("avg", None, 3),
    "normalize": (None, "yes", 2),
    "mining": ("soft", None),
    "distance": ("manhattan", None),
    "negative_mode": ("mixed", None),
    "t": ("2", None),
    "alpha": ("2", None),
}
# Wrong of one argument and right of another: one view may be a sequence, one bank may be left out.
ALLOWED = {
    ("nt_xent_loss", "z1", "three dimensions"),
    ("info_nce_loss", "negative_keys", "None"),
    ("sup_con_loss", "z", "three dimensions"),
    ("info_nce_loss", "negative_keys", "another length"),
    ("sup_con_loss", "labels", "integers"),
    ("triplet_loss", "labels", "integers"),
    ("contrastive_loss", "same", "integers"),
    ("contrastive_loss", "same", "bool"),
    ("uniformity_loss", "z", "another length"),
    ("uniformity_loss", "z", "another width"),
    ("sup_con_loss", "z", "another width"),
    ("triplet_loss", "z", "another width"),
    ("uniformity_loss", "z", "another device"),
}


def refused(name: str, arguments: dict[str, Any]) -> dict[str, str]:
    """What each engine answers; fails where one accepts, or its message does not name the op."""
    said = {}
    for each in engines()[:2]:
        with engine(each), pytest.raises((TypeError, ValueError)) as raised:
            getattr(sslkernels, name)(**arguments)
        said[each] = f"{type(raised.value).__name__}: {raised.value}"
        assert str(raised.value).startswith(f"{name}: "), said[each]
        assert "\n" not in str(raised.value), said[each]
    return said


def right(name: str) -> dict[str, Any]:
    """Arguments that are accepted."""
    made = {a: torch.randn(6, 5) for a in ARGUMENTS[name]}
    for a in ("labels", "same"):
        if a in made:
            made[a] = torch.arange(6) % 2
    return (
        made
        | ({"logit_scale": 1.0} if name in ("clip_loss", "siglip_loss") else {})
        | ({"logit_bias": 0.0} if name == "siglip_loss" else {})
    )


@pytest.mark.parametrize("name", ARGUMENTS)
def test_wrong_arguments_have_the_same_error_everywhere(name: str) -> None:
    import inspect

    getattr(sslkernels, name)(**right(name))
    for argument, (kind, change) in itertools.product(ARGUMENTS[name], WRONG.items()):
        if (name, argument, kind) in ALLOWED or argument in ("labels", "same") and "dim" in kind:
            continue
        if argument in ("labels", "same") and kind == "another width":
            continue
        given = right(name)
        given[argument] = change(given[argument])
        if kind == "8 bits" and argument in ("labels", "same"):
            continue
        said = refused(name, given)
        assert len(set(said.values())) == 1, f"{name} {argument} {kind}: {said}"
    known = inspect.signature(getattr(sslkernels, name)).parameters
    for option, wrong in NUMBERS.items():
        for value in wrong if option in known else ():
            refused(name, {**right(name), option: value})
    with pytest.raises(TypeError):
        getattr(sslkernels, name)(**right(name), unheard_of=json)
