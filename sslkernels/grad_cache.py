# SPDX-License-Identifier: Apache-2.0
"""``cached_step``: the exact gradient of a large contrastive batch in the memory of a small one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from sslkernels.functional import _checks as checks

_OP = "cached_step"
Encoder = Callable[[Tensor], Tensor]


def cached_step(
    encoder: Encoder | Sequence[Encoder],
    views: Sequence[Tensor],
    loss_fn: Callable[..., Tensor],
    micro_batch: int,
) -> Tensor:
    """Forward and backward of ``loss_fn(encoder(view_1), encoder(view_2), ...)`` in micro-batches.

    A contrastive loss couples all samples of a batch, so gradient accumulation changes it.  This
    does not: with z = encoder(x),

        dloss/dparameters = sum_i (dloss/dz_i) (dz_i/dparameters)

    1. encode every view in micro-batches without keeping activations;
    2. compute the loss of all embeddings and dloss/dz (O(N * D) memory with this library's losses);
    3. encode the micro-batches again, with activations, and backpropagate each one's dloss/dz.

    Gradients are added to ``.grad``, as by ``loss.backward()``; they equal those of the full batch
    for an encoder that treats samples independently.  The price is one more forward pass.

    * Dropout and other randomness: a micro-batch is encoded from the same generator states both
      times (CPU and the devices of views and parameters), and afterwards the generators stand where
      one forward pass leaves them.
    * BatchNorm in training takes its statistics from each micro-batch.  Buffers are put back
      after pass 1, so running statistics move once a micro-batch, as with plain accumulation.
    * DistributedDataParallel: pass 1 runs the wrapped module; pass 3 synchronises gradients with
      the last micro-batch only (``no_sync`` before).  Parameters of loss_fn are not DDP's: average
      their gradients yourself.  With ``group`` of the losses the negatives come from every rank.
    * Mixed precision: call it inside ``torch.autocast``; a ``GradScaler`` scales in loss_fn, and
      the returned loss is the scaled one then.

    Args:
        encoder: A module (or function) from [n, ...] to [n, ...], or a sequence with one for each
            view, such as the image and text towers of CLIP.
        views: Tensors [N, ...] with the same N >= 1, on the device the encoder wants them.
        loss_fn: From one embedding [N, ...] a view to a 0-d loss.  Its own parameters, such as a
            learnt temperature, get their gradients too.
        micro_batch: How many samples of one view are encoded at once; need not divide N.

    Returns:
        The loss as loss_fn returned it, detached.

    Raises:
        TypeError: If views is not a sequence of tensors, micro_batch is no integer, or an encoder
            or loss_fn does not return a tensor.
        ValueError: If micro_batch <= 0, views are missing, empty or of different length, the
            numbers of encoders and views differ, a view requires grad without being a leaf, an
            encoder changes the number of rows, or the loss is not 0-d or does not require grad.

    Reference:
        Gao et al., Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup,
        arXiv:2101.06983.

    Example:
        >>> import torch
        >>> from sslkernels import cached_step, nt_xent_loss
        >>> encoder = torch.nn.Linear(16, 8)
        >>> views = [torch.randn(32, 16), torch.randn(32, 16)]
        >>> cached_step(encoder, views, nt_xent_loss, micro_batch=5).shape
        torch.Size([])
        >>> encoder.weight.grad.shape
        torch.Size([8, 16])
    """
    micro_batch = checks.integer(_OP, "micro_batch", micro_batch, 1)
    views, encoders = _checked(encoder, views)
    modules = _modules(encoders)
    devices = _devices(modules, views)
    chunks = [view.split(micro_batch) for view in views]

    states: list[list[_States]] = []
    embeddings: list[Tensor] = []
    with _buffers_kept(modules), torch.no_grad():
        for encode, parts in zip(encoders, chunks, strict=True):
            encode = encode.module if isinstance(encode, DistributedDataParallel) else encode
            outputs = []
            states.append([])
            for part in parts:
                states[-1].append(_random_states(devices))
                outputs.append(_encoded(encode, part))
            embeddings.append(torch.cat(outputs))
    # Before pytorch#165068 autocast's cache kept the weights that pass 1 has cast without grad,
    # and pass 3 would train nothing.
    torch.clear_autocast_cache()

    embeddings = [e.detach().requires_grad_() for e in embeddings]
    loss = loss_fn(*embeddings)
    _check_loss(loss)
    loss.backward()

    after = _random_states(devices)
    last_view = {id(encode): v for v, encode in enumerate(encoders)}
    try:
        for v, (encode, parts) in enumerate(zip(encoders, chunks, strict=True)):
            cached = embeddings[v].grad
            if cached is None:  # loss_fn did not use this view; buffers still have to move
                cached = torch.zeros_like(embeddings[v])
            for i, (part, dz) in enumerate(zip(parts, cached.split(micro_batch), strict=True)):
                last = v == last_view[id(encode)] and i == len(parts) - 1
                with nullcontext() if last else _no_sync(encode):
                    _restore_random_states(devices, states[v][i])
                    z = _encoded(encode, part)
                    if z.requires_grad:  # a frozen encoder has nothing to learn
                        z.backward(dz)
    finally:
        _restore_random_states(devices, after)
    return loss.detach()


# ------------------------------------------------------------------------------------- checks


def _checked(
    encoder: Encoder | Sequence[Encoder], views: Sequence[Tensor]
) -> tuple[tuple[Tensor, ...], tuple[Encoder, ...]]:
    if isinstance(views, Tensor):
        raise TypeError(f"{_OP}: views must be a sequence of tensors, got one tensor")
    views = tuple(views)
    for i, view in enumerate(views):
        checks.check_tensor(_OP, f"views[{i}]", view)
        if view.ndim == 0 or len(view) == 0:
            raise ValueError(
                f"{_OP}: views[{i}] must have at least one row, got shape {list(view.shape)}"
            )
        if view.requires_grad and not view.is_leaf:
            raise ValueError(f"{_OP}: views[{i}] must be a leaf or detached, got a computed tensor")
    if not views:
        raise ValueError(f"{_OP}: views must have at least one tensor, got none")
    if len({len(view) for view in views}) > 1:
        raise ValueError(
            f"{_OP}: views must have the same number of rows, got {[len(view) for view in views]}"
        )
    # nn.ModuleList has a __call__ that only raises; nn.Sequential is one encoder.
    if callable(encoder) and not isinstance(encoder, torch.nn.ModuleList):
        return views, (encoder,) * len(views)
    encoders = tuple(cast(Sequence[Encoder], encoder))
    if len(encoders) != len(views):
        raise ValueError(
            f"{_OP}: encoder must be one module or one for each view, "
            f"got {len(encoders)} for {len(views)} views"
        )
    return views, encoders


def _encoded(encode: Encoder, part: Tensor) -> Tensor:
    z = encode(part)
    if not isinstance(z, Tensor):
        raise TypeError(f"{_OP}: encoder must return a tensor, got {type(z).__name__}")
    if z.ndim == 0 or len(z) != len(part):
        raise ValueError(
            f"{_OP}: encoder must return one row for each of the {len(part)} samples, "
            f"got shape {list(z.shape)}"
        )
    return z


def _check_loss(loss: Any) -> None:
    if not isinstance(loss, Tensor):
        raise TypeError(f"{_OP}: loss_fn must return a tensor, got {type(loss).__name__}")
    if loss.ndim or not loss.requires_grad:
        raise ValueError(
            f"{_OP}: loss_fn must return a 0-d loss that requires grad, "
            f"got shape {list(loss.shape)}, requires_grad={loss.requires_grad}"
        )


# -------------------------------------------------------------------- modules, buffers, generators


def _modules(encoders: Sequence[Encoder]) -> list[torch.nn.Module]:
    """Every module of the encoders, once."""
    found = {}
    for encode in encoders:
        if isinstance(encode, torch.nn.Module):
            found.update({id(module): module for module in encode.modules()})
    return list(found.values())


@contextmanager
def _buffers_kept(modules: Sequence[torch.nn.Module]) -> Iterator[None]:
    """Put buffers back on leaving, both those changed in place and those replaced."""
    kept = [
        (module, name, buffer, buffer.clone())
        for module in modules
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    try:
        yield
    finally:
        with torch.no_grad():
            for module, name, buffer, value in kept:
                buffer.copy_(value)
                module._buffers[name] = buffer


def _no_sync(encode: Encoder) -> AbstractContextManager[Any]:
    """Gradients stay local (DDP and FSDP have ``no_sync``)."""
    no_sync = getattr(encode, "no_sync", None)
    return nullcontext() if no_sync is None else no_sync()


_States = list[Tensor]  # of the CPU's generator, then one for each device


def _devices(modules: Sequence[torch.nn.Module], views: Sequence[Tensor]) -> list[torch.device]:
    """Devices other than the CPU whose generators an encoder may draw from."""
    tensors = [p for module in modules for p in module._parameters.values() if p is not None]
    found = {t.device for t in (*tensors, *views)}
    return [d for d in found if d.type not in ("cpu", "meta")]


def _random_states(devices: Sequence[torch.device]) -> _States:
    others = [torch.get_device_module(device).get_rng_state(device) for device in devices]
    return [torch.get_rng_state(), *others]


def _restore_random_states(devices: Sequence[torch.device], states: _States) -> None:
    torch.set_rng_state(states[0])
    for device, state in zip(devices, states[1:], strict=True):
        torch.get_device_module(device).set_rng_state(state, device)
