# SPDX-License-Identifier: Apache-2.0
"""The code of the migration pages runs, each page as one script from top to bottom."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from helpers import HANGS_S

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted((ROOT / "docs" / "migration").glob("*.md"))


def imported(blocks: list[str]) -> set[str]:
    """The packages that a page imports: none of them is worth starting a process for if one is missing."""
    nodes = list(ast.walk(ast.parse("\n".join(blocks))))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
    return {name.partition(".")[0] for name in names}


@pytest.mark.parametrize("page", [p.stem for p in PAGES])
def test_code_of_the_page_runs(page: str, tmp_path: Path) -> None:
    text = (ROOT / "docs" / "migration" / f"{page}.md").read_text("utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert blocks
    missing = sorted(name for name in imported(blocks) if find_spec(name) is None)
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", "\n".join(blocks)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=HANGS_S,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'python'}"},
    )
    assert done.returncode == 0, done.stderr
