# SPDX-License-Identifier: Apache-2.0
"""The C++ kernels (``csrc/cpu``) behind the backend interface: addresses, sizes and threads.

``sslkernels._C`` does not link an OpenMP runtime.  Its symbols are resolved from the one that torch
has loaded, so that a process has a single pool of threads and ``torch.set_num_threads`` holds for
both.  Only a torch built without OpenMP makes us load libgomp ourselves.
"""

from __future__ import annotations

import ctypes
import functools
import os
from typing import Any

import torch
from torch import Tensor

from sslkernels.backends.arithmetic import accumulation_dtype
from sslkernels.backends.interface import (
    AtOnce,
    Attend,
    Contrastive,
    Extremes,
    Kept,
    Kind,
    Paired,
    PairedState,
    PairwiseBackward,
    PairwiseForward,
    Problem,
    RowState,
    Thresholds,
    Tiles,
    Triplets,
    TripletState,
    Wanted,
)

try:
    from sslkernels import _C
except ImportError as _error:
    if "GOMP" not in str(_error) and "omp_get" not in str(_error):
        raise
    try:
        ctypes.CDLL("libgomp.so.1", mode=ctypes.RTLD_GLOBAL)
    except OSError as missing:
        raise ImportError(f"OpenMP: torch has loaded no runtime, and {missing}") from _error
    from sslkernels import _C

from sslkernels.backends.autoencoders_cpu import (  # noqa: E402
    features_backward,
    features_forward,
    reparameterize,
    reparameterize_backward,
    vae_backward,
    vae_forward,
)
from sslkernels.backends.updates_cpu import DTYPES, CopyPlan, EmaPlan, enqueue_  # noqa: E402

__all__ = [
    "CopyPlan",
    "EmaPlan",
    "attend",
    "contrastive_at_once",
    "contrastive_backward",
    "contrastive_forward",
    "enqueue_",
    "extremes",
    "features_backward",
    "features_forward",
    "normalize_rows",
    "normalize_rows_backward",
    "paired_backward",
    "paired_forward",
    "pairwise_backward",
    "pairwise_forward",
    "regression_backward",
    "regression_forward",
    "reparameterize",
    "reparameterize_backward",
    "triplet_backward",
    "triplet_forward",
    "vae_backward",
    "vae_forward",
    "why_unavailable",
]

# Here, whatever device torch.set_default_device or an enclosing torch.device(...) names.
_empty = functools.partial(torch.empty, device="cpu")
_scalar = functools.partial(torch.scalar_tensor, device="cpu")

_C.set_isa(os.environ.get("SSLKERNELS_ISA") or "auto")


def why_unavailable(device: torch.device) -> str:
    """See :meth:`sslkernels.backends.interface.Backend.why_unavailable`."""
    return "" if device.type == "cpu" else f"it serves CPU tensors only, not {device.type!r}"


