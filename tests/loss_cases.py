# SPDX-License-Identifier: Apache-2.0
"""Every loss with its plain twin and inputs: what the tests of all losses run over."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn


def views(n: int, d: int, count: int = 2, noise: float = 0.5) -> list[Tensor]:
    """Noisy views of the same samples: positives that can be found, but not trivially."""
    generator = torch.Generator().manual_seed(1000 * n + d)
    base = torch.randn(n, d, generator=generator)
    return [base + noise * torch.randn(n, d, generator=generator) for _ in range(count)]


def labels_for(n: int) -> Tensor:
    """Classes of several sizes, among them one with a single member when n allows it."""
    labels = torch.arange(n) % max(1, min(7, n // 3))
    if n > 5:
        labels[-1] = 99
    return labels


class Case:
    """A loss as a function of its differentiable inputs, ours and the reference's."""

    def __init__(
        self,
        name: str,
        make: Callable[[int, int], list[Tensor]],
        targets: tuple[int, ...] = (),
        **keywords,
    ) -> None:
        self.name, self.make, self.keywords = name, make, keywords
        self.targets = targets  # inputs that get no gradient

    def call(self, module, inputs: list[Tensor], **more) -> Tensor:
        """Evaluate ``module``'s function of that name."""
        return self.run(getattr(module, self.name.split(" ")[0]), inputs, {**self.keywords, **more})

    def run(self, function: Callable, inputs: list[Tensor], keywords: dict) -> Tensor:
        """Put tensors and keywords where the function wants them."""
        return function(*inputs, **keywords)


class Views(Case):
    """Three views in a list, and a temperature."""

    def run(self, function, inputs, keywords):
        return function(list(inputs[:3]), temperature=inputs[3], **keywords)


class Labelled(Case):
    """z with labels."""

    def run(self, function, inputs, keywords):
        return function(inputs[0], labels_for(len(inputs[0])), *inputs[1:], **keywords)


class Pairs(Case):
    """Pairs, every third of the same class."""

    def run(self, function, inputs, keywords):
        return function(*inputs, torch.arange(len(inputs[0])) % 3 == 0, **keywords)


class Queue(Case):
    """InfoNCE with ids of false negatives."""

    def run(self, function, inputs, keywords):
        if keywords.pop("ids", False):
            n, m = len(inputs[0]), inputs[2].shape[:-1] if len(inputs) > 3 else (len(inputs[0]),)
            keywords["query_ids"] = torch.arange(n) % 5
            if len(inputs) > 3:
                keywords["negative_ids"] = (torch.arange(math.prod(m)) % 7).view(m)
        if len(inputs) == 3:
            return function(*inputs[:2], None, inputs[2], **keywords)
        return function(*inputs, **keywords)


class OneArgument(Case):
    """Only the first input."""

    def run(self, function, inputs, keywords):
        return function(inputs[0], **keywords)


class Autoencoder(Case):
    """Logits or means, data, two outputs of an encoder, and perhaps a spread or a weight of the KL."""

    def run(self, function, inputs, keywords):
        if len(inputs) == 5:
            more = "beta" if inputs[4].ndim < 2 else "x_log_variance"
            keywords[more] = inputs[4]
        return function(*inputs[:4], **keywords)


class Maps(Case):
    """Two maps against two."""

    def run(self, function, inputs, keywords):
        if "normalize" not in keywords:  # of several dimensions
            inputs = [
                x.view(len(x), 1, 1, x.shape[1]) if i % 2 else x for i, x in enumerate(inputs)
            ]
        return function(inputs[:2], inputs[2:], **keywords)


def t(value: float = 0.2) -> Tensor:
    return torch.tensor(value)


def two(n: int, d: int) -> list[Tensor]:
    return [*views(n, d), t()]


def unit_pair(n: int, d: int) -> list[Tensor]:
    return [nn.functional.normalize(v, dim=1) for v in views(n, d)]


def coded(n: int, d: int) -> list[Tensor]:
    """Decoder, data in [0, 1], and codes."""
    x = views(n, d, 4)
    return [2 * x[0], x[1].sigmoid(), x[2], 0.5 * x[3]]


def negatives(n: int, d: int) -> Tensor:
    return torch.randn(2 * n + 3, d, generator=torch.Generator().manual_seed(n))


