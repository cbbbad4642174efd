# SPDX-License-Identifier: Apache-2.0
"""How ``sslkernels._cuda`` is built: nvcc for the kernels, the host compiler for the bindings.

No torch is needed, only nvcc, a C++17 compiler and pybind11's headers; no driver and no GPU either.
``setup.py`` loads this file by path (pip's isolated build has nothing else on its import path).

``SSLKERNELS_CUDA``: ``auto`` (the default) builds when nvcc is found, ``0`` never, ``1`` always,
and then a missing nvcc or a failed compilation is an error.  ``SSLKERNELS_CUDA_ARCHS`` names the
architectures, for instance ``80;90``; the last one is also kept as PTX for newer devices.
``NVCC`` or ``CUDA_HOME`` say where nvcc is when it is not on ``PATH``.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
KERNELS = ("ema.cu", "queue.cu")
HEADERS = ("common.cuh", "launchers.h")
BINDINGS = "bindings_cuda.cpp"
ARCHS = ("80", "90", "100")  # A100, H100/H200, B100/B200; sm_86, 87 and 89 run the code of sm_80
# --resource-usage: registers and spills of every kernel, kept in a log beside the objects.
HOST_FLAGS = "-fPIC,-fvisibility=hidden,-Wall"
NVCC_FLAGS = ("-O3", "-std=c++17", "--resource-usage", "-Xcompiler", HOST_FLAGS)


class CudaBuildError(RuntimeError):
    """nvcc is required and missing, or a command of the build failed."""


def find_nvcc(env: Mapping[str, str] = os.environ) -> str | None:
    """The path of nvcc: ``NVCC``, then ``CUDA_HOME``/bin, then ``PATH``; None if there is none."""
    if env.get("NVCC"):
        return shutil.which(env["NVCC"], path=env.get("PATH"))
    if env.get("CUDA_HOME"):
        found = shutil.which("nvcc", path=os.path.join(env["CUDA_HOME"], "bin"))
        if found:
            return found
    return shutil.which("nvcc", path=env.get("PATH"))


def cuda_extension_requested(env: Mapping[str, str] = os.environ) -> bool:
    """Whether to build ``sslkernels._cuda``, by ``SSLKERNELS_CUDA`` and the presence of nvcc.

    Raises:
        CudaBuildError: ``SSLKERNELS_CUDA`` is 1 and there is no nvcc, or it has another value.
    """
    choice = env.get("SSLKERNELS_CUDA", "auto").strip().lower() or "auto"
    if choice not in {"0", "1", "auto"}:
        raise CudaBuildError(f"SSLKERNELS_CUDA must be 0, 1 or auto, got {choice!r}")
    if choice == "0":
        return False
    if find_nvcc(env) is not None:
        return True
    if choice == "1":
        raise CudaBuildError(
            "SSLKERNELS_CUDA=1 but nvcc was not found: put it on PATH, set CUDA_HOME or NVCC, "
            "or build without it (SSLKERNELS_CUDA=0)"
        )
    return False


def cuda_extension_required(env: Mapping[str, str] = os.environ) -> bool:
    """Whether a failure of the CUDA build must stop the installation (``SSLKERNELS_CUDA=1``)."""
    return env.get("SSLKERNELS_CUDA", "").strip() == "1"


def _run(command: Sequence[str], verbose: bool) -> str:
    if verbose:
        print("sslkernels:", " ".join(command), flush=True)
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    if done.returncode != 0:
        raise CudaBuildError(f"{' '.join(command)}\n{done.stdout}")
    return done.stdout


def choose_archs(nvcc: str, env: Mapping[str, str] = os.environ) -> list[str]:
    """The architectures to build: asked for, or those of ``ARCHS`` that this nvcc knows."""
    if env.get("SSLKERNELS_CUDA_ARCHS"):
        return [a.strip() for a in env["SSLKERNELS_CUDA_ARCHS"].replace(",", ";").split(";") if a]
    known = set(_run([nvcc, "--list-gpu-code"], verbose=False).split())
    chosen = [arch for arch in ARCHS if f"sm_{arch}" in known]
    if not chosen:
        raise CudaBuildError(f"{nvcc} knows none of sm_{', sm_'.join(ARCHS)}")
    return chosen


def arch_flags(archs: Sequence[str]) -> list[str]:
    """``-gencode`` for the machine code of every architecture and the PTX of the last one."""
    flags: list[str] = []
    for arch in archs:
        flags += ["-gencode", f"arch=compute_{arch},code=sm_{arch}"]
    return [*flags, "-gencode", f"arch=compute_{archs[-1]},code=compute_{archs[-1]}"]


def extension_filename() -> str:
    """``_cuda`` with the suffix of this interpreter's extension modules."""
    return f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"


