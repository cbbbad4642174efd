# SPDX-License-Identifier: Apache-2.0
"""The host code of the GPU backend on tensors without data: no sync, sizes from shapes, valid grids.

FakeTensor refuses everything that would have to read a tensor (``item``, a branch on a value, a size
that depends on data), which is what breaks the capture of a CUDA graph.  It holds no memory either, so
operands of more than 2^31 elements cost nothing here.  Kernels are recorded and not run.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton", reason="the GPU backend needs triton (pip install triton)")

import triton  # noqa: E402
from triton.runtime.jit import create_function_from_signature  # noqa: E402

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
    aot,
    configs,
    contrastive,
    features,
    gradients,
    launch,
    plan,
    tuning,
    updates,
)

pytestmark = pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
MULTIPROCESSORS = 132
# gridDim.x may be 2^31 - 1, gridDim.y and z 65535 (CUDA C++ programming guide, compute capabilities).
GRID_LIMITS = (2**31 - 1, 65535, 65535)


@pytest.fixture(params=["sm_80", "sm_90", "sm_100", "gfx942"])
def launches(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[list[tuple[str, tuple[int, ...], dict[str, Any]]]]:
    """What would be launched on an architecture: name, grid, arguments by name."""
    seen: list[tuple[str, tuple[int, ...], dict[str, Any]]] = []

    def record(kernel: Any, grid: tuple[int, ...], device: torch.device, *args: Any, **flags: Any):
        names = [p for p in kernel.arg_names if p not in flags]
        assert len(names) == len(args), f"{kernel.__name__}: {len(args)} arguments for {names}"
        unknown = set(flags) - set(kernel.arg_names) - {"num_warps", "num_stages"}
        assert not unknown, f"{kernel.__name__} has no {unknown}"
        seen.append((kernel.__name__, grid, {**dict(zip(names, args, strict=True)), **flags}))

    for module in (contrastive, features, launch, gradients, plan, updates):
        monkeypatch.setattr(module, "launch", record)
    monkeypatch.setattr(configs, "arch_of", lambda device: request.param)
    monkeypatch.setattr(configs, "interpreting", lambda: True)
    monkeypatch.setattr(configs, "multiprocessors", lambda device: MULTIPROCESSORS)
    with FakeTensorMode(allow_non_fake_inputs=False):
        yield seen


# (N, M or None for self mode, D): ordinary, odd, one key, beyond 2^31 elements, beyond a grid of 65535.
SIZES = [
    (512, None, 128),
    (257, 65536, 100),
    (33, 31, 33),
    (1, 1, 1),
    (4096, None, 768),
    (1 << 14, 1 << 21, 1024),
    (1 << 24, 3, 512),
    (3, 1 << 24, 512),
    (1 << 22, None, 64),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_nothing_is_read_on_the_host(size, dtype: torch.dtype, launches) -> None:
    """Every primitive runs to its end without data, and asks for grids and memory that exist."""
    N, M, D = size
    cross = M is not None
    q, k = torch.empty(N, D, dtype=dtype), torch.empty(M, D, dtype=dtype) if cross else None
    columns = M if cross else N
    scale, bias = torch.empty(()), torch.empty(())
    ids_q = torch.empty(N, dtype=torch.int64)
    ids_k = torch.empty(M, dtype=torch.int64) if cross else None
    drow, dcol = torch.empty(()).expand(N), torch.empty(()).expand(columns) if cross else None
    above = Thresholds(torch.empty(N), torch.empty(columns) if cross else None)
    tiles = Tiles(q, k, scale, None, ids_q, ids_k)
    for kind, b in (("lse", None), ("softplus", bias)):
        got = launch.pairwise_forward(kind, tiles._replace(bias=b), cross, above)
        assert got.row.shape == got.rank_row.shape == (N,)
        assert got.col.shape == got.rank_col.shape == (columns if cross else 0,)
        grads = launch.pairwise_backward(
            kind,
            tiles._replace(bias=b),
            RowState(got.row, drow),
            RowState(got.col, dcol) if cross else None,
            Wanted(True, cross),
        )
        assert grads.dq.shape == (N, D) and grads.dk.shape == ((columns, D) if cross else (0,))
        assert grads.dq.is_contiguous() and grads.dk.is_contiguous()
        assert grads.dbias.shape == ()
    if cross:
        attended = launch.attend(tiles, above.row)
        assert attended.mean_key.shape == (N, D) and attended.mean_key.is_contiguous()
        assert attended.rank.shape == (N,)
    picked = launch.extremes(tiles._replace(bias=torch.empty(columns)))
    assert picked.max_same.shape == picked.min_other.shape == (N,)
    unit, norm = updates.normalize_rows(q)
    dx = updates.normalize_rows_backward(torch.empty(()).expand(N, D), q, norm)
    assert unit.shape == dx.shape == (N, D) and norm.shape == (N,)
    wanted = {"forward_kernel", "combine_kernel", "extremes_kernel", "normalize_kernel"}
    assert wanted | {"normalize_backward_kernel"} <= {name for name, *_ in launches}
    for name, grid, arguments in launches:
        assert all(1 <= n <= most for n, most in zip(grid, GRID_LIMITS, strict=False)), (name, grid)
        # Beyond the operands: O((N + M) D) words or 64 MiB a buffer (``plan.slot_words``), and the
        # outputs, which are partial results where nothing is split.
        bound = max((N + columns) * (D + 15), plan.SLOT_WORDS) + 3 * 128 * (N + columns)
        for key, value in arguments.items():
            if isinstance(value, Tensor):
                assert value.numel() <= bound, f"{name}: {key} has {value.numel()} elements"
        for key in (key for key in arguments if key.startswith("stride_")):
            assert arguments[key] >= 0, (name, key)


def test_no_address_of_a_feature_map_is_read_on_the_host(launches) -> None:
    """Tensors are arguments of the launch: a CUDA graph may capture it, and nothing is copied."""
    sizes = [5, 3 << 30, 0, 8192]
    maps = [torch.empty(4096, d, dtype=torch.bfloat16) for d in sizes]
    targets = [torch.empty(4096, d) for d in sizes]
    out = ours.features_forward(maps, targets, True, 0.5)
    dout = torch.empty(()).expand(4096, 4)
    found = ours.features_backward(maps, targets, True, 0.5, dout, [True, True, True, False])
    assert out.shape == (4096, 4) and found[3] is None
    assert [x.shape for x in found[:3]] == [x.shape for x in maps[:3]]
    units = (3 << 30) // 8192 + 3
    assert [(name, grid) for name, grid, _ in launches] == [
        ("features_forward_kernel", (4096 * units,)),
        ("features_combine_kernel", (4096 * 4,)),
        ("features_backward_kernel", (4096 * (units - 2),)),
    ]
    assert 4096 * units <= GRID_LIMITS[0]
    assert launches[2][2]["columns"] == (0, 1)


class _DeviceWork(TorchDispatchMode):
    """Collects operations of torch that would be launches: all but views and memory."""

    FREE = (
        "empty",
        "device",
        "slice",
        "select",
        "view",
        "as_strided",
        "detach",
        "unbind",
        "split",
        "alias",
        "expand",
    )

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__.partition(".")[0].removeprefix("new_")
        if not name.startswith(self.FREE):
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("launches", ["sm_90"], indirect=True)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(
    "wanted", [Wanted(True, True), Wanted(True, True, True), Wanted(True, False)]
)
@pytest.mark.parametrize("n", [128, 1937])
def test_few_launches(
    n: int, wanted: Wanted, dtype: torch.dtype, reduction: str, launches, monkeypatch
) -> None:
    """NT-Xent forward and backward: at most eight in all, nothing of torch's, nothing that nobody wants."""
    monkeypatch.setattr(contrastive, "exact_dtype", lambda a: a.dtype)
    a, b, scale = torch.empty(n, 64, dtype=dtype), torch.empty(n, 64, dtype=dtype), torch.empty(())
    problem = Problem("joint", a, b, None, scale, reduction=reduction)
    assert ours.serves_contrastive(problem)
    with _DeviceWork() as work:
        found, _ = ours.contrastive_forward(problem, False, False)
        forward = len(launches)
        dloss = torch.empty_like(found.loss)
        da, db, dscale, _ = ours.contrastive_backward(
            problem, Kept(found.state, None), dloss, wanted
        )
    assert not work.seen
    assert found.loss.shape == problem.loss_shape and found.state.shape == (5 * n,)
    for got, x, want in ((da, a, wanted.dq), (db, b, wanted.dk), (dscale, scale, wanted.dscale)):
        assert (got is not None) == want
        assert got is None or (got.shape, got.dtype) == (x.shape, x.dtype)
    names = [name for name, *_ in launches]
    expected = ["prepare_kernel", "forward_kernel", "combine_kernel", "sum_kernel"]
    assert names[:forward] == expected[:forward]
    assert forward <= (3 if reduction == "none" else 4)
    assert len(names) <= 7 + wanted.dscale + (dtype == torch.float16)
    *_, (_, grid, arguments) = [entry for entry in launches if entry[0] == "backward_kernel"]
    # One view alone: half of the rows, where its blocks are whole.
    one = wanted.dq != wanted.dk and not wanted.dscale and n % plan.WHOLE == 0
    assert arguments["N"] == (n if one else 2 * n) and arguments["M"] == 2 * n


