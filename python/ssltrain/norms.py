# SPDX-License-Identifier: Apache-2.0
"""Batch norm with the statistics of all processes, on CPUs, for which torch has none."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


class CPUSyncBatchNorm(nn.modules.batchnorm._BatchNorm):
    """What ``torch.nn.SyncBatchNorm`` is on GPUs.

    Mean and variance are those of the batches of all processes, which may differ in size, and so is the
    gradient.  Two reductions forward and two backward.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x [N, C, ...]."""
        alone = not (dist.is_initialized() and dist.get_world_size() > 1)
        if alone or not self.training:
            return super().forward(x)
        wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        over = [d for d in range(x.ndim) if d != 1]
        shape = [1, -1] + [1] * (x.ndim - 2)
        own = wide.new_full((1,), float(x.numel() // x.shape[1]))
        sums = _Sum.apply(torch.cat((wide.sum(over), own)))
        count = sums[-1].detach()
        mean = sums[:-1] / count
        centred = wide - mean.view(shape)
        variance = _Sum.apply(centred.square().sum(over)) / count
        self._follow(mean.detach(), variance.detach(), float(count))
        y = centred * (variance + self.eps).rsqrt().view(shape)
        if self.affine:
            y = y * self.weight.view(shape) + self.bias.view(shape)
        return y.to(x.dtype)

    def _check_input_dim(self, input: Tensor) -> None:
        """Any number of dimensions."""

    @torch.no_grad()
    def _follow(self, mean: Tensor, variance: Tensor, count: float) -> None:
        """Move the running statistics."""
        tracked = self.num_batches_tracked
        if self.running_mean is None or self.running_var is None or tracked is None:
            return
        tracked.add_(1)
        share = 1 / float(tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), share)
        unbiased = variance * (count / max(1.0, count - 1))
        self.running_var.lerp_(unbiased.to(self.running_var.dtype), share)


class _Sum(torch.autograd.Function):
    """The sum over processes, whose gradient is the sum of their gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        dy = dy.clone()
        dist.all_reduce(dy)
        return dy


def synchronised(module: nn.Module) -> nn.Module:
    """``module`` with every batch norm over all processes; parameters and buffers are the same objects."""
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        norm = CPUSyncBatchNorm(
            module.num_features,
            module.eps,
            module.momentum,
            affine=module.affine,
            track_running_stats=module.track_running_stats,
        )
        norm._parameters, norm._buffers = module._parameters, module._buffers
        norm.train(module.training)
        return norm
    for name, child in module.named_children():
        setattr(module, name, synchronised(child))
    return module
