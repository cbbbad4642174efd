# SPDX-License-Identifier: Apache-2.0
"""The part of ``sslkernels.reference`` that is about autoencoders and adversaries."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from sslkernels._reference_arithmetic import _acc, _reduce, _widen

__all__ = [
    "adversarial_loss",
    "beta_schedule",
    "feature_reconstruction_loss",
    "gradient_penalty",
    "normal_noise",
    "r1_penalty",
    "reparameterize",
    "vae_loss",
]

MASK32 = 0xFFFFFFFF

# ------------------------------------------------------------------------------ autoencoders


def vae_loss(
    reconstruction: Tensor,
    x: Tensor,
    mean: Tensor,
    log_variance: Tensor,
    *,
    likelihood: str = "bernoulli",
    x_log_variance: float | Tensor = 0.0,
    beta: float | Tensor = 1.0,
    free_bits: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """Negative evidence lower bound by samples (arXiv:1312.6114)."""
    r, x, m, v = _widen(reconstruction, x, mean, log_variance)
    if likelihood == "bernoulli":
        nll = F.softplus(r) - x * r
    else:
        s = torch.as_tensor(x_log_variance, dtype=r.dtype)
        nll = ((r - x).square() * torch.exp(-s) + s + math.log(2 * math.pi)) / 2
    kl = (m.square() + v.exp() - 1 - v) / 2
    if free_bits:
        kl = torch.where(kl.mean(0) > free_bits, kl, free_bits)
    return _reduce(nll.flatten(1).sum(1) + beta * kl.sum(1), reduction)


def reparameterize(mean: Tensor, log_variance: Tensor, seed: int) -> Tensor:
    """Mean + exp(log_variance / 2) eps(seed) (arXiv:1312.6114), for a seed of at most 63 bits."""
    mean, log_variance = _widen(mean, log_variance)
    eps = normal_noise(mean.numel(), seed).to(mean).view(mean.shape)
    return mean + (log_variance / 2).exp() * eps


def normal_noise(n: int, seed: int) -> Tensor:
    """[n] float64: Philox4x32-10 and Box-Muller in Python's integers and floats."""
    out = []
    for group in range(-(-n // 4)):
        c, k = [group & MASK32, group >> 32, 0, 0x72657061], [seed & MASK32, seed >> 32 & MASK32]
        for _ in range(10):
            a, b = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
            c = [(b >> 32) ^ c[1] ^ k[0], b & MASK32, (a >> 32) ^ c[3] ^ k[1], a & MASK32]
            k = [(k[0] + 0x9E3779B9) & MASK32, (k[1] + 0xBB67AE85) & MASK32]
        u = [(word + 0.5) / 2**32 for word in c]
        for i in (0, 2):
            radius, angle = math.sqrt(-2 * math.log(u[i])), 2 * math.pi * u[i + 1]
            out += [radius * math.cos(angle), radius * math.sin(angle)]
    return torch.tensor(out[:n], dtype=torch.float64)


def feature_reconstruction_loss(
    features: Tensor | Sequence[Tensor],
    targets: Tensor | Sequence[Tensor],
    *,
    weights: Sequence[float] | Tensor | None = None,
    distance: str = "squared",
    beta: float = 1.0,
    normalize: str | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Maps against maps (arXiv:1603.08155, 2202.03555)."""
    maps = [features] if isinstance(features, Tensor) else list(features)
    wanted = [targets] if isinstance(targets, Tensor) else list(targets)
    total: Tensor | float = 0.0
    for i, (f, t) in enumerate(zip(maps, wanted, strict=True)):
        f, t = _widen(f, t.detach())
        if normalize == "channels":
            f, t = F.normalize(f, dim=1, eps=1e-12), F.normalize(t, dim=1, eps=1e-12)
        elif normalize == "targets" and t.numel():
            t = F.layer_norm(t, t.shape[-1:])
        if distance == "squared":
            rho = (f - t).square()
        else:
            rho = F.smooth_l1_loss(f, t, beta=beta, reduction="none")
        each = rho.flatten(1).sum(1) / max(1, math.prod(f.shape[1:]))
        total = total + (each if weights is None else weights[i] * each)
    return _reduce(torch.as_tensor(total), reduction)


# ------------------------------------------------------------------------------- adversarial


def adversarial_loss(
    fake: Tensor,
    real: Tensor | None = None,
    *,
    form: str = "non_saturating",
    reduction: str = "mean",
) -> Tensor:
    """Of the discriminator, or without ``real`` of the generator (arXiv:1406.2661 and others)."""
    f = _acc(fake)
    if real is None:
        loss = {
            "non_saturating": lambda: -F.logsigmoid(f),
            "minimax": lambda: F.logsigmoid(-f),
            "least_squares": lambda: (f - 1) ** 2 / 2,
        }.get(form, lambda: -f)()
    else:
        f, r = _widen(fake, real)
        loss = {
            "hinge": lambda: F.relu(1 - r) + F.relu(1 + f),
            "least_squares": lambda: ((r - 1) ** 2 + f**2) / 2,
            "wasserstein": lambda: f - r,
        }.get(form, lambda: -F.logsigmoid(r) - F.logsigmoid(-f))()
    if loss.ndim > 1:
        loss = loss.flatten(1).sum(1) / max(1, math.prod(loss.shape[1:]))
    return _reduce(loss, reduction)


def gradient_penalty(
    discriminator: Callable[[Tensor], Tensor],
    real: Tensor,
    fake: Tensor,
    *,
    mix: Tensor,
    weight: float = 10.0,
    target: float = 1.0,
    reduction: str = "mean",
) -> Tensor:
    """Weight * (|grad D(x)| - target)^2 between real and generated samples (arXiv:1704.00028)."""
    share = mix.view(-1, *(1 for _ in real.shape[1:]))
    x = (share * real + (1 - share) * fake).detach().requires_grad_()
    (gradient,) = torch.autograd.grad(discriminator(x).sum(), x, create_graph=True)
    norm = torch.linalg.vector_norm(gradient.flatten(1), dim=1)
    return _reduce(weight * (norm - target) ** 2, reduction)


def r1_penalty(
    discriminator: Callable[[Tensor], Tensor],
    real: Tensor,
    *,
    weight: float = 10.0,
    reduction: str = "mean",
) -> Tensor:
    """Weight / 2 * |grad D(x)|^2 at the data (arXiv:1801.04406)."""
    x = real.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(discriminator(x).sum(), x, create_graph=True)
    return _reduce(weight / 2 * gradient.flatten(1).square().sum(1), reduction)


def beta_schedule(
    total_steps: int,
    final: float = 1.0,
    *,
    start: float = 0.0,
    cycles: int = 1,
    warm_up: float = 0.5,
) -> Callable[[int], float]:
    """Weight of the KL term: linear warm-up in each of the cycles (arXiv:1903.10145)."""

    def beta(step: int) -> float:
        along = step / total_steps * cycles - math.floor(step / total_steps * cycles)
        return final if step >= total_steps else start + (final - start) * min(1, along / warm_up)

    return beta
