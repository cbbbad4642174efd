# SPDX-License-Identifier: Apache-2.0
"""The tile engine in plain torch, in blocks of rows: any device, any floating dtype.

The readable example of ``interface.py`` and the backend of devices that have no kernels.  A block
of rows of S is computed by one matrix product, reduced, and forgotten; the block height is chosen
so that a block holds no more elements than the operands themselves (at least ``MIN_BLOCK``), which
keeps the extra memory at O((N + M) * D).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from sslkernels.backends.interface import Attend, Extremes, Kind, PairwiseBackward, PairwiseForward
from sslkernels.backends.updates_torch import CopyPlan as CopyPlan
from sslkernels.backends.updates_torch import EmaPlan as EmaPlan
from sslkernels.backends.updates_torch import enqueue_ as enqueue_

NEG_INF = float("-inf")
# Elements of a block of S.  The floor amortises Python's overhead for small operands (1 MB of
# float32), the ceiling keeps a block in the outer cache (8 MB).
MIN_BLOCK = 1 << 18
MAX_BLOCK = 1 << 21


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def row_blocks(n: int, m: int, d: int) -> Iterator[slice]:
    """Slices over n rows, so that a block of rows x m elements stays O((n + m) * d)."""
    elements = max(MIN_BLOCK, min(MAX_BLOCK, (n + m) * d))
    height = max(1, elements // max(1, m))
    for start in range(0, n, height):
        yield slice(start, min(n, start + height))


def excluded(ids_q: Tensor | None, ids_k: Tensor | None, rows: slice) -> Tensor | None:
    """[rows, M] bool: the pairs with equal ids; in self mode ids_k stands for ids_q."""
    if ids_q is None:
        return None
    return ids_q[rows, None] == (ids_q if ids_k is None else ids_k)[None, :]


def _operands(q: Tensor, k: Tensor | None) -> tuple[Tensor, Tensor]:
    """Both operands in the accumulation dtype (a copy of O((N + M) * D) for halves)."""
    acc = accumulation_dtype(q.dtype)
    q_acc = q.to(acc)
    return q_acc, q_acc if k is None else k.to(acc)


def _block(
    q: Tensor,  # [N, D] acc
    k: Tensor,  # [M, D] acc
    rows: slice,
    scale: Tensor,
    bias: Tensor | None,  # 0-d or [M]
    mask: Tensor | None,  # [rows, M]: True is excluded
) -> Tensor:
    """[rows, M]: S with -inf at the excluded pairs."""
    s = (q[rows] @ k.T).mul_(scale)
    if bias is not None:
        s.add_(bias)
    return s if mask is None else s.masked_fill_(mask, NEG_INF)


def _softplus(s: Tensor) -> Tensor:
    """log(1 + exp(s)) without the cut-off of torch's softplus, which is visible in float64."""
    return s.clamp(min=0) + s.abs().neg_().exp_().log1p_()


def _finite(lse: Tensor) -> Tensor:
    """An lse to subtract: where nothing was allowed (-inf), any number gives exp(-inf) = 0."""
    return lse.masked_fill(lse == NEG_INF, 0.0)


def _no_rank(q: Tensor) -> Tensor:
    return torch.empty(0, dtype=torch.int64, device=q.device)


def fixed_sum(x: Tensor) -> Tensor:
    """Sum of a vector, in an order that does not depend on the number of threads.

    torch splits a full reduction over threads from 32768 elements on; below that, and over one
    dimension of a matrix, every sum is made by one thread in one order.
    """
    if x.numel() < 32768:
        return x.sum()
    return torch.nn.functional.pad(x, (0, -x.numel() % 1024)).view(-1, 1024).sum(1).sum()


def pairwise_forward(
    kind: Kind,
    q: Tensor,
    k: Tensor | None,
    scale: Tensor,
    bias: Tensor | None,
    ids_q: Tensor | None,
    ids_k: Tensor | None,
    want_col: bool,
    threshold_row: Tensor | None,
    threshold_col: Tensor | None,
) -> PairwiseForward:
    """See ``interface.Backend.pairwise_forward``."""
    q, k = _operands(q, k)
    n, m = len(q), len(k)
    row = q.new_empty(n)
    col_max = q.new_full((m if want_col and kind == "lse" else 0,), NEG_INF)
    col_sum = q.new_zeros(m if want_col else 0)
    rank_row = q.new_empty(n, dtype=torch.int64) if threshold_row is not None else _no_rank(q)
    rank_col = q.new_zeros(m, dtype=torch.int64) if threshold_col is not None else _no_rank(q)
    for rows in row_blocks(n, m, q.shape[1]):
        s = _block(q, k, rows, scale, bias, excluded(ids_q, ids_k, rows))
        if threshold_row is not None:
            rank_row[rows] = (s > threshold_row[rows, None]).sum(1)
        if threshold_col is not None:
            rank_col += (s > threshold_col).sum(0)
        if kind == "softplus":
            s = _softplus(s)
            row[rows] = s.sum(1)
            if want_col:
                col_sum += s.sum(0)
            continue
        row[rows] = torch.logsumexp(s, 1) if m else NEG_INF
        if want_col:
            # Online: rescale what was summed so far to the new maximum.
            new_max = torch.maximum(col_max, s.amax(0))
            shift = _finite(new_max)
            col_sum.mul_((col_max - shift).exp_()).add_((s - shift).exp_().sum(0))
            col_max = new_max
    col = _finite(col_max) + col_sum.log() if kind == "lse" and want_col else col_sum
    return PairwiseForward(row, col, rank_row, rank_col)


