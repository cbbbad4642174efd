# SPDX-License-Identifier: Apache-2.0
"""The ops with their values written out flat: a test names what it needs of ``Tiles`` or ``Problem``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sslkernels.backends.interface import Contrastive, Paired, Problem, Thresholds, Tiles
from sslkernels.ops import attend as attend_op
from sslkernels.ops import contrastive as contrastive_op
from sslkernels.ops import extremes as extremes_op
from sslkernels.ops import paired as paired_op
from sslkernels.ops import pairwise as pairwise_op


def pairwise(
    kind: Any,
    q: Tensor,
    k: Tensor | None = None,
    *,
    want_col: bool = False,
    threshold_row: Tensor | None = None,
    threshold_col: Tensor | None = None,
    **tiles: Any,
) -> Any:
    above = Thresholds(threshold_row, threshold_col)
    return pairwise_op.pairwise(kind, Tiles(q, k, **tiles), want_col=want_col, above=above)


def attend(q: Tensor, k: Tensor, *, threshold: Tensor | None = None, **tiles: Any) -> Any:
    return attend_op.attend(Tiles(q, k, **tiles), threshold)


def extremes(
    q: Tensor, k: Tensor | None = None, *, bias_k: Tensor | None = None, **tiles: Any
) -> Any:
    return extremes_op.extremes(Tiles(q, k, bias=bias_k, **tiles))


def contrastive(
    layout: str,
    a: Tensor,
    b: Tensor,
    bank: Tensor | None = None,
    *,
    want_rank: bool = False,
    **problem: Any,
) -> Contrastive:
    b = a.detach() if layout == "classes" else b
    return contrastive_op.contrastive(Problem(layout, a, b, bank, **problem), want_rank)


# Layouts whose rows are cat(a, b), and all.
JOINED = ("joint", "decoupled")
LAYOUTS = (*JOINED, "cross", "both", "bank", "sigmoid", "classes")
# Those that count the negatives above the positive.
RANKED = ("joint", "cross", "both", "bank")


def own_arguments(layout: str, n: int, acc: torch.dtype = torch.float32) -> dict[str, Any]:
    """What a layout has beyond the others' arguments; every third class is a single row."""
    if layout == "sigmoid":
        return {"bias": torch.tensor(-1.5, dtype=acc, requires_grad=True)}
    if layout == "classes":
        return {"ids_q": torch.arange(n) % max(2 * n // 3, 2)}
    return {"sigma": 0.5} if layout == "decoupled" else {}


def paired(query: Tensor, positive_key: Tensor, negative_keys: Tensor, **problem: Any) -> Any:
    return paired_op.paired(Paired(query, positive_key, negative_keys, **problem))
