# SPDX-License-Identifier: Apache-2.0
"""Losses of autoencoders: the variational bound, its sampling, and features against features."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from sslkernels._numbers import type_name
from sslkernels._types import Reduction
from sslkernels.backends.arithmetic import accumulation_dtype
from sslkernels.backends.interface import Vae
from sslkernels.functional import _checks as checks
from sslkernels.ops import heads
from sslkernels.ops.features import features as feature_distances
from sslkernels.ops.noise import REPARAMETERIZE
from sslkernels.ops.vae import VAE

LIKELIHOODS = ("bernoulli", "gaussian")
DISTANCES = ("squared", "smooth_l1")
NORMALIZATIONS = ("channels", "targets")


class VAEParts(NamedTuple):
    """The two terms of ``vae_loss``, reduced as the loss is, without gradient and without beta."""

    reconstruction: Tensor  # negative log-likelihood in nats
    kl: Tensor  # after free bits


@overload
def vae_loss(
    reconstruction: Tensor,
    x: Tensor,
    mean: Tensor,
    log_variance: Tensor,
    *,
    likelihood: str = ...,
    x_log_variance: float | Tensor | None = ...,
    beta: float | Tensor = ...,
    free_bits: float = ...,
    reduction: Reduction = ...,
    return_parts: Literal[False] = ...,
) -> Tensor: ...
@overload
def vae_loss(
    reconstruction: Tensor,
    x: Tensor,
    mean: Tensor,
    log_variance: Tensor,
    *,
    likelihood: str = ...,
    x_log_variance: float | Tensor | None = ...,
    beta: float | Tensor = ...,
    free_bits: float = ...,
    reduction: Reduction = ...,
    return_parts: bool,
) -> Tensor | tuple[Tensor, VAEParts]: ...
def vae_loss(
    reconstruction: Tensor,
    x: Tensor,
    mean: Tensor,
    log_variance: Tensor,
    *,
    likelihood: str = "bernoulli",
    x_log_variance: float | Tensor | None = None,
    beta: float | Tensor = 1.0,
    free_bits: float = 0.0,
    reduction: Reduction = "mean",
    return_parts: bool = False,
) -> Tensor | tuple[Tensor, VAEParts]:
    """Negative evidence lower bound of a variational autoencoder, by samples.

        loss_i = -log p(x_i | z_i) + beta KL( N(mean_i, exp log_variance_i) || N(0, I) )

    * "bernoulli": reconstruction holds logits, -log p = sum softplus(r) - x r; x in [0, 1].
    * "gaussian": reconstruction holds means, -log p = sum ((r - x)^2 exp(-s) + s + log 2 pi) / 2 with
      the log-variance s of x: a number, one learnt number, or an output of the decoder for each element.

    Free bits: a dimension whose KL is at most ``free_bits`` on average over the batch counts as
    ``free_bits`` and gets no gradient, as in Kingma et al. 2016: sum_j max(free_bits, mean_i KL_ij).

    One pass over memory forward and one backward; O(N) numbers are kept beside the inputs.  All
    gradients: reconstruction, x, x_log_variance, mean, log_variance, beta.

    Args:
        reconstruction: [N, ...], output of the decoder for z (``reparameterize``).
        x: The same shape and device: the data.  Where dtypes differ, the widest one counts.
        mean: [N, Z], output of the encoder.
        log_variance: [N, Z], output of the encoder: log of the variance, not of the deviation.
        likelihood: "bernoulli" or "gaussian".
        x_log_variance: s, "gaussian" only: a number, a tensor of shape [] or [1], or one of the
            shape of x.  None is 0: variance 1.
        beta: Weight of the KL: a number or a tensor of shape [] or [1] (``beta_schedule``).
        free_bits: In nats a dimension, at least 0.
        reduction: "mean" over N, "sum", or "none": [N].
        return_parts: Also return both terms.

    Returns:
        The loss in nats, float32 (float64 for float64 inputs); with ``return_parts`` a pair of it and
        ``VAEParts``.

    Raises:
        TypeError: If an argument has a wrong type or dtype.
        ValueError: If shapes or devices differ or an option is unknown or out of range.

    Reference:
        Kingma and Welling, Auto-Encoding Variational Bayes, arXiv:1312.6114; Higgins et al.,
        beta-VAE, ICLR 2017; Kingma et al., Improving Variational Inference with Inverse
        Autoregressive Flow, arXiv:1606.04934.
    """
    op = "vae_loss"
    checks.check_samples(op, "reconstruction", reconstruction)
    checks.check_alike(op, "reconstruction", reconstruction, "x", x)
    checks.check_pair(op, "mean", mean, "log_variance", log_variance)
    checks.check_device(op, "reconstruction", reconstruction, "mean", mean)
    if len(mean) != len(x):
        raise ValueError(
            f"{op}: mean and x must have as many rows, got {list(mean.shape)} and {list(x.shape)}"
        )
    checks.check_choice(op, "likelihood", likelihood, LIKELIHOODS)
    checks.check_reduction(op, reduction)
    free_bits = checks.number(op, "free_bits", free_bits)
    if not free_bits >= 0:
        raise ValueError(f"{op}: free_bits must be at least 0, got {free_bits}")
    gaussian = likelihood == "gaussian"
    if x_log_variance is not None and not gaussian:
        raise ValueError(f"{op}: x_log_variance is for likelihood 'gaussian', got {likelihood!r}")
    spread = x_log_variance
    by_element = isinstance(spread, Tensor) and spread.ndim > 1
    given = [reconstruction, x, mean, log_variance]
    if isinstance(spread, Tensor) and by_element:
        checks.check_alike(op, "x", x, "x_log_variance", spread)
        given.append(spread)
    reconstruction, x, mean, log_variance, *more = checks.widen(*given)
    beta = checks.number_or_scalar(op, "beta", beta, x)
    weights, floor = _free(mean, log_variance, free_bits)
    flat = [y.flatten(1) for y in (reconstruction, x, *more)]
    terms = VAE(
        Vae(flat[0], flat[1], flat[2] if more else None, mean, log_variance, weights, likelihood)
    )
    rows, kl = terms.reconstruction, terms.kl
    if gaussian:
        elements = flat[1].shape[1]
        # Of the right dtype also where a trace makes a tensor of the shape.
        constant = rows.new_full((), 0.5 * math.log(2 * math.pi)) * elements
        if spread is None or by_element:
            rows = rows + constant
        else:
            s = checks.scalar(op, "x_log_variance", spread, x)
            rows = rows * (-s).exp() + (constant + 0.5 * s * elements)
    if floor is not None:
        kl = kl + floor
    loss = heads.reduce(rows + beta * kl, reduction)
    if not return_parts:
        return loss
    return loss, VAEParts(
        heads.reduce(rows.detach(), reduction), heads.reduce(kl.detach(), reduction)
    )


def _free(
    mean: Tensor, log_variance: Tensor, free_bits: float
) -> tuple[Tensor | None, Tensor | None]:
    """Weights [Z] of the KL, 0 where free, and what the free dimensions count; None without any."""
    if free_bits == 0:
        return None, None
    acc = accumulation_dtype(mean.dtype)
    m, v = mean.detach().to(acc), log_variance.detach().to(acc)
    kl = (0.5 * (m * m + (v.expm1() - v))).mean(0)
    free = kl <= free_bits  # a NaN is not free: it reaches the loss
    return (~free).to(acc), free_bits * free.sum().to(acc)


def reparameterize(mean: Tensor, log_variance: Tensor, seed: int | Tensor) -> Tensor:
    """A sample of N(mean, exp log_variance) with a gradient: z = mean + exp(log_variance / 2) eps.

    The noise eps is a function of the seed and of the place of an element alone (Philox4x32-10, a
    counter-based generator): it is never stored, and backward draws the same numbers again.  The
    random words are the same on every device and for any number of threads.  Take another seed for
    every step and every call in it, for example ``torch.randint(2**62, ()).item()`` or a tensor on
    the device.

    Args:
        mean: Any shape.
        log_variance: The same shape and device; where dtypes differ, the wider one counts.
        seed: An integer of 64 bits, or an int64 tensor of shape [] or [1] on the device of the mean,
            which must not change before backward.

    Returns:
        z, of the shape and (wider) dtype of the inputs.

    Raises:
        TypeError: If an argument has a wrong type or dtype.
        ValueError: If shapes or devices differ, or the seed has more than 64 bits.

    Reference:
        Kingma and Welling, Auto-Encoding Variational Bayes, arXiv:1312.6114; Salmon et al.,
        Parallel random numbers: as easy as 1, 2, 3, SC 2011.

    Example:
        >>> import torch, sslkernels
        >>> mean = torch.zeros(2, 3)
        >>> z = sslkernels.reparameterize(mean, mean, seed=7)
        >>> torch.equal(z, sslkernels.reparameterize(mean, mean, seed=7))
        True
    """
    op = "reparameterize"
    checks.check_floating(op, "mean", mean)
    checks.check_alike(op, "mean", mean, "log_variance", log_variance)
    mean, log_variance = checks.widen(mean, log_variance)
    z: Tensor = REPARAMETERIZE(mean, log_variance, _seed(op, seed, mean))
    return z


def _seed(op: str, seed: int | Tensor, like: Tensor) -> Tensor:
    """A seed as a 0-d int64 tensor on a device."""
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64:
            raise TypeError(f"{op}: seed must be an integer or an int64 tensor, got {seed.dtype}")
        checks.check_scalar_shape(op, "seed", seed)
        checks.check_device(op, "seed", seed, "mean", like)
        return seed.reshape(())
    value = checks.integer(op, "seed", seed)
    if not -(2**63) <= value < 2**64:
        raise ValueError(f"{op}: seed must have at most 64 bits, got {value}")
    signed = value - 2**64 if value >= 2**63 else value
    return torch.full((), signed, dtype=torch.int64, device=like.device)


def feature_reconstruction_loss(
    features: Tensor | Sequence[Tensor],
    targets: Tensor | Sequence[Tensor],
    *,
    weights: Sequence[float] | Tensor | None = None,
    distance: str = "squared",
    beta: float = 1.0,
    normalize: str | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """Feature maps of one network against those of another, layer by layer.

        loss_i = sum_l weight_l mean_j rho( feature_l[i, j] - target_l[i, j] )

    rho is the square (Johnson et al. 2016, whose feature reconstruction loss this is with the
    features of a fixed network), or the smooth L1 of data2vec: x^2 / (2 beta) below beta and |x| -
    beta / 2 above.  The targets get no gradient.  All maps are one launch (up to 16 a launch; with
    Triton for each pair of dtypes), plain torch in blocks where there are no kernels.

    Args:
        features: [N, ...] tensors of any shapes and dtypes, or a single one; all of one N.
        targets: As many, of the same shapes and device.
        weights: One number a map, or a tensor [L], which may require grad; None: 1 each.
        distance: "squared" or "smooth_l1".
        beta: Width of the smooth part, at least 0; 0 is |x|.
        normalize: None; "channels": both sides are made unit vectors along dimension 1, at each
            position, as in LPIPS; "targets": each target is standardised over its last dimension, as
            in data2vec.  Both make a copy of what they normalise.
        reduction: "mean" over N, "sum", or "none": [N].

    Returns:
        The loss, float32 (float64 if any map is).

    Raises:
        TypeError: If an argument has a wrong type or dtype.
        ValueError: If numbers of maps, shapes or devices differ or an option is unknown.

    Reference:
        Johnson, Alahi, Fei-Fei, Perceptual Losses, arXiv:1603.08155; Baevski et al., data2vec,
        arXiv:2202.03555; Zhang et al., LPIPS, arXiv:1801.03924.
    """
    op = "feature_reconstruction_loss"
    maps, wanted = _maps(op, "features", features), _maps(op, "targets", targets)
    if len(maps) != len(wanted) or not maps:
        raise ValueError(
            f"{op}: features and targets must have the same length, at least 1, "
            f"got {len(maps)} and {len(wanted)}"
        )
    for i, (feature, target) in enumerate(zip(maps, wanted, strict=True)):
        checks.check_samples(op, f"features[{i}]", feature)
        checks.check_alike(op, f"features[{i}]", feature, f"targets[{i}]", target)
        checks.check_device(op, "features[0]", maps[0], f"features[{i}]", feature)
        if len(feature) != len(maps[0]):
            raise ValueError(
                f"{op}: features[0] and features[{i}] must have as many samples, "
                f"got {len(maps[0])} and {len(feature)}"
            )
    checks.check_choice(op, "distance", distance, DISTANCES)
    checks.check_reduction(op, reduction)
    beta = checks.number(op, "beta", beta)
    if not beta >= 0:
        raise ValueError(f"{op}: beta must be at least 0, got {beta}")
    wanted = [x.detach() for x in wanted]
    if normalize is not None:
        checks.check_choice(op, "normalize", normalize, NORMALIZATIONS)
        if normalize == "channels":
            maps, wanted = [_unit(x) for x in maps], [_unit(x) for x in wanted]
        else:
            wanted = [F.layer_norm(_wide(x), x.shape[-1:]) if x.numel() else x for x in wanted]
    pairs = [_flat(*pair) for pair in zip(maps, wanted, strict=True)]
    by_map = feature_distances(
        [p[0] for p in pairs], [p[1] for p in pairs], distance == "smooth_l1", beta
    )
    rows = by_map.sum(1) if weights is None else (by_map * _weights(op, weights, by_map)).sum(1)
    return heads.reduce(rows, reduction)


def _maps(op: str, name: str, given: Tensor | Sequence[Tensor]) -> list[Tensor]:
    if isinstance(given, Tensor):
        return [given]
    if not isinstance(given, Sequence):
        raise TypeError(f"{op}: {name} must be a tensor or a list of them, got {type_name(given)}")
    return list(given)


def _wide(x: Tensor) -> Tensor:
    return x.to(accumulation_dtype(x.dtype))


def _unit(x: Tensor) -> Tensor:
    """Unit vectors along dimension 1; rows of zeros stay."""
    return F.normalize(_wide(x), dim=1, eps=1e-12)


def _flat(feature: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """[N, d] each in one order of elements: that of the memory of the feature, so that it is no copy."""
    if not feature.is_contiguous() and feature.ndim > 2:
        strides = feature.stride()
        order = sorted(range(1, feature.ndim), key=lambda i: -strides[i])
        feature, target = feature.permute(0, *order), target.permute(0, *order)
    return feature.flatten(1), target.flatten(1)


def _weights(op: str, weights: Sequence[float] | Tensor, like: Tensor) -> Tensor:
    """[L] in the dtype of the distances."""
    count = like.shape[1]
    if isinstance(weights, Tensor):
        checks.check_device(op, "weights", weights, "features[0]", like)
        if weights.shape != (count,):
            raise ValueError(
                f"{op}: weights must have one element a map, [{count}], got {list(weights.shape)}"
            )
        return weights.to(like.dtype)
    numbers = [checks.number(op, f"weights[{i}]", w) for i, w in enumerate(weights)]
    if len(numbers) != count:
        raise ValueError(f"{op}: weights must be {count} numbers, one a map, got {len(numbers)}")
    return torch.tensor(numbers, dtype=like.dtype, device=like.device)
