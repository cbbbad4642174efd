# SPDX-License-Identifier: Apache-2.0
"""KeyQueue against a list that does the same one key at a time."""

from __future__ import annotations

import copy
import io
from collections import deque
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import engine, engines, poisoned, threads
from torch import Tensor

from sslkernels import KeyQueue

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
# Around the lanes (4, 8, 16), four accumulators (64), the conversion block (512).
DIMS = [1, 3, 8, 24, 100, 128, 129, 513, 1025]


class SlowQueue:
    """One key at a time, in float64."""

    def __init__(self, size: int, dim: int) -> None:
        self.rows = torch.zeros(size, dim, dtype=torch.float64)
        self.labels = torch.full((size,), -1)
        self.order: deque[int] = deque(maxlen=size)
        self.ptr = 0

    def enqueue(self, keys: Tensor, labels: Tensor, normalize: bool) -> None:
        for key, label in zip(keys.double(), labels, strict=True):
            if normalize:
                key = key / max(float(key.norm()), 1e-12)
            self.rows[self.ptr], self.labels[self.ptr] = key, label
            self.order.append(self.ptr)
            self.ptr = (self.ptr + 1) % len(self.rows)


@pytest.mark.parametrize("name", engines())
@pytest.mark.parametrize("size", [1, 5, 64, 130])
def test_against_one_key_at_a_time(size: int, name: str) -> None:
    queue, slow = KeyQueue(size, 7, labels=True), SlowQueue(size, 7)
    bare = KeyQueue(size, 7)
    with engine(name):
        # Fits, wraps, a partial batch, nothing, exactly K, more than K, more than twice K.
        for step, n in enumerate([3, 4, 1, 0, size, 1, size + 2, 2 * size + 3, 2, 64, 63]):
            keys, labels = torch.randn(n, 7), torch.arange(n) + 100 * step
            slow.enqueue(keys, labels, True)
            queue.enqueue(keys, labels)
            bare.enqueue(keys)
            assert len(queue) == len(bare) == len(slow.order)
            assert int(queue.queue_ptr) == int(bare.queue_ptr) == slow.ptr
            assert int(queue.fill) == len(slow.order)
            torch.testing.assert_close(queue.queue.double(), slow.rows, rtol=1e-6, atol=1e-7)
            assert torch.equal(queue.queue, bare.queue)
            assert torch.equal(queue.labels, slow.labels)
            assert queue.keys.shape == (len(slow.order), 7)
            assert queue.keys.data_ptr() == queue.queue.data_ptr()
            assert torch.equal(queue.key_labels, slow.labels[: len(slow.order)])


@pytest.mark.parametrize("name", engines())
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("stored", DTYPES, ids=str)
def test_every_dtype_within_the_error_budget(stored: torch.dtype, dim: int, name: str) -> None:
    for given in DTYPES:
        for normalize in (True, False):
            keys = (torch.randn(9, dim) * 3).to(given)
            queue = KeyQueue(9, dim, dtype=stored, normalize=normalize)
            with engine(name):
                queue.enqueue(keys)
            if not normalize:
                wide = keys if torch.float64 in (given, stored) else keys.float()
                assert torch.equal(queue.queue, wide.to(stored))
                continue
            truth = F.normalize(keys.double(), dim=1)
            wide = keys.double() if torch.float64 in (given, stored) else keys.float()
            eager = F.normalize(wide, dim=1).to(stored)
            # An ulp; in float64 the truth itself may be off by another.
            slack = torch.finfo(stored).eps / (1 if stored == torch.float64 else 2)
            budget = (eager.double() - truth).abs().max() + slack
            error = (queue.queue.double() - truth).abs().max()
            assert error <= budget, f"{given} keys: {float(error):.2e} > {float(budget):.2e}"


