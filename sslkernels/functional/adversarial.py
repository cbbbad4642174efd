# SPDX-License-Identifier: Apache-2.0
"""Adversarial losses, penalties of the discriminator, and losses that add such terms to BYOL and MoCo.

A batch has N logits: there is nothing to fuse.  Everything here is torch operations in the accumulation
dtype, which torch can differentiate as often as asked.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from sslkernels._numbers import type_name
from sslkernels._types import Reduction
from sslkernels.backends.arithmetic import accumulation_dtype
from sslkernels.functional import _checks as checks
from sslkernels.functional.contrastive import info_nce_loss, nt_xent_loss
from sslkernels.functional.regression import byol_loss
from sslkernels.ops import heads

FORMS = ("non_saturating", "minimax", "hinge", "least_squares", "wasserstein")


def _wide(x: Tensor) -> Tensor:
    return x.to(accumulation_dtype(x.dtype))


def _discriminator(form: str, real: Tensor, fake: Tensor) -> Tensor:
    if form in ("non_saturating", "minimax"):
        return heads.softplus(-real) + heads.softplus(fake)
    if form == "hinge":
        return F.relu(1 - real) + F.relu(1 + fake)
    if form == "least_squares":
        return ((real - 1).square() + fake.square()) / 2
    return fake - real


def _generator(form: str, fake: Tensor) -> Tensor:
    if form == "non_saturating":
        return heads.softplus(-fake)
    if form == "minimax":
        return -heads.softplus(fake)
    if form == "least_squares":
        return (fake - 1).square() / 2
    return -fake


def adversarial_loss(
    fake: Tensor,
    real: Tensor | None = None,
    *,
    form: str = "non_saturating",
    reduction: Reduction = "mean",
) -> Tensor:
    """Loss of a discriminator (``real`` given) or of the generator (without).

    With f and r the logits D(G(z)) and D(x), not probabilities:

    ====================  ==================================  ============================
    form                  discriminator                       generator
    ====================  ==================================  ============================
    ``non_saturating``    softplus(-r) + softplus(f)          softplus(-f)
    ``minimax``           softplus(-r) + softplus(f)          -softplus(f)
    ``hinge``             max(0, 1 - r) + max(0, 1 + f)       -f
    ``least_squares``     ((r - 1)^2 + f^2) / 2               (f - 1)^2 / 2
    ``wasserstein``       f - r                               -f
    ====================  ==================================  ============================

    The first two are Goodfellow et al. 2014: "minimax" is the value of the game, log(1 - D(G(z))),
    whose gradient vanishes where the discriminator wins.  "wasserstein" needs ``gradient_penalty``.
    Detach what the generator made when the discriminator is trained.

    Args:
        fake: [N, ...] logits of generated samples; a sample's loss is the mean over its logits.
        real: The same shape and device, logits of data; None: the loss of the generator.
        form: See above.
        reduction: "mean" over N, "sum", or "none": [N].

    Returns:
        The loss, float32 (float64 for float64 inputs).

    Raises:
        TypeError: If an argument has a wrong type or dtype.
        ValueError: If shapes or devices differ or an option is unknown.

    Reference:
        Goodfellow et al., arXiv:1406.2661; Lim and Ye, Geometric GAN, arXiv:1705.02894; Mao et al.,
        Least Squares GAN, arXiv:1611.04076; Arjovsky et al., Wasserstein GAN, arXiv:1701.07875.
    """
    op = "adversarial_loss"
    checks.check_floating(op, "fake", fake)
    if fake.ndim == 0:
        raise ValueError(f"{op}: fake must have at least 1 dimension, got shape []")
    checks.check_choice(op, "form", form, FORMS)
    checks.check_reduction(op, reduction)
    if real is None:
        loss = _generator(form, _wide(fake))
    else:
        checks.check_alike(op, "fake", fake, "real", real)
        fake, real = checks.widen(fake, real)
        loss = _discriminator(form, _wide(real), _wide(fake))
    if loss.ndim > 1:
        loss = loss.flatten(1)
        loss = loss.sum(1) / max(1, loss.shape[1])
    return heads.reduce(loss, reduction)


def _input_gradient(op: str, discriminator: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """[N]: |d sum D / d x_i|^2, differentiable in the parameters of D."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        logits = discriminator(x)
        if not isinstance(logits, Tensor):
            raise TypeError(
                f"{op}: discriminator must return a tensor of logits, got {type_name(logits)}"
            )
        (gradient,) = torch.autograd.grad(logits.sum(), x, create_graph=True)
        return _wide(gradient).flatten(1).square().sum(1)


