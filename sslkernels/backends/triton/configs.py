# SPDX-License-Identifier: Apache-2.0
"""Tile sizes: a small table per (architecture family, kernel table, dtype class, D).

No entry was timed: each is the largest tile of its candidate list that compiles on that family with
zero spills and within shared memory for every variant of the kernel (``docs/gpu.md`` has the compiled
figures, ``make gpu-report`` regenerates them).  "Largest" is by intensity, BLOCK_N * BLOCK_M /
(BLOCK_N + BLOCK_M) FLOPs a byte read.  To measure instead, call ``tuning.autotune``; to force a
configuration, use ``override``.

The kernel tables:

* ``forward``, ``extremes``: one S tile at a time;
* ``fused``: backward and attend with the [BLOCK_N, D] sums on chip; None where that does not fit, and
  then the gradient goes by panels;
* ``panel``: writes G of some rows; ``product``: multiplies it with y (block_m is the summed side).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton

from .. import devices

DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
TABLES = ("forward", "extremes", "fused", "panel", "product")
PRECISIONS = ("ieee", "tf32", "tf32x3")
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
    hold_x: bool = True  # keep x on chip (else stream both sides by chunks, as panels always do)


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
    if arch in ("sm_100", "sm_103"):
        return "blackwell"  # tcgen05, 227 KB and tensor memory
    if arch.startswith("sm_"):
        return "small"  # mma.sync, 99 KB or less: sm_86, sm_89, sm_120, ...
    return "cdna"  # mfma, 64 KB; wave64


def compiler_options(arch: str) -> dict[str, int | bool]:
    """Options every kernel is compiled with on an architecture."""
    # Contraction to fma is on by request: Triton's own default is about to change.
    options: dict[str, int | bool] = {"enable_fp_fusion": True}
    if arch.startswith("gfx9"):
        # 16 x 16 MFMA: with the 32 x 32 form each lane holds four times as many rows of a tile, and
        # their comparison masks (a scalar register pair each) run out of scalar registers.
        options["matrix_instr_nonkdim"] = 16
    return options


def arch_of(device: torch.device) -> str:
    """The architecture, such as "sm_90" or "gfx942"; "interpreter" for a CPU tensor."""
    if device.type != "cuda":
        return "interpreter"
    return devices.gpu(device).arch


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter (TRITON_INTERPRET=1)."""
    return bool(triton.knobs.runtime.interpret)


# Programs a launch should have at least: four a multiprocessor, so that the last wave, which is on
# average half empty, costs an eighth.  The interpreter gets enough to exercise the splits.
_WAVES = 4
_INTERPRETER_PROGRAMS = 8


def target_programs(device: torch.device) -> int:
    """How many programs fill the device."""
    if _overrides.programs is not None:
        return _overrides.programs
    if device.type != "cuda":
        return _INTERPRETER_PROGRAMS
    return _WAVES * devices.gpu(device).multiprocessors


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
        return triton.cdiv(D, 32) * 32
    if D > 256:
        return triton.cdiv(D, 64) * 64
    return D if D * dtype.itemsize % ROW_BYTES == 0 else triton.cdiv(D, 16) * 16


def chunks(config: Config, D: int) -> tuple[int, int]:
    """(BLOCK_D, NUM_D): chunk width and count that cover D.

    The width is block_d, less if D is less, and half of it where that wastes fewer columns: D = 129
    with block_d = 128 is three chunks of 64, not two of 128.
    """
    width = min(config.block_d, max(16, triton.next_power_of_2(D)))
    count = triton.cdiv(D, width)
    half = width // 2
    if half >= 16 and triton.cdiv(D, half) * half < count * width:
        return half, triton.cdiv(D, half)
    return width, count


# (family, table, "half" | "float32") -> rows of (largest D, configuration or None)
_Rows = list[tuple[int, Config | None]]
TABLE: dict[tuple[str, str, str], _Rows] = {}

