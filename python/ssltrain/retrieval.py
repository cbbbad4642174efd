# SPDX-License-Identifier: Apache-2.0
"""How well ``ssltrain clip`` finds the caption of an image that it never saw, and the other way round."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ssltrain.config import TITLES, TrainConfig
from ssltrain.data import ImageData, check_captions
from ssltrain.evaluate import trained_statistics
from ssltrain.gallery import show
from ssltrain.methods import build_method, online_weights
from ssltrain.parallel import World
from ssltrain.plots import GREEN, INK, MUTED, new_figure, plain, short, spread_rows
from ssltrain.runs import RunFolder, replaced
from ssltrain.text import tokenize
from ssltrain.trainer import fresh_encoder

BATCH = 256
DIRECTIONS = {"text": "images to captions", "image": "captions to images"}
QUERIES, SHOWN = 8, 6


@torch.no_grad()
def embed_pairs(
    state: dict[str, Any], config: TrainConfig, data: ImageData, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Unit projections [N, D] of the test images of a run, and of their captions."""
    captions = check_captions(data.test, data.name)
    weights = online_weights(state["method"])
    encoder = fresh_encoder(config, data, trained_statistics(weights, data))
    method = build_method(config, encoder, World(0, 1, device), 1)
    method.load_state_dict(state["method"])
    method.eval()
    towers: Any = method.online
    images, texts = [], []
    tokens = tokenize(captions)
    for rows in torch.arange(len(data.test)).split(BATCH):
        pixels = data.test.images.read(rows).to(device).float() / 255
        images.append(towers.network(pixels))
        texts.append(towers.text(tokens[rows].to(device)))
    return F.normalize(torch.cat(images).cpu()), F.normalize(torch.cat(texts).cpu())


def ranks(queries: Tensor, keys: Tensor) -> Tensor:
    """How many keys are more similar to query i than key i is, int64 [N]; in chunks of rows."""
    found = []
    for rows in torch.arange(len(queries)).split(BATCH):
        similarity = queries[rows] @ keys.T
        found.append((similarity > similarity.gather(1, rows[:, None])).sum(1))
    return torch.cat(found)


def scores(images: Tensor, captions: Tensor) -> dict[str, Any]:
    """Recall at 1, 5 and 10 and the median rank, of both directions, and those of chance."""
    count = len(images)
    found: dict[str, Any] = {"pairs": count}
    for key, ahead in (("text", ranks(images, captions)), ("image", ranks(captions, images))):
        found[key] = {f"recall@{k}": (ahead < k).double().mean().item() for k in (1, 5, 10)}
        found[key]["median rank"] = float(ahead.double().median()) + 1
    found["chance"] = {f"recall@{k}": min(1.0, k / count) for k in (1, 5, 10)}
    found["chance"]["median rank"] = (count + 1) / 2
    return found


def table(found: dict[str, Any]) -> str:
    """The scores as a table of text."""
    names = ("recall@1", "recall@5", "recall@10", "median rank")
    lines = [f"{found['pairs']:,} held-out pairs    " + "".join(f"{name:>13}" for name in names)]
    for key, title in {**DIRECTIONS, "chance": "chance"}.items():
        *recalls, median = (found[key][name] for name in names)
        lines.append(f"{title:<24}" + "".join(f"{r:>13.1%}" for r in recalls) + f"{median:>13.0f}")
    return "\n".join(lines)


def evaluate_pairs(
    folder: RunFolder,
    state: dict[str, Any],
    config: TrainConfig,
    data: ImageData,
    device: torch.device,
) -> list[Path]:
    """Score the pairs, print them, and write ``retrieval.json`` and a picture; returns both."""
    images, captions = embed_pairs(state, config, data, device)
    found = scores(images, captions)
    print(table(found))
    with replaced(folder.retrieval) as file:
        file.write(json.dumps(found, indent=2).encode() + b"\n")
    _draw(folder.retrieval_plot, config, data, captions @ images.T)
    return [folder.retrieval, folder.retrieval_plot]


def _draw(out: Path, config: TrainConfig, data: ImageData, similarity: Tensor) -> None:
    """Captions and the images that come first for each, its own framed."""
    rows = spread_rows(data.test, QUERIES)
    count = min(SHOWN, len(data.test))
    figure = new_figure(1.15 * count + 3.0, 1.3 * len(rows) + 0.7)
    panels = figure.subplots(
        len(rows), count + 1, squeeze=False, width_ratios=[2.4, *[1.0] * count]
    )
    captions = data.test.captions or []
    for line, row in enumerate(rows.tolist()):
        panels[line, 0].axis("off")
        text = textwrap.fill(short(captions[row], 75), 26)
        panels[line, 0].text(1.0, 0.5, text, ha="right", va="center", fontsize=9, color=INK)
        best = similarity[row].topk(count)
        for place, other in enumerate(best.indices.tolist()):
            own = other == row
            title = f"{best.values[place]:.2f}"
            show(panels[line, place + 1], data.test, other, title, GREEN if own else MUTED, own)
    figure.suptitle(
        f"{TITLES[config.method]} on {plain(data.name)}: held-out captions, and the held-out images "
        "most similar to each\nthe image that the caption is of is framed",
        color=INK,
        fontsize=10,
    )
    figure.savefig(out)
