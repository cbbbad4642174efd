# SPDX-License-Identifier: Apache-2.0
"""CLIP: captions are read and must be there, pairs find each other, plain PyTorch agrees."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("kornia", reason="needs the packages of the trainers")

from PIL import Image
from ssltrain import eager
from ssltrain.cli import main
from ssltrain.data import DataOptions, load
from ssltrain.retrieval import ranks, scores
from ssltrain.text import BUCKETS, TextEncoder, pieces, tokenize
from ssltrain_helpers import SMALL, checkpoint, digits, rows, write_parts

import sslkernels

pytestmark = pytest.mark.usefixtures("one_thread")

COLOURS = ("red", "green", "blue", "yellow", "white", "black")
SHAPES = ("disc", "square", "cross", "stripe")


def draw(colour: str, shape: str, shift: int) -> np.ndarray:
    """A picture of a coloured shape on grey, uint8 [16, 16, 3]."""
    values = {"red": (255, 0, 0), "green": (0, 200, 0), "blue": (0, 0, 255)}
    values |= {"yellow": (255, 255, 0), "white": (255, 255, 255), "black": (0, 0, 0)}
    y, x = np.mgrid[:16, :16] - 8 + shift % 3
    r = 4 + shift % 2
    inside = {
        "disc": x**2 + y**2 <= r**2,
        "square": (abs(x) < r) & (abs(y) < r),
        "cross": (abs(x) < 2) | (abs(y) < 2),
        "stripe": abs(x + y) < 3,
    }[shape]
    picture = np.full((16, 16, 3), 128, np.uint8)
    picture[inside] = values[colour]
    return picture


def write_pairs(folder: Path, test: int = 1) -> Path:
    """A folder of pairs: every colour with every shape, a few times, and their descriptions."""
    lines = []
    for part, count in (("train", 6), ("test", test)):
        (folder / part).mkdir(parents=True)
        for colour in COLOURS:
            for shape in SHAPES:
                for shift in range(count):
                    name = f"{part}/{colour}-{shape}-{shift}.png"
                    Image.fromarray(draw(colour, shape, shift)).save(folder / name)
                    lines.append((name, f"a {colour} {shape}"))
    with (folder / "metadata.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("file_name", "text"), *lines])
    return folder


WORDS = [*SMALL, "--batch-size", "72", "--image-size", "16", "--base-lr", "0.03", "--noise", "0"]
WORDS += ["--rotate", "0", "--translate", "0.1", "--gray", "0", "--jitter", "0.1"]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("data") / "shapes")


def test_held_out_pairs_find_each_other(
    pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    assert main(["clip", "--data", str(pairs), "--run", str(folder), *WORDS, "--epochs", "30"]) == 0
    found = json.loads((folder / "retrieval.json").read_text())
    assert found["pairs"] == 24 and found["chance"]["recall@1"] == 1 / 24
    for direction in ("text", "image"):
        assert found[direction]["recall@1"] > 10 / 24, found
        assert found[direction]["recall@1"] <= found[direction]["recall@5"]
    said = capsys.readouterr().out
    assert "24 held-out pairs" in said and "images to captions" in said
    with Image.open(folder / "retrieval.png") as picture:
        assert min(picture.size) > 300
    assert main(["eval", str(folder)]) == 0
    assert json.loads((folder / "retrieval.json").read_text()) == found
    assert main(["report", str(folder)]) == 0
    assert "Captions and images" in (folder / "report.html").read_text()
    scale = checkpoint(folder)["method"]["online.log_scale"]
    assert scale != math.log(10) and 0 <= scale <= math.log(100)


def test_a_run_resumes_by_its_captions(
    pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = write_pairs(tmp_path / "own")
    folder = tmp_path / "run"
    words = ["clip", "--data", str(own), "--run", str(folder), *WORDS, "--epochs", "2"]
    assert main([*words, "--stop-after", "1", "--evaluate", "false"]) == 0
    table = own / "metadata.csv"
    table.write_text(table.read_text().replace("a red disc", "a round red thing", 1))
    assert main(["clip", "--resume", str(folder)]) == 2
    assert "1 training image has another caption (first train/red-disc" in capsys.readouterr().err
    assert main(["clip", "--resume", str(folder), "--accept-changed-data", "true"]) == 0
    assert len(rows(folder)) == 2


def test_captions_that_are_missing_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images, labels = digits(60)
    np.savez(tmp_path / "plain.npz", images=images, labels=labels)
    words = ["--dry-run", "--batch-size", "16"]
    assert main(["clip", "--data", str(tmp_path / "plain.npz"), *words]) == 2
    assert "plain has no captions" in capsys.readouterr().err
    np.savez(tmp_path / "short.npz", images=images, captions=np.array(["a"] * 59))
    assert main(["clip", "--data", str(tmp_path / "short.npz"), *words]) == 2
    assert "captions must be one text an image, got [59]" in capsys.readouterr().err
    folder = write_pairs(tmp_path / "pairs")
    table = folder / "metadata.csv"
    lines = table.read_text().splitlines()
    table.write_text("\n".join(line for line in lines if "train/blue-cross-2" not in line))
    assert main(["clip", "--data", str(folder), *words]) == 2
    said = capsys.readouterr().err
    assert "1 of the 144 images of pairs have no caption (first train/blue-cross-2.png)" in said
    table.write_text("file_name,species\ntrain/blue-cross-2.png,cat\n")
    assert load(str(folder), DataOptions()).train.captions is None


def test_captions_follow_their_images_into_the_parts(tmp_path: Path) -> None:
    images, labels = digits(90)
    captions = np.array([f"digit {label}" for label in labels])
    np.savez(tmp_path / "a.npz", images=images, labels=labels, captions=captions)
    data = load(str(tmp_path / "a.npz"), DataOptions())
    assert len(data.train) + len(data.test) == 90 and len(data.test) > 5
    for part in (data.train, data.test):
        assert part.captions is not None and part.labels is not None
        assert part.captions == [f"digit {data.class_names[label]}" for label in part.labels]
    path = write_parts(tmp_path / "b.npz", images, labels, train=70)
    given = load(path, DataOptions()).test.captions
    assert given is not None and len(given) == 20 and given[0].endswith(f"hand {70 % 5}")


def test_tokens_are_words_and_their_parts() -> None:
    assert pieces("A Grüße-72") == ["<a>", "<a>", "<grüsse>", "<gr", "grü", "rüs", "üss", "sse", "se>",
                                   "<72>", "<72", "72>"]  # fmt: skip
    tokens = tokenize(["a red disc", "", "🙂 a red disc"])
    assert tokens.dtype == torch.int32 and tokens[1].eq(0).all() and int(tokens.max()) < BUCKETS
    assert torch.equal(tokens[0], tokens[2])
    torch.manual_seed(0)
    tower = TextEncoder(8, 4)
    wide = torch.cat([tokens, torch.zeros(3, 7, dtype=torch.int32)], 1)
    torch.testing.assert_close(tower(wide), tower(tokens))
    assert tower(tokens).isfinite().all()


def test_ranks_count_what_is_more_similar() -> None:
    torch.manual_seed(1)
    x, y = (torch.nn.functional.normalize(torch.randn(300, 4)) for _ in range(2))
    table = x @ y.T
    expected = [(row > row[i]).sum().item() for i, row in enumerate(table)]
    assert ranks(x, y).tolist() == expected
    found = scores(x, x)
    assert found["text"]["recall@1"] == 1 and found["image"]["median rank"] == 1


def test_the_plain_loss_is_the_fused_one() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(13, 6, requires_grad=True), torch.randn(13, 6, requires_grad=True)
    scale = torch.tensor(7.0, requires_grad=True)
    found = []
    for ops in (sslkernels, eager):
        loss, metrics = ops.clip_loss(x, y, scale, normalize=True, return_metrics=True)
        found.append([loss, *metrics, *torch.autograd.grad(loss, [x, y, scale])])
        assert torch.equal(ops.clip_loss(x, y, scale, normalize=True), loss)
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-6)
