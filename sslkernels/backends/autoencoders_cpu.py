# SPDX-License-Identifier: Apache-2.0
"""Variational and feature reconstruction losses on the CPU: see ``interface.Autoencoders``."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from sslkernels import _C
from sslkernels.backends.arithmetic import accumulation_dtype, widest
from sslkernels.backends.interface import Vae, VaeGradients, VaeTerms, VaeWanted
from sslkernels.backends.updates_cpu import DTYPES

# Here, whatever device torch.set_default_device names.
_empty = functools.partial(torch.empty, device="cpu")


def _address(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def _rows(x: Tensor) -> Tensor:
    """x, or a copy when its rows are not contiguous."""
    return x if x.stride()[1] == 1 or x.shape[1] == 1 else x.contiguous()


def _dense(problem: Vae) -> Vae:
    """The problem with operands that the kernels can address."""
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


def _vae(problem: Vae) -> _C._Vae:
    """A dense problem without its codes; it holds addresses, not tensors."""
    r, x, spread = problem[:3]
    return _C.vae(
        likelihood=problem.likelihood,
        dtype=DTYPES[x.dtype],
        d=x.shape[1],
        n=x.shape[0],
        reconstruction=r.data_ptr(),
        reconstruction_stride=r.stride()[0],
        x=x.data_ptr(),
        x_stride=x.stride()[0],
        spread=_address(spread),
        spread_stride=0 if spread is None else spread.stride()[0],
        n_threads=torch.get_num_threads(),
    )


def vae_forward(problem: Vae) -> VaeTerms:
    """See :meth:`sslkernels.backends.interface.Autoencoders.vae_forward`."""
    problem = _dense(problem)
    mean, log_variance = problem.mean, problem.log_variance
    out = VaeTerms(_empty(problem.n, dtype=problem.acc), _empty(problem.n, dtype=problem.acc))
    _C.vae_forward(
        _vae(problem),
        z=mean.shape[1],
        mean=mean.data_ptr(),
        mean_stride=mean.stride()[0],
        log_variance=log_variance.data_ptr(),
        log_variance_stride=log_variance.stride()[0],
        weights=_address(problem.weights),
        reconstruction=out.reconstruction.data_ptr(),
        kl=out.kl.data_ptr(),
    )
    return out


def vae_backward(problem: Vae, drec: Tensor, dkl: Tensor, wanted: VaeWanted) -> VaeGradients:
    """See :meth:`sslkernels.backends.interface.Autoencoders.vae_backward`."""
    problem = _dense(problem)
    mean, log_variance = problem.mean, problem.log_variance
    if drec.stride() != dkl.stride():  # one of them is expanded
        drec, dkl = drec.contiguous(), dkl.contiguous()
    out = VaeGradients(
        *(
            _empty(x.shape, dtype=x.dtype) if want and x is not None else None
            for x, want in zip(problem[:5], wanted, strict=True)
        )
    )
    _C.vae_backward(
        _vae(problem),
        z=mean.shape[1],
        mean=mean.data_ptr(),
        mean_stride=mean.stride()[0],
        log_variance=log_variance.data_ptr(),
        log_variance_stride=log_variance.stride()[0],
        weights=_address(problem.weights),
        drec=drec.data_ptr(),
        row_stride=drec.stride()[0],
        dkl=dkl.data_ptr(),
        dreconstruction=_address(out.reconstruction),
        dx=_address(out.x),
        dspread=_address(out.spread),
        dmean=_address(out.mean),
        dlog_variance=_address(out.log_variance),
    )
    return out


def reparameterize(mean: Tensor, log_variance: Tensor, seed: Tensor) -> Tensor:
    """See :meth:`sslkernels.backends.interface.Autoencoders.reparameterize`."""
    mean, log_variance = mean.contiguous(), log_variance.contiguous()
    z = _empty(mean.shape, dtype=mean.dtype)
    _C.reparameterize(
        dtype=DTYPES[mean.dtype],
        n=mean.numel(),
        mean=mean.data_ptr(),
        log_variance=log_variance.data_ptr(),
        dz=None,
        out=z.data_ptr(),
        seed=seed.data_ptr(),
        n_threads=torch.get_num_threads(),
    )
    return z


def reparameterize_backward(log_variance: Tensor, seed: Tensor, dz: Tensor) -> Tensor:
    """See :meth:`sslkernels.backends.interface.Autoencoders.reparameterize_backward`."""
    log_variance, dz = log_variance.contiguous(), dz.to(log_variance.dtype).contiguous()
    out = _empty(log_variance.shape, dtype=log_variance.dtype)
    _C.reparameterize(
        dtype=DTYPES[log_variance.dtype],
        n=log_variance.numel(),
        mean=None,
        log_variance=log_variance.data_ptr(),
        dz=dz.data_ptr(),
        out=out.data_ptr(),
        seed=seed.data_ptr(),
        n_threads=torch.get_num_threads(),
    )
    return out


def features_forward(
    features: list[Tensor], targets: list[Tensor], smooth: bool, beta: float
) -> Tensor:
    """See :meth:`sslkernels.backends.interface.Autoencoders.features_forward`."""
    features, targets = [x.contiguous() for x in features], [x.contiguous() for x in targets]
    acc = accumulation_dtype(widest(*features, *targets))
    n = features[0].shape[0]
    out = _empty((n, len(features)), dtype=acc)
    _C.features_forward(
        features=[x.data_ptr() for x in features],
        targets=[x.data_ptr() for x in targets],
        sizes=[x.shape[1] for x in features],
        dtypes=[DTYPES[x.dtype] for x in features],
        target_dtypes=[DTYPES[x.dtype] for x in targets],
        n=n,
        smooth=smooth,
        beta=beta,
        wide=acc == torch.float64,
        n_threads=torch.get_num_threads(),
        out=out.data_ptr(),
    )
    return out


def features_backward(
    features: list[Tensor],
    targets: list[Tensor],
    smooth: bool,
    beta: float,
    dout: Tensor,
    wanted: list[bool],
) -> list[Tensor | None]:
    """See :meth:`sslkernels.backends.interface.Autoencoders.features_backward`."""
    features, targets = [x.contiguous() for x in features], [x.contiguous() for x in targets]
    acc = accumulation_dtype(widest(*features, *targets))
    dout = dout.to(acc).contiguous()
    out = [
        _empty(x.shape, dtype=x.dtype) if want else None
        for x, want in zip(features, wanted, strict=True)
    ]
    _C.features_backward(
        features=[x.data_ptr() for x in features],
        targets=[x.data_ptr() for x in targets],
        sizes=[x.shape[1] for x in features],
        dtypes=[DTYPES[x.dtype] for x in features],
        target_dtypes=[DTYPES[x.dtype] for x in targets],
        n=features[0].shape[0],
        smooth=smooth,
        beta=beta,
        wide=acc == torch.float64,
        n_threads=torch.get_num_threads(),
        dout=dout.data_ptr(),
        gradients=[_address(x) for x in out],
    )
    return out
