# SPDX-License-Identifier: Apache-2.0
"""Defaults by method and kind of data set, each with where it comes from."""

from __future__ import annotations

from typing import Any

# What the papers prescribe, on any images. Learning rates are for 256 images a step.
_METHODS: dict[str, dict[str, Any]] = {
    # Chen et al. 2020, arXiv:2002.05709: LARS, 0.3 x B/256, weight decay 1e-6, temperature 0.1,
    # 10 epochs of warm-up, projector to 128.
    "simclr": {
        "optimizer": "lars", "base_lr": 0.3, "weight_decay": 1e-6, "temperature": 0.1,
        "projector_hidden": 2048, "projector_dim": 128,
    },
    # Grill et al. 2020, arXiv:2006.07733: projector and predictor 4096 -> 256, LARS 0.45 x B/256,
    # weight decay 1e-6 and base decay 0.99 at 100 epochs.
    "byol": {
        "optimizer": "lars", "base_lr": 0.45, "weight_decay": 1e-6, "ema_decay": 0.99,
        "projector_hidden": 4096, "projector_dim": 256,
    },
    # He et al. 2020, arXiv:1911.05722, with the head and temperature of v2, arXiv:2003.04297.
    "moco": {
        "optimizer": "sgd", "base_lr": 0.03, "weight_decay": 1e-4, "temperature": 0.2,
        "ema_decay": 0.999, "queue_size": 65536, "warmup": 0.0,
        "projector_hidden": 2048, "projector_dim": 128,
    },
}  # fmt: skip

# What a kind of data set changes for every method.
_KINDS: dict[str, dict[str, Any]] = {
    "digits": {
        "width": 32, "stages": 3, "blocks": 1, "projector_hidden": 256, "projector_dim": 128,
        "crop_min": 1.0, "flip": 0.0, "jitter": 0.5, "rotate": 15.0, "translate": 0.1, "zoom": 0.2,
        "shear": 15.0, "noise": 0.1,
        "optimizer": "adamw", "base_lr": 2e-3, "weight_decay": 1e-4, "epochs": 60,
    },
    "mnist": {},
    "cifar10": {},
    "npz": {},
    "folder": {},
}
_PAIRS: dict[tuple[str, str], dict[str, Any]] = {
    ("simclr", "digits"): {"temperature": 0.2},
    ("byol", "digits"): {"ema_decay": 0.97},
    ("moco", "digits"): {"ema_decay": 0.98, "queue_size": 1024, "symmetric": True},
}


def preset(method: str, kind: str) -> dict[str, Any]:
    """The values that ``method`` on data of ``kind`` sets away from the general defaults."""
    return {**_METHODS[method], **_KINDS[kind], **_PAIRS.get((method, kind), {})}
