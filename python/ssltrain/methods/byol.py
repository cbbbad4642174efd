# SPDX-License-Identifier: Apache-2.0
"""BYOL: a network predicts what its own moving average makes of another view."""

from __future__ import annotations

import itertools

import torch

from ssltrain.config import TrainConfig
from ssltrain.methods.base import Batch, Method, Predicting, StepMetrics, projector
from ssltrain.models import Encoder, Network, mlp_head
from ssltrain.parallel import World


class BYOL(Method):
    """Grill et al. 2020, arXiv:2006.07733."""

    def __init__(
        self, config: TrainConfig, encoder: Encoder, world: World, total_steps: int
    ) -> None:
        super().__init__(config, world, total_steps)
        network = Network(encoder, projector(config, encoder, layers=2))
        predictor = mlp_head(
            config.projector_dim,
            config.predictor_hidden or config.projector_hidden,
            config.projector_dim,
        )
        self.online = world.wrap(Predicting(network, predictor))
        decay = self.ops.cosine_decay(config.ema_decay, total_steps)
        self.target = self.ops.EMA(self.network, decay)

    def train_step(self, batch: Batch) -> StepMetrics:
        """Each view predicts what the target network makes of the other; small crops, of both."""
        reports = []
        for share, part in self.micro_batches(batch):
            views = torch.cat([part.view_1, part.view_2])
            with self.autocast():
                p1, p2 = self.online(views).chunk(2)
                crops = [self.online(crop) for crop in part.crops]
                with torch.no_grad():
                    t1, t2 = self.target(views).chunk(2)
            pairs = [(p1, t2), (p2, t1), *itertools.product(crops, (t1, t2))]
            loss = sum(self.ops.byol_loss(p, t) for p, t in pairs) / len(pairs)
            self.backward(share * loss)
            report = torch.stack([loss.detach(), *self.told_apart(p1, t2)])
            reports.append(share * report)
        return StepMetrics(*torch.stack(reports).sum(dim=0).unbind())

    def after_step(self) -> None:
        """Move the target towards the online network."""
        self.target.update(self.network, self.step)
        super().after_step()
