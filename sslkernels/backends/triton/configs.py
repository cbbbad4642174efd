# SPDX-License-Identifier: Apache-2.0
"""Tile sizes: a small table per (architecture family, kernel table, dtype class, D).

No entry was timed: each is the largest tile of its candidate list that compiles on that family with
zero spills and within shared memory for every variant of the kernel (``docs/gpu.md`` has the compiled
figures, ``make gpu-report`` regenerates them).  "Largest" is by intensity, BLOCK_N * BLOCK_M /
(BLOCK_N + BLOCK_M) FLOPs a byte read.  To measure instead, call ``tuning.autotune``; to force a
configuration, use ``override``.

The kernel tables:

* ``forward``: one S tile at a time, block_n the held rows; ``narrow``: the same with fewer held rows, for
  ranks, which take as many registers again, and for problems of few tiles;
* ``extremes``: likewise, for arg-max and arg-min;
* ``fused``: backward and attend with the [BLOCK_N, D] sums on chip; None where that does not fit, and
  then the gradient goes by panels;
* ``panel``: writes G of some rows; ``product``: multiplies it with y (block_m is the summed side).
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import triton

from .. import devices
from .sizes import cdiv, next_power_of_2

DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
TABLES = ("forward", "narrow", "extremes", "fused", "panel", "product")
PRECISIONS = ("ieee", "tf32", "tf32x3", "bf16x3")
# The last row of a table: holds for every larger D (verified up to 1024).
ANY_D = 1 << 31


@dataclass(frozen=True)
class Config:
    """Tile of one kernel: rows, columns, features, and how it is compiled."""

    block_n: int
    block_m: int
    block_d: int
    num_warps: int
    num_stages: int
    hold_x: bool = True  # keep x on chip (else stream both sides by chunks)
    prefetch: int = (
        0  # chunks of y that wait in registers, where shared memory has no room for stages
    )
    programs: int = 1  # that share a multiprocessor, by registers and shared memory


@dataclass(frozen=True)
class Limits:
    """What one program may use at most."""

    shared_bytes: int
    source: str


# Dynamic shared memory one block can opt in to (CUDA C++ programming guide, technical
# specifications per compute capability) and LDS of a workgroup (AMD ISA guides).
_LIMITS = {
    "sm_80": Limits(166_912, "163 KB"),
    "sm_86": Limits(101_376, "99 KB"),
    "sm_87": Limits(166_912, "163 KB"),
    "sm_89": Limits(101_376, "99 KB"),
    "sm_90": Limits(232_448, "227 KB"),
    "sm_100": Limits(232_448, "227 KB"),
    "sm_103": Limits(232_448, "227 KB"),
    "sm_110": Limits(232_448, "227 KB"),
    "sm_120": Limits(101_376, "99 KB"),
    "sm_121": Limits(101_376, "99 KB"),
    "gfx950": Limits(163_840, "160 KB"),
}


def limits(arch: str) -> Limits:
    """Limits of an architecture; an unknown one gets the smallest of its vendor."""
    if arch in _LIMITS:
        return _LIMITS[arch]
    return Limits(101_376, "99 KB") if arch.startswith("sm_") else Limits(65_536, "64 KB")


def family(arch: str) -> str:
    """Which rows of the table an architecture uses."""
    if arch in ("sm_80", "sm_87"):
        return "ampere"  # mma.sync, 163 KB
    if arch == "sm_90":
        return "hopper"  # wgmma, 227 KB
    if arch in ("sm_100", "sm_103", "sm_110"):
        return "blackwell"  # tcgen05, 227 KB and tensor memory
    if arch.startswith("sm_"):
        return "small"  # mma.sync, 99 KB or less: sm_86, sm_89, sm_120, ...
    return "cdna"  # mfma, 64 KB; wave64


@functools.cache
def compiler_options(arch: str, overlap: bool = True) -> dict[str, int | bool]:
    """Options every kernel is compiled with on an architecture; not to be written to.

    Args:
        arch: Such as "sm_90".
        overlap: Whether a launch may be placed on the device while the one before it still runs, where the
            architecture can do that; its kernel waits then before it reads or writes (``tiles.wait_turn``).
    """
    # Contraction to fma is on by request: Triton's own default is about to change.
    options: dict[str, int | bool] = {"enable_fp_fusion": True}
    if overlap and arch.startswith("sm_") and int(arch[3:]) >= 90:
        options["launch_pdl"] = True
    if arch.startswith("gfx9"):
        # 16 x 16 MFMA: with the 32 x 32 form each lane holds four times as many rows of a tile, and
        # their comparison masks (a scalar register pair each) run out of scalar registers.
        options["matrix_instr_nonkdim"] = 16
    return options


# Programmatic dependent launches are captured into CUDA graphs from this driver on.
_OVERLAP_DRIVER = 12030


@functools.cache
def _overlap_by_default() -> bool:
    asked = os.environ.get("SSLKERNELS_TRITON_OVERLAP") or "1"
    if asked not in ("0", "1"):
        raise ValueError(f"SSLKERNELS_TRITON_OVERLAP must be 0 or 1, got {asked!r}")
    return asked == "1" and devices.driver() >= _OVERLAP_DRIVER


def overlaps() -> bool:
    """Whether launches may overlap: as overridden, else by SSLKERNELS_TRITON_OVERLAP and the driver."""
    return _overlap_by_default() if _overrides.overlap is None else _overrides.overlap


def arch_of(device: torch.device) -> str:
    """The architecture, such as "sm_90" or "gfx942"; "interpreter" for a CPU tensor."""
    if device.type != "cuda":
        return "interpreter"
    return devices.gpu(device).arch


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter (TRITON_INTERPRET=1)."""
    return bool(triton.knobs.runtime.interpret)


