# SPDX-License-Identifier: Apache-2.0
"""The losses as nn.Modules: arguments are stored, ``forward`` is one call of the function.

The functions in ``sslkernels.functional`` have the formulas, shapes, conventions and references.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sslkernels import distributed, functional
from sslkernels._loading import AllOrNothing
from sslkernels._types import ContrastiveMetrics, Reduction
from sslkernels.functional import _checks as checks
from sslkernels.ops import heads
from sslkernels.queue import KeyQueue

Result = Tensor | tuple[Tensor, ContrastiveMetrics]


# Arguments that may be tensors.
_SCALARS = ("temperature", "margin", "beta", "x_log_variance")


def _hold(module: nn.Module, name: str, value: float | Tensor) -> bool:
    """Keep a tensor as a parameter or buffer of the module and say so; False for a number."""
    if not isinstance(value, Tensor):
        return False
    checks.check_scalar_shape(type(module).__name__, name, value)
    if isinstance(value, nn.Parameter):
        module.register_parameter(name, value)
    else:
        module.register_buffer(name, value)
    return True


class _Loss(AllOrNothing):
    """Keyword arguments of a loss function, checked when the module is made.

    A tensor as temperature or margin belongs to the module: an ``nn.Parameter`` is a parameter of it
    (the same object, learnt with the others), any other tensor a buffer.  It moves with ``.to()`` and
    is in the state dict; a number is neither.
    """

    def __init__(self, **arguments: Any) -> None:
        super().__init__()
        op = type(self).__name__
        self.arguments = arguments
        for name in _SCALARS:
            if name in arguments and _hold(self, name, arguments[name]):
                del arguments[name]
            elif name in arguments:
                check = checks.positive if name == "temperature" else checks.number
                arguments[name] = check(op, name, arguments[name])
        if "reduction" in arguments and "mining" not in arguments:
            checks.check_reduction(op, arguments["reduction"])
        if "group_mode" in arguments:
            checks.check_group_mode(op, arguments["group_mode"])

    def _tensors(self) -> dict[str, Tensor]:
        """The tensors among the arguments."""
        held = ((name, getattr(self, name, None)) for name in _SCALARS)
        return {name: value for name, value in held if value is not None}

    @property
    def _keywords(self) -> dict[str, Any]:
        if self._parameters or self._buffers:
            return {**self.arguments, **self._tensors()}
        return self.arguments

    def extra_repr(self) -> str:
        """Arguments, for ``print``."""
        return ", ".join(f"{name}={value!r}" for name, value in self._keywords.items())


class NTXentLoss(_Loss):
    """``nt_xent_loss``: (z1, z2) or a sequence of views → loss.

    An ``nn.Parameter`` as temperature becomes a parameter of the module and is learnt; another tensor
    becomes a buffer.  So it is with every loss that has a temperature or a margin.

    Example:
        >>> import torch, sslkernels
        >>> loss = sslkernels.NTXentLoss(temperature=0.5)
        >>> loss(torch.randn(8, 16), torch.randn(8, 16)).shape
        torch.Size([])
    """

    def __init__(
        self,
        temperature: float | Tensor = 0.1,
        *,
        normalize: bool = True,
        reduction: str = "mean",
        group: distributed.Group = None,
        group_mode: str = "auto",
        compute_dtype: torch.dtype | None = None,
        return_metrics: bool = False,
    ) -> None:
        """See ``nt_xent_loss``."""
        super().__init__(
            temperature=temperature,
            normalize=normalize,
            reduction=reduction,
            group=group,
            group_mode=group_mode,
            compute_dtype=compute_dtype,
            return_metrics=return_metrics,
        )

    def forward(self, z1: Tensor | Sequence[Tensor], z2: Tensor | None = None) -> Result:
        """Loss of two views [N, D], or of a sequence of them."""
        return functional.nt_xent_loss(z1, z2, **self._keywords)


class InfoNCELoss(_Loss):
    """``info_nce_loss``: (query, positive_key, negative_keys=None) → loss."""

    def __init__(
        self,
        temperature: float | Tensor = 0.1,
        reduction: str = "mean",
        negative_mode: str = "unpaired",
        *,
        normalize: bool = True,
        group: distributed.Group = None,
        group_mode: str = "auto",
        compute_dtype: torch.dtype | None = None,
        return_metrics: bool = False,
    ) -> None:
        """See ``info_nce_loss``."""
        super().__init__(
            temperature=temperature,
            reduction=reduction,
            negative_mode=negative_mode,
            normalize=normalize,
            group=group,
            group_mode=group_mode,
            compute_dtype=compute_dtype,
            return_metrics=return_metrics,
        )

    def forward(
        self,
        query: Tensor,
        positive_key: Tensor,
        negative_keys: Tensor | None = None,
        *,
        query_ids: Tensor | None = None,
        negative_ids: Tensor | None = None,
    ) -> Result:
        """Loss of queries [N, D] against their keys and the negatives."""
        return functional.info_nce_loss(
            query,
            positive_key,
            negative_keys,
            query_ids=query_ids,
            negative_ids=negative_ids,
            **self._keywords,
        )


class CLIPLoss(_Loss):
    """``clip_loss``: (image_features, text_features, logit_scale) → loss."""

    def __init__(
        self,
        *,
        normalize: bool = False,
        reduction: str = "mean",
        group: distributed.Group = None,
        group_mode: str = "auto",
        compute_dtype: torch.dtype | None = None,
        return_metrics: bool = False,
    ) -> None:
        """See ``clip_loss``."""
        super().__init__(
            normalize=normalize,
            reduction=reduction,
            group=group,
            group_mode=group_mode,
            compute_dtype=compute_dtype,
            return_metrics=return_metrics,
        )

    def forward(
        self, image_features: Tensor, text_features: Tensor, logit_scale: float | Tensor
    ) -> Result:
        """Loss of pairs [N, D]."""
        return functional.clip_loss(image_features, text_features, logit_scale, **self._keywords)


class SigLIPLoss(_Loss):
    """``siglip_loss``: (image_features, text_features, logit_scale, logit_bias) → loss."""

    def __init__(
        self,
        *,
        normalize: bool = False,
        reduction: str = "mean",
        group: distributed.Group = None,
        group_mode: str = "auto",
        compute_dtype: torch.dtype | None = None,
    ) -> None:
        """See ``siglip_loss``."""
        super().__init__(
            normalize=normalize,
            reduction=reduction,
            group=group,
            group_mode=group_mode,
            compute_dtype=compute_dtype,
        )

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        logit_bias: float | Tensor | None,
    ) -> Tensor:
        """Loss of pairs [N, D]."""
        return functional.siglip_loss(
            image_features, text_features, logit_scale, logit_bias, **self._keywords
        )


class SupConLoss(_Loss):
    """``sup_con_loss``: (z, labels) → loss."""

    def __init__(
        self,
        temperature: float | Tensor = 0.1,
        *,
        normalize: bool = True,
        reduction: str = "mean",
        group: distributed.Group = None,
        group_mode: str = "auto",
        compute_dtype: torch.dtype | None = None,
    ) -> None:
        """See ``sup_con_loss``."""
        super().__init__(
            temperature=temperature,
            normalize=normalize,
            reduction=reduction,
            group=group,
            group_mode=group_mode,
            compute_dtype=compute_dtype,
        )

    def forward(self, z: Tensor, labels: Tensor) -> Tensor:
        """Loss of rows [N, D] or views [N, V, D] with labels [N]."""
        return functional.sup_con_loss(z, labels, **self._keywords)


class DCLLoss(_Loss):
    """``dcl_loss``: (z1, z2) → loss; DCLW with ``sigma``."""

    def __init__(
        self,
        temperature: float | Tensor = 0.1,
        *,
        sigma: float | None = None,
        normalize: bool = True,
        reduction: str = "mean",
        group: distributed.Group = None,
        group_mode: str = "auto",
        compute_dtype: torch.dtype | None = None,
    ) -> None:
        """See ``dcl_loss``."""
        if sigma is not None:
            sigma = checks.positive("DCLLoss", "sigma", sigma)
        super().__init__(
            temperature=temperature,
            sigma=sigma,
            normalize=normalize,
            reduction=reduction,
            group=group,
            group_mode=group_mode,
            compute_dtype=compute_dtype,
        )

    def forward(self, z1: Tensor, z2: Tensor) -> Tensor:
        """Loss of two views [N, D]."""
        return functional.dcl_loss(z1, z2, **self._keywords)


class BYOLLoss(_Loss):
    """``byol_loss``: (prediction, target) → loss of one view."""

    def __init__(self, *, reduction: str = "mean") -> None:
        """See ``byol_loss``."""
        super().__init__(reduction=reduction)

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Loss of predictions [N, D] against targets [N, D]."""
        return functional.byol_loss(prediction, target, **self._keywords)


