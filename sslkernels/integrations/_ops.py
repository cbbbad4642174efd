# SPDX-License-Identifier: Apache-2.0
"""The ops below the public functions that drop-ins use, in one place.

Everything here takes plain tensors and returns plain tensors.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from sslkernels.backends.chunked import accumulation_dtype
from sslkernels.ops import pairwise as _pairwise
from sslkernels.ops import queue as _queue
from sslkernels.ops import rows as _rows

__all__ = ["enqueue_", "gather_rows", "nearest", "unit"]


def unit(x: Tensor) -> Tensor:
    """Rows divided by max(norm, 1e-12), not narrower than float32."""
    return _rows.unit_rows(x.to(accumulation_dtype(x.dtype)))


def enqueue_(queue: Tensor, queue_ptr: Tensor, keys: Tensor) -> None:
    """Write keys [N, D] into the ring ``queue`` [K, D] from row ``queue_ptr`` [1] on, as they are."""
    _queue.enqueue_(queue, queue_ptr, torch.zeros_like(queue_ptr), keys, False)


def gather_rows(x: Tensor) -> Tensor:
    """The tensors of all ranks of the default group, concatenated in the order of ranks; no gradient."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return x
    x = x.detach().contiguous()
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x)
    return torch.cat(parts)


def nearest(x: Tensor, bank: Tensor) -> Tensor:
    """[N] int64: for each row of x [N, D] the row of bank [K, D] with the largest cosine."""
    with torch.no_grad():
        x, bank = unit(x), unit(bank)
        dtype = torch.promote_types(x.dtype, bank.dtype)
        x, bank = x.to(dtype), bank.to(dtype)
        # extremes has the smallest of the keys with another id: of -<x, k>.
        scale = torch.full((), -1.0, dtype=dtype, device=x.device)
        ids = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        other = torch.ones(len(bank), dtype=torch.int64, device=x.device)
        return _pairwise.extremes(x, bank, scale=scale, ids_q=ids, ids_k=other).min_other
