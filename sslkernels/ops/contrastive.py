# SPDX-License-Identifier: Apache-2.0
"""Whole contrastive losses with one positive a row as one torch op, ``contrastive``.

Layouts (csrc/sslkernels.h has the same list):

    joint      NT-Xent: rows cat(a, b), the positive of row r is r + N mod 2N
    cross      InfoNCE in the batch: rows a, columns b, the positive of row i is column i
    both       CLIP: cross plus the same over the columns, averaged
    bank       InfoNCE with a queue: rows a, positive b_i, negatives ``bank``, which gets no gradient
    decoupled  DCL: the rows of joint with another head
    sigmoid    SigLIP: the rows of cross, softplus instead of exp, another head
    classes    SupCon: rows a against all other rows; the positives of a row are those with its label

The positive is kept out of the tiles, so that a dominating one loses no digits.  With lse_r over the
negatives of r and l_r = scale * <x_r, x_r'> + bias the heads are

    softmax    loss_r = log(1 + exp(lse_r - l_r))
    decoupled  loss_r = lse_r - w_r l_r, w_r = 1 or DCLW's 2 - N softmax_r(<x_r, x_r'> / sigma)
    sigmoid    loss_r = log(1 + exp(-l_r)) + sum over the negatives of log(1 + exp(l_rj))
    classes    loss_r = lse_r over all others - the mean l of the positives; 0 without any, and the mean
               is over the rows that have some

A backend with whole losses (``interface.WholeLosses``: the CPU) does all of it in one call; for the
others it is composed from the primitives in ``composed.py``.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from types import ModuleType
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from sslkernels.backends.arithmetic import fixed_sum
from sslkernels.backends.interface import AtOnce, Contrastive, Kept, Problem, State, Tiles, Wanted
from sslkernels.ops import composed, normalization, registry
from sslkernels.ops._library import Gradient, Op, apply_plain, needs_grad, no_autocast, once
from sslkernels.ops.eager import are_plain, is_plain_eager
from sslkernels.ops.rows import accumulate_rows, segments
from sslkernels.ops.tangents import tile_tangent


class ProblemGradients(NamedTuple):
    """[0] where not wanted."""

    da: Tensor  # [N, D]
    db: Tensor  # [N, D]
    dscale: Tensor  # 0-d
    dbias: Tensor  # 0-d, of layout "sigmoid" with a bias


# --------------------------------------------------------------------------------------- kernels


def _whole(backend: ModuleType, name: str, problem: Problem) -> Any | None:
    """``backend.name`` of ``interface.WholeLosses`` if the backend has it for this problem."""
    serves = getattr(backend, "serves_contrastive", None)
    return None if serves is not None and not serves(problem) else getattr(backend, name, None)


def _compute(
    problem: Problem, want_rank: bool, keep_tiles: bool
) -> tuple[Contrastive, Tensor | None]:
    backend = registry.resolve(problem.a.device)
    fused = _whole(backend, "contrastive_forward", problem)
    if fused is not None:
        both: tuple[Contrastive, Tensor | None] = fused(problem, want_rank, keep_tiles)
        return both
    with no_autocast(problem.a.device):
        return composed.forward(backend, problem, want_rank), None


def _compute_backward(
    problem: Problem, kept: Kept, dloss: Tensor, want: Wanted
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    backend = registry.resolve(problem.a.device)
    fused = _whole(backend, "contrastive_backward", problem)
    if fused is not None:
        found: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]
        found = fused(problem, kept, dloss, want)
        return found
    with no_autocast(problem.a.device):
        return composed.backward(backend, problem, kept, dloss, want)


# --------------------------------------------------------------------------------- registered ops
# They return a tensor for everything: [0] where there is nothing.


def _backward(
    problem: Problem, state: Tensor, mean_key: Tensor, dloss: Tensor, want: Wanted
) -> ProblemGradients:
    kept = Kept(state, mean_key if problem.layout == "bank" else None)
    da, db, dscale, dbias = _compute_backward(problem, kept, dloss, want)
    return ProblemGradients(
        problem.a.new_empty(0) if da is None else da,
        problem.b.new_empty(0) if db is None else db,
        torch.zeros_like(problem.scale) if dscale is None else dscale,
        problem.a.new_empty(0) if dbias is None else dbias,
    )


def _backward_fake(
    problem: Problem, state: Tensor, mean_key: Tensor, dloss: Tensor, want: Wanted
) -> ProblemGradients:
    a, b = problem.a, problem.b
    return ProblemGradients(
        a.new_empty(a.shape if want.dq else (0,)),
        b.new_empty(b.shape if want.dk else (0,)),
        torch.empty_like(problem.scale),
        a.new_empty(0) if problem.bias is None else torch.empty_like(problem.bias),
    )


BACKWARD = Op(
    "contrastive_backward(*Problem, Tensor state, Tensor mean_key, Tensor dloss, Wanted want) "
    "-> ProblemGradients",
    _backward,
    _backward_fake,
    values=(ProblemGradients,),
)


def _forward(problem: Problem, want_rank: bool) -> Contrastive:
    out, _ = _compute(problem, want_rank, False)
    a = problem.a
    return out._replace(
        mean_key=a.new_empty(0, dtype=problem.acc) if out.mean_key is None else out.mean_key,
        rank=a.new_empty(0, dtype=torch.int64) if out.rank is None else out.rank,
    )


def _fake(problem: Problem, want_rank: bool) -> Contrastive:
    a, rows = problem.a, problem.rows
    return Contrastive(
        a.new_empty(problem.loss_shape, dtype=problem.acc),
        a.new_empty((rows + 3 * problem.n,), dtype=problem.acc),
        a.new_empty(a.shape if problem.layout == "bank" else (0,), dtype=problem.acc),
        a.new_empty((rows if want_rank else 0,), dtype=torch.int64),
    )


def _save(problem: Problem, want_rank: bool, out: Contrastive) -> Any:
    return _without_bank(problem), out.state, out.mean_key


def _without_bank(problem: Problem) -> Problem:
    """Of the bank nothing is kept: it may be overwritten before backward."""
    return problem._replace(bank=None, ids_k=None) if problem.bank is not None else problem


def _gradient(
    problem: Problem, state: Tensor, mean_key: Tensor, dloss: Tensor, need: Any, _: Any
) -> dict[str, Tensor]:
    want = Wanted(need.a, need.b, need.scale)
    found = BACKWARD.below(problem, state, mean_key, dloss, want)
    return dict(zip(("a", "b", "scale", "bias"), found, strict=True))


# --------------------------------------------------------------------------- forward-mode tangents


def _tangent(
    problem: Problem, state: Tensor, mean_key: Tensor, tangents: Problem, _: Any
) -> tuple[Tensor]:
    if tangents.bank is not None:
        raise RuntimeError("sslkernels::contrastive: the bank gets no gradient, pass bank.detach()")
    moved = (tangents.a, tangents.b, tangents.scale, tangents.bias)
    if problem.reduction == "none":
        return (_row_tangents(problem, State.split(state, problem.n), mean_key, moved),)
    # One number: the tangent is <gradient, tangent>.
    want = Wanted(*(t is not None for t in moved[:3]))
    found = BACKWARD.below(problem, state, mean_key, state.new_ones(()), want)
    total = state.new_zeros(())
    for gradient, tangent in zip(found, moved, strict=True):
        if tangent is not None:
            products = gradient.to(problem.acc) * tangent.to(problem.acc)
            total = total + (products if products.ndim == 0 else fixed_sum(products.sum(1)))
    return (total,)


def _row_tangents(
    problem: Problem, state: State, mean_key: Tensor, moved: tuple[Tensor | None, ...]
) -> Tensor:
    """d loss_r = w_r d lse_r - v_r d l_r, w_r and v_r without an incoming gradient."""
    n, scale, acc, layout = problem.n, problem.scale, problem.acc, problem.layout
    sides = []
    for x, dx, inv in zip(
        (problem.a, problem.b), moved[:2], (state.inv[:n], state.inv[n:]), strict=True
    ):
        unit = x.to(acc) * inv[:, None]
        d_unit = torch.zeros_like(unit) if dx is None else dx.to(acc)
        if problem.normalize:
            d_unit = normalization.project(unit, 1 / inv, d_unit)
        sides.append((unit, d_unit))
    (a, da), (b, db) = sides
    dscale, dbias = (scale.new_zeros(()) if t is None else t for t in moved[2:])
    if layout == "classes":
        index = segments(cast(Tensor, problem.ids_q))
        sums, d_sums = (accumulate_rows(x, index, n)[index] - x for x in (a, da))
        d_positive = (da * sums + a * d_sums).sum(1)
    else:
        d_positive = (da * b + a * db).sum(1)
    d_logit = scale * d_positive + dscale * state.positive + dbias
    ids = torch.arange(n, device=a.device) if problem.ids_q is None else problem.ids_q
    if layout == "bank":
        d_lse = scale * (mean_key * da).sum(1) + dscale * (mean_key * a).sum(1)
    elif layout == "classes":
        own = torch.arange(n, device=a.device)
        d_lse, _ = tile_tangent(
            "lse", Tiles(a, None, scale, None, own), Tiles(da, None, dscale), state.lse, None
        )
    elif problem.joined:
        tiles = Tiles(torch.cat((a, b)), None, scale, None, ids.repeat(2))
        d_tiles = Tiles(torch.cat((da, db)), None, dscale)
        d_lse, _ = tile_tangent("lse", tiles, d_tiles, state.lse, None)
    else:
        col = state.lse[n:] if layout == "both" else None
        tiles, d_tiles = Tiles(a, b, scale, problem.bias, ids, ids), Tiles(da, db, dscale, dbias)
        d_lse = torch.cat(tile_tangent(composed.kind(problem), tiles, d_tiles, state.lse[:n], col))
    weight, pull = composed.row_gradients(problem, state, state.lse.new_ones(problem.outputs))
    total = weight * d_lse - pull * (d_logit.repeat(2) if len(pull) > n else d_logit)
    return total[:n] + total[n:] if layout == "both" else total


CONTRASTIVE = Op(
    "contrastive(*Problem, bool want_rank) -> Contrastive",
    _forward,
    _fake,
    gradient=Gradient(("a", "b", "scale", "bias"), ("loss",), _save, _gradient, _tangent),
)


# ------------------------------------------------------------------------------------- eager mode


class _Eager(torch.autograd.Function):
    """Around the kernels, where neither the dispatcher nor a transform has to see the op.

    It may keep logits for backward, and costs less per call than the registered op.  Of a small problem
    it has the gradients for an incoming gradient of 1 from the start: backward hands them out once.
    """

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx: Any,
        a: Tensor,
        b: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        problem: Problem,
        want_rank: bool,
        outs: list[Any],
    ):
        # Ids of a bank are of no use later; other layouts have none of their own.
        layout, _, _, _, _, ids_q, _, normalize, reduction, bf16, _, sigma = problem
        ctx.plain = (layout, normalize, reduction, bf16, sigma, registry.override())
        found = None if want_rank else _at_once(problem, Wanted(*ctx.needs_input_grad[:3]))
        if found is None:
            (out, tiles), ctx.at_once = _compute(problem, want_rank, True), None
        else:
            (out, ctx.at_once), tiles = found, None
        outs += out  # all but the loss need no gradient: autograd is spared them
        loss, state, mean_key, _ = out
        ctx.save_for_backward(a, b, scale, bias, ids_q, state, mean_key, tiles)
        return loss

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> Any:
        layout, normalize, reduction, bf16, sigma, backend = ctx.plain
        a, b, scale, bias, ids_q, state, mean_key, tiles = ctx.saved_tensors
        # Whoever gets them may write to them: no other call does, nor one of another thread.
        at_once = ctx.__dict__.pop("at_once", None)
        if at_once is not None:
            factor = _exact_factor(dloss)
            if factor is not None:
                return *_multiplied(at_once, factor, state.dtype), None, None, None
        problem = Problem(
            layout, a, b, None, scale, ids_q, None, normalize, reduction, bf16, bias, sigma
        )
        want = Wanted(*ctx.needs_input_grad[:3])

        def compute() -> list[Tensor | None]:
            with registry.backend(backend) if backend is not None else nullcontext():
                if is_plain_eager() and are_plain(dloss):
                    return [*_compute_backward(problem, Kept(state, mean_key, tiles), dloss, want)]
                key = state.new_empty(0) if mean_key is None else mean_key
                found = BACKWARD.below(problem, state, key, dloss, want)
                wanted = ctx.needs_input_grad[:4]
                return [x if w else None for x, w in zip(found, wanted, strict=True)]

        return *once("sslkernels::contrastive", compute, (dloss, a, b, scale)), None, None, None


def _at_once(problem: Problem, wanted: Wanted) -> tuple[Contrastive, AtOnce] | None:
    """The loss of a small problem with its gradients, where the backend has that."""
    compute = getattr(registry.resolve(problem.a.device), "contrastive_at_once", None)
    return None if compute is None else compute(problem, wanted)


def _exact_factor(dloss: Tensor) -> float | None:
    """An incoming gradient whose multiplication rounds nothing, so that one call and two give the same bits.

    (Where results are below the smallest normal number it may.)  None where it is no power of two, or
    somebody differentiates or transforms the backward pass.
    """
    if torch.is_grad_enabled() or not is_plain_eager() or not are_plain(dloss):
        return None
    factor: float = dloss.item()
    return factor if abs(math.frexp(factor)[0]) == 0.5 else None


def _multiplied(at_once: AtOnce, factor: float, acc: torch.dtype) -> tuple[Tensor | None, ...]:
    """The gradients of a, b, scale and bias for an incoming gradient."""
    da, db, dscale, dbias = at_once
    if factor != 1.0:
        for gradient in (da, db, dbias):
            if gradient is not None:
                gradient *= factor
    if dscale is None:
        return da, db, None, dbias
    return da, db, torch.scalar_tensor(dscale * factor, dtype=acc, device="cpu"), dbias


def contrastive(problem: Problem, want_rank: bool = False) -> Contrastive:
    """One op for a whole loss; see the module for the layouts and the formula.

    Differentiable once in a, b, scale and bias, through ``loss``.

    Args:
        problem: Which loss of what; rows may be strided, a bank may be overwritten between forward and
            backward.
        want_rank: Whether to count the negatives above each positive.
    """
    _, a, b, bank, scale, *_, bias, _ = problem
    if is_plain_eager() and are_plain(a, b, bank, scale, bias):
        if needs_grad(a, b, scale, bias):
            outs: list[Any] = []
            loss = apply_plain(_Eager, a, b, scale, bias, problem, want_rank, outs)
            return Contrastive(loss, *outs[1:])
        return _compute(problem, want_rank, False)[0]
    result: Contrastive = CONTRASTIVE(problem, want_rank)
    return result
