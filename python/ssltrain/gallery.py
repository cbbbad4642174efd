# SPDX-License-Identifier: Apache-2.0
"""A page of test images and the training images that the encoder finds nearest to them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from ssltrain.config import TITLES, TrainConfig
from ssltrain.data import UNLABELLED, ImageData, Part, Subset
from ssltrain.evaluate import embed
from ssltrain.models import Encoder
from ssltrain.neighbours import nearest
from ssltrain.plots import INK, MUTED, RED, new_figure, plain, short, spread_rows


def draw_neighbours(
    out: Path,
    config: TrainConfig,
    data: ImageData,
    encoder: Encoder,
    device: torch.device,
    queries: int,
    count: int,
) -> None:
    """Draw the page.

    Args:
        out: the picture.
        config: the run.
        data: queries are of its test part, neighbours of its training part.
        encoder: gives the features.
        device: where it runs.
        queries: how many test images, one a line.
        count: neighbours of each.
    """
    rows = spread_rows(data.test, queries)
    chosen = torch.from_numpy(rows)
    h_test = torch.from_numpy(embed(encoder, Subset(data.test.images, chosen), device))
    h_train = torch.from_numpy(embed(encoder, data.train.images, device))
    count = min(count, len(h_train))
    similarities, found = nearest(h_test, h_train, count)
    figure = new_figure(1.15 * (count + 1) + 0.4, 1.42 * len(rows) + 0.7)
    panels = figure.subplots(len(rows), count + 1, squeeze=False)
    for line, row in enumerate(rows.tolist()):
        own = _class(data, data.test, row)
        show(panels[line, 0], data.test, row, f"test: {own}" if own else "test", INK)
        for place in range(count):
            other = int(found[line, place])
            name = _class(data, data.train, other)
            wrong = bool(own) and bool(name) and name != own
            text = f"{similarities[line, place]:.2f}" + (f"  {name}" if wrong else "")
            show(panels[line, place + 1], data.train, other, text, RED if wrong else MUTED)
    with_labels = data.test.labels is not None and data.train.labels is not None
    figure.suptitle(
        f"{TITLES[config.method]} on {plain(data.name)}: a test image, and the training images "
        "nearest to it by cosine similarity"
        + ("\nanother class is named, and framed in red" if with_labels else ""),
        color=INK,
        fontsize=10,
    )
    figure.savefig(out)


def _class(data: ImageData, part: Part, row: int) -> str:
    label = UNLABELLED if part.labels is None else int(part.labels[row])
    return "" if label == UNLABELLED else short(data.class_names[label], 11)


def show(
    axes: object, part: Part, row: int, text: str, colour: str, framed: bool | None = None
) -> None:
    """An image with a title, framed where asked (without a word: where its colour is red)."""
    image = part.images.read(torch.tensor([row]))[0].permute(1, 2, 0).numpy()
    pixels = np.repeat(image, 3, axis=2) if image.shape[2] == 1 else image
    axes.imshow(pixels, interpolation="nearest")  # type: ignore[attr-defined]
    axes.set_xticks([])  # type: ignore[attr-defined]
    axes.set_yticks([])  # type: ignore[attr-defined]
    axes.set_title(text, fontsize=8, color=colour, pad=3)  # type: ignore[attr-defined]
    for spine in axes.spines.values():  # type: ignore[attr-defined]
        spine.set_color(colour)
        spine.set_linewidth(2.2 if (colour == RED if framed is None else framed) else 0.8)
