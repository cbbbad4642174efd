# SPDX-License-Identifier: Apache-2.0
"""The CUDA backend from the public API down to the kernels, which run emulated on CPU tensors.

``backends/cuda.py`` is loaded on top of an extension module made of the real bindings and kernels,
compiled against the emulation, and told to take CPU tensors for those of a device.  What it
computes is compared with the CPU backend: the same bits for EMA, the error budget for the queue.
"""

from __future__ import annotations

import ctypes
import importlib.util
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from cuda_emulation import toolchain
from test_fuzz import AVERAGES, QUEUES, check_average, check_queue, run
from torch import Tensor

import sslkernels
from sslkernels.backends import devices, updates_torch
from sslkernels.ops import ema as ema_ops
from sslkernels.ops import registry

pytestmark = pytest.mark.skipif(toolchain.compiler() is None, reason="no C++ compiler")

BACKEND = Path(sslkernels.__file__).parent / "backends" / "cuda.py"
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
STREAM = 0x40


def load(path: Path, name: str) -> ModuleType:
    """A module from a file, not entered into sys.modules."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def extension() -> ModuleType:
    """sslkernels._cuda with emulated kernels."""
    return load(toolchain.build_module("fast"), "_cuda")


@pytest.fixture
def cuda(extension: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """backends/cuda.py on the emulated extension, serving CPU tensors."""
    monkeypatch.setitem(sys.modules, "sslkernels._cuda", extension)
    monkeypatch.setattr(sslkernels, "_cuda", extension, raising=False)
    module = load(BACKEND, "sslkernels.backends.cuda_on_cpu")
    monkeypatch.setattr(module, "_place", lambda op, name, x: (0, STREAM))
    return module


@pytest.fixture
def emulated(cuda: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The same, chosen by the ops for every device."""
    with monkeypatch.context() as patch:
        patch.setattr(registry, "resolve", lambda device, family="tiles": cuda)
        patch.setattr(ema_ops, "_PLANS", {})
        yield cuda


