# SPDX-License-Identifier: Apache-2.0
"""Builds the source archive and the wheel into dist/, checks them and installs the wheel: ``make wheel``.

1. The source archive, and from it the wheel, in pip's isolation: what it holds is enough to build.
2. auditwheel gives the wheel the manylinux tag that its symbols allow, which must not be newer than that of
   torch's own wheels.  The OpenMP runtime is torch's, so no library may have been copied into it.
3. abi3audit: the module keeps to the limited API of the Python that the wheel names.
4. For each ``--python`` a new environment gets the wheel and torch; .ci/smoke.py uses them with a PATH that
   has no compiler.  With ``--kernels`` the folder for Hugging Face's ``kernels`` is loaded by it too.

The wheel holds no sslkernels._cuda: that module belongs to one Python and one CUDA, and is built from the
source archive where nvcc is (SSLKERNELS_CUDA=1).
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import hf_kernel

ROOT = Path(__file__).resolve().parents[1]
DIST = ROOT / "dist"
# Of torch's wheels since 2.6: a machine that runs torch has this glibc.
NEWEST_MANYLINUX = (2, 28)
PYTHONS = [f"python3.{minor}" for minor in range(10, 15)]


def run(*command: str | Path, **env: str) -> str:
    """Run a command and return what it printed.

    Raises:
        SystemExit: It failed; what it printed is in it.
    """
    done = subprocess.run(
        [str(part) for part in command],
        cwd=ROOT,
        env={**os.environ, **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{done.stdout}\nwheel: {shlex.join(map(str, command))} failed")
    return done.stdout


def usable(python: str) -> bool:
    """Whether an interpreter runs and can make an environment; one of pyenv's names may stand for none."""
    command = [python, "-c", "import ensurepip, venv"]
    try:
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except OSError:
        return False


def build(folder: Path) -> Path:
    """The source archive into dist/, and the wheel from it into ``folder``."""
    shutil.rmtree(DIST, ignore_errors=True)
    run(sys.executable, "-m", "build", "--sdist", "--outdir", DIST, ROOT)
    (archive,) = DIST.glob("sslkernels-*.tar.gz")
    run(
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "-w",
        folder,
        archive,
        SSLKERNELS_CUDA="0",
    )
    (wheel,) = folder.glob("sslkernels-*.whl")
    return wheel


def audit(wheel: Path) -> Path:
    """Give the wheel its platform tag, into dist/, and check it.

    Raises:
        SystemExit: It needs a newer system than torch does, or leaves the limited API.
    """
    tools = {"PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])}
    run(sys.executable, "-m", "auditwheel", "repair", "--plat", "auto", "-w", DIST, wheel, **tools)
    (repaired,) = DIST.glob("sslkernels-*.whl")
    tag = re.search(r"-cp310-abi3-manylinux_(\d+)_(\d+)_", repaired.name)
    if tag is None or (int(tag[1]), int(tag[2])) > NEWEST_MANYLINUX:
        raise SystemExit(
            f"wheel: the tag must be cp310-abi3-manylinux of at most {NEWEST_MANYLINUX}, got {repaired.name}"
        )
    held = zipfile.ZipFile(repaired).namelist()
    extra = [name for name in held if ".so" in name and name != "sslkernels/_C.abi3.so"]
    if extra:
        raise SystemExit(f"wheel: no library but the module belongs into it, got {extra}")
    run(sys.executable, "-m", "abi3audit", "--strict", repaired, **tools)
    return repaired


def install(wheel: Path, python: str, folder: Path, flags: list[str], kernels: Path | None) -> None:
    """Install into a new environment of one Python and use it where there is no compiler."""
    venv, nothing = folder / "venv", folder / "nothing"
    run(python, "-m", "venv", venv)
    nothing.mkdir()
    there = venv / "bin/python"
    wanted: list[str | Path] = [wheel] if kernels is None else [wheel, "kernels"]
    # As where there is no compiler: pip could not build anything, and must not need to.
    run(
        there,
        "-m",
        "pip",
        "install",
        "-q",
        "--only-binary",
        ":all:",
        *flags,
        *wanted,
        PATH=str(nothing),
    )
    without = {"PATH": str(nothing), "PYTHONPATH": "", "CC": "", "CXX": ""}
    print(run(there, "-I", ROOT / ".ci/smoke.py", **without).strip())
    if kernels is not None:
        run(there, "-m", "pip", "uninstall", "-q", "-y", "sslkernels")
        print(run(there, "-I", ROOT / ".ci/smoke.py", "--kernels", kernels, **without).strip())
    shutil.rmtree(venv)


def main() -> int:
    """Do all of it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--python",
        action="append",
        help="interpreter to install into; default: the two newest found; '' for none",
    )
    parser.add_argument(
        "--pip-flags", default="", help="for installing torch, for example an index"
    )
    parser.add_argument(
        "--kernels", action="store_true", help="also load with Hugging Face's kernels package"
    )
    parser.add_argument("--wheel", type=Path, help="a wheel that was built before: only install it")
    args = parser.parse_args()
    pythons = (
        [p for p in args.python if p] if args.python else [p for p in PYTHONS if usable(p)][-2:]
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        wheel = args.wheel.resolve() if args.wheel else audit(build(folder))
        print(
            f"wheel: {wheel.name}, {wheel.stat().st_size / 1e6:.1f} MB (built with {platform.libc_ver()[1]})"
        )
        layout = hf_kernel.from_wheel(wheel, DIST / "hf")
        print(f"wheel: for kernels.get_local_kernel: {layout.relative_to(ROOT)}")
        for python in pythons:
            place = folder / Path(python).name
            place.mkdir()
            flags = shlex.split(args.pip_flags)
            install(wheel, python, place, flags, layout if args.kernels else None)
    return 0


if __name__ == "__main__":
    sys.exit(main())
