# SPDX-License-Identifier: Apache-2.0
"""What README shows is what runs."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text("utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("index", range(len(BLOCKS)))
def test_python_blocks_run_when_pasted(index: int, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", BLOCKS[index]],
        cwd=tmp_path, capture_output=True, text=True, check=False, timeout=300,
        env={**__import__("os").environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'python'}"},
    )  # fmt: skip
    assert done.returncode == 0, BLOCKS[index] + done.stderr


def test_there_is_a_ten_line_example() -> None:
    assert BLOCKS
    assert len(BLOCKS[0].strip().splitlines()) <= 10


def test_linked_files_exist() -> None:
    for path in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/*.md")]:
        for target in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", path.read_text("utf-8")):
            assert (path.parent / target).exists(), f"{path.name} links {target}"


def test_make_targets_that_are_named_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    for name in ("README.md", "CONTRIBUTING.md"):
        named = set(re.findall(r"`make ([a-z-]+)", (ROOT / name).read_text("utf-8")))
        assert named <= targets, f"{name} names {named - targets}"
