# SPDX-License-Identifier: Apache-2.0
"""Launchers of the tile kernels: the functions of ``backends/interface.py`` for CUDA tensors.

Nothing here reads a tensor on the host, and every buffer size follows from shapes alone, so each
function can be captured in a CUDA graph.  How much is allocated beyond the outputs:

* row slots: splits * N * 3 words, column slots: row blocks per launch * M * 3 words, both at most
  ``max((N + M) * D, 2^24)`` words;
* partial products of backward and attend: splits * N * D words under the same bound;
* a panel of G, for large D only: rows * M elements under the same bound;
* a copy of operands whose layout tiles could not read well: see ``plan.packed``.

So extra memory is O((N + M) * D) plus at most 64 MiB a buffer.  Columns are reduced in the same pass
as rows: each row block writes its column sums to a slot of its own, and when the slots of one launch
reach the bound they are folded into slot 0 before the next launch.  The alternative, a second pass
with the roles swapped, needs no slots but computes every product twice.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from ..interface import (
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
from . import configs, kernels, kernels_rows
from .gradients import Side, gradient
from .plan import (
    COMBINE_BLOCK,
    Slots,
    check,
    packed,
    slot_words,
    splits_for,
    tile_flags,
    trimmed,
    vector,
)
from .runtime import launch


def pairwise_forward(
    kind: Kind, tiles: Tiles, want_col: bool, thresholds: Thresholds
) -> PairwiseForward:
    """See ``Backend.pairwise_forward``.  Self mode visits one triangle of S: N^2 D FLOPs."""
    scale, bias, triangle = tiles.scale, tiles.bias, tiles.is_self
    check("pairwise_forward", tiles.q, tiles.k)
    q, y = packed(tiles.q) * 2 if tiles.k is None else packed(tiles.q, tiles.k)
    (N, D), M, device = q.shape, y.shape[0], q.device
    kind_id = 0 if kind == "lse" else 1
    has_col = triangle or want_col
    ids_x, ids_y = vector(tiles.ids_q), vector(tiles.ids_q if triangle else tiles.ids_k)
    threshold_row = vector(thresholds.row)
    threshold_col = threshold_row if triangle else vector(thresholds.col)
    rank_row, rank_col = threshold_row is not None, has_col and threshold_col is not None

    def empty(length: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(length, dtype=dtype, device=device)

    out_row = empty(N, torch.float32)
    out_col = empty(M if want_col else 0, torch.float32)
    out_rank_row = empty(N if rank_row else 0, torch.int64)
    out_rank_col = empty(M if want_col and rank_col else 0, torch.int64)
    result = PairwiseForward(out_row, out_col, out_rank_row, out_rank_col)
    if N == 0 or M == 0:
        for t in (out_row, out_col):
            t.fill_(float("-inf") if kind_id == 0 else 0.0)
        for t in (out_rank_row, out_rank_col):
            t.zero_()
        return result

    config = configs.require("forward", device, D, q.dtype)
    row_blocks, col_blocks = triton.cdiv(N, config.block_n), triton.cdiv(M, config.block_m)
    words = slot_words(N, M, D)
    group = min(row_blocks, max(1, words // (3 * M))) if has_col else row_blocks
    splits, per_split = splits_for(device, group, col_blocks, max(1, words // (3 * N)))
    # Slots of one buffer: [a row slot for each split | the fold | a column slot for each row block].
    # In self mode rows and columns are the same thing and share it; otherwise each has its own.
    folds = group < row_blocks
    rows = Slots(kind_id, rank_row, splits + (folds + group if triangle else 0), N, device)
    cols, fold = rows, splits
    if has_col and not triangle:
        cols, fold = Slots(kind_id, rank_col, folds + group, M, device), 0
    col_base = fold + folds
    if folds:
        cols.clear(fold)

    flags = {
        "KIND": kind_id,
        "TRIANGLE": triangle,
        "HAS_COL": has_col,
        "HAS_BIAS": bias is not None,
        "HAS_IDS": ids_x is not None,
        "HAS_RANK_ROW": rank_row,
        "HAS_RANK_COL": rank_col,
        "HOLD_X": config.hold_x,
        **tile_flags(config, q, y),
    }
    for first_block in range(0, row_blocks, group):
        blocks = min(group, row_blocks - first_block)
        launch(
            kernels.forward_kernel,
            (blocks, splits),
            device,
            *rows.pointers(0),
            *(cols.pointers(col_base) if has_col else (None, None, None)),
            q,
            y,
            scale,
            bias,
            ids_x,
            ids_y,
            threshold_row,
            threshold_col if rank_col else None,
            N,
            M,
            D,
            per_split,
            first_block,
            *q.stride(),
            *y.stride(),
            **flags,
        )
        if not has_col:
            continue
        where = (col_base, first_block, config) if triangle else None
        end = col_base + blocks
        if first_block + blocks < row_blocks:
            cols.combine(None, None, fold, end, where)
        elif triangle:
            cols.combine(out_row, out_rank_row if rank_row else None, 0, end, where)
        else:
            cols.combine(out_col, out_rank_col if rank_col else None, 0, end)
    if not triangle:
        rows.combine(out_row, out_rank_row if rank_row else None, 0, splits)
    return result


def pairwise_backward(
    kind: Kind, tiles: Tiles, row: RowState, col: RowState | None, wanted: Wanted
) -> PairwiseBackward:
    """See ``Backend.pairwise_backward``.

    Self mode is one pass with col = row and dcol = drow (4 N^2 D FLOPs).  Otherwise dq and dk are
    one pass each, 4 N M D FLOPs, the second with the roles of q and k swapped.
    """
    check("pairwise_backward", tiles.q, tiles.k)
    scale, bias, features = tiles.scale, tiles.bias, tiles.q.shape[1]
    q, k = (packed(tiles.q)[0], None) if tiles.k is None else packed(tiles.q, tiles.k)
    lse = kind == "lse"
    kind_id = 0 if lse else 1
    nothing = torch.empty(0, dtype=torch.float32, device=q.device)
    dq = dk = nothing
    total: Tensor | None = None
    q_side = _side(q, tiles.ids_q, row, lse)
    k_side = q_side if k is None else _side(k, tiles.ids_k, col, lse)
    if wanted.dq or (not lse and not wanted.dk):
        dx, total = gradient(kind_id, q_side, k_side, scale, bias, scale, want_dbias=not lse)
        dq = dx if wanted.dq else nothing
        if k is None and total is not None:
            total = 0.5 * total  # the pass summed G + G^T
    if wanted.dk and k is not None:
        dk, swapped = gradient(
            kind_id, k_side, q_side, scale, bias, scale, want_dbias=not lse and total is None
        )
        total = swapped if total is None else total
    if total is None:
        total = torch.zeros((), dtype=torch.float32, device=q.device)
    dq, dk = (t if t is nothing else trimmed(t, features) for t in (dq, dk))
    return PairwiseBackward(dq, dk, total)


def _side(x: Tensor, ids: Tensor | None, state: RowState | None, lse: bool) -> Side:
    """An operand and what the backward pass knows of its rows."""
    if state is None:
        return Side(x, vector(ids), None, None)
    return Side(x, vector(ids), vector(state.lse) if lse else None, vector(state.gradient))


def attend(tiles: Tiles, threshold: Tensor | None) -> Attend:
    """See ``Backend.attend``.

    4 N M D FLOPs where the fused kernel fits; for large D log-sum-exp first and then the mean key as
    a gradient by panels (drow = 1), 6 N M D.  Nothing of k is needed for the backward pass.
    """
    if tiles.k is None:
        raise ValueError("attend: k must be given, got None")
    check("attend", tiles.q, tiles.k)
    scale, ids_q, ids_k, features = tiles.scale, tiles.ids_q, tiles.ids_k, tiles.q.shape[1]
    q, k = packed(tiles.q, tiles.k)
    (N, D), M, device = q.shape, k.shape[0], q.device
    config = configs.choose("fused", device, D, q.dtype)
    if config is None:
        operands = tiles._replace(q=q, k=k)
        forward = pairwise_forward("lse", operands, False, Thresholds(threshold))
        one = torch.ones((), dtype=torch.float32, device=device)
        rows = Side(q, vector(ids_q), forward.row, one.expand(N).contiguous())
        columns = Side(k, vector(ids_k), None, None)
        mean_key, _ = gradient(0, rows, columns, scale, None, one, want_dbias=False)
        return Attend(forward.row, trimmed(mean_key, features), forward.rank_row)

    has_rank = threshold is not None
    lse = torch.empty(N, dtype=torch.float32, device=device)
    mean_key = torch.empty(N, D, dtype=torch.float32, device=device)
    rank = torch.empty(N if has_rank else 0, dtype=torch.int64, device=device)
    if N == 0 or M == 0:
        mean_key = trimmed(mean_key.zero_(), features)
        return Attend(lse.fill_(float("-inf")), mean_key, rank.zero_())
    row_blocks, col_blocks = triton.cdiv(N, config.block_n), triton.cdiv(M, config.block_m)
    splits, per_split = splits_for(
        device, row_blocks, col_blocks, max(1, slot_words(N, M, D) // (N * D))
    )
    slots = Slots(0, has_rank, splits, N, device)
    acc = torch.empty(splits, N, D, dtype=torch.float32, device=device)
    launch(
        kernels_rows.attend_kernel,
        (row_blocks, splits),
        device,
        *slots.pointers(0),
        acc,
        q,
        k,
        scale,
        vector(ids_q),
        vector(ids_k),
        vector(threshold),
        N,
        M,
        D,
        per_split,
        *q.stride(),
        *k.stride(),
        HAS_IDS=ids_q is not None,
        HAS_RANK=has_rank,
        HAS_LIFT=q.dtype == torch.float16,
        **tile_flags(config, q, k),
    )
    slots.combine(lse, rank if has_rank else None, 0, splits)
    block_n, block_d = 16, min(64, max(16, triton.next_power_of_2(D)))
    launch(
        kernels_rows.attend_combine_kernel,
        (triton.cdiv(N, block_n), triton.cdiv(D, block_d)),
        device,
        mean_key,
        slots.m,
        slots.s,
        acc,
        N,
        D,
        splits,
        BLOCK_N=block_n,
        BLOCK_D=block_d,
    )
    return Attend(lse, trimmed(mean_key, features), rank)


def extremes(tiles: Tiles) -> Extremes:
    """See ``Backend.extremes``.  A NaN in S counts as the extreme, as in torch.argmax."""
    check("extremes", tiles.q, tiles.k)
    if tiles.ids_q is None:
        raise ValueError("extremes: ids_q must be given, got None")
    q, y = packed(tiles.q) * 2 if tiles.k is None else packed(tiles.q, tiles.k)
    (N, D), M, device = q.shape, y.shape[0], q.device
    found = torch.full((2, N), -1, dtype=torch.int64, device=device)
    if N == 0 or M == 0:
        return Extremes(found[0], found[1])
    ids_x = tiles.ids_q.contiguous()
    ids_y = ids_x if tiles.is_self or tiles.ids_k is None else tiles.ids_k.contiguous()
    config = configs.require("extremes", device, D, q.dtype)
    row_blocks, col_blocks = triton.cdiv(N, config.block_n), triton.cdiv(M, config.block_m)
    splits, per_split = splits_for(
        device, row_blocks, col_blocks, max(1, slot_words(N, M, D) // (4 * N))
    )
    values = torch.empty(2, splits, N, dtype=torch.float32, device=device)
    indices = torch.empty(2, splits, N, dtype=torch.int32, device=device)
    launch(
        kernels_rows.extremes_kernel,
        (row_blocks, splits),
        device,
        values,
        indices,
        q,
        y,
        tiles.scale,
        vector(tiles.bias),
        ids_x,
        ids_y,
        N,
        M,
        D,
        per_split,
        *q.stride(),
        *y.stride(),
        SELF=tiles.is_self,
        HAS_BIAS=tiles.bias is not None,
        EVEN_M=M % config.block_m == 0,
        HOLD_X=config.hold_x,
        **tile_flags(config, q, y),
    )
    launch(
        kernels_rows.extremes_combine_kernel,
        (triton.cdiv(N, COMBINE_BLOCK), 2),
        device,
        found,
        values,
        indices,
        N,
        splits,
        BLOCK_L=COMBINE_BLOCK,
    )
    return Extremes(found[0], found[1])
