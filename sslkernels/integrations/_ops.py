# SPDX-License-Identifier: Apache-2.0
"""The ops below the public functions that drop-ins use, in one place.

Everything here takes plain tensors and returns plain tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from sslkernels.backends.arithmetic import accumulation_dtype
from sslkernels.backends.interface import Tiles
from sslkernels.ema import ema_update_
from sslkernels.functional import byol_loss
from sslkernels.ops import queue as _queue
from sslkernels.ops import rows as _rows
from sslkernels.ops.extremes import extremes
from sslkernels.ops.pairwise import pairwise
from sslkernels.ops.unit import unit_rows

PAIRS_AT_ONCE = 1 << 14  # rows of 128 floats: 8 MB each


def unit(x: Tensor) -> Tensor:
    """Rows divided by max(norm, 1e-12), not narrower than float32."""
    return unit_rows(x.to(accumulation_dtype(x.dtype)))


def enqueue_(queue: Tensor, queue_ptr: Tensor, keys: Tensor) -> None:
    """Write keys [N, D] into the ring ``queue`` [K, D] from row ``queue_ptr`` [1] on, as they are."""
    _queue.enqueue_(queue, queue_ptr, torch.zeros_like(queue_ptr), keys, False)


@torch.no_grad()
def average_(
    averages: Sequence[Tensor],
    values: Sequence[Tensor],
    decay: float,
    *,
    stochastic_rounding: bool = False,
    seed: int = 0,
    step: int = 0,
) -> None:
    """averages = decay * averages + (1 - decay) * values; tensors of integers are copied.

    Args:
        averages: Tensors, written.
        values: As many, of the same shapes and devices.
        decay: In [0, 1].
        stochastic_rounding: For 16-bit averages.
        seed: Key of the random bits.
        step: Counter of the random bits.
    """
    targets, sources = [], []
    for average, value in zip(averages, values, strict=True):
        if average.is_complex():
            average, value = torch.view_as_real(average), torch.view_as_real(value)
        if average.is_floating_point():
            targets.append(average.detach())
            sources.append(value.detach())
        else:
            average.copy_(value)
    ema_update_(
        targets, sources, decay, stochastic_rounding=stochastic_rounding, seed=seed, step=step
    )


def gather_rows(x: Tensor, *, gradient: bool = False) -> Tensor:
    """The tensors of all ranks of the default group, concatenated in the order of ranks.

    Args:
        x: [N, ...], of the same shape on every rank.
        gradient: Whether the gradients of all ranks are summed and given back to their rows.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return x
    return _Gather.apply(x) if gradient else _gather(x.detach())


def _gather(x: Tensor) -> Tensor:
    x = x.contiguous()
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x)
    return torch.cat(parts)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return _gather(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        total = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)  # gloo has no reduce-scatter
        return total.chunk(dist.get_world_size())[dist.get_rank()]


def nearest(x: Tensor, bank: Tensor) -> Tensor:
    """[N] int64: for each row of x [N, D] the row of bank [K, D] with the largest cosine."""
    with torch.no_grad():
        x, bank = unit(x), unit(bank)
        dtype = torch.promote_types(x.dtype, bank.dtype)
        x, bank = x.to(dtype), bank.to(dtype)
        # extremes has the smallest of the keys with another id: of -<x, k>.
        scale = torch.full((), -1.0, dtype=dtype, device=x.device)
        ids = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        other = torch.ones(len(bank), dtype=torch.int64, device=x.device)
        return extremes(Tiles(x, bank, scale, None, ids, other)).min_other


def lse(
    q: Tensor,
    k: Tensor | None,
    temperature: float | Tensor,
    ids_q: Tensor | None = None,
    ids_k: Tensor | None = None,
) -> Tensor:
    """[N]: log sum_j exp(<q_i, k_j> / temperature) over the j whose id is not that of i.

    Args:
        q: [N, D].
        k: [M, D], or None for k = q and ids_k = ids_q.
        temperature: A number of any sign, or a tensor of one element.
        ids_q: [N] int64; None leaves out nothing.
        ids_k: [M] int64.
    """
    acc = accumulation_dtype(q.dtype)
    if isinstance(temperature, Tensor):
        scale = temperature.reshape(()).to(q.device, acc).reciprocal()
    else:
        scale = torch.full((), 1.0 / temperature, dtype=acc, device=q.device)
    return pairwise("lse", Tiles(q, k, scale, None, ids_q, ids_k)).row


def cosine_distance(a: Tensor, b: Tensor) -> Tensor:
    """[N]: 1 - cos of the rows, with a gradient into both (the op has one into its first argument)."""
    distance = byol_loss(a, b, reduction="none") / 2
    if b.requires_grad:
        other = byol_loss(b, a, reduction="none") / 2
        distance = distance + (other - other.detach())
    return distance