def pairs(seed: int) -> tuple[list[Tensor], list[Tensor]]:
    """Every pair of dtypes; contiguous, channels last, transposed, sliced, empty, 0-d."""
    generator = torch.Generator().manual_seed(seed)

    def make(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    targets, sources = [], []
    for i, target_dtype in enumerate(DTYPES):
        for j, source_dtype in enumerate(DTYPES):
            n = 5 + 613 * i + 97 * j
            targets.append(make((n,), target_dtype))
            sources.append(make((n,), source_dtype))
    strided = [
        lambda x: x.to(memory_format=torch.channels_last),
        lambda x: x.transpose(0, 1),
        lambda x: x[:, 1:, :, ::2],
        lambda x: x[:0],
    ]
    for k, view in enumerate(strided):
        targets.append(view(make((3, 4, 5, 6), DTYPES[k])))
        sources.append(view(make((3, 4, 5, 6), DTYPES[3 - k])))
        if k == 1:  # strided on one side only
            sources[-1] = sources[-1].contiguous()
    targets.append(make((), torch.float32))
    sources.append(make((), torch.float32))
    return targets, sources


def update(targets: list[Tensor], sources: list[Tensor], **options: object) -> None:
    """The public op twice: the first call makes a plan, the second finds it if it was kept."""
    for step in (4, 5):
        sslkernels.ema_update_(targets, sources, 0.9, seed=2**40 + 3, step=step, **options)


@pytest.mark.parametrize("stochastic", [False, True])
def test_ema_update_is_that_of_the_cpu(
    cuda: ModuleType, monkeypatch: pytest.MonkeyPatch, stochastic: bool
) -> None:
    """Bit for bit, for every pair of dtypes, layout and rounding."""
    expected, sources = pairs(0)
    update(expected, sources, stochastic_rounding=stochastic)
    targets, sources = pairs(0)
    versions = [t._version for t in targets]
    with monkeypatch.context() as patch:
        patch.setattr(registry, "resolve", lambda device, family="tiles": cuda)
        patch.setattr(ema_ops, "_PLANS", {})
        update(targets, sources, stochastic_rounding=stochastic)
    for i, (ours, cpu) in enumerate(zip(targets, expected, strict=True)):
        assert torch.equal(ours, cpu), f"pair {i}: {ours.dtype} <- {sources[i].dtype}"
        assert ours._version > versions[i]


def test_ema_module(emulated: ModuleType) -> None:
    """EMA(...).update through the emulated kernels, BatchNorm's buffers and a float32 average."""
    torch.manual_seed(0)
    online = torch.nn.Sequential(torch.nn.Conv2d(3, 5, 3), torch.nn.BatchNorm2d(5)).bfloat16()
    ema = sslkernels.EMA(online, decay=0.75, dtype=torch.float32)
    with torch.no_grad():
        for p in online.parameters():
            p.add_(torch.randn_like(p))
    online[1].num_batches_tracked += 7
    before = {n: p.clone() for n, p in ema.module.named_parameters()}
    ema.update(online)
    for name, p in ema.module.named_parameters():
        source = dict(online.named_parameters())[name].double()
        truth = 0.75 * before[name].double() + 0.25 * source
        assert p.dtype == torch.float32
        torch.testing.assert_close(p.double(), truth, rtol=2e-7, atol=2e-7)
    assert int(ema.module[1].num_batches_tracked) == 7


class _Capture:
    """What a stream that captures does: launches are recorded with their addresses, and not run."""

    def __init__(self, extension: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
        self.launches: list[tuple[str, dict[str, object]]] = []
        self.active = False
        self.extension = extension
        for name in ("ema_update", "enqueue"):
            monkeypatch.setattr(extension, name, self._launcher(name, getattr(extension, name)))
        monkeypatch.setattr(devices, "capturing", lambda device: self.active)

    def _launcher(self, name: str, run: Callable[..., None]) -> Callable[..., None]:
        self.__dict__[name] = run

        def launch(**arguments: object) -> None:
            if self.active:
                self.launches.append((name, arguments))
            else:
                run(**arguments)

        return launch

    def __enter__(self) -> None:
        self.active = True

    def __exit__(self, *_: object) -> None:
        self.active = False

    def replay(self) -> None:
        for name, arguments in self.launches:
            self.__dict__[name](**arguments)


@pytest.fixture
def capture(
    emulated: ModuleType, extension: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> _Capture:
    """A stream that can capture; CPU tensors are taken for those of a GPU."""
    monkeypatch.setattr(ema_ops, "_CAPTURED", set())
    run = ema_ops.Update.run

    def run_on_gpu(self: ema_ops.Update, *args: object) -> None:
        self._gpus = [torch.device("cuda")]
        run(self, *args)

    monkeypatch.setattr(ema_ops.Update, "run", run_on_gpu)
    return _Capture(extension, monkeypatch)


def test_a_captured_plan_outlives_all_others(capture: _Capture) -> None:
    """Its table is what a graph reads: 40 more plans, and it is still there, with the same addresses."""
    target, source = torch.zeros(5000), torch.ones(5000)
    sslkernels.ema_update_([target], [source], 0.5)
    (_, plan), *_ = ema_ops._PLANS.values()
    table = weakref.ref(plan._parts[0]._table)
    with capture:
        sslkernels.ema_update_([target], [source], 0.5)
    assert (target == 0.5).all()  # not run yet
    others = [torch.zeros(3) for _ in range(40)]
    for other in others:
        sslkernels.ema_update_([other], [torch.ones(3)], 0.5)
    del plan
    assert all(known is not table for known in ema_ops._PLANS.values())
    assert table() is not None, "the graph would read a table that was given away"
    capture.replay()
    capture.replay()
    assert (target == 0.875).all()


def test_a_plan_that_did_not_run_in_a_capture_is_given_up(capture: _Capture) -> None:
    target, source = torch.zeros(50), torch.ones(50)
    sslkernels.ema_update_([target], [source], 0.5)
    (_, plan), *_ = ema_ops._PLANS.values()
    table = weakref.ref(plan._parts[0]._table)
    del plan
    others = [torch.zeros(3) for _ in range(40)]
    for other in others:
        sslkernels.ema_update_([other], [torch.ones(3)], 0.5)
    assert table() is None and len(ema_ops._PLANS) == ema_ops._MAX_PLANS


def test_a_first_update_inside_of_a_capture_is_an_error(capture: _Capture) -> None:
    """Its table would have to be copied while the stream records."""
    ema = sslkernels.EMA(torch.nn.Linear(3, 2), 0.5)
    with capture, pytest.raises(RuntimeError, match="update once before the capture"):
        sslkernels.ema_update_([torch.zeros(3)], [torch.ones(3)], 0.5)
    online = torch.nn.Linear(3, 2)
    with capture, pytest.raises(RuntimeError, match="update once before the capture"):
        ema.update(online)
    ema.update(online)
    with capture:
        ema.update(online)
    assert len(capture.launches) == 1


def test_the_op_of_a_compiled_step_keeps_its_table(
    cuda: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other tensor objects, the same memory: one table for all steps; another address makes another."""
    made = []
    plan = cuda.EmaPlan

    class Counted(plan):  # type: ignore[misc, valid-type]
        def __init__(self, *args: object) -> None:
            made.append(args)
            super().__init__(*args)

    monkeypatch.setattr(cuda, "EmaPlan", Counted)
    monkeypatch.setattr(registry, "resolve", lambda device, family="tiles": cuda)
    monkeypatch.setattr(ema_ops, "_OP_PLANS", {})
    monkeypatch.setattr(ema_ops, "_on_gpu", lambda tensors: True)
    target, source = torch.zeros(100), torch.ones(100)
    for _ in range(5):
        torch.ops.sslkernels.ema_update_([target.view(-1)], [source.view(-1)], 0.5)
    assert len(made) == 1 and torch.equal(target, torch.full((100,), 1 - 0.5**5))
    other = torch.zeros(100)
    torch.ops.sslkernels.ema_update_([other], [source], 0.5)
    assert len(made) == 2 and torch.equal(other, torch.full((100,), 0.5))
    for _ in range(40):
        torch.ops.sslkernels.ema_update_([torch.zeros(3)], [torch.ones(3)], 0.5)
    assert len(ema_ops._OP_PLANS) <= ema_ops._MAX_PLANS


def test_a_queue_counts_what_replays_enqueue(capture: _Capture) -> None:
    """The pointer moves on the device; the host asks it until the queue is full."""
    queue = sslkernels.KeyQueue(10, 4, labels=True)
    keys, labels = torch.randn(3, 4), torch.arange(3)
    queue.enqueue(keys, labels)
    with capture:
        queue.enqueue(keys, labels)
        with pytest.raises(RuntimeError, match="would stay 3 in every replay"):
            _ = queue.keys
        with pytest.raises(RuntimeError, match="fill the queue before the capture"):
            _ = queue.key_labels
    assert len(queue) == 3 and int(queue.queue_ptr) == 3
    for count in (6, 9, 10, 10):
        capture.replay()
        assert len(queue) == len(queue.keys) == len(queue.key_labels) == count
    assert int(queue.queue_ptr) == (5 * 3) % 10
    with capture:
        assert queue.keys.shape == (10, 4)
    queue.reset()
    capture.replay()
    queue.enqueue(keys, labels)
    assert len(queue) == 6
    capture.replay()
    assert len(queue) == 9


def test_source_may_be_its_own_target(cuda: ModuleType) -> None:
    x = torch.randn(5001)
    kept = x.clone()
    cuda.ema_update_([x], [x], 0.3)
    torch.testing.assert_close(x, kept, rtol=2e-7, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_decay_and_random_state_on_the_device(cuda: ModuleType, dtype: torch.dtype) -> None:
    """What a replayed CUDA graph does: the same launch, another decay and step each time."""
    start, source = torch.zeros(3000, dtype=torch.bfloat16), torch.randn(3000)
    replayed, called = start.clone(), start.clone()
    decay, state = torch.zeros((), dtype=dtype), torch.tensor([2**50 + 9, 0])
    plan = cuda.EmaPlan([replayed], [source])
    for step, value in enumerate((0.5, 0.75, 0.875)):
        decay.fill_(value)
        plan.run(decay, stochastic_rounding=True, rng_state=state)
        cuda.ema_update_(
            [called], [source], value, stochastic_rounding=True, seed=2**50 + 9, step=step
        )
        assert torch.equal(replayed, called)
    assert state.tolist() == [2**50 + 9, 3]


def test_one_launch_on_the_current_stream(
    cuda: ModuleType, extension: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    class Recorder:
        def __getattr__(self, name: str) -> object:
            function = getattr(extension, name)

            def call(*args: object, **kwargs: object) -> object:
                seen.append((name, kwargs.get("device"), kwargs.get("stream")))
                return function(*args, **kwargs)

            return call

    targets, sources = [torch.zeros(5), torch.zeros(9)], [torch.ones(5), torch.ones(9)]
    plan = cuda.EmaPlan(targets, sources)
    monkeypatch.setattr(cuda, "_cuda", Recorder())
    plan.run(0.5)
    queue, counters = torch.zeros(4, 3), torch.zeros(2, dtype=torch.int64)
    cuda.enqueue_(queue, counters[0], counters[1], torch.ones(2, 3), True)
    assert seen == [("ema_update", 0, STREAM), ("enqueue", 0, STREAM)]


@pytest.mark.parametrize("key_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("queue_dtype", DTYPES, ids=str)
def test_queue_is_that_of_the_cpu(
    cuda: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    key_dtype: torch.dtype,
    queue_dtype: torch.dtype,
) -> None:
    """Batches of every kind, strided keys, int32 labels: the same queue as on the CPU."""
    generator = torch.Generator().manual_seed(1)
    batches = [
        torch.randn(n, 40, generator=generator).to(key_dtype)[:, ::2] for n in (3, 11, 0, 29, 7)
    ]
    batches.append(torch.randn(20, 6, generator=generator).to(key_dtype).t())
    batches.append(torch.randn(1, 20, generator=generator).to(key_dtype).expand(4, 20))

    def fill() -> sslkernels.KeyQueue:
        queue = sslkernels.KeyQueue(13, 20, dtype=queue_dtype, labels=True)
        for i, keys in enumerate(batches):
            labels = torch.arange(keys.shape[0], dtype=torch.int32) + 100 * i
            queue.enqueue(keys, labels)
        return queue

    cpu = fill()
    with monkeypatch.context() as patch:
        patch.setattr(registry, "resolve", lambda device, family="tiles": cuda)
        ours = fill()
    assert int(ours.queue_ptr) == int(cpu.queue_ptr) == sum(len(k) for k in batches) % 13
    assert int(ours.fill) == int(cpu.fill) == len(ours) == 13
    assert torch.equal(ours.key_labels, cpu.key_labels)
    unit = torch.finfo(queue_dtype).eps
    if torch.float64 not in (key_dtype, queue_dtype):
        unit = max(unit, torch.finfo(torch.float32).eps)
    torch.testing.assert_close(
        ours.keys.double(), cpu.keys.double(), rtol=max(2 * unit, 4e-16), atol=unit / 64
    )


def test_queue_may_be_enqueued_into_itself(emulated: ModuleType) -> None:
    queue = sslkernels.KeyQueue(8, 4, normalize=False)
    queue.enqueue(torch.arange(24.0).reshape(6, 4))
    queue.enqueue(queue.keys)
    expected = torch.arange(24.0).reshape(6, 4)
    assert torch.equal(queue.keys[[6, 7, 0, 1, 2, 3]], expected)
    assert torch.equal(queue.keys[4:6], expected[4:])


@pytest.mark.parametrize(("n", "d"), [(0, 8), (3, 0), (0, 0), (9, 0)])
def test_queues_of_nothing(cuda: ModuleType, n: int, d: int) -> None:
    """The pointer moves by the number of keys, whether they have features or not."""
    results = []
    for backend in (updates_torch, cuda):
        queue, labels = torch.zeros(4, d), torch.zeros(4, dtype=torch.int64)
        pointer, fill = torch.tensor([3]), torch.tensor([2])
        backend.enqueue_(queue, pointer, fill, torch.ones(n, d), True, labels, torch.arange(n))
        results.append([queue, pointer, fill, labels])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


F32 = torch.zeros(4)


@pytest.mark.parametrize(
    ("targets", "sources", "error", "message"),
    [
        ([F32], [], ValueError, r"must have the same length, got 1 and 0"),
        ([F32], [torch.zeros(5)], ValueError, r"same number of elements, got 4 and 5"),
        ([F32.long()], [F32], TypeError, r"targets\[0\] must be float32.*got torch\.int64"),
        ([F32], [F32.int()], TypeError, r"sources\[0\] must be float32.*got torch\.int32"),
        ([F32, torch.zeros(4, 4).t()], [F32, torch.zeros(4, 4)], ValueError,
         r"targets\[1\] must be contiguous, got strides \[1, 4\]"),
        ([F32, F32], [F32, torch.zeros(4, device="meta")], ValueError,
         r"sources\[1\] must be on cpu like targets\[0\], got meta"),
        ([torch.frombuffer(bytearray(21), dtype=torch.float32, offset=1)], [torch.zeros(5)],
         ValueError, r"address of targets\[0\] must be a multiple of 4 bytes"),
    ],
)  # fmt: skip
def test_plan_refuses(
    cuda: ModuleType,
    targets: list[Tensor],
    sources: list[Tensor],
    error: type[Exception],
    message: str,
) -> None:
    with pytest.raises(error, match=f"ema_update_: .*{message}"):
        cuda.EmaPlan(targets, sources)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"decay": 1.5}, ValueError, r"decay must be in \[0, 1\], got 1\.5"),
        ({"decay": float("nan")}, ValueError, r"decay must be in \[0, 1\], got nan"),
        ({"decay": torch.tensor(1)}, TypeError, r"must be float32 or float64, got torch\.int64"),
        ({"decay": torch.ones(2)}, ValueError, r"must be one number on cpu, got \[2\]"),
        ({"decay": torch.ones((), device="meta")}, ValueError, r"one number on cpu.*meta"),
        (
            {"decay": 0.5, "rng_state": torch.zeros(2, dtype=torch.int64)},
            ValueError,
            r"must come with stochastic_rounding",
        ),
        (
            {"decay": 0.5, "rng_state": torch.zeros(2), "stochastic_rounding": True},
            TypeError,
            r"rng_state must be int64, got torch\.float32",
        ),
        (
            {"decay": 0.5, "rng_state": torch.zeros(3).long(), "stochastic_rounding": True},
            ValueError,
            r"rng_state must be contiguous \[2\] on cpu, got \[3\]",
        ),
    ],
)
def test_run_refuses(cuda: ModuleType, options: dict, error: type[Exception], message: str) -> None:
    target, source = torch.zeros(4), torch.ones(4)
    plan = cuda.EmaPlan([target], [source])
    with pytest.raises(error, match=f"ema_update_: .*{message}"):
        plan.run(**options)
    assert torch.equal(target, torch.zeros(4))


def test_cpu_tensors_are_refused(extension: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it is outside of these tests: it serves CUDA tensors only."""
    monkeypatch.setitem(sys.modules, "sslkernels._cuda", extension)
    monkeypatch.setattr(sslkernels, "_cuda", extension, raising=False)
    module = load(BACKEND, "sslkernels.backends.cuda_as_it_is")
    with pytest.raises(ValueError, match=r"ema_update_: targets\[0\] must be on a CUDA device"):
        module.EmaPlan([torch.zeros(3)], [torch.zeros(3)])
    counter = torch.zeros(1, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"enqueue_: queue must be on a CUDA device, got cpu"):
        module.enqueue_(torch.zeros(3, 2), counter, counter.clone(), torch.zeros(1, 2), True)
    assert module.why_unavailable(torch.device("cpu"))
    assert torch.cuda.is_available() or module.why_unavailable(torch.device("cuda"))


def _launches(extension: ModuleType) -> int:
    """How many kernels the emulation was told to launch so far."""
    counter = ctypes.CDLL(extension.__file__).emulation_launches
    counter.restype = ctypes.c_longlong
    return int(counter())


def test_empty_lists_launch_nothing(cuda: ModuleType, extension: ModuleType) -> None:
    """Counted by the emulation, which counts the update that is not empty."""
    before = _launches(extension)
    cuda.EmaPlan([], []).run(0.5)
    cuda.EmaPlan([torch.zeros(0)], [torch.zeros(0)]).run(0.5)
    counters = torch.zeros(2, dtype=torch.int64)
    cuda.enqueue_(torch.zeros(4, 3), counters[0], counters[1], torch.ones(0, 3), True)
    assert _launches(extension) == before and not counters.any()
    targets, sources = [torch.zeros(0), torch.zeros(2)], [torch.zeros(0), torch.ones(2)]
    cuda.EmaPlan(targets, sources).run(0.5)  # a plan holds addresses, not tensors
    assert targets[1].tolist() == [0.5, 0.5]
    assert _launches(extension) == before + 1


def test_import_without_the_extension() -> None:
    """The package and its ops work; the backend says what is missing."""
    script = (
        "import sys; sys.modules['sslkernels._cuda'] = None\n"
        "import sslkernels, torch\n"
        "t = torch.zeros(3); sslkernels.ema_update_([t], [torch.ones(3)], 0.5); print(t.tolist())\n"
        "try:\n    import sslkernels.backends.cuda\n"
        "except ImportError as error:\n    print(error)\n"
    )
    root = Path(sslkernels.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd=root
    )
    assert done.returncode == 0, done.stderr
    assert "[0.5, 0.5, 0.5]" in done.stdout
    assert "sslkernels._cuda is not usable" in done.stdout and "SSLKERNELS_CUDA=1" in done.stdout


# ---- Random cases --------------------------------------------------------------------------------


@pytest.mark.parametrize("few", [8, pytest.param(3000, marks=pytest.mark.campaign)])
def test_random_queues(emulated: ModuleType, request: pytest.FixtureRequest, few: int) -> None:
    """Those of tests/test_fuzz.py, with pointers of the 44 bits that the kernel keeps of them."""

    def check(case: dict[str, Any]) -> None:
        check_queue({**case, "ptr": case["ptr"] % 2**44}, ["cuda"])

    run(request, QUEUES, check, few)


@pytest.mark.parametrize("few", [8, pytest.param(2000, marks=pytest.mark.campaign)])
def test_random_averages(emulated: ModuleType, request: pytest.FixtureRequest, few: int) -> None:
    run(request, AVERAGES, lambda case: check_average(case, ["cuda"]), few)
