# SPDX-License-Identifier: Apache-2.0
"""The host code of the GPU backend on tensors without data: no sync, sizes from shapes, valid grids.

FakeTensor refuses everything that would have to read a tensor (``item``, a branch on a value, a size
that depends on data), which is what breaks the capture of a CUDA graph.  It holds no memory either, so
operands of more than 2^31 elements cost nothing here.  Kernels are recorded and not run.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("triton", reason="the GPU backend needs triton (pip install triton)")

from sslkernels.backends.interface import RowState, Thresholds, Tiles, Wanted
from sslkernels.backends.triton import configs, gradients, launch, plan, updates  # noqa: E402

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

    for module in (launch, gradients, plan, updates):
        monkeypatch.setattr(module, "launch", record)
    monkeypatch.setattr(configs, "arch_of", lambda device: request.param)
    monkeypatch.setattr(configs, "interpreting", lambda: True)
    monkeypatch.setattr(configs, "target_programs", lambda device: 4 * MULTIPROCESSORS)
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


def test_a_host_read_is_noticed(launches) -> None:
    """The detector detects: FakeTensor has no values to give."""
    with pytest.raises(Exception, match="_local_scalar_dense"):
        float(torch.empty(()))


def test_no_source_line_reads_a_tensor() -> None:
    """Nor is there a call that waits for the device in the host code's source."""
    rows = (updates.normalize_rows, updates.normalize_rows_backward)
    for module in (launch, gradients, plan, *rows):
        source = inspect.getsource(module)
        for call in (".item(", ".tolist(", ".cpu(", "synchronize", ".numpy("):
            assert call not in source, f"{module.__name__}: {call}"
