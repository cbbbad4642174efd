# SPDX-License-Identifier: Apache-2.0
"""sentence-transformers' ranking, triplet and contrastive losses, computed by our ops.

These are subclasses of the library's own (tested with 6.2.0): models, features, GradCache and
configuration are its.  What is handed over to it is logged once for each reason
(docs/migration/sentence_transformers.md): hardness weights, other similarities and distances.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import Tensor

from sslkernels.functional import contrastive_loss, triplet_loss
from sslkernels.integrations import _glue as glue
from sslkernels.integrations import _ops as ops
from sslkernels.integrations._patching import Peer
from sslkernels.ops.heads import nll, reduce

try:
    from sentence_transformers import util
    from sentence_transformers.sentence_transformer import losses
except ModuleNotFoundError as _error:
    raise ModuleNotFoundError(
        "sslkernels.integrations.sentence_transformers: the drop-ins are subclasses of the classes of "
        f"sentence-transformers, which can't be imported here ({_error}); "
        "pip install 'sslkernels[sentence_transformers]'"
    ) from _error

__all__ = [
    "BatchAllTripletLoss",
    "BatchHardTripletLoss",
    "BatchSemiHardTripletLoss",
    "CachedMultipleNegativesRankingLoss",
    "CachedMultipleNegativesSymmetricRankingLoss",
    "ContrastiveLoss",
    "MultipleNegativesRankingLoss",
    "MultipleNegativesSymmetricRankingLoss",
]

_DISTANCES = losses.BatchHardTripletLossDistanceFunction
_METRICS = losses.SiameseDistanceMetric


def _say(module: Any, why: str) -> None:
    glue.say(f"sentence_transformers {type(module).__name__}", why)


# ------------------------------------------------------------------------------------------- ranking


def _ranking_why_not(loss: Any, embeddings: list[Tensor]) -> str | None:
    """Why the library computes a ranking loss, or None."""
    if loss.similarity_fct not in (util.cos_sim, util.pytorch_cos_sim, util.dot_score):
        return f"similarity_fct {getattr(loss.similarity_fct, '__name__', loss.similarity_fct)!r}"
    if loss.hardness_mode is not None and loss.hardness_strength > 0:
        return f"hardness_mode {loss.hardness_mode!r}"
    if any(x.layout != torch.strided or x.ndim != 2 for x in embeddings):
        return "embeddings that are no dense matrices"
    return None


def _ranking(loss: Any, embeddings: list[Tensor]) -> Tensor:
    """Mean over queries of log_z - positive, the similarities never in memory.

    The positive stays out of the tiles, which keeps the loss of aligned pairs accurate.

    Args:
        loss: With the hyperparameters.
        embeddings: Queries, positives and any number of hard negatives, [N, D] each.
    """
    wide = torch.float32
    for x in embeddings:
        wide = torch.promote_types(wide, x.dtype)
    normalize = loss.similarity_fct is not util.dot_score
    local = [ops.unit(x.to(wide)) if normalize else x.to(wide) for x in embeddings]
    gather = loss.gather_across_devices
    everyone = [ops.gather_rows(x, gradient=True) if gather else x for x in local]
    n, world, device = len(local[0]), len(everyone[0]), local[0].device
    own = torch.arange(n, device=device) + (n * glue.rank() if gather else 0)
    all_ids = torch.arange(world, device=device)
    q, d = local[:2]
    queries, docs = everyone[0], torch.cat(everyone[1:])
    positive = (q * d).sum(1) * loss.scale

    def lse(x: Tensor, keys: Tensor, ids: Tensor) -> Tensor:
        return ops.lse(x, keys, 1 / loss.scale, own, ids)

    terms = []  # log-sum-exp of the negatives of each direction
    for direction in loss.directions:
        if direction == "query_to_doc":  # hard negatives of the query itself count
            hard = all_ids.new_full((len(docs) - world,), -1)
            terms.append(lse(q, docs, torch.cat((all_ids, hard))))
        elif direction == "query_to_query":
            terms.append(lse(q, queries, all_ids))
        elif direction == "doc_to_query":
            terms.append(lse(d, queries, all_ids))
        else:
            terms.append(lse(d, docs, all_ids.repeat(len(embeddings) - 1)))
    if loss.partition_mode == "per_direction":
        return torch.stack([nll(term, positive) for term in terms]).mean()
    # The positive is in both directions between queries and documents, if both are there.
    times = math.log(1 + ("doc_to_query" in loss.directions))
    joint = torch.logsumexp(torch.stack(terms), 0) if len(terms) > 1 else terms[0]
    return (times + nll(joint, positive + times)).mean()


class MultipleNegativesRankingLoss(losses.MultipleNegativesRankingLoss):
    """InfoNCE of queries against documents, in any of the library's directions; its arguments."""

    def compute_loss_from_embeddings(self, embeddings: list[Tensor], labels: Any) -> Any:
        """0-d loss of queries, positives and hard negatives [N, D]."""
        why = _ranking_why_not(self, embeddings)
        if why is not None or len(embeddings) < 2:
            if why is not None:
                _say(self, why)
            return super().compute_loss_from_embeddings(embeddings, labels)
        return _ranking(self, embeddings)


