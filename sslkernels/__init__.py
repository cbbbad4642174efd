# SPDX-License-Identifier: Apache-2.0
"""Exact contrastive losses, queue and EMA updates in O(N·D) memory, as ordinary torch ops."""

from sslkernels import functional, metrics, reference
from sslkernels._types import ContrastiveMetrics
from sslkernels._version import __version__
from sslkernels.ema import EMA, cosine_decay, ema_update_
from sslkernels.functional import (
    VAEParts,
    alignment_loss,
    byol_loss,
    byol_loss_symmetric,
    clip_loss,
    contrastive_loss,
    dcl_loss,
    feature_reconstruction_loss,
    info_nce_loss,
    margin_loss,
    nt_xent_loss,
    reparameterize,
    siglip_loss,
    simsiam_loss,
    sup_con_loss,
    triplet_loss,
    uniformity_loss,
    vae_loss,
)
from sslkernels.grad_cache import cached_step
from sslkernels.integrations import patch, unpatch
from sslkernels.losses import (
    BYOLLoss,
    CLIPLoss,
    ContrastiveLoss,
    DCLLoss,
    FeatureReconstructionLoss,
    InfoNCELoss,
    MoCoLoss,
    NTXentLoss,
    SigLIPLoss,
    SimSiamLoss,
    SupConLoss,
    TripletLoss,
    VAELoss,
)
from sslkernels.ops.registry import Info, backend, info, set_backend
from sslkernels.queue import KeyQueue
from sslkernels.sampling import StratifiedSampler, k_means
from sslkernels.schedules import beta_schedule

__all__ = [
    "EMA",
    "BYOLLoss",
    "CLIPLoss",
    "ContrastiveLoss",
    "ContrastiveMetrics",
    "DCLLoss",
    "FeatureReconstructionLoss",
    "Info",
    "InfoNCELoss",
    "KeyQueue",
    "MoCoLoss",
    "NTXentLoss",
    "SigLIPLoss",
    "SimSiamLoss",
    "StratifiedSampler",
    "SupConLoss",
    "TripletLoss",
    "VAELoss",
    "VAEParts",
    "__version__",
    "alignment_loss",
    "backend",
    "beta_schedule",
    "byol_loss",
    "byol_loss_symmetric",
    "cached_step",
    "clip_loss",
    "contrastive_loss",
    "cosine_decay",
    "dcl_loss",
    "ema_update_",
    "feature_reconstruction_loss",
    "functional",
    "info",
    "info_nce_loss",
    "k_means",
    "margin_loss",
    "metrics",
    "nt_xent_loss",
    "patch",
    "reference",
    "reparameterize",
    "set_backend",
    "siglip_loss",
    "simsiam_loss",
    "sup_con_loss",
    "triplet_loss",
    "uniformity_loss",
    "unpatch",
    "vae_loss",
]
