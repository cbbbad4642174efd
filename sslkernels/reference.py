# SPDX-License-Identifier: Apache-2.0
"""The definition of every public function, in plain and obvious PyTorch.

With float64 inputs these functions are the truth of the tests, with float32 inputs the eager
baseline of tests and benchmarks.  They build the N x N matrices that the library avoids, are
differentiable as often as torch allows, and check nothing.  Half inputs are computed in float32,
inputs of different dtypes in the widest one (at least float32).
Arguments, defaults and conventions are those of the public functions; see their docstrings for
shapes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from sslkernels._reference_arithmetic import _acc, _reduce, _unit, _widen
from sslkernels._reference_generative import *  # noqa: F403
from sslkernels._reference_generative import adversarial_loss
from sslkernels._types import ContrastiveMetrics

NEG_INF = float("-inf")


def _ranking_metrics(similarity: Tensor, positive: Tensor, negative: Tensor) -> ContrastiveMetrics:
    """similarity, positive, negative: [N, M]; the masks say which pairs are which."""
    with torch.no_grad():
        rows, columns = positive.nonzero(as_tuple=True)
        own = similarity[rows, columns]
        rank = ((similarity[rows] > own[:, None]) & negative[rows]).sum(1)
        return ContrastiveMetrics(
            (rank < 1).to(similarity).sum() / max(1, len(rank)),
            (rank < 5).to(similarity).sum() / max(1, len(rank)),
            own.sum() / max(1, len(own)),
            similarity[negative].sum() / max(1, int(negative.sum())),
        )


# ------------------------------------------------------------------------------- contrastive


def nt_xent_loss(
    z1: Tensor | Sequence[Tensor],
    z2: Tensor | None = None,
    temperature: float | Tensor = 0.1,
    *,
    normalize: bool = True,
    reduction: str = "mean",
    return_metrics: bool = False,
) -> Tensor | tuple[Tensor, ContrastiveMetrics]:
    """NT-Xent over two or more views (arXiv:2002.05709)."""
    views = tuple(x for x in (z1, z2) if x is not None) if isinstance(z1, Tensor) else tuple(z1)
    v, n = len(views), len(views[0])
    z = _unit(torch.cat(views), normalize)
    similarity = z @ z.T
    logits = similarity / temperature
    sample = torch.arange(n, device=z.device).repeat(v)
    own = torch.eye(v * n, dtype=torch.bool, device=z.device)
    same = sample[:, None] == sample
    if n == 0:
        loss = logits.sum(1)
    elif v == 2:
        target = torch.arange(2 * n, device=z.device).roll(n)
        loss = F.cross_entropy(logits.masked_fill(own, NEG_INF), target, reduction="none")
    else:
        lse = torch.logsumexp(logits.masked_fill(same, torch.finfo(z.dtype).min), 1)
        per_pair = torch.logaddexp(logits, lse[:, None]) - logits
        loss = (per_pair * (same & ~own)).sum(1) / (v - 1)
    loss = _reduce(loss, reduction)
    if not return_metrics:
        return loss
    return loss, _ranking_metrics(similarity, same & ~own, ~same)


def info_nce_loss(
    query: Tensor,
    positive_key: Tensor,
    negative_keys: Tensor | None = None,
    temperature: float | Tensor = 0.1,
    reduction: str = "mean",
    negative_mode: str = "unpaired",
    *,
    normalize: bool = True,
    return_metrics: bool = False,
    query_ids: Tensor | None = None,
    negative_ids: Tensor | None = None,
) -> Tensor | tuple[Tensor, ContrastiveMetrics]:
    """InfoNCE in batch, with shared or with paired negatives (arXiv:1807.03748, 1911.05722)."""
    inputs = (
        (query, positive_key) if negative_keys is None else (query, positive_key, negative_keys)
    )
    q, k, *others = (_unit(x, normalize) for x in _widen(*inputs))
    n = len(q)
    if negative_keys is None:
        similarity = q @ k.T
        positive = torch.eye(n, dtype=torch.bool, device=q.device)
        excluded = torch.zeros_like(positive)
        if query_ids is not None:
            excluded = query_ids[:, None] == query_ids
    else:
        negatives = others[0]
        if negative_mode == "unpaired":
            to_negatives = q @ negatives.T
        else:
            to_negatives = torch.einsum("nd,nmd->nm", q, negatives)
        similarity = torch.cat(((q * k).sum(1, keepdim=True), to_negatives), 1)
        positive = torch.zeros_like(similarity, dtype=torch.bool)
        positive[:, 0] = True
        excluded = torch.zeros_like(positive)
        if query_ids is not None and negative_ids is not None:
            excluded[:, 1:] = query_ids[:, None] == negative_ids
    negative = ~positive & ~excluded
    logits = (similarity / temperature).masked_fill(~(positive | negative), NEG_INF)
    target = (
        torch.arange(n, device=q.device) if negative_keys is None else positive.long().argmax(1)
    )
    loss = F.cross_entropy(logits, target, reduction="none") if n else logits.sum(1)
    loss = _reduce(loss, reduction)
    return (loss, _ranking_metrics(similarity, positive, negative)) if return_metrics else loss


def clip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: float | Tensor,
    *,
    normalize: bool = False,
    reduction: str = "mean",
    return_metrics: bool = False,
) -> Tensor | tuple[Tensor, ContrastiveMetrics]:
    """Symmetric cross-entropy over image-text pairs (arXiv:2103.00020)."""
    x, y = (_unit(f, normalize) for f in _widen(image_features, text_features))
    similarity = x @ y.T
    logits = similarity * logit_scale
    target = torch.arange(len(logits), device=logits.device)
    if len(logits):
        rows = F.cross_entropy(logits, target, reduction="none")
        columns = F.cross_entropy(logits.T, target, reduction="none")
        loss = (rows + columns) / 2
    else:
        loss = logits.sum(1)
    loss = _reduce(loss, reduction)
    if not return_metrics:
        return loss
    positive = torch.eye(len(logits), dtype=torch.bool, device=logits.device).repeat(2, 1)
    return loss, _ranking_metrics(torch.cat((similarity, similarity.T)), positive, ~positive)


def siglip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: float | Tensor,
    logit_bias: float | Tensor | None,
    *,
    normalize: bool = False,
    reduction: str = "mean",
) -> Tensor:
    """Pairwise sigmoid loss, summed over pairs and divided by N (arXiv:2303.15343)."""
    x, y = (_unit(f, normalize) for f in _widen(image_features, text_features))
    logits = x @ y.T * logit_scale
    if logit_bias is not None:
        logits = logits + logit_bias
    labels = 2 * torch.eye(len(logits), dtype=logits.dtype, device=logits.device) - 1
    return _reduce(-F.logsigmoid(labels * logits).sum(1), reduction)


def sup_con_loss(
    z: Tensor,
    labels: Tensor,
    temperature: float | Tensor = 0.1,
    *,
    normalize: bool = True,
    reduction: str = "mean",
) -> Tensor:
    """Supervised contrastive loss, the "out" form (arXiv:2004.11362)."""
    if z.ndim == 3:
        labels = labels.repeat_interleave(z.shape[1])
        z = z.flatten(0, 1)
    z = _unit(z, normalize)
    logits = z @ z.T / temperature
    own = torch.eye(len(z), dtype=torch.bool, device=z.device)
    positive = (labels[:, None] == labels) & ~own
    counts = positive.sum(1)
    log_prob = logits - torch.logsumexp(logits.masked_fill(own, torch.finfo(z.dtype).min), 1, True)
    loss = -(log_prob * positive).sum(1) / counts.clamp(min=1)
    if reduction == "mean":
        return loss.sum() / (counts > 0).sum().clamp(min=1)
    return _reduce(loss, reduction)


def dcl_loss(
    z1: Tensor,
    z2: Tensor,
    temperature: float | Tensor = 0.1,
    *,
    sigma: float | None = None,
    normalize: bool = True,
    reduction: str = "mean",
) -> Tensor:
    """Decoupled contrastive loss, weighted (DCLW) when sigma is given (arXiv:2110.06848)."""
    n = len(z1)
    z = _unit(torch.cat((z1, z2)), normalize)
    logits = z @ z.T / temperature
    sample = torch.arange(n, device=z.device).repeat(2)
    positive = (z[:n] * z[n:]).sum(1)
    weights = torch.ones_like(positive)
    if sigma is not None:
        weights = 2 - n * torch.softmax(positive.detach() / sigma, 0)
    if n > 1:
        lse = torch.logsumexp(logits.masked_fill(sample[:, None] == sample, NEG_INF), 1)
    else:
        lse = torch.zeros_like(sample, dtype=z.dtype)  # no negatives
    return _reduce(lse - (weights * positive / temperature).repeat(2), reduction)


# -------------------------------------------------------------------------------- regression


def byol_loss(
    prediction: Tensor,
    target: Tensor,
    *,
    rho: float | None = None,
    weight_decay: float = 0.0,
    parameters: Sequence[Tensor] = (),
    reduction: str = "mean",
) -> Tensor:
    """2 - 2 cos(prediction, target), no gradient into the target (arXiv:2006.07733)."""
    prediction, target = _widen(prediction, target.detach())
    if rho is not None:
        gap = (prediction - target).square().sum(1) - rho
        return _reduce(gap.square(), reduction) + weight_decay * sum(
            _acc(theta).square().sum() for theta in parameters
        )
    cosine = (_unit(prediction) * _unit(target)).sum(1)
    return _reduce(2 - 2 * cosine, reduction)


def byol_loss_symmetric(
    p1: Tensor, target_2: Tensor, p2: Tensor, target_1: Tensor, *, reduction: str = "mean"
) -> Tensor:
    """Sum of both directions, as DeepMind's official code."""
    return byol_loss(p1, target_2, reduction=reduction) + byol_loss(
        p2, target_1, reduction=reduction
    )


