# SPDX-License-Identifier: Apache-2.0
"""SimSiam: BYOL without the moving average; the target is the network itself, held still."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ssltrain.config import TrainConfig
from ssltrain.methods.base import Batch, Method, Predicting, StepMetrics, projector
from ssltrain.models import Encoder, Network, mlp_head
from ssltrain.parallel import World, unwrap


class _Siamese(Predicting):
    """Gives predictions p and the projections z that they start from, z without gradient."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z = self.network(x)
        return self.predictor(z), z.detach()


class SimSiam(Method):
    """Chen and He 2020, arXiv:2011.10566."""

    def __init__(
        self, config: TrainConfig, encoder: Encoder, world: World, total_steps: int
    ) -> None:
        super().__init__(config, world, total_steps)
        dim = config.projector_dim
        network = Network(encoder, projector(config, encoder, layers=3, norm_out=True))
        predictor = mlp_head(dim, config.predictor_hidden or max(dim // 4, 1), dim)
        self.online = world.wrap(_Siamese(network, predictor))

    def train_step(self, batch: Batch) -> StepMetrics:
        """Each view predicts the projection of the other."""
        reports = []
        for share, part in self.micro_batches(batch):
            with self.autocast():
                p, z = self.online(torch.cat([part.view_1, part.view_2]))
            (p1, p2), (z1, z2) = p.chunk(2), z.chunk(2)
            loss = self.ops.simsiam_loss(p1, z2, p2, z1)
            self.backward(share * loss)
            reports.append(share * torch.stack([loss.detach(), *self.told_apart(p1, z2)]))
        return StepMetrics(*torch.stack(reports).sum(dim=0).unbind())

    def fixed_rate(self) -> nn.Module:
        """The predictor keeps its learning rate (section 4.2 of the paper)."""
        predictor: nn.Module = unwrap(self.online).predictor
        return predictor
