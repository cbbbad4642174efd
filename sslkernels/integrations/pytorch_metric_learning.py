# SPDX-License-Identifier: Apache-2.0
"""pytorch-metric-learning's pair and triplet losses, batch-hard miner and memory, by our ops.

These are subclasses of the library's own (tested with 2.9.0 and 2.8.1): distances, reducers,
regularizers, records and argument checks are its, and so is every computation that needs another
distance, given pairs, ``swap`` and the like.  That is handed over, which a log line says once.

What is better than the original (docs/migration/pytorch_metric_learning.md):

* memory grows with N * D and the number of positive pairs; ``NTXentLoss`` there writes a matrix of
  positive pairs times negative pairs;
* hard positives keep their gradient: log(numerator / denominator + tiny) has none once the quotient
  underflows;
* ``CrossBatchMemory`` knows after loading a state dict how far it was filled, and which row is the
  oldest; a call that enqueues nothing leaves it as it is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sslkernels.functional import (
    info_nce_loss,
    nt_xent_loss,
    sup_con_loss,
    triplet_loss,
)
from sslkernels.integrations import _glue as glue
from sslkernels.integrations import _ops as ops
from sslkernels.integrations import _pairs as pairs
from sslkernels.integrations._patching import Peer
from sslkernels.ops.heads import nll

try:
    from pytorch_metric_learning import distances, losses, miners, reducers
    from pytorch_metric_learning.utils import common_functions as c_f
except ModuleNotFoundError as _error:
    raise ModuleNotFoundError(
        "sslkernels.integrations.pytorch_metric_learning: the drop-ins are subclasses of the classes "
        "of pytorch-metric-learning, which can't be imported here "
        f"({_error}); pip install 'sslkernels[pytorch_metric_learning]'"
    ) from _error

__all__ = [
    "BatchHardMiner",
    "ContrastiveLoss",
    "CrossBatchMemory",
    "NTXentLoss",
    "SelfSupervisedLoss",
    "SupConLoss",
    "TripletMarginLoss",
]


# ------------------------------------------------------------------------------- what is handed over


def _why_not(module: Any, kinds: tuple[type, ...], methods: tuple[str, ...] = ()) -> str | None:
    """Why a loss or miner can't be computed here, or None.

    Args:
        module: The loss or miner.
        kinds: Distances that can be computed.
        methods: Of the original, that a subclass may have changed.
    """
    distance = module.distance
    if type(distance) not in kinds:
        return f"distance {type(distance).__name__}"
    if distance.p != 2 or distance.power != 1:
        return f"distance with p={distance.p}, power={distance.power}"
    if module.collect_stats or distance.collect_stats:
        return "collect_stats"
    original = next(c for c in type(module).__mro__ if c.__module__.startswith("pytorch_metric_"))
    for name in methods:
        if getattr(type(module), name) is not getattr(original, name):
            return f"{name} of a subclass"
    return None


def _say(module: Any, why: str) -> None:
    glue.say(f"pytorch_metric_learning {type(module).__name__}", why)


class _Memory:
    """In place of pairs: all pairs of a batch and a memory, but those of a row with its own copy."""

    def __init__(self, own: Tensor | None) -> None:
        self.own = own


_COSINE = (distances.CosineSimilarity, distances.DotProductSimilarity)


# -------------------------------------------------------------------------------------------- losses


class _PairLoss:
    """What the three losses of pairs share; in front of the library's class."""

    _KINDS: tuple[type, ...] = _COSINE
    _METHODS: tuple[str, ...] = ()

    def compute_loss(
        self, embeddings: Any, labels: Any, indices_tuple: Any, ref_emb: Any, ref_labels: Any
    ) -> Any:
        """The library's dictionary of losses."""
        every = indices_tuple is None or isinstance(indices_tuple, _Memory)
        why = self.why_not(every)
        if every and (labels is None or ref_labels is None):
            why = "no labels"
        if why is not None:
            _say(self, why)
            theirs: Any = super()
            return theirs.compute_loss(embeddings, labels, indices_tuple, ref_emb, ref_labels)
        distance = self.distance  # type: ignore[attr-defined]
        if every:
            own = None if indices_tuple is None else indices_tuple.own
            rows = pairs.Rows(distance, embeddings, labels, ref_emb, ref_labels, own)
            return self.zero_losses() if rows.too_few() else self.all_pairs(rows)
        given = pairs.Given(distance, embeddings, ref_emb, indices_tuple)
        return self.zero_losses() if given.too_few() else self.given_pairs(given)

    def why_not(self, every: bool) -> str | None:
        """Why a call with all pairs, or with given ones, is handed over, or None."""
        return _why_not(self, self._KINDS, self._METHODS)

    def zero_losses(self) -> Any:
        """The library's."""
        theirs: Any = super()
        return theirs.zero_losses()

    def all_pairs(self, rows: pairs.Rows) -> Any:
        """Losses of all pairs of embeddings and references."""
        raise NotImplementedError

    def given_pairs(self, given: pairs.Given) -> Any:
        """Losses of pairs that a miner has chosen."""
        raise NotImplementedError


