# SPDX-License-Identifier: Apache-2.0
"""EMA and queue on a real GPU: results, streams, devices, graphs, launches (make gpu-check)."""

from __future__ import annotations

import importlib
from types import ModuleType

import pytest
import torch
from torch import Tensor

import sslkernels

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def _why_not() -> str:
    if not torch.cuda.is_available():
        return "no CUDA device"
    try:
        module = importlib.import_module("sslkernels.backends.cuda")
    except ImportError as error:
        return str(error)
    return module.why_unavailable(torch.device("cuda"))


pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(bool(_why_not()), reason=_why_not() or "available"),
]


@pytest.fixture(scope="module")
def cuda() -> ModuleType:
    """The backend."""
    return importlib.import_module("sslkernels.backends.cuda")


def make_pairs(seed: int = 0) -> tuple[list[Tensor], list[Tensor]]:
    """CPU tensors: every pair of types, odd sizes, and views that start off 16 bytes."""
    generator = torch.Generator().manual_seed(seed)
    targets, sources = [], []
    for i, target_dtype in enumerate(DTYPES):
        for j, source_dtype in enumerate(DTYPES):
            for n in (0, 1, 3, 257, 4096, 4097 + i, 100_003 + j):
                targets.append(torch.randn(n + 3, generator=generator).to(target_dtype)[(n % 4) :])
                sources.append(torch.randn(n + 3, generator=generator).to(source_dtype)[(n % 4) :])
    return targets, sources


def to_device(tensors: list[Tensor], device: str = "cuda") -> list[Tensor]:
    """Copies on the device that start as far off 16 bytes as the originals do."""
    out = []
    for x in tensors:
        shift = x.storage_offset()
        base = torch.empty(shift + x.numel(), dtype=x.dtype, device=device)
        base[shift:] = x.to(device)
        out.append(base[shift:])
    return out


@pytest.mark.parametrize("stochastic", [False, True])
def test_ema_has_the_bits_of_the_cpu(stochastic: bool) -> None:
    targets, sources = make_pairs()
    on_device = to_device(targets), to_device(sources)
    for step in (0, 1):
        options = {"stochastic_rounding": stochastic, "seed": 2**41 + 7, "step": step}
        sslkernels.ema_update_(targets, sources, 0.99, **options)
        sslkernels.ema_update_(*on_device, 0.99, **options)
    for i, (cpu, gpu) in enumerate(zip(targets, on_device[0], strict=True)):
        assert torch.equal(cpu, gpu.cpu()), f"pair {i}: {cpu.dtype} <- {sources[i].dtype}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_ema_stochastic_moves_as_float32_does(cuda: ModuleType, dtype: torch.dtype) -> None:
    """10,000 steps at decay .999 from 1 towards 1.5: the mean within 1 % of the float64 answer."""
    target = torch.ones(4096, dtype=dtype, device="cuda")
    source = torch.full((4096,), 1.5, device="cuda")
    state = torch.tensor([5, 0], device="cuda")
    plan = cuda.EmaPlan([target], [source])
    for _ in range(10_000):
        plan.run(0.999, stochastic_rounding=True, rng_state=state)
    truth = 1.5 - 0.5 * 0.999**10_000
    assert abs(target.double().mean().item() - truth) < 0.01 * truth
    assert state.tolist() == [5, 10_000]


