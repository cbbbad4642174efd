# SPDX-License-Identifier: Apache-2.0
"""k-NN and linear probes on frozen features, beside raw pixels and the untrained encoder."""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from threadpoolctl import threadpool_limits
from torch import Tensor

from ssltrain.config import TrainConfig
from ssltrain.data import UNLABELLED, ImageData, Images
from ssltrain.errors import UserError
from ssltrain.methods import load_encoder, online_weights
from ssltrain.models import Encoder
from ssltrain.neighbours import nearest, vote
from ssltrain.runs import RunFolder, replaced
from ssltrain.trainer import NEIGHBOURS, fresh_encoder

FEW_LABELS = 10  # a class
FEW_LABELS_DRAWS = 5  # fixed draws of the labelled images, averaged
PROBE_ITERATIONS = 2000
# Features of fewer numbers are probed on one thread: products of microseconds, for which a second thread of
# OpenBLAS waits ten times as long where another process has its core.
ONE_THREAD = 2**22
EMBED_BATCH = 512
MOST_CLASSES = 200  # of which a confusion matrix is kept

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


def trained_encoder(state: dict[str, Any], config: TrainConfig, data: ImageData) -> Encoder:
    """The encoder in a checkpoint.

    Args:
        state: the checkpoint.
        config: the run.
        data: what the encoder will be used on.

    Raises:
        UserError: the checkpoint does not fit the configuration or the images.
    """
    weights = online_weights(state["method"])
    encoder = fresh_encoder(config, data, trained_statistics(weights, data))
    load_encoder(encoder, weights)
    return encoder


def trained_statistics(weights: dict[str, Tensor], data: ImageData) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the channels of the images that a run was trained on."""
    mean, std = weights["encoder.mean"].flatten(), weights["encoder.std"].flatten()
    if mean.numel() != data.channels:
        raise UserError(
            f"{data.name} has images of {data.channels} channels, the run was trained on "
            f"{mean.numel()}"
        )
    return mean, std


def all_features(
    state: dict[str, Any], config: TrainConfig, data: ImageData, device: torch.device
) -> dict[str, Features]:
    """Features of raw pixels, the untrained encoder and the trained one, by key of SOURCES."""
    trained = trained_encoder(state, config, data)
    statistics = trained_statistics(online_weights(state["method"]), data)
    untrained = fresh_encoder(config, data, statistics)
    parts = data.train.images, data.test.images
    return {
        "raw": Features(*(raw_pixels(images) for images in parts)),
        "untrained": Features(*(embed(untrained, images, device) for images in parts)),
        "trained": Features(*(embed(trained, images, device) for images in parts)),
    }


def knn_predictions(features: Features, rows: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The class of each test image by the nearest of the training images at ``rows``, int64 [M]."""
    bank = torch.from_numpy(features.train[rows])
    count = min(NEIGHBOURS, len(bank))
    similarities, found = nearest(torch.from_numpy(features.test), bank, count)
    return vote(similarities, torch.from_numpy(labels[rows])[found]).numpy()


def linear_predictions(features: Features, rows: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The class of each test image by a linear probe of the training images at ``rows``."""
    # Here, because importing it takes seconds that runs which are not evaluated should not.
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=PROBE_ITERATIONS))
    train = features.train[rows]
    threads = 1 if train.size < ONE_THREAD else None
    # A probe that has not fully converged is still a fair probe.
    with warnings.catch_warnings(), threadpool_limits(threads, "blas"):
        warnings.simplefilter("ignore", ConvergenceWarning)
        predictions: np.ndarray = probe.fit(train, labels[rows]).predict(features.test)
    return predictions


def few_label_rows(labels: np.ndarray, draw: int) -> np.ndarray:
    """Row numbers of FEW_LABELS images of every class (all, of a smaller class), by draw."""
    generator = np.random.default_rng(draw)
    rows = []
    for label in np.unique(labels[labels != UNLABELLED]):
        members = np.flatnonzero(labels == label)
        count = min(FEW_LABELS, len(members))
        rows.append(generator.choice(members, count, replace=False))
    return np.concatenate(rows)


def score(
    features: Features, labels: np.ndarray, truth: np.ndarray, classes: int
) -> tuple[dict[str, float], np.ndarray]:
    """Test accuracies of the three probes, the spread of the last over its draws, and mix-ups.

    Images without a label (-1) are left out of both parts. The mix-ups are those of the linear
    probe, int64 [C, C].
    """
    known = np.flatnonzero(truth != UNLABELLED)
    features, truth = Features(features.train, features.test[known]), truth[known]
    everything = np.flatnonzero(labels != UNLABELLED)
    few = [
        float(np.mean(linear_predictions(features, rows, labels) == truth))
        for rows in (few_label_rows(labels, draw) for draw in range(FEW_LABELS_DRAWS))
    ]
    linear = linear_predictions(features, everything, labels)
    return {
        "knn": float(np.mean(knn_predictions(features, everything, labels) == truth)),
        "linear": float(np.mean(linear == truth)),
        "linear_few": float(np.mean(few)),
        "linear_few_std": float(np.std(few)),
    }, confusion(truth, linear, classes)


def confusion(truth: np.ndarray, predictions: np.ndarray, classes: int) -> np.ndarray:
    """How many images of each class (row) are taken for each class (column), int64 [C, C]."""
    return np.bincount(truth * classes + predictions, minlength=classes**2).reshape(classes, -1)


def evaluate(
    folder: RunFolder, config: TrainConfig, data: ImageData, features: dict[str, Features]
) -> dict[str, Any]:
    """Score every source of features and write ``results.json``.

    Raises:
        UserError: the data set has no labels, or one class only.
    """
    labels, truth = data.train.labels, data.test.labels
    if labels is None or truth is None or data.unlabelled:
        raise UserError(f"{data.name} {data.unlabelled}; the evaluation needs two classes")
    scores, mixed = {}, {}
    for source in SOURCES:
        scores[source], mixed[source] = score(
            features[source], labels, truth, len(data.class_names)
        )
    results: dict[str, Any] = {
        "method": config.method,
        "data": config.data,
        "seed": config.seed,
        "epochs": config.epochs,
        "train_images": len(data.train.labelled),
        "test_images": len(data.test.labelled),
        "protocol": {
            "knn": f"{NEIGHBOURS} neighbours, cosine, weighted by distance",
            "linear": "standardised features, logistic regression, C = 1",
            "linear_few": f"the same on {FEW_LABELS} labels a class, "
            f"mean of {FEW_LABELS_DRAWS} fixed draws",
        },
        "accuracy": scores,
        "class_names": data.class_names,
        "confusion": mixed["trained"].tolist() if len(data.class_names) <= MOST_CLASSES else None,
    }
    with replaced(folder.results) as file:
        file.write(json.dumps(results, indent=2).encode() + b"\n")
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
