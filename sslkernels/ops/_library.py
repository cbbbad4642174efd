# SPDX-License-Identifier: Apache-2.0
"""One place that makes torch ops: value types unfolded and folded, fakes, gradients, tangents, vmap.

An op file says what its op computes in terms of values (``Tiles``, ``Problem``, ...); torch.library wants
flat lists of tensors.  A schema here may name a value type, and ``Op`` does the rest:

    "pairwise(str kind, *Tiles, bool want_col, Thresholds threshold) -> PairwiseForward"

``*Tiles`` stands for the fields of ``Tiles`` under their own names, ``Thresholds threshold`` for those of
``Thresholds`` as ``threshold_row`` and ``threshold_col``; ``RowState? col`` may be None.  Behind the arrow
stands the NamedTuple that the kernel returns.
"""

from __future__ import annotations

import functools
import re
import typing
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from sslkernels.backends import interface
from sslkernels.ops import registry
from sslkernels.ops.eager import are_plain, is_plain_eager

LIB = torch.library.Library("sslkernels", "FRAGMENT")
_AUTOCAST_DEVICES = ("cpu", "cuda", "xpu", "mps")
_NOTHING = nullcontext()
_TYPES = {Tensor: "Tensor", Tensor | None: "Tensor?", bool: "bool", str: "str", float: "float"}


def below_autograd() -> AbstractContextManager[Any]:
    """Dispatch to the kernels below autograd."""
    return torch._C._AutoDispatchBelowAutograd()


def no_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Matrix products inside an op keep the dtype that the op chose."""
    if device.type in _AUTOCAST_DEVICES and torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return _NOTHING


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether autograd has to record an op on these tensors."""
    for t in tensors:  # on the way to every kernel: no generator
        if t is not None and t.requires_grad:
            return torch.is_grad_enabled()
    return False


def functorch() -> bool:
    """Whether a transform of torch.func is at work (grad, vjp, jvp, vmap, ...)."""
    return torch._C._are_functorch_transforms_active()


def forward_mode() -> bool:
    """Whether tensors may carry tangents of forward-mode differentiation."""
    return forward_ad._current_level >= 0


def has_tangent(x: Tensor) -> bool:
    """Whether forward-mode differentiation follows a tensor."""
    return forward_mode() and forward_ad.unpack_dual(x).tangent is not None


def refuse_transforms(op: str) -> None:
    """Raises where torch.func would hand wrappers without memory to an op that writes memory."""
    if not torch.compiler.is_compiling() and functorch():
        raise RuntimeError(
            f"{op}: it writes its arguments, which a transform of torch.func (grad, vmap, jvp, ...) "
            "would not see; call it outside of the transformed function"
        )


def _unrecorded(kernel: Callable[..., Any], *values: Any) -> Any:
    """``kernel(*values)`` without autograd; entering ``no_grad`` takes longer than asking for it."""
    if not torch.is_grad_enabled():
        return kernel(*values)
    with torch.no_grad():
        return kernel(*values)


# ------------------------------------------------------------------------------------------- values


class _Part(NamedTuple):
    """An argument of a schema."""

    value: type[Any] | None  # the NamedTuple that it is folded into, or None: one plain argument
    width: int  # how many flat arguments it takes


def _fold(form: Sequence[_Part], flat: Sequence[Any]) -> list[Any]:
    """Values from a flat list; a value all of whose fields are None is None."""
    values, at = [], 0
    for kind, width in form:
        if kind is None:
            values.append(flat[at])
        else:
            values.append(None)
            for i in range(at, at + width):
                if flat[i] is not None:
                    values[-1] = kind(*flat[at : at + width])
                    break
        at += width
    return values


def _unfold(form: Sequence[_Part], values: Iterable[Any]) -> list[Any]:
    """The flat list of values."""
    flat: list[Any] = []
    for (kind, width), value in zip(form, values, strict=True):
        if kind is None:
            flat.append(value)
        elif value is None:
            flat += [None] * width
        else:
            flat += value
    return flat


@functools.cache
def _form_of(kinds: tuple[type[Any], ...]) -> list[_Part]:
    """The form of values of these types."""
    return [_Part(k, len(k._fields)) if hasattr(k, "_fields") else _Part(None, 1) for k in kinds]


