# SPDX-License-Identifier: Apache-2.0
"""open_clip's CLIP and SigLIP losses, computed by our ops.

The names, arguments, defaults and return values are those of open_clip 3.3.0 and of its main branch
(4.2.0.dev0: ``chunk_size``).  Nothing here needs open_clip, except what is handed over to it
(docs/migration/open_clip.md): horovod, gathered features without their gradient for local losses,
logit biases with more than one element, and the logits themselves.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sslkernels.functional import clip_loss, siglip_loss
from sslkernels.integrations import _glue as glue
from sslkernels.integrations import _ops as ops
from sslkernels.integrations._patching import Peer, original

__all__ = ["ClipLoss", "SigLipLoss"]

_CLIP = "open_clip.loss.ClipLoss"
_SIGLIP = "open_clip.loss.SigLipLoss"


class ClipLoss(nn.Module):
    """open_clip's ``ClipLoss``: ``clip_loss`` of features that the caller has normalised.

    On more than one rank values and gradients are open_clip's: with ``gather_with_grad`` DDP's average
    of gradients is the gradient of the mean over the joined batch; without it 1 / world_size of that.

    Args:
        local_loss: Return the loss of the local rows, not that of all ranks.
        gather_with_grad: Whether features of other ranks get their gradient.
        cache_labels: Kept, and of no use: there are no labels.
        rank: Of this process.
        world_size: Above 1 features are gathered from the default process group.
        use_horovod: Handed over.
    """

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
    ) -> None:
        super().__init__()
        self.local_loss = local_loss
        self.gather_with_grad = gather_with_grad
        self.cache_labels = cache_labels
        self.rank = rank
        self.world_size = world_size
        self.use_horovod = use_horovod
        self.prev_num_logits = 0
        self.labels: dict[Any, Tensor] = {}

    @glue.torch_errors
    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        logit_bias: float | Tensor | None = None,
        output_dict: bool = False,
    ) -> Any:
        """The loss, or {"contrastive_loss": loss}.

        Args:
            image_features: [N, D].
            text_features: [N, D].
            logit_scale: Multiplies the similarities (already exponentiated).
            logit_bias: Added to all logits, which changes neither loss nor gradients.
            output_dict: Whether to return a dictionary.
        """
        why = self._why_not(logit_bias)
        if why is not None:
            forward = glue.hand_over(_CLIP, why).forward
            return forward(
                self, image_features, text_features, logit_scale, logit_bias, output_dict
            )
        if self.world_size == 1:
            loss: Any = clip_loss(image_features, text_features, logit_scale)
        elif self.local_loss:
            rows: Any = clip_loss(
                image_features, text_features, logit_scale, reduction="none", group=True
            )
            loss = rows.mean()
        else:
            # The op has the gradient of all ranks' losses.
            factor = 1.0 if self.gather_with_grad else 1 / self.world_size
            x, y = (_scaled_gradient(f, factor) for f in (image_features, text_features))
            loss = clip_loss(x, y, logit_scale, group=True)
        loss = glue.as_peer(loss, image_features, text_features)
        if isinstance(logit_bias, Tensor) and logit_bias.requires_grad:
            loss = loss + (logit_bias * 0).sum().to(loss.dtype)  # a gradient of 0, for DDP
        return {"contrastive_loss": loss} if output_dict else loss

    def _why_not(self, logit_bias: Any) -> str | None:
        """Why open_clip computes it, or None."""
        if type(self).get_logits is not ClipLoss.get_logits:
            return "get_logits of a subclass"
        if isinstance(logit_bias, Tensor) and logit_bias.numel() != 1:
            return "a logit bias with more than one element"
        if self.world_size > 1 and self.use_horovod:
            return "use_horovod"
        if self.world_size > 1 and self.local_loss and not self.gather_with_grad:
            return "local_loss without gather_with_grad"
        return None

    def get_ground_truth(self, device: torch.device, num_logits: int) -> Tensor:
        """Labels [N] of open_clip, for subclasses that compute logits."""
        return original(_CLIP).get_ground_truth(self, device, num_logits)

    def get_logits(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Any,
        logit_bias: Any = None,
    ) -> tuple[Tensor, Tensor]:
        """Logits per image and per text of open_clip, for subclasses that want them."""
        return original(_CLIP).get_logits(
            self, image_features, text_features, logit_scale, logit_bias
        )


def _scaled_gradient(x: Tensor, factor: float) -> Tensor:
    if not x.requires_grad:
        return x
    x = x.view_as(x)
    x.register_hook(lambda gradient: gradient * factor)
    return x


class SigLipLoss(nn.Module):
    """open_clip's ``SigLipLoss``: ``siglip_loss`` of features that the caller has normalised.

    On more than one rank the texts of all ranks are gathered, whatever ``dist_impl`` says, and their
    gradients go back to them; value and gradients are open_clip's.  Logits are never written, so that
    ``chunk_size`` decides nothing but the dtype of the loss of halves (float32 with a chunk size).

    Args:
        cache_labels: Kept, and of no use: there are no labels.
        rank: Of this process.
        world_size: Above 1 the texts of the default process group are negatives too.
        dist_impl: "bidir", "shift", "reduce" or "gather"; None is "bidir".
        chunk_size: Of open_clip 4.
    """

    def __init__(
        self,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        dist_impl: str | None = None,
        chunk_size: int = 0,
    ) -> None:
        super().__init__()
        self.cache_labels = cache_labels
        self.rank = rank
        self.world_size = world_size
        self.dist_impl: str = dist_impl or "bidir"
        self.chunk_size = chunk_size
        if self.dist_impl not in ("bidir", "shift", "reduce", "gather"):
            raise glue.PeerAssertionError(
                "SigLipLoss: dist_impl must be 'bidir', 'shift', 'reduce' or 'gather', "
                f"got {dist_impl!r}"
            )
        self.prev_num_logits = 0
        self.labels: dict[Any, Tensor] = {}

    @glue.torch_errors
    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        logit_bias: float | Tensor | None,
        output_dict: bool = False,
    ) -> Any:
        """The loss, or {"contrastive_loss": loss}.

        Args:
            image_features: [N, D].
            text_features: [N, D].
            logit_scale: Multiplies the similarities (already exponentiated).
            logit_bias: Added to all logits; None for 0.
            output_dict: Whether to return a dictionary.
        """
        cls = type(self)
        changed = cls._loss is not SigLipLoss._loss or cls.get_logits is not SigLipLoss.get_logits
        if changed and self.world_size > 1:
            forward = glue.hand_over(_SIGLIP, "_loss or get_logits of a subclass").forward
            return forward(
                self, image_features, text_features, logit_scale, logit_bias, output_dict
            )
        loss = self._loss(image_features, text_features, logit_scale, logit_bias)
        if self.world_size > 1:
            texts = ops.gather_rows(text_features, gradient=True)
            n = len(text_features)
            others = torch.cat((texts[: n * self.rank], texts[n * (self.rank + 1) :]))
            loss = loss + self._loss(image_features, others, logit_scale, logit_bias, True)
        return {"contrastive_loss": loss} if output_dict else loss

    def _loss(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Any,
        logit_bias: Any = None,
        negative_only: bool = False,
    ) -> Tensor:
        """Mean over images; with ``negative_only`` no text is the positive of an image.

        Args:
            image_features: [N, D].
            text_features: [N, D], or [M, D] with ``negative_only``.
            logit_scale: As for ``forward``.
            logit_bias: As for ``forward``.
            negative_only: Whether all texts are those of other images.
        """
        why = None
        if type(self).get_logits is not SigLipLoss.get_logits:
            why = "get_logits of a subclass"
        elif isinstance(logit_bias, Tensor) and logit_bias.numel() != 1:
            why = "a logit bias with more than one element"
        if why is not None:
            theirs = glue.hand_over(_SIGLIP, why)
            loss: Tensor = theirs._loss(
                self, image_features, text_features, logit_scale, logit_bias, negative_only
            )
            return loss
        if negative_only:
            loss = ops.softplus_mean(image_features, text_features, logit_scale, logit_bias)
        else:
            loss = siglip_loss(image_features, text_features, logit_scale, logit_bias)
        return loss if self.chunk_size > 0 else glue.as_peer(loss, image_features, text_features)

    def get_ground_truth(
        self, device: Any, dtype: Any, num_logits: int, negative_only: bool = False
    ) -> Tensor:
        """Labels [N, N] of open_clip, for subclasses that compute logits."""
        return original(_SIGLIP).get_ground_truth(self, device, dtype, num_logits, negative_only)

    def get_logits(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Any,
        logit_bias: Any = None,
    ) -> Tensor:
        """Logits [N, M] of open_clip, for subclasses that want them."""
        theirs = original(_SIGLIP)
        return theirs.get_logits(self, image_features, text_features, logit_scale, logit_bias)


PEER = Peer(
    name="open_clip",
    package="open_clip",
    distribution="open-clip-torch",
    tested=("3.3.0", "4.2.0.dev0"),
    swaps={_CLIP: ClipLoss, _SIGLIP: SigLipLoss},
)
