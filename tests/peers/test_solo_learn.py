# SPDX-License-Identifier: Apache-2.0
"""solo-learn's functions and ours side by side; on several ranks in test_several_ranks.py."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from side_by_side import check_same, check_same_error, check_signature, leaves, peer

import sslkernels
from sslkernels.integrations import solo_learn as ours

theirs: Any = peer("solo.losses")
if not hasattr(theirs, "mocov2plus_loss_func"):
    pytest.skip("solo-learn is older than its tag 1.0.6", allow_module_level=True)
THEIRS = {name: getattr(theirs, name) for name in ours.__all__}


@pytest.mark.parametrize("name", ours.__all__)
def test_signatures(name: str) -> None:
    check_signature(getattr(ours, name), THEIRS[name])


@pytest.mark.parametrize("temperature", [0.1, 0.5, 1, -0.5])
@pytest.mark.parametrize("views", [2, 3])
@pytest.mark.parametrize("n", [2, 9, 40])
def test_simclr(n: int, views: int, temperature: float) -> None:
    x = torch.randn(n, 8)
    z = torch.cat([x + 0.3 * torch.randn(n, 8) for _ in range(views)])
    supervised = torch.arange(n * views) % 2
    for indexes in (torch.arange(n).repeat(views), supervised):
        check_same(
            lambda z, i=indexes: ours.simclr_loss_func(z, i, temperature),
            lambda z, i=indexes: THEIRS["simclr_loss_func"](z, i, temperature),
            [z],
        )
    # A row without a positive: log 0 in both.
    alone = torch.arange(n * views)
    assert ours.simclr_loss_func(z, alone) == THEIRS["simclr_loss_func"](z, alone) == torch.inf


def test_simclr_does_not_overflow() -> None:
    """Better than theirs: exp(1 / 0.01) is beyond float32."""
    z, indexes = torch.randn(16, 4), torch.arange(8).repeat(2)
    z[8:] = z[:8] + 0.01
    assert not THEIRS["simclr_loss_func"](z, indexes, 0.01).isfinite()
    truth = THEIRS["simclr_loss_func"](z.double(), indexes, 0.01)
    torch.testing.assert_close(
        ours.simclr_loss_func(z, indexes, 0.01).double(), truth, rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("temperature", [0.1, 0.2, 1.0, -0.5])
def test_moco(temperature: float) -> None:
    q, k = (F.normalize(x, dim=1) for x in leaves((9, 8), (9, 8)))
    queue = F.normalize(torch.randn(8, 50), dim=0)
    mine, other = ours.mocov2plus_loss_func, THEIRS["mocov2plus_loss_func"]
    check_same(
        lambda *x: mine(*x, queue.to(x[0]), temperature),
        lambda *x: other(*x, queue.to(x[0]), temperature),
        [q, k],
    )
    check_same(lambda *x: mine(*x, temperature), lambda *x: other(*x, temperature), [q, k, queue])
    check_same(
        lambda *x: ours.mocov3_loss_func(*x, temperature),
        lambda *x: THEIRS["mocov3_loss_func"](*x, temperature),
        [3 * q, k],
    )


def test_byol() -> None:
    for shapes in (((9, 8), (9, 8)), ((3, 5, 8), (3, 5, 8)), ((9, 8), (1, 8))):
        p, z = leaves(*shapes)
        for simplified in (True, False):
            if len(shapes[0]) > 2 and not simplified:
                continue  # theirs sums the wrong dimension then
            check_same(
                lambda p, z=z, s=simplified: ours.byol_loss_func(p, z.to(p), s),
                lambda p, z=z, s=simplified: THEIRS["byol_loss_func"](p, z.to(p), s),
                [p],
            )
    z = z.clone().requires_grad_()
    ours.byol_loss_func(p.requires_grad_(), z).backward()
    assert z.grad is None


def test_dtypes_and_errors() -> None:
    q, k = leaves((9, 8), (9, 8))
    for name, arguments in (
        ("simclr_loss_func", (torch.cat((q, k)), torch.arange(9).repeat(2))),
        ("mocov3_loss_func", (q, k)),
        ("byol_loss_func", (q, k)),
    ):
        narrow = [x.bfloat16() if x.is_floating_point() else x for x in arguments]
        assert getattr(ours, name)(*narrow).dtype == THEIRS[name](*narrow).dtype
    for name, arguments in (
        ("mocov2plus_loss_func", (q, k, torch.randn(5, 20))),
        ("mocov2plus_loss_func", (q, k[:4], torch.randn(8, 20))),
        ("mocov3_loss_func", (q, k[:, :5])),
        ("byol_loss_func", (q, k[:, :5])),
    ):
        check_same_error(
            partial(getattr(ours, name), *arguments), partial(THEIRS[name], *arguments)
        )


def test_patch() -> None:
    with sslkernels.patch("solo_learn", force=True):  # a checkout has no version
        assert theirs.simclr_loss_func is ours.simclr_loss_func
        method = peer("solo.methods.simclr")
        assert method.simclr_loss_func is ours.simclr_loss_func
    assert theirs.simclr_loss_func is THEIRS["simclr_loss_func"]
    assert method.simclr_loss_func is THEIRS["simclr_loss_func"]
