# SPDX-License-Identifier: Apache-2.0
"""solo-learn's contrastive losses as functions, computed by our ops.

Names, arguments and defaults are those of its repository (tag 1.0.8, which calls itself 1.0.6); the
older release on package indexes has other functions.  Nothing here needs solo-learn.

What is better than the original (docs/migration/solo_learn.md): exponentials cannot overflow, and no
matrix of similarities is written.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sslkernels.functional import byol_loss, info_nce_loss
from sslkernels.integrations import _glue as glue
from sslkernels.integrations import _ops as ops
from sslkernels.integrations import _pairs as pairs
from sslkernels.integrations._patching import Peer
from sslkernels.ops.heads import reduce, softplus

__all__ = ["byol_loss_func", "mocov2plus_loss_func", "mocov3_loss_func", "simclr_loss_func"]


@glue.torch_errors
def simclr_loss_func(z: Tensor, indexes: Tensor, temperature: float = 0.1) -> Tensor:
    """Mean over rows of -log(sum over positives e_ip / sum over all others e_ij).

    For two views that is NT-Xent.  On several ranks the rows of all are references, and the mean is
    over the local rows.

    Args:
        z: [V * N, D], normalised here.
        indexes: [V * N]: rows with the same number are positives of each other.
        temperature: Divides the similarities; of any sign.
    """
    q = ops.unit(z)
    k = ops.gather_rows(q, gradient=True)
    ids, ids_k = pairs.integer_ids(indexes, ops.gather_rows(indexes))
    own = torch.arange(len(q), device=q.device) + len(q) * glue.rank()
    # Negatives from the tiles, positives from their list: neither is a matrix.
    alone = k is q
    negatives = ops.lse(q, None if alone else k, temperature, ids, None if alone else ids_k)
    anchor, positive = pairs.positive_pairs(ids, ids_k, own)
    similar = ops.per_pair(lambda a, b: (a * b).sum(1), q, k, anchor, positive) / temperature
    positives = ops.grouped_lse(similar, anchor, len(q))
    return glue.as_peer(reduce(softplus(negatives - positives), "mean"), z)


@glue.torch_errors
def mocov2plus_loss_func(
    query: Tensor, key: Tensor, queue: Tensor, temperature: Any = 0.1
) -> Tensor:
    """MoCo's InfoNCE of rows that the caller has normalised.

    Args:
        query: [N, D].
        key: [N, D].
        queue: [D, K].
        temperature: Of any sign, or a tensor.
    """
    loss = info_nce_loss(
        query, key, queue.t(), glue.temperature_like(temperature, query), normalize=False
    )
    return glue.as_peer(loss, query, key, queue)


@glue.torch_errors
def mocov3_loss_func(query: Tensor, key: Tensor, temperature: Any = 0.2) -> Tensor:
    """MoCo v3's loss: InfoNCE against the keys of the batch, times 2 * temperature.

    On several ranks the keys of all are references, without gradient.

    Args:
        query: [N, D], normalised here.
        key: [N, D], normalised here.
        temperature: Of any sign, or a tensor.
    """
    tau = glue.temperature_like(temperature, query)
    if glue.world_size() == 1:
        loss: Any = info_nce_loss(query, key, temperature=tau)
    else:
        keys = ops.gather_rows(key)
        ids = torch.arange(len(keys), device=key.device)
        own = ids[len(key) * glue.rank() :][: len(key)]
        loss = info_nce_loss(query, key.detach(), keys, tau, query_ids=own, negative_ids=ids)
    return glue.as_peer(loss * (2 * temperature), query, key)


@glue.torch_errors
def byol_loss_func(p: Tensor, z: Tensor, simplified: bool = True) -> Tensor:
    """BYOL's 2 - 2 cos(p, z), without gradient into z.

    Args:
        p: [..., D] predictions.
        z: [..., D] targets.
        simplified: Of no use: both ways are the same sum.
    """
    p, z = torch.broadcast_tensors(p, z)
    a, b = (x.reshape(-1, x.shape[-1]) for x in (p, z))
    return glue.as_peer(byol_loss(a, b), p, z)


PEER = Peer(
    name="solo_learn",
    package="solo.losses",
    distribution="solo-learn",
    tested=("1.0.6", "1.0.8"),
    swaps={
        f"solo.losses.{module}.{function.__name__}": function
        for module, function in (
            ("simclr", simclr_loss_func),
            ("mocov2plus", mocov2plus_loss_func),
            ("mocov3", mocov3_loss_func),
            ("byol", byol_loss_func),
        )
    },
    install="get it from its repository, tag 1.0.8 (package indexes have an older release)",
)
