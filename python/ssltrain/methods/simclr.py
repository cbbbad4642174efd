# SPDX-License-Identifier: Apache-2.0
"""SimCLR, and its supervised sibling SupCon: the batch is what an image is contrasted with."""

from __future__ import annotations

import torch
from torch import Tensor

from sslkernels import ContrastiveMetrics
from sslkernels.grad_cache import cached_step
from ssltrain.config import TrainConfig
from ssltrain.methods.base import Batch, Method, StepMetrics, projector
from ssltrain.models import Encoder, Network
from ssltrain.parallel import World


class SimCLR(Method):
    """Chen et al. 2020, arXiv:2002.05709."""

    def __init__(
        self, config: TrainConfig, encoder: Encoder, world: World, total_steps: int
    ) -> None:
        super().__init__(config, world, total_steps)
        self.online = world.wrap(Network(encoder, projector(config, encoder, layers=2)))

    def train_step(self, batch: Batch) -> StepMetrics:
        """Every view must find its partners among all views of the batch."""
        if self.config.micro_batch:
            return self._train_step_in_parts(batch)
        with self.autocast():
            zs = list(self.online(torch.cat([batch.view_1, batch.view_2])).chunk(2))
            if batch.crops:
                zs += self.online(torch.cat(batch.crops)).chunk(len(batch.crops))
        loss, metrics = self.loss(zs, batch)
        self.backward(loss)
        return StepMetrics(loss.detach(), *metrics)

    def loss(self, zs: list[Tensor], batch: Batch) -> tuple[Tensor, ContrastiveMetrics]:
        """NT-Xent over the batch of all processes, and metrics over that of this one."""
        t = self.config.temperature
        views = zs if len(zs) > 2 else zs[0]
        partner = None if len(zs) > 2 else zs[1]
        with torch.set_grad_enabled(self.world.size == 1):
            loss, metrics = self.ops.nt_xent_loss(views, partner, t, return_metrics=True)
        if self.world.size > 1:
            loss = self.ops.nt_xent_loss(views, partner, t, group=True)
        return loss, metrics

    def _train_step_in_parts(self, batch: Batch) -> StepMetrics:
        """The same gradient with the activations of one micro-batch at a time."""
        report: list[Tensor] = []

        def loss_fn(*zs: Tensor) -> Tensor:
            loss, metrics = self.loss(list(zs), batch)
            report.extend([loss.detach(), *metrics])
            return self.scaler.scale(loss)

        with self.autocast():
            views = (batch.view_1, batch.view_2, *batch.crops)
            cached_step(self.online, views, loss_fn, self.config.micro_batch)
        return StepMetrics(*report)


class SupCon(SimCLR):
    """Khosla et al. 2020, arXiv:2004.11362: all views of a class are partners.

    An image without a label has its own views as partners, as in SimCLR.
    """

    needs_labels = True

    def loss(self, zs: list[Tensor], batch: Batch) -> tuple[Tensor, ContrastiveMetrics]:
        """L_out of the paper over the batch of all processes, and the metrics of SimCLR."""
        z, t = torch.stack(zs, dim=1), self.config.temperature
        labels = classes(batch, self.world.rank * len(z))
        group = {"group": True} if self.world.size > 1 else {}
        loss = self.ops.sup_con_loss(z, labels, t, **group)
        with torch.no_grad():
            _, metrics = self.ops.nt_xent_loss(zs[0], zs[1], t, return_metrics=True)
        return loss, metrics


def classes(batch: Batch, first: int = 0) -> Tensor:
    """Labels of a batch, int64 [N], with a class of its own for each image that has none.

    Args:
        batch: With labels.
        first: Number of its first image in the batch of all processes.
    """
    if batch.labels is None:
        raise ValueError("SupCon: the batch must have labels, got None")
    own = -1 - torch.arange(first, first + len(batch.labels), device=batch.labels.device)
    return torch.where(batch.labels < 0, own, batch.labels)
