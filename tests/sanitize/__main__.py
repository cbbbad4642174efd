# SPDX-License-Identifier: Apache-2.0
"""``python tests/sanitize [address thread ...]``: the CPU kernels under the compiler's sanitizers.

    address   AddressSanitizer and UndefinedBehaviorSanitizer
    thread    ThreadSanitizer, with OpenMP's functions on std::thread (gomp.cpp says why)

``kernels.cpp`` calls every kernel, on one and on four threads, from memory that ends where the data ends.  It
needs no Python and no torch, so a report can only be about these sources; there are no suppressions.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mutants.workshop import ROOT, compiler, isas, rules  # noqa: E402

HERE = Path(__file__).resolve().parent
FLAGS = {
    "address": ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g1"],
    "thread": ["-fsanitize=thread", "-g1"],
    "none": [],
}
CORE = ["csrc/dispatch.cpp", "csrc/memory.cpp", "csrc/portable.cpp"]
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
        [*common, *isas("all")[name], f"-DSSLK_ISA_NS={name}", "-c", source, "-o",
         str(folder / f"{name}-{Path(source).stem}.o")]
        for name in wanted
        for source in rules().CPU_SOURCES
    ] + [
        [*common, "-c", source, "-o", str(folder / f"{Path(source).stem}.o")] for source in CORE + OWN
    ]  # fmt: skip
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(lambda command: subprocess.run(command, cwd=ROOT, check=True), jobs_of))
    # libgomp is not linked: gomp.cpp stands in for it.
    objects = [command[-1] for command in jobs_of]
    link = [compiler(), *FLAGS[kind], *objects, "-pthread", "-o", str(program)]
    subprocess.run(link, check=True)
    return program


def main() -> int:
    parser = argparse.ArgumentParser(prog="sanitize", description=__doc__)
    parser.add_argument("kinds", nargs="*", default=["address", "thread"])
    parser.add_argument("--isa", default="baseline", help="one that this processor has")
    parser.add_argument("-j", "--jobs", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    failed = []
    for kind in options.kinds:
        program = build(kind, options.isa, jobs=options.jobs)
        print(f"{kind}:", flush=True)
        if subprocess.run([str(program), "check"]).returncode:
            failed.append(kind)
    print(f"failed: {', '.join(failed)}" if failed else "nothing found")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
