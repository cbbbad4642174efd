# SPDX-License-Identifier: Apache-2.0
"""Measure tile configurations on the GPU at hand, when asked.

The library never tunes at a first call: that would make a training step wait for dozens of compilations
and make results depend on timing noise (another tile adds up in another order).  ``autotune`` is
called by the user, once a process, before training.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from ..interface import RowState, Thresholds, Tiles, Wanted
from . import configs, launch
from .configs import Config
from .sizes import next_power_of_2

_BLOCK_N = {"forward": (64, 128), "narrow": (32, 64), "extremes": (64, 128), "fused": (32, 64, 128),
            "panel": (64, 128), "product": (64, 128)}  # fmt: skip
_BLOCK_M = {"forward": (32, 64, 128), "narrow": (32, 64), "extremes": (32, 64, 128),
            "fused": (32, 64, 128), "panel": (64, 128), "product": (16, 32, 64)}  # fmt: skip
# One triangle is visited by whole tiles: no more swept rows than held ones.
_TRIANGLES = ("forward", "narrow", "panel")


@dataclass(frozen=True)
class Measured:
    """The outcome for one table; ``config`` None means that panels beat the fused kernels."""

    table: str
    config: Config | None
    ms: float
    default_ms: float
    tried: int


def candidates(table: str, D: int, dtype: torch.dtype) -> list[Config]:
    """Configurations worth compiling; those that do not fit the device are dropped when tried."""
    half = dtype != torch.float32
    widths = (64, 128) if half else (16, 32)
    if table == "product" and half:
        widths = (128, 256)
    wide = table == "fused" and half and D > 256
    if table == "fused" and half and D > 128:
        widths = (*widths, next_power_of_2(D))
    holds: tuple[bool, ...] = (True,)
    if table in ("forward", "narrow", "extremes", "panel"):
        holds = (True, False) if D <= 768 else (False,)
    found = []
    for n, m, width, stages, hold in itertools.product(
        _BLOCK_N[table], _BLOCK_M[table], widths, (1, 2, 3, 4) if half else (1, 2), holds
    ):
        warps = 8 if n >= 128 or (wide and n == 64) else 4
        # In one stage the next chunk waits in registers.
        prefetch = int(half and hold and stages == 1 and table in _TRIANGLES)
        if half and stages == 1 and not prefetch:
            continue
        sums = n * (width if table == "product" else max(m, D if table == "fused" else 0))
        if table in _TRIANGLES and m > n:
            continue
        if 16 * 32 * warps <= sums <= 160 * 32 * warps:  # 16 to 160 sums a thread
            programs = 2 if warps == 4 else 1
            found.append(Config(n, m, width, warps, stages, hold, prefetch, programs))
    return found


@contextlib.contextmanager
def _dropping_what_does_not_compile() -> Iterator[None]:
    """A candidate may need too much memory, or a pass of the compiler may give up on it."""
    try:
        yield
    except triton.TritonError:
        pass
    except RuntimeError as error:
        if "PassManager" not in str(error):  # such as an illegal access on the device
            raise


def _milliseconds(function: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        return float(triton.testing.do_bench(function, return_mode="median"))
    begin = time.perf_counter()  # the interpreter: says nothing about a GPU
    function()
    return 1e3 * (time.perf_counter() - begin)


def _workload(table: str, q: Tensor) -> Callable[[], object]:
    """A call that spends its time in kernels of the table, on NT-Xent's shape."""
    ids = torch.arange(len(q), device=q.device) // 2
    tiles = Tiles(q, None, torch.tensor(10.0, device=q.device), ids_q=ids)
    if table == "extremes":
        return lambda: launch.extremes(tiles)
    if table == "forward":
        return lambda: launch.pairwise_forward("lse", tiles, False, Thresholds())
    if table == "narrow":  # ranks take it at every size
        thresholds = Thresholds(torch.ones(len(q), device=q.device))
        return lambda: launch.pairwise_forward("lse", tiles, False, thresholds)
    lse = launch.pairwise_forward("lse", tiles, False, Thresholds()).row
    row = RowState(lse, torch.full_like(lse, 1.0 / len(q)))
    return lambda: launch.pairwise_backward("lse", tiles, row, None, Wanted(True, False))


def autotune(
    N: int,
    D: int,
    dtype: torch.dtype,
    device: torch.device | str = "cuda",
    *,
    tables: tuple[str, ...] = configs.TABLES,
    limit: int | None = None,
) -> list[Measured]:
    """Time candidates for N rows of D features and use the best from now on in this process.

    Args:
        N: Rows, both views together.
        D: Features.
        dtype: float32, bfloat16 or float16.
        device: Where to measure.
        tables: Which kernel tables to tune.
        limit: Try at most this many candidates a table.

    Returns:
        One entry a table that was tuned.

    Raises:
        ValueError: If a table is unknown.
    """
    unknown = set(tables) - set(configs.TABLES)
    if unknown:
        raise ValueError(
            f"autotune: tables must be some of {configs.TABLES}, got {sorted(unknown)}"
        )
    device = torch.device(device)
    arch = configs.arch_of(device)
    generator = torch.Generator().manual_seed(0)
    q = torch.nn.functional.normalize(torch.randn(N, D, generator=generator), dim=1).to(
        device, dtype
    )
    best: dict[str, Measured] = {}
    for table in tables:
        panels = table in ("panel", "product")
        force = {"fused": None} if panels else {}
        default = configs.choose(table, device, D, dtype)
        run = _workload(table, q)
        with configs.override(**force):
            base = _milliseconds(run, device) if default is not None or panels else float("inf")
        winner, fastest, tried = default, base, 0
        for config in candidates(table, D, dtype)[:limit]:
            with (
                _dropping_what_does_not_compile(),
                configs.override(**{**force, table: config}),  # type: ignore[arg-type]
            ):
                fastest_now = _milliseconds(run, device)
                tried += 1
                if fastest_now < fastest:
                    winner, fastest = config, fastest_now
        best[table] = Measured(table, winner, fastest, base, tried)
        configs.remember(table, arch, D, dtype, winner)
    panel_times = [best[t].ms for t in ("panel", "product") if t in best]
    if "fused" in best and panel_times and min(panel_times) < best["fused"].ms:
        entry = best["fused"]
        best["fused"] = Measured("fused", None, min(panel_times), entry.default_ms, entry.tried)
        configs.remember("fused", arch, D, dtype, None)
    return list(best.values())


def forget() -> None:
    """Go back to the table."""
    configs.forget_tuned()
