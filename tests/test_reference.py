# SPDX-License-Identifier: Apache-2.0
"""The definitions: hand-computed values, loops over pairs, and the formulas of published code.

What is compared with a formula here is ``sslkernels.reference``; the library is compared with the
reference elsewhere.  Formulas are written from the papers and from the conventions of the projects
named; where a project is installed, it is called as well.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sslkernels import reference

N, D, T = 7, 5, 0.3


@pytest.fixture
def z() -> list[Tensor]:
    """Four float64 views."""
    generator = torch.Generator().manual_seed(7)
    base = torch.randn(N, D, generator=generator, dtype=torch.float64)
    noise = torch.randn(4, N, D, generator=generator, dtype=torch.float64)
    return list(base + 0.7 * noise)


def unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=1, keepdim=True)


def close(a: Tensor | float, b: Tensor | float) -> None:
    torch.testing.assert_close(
        torch.as_tensor(a, dtype=torch.float64),
        torch.as_tensor(b, dtype=torch.float64),
        rtol=1e-10,
        atol=1e-12,
    )


# ------------------------------------------------------------------------------ values by hand


def test_nt_xent_by_hand() -> None:
    """Two orthogonal samples with equal views at T = 1: each row sees e^1, e^0, e^0."""
    eye = torch.eye(2, dtype=torch.float64)
    close(reference.nt_xent_loss(eye, eye, 1.0), math.log(math.e + 2) - 1)


def test_info_nce_by_hand() -> None:
    """One query at 60 degrees from its key, two negatives at 0 and 90 degrees, T = 1/2."""
    q = torch.tensor([[1.0, 0.0]]).double()
    k = torch.tensor([[0.5, math.sqrt(0.75)]], dtype=torch.float64)
    negatives = torch.tensor([[2.0, 0.0], [0.0, 3.0]]).double()
    expected = math.log(math.e + math.exp(2) + 1) - 1
    close(reference.info_nce_loss(q, k, negatives, 0.5), expected)
    close(reference.info_nce_loss(q, k, negatives[None], 0.5, negative_mode="paired"), expected)
    without_first = reference.info_nce_loss(
        q, k, negatives, 0.5, query_ids=torch.tensor([4]), negative_ids=torch.tensor([4, 5])
    )
    close(without_first, math.log(math.e + 1) - 1)


def test_clip_and_siglip_by_hand() -> None:
    """Two orthogonal pairs, scale ln 3, bias -ln 2."""
    eye = torch.eye(2, dtype=torch.float64)
    close(reference.clip_loss(eye, eye, math.log(3)), math.log(4 / 3))
    # Positive logit ln 3 - ln 2, negative -ln 2.
    expected = math.log(1 + 2 / 3) + math.log(1 + 1 / 2)
    close(reference.siglip_loss(eye, eye, math.log(3), -math.log(2)), expected)


def test_dcl_by_hand() -> None:
    """Two orthogonal samples, equal views, T = 1: -1 + log(e^0 + e^0)."""
    eye = torch.eye(2, dtype=torch.float64)
    close(reference.dcl_loss(eye, eye, 1.0), math.log(2) - 1)


def test_regression_by_hand() -> None:
    """60 degrees: cos = 1/2."""
    p = torch.tensor([[3.0, 0.0]], dtype=torch.float64)
    t = torch.tensor([[1.0, math.sqrt(3)]], dtype=torch.float64)
    close(reference.byol_loss(p, t), 1.0)
    close(reference.byol_loss_symmetric(p, t, p, t), 2.0)
    close(reference.simsiam_loss(p, t, p, t), -0.5)


def test_distance_losses_by_hand() -> None:
    """Points on a line at 0, 1 (class 0) and 3, 7 (class 1)."""
    z = torch.tensor([[0.0], [1.0], [3.0], [7.0]]).double()
    labels = torch.tensor([0, 0, 1, 1])
    # hard, margin 2: anchors 0: 1-3+2=0; 1: 1-2+2=1; 2: 4-2+2=4; 3: 4-6+2=0.
    close(reference.triplet_loss(z, labels, 2.0), 5 / 4)
    close(reference.triplet_loss(z, labels, 2.0, reduction="mean_nonzero"), 5 / 2)
    # all: (0,1): 0 and 1-7+2<0; (1,0): 1, 1-6+2<0; (2,3): 4-3+2=3 and 4-2+2=4; (3,2): 4-7+2<0, 0.
    close(reference.triplet_loss(z, labels, 2.0, mining="all"), 8 / 8)
    # semihard: (0,1): 3 is next: 0; (1,0): 2: 1; (2,3): none beyond 4, farthest is 3: 3; (3,2): 6:
    # 0.
    close(reference.triplet_loss(z, labels, 2.0, mining="semihard"), 4 / 4)
    a, b = torch.zeros(2, 1).double(), torch.tensor([[0.5], [0.25]]).double()
    close(reference.contrastive_loss(a, b, torch.tensor([True, False])), (0.125 + 0.75**2 / 2) / 2)
    close(reference.margin_loss(z[:1], z[1:2], z[:1], z[2:3], 2.5), 0.5)
    # max(max(1, -0.5 + 3) - 0.5 + 0.25, 0)
    close(reference.margin_loss(z[:1], z[1:2], z[:1], z[2:3], -0.5, form="floor", eps=0.25), 2.25)


def test_alignment_and_uniformity_by_hand() -> None:
    """A right angle: squared distance 2."""
    eye = torch.eye(2, dtype=torch.float64)
    close(reference.alignment_loss(eye, eye.flip(0)), 2.0)
    close(reference.alignment_loss(eye, eye.flip(0), alpha=4.0), 4.0)
    close(reference.uniformity_loss(eye, t=3.0), -6.0)


# ------------------------------------------------------------------------------ loops over pairs


def test_nt_xent_by_loops(z: list[Tensor]) -> None:
    """Every ordered positive pair against the rows of other samples, for 2, 3 and 4 views."""
    for v in (2, 3, 4):
        rows = unit(torch.cat(z[:v]))
        sample = [i % N for i in range(v * N)]
        losses = []
        for i in range(v * N):
            terms = []
            negatives = sum(
                math.exp(float(rows[i] @ rows[j]) / T)
                for j in range(v * N)
                if sample[j] != sample[i]
            )
            for p in range(v * N):
                if p != i and sample[p] == sample[i]:
                    positive = math.exp(float(rows[i] @ rows[p]) / T)
                    terms.append(-math.log(positive / (positive + negatives)))
            losses.append(sum(terms) / len(terms))
        got = reference.nt_xent_loss(z[:v], temperature=T, reduction="none")
        close(got, torch.tensor(losses, dtype=torch.float64))
        close(reference.nt_xent_loss(z[:v], temperature=T), sum(losses) / len(losses))


def test_sup_con_by_loops(z: list[Tensor]) -> None:
    """Rows with positives, averaged over them; SupContrast's code is T / base_T times that."""
    rows, labels = unit(z[0]), [0, 1, 0, 2, 1, 0, 3]
    losses = []
    for i in range(N):
        positives = [p for p in range(N) if p != i and labels[p] == labels[i]]
        if not positives:
            continue
        total = sum(math.exp(float(rows[i] @ rows[j]) / T) for j in range(N) if j != i)
        losses.append(
            -sum(float(rows[i] @ rows[p]) / T - math.log(total) for p in positives) / len(positives)
        )
    close(reference.sup_con_loss(z[0], torch.tensor(labels), T), sum(losses) / len(losses))


