# SPDX-License-Identifier: Apache-2.0
"""sentence-transformers' losses and ours side by side."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from side_by_side import check_same, check_same_error, check_signature, check_state, peer
from torch import Tensor, nn

import sslkernels
from sslkernels.integrations import _glue

losses = peer("sentence_transformers.sentence_transformer.losses")
util = peer("sentence_transformers.util")
ours: Any = peer("sslkernels.integrations.sentence_transformers")

# The library deprecates the symmetric losses.
pytestmark = pytest.mark.filterwarnings("ignore:The .*Symmetric.* is deprecated:DeprecationWarning")
THEIRS = {name: getattr(losses, name) for name in ours.__all__}
RANKING = [name for name in ours.__all__ if "Ranking" in name]
TRIPLETS = ("BatchHardTripletLoss", "BatchAllTripletLoss", "BatchSemiHardTripletLoss")
DISTANCES = losses.BatchHardTripletLossDistanceFunction
METRICS = losses.SiameseDistanceMetric
ALL = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")


class Encoder(nn.Sequential):
    """Stands in for a SentenceTransformer: features in, an embedding out."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(6, 8))

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"sentence_embedding": self[0](features["input_ids"])}


def pair(name: str, *args: Any, **kwargs: Any) -> tuple[nn.Module, nn.Module]:
    model = Encoder()
    return getattr(ours, name)(model, *args, **kwargs), THEIRS[name](model, *args, **kwargs)


def call(loss: Any, labels: Tensor | None = None) -> Callable[..., Tensor]:
    """The loss as a function of embeddings; a cached one gets them in mini-batches."""
    if hasattr(loss, "calculate_loss"):
        return lambda *x: loss.calculate_loss([list(e.split(3)) for e in x], labels)
    return lambda *x: loss.compute_loss_from_embeddings(list(x), labels)


def columns(n: int, count: int) -> list[Tensor]:
    first = torch.randn(n, 8)
    return [first, *(first + (1 + i) * torch.randn(n, 8) for i in range(count - 1))]


def said(caplog: pytest.LogCaptureFixture, function: Callable[[], Any]) -> str:
    _glue.say.cache_clear()
    caplog.clear()
    with caplog.at_level(logging.WARNING, "sslkernels.integrations"):
        function()
    return "".join(r.getMessage() for r in caplog.records if r.name == "sslkernels.integrations")


@pytest.mark.parametrize("name", ours.__all__)
def test_signatures(name: str) -> None:
    check_signature(getattr(ours, name), THEIRS[name])
    mine, other = pair(name)
    check_state(mine, other)
    assert mine.get_config_dict() == other.get_config_dict() and mine.citation == other.citation
    assert isinstance(mine, THEIRS[name])


