# SPDX-License-Identifier: Apache-2.0
"""Whole contrastive losses with one positive a row as one torch op, ``contrastive``.

Layouts (csrc/sslkernels.h has the same list):

    joint   NT-Xent: rows cat(a, b), the positive of row r is r + N mod 2N
    cross   InfoNCE in the batch: rows a, columns b, the positive of row i is column i
    both    CLIP: cross plus the same over the columns, averaged
    bank    InfoNCE with a queue: rows a, positive b_i, negatives ``bank``, which gets no gradient

The positive is kept out of the tiles, so that a dominating one loses no digits:

    loss_r = log(1 + exp(lse_r - p_r)),   lse_r over the negatives of r,   p_r = scale * <x_r, x_r'>
    w_r = dloss_r sigmoid(lse_r - p_r) = d/d lse_r = -d/d p_r

A backend with whole losses (``contrastive_forward`` and ``contrastive_backward``: the CPU) does all of it
in one call; for the others it is composed here from the primitives of ``backends/interface.py``.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sslkernels.backends.chunked import accumulation_dtype, fixed_sum
from sslkernels.ops import normalization, registry
from sslkernels.ops._library import (
    below_autograd,
    define,
    implement,
    needs_grad,
    no_autocast,
    once_differentiable,
)
from sslkernels.ops.eager import are_plain, is_plain_eager
from sslkernels.ops.normalization import UnitRows, unit_rows, unit_rows_backward
from sslkernels.ops.rows import dots

_SHARED = (
    "str layout, Tensor a, Tensor b, Tensor? bank, Tensor scale, Tensor? ids_q, Tensor? ids_k, "
    "bool normalize, str reduction, bool bf16"
)
define(
    f"contrastive({_SHARED}, bool want_rank) "
    "-> (Tensor loss, Tensor state, Tensor mean_key, Tensor rank)"
)
define(
    f"contrastive_backward({_SHARED}, Tensor state, Tensor mean_key, Tensor dloss, bool want_da, "
    "bool want_db, bool want_dscale) -> (Tensor, Tensor, Tensor)"
)


class State(NamedTuple):
    """Views of what backward needs; R = 2N for layouts joint and both, N otherwise."""

    lse: Tensor  # [R] log-sum-exp over the negatives
    positive: Tensor  # [N] <a_i, b_i> of the (normalised) rows, without scale
    inv: Tensor  # [2N] what the rows of a and b were multiplied with: 1 without normalize

    @classmethod
    def split(cls, state: Tensor, n: int) -> State:
        """The parts of the op's one tensor, [R + 3N]."""
        rows = state.shape[0] - 3 * n
        return cls(state[:rows], state[rows : rows + n], state[rows + n :])


class Contrastive(NamedTuple):
    """What the op returns."""

    loss: Tensor  # 0-d, or [2N] (joint) or [N], accumulation dtype
    state: Tensor  # [R + 3N], see State
    mean_key: Tensor | None  # [N, D] softmax-weighted mean of the bank; layout bank only
    rank: Tensor | None  # [R] int64, how many negatives are above the positive; if wanted
    tiles: Tensor | None = None  # logits kept for backward, in the backend's own layout


def softmax_rows(layout: str, n: int) -> int:
    """R: 2N where both sides are classified, N where one is."""
    return 2 * n if layout in ("joint", "both") else n


# ------------------------------------------------------------------ composition from primitives


class _Rows(NamedTuple):
    """Both views, and their ids, as the tiles see them."""

    a: Tensor  # [N, D] tile operand
    b: Tensor  # [N, D] tile operand
    joint: Tensor  # [2N, D] both in one; layout joint only
    exact_a: Tensor  # [N, D] the same without ``bf16``
    exact_b: Tensor
    sides: tuple[UnitRows, UnitRows] | None  # None without normalize
    ids_q: Tensor | None
    ids_k: Tensor | None

    @classmethod
    def make(
        cls, backend: ModuleType, layout: str, a: Tensor, b: Tensor, ids_q: Tensor | None,
        ids_k: Tensor | None, normalize: bool, bf16: bool,
    ) -> _Rows:  # fmt: skip
        n, joint, sides = a.shape[0], a.new_empty(0), None
        if normalize:
            halves: tuple[Tensor | None, Tensor | None] = (None, None)
            if layout == "joint":  # in one buffer from the start
                joint = a.new_empty((2 * n, a.shape[1]), dtype=normalization.operand_dtype(a))
                halves = (joint[:n], joint[n:])
            sides = unit_rows(backend, a, halves[0]), unit_rows(backend, b, halves[1])
            a, b = sides[0].unit, sides[1].unit
        elif layout == "joint":
            joint = torch.cat((a, b))
        exact_a, exact_b = a, b
        if bf16 and layout == "joint":
            joint = joint.to(torch.bfloat16)
            a, b = joint[:n], joint[n:]
        elif bf16:
            a, b = a.to(torch.bfloat16), b.to(torch.bfloat16)
        if layout != "bank":
            ids_q = torch.arange(n, device=a.device) if ids_q is None else ids_q
            ids_k = None if layout == "joint" else ids_q
            ids_q = torch.cat((ids_q, ids_q)) if layout == "joint" else ids_q
        return cls(a, b, joint, exact_a, exact_b, sides, ids_q, ids_k)


