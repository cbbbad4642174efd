# SPDX-License-Identifier: Apache-2.0
"""Losses of autoencoders and adversaries: their inputs, their formulas in plain torch, their truth.

Sizes mean, per op: vae, vae_step, reparameterize, adversarial: N rows of D elements (pixels, codes or
logits of a patch discriminator); features: N images of four maps, D channels of 32 x 32 and three
times twice as many of half the side.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Bernoulli, Normal, kl_divergence

from sslkernels import reference
from sslkernels.backends.autoencoders_torch import normal_noise

if TYPE_CHECKING:
    from benchmarks.cases import Case

OPS = ("vae", "vae_step", "reparameterize", "features", "adversarial")
CODES = 20  # of a variational autoencoder, as in the paper
SEED = 7  # of our noise
Call = Callable[..., Tensor]


def inputs(case: Case) -> dict[str, Any]:
    """Leaves and what goes with them."""
    dtype: torch.dtype = getattr(torch, case.dtype)
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(case.device, dtype)

    def leaf(*shape: int) -> Tensor:
        return draw(*shape).requires_grad_()

    n, d = case.size, case.dim
    x: dict[str, Any]
    if case.op == "vae":
        x = {
            "leaves": [leaf(n, d), leaf(n, CODES), leaf(n, CODES)],
            "x": (draw(n, d) > 0).to(dtype),
        }
    elif case.op == "vae_step":
        weight = (draw(CODES, d) / CODES**0.5).requires_grad_()
        x = {"leaves": [leaf(n, CODES), leaf(n, CODES), weight], "x": (draw(n, d) > 0).to(dtype)}
    elif case.op == "reparameterize":
        x = {"leaves": [leaf(n, d), leaf(n, d)], "dz": draw(n, d)}
    elif case.op == "features":
        shapes = [(n, d << i, 32 >> i, 32 >> i) for i in range(4)]
        x = {"leaves": [leaf(*s) for s in shapes], "targets": [draw(*s) for s in shapes]}
    else:
        x = {"leaves": [leaf(n, d), leaf(n, d)]}
    if case.op in ("vae_step", "reparameterize"):
        mean = x["leaves"][0]
        seed = torch.tensor(SEED, device=case.device)
        x["noise"] = normal_noise(mean.numel(), seed, torch.float64).view_as(mean).to(dtype)
    return x


def bytes_moved(case: Case) -> float | None:
    """What forward and backward have to read and write, once each, in float32."""
    n, d = case.size, case.dim
    if case.op == "vae":  # forward reads, backward reads again and writes the gradient
        return 20.0 * n * d + 24.0 * n * CODES
    if case.op == "features":
        return 20.0 * n * d * (1024 + 512 + 256 + 128)
    if case.op in ("reparameterize", "adversarial"):
        # Two inputs and z, log-variance, dz and one gradient; two inputs twice and two gradients.
        return 24.0 * n * d
    return None  # vae_step: a product of matrices too


def library_call(op: str, library: Any, x: dict[str, Any]) -> Call:
    """The function of ``sslkernels``, with the arguments of the case."""
    if op == "vae":
        return lambda r, m, v: library.vae_loss(r, x["x"], m, v)
    if op == "vae_step":

        def step(m: Tensor, v: Tensor, weight: Tensor) -> Tensor:
            z = library.reparameterize(m, v, SEED)
            loss: Tensor = library.vae_loss(z @ weight, x["x"], m, v)
            return loss

        return step
    if op == "reparameterize":
        return lambda m, v: library.reparameterize(m, v, SEED)
    if op == "features":
        return lambda *maps: library.feature_reconstruction_loss(list(maps), x["targets"])
    return lambda fake, real: library.adversarial_loss(fake, real)


def eager_call(op: str, x: dict[str, Any], noise: Tensor | None = None) -> Call:
    """The definition; noise is that of torch's generator, as everybody draws it, unless it is given."""
    if op not in ("vae_step", "reparameterize"):
        return library_call(op, reference, x)

    def sample(m: Tensor, v: Tensor) -> Tensor:
        deviation = (0.5 * v).exp()
        return m + deviation * (torch.randn_like(deviation) if noise is None else noise)

    if op == "reparameterize":
        return sample
    return lambda m, v, weight: reference.vae_loss(sample(m, v) @ weight, x["x"], m, v)


def functional_call(op: str, x: dict[str, Any], noise: Tensor | None = None) -> Call:
    """As examples write it, with torch's own losses."""

    def bound(r: Tensor, m: Tensor, v: Tensor) -> Tensor:
        fit = F.binary_cross_entropy_with_logits(r, x["x"], reduction="sum")
        return (fit - 0.5 * torch.sum(1 + v - m.pow(2) - v.exp())) / len(r)

    if op == "vae":
        return bound
    if op == "vae_step":
        sample = eager_call("reparameterize", x, noise)
        return lambda m, v, weight: bound(sample(m, v) @ weight, m, v)
    if op == "features":

        def features(*maps: Tensor) -> Tensor:
            return torch.stack(
                [F.mse_loss(a, b) for a, b in zip(maps, x["targets"], strict=True)]
            ).sum()

        return features
    ones, zeros = (f(x["leaves"][0]) for f in (torch.ones_like, torch.zeros_like))
    cross_entropy = F.binary_cross_entropy_with_logits
    return lambda fake, real: cross_entropy(real, ones) + cross_entropy(fake, zeros)


def distributions_call(x: dict[str, Any]) -> Call:
    """The loss of a variational autoencoder in the words of torch.distributions."""

    def bound(r: Tensor, m: Tensor, v: Tensor) -> Tensor:
        prior = Normal(torch.zeros_like(m), torch.ones_like(m))
        kl = kl_divergence(Normal(m, (v / 2).exp()), prior).sum(1)
        return (kl - Bernoulli(logits=r, validate_args=False).log_prob(x["x"]).sum(1)).mean()

    return bound


def truth(case: Case) -> list[Tensor]:
    """Float64: the loss, or the sample, and the gradients of the leaves."""
    given = inputs(case)
    leaves = [leaf.detach().double().requires_grad_() for leaf in given["leaves"]]
    wide = {
        k: [y.double() for y in v] if isinstance(v, list) else v.double()
        for k, v in given.items()
        if k != "leaves"
    }
    out = eager_call(case.op, wide, wide.get("noise"))(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, wide.get("dz"))]
