# SPDX-License-Identifier: Apache-2.0
"""The variational loss, its noise and feature maps in the interpreter against their definitions."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from dense import randn
from helpers import SLACK, check_budget, check_loss, poisoned
from torch import Tensor

import sslkernels
from sslkernels import reference
from sslkernels.backends import autoencoders_torch
from sslkernels.backends import triton as backend
from sslkernels.backends.triton.runtime import recorded_launches

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["bernoulli", "gaussian", "spread"])
@pytest.mark.parametrize(
    ("n", "d", "z"), [(1, 1, 1), (3, 1023, 5), (2, 1025, 1030), (2, 0, 3), (0, 4, 4)]
)
def test_vae_loss(n: int, d: int, z: int, kind: str, dtype: torch.dtype) -> None:
    """All gradients, rows in the middle of NaN, around the 1024 of a block; float64 is torch's."""
    inputs = [randn(n, w, seed=i).to(dtype) for i, w in enumerate((d, d, z, z))]
    keywords = {"likelihood": "bernoulli" if kind == "bernoulli" else "gaussian"}
    if kind == "spread":
        inputs.append(randn(n, d, seed=9).to(dtype))

    def call(module, *x):
        spread = {"x_log_variance": x[4]} if len(x) > 4 else {}
        if module is sslkernels:
            x = [poisoned(y) if y.numel() else y for y in x]
        return module.vae_loss(*x[:4], **keywords, **spread, free_bits=0.3, reduction="none")

    with sslkernels.backend("triton"), recorded_launches() as log:
        check_loss(
            lambda *x: call(sslkernels, *x),
            lambda *x: call(reference, *x),
            inputs,
            slack=max(SLACK[dtype], 5e-6),
            name=f"{kind} {n} {d} {z} {dtype}",
            dloss=torch.linspace(0.5, 1.5, max(n, 1))[:n],
        )
    kernels = {entry.kernel for entry in log}
    if dtype == torch.float64 or n == 0:
        assert not kernels
    else:
        assert "vae_forward_kernel" in kernels and "vae_latent_backward_kernel" in kernels
        assert ("vae_decoder_backward_kernel" in kernels) == (d > 0)


def test_confident_logits_and_nan() -> None:
    with sslkernels.backend("triton"):
        zero = torch.zeros(1, 1)
        logits = torch.full((1, 4), 30.0)
        loss = sslkernels.vae_loss(logits, torch.ones(1, 4), zero, zero)
        torch.testing.assert_close(loss, torch.tensor(4 * 9.357623e-14), rtol=1e-4, atol=0.0)
        for i in range(4):
            inputs = [randn(3, 5, seed=j) for j in range(4)]
            inputs[i][1, 2] = torch.nan
            loss = sslkernels.vae_loss(*inputs, reduction="none")
            assert loss.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [1, 3, 1023, 1025, 2050])
def test_noise(n: int, dtype: torch.dtype) -> None:
    """The words of the other backends: the numbers agree to rounding, forward and backward."""
    mean, log_variance, dz = (randn(n, seed=s).to(dtype) for s in range(3))
    for seed in (torch.tensor(5), torch.tensor(-(2**62) - 12345)):
        for name, given in (
            ("reparameterize", (mean, log_variance, seed)),
            ("reparameterize_backward", (log_variance, seed, dz)),
        ):
            with recorded_launches() as log:
                ours = getattr(backend, name)(*given)
            wide = [x.double() if x.is_floating_point() else x for x in given]
            eager = getattr(autoencoders_torch, name)(*given)
            truth = getattr(autoencoders_torch, name)(*wide)
            assert ours.dtype == dtype
            assert len(log) == (dtype != torch.float64)
            check_budget(ours, eager, truth, max(SLACK[dtype], 2e-5), f"{name} {n} {dtype}")


# ---- features --------------------------------------------------------------------------------------

DISTANCES = {"squared": (False, 1.0), "smooth": (True, 0.3), "absolute": (True, 0.0)}
# Around the 1024 of a block and the 8192 of a unit.
WIDTHS = [1, 1025, 0, 8193, 1023]


