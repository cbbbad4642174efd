# SPDX-License-Identifier: Apache-2.0
"""``python -m ssltrain`` is the ``ssltrain`` command."""

import sys

from ssltrain.cli import command

if __name__ == "__main__":
    sys.exit(command())
