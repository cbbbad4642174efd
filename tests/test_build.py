# SPDX-License-Identifier: Apache-2.0
"""The extension in the process and in a wheel: one OpenMP runtime, chosen ISA, isolated build."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
from helpers import HANGS_S, available_isas
from mutants.workshop import package, rules

import sslkernels

ROOT = Path(__file__).resolve().parents[1]
LIMITED_API = not sysconfig.get_config_var("Py_GIL_DISABLED")  # as setup.py decides


def run(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(ROOT), str(ROOT / "python"), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env={**os.environ, "PYTHONPATH": path, **env},
        capture_output=True,
        text=True,
        check=False,
        timeout=HANGS_S,
    )


def test_the_extension_is_built() -> None:
    """Everything falls back to plain torch without it, so its absence must not go unnoticed."""
    facts = sslkernels.info()
    assert facts.cpu_extension and facts.isa in facts.available_isas
    assert facts.available_isas[-1] == "baseline"
    assert "cpu" in str(facts)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/maps")
def test_one_openmp_runtime() -> None:
    """A second runtime beside torch's would start a second pool of threads."""
    code = """
import re, torch, sslkernels
sslkernels.nt_xent_loss(torch.randn(512, 64), torch.randn(512, 64))
maps = open("/proc/self/maps").read()
print("\\n".join(sorted(set(re.findall(r"\\S*lib(?:gomp|omp|iomp5)[^\\s/]*\\.so\\S*", maps)))))
"""
    done = run(code)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) == 1, done.stdout


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/task")
def test_threads_follow_torch() -> None:
    code = """
import os, torch
torch.set_num_threads(1)
import sslkernels
z = torch.randn(512, 64)
def tasks(): return len(os.listdir("/proc/self/task"))
before = tasks()
sslkernels.nt_xent_loss(z, z + 1)
sslkernels.ema_update_([torch.zeros(300_000)], [torch.ones(300_000)], 0.5)
print(tasks() - before)
"""
    done = run(code)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == 0


@pytest.mark.parametrize("isa", available_isas())
def test_an_instruction_set_can_be_forced(isa: str) -> None:
    done = run("import sslkernels; print(sslkernels.info().isa)", SSLKERNELS_ISA=isa)
    assert done.stdout.strip() == isa, done.stderr


def test_an_unknown_instruction_set_is_an_error() -> None:
    done = run("import torch, sslkernels; sslkernels.info()", SSLKERNELS_ISA="sse9")
    assert done.returncode != 0
    assert "sse9" in done.stderr and "baseline" in done.stderr, done.stderr


def test_import_needs_no_cuda() -> None:
    code = """
import sys, sslkernels
print("sslkernels._cuda" in sys.modules, "triton" in sys.modules)
"""
    done = run(code, CUDA_VISIBLE_DEVICES="")
    assert done.stdout.split() == ["False", "False"], done.stderr + done.stdout


def test_the_extension_serves_every_python() -> None:
    """Its name says that it uses the limited API only; the compiler has seen to it."""
    name = Path(sys.modules["sslkernels._C"].__file__ or "").name
    assert (name == "_C.abi3.so") == LIMITED_API, name


def test_the_extension_links_neither_torch_nor_openmp() -> None:
    extension = Path(sys.modules["sslkernels._C"].__file__ or "")
    needed = subprocess.run(["ldd", extension], capture_output=True, text=True, check=False)
    if needed.returncode:
        pytest.skip("no ldd")
    assert not re.findall(r"lib(?:torch|c10|gomp|omp|iomp)\S*", needed.stdout)


def test_a_compiler_without_openmp_is_noticed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Apple's clang refuses the flag; others lack the header."""
    refuses = tmp_path / "c++"
    refuses.write_text("#!/bin/sh\nexit 1\n")
    refuses.chmod(0o755)
    monkeypatch.delenv("SSLKERNELS_OPENMP", raising=False)
    assert not rules().supports_openmp(str(refuses))
    assert "built for one thread" in capsys.readouterr().err
    assert "-fopenmp" not in rules().compile_flags(openmp=False)


@pytest.mark.campaign
def test_without_openmp_kernels_run_on_one_thread(tmp_path: Path) -> None:
    """Same bits, no symbol of a runtime, and info() says so.  The compiler takes minutes."""
    site = package(tmp_path)
    folders = ["--build-lib", str(tmp_path), "--build-temp", str(tmp_path / "objects")]
    built = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", *folders],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=HANGS_S,
        env={
            **os.environ,
            "SSLKERNELS_OPENMP": "0",
            "SSLKERNELS_WERROR": "1",
            "SSLKERNELS_CUDA": "0",
        },
    )
    assert built.returncode == 0, built.stderr
    (extension,) = site.glob("_C*.so")
    assert not re.search(rb"GOMP_|omp_get_|__kmpc", extension.read_bytes())
    code = """
import io, sys, torch, sslkernels, test_processes as t
torch.set_num_threads(4)
print(sslkernels.info(), file=sys.stderr)
torch.save(t.work(*t.made()), sys.stdout.buffer)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT / "tests")])},
        cwd=tmp_path,
        capture_output=True,
        timeout=HANGS_S,
    )
    assert done.returncode == 0, done.stderr.decode()
    assert b"4 of torch, 1 of the CPU extension (built without OpenMP)" in done.stderr
    import test_processes

    assert test_processes.same(
        torch.load(io.BytesIO(done.stdout)), test_processes.work(*test_processes.made())
    )


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source archive of the working tree."""
    folder = tmp_path_factory.mktemp("sdist")
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", folder, "sdist", "-d", folder],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=HANGS_S,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (archive,) = folder.glob("sslkernels-*.tar.gz")
    return archive


def test_sdist_has_everything(sdist: Path) -> None:
    """Whoever unpacks it can build, test and measure: it is what git tracks, and nothing built."""
    with tarfile.open(sdist) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    assert not [name for name in held if name.endswith((".so", ".o", ".pyc"))]
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    tracked = {name for name in listed.stdout.splitlines() if (ROOT / name).is_file()}
    assert not tracked - held - {".gitignore"}


@pytest.mark.slow
def test_wheel_builds_in_isolation(sdist: Path, tmp_path: Path) -> None:
    """As ``pip install .`` does: setuptools and pybind11 in an empty environment, no torch.

    Without optimisation: that is half of its minutes, and nothing is computed.
    """
    done = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--no-deps", "--prefer-binary", "--retries", "5",
         "-w", str(tmp_path / "wheels"), str(sdist)],
        cwd=tmp_path, capture_output=True, text=True, check=False, timeout=HANGS_S,
        env={**os.environ, "DEBUG": "1", "SSLKERNELS_CUDA": "0", "SSLKERNELS_ISAS": "baseline"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = (tmp_path / "wheels").glob("sslkernels-*.whl")
    held = zipfile.ZipFile(wheel).namelist()
    extension = "_C.abi3.so" if LIMITED_API else f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    assert f"sslkernels/{extension}" in held
    assert not LIMITED_API or "-cp310-abi3-" in wheel.name, wheel.name
    for wanted in ("sslkernels/py.typed", "sslkernels/ops/ema.py", "ssltrain/cli.py"):
        assert wanted in held
    assert any(name.endswith("entry_points.txt") for name in held)
    assert not [name for name in held if name.startswith(("tests", "benchmarks", "csrc"))]
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    used = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sslkernels; print(sslkernels.__file__, *sslkernels.info().available_isas)",
        ],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert used.stdout.split() == [str(site / "sslkernels/__init__.py"), "baseline"], used.stderr
