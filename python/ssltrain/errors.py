# SPDX-License-Identifier: Apache-2.0
"""What the command line says in one line: an error that the user can put right, or a note."""

from __future__ import annotations

import os
import sys


class UserError(ValueError):
    """Something the user can put right: a flag, a file, a size.

    The message is one sentence that says what is wrong and what to do. The command line prints
    it without a traceback and ends with exit code 2.
    """


def note(text: str) -> None:
    """Say something that a user should know, in one line on stderr; of many processes, one does."""
    if int(os.environ.get("RANK", "0")) == 0:
        print(f"ssltrain: note: {' '.join(text.split())}", file=sys.stderr, flush=True)
