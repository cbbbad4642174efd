# SPDX-License-Identifier: Apache-2.0
"""sslkernels._cuda: when it is built, that it builds and imports, budgets of the machine code."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
CUDA = ROOT / "csrc" / "cuda"


def _load_build() -> ModuleType:
    spec = importlib.util.spec_from_file_location("sslk_cuda_build_test", CUDA / "build.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


build = _load_build()
NVCC = build.find_nvcc()
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="nvcc was not found")

# Registers a thread may use.  EMA: 4 blocks of 256 threads fill 65,536 registers at 64, and the
# grid is 4 blocks a multiprocessor.  Queue: at 64 still 8 blocks of 128 threads.
MAX_REGISTERS = {"ema": 64, "queue": 64}
KERNELS = {"ema": 2, "queue": 16}  # EMA without and with stochastic rounding; pairs of dtypes


# ---- When it is built --------------------------------------------------------------------------


@pytest.fixture
def fake_nvcc(tmp_path: Path) -> Path:
    """Something executable named nvcc."""
    path = tmp_path / "bin" / "nvcc"
    path.parent.mkdir()
    path.write_text("#!/bin/sh\nexit 1\n")
    path.chmod(0o755)
    return path


def test_requested(tmp_path: Path, fake_nvcc: Path) -> None:
    without = {"PATH": str(tmp_path)}
    with_nvcc = {"PATH": str(fake_nvcc.parent)}
    assert not build.cuda_extension_requested(without)
    assert build.cuda_extension_requested(with_nvcc)
    assert build.cuda_extension_requested({**with_nvcc, "SSLKERNELS_CUDA": "auto"})
    assert build.cuda_extension_requested({**with_nvcc, "SSLKERNELS_CUDA": "1"})
    assert not build.cuda_extension_requested({**with_nvcc, "SSLKERNELS_CUDA": "0"})
    assert build.cuda_extension_requested({**without, "CUDA_HOME": str(tmp_path)})
    assert build.cuda_extension_requested({**without, "NVCC": str(fake_nvcc)})
    assert not build.cuda_extension_requested({**without, "NVCC": str(tmp_path / "none")})


def test_required_without_nvcc_is_an_error(tmp_path: Path) -> None:
    env = {"PATH": str(tmp_path), "SSLKERNELS_CUDA": "1"}
    assert build.cuda_extension_required(env)
    with pytest.raises(build.CudaBuildError, match="SSLKERNELS_CUDA=1 but nvcc was not found"):
        build.cuda_extension_requested(env)
    with pytest.raises(build.CudaBuildError, match="must be 0, 1 or auto, got 'yes'"):
        build.cuda_extension_requested({"PATH": str(tmp_path), "SSLKERNELS_CUDA": "yes"})
    with pytest.raises(build.CudaBuildError, match="nvcc was not found"):
        build.build_cuda_extension(tmp_path / "x.so", tmp_path, {"PATH": str(tmp_path)})


def test_failing_nvcc_is_reported(fake_nvcc: Path) -> None:
    with pytest.raises(build.CudaBuildError, match="list-gpu-code"):
        build.choose_archs(str(fake_nvcc), {})


def test_architectures_by_hand(fake_nvcc: Path) -> None:
    assert build.choose_archs(str(fake_nvcc), {"SSLKERNELS_CUDA_ARCHS": "90; 100"}) == ["90", "100"]
    assert build.arch_flags(["80", "90"])[-1] == "arch=compute_90,code=compute_90"


def test_sources_need_no_torch() -> None:
    for path in [*CUDA.glob("*.cu*"), *CUDA.glob("*.h"), *CUDA.glob("*.cpp")]:
        assert not re.search(r"#include\s*[<\"](torch|ATen|c10)/", path.read_text()), path.name


# ---- The build ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def extension(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The extension in a folder without other modules, and its logs: those of the build, or made here."""
    folder = tmp_path_factory.mktemp("cuda")
    output, objects = folder / build.extension_filename(), folder / "objects"
    built = ROOT / "sslkernels" / output.name
    for logs in ROOT.glob("build/temp.*/cuda"):
        found = [built, *(logs / f"{name}.log" for name in KERNELS)]
        if all(build.is_up_to_date(path) for path in found):
            shutil.copy(built, output)
            shutil.copytree(logs, objects, ignore=shutil.ignore_patterns("*.o"))
            return output
    build.build_cuda_extension(output, objects, verbose=False)
    return output


