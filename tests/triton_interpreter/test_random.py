# SPDX-License-Identifier: Apache-2.0
"""The random cases of tests/test_fuzz.py on the Triton backend, of sizes for the interpreter."""

from __future__ import annotations

from functools import partial

import pytest
from fuzz_cases import LOSSES, LossCase, loss_cases
from hypothesis import strategies as st
from test_fuzz import NOISE, QUEUES, check_loss, check_noise, check_queue, run

ON = ("chunked", "triton")
SIZES = st.one_of(st.integers(0, 9), st.sampled_from((15, 16, 17, 31, 33, 64, 65)))
CAMPAIGN = pytest.param(1000, marks=pytest.mark.campaign)


@pytest.mark.parametrize("few", [6, CAMPAIGN])
def test_losses(request: pytest.FixtureRequest, few: int) -> None:
    line = request.config.getoption("--fuzz-case")
    if line:
        check_loss(LossCase.of(line), ON)
        return
    run(request, loss_cases(list(LOSSES), SIZES, SIZES), partial(check_loss, names=ON), few)


@pytest.mark.parametrize("few", [6, CAMPAIGN])
def test_queues(request: pytest.FixtureRequest, few: int) -> None:
    run(request, QUEUES, partial(check_queue, names=ON), few)


@pytest.mark.parametrize("few", [6, CAMPAIGN])
def test_noise(request: pytest.FixtureRequest, few: int) -> None:
    run(request, NOISE, partial(check_noise, names=ON), few)
