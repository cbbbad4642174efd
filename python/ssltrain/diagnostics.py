# SPDX-License-Identifier: Apache-2.0
"""Signs of collapse, measured once an epoch on a fixed sample of training images."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from sslkernels import metrics


class Collapse(NamedTuple):
    """How spread out the representation is; 0-d tensors."""

    feature_std: Tensor
    effective_rank: Tensor
    alignment: Tensor
    uniformity: Tensor


def collapse(h: Tensor, z1: Tensor, z2: Tensor) -> Collapse:
    """Measure the spread of features and projections with ``sslkernels.metrics``.

    ``feature_std`` is the standard deviation of a coordinate of h / |h| times sqrt(F): near 1 when
    features point everywhere, 0 when all are equal. ``effective_rank`` of h is at most min(N, F).
    ``alignment`` is the mean squared distance of two views of an image on the unit sphere, and
    ``uniformity`` the log of the mean of exp(-2 d^2) over pairs of images; lower is better.

    Args:
        h: features [N, F].
        z1: projections of one view of the same images [N, D].
        z2: projections of another [N, D].
    """
    return Collapse(
        feature_std=metrics.feature_std(h) * h.shape[1] ** 0.5,
        effective_rank=metrics.effective_rank(h, center=False),
        alignment=metrics.alignment(z1, z2),
        uniformity=metrics.uniformity(z1),
    )


# Runs on digits that learn have a spread above 0.15, a rank above 5 and a uniformity below -0.03 after
# their first epoch. MoCo and SimCLR at a hundredfold rate had 0.016 and 0.007, 1.4 and 1.1, and 0.000;
# BYOL without predictor and average kept its features, and its projections had -0.008.
COLLAPSED_STD = 0.03
COLLAPSED_RANK = 1.2
COLLAPSED_UNIFORMITY = -0.01
COLLAPSED_EPOCHS = 2  # in a row, before it is said: some runs start so and recover

WHAT_HELPS = {
    "byol": "a higher --ema-decay, a lower --base-lr, a longer --warmup",
    "simsiam": "a lower --base-lr, --weight-decay 1e-4, a larger --batch-size",
    "supcon": "a lower --base-lr, a higher --temperature, a longer --warmup",
    "simclr": "a lower --base-lr, a longer --warmup, a higher --temperature, --clip-grad 1",
    "moco": "a lower --base-lr, a higher --ema-decay, a higher --temperature, a larger --queue-size",
    "autoencoder": "a lower --base-lr, a longer --warmup, --clip-grad 1",
    "vae": "a lower --beta, --free-bits 0.05, a lower --base-lr",
    "gan": "a lower --base-lr, another --gan-form, --r1 1",
    "clip": "a lower --base-lr, a longer --warmup, --clip-grad 1, captions that differ",
    "moco3": "a lower --base-lr, a longer --warmup, a higher --ema-decay",
}


def has_collapsed(feature_std: float, effective_rank: float, uniformity: float) -> bool:
    """Whether all images have nearly the same features or projections, or ones that are no numbers."""
    apart = feature_std >= COLLAPSED_STD and effective_rank >= COLLAPSED_RANK
    return not (apart and uniformity <= COLLAPSED_UNIFORMITY)
