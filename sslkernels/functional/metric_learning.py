# SPDX-License-Identifier: Apache-2.0
"""Losses over distances: triplets with mining, margins, contrastive pairs."""

from __future__ import annotations

import torch
from torch import Tensor

from sslkernels._types import Reduction
from sslkernels.backends.interface import Triplets
from sslkernels.functional import _checks as checks
from sslkernels.ops import formulas, heads
from sslkernels.ops.triplet import mined_triplets
from sslkernels.ops.triplet_hard import hard_triplets

_TRIPLET_REDUCTIONS = ("mean", "sum", "mean_nonzero")


def triplet_loss(
    z: Tensor,
    labels: Tensor,
    margin: float | Tensor = 0.2,
    *,
    mining: str = "hard",
    distance: str = "euclidean",
    normalize: bool = False,
    reduction: str = "mean",
) -> Tensor:
    """Triplet margin loss with mining in the batch, never an N x N x N (nor N x N) array.

        max( d(a, p) - d(a, n) + margin, 0 )

    over the triplets that ``mining`` chooses, p another row with the label of a, n one with
    another:

    * "hard": for each anchor its farthest positive and nearest negative ("batch hard");
    * "semihard": for each pair (a, p) the nearest negative that is farther than p, or the farthest
      negative if there is none (FaceNet, as in TensorFlow Addons and sentence-transformers);
    * "all": every triplet ("batch all").

    Anchors without a positive or without a negative are left out.  Equal rows have distance 0 and
    gradient 0.  "hard" is a pass of the tile engine; the others sort distances in blocks of rows:
    O(N^2 log N) time and O(N * D) memory.

    Args:
        z: [N, D].
        labels: [N] integers.
        margin: In units of the distance: a number or a tensor of shape [] or [1], which may require
            grad.
        mining: "hard", "semihard" or "all".
        distance: "euclidean" (||x - y||, not squared) or "cosine" (1 - cos).
        normalize: Whether rows are divided by max(norm, 1e-12) first; "cosine" always does.
        reduction: "mean" over the chosen triplets, "sum", or "mean_nonzero" over those with a loss
            above 0 (pytorch-metric-learning's and sentence-transformers' default for "all").

    Returns:
        The loss; 0 when there is no triplet.

    Raises:
        TypeError: If an argument has a wrong type or dtype.
        ValueError: If shapes or devices differ or an option is unknown.

    Reference:
        Schroff et al., FaceNet, arXiv:1503.03832; Hermans et al., In Defense of the Triplet Loss,
        arXiv:1703.07737.
    """
    op = "triplet_loss"
    checks.check_matrix(op, "z", z)
    labels = checks.check_ids(op, "labels", labels, (len(z),), z.device)
    margin = checks.number_or_scalar(op, "margin", margin, z)
    normalize = checks.flag(op, "normalize", normalize)
    checks.check_choice(op, "mining", mining, ("hard", "semihard", "all"))
    checks.check_choice(op, "distance", distance, ("euclidean", "cosine"))
    checks.check_reduction(op, reduction, _TRIPLET_REDUCTIONS)
    cosine = distance == "cosine"
    if mining == "hard":
        margin = checks.scalar(op, "margin", margin, z)
        problem = Triplets(z, labels, margin, normalize or cosine, cosine, reduction)
        return hard_triplets(problem).loss
    z = heads.unit(z, normalize or cosine)
    mined = mined_triplets(z, labels, margin, semihard=mining == "semihard", cosine=cosine)
    total = heads.reduce(mined.loss, "sum")
    count = (mined.active if reduction == "mean_nonzero" else mined.terms).sum()
    # A NaN distance is neither the largest nor the smallest: mining alone would pass over it.
    if z.numel() > 0:
        total = total * (1 + torch.linalg.vector_norm(z.detach(), float("inf")) * 0)
    return total if reduction == "sum" else total / count.clamp(min=1)


