# SPDX-License-Identifier: Apache-2.0
"""``python -m ssltrain`` is the ``ssltrain`` command."""

import sys

from ssltrain.cli import main

if __name__ == "__main__":
    sys.exit(main())