class SimSiamLoss(_Loss):
    """``simsiam_loss``: (prediction_1, z_2, prediction_2, z_1) → loss of both views."""

    def __init__(self, *, reduction: str = "mean") -> None:
        """See ``simsiam_loss``."""
        super().__init__(reduction=reduction)

    def forward(
        self, prediction_1: Tensor, z_2: Tensor, prediction_2: Tensor, z_1: Tensor
    ) -> Tensor:
        """Loss of two pairs [N, D]."""
        return functional.simsiam_loss(prediction_1, z_2, prediction_2, z_1, **self._keywords)


class TripletLoss(_Loss):
    """``triplet_loss``: (z, labels) → loss."""

    def __init__(
        self,
        margin: float | Tensor = 0.2,
        *,
        mining: str = "hard",
        distance: str = "euclidean",
        normalize: bool = False,
        reduction: str = "mean",
    ) -> None:
        """See ``triplet_loss``."""
        checks.check_choice("TripletLoss", "mining", mining, ("hard", "semihard", "all"))
        checks.check_choice("TripletLoss", "distance", distance, ("euclidean", "cosine"))
        checks.check_reduction("TripletLoss", reduction, ("mean", "sum", "mean_nonzero"))
        super().__init__(
            margin=margin,
            mining=mining,
            distance=distance,
            normalize=normalize,
            reduction=reduction,
        )

    def forward(self, z: Tensor, labels: Tensor) -> Tensor:
        """Loss of rows [N, D] with labels [N]."""
        return functional.triplet_loss(z, labels, **self._keywords)