# Programs that run at once in the interpreter: enough to exercise what programs share.
_INTERPRETER_PROGRAMS = 8


def capacity(device: torch.device, config: Config) -> int:
    """Programs of a kernel that run at once.

    A launch has no more than that: a second wave would leave the device idle at its end, and every program
    more costs a slot of partial results.
    """
    if _overrides.programs is not None:
        return _overrides.programs
    return multiprocessors(device) * config.programs


def multiprocessors(device: torch.device) -> int:
    """How many the device has."""
    if device.type != "cuda":
        return _INTERPRETER_PROGRAMS
    return devices.gpu(device).multiprocessors


def folds(arch: str) -> bool:
    """Whether a thread holds rows r and r + 8 of every 16 of a product: mma.sync and wgmma."""
    return arch.startswith("sm_") and family(arch) != "blackwell"


# D and row strides of tile operands are multiples of this: an asynchronous copy moves 4, 8 or 16 bytes,
# and with 4 the addresses alone cost more registers than there are.
ROW_BYTES = 8


def packed_width(D: int, dtype: torch.dtype) -> int:
    """D as the kernels see it; if it is more than D, operands are copied and filled up with zeros.

    To D = 256 halves are read as they are where their rows are whole ROW_BYTES, the last chunk masked:
    a queue of 65536 short keys would take longer to copy than to read.  Beyond that, and in float32,
    a copy is little beside the products, and whole chunks leave more registers than masked ones.
    """
    if dtype == torch.float32:
        return cdiv(D, 32) * 32
    if D > 256:
        return cdiv(D, 64) * 64
    return D if D * dtype.itemsize % ROW_BYTES == 0 else cdiv(D, 16) * 16


def chunks(config: Config, D: int) -> tuple[int, int]:
    """(BLOCK_D, NUM_D): chunk width and count that cover D.

    The width is block_d, less if D is less, and half of it where that wastes fewer columns: D = 129
    with block_d = 128 is three chunks of 64, not two of 128.
    """
    width = min(config.block_d, max(16, next_power_of_2(D)))
    count = cdiv(D, width)
    half = width // 2
    if half >= 16 and cdiv(D, half) * half < count * width:
        return half, cdiv(D, half)
    return width, count


# (family, table, "half" | "float32") -> rows of (largest D, configuration or None)
_Rows = list[tuple[int, Config | None]]
TABLE: dict[tuple[str, str, str], _Rows] = {}

