# SPDX-License-Identifier: Apache-2.0
"""Every loss against its plain twin: values, gradients, hostile inputs, messages, determinism."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from helpers import check_budget, check_loss, engine, engines, poisoned, threads
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import sslkernels as ssl
from sslkernels import reference
from sslkernels.backends import chunked

# (N, D): one and two samples, neighbours of lane and block sizes, D that is no power of two.
SIZES = [(1, 8), (2, 1), (3, 24), (63, 100), (64, 128), (65, 129), (127, 8), (130, 32), (5, 768)]
TEMPERATURES = [0.01, 0.05, 0.07, 0.1, 0.2, 0.5, 1.0]
HALVES = [torch.bfloat16, torch.float16]


@pytest.fixture(params=engines())
def on_engine(request):
    """Run the test on each backend and instruction set."""
    with engine(request.param):
        yield request.param


def views(n: int, d: int, count: int = 2, noise: float = 0.5) -> list[Tensor]:
    """Noisy views of the same samples: positives that can be found, but not trivially."""
    generator = torch.Generator().manual_seed(1000 * n + d)
    base = torch.randn(n, d, generator=generator)
    return [base + noise * torch.randn(n, d, generator=generator) for _ in range(count)]


def labels_for(n: int) -> Tensor:
    """Classes of several sizes, among them one with a single member when n allows it."""
    labels = torch.arange(n) % max(1, min(7, n // 3))
    if n > 5:
        labels[-1] = 99
    return labels


class Case:
    """A loss as a function of its differentiable inputs, ours and the reference's."""

    def __init__(self, name: str, make: Callable[[int, int], list[Tensor]], **keywords) -> None:
        self.name, self.make, self.keywords = name, make, keywords

    def call(self, module, inputs: list[Tensor], **more) -> Tensor:
        """Evaluate ``module``'s function of that name."""
        return self.run(getattr(module, self.name.split(" ")[0]), inputs, {**self.keywords, **more})

    def run(self, function: Callable, inputs: list[Tensor], keywords: dict) -> Tensor:
        """Put tensors and keywords where the function wants them."""
        return function(*inputs, **keywords)


class Views(Case):
    """Three views in a list, and a temperature."""

    def run(self, function, inputs, keywords):
        return function(list(inputs[:3]), temperature=inputs[3], **keywords)


class Labelled(Case):
    """z with labels."""

    def run(self, function, inputs, keywords):
        return function(inputs[0], labels_for(len(inputs[0])), *inputs[1:], **keywords)


class Pairs(Case):
    """Pairs, every third of the same class."""

    def run(self, function, inputs, keywords):
        return function(*inputs, torch.arange(len(inputs[0])) % 3 == 0, **keywords)


class Queue(Case):
    """InfoNCE with ids of false negatives."""

    def run(self, function, inputs, keywords):
        if keywords.pop("ids", False):
            n, m = len(inputs[0]), inputs[2].shape[:-1] if len(inputs) > 3 else (len(inputs[0]),)
            keywords["query_ids"] = torch.arange(n) % 5
            if len(inputs) > 3:
                keywords["negative_ids"] = (torch.arange(math.prod(m)) % 7).view(m)
        if len(inputs) == 3:
            return function(*inputs[:2], None, inputs[2], **keywords)
        return function(*inputs, **keywords)


class OneArgument(Case):
    """Only the first input."""

    def run(self, function, inputs, keywords):
        return function(inputs[0], **keywords)


def t(value: float = 0.2) -> Tensor:
    return torch.tensor(value)


def two(n: int, d: int) -> list[Tensor]:
    return [*views(n, d), t()]


def unit_pair(n: int, d: int) -> list[Tensor]:
    return [nn.functional.normalize(v, dim=1) for v in views(n, d)]


def negatives(n: int, d: int) -> Tensor:
    return torch.randn(2 * n + 3, d, generator=torch.Generator().manual_seed(n))


