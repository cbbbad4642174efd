# SPDX-License-Identifier: Apache-2.0
"""Small cases under pytest-benchmark, to save and compare runs of one machine with its tools.

    pytest benchmarks --benchmark-autosave
    pytest benchmarks --benchmark-compare --benchmark-group-by=param:case

``python -m benchmarks`` is the comparison between libraries: it binds threads, takes turns and
measures ceilings.
"""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.cases import Case
from benchmarks.contender import Missing
from benchmarks.contenders import CONTENDERS
from benchmarks.measure import make, verify

SMALL = [
    Case("nt_xent", 128),
    Case("nt_xent", 512),
    Case("moco", 4096),
    Case("enqueue", 4096),
    Case("ema", 40),
    Case("clip", 256),
    Case("siglip", 256),
    Case("sup_con", 256),
    Case("triplet", 256),
]
NOT_HERE = ("torch.compile", "pytorch-metric-learning")  # seconds to compile or to run
PAIRS = [
    pytest.param(case, name, id=f"{case.op}-{case.size}-{name}")
    for case in SMALL
    for name in CONTENDERS[case.op]
    if name not in NOT_HERE
]


@pytest.mark.parametrize(("case", "name"), PAIRS)
def test_step(benchmark: Any, case: Case, name: str) -> None:
    try:
        contender = make(name, case)
    except Missing as reason:
        pytest.skip(str(reason))
    verify(name, case, contender, case.truth())
    benchmark.group = f"{case.op} {case.shape}"
    benchmark(contender.step)
