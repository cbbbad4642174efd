# SPDX-License-Identifier: Apache-2.0
"""Prediction of memory from sizes, and its measurement in fresh processes."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("kornia", reason="needs the packages of the trainers")

from ssltrain import memory
from ssltrain.cli import main, read_arguments
from ssltrain.data import DataOptions, load
from ssltrain.parallel import World
from ssltrain.trainer import Trainer
from ssltrain_helpers import SMALL, digits, write_parts

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_parts(tmp_path_factory.mktemp("data") / "a.npz", *digits(168), train=128)


def predicted(method: str, data: str, *words: str) -> dict[str, int]:
    config, _ = read_arguments(method, ["--data", data, *SMALL, *words])
    loaded = load(data, DataOptions())
    return memory.predict(Trainer(config, loaded, World(0, 1, torch.device("cpu")), None))


def test_parts_are_counted_from_sizes(data: str) -> None:
    simclr = predicted("simclr", data)
    moco = predicted("moco", data, "--queue-size", "256", "--queue-dtype", "bf16")
    byol = predicted("byol", data, "--optimizer", "sgd")
    # Weights hold batch-norm statistics too, gradients do not.
    assert simclr["gradients"] < simclr["weights"] < 1.1 * simclr["gradients"]
    assert simclr["optimiser"] == 2 * simclr["gradients"], "AdamW keeps two numbers a weight"
    assert byol["optimiser"] == byol["gradients"], "SGD with momentum keeps one"
    assert (simclr["average"], simclr["queue"]) == (0, 0)
    assert moco["average"] > 0 and 256 * 16 * 2 <= moco["queue"] <= 256 * 16 * 2 + 64
    assert byol["average"] < byol["weights"], "the average has no predictor"


def test_activations_are_those_of_the_layers() -> None:
    """A linear layer of 16 to 8 and a tanh keep their inputs and outputs, and no weight."""

    class Method(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layers = torch.nn.Flatten(), torch.nn.Linear(16, 8), torch.nn.Tanh()
            self.online = torch.nn.Sequential(*layers)

        def autocast(self) -> Any:
            return torch.autocast("cpu", enabled=False)

    class Run:
        method = Method()
        world = World(0, 1, torch.device("cpu"))
        tokens = None

        class data:  # noqa: N801
            channels, size = 1, (4, 4)

    kept, largest = memory.activations_of_a_view(Run())  # type: ignore[arg-type]
    assert kept == 16 * 4 + 8 * 4 and largest == 16 * 4


def test_micro_batches_and_batches_scale_the_activations(data: str) -> None:
    whole, parts = (predicted("simclr", data, "--micro-batch", m) for m in ("0", "16"))
    assert whole["activations"] == 8 * parts["activations"]  # two views of 64 against one of 16
    assert whole["loss"] == parts["loss"]


def test_a_pair_is_a_view_and_its_caption(data: str) -> None:
    """The text tower keeps more than its tokens; the logits are those of one view each."""
    clip, simclr = (
        predicted(method, data, "--loss-backend", "eager") for method in ("clip", "simclr")
    )
    captions = clip["activations"] - simclr["activations"] // 2
    assert 64 * 32 * 4 < captions
    assert clip["loss"] == 4 * memory.EAGER_MATRICES * 64**2 + 4 * 128 * 16 * 4


def test_plain_losses_grow_with_the_square(data: str) -> None:
    one, two = (
        predicted("simclr", data, "--loss-backend", "eager", "--batch-size", batch)["loss"]
        for batch in ("32", "64")
    )
    matrices = 4 * memory.EAGER_MATRICES
    assert one == matrices * 64**2 + 4 * 128 * 16 * 4
    assert two == matrices * 128**2 + 4 * 256 * 16 * 4


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_block_that_was_freed_counts_at_the_peak() -> None:
    meter = memory.Meter(torch.device("cpu"))
    meter.begin()
    block = torch.ones(16 * memory.MEBIBYTE)
    del block
    torch.ones(4 * memory.MEBIBYTE)
    assert 60 <= meter.peak() / memory.MEBIBYTE < 90


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_the_command_measures_both_in_fresh_processes(
    data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A batch of 1024 of 128 images, which are repeated: 2048 rows of logits are 16 MiB."""
    monkeypatch.chdir(tmp_path)
    words = [
        "--data",
        data,
        *SMALL,
        "--batch-size",
        "1024",
        "--micro-batch",
        "32",
        "--threads",
        "1",
    ]
    assert main(["memory", "simclr", *words]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = {line[:26].strip(): line[26:].split() for line in lines[1:-1]}
    assert lines[0].split() == ["MiB", "sslkernels", "plain", "PyTorch"]
    loss = [float(cell) for cell in rows["measured: the loss alone"]]
    step = [float(cell) for cell in rows["measured: a step"]]
    assert loss[0] < 8 < 32 < loss[1], "two matrices at least"
    assert step[1] > step[0] + 24
    assert lines[-1] == "wrote memory-simclr-a.png"
    assert (tmp_path / "memory-simclr-a.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("method", ["simclr", "supcon", "moco", "moco3", "byol", "simsiam", "clip"])
@pytest.mark.parametrize("backend", ["fused", "eager"])
def test_every_method_can_be_probed(method: str, backend: str, data: str) -> None:
    if not sys.platform.startswith("linux"):
        pytest.skip("reads /proc")
    words = ["--data", data, *SMALL, "--loss-backend", backend, "--batch-size", "256"]
    config, _ = read_arguments(method, words)
    found = json.loads(json.dumps(memory.probe(config)))
    assert set(found) == {"predicted", "step", "loss"}
    assert set(found["predicted"]) == set(memory.PARTS)
    assert all(value >= 0 for value in found["predicted"].values())
    # Here earlier tests have left free memory that steps use; fresh processes are measured above.
    assert found["step"] >= 0 and found["loss"] >= 0


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "ssltrain memory METHOD [flags]: METHOD is one of simclr"),
        (["simclr", "--backbone", "no_such:f"], "No module named 'no_such'"),
        (["simclr", "--micro-batch", "1"], "leaves a part of one image"),
    ],
)
def test_errors_are_one_line(
    words: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["memory", *words]) == 2
    line = capsys.readouterr().err
    assert expected in line and line.count("\n") == 1
