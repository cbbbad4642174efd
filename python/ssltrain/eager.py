# SPDX-License-Identifier: Apache-2.0
"""Losses, queue and average as plain PyTorch trainers write them: ``--loss-backend eager``.

The same functions as in ``sslkernels``, with the arguments that the methods use, so that a whole run
can be compared: its time, its memory and its curve. Logits are computed once, as a matrix, for the
loss and for its metrics. One process only.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sslkernels
from sslkernels import ContrastiveMetrics, cosine_decay, reference

__all__ = [
    "EMA",
    "KeyQueue",
    "adversarial_loss",
    "beta_schedule",
    "byol_loss",
    "clip_loss",
    "cosine_decay",
    "feature_reconstruction_loss",
    "info_nce_loss",
    "nt_xent_loss",
    "r1_penalty",
    "reparameterize",
    "simsiam_loss",
    "sup_con_loss",
    "vae_loss",
]

adversarial_loss = reference.adversarial_loss
beta_schedule = reference.beta_schedule
byol_loss = reference.byol_loss
feature_reconstruction_loss = reference.feature_reconstruction_loss
r1_penalty = reference.r1_penalty
simsiam_loss = reference.simsiam_loss
sup_con_loss = reference.sup_con_loss
vae_loss = reference.vae_loss


def reparameterize(mean: Tensor, log_variance: Tensor, seed: int) -> Tensor:
    """A sample with a stored noise, of torch's generator for the seed."""
    generator = torch.Generator(mean.device).manual_seed(seed)
    noise = torch.randn(mean.shape, generator=generator, device=mean.device, dtype=mean.dtype)
    return mean + (0.5 * log_variance).exp() * noise


def nt_xent_loss(
    z1: Any,
    z2: Tensor | None = None,
    temperature: float = 0.1,
    *,
    return_metrics: bool = False,
) -> Tensor | tuple[Tensor, ContrastiveMetrics]:
    """NT-Xent of two views [N, D], or of a list of more as the first argument."""
    if z2 is None:
        return reference.nt_xent_loss(z1, None, temperature, return_metrics=return_metrics)
    z = F.normalize(torch.cat([z1, z2]).float(), dim=1)
    rows = len(z)
    logits = z @ z.T / temperature
    logits.fill_diagonal_(-torch.inf)
    partner = torch.arange(rows, device=z.device).roll(rows // 2)
    loss = F.cross_entropy(logits, partner)
    if not return_metrics:
        return loss
    with torch.no_grad():
        whole = z.sum(0).square().sum() - z.square().sum()  # of all similarities but one's own
        return loss, _metrics(logits, partner, temperature, whole, rows * (rows - 1))


def info_nce_loss(
    query: Tensor,
    positive_key: Tensor,
    negative_keys: Tensor | None = None,
    temperature: float = 0.1,
    *,
    return_metrics: bool = False,
) -> Tensor | tuple[Tensor, ContrastiveMetrics]:
    """InfoNCE of queries [N, D] in batch, or against negatives [K, D]."""
    q, k = F.normalize(query.float(), dim=1), F.normalize(positive_key.float(), dim=1)
    if negative_keys is None:
        logits = q @ k.T / temperature
        partner = torch.arange(len(q), device=q.device)
    else:
        negatives = F.normalize(negative_keys.float(), dim=1)
        positive = (q * k).sum(dim=1, keepdim=True)
        logits = torch.cat([positive, q @ negatives.T], dim=1) / temperature
        partner = torch.zeros(len(q), dtype=torch.int64, device=q.device)
    loss = F.cross_entropy(logits, partner)
    if not return_metrics:
        return loss
    with torch.no_grad():
        whole = logits.sum() * temperature
        return loss, _metrics(logits, partner, temperature, whole, logits.numel())


def clip_loss(
    images: Tensor,
    captions: Tensor,
    logit_scale: Tensor,
    *,
    normalize: bool = False,
    return_metrics: bool = False,
) -> Tensor | tuple[Tensor, ContrastiveMetrics]:
    """CLIP's loss of images [N, D] and their captions [N, D]; metrics of both directions together."""
    x, y = images.float(), captions.float()
    if normalize:
        x, y = F.normalize(x, dim=1), F.normalize(y, dim=1)
    logits = logit_scale * (x @ y.T)
    partner = torch.arange(len(x), device=x.device)
    loss = (F.cross_entropy(logits, partner) + F.cross_entropy(logits.T, partner)) / 2
    if not return_metrics:
        return loss
    with torch.no_grad():
        t = 1 / float(logit_scale)
        whole, pairs = logits.sum() * t, logits.numel()
        both = [_metrics(way, partner, t, whole, pairs) for way in (logits, logits.T)]
        return loss, ContrastiveMetrics(*((a + b) / 2 for a, b in zip(*both, strict=True)))


def _metrics(
    logits: Tensor, partner: Tensor, temperature: float, whole: Tensor, pairs: int
) -> ContrastiveMetrics:
    """What trainers log of logits [N, K] whose similarities add up to ``whole`` over ``pairs``."""
    rows = len(logits)
    own = logits.gather(1, partner[:, None])
    rank = (logits > own).sum(dim=1)
    positive = own.sum() * temperature
    return ContrastiveMetrics(
        top1=(rank < 1).float().mean(),
        top5=(rank < 5).float().mean(),
        positive_similarity=positive / rows,
        negative_similarity=(whole - positive) / max(pairs - rows, 1),
    )


class EMA(sslkernels.EMA):
    """The moving average with a loop over parameters; its checkpoints are those of the fused one."""

    @torch.no_grad()
    def update(self, online: nn.Module, step: int | None = None) -> None:
        """Move the average towards a network."""
        step = self.step if step is None else step
        decay = self.decay(step) if callable(self.decay) else self.decay
        for average, weight in zip(self.module.parameters(), online.parameters(), strict=True):
            average.mul_(decay).add_(weight, alpha=1 - decay)
        for copy, buffer in zip(self.module.buffers(), online.buffers(), strict=True):
            copy.copy_(buffer)
        self.step = step + 1


class KeyQueue(sslkernels.KeyQueue):
    """The queue with indexing; its checkpoints are those of the fused one."""

    @torch.no_grad()
    def enqueue(self, keys: Tensor, labels: Tensor | None = None) -> None:
        """Normalise and write a batch of keys [N, D]."""
        begin = int(self.queue_ptr)
        rows = torch.arange(begin, begin + len(keys), device=keys.device) % self.size
        kept = slice(-self.size, None)  # of more keys than rows, the newest
        self.queue[rows[kept]] = F.normalize(keys[kept].float(), dim=1).to(self.queue.dtype)
        self.queue_ptr[0] = (begin + len(keys)) % self.size
        self.fill.add_(len(keys)).clamp_(max=self.size)
