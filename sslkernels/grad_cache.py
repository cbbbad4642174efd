# SPDX-License-Identifier: Apache-2.0
"""The exact gradient of a large batch with the activations of a micro-batch (GradCache)."""

from __future__ import annotations

import copy
import inspect
from collections import UserDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sslkernels._modules import (
    Buffers,
    before_calls,
    is_synchronised,
    modules_behind,
    no_sync,
    synchronised,
)
from sslkernels._numbers import type_name
from sslkernels.functional import _checks as checks

_OP = "cached_step"
Encoder = Callable[..., Any]
View = Any  # a tensor, or mappings and sequences with tensors
Output = str | int | Callable[[Any], Tensor] | None


def cached_step(
    encoder: Encoder | Sequence[Encoder],
    views: Sequence[View],
    loss_fn: Callable[..., Tensor],
    micro_batch: int,
    *,
    output: Output | Sequence[Output] = None,
    modules: nn.Module | Iterable[nn.Module] = (),
) -> Tensor:
    """Forward and backward of ``loss_fn(encoder(view_1), encoder(view_2), ...)`` in micro-batches.

    A contrastive loss couples all samples of a batch, so gradient accumulation changes it.  This
    does not: with z = encoder(x),

        dloss/dparameters = sum_i (dloss/dz_i) (dz_i/dparameters)

    1. encode every view in micro-batches without keeping activations;
    2. compute the loss of all embeddings and dloss/dz (O(N * D) memory with this library's losses);
    3. encode the micro-batches again, with activations, and backpropagate each one's dloss/dz.

    Gradients are added to ``.grad``, as by ``loss.backward()``; they equal those of the full batch
    for an encoder that treats samples independently.  The price is one more forward pass.  Under
    ``torch.no_grad()`` there are only steps 1 and 2: evaluation.

    * Dropout and other randomness: a micro-batch is encoded from the same generator states both
      times (CPU and the devices of views and parameters), and afterwards the generators stand where
      one forward pass leaves them.
    * BatchNorm in training takes its statistics from each micro-batch.  Buffers are put back
      after pass 1, so running statistics move once a micro-batch, as with plain accumulation.
      State that is no buffer, such as a Python counter, moves twice.
    * Distributed training: DDP, FSDP and FSDP2 synchronise gradients with the last micro-batch only
      (FSDP2's ``set_requires_gradient_sync`` is True afterwards).  Parameters of loss_fn are not
      DDP's: average their gradients yourself.  With ``group`` of the losses the negatives come from
      every rank.
    * Mixed precision: call it inside ``torch.autocast``; a ``GradScaler`` scales in loss_fn, and
      the returned loss is the scaled one then.

    Args:
        encoder: A module, a function, a method or what ``functools.partial`` and ``torch.compile`` make
            of them; or a sequence with one for each view, such as the image and text towers of CLIP.
            The modules that a function uses are looked for in closures, arguments, globals and
            attributes, and where there are none, watched for while it runs.
        views: One input for each embedding that loss_fn takes, on the device the encoder wants it: a
            tensor [N, ...], or a mapping (a dict, a ``BatchEncoding``) or tuple or list with tensors
            [N, ...], nested or not, N >= 1.  Views may differ in N.  Tensors are cut into micro-batches;
            0-d tensors and everything else are handed on as they are.  A mapping is passed as keyword
            arguments, a tuple or list as positional arguments, where the signature of the encoder
            takes them, and as one argument where it does not.
        loss_fn: From one embedding [N, ...] a view to a 0-d loss.  Its own parameters, such as a
            learnt temperature, get their gradients too.
        micro_batch: How many samples of one view are encoded at once; need not divide N.
        output: What of an encoder's result is the embedding [n, ...], where that is no tensor: a key or
            attribute, an index, or a function of the result; or a list with one for each view.
        modules: Modules that an encoder uses and that can't be found in this way (a method of a module
            that a function gets from elsewhere).

    Returns:
        The loss as loss_fn returned it, detached.

    Raises:
        TypeError: If views is not a sequence, a view has no tensors, micro_batch is no integer, or an
            encoder or loss_fn does not return a tensor.
        ValueError: If micro_batch < 1, views are missing or empty, tensors of one view differ in N, the
            numbers of encoders and views differ, a view requires grad without being a leaf, an
            encoder changes the number of rows or is lazy, or the loss is not 0-d or does not require
            grad.

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
    extra = _checked_modules(modules)
    towers = _towers(encoder, views, output, extra)
    for tower in towers:
        tower.cut(micro_batch)
    if not torch.is_grad_enabled():
        return _checked_loss(loss_fn(*(tower.embed() for tower in towers)), grad=False)

    devices = _devices(towers)
    buffers = Buffers()
    for tower in towers:
        for root in tower.roots:
            for module in root.modules():
                buffers.keep(module)
    states: list[list[_States]] = [[] for _ in towers]
    with buffers.restored(), torch.no_grad():
        embeddings = []
        for tower, kept in zip(towers, states, strict=True):
            with tower.observed(buffers):
                embeddings.append(tower.embed(partial(_remember, kept, devices)))
    _settle(towers)
    # Before pytorch#165068 autocast's cache kept the weights that pass 1 has cast without grad,
    # and pass 3 would train nothing.
    torch.clear_autocast_cache()

    embeddings = [e.detach().requires_grad_() for e in embeddings]
    loss = _checked_loss(loss_fn(*embeddings), grad=True)
    loss.backward()

    after = _random_states(devices)
    last = {id(module): v for v, tower in enumerate(towers) for module in tower.synchronised}
    try:
        for v, tower in enumerate(towers):
            cached = embeddings[v].grad
            if cached is None:  # loss_fn did not use this view; buffers still have to move
                cached = torch.zeros_like(embeddings[v])
            for i, (part, dz) in enumerate(
                zip(tower.parts, cached.split(micro_batch), strict=True)
            ):
                final = i == len(tower.parts) - 1
                silent = [m for m in tower.synchronised if not (final and last[id(m)] == v)]
                with no_sync(silent) if silent else nullcontext():
                    _restore_random_states(devices, states[v][i])
                    z = tower.encoded(tower.encode, *part)
                    if z.requires_grad:  # a frozen encoder has nothing to learn
                        z.backward(dz)
    finally:
        _restore_random_states(devices, after)
    return loss.detach()


# ------------------------------------------------------------------------------------- checks


def _checked_modules(modules: Any) -> list[nn.Module]:
    found = [modules] if isinstance(modules, nn.Module) else list(modules)
    for i, module in enumerate(found):
        if not isinstance(module, nn.Module):
            raise TypeError(f"{_OP}: modules[{i}] must be an nn.Module, got {type_name(module)}")
    return found


def _towers(encoder: Any, views: Any, output: Any, extra: list[nn.Module]) -> list[_Tower]:
    if isinstance(views, Tensor) or not isinstance(views, Iterable) or _is_mapping(views):
        raise TypeError(f"{_OP}: views must be a sequence of views, got one {type_name(views)}")
    views = tuple(views)
    if not views:
        raise ValueError(f"{_OP}: views must have at least one tensor, got none")
    # nn.ModuleList has a __call__ that only raises; nn.Sequential is one encoder.
    if callable(encoder) and not isinstance(encoder, nn.ModuleList):
        encoders: tuple[Any, ...] = (encoder,) * len(views)
    else:
        if not isinstance(encoder, Iterable):
            raise TypeError(f"{_OP}: encoder must be callable, got {type_name(encoder)}")
        encoders = tuple(encoder)
    outputs = tuple(output) if isinstance(output, (list, tuple)) else (output,) * len(views)
    for name, values in (("encoder", encoders), ("output", outputs)):
        if len(values) != len(views):
            raise ValueError(
                f"{_OP}: {name} must be one or one for each view, "
                f"got {len(values)} for {len(views)} views"
            )
    for i, each in enumerate(encoders):
        if not callable(each):
            raise TypeError(f"{_OP}: encoder[{i}] must be callable, got {type_name(each)}")
    return [
        _Tower(encode, view, f"views[{i}]", pick, extra)
        for i, (encode, view, pick) in enumerate(zip(encoders, views, outputs, strict=True))
    ]


def _checked_loss(loss: Any, *, grad: bool) -> Tensor:
    if not isinstance(loss, Tensor):
        raise TypeError(f"{_OP}: loss_fn must return a tensor, got {type_name(loss)}")
    if loss.ndim or (grad and not loss.requires_grad):
        raise ValueError(
            f"{_OP}: loss_fn must return a 0-d loss that requires grad, "
            f"got shape {list(loss.shape)}, requires_grad={loss.requires_grad}"
        )
    return loss


def _settle(towers: Sequence[_Tower]) -> None:
    """What each view synchronises: what it was seen calling, and what nobody was seen calling.

    The latter is called around the hooks, as ``ddp.forward(x)``, by whoever refers to it.
    """
    seen = {key for tower in towers for key in tower.called}
    for tower in towers:
        unseen = [module for module in tower.synchronised if id(module) not in seen]
        tower.synchronised = [*modules_behind(tower.called.values()), *unseen]


# ------------------------------------------------------------------------------------- one view


class _Tower:
    """An encoder with its view."""

    def __init__(
        self, encode: Encoder, view: View, name: str, output: Output, extra: list[nn.Module]
    ) -> None:
        self.encode, self.view, self.name, self.output = encode, view, name, output
        self.roots = [*modules_behind((encode,)), *extra]
        # What communicates in the backward pass of this view, as far as can be told before pass 1.
        self.is_module = isinstance(encode, nn.Module)
        self.synchronised = synchronised(
            [cast(nn.Module, encode)] if self.is_module else self.roots
        )
        self.called: dict[int, nn.Module] = {}
        self.parts: list[tuple[View, int]] = []  # with their numbers of samples
        self.rows = _rows(view, name)
        self._arguments = _calling(encode, view)

    @contextmanager
    def observed(self, buffers: Buffers) -> Iterator[None]:
        """Find out what a function calls: what it refers to may belong to other views."""

        def visit(module: nn.Module) -> None:
            buffers.keep(module)
            if is_synchronised(module):
                self.called[id(module)] = module

        if self.is_module:
            self.called = {id(module): module for module in self.synchronised}
            yield
        else:
            with before_calls(self.synchronised if self.roots else None, visit):
                yield

    def cut(self, micro_batch: int) -> None:
        """Cut the view into micro-batches."""
        self.parts = [
            (
                _sliced(self.view, slice(start, start + micro_batch)),
                min(micro_batch, self.rows - start),
            )
            for start in range(0, self.rows, micro_batch)
        ]

    def embed(self, before: Callable[[], None] | None = None) -> Tensor:
        """All embeddings, without gradient; ``before`` is called before each micro-batch."""
        encode = self.encode  # without grad there is nothing that DDP would have to do
        encode = encode.module if isinstance(encode, DistributedDataParallel) else encode
        outputs = []
        for part, n in self.parts:
            if before is not None:
                before()
            outputs.append(self.encoded(encode, part, n))
        return torch.cat(outputs)

    def encoded(self, encode: Encoder, part: View, n: int) -> Tensor:
        """The embeddings of a micro-batch of n samples."""
        args, keywords = self._arguments(part)
        z = self._picked(encode(*args, **keywords))
        if z.ndim == 0 or len(z) != n:
            raise ValueError(
                f"{_OP}: encoder must return one row for each of the {n} samples, "
                f"got shape {list(z.shape)}"
            )
        return z

    def _picked(self, result: Any) -> Tensor:
        """The embedding in an encoder's result."""
        output, z = self.output, result
        if callable(output):
            z = output(result)
        elif isinstance(output, str) and not _is_mapping(result):
            z = getattr(result, output)
        elif output is not None:
            z = result[output]
        if isinstance(z, Tensor):
            return z
        keys = f" with {list(result)}" if _is_mapping(result) else ""
        hint = f"{keys}; say with output= what the embedding is" if output is None else ""
        raise TypeError(f"{_OP}: encoder must return a tensor, got {type_name(z)}{hint}")


