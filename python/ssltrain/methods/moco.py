# SPDX-License-Identifier: Apache-2.0
"""MoCo: versions 1 and 2 with a queue of keys, version 3 with the batch and a predictor."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from sslkernels.grad_cache import cached_step
from ssltrain.config import TrainConfig
from ssltrain.methods.base import Batch, Method, Predicting, StepMetrics, projector
from ssltrain.models import Encoder, Network, mlp_head
from ssltrain.parallel import World


class MoCo(Method):
    """He et al. 2020, arXiv:1911.05722, with the head of v2 (arXiv:2003.04297).

    ``--projector-layers 1`` is the head of v1.
    """

    def __init__(
        self, config: TrainConfig, encoder: Encoder, world: World, total_steps: int
    ) -> None:
        super().__init__(config, world, total_steps)
        self.online = world.wrap(Network(encoder, projector(config, encoder, layers=2, norm=False)))
        self.target = self.ops.EMA(self.network, config.ema_decay)
        dtype = torch.bfloat16 if config.queue_dtype == "bf16" else torch.float32
        self.queue = self.ops.KeyQueue(
            config.queue_size, config.projector_dim, dtype=dtype, gather=world.size > 1
        )
        self.queue.to(world.device)

    @torch.no_grad()
    def prime(self, views: Iterable[Tensor]) -> None:
        """Fill the queue with keys of real images: the first losses then have their negatives."""
        for view in views:
            with self.autocast():
                k = self.target(view)
            self.queue.enqueue(k)
            if len(self.queue) == self.config.queue_size:
                return

    def _keys(self, view: Tensor, number: int) -> Tensor:
        """Keys of a view in micro-batch ``number`` of the step."""
        if self.config.norms != "shuffle":
            keys: Tensor = self.target(view)
            return keys
        seed = (self.config.seed + 1) * 1_000_003 + self.step * 10_007 + number
        return self.world.shuffled(view, self.target, seed)

    def train_step(self, batch: Batch) -> StepMetrics:
        """Queries of view 1 must find keys of view 2 among the keys of the queue."""
        self.target.update(self.network)
        if self.config.symmetric:
            v1, v2 = batch.view_1, batch.view_2
            batch = Batch(torch.cat([v1, v2]), torch.cat([v2, v1]))
        reports, new_keys = [], []
        for number, (share, part) in enumerate(self.micro_batches(batch)):
            with self.autocast():
                with torch.no_grad():
                    k = self._keys(part.view_2, number)
                q = self.online(part.view_1)
            # The negatives are the queue alone, so a micro-batch changes nothing but batch norm.
            loss, metrics = self.ops.info_nce_loss(
                q, k, self.queue.keys, self.config.temperature, return_metrics=True
            )
            self.backward(share * loss)
            reports.append(share * torch.stack([loss.detach(), *metrics]))
            new_keys.append(k)
        self.queue.enqueue(torch.cat(new_keys))
        return StepMetrics(*torch.stack(reports).sum(dim=0).unbind())


class MoCo3(Method):
    """Chen, Xie and He 2021, arXiv:2104.02057."""

    def __init__(
        self, config: TrainConfig, encoder: Encoder, world: World, total_steps: int
    ) -> None:
        super().__init__(config, world, total_steps)
        dim = config.projector_dim
        network = Network(encoder, projector(config, encoder, layers=2, norm_out=True))
        hidden = config.predictor_hidden or config.projector_hidden
        self.online = world.wrap(Predicting(network, mlp_head(dim, hidden, dim)))
        decay = self.ops.cosine_decay(config.ema_decay, total_steps)
        self.target = self.ops.EMA(self.network, decay)

    def train_step(self, batch: Batch) -> StepMetrics:
        """Queries of each view must find the keys of the other among the keys of the batch."""
        self.target.update(self.network, self.step)
        with self.autocast(), torch.no_grad():
            parts = [part for _, part in self.micro_batches(batch)]
            k1 = torch.cat([self.target(part.view_1) for part in parts])
            k2 = torch.cat([self.target(part.view_2) for part in parts])
        report: list[Tensor] = []

        def loss_fn(q1: Tensor, q2: Tensor) -> Tensor:
            (loss_1, metrics_1), (loss_2, metrics_2) = (
                self._contrast(q1, k2),
                self._contrast(q2, k1),
            )
            loss = loss_1 + loss_2
            both = zip(metrics_1, metrics_2, strict=True)
            report.extend([loss.detach(), *((a + b) / 2 for a, b in both)])
            return self.scaler.scale(loss)

        with self.autocast():
            if self.config.micro_batch:
                views = (batch.view_1, batch.view_2)
                cached_step(self.online, views, loss_fn, self.config.micro_batch)
            else:
                q1, q2 = self.online(torch.cat([batch.view_1, batch.view_2])).chunk(2)
                loss_fn(q1, q2).backward()
        return StepMetrics(*report)

    def _contrast(self, q: Tensor, k: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """InfoNCE, times 2 temperature as in the paper's pseudocode; keys of all processes."""
        t = self.config.temperature
        if self.world.size == 1:
            loss, metrics = self.ops.info_nce_loss(q, k, None, t, return_metrics=True)
        else:
            keys = self.world.gather_rows(k)
            own = torch.arange(len(q), device=q.device) + self.world.rank * len(q)
            loss, metrics = self.ops.info_nce_loss(
                q,
                k,
                keys,
                t,
                return_metrics=True,
                query_ids=own,
                negative_ids=torch.arange(len(keys), device=q.device),
            )
        return 2 * t * loss, metrics
