# SPDX-License-Identifier: Apache-2.0
"""The folder of a run: what lies in it, and how it is written and read."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import os
import platform
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

import sslkernels
from ssltrain.config import RESUMABLE_FIELDS, RUNTIME_FIELDS, TrainConfig
from ssltrain.errors import UserError, note

METRICS = (
    "epoch", "step", "lr", "loss", "top1", "top5", "positive_similarity", "negative_similarity",
    "feature_std", "effective_rank", "alignment", "uniformity", "knn", "images_per_s", "seconds",
)  # fmt: skip


# What the checkpoints of every version hold, the best one too, which is not for resuming.
_OF_A_CHECKPOINT = {"method", "step"}
_TO_RESUME = {"optimizer", "schedule", "random"}


class RunFolder:
    """Paths of a run: ``config.yaml``, ``metrics.csv``, ``checkpoint.pt``, results and plots.

    Files that a run needs later are replaced in one move, after what is new has reached the disk.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"
        self.metrics = path / "metrics.csv"
        self.checkpoint = path / "checkpoint.pt"
        self.best = path / "best.pt"
        self.environment = path / "environment.json"
        self.events = path / "tensorboard"
        self.results = path / "results.json"
        self.loss_plot = path / "loss.png"
        self.map_plot = path / "embeddings.png"
        self.confusion_plot = path / "confusion.png"
        self.neighbors_plot = path / "neighbors.png"
        self.embeddings = path / "embeddings.npz"
        self.retrieval = path / "retrieval.json"
        self.retrieval_plot = path / "retrieval.png"
        self.report = path / "report.html"

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

    def read_checkpoint(self, name: str = "latest") -> dict[str, Any]:
        """A checkpoint, on the CPU.

        Args:
            name: ``latest``, ``best``, the number of an epoch, or the name of a file.

        Raises:
            UserError: there is none, or it cannot be read.
        """
        names = {"latest": self.checkpoint, "best": self.best}
        path = names.get(name) or (self.epoch_checkpoint(int(name)) if name.isdigit() else None)
        path = path or self.path / name
        if not path.is_file():
            kept = sorted(found.name for found in self.path.glob("*.pt"))
            raise UserError(f"{self.path} has no {path.name}; it has {', '.join(kept) or 'none'}")
        try:
            state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises whatever zip and pickle raise
            raise UserError(
                f"cannot read {path}: {type(error).__name__}; the file is damaged"
            ) from error
        wanted = _OF_A_CHECKPOINT | (_TO_RESUME if path == self.checkpoint else set())
        if not isinstance(state, dict) or not wanted <= state.keys():
            raise UserError(f"{path} is no checkpoint of a run")
        return state

    @property
    def has_begun(self) -> bool:
        """Whether the run has come to its first checkpoint; a kill may have come before it."""
        return self.checkpoint.is_file() or bool(self.read_metrics())

    def epoch_checkpoint(self, epoch: int) -> Path:
        """Where the checkpoint after ``epoch`` epochs is kept with ``--keep-every``."""
        return self.path / f"epoch-{epoch:04d}.pt"

    def write_checkpoint(self, state: dict[str, Any], path: Path | None = None) -> None:
        """Replace a checkpoint: a kill or a full disk leaves the old one or the new one.

        Raises:
            OSError: it cannot be written; what was there is unchanged.
        """
        with replaced(path or self.checkpoint) as file:
            torch.save(state, file)

    def write_environment(self, words: Sequence[str]) -> None:
        """Add to ``environment.json`` what this process runs on, and the command."""
        sessions: list[dict[str, Any]] = []
        if self.environment.is_file():
            try:
                sessions = json.loads(self.environment.read_text())
            except ValueError:
                note(f"{self.environment} was damaged and starts afresh")
        sessions.append({"command": list(words), **environment()})
        with replaced(self.environment) as file:
            file.write(json.dumps(sessions, indent=2).encode() + b"\n")

    def keep_metrics_before(self, epoch: int) -> None:
        """Drop rows of ``metrics.csv`` from ``epoch`` on; a resumed run writes them again.

        Lines that cannot be read are dropped too, so that the file is whole again.
        """
        rows = [row for row in self.read_metrics() if int(row["epoch"]) < epoch]
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, METRICS)
        writer.writeheader()
        writer.writerows(rows)
        with replaced(self.metrics) as file:
            file.write(text.getvalue().encode())

    def append_metrics(self, row: dict[str, float]) -> None:
        """Add the row of an epoch; floats with the digits that give back the same float32.

        Raises:
            OSError: it cannot be written.
        """
        cells = {k: f"{v:.9g}" if isinstance(v, float) else v for k, v in row.items()}
        with self.metrics.open("a+b") as file:
            if file.seek(0, os.SEEK_END):
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":  # a line was cut short by a full disk
                    file.write(b"\n")
            line = ",".join(str(cells.get(name, "nan")) for name in METRICS)
            file.write(line.encode() + b"\n")

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


@contextmanager
def replaced(path: Path) -> Iterator[IO[bytes]]:
    """A file to write to that takes the place of ``path`` when it is complete and on the disk.

    Raises:
        OSError: it could not be written; ``path`` is what it was.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if isinstance(error, RuntimeError) and isinstance(error.__context__, OSError):
            raise error.__context__ from error  # torch.save hides a full disk behind its own
        raise
    if os.name == "posix":  # the move itself reaches the disk with the folder
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def environment() -> dict[str, Any]:
    """Versions, machine and time, as ``environment.json`` keeps them."""
    packages = ("numpy", "kornia", "scikit-learn", "pillow", "tensorboardX", "triton")
    info = sslkernels.info()
    # torch says which build it is ("2.13.0+cu130"), what was installed may not.
    versions: dict[str, str | None] = {"torch": str(torch.__version__)}
    for name in packages:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "host": platform.node(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "processors": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instruction_set": info.isa,
        "cuda_device": info.cuda_device,
        "processes": int(os.environ.get("WORLD_SIZE", "1")),
        "versions": {"sslkernels": info.version, **versions},
    }


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