@pytest.mark.parametrize("name", engines())
def test_layouts_of_keys(name: str) -> None:
    x = torch.randn(6, 10)
    want = F.normalize(x, dim=1)
    layouts = {
        "transposed": x.t().contiguous().t(),
        "rows strided": torch.randn(12, 10).index_copy(0, torch.arange(0, 12, 2), x)[::2],
        "columns strided": torch.stack([x, x * 9], dim=2)[:, :, 0],
        "poisoned": poisoned(x),
    }
    with engine(name):
        for layout, keys in layouts.items():
            queue = KeyQueue(6, 10)
            queue.enqueue(keys)
            torch.testing.assert_close(queue.keys, want, rtol=1e-6, atol=1e-7, msg=layout)
        queue = KeyQueue(3, 10)
        queue.enqueue(x[:1].expand(3, 10))
        torch.testing.assert_close(queue.keys, want[:1].expand(3, 10))


@pytest.mark.parametrize("name", engines())
def test_zero_rows_nan_and_extremes(name: str) -> None:
    keys = torch.zeros(6, 20)
    keys[1, 3] = float("nan")
    keys[2, 3] = float("inf")
    keys[3] = 1e-20  # below eps
    keys[4] = 1e-13  # norm 4.5e-13, below eps: divided by eps
    keys[5] = 1e15
    queue = KeyQueue(6, 20)
    with engine(name):
        queue.enqueue(keys)
    rows = queue.keys
    assert not rows[0].any()
    assert rows[1].isnan().all() and rows[2, 3].isnan() and not rows[2, :3].any()
    torch.testing.assert_close(rows[3], torch.full((20,), 1e-8))
    torch.testing.assert_close(rows[4], torch.full((20,), 0.1))
    torch.testing.assert_close(rows[5], torch.full((20,), 20**-0.5))


def test_same_bits_for_any_number_of_threads() -> None:
    keys = torch.randn(1000, 128)
    results = []
    for n in (1, 2, 5):
        queue = KeyQueue(700, 128)
        with threads(n):
            queue.enqueue(keys)
            queue.enqueue(keys[:333])
        results.append(queue.queue.clone())
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_memory_around_the_queue_is_not_written() -> None:
    base = torch.full((12, 4), 7.0)
    queue = KeyQueue(5, 4)
    queue.queue = base[3:8]
    for n in (3, 4, 11):
        queue.enqueue(torch.randn(n, 4))
    assert (base[:3] == 7).all() and (base[8:] == 7).all() and (base[3:8] != 7).all()


def test_keys_from_the_queue_itself() -> None:
    queue = KeyQueue(6, 3)
    queue.enqueue(torch.randn(6, 3))
    queue.enqueue(torch.randn(2, 3))
    before = queue.queue.clone()
    queue.enqueue(queue.keys[:5])  # written to rows 2, 3, 4, 5, 0 while it is read from 0 to 4
    torch.testing.assert_close(queue.queue[[2, 3, 4, 5, 0]], before[:5])
    torch.testing.assert_close(queue.queue[1], before[1])


def test_no_gradient() -> None:
    weight = torch.randn(3, requires_grad=True)
    queue = KeyQueue(4, 3)
    for _ in range(2):
        queue.enqueue(torch.randn(2, 3) * weight)
    assert not queue.queue.requires_grad and queue.queue.grad_fn is None


def test_version_counters_move() -> None:
    queue = KeyQueue(4, 3)
    queue.enqueue(torch.randn(4, 3))
    for _ in range(2):
        weight = torch.randn(2, 3, requires_grad=True)
        logits = (weight @ queue.keys.t()).sum()
        queue.enqueue(torch.randn(1, 3))
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            logits.backward()


def test_opcheck() -> None:
    op = torch.ops.sslkernels.queue_enqueue_.default
    for labels in (None, torch.arange(3)):
        state = KeyQueue(5, 4, labels=labels is not None)
        keys = torch.randn(3, 4, requires_grad=True)
        torch.library.opcheck(
            op, (state.queue, state.queue_ptr, state.fill, keys, True, state.labels, labels)
        )


