# SPDX-License-Identifier: Apache-2.0
"""How a representation is doing: accuracy of the pretext task, alignment, uniformity, collapse.

All functions return tensors without gradient and without a host sync, in O(N * D) memory.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sslkernels import functional
from sslkernels.backends.arithmetic import accumulation_dtype
from sslkernels.backends.interface import Thresholds, Tiles
from sslkernels.functional import _checks as checks
from sslkernels.ops import heads
from sslkernels.ops._library import no_autocast
from sslkernels.ops.pairwise import pairwise


@torch.no_grad()
def contrastive_accuracy(
    query: Tensor, key: Tensor, ks: Sequence[int] = (1, 5), *, normalize: bool = True
) -> tuple[Tensor, ...]:
    """Top-k accuracy of finding key i from query i among all keys.

    Query i counts for k when fewer than k other keys are strictly more similar than its own.

    Args:
        query: [N, D].
        key: [N, D], same device; dtypes may differ.
        ks: The k of top-k, integers of at least 1.
        normalize: Whether to divide rows by max(norm, 1e-12) first (cosine similarity).

    Returns:
        One 0-d tensor for each k; 0 for no rows.

    Raises:
        TypeError: If an argument has a wrong type or dtype.
        ValueError: If shapes or devices differ, or a k is below 1.
    """
    op = "contrastive_accuracy"
    checks.check_pair(op, "query", query, "key", key)
    query, key = checks.widen(query, key)
    ks = [checks.integer(op, f"ks[{i}]", k, 1) for i, k in enumerate(ks)]
    normalize = checks.flag(op, "normalize", normalize)
    q, k = heads.unit(query, normalize), heads.unit(key, normalize)
    ids = torch.arange(len(q), device=q.device)
    own = heads.dots(q, k)
    tiles = Tiles(q, k, own.new_ones(()), None, ids, ids)
    rank = pairwise("lse", tiles, above=Thresholds(own)).rank_row
    return tuple(heads.reduce((rank < top).to(own.dtype), "mean") for top in ks)


@torch.no_grad()
def alignment(z1: Tensor, z2: Tensor, alpha: float = 2.0, *, normalize: bool = True) -> Tensor:
    """Mean ||z1_i - z2_i||^alpha: low when views of a sample agree; see ``alignment_loss``."""
    return functional.alignment_loss(z1, z2, alpha, normalize=normalize)


@torch.no_grad()
def uniformity(z: Tensor, t: float = 2.0, *, normalize: bool = True) -> Tensor:
    """Log mean exp(-t ||z_i - z_j||^2): 0 when all rows are equal; see ``uniformity_loss``."""
    return functional.uniformity_loss(z, t, normalize=normalize)


@torch.no_grad()
def feature_std(z: Tensor, *, normalize: bool = True) -> Tensor:
    """Mean over features of the standard deviation over rows.

    Of normalised rows it is 0 after a collapse to one point and about 1 / sqrt(D) when they are
    spread over the sphere (SimSiam, arXiv:2011.10566, section 4.1).

    Args:
        z: [N, D].
        normalize: Whether to divide rows by max(norm, 1e-12) first.

    Returns:
        A 0-d tensor; 0 for no rows.  The deviation is the population's (divided by N).
    """
    checks.check_matrix("feature_std", "z", z)
    normalize = checks.flag("feature_std", "normalize", normalize)
    z = heads.unit(z, normalize).to(accumulation_dtype(z.dtype))
    if not z.numel():
        return z.new_zeros(())
    return (z - z.mean(0)).square().mean(0).sqrt().mean()


@torch.no_grad()
def effective_rank(z: Tensor, *, center: bool = True) -> Tensor:
    """The exponential of the entropy of the normalised singular values: dimensions in use.

    Between 1 (a line) and min(N, D); 0 when z (centred) is zero.  The singular values are the
    square roots of the eigenvalues of the D x D matrix of second moments: O(N D^2 + D^3) time.

    Args:
        z: [N, D], rows as they are.
        center: Whether to subtract the mean row first (RankMe, arXiv:2210.02885, does not).

    Returns:
        A 0-d tensor.

    Reference:
        Roy and Vetterli, The effective rank, EUSIPCO 2007.
    """
    checks.check_matrix("effective_rank", "z", z)
    center = checks.flag("effective_rank", "center", center)
    acc = accumulation_dtype(z.dtype)
    if not z.numel():
        return torch.zeros((), dtype=acc, device=z.device)
    # Squaring halves the digits: float64 keeps singular values down to 1e-8 of the largest.
    wide = z.to(acc if z.device.type == "mps" else torch.float64)
    if center:
        wide = wide - wide.mean(0)
    with no_autocast(z.device):
        eigenvalues = torch.linalg.eigvalsh(wide.T @ wide)
    floor = eigenvalues[-1] * torch.finfo(wide.dtype).eps * max(z.shape)
    singular = torch.where(eigenvalues > floor, eigenvalues, 0.0).sqrt()
    total = singular.sum()
    share = singular / torch.where(total > 0, total, 1.0)
    return torch.where(total > 0, torch.special.entr(share).sum().exp(), 0.0).to(acc)
