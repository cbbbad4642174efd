# SPDX-License-Identifier: Apache-2.0
"""Builds ``sslkernels._C``: one set of kernel sources, compiled once per instruction set.

Environment:
    DEBUG=1                -O0 -g, for a debugger
    SSLKERNELS_WERROR=1    compiler warnings are errors (CI)
    SSLKERNELS_OPENMP=0    kernels on one thread, as where the compiler has no OpenMP
    SSLKERNELS_ISAS        instruction sets beside baseline, as "avx2,avx512"; by default all that there are
    SSLKERNELS_SANITIZE=1  address and undefined-behaviour sanitizers
    SSLKERNELS_CUDA        0 | 1 | auto: build sslkernels._cuda with nvcc (see csrc/cuda/build.py)
"""

from __future__ import annotations

import importlib.util
import os
import platform
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
# Once per instruction set; others.cpp includes the kernels that are quick to compile.
CPU_SOURCES = [
    f"csrc/cpu/{name}.cpp"
    for name in ("attend", "others", "pairwise_backward", "pairwise_forward", "peak", "table")
]
# AVX512-BF16 is AVX-512 and more arithmetic; see csrc/cpu/kernels.h.
BF16_SOURCES = [source for source in CPU_SOURCES if source != "csrc/cpu/others.cpp"]
COMMON_SOURCES = sorted(p.as_posix() for p in Path("csrc").glob("*.cpp"))  # once
# Nothing in them is a loop: a third less time to compile, the same time for a call.
COMMON_FLAGS = ["-O1"]
FILES = {
    p.as_posix()
    for folder in ("csrc", "csrc/cpu")
    for pattern in ("*.h", "*.cpp")
    for p in Path(folder).glob(pattern)
}
HEADERS = sorted(FILES - {*CPU_SOURCES, *COMMON_SOURCES})  # whatever else is included

AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"]
# One build serves Python 3.10 and newer: the bindings use nothing else.  Free-threaded builds of Python have
# no limited API.
LIMITED_API = not sysconfig.get_config_var("Py_GIL_DISABLED")
LIMITED_API_MACROS = [("Py_LIMITED_API", "0x030A0000")] if LIMITED_API else []
X86_ISAS = {
    "avx2": AVX2,
    "avx512": AVX512,
    "avx512_bf16": [*AVX512, "-mavx512bf16"],
}


def flag(name: str) -> bool:
    """Whether an environment variable is set to something other than 0."""
    return os.environ.get(name, "0") not in ("", "0")


def compile_flags(openmp: bool = True) -> list[str]:
    """Flags of every translation unit, but for those of its instruction set."""
    flags = ["-std=c++17", "-fvisibility=hidden", "-Wall", "-Wextra", "-Icsrc"]
    # Without it nothing asks for the number of threads.
    alone = ["unknown-pragmas", "unused-variable", "unused-parameter", "unused-function"]
    flags += ["-fopenmp"] if openmp else [f"-Wno-{warning}" for warning in alone]
    flags += ["-include", "csrc/portable.h"]  # the oldest C library that torch allows
    # -ffp-contract=fast: a * b + c may become one FMA.  No -ffast-math: NaN and inf must survive.
    flags += ["-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi"]
    flags += ["-O0", "-g"] if flag("DEBUG") else ["-O3", "-g0"]
    if flag("SSLKERNELS_WERROR"):
        flags.append("-Werror")
    if flag("SSLKERNELS_SANITIZE"):
        flags += ["-fsanitize=address,undefined", "-fno-omit-frame-pointer", "-g"]
    return flags


