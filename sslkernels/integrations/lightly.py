# SPDX-License-Identifier: Apache-2.0
"""lightly's contrastive losses, memory banks and momentum update, computed by our ops.

The names, arguments, defaults, return values and state-dict keys are lightly's (1.6.0; with 1.5.26
installed its lazily sized banks too).  Nothing here needs lightly.

What is better than the original (docs/migration/lightly.md):

* a batch that reaches the end of a memory bank goes on at its beginning, where lightly drops the
  rest; of a batch larger than the bank the newest rows stay;
* the bank is not copied for each loss;
* the losses take O(N * D) memory, and half precision is accumulated in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sslkernels import ema
from sslkernels.functional import byol_loss, dcl_loss, info_nce_loss, nt_xent_loss
from sslkernels.integrations import _glue as glue
from sslkernels.integrations import _ops as ops
from sslkernels.integrations._patching import Peer, original

__all__ = [
    "DCLLoss",
    "DCLWLoss",
    "MemoryBankModule",
    "NNMemoryBankModule",
    "NTXentLoss",
    "NegativeCosineSimilarity",
    "negative_mises_fisher_weights",
    "update_momentum",
]

_BANK = "lightly.models.modules.memory_bank.MemoryBankModule"


class MemoryBankModule(nn.Module):
    """lightly's memory bank: the last K features, from random unit rows on.

    The buffers ``bank`` [K, D] and ``bank_ptr`` [1] are not in the state dict, as in lightly;
    ``sslkernels.KeyQueue`` saves its state.

    Args:
        size: (K, D), or 0 for no bank.
        gather_distributed: Enqueue the features of every rank.
        feature_dim_first: Return [D, K] instead of [K, D].

    Raises:
        ValueError: If a size is negative or D is missing.
    """

    bank: Tensor
    bank_ptr: Tensor

    def __init__(
        self,
        size: int | Sequence[int],
        gather_distributed: bool = False,
        feature_dim_first: bool = True,
    ) -> None:
        super().__init__()
        sizes = (size,) if isinstance(size, int) else tuple(size)
        if _bad_size(size, sizes):
            _refuse_size(size)
        self.size = sizes
        self.gather_distributed = gather_distributed
        self.feature_dim_first = feature_dim_first
        self.register_buffer("bank", torch.empty(sizes, dtype=torch.float), persistent=False)
        self.register_buffer("bank_ptr", torch.empty(1, dtype=torch.long), persistent=False)
        if len(sizes) > 1:
            self._init_memory_bank(sizes)

    @glue.torch_errors
    def forward(
        self, output: Tensor, labels: Tensor | None = None, update: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """(output, a copy of the bank as it was), and the output enters the bank if ``update``.

        Args:
            output: [N, D].
            labels: Ignored.
            update: Whether to enqueue.
        """
        if self.size[0] == 0:
            return output, None
        self._size_lazily(output)
        bank = self.bank.clone().detach()
        if self.feature_dim_first:
            bank = bank.transpose(0, -1)
        if update:
            self._dequeue_and_enqueue(output)
        return output, bank

    @torch.no_grad()
    def _init_memory_bank(self, size: tuple[int, ...]) -> None:
        """Random unit rows, drawn as lightly draws them."""
        self.bank = F.normalize(torch.randn(size).type_as(self.bank), dim=-1)
        self.bank_ptr = torch.zeros(1).type_as(self.bank_ptr)

    def _size_lazily(self, output: Tensor) -> None:
        if self.bank.ndim == 1:  # lightly before 1.6: D is that of the first batch
            self._init_memory_bank((*self.size, *output.shape[1:]))

    @torch.no_grad()
    def _dequeue_and_enqueue(self, batch: Tensor) -> None:
        if self.gather_distributed:
            batch = ops.gather_rows(batch)
        if not self.bank.is_contiguous():
            self.bank = self.bank.contiguous()
        ops.enqueue_(self.bank, self.bank_ptr, batch.detach().to(self.bank.device))


def _bad_size(size: Any, sizes: tuple[int, ...]) -> bool:
    if any(x < 0 for x in sizes):
        return True
    if isinstance(size, int):
        return size > 0
    return len(sizes) != 2 and sizes != (0,)


def _refuse_size(size: Any) -> None:
    """The installed lightly says what it makes of the size: an error or, before 1.6, a warning."""
    try:
        theirs = original(_BANK)
    except ImportError:  # none, or one without torchvision
        pass
    else:
        theirs(size=size)
        return
    raise ValueError(
        f"MemoryBankModule: size must be (K, D) with K, D >= 0, or 0 for no bank, got {size}"
    )


class NNMemoryBankModule(MemoryBankModule):
    """NNCLR's memory bank: returns the nearest neighbour (cosine) of each feature.

    Neither the similarities [N, K] nor a copy of the bank as it was are kept.

    Args:
        size: (K, D).
    """

    def __init__(self, size: int | Sequence[int]) -> None:
        super().__init__(size)

    @glue.torch_errors
    def forward(  # type: ignore[override]
        self, output: Tensor, update: bool = False
    ) -> Tensor:
        """[N, D]: rows of the bank before this batch, which enters it if ``update``."""
        if self.size[0] == 0:
            raise glue.PeerAssertionError("NNMemoryBankModule: size must be (K, D) with K > 0")
        self._size_lazily(output)
        bank = self.bank.to(output.device)
        nearest = bank.index_select(0, ops.nearest(output, bank))
        if update:
            self._dequeue_and_enqueue(output)
        return nearest


class NTXentLoss(nn.Module):
    """lightly's NT-Xent; with a memory bank MoCo's InfoNCE of the first view against the bank.

    Args:
        temperature: Not within 1e-8 of 0; negative ones and tensors are taken too.
        memory_bank_size: 0, or (K, D).
        gather_distributed: Negatives of every rank; with a bank, keys of every rank enter it.

    Raises:
        ValueError: If the temperature is within 1e-8 of 0, or ``gather_distributed`` is asked for
            and torch has no distributed.
    """

    def __init__(
        self,
        temperature: float = 0.5,
        memory_bank_size: int | Sequence[int] = 0,
        gather_distributed: bool = False,
    ) -> None:
        super().__init__()
        self.memory_bank: MemoryBankModule = MemoryBankModule(
            size=memory_bank_size, gather_distributed=gather_distributed
        )
        self.temperature = temperature
        self.gather_distributed = gather_distributed
        self.eps: float = 1e-8
        if abs(self.temperature) < self.eps:
            raise ValueError(f"NTXentLoss: |temperature| must be at least 1e-8, got {temperature}")
        _check_gather("NTXentLoss", gather_distributed)

    @glue.torch_errors
    def forward(self, out0: Tensor, out1: Tensor) -> Tensor:
        """Loss of two views [N, D], not normalised."""
        temperature = glue.temperature_like(self.temperature, out0)
        if self.memory_bank.size[0] == 0:
            if self.gather_distributed and glue.world_size() > 1:
                # The mean of the local rows, as lightly returns it; DDP averages over ranks.
                rows = nt_xent_loss(out0, out1, temperature, reduction="none", group=True)
                return glue.as_peer(rows.mean(), out0, out1)  # type: ignore[union-attr]
            return glue.as_peer(nt_xent_loss(out0, out1, temperature), out0, out1)
        bank, q, k = self.memory_bank, ops.unit(out0), ops.unit(out1)
        if type(bank) is MemoryBankModule:  # read it where it is; it may be written right after
            bank._size_lazily(k)
            negatives = bank.bank.detach().to(q.device)
        else:
            k, negatives = bank(k, update=q.requires_grad)
            negatives = negatives.to(q.device)
            negatives = negatives.t() if bank.feature_dim_first else negatives
        loss = info_nce_loss(q, k, negatives, temperature, normalize=False)
        if type(bank) is MemoryBankModule and q.requires_grad:
            bank._dequeue_and_enqueue(k)
        return glue.as_peer(loss, out0, out1)


def negative_mises_fisher_weights(out0: Tensor, out1: Tensor, sigma: float = 0.5) -> Tensor:
    """[N]: DCLW's weights 2 - N * softmax(<out0_i, out1_i> / sigma), without gradient."""
    similarity = (out0.detach() * out1.detach()).sum(1) / sigma
    return 2 - len(out0) * similarity.softmax(0)


