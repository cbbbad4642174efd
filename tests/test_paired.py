# SPDX-License-Identifier: Apache-2.0
"""InfoNCE with negatives of its own for every query (the op ``paired``), on every engine."""

from __future__ import annotations

import pytest
import torch
from flat import paired
from helpers import SLACK, check_budget, check_loss, threads
from torch import Tensor

import sslkernels
from sslkernels import reference

# (N, M, D): single rows, keys and features; one key more and less than a vector has lanes; no power of 2;
# 600 features are more than are widened at a time.
SIZES = [
    (1, 1, 1),
    (1, 3, 2),
    (2, 15, 3),
    (3, 17, 129),
    (5, 1, 128),
    (4, 200, 1),
    (65, 33, 24),
    (33, 16, 64),
    (2, 5, 600),
]


def inputs(n: int, m: int, d: int, dtype=torch.float32, temperature=0.2) -> list[Tensor]:
    """Query, a noisy positive, negatives of norms between 0.1 and 10, and a temperature."""
    generator = torch.Generator().manual_seed(100 * n + 10 * m + d)
    query, noise = (torch.randn(n, d, generator=generator) for _ in range(2))
    keys = torch.randn(n, m, d, generator=generator)
    keys *= 10 ** torch.empty(n, m, 1).uniform_(-1, 1, generator=generator)
    return [
        query.to(dtype),
        (query + 0.5 * noise).to(dtype),
        keys.to(dtype),
        torch.tensor(temperature),
    ]


def ids(n: int, m: int) -> dict[str, Tensor]:
    """About every fifth negative is a false one; row 0 has no other."""
    own = torch.arange(n * m).view(n, m) % 5
    if n > 1:
        own[0] = 7
    return {
        "query_ids": torch.where(torch.arange(n) == 0, 7, torch.arange(n) % 5),
        "negative_ids": own,
    }


def loss(module, *args: Tensor, **keywords):
    return module.info_nce_loss(*args, negative_mode="paired", **keywords)


