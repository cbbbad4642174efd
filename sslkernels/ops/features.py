# SPDX-License-Identifier: Apache-2.0
"""Distances of two lists of feature maps as one torch op, ``features``: [N, L], a mean by sample and map.

    out[i, l] = mean over j of rho(feature_l[i, j] - target_l[i, j])

rho is the square, or the smooth L1 of width beta: x^2 / (2 beta) below beta, |x| - beta / 2 above; beta =
0 is |x|, and a beta without a reciprocal in float32 counts as 0.  The targets get no gradient.  An op has
as many arguments as its schema: it takes up to ``SLOTS`` maps in one launch, and a longer list is several.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from sslkernels.backends.arithmetic import accumulation_dtype, widest
from sslkernels.ops import registry
from sslkernels.ops._library import Gradient, Op

SLOTS = 16
SMALLEST_BETA = 2.0**-126


def _slots_type() -> Any:
    fields: list[tuple[str, Any]] = [("f0", Tensor)]
    return NamedTuple("FeatureMaps", fields + [(f"f{i}", Tensor | None) for i in range(1, SLOTS)])


# Maps in slots, each [N, d] of its own dtype.
FeatureMaps: Any = _slots_type()


def _filled(maps: Any) -> list[Tensor]:
    return [x for x in maps if x is not None]


def _forward(features: Any, targets: Any, smooth: bool, beta: float) -> Tensor:
    maps = _filled(features)
    out: Tensor = registry.resolve(maps[0].device).features_forward(
        maps, _filled(targets), smooth, beta
    )
    return out


def _fake(features: Any, targets: Any, smooth: bool, beta: float) -> Tensor:
    maps = _filled(features)
    acc = accumulation_dtype(widest(*maps, *_filled(targets)))
    return maps[0].new_empty((maps[0].shape[0], len(maps)), dtype=acc)


def _slots(maps: list[Tensor | None]) -> Any:
    """Maps in slots; None: not wanted, or not there."""
    return FeatureMaps(*maps, *[None] * (SLOTS - len(maps)))


def _backward(
    features: Any, targets: Any, smooth: bool, beta: float, dout: Tensor, wanted: str
) -> Any:
    maps = _filled(features)
    found = registry.resolve(maps[0].device).features_backward(
        maps, _filled(targets), smooth, beta, dout, [c == "1" for c in wanted]
    )
    return _slots(found)


def _backward_fake(
    features: Any, targets: Any, smooth: bool, beta: float, dout: Tensor, wanted: str
) -> Any:
    maps = _filled(features)
    pairs = zip(maps, wanted, strict=True)
    return _slots([x.new_empty(x.shape) if c == "1" else None for x, c in pairs])


BACKWARD = Op(
    "features_backward(FeatureMaps feature, FeatureMaps target, bool smooth, float beta, Tensor dout, "
    "str wanted) -> FeatureMaps",
    _backward,
    _backward_fake,
    values=(FeatureMaps,),
)


def _gradient(
    features: Any, targets: Any, smooth: bool, beta: float, dout: Tensor, need: Any, *_: Any
) -> dict[str, Tensor]:
    wanted = "".join(str(int(need[i])) for i in range(len(_filled(features))))
    found = BACKWARD.below(features, targets, smooth, beta, dout, wanted)
    return {f"feature_{name}": g for name, g in found._asdict().items()}


def _tangent(
    features: Any, targets: Any, smooth: bool, beta: float, dfeatures: Any, *_: Any
) -> tuple[Tensor]:
    # A sample of a map has a number of its own: its tangent is <gradient, tangent>.
    maps, out = _filled(features), _fake(features, targets, smooth, beta)
    one, zero = torch.ones_like(out), torch.zeros_like(out[:, 0])
    moved = [None] * len(maps) if dfeatures is None else list(dfeatures)[: len(maps)]
    wanted = "".join(str(int(x is not None)) for x in moved)
    gradients = BACKWARD.below(features, targets, smooth, beta, one, wanted)
    columns = [
        zero if x is None else (gradients[i].to(one.dtype) * x.to(one.dtype)).sum(1)
        for i, x in enumerate(moved)
    ]
    return (torch.stack(columns, 1),)


FEATURES = Op(
    "features(FeatureMaps feature, FeatureMaps target, bool smooth, float beta) -> Tensor",
    _forward,
    _fake,
    values=(FeatureMaps,),
    gradient=Gradient(
        tuple(f"feature_f{i}" for i in range(SLOTS)),
        ("out",),
        lambda features, targets, smooth, beta, out: (features, targets, smooth, beta),
        _gradient,
        _tangent,
    ),
)


def features(
    maps: list[Tensor], targets: list[Tensor], smooth: bool = False, beta: float = 1.0
) -> Tensor:
    """[N, L]: mean distance by sample and map; see the module."""
    beta = beta if beta >= SMALLEST_BETA else 0.0
    parts = []
    for start in range(0, len(maps), SLOTS):
        some, wanted = maps[start : start + SLOTS], targets[start : start + SLOTS]
        none = [None] * (SLOTS - len(some))
        parts.append(FEATURES(FeatureMaps(*some, *none), FeatureMaps(*wanted, *none), smooth, beta))
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)
