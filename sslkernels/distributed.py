# SPDX-License-Identifier: Apache-2.0
"""Losses with negatives from every rank of a torch.distributed group.

A rank computes its own rows against the columns of all ranks, so compute is split W ways.  The columns
come all at once (memory O(N_global * D)) or in blocks round a ring (O(N_local * D) for any W);
``sslkernels._ranks`` has both.  What is reduced over the columns of all ranks is one autograd function,
``_GlobalTiles``; what a loss does with its rows is plain torch, as in ``ops/formulas.py``.

Gradients of remote rows.  Where the columns are the rows (NT-Xent, DCL, SupCon) S is symmetric, and
with g_i the gradient of lse_i

    dx_i = scale * sum_j (g_i exp(S_ij - lse_i) + g_j exp(S_ij - lse_j)) x_j

so that in the backward pass lse and g go to the other ranks, two numbers a row, and no gradient of a row
travels.  Elsewhere (InfoNCE, CLIP, SigLIP) each rank computes what its rows contribute to the gradient of
all columns, and that is summed over the ranks at the owner.

Gradients follow one rule: that of the *average over ranks* of what the ranks compute from their
results, times W.  DistributedDataParallel averages parameter gradients, which takes the W away.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, ParamSpec

import torch
import torch.distributed as dist
from torch import Tensor

from sslkernels import _ranks
from sslkernels._types import Reduction
from sslkernels.backends.arithmetic import fixed_sum
from sslkernels.backends.interface import Kind, RowState, Thresholds, Tiles, Wanted
from sslkernels.ops import heads, registry, rows
from sslkernels.ops._library import forward_mode, functorch, needs_grad, no_autocast, once
from sslkernels.ops.pairwise import TINY

if TYPE_CHECKING:
    Group = dist.ProcessGroup | bool | None
else:  # builds of torch without distributed have no ProcessGroup
    Group = Any

P = ParamSpec("P")


class Wide(NamedTuple):
    """How a loss is taken over the ranks; arguments have been checked by the caller."""

    op: str  # name of the public function
    group: Group
    mode: str = "auto"  # "gather", "ring" or "auto"
    normalize: bool = True
    reduction: Reduction = "mean"

    def connect(
        self,
        a: Tensor,
        b: Tensor | None,
        scale: Tensor,
        bias: Tensor | None = None,
        views: int = 1,
    ) -> _ranks.Layout:
        """Agree with the other ranks on what is computed."""
        if functorch() or forward_mode():
            raise RuntimeError(
                f"{self.op}: group does not work in transforms of torch.func or forward-mode "
                "differentiation"
            )
        ranks = _ranks.connect(self.op, self.group)
        call = {
            "the first features require grad": needs_grad(a),
            "the other features require grad": needs_grad(b),
            "the scale requires grad": needs_grad(scale),
            "there is a bias": bias is not None,
            "the bias requires grad": needs_grad(bias),
        }
        return _ranks.agree(self.op, ranks, a, self.mode, views, call)


def _eager(function: Callable[P, Tensor]) -> Callable[P, Tensor]:
    """Compiled code breaks its graph for a function that communicates."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> Tensor:
        if torch.compiler.is_compiling():  # not at import: that would import torch._dynamo for all
            return torch.compiler.disable(function)(*args, **kwargs)
        return function(*args, **kwargs)

    return call


@_eager
def nt_xent(wide: Wide, views: tuple[Tensor, ...], scale: Tensor) -> Tensor:
    """NT-Xent of the batch that all ranks hold together.

    Args:
        wide: How it is taken over the ranks.  "mean" and "sum" are over the rows of all ranks, with
            the same bits on each; "none" gives the [V * N] local rows in the order of cat(views).
        views: V >= 2 times [N, D] local rows, N >= 0, of one dtype and device.
        scale: 0-d in the accumulation dtype, the same on every rank; may require grad.

    Raises:
        TypeError: If group is no group.
        ValueError: If torch.distributed is not initialised, this process is not in the group, or
            ranks differ in D, dtype or call (raised on every rank).  So with all losses here.
    """
    v, n = len(views), len(views[0])
    layout = wide.connect(views[0], views[1], scale, views=v)
    units = [heads.unit(view, wide.normalize) for view in views]
    lse = _tiles("lse", torch.cat(units), None, scale, layout, views=v).row.view(v, n)
    pairs = {
        (a, b): heads.dots(units[a], units[b]) * scale for a in range(v) for b in range(a + 1, v)
    }
    loss = [
        torch.stack([heads.nll(lse[a], pairs[min(a, b), max(a, b)]) for b in range(v) if b != a])
        for a in range(v)
    ]
    return _reduce(torch.cat([x.mean(0) for x in loss]), layout, wide.reduction, v * layout.total)


