# SPDX-License-Identifier: Apache-2.0
"""The two pictures of a run: its loss curve and a map of its embeddings."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ssltrain.config import TITLES, TrainConfig
from ssltrain.data import UNLABELLED, ImageData, Part
from ssltrain.evaluate import SOURCES, Features
from ssltrain.runs import RunFolder

MAP_IMAGES = 2000  # at most this many test images on the map: t-SNE takes seconds for them
MAP_SEED = 0
FEWEST_ON_MAP = 4
# Colours of Paul Tol's qualitative schemes, told apart with any colour vision; the second round has
# other shapes. More classes than these get no legend.
_COLOURS = (
    "#332288",
    "#cc6677",
    "#117733",
    "#88ccee",
    "#ddcc77",
    "#882255",
    "#44aa99",
    "#999933",
    "#aa4499",
    "#222222",
)
CLASS_STYLES = [(colour, marker) for marker in "o^" for colour in _COLOURS]
INK, MUTED = "#222222", "#777777"
BLUE, RED, GREEN = _COLOURS[0], _COLOURS[1], _COLOURS[6]
# A name in a script that the font lacks is drawn as boxes; that is no news to who chose the name.
warnings.filterwarnings("ignore", message=r"Glyph \d+ .* missing from font")


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, in inches."""
    figure = Figure(figsize=(width, height), dpi=150, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)  # draws without a display, whatever backend the user has set
    return figure


def draw_loss(folder: RunFolder, config: TrainConfig, data_name: str) -> None:
    """Draw loss, contrastive accuracy and spread of the features over the epochs: loss.png."""
    rows = folder.read_metrics()
    figure = new_figure(8, 4.2)
    epochs = np.array([int(row["epoch"]) + 1 for row in rows])

    def column(name: str) -> np.ndarray:
        return np.array([float(row[name]) for row in rows])

    left, right = figure.subplots(1, 2)
    panels = [
        (left, "loss", [("loss", "loss", BLUE, "-")]),
        (
            right,
            "accuracies and spread of features",
            [
                ("top1", "view finds its partner (top-1)", BLUE, "-"),
                ("knn", "neighbour has the class (k-NN)", GREEN, ".-"),
                ("feature_std", "spread of features (0 = collapse)", RED, "--"),
            ],
        ),
    ]
    for axes, heading, series in panels:
        axes.set_title(heading, color=INK, fontsize=11)
        for name, title, colour, line in series:
            known = ~np.isnan(column(name))
            if known.any():
                axes.plot(
                    epochs[known],
                    column(name)[known],
                    line,
                    color=colour,
                    lw=1.8,
                    label=title,
                )
        axes.set_xlabel("epoch", color=INK)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        tidy(axes)
    right.set_ylim(0, 1)
    right.legend(frameon=False, loc="best")
    figure.suptitle(f"{TITLES[config.method]} on {plain(data_name)}, seed {config.seed}", color=INK)
    figure.savefig(folder.loss_plot)


def flat_map(features: np.ndarray) -> np.ndarray:
    """Two coordinates an image by t-SNE on cosine distances, float [N, 2].

    Of fewer images than FEWEST_ON_MAP, the first two features.
    """
    from sklearn.manifold import TSNE

    if len(features) < FEWEST_ON_MAP:  # t-SNE needs neighbours
        return features[:, :2] if features.shape[1] > 1 else np.repeat(features, 2, axis=1)
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
    places = {source: flat_map(features[source].test[rows]) for source in SOURCES}
    title = f"{TITLES[config.method]} on {plain(data.name)}: t-SNE of {count_of(len(rows), 'test image')}"
    map_figure(title, places, labels, data.class_names).savefig(folder.map_plot)


