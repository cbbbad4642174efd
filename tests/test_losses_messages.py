# SPDX-License-Identifier: Apache-2.0
"""What every loss says of bad input: the op, the argument, what must hold, and what came."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import sslkernels as ssl

GOOD = torch.ones(8, 4)
LABELS = torch.zeros(8, dtype=torch.int64)
ERRORS = [
    (
        lambda: ssl.nt_xent_loss(torch.ones(8, 128), torch.ones(8, 64)),
        ValueError,
        r"nt_xent_loss: z1 and z2 must have the same shape, got \[8, 128\] and \[8, 64\]",
    ),
    (
        lambda: ssl.nt_xent_loss(GOOD.long(), GOOD.long()),
        TypeError,
        "nt_xent_loss: z1 must be float64, float32, bfloat16 or float16, got int64",
    ),
    (
        lambda: ssl.nt_xent_loss(GOOD, GOOD.to("meta")),
        ValueError,
        "nt_xent_loss: z1 and z2 must be on the same device, got cpu and meta",
    ),
    (lambda: ssl.nt_xent_loss(GOOD, GOOD, 0.0), ValueError, "temperature must be > 0, got 0.0"),
    (
        lambda: ssl.nt_xent_loss(GOOD, GOOD, float("nan")),
        ValueError,
        "temperature must be > 0, got nan",
    ),
    (
        lambda: ssl.nt_xent_loss(GOOD, GOOD, "0.1"),
        TypeError,
        "temperature must be a number, got str",
    ),
    (
        lambda: ssl.nt_xent_loss(GOOD, GOOD, torch.ones(2)),
        ValueError,
        r"temperature must be a number or a tensor of shape \[\] or \[1\], got shape \[2\]",
    ),
    (
        lambda: ssl.nt_xent_loss(GOOD, GOOD, reduction="avg"),
        ValueError,
        r"reduction must be one of \['mean', 'sum', 'none'\], got 'avg'",
    ),
    (
        lambda: ssl.nt_xent_loss(GOOD[None], GOOD[None]),
        ValueError,
        r"z1 must have 2 dimensions, got shape \[1, 8, 4\]",
    ),
    (lambda: ssl.nt_xent_loss(GOOD), TypeError, "z2 must be a tensor, got None"),
    (lambda: ssl.nt_xent_loss([GOOD]), ValueError, "at least two views are needed, got 1"),
    (lambda: ssl.nt_xent_loss([GOOD, GOOD], GOOD), TypeError, "z2 must be left out"),
    (
        lambda: ssl.nt_xent_loss([GOOD, GOOD, GOOD[:3]]),
        ValueError,
        r"views\[0\] and views\[2\] must have the same shape",
    ),
    (
        lambda: ssl.info_nce_loss(GOOD, GOOD, GOOD[:, :3]),
        ValueError,
        r"query and negative_keys must have the same last dimension, got \[8, 4\] and \[8, 3\]",
    ),
    (
        lambda: ssl.info_nce_loss(GOOD, GOOD, GOOD, negative_mode="both"),
        ValueError,
        "negative_mode must be 'unpaired' or 'paired', got 'both'",
    ),
    (
        lambda: ssl.info_nce_loss(GOOD, GOOD, GOOD[:3, None], negative_mode="paired"),
        ValueError,
        "paired negative_keys must have one block of rows for each query",
    ),
    (
        lambda: ssl.info_nce_loss(GOOD, GOOD, GOOD, query_ids=LABELS),
        ValueError,
        "query_ids with negative_keys needs negative_ids",
    ),
    (
        lambda: ssl.info_nce_loss(GOOD, GOOD, negative_ids=LABELS),
        ValueError,
        "negative_ids needs query_ids and negative_keys",
    ),
    (
        lambda: ssl.info_nce_loss(GOOD, GOOD, query_ids=LABELS[:3]),
        ValueError,
        r"query_ids must have shape \[8\], got \[3\]",
    ),
    (
        lambda: ssl.info_nce_loss(GOOD, GOOD, query_ids=GOOD[:, 0]),
        TypeError,
        "query_ids must be integers, got float32",
    ),
    (
        lambda: ssl.clip_loss(GOOD, [1.0], 1.0),
        TypeError,
        "text_features must be a tensor, got list",
    ),
    (
        lambda: ssl.siglip_loss(GOOD, GOOD, 1.0, "b"),
        TypeError,
        r"logit_bias must be a number or a tensor of shape \[\] or \[1\], got str",
    ),
    (
        lambda: ssl.sup_con_loss(GOOD, LABELS[:5]),
        ValueError,
        r"labels must have shape \[8\], got \[5\]",
    ),
    (
        lambda: ssl.dcl_loss(GOOD, GOOD, sigma=-1.0),
        ValueError,
        "dcl_loss: sigma must be > 0, got -1.0",
    ),
    (
        lambda: ssl.triplet_loss(GOOD, LABELS, mining="easy"),
        ValueError,
        r"mining must be one of \['hard', 'semihard', 'all'\], got 'easy'",
    ),
    (lambda: ssl.triplet_loss(GOOD, LABELS, distance="l1"), ValueError, "distance must be one of"),
    (
        lambda: ssl.triplet_loss(GOOD, LABELS, reduction="none"),
        ValueError,
        "reduction must be one of",
    ),
    (
        lambda: ssl.contrastive_loss(GOOD, GOOD, LABELS[:2]),
        ValueError,
        r"contrastive_loss: same must have shape \[8\], got \[2\]",
    ),
    (
        lambda: ssl.margin_loss(GOOD, GOOD, GOOD, GOOD, form="article"),
        ValueError,
        "form must be one of",
    ),
    (lambda: ssl.uniformity_loss(GOOD, 0.0), ValueError, "t must be > 0, got 0.0"),
    (lambda: ssl.alignment_loss(GOOD, GOOD, alpha=0), ValueError, "alpha must be > 0, got 0"),
    (
        lambda: ssl.vae_loss(GOOD, GOOD[:, :3], GOOD, GOOD),
        ValueError,
        r"vae_loss: reconstruction and x must have the same shape, got \[8, 4\] and \[8, 3\]",
    ),
    (
        lambda: ssl.vae_loss(GOOD[0], GOOD[0], GOOD, GOOD),
        ValueError,
        r"vae_loss: reconstruction must have at least 2 dimensions, got shape \[4\]",
    ),
    (
        lambda: ssl.vae_loss(GOOD, GOOD, GOOD[:5], GOOD[:5]),
        ValueError,
        r"vae_loss: mean and x must have as many rows, got \[5, 4\] and \[8, 4\]",
    ),
    (
        lambda: ssl.vae_loss(GOOD, GOOD, GOOD, GOOD, likelihood="laplace"),
        ValueError,
        r"vae_loss: likelihood must be one of \['bernoulli', 'gaussian'\], got 'laplace'",
    ),
    (
        lambda: ssl.vae_loss(GOOD, GOOD, GOOD, GOOD, x_log_variance=0.0),
        ValueError,
        "vae_loss: x_log_variance is for likelihood 'gaussian', got 'bernoulli'",
    ),
    (
        lambda: ssl.vae_loss(GOOD, GOOD, GOOD, GOOD, free_bits=-1.0),
        ValueError,
        r"vae_loss: free_bits must be at least 0, got -1\.0",
    ),
    (
        lambda: ssl.reparameterize(GOOD, GOOD[0], 1),
        ValueError,
        r"reparameterize: mean and log_variance must have the same shape",
    ),
    (
        lambda: ssl.reparameterize(GOOD, GOOD, torch.zeros((), dtype=torch.int64, device="meta")),
        ValueError,
        "reparameterize: seed and mean must be on the same device, got meta and cpu",
    ),
    (
        lambda: ssl.feature_reconstruction_loss([GOOD, GOOD], [GOOD]),
        ValueError,
        "features and targets must have the same length, at least 1, got 2 and 1",
    ),
    (
        lambda: ssl.feature_reconstruction_loss([], []),
        ValueError,
        "must have the same length, at least 1, got 0 and 0",
    ),
    (
        lambda: ssl.feature_reconstruction_loss([GOOD, GOOD[:5]], [GOOD, GOOD[:5]]),
        ValueError,
        r"features\[0\] and features\[1\] must have as many samples, got 8 and 5",
    ),
    (
        lambda: ssl.feature_reconstruction_loss(GOOD, GOOD, weights=[1.0, 2.0]),
        ValueError,
        "weights must be 1 numbers, one a map, got 2",
    ),
    (
        lambda: ssl.feature_reconstruction_loss(GOOD, GOOD, weights=torch.ones(2)),
        ValueError,
        r"weights must have one element a map, \[1\], got \[2\]",
    ),
    (
        lambda: ssl.feature_reconstruction_loss(GOOD, GOOD, distance="l1"),
        ValueError,
        r"distance must be one of \['squared', 'smooth_l1'\], got 'l1'",
    ),
    (
        lambda: ssl.feature_reconstruction_loss(GOOD, GOOD, normalize="all"),
        ValueError,
        r"normalize must be one of \['channels', 'targets'\], got 'all'",
    ),
    (
        lambda: ssl.feature_reconstruction_loss(GOOD, GOOD, beta=-1),
        ValueError,
        r"beta must be at least 0, got -1",
    ),
    (lambda: ssl.feature_reconstruction_loss(3, GOOD), TypeError, "features must be a tensor or"),
    (
        lambda: ssl.adversarial_loss(GOOD, GOOD[:3]),
        ValueError,
        r"adversarial_loss: fake and real must have the same shape, got \[8, 4\] and \[3, 4\]",
    ),
    (
        lambda: ssl.adversarial_loss(GOOD, form="saturating"),
        ValueError,
        "adversarial_loss: form must be one of .*, got 'saturating'",
    ),
    (lambda: ssl.adversarial_loss(GOOD[0, 0]), ValueError, "at least 1 dimension, got shape"),
    (
        lambda: ssl.gradient_penalty(lambda x: 3, GOOD, GOOD),
        TypeError,
        "gradient_penalty: discriminator must return a tensor of logits, got int",
    ),
    (
        lambda: ssl.gradient_penalty(lambda x: x, GOOD, GOOD, mix=torch.ones(3)),
        ValueError,
        r"gradient_penalty: mix must have 8 elements, got \[3\]",
    ),
    (
        lambda: ssl.r1_penalty(lambda x: x, GOOD.long()),
        TypeError,
        "r1_penalty: real must be float64",
    ),
    (lambda: ssl.moment_kl_loss(GOOD, eps=0.0), ValueError, "eps must be > 0, got 0"),
    (
        lambda: ssl.adversarial_byol_loss(GOOD, GOOD[:2]),
        ValueError,
        "adversarial_byol_loss: prediction and target must have the same shape",
    ),
    (
        lambda: ssl.contrastive_kl_loss(GOOD, GOOD, kl_weight="1"),
        TypeError,
        "contrastive_kl_loss: kl_weight must be a number, got str",
    ),
    (lambda: ssl.AdversarialLoss("x"), ValueError, "AdversarialLoss: form must be one of"),
    (
        lambda: ssl.byol_loss(GOOD, GOOD, weight_decay=0.1),
        ValueError,
        "byol_loss: weight_decay and parameters need rho",
    ),
    (
        lambda: ssl.byol_loss(GOOD, GOOD, rho=0.0, weight_decay=0.1, reduction="none"),
        ValueError,
        "byol_loss: weight_decay needs a reduction",
    ),
    (
        lambda: ssl.byol_loss(GOOD, GOOD, rho=-1.0),
        ValueError,
        "byol_loss: rho must be at least 0, got -1",
    ),
    (
        lambda: ssl.VAELoss(likelihood="x"),
        ValueError,
        "VAELoss: likelihood must be one of",
    ),
    (
        lambda: ssl.FeatureReconstructionLoss(distance="x"),
        ValueError,
        "FeatureReconstructionLoss: distance must be one of",
    ),
    (lambda: ssl.NTXentLoss(temperature=-1.0), ValueError, "NTXentLoss: temperature must be > 0"),
    (lambda: ssl.DCLLoss(reduction="x"), ValueError, "DCLLoss: reduction must be one of"),
    (lambda: ssl.TripletLoss(mining="x"), ValueError, "TripletLoss: mining must be one of"),
    (
        lambda: ssl.MoCoLoss(8, 4)(GOOD, GOOD[:3]),
        ValueError,
        "MoCoLoss: query and key must have the same",
    ),
]


@pytest.mark.parametrize(("call", "kind", "message"), ERRORS)
def test_messages(call: Callable, kind: type, message: str) -> None:
    """Each names the op, the argument, what must hold and what came."""
    with pytest.raises(kind, match=message):
        call()