@_eager
def dcl(wide: Wide, z1: Tensor, z2: Tensor, scale: Tensor, sigma: float) -> Tensor:
    """DCL, or DCLW with sigma > 0, of the joined batch; "none": [2N] local rows."""
    layout = wide.connect(z1, z2, scale)
    a, b = (heads.unit(x, wide.normalize) for x in (z1, z2))
    lse = _tiles("lse", torch.cat((a, b)), None, scale, layout, views=2).row
    if layout.total == 1:
        lse = torch.zeros_like(lse)
    similarity = heads.dots(a, b)
    positive = similarity * scale
    if sigma > 0:
        with torch.no_grad():  # softmax over the samples of all ranks
            logits = similarity / sigma
            total = torch.logsumexp(layout.ranks.stack(torch.logsumexp(logits, 0)), 0)
            weights = 2 - layout.total * (logits - total).exp()
        positive = positive * weights
    return _reduce(lse - positive.repeat(2), layout, wide.reduction, 2 * layout.total)


@_eager
def info_nce(wide: Wide, query: Tensor, key: Tensor, scale: Tensor, ids: Tensor | None) -> Tensor:
    """InfoNCE in the joined batch; ids: [N] of the queries and their keys; "none": [N] local rows."""
    layout = wide.connect(query, key, scale)
    q, k = (heads.unit(x, wide.normalize) for x in (query, key))
    lse = _tiles("lse", q, k, scale, layout, ids=ids).row
    return _reduce(heads.nll(lse, heads.dots(q, k) * scale), layout, wide.reduction, layout.total)


