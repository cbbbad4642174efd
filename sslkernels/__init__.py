# SPDX-License-Identifier: Apache-2.0
"""Exact contrastive losses, queue and EMA updates in O(N·D) memory, as ordinary torch autograd ops."""

from sslkernels._version import __version__
from sslkernels.ops.registry import backend, info, set_backend

__all__ = ["__version__", "backend", "info", "set_backend"]