class DCLLoss(nn.Module):
    """lightly's decoupled contrastive loss.

    Args:
        temperature: Also negative, or a tensor.
        weight_fn: From both normalised views [N, D] to weights [N] of the positives; None for 1.
        gather_distributed: Negatives of every rank; weights are those of the local rows.

    Raises:
        ValueError: If ``gather_distributed`` is asked for and torch has no distributed.
    """

    def __init__(
        self,
        temperature: float = 0.1,
        weight_fn: Callable[[Tensor, Tensor], Tensor] | None = None,
        gather_distributed: bool = False,
    ) -> None:
        super().__init__()
        self.temperature = temperature
        self.weight_fn = weight_fn
        self.gather_distributed = gather_distributed
        _check_gather("DCLLoss", gather_distributed)

    @glue.torch_errors
    def forward(self, out0: Tensor, out1: Tensor) -> Tensor:
        """Loss of two views [N, D], not normalised."""
        temperature = glue.temperature_like(self.temperature, out0)
        wide = True if self.gather_distributed and glue.world_size() > 1 else None
        sigma = _sigma(self.weight_fn)
        if wide is None and (self.weight_fn is None or sigma is not None):
            return glue.as_peer(dcl_loss(out0, out1, temperature, sigma=sigma), out0, out1)
        # loss_i = -w_i s_i + lse_i, from the loss with weight 1 and the positives s.  Over ranks the
        # mean is that of the local rows, as lightly returns it; DDP averages over ranks.
        rows = dcl_loss(out0, out1, temperature, reduction="none", group=wide)
        if self.weight_fn is not None:
            z0, z1 = ops.unit(out0), ops.unit(out1)
            weights = torch.cat((self.weight_fn(z0, z1), self.weight_fn(z1, z0)))
            positive = ((z0 * z1).sum(1) / temperature).repeat(2)
            rows = rows + (1 - weights) * positive
        return glue.as_peer(rows.mean(), out0, out1)


