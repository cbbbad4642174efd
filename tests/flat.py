# SPDX-License-Identifier: Apache-2.0
"""The ops with their values written out flat: a test names what it needs of ``Tiles`` or ``Problem``."""

from __future__ import annotations

from typing import Any

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
    return contrastive_op.contrastive(Problem(layout, a, b, bank, **problem), want_rank)


def paired(query: Tensor, positive_key: Tensor, negative_keys: Tensor, **problem: Any) -> Any:
    return paired_op.paired(Paired(query, positive_key, negative_keys, **problem))
