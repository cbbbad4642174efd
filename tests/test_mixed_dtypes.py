# SPDX-License-Identifier: Apache-2.0
"""Inputs of different dtypes: the widest one counts, gradients come back in the dtype of each input.

Queries from autocast against a float32 queue are the usual case of MoCo.
"""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from helpers import SLACK, check_budget, engine, engines
from loss_cases import CASES, ON_TILES, Case, negatives, views
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import sslkernels as ssl
from sslkernels import metrics, reference

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
MIXES = [(BF16, F32), (F32, BF16), (F16, F32), (BF16, F16), (F32, F64), (F64, BF16)]
MIXABLE = [c for c in CASES if sum(x.ndim > 0 for x in c.make(4, 4)) > 1]


def mixed(case: Case, dtypes: tuple[torch.dtype, ...], n: int, d: int) -> list[Tensor]:
    """Inputs of a case, matrices in the dtypes by turns; scalars stay float32."""
    turns = itertools.cycle(dtypes)
    return [x.to(next(turns)) if x.ndim else x for x in case.make(n, d)]


def widest(inputs: list[Tensor]) -> torch.dtype:
    return F64 if any(x.dtype == F64 for x in inputs) else F32


def check(case: Case, inputs: list[Tensor], name: str) -> None:
    """Loss and gradients within the budget of each input's own dtype."""
    results = []
    for module, wide in ((ssl, False), (reference, False), (reference, True)):
        leaves = [(x.double() if wide else x).detach().clone().requires_grad_() for x in inputs]
        loss = case.call(module, leaves)
        seed = torch.linspace(0.5, 1.5, loss.numel()).view(loss.shape).to(loss.dtype)
        results.append((loss, torch.autograd.grad(loss, leaves, seed, allow_unused=True)))
    (loss, grads), (eager, eager_grads), (truth, true_grads) = results
    assert loss.dtype == eager.dtype == widest(inputs), f"{name}: {loss.dtype}"
    check_budget(loss, eager, truth, 2e-6, f"{name} loss", floor=1.0)
    for x, g, e, t in zip(inputs, grads, eager_grads, true_grads, strict=True):
        if t is None:
            assert g is None, f"{name}: a gradient where there should be none"
            continue
        assert g is not None and g.dtype == x.dtype, f"{name}: no gradient of {x.dtype}"
        slack, floor = (max(5e-6, SLACK[x.dtype]), 2e-2) if x.ndim else (5e-6, 25.0)
        check_budget(g, e, t, slack, f"{name} gradient of {list(x.shape)} {x.dtype}", floor)


@pytest.mark.parametrize("dtypes", MIXES, ids=lambda m: "-".join(str(d)[6:] for d in m))
@pytest.mark.parametrize("case", MIXABLE, ids=lambda c: c.name)
def test_against_float64_truth(case: Case, dtypes: tuple[torch.dtype, ...]) -> None:
    """Every loss of two or more matrices; both orders."""
    check(case, mixed(case, dtypes, 33, 40), case.name)


@pytest.mark.parametrize("case", [c for c in ON_TILES if c in MIXABLE], ids=lambda c: c.name)
def test_on_every_engine(case: Case) -> None:
    """Whatever the backend and instruction set."""
    for name in engines():
        with engine(name):
            check(case, mixed(case, (BF16, F32), 65, 24), f"{case.name} {name}")


@pytest.mark.parametrize("case", MIXABLE, ids=lambda c: c.name)
def test_autocast_and_compile_change_nothing(case: Case) -> None:
    """The same loss under autocast, and in a full graph."""
    inputs = mixed(case, (BF16, F32), 9, 8)
    expected = case.call(ssl, inputs)
    with torch.autocast("cpu", dtype=BF16):
        assert torch.equal(case.call(ssl, inputs), expected)
    torch.compiler.reset()
    compiled = torch.compile(
        lambda *x: case.call(ssl, list(x)), fullgraph=True, backend="aot_eager"
    )
    torch.testing.assert_close(compiled(*inputs), expected)


def test_metrics_of_mixed_dtypes() -> None:
    """return_metrics, and the accuracy on its own."""
    query, key = (x.to(t) for x, t in zip(views(40, 12, noise=1.5), (BF16, F32), strict=True))
    queue = negatives(40, 12)
    for call in (
        lambda m: m.info_nce_loss(query, key, queue, return_metrics=True),
        lambda m: m.info_nce_loss(query, key, return_metrics=True),
        lambda m: m.nt_xent_loss(query, key, return_metrics=True),
        lambda m: m.clip_loss(query, key, 5.0, normalize=True, return_metrics=True),
    ):
        for got, expected in zip(call(ssl)[1], call(reference)[1], strict=True):
            torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    got = metrics.contrastive_accuracy(query, key)
    assert torch.equal(torch.stack(got), torch.stack(reference.contrastive_accuracy(query, key)))


