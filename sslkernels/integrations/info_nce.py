# SPDX-License-Identifier: Apache-2.0
"""info-nce-pytorch's loss, computed by our op; nothing here needs that library (tested: 0.1.4)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from sslkernels.functional import info_nce_loss
from sslkernels.integrations import _glue as glue
from sslkernels.integrations._patching import Peer

__all__ = ["InfoNCE", "info_nce"]


class InfoNCE(nn.Module):
    """``info_nce`` as a module.

    Args:
        temperature: Of any sign, or a tensor.
        reduction: "mean", "sum" or "none".
        negative_mode: "unpaired" or "paired".
    """

    def __init__(
        self, temperature: Any = 0.1, reduction: Any = "mean", negative_mode: Any = "unpaired"
    ) -> None:
        super().__init__()
        self.temperature = temperature
        self.reduction = reduction
        self.negative_mode = negative_mode

    def forward(
        self, query: Tensor, positive_key: Tensor, negative_keys: Tensor | None = None
    ) -> Tensor:
        """See ``info_nce``."""
        return info_nce(
            query,
            positive_key,
            negative_keys,
            temperature=self.temperature,
            reduction=self.reduction,
            negative_mode=self.negative_mode,
        )


@glue.torch_errors
def info_nce(
    query: Tensor,
    positive_key: Tensor,
    negative_keys: Tensor | None = None,
    temperature: Any = 0.1,
    reduction: Any = "mean",
    negative_mode: Any = "unpaired",
) -> Tensor:
    """InfoNCE of rows that are normalised here.

    Args:
        query: [N, D].
        positive_key: [N, D].
        negative_keys: None for the other queries' keys, [M, D] ("unpaired"), [N, M, D] ("paired").
        temperature: Of any sign, or a tensor.
        reduction: "mean", "sum" or "none".
        negative_mode: "unpaired" or "paired".

    Raises:
        ValueError: If shapes do not fit, or reduction or negative_mode is unknown.
    """
    if isinstance(temperature, Tensor) and temperature.numel() != 1:
        theirs = glue.hand_over("info_nce.info_nce", "a temperature with more than one element")
        return theirs(query, positive_key, negative_keys, temperature, reduction, negative_mode)
    loss = info_nce_loss(
        query,
        positive_key,
        negative_keys,
        glue.temperature_like(temperature, query),
        reduction,
        "unpaired" if negative_keys is None else negative_mode,
    )
    return glue.as_peer(loss, *(x for x in (query, positive_key, negative_keys) if x is not None))


PEER = Peer(
    name="info_nce",
    package="info_nce",
    distribution="info-nce-pytorch",
    tested=("0.1.4",),
    swaps={"info_nce.InfoNCE": InfoNCE, "info_nce.info_nce": info_nce},
)