# float32 on NVIDIA is FMA, not tensor cores: operands of a step sit in registers, so the step over the
# summed side is short (16).  128 x 64 with 8 warps is 32 sums a thread, the most that compiles clean.
_FP32_TILE: _Rows = [(ANY_D, Config(128, 64, 16, 8, 2, hold_x=False))]
for _family in ("ampere", "small", "hopper", "blackwell"):
    # x stays on chip to D = 256, which saves half of the reads; above, both sides stream by chunks of
    # 64 (128 bytes, a full swizzle row).  The 99 KB of the small family end holding x at D = 128.
    _held = 128 if _family == "small" else 256
    TABLE[_family, "forward", "half"] = [
        (_held, Config(128, 64, 128, 8, 3)),
        (ANY_D, Config(128, 64, 64, 8, 3, hold_x=False)),
    ]
    TABLE[_family, "extremes", "half"] = TABLE[_family, "forward", "half"]
    if _family == "ampere":
        # 129 to 256 in one chunk: three of 64 (D = 144) spill.
        TABLE[_family, "forward", "half"] = [
            (128, Config(128, 64, 128, 8, 3)),
            (256, Config(128, 64, 256, 8, 3)),
            (ANY_D, Config(128, 64, 64, 8, 3, hold_x=False)),
        ]
    if _family == "blackwell":
        # With one chunk and 2 stages, or one of 128, the kernel for rows alone spills 52 bytes; with
        # 3 chunks and 3 stages (D = 96) the one of softplus 36.
        TABLE[_family, "forward", "half"] = [
            (64, Config(128, 64, 64, 8, 3)),
            (256, Config(128, 64, 64, 8, 2)),
            (ANY_D, Config(128, 64, 64, 8, 4, hold_x=False)),
        ]
    if _family == "hopper":
        # wgmma reads both operands of a tile from shared memory: with 64 columns that takes as long as
        # the products, with 128 three quarters.  To D = 64 exponentials take longer than either.
        # Elsewhere 128 x 128 spills in the epilogue.
        TABLE[_family, "forward", "half"] = [
            (64, Config(128, 64, 64, 8, 3)),
            (128, Config(128, 128, 128, 8, 3)),
            (256, Config(128, 128, 128, 8, 2)),
            (ANY_D, Config(128, 128, 64, 8, 4, hold_x=False)),
        ]
    # 128 rows spill 84 bytes in Blackwell's self mode.
    TABLE[_family, "forward", "float32"] = (
        [(ANY_D, Config(64, 64, 16, 8, 2, hold_x=False))] if _family == "blackwell" else _FP32_TILE
    )
    TABLE[_family, "extremes", "float32"] = _FP32_TILE
    # [128, D] float32 sums: 128 registers a thread at D = 256 with 8 warps.  wgmma and tcgen05 read
    # their operands from shared memory and leave room for that; mma.sync holds them in registers, so
    # it gets 32 columns, and 64 rows at D = 256.  Above 256 panels read less than the narrow tiles that
    # would fit.
    TABLE[_family, "fused", "half"] = {
        # Above 192 one chunk: two of 128, the last one masked (D = 200), spill 100 bytes.
        "hopper": [
            (192, Config(128, 64, 128, 8, 2)),
            (256, Config(128, 64, 256, 8, 2)),
            (ANY_D, None),
        ],
        # One masked chunk of 128 (D = 100) spills 48 bytes; four of 64 compile to a kernel without a body.
        "blackwell": [
            (128, Config(128, 64, 64, 8, 2)),
            (256, Config(128, 64, 128, 8, 2)),
            (ANY_D, None),
        ],
    }.get(
        _family,
        # One chunk for 129 to 256: three of 64 (D = 192) spill.
        [(128, Config(128, 32, 128, 8, 2)), (256, Config(64, 32, 256, 8, 2)), (ANY_D, None)],
    )
    TABLE[_family, "fused", "float32"] = [(64, Config(64, 32, 32, 8, 1)), (ANY_D, None)]
    # One tile a program and a short epilogue: 128 x 128 fits everywhere, twice that only with wgmma.
    # The product has no epilogue.
    _rows = 256 if _family == "hopper" else 128
    TABLE[_family, "panel", "half"] = [(ANY_D, Config(_rows, 128, 64, 8, 3, hold_x=False))]
    TABLE[_family, "panel", "float32"] = [(ANY_D, Config(128, 64, 16, 8, 2, hold_x=False))]
    TABLE[_family, "product", "half"] = [(ANY_D, Config(128, 64, 256, 8, 3))]
    TABLE[_family, "product", "float32"] = [(ANY_D, Config(128, 16, 64, 8, 2))]

