# SPDX-License-Identifier: Apache-2.0
"""CLIP: an image must find its caption in the batch, and a caption its image."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from sslkernels import ContrastiveMetrics
from sslkernels.grad_cache import cached_step
from ssltrain.config import TrainConfig
from ssltrain.methods.base import Batch, Method, StepMetrics, projector
from ssltrain.models import Encoder, Network
from ssltrain.parallel import World, unwrap
from ssltrain.text import TextEncoder

MAX_SCALE = 100.0  # the paper clips the scale of the logits there


class TwoTowers(nn.Module):
    """Images and captions to projections of one space, and the scale of their similarities."""

    def __init__(self, network: Network, text: TextEncoder, temperature: float) -> None:
        super().__init__()
        self.network = network
        self.text = text
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / temperature)))

    def forward(self, images: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[N, D] of images, [N, D] of captions, and the scale."""
        return self.network(images), self.text(tokens), self.log_scale.exp()


class CLIP(Method):
    """Radford et al. 2021, arXiv:2103.00020; ``temperature`` is where the learnt one starts."""

    needs_captions = True

    def __init__(
        self, config: TrainConfig, encoder: Encoder, world: World, total_steps: int
    ) -> None:
        super().__init__(config, world, total_steps)
        images = Network(encoder, projector(config, encoder, layers=1))
        text = TextEncoder(config.projector_hidden, config.projector_dim)
        self.online = world.wrap(TwoTowers(images, text, config.temperature))

    @property
    def network(self) -> Network:
        """Encoder and projector of images."""
        network: Network = unwrap(self.online).network
        return network

    def train_step(self, batch: Batch) -> StepMetrics:
        """One view of each image against all captions of the batch, and the other way round."""
        if batch.tokens is None:
            raise ValueError("CLIP: the batch must have tokens, got None")
        if self.config.micro_batch:
            return self._train_step_in_parts(batch.view_1, batch.tokens)
        with self.autocast():
            images, captions, scale = self.online(batch.view_1, batch.tokens)
        loss, metrics = self.loss(images, captions, scale)
        self.backward(loss)
        return StepMetrics(loss.detach(), *metrics)

    def loss(
        self, images: Tensor, captions: Tensor, scale: Tensor
    ) -> tuple[Tensor, ContrastiveMetrics]:
        """The loss over the batch of all processes, and metrics over that of this one."""
        pair = (images, captions, scale)
        with torch.set_grad_enabled(self.world.size == 1):
            loss, metrics = self.ops.clip_loss(*pair, normalize=True, return_metrics=True)
        if self.world.size > 1:
            loss = self.ops.clip_loss(*pair, normalize=True, group=True)
        return loss, metrics

    def _train_step_in_parts(self, images: Tensor, tokens: Tensor) -> StepMetrics:
        """The same gradient with the activations of one micro-batch at a time."""
        towers: TwoTowers = unwrap(self.online)
        report: list[Tensor] = []

        def loss_fn(x: Tensor, y: Tensor) -> Tensor:
            loss, metrics = self.loss(x, y, towers.log_scale.exp())
            report.extend([loss.detach(), *metrics])
            return self.scaler.scale(loss)

        with self.autocast():
            encoders = (towers.network, towers.text)
            cached_step(encoders, (images, tokens), loss_fn, self.config.micro_batch)
        return StepMetrics(*report)

    def after_step(self) -> None:
        """Keep the scale in its range."""
        super().after_step()
        with torch.no_grad():
            unwrap(self.online).log_scale.clamp_(0.0, math.log(MAX_SCALE))
