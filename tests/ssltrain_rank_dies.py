# SPDX-License-Identifier: Apache-2.0
"""``torchrun ssltrain_rank_dies.py RANK STEP WORDS...``: a run whose process RANK is killed at a step."""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

from ssltrain.cli import main
from ssltrain.trainer import Trainer

original = Trainer._step


def step(self: Trainer, *arguments: Any) -> Any:
    if os.environ["RANK"] == sys.argv[1] and self.method.step == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
    return original(self, *arguments)


if __name__ == "__main__":
    # torchrun ends the other process when it sees that one is gone; here it has to find out by itself.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    Trainer._step = step  # type: ignore[method-assign]
    sys.exit(main(sys.argv[3:]))
