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
