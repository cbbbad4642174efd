# SPDX-License-Identifier: Apache-2.0
"""Backbones and heads."""

from __future__ import annotations

import importlib

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssltrain.config import TrainConfig
from ssltrain.errors import UserError


class EveryOther(nn.Conv2d):
    """A 1x1 convolution of every ``stride``-th pixel, without bias.

    What ``nn.Conv2d`` with that stride is, but the pixels are picked first: with channels last, 8
    channels and images of 64 x 64, the backward pass of torch 2.13 ends the process on CPUs with
    AVX-512.
    """

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__(in_channels, channels, 1, bias=False)
        self.every = stride

    def forward(self, input: Tensor) -> Tensor:
        """Map [B, in_channels, H, W] to [B, channels, H / stride, W / stride], rounded up."""
        picked: Tensor = super().forward(input[:, :, :: self.every, :: self.every])
        return picked


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with batch norm and a shortcut (He et al. 2015, arXiv:1512.03385)."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != channels:
            self.shortcut = nn.Sequential(
                EveryOther(in_channels, channels, stride), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, in_channels, H, W] to [B, channels, H / stride, W / stride]."""
        y = F.relu(self.norm1(self.conv1(x)), inplace=True)
        return F.relu(self.norm2(self.conv2(y)) + self.shortcut(x), inplace=True)


class SmallResNet(nn.Module):
    """A ResNet for small images: a 3x3 stem without pooling, ``stages`` stages, average pooling.

    Stage i has ``width * 2**i`` channels, and every stage after the first halves the image, as does
    a stem of stride 2.  The features are means over ``pool`` x ``pool`` parts of the last map.

    Maps float [B, in_channels, H, W] to [B, width * 2**(stages - 1) * pool**2].
    """

    def __init__(
        self,
        in_channels: int,
        width: int,
        stages: int,
        blocks: int,
        stem_stride: int = 1,
        pool: int = 1,
    ) -> None:
        super().__init__()
        self.pool = pool
        self.stem = nn.Sequential(
            nn.Conv2d(in_channels, width, 3, stem_stride, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
        )
        layers: list[nn.Module] = []
        channels = width
        for stage in range(stages):
            for block in range(blocks):
                stride = 2 if stage > 0 and block == 0 else 1
                layers.append(ResidualBlock(channels, width * 2**stage, stride))
                channels = width * 2**stage
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """Features of a batch."""
        maps: Tensor = self.layers(self.stem(x))
        if self.pool == 1:
            return maps.mean(dim=(2, 3))
        return F.adaptive_avg_pool2d(maps, self.pool).flatten(1)


class Encoder(nn.Module):
    """A backbone behind the normalisation of its data set: pixels in, features h out.

    Maps float [B, C, H, W] from 0 to 1 to [B, ``dim``].
    """

    mean: Tensor
    std: Tensor

    def __init__(self, backbone: nn.Module, mean: Tensor, std: Tensor, size: tuple[int, int]):
        super().__init__()
        self.register_buffer("mean", mean.view(1, -1, 1, 1))
        self.register_buffer("std", std.view(1, -1, 1, 1))
        # Channels last: the 3x3 convolutions of a small ResNet take two thirds of the time on a
        # CPU (512 x 8 x 8 images, width 32), and tensor cores want it too.
        self.backbone = backbone.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.dim = _feature_dim(backbone, mean.numel(), size)

    def forward(self, x: Tensor) -> Tensor:
        """Features of a batch."""
        x = (x - self.mean) / self.std
        features: Tensor = self.backbone(x.contiguous(memory_format=torch.channels_last))
        return features


def build_encoder(config: TrainConfig, mean: Tensor, std: Tensor, size: tuple[int, int]) -> Encoder:
    """The encoder that ``--backbone`` names, with fresh weights.

    Args:
        config: the run; ``backbone`` is resnet, ``timm:NAME`` or ``module:factory``.
        mean: float32 [C], the mean of each channel over the training images.
        std: float32 [C], their standard deviation.
        size: height and width of an image.

    Raises:
        UserError: the backbone is unknown, cannot be imported, or does not give [B, F].
    """
    return Encoder(_backbone(config, mean.numel()), mean, std, size)


def _backbone(config: TrainConfig, channels: int) -> nn.Module:
    name = config.backbone
    if name == "resnet":
        return SmallResNet(
            channels, config.width, config.stages, config.blocks, config.stem_stride, config.pool
        )
    module_name, colon, attribute = name.partition(":")
    if not colon or not attribute:
        raise UserError(f"--backbone must be resnet, timm:NAME or module:factory, got {name}")
    if module_name == "timm":
        try:
            import timm
        except ImportError as error:
            raise UserError(
                f"--backbone {name} needs timm, which is not installed; install timm or use resnet"
            ) from error
        try:
            model: nn.Module = timm.create_model(attribute, in_chans=channels, num_classes=0)
        except (RuntimeError, ValueError) as error:
            raise UserError(f"--backbone {name}: {' '.join(str(error).split())}") from error
        return model
    try:
        factory = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise UserError(f"--backbone {name}: {error}; is its folder on PYTHONPATH?") from error
    backbone = factory(channels)
    if not isinstance(backbone, nn.Module):
        raise UserError(
            f"--backbone {name}: {attribute}(in_channels) must return a torch.nn.Module, "
            f"got {type(backbone).__name__}"
        )
    return backbone


@torch.no_grad()
def _feature_dim(backbone: nn.Module, channels: int, size: tuple[int, int]) -> int:
    training = backbone.training
    backbone.eval()
    try:
        features = backbone(torch.zeros(2, channels, *size))
    except RuntimeError as error:
        raise UserError(
            f"the backbone cannot take images of {channels} x {size[0]} x {size[1]}: "
            f"{str(error).splitlines()[0]}; set --image-size or another backbone"
        ) from error
    backbone.train(training)
    if not isinstance(features, Tensor) or features.ndim != 2 or len(features) != 2:
        shape = list(features.shape) if isinstance(features, Tensor) else type(features).__name__
        raise UserError(f"the backbone must map [B, C, H, W] to [B, F], got {shape} for B = 2")
    return features.shape[1]


def mlp_head(
    in_dim: int,
    hidden: int,
    out_dim: int,
    *,
    layers: int = 2,
    norm: bool = True,
    norm_out: bool = False,
) -> nn.Sequential:
    """The projectors and predictors of the papers: linear layers with ReLU between them.

    Args:
        in_dim: width of the input.
        hidden: width between layers.
        out_dim: width of the output.
        layers: how many linear layers; 1 is a linear head.
        norm: batch norm before each ReLU.
        norm_out: batch norm without scale and shift at the end.
    """
    steps: list[nn.Module] = []
    for _ in range(layers - 1):
        steps.append(nn.Linear(in_dim, hidden, bias=not norm))
        if norm:
            steps.append(nn.BatchNorm1d(hidden))
        steps.append(nn.ReLU(inplace=True))
        in_dim = hidden
    steps.append(nn.Linear(in_dim, out_dim, bias=not norm_out))
    if norm_out:
        steps.append(nn.BatchNorm1d(out_dim, affine=False))
    return nn.Sequential(*steps)


class Network(nn.Module):
    """Encoder and projector: pixels [B, C, H, W] to projections z [B, D]."""

    def __init__(self, encoder: Encoder, projector: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.projector = projector

    def forward(self, x: Tensor) -> Tensor:
        """Projections of a batch."""
        z: Tensor = self.projector(self.encoder(x))
        return z