def _binaries(monkeypatch: pytest.MonkeyPatch, n: int, D: int) -> set[tuple[Any, ...]]:
    """What Triton would compile for sm_90 for every primitive on a batch of n."""
    backend = triton.compiler.make_backend(aot.target_of("sm_90"))
    found: set[tuple[Any, ...]] = set()

    def record(kernel: Any, grid: tuple[int, ...], device: torch.device, *args: Any, **flags: Any):
        bind = create_function_from_signature(kernel.signature, kernel.params, backend)
        _, specialization, options = bind(*args, **flags)
        found.add((kernel.__name__, repr(specialization), repr(sorted(options.items()))))

    with monkeypatch.context() as patch:
        for module in (contrastive, features, launch, gradients, plan, updates):
            patch.setattr(module, "launch", record)
        patch.setattr(configs, "arch_of", lambda device: "sm_90")
        patch.setattr(configs, "interpreting", lambda: True)
        patch.setattr(configs, "multiprocessors", lambda device: MULTIPROCESSORS)
        q, k = (torch.zeros(n, D, dtype=torch.bfloat16) for _ in range(2))
        scale, ids, row = torch.ones(()), torch.arange(n), torch.zeros(n)
        state = RowState(row, row)
        own, cross = Tiles(q, None, scale, None, ids), Tiles(q, k, scale)
        for tiles, col in ((own, None), (cross, state)):
            thresholds = Thresholds(row, None if col is None else row)
            launch.pairwise_forward("lse", tiles, col is not None, Thresholds())
            launch.pairwise_forward("lse", tiles, col is not None, thresholds)
            launch.pairwise_backward("lse", tiles, state, col, Wanted(True, col is not None))
        launch.attend(cross._replace(ids_q=ids, ids_k=ids), row)
        launch.extremes(own)
        loss = Problem("joint", q, k, None, scale)
        whole, _ = ours.contrastive_forward(loss, True, False)
        ours.contrastive_backward(loss, Kept(whole.state, None), scale, Wanted(True, True, True))
        unit, norm = updates.normalize_rows(q)
        updates.normalize_rows_backward(torch.zeros_like(unit), q, norm)
        maps = [q.float(), q, k]
        ours.features_forward(maps, [k] * 3, True, 0.5)
        ours.features_backward(maps, [k] * 3, True, 0.5, torch.zeros(n, 3), [True] * 3)
    return found


