# SPDX-License-Identifier: Apache-2.0
"""Several runs side by side: one table, one picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.ticker import MaxNLocator

from ssltrain.config import TITLES, TrainConfig
from ssltrain.errors import UserError
from ssltrain.plots import CLASS_STYLES, INK, new_figure, plain, tidy
from ssltrain.runs import RunFolder

LINES = ("-", "--", "-.", ":")


def comparison(folders: list[RunFolder]) -> str:
    """A table of the runs: settings that differ first, then time and accuracies."""
    head = [
        "run",
        "method",
        "epochs",
        "batch",
        "loss",
        "time",
        "images/s",
        "k-NN",
        "linear",
        "10 labels",
    ]
    table = [head]
    for name, folder in _named(folders):
        config, rows = TrainConfig.load(folder.config), folder.read_metrics()
        scores = _scores(folder)
        seconds = sum(float(row["seconds"]) for row in rows)
        speed = np.median([float(row["images_per_s"]) for row in rows]) if rows else float("nan")
        table.append(
            [
                name,
                TITLES[config.method],
                f"{len(rows)} of {config.epochs}",
                str(config.batch_size),
                f"{float(rows[-1]['loss']):.3f}" if rows else "-",
                f"{seconds:,.0f} s",
                f"{speed:,.0f}",
                *(
                    f"{scores[key]:.4f}" if scores else "-"
                    for key in ("knn", "linear", "linear_few")
                ),
            ]
        )
    widths = [max(len(row[i]) for row in table) for i in range(len(head))]
    lines = [
        "  ".join(
            cell.ljust(w) if i < 2 else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in table
    ]
    differing = _differing(folders)
    if differing:
        lines += ["", "settings that differ:"]
        for key, values in differing.items():
            lines.append(f"  {key}: " + ", ".join(str(value) for value in values))
    return "\n".join(lines)


def _named(folders: list[RunFolder]) -> list[tuple[str, RunFolder]]:
    """Each run with the last part of its path, or as much of it as tells them apart."""
    paths = [folder.path.absolute() for folder in folders]
    for depth in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-depth:]) for path in paths]
        if len(set(names)) == len(set(paths)):
            break
    return list(zip(names, folders, strict=True))


def _scores(folder: RunFolder) -> dict[str, float] | None:
    """The accuracies of the trained encoder, or None if it was not evaluated."""
    if not folder.results.is_file():
        return None
    scores: dict[str, float] = json.loads(folder.results.read_text())["accuracy"]["trained"]
    return scores


def _differing(folders: list[RunFolder]) -> dict[str, list[Any]]:
    configs = [vars(TrainConfig.load(folder.config)) for folder in folders]
    return {
        key: [config[key] for config in configs]
        for key in configs[0]
        if key != "run" and len({repr(config[key]) for config in configs}) > 1
    }


def draw_comparison(out: Path, folders: list[RunFolder]) -> None:
    """Draw loss and k-NN by epoch, and the loss by time."""
    panels = [
        ("loss by epoch", "epoch", "loss"),
        ("loss by time of training", "seconds", "loss"),
        ("k-NN accuracy on training images", "epoch", "knn"),
    ]
    runs = [(name, _columns(folder)) for name, folder in _named(folders)]
    drawn = [p for p in panels if any(np.isfinite(columns[p[2]]).any() for _, columns in runs)]
    if not drawn:
        raise UserError("no epoch of these runs has ended yet: there is nothing to draw")
    figure = new_figure(4.4 * len(drawn), 4.2)
    for axes, (heading, across, up) in zip(
        figure.subplots(1, len(drawn), squeeze=False)[0], drawn, strict=True
    ):
        for number, (name, columns) in enumerate(runs):
            known = np.isfinite(columns[up])
            colour, _ = CLASS_STYLES[number % 10]
            axes.plot(
                columns[across][known],
                columns[up][known],
                color=colour,
                lw=1.8,
                ls=LINES[number % 4],
                label=plain(name),
            )
        axes.set_title(heading, color=INK, fontsize=11)
        axes.set_xlabel(across, color=INK)
        if across == "epoch":
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        tidy(axes)
    handles, labels = axes.get_legend_handles_labels()
    columns_of_legend = max(1, min(4, 110 // (max(map(len, labels)) + 6)))
    figure.legend(
        handles, labels, loc="outside lower center", ncols=columns_of_legend, frameon=False
    )
    figure.savefig(out)


def _columns(folder: RunFolder) -> dict[str, np.ndarray]:
    """Epochs from 1, seconds since the start, loss and k-NN of a run."""
    rows = folder.read_metrics()
    names = ("epoch", "seconds", "loss", "knn")
    found = {name: np.array([float(row[name]) for row in rows]) for name in names}
    return found | {"epoch": found["epoch"] + 1, "seconds": np.cumsum(found["seconds"])}
