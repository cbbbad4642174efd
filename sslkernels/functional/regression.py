# SPDX-License-Identifier: Apache-2.0
"""Losses without negatives: BYOL and SimSiam."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from sslkernels._types import Reduction
from sslkernels.backends.arithmetic import accumulation_dtype
from sslkernels.functional import _checks as checks
from sslkernels.ops import formulas, heads
from sslkernels.ops.regression import in_one_call, regression


def byol_loss(
    prediction: Tensor,
    target: Tensor,
    *,
    rho: float | None = None,
    weight_decay: float = 0.0,
    parameters: Iterable[Tensor] | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """BYOL's regression of one view: 2 - 2 cos(prediction, target).

    The target gets no gradient.  A zero row has cosine 0.

    With ``rho`` it is a regularised regression, a form found in articles, not in the paper:

        (|prediction - target|^2 - rho)^2 + weight_decay sum |theta|^2

    without normalisation.  It asks for a squared distance of rho: predictions nearer than that are
    pushed away, and for rho = 0 it is the fourth power of the distance.  The second term is added once
    to the reduced loss, and is what an optimiser's coupled weight decay of 2 weight_decay does.

    Args:
        prediction: [N, D], output of the predictor.
        target: [N, D], projection of the target network; same device.  Where dtypes differ, the
            wider one counts.
        rho: None: the paper's loss.  A number of at least 0: the form above.
        weight_decay: At least 0; with ``rho`` only.
        parameters: theta, tensors on the same device (``network.parameters()``).
        reduction: "mean" over N, "sum", or "none": [N].

    Returns:
        The loss, in [0, 4] a row without rho, float32 (float64 for float64 inputs).

    Raises:
        TypeError: If an argument has a wrong type or dtype.
        ValueError: If shapes or devices differ, the reduction is unknown, or options don't fit.

    Reference:
        Grill et al., Bootstrap Your Own Latent, arXiv:2006.07733.
    """
    op = "byol_loss"
    checks.check_pair(op, "prediction", prediction, "target", target)
    checks.check_reduction(op, reduction)
    prediction, target = checks.widen(prediction, target.detach())
    if rho is None:
        if weight_decay or parameters is not None:
            raise ValueError(f"{op}: weight_decay and parameters need rho, the regularised form")
        return regression(prediction, target, reduction)
    rho, weight_decay = (
        checks.number(op, "rho", rho),
        checks.number(op, "weight_decay", weight_decay),
    )
    for name, value in (("rho", rho), ("weight_decay", weight_decay)):
        if not value >= 0:
            raise ValueError(f"{op}: {name} must be at least 0, got {value}")
    acc = accumulation_dtype(prediction.dtype)
    squared = (prediction.to(acc) - target.to(acc)).square().sum(1)
    loss = heads.reduce((squared - rho).square(), reduction)
    if not weight_decay:
        return loss
    if reduction == "none":
        raise ValueError(f"{op}: weight_decay needs a reduction, it is no loss of a row")
    for theta in parameters or ():
        checks.check_floating(op, "parameters", theta)
        checks.check_device(op, "prediction", prediction, "parameters", theta)
        loss = loss + weight_decay * theta.to(acc).square().sum()
    return loss


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
    first, second = (_negative_cosine(checks.widen(p, z.detach()), reduction) for p, z in pairs)
    return (first + second) / 2


def _negative_cosine(pair: tuple[Tensor, ...], reduction: Reduction) -> Tensor:
    """In one call, or composed of what the device's kernels do."""
    prediction, z = pair
    if in_one_call(prediction):
        return regression(prediction, z, reduction, cosine=True)
    return heads.reduce(-formulas.cosine(prediction, z), reduction)