class NTXentLoss(_PairLoss, losses.NTXentLoss):
    """Mean over positive pairs of -log(e_ap / (e_ap + sum over the negatives of a)).

    Args:
        temperature: Divides the similarities.
        kwargs: Those of the library's losses; distances other than cosine and dot product are handed
            over.
    """

    _METHODS = ("_compute_loss", "pair_based_loss")

    def __init__(self, temperature: float = 0.07, **kwargs: Any) -> None:
        super().__init__(temperature, **kwargs)

    def all_pairs(self, rows: pairs.Rows) -> Any:
        """Losses of all pairs of embeddings and references."""
        anchor, positive = rows.positives()
        if not len(anchor) or not rows.any_negative():
            return self.zero_losses()
        k, ids_k = (None, None) if rows.same else (rows.k, rows.ref_ids)
        negatives = ops.lse(rows.q, k, self.temperature, rows.ids, ids_k)
        return self._against(rows, negatives, anchor, positive)

    def given_pairs(self, given: pairs.Given) -> Any:
        """Losses of pairs that a miner has chosen; each anchor has its own negatives."""
        anchor, positive, anchor_n, negative = given.indices
        if not len(anchor) or not len(anchor_n):
            return self.zero_losses()
        similar = ops.per_pair(_dots, given.q, given.k, anchor_n, negative) / self.temperature
        negatives = ops.grouped_lse(similar, anchor_n, len(given.q))
        return self._against(given, negatives, anchor, positive)

    def _against(
        self, rows: pairs.Rows | pairs.Given, negatives: Tensor, anchor: Tensor, positive: Tensor
    ) -> Any:
        similar = ops.per_pair(_dots, rows.q, rows.k, anchor, positive) / self.temperature
        loss = nll(negatives.index_select(0, anchor), similar)
        return _losses(rows.rounded(loss), (anchor, positive), "pos_pair")


class SupConLoss(_PairLoss, losses.SupConLoss):
    """Mean over anchors of log sum over all others - mean over positives.

    Args:
        temperature: Divides the similarities.
        kwargs: As for ``NTXentLoss``.
    """

    _METHODS = ("_compute_loss", "mat_based_loss")

    def __init__(self, temperature: float = 0.1, **kwargs: Any) -> None:
        super().__init__(temperature, **kwargs)

    def all_pairs(self, rows: pairs.Rows) -> Any:
        """Losses of all pairs of embeddings and references."""
        q, k, own = rows.q, rows.k, rows.own
        count = rows.n_positives()
        if not bool((count > 0).any()) or not rows.any_negative():
            return self.zero_losses()
        if rows.same:
            loss = sup_con_loss(
                q,
                rows.ids,
                glue.temperature_like(self.temperature, q),
                normalize=False,
                reduction="none",
            )
            return self._by_anchor(rows, loss)
        sums = ops.class_sums(k, rows.ref_ids, rows.ids)
        ids_q = ids_k = None
        if own is not None:  # an anchor's own copy is no column of it
            sums = sums - k.index_select(0, own)
            ids_q = torch.arange(len(q), device=q.device)
            ids_k = torch.full((len(k),), -1, device=q.device).index_put((own,), ids_q)
        mean = (q * sums).sum(1) / count.clamp(min=1) / self.temperature
        loss = ops.lse(q, k, self.temperature, ids_q, ids_k) - mean
        return self._by_anchor(rows, torch.where(count > 0, loss, 0.0))

    def given_pairs(self, given: pairs.Given) -> Any:
        """Losses of pairs that a miner has chosen; a pair counts once."""
        n, m = len(given.q), len(given.k)
        anchor, positive, anchor_n, negative = given.indices
        if not len(anchor) or not len(anchor_n):
            return self.zero_losses()
        positives = torch.unique(anchor * m + positive)
        every = torch.cat((positives, torch.unique(anchor_n * m + negative)))
        anchors = every // m
        similar = ops.per_pair(_dots, given.q, given.k, anchors, every % m) / self.temperature
        lse = ops.grouped_lse(similar, anchors, n)
        sums = ops.grouped_sum(similar[: len(positives)], anchors[: len(positives)], n)
        count = torch.bincount(anchors[: len(positives)], minlength=n)
        loss = torch.where(count > 0, lse - sums / count.clamp(min=1), 0.0)
        return self._by_anchor(given, loss)

    def _by_anchor(self, rows: pairs.Rows | pairs.Given, loss: Tensor) -> Any:
        return _losses(rows.rounded(loss), c_f.torch_arange_from_size(rows.q), "element")


