# SPDX-License-Identifier: Apache-2.0
"""The C++ kernels (``csrc/cpu``) behind the backend interface: addresses, sizes and threads.

``sslkernels._C`` does not link an OpenMP runtime.  Its symbols are resolved from the one that torch
has loaded, so that a process has a single pool of threads and ``torch.set_num_threads`` holds for
both.  Only a torch built without OpenMP makes us load libgomp ourselves.
"""

from __future__ import annotations

import ctypes
import os

import torch
from torch import Tensor

from sslkernels.backends.interface import (
    Attend,
    Extremes,
    Kind,
    PairwiseBackward,
    PairwiseForward,
)

try:
    from sslkernels import _C
except ImportError as error:
    if "GOMP" not in str(error) and "omp_get" not in str(error):
        raise
    ctypes.CDLL("libgomp.so.1", mode=ctypes.RTLD_GLOBAL)
    from sslkernels import _C

from sslkernels.backends.updates_cpu import DTYPES, CopyPlan, EmaPlan, enqueue_  # noqa: E402

__all__ = [
    "CopyPlan",
    "EmaPlan",
    "attend",
    "enqueue_",
    "extremes",
    "pairwise_backward",
    "pairwise_forward",
]

_C.set_isa(os.environ.get("SSLKERNELS_ISA") or "auto")


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """Accumulation dtype: float64 for float64, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _address(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def _tiles(
    kind: Kind,
    q: Tensor,
    k: Tensor | None,
    scale: Tensor,
    bias: Tensor | None,
    ids_q: Tensor | None,
    ids_k: Tensor | None,
) -> _C._Tiles:
    """What the kernels of the tile engine are given first; it holds addresses, not tensors."""
    return _C.tiles(
        kind=kind,
        dtype=DTYPES[q.dtype],
        d=q.shape[1],
        q=q.data_ptr(),
        n=q.shape[0],
        k=_address(k),
        m=-1 if k is None else k.shape[0],
        scale=scale.data_ptr(),
        bias=_address(bias),
        ids_q=_address(ids_q),
        ids_k=_address(ids_k),
        n_threads=torch.get_num_threads(),
    )


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
    """See :meth:`sslkernels.backends.interface.Backend.pairwise_forward`."""
    q = q.contiguous()
    k = None if k is None else k.contiguous()
    n, m = q.shape[0], -1 if k is None else k.shape[0]
    acc = accumulator(q.dtype)
    row = torch.empty(n, dtype=acc)
    col = torch.empty(m if want_col else 0, dtype=acc)
    rank_row = torch.empty(0 if threshold_row is None else n, dtype=torch.int64)
    rank_col = torch.empty(0 if threshold_col is None else m, dtype=torch.int64)
    _C.pairwise_forward(
        _tiles(kind, q, k, scale, bias, ids_q, ids_k),
        row=row.data_ptr(),
        col=col.data_ptr() if want_col else None,
        threshold_row=_address(threshold_row),
        threshold_col=_address(threshold_col),
        rank_row=rank_row.data_ptr(),
        rank_col=rank_col.data_ptr(),
    )
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
    """See :meth:`sslkernels.backends.interface.Backend.pairwise_backward`."""
    q = q.contiguous()
    k = None if k is None else k.contiguous()
    drow = drow.contiguous()
    dcol = None if dcol is None else dcol.contiguous()
    n, d = q.shape
    acc = accumulator(q.dtype)
    want_dq = want_dq or k is None
    dq = torch.empty((n, d) if want_dq else 0, dtype=acc)
    dk = torch.empty((k.shape[0], d) if want_dk and k is not None else 0, dtype=acc)
    dbias = _C.pairwise_backward(
        _tiles(kind, q, k, scale, bias, ids_q, ids_k),
        row=row.data_ptr(),
        col=_address(col),
        drow=drow.data_ptr(),
        dcol=_address(dcol),
        dq=dq.data_ptr() if want_dq else None,
        dk=dk.data_ptr() if want_dk and k is not None else None,
    )
    return PairwiseBackward(dq, dk, torch.scalar_tensor(dbias, dtype=acc))


def attend(
    q: Tensor,
    k: Tensor,
    scale: Tensor,
    ids_q: Tensor | None,
    ids_k: Tensor | None,
    threshold: Tensor | None,
) -> Attend:
    """See :meth:`sslkernels.backends.interface.Backend.attend`."""
    q, k = q.contiguous(), k.contiguous()
    n, d = q.shape
    acc = accumulator(q.dtype)
    lse = torch.empty(n, dtype=acc)
    mean_key = torch.empty(n, d, dtype=acc)
    rank = torch.empty(0 if threshold is None else n, dtype=torch.int64)
    _C.attend(
        _tiles("lse", q, k, scale, None, ids_q, ids_k),
        lse=lse.data_ptr(),
        mean_key=mean_key.data_ptr(),
        threshold=_address(threshold),
        rank=None if threshold is None else rank.data_ptr(),
    )
    return Attend(lse, mean_key, rank)


def extremes(
    q: Tensor,
    k: Tensor | None,
    scale: Tensor,
    bias_k: Tensor | None,
    ids_q: Tensor,
    ids_k: Tensor | None,
) -> Extremes:
    """See :meth:`sslkernels.backends.interface.Backend.extremes`."""
    q = q.contiguous()
    k = None if k is None else k.contiguous()
    n = q.shape[0]
    max_same = torch.empty(n, dtype=torch.int64)
    min_other = torch.empty(n, dtype=torch.int64)
    _C.extremes(
        _tiles("lse", q, k, scale, None, ids_q, ids_k),
        bias_k=_address(bias_k),
        max_same=max_same.data_ptr(),
        min_other=min_other.data_ptr(),
    )
    return Extremes(max_same, min_other)


def _unit_rows(x: Tensor) -> Tensor:
    """x, or a copy when its rows are not contiguous: kernels take any stride between rows."""
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def _contrastive(
    layout: str,
    a: Tensor,
    b: Tensor,
    scale: Tensor,
    ids_q: Tensor | None,
    ids_k: Tensor | None,
    normalize: bool,
    reduction: str,
    bf16: bool,
) -> _C._Contrastive:
    """What the kernels of a whole loss are given first; it holds addresses, not tensors."""
    n, d = a.shape
    return _C.contrastive(
        layout=layout,
        reduction=reduction,
        dtype=DTYPES[a.dtype],
        normalize=normalize,
        d=d,
        n=n,
        a=a.data_ptr(),
        a_stride=a.stride()[0],  # stride(0) takes 0.1 us longer
        b=b.data_ptr(),
        b_stride=b.stride()[0],
        scale=scale.data_ptr(),
        ids_q=_address(ids_q),
        ids_k=_address(ids_k),
        bf16=bf16,
        n_threads=torch.get_num_threads(),
    )


def contrastive_forward(
    layout: str,
    a: Tensor,
    b: Tensor,
    bank: Tensor | None,
    scale: Tensor,
    ids_q: Tensor | None,
    ids_k: Tensor | None,
    normalize: bool,
    reduction: str,
    bf16: bool,
    want_rank: bool,
    keep_tiles: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """A whole loss; see :mod:`sslkernels.ops.contrastive` for arguments and results."""
    if bf16 and not _C.has_bf16():
        raise RuntimeError(
            "compute_dtype=torch.bfloat16 needs a processor with AVX512-BF16 and that instruction set "
            f"in use, got {_C.isa()!r}"
        )
    a, b = _unit_rows(a), _unit_rows(b)
    n, d = a.shape
    acc = accumulator(a.dtype)
    rows = 2 * n if layout in ("joint", "both") else n
    shape = () if reduction != "none" else ((2 * n,) if layout == "joint" else (n,))
    loss = torch.empty(shape, dtype=acc)
    state = torch.empty(rows + 3 * n, dtype=acc)
    mean_key = None if bank is None else torch.empty((n, d), dtype=acc)
    rank = torch.empty(rows, dtype=torch.int64) if want_rank else None
    size = _C.kept_tiles(layout=layout, dtype=DTYPES[a.dtype], n=n, d=d) if keep_tiles else 0
    tiles = torch.empty(size, dtype=acc) if size > 0 else None
    bank_rows, bank_stride = 0, d
    if bank is not None:
        bank = _unit_rows(bank)
        bank_rows, bank_stride = bank.shape[0], bank.stride(0)
    _C.contrastive_forward(
        _contrastive(layout, a, b, scale, ids_q, ids_k, normalize, reduction, bf16),
        bank=_address(bank),
        bank_rows=bank_rows,
        bank_stride=bank_stride,
        state=state.data_ptr(),
        mean_key=_address(mean_key),
        tiles=_address(tiles),
        loss=loss.data_ptr(),
        rank=_address(rank),
    )
    return loss, state, mean_key, rank, tiles


def contrastive_backward(
    layout: str,
    a: Tensor,
    b: Tensor,
    scale: Tensor,
    ids_q: Tensor | None,
    ids_k: Tensor | None,
    normalize: bool,
    reduction: str,
    bf16: bool,
    state: Tensor,
    mean_key: Tensor | None,
    tiles: Tensor | None,
    dloss: Tensor,
    want_da: bool,
    want_db: bool,
    want_dscale: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients; see :mod:`sslkernels.ops.contrastive` for arguments and results."""
    a, b = _unit_rows(a), _unit_rows(b)
    n, d = a.shape
    da = torch.empty((n, d), dtype=a.dtype) if want_da else None
    db = torch.empty((n, d), dtype=a.dtype) if want_db else None
    stride = dloss.stride(0) if reduction == "none" else 0
    dscale = _C.contrastive_backward(
        _contrastive(layout, a, b, scale, ids_q, ids_k, normalize, reduction, bf16),
        state=state.data_ptr(),
        mean_key=_address(mean_key),
        tiles=_address(tiles),
        dloss=dloss.data_ptr(),
        dloss_stride=stride,
        da=_address(da),
        db=_address(db),
        want_dscale=want_dscale,
    )
    return da, db, torch.scalar_tensor(dscale, dtype=state.dtype) if want_dscale else None