def simsiam_loss(
    p1: Tensor, z2: Tensor, p2: Tensor, z1: Tensor, *, reduction: str = "mean"
) -> Tensor:
    """Mean of both negative cosines, no gradient into z (arXiv:2011.10566)."""
    p1, z2, p2, z1 = _widen(p1, z2, p2, z1)
    first = -(_unit(p1) * _unit(z2.detach())).sum(1)
    second = -(_unit(p2) * _unit(z1.detach())).sum(1)
    return _reduce((first + second) / 2, reduction)


# --------------------------------------------------------------------------- metric learning


def _distances(z: Tensor, distance: str, normalize: bool) -> Tensor:
    if distance == "cosine":
        z = _unit(z)
        return 1 - z @ z.T
    z = _unit(z, normalize)
    return torch.cdist(z, z, compute_mode="donot_use_mm_for_euclid_dist")


def triplet_loss(
    z: Tensor,
    labels: Tensor,
    margin: float = 0.2,
    *,
    mining: str = "hard",
    distance: str = "euclidean",
    normalize: bool = False,
    reduction: str = "mean",
) -> Tensor:
    """max(d(a, p) - d(a, n) + margin, 0) over mined triplets (arXiv:1503.03832, 1703.07737)."""
    d = _distances(z, distance, normalize)
    same = labels[:, None] == labels
    positive = same & ~torch.eye(len(z), dtype=torch.bool, device=z.device)
    negative = ~same
    if len(z) == 0:
        terms = d.sum(1)
    elif mining == "hard":
        valid = positive.any(1) & negative.any(1)
        if not valid.any():
            return d.sum() * 0
        farthest = d.masked_fill(~positive, NEG_INF).amax(1)[valid]
        nearest = d.masked_fill(~negative, -NEG_INF).amin(1)[valid]
        terms = F.relu(farthest - nearest + margin)
    elif mining == "semihard":
        # For each pair (a, p) the nearest negative farther than p, else the farthest negative.
        farther = negative[:, None, :] & (d[:, None, :] > d[:, :, None])
        beyond = d[:, None, :].masked_fill(~farther, -NEG_INF).amin(2)
        fallback = d.masked_fill(~negative, NEG_INF).amax(1, keepdim=True)
        chosen = torch.where(farther.any(2), beyond, fallback)
        terms = F.relu(d - chosen + margin)[positive & negative.any(1, keepdim=True)]
    else:
        valid = positive[:, :, None] & negative[:, None, :]
        terms = F.relu(d[:, :, None] - d[:, None, :] + margin)[valid]
    if reduction == "mean_nonzero":
        return terms.sum() / (terms > 0).sum().clamp(min=1)
    return _reduce(terms, reduction)