class ContrastiveLoss(_PairLoss, losses.ContrastiveLoss):
    """max(d - pos_margin, 0) over positive pairs plus max(neg_margin - d, 0) over negative ones.

    Negative pairs farther apart than the margin have loss 0 and are not written.

    Args:
        pos_margin: Distance up to which positive pairs cost nothing.
        neg_margin: Distance from which negative pairs cost nothing.
        kwargs: As for ``NTXentLoss``; distances other than ``LpDistance(p=2)`` are handed over, and
            without given pairs reducers other than the default.
    """

    _KINDS = (distances.LpDistance,)
    _METHODS = ("_compute_loss", "pair_based_loss", "get_per_pair_loss", "pos_calc", "neg_calc")

    def __init__(self, pos_margin: float = 0, neg_margin: float = 1, **kwargs: Any) -> None:
        super().__init__(pos_margin, neg_margin, **kwargs)

    def why_not(self, every: bool) -> str | None:
        """Why a call with all pairs, or with given ones, is handed over, or None."""
        reducer = self.reducer
        if every and type(reducer) is not reducers.MultipleReducers:
            return f"reducer {type(reducer).__name__}"
        for each in reducer.reducers.values() if every else ():
            if type(each) is not reducers.AvgNonZeroReducer or each.collect_stats:
                return f"reducer {type(each).__name__}"
        return super().why_not(every)

    def all_pairs(self, rows: pairs.Rows) -> Any:
        """Losses of all pairs of embeddings and references that may cost something."""
        return self._both(rows, rows.positives(), pairs.close_negatives(rows, self.neg_margin))

    def given_pairs(self, given: pairs.Given) -> Any:
        """Losses of pairs that a miner has chosen."""
        return self._both(given, given.indices[:2], given.indices[2:])

    def _both(
        self, rows: pairs.Rows | pairs.Given, positives: pairs.Indices, negatives: pairs.Indices
    ) -> Any:
        found: dict[str, Any] = {}
        for name, (i, j), margin, sign in (
            ("pos", positives, self.pos_margin, 1),
            ("neg", negatives, self.neg_margin, -1),
        ):
            loss: Tensor | int = 0
            if len(i):
                distance = ops.per_pair(_distances, rows.q, rows.k, i, j)
                loss = rows.rounded((sign * (distance - margin)).relu())
            found |= _losses(loss, (i, j), f"{name}_pair", f"{name}_loss")
        return found


