# SPDX-License-Identifier: Apache-2.0
"""The variational loss, its noise and feature reconstruction: what the tests of all losses do not ask."""

from __future__ import annotations

import functools
import math
import pickle
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import SLACK, check_budget, check_loss, threads
from peaks import Training
from torch import Tensor
from torch.distributions import Bernoulli, Normal, kl_divergence
from torch.utils._python_dispatch import TorchDispatchMode

import sslkernels as ssl
from sslkernels import reference
from sslkernels.backends import autoencoders_torch
from sslkernels.backends.rounding import philox_words


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def batch(n: int, d: int, z: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    x = (draw(n, d, seed=1) > 0).float()
    given = (3 * draw(n, d), x, draw(n, z, seed=2), draw(n, z, seed=3))
    return [y.to(dtype) for y in given]


# ---- vae_loss --------------------------------------------------------------------------------------

# (N, D, Z): one element, more and fewer than a vector and than the 512 of a block, no codes, no data.
SIZES = [
    (1, 1, 1),
    (2, 15, 17),
    (3, 511, 513),
    (2, 512, 512),
    (65, 1025, 3),
    (4, 5, 0),
    (4, 0, 5),
    (0, 3, 3),
]


@pytest.mark.parametrize("dtype", SLACK, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_sizes_around_the_blocks(on_engine: str, size, dtype: torch.dtype) -> None:
    n, d, _ = size
    inputs = batch(*size, dtype)
    spread = draw(n, d, seed=4).to(dtype)
    for keywords in ({}, {"likelihood": "gaussian"}):
        more = [spread] if keywords else []

        def call(module, *x, k=keywords):
            spread = {"x_log_variance": x[4]} if len(x) > 4 else {}
            return module.vae_loss(*x[:4], beta=0.5, reduction="none", **k, **spread)

        check_loss(
            lambda *x, c=call: c(ssl, *x),
            lambda *x, c=call: c(reference, *x),
            [*inputs, *more],
            slack=max(SLACK[dtype], 5e-6),
            name=f"{on_engine} {size} {dtype}",
            dloss=torch.linspace(0.5, 1.5, max(n, 1))[:n],
        )


def test_against_torch_distributions() -> None:
    """Another implementation of both terms, and its gradients."""
    logits, x, mean, log_variance = (y.double().requires_grad_() for y in batch(7, 30, 5))
    prior = Normal(torch.zeros(5).double(), torch.ones(5).double())
    kl = kl_divergence(Normal(mean, (log_variance / 2).exp()), prior).sum(1)
    fits = {
        "bernoulli": -Bernoulli(logits=logits, validate_args=False).log_prob(x.detach()).sum(1),
        "gaussian": -Normal(logits, 1.0).log_prob(x.detach()).sum(1),
        "learnt": -Normal(logits, math.exp(0.3 / 2)).log_prob(x.detach()).sum(1),
    }
    leaves = (logits, mean, log_variance)
    for name, fit in fits.items():
        truth = fit + 0.7 * kl
        loss, parts = ssl.vae_loss(
            logits,
            x.detach(),
            mean,
            log_variance,
            likelihood="gaussian" if name == "learnt" else name,
            x_log_variance=0.3 if name == "learnt" else None,
            beta=0.7,
            reduction="none",
            return_parts=True,
        )
        torch.testing.assert_close(loss, truth)
        torch.testing.assert_close(parts.reconstruction, fit.detach())
        torch.testing.assert_close(parts.kl, kl.detach())
        assert not parts.kl.requires_grad
        for a, b in zip(
            torch.autograd.grad(loss.sum(), leaves),
            torch.autograd.grad(truth.sum(), leaves, retain_graph=True),
            strict=True,
        ):
            torch.testing.assert_close(a, b)


def test_images_are_rows_of_their_elements() -> None:
    logits, x, mean, log_variance = batch(6, 48, 4)
    images = [y.view(6, 3, 4, 4) for y in (logits, x)]
    for k in ({}, {"likelihood": "gaussian", "x_log_variance": images[0]}):
        flat = {**k, **({"x_log_variance": logits} if k else {})}
        loss = ssl.vae_loss(*images, mean, log_variance, **k)
        assert torch.equal(loss, ssl.vae_loss(logits, x, mean, log_variance, **flat))


def test_one_learnt_variance_is_the_mean_squared_error(on_engine: str) -> None:
    """At its optimum; the gradient of the variance is there and 0."""
    r, x, mean, log_variance = batch(20, 33, 4, torch.float64)
    s = (r - x).square().mean().log()
    loss = ssl.VAELoss(likelihood="gaussian", x_log_variance=torch.nn.Parameter(s.clone()))
    value = loss(r, x, mean, log_variance)
    value.backward()
    assert loss.x_log_variance.grad is not None and abs(loss.x_log_variance.grad) < 1e-12
    kl = ssl.vae_loss(r, x, mean, log_variance, return_parts=True)[1].kl
    entropy = 33 / 2 * (1 + math.log(2 * math.pi) + float(s))
    assert math.isclose(float(value.detach() - kl), entropy, rel_tol=1e-12)


def test_free_bits_are_of_the_batch(on_engine: str) -> None:
    """Dimension 0 stays below on average though one sample is above: it counts 0.5, no gradient."""
    _, x, mean, log_variance = batch(4, 3, 2)
    mean = torch.tensor([[1.5, 2.0], [0.0, 2.0], [0.0, 2.0], [0.0, 2.0]]).requires_grad_()
    log_variance = torch.zeros(4, 2).requires_grad_()
    loss, parts = ssl.vae_loss(x, x, mean, log_variance, free_bits=0.5, return_parts=True)
    torch.testing.assert_close(parts.kl, torch.tensor(0.5 + 2.0))
    grads = torch.autograd.grad(loss, (mean, log_variance))
    assert torch.equal(grads[0], torch.tensor([0.0, 0.5]).expand(4, 2))
    assert not grads[1].any()
    above = ssl.vae_loss(x, x, mean * 3, log_variance, free_bits=0.5)
    torch.testing.assert_close(above, ssl.vae_loss(x, x, mean * 3, log_variance))


@pytest.mark.parametrize("x", [0.0, 1.0])
def test_confident_logits_keep_their_digits(on_engine: str, x: float) -> None:
    """softplus(30) - 30 would be 0 in float32; the loss of a right answer is 9.4e-14."""
    logits = torch.full((1, 4), 30.0 if x else -30.0)
    zero = torch.zeros(1, 1)
    loss = ssl.vae_loss(logits, torch.full((1, 4), x), zero, zero)
    assert math.isclose(float(loss), 4 * math.exp(-30), rel_tol=1e-5)
    wrong = ssl.vae_loss(-logits, torch.full((1, 4), x), zero, zero)
    assert math.isclose(float(wrong), 120.0, rel_tol=1e-6)


def test_overflow_is_inf_and_not_a_number_out_of_range(on_engine: str) -> None:
    _, x, mean, log_variance = batch(2, 3, 2)
    assert ssl.vae_loss(x, x, mean, log_variance + 1000.0) == torch.inf
    assert ssl.reparameterize(mean, log_variance + 1000.0, 1).isinf().all()


# ---- memory ----------------------------------------------------------------------------------------


def _vae(module, likelihood: str, *x: Tensor) -> Tensor:
    spread = {"x_log_variance": x[4]} if len(x) > 4 else {}
    return module.vae_loss(*x[:4], likelihood=likelihood, **spread)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian"])
def test_peak_of_vae_loss_is_its_gradients(
    likelihood: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    """At 4096 x 784, forward and backward.

    In float32 the gradients that are asked for are a third of what eager holds; beyond them it is
    next to nothing.
    """
    logits, x, mean, log_variance = batch(4096, 784, 20, dtype)
    spread = [draw(4096, 784, seed=4).to(dtype)] if likelihood == "gaussian" else []
    leaves = [logits, mean, log_variance, *spread]

    def peak(module) -> int:
        def loss(r: Tensor, m: Tensor, v: Tensor, *s: Tensor) -> Tensor:
            return _vae(module, likelihood, r, x, m, v, *s)

        return Training(loss, *leaves).peak(tmp_path)

    with threads(2):
        ours, eager = peak(ssl), peak(reference)
    gradients = sum(leaf.nbytes for leaf in leaves)
    said = f"{ours / 2**20:.2f} of {eager / 2**20:.2f} MiB, gradients {gradients / 2**20:.2f}"
    assert ours <= gradients + 2**18, said
    assert 20 * (ours - gradients) <= eager - gradients, said
    assert (3 if dtype == torch.bfloat16 else 2.8) * ours <= eager, said


def _bound(
    r: Tensor, x: Tensor, mean: Tensor, log_variance: Tensor, *, logits: bool = True
) -> Tensor:
    """As examples write it: of logits, or of probabilities."""
    if logits:
        fit = F.binary_cross_entropy_with_logits(r, x, reduction="sum")
    else:
        fit = F.binary_cross_entropy(r.sigmoid(), x, reduction="sum")
    return (fit - 0.5 * torch.sum(1 + log_variance - mean.pow(2) - log_variance.exp())) / len(x)


@pytest.mark.parametrize("logits", [True, False], ids=["logits", "probabilities"])
def test_peak_beside_torchs_own_losses(logits: bool, tmp_path: Path) -> None:
    """What is held beyond the gradients: next to nothing, and one or two more tensors of N x D.

    The gradient of the logits is one such tensor for everybody, so no loss that gives it out can
    hold less than half (a third) of the other.
    """
    r, x, mean, log_variance = batch(4096, 784, 20)
    leaves = (r, mean, log_variance)

    def peak(loss) -> int:
        return Training(lambda r, m, v: loss(r, x, m, v), *leaves).peak(tmp_path)

    with threads(2):
        ours, eager = peak(ssl.vae_loss), peak(functools.partial(_bound, logits=logits))
    gradients = sum(leaf.nbytes for leaf in leaves)
    said = f"{ours / 2**20:.2f} of {eager / 2**20:.2f} MiB, gradients {gradients / 2**20:.2f}"
    assert ours - gradients <= 2**18 and 100 * (ours - gradients) <= eager - gradients, said
    assert (1.85 if logits else 2.85) * ours <= eager, said


def test_peak_of_a_step_with_its_decoder(tmp_path: Path) -> None:
    """Sample, linear decoder and loss: logits and their gradient; eager has one or two tensors more."""
    _, x, mean, log_variance = batch(4096, 784, 20)
    weight = draw(20, 784, seed=6)

    def eager(loss, m: Tensor, v: Tensor, weight: Tensor) -> Tensor:
        deviation = torch.exp(0.5 * v)
        z = m + deviation * torch.randn_like(deviation)
        return loss(z @ weight, x, m, v)

    def ours(m: Tensor, v: Tensor, weight: Tensor) -> Tensor:
        return ssl.vae_loss(ssl.reparameterize(m, v, 3) @ weight, x, m, v)

    def peak(step) -> float:
        return Training(step, mean, log_variance, weight).peak(tmp_path) / x.nbytes

    with threads(2):
        held = [
            peak(ours),
            *(peak(functools.partial(eager, f)) for f in (_bound, reference.vae_loss)),
        ]
    assert held[0] < 2.1 and held[1] > 3 and held[2] > 4, held


def test_peak_of_reparameterize_is_its_results(tmp_path: Path) -> None:
    """z, its gradient and that of the log-variance; eager also keeps noise and deviation."""
    mean, log_variance = draw(4096, 784), draw(4096, 784, seed=1)

    def eager(mean: Tensor, log_variance: Tensor, seed: int) -> Tensor:
        std = torch.exp(0.5 * log_variance)
        return mean + std * torch.randn_like(std)

    def peak(sample) -> int:
        return Training(lambda m, v: sample(m, v, 3).square().sum(), mean, log_variance).peak(
            tmp_path
        )

    with threads(2):
        ours, theirs = peak(ssl.reparameterize), peak(eager)
    assert ours <= 4.01 * mean.nbytes < theirs, f"{ours / mean.nbytes} {theirs / mean.nbytes}"


# ---- reparameterize --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", SLACK, ids=str)
@pytest.mark.parametrize("shape", [(1,), (3,), (4,), (5, 103), (2, 2, 3, 129), (0, 4), ()], ids=str)
def test_noise_is_the_definition(on_engine: str, shape, dtype: torch.dtype) -> None:
    """Philox in Python's integers, at every place in a group of four; values and gradients."""
    mean, log_variance = draw(*shape).to(dtype), draw(*shape, seed=1).to(dtype)
    seed = 2**45 + 12345
    noise = reference.normal_noise(mean.numel(), seed).view(shape)
    if dtype in (torch.bfloat16, torch.float16):
        m, v = (y.requires_grad_() for y in (mean, log_variance))
        z = ssl.reparameterize(m, v, seed)
        exact = m.double() + (v.double() / 2).exp() * noise
        assert z.dtype == dtype
        # Rounded once: half a unit in the last place.
        eps = torch.finfo(dtype).eps
        assert ((z.double() - exact).abs() <= 0.51 * eps * exact.abs() + 1e-4).all()
        return
    check_loss(
        lambda m, v: ssl.reparameterize(m, v, seed),
        lambda m, v: reference.reparameterize(m, v, seed),
        [mean, log_variance],
        slack=2e-5 if dtype == torch.float32 else 1e-13,  # near 1, log(u) is a rounding of u
        loss_slack=2e-5 if dtype == torch.float32 else 1e-13,
        dloss=torch.linspace(-1, 2, max(1, mean.numel()))[: mean.numel()].view(shape),
    )


def test_words_are_those_of_the_other_generator() -> None:
    """Those of the averages' generator: of four elements the first word is a radius."""
    seed = torch.tensor(-3)
    words = philox_words(20, (1 << 64) - 3, 0, autoencoders_torch.STREAM)[::4]
    noise = autoencoders_torch.normal_noise(20, seed, torch.float64)
    radius = (-2 * ((words.double() + 0.5) / 2**32).log()).sqrt()
    torch.testing.assert_close(noise.view(5, 4)[:, :2].norm(dim=1), radius)


def test_seeds_are_64_bits() -> None:
    zero = torch.zeros(64)
    sample = lambda seed: ssl.reparameterize(zero, zero, seed)  # noqa: E731
    assert torch.equal(sample(-1), sample(2**64 - 1))
    assert torch.equal(sample(5), sample(torch.tensor([5])))
    different = [sample(s) for s in (0, 1, 2**32, 2**32 + 1, 2**63)]
    assert len({tuple(x.tolist()) for x in different}) == 5
    with pytest.raises(ValueError, match="seed must have at most 64 bits"):
        sample(2**64)
    with pytest.raises(TypeError, match=r"seed must be an integer, got 1\.5"):
        sample(1.5)
    with pytest.raises(TypeError, match=r"int64 tensor, got torch\.float32"):
        sample(torch.ones(()))
    with pytest.raises(ValueError, match=r"shape \[\] or \[1\], got shape \[2\]"):
        sample(torch.tensor([1, 2]))


def test_noise_is_normal(on_engine: str) -> None:
    """A million numbers: moments, tails, neighbours, seeds; bounds of five deviations."""
    n = 1 << 20
    zero = torch.zeros(n, dtype=torch.float64)
    noise, other = (ssl.reparameterize(zero, zero, seed) for seed in (11, 12))
    five = 5 / math.sqrt(n)
    moments = [(noise**k).mean().item() for k in (1, 2, 3, 4)]
    deviations = (1.0, math.sqrt(2), math.sqrt(15), math.sqrt(96))
    for got, want, deviation in zip(moments, (0, 1, 0, 3), deviations, strict=True):
        assert abs(got - want) < five * deviation
    for x, y in ((noise[:-1], noise[1:]), (noise[:-4], noise[4:]), (noise, other)):
        assert abs((x * y).mean()) < five
        assert abs(((x * x - 1) * (y * y - 1)).mean()) < 2 * five
    edges = torch.linspace(-3, 3, 61, dtype=torch.float64)
    inner = Normal(0.0, 1.0).cdf(edges).diff() * n
    counts = torch.histogram(noise, edges)[0]
    chi_square = ((counts - inner) ** 2 / inner).sum().item()
    assert chi_square < 60 + 5 * math.sqrt(2 * 60)
    assert 4.5 < noise.abs().max() < math.sqrt(2 * 33 * math.log(2)) + 1e-6


def test_same_bits_for_any_number_of_threads(on_engine: str) -> None:
    mean, log_variance = draw(300_001), draw(300_001, seed=1)
    results = []
    for n in (1, 2, 3):
        with threads(n):
            leaves = [mean.clone().requires_grad_(), log_variance.clone().requires_grad_()]
            z = ssl.reparameterize(*leaves, 9)
            results.append([z, *torch.autograd.grad(z.square().sum(), leaves)])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_backward_draws_the_same_noise(on_engine: str) -> None:
    """From 1 eps it takes eps / 2: bit for bit, strides included."""
    zero = torch.zeros(7, 33).t().requires_grad_()
    eps = ssl.reparameterize(torch.zeros(33, 7), zero, 4)
    (slope,) = torch.autograd.grad(eps.sum(), zero)
    assert torch.equal(slope, eps / 2)


def test_a_seed_written_before_backward_is_noticed() -> None:
    zero, seed = torch.zeros(4, requires_grad=True), torch.tensor(1)
    z = ssl.reparameterize(zero, zero, seed)
    seed += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z.sum().backward()


def test_reparameterize_in_torch() -> None:
    """opcheck, full graphs that do not recompile for a seed, forward mode, mixed dtypes."""
    mean, log_variance = (draw(4, 6, seed=s).requires_grad_() for s in (0, 1))
    op = torch.ops.sslkernels.reparameterize.default
    torch.library.opcheck(op, (mean, log_variance, torch.tensor(3)))
    count = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    torch.compiler.reset()
    compiled = torch.compile(ssl.reparameterize, backend=count, fullgraph=True)
    for seed in (3, 4, 5, 6):
        z = compiled(mean, log_variance, seed)
        torch.testing.assert_close(z, ssl.reparameterize(mean, log_variance, seed))
    assert count.frame_count <= 2
    args = [x.detach().double() for x in (mean, log_variance)]
    tangents = [draw(4, 6, seed=s).double() for s in (2, 3)]
    ours, truth = (
        torch.func.jvp(lambda *a, m=m: m.reparameterize(*a, 3), tuple(args), tuple(tangents))
        for m in (ssl, reference)
    )
    torch.testing.assert_close(ours, truth)
    for m, v, dtype in (
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.float64, torch.float32, torch.float64),
    ):
        assert ssl.reparameterize(mean.to(m), log_variance.to(v), 1).dtype == dtype


# ---- features --------------------------------------------------------------------------------------


@pytest.mark.parametrize("distance", ["squared", "smooth_l1"])
def test_maps_of_many_shapes_and_dtypes(on_engine: str, distance: str) -> None:
    """Around the 512 of a block and the 8192 of a unit; more maps than a launch has slots."""
    shapes = [(3, 1), (3, 511), (3, 513), (3, 4, 8, 16), (3, 2, 64, 65), (3, 0)] + [(3, 5)] * 14
    features = [draw(*s, seed=i) for i, s in enumerate(shapes)]
    targets = [draw(*s, seed=i + 50) for i, s in enumerate(shapes)]
    count = len(shapes)
    for name, narrow, wide in (
        ("float32", torch.float32, torch.float32),
        ("bfloat16 to float32", torch.bfloat16, torch.float32),
        ("float32 to float16", torch.float32, torch.float16),
        ("float32 to float64", torch.float32, torch.float64),
    ):
        goals = [x.to(wide) for x in targets]

        def call(module, x, goals=goals):
            return module.feature_reconstruction_loss(
                list(x),
                goals,
                distance=distance,
                beta=0.3,
                weights=[0.1 * i for i in range(count)],
                reduction="none",
            )

        check_loss(
            lambda *x, c=call: c(ssl, x),
            lambda *x, c=call: c(reference, x),
            [x.to(narrow) for x in features],
            slack=max(5e-6, SLACK[narrow]),
            name=f"{on_engine} {name}",
            dloss=torch.linspace(0.5, 1.5, 3),
        )


def test_two_units_and_any_number_of_threads(on_engine: str) -> None:
    features, targets = ([draw(2, 5, 90, 91, seed=s), draw(2, 7, seed=s + 2)] for s in (0, 9))
    results = []
    for n in (1, 2):
        with threads(n):
            leaves = [x.clone().requires_grad_() for x in features]
            loss = ssl.feature_reconstruction_loss(leaves, targets)
            results.append([loss, *torch.autograd.grad(loss, leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    truth = reference.feature_reconstruction_loss(
        [x.double() for x in features], [x.double() for x in targets]
    )
    check_budget(results[0][0], results[0][0], truth, 2e-6)


def test_targets_get_no_gradient_and_weights_may() -> None:
    feature, target = draw(4, 6).requires_grad_(), draw(4, 6, seed=1).requires_grad_()
    weights = torch.tensor([2.0, 3.0], requires_grad=True)
    loss = ssl.feature_reconstruction_loss([feature, feature], [target, target], weights=weights)
    loss.backward()
    mean = (feature - target).square().mean().detach()
    torch.testing.assert_close(loss.detach(), 5 * mean)
    torch.testing.assert_close(weights.grad, mean.expand(2))
    assert target.grad is None and feature.grad is not None


@pytest.mark.parametrize("beta", [0.0, 5e-324, 1e-40, 2.0**-126])
def test_a_tiny_beta_is_the_distance_itself(on_engine: str, beta: float) -> None:
    """1 / beta would be infinite, and nothing times it is not a number."""
    feature = torch.tensor([[1.0, -2.0, 3.0]], requires_grad=True)
    loss = ssl.feature_reconstruction_loss(
        feature, torch.tensor([[1.0, 0.0, 0.0]]), distance="smooth_l1", beta=beta
    )
    (gradient,) = torch.autograd.grad(loss, feature)
    torch.testing.assert_close(loss.detach(), torch.tensor(5 / 3))
    torch.testing.assert_close(gradient, torch.tensor([[0.0, -1 / 3, 1 / 3]]))


def test_channels_last_is_not_copied(tmp_path: Path) -> None:
    feature, target = (
        draw(4, 16, 32, 32, seed=s).to(memory_format=torch.channels_last) for s in (0, 1)
    )
    step = Training(lambda x: ssl.feature_reconstruction_loss(x, target), feature)
    assert step.peak(tmp_path) < 1.1 * feature.nbytes
    dense = ssl.feature_reconstruction_loss(feature.contiguous(), target.contiguous())
    torch.testing.assert_close(ssl.feature_reconstruction_loss(feature, target), dense)


def test_all_maps_are_one_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    from sslkernels.backends import cpu

    calls = []
    for name in ("features_forward", "features_backward"):
        real = getattr(cpu, name)
        monkeypatch.setattr(cpu, name, lambda *a, r=real, n=name: (calls.append(n), r(*a))[1])
    maps = [draw(2, 3 + i).requires_grad_() for i in range(16)]
    with ssl.backend("cpu"):
        ssl.feature_reconstruction_loss(maps, [x.detach() + 1 for x in maps]).backward()
    assert calls == ["features_forward", "features_backward"]


def test_normalised_targets_are_those_of_data2vec() -> None:
    feature, target = draw(3, 5, 8), 4 + 3 * draw(3, 5, 8, seed=1)
    loss = ssl.feature_reconstruction_loss(
        feature, target, normalize="targets", distance="smooth_l1"
    )
    goal = torch.nn.functional.layer_norm(target, (8,))
    torch.testing.assert_close(loss, torch.nn.functional.smooth_l1_loss(feature, goal))


# ---- schedule --------------------------------------------------------------------------------------


def test_beta_schedule() -> None:
    for arguments in (
        {"total_steps": 100},
        {"total_steps": 97, "cycles": 4, "warm_up": 0.3, "start": 0.1, "final": 4.0},
        {"total_steps": 1, "warm_up": 1.0},
    ):
        ours, truth = ssl.beta_schedule(**arguments), reference.beta_schedule(**arguments)
        for step in (0, 1, 7, 24, 25, 50, 96, 97, 100, 1000):
            assert math.isclose(ours(step), truth(step), abs_tol=1e-9), (arguments, step)
        assert pickle.loads(pickle.dumps(ours))(7) == ours(7) and "total" not in repr(ours)
    with pytest.raises(ValueError, match="warm_up must be at most 1"):
        ssl.beta_schedule(10, warm_up=1.5)
    with pytest.raises(ValueError, match="cycles must be an integer of at least 1"):
        ssl.beta_schedule(10, cycles=0)


def test_modules_compute_what_their_functions_do() -> None:
    inputs = batch(5, 9, 3)
    module = ssl.VAELoss(beta=0.5, free_bits=0.1)
    assert torch.equal(module(*inputs), ssl.vae_loss(*inputs, beta=0.5, free_bits=0.1))
    assert torch.equal(module(*inputs, beta=2.0), ssl.vae_loss(*inputs, beta=2.0, free_bits=0.1))
    spread = draw(5, 9, seed=5)
    module = ssl.VAELoss(likelihood="gaussian")
    expected = ssl.vae_loss(*inputs, likelihood="gaussian", x_log_variance=spread)
    assert torch.equal(module(*inputs, spread), expected)
    module = ssl.FeatureReconstructionLoss(weights=[2.0], distance="smooth_l1", beta=0.5)
    expected = ssl.feature_reconstruction_loss(
        inputs[0], inputs[1], weights=[2.0], distance="smooth_l1", beta=0.5
    )
    assert torch.equal(module(inputs[0], inputs[1]), expected)
    assert "beta=0.5" in repr(module)


# ---------------------------------------------------------------------------------- the torch ops


class _Recorded(TorchDispatchMode):
    """Calls of this library's ops, with what they were given."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, tuple] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "sslkernels":
            self.calls[function._opname] = (function, args)
        return function(*args, **(kwargs or {}))


def test_opcheck() -> None:
    """Of ops.vae, ops.vae_backward, ops.features, ops.features_backward and ops.reparameterize_backward.

    Schema, fake, autograd registration and AOT dispatch, with the arguments that a training step gives.
    """
    recon, mean, log_variance, feature = (draw(5, 6, seed=s).requires_grad_() for s in range(4))
    target = draw(5, 6, seed=4).sigmoid()
    with _Recorded() as recorded:
        z = ssl.reparameterize(mean, log_variance, 3)
        loss = ssl.vae_loss(recon, target, mean, log_variance)
        loss = loss + ssl.feature_reconstruction_loss([feature], [target]) + z.sum()
        loss.backward()
    assert recorded.calls.keys() >= {
        "vae",
        "vae_backward",
        "features",
        "features_backward",
        "reparameterize_backward",
    }
    for name, (op, args) in recorded.calls.items():
        # What has a gradient: of backward nothing, and of forward no target.
        graded = [
            isinstance(x, Tensor)
            and x.is_floating_point()
            and not name.endswith("_backward")
            and not a.name.startswith(("x", "target"))
            for a, x in zip(op._schema.arguments, args, strict=True)
        ]
        args = [
            x.detach().requires_grad_(wanted) if isinstance(x, Tensor) else x
            for x, wanted in zip(args, graded, strict=True)
        ]
        torch.library.opcheck(op, tuple(args))