@needs_nvcc
@pytest.mark.slow
def test_imports_without_a_driver(extension: Path) -> None:
    """In a fresh interpreter, before and beside torch; a launch without a driver raises."""
    script = (
        "import _cuda, torch\n"
        "table, n, offset = _cuda.build_ema_table([(16, 32, 4097, 0, 2), (64, 64, 0, 1, 1)])\n"
        "assert (n, offset, len(table)) == (2, 80, 112), (n, offset, len(table))\n"
        "try:\n    _cuda.build_ema_table([(2, 32, 5, 0, 0)])\n"
        "except ValueError as error:\n    print(error)\n"
        "if not torch.cuda.is_available():\n"
        "    try:\n        _cuda.enqueue(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, True, 1e-12, 0, 0)\n"
        "    except RuntimeError as error:\n        print(error)\n"
        "assert torch.ones(2).sum() == 2\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=extension.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "an address must be a multiple of its element size" in done.stdout
    if not torch.cuda.is_available():
        assert "enqueue_: CUDA error " in done.stdout


@needs_nvcc
@pytest.mark.slow
@pytest.mark.skipif(shutil.which("ldd") is None, reason="no ldd")
def test_runtime_is_linked_in(extension: Path) -> None:
    listed = subprocess.run(["ldd", extension], capture_output=True, text=True, check=True).stdout
    assert "libcuda" not in listed and "libtorch" not in listed, listed


def resource_usage(log: str) -> list[tuple[str, str, int, list[int]]]:
    """Kernel, architecture, registers and (stack, spill stores, spill loads) of every kernel."""
    pattern = (
        r"Compiling entry function '(\w+)' for '(\w+)'.*?"
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads.*?"
        r"Used (\d+) registers"
    )
    return [
        (name, arch, int(registers), [int(stack), int(stores), int(loads)])
        for name, arch, stack, stores, loads, registers in re.findall(pattern, log, re.DOTALL)
    ]


@needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize("kernel", KERNELS)
def test_registers_and_spills(extension: Path, kernel: str) -> None:
    """No spill, no local memory, and registers that leave room for the blocks of the launch."""
    usage = resource_usage((extension.parent / "objects" / f"{kernel}.log").read_text())
    archs = build.choose_archs(NVCC)
    assert len(usage) == KERNELS[kernel] * len(archs), f"{len(usage)} kernels in the log"
    assert {arch for _, arch, *_ in usage} == {f"sm_{arch}" for arch in archs}
    for name, arch, registers, memory in usage:
        assert memory == [0, 0, 0], f"{name} on {arch}: stack, spill stores and loads {memory}"
        assert registers <= MAX_REGISTERS[kernel], f"{name} on {arch}: {registers} registers"


@needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize("kernel", KERNELS)
def test_vector_accesses(kernel: str, tmp_path: Path) -> None:
    """The main path moves 16 bytes at a time, to and from global memory, nothing through local."""
    ptx_file = tmp_path / f"{kernel}.ptx"
    command = [NVCC, "-O3", "-std=c++17", "-arch=compute_80", "--ptx", CUDA / f"{kernel}.cu", "-o"]
    subprocess.run([*command, ptx_file], check=True, capture_output=True)
    ptx = ptx_file.read_text()
    bodies = re.split(r"\.visible \.entry|\.weak \.entry|\.entry", ptx)[1:]
    assert len(bodies) == KERNELS[kernel]
    for body in bodies:
        name = body.strip().split("(")[0]
        wide = r"\.global\.(v4\.[a-z]32|v2\.[a-z]64)"
        # Where float64 meets 16 bits, the narrower side moves 8 bytes (kVectorWidth).
        half = re.search(r"I(d(13__nv_bfloat16|6__half)|(13__nv_bfloat16|6__half)d)E", name)
        wide_loads, wide_stores = re.search(r"\bld" + wide, body), re.search(r"\bst" + wide, body)
        assert wide_loads or (half and wide_stores), f"{name}: no 16-byte load"
        assert wide_stores or (half and wide_loads), f"{name}: no 16-byte store"
        assert not re.search(r"\b(ld|st)\.local", body), f"{name}: local memory"
        # An access that names no space costs a look-up of which one it is.
        assert not re.search(r"\b(ld|st)(\.volatile)?\.(v[24]\.)?[a-z]\d+\s", body), (
            f"{name}: generic addresses"
        )
    assert "ld.global.v4" in ptx and "st.global.v4" in ptx
