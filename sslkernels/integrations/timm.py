# SPDX-License-Identifier: Apache-2.0
"""timm's ``ModelEmaV3``, updated by our op; nothing here needs timm (tested: 1.0.31).

What is better than the original (docs/migration/averages.md): float16 averages are rounded
stochastically too, and a step is one call for all floating tensors.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from sslkernels.integrations import _ops as ops
from sslkernels.integrations._patching import Peer

__all__ = ["ModelEmaV3"]


class ModelEmaV3(nn.Module):
    """timm's average of everything in a model's state dict.

    Args:
        model: To be averaged; it is copied, and the copy is in evaluation mode.
        decay: In [0, 1].
        min_decay: Lower limit during warm-up.
        update_after_step: Steps up to which the average follows the model.
        use_warmup: Whether the decay grows with the step.
        warmup_gamma: Scale of the warm-up, in steps.
        warmup_power: Power of the warm-up.
        device: Of the average; None for that of the model.
        dtype: Of the average; None for that of the model.
        stochastic_rounding: Whether 16-bit averages are rounded stochastically.
        stochastic_rounding_seed: Key of the random bits, which also depend on the number of updates.
        foreach: Of no use: all tensors are updated in one call.
        exclude_buffers: Whether floating buffers are copied and not averaged.
    """

    def __init__(
        self,
        model: Any,
        decay: float = 0.9999,
        min_decay: float = 0.0,
        update_after_step: int = 0,
        use_warmup: bool = False,
        warmup_gamma: float = 1.0,
        warmup_power: float = 2 / 3,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        stochastic_rounding: bool = True,
        stochastic_rounding_seed: int = 0,
        foreach: bool = True,
        exclude_buffers: bool = False,
    ) -> None:
        super().__init__()
        self.module: Any = copy.deepcopy(model)
        self.module.eval()
        self.decay = decay
        self.min_decay = min_decay
        self.update_after_step = update_after_step
        self.use_warmup = use_warmup
        self.warmup_gamma = warmup_gamma
        self.warmup_power = warmup_power
        self.device = device
        self.dtype = dtype
        self.stochastic_rounding = stochastic_rounding
        self.stochastic_rounding_seed = stochastic_rounding_seed
        self.foreach = foreach
        self.exclude_buffers = exclude_buffers
        self.n_updates: int = 0
        if device is not None:
            self.module.to(device=device)
        if dtype is not None:
            self.module.to(dtype=dtype)

    def get_decay(self, step: int | None = None) -> float:
        """The decay at a step; None is without warm-up."""
        if step is None:
            return self.decay
        step = max(0, step - self.update_after_step - 1)
        if step <= 0:
            return 0.0
        if not self.use_warmup:
            return self.decay
        decay = 1 - (1 + step / self.warmup_gamma) ** -self.warmup_power
        return max(min(decay, self.decay), self.min_decay)

    @torch.no_grad()
    def update(self, model: Any, step: int | None = None) -> None:
        """Move the average towards a model."""
        decay = self.get_decay(step)
        if self.exclude_buffers:
            averages, values = list(self.module.parameters()), list(model.parameters())
            for average, value in zip(self.module.buffers(), model.buffers(), strict=False):
                average.copy_(value)
        else:
            averages, values = (list(m.state_dict().values()) for m in (self.module, model))
        values = [v.to(a.device) for a, v in zip(averages, values, strict=False)]
        ops.average_(
            averages[: len(values)],
            values,
            decay,
            stochastic_rounding=self.stochastic_rounding,
            seed=self.stochastic_rounding_seed,
            step=self.n_updates,
        )
        self.n_updates += 1

    @torch.no_grad()
    def set(self, model: Any) -> None:
        """Copy a model into the average."""
        pairs = zip(self.module.state_dict().values(), model.state_dict().values(), strict=False)
        for average, value in pairs:
            average.copy_(value)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor | Any:
        """Call the averaged model."""
        return self.module(*args, **kwargs)


PEER = Peer(
    name="timm",
    package="timm.utils",
    distribution="timm",
    tested=("1.0.31",),
    swaps={"timm.utils.model_ema.ModelEmaV3": ModelEmaV3},
)
