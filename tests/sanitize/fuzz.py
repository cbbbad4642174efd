# SPDX-License-Identifier: Apache-2.0
"""``make fuzz``: calls of the C++ module that libFuzzer chooses by the branches that they reach.

    --seconds S     how long (60)
    --isa all       every instruction set that the compiler knows, not the baseline alone
    FILE ...        run these bytes alone, as a failure left them

It needs clang with libFuzzer (Debian: apt-get install clang; CLANG=clang-19 names another) and the library of
Python (libpython).  Kernels and bindings are compiled without OpenMP, for one thread, with the sanitizers for
addresses and undefined behaviour.  Bytes that reached something new are kept in build/sanitize/fuzz/corpus,
where the next run begins.  ``bindings.py`` makes the calls of them, and
``--bytes FILE`` of it prints those of a failure.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mutants.workshop import ROOT, Toolchain, build_objects  # noqa: E402

HERE = Path(__file__).resolve().parent
FOLDER = ROOT / "build" / "sanitize" / "fuzz"
SANITIZERS = "address,undefined"
# memory.cpp asks as gcc says it: workspaces end where the data ends.
FLAGS = (
    f"-fsanitize=fuzzer-no-link,{SANITIZERS}",
    "-fno-sanitize-recover=all",
    "-g1",
    "-D__SANITIZE_ADDRESS__=1",
)
MOST_BYTES = 400  # four calls


def clang() -> str:
    """The compiler.

    Raises:
        SystemExit: If there is none, or it has no libFuzzer.
    """
    name = os.environ.get("CLANG", "clang++").replace("clang-", "clang++-")
    program = shutil.which(name)
    if program is None:
        raise SystemExit(
            f"fuzz: needs clang with libFuzzer, and there is no {name} "
            "(Debian: apt-get install clang; CLANG=... names another)"
        )
    probe = 'extern "C" int LLVMFuzzerTestOneInput(const char*, unsigned long) { return 0; }'
    command = [program, "-fsanitize=fuzzer", "-x", "c++", "-", "-o", os.devnull]
    done = subprocess.run(command, input=probe, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(
            f"fuzz: {program} has no libFuzzer (Debian: libfuzzer-19-dev for clang-19)"
            f"\n{done.stderr}"
        )
    return program


def build(program: str, which: str, jobs: int) -> Path:
    """The fuzzer."""
    chain = Toolchain(FOLDER, program, FLAGS, openmp=False)
    objects = build_objects(which, jobs, chain)
    output = FOLDER / which / "fuzz_bindings"
    variables = sysconfig.get_config_vars()
    library = f"-lpython{variables['LDVERSION']}"
    places = [str(variables[name]) for name in ("LIBDIR", "LIBPL") if variables.get(name)]
    command = [
        program, f"-fsanitize=fuzzer,{SANITIZERS}", "-g1", "-std=c++17", "-O1",
        f"-I{sysconfig.get_paths()['include']}", str(HERE / "fuzz_bindings.cpp"),
        *map(str, objects.values()), *(f"-L{place}" for place in places),
        *(f"-Wl,-rpath,{place}" for place in places), library, "-ldl", "-lm", "-lutil",
        "-pthread", "-o", str(output),
    ]  # fmt: skip
    subprocess.run(command, check=True)
    return output


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="fuzz", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--isa", default="baseline", choices=["baseline", "all"])
    parser.add_argument("-j", "--jobs", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    fuzzer = build(clang(), options.isa, options.jobs)
    corpus, found = FOLDER / "corpus", FOLDER / "found"
    corpus.mkdir(exist_ok=True)
    found.mkdir(exist_ok=True)
    environment = {
        **os.environ,
        "PYTHONPATH": str(HERE),
        "PYTHONHOME": sys.base_prefix,
        "PYTHONMALLOC": "malloc",  # the sanitizer sees every object
        "PYTHONDONTWRITEBYTECODE": "1",
        "ASAN_OPTIONS": "allocator_may_return_null=1",
    }
    words = [
        f"-max_total_time={options.seconds}",
        f"-max_len={MOST_BYTES}",
        "-len_control=0",
        "-detect_leaks=0",
        f"-artifact_prefix={found}/",
        "-print_final_stats=1",
    ]
    arguments = [str(path.resolve()) for path in options.files] or [*words, str(corpus)]
    done = subprocess.run([str(fuzzer), *arguments], env=environment, cwd=FOLDER)
    print("nothing found" if done.returncode == 0 else f"found something: see {found}")
    return int(done.returncode != 0)


if __name__ == "__main__":
    sys.exit(main())
