# SPDX-License-Identifier: Apache-2.0
"""Prints the requirements of extras in pyproject.toml, one a line: ``requirements.py train dev``.

pip can install an extra only together with the package; the Makefile uses the package in place.
"""

import sys
from pathlib import Path

try:
    import tomllib
except ImportError:  # Python 3.10
    from pip._vendor import tomli as tomllib

project = tomllib.loads(Path(__file__).parents[1].joinpath("pyproject.toml").read_text("utf-8"))
project = project["project"]
wanted = list(project["dependencies"])
for extra in sys.argv[1:]:
    wanted += project["optional-dependencies"][extra]
print("\n".join(dict.fromkeys(wanted)))