def test_compiles_in_one_graph() -> None:
    queue, plain = KeyQueue(5, 4), KeyQueue(5, 4)

    def step(keys: Tensor) -> Tensor:
        queue.enqueue(keys)
        return queue.keys.sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for _ in range(4):
        keys = torch.randn(2, 4)
        total = compiled(keys)
        plain.enqueue(keys)
        torch.testing.assert_close(total, plain.keys.sum())
        assert torch.equal(queue.queue, plain.queue)
    assert len(queue) == len(plain) == 5  # and in eager mode again


def test_state_dict_holds_everything() -> None:
    queue = KeyQueue(7, 3, labels=True)
    queue.enqueue(torch.randn(5, 3), torch.arange(5))
    file = io.BytesIO()
    torch.save(queue.state_dict(), file)
    file.seek(0)
    other = KeyQueue(7, 3, labels=True)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert len(other) == 5
    for each in (queue, other):
        each.enqueue(torch.ones(4, 3), torch.arange(4))
    for a, b in zip(queue.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert len(other) == 7


def test_damaged_checkpoints_are_refused() -> None:
    queue = KeyQueue(7, 3)
    for name, value in (("queue_ptr", 7), ("queue_ptr", -1), ("fill", 8), ("fill", -2)):
        state = {**queue.state_dict(), name: torch.tensor([value])}
        with pytest.raises(ValueError, match=f"{name} must be in .* got {value}"):
            queue.load_state_dict(state)
    queue.queue_ptr.fill_(-5)  # by hand: no write outside of the queue all the same
    queue.fill.fill_(99)
    queue.enqueue(torch.randn(3, 3))
    assert len(queue) == 7 and 0 <= int(queue.queue_ptr) < 7


def test_length_follows_whoever_writes_the_buffers() -> None:
    queue = KeyQueue(7, 3)
    queue.enqueue(torch.randn(4, 3))
    queue.fill.fill_(2)
    assert len(queue) == 2
    queue.fill = torch.tensor([6])
    assert len(queue) == 6
    queue.enqueue(torch.randn(3, 3))
    assert len(queue) == 7
    queue.reset()
    assert len(queue) == 0 and queue.keys.shape == (0, 3) and bool(queue)
    queue.to(torch.float64)
    queue.enqueue(torch.randn(3, 3))
    assert len(queue) == 3 and queue.keys.dtype == torch.float64
    twin = copy.deepcopy(queue)
    twin.enqueue(torch.randn(2, 3))
    assert (len(queue), len(twin)) == (3, 5)


def test_replaced_buffers_are_noticed() -> None:
    queue = KeyQueue(7, 3)
    queue.enqueue(torch.randn(2, 3))
    queue.queue.data = torch.zeros(4, 3)  # fewer rows: the old address and size would be a crash
    queue.queue_ptr.zero_()
    queue.enqueue(torch.ones(3, 3))
    torch.testing.assert_close(queue.queue[:3], torch.full((3, 3), 3**-0.5))


def test_from_moco() -> None:
    official = {
        "module.encoder_q.weight": torch.randn(2),
        "module.queue": F.normalize(torch.randn(16, 32), dim=0),
        "module.queue_ptr": torch.tensor([8]),
    }
    for state in (official, {"state_dict": official}, {k[7:]: v for k, v in official.items()}):
        queue = KeyQueue.from_moco(state)
        assert torch.equal(queue.queue, official["module.queue"].t()) and len(queue) == 32
        assert queue.queue.is_contiguous()
        key = F.normalize(torch.randn(1, 16), dim=1)
        queue.enqueue(key)
        torch.testing.assert_close(queue.queue[8:9], key)
        assert int(queue.queue_ptr) == 9
    with pytest.raises(KeyError, match="'queue' or 'module.queue'"):
        KeyQueue.from_moco({"weight": torch.randn(2)})
    with pytest.raises(ValueError, match=r"queue_ptr must be in \[0, 32\), got 40"):
        KeyQueue.from_moco({"queue": torch.randn(16, 32), "queue_ptr": torch.tensor([40])})
    with pytest.raises(ValueError, match=r"must be \[dim, size\]"):
        KeyQueue.from_moco({"queue": torch.randn(16)})


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize(
    ("keys", "labels", "kind", "message"),
    [
        (torch.randn(2, 4), None, ValueError, r"keys must have shape \[N, 3\], got \[2, 4\]"),
        (torch.randn(3), None, ValueError, r"keys must have shape \[N, 3\], got \[3\]"),
        (torch.ones(2, 3).int(), None, TypeError, "float32.*got torch.int32"),
        (torch.randn(2, 3), torch.arange(2), ValueError, "labels must be given if and only if"),
        ([[1.0, 2.0, 3.0]], None, TypeError, "keys must be a tensor, got list"),
        (
            torch.randn(2, 3, device="meta"),
            None,
            ValueError,
            "device of the queue, got meta and cpu",
        ),
    ],
)
def test_refusals(keys, labels, kind, message, warm) -> None:  # type: ignore[no-untyped-def]
    queue = KeyQueue(5, 3)
    if warm:
        queue.enqueue(torch.randn(2, 3))
    state = copy.deepcopy(queue.state_dict())
    with pytest.raises(kind, match="enqueue: .*" + message):
        queue.enqueue(keys, labels)
    assert all(torch.equal(v, state[k]) for k, v in queue.state_dict().items())


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (None, "if and only if"),
        (torch.arange(3), r"integers of shape \[2\]"),
        (torch.ones(2), r"integers of shape \[2\]"),
    ],
)
def test_labels_that_do_not_fit(labels: Tensor | None, message: str) -> None:
    queue = KeyQueue(5, 3, labels=True)
    with pytest.raises(ValueError, match=message):
        queue.enqueue(torch.randn(2, 3), labels)
    with pytest.raises(RuntimeError, match="holds no labels"):
        _ = KeyQueue(5, 3).key_labels


