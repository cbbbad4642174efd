# SPDX-License-Identifier: Apache-2.0
"""The tile primitives by their definition, on dense matrices: truth in float64, eager in float32."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sslkernels.backends.interface import Tiles

NEG_INF = float("-inf")


def randn(*size: int, seed: int) -> Tensor:
    """Normal numbers that are the same on every device, on the default device."""
    x = torch.randn(*size, generator=torch.Generator().manual_seed(seed), device="cpu")
    return x.to(torch.get_default_device())


@dataclass
class Case:
    """Arguments of the primitives."""

    kind: str
    q: Tensor
    k: Tensor | None
    scale: Tensor
    bias: Tensor | None
    ids_q: Tensor | None
    ids_k: Tensor | None

    @property
    def tiles(self) -> Tiles:
        """What the backend is given."""
        return Tiles(self.q, self.k, self.scale, self.bias, self.ids_q, self.ids_k)

    @property
    def M(self) -> int:
        """Columns of S."""
        return len(self.q if self.k is None else self.k)


def similarities(case: Case, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """S and the allowed pairs."""
    q = case.q.to(dtype)
    k = q if case.k is None else case.k.to(dtype)
    s = case.scale.to(dtype) * (q @ k.T)
    if case.bias is not None:
        s = s + case.bias.to(dtype)
    allowed = torch.ones_like(s, dtype=torch.bool)
    if case.ids_q is not None:
        ids_k = case.ids_q if case.ids_k is None else case.ids_k
        allowed = case.ids_q[:, None] != ids_k[None, :]
    return s, allowed


def reduce(case: Case, dim: int, dtype: torch.dtype) -> Tensor:
    """Rows (dim 1) or columns (dim 0)."""
    s, allowed = similarities(case, dtype)
    if case.kind == "softplus":
        return torch.nn.functional.softplus(s, threshold=1e6).masked_fill(~allowed, 0).sum(dim)
    empty = ~allowed.any(dim)
    masked = s.masked_fill(~allowed, NEG_INF)
    masked = masked.masked_fill(empty.unsqueeze(dim).expand_as(masked), 0.0)
    return masked.logsumexp(dim).masked_fill(empty, NEG_INF)


def ranks(case: Case, threshold: Tensor, dim: int) -> Tensor:
    """How many allowed pairs of a row (dim 1) or column (dim 0) exceed its threshold."""
    s, allowed = similarities(case, torch.float64)
    return ((s > threshold.double().unsqueeze(dim)) & allowed).sum(dim)


def gradients(
    case: Case, drow: Tensor, dcol: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """dq (self mode: the whole gradient), dk, dbias by the formulas of the interface."""
    s, allowed = similarities(case, dtype)
    weight = drow.to(dtype)[:, None].expand_as(s)
    if case.kind == "softplus":
        if dcol is not None:
            weight = weight + dcol.to(dtype)[None, :]
        g = weight * s.sigmoid()
    else:
        g = weight * (s - _shift(reduce(case, 1, dtype))[:, None]).exp()
        if dcol is not None:
            g = g + dcol.to(dtype)[None, :] * (s - _shift(reduce(case, 0, dtype))[None, :]).exp()
    g = g.masked_fill(~allowed, 0.0)
    q, scale = case.q.to(dtype), case.scale.to(dtype)
    if case.k is None:
        return scale * (g + g.T) @ q, q[:0], g.sum()
    return scale * g @ case.k.to(dtype), scale * g.T @ q, g.sum()


def _shift(lse: Tensor) -> Tensor:
    return lse.masked_fill(lse == NEG_INF, torch.inf)


def mean_key(case: Case, dtype: torch.dtype) -> Tensor:
    """sum_j softmax_j(S_i:) k_j, 0 where nothing is allowed."""
    assert case.k is not None
    s, allowed = similarities(case, dtype)
    p = s.masked_fill(~allowed, NEG_INF).softmax(1)
    return p.masked_fill(~allowed.any(1)[:, None], 0.0) @ case.k.to(dtype)


def extremes(case: Case, bias_k: Tensor | None) -> tuple[Tensor, Tensor]:
    """Arg-max over equal ids, arg-min over different ids; -1 where there is none."""
    s, other = similarities(case, torch.float64)
    if bias_k is not None:
        s = s + bias_k.double()
    same = ~other
    if case.k is None:
        same = same & ~torch.eye(len(s), dtype=torch.bool)
    best = s.masked_fill(~same, NEG_INF).argmax(1)
    worst = s.masked_fill(~other, torch.inf).argmin(1)
    return torch.where(same.any(1), best, -1), torch.where(other.any(1), worst, -1)
