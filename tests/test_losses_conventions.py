# SPDX-License-Identifier: Apache-2.0
"""Conventions of the losses: empty batches, reductions, row order, metrics, modules, the queue."""

from __future__ import annotations

import pytest
import torch
from helpers import check_budget
from loss_cases import CASES, negatives, views
from torch import nn

import sslkernels as ssl
from sslkernels import reference


def test_single_sample_and_no_rows() -> None:
    """N = 1 has no negatives; no rows at all have the mean 0."""
    one, empty = torch.randn(1, 4), torch.randn(0, 4)
    assert ssl.nt_xent_loss(one, one) == 0
    assert ssl.info_nce_loss(one, one, temperature=0.3) == 0
    assert ssl.info_nce_loss(one, one, torch.randn(0, 4)) == 0  # an empty queue
    assert ssl.clip_loss(one, one, 3.0) == 0
    assert ssl.uniformity_loss(one) == 0
    torch.testing.assert_close(ssl.dcl_loss(one, one, 0.5), torch.tensor(-2.0))
    for function in (
        ssl.nt_xent_loss,
        ssl.info_nce_loss,
        ssl.dcl_loss,
        ssl.byol_loss,
        ssl.alignment_loss,
    ):
        assert function(empty, empty) == 0
        if function is not ssl.byol_loss:
            assert function(empty, empty, reduction="none").numel() == 0


def test_sup_con_rows_without_positives_are_left_out() -> None:
    """Their loss is 0, and the mean counts the others only."""
    z = torch.randn(5, 4)
    labels = torch.tensor([3, 3, 7, -1, 3])
    rows = ssl.sup_con_loss(z, labels, reduction="none")
    assert rows[2] == 0 and rows[3] == 0 and bool((rows[[0, 1, 4]] > 0).all())
    torch.testing.assert_close(ssl.sup_con_loss(z, labels), rows[[0, 1, 4]].mean())
    assert ssl.sup_con_loss(z, torch.arange(5)) == 0


def test_sup_con_of_two_views_is_nt_xent() -> None:
    """Unique labels, two views: the same formula."""
    z1, z2 = views(20, 8)
    expected = ssl.nt_xent_loss(z1, z2, 0.3)
    torch.testing.assert_close(
        ssl.sup_con_loss(torch.stack((z1, z2), 1), torch.arange(20), 0.3), expected
    )
    both = ssl.sup_con_loss(torch.cat((z1, z2)), torch.arange(20).repeat(2), 0.3)
    torch.testing.assert_close(both, expected)


def test_reductions_agree() -> None:
    """mean = none.mean() and sum = none.sum(), for every loss that has them."""
    for case in CASES:
        if case.name.startswith(("triplet", "uniformity", "sup_con", "moment")) or (
            case.name in ("adversarial_byol_loss", "contrastive_kl_loss")
        ):
            continue
        inputs = case.make(9, 6)
        rows = case.call(ssl, inputs, reduction="none")
        assert rows.ndim == 1
        torch.testing.assert_close(case.call(ssl, inputs, reduction="mean"), rows.mean())
        torch.testing.assert_close(case.call(ssl, inputs, reduction="sum"), rows.sum())


def test_row_order_of_nt_xent() -> None:
    """Reduction "none" gives [2N] in the order of cat(z1, z2)."""
    z1, z2 = views(7, 5)
    rows = ssl.nt_xent_loss(z1, z2, reduction="none")
    swapped = ssl.nt_xent_loss(z2, z1, reduction="none")
    torch.testing.assert_close(rows, swapped.roll(7))
    assert not torch.allclose(rows[:7], rows[7:])


@pytest.mark.parametrize("backend", ["chunked", None])
def test_metrics_agree_with_the_reference(backend: str | None) -> None:
    """return_metrics of every loss that has it, ids of false negatives included."""
    z1, z2, z3 = views(40, 12, 3, noise=1.5)
    queue, ids = negatives(40, 12), torch.arange(40) % 11
    paired = torch.randn(40, 9, 12)
    calls = [
        ("nt_xent_loss", (z1, z2, 0.2), {}),
        ("nt_xent_loss", ([z1, z2, z3], None, 0.2), {}),
        ("nt_xent_loss", (z1, z2, 0.2), {"normalize": False}),
        ("info_nce_loss", (z1, z2), {}),
        ("info_nce_loss", (z1, z2), {"query_ids": ids}),
        ("info_nce_loss", (z1, z2, queue), {}),
        (
            "info_nce_loss",
            (z1, z2, queue),
            {"query_ids": ids, "negative_ids": torch.arange(83) % 13},
        ),
        ("info_nce_loss", (z1, z2, paired), {"negative_mode": "paired"}),
        (
            "info_nce_loss",
            (z1, z2, paired),
            {
                "negative_mode": "paired",
                "query_ids": ids,
                "negative_ids": torch.arange(360).view(40, 9) % 11,
            },
        ),
        ("clip_loss", (z1, z2, 5.0), {"normalize": True}),
    ]
    with ssl.backend(backend):
        for name, arguments, keywords in calls:
            loss, got = getattr(ssl, name)(*arguments, return_metrics=True, **keywords)
            truth, expected = getattr(reference, name)(*arguments, return_metrics=True, **keywords)
            torch.testing.assert_close(loss, truth)
            assert 0 < expected.top1 < 1, "the metric must be able to be wrong"
            assert isinstance(got, ssl.ContrastiveMetrics)
            for field, a, b in zip(got._fields, got, expected, strict=True):
                assert a.ndim == 0 and not a.requires_grad
                torch.testing.assert_close(
                    a, b, atol=1e-5, rtol=1e-5, msg=f"{name} {field}: {a} {b}"
                )