def test_triplets_by_loops(z: list[Tensor]) -> None:
    """All three minings, both distances."""
    labels = [0, 1, 0, 2, 1, 0, 1]
    for distance in ("euclidean", "cosine"):
        rows = unit(z[0]) if distance == "cosine" else z[0]

        def d(i: int, j: int, rows: Tensor = rows, distance: str = distance) -> float:
            if distance == "cosine":
                return 1 - float(rows[i] @ rows[j])
            return float((rows[i] - rows[j]).norm())

        terms: dict[str, list[float]] = {"hard": [], "semihard": [], "all": []}
        for a in range(N):
            positives = [d(a, p) for p in range(N) if p != a and labels[p] == labels[a]]
            negatives = [d(a, n) for n in range(N) if labels[n] != labels[a]]
            if not positives:
                continue
            terms["hard"].append(max(0.0, max(positives) - min(negatives) + T))
            for p in positives:
                beyond = [n for n in negatives if n > p]
                chosen = min(beyond) if beyond else max(negatives)
                terms["semihard"].append(max(0.0, p - chosen + T))
                terms["all"] += [max(0.0, p - n + T) for n in negatives]
        for mining, values in terms.items():
            options = {"mining": mining, "distance": distance}
            label = torch.tensor(labels)
            close(reference.triplet_loss(z[0], label, T, **options), sum(values) / len(values))
            close(reference.triplet_loss(z[0], label, T, reduction="sum", **options), sum(values))
            nonzero = [x for x in values if x > 0]
            close(
                reference.triplet_loss(z[0], label, T, reduction="mean_nonzero", **options),
                sum(nonzero) / max(1, len(nonzero)),
            )


