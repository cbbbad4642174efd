# SPDX-License-Identifier: Apache-2.0
"""Reparameterisation as one torch op, ``reparameterize``: z = mean + exp(log_variance / 2) eps(seed).

The noise comes from a counter-based generator (``backends/autoencoders_torch.normal_noise``): backward
draws it again and nothing is stored but the log-variances, which autograd keeps anyway.  The seed is a
tensor, so that a device reads it without a wait, and autograd notices when it is written in between.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from sslkernels.ops import registry
from sslkernels.ops._library import Gradient, Op


def _forward(mean: Tensor, log_variance: Tensor, seed: Tensor) -> Tensor:
    z: Tensor = registry.resolve(mean.device).reparameterize(mean, log_variance, seed)
    return z


def _backward(log_variance: Tensor, seed: Tensor, dz: Tensor) -> Tensor:
    backend = registry.resolve(log_variance.device)
    out: Tensor = backend.reparameterize_backward(log_variance, seed, dz)
    return out


BACKWARD = Op(
    "reparameterize_backward(Tensor log_variance, Tensor seed, Tensor dz) -> Tensor",
    _backward,
    lambda log_variance, seed, dz: log_variance.new_empty(log_variance.shape),
)


def _gradient(
    log_variance: Tensor, seed: Tensor, dz: Tensor, dmean: bool, dlog_variance: bool, *_: Any
) -> dict[str, Tensor]:
    found = {"mean": dz}
    if dlog_variance:
        found["log_variance"] = BACKWARD.below(log_variance, seed, dz)
    return found


def _tangent(
    log_variance: Tensor, seed: Tensor, dmean: Tensor | None, dlog_variance: Tensor | None, *_: Any
) -> tuple[Tensor]:
    out = log_variance.new_zeros(log_variance.shape) if dmean is None else dmean
    if dlog_variance is not None:  # elementwise: the transposed of a diagonal is itself
        out = out + BACKWARD.below(log_variance, seed, dlog_variance)
    return (out,)


REPARAMETERIZE = Op(
    "reparameterize(Tensor mean, Tensor log_variance, Tensor seed) -> Tensor",
    _forward,
    lambda mean, log_variance, seed: mean.new_empty(mean.shape),
    gradient=Gradient(
        ("mean", "log_variance"),
        ("out",),
        lambda mean, log_variance, seed, out: (log_variance, seed),
        _gradient,
        _tangent,
    ),
)
