# SPDX-License-Identifier: Apache-2.0
"""Sizes of nothing on the Triton backend; tests/test_empty.py does the same on the others."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_alike, outcome
from loss_cases import CASES, Case

import sslkernels
from sslkernels import functional, reference


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_losses_of_nothing(case: Case) -> None:
    for size in ((0, 8), (4, 0), (0, 0), (1, 8)):
        with torch.device("cpu"):
            inputs = case.make(*size)
        inputs = [x.to(torch.get_default_device()) for x in inputs]
        with sslkernels.backend("triton"):
            got = outcome(lambda leaves: case.call(functional, leaves), inputs)
        want = outcome(lambda leaves: case.call(reference, leaves), [x.double() for x in inputs])
        assert_alike(got, want, f"{case.name}, N and D {size}")
