# SPDX-License-Identifier: Apache-2.0
"""The losses as functions."""

from sslkernels.functional.contrastive import clip_loss, dcl_loss, info_nce_loss, nt_xent_loss

__all__ = ["clip_loss", "dcl_loss", "info_nce_loss", "nt_xent_loss"]