def _composed_forward(
    backend: ModuleType, layout: str, a: Tensor, b: Tensor, bank: Tensor | None, scale: Tensor,
    ids_q: Tensor | None, ids_k: Tensor | None, normalize: bool, reduction: str, bf16: bool,
    want_rank: bool,
) -> Contrastive:  # fmt: skip
    n = a.shape[0]
    rows = _Rows.make(backend, layout, a, b, ids_q, ids_k, normalize, bf16)
    positive = dots(rows.exact_a, rows.exact_b)
    logit = positive * scale
    threshold = logit if want_rank else None
    mean_key = None
    if layout == "bank":
        if bank is None:
            raise ValueError("contrastive: layout 'bank' needs bank, got None")
        if normalize:
            keys = torch.empty(bank.shape, dtype=rows.a.dtype, device=bank.device)
            unit_rows(backend, bank, out=keys)
        else:
            keys = bank.to(rows.a.dtype)
        lse, mean_key, rank = backend.attend(rows.a, keys, scale, rows.ids_q, rows.ids_k, threshold)
    elif layout == "joint":
        lse, _, rank, _ = backend.pairwise_forward(
            "lse", rows.joint, None, scale, None, rows.ids_q, None, False,
            None if threshold is None else threshold.repeat(2), None,
        )  # fmt: skip
    else:
        both = layout == "both"
        lse, col, rank, rank_col = backend.pairwise_forward(
            "lse", rows.a, rows.b, scale, None, rows.ids_q, rows.ids_k, both, threshold,
            threshold if both else None,
        )  # fmt: skip
        if both:
            lse, rank = torch.cat((lse, col)), torch.cat((rank, rank_col))
    logit = logit.repeat(2) if len(lse) > n else logit
    per_row = torch.nn.functional.softplus(lse - logit, threshold=40.0)
    if layout == "both":
        per_row = (per_row[:n] + per_row[n:]) / 2
    loss = per_row if reduction == "none" else fixed_sum(per_row)
    if reduction == "mean":
        loss = loss / max(1, per_row.numel())
    if rows.sides is None:
        inv = torch.ones(2 * n, dtype=accumulation_dtype(a.dtype), device=a.device)
    else:
        inv = 1.0 / torch.cat([side.norm for side in rows.sides]).clamp(min=normalization.EPS)
    state = torch.cat((lse, positive, inv))
    return Contrastive(loss, state, mean_key, rank if want_rank else None)


def _composed_backward(
    backend: ModuleType, layout: str, a: Tensor, b: Tensor, scale: Tensor, ids_q: Tensor | None,
    ids_k: Tensor | None, normalize: bool, reduction: str, bf16: bool, state: Tensor,
    mean_key: Tensor | None, dloss: Tensor, want_da: bool, want_db: bool, want_dscale: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor]:  # fmt: skip
    n = a.shape[0]
    lse, positive, _ = State.split(state, n)
    rows = _Rows.make(backend, layout, a, b, ids_q, ids_k, normalize, bf16)
    two = len(lse) > n
    logit = positive * scale
    weight = torch.sigmoid(lse - (logit.repeat(2) if two else logit))
    outputs = 2 * n if layout == "joint" else n
    if reduction == "mean":
        dloss = dloss / max(1, outputs)
    weight = weight * (dloss.repeat(2) if layout == "both" and reduction == "none" else dloss)
    if layout == "both":
        weight = weight / 2
    pair = (weight[:n] + weight[n:] if two else weight)[:, None]
    wa, wb = rows.exact_a.to(weight.dtype), rows.exact_b.to(weight.dtype)
    if mean_key is not None:
        ga, gb = scale * weight[:, None] * mean_key, torch.zeros_like(wb)
    elif layout == "joint":
        g = backend.pairwise_backward(
            "lse", rows.joint, None, scale, None, rows.ids_q, None, lse, None, weight, None, True,
            False,
        ).dq  # fmt: skip
        ga, gb = g[:n], g[n:]
    else:
        row, col, drow, dcol = lse, None, weight, None
        if layout == "both":
            row, col, drow, dcol = lse[:n], lse[n:], weight[:n], weight[n:]
        ga, gb, _ = backend.pairwise_backward(
            "lse", rows.a, rows.b, scale, None, rows.ids_q, rows.ids_k, row, col, drow, dcol,
            want_da or want_dscale, want_db,
        )  # fmt: skip
    dscale = torch.zeros_like(scale)
    da = db = None
    if want_da or want_dscale or layout == "joint":
        da = ga - scale * pair * wb
        along = (wa * da).sum(1)
        if layout == "joint":
            along = (along + (wb * (gb - scale * pair * wa)).sum(1)) / 2
        if want_dscale:
            dscale = fixed_sum(along) / scale
    if want_db:
        db = gb - scale * pair * wa
    da = da if want_da else None
    if rows.sides is not None:
        da = None if da is None else unit_rows_backward(backend, rows.sides[0], da)
        db = None if db is None else unit_rows_backward(backend, rows.sides[1], db)
    return (
        None if da is None else da.to(a.dtype),
        None if db is None else db.to(b.dtype),
        dscale,
    )


