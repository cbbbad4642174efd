# SPDX-License-Identifier: Apache-2.0
"""Variational and feature reconstruction losses in plain torch, in blocks: any device, any dtype.

The readable twin of ``csrc/cpu/vae.cpp``, ``noise.cpp`` and ``features.cpp``; see
``interface.Autoencoders``.  The random words are those of every other backend, bit for bit; logarithm,
sine and cosine are torch's and differ from other backends by rounding.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from sslkernels.backends import arithmetic
from sslkernels.backends.arithmetic import accumulation_dtype, widest
from sslkernels.backends.interface import Vae, VaeGradients, VaeTerms, VaeWanted
from sslkernels.backends.rounding import philox

STREAM = 0x72657061  # fourth word of the counter, where averages have the number of a tensor


def _blocks(n: int, width: int) -> Iterator[slice]:
    """Rows of which a block has at most MIN_BLOCK elements."""
    height = max(1, arithmetic.MIN_BLOCK // max(1, width))
    for start in range(0, n, height):
        yield slice(start, min(n, start + height))


def vae_forward(problem: Vae) -> VaeTerms:
    """See :meth:`sslkernels.backends.interface.Autoencoders.vae_forward`."""
    reconstruction, x, spread, mean, log_variance, weights, likelihood = problem
    acc, n = problem.acc, problem.n
    rec, kl = (torch.empty(n, dtype=acc, device=x.device) for _ in range(2))
    for rows in _blocks(n, max(x.shape[1], mean.shape[1])):
        r, t = reconstruction[rows].to(acc), x[rows].to(acc)
        if likelihood == "bernoulli":
            # For x of 0 and 1 the first two terms are exactly 0 where the logit is right.
            term = r.clamp(min=0) - t * r + F.softplus(-r.abs(), threshold=40.0)
        else:
            term = (r - t).square()
            if spread is not None:
                s = spread[rows].to(acc)
                term = term * (-s).exp() + s
            term = term * 0.5
        rec[rows] = term.sum(1)
        m, v = mean[rows].to(acc), log_variance[rows].to(acc)
        each = 0.5 * (m * m + (v.expm1() - v))
        kl[rows] = (each if weights is None else each * weights).sum(1)
    return VaeTerms(rec, kl)


def vae_backward(problem: Vae, drec: Tensor, dkl: Tensor, wanted: VaeWanted) -> VaeGradients:
    """See :meth:`sslkernels.backends.interface.Autoencoders.vae_backward`."""
    reconstruction, x, spread, mean, log_variance, weights, likelihood = problem
    acc = problem.acc
    out = VaeGradients(
        *(
            torch.empty(y.shape, dtype=y.dtype, device=y.device) if want and y is not None else None
            for y, want in zip(problem[:5], wanted, strict=True)
        )
    )
    for rows in _blocks(problem.n, max(x.shape[1], mean.shape[1])):
        g, h = drec[rows, None], dkl[rows, None]
        r, t = reconstruction[rows].to(acc), x[rows].to(acc)
        if likelihood == "bernoulli":
            to_r, to_x = g * (r.sigmoid() - t), -g * r
        else:
            to_r = g * (r - t)
            if spread is not None:
                inverse = (-spread[rows].to(acc)).exp()
                if out.spread is not None:
                    out.spread[rows] = (0.5 * g * (1 - (r - t).square() * inverse)).to(x.dtype)
                to_r = to_r * inverse
            to_x = -to_r
        if out.reconstruction is not None:
            out.reconstruction[rows] = to_r.to(x.dtype)
        if out.x is not None:
            out.x[rows] = to_x.to(x.dtype)
        h = h if weights is None else h * weights
        if out.mean is not None:
            out.mean[rows] = (h * mean[rows].to(acc)).to(x.dtype)
        if out.log_variance is not None:
            to_v = 0.5 * h * log_variance[rows].to(acc).expm1()
            out.log_variance[rows] = to_v.to(x.dtype)
    return out


def normal_noise(n: int, seed: Tensor, dtype: torch.dtype, first: int = 0) -> Tensor:
    """Elements first … first + n - 1 of a seed's noise; first is a multiple of 4.

    The four words w of Philox at counter (element / 4, 0, STREAM), key = seed, give two pairs of normal
    numbers, sqrt(-2 log u0) (cos, sin)(2 pi u1) with u = (w + 1/2) / 2^32 (Box and Muller 1958).

    Args:
        n: How many.
        seed: 0-d int64, of which all 64 bits count.
        dtype: float32 or float64.
        first: Number of the first element.

    Returns:
        [n] on the device of the seed.
    """
    groups = torch.arange(first // 4, (first + n + 3) // 4, dtype=torch.int64, device=seed.device)
    words = philox(groups, 0, STREAM, seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF)
    u = [w.to(dtype) * 2.0**-32 + 2.0**-33 for w in words]
    normal = []
    for radius, angle in ((u[0], u[1]), (u[2], u[3])):
        length, turn = (-2 * radius.log()).sqrt(), 2 * torch.pi * angle
        normal += [length * turn.cos(), length * turn.sin()]
    return torch.stack(normal, 1).view(-1)[:n]


def _moved(x: Tensor, log_variance: Tensor, seed: Tensor, factor: float, add: bool) -> Tensor:
    """x + exp(log_variance / 2) eps, or factor * x times that, in blocks of elements."""
    acc = accumulation_dtype(x.dtype)
    out = torch.empty(x.shape, dtype=log_variance.dtype, device=x.device)
    flat_out, x, v = out.view(-1), x.reshape(-1), log_variance.reshape(-1)
    for part in _blocks(x.numel(), 8):  # eight numbers of 64 bits an element
        eps = normal_noise(part.stop - part.start, seed, acc, part.start)
        moved = (0.5 * v[part].to(acc)).exp() * eps
        given = x[part].to(acc)
        flat_out[part] = (given + moved if add else factor * given * moved).to(out.dtype)
    return out


def reparameterize(mean: Tensor, log_variance: Tensor, seed: Tensor) -> Tensor:
    """See :meth:`sslkernels.backends.interface.Autoencoders.reparameterize`."""
    return _moved(mean, log_variance, seed, 1.0, True)


def reparameterize_backward(log_variance: Tensor, seed: Tensor, dz: Tensor) -> Tensor:
    """See :meth:`sslkernels.backends.interface.Autoencoders.reparameterize_backward`."""
    return _moved(dz, log_variance, seed, 0.5, False)


def features_forward(
    features: list[Tensor], targets: list[Tensor], smooth: bool, beta: float
) -> Tensor:
    """See :meth:`sslkernels.backends.interface.Autoencoders.features_forward`."""
    acc = accumulation_dtype(widest(*features, *targets))
    n = features[0].shape[0]
    out = torch.zeros((n, len(features)), dtype=acc, device=features[0].device)
    for i, (feature, target) in enumerate(zip(features, targets, strict=True)):
        for rows in _blocks(n, feature.shape[1]):
            gap = feature[rows].to(acc) - target[rows].to(acc)
            rho = gap.square() if not smooth else _smooth(gap, beta)
            out[rows, i] = rho.sum(1) / max(1, feature.shape[1])
    return out


def _smooth(gap: Tensor, beta: float) -> Tensor:
    size = gap.abs()
    if beta == 0:
        return size
    return torch.where(size < beta, gap * gap * (0.5 / beta), size - 0.5 * beta)


def features_backward(
    features: list[Tensor],
    targets: list[Tensor],
    smooth: bool,
    beta: float,
    dout: Tensor,
    wanted: list[bool],
) -> list[Tensor | None]:
    """See :meth:`sslkernels.backends.interface.Autoencoders.features_backward`."""
    acc = accumulation_dtype(widest(*features, *targets))
    out: list[Tensor | None] = []
    for i, (feature, target) in enumerate(zip(features, targets, strict=True)):
        if not wanted[i]:
            out.append(None)
            continue
        gradient = torch.empty(feature.shape, dtype=feature.dtype, device=feature.device)
        for rows in _blocks(feature.shape[0], feature.shape[1]):
            gap = feature[rows].to(acc) - target[rows].to(acc)
            if not smooth:
                slope = 2 * gap
            elif beta == 0:
                slope = gap.sign()
            else:
                slope = torch.where(gap.abs() < beta, gap / beta, gap.sign())
            share = dout[rows, i, None].to(acc) / max(1, feature.shape[1])
            gradient[rows] = (share * slope).to(feature.dtype)
        out.append(gradient)
    return out