def compiles(compiler: str, flags: list[str], text: str) -> bool:
    """Whether a compiler takes a source with these flags."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cpp")
        source.write_text(text)
        command = [compiler, *flags, "-c", str(source), "-o", str(Path(folder, "probe.o"))]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0


def supports_openmp(compiler: str) -> bool:
    """Whether the compiler has OpenMP, flag and header, and is to use it; says so where it has not."""
    if os.environ.get("SSLKERNELS_OPENMP", "") == "0":
        return False
    text = "#include <omp.h>\nint probe() { return omp_get_num_threads(); }\n"
    if compiles(compiler, ["-fopenmp"], text):
        return True
    print(f"sslkernels: built for one thread: {compiler} has no OpenMP", file=sys.stderr)
    return False


def supported_isas(compiler: str) -> dict[str, list[str]]:
    """Instruction sets that are wanted and the compiler knows (it compiles a line); baseline always."""
    isas: dict[str, list[str]] = {"baseline": []}
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return isas
    wanted = os.environ.get("SSLKERNELS_ISAS", ",".join(X86_ISAS)).split(",")
    unknown = sorted(set(wanted) - {"", "baseline", *X86_ISAS})
    if unknown:
        raise SystemExit(f"SSLKERNELS_ISAS must name some of {', '.join(X86_ISAS)}, got {unknown}")
    text = "int probe() { return 0; }\n"
    chosen = {name: flags for name, flags in X86_ISAS.items() if name in wanted}
    return isas | {n: flags for n, flags in chosen.items() if compiles(compiler, flags, text)}


def remove_other_builds(extension: Path) -> None:
    """Delete the same module for one version of Python, which would be imported in place of this one."""
    for other in extension.parent.glob(f"{extension.name.partition('.')[0]}.*.so"):
        if other.name != extension.name:
            other.unlink()


class BuildExt(build_ext):
    """Compiles kernel files for each instruction set in parallel and links them into one module."""

    def run(self) -> None:
        """Build sslkernels._C, then sslkernels._cuda where it is asked for."""
        super().run()
        remove_other_builds(Path(self.get_ext_fullpath("sslkernels._C")))  # built in place
        cuda = cuda_build()
        output = Path(self.get_ext_fullpath("sslkernels._cuda"))
        if not cuda.cuda_extension_requested() or cuda.is_up_to_date(output):
            return
        try:
            cuda.build_cuda_extension(output, Path(self.build_temp, "cuda"))
        except cuda.CudaBuildError as error:
            if cuda.cuda_extension_required():
                raise
            print(f"sslkernels: built without sslkernels._cuda: {error}", file=sys.stderr)

    def build_extension(self, ext: Extension) -> None:
        """Compile csrc/cpu per instruction set, csrc once, then let setuptools link."""
        if ext.name != "sslkernels._C":
            super().build_extension(ext)
            return
        compiler = self.compiler
        program = getattr(compiler, "compiler_so_cxx", compiler.compiler_so)[0]
        isas = supported_isas(program)
        flags = compile_flags(supports_openmp(program))
        known = [(f"SSLK_HAVE_{name.upper()}", "1") for name in isas]
        jobs = []
        for name, isa_flags in isas.items():
            folder = str(Path(self.build_temp, name))
            macros = [("SSLK_ISA_NS", name), *known]
            sources = BF16_SOURCES if name == "avx512_bf16" else CPU_SOURCES
            jobs += [(source, folder, macros, isa_flags) for source in sources]
        folder = str(Path(self.build_temp, "common"))
        macros = [*known, *LIMITED_API_MACROS]
        jobs += [(source, folder, macros, COMMON_FLAGS) for source in COMMON_SOURCES]

        def compile_one(job: tuple) -> list[str]:
            source, folder, macros, isa_flags = job
            extra = [*flags, *isa_flags]
            expected = compiler.object_filenames([source], output_dir=folder)
            if self._fresh(expected[0], source):
                return expected
            return compiler.compile(
                [source],
                output_dir=folder,
                macros=macros,
                include_dirs=[*ext.include_dirs, "csrc"],
                extra_postargs=extra,
                depends=ext.depends,
            )

        # The biggest first: the last one to finish is a short one.
        jobs.sort(key=lambda job: (job[0] != "csrc/cpu/others.cpp", -Path(job[0]).stat().st_size))
        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            objects = [name for names in pool.map(compile_one, jobs) for name in names]
        # libgomp is deliberately not linked: the OpenMP symbols come from the runtime that torch has
        # already loaded, so that there is exactly one in the process (sslkernels/backends/cpu.py).
        link = ["-fsanitize=address,undefined"] if flag("SSLKERNELS_SANITIZE") else []
        remove_other_builds(Path(self.get_ext_fullpath(ext.name)))
        compiler.link_shared_object(
            objects,
            self.get_ext_fullpath(ext.name),
            extra_postargs=link,
            target_lang="c++",
            build_temp=self.build_temp,
        )

    def _fresh(self, target: str, source: str) -> bool:
        """Whether an object is newer than its source and every header (make's rule)."""
        if self.force or not Path(target).exists():
            return False
        built = Path(target).stat().st_mtime
        # Kernels that are included are included by one file only.
        included = [p for p in HEADERS if p.endswith(".h") or source == "csrc/cpu/others.cpp"]
        return all(Path(p).stat().st_mtime < built for p in [source, *included, "setup.py"])


def cuda_build() -> ModuleType:
    """csrc/cuda/build.py, which setup.py can't import by name in pip's isolated build."""
    spec = importlib.util.spec_from_file_location("sslk_cuda_build", ROOT / "csrc/cuda/build.py")
    if spec is None or spec.loader is None:
        raise RuntimeError("csrc/cuda/build.py can't be loaded")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


extension = Extension(
    "sslkernels._C",
    COMMON_SOURCES,
    depends=HEADERS,
    language="c++",
    py_limited_api=LIMITED_API,
)

setup(
    ext_modules=[extension],
    cmdclass={"build_ext": BuildExt},
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if LIMITED_API else {},
)
