# SPDX-License-Identifier: Apache-2.0
"""Which products of float32 a GPU may use: split operands emulated, held to the error budget.

Tensor cores multiply tf32 exactly and add to float32, but cut off what does not fit (measured by Fasi,
Higham, Mikaitis and Pranesh 2021, and Ootomo and Yokota 2022, whose correction adds outside of them).  So
"tf32x3", three products of operands split in two, keeps the digits of the operands and loses them in the sum.
``configs.precision`` may only default to what stays within the budget of eager float32.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="the GPU backend needs triton (pip install triton)")

from sslkernels.backends.triton import configs  # noqa: E402

# Cheapest first by the model of docs/gpu.md.
CANDIDATES = ("tf32", "tf32x3", "ieee")
STEP = 8  # features that one tensor-core instruction adds up
SLACK = 2.0**-23  # of a log-sum-exp, whose rounding to float32 alone is half of it


def _tf32(x: np.ndarray) -> np.ndarray:
    """To the nearest with 10 explicit bits."""
    bits = x.astype(np.float32).view(np.uint32).astype(np.uint64) + 0x1000
    return (bits & ~np.uint64(0x1FFF)).astype(np.uint32).view(np.float32)


def _towards_zero(x: np.ndarray) -> np.ndarray:
    nearest = x.astype(np.float32)
    beyond = np.abs(nearest.astype(np.float64)) > np.abs(x)
    return np.where(beyond, np.nextafter(nearest, np.float32(0)), nearest)


def _nearest(x: np.ndarray) -> np.ndarray:
    return x.astype(np.float32)


def _products(
    z: np.ndarray, precision: str, rounding: Callable[[np.ndarray], np.ndarray]
) -> np.ndarray:
    """z z^T, a step of features at a time."""
    high = _tf32(z)
    low = _tf32(z - high)
    step, factors = (
        STEP,
        {"tf32": [(high, high)], "tf32x3": [(low, high), (high, low), (high, high)]},
    )
    if precision == "ieee":  # FMA units: one feature at a time, rounded to the nearest
        step, rounding, factors = 1, _nearest, {"ieee": [(z, z)]}
    total = np.zeros((len(z), len(z)), np.float32)
    for begin in range(0, z.shape[1], step):
        for a, b in factors[precision]:
            a, b = (x[:, begin : begin + step].astype(np.float64) for x in (a, b))
            total = rounding(total.astype(np.float64) + a @ b.T)
    return total


def _error(products: torch.Tensor, truth: torch.Tensor, temperature: float) -> float:
    """Largest error of the log-sum-exps of NT-Xent's negatives, over the largest of them."""
    n = len(truth) // 2
    ids = torch.arange(2 * n) % n
    lse = []
    for s in (products.double(), truth):
        s = (s / temperature).masked_fill(ids[:, None] == ids[None, :], -torch.inf)
        lse.append(torch.logsumexp(s, 1))
    return float((lse[0] - lse[1]).abs().max() / lse[1].abs().max())


def test_the_default_is_the_cheapest_within_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    """tf32 loses three digits; tf32x3 one, all of it in sums that are cut off."""
    monkeypatch.delenv("SSLKERNELS_TRITON_FP32", raising=False)
    generator = torch.Generator().manual_seed(0)
    worst: dict[str, float] = {}
    for D, temperature in ((128, 0.07), (512, 0.07), (128, 0.5)):
        views = torch.randn(1, 64, D, generator=generator)
        views = views + 0.5 * torch.randn(2, 64, D, generator=generator)
        z = torch.nn.functional.normalize(views.reshape(128, D), dim=1)
        truth = z.double() @ z.double().T
        budget = _error(z @ z.T, truth, temperature) + SLACK
        for name, precision, rounding in (
            *((name, name, _towards_zero) for name in CANDIDATES),
            ("tf32x3, sums to the nearest", "tf32x3", _nearest),
        ):
            products = torch.from_numpy(_products(z.numpy(), precision, rounding))
            ratio = _error(products, truth, temperature) / budget
            worst[name] = max(worst.get(name, 0.0), ratio)
    assert worst["tf32"] > 30 and worst["tf32x3, sums to the nearest"] < 1
    allowed = [name for name in CANDIDATES if worst[name] <= 1]
    assert allowed[0] == configs.precision(), worst
