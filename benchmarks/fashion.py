# SPDX-License-Identifier: Apache-2.0
"""Train the recipes for Fashion-MNIST with several seeds, and score the frozen features.

    python -m benchmarks.fashion                       nine runs, two at a time, one thread each
    python -m benchmarks.fashion --seeds 0 --jobs 1

Runs that are there are taken up where they stopped, and not evaluated twice.  Into --out go ``runs.csv``
(time of CPU and clock, load of the machine), ``scores.csv`` (as ``ssltrain eval`` computes them; pixels
once, and the untrained encoder once a seed, as the recipes have the same one) and ``table.md`` (mean
and standard deviation over the seeds).
"""

from __future__ import annotations

import argparse
import csv
import itertools
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from ssltrain.config import TITLES, TrainConfig
from ssltrain.data import DataOptions, ImageData, load
from ssltrain.evaluate import SCORES, Features, embed, raw_pixels, score, trained_encoder
from ssltrain.runs import RunFolder
from ssltrain.trainer import fresh_encoder

METHODS = ("simclr", "moco", "byol")
COLUMNS = ("knn", "linear", "linear_few", "linear_few_std")
RUN_COLUMNS = ("method", "seed", "cpu_s", "wall_s", "load_before", "load_after", "resumed")


def train(method: str, seed: int, data: str, out: Path) -> None:
    """One run in a process of its own, and a line in ``runs.csv``."""
    folder = out / f"{method}-seed{seed}"
    resumed = (folder / "checkpoint.pt").is_file()
    if resumed:
        state = RunFolder(folder).read_checkpoint()
        if state["step"] == state["steps_per_epoch"] * state["config"]["epochs"]:
            return
        words = [method, "--resume", str(folder)]
    else:
        words = [
            method,
            "--recipe",
            f"{method}-fashion",
            "--data",
            data,
            "--seed",
            str(seed),
            "--run",
            str(folder),
            "--threads",
            "1",
        ]
    words += ["--evaluate", "false", "--progress", "false", "--knn-every", "1", "--save-every", "1"]
    before, started = os.getloadavg()[0], time.perf_counter()
    child = subprocess.Popen([sys.executable, "-m", "ssltrain", *words])
    _, status, used = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise SystemExit(f"{' '.join(words)} ended with {child.returncode}")
    cells = (
        method,
        seed,
        f"{used.ru_utime + used.ru_stime:.0f}",
        f"{time.perf_counter() - started:.0f}",
        f"{before:.1f}",
        f"{os.getloadavg()[0]:.1f}",
        int(resumed),
    )
    _append(out / "runs.csv", RUN_COLUMNS, cells)


def _append(path: Path, columns: tuple[str, ...], cells: tuple[Any, ...]) -> None:
    fresh = not path.is_file()
    with path.open("a", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        if fresh:
            writer.writerow(columns)
        writer.writerow(cells)


def evaluate(method: str, seed: int, data: ImageData, out: Path) -> None:
    """The scores of a run, of the encoder it started from, and of pixels: lines in ``scores.csv``."""
    path = out / "scores.csv"
    known = set()
    if path.is_file():
        with path.open(newline="") as file:
            known = {(row["features"], row["seed"]) for row in csv.DictReader(file)}
    device, parts = torch.device("cpu"), (data.train.images, data.test.images)
    labels, truth = data.train.labels, data.test.labels
    if labels is None or truth is None:
        raise SystemExit(f"{data.name} {data.unlabelled}: there is nothing to score")
    folder = RunFolder.open(out / f"{method}-seed{seed}")
    config = TrainConfig.load(folder.config)

    def add(name: str, number: str, features: Features) -> None:
        found, _ = score(features, labels, truth, len(data.class_names))
        _append(
            path,
            ("features", "seed", *COLUMNS),
            (name, number, *(f"{found[c]:.4f}" for c in COLUMNS)),
        )
        print(name, number, {c: round(found[c], 4) for c in COLUMNS}, flush=True)

    if (method, str(seed)) not in known:
        encoder = trained_encoder(folder.read_checkpoint(), config, data)
        add(method, str(seed), Features(*(embed(encoder, images, device) for images in parts)))
    if ("untrained", str(seed)) not in known:
        encoder = fresh_encoder(config, data)
        add("untrained", str(seed), Features(*(embed(encoder, images, device) for images in parts)))
    if ("pixels", "") not in known:
        add("pixels", "", Features(*(raw_pixels(images) for images in parts)))


def table(out: Path) -> str:
    """Mean and standard deviation of the scores over seeds, and of the CPU time of the runs."""
    with (out / "scores.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    spent: dict[tuple[str, str], float] = {}  # a run may have been taken up more than once
    with (out / "runs.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            key = row["method"], row["seed"]
            spent[key] = spent.get(key, 0.0) + float(row["cpu_s"])
    times = {name: [s for (method, _), s in spent.items() if method == name] for name in METHODS}
    lines = [
        "| features | seeds | k-NN | linear probe | 10 labels a class | CPU time |",
        "|---|---|---|---|---|---|",
    ]
    names = {"pixels": "raw pixels", "untrained": "untrained encoder", **TITLES}
    for name in ("pixels", "untrained", *METHODS):
        own = [row for row in rows if row["features"] == name]
        if own:
            cells = [_spread([float(row[score]) for row in own]) for score in SCORES]
            seconds = f"{_spread(times[name], 0)} s" if times.get(name) else "–"
            lines.append(f"| {names[name]} | {len(own)} | {' | '.join(cells)} | {seconds} |")
    return "\n".join(lines) + "\n"


def _spread(values: list[float], digits: int = 3) -> str:
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def main() -> None:
    """Train what is missing, evaluate what is not, print the table."""
    parser = argparse.ArgumentParser("python -m benchmarks.fashion", description=__doc__)
    parser.add_argument("--data", default="mnist:/usr/share/datasets/fashion-mnist")
    parser.add_argument("--out", type=Path, default=Path("runs/fashion"))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    runs = list(itertools.product(options.seeds, options.methods))
    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(lambda run: train(run[1], run[0], options.data, options.out), runs))
    data = load(options.data, DataOptions())
    for seed, method in runs:
        evaluate(method, seed, data, options.out)
    (options.out / "table.md").write_text(table(options.out))
    print(table(options.out))


if __name__ == "__main__":
    main()