class TripletMarginLoss(losses.TripletMarginLoss):
    """max(d(a, p) - d(a, n) + margin, 0) over all triplets, or over given ones (from a miner).

    All triplets of a batch are never written: O(N^2 log N) time and O(N * D) memory.

    Args:
        margin: Added to the difference of the distances.
        swap: Handed over.
        smooth_loss: Handed over.
        triplets_per_anchor: "all"; a number is handed over.
        kwargs: As for ``NTXentLoss``; reducers other than ``AvgNonZeroReducer``, ``MeanReducer`` and
            ``SumReducer`` are handed over for all triplets.
    """

    def __init__(
        self,
        margin: float = 0.05,
        swap: bool = False,
        smooth_loss: bool = False,
        triplets_per_anchor: Any = "all",
        **kwargs: Any,
    ) -> None:
        super().__init__(margin, swap, smooth_loss, triplets_per_anchor, **kwargs)

    def compute_loss(
        self, embeddings: Any, labels: Any, indices_tuple: Any, ref_emb: Any, ref_labels: Any
    ) -> Any:
        """The library's dictionary of losses, one for each given triplet, or reduced."""
        why = self.why_not(labels, indices_tuple, ref_emb, embeddings)
        if why is not None:
            _say(self, why)
            return super().compute_loss(embeddings, labels, indices_tuple, ref_emb, ref_labels)
        self.distance.check_shapes(embeddings, ref_emb)
        if indices_tuple is not None:
            return self._given(embeddings, indices_tuple, ref_emb)
        cosine = type(self.distance) in _COSINE
        ids = pairs.integer_ids(labels, labels)[0]
        loss = triplet_loss(
            embeddings,
            ids,
            self.margin,
            mining="all",
            normalize=self.distance.normalize_embeddings,
            distance="cosine" if cosine else "euclidean",
            reduction=_REDUCTIONS[type(self.reducer)],
        )
        return _losses(glue.as_peer(loss, embeddings), None, "already_reduced")

    def _given(self, embeddings: Tensor, triplets: Any, ref_emb: Tensor) -> Any:
        anchor, positive, negative = triplets
        if not len(anchor):
            return self.zero_losses()
        same = ref_emb is embeddings
        q, k = ops.same_dtype(embeddings, ref_emb)
        if self.distance.normalize_embeddings:
            q = ops.unit(q)
            k = q if same else ops.unit(k)
        difference = ops.per_pair(_distances, q, k, anchor, positive) - ops.per_pair(
            _distances, q, k, anchor, negative
        )
        loss = glue.as_peer((difference + self.margin).relu(), embeddings, ref_emb)
        return _losses(loss, triplets, "triplet")

    def why_not(self, labels: Any, indices_tuple: Any, ref_emb: Any, embeddings: Any) -> str | None:
        """Why a call is handed over, or None."""
        if self.swap or self.smooth_loss:
            return "swap" if self.swap else "smooth_loss"
        if indices_tuple is not None:
            return _why_not(self, (distances.LpDistance,)) if len(indices_tuple) == 3 else "pairs"
        if labels is None:
            return "no labels"
        if ref_emb is not embeddings:
            return "ref_emb"
        if self.triplets_per_anchor != "all":
            return "triplets_per_anchor"
        if type(self.reducer) not in _REDUCTIONS or self.reducer.collect_stats:
            return f"reducer {type(self.reducer).__name__}"
        return _why_not(self, (distances.LpDistance, distances.CosineSimilarity))


_REDUCTIONS = {
    reducers.AvgNonZeroReducer: "mean_nonzero",
    reducers.MeanReducer: "mean",
    reducers.SumReducer: "sum",
}


