# SPDX-License-Identifier: Apache-2.0
"""What the GPU kernels would take on an H100, from their machine code.

**A model, never a measurement.**  For each kernel that a loss launches, compiled for sm_90 with exactly the
flags of the launch, the loop over tiles is read from SASS (``gpu_sass``), its programs are run on a
multiprocessor on paper (``gpu_sim``), and the grid is dealt to 132 of them.  Further assumptions:

* 1.83 GHz, at which 4096 16-bit FLOPs a clock and multiprocessor are the 989 TFLOP/s of the data sheet;
* tiles take the short path through the loop; those at an edge, where some pairs are left out, the long one;
* a program costs START clocks more than its tiles: first loads, the last sums;
* a kernel that is no sweep over tiles takes its bytes at the rate of the L2 cache, or at that of device
  memory if they are more than the cache holds, and a latency for each batch of partial results it adds up;
  at most ``SM_BYTES`` a clock for each multiprocessor that has a program;
* a launch inside a CUDA graph costs LAUNCH seconds during which the device does nothing, OVERLAP less where
  the one before it was ours and lets it be placed (others measured 0.96 µs less between empty kernels).

    python -m benchmarks.gpu_model            # prints the tables of docs/gpu.md
    python -m benchmarks.gpu_model --budgets  # the budgets alone
"""

from __future__ import annotations

import argparse
import functools
import heapq
import subprocess
import sys
import tempfile
import unittest.mock
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks import gpu_sass, gpu_sim
from sslkernels.backends import triton as backend
from sslkernels.backends.interface import Kept, RowState, Thresholds, Tiles, Wanted
from sslkernels.backends.interface import (
    Problem as LossProblem,
)
from sslkernels.backends.triton import (
    aot,
    configs,
    contrastive,
    gradients,
    launch,
    plan,
    updates,
)

ARCH = "sm_90"
MULTIPROCESSORS = 132
CLOCK = 1.83e9
PEAK_FLOPS = 2 * gpu_sim.TENSOR_MACS * MULTIPROCESSORS * CLOCK
MEMORY_BYTES_PER_S = 3.35e12
L2_BYTES_PER_S = 5.5e12
L2_SIZE = 50e6
SM_BYTES = 64.0  # a clock that one multiprocessor takes from the L2 cache at most
START = 2500.0  # clocks
LAUNCH, OVERLAP = 1.2e-6, 0.8e-6  # seconds
BATCH_LATENCY = 0.4e-6  # seconds from L2 to the sum of one batch of partial results
REGISTERS = 65536  # of a multiprocessor
SHARED = 233_472  # bytes
# Elements of S a warp computes in a tile of the unit in which instructions are compared: 128 x 128 by eight.
UNIT = 128 * 128 // 8


# ---- one kernel ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Loop:
    """The loop over tiles of one compiled kernel."""

    rows: int
    cols: int
    warps: int
    programs: int  # that share a multiprocessor
    registers: int
    shared_bytes: int
    spill_bytes: int
    short: Counter[str]  # instructions of a warp for a tile, by category
    long: Counter[str]
    clocks: float  # of a multiprocessor for a tile, by the short path
    long_clocks: float
    tensor: float  # share of that time in which tensor units work
    reason: str  # the resource with the largest lower bound

    @property
    def instructions(self) -> float:
        """Of a warp for ``UNIT`` elements of S: comparable between tiles of any size."""
        return self.short["all"] * UNIT / (self.rows * self.cols / self.warps)