def _is_mapping(view: Any) -> bool:
    """A dict, or what looks like one."""
    if isinstance(view, (Tensor, nn.Module)):
        return False
    return isinstance(view, Mapping) or all(hasattr(view, a) for a in ("keys", "__getitem__"))


def _entries(view: View) -> Iterator[tuple[str, Any]]:
    if _is_mapping(view):
        yield from ((f"[{key!r}]", view[key]) for key in view.keys())
    else:
        yield from ((f"[{i}]", value) for i, value in enumerate(view))


def _tensors(view: View, name: str) -> Iterator[tuple[str, Tensor]]:
    """Tensors with samples in a view, by name."""
    if isinstance(view, Tensor):
        if view.ndim:
            yield name, view
    elif _is_mapping(view) or isinstance(view, (list, tuple)):
        for key, value in _entries(view):
            yield from _tensors(value, name + key)


def _rows(view: View, name: str) -> int:
    """The number of samples of a view."""
    if isinstance(view, Tensor) and view.ndim == 0:
        raise ValueError(f"{_OP}: {name} must have at least one row, got shape []")
    tensors = list(_tensors(view, name))
    if not tensors:
        raise TypeError(
            f"{_OP}: {name} must be a tensor, or a mapping, tuple or list of tensors, "
            f"got {type_name(view)}"
        )
    first, n = tensors[0][0], len(tensors[0][1])
    for key, x in tensors:
        if len(x) == 0:
            raise ValueError(f"{_OP}: {key} must have at least one row, got shape {list(x.shape)}")
        if len(x) != n:
            raise ValueError(
                f"{_OP}: the tensors of a view must have the same number of rows, got {n} in "
                f"{first} and {len(x)} in {key} (give the encoder what belongs to all samples by "
                "functools.partial)"
            )
        if x.requires_grad and not x.is_leaf and torch.is_grad_enabled():
            raise ValueError(f"{_OP}: {key} must be a leaf or detached, got a computed tensor")
    return n