# ------------------------------------------------------------------- conventions of other projects


def test_simclr_official_is_twice_ours(z: list[Tensor]) -> None:
    """google-research/simclr adds the losses of its two directions."""
    a, b = unit(z[0]), unit(z[1])
    mask = torch.eye(N, dtype=torch.float64) * 1e9
    total = torch.zeros((), dtype=torch.float64)
    for x, y in ((a, b), (b, a)):
        logits = torch.cat((x @ y.T / T, x @ x.T / T - mask), 1)
        total = total + F.cross_entropy(logits, torch.arange(N))
    close(total, 2 * reference.nt_xent_loss(z[0], z[1], T))


def test_moco_v3_official_is_2t_times_both_directions(z: list[Tensor]) -> None:
    """facebookresearch/moco-v3: contrastive_loss(q1, k2) + contrastive_loss(q2, k1), times 2 T."""
    q1, q2, k1, k2 = z
    total = torch.zeros((), dtype=torch.float64)
    for q, k in ((q1, k2), (q2, k1)):
        logits = unit(q) @ unit(k).T / T
        total = total + F.cross_entropy(logits, torch.arange(N)) * 2 * T
    ours = reference.info_nce_loss(q1, k2, None, T) + reference.info_nce_loss(q2, k1, None, T)
    close(total, 2 * T * ours)


def test_moco_official_logits(z: list[Tensor]) -> None:
    """facebookresearch/moco: the positive in column 0, the queue as [D, K]; its accuracy too."""
    q, k, queue = unit(z[0]), unit(z[1]), unit(torch.cat(z[2:])).T
    logits = torch.cat(((q * k).sum(1, keepdim=True), q @ queue), 1) / 0.07
    expected = F.cross_entropy(logits, torch.zeros(N, dtype=torch.int64))
    loss, metrics = reference.info_nce_loss(z[0], z[1], queue.T, 0.07, return_metrics=True)
    close(loss, expected)
    top5 = logits.topk(5, dim=1).indices
    close(metrics.top1, (top5[:, 0] == 0).double().mean())
    close(metrics.top5, (top5 == 0).any(1).double().mean())


def test_deepmind_byol_sums_both_views(z: list[Tensor]) -> None:
    """Squared distance of normalised rows, summed over the views, averaged over the batch."""
    p1, t2, p2, t1 = z
    total = ((unit(p1) - unit(t2)) ** 2).sum(1) + ((unit(p2) - unit(t1)) ** 2).sum(1)
    close(reference.byol_loss_symmetric(p1, t2, p2, t1), total.mean())


def test_sup_contrast_multiplies_by_the_temperature(z: list[Tensor]) -> None:
    """HobbitLong/SupContrast: features [N, V, D], loss times T / base_T, here 0.07."""
    labels = torch.tensor([0, 1, 0, 2, 1, 0, 2])
    features = F.normalize(torch.stack(z[:2], 1), dim=2)
    anchors = torch.cat(features.unbind(1))
    mask = (labels[:, None] == labels).double().repeat(2, 2)
    others = 1 - torch.eye(2 * N, dtype=torch.float64)
    logits = anchors @ anchors.T / T
    logits = logits - logits.max(1, keepdim=True).values
    log_prob = logits - (logits.exp() * others).sum(1, keepdim=True).log()
    mean_log_prob = (mask * others * log_prob).sum(1) / (mask * others).sum(1)
    official = -(T / 0.07) * mean_log_prob.mean()
    close(official, T / 0.07 * reference.sup_con_loss(torch.stack(z[:2], 1), labels, T))


def test_open_clip_losses(z: list[Tensor]) -> None:
    """ClipLoss and SigLipLoss: features normalised by the caller, logit_scale exponentiated."""
    x, y = unit(z[0]), unit(z[1])
    logits = 7.0 * x @ y.T
    labels = torch.arange(N)
    clip = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
    close(reference.clip_loss(x, y, 7.0), clip)
    signs = 2 * torch.eye(N, dtype=torch.float64) - 1
    siglip = -F.logsigmoid(signs * (logits - 3.0)).sum() / N
    close(reference.siglip_loss(x, y, 7.0, -3.0), siglip)


