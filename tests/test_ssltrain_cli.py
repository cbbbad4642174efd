# SPDX-License-Identifier: Apache-2.0
"""Configuration, presets, messages and exit codes of the trainers' command line."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("jsonargparse", reason="needs the packages of the trainers")

from ssltrain.cli import main, read_arguments
from ssltrain.config import METHODS, TrainConfig
from ssltrain.errors import UserError
from ssltrain.presets import preset

PYTHON_FOLDER = Path(__file__).resolve().parents[1] / "python"


def error_line(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The one line that a failing command prints; checks the exit code too."""
    assert main(list(words)) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1 and printed.err.startswith("ssltrain: error: ")
    return printed.err


def test_config_survives_its_file(tmp_path: Path) -> None:
    config = dataclasses.replace(
        TrainConfig(), method="moco", epochs=7, base_lr=0.1 + 0.2, evaluate=False, run="with: colon"
    )
    config.save(tmp_path / "config.yaml")
    assert TrainConfig.load(tmp_path / "config.yaml") == config


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["digits", "mnist", "cifar10", "npz", "folder"])
def test_presets_are_valid(method: str, kind: str) -> None:
    config = TrainConfig.from_presets(method, "somewhere", kind).validate()
    assert config.method == method
    changed = [name for name in preset(method, kind) if name not in TrainConfig.__annotations__]
    assert changed == []


def test_flags_beat_the_file_beats_the_preset(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("epochs: 3\nbatch_size: 32\n")
    words = ["--config", str(file), "--batch-size", "64"]
    config, resume = read_arguments("simclr", words)
    assert resume is None
    assert (config.epochs, config.batch_size) == (3, 64)
    assert config.rotate == preset("simclr", "digits")["rotate"] > 0


def test_the_file_may_name_the_data(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "data_batch_1").write_bytes(b"")
    (tmp_path / "mine.yaml").write_text(f"data: {tmp_path / 'a'}\n")
    config, _ = read_arguments("simclr", ["--config", str(tmp_path / "mine.yaml")])
    assert config.base_lr == preset("simclr", "cifar10")["base_lr"]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["simclr", "--bach-size", "8"], "--bach-size"),
        (["simclr", "--batch-size", "many"], "--batch-size: expected a value of type int"),
        (["simclr", "--batch-size"], "--batch-size: expected one argument"),
        (["simclr", "--batch-size", "1"], "--batch-size must be at least 2"),
        (["simclr", "--batch-size", "5000"], "--batch-size 5000 is larger than the 1437"),
        (["simclr", "--optimizer", "magic"], "--optimizer: expected one of 'sgd', 'adamw', 'lars'"),
        (["simclr", "--temperature", "0"], "--temperature must be greater than 0, got 0"),
        (["simclr", "--micro-batch", "-1"], "--micro-batch must be at least 0, got -1"),
        (["simclr", "--data", "/no/where"], "no such file or folder: /no/where"),
        (["simclr", "--config", "/no/where.yaml"], "File does not exist: '/no/where.yaml'"),
        (["simclr", "--resume", "/no/where"], "is not a run folder"),
        (["simclr", "--device", "toaster"], "--device toaster cannot be used here"),
        (["simclr", "--backbone", "vgg"], "--backbone must be resnet, timm:NAME or module:factory"),
        (["simclr", "--backbone", "no_such_module:f"], "No module named 'no_such_module'"),
        (["simclr", "extra"], "unrecognized arguments: extra"),
        (["sinclr"], "unknown command 'sinclr'; choose one of simclr, byol, moco"),
        (["eval", "/no/where"], "is not a run folder"),
        (["eval"], "run_folder"),
        (["demo", "--run", "here"], "drop --resume and --run"),
        (["demo", "--data", "."], "nothing known in"),
    ],
)
def test_errors_are_one_line_and_exit_code_2(
    words: list[str],
    expected: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert expected in error_line(capsys, *words)
    assert list(tmp_path.iterdir()) == [], "a run that cannot start must leave no folder"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("epochz: 3\n", "epochz"),
        ("epochs: soon\n", "--epochs: expected a value of type int"),
        ("epochs: [3\n", "while parsing"),
        ("method: byol\n", "use 'ssltrain byol'"),
    ],
)
def test_bad_configuration_files(
    text: str, expected: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "bad.yaml").write_text(text)
    assert expected in error_line(capsys, "simclr", "--config", str(tmp_path / "bad.yaml"))


def test_a_run_folder_is_not_overwritten(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    line = error_line(capsys, "simclr", "--run", str(tmp_path))
    assert "already exists and is not empty" in line and "--resume" in line


def test_timm_is_asked_for_by_name(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "timm", None)  # as if it were not installed
    line = error_line(capsys, "simclr", "--backbone", "timm:resnet18")
    assert "needs timm, which is not installed" in line


def test_a_batch_must_divide_by_the_processes(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert "must divide by the 3 processes" in error_line(capsys, "byol", "--batch-size", "64")


def test_help_shows_the_preset(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["moco", "--help"])
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    assert f"default: {preset('moco', 'digits')['queue_size']})" in printed
    assert "--queue-size" in printed and "--method" not in printed


def test_module_entry_exits_with_2_and_no_traceback(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(PYTHON_FOLDER)}
    done = subprocess.run(
        [sys.executable, "-m", "ssltrain", "simclr", "--data", "gone"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
        check=False,
    )
    assert done.returncode == 2
    assert "Traceback" not in done.stderr and done.stderr.count("\n") == 1


def test_user_errors_are_value_errors() -> None:
    with pytest.raises(ValueError, match="--epochs must be at least 1"):
        dataclasses.replace(TrainConfig(), epochs=0).validate()
    assert issubclass(UserError, ValueError)
