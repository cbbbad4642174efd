# SPDX-License-Identifier: Apache-2.0
"""The batch-hard triplet loss (the op ``hard_triplets``), in one call and composed, on every engine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import SLACK, check_loss, engine, engines, poisoned, threads
from torch import Tensor

import sslkernels
from sslkernels import reference
from sslkernels.backends.interface import Triplets
from sslkernels.ops import rows
from sslkernels.ops.triplet_hard import HardTriplets, hard_triplets

# (N, D): one row and feature, neighbours of tiles, panels and blocks, several blocks.
SIZES = [
    (1, 1),
    (2, 3),
    (5, 1),
    (23, 17),
    (25, 16),
    (65, 5),
    (71, 33),
    (73, 40),
    (145, 31),
    (290, 129),
]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"normalize": True, "reduction": "mean_nonzero"},
    {"distance": "cosine", "reduction": "sum"},
]
ENGINES = engines()


def inputs(n: int, d: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Rows, and labels of classes of several sizes, one of which has one member."""
    generator = torch.Generator().manual_seed(1000 * n + d + seed)
    z = torch.randn(n, d, generator=generator)
    labels = torch.randint(max(1, n // 5), (n,), generator=generator)
    if n > 5:
        labels[n // 2] = 99
    return z, labels


def run(z: Tensor, labels: Tensor, **options: Any) -> HardTriplets:
    """What the op returns."""
    margin = torch.tensor(0.3, dtype=torch.float64 if z.dtype == torch.float64 else torch.float32)
    return hard_triplets(
        Triplets(z, labels, margin, **{"normalize": True, "cosine": False, **options})
    )


@pytest.mark.parametrize("dtype", SLACK, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_against_float64_truth(on_engine: str, size: tuple[int, int], dtype: torch.dtype) -> None:
    """Loss and the gradients of rows and margin."""
    z, labels = inputs(*size)
    for options in OPTIONS:
        check_loss(
            lambda x, m, o=options: sslkernels.triplet_loss(x, labels, m, **o),
            lambda x, m, o=options: reference.triplet_loss(x, labels, m, **o),
            [z.to(dtype), torch.tensor(0.5, dtype=torch.float64)],
            slack=max(SLACK[dtype], 5e-6),
            name=f"{on_engine} {size} {dtype} {options}",
            dloss=torch.tensor(1.5),
        )


def test_terms_of_zero_do_not_count_as_terms(on_engine: str) -> None:
    """Two classes far from everything, whose triplets are all easy, and two that lie in each other."""
    generator = torch.Generator().manual_seed(3)
    z = torch.randn(80, 6, generator=generator)
    labels = torch.arange(80) % 4
    z[labels == 2] += 100
    z[labels == 3] -= 100
    terms = reference.triplet_loss(z, labels, 0.5, reduction="none")
    assert 20 <= int((terms == 0).sum()) <= 60
    check_loss(
        lambda x: sslkernels.triplet_loss(x, labels, 0.5, reduction="mean_nonzero"),
        lambda x: reference.triplet_loss(x, labels, 0.5, reduction="mean_nonzero"),
        [z],
        slack=5e-6,
        name=f"{on_engine} zeros",
    )


@pytest.mark.parametrize("cosine", [False, True])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_one_call_is_the_composition(
    size: tuple[int, int], cosine: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everything that the op returns, and both gradients; the composition in chunks of a few rows."""
    z, labels = inputs(*size)
    monkeypatch.setattr(rows, "CPU_CHUNK", 64)
    found = {}
    for each in ENGINES:
        with engine(each):
            leaf, margin = z.double().requires_grad_(), torch.tensor(0.4).double().requires_grad_()
            out = hard_triplets(Triplets(leaf, labels, margin, True, cosine, "mean_nonzero"))
            gradients = torch.autograd.grad(out.loss, (leaf, margin))
            found[each] = [*out, *gradients]
    for each in ENGINES[1:]:
        assert torch.equal(found[each][1], found["chunked"][1]), each
        for got, want in zip(found[each], found["chunked"], strict=True):
            torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_far_from_the_origin(on_engine: str) -> None:
    """Distances do not change with the origin: what cancels in |y|^2 - 2 <x, y> is taken out first."""
    z, labels = inputs(60, 24)
    for options in ({}, {"reduction": "mean_nonzero"}):
        check_loss(
            lambda x, o=options: sslkernels.triplet_loss(x, labels, **o),
            lambda x, o=options: reference.triplet_loss(x, labels, **o),
            [z + 300.0],
            slack=1e-4,
            name=on_engine,
        )


def test_a_row_that_all_choose(on_engine: str) -> None:
    """One row is the nearest negative of all others, and one the farthest positive of its class."""
    z = torch.nn.functional.normalize(inputs(150, 60)[0], dim=1)
    labels = torch.arange(150) % 2
    labels[7] = 5
    z[7] = 0  # all others lie round it
    z[8] = 9.0
    state = run(z, labels, normalize=False)
    assert state.chosen[1].tolist().count(7) > 140 and state.chosen[0].tolist().count(8) > 70
    check_loss(
        lambda x: sslkernels.triplet_loss(x, labels, 20.0),
        lambda x: reference.triplet_loss(x, labels, 20.0),
        [z],
        slack=2e-5,
        name=on_engine,
    )


def test_ties_go_to_the_smallest_row(on_engine: str) -> None:
    """Whatever the order in which tiles are visited."""
    z = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).repeat_interleave(2, 0).repeat(50, 1)
    labels = torch.arange(200) % 4 // 2 * 7 + 3
    same = torch.arange(200) % 4 < 2
    chosen = run(z, labels).chosen
    assert chosen[0].tolist() == [(0 if s else 2) + int(i in (0, 2)) for i, s in enumerate(same)]
    assert chosen[1].tolist() == [2 if s else 0 for s in same.tolist()]


def test_equal_rows_have_distance_and_gradient_0(on_engine: str) -> None:
    z = torch.ones(30, 9, requires_grad=True)
    for options in OPTIONS:
        loss = sslkernels.triplet_loss(z, torch.arange(30) % 3, 0.25, **options)
        (dz,) = torch.autograd.grad(loss, z)
        sum_of = 30 if options.get("reduction") == "sum" else 1
        torch.testing.assert_close(loss, torch.tensor(0.25 * sum_of), rtol=1e-5, atol=1e-5)
        assert float(dz.abs().max()) < 1e-6


@pytest.mark.parametrize(
    "labels", [torch.zeros(40), torch.arange(40)], ids=["one class", "no pair"]
)
def test_without_triplets(on_engine: str, labels: Tensor) -> None:
    """No negative, or no positive: the loss is 0, and so are all gradients."""
    z, margin = inputs(40, 6)[0].requires_grad_(), torch.tensor(0.3, requires_grad=True)
    for options in OPTIONS:
        loss = sslkernels.triplet_loss(z, labels.long(), margin, **options)
        assert loss.item() == 0
        assert not any(bool(g.any()) for g in torch.autograd.grad(loss, (z, margin)))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_reaches_the_loss(on_engine: str, value: float) -> None:
    """A NaN distance is neither the largest nor the smallest; also in the last row and feature."""
    for n, d, at in ((40, 9, (3, 2)), (73, 33, (72, 32)), (6, 1, (0, 0))):
        for options in OPTIONS:
            z, labels = inputs(n, d)
            assert sslkernels.triplet_loss(z, labels, **options).isfinite()
            z[at] = value
            assert sslkernels.triplet_loss(z, labels, **options).isnan()


def test_norms_that_overflow(on_engine: str) -> None:
    """A row of 1e30 has an infinite norm in float32, and is 0 after it; it is no NaN."""
    z, labels = inputs(20, 8)
    z[3] = 1e30
    assert sslkernels.triplet_loss(z, labels, normalize=True).isfinite()


@pytest.mark.parametrize("dtype", SLACK, ids=str)
def test_strides(on_engine: str, dtype: torch.dtype) -> None:
    """Rows in the middle of NaN, columns with a stride, labels with a stride and beyond 32 bits."""
    z, labels = inputs(75, 12)
    z = z.to(dtype)
    for options in OPTIONS:
        results = []
        for x, y in (
            (z, labels),
            (poisoned(z), labels),
            (z.T.contiguous().T, labels.repeat_interleave(2)[::2]),
            (z, labels * 2**40 - 2**45),
        ):
            leaf = x.detach().requires_grad_()
            loss = sslkernels.triplet_loss(leaf, y, **options)
            results.append([loss, *torch.autograd.grad(loss, leaf)])
        for other in results[1:]:
            for a, b in zip(results[0], other, strict=True):
                # torch's sums may have other bits where memory is laid out differently
                assert torch.equal(a, b) or on_engine == "chunked" and torch.allclose(a, b)


@pytest.mark.parametrize("size", [(0, 4), (0, 0), (6, 0)], ids=str)
def test_empty(on_engine: str, size: tuple[int, int]) -> None:
    """Without rows the loss is 0; without features all distances are, and the loss is the margin."""
    z = torch.zeros(size, requires_grad=True)
    for options in ({}, {"normalize": True}, {"distance": "cosine"}):
        loss = sslkernels.triplet_loss(z, torch.arange(size[0]) % 2, 0.2, **options)
        (dz,) = torch.autograd.grad(loss, z)
        assert dz.shape == z.shape
        if options != {"distance": "cosine"}:
            torch.testing.assert_close(loss, torch.tensor(0.2 if size[0] else 0.0))


def test_same_bits_for_any_number_of_threads(on_engine: str) -> None:
    """Several blocks and several threads' shares of each pass."""
    if on_engine == "chunked":
        pytest.skip("torch's products have bits of their own for each number of threads")
    z, labels = inputs(500, 70)

    def once() -> list[Tensor]:
        found = []
        for options in OPTIONS:
            leaf, margin = z.clone().requires_grad_(), torch.tensor(0.7, requires_grad=True)
            loss = sslkernels.triplet_loss(leaf, labels, margin, **options)
            found += [loss, *torch.autograd.grad(loss, (leaf, margin))]
        return found

    with threads(1):
        one = once()
    for count in (2, 3):
        with threads(count):
            assert all(torch.equal(a, b) for a, b in zip(once(), one, strict=True))


# ---------------------------------------------------------------------------------- the torch ops


def op_inputs() -> dict[str, tuple[Callable, tuple]]:
    """Arguments of each op that reach every branch of its schema."""
    ops = torch.ops.sslkernels
    z, labels = inputs(12, 5)
    margin = torch.tensor(0.3)
    forward = (labels, margin.clone().requires_grad_(), True, False, "mean")
    state = run(z, labels).state
    problem = (z, labels, margin, True, False, "mean", *state, torch.tensor(2.0))
    return {
        "hard_triplets": (ops.hard_triplets, (z.clone().requires_grad_(), *forward)),
        "hard_triplets half": (ops.hard_triplets, (z.half().requires_grad_(), *forward)),
        "hard_triplets_backward": (ops.hard_triplets_backward, (*problem, True)),
        "hard_triplets_backward, margin alone": (ops.hard_triplets_backward, (*problem, False)),
    }


@pytest.mark.parametrize("name", list(op_inputs()))
@pytest.mark.parametrize("backend", ["chunked", None])
def test_opcheck(name: str, backend: str | None) -> None:
    """Schema, fake, autograd registration and AOT dispatch, with dynamic shapes."""
    op, arguments = op_inputs()[name]
    with sslkernels.backend(backend):
        torch.library.opcheck(op.default, arguments)


def test_gradcheck(on_engine: str) -> None:
    """Against finite differences in float64, forward mode too."""
    z, labels = inputs(9, 4)
    leaves = (z.double().requires_grad_(), torch.tensor(0.7).double().requires_grad_())
    for options in OPTIONS:
        assert torch.autograd.gradcheck(
            lambda x, m, o=options: sslkernels.triplet_loss(x, labels, m, **o),
            leaves,
            check_forward_ad=True,
        )


def test_second_derivative_raises(on_engine: str) -> None:
    z, labels = inputs(9, 4)
    leaf = z.requires_grad_()
    loss = sslkernels.triplet_loss(leaf, labels)
    (first,) = torch.autograd.grad(loss, leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="sslkernels::hard_triplets: second derivatives"):
        first.sum().backward()


def test_what_is_kept_for_backward(on_engine: str) -> None:
    """The rows as they were given, two indices and distances a row, and a norm."""
    z, labels = inputs(300, 64)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        sslkernels.triplet_loss(z.requires_grad_(), labels, normalize=True)
    assert sum(x.numel() for x in kept) <= 300 * 64 + 6 * 300 + 2
