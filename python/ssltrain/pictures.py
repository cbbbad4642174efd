# SPDX-License-Identifier: Apache-2.0
"""What a run of a generative method made: samples.png, and the bound of a variational autoencoder."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ssltrain.config import TITLES, TrainConfig
from ssltrain.data import ImageData
from ssltrain.evaluate import raw_pixels, trained_encoder
from ssltrain.methods import VAE, Generates, build_method, named_for
from ssltrain.parallel import World
from ssltrain.plots import INK, new_figure, plain
from ssltrain.runs import RunFolder, random_state, replaced, seed_everything, set_random_state

SHOWN = 16  # images a row
SEED = 3  # of what is drawn
ELBO_SEEDS = 8  # samples of the codes that the bound is averaged over
ELBO_IMAGES = 512  # at a time


def trained_method(
    state: dict[str, Any], config: TrainConfig, data: ImageData, device: torch.device
) -> Generates:
    """The method in a checkpoint, in evaluation mode."""
    encoder = trained_encoder(state, config, data)
    method = build_method(config, encoder, World(0, 1, device), 1, data.size)
    method.load_state_dict(named_for(1, state["method"]))
    if not isinstance(method, Generates):
        raise TypeError(f"{config.method} makes no images")
    return method.eval()


def evaluate_images(
    folder: RunFolder,
    state: dict[str, Any],
    config: TrainConfig,
    data: ImageData,
    device: torch.device,
) -> list[Path]:
    """Draw samples.png; of a variational autoencoder add the bound to results.json.

    Generators are left as they were.
    """
    before = random_state(device)
    seed_everything(SEED)
    try:
        method = trained_method(state, config, data, device)
        rows = torch.linspace(0, len(data.test) - 1, min(SHOWN, len(data.test))).round().long()
        images = data.test.images.read(rows).to(device).float() / 255
        out = folder.path / "samples.png"
        _draw(out, config, data, method.pictures(images))
        if isinstance(method, VAE):
            _add(folder, {"nats": bound(method, data, device)})
    finally:
        set_random_state(before, device)
    return [out]


def _draw(out: Path, config: TrainConfig, data: ImageData, rows: list[tuple[str, Tensor]]) -> None:
    count = len(rows[0][1])
    figure = new_figure(0.55 * count + 0.3, 0.62 * len(rows) + 0.7)
    panels = figure.subplots(len(rows), count, squeeze=False)
    for line, (title, images) in enumerate(rows):
        pixels = images.clamp(0, 1).permute(0, 2, 3, 1).cpu().numpy()
        for place in range(count):
            axes = panels[line, place]
            picture = pixels[place]
            picture = np.repeat(picture, 3, axis=2) if picture.shape[2] == 1 else picture
            axes.imshow(picture, interpolation="nearest")
            axes.set_axis_off()
        if line == 0 or rows[line - 1][0] != title:
            panels[line, 0].set_title(title, fontsize=8, color=INK, loc="left", pad=3)
    figure.suptitle(f"{TITLES[config.method]} on {plain(data.name)}", color=INK, fontsize=10)
    figure.savefig(out)


# ---- nats ------------------------------------------------------------------------------------------


@torch.no_grad()
def bound(method: VAE, data: ImageData, device: torch.device) -> dict[str, float]:
    """Log-likelihood of a test image in nats: the bound, and two normal models with one noise variance.

    "normal" is the mean image with one variance; "ppca" the linear model with as many codes,
    probabilistic principal components (Tipping and Bishop 1999), at its maximum of likelihood.
    """
    total, count = 0.0, 0
    for rows in torch.arange(len(data.test)).split(ELBO_IMAGES):
        x = data.test.images.read(rows).to(device).float() / 255
        for _ in range(ELBO_SEEDS):
            total -= float(method.negative_elbo(x, 1.0, reduction="sum")[0])
        count += ELBO_SEEDS * len(x)
    train, test = raw_pixels(data.train.images), raw_pixels(data.test.images)
    codes = method.config.projector_dim
    return {
        "elbo": total / max(1, count),
        "ppca": normal_likelihood(train, test, codes),
        "normal": normal_likelihood(train, test, 0),
    }


def normal_likelihood(train: np.ndarray, test: np.ndarray, codes: int) -> float:
    """Mean log-likelihood of the rows of ``test`` by principal components and one noise variance."""
    mean = train.mean(0, dtype=np.float64)
    size = train.shape[1]
    codes = min(codes, size - 1)
    values, vectors = np.linalg.eigh(np.cov(train.T.astype(np.float64), bias=True))
    values, vectors = values[::-1], vectors[:, ::-1]
    noise = max(float(values[codes:].mean()), 1e-12)
    kept = np.maximum(values[:codes], noise)
    gap = test - mean
    along = (gap @ vectors[:, :codes]) ** 2
    rest = (gap**2).sum(1) - along.sum(1)
    distance = (along / kept).sum(1) + rest / noise
    volume = float(np.log(kept).sum()) + (size - codes) * math.log(noise)
    return float(-0.5 * (distance.mean() + volume + size * math.log(2 * math.pi)))


def _add(folder: RunFolder, more: dict[str, Any]) -> None:
    """Put figures into results.json, and print them."""
    results = json.loads(folder.results.read_text()) if folder.results.is_file() else {}
    with replaced(folder.results) as file:
        file.write(json.dumps(results | more, indent=2).encode() + b"\n")
    nats = more["nats"]
    print(
        f"log-likelihood of a test image in nats: at least {nats['elbo']:.1f}; principal components "
        f"with noise {nats['ppca']:.1f}; the mean image with noise {nats['normal']:.1f}"
    )
