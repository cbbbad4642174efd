# SPDX-License-Identifier: Apache-2.0
"""Distances of two lists of feature maps in Triton: one launch for the maps of a pair of dtypes.

Formulas are those of ``csrc/cpu/features.cpp``; float32, bfloat16 and float16, sums in float32.  A program
computes one *unit*: up to UNIT elements of one row of one map.  It finds its map by comparing its number with
those of the maps' first units, so that addresses are arguments of the launch and no table is copied to
the device.  Sums of several units are added by a second kernel, in order.
"""

# Triton reads annotations of kernel arguments itself, so no `from __future__ import annotations`.

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .runtime import launch
from .sizes import cdiv
from .tiles import wait_turn

UNIT = 8192  # elements of a program, as on the CPU
BLOCK = 1024  # elements at a time: eight a thread
COMBINE_BLOCK = 128  # sums that are added at a time
_SQUARED, _ABSOLUTE, _SMOOTH = 0, 1, 2  # KIND: the smooth L1 of beta = 0 is |x|


@triton.jit
def _units(size, UNIT: tl.constexpr):
    """Of a row of a map; one where there is nothing, which writes the 0."""
    return tl.maximum((tl.cast(size, tl.int64) + (UNIT - 1)) // UNIT, 1)


@triton.jit
def _locate(unit, sizes, UNIT: tl.constexpr):
    """Which map a unit is of, and which unit of that map it is."""
    index = tl.zeros((), tl.int32)
    first = tl.zeros((), tl.int64)
    mine = first
    for i in tl.static_range(1, len(sizes)):
        first += _units(sizes[i - 1], UNIT)
        index = tl.where(unit >= first, i, index)
        mine = tl.where(unit >= first, first, mine)
    return index, unit - mine


@triton.jit
def _pick(index, values):
    """One of several pointers."""
    found = values[0]
    for i in tl.static_range(1, len(values)):
        found = tl.where(index == i, values[i], found)
    return found


@triton.jit
def _pick_integer(index, values):
    """One of several integers, some of which Triton may have made constants."""
    found = tl.cast(values[0], tl.int64)
    for i in tl.static_range(1, len(values)):
        found = tl.where(index == i, tl.cast(values[i], tl.int64), found)
    return found


@triton.jit(do_not_specialize=["offset", "units", "stride_out", "beta", "half_inverse"])
def features_forward_kernel(
    out_ptr,  # [N, ...] float32, rows of stride_out: a column a unit, from `offset` on
    features,  # L pointers, [N, size] contiguous
    targets,  # L pointers, likewise
    sizes,  # L integers
    offset,
    units,  # of a row, over the L maps
    stride_out,
    beta,
    half_inverse,  # 1 / (2 beta)
    KIND: tl.constexpr,
    DIVIDE: tl.constexpr,  # a map has one unit: write its mean, not its sum
    UNIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The sum of one unit a program."""
    wait_turn()
    program = tl.program_id(0)
    unit = program % units
    row = (program // units).to(tl.int64)  # times a size
    index, part = _locate(unit, sizes, UNIT)
    size = _pick_integer(index, sizes)
    begin = part * UNIT
    at_row = row * size + begin
    feature_ptr = _pick(index, features) + at_row
    target_ptr = _pick(index, targets) + at_row
    count = tl.minimum(size - begin, UNIT).to(tl.int32)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, count, BLOCK):
        at = start + tl.arange(0, BLOCK)
        ok = at < count
        f = tl.load(feature_ptr + at, mask=ok, other=0.0).to(tl.float32)
        t = tl.load(target_ptr + at, mask=ok, other=0.0).to(tl.float32)
        x = f - t
        if KIND == 0:
            rho = x * x
        else:
            rho = tl.abs(x)
            if KIND == 2:
                rho = tl.where(rho < beta, half_inverse * x * x, rho - 0.5 * beta)
        total += rho  # of what is masked it is 0
    result = tl.sum(total)
    if DIVIDE:
        result = result / tl.where(size > 0, size, 1).to(tl.float32)
    tl.store(out_ptr + row * stride_out + offset + unit, result)


@triton.jit(do_not_specialize=["units"])
def features_combine_kernel(
    out_ptr,  # [N, L] float32 contiguous
    parts_ptr,  # [N, units] float32 contiguous
    sizes,  # L integers, in the order of the units
    columns,  # L integers: where in a row of out
    units,
    UNIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The mean of one row of one map a program."""
    wait_turn()
    program = tl.program_id(0)
    maps = len(sizes)
    index = program % maps
    row = (program // maps).to(tl.int64)  # times the number of units
    size = _pick_integer(index, sizes)
    first = tl.zeros((), tl.int64)
    for i in tl.static_range(len(sizes)):
        first += tl.where(i < index, _units(sizes[i], UNIT), 0)
    count = _units(size, UNIT).to(tl.int32)
    row_ptr = parts_ptr + row * units + first
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, count, BLOCK):
        at = start + tl.arange(0, BLOCK)
        total += tl.load(row_ptr + at, mask=at < count, other=0.0)
    mean = tl.sum(total) / tl.where(size > 0, size, 1).to(tl.float32)
    tl.store(out_ptr + row * maps + _pick_integer(index, columns), mean)


@triton.jit(
    do_not_specialize=["units", "stride_dn", "stride_dl", "beta", "inverse"],
)
def features_backward_kernel(
    gradients,  # L pointers, [N, size] contiguous
    features,  # L pointers, likewise
    targets,  # L pointers, likewise
    sizes,  # L integers
    columns,  # L integers: which column of dout
    dout_ptr,  # [N, ...] elements of stride_dn, stride_dl
    units,  # of a row, over the L maps
    stride_dn,
    stride_dl,
    beta,
    inverse,  # 1 / beta
    KIND: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The gradient of one unit a program."""
    wait_turn()
    program = tl.program_id(0)
    unit = program % units
    row = (program // units).to(tl.int64)  # times a size
    index, part = _locate(unit, sizes, UNIT)
    size = _pick_integer(index, sizes)
    begin = part * UNIT
    at_row = row * size + begin
    feature_ptr = _pick(index, features) + at_row
    target_ptr = _pick(index, targets) + at_row
    gradient_ptr = _pick(index, gradients) + at_row
    count = tl.minimum(size - begin, UNIT).to(tl.int32)
    column = _pick_integer(index, columns)
    g = tl.load(dout_ptr + row * stride_dn + column * stride_dl).to(tl.float32)
    g = g / size.to(tl.float32)
    for start in range(0, count, BLOCK):
        at = start + tl.arange(0, BLOCK)
        ok = at < count
        f = tl.load(feature_ptr + at, mask=ok, other=0.0).to(tl.float32)
        t = tl.load(target_ptr + at, mask=ok, other=0.0).to(tl.float32)
        x = f - t
        if KIND == 0:
            slope = x + x
        else:
            slope = tl.where(x > 0.0, 1.0, tl.where(x < 0.0, -1.0, x))  # 0 and NaN stay
            if KIND == 2:
                slope = tl.where(tl.abs(x) < beta, inverse * x, slope)
        tl.store(gradient_ptr + at, (g * slope).to(gradient_ptr.dtype.element_ty), mask=ok)


# ---- launchers -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Group:
    """Maps of one pair of dtypes, by their numbers."""

    numbers: tuple[int, ...]
    features: tuple[Tensor, ...]
    targets: tuple[Tensor, ...]

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(x.shape[1] for x in self.features)

    @property
    def units(self) -> int:
        return sum(max(1, cdiv(size, UNIT)) for size in self.sizes)


def _groups(features: list[Tensor], targets: list[Tensor], chosen: list[int]) -> list[_Group]:
    kinds: dict[tuple[torch.dtype, torch.dtype], list[int]] = {}
    for i in chosen:
        kinds.setdefault((features[i].dtype, targets[i].dtype), []).append(i)
    return [
        _Group(
            tuple(numbers),
            tuple(features[i].contiguous() for i in numbers),
            tuple(targets[i].contiguous() for i in numbers),
        )
        for numbers in kinds.values()
    ]


def _kind(smooth: bool, beta: float) -> int:
    if not smooth:
        return _SQUARED
    return _SMOOTH if beta > 0 else _ABSOLUTE


def features_forward(
    features: list[Tensor], targets: list[Tensor], smooth: bool, beta: float
) -> Tensor:
    """See ``Autoencoders.features_forward``."""
    n, device = features[0].shape[0], features[0].device
    out = torch.empty((n, len(features)), dtype=torch.float32, device=device)
    if n == 0:
        return out
    groups = _groups(features, targets, list(range(len(features))))
    units = sum(group.units for group in groups)
    # Then a unit is a map, and they are in the order of the list.
    whole = units == len(features) and len(groups) == 1
    parts = out if whole else torch.empty((n, units), dtype=torch.float32, device=device)
    kind, offset = _kind(smooth, beta), 0
    for group in groups:
        launch(
            features_forward_kernel, (n * group.units,), device, parts, group.features,
            group.targets, group.sizes, offset, group.units, units, beta,
            0.5 / beta if kind == _SMOOTH else 0.0, KIND=kind, DIVIDE=whole, UNIT=UNIT, BLOCK=BLOCK,
        )  # fmt: skip
        offset += group.units
    if not whole:
        sizes = tuple(size for group in groups for size in group.sizes)
        columns = tuple(i for group in groups for i in group.numbers)
        launch(
            features_combine_kernel, (n * len(sizes),), device, out, parts, sizes, columns, units,
            UNIT=UNIT, BLOCK=COMBINE_BLOCK,
        )  # fmt: skip
    return out


def features_backward(
    features: list[Tensor],
    targets: list[Tensor],
    smooth: bool,
    beta: float,
    dout: Tensor,
    wanted: list[bool],
) -> list[Tensor | None]:
    """See ``Autoencoders.features_backward``."""
    out = [
        torch.empty(x.shape, dtype=x.dtype, device=x.device) if want else None
        for x, want in zip(features, wanted, strict=True)
    ]
    gradients: dict[int, Any] = {i: x for i, x in enumerate(out) if x is not None and x.numel()}
    kind = _kind(smooth, beta)
    for group in _groups(features, targets, list(gradients)):
        launch(
            features_backward_kernel, (len(dout) * group.units,), dout.device,
            tuple(gradients[i] for i in group.numbers), group.features, group.targets, group.sizes,
            group.numbers, dout, group.units, *dout.stride(), beta,
            1.0 / beta if kind == _SMOOTH else 0.0, KIND=kind, UNIT=UNIT, BLOCK=BLOCK,
        )  # fmt: skip
    return out