class ContrastiveLoss(_Loss):
    """``contrastive_loss``: (a, b, same) → loss."""

    def __init__(self, margin: float | Tensor = 1.0, *, reduction: str = "mean") -> None:
        """See ``contrastive_loss``."""
        super().__init__(margin=margin, reduction=reduction)

    def forward(self, a: Tensor, b: Tensor, same: Tensor) -> Tensor:
        """Loss of pairs [N, D]; same: [N]."""
        return functional.contrastive_loss(a, b, same, **self._keywords)


class VAELoss(_Loss):
    """``vae_loss``: (reconstruction, x, mean, log_variance) → loss.

    ``x_log_variance=nn.Parameter(torch.zeros(()))`` learns one variance of the data with the model.
    """

    def __init__(
        self,
        *,
        likelihood: str = "bernoulli",
        x_log_variance: float | Tensor | None = None,
        beta: float | Tensor = 1.0,
        free_bits: float = 0.0,
        reduction: Reduction = "mean",
    ) -> None:
        """See ``vae_loss``; a variance for each element is an argument of ``forward``."""
        checks.check_choice("VAELoss", "likelihood", likelihood, functional.LIKELIHOODS)
        spread = {} if x_log_variance is None else {"x_log_variance": x_log_variance}
        super().__init__(
            likelihood=likelihood, beta=beta, free_bits=free_bits, reduction=reduction, **spread
        )

    def forward(
        self,
        reconstruction: Tensor,
        x: Tensor,
        mean: Tensor,
        log_variance: Tensor,
        x_log_variance: Tensor | None = None,
        *,
        beta: float | None = None,
    ) -> Tensor:
        """Loss of [N, ...] against [N, ...] with codes [N, Z]; beta: of this step (a schedule)."""
        keywords = dict(self._keywords)
        if x_log_variance is not None:
            keywords["x_log_variance"] = x_log_variance
        if beta is not None:
            keywords["beta"] = beta
        return functional.vae_loss(reconstruction, x, mean, log_variance, **keywords)


class FeatureReconstructionLoss(_Loss):
    """``feature_reconstruction_loss``: (features, targets) → loss."""

    def __init__(
        self,
        *,
        weights: Sequence[float] | None = None,
        distance: str = "squared",
        beta: float = 1.0,
        normalize: str | None = None,
        reduction: Reduction = "mean",
    ) -> None:
        """See ``feature_reconstruction_loss``."""
        op = type(self).__name__
        checks.check_choice(op, "distance", distance, functional.DISTANCES)
        if normalize is not None:
            checks.check_choice(op, "normalize", normalize, functional.NORMALIZATIONS)
        super().__init__(
            weights=weights, distance=distance, beta=beta, normalize=normalize, reduction=reduction
        )

    def forward(
        self, features: Tensor | Sequence[Tensor], targets: Tensor | Sequence[Tensor]
    ) -> Tensor:
        """Loss of a list of maps [N, ...]."""
        return functional.feature_reconstruction_loss(features, targets, **self._keywords)


