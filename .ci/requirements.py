# SPDX-License-Identifier: Apache-2.0
"""Prints the requirements of extras in pyproject.toml, one a line: ``requirements.py train dev``.

pip can install an extra only together with the package; the Makefile uses the package in place.
"""

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

try:
    import tomllib
except ImportError:  # Python 3.10
    from pip._vendor import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]


def project_table() -> dict[str, Any]:
    """The table [project] of pyproject.toml."""
    return tomllib.loads(ROOT.joinpath("pyproject.toml").read_text("utf-8"))["project"]


def requirements(extras: Iterable[str]) -> list[str]:
    """What the package and these extras need, each once."""
    project = project_table()
    wanted = list(project["dependencies"])
    for extra in extras:
        wanted += project["optional-dependencies"][extra]
    return list(dict.fromkeys(wanted))


if __name__ == "__main__":
    print("\n".join(requirements(sys.argv[1:])))