@pytest.mark.parametrize("dtype", SLACK, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_against_float64_truth(on_engine: str, size, dtype: torch.dtype) -> None:
    """Loss and the gradients of query, positive, negatives and temperature."""
    n, m, _ = size
    args = inputs(*size, dtype)
    for keywords in (
        {},
        {"reduction": "none", **ids(n, m)},
        {"reduction": "sum", "normalize": False},
    ):
        temperature = torch.tensor(5.0) if "normalize" in keywords else args[3]
        given = [*args[:3], temperature]
        shape = loss(sslkernels, *given, **keywords).shape
        check_loss(
            lambda *x, k=keywords: loss(sslkernels, *x, **k),
            lambda *x, k=keywords: loss(reference, *x, **k),
            given,
            slack=max(SLACK[dtype], 5e-6),
            name=f"{on_engine} {size} {dtype} {list(keywords)}",
            dloss=torch.linspace(0.5, 1.5, max(1, shape.numel())).view(shape),
        )


@pytest.mark.parametrize("rising", [True, False])
def test_online_maximum(on_engine: str, rising: bool) -> None:
    """Keys in the order of their similarity at T = 0.01: the maximum moves with every group, or never."""
    query, positive, keys, _ = inputs(9, 150, 32)
    cosine = torch.nn.functional.cosine_similarity(query[:, None], keys, dim=2)
    order = cosine.argsort(1, descending=not rising)
    keys = keys.take_along_dim(order[:, :, None], 1)
    check_loss(
        lambda *x: loss(sslkernels, *x, 0.01),
        lambda *x: loss(reference, *x, 0.01),
        [query, positive, keys],
        slack=2e-5,
        name=on_engine,
    )


def test_aligned_views_keep_their_gradient(on_engine: str) -> None:
    """Close views at T = 0.02, where the softmax of eager float32 rounds to 1."""
    query = inputs(64, 1, 128)[0]
    noise = torch.randn(41, 64, 128, generator=torch.Generator().manual_seed(0))
    positive = query + 0.2 * noise[0]
    # Not so far away that the softmax of float64, the truth, loses its digits too.
    keys = query[:, None] + 2.2 * noise[1:].transpose(0, 1)

    def gradient(module, dtype: torch.dtype) -> Tensor:
        leaf = query.to(dtype).requires_grad_()
        value = loss(module, leaf, positive.to(dtype), keys.to(dtype), 0.02)
        return torch.autograd.grad(value, leaf)[0].double()

    truth = gradient(reference, torch.float64)
    ours, eager = (
        ((gradient(module, torch.float32) - truth).norm() / truth.norm()).item()
        for module in (sslkernels, reference)
    )
    assert ours < 1e-3 and eager > 0.1, f"ours {ours:.1e}, eager {eager:.1e}"


@pytest.mark.parametrize("scale", [1e4, -1e4])
def test_logits_to_1e4(on_engine: str, scale: float) -> None:
    query, positive, keys, _ = inputs(6, 40, 16)
    query, positive, keys = (
        torch.nn.functional.normalize(x, dim=-1) for x in (query, positive, keys)
    )
    check_loss(
        lambda *x: loss(sslkernels, *x, 1e-4, normalize=False),
        lambda *x: loss(reference, *x, 1e-4, normalize=False),
        [query if scale > 0 else -query, positive, keys],
        slack=2e-3,
        name=on_engine,
    )


@pytest.mark.parametrize("dtype", SLACK, ids=str)
def test_any_layout_gives_the_same(on_engine: str, dtype: torch.dtype) -> None:
    """Rows amid NaN, keys in another order of dimensions, features that are not contiguous."""
    n, m, d = 7, 19, 21
    query, positive, keys, _ = inputs(n, m, d, dtype)

    def run(*tensors: Tensor) -> list[Tensor]:
        leaves = [x.detach().requires_grad_() for x in tensors]
        value = loss(sslkernels, *leaves, **ids(n, m))
        return [value.detach(), *torch.autograd.grad(value, leaves)]

    def amid(x: Tensor) -> Tensor:
        buffer = torch.full([size + 4 for size in x.shape], torch.nan, dtype=dtype)
        inside = buffer[tuple(slice(2, 2 + size) for size in x.shape)]
        return inside.copy_(x)

    expected = run(query, positive, keys)
    for name, layout in {
        "amid": [amid(query), amid(positive), amid(keys)],
        "keys by number": [query, positive, keys.transpose(0, 1).contiguous().transpose(0, 1)],
        "features first": [
            query.T.contiguous().T,
            positive,
            keys.permute(2, 0, 1).contiguous().permute(1, 2, 0),
        ],
    }.items():
        for got, wanted in zip(run(*layout), expected, strict=True):
            assert got.isfinite().all(), name
            torch.testing.assert_close(got, wanted, msg=lambda text, name=name: f"{name}: {text}")
    shared = keys[:1].expand(n, m, d)
    for got, wanted in zip(
        run(query, positive, shared), run(query, positive, shared.clone()), strict=True
    ):
        torch.testing.assert_close(got, wanted)


def test_excluded_keys_do_not_count(on_engine: str) -> None:
    """Not even when they hold NaN; their gradient is 0, and that of a query without negatives is 0."""
    query, positive, keys, _ = inputs(4, 20, 8)
    own = torch.zeros(4, 20, dtype=torch.int64)
    own[0], own[1, 3:] = 1, 1
    keys[own == 1] = torch.nan
    leaves = [x.requires_grad_() for x in (query, positive, keys)]
    rows, metrics = loss(
        sslkernels,
        *leaves,
        reduction="none",
        return_metrics=True,
        query_ids=torch.ones(4, dtype=torch.int64),
        negative_ids=own,
    )
    expected = loss(reference, query[1:2], positive[1:2], keys[1:2, :3], reduction="none")
    torch.testing.assert_close(rows[1:2], expected)
    assert rows[0] == 0 and all(bool(x.isfinite()) for x in metrics)
    grads = torch.autograd.grad(rows.sum(), leaves)
    assert all(bool(g.isfinite().all()) for g in grads)
    assert not grads[0][0].any() and not grads[1][0].any() and not grads[2][own == 1].any()
    assert grads[2][own == 0].abs().sum(1).min() > 0


def test_rows_below_the_smallest_norm(on_engine: str) -> None:
    """They are divided by 1e-12, a constant, and their gradients are those of a constant factor."""
    args = [x.double() for x in inputs(3, 18, 5)]
    for row in (args[0][0], args[1][1], args[2][0, 3], args[2][2, 17]):
        row *= 1e-14
    results = []
    for module in (sslkernels, reference):
        leaves = [x.clone().requires_grad_() for x in args]
        value = loss(module, *leaves)
        results.append([value.detach(), *torch.autograd.grad(value, leaves)])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)


def test_nothing_to_do(on_engine: str) -> None:
    """No negatives: the loss is 0 and so are the gradients; no queries: 0."""
    query, positive = torch.randn(3, 4, requires_grad=True), torch.randn(3, 4, requires_grad=True)
    value = loss(sslkernels, query, positive, torch.randn(3, 0, 4, requires_grad=True))
    assert value == 0
    assert not any(g.any() for g in torch.autograd.grad(value, (query, positive)))
    none, metrics = loss(
        sslkernels, query[:0], positive[:0], torch.randn(0, 5, 4), return_metrics=True
    )
    assert none == 0 and metrics.negative_similarity == 0


