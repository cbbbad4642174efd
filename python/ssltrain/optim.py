# SPDX-License-Identifier: Apache-2.0
"""Optimisers and the learning-rate schedule."""

from __future__ import annotations

import math

from torch import nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from ssltrain.config import TrainConfig
from ssltrain.errors import UserError

DROPS = (0.6, 0.8)  # of the training: epochs 120 and 160 of 200 in MoCo's recipe


def build_optimizer(
    config: TrainConfig, online: nn.Module, fixed: nn.Module | None = None
) -> Optimizer:
    """The optimiser of ``config``; biases and norm weights get no weight decay.

    Args:
        config: the run.
        online: what is trained.
        fixed: the part of it whose learning rate stays at its peak.

    Raises:
        UserError: ``--optimizer lars`` without the package that holds it.
    """
    kept = set() if fixed is None else set(fixed.parameters())
    groups = []
    for constant in (False, True) if kept else (False,):
        own = [p for p in online.parameters() if (p in kept) == constant]
        matrices = [p for p in own if p.ndim > 1]
        vectors = [p for p in own if p.ndim <= 1]
        groups.append(
            {"params": matrices, "weight_decay": config.weight_decay, "constant": constant}
        )
        groups.append({"params": vectors, "weight_decay": 0.0, "constant": constant})
    lr = config.learning_rate
    if config.optimizer == "adamw":
        # DCGAN's: with 0.9 the two sides of a game swing (arXiv:1511.06434, section 4).
        return AdamW(groups, lr=lr, betas=(0.5 if config.method == "gan" else 0.9, 0.999))
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


def build_schedule(optimizer: Optimizer, config: TrainConfig, total_steps: int) -> LambdaLR:
    """Linear warm-up to the peak rate, then what ``--schedule`` says; ``set_step`` moves it."""
    warmup_steps = round(config.warmup * total_steps)

    def scale(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / (warmup_steps + 1)
        if config.schedule == "constant":
            return 1.0
        if config.schedule == "steps":
            share = step / max(1, total_steps)
            return 0.1 ** sum(share >= drop for drop in DROPS)
        done = (step - warmup_steps) / max(1, total_steps - warmup_steps)
        return 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))

    groups = optimizer.param_groups
    return LambdaLR(optimizer, [(lambda _: 1.0) if g["constant"] else scale for g in groups])


def set_step(schedule: LambdaLR, step: int) -> None:
    """Put a schedule at ``step``, and the learning rates where it says.

    ``schedule.step()`` would count, and complain of the steps that a gradient scaler leaves out.
    """
    schedule.last_epoch = step
    rates = [
        base * scale(step)
        for base, scale in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)
    ]
    for group, rate in zip(schedule.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    schedule._last_lr = rates
