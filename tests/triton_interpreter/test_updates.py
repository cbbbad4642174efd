# SPDX-License-Identifier: Apache-2.0
"""Row normalisation, EMA and enqueue in the interpreter against their definitions."""

from __future__ import annotations

import weakref

import pytest
import torch
from dense import randn
from helpers import SLACK, check_budget, poisoned

from sslkernels.backends import triton as backend
from sslkernels.backends import updates_torch
from sslkernels.backends.triton.runtime import recorded_launches

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [(1, 1), (3, 8), (65, 100), (5, 129), (9, 1500)], ids=str)
def test_normalize_rows(size, dtype: torch.dtype) -> None:
    """Values and gradients of F.normalize; a zero row stays zero and its gradient is dunit / eps."""
    x = randn(*size, seed=1).to(dtype)
    if size[0] > 1:
        x[1] = 0.0
    dunit = torch.linspace(-1.0, 2.0, size[0] * size[1]).view(size).to(dtype)
    eps = 1e-3
    unit, norm = backend.normalize_rows(poisoned(x), eps)
    dx = backend.normalize_rows_backward(poisoned(dunit), poisoned(x), norm, eps)
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    results = []
    for wide in (acc, torch.float64):
        leaf = x.to(wide).requires_grad_()
        y = torch.nn.functional.normalize(leaf, dim=1, eps=eps)
        results.append((y, torch.autograd.grad(y, leaf, dunit.to(wide))[0]))
    (eager, eager_dx), (truth, true_dx) = results
    slack = {**SLACK, torch.bfloat16: 4e-3}[dtype]
    assert unit.dtype == dx.dtype == dtype and norm.dtype == acc
    check_budget(unit, eager.to(dtype), truth, slack, "unit")
    check_budget(dx, eager_dx.to(dtype), true_dx, slack, "dx")
    check_budget(norm, x.to(acc).norm(dim=1), x.double().norm(dim=1), 2e-6, "norm")


def test_normalize_takes_stride_0_and_nan() -> None:
    """An expanded gradient, and a NaN that stays in its row."""
    x = randn(4, 7, seed=2)
    _, norm = backend.normalize_rows(x)
    one = torch.tensor(0.5)
    dense = backend.normalize_rows_backward(one.repeat(4, 7), x, norm)
    assert torch.equal(backend.normalize_rows_backward(one.expand(4, 7), x, norm), dense)
    x[2, 3] = torch.nan
    unit, _ = backend.normalize_rows(x)
    assert unit.isnan().any(1).tolist() == [False, False, True, False]


