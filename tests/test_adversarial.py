# SPDX-License-Identifier: Apache-2.0
"""Adversarial losses and penalties, and what the variants of BYOL and MoCo reduce to."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

import sslkernels as ssl
from sslkernels import reference


def draw(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    layers = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.Softplus(), nn.Linear(8, 1))
    return layers.double()


# ---- adversarial_loss ------------------------------------------------------------------------------


def test_non_saturating_is_cross_entropy() -> None:
    """With labels 1 for data and 0 for samples; the generator's with labels 1 for samples."""
    fake, real = draw(9), draw(9, seed=1)
    bce = F.binary_cross_entropy_with_logits
    expected = bce(real, torch.ones_like(real)) + bce(fake, torch.zeros_like(fake))
    for form in ("non_saturating", "minimax"):
        torch.testing.assert_close(ssl.adversarial_loss(fake, real, form=form), expected)
    torch.testing.assert_close(ssl.adversarial_loss(fake), bce(fake, torch.ones_like(fake)))
    minimax = ssl.adversarial_loss(fake, form="minimax")
    torch.testing.assert_close(minimax, (1 - fake.sigmoid()).log().mean())


@pytest.mark.parametrize("form", ssl.functional.FORMS)
def test_the_best_discriminator(form: str) -> None:
    """Losses fall as the discriminator improves, and rise for the generator."""
    right, wrong = torch.full((4,), 3.0), torch.full((4,), -3.0)
    assert ssl.adversarial_loss(wrong, right, form=form) < ssl.adversarial_loss(
        right, wrong, form=form
    )
    assert ssl.adversarial_loss(right, form=form) < ssl.adversarial_loss(wrong, form=form)
    module = ssl.AdversarialLoss(form)
    assert module(right, wrong) == ssl.adversarial_loss(right, wrong, form=form)
    assert module(right) == ssl.adversarial_loss(right, form=form)


def test_a_lost_generator_keeps_its_gradient() -> None:
    """At logits of -100 in float32: 1 without saturation, 0 in the minimax form."""
    for form, slope in (("non_saturating", -1.0), ("minimax", 0.0)):
        fake = torch.full((3,), -100.0, requires_grad=True)
        (gradient,) = torch.autograd.grad(ssl.adversarial_loss(fake, form=form), fake)
        torch.testing.assert_close(gradient, torch.full((3,), slope / 3))


def test_logits_of_patches_are_averaged() -> None:
    fake, real = draw(3, 1, 5, 5), draw(3, 1, 5, 5, seed=1)
    rows = ssl.adversarial_loss(fake, real, reduction="none")
    assert rows.shape == (3,)
    torch.testing.assert_close(rows.mean(), ssl.adversarial_loss(fake.view(-1), real.view(-1)))


# ---- penalties -------------------------------------------------------------------------------------


def test_penalties_and_their_gradients() -> None:
    """Against the definition, by way of the parameters of the network: second derivatives."""
    real, fake = draw(5, 3, 4), draw(5, 3, 4, seed=1)
    mix = draw(5, seed=2).sigmoid()
    for call in (
        lambda m, d: m.gradient_penalty(d, real, fake, mix=mix),
        lambda m, d: m.gradient_penalty(d, real, fake, mix=mix, target=0.0, weight=1.0),
        lambda m, d: m.r1_penalty(d, real),
        lambda m, d: m.r1_penalty(d, real, weight=2.0, reduction="sum"),
    ):
        found = []
        for module in (ssl, reference):
            judge = network()
            value = call(module, judge)
            wanted = list(judge.parameters())[:-1]  # the last bias has no say in a slope
            found.append([value, *torch.autograd.grad(value, wanted)])
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b)
            assert bool(b.any())


