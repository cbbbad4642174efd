# SPDX-License-Identifier: Apache-2.0
"""Losses with many positives or all pairs: multi-view NT-Xent, SigLIP, SupCon, uniformity, alignment."""

from __future__ import annotations

import torch
from torch import Tensor

from sslkernels._types import ContrastiveMetrics
from sslkernels.functional import _common as common
from sslkernels.ops.pairwise import pairwise


def nt_xent_multiview(
    views: tuple[Tensor, ...],
    scale: Tensor,
    normalize: bool,
    reduction: str,
    return_metrics: bool,
) -> Tensor | tuple[Tensor, ContrastiveMetrics]:
    """NT-Xent of V >= 2 checked views; see ``nt_xent_loss``.

    Args:
        views: V tensors [N, D].
        scale: 0-d, accumulation dtype: 1 / temperature.
        normalize: Whether to normalise rows first.
        reduction: "mean", "sum" or "none".
        return_metrics: Whether to return ContrastiveMetrics as well; V - 1 passes over the tiles
            count the ranks of as many positives a row.
    """
    v, n = len(views), len(views[0])
    z = common.unit(torch.cat(views), normalize)  # [V * N, D]
    ids = torch.arange(n, device=z.device).repeat(v)
    z_views = z.split(n) if n else (z,) * v
    # Each unordered pair of views once; similarity[a][b] is the column of positives of view a.
    similarity: list[list[Tensor]] = [[] for _ in range(v)]
    for a in range(v):
        for b in range(a + 1, v):
            dot = common.dots(z_views[a], z_views[b])
            similarity[a].append(dot)
            similarity[b].append(dot)
    # columns[c]: [V * N], for every row its c-th positive.
    columns = [torch.cat([similarity[a][c] for a in range(v)]) for c in range(v - 1)]
    threshold = columns[0] * scale if return_metrics else None
    lse, _, rank, _ = pairwise("lse", z, scale=scale, ids_q=ids, threshold_row=threshold)
    losses = [common.nll(lse, column * scale) for column in columns]
    loss = losses[0] if v == 2 else torch.stack(losses).mean(0)
    loss = common.reduce(loss, reduction)
    if not return_metrics:
        return loss
    with torch.no_grad():
        ranks = [rank]
        for column in columns[1:]:
            ranks.append(
                pairwise(
                    "lse", z, scale=scale, ids_q=ids, threshold_row=column * scale
                ).rank_row
            )
        negative = common.mean_negative(z, z, ids, ids)
        return loss, common.metrics(torch.cat(ranks), torch.cat(columns), negative)
