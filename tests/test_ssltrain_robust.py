# SPDX-License-Identifier: Apache-2.0
"""Runs that are killed, stopped, out of disk, out of memory, collapsed or no longer numbers."""

from __future__ import annotations

import errno
import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import HANGS_S

pytest.importorskip("kornia", reason="needs the packages of the trainers")

from ssltrain.cli import main
from ssltrain.diagnostics import has_collapsed
from ssltrain.logs import Events, Progress
from ssltrain.runs import METRICS, RunFolder
from ssltrain.trainer import Trainer
from ssltrain_helpers import SMALL, assert_same_bits, checkpoint, digits, rows, run, write_parts
from ssltrain_killed import MOMENTS

pytestmark = pytest.mark.usefixtures("one_thread")

TESTS = Path(__file__).resolve().parent
WORDS = ["--epochs", "3", "--evaluate", "false", "--save-every", "1"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """128 training images: two steps an epoch."""
    return write_parts(tmp_path_factory.mktemp("data") / "a.npz", *digits(168), train=128)


# ---- SIGKILL -------------------------------------------------------------------------------------


FEW = ("after step 3", "in the third checkpoint", "in a line of metrics.csv")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize(
    ("method", "moments"),
    [
        ("moco", FEW),
        pytest.param("simclr", tuple(MOMENTS), marks=pytest.mark.slow),
        pytest.param("byol", tuple(MOMENTS), marks=pytest.mark.campaign),
    ],
    ids=["moco", "simclr", "byol"],
)
def test_a_killed_run_ends_with_the_bits_of_one_that_was_not(
    method: str, moments: tuple[str, ...], data: str, tmp_path: Path
) -> None:
    done = subprocess.run(
        [sys.executable, str(TESTS / "ssltrain_killed.py"), str(tmp_path), data, method, *moments],
        capture_output=True,
        text=True,
        check=False,
        timeout=HANGS_S,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    ended = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    killed = -int(signal.SIGKILL)
    assert ended == [["whole", 0, 0], *([moment, killed, 0] for moment in moments)], done.stderr
    whole = checkpoint(tmp_path / "whole")
    assert whole["step"] == 6
    for moment in moments:
        folder = tmp_path / moment
        assert_same_bits(checkpoint(folder), whole, moment)
        for name in ("best.pt", "epoch-0002.pt"):
            ours, theirs = (torch.load(f / name) for f in (folder, tmp_path / "whole"))
            assert_same_bits(ours["method"], theirs["method"], f"{moment}: {name}")
        assert not list(folder.glob("*.partial")), moment
        for ours, theirs in zip(rows(folder), rows(tmp_path / "whole"), strict=True):
            for name in set(METRICS) - {"images_per_s", "seconds"}:
                assert ours[name] == theirs[name], (moment, name)


def test_a_run_without_a_checkpoint_or_an_epoch_starts_again(data: str, tmp_path: Path) -> None:
    """A kill may come before the first checkpoint."""
    assert run("moco", data, tmp_path / "whole", *WORDS) == 0
    folder = tmp_path / "run"
    assert run("moco", data, folder, *WORDS, "--stop-after", "1") == 0
    (folder / "checkpoint.pt").unlink()
    assert main(["moco", "--resume", str(folder)]) == 0
    assert_same_bits(checkpoint(folder), checkpoint(tmp_path / "whole"))


# ---- signals -------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_ends_with_its_code(
    number: signal.Signals, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, calls = Trainer._step, []

    def stopped(self: Trainer, *arguments: Any) -> Any:
        calls.append(None)
        if len(calls) == 3:
            signal.raise_signal(number)
        return step(self, *arguments)

    monkeypatch.setattr(Trainer, "_step", stopped)
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    assert run("simclr", data, tmp_path / "run", *WORDS) == 128 + number
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before
    assert checkpoint(tmp_path / "run")["step"] == 3
    monkeypatch.setattr(Trainer, "_step", step)
    assert main(["simclr", "--resume", str(tmp_path / "run")]) == 0
    assert run("simclr", data, tmp_path / "whole", *WORDS) == 0
    assert_same_bits(checkpoint(tmp_path / "run"), checkpoint(tmp_path / "whole"))


def test_a_second_signal_stops_at_once(
    data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Trainer._step

    def stopped(self: Trainer, *arguments: Any) -> Any:
        if self.method.step == 3:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
        return step(self, *arguments)

    monkeypatch.setattr(Trainer, "_step", stopped)
    assert run("simclr", data, tmp_path / "run", *WORDS) == 130
    assert checkpoint(tmp_path / "run")["step"] == 2, "that of the epoch before"


# ---- disk and memory -----------------------------------------------------------------------------


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_costs_one_checkpoint(
    data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    assert run("simclr", data, folder, *WORDS, "--stop-after", "2") == 0
    # The file that the next checkpoint is written to has no room; those after it have.
    (folder / "checkpoint.pt.partial").symlink_to("/dev/full")
    capsys.readouterr()
    assert main(["simclr", "--resume", str(folder), "--progress", "false"]) == 0
    assert "no checkpoint was written at step 4: No space left" in capsys.readouterr().err
    assert checkpoint(folder)["step"] == 6 and len(rows(folder)) == 3


def test_a_disk_that_stays_full_is_an_error_of_one_line(
    data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    assert run("simclr", data, folder, *WORDS, "--stop-after", "2") == 0
    before = (folder / "checkpoint.pt").read_bytes()

    def full(state: Any, file: Any) -> None:
        file.write(b"some of it")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(torch, "save", full)
    monkeypatch.setattr(RunFolder, "append_metrics", lambda self, row: full(None, io.BytesIO()))
    capsys.readouterr()
    assert main(["simclr", "--resume", str(folder)]) == 2
    said = capsys.readouterr().err.splitlines()
    assert "the last checkpoint could not be written: No space left" in said[-1]
    assert any("epoch 1 is missing in" in line for line in said)
    assert (folder / "checkpoint.pt").read_bytes() == before
    assert not list(folder.glob("*.partial"))


def test_events_on_a_full_disk_do_not_hold_up_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Full:
        def __init__(self, path: str) -> None:
            pass

        def write(self, data: bytes) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        flush = close = lambda self: self.write(b"")

    monkeypatch.setattr("ssltrain.logs.RecordWriter", Full)
    events = Events(tmp_path / "events", purge_after=0)
    for step in range(100):
        events.add("loss", 1.0, step)
    events.flush()
    events.close()
    assert capsys.readouterr().err.count("no more TensorBoard events") == 1


def test_a_line_after_a_cut_one_is_a_line_of_its_own(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.keep_metrics_before(0)
    row = dict.fromkeys(METRICS, 1.5) | {"epoch": 0, "step": 1}
    folder.append_metrics(row)
    with folder.metrics.open("ab") as file:
        file.write(b"1,2,0.5")
    folder.append_metrics(row | {"epoch": 2})
    assert [found["epoch"] for found in folder.read_metrics()] == ["0", "2"]


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_out_of_memory_says_what_helps(
    error: Exception,
    data: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def step(*arguments: Any) -> None:
        raise error

    monkeypatch.setattr(Trainer, "_step", step)
    assert run("simclr", data, tmp_path / "run", *WORDS) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "out of memory; what helps: --micro-batch" in said


def test_other_errors_of_torch_are_not_hidden(
    data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def step(*arguments: Any) -> None:
        raise RuntimeError("a fault of ours")

    monkeypatch.setattr(Trainer, "_step", step)
    with pytest.raises(RuntimeError, match="a fault of ours"):
        run("simclr", data, tmp_path / "run", *WORDS)


# ---- losses and features -------------------------------------------------------------------------


def test_a_loss_that_is_no_number_stops_the_run(
    data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    words = [*WORDS, "--optimizer", "sgd", "--base-lr", "1e30", "--warmup", "0", "--log-every", "1"]
    assert run("simclr", data, folder, *words) == 2
    assert "the loss is nan at step" in capsys.readouterr().err
    weights = checkpoint(folder)["method"]
    assert all(value.isfinite().all() for value in weights.values())


def test_collapse_is_said_once(
    data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # A rate a thousand times too high drives all features to one place.
    words = ["--epochs", "6", "--evaluate", "false", "--optimizer", "sgd", "--base-lr", "300",
             "--warmup", "0", "--schedule", "constant"]  # fmt: skip
    assert run("moco", data, tmp_path / "run", *words) == 0
    said = capsys.readouterr().err
    assert said.count("the run has collapsed at step") == 1
    assert "what usually helps: a lower --base-lr" in said
    assert run("moco", data, tmp_path / "good", "--epochs", "3", "--evaluate", "false") == 0
    assert "collapsed" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("values", "collapsed"),
    [
        ((0.3, 6.0, -1.0), False),
        ((0.01, 6.0, -1.0), True),
        ((0.3, 1.05, -1.0), True),
        ((0.3, 6.0, -0.001), True),
        ((float("nan"), 6.0, -1.0), True),
        ((0.3, float("nan"), -1.0), True),
        ((0.3, 6.0, float("nan")), True),
    ],
)
def test_what_counts_as_collapse(values: tuple[float, float, float], collapsed: bool) -> None:
    assert has_collapsed(*values) == collapsed


# ---- what a run leaves ---------------------------------------------------------------------------


def test_kept_checkpoints_the_best_one_and_the_environment(
    data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    words = [*WORDS, "--keep-every", "2", "--knn-every", "1"]
    assert run("simclr", data, folder, *words, "--stop-after", "5") == 0
    assert main(["simclr", "--resume", str(folder)]) == 0
    assert sorted(path.name for path in folder.glob("*.pt")) == [
        "best.pt",
        "checkpoint.pt",
        "epoch-0002.pt",
    ]
    knn = [row["knn"] for row in rows(folder)]
    assert all(0.3 < value <= 1 for value in knn)
    assert checkpoint(folder)["best_knn"] == pytest.approx(max(knn))
    found = RunFolder(folder)
    assert found.read_checkpoint("best")["step"] == 2 * (knn.index(max(knn)) + 1)
    assert found.read_checkpoint("2")["step"] == 4
    sessions = json.loads((folder / "environment.json").read_text())
    assert len(sessions) == 2
    assert sessions[0]["versions"]["torch"] == torch.__version__
    for name in ("best", "2"):
        assert main(["embed", str(folder), "--checkpoint", name]) == 0
    capsys.readouterr()
    assert main(["embed", str(folder), "--checkpoint", "7"]) == 2
    said = capsys.readouterr().err
    assert "has no epoch-0007.pt; it has best.pt, checkpoint.pt, epoch-0002.pt" in said


def test_without_labels_there_is_no_knn(tmp_path: Path) -> None:
    images, labels = digits(168)
    data = write_parts(tmp_path / "a.npz", images, labels * 0 - 1, train=128)
    assert run("simclr", data, tmp_path / "run", *WORDS, "--knn-every", "1") == 0
    assert all(row["knn"] != row["knn"] for row in rows(tmp_path / "run"))
    assert not (tmp_path / "run" / "best.pt").exists()


def test_a_pipe_gets_whole_lines(
    tmp_path: Path, data: str, capfd: pytest.CaptureFixture[str]
) -> None:
    words = [word for word in SMALL if word not in ("--progress", "false")]
    assert main(["simclr", "--data", data, "--run", str(tmp_path / "r"), *words, *WORDS]) == 0
    said = capfd.readouterr().err
    assert "\r" not in said and said.endswith("\n")
    lines = [line for line in said.splitlines() if line.startswith("simclr: epoch")]
    assert lines[0].startswith("simclr: epoch 1 of 3: loss ") and lines[0].endswith(" s left")
    assert lines[-1].startswith("simclr: epoch 3 of 3: loss ") and "left" not in lines[-1]


def test_lines_are_not_more_often_than_one_can_read(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = [100.0]
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    progress = Progress("simclr", total=100, done=0, steps_per_epoch=1, show=True)
    for step in range(1, 101):
        clock[0] += 1
        progress.epoch(step, "loss 1")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 11 and lines[0] == "simclr: epoch 1 of 100: loss 1; 99 s left"
    assert lines[-1] == "simclr: epoch 100 of 100: loss 1"