def programs_that_fit(registers: int, shared_bytes: int, warps: int) -> int:
    """How many programs share a multiprocessor of compute capability 9.0."""
    by_registers = REGISTERS // (-(-registers // 8) * 8 * 32 * warps)
    # A program's shared memory comes in KiB, and the system takes one for itself.
    by_shared = SHARED // (-(-shared_bytes // 1024) * 1024 + 1024)
    return min(by_registers, by_shared, 64 // warps, 32)


def disassembled(compiled: Any) -> gpu_sass.Code:
    """The machine code of a compiled kernel."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        tool = triton.knobs.nvidia.nvdisasm.path
        done = subprocess.run([tool, "-c", str(cubin)], check=True, capture_output=True, text=True)
    return gpu_sass.Code(done.stdout)


def loop_of(
    usage: aot.Usage,
    compiled: Any,
    config: configs.Config,
    chunks: int,
    simulated: bool = True,
    most: int = 32,
) -> Loop:
    """Read the loop over tiles.

    Args:
        usage: Of the compiled kernel.
        compiled: Triton's kernel.
        config: What it was compiled with.
        chunks: How often a loop over D inside of the loop over tiles runs; 0 where there is none.
        simulated: Whether to run it on paper; else ``clocks`` is the largest lower bound.
        most: Programs of the grid for each multiprocessor, where that is fewer than fit.
    """
    code = disassembled(compiled)
    paths = code.tile_loop(chunks)
    short, long = paths[0], paths[-1]
    fit = min(most, programs_that_fit(usage.registers, usage.shared_bytes, config.num_warps))
    limits = gpu_sim.bounds(short, config.num_warps)
    clocks = max(limits.values())
    long_clocks = max(gpu_sim.bounds(long, config.num_warps).values())
    tensor = limits.get("tensor", 0.0) / clocks
    if simulated:
        rounds = 10 if len(short) < 1000 else 4
        steady = gpu_sim.simulate(short, config.num_warps, fit, rounds)
        clocks, tensor, limits = steady.clocks, steady.tensor, steady.bounds
        long_clocks = max(long_clocks, clocks)
    return Loop(
        config.block_n,
        config.block_m,
        config.num_warps,
        fit,
        usage.registers,
        usage.shared_bytes,
        usage.spill_bytes,
        gpu_sass.counts(short),
        gpu_sass.counts(long),
        clocks,
        long_clocks,
        tensor,
        max(limits, key=lambda name: limits[name]),
    )


@functools.cache
def variant_loop(variant: str, D: int, dtype: str = "bfloat16", simulated: bool = True) -> Loop:
    """The loop of one of ``aot.VARIANTS`` with the configuration that the table has for it."""
    config = configs.lookup(aot.VARIANTS[variant][1], ARCH, D, getattr(torch, dtype))
    if config is None:
        raise ValueError(f"gpu_model: {variant} has no configuration for D = {D}, {dtype}")
    usage, compiled = aot.compile_kernel(variant, ARCH, dtype, D, config)
    chunks = 0 if config.hold_x else configs.chunks(config, D)[1]
    return loop_of(usage, compiled, config, chunks, simulated)


@dataclass(frozen=True)
class Budget:
    """What a regression would break; ``instructions`` are those of ``Loop.instructions``."""

    instructions: int
    shuffles: int
    barriers: int
    programs: int

    def broken(self, loop: Loop) -> list[str]:
        """Reasons, empty if the loop keeps to the budget."""
        found = []
        for name, value, most in (
            ("instructions for 2048 elements", loop.instructions, self.instructions),
            ("SHFL", loop.short["SHFL"], self.shuffles),
            ("BAR", loop.short["BAR"], self.barriers),
            ("bytes spilled", loop.spill_bytes, 0),
        ):
            if value > most:
                found.append(f"{value:.0f} {name}, budget {most}")
        if loop.programs < self.programs:
            found.append(f"{loop.programs} programs a multiprocessor, budget {self.programs}")
        return found


# (variant, D): bfloat16 on sm_90.
BUDGETS = {
    ("forward self", 64): Budget(400, 8, 4, 2),
    ("forward self", 128): Budget(420, 8, 4, 2),
    ("forward self", 256): Budget(560, 8, 6, 2),
    ("forward self ids", 128): Budget(420, 8, 4, 2),
    ("forward rows+cols", 128): Budget(440, 8, 4, 2),
    ("forward rows", 128): Budget(420, 4, 4, 2),
    ("forward rows+cols", 512): Budget(620, 8, 12, 1),
    ("forward self", 768): Budget(750, 8, 16, 1),
    ("backward", 128): Budget(600, 0, 4, 2),
    ("backward", 256): Budget(1000, 0, 4, 1),
    ("backward", 512): Budget(2400, 0, 4, 1),
    ("backward ids", 128): Budget(600, 0, 4, 2),
    ("attend", 128): Budget(480, 8, 4, 2),
    ("attend", 512): Budget(2400, 8, 8, 1),
    ("extremes", 128): Budget(1600, 0, 4, 2),
}


# ---- what a loss launches ------------------------------------------------------------------------


@dataclass(frozen=True)
class Launched:
    """One launch, recorded with tensors that hold no memory."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]

    @property
    def name(self) -> str:
        """Of the kernel."""
        return str(self.kernel.__name__)


@contextmanager
def recorded() -> Iterator[list[Launched]]:
    """Collect what would be launched on an H100; tensors made inside the block hold no memory."""
    seen: list[Launched] = []

    def record(
        kernel: Any, grid: tuple[int, ...], _: torch.device, *args: Any, **flags: Any
    ) -> None:
        names = [name for name in kernel.arg_names if name not in flags]
        seen.append(Launched(kernel, grid, {**dict(zip(names, args, strict=True)), **flags}))

    with ExitStack() as stack:
        patch = unittest.mock.patch.object
        for module in (contrastive, launch, gradients, plan, updates):
            stack.enter_context(patch(module, "launch", record))
        stack.enter_context(patch(configs, "arch_of", lambda device: ARCH))
        stack.enter_context(patch(configs, "interpreting", lambda: True))
        stack.enter_context(patch(contrastive, "exact_dtype", lambda a: a.dtype))
        stack.enter_context(patch(configs, "multiprocessors", lambda device: MULTIPROCESSORS))
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=False))
        yield seen