def regression_forward(prediction: Tensor, target: Tensor, reduction: str) -> tuple[Tensor, Tensor]:
    """2 - 2 cos by rows; see :mod:`sslkernels.ops.regression`."""
    prediction, target = _unit_rows(prediction), _unit_rows(target)
    n, d = prediction.shape
    acc = accumulator(prediction.dtype)
    state = torch.empty((n, 3), dtype=acc)
    loss = torch.empty((n,) if reduction == "none" else (), dtype=acc)
    _C.regression_forward(
        reduction=reduction,
        dtype=DTYPES[prediction.dtype],
        d=d,
        n=n,
        prediction=prediction.data_ptr(),
        prediction_stride=prediction.stride(0),
        target=target.data_ptr(),
        target_stride=target.stride(0),
        n_threads=torch.get_num_threads(),
        state=state.data_ptr(),
        loss=loss.data_ptr(),
    )
    return loss, state


def regression_backward(
    prediction: Tensor, target: Tensor, reduction: str, state: Tensor, dloss: Tensor
) -> Tensor:
    """The gradient of the prediction; see :mod:`sslkernels.ops.regression`."""
    prediction, target = _unit_rows(prediction), _unit_rows(target)
    n, d = prediction.shape
    out = torch.empty((n, d), dtype=prediction.dtype)
    _C.regression_backward(
        reduction=reduction,
        dtype=DTYPES[prediction.dtype],
        d=d,
        n=n,
        prediction=prediction.data_ptr(),
        prediction_stride=prediction.stride(0),
        target=target.data_ptr(),
        target_stride=target.stride(0),
        n_threads=torch.get_num_threads(),
        state=state.data_ptr(),
        dloss=dloss.data_ptr(),
        dloss_stride=dloss.stride(0) if reduction == "none" else 0,
        dprediction=out.data_ptr(),
    )
    return out


