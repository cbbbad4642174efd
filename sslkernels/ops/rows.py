# SPDX-License-Identifier: Apache-2.0
"""Gather and accumulate rows deterministically: the glue of class sums and hard mining.

torch's own pair (index_select, index_add) uses atomics in one of its directions on every device.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sslkernels.backends.chunked import accumulation_dtype
from sslkernels.ops._library import (
    LIB,
    below_autograd,
    define,
    needs_grad,
    once_differentiable,
)

define("accumulate_rows(Tensor src, Tensor index, SymInt n) -> Tensor")
define("take_rows(Tensor src, Tensor index) -> Tensor")
define("class_dots(Tensor z, Tensor index) -> Tensor")
define("class_dots_backward(Tensor z, Tensor index, Tensor dout) -> Tensor")


def _accumulate(src: Tensor, index: Tensor, n: int) -> Tensor:
    out = src.new_zeros((n, src.shape[1]))
    if src.device.type == "cuda":
        return out.index_put_((index,), src, accumulate=True)  # sorts: no atomics
    return out.index_add_(0, index, src)  # on CPUs: one thread a row, in the order of src


def _accumulate_fake(src: Tensor, index: Tensor, n: Any) -> Tensor:
    return src.new_empty((n, src.shape[1]))


def _take(src: Tensor, index: Tensor) -> Tensor:
    return src.index_select(0, index)


def _take_fake(src: Tensor, index: Tensor) -> Tensor:
    return src.new_empty((index.shape[0], src.shape[1]))


def _class_sums(x: Tensor, index: Tensor) -> Tensor:
    """[N, D]: the sum of the rows of the class of each row."""
    return _accumulate(x, index, x.shape[0]).index_select(0, index)


def _class_dots(z: Tensor, index: Tensor) -> Tensor:
    wide = z.to(accumulation_dtype(z.dtype))
    return _class_sums(wide, index).sub_(wide).mul_(wide).sum(1)


def _class_dots_fake(z: Tensor, index: Tensor) -> Tensor:
    return z.new_empty((z.shape[0],), dtype=accumulation_dtype(z.dtype))


def _class_dots_backward(z: Tensor, index: Tensor, dout: Tensor) -> Tensor:
    # Row k is in its own term and in those of its class: g_k (S_k - z_k) + sum of g_j z_j over the others.
    wide, g = z.to(accumulation_dtype(z.dtype)), dout[:, None]
    dz = _class_sums(wide, index).sub_(wide).mul_(g)
    weighted = wide * g
    dz.sub_(weighted).add_(_class_sums(weighted, index))
    return dz.to(z.dtype)


def _class_dots_backward_fake(z: Tensor, index: Tensor, dout: Tensor) -> Tensor:
    return torch.empty_like(z, memory_format=torch.contiguous_format)


class _ClassDots(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, index: Tensor) -> Any:
        ctx.save_for_backward(z, index)
        with below_autograd():
            return torch.ops.sslkernels.class_dots.default(z, index)

    @staticmethod
    @once_differentiable("sslkernels::class_dots")
    def backward(ctx: Any, dout: Tensor) -> Any:
        with below_autograd():
            dz = torch.ops.sslkernels.class_dots_backward.default(*ctx.saved_tensors, dout)
        return dz, None


class _Accumulate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, src: Tensor, index: Tensor, n: Any) -> Any:
        ctx.save_for_backward(index)
        with below_autograd():
            return torch.ops.sslkernels.accumulate_rows.default(src, index, n)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> Any:
        return torch.ops.sslkernels.take_rows.default(dout, *ctx.saved_tensors), None, None


class _Take(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, src: Tensor, index: Tensor) -> Any:
        ctx.n = src.shape[0]
        ctx.save_for_backward(index)
        with below_autograd():
            return torch.ops.sslkernels.take_rows.default(src, index)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> Any:
        return torch.ops.sslkernels.accumulate_rows.default(dout, *ctx.saved_tensors, ctx.n), None


def _accumulate_autograd(src: Tensor, index: Tensor, n: Any) -> Any:
    if needs_grad(src):
        return _Accumulate.apply(src, index, n)
    with below_autograd():
        return torch.ops.sslkernels.accumulate_rows.default(src, index, n)


def _take_autograd(src: Tensor, index: Tensor) -> Any:
    if needs_grad(src):
        return _Take.apply(src, index)
    with below_autograd():
        return torch.ops.sslkernels.take_rows.default(src, index)


def _class_dots_autograd(z: Tensor, index: Tensor) -> Any:
    if needs_grad(z):
        return _ClassDots.apply(z, index)
    with below_autograd():
        return torch.ops.sslkernels.class_dots.default(z, index)


for _name, _kernel, _fake, _autograd in (
    ("accumulate_rows", _accumulate, _accumulate_fake, _accumulate_autograd),
    ("take_rows", _take, _take_fake, _take_autograd),
    ("class_dots", _class_dots, _class_dots_fake, _class_dots_autograd),
):
    LIB.impl(_name, _kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"sslkernels::{_name}", _fake, lib=LIB)
    LIB.impl(_name, _autograd, "Autograd")
LIB.impl("class_dots_backward", _class_dots_backward, "CompositeExplicitAutograd")
torch.library.register_fake("sslkernels::class_dots_backward", _class_dots_backward_fake, lib=LIB)


def accumulate_rows(src: Tensor, index: Tensor, n: int) -> Tensor:
    """[n, D]: out[index[i]] += src[i], in a fixed order.

    Args:
        src: [N, D].
        index: [N] int64 in [0, n).
        n: Rows of the result.
    """
    out: Tensor = torch.ops.sslkernels.accumulate_rows.default(src, index, n)
    return out


def take_rows(src: Tensor, index: Tensor) -> Tensor:
    """[len(index), D]: src[index], whose gradient is accumulated in a fixed order.

    Args:
        src: [N, D].
        index: [M] int64 in [0, N).
    """
    out: Tensor = torch.ops.sslkernels.take_rows.default(src, index)
    return out


def class_dots(z: Tensor, index: Tensor) -> Tensor:
    """[N]: sum of <z_i, z_j> over the other rows j of the class of i; O(N * D), differentiable once.

    Args:
        z: [N, D].
        index: [N] int64 in [0, N): the class of each row.
    """
    out: Tensor = torch.ops.sslkernels.class_dots.default(z, index)
    return out


def segments(ids: Tensor) -> Tensor:
    """[N] int64 in [0, N): equal ids get equal numbers, without the host sync of ``torch.unique``.

    Args:
        ids: [N], any integer dtype.
    """
    ordered, order = ids.sort(stable=True)
    steps = torch.zeros_like(ordered, dtype=torch.int64)
    steps[1:] = ordered[1:] != ordered[:-1]
    return torch.empty_like(steps).scatter_(0, order, steps.cumsum(0))
