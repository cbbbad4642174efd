# SPDX-License-Identifier: Apache-2.0
"""NT-Xent as a whole: ``WholeLosses.contrastive_*`` of ``backends/interface.py`` in at most eight launches.

Forward: prepare, forward, combine with the loss, sum.  Backward: weigh, backward, finish, and a sum where the
temperature has a gradient; float16 looks for its power of two first.  Many rows take more: columns that do
not fit into the slots are folded, and for large D the gradient goes by panels.  Nothing is zeroed, and no
operation of torch runs on the device.

The other layouts are composed of the primitives (``ops/composed.py``), as is what ``serves`` leaves out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from ..interface import Contrastive, Kept, Problem, Thresholds, Tiles, Wanted
from . import configs, kernels_contrastive
from .gradients import Side, Weights, gathered_by, partial_gradient
from .launch import forward
from .plan import COMBINE_ROWS, SPAN, WHOLE, Excluded, Loss, empty_vector, slots_at_a_time
from .runtime import launch
from .sizes import cdiv, next_power_of_2

EPS = 1e-12  # as in torch.nn.functional.normalize
# Features are covered by chunks of as many, the loop over them unrolled.
_BLOCK_D = 128
_MOST_D = 2048
_TL_DTYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}


def serves(problem: Problem) -> bool:
    """Whether a problem is computed here; the ops compose the others."""
    a, b = problem.a, problem.b
    return (
        problem.layout == "joint"
        and problem.ids_q is None
        and a.dtype == b.dtype
        and a.dtype in _TL_DTYPES
        and problem.n > 0
        and 0 < a.shape[1] <= _MOST_D
    )


def exact_dtype(a: Tensor) -> torch.dtype:
    """Of the rows whose dot products are the positives: halves, but on a CPU (``ops/normalization.py``)."""
    return a.dtype if a.device.type == "cuda" else torch.float32


@dataclass(frozen=True)
class _Rows:
    """How the rows of both views are laid out."""

    whole: int  # rows, whole blocks of them
    width: int
    flags: dict[str, Any]  # of the kernels that fill them
    block: int  # rows of a program of those that go by samples


@configs.planned
def _plan(
    device: torch.device,
    dtype: torch.dtype,
    n: int,
    D: int,
    strides: tuple[int, int, int, int],
    exact: torch.dtype,
    normalize: bool,
) -> _Rows:
    width = configs.packed_width(D, dtype)
    block_d = min(_BLOCK_D, max(16, next_power_of_2(D)))
    flags = {
        "NORMALIZE": normalize,
        "EXACT": _TL_DTYPES[exact],
        "D": D,
        "STRIDE_AN": strides[0],
        "STRIDE_AD": strides[1],
        "STRIDE_BN": strides[2],
        "STRIDE_BD": strides[3],
        "WIDTH": width,
        "NUM_D": cdiv(width, block_d),
        "BLOCK_D": block_d,
    }
    return _Rows(2 * n + -2 * n % WHOLE, width, flags, max(1, 1024 // block_d))


def _rows(problem: Problem) -> tuple[Tensor, _Rows]:
    """A buffer for the rows of both views, and how it is laid out."""
    a, b = problem.a, problem.b
    (n, D), exact, device = a.shape, exact_dtype(a), a.device
    dtype = torch.bfloat16 if problem.bf16 else exact
    strides = (*a.stride(), *b.stride())
    rows = _plan(device, dtype, n, D, strides, exact, problem.normalize)
    return torch.empty(rows.whole, rows.width, dtype=dtype, device=device), rows


def _divisor(problem: Problem) -> float:
    return float(max(1, problem.outputs)) if problem.reduction == "mean" else 1.0


def contrastive_forward(problem: Problem, want_rank: bool) -> Contrastive:
    """See ``interface.WholeLosses``; logits are never kept."""
    _, a, b, _, scale, *_ = problem
    n, device, float32 = a.shape[0], a.device, torch.float32
    units, rows = _rows(problem)
    # As State.split: log-sum-exps come first, and kernels that write them need no view.
    kept = torch.empty(5 * n, dtype=float32, device=device)
    positive = kept[2 * n :]
    logit = empty_vector(2 * n, float32, device) if want_rank else None
    filled = rows.whole - n  # rows that the kernel writes behind the first n
    launch(
        kernels_contrastive.prepare_kernel, (cdiv(filled, rows.block),), device, units, positive,
        kept[3 * n :], logit, a, b, scale, n, filled, EPS,
        HAS_LOGIT=want_rank, BLOCK_N=rows.block, num_warps=4, **rows.flags,
    )  # fmt: skip
    per_row = problem.reduction == "none"
    programs = cdiv(2 * n, COMBINE_ROWS)
    sums = torch.empty(2 * n if per_row else programs, dtype=float32, device=device)
    x = units if rows.whole == 2 * n else units[: 2 * n]
    found = forward(
        "lse",
        x,
        x,
        Tiles(x, None, scale),
        Excluded.by_period(n),
        False,
        Thresholds(None if logit is None else logit[: 2 * n]),
        kept,
        Loss(positive, n, sums, _divisor(problem), per_row),
    )
    return Contrastive(sums if per_row else _sum(sums, None), kept, None, found.rank_row)


def _sum(parts: Tensor, divisor: Tensor | None) -> Tensor:
    """0-d: the sum of partial sums, over a number on the device."""
    count = parts.shape[0]
    if count == 1 and divisor is None:
        return parts[0]
    out = torch.empty((), dtype=torch.float32, device=parts.device)
    launch(
        kernels_contrastive.sum_kernel, (1,), parts.device, out, parts, divisor, count,
        DIVIDE=divisor is not None, BLOCK=1024, num_warps=4,
    )  # fmt: skip
    return out


def contrastive_backward(
    problem: Problem, kept: Kept, dloss: Tensor, wanted: Wanted
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """See ``interface.WholeLosses``; there is no bias."""
    _, a, b, _, scale, *_ = problem
    (n, D), device, float32 = a.shape, a.device, torch.float32
    if not any(wanted):
        return None, None, None, None
    state = kept.state  # log-sum-exps come first
    positive = state[2 * n :]
    units, rows = _rows(problem)
    whole = rows.whole
    per_row = problem.reduction == "none"
    dloss = dloss.contiguous() if per_row else dloss
    factor = 1.0 / _divisor(problem)
    lift = None
    if units.dtype == torch.float16:
        lift = torch.empty(1, dtype=float32, device=device)
        launch(
            kernels_contrastive.lift_pairs_kernel, (1,), device, lift, state, positive, dloss, scale, n,
            factor, PER_ROW=per_row, BLOCK=4096, num_warps=8,
        )  # fmt: skip
    row_weight, weight, lse = (
        torch.empty(whole, dtype=float32, device=device),
        torch.empty(whole, dtype=float32, device=device),
        torch.empty(whole, dtype=float32, device=device),
    )
    calm = torch.empty(whole // SPAN, dtype=torch.int32, device=device)
    launch(
        kernels_contrastive.weigh_pairs_kernel, (whole // SPAN,), device, units, row_weight, weight, lse,
        calm, a, b, state, positive, dloss, scale, lift, n, whole, EPS, factor,
        PER_ROW=per_row, HAS_LIFT=lift is not None, BLOCK_N=SPAN, num_warps=8, **rows.flags,
    )  # fmt: skip
    # Rows whose gradient is wanted: both views, or one of them where its blocks are whole.
    first, last = 0, 2 * n
    if not wanted.dscale and n % WHOLE == 0 and wanted.dq != wanted.dk:
        first, last = (0, n) if wanted.dq else (n, 2 * n)

    x = y = (
        Side(units if whole == 2 * n else units[: 2 * n], lse, row_weight),
        Weights(weight, calm),
    )
    if last - first < 2 * n:
        x = (
            Side(units[first:last], lse[first:], row_weight[first:]),
            Weights(weight[first:], calm[first // SPAN :]),
        )
    parts, _, shared, held = partial_gradient(
        0, x[0], y[0], scale, None, scale, Excluded.by_period(n), False, lift,
        (lse, x[1], y[1]),
    )  # fmt: skip
    slots = 1 if shared is None else shared.slots
    da = torch.empty(n, D, dtype=a.dtype, device=device) if wanted.dq else None
    db = torch.empty(n, D, dtype=b.dtype, device=device) if wanted.dk else None
    both = wanted.dscale or (wanted.dq and wanted.dk)
    grid = (cdiv(n, rows.block), 2 if both else 1)
    along = torch.empty(grid[0] * grid[1], dtype=float32, device=device) if wanted.dscale else None
    launch(
        kernels_contrastive.finish_kernel, grid, device, da, along, parts, a, b, row_weight, scale, db, n,
        0, n - first, last - first, *gathered_by(shared), EPS,
        WANT_A=da is not None, WANT_B=db is not None, WANT_DSCALE=wanted.dscale, HELD=held,
        SLOTS=1 if slots == 1 else slots_at_a_time(slots), BLOCK_N=rows.block, num_warps=4, **rows.flags,
    )  # fmt: skip
    return da, db, None if along is None else _sum(along, scale), None
