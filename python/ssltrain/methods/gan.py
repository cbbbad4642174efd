# SPDX-License-Identifier: Apache-2.0
"""A generative adversarial network of the size of DCGAN; its features are the discriminator's."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ssltrain.config import TrainConfig
from ssltrain.methods.base import Batch, Predicting, StepMetrics, projector
from ssltrain.methods.generative import Decoder, Generates, Rows
from ssltrain.models import Encoder, Network
from ssltrain.parallel import World

# The penalty is taken, so many times as large, at every R1_EVERY-th step: a third of the time of a step
# otherwise (lazy regularisation of Karras et al. 2019, arXiv:1912.04958, appendix B).
R1_EVERY = 4


def critic(in_channels: int, width: int = 48) -> nn.Module:
    """A discriminator's backbone without batch norm: ``--backbone ssltrain.methods.gan:critic``.

    Maps [B, in_channels, H, W] to [B, 8 * width]; a penalty of its gradient may be asked for.
    """
    return nn.Sequential(
        nn.Conv2d(in_channels, width, 3, 1, 1),
        nn.LeakyReLU(0.2),
        nn.Conv2d(width, 2 * width, 4, 2, 1),
        nn.LeakyReLU(0.2),
        nn.Conv2d(2 * width, 2 * width, 4, 2, 1),
        nn.LeakyReLU(0.2),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
    )


class _Adversaries(Predicting):
    """Discriminator (network and head) and generator (the predictor)."""

    def __init__(self, network: Network, generator: Decoder, dim: int) -> None:
        super().__init__(network, generator)
        self.head = nn.Sequential(nn.LeakyReLU(0.2), nn.Linear(dim, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Logits of images, [B]."""
        return self.judge(self.network(x))

    def judge(self, z: Tensor) -> Tensor:
        """Logits of the network's outputs, [B]."""
        logits: Tensor = self.head(z)
        return logits.squeeze(1)


class GAN(Generates):
    """Radford et al. 2015 (arXiv:1511.06434), both sides in one step of the optimiser.

    The loss is ``--gan-form``, for the discriminator with ``--r1`` times Mescheder et al.'s penalty
    (arXiv:1801.04406).
    """

    def __init__(
        self,
        config: TrainConfig,
        encoder: Encoder,
        world: World,
        total_steps: int,
        size: tuple[int, int],
    ) -> None:
        super().__init__(config, world, total_steps)
        dim = config.projector_dim
        network = Network(encoder, projector(config, encoder, layers=1))
        generator = Decoder(dim, encoder.mean.shape[1], size, config.width)
        self.online = world.wrap(_Adversaries(network, generator, dim))

    def _judges(self) -> list[nn.Parameter]:
        sides: _Adversaries = self.online  # type: ignore[assignment]
        return [*sides.network.parameters(), *sides.head.parameters()]

    def train_step(self, batch: Batch) -> StepMetrics:
        """Gradients of both sides at the same weights."""
        reports = []
        form, ops = self.config.gan_form, self.ops
        sides: _Adversaries = self.online  # type: ignore[assignment]
        generator = sides.predictor
        for share, part in self.micro_batches(batch):
            real = part.view_1
            with self.autocast():
                noise = torch.randn(len(real), self.config.projector_dim, device=real.device)
                fake = generator(noise.to(real.dtype)).to(real.dtype).sigmoid()
                z = self.network(real)
                loss = ops.adversarial_loss(self.online(fake.detach()), sides.judge(z), form=form)
                if self.config.r1 and self.step % R1_EVERY == 0:
                    scale = self.config.r1 * R1_EVERY
                    loss = loss + ops.r1_penalty(self.online, real, weight=scale)
            self.backward(share * loss)
            judges = self._judges()
            for weight in judges:  # the generator's loss is not theirs
                weight.requires_grad_(False)
            try:
                with self.autocast():
                    won = ops.adversarial_loss(self.online(fake), form=form)
                self.backward(share * won)
            finally:
                for weight in judges:
                    weight.requires_grad_(True)
            with torch.no_grad(), self.autocast():
                other = self.network(part.view_2).to(real.dtype)
            metrics = self.told_apart(z.detach().to(real.dtype), other)
            reports.append(share * torch.stack([loss.detach(), *metrics]))
        return StepMetrics(*torch.stack(reports).sum(dim=0).unbind())

    @torch.no_grad()
    def pictures(self, images: Tensor) -> Rows:
        """Images, and what the generator makes."""
        generator = self.online.get_submodule("predictor")
        count, dim = len(images), self.config.projector_dim
        draw = lambda: torch.randn(count, dim, device=images.device)  # noqa: E731
        return [("images", images), *(("samples", generator(draw()).sigmoid()) for _ in range(6))]
