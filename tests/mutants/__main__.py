# SPDX-License-Identifier: Apache-2.0
"""``python tests/mutants [-j JOBS] [NAME ...]``: try the mutants whose names contain one of the words.

First the unchanged copy must pass every test that a mutant is tried with.  The status is 1 if a mutant
survives, or does not build, or its text is no longer in the sources.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.dont_write_bytecode = True  # a mutant may have the size and the second of the file it replaces

from mutants.table import MUTANTS  # noqa: E402
from mutants.workshop import Mutant, Workshop, build_objects, isas, seconds, usable  # noqa: E402

Result = tuple[str, str, str]  # state, detail, time


def _setting(mutant: Mutant) -> str:
    return "baseline" if mutant.isa == "baseline" else "all"


def _work(number: int, todo: list[Mutant], objects: dict, results: multiprocessing.Queue) -> None:
    """Try ``todo``; None into ``results`` is the end, of a worker that fails too."""
    try:
        _try_all(Workshop(number), todo, objects, results)
    except Exception as error:
        results.put((f"worker {number}", "error", repr(error), ""))
    finally:
        results.put(None)


def _try_all(
    shop: Workshop, todo: list[Mutant], objects: dict, results: multiprocessing.Queue
) -> None:
    for which in sorted({_setting(m) for m in todo}):
        own = [m for m in todo if _setting(m) == which]
        shop.install(which, None, objects[which])
        for tests, interpreted in sorted({(m.tests, m.interpreted) for m in own}):
            start = time.monotonic()
            status, output = shop.test(tests, interpreted)
            if status != 0:
                results.put((" ".join(tests), "error", f"unchanged code: {status}\n{output}", ""))
                continue
            for mutant in own:
                if (mutant.tests, mutant.interpreted) != (tests, interpreted):
                    continue
                start = time.monotonic()
                results.put((mutant.name, *shop.attempt(mutant, objects[which]), seconds(start)))


def main() -> int:
    parser = argparse.ArgumentParser(prog="mutants", description=__doc__)
    parser.add_argument("names", nargs="*", help="only mutants whose names contain one of these")
    parser.add_argument("-j", "--jobs", type=int, default=min(4, os.cpu_count() or 1))
    options = parser.parse_args()
    chosen = [m for m in MUTANTS if not options.names or any(n in m.name for n in options.names)]
    for mutant in chosen:
        mutant.text()  # an error here is one of the table
    skipped = {m.name: f"the compiler has no {m.isa}" for m in chosen if m.isa not in isas("all")}
    able = usable()
    for mutant in chosen:
        if mutant.isa not in able:
            skipped.setdefault(mutant.name, f"this processor has no {mutant.isa}")
    todo = [m for m in chosen if m.name not in skipped]
    for name, reason in skipped.items():
        print(f"skipped   {name:44} {reason}")
    if not todo:
        return 0
    start = time.monotonic()
    objects = {which: build_objects(which, options.jobs) for which in {_setting(m) for m in todo}}
    print(
        f"{len(todo)} mutants; the unchanged kernels took {seconds(start)} to compile", flush=True
    )

    import numpy  # noqa: F401  # what every test imports, before the forks
    import pytest  # noqa: F401
    import torch  # noqa: F401

    # Mutants with the same tests stay together: those tests run on the unchanged code once.
    todo.sort(key=lambda m: (_setting(m), m.interpreted, m.tests))
    jobs = max(1, min(options.jobs, len(todo)))
    shares: list[list[Mutant]] = [[] for _ in range(jobs)]
    groups: dict[tuple, list[Mutant]] = {}
    for mutant in todo:
        groups.setdefault((_setting(mutant), mutant.tests), []).append(mutant)
    for group in sorted(groups.values(), key=len, reverse=True):
        min(shares, key=len).extend(group)
    results: multiprocessing.Queue = multiprocessing.Queue()
    workers = [
        multiprocessing.Process(target=_work, args=(i, share, objects, results))
        for i, share in enumerate(shares)
    ]
    for worker in workers:
        worker.start()
    counts: dict[str, int] = {}
    left = jobs
    while left:
        result = results.get()
        if result is None:
            left -= 1
            continue
        name, state, detail, took = result
        counts[state] = counts.get(state, 0) + 1
        print(f"{state:9} {name:44} {took:>8}  {detail}", flush=True)
    for worker in workers:
        worker.join()
    summary = ", ".join(f"{n} {state}" for state, n in sorted(counts.items()))
    print(f"{len(todo)} mutants: {summary}; {seconds(start)}")
    return int(counts.get("killed", 0) != len(todo))


if __name__ == "__main__":
    sys.exit(main())
