# SPDX-License-Identifier: Apache-2.0
"""``pytest benchmarks`` times; the project's default turns timing off for the tests."""

from __future__ import annotations

import pytest


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    if "--benchmark-disable" not in config.invocation_params.args:
        config.option.benchmark_disable = False