# Where nothing else is said, 16-bit operands: x stays on chip, y comes in stages.  Four warps leave room
# for a second program on a multiprocessor, which multiplies while the first computes exponentials; 128 x 64
# with four warps needs about 170 registers a thread.  Beyond what shared memory holds both sides stream by
# chunks of 64 (128 bytes, a full swizzle row).
_STREAMED = Config(128, 64, 64, 8, 3, hold_x=False)
_STREAMED_NARROW = Config(64, 64, 64, 4, 3, hold_x=False, programs=2)
_PANEL = Config(128, 128, 64, 8, 3, hold_x=False)
_PRODUCT = Config(128, 64, 256, 8, 3)  # no epilogue
# The best of every place of a tile and where it was take four registers an element.
_EXTREMES: _Rows = [
    (128, Config(64, 64, 128, 4, 3, programs=2)),
    # 64 columns spill where a chunk is masked (D = 200).
    (255, Config(64, 32, 128, 4, 2, programs=2)),
    (256, Config(64, 64, 128, 4, 2, programs=2)),
    (ANY_D, Config(64, 64, 64, 4, 3, hold_x=False, programs=2)),
]
# float32 on NVIDIA is FMA, not tensor cores: operands of a step sit in registers, so the step over the
# summed side is short (16).  128 x 64 with 8 warps is 32 sums a thread, the most that compiles clean.
_FP32_TILE = Config(128, 64, 16, 8, 2, hold_x=False)
_FP32_NARROW = Config(64, 32, 16, 4, 2, hold_x=False, programs=2)
for _family in ("ampere", "small", "hopper", "blackwell"):
    TABLE[_family, "extremes", "half"] = _EXTREMES
    TABLE[_family, "panel", "half"] = [(ANY_D, _PANEL)]
    TABLE[_family, "product", "half"] = [(ANY_D, _PRODUCT)]
    TABLE[_family, "forward", "float32"] = [(ANY_D, _FP32_TILE)]
    TABLE[_family, "narrow", "float32"] = [(ANY_D, _FP32_NARROW)]
    TABLE[_family, "extremes", "float32"] = [(ANY_D, _FP32_NARROW)]
    TABLE[_family, "fused", "float32"] = [(64, Config(64, 32, 32, 8, 1)), (ANY_D, None)]
    # 128 rows spill where ids are compared.
    TABLE[_family, "panel", "float32"] = [(ANY_D, Config(64, 64, 16, 8, 2, hold_x=False))]
    TABLE[_family, "product", "float32"] = [(ANY_D, Config(128, 16, 64, 8, 2))]

TABLE["hopper", "forward", "half"] = [
    (64, Config(128, 64, 64, 4, 3, programs=2)),
    (128, Config(128, 64, 128, 4, 3, programs=2)),
    # Two programs, each with x and one tile of y in shared memory: chunks of the next wait in registers.
    (256, Config(128, 64, 128, 4, 1, prefetch=2, programs=2)),
    # The block of x fits with two chunks of y: streaming both waits for the L2 cache twice as long.
    (768, Config(128, 128, 64, 8, 1, prefetch=1)),
    (ANY_D, Config(128, 128, 64, 8, 3, hold_x=False)),
]
TABLE["hopper", "narrow", "half"] = [
    (64, Config(64, 64, 64, 4, 3, programs=2)),
    (128, Config(64, 64, 128, 4, 3, programs=2)),
    (256, Config(64, 64, 128, 4, 2, programs=2)),
    (768, Config(64, 64, 64, 4, 1, prefetch=1, programs=2)),
    (ANY_D, _STREAMED_NARROW),
]
TABLE["hopper", "extremes", "half"] = [
    *_EXTREMES[:-1],
    (512, Config(64, 32, 512, 4, 1, programs=2)),
    _EXTREMES[-1],
]
TABLE["hopper", "panel", "half"] = [
    (704, Config(128, 64, 64, 8, 1, prefetch=1)),  # 128 columns spill where float16 rows have ids
    (768, Config(128, 128, 64, 8, 1, prefetch=1)),
    (ANY_D, _PANEL),
]
TABLE["hopper", "product", "half"] = [(ANY_D, Config(128, 64, 256, 8, 4))]
# Sums of [128, 256] or [64, 512] are 128 registers of 256 threads.  One chunk, even where a quarter of it is
# masked: of several the addresses and descriptors take registers and instructions.
TABLE["hopper", "fused", "half"] = [
    (64, Config(64, 64, 64, 4, 3, programs=2)),
    (128, Config(64, 64, 128, 4, 3, programs=2)),
    (192, Config(64, 32, 64, 4, 3, programs=2)),
    (256, Config(128, 32, 256, 8, 3)),
    (512, Config(64, 32, 512, 8, 3)),
    (ANY_D, None),
]

