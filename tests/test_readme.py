# SPDX-License-Identifier: Apache-2.0
"""What README shows is what runs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import HANGS_S, install_in_place
from ssltrain.cli import main

ROOT = Path(__file__).resolve().parents[1]

README = (ROOT / "README.md").read_text("utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("index", range(len(BLOCKS)))
def test_python_blocks_run_when_pasted(index: int, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", BLOCKS[index]],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=HANGS_S,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'python'}"},
    )
    assert done.returncode == 0, BLOCKS[index] + done.stderr


def shell_commands() -> list[str]:
    """The lines of README and docs that call ssltrain, without comments."""
    found = []
    for path in [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]:
        fence = None
        for line in path.read_text("utf-8").splitlines():
            if line.startswith("```"):
                fence = line if fence is None else None
            elif fence in ("```", "```bash") and re.match(r"(\S+ )*(-m )?ssltrain\b", line):
                found.append(line.split(" #")[0].strip())
    return list(dict.fromkeys(found))


def test_the_command_starts_as_pasted(tmp_path: Path) -> None:
    """From the folder of scripts that the set-up fills, in any other folder."""
    install_in_place(tmp_path, tmp_path, sys.executable)
    path = [str(tmp_path), str(Path(sys.executable).parent), os.environ["PATH"]]
    done = subprocess.run(
        ["bash", "-c", "ssltrain --help && ssltrain simclr --help && python -m ssltrain --help"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=HANGS_S,
        env={
            **os.environ,
            "PATH": os.pathsep.join(path),
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "python")]),
        },
    )
    assert done.returncode == 0 and done.stdout.count("usage: ssltrain") == 3, done.stderr


@pytest.fixture(scope="module")
def begun_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the docs call RUN."""
    run = tmp_path_factory.mktemp("readme") / "RUN"
    begin = "simclr --data digits --batch-size 64 --stop-after 1 --device cpu --run"
    assert main([*begin.split(), str(run)]) == 0
    return run


@pytest.mark.parametrize("line", shell_commands())
def test_shell_commands_parse(line: str, begun_run: Path, monkeypatch, capsys) -> None:
    """Each command and each of its flags exist: all of the line is read before help is given."""
    monkeypatch.chdir(begun_run.parent)
    words = line.translate(str.maketrans("", "", "[]")).partition("ssltrain")[2].split()
    # Where another machine has its data, this one need not.
    words = [re.sub(r"^(\w+:)/.*", rf"\g<1>{begun_run.parent}", word) for word in words]
    try:
        code = main([*(word for word in words if word != "--help"), "--help"])
    except SystemExit as stopped:
        code = stopped.code
    assert code == 0, capsys.readouterr().err
    assert "usage: ssltrain" in capsys.readouterr().out


def test_there_are_shell_commands() -> None:
    """The way in is told before what is done in there."""
    assert "ssltrain simclr --data digits" in shell_commands()
    assert any(line.startswith("torchrun") for line in shell_commands())
    assert README.index("source .venv/bin/activate") < README.index("ssltrain simclr")


def test_there_is_a_ten_line_example() -> None:
    assert BLOCKS
    assert len(BLOCKS[0].strip().splitlines()) <= 10


def test_linked_files_exist() -> None:
    for path in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.rglob("docs/**/*.md")]:
        for target in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", path.read_text("utf-8")):
            assert (path.parent / target).exists(), f"{path.name} links {target}"


def test_make_targets_that_are_named_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    for name in ("README.md", "CONTRIBUTING.md"):
        named = set(re.findall(r"`make ([a-z-]+)", (ROOT / name).read_text("utf-8")))
        assert named <= targets, f"{name} names {named - targets}"