def margin_loss(
    z_i: Tensor,
    z_j: Tensor,
    z_k: Tensor,
    z_l: Tensor,
    margin: float = 0.2,
    *,
    form: str = "relative",
    eps: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """Margin between the distances of a positive pair (i, j) and a negative pair (k, l)."""
    d_ij = torch.linalg.vector_norm(_acc(z_i) - _acc(z_j), dim=1)
    d_kl = torch.linalg.vector_norm(_acc(z_k) - _acc(z_l), dim=1)
    if form == "relative":
        return _reduce(F.relu(d_ij - d_kl + margin), reduction)
    return _reduce(F.relu(torch.maximum(d_ij, margin + d_kl) - abs(margin) + eps), reduction)


def contrastive_loss(
    a: Tensor, b: Tensor, same: Tensor, margin: float = 1.0, *, reduction: str = "mean"
) -> Tensor:
    """d^2 / 2 for same pairs, max(margin - d, 0)^2 / 2 for others (Hadsell et al. 2006)."""
    d = torch.linalg.vector_norm(_acc(a) - _acc(b), dim=1)
    same = same.to(d.dtype)
    return _reduce((same * d.square() + (1 - same) * F.relu(margin - d).square()) / 2, reduction)


def moment_kl_loss(z: Tensor, *, eps: float = 1e-4) -> Tensor:
    """Mean over features of KL( N(mean, variance) || N(0, 1) ) of the batch."""
    z = _acc(z)
    if not z.numel():
        return z.sum()
    mean, variance = z.mean(0), z.var(0, unbiased=False) + eps
    return ((mean**2 + variance - 1 - variance.log()) / 2).mean()


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
    """BYOL with adversarial, KL and contrastive terms."""
    prediction, target = _widen(prediction, target.detach())
    loss = byol_loss(prediction, target)
    if fake is not None:
        loss = loss + adversarial_weight * adversarial_loss(fake, form=form)
    loss = loss + kl_weight * moment_kl_loss(prediction)
    return loss + clr_weight * _loss_of(nt_xent_loss(prediction, target, temperature))


def contrastive_kl_loss(
    query: Tensor,
    positive_key: Tensor,
    negative_keys: Tensor | None = None,
    temperature: float | Tensor = 0.07,
    *,
    kl_weight: float = 0.01,
) -> Tensor:
    """InfoNCE and the KL of standardised queries."""
    loss = _loss_of(info_nce_loss(query, positive_key, negative_keys, temperature))
    spread = query.shape[1] ** 0.5 * _unit(query)
    return loss + kl_weight * moment_kl_loss(spread)


def _loss_of(result: Tensor | tuple[Tensor, ContrastiveMetrics]) -> Tensor:
    return result if isinstance(result, Tensor) else result[0]


# ------------------------------------------------------------------ alignment and uniformity


def alignment_loss(
    z1: Tensor, z2: Tensor, alpha: float = 2.0, *, normalize: bool = True, reduction: str = "mean"
) -> Tensor:
    """||z1 - z2||^alpha (arXiv:2005.10242)."""
    z1, z2 = _widen(z1, z2)
    d = torch.linalg.vector_norm(_unit(z1, normalize) - _unit(z2, normalize), dim=1)
    return _reduce(d.pow(alpha), reduction)


def uniformity_loss(z: Tensor, t: float = 2.0, *, normalize: bool = True) -> Tensor:
    """Log of the mean of exp(-t ||z_i - z_j||^2) over pairs i < j (arXiv:2005.10242)."""
    z = _unit(z, normalize)
    if len(z) < 2:
        return z.sum() * 0
    squared = torch.pdist(z).square()
    return torch.logsumexp(-t * squared, 0) - math.log(len(squared))


# ----------------------------------------------------------------------------------- metrics


def contrastive_accuracy(
    query: Tensor, key: Tensor, ks: Sequence[int] = (1, 5), *, normalize: bool = True
) -> tuple[Tensor, ...]:
    """Share of queries with fewer than k keys that are strictly more similar than their own."""
    q, k = (_unit(x, normalize) for x in _widen(query, key))
    similarity = q @ k.T
    rank = (similarity > similarity.diagonal()[:, None]).sum(1)
    return tuple((rank < k).to(similarity).sum() / max(1, len(rank)) for k in ks)


def feature_std(z: Tensor, *, normalize: bool = True) -> Tensor:
    """Mean over features of the standard deviation over rows (population, arXiv:2011.10566)."""
    z = _unit(z, normalize)
    return z.std(0, unbiased=False).mean() if z.numel() else z.sum()


def effective_rank(z: Tensor, *, center: bool = True) -> Tensor:
    """Exponential of the entropy of the normalised singular values (Roy and Vetterli 2007)."""
    z = _acc(z)
    if not z.numel():
        return z.new_zeros(())
    singular = torch.linalg.svdvals(z - z.mean(0) if center else z)
    share = singular / singular.sum().clamp(min=torch.finfo(z.dtype).tiny)
    return torch.special.entr(share).sum().exp() if bool(singular.sum() > 0) else z.new_zeros(())


# ----------------------------------------------------------------------------------- updates


def enqueue(
    queue: Tensor, position: int, keys: Tensor, *, normalize: bool = True
) -> tuple[Tensor, int]:
    """A copy of the ring buffer with the keys written one after another, and the next position.

    A batch larger than the queue laps it: the newest keys stay.
    """
    queue = queue.clone()
    for key in _unit(keys.detach(), normalize):
        queue[position] = key.to(queue.dtype)
        position = (position + 1) % len(queue)
    return queue, position


@torch.no_grad()
def ema_update_(targets: Sequence[Tensor], sources: Sequence[Tensor], decay: float) -> None:
    """Set target = decay * target + (1 - decay) * source in float32 (float64 if any is)."""
    for target, source in zip(targets, sources, strict=True):
        wide = torch.promote_types(torch.promote_types(target.dtype, source.dtype), torch.float32)
        target.copy_(decay * target.to(wide) + (1 - decay) * source.to(wide))


def stochastic_round_bf16(x: Tensor, bits: Tensor) -> Tensor:
    """float32 to bfloat16, up with the probability of the lost fraction.

    Args:
        x: float32.
        bits: Integers in [0, 65536), uniform: added below bfloat16's last bit, the rest cut off.
            inf and NaN are kept.
    """
    raised = (x.view(torch.int32) + bits.to(torch.int32)) & -65536
    return torch.where(x.isfinite(), raised.view(torch.float32), x).to(torch.bfloat16)


def cosine_decay(base: float, total_steps: int, final: float = 1.0) -> Callable[[int], float]:
    """BYOL's schedule: from base at step 0 to final at total_steps, then constant."""

    def decay(step: int) -> float:
        share = min(max(step / total_steps, 0.0), 1.0)
        return final - (final - base) * (math.cos(math.pi * share) + 1) / 2

    return decay