def is_up_to_date(output: Path) -> bool:
    """Whether ``output`` is newer than every source it is made of."""
    if not output.exists():
        return False
    sources = [HERE / name for name in (*KERNELS, *HEADERS, BINDINGS, Path(__file__).name)]
    return output.stat().st_mtime > max(source.stat().st_mtime for source in sources)


def build_cuda_extension(
    output: str | Path,
    build_dir: str | Path,
    env: Mapping[str, str] = os.environ,
    *,
    verbose: bool = True,
) -> Path:
    """Compile and link ``sslkernels._cuda`` into the file ``output``.

    The static CUDA runtime is linked in and its symbols are kept inside, so that the extension
    imports without a driver and lives beside the runtime that torch brings along.

    Args:
        output: the shared object to write, normally ``sslkernels/_cuda.<suffix>.so``.
        build_dir: where the object files go, and ``ema.log`` and ``queue.log`` with registers and
            spills.
        env: the environment to read the choices from.
        verbose: print the commands.

    Returns:
        ``output`` as a path.

    Raises:
        CudaBuildError: there is no nvcc, or a command failed (its output is in the message).
    """
    import pybind11

    nvcc = find_nvcc(env)
    if nvcc is None:
        raise CudaBuildError("nvcc was not found: put it on PATH, or set CUDA_HOME or NVCC")
    output, objects = Path(output), Path(build_dir)
    output.parent.mkdir(parents=True, exist_ok=True)
    objects.mkdir(parents=True, exist_ok=True)
    compiler = env.get("CXX", "c++").split()
    bindings = [
        *compiler,
        "-O1",
        "-std=c++17",
        "-fPIC",
        "-fvisibility=hidden",
        "-Wall",
        "-Wextra",
        f"-I{pybind11.get_include()}",
        f"-I{sysconfig.get_paths()['include']}",
        "-c",
        str(HERE / BINDINGS),
        "-o",
        str(objects / "bindings_cuda.o"),
    ]
    kernels = [nvcc, *NVCC_FLAGS, "--threads", "0", *arch_flags(choose_archs(nvcc, env)), "-c"]
    commands = {BINDINGS: bindings}
    for name in KERNELS:
        compiled = objects / f"{Path(name).stem}.o"
        commands[name] = [*kernels, str(HERE / name), "-o", str(compiled)]
    with ThreadPoolExecutor(max(os.cpu_count() or 1, 1)) as pool:
        outputs = pool.map(lambda command: _run(command, verbose), commands.values())
        for name, output_text in zip(commands, outputs, strict=True):
            (objects / f"{Path(name).stem}.log").write_text(output_text)
    link = [nvcc, "-shared", "-cudart", "static", "-Xlinker", "--exclude-libs=ALL", "-o"]
    inputs = ["bindings_cuda.o", *(f"{Path(name).stem}.o" for name in KERNELS)]
    # Written beside the target and moved, so that an interrupted link leaves no half extension.
    partial = output.with_name(output.name + ".partial")
    _run([*link, str(partial), *(str(objects / name) for name in inputs)], verbose)
    os.replace(partial, output)
    return output


def main() -> int:
    """``python csrc/cuda/build.py OUTPUT_DIR``: build the extension by hand."""
    if len(sys.argv) != 2:
        print("usage: python csrc/cuda/build.py OUTPUT_DIR", file=sys.stderr)
        return 2
    target = Path(sys.argv[1])
    try:
        print(build_cuda_extension(target / extension_filename(), target / "build"))
    except CudaBuildError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
