# SPDX-License-Identifier: Apache-2.0
"""Losses without negatives: BYOL and SimSiam."""

from __future__ import annotations

from torch import Tensor

from sslkernels._types import Reduction
from sslkernels.functional import _checks as checks
from sslkernels.ops import formulas, heads
from sslkernels.ops.regression import regression


def byol_loss(prediction: Tensor, target: Tensor, *, reduction: Reduction = "mean") -> Tensor:
    """BYOL's regression of one view: 2 - 2 cos(prediction, target).

    The target gets no gradient.  A zero row has cosine 0.

    Args:
        prediction: [N, D], output of the predictor.
        target: [N, D], projection of the target network; same device.  Where dtypes differ, the
            wider one counts.
        reduction: "mean" over N, "sum", or "none": [N].

    Returns:
        The loss in [0, 4] a row, float32 (float64 for float64 inputs).

    Raises:
        TypeError: If an argument has a wrong type or dtype.
        ValueError: If shapes or devices differ or the reduction is unknown.

    Reference:
        Grill et al., Bootstrap Your Own Latent, arXiv:2006.07733.
    """
    op = "byol_loss"
    checks.check_pair(op, "prediction", prediction, "target", target)
    checks.check_reduction(op, reduction)
    prediction, target = checks.widen(prediction, target.detach())
    return regression(prediction, target, reduction)


def byol_loss_symmetric(
    prediction_1: Tensor,
    target_2: Tensor,
    prediction_2: Tensor,
    target_1: Tensor,
    *,
    reduction: Reduction = "mean",
) -> Tensor:
    """BYOL's loss of both views, summed (DeepMind's code): byol_loss(p1, t2) + byol_loss(p2, t1).

    Args:
        prediction_1: [N, D], prediction from view 1.
        target_2: [N, D], target projection of view 2.
        prediction_2: [N, D], prediction from view 2.
        target_1: [N, D], target projection of view 1.
        reduction: "mean" over N, "sum", or "none": [N].

    Raises:
        TypeError: If an argument has a wrong type or dtype.
        ValueError: If shapes or devices differ or the reduction is unknown.
    """
    first = byol_loss(prediction_1, target_2, reduction=reduction)
    return first + byol_loss(prediction_2, target_1, reduction=reduction)


def simsiam_loss(
    prediction_1: Tensor,
    z_2: Tensor,
    prediction_2: Tensor,
    z_1: Tensor,
    *,
    reduction: Reduction = "mean",
) -> Tensor:
    """SimSiam's symmetric negative cosine: -(cos(p1, z2) + cos(p2, z1)) / 2, no gradient into z.

    It has the gradient of ``byol_loss_symmetric`` divided by 4.

    Args:
        prediction_1: [N, D], prediction from view 1.
        z_2: [N, D], projection of view 2.
        prediction_2: [N, D], prediction from view 2.
        z_1: [N, D], projection of view 1.
        reduction: "mean" over N, "sum", or "none": [N].

    Raises:
        TypeError: If an argument has a wrong type or dtype.
        ValueError: If shapes or devices differ or the reduction is unknown.

    Reference:
        Chen and He, Exploring Simple Siamese Representation Learning, arXiv:2011.10566.
    """
    op = "simsiam_loss"
    checks.check_pair(op, "prediction_1", prediction_1, "z_2", z_2)
    checks.check_pair(op, "prediction_2", prediction_2, "z_1", z_1)
    checks.check_reduction(op, reduction)
    pairs = ((prediction_1, z_2), (prediction_2, z_1))
    first, second = (formulas.cosine(*checks.widen(p, z.detach())) for p, z in pairs)
    return heads.reduce((first + second) / -2, reduction)
