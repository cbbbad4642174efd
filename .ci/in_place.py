# SPDX-License-Identifier: Apache-2.0
"""Makes the checkout usable from an environment, in place: ``.venv/bin/python .ci/in_place.py``.

A .pth file names the two roots of the packages, and the commands of pyproject.toml are written as pip
would write them, so that a folder with spaces in its name works too.  An editable install would do
the same and compile the extension in a folder of its own each time.
"""

import sys
import sysconfig
from pathlib import Path

from pip._vendor.distlib.scripts import ScriptMaker, enquote_executable
from requirements import ROOT, project_table


def install(packages: Path, scripts: Path, python: str) -> None:
    """Write the .pth file into ``packages``, and into ``scripts`` the commands, run by ``python``."""
    roots = f"{ROOT}\n{ROOT / 'python'}\n"
    packages.joinpath("sslkernels_in_place.pth").write_text(roots, "utf-8")
    maker = ScriptMaker(None, str(scripts))
    maker.executable = enquote_executable(python)
    maker.clobber = True
    maker.set_mode = True
    maker.variants = {""}  # ssltrain, and no ssltrain3
    maker.make_multiple(f"{name} = {entry}" for name, entry in project_table()["scripts"].items())


if __name__ == "__main__":
    paths = sysconfig.get_paths()
    install(Path(paths["purelib"]), Path(paths["scripts"]), sys.executable)
