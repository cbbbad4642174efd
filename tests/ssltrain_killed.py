# SPDX-License-Identifier: Apache-2.0
"""Runs that die of SIGKILL at chosen moments, in forks of one process that has imported everything.

``python ssltrain_killed.py FOLDER DATA METHOD MOMENT...`` prints a line of JSON for each moment: how
the run ended, how its resumption ended.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ssltrain.commands  # noqa: F401  what a run imports late
import torch
from ssltrain import cli, runs
from ssltrain.trainer import Trainer
from ssltrain_helpers import run

WORDS = [
    "--epochs",
    "3",
    "--save-every",
    "1",
    "--keep-every",
    "2",
    "--knn-every",
    "1",
    "--evaluate",
    "false",
]


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def at_call(number: int, owner: Any, name: str, instead: Callable[..., Any]) -> None:
    """Put ``instead(original, *arguments)`` in the place of call ``number`` (from 1) of a function."""
    original, calls = getattr(owner, name), []

    def counted(*arguments: Any, **more: Any) -> Any:
        calls.append(None)
        if len(calls) == number:
            return instead(original, *arguments, **more)
        return original(*arguments, **more)

    setattr(owner, name, counted)


def before(original: Callable[..., Any], *arguments: Any, **more: Any) -> None:
    die()


def after(original: Callable[..., Any], *arguments: Any, **more: Any) -> None:
    original(*arguments, **more)
    die()


def half_saved(original: Callable[..., Any], state: Any, file: Any) -> None:
    original(state, file)
    file.truncate(file.tell() // 2)
    file.flush()
    die()


def half_a_line(original: Callable[..., Any], folder: Any, row: dict[str, float]) -> None:
    original(folder, row)
    raw = folder.metrics.read_bytes()
    folder.metrics.write_bytes(raw[: len(raw) - 40])
    die()


# Two steps an epoch, six in all. Checkpoints: the first moment, best and latest of each epoch, epoch 2.
MOMENTS: dict[str, Callable[[], None]] = {
    "before step 1": lambda: at_call(1, Trainer, "_step", before),
    "after step 3": lambda: at_call(3, Trainer, "_step", after),
    "after step 6": lambda: at_call(6, Trainer, "_step", after),
    "in the first checkpoint": lambda: at_call(1, torch, "save", half_saved),
    "in the third checkpoint": lambda: at_call(3, torch, "save", half_saved),
    "in the fifth checkpoint": lambda: at_call(5, torch, "save", half_saved),
    "before checkpoint 3 is moved": lambda: at_call(5, os, "replace", before),
    "after checkpoint 3 is moved": lambda: at_call(6, os, "replace", after),
    "in a line of metrics.csv": lambda: at_call(2, runs.RunFolder, "append_metrics", half_a_line),
    "before a line of metrics.csv": lambda: at_call(3, runs.RunFolder, "append_metrics", before),
}


def in_a_fork(work: Callable[[], int]) -> int:
    """The exit code of ``work``, or minus the signal that ended it."""
    child = os.fork()
    if child == 0:
        code = 99
        try:
            code = work()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main() -> None:
    folder, data, method = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
    torch.set_num_threads(1)  # no pool of threads, which a fork would lack
    # Not in a fork: so all of them have what a run imports late, which takes seconds.
    print(json.dumps(["whole", run(method, data, folder / "whole", *WORDS), 0]), flush=True)
    for moment in sys.argv[4:]:
        patch, own = MOMENTS[moment], folder / moment

        def killed(patch: Callable[[], None] = patch, own: Path = own) -> int:
            patch()
            return run(method, data, own, *WORDS)

        def resumed(own: Path = own) -> int:
            return cli.main([method, "--resume", str(own)])

        print(json.dumps([moment, in_a_fork(killed), in_a_fork(resumed)]), flush=True)


if __name__ == "__main__":
    main()