def one_minus_dot(a: Tensor, b: Tensor) -> Tensor:
    """[N]: 1 - <a_i, b_i>."""
    return 1 - (a * b).sum(1)


def euclidean(a: Tensor, b: Tensor) -> Tensor:
    """[N]: ||a_i - b_i||; gradient 0 where they are equal."""
    distance: Tensor = torch.linalg.vector_norm(a - b, dim=1)
    return distance


def softplus_mean(q: Tensor, k: Tensor, scale: float | Tensor, bias: Any) -> Tensor:
    """0-d: the sum over all pairs of softplus(scale * <q_i, k_j> + bias), divided by N.

    Args:
        q: [N, D].
        k: [M, D].
        scale: A number or a tensor of one element.
        bias: The same, or None for 0.
    """
    q, k = same_dtype(q, k)
    scale, bias = (
        torch.as_tensor(0.0 if x is None else x, dtype=q.dtype, device=q.device).reshape(())
        for x in (scale, bias)
    )
    return pairwise("softplus", Tiles(q, k, scale, bias, None, None)).row.sum() / max(1, len(q))


def farthest_and_nearest(
    q: Tensor, k: Tensor | None, ids_q: Tensor, ids_k: Tensor | None, *, cosine: bool
) -> tuple[Tensor, Tensor]:
    """[N] int64 each, -1 for none: the farthest row with the id of i, the nearest with another.

    Args:
        q: [N, D].
        k: [M, D], or None for k = q, where i itself does not count.
        ids_q: [N] int64.
        ids_k: [M] int64; None with k = q.
        cosine: Rows are unit, or only the dot product counts; else the Euclidean distance.
    """
    with torch.no_grad():
        acc = accumulation_dtype(q.dtype)
        bias = None
        if not cosine:  # d^2 - |x|^2 = |y|^2 - 2 <x, y>; around the mean less cancels
            mean = q.to(acc).mean(0)
            q = q.to(acc) - mean
            k = None if k is None else k.to(acc) - mean
            bias = (q if k is None else k).square().sum(1)
        scale = torch.full((), -1.0 if cosine else -2.0, dtype=acc, device=q.device)
        found = extremes(Tiles(q, k, scale, bias, ids_q, ids_k))
    return found.max_same, found.min_other


def same_dtype(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Both in the wider of their dtypes, float32 at least."""
    dtype = accumulation_dtype(torch.promote_types(q.dtype, k.dtype))
    return q.to(dtype), k.to(dtype)


def class_sums(k: Tensor, ids_k: Tensor, ids_q: Tensor) -> Tensor:
    """[N, D]: for each of ids_q the sum of the rows of k with that id.

    Args:
        k: [M, D].
        ids_k: [M] int64.
        ids_q: [N] int64.
    """
    classes = _rows.segments(torch.cat((ids_q, ids_k)))
    sums = _rows.accumulate_rows(k, classes[len(ids_q) :], len(classes))
    return _rows.take_rows(sums, classes[: len(ids_q)])


def grouped_sum(x: Tensor, group: Tensor, n: int) -> Tensor:
    """[n]: sums of x [P] by group [P] int64 in [0, n), in a fixed order."""
    return _rows.accumulate_rows(x[:, None], group, n)[:, 0]


def grouped_lse(x: Tensor, group: Tensor, n: int) -> Tensor:
    """[n]: log-sum-exp of x [P] by group [P] int64 in [0, n); -inf for a group without members."""
    with torch.no_grad():
        largest = torch.full((n,), -torch.inf, dtype=x.dtype, device=x.device)
        largest = largest.scatter_reduce(0, group, x, "amax")
        empty = largest.isneginf()
        finite = largest.masked_fill(empty, 0.0)
    total = grouped_sum((x - finite.index_select(0, group)).exp(), group, n)
    lse = total.masked_fill(empty, 1.0).log() + finite
    return lse.masked_fill(empty, -torch.inf)


def per_pair(
    function: Callable[[Tensor, Tensor], Tensor], q: Tensor, k: Tensor, i: Tensor, j: Tensor
) -> Tensor:
    """[P]: ``function`` of the rows q[i] and k[j], in chunks whose rows are not kept for backward.

    Args:
        function: From two [n, D] to [n].
        q: [N, D].
        k: [M, D].
        i: [P] int64.
        j: [P] int64.
    """

    def taken(i: Tensor, j: Tensor) -> Tensor:
        return function(_rows.take_rows(q, i), _rows.take_rows(k, j))

    # A chunk costs a dense gradient of q and of k: it should not be shorter than they are.
    chunk = max(len(q), len(k), PAIRS_AT_ONCE)
    if len(i) <= chunk:
        return taken(i, j)
    parts = zip(i.split(chunk), j.split(chunk), strict=True)
    return torch.cat([checkpoint(taken, *part, use_reentrant=False) for part in parts])
