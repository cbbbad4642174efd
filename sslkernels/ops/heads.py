# SPDX-License-Identifier: Apache-2.0
"""What losses do with rows and reductions of tiles: exact softmax heads, reductions, metrics.

Differentiable torch operations around the ops.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from sslkernels._types import ContrastiveMetrics
from sslkernels.backends.arithmetic import accumulation_dtype, fixed_sum
from sslkernels.backends.interface import Contrastive, Problem, State
from sslkernels.ops.rows import accumulate_rows, segments
from sslkernels.ops.unit import unit_rows


def unit(x: Tensor, normalize: bool) -> Tensor:
    """Rows x / max(||x||, 1e-12), or x as it is; accumulation dtype on CPUs, that of x on GPUs."""
    return unit_rows(x) if normalize else x


def dots(a: Tensor, b: Tensor) -> Tensor:
    """[N]: <a_i, b_i> in the accumulation dtype."""
    acc = accumulation_dtype(a.dtype)
    return (a.to(acc) * b.to(acc)).sum(1)


def softplus(x: Tensor) -> Tensor:
    """log(1 + exp(x)), exact to rounding in float64 too (torch's default cuts off at x = 20)."""
    return F.softplus(x, threshold=40.0)


def nll(lse_negatives: Tensor, positive: Tensor) -> Tensor:
    """-log(e^p / (e^p + sum of negatives)) without cancellation when the positive dominates."""
    return softplus(lse_negatives - positive)


def reduce(loss: Tensor, reduction: str) -> Tensor:
    """Mean, sum or nothing; the mean of no rows is 0.  Same bits for any number of threads."""
    if reduction == "none":
        return loss
    total = fixed_sum(loss)
    return total / max(1, loss.numel()) if reduction == "mean" else total


def mean_negative(
    q: Tensor, k: Tensor, ids_q: Tensor | None = None, ids_k: Tensor | None = None
) -> Tensor:
    """0-d: mean <q_i, k_j> over pairs with different ids in O((N + M) * D); 0 without pairs."""
    acc = accumulation_dtype(q.dtype)
    q, k = q.detach().to(acc), k.detach().to(acc)
    total = (q.sum(0) * k.sum(0)).sum()
    count = torch.full((), float(len(q) * len(k)), dtype=acc, device=q.device)
    if ids_q is not None:
        segment = segments(torch.cat((ids_q, ids_q if ids_k is None else ids_k)))
        n = len(segment)
        # A column of ones makes the product of counts the number of excluded pairs.
        sums_q, sums_k = (
            accumulate_rows(torch.cat((x, x.new_ones((len(x), 1))), 1), s, n)
            for x, s in ((q, segment[: len(q)]), (k, segment[len(q) :]))
        )
        excluded = (sums_q * sums_k).sum(0)
        total = total - excluded[:-1].sum()
        count = count - excluded[-1]
    return total / count.clamp(min=1)


def metrics(rank: Tensor, positive: Tensor, negative_similarity: Tensor) -> ContrastiveMetrics:
    """Top-k accuracy from ranks; positive: dot products without temperature."""
    acc = positive.dtype
    return ContrastiveMetrics(
        reduce((rank < 1).to(acc), "mean"),
        reduce((rank < 5).to(acc), "mean"),
        reduce(positive.detach(), "mean"),
        negative_similarity,
    )


def problem_metrics(problem: Problem, out: Contrastive) -> ContrastiveMetrics:
    """The metrics of a whole loss that was computed with ranks."""
    a, b, n = problem.a.detach(), problem.b.detach(), problem.n
    ids_q, ids_k = problem.ids_q, problem.ids_k
    if problem.layout != "bank":
        ids_q = ids_k = torch.arange(n, device=a.device) if ids_q is None else ids_q
    q, k = a, b
    if problem.joined:
        q = k = torch.cat((a, b))
        ids_q = ids_k = None if ids_q is None else ids_q.repeat(2)
    elif problem.bank is not None:
        k = problem.bank.detach()
    q_unit = unit(q, problem.normalize)
    k_unit = q_unit if k is q else unit(k, problem.normalize)
    positive = State.split(out.state, n).positive
    return metrics(cast(Tensor, out.rank), positive, mean_negative(q_unit, k_unit, ids_q, ids_k))
