# SPDX-License-Identifier: Apache-2.0
"""The two pictures of a run: its loss curve and a map of its embeddings."""

from __future__ import annotations

import numpy as np
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ssltrain.config import TITLES, TrainConfig
from ssltrain.data import ImageData
from ssltrain.evaluate import SOURCES, Features
from ssltrain.runs import RunFolder

MAP_IMAGES = 2000  # at most this many test images on the map: t-SNE takes seconds for them
MAP_SEED = 0
LEGEND_CLASSES = 20  # more classes than this get no legend
INK, MUTED, BLUE, ORANGE = "#222222", "#777777", "#2563a8", "#d9772b"


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), dpi=150, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)  # draws without a display, whatever backend the user has set
    return figure


def draw_loss(folder: RunFolder, config: TrainConfig) -> None:
    """Draw loss, contrastive accuracy and spread of the features over the epochs: loss.png."""
    rows = folder.read_metrics()
    figure = _figure(8, 4.2)
    epochs = np.array([int(row["epoch"]) + 1 for row in rows])

    def column(name: str) -> np.ndarray:
        return np.array([float(row[name]) for row in rows])

    left, right = figure.subplots(1, 2)
    panels = [
        (left, "loss", [("loss", "loss", BLUE)]),
        (
            right,
            "contrastive accuracy and spread of features",
            [
                ("top1", "view finds its partner (top-1)", BLUE),
                ("feature_std", "spread of features (0 = collapse)", ORANGE),
            ],
        ),
    ]
    for axes, heading, series in panels:
        axes.set_title(heading, color=INK, fontsize=11)
        for name, title, colour in series:
            axes.plot(epochs, column(name), color=colour, lw=1.8, label=title)
        axes.set_xlabel("epoch", color=INK)
        axes.grid(color="#e5e5e5", lw=0.8)
        axes.tick_params(colors=MUTED)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    right.set_ylim(0, 1)
    right.legend(frameon=False, loc="upper left")
    figure.suptitle(f"{TITLES[config.method]} on {config.data}, seed {config.seed}", color=INK)
    figure.savefig(folder.loss_plot)


def flat_map(features: np.ndarray) -> np.ndarray:
    """Two coordinates an image by t-SNE on cosine distances, float [N, 2]."""
    from sklearn.manifold import TSNE

    perplexity = min(30.0, max(1.0, (len(features) - 1) / 3))
    places: np.ndarray = TSNE(
        perplexity=perplexity, metric="cosine", init="random", random_state=MAP_SEED
    ).fit_transform(features)
    return places


def draw_map(
    folder: RunFolder, config: TrainConfig, data: ImageData, features: dict[str, Features]
) -> None:
    """Draw maps of the test images by pixels, untrained and trained features: embeddings.png."""
    count = len(data.test)
    rows = np.arange(count)
    if count > MAP_IMAGES:
        rows = np.sort(np.random.default_rng(MAP_SEED).choice(count, MAP_IMAGES, replace=False))
    labels = None if data.test.labels is None else data.test.labels[rows]
    figure = _figure(13, 4.9)
    palette = colormaps["tab10" if len(data.class_names) <= 10 else "tab20"]
    for axes, (source, title) in zip(figure.subplots(1, 3), SOURCES.items(), strict=True):
        places = flat_map(features[source].test[rows])
        if labels is None:
            axes.scatter(*places.T, s=12, color=BLUE, lw=0, alpha=0.8)
        else:
            for label, name in enumerate(data.class_names):
                chosen = places[labels == label]
                colour = palette(label % palette.N)
                axes.scatter(*chosen.T, s=14, color=colour, lw=0, alpha=0.85, label=name)
        axes.set_title(title, color=INK, fontsize=12)
        axes.set_xticks([])
        axes.set_yticks([])
        axes.set_aspect("equal", adjustable="datalim")
        for spine in axes.spines.values():
            spine.set_color("#cccccc")
    if labels is not None and len(data.class_names) <= LEGEND_CLASSES:
        handles, names = axes.get_legend_handles_labels()
        figure.legend(
            handles, names, loc="outside right center", frameon=False, markerscale=2, title="class"
        )
    figure.suptitle(
        f"{TITLES[config.method]} on {config.data}: t-SNE of {len(rows)} test images",
        color=INK,
    )
    figure.savefig(folder.map_plot)
