# SPDX-License-Identifier: Apache-2.0
"""Which pairs of a batch and its references are positive or negative, without a matrix of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sslkernels.integrations import _glue as glue
from sslkernels.integrations import _ops as ops

Indices = tuple[Tensor, ...]


def integer_ids(labels: Tensor, ref_labels: Tensor) -> tuple[Tensor, Tensor]:
    """Labels of any dtype as int64, equal where the labels are."""
    if not (labels.is_floating_point() or ref_labels.is_floating_point()):
        return labels.to(torch.int64), ref_labels.to(torch.int64)
    ids = torch.unique(torch.cat((labels, ref_labels)), return_inverse=True)[1]
    return ids[: len(labels)], ids[len(labels) :]


def same_class(ids: Tensor, ref_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """An order of ref_ids [M] in which the class of each id is a run: where it starts, how long."""
    ordered, order = ref_ids.sort(stable=True)
    first = torch.searchsorted(ordered, ids)
    return order, first, torch.searchsorted(ordered, ids, right=True) - first


def positive_pairs(ids: Tensor, ref_ids: Tensor, own: Tensor | None) -> tuple[Tensor, Tensor]:
    """Anchors and positives [P] in the order of rows, without a matrix of them.

    Args:
        ids: [N] int64.
        ref_ids: [M] int64.
        own: [N]: the column that is the anchor itself and does not count; None where there is none.
    """
    order, first, count = same_class(ids, ref_ids)
    anchor = torch.repeat_interleave(torch.arange(len(ids), device=ids.device), count)
    within = torch.arange(len(anchor), device=ids.device) - (count.cumsum(0) - count)[anchor]
    positive = order[first[anchor] + within]
    if own is None:
        return anchor, positive
    keep = positive != own[anchor]
    return anchor[keep], positive[keep]


class _Both:
    """Queries and references as a loss takes them: normalised as the distance says.

    Args:
        distance: Of the loss.
        embeddings: [N, D].
        ref_emb: [M, D].
    """

    def __init__(self, distance: Any, embeddings: Tensor, ref_emb: Tensor) -> None:
        distance.check_shapes(embeddings, ref_emb)
        self.inputs: tuple[Tensor, Tensor] = (embeddings, ref_emb)
        q, k = ops.same_dtype(embeddings, ref_emb)
        if distance.normalize_embeddings:
            q = ops.unit(q)
            k = q if ref_emb is embeddings else ops.unit(k)
        self.q: Tensor = q
        self.k: Tensor = k

    def rounded(self, loss: Tensor) -> Tensor:
        """The loss in the dtype of what was given."""
        return glue.as_peer(loss, *self.inputs)


class Given(_Both):
    """Queries, references, and pairs of them that a miner has chosen.

    Args:
        distance: Of the loss.
        embeddings: [N, D].
        ref_emb: [M, D].
        indices: (anchors, positives, anchors, negatives) or (anchors, positives, negatives).
    """

    def __init__(
        self, distance: Any, embeddings: Tensor, ref_emb: Tensor, indices: Indices
    ) -> None:
        super().__init__(distance, embeddings, ref_emb)
        if len(indices) == 3:
            anchor, positive, negative = indices
            indices = anchor, positive, anchor, negative
        self.indices: tuple[Tensor, ...] = tuple(i.to(embeddings.device) for i in indices)

    def too_few(self) -> bool:
        """At most one positive and one negative pair, which the library takes for none."""
        return all(len(i) <= 1 for i in self.indices)


class Rows(_Both):
    """Queries and references with their ids; the pairs are all there are.

    Args:
        distance: Of the loss.
        embeddings: [N, D].
        labels: [N].
        ref_emb: [M, D].
        ref_labels: [M].
        own: [N] columns of a memory that are the anchors themselves; None otherwise.
    """

    def __init__(
        self,
        distance: Any,
        embeddings: Tensor,
        labels: Tensor,
        ref_emb: Tensor,
        ref_labels: Tensor,
        own: Tensor | None = None,
    ) -> None:
        super().__init__(distance, embeddings, ref_emb)
        self.same: bool = ref_labels is labels and ref_emb is embeddings and own is None
        ids = integer_ids(labels, ref_labels)
        self.ids: Tensor = ids[0]
        self.ref_ids: Tensor = ids[1]
        self.own = own
        if own is None and ref_labels is labels:  # pairs of a row with itself are none
            self.own = torch.arange(len(labels), device=labels.device)

    def positives(self) -> tuple[Tensor, Tensor]:
        """Anchors and positives [P] each."""
        return positive_pairs(self.ids, self.ref_ids, self.own)

    def n_positives(self) -> Tensor:
        """[N] int64: how many positives each anchor has."""
        count = same_class(self.ids, self.ref_ids)[2]
        return count if self.own is None else count - 1

    def any_negative(self) -> bool:
        """Whether some anchor has a reference of another class."""
        every = torch.cat((self.ids, self.ref_ids))
        return bool(len(self.ids) and len(self.ref_ids) and (every != every[0]).any())

    def too_few(self) -> bool:
        """At most one positive and one negative pair, which the library takes for none."""
        if len(self.ids) * len(self.ref_ids) > 4:
            return False
        same = self.ids[:, None] == self.ref_ids
        return int(self.n_positives().sum()) <= 1 and int((~same).sum()) <= 1


def close_negatives(rows: Rows, margin: float) -> tuple[Tensor, Tensor]:
    """Anchors and negatives [P] whose distance may be below the margin, in blocks of anchors."""
    with torch.no_grad():
        q, k = rows.q, rows.k
        limit = (float(margin) + 1e-3) ** 2 if margin > -1e-3 else -1.0
        square_q, square_k = q.square().sum(1, keepdim=True), k.square().sum(1)
        height = max(1, (1 << 22) // max(1, len(k)))
        anchors, negatives = [], []
        for start in range(0, len(q), height):
            part = slice(start, start + height)
            squared = torch.addmm(square_k, q[part], k.T, alpha=-2) + square_q[part]
            # As far as rounding of these squares goes, pairs on the margin are in.
            slack = 8 * torch.finfo(q.dtype).eps * (square_q[part] + square_k)
            near = (squared - slack < limit) & (rows.ids[part, None] != rows.ref_ids)
            i, j = near.nonzero(as_tuple=True)
            anchors.append(i + start)
            negatives.append(j)
        empty = rows.ids[:0]
        return torch.cat([empty, *anchors]), torch.cat([empty, *negatives])
