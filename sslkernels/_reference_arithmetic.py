# SPDX-License-Identifier: Apache-2.0
"""What the definitions of ``sslkernels.reference`` share: the dtype they compute in, rows, reductions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def _acc(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _widen(*tensors: Tensor) -> tuple[Tensor, ...]:
    wide = any(x.dtype == torch.float64 for x in tensors)
    return tuple(x.to(torch.float64 if wide else torch.float32) for x in tensors)


def _unit(x: Tensor, normalize: bool = True) -> Tensor:
    return F.normalize(_acc(x), dim=-1, eps=1e-12) if normalize else _acc(x)


def _reduce(loss: Tensor, reduction: str) -> Tensor:
    if reduction == "none":
        return loss
    return loss.sum() / max(1, loss.numel()) if reduction == "mean" else loss.sum()
