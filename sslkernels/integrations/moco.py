# SPDX-License-Identifier: Apache-2.0
"""The official MoCo model and its queue, with our loss and updates (facebookresearch/moco).

``MoCo`` has the names, arguments, buffers and state-dict keys of ``moco.builder.MoCo``, so checkpoints
load both ways; ``from_moco`` and ``to_moco`` convert the queue alone.  Nothing here needs that code.

What is better than the original (docs/migration/moco.md): ``loss`` needs neither logits nor a copy of
the queue, batches need not divide the queue, and it runs in one process and on CPUs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from sslkernels.functional import info_nce_loss
from sslkernels.integrations import _glue as glue
from sslkernels.integrations import _ops as ops
from sslkernels.integrations._patching import Peer
from sslkernels.queue import KeyQueue

__all__ = ["MoCo", "from_moco", "to_moco"]


class MoCo(nn.Module):
    """MoCo v1 and v2: a query encoder, its average that encodes keys, and a queue of keys.

    Args:
        base_encoder: Called with ``num_classes=dim``; with ``mlp`` its result has a linear ``fc``.
        dim: D, features.
        K: Keys in the queue.
        m: Decay of the key encoder.
        T: Temperature.
        mlp: Whether to put a hidden layer in front of ``fc`` (v2).
    """

    queue: Tensor
    queue_ptr: Tensor

    def __init__(
        self,
        base_encoder: Callable[..., nn.Module],
        dim: int = 128,
        K: int = 65536,
        m: float = 0.999,
        T: float = 0.07,
        mlp: bool = False,
    ) -> None:
        super().__init__()
        self.K: int = K
        self.m: float = m
        self.T: float = T
        encoders: list[Any] = [base_encoder(num_classes=dim) for _ in range(2)]
        if mlp:
            width = encoders[0].fc.weight.shape[1]
            for encoder in encoders:
                encoder.fc = nn.Sequential(nn.Linear(width, width), nn.ReLU(), encoder.fc)
        self.encoder_q: Any = encoders[0]
        self.encoder_k: Any = encoders[1]
        with torch.no_grad():
            pairs = zip(self.encoder_q.parameters(), self.encoder_k.parameters(), strict=True)
            for param_q, param_k in pairs:
                param_k.copy_(param_q)
                param_k.requires_grad = False
        # [D, K] as in the original, with the memory of [K, D]: a key is one row of it.
        queue = F.normalize(torch.randn(dim, K), dim=0)
        self.register_buffer("queue", queue.t().contiguous().t())
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.long))

    def forward(self, im_q: Tensor, im_k: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [N, 1 + K] with the positive in column 0, and labels [N] of 0, as the original.

        Both the logits and a copy of the queue are needed for this; ``loss`` needs neither.

        Args:
            im_q: Query images.
            im_k: Key images.
        """
        q, k = self._features(im_q, im_k)
        positive = (q * k).sum(1, keepdim=True)
        logits = torch.cat((positive, q @ self.queue.clone()), 1) / self.T
        self._dequeue_and_enqueue(k)
        return logits, torch.zeros(len(q), dtype=torch.long, device=q.device)

    def loss(self, im_q: Tensor, im_k: Tensor, *, return_metrics: bool = False) -> Any:
        """The cross-entropy of the logits, without them; then the keys are enqueued.

        Args:
            im_q: Query images.
            im_k: Key images.
            return_metrics: Whether to return ContrastiveMetrics as well (top-1 and top-5 over the
                1 + K logits, as the official code prints them).
        """
        q, k = self._features(im_q, im_k)
        loss = info_nce_loss(
            q, k, self._rows(), self.T, normalize=False, return_metrics=return_metrics
        )
        self._dequeue_and_enqueue(k)
        return loss

    def _features(self, im_q: Tensor, im_k: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised queries and keys [N, D]; the key encoder has been updated."""
        q = F.normalize(self.encoder_q(im_q), dim=1)
        with torch.no_grad():
            self._momentum_update_key_encoder()
            shuffled, order = self._batch_shuffle_ddp(im_k)
            k = F.normalize(self.encoder_k(shuffled), dim=1)
            return q, self._batch_unshuffle_ddp(k, order)

    @torch.no_grad()
    def _momentum_update_key_encoder(self) -> None:
        """Average the parameters of the query encoder into those of the key encoder, in one call."""
        ops.average_(list(self.encoder_k.parameters()), list(self.encoder_q.parameters()), self.m)

    def _rows(self) -> Tensor:
        """[K, D]: the queue, a view that is contiguous also after ``load_state_dict(assign=True)``."""
        if not self.queue.t().is_contiguous():
            self.queue = self.queue.t().contiguous().t()
        return self.queue.t()

    @torch.no_grad()
    def _dequeue_and_enqueue(self, keys: Tensor) -> None:
        """Write the keys of all ranks; a batch that reaches the end goes on at the beginning."""
        ops.enqueue_(self._rows(), self.queue_ptr, ops.gather_rows(keys))

    @torch.no_grad()
    def _batch_shuffle_ddp(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """This rank's share of the shuffled batch of all, and the order; for BatchNorm's statistics."""
        if glue.world_size() == 1:  # the statistics of one process don't depend on the order
            return x, torch.arange(len(x), device=x.device)
        every = ops.gather_rows(x)
        order = torch.randperm(len(every)).to(x.device)
        dist.broadcast(order, src=0)
        return every[order.view(glue.world_size(), -1)[glue.rank()]], order.argsort()

    @torch.no_grad()
    def _batch_unshuffle_ddp(self, x: Tensor, idx_unshuffle: Tensor) -> Tensor:
        """The rows of this rank in their own order."""
        if glue.world_size() == 1:
            return x
        return ops.gather_rows(x)[idx_unshuffle.view(glue.world_size(), -1)[glue.rank()]]


def from_moco(state_dict: Mapping[str, Any], *, gather: bool = False) -> KeyQueue:
    """The queue of a checkpoint of the official code: ``KeyQueue.from_moco``.

    Args:
        state_dict: With ``queue`` [D, K] and ``queue_ptr``.
        gather: As for ``KeyQueue``.
    """
    return KeyQueue.from_moco(state_dict, gather=gather)


@torch.no_grad()
def to_moco(queue: KeyQueue, prefix: str = "") -> dict[str, Tensor]:
    """The entries ``queue`` [D, K] and ``queue_ptr`` of a checkpoint of the official code.

    That code takes every row for a key: rows that are still empty become random unit rows, with which
    it starts.

    Args:
        queue: To be converted; it is copied.
        prefix: In front of the names, such as "module.".
    """
    rows = queue.queue.clone()
    empty = rows[len(queue) :]
    empty.copy_(F.normalize(torch.randn(empty.shape, device=rows.device), dim=1))
    return {f"{prefix}queue": rows.t().contiguous(), f"{prefix}queue_ptr": queue.queue_ptr.clone()}


PEER = Peer(
    name="moco",
    package="moco.builder",
    distribution=None,
    tested=(),
    swaps={"moco.builder.MoCo": MoCo},
    install="get the official code (facebookresearch/moco) and put it on PYTHONPATH",
    unversioned=True,
)