# mma.sync holds operands and sums in registers.
TABLE["ampere", "forward", "half"] = [
    (128, Config(128, 64, 128, 4, 3, programs=2)),
    (256, Config(128, 64, 256, 8, 3)),
    (ANY_D, _STREAMED),
]
TABLE["ampere", "narrow", "half"] = [
    (128, Config(64, 64, 128, 4, 3, programs=3)),
    (256, Config(64, 64, 128, 4, 2, programs=2)),
    (ANY_D, _STREAMED_NARROW),
]
TABLE["ampere", "fused", "half"] = [
    (64, Config(64, 64, 64, 4, 2, programs=2)),
    (128, Config(64, 32, 128, 4, 3, programs=2)),
    (256, Config(64, 32, 256, 8, 2)),
    (ANY_D, None),
]
# The 99 KB of the small family end holding x at D = 128.
TABLE["small", "forward", "half"] = [
    (128, Config(128, 64, 128, 4, 3)),
    (ANY_D, _STREAMED),
]
# On sm_89 64 columns of ranks spill 12 bytes, on sm_120 four warps 32 and products of 256 features 136.
TABLE["small", "narrow", "half"] = [
    (128, Config(64, 32, 128, 4, 3, programs=2)),
    (ANY_D, Config(64, 64, 64, 8, 3, hold_x=False)),
]
TABLE["small", "panel", "float32"] = [(ANY_D, Config(64, 32, 16, 8, 2, hold_x=False))]
TABLE["small", "product", "half"] = [(ANY_D, Config(128, 64, 128, 8, 3))]
TABLE["small", "fused", "half"] = TABLE["ampere", "fused", "half"]

# Products are in tensor memory until they are read, but Triton gives their sums registers as well: tiles that
# fit elsewhere spill here.
TABLE["blackwell", "extremes", "half"] = [
    (256, Config(64, 32, 128, 4, 2, programs=2)),
    (ANY_D, Config(64, 32, 64, 4, 3, hold_x=False, programs=2)),
]
TABLE["blackwell", "forward", "half"] = [
    (128, Config(128, 64, 128, 8, 3)),
    (256, Config(64, 64, 128, 8, 2)),
    (ANY_D, _STREAMED),
]
TABLE["blackwell", "narrow", "half"] = [
    (128, Config(64, 64, 128, 8, 3)),
    (256, Config(64, 64, 128, 8, 2)),
    (ANY_D, _STREAMED_NARROW),
]
TABLE["blackwell", "fused", "half"] = [
    (64, Config(64, 32, 64, 4, 2, programs=2)),
    (128, Config(128, 32, 128, 8, 2)),
    (255, Config(64, 32, 128, 8, 2)),  # a masked chunk
    (256, Config(64, 64, 128, 8, 2)),
    (ANY_D, None),
]
TABLE["blackwell", "narrow", "float32"] = [(ANY_D, Config(64, 64, 16, 8, 2, hold_x=False))]
TABLE["blackwell", "panel", "float32"] = [(ANY_D, Config(64, 64, 16, 4, 2, hold_x=False))]
TABLE["blackwell", "panel", "half"] = [(ANY_D, Config(64, 64, 64, 8, 3, hold_x=False))]
TABLE["blackwell", "product", "half"] = [(ANY_D, Config(128, 64, 64, 4, 3, programs=2))]

