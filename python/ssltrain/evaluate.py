# SPDX-License-Identifier: Apache-2.0
"""k-NN and linear probes on frozen features, beside raw pixels and the untrained encoder."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from ssltrain.config import TrainConfig
from ssltrain.data import ImageData, Images
from ssltrain.errors import UserError
from ssltrain.models import Encoder
from ssltrain.runs import RunFolder
from ssltrain.trainer import fresh_encoder

NEIGHBOURS = 5
FEW_LABELS = 10  # a class
FEW_LABELS_DRAWS = 5  # fixed draws of the labelled images, averaged
PROBE_ITERATIONS = 2000
EMBED_BATCH = 512

SCORES = ("knn", "linear", "linear_few")
SOURCES = {"raw": "raw pixels", "untrained": "untrained encoder", "trained": "trained encoder"}


@dataclass
class Features:
    """Float32 features of both parts of a data set: [N, F] and [M, F]."""

    train: np.ndarray
    test: np.ndarray


@torch.no_grad()
def embed(encoder: Encoder, images: Images, device: torch.device) -> np.ndarray:
    """The features h of every image, float32 [N, F], in evaluation mode."""
    encoder = encoder.to(device).eval()
    blocks = [
        encoder(images.read(rows).to(device).float() / 255).float().cpu()
        for rows in torch.split(torch.arange(len(images)), EMBED_BATCH)
    ]
    return torch.cat(blocks).numpy()


def raw_pixels(images: Images) -> np.ndarray:
    """Pixels as features, float32 [N, C * H * W], from 0 to 1."""
    blocks = [
        images.read(rows).flatten(1).float() / 255
        for rows in torch.split(torch.arange(len(images)), EMBED_BATCH)
    ]
    return torch.cat(blocks).numpy()


def trained_encoder(folder: RunFolder, config: TrainConfig, data: ImageData) -> Encoder:
    """The encoder of the last checkpoint of a run.

    Raises:
        UserError: no checkpoint, or one that does not fit the configuration.
    """
    state = folder.read_checkpoint()["method"]
    encoder = fresh_encoder(config, data)
    # The online network may be wrapped (DDP, BYOL's predictor): the encoder's own names follow
    # the last "encoder." of an entry that starts with "online.".
    own = {
        name.split("encoder.", 1)[1]: value
        for name, value in state.items()
        if name.startswith("online.") and "encoder." in name
    }
    try:
        encoder.load_state_dict(own)
    except RuntimeError as error:
        raise UserError(
            f"{folder.checkpoint} does not fit {folder.config}: {str(error).splitlines()[0]}"
        ) from error
    return encoder


def all_features(
    folder: RunFolder, config: TrainConfig, data: ImageData, device: torch.device
) -> dict[str, Features]:
    """Features of raw pixels, the untrained encoder and the trained one, by key of SOURCES."""
    untrained = fresh_encoder(config, data)
    trained = trained_encoder(folder, config, data)
    parts = data.train.images, data.test.images
    return {
        "raw": Features(*(raw_pixels(images) for images in parts)),
        "untrained": Features(*(embed(untrained, images, device) for images in parts)),
        "trained": Features(*(embed(trained, images, device) for images in parts)),
    }


def _knn() -> Any:
    return KNeighborsClassifier(NEIGHBOURS, metric="cosine", weights="distance")


def _linear() -> Any:
    return make_pipeline(StandardScaler(), LogisticRegression(max_iter=PROBE_ITERATIONS))


def _accuracy(
    make: Callable[[], Any], features: Features, rows: Any, labels: np.ndarray, truth: np.ndarray
) -> float:
    with warnings.catch_warnings():  # a probe that has not fully converged is still a fair probe
        warnings.simplefilter("ignore", ConvergenceWarning)
        return float(make().fit(features.train[rows], labels[rows]).score(features.test, truth))


def few_label_rows(labels: np.ndarray, draw: int) -> np.ndarray:
    """Row numbers of FEW_LABELS images of every class (all, of a smaller class), by draw."""
    generator = np.random.default_rng(draw)
    rows = []
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        count = min(FEW_LABELS, len(members))
        rows.append(generator.choice(members, count, replace=False))
    return np.concatenate(rows)


def score(features: Features, labels: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """Test accuracies of the three probes, and the spread of the last over its draws."""
    everything = slice(None)
    few = [
        _accuracy(_linear, features, few_label_rows(labels, draw), labels, truth)
        for draw in range(FEW_LABELS_DRAWS)
    ]
    return {
        "knn": _accuracy(_knn, features, everything, labels, truth),
        "linear": _accuracy(_linear, features, everything, labels, truth),
        "linear_few": float(np.mean(few)),
        "linear_few_std": float(np.std(few)),
    }


def evaluate(
    folder: RunFolder, config: TrainConfig, data: ImageData, features: dict[str, Features]
) -> dict[str, Any]:
    """Score every source of features and write ``results.json``.

    Raises:
        UserError: the data set has no labels.
    """
    labels, truth = data.train.labels, data.test.labels
    if labels is None or truth is None:
        raise UserError(f"{data.name} has no labels, which the evaluation needs")
    results: dict[str, Any] = {
        "method": config.method,
        "data": config.data,
        "seed": config.seed,
        "epochs": config.epochs,
        "train_images": len(labels),
        "test_images": len(truth),
        "protocol": {
            "knn": f"{NEIGHBOURS} neighbours, cosine, weighted by distance",
            "linear": "standardised features, logistic regression, C = 1",
            "linear_few": f"the same on {FEW_LABELS} labels a class, "
            f"mean of {FEW_LABELS_DRAWS} fixed draws",
        },
        "accuracy": {source: score(features[source], labels, truth) for source in SOURCES},
    }
    folder.results.write_text(json.dumps(results, indent=2) + "\n")
    return results


def table(results: dict[str, Any]) -> str:
    """The accuracies of a run as a table of text."""
    accuracy = results["accuracy"]
    return _lines({title: accuracy[source] for source, title in SOURCES.items()})


def summary(folders: dict[str, RunFolder]) -> str:
    """The accuracies of several runs on the same data as one table, baselines first."""
    accuracies = {
        title: json.loads(folder.results.read_text())["accuracy"]
        for title, folder in folders.items()
    }
    first = next(iter(accuracies.values()))
    baselines = {SOURCES[source]: first[source] for source in ("raw", "untrained")}
    return _lines(baselines | {title: scores["trained"] for title, scores in accuracies.items()})


def _lines(scores: dict[str, dict[str, float]]) -> str:
    few = f"linear, {FEW_LABELS} labels a class"
    lines = [f"{'test accuracy':<19}{'k-NN':>8}{'linear probe':>15}{few:>28}"]
    for title, row in scores.items():
        spread = f"{row['linear_few']:.4f} ± {row['linear_few_std']:.4f}"
        lines.append(f"{title:<19}{row['knn']:>8.4f}{row['linear']:>15.4f}{spread:>28}")
    return "\n".join(lines)
