# SPDX-License-Identifier: Apache-2.0
"""The tile engine by its definition, on dense matrices, and inputs for it."""

from __future__ import annotations

import torch
from torch import Tensor

NEG_INF = float("-inf")
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def dense(
    kind: str,
    q: Tensor,
    k: Tensor | None,
    scale: Tensor,
    bias: Tensor | None = None,
    ids_q: Tensor | None = None,
    ids_k: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Row and column reductions and S by the definition; halves in float32."""
    acc = torch.promote_types(q.dtype, torch.float32)
    k = q if k is None else k
    s = q.to(acc) @ k.to(acc).T * scale.to(acc)
    s = s if bias is None else s + bias.to(acc)
    if ids_q is not None:
        s = s.masked_fill(ids_q[:, None] == (ids_q if ids_k is None else ids_k), NEG_INF)

    def reduce(x: Tensor) -> Tensor:
        if kind == "softplus":
            return torch.logaddexp(x, torch.zeros_like(x)).sum(1)
        nothing = (x == NEG_INF).all(1)
        lse = torch.logsumexp(x.masked_fill(nothing[:, None], 0.0), 1)
        return lse.masked_fill(nothing, NEG_INF)

    return reduce(s), reduce(s.T), s


def make(n: int, m: int, d: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """q and k of about unit rows; some keys equal some queries, so that the tiles matter."""
    generator = torch.Generator().manual_seed(n * 7919 + m * 31 + d)
    q = torch.randn(n, d, generator=generator) / d**0.5
    k = torch.randn(m, d, generator=generator) / d**0.5
    planted = min(n, m)
    k[: planted // 2] = q[: planted // 2]
    return q.to(dtype), k.to(dtype)


def ids_for(n: int, m: int, how: str) -> tuple[Tensor | None, Tensor | None]:
    """No ids; the pairs on the diagonal; many duplicates, among them rows with nothing allowed."""
    if how == "none":
        return None, None
    if how == "diagonal":
        return torch.arange(n), torch.arange(m)
    ids_q, ids_k = torch.arange(n) % 3, torch.arange(m) % 5
    if m > 2:
        ids_k[ids_k == 2] = 1
    return ids_q, ids_k if n % 2 else torch.zeros_like(ids_k)


def scalars(dtype: torch.dtype, scale: float, bias: float | None = None) -> list[Tensor]:
    """0-d tensors of the accumulation dtype."""
    acc = torch.promote_types(dtype, torch.float32)
    return [torch.tensor(x, dtype=acc) for x in (scale, bias) if x is not None]


def weights(*sizes: int) -> list[Tensor]:
    """Non-uniform incoming gradients."""
    return [torch.linspace(-1.0, 2.0, size) for size in sizes]


def weighted(values: list[Tensor]) -> Tensor:
    """A scalar that gives each output another gradient; rows with nothing (-inf) take no part."""
    total = values[0].new_zeros(())
    for value, weight in zip(values, weights(*(len(v) for v in values)), strict=True):
        used = torch.where(value == NEG_INF, 0.0, value)
        total = total + (used * weight.to(value)).sum()
    return total
