# SPDX-License-Identifier: Apache-2.0
"""Types that several layers share."""

from __future__ import annotations

from typing import Literal, NamedTuple

from torch import Tensor

Reduction = Literal["mean", "sum", "none"]


class ContrastiveMetrics(NamedTuple):
    """How well a batch solves its contrastive task; 0-d tensors, no host sync, no gradient.

    The rank of a positive is the number of its negatives that are strictly more similar.
    """

    top1: Tensor  # mean over positives of (rank < 1)
    top5: Tensor  # mean over positives of (rank < 5)
    positive_similarity: Tensor  # mean <q, k> over positive pairs, without temperature
    negative_similarity: Tensor  # the same over allowed negative pairs; 0 when there are none
