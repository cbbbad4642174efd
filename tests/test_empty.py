# SPDX-License-Identifier: Apache-2.0
"""Sizes of nothing: no rows, no features, no keys, a single row; in every loss and every backend.

Each gives what the definition in plain PyTorch gives, forward and backward, and no crash: a division by a
size in C++ would end the process.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any

import pytest
import torch
from helpers import assert_alike, available_isas, engine, outcome
from loss_cases import CASES, Case
from torch import Tensor

import sslkernels
from sslkernels import functional, metrics, reference
from sslkernels.backends import chunked, updates_torch
from sslkernels.backends.interface import RowState, Thresholds, Tiles, Wanted

# N, D: no rows, no features, neither, one row, and more rows than a block without features.
SIZES = [(0, 8), (4, 0), (0, 0), (1, 8), (1, 0), (70, 0)]


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_losses_of_nothing(on_engine: str, case: Case) -> None:
    for size, dtype in itertools.product(SIZES, (torch.float32, torch.float64, torch.float16)):
        inputs = [x.to(dtype) for x in case.make(*size)]
        got = outcome(lambda leaves: case.call(functional, leaves), inputs)
        want = outcome(lambda leaves: case.call(reference, leaves), [x.double() for x in inputs])
        where = f"{case.name}, N and D {size}, {dtype}"
        if dtype == torch.float16:  # gradients are rounded to the dtype of their input
            assert_alike(got, [want[0], *(g.half() for g in want[1:])], where, 4e-3)
        else:
            assert_alike(got, want, where)


@pytest.mark.parametrize(
    ("n", "m", "d"), list(itertools.product((0, 1, 3), (0, 2), (0, 8))), ids=str
)
@pytest.mark.parametrize("mode", ["unpaired", "paired"])
def test_info_nce_without_keys(on_engine: str, mode: str, n: int, m: int, d: int) -> None:
    """Every choice of what needs a gradient leads to other kernels."""
    negatives = torch.randn(m, d) if mode == "unpaired" else torch.randn(n, m, d)
    given = [torch.randn(n, d), torch.randn(n, d), negatives, torch.tensor(0.5)]

    def call(module: Any, wanted: tuple[int, ...], leaves: list[Tensor]) -> Tensor:
        inputs = [x.to(leaves[0].dtype) for x in given]
        for i, leaf in zip(wanted, leaves, strict=True):
            inputs[i] = leaf
        return module.info_nce_loss(*inputs, negative_mode=mode)

    for wanted in ((0, 1, 2, 3), (0, 1, 3), (2,), (1,), (0, 2)):
        leaves = [given[i] for i in wanted]
        got = outcome(functools.partial(call, functional, wanted), leaves)
        want = outcome(functools.partial(call, reference, wanted), [x.double() for x in leaves])
        assert_alike(got, want)


@pytest.mark.parametrize(("n", "d"), [(0, 8), (0, 0), (3, 0), (1, 8)])
def test_metrics_of_nothing(on_engine: str, n: int, d: int) -> None:
    a, b = torch.randn(n, d), torch.randn(n, d)
    for call in (
        lambda m: m.nt_xent_loss(a, b, return_metrics=True),
        lambda m: m.nt_xent_loss([a, b, a + b], return_metrics=True),
        lambda m: m.clip_loss(a, b, 2.0, return_metrics=True),
        lambda m: m.info_nce_loss(a, b, return_metrics=True),
        lambda m: m.info_nce_loss(a, b, b[:0], return_metrics=True),
    ):
        (loss, got), (want_loss, want) = call(functional), call(reference)
        assert_alike([loss, *got], [want_loss, *want])
    for name in ("feature_std", "effective_rank"):
        got, want = (getattr(m, name)(a) for m in (metrics, reference))
        assert_alike([got], [want])
    assert_alike(
        list(metrics.contrastive_accuracy(a, b)), list(reference.contrastive_accuracy(a, b))
    )


@pytest.mark.parametrize("zeros", [1, 2, 6])
def test_uniformity_with_zero_rows(on_engine: str, zeros: int) -> None:
    """They stay zero when rows are made unit vectors: not as far from others as those are."""
    z = torch.randn(6, 5)
    z[:zeros] = 0
    got = outcome(lambda leaves: functional.uniformity_loss(leaves[0]), [z])
    want = outcome(lambda leaves: reference.uniformity_loss(leaves[0]), [z.double()])
    assert_alike([got[0], got[1][zeros:]], [want[0], want[1][zeros:]])
    # The gradient of a row without a direction is times the 1e12 that it is divided by.
    assert_alike([got[1][:zeros] / 1e12], [want[1][:zeros] / 1e12])


# ---- The primitives of the CPU backend against their readable twin -----------------------------------


def reduced(
    backend: Any, kind: Any, tiles: Tiles, col: bool, drow: Tensor, dcol: Tensor
) -> list[Tensor]:
    """Everything that a backend makes of some tiles."""
    out = backend.pairwise_forward(kind, tiles, col, Thresholds(drow, dcol if col else None))
    results = list(out)
    rows, columns = RowState(out.row, drow), RowState(out.col, dcol) if col else None
    for want_q, want_k in itertools.product((False, True), repeat=2):
        if want_k and tiles.is_self:
            continue
        wanted = Wanted(want_q, want_k)
        dq, dk, dbias = backend.pairwise_backward(kind, tiles, rows, columns, wanted)
        results += ([dq] if want_q else []) + ([dk] if want_k else []) + [dbias]
    if kind == "lse" and not tiles.is_self:
        results += backend.attend(tiles, drow)
    if kind == "lse" and tiles.ids_q is not None:
        results += backend.extremes(tiles._replace(bias=dcol))
    return results


@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kind", ["lse", "softplus"])
def test_tiles_of_nothing(isa: str, dtype: torch.dtype, kind: str) -> None:
    from sslkernels.backends import cpu

    scale, bias = torch.tensor(2.0, dtype=dtype), torch.tensor(-0.5, dtype=dtype)
    for n, m, d in itertools.product((0, 1, 70), (None, 0, 1, 3), (0, 1, 5)):
        q = torch.randn(n, d, dtype=dtype)
        k = None if m is None else torch.randn(m, d, dtype=dtype)
        columns = n if m is None else m
        drow, dcol = torch.randn(n, dtype=dtype), torch.randn(columns, dtype=dtype)
        for ids, col in itertools.product((False, True), (False,) if k is None else (False, True)):
            ids_q = torch.arange(n) % 2 if ids else None
            ids_k = torch.arange(m) % 2 if ids and m is not None else None
            tiles = Tiles(q, k, scale, bias if kind == "softplus" else None, ids_q, ids_k)
            results = []
            for backend in (chunked, cpu):
                with engine(f"cpu:{isa}"):
                    results.append(reduced(backend, kind, tiles, col, drow, dcol))
            assert_alike(results[1], results[0], f"N={n} M={m} D={d} ids={ids} col={col}")


# ---- Queue and EMA --------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "d"), [(0, 8), (3, 0), (0, 0), (9, 0)])
def test_queues_of_nothing(on_engine: str, n: int, d: int) -> None:
    results = []
    for enqueue in (updates_torch.enqueue_, torch.ops.sslkernels.queue_enqueue_):
        queue, labels = torch.zeros(4, d), torch.zeros(4, dtype=torch.int64)
        pointer, fill = torch.tensor([3]), torch.tensor([2])
        enqueue(queue, pointer, fill, torch.randn(n, d), True, labels, torch.arange(n))
        results.append([queue, pointer, fill, labels])
    assert_alike(*results)


def test_queues_need_a_size_and_features() -> None:
    for size, dim in ((0, 4), (4, 0)):
        with pytest.raises(ValueError, match="must be an integer of at least 1, got 0"):
            sslkernels.KeyQueue(size, dim)
    queue = sslkernels.KeyQueue(4, 3)
    queue.enqueue(torch.randn(0, 3))
    assert len(queue) == 0 and queue.keys.shape == (0, 3)
    with pytest.raises(ValueError, match="K > 0"):
        torch.ops.sslkernels.queue_enqueue_(
            torch.zeros(0, 3), torch.tensor([0]), torch.tensor([0]), torch.zeros(2, 3), True
        )


def test_averages_of_nothing(on_engine: str) -> None:
    sslkernels.ema_update_([], [], 0.5)
    targets = [torch.zeros(0), torch.zeros(3, 0), torch.zeros(2)]
    sslkernels.ema_update_(targets, [torch.ones_like(x) for x in targets], 0.5)
    assert torch.equal(targets[2], torch.full((2,), 0.5))
