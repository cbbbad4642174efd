# SPDX-License-Identifier: Apache-2.0
"""The random views of a batch, drawn by kornia on the device of the batch."""

from __future__ import annotations

import dataclasses
import warnings

import torch
from torch import Tensor, nn

from ssltrain.config import TrainConfig

with warnings.catch_warnings():  # kornia's import touches deprecated names of torch
    warnings.simplefilter("ignore", DeprecationWarning)
    import kornia.augmentation as K


class TwoViews(nn.Module):
    """Two augmentations of each image of a batch, and the small crops of multi-crop.

    Randomness comes from torch's global generator alone, so its state is all that a checkpoint
    needs to continue the same stream of views.
    """

    def __init__(self, config: TrainConfig, channels: int, size: tuple[int, int]) -> None:
        super().__init__()
        self.transform = nn.Sequential(*_transforms(config, channels, size))
        self.crops = config.crops
        if self.crops:
            side = config.crop_size
            small = (side, side) if side else ((size[0] + 1) // 2, (size[1] + 1) // 2)
            area = (min(config.crop_min, config.crop_max), config.crop_max)
            rest = dataclasses.replace(config, crop_min=1.0)
            cut = K.RandomResizedCrop(small, scale=area, cropping_mode="resample", p=1.0)
            self.small = nn.Sequential(cut, *_transforms(rest, channels, small))

    @torch.no_grad()
    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Draw the views.

        Args:
            images: uint8 [B, C, H, W].

        Returns:
            view_1 and view_2, float32 [B, C, H, W] from 0 to 1.
        """
        pixels = images.float() / 255
        # One call for both views: half the overhead, and every image draws its own parameters.
        view_1, view_2 = self.transform(torch.cat([pixels, pixels])).clamp_(0, 1).chunk(2)
        return view_1, view_2

    @torch.no_grad()
    def small_views(self, images: Tensor) -> tuple[Tensor, ...]:
        """The small views of multi-crop.

        Args:
            images: uint8 [B, C, H, W].

        Returns:
            ``--crops`` views, float32 [B, C, S, S] from 0 to 1 each.
        """
        if not self.crops:
            return ()
        pixels = (images.float() / 255).repeat(self.crops, 1, 1, 1)
        return self.small(pixels).clamp_(0, 1).chunk(self.crops)


def _transforms(config: TrainConfig, channels: int, size: tuple[int, int]) -> list[nn.Module]:
    """The transforms that ``config`` turns on, geometry first."""
    c = config
    steps: list[nn.Module] = []
    if c.crop_min < 1:
        # "resample" cuts and scales in one differentiable-free sampling call for the whole batch.
        steps.append(
            K.RandomResizedCrop(size, scale=(c.crop_min, 1.0), cropping_mode="resample", p=1.0)
        )
    if c.flip:
        steps.append(K.RandomHorizontalFlip(p=c.flip))
    if c.rotate or c.translate or c.zoom or c.shear:
        steps.append(
            K.RandomAffine(
                degrees=c.rotate,
                translate=(c.translate, c.translate),
                scale=(1 - c.zoom, 1 + c.zoom),
                shear=c.shear,
                p=1.0,
            )
        )
    if c.elastic:
        steps.append(
            K.RandomElasticTransform(
                kernel_size=(5, 5), sigma=(2.0, 2.0), alpha=(c.elastic, c.elastic), p=1.0
            )
        )
    if c.jitter and channels == 3:
        s = c.jitter  # the proportions of SimCLR: 0.8, 0.8, 0.8 and 0.2 at strength 1
        steps.append(K.ColorJitter(0.8 * s, 0.8 * s, 0.8 * s, min(0.2 * s, 0.5), p=0.8))
    elif c.jitter:
        steps.append(K.RandomBrightness((1 - 0.4 * c.jitter, 1 + 0.4 * c.jitter), p=0.8))
        steps.append(K.RandomContrast((1 - 0.8 * c.jitter, 1 + 0.8 * c.jitter), p=0.8))
    if c.gray and channels == 3:
        steps.append(K.RandomGrayscale(p=c.gray))
    if c.blur:
        kernel = max(3, size[0] // 10 | 1)  # a tenth of the side, odd, as in SimCLR
        steps.append(K.RandomGaussianBlur((kernel, kernel), (0.1, 2.0), p=c.blur))
    if c.noise:
        steps.append(K.RandomGaussianNoise(std=c.noise, p=0.5))
    if c.erase:
        steps.append(K.RandomErasing(scale=(0.02, 0.2), p=c.erase))
    return steps
