# SPDX-License-Identifier: Apache-2.0
"""One seed for the whole run, printed; every test starts from it and its own name."""

from __future__ import annotations

import os
import random
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import available_isas, engine, engines, instruction_set

import sslkernels
from sslkernels.ops import registry

SEED = int(os.environ.get("SSLKERNELS_TEST_SEED", "20240601"))


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fuzz", "tests/test_fuzz.py")
    group.addoption("--fuzz-examples", type=int, help="cases a test, more or fewer than it has")
    group.addoption("--fuzz-seed", type=int, help="other cases than those of `make test`")
    group.addoption("--fuzz-case", help="a single case, as a failure printed it")


def pytest_configure() -> None:
    """Stops where an extension of an older checkout would be imported in place of the built one."""
    builds = sorted(path.name for path in Path(sslkernels.__file__).parent.glob("_C.*.so"))
    if len(builds) > 1:
        pytest.exit(
            f"sslkernels has several builds of _C: {', '.join(builds)}; remove all but _C.abi3.so",
            4,
        )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Campaigns take minutes: they run where -m names them, as `make test-all` does."""
    items.sort(key=lambda item: item.get_closest_marker("early") is None)
    if "campaign" in config.getoption("markexpr"):
        return
    left_out = [item for item in items if item.get_closest_marker("campaign")]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


def pytest_report_header() -> list[str]:
    facts = sslkernels.info()
    return [
        f"seed: {SEED} (SSLKERNELS_TEST_SEED)",
        f"sslkernels {facts.version}, torch {facts.torch}, isa {facts.isa} of "
        f"{', '.join(facts.available_isas)}, {facts.threads} threads, "
        f"triton {facts.triton or 'not installed'}, CUDA device {facts.cuda_device or 'none'}",
    ]


@pytest.fixture(autouse=True)
def seed(request: pytest.FixtureRequest) -> int:
    """Seeds all generators by the run's seed and the test's name: order changes nothing."""
    own = (SEED + zlib.crc32(request.node.nodeid.encode())) % 2**31
    random.seed(own)
    np.random.seed(own)
    torch.manual_seed(own)
    return own


@pytest.fixture(autouse=True)
def clean_state() -> Iterator[None]:
    """Fails a test that leaves another number of threads or another backend behind."""
    threads, asked_for = torch.get_num_threads(), registry.requested()
    yield
    left = torch.get_num_threads(), registry.requested()
    if left != (threads, asked_for):
        torch.set_num_threads(threads)
        sslkernels.set_backend(asked_for)
        pytest.fail(f"threads and backend were {(threads, asked_for)}, the test left {left}")


@pytest.fixture(params=engines())
def on_engine(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run the test on each backend and instruction set."""
    with engine(request.param):
        yield request.param


@pytest.fixture(params=available_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run the test on every instruction set that this processor has."""
    with instruction_set(request.param):
        yield request.param


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Small tensors are fastest on one thread, and other tests keep their setting."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