def _sliced(view: View, rows: slice) -> View:
    """The same view with a range of its samples."""
    if isinstance(view, Tensor):
        return view[rows] if view.ndim else view
    if _is_mapping(view):
        named = {key: _sliced(view[key], rows) for key in view.keys()}
        if type(view) is dict or not isinstance(view, (dict, UserDict)):
            return named
        twin = copy.copy(view)  # a BatchEncoding stays one
        for key, value in named.items():
            twin[key] = value
        return twin
    if isinstance(view, (list, tuple)):
        parts = [_sliced(value, rows) for value in view]
        if hasattr(view, "_fields"):
            return type(view)(*parts)
        return parts if isinstance(view, list) else tuple(parts)
    return view


def _calling(encode: Encoder, view: View) -> Callable[[View], tuple[Sequence[Any], dict[str, Any]]]:
    """How an encoder wants views of this kind: args and keywords from a view."""

    def whole(part: View) -> tuple[Sequence[Any], dict[str, Any]]:
        return (part,), {}

    def keywords(part: View) -> tuple[Sequence[Any], dict[str, Any]]:
        return (), {key: part[key] for key in part.keys()}

    def positional(part: View) -> tuple[Sequence[Any], dict[str, Any]]:
        return tuple(part), {}

    if isinstance(view, Tensor):
        return whole
    spread = keywords if _is_mapping(view) else positional
    args, named = spread(view)
    return spread if _takes(encode, args, named) else whole


