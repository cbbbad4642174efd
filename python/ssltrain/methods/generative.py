# SPDX-License-Identifier: Apache-2.0
"""Encoder-decoder methods: an autoencoder, masked or not, and a variational one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ssltrain.config import TrainConfig
from ssltrain.methods.base import Batch, Method, Predicting, StepMetrics, projector
from ssltrain.models import Encoder, Network
from ssltrain.parallel import World

WARM_UP = 0.2  # share of the steps in which beta rises to its value
# Adam moves a number by about the learning rate a step: the log-variance of the pixels, which has units of
# way to go, is this many times what is stored.
STRIDE = 20.0
Rows = list[tuple[str, Tensor]]  # titles and images [N, C, H, W] from 0 to 1


class Decoder(nn.Module):
    """Codes [B, D] to images [B, C, H, W]: a linear layer, and twice upsampling and convolution.

    The widths are those of DCGAN (arXiv:1511.06434) for a small image: 4, 2 and 1 times ``width``.
    """

    def __init__(self, dim: int, channels: int, size: tuple[int, int], width: int) -> None:
        super().__init__()
        self.size = size
        self.start = tuple(-(-side // 4) for side in size)
        self.linear = nn.Linear(dim, 4 * width * self.start[0] * self.start[1], bias=False)
        steps: list[nn.Module] = [nn.BatchNorm2d(4 * width), nn.ReLU()]
        for wide, narrow in ((4 * width, 2 * width), (2 * width, width)):
            steps += [nn.Upsample(scale_factor=2), nn.Conv2d(wide, narrow, 3, 1, 1, bias=False)]
            steps += [nn.BatchNorm2d(narrow), nn.ReLU()]
        self.layers = nn.Sequential(*steps, nn.Conv2d(width, channels, 3, 1, 1))

    def forward(self, z: Tensor) -> Tensor:
        """Images as logits of their pixels."""
        x: Tensor = self.layers(self.linear(z).unflatten(1, (-1, *self.start)))
        return x[:, :, : self.size[0], : self.size[1]]


class Generates(Method):
    """A method that makes images."""

    def pictures(self, images: Tensor) -> Rows:
        """What to show, in evaluation mode.

        Args:
            images: of the test part, float [N, C, H, W] from 0 to 1.
        """
        raise NotImplementedError


class Autoencoder(Generates):
    """Mean squared error of the reconstruction; with ``--mask`` of the pixels that were hidden.

    The masked one is that of He et al. 2021 (arXiv:2111.06377) for convolutions, which can't leave
    patches out: hidden patches are filled with the mean of the data.
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
        network = Network(encoder, projector(config, encoder, layers=1))
        decoder = Decoder(config.projector_dim, encoder.mean.shape[1], size, config.width)
        self.online = world.wrap(_Coded(network, decoder))

    def hidden(self, x: Tensor) -> Tensor:
        """1 where a pixel is hidden, [N, 1, H, W]: the same number of patches in each image."""
        patch, (height, width) = self.config.patch, x.shape[2:]
        across, down = -(-width // patch), -(-height // patch)
        count = round(self.config.mask * across * down)
        order = torch.rand(len(x), across * down, device=x.device).argsort(dim=1)
        mask = torch.zeros(len(x), across * down, device=x.device).scatter_(1, order[:, :count], 1)
        mask = mask.view(-1, 1, down, across).to(x.dtype)
        whole = mask.repeat_interleave(patch, 2).repeat_interleave(patch, 3)
        return whole[:, :, :height, :width]

    def masked(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """The images with hidden patches, and where they are."""
        if not self.config.mask:
            return x, None
        hidden = self.hidden(x)
        return x * (1 - hidden) + self.encoder.mean * hidden, hidden

    def train_step(self, batch: Batch) -> StepMetrics:
        """Both views are seen, and what they show is to come out again."""
        reports = []
        for share, part in self.micro_batches(batch):
            x = torch.cat([part.view_1, part.view_2])
            seen, hidden = self.masked(x)
            with self.autocast():
                z, out = self.online(seen)
            out = out.to(x.dtype).sigmoid()
            if hidden is not None:  # a mean over all pixels, of which these are a share
                out, x = out * hidden, x * hidden
            loss = self.ops.feature_reconstruction_loss(out, x)
            if hidden is not None:
                loss = loss / hidden.mean()
            self.backward(share * loss)
            pair = z.detach().chunk(2)
            reports.append(share * torch.stack([loss.detach(), *self.told_apart(*pair)]))
        return StepMetrics(*torch.stack(reports).sum(dim=0).unbind())

    @torch.no_grad()
    def pictures(self, images: Tensor) -> Rows:
        """Images, what the encoder saw of them, and what came out."""
        seen, hidden = self.masked(images)
        out = self.online(seen)[1].sigmoid()
        rows = [("images", images)]
        if hidden is not None:
            rows += [
                ("seen", seen),
                ("hidden parts filled in", torch.where(hidden > 0, out, images)),
            ]
        return [*rows, ("reconstructions", out)]


class _Coded(Predicting):
    """Gives codes and the logits of the reconstruction."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z = self.network(x)
        return z, self.predictor(z)


class VAE(Generates):
    """Kingma and Welling 2014 (arXiv:1312.6114), with one learnt variance for all pixels.

    The first half of the projector's output are means, the second log-variances.
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
        codes = config.projector_dim
        head = projector(config, encoder, layers=1)
        last = head[-1]
        if not isinstance(last, nn.Linear):
            raise TypeError("the projector must end with a linear layer")
        head[-1] = nn.Linear(last.in_features, 2 * codes)
        decoder = Decoder(codes, encoder.mean.shape[1], size, config.width)
        self.online = world.wrap(_Variational(Network(encoder, head), decoder, self.ops))
        self.beta = self.ops.beta_schedule(max(1, total_steps), config.beta, warm_up=WARM_UP)

    def negative_elbo(self, x: Tensor, beta: float, **options: Any) -> tuple[Tensor, Tensor]:
        """The loss of images [N, C, H, W], and the means of their codes."""
        with self.autocast():
            out, mean, log_variance = self.online(x)
        variance = STRIDE * self.get_parameter("online.spread")
        loss = self.ops.vae_loss(
            out.to(x.dtype).sigmoid(),
            x,
            mean,
            log_variance,
            likelihood="gaussian",
            x_log_variance=variance,
            beta=beta,
            free_bits=self.config.free_bits,
            **options,
        )
        return loss, mean

    def train_step(self, batch: Batch) -> StepMetrics:
        """The bound of both views; in nats an image."""
        reports = []
        for share, part in self.micro_batches(batch):
            x = torch.cat([part.view_1, part.view_2])
            loss, mean = self.negative_elbo(x, self.beta(self.step))
            self.backward(share * loss)
            pair = mean.detach().chunk(2)
            reports.append(share * torch.stack([loss.detach(), *self.told_apart(*pair)]))
        return StepMetrics(*torch.stack(reports).sum(dim=0).unbind())

    @torch.no_grad()
    def pictures(self, images: Tensor) -> Rows:
        """Images, their reconstructions, and images of codes from the prior."""
        mean = self.network(images).chunk(2, dim=1)[0]
        decoder = self.online.get_submodule("predictor")
        rows = [("images", images), ("reconstructions", decoder(mean).sigmoid())]
        for _ in range(4):
            rows.append(("samples", decoder(torch.randn_like(mean)).sigmoid()))
        return rows


class _Variational(Predicting):
    """Gives the logits of a sampled reconstruction, means and log-variances."""

    def __init__(self, network: Network, decoder: Decoder, ops: Any) -> None:
        super().__init__(network, decoder)
        self.sample = ops.reparameterize
        self.spread = nn.Parameter(torch.tensor(-2.0 / STRIDE))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, log_variance = self.network(x).to(x.dtype).chunk(2, dim=1)
        # Of torch's generator, so that a run that goes on draws what it would have drawn.
        seed = int(torch.randint(2**62, (), device="cpu"))
        return self.predictor(self.sample(mean, log_variance, seed)), mean, log_variance