class AdversarialLoss(_Loss):
    """``adversarial_loss``: (fake, real) → loss of the discriminator, (fake) → of the generator."""

    def __init__(self, form: str = "non_saturating", *, reduction: Reduction = "mean") -> None:
        """See ``adversarial_loss``."""
        checks.check_choice(type(self).__name__, "form", form, functional.FORMS)
        super().__init__(form=form, reduction=reduction)

    def forward(self, fake: Tensor, real: Tensor | None = None) -> Tensor:
        """Loss of logits [N, ...]."""
        return functional.adversarial_loss(fake, real, **self._keywords)


class MoCoLoss(AllOrNothing):
    """MoCo: InfoNCE against a queue of earlier keys, then the new keys are enqueued.

    (query, key) → loss.  The logits use the queue as it was before this batch; the key gets no
    gradient.  In evaluation mode (``.eval()``) nothing is enqueued.  While the queue is empty there
    are no negatives and the loss is 0; while it fills, the rows there are count.

    Query and key are normalised in float32 (or wider) and then cast to the queue's dtype, in which
    the products are taken and accumulated in float32; the default queue is float32, which loses
    nothing.

    Args:
        queue_size: K; the paper uses 65536.
        dim: D.
        temperature: A number > 0, or a tensor of shape [] or [1]: an ``nn.Parameter`` becomes a
            parameter of the module and is learnt, another tensor a buffer.
        reduction: "mean", "sum" or "none".
        dtype: Of the queue.
        gather: Enqueue the keys of every rank (see ``KeyQueue``).
        return_metrics: Whether to return (loss, ContrastiveMetrics).

    Raises:
        ValueError: If a size is below 1, temperature <= 0 or the reduction is unknown.

    Reference:
        He et al., Momentum Contrast for Unsupervised Visual Representation Learning,
        arXiv:1911.05722.

    Example:
        >>> import torch, sslkernels
        >>> loss = sslkernels.MoCoLoss(queue_size=32, dim=16)
        >>> loss(torch.randn(8, 16), torch.randn(8, 16)).shape
        torch.Size([])
        >>> len(loss.queue)
        8
    """

    temperature: float | Tensor

    def __init__(
        self,
        queue_size: int,
        dim: int,
        temperature: float | Tensor = 0.07,
        *,
        reduction: Reduction = "mean",
        dtype: torch.dtype = torch.float32,
        gather: bool = False,
        return_metrics: bool = False,
    ) -> None:
        """See the class."""
        super().__init__()
        if not _hold(self, "temperature", temperature):
            self.temperature = checks.positive("MoCoLoss", "temperature", temperature)
        checks.check_reduction("MoCoLoss", reduction)
        self.reduction: Reduction = reduction
        self.return_metrics: bool = checks.flag("MoCoLoss", "return_metrics", return_metrics)
        self.queue: KeyQueue = KeyQueue(queue_size, dim, dtype=dtype, gather=gather)

    def forward(self, query: Tensor, key: Tensor) -> Result:
        """Loss of queries [N, D] and keys [N, D]; the keys then enter the queue."""
        checks.check_pair("MoCoLoss", "query", query, "key", key)
        key = key.detach()
        dtype = self.queue.queue.dtype
        # Not narrower than the queue from the start: unit rows of halves may be halves.
        q, k = (x.to(torch.promote_types(x.dtype, dtype)) for x in (query, key))
        result = functional.info_nce_loss(
            heads.unit(q, True).to(dtype),
            heads.unit(k, True).to(dtype),
            self.queue.keys,
            self.temperature,
            self.reduction,
            normalize=False,  # the queue holds normalised keys
            return_metrics=self.return_metrics,
        )
        if self.training:
            self.queue.enqueue(key)
        return result

    def extra_repr(self) -> str:
        """Arguments, for ``print``."""
        return f"temperature={self.temperature}, reduction={self.reduction!r}"