def _schema(kind: type[Any], prefix: str = "", optional: bool = False) -> list[str]:
    """The fields of a NamedTuple as arguments of a schema."""
    arguments = []
    for field, hint in typing.get_type_hints(kind).items():
        written = _TYPES[hint]
        if optional and written == "Tensor":
            written = "Tensor?"
        arguments.append(f"{written} {prefix}{field}")
    return arguments


def _expand(schema: str, values: dict[str, type[Any]]) -> tuple[str, str, list[_Part], Any]:
    """Name, flat schema, form of the arguments and NamedTuple of the results (None: one tensor)."""
    matched = re.fullmatch(r"(\w+)\((.*)\) -> (\w+)", schema)
    if matched is None:
        raise ValueError(f"not a schema: {schema!r}")
    name, arguments, returned = matched.groups()
    flat: list[str] = []
    form = []
    for argument in arguments.split(", "):
        kind, _, label = argument.partition(" ")
        found = values.get(kind.strip("*?"))
        if found is None:
            part = [argument]
        else:
            prefix = "" if kind.startswith("*") else f"{label}_"
            part = _schema(found, prefix, optional=kind.endswith("?"))
        form.append(_Part(found, len(part)))
        flat += part
    results = values.get(returned)
    outputs = "Tensor" if results is None else ", ".join(["Tensor"] * len(results._fields))
    arrow = outputs if results is None else f"({outputs})"
    return name, f"{name}({', '.join(flat)}) -> {arrow}", form, results


# ---------------------------------------------------------------------------------------------- ops


class Gradient(NamedTuple):
    """How an op is differentiated; functions take and return values, not flat lists."""

    # Flat names of the arguments that may have a gradient.
    inputs: tuple[str, ...]
    # Names of the results that have one.
    outputs: tuple[str, ...]
    # What backward needs: (*values, results) -> values.
    save: Callable[..., tuple[Any, ...]]
    # (*saved, gradients of ``outputs`` or None, which arguments need one as values) -> by flat name.
    backward: Callable[..., dict[str, Tensor]]
    # (*saved, tangents of the arguments or None as values) -> tangents of ``outputs``.
    tangent: Callable[..., tuple[Tensor | None, ...]]
    # Whether backward can be differentiated again: it is then made of torch operations.
    twice: bool = False