def _unit_keys(x: Tensor) -> Tensor:
    """x [N, M, D], or a copy when its rows are not contiguous."""
    return x if x.stride(2) == 1 or x.shape[2] == 1 else x.contiguous()


def _paired(
    query: Tensor,
    positive_key: Tensor,
    scale: Tensor,
    ids_q: Tensor | None,
    ids_k: Tensor | None,
    normalize: bool,
    reduction: str,
) -> _C._Paired:
    """What the kernels of the paired loss are given first; it holds addresses, not tensors."""
    n, d = query.shape
    return _C.paired(
        reduction=reduction,
        dtype=DTYPES[query.dtype],
        normalize=normalize,
        d=d,
        n=n,
        query=query.data_ptr(),
        query_stride=query.stride(0),
        positive_key=positive_key.data_ptr(),
        positive_stride=positive_key.stride(0),
        scale=scale.data_ptr(),
        ids_q=_address(ids_q),
        ids_k=_address(ids_k),
        n_threads=torch.get_num_threads(),
    )


def paired_forward(
    query: Tensor,
    positive_key: Tensor,
    negative_keys: Tensor,
    scale: Tensor,
    ids_q: Tensor | None,
    ids_k: Tensor | None,
    normalize: bool,
    reduction: str,
) -> tuple[Tensor, ...]:
    """InfoNCE with negatives of its own for every query; see :mod:`sslkernels.ops.paired`."""
    query, positive_key = _unit_rows(query), _unit_rows(positive_key)
    keys = _unit_keys(negative_keys)
    ids_q = None if ids_q is None else ids_q.contiguous()
    ids_k = None if ids_k is None else ids_k.contiguous()
    n, d = query.shape
    acc = accumulator(query.dtype)
    loss = torch.empty((n,) if reduction == "none" else (), dtype=acc)
    lse, positive = torch.empty(n, dtype=acc), torch.empty(n, dtype=acc)
    norms = torch.empty(2 * n, dtype=acc)
    mean_key = torch.empty((n, d), dtype=acc)
    rank = torch.empty(n, dtype=torch.int64)
    similarity = _C.paired_forward(
        _paired(query, positive_key, scale, ids_q, ids_k, normalize, reduction),
        negatives=keys.data_ptr(),
        m=keys.shape[1],
        row_stride=keys.stride(0),
        key_stride=keys.stride(1),
        lse=lse.data_ptr(),
        positive=positive.data_ptr(),
        norms=norms.data_ptr(),
        mean_key=mean_key.data_ptr(),
        loss=loss.data_ptr(),
        rank=rank.data_ptr(),
    )
    mean = torch.scalar_tensor(similarity, dtype=acc)
    return loss, lse, positive, norms, mean_key, rank, mean


