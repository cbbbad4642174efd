# SPDX-License-Identifier: Apache-2.0
"""Programs of a grid run in any order on a GPU: the order must not change a bit.

The interpreter runs them one after the other.  Here the order is reversed and shuffled; a result that
depended on it (an atomic addition, a slot that two programs share, a read of what another program
writes) would change, which a kernel made to depend on it shows.
"""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Callable, Iterator

import pytest
import torch
import triton
import triton.language as tl
from test_engine import backward, between, forward, make
from torch import Tensor
from triton.runtime import interpreter
from triton.runtime.errors import InterpreterError

from sslkernels.backends import triton as backend
from sslkernels.backends.triton import configs


@contextlib.contextmanager
def grid_order(permute: Callable[[list[int]], list[int]]) -> Iterator[list[int]]:
    """Run every grid in another order; yields the sizes of the grids that ran."""
    builder = interpreter.interpreter_builder
    set_dim, set_index = builder.set_grid_dim, builder.set_grid_idx
    state: dict[str, list[int]] = {}
    sizes: list[int] = []

    def dim(*grid: int) -> None:
        set_dim(*grid)
        state["grid"] = list(grid)
        state["order"] = permute(list(range(math.prod(grid))))
        sizes.append(math.prod(grid))

    def index(x: int, y: int, z: int) -> None:
        _, ny, nz = state["grid"]
        n = state["order"][(x * ny + y) * nz + z]
        set_index(n // (ny * nz), n // nz % ny, n % nz)

    builder.set_grid_dim, builder.set_grid_idx = dim, index
    try:
        yield sizes
    finally:
        del builder.set_grid_dim, builder.set_grid_idx


def _shuffled(seed: int) -> Callable[[list[int]], list[int]]:
    return lambda order: random.Random(seed).sample(order, len(order))


ORDERS = {
    "as is": lambda order: order,
    "reversed": lambda order: order[::-1],
    "shuffled": _shuffled(1),
    "shuffled again": _shuffled(2),
}


@triton.jit
def _order_dependent_kernel(out_ptr, x_ptr):
    tl.atomic_add(out_ptr, tl.load(x_ptr + tl.program_id(0)))


def test_the_detector_detects() -> None:
    """A float32 atomic addition gives other bits in another order."""
    x = torch.tensor([1.0, 1e8, -1e8, 3.0, 1e-3] * 4)
    results = set()
    for permute in ORDERS.values():
        out = torch.zeros(1)
        with grid_order(permute) as sizes:
            _order_dependent_kernel[(20,)](out, x)
        assert sizes == [20]
        results.add(out.item())
    assert len(results) > 1


def _everything(kind: str, size: tuple[int, int | None, int]) -> list[Tensor]:
    case = make(*size, kind)
    cross = case.k is not None
    drow, dcol = torch.linspace(-1, 2, size[0]), torch.linspace(-2, 1, case.M)
    results = [*forward(case, cross, between(case, 1), between(case, 0) if cross else None)]
    for tables in ({}, {"fused": None}):
        with configs.override(**tables):
            results += backward(case, drow, dcol if cross else None, True, cross)
            if cross and kind == "lse":
                results += backend.attend(case.tiles, between(case, 1))
    labels = torch.arange(size[0]) % 3
    columns = torch.arange(case.M) % 4 if cross else None
    results += backend.extremes(case.tiles._replace(bias=None, ids_q=labels, ids_k=columns))
    target, source = torch.linspace(0, 1, 9000), torch.linspace(1, 3, 9000)
    backend.EmaPlan([target], [source]).run(0.99)
    queue, position, fill = torch.zeros(50, size[2]), torch.tensor([45]), torch.tensor([7])
    backend.enqueue_(queue, position, fill, case.q, True)
    unit, norm = backend.normalize_rows(case.q)
    dx = backend.normalize_rows_backward(torch.flip(case.q, (0, 1)), case.q, norm)
    return [*results, target, queue, position, fill, unit, norm, dx]


@pytest.mark.parametrize("kind", ["lse", "softplus"])
@pytest.mark.parametrize("size", [(70, 100, 24), (100, None, 24)], ids=str)
def test_any_order_gives_the_same_bits(size, kind) -> None:
    """Every kernel, with several programs each, and blocks that several of them share."""
    small = configs.Config(32, 32, 32, 4, 1)
    tables = {name: small for name in configs.TABLES}
    results = {}
    with configs.override(programs=8, **tables):
        for name, permute in ORDERS.items():
            with grid_order(permute) as sizes:
                results[name] = _everything(kind, size)
            assert max(sizes) >= 8
    for name in ORDERS:
        for ours, first in zip(results[name], results["as is"], strict=True):
            assert torch.equal(ours, first), f"order {name!r}"


@triton.jit
def _product_kernel(out_ptr, x_ptr):
    x = tl.load(x_ptr + tl.arange(0, 2))
    tl.store(out_ptr + tl.arange(0, 2), x * x)


def test_an_overflow_of_indices_is_noticed() -> None:
    """Signed products fail beyond their range, unsigned ones wrap: 46341 squared is 2^31 + 4633."""
    fits, wraps = torch.tensor([3, 46340]), torch.tensor([3, 46341])
    for kind in (torch.int32, torch.uint32):
        out = torch.zeros(2, dtype=kind)
        _product_kernel[(1,)](out, fits.to(kind))
        assert out.tolist() == [9, 46340**2]
    _product_kernel[(1,)](out, wraps.to(torch.uint32))
    assert out.tolist() == [9, 46341**2]
    with pytest.raises(InterpreterError, match="int32 overflow in mul"):
        _product_kernel[(1,)](torch.zeros(2, dtype=torch.int32), wraps.int())