CASES = [
    Case("nt_xent_loss", two),
    Case("nt_xent_loss none", two, reduction="none"),
    Case("nt_xent_loss raw", lambda n, d: [*unit_pair(n, d), t(0.1)], normalize=False),
    Views("nt_xent_loss views", lambda n, d: [*views(n, d, 3), t()]),
    Views("nt_xent_loss views none", lambda n, d: [*views(n, d, 3), t()], reduction="none"),
    Queue("info_nce_loss batch", two),
    Queue("info_nce_loss batch ids", two, ids=True, reduction="sum"),
    Queue("info_nce_loss queue", lambda n, d: [*views(n, d), negatives(n, d), t()]),
    Queue(
        "info_nce_loss queue ids",
        lambda n, d: [*views(n, d), negatives(n, d), t()],
        ids=True,
        reduction="none",
    ),
    Queue(
        "info_nce_loss paired",
        lambda n, d: [*views(n, d), negatives(4 * n, d)[: 6 * n].view(n, 6, d), t()],
        negative_mode="paired",
        ids=True,
    ),
    Case("clip_loss", lambda n, d: [*unit_pair(n, d), t(10.0)]),
    Case("clip_loss none", lambda n, d: [*views(n, d), t(10.0)], normalize=True, reduction="none"),
    Case("siglip_loss", lambda n, d: [*unit_pair(n, d), t(10.0), t(-10.0)]),
    Case(
        "siglip_loss none",
        lambda n, d: [*views(n, d), t(5.0), t(-1.0)],
        normalize=True,
        reduction="none",
    ),
    Labelled("sup_con_loss", lambda n, d: [views(n, d)[0], t(0.1)]),
    Labelled("sup_con_loss none", lambda n, d: [views(n, d)[0], t()], reduction="none"),
    Labelled("sup_con_loss views", lambda n, d: [torch.stack(views(n, d, 3), 1), t()]),
    Case("dcl_loss", two),
    Case("dcl_loss weighted", two, sigma=0.5, reduction="none"),
    Case("byol_loss", lambda n, d: views(n, d)),
    Case("byol_loss none", lambda n, d: views(n, d), reduction="none"),
    Case("byol_loss_symmetric", lambda n, d: views(n, d, 4)),
    Case("simsiam_loss", lambda n, d: views(n, d, 4)),
    Labelled("triplet_loss hard", lambda n, d: views(n, d)[:1], margin=0.5),
    Labelled("triplet_loss hard cosine", lambda n, d: views(n, d)[:1], distance="cosine"),
    Labelled(
        "triplet_loss hard normalized",
        lambda n, d: views(n, d)[:1],
        normalize=True,
        reduction="mean_nonzero",
    ),
    Labelled("triplet_loss semihard", lambda n, d: views(n, d)[:1], mining="semihard"),
    Labelled(
        "triplet_loss semihard cosine",
        lambda n, d: views(n, d)[:1],
        mining="semihard",
        distance="cosine",
        reduction="mean_nonzero",
    ),
    Labelled("triplet_loss all", lambda n, d: views(n, d)[:1], mining="all", margin=0.4),
    Labelled(
        "triplet_loss all cosine",
        lambda n, d: views(n, d)[:1],
        mining="all",
        distance="cosine",
        reduction="mean_nonzero",
    ),
    Case("margin_loss", lambda n, d: views(n, d, 4), margin=0.3),
    Case("margin_loss floor", lambda n, d: views(n, d, 4), margin=-0.5, form="floor", eps=0.1),
    Pairs("contrastive_loss", lambda n, d: [v / d**0.5 for v in views(n, d)]),
    Pairs(
        "contrastive_loss none",
        lambda n, d: [v / d**0.5 for v in views(n, d)],
        reduction="none",
        margin=2.0,
    ),
    Case("alignment_loss", lambda n, d: views(n, d)),
    Case(
        "alignment_loss cubed",
        lambda n, d: views(n, d),
        alpha=3.0,
        normalize=False,
        reduction="none",
    ),
    OneArgument("uniformity_loss", lambda n, d: views(n, d)[:1]),
    OneArgument(
        "uniformity_loss raw", lambda n, d: [views(n, d)[0] / d**0.5], normalize=False, t=0.7
    ),
    Autoencoder("vae_loss", lambda n, d: [*coded(n, d), t(0.7)]),
    Autoencoder("vae_loss none", coded, reduction="none", free_bits=0.6),
    Autoencoder("vae_loss gaussian", coded, likelihood="gaussian", x_log_variance=-0.5),
    Autoencoder(
        "vae_loss gaussian spread",
        lambda n, d: [*coded(n, d), views(n + 1, d)[0][:n]],
        likelihood="gaussian",
        reduction="none",
    ),
    Maps("feature_reconstruction_loss", lambda n, d: views(n, d, 4), (2, 3)),
    Maps(
        "feature_reconstruction_loss smooth",
        lambda n, d: views(n, d, 4),
        (2, 3),
        distance="smooth_l1",
        beta=0.5,
        weights=[0.5, 2.0],
        reduction="none",
    ),
    Case("adversarial_loss", lambda n, d: views(n, d)),
    Case("adversarial_loss hinge", lambda n, d: views(n, d), form="hinge", reduction="none"),
    Case("adversarial_loss squares", lambda n, d: views(n, d), form="least_squares"),
    Case("adversarial_loss wasserstein", lambda n, d: views(n, d), form="wasserstein"),
    OneArgument("adversarial_loss generator", lambda n, d: views(n, d)[:1], reduction="none"),
    OneArgument("adversarial_loss minimax", lambda n, d: views(n, d)[:1], form="minimax"),
    OneArgument("adversarial_loss closer", lambda n, d: views(n, d)[:1], form="least_squares"),
    OneArgument("moment_kl_loss", lambda n, d: views(n, d)[:1]),
    Case(
        "adversarial_byol_loss",
        lambda n, d: views(n, d, 3),
        (1,),
        adversarial_weight=0.3,
        kl_weight=0.2,
        clr_weight=0.1,
        temperature=0.4,
    ),
    Case("contrastive_kl_loss", lambda n, d: [*views(n, d), negatives(n, d), t()], kl_weight=0.5),
    Case("byol_loss regularised", lambda n, d: [x / d**0.5 for x in views(n, d)], (1,), rho=0.4),
    Maps(
        "feature_reconstruction_loss channels",
        lambda n, d: views(n, d, 4),
        (2, 3),
        normalize="channels",
    ),
]
# On kernels: these run on every instruction set, the others do not depend on it.
ON_TILES = [
    c
    for c in CASES
    if c.name.split("_")[0]
    in ("nt", "info", "clip", "siglip", "sup", "dcl", "uniformity", "vae", "feature")
] + [CASES[23], CASES[24]]
