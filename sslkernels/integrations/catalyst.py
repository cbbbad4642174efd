# SPDX-License-Identifier: Apache-2.0
"""catalyst's contrastive losses, computed by our ops; nothing here needs that library (tested: 22.4).

What is better than the original (docs/migration/catalyst.md): the similarity of a row with itself is
left out where catalyst subtracts exp(1/tau) from a sum that holds it, so a small tau is exact.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sslkernels.functional import nt_xent_loss, sup_con_loss
from sslkernels.integrations import _glue as glue
from sslkernels.integrations import _ops as ops
from sslkernels.integrations import _pairs as pairs
from sslkernels.integrations._patching import Peer

__all__ = ["NTXentLoss", "SupervisedContrastiveLoss"]


class _ZeroTauError(ValueError, ZeroDivisionError):
    """tau = 0, by which catalyst divides."""


class NTXentLoss(nn.Module):
    """NT-Xent of two views over their 2N rows.

    Args:
        tau: Temperature; of any sign, or a tensor of one element.
        reduction: "mean", "sum", or "none": [2N].

    Raises:
        ValueError: If the reduction is none of these.
    """

    def __init__(self, tau: float, reduction: str = "mean") -> None:
        super().__init__()
        self.tau = tau
        self.cosine_sim = nn.CosineSimilarity()
        self.reduction = _reduction("NTXentLoss", reduction)

    @glue.torch_errors
    def forward(self, features1: Tensor, features2: Tensor) -> Tensor:
        """Loss of two views [N, D], not normalised.

        Raises:
            ValueError: If they differ in shape or are not [N, D], or tau is 0.
        """
        if features1.shape != features2.shape:
            raise glue.PeerAssertionError(
                "NTXentLoss: features1 and features2 must have the same shape, "
                f"got {list(features1.shape)} and {list(features2.shape)}"
            )
        tau = _tau("NTXentLoss", self.tau, features1)
        loss = nt_xent_loss(features1, features2, tau, reduction=self.reduction)  # type: ignore[arg-type]
        return glue.as_peer(loss, features1, features2)


class SupervisedContrastiveLoss(nn.Module):
    """Supervised contrastive loss over the rows of a batch, each with a positive.

    With P(i) the other rows of the class of i and s = cosine / tau, row i has

        "in":   -log mean_{p in P(i)} exp(s_ip) + log sum_{a != i} exp(s_ia)
        "out":  -mean_{p in P(i)} s_ip          + log sum_{a != i} exp(s_ia)

    "in" takes O(pairs of a class) scalars, "out" O(N * D).

    Args:
        tau: Temperature; of any sign, or a tensor of one element.
        reduction: "mean", "sum", or "none": [N].
        pos_aggregation: "in" or "out".

    Raises:
        ValueError: If tau is 0, or the reduction or the aggregation is unknown.
    """

    def __init__(self, tau: float, reduction: str = "mean", pos_aggregation: str = "in") -> None:
        super().__init__()
        _refuse_zero("SupervisedContrastiveLoss", tau)
        self.tau = tau
        self.reduction = _reduction("SupervisedContrastiveLoss", reduction)
        self.pos_aggregation = pos_aggregation
        if pos_aggregation not in ("in", "out"):
            raise ValueError(
                "SupervisedContrastiveLoss: pos_aggregation must be 'in' or 'out', "
                f"got {pos_aggregation!r}"
            )

    @glue.torch_errors
    def forward(self, features: Tensor, targets: Tensor) -> Tensor:
        """Loss of rows [N, D], not normalised, with targets [N].

        Raises:
            ValueError: If shapes do not fit, or a row is the only one of its class.
        """
        if features.dim() != 2 or targets.shape != features.shape[:1]:
            raise ValueError(
                "SupervisedContrastiveLoss: features must be [N, D] and targets [N], "
                f"got {list(features.shape)} and {list(targets.shape)}"
            )
        targets = targets.to(features.device)
        ids, _ = pairs.integer_ids(targets, targets)
        alone = int((pairs.same_class(ids, ids)[2] < 2).sum())
        if alone:
            raise glue.PeerAssertionError(
                "SupervisedContrastiveLoss: every row must have another of its class, "
                f"got {alone} that have none"
            )
        tau = _tau("SupervisedContrastiveLoss", self.tau, features)
        if self.pos_aggregation == "out":
            loss = sup_con_loss(features, ids, tau, reduction=self.reduction)  # type: ignore[arg-type]
            return glue.as_peer(loss, features)
        rows = self._log_of_means(ops.unit(features), ids, tau)
        reduced = {"mean": rows.mean, "sum": rows.sum}.get(self.reduction)
        return glue.as_peer(rows if reduced is None else reduced(), features)

    def _log_of_means(self, z: Tensor, ids: Tensor, tau: float | Tensor) -> Tensor:
        """[N] losses of "in", of normalised rows z [N, D]."""
        n = len(z)
        own = torch.arange(n, device=z.device)
        anchor, positive = pairs.positive_pairs(ids, ids, own)
        similar = ops.per_pair(lambda a, b: (a * b).sum(1), z, z, anchor, positive) / tau
        count = ops.grouped_sum(torch.ones_like(similar), anchor, n)
        return ops.lse(z, None, tau, own, None) - ops.grouped_lse(similar, anchor, n) + count.log()


def _reduction(name: str, reduction: str) -> str:
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"{name}: reduction must be 'mean', 'sum' or 'none', got {reduction!r}")
    return reduction


def _refuse_zero(name: str, tau: Any) -> None:
    if not isinstance(tau, Tensor) and tau == 0:
        raise _ZeroTauError(f"{name}: tau must not be 0")


def _tau(name: str, tau: Any, like: Tensor) -> float | Tensor:
    _refuse_zero(name, tau)
    return glue.temperature_like(tau, like)


PEER = Peer(
    name="catalyst",
    package="catalyst.contrib.losses",
    distribution="catalyst",
    tested=("22.4", "22.04"),  # of its metadata, and of its __version__
    swaps={
        "catalyst.contrib.losses.ntxent.NTXentLoss": NTXentLoss,
        "catalyst.contrib.losses.supervised_contrastive.SupervisedContrastiveLoss": (
            SupervisedContrastiveLoss
        ),
    },
)
