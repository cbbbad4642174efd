# SPDX-License-Identifier: Apache-2.0
"""Runs that go on: changed data, moved data, more epochs, weights of another run, damaged files."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

pytest.importorskip("kornia", reason="needs the packages of the trainers")

from ssltrain.cli import main, read_arguments
from ssltrain.data import load
from ssltrain.parallel import World
from ssltrain.runs import METRICS, RunFolder
from ssltrain.trainer import Trainer
from ssltrain_helpers import SMALL, assert_same_bits, checkpoint, digits, rows, run, write_parts

WORDS = ["--epochs", "2", "--evaluate", "false"]


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One thread, and maps without t-SNE: other tests draw those."""
    monkeypatch.setattr("ssltrain.plots.flat_map", lambda features: features[:, :2])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A file of 128 training and 40 test digits: two steps an epoch."""
    return Path(write_parts(tmp_path / "a.npz", *digits(168), train=128))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished run of two epochs, run/, and its data, a.npz; to be copied."""
    folder = tmp_path_factory.mktemp("finished")
    file = write_parts(folder / "a.npz", *digits(168), train=128)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    assert run("simclr", file, folder / "run", *WORDS) == 0
    torch.set_num_threads(threads)
    return folder


@pytest.fixture
def a_run(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished run and its data, in another place."""
    shutil.copytree(finished, tmp_path / "copy")
    return tmp_path / "copy" / "run"


def fails(capsys: pytest.CaptureFixture[str], *words: str | Path) -> str:
    """The one line of an error."""
    capsys.readouterr()
    assert main([str(word) for word in words]) == 2
    error = capsys.readouterr().err.splitlines()
    assert [line for line in error if not line.startswith("ssltrain: note: ")] == error[-1:]
    assert error[-1].startswith("ssltrain: error: ")
    return error[-1]


def works(capsys: pytest.CaptureFixture[str], *words: str | Path) -> str:
    """What a command says."""
    capsys.readouterr()
    assert main([str(word) for word in words]) == 0
    printed = capsys.readouterr()
    return printed.out + printed.err


# ---- changed data --------------------------------------------------------------------------------


def test_changed_data_is_refused_and_can_be_accepted(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    assert run("simclr", str(data), folder, *WORDS, "--stop-after", "3") == 0
    images, labels = digits(233)
    write_parts(data, images, labels, train=192)  # 40 of these were test images; the test is new
    said = fails(capsys, "simclr", "--resume", folder)
    assert "24 training images are new (first training image 168)" in said
    assert "40 training images are from the test part (first training image 128)" in said
    assert "41 test images are new" in said and "--accept-changed-data" in said
    assert checkpoint(folder)["step"] == 3, "a refused run stays as it was"
    said = works(capsys, "simclr", "--resume", folder, "--accept-changed-data")
    assert "note: a is not the data that the run was trained on" in said
    # One epoch was done: it goes on from there, three steps an epoch.
    assert (checkpoint(folder)["step"], checkpoint(folder)["steps_per_epoch"]) == (6, 3)
    assert [(row["epoch"], row["step"]) for row in rows(folder)] == [(0, 2), (1, 6)]
    assert "is not the data" not in works(capsys, "simclr", "--resume", folder)
    write_parts(data, *digits(168), train=128)  # that other data was accepted once is not kept
    assert "--accept-changed-data" in fails(capsys, "simclr", "--resume", folder)


def test_changed_labels_are_noticed(a_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images, labels = digits(168)
    moved = a_run.parent / "a.npz"
    write_parts(moved, images, (labels + (np.arange(168) == 5)) % 10, train=128)
    said = fails(capsys, "simclr", "--resume", a_run, "--data", moved)
    assert "1 training image has another label (first training image 5)" in said


def test_evaluation_refuses_test_images_that_were_trained_on(
    a_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images, labels = digits(168)
    swapped = a_run.parent / "swapped.npz"
    write_parts(swapped, images[::-1], labels[::-1], train=100)
    said = fails(capsys, "eval", a_run, "--data", swapped)
    assert "68 of the 68 test images of swapped were trained on" in said
    said = works(capsys, "eval", a_run, "--data", swapped, "--accept-changed-data")
    assert "note: swapped is not the data" in said and "trained encoder" in said
    others = a_run.parent / "others.npz"  # none of these was seen
    write_parts(others, *(array[168:] for array in digits(400)), train=150)
    assert "note: others is not the data" in works(capsys, "eval", a_run, "--data", others)


def test_moved_data_can_be_named(
    a_run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = a_run / "config.yaml"
    kept = yaml.safe_load(config.read_text())
    kept["data"] = str(a_run.parent / "gone.npz")
    config.write_text(yaml.safe_dump(kept))
    moved = a_run.parent / "a.npz"
    monkeypatch.chdir(a_run.parent)
    for words in (
        ["simclr", "--resume", a_run],
        ["eval", a_run],
        ["plot", a_run],
        ["embed", a_run],
    ):
        assert "no such file or folder" in fails(capsys, *words)
        said = works(capsys, *words, "--data", "a.npz")
        assert "is not the data" not in said, words
        if words[0] == "simclr":  # the new place is kept, as an absolute path
            assert yaml.safe_load(config.read_text())["data"] == str(moved)
            config.write_text(yaml.safe_dump(kept))


def test_paths_are_kept_absolute(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = [*SMALL, *WORDS, "--stop-after", "1", "--run", "here"]
    assert main(["simclr", "--data", "npz:a.npz", *words]) == 0
    (tmp_path / "else").mkdir()
    monkeypatch.chdir(tmp_path / "else")
    config = yaml.safe_load((tmp_path / "here" / "config.yaml").read_text())
    assert config["data"] == f"npz:{data}" and config["run"] == str(tmp_path / "here")
    assert main(["simclr", "--resume", "../here"]) == 0
    assert checkpoint(tmp_path / "here")["step"] == 4


def test_other_images_must_fit(a_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    colour = a_run.parent / "colour.npz"
    images = np.random.default_rng(0).integers(0, 256, (20, 8, 8, 3), dtype=np.uint8)
    np.savez(colour, images=images)
    assert "colour has images of 3 channels, the run was trained on 1" in fails(
        capsys, "embed", a_run, "--data", colour
    )
    large = a_run.parent / "large.npz"
    np.savez(large, images=images[..., 0].repeat(2, axis=1).repeat(2, axis=2))
    works(capsys, "embed", a_run, "--data", large)
    with np.load(a_run / "embeddings.npz") as arrays:
        assert len(arrays["train_features"]) + len(arrays["test_features"]) == 20


# ---- more epochs, other weights ------------------------------------------------------------------


def test_a_finished_run_goes_on_for_more_epochs(
    a_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = ["--data", str(a_run.parent / "a.npz")]
    before = checkpoint(a_run)["method"]
    said = works(capsys, "simclr", "--resume", a_run, *data)
    assert "has finished its 2 epochs; give more --epochs" in said
    works(capsys, "simclr", "--resume", a_run, *data, "--epochs", "4")
    state = checkpoint(a_run)
    assert (state["step"], [row["epoch"] for row in rows(a_run)]) == (8, [0, 1, 2, 3])
    # Half way along the cosine of the longer run, the rate is that of its half, not 0.
    lrs = [row["lr"] for row in rows(a_run)]
    assert lrs[1] == pytest.approx(0, abs=1e-9) and lrs[2] > 0.0005 and lrs[3] == 0
    moved = [k for k, v in before.items() if not torch.equal(v, state["method"][k])]
    assert len(moved) > len(before) / 2
    assert yaml.safe_load((a_run / "config.yaml").read_text())["epochs"] == 4
    said = fails(capsys, "simclr", "--resume", a_run, *data, "--epochs", "3")
    assert "the run is in epoch 4; --epochs must be at least that, got 3" in said


@pytest.mark.parametrize("method", ["simclr", "byol", "moco"])
def test_weights_of_another_run(
    a_run: Path, method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*WORDS, "--epochs", "1", "--stop-after", "1", "--base-lr", "0", "--init-from"]
    folder = tmp_path / method
    assert run(method, str(a_run.parent / "a.npz"), folder, *words, str(a_run)) == 0
    said = capsys.readouterr().err
    # MoCo's projector has no batch norm, BYOL has a predictor: these cannot be taken over.
    assert {"simclr": "", "byol": "predictor of", "moco": "projector of"}[method] in said
    assert ("start afresh" in said) == (method != "simclr")
    old, new = checkpoint(a_run)["method"], checkpoint(folder)["method"]
    prefix = "online.network." if method == "byol" else "online."
    parts = ["encoder", "projector"] if method != "moco" else ["encoder"]
    for name in (n for n in old if n.split(".")[1] in parts):
        if "running" in name or "num_batches" in name:
            continue  # a step moves these
        assert torch.equal(old[name], new[prefix + name.removeprefix("online.")]), name
        target = "target.module." + name.removeprefix("online.")
        if target in new:  # the average starts from the same weights
            torch.testing.assert_close(new[target], old[name])
    assert yaml.safe_load((folder / "config.yaml").read_text())["init_from"] == str(a_run)
    assert main([method, "--resume", str(folder)]) == 0


def test_weights_must_fit(a_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["simclr", "--data", a_run.parent / "a.npz", *SMALL, "--run", tmp_path / "new"]
    said = fails(capsys, *words, "--width", "16", "--init-from", a_run)
    assert "the checkpoint is of another network" in said
    assert "is not a run folder" in fails(capsys, *words, "--init-from", tmp_path / "none")
    assert not (tmp_path / "new").exists()


# ---- older runs and damaged files ----------------------------------------------------------------


def test_a_run_of_an_older_version_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No fingerprint, no split in its settings, relative paths; its parts stay what they were."""
    images, labels = digits(160)
    np.savez(tmp_path / "whole.npz", images=images, labels=labels)
    monkeypatch.chdir(tmp_path)
    for name in ("old", "new"):
        assert (
            run(
                "simclr",
                "whole.npz",
                tmp_path / name,
                *WORDS,
                "--stop-after",
                "2",
                "--split",
                "stratified",
            )
            == 0
        )
    config = yaml.safe_load((tmp_path / "old" / "config.yaml").read_text())
    later = [
        "split",
        "layout",
        "skip_bad_images",
        "pixel_range",
        "background",
        "cache_mb",
        "accept_changed_data",
        "init_from",
    ]
    for key in later:
        config.pop(key)
    config |= {"data": "whole.npz", "run": "old"}
    (tmp_path / "old" / "config.yaml").write_text(yaml.safe_dump(config))
    state = torch.load(tmp_path / "old" / "checkpoint.pt", weights_only=True)
    for key in ("data", "steps_per_epoch"):
        state.pop(key)
    torch.save(state, tmp_path / "old" / "checkpoint.pt")
    said = works(capsys, "simclr", "--resume", "old")
    assert "note: the checkpoint is of a version that did not keep what the data was" in said
    works(capsys, "simclr", "--resume", "new")
    assert_same_bits(checkpoint(tmp_path / "old"), checkpoint(tmp_path / "new"))
    assert checkpoint(tmp_path / "old")["step"] == 4


def damage(folder: Path, how: str) -> None:
    lines = (folder / "metrics.csv").read_text().splitlines(keepends=True)
    if how == "cut":  # the process was killed while it wrote
        lines[2] = lines[2][: len(lines[2]) // 2]
    elif how == "words":
        lines[2] = lines[2].replace(",", ",x", 1)
    elif how == "zeros":  # what some file systems leave after a crash
        lines[2] = "\0" * len(lines[2])
    elif how == "header":
        lines[0] = lines[0][:20] + "\n"
    elif how == "empty":
        lines = []
    (folder / "metrics.csv").write_text("".join(lines))


@pytest.mark.parametrize("how", ["cut", "words", "zeros", "header", "empty", "bytes", "gone"])
def test_a_damaged_line_of_metrics_is_named_and_repaired(
    a_run: Path, how: str, capsys: pytest.CaptureFixture[str]
) -> None:
    data = ["--data", str(a_run.parent / "a.npz")]
    damage(a_run, how)
    if how == "bytes":
        (a_run / "metrics.csv").write_bytes(b"\xff\xfe" + (a_run / "metrics.csv").read_bytes())
    if how == "gone":
        (a_run / "metrics.csv").unlink()
    said = works(capsys, "plot", a_run, *data)
    line = {
        "cut": "line 3",
        "words": "line 3",
        "zeros": "line 3",
        "header": "line 1",
        "bytes": "line 1",
    }.get(how)
    assert (f"metrics.csv: {line} cannot be read" in said) == (line is not None)
    works(capsys, "simclr", "--resume", a_run, *data, "--epochs", "3")
    epochs = [int(row["epoch"]) for row in rows(a_run)]
    lost = {"cut": [1], "words": [1], "zeros": [1], "empty": [0, 1], "gone": [0, 1]}.get(how, [])
    assert epochs == [epoch for epoch in range(3) if epoch not in lost]
    assert "cannot be read" not in works(capsys, "plot", a_run, *data)


def test_metrics_of_fewer_columns_are_read(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("epoch,step,loss\n0,4,1.5\n1,8,0.5\n")
    folder = RunFolder(tmp_path)
    assert [row["loss"] for row in folder.read_metrics()] == ["1.5", "0.5"]
    folder.keep_metrics_before(1)
    assert (tmp_path / "metrics.csv").read_text().splitlines()[0] == ",".join(METRICS)
    (row,) = folder.read_metrics()
    assert (row["loss"], row["top1"]) == ("1.5", "nan")


def test_stratified_batches_hold_every_class_alike(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nine in ten images are of one class; runs resume bit for bit with this order too."""
    images, labels = digits(140)
    common = np.flatnonzero(labels != 3)[:108]
    chosen = np.concatenate([np.flatnonzero(labels == 3)[:12], common])
    classes = (labels[chosen] == 3).astype(np.int64)
    path = write_parts(tmp_path / "a.npz", images[chosen], classes, train=100)
    options = ["--sampler", "stratified", "--evaluate", "false", "--epochs", "2"]
    config, _ = read_arguments("simclr", ["--data", path, *SMALL, *options, "--batch-size", "40"])
    trainer = Trainer(config, load(path), World(0, 1, torch.device("cpu")), None)
    drawn = torch.cat([trainer._order(epoch) for epoch in range(20)])
    assert torch.from_numpy(classes[:100])[drawn].double().mean().item() == pytest.approx(
        0.5, abs=0.05
    )
    assert not torch.equal(trainer._order(0), trainer._order(1))
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    assert run("simclr", path, whole, *options, "--batch-size", "40") == 0
    assert run("simclr", path, halves, *options, "--batch-size", "40", "--stop-after", "4") == 0
    assert main(["simclr", "--resume", str(halves)]) == 0
    assert_same_bits(checkpoint(halves), checkpoint(whole))
    np.savez(tmp_path / "none.npz", images=images)
    assert run("simclr", str(tmp_path / "none.npz"), tmp_path / "r", *options) == 2
    assert "--sampler stratified needs classes, and none has no labels" in capsys.readouterr().err
