# SPDX-License-Identifier: Apache-2.0
"""Checks that constraints.txt can be installed from the public index: ``make resolve``.

A wheel on the disk, or an index of one's own, can hide that two pins exclude each other.  So pip resolves all
extras here without any such source, from the metadata of the packages alone: it reads a few megabytes of
wheels that are gigabytes together.  Then the answer is compared with the pins:

* torch itself names one version of triton, and that is the one pinned;
* every package of the answer has a pin (but not the CUDA libraries, which come with torch's build);
* every pin belongs to a package that somebody needs.

What was found is kept in .venv until a file that it depends on changes.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from requirements import ROOT, requirements

EXTRAS = ("train", "gpu", "bench", "docs", "dev")
# Installed by the Makefile and by this script, by name; lightly without its dependencies.
BY_NAME = ("lightly", "pip", "setuptools", "wheel")
CONSTRAINTS = ROOT / "constraints.txt"
INPUTS = (CONSTRAINTS, ROOT / "pyproject.toml", ROOT / ".ci/requirements.py", Path(__file__))
# How to reach an index at all; every other PIP_ variable may name a source of packages.
KEPT = {"PIP_CERT", "PIP_CLIENT_CERT", "PIP_PROXY", "PIP_DEFAULT_TIMEOUT", "PIP_TIMEOUT"}
CUDA = re.compile(r"nvidia-.*|cuda-(bindings|pathfinder|toolkit)")


def bare_environment(env: Mapping[str, str]) -> dict[str, str]:
    """The environment without pip's configuration: no wheel folders, indexes, constraints, files."""
    kept = {k: v for k, v in env.items() if not k.startswith("PIP_") or k in KEPT}
    # Not read at all, neither the user's nor the machine's: pip's documented meaning of the null device.
    return {**kept, "PIP_CONFIG_FILE": os.devnull, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}


def canonical(name: str) -> str:
    """A package's name as indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def pinned(lines: Iterable[str]) -> dict[str, str]:
    """Name to version of ``name==version``, of requirements with and without markers."""
    found = {}
    for line in lines:
        match = re.match(r"\s*([A-Za-z0-9._-]+)\s*==\s*([^\s;,]+)", line)
        if match:
            found[canonical(match[1])] = match[2]
    return found


def problems(report: Mapping[str, Any], pins: Mapping[str, str], exact: Iterable[str]) -> list[str]:
    """What a resolution says against the pins, a line each.

    Args:
        report: pip's installation report.
        pins: Of constraints.txt.
        exact: Packages whose version pyproject.toml itself names.
    """
    packages = {canonical(p["metadata"]["name"]): p["metadata"] for p in report["install"]}
    found = []
    torch = packages.get("torch")
    if torch is None:
        found.append("torch is not among the packages that were resolved")
    else:
        named = pinned(torch.get("requires_dist", ())).get("triton")
        if named is not None and named != pins.get("triton"):
            found.append(
                f"torch {torch['version']} requires triton=={named}, constraints.txt has "
                f"triton=={pins.get('triton')}"
            )
    for name, metadata in sorted(packages.items()):
        version = metadata["version"]
        if name in pins and pins[name] != version.split("+")[0]:
            found.append(f"{name} is pinned to {pins[name]}, {version} was resolved")
        elif name not in pins and name not in exact and not CUDA.fullmatch(name):
            found.append(f"{name} has no pin: constraints.txt lacks {name}=={version}")
    unused = set(pins) - set(packages) - set(BY_NAME)
    found += [f"{name} is pinned and nothing needs it" for name in sorted(unused)]
    return found


def fingerprint() -> str:
    """Changes when the answer may."""
    digest = hashlib.sha256(f"{platform.python_version()} {platform.platform()}".encode())
    for path in INPUTS:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def pip_for_metadata(folder: Path) -> list[str]:
    """A pip in ``folder`` that resolves without downloading, as a command.

    The one that Python brings along may be older: before 25.1 a dry run fetched every wheel whole.
    """
    command = [sys.executable, "-m", "pip", "install", "-qq", "--disable-pip-version-check"]
    command += ["--target", str(folder), "-c", str(CONSTRAINTS), "pip>=25.1"]
    subprocess.run(command, check=True)
    # A wheel run as a program: no installation is looked at, and no PYTHONPATH is needed.
    return [sys.executable, str(folder / "pip")]


def resolve(pip: list[str], report: Path, wanted: list[str], *flags: str) -> dict[str, Any]:
    """Let pip resolve requirements against the public index, and read its report.

    Raises:
        SystemExit: They can't be resolved; the end of what pip said is in it.
    """
    command = [*pip, "install", "--dry-run", "--ignore-installed", "--no-input"]
    # For indexes that don't serve metadata by itself: the ends of the wheels are read.
    command += ["--use-feature=fast-deps", "--retries", "5", "-c", str(CONSTRAINTS)]
    command += ["--report", str(report), *flags, *wanted]
    done = subprocess.run(
        command,
        env=bare_environment(os.environ),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        said = "\n".join(done.stdout.splitlines()[-20:])
        raise SystemExit(
            f"{said}\nresolve: constraints.txt can't be installed from the public index"
        )
    return json.loads(report.read_text("utf-8"))


def main() -> int:
    """Resolve and compare, or find that nothing has changed."""
    if sys.version_info < (3, 11):
        print("resolve: the pins are for Python 3.11 and newer")
        return 0
    stamp, now = Path(sys.prefix, ".resolved"), fingerprint()
    if stamp.exists() and stamp.read_text() == now:
        print("resolve: nothing has changed since the pins were resolved")
        return 0
    wanted = requirements(EXTRAS)
    pins = pinned(CONSTRAINTS.read_text("utf-8").splitlines())
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pip = pip_for_metadata(folder / "pip")
        report = resolve(pip, folder / "report.json", wanted)
        by_name = [package for package in BY_NAME if package in pins]
        resolve(pip, folder / "by_name.json", by_name, "--no-deps")
    found = problems(report, pins, pinned(wanted))
    for line in found:
        print(f"resolve: {line}", file=sys.stderr)
    if found:
        return 1
    stamp.write_text(now)
    print(f"resolve: {len(report['install'])} packages, torch and triton agree")
    return 0


if __name__ == "__main__":
    sys.exit(main())