def _operand(N: int, D: int) -> Tensor:
    return torch.empty(N, D, dtype=torch.bfloat16)


def _self_mode(N: int, D: int) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """NT-Xent of N rows, two views of N / 2 samples: the mean loss, and the gradients of both views."""
    loss = LossProblem("joint", _operand(N // 2, D), _operand(N // 2, D), None, torch.empty(()))
    kept = Kept(torch.empty(5 * (N // 2)), None)
    return (
        lambda: backend.contrastive_forward(loss, False, False),
        lambda: backend.contrastive_backward(loss, kept, torch.empty(()), Wanted(True, True)),
    )


def _clip(N: int, D: int) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """CLIP: rows and columns, both gradients; features come normalised."""
    tiles = Tiles(_operand(N, D), _operand(N, D), torch.empty(()))
    state = RowState(torch.empty(N), torch.empty(N))
    return (
        lambda: launch.pairwise_forward("lse", tiles, True, Thresholds()),
        lambda: launch.pairwise_backward("lse", tiles, state, state, Wanted(True, True)),
    )


def _queue(N: int, M: int, D: int) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """MoCo: everything in the forward pass."""
    tiles = Tiles(_operand(N, D), _operand(M, D), torch.empty(()))
    return lambda: launch.attend(tiles, None), lambda: None


@dataclass(frozen=True)
class Problem:
    """A loss, its passes, and the FLOPs of each that count."""

    name: str
    make: Callable[[], tuple[Callable[[], Any], Callable[[], Any]]]
    flops: tuple[float, float]


def _self_problem(N: int, D: int) -> Problem:
    return Problem(
        f"NT-Xent, {N} rows, D = {D}", lambda: _self_mode(N, D), (N * N * D, 4.0 * N * N * D)
    )


PROBLEMS = (
    *(_self_problem(N, 128) for N in (1024, 4096, 8192, 65536)),
    _self_problem(65536, 256),
    _self_problem(8192, 512),
    Problem(
        "CLIP, 32768 pairs, D = 512",
        lambda: _clip(32768, 512),
        (2.0 * 32768**2 * 512, 8.0 * 32768**2 * 512),
    ),
    Problem(
        "CLIP, 32768 pairs, D = 768",
        lambda: _clip(32768, 768),
        (2.0 * 32768**2 * 768, 8.0 * 32768**2 * 768),
    ),
    *(
        Problem(
            f"MoCo, 256 queries, queue of 65536, D = {D}",
            functools.partial(_queue, 256, 65536, D),
            (4.0 * 256 * 65536 * D, 0.0),
        )
        for D in (128, 512)
    ),
)


# ---- one launch ----------------------------------------------------------------------------------

_TILE_KERNELS = (
    "forward_kernel",
    "backward_kernel",
    "attend_kernel",
    "panel_kernel",
    "product_kernel",
)


# What a kernel that combines partial results reads only where it has to compute rows again.
_COMBINED = ("combine_kernel", "attend_combine_kernel")
_AGAIN = ("x_ptr", "y_ptr", "ids_x_ptr", "ids_y_ptr")


@dataclass(frozen=True)
class Estimate:
    """What one launch takes, in seconds, without the launch itself."""

    name: str
    seconds: float
    programs: int
    efficiency: (
        float  # work of the grid over what multiprocessors could have done; 1 for small kernels
    )
    memory_bytes: float
    loop: Loop | None = None


def _size(value: Any) -> float:
    return float(value.numel() * value.element_size()) if isinstance(value, Tensor) else 0.0


def deal(lengths: list[int], slots: int) -> tuple[int, float]:
    """(Makespan, efficiency) of programs in order, each to the slot that is free first."""
    ends = [0] * min(slots, len(lengths))
    for length in lengths:
        heapq.heapreplace(ends, ends[0] + length)
    makespan = max(ends)
    return makespan, sum(lengths) / (makespan * slots)


@functools.cache
def _compiled_loop(kernel: Any, flags: tuple[tuple[str, Any], ...], chunks: int, most: int) -> Loop:
    """Of a kernel with exactly the flags of a launch."""
    given = dict(flags)
    options = {key: given.pop(key) for key in ("num_warps", "num_stages")}
    source = aot.source(kernel, "bfloat16", given["D"], given)
    compiled = triton.compile(
        source, target=aot.target_of(ARCH), options={**options, **configs.compiler_options(ARCH)}
    )
    config = configs.Config(
        given["BLOCK_N"],
        given["BLOCK_M"],
        given["BLOCK_D"],
        options["num_warps"],
        options["num_stages"],
    )
    return loop_of(aot.usage_of(compiled, ARCH), compiled, config, chunks, most=most)


def _tile_loop(launched: Launched) -> Loop:
    constants = {
        key: value
        for key, value in launched.arguments.items()
        if key.isupper() or key in ("num_warps", "num_stages")
    }
    chunks = launched.arguments["chunks"] if constants.get("HOLD_X") is False else 0
    most = max(1, -(-launched.grid[0] // MULTIPROCESSORS))
    return _compiled_loop(launched.kernel, tuple(sorted(constants.items())), chunks, min(most, 32))


def tiles_of(launched: Launched) -> list[int]:
    """Tiles of each program."""
    arguments = launched.arguments
    share = arguments["share"]
    if launched.name == "panel_kernel":
        rows, ratio = arguments["row_blocks"], arguments["BLOCK_N"] // arguments["BLOCK_M"]
        tiles = -(-arguments["M"] // arguments["BLOCK_M"])
        begins = (
            p // rows * share + p % rows * ratio * arguments["SYMMETRIC"]
            for p in range(launched.grid[0])
        )
        return [max(0, min(share, tiles - begin)) for begin in begins]
    total = arguments["total"]
    lengths = [share] * launched.grid[0]
    lengths[-1] = total - share * (launched.grid[0] - 1)
    return lengths


def _edges(launched: Launched, loop: Loop) -> int:
    """Tiles that take the long path: in self mode those at the diagonal, and as many at the positives."""
    if launched.arguments.get("EXCLUDE", 0) == 0:
        return 0
    blocks = -(-launched.arguments["N"] // loop.rows)
    return 2 * blocks * max(1, loop.rows // loop.cols)


def estimate(launched: Launched) -> Estimate:
    """Seconds of one launch."""
    arguments = launched.arguments
    unread = _AGAIN if launched.name in _COMBINED else ()
    memory = sum(_size(value) for name, value in arguments.items() if name not in unread)
    programs = 1
    for n in launched.grid:
        programs *= n
    if launched.name in _TILE_KERNELS:
        loop = _tile_loop(launched)
        lengths = tiles_of(launched)
        makespan, efficiency = deal(lengths, MULTIPROCESSORS * loop.programs)
        waves = -(-len(lengths) // (MULTIPROCESSORS * loop.programs))
        edge = _edges(launched, loop) / sum(lengths)
        clocks = loop.clocks + edge * (loop.long_clocks - loop.clocks)
        busy = makespan * clocks * loop.programs + waves * START
        seconds = max(busy / CLOCK, memory / MEMORY_BYTES_PER_S)
        return Estimate(launched.name, seconds, programs, efficiency, memory, loop)
    rate = L2_BYTES_PER_S if memory < L2_SIZE else MEMORY_BYTES_PER_S
    rate = min(rate, min(programs, MULTIPROCESSORS) * SM_BYTES * CLOCK)
    batches = 1
    if "SLOTS" in arguments:
        slots = arguments.get("last")
        if slots is None:
            parts = next(arguments[key] for key in ("parts_ptr", "acc_ptr") if key in arguments)
            slots = parts.shape[0]
        batches = -(-slots // arguments["SLOTS"])
    seconds = memory / rate + batches * BATCH_LATENCY + START / CLOCK
    return Estimate(launched.name, seconds, programs, 1.0, memory)


def estimates(problem: Problem) -> tuple[list[Estimate], list[Estimate]]:
    """Of the launches of the forward and of the backward pass."""
    passes = []
    with recorded() as seen:
        for run in problem.make():
            seen.clear()
            run()
            passes.append(list(seen))
    forward, backward = ([estimate(x) for x in launches] for launches in passes)
    return forward, backward


def expected(
    op: str, size: int, D: int, batch: int = 256
) -> tuple[list[Estimate], list[Estimate]] | None:
    """Launches of forward and backward pass of a benchmark case in bfloat16; None: no model.

    Compiles what is launched.  Shown beside what was measured, so that the first run corrects the model.
    """
    make: dict[str, Callable[[], tuple[Callable[[], Any], Callable[[], Any]]]] = {
        "nt_xent": lambda: _self_mode(size, D),
        "clip": lambda: _clip(size, D),
        "moco": lambda: _queue(batch, size, D),
    }
    return estimates(Problem(op, make[op], (1.0, 1.0))) if op in make else None


def seconds(launches: list[Estimate]) -> float:
    """What a pass takes inside a CUDA graph."""
    return sum(x.seconds + LAUNCH for x in launches) - OVERLAP * (len(launches) - 1)


# ---- tables --------------------------------------------------------------------------------------

_SHOWN = (
    ("forward self", 64), ("forward self", 128), ("forward self", 256), ("forward self", 768),
    ("forward self ids", 128), ("forward rows+cols", 128), ("forward rows+cols", 512), ("forward rows", 128),
    ("forward softplus", 128), ("ranks self", 128), ("backward", 64), ("backward", 128), ("backward", 256),
    ("backward", 512), ("backward ids", 128), ("backward rows", 128), ("backward softplus", 128),
    ("attend", 128), ("attend", 256), ("attend", 512), ("extremes", 128), ("extremes", 512),
    ("product", 1024),
)  # fmt: skip


def loop_table() -> list[str]:
    """Markdown: the loops over tiles, bfloat16."""
    lines = [
        "| kernel | D | tile, warps | programs an SM | instructions, short path (long) | of 2048 elements | "
        "FMA | ALU | MUFU | SHARED | SHFL | BAR | clocks a tile | tensor clocks | busiest |",
        "|---|---:|---|---:|---:|---:|" + "---:|" * 8 + "---|",
    ]
    for variant, D in _SHOWN:
        loop = variant_loop(variant, D)
        short = loop.short
        lines.append(
            f"| {variant} | {D} | {loop.rows} × {loop.cols}, {loop.warps} | {loop.programs} | "
            f"{short['all']} ({loop.long['all']}) | {loop.instructions:.0f} | {short['FMA']} | "
            f"{short['ALU']} | {short['MUFU']} | {short['SHARED']} | {short['SHFL']} | {short['BAR']} | "
            f"{loop.clocks:.0f} | {loop.clocks * loop.tensor:.0f} | {loop.reason} |"
        )
    return lines


def _cells(passes: list[Estimate], flops: float) -> str:
    whole = seconds(passes)
    main = max(passes, key=lambda x: x.seconds)
    tiles = sum(x.seconds for x in passes if x.loop is not None)
    rest = sum(x.seconds for x in passes) - tiles
    return (
        f"{len(passes)} | {1e6 * whole:.4g} | {1e6 * tiles:.4g} | {1e6 * rest:.3g} | "
        f"{main.programs} | {main.efficiency:.2f} | {flops / tiles / PEAK_FLOPS:.0%} | "
        f"{flops / whole / PEAK_FLOPS:.0%}"
    )


def problem_table() -> list[str]:
    """Markdown: passes of the losses."""
    lines = [
        "| loss | pass | launches | µs | kernels over tiles | others | programs | schedule | tiles, of the "
        "tensor peak | the pass |",
        "|---|---|" + "---:|" * 8,
    ]
    for problem in PROBLEMS:
        for name, found, flops in zip(
            ("forward", "backward"), estimates(problem), problem.flops, strict=True
        ):
            if found:
                lines.append(f"| {problem.name} | {name} | {_cells(found, flops)} |")
    return lines


def table() -> list[str]:
    """The generated part of docs/gpu.md."""
    return [
        "Loops over tiles, bfloat16, sm_90: instructions of one warp for one tile. The long path is that of "
        "a tile at an edge, where pairs are left out.",
        "",
        *loop_table(),
        "",
        "Passes, bfloat16, one H100 at 1.83 GHz, launches inside a CUDA graph:",
        "",
        *problem_table(),
    ]


def budget_lines() -> list[str]:
    """What is over its budget."""
    lines = []
    for (variant, D), budget in BUDGETS.items():
        lines += [
            f"{variant}, D = {D}: {reason}"
            for reason in budget.broken(variant_loop(variant, D, simulated=False))
        ]
    return lines


def main() -> int:
    """Print; exit status 1 if a budget is broken."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--budgets", action="store_true", help="check the budgets only")
    broken = budget_lines()
    print("\n".join(broken or ["every budget is kept"]))
    if not parser.parse_args().budgets:
        print("\n".join(table()))
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
