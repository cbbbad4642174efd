# SPDX-License-Identifier: Apache-2.0
"""Gather rows and accumulate them, as torch ops: ``take_rows`` and ``accumulate_rows``.

Deterministic: torch's own pair (index_select, index_add) uses atomics in one of its directions on
every device.  And lean, like what else is done with rows (``unit.py``, ``triplet_hard.py``): composed from
torch's ops, the gradients of these small things would be alive side by side, each as large as the
input, and take more memory than the tiles.  Each is one op that keeps vectors only and works in
chunks of rows.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from sslkernels.backends.arithmetic import accumulation_dtype
from sslkernels.ops._library import Gradient, Op

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


def accumulate_rows_(out: Tensor, index: Tensor, src: Tensor) -> Tensor:
    """out[index[i]] += src[i] in a fixed order, in place; not differentiable."""
    if src.device.type == "cuda":
        return out.index_put_((index,), src, accumulate=True)  # sorts: no atomics
    return out.index_add_(0, index, src)  # on CPUs: one thread a row, in the order of src


def _accumulate(src: Tensor, index: Tensor, n: int) -> Tensor:
    return accumulate_rows_(src.new_zeros((n, src.shape[1])), index, src)


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
            accumulate_rows_(sums, index[c], z[c] * g[c, None] if weights_inside else z[c])
        for c in chunks(z):
            others, own = sums.index_select(0, index[c]), z[c]
            if weights_inside:
                dz[c].add_(others.sub_(own * g[c, None]))
            else:
                dz[c].add_(others.sub_(own).mul_(g[c, None]))


ACCUMULATE: Op = Op(
    "accumulate_rows(Tensor src, Tensor index, SymInt n) -> Tensor",
    _accumulate,
    lambda src, index, n: src.new_empty((n, src.shape[1])),
    gradient=Gradient(
        ("src",),
        ("out",),
        lambda src, index, n, out: (index,),
        lambda index, dout, *_: {"src": TAKE(dout, index)},
        lambda index, dsrc, _, n: (ACCUMULATE(dsrc, index, n),),
        twice=True,
    ),
)
TAKE: Op = Op(
    "take_rows(Tensor src, Tensor index) -> Tensor",
    lambda src, index: src.index_select(0, index),
    lambda src, index: src.new_empty((index.shape[0], src.shape[1])),
    gradient=Gradient(
        ("src",),
        ("out",),
        lambda src, index, out: (index, src.shape[0]),
        lambda index, n, dout, *_: {"src": ACCUMULATE(dout, index, n)},
        lambda index, n, dsrc, _: (TAKE(dsrc, index),),
        twice=True,
    ),
)


def accumulate_rows(src: Tensor, index: Tensor, n: int) -> Tensor:
    """[n, D]: out[index[i]] += src[i], in a fixed order.

    Args:
        src: [N, D].
        index: [N] int64 in [0, n).
        n: Rows of the result.
    """
    out: Tensor = ACCUMULATE(src, index, n)
    return out


def take_rows(src: Tensor, index: Tensor) -> Tensor:
    """[len(index), D]: src[index], whose gradient is accumulated in a fixed order.

    Args:
        src: [N, D].
        index: [M] int64 in [0, N).
    """
    out: Tensor = TAKE(src, index)
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