@pytest.mark.parametrize(("size", "dim", "name"), [(0, 3, "size"), (5, 0, "dim"), (2.5, 3, "size")])
def test_sizes_that_make_no_queue(size: int, dim: int, name: str) -> None:
    with pytest.raises(
        (TypeError, ValueError), match=f"KeyQueue: {name} must be an integer of at least 1"
    ):
        KeyQueue(size, dim)
    with pytest.raises(TypeError, match="KeyQueue: dtype must be"):
        KeyQueue(4, 4, dtype=torch.int64)


def test_gather_without_processes_is_a_plain_queue() -> None:
    queue = KeyQueue(5, 2, gather=True)
    queue.enqueue(torch.randn(3, 2))
    assert len(queue) == 3


def test_the_digest_is_that_of_all_state() -> None:
    def filled(**arguments: Any) -> KeyQueue:
        queue = KeyQueue(5, 2, **arguments)
        queue.enqueue(
            torch.arange(6.0).view(3, 2), torch.arange(3) if queue.labels is not None else None
        )
        return queue

    queue = filled(labels=True)
    digests = [
        queue.digest(),
        filled().digest(),
        filled(labels=True, dtype=torch.bfloat16).digest(),
    ]
    for name, value in (("queue", -0.0), ("queue_ptr", 4), ("fill", 4), ("labels", 7)):
        other = filled(labels=True)
        getattr(other, name)[-1] = (
            value  # the last row of the queue is 0.0: a bit of a row not filled
        )
        digests.append(other.digest())
    assert len(set(digests)) == len(digests)
    assert filled(labels=True).digest() == digests[0]
    other = KeyQueue(5, 2, labels=True)
    other.load_state_dict(queue.state_dict())
    assert other.digest() == digests[0]
