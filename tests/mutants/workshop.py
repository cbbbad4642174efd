# SPDX-License-Identifier: Apache-2.0
"""Applies a mutant to a copy of the sources, compiles what it touches, and runs tests on the copy.

Two sets of kernels are compiled, at -O1: "baseline", which every processor has and on which most mutants are
tried, and "all" for mutants of one of the other instruction sets.  Objects that a mutant does not touch are
compiled once and kept in ``build/mutants``.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import ModuleType
from unittest import mock

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "mutants"
COPIED = (
    "benchmarks",
    "csrc",
    "docs",
    "python",
    "pyproject.toml",
    "setup.py",
    "sslkernels",
    "tests",
)
# A test that goes round in circles is a mutant that was noticed.
LIMIT_S = 3600
INCLUDE = re.compile(r'^#include "([^"]+)"', re.MULTILINE)


@dataclass(frozen=True)
class Mutant:
    """One replacement in one file, and the tests that must fail because of it."""

    name: str
    file: str
    old: str  # occurs once
    new: str
    tests: tuple[str, ...]  # arguments of pytest
    isa: str = "baseline"

    def text(self, root: Path = ROOT) -> str:
        """The changed source."""
        source = (root / self.file).read_text("utf-8")
        if (count := source.count(self.old)) != 1:
            raise ValueError(f"{self.name}: the text occurs {count} times in {self.file}, not once")
        return source.replace(self.old, self.new)

    @property
    def compiled(self) -> bool:
        return self.file.startswith("csrc/")

    @property
    def interpreted(self) -> bool:
        """Whether Triton's interpreter has to run it."""
        return "triton" in self.file


