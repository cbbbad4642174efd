# SPDX-License-Identifier: Apache-2.0
"""Runs example scripts of other libraries, from checkouts of their repositories, as they are and patched.

    git clone https://github.com/lightly-ai/lightly CHECKOUTS/lightly_main    (see SCRIPTS)
    make test-peers-scripts CHECKOUTS=folder [ARGS="lightly_main"]

``stage.py`` stands in for what they would download and stops them after some steps.  First in float64,
where the losses of every step must agree to LIMIT: those after the first depend on all gradients before.
Then a few steps in float32 with larger batches, for time and memory: of the criterion alone, on what the
script last called it with, and of the whole script.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
LIMIT = 1e-6  # of a loss, in float64; a training step multiplies differences


@dataclass(frozen=True)
class Pass:
    """How a script is run: dtype, steps, and the most images of a batch, or four times its sentences."""

    dtype: str
    steps: int
    batch: int


EXACT, FAST = Pass("float64", 6, 32), Pass("float32", 2, 256)


@dataclass(frozen=True)
class Script:
    """One script.

    Args:
        path: In the checkout.
        patch: Names for ``sslkernels.patch``.
        kind: What ``stage.py`` stands in for: images, texts or clip.
        criteria: Classes whose calls are repeated alone; none of a class that runs the network itself.
        words: Arguments on the command line.
        source: Folder of the checkout to import from; None for the installed release.
    """

    path: str
    patch: tuple[str, ...]
    kind: str
    criteria: tuple[str, ...] = ()
    words: tuple[str, ...] = ()
    source: str | None = None


def _lightly(name: str, *criteria: str) -> Script:
    return Script(f"examples/pytorch/{name}.py", ("lightly",), "images", criteria)


def _texts(path: str) -> Script:
    folder = "examples/sentence_transformer/training"
    return Script(f"{folder}/{path}.py", ("sentence_transformers",), "texts")


# By folder of the checkout.
SCRIPTS = {
    "lightly_main": (
        _lightly("simclr", "NTXentLoss"),
        _lightly("moco", "NTXentLoss"),
        _lightly("nnclr", "NTXentLoss"),
        _lightly("densecl", "NTXentLoss"),
        _lightly("dcl", "DCLLoss"),
        _lightly("byol", "NegativeCosineSimilarity"),
        _lightly("simsiam", "NegativeCosineSimilarity"),
        _lightly("tico"),
    ),
    "pytorch_metric_learning": (
        Script(
            "examples/notebooks/TripletMarginLossMNIST.ipynb",
            ("pytorch_metric_learning",),
            "images",
            ("TripletMarginLoss",),
        ),
    ),
    "open_clip": tuple(
        Script("src/open_clip_train/main.py", ("open_clip",), "clip", (name,), words, "src")
        for name, words in (("ClipLoss", ()), ("SigLipLoss", ("--siglip",)))
    ),
    "sentence_transformers_main": (_texts("nli/training_nli_v2"),),
}


def run(script: Script, checkout: Path, patched: bool, how: Pass, python: str) -> dict[str, Any]:
    """What ``stage.py`` saw.

    Raises:
        SystemExit: the script failed; its output is the message.
    """
    with tempfile.TemporaryDirectory() as name:
        out = Path(name, "seen.json")
        job = {
            "path": str((checkout / script.path).resolve()),
            "patch": script.patch if patched else (),
            "kind": script.kind,
            "criteria": script.criteria,
            "words": script.words,
            "steps": how.steps,
            "batch": how.batch // 4 if script.kind == "texts" else how.batch,
            "dtype": how.dtype,
            "out": str(out),
        }
        roots = [ROOT, ROOT / "python", ROOT / "tests"]
        if script.source is not None:
            roots.insert(0, checkout.resolve() / script.source)
        env = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(map(str, roots)),
            "HF_HUB_OFFLINE": "1",
            "MPLBACKEND": "agg",
            "PYTHONWARNINGS": "ignore",
        }
        done = subprocess.run(
            [python, str(HERE / "stage.py"), json.dumps(job)],
            cwd=name,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        if done.returncode or not out.exists():
            raise SystemExit(f"{done.stdout}\nscripts: {script.path} ended with {done.returncode}")
        seen: dict[str, Any] = json.loads(out.read_text("utf-8"))
    if len(seen["losses"]) != how.steps:
        raise SystemExit(f"scripts: {script.path} made {len(seen['losses'])} steps of {how.steps}")
    return seen


def difference(plain: list[float], patched: list[float]) -> float:
    """The largest difference of two lists of losses, in units of the loss where that is above 1."""
    return max(abs(a - b) / max(1.0, abs(a)) for a, b in zip(plain, patched, strict=True))


def row(label: str, exact: list[dict[str, Any]], fast: list[dict[str, Any]]) -> str:
    """A line of the table."""
    worst = difference(*(seen["losses"] for seen in exact))
    cells = [label, f"{worst:.1e}"]
    if all("loss_ms" in seen for seen in fast):
        cells += [f"{fast[0]['rows']:.0f}"]
        cells += [" → ".join(f"{seen['loss_ms']:.2f}" for seen in fast)]
        cells += [" → ".join(f"{seen['loss_bytes'] / 2**10:.0f}" for seen in fast)]
    else:
        cells += ["–"] * 3
    cells += [" → ".join(f"{seen['seconds']:.1f}" for seen in fast)]
    cells += [" → ".join(f"{seen['peak_bytes'] / 2**20:.0f}" for seen in fast)]
    return f"| {' | '.join(cells)} |"


def main() -> int:
    """Run the scripts whose checkouts are there and print a table; 1 if losses disagree."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("checkouts", type=Path, help="folder that holds a checkout for each name")
    parser.add_argument("names", nargs="*", help=f"of {', '.join(SCRIPTS)}, or NAME/part of a path")
    parser.add_argument("--python", default=sys.executable)
    args = parser.parse_args()
    names = args.names or [name for name in SCRIPTS if (args.checkouts / name).is_dir()]
    chosen = []
    for word in names:
        name, _, part = word.partition("/")
        found = [s for s in SCRIPTS.get(name, ()) if part in s.path]
        if not found or not (args.checkouts / name).is_dir():
            parser.error(
                f"names must be of {sorted(SCRIPTS)} with a folder in {args.checkouts}, got {word}"
            )
        chosen += [(name, script) for script in found]
    if not chosen:
        parser.error(f"{args.checkouts} holds none of {sorted(SCRIPTS)}")
    print(
        "| script | losses differ by (float64) | rows | loss alone, ms | its memory, KiB "
        "| script, s | peak, MiB |"
    )
    print("|---|---|---|---|---|---|---|", flush=True)
    bad = 0
    for name, script in chosen:
        exact, fast = (
            [
                run(script, args.checkouts / name, patched, how, args.python)
                for patched in (False, True)
            ]
            for how in (EXACT, FAST)
        )
        label = " ".join((f"{name} {Path(script.path).stem}", *script.words))
        print(row(label, exact, fast), flush=True)
        if difference(*(seen["losses"] for seen in exact)) > LIMIT:
            print(f"  DIFFERENT: {[seen['losses'] for seen in exact]}", file=sys.stderr, flush=True)
            bad += 1
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