def pairwise_backward(
    kind: Kind,
    q: Tensor,
    k: Tensor | None,
    scale: Tensor,
    bias: Tensor | None,
    ids_q: Tensor | None,
    ids_k: Tensor | None,
    row: Tensor,
    col: Tensor | None,
    drow: Tensor,
    dcol: Tensor | None,
    want_dq: bool,
    want_dk: bool,
) -> PairwiseBackward:
    """See ``interface.Backend.pairwise_backward``."""
    self_mode = k is None
    q, k = _operands(q, k)
    n, m = len(q), len(k)
    dq = torch.zeros_like(q, memory_format=torch.contiguous_format) if want_dq else q.new_empty(0)
    dk = dq if self_mode else q.new_empty(0)
    if want_dk and not self_mode:
        dk = torch.zeros_like(k, memory_format=torch.contiguous_format)
    g_rows = q.new_zeros(n)
    if kind == "lse":
        row = _finite(row)
        col = None if dcol is None or col is None else _finite(col)
    for rows in row_blocks(n, m, q.shape[1]):
        s = _block(q, k, rows, scale, bias, excluded(ids_q, ids_k, rows))
        if kind == "softplus":
            g = s.sigmoid_()
            g.mul_(drow[rows, None] if dcol is None else drow[rows, None] + dcol)
        elif dcol is None or col is None:
            g = s.sub_(row[rows, None]).exp_().mul_(drow[rows, None])
        else:
            g = (s - row[rows, None]).exp_().mul_(drow[rows, None])
            g.add_(s.sub_(col).exp_().mul_(dcol))
        if bias is not None:
            g_rows[rows] = g.sum(1)
        if want_dq:
            dq[rows] += g @ k
        if (want_dk and not self_mode) or (self_mode and want_dq):
            dk.addmm_(g.T, q[rows])
    dq.mul_(scale)
    if not self_mode:
        dk.mul_(scale)
    return PairwiseBackward(dq, q.new_empty(0) if self_mode else dk, fixed_sum(g_rows))


def attend(
    q: Tensor,
    k: Tensor,
    scale: Tensor,
    ids_q: Tensor | None,
    ids_k: Tensor | None,
    threshold: Tensor | None,
) -> Attend:
    """See ``interface.Backend.attend``."""
    q, k = _operands(q, k)
    n, m = len(q), len(k)
    lse = q.new_full((n,), NEG_INF)
    mean_key = torch.zeros_like(q, memory_format=torch.contiguous_format)
    rank = q.new_zeros(n, dtype=torch.int64) if threshold is not None else _no_rank(q)
    for rows in row_blocks(n, m, q.shape[1]) if m else ():
        s = _block(q, k, rows, scale, None, excluded(ids_q, ids_k, rows))
        if threshold is not None:
            rank[rows] = (s > threshold[rows, None]).sum(1)
        lse[rows] = torch.logsumexp(s, 1)
        mean_key[rows] = s.sub_(_finite(lse[rows])[:, None]).exp_() @ k
    return Attend(lse, mean_key, rank)


def extremes(
    q: Tensor,
    k: Tensor | None,
    scale: Tensor,
    bias_k: Tensor | None,
    ids_q: Tensor,
    ids_k: Tensor | None,
) -> Extremes:
    """See ``interface.Backend.extremes``."""
    self_mode = k is None
    q, k = _operands(q, k)
    n, m = len(q), len(k)
    max_same = q.new_full((n,), -1, dtype=torch.int64)
    min_other = max_same.clone()
    for rows in row_blocks(n, m, q.shape[1]) if m else ():
        s = _block(q, k, rows, scale, bias_k, None)
        same = ids_q[rows, None] == (ids_q if ids_k is None else ids_k)[None, :]
        other = ~same
        if self_mode:  # a row is not its own positive
            same.diagonal(rows.start).fill_(False)
        for mask, out, fill, reduce in (
            (same, max_same, NEG_INF, torch.argmax),
            (other, min_other, -NEG_INF, torch.argmin),
        ):
            best = reduce(s.masked_fill(~mask, fill), 1)
            out[rows] = torch.where(mask.any(1), best, -1)
    return Extremes(max_same, min_other)