def _address(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def _contiguous(x: Tensor | None) -> Tensor | None:
    return x if x is None or x.is_contiguous() else x.contiguous()


def _rows(x: Tensor) -> Tensor:
    """x, or a copy when its rows are not contiguous: whole losses take any stride between rows."""
    return x if x.stride()[1] == 1 or x.shape[1] == 1 else x.contiguous()


def _like(x: Tensor) -> Tensor:
    """An empty contiguous tensor of the shape and dtype of x, for half of what ``torch.empty`` takes."""
    return torch.empty_like(x) if x.is_contiguous() else _empty(x.shape, dtype=x.dtype)


# ------------------------------------------------------------------------------------------- tiles


def _dense(tiles: Tiles) -> Tiles:
    """The tiles with operands that the kernels can address; they live as long as the result does."""
    q, k, scale, bias, ids_q, ids_k = tiles
    return Tiles(
        q.contiguous(), _contiguous(k), scale, bias, _contiguous(ids_q), _contiguous(ids_k)
    )


def _tiles(kind: Kind, tiles: Tiles, with_bias: bool = True) -> _C._Tiles:
    """Dense tiles as the kernels of the engine are given them; it holds addresses, not tensors."""
    q, k, scale, bias, ids_q, ids_k = tiles
    return _C.tiles(
        kind=kind,
        dtype=DTYPES[q.dtype],
        d=q.shape[1],
        q=q.data_ptr(),
        n=q.shape[0],
        k=_address(k),
        m=-1 if k is None else k.shape[0],
        scale=scale.data_ptr(),
        bias=_address(bias) if with_bias else None,
        ids_q=_address(ids_q),
        ids_k=_address(ids_k),
        n_threads=torch.get_num_threads(),
    )


def pairwise_forward(
    kind: Kind, tiles: Tiles, want_col: bool, thresholds: Thresholds
) -> PairwiseForward:
    """See :meth:`sslkernels.backends.interface.Backend.pairwise_forward`."""
    tiles, n, m, acc = _dense(tiles), tiles.n, tiles.m, tiles.acc
    above = Thresholds(*(_contiguous(x) for x in thresholds))
    row = _empty(n, dtype=acc)
    col = _empty(m if want_col else 0, dtype=acc)
    rank_row = _empty(0 if above.row is None else n, dtype=torch.int64)
    rank_col = _empty(0 if above.col is None else m, dtype=torch.int64)
    _C.pairwise_forward(
        _tiles(kind, tiles),
        row=row.data_ptr(),
        col=col.data_ptr() if want_col else None,
        threshold_row=_address(above.row),
        threshold_col=_address(above.col),
        rank_row=rank_row.data_ptr(),
        rank_col=rank_col.data_ptr(),
    )
    return PairwiseForward(row, col, rank_row, rank_col)


def pairwise_backward(
    kind: Kind, tiles: Tiles, row: RowState, col: RowState | None, wanted: Wanted
) -> PairwiseBackward:
    """See :meth:`sslkernels.backends.interface.Backend.pairwise_backward`."""
    tiles, acc, d = _dense(tiles), tiles.acc, tiles.q.shape[1]
    lse, drow = (_contiguous(x) for x in row)
    lse_col, dcol = (None, None) if col is None else (_contiguous(x) for x in col)
    want_dq = wanted.dq or tiles.is_self
    want_dk = wanted.dk and not tiles.is_self
    dq = _empty((tiles.n, d) if want_dq else 0, dtype=acc)
    dk = _empty((tiles.m, d) if want_dk else 0, dtype=acc)
    dbias = _C.pairwise_backward(
        _tiles(kind, tiles),
        row=_address(lse),
        col=_address(lse_col),
        drow=_address(drow),
        dcol=_address(dcol),
        dq=dq.data_ptr() if want_dq else None,
        dk=dk.data_ptr() if want_dk else None,
    )
    return PairwiseBackward(dq, dk, _scalar(dbias, dtype=acc))


def attend(tiles: Tiles, threshold: Tensor | None) -> Attend:
    """See :meth:`sslkernels.backends.interface.Backend.attend`."""
    tiles, threshold = _dense(tiles), _contiguous(threshold)
    lse = _empty(tiles.n, dtype=tiles.acc)
    mean_key = _empty(tiles.q.shape, dtype=tiles.acc)
    rank = _empty(0 if threshold is None else tiles.n, dtype=torch.int64)
    _C.attend(
        _tiles("lse", tiles),
        lse=lse.data_ptr(),
        mean_key=mean_key.data_ptr(),
        threshold=_address(threshold),
        rank=None if threshold is None else rank.data_ptr(),
    )
    return Attend(lse, mean_key, rank)


def extremes(tiles: Tiles) -> Extremes:
    """See :meth:`sslkernels.backends.interface.Backend.extremes`."""
    tiles, bias = _dense(tiles), _contiguous(tiles.bias)
    max_same = _empty(tiles.n, dtype=torch.int64)
    min_other = _empty(tiles.n, dtype=torch.int64)
    _C.extremes(
        _tiles("lse", tiles, with_bias=False),
        bias_k=_address(bias),
        max_same=max_same.data_ptr(),
        min_other=min_other.data_ptr(),
    )
    return Extremes(max_same, min_other)


# ------------------------------------------------------------------------------------ whole losses


def _dense_ids(problem: Problem) -> Problem:
    """The problem with ids that the kernels can address; they live as long as the result does."""
    if problem.ids_q is None:
        return problem
    return problem._replace(ids_q=_contiguous(problem.ids_q), ids_k=_contiguous(problem.ids_k))


def _contrastive(problem: Problem, a: Tensor, b: Tensor) -> _C._Contrastive:
    """A problem with rows a and b that the kernels can address; it holds addresses, not tensors."""
    n, d = a.shape
    return _C.contrastive(
        layout=problem.layout,
        reduction=problem.reduction,
        dtype=DTYPES[a.dtype],
        normalize=problem.normalize,
        d=d,
        n=n,
        a=a.data_ptr(),
        a_stride=a.stride()[0],  # stride(0) takes 0.1 us longer
        b=b.data_ptr(),
        b_stride=b.stride()[0],
        scale=problem.scale.data_ptr(),
        bias=_address(problem.bias),
        ids_q=_address(problem.ids_q),
        bf16=problem.bf16,
        n_threads=torch.get_num_threads(),
    )


def contrastive_forward(
    problem: Problem, want_rank: bool, keep_tiles: bool
) -> tuple[Contrastive, Tensor | None]:
    """See :meth:`sslkernels.backends.interface.WholeLosses.contrastive_forward`."""
    problem = _dense_ids(problem)
    layout, a, b, bank, *_ = problem
    if problem.bf16 and not _C.has_bf16():
        raise RuntimeError(
            "compute_dtype=torch.bfloat16 needs a processor with AVX512-BF16 and that instruction set "
            f"in use, got {_C.isa()!r}"
        )
    a, b = _rows(a), _rows(b)
    n, d = a.shape
    acc, rows = problem.acc, problem.rows
    none = problem.reduction == "none"
    loss = _empty(problem.loss_shape, dtype=acc) if none else _like(problem.scale)
    state = _empty(rows + 3 * n, dtype=acc)
    mean_key = None if bank is None else _empty((n, d), dtype=acc)
    rank = _empty(rows, dtype=torch.int64) if want_rank else None
    size = _C.kept_tiles(layout=layout, dtype=DTYPES[a.dtype], n=n, d=d) if keep_tiles else 0
    tiles = _empty(size, dtype=acc) if size > 0 else None
    bank_rows, bank_stride = 0, d
    if bank is not None:
        bank = _rows(bank)
        bank_rows, bank_stride = bank.shape[0], bank.stride(0)
    _C.contrastive_forward(
        _contrastive(problem, a, b),
        bank=_address(bank),
        bank_rows=bank_rows,
        bank_stride=bank_stride,
        ids_k=_address(problem.ids_k),
        sigma=problem.sigma,
        state=state.data_ptr(),
        mean_key=_address(mean_key),
        tiles=_address(tiles),
        loss=loss.data_ptr(),
        rank=_address(rank),
    )
    return Contrastive(loss, state, mean_key, rank), tiles


def _gradients(
    problem: Problem, a: Tensor, b: Tensor, wanted: Wanted
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Memory for the gradients of a, b and the bias; None where there is none to compute."""
    return (
        _like(a) if wanted.dq else None,
        _like(b) if wanted.dk else None,
        None if problem.bias is None else _like(problem.bias),
    )


def contrastive_backward(
    problem: Problem, kept: Kept, dloss: Tensor, wanted: Wanted
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """See :meth:`sslkernels.backends.interface.WholeLosses.contrastive_backward`."""
    problem, (state, mean_key, tiles) = _dense_ids(problem), kept
    a, b = _rows(problem.a), _rows(problem.b)
    da, db, dbias = _gradients(problem, a, b, wanted)
    dscale = _C.contrastive_backward(
        _contrastive(problem, a, b),
        state=state.data_ptr(),
        mean_key=_address(mean_key),
        tiles=_address(tiles),
        dloss=dloss.data_ptr(),
        dloss_stride=dloss.stride(0) if problem.reduction == "none" else 0,
        da=_address(da),
        db=_address(db),
        want_dscale=wanted.dscale,
        dbias=_address(dbias),
        sigma=problem.sigma,
    )
    return da, db, _scalar(dscale, dtype=state.dtype) if wanted.dscale else None, dbias


# Multiply-adds of the tiles below which gradients are computed with the value: a second call costs
# more than gradients that nobody asks for.
_AT_ONCE = 1 << 22
_UNROUNDED = (torch.float32, torch.float64)  # gradients can still be multiplied


def contrastive_at_once(problem: Problem, wanted: Wanted) -> tuple[Contrastive, AtOnce] | None:
    """See :meth:`sslkernels.backends.interface.WholeLosses.contrastive_at_once`."""
    a, rows = problem.a, problem.rows
    if rows * rows * a.shape[1] >= _AT_ONCE or a.dtype not in _UNROUNDED:
        return None
    if problem.bank is not None or problem.reduction == "none" or problem.bf16:
        return None
    problem, a, b = _dense_ids(problem), _rows(a), _rows(problem.b)
    loss, state = _like(problem.scale), _empty(rows + 3 * a.shape[0], dtype=a.dtype)
    da, db, dbias = _gradients(problem, a, b, wanted)
    dscale = _C.contrastive_at_once(
        _contrastive(problem, a, b),
        state=state.data_ptr(),
        loss=loss.data_ptr(),
        da=_address(da),
        db=_address(db),
        want_dscale=wanted.dscale,
        dbias=_address(dbias),
        sigma=problem.sigma,
    )
    gradients = AtOnce(da, db, dscale if wanted.dscale else None, dbias)
    return Contrastive(loss, state, None, None), gradients


def normalize_rows(x: Tensor, eps: float, out: Tensor | None) -> tuple[Tensor, Tensor]:
    """See :meth:`sslkernels.backends.interface.RowKernels.normalize_rows`."""
    x = _rows(x)
    unit = _like(x) if out is None else out
    norm = _empty(x.shape[:1], dtype=torch.float32)
    _C.unit_forward(
        dtype=DTYPES[x.dtype],
        d=x.shape[1],
        n=x.shape[0],
        x=x.data_ptr(),
        x_stride=x.stride(0),
        eps=eps,
        n_threads=torch.get_num_threads(),
        unit_dtype=DTYPES[unit.dtype],
        unit=unit.data_ptr(),
        norm=norm.data_ptr(),
    )
    return unit, norm


def normalize_rows_backward(dunit: Tensor, x: Tensor, norm: Tensor, eps: float) -> Tensor:
    """See :meth:`sslkernels.backends.interface.RowKernels.normalize_rows_backward`."""
    x, norm = _rows(x), norm.contiguous()
    dunit = _rows(dunit if dunit.dtype != torch.float64 else dunit.to(torch.float32))
    dx = _empty(x.shape, dtype=x.dtype)
    _C.unit_backward(
        dtype=DTYPES[x.dtype],
        d=x.shape[1],
        n=x.shape[0],
        x=x.data_ptr(),
        x_stride=x.stride(0),
        eps=eps,
        n_threads=torch.get_num_threads(),
        dunit_dtype=DTYPES[dunit.dtype],
        dunit=dunit.data_ptr(),
        dunit_stride=dunit.stride(0),
        norm=norm.data_ptr(),
        dx=dx.data_ptr(),
    )
    return dx


def _regression(prediction: Tensor, target: Tensor, reduction: str, cosine: bool) -> _C._Regression:
    """Dense rows as the kernels are given them; it holds addresses, not tensors."""
    return _C.regression(
        reduction=reduction,
        dtype=DTYPES[prediction.dtype],
        d=prediction.shape[1],
        n=prediction.shape[0],
        prediction=prediction.data_ptr(),
        prediction_stride=prediction.stride(0),
        target=target.data_ptr(),
        target_stride=target.stride(0),
        cosine=cosine,
        n_threads=torch.get_num_threads(),
    )


def regression_forward(
    prediction: Tensor, target: Tensor, reduction: str, cosine: bool
) -> tuple[Tensor, Tensor]:
    """2 - 2 cos by rows, or -cos; see :mod:`sslkernels.ops.regression`."""
    prediction, target = _rows(prediction), _rows(target)
    n, acc = prediction.shape[0], accumulation_dtype(prediction.dtype)
    state = _empty((n, 3), dtype=acc)
    loss = _empty((n,) if reduction == "none" else (), dtype=acc)
    args = _regression(prediction, target, reduction, cosine)
    _C.regression_forward(args, state=state.data_ptr(), loss=loss.data_ptr())
    return loss, state


def regression_backward(
    prediction: Tensor, target: Tensor, reduction: str, cosine: bool, state: Tensor, dloss: Tensor
) -> Tensor:
    """The gradient of the prediction; see :mod:`sslkernels.ops.regression`."""
    prediction, target = _rows(prediction), _rows(target)
    out = _like(prediction)
    _C.regression_backward(
        _regression(prediction, target, reduction, cosine),
        state=state.data_ptr(),
        dloss=dloss.data_ptr(),
        dloss_stride=dloss.stride(0) if reduction == "none" else 0,
        dprediction=out.data_ptr(),
    )
    return out


def _dense_paired(problem: Paired) -> Paired:
    """The problem with operands that the kernels can address: keys are contiguous in D."""
    query, positive, keys, scale, ids_q, ids_k, normalize, reduction = problem
    if keys is not None and keys.stride(2) != 1 and keys.shape[2] != 1:
        keys = keys.contiguous()
    ids_q, ids_k = _contiguous(ids_q), _contiguous(ids_k)
    return Paired(_rows(query), _rows(positive), keys, scale, ids_q, ids_k, normalize, reduction)


def _paired(problem: Paired) -> _C._Paired:
    """A dense problem as the kernels are given it; it holds addresses, not tensors."""
    query, positive, _, scale, ids_q, ids_k, normalize, reduction = problem
    return _C.paired(
        reduction=reduction,
        dtype=DTYPES[query.dtype],
        normalize=normalize,
        d=query.shape[1],
        n=query.shape[0],
        query=query.data_ptr(),
        query_stride=query.stride(0),
        positive_key=positive.data_ptr(),
        positive_stride=positive.stride(0),
        scale=scale.data_ptr(),
        ids_q=_address(ids_q),
        ids_k=_address(ids_k),
        n_threads=torch.get_num_threads(),
    )


def _state(problem: Paired, state: PairedState) -> dict[str, Any]:
    """The negatives and what forward leaves for backward, as fields of either kernel."""
    keys = problem.negative_keys
    m, row_stride, key_stride = (0, 0, 0) if keys is None else (keys.shape[1], *keys.stride()[:2])
    return {
        "negatives": _address(keys),
        "m": m,
        "row_stride": row_stride,
        "key_stride": key_stride,
        **{name: x.data_ptr() for name, x in state._asdict().items()},
    }


def paired_forward(problem: Paired) -> tuple[Tensor, PairedState, Tensor, Tensor]:
    """See :meth:`sslkernels.backends.interface.WholeLosses.paired_forward`."""
    problem, n, acc = _dense_paired(problem), problem.n, problem.acc
    loss = _empty((n,) if problem.reduction == "none" else (), dtype=acc)
    state = PairedState(
        _empty(n, dtype=acc),
        _empty(n, dtype=acc),
        _empty(2 * n, dtype=acc),
        _empty(problem.query.shape, dtype=acc),
    )
    rank = _empty(n, dtype=torch.int64)
    similarity = _C.paired_forward(
        _paired(problem), loss=loss.data_ptr(), rank=rank.data_ptr(), **_state(problem, state)
    )
    return loss, state, rank, _scalar(similarity, dtype=acc)


def paired_backward(
    problem: Paired, state: PairedState, dloss: Tensor, want_query: bool, want_positive: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See :meth:`sslkernels.backends.interface.WholeLosses.paired_backward`."""
    problem = _dense_paired(problem)
    query, keys = problem.query, problem.negative_keys
    dquery = query.new_empty(query.shape if want_query else 0)
    dpositive = query.new_empty(query.shape if want_positive else 0)
    dnegatives = query.new_empty(0 if keys is None else keys.shape)
    dscale = _C.paired_backward(
        _paired(problem),
        dloss=dloss.data_ptr(),
        dloss_stride=dloss.stride(0) if problem.reduction == "none" else 0,
        dquery=dquery.data_ptr() if want_query else None,
        dpositive=dpositive.data_ptr() if want_positive else None,
        dnegatives=None if keys is None else dnegatives.data_ptr(),
        **_state(problem, state),
    )
    return dquery, dpositive, dnegatives, _scalar(dscale, dtype=state.lse.dtype)


def _triplet(problem: Triplets) -> _C._Triplet:
    """A problem with rows that the kernels can address; it holds addresses, not tensors."""
    z, ids, margin, normalize, cosine, reduction = problem
    return _C.triplet(
        reduction=reduction,
        dtype=DTYPES[z.dtype],
        normalize=normalize,
        cosine=cosine,
        d=z.shape[1],
        n=z.shape[0],
        z=z.data_ptr(),
        z_stride=z.stride()[0],
        margin=margin.data_ptr(),
        ids=ids.data_ptr(),
        n_threads=torch.get_num_threads(),
    )


def triplet_forward(problem: Triplets) -> tuple[Tensor, TripletState]:
    """See :meth:`sslkernels.backends.interface.WholeLosses.triplet_forward`."""
    problem = problem._replace(z=_rows(problem.z), ids=problem.ids.contiguous())
    n, acc = problem.n, problem.acc
    loss, share = _empty((), dtype=acc), _empty((), dtype=acc)
    chosen = _empty((2, n), dtype=torch.int64)
    distance, norm = _empty((2, n), dtype=acc), _empty(n, dtype=acc)
    _C.triplet_forward(
        _triplet(problem),
        chosen=chosen.data_ptr(),
        distance=distance.data_ptr(),
        norm=norm.data_ptr(),
        share=share.data_ptr(),
        loss=loss.data_ptr(),
    )
    return loss, TripletState(chosen, distance, norm, share)


def triplet_backward(
    problem: Triplets, state: TripletState, dloss: Tensor, want_z: bool
) -> tuple[Tensor | None, Tensor]:
    """See :meth:`sslkernels.backends.interface.WholeLosses.triplet_backward`."""
    problem = problem._replace(z=_rows(problem.z), ids=problem.ids.contiguous())
    z = problem.z
    dz = _empty(z.shape, dtype=z.dtype) if want_z else None
    chosen, distance, norm, share = state
    dmargin = _C.triplet_backward(
        _triplet(problem),
        chosen=chosen.data_ptr(),
        distance=distance.data_ptr(),
        norm=norm.data_ptr(),
        share=share.data_ptr(),
        dloss=dloss.data_ptr(),
        dz=_address(dz),
    )
    return dz, _scalar(dmargin, dtype=state.share.dtype)
