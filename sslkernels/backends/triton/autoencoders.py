# SPDX-License-Identifier: Apache-2.0
"""Variational loss and reparameterisation in Triton: one pass over elements, float32, bfloat16, float16.

Formulas are those of ``csrc/cpu/vae.cpp`` and ``noise.cpp``, the random words are the same bit for bit.
Sums of rows are accumulated in float32, block by block in one order.
"""

# Triton reads annotations of kernel arguments itself, so no `from __future__ import annotations`.

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..autoencoders_torch import STREAM
from ..interface import Vae, VaeGradients, VaeTerms, VaeWanted
from .runtime import launch
from .sizes import cdiv
from .tiles import wait_turn

_STREAM = tl.constexpr(STREAM)
BLOCK_D = 1024  # elements of a row that a program holds: eight a thread
GROUPS = 256  # groups of four normal numbers of a program


@triton.jit
def _softplus_minus_abs(x):
    """log(1 + exp(-|x|)), to a rounding of 1."""
    e = tl.exp(-tl.abs(x))
    # log(1 + e) loses e where 1 + e rounds to 1: there it is e, to half of its square.
    return tl.where(e < 1e-4, e * (1.0 - 0.5 * e), tl.log(1.0 + e))


@triton.jit
def vae_forward_kernel(
    rec_ptr,  # [N] float32
    kl_ptr,  # [N] float32
    r_ptr,  # [N, D] rows of stride_r
    x_ptr,  # [N, D] rows of stride_x
    spread_ptr,  # [N, D] rows of stride_s; only with HAS_SPREAD
    mean_ptr,  # [N, Z] rows of stride_m
    v_ptr,  # [N, Z] rows of stride_v
    weight_ptr,  # [Z] float32; only with HAS_WEIGHT
    D,
    Z,
    stride_r,
    stride_x,
    stride_s,
    stride_m,
    stride_v,
    BERNOULLI: tl.constexpr,
    HAS_SPREAD: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Both terms of one row a program."""
    wait_turn()
    row = tl.program_id(0).to(tl.int64)  # times a stride
    total = tl.zeros((BLOCK_D,), tl.float32)
    for start in range(0, D, BLOCK_D):
        at = start + tl.arange(0, BLOCK_D)
        ok = at < D
        r = tl.load(r_ptr + row * stride_r + at, mask=ok, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + row * stride_x + at, mask=ok, other=0.0).to(tl.float32)
        if BERNOULLI:
            # Not tl.maximum, which may drop a NaN.
            term = tl.where(r < 0.0, 0.0, r) - x * r + _softplus_minus_abs(r)
        else:
            term = (r - x) * (r - x)
            if HAS_SPREAD:
                s = tl.load(spread_ptr + row * stride_s + at, mask=ok, other=0.0).to(tl.float32)
                term = term * tl.exp(-s) + s
            term = 0.5 * term
        total += tl.where(ok, term, 0.0)
    tl.store(rec_ptr + row, tl.sum(total))
    total = tl.zeros((BLOCK_D,), tl.float32)
    for start in range(0, Z, BLOCK_D):
        at = start + tl.arange(0, BLOCK_D)
        ok = at < Z
        m = tl.load(mean_ptr + row * stride_m + at, mask=ok, other=0.0).to(tl.float32)
        v = tl.load(v_ptr + row * stride_v + at, mask=ok, other=0.0).to(tl.float32)
        term = 0.5 * (m * m + ((tl.exp(v) - 1.0) - v))
        if HAS_WEIGHT:
            term = term * tl.load(weight_ptr + at, mask=ok, other=0.0)
        total += tl.where(ok, term, 0.0)
    tl.store(kl_ptr + row, tl.sum(total))


@triton.jit
def vae_decoder_backward_kernel(
    dr_ptr,  # [N, D] contiguous; only with WANT_R
    dx_ptr,  # [N, D] contiguous; only with WANT_X
    ds_ptr,  # [N, D] contiguous; only with WANT_S
    drec_ptr,  # [N] float32, elements of stride_g
    r_ptr,
    x_ptr,
    spread_ptr,
    D,
    stride_g,
    stride_r,
    stride_x,
    stride_s,
    BERNOULLI: tl.constexpr,
    HAS_SPREAD: tl.constexpr,
    WANT_R: tl.constexpr,
    WANT_X: tl.constexpr,
    WANT_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Gradients of what the reconstruction is made of: a block of one row a program."""
    wait_turn()
    row = tl.program_id(0).to(tl.int64)  # times a stride
    at = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    ok = at < D
    g = tl.load(drec_ptr + row * stride_g)
    r = tl.load(r_ptr + row * stride_r + at, mask=ok, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + row * stride_x + at, mask=ok, other=0.0).to(tl.float32)
    if BERNOULLI:
        e = tl.exp(-tl.abs(r))
        to_r = g * (tl.where(r < 0.0, e, 1.0) / (1.0 + e) - x)
        to_x = -g * r
    else:
        to_r = g * (r - x)
        if HAS_SPREAD:
            inverse = tl.exp(
                -tl.load(spread_ptr + row * stride_s + at, mask=ok, other=0.0).to(tl.float32)
            )
            if WANT_S:
                to_s = 0.5 * g * (1.0 - (r - x) * (r - x) * inverse)
                tl.store(ds_ptr + row * D + at, to_s.to(ds_ptr.dtype.element_ty), mask=ok)
            to_r = to_r * inverse
        to_x = -to_r
    if WANT_R:
        tl.store(dr_ptr + row * D + at, to_r.to(dr_ptr.dtype.element_ty), mask=ok)
    if WANT_X:
        tl.store(dx_ptr + row * D + at, to_x.to(dx_ptr.dtype.element_ty), mask=ok)


@triton.jit
def vae_latent_backward_kernel(
    dm_ptr,  # [N, Z] contiguous; only with WANT_M
    dv_ptr,  # [N, Z] contiguous; only with WANT_V
    dkl_ptr,  # [N] float32, elements of stride_g
    mean_ptr,
    v_ptr,
    weight_ptr,
    Z,
    stride_g,
    stride_m,
    stride_v,
    HAS_WEIGHT: tl.constexpr,
    WANT_M: tl.constexpr,
    WANT_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Gradients of what the KL is made of."""
    wait_turn()
    row = tl.program_id(0).to(tl.int64)  # times a stride
    at = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    ok = at < Z
    g = tl.load(dkl_ptr + row * stride_g) + tl.zeros((BLOCK_D,), tl.float32)
    if HAS_WEIGHT:
        g = g * tl.load(weight_ptr + at, mask=ok, other=0.0)
    if WANT_M:
        m = tl.load(mean_ptr + row * stride_m + at, mask=ok, other=0.0).to(tl.float32)
        tl.store(dm_ptr + row * Z + at, (g * m).to(dm_ptr.dtype.element_ty), mask=ok)
    if WANT_V:
        v = tl.load(v_ptr + row * stride_v + at, mask=ok, other=0.0).to(tl.float32)
        to_v = 0.5 * g * (tl.exp(v) - 1.0)
        tl.store(dv_ptr + row * Z + at, to_v.to(dv_ptr.dtype.element_ty), mask=ok)


@triton.jit
def noise_kernel(
    out_ptr,  # [n] contiguous
    x_ptr,  # [n] contiguous: the mean, or dz
    v_ptr,  # [n] contiguous
    seed_ptr,  # 0-d int64
    n,
    FORWARD: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """x + exp(v / 2) eps, or x exp(v / 2) eps / 2: every word of Philox is used once."""
    wait_turn()
    first = tl.program_id(0).to(tl.int64) * GROUPS
    group = first + tl.arange(0, GROUPS)
    seed = tl.load(seed_ptr)
    low, high = group.to(tl.uint32), (group >> 32).to(tl.uint32)
    none = tl.zeros((GROUPS,), tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, low, high, none, none + _STREAM)
    even_0, odd_0 = _normal_pair(w0, w1)
    even_1, odd_1 = _normal_pair(w2, w3)
    # [GROUPS, 2, 2] in the order of elements.
    eps = tl.join(tl.join(even_0, even_1), tl.join(odd_0, odd_1)).reshape(4 * GROUPS)
    at = 4 * first + tl.arange(0, 4 * GROUPS)
    ok = at < n
    v = tl.load(v_ptr + at, mask=ok, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + at, mask=ok, other=0.0).to(tl.float32)
    moved = tl.exp(0.5 * v) * eps
    if FORWARD:
        out = x + moved
    else:
        out = 0.5 * x * moved
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=ok)


@triton.jit
def _normal_pair(a, b):
    """Two normal numbers of two words (Box and Muller 1958)."""
    u = a.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10  # 2^-32, 2^-33
    angle = (b.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10) * 6.283185307179586
    radius = tl.sqrt(-2.0 * tl.log(u))
    return radius * tl.cos(angle), radius * tl.sin(angle)


# ---- launchers -----------------------------------------------------------------------------------


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def _dense(problem: Vae) -> Vae:
    """Rows contiguous; what is missing is stood in for by what is there."""
    r, x, spread, mean, log_variance, weights, likelihood = problem
    return Vae(
        _rows(r),
        _rows(x),
        None if spread is None else _rows(spread),
        _rows(mean),
        _rows(log_variance),
        None if weights is None else weights.contiguous(),
        likelihood,
    )


def _flags(problem: Vae) -> dict[str, bool]:
    return {
        "BERNOULLI": problem.likelihood == "bernoulli",
        "HAS_SPREAD": problem.spread is not None,
    }


def vae_forward(problem: Vae) -> VaeTerms:
    """See ``Autoencoders.vae_forward``."""
    problem = _dense(problem)
    r, x, spread, mean, v, weights, _ = problem
    out = VaeTerms(
        *(torch.zeros(problem.n, dtype=torch.float32, device=x.device) for _ in range(2))
    )
    if problem.n:
        s = x if spread is None else spread
        w = out.kl if weights is None else weights
        launch(
            vae_forward_kernel, (problem.n,), x.device, *out, r, x, s, mean, v, w, x.shape[1],
            mean.shape[1], r.stride(0), x.stride(0), s.stride(0), mean.stride(0), v.stride(0),
            **_flags(problem), HAS_WEIGHT=weights is not None, BLOCK_D=BLOCK_D,
        )  # fmt: skip
    return out


def vae_backward(problem: Vae, drec: Tensor, dkl: Tensor, wanted: VaeWanted) -> VaeGradients:
    """See ``Autoencoders.vae_backward``."""
    problem = _dense(problem)
    r, x, spread, mean, v, weights, _ = problem
    n, D, Z = problem.n, x.shape[1], mean.shape[1]
    out = VaeGradients(
        *(
            torch.empty(y.shape, dtype=y.dtype, device=y.device) if want and y is not None else None
            for y, want in zip(problem[:5], wanted, strict=True)
        )
    )
    if n and D and any(y is not None for y in out[:3]):
        s = x if spread is None else spread
        stands = [x if y is None else y for y in out[:3]]
        launch(
            vae_decoder_backward_kernel, (n, cdiv(D, BLOCK_D)), x.device, *stands, drec, r,
            x, s, D, drec.stride(0), r.stride(0), x.stride(0), s.stride(0), **_flags(problem),
            WANT_R=out.reconstruction is not None, WANT_X=out.x is not None,
            WANT_S=out.spread is not None, BLOCK_D=BLOCK_D,
        )  # fmt: skip
    if n and Z and any(y is not None for y in out[3:]):
        stands = [mean if y is None else y for y in out[3:]]
        w = dkl if weights is None else weights
        launch(
            vae_latent_backward_kernel, (n, cdiv(Z, BLOCK_D)), x.device, *stands, dkl, mean,
            v, w, Z, dkl.stride(0), mean.stride(0), v.stride(0), HAS_WEIGHT=weights is not None,
            WANT_M=out.mean is not None, WANT_V=out.log_variance is not None, BLOCK_D=BLOCK_D,
        )  # fmt: skip
    return out


def _noise(x: Tensor, log_variance: Tensor, seed: Tensor, forward: bool) -> Tensor:
    x, log_variance = x.contiguous(), log_variance.contiguous()
    out = torch.empty(x.shape, dtype=log_variance.dtype, device=x.device)
    if x.numel():
        grid = (cdiv(x.numel(), 4 * GROUPS),)
        launch(
            noise_kernel, grid, x.device, out, x, log_variance, seed, x.numel(), FORWARD=forward,
            GROUPS=GROUPS,
        )  # fmt: skip
    return out


def reparameterize(mean: Tensor, log_variance: Tensor, seed: Tensor) -> Tensor:
    """See ``Autoencoders.reparameterize``."""
    return _noise(mean, log_variance, seed, True)


def reparameterize_backward(log_variance: Tensor, seed: Tensor, dz: Tensor) -> Tensor:
    """See ``Autoencoders.reparameterize_backward``."""
    return _noise(dz, log_variance, seed, False)