class CachedMultipleNegativesRankingLoss(losses.CachedMultipleNegativesRankingLoss):
    """The same with the library's GradCache; the loss itself needs no mini-batches."""

    def calculate_loss(
        self, reps: list[list[Tensor]], labels: Any = None, *, with_backward: bool = False
    ) -> Any:
        """0-d loss of embeddings in mini-batches; with its gradients if ``with_backward``."""
        embeddings = [torch.cat(columns) for columns in reps]
        why = _ranking_why_not(self.loss, embeddings)
        if why is not None:
            _say(self, why)
            return super().calculate_loss(reps, labels, with_backward=with_backward)
        loss = _ranking(self.loss, embeddings)
        if with_backward:
            loss.backward()
            loss = loss.detach()
        return loss


with warnings.catch_warnings():  # the library deprecates them, and says so of subclasses too
    warnings.simplefilter("ignore", DeprecationWarning)

    class MultipleNegativesSymmetricRankingLoss(
        MultipleNegativesRankingLoss, losses.MultipleNegativesSymmetricRankingLoss
    ):
        """The mean of query to document and document to query; the library's arguments."""

    class CachedMultipleNegativesSymmetricRankingLoss(
        CachedMultipleNegativesRankingLoss, losses.CachedMultipleNegativesSymmetricRankingLoss
    ):
        """The same with the library's GradCache."""


# ------------------------------------------------------------------------------------------ triplets


def _distance(module: Any, labels: Tensor, embeddings: Tensor) -> str | None:
    """The distance where the triplets can be computed here; None is handed over."""
    names = {
        _DISTANCES.euclidean_distance: "euclidean",
        _DISTANCES.eucledian_distance: "euclidean",
        _DISTANCES.cosine_distance: "cosine",
    }
    name = names.get(module.distance_metric)
    if labels.numel() != len(embeddings):
        return None  # the library says what is wrong
    if name is None:
        _say(module, "distance_metric")
    elif labels.is_floating_point():
        _say(module, "labels that are no integers")
        return None
    return name


class BatchHardTripletLoss(losses.BatchHardTripletLoss):
    """The farthest positive and the nearest negative of each anchor; the library's arguments."""

    def batch_hard_triplet_loss(self, labels: Tensor, embeddings: Tensor) -> Any:
        """0-d: the mean over all anchors.

        One without a positive has it at distance 0; without any negative the loss is the margin.
        """
        distance = _distance(self, labels, embeddings)
        if distance is None:
            return super().batch_hard_triplet_loss(labels, embeddings)
        cosine = distance == "cosine"
        z = embeddings.to(torch.promote_types(embeddings.dtype, torch.float32))
        z = ops.unit(z) if cosine else z
        positive, negative = ops.farthest_and_nearest(
            z, None, labels.view(-1).long(), None, cosine=cosine
        )
        near, far = (
            ops.per_pair(
                ops.one_minus_dot if cosine else ops.euclidean,
                z,
                z,
                torch.arange(len(z), device=z.device),
                index.clamp(min=0),
            )
            for index in (positive, negative)
        )
        near = torch.where(positive >= 0, near, 0.0)
        far = torch.where(negative >= 0, far, near)
        return (near - far + self.triplet_margin).relu().mean()


