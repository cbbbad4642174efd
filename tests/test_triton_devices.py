# SPDX-License-Identifier: Apache-2.0
"""Launches on another GPU than the current one: tensors of cuda:1 without data, cuda:0 being current.

Triton launches on the current device, so every launch must switch to that of its tensors and back, take
its tile sizes from there, and allocate nothing elsewhere.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

pytest.importorskip("triton", reason="the GPU backend needs triton (pip install triton)")

from sslkernels.backends import devices  # noqa: E402
from sslkernels.backends import triton as ours  # noqa: E402
from sslkernels.backends.interface import (  # noqa: E402
    Kept,
    Problem,
    RowState,
    Thresholds,
    Tiles,
    Wanted,
)
from sslkernels.backends.triton import (  # noqa: E402
    autoencoders,
    configs,
    contrastive,
    features,
    gradients,
    launch,
    plan,
    runtime,
    updates,
)

pytestmark = pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
HERE = torch.device("cuda", 1)
MODULES = (autoencoders, contrastive, features, gradients, launch, plan, updates)


def _item(x: Tensor, index: Any) -> Tensor:
    dim = 0
    for at in index if isinstance(index, tuple) else (index,):
        if isinstance(at, slice):
            step = 1 if at.step is None else at.step
            x = torch.ops.aten.slice.Tensor(x, dim, at.start, at.stop, step)
            dim += 1
        elif at is None:
            x = torch.ops.aten.unsqueeze.default(x, dim)
            dim += 1
        else:
            x = torch.ops.aten.select.int(x, dim, at)
    return x


class WithoutGuards(TorchFunctionMode):
    """Some methods ask for a device guard, which a torch without CUDA has none of; their ops do not."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__getitem__:
            return _item(*args)
        if func is Tensor.__setitem__:
            x, index, value = args
            operation = torch.ops.aten.copy_ if isinstance(value, Tensor) else torch.ops.aten.fill_
            return operation(_item(x, index), value)
        if func is Tensor.contiguous and not args[0].is_contiguous():
            return args[0].clone(memory_format=torch.contiguous_format)
        if func is Tensor.contiguous:
            return args[0]
        return func(*args, **(kwargs or {}))


class Recorder:
    """In place of a kernel: notes its name, the device that is current, and those of its tensors."""

    def __init__(self, kernel: Any, current: list[int], seen: list[tuple[str, int]]) -> None:
        self.arg_names, self.__name__ = kernel.arg_names, kernel.__name__
        self.current, self.seen = current, seen

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def run(*args: Any, **flags: Any) -> None:
            flat = [x for a in args for x in (a if isinstance(a, tuple) else (a,))]
            found = {str(x.device) for x in flat if isinstance(x, Tensor)}
            assert found == {str(HERE)}, f"{self.__name__}: arguments on {found}"
            self.seen.append((self.__name__, self.current[-1]))

        return run


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, int]]]:
    """(Kernel, device that was current) of every launch; asking which device is current is an error."""
    current, seen = [0], []

    @contextlib.contextmanager
    def switch(device: torch.device | int) -> Iterator[None]:
        current.append(device if isinstance(device, int) else device.index)
        yield
        current.pop()

    def refuse() -> int:
        raise AssertionError("which device is current is asked")

    def gpu(index: int) -> devices.Gpu:
        assert index == 1, f"the facts of device {index}"
        return devices.Gpu("a GPU", "sm_90", 132)

    def record(kernel: Any, grid: tuple[int, ...], device: torch.device, *args: Any, **flags: Any):
        runtime.launch(Recorder(kernel, current, seen), grid, device, *args, **flags)

    for module in MODULES:
        monkeypatch.setattr(module, "launch", record)
    monkeypatch.setattr(torch.cuda, "device", switch)
    monkeypatch.setattr(torch.cuda, "current_device", refuse)
    monkeypatch.setattr(devices, "_gpu", gpu)
    monkeypatch.setattr(configs, "interpreting", lambda: False)
    monkeypatch.setattr(contrastive, "exact_dtype", lambda a: a.dtype)
    with FakeTensorMode(allow_non_fake_inputs=False), WithoutGuards():
        yield seen


