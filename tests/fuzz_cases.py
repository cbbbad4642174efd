# SPDX-License-Identifier: Apache-2.0
"""Random cases of the fuzz tests: plain numbers, so that one line of JSON is a case.

Tensors are made of a case by ``tensors``, whose values depend on nothing but the case.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
LAYOUTS = ("dense", "strided", "transposed", "offset", "poisoned", "expanded", "broadcast column")
# What is in the rows.  Nothing but "plain", "near", "equal" and "zeros" is held against the truth closely.
ORDINARY = ("plain", "near", "equal", "zeros")
EXTREME = ("denormal", "tiny", "huge", "mixed", "nan", "inf", "-inf")


@dataclass(frozen=True)
class LossCase:
    """A loss on [n, d] inputs."""

    loss: str
    n: int
    d: int
    m: int  # rows of a bank, or negatives of a query
    dtype: str
    temperature: float
    normalize: bool
    reduction: str
    values: str
    layouts: tuple[str, ...]
    classes: int
    far_ids: bool  # ids of 64 bits, negative ones too
    seed: int

    def line(self) -> str:
        """The case as one argument of ``--fuzz-case``."""
        return json.dumps(asdict(self))

    @classmethod
    def of(cls, line: str) -> LossCase:
        given = json.loads(line)
        return cls(**{**given, "layouts": tuple(given["layouts"])})


# Sizes near those of blocks, vectors and panels of every instruction set, and any others.
SIZES = st.one_of(
    st.integers(0, 9),
    st.sampled_from((15, 16, 17, 31, 32, 33, 63, 64, 65, 71, 72, 73, 127, 128, 129, 255, 256, 257)),
    st.integers(0, 300),
)
WIDTHS = st.one_of(SIZES, st.sampled_from((512, 768, 1030)))
TEMPERATURES = st.one_of(
    st.sampled_from((1e-3, 0.005, 0.07, 0.1, 0.5, 1.0, 10.0)),
    st.floats(-3, 1).map(lambda x: round(10.0**x, 6)),
)
SEEDS = st.integers(0, 2**31 - 1)


def loss_cases(
    names: list[str],
    sizes: st.SearchStrategy[int] = SIZES,
    widths: st.SearchStrategy[int] = WIDTHS,
) -> st.SearchStrategy[LossCase]:
    """Cases of these losses."""
    return st.builds(
        LossCase,
        loss=st.sampled_from(names),
        n=sizes,
        d=widths,
        m=sizes,
        dtype=st.sampled_from(list(DTYPES)),
        temperature=TEMPERATURES,
        normalize=st.booleans(),
        reduction=st.sampled_from(("mean", "sum", "none")),
        values=st.one_of(st.just("plain"), st.sampled_from(ORDINARY + EXTREME)),
        layouts=st.tuples(*[st.sampled_from(LAYOUTS)] * 3),
        classes=st.sampled_from((1, 2, 7, 1000)),
        far_ids=st.booleans(),
        seed=SEEDS,
    )


def values(shape: tuple[int, ...], case: Any, generator: torch.Generator) -> Tensor:
    """Float64 values of the kind that the case asks for; rows are of about unit length."""
    width = max(1, shape[-1])
    x = torch.randn(shape, generator=generator, dtype=torch.float64) / width**0.5
    kind = case.values
    if not x.numel():
        return x
    flat = x.view(-1, shape[-1])
    if kind == "near":
        flat.copy_(flat[:1] + 1e-3 * flat)
    elif kind == "equal":
        flat.copy_(flat[:1].clone().expand_as(flat))
    elif kind == "zeros":
        flat[:: 1 + case.seed % 3] = 0
    elif kind == "denormal":
        x.mul_(1e-41 if case.dtype != "float64" else 1e-310)
    elif kind == "tiny":
        x.mul_(1e-14)
    elif kind == "huge":
        x.mul_({"float16": 6e4, "float64": 1e300}.get(case.dtype, 1e38) * 0.5)
    elif kind == "mixed":
        flat.mul_(10.0 ** torch.randint(-4, 4, (len(flat), 1), generator=generator))
    elif kind in ("nan", "inf", "-inf"):
        x.view(-1)[case.seed % x.numel()] = float(kind)
    return x


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The same values in other memory; "expanded" and "broadcast column" change them first."""
    if layout == "strided":
        wide = torch.full((*x.shape[:-1], 2 * x.shape[-1] + 1), torch.nan, dtype=x.dtype)
        return wide[..., 1::2].copy_(x)
    if layout == "transposed":
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "offset":  # an odd number of elements: no vector load is aligned
        memory = torch.full((x.numel() + 3,), torch.nan, dtype=x.dtype)
        return memory[1 : x.numel() + 1].view(x.shape).copy_(x)
    if layout == "poisoned":
        wide = torch.full(
            (x.shape[0] + 2, *x.shape[1:-1], x.shape[-1] + 5), torch.nan, dtype=x.dtype
        )
        return wide[1:-1, ..., 2 : x.shape[-1] + 2].copy_(x)
    if layout == "expanded" and x.shape[0]:
        return x[:1].clone().expand_as(x)
    if layout == "broadcast column" and x.shape[-1]:
        return x[..., :1].clone().expand_as(x)
    return x