CASES = [
    Case("nt_xent_loss", two),
    Case("nt_xent_loss none", two, reduction="none"),
    Case("nt_xent_loss raw", lambda n, d: [*unit_pair(n, d), t(0.1)], normalize=False),
    Views("nt_xent_loss views", lambda n, d: [*views(n, d, 3), t()]),
    Views("nt_xent_loss views none", lambda n, d: [*views(n, d, 3), t()], reduction="none"),
    Queue("info_nce_loss batch", two),
    Queue("info_nce_loss batch ids", two, ids=True, reduction="sum"),
    Queue("info_nce_loss queue", lambda n, d: [*views(n, d), negatives(n, d), t()]),
    Queue(
        "info_nce_loss queue ids",
        lambda n, d: [*views(n, d), negatives(n, d), t()],
        ids=True,
        reduction="none",
    ),
    Queue(
        "info_nce_loss paired",
        lambda n, d: [*views(n, d), negatives(4 * n, d)[: 6 * n].view(n, 6, d), t()],
        negative_mode="paired",
        ids=True,
    ),
    Case("clip_loss", lambda n, d: [*unit_pair(n, d), t(10.0)]),
    Case("clip_loss none", lambda n, d: [*views(n, d), t(10.0)], normalize=True, reduction="none"),
    Case("siglip_loss", lambda n, d: [*unit_pair(n, d), t(10.0), t(-10.0)]),
    Case(
        "siglip_loss none",
        lambda n, d: [*views(n, d), t(5.0), t(-1.0)],
        normalize=True,
        reduction="none",
    ),
    Labelled("sup_con_loss", lambda n, d: [views(n, d)[0], t(0.1)]),
    Labelled("sup_con_loss none", lambda n, d: [views(n, d)[0], t()], reduction="none"),
    Labelled("sup_con_loss views", lambda n, d: [torch.stack(views(n, d, 3), 1), t()]),
    Case("dcl_loss", two),
    Case("dcl_loss weighted", two, sigma=0.5, reduction="none"),
    Case("byol_loss", lambda n, d: views(n, d)),
    Case("byol_loss none", lambda n, d: views(n, d), reduction="none"),
    Case("byol_loss_symmetric", lambda n, d: views(n, d, 4)),
    Case("simsiam_loss", lambda n, d: views(n, d, 4)),
    Labelled("triplet_loss hard", lambda n, d: views(n, d)[:1], margin=0.5),
    Labelled("triplet_loss hard cosine", lambda n, d: views(n, d)[:1], distance="cosine"),
    Labelled(
        "triplet_loss hard normalized",
        lambda n, d: views(n, d)[:1],
        normalize=True,
        reduction="mean_nonzero",
    ),
    Labelled("triplet_loss semihard", lambda n, d: views(n, d)[:1], mining="semihard"),
    Labelled(
        "triplet_loss semihard cosine",
        lambda n, d: views(n, d)[:1],
        mining="semihard",
        distance="cosine",
        reduction="mean_nonzero",
    ),
    Labelled("triplet_loss all", lambda n, d: views(n, d)[:1], mining="all", margin=0.4),
    Labelled(
        "triplet_loss all cosine",
        lambda n, d: views(n, d)[:1],
        mining="all",
        distance="cosine",
        reduction="mean_nonzero",
    ),
    Case("margin_loss", lambda n, d: views(n, d, 4), margin=0.3),
    Case("margin_loss floor", lambda n, d: views(n, d, 4), margin=-0.5, form="floor", eps=0.1),
    Pairs("contrastive_loss", lambda n, d: [v / d**0.5 for v in views(n, d)]),
    Pairs(
        "contrastive_loss none",
        lambda n, d: [v / d**0.5 for v in views(n, d)],
        reduction="none",
        margin=2.0,
    ),
    Case("alignment_loss", lambda n, d: views(n, d)),
    Case(
        "alignment_loss cubed",
        lambda n, d: views(n, d),
        alpha=3.0,
        normalize=False,
        reduction="none",
    ),
    OneArgument("uniformity_loss", lambda n, d: views(n, d)[:1]),
    OneArgument(
        "uniformity_loss raw", lambda n, d: [views(n, d)[0] / d**0.5], normalize=False, t=0.7
    ),
]
# On the tile engine: these run on every instruction set, the others do not depend on it.
ON_TILES = [
    c
    for c in CASES
    if c.name.split("_")[0] in ("nt", "info", "clip", "siglip", "sup", "dcl", "uniformity")
] + [CASES[23], CASES[24]]
EVERY = pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)


@pytest.mark.parametrize("size", SIZES, ids=str)
@EVERY
def test_against_float64_truth(case: Case, size) -> None:
    """Loss and all gradients in float32, within the error budget."""
    inputs = case.make(*size)
    loss = case.call(ssl, inputs)
    check_loss(
        lambda *x: case.call(ssl, list(x)),
        lambda *x: case.call(reference, list(x)),
        inputs,
        slack=5e-6,
        name=f"{case.name} {size}",
        dloss=torch.linspace(0.5, 1.5, loss.numel()).view(loss.shape),
    )