def test_lightly_dcl(z: list[Tensor]) -> None:
    """DCLLoss and DCLWLoss: half the sum of two directions, weights without gradient."""
    a, b = unit(z[0]), unit(z[1])

    def direction(x: Tensor, y: Tensor, weights: Tensor) -> Tensor:
        cross = x @ y.T / T
        both = torch.cat((x @ x.T / T, cross), 1)
        own = torch.eye(N, dtype=torch.bool).repeat(1, 2)
        return (-weights * cross.diagonal() + torch.logsumexp(both[~own].view(N, -1), 1)).mean()

    one = torch.ones(N, dtype=torch.float64)
    close(reference.dcl_loss(z[0], z[1], T), (direction(a, b, one) + direction(b, a, one)) / 2)
    weights = 2 - N * torch.softmax((a * b).sum(1) / 0.5, 0)
    expected = (direction(a, b, weights) + direction(b, a, weights)) / 2
    close(reference.dcl_loss(z[0], z[1], T, sigma=0.5), expected)


def test_wang_isola_code(z: list[Tensor]) -> None:
    """lalign and lunif of the paper's appendix."""
    x, y = unit(z[0]), unit(z[1])
    close(reference.alignment_loss(z[0], z[1]), (x - y).norm(dim=1).pow(2).mean())
    close(
        reference.uniformity_loss(z[0], t=2.0),
        torch.pdist(x, p=2).pow(2).mul(-2.0).exp().mean().log(),
    )


def test_pml_nt_xent_is_a_mean_over_pairs(z: list[Tensor]) -> None:
    """pytorch-metric-learning: each positive pair with "this positive + all negatives"."""
    labels = torch.arange(N).repeat(3)
    rows = unit(torch.cat(z[:3]))
    s = rows @ rows.T / T
    same = labels[:, None] == labels
    losses = []
    for i, p in (same & ~torch.eye(3 * N, dtype=torch.bool)).nonzero().tolist():
        negatives = s[i][~same[i]]
        losses.append(-torch.log(s[i, p].exp() / (s[i, p].exp() + negatives.exp().sum())))
    close(reference.nt_xent_loss(z[:3], temperature=T), torch.stack(losses).mean())


# ------------------------------------------------------------------------------ edges of the truth


def test_false_negatives_in_batch(z: list[Tensor]) -> None:
    """Keys with the query's id are left out, its own positive is not."""
    ids = torch.tensor([0, 1, 0, 2, 1, 0, 3])
    q, k = unit(z[0]), unit(z[1])
    losses = []
    for i in range(N):
        kept = [j for j in range(N) if j == i or ids[j] != ids[i]]
        logits = (q[i] @ k.T / T)[kept]
        losses.append(F.cross_entropy(logits[None], torch.tensor([kept.index(i)])))
    got = reference.info_nce_loss(z[0], z[1], None, T, "none", query_ids=ids)
    close(got, torch.stack(losses))


def test_halves_are_normalised_in_float32() -> None:
    """A zero row in float16 has norm 0, and 1e-12 is 0 in float16: not NaN.

    Its gradient is that of torch's normalize, divided by 1e-12: infinite in float16.
    """
    zero = torch.zeros(3, 4, dtype=torch.float16, requires_grad=True)
    loss = reference.nt_xent_loss(zero, torch.ones(3, 4, dtype=torch.float16))
    assert loss.dtype == torch.float32 and bool(loss.isfinite())
    loss.backward()
    assert zero.grad is not None and not bool(zero.grad.isnan().any())


def test_targets_get_no_gradient(z: list[Tensor]) -> None:
    """Stop-gradient of BYOL and SimSiam."""
    leaves = [x.requires_grad_() for x in z]
    for loss in (reference.byol_loss_symmetric(*leaves), reference.simsiam_loss(*leaves)):
        grads = torch.autograd.grad(loss, leaves, allow_unused=True)
        assert [g is None for g in grads] == [False, True, False, True]


