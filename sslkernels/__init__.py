# SPDX-License-Identifier: Apache-2.0
"""Exact contrastive losses, queue and EMA updates in O(N·D) memory, as ordinary torch autograd ops."""

from sslkernels._types import ContrastiveMetrics
from sslkernels._version import __version__
from sslkernels.functional import clip_loss, dcl_loss, info_nce_loss, nt_xent_loss
from sslkernels.ops.registry import backend, info, set_backend

__all__ = [
    "ContrastiveMetrics",
    "__version__",
    "backend",
    "clip_loss",
    "dcl_loss",
    "info",
    "info_nce_loss",
    "nt_xent_loss",
    "set_backend",
]