def paired_backward(
    query: Tensor,
    positive_key: Tensor,
    negative_keys: Tensor | None,
    scale: Tensor,
    ids_q: Tensor | None,
    ids_k: Tensor | None,
    normalize: bool,
    reduction: str,
    lse: Tensor,
    positive: Tensor,
    norms: Tensor,
    mean_key: Tensor,
    dloss: Tensor,
    want_query: bool,
    want_positive: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients; see :mod:`sslkernels.ops.paired`."""
    query, positive_key = _unit_rows(query), _unit_rows(positive_key)
    keys = None if negative_keys is None else _unit_keys(negative_keys)
    ids_q = None if ids_q is None else ids_q.contiguous()
    ids_k = None if ids_k is None else ids_k.contiguous()
    n, d = query.shape
    dquery = query.new_empty((n, d) if want_query else 0)
    dpositive = query.new_empty((n, d) if want_positive else 0)
    dnegatives = query.new_empty(0 if keys is None else keys.shape)
    m, row_stride, key_stride = 0, 0, 0
    if keys is not None:
        m, row_stride, key_stride = keys.shape[1], keys.stride(0), keys.stride(1)
    dscale = _C.paired_backward(
        _paired(query, positive_key, scale, ids_q, ids_k, normalize, reduction),
        negatives=_address(keys),
        m=m,
        row_stride=row_stride,
        key_stride=key_stride,
        lse=lse.data_ptr(),
        positive=positive.data_ptr(),
        norms=norms.data_ptr(),
        mean_key=mean_key.data_ptr(),
        dloss=dloss.data_ptr(),
        dloss_stride=dloss.stride(0) if reduction == "none" else 0,
        dquery=dquery.data_ptr() if want_query else None,
        dpositive=dpositive.data_ptr() if want_positive else None,
        dnegatives=None if keys is None else dnegatives.data_ptr(),
    )
    return dquery, dpositive, dnegatives, torch.scalar_tensor(dscale, dtype=lse.dtype)
