# SPDX-License-Identifier: Apache-2.0
"""Hard positives and negatives as one torch op, ``extremes``.

max_same_i = argmax of S_ij over j with the id of i,    min_other_i = argmin over the other j
"""

from __future__ import annotations

import torch

from sslkernels.backends.interface import Extremes, Tiles
from sslkernels.ops import registry
from sslkernels.ops._library import Op, no_autocast


def _forward(tiles: Tiles) -> Extremes:
    with no_autocast(tiles.q.device):
        result: Extremes = registry.resolve(tiles.q.device).extremes(tiles)
    return result


def _fake(tiles: Tiles) -> Extremes:
    index = tiles.q.new_empty((tiles.n,), dtype=torch.int64)
    return Extremes(index, torch.empty_like(index))


EXTREMES = Op("extremes(*Tiles) -> Extremes", _forward, _fake)


def extremes(tiles: Tiles) -> Extremes:
    """Per row, the arg-max of S over keys with the same id and the arg-min over the others.

    Args:
        tiles: What S is: ids are needed; the bias is [M] here, for the columns.

    Returns:
        Extremes(max_same, min_other): int64 indices, -1 where there is none.
    """
    result: Extremes = EXTREMES(tiles)
    return result