def test_forward_mode_of_mixed_dtypes() -> None:
    """Tangents in the dtype of their input, against the reference."""
    query, key = (x.to(t) for x, t in zip(views(16, 8), (BF16, F32), strict=True))
    queue = negatives(16, 8).to(F16)
    for call in (
        lambda m, x: m.info_nce_loss(x, key, queue, 0.2),
        lambda m, x: m.clip_loss(x, key, 5.0, normalize=True),
        lambda m, x: m.byol_loss(x, key),
    ):
        ours, truth = (
            torch.func.jvp(lambda x, m=m, call=call: call(m, x), (query,), (key.to(BF16),))
            for m in (ssl, reference)
        )
        torch.testing.assert_close(ours, truth, rtol=1e-5, atol=1e-5)
        assert ours[1].dtype == F32 and ours[1].abs() > 0


class Conversions(TorchDispatchMode):
    """Counts the elements of the results of dtype conversions."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default:
            self.elements += out.numel()
        return out


def test_a_wider_queue_is_not_copied() -> None:
    """Halves against a float32 queue: query and key are converted, the queue is not."""
    query, key = (x.bfloat16().requires_grad_() for x in views(16, 8))
    queue = torch.randn(4096, 8)
    with Conversions() as seen:
        ssl.info_nce_loss(query, key, queue).backward()
    assert seen.elements <= 4 * query.numel()


@pytest.mark.parametrize("queue_dtype", [BF16, F32, F64], ids=str)
@pytest.mark.parametrize("dtype", [BF16, F16, F32], ids=str)
def test_moco_step(dtype: torch.dtype, queue_dtype: torch.dtype) -> None:
    """MoCoLoss of queries in one dtype, keys in another, and a queue in a third."""
    loss = ssl.MoCoLoss(queue_size=24, dim=6, temperature=0.2, dtype=queue_dtype)
    loss.queue.enqueue(views(20, 6)[0].to(F16))
    bank = loss.queue.keys.clone()
    query, key = views(9, 6)
    leaf = query.to(dtype).requires_grad_()
    value = loss(leaf, key)
    value.backward()
    assert value.dtype == (F64 if queue_dtype == F64 else F32)
    assert leaf.grad is not None and leaf.grad.dtype == dtype
    assert len(loss.queue) == 24 and loss.queue.queue.dtype == queue_dtype
    truth = reference.info_nce_loss(leaf.detach().double(), key.double(), bank.double(), 0.2)
    slack = max(2e-6, SLACK[queue_dtype])  # a 16-bit queue rounds query and key as well
    check_budget(value, truth, truth, slack, "loss", floor=1.0)


def test_moco_under_autocast() -> None:
    """A training step as people write it: linear layers give bfloat16, the queue is float32."""
    encoder = torch.nn.Linear(12, 6)
    target = copy.deepcopy(encoder)
    loss = ssl.MoCoLoss(queue_size=16, dim=6)
    queue = ssl.KeyQueue(16, 6)
    for x, y in (views(8, 12), views(8, 12, noise=1.0)):
        with torch.autocast("cpu", dtype=BF16):
            q = encoder(x)
            with torch.no_grad():
                k = target(y)
            assert q.dtype == k.dtype == BF16
            value = loss(q, k)
            explicit = ssl.info_nce_loss(q, k, queue.keys, 0.07)
            queue.enqueue(k)
        torch.testing.assert_close(value, explicit, rtol=1e-5, atol=1e-5)
        encoder.zero_grad()
        value.backward()
    assert torch.equal(queue.keys, loss.queue.keys)
    assert encoder.weight.grad is not None and bool(encoder.weight.grad.any())


def test_module_and_function_agree() -> None:
    """The nn.Modules take mixed dtypes as their functions do."""
    x, y = (v.to(t) for v, t in zip(views(8, 6), (BF16, F32), strict=True))
    assert torch.equal(ssl.InfoNCELoss()(x, y, y), ssl.info_nce_loss(x, y, y))
    assert torch.equal(ssl.CLIPLoss()(x, y, 3.0), ssl.clip_loss(x, y, 3.0))
    assert torch.equal(ssl.SigLIPLoss()(x, y, 3.0, 0.0), ssl.siglip_loss(x, y, 3.0, 0.0))
    assert torch.equal(ssl.BYOLLoss()(x, y), ssl.byol_loss(x, y))