def margin_loss(
    z_i: Tensor,
    z_j: Tensor,
    z_k: Tensor,
    z_l: Tensor,
    margin: float | Tensor = 0.2,
    *,
    form: str = "relative",
    eps: float = 0.0,
    reduction: Reduction = "mean",
) -> Tensor:
    """Margin loss over given pairs: (i, j) of the same class, (k, l) of different ones.

    * "relative": max( d(z_i, z_j) - d(z_k, z_l) + margin, 0 ), the published form.  With k = i it
      is the triplet loss, with four different rows a term of the quadruplet loss.
    * "floor": max( max(d(z_i, z_j), margin + d(z_k, z_l)) - |margin| + eps, 0 ), a form found in
      articles.  Mind what it does: the gradient goes to the larger of the two inner terms, and
      lowers that distance, also when it is the one of the negative pair.  With margin = -m < 0 it
      acts on positive pairs farther apart than d(z_k, z_l) - m, and stops below m - eps.

    d is the Euclidean distance; equal rows have gradient 0.

    Args:
        z_i: [N, D].
        z_j: [N, D], same device, as are the other two; dtypes may differ.
        z_k: [N, D].
        z_l: [N, D].
        margin: In units of the distance: a number or a tensor of shape [] or [1], which may require
            grad.
        form: "relative" or "floor".
        eps: Added before the outer maximum, "floor" only.
        reduction: "mean" over N, "sum", or "none": [N].

    Raises:
        TypeError: If an argument has a wrong type or dtype.
        ValueError: If shapes or devices differ or an option is unknown.

    Reference:
        Schroff et al., FaceNet, arXiv:1503.03832; Chen et al., Beyond Triplet Loss,
        arXiv:1704.01719.
    """
    op = "margin_loss"
    for name, other in (("z_j", z_j), ("z_k", z_k), ("z_l", z_l)):
        checks.check_pair(op, "z_i", z_i, name, other)
    z_i, z_j, z_k, z_l = checks.widen(z_i, z_j, z_k, z_l)
    margin = checks.number_or_scalar(op, "margin", margin, z_i)
    eps = checks.number(op, "eps", eps)
    checks.check_choice(op, "form", form, ("relative", "floor"))
    checks.check_reduction(op, reduction)
    same, different = formulas.euclidean(z_i, z_j), formulas.euclidean(z_k, z_l)
    return heads.reduce(formulas.margins(same, different, margin, form, eps), reduction)


def contrastive_loss(
    a: Tensor,
    b: Tensor,
    same: Tensor,
    margin: float | Tensor = 1.0,
    *,
    reduction: Reduction = "mean",
) -> Tensor:
    """Contrastive pair loss, with d = ||a - b||.

        loss = d^2 / 2 for a pair of the same class,   max(margin - d, 0)^2 / 2 for another

    The halves are those of the paper; code without them is 2x this.  Equal rows have gradient 0.

    Args:
        a: [N, D].
        b: [N, D], same device; dtypes may differ.
        same: [N] bool, or integers 0 and 1: whether the pair belongs together.
        margin: Distance from which on different pairs do not count: a number or a tensor of shape
            [] or [1], which may require grad.
        reduction: "mean" over N, "sum", or "none": [N].

    Raises:
        TypeError: If an argument has a wrong type or dtype.
        ValueError: If shapes or devices differ or the reduction is unknown.

    Reference:
        Hadsell, Chopra, LeCun, Dimensionality Reduction by Learning an Invariant Mapping, CVPR
        2006.
    """
    op = "contrastive_loss"
    checks.check_pair(op, "a", a, "b", b)
    a, b = checks.widen(a, b)
    margin = checks.number_or_scalar(op, "margin", margin, a)
    checks.check_reduction(op, reduction)
    if isinstance(same, Tensor) and same.dtype == torch.bool:
        same = same.to(torch.int64)
    same = checks.check_ids(op, "same", same, (len(a),), a.device) != 0
    return heads.reduce(formulas.contrastive_pairs(a, b, same, margin), reduction)
