# SPDX-License-Identifier: Apache-2.0
"""The commands that look at runs, a dry run, completions; each file they write is read again."""

from __future__ import annotations

import csv
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("kornia", reason="needs the packages of the trainers")

from ssltrain.cli import main
from ssltrain.config import METHODS, TrainConfig
from ssltrain.data import load
from ssltrain.evaluate import confusion, embed, trained_encoder
from ssltrain.neighbours import nearest, vote
from ssltrain.plots import spread_rows
from ssltrain.runs import RunFolder
from ssltrain_helpers import SMALL, checkpoint, digits, run, write_parts

WORDS = ["--epochs", "2", "--evaluate", "false", "--knn-every", "1"]
DUMMY_PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One thread, and maps without t-SNE: other tests draw those."""
    monkeypatch.setattr("ssltrain.plots.flat_map", lambda features: features[:, :2])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs on the same data, a/ and b/."""
    folder = tmp_path_factory.mktemp("runs")
    data = write_parts(folder / "some.npz", *digits(168), train=128)
    network = ["--stem-stride", "2", "--pool", "2"]  # an export must build the same one
    for name, seed in (("a", "0"), ("b", "1")):
        assert run("simclr", data, folder / name, *WORDS, *network, "--seed", seed) == 0
    return folder


def said(capsys: pytest.CaptureFixture[str], *words: str | Path) -> str:
    capsys.readouterr()
    assert main([str(word) for word in words]) == 0
    return capsys.readouterr().out


def features_of(folder: Path) -> tuple[np.ndarray, np.ndarray, Any]:
    config = TrainConfig.load(folder / "config.yaml")
    data = load(config.data)
    encoder = trained_encoder(RunFolder(folder).read_checkpoint(), config, data)
    device = torch.device("cpu")
    return embed(encoder, data.train.images, device), embed(encoder, data.test.images, device), data


# ---- neighbours ----------------------------------------------------------------------------------


