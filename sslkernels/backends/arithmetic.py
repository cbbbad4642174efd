# SPDX-License-Identifier: Apache-2.0
"""What every backend and op agrees on: accumulation dtypes, sums of a fixed order, heights of blocks."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

NEG_INF = float("-inf")
# Elements of a block of S.  The floor amortises Python's overhead for small operands (1 MB of
# float32), the ceiling keeps a block in the outer cache (8 MB).
MIN_BLOCK = 1 << 18
MAX_BLOCK = 1 << 21


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def widest(*tensors: Tensor) -> torch.dtype:
    """The dtype that holds all of them; bfloat16 with float16 is float32."""
    dtype = tensors[0].dtype
    for x in tensors:
        dtype = torch.promote_types(dtype, x.dtype)
    return dtype


def fixed_sum(x: Tensor) -> Tensor:
    """Sum of a vector, in an order that does not depend on the number of threads.

    torch splits a full reduction over threads from 32768 elements on; below that, and over one
    dimension of a matrix, every sum is made by one thread in one order.
    """
    if x.numel() < 32768:
        return x.sum()
    return torch.nn.functional.pad(x, (0, -x.numel() % 1024)).view(-1, 1024).sum(1).sum()


def row_blocks(n: int, m: int, d: int) -> Iterator[slice]:
    """Slices over n rows, so that a block of rows x m elements stays O((n + m) * d)."""
    elements = max(MIN_BLOCK, min(MAX_BLOCK, (n + m) * d))
    height = max(1, elements // max(1, m))
    for start in range(0, n, height):
        yield slice(start, min(n, start + height))


def finite(lse: Tensor) -> Tensor:
    """An lse to subtract: where nothing was allowed (-inf), any number gives exp(-inf) = 0."""
    return lse.masked_fill(lse == NEG_INF, 0.0)
