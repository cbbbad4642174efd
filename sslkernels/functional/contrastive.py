# SPDX-License-Identifier: Apache-2.0
"""Losses with one positive a row: NT-Xent, InfoNCE, CLIP and DCL."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import cast

import numpy as np
import torch
from torch import Tensor

from sslkernels import distributed
from sslkernels._numbers import type_name
from sslkernels._types import ContrastiveMetrics, Reduction
from sslkernels.backends.interface import Paired, Problem
from sslkernels.functional import _checks as checks
from sslkernels.ops import formulas, heads
from sslkernels.ops._library import has_tangent
from sslkernels.ops.contrastive import contrastive
from sslkernels.ops.paired import paired

Result = Tensor | tuple[Tensor, ContrastiveMetrics]


def _whole(problem: Problem, return_metrics: bool) -> Result:
    """A loss that is an op of its own, and its metrics."""
    out = contrastive(problem, return_metrics)
    return (out.loss, heads.problem_metrics(problem, out)) if return_metrics else out.loss


def _reduced(rows: tuple[Tensor, ContrastiveMetrics | None], reduction: Reduction) -> Result:
    loss = heads.reduce(rows[0], reduction)
    return loss if rows[1] is None else (loss, rows[1])


def nt_xent_loss(
    z1: Tensor | Sequence[Tensor],
    z2: Tensor | None = None,
    temperature: float | Tensor = 0.1,
    *,
    normalize: bool = True,
    reduction: Reduction = "mean",
    group: distributed.Group = None,
    group_mode: str = "auto",
    compute_dtype: torch.dtype | None = None,
    return_metrics: bool = False,
) -> Tensor | tuple[Tensor, ContrastiveMetrics]:
    """NT-Xent, the loss of SimCLR: each view must find the other view of its sample.

    With z = cat(z1, z2), s_ij = <z_i, z_j> / temperature and i' the other view of row i,

        loss_i = -log( exp(s_ii') / sum_{j != i} exp(s_ij) )

    With V > 2 views it is the mean over the ordered positive pairs (i, p) of
    -log( e_ip / (e_ip + sum over the rows of other samples e_ij) ), which for V = 2 is the line
    above.

    The result is float32 (float64 for float64 inputs).  Extra memory is O(N * D).  N = 1 has no
    negatives and gives 0; no rows at all give 0 too.  SimCLR's official code sums its two
    directions: 2x this mean.

    Args:
        z1: [N, D], or a sequence of V >= 2 such views with z2 left out.  Where dtypes differ, the
            widest one counts, and each gradient has the dtype of its view.
        z2: [N, D], on the device of z1.
        temperature: A number > 0, or a tensor of shape [] or [1] (not inspected), which may require
            grad.
        normalize: Whether to divide rows by max(norm, 1e-12) first; False takes them as they are.
        reduction: "mean" over the V * N rows, "sum", or "none": [V * N] in the order of cat(views).
        group: A torch.distributed group, or True for the default one: negatives from every rank, which
            may hold different numbers of rows, also none.  All ranks make the same call.  The loss is
            that of the joined batch, with the same bits on every rank, and the gradient W times its
            gradient (W ranks), so that DDP's averaging of parameter gradients gives single-process
            training on the joined batch; with reduction "none" the rows of this rank, and the
            gradient of the sum over ranks.  The backward pass communicates: all ranks call it.
        group_mode: "gather" holds the rows of all ranks, O(N_global * D); "ring" passes them round in
            blocks, O(N * D) for any number of ranks; "auto" takes the ring from 256 MB of gathered
            rows on.
        compute_dtype: None, or torch.bfloat16 to multiply the negatives in bfloat16 (about twice as
            fast where the processor can; gradients then have 2 to 3 digits).  Positives stay exact.
        return_metrics: Whether to return ContrastiveMetrics as well (not with ``group``).

    Returns:
        The loss, or (loss, ContrastiveMetrics).

    Raises:
        TypeError: If an argument has a wrong type or dtype.
        ValueError: If shapes or devices differ, temperature <= 0 or the reduction is unknown.
        RuntimeError: If compute_dtype is bfloat16 and the processor lacks AVX512-BF16.

    Reference:
        Chen et al., A Simple Framework for Contrastive Learning of Visual Representations,
        arXiv:2002.05709.

    Example:
        >>> import torch, sslkernels
        >>> z1, z2 = torch.randn(8, 16), torch.randn(8, 16)
        >>> sslkernels.nt_xent_loss(z1, z2, temperature=0.5).shape
        torch.Size([])
    """
    op = "nt_xent_loss"
    views, names = _views(op, z1, z2)
    for name, view in zip(names[1:], views[1:], strict=True):
        checks.check_pair(op, names[0], views[0], name, view)
    views = checks.widen(*views)
    checks.check_reduction(op, reduction)
    checks.check_group_mode(op, group_mode)
    scale = checks.inverse_temperature(op, temperature, views[0])
    bf16 = checks.check_compute_dtype(op, compute_dtype, views[0])
    normalize, return_metrics = _flags(op, normalize, return_metrics)
    if bf16 and (len(views) > 2 or group is not None):
        raise ValueError(f"{op}: compute_dtype works with two views and without group")
    if group is not None:
        if return_metrics:
            raise ValueError(f"{op}: return_metrics must be False with group")
        wide = distributed.Wide(op, group, group_mode, normalize, reduction)
        return distributed.nt_xent(wide, views, scale)
    if len(views) > 2:
        return _reduced(formulas.multiview(views, scale, normalize, return_metrics), reduction)
    a, b = views
    problem = Problem("joint", a, b, None, scale, None, None, normalize, reduction, bf16)
    return _whole(problem, return_metrics)


def _views(op: str, z1: object, z2: object) -> tuple[tuple[Tensor, ...], tuple[str, ...]]:
    """The views and their names, from two arguments or from a sequence in the first."""
    if isinstance(z1, (Tensor, np.ndarray)):
        if z2 is None:
            raise TypeError(f"{op}: z2 must be a tensor, got None (or pass a sequence of views)")
        views: tuple[object, ...] = (z1, z2)
        names: tuple[str, ...] = ("z1", "z2")
    else:
        if not isinstance(z1, Iterable) or isinstance(z1, (str, Mapping)):
            raise TypeError(
                f"{op}: z1 must be a tensor or a sequence of tensors, got {type_name(z1)}"
            )
        if z2 is not None:
            raise TypeError(f"{op}: z2 must be left out when z1 is a sequence of views")
        views = tuple(z1)
        names = tuple(f"views[{i}]" for i in range(len(views)))
        if len(views) < 2:
            raise ValueError(f"{op}: at least two views are needed, got {len(views)}")
    return cast(tuple[Tensor, ...], views), names


def _flags(op: str, normalize: bool, return_metrics: bool) -> tuple[bool, bool]:
    return (
        checks.flag(op, "normalize", normalize),
        checks.flag(op, "return_metrics", return_metrics),
    )


def info_nce_loss(
    query: Tensor,
    positive_key: Tensor,
    negative_keys: Tensor | None = None,
    temperature: float | Tensor = 0.1,
    reduction: Reduction = "mean",
    negative_mode: str = "unpaired",
    *,
    normalize: bool = True,
    group: distributed.Group = None,
    group_mode: str = "auto",
    compute_dtype: torch.dtype | None = None,
    return_metrics: bool = False,
    query_ids: Tensor | None = None,
    negative_ids: Tensor | None = None,
) -> Tensor | tuple[Tensor, ContrastiveMetrics]:
    """InfoNCE: each query must find its positive key among negatives (CPC, MoCo).

        loss_i = -log( exp(s_i+) / (exp(s_i+) + sum_{j in negatives of i} exp(s_ij)) )

    with s = <q, k> / temperature.  The negatives of query i are: without ``negative_keys`` the
    positive keys of the other queries; "unpaired" all of ``negative_keys`` (a queue); "paired" the
    rows ``negative_keys[i]``.  Negative keys that need no gradient are read once, in the forward
    pass, and not kept: a queue may be overwritten right after the call.

    A query without any negative has loss 0.  MoCo v3's official code is
    (this(q1, k2) + this(q2, k1)) * 2 * temperature.

    Args:
        query: [N, D].
        positive_key: [N, D], same device.
        negative_keys: None, [M, D] ("unpaired") or [N, M, D] ("paired"), same device.  Where dtypes
            differ, as those of a float32 queue and of queries from autocast do, the widest one
            counts and the others are converted: negatives narrower than the query are copied.
            Gradients have the dtype of their input.
        temperature: A number > 0, or a tensor of shape [] or [1] (not inspected), which may require
            grad.
        reduction: "mean" over N, "sum", or "none": [N].
        negative_mode: "unpaired" or "paired"; without negative_keys it has no meaning.
        normalize: Whether to divide rows by max(norm, 1e-12) first, negatives included.
        group: A torch.distributed group, or True for the default one: the positive keys of
            every rank are negatives (without ``negative_keys``).  Ranks may hold different numbers of
            rows, also none.  All ranks make the same call.  The loss is
            that of the joined batch, with the same bits on every rank, and the gradient W times its
            gradient (W ranks), so that DDP's averaging of parameter gradients gives single-process
            training on the joined batch; with reduction "none" the rows of this rank, and the
            gradient of the sum over ranks.  The backward pass communicates: all ranks call it.
        group_mode: "gather" holds the rows of all ranks, O(N_global * D); "ring" passes them round in
            blocks, O(N * D) for any number of ranks; "auto" takes the ring from 256 MB of gathered
            rows on.
        compute_dtype: None, or torch.bfloat16 to multiply the negatives in bfloat16 (about twice as
            fast where the processor can; gradients then have 2 to 3 digits).  Positives stay exact.
            Not for paired negatives or ones that need a gradient.
        return_metrics: Whether to return ContrastiveMetrics as well.
        query_ids: [N] integers.  Keys with the id of the query are false negatives and left out;
            in batch, key j has the id of query j.
        negative_ids: [M] or, paired, [N, M] integers; needed with query_ids and negative_keys.

    Returns:
        The loss, or (loss, ContrastiveMetrics).

    Raises:
        TypeError: If an argument has a wrong type or dtype.
        ValueError: If shapes or devices differ, temperature <= 0, ids are incomplete, or reduction
            or negative_mode is unknown.
        RuntimeError: If compute_dtype is bfloat16 and the processor lacks AVX512-BF16.

    Reference:
        van den Oord et al., Representation Learning with Contrastive Predictive Coding,
        arXiv:1807.03748; He et al., Momentum Contrast, arXiv:1911.05722.

    Example:
        >>> import torch, sslkernels
        >>> q, k, queue = torch.randn(8, 16), torch.randn(8, 16), torch.randn(64, 16)
        >>> sslkernels.info_nce_loss(q, k, queue, temperature=0.07).shape
        torch.Size([])
    """
    op = "info_nce_loss"
    checks.check_pair(op, "query", query, "positive_key", positive_key)
    checks.check_reduction(op, reduction)
    checks.check_group_mode(op, group_mode)
    _check_negatives(op, query, negative_keys, negative_mode)
    if negative_keys is None:
        query, positive_key = checks.widen(query, positive_key)
    else:
        query, positive_key, negative_keys = checks.widen(query, positive_key, negative_keys)
    scale = checks.inverse_temperature(op, temperature, query)
    ids_q, ids_k = _info_nce_ids(op, query, negative_keys, query_ids, negative_ids)
    bf16 = checks.check_compute_dtype(op, compute_dtype, query)
    normalize, return_metrics = _flags(op, normalize, return_metrics)
    own = (normalize, reduction)

    if group is not None:
        if bf16 or return_metrics or negative_keys is not None:
            raise ValueError(
                f"{op}: group works without negative_keys, compute_dtype and return_metrics "
                "(a queue of all ranks' keys is KeyQueue(gather=True))"
            )
        wide = distributed.Wide(op, group, group_mode, *own)
        return distributed.info_nce(wide, query, positive_key, scale, ids_q)
    if negative_keys is None:
        problem = Problem("cross", query, positive_key, None, scale, ids_q, None, *own, bf16)
        return _whole(problem, return_metrics)
    keys_need_grad = negative_keys.requires_grad and torch.is_grad_enabled()
    if negative_keys.ndim == 2 and not keys_need_grad and not has_tangent(negative_keys):
        bank = negative_keys.detach()
        problem = Problem("bank", query, positive_key, bank, scale, ids_q, ids_k, *own, bf16)
        return _whole(problem, return_metrics)
    if bf16:
        raise ValueError(
            f"{op}: compute_dtype must be None for paired negative_keys or ones that require grad"
        )
    if negative_keys.ndim == 3:
        each = paired(Paired(query, positive_key, negative_keys, scale, ids_q, ids_k, *own))
        if not return_metrics:
            return each.loss
        return each.loss, heads.metrics(each.rank, each.positive, each.negative_similarity)
    ids = (ids_q, ids_k)
    rows = formulas.learned_bank(
        query, positive_key, negative_keys, scale, ids, normalize, return_metrics
    )
    return _reduced(rows, reduction)


def _check_negatives(op: str, query: Tensor, negative_keys: Tensor | None, mode: str) -> None:
    if mode not in ("unpaired", "paired"):
        raise ValueError(f"{op}: negative_mode must be 'unpaired' or 'paired', got {mode!r}")
    if negative_keys is None:
        return
    checks.check_matrix(op, "negative_keys", negative_keys, ndim=2 if mode == "unpaired" else 3)
    checks.check_device(op, "query", query, "negative_keys", negative_keys)
    if negative_keys.shape[-1] != query.shape[1]:
        raise ValueError(
            f"{op}: query and negative_keys must have the same last dimension, "
            f"got {list(query.shape)} and {list(negative_keys.shape)}"
        )
    if mode == "paired" and len(negative_keys) != len(query):
        raise ValueError(
            f"{op}: paired negative_keys must have one block of rows for each query, "
            f"got {list(negative_keys.shape)} for {len(query)} queries"
        )


def _info_nce_ids(
    op: str,
    query: Tensor,
    negative_keys: Tensor | None,
    query_ids: Tensor | None,
    negative_ids: Tensor | None,
) -> tuple[Tensor | None, Tensor | None]:
    if negative_ids is not None and (query_ids is None or negative_keys is None):
        raise ValueError(f"{op}: negative_ids needs query_ids and negative_keys")
    if query_ids is None:
        return None, None
    ids_q = checks.check_ids(op, "query_ids", query_ids, (len(query),), query.device)
    if negative_keys is None:
        return ids_q, None
    if negative_ids is None:
        raise ValueError(f"{op}: query_ids with negative_keys needs negative_ids")
    shape = tuple(negative_keys.shape[:-1])
    return ids_q, checks.check_ids(op, "negative_ids", negative_ids, shape, query.device)


def clip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: float | Tensor,
    *,
    normalize: bool = False,
    reduction: Reduction = "mean",
    group: distributed.Group = None,
    group_mode: str = "auto",
    compute_dtype: torch.dtype | None = None,
    return_metrics: bool = False,
) -> Tensor | tuple[Tensor, ContrastiveMetrics]:
    """CLIP's symmetric cross-entropy over image-text pairs.

        loss_i = (CE over texts of image i + CE over images of text i) / 2

    with logits = logit_scale * <x, y>.  Rows and columns come from one pass over the tiles.
    open_clip's ``ClipLoss`` is the mean of it.

    Args:
        image_features: [N, D], normalised by the caller (the CLIP convention) unless ``normalize``.
        text_features: [N, D], same device.  Where dtypes differ, the wider one counts, and each
            gradient has the dtype of its input.
        logit_scale: The number that multiplies (already exponentiated): a number or a tensor of
            shape [] or [1], which may require grad.
        normalize: Whether to divide rows by max(norm, 1e-12) first.
        reduction: "mean" over N, "sum", or "none": [N].
        group: A torch.distributed group, or True for the default one: negatives from every rank, which
            may hold different numbers of rows, also none.  All ranks make the same call.  The loss is
            that of the joined batch, with the same bits on every rank, and the gradient W times its
            gradient (W ranks), so that DDP's averaging of parameter gradients gives single-process
            training on the joined batch; with reduction "none" the rows of this rank, and the
            gradient of the sum over ranks.  The backward pass communicates: all ranks call it.
        group_mode: "gather" holds the rows of all ranks, O(N_global * D); "ring" passes them round in
            blocks, O(N * D) for any number of ranks; "auto" takes the ring from 256 MB of gathered
            rows on.
        compute_dtype: None, or torch.bfloat16 to multiply the negatives in bfloat16 (about twice as
            fast where the processor can; gradients then have 2 to 3 digits).  Positives stay exact.
        return_metrics: Whether to return ContrastiveMetrics of both directions together as well.

    Returns:
        The loss, or (loss, ContrastiveMetrics).

    Raises:
        TypeError: If an argument has a wrong type or dtype.
        ValueError: If shapes or devices differ or the reduction is unknown.
        RuntimeError: If compute_dtype is bfloat16 and the processor lacks AVX512-BF16.

    Reference:
        Radford et al., Learning Transferable Visual Models From Natural Language Supervision,
        arXiv:2103.00020.
    """
    op = "clip_loss"
    checks.check_pair(op, "image_features", image_features, "text_features", text_features)
    image_features, text_features = checks.widen(image_features, text_features)
    checks.check_reduction(op, reduction)
    checks.check_group_mode(op, group_mode)
    scale = checks.scalar(op, "logit_scale", logit_scale, image_features)
    bf16 = checks.check_compute_dtype(op, compute_dtype, image_features)
    normalize, return_metrics = _flags(op, normalize, return_metrics)
    if group is not None:
        checks.no_compute_dtype(op, bf16)
        if return_metrics:
            raise ValueError(f"{op}: return_metrics must be False with group")
        wide = distributed.Wide(op, group, group_mode, normalize, reduction)
        return distributed.clip(wide, image_features, text_features, scale)
    problem = Problem(
        "both", image_features, text_features, None, scale, None, None, normalize, reduction, bf16
    )
    return _whole(problem, return_metrics)


def dcl_loss(
    z1: Tensor,
    z2: Tensor,
    temperature: float | Tensor = 0.1,
    *,
    sigma: float | None = None,
    normalize: bool = True,
    reduction: Reduction = "mean",
    group: distributed.Group = None,
    group_mode: str = "auto",
    compute_dtype: torch.dtype | None = None,
) -> Tensor:
    """Decoupled contrastive loss: NT-Xent without the positive in the denominator.

    With z = cat(z1, z2) and i' the other view of row i,

        loss_i = -w_i s_ii' + log sum_{j not in {i, i'}} exp(s_ij),     w_i = 1

    DCLW (``sigma`` given) weighs positives by w_i = 2 - N * softmax_i(<z1_i, z2_i> / sigma), which
    carries no gradient.  The mean is over 2N rows, as lightly's ``DCLLoss`` and ``DCLWLoss``.

    N = 1 has no negatives: only the positive term is left.

    Args:
        z1: [N, D].
        z2: [N, D], same device.  Where dtypes differ, the wider one counts, and each gradient has
            the dtype of its input.
        temperature: A number > 0, or a tensor of shape [] or [1] (not inspected), which may require
            grad.
        sigma: None for DCL; a number > 0 for DCLW (the paper uses 0.5).
        normalize: Whether to divide rows by max(norm, 1e-12) first.
        reduction: "mean" over the 2N rows, "sum", or "none": [2N] in the order of cat(z1, z2).
        group: A torch.distributed group, or True for the default one: negatives from every rank, which
            may hold different numbers of rows, also none.  All ranks make the same call.  The loss is
            that of the joined batch, with the same bits on every rank, and the gradient W times its
            gradient (W ranks), so that DDP's averaging of parameter gradients gives single-process
            training on the joined batch; with reduction "none" the rows of this rank, and the
            gradient of the sum over ranks.  The backward pass communicates: all ranks call it.
        group_mode: "gather" holds the rows of all ranks, O(N_global * D); "ring" passes them round in
            blocks, O(N * D) for any number of ranks; "auto" takes the ring from 256 MB of gathered
            rows on.
        compute_dtype: None, or torch.bfloat16 to multiply the negatives in bfloat16 (about twice as
            fast where the processor can; gradients then have 2 to 3 digits).  Positives stay exact.

    Returns:
        The loss, which may be negative.

    Raises:
        TypeError: If an argument has a wrong type or dtype.
        ValueError: If shapes or devices differ, temperature or sigma <= 0, or the reduction is
            unknown.
        RuntimeError: If compute_dtype is bfloat16 and the processor lacks AVX512-BF16.

    Reference:
        Yeh et al., Decoupled Contrastive Learning, arXiv:2110.06848.
    """
    op = "dcl_loss"
    checks.check_pair(op, "z1", z1, "z2", z2)
    checks.check_reduction(op, reduction)
    checks.check_group_mode(op, group_mode)
    z1, z2 = checks.widen(z1, z2)
    scale = checks.inverse_temperature(op, temperature, z1)
    sigma = 0.0 if sigma is None else checks.positive(op, "sigma", sigma)
    bf16 = checks.check_compute_dtype(op, compute_dtype, z1)
    normalize = checks.flag(op, "normalize", normalize)
    if group is not None:
        checks.no_compute_dtype(op, bf16)
        wide = distributed.Wide(op, group, group_mode, normalize, reduction)
        return distributed.dcl(wide, z1, z2, scale, sigma)
    layout = "decoupled"
    return contrastive(
        Problem(layout, z1, z2, None, scale, None, None, normalize, reduction, bf16, None, sigma)
    ).loss
