# SPDX-License-Identifier: Apache-2.0
"""SimCLR, BYOL and MoCo: each a network and one ``train_step``.

A ``train_step`` runs forward and backward and leaves the gradients in the parameters. The
losses, the queue and the moving average are those of ``sslkernels``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

import sslkernels
from sslkernels.grad_cache import cached_step
from ssltrain.config import TrainConfig
from ssltrain.errors import UserError
from ssltrain.models import Encoder, Network, mlp_head
from ssltrain.parallel import World, unwrap


class StepMetrics(NamedTuple):
    """What one step reports, as 0-d tensors on the device: reading them is left to the logger."""

    loss: Tensor
    top1: Tensor
    top5: Tensor
    positive_similarity: Tensor
    negative_similarity: Tensor


class Method(nn.Module, ABC):
    """What the three methods share.

    Attributes:
        online: the network that is trained, under DDP where there are many processes.
    """

    online: nn.Module

    def __init__(self, config: TrainConfig, world: World, total_steps: int) -> None:
        super().__init__()
        self.config = config
        self.world = world
        self.total_steps = total_steps
        self.step = 0  # optimiser steps taken

    @property
    def encoder(self) -> Encoder:
        """The encoder that the evaluation uses."""
        return self.network.encoder

    @property
    @abstractmethod
    def network(self) -> Network:
        """Encoder and projector of the online side."""

    def start_from(self, weights: dict[str, Tensor]) -> list[str]:
        """Take over the weights of another run, before the first step.

        Args:
            weights: what ``online_weights`` found in its checkpoint, of any method.

        Returns:
            The heads (projector, predictor) that keep their fresh weights, as theirs do not fit.

        Raises:
            UserError: the encoders differ.
        """
        online = unwrap(self.online)
        predictor = getattr(online, "predictor", None)
        heads = {"projector": self.network.projector, "predictor": predictor}
        load_encoder(self.network.encoder, weights)
        fresh = []
        for name, head in heads.items():
            if head is None:
                continue
            found, own = part_of(weights, name), head.state_dict()
            if {k: v.shape for k, v in found.items()} == {k: v.shape for k, v in own.items()}:
                head.load_state_dict(found)
            else:
                fresh.append(name)
        target = getattr(self, "target", None)  # the moving average, in methods that have one
        if target is not None:
            target.module.load_state_dict(self.network.state_dict())
        return fresh

    def prime(self, views: Iterable[Tensor]) -> None:
        """Called before the first step with views of batches, each float [B, C, H, W]."""

    @abstractmethod
    def train_step(self, view_1: Tensor, view_2: Tensor) -> StepMetrics:
        """Forward and backward of one batch of views, float [B, C, H, W] each."""

    def after_step(self) -> None:
        """Called after the optimiser step."""
        self.step += 1

    def autocast(self) -> torch.autocast:
        """The precision of the networks; the losses choose their own."""
        return torch.autocast(
            self.world.device.type, torch.bfloat16, enabled=self.config.amp == "bf16"
        )

    def micro_batches(self, *views: Tensor) -> Iterator[tuple[float, tuple[Tensor, ...]]]:
        """The share of the batch in each micro-batch, and the views of it."""
        size = len(views[0])
        chunks = [torch.split(view, self.config.micro_batch or size) for view in views]
        for parts in zip(*chunks, strict=True):
            yield len(parts[0]) / size, parts


def online_weights(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The online network in the state of a method: names that start with the name of the part.

    DDP and BYOL's predictor wrap the network; what they put before the names is taken off.
    """
    found = {}
    for name, value in state.items():
        if name.startswith("online."):
            words = name.split(".")[1:]
            while words[0] in ("module", "network"):
                words = words[1:]
            found[".".join(words)] = value
    return found


