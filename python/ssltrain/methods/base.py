# SPDX-License-Identifier: Apache-2.0
"""What the methods share: a batch, a step's report, and the state around one ``train_step``."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import sslkernels
from ssltrain import eager
from ssltrain.config import TrainConfig
from ssltrain.errors import UserError
from ssltrain.models import Encoder, Network, mlp_head
from ssltrain.parallel import World, unwrap

# torch's own 2**16 overflows in the first steps at a temperature of 0.1, which skips them.
FIRST_SCALE = 2.0**12


class Batch(NamedTuple):
    """What one step sees of N images.

    Attributes:
        view_1: float [N, C, H, W], one augmentation of each image.
        view_2: another of the same images.
        crops: more views, smaller ones, where multi-crop is on.
        labels: int64 [N], -1 where an image has none; only for methods that train on labels.
        tokens: int32 [N, L], the caption of each image; only for methods that train on captions.
    """

    view_1: Tensor
    view_2: Tensor
    crops: tuple[Tensor, ...] = ()
    labels: Tensor | None = None
    tokens: Tensor | None = None


class StepMetrics(NamedTuple):
    """What one step reports, as 0-d tensors on the device: reading them is left to the logger."""

    loss: Tensor
    top1: Tensor
    top5: Tensor
    positive_similarity: Tensor
    negative_similarity: Tensor


class Method(nn.Module, ABC):
    """A network and its ``train_step``.

    Attributes:
        online: the network that is trained, under DDP where there are many processes.
        ops: losses, queue and average: ``sslkernels``, or plain PyTorch (``ssltrain.eager``).
        scaler: scales losses of float16 networks, and does nothing for others.
    """

    needs_labels = False
    needs_captions = False
    online: nn.Module

    def __init__(self, config: TrainConfig, world: World, total_steps: int) -> None:
        super().__init__()
        self.config = config
        self.world = world
        self.total_steps = total_steps
        self.step = 0  # optimiser steps taken
        self.ops: Any = eager if config.loss_backend == "eager" else sslkernels
        self.scaler = torch.amp.GradScaler(
            world.device.type, init_scale=FIRST_SCALE, enabled=config.amp == "fp16"
        )

    @property
    def encoder(self) -> Encoder:
        """The encoder that the evaluation uses."""
        return self.network.encoder

    @property
    def network(self) -> Network:
        """Encoder and projector of the online side."""
        online = unwrap(self.online)
        network: Network = online.network if isinstance(online, Predicting) else online
        return network

    def start_from(self, weights: dict[str, Tensor]) -> list[str]:
        """Take over the weights of another run, before the first step.

        Args:
            weights: what ``online_weights`` found in its checkpoint, of any method.

        Returns:
            The heads (projector, predictor) that keep their fresh weights, as theirs do not fit.

        Raises:
            UserError: the encoders differ.
        """
        predictor = getattr(unwrap(self.online), "predictor", None)
        heads = {"projector": self.network.projector, "predictor": predictor}
        load_encoder(self.network.encoder, weights)
        fresh = []
        for name, head in heads.items():
            if head is None:
                continue
            found, own = part_of(weights, name), head.state_dict()
            if {k: v.shape for k, v in found.items()} == {k: v.shape for k, v in own.items()}:
                head.load_state_dict(found)
            else:
                fresh.append(name)
        target = getattr(self, "target", None)  # the moving average, in methods that have one
        if target is not None:
            target.module.load_state_dict(self.network.state_dict())
        return fresh

    def prime(self, views: Iterable[Tensor]) -> None:
        """Called before the first step with views of batches, each float [B, C, H, W]."""

    @abstractmethod
    def train_step(self, batch: Batch) -> StepMetrics:
        """Forward and backward of one batch."""

    def after_step(self) -> None:
        """Called after the optimiser step."""
        self.step += 1

    def fixed_rate(self) -> nn.Module | None:
        """The part whose learning rate does not follow the cosine, if there is one."""
        return None

    def autocast(self) -> torch.autocast:
        """The precision of the networks; the losses choose their own."""
        dtype = torch.float16 if self.config.amp == "fp16" else torch.bfloat16
        return torch.autocast(
            self.world.device.type, dtype, enabled=self.config.amp in ("bf16", "fp16")
        )

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a loss to the parameters' (scaled, for float16)."""
        self.scaler.scale(loss).backward()

    def micro_batches(self, batch: Batch) -> Iterator[tuple[float, Batch]]:
        """The share of the batch in each micro-batch, and the part of it."""
        size = len(batch.view_1)
        parts = self.config.micro_batch or size
        for begin in range(0, size, parts):
            rows = slice(begin, min(begin + parts, size))
            crops = tuple(crop[rows] for crop in batch.crops)
            labels = None if batch.labels is None else batch.labels[rows]
            part = Batch(batch.view_1[rows], batch.view_2[rows], crops, labels)
            yield len(part.view_1) / size, part

    def told_apart(self, p: Tensor, targets: Tensor) -> list[Tensor]:
        """For methods without negatives: how well views find their partners in the batch."""
        with torch.no_grad():
            _, metrics = self.ops.info_nce_loss(p.detach(), targets, return_metrics=True)
        return list(metrics)


class Predicting(nn.Module):
    """Encoder, projector and predictor."""

    def __init__(self, network: Network, predictor: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.predictor = predictor

    def forward(self, x: Tensor) -> Any:
        """Predictions of a batch."""
        return self.predictor(self.network(x))


def projector(config: TrainConfig, encoder: Encoder, layers: int, **norms: bool) -> nn.Sequential:
    """The projector of a method that has ``layers`` layers unless ``--projector-layers`` says so."""
    hidden, dim = config.projector_hidden, config.projector_dim
    return mlp_head(encoder.dim, hidden, dim, layers=config.projector_layers or layers, **norms)


# ---- weights in checkpoints ----------------------------------------------------------------------


def online_weights(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The online network in the state of a method: names that start with the name of the part.

    DDP and ``Predicting`` wrap the network; what they put before the names is taken off.
    """
    found = {}
    for name, value in state.items():
        if name.startswith("online."):
            words = name.split(".")[1:]
            while words[0] in ("module", "network"):
                words = words[1:]
            found[".".join(words)] = value
    return found


def named_for(processes: int, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state of a method with the names that it has in so many processes: DDP puts in a word."""
    plain = {name.replace("online.module.", "online.", 1): value for name, value in state.items()}
    if processes == 1:
        return plain
    return {
        name.replace("online.", "online.module.", 1) if name.startswith("online.") else name: value
        for name, value in plain.items()
    }


def part_of(weights: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """The weights of encoder, projector or predictor, under their own names."""
    return {k[len(name) + 1 :]: v for k, v in weights.items() if k.startswith(name + ".")}


def load_encoder(encoder: Encoder, weights: dict[str, Tensor]) -> None:
    """Load an encoder from ``online_weights``.

    Raises:
        UserError: they are of another encoder.
    """
    try:
        encoder.load_state_dict(part_of(weights, "encoder"))
    except RuntimeError as error:
        reason = " ".join(str(error).split()[:40])
        raise UserError(f"the checkpoint is of another network: {reason}") from error
