# SPDX-License-Identifier: Apache-2.0
"""The losses as functions."""

from sslkernels.functional.adversarial import (
    FORMS,
    adversarial_byol_loss,
    adversarial_loss,
    contrastive_kl_loss,
    gradient_penalty,
    moment_kl_loss,
    r1_penalty,
)
from sslkernels.functional.autoencoders import (
    DISTANCES,
    LIKELIHOODS,
    NORMALIZATIONS,
    VAEParts,
    feature_reconstruction_loss,
    reparameterize,
    vae_loss,
)
from sslkernels.functional.contrastive import clip_loss, dcl_loss, info_nce_loss, nt_xent_loss
from sslkernels.functional.metric_learning import contrastive_loss, margin_loss, triplet_loss
from sslkernels.functional.pairwise import (
    alignment_loss,
    siglip_loss,
    sup_con_loss,
    uniformity_loss,
)
from sslkernels.functional.regression import byol_loss, byol_loss_symmetric, simsiam_loss

__all__ = [
    "DISTANCES",
    "FORMS",
    "LIKELIHOODS",
    "NORMALIZATIONS",
    "VAEParts",
    "adversarial_byol_loss",
    "adversarial_loss",
    "alignment_loss",
    "byol_loss",
    "byol_loss_symmetric",
    "clip_loss",
    "contrastive_kl_loss",
    "contrastive_loss",
    "dcl_loss",
    "feature_reconstruction_loss",
    "gradient_penalty",
    "info_nce_loss",
    "margin_loss",
    "moment_kl_loss",
    "nt_xent_loss",
    "r1_penalty",
    "reparameterize",
    "siglip_loss",
    "simsiam_loss",
    "sup_con_loss",
    "triplet_loss",
    "uniformity_loss",
    "vae_loss",
]
