# SPDX-License-Identifier: Apache-2.0
"""Launchers of the tile kernels: the functions of ``backends/interface.py`` for CUDA tensors.

Nothing here reads a tensor on the host, and every buffer size follows from shapes alone, so each
function can be captured in a CUDA graph.  How much is allocated beyond the outputs:

* row slots: programs that share a held block * N * 2 words, column slots: held blocks per launch * M * 2
  words, both at most ``max((N + M) * D, 2^24)`` words;
* partial products of backward and attend: programs that share a block * N * D words, same bound;
* a panel of G, for large D only: rows * M elements under the same bound;
* a copy of operands whose layout tiles could not read well: see ``plan.packed``.

So extra memory is O((N + M) * D) plus at most 64 MiB a buffer.  Columns are reduced in the same pass
as rows: each held block writes its column sums to a slot of its own, and when the slots of one launch
reach the bound they are folded into one before the next launch.  The alternative, a second pass
with the roles swapped, needs no slots but computes every product twice.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
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
from .configs import Config
from .gradients import Side, fused_tiles, gradient
from .plan import (
    Excluded,
    Line,
    Loss,
    Sums,
    again_flags,
    check,
    chunk_count,
    folded_line,
    line,
    packed,
    ratio_of,
    slot_words,
    slots_at_a_time,
    tile_flags,
    triangle,
    trimmed,
    vector,
)
from .runtime import launch
from .sizes import cdiv


def pairwise_forward(
    kind: Kind, tiles: Tiles, want_col: bool, thresholds: Thresholds
) -> PairwiseForward:
    """See ``Backend.pairwise_forward``.  Self mode visits one triangle of S: N^2 D FLOPs."""
    check("pairwise_forward", tiles.q, tiles.k)
    q, y = packed(tiles.q) * 2 if tiles.k is None else packed(tiles.q, tiles.k)
    excluded = Excluded.by_ids(tiles.ids_q, None if tiles.is_self else tiles.ids_k)
    found = forward(kind, q, y, tiles, excluded, want_col, thresholds)
    kinds = (torch.float32, torch.float32, torch.int64, torch.int64)
    return PairwiseForward(
        *(
            torch.empty(0, dtype=dtype, device=q.device) if t is None else t
            for t, dtype in zip(found, kinds, strict=True)
        )
    )


def _forward_config(
    device: torch.device, dtype: torch.dtype, N: int, M: int, D: int, is_triangle: bool, heavy: bool
) -> Config:
    """The table's configuration, or the narrow one where registers or programs are too few.

    Args:
        device: Where it runs.
        dtype: Of the operands.
        N: Rows of the held side.
        M: Rows of the swept side.
        D: Features.
        is_triangle: Whether one triangle is visited.
        heavy: Ranks, or softplus: what takes more registers than a sum of exponentials.
    """
    config = configs.require("forward", device, D, dtype)
    blocks, tiles = cdiv(N, config.block_n), cdiv(M, config.block_m)
    total = blocks * tiles
    if is_triangle:
        total = folded_line(0, blocks, tiles, ratio_of(config), 1).total
    if heavy or total < configs.multiprocessors(device):
        return configs.require("narrow", device, D, dtype)
    return config


@dataclass(frozen=True)
class _Plan:
    """How a forward pass is launched."""

    config: Config
    capacity: int
    group: int  # held blocks of a launch
    shared: Line  # how a launch that visits no triangle is dealt
    lines: tuple[tuple[int, Line], ...]  # first block and tiles of each launch
    row_slots: int
    has_col: bool
    flags: dict[str, Any]
    chunks: int

    @property
    def folds(self) -> bool:
        """Whether columns of several launches are folded into a slot."""
        return len(self.lines) > 1 and self.has_col


@configs.planned
def _plan(
    device: torch.device,
    dtype: torch.dtype,
    N: int,
    M: int,
    D: int,
    stride_x: int,
    stride_y: int,
    is_triangle: bool,
    has_col: bool,
    heavy: bool,
) -> _Plan:
    config = _forward_config(device, dtype, N, M, D, is_triangle, heavy)
    ratio = ratio_of(config) if is_triangle else 1
    row_blocks, col_blocks = cdiv(N, config.block_n), cdiv(M, config.block_m)
    words = slot_words(N, M, D)
    group = min(row_blocks, max(1, words // (2 * M))) if has_col else row_blocks
    group = cdiv(row_blocks, cdiv(row_blocks, group))  # launches of equal size
    capacity = configs.capacity(device, config)
    shared = line(group, col_blocks, capacity, max(2, words // (2 * N)))
    lines = []
    for first_block in range(0, row_blocks, group):
        blocks = min(group, row_blocks - first_block)
        if is_triangle:
            here = triangle(first_block, blocks, col_blocks, ratio, capacity)
        else:
            here = replace(shared, blocks=blocks, total=blocks * col_blocks)
        lines.append((first_block, here))
    flags = {
        "TRIANGLE": is_triangle,
        "HAS_COL": has_col,
        "HOLD_X": config.hold_x,
        "PREFETCH": config.prefetch,
        "FOLD": configs.folds(configs.arch_of(device)),
        **tile_flags(config, dtype, D, stride_x, stride_y),
    }
    row_slots = max(each.slots for _, each in lines)
    return _Plan(
        config, capacity, group, shared, tuple(lines), row_slots, has_col, flags, chunk_count(flags)
    )


class Forward(NamedTuple):
    """``PairwiseForward`` without tensors for what was not asked for."""

    row: Tensor
    col: Tensor | None
    rank_row: Tensor | None
    rank_col: Tensor | None


def forward(
    kind: Kind,
    q: Tensor,
    y: Tensor,
    tiles: Tiles,
    excluded: Excluded,
    want_col: bool,
    thresholds: Thresholds,
    out_row: Tensor | None = None,
    loss: Loss | None = None,
) -> Forward:
    """``pairwise_forward`` of packed operands and prepared ids.

    Args:
        kind: As for ``pairwise_forward``.
        q: Rows as ``packed`` lays them out.
        y: Columns; in self mode q.
        tiles: As for ``pairwise_forward``; its operands and ids are not looked at.
        excluded: Pairs that are left out.
        want_col: As for ``pairwise_forward``.
        thresholds: As for ``pairwise_forward``.
        out_row: Where the N results of the rows go; by default a new tensor.
        loss: In self mode, what is made of the rows in the same launch.
    """
    is_triangle = tiles.is_self
    (N, D), M, device = q.shape, y.shape[0], q.device
    kind_id = 0 if kind == "lse" else 1
    has_col = is_triangle or want_col
    threshold_row = vector(thresholds.row)
    threshold_col = threshold_row if is_triangle else vector(thresholds.col)
    rank_row, rank_col = threshold_row is not None, has_col and threshold_col is not None

    def empty(wanted: bool, length: int, dtype: torch.dtype) -> Tensor | None:
        return torch.empty(length, dtype=dtype, device=device) if wanted else None

    if out_row is None:
        out_row = torch.empty(N, dtype=torch.float32, device=device)
    out_col = empty(want_col, M, torch.float32)
    out_rank_row = empty(rank_row, N, torch.int64)
    out_rank_col = empty(want_col and rank_col, M, torch.int64)
    result = Forward(out_row, out_col, out_rank_row, out_rank_col)
    if N == 0 or M == 0:
        for t in (out_row, out_col):
            if t is not None:
                t.fill_(float("-inf") if kind_id == 0 else 0.0)
        for t in (out_rank_row, out_rank_col):
            if t is not None:
                t.zero_()
        return result

    heavy = rank_row or rank_col or kind_id == 1
    plan = _plan(
        device, q.dtype, N, M, D, q.stride(0), y.stride(0), is_triangle, has_col, heavy
    )  # fmt: skip
    row_slots, folds = plan.row_slots, plan.folds
    # Slots of one buffer: [row slots | the fold | a column slot for each held block of a launch].
    # In self mode rows and columns are the same thing and share it; otherwise each has its own.
    rows = Sums(row_slots + (folds + plan.group if is_triangle else 0), N, rank_row, device)
    cols, fold = rows, row_slots
    if has_col and not is_triangle:
        cols, fold = Sums(folds + plan.group, M, rank_col, device), 0
    first_col = fold + folds
    if folds:
        cols.clear(fold)

    def combine(out: Tensor | None, of_rows: bool, first_block: int, last: int) -> None:
        """Columns of a launch, or rows (with the columns in self mode)."""
        mine = of_rows or is_triangle
        side, other = (q, y) if mine else (y, q)
        sums = rows if mine else cols
        sums.combine(
            kind_id,
            out,
            (out_rank_row if mine else out_rank_col) if out is not None and sums.rank is not None
            else None,
            side,
            other,
            tiles.scale,
            excluded if mine else excluded.swapped(),
            threshold_row if mine else threshold_col,
            plan.config,
            plan.shared,
            plan.capacity,
            row_slots if mine else 0,
            first_col if is_triangle or not mine else row_slots,
            last,
            first_block,
            plan.group,
            is_triangle,
            loss if out is not None else None,
        )  # fmt: skip

    for first_block, here in plan.lines:
        blocks = here.blocks
        launch(
            kernels.forward_kernel,
            (here.programs,),
            device,
            *rows.at(0),
            *(cols.at(first_col) if has_col else (None, None)),
            q,
            y,
            tiles.scale,
            tiles.bias,
            *excluded.shorts(),
            threshold_row,
            threshold_col if rank_col else None,
            N,
            M,
            excluded.period,
            plan.chunks,
            here.share,
            here.total,
            first_block,
            blocks,
            KIND=kind_id,
            HAS_BIAS=tiles.bias is not None,
            EXCLUDE=excluded.mode,
            HAS_RANK_ROW=rank_row,
            HAS_RANK_COL=rank_col,
            **plan.flags,
        )
        if not has_col:
            continue
        end = first_col + blocks
        if first_block != plan.lines[-1][0]:
            combine(None, is_triangle, first_block, end)
        elif is_triangle:
            combine(out_row, True, first_block, end)
        else:
            combine(out_col, False, first_block, end)
    if not is_triangle:
        combine(out_row, True, 0, row_slots)
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
    excluded = Excluded.by_ids(tiles.ids_q, None if tiles.is_self else tiles.ids_k)
    q_side = _side(q, row, lse)
    k_side = q_side if k is None else _side(k, col, lse)
    if wanted.dq or (not lse and not wanted.dk):
        dx, total = gradient(
            kind_id, q_side, k_side, scale, bias, scale, excluded, want_dbias=not lse
        )
        dq = dx if wanted.dq else nothing
        if k is None and total is not None:
            total = 0.5 * total  # the pass summed G + G^T
    if wanted.dk and k is not None:
        dk, swapped = gradient(
            kind_id, k_side, q_side, scale, bias, scale, excluded.swapped(),
            want_dbias=not lse and total is None,
        )  # fmt: skip
        total = swapped if total is None else total
    if total is None:
        total = torch.zeros((), dtype=torch.float32, device=q.device)
    dq, dk = (t if t is nothing else trimmed(t, features) for t in (dq, dk))
    return PairwiseBackward(dq, dk, total)


def _side(x: Tensor, state: RowState | None, lse: bool) -> Side:
    """An operand and what the backward pass knows of its rows."""
    if state is None:
        return Side(x, None, None)
    return Side(x, vector(state.lse) if lse else None, vector(state.gradient))


def attend(tiles: Tiles, threshold: Tensor | None) -> Attend:
    """See ``Backend.attend``.

    4 N M D FLOPs where the fused kernel fits; for large D log-sum-exp first and then the mean key as
    a gradient by panels (drow = 1), 6 N M D.  Nothing of k is needed for the backward pass.
    """
    if tiles.k is None:
        raise ValueError("attend: k must be given, got None")
    check("attend", tiles.q, tiles.k)
    scale, features = tiles.scale, tiles.q.shape[1]
    q, k = packed(tiles.q, tiles.k)
    (N, D), M, device = q.shape, k.shape[0], q.device
    has_rank = threshold is not None
    if N == 0 or M == 0:
        lse = torch.full((N,), float("-inf"), dtype=torch.float32, device=device)
        mean_key = torch.zeros(N, features, dtype=torch.float32, device=device)
        rank = torch.zeros(N if has_rank else 0, dtype=torch.int64, device=device)
        return Attend(lse, mean_key, rank)
    excluded = Excluded.by_ids(tiles.ids_q, tiles.ids_k)
    fused = fused_tiles(device, q.dtype, N, M, D, q.stride(0), k.stride(0))
    rank = torch.empty(N if has_rank else 0, dtype=torch.int64, device=device)
    if fused is None:
        found = forward("lse", q, k, tiles, excluded, False, Thresholds(threshold))
        one = torch.ones(1, dtype=torch.float32, device=device)
        rows = Side(q, vector(found.row), vector(one.expand(N)))
        columns = Side(k, None, None)
        mean_key, _ = gradient(0, rows, columns, scale, None, one, excluded, want_dbias=False)
        ranks = rank if found.rank_row is None else found.rank_row
        return Attend(found.row, trimmed(mean_key, features), ranks)

    shared, held, flags = fused
    lse = torch.empty(N, dtype=torch.float32, device=device)
    mean_key = torch.empty(N, D, dtype=torch.float32, device=device)
    online = q.dtype == torch.float16
    sums = Sums(shared.slots, N, has_rank, device)
    largest = torch.empty_like(sums.s) if online else None
    acc = torch.empty(shared.slots, N, D, dtype=torch.float32, device=device)
    threshold = vector(threshold)
    launch(
        kernels_rows.attend_kernel,
        (shared.programs,),
        device,
        largest,
        *sums.at(0),
        acc,
        q,
        k,
        scale,
        *excluded.shorts(),
        threshold,
        N,
        M,
        shared.share,
        shared.total,
        EXCLUDE=excluded.mode,
        HAS_RANK=has_rank,
        ONLINE=online,
        **flags,
    )
    # Few queries make few programs of 16 rows: each takes few features, and many slots at a time.
    at_a_time = 32 if shared.slots > 16 else slots_at_a_time(shared.slots)
    flags = again_flags(device, q.dtype, D, q.stride(0), k.stride(0), 16, at_a_time)
    flags = {**flags, "BLOCK_D": min(32, flags["BLOCK_D"])}
    launch(
        kernels_rows.attend_combine_kernel,
        (cdiv(N, flags["BLOCK_N"]), cdiv(D, flags["BLOCK_D"])),
        device,
        lse,
        mean_key,
        rank if has_rank else None,
        largest,
        *sums.at(0),
        acc,
        q,
        k,
        scale,
        *excluded.ids(),
        excluded.wide,
        threshold,
        N,
        M,
        excluded.wide_count,
        chunk_count(flags),
        shared.share,
        shared.tiles,
        HAS_RANK=has_rank,
        EXCLUDE=excluded.mode,
        ONLINE=online,
        HELD=held,
        **flags,
    )
    return Attend(lse, trimmed(mean_key, features), rank)


def extremes(tiles: Tiles) -> Extremes:
    """See ``Backend.extremes``.  A NaN in S counts as the extreme, as in torch.argmax."""
    check("extremes", tiles.q, tiles.k)
    if tiles.ids_q is None:
        raise ValueError("extremes: ids_q must be given, got None")
    operands = (tiles.q,) if tiles.k is None else (tiles.q, tiles.k)
    q, y = (packed(*operands, repeat=True) * 2)[:2]
    (N, D), M, device = q.shape, y.shape[0], q.device
    found = torch.empty(2, N, dtype=torch.int64, device=device)
    if N == 0 or M == 0:
        found.fill_(-1)
        return Extremes(found[0], found[1])
    ids_x = vector(tiles.ids_q)
    ids_y = ids_x if tiles.is_self or tiles.ids_k is None else vector(tiles.ids_k)
    config = configs.require("extremes", device, D, q.dtype)
    row_blocks, col_blocks = cdiv(N, config.block_n), cdiv(M, config.block_m)
    shared = line(
        row_blocks, col_blocks, configs.capacity(device, config),
        slot_words(N, M, D) // (4 * N),
    )  # fmt: skip
    values = torch.empty(2, shared.slots, N, dtype=torch.float32, device=device)
    indices = torch.empty(2, shared.slots, N, dtype=torch.int32, device=device)
    flags = tile_flags(config, q.dtype, D, q.stride(0), y.stride(0))
    launch(
        kernels_rows.extremes_kernel,
        (shared.programs,),
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
        chunk_count(flags),
        shared.share,
        shared.total,
        shared.slots,
        SELF=tiles.is_self,
        HAS_BIAS=tiles.bias is not None,
        HOLD_X=config.hold_x,
        **flags,
    )
    block = 256
    launch(
        kernels_rows.extremes_combine_kernel,
        (cdiv(N, block), 2),
        device,
        found,
        values,
        indices,
        N,
        shared.share,
        shared.tiles,
        shared.slots,
        HELD=config.block_n,
        BLOCK_L=block,
    )
    return Extremes(found[0], found[1])
