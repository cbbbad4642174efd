# SPDX-License-Identifier: Apache-2.0
"""Builds the CUDA sources and their bindings with the host compiler, against cuda_emulation.h.

Two flavours: ``sanitized`` (address and undefined behaviour, unoptimised: it compiles in two
seconds) and ``fast``.  Objects are kept under build/cuda_emulation by a hash of all that goes into
them, so that a second test run compiles nothing.
"""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
import subprocess
import sysconfig
from collections.abc import Mapping, Sequence
from pathlib import Path

import pybind11

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CUDA = ROOT / "csrc" / "cuda"
CACHE = ROOT / "build" / "cuda_emulation"
KERNELS = ("ema.cu", "queue.cu")

COMMON = ["-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror"]
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
FLAVOURS = {"sanitized": ["-O0", *SANITIZE], "fast": ["-O2"]}
# The kernels read 16 bytes of any element type as four words, which nvcc allows.
KERNEL_FLAGS = ["-fno-strict-aliasing", "-ffp-contract=off", "-Wno-unknown-pragmas"]


@functools.cache
def compiler() -> str | None:
    """The host C++ compiler, or None."""
    return shutil.which(os.environ.get("CXX", "g++")) or shutil.which("c++")


def run(command: Sequence[str | Path]) -> None:
    """Run a command; its output is in the error when it fails."""
    done = subprocess.run(
        [str(c) for c in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(str(c) for c in command)}\n{done.stdout}")


@functools.cache
def sanitizer_library() -> str | None:
    """What to load before the interpreter: the address sanitizer, and the C++ library that it needs
    to see exceptions.  None if the compiler has no sanitizer."""
    cxx = compiler()
    if cxx is None:
        return None
    paths = []
    for name in ("libasan.so", "libstdc++.so"):
        done = subprocess.run(
            [cxx, f"-print-file-name={name}"], stdout=subprocess.PIPE, text=True, check=True
        )
        path = Path(done.stdout.strip())
        if not (path.is_absolute() and path.exists()):
            return None
        paths.append(str(path.resolve()))
    return ":".join(paths)


@functools.cache
def _headers() -> bytes:
    names = [CUDA / "common.cuh", CUDA / "launchers.h", HERE / "cuda_emulation.h"]
    return b"\0".join(name.read_bytes() for name in names)


def _compile(name: str, source: bytes, flags: Sequence[str], *, as_cpp: bool) -> Path:
    cxx = compiler()
    if cxx is None:
        raise RuntimeError("no C++ compiler")
    command = [cxx, *COMMON, *flags, f"-I{HERE}", f"-I{CUDA}"]
    key = hashlib.sha256(b"\0".join([" ".join(command).encode(), source, _headers()])).hexdigest()
    target = CACHE / f"{Path(name).stem}-{key[:20]}.o"
    if target.exists():
        return target
    CACHE.mkdir(parents=True, exist_ok=True)
    text = CACHE / f"{Path(name).stem}-{key[:20]}-{os.getpid()}{'.cpp' if as_cpp else '.cu'}"
    text.write_bytes(source)
    partial = text.with_suffix(".partial.o")
    try:
        run([*command, "-x", "c++", "-c", text, "-o", partial])
        os.replace(partial, target)
    finally:
        text.unlink(missing_ok=True)
        partial.unlink(missing_ok=True)
    return target


def build_module(flavour: str, changed: Mapping[str, str] | None = None) -> Path:
    """``_cuda`` with emulated kernels, a Python extension module.

    Args:
        flavour: "sanitized" or "fast".
        changed: texts to compile in place of kernel files, by file name.

    Returns:
        The path of the shared object; its name says what is in it, the module in it is ``_cuda``.
    """
    flags = FLAVOURS[flavour]
    python = [f"-isystem{pybind11.get_include()}", f"-isystem{sysconfig.get_paths()['include']}"]
    objects = [
        _compile(
            "bindings_cuda.cpp",
            (CUDA / "bindings_cuda.cpp").read_bytes(),
            ["-O1", *python],
            as_cpp=True,
        ),
        _compile("emulator.cpp", (HERE / "emulator.cpp").read_bytes(), flags, as_cpp=True),
    ]
    defines = [*flags, *KERNEL_FLAGS, "-DSSLKERNELS_CUDA_EMULATION"]
    for name in KERNELS:
        text = (changed or {}).get(name)
        source = (CUDA / name).read_bytes() if text is None else text.encode()
        quiet = [] if text is None else ["-w"]  # what is left out may leave a variable unused
        objects.append(_compile(name, source, [*defines, *quiet], as_cpp=False))
    return _link("_cuda", objects, flavour)


def build_program(source: Path, flavour: str, defines: Sequence[str] = ()) -> Path:
    """An executable from one .cu file with a main and the emulator."""
    flags = [*FLAVOURS[flavour], *KERNEL_FLAGS, "-DSSLKERNELS_CUDA_EMULATION"]
    objects = [
        _compile(
            "emulator.cpp", (HERE / "emulator.cpp").read_bytes(), FLAVOURS[flavour], as_cpp=True
        ),
        _compile(source.name, source.read_bytes(), [*flags, *defines], as_cpp=False),
    ]
    return _link(source.stem, objects, flavour, shared=False)


def _link(name: str, objects: Sequence[Path], flavour: str, *, shared: bool = True) -> Path:
    key = hashlib.sha256("\0".join(o.name for o in objects).encode()).hexdigest()
    target = CACHE / f"{name}-{flavour}-{key[:20]}{'.so' if shared else ''}"
    if not target.exists():
        partial = CACHE / f"{target.name}.{os.getpid()}.partial"
        sanitize = SANITIZE if flavour == "sanitized" else []
        run(
            [
                compiler() or "c++",
                *(["-shared"] if shared else []),
                *sanitize,
                *objects,
                "-o",
                partial,
            ]
        )
        os.replace(partial, target)
    return target