# CDNA: 64 KB of LDS and operands in registers; comparison masks of a tile sit in scalar registers, of
# which there are about 100, so extremes (two masks) get half the columns.  A second pipeline stage
# keeps a second tile in registers: only the held forward kernel has room for it.  float32 has MFMA
# instructions too, hence fused to 128.
TABLE["cdna", "forward", "half"] = [
    (512, Config(128, 32, 128, 8, 1)),
    (ANY_D, Config(128, 32, 64, 8, 1, hold_x=False)),
]
# In steps of 32 the columns of float32 cost 16 bytes of scratch.
TABLE["cdna", "forward", "float32"] = [(ANY_D, Config(64, 32, 16, 4, 1, hold_x=False))]
TABLE["cdna", "extremes", "half"] = [
    (128, Config(64, 32, 128, 4, 1)),
    (ANY_D, Config(64, 32, 64, 4, 1, hold_x=False)),
]
TABLE["cdna", "extremes", "float32"] = [(ANY_D, Config(64, 32, 32, 4, 1, hold_x=False))]
TABLE["cdna", "fused", "half"] = [
    (128, Config(64, 64, 128, 4, 1)),
    (256, Config(64, 32, 128, 4, 1)),
    (ANY_D, None),
]
TABLE["cdna", "fused", "float32"] = [(128, Config(64, 64, 32, 4, 1)), (ANY_D, None)]
TABLE["cdna", "panel", "half"] = [(ANY_D, Config(128, 128, 64, 8, 2, hold_x=False))]
TABLE["cdna", "panel", "float32"] = [(ANY_D, Config(128, 64, 32, 8, 2, hold_x=False))]
TABLE["cdna", "product", "half"] = [(ANY_D, Config(128, 64, 128, 4, 2))]
TABLE["cdna", "product", "float32"] = [(ANY_D, Config(128, 32, 64, 4, 2))]

# Small enough that the sizes of the tests make several tiles, large enough to be quick in NumPy.
for _class in ("half", "float32"):
    _both: _Rows = [(64, Config(64, 32, 64, 4, 1)), (ANY_D, Config(64, 32, 64, 4, 1, hold_x=False))]
    TABLE["interpreter", "forward", _class] = _both
    TABLE["interpreter", "extremes", _class] = _both
    TABLE["interpreter", "fused", _class] = [(256, Config(64, 32, 64, 4, 1)), (ANY_D, None)]
    TABLE["interpreter", "panel", _class] = [(ANY_D, Config(64, 64, 64, 4, 1, hold_x=False))]
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


@dataclass
class _Overrides:
    configs: dict[str, Config | None]
    programs: int | None = None
    precision: str | None = None


_overrides = _Overrides({})
# (table, arch, D, dtype) -> configuration found by tuning.autotune
_tuned: dict[tuple[str, str, int, torch.dtype], Config | None] = {}


@contextlib.contextmanager
def override(
    *, programs: int | None = None, fp32_precision: str | None = None, **tables: Config | None
) -> Iterator[None]:
    """Force configurations inside the block.

    Args:
        programs: programs a launch should have, instead of four a multiprocessor.
        fp32_precision: "ieee", "tf32" or "tf32x3" for float32 products.
        **tables: forward, fused, panel, product; ``fused=None`` sends gradients by panels.

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
    )
    try:
        yield
    finally:
        _overrides = previous


def remember(table: str, arch: str, D: int, dtype: torch.dtype, config: Config | None) -> None:
    """Use a measured configuration from now on in this process."""
    _tuned[table, arch, D, dtype] = config


def choose(table: str, device: torch.device, D: int, dtype: torch.dtype) -> Config | None:
    """The configuration to launch with: override, else tuned, else the table."""
    if table in _overrides.configs:
        return _overrides.configs[table]
    arch = arch_of(device)
    key = (table, arch, D, dtype)
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
    SSLKERNELS_TRITON_FP32=tf32|tf32x3.  torch.backends.cuda.matmul.allow_tf32 is not such an ask: it
    is often set for the network, and a temperature of 0.01 turns its 1e-3 into 10 %.
    """
    asked = _overrides.precision or os.environ.get("SSLKERNELS_TRITON_FP32", "ieee")
    if asked not in PRECISIONS:
        raise ValueError(f"SSLKERNELS_TRITON_FP32 must be one of {PRECISIONS}, got {asked!r}")
    return asked


def forget_tuned() -> None:
    """Drop what ``remember`` was told."""
    _tuned.clear()
