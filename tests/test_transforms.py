# SPDX-License-Identifier: Apache-2.0
"""Forward-mode differentiation and the transforms of torch.func: the right number, or an error."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from helpers import engine, engines
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.utils.checkpoint import checkpoint

import sslkernels
from sslkernels import reference

N, D = 7, 5


def cdist(a: Tensor, b: Tensor, **_: Any) -> Tensor:
    squared = (a[:, None] - b[None]).square().sum(-1)
    apart = squared > 0
    return torch.where(apart, torch.where(apart, squared, 1.0).sqrt(), 0.0)


class Definition:
    """``reference``; torch's pdist and cdist have no forward mode, so they are written out."""

    def __getattr__(self, name: str) -> Any:
        return getattr(reference, name)

    def uniformity_loss(self, z: Tensor, *, normalize: bool = True) -> Tensor:
        z = torch.nn.functional.normalize(z) if normalize else z
        i, j = torch.triu_indices(N, N, 1)
        return (-2.0 * (z[i] - z[j]).square().sum(1)).exp().mean().log()

    def triplet_loss(self, *arguments: Any, **options: Any) -> Tensor:
        with mock.patch("torch.cdist", cdist):
            return reference.triplet_loss(*arguments, **options)


TRUTH = Definition()
LABELS = torch.arange(N) % 3
OTHER = torch.randn(N, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
BANK = torch.randn(11, D, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
OWN = torch.randn(N, 4, D, generator=torch.Generator().manual_seed(3), dtype=torch.float64)

# Losses that can be differentiated twice.
TWICE = (
    "byol",
    "simsiam",
    "alignment",
    "contrastive",
    "margin",
    "byol regularised",
    "adversarial",
    "adversarial hinge",
    "adversarial generator",
    "moment kl",
)

# Every loss as a function of (embeddings [N, D], second embeddings [N, D], temperature) of a namespace.
LOSSES: dict[str, Callable[..., Tensor]] = {
    "nt_xent": lambda f, x, y, t, **k: f.nt_xent_loss(x, y, t, **k),
    "nt_xent raw": lambda f, x, y, t, **k: f.nt_xent_loss(x, y, t, normalize=False, **k),
    "nt_xent three views": lambda f, x, y, t, **k: f.nt_xent_loss([x, y, OTHER], None, t, **k),
    "info_nce": lambda f, x, y, t, **k: f.info_nce_loss(x, y, None, t, **k),
    "info_nce queue": lambda f, x, y, t, **k: f.info_nce_loss(x, y, BANK, t, **k),
    "info_nce learned": lambda f, x, y, t, **k: f.info_nce_loss(x, OTHER, y, t, **k),
    "info_nce paired": lambda f, x, y, t, **k: f.info_nce_loss(
        x, y, OWN, t, negative_mode="paired", **k
    ),
    "info_nce paired learned": lambda f, x, y, t, **k: f.info_nce_loss(
        x, OTHER, OWN * y[:, None], t, negative_mode="paired", **k
    ),
    "clip": lambda f, x, y, t, **k: f.clip_loss(x, y, 1 / t, normalize=True, **k),
    "siglip": lambda f, x, y, t, **k: f.siglip_loss(x, y, 1 / t, t, normalize=True, **k),
    "sup_con": lambda f, x, y, t, **k: f.sup_con_loss(x + y, LABELS, t, **k),
    "dcl": lambda f, x, y, t, **k: f.dcl_loss(x, y, t, **k),
    "byol": lambda f, x, y, t, **k: t * f.byol_loss(x * y, OTHER, **k),
    "simsiam": lambda f, x, y, t, **k: t * f.simsiam_loss(x, OTHER, y, OTHER, **k),
    "alignment": lambda f, x, y, t, **k: t * f.alignment_loss(x, y, **k),
    "contrastive": lambda f, x, y, t, **k: t * f.contrastive_loss(x, y, LABELS == 1, **k),
    "margin": lambda f, x, y, t, **k: t * f.margin_loss(x, y, OTHER, x, **k),
    "byol regularised": lambda f, x, y, t, **k: t * f.byol_loss(x * y, OTHER, rho=0.5, **k),
    "adversarial": lambda f, x, y, t, **k: t * f.adversarial_loss(x, y, **k),
    "adversarial hinge": lambda f, x, y, t, **k: t * f.adversarial_loss(x, y, form="hinge", **k),
    "adversarial generator": lambda f, x, y, t, **k: t * f.adversarial_loss(x * y, **k),
    "vae": lambda f, x, y, t, **k: f.vae_loss(x * y, OTHER.sigmoid(), x, y, beta=t, **k),
    "vae gaussian": lambda f, x, y, t, **k: f.vae_loss(
        x, y, x, y, likelihood="gaussian", x_log_variance=x + y, beta=t, **k
    ),
    "features": lambda f, x, y, t, **k: (
        t
        * f.feature_reconstruction_loss(
            [x, y[:, :2]], [OTHER, OTHER[:, :2]], weights=[1.0, 0.5], **k
        )
    ),
    "features smooth": lambda f, x, y, t, **k: (
        t * f.feature_reconstruction_loss([x, y], [OTHER, OTHER], distance="smooth_l1", **k)
    ),
}
UNREDUCED = {
    "uniformity": lambda f, x, y, t: t * f.uniformity_loss(x * y),
    "uniformity raw": lambda f, x, y, t: t * f.uniformity_loss(x + y, normalize=False),
    "moment kl": lambda f, x, y, t: t * f.moment_kl_loss(x * y),
    "adversarial byol": lambda f, x, y, t: (
        t * f.adversarial_byol_loss(x * y, OTHER, x, kl_weight=0.5, clr_weight=0.5)
    ),
    "contrastive kl": lambda f, x, y, t: f.contrastive_kl_loss(x, y, BANK, t, kl_weight=0.5),
    **{
        f"triplet {mining} {distance}": lambda f, x, y, t, m=mining, d=distance: (
            t * f.triplet_loss(x + y, LABELS, 1.0, mining=m, distance=d)
        )
        for mining in ("hard", "semihard", "all")
        for distance in ("euclidean", "cosine")
    },
}
CASES: dict[str, Callable[..., Tensor]] = {
    f"{name} {reduction}": lambda f, *a, loss=loss, r=reduction: loss(f, *a, reduction=r)
    for name, loss in LOSSES.items()
    for reduction in ("mean", "sum", "none")
} | UNREDUCED
on_engine = pytest.mark.parametrize("name", engines())
on_case = pytest.mark.parametrize("case", CASES)


def inputs(seed: int = 0) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    return draw(N, D), draw(N, D), draw(()).abs() + 0.3


def close(ours: Tensor, truth: Tensor) -> None:
    torch.testing.assert_close(ours, truth, rtol=1e-9, atol=1e-9)


@on_case
@on_engine
def test_jvp_is_that_of_the_definition(name: str, case: str) -> None:
    x, dx = inputs(0), inputs(5)
    function = CASES[case]
    value, tangent = jvp(lambda *a: function(TRUTH, *a), x, dx)
    with engine(name):
        ours, moved = jvp(lambda *a: function(sslkernels, *a), x, dx)
    close(ours, value)
    close(moved, tangent)
    assert bool(tangent.any())


@on_case
def test_dual_numbers_without_a_graph(case: str) -> None:
    """The older interface, where nothing requires grad and no transform is at work."""
    x, dx = inputs(0), inputs(5)
    tangents = []
    for namespace in (sslkernels, TRUTH):
        with forward_ad.dual_level(), torch.no_grad():
            dual = [forward_ad.make_dual(a, b) for a, b in zip(x, dx, strict=True)]
            out = forward_ad.unpack_dual(CASES[case](namespace, *dual))
            assert out.tangent is not None
            tangents.append(out.tangent)
    close(*tangents)


@on_case
def test_reverse_transforms(case: str) -> None:
    function, x = CASES[case], inputs(0)
    ours, reverse = vjp(lambda *a: function(sslkernels, *a), *x)
    truth, reverse_truth = vjp(lambda *a: function(TRUTH, *a), *x)
    close(ours, truth)
    seed = torch.linspace(0.5, 1.5, truth.numel(), dtype=truth.dtype).view(truth.shape)
    for a, b in zip(reverse(seed), reverse_truth(seed), strict=True):
        close(a, b)
    total = lambda f: lambda *a: function(f, *a).sum()  # noqa: E731
    for a, b in zip(
        grad(total(sslkernels), (0, 1, 2))(*x), grad(total(TRUTH), (0, 1, 2))(*x), strict=True
    ):
        close(a, b)


@pytest.mark.skipif(not hasattr(torch.library, "register_vmap"), reason="needs torch 2.5")
@pytest.mark.parametrize("case", [c for c in CASES if c.endswith("none")] + ["nt_xent mean"])
def test_jacobians(case: str) -> None:
    function, x = CASES[case], inputs(0)
    truth = jacrev(lambda a: function(TRUTH, a, *x[1:]))(x[0])
    close(jacrev(lambda a: function(sslkernels, a, *x[1:]))(x[0]), truth)
    close(jacfwd(lambda a: function(sslkernels, a, *x[1:]))(x[0]), truth)


@pytest.mark.skipif(not hasattr(torch.library, "register_vmap"), reason="needs torch 2.5")
@on_case
def test_vmap_is_a_loop(case: str) -> None:
    function = CASES[case]
    batch = [torch.stack(column) for column in zip(*(inputs(s) for s in range(3)), strict=True)]
    ours = vmap(lambda *a: function(sslkernels, *a))(*batch)
    close(ours, torch.stack([function(sslkernels, *inputs(s)) for s in range(3)]))
    # Per-sample gradients; the temperature is shared.
    shared = (0, 0, None)
    ours = vmap(grad(lambda *a: function(sslkernels, *a).sum()), in_dims=shared)(
        *batch[:2], batch[2][0]
    )
    for s in range(3):
        leaf = inputs(s)[0].requires_grad_()
        function(TRUTH, leaf, inputs(s)[1], batch[2][0]).sum().backward()
        close(ours[s], leaf.grad)


@pytest.mark.parametrize(
    "case",
    [
        c
        for c in CASES
        if c.split()[0] in ("nt_xent", "info_nce", "clip", "siglip", "dcl", "vae", "features")
    ],
)
def test_second_derivatives_raise(case: str) -> None:
    """In every order of the two modes: a zero would be believed."""
    function, x = CASES[case], inputs(0)
    scalar = lambda a: function(sslkernels, a, *x[1:]).sum()  # noqa: E731
    with pytest.raises(RuntimeError, match="second derivatives are not implemented"):
        jvp(grad(scalar), (x[0],), (torch.ones_like(x[0]),))  # forward over reverse
    with pytest.raises(RuntimeError, match="second derivatives are not implemented"):
        grad(lambda a: grad(scalar)(a).sum())(x[0])  # reverse over reverse
    with pytest.raises(RuntimeError, match="second derivatives are not implemented"):
        hessian(scalar)(x[0])
    with pytest.raises(RuntimeError, match="second derivatives are not implemented"):
        grad(lambda a: jvp(scalar, (a,), (torch.ones_like(a),))[1])(x[0])  # reverse over forward


@pytest.mark.parametrize("case", TWICE)
def test_second_derivatives(case: str) -> None:
    """Of losses that have them, in every order of the two modes, and as a penalty of a gradient."""
    function, x = {**LOSSES, **UNREDUCED}[case], inputs(0)
    one = torch.ones_like(x[0])
    found = []
    for namespace in (sslkernels, TRUTH):
        scalar = lambda a, f=namespace: function(f, a, *x[1:]).sum()  # noqa: E731
        leaf = x[0].clone().requires_grad_()
        (slope,) = torch.autograd.grad(scalar(leaf), leaf, create_graph=True)
        found.append(
            [
                hessian(scalar)(x[0]),
                jvp(grad(scalar), (x[0],), (one,))[1],  # forward over reverse
                grad(lambda a, s=scalar: grad(s)(a).sum())(x[0]),  # reverse over reverse
                grad(lambda a, s=scalar: jvp(s, (a,), (one,))[1])(x[0]),  # reverse over forward
                torch.autograd.grad(slope.square().sum(), leaf)[0],
            ]
        )
    for ours, truth in zip(*found, strict=True):
        close(ours, truth)


@on_case
def test_checkpointed(case: str) -> None:
    """What was saved is computed again, once for every reading: a second one raises."""
    function, grads = CASES[case], []
    for again in (False, True):
        leaves = [x.requires_grad_() for x in inputs(0)]
        call = lambda *a: function(sslkernels, *a)  # noqa: E731
        out = checkpoint(call, *leaves, use_reentrant=False) if again else call(*leaves)
        grads.append(torch.autograd.grad(out.sum(), leaves))
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)


def test_a_tangent_of_the_keys_of_attend_raises() -> None:
    from sslkernels.backends.interface import Tiles
    from sslkernels.ops.attend import attend

    q, k, scale = OTHER, BANK, torch.tensor(2.0, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"attend: the keys get no gradient"):
        jvp(lambda keys: attend(Tiles(q, keys, scale)).lse, (k,), (k,))


def test_updates_refuse_transforms() -> None:
    queue = sslkernels.KeyQueue(8, D)
    with pytest.raises(RuntimeError, match="enqueue: .*torch.func"):
        vmap(lambda keys: queue.enqueue(keys))(torch.randn(2, 3, D))
    target = torch.zeros(3)
    with pytest.raises(RuntimeError, match="ema_update_: .*torch.func"):
        jvp(lambda s: sslkernels.ema_update_([target], [s], 0.5), (target,), (target,))
    assert len(queue) == 0 and not bool(target.any())


def test_the_reported_case() -> None:
    z = torch.eye(4)
    v = torch.arange(16.0).view(4, 4)
    _, tangent = jvp(lambda x: sslkernels.nt_xent_loss(x, z.flip(0), 0.5), (z,), (v,))
    _, truth = jvp(lambda x: reference.nt_xent_loss(x, z.flip(0), 0.5), (z,), (v,))
    torch.testing.assert_close(tangent, truth, rtol=1e-5, atol=1e-5)
    assert abs(float(truth)) > 8


@on_case
def test_jit_trace_records_the_op(case: str) -> None:
    """A trace sees the op, not the numbers that its kernels once wrote into memory."""
    function = CASES[case]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch: tracing is deprecated, shapes become constants
        traced = torch.jit.trace(lambda *a: function(sslkernels, *a), inputs(0))
    close(traced(*inputs(1)), function(sslkernels, *inputs(1)))


def test_a_tensor_that_outlives_its_transform_is_an_argument_like_any_other() -> None:
    left = []

    def leak(a: torch.Tensor) -> torch.Tensor:
        left.append(a)
        return a.sum()

    x = torch.eye(4)
    grad(leak)(x)
    for loss in (sslkernels.nt_xent_loss, sslkernels.info_nce_loss, sslkernels.dcl_loss):
        close(loss(left[0], x.flip(0)), loss(x, x.flip(0)))
    scale, bias = torch.tensor(2.0), torch.tensor(-1.0)
    close(
        sslkernels.siglip_loss(left[0], x.flip(0), scale, bias),
        sslkernels.siglip_loss(x, x.flip(0), scale, bias),
    )
