# SPDX-License-Identifier: Apache-2.0
"""Many positives, or all pairs: multi-view NT-Xent, SigLIP, SupCon, alignment, uniformity."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sslkernels._types import ContrastiveMetrics, Reduction
from sslkernels.backends.chunked import accumulation_dtype
from sslkernels.functional import _checks as checks
from sslkernels.functional import _common as common
from sslkernels.ops import rows
from sslkernels.ops.pairwise import pairwise
from sslkernels.ops.positives import with_positives


def nt_xent_multiview(
    views: tuple[Tensor, ...],
    scale: Tensor,
    normalize: bool,
    reduction: str,
    return_metrics: bool,
) -> Tensor | tuple[Tensor, ContrastiveMetrics]:
    """NT-Xent of V >= 2 checked views; see ``nt_xent_loss``.

    Args:
        views: V tensors [N, D].
        scale: 0-d, accumulation dtype: 1 / temperature.
        normalize: Whether to normalise rows first.
        reduction: "mean", "sum" or "none".
        return_metrics: Whether to return ContrastiveMetrics as well; V - 1 passes over the tiles
            count the ranks of as many positives a row.
    """
    v, n = len(views), len(views[0])
    z = common.unit(torch.cat(views), normalize)  # [V * N, D]
    ids = torch.arange(n, device=z.device).repeat(v)
    z_views = torch.split(z, n) if n else (z,) * v
    # Each unordered pair of views once; similarity[a][b] is the column of positives of view a.
    similarity: list[list[Tensor]] = [[] for _ in range(v)]
    for a in range(v):
        for b in range(a + 1, v):
            dot = common.dots(z_views[a], z_views[b])
            similarity[a].append(dot)
            similarity[b].append(dot)
    # columns[c]: [V * N], for every row its c-th positive.
    columns = [torch.cat([similarity[a][c] for a in range(v)]) for c in range(v - 1)]
    threshold = columns[0] * scale if return_metrics else None
    lse, _, rank, _ = pairwise("lse", z, scale=scale, ids_q=ids, threshold_row=threshold)
    losses = [common.nll(lse, column * scale) for column in columns]
    loss = losses[0] if v == 2 else torch.stack(losses).mean(0)
    loss = common.reduce(loss, reduction)
    if not return_metrics:
        return loss
    with torch.no_grad():
        ranks = [rank]
        for column in columns[1:]:
            ranks.append(
                pairwise("lse", z, scale=scale, ids_q=ids, threshold_row=column * scale).rank_row
            )
        negative = common.mean_negative(z, z, ids, ids)
        return loss, common.metrics(torch.cat(ranks), torch.cat(columns), negative)


def siglip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: float | Tensor,
    logit_bias: float | Tensor | None,
    *,
    normalize: bool = False,
    reduction: Reduction = "mean",
) -> Tensor:
    """SigLIP's pairwise sigmoid loss.

    With l_ij = logit_scale * <x_i, y_j> + logit_bias,

        loss_i = softplus(-l_ii) + sum_{j != i} softplus(l_ij)

    The mean is over N rows, not N * N pairs: open_clip's ``SigLipLoss``.

    Args:
        image_features: [N, D], normalised by the caller (the convention) unless ``normalize``.
        text_features: [N, D], same device.  Where dtypes differ, the wider one counts, and each
            gradient has the dtype of its input.
        logit_scale: The number that multiplies (already exponentiated): a number or a tensor of
            shape [] or [1], which may require grad.
        logit_bias: The same, or None for 0.
        normalize: Whether to divide rows by max(norm, 1e-12) first.
        reduction: "mean" over N, "sum", or "none": [N].

    Returns:
        The loss; no rows give 0.

    Raises:
        TypeError: If an argument has a wrong type or dtype.
        ValueError: If shapes or devices differ or the reduction is unknown.

    Reference:
        Zhai et al., Sigmoid Loss for Language Image Pre-Training, arXiv:2303.15343.
    """
    op = "siglip_loss"
    checks.check_pair(op, "image_features", image_features, "text_features", text_features)
    image_features, text_features = checks.widen(image_features, text_features)
    checks.check_reduction(op, reduction)
    scale = checks.scalar(op, "logit_scale", logit_scale, image_features)
    bias = None
    if logit_bias is not None:
        bias = checks.scalar(op, "logit_bias", logit_bias, image_features)
    normalize = checks.flag(op, "normalize", normalize)
    x, y = common.unit(image_features, normalize), common.unit(text_features, normalize)
    # Positives stay out of the tiles: one in N * N, and the only ones with the other sign.
    negatives, cosine = with_positives("softplus", x, y, scale=scale, bias=bias)
    positive = cosine * scale
    if bias is not None:
        positive = positive + bias
    return common.reduce(common.softplus(-positive) + negatives, reduction)


def sup_con_loss(
    z: Tensor,
    labels: Tensor,
    temperature: float | Tensor = 0.1,
    *,
    normalize: bool = True,
    reduction: Reduction = "mean",
) -> Tensor:
    """Supervised contrastive loss: every row of the same class is a positive.

        loss_i = -1/|P(i)| sum_{p in P(i)} log( exp(s_ip) / sum_{j != i} exp(s_ij) )

    with s = <z_i, z_j> / temperature and P(i) the other rows with the label of i ("L_out" of the
    paper).  The positives are one dot product with a class sum: O(N * D), no mask.

    A row without positives has loss 0 and is left out of the mean (pytorch-metric-learning's
    ``SupConLoss``).  SupContrast's official code multiplies by temperature / base_temperature.

    Args:
        z: [N, D], or [N, V, D] for V views of N samples (rows in that order).
        labels: [N] integers; with views, one label a sample.
        temperature: A number > 0, or a tensor of shape [] or [1] (not inspected), which may require
            grad.
        normalize: Whether to divide rows by max(norm, 1e-12) first.
        reduction: "mean" over the rows that have a positive, "sum", or "none": [N] or [N * V].

    Returns:
        The loss; 0 when no row has a positive.

    Raises:
        TypeError: If an argument has a wrong type or dtype.
        ValueError: If shapes or devices differ, temperature <= 0 or the reduction is unknown.

    Reference:
        Khosla et al., Supervised Contrastive Learning, arXiv:2004.11362.
    """
    op = "sup_con_loss"
    checks.check_matrix(op, "z", z, ndim=3 if isinstance(z, Tensor) and z.ndim == 3 else 2)
    checks.check_reduction(op, reduction)
    labels = checks.check_ids(op, "labels", labels, (len(z),), z.device)
    if z.ndim == 3:
        labels = labels.repeat_interleave(z.shape[1])
        z = z.flatten(0, 1)
    scale = checks.inverse_temperature(op, temperature, z)
    n = len(z)
    z = common.unit(z, checks.flag(op, "normalize", normalize))
    classes = rows.segments(labels)
    ones = torch.ones((n, 1), dtype=scale.dtype, device=z.device)
    counts = rows.take_rows(rows.accumulate_rows(ones, classes, n), classes)[:, 0] - 1
    lse, positive = with_positives("lse", z, scale=scale, classes=classes)
    positive = positive * scale / counts.clamp(min=1)
    loss = torch.where(counts > 0, lse - positive, 0.0)
    if reduction == "mean":
        used = common.reduce((counts > 0).to(lse.dtype), "sum")
        return common.reduce(loss, "sum") / used.clamp(min=1)
    return common.reduce(loss, reduction)


def alignment_loss(
    z1: Tensor,
    z2: Tensor,
    alpha: float = 2.0,
    *,
    normalize: bool = True,
    reduction: Reduction = "mean",
) -> Tensor:
    """Alignment of positive pairs: ||z1_i - z2_i||^alpha.

    Equal rows have gradient 0 for every alpha.

    Args:
        z1: [N, D].
        z2: [N, D], same device; dtypes may differ.
        alpha: Exponent > 0.
        normalize: Whether to divide rows by max(norm, 1e-12) first.
        reduction: "mean" over N, "sum", or "none": [N].

    Raises:
        TypeError: If an argument has a wrong type or dtype.
        ValueError: If shapes or devices differ, alpha <= 0 or the reduction is unknown.

    Reference:
        Wang and Isola, Understanding Contrastive Representation Learning through Alignment and
        Uniformity on the Hypersphere, arXiv:2005.10242.
    """
    op = "alignment_loss"
    checks.check_pair(op, "z1", z1, "z2", z2)
    checks.check_reduction(op, reduction)
    z1, z2 = checks.widen(z1, z2)
    alpha = checks.positive(op, "alpha", alpha)
    normalize = checks.flag(op, "normalize", normalize)
    acc = accumulation_dtype(z1.dtype)
    difference = common.unit(z1, normalize).to(acc) - common.unit(z2, normalize).to(acc)
    squared = difference.square().sum(1)
    if alpha != 2:
        apart = squared != 0  # true for NaN
        squared = torch.where(apart, torch.where(apart, squared, 1.0).pow(alpha / 2), 0.0)
    return common.reduce(squared, reduction)


def uniformity_loss(z: Tensor, t: float = 2.0, *, normalize: bool = True) -> Tensor:
    """Uniformity on the sphere, without an N x N matrix.

        log( mean over pairs i < j of exp(-t ||z_i - z_j||^2) )

    Fewer than two rows have no pairs and give 0.

    Args:
        z: [N, D].
        t: Width of the Gaussian, > 0.
        normalize: Whether to divide rows by max(norm, 1e-12) first.  Rows may have
            any norm without it.

    Returns:
        A 0-d tensor, at most 0.

    Raises:
        TypeError: If an argument has a wrong type or dtype.
        ValueError: If z isn't two-dimensional or t <= 0.

    Reference:
        Wang and Isola, arXiv:2005.10242.
    """
    op = "uniformity_loss"
    checks.check_matrix(op, "z", z)
    t = checks.positive(op, "t", t)
    normalize = checks.flag(op, "normalize", normalize)
    n = len(z)
    z = common.unit(z, normalize).to(accumulation_dtype(z.dtype))
    if n < 2:
        return z.sum() * 0
    ids = torch.arange(n, device=z.device)
    if normalize:
        # -t ||x - y||^2 = 2t <x, y> - 2t, a constant less than a scaled dot product.
        lse = pairwise("lse", z, scale=checks.scalar(op, "t", 2 * t, z), ids_q=ids).row
        offset = 2 * t
    else:
        # The squared norms become two more features; distances do not change with the origin.
        z = z - z.mean(0)
        square = z.square().sum(1, keepdim=True)
        one = torch.ones_like(square)
        q, k = torch.cat((2 * z, -square, -one), 1), torch.cat((z, one, square), 1)
        lse = pairwise("lse", q, k, scale=checks.scalar(op, "t", t, z), ids_q=ids, ids_k=ids).row
        offset = 0.0
    largest = lse.detach().amax()
    total = common.reduce((lse - largest).exp(), "sum").log() + largest
    return total - offset - math.log(n * (n - 1))
