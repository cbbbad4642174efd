# SPDX-License-Identifier: Apache-2.0
"""A network and a data set so small that a step takes milliseconds, and comparison by bits."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ssltrain.cli import main
from ssltrain.text import tokenize

# 256 training images of 8 x 8 in batches of 64: four steps an epoch, milliseconds each.
SMALL = [
    "--batch-size", "64", "--width", "8", "--stages", "2", "--blocks", "1", "--queue-size", "128",
    "--projector-hidden", "32", "--projector-dim", "16", "--optimizer", "adamw", "--log-every", "2",
    "--base-lr", "0.02", "--temperature", "0.1", "--ema-decay", "0.9", "--rotate", "10",
    "--translate", "0.1", "--noise", "0.05", "--flip", "0", "--crop-min", "1", "--jitter", "0.5",
    "--progress", "false", "--device", "cpu", "--knn-every", "1",
]  # fmt: skip
NAMES = "zero one two three four five six seven eight nine".split()
TIMES = ("images_per_s", "seconds")


def digits(count: int) -> tuple[np.ndarray, np.ndarray]:
    """The first digits of scikit-learn: uint8 [count, 8, 8] and int64 [count]."""
    from sklearn.datasets import load_digits

    found = load_digits()
    return np.rint(found.images[:count] * (255 / 16)).astype(np.uint8), found.target[:count]


def write_parts(path: Path, images: np.ndarray, labels: np.ndarray, train: int) -> str:
    """An .npz file whose first ``train`` images are the training part; images have captions."""
    captions = np.array([f"{NAMES[label]} from hand {i % 5}" for i, label in enumerate(labels)])
    np.savez(
        path,
        x_train=images[:train],
        y_train=labels[:train],
        x_test=images[train:],
        y_test=labels[train:],
        captions_train=captions[:train],
        captions_test=captions[train:],
    )
    return str(path)


def tokens(count: int) -> torch.Tensor:
    """Captions of the first ``count`` of so many images, as a batch has them."""
    return tokenize(f"{NAMES[i % 10]} from hand {i % 7}" for i in range(count))


def run(method: str, data: str, folder: Path, *words: str) -> int:
    """The command with the small network; ``words`` come last and win."""
    return main([method, "--data", data, "--run", str(folder), *SMALL, *words])


def rows(folder: Path) -> list[dict[str, float]]:
    with (folder / "metrics.csv").open() as file:
        return [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]


def assert_same_bits(ours: Any, theirs: Any, where: str = "checkpoint") -> None:
    """Equal nested containers, tensors by their bits."""
    assert type(ours) is type(theirs), where
    if isinstance(ours, torch.Tensor):
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs), where
    elif isinstance(ours, dict):
        assert ours.keys() == theirs.keys(), where
        for key in ours:
            assert_same_bits(ours[key], theirs[key], f"{where}[{key!r}]")
    elif isinstance(ours, list | tuple):
        assert len(ours) == len(theirs), where
        for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            assert_same_bits(a, b, f"{where}[{i}]")
    else:
        assert ours == theirs, where


def checkpoint(folder: Path) -> dict[str, Any]:
    """The checkpoint without the settings of the run, which name its folder."""
    state: dict[str, Any] = torch.load(folder / "checkpoint.pt", weights_only=True)
    state.pop("config")
    return state
