# SPDX-License-Identifier: Apache-2.0
"""``python tests/sanitize [address thread bindings ...]``: kernels and bindings under sanitizers.

    address   AddressSanitizer and UndefinedBehaviorSanitizer
    thread    ThreadSanitizer, with OpenMP's functions on std::thread (gomp.cpp says why)
    bindings  the module in Python under those of "address": wrong calls (bindings.py), and some test files

``kernels.cpp`` calls every kernel, on one and on four threads, from memory that ends where the data ends.  It
needs no Python and no torch, so a report can only be about these sources; there are no suppressions.
``fuzz.py`` chooses wrong calls by what they reach, and needs clang.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cuda_emulation.toolchain import sanitizer_library  # noqa: E402
from mutants.workshop import (  # noqa: E402
    ROOT,
    Toolchain,
    build_objects,
    compiler,
    isas,
    link,
    package,
    rules,
)

HERE = Path(__file__).resolve().parent
FLAGS = {
    "address": ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g1"],
    "thread": ["-fsanitize=thread", "-g1"],
    "none": [],
}
CORE = ["csrc/dispatch.cpp", "csrc/memory.cpp", "csrc/portable.cpp"]
# Through Python: every function of the module, and inputs of nothing.
TESTS = ["tests/test_bindings.py", "tests/test_empty.py"]
OWN = ["tests/sanitize/kernels.cpp", "tests/sanitize/gomp.cpp"]


def build(kind: str, isa: str = "baseline", level: str = "-O1", jobs: int = 2) -> Path:
    """The program of one kind and instruction set; what is newer than every source is kept."""
    folder = ROOT / "build" / "sanitize" / f"{kind}-{isa}{level}"
    folder.mkdir(parents=True, exist_ok=True)
    program = folder / "kernels"
    newest = max(path.stat().st_mtime for path in [*(ROOT / "csrc").rglob("*.*"), *HERE.iterdir()])
    if program.exists() and program.stat().st_mtime > newest:
        return program
    # avx512_bf16 is nothing by itself, and without baseline there is no table.
    wanted = ["baseline"] if isa == "baseline" else ["baseline", isa]
    macros = [f"-DSSLK_HAVE_{name.upper()}=1" for name in wanted]
    common = [compiler(), *rules().compile_flags(), level, *FLAGS[kind], *macros]
    jobs_of = [
        [
            *common,
            *isas("all")[name],
            f"-DSSLK_ISA_NS={name}",
            "-c",
            source,
            "-o",
            str(folder / f"{name}-{Path(source).stem}.o"),
        ]
        for name in wanted
        for source in rules().CPU_SOURCES
    ] + [
        [*common, "-c", source, "-o", str(folder / f"{Path(source).stem}.o")]
        for source in CORE + OWN
    ]
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(lambda command: subprocess.run(command, cwd=ROOT, check=True), jobs_of))
    # libgomp is not linked: gomp.cpp stands in for it.
    objects = [command[-1] for command in jobs_of]
    link = [compiler(), *FLAGS[kind], *objects, "-pthread", "-o", str(program)]
    subprocess.run(link, check=True)
    return program


def build_package(which: str, jobs: int) -> Path:
    """A folder with the package and a sanitized module."""
    folder = ROOT / "build" / "sanitize" / "bindings"
    flags = tuple(FLAGS["address"])
    objects = build_objects(which, jobs, Toolchain(folder, flags=flags))
    link(list(objects.values()), package(folder) / "_C.abi3.so", flags)
    return folder


def check_bindings(isa: str, jobs: int) -> int:
    """Exit status of wrong calls and of some tests with the sanitized module; 0: nothing was found."""
    folder = build_package("baseline" if isa == "baseline" else "all", jobs)
    environment = {
        **os.environ,
        "LD_PRELOAD": sanitizer_library() or "",
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1",  # Python leaves objects behind
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    module = folder / "sslkernels" / "_C.abi3.so"
    calls = [str(HERE / "bindings.py"), str(module), "--sanitized"]
    # pytest puts the folders of "pythonpath" before all others: this package before that of the checkout.
    paths = f"pythonpath={folder} python tests"
    tests = [
        "-m",
        "pytest",
        "-v",
        "-n",
        "0",
        "-p",
        "no:cacheprovider",
        "--capture=sys",
        "-o",
        paths,
        *TESTS,
    ]
    for arguments in (calls, tests):
        status = subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment).returncode
        if status:
            return status
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="sanitize", description=__doc__)
    parser.add_argument("kinds", nargs="*", default=["address", "thread"])
    parser.add_argument("--isa", default="baseline", help="one that this processor has")
    parser.add_argument("-j", "--jobs", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    failed = []
    for kind in options.kinds:
        if kind == "bindings":
            print(f"{kind}:", flush=True)
            failed += [kind] * bool(check_bindings(options.isa, options.jobs))
            continue
        program = build(kind, options.isa, jobs=options.jobs)
        print(f"{kind}:", flush=True)
        if subprocess.run([str(program), "check"]).returncode:
            failed.append(kind)
    print(f"failed: {', '.join(failed)}" if failed else "nothing found")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