@cache
def rules() -> ModuleType:
    """setup.py without its call of ``setup``: sources, flags, instruction sets."""
    spec = importlib.util.spec_from_file_location("sslkernels_setup", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    before = Path.cwd()
    os.chdir(ROOT)
    try:
        with mock.patch("setuptools.setup"):
            spec.loader.exec_module(module)
    finally:
        os.chdir(before)
    return module


def compiler() -> str:
    return os.environ.get("CXX", "g++")


@cache
def isas(which: str) -> dict[str, list[str]]:
    """Instruction sets of "baseline" or "all", with their flags."""
    known: dict[str, list[str]] = rules().supported_isas(compiler())
    return {"baseline": []} if which == "baseline" else known


@dataclass(frozen=True)
class Toolchain:
    """How units are compiled, where others than those of the mutants are wanted."""

    folder: Path = BUILD
    program: str = field(default_factory=compiler)
    flags: tuple[str, ...] = ()  # more of them
    openmp: bool = True


def usable() -> list[str]:
    """Instruction sets of the built module that this processor has."""
    code = "from sslkernels import _C; print(*_C.available_isas())"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.split()


@dataclass(frozen=True)
class Unit:
    """A translation unit for one instruction set, or for none."""

    source: str
    isa: str | None

    @property
    def object(self) -> str:
        return f"{self.isa or 'common'}-{Path(self.source).stem}.o"


def units(which: str) -> list[Unit]:
    found = [Unit(source, None) for source in rules().COMMON_SOURCES]
    for isa in isas(which):
        sources = rules().BF16_SOURCES if isa == "avx512_bf16" else rules().CPU_SOURCES
        found += [Unit(source, isa) for source in sources]
    return found


def includes(source: str, root: Path) -> set[str]:
    """The files of csrc that a source includes, itself among them."""
    seen, left = set(), [source]
    while left:
        name = left.pop()
        if name in seen:
            continue
        seen.add(name)
        text = (root / name).read_text("utf-8")
        for found in INCLUDE.findall(text):
            for folder in (root / name).parent, root / "csrc":
                path = (folder / found).resolve()
                if path.is_file() and path.is_relative_to(root.resolve()):
                    left.append(path.relative_to(root.resolve()).as_posix())
                    break
    return seen


def compile_unit(
    unit: Unit, which: str, root: Path, folder: Path, chain: Toolchain | None = None
) -> Path:
    """Compile one unit of the sources under ``root`` into ``folder``."""
    chain = chain or Toolchain()
    output = folder / unit.object
    macros = [f"-DSSLK_HAVE_{name.upper()}=1" for name in isas(which)]
    flags = rules().compile_flags(chain.openmp)
    if unit.isa is None:
        import sysconfig

        macros += [f"-D{name}={value}" for name, value in rules().LIMITED_API_MACROS]
        flags = [*flags, f"-I{sysconfig.get_paths()['include']}"]
    else:
        macros.append(f"-DSSLK_ISA_NS={unit.isa}")
        flags = [*flags, *isas(which)[unit.isa]]
    command = [
        chain.program,
        *flags,
        "-O1",
        "-w",
        "-fPIC",
        *chain.flags,
        *macros,
        "-c",
        unit.source,
        "-o",
    ]
    done = subprocess.run([*command, str(output)], cwd=root, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{unit.source} does not compile:\n{done.stderr[-3000:]}")
    return output


def link(objects: list[Path], output: Path, flags: tuple[str, ...] = ()) -> None:
    command = [compiler(), "-shared", "-fPIC", *flags, *map(str, objects), "-o", str(output)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the module does not link:\n{done.stderr[-3000:]}")


def package(folder: Path) -> Path:
    """``folder/sslkernels``: links to the package's files, where another module can stand beside them."""
    place = folder / "sslkernels"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    for path in (ROOT / "sslkernels").iterdir():
        if path.suffix != ".so" and path.name != "__pycache__":
            (place / path.name).symlink_to(path)
    return place


class Workshop:
    """A copy of the project in which mutants are tried one after the other."""

    def __init__(self, number: int) -> None:
        self.root = BUILD / f"copy{number}"
        shutil.rmtree(self.root, ignore_errors=True)
        self.root.mkdir(parents=True)
        ignore = shutil.ignore_patterns("__pycache__", "*.so", "runs")
        for name in COPIED:
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, self.root / name, ignore=ignore)
            else:
                shutil.copy(ROOT / name, self.root / name)

    def install(self, which: str, mutant: Mutant | None, objects: dict[str, Path]) -> None:
        """Link the module of this copy, with the units that the mutant touches compiled anew."""
        parts = []
        mine = self.root / "objects"
        mine.mkdir(exist_ok=True)
        for unit in units(which):
            touched = mutant is not None and mutant.file in includes(unit.source, self.root)
            if touched and unit.isa in (None, mutant.isa if mutant else None):
                parts.append(compile_unit(unit, which, self.root, mine))
            else:
                parts.append(objects[unit.object])
        link(parts, self.root / "sslkernels" / "_C.abi3.so")

    def test(self, arguments: tuple[str, ...], interpreted: bool) -> tuple[int | str, str]:
        """Exit status of pytest (or why it has none) and the end of its output."""
        log = self.root / "log.txt"
        with log.open("wb") as file:
            if interpreted:
                status = _run_in_interpreter(self.root, arguments, file.fileno())
            else:
                status = _run_in_child(self.root, arguments, file.fileno())
        return status, log.read_text("utf-8", "replace")[-4000:]

    def attempt(self, mutant: Mutant, objects: dict[str, Path]) -> tuple[str, str]:
        """("killed" | "survived" | "error", detail)."""
        path = self.root / mutant.file
        original = path.read_text("utf-8")
        which = "baseline" if mutant.isa == "baseline" else "all"
        try:
            path.write_text(mutant.text(self.root), "utf-8")
            self.install(which, mutant if mutant.compiled else None, objects)
            status, output = self.test(mutant.tests, mutant.interpreted)
        except (RuntimeError, ValueError) as error:
            return "error", str(error)
        finally:
            path.write_text(original, "utf-8")
            if mutant.compiled:
                self.install(which, None, objects)
        if status == 0:
            return "survived", ""
        if status == 1 or isinstance(status, str):
            return "killed", str(status) if isinstance(status, str) else _first_failure(output)
        return "error", f"pytest ended with status {status}:\n{output}"


def _first_failure(output: str) -> str:
    found = re.findall(r"^(?:FAILED|ERROR) (\S+)", output, re.MULTILINE)
    return found[0].rpartition("/")[2] if found else "a test failed"


def _arguments(arguments: tuple[str, ...]) -> list[str]:
    return ["-x", "-q", "-p", "no:cacheprovider", "-m", "not campaign and not gpu", *arguments]


def _run_in_child(root: Path, arguments: tuple[str, ...], output: int) -> int | str:
    """pytest in a fork of this process, which has imported torch already."""
    process = os.fork()
    if process == 0:
        try:
            os.setsid()
            os.dup2(output, 1)
            os.dup2(output, 2)
            os.chdir(root)
            signal.alarm(LIMIT_S)
            sys.path[:] = [
                p
                for p in sys.path
                if not Path(p or ".").resolve().is_relative_to(ROOT) or ".venv" in p
            ]
            import pytest

            code = int(pytest.main([f"--rootdir={root}", *_arguments(arguments)]))
            sys.stdout.flush()
            sys.stderr.flush()
        except BaseException as error:
            os.write(2, repr(error).encode())
            code = 70
        os._exit(code)
    _, status = os.waitpid(process, 0)
    code = os.waitstatus_to_exitcode(status)
    if code == -signal.SIGALRM:
        return f"no end within {LIMIT_S} s"
    return code if code >= 0 else f"the process died of {signal.Signals(-code).name}"


def _run_in_interpreter(root: Path, arguments: tuple[str, ...], output: int) -> int | str:
    """pytest in a new process: Triton chooses its interpreter when it is imported."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    environment.pop("PYTHONPATH", None)
    command = [sys.executable, "-m", "pytest", f"--rootdir={root}", *_arguments(arguments)]
    try:
        done = subprocess.run(
            command, cwd=root, env=environment, stdout=output, stderr=output, timeout=LIMIT_S
        )
    except subprocess.TimeoutExpired:
        return f"no end within {LIMIT_S} s"
    code = done.returncode
    return code if code >= 0 else f"the process died of {signal.Signals(-code).name}"


def build_objects(which: str, jobs: int, chain: Toolchain | None = None) -> dict[str, Path]:
    """Every unit of the unchanged sources; what is newer than they are is kept."""
    chain = chain or Toolchain()
    folder = chain.folder / which
    folder.mkdir(parents=True, exist_ok=True)
    todo = []
    for unit in units(which):
        path = folder / unit.object
        newest = max(
            os.path.getmtime(ROOT / name) for name in [*includes(unit.source, ROOT), "setup.py"]
        )
        if not path.exists() or path.stat().st_mtime <= newest:
            todo.append(unit)
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(lambda unit: compile_unit(unit, which, ROOT, folder, chain), todo))
    return {unit.object: folder / unit.object for unit in units(which)}


def seconds(start: float) -> str:
    return f"{time.monotonic() - start:.1f} s"
