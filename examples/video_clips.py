# SPDX-License-Identifier: Apache-2.0
"""Video: two clips of one video are views of each other, clips of other videos are negatives.

    python examples/video_clips.py

The videos are made here: a blob that moves along a line, circles, or swings, with a random place, speed
and phase. A clip is eight frames from a random moment on; the network is a small 3-D CNN, the loss InfoNCE
with a queue (MoCo), as a batch holds few videos. What to expect: the loss rises while the queue fills with
negatives, then falls; the nearest of 512 clips shows the same kind of motion by 32 features nearly as often
(0.98) as by all 2048 pixels (0.99), which have the brightness and place of the blob in them too.
"""

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sslkernels

FRAMES, CLIP, SIDE = 24, 8, 16


def videos(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """[B, 1, FRAMES, SIDE, SIDE] and the kind of motion [B]: 0 straight, 1 circle, 2 swing."""
    kind = torch.randint(3, (count,), generator=generator)
    uniform = lambda low, high: low + (high - low) * torch.rand(count, 1, generator=generator)  # noqa: E731
    phase, speed, turn = uniform(0, 6.3), uniform(0.25, 0.5), uniform(0, 6.3)
    angle = phase + speed * torch.arange(FRAMES)
    along = torch.stack([
        0.15 * (angle - phase) - 0.5,  # straight
        0.5 * angle.cos(),  # circle
        0.6 * (1.5 * angle).sin(),  # swing
    ])  # fmt: skip
    across = torch.stack([torch.zeros_like(angle), 0.5 * angle.sin(), torch.zeros_like(angle)])
    chosen = torch.arange(count)
    a, b = along[kind, chosen], across[kind, chosen]
    x, y = a * turn.cos() - b * turn.sin(), a * turn.sin() + b * turn.cos()
    line = torch.linspace(-1, 1, SIDE)
    gap = (line - x[..., None, None]) ** 2 + (line[:, None] - y[..., None, None]) ** 2
    return torch.exp(-gap / 0.03)[:, None], kind


def clips(batch: Tensor, generator: torch.Generator) -> Tensor:
    """A clip of each video from a random moment on, brighter or darker, with noise."""
    begin = torch.randint(FRAMES - CLIP + 1, (len(batch),), generator=generator).tolist()
    cut = torch.stack([v[:, t : t + CLIP] for v, t in zip(batch, begin, strict=True)])
    gain = 0.7 + 0.6 * torch.rand(len(cut), 1, 1, 1, 1, generator=generator)
    return cut * gain + 0.05 * torch.randn(cut.shape, generator=generator)


def make_encoder(dim: int) -> nn.Module:
    """[B, 1, CLIP, SIDE, SIDE] to [B, dim]."""
    return nn.Sequential(
        nn.Conv3d(1, 16, (3, 5, 5), (1, 2, 2), padding=(1, 2, 2)), nn.BatchNorm3d(16), nn.ReLU(),
        nn.Conv3d(16, 32, 3, 2, padding=1), nn.BatchNorm3d(32), nn.ReLU(),
        nn.Conv3d(32, 64, 3, 2, padding=1), nn.BatchNorm3d(64), nn.ReLU(),
        nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(64, dim),
    )  # fmt: skip


def same_kind(features: Tensor, kind: Tensor) -> float:
    """How often the nearest other clip shows the same kind of motion."""
    unit = F.normalize(features.flatten(1))
    similarity = (unit @ unit.T).fill_diagonal_(-2)
    return (kind[similarity.argmax(1)] == kind).float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--videos", type=int, default=64, help="a step")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--dim", type=int, default=32)
    parser.add_argument("--queue", type=int, default=1024, help="keys of earlier steps")
    options = parser.parse_args()
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    online = make_encoder(options.dim)
    target = sslkernels.EMA(online, decay=0.95)
    criterion = sslkernels.MoCoLoss(options.queue, options.dim, temperature=0.2)
    optimizer = torch.optim.AdamW(online.parameters(), lr=2e-3)
    for step in range(options.steps):
        batch, _ = videos(options.videos, generator)
        query = online(clips(batch, generator))
        with torch.no_grad():
            key = target(clips(batch, generator))
        loss = criterion(query, key)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        target.update(online)
        if step % max(1, options.steps // 6) == 0 or step == options.steps - 1:
            queue = len(criterion.queue)
            print(f"step {step + 1}: loss {loss.item():.3f}, {queue} keys", flush=True)
    batch, kind = videos(8 * options.videos, generator)
    seen = clips(batch, generator)
    with torch.no_grad():
        features = online.eval()(seen)
    by_pixels, by_features = same_kind(seen, kind), same_kind(features, kind)
    print(
        f"nearest clip has the same motion: {by_pixels:.3f} by pixels, {by_features:.3f} by features"
    )


if __name__ == "__main__":
    main()