# ---------------------------------------------------------------------------------- kernels


def _compute(
    keep_tiles: bool, layout: str, a: Tensor, b: Tensor, bank: Tensor | None, scale: Tensor,
    ids_q: Tensor | None, ids_k: Tensor | None, normalize: bool, reduction: str, bf16: bool,
    want_rank: bool,
) -> Contrastive:  # fmt: skip
    backend = registry.resolve(a.device)
    args = (layout, a, b, bank, scale, ids_q, ids_k, normalize, reduction, bf16, want_rank)
    fused = getattr(backend, "contrastive_forward", None)
    if fused is not None:
        return Contrastive(*fused(*args, keep_tiles))
    with no_autocast(a.device):
        return _composed_forward(backend, *args)


def _compute_backward(
    layout: str, a: Tensor, b: Tensor, scale: Tensor, ids_q: Tensor | None, ids_k: Tensor | None,
    normalize: bool, reduction: str, bf16: bool, state: Tensor, mean_key: Tensor | None,
    dloss: Tensor, want_da: bool, want_db: bool, want_dscale: bool, tiles: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    backend = registry.resolve(a.device)
    args = (layout, a, b, scale, ids_q, ids_k, normalize, reduction, bf16, state, mean_key)
    wanted = (dloss, want_da, want_db, want_dscale)
    fused = getattr(backend, "contrastive_backward", None)
    if fused is not None:
        return fused(*args, tiles, *wanted)
    with no_autocast(a.device):
        return _composed_backward(backend, *args, *wanted)


# The registered ops return a tensor for everything: [0] where there is nothing.


def _forward(*args):  # type: ignore[no-untyped-def]
    out = _compute(False, *args)
    a = args[1]
    mean_key = a.new_empty(0, dtype=out.state.dtype) if out.mean_key is None else out.mean_key
    rank = a.new_empty(0, dtype=torch.int64) if out.rank is None else out.rank
    return out.loss, out.state, mean_key, rank


def _backward(layout, a, b, bank, scale, ids_q, ids_k, normalize, reduction, bf16, state,  # type: ignore[no-untyped-def]
              mean_key, dloss, want_da, want_db, want_dscale):  # fmt: skip
    da, db, dscale = _compute_backward(
        layout, a, b, scale, ids_q, ids_k, normalize, reduction, bf16, state,
        mean_key if layout == "bank" else None, dloss, want_da, want_db, want_dscale,
    )  # fmt: skip
    return (
        a.new_empty(0) if da is None else da,
        b.new_empty(0) if db is None else db,
        torch.zeros_like(scale) if dscale is None else dscale,
    )


def _forward_fake(layout, a, b, bank, scale, ids_q, ids_k, normalize, reduction, bf16, want_rank):  # type: ignore[no-untyped-def]
    acc = accumulation_dtype(a.dtype)
    n = a.shape[0]
    rows = softmax_rows(layout, n)
    loss_shape: tuple[Any, ...] = ()
    if reduction == "none":
        loss_shape = (2 * n,) if layout == "joint" else (n,)
    return (
        a.new_empty(loss_shape, dtype=acc),
        a.new_empty((rows + 3 * n,), dtype=acc),
        a.new_empty(a.shape if layout == "bank" else (0,), dtype=acc),
        a.new_empty((rows if want_rank else 0,), dtype=torch.int64),
    )


def _backward_fake(layout, a, b, bank, scale, ids_q, ids_k, normalize, reduction, bf16, state,  # type: ignore[no-untyped-def]
                   mean_key, dloss, want_da, want_db, want_dscale):  # fmt: skip
    return (
        a.new_empty(a.shape if want_da else (0,)),
        b.new_empty(b.shape if want_db else (0,)),
        torch.empty_like(scale),
    )


# --------------------------------------------------------------------------------- autograd


class _ContrastiveFunction(torch.autograd.Function):
    """Around the kernels where nothing else looks (``eager``), around the registered ops otherwise."""

    @staticmethod
    def forward(ctx: Any, eager: bool, *args):  # type: ignore[no-untyped-def]
        tiles = None
        if eager:
            *out, tiles = _compute(True, *args)
        else:
            with below_autograd():
                out = torch.ops.sslkernels.contrastive.default(*args)
        layout, a, b, _, scale, ids_q, ids_k, normalize, reduction, bf16, _ = args
        loss, state, mean_key, rank = out
        ctx.plain = (eager, layout, normalize, reduction, bf16, registry.override())
        # Of the bank nothing is kept: it may be overwritten before backward.
        ids_k = None if layout == "bank" else ids_k
        ctx.save_for_backward(a, b, scale, ids_q, ids_k, state, mean_key, tiles)
        ctx.mark_non_differentiable(*(x for x in (state, mean_key, rank) if x is not None))
        ctx.set_materialize_grads(False)
        return tuple(out)

    @staticmethod
    @once_differentiable("sslkernels::contrastive")
    def backward(ctx: Any, dloss, *_):  # type: ignore[no-untyped-def]
        if dloss is None:
            return (None,) * 12
        eager, layout, normalize, reduction, bf16, backend = ctx.plain
        a, b, scale, ids_q, ids_k, state, mean_key, tiles = ctx.saved_tensors
        _, _, need_a, need_b, _, need_scale, *_ = ctx.needs_input_grad
        tail = (state, mean_key, dloss, need_a, need_b, need_scale)
        with registry.backend(backend) if backend is not None else nullcontext():
            if eager and is_plain_eager() and are_plain(dloss):
                da, db, dscale = _compute_backward(
                    layout, a, b, scale, ids_q, ids_k, normalize, reduction, bf16, *tail, tiles
                )
            else:
                if mean_key is None:
                    tail = (state, state.new_empty(0), *tail[2:])
                with below_autograd():
                    da, db, dscale = torch.ops.sslkernels.contrastive_backward.default(
                        layout, a, b, None, scale, ids_q, ids_k, normalize, reduction, bf16, *tail
                    )
        return (
            None,
            None,
            da if need_a else None,
            db if need_b else None,
            None,
            dscale if need_scale else None,
            *(None,) * 6,
        )


implement(
    "contrastive", _forward, _forward_fake, partial(_ContrastiveFunction.apply, False),
    inputs=(1, 2, 4),
)  # fmt: skip
implement("contrastive_backward", _backward, _backward_fake)


def contrastive(
    layout: str,
    a: Tensor,
    b: Tensor,
    bank: Tensor | None = None,
    *,
    scale: Tensor,
    ids_q: Tensor | None = None,
    ids_k: Tensor | None = None,
    normalize: bool = True,
    reduction: str = "mean",
    bf16: bool = False,
    want_rank: bool = False,
) -> Contrastive:
    """One op for a whole loss; see the module for the layouts and the formula.

    Differentiable once in a, b and scale, through ``loss``.

    Args:
        layout: "joint", "cross", "both" or "bank".
        a: [N, D], any floating dtype; rows may be strided.
        b: [N, D] of the same dtype and device.
        bank: [K, D], layout "bank" only; may be overwritten between forward and backward.
        scale: 0-d, accumulation dtype (float64 for float64 inputs, otherwise float32).
        ids_q: [N] int64; pairs of equal ids are not negatives.  None: the row number (bank: nothing
            is left out).  Layouts other than bank use it for both sides.
        ids_k: [K] int64, layout "bank" with ids_q only.
        normalize: Whether rows (of the bank too) are divided by max(norm, 1e-12) first.
        reduction: "mean", "sum" or "none".
        bf16: Whether negatives are multiplied in bfloat16 (not float64); positives never are.
        want_rank: Whether to count the negatives above each positive.
    """
    args = (layout, a, b, bank, scale, ids_q, ids_k, normalize, reduction, bf16, want_rank)
    if is_plain_eager() and are_plain(a, b, scale) and (bank is None or are_plain(bank)):
        if needs_grad(a, b, scale):
            return Contrastive(*_ContrastiveFunction.apply(True, *args))
        return _compute(False, *args)
    return Contrastive(*torch.ops.sslkernels.contrastive.default(*args))