@_eager
def clip(wide: Wide, x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    """CLIP's symmetric cross-entropy over the pairs of all ranks; "none": [N] local pairs."""
    layout = wide.connect(x, y, scale)
    x, y = (heads.unit(features, wide.normalize) for features in (x, y))
    found = _tiles("lse", x, y, scale, layout, want_col=True)
    positive = heads.dots(x, y) * scale
    loss = (heads.nll(found.row, positive) + heads.nll(found.col, positive)) / 2
    return _reduce(loss, layout, wide.reduction, layout.total)


@_eager
def siglip(wide: Wide, x: Tensor, y: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """SigLIP's sigmoid loss over the pairs of all ranks; "none": [N], the rows of local x."""
    layout = wide.connect(x, y, scale, bias)
    x, y = (heads.unit(features, wide.normalize) for features in (x, y))
    negatives = _tiles("softplus", x, y, scale, layout, bias=bias).row
    positive = heads.dots(x, y) * scale
    if bias is not None:
        positive = positive + bias
    loss = heads.softplus(-positive) + negatives
    return _reduce(loss, layout, wide.reduction, layout.total)


@_eager
def sup_con(wide: Wide, z: Tensor, labels: Tensor, scale: Tensor) -> Tensor:
    """SupCon of the joined batch; the mean is over the rows of all ranks that have a positive."""
    layout = wide.connect(z, None, scale)
    z = heads.unit(z, wide.normalize)
    found = _tiles("lse", z, None, scale, layout, labels=labels)
    used = found.partners > 0
    loss = found.row - found.positive * scale / found.partners.clamp(min=1)
    loss = torch.where(used, loss, 0.0)
    return _reduce(loss, layout, wide.reduction, used.sum())


# -------------------------------------------------------------------------------------- reduction


def _reduce(
    loss: Tensor, layout: _ranks.Layout, reduction: Reduction, count: Tensor | int
) -> Tensor:
    """Of local rows [R]: themselves, or sum or mean over all ranks with the same bits on each.

    count: for the mean: rows of all ranks, or a tensor: rows of this one.
    """
    if reduction == "none":
        return loss
    total = fixed_sum(loss)
    if reduction == "sum":
        count = 1
    result: Tensor = _Total.apply(total, count, layout.ranks)
    return result


class _Total(torch.autograd.Function):
    """The sum over ranks of their sums, divided by a count."""

    @staticmethod
    def forward(ctx: Any, total: Tensor, count: Tensor | int, ranks: _ranks.Ranks) -> Tensor:
        local = count if isinstance(count, Tensor) else torch.zeros_like(total)
        both = ranks.stack(torch.stack((total.double(), local.double()))).sum(0)
        divisor = both[1] if isinstance(count, Tensor) else both.new_full((), float(count))
        divisor = divisor.clamp(min=1)
        ctx.factor = (ranks.size / divisor).to(total.dtype)
        return (both[0] / divisor).to(total.dtype)

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> Any:
        return dloss * ctx.factor, None, None


# ------------------------------------------------------------------------------------------ tiles


class _Found(NamedTuple):
    """What is reduced over the columns of all ranks, for local rows."""

    row: Tensor  # [R] acc: as of ``ops.pairwise``
    col: Tensor  # [R] acc: the same over the rows of all ranks for local columns; [0] unless wanted
    positive: (
        Tensor  # [R] acc: sum of <x_i, x_j> over the other rows of the class; [0] without labels
    )
    partners: Tensor  # [R] acc: how many they are


class _Task(NamedTuple):
    """What ``_GlobalTiles`` is asked for."""

    kind: Kind
    layout: _ranks.Layout
    exchange: _ranks.Gathered
    views: int
    want_col: bool
    backend: str | None

    def block(
        self, tiles: Tiles, given: tuple[bool, bool], block: list[Tensor], owner: int | None
    ) -> _Block:
        """A block of columns; given: whether ids and labels of columns travel with them."""
        k, *others = block
        ids = others.pop(0) if given[0] else None
        labels = others.pop(0) if given[1] else None
        if ids is None:
            ids = self.layout.sample_ids(owner, self.views, k.device)
        own = owner in (None, self.layout.ranks.rank)
        return _Block(tiles._replace(k=k, ids_k=ids), labels, own, others)


class _Block(NamedTuple):
    """Local rows against the columns of a block."""

    tiles: Tiles
    labels: Tensor | None
    own: bool  # the local rows are among the columns
    others: list[Tensor]  # what else travelled


def _tiles(
    kind: Kind,
    q: Tensor,
    k: Tensor | None,
    scale: Tensor,
    layout: _ranks.Layout,
    *,
    bias: Tensor | None = None,
    views: int = 1,
    want_col: bool = False,
    ids: Tensor | None = None,
    labels: Tensor | None = None,
) -> _Found:
    """Reductions of local rows over the columns of all ranks.

    Args:
        kind: As in ``ops.pairwise``.
        q: [R, D] local rows.
        k: [R, D] local columns; None: the rows, and S is symmetric (kind "lse").
        scale: 0-d.
        layout: What the ranks agreed upon.
        bias: 0-d, kind "softplus" only.
        views: Rows of a sample; pairs of one sample are left out.
        want_col: Whether columns are reduced too (k given).
        ids: [R] int64 in place of the numbers of the samples.
        labels: [R] int64: classes, whose rows are positives (k None).
    """
    task = _Task(kind, layout, layout.rows(views), views, want_col, registry.override())
    return _Found(*_GlobalTiles.apply(q, k, scale, bias, ids, labels, task))


class _GlobalTiles(torch.autograd.Function):
    """Of q, k, scale, bias: the fields of ``_Found``."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor | None,
        scale: Tensor,
        bias: Tensor | None,
        ids: Tensor | None,
        labels: Tensor | None,
        task: _Task,
    ) -> tuple[Tensor, ...]:
        layout = task.layout
        columns = [q if k is None else k]
        columns += [x for x in (ids, labels) if x is not None]
        given = (ids is not None, labels is not None)
        if ids is None:
            ids = layout.sample_ids(layout.ranks.rank, task.views, q.device)
        tiles = Tiles(q, None, scale, bias, ids)
        lse = task.kind == "lse"
        row = q.new_full((len(q),), -torch.inf if lse else 0.0, dtype=tiles.acc)
        positive, count = (row.new_zeros(0 if labels is None else len(q)) for _ in range(2))
        backend = registry.resolve(q.device)

        def compute(block: list[Tensor], owner: int | None) -> Tensor | None:
            nonlocal row
            part = task.block(tiles, given, block, owner)
            found = backend.pairwise_forward(task.kind, part.tiles, task.want_col, Thresholds())
            row = torch.logaddexp(row, found.row) if lse else row + found.row
            if labels is not None:
                _add_positives_(positive, count, part, labels)
            return found.col if task.want_col else None

        with no_autocast(q.device):
            collected = task.exchange.collect(columns)
            col = task.exchange.visit(collected, [], compute, torch.logaddexp)
        col = row.new_empty(0) if col is None else col
        ctx.task, ctx.given, ctx.symmetric = task, given, k is None
        ctx.save_for_backward(q, scale, bias, ids, labels, row, col, *collected)
        ctx.mark_non_differentiable(count)
        return row, col, positive, count

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        saved = ctx.saved_tensors  # once: checkpointing computes them again for each reading

        def compute() -> list[Tensor | None]:
            with registry.backend(ctx.task.backend), no_autocast(saved[0].device):
                if ctx.symmetric:
                    return _GlobalTiles.symmetric(ctx, saved, *gradients[:3:2])
                return _GlobalTiles.gradients(ctx, saved, *gradients[:2])

        found = once("sslkernels::global_loss", compute, (*gradients[:3], *saved))
        return (*found, None, None, None)

    @staticmethod
    def symmetric(
        ctx: Any, saved: tuple[Tensor, ...], drow: Tensor, dpositive: Tensor
    ) -> list[Tensor | None]:
        """Where columns are rows: the state of rows travels, and nothing comes back."""
        q, scale, _, ids, labels, row, _, *collected = saved
        task: _Task = ctx.task
        tiles = Tiles(q, None, _divisor(scale), None, ids)
        state = RowState(row, drow.contiguous())
        dq = q.new_zeros(q.shape, dtype=tiles.acc)
        dpairs = torch.zeros_like(dq if labels is not None else row)  # of the positives: no scale
        backend = registry.resolve(q.device)

        def compute(block: list[Tensor], owner: int | None) -> None:
            part = task.block(tiles, ctx.given, block, owner)
            lse, g, *others = part.others
            columns = RowState(lse, g)
            found = backend.pairwise_backward(
                task.kind, part.tiles, state, columns, Wanted(True, False)
            )
            dq.add_(found.dq)
            if labels is not None:
                _add_positives_gradient_(dpairs, part, labels, dpositive, others[0])

        more = [row, drow] if labels is None else [row, drow, dpositive]
        task.exchange.visit(collected, more, compute)
        dscale = None
        if ctx.needs_input_grad[2]:  # half: dq has both sides of each pair
            dscale = fixed_sum(rows.dots(q, dq)) / (2 * tiles.scale)
        if labels is not None:
            dq.add_(dpairs)
        return [dq.to(q.dtype) if ctx.needs_input_grad[0] else None, None, dscale, None]

    @staticmethod
    def gradients(
        ctx: Any, saved: tuple[Tensor, ...], drow: Tensor, dcol: Tensor
    ) -> list[Tensor | None]:
        """Each rank's part of the gradient of a column goes to the owner of the column."""
        q, scale, bias, ids, _, row, col, *collected = saved
        task: _Task = ctx.task
        need_q, need_k, need_scale, need_bias = ctx.needs_input_grad[:4]
        tiles = Tiles(q, None, _divisor(scale), bias, ids)
        state = RowState(row, drow.contiguous())
        dq = q.new_zeros(q.shape, dtype=tiles.acc)
        dbias = torch.zeros_like(scale)
        backend = registry.resolve(q.device)

        def compute(block: list[Tensor], owner: int | None) -> Tensor | None:
            nonlocal dbias
            part = task.block(tiles, ctx.given, block, owner)
            columns = RowState(*part.others) if task.want_col else None
            wanted = Wanted(need_q or need_scale, need_k)
            found = backend.pairwise_backward(task.kind, part.tiles, state, columns, wanted)
            if wanted.dq:
                dq.add_(found.dq)
            dbias = dbias + found.dbias
            return found.dk if need_k else None

        dk = task.exchange.visit(collected, [col, dcol] if task.want_col else [], compute)
        return [
            dq.to(q.dtype) if need_q else None,
            None if dk is None else dk.to(q.dtype),
            fixed_sum(rows.dots(q, dq)) / tiles.scale if need_scale else None,
            dbias if need_bias else None,
        ]


def _divisor(scale: Tensor) -> Tensor:
    """The scale, or for 0 what gives the same tiles and can be divided by; see ops/pairwise.py."""
    return torch.where(scale == 0, torch.full_like(scale, TINY), scale)


def _classes(part: _Block, labels: Tensor, *columns: Tensor) -> tuple[Tensor, ...]:
    """For each local row the sum of ``columns`` [M, C] over the columns of its class."""
    n = len(labels)
    segment = rows.segments(torch.cat((labels, part.labels)))  # type: ignore[arg-type]
    return tuple(
        rows.accumulate_rows(x, segment[n:], len(segment)).index_select(0, segment[:n])
        for x in columns
    )


def _add_positives_(positive: Tensor, count: Tensor, part: _Block, labels: Tensor) -> None:
    """Add what a block has for the positives of local rows, each row itself left out."""
    q = part.tiles.q.to(positive.dtype)
    k = part.tiles.k.to(positive.dtype)  # type: ignore[union-attr]
    sums, counts = _classes(part, labels, k, k.new_ones((len(k), 1)))
    positive.add_(rows.dots(q, sums - q if part.own else sums))
    count.add_(counts[:, 0] - 1 if part.own else counts[:, 0])


def _add_positives_gradient_(
    dq: Tensor, part: _Block, labels: Tensor, g: Tensor, g_columns: Tensor
) -> None:
    """Add the gradient: a row is in its own sum and in those of its class."""
    q = part.tiles.q.to(dq.dtype)
    k = part.tiles.k.to(dq.dtype)  # type: ignore[union-attr]
    sums, weighted = _classes(part, labels, k, k * g_columns[:, None])
    g = g[:, None]
    if part.own:
        sums, weighted = sums - q, weighted - g * q
    dq.add_(g * sums).add_(weighted)