def ids(count: int, case: LossCase, generator: torch.Generator) -> Tensor:
    """[count] ids of some classes."""
    found = torch.randint(0, case.classes, (count,), generator=generator)
    return found * (2**40 + 1) - 2**62 if case.far_ids else found


def tensors(case: LossCase) -> dict[str, Tensor]:
    """x, y, z [n, d], bank [m, d], own [n, m % 9, d], labels, bank_ids, own_ids."""
    generator = torch.Generator().manual_seed(case.seed)
    dtype = DTYPES[case.dtype]
    base = values((case.n, case.d), case, generator)
    found = {}
    for i, name in enumerate("xyz"):
        noise = torch.randn(base.shape, generator=generator, dtype=torch.float64)
        each = (
            base
            if case.values in EXTREME and i == 0
            else base + (0.3 / max(1, case.d) ** 0.5) * noise
        )
        if case.values in ("equal", "zeros", "denormal", "tiny", "huge", "mixed"):
            each = base.roll(i, -1) if base.numel() else base
        found[name] = laid_out(each.to(dtype), case.layouts[i])
    # Of the extremes a bank has none but its own.
    bank = values((case.m, case.d), case, generator) if case.values in ORDINARY else None
    if bank is None:
        bank = torch.randn((case.m, case.d), generator=generator, dtype=torch.float64)
    found["bank"] = laid_out(bank.to(dtype), case.layouts[2])
    own = torch.randn((case.n, case.m % 9, case.d), generator=generator, dtype=torch.float64)
    found["own"] = laid_out(own.to(dtype), case.layouts[1])
    found["labels"] = ids(case.n, case, generator)
    found["bank_ids"] = ids(case.m, case, generator)
    found["own_ids"] = ids(case.n * (case.m % 9), case, generator).view(case.n, case.m % 9)
    return found


Call = Callable[[Any, dict[str, Tensor], LossCase], Tensor]
SCALE = lambda c: 1 / c.temperature  # noqa: E731


def _common(c: LossCase) -> dict[str, Any]:
    return {"normalize": c.normalize, "reduction": c.reduction}


def _ids(c: LossCase, t: dict[str, Tensor], keys: str | None) -> dict[str, Any]:
    if c.classes == 1000:
        return {}
    more = {} if keys is None else {"negative_ids": t[keys]}
    return {"query_ids": t["labels"], **more}


def _number(value: float, c: LossCase) -> Tensor:
    """A number as a tensor that a gradient goes to, in the widest dtype."""
    return torch.tensor(
        value, dtype=torch.float64 if c.seed % 2 else torch.float32
    ).requires_grad_()