class Op:
    """A torch op of this library, called with values.

    Args:
        schema: See the module.
        kernel: For every device; takes values, chooses the backend itself, returns the results; None
            among them is an empty tensor.
        fake: The same for shapes and dtypes alone.
        values: NamedTuples beyond those of ``backends/interface.py`` that the schema names.
        gradient: None: the op is not differentiable.
    """

    def __init__(
        self,
        schema: str,
        kernel: Callable[..., Any],
        fake: Callable[..., Any],
        *,
        values: Sequence[type[Any]] = (),
        gradient: Gradient | None = None,
    ) -> None:
        """See the class."""
        known = {n: t for n, t in vars(interface).items() if hasattr(t, "_fields")}
        known |= {value.__name__: value for value in values}
        name, flat, form, results = _expand(schema, known)
        self.name: str = name
        self.schema: str = flat
        self.form: list[_Part] = form
        self.results: Any = results
        arguments = self.schema.split("(")[1].split(")")[0].split(", ")
        self.names: list[str] = [a.split(" ")[1] for a in arguments]
        self._tensors: list[int] = [i for i, a in enumerate(arguments) if a.startswith("Tensor")]
        self.gradient = gradient
        LIB.define(self.schema, tags=(torch.Tag.pt2_compliant_tag,))
        self.kernel: Callable[..., Any] = kernel
        self.flat_kernel: Callable[..., Any] = self._flat(kernel)
        LIB.impl(self.name, self.flat_kernel, "CompositeExplicitAutograd")
        torch.library.register_fake(f"sslkernels::{self.name}", self._flat(fake), lib=LIB)
        self.default: Any = getattr(torch.ops.sslkernels, self.name).default
        self.function: type[torch.autograd.Function] | None = None
        if gradient is not None:
            self.differentiable: list[int] = [self.names.index(n) for n in gradient.inputs]
            fields = ("out",) if results is None else results._fields
            self.graded: list[int] = [fields.index(n) for n in gradient.outputs]
            self.function = _function(self, gradient)
            self._eager = _eager_function(self, gradient)
            LIB.impl(self.name, self._autograd, "Autograd")
        if hasattr(torch.library, "register_vmap"):  # torch 2.5
            torch.library.register_vmap(f"sslkernels::{self.name}", self._vmap, lib=LIB)

    def __call__(self, *values: Any) -> Any:
        """The results for values; differentiable where the op is."""
        flat = _unfold(self.form, values)
        if self._bypasses(flat):
            if self.function is None:
                return _unrecorded(self.kernel, *values)
            inputs = [flat[i] for i in self.differentiable]
            if not needs_grad(*inputs):
                return _unrecorded(self.kernel, *values)
            results: list[Any] = []
            found = apply_plain(self._eager, values, results, *inputs)
            if self.results is None:
                return found
            for i, out in zip(self.graded, found, strict=True):
                results[i] = out
            return self.results(*results)
        if torch.compiler.is_compiling() or not functorch() or self.function is None:
            out = self.default(*flat)
        else:
            out = self.function.apply(*flat)
        return out if self.results is None else self.results(*out)

    def below(self, *values: Any) -> Any:
        """The same without autograd."""
        flat = _unfold(self.form, values)
        if self._bypasses(flat):
            return _unrecorded(self.kernel, *values)
        with below_autograd():
            out = self.default(*flat)
        return out if self.results is None else self.results(*out)

    def _bypasses(self, flat: Sequence[Any]) -> bool:
        """Whether the dispatcher may be left out: nobody wants to see the op, all tensors are plain."""
        return is_plain_eager() and are_plain(*[flat[i] for i in self._tensors])

    def _flat(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function`` of values as one of a flat list, which returns a tensor for everything."""
        form, single, first = self.form, self.results is None, self._tensors[0]

        def call(*flat: Any) -> Any:
            out = function(*_fold(form, flat))
            if single:
                return out
            return tuple([flat[first].new_empty(0) if x is None else x for x in out])

        return call

    def _autograd(self, *flat: Any) -> Any:
        """The kernel above autograd: a node of the graph where one is needed."""
        if self.function is not None and (
            forward_mode() or needs_grad(*[flat[i] for i in self.differentiable])
        ):
            if functorch():
                return self.function.apply(*flat)
            return apply_plain(self.function, *flat)
        with below_autograd():
            return self.default(*flat)

    def _vmap(self, info: Any, in_dims: Sequence[int | None], *flat: Any) -> Any:
        """One call for each element of the batch: an op takes whole batches of rows already."""
        call = self.default if self.function is None else self.function.apply
        results = []
        for i in range(info.batch_size):
            args = [x if d is None else x.select(d, i) for x, d in zip(flat, in_dims, strict=True)]
            results.append(call(*args))
        if self.results is None:
            return torch.stack(results), 0
        stacked = tuple(torch.stack(column) for column in zip(*results, strict=True))
        return stacked, (0,) * len(stacked)


def apply_plain(function: type[torch.autograd.Function], *args: Any) -> Any:
    """``function.apply`` without what torch does in Python for functorch: 3 us a call."""
    return super(torch.autograd.Function, function).apply(*args)  # type: ignore[misc]


def _keep(ctx: Any, saved: tuple[Any, ...]) -> list[Tensor | None]:
    """Hands what ``Gradient.save`` returned to the node; its tensors, None in the place of others."""
    ctx.saved_form = _form_of(tuple([type(value) for value in saved]))
    flat = _unfold(ctx.saved_form, saved)
    tensors = [x if isinstance(x, Tensor) else None for x in flat]
    ctx.plain = [None if isinstance(x, Tensor) else x for x in flat]
    ctx.backend = registry.override()
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)
    return tensors


def _kept(ctx: Any, tensors: Sequence[Tensor | None]) -> list[Any]:
    """What ``Gradient.save`` returned; tensors: ``ctx.saved_tensors``."""
    flat = [p if t is None else t for t, p in zip(tensors, ctx.plain, strict=True)]
    return _fold(ctx.saved_form, flat)


def _gradients(
    op: Op, rule: Gradient, ctx: Any, given: Sequence[Tensor | None], wanted: Sequence[bool]
) -> Sequence[Tensor | None]:
    """Of all flat arguments, those of ``wanted``; given: gradients of the graded results."""
    if all([g is None for g in given]):
        return [None] * len(op.names)
    tensors = ctx.saved_tensors  # once: checkpointing computes them again for each reading
    saved, need = _kept(ctx, tensors), _fold(op.form, wanted)

    def compute() -> list[Tensor | None]:
        with _NOTHING if ctx.backend is None else registry.backend(ctx.backend):
            found = rule.backward(*saved, *given, *need)
        return [found[n] if w else None for n, w in zip(op.names, wanted, strict=True)]

    if rule.twice:
        return compute()
    return once(f"sslkernels::{op.name}", compute, [*given, *tensors])


def _function(op: Op, rule: Gradient) -> type[torch.autograd.Function]:
    """The autograd.Function around an op that the dispatcher, or a transform, sees."""

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(*flat: Any) -> Any:
            if op._bypasses(flat):
                return op.flat_kernel(*flat)
            with below_autograd():
                return op.default(*flat)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            outputs = (output,) if op.results is None else output
            out = output if op.results is None else op.results(*output)
            tensors = _keep(ctx, rule.save(*_fold(op.form, inputs), out))
            if forward_mode():
                ctx.save_for_forward(*tensors)
            ctx.mark_non_differentiable(*(x for i, x in enumerate(outputs) if i not in op.graded))

        @staticmethod
        def backward(ctx: Any, *grads: Tensor | None) -> Any:
            given = [grads[i] for i in op.graded]
            return tuple(_gradients(op, rule, ctx, given, ctx.needs_input_grad))

        @staticmethod
        def jvp(ctx: Any, *tangents: Any) -> Any:
            given = [t if isinstance(t, Tensor) else None for t in tangents]

            def compute() -> list[Tensor | None]:
                with registry.backend(ctx.backend):
                    return [*rule.tangent(*_kept(ctx, tensors), *_fold(op.form, given))]

            tensors = ctx.saved_tensors
            sources = [*tensors, *given]
            found = compute() if rule.twice else once(f"sslkernels::{op.name}", compute, sources)
            if op.results is None:
                return found[0]
            out: list[Tensor | None] = [None] * len(op.results._fields)
            for i, tangent in zip(op.graded, found, strict=True):
                out[i] = tangent
            return tuple(out)

        @staticmethod
        def vmap(info: Any, in_dims: Any, *flat: Any) -> Any:
            return op._vmap(info, in_dims, *flat)

    Function.__name__ = Function.__qualname__ = f"{op.name}_function"
    return Function


def _eager_function(op: Op, rule: Gradient) -> type[torch.autograd.Function]:
    """The same where only autograd sees the op: values go in and out, ungraded results go round it."""

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(
            ctx: Any, values: tuple[Any, ...], results: list[Any], *_: Tensor | None
        ) -> Any:
            out = op.kernel(*values)
            _keep(ctx, rule.save(*values, out))
            if op.results is None:
                return out
            results += out
            return tuple([out[i] for i in op.graded])

        @staticmethod
        def backward(ctx: Any, *given: Tensor | None) -> Any:
            wanted = [False] * len(op.names)
            for i, w in zip(op.differentiable, ctx.needs_input_grad[2:], strict=True):
                wanted[i] = w
            found = _gradients(op, rule, ctx, given, wanted)
            return None, None, *[found[i] for i in op.differentiable]

    Function.__name__ = Function.__qualname__ = f"{op.name}_function"
    return Function


# ------------------------------------------------------------------------------- second derivatives


class _SecondDerivative(torch.autograd.Function):
    """Passes first derivatives on, and raises when somebody differentiates them."""

    @staticmethod
    def forward(name: str, n: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(g.view_as(g) for g in tensors[:n])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.name = inputs[0]

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        _refuse(ctx.name)

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> Any:
        _refuse(ctx.name)

    @staticmethod
    def vmap(info: Any, in_dims: Any, name: str, n: int, *tensors: Tensor) -> Any:
        return _SecondDerivative.apply(name, n, *tensors), tuple(in_dims[2 : 2 + n])


def _refuse(name: str) -> None:
    raise RuntimeError(
        f"{name}: second derivatives are not implemented; "
        "sslkernels.reference has a version that torch can differentiate twice"
    )


def once(
    name: str, compute: Callable[[], list[Tensor | None]], sources: Sequence[Tensor | None]
) -> tuple[Tensor | None, ...]:
    """Gradients computed from ``sources``, of which a second derivative raises, naming the op."""
    if not torch.is_grad_enabled() and not forward_mode():
        return tuple(compute())
    with torch.no_grad():
        outputs = compute()
    where = [i for i, out in enumerate(outputs) if out is not None]
    floats = [s for s in sources if s is not None and s.is_floating_point()]
    marked = _SecondDerivative.apply(name, len(where), *(outputs[i] for i in where), *floats)
    for i, out in zip(where, marked, strict=True):
        outputs[i] = out
    return tuple(outputs)
