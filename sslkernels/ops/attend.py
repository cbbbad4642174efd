# SPDX-License-Identifier: Apache-2.0
"""Row log-sum-exp over keys that need no gradient as one torch op, ``attend``.

    lse_i = log sum_j exp(S_ij),    mean_key_i = sum_j softmax_j(S_i:) k_j
    d lse_i / d q_i = scale * mean_key_i,    d lse_i / d scale = <q_i, mean_key_i>

Both come from one pass in the forward, so nothing of the keys is kept for backward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sslkernels.backends.arithmetic import fixed_sum
from sslkernels.backends.interface import Attend, Tiles
from sslkernels.ops import registry
from sslkernels.ops._library import Gradient, Op, no_autocast


def _forward(tiles: Tiles, threshold: Tensor | None) -> Attend:
    with no_autocast(tiles.q.device):
        result: Attend = registry.resolve(tiles.q.device).attend(tiles, threshold)
    return result


def _fake(tiles: Tiles, threshold: Tensor | None) -> Attend:
    q, n = tiles.q, tiles.n
    return Attend(
        q.new_empty((n,), dtype=tiles.acc),
        q.new_empty(q.shape, dtype=tiles.acc),
        q.new_empty((0 if threshold is None else n,), dtype=torch.int64),
    )


def _save(tiles: Tiles, threshold: Any, out: Attend) -> Any:
    return tiles.q, tiles.scale, out.mean_key  # nothing of the keys


def _gradient(
    q: Tensor, scale: Tensor, mean_key: Tensor, dlse: Tensor, need: Tiles, _: Any
) -> dict[str, Tensor]:
    if need.k:
        _no_gradient_of_keys()
    weighted = mean_key * dlse[:, None]
    found = {}
    if need.q:
        found["q"] = (weighted * scale).to(q.dtype)
    if need.scale:
        found["scale"] = fixed_sum((weighted * q.to(weighted.dtype)).sum(1))
    return found


def _tangent(
    q: Tensor, scale: Tensor, mean_key: Tensor, tangents: Tiles | None, _: Any
) -> tuple[Tensor | None]:
    total = torch.zeros_like(mean_key[:, 0])
    if tangents is None:
        return (total,)
    if tangents.k is not None:
        _no_gradient_of_keys()
    if tangents.q is not None:
        total = total + scale * (mean_key * tangents.q.to(mean_key.dtype)).sum(1)
    if tangents.scale is not None:
        total = total + tangents.scale * (mean_key * q.to(mean_key.dtype)).sum(1)
    return (total,)


def _no_gradient_of_keys() -> None:
    raise RuntimeError(
        "sslkernels::attend: the keys get no gradient, pass k.detach() "
        "(or use sslkernels::pairwise, whose keys do)"
    )


ATTEND = Op(
    "attend(*Tiles, Tensor? threshold) -> Attend",
    _forward,
    _fake,
    gradient=Gradient(("q", "k", "scale"), ("lse",), _save, _gradient, _tangent),
)


def attend(tiles: Tiles, threshold: Tensor | None = None) -> Attend:
    """Row LSE over keys that need no gradient; its gradient is finished in the forward pass.

    Nothing of k is kept for backward, so k may be overwritten right after the call.
    Differentiable once in q and scale, through ``lse``.

    Args:
        tiles: What S is, with k given and not requiring grad, without bias.
        threshold: [N]; ``rank`` counts the allowed j with S_ij above it.

    Returns:
        Attend(lse, mean_key, rank).

    Raises:
        ValueError: If k is None or there is a bias.
    """
    if tiles.k is None or tiles.bias is not None:
        raise ValueError("attend: k must be given and bias must be None")
    result: Attend = ATTEND(tiles, None if threshold is None else threshold.detach())
    return result
