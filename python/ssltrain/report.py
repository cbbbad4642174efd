# SPDX-License-Identifier: Apache-2.0
"""One HTML page with everything about a run; pictures are in it, so it can be sent as it is."""

from __future__ import annotations

import base64
import json
from html import escape
from pathlib import Path
from typing import Any

from ssltrain.config import TITLES, TrainConfig
from ssltrain.evaluate import SOURCES
from ssltrain.runs import METRICS, RunFolder, replaced

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 62rem; margin: 2rem auto;
       padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .8rem; border-bottom: 1px solid #ddd; text-align: right; }
th:first-child, td:first-child { text-align: left; }
img { max-width: 100%; height: auto; } .wide { overflow-x: auto; }
details { margin: .6rem 0; } summary { cursor: pointer; color: #2563a8; }
td.text { text-align: left; font-family: ui-monospace, monospace; font-size: .85rem;
          overflow-wrap: anywhere; }
"""


def write_report(folder: RunFolder) -> Path:
    """Write ``report.html`` in the folder of a run, from what lies there.

    Returns:
        Its path.
    """
    config = TrainConfig.load(folder.config)
    rows = folder.read_metrics()
    title = f"{TITLES[config.method]} on {Path(config.data.split(':')[-1]).stem}"
    parts = [
        f"<h1>{escape(title)}, seed {config.seed}</h1>",
        _summary(config, rows),
        _accuracies(folder),
    ]
    for heading, path, text in (
        ("Training", folder.loss_plot, "loss, contrastive accuracy and spread by epoch"),
        ("Captions and images", folder.retrieval_plot, "held-out captions and the images found"),
        ("Map of the test images", folder.map_plot, "t-SNE of pixels, untrained, trained"),
        ("Mix-ups", folder.confusion_plot, "confusion matrix of the linear probe"),
        ("Neighbours", folder.neighbors_plot, "test images and the nearest training images"),
    ):
        if path.is_file():
            parts.append(f"<h2>{heading}</h2>{_picture(path, text)}")
    parts += [_metrics(rows), _settings(config), _environment(folder)]
    page = (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{STYLE}</style></head>\n<body>\n" + "\n".join(filter(None, parts))
    )
    with replaced(folder.report) as file:
        file.write((page + "\n</body></html>\n").encode("utf-8", "replace"))
    return folder.report


def _table(head: list[str], body: list[list[str]], text: bool = False) -> str:
    kind = ' class="text"' if text else ""
    rows = "".join(
        f"<tr><td>{escape(row[0])}</td>"
        + "".join(f"<td{kind}>{escape(cell)}</td>" for cell in row[1:])
        + "</tr>"
        for row in body
    )
    titles = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    return f'<div class="wide"><table><tr>{titles}</tr>{rows}</table></div>'


def _picture(path: Path, text: str) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<img alt="{escape(text)}" src="data:image/png;base64,{data}">'


def _summary(config: TrainConfig, rows: list[dict[str, str]]) -> str:
    if not rows:
        return "<p>No epoch has ended yet.</p>"
    seconds = sum(float(row["seconds"]) for row in rows)
    last = rows[-1]
    return (
        f"<p>{len(rows)} of {config.epochs} epochs in {seconds:,.0f} s of training, batches of "
        f"{config.batch_size}. Last loss {float(last['loss']):.3f}, contrastive top-1 "
        f"{float(last['top1']):.1%}, spread of features {float(last['feature_std']):.2f}, effective "
        f"rank {float(last['effective_rank']):.1f}.</p>"
    )


def _accuracies(folder: RunFolder) -> str:
    if not folder.results.is_file():
        return "<p>The run was not evaluated.</p>"
    results: dict[str, Any] = json.loads(folder.results.read_text())
    body = [
        [
            title,
            f"{scores['knn']:.4f}",
            f"{scores['linear']:.4f}",
            f"{scores['linear_few']:.4f} ± {scores['linear_few_std']:.4f}",
        ]
        for title, scores in ((SOURCES[k], v) for k, v in results["accuracy"].items())
    ]
    protocol = "; ".join(f"{k}: {v}" for k, v in results["protocol"].items())
    return (
        "<h2>Test accuracy</h2>"
        + _table(["features", "k-NN", "linear probe", "linear, 10 labels a class"], body)
        + f"<p>{results['train_images']} training and {results['test_images']} test images. "
        f"{escape(protocol)}.</p>"
    )


def _metrics(rows: list[dict[str, str]]) -> str:
    if not rows:
        return ""
    body = [[row["epoch"], *(f"{float(row[name]):.4g}" for name in METRICS[1:])] for row in rows]
    return f"<details><summary>Every epoch</summary>{_table(list(METRICS), body)}</details>"


def _settings(config: TrainConfig) -> str:
    body = [[key, str(value)] for key, value in vars(config).items()]
    return f"<details><summary>Settings</summary>{_table(['', ''], body, text=True)}</details>"


def _environment(folder: RunFolder) -> str:
    if not folder.environment.is_file():
        return ""
    sessions = json.loads(folder.environment.read_text())
    body = []
    for number, session in enumerate(sessions, 1):
        body += [
            [
                f"{number}: {key}",
                json.dumps(value) if isinstance(value, dict | list) else str(value),
            ]
            for key, value in session.items()
        ]
    return f"<details><summary>Machine and versions</summary>{_table(['', ''], body, text=True)}</details>"
