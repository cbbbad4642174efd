# SPDX-License-Identifier: Apache-2.0
"""Runs that die of SIGKILL at random moments and are resumed: a campaign, outside of ``make test``.

``python tests/ssltrain_kill_campaign.py FOLDER [--times 10] [--seed 0]`` trains each method once without
interruption, then kills ``--times`` runs, each after a random share of the time that the whole one took,
resumes them, and compares every tensor and number of the last checkpoint by its bits.  A line of JSON a run;
exit code 1 if any differs.  Run ``i`` draws its moment from seed ``--seed + i`` alone.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import ssltrain.commands  # noqa: F401  what a run imports late
import torch
from ssltrain import cli
from ssltrain.errors import UserError
from ssltrain.runs import RunFolder
from ssltrain_helpers import assert_same_bits, checkpoint, digits, rows, run, write_parts
from ssltrain_killed import in_a_fork

METHODS = ("simclr", "moco", "byol")
WORDS = [
    "--epochs",
    "12",
    "--save-every",
    "1",
    "--keep-every",
    "4",
    "--knn-every",
    "1",
    "--evaluate",
    "false",
]


def killed_after(seconds: float, method: str, data: str, folder: Path) -> int:
    """Exit code of a run in a fork that is sent SIGKILL after so many seconds."""
    child = os.fork()
    if child == 0:
        code = 99
        try:
            code = run(method, data, folder, *WORDS)
        finally:
            os._exit(code)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)  # not yet waited for, so the number is still that child's
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def one(seed: int, seconds: float, method: str, data: str, folder: Path) -> dict[str, Any]:
    """Kill and resume one run, and say whether it is the whole one."""
    moment = random.Random(seed).uniform(0, seconds)
    code = killed_after(moment, method, data, folder)
    done = len(rows(folder)) if (folder / "metrics.csv").is_file() else 0
    try:
        step = checkpoint(folder)["step"]
    except (OSError, UserError):
        step = None  # killed before the first checkpoint
    began = RunFolder(folder).config.is_file()

    def again() -> int:
        if not began:  # nothing was written that could be resumed
            return run(method, data, folder, *WORDS)
        return cli.main([method, "--resume", str(folder)])

    resumed = in_a_fork(again)
    try:
        assert_same_bits(checkpoint(folder), checkpoint(folder.parent / f"whole-{method}"))
        same = not list(folder.glob("*.partial"))
    except AssertionError:
        same = False
    return {
        "seed": seed,
        "method": method,
        "killed_after_s": round(moment, 3),
        "code": code,
        "epochs_done": done,
        "checkpoint_step": step,
        "resumed": resumed,
        "same_bits": same,
    }


def main() -> int:
    """Run the campaign."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--times", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)  # no pool of threads, which a fork would lack
    options.folder.mkdir(parents=True, exist_ok=True)
    data = write_parts(options.folder / "a.npz", *digits(600), train=512)
    seconds = {}
    for method in METHODS:
        # Once here, so that forks have what a run imports late; then in a fork, to be timed.
        run(method, data, options.folder / f"warm-{method}", *WORDS, "--stop-after", "1")
        started = time.perf_counter()
        whole = options.folder / f"whole-{method}"
        if in_a_fork(lambda method=method, whole=whole: run(method, data, whole, *WORDS)):
            return 2
        seconds[method] = time.perf_counter() - started
    found = []
    for i in range(options.times):
        seed, method = options.seed + i, METHODS[i % len(METHODS)]
        folder = options.folder / f"run-{seed}"
        found.append(one(seed, seconds[method], method, data, folder))
        print(json.dumps(found[-1]), flush=True)
    return int(any(not (trial["same_bits"] and trial["resumed"] == 0) for trial in found))


if __name__ == "__main__":
    sys.exit(main())