def _tensors(dtype: torch.dtype, D: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Two views, a scale and ids."""
    a, b = (torch.empty(256, D, dtype=dtype, device=HERE) for _ in range(2))
    ids = torch.empty(256, dtype=torch.int64, device=HERE)
    return a, b, torch.empty((), device=HERE), ids


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("D", [128, 100, 512, 768])
def test_tiles(D: int, dtype: torch.dtype, launched: list[tuple[str, int]]) -> None:
    """Losses in one op and in tiles, attention, hard mining: kept on chip, copied first, by panels."""
    a, b, scale, ids = _tensors(dtype, D)
    problem = Problem("joint", a, b, None, scale)
    found, _ = ours.contrastive_forward(problem, False, False)
    dloss = torch.empty((), device=HERE)
    ours.contrastive_backward(problem, Kept(found.state, None), dloss, Wanted(True, True, True))
    tiles = Tiles(a, b, scale, None, ids, ids)
    for kind, bias in (("lse", None), ("softplus", scale)):
        here = tiles._replace(bias=bias)
        got = launch.pairwise_forward(kind, here, True, Thresholds(scale.expand(256)))
        state = RowState(got.row, got.row)
        launch.pairwise_backward(kind, here, state, state, Wanted(True, True))
    launch.attend(tiles, None)
    launch.extremes(Tiles(a, None, scale, None, ids))
    names = {name for name, _ in launched}
    assert {"forward_kernel", "combine_kernel", "extremes_kernel", "narrow_kernel"} <= names
    assert ("panel_kernel" in names) == (D == 768 or dtype == torch.float32)
    assert {current for _, current in launched} == {1}


def test_updates(launched: list[tuple[str, int]]) -> None:
    """Rows of unit length, the queue and the average."""
    a, _, scale, ids = _tensors(torch.float16, 128)
    unit, norm = updates.normalize_rows(a)
    updates.normalize_rows_backward(unit, a, norm)
    counters = torch.empty(2, dtype=torch.int64, device=HERE)
    updates.enqueue_(unit, counters[0], counters[1], a, True, ids, ids)
    updates.EmaPlan([a], [unit]).run(0.5)
    names = [name for name, _ in launched]
    assert names == [
        "normalize_kernel",
        "normalize_backward_kernel",
        "enqueue_kernel",
        "advance_kernel",
        "ema_kernel",
    ]
    assert {current for _, current in launched} == {1}


def test_autoencoders(launched: list[tuple[str, int]]) -> None:
    """Noise and feature maps."""
    a, b, _, _ = _tensors(torch.float32, 128)
    seed = torch.empty((), dtype=torch.int64, device=HERE)
    autoencoders.reparameterize(a, b, seed)
    autoencoders.reparameterize_backward(b, seed, a)
    out = features.features_forward([a], [b], False, 1.0)
    features.features_backward([a], [b], False, 1.0, out, [True])
    assert {current for _, current in launched} == {1} and len(launched) >= 4


@pytest.mark.parametrize(
    ("value", "driver", "expected"),
    [
        ("", 12030, True),
        ("1", 13000, True),
        ("0", 13000, False),
        ("", 12020, False),
        ("", 0, False),
    ],
)
def test_launches_overlap_unless_told_otherwise(
    value: str, driver: int, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the driver and the environment, which are asked once, and whatever they say by ``override``."""
    monkeypatch.setenv("SSLKERNELS_TRITON_OVERLAP", value)
    monkeypatch.setattr(devices, "driver", lambda: driver)
    configs._overlap_by_default.cache_clear()
    try:
        assert configs.overlaps() is expected
        with configs.override(overlap=not expected):
            assert configs.overlaps() is not expected
        assert configs.overlaps() is expected
        configs._overlap_by_default.cache_clear()
        monkeypatch.setenv("SSLKERNELS_TRITON_OVERLAP", "no")
        with pytest.raises(ValueError, match="SSLKERNELS_TRITON_OVERLAP must be 0 or 1, got 'no'"):
            configs.overlaps()
    finally:
        configs._overlap_by_default.cache_clear()


def test_a_launch_is_compiled_as_it_is_placed(launched, monkeypatch: pytest.MonkeyPatch) -> None:
    """The option that lets a kernel begin early is the one that makes it wait."""
    given = []

    class Kernel:
        __name__, arg_names = "kernel", ()

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return lambda **options: given.append(options.get("launch_pdl", False))

    for overlap in (True, False):
        with configs.override(overlap=overlap):
            runtime.launch(Kernel(), (1,), torch.device("cuda", 1))
    assert given == [True, False]