def map_figure(
    title: str, places: dict[str, np.ndarray], labels: np.ndarray | None, class_names: list[str]
) -> Figure:
    """One panel a source of features.

    Args:
        title: of the figure.
        places: float [N, 2] by key of SOURCES.
        labels: int64 [N], -1 where there is none, or None.
        class_names: by label.
    """
    figure = new_figure(13, 4.9)
    few = len(class_names) <= len(CLASS_STYLES)
    for axes, (source, heading) in zip(figure.subplots(1, 3), SOURCES.items(), strict=True):
        spots = places[source]
        if labels is None:
            axes.scatter(*spots.T, s=12, color=BLUE, lw=0, alpha=0.8)
        else:
            bare, known = spots[labels == UNLABELLED], labels != UNLABELLED
            if len(bare):
                axes.scatter(*bare.T, s=10, color="#bbbbbb", lw=0, label="unlabelled")
            if few:
                for label, name in enumerate(class_names):
                    colour, marker = CLASS_STYLES[label]
                    chosen = spots[labels == label]
                    axes.scatter(
                        *chosen.T,
                        s=16,
                        color=colour,
                        marker=marker,
                        lw=0,
                        alpha=0.85,
                        label=short(name),
                    )
            else:
                axes.scatter(*spots[known].T, s=12, c=labels[known], cmap="viridis", lw=0)
        axes.set_title(heading, color=INK, fontsize=12)
        axes.set_xticks([])
        axes.set_yticks([])
        axes.set_aspect("equal", adjustable="datalim")
        for spine in axes.spines.values():
            spine.set_color("#cccccc")
    if labels is not None and few:
        handles, names = axes.get_legend_handles_labels()
        figure.legend(
            handles,
            names,
            loc="outside right center",
            frameon=False,
            markerscale=1.8,
            title="class",
        )
    elif labels is not None:
        title += f", coloured by the number of {len(class_names)} classes"
    figure.suptitle(title, color=INK)
    return figure


def plain(text: str) -> str:
    """Text that matplotlib draws as it is: no formulas, no bytes that are no characters."""
    return text.encode("utf-8", "replace").decode().replace("$", r"\$")


def short(name: str, most: int = 18) -> str:
    """A name that leaves room for the picture; matplotlib hides what starts with an underscore."""
    name = plain(name if len(name) <= most else name[: most - 1] + "…")
    return "\u200a" + name if name.startswith("_") else name


def tidy(axes: Any) -> None:
    """A grid, and no frame where there is no scale."""
    axes.grid(color="#e5e5e5", lw=0.8)
    axes.tick_params(colors=MUTED)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def spread_rows(part: Part, count: int) -> np.ndarray:
    """At most ``count`` row numbers, of every class in turn where there are labels, int64."""
    if part.labels is None or not len(part.labelled):
        return np.unique(np.linspace(0, len(part) - 1, min(count, len(part))).round().astype(int))
    members = [
        np.flatnonzero(part.labels == label) for label in np.unique(part.labels[part.labelled])
    ]
    turns = [
        rows[turn] for turn in range(max(map(len, members))) for rows in members if turn < len(rows)
    ]
    return np.array(turns[:count])


def draw_confusion(
    folder: RunFolder, config: TrainConfig, data_name: str, results: dict[str, Any]
) -> None:
    """Draw the confusion matrix of the linear probe: confusion.png."""
    counts, names = np.array(results["confusion"]), results["class_names"]
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    side = 2.6 + 0.42 * min(len(names), 24)
    figure = new_figure(side + 1.2, side)
    axes = figure.subplots()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set_title(
        f"{TITLES[config.method]} on {plain(data_name)}: linear probe", color=INK, fontsize=11
    )
    axes.set_xlabel("taken for", color=INK)
    axes.set_ylabel("is", color=INK)
    ticks = range(len(names)) if len(names) <= 40 else []
    labels = [short(name) for name in names] if ticks else []
    long = max(map(len, names)) > 3
    slant: dict[str, Any] = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"}
    axes.set_xticks(ticks, labels, fontsize=8, **(slant if long else {}))
    axes.set_yticks(ticks, labels, fontsize=8)
    if len(names) <= 24:
        for row, column in np.argwhere(counts):
            colour = "white" if shares[row, column] > 0.5 else INK
            axes.text(
                column, row, counts[row, column], ha="center", va="center", color=colour, fontsize=8
            )
    figure.colorbar(image, ax=axes, label="share of the images of a class", shrink=0.85)
    figure.savefig(folder.confusion_plot)


def count_of(count: int, noun: str) -> str:
    """``1 image``, ``2 images``."""
    return f"{count} {noun}{'' if count == 1 else 's'}"
