# SPDX-License-Identifier: Apache-2.0
"""Optimisers and the learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Iterable

from torch import nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from ssltrain.config import TrainConfig
from ssltrain.errors import UserError


def build_optimizer(config: TrainConfig, parameters: Iterable[nn.Parameter]) -> Optimizer:
    """The optimiser of ``config``; biases and norm weights get no weight decay.

    Raises:
        UserError: ``--optimizer lars`` without the package that holds it.
    """
    matrices: list[nn.Parameter] = []
    vectors: list[nn.Parameter] = []
    for parameter in parameters:
        (matrices if parameter.ndim > 1 else vectors).append(parameter)
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    lr = config.learning_rate
    if config.optimizer == "adamw":
        return AdamW(groups, lr=lr)
    if config.optimizer == "sgd":
        return SGD(groups, lr=lr, momentum=config.momentum)
    try:
        from pytorch_optimizer import LARS  # imported here: it takes seconds
    except ImportError as error:
        raise UserError(
            "--optimizer lars needs the package pytorch_optimizer; install it, or use sgd or adamw"
        ) from error
    # It leaves vectors unscaled, as the papers do (You et al. 2017, arXiv:1708.03888).
    lars: Optimizer = LARS(groups, lr=lr, momentum=config.momentum)
    return lars


def warmup_cosine(optimizer: Optimizer, warmup_steps: int, total_steps: int) -> LambdaLR:
    """Linear warm-up to the peak rate, then a half cosine to 0, stepped once a step."""

    def scale(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / (warmup_steps + 1)
        done = (step - warmup_steps) / max(1, total_steps - warmup_steps)
        return 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))

    return LambdaLR(optimizer, scale)


def set_step(schedule: LambdaLR, step: int) -> None:
    """Put a schedule at ``step``, and the learning rates where it says; its length may differ."""
    schedule.last_epoch = step
    rates = [
        base * scale(step)
        for base, scale in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)
    ]
    for group, rate in zip(schedule.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    schedule._last_lr = rates
