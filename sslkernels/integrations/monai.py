# SPDX-License-Identifier: Apache-2.0
"""MONAI's contrastive loss, computed by our op; nothing here needs that library (tested: 1.6.1)."""

from __future__ import annotations

from typing import Any
from warnings import warn

import torch
from torch import Tensor
from torch.nn.modules.loss import _Loss

from sslkernels.functional import nt_xent_loss
from sslkernels.integrations import _glue as glue
from sslkernels.integrations._patching import Peer

__all__ = ["ContrastiveLoss"]


class ContrastiveLoss(_Loss):
    """NT-Xent of two views: the mean over both of them.

    Args:
        temperature: Of any sign, or a tensor.
        batch_size: Not used; anything but -1 warns, as MONAI does.
    """

    def __init__(self, temperature: Any = 0.5, batch_size: int = -1) -> None:
        super().__init__()
        self.temperature: Any = temperature
        if batch_size != -1:
            warn("ContrastiveLoss: batch_size is not used, it is that of the inputs", stacklevel=2)

    @glue.torch_errors
    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Loss of two views [N, D], not normalised.

        Raises:
            ValueError: If they are not of two dimensions, or differ in shape.
        """
        if input.dim() > 2 or target.dim() > 2:
            raise ValueError(
                "ContrastiveLoss: input and target must be [N, D], "
                f"got {list(input.shape)} and {list(target.shape)}"
            )
        if input.shape != target.shape:
            raise ValueError(
                "ContrastiveLoss: input and target must have the same shape, "
                f"got {list(input.shape)} and {list(target.shape)}"
            )
        if isinstance(self.temperature, Tensor) and self.temperature.numel() != 1:
            theirs = glue.hand_over(
                "monai.losses.ContrastiveLoss", "a temperature with more than one element"
            )
            loss: Tensor = theirs(self.temperature)(input, target)
            return loss
        temperature = glue.temperature_like(self.temperature, input)
        views = torch.promote_types(input.dtype, target.dtype)
        return glue.as_peer(
            nt_xent_loss(input.to(views), target.to(views), temperature), input, target
        )


PEER = Peer(
    name="monai",
    package="monai.losses",
    distribution="monai",
    tested=("1.6.1",),
    swaps={"monai.losses.contrastive.ContrastiveLoss": ContrastiveLoss},
)
