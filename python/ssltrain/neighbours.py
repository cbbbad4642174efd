# SPDX-License-Identifier: Apache-2.0
"""Nearest neighbours by cosine similarity, in blocks: there is no matrix of all pairs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 512  # queries whose similarities are held at a time


def nearest(
    queries: Tensor, bank: Tensor, count: int, *, leave_out_self: bool = False
) -> tuple[Tensor, Tensor]:
    """The most similar rows of a bank.

    Args:
        queries: features [N, F].
        bank: features [M, F].
        count: how many to find, at most M (M - 1 without self).
        leave_out_self: whether query i is row i of the bank, which does not count.

    Returns:
        Similarities float32 [N, count], greatest first, and rows of the bank int64 [N, count].
    """
    keys = F.normalize(bank.float(), dim=1)
    similarities, rows = [], []
    for begin in range(0, len(queries), BLOCK):
        block = F.normalize(queries[begin : begin + BLOCK].float(), dim=1) @ keys.T
        if leave_out_self:
            own = torch.arange(len(block), device=block.device)
            block[own, own + begin] = -torch.inf
        best, found = block.topk(count, dim=1)
        similarities.append(best)
        rows.append(found)
    if not rows:
        return queries.new_zeros(0, count), torch.zeros(0, count, dtype=torch.int64)
    return torch.cat(similarities), torch.cat(rows)


def vote(similarities: Tensor, labels: Tensor) -> Tensor:
    """The class that neighbours agree on, each with the weight 1 / (1 - similarity).

    Args:
        similarities: [N, K].
        labels: int64 [N, K], the classes of the neighbours, from 0.

    Returns:
        int64 [N]; the lowest class of those with equal votes.
    """
    # Of neighbours in the same place, rounding must not make one count a thousand times more.
    weights = 1 / (1 - similarities.double()).clamp_min(1e-6)
    votes = torch.zeros(
        len(labels),
        int(labels.max()) + 1 if labels.numel() else 1,
        dtype=torch.float64,
        device=labels.device,
    )
    return votes.scatter_add_(1, labels, weights).argmax(dim=1)
