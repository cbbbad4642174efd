# SPDX-License-Identifier: Apache-2.0
"""info-nce-pytorch and ours side by side."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from side_by_side import check_same, check_same_error, check_signature, check_state, leaves, peer

import sslkernels
from sslkernels.integrations import info_nce as ours

theirs = peer("info_nce")
Theirs, their_function = theirs.InfoNCE, theirs.info_nce


def test_signatures() -> None:
    check_signature(ours.InfoNCE, Theirs)
    check_signature(ours.info_nce, their_function)
    check_state(ours.InfoNCE(), Theirs())


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("temperature", [0.1, 1, 0.02, -0.5])
@pytest.mark.parametrize(
    ("mode", "negatives"),
    [
        ("unpaired", None),
        ("whatever", None),
        ("unpaired", (13, 8)),
        ("paired", (9, 5, 8)),
        ("unpaired", (1, 8)),
        ("paired", (9, 1, 8)),
    ],
)
def test_loss(mode: str, negatives: Any, temperature: float, reduction: str) -> None:
    inputs = leaves((9, 8), (9, 8)) + ([] if negatives is None else [torch.randn(negatives)])
    dloss = torch.rand(9) if reduction == "none" else None
    arguments = {"temperature": temperature, "reduction": reduction, "negative_mode": mode}
    slack = 1e-5 if temperature == 0.02 else None  # float32 of logits to 50
    check_same(ours.InfoNCE(**arguments), Theirs(**arguments), inputs, dloss=dloss, slack=slack)
    check_same(
        partial(ours.info_nce, **arguments),
        partial(their_function, **arguments),
        inputs,
        dloss=dloss,
        slack=slack,
    )
    if negatives is not None:  # a queue: no gradient
        constant = inputs[2]
        check_same(
            lambda q, k: ours.info_nce(q, k, constant.to(q), **arguments),
            lambda q, k: their_function(q, k, constant.to(q), **arguments),
            inputs[:2],
            dloss=dloss,
            slack=slack,
        )


def test_temperature_as_a_tensor() -> None:
    q, k = leaves((9, 8), (9, 8))
    check_same(
        lambda t: ours.info_nce(q.to(t), k.to(t), temperature=t),
        lambda t: their_function(q.to(t), k.to(t), temperature=t),
        [torch.tensor(0.2)],
    )
    several = torch.rand(9, 1) + 0.1
    torch.testing.assert_close(
        ours.info_nce(q, k, temperature=several), their_function(q, k, temperature=several)
    )


def test_dtypes() -> None:
    q, k, n = leaves((9, 8), (9, 8), (20, 8))
    for dtype in (torch.bfloat16, torch.float16):
        narrow = [x.to(dtype) for x in (q, k, n)]
        loss = ours.info_nce(*narrow)
        assert loss.dtype == their_function(*narrow).dtype == dtype
        torch.testing.assert_close(
            loss.double(), their_function(*(x.double() for x in narrow)), rtol=4e-3, atol=0
        )


def test_errors() -> None:
    q = torch.randn(4, 8)
    for arguments in (
        (q[0], q),
        (q, q[0]),
        (q, q[:3]),
        (q, q[:, :5]),
        (q, q, q[0]),
        (q, q, q[:, :5]),
    ):
        check_same_error(partial(ours.info_nce, *arguments), partial(their_function, *arguments))
    paired = {"negative_mode": "paired"}
    for keys in (q, torch.randn(3, 2, 8), torch.randn(4, 2, 5)):
        check_same_error(
            partial(ours.info_nce, q, q, keys, **paired),
            partial(their_function, q, q, keys, **paired),
        )
    check_same_error(
        partial(ours.info_nce, q, q, reduction="median"),
        partial(their_function, q, q, reduction="median"),
    )
    with pytest.raises(ValueError, match="negative_mode"):  # theirs is an UnboundLocalError
        ours.info_nce(q, q, q, negative_mode="both")


def test_patch() -> None:
    with sslkernels.patch("info_nce"):
        assert theirs.InfoNCE is ours.InfoNCE and theirs.info_nce is ours.info_nce
    assert theirs.InfoNCE is Theirs
