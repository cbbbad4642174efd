# SPDX-License-Identifier: Apache-2.0
"""A pytest plugin that patches libraries before their own tests are imported.

    SSLKERNELS_PATCH=lightly PYTHONPATH=<here>:<sslkernels> pytest -p patch_plugin <tests of lightly>

Without SSLKERNELS_PATCH nothing is patched, so that both runs differ in this only.
"""

from __future__ import annotations

import os
import sys

import sslkernels
from sslkernels import integrations

_names = [name for name in os.environ.get("SSLKERNELS_PATCH", "").split(",") if name]
if _names:
    sslkernels.patch(*_names)


def pytest_report_header() -> str:
    return f"patched: {integrations.patched() or 'nothing'} in {sys.prefix}"