def _sigma(weight_fn: Any) -> float | None:
    """sigma, where the weights are DCLW's."""
    if (
        isinstance(weight_fn, partial)
        and not weight_fn.args
        and set(weight_fn.keywords) == {"sigma"}
    ):
        function, sigma = weight_fn.func, weight_fn.keywords["sigma"]
    else:
        function, sigma = weight_fn, 0.5
    same = function is negative_mises_fisher_weights
    return sigma if same and isinstance(sigma, (int, float)) and sigma > 0 else None


class DCLWLoss(DCLLoss):
    """lightly's decoupled contrastive loss with von Mises-Fisher weights.

    Args:
        temperature: As for ``DCLLoss``.
        sigma: Width of the weights.
        gather_distributed: As for ``DCLLoss``.
    """

    def __init__(
        self, temperature: float = 0.1, sigma: float = 0.5, gather_distributed: bool = False
    ) -> None:
        super().__init__(
            temperature=temperature,
            weight_fn=partial(negative_mises_fisher_weights, sigma=sigma),
            gather_distributed=gather_distributed,
        )


class NegativeCosineSimilarity(nn.Module):
    """lightly's -mean cos(x0, x1), with a gradient into both.

    Args:
        dim: Along which the cosine is taken.
        eps: Norms below it count as it.  Above 1e-8 torch computes the loss, as in lightly; below, a
            row counts as zero from a norm of 1e-12 on.
    """

    def __init__(self, dim: int = 1, eps: float = 1e-8) -> None:
        super().__init__()
        self.dim = dim
        self.eps = eps

    @glue.torch_errors
    def forward(self, x0: Tensor, x1: Tensor) -> Tensor:
        """0-d loss of two tensors that broadcast."""
        if self.eps > 1e-8:
            return -F.cosine_similarity(x0, x1, self.dim, self.eps).mean()
        x0, x1 = torch.broadcast_tensors(x0, x1)
        a, b = (x.movedim(self.dim, -1).reshape(-1, x.shape[self.dim]) for x in (x0, x1))
        loss = byol_loss(a, b) / 2 - 1
        if b.requires_grad:  # the op has a gradient into its first argument only
            other = byol_loss(b, a) / 2
            loss = loss + (other - other.detach())
        return glue.as_peer(loss, a, b)


@glue.torch_errors
def update_momentum(model: nn.Module, model_ema: nn.Module, m: float) -> None:
    """model_ema = m * model_ema + (1 - m) * model over parameters, in one call.

    Args:
        model: The network that is trained.
        model_ema: Its average, written.
        m: In [0, 1].

    Raises:
        ValueError: If the parameters do not match or m is outside [0, 1].
    """
    ema.ema_update_(list(model_ema.parameters()), list(model.parameters()), m)


def _check_gather(name: str, gather_distributed: bool) -> None:
    if gather_distributed and not torch.distributed.is_available():
        raise ValueError(
            f"{name}: gather_distributed must be False, this torch is built without distributed"
        )


PEER = Peer(
    name="lightly",
    package="lightly.loss",
    distribution="lightly",
    tested=("1.6.0", "1.5.26"),
    swaps={
        "lightly.loss.ntx_ent_loss.NTXentLoss": NTXentLoss,
        "lightly.loss.dcl_loss.DCLLoss": DCLLoss,
        "lightly.loss.dcl_loss.DCLWLoss": DCLWLoss,
        "lightly.loss.dcl_loss.negative_mises_fisher_weights": negative_mises_fisher_weights,
        "lightly.loss.negative_cosine_similarity.NegativeCosineSimilarity": NegativeCosineSimilarity,
        "lightly.models.modules.memory_bank.MemoryBankModule": MemoryBankModule,
        "lightly.models.modules.nn_memory_bank.NNMemoryBankModule": NNMemoryBankModule,
        "lightly.models.utils.update_momentum": update_momentum,
    },
)
