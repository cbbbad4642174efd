# SPDX-License-Identifier: Apache-2.0
"""Segmentation: NT-Xent over the embeddings of single pixels, tens of thousands of rows in one loss.

    python examples/dense_nt_xent.py

A fully convolutional network gives every pixel an embedding. Two views of an image differ in colour and
noise, not in geometry, so pixel (i, j) of one is the positive of pixel (i, j) of the other, and all other
pixels of the batch are negatives. 16 images of 32 x 32 are 2 x 16384 rows: a matrix of their similarities
would take 4 GiB in float32, the loss here takes O(N D). What to expect: the loss begins near log(32767),
10.4, and falls, and more and more pixels find their partner among all rows.
"""

import argparse
import time

import torch
from torch import Tensor, nn

import sslkernels


def scenes(count: int, side: int, generator: torch.Generator) -> Tensor:
    """Images [B, 3, S, S] of a striped disk and a plain square on a ground."""
    line = torch.linspace(-1, 1, side)
    y, x = torch.meshgrid(line, line, indexing="ij")
    images = []
    for _ in range(count):
        (a, b), (c, d) = ((torch.rand(2, 2, generator=generator) - 0.5) * 1.2).tolist()
        colours = torch.rand(3, 3, generator=generator)
        square = ((x - a).abs() < 0.35) & ((y - b).abs() < 0.35)
        disk = (x - c) ** 2 + (y - d) ** 2 < 0.16
        image = colours[torch.where(disk, 2, square.long())].permute(2, 0, 1)
        images.append(image + 0.25 * disk * torch.sin(20 * x))
    return torch.stack(images)


def view(images: Tensor, generator: torch.Generator) -> Tensor:
    """Brightness, colour and noise: pixels stay where they are."""
    shape = (len(images), 3, 1, 1)
    gain = 0.8 + 0.4 * torch.rand(shape, generator=generator)
    shift = 0.1 * torch.randn(shape, generator=generator)
    return images * gain + shift + 0.05 * torch.randn(images.shape, generator=generator)


def pixels(maps: Tensor) -> Tensor:
    """[B, D, H, W] to rows [B * H * W, D]."""
    return maps.permute(0, 2, 3, 1).flatten(0, 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=16, help="images a step")
    parser.add_argument("--side", type=int, default=32, help="pixels a side")
    parser.add_argument("--dim", type=int, default=32, help="width of an embedding")
    parser.add_argument("--steps", type=int, default=10)
    options = parser.parse_args()
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 32, 5, padding=2), nn.ReLU(),
        nn.Conv2d(32, 32, 5, padding=2), nn.ReLU(),
        nn.Conv2d(32, options.dim, 1),
    )  # fmt: skip
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    rows = 2 * options.images * options.side**2
    print(f"{rows} rows; a matrix of their similarities would take {rows**2 * 4 / 2**30:.2f} GiB")
    for step in range(options.steps):
        started = time.perf_counter()
        images = scenes(options.images, options.side, generator)
        z1, z2 = (pixels(network(view(images, generator))) for _ in range(2))
        loss, metrics = sslkernels.nt_xent_loss(z1, z2, 0.2, return_metrics=True)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seconds = time.perf_counter() - started
        found = metrics.top1.item()
        print(
            f"step {step + 1}: loss {loss.item():.4f}, {found:.4f} found, {seconds:.2f} s",
            flush=True,
        )


if __name__ == "__main__":
    main()