@pytest.mark.parametrize("D", [128, 256, 320, 768])
def test_a_last_batch_compiles_nothing(D: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """No binary is specialised on a number of rows: not on 1, not on multiples of 16, not on alignment."""
    whole = _binaries(monkeypatch, 2048, D)
    assert len(whole) > 10
    for n in (2047, 2041, 1937):
        assert _binaries(monkeypatch, n, D) == whole
    assert _binaries(monkeypatch, 2048, 64) != whole


def _count_calls(run: Callable[[], object]) -> int:
    """Calls of functions of the library."""
    count = 0

    def seen(frame: FrameType, event: str, arg: object) -> None:
        nonlocal count
        count += event == "call" and "sslkernels" in frame.f_code.co_filename

    sys.setprofile(seen)
    try:
        run()
    finally:
        sys.setprofile(None)
    return count


def test_a_step_takes_few_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """How a loss is launched is found once (56 calls; 113 when every step looked)."""
    for module in (contrastive, launch, gradients, plan):
        monkeypatch.setattr(module, "launch", lambda *args, **flags: None)
    monkeypatch.setattr(configs, "arch_of", lambda device: "sm_90")
    monkeypatch.setattr(configs, "interpreting", lambda: True)
    monkeypatch.setattr(contrastive, "exact_dtype", lambda a: a.dtype)
    a, b = (torch.zeros(512, 128, dtype=torch.bfloat16) for _ in range(2))
    problem, one = Problem("joint", a, b, None, torch.ones(())), torch.ones(())

    def step() -> None:
        found, _ = ours.contrastive_forward(problem, False, False)
        kept = Kept(found.state, None)
        ours.contrastive_backward(problem, kept, one, Wanted(True, True, True))

    first = _count_calls(step)
    assert _count_calls(step) <= 60 < first


def test_plans_follow_the_tables() -> None:
    """A plan is kept for its shapes, and for nothing that has changed since."""
    made: list[str] = []

    @configs.planned
    def named(device: torch.device, dtype: torch.dtype, D: int) -> str:
        config = configs.require("forward", device, D, dtype)
        made.append(f"{configs.precision()}, {config.block_n} rows")
        return made[-1]

    device, mine = torch.device("cpu"), configs.Config(16, 16, 16, 1, 1)
    plain = named(device, torch.float32, 64)
    assert named(device, torch.float32, 64) is plain
    assert (named(device, torch.float32, 128), named(device, torch.float16, 64)) == (plain,) * 2
    assert len(made) == 3
    with configs.override(forward=mine):
        assert named(device, torch.float32, 64) == "ieee, 16 rows"
    with configs.override(fp32_precision="tf32x3"):
        assert named(device, torch.float32, 64) == plain.replace("ieee", "tf32x3")
    assert named(device, torch.float32, 64) == plain
    try:
        configs.remember("forward", "interpreter", 64, torch.float32, mine)
        assert named(device, torch.float32, 64) == "ieee, 16 rows"
    finally:
        configs.forget_tuned()
    assert named(device, torch.float32, 64) == plain
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SSLKERNELS_TRITON_FP32", "bf16x3")
        assert named(device, torch.float32, 64) == plain.replace("ieee", "bf16x3")
        patch.setattr(configs, "arch_of", lambda device: "sm_90")
        assert named(device, torch.float16, 64) == "bf16x3, 128 rows"


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("D", [7, 100, 300])
def test_tuned_configurations_are_found(D: int, dtype: torch.dtype) -> None:
    """They are kept for D as it is, and looked up for D as operands are packed."""
    device, mine = torch.device("cpu"), configs.Config(16, 16, 16, 1, 1)
    width = configs.packed_width(D, dtype)
    assert configs.packed_width(width, dtype) == width
    try:
        configs.remember("forward", "interpreter", D, dtype, mine)
        assert configs.choose("forward", device, width, dtype) is mine
        assert configs.choose("forward", device, 2 * width, dtype) is not mine
    finally:
        configs.forget_tuned()


@pytest.mark.parametrize("table", configs.TABLES)
def test_tuning_tries_what_launches_accept(table: str) -> None:
    """No candidate is refused by a launch: whole blocks, and whole tiles of a triangle."""
    for D in (64, 128, 512):
        found = tuning.candidates(table, D, torch.bfloat16)
        assert found
        for config in found:
            assert plan.WHOLE % config.block_n == 0
            if table in ("forward", "narrow", "panel"):
                assert plan.ratio_of(config) >= 1
    with pytest.raises(ValueError, match="block_n must be a multiple of block_m"):
        plan.ratio_of(configs.Config(32, 64, 64, 4, 1))
    with pytest.raises(ValueError, match="must divide 128, got 256 and 64"):
        plan.tile_flags(configs.Config(256, 64, 64, 8, 1), torch.float32, 64, 64, 64)


def test_a_host_read_is_noticed(launches) -> None:
    """The detector detects: FakeTensor has no values to give."""
    with pytest.raises(Exception, match="_local_scalar_dense"):
        float(torch.empty(()))


def test_no_source_line_reads_a_tensor() -> None:
    """Nor is there a call that waits for the device in the host code's source."""
    rows = (updates.normalize_rows, updates.normalize_rows_backward)
    for module in (contrastive, launch, gradients, plan, *rows):
        source = inspect.getsource(module)
        for call in (".item(", ".tolist(", ".cpu(", "synchronize", ".numpy("):
            assert call not in source, f"{module.__name__}: {call}"