@pytest.mark.parametrize("queue_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("key_dtype", DTYPES, ids=str)
def test_queue_is_that_of_the_cpu(key_dtype: torch.dtype, queue_dtype: torch.dtype) -> None:
    queues = [
        sslkernels.KeyQueue(1000, 130, dtype=queue_dtype, labels=True).to(device)
        for device in ("cpu", "cuda")
    ]
    generator = torch.Generator().manual_seed(2)
    for i, n in enumerate((256, 1, 0, 999, 1500, 77)):
        keys = torch.randn(n, 130, generator=generator).to(key_dtype)
        labels = torch.arange(n) + 10_000 * i
        for queue in queues:
            queue.enqueue(keys.to(queue.queue.device), labels.to(queue.queue.device))
    cpu, gpu = queues
    assert int(cpu.queue_ptr) == int(gpu.queue_ptr) and int(cpu.fill) == int(gpu.fill)
    assert torch.equal(cpu.key_labels, gpu.key_labels.cpu())
    unit = torch.finfo(queue_dtype).eps
    if torch.float64 not in (key_dtype, queue_dtype):
        unit = max(unit, torch.finfo(torch.float32).eps)
    torch.testing.assert_close(
        gpu.keys.cpu().double(), cpu.keys.double(), rtol=max(3 * unit, 1e-15), atol=unit / 64
    )


def kernels_launched(function: object) -> list[str]:
    """Names of the device kernels that a call launches, copies and fills included."""
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiler:
        function()  # type: ignore[operator]
        torch.cuda.synchronize()
    return [e.name for e in profiler.events() if e.device_type == torch.autograd.DeviceType.CUDA]


def test_one_launch_and_no_synchronisation(cuda: ModuleType) -> None:
    targets, sources = (to_device(x) for x in make_pairs())
    plan = cuda.EmaPlan(targets, sources)
    queue = sslkernels.KeyQueue(512, 128).to("cuda")
    keys = torch.randn(256, 128, device="cuda")
    queue.enqueue(keys)
    plan.run(0.9)
    assert len(kernels_launched(lambda: plan.run(0.9))) == 1
    assert len(kernels_launched(lambda: queue.enqueue(keys))) == 1
    torch.cuda.set_sync_debug_mode("error")
    try:
        plan.run(0.9)
        queue.enqueue(keys)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_side_stream(cuda: ModuleType) -> None:
    """The launch is on the current stream: it sees what that stream wrote before."""
    stream = torch.cuda.Stream()
    target, source = torch.zeros(1 << 22, device="cuda"), torch.zeros(1 << 22, device="cuda")
    plan = cuda.EmaPlan([target], [source])
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # tens of ms, in which another stream would be done
        source.fill_(1.0)
        plan.run(0.5)
        result = target.clone()
    stream.synchronize()
    assert (result == 0.5).all()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_another_device_than_the_current_one() -> None:
    with torch.cuda.device(0):
        target, source = torch.zeros(999, device="cuda:1"), torch.ones(999, device="cuda:1")
        sslkernels.ema_update_([target], [source], 0.25)
        queue = sslkernels.KeyQueue(8, 4).to("cuda:1")
        queue.enqueue(torch.ones(3, 4, device="cuda:1"))
        assert torch.cuda.current_device() == 0
        assert (target == 0.75).all() and (queue.keys == 0.5).all()


def test_graph_replay_follows_the_schedule(cuda: ModuleType) -> None:
    """One capture, replayed with another decay, another step of random bits and other keys."""
    source = torch.randn(5000, device="cuda")
    target = torch.zeros(5000, dtype=torch.bfloat16, device="cuda")
    expected = target.clone()
    decay = torch.zeros((), device="cuda")
    state = torch.tensor([9, 0], device="cuda")
    queue = torch.zeros(10, 8, device="cuda")
    counters = torch.zeros(2, dtype=torch.int64, device="cuda")
    keys = torch.zeros(4, 8, device="cuda")
    plan = cuda.EmaPlan([target], [source])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        plan.run(decay, stochastic_rounding=True, rng_state=state)
        cuda.enqueue_(queue, counters[0], counters[1], keys, False)
    for step, value in enumerate((0.5, 0.75, 0.9, 0.99)):
        decay.fill_(value)
        keys.fill_(step + 1.0)
        graph.replay()
        on_host = decay.double().item()  # the float32 number that the kernel reads
        cuda.ema_update_([expected], [source], on_host, stochastic_rounding=True, seed=9, step=step)
        assert torch.equal(target, expected)
    assert state.tolist() == [9, 4]
    assert counters.tolist() == [16 % 10, 10]
    assert queue[:, 0].tolist() == [3, 3, 4, 4, 4, 4, 2, 2, 3, 3]


@pytest.mark.slow
def test_more_than_2_to_31_elements(cuda: ModuleType) -> None:
    """64-bit offsets: the last elements are reached, and only once."""
    n = 2**31 + 5
    if torch.cuda.mem_get_info()[0] < 5 * n:
        pytest.skip(f"needs {5 * n / 2**30:.0f} GiB of free GPU memory")
    target = torch.zeros(n, dtype=torch.bfloat16, device="cuda")
    source = torch.ones(n, dtype=torch.bfloat16, device="cuda")
    cuda.ema_update_([target], [source], 0.5)
    assert target[:3].tolist() == [0.5] * 3 and target[-7:].tolist() == [0.5] * 7
    assert target.count_nonzero().item() == n