@pytest.mark.parametrize("count", [2, 3, 5])
@pytest.mark.parametrize("name", RANKING)
def test_ranking(name: str, count: int, caplog: pytest.LogCaptureFixture) -> None:
    keywords: list[dict[str, Any]] = [{}, {"scale": 3.0}]
    keywords += [{"similarity_fct": util.dot_score, "scale": 0.5}]
    if "Symmetric" not in name:
        keywords += [
            {"directions": ALL},
            {"directions": ("query_to_doc", "doc_to_query")},
            {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"},
            {"directions": ("query_to_doc", "query_to_query")},
            {"directions": ("doc_to_doc", "query_to_doc")},
            {"hardness_mode": None, "hardness_strength": 5.0},
        ]
    for n in (2, 7, 20):
        embeddings = columns(n, count)
        for k in keywords:
            mine, other = pair(name, **k)
            assert not said(caplog, partial(call(mine), *embeddings))
            check_same(call(mine), call(other), embeddings, slack=4e-6)


def test_a_single_pair() -> None:
    for directions in (("query_to_doc",), ALL):
        mine, other = pair("MultipleNegativesRankingLoss", directions=directions)
        check_same(call(mine), call(other), columns(1, 2))


def test_cached_loss_in_training() -> None:
    """Gradients of the encoder, through the library's GradCache, and of a plain loss."""
    features = [{"input_ids": torch.randn(10, 6)} for _ in range(3)]
    results = []
    for source in (ours, losses):
        for name in ("CachedMultipleNegativesRankingLoss", "MultipleNegativesRankingLoss"):
            torch.manual_seed(5)
            model = Encoder()
            keywords = {"mini_batch_size": 4} if name[0] == "C" else {}
            loss = getattr(source, name)(model, directions=ALL, **keywords)
            value = loss([dict(f) for f in features], None)
            value.backward()
            results.append((value.detach(), model[0].weight.grad, model[0].bias.grad))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_hyperparameters_may_change_later() -> None:
    embeddings = columns(6, 2)
    for name in ("MultipleNegativesRankingLoss", "CachedMultipleNegativesRankingLoss"):
        mine, other = pair(name)
        for loss in (mine, other):
            loss.scale = 2.0
            loss.similarity_fct = util.dot_score
        check_same(call(mine), call(other), embeddings, slack=4e-6)


@pytest.mark.parametrize("name", ["MultipleNegativesRankingLoss", RANKING[0]])
def test_ranking_that_is_handed_over(name: str, caplog: pytest.LogCaptureFixture) -> None:
    embeddings = columns(6, 3)
    for keywords, reason in (
        ({"hardness_mode": "hard_negatives", "hardness_strength": 5.0}, "hard_negatives"),
        ({"hardness_mode": "in_batch_negatives", "hardness_strength": 9.0}, "in_batch"),
        ({"similarity_fct": util.euclidean_sim}, "similarity_fct"),
    ):
        mine, other = pair(name, **keywords)
        assert reason in said(caplog, partial(call(mine), *embeddings))
        torch.testing.assert_close(call(mine)(*embeddings), call(other)(*embeddings))


@pytest.mark.parametrize("name", TRIPLETS)
@pytest.mark.parametrize("metric", ["euclidean_distance", "cosine_distance"])
@pytest.mark.parametrize("margin", [5, 0.2])
def test_triplets(name: str, metric: str, margin: float) -> None:
    mine, other = pair(name, getattr(DISTANCES, metric), margin)
    for labels in (
        torch.randint(4, (24,)),
        torch.tensor([0, 0, 1, 2, 3, 4]),  # anchors without a positive
        torch.arange(6),
        torch.zeros(6, dtype=torch.int64),  # no negative at all
        torch.tensor([[0], [1], [0], [1]]),
    ):
        z = torch.randn(len(labels), 8)
        if labels.ndim == 1:
            z = z + 2 * torch.randn(8, 8)[labels]
        # Theirs takes distances from |x|^2 + |y|^2 - 2 <x, y>, which cancels in float32.
        check_same(call(mine, labels), call(other, labels), [z], slack=2e-5, loss_slack=1e-5)


def test_triplets_that_are_handed_over(caplog: pytest.LogCaptureFixture) -> None:
    z, labels = torch.randn(8, 4), torch.arange(8) % 2
    for name in TRIPLETS:
        mine, other = pair(name, lambda x: torch.cdist(x, x, p=1))
        assert "distance_metric" in said(caplog, partial(call(mine, labels), z))
        torch.testing.assert_close(call(mine, labels)(z), call(other, labels)(z))


@pytest.mark.parametrize("metric", ["COSINE_DISTANCE", "EUCLIDEAN", "MANHATTAN"])
@pytest.mark.parametrize("size_average", [True, False])
def test_contrastive(metric: str, size_average: bool, caplog: pytest.LogCaptureFixture) -> None:
    labels = torch.randint(2, (16,))
    for margin in (0.5, 2.0):
        mine, other = pair("ContrastiveLoss", getattr(METRICS, metric), margin, size_average)
        embeddings = columns(16, 2)
        # torch's pairwise_distance adds 1e-6 to each difference.
        slack = 1e-5 if metric == "EUCLIDEAN" else 4e-6
        check_same(
            call(mine, labels), call(other, labels), embeddings, slack=slack, loss_slack=slack
        )
        handed = said(caplog, partial(call(mine, labels), *embeddings))
        assert ("distance_metric" in handed) == (metric == "MANHATTAN")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        soft = torch.rand(16)
        torch.testing.assert_close(call(mine, soft)(*embeddings), call(other, soft)(*embeddings))


def test_dtypes() -> None:
    embeddings = [x.bfloat16() for x in columns(12, 2)]
    labels = torch.arange(12) % 2
    for name in ours.__all__:
        mine, other = pair(name)
        x = embeddings[:1] if "Triplet" in name else embeddings
        a, b = call(mine, labels)(*x), call(other, labels)(*x)
        truth = call(other, labels)(*(e.double() for e in x))
        assert a.dtype == b.dtype == torch.float32
        assert abs(a - truth) <= abs(b - truth) + 4e-3 * abs(truth)


def test_errors() -> None:
    embeddings, labels = columns(6, 2), torch.arange(6) % 2
    for keywords in (
        {"scale": 0},
        {"directions": ()},
        {"directions": ("doc_to_doc",)},
        {"directions": ("up",)},
        {"partition_mode": "both"},
        {"hardness_mode": "soft"},
    ):
        for name in ("MultipleNegativesRankingLoss", "CachedMultipleNegativesRankingLoss"):
            check_same_error(
                partial(getattr(ours, name), Encoder(), **keywords),
                partial(THEIRS[name], Encoder(), **keywords),
            )
    for name in (*TRIPLETS, "ContrastiveLoss"):
        mine, other = pair(name)
        x = embeddings if name == "ContrastiveLoss" else embeddings[:1]
        check_same_error(partial(call(mine, labels[:4]), *x), partial(call(other, labels[:4]), *x))
    mine, other = pair("MultipleNegativesRankingLoss")
    check_same_error(partial(call(mine), embeddings[0]), partial(call(other), embeddings[0]))


def test_patch() -> None:
    with sslkernels.patch("sentence_transformers"):
        public = peer("sentence_transformers.losses")  # the name before 6, deprecated
        assert public.MultipleNegativesRankingLoss is ours.MultipleNegativesRankingLoss
        assert losses.BatchHardTripletLoss is ours.BatchHardTripletLoss
        assert issubclass(losses.BatchHardTripletLoss, THEIRS["BatchHardTripletLoss"])
    assert losses.MultipleNegativesRankingLoss is THEIRS["MultipleNegativesRankingLoss"]