@pytest.mark.parametrize("source_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("target_dtype", DTYPES, ids=str)
def test_ema(target_dtype: torch.dtype, source_dtype: torch.dtype) -> None:
    """fma(decay, t, (1 - decay) s) in float32 (float64 if either is), rounded once."""
    sizes = [1, 7, 4095, 4096, 4097, 0, 9000]
    sources = [randn(n, seed=n).to(source_dtype) for n in sizes]
    # Views that begin at an odd element: no address may be taken as aligned.
    buffers = [randn(n + 6, seed=n + 6).to(target_dtype) for n in sizes]
    targets = [buffer[3 : n + 3] for buffer, n in zip(buffers, sizes, strict=True)]
    before = [buffer.clone() for buffer in buffers]
    plan = backend.EmaPlan(targets, sources)
    for decay in (0.999, 1.0, 0.0, torch.tensor(0.9, dtype=torch.float64)):
        old = [t.clone() for t in targets]
        plan.run(decay)
        d = float(decay)
        for target, previous, source in zip(targets, old, sources, strict=True):
            exact = d * previous.double() + (1.0 - d) * source.double()
            ulp = torch.finfo(target_dtype).eps
            assert (target.double() - exact).abs().le(ulp * exact.abs() + 2e-7).all()
            if d == 1.0:
                assert torch.equal(target, previous)
    for buffer, first, n in zip(buffers, before, sizes, strict=True):
        assert torch.equal(buffer[:3], first[:3]) and torch.equal(buffer[n + 3 :], first[n + 3 :])


def test_ema_in_float64_keeps_the_digits_of_decay() -> None:
    """1 - 1e-9 is 1 in float32: a decay that Triton rounded would never move the target."""
    target, source = torch.zeros(5, dtype=torch.float64), torch.ones(5, dtype=torch.float64)
    backend.EmaPlan([target], [source]).run(1.0 - 1e-9)
    assert torch.allclose(target, torch.full_like(target, 1e-9), rtol=1e-6)


def test_ema_plan_is_one_launch_a_dtype_pair() -> None:
    """161 tensors, one launch; and the plan keeps no tensor alive."""
    targets, sources = ([make(10) for _ in range(161)] for make in (torch.ones, torch.zeros))
    plan = backend.EmaPlan(targets, sources)
    with recorded_launches() as log:
        plan.run(0.5)
    assert [entry.kernel for entry in log] == ["ema_kernel"]
    assert all(torch.equal(t, torch.full((10,), 0.5)) for t in targets)
    alive = weakref.ref(targets[0])
    del targets
    assert alive() is None and plan.HOLDS_NO_TENSORS


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_ema_rounds_stochastically_as_every_backend_does(dtype: torch.dtype) -> None:
    """The same bits for all magnitudes, infinities and NaN, several tensors, and beyond one program."""
    sizes = [3, 0, 5000]
    scales = torch.exp2(torch.linspace(-45, 20, 5000))
    sources = [(randn(n, seed=n) * scales[:n]) for n in sizes]
    sources[2][:3] = torch.tensor([torch.inf, -torch.inf, torch.nan])
    ours = [torch.zeros(n, dtype=dtype) for n in sizes]
    theirs = [t.clone() for t in ours]
    options = {"stochastic_rounding": True, "seed": 2**63 + 5, "step": 2**32 - 1}
    for decay in (0.0, 0.3):
        backend.EmaPlan(ours, sources).run(decay, **options)
        updates_torch.EmaPlan(theirs, sources).run(decay, **options)
        for mine, other in zip(ours, theirs, strict=True):
            assert torch.equal(mine.view(torch.int16), other.view(torch.int16))
    # A decay that a replayed graph reads anew.
    backend.EmaPlan(ours, sources).run(torch.tensor(0.3, dtype=torch.float64), **options)
    updates_torch.EmaPlan(theirs, sources).run(0.3, **options)
    assert torch.equal(ours[2].view(torch.int16), theirs[2].view(torch.int16))


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("start", [0, 7, 9])
@pytest.mark.parametrize("n_keys", [0, 1, 3, 9, 10, 11, 27])
def test_enqueue(n_keys: int, start: int, normalize: bool) -> None:
    """Key by key behind the pointer, wrapping; of more than K keys the newest K remain."""
    K, D = 10, 24
    for queue_dtype, key_dtype in ((torch.float32, torch.float32), (torch.float16, torch.bfloat16)):
        queue = torch.arange(K * D, dtype=torch.float32).view(K, D).to(queue_dtype)
        labels = -torch.arange(K)
        position, fill = torch.tensor([start]), torch.tensor([4])
        keys = randn(n_keys, D, seed=4).to(key_dtype)
        new_labels = torch.arange(n_keys) + 100
        expected, expected_labels = queue.clone(), labels.clone()
        rows = torch.nn.functional.normalize(keys.float(), dim=1) if normalize else keys.float()
        for i in range(n_keys):
            expected[(start + i) % K] = rows[i].to(queue_dtype)
            expected_labels[(start + i) % K] = new_labels[i]
        backend.enqueue_(queue, position, fill, poisoned(keys), normalize, labels, new_labels)
        if normalize:
            eps = torch.finfo(queue_dtype).eps
            assert torch.allclose(queue.float(), expected.float(), rtol=2 * eps, atol=1e-7)
        else:
            assert torch.equal(queue, expected)
        assert torch.equal(labels, expected_labels)
        assert position.item() == (start + n_keys) % K and fill.item() == min(4 + n_keys, K)


@pytest.mark.parametrize("pointer", [-1, -7, 10**12, -(2**63), 2**63 - 1])
@pytest.mark.parametrize("fill", [-5, 0, 2**63 - 1])
def test_counters_of_a_damaged_state_stay_inside_of_the_queue(pointer: int, fill: int) -> None:
    results = []
    for module in (backend, updates_torch):
        queue, position = torch.zeros(5, 3), torch.tensor([pointer])
        filled = torch.tensor([fill])
        module.enqueue_(queue, position, filled, torch.ones(3, 3), False, None, None)
        results.append((queue, position, filled))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