# CDNA: 64 KB of LDS and operands in registers; comparison masks of a tile sit in scalar registers, of
# which there are about 100, so extremes (two masks) get half the columns.  A second pipeline stage
# keeps a second tile in registers.  float32 has MFMA instructions too, hence fused to 128.
TABLE["cdna", "forward", "half"] = [
    (256, Config(128, 32, 128, 8, 1)),
    (ANY_D, Config(128, 32, 64, 8, 1, hold_x=False)),
]
TABLE["cdna", "narrow", "half"] = [
    (256, Config(64, 32, 128, 4, 1)),
    (ANY_D, Config(64, 32, 64, 4, 1, hold_x=False)),
]
TABLE["cdna", "extremes", "half"] = [
    (128, Config(64, 32, 128, 4, 1)),
    (ANY_D, Config(64, 32, 64, 4, 1, hold_x=False)),
]
TABLE["cdna", "fused", "half"] = [
    (128, Config(64, 32, 128, 4, 1)),
    (256, Config(64, 32, 64, 4, 1)),
    (ANY_D, None),
]
TABLE["cdna", "panel", "half"] = [(ANY_D, Config(128, 128, 64, 8, 2, hold_x=False))]
TABLE["cdna", "product", "half"] = [(ANY_D, Config(128, 64, 128, 4, 2))]
# In steps of 32 the columns of float32 cost 16 bytes of scratch.
TABLE["cdna", "forward", "float32"] = [(ANY_D, Config(64, 32, 16, 4, 1, hold_x=False))]
TABLE["cdna", "narrow", "float32"] = TABLE["cdna", "forward", "float32"]
TABLE["cdna", "extremes", "float32"] = [(ANY_D, Config(64, 32, 32, 4, 1, hold_x=False))]
TABLE["cdna", "fused", "float32"] = [(128, Config(64, 32, 32, 4, 1)), (ANY_D, None)]
TABLE["cdna", "panel", "float32"] = [(ANY_D, Config(128, 64, 32, 8, 2, hold_x=False))]
TABLE["cdna", "product", "float32"] = [(ANY_D, Config(128, 32, 64, 4, 2))]

# Small enough that the sizes of the tests make several tiles, large enough to be quick in NumPy.
for _class in ("half", "float32"):
    _both: _Rows = [(64, Config(64, 32, 64, 4, 1)), (ANY_D, Config(64, 32, 64, 4, 1, hold_x=False))]
    TABLE["interpreter", "forward", _class] = [
        (64, Config(64, 32, 64, 4, 1)),
        (128, Config(64, 32, 64, 4, 1, prefetch=2)),
        (ANY_D, Config(64, 32, 64, 4, 1, hold_x=False)),
    ]
    TABLE["interpreter", "narrow", _class] = [
        (64, Config(32, 32, 64, 4, 1)),
        (128, Config(32, 32, 64, 4, 1, prefetch=1)),
        (ANY_D, Config(32, 32, 64, 4, 1, hold_x=False)),
    ]
    TABLE["interpreter", "extremes", _class] = _both
    TABLE["interpreter", "fused", _class] = [(256, Config(64, 32, 64, 4, 1)), (ANY_D, None)]
    TABLE["interpreter", "panel", _class] = [
        (64, Config(64, 64, 64, 4, 1)),
        (128, Config(64, 32, 64, 4, 1, prefetch=1)),
        (ANY_D, Config(64, 64, 64, 4, 1, hold_x=False)),
    ]
    TABLE["interpreter", "product", _class] = [(ANY_D, Config(64, 32, 128, 4, 1))]


def _dtype_class(dtype: torch.dtype) -> str:
    return "float32" if dtype == torch.float32 else "half"


def lookup(table: str, arch: str, D: int, dtype: torch.dtype) -> Config | None:
    """The table's entry, without overrides: the first row whose largest D is not below D."""
    rows = TABLE[
        "interpreter" if arch == "interpreter" else family(arch), table, _dtype_class(dtype)
    ]
    for largest, config in rows:
        if largest >= D:
            return config
    return None


_Made = TypeVar("_Made")
_version = 0  # of what ``choose`` and ``capacity`` answer: plans of an older one are not used


def _forget_plans() -> None:
    global _version
    _version += 1