def part_of(weights: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """The weights of encoder, projector or predictor, under their own names."""
    return {k[len(name) + 1 :]: v for k, v in weights.items() if k.startswith(name + ".")}


def load_encoder(encoder: Encoder, weights: dict[str, Tensor]) -> None:
    """Load an encoder from ``online_weights``.

    Raises:
        UserError: they are of another encoder.
    """
    try:
        encoder.load_state_dict(part_of(weights, "encoder"))
    except RuntimeError as error:
        reason = " ".join(str(error).split()[:40])
        raise UserError(f"the checkpoint is of another network: {reason}") from error


class SimCLR(Method):
    """Chen et al. 2020, arXiv:2002.05709."""

    def __init__(
        self, config: TrainConfig, encoder: Encoder, world: World, total_steps: int
    ) -> None:
        super().__init__(config, world, total_steps)
        projector = mlp_head(encoder.dim, config.projector_hidden, config.projector_dim)
        self.online = world.wrap(Network(encoder, projector))

    @property
    def network(self) -> Network:
        """Encoder and projector."""
        network: Network = unwrap(self.online)
        return network

    def train_step(self, view_1: Tensor, view_2: Tensor) -> StepMetrics:
        """Every view must find its partner among all views of the batch."""
        if self.config.micro_batch:
            return self._train_step_in_parts(view_1, view_2)
        with self.autocast():
            z1, z2 = self.online(torch.cat([view_1, view_2])).chunk(2)
        loss, metrics = self._loss(z1, z2)
        loss.backward()
        return StepMetrics(loss.detach(), *metrics)

    def _loss(self, z1: Tensor, z2: Tensor) -> tuple[Tensor, sslkernels.ContrastiveMetrics]:
        """NT-Xent over the batch of all processes, and metrics over that of this one."""
        temperature = self.config.temperature
        with torch.set_grad_enabled(self.world.size == 1):
            here = sslkernels.nt_xent_loss(z1, z2, temperature, return_metrics=True)
        loss, metrics = cast(tuple[Tensor, sslkernels.ContrastiveMetrics], here)
        if self.world.size > 1:
            everywhere = sslkernels.nt_xent_loss(z1, z2, temperature, group=True)
            loss = cast(Tensor, everywhere)
        return loss, metrics

    def _train_step_in_parts(self, view_1: Tensor, view_2: Tensor) -> StepMetrics:
        """The same gradient with the activations of one micro-batch at a time."""
        metrics: list[Tensor] = []

        def loss_fn(z1: Tensor, z2: Tensor) -> Tensor:
            loss, found = self._loss(z1, z2)
            metrics.extend(found)
            return loss

        with self.autocast():
            loss = cached_step(self.online, (view_1, view_2), loss_fn, self.config.micro_batch)
        return StepMetrics(loss, *metrics)


class Predicting(nn.Module):
    """BYOL's online side: encoder, projector, predictor."""

    def __init__(self, network: Network, predictor: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.predictor = predictor

    def forward(self, x: Tensor) -> Tensor:
        """Predictions of a batch."""
        p: Tensor = self.predictor(self.network(x))
        return p


class BYOL(Method):
    """Grill et al. 2020, arXiv:2006.07733."""

    def __init__(
        self, config: TrainConfig, encoder: Encoder, world: World, total_steps: int
    ) -> None:
        super().__init__(config, world, total_steps)
        hidden, dim = config.projector_hidden, config.projector_dim
        network = Network(encoder, mlp_head(encoder.dim, hidden, dim))
        self.online = world.wrap(Predicting(network, mlp_head(dim, hidden, dim)))
        decay = sslkernels.cosine_decay(config.ema_decay, total_steps)
        self.target = sslkernels.EMA(self.network, decay)

    @property
    def network(self) -> Network:
        """Encoder and projector, without the predictor."""
        network: Network = unwrap(self.online).network
        return network

    def train_step(self, view_1: Tensor, view_2: Tensor) -> StepMetrics:
        """Each view predicts what the target network makes of the other."""
        reports = []
        for share, (part_1, part_2) in self.micro_batches(view_1, view_2):
            views = torch.cat([part_1, part_2])
            with self.autocast():
                p1, p2 = self.online(views).chunk(2)
                with torch.no_grad():
                    t1, t2 = self.target(views).chunk(2)
            loss = 0.5 * (sslkernels.byol_loss(p1, t2) + sslkernels.byol_loss(p2, t1))
            (share * loss).backward()
            with torch.no_grad():  # BYOL has no negatives; these only say how views are told apart
                _, metrics = sslkernels.info_nce_loss(p1.detach(), t2, return_metrics=True)
            reports.append(share * torch.stack([loss.detach(), *metrics]))
        return StepMetrics(*torch.stack(reports).sum(dim=0).unbind())

    def after_step(self) -> None:
        """Move the target towards the online network."""
        self.target.update(self.network, self.step)
        super().after_step()


class MoCo(Method):
    """He et al. 2020, arXiv:1911.05722, with the head of v2 (arXiv:2003.04297)."""

    def __init__(
        self, config: TrainConfig, encoder: Encoder, world: World, total_steps: int
    ) -> None:
        super().__init__(config, world, total_steps)
        hidden, dim = config.projector_hidden, config.projector_dim
        projector = mlp_head(encoder.dim, hidden, dim, norm=False)
        self.online = world.wrap(Network(encoder, projector))
        self.target = sslkernels.EMA(self.network, config.ema_decay)
        self.queue = sslkernels.KeyQueue(config.queue_size, dim, gather=world.size > 1)
        self.queue.to(world.device)

    @property
    def network(self) -> Network:
        """Encoder and projector."""
        network: Network = unwrap(self.online)
        return network

    @torch.no_grad()
    def prime(self, views: Iterable[Tensor]) -> None:
        """Fill the queue with keys of real images: the first losses then have their negatives."""
        for view in views:
            with self.autocast():
                k = self.target(view)
            self.queue.enqueue(k)
            if len(self.queue) == self.config.queue_size:
                return

    def train_step(self, view_1: Tensor, view_2: Tensor) -> StepMetrics:
        """Queries of view 1 must find keys of view 2 among the keys of the queue."""
        self.target.update(self.network)
        if self.config.symmetric:
            view_1, view_2 = torch.cat([view_1, view_2]), torch.cat([view_2, view_1])
        reports, new_keys = [], []
        for share, (part_1, part_2) in self.micro_batches(view_1, view_2):
            with self.autocast():
                with torch.no_grad():
                    k = self.target(part_2)
                q = self.online(part_1)
            # The negatives are the queue alone, so a micro-batch changes nothing but batch norm.
            loss, metrics = sslkernels.info_nce_loss(
                q, k, self.queue.keys, self.config.temperature, return_metrics=True
            )
            (share * loss).backward()
            reports.append(share * torch.stack([loss.detach(), *metrics]))
            new_keys.append(k)
        self.queue.enqueue(torch.cat(new_keys))
        return StepMetrics(*torch.stack(reports).sum(dim=0).unbind())


def build_method(config: TrainConfig, encoder: Encoder, world: World, total_steps: int) -> Method:
    """The method that ``config`` names, on the device of ``world``."""
    methods: dict[str, Callable[..., Method]] = {"simclr": SimCLR, "byol": BYOL, "moco": MoCo}
    return methods[config.method](config, encoder, world, total_steps)
