# SPDX-License-Identifier: Apache-2.0
"""Contenders that need a GPU: other libraries' kernels, and ours with other products.

`make gpu-check` installs the libraries where it can reach them; what can't be imported is named as missing.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

import sslkernels
from benchmarks.cases import LOGIT_BIAS, LOGIT_SCALE, Case
from benchmarks.contender import (
    Contender,
    Factory,
    Inputs,
    Missing,
    import_module,
    loss_contender,
)


def _on_a_gpu(case: Case, name: str) -> None:
    if case.device != "cuda":
        raise Missing(f"{name} needs a GPU")


def _inf_cl(case: Case, x: Inputs) -> Contender:
    """Both directions of Inf-CL's kernel, as its users call it."""
    _on_a_gpu(case, "Inf-CL")
    module = import_module("inf_cl")
    # Its head_dim has to be a power of two that divides D, or results are silently wrong.
    head_dim = math.gcd(case.dim, 256)
    if head_dim < 16:
        raise Missing(f"Inf-CL needs D to be a multiple of 16, got {case.dim}")
    scale = torch.tensor(LOGIT_SCALE, device=x["leaves"][0].device)

    def call(a: Tensor, b: Tensor) -> Tensor:
        there = module.cal_flash_loss(a, b, scale=scale, head_dim=head_dim)
        back = module.cal_flash_loss(b, a, scale=scale, head_dim=head_dim)
        loss: Tensor = (there.mean() + back.mean()) / 2
        return loss

    # It multiplies in TF32 whatever the dtype: the error is in the table, not a reason to leave it out.
    return loss_contender(x, call, 3e-2)


def _memeff(case: Case, x: Inputs) -> Contender:
    """memeff's CLIP loss with the textbook gradient: ``stable`` would multiply it by a factor."""
    _on_a_gpu(case, "memeff")
    loss = import_module("memeff").MemoryEfficientCLIPLoss(
        temperature=1 / LOGIT_SCALE, normalized_inputs=True, stable=False
    )
    return loss_contender(x, lambda a, b: loss(a, b), 3e-2)


def _siglip_kernel(case: Case, x: Inputs) -> Contender:
    """siglip-kernel by the way that it chooses itself."""
    _on_a_gpu(case, "siglip-kernel")
    fused = import_module("siglip_kernel").fused_siglip_loss
    device = x["leaves"][0].device
    log_scale = torch.tensor(LOGIT_SCALE, device=device).log()
    bias = torch.tensor(LOGIT_BIAS, device=device)
    return loss_contender(x, lambda a, b: fused(a, b, log_scale, bias), 3e-2)


def _split(precision: str) -> Factory:
    """NT-Xent of float32 with products of split operands on tensor cores."""

    def factory(case: Case, x: Inputs) -> Contender:
        _on_a_gpu(case, precision)
        if case.dtype != "float32":
            raise Missing(f"{precision} is for float32, not {case.dtype}")
        configs = import_module("sslkernels.backends.triton.configs")
        plain = loss_contender(
            x, lambda a, b: sslkernels.nt_xent_loss(a, b, case.temperature), 2e-2
        )

        def asked(run: Callable[[], object]) -> Callable[[], object]:
            def within() -> object:
                with configs.override(fp32_precision=precision):
                    return run()

            return within

        def results() -> list[Tensor]:
            with configs.override(fp32_precision=precision):
                return plain.results()

        forward = None if plain.forward is None else asked(plain.forward)
        return Contender(asked(plain.step), results, plain.tolerance, plain.leaves, forward)

    return factory


CONTENDERS: dict[str, dict[str, Factory]] = {
    "nt_xent": {f"sslkernels {name}": _split(name) for name in ("tf32x3", "bf16x3")},
    "clip": {"inf_cl": _inf_cl, "memeff": _memeff},
    "siglip": {"siglip-kernel": _siglip_kernel},
}