def _dots(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(1)


def _distances(a: Tensor, b: Tensor) -> Tensor:
    return torch.linalg.vector_norm(a - b, dim=1)


def _losses(losses: Any, indices: Any, kind: str, name: str = "loss") -> dict[str, Any]:
    return {name: {"losses": losses, "indices": indices, "reduction_type": kind}}


# --------------------------------------------------------------------------------- miner and wrappers


class BatchHardMiner(miners.BatchHardMiner):
    """For each anchor its farthest positive and its nearest negative, without the distances [N, M].

    Args:
        kwargs: Those of the library; allowed ranges and other distances are handed over.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)

    def mine(self, embeddings: Any, labels: Any, ref_emb: Any, ref_labels: Any) -> Any:
        """(anchors, positives, negatives), of the anchors that have both."""
        why = _why_not(self, (distances.LpDistance, *_COSINE), ("get_x_per_row",))
        if self.allowed_pos_range is not None or self.allowed_neg_range is not None:
            why = "an allowed range"
        if why is None and (ref_labels is labels) != (ref_emb is embeddings):
            why = "labels without embeddings of their own"
        if why is not None:
            _say(self, why)
            return super().mine(embeddings, labels, ref_emb, ref_labels)
        rows = pairs.Rows(self.distance, embeddings, labels, ref_emb, ref_labels)
        k = None if rows.same else rows.k
        cosine = self.distance.is_inverted or self.distance.normalize_embeddings
        positive, negative = ops.farthest_and_nearest(
            rows.q, k, rows.ids, None if k is None else rows.ref_ids, cosine=cosine
        )
        anchor = ((positive >= 0) & (negative >= 0)).nonzero()[:, 0]
        return anchor, positive[anchor], negative[anchor]


class SelfSupervisedLoss(losses.SelfSupervisedLoss):
    """A loss of two views, without labels.

    Args:
        loss: Of the embeddings.
        symmetric: Whether both views are anchors.
        kwargs: Those of the library.
    """

    def __init__(self, loss: Any, symmetric: bool = True, **kwargs: Any) -> None:
        super().__init__(loss, symmetric, **kwargs)

    def forward(self, embeddings: Any, ref_emb: Any) -> Any:
        """0-d loss of two views [N, D]."""
        loss = self.loss
        if (
            type(loss) is not NTXentLoss
            or type(loss.reducer) is not reducers.MeanReducer
            or loss.embedding_regularizer is not None
            or loss.reducer.collect_stats
            or embeddings.shape != ref_emb.shape
            or loss.why_not(True) is not None
        ):
            return super().forward(embeddings, ref_emb)
        temperature = glue.temperature_like(loss.temperature, embeddings)
        function = nt_xent_loss if self.symmetric else info_nce_loss
        normalize = loss.distance.normalize_embeddings
        loss.distance.check_shapes(embeddings, ref_emb)
        loss = function(embeddings, ref_emb, temperature=temperature, normalize=normalize)
        return glue.as_peer(loss, embeddings, ref_emb)


class CrossBatchMemory(losses.CrossBatchMemory):
    """A loss of a batch against the last embeddings.

    The state dict has the library's keys.  A memory that is full is saved from its oldest row on, so
    that its content says where to go on: at the first empty row, or else at the first row.

    Args:
        loss: One that takes references.
        embedding_size: D.
        memory_size: K.
        miner: Called with the memory as references.
        kwargs: Those of the library.
    """

    def __init__(
        self,
        loss: Any,
        embedding_size: int,
        memory_size: int = 1024,
        miner: Any = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(loss, embedding_size, memory_size, miner, **kwargs)

    def add_to_memory(self, embeddings: Any, labels: Any, batch_size: int) -> None:
        """Write a batch; one of no rows changes nothing."""
        if batch_size:
            super().add_to_memory(embeddings, labels, batch_size)
        else:
            self.curr_batch_idx: Tensor = torch.arange(0, device=labels.device)

    def create_indices_tuple(
        self,
        embeddings: Any,
        labels: Any,
        E_mem: Any,
        L_mem: Any,
        input_indices_tuple: Any,
        do_remove_self_comparisons: bool,
    ) -> Any:
        """Pairs or triplets of the batch and the memory; a marker where the loss needs no list."""
        every = self.miner is None and input_indices_tuple is None
        loss = self.loss
        if every and type(loss) in (NTXentLoss, SupConLoss, ContrastiveLoss):
            if loss.why_not(True) is None:
                return _Memory(self.curr_batch_idx if do_remove_self_comparisons else None)
        return super().create_indices_tuple(
            embeddings, labels, E_mem, L_mem, input_indices_tuple, do_remove_self_comparisons
        )

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.has_been_filled and self.queue_idx:
            for name in ("embedding_memory", "label_memory"):
                kept = destination[prefix + name]
                destination[prefix + name] = kept.roll(-self.queue_idx, 0)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        if prefix + "embedding_memory" in state_dict:
            written = self.embedding_memory.any(1).nonzero()
            filled = int(written[-1]) + 1 if len(written) else 0
            self.has_been_filled: bool = filled == self.memory_size
            self.queue_idx: int = filled % self.memory_size


PEER = Peer(
    name="pytorch_metric_learning",
    package="pytorch_metric_learning",
    distribution="pytorch-metric-learning",
    tested=("2.9.0", "2.8.1"),
    swaps={
        "pytorch_metric_learning.losses.ntxent_loss.NTXentLoss": NTXentLoss,
        "pytorch_metric_learning.losses.supcon_loss.SupConLoss": SupConLoss,
        "pytorch_metric_learning.losses.contrastive_loss.ContrastiveLoss": ContrastiveLoss,
        "pytorch_metric_learning.losses.triplet_margin_loss.TripletMarginLoss": TripletMarginLoss,
        "pytorch_metric_learning.losses.cross_batch_memory.CrossBatchMemory": CrossBatchMemory,
        "pytorch_metric_learning.losses.self_supervised_loss.SelfSupervisedLoss": SelfSupervisedLoss,
        "pytorch_metric_learning.miners.batch_hard_miner.BatchHardMiner": BatchHardMiner,
    },
)
