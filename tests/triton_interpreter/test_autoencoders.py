# SPDX-License-Identifier: Apache-2.0
"""The variational loss and its noise in the interpreter against their definitions."""

from __future__ import annotations

import pytest
import torch
from dense import randn
from helpers import SLACK, check_budget, check_loss, poisoned

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
