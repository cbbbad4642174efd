# SPDX-License-Identifier: Apache-2.0
"""What the Makefile sets up: the command in place, and pins that the public index can satisfy."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest
from helpers import install_in_place

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / ".ci"))

import requirements  # noqa: E402
import resolve  # noqa: E402


def package(name: str, version: str, *needs: str) -> dict[str, Any]:
    """As pip's report has it."""
    return {"metadata": {"name": name, "version": version, "requires_dist": list(needs)}}


PINS = {"torch": "2.13.0", "triton": "3.7.1", "numpy": "2.4.6", "pytorch-optimizer": "4.1.0"}
GOOD = {
    "install": [
        package("torch", "2.13.0", "sympy>=1", 'triton==3.7.1; platform_system == "Linux"'),
        package("triton", "3.7.1"),
        package("numpy", "2.4.6"),
        package("pytorch_optimizer", "4.1.0"),
        package("info-nce-pytorch", "0.1.4"),
        package("nvidia-cudnn-cu13", "9.20.0.48"),
        package("cuda-bindings", "13.5.0"),
    ]
}


def found(change: dict[str, Any], pins: dict[str, str] | None = None) -> list[str]:
    report = copy.deepcopy(GOOD)
    for i, entry in change.items():
        if entry is None:
            del report["install"][i]
        else:
            report["install"].insert(i, entry)
    return resolve.problems(report, pins or PINS, ["info-nce-pytorch"])


def test_a_good_answer_has_no_problems() -> None:
    """CUDA libraries need no pin, and one that pyproject.toml names exactly doesn't either."""
    assert found({}) == []
    local = copy.deepcopy(GOOD)
    local["install"][0]["metadata"]["version"] = "2.13.0+cu130"
    assert resolve.problems(local, PINS, ["info-nce-pytorch"]) == []


def test_torch_and_triton_must_agree() -> None:
    """The pin of triton is the one that torch names, not a newer one."""
    lines = found({}, {**PINS, "triton": "3.9.0"})
    assert lines[0] == "torch 2.13.0 requires triton==3.7.1, constraints.txt has triton==3.9.0"
    assert found({}, {k: v for k, v in PINS.items() if k != "triton"})[0].endswith("triton==None")
    assert found({0: None})[0] == "torch is not among the packages that were resolved"


def test_every_package_has_a_pin_and_every_pin_a_package() -> None:
    assert found({0: package("Jinja2", "3.1.6")}) == [
        "jinja2 has no pin: constraints.txt lacks jinja2==3.1.6"
    ]
    assert found({2: None}) == ["numpy is pinned and nothing needs it"]
    assert found({}, {**PINS, "numpy": "2.4.5"}) == ["numpy is pinned to 2.4.5, 2.4.6 was resolved"]
    # What the Makefile installs by name is needed by nobody else.
    assert found({}, {**PINS, "lightly": "1.6.0", "pip": "26.3"}) == []


def test_nothing_local_is_seen() -> None:
    """The machine's certificates and proxy stay; what names a source of packages goes."""
    env = {
        "PATH": "/bin",
        "PIP_CERT": "c.pem",
        "PIP_PROXY": "p",
        "PIP_FIND_LINKS": "/wheels",
        "PIP_NO_INDEX": "1",
        "PIP_CONSTRAINT": "c.txt",
        "PIP_EXTRA_INDEX_URL": "file:///simple",
        "PIP_INDEX_URL": "file:///simple",
        "PIP_CONFIG_FILE": "/etc/pip.conf",
        "PIP_PRE": "1",
    }
    bare = resolve.bare_environment(env)
    kept = {"PATH", "PIP_CERT", "PIP_PROXY", "PIP_CONFIG_FILE", "PIP_DISABLE_PIP_VERSION_CHECK"}
    assert set(bare) == kept and bare["PIP_CONFIG_FILE"] == os.devnull


def test_pip_reads_no_configuration_then(tmp_path: Path) -> None:
    """pip itself says so, with a configuration of the user that names wheels and a constraint."""
    folder = tmp_path / "pip"
    folder.mkdir()
    (folder / "pip.conf").write_text("[global]\nfind-links = /wheels\nconstraint = /c.txt\n")
    env = {**os.environ, "XDG_CONFIG_HOME": str(tmp_path), "XDG_CONFIG_DIRS": str(tmp_path)}

    def listed(env: dict[str, str]) -> str:
        command = [sys.executable, "-m", "pip", "config", "list"]
        return subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout

    env["PIP_FIND_LINKS"] = "/wheels"
    assert "/wheels" in listed(env)
    bare = listed(resolve.bare_environment(env))
    assert "wheels" not in bare and "constraint" not in bare


def test_a_change_of_any_input_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [tmp_path / name for name in ("constraints.txt", "pyproject.toml")]
    for file in files:
        file.write_text("a==1")
    monkeypatch.setattr(resolve, "INPUTS", files)
    before = resolve.fingerprint()
    assert resolve.fingerprint() == before
    for file in files:
        file.write_text("a==2")
        assert resolve.fingerprint() != before
        before = resolve.fingerprint()


def test_the_pins_are_read() -> None:
    """All of constraints.txt, none of pyproject.toml's ranges."""
    pins = resolve.pinned(resolve.CONSTRAINTS.read_text("utf-8").splitlines())
    lines = [line for line in resolve.CONSTRAINTS.read_text("utf-8").splitlines() if "==" in line]
    assert len(pins) == len(lines) and all(part.isdigit() for part in pins["torch"].split("."))
    assert resolve.pinned(["numpy>=1.24", "# torch==1"]) == {}
    exact = resolve.pinned(requirements.requirements(resolve.EXTRAS))
    assert not set(exact) & set(pins), "one place for a version"


def test_every_pin_satisfies_its_requirement() -> None:
    """pyproject.toml's lower bounds don't exclude what is tested."""
    from packaging.requirements import Requirement

    pins = resolve.pinned(resolve.CONSTRAINTS.read_text("utf-8").splitlines())
    for line in requirements.requirements(resolve.EXTRAS):
        need = Requirement(line)
        pin = pins.get(resolve.canonical(need.name))
        assert pin is None or need.specifier.contains(pin), f"{line} and the pin {pin}"


def test_the_command_is_there_after_the_set_up(tmp_path: Path) -> None:
    """``ssltrain`` as pip would write it, where the path of the environment has spaces."""
    folder = tmp_path / "an environment"
    packages, scripts = folder / "packages", folder / "bin"
    for made in (packages, scripts):
        made.mkdir(parents=True)
    python = scripts / "python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    install_in_place(packages, scripts, str(python))
    install_in_place(packages, scripts, str(python))  # again, over the first
    assert sorted(p.name for p in scripts.iterdir()) == ["python", "ssltrain"]
    roots = (packages / "sslkernels_in_place.pth").read_text().splitlines()
    assert [Path(root) for root in roots] == [ROOT, ROOT / "python"]
    path = os.pathsep.join([str(scripts), os.environ["PATH"]])
    done = subprocess.run(
        "ssltrain --help",
        shell=True,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PATH": path, "PYTHONPATH": os.pathsep.join(roots)},
    )
    assert done.returncode == 0 and done.stdout.startswith("usage: ssltrain"), done.stderr


def test_the_set_up_of_this_environment_wrote_the_command() -> None:
    """Where the Makefile made this environment (its stamp is there)."""
    if not Path(sys.prefix, ".tools").exists():
        pytest.skip("this environment was not made by the Makefile")
    assert Path(sysconfig.get_path("scripts"), "ssltrain").exists()
