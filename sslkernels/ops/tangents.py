# SPDX-License-Identifier: Apache-2.0
"""Forward-mode derivatives of the tiles in plain torch, in blocks of rows: any device, O((N + M) * D).

With dS_ij = scale * (<dq_i, k_j> + <q_i, dk_j>) + dscale * <q_i, k_j> + dbias,

    d row_i = sum_j W_ij dS_ij,     W_ij = exp(S_ij - row_i) (lse)  or  sigmoid(S_ij) (softplus)
"""

from __future__ import annotations

import torch
from torch import Tensor

from sslkernels.backends.arithmetic import NEG_INF, finite, row_blocks
from sslkernels.backends.interface import Kind, Tiles
from sslkernels.ops._library import no_autocast


def tile_tangent(
    kind: Kind, tiles: Tiles, tangents: Tiles, row: Tensor, col: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Tangents of the row (and column) reductions of ``pairwise``.

    Args:
        kind: "lse" or "softplus".
        tiles: What S is.
        tangents: Those of q, k, scale and bias; None where one has none.
        row: [N] the reductions themselves.
        col: [M] or None: columns are not reduced.
    """
    acc = tiles.acc
    q = tiles.q.to(acc)
    k = q if tiles.k is None else tiles.k.to(acc)
    dq = torch.zeros_like(q) if tangents.q is None else tangents.q.to(acc)
    dk = dq if tiles.k is None else tangents.k
    of_rows, of_columns = [], row.new_zeros(0 if col is None else tiles.m)
    # Nothing is written in place: vmap may have batched any of these.
    with no_autocast(q.device):
        for rows in row_blocks(tiles.n, tiles.m, q.shape[1]):
            dot = q[rows] @ k.T
            ds = dq[rows] @ k.T
            if dk is not None:
                ds = ds + q[rows] @ dk.to(acc).T
            ds = ds * tiles.scale
            if tangents.scale is not None:
                ds = ds + tangents.scale * dot
            if tangents.bias is not None:
                ds = ds + tangents.bias
            s = dot * tiles.scale if tiles.bias is None else dot * tiles.scale + tiles.bias
            mask = tiles.excluded(rows)
            s = s if mask is None else s.masked_fill(mask, NEG_INF)
            to_rows = s.sigmoid() if kind == "softplus" else (s - finite(row[rows])[:, None]).exp()
            of_rows.append((to_rows * ds).sum(1))
            if col is not None:
                to_columns = to_rows if kind == "softplus" else (s - finite(col)).exp()
                of_columns = of_columns + (to_columns * ds).sum(0)
    return torch.cat(of_rows) if of_rows else torch.zeros_like(row), of_columns