def test_learnable_scalars_get_gradients_in_modules() -> None:
    """An nn.Parameter as temperature is a parameter of the module."""
    loss = ssl.NTXentLoss(nn.Parameter(torch.tensor(0.3)))
    assert [name for name, _ in loss.named_parameters()] == ["temperature"]
    loss(*views(8, 4)).backward()
    assert loss.temperature.grad is not None and loss.temperature.grad.abs() > 0


def test_modules_are_the_functions() -> None:
    """Each module gives what its function gives, with the arguments it was made with."""
    z1, z2, z3, z4 = views(12, 6, 4)
    labels, same = torch.arange(12) % 4, torch.arange(12) % 2 == 0
    for module, function, arguments in (
        (
            ssl.NTXentLoss(0.3, normalize=False),
            ssl.nt_xent_loss(z1, z2, 0.3, normalize=False),
            (z1, z2),
        ),
        (ssl.NTXentLoss(0.3), ssl.nt_xent_loss([z1, z2, z3], temperature=0.3), ([z1, z2, z3],)),
        (ssl.InfoNCELoss(0.3, "sum"), ssl.info_nce_loss(z1, z2, z3, 0.3, "sum"), (z1, z2, z3)),
        (ssl.CLIPLoss(normalize=True), ssl.clip_loss(z1, z2, 2.0, normalize=True), (z1, z2, 2.0)),
        (ssl.SigLIPLoss(), ssl.siglip_loss(z1, z2, 0.2, -1.0), (z1, z2, 0.2, -1.0)),
        (ssl.SupConLoss(0.3), ssl.sup_con_loss(z1, labels, 0.3), (z1, labels)),
        (ssl.DCLLoss(0.3, sigma=0.4), ssl.dcl_loss(z1, z2, 0.3, sigma=0.4), (z1, z2)),
        (ssl.BYOLLoss(reduction="sum"), ssl.byol_loss(z1, z2, reduction="sum"), (z1, z2)),
        (ssl.SimSiamLoss(), ssl.simsiam_loss(z1, z2, z3, z4), (z1, z2, z3, z4)),
        (
            ssl.TripletLoss(0.4, mining="all"),
            ssl.triplet_loss(z1, labels, 0.4, mining="all"),
            (z1, labels),
        ),
        (ssl.ContrastiveLoss(3.0), ssl.contrastive_loss(z1, z2, same, 3.0), (z1, z2, same)),
    ):
        assert torch.equal(module(*arguments), function), type(module).__name__
        assert "=" in repr(module)


def test_moco_loss_contrasts_before_it_enqueues() -> None:
    """The queue of the loss is that before the batch; evaluation enqueues nothing."""
    loss = ssl.MoCoLoss(queue_size=24, dim=6, temperature=0.2)
    assert loss(*views(8, 6)) == 0  # an empty queue has no negatives
    query, key = views(9, 6)
    before = loss.queue.keys.clone()
    expected = ssl.info_nce_loss(query, key, before, 0.2)
    torch.testing.assert_close(loss(query, key), expected)
    assert len(loss.queue) == 17
    loss.eval()
    loss(query, key)
    assert len(loss.queue) == 17


def test_moco_gradient_survives_the_enqueue() -> None:
    """A full queue is overwritten between forward and backward."""
    query, key = views(10, 6)
    loss = ssl.MoCoLoss(queue_size=10, dim=6, temperature=0.2)
    loss(*views(10, 6, noise=2.0))
    bank = loss.queue.keys.clone()
    leaf = query.clone().requires_grad_()
    value = loss(leaf, key)  # enqueues over every row of the bank
    assert not torch.allclose(loss.queue.keys, bank)
    (got,) = torch.autograd.grad(value, leaf)
    leaf = query.clone().requires_grad_()
    (expected,) = torch.autograd.grad(reference.info_nce_loss(leaf, key, bank, 0.2), leaf)
    check_budget(got, expected, expected, 1e-5, "dquery")


@pytest.mark.parametrize("form", ["relative", "floor"])
def test_margin_loss_moves_the_pair_it_says(form: str) -> None:
    """Form "relative" pulls (i, j) together, (k, l) apart; "floor" lowers the larger term."""
    z_i, z_j = torch.tensor([[0.0, 0.0]]), torch.tensor([[1.0, 0.0]])
    z_k, z_l = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 2.0]])
    leaves = [x.requires_grad_() for x in (z_i, z_j, z_k, z_l)]
    loss = ssl.margin_loss(*leaves, margin=1.5, form=form)
    grads = torch.autograd.grad(loss, leaves)
    if form == "relative":
        assert loss == 0.5 and grads[1][0, 0] == 1 and grads[3][0, 1] == -1
    else:
        assert loss == 2.0 and not bool(grads[1].any()) and grads[3][0, 1] == 1