def planned(make: Callable[..., _Made]) -> Callable[..., _Made]:
    """Keep what ``make(device, dtype, *numbers)`` returns, for the next call of the same shapes.

    How a loss is launched follows from shapes, strides and the tables alone, and takes the host longer to
    find than to use.  The dtype is that of the operands; whatever else ``make`` depends on must be among the
    numbers.  Nobody may write to what is returned.
    """

    @functools.lru_cache(maxsize=256)
    def kept(_: Any, device: torch.device, dtype: torch.dtype, *numbers: Any) -> _Made:
        return make(device, dtype, *numbers)

    @functools.wraps(make)
    def plan(device: torch.device, dtype: torch.dtype, *numbers: Any) -> _Made:
        products = precision() if dtype == torch.float32 else ""
        state = (_version, arch_of(device), multiprocessors(device), products)
        return kept(state, device, dtype, *numbers)

    return plan


@dataclass
class _Overrides:
    configs: dict[str, Config | None]
    programs: int | None = None
    precision: str | None = None
    overlap: bool | None = None


_overrides = _Overrides({})
# (table, arch, packed width of D, dtype) -> configuration found by tuning.autotune
_tuned: dict[tuple[str, str, int, torch.dtype], Config | None] = {}


@contextlib.contextmanager
def override(
    *,
    programs: int | None = None,
    fp32_precision: str | None = None,
    overlap: bool | None = None,
    **tables: Config | None,
) -> Iterator[None]:
    """Force configurations inside the block.

    Args:
        programs: programs a launch has at most, instead of as many as run at once.
        fp32_precision: "ieee", "tf32", "tf32x3" or "bf16x3" for float32 products.
        overlap: whether launches may overlap, see ``compiler_options``.
        **tables: forward, narrow, extremes, fused, panel, product; ``fused=None`` sends gradients by panels.

    Raises:
        ValueError: for an unknown table or precision.
    """
    global _overrides
    unknown = set(tables) - set(TABLES)
    if unknown:
        raise ValueError(
            f"override: tables are {', '.join(TABLES)}, got {', '.join(sorted(unknown))}"
        )
    if fp32_precision is not None and fp32_precision not in PRECISIONS:
        raise ValueError(
            f"override: fp32_precision must be one of {PRECISIONS}, got {fp32_precision!r}"
        )
    previous = _overrides
    _overrides = _Overrides(
        {**previous.configs, **tables},
        previous.programs if programs is None else programs,
        previous.precision if fp32_precision is None else fp32_precision,
        previous.overlap if overlap is None else overlap,
    )
    _forget_plans()
    try:
        yield
    finally:
        _overrides = previous
        _forget_plans()


def remember(table: str, arch: str, D: int, dtype: torch.dtype, config: Config | None) -> None:
    """Use a measured configuration from now on in this process, for every D that is packed alike."""
    _tuned[table, arch, packed_width(D, dtype), dtype] = config
    _forget_plans()


def choose(table: str, device: torch.device, D: int, dtype: torch.dtype) -> Config | None:
    """The configuration to launch with: override, else tuned, else the table."""
    if table in _overrides.configs:
        return _overrides.configs[table]
    arch = arch_of(device)
    key = (table, arch, packed_width(D, dtype), dtype)
    if key in _tuned:
        return _tuned[key]
    return lookup(table, arch, D, dtype)


def require(table: str, device: torch.device, D: int, dtype: torch.dtype) -> Config:
    """``choose`` for the tables that have an entry for every D."""
    config = choose(table, device, D, dtype)
    if config is None:
        raise ValueError(
            f"triton backend: no {table} configuration for D = {D}, {dtype} on {device}"
        )
    return config


def precision() -> str:
    """``input_precision`` of float32 products: "ieee" unless asked otherwise.

    Asked by ``override(fp32_precision=...)`` or the environment variable
    SSLKERNELS_TRITON_FP32=tf32|tf32x3|bf16x3.  torch.backends.cuda.matmul.allow_tf32 is not such an ask: it
    is often set for the network, and a temperature of 0.01 turns its 1e-3 into 10 %.
    """
    asked = _overrides.precision or os.environ.get("SSLKERNELS_TRITON_FP32", "ieee")
    if asked not in PRECISIONS:
        raise ValueError(f"SSLKERNELS_TRITON_FP32 must be one of {PRECISIONS}, got {asked!r}")
    return asked


def forget_tuned() -> None:
    """Drop what ``remember`` was told."""
    _tuned.clear()
    _forget_plans()
