# SPDX-License-Identifier: Apache-2.0
"""The folder of a run: what lies in it, and how it is written and read."""

from __future__ import annotations

import csv
import dataclasses
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ssltrain.config import RESUMABLE_FIELDS, RUNTIME_FIELDS, TrainConfig
from ssltrain.errors import UserError, note

METRICS = (
    "epoch", "step", "lr", "loss", "top1", "top5", "positive_similarity", "negative_similarity",
    "feature_std", "effective_rank", "alignment", "uniformity", "images_per_s", "seconds",
)  # fmt: skip


class RunFolder:
    """Paths of a run: ``config.yaml``, ``metrics.csv``, ``checkpoint.pt``, results and plots."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"
        self.metrics = path / "metrics.csv"
        self.checkpoint = path / "checkpoint.pt"
        self.events = path / "tensorboard"
        self.results = path / "results.json"
        self.loss_plot = path / "loss.png"
        self.map_plot = path / "embeddings.png"
        self.embeddings = path / "embeddings.npz"

    @classmethod
    def create(cls, config: TrainConfig, data_name: str) -> RunFolder:
        """Make the folder of a new run and write its configuration.

        Raises:
            UserError: ``--run`` names a folder that already holds something.
        """
        if config.run:
            path = Path(config.run).expanduser()
            if path.exists() and (not path.is_dir() or any(path.iterdir())):
                raise UserError(
                    f"--run {path} already exists and is not empty; choose another name, "
                    f"or continue that run with --resume {path}"
                )
        else:
            stem = Path("runs") / f"{config.method}-{data_name}-seed{config.seed}"
            path, count = stem, 1
            while path.exists():
                count += 1
                path = stem.with_name(f"{stem.name}-{count}")
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot make the run folder {path}: {error.strerror}") from error
        folder = cls(path)
        config.save(folder.config)
        return folder

    @classmethod
    def open(cls, path: str | Path) -> RunFolder:
        """The folder of a run that exists.

        Raises:
            UserError: no run is there.
        """
        folder = cls(Path(path).expanduser())
        if not folder.config.is_file():
            raise UserError(f"{folder.path} is not a run folder: it has no config.yaml")
        return folder

    def keep_config(self, config: TrainConfig) -> None:
        """Note in ``config.yaml`` what a resumed run was told to change: its data, its epochs."""
        saved = TrainConfig.load(self.config)
        lasting = {name: getattr(config, name) for name in RESUMABLE_FIELDS - RUNTIME_FIELDS}
        changed = dataclasses.replace(saved, **lasting)
        if changed != saved:
            changed.save(self.config)

    def read_checkpoint(self) -> dict[str, Any]:
        """The last checkpoint, on the CPU.

        Raises:
            UserError: there is none, or it cannot be read.
        """
        if not self.checkpoint.is_file():
            raise UserError(f"{self.path} has no checkpoint.pt yet; start the run again")
        try:
            state: dict[str, Any] = torch.load(
                self.checkpoint, map_location="cpu", weights_only=True
            )
        except Exception as error:  # torch raises whatever zip and pickle raise
            raise UserError(
                f"cannot read {self.checkpoint}: {type(error).__name__}; the file is damaged"
            ) from error
        return state

    def write_checkpoint(self, state: dict[str, Any]) -> None:
        """Replace the checkpoint in one move, so that a kill leaves the old or the new one."""
        partial = self.checkpoint.with_suffix(".partial")
        torch.save(state, partial)
        os.replace(partial, self.checkpoint)

    def keep_metrics_before(self, epoch: int) -> None:
        """Drop rows of ``metrics.csv`` from ``epoch`` on; a resumed run writes them again.

        Lines that cannot be read are dropped too, so that the file is whole again.
        """
        rows = [row for row in self.read_metrics() if int(row["epoch"]) < epoch]
        partial = self.metrics.with_suffix(".partial")
        with partial.open("w", newline="") as file:
            writer = csv.DictWriter(file, METRICS, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows)
        os.replace(partial, self.metrics)

    def append_metrics(self, row: dict[str, float]) -> None:
        """Add the row of an epoch; floats with the digits that give back the same float32."""
        cells = {k: f"{v:.9g}" if isinstance(v, float) else v for k, v in row.items()}
        with self.metrics.open("a", newline="") as file:
            csv.DictWriter(file, METRICS).writerow(cells)

    def read_metrics(self) -> list[dict[str, str]]:
        """The rows of ``metrics.csv``, oldest first; none where there is no file.

        A line that is cut short or otherwise no row is left out, and a note names it.
        """
        if not self.metrics.is_file():
            return []
        lines = self.metrics.read_text(errors="replace").replace("\0", "\ufffd").split("\n")
        header = lines[0].strip().split(",")
        start = 1
        if "epoch" not in header or not set(header) <= set(METRICS):
            header, start = list(METRICS), 0  # the first line is damaged, or lost
        rows, damaged = [], []
        for number, line in enumerate(lines[start:], start + 1):
            row = _metrics_row(header, line)
            if row is not None:
                rows.append(row)
            elif line.strip():
                damaged.append(str(number))
        if damaged:
            what = "line" if len(damaged) == 1 else "lines"
            note(f"{self.metrics}: {what} {', '.join(damaged)} cannot be read and left out")
        return rows


def _metrics_row(header: list[str], line: str) -> dict[str, str] | None:
    """A line of ``metrics.csv`` as a row, or None if it is not one; "nan" where it has no cell."""
    cells = line.strip().split(",")
    if len(cells) != len(header):
        return None
    row = dict.fromkeys(METRICS, "nan") | dict(zip(header, cells, strict=True))
    try:
        for name, cell in row.items():
            _ = int(cell) if name in ("epoch", "step") else float(cell)
    except ValueError:
        return None
    return row


def random_state(device: torch.device) -> dict[str, Any]:
    """The state of every generator that training may draw from, in types a checkpoint can hold."""
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "python": [version, list(words), gauss],
        "numpy": [name, torch.from_numpy(np.asarray(keys, np.int64)), position, has_gauss, cached],
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Put back what ``random_state`` returned."""
    torch.set_rng_state(state["torch"])
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


def seed_everything(seed: int) -> None:
    """Seed torch, Python and NumPy."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


def epoch_order(images: int, seed: int, epoch: int) -> Tensor:
    """The order of the training images in an epoch, int64 [images]: a function of its arguments.

    No state is needed to come back to it, so a position in the data is an epoch and a step.
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(images, generator=generator)
