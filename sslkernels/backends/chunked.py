# SPDX-License-Identifier: Apache-2.0
"""The tile engine in plain torch, in blocks of rows: any device, any floating dtype.

The readable example of ``interface.py`` and the backend of devices that have no kernels.  A block
of rows of S is computed by one matrix product, reduced, and forgotten; the block height is chosen
so that a block holds no more elements than the operands themselves (at least ``MIN_BLOCK``), which
keeps the extra memory at O((N + M) * D).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sslkernels.backends.arithmetic import NEG_INF, finite, fixed_sum, row_blocks
from sslkernels.backends.autoencoders_torch import features_backward as features_backward
from sslkernels.backends.autoencoders_torch import features_forward as features_forward
from sslkernels.backends.autoencoders_torch import reparameterize as reparameterize
from sslkernels.backends.autoencoders_torch import (
    reparameterize_backward as reparameterize_backward,
)
from sslkernels.backends.autoencoders_torch import vae_backward as vae_backward
from sslkernels.backends.autoencoders_torch import vae_forward as vae_forward
from sslkernels.backends.interface import (
    Attend,
    Extremes,
    Kind,
    PairwiseBackward,
    PairwiseForward,
    RowState,
    Thresholds,
    Tiles,
    Wanted,
)
from sslkernels.backends.updates_torch import CopyPlan as CopyPlan
from sslkernels.backends.updates_torch import EmaPlan as EmaPlan
from sslkernels.backends.updates_torch import enqueue_ as enqueue_


def why_unavailable(device: torch.device) -> str:
    """See ``Backend.why_unavailable``: plain torch serves every device."""
    return ""


def _wide(tiles: Tiles) -> tuple[Tensor, Tensor]:
    """Both operands in the accumulation dtype (a copy of O((N + M) * D) for halves)."""
    q = tiles.q.to(tiles.acc)
    return q, q if tiles.k is None else tiles.k.to(tiles.acc)


def _block(tiles: Tiles, q: Tensor, k: Tensor, rows: slice) -> Tensor:
    """[rows, M]: S with -inf at the excluded pairs; q, k: the operands in the accumulation dtype."""
    s = (q[rows] @ k.T).mul_(tiles.scale)
    if tiles.bias is not None:
        s.add_(tiles.bias)
    mask = tiles.excluded(rows)
    return s if mask is None else s.masked_fill_(mask, NEG_INF)


def _softplus(s: Tensor) -> Tensor:
    """log(1 + exp(s)) without the cut-off of torch's softplus, which is visible in float64."""
    return s.clamp(min=0) + s.abs().neg_().exp_().log1p_()


def pairwise_forward(
    kind: Kind, tiles: Tiles, want_col: bool, thresholds: Thresholds
) -> PairwiseForward:
    """See ``interface.Backend.pairwise_forward``."""
    q, k = _wide(tiles)
    n, m = tiles.n, tiles.m
    row = q.new_empty(n)
    col_max = q.new_full((m if want_col and kind == "lse" else 0,), NEG_INF)
    col_sum = q.new_zeros(m if want_col else 0)
    rank_row, rank_col = (
        q.new_zeros(0 if above is None else length, dtype=torch.int64)
        for above, length in ((thresholds.row, n), (thresholds.col, m))
    )
    for rows in row_blocks(n, m, q.shape[1]):
        s = _block(tiles, q, k, rows)
        if thresholds.row is not None:
            rank_row[rows] = (s > thresholds.row[rows, None]).sum(1)
        if thresholds.col is not None:
            rank_col += (s > thresholds.col).sum(0)
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
            shift = finite(new_max)
            col_sum.mul_((col_max - shift).exp_()).add_((s - shift).exp_().sum(0))
            col_max = new_max
    col = finite(col_max) + col_sum.log() if kind == "lse" and want_col else col_sum
    return PairwiseForward(row, col, rank_row, rank_col)


def _divisor(lse: Tensor) -> Tensor:
    """What exponentials of a row are divided by, as a logarithm: inf where nothing is allowed."""
    return lse.masked_fill(lse == NEG_INF, math.inf)


