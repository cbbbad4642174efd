# SPDX-License-Identifier: Apache-2.0
"""The two terms of a variational autoencoder's loss by rows, as one torch op, ``vae``.

    reconstruction_i = sum_j softplus(r_ij) - x_ij r_ij                      bernoulli, r are logits
                       sum_j ((r_ij - x_ij)^2 exp(-s_ij) + s_ij) / 2         gaussian, s = 0 by default
    kl_i             = sum_j w_j (m_ij^2 + exp(v_ij) - 1 - v_ij) / 2

One pass over memory forward and one backward; nothing but the inputs is kept in between.  Constants,
beta and the reduction are [N] numbers: torch operations around the op (``functional.autoencoders``).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sslkernels.backends.arithmetic import accumulation_dtype
from sslkernels.backends.interface import Vae, VaeGradients, VaeTerms, VaeWanted
from sslkernels.ops import registry
from sslkernels.ops._library import Gradient, Op

_FIELDS = ("reconstruction", "x", "spread", "mean", "log_variance")


def _forward(problem: Vae) -> VaeTerms:
    out: VaeTerms = registry.resolve(problem.x.device).vae_forward(problem)
    return out


def _fake(problem: Vae) -> VaeTerms:
    n, acc = problem.x.shape[0], accumulation_dtype(problem.x.dtype)
    return VaeTerms(*(problem.x.new_empty((n,), dtype=acc) for _ in range(2)))


def _or_empty(problem: Vae, out: Any) -> VaeGradients:
    """An op returns tensors: what is not wanted is empty."""
    return VaeGradients(*(problem.x.new_empty(0) if g is None else g for g in out))


def _backward(problem: Vae, drec: Tensor, dkl: Tensor, wanted: VaeWanted) -> VaeGradients:
    backend = registry.resolve(problem.x.device)
    return _or_empty(problem, backend.vae_backward(problem, drec, dkl, wanted))


def _backward_fake(problem: Vae, drec: Tensor, dkl: Tensor, wanted: VaeWanted) -> VaeGradients:
    pairs = zip(problem[:5], wanted, strict=True)
    return _or_empty(
        problem,
        (x.new_empty(x.shape) if want and x is not None else None for x, want in pairs),
    )


BACKWARD = Op(
    "vae_backward(*Vae, Tensor drec, Tensor dkl, *VaeWanted) -> VaeGradients",
    _backward,
    _backward_fake,
)


def _zeros(problem: Vae) -> Tensor:
    return problem.x.new_zeros(problem.x.shape[0], dtype=accumulation_dtype(problem.x.dtype))


def _gradient(
    problem: Vae, drec: Tensor | None, dkl: Tensor | None, need: Any
) -> dict[str, Tensor]:
    drec = _zeros(problem) if drec is None else drec
    dkl = _zeros(problem) if dkl is None else dkl
    wanted = VaeWanted(*(bool(getattr(need, name)) for name in _FIELDS))
    return BACKWARD.below(problem, drec, dkl, wanted)._asdict()


def _tangent(problem: Vae, dproblem: Vae | None) -> tuple[Tensor, Tensor]:
    # Every row has terms of its own: tangents are <gradient, tangent>, row by row.
    out = [_zeros(problem), _zeros(problem)]
    if dproblem is not None:
        tangents = dproblem[:5]
        wanted = VaeWanted(*(x is not None for x in tangents))
        one = torch.ones_like(out[0])
        gradients = BACKWARD.below(problem, one, one, wanted)
        for i, (gradient, tangent) in enumerate(zip(gradients, tangents, strict=True)):
            if tangent is not None:
                part = (gradient.to(one.dtype) * tangent.to(one.dtype)).sum(1)
                out[i > 2] = out[i > 2] + part
    return out[0], out[1]


VAE = Op(
    "vae(*Vae) -> VaeTerms",
    _forward,
    _fake,
    gradient=Gradient(
        _FIELDS,
        ("reconstruction", "kl"),
        lambda problem, out: (problem,),
        _gradient,
        _tangent,
    ),
)