def _takes(encode: Any, args: Sequence[Any], named: dict[str, Any]) -> bool:
    """Whether a callable has parameters for these arguments, as far as it says."""
    if isinstance(encode, partial):
        return _takes(encode.func, (*encode.args, *args), {**encode.keywords, **named})
    while isinstance(encode, nn.Module):  # a wrapper's own parameters are (*args, **kwargs)
        wrapped = getattr(encode, "_orig_mod", None)
        if isinstance(encode, nn.DataParallel) or hasattr(type(encode), "no_sync"):  # DDP, FSDP
            wrapped = getattr(encode, "module", None)
        encode = encode.forward if wrapped is None else wrapped
    try:
        inspect.signature(encode).bind(*args, **named)
    except (TypeError, ValueError):  # they do not fit, or there is no signature
        return False
    return True


# ----------------------------------------------------------------------------------- generators


_States = list[Tensor]  # of the CPU's generator, then one for each device


def _devices(towers: Sequence[_Tower]) -> list[torch.device]:
    """Devices other than the CPU whose generators an encoder may draw from."""
    found = set()
    for tower in towers:
        found |= {x.device for _, x in _tensors(tower.view, tower.name)}
        found |= {p.device for root in tower.roots for p in root.parameters()}
    return [d for d in found if d.type not in ("cpu", "meta")]


def _remember(states: list[_States], devices: Sequence[torch.device]) -> None:
    states.append(_random_states(devices))


def _random_states(devices: Sequence[torch.device]) -> _States:
    others = [torch.get_device_module(device).get_rng_state(device) for device in devices]
    return [torch.get_rng_state(), *others]


def _restore_random_states(devices: Sequence[torch.device], states: _States) -> None:
    torch.set_rng_state(states[0])
    for device, state in zip(devices, states[1:], strict=True):
        torch.get_device_module(device).set_rng_state(state, device)
