# SPDX-License-Identifier: Apache-2.0
"""Metrics against the reference, at known geometries, and in little memory."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import check_budget, threads

from sslkernels import metrics, reference

SIZES = [(1, 8), (2, 1), (3, 24), (65, 129), (130, 8), (700, 32)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_against_the_reference(on_engine: str, size, dtype: torch.dtype) -> None:
    """Every metric in every dtype against float64."""
    generator = torch.Generator().manual_seed(size[0])
    q = torch.randn(*size, generator=generator).to(dtype)
    k = (q.float() + torch.randn(*size, generator=generator) * 0.8).to(dtype)
    for name, arguments in (
        ("alignment", (q, k)),
        ("uniformity", (q,)),
        ("feature_std", (q,)),
        ("effective_rank", (q,)),
    ):
        twin = {"alignment": "alignment_loss", "uniformity": "uniformity_loss"}.get(name, name)
        got = getattr(metrics, name)(*arguments)
        eager = getattr(reference, twin)(*arguments)
        truth = getattr(reference, twin)(*(x.double() for x in arguments))
        assert got.ndim == 0 and got.dtype == torch.promote_types(dtype, torch.float32)
        check_budget(got, eager, truth, 5e-6, f"{on_engine} {name} {size} {dtype}", floor=1.0)


@pytest.mark.parametrize("size", [(40, 12), (130, 24)], ids=str)
def test_contrastive_accuracy(on_engine: str, size) -> None:
    """Any k; a share strictly between 0 and 1, so that it could be wrong."""
    generator = torch.Generator().manual_seed(3)
    q = torch.randn(*size, generator=generator)
    k = q + torch.randn(*size, generator=generator) * 1.5
    got = metrics.contrastive_accuracy(q, k, (1, 3, 5))
    expected = reference.contrastive_accuracy(q, k, (1, 3, 5))
    assert len(got) == 3 and 0 < expected[0] < expected[2] < 1
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_perfect_and_hopeless_accuracy() -> None:
    """Identity gives 1; keys shifted by one give 0; ties do not count against."""
    z = torch.eye(8)
    assert metrics.contrastive_accuracy(z, z) == (1.0, 1.0)
    assert metrics.contrastive_accuracy(z, z.roll(1, 0), (1,)) == (0.0,)
    assert metrics.contrastive_accuracy(torch.ones(4, 2), torch.ones(4, 2), (1,)) == (1.0,)
    assert metrics.contrastive_accuracy(z[:0], z[:0]) == (0.0, 0.0)


def test_collapse_shows() -> None:
    """Equal rows: no deviation, uniformity 0, rank 0; a line: rank 1; a sphere: about D."""
    collapsed = torch.ones(50, 16)
    assert metrics.feature_std(collapsed).item() == pytest.approx(0.0, abs=1e-6)
    assert metrics.uniformity(collapsed).item() == pytest.approx(0.0, abs=1e-5)
    assert metrics.effective_rank(collapsed) == 0
    line = torch.linspace(-1, 1, 50)[:, None] * torch.ones(16)
    assert metrics.effective_rank(line).item() == pytest.approx(1.0, abs=1e-5)
    sphere = torch.randn(4000, 16, generator=torch.Generator().manual_seed(0))
    assert metrics.feature_std(sphere).item() == pytest.approx(1 / math.sqrt(16), rel=0.02)
    assert 15.9 < metrics.effective_rank(sphere) <= 16
    axes = torch.eye(16)[:4].repeat(10, 1)
    assert metrics.effective_rank(axes, center=False).item() == pytest.approx(4.0, abs=1e-5)


def test_no_gradient_and_empty_inputs() -> None:
    """Metrics never build a graph; no rows give 0."""
    z = torch.randn(6, 4, requires_grad=True)
    empty = torch.zeros(0, 4)
    for value in (
        metrics.alignment(z, z),
        metrics.uniformity(z),
        metrics.feature_std(z),
        metrics.effective_rank(z),
        *metrics.contrastive_accuracy(z, z),
    ):
        assert not value.requires_grad
    for value in (
        metrics.alignment(empty, empty),
        metrics.uniformity(empty),
        metrics.feature_std(empty),
        metrics.effective_rank(empty),
    ):
        assert value == 0


def test_same_bits_for_any_number_of_threads() -> None:
    """Also for more rows than torch sums in one thread."""
    q, k = torch.randn(2, 40000, 4, generator=torch.Generator().manual_seed(1))

    def run() -> list[torch.Tensor]:
        return [
            metrics.alignment(q, k),
            metrics.feature_std(q),
            metrics.uniformity(q[:3000]),
            *metrics.contrastive_accuracy(q[:3000], k[:3000]),
        ]

    with threads(1):
        one = run()
    with threads(2):
        two = run()
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("name", ["feature_std", "effective_rank", "uniformity"])
def test_messages(name: str) -> None:
    """Errors name the function and what came."""
    with pytest.raises(ValueError, match=r"must have 2 dimensions, got shape \[3\]"):
        getattr(metrics, name)(torch.ones(3))
    with pytest.raises(TypeError, match="z must be a tensor, got list"):
        getattr(metrics, name)([1.0])


def test_accuracy_messages() -> None:
    """Shapes must fit."""
    with pytest.raises(
        ValueError, match="contrastive_accuracy: query and key must have the same shape"
    ):
        metrics.contrastive_accuracy(torch.ones(3, 2), torch.ones(4, 2))
