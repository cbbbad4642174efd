# SPDX-License-Identifier: Apache-2.0
"""torch's averaged models (``torch.optim.swa_utils``), updated by our op (tested: 2.13.0, 2.14.1, 2.15.0).

What is better than the original (docs/migration/averages.md): averages are accumulated in float32 and
rounded once; integer buffers such as ``num_batches_tracked`` are copied, where torch rounds their
average down, so that it stands still.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import swa_utils

from sslkernels.integrations import _ops as ops
from sslkernels.integrations._patching import Peer

__all__ = ["AveragedModel", "get_ema_multi_avg_fn", "get_swa_multi_avg_fn"]

_Average = Callable[[Sequence[Tensor], Sequence[Tensor], Any], None]


def get_ema_multi_avg_fn(decay: float = 0.999) -> _Average:
    """An exponential average for ``AveragedModel``: decay * average + (1 - decay) * model.

    Args:
        decay: In [0, 1].

    Returns:
        A function of a list of averages, a list of parameters, and how often was averaged before.

    Raises:
        ValueError: If decay is outside of [0, 1].
    """
    if not 0.0 <= decay <= 1.0:
        raise ValueError(f"get_ema_multi_avg_fn: decay must be in [0, 1], got {decay}")

    def ema_update(
        ema_param_list: Sequence[Tensor], current_param_list: Sequence[Tensor], _: Any
    ) -> None:
        ops.average_(ema_param_list, current_param_list, decay)

    return ema_update


def get_swa_multi_avg_fn() -> _Average:
    """The mean of all models for ``AveragedModel``: decay n / (n + 1) after n of them.

    Returns:
        A function of a list of averages, a list of parameters, and n.
    """

    def swa_update(
        averaged_param_list: Sequence[Tensor],
        current_param_list: Sequence[Tensor],
        num_averaged: Any,
    ) -> None:
        n = int(num_averaged)
        ops.average_(averaged_param_list, current_param_list, n / (n + 1))

    return swa_update


class AveragedModel(swa_utils.AveragedModel):
    """torch's ``AveragedModel``, whose default is our update of all parameters in one call.

    Args:
        model: To be averaged; it is copied.
        device: Of the average.
        avg_fn: An average of one parameter, computed as torch does.
        multi_avg_fn: An average of lists; None with avg_fn None is the mean of all models.
        use_buffers: Whether buffers are averaged too.
    """

    def __init__(
        self,
        model: nn.Module,
        device: int | torch.device | None = None,
        avg_fn: Any = None,
        multi_avg_fn: Any = None,
        use_buffers: Any = False,
    ) -> None:
        super().__init__(model, device, avg_fn, multi_avg_fn, use_buffers)

    def update_parameters(self, model: nn.Module) -> None:
        """Take a model into the average."""
        if self.avg_fn is not None or self.multi_avg_fn is not None:
            super().update_parameters(model)
            return
        self.multi_avg_fn: Any = get_swa_multi_avg_fn()
        try:
            super().update_parameters(model)
        finally:
            self.multi_avg_fn = None


PEER = Peer(
    name="torch",
    package="torch",
    distribution="torch",
    tested=("2.13.0", "2.14.1", "2.15.0"),
    swaps={
        "torch.optim.swa_utils.AveragedModel": AveragedModel,
        "torch.optim.swa_utils.get_ema_multi_avg_fn": get_ema_multi_avg_fn,
        "torch.optim.swa_utils.get_swa_multi_avg_fn": get_swa_multi_avg_fn,
    },
)
