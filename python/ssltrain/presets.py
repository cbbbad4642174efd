# SPDX-License-Identifier: Apache-2.0
"""Defaults by method and kind of data set, each with where it comes from; the papers' recipes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from ssltrain.errors import UserError

RECIPES = Path(__file__).parent / "recipes"
# What a paper prescribes for its method on any images; the rest of a recipe is for its own data.
_OF_THE_METHOD = (
    "optimizer",
    "base_lr",
    "momentum",
    "weight_decay",
    "warmup",
    "schedule",
    "temperature",
    "ema_decay",
    "queue_size",
    "projector_hidden",
    "projector_dim",
    "projector_layers",
    "symmetric",
)

# Pen strokes on black. No flips and no crops: a mirrored or cut digit is another sign, or none.
# The ranges are those within which a person still writes, and sees, the same digit.
_STROKES: dict[str, Any] = {
    "crop_min": 1.0,
    "flip": 0.0,
    "jitter": 0.5,
    "rotate": 15.0,
    "translate": 0.1,
    "zoom": 0.2,
    "shear": 15.0,
    "noise": 0.1,
}

# Of the methods that make images.
_DRAWN: dict[str, Any] = {
    "jitter": 0.0,
    "rotate": 8.0,
    "translate": 0.0,
    "zoom": 0.05,
    "shear": 8.0,
    "noise": 0.0,
    "weight_decay": 0.0,
}

# What a kind of data set changes for every method.
_KINDS: dict[str, dict[str, Any]] = {
    # 1437 training images of 8 x 8. A ResNet of three stages is as deep as 8 x 8 allows and one
    # block a stage keeps a run near half a minute on two cores. LARS is made for batches of
    # thousands; AdamW needs no tuning of its own at this size. Learning rate, epochs and batch
    # were chosen by the k-NN accuracy among training images, leaving each out in turn.
    "digits": {
        **_STROKES, "width": 32, "stages": 3, "blocks": 1, "projector_hidden": 256,
        "projector_dim": 128, "optimizer": "adamw", "base_lr": 2e-3, "weight_decay": 1e-4,
        "batch_size": 128, "epochs": 60,
    },
    # 28 x 28, 40 times as many images: the same strokes, two blocks a stage, fewer epochs.
    "mnist": {
        **_STROKES, "width": 32, "stages": 3, "blocks": 2, "projector_hidden": 512,
        "projector_dim": 128, "optimizer": "adamw", "base_lr": 1e-3, "weight_decay": 1e-4,
        "epochs": 20,
    },
    # ResNet-18 with the 3 x 3 stem; SimCLR's appendix B.9: batch 512, half the colour, no blur.
    "cifar10": {
        "width": 64, "stages": 4, "blocks": 2, "batch_size": 512, "epochs": 200,
        "projector_hidden": 512, "crop_min": 0.2, "jitter": 0.5, "blur": 0.0,
    },
    # Photographs of unknown size: the papers' augmentation, a ResNet-18 that fits small images.
    "npz": {"width": 64, "crop_min": 0.2, "jitter": 0.5},
    "folder": {"width": 64, "crop_min": 0.08, "jitter": 1.0, "blur": 0.5},
}  # fmt: skip

# What only one method changes on one kind.
_PAIRS: dict[tuple[str, str], dict[str, Any]] = {
    ("simclr", "digits"): {"temperature": 0.5},
    # 770 steps in all: the paper shortens the average too (0.99 at 100 epochs, 0.97 at 40). Fewer
    # epochs, or this many at a lower rate, end lower (docs/training.md).
    ("byol", "digits"): {"ema_decay": 0.98, "epochs": 70, "base_lr": 3e-3},
    # A queue of 65536 would hold every image 45 times, from networks long gone; 1024 keys are the
    # last four steps.
    ("moco", "digits"): {"ema_decay": 0.99, "queue_size": 1024, "symmetric": True},
    ("simclr", "mnist"): {"temperature": 0.2},
    ("byol", "mnist"): {"ema_decay": 0.99},
    ("moco", "mnist"): {"ema_decay": 0.99, "queue_size": 4096},
    ("moco", "npz"): {"queue_size": 4096, "ema_decay": 0.99},
    # A batch of 128 has few negatives: a temperature between those of SimCLR here and the paper's.
    ("moco3", "digits"): {"temperature": 0.5, "ema_decay": 0.98},
    ("supcon", "digits"): {"temperature": 0.2},
    # Few changes of the strokes: what is drawn is to look like the data.
    ("autoencoder", "digits"): {**_DRAWN, "projector_dim": 32, "epochs": 40},
    ("vae", "digits"): {
        **_DRAWN,
        "rotate": 4.0,
        "zoom": 0.0,
        "shear": 0.0,
        "projector_dim": 16,
        "epochs": 38,
    },
    ("gan", "digits"): {
        **_DRAWN,
        "backbone": "ssltrain.methods.gan:critic",
        "projector_dim": 64,
        "base_lr": 8e-4,  # 2e-4 at 64 images, as in the paper
        "batch_size": 64,
        "r1": 1.0,
        "epochs": 48,
        "schedule": "constant",
        "warmup": 0.0,
    },
}


def preset(method: str, kind: str) -> dict[str, Any]:
    """The values that ``method`` on data of ``kind`` sets away from the general defaults."""
    pair = _PAIRS.get((method, kind), {})
    if f"{method}-{kind}" in recipe_names():
        pair = _of_the_method(f"{method}-{kind}")
    return {**_of_the_method(method), **_KINDS[kind], **pair}


def _of_the_method(name: str) -> dict[str, Any]:
    return {key: value for key, value in recipe(name).items() if key in _OF_THE_METHOD}


def recipe_names() -> list[str]:
    """The recipes there are."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def recipe(name: str) -> dict[str, Any]:
    """The settings of a recipe: a paper's, for its own data. Each method has one of its name.

    Raises:
        UserError: there is no such recipe.
    """
    path = RECIPES / f"{name}.yaml"
    if name not in recipe_names():
        raise UserError(f"--recipe must be one of {', '.join(recipe_names())}, got {name}")
    settings: dict[str, Any] = yaml.safe_load(path.read_text())
    return settings