def gradient_penalty(
    discriminator: Callable[[Tensor], Tensor],
    real: Tensor,
    fake: Tensor,
    *,
    weight: float = 10.0,
    target: float = 1.0,
    mix: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """WGAN-GP: weight (|grad D(x)| - target)^2 at points between real and generated samples.

    x = u real + (1 - u) fake, u uniform in [0, 1] for each sample.  Its gradient is a second
    derivative of the *network*: every operation of the discriminator must have one (no ``inplace``
    tricks, no fused kernels without it).  No batch normalisation in the discriminator: a sample's
    gradient would depend on the others.  A gradient of zero has slope 0.

    Args:
        discriminator: Network, [N, ...] → logits.
        real: [N, ...].
        fake: The same shape and device; it gets no gradient.
        weight: lambda; the paper uses 10.
        target: The norm that is asked for; 0 for the zero-centred penalty.
        mix: u, N numbers; None: from torch's default generator of the device.
        reduction: "mean" over N, "sum", or "none": [N].

    Raises:
        TypeError: If an argument has a wrong type or dtype.
        ValueError: If shapes or devices differ or the reduction is unknown.

    Reference:
        Gulrajani et al., Improved Training of Wasserstein GANs, arXiv:1704.00028.
    """
    op = "gradient_penalty"
    checks.check_samples(op, "real", real)
    checks.check_alike(op, "real", real, "fake", fake)
    checks.check_reduction(op, reduction)
    weight, target = checks.number(op, "weight", weight), checks.number(op, "target", target)
    n = len(real)
    if mix is None:
        mix = torch.rand(n, device=real.device)
    else:
        checks.check_floating(op, "mix", mix)
        if mix.numel() != n:
            raise ValueError(f"{op}: mix must have {n} elements, got {list(mix.shape)}")
        checks.check_device(op, "real", real, "mix", mix)
    real, fake = checks.widen(real.detach(), fake.detach())
    share = mix.to(real.dtype).view(-1, *(1 for _ in real.shape[1:]))
    squared = _input_gradient(op, discriminator, fake + share * (real - fake))
    flat = squared > 0
    norm = torch.where(flat, torch.where(flat, squared, 1.0).sqrt(), squared)
    return heads.reduce(weight * (norm - target).square(), reduction)


def r1_penalty(
    discriminator: Callable[[Tensor], Tensor],
    real: Tensor,
    *,
    weight: float = 10.0,
    reduction: Reduction = "mean",
) -> Tensor:
    """R1: weight / 2 |grad D(x)|^2 at the data.

    As for ``gradient_penalty``, the discriminator must have second derivatives.

    Args:
        discriminator: Network, [N, ...] → logits.
        real: [N, ...].
        weight: gamma; the paper uses 10.
        reduction: "mean" over N, "sum", or "none": [N].

    Raises:
        TypeError: If an argument has a wrong type or dtype.
        ValueError: If the reduction is unknown.

    Reference:
        Mescheder, Geiger, Nowozin, Which Training Methods for GANs do actually Converge?,
        arXiv:1801.04406.
    """
    op = "r1_penalty"
    checks.check_samples(op, "real", real)
    checks.check_reduction(op, reduction)
    weight = checks.number(op, "weight", weight)
    return heads.reduce(0.5 * weight * _input_gradient(op, discriminator, real), reduction)


# ---- terms beside BYOL and MoCo ------------------------------------------------------------------


def moment_kl_loss(z: Tensor, *, eps: float = 1e-4) -> Tensor:
    """KL of the batch's features from standardised ones, a mean over the features.

        1 / D sum_j KL( N(m_j, s_j^2) || N(0, 1) ) = 1 / D sum_j (m_j^2 + s_j^2 - 1 - log s_j^2) / 2

    with mean m and (population) variance s^2 of a feature over the batch, eps added to the latter: it
    is least, about 0, where each feature has mean 0 and variance 1, and grows where features collapse.

    Args:
        z: [N, D].
        eps: Added to the variance, above 0: bounds the loss of collapsed features.

    Returns:
        0-d, float32 (float64 for float64 inputs); 0 without rows or features.

    Raises:
        TypeError: If an argument has a wrong type or dtype.
        ValueError: If z has no two dimensions or eps is not above 0.
    """
    op = "moment_kl_loss"
    checks.check_matrix(op, "z", z)
    eps = checks.positive(op, "eps", eps)
    z = _wide(z)
    if not z.numel():
        return z.sum()
    mean = z.mean(0)
    variance = (z - mean).square().mean(0) + eps
    return (mean.square() + variance - 1 - variance.log()).sum() / (2 * len(mean))


def adversarial_byol_loss(
    prediction: Tensor,
    target: Tensor,
    fake: Tensor | None = None,
    *,
    adversarial_weight: float = 1.0,
    kl_weight: float = 0.0,
    clr_weight: float = 0.0,
    temperature: float = 0.1,
    form: str = "non_saturating",
) -> Tensor:
    """BYOL with adversarial, KL and contrastive terms.

        L = byol_loss(p, t) + a adversarial_loss(fake) + k L_kl + c L_clr

    L_kl = ``moment_kl_loss(p)`` and L_clr = ``nt_xent_loss(p, t, temperature)``; the target gets no
    gradient in any of them.  ``fake`` are the logits of a discriminator for the predictions, whose
    "real" samples are the targets: train it with ``adversarial_loss(D(p.detach()), D(t))``.

    It reduces to ``byol_loss`` with all weights 0 (or without ``fake``), to BYOL with a
    batch-contrastive term for a = k = 0, and keeps features apart without negatives for k > 0.

    Args:
        prediction: [N, D].
        target: [N, D].
        fake: [N, ...] logits of the predictions, or None: no adversarial term.
        adversarial_weight: a.
        kl_weight: k.
        clr_weight: c.
        temperature: Of L_clr.
        form: Of the adversarial term, see ``adversarial_loss``.

    Returns:
        The mean loss, 0-d.

    Raises:
        TypeError: If an argument has a wrong type or dtype.
        ValueError: If shapes or devices differ or an option is unknown or out of range.

    Reference:
        Grill et al., arXiv:2006.07733; Goodfellow et al., arXiv:1406.2661; Chen et al.,
        arXiv:2002.05709.
    """
    op = "adversarial_byol_loss"
    checks.check_pair(op, "prediction", prediction, "target", target)
    weights = {
        name: checks.number(op, name, value)
        for name, value in (
            ("adversarial_weight", adversarial_weight),
            ("kl_weight", kl_weight),
            ("clr_weight", clr_weight),
        )
    }
    target = target.detach()
    loss = byol_loss(prediction, target)
    if fake is not None and weights["adversarial_weight"]:
        loss = loss + weights["adversarial_weight"] * adversarial_loss(fake, form=form)
    if weights["kl_weight"]:
        loss = loss + weights["kl_weight"] * moment_kl_loss(prediction)
    if weights["clr_weight"]:
        contrast = cast(Tensor, nt_xent_loss(prediction, target, temperature))
        loss = loss + weights["clr_weight"] * contrast
    return loss


def contrastive_kl_loss(
    query: Tensor,
    positive_key: Tensor,
    negative_keys: Tensor | None = None,
    temperature: float | Tensor = 0.07,
    *,
    kl_weight: float = 0.01,
) -> Tensor:
    """MoCo's InfoNCE plus the KL of standardised queries.

        J = info_nce_loss(q, k, queue, temperature) + kl_weight moment_kl_loss(sqrt(D) q / |q|)

    Unit vectors have squares that sum to 1, so times sqrt(D) a feature can have variance 1: the term
    asks for centred features of equal spread.  It reduces to ``info_nce_loss`` for kl_weight = 0.

    Args:
        query: [N, D].
        positive_key: [N, D].
        negative_keys: [K, D], for example ``KeyQueue.keys``; None: the other keys of the batch.
        temperature: A number > 0 or a tensor of shape [] or [1].
        kl_weight: Of the KL term.

    Returns:
        The mean loss, 0-d.

    Raises:
        TypeError: If an argument has a wrong type or dtype.
        ValueError: If shapes or devices differ or an option is out of range.

    Reference:
        He et al., Momentum Contrast, arXiv:1911.05722.
    """
    op = "contrastive_kl_loss"
    checks.check_pair(op, "query", query, "positive_key", positive_key)
    kl_weight = checks.number(op, "kl_weight", kl_weight)
    loss = cast(Tensor, info_nce_loss(query, positive_key, negative_keys, temperature))
    if not kl_weight:
        return loss
    spread = heads.unit(query, True) * query.shape[1] ** 0.5
    return loss + kl_weight * moment_kl_loss(spread)
