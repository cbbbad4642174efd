# SPDX-License-Identifier: Apache-2.0
"""`make gpu-report`: compile every GPU kernel ahead of time and write the figures to docs/gpu.md.

Needs Triton and no GPU.  Three generated parts of the document are replaced: the compiled kernels
(registers, spills, shared memory, tensor-core instructions; for whole chunks, for a sample of other D, and
the kernels around the tiles), the model from machine code, and the roofline model.

    python -m benchmarks.gpu_report                       # the whole grid, writes docs/gpu.md
    python -m benchmarks.gpu_report --arch sm_89 gfx950   # other architectures, prints only
"""

from __future__ import annotations

import argparse
import importlib.metadata
import re
import sys
import time
from pathlib import Path

from benchmarks import gpu_model, gpu_roofline
from sslkernels.backends.triton import aot, configs

DOCS = Path(__file__).parents[1] / "docs" / "gpu.md"
SHORT = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}


def _cell(result: aot.Result | None) -> str:
    if result is None:
        return ""
    usage = result.usage
    if usage is None:
        return "**failed**"
    memory = f"{usage.registers} r, {usage.shared_bytes / 1024:.0f} K"
    if usage.tensor_memory:
        memory += f", {usage.tensor_memory} t"
    return f"**{memory}: {'; '.join(result.problems)}**" if result.problems else memory


def _table(results: list[aot.Result], dims: list[int]) -> list[str]:
    """Markdown: kernels and dtypes by dimension."""
    lines = [
        "| kernel | dtype | " + " | ".join(f"D = {D}" for D in dims) + " |",
        "|---|---|" + "---|" * len(dims),
    ]
    for variant in aot.VARIANTS:
        for dtype in SHORT:
            row = {
                r.case.D: r for r in results if (r.case.variant, r.case.dtype) == (variant, dtype)
            }
            if row:
                cells = " | ".join(_cell(row.get(D)) for D in dims)
                lines.append(f"| {variant} | {SHORT[dtype]} | {cells} |")
    return lines


def compiled_table(results: list[aot.Result], archs: list[str], dims: list[int]) -> list[str]:
    """For each architecture: kernels by whole chunks of D, a sample of other D, small kernels."""
    lines: list[str] = []
    for arch in archs:
        mine = [r for r in results if r.case.arch == arch]
        limit = configs.limits(arch)
        tiles = [r for r in mine if r.case.config is not None and r.case.dtype != "float32"]
        found = sorted({r.usage.tensor_core or "none" for r in tiles if r.usage})
        spilled = sum(r.usage.spill_bytes for r in mine if r.usage)
        lines += [
            "",
            f"### {arch}",
            "",
            f"{len(mine)} kernels, {spilled} bytes spilled, shared memory limit {limit.source}, "
            f"16-bit products by {', '.join(found)}.",
            "",
            *_table(mine, dims),
        ]
        ragged = sorted({r.case.D for r in mine if r.case.config is not None} - set(dims))
        if ragged:
            lines += ["", "A sample of other D:", "", *_table(mine, ragged)]
        small = [r for r in mine if r.case.config is None]
        if small:
            figures = (f"{r.case.variant} ({SHORT[r.case.dtype]}) {_cell(r)}" for r in small)
            lines += ["", "Around the tiles: " + "; ".join(figures) + "."]
    return lines


def _replace(text: str, name: str, lines: list[str]) -> str:
    begin, end = f"<!-- generated: {name} -->", f"<!-- end: {name} -->"
    pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.S)
    if not pattern.search(text):
        raise ValueError(f"gpu_report: {DOCS} must contain {begin} and {end}")
    body = "\n".join([begin, "", *lines, "", end])
    return pattern.sub(lambda _: body, text)


def main() -> int:
    """Compile, print what fails, write or print the tables; exit status 1 if a budget is broken."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--arch", nargs="+", default=list(aot.REPORTED), help="sm_90, gfx942, ...")
    parser.add_argument("--dims", nargs="+", type=int, default=list(aot.DIMS))
    parser.add_argument("--jobs", type=int, default=2, help="processes that compile")
    parser.add_argument("--print", action="store_true", help="print instead of writing docs/gpu.md")
    args = parser.parse_args()
    whole = args.dims == list(aot.DIMS)
    todo = aot.grid(args.arch) if whole else aot.cases(args.arch, args.dims)
    begin = time.perf_counter()
    done = 0

    def progress(result: aot.Result) -> None:
        nonlocal done
        done += 1
        for problem in result.problems:
            print(f"{result.case}: {problem}", file=sys.stderr)
        if done % 20 == 0 or done == len(todo):
            elapsed = time.perf_counter() - begin
            print(f"compiled {done} of {len(todo)} kernels, {elapsed:.0f} s", file=sys.stderr)

    results = aot.compile_cases(todo, args.jobs, progress)
    head = [
        f"Compiled ahead of time with Triton {importlib.metadata.version('triton')}; "
        f"kernels and configurations `{aot.fingerprint()}`.",
        "r: registers a thread, K: shared memory of a program in KiB, t: tensor-memory columns. "
        "A figure in bold is over its budget.",
    ]
    lines = head + compiled_table(results, args.arch, args.dims)
    bad = sum(bool(r.problems) for r in results)
    if args.print or args.arch != list(aot.REPORTED) or not whole:
        print("\n".join(lines))
    else:
        text = _replace(DOCS.read_text(), "compiled", lines)
        text = _replace(text, "roofline", gpu_roofline.table())
        DOCS.write_text(_replace(text, "model", gpu_model.table()))
        print(f"wrote {DOCS}")
    print(f"{len(results)} kernels, {bad} over budget")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