LOSSES: dict[str, Call] = {
    "nt_xent": lambda f, t, c: f.nt_xent_loss(t["x"], t["y"], c.temperature, **_common(c)),
    "nt_xent views": lambda f, t, c: f.nt_xent_loss(
        [t["x"], t["y"], t["z"]], temperature=c.temperature, **_common(c)
    ),
    "info_nce": lambda f, t, c: f.info_nce_loss(
        t["x"], t["y"], None, c.temperature, **_common(c), **_ids(c, t, None)
    ),
    "info_nce bank": lambda f, t, c: f.info_nce_loss(
        t["x"], t["y"], t["bank"].detach(), c.temperature, **_common(c), **_ids(c, t, "bank_ids")
    ),
    "info_nce learned": lambda f, t, c: f.info_nce_loss(
        t["x"], t["y"], t["bank"], c.temperature, **_common(c), **_ids(c, t, "bank_ids")
    ),
    "info_nce paired": lambda f, t, c: f.info_nce_loss(
        t["x"], t["y"], t["own"], c.temperature, negative_mode="paired", **_common(c),
        **_ids(c, t, "own_ids"),
    ),
    "clip": lambda f, t, c: f.clip_loss(t["x"], t["y"], SCALE(c), **_common(c)),
    "siglip": lambda f, t, c: f.siglip_loss(t["x"], t["y"], SCALE(c), -2.0, **_common(c)),
    "sup_con": lambda f, t, c: f.sup_con_loss(t["x"], t["labels"], c.temperature, **_common(c)),
    "dcl": lambda f, t, c: f.dcl_loss(t["x"], t["y"], c.temperature, **_common(c)),
    "dclw": lambda f, t, c: f.dcl_loss(t["x"], t["y"], c.temperature, sigma=0.5, **_common(c)),
    "byol": lambda f, t, c: f.byol_loss(t["x"], t["y"], reduction=c.reduction),
    "simsiam": lambda f, t, c: f.simsiam_loss(t["x"], t["y"], t["z"], t["y"], reduction=c.reduction),
    "alignment": lambda f, t, c: f.alignment_loss(t["x"], t["y"], **_common(c)),
    "contrastive": lambda f, t, c: f.contrastive_loss(
        t["x"], t["y"], t["labels"] == t["labels"].roll(1), reduction=c.reduction
    ),
    "margin": lambda f, t, c: f.margin_loss(
        t["x"], t["y"], t["x"], t["z"], reduction=c.reduction
    ),
    "uniformity": lambda f, t, c: f.uniformity_loss(t["x"], normalize=c.normalize),
    "triplet hard": lambda f, t, c: f.triplet_loss(t["x"], t["labels"], normalize=c.normalize),
    "triplet hard cosine": lambda f, t, c: f.triplet_loss(
        t["x"], t["labels"], distance="cosine", reduction="sum"
    ),
    "triplet semihard": lambda f, t, c: f.triplet_loss(
        t["x"][:60], t["labels"][:60], mining="semihard", normalize=c.normalize
    ),
    "triplet all": lambda f, t, c: f.triplet_loss(
        t["x"][:60], t["labels"][:60], mining="all", normalize=c.normalize
    ),
    "siglip learned": lambda f, t, c: f.siglip_loss(
        t["x"], t["y"], _number(SCALE(c), c), _number(-1.5, c), **_common(c)
    ),
    "sup_con two": lambda f, t, c: f.sup_con_loss(
        t["x"], t["labels"] % 2, _number(c.temperature, c), **_common(c)
    ),
    "dcl learned": lambda f, t, c: f.dcl_loss(
        t["x"], t["y"], _number(c.temperature, c), **_common(c)
    ),
    "vae": lambda f, t, c: f.vae_loss(
        t["x"], t["y"].sigmoid(), t["y"], t["z"], beta=c.temperature, reduction=c.reduction
    ),
    "vae gaussian": lambda f, t, c: f.vae_loss(
        t["x"], t["y"], t["z"], t["y"], likelihood="gaussian", reduction=c.reduction
    ),
    "vae spread": lambda f, t, c: f.vae_loss(
        t["x"], t["y"], t["z"], t["x"], likelihood="gaussian", x_log_variance=t["z"],
        free_bits=0.1, reduction=c.reduction,
    ),
    "features": lambda f, t, c: f.feature_reconstruction_loss(
        t["x"], t["y"], reduction=c.reduction
    ),
    "features smooth": lambda f, t, c: f.feature_reconstruction_loss(
        [t["x"], t["y"][:, ::2]], [t["z"], t["x"][:, ::2]], weights=[0.5, 2.0],
        distance="smooth_l1", beta=0.3, reduction=c.reduction,
    ),
    "features unit": lambda f, t, c: f.feature_reconstruction_loss(
        t["x"], t["y"], normalize="channels", reduction=c.reduction
    ),
    **{
        f"adversarial {form}": lambda f, t, c, form=form: f.adversarial_loss(
            t["x"], t["y"], form=form, reduction=c.reduction
        )
        for form in ("non_saturating", "hinge", "least_squares", "wasserstein")
    },
    "adversarial generator": lambda f, t, c: f.adversarial_loss(
        t["x"], form="minimax", reduction=c.reduction
    ),
    "adversarial byol": lambda f, t, c: f.adversarial_byol_loss(
        t["x"], t["y"], t["z"], kl_weight=0.1, clr_weight=0.5, temperature=c.temperature
    ),
    "contrastive kl": lambda f, t, c: f.contrastive_kl_loss(
        t["x"], t["y"], t["bank"].detach(), c.temperature
    ),
    "moment kl": lambda f, t, c: f.moment_kl_loss(t["x"]),
}  # fmt: skip
# Made of elements, not of similarities: nothing in them is as large as 1 / temperature.
ELEMENTWISE = ("vae", "features", "adversarial ", "moment kl")
# These choose between rows and jump where two are equally near: values are compared, gradients are not.
CHOOSING = ("triplet", "margin", "contrastive")
