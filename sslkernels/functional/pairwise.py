# SPDX-License-Identifier: Apache-2.0
"""Many positives, or all pairs: SigLIP, SupCon, alignment, uniformity."""

from __future__ import annotations

import torch
from torch import Tensor

from sslkernels import distributed
from sslkernels._types import Reduction
from sslkernels.backends.interface import Problem
from sslkernels.functional import _checks as checks
from sslkernels.ops import formulas, heads
from sslkernels.ops.contrastive import contrastive


def siglip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: float | Tensor,
    logit_bias: float | Tensor | None,
    *,
    normalize: bool = False,
    reduction: Reduction = "mean",
    group: distributed.Group = None,
    group_mode: str = "auto",
    compute_dtype: torch.dtype | None = None,
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
        The loss; no rows give 0.

    Raises:
        TypeError: If an argument has a wrong type or dtype.
        ValueError: If shapes or devices differ or the reduction is unknown.
        RuntimeError: If compute_dtype is bfloat16 and the processor lacks AVX512-BF16.

    Reference:
        Zhai et al., Sigmoid Loss for Language Image Pre-Training, arXiv:2303.15343.
    """
    op = "siglip_loss"
    checks.check_pair(op, "image_features", image_features, "text_features", text_features)
    image_features, text_features = checks.widen(image_features, text_features)
    checks.check_reduction(op, reduction)
    checks.check_group_mode(op, group_mode)
    scale = checks.scalar(op, "logit_scale", logit_scale, image_features)
    bias = None
    if logit_bias is not None:
        bias = checks.scalar(op, "logit_bias", logit_bias, image_features)
    bf16 = checks.check_compute_dtype(op, compute_dtype, image_features)
    normalize = checks.flag(op, "normalize", normalize)
    if group is not None:
        checks.no_compute_dtype(op, bf16)
        wide = distributed.Wide(op, group, group_mode, normalize, reduction)
        return distributed.siglip(wide, image_features, text_features, scale, bias)
    a, b = image_features, text_features
    problem = Problem("sigmoid", a, b, None, scale, None, None, normalize, reduction, bf16, bias)
    return contrastive(problem).loss


def sup_con_loss(
    z: Tensor,
    labels: Tensor,
    temperature: float | Tensor = 0.1,
    *,
    normalize: bool = True,
    reduction: Reduction = "mean",
    group: distributed.Group = None,
    group_mode: str = "auto",
    compute_dtype: torch.dtype | None = None,
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
        group: A torch.distributed group, or True for the default one: rows from every rank, which
            may hold different numbers of rows, also none.  All ranks make the same call.  The loss is
            that of the joined batch, with the same bits on every rank, and the gradient W times its
            gradient (W ranks), so that DDP's averaging of parameter gradients gives single-process
            training on the joined batch; with reduction "none" the rows of this rank, and the
            gradient of the sum over ranks.  The backward pass communicates: all ranks call it.
        group_mode: "gather" holds the rows of all ranks, O(N_global * D); "ring" passes them round in
            blocks, O(N * D) for any number of ranks; "auto" takes the ring from 256 MB of gathered
            rows on.
        compute_dtype: None, or torch.bfloat16 to multiply the rows in bfloat16 (about twice as fast
            where the processor can; gradients then have 2 to 3 digits).  The sums of the positives
            stay exact.

    Returns:
        The loss; 0 when no row has a positive.

    Raises:
        TypeError: If an argument has a wrong type or dtype.
        ValueError: If shapes or devices differ, temperature <= 0 or the reduction is unknown.
        RuntimeError: If compute_dtype is bfloat16 and the processor lacks AVX512-BF16.

    Reference:
        Khosla et al., Supervised Contrastive Learning, arXiv:2004.11362.
    """
    op = "sup_con_loss"
    checks.check_matrix(op, "z", z, ndim=3 if isinstance(z, Tensor) and z.ndim == 3 else 2)
    checks.check_reduction(op, reduction)
    checks.check_group_mode(op, group_mode)
    labels = checks.check_ids(op, "labels", labels, (len(z),), z.device)
    if z.ndim == 3:
        labels = labels.repeat_interleave(z.shape[1])
        z = z.flatten(0, 1)
    scale = checks.inverse_temperature(op, temperature, z)
    bf16 = checks.check_compute_dtype(op, compute_dtype, z)
    normalize = checks.flag(op, "normalize", normalize)
    if group is not None:
        checks.no_compute_dtype(op, bf16)
        wide = distributed.Wide(op, group, group_mode, normalize, reduction)
        return distributed.sup_con(wide, z, labels, scale)
    problem = Problem(
        "classes", z, z.detach(), None, scale, labels, None, normalize, reduction, bf16
    )
    return contrastive(problem).loss


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
    return heads.reduce(formulas.alignment(z1, z2, alpha, normalize), reduction)


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
    return formulas.uniformity(z, t, normalize)