def _map(n: int, d: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Contiguous, at an address that is no multiple of 16 bytes, between numbers that are NaN."""
    buffer = torch.full((n * d + 6,), torch.nan, dtype=dtype)
    buffer[3:-3] = randn(n, d, seed=seed).to(dtype).flatten()
    return buffer[3:-3].view(n, d)


def _check_maps(
    maps: list[Tensor], targets: list[Tensor], distance: str, dout: Tensor, wanted: list[bool]
) -> Counter[str]:
    """Both directions within the budget; returns how often each kernel ran."""
    chosen = DISTANCES[distance]
    with recorded_launches() as log:
        out = backend.features_forward(maps, targets, *chosen)
        grads = backend.features_backward(maps, targets, *chosen, dout, wanted)
    wide = [[x.double() for x in xs] for xs in (maps, targets)]
    eager = autoencoders_torch.features_forward(maps, targets, *chosen)
    truth = autoencoders_torch.features_forward(*wide, *chosen)
    assert out.dtype == torch.float32 and out.is_contiguous()
    check_budget(out, eager, truth, 2e-6, f"{distance} distances")
    eagers = autoencoders_torch.features_backward(maps, targets, *chosen, dout, wanted)
    truths = autoencoders_torch.features_backward(*wide, *chosen, dout.double(), wanted)
    assert [x is not None for x in grads] == wanted
    for i, (g, e, t) in enumerate(zip(grads, eagers, truths, strict=True)):
        if g is not None:
            assert g.dtype == maps[i].dtype and g.is_contiguous()
            check_budget(g, e, t, SLACK[g.dtype], f"{distance} gradient {i}", floor=1e-6)
    return Counter(entry.kernel for entry in log)


@pytest.mark.parametrize(
    ("narrow", "wide", "distance"),
    [
        (torch.float32, torch.float32, "squared"),
        (torch.float32, torch.float16, "smooth"),
        (torch.bfloat16, torch.float32, "smooth"),
        (torch.float16, torch.float16, "absolute"),
    ],
    ids=str,
)
def test_feature_maps(narrow: torch.dtype, wide: torch.dtype, distance: str) -> None:
    """One launch forward and one backward for the whole list, and one that adds units."""
    maps = [_map(2, d, narrow, i) for i, d in enumerate(WIDTHS)]
    targets = [_map(2, d, wide, i + 20) for i, d in enumerate(WIDTHS)]
    wanted = [i != 1 for i in range(len(WIDTHS))]
    dout = randn(len(WIDTHS), 2, seed=40).T  # rows are not contiguous
    assert _check_maps(maps, targets, distance, dout, wanted) == {
        "features_forward_kernel": 1,
        "features_combine_kernel": 1,
        "features_backward_kernel": 1,
    }


def test_feature_maps_of_one_unit_are_not_combined() -> None:
    maps, targets = ([_map(3, d, torch.float32, s + d) for d in (5, 0, 8192)] for s in (0, 1))
    dout = torch.tensor(0.5).expand(3, 3)
    assert _check_maps(maps, targets, "squared", dout, [True] * 3) == {
        "features_forward_kernel": 1,
        "features_backward_kernel": 1,
    }
    assert _check_maps(maps, targets, "squared", dout, [False, True, False]) == {
        "features_forward_kernel": 1
    }
    with recorded_launches() as log:
        out = backend.features_forward([x[:0] for x in maps], [x[:0] for x in targets], False, 1.0)
    assert out.shape == (0, 3) and not log


def test_feature_maps_of_mixed_dtypes() -> None:
    """A launch for each pair of dtypes; columns are those of the list."""
    f, b, h = torch.float32, torch.bfloat16, torch.float16
    maps = [_map(2, 9 + i, dtype, i) for i, dtype in enumerate((f, b, h, b, f))]
    targets = [_map(2, 9 + i, dtype, i + 9) for i, dtype in enumerate((f, f, h, f, b))]
    wanted = [True, True, False, True, True]
    assert _check_maps(maps, targets, "smooth", randn(2, 5, seed=8), wanted) == {
        "features_forward_kernel": 4,
        "features_combine_kernel": 1,
        "features_backward_kernel": 3,
    }
    maps[2] = maps[2].double()
    with recorded_launches() as log:
        wide = backend.features_forward(maps, targets, True, 0.3)
    assert wide.dtype == torch.float64 and not log


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_more_feature_maps_than_slots(dtype: torch.dtype) -> None:
    """Through the op, with a channels-last map and rows that are not contiguous; float64 is torch's."""
    inputs = [randn(1, 3, seed=i).to(dtype) for i in range(17)]
    last = randn(2, 8, 3, 3, seed=18).to(dtype).to(memory_format=torch.channels_last)
    inputs.append(last[:1])
    goals = [randn(*x.shape, seed=30 + i).to(dtype) for i, x in enumerate(inputs)]

    def call(module, *x):
        given = [poisoned(y) if y.ndim == 2 else y for y in x]
        targets = [y.to(x[0].dtype) for y in goals]
        return module.feature_reconstruction_loss(
            given, targets, weights=[0.1 * i for i in range(len(x))], reduction="none"
        )

    with sslkernels.backend("triton"), recorded_launches() as log:
        check_loss(
            lambda *x: call(sslkernels, *x),
            lambda *x: call(reference, *x),
            inputs,
            slack=max(SLACK[dtype], 5e-6),
            name=str(dtype),
            dloss=torch.tensor([0.7]),
        )
    ran = Counter(entry.kernel for entry in log)
    calls = 0 if dtype == torch.float64 else 2
    assert ran["features_forward_kernel"] == ran["features_backward_kernel"] == calls


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_feature_maps_keep_nan_and_inf(bad: float, distance: str) -> None:
    """In the row and the map that they are in, and in the gradient where they are."""
    smooth, beta = DISTANCES[distance]
    maps, targets = ([_map(2, d, torch.float32, s + d) for d in (3, 1030)] for s in (0, 1))
    maps[1][1, 1027] = bad
    out = backend.features_forward(maps, targets, smooth, beta)
    size = torch.tensor(bad).abs()
    assert torch.equal(out[1, 1], size) or (size.isnan() and out[1, 1].isnan())
    assert out.isfinite().sum() == 3
    dout = torch.ones(2, 2)
    grads = backend.features_backward(maps, targets, smooth, beta, dout, [True, True])
    there = grads[1][1, 1027]
    if smooth and size.isinf():  # the slope of |x|
        torch.testing.assert_close(there, torch.tensor(bad).sign() / 1030)
        grads[1][1, 1027] = bad
    else:
        assert torch.equal(there, torch.tensor(bad)) or (size.isnan() and there.isnan())
    assert grads[0].isfinite().all() and grads[1].isfinite().sum() == 2 * 1030 - 1


@pytest.mark.parametrize("beta", [0.0, 2.0**-126, 1e-30, 1e30, 1e37])
def test_feature_maps_with_extreme_beta(beta: float) -> None:
    """Where 1 / beta or x^2 would leave float32."""
    maps, targets = [torch.tensor([[0.0, 1e-3, -1e25]])], [torch.zeros(1, 3)]
    out = backend.features_forward(maps, targets, True, beta)
    wide = [x.double() for x in maps], [x.double() for x in targets]
    truth = autoencoders_torch.features_forward(*wide, True, beta)
    torch.testing.assert_close(out.double(), truth, rtol=1e-6, atol=0.0)
    (grad,) = backend.features_backward(maps, targets, True, beta, torch.ones(1, 1), [True])
    wide_one = torch.ones(1, 1, dtype=torch.float64)
    (truth,) = autoencoders_torch.features_backward(*wide, True, beta, wide_one, [True])
    torch.testing.assert_close(grad.double(), truth, rtol=1e-6, atol=1e-38)