def test_neighbours_in_blocks_are_those_of_the_whole_matrix(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("ssltrain.neighbours.BLOCK", 7)
    queries, bank = torch.randn(30, 5), torch.randn(50, 5)
    whole = torch.nn.functional.cosine_similarity(queries[:, None], bank, dim=2)
    similarities, rows = nearest(queries, bank, 4)
    torch.testing.assert_close(similarities, whole.topk(4, dim=1).values)
    assert torch.equal(rows, whole.topk(4, dim=1).indices)
    own = torch.nn.functional.cosine_similarity(bank[:, None], bank, dim=2)
    own.fill_diagonal_(-1)
    _, rows = nearest(bank, bank, 3, leave_out_self=True)
    assert torch.equal(rows, own.topk(3, dim=1).indices)


def test_votes_are_weighted_by_distance() -> None:
    from sklearn.neighbors import KNeighborsClassifier

    similarities = torch.tensor([[0.9, 0.5, 0.5], [0.9, 0.85, 0.85], [1.0, 0.99, 0.99]])
    labels = torch.tensor([[2, 0, 0], [2, 0, 0], [1, 0, 0]])
    assert vote(similarities, labels).tolist() == [2, 0, 1]
    generator = np.random.default_rng(0)
    bank, queries = generator.normal(size=(80, 6)), generator.normal(size=(40, 6))
    labels = generator.integers(0, 4, 80)
    theirs = KNeighborsClassifier(5, metric="cosine", weights="distance").fit(bank, labels)
    found = nearest(torch.from_numpy(queries), torch.from_numpy(bank), 5)
    ours = vote(found[0], torch.from_numpy(labels)[found[1]])
    assert ours.tolist() == theirs.predict(queries).tolist()


def test_a_page_of_neighbours(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = trained / "page.png"
    few = write_parts(trained / "few.npz", *(array[255:] for array in digits(260)), train=2)
    for words in (["--queries", "3", "--count", "2"], ["--data", few, "--count", "500"]):
        text = said(capsys, "neighbors", trained / "a", *words, "--out", out)
        assert str(out) in text and out.read_bytes().startswith(DUMMY_PNG)
        out.unlink()
    assert main(["neighbors", str(trained / "a"), "--count", "0"]) == 2
    assert "--count must be at least 1, got 0" in capsys.readouterr().err


def test_queries_are_of_all_classes(tmp_path: Path) -> None:
    images, labels = digits(60)
    data = load(write_parts(tmp_path / "a.npz", images, np.sort(labels % 3), train=10))
    rows = spread_rows(data.test, 6)
    assert sorted(data.test.labels[rows].tolist()) == [0, 0, 1, 1, 2, 2]
    data = load(write_parts(tmp_path / "b.npz", images, labels * 0 - 1, train=10))
    assert spread_rows(data.test, 3).tolist() == [0, 24, 49]
    assert spread_rows(data.test, 500).tolist() == list(range(50))


# ---- embed and eval ------------------------------------------------------------------------------


def test_features_as_a_table(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = trained / "features.csv"
    said(capsys, "embed", trained / "a", "--out", out)
    train, test, data = features_of(trained / "a")
    with out.open() as file:
        head, *lines = csv.reader(file)
    assert head[:4] == ["part", "image", "class", "f0"] and len(head) == 3 + train.shape[1]
    assert len(lines) == len(train) + len(test)
    first = lines[len(train)]
    assert first[:3] == ["test", "test image 0", data.class_names[data.test.labels[0]]]
    assert np.allclose(np.array(first[3:], float), test[0], rtol=1e-5, atol=1e-6)


def test_mix_ups_are_counted(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    truth, taken = np.array([0, 0, 1, 2, 2, 2]), np.array([0, 1, 1, 2, 2, 0])
    assert confusion(truth, taken, 4).tolist() == [
        [1, 1, 0, 0],
        [0, 1, 0, 0],
        [1, 0, 2, 0],
        [0, 0, 0, 0],
    ]
    said(capsys, "eval", trained / "a")
    results = json.loads((trained / "a" / "results.json").read_text())
    counts = np.array(results["confusion"])
    assert counts.shape == (10, 10) and counts.sum() == 40
    assert np.trace(counts) / 40 == pytest.approx(results["accuracy"]["trained"]["linear"])
    assert (trained / "a" / "confusion.png").read_bytes().startswith(DUMMY_PNG)


# ---- export --------------------------------------------------------------------------------------


def used(example: str, images: torch.Tensor) -> torch.Tensor:
    """What the printed lines compute."""
    scope: dict[str, Any] = {"images": images}
    exec(example, scope)  # noqa: S102  our own lines
    found = scope["features"]
    return found if torch.is_tensor(found) else torch.from_numpy(found)


@pytest.mark.parametrize("form", ["torch", "safetensors", "onnx"])
def test_an_exported_encoder_gives_the_same_features(
    form: str, trained: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = {"safetensors": ["safetensors"], "onnx": ["onnx", "onnxscript", "onnxruntime"]}
    for package in needed.get(form, []):
        pytest.importorskip(package, reason=f"ssltrain export --format {form} needs it")
    suffix = {"torch": "pt"}.get(form, form)
    out = trained / f"own.{suffix}"
    text = said(capsys, "export", trained / "a", "--format", form, "--out", out)
    assert text.startswith(f"wrote {out}; to use it:")
    train, _, data = features_of(trained / "a")
    images = data.train.images.read(torch.arange(6)).float() / 255
    with torch.no_grad():
        given = images.numpy() if form == "onnx" else images
        found = used(text.split("\n", 2)[2], given)
    torch.testing.assert_close(found, torch.from_numpy(train[:6]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("form", "package"), [("safetensors", "safetensors"), ("onnx", "onnx")])
def test_a_missing_package_is_asked_for(
    form: str,
    package: str,
    trained: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in (package, f"{package}.torch"):
        monkeypatch.setitem(sys.modules, name, None)
    assert main(["export", str(trained / "a"), "--format", form]) == 2
    line = capsys.readouterr().err
    assert f"--format {form} needs the package {package}: pip install" in line
    assert line.count("\n") == 1


# ---- compare and report --------------------------------------------------------------------------


def test_runs_side_by_side(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "both.png"
    text = said(capsys, "compare", trained / "a", trained / "b", "--out", out)
    lines = text.splitlines()
    assert lines[0].split()[:3] == ["run", "method", "epochs"]
    assert [line.split()[0] for line in lines[1:3]] == ["a", "b"]
    assert "2 of 2" in lines[1] and "SimCLR" in lines[1]
    assert "  seed: 0, 1" in lines
    assert out.read_bytes().startswith(DUMMY_PNG)
    # Runs of the same name in other folders are told apart.
    shutil.copytree(trained / "a", tmp_path / "more" / "a")
    text = said(capsys, "compare", trained / "a", tmp_path / "more" / "a", "--out", out)
    assert [line.split()[0] for line in text.splitlines()[1:3]] == [f"{trained.name}/a", "more/a"]
    (tmp_path / "more" / "a" / "metrics.csv").unlink()
    assert main(["compare", str(tmp_path / "more" / "a"), "--out", str(out)]) == 2
    assert "no epoch of these runs has ended yet" in capsys.readouterr().err


class _Page(HTMLParser):
    """Open elements, pictures and text of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.pictures: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if tag == "img":
            self.pictures.append(dict(attributes)["src"] or "")
        elif tag not in ("meta", "!doctype"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_a_page_about_a_run(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(trained / "b", folder)
    said(capsys, "eval", folder)
    text = said(capsys, "report", folder)
    assert text.strip() == f"wrote {folder / 'report.html'}"
    page = _Page()
    page.feed((folder / "report.html").read_text())
    assert page.open == [] and len(page.pictures) == 3
    assert all(source.startswith("data:image/png;base64,") for source in page.pictures)
    words = " ".join(page.text)
    assert "SimCLR on some, seed 1" in words and "2 of 2 epochs" in words
    accuracy = json.loads((folder / "results.json").read_text())["accuracy"]["trained"]
    assert f"{accuracy['knn']:.4f}" in words
    assert torch.__version__ in words and "projector_hidden" in words


def test_a_page_about_a_run_that_has_only_begun(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = RunFolder.create(TrainConfig(run=str(tmp_path / "run"), data="<b>"), "x")
    said(capsys, "report", folder.path)
    text = folder.report.read_text()
    assert "No epoch has ended yet" in text and "was not evaluated" in text
    assert "<b>" not in text and "&lt;b&gt;" in text


# ---- dry run and completions ---------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_a_dry_run_writes_nothing(
    method: str,
    trained: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["--data", trained / "some.npz", *SMALL, "--epochs", "7", "--dry-run"]
    text = said(capsys, method, *words)
    assert "128 training and 40 test images of 1 x 8 x 8, 10 classes" in text
    assert re.search(r"7 epochs of 2 steps of 64 images: 14 steps on cpu, about \d+ ms each", text)
    assert text.endswith("nothing was written\n") and not list(tmp_path.iterdir())


def test_a_dry_run_of_a_run_that_goes_on_changes_nothing(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.read_bytes() for path in (trained / "a").iterdir() if path.is_file()}
    said(capsys, "simclr", "--resume", trained / "a", "--epochs", "9", "--dry-run")
    after = {path: path.read_bytes() for path in (trained / "a").iterdir() if path.is_file()}
    assert before == after and checkpoint(trained / "a")["step"] == 4


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("ssltrain sim", {"simclr", "simsiam"}),
        ("ssltrain simclr --loss-b", {"--loss-backend"}),
        ("ssltrain simclr --optimizer a", {"adamw"}),
        ("ssltrain moco --symmetric ", {"true", "false"}),
        ("ssltrain com", {"compare", "completion"}),
    ],
)
def test_bash_completes(typed: str, expected: set[str], capsys: pytest.CaptureFixture[str]) -> None:
    words = typed.split(" ")
    quoted = " ".join(f"'{word}'" for word in words)
    ask = (
        said(capsys, "completion", "bash")
        + f"COMP_WORDS=({quoted}); COMP_CWORD={len(words) - 1}; _ssltrain\n"
        + 'printf "%s\\n" "${COMPREPLY[@]}"\n'
    )
    done = subprocess.run(["bash", "-c", ask], capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) == expected and done.stderr == ""


def test_other_shells_get_a_script(capsys: pytest.CaptureFixture[str]) -> None:
    assert said(capsys, "completion", "zsh").startswith("autoload -U +X bashcompinit")
    fish = said(capsys, "completion", "fish")
    assert "-l optimizer -x -a 'sgd adamw lars'" in fish and "-l batch-size -r" in fish
    assert main(["completion", "tcsh"]) == 2
