# SPDX-License-Identifier: Apache-2.0
"""What is done with rows besides tiles: normalise, gather, accumulate and subtract them.

Deterministic: torch's own pair (index_select, index_add) uses atomics in one of its directions on
every device.  And lean: composed from torch's ops, the gradients of these small things would be alive
side by side, each as large as the input, and take more memory than the tiles.  Here each is one op
that keeps vectors only and works in chunks of rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from sslkernels.backends.chunked import accumulation_dtype
from sslkernels.ops import normalization, registry
from sslkernels.ops._library import (
    below_autograd,
    define,
    implement,
    once_differentiable,
)
from sslkernels.ops.normalization import EPS

define("accumulate_rows(Tensor src, Tensor index, SymInt n) -> Tensor")
define("take_rows(Tensor src, Tensor index) -> Tensor")
define("unit_rows(Tensor x) -> (Tensor, Tensor)")
define("unit_rows_backward(Tensor x, Tensor norm, Tensor dy) -> Tensor")
define("two_distances(Tensor z, Tensor first, Tensor second, bool cosine) -> (Tensor, Tensor)")
define(
    "two_distances_backward(Tensor z, Tensor first, Tensor second, bool cosine, Tensor d_first, "
    "Tensor d_second, Tensor? g_first, Tensor? g_second) -> Tensor"
)

# Elements of a chunk: on CPUs temporaries stay in the cache, on GPUs launches stay few.
CPU_CHUNK, GPU_CHUNK = 1 << 17, 1 << 22


def chunks(x: Tensor) -> Iterator[slice]:
    """Slices over the rows of x [N, D]; they do not depend on the number of threads."""
    n, d = x.shape
    height = max(1, (CPU_CHUNK if x.device.type == "cpu" else GPU_CHUNK) // max(1, d))
    for start in range(0, n, height):
        yield slice(start, min(n, start + height))


def dots(a: Tensor, b: Tensor) -> Tensor:
    """[N]: <a_i, b_i> in the accumulation dtype; not differentiable."""
    acc = accumulation_dtype(a.dtype)
    out = a.new_empty(a.shape[0], dtype=acc)
    for c in chunks(a):
        out[c] = (a[c].to(acc) * b[c].to(acc)).sum(1)
    return out


def _accumulate_(out: Tensor, index: Tensor, src: Tensor) -> Tensor:
    if src.device.type == "cuda":
        return out.index_put_((index,), src, accumulate=True)  # sorts: no atomics
    return out.index_add_(0, index, src)  # on CPUs: one thread a row, in the order of src


def _accumulate(src: Tensor, index: Tensor, n: int) -> Tensor:
    return _accumulate_(src.new_zeros((n, src.shape[1])), index, src)


def _accumulate_fake(src: Tensor, index: Tensor, n: Any) -> Tensor:
    return src.new_empty((n, src.shape[1]))


def _take(src: Tensor, index: Tensor) -> Tensor:
    return src.index_select(0, index)


def _take_fake(src: Tensor, index: Tensor) -> Tensor:
    return src.new_empty((index.shape[0], src.shape[1]))


def class_dots(z: Tensor, index: Tensor) -> Tensor:
    """[N]: sum of <z_i, z_j> over the other rows j of the class of i; not differentiable.

    Args:
        z: [N, D], accumulation dtype.
        index: [N] int64 in [0, N): the class of each row.
    """
    sums = _accumulate(z, index, z.shape[0])
    out = z.new_empty(z.shape[0])
    for c in chunks(z):
        out[c] = sums.index_select(0, index[c]).sub_(z[c]).mul_(z[c]).sum(1)
    return out


def add_class_dots_gradient_(dz: Tensor, z: Tensor, index: Tensor, g: Tensor) -> None:
    """dz += the gradient of ``class_dots``, with g [N] that of its result.

    Row k is in its own term and in those of its class:
    g_k (S_k - z_k) + sum of g_j z_j over the others.
    """
    for weights_inside in (False, True):
        sums = torch.zeros_like(z, memory_format=torch.contiguous_format)
        for c in chunks(z):
            _accumulate_(sums, index[c], z[c] * g[c, None] if weights_inside else z[c])
        for c in chunks(z):
            others, own = sums.index_select(0, index[c]), z[c]
            if weights_inside:
                dz[c] += others.sub_(own * g[c, None])
            else:
                dz[c] += others.sub_(own).mul_(g[c, None])


def _unit_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    _, unit, norm = normalization.unit_rows(registry.resolve(x.device), x)
    return unit, norm


def _unit_rows_fake(x: Tensor) -> tuple[Tensor, Tensor]:
    y = x.new_empty(x.shape, dtype=normalization.operand_dtype(x))
    return y, x.new_empty((x.shape[0],), dtype=accumulation_dtype(x.dtype))


def _unit_rows_backward(x: Tensor, norm: Tensor, dy: Tensor) -> Tensor:
    kernel = normalization.row_kernel(registry.resolve(x.device), "normalize_rows_backward", x)
    if kernel is not None:
        by_kernel: Tensor = kernel(dy, x, norm, EPS)
        return by_kernel
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    for c in chunks(x):
        unit = normalization.divide(x[c], norm[c])
        dx[c] = normalization.project(unit, norm[c], dy[c].to(norm.dtype))
    return dx


def _unit_rows_backward_fake(x: Tensor, norm: Tensor, dy: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _two_distances(z: Tensor, first: Tensor, second: Tensor, cosine: bool) -> tuple[Tensor, Tensor]:
    acc = accumulation_dtype(z.dtype)
    d_first, d_second = (z.new_empty(z.shape[0], dtype=acc) for _ in range(2))
    for c in chunks(z):
        own = z[c].to(acc)
        for out, index in ((d_first, first), (d_second, second)):
            other = z.index_select(0, index[c]).to(acc)
            if cosine:
                out[c] = 1 - other.mul_(own).sum(1)
            else:
                out[c] = torch.linalg.vector_norm(other.sub_(own), dim=1)
    return d_first, d_second


def _two_distances_fake(
    z: Tensor, first: Tensor, second: Tensor, cosine: bool
) -> tuple[Tensor, Tensor]:
    out = z.new_empty((z.shape[0],), dtype=accumulation_dtype(z.dtype))
    return out, torch.empty_like(out)


def _two_distances_backward(
    z: Tensor, first: Tensor, second: Tensor, cosine: bool, d_first: Tensor, d_second: Tensor,
    g_first: Tensor | None, g_second: Tensor | None,
) -> Tensor:  # fmt: skip
    acc = accumulation_dtype(z.dtype)
    dz = torch.zeros_like(z, dtype=acc, memory_format=torch.contiguous_format)
    for index, d, g in ((first, d_first, g_first), (second, d_second, g_second)):
        if g is None:
            continue
        for c in chunks(z):
            own, other = z[c].to(acc), z.index_select(0, index[c]).to(acc)
            if cosine:
                weight = -g[c, None]
                dz[c] += other.mul_(weight)
                _accumulate_(dz, index[c], own * weight)
            else:
                weight = torch.where(d[c] == 0, 0.0, g[c] / d[c])[:, None]
                away = other.sub_(own).mul_(weight)
                dz[c] -= away
                _accumulate_(dz, index[c], away)
    return dz.to(z.dtype)


def _two_distances_backward_fake(
    z: Tensor, first: Tensor, second: Tensor, cosine: bool, d_first: Tensor, d_second: Tensor,
    g_first: Tensor | None, g_second: Tensor | None,
) -> Tensor:  # fmt: skip
    return torch.empty_like(z, memory_format=torch.contiguous_format)


class _UnitRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Any:
        with below_autograd():
            y, norm = torch.ops.sslkernels.unit_rows.default(x)
        ctx.backend = registry.override()
        ctx.save_for_backward(x, norm)
        ctx.mark_non_differentiable(norm)
        ctx.set_materialize_grads(False)
        return y, norm

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, _: Any) -> Any:
        if dy is None:
            return None
        x, norm = ctx.saved_tensors
        if not torch.is_grad_enabled():
            with below_autograd(), registry.backend(ctx.backend):
                return torch.ops.sslkernels.unit_rows_backward.default(x, norm, dy)
        # With torch's own ops, for second derivatives: it is the loss that has none, or has them.
        norm = torch.linalg.vector_norm(x.to(norm.dtype), dim=1)
        unit = normalization.divide(x, norm)
        return normalization.project(unit, norm, dy.to(norm.dtype)).to(x.dtype)


class _TwoDistances(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, first: Tensor, second: Tensor, cosine: bool) -> Any:
        with below_autograd():
            d = torch.ops.sslkernels.two_distances.default(z, first, second, cosine)
        ctx.cosine = cosine
        ctx.save_for_backward(z, first, second, *d)
        ctx.set_materialize_grads(False)
        return d

    @staticmethod
    @once_differentiable("sslkernels::two_distances")
    def backward(ctx: Any, g_first: Tensor | None, g_second: Tensor | None) -> Any:
        z, first, second, *d = ctx.saved_tensors
        with below_autograd():
            dz = torch.ops.sslkernels.two_distances_backward.default(
                z, first, second, ctx.cosine, *d, g_first, g_second
            )
        return dz, None, None, None


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


implement("accumulate_rows", _accumulate, _accumulate_fake, _Accumulate.apply, inputs=(0,))
implement("take_rows", _take, _take_fake, _Take.apply, inputs=(0,))
implement("unit_rows", _unit_rows, _unit_rows_fake, _UnitRows.apply, inputs=(0,))
implement("unit_rows_backward", _unit_rows_backward, _unit_rows_backward_fake)
implement("two_distances", _two_distances, _two_distances_fake, _TwoDistances.apply, inputs=(0,))
implement("two_distances_backward", _two_distances_backward, _two_distances_backward_fake)


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


def unit_rows(x: Tensor) -> Tensor:
    """[N, D]: x / max(|x|, 1e-12) by rows, differentiable twice.

    Halves are normalised in float32: in float16 the 1e-12 would be 0 and a zero row NaN.  The result
    has the accumulation dtype on CPUs; on GPUs halves are halves again, for the tensor cores.

    Args:
        x: [N, D], any floating dtype.
    """
    out: Tensor = torch.ops.sslkernels.unit_rows.default(x)[0]
    return out


def two_distances(
    z: Tensor, first: Tensor, second: Tensor, *, cosine: bool
) -> tuple[Tensor, Tensor]:
    """Distances of row i from rows first[i] and second[i], [N] each, differentiable once.

    Computed from the two rows: no cancellation.  Equal rows have distance 0 and gradient 0.

    Args:
        z: [N, D]; for ``cosine`` normalised.
        first: [N] int64 in [0, N).
        second: The same.
        cosine: 1 - <x, y> instead of the Euclidean distance.
    """
    d_first, d_second = torch.ops.sslkernels.two_distances.default(z, first, second, cosine)
    return d_first, d_second


def segments(ids: Tensor) -> Tensor:
    """[N] int64 in [0, N): equal ids get equal numbers, without the host sync of ``torch.unique``.

    Args:
        ids: [N], any integer dtype.
    """
    ordered, order = ids.sort(stable=True)
    steps = torch.zeros_like(ordered, dtype=torch.int64)
    steps[1:] = ordered[1:] != ordered[:-1]
    return torch.empty_like(steps).scatter_(0, order, steps.cumsum(0))