class BatchAllTripletLoss(losses.BatchAllTripletLoss):
    """All triplets with a loss; the library's arguments."""

    def batch_all_triplet_loss(self, labels: Tensor, embeddings: Tensor) -> Any:
        """0-d: the mean over the triplets whose loss is above 0."""
        distance = _distance(self, labels, embeddings)
        if distance is None:
            return super().batch_all_triplet_loss(labels, embeddings)
        loss = triplet_loss(
            embeddings,
            labels.view(-1).long(),
            self.triplet_margin,
            mining="all",
            distance=distance,
            reduction="mean_nonzero",
        )
        return loss


class BatchSemiHardTripletLoss(losses.BatchSemiHardTripletLoss):
    """For each positive the nearest negative that is farther, or the farthest; its arguments."""

    def batch_semi_hard_triplet_loss(self, labels: Tensor, embeddings: Tensor) -> Any:
        """0-d: the mean over the positive pairs."""
        distance = _distance(self, labels, embeddings)
        ids = labels.view(-1)
        if distance is not None and not bool((ids != ids[:1]).any()):
            _say(self, "a single class")
            distance = None
        if distance is None:
            return super().batch_semi_hard_triplet_loss(labels, embeddings)
        loss = triplet_loss(
            embeddings, ids.long(), self.margin, mining="semihard", distance=distance
        )
        return loss


# --------------------------------------------------------------------------------------------- pairs


class ContrastiveLoss(losses.ContrastiveLoss):
    """d^2 / 2 for pairs of label 1, max(margin - d, 0)^2 / 2 for label 0; the library's arguments."""

    def compute_loss_from_embeddings(self, embeddings: list[Tensor], labels: Tensor) -> Any:
        """0-d: the mean over pairs, or the sum."""
        cosine = self.distance_metric is _METRICS.COSINE_DISTANCE
        a = embeddings[0]
        fits = len(embeddings) == 2 and labels.numel() == len(a)
        known = cosine or self.distance_metric is _METRICS.EUCLIDEAN
        ids = labels.view(-1)
        if not fits or not known or bool((ids.ne(0) & ids.ne(1)).any()):
            if fits:
                _say(self, "labels other than 0 and 1" if known else "distance_metric")
            return super().compute_loss_from_embeddings(embeddings, labels)
        self._checked_labels = True
        reduction: Any = "mean" if self.size_average else "sum"
        a, b = embeddings
        same = ids != 0
        if cosine:
            distance = ops.cosine_distance(a, b)
            short = (self.margin - distance).relu()
            loss = reduce(torch.where(same, distance, short).square() / 2, reduction)
        else:
            loss = contrastive_loss(a, b, same, self.margin, reduction=reduction)
        return loss


_PATH = "sentence_transformers.sentence_transformer.losses"
PEER = Peer(
    name="sentence_transformers",
    package="sentence_transformers",
    distribution="sentence-transformers",
    tested=("6.2.0",),
    swaps={
        f"{_PATH}.{module}.{cls.__name__}": cls
        for module, cls in (
            ("multiple_negatives_ranking", MultipleNegativesRankingLoss),
            ("multiple_negatives_symmetric_ranking", MultipleNegativesSymmetricRankingLoss),
            ("cached_multiple_negatives_ranking", CachedMultipleNegativesRankingLoss),
            (
                "cached_multiple_negatives_symmetric_ranking",
                CachedMultipleNegativesSymmetricRankingLoss,
            ),
            ("batch_hard_triplet", BatchHardTripletLoss),
            ("batch_all_triplet", BatchAllTripletLoss),
            ("batch_semi_hard_triplet", BatchSemiHardTripletLoss),
            ("contrastive", ContrastiveLoss),
        )
    },
)