def _weights(kind: Kind, s: Tensor, rows: slice, row: RowState, col: RowState | None) -> Tensor:
    """[rows, M]: G of a block of S; see ``interface.Backend.pairwise_backward``."""
    drow = row.gradient[rows, None]
    if kind == "softplus":
        return s.sigmoid_().mul_(drow if col is None else drow + col.gradient)
    if row.lse is None:
        raise ValueError("pairwise_backward: kind 'lse' needs the lse of its rows, got None")
    if col is None or col.lse is None:
        return s.sub_(_divisor(row.lse[rows])[:, None]).exp_().mul_(drow)
    g = (s - _divisor(row.lse[rows])[:, None]).exp_().mul_(drow)
    return g.add_(s.sub_(_divisor(col.lse)).exp_().mul_(col.gradient))


def pairwise_backward(
    kind: Kind, tiles: Tiles, row: RowState, col: RowState | None, wanted: Wanted
) -> PairwiseBackward:
    """See ``interface.Backend.pairwise_backward``."""
    q, k = _wide(tiles)
    want_dq, want_dk = wanted.dq, wanted.dk and not tiles.is_self

    def zeros(like: Tensor, want: bool) -> Tensor:
        if not want:
            return like.new_empty(0)
        return torch.zeros_like(like, memory_format=torch.contiguous_format)

    dq, dk = zeros(q, want_dq), zeros(k, want_dk)
    transposed = dk if want_dk else dq if want_dq and tiles.is_self else None
    g_rows = q.new_zeros(tiles.n)
    for rows in row_blocks(tiles.n, tiles.m, q.shape[1]):
        g = _weights(kind, _block(tiles, q, k, rows), rows, row, col)
        if tiles.bias is not None:
            g_rows[rows] = g.sum(1)
        if want_dq:
            dq[rows] += g @ k
        if transposed is not None:
            transposed.addmm_(g.T, q[rows])
    return PairwiseBackward(dq.mul_(tiles.scale), dk.mul_(tiles.scale), fixed_sum(g_rows))


def attend(tiles: Tiles, threshold: Tensor | None) -> Attend:
    """See ``interface.Backend.attend``."""
    q, k = _wide(tiles)
    n, m = tiles.n, tiles.m
    lse = q.new_full((n,), NEG_INF)
    mean_key = torch.zeros_like(q, memory_format=torch.contiguous_format)
    rank = q.new_zeros(0 if threshold is None else n, dtype=torch.int64)
    for rows in row_blocks(n, m, q.shape[1]) if m else ():
        s = _block(tiles, q, k, rows)
        if threshold is not None:
            rank[rows] = (s > threshold[rows, None]).sum(1)
        lse[rows] = torch.logsumexp(s, 1)
        mean_key[rows] = s.sub_(finite(lse[rows])[:, None]).exp_() @ k
    return Attend(lse, mean_key, rank)


def extremes(tiles: Tiles) -> Extremes:
    """See ``interface.Backend.extremes``."""
    q, k = _wide(tiles)
    n, m = tiles.n, tiles.m
    everything = tiles._replace(ids_q=None, ids_k=None)
    max_same = q.new_full((n,), -1, dtype=torch.int64)
    min_other = max_same.clone()
    for rows in row_blocks(n, m, q.shape[1]) if m else ():
        s = _block(everything, q, k, rows)
        same = tiles.excluded(rows)
        if same is None:
            raise ValueError("extremes: ids_q must be given, got None")
        other = ~same
        if tiles.is_self:  # a row is not its own positive
            same.diagonal(rows.start).fill_(False)
        for mask, out, fill, reduce in (
            (same, max_same, NEG_INF, torch.argmax),
            (other, min_other, -NEG_INF, torch.argmin),
        ):
            best = reduce(s.masked_fill(~mask, fill), 1)
            out[rows] = torch.where(mask.any(1), best, -1)
    return Extremes(max_same, min_other)