def test_penalties_of_a_linear_network_are_known() -> None:
    """|grad| is the norm of the weights everywhere, whatever the mixture."""
    judge = nn.Linear(12, 1).double()
    norm = judge.weight.detach().norm()
    real, fake = draw(6, 12), draw(6, 12, seed=1)
    torch.manual_seed(3)
    penalty = ssl.gradient_penalty(judge, real, fake, reduction="none")
    torch.testing.assert_close(penalty.detach(), (10 * (norm - 1) ** 2).expand(6))
    r1 = ssl.r1_penalty(judge, real, reduction="none")
    torch.testing.assert_close(r1.detach(), (5 * norm**2).expand(6))
    with torch.no_grad():  # an evaluation may ask too
        torch.testing.assert_close(ssl.r1_penalty(judge, real), 5 * norm**2)


def test_a_flat_discriminator_has_a_finite_slope() -> None:
    """The norm of zero is not differentiable: its slope is 0 here, not NaN."""
    judge = nn.Linear(4, 1).double()
    nn.init.zeros_(judge.weight)
    ssl.gradient_penalty(judge, draw(3, 4), draw(3, 4, seed=1)).backward()
    assert judge.weight.grad is not None and not judge.weight.grad.any()


# ---- variants --------------------------------------------------------------------------------------


def test_moment_kl_is_that_of_a_fitted_normal() -> None:
    z = 2 * draw(50, 4) + 1
    fitted = Normal(z.mean(0), (z.var(0, unbiased=False) + 1e-4).sqrt())
    expected = kl_divergence(fitted, Normal(torch.zeros(4).double(), torch.ones(4).double()))
    torch.testing.assert_close(ssl.moment_kl_loss(z), expected.mean())
    standard = (z - z.mean(0)) / z.std(0, unbiased=False)
    assert ssl.moment_kl_loss(standard) < 1e-8
    collapsed = ssl.moment_kl_loss(torch.ones(8, 4))
    assert math.isclose(collapsed, (1 + 1e-4 - 1 - math.log(1e-4)) / 2, rel_tol=1e-4)


def test_what_the_variants_reduce_to() -> None:
    p, t, fake, queue = draw(6, 8), draw(6, 8, seed=1), draw(6, seed=2), draw(9, 8, seed=3)
    byol = ssl.byol_loss(p, t)
    assert torch.equal(ssl.adversarial_byol_loss(p, t), byol)
    assert torch.equal(ssl.adversarial_byol_loss(p, t, fake, adversarial_weight=0.0), byol)
    whole = ssl.adversarial_byol_loss(
        p, t, fake, adversarial_weight=2.0, kl_weight=3.0, clr_weight=4.0, form="hinge"
    )
    parts = 2 * ssl.adversarial_loss(fake, form="hinge") + 3 * ssl.moment_kl_loss(p)
    torch.testing.assert_close(whole, byol + parts + 4 * ssl.nt_xent_loss(p, t))
    moco = ssl.info_nce_loss(p, t, queue, 0.07)
    assert torch.equal(ssl.contrastive_kl_loss(p, t, queue, kl_weight=0.0), moco)
    spread = F.normalize(p) * 8**0.5
    torch.testing.assert_close(
        ssl.contrastive_kl_loss(p, t, queue), moco + 0.01 * ssl.moment_kl_loss(spread)
    )


def test_regularised_regression() -> None:
    """((z - mu)^2 - rho)^2 + lambda |theta|^2, by hand and by the definition."""
    p, t = draw(5, 3).requires_grad_(), draw(5, 3, seed=1).requires_grad_()
    theta = [draw(4, seed=2).requires_grad_(), draw(2, 2, seed=3)]
    keywords = {"rho": 0.5, "weight_decay": 0.1, "parameters": theta}
    loss = ssl.byol_loss(p, t, **keywords)
    gaps = (p - t).detach()
    by_hand = sum((float(gap @ gap) - 0.5) ** 2 for gap in gaps) / 5
    by_hand += 0.1 * sum(float((x * x).sum()) for x in (y.detach() for y in theta))
    assert math.isclose(loss.detach(), by_hand, rel_tol=1e-12)
    torch.testing.assert_close(loss, reference.byol_loss(p, t, **keywords))
    loss.backward()
    assert t.grad is None
    torch.testing.assert_close(theta[0].grad, 0.2 * theta[0].detach())
    fourth = ssl.byol_loss(p, t, rho=0.0, reduction="none")
    torch.testing.assert_close(fourth, (p - t).square().sum(1).square())
