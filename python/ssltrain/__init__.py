# SPDX-License-Identifier: Apache-2.0
"""Thin trainers (SimCLR, BYOL, MoCo and their kin) on the fused operations of ``sslkernels``.

The package holds no numerics of its own: losses, queues and averages come from the public API
of ``sslkernels``, augmentations from kornia, probes from scikit-learn. Start with the command
``ssltrain --help`` or with ``docs/training.md``.
"""

from ssltrain.config import TrainConfig
from ssltrain.errors import UserError

__all__ = ["TrainConfig", "UserError"]
