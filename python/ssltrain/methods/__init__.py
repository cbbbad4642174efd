# SPDX-License-Identifier: Apache-2.0
"""The methods, each a network and one ``train_step``.

A ``train_step`` runs forward and backward and leaves the gradients in the parameters. The losses,
the queue and the moving average are those of ``sslkernels``.
"""

from __future__ import annotations

from collections.abc import Callable

from ssltrain.config import TrainConfig
from ssltrain.errors import UserError
from ssltrain.methods.base import (
    Batch,
    Method,
    StepMetrics,
    load_encoder,
    named_for,
    online_weights,
    part_of,
)
from ssltrain.methods.byol import BYOL
from ssltrain.methods.clip import CLIP
from ssltrain.methods.gan import GAN
from ssltrain.methods.generative import VAE, Autoencoder, Generates
from ssltrain.methods.moco import MoCo, MoCo3
from ssltrain.methods.simclr import SimCLR, SupCon
from ssltrain.methods.simsiam import SimSiam
from ssltrain.models import Encoder
from ssltrain.parallel import World

__all__ = [
    "BYOL",
    "CLIP",
    "GAN",
    "VAE",
    "Autoencoder",
    "Batch",
    "Generates",
    "Method",
    "MoCo",
    "MoCo3",
    "SimCLR",
    "SimSiam",
    "StepMetrics",
    "SupCon",
    "build_method",
    "load_encoder",
    "named_for",
    "online_weights",
    "part_of",
]

_METHODS: dict[str, Callable[..., Method]] = {
    "simclr": SimCLR,
    "byol": BYOL,
    "moco": MoCo,
    "moco3": MoCo3,
    "simsiam": SimSiam,
    "supcon": SupCon,
    "clip": CLIP,
}
# They also need to know how large an image is.
_GENERATIVE: dict[str, Callable[..., Method]] = {"autoencoder": Autoencoder, "vae": VAE, "gan": GAN}


def build_method(
    config: TrainConfig,
    encoder: Encoder,
    world: World,
    total_steps: int,
    size: tuple[int, int] = (0, 0),
) -> Method:
    """The method that ``config`` names, on the device of ``world``.

    Args:
        config: the run.
        encoder: with fresh weights or others.
        world: the processes that share the run.
        total_steps: of the run.
        size: height and width of an image, for methods that make images.

    Raises:
        UserError: a setting that the method cannot serve with this many processes.
    """
    if world.size > 1 and config.loss_backend == "eager":
        raise UserError("--loss-backend eager runs in one process; start it without torchrun")
    if world.size > 1 and config.micro_batch and config.method == "clip":
        raise UserError("--micro-batch of clip runs in one process; start it without torchrun")
    if config.method in _GENERATIVE:
        if world.size > 1:
            raise UserError(f"{config.method} runs in one process; start it without torchrun")
        return _GENERATIVE[config.method](config, encoder, world, total_steps, size)
    return _METHODS[config.method](config, encoder, world, total_steps)