def test_ema_and_rounding() -> None:
    """One step by hand; bfloat16 rounded up with the probability of the lost fraction."""
    target, source = torch.tensor([1.0, -2.0]), torch.tensor([3.0, 2.0])
    reference.ema_update_([target], [source], 0.75)
    assert target.tolist() == [1.5, -1.0]
    half = torch.tensor([1.0], dtype=torch.bfloat16)
    reference.ema_update_([half], [torch.tensor([1.5])], 0.5)
    assert half.item() == 1.25
    x = torch.full((65536,), 1.0 + 0.25 * 2**-7)  # a quarter of the way to the next bfloat16
    rounded = reference.stochastic_round_bf16(x, torch.arange(65536))
    assert set(rounded.tolist()) == {1.0, 1.0 + 2**-7}
    assert (rounded > 1).double().mean().item() == 0.25
    special = torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0])
    kept = reference.stochastic_round_bf16(special, torch.full((4,), 65535)).float()
    assert torch.equal(kept.nan_to_num(9.0, 8.0, 7.0), torch.tensor([8.0, 7.0, 9.0, 0.0]))


def test_enqueue_wraps_and_keeps_the_newest() -> None:
    """K = 3: two keys, then two more over the end, then five at once."""
    keys = torch.eye(5)[:, :5]
    queue, position = reference.enqueue(torch.zeros(3, 5), 0, keys[:2])
    assert position == 2 and torch.equal(queue[:2], keys[:2])
    queue, position = reference.enqueue(queue, position, keys[2:4] * 4.0)
    assert position == 1 and torch.equal(queue, keys[[3, 1, 2]])
    queue, position = reference.enqueue(queue, position, keys)
    assert position == 0 and torch.equal(queue, keys[[2, 3, 4]])


def test_cosine_decay_is_byols() -> None:
    """1 - (1 - base) (cos(pi k / K) + 1) / 2."""
    decay = reference.cosine_decay(0.99, 100)
    for k in (0, 1, 50, 99, 100):
        close(decay(k), 1 - 0.01 * (math.cos(math.pi * k / 100) + 1) / 2)
    assert decay(150) == 1.0 and decay(0) == 0.99


# ------------------------------------------------------------------------------- installed peers


def test_pytorch_metric_learning(z: list[Tensor]) -> None:
    """NTXentLoss, SupConLoss and TripletMarginLoss as they come."""
    pytest.importorskip("pytorch_metric_learning", exc_type=ImportError)
    from pytorch_metric_learning import distances, losses

    pairs = torch.arange(N).repeat(3)
    close(
        losses.NTXentLoss(T)(torch.cat(z[:3]), pairs), reference.nt_xent_loss(z[:3], temperature=T)
    )
    labels = torch.tensor([0, 1, 0, 2, 1, 0, 3])
    close(losses.SupConLoss(T)(z[0], labels), reference.sup_con_loss(z[0], labels, T))
    triplet = losses.TripletMarginLoss(
        margin=T, distance=distances.LpDistance(normalize_embeddings=False)
    )
    close(
        triplet(z[0], labels),
        reference.triplet_loss(z[0], labels, T, mining="all", reduction="mean_nonzero"),
    )


def test_lightly(z: list[Tensor]) -> None:
    """NTXentLoss, DCLLoss and DCLWLoss as they come."""
    pytest.importorskip("lightly.loss", exc_type=ImportError)  # it needs torchvision as well
    from lightly.loss import DCLLoss, DCLWLoss, NTXentLoss

    close(NTXentLoss(T)(z[0], z[1]), reference.nt_xent_loss(z[0], z[1], T))
    close(DCLLoss(T)(z[0], z[1]), reference.dcl_loss(z[0], z[1], T))
    close(DCLWLoss(T, 0.5)(z[0], z[1]), reference.dcl_loss(z[0], z[1], T, sigma=0.5))


def test_open_clip(z: list[Tensor]) -> None:
    """ClipLoss and SigLipLoss as they come."""
    pytest.importorskip("open_clip.loss", exc_type=ImportError)  # it needs torchvision as well
    from open_clip.loss import ClipLoss, SigLipLoss

    x, y = unit(z[0]).float(), unit(z[1]).float()
    scale, bias = torch.tensor(7.0), torch.tensor(-3.0)
    torch.testing.assert_close(ClipLoss()(x, y, scale), reference.clip_loss(x, y, 7.0))
    torch.testing.assert_close(
        SigLipLoss()(x, y, scale, bias), reference.siglip_loss(x, y, 7.0, -3.0)
    )
