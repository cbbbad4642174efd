# SPDX-License-Identifier: Apache-2.0
"""Tests that run Triton kernels in its interpreter.

The interpreter is chosen when Triton is first imported, so these files are collected only in a process
that was started with TRITON_INTERPRET=1: ``tests/test_triton_interpreter.py`` starts it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """NumPy warns where a GPU is silent: exp2 of a huge number is inf, log2(0) is -inf."""
    for item in items:
        item.add_marker(pytest.mark.filterwarnings("ignore::RuntimeWarning"))


@pytest.fixture(autouse=True)
def _poisoned_allocations() -> Iterator[None]:
    """torch.empty returns NaN (and the largest integer): what no kernel wrote must not be read."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