def test_nan_gives_nan(on_engine: str) -> None:
    for broken in range(3):
        args = inputs(5, 18, 20)[:3]
        args[broken][1].view(-1)[-1] = torch.nan
        rows = loss(sslkernels, *args, reduction="none")
        assert rows.isnan().tolist() == [False, True, False, False, False]


@pytest.mark.parametrize("dtype", SLACK, ids=str)
def test_same_bits_for_any_number_of_threads(dtype: torch.dtype) -> None:
    leaves = [x.requires_grad_() for x in inputs(150, 40, 24, dtype)]
    results = []
    for count in (1, 2, 3):
        with threads(count):
            value = loss(sslkernels, *leaves)
            results.append([value.detach(), *torch.autograd.grad(value, leaves)])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_metrics(on_engine: str) -> None:
    query, positive, keys, _ = inputs(60, 9, 12)
    positive = query + 1.5 * torch.randn(60, 12, generator=torch.Generator().manual_seed(1))
    for keywords in ({}, ids(60, 9)):
        _, got = loss(sslkernels, query, positive, keys, return_metrics=True, **keywords)
        _, expected = loss(reference, query, positive, keys, return_metrics=True, **keywords)
        assert 0 < expected.top1 < 1
        for field, a, b in zip(got._fields, got, expected, strict=True):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5, msg=f"{field}: {a} {b}")


def test_keys_without_a_gradient_are_not_kept(on_engine: str) -> None:
    """They may be overwritten before backward, and autograd holds nothing of their size."""
    query, positive, keys, _ = inputs(6, 50, 16)
    grads, kept = [], []

    def pack(x: Tensor) -> Tensor:
        kept.append(x.numel())
        return x

    for overwrite in (False, True):
        leaf, bank = query.clone().requires_grad_(), keys.clone()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            value = loss(sslkernels, leaf, positive, bank)
        if overwrite:
            bank.fill_(torch.nan)
        value.backward()
        grads.append(leaf.grad)
    assert torch.equal(*grads) and max(kept) == 6 * 16


@pytest.mark.parametrize("wanted", range(4))
def test_one_gradient_alone(on_engine: str, wanted: int) -> None:
    """Each gradient is the same whether or not the others are computed."""
    args = inputs(7, 18, 10)
    every = [x.clone().requires_grad_() for x in args]
    expected = torch.autograd.grad(loss(sslkernels, *every), every)[wanted]
    args[wanted].requires_grad_()
    (got,) = torch.autograd.grad(loss(sslkernels, *args), args[wanted])
    check_budget(got, expected, expected, 0.0, f"input {wanted}")


def test_gradcheck(on_engine: str) -> None:
    args = [x.double().requires_grad_() for x in inputs(4, 9, 3)]
    assert torch.autograd.gradcheck(lambda *x: loss(sslkernels, *x, **ids(4, 9)), args)
    args[3] = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda *x: loss(sslkernels, *x, normalize=False, reduction="none"), args
    )


def test_a_second_derivative_is_refused() -> None:
    query, positive, keys, _ = inputs(3, 5, 4)
    query.requires_grad_()
    (first,) = torch.autograd.grad(
        loss(sslkernels, query, positive, keys), query, create_graph=True
    )
    with pytest.raises(RuntimeError, match="sslkernels::paired: second derivatives"):
        first.sum().backward()


@pytest.mark.parametrize("keys_grad", [True, False])
def test_opcheck(on_engine: str, keys_grad: bool) -> None:
    query, positive, keys, _ = inputs(5, 6, 8)
    scale = torch.tensor(5.0, requires_grad=True)
    own = {"ids_q": torch.arange(5), "ids_k": torch.arange(30).view(5, 6) % 7}
    leaves = query.requires_grad_(), positive.requires_grad_(), keys.requires_grad_(keys_grad)
    for reduction in ("mean", "none"):
        torch.library.opcheck(
            torch.ops.sslkernels.paired.default,
            (*leaves, scale, own["ids_q"], own["ids_k"], True, reduction),
        )
    with torch.no_grad():
        out = paired(*leaves, scale=scale, **own)
        torch.library.opcheck(
            torch.ops.sslkernels.paired_backward.default,
            (
                query,
                positive,
                keys if keys_grad else None,
                scale.detach(),
                *own.values(),
                True,
                "mean",
                *out[1:5],
                torch.ones(()),
                True,
                keys_grad,
            ),
        )