@EVERY
def test_in_many_small_blocks(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of a few rows: what is carried from block to block, and which diagonal is whose."""
    monkeypatch.setattr(chunked, "MIN_BLOCK", 512)
    monkeypatch.setattr(chunked, "MAX_BLOCK", 512)
    with ssl.backend("chunked"):
        check_loss(
            lambda *x: case.call(ssl, list(x)).sum(),
            lambda *x: case.call(reference, list(x)).sum(),
            case.make(65, 24),
            slack=5e-6,
            name=case.name,
        )


@pytest.mark.parametrize("case", ON_TILES, ids=lambda c: c.name)
def test_on_every_engine(on_engine: str, case: Case) -> None:
    """The losses that use the tiles, on each backend and instruction set."""
    for size in ((3, 24), (65, 129)):
        inputs = case.make(*size)
        loss = case.call(ssl, inputs)
        check_loss(
            lambda *x: case.call(ssl, list(x)),
            lambda *x: case.call(reference, list(x)),
            inputs,
            slack=5e-6,
            name=f"{on_engine} {case.name} {size}",
            dloss=torch.linspace(0.5, 1.5, loss.numel()).view(loss.shape),
        )


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@EVERY
def test_halves(case: Case, dtype: torch.dtype) -> None:
    """Half inputs: a float32 loss, accumulated in float32, and gradients of the input dtype."""
    inputs = [x.to(dtype) if x.ndim else x for x in case.make(33, 40)]
    loss = case.call(ssl, inputs)
    assert loss.dtype == torch.float32
    check_loss(
        lambda *x: case.call(ssl, list(x)),
        lambda *x: case.call(reference, list(x)),
        inputs,
        name=f"{case.name} {dtype}",
        dloss=torch.linspace(0.5, 1.5, loss.numel()).view(loss.shape),
    )


@EVERY
def test_gradcheck(case: Case) -> None:
    """Against finite differences in float64."""
    inputs = [x.double().requires_grad_() for x in case.make(6, 4)]
    if case.name.startswith(("byol", "simsiam")):
        count = 1 if case.name.startswith("byol_loss") and len(inputs) == 2 else 2
        fixed = {i for i in range(len(inputs)) if i not in ((0,) if count == 1 else (0, 2))}
        inputs = [x.detach() if i in fixed else x for i, x in enumerate(inputs)]
    if case.keywords.get("sigma"):  # the weights of DCLW carry no gradient on purpose
        inputs = [*(x.detach() for x in inputs[:2]), inputs[2]]
    assert torch.autograd.gradcheck(lambda *x: case.call(ssl, list(x)), inputs)


@EVERY
def test_same_bits_for_any_number_of_threads(case: Case) -> None:
    """More than one block of rows and more than one thread's share."""
    inputs = [x.requires_grad_() for x in case.make(700, 16)]

    def run() -> list[Tensor]:
        loss = case.call(ssl, inputs)
        wanted = [x for x in inputs if x.requires_grad]
        grads = torch.autograd.grad(loss.sum(), wanted, allow_unused=True)
        return [loss, *(g for g in grads if g is not None)]

    with threads(1):
        one = run()
    with threads(2):
        for a, b in zip(run(), one, strict=True):
            assert torch.equal(a, b), case.name


class LargestTensor(TorchDispatchMode):
    """Remembers the largest tensor that any op of torch returned."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, Tensor):
                self.numel = max(self.numel, x.numel())
        return out


@EVERY
def test_nothing_of_n_by_n_between_the_ops(case: Case) -> None:
    """No op in forward or backward returns, and autograd keeps, nothing that grows as N * N."""
    n, d = 1500, 4
    leaves = [x.requires_grad_() for x in case.make(n, d)]
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with LargestTensor() as largest, torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        case.call(ssl, leaves).sum().backward()
    assert largest.numel <= 12 * n * d, f"{case.name}: {largest.numel} elements"
    assert sum(kept.values()) <= 40 * n * d * 4, f"{case.name}: {sum(kept.values())} bytes"


@EVERY
def test_strided_and_poisoned_inputs(case: Case) -> None:
    """Rows in the middle of NaN: the same result as contiguous inputs."""
    inputs = case.make(37, 20)
    hostile = [poisoned(x) if x.ndim == 2 else x for x in inputs]
    torch.testing.assert_close(
        case.call(ssl, hostile), case.call(ssl, inputs), atol=1e-6, rtol=1e-6
    )


@EVERY
def test_degenerate_inputs_stay_finite(case: Case) -> None:
    """Zero rows, all-equal rows, opposite rows, one row, none: finite losses and gradients."""
    n, d = 6, 8
    shapes = case.make(n, d)
    equal, zero = torch.ones(d), torch.zeros(d)

    def filled(row: Tensor, flip: bool = False) -> list[Tensor]:
        out = []
        for i, x in enumerate(shapes):
            sign = -1.0 if flip and i % 2 else 1.0
            out.append(x if x.ndim == 0 else (sign * row).expand(x.shape).clone())
        return out

    cases = {
        "equal": filled(equal),
        "zero": filled(zero),
        "opposite": filled(equal, flip=True),
        "one": case.make(1, d),
        "none": [x[:0] if x.ndim else x for x in shapes],
    }
    for name, inputs in cases.items():
        leaves = [x.detach().clone().requires_grad_() for x in inputs]
        loss = case.call(ssl, leaves)
        assert bool(loss.isfinite().all()), f"{case.name} {name}: {loss}"
        grads = torch.autograd.grad(loss.sum(), leaves, allow_unused=True)
        for i, grad in enumerate(grads):
            assert grad is None or bool(grad.isfinite().all()), f"{case.name} {name} gradient {i}"


@EVERY
def test_nan_input_gives_nan(case: Case) -> None:
    """Never a wrong number."""
    inputs = case.make(6, 8)
    inputs[0] = inputs[0].clone()
    inputs[0].view(-1)[0] = torch.nan
    loss = case.call(ssl, inputs)
    assert bool(loss.isnan().any()), case.name


@EVERY
def test_compile_fullgraph(case: Case) -> None:
    """Inside a model, forward and backward, without a graph break."""
    inputs = case.make(6, 8)
    weight = torch.eye(8).mul_(1.5).requires_grad_()

    def model(*x: Tensor) -> Tensor:
        return case.call(ssl, [y @ weight if y.ndim else y for y in x]).sum()

    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    (expected,) = torch.autograd.grad(model(*inputs), weight)
    (got,) = torch.autograd.grad(compiled(*inputs), weight)
    torch.testing.assert_close(got, expected)


@EVERY
def test_autocast_gives_float32(case: Case) -> None:
    """Like cross_entropy: the loss of float32 features does not change under autocast."""
    inputs = case.make(12, 16)
    expected = case.call(ssl, inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = case.call(ssl, inputs)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-6)


# ------------------------------------------------------------------------ temperatures, extremes


@pytest.mark.parametrize("temperature", [1e-3, *TEMPERATURES, 10.0])
@pytest.mark.parametrize("noise", [0.0, 0.01, 0.5], ids=lambda x: f"noise {x}")
def test_temperatures(on_engine: str, temperature: float, noise: float) -> None:
    """NT-Xent, InfoNCE, CLIP, SupCon and DCL over temperatures, aligned views included."""
    z1, z2 = views(65, 32, noise=noise)
    queue = negatives(65, 32)
    for name, ours, truth in (
        (
            "nt_xent_loss",
            lambda a, b: ssl.nt_xent_loss(a, b, temperature),
            lambda a, b: reference.nt_xent_loss(a, b, temperature),
        ),
        (
            "info_nce_loss",
            lambda a, b: ssl.info_nce_loss(a, b, queue, temperature),
            lambda a, b: reference.info_nce_loss(a, b, queue.to(a.dtype), temperature),
        ),
        (
            "clip_loss",
            lambda a, b: ssl.clip_loss(a, b, 1 / temperature, normalize=True),
            lambda a, b: reference.clip_loss(a, b, 1 / temperature, normalize=True),
        ),
        (
            "dcl_loss",
            lambda a, b: ssl.dcl_loss(a, b, temperature),
            lambda a, b: reference.dcl_loss(a, b, temperature),
        ),
    ):
        # The rounding of a logit of 1 / T moves exp by eps / T.
        slack = 5e-6 + 2e-7 / temperature
        check_loss(ours, truth, [z1, z2], slack=slack, name=f"{on_engine} {name} T={temperature}")


def test_aligned_views_keep_their_gradient(on_engine: str) -> None:
    """Close views at T = 0.02, where the softmax of eager float32 rounds to 1."""
    z, noisy = views(256, 128, noise=0.2)

    def gradient(function: Callable, a: Tensor, b: Tensor) -> Tensor:
        a = a.clone().requires_grad_()
        return torch.autograd.grad(function(a, b, 0.02), a)[0].double()

    truth = gradient(reference.nt_xent_loss, z.double(), noisy.double())
    error = (gradient(ssl.nt_xent_loss, z, noisy) - truth).norm() / truth.norm()
    eager = (gradient(reference.nt_xent_loss, z, noisy) - truth).norm() / truth.norm()
    assert error < 1e-3 and eager > 0.1, f"{on_engine}: ours {error:.1e}, eager {eager:.1e}"


def test_opposite_positives_at_low_temperature(on_engine: str) -> None:
    """z2 = -z1 at T = 0.01: losses of about 200, whose gradient others lose."""
    z = views(64, 32)[0]
    check_loss(
        lambda a, b: ssl.nt_xent_loss(a, b, 0.01),
        lambda a, b: reference.nt_xent_loss(a, b, 0.01),
        [z, -z],
        slack=2e-5,
        name=f"{on_engine} opposite",
    )
    assert ssl.nt_xent_loss(z, -z, 0.01) > 100


@pytest.mark.parametrize("scale", [1e4, -1e4])
def test_logits_to_1e4(on_engine: str, scale: float) -> None:
    """CLIP and SigLIP with logits of +-1e4."""
    x, y = unit_pair(65, 16)
    check_loss(
        lambda a, b: ssl.clip_loss(a, b, scale),
        lambda a, b: reference.clip_loss(a, b, scale),
        [x, y],
        slack=2e-3,
        name=f"{on_engine} clip {scale}",
    )
    check_loss(
        lambda a, b: ssl.siglip_loss(a, b, scale, -10.0),
        lambda a, b: reference.siglip_loss(a, b, scale, -10.0),
        [x, y],
        slack=2e-3,
        name=f"{on_engine} siglip {scale}",
    )


# ----------------------------------------------------------------------------------- conventions


def test_single_sample_and_no_rows() -> None:
    """N = 1 has no negatives; no rows at all have the mean 0."""
    one, empty = torch.randn(1, 4), torch.randn(0, 4)
    assert ssl.nt_xent_loss(one, one) == 0
    assert ssl.info_nce_loss(one, one, temperature=0.3) == 0
    assert ssl.info_nce_loss(one, one, torch.randn(0, 4)) == 0  # an empty queue
    assert ssl.clip_loss(one, one, 3.0) == 0
    assert ssl.uniformity_loss(one) == 0
    torch.testing.assert_close(ssl.dcl_loss(one, one, 0.5), torch.tensor(-2.0))
    for function in (
        ssl.nt_xent_loss,
        ssl.info_nce_loss,
        ssl.dcl_loss,
        ssl.byol_loss,
        ssl.alignment_loss,
    ):
        assert function(empty, empty) == 0
        if function is not ssl.byol_loss:
            assert function(empty, empty, reduction="none").numel() == 0


def test_sup_con_rows_without_positives_are_left_out() -> None:
    """Their loss is 0, and the mean counts the others only."""
    z = torch.randn(5, 4)
    labels = torch.tensor([3, 3, 7, -1, 3])
    rows = ssl.sup_con_loss(z, labels, reduction="none")
    assert rows[2] == 0 and rows[3] == 0 and bool((rows[[0, 1, 4]] > 0).all())
    torch.testing.assert_close(ssl.sup_con_loss(z, labels), rows[[0, 1, 4]].mean())
    assert ssl.sup_con_loss(z, torch.arange(5)) == 0


def test_sup_con_of_two_views_is_nt_xent() -> None:
    """Unique labels, two views: the same formula."""
    z1, z2 = views(20, 8)
    expected = ssl.nt_xent_loss(z1, z2, 0.3)
    torch.testing.assert_close(
        ssl.sup_con_loss(torch.stack((z1, z2), 1), torch.arange(20), 0.3), expected
    )
    both = ssl.sup_con_loss(torch.cat((z1, z2)), torch.arange(20).repeat(2), 0.3)
    torch.testing.assert_close(both, expected)


def test_reductions_agree() -> None:
    """mean = none.mean() and sum = none.sum(), for every loss that has them."""
    for case in CASES:
        if case.name.startswith(("triplet", "uniformity", "sup_con")):
            continue
        inputs = case.make(9, 6)
        rows = case.call(ssl, inputs, reduction="none")
        assert rows.ndim == 1
        torch.testing.assert_close(case.call(ssl, inputs, reduction="mean"), rows.mean())
        torch.testing.assert_close(case.call(ssl, inputs, reduction="sum"), rows.sum())


def test_row_order_of_nt_xent() -> None:
    """Reduction "none" gives [2N] in the order of cat(z1, z2)."""
    z1, z2 = views(7, 5)
    rows = ssl.nt_xent_loss(z1, z2, reduction="none")
    swapped = ssl.nt_xent_loss(z2, z1, reduction="none")
    torch.testing.assert_close(rows, swapped.roll(7))
    assert not torch.allclose(rows[:7], rows[7:])


@pytest.mark.parametrize("backend", ["chunked", None])
def test_metrics_agree_with_the_reference(backend: str | None) -> None:
    """return_metrics of every loss that has it, ids of false negatives included."""
    z1, z2, z3 = views(40, 12, 3, noise=1.5)
    queue, ids = negatives(40, 12), torch.arange(40) % 11
    paired = torch.randn(40, 9, 12)
    calls = [
        ("nt_xent_loss", (z1, z2, 0.2), {}),
        ("nt_xent_loss", ([z1, z2, z3], None, 0.2), {}),
        ("nt_xent_loss", (z1, z2, 0.2), {"normalize": False}),
        ("info_nce_loss", (z1, z2), {}),
        ("info_nce_loss", (z1, z2), {"query_ids": ids}),
        ("info_nce_loss", (z1, z2, queue), {}),
        (
            "info_nce_loss",
            (z1, z2, queue),
            {"query_ids": ids, "negative_ids": torch.arange(83) % 13},
        ),
        ("info_nce_loss", (z1, z2, paired), {"negative_mode": "paired"}),
        (
            "info_nce_loss",
            (z1, z2, paired),
            {
                "negative_mode": "paired",
                "query_ids": ids,
                "negative_ids": torch.arange(360).view(40, 9) % 11,
            },
        ),
        ("clip_loss", (z1, z2, 5.0), {"normalize": True}),
    ]
    with ssl.backend(backend):
        for name, arguments, keywords in calls:
            loss, got = getattr(ssl, name)(*arguments, return_metrics=True, **keywords)
            truth, expected = getattr(reference, name)(*arguments, return_metrics=True, **keywords)
            torch.testing.assert_close(loss, truth)
            assert 0 < expected.top1 < 1, "the metric must be able to be wrong"
            assert isinstance(got, ssl.ContrastiveMetrics)
            for field, a, b in zip(got._fields, got, expected, strict=True):
                assert a.ndim == 0 and not a.requires_grad
                torch.testing.assert_close(
                    a, b, atol=1e-5, rtol=1e-5, msg=f"{name} {field}: {a} {b}"
                )


def test_learnable_scalars_get_gradients_in_modules() -> None:
    """An nn.Parameter as temperature is a parameter of the module."""
    loss = ssl.NTXentLoss(nn.Parameter(torch.tensor(0.3)))
    assert [name for name, _ in loss.named_parameters()] == ["temperature"]
    loss(*views(8, 4)).backward()
    assert loss.temperature.grad is not None and loss.temperature.grad.abs() > 0


def test_modules_are_the_functions() -> None:
    """Each module gives what its function gives, with the arguments it was made with."""
    z1, z2, z3, z4 = views(12, 6, 4)
    labels, same = torch.arange(12) % 4, torch.arange(12) % 2 == 0
    for module, function, arguments in (
        (
            ssl.NTXentLoss(0.3, normalize=False),
            ssl.nt_xent_loss(z1, z2, 0.3, normalize=False),
            (z1, z2),
        ),
        (ssl.NTXentLoss(0.3), ssl.nt_xent_loss([z1, z2, z3], temperature=0.3), ([z1, z2, z3],)),
        (ssl.InfoNCELoss(0.3, "sum"), ssl.info_nce_loss(z1, z2, z3, 0.3, "sum"), (z1, z2, z3)),
        (ssl.CLIPLoss(normalize=True), ssl.clip_loss(z1, z2, 2.0, normalize=True), (z1, z2, 2.0)),
        (ssl.SigLIPLoss(), ssl.siglip_loss(z1, z2, 0.2, -1.0), (z1, z2, 0.2, -1.0)),
        (ssl.SupConLoss(0.3), ssl.sup_con_loss(z1, labels, 0.3), (z1, labels)),
        (ssl.DCLLoss(0.3, sigma=0.4), ssl.dcl_loss(z1, z2, 0.3, sigma=0.4), (z1, z2)),
        (ssl.BYOLLoss(reduction="sum"), ssl.byol_loss(z1, z2, reduction="sum"), (z1, z2)),
        (ssl.SimSiamLoss(), ssl.simsiam_loss(z1, z2, z3, z4), (z1, z2, z3, z4)),
        (
            ssl.TripletLoss(0.4, mining="all"),
            ssl.triplet_loss(z1, labels, 0.4, mining="all"),
            (z1, labels),
        ),
        (ssl.ContrastiveLoss(3.0), ssl.contrastive_loss(z1, z2, same, 3.0), (z1, z2, same)),
    ):
        assert torch.equal(module(*arguments), function), type(module).__name__
        assert "=" in repr(module)


def test_moco_loss_contrasts_before_it_enqueues() -> None:
    """The queue of the loss is that before the batch; evaluation enqueues nothing."""
    loss = ssl.MoCoLoss(queue_size=24, dim=6, temperature=0.2)
    assert loss(*views(8, 6)) == 0  # an empty queue has no negatives
    query, key = views(9, 6)
    before = loss.queue.keys.clone()
    expected = ssl.info_nce_loss(query, key, before, 0.2)
    torch.testing.assert_close(loss(query, key), expected)
    assert len(loss.queue) == 17
    loss.eval()
    loss(query, key)
    assert len(loss.queue) == 17


def test_moco_gradient_survives_the_enqueue() -> None:
    """A full queue is overwritten between forward and backward."""
    query, key = views(10, 6)
    loss = ssl.MoCoLoss(queue_size=10, dim=6, temperature=0.2)
    loss(*views(10, 6, noise=2.0))
    bank = loss.queue.keys.clone()
    leaf = query.clone().requires_grad_()
    value = loss(leaf, key)  # enqueues over every row of the bank
    assert not torch.allclose(loss.queue.keys, bank)
    (got,) = torch.autograd.grad(value, leaf)
    leaf = query.clone().requires_grad_()
    (expected,) = torch.autograd.grad(reference.info_nce_loss(leaf, key, bank, 0.2), leaf)
    check_budget(got, expected, expected, 1e-5, "dquery")


@pytest.mark.parametrize("form", ["relative", "floor"])
def test_margin_loss_moves_the_pair_it_says(form: str) -> None:
    """Form "relative" pulls (i, j) together, (k, l) apart; "floor" lowers the larger term."""
    z_i, z_j = torch.tensor([[0.0, 0.0]]), torch.tensor([[1.0, 0.0]])
    z_k, z_l = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 2.0]])
    leaves = [x.requires_grad_() for x in (z_i, z_j, z_k, z_l)]
    loss = ssl.margin_loss(*leaves, margin=1.5, form=form)
    grads = torch.autograd.grad(loss, leaves)
    if form == "relative":
        assert loss == 0.5 and grads[1][0, 0] == 1 and grads[3][0, 1] == -1
    else:
        assert loss == 2.0 and not bool(grads[1].any()) and grads[3][0, 1] == 1


# ----------------------------------------------------------------------------------------- errors

GOOD = torch.ones(8, 4)
LABELS = torch.zeros(8, dtype=torch.int64)
ERRORS = [
    (
        lambda: ssl.nt_xent_loss(torch.ones(8, 128), torch.ones(8, 64)),
        ValueError,
        r"nt_xent_loss: z1 and z2 must have the same shape, got \[8, 128\] and \[8, 64\]",
    ),
    (
        lambda: ssl.nt_xent_loss(GOOD.long(), GOOD.long()),
        TypeError,
        "nt_xent_loss: z1 must be float64, float32, bfloat16 or float16, got int64",
    ),
    (
        lambda: ssl.nt_xent_loss(GOOD, GOOD.half()),
        TypeError,
        "nt_xent_loss: z1 and z2 must have the same dtype, got float32 and float16",
    ),
    (
        lambda: ssl.nt_xent_loss(GOOD, GOOD.to("meta")),
        ValueError,
        "nt_xent_loss: z1 and z2 must be on the same device, got cpu and meta",
    ),
    (lambda: ssl.nt_xent_loss(GOOD, GOOD, 0.0), ValueError, "temperature must be > 0, got 0.0"),
    (
        lambda: ssl.nt_xent_loss(GOOD, GOOD, float("nan")),
        ValueError,
        "temperature must be > 0, got nan",
    ),
    (
        lambda: ssl.nt_xent_loss(GOOD, GOOD, "0.1"),
        TypeError,
        "temperature must be a number, got str",
    ),
    (
        lambda: ssl.nt_xent_loss(GOOD, GOOD, torch.ones(2)),
        ValueError,
        r"temperature must be a float or a 0-d tensor, got shape \[2\]",
    ),
    (
        lambda: ssl.nt_xent_loss(GOOD, GOOD, reduction="avg"),
        ValueError,
        r"reduction must be one of \['mean', 'sum', 'none'\], got 'avg'",
    ),
    (
        lambda: ssl.nt_xent_loss(GOOD[None], GOOD[None]),
        ValueError,
        r"z1 must have 2 dimensions, got shape \[1, 8, 4\]",
    ),
    (lambda: ssl.nt_xent_loss(GOOD), TypeError, "z2 must be a tensor, got None"),
    (lambda: ssl.nt_xent_loss([GOOD]), ValueError, "at least two views are needed, got 1"),
    (lambda: ssl.nt_xent_loss([GOOD, GOOD], GOOD), TypeError, "z2 must be left out"),
    (
        lambda: ssl.nt_xent_loss([GOOD, GOOD, GOOD[:3]]),
        ValueError,
        r"views\[0\] and views\[2\] must have the same shape",
    ),
    (
        lambda: ssl.info_nce_loss(GOOD, GOOD, GOOD[:, :3]),
        ValueError,
        r"query and negative_keys must have the same last dimension, got \[8, 4\] and \[8, 3\]",
    ),
    (
        lambda: ssl.info_nce_loss(GOOD, GOOD, GOOD, negative_mode="both"),
        ValueError,
        "negative_mode must be 'unpaired' or 'paired', got 'both'",
    ),
    (
        lambda: ssl.info_nce_loss(GOOD, GOOD, GOOD[:3, None], negative_mode="paired"),
        ValueError,
        "paired negative_keys must have one block of rows for each query",
    ),
    (
        lambda: ssl.info_nce_loss(GOOD, GOOD, GOOD, query_ids=LABELS),
        ValueError,
        "query_ids with negative_keys needs negative_ids",
    ),
    (
        lambda: ssl.info_nce_loss(GOOD, GOOD, negative_ids=LABELS),
        ValueError,
        "negative_ids needs query_ids and negative_keys",
    ),
    (
        lambda: ssl.info_nce_loss(GOOD, GOOD, query_ids=LABELS[:3]),
        ValueError,
        r"query_ids must have shape \[8\], got \[3\]",
    ),
    (
        lambda: ssl.info_nce_loss(GOOD, GOOD, query_ids=GOOD[:, 0]),
        TypeError,
        "query_ids must be integers, got float32",
    ),
    (
        lambda: ssl.clip_loss(GOOD, [1.0], 1.0),
        TypeError,
        "text_features must be a tensor, got list",
    ),
    (
        lambda: ssl.siglip_loss(GOOD, GOOD, 1.0, "b"),
        TypeError,
        "logit_bias must be a float or a 0-d tensor, got str",
    ),
    (
        lambda: ssl.sup_con_loss(GOOD, LABELS[:5]),
        ValueError,
        r"labels must have shape \[8\], got \[5\]",
    ),
    (
        lambda: ssl.dcl_loss(GOOD, GOOD, sigma=-1.0),
        ValueError,
        "dcl_loss: sigma must be > 0, got -1.0",
    ),
    (
        lambda: ssl.triplet_loss(GOOD, LABELS, mining="easy"),
        ValueError,
        r"mining must be one of \['hard', 'semihard', 'all'\], got 'easy'",
    ),
    (lambda: ssl.triplet_loss(GOOD, LABELS, distance="l1"), ValueError, "distance must be one of"),
    (
        lambda: ssl.triplet_loss(GOOD, LABELS, reduction="none"),
        ValueError,
        "reduction must be one of",
    ),
    (
        lambda: ssl.contrastive_loss(GOOD, GOOD, LABELS[:2]),
        ValueError,
        r"contrastive_loss: same must have shape \[8\], got \[2\]",
    ),
    (
        lambda: ssl.margin_loss(GOOD, GOOD, GOOD, GOOD, form="article"),
        ValueError,
        "form must be one of",
    ),
    (lambda: ssl.uniformity_loss(GOOD, 0.0), ValueError, "t must be > 0, got 0.0"),
    (lambda: ssl.alignment_loss(GOOD, GOOD, alpha=0), ValueError, "alpha must be > 0, got 0"),
    (lambda: ssl.NTXentLoss(temperature=-1.0), ValueError, "NTXentLoss: temperature must be > 0"),
    (lambda: ssl.DCLLoss(reduction="x"), ValueError, "DCLLoss: reduction must be one of"),
    (lambda: ssl.TripletLoss(mining="x"), ValueError, "TripletLoss: mining must be one of"),
    (
        lambda: ssl.MoCoLoss(8, 4)(GOOD, GOOD[:3]),
        ValueError,
        "MoCoLoss: query and key must have the same",
    ),
]


@pytest.mark.parametrize(("call", "kind", "message"), ERRORS)
def test_messages(call: Callable, kind: type, message: str) -> None:
    """Each names the op, the argument, what must hold and what came."""
    with pytest.raises(kind, match=message):
        call()
