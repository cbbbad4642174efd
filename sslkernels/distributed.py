# SPDX-License-Identifier: Apache-2.0
"""NT-Xent and CLIP with negatives from every rank of a torch.distributed group.

A rank computes its own rows against the columns of all ranks, so compute is split W ways and memory
is O(N_global * D): the gathered embeddings, and no matrix of similarities.

Each rank gets embeddings, lse and positive logits of every row in its forward pass (3 gathers: the
sizes, the embeddings, two or three numbers a row), and those are all that a backward pass over
its own rows needs: no gradient of an embedding travels.  With x' the positive of x, s the scale and
w_r = dloss_r * sigmoid(lse_r - p_r), the gradient of softplus(lse_r - p_r) summed over all rows is

    dx_r = s * sum_j (w_r exp(S_rj - lse_r) + w_j exp(S_rj - lse_j)) x_j - s * (w_r + w_r') x_r'

The sum is the tile engine's backward pass for local rows and global columns.

Gradients follow one rule: that of the *average over ranks* of what the ranks compute from their
results, times W.  DistributedDataParallel averages parameter gradients, which takes the W away.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from sslkernels._types import Reduction
from sslkernels.backends.arithmetic import fixed_sum
from sslkernels.backends.interface import RowState, Thresholds, Tiles, Wanted
from sslkernels.ops import heads, registry
from sslkernels.ops._library import forward_mode, functorch, no_autocast, once
from sslkernels.ops.pairwise import TINY

if TYPE_CHECKING:
    Group = dist.ProcessGroup | bool | None
else:  # builds of torch without distributed have no ProcessGroup
    Group = Any

_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def global_nt_xent(
    z1: Tensor, z2: Tensor, scale: Tensor, normalize: bool, reduction: Reduction, group: Group
) -> Tensor:
    """NT-Xent of the batch that all ranks hold together.

    With z = cat(z1, z2) over all ranks, s_ij = scale * <z_i, z_j> and i' the other view of row i,

        loss_i = -log( exp(s_ii') / sum_{j != i} exp(s_ij) )

    Every rank of the group has to call this, in the same order as its other collectives.  Ranks may
    hold different numbers of rows.  The gradient is W times that of the average over ranks of what
    they compute from their results: for "mean" and "sum" (where every rank computes the same) W
    times the gradient of the result, so that DDP's averaging of parameter gradients gives
    single-process training on the joined batch; for "none" that of the sum over ranks, as with any
    loss of local rows under DDP.  That goes for the scale too.  The backward pass communicates for
    "none" only.

    Args:
        z1: [N, D] local rows, N >= 0; shapes and dtypes have been checked by the caller.
        z2: [N, D], same dtype and device.
        scale: 0-d in the accumulation dtype, the same on every rank; may require grad.
        normalize: Whether to divide rows by max(norm, 1e-12) first.
        reduction: "mean" or "sum" over the rows of all ranks, the same bits on each; "none": [2N]
            local rows in the order of cat(z1, z2).
        group: A ProcessGroup, or True for the default one.

    Returns:
        The loss in the accumulation dtype.

    Raises:
        TypeError: If group is no group.
        ValueError: If torch.distributed is not initialised, this process is not in the group, or
            ranks differ in D or dtype (raised on every rank).

    Reference:
        Chen et al., A Simple Framework for Contrastive Learning of Visual Representations,
        arXiv:2002.05709, section 2.1 (global batch).
    """
    return _global_loss("nt_xent_loss", z1, z2, scale, normalize, reduction, group, joint=True)


def global_clip(
    x: Tensor, y: Tensor, scale: Tensor, normalize: bool, reduction: Reduction, group: Group
) -> Tensor:
    """CLIP's symmetric cross-entropy over the pairs that all ranks hold together.

        loss_i = (CE over all y of x_i + CE over all x of y_i) / 2,     logits = scale * <x, y>

    Collectives, row counts and gradients are as in ``global_nt_xent``.

    Args:
        x: [N, D] local rows, for example of images.
        y: [N, D], same dtype and device: row i belongs to x_i.
        scale: 0-d in the accumulation dtype, the same on every rank; may require grad.
        normalize: Whether to divide rows by max(norm, 1e-12) first.
        reduction: "mean" or "sum" over the pairs of all ranks, the same bits on each; "none": [N]
            local pairs.
        group: A ProcessGroup, or True for the default one.

    Returns:
        The loss in the accumulation dtype.

    Raises:
        TypeError: If group is no group.
        ValueError: If torch.distributed is not initialised, this process is not in the group, or
            ranks differ in D or dtype (raised on every rank).

    Reference:
        Radford et al., Learning Transferable Visual Models From Natural Language Supervision,
        arXiv:2103.00020.
    """
    return _global_loss("clip_loss", x, y, scale, normalize, reduction, group, joint=False)


def _global_loss(
    op: str,
    a: Tensor,
    b: Tensor,
    scale: Tensor,
    normalize: bool,
    reduction: Reduction,
    group: Group,
    *,
    joint: bool,
) -> Tensor:
    if functorch() or forward_mode():
        raise RuntimeError(
            f"{op}: group does not work in transforms of torch.func or forward-mode differentiation"
        )
    apply = _apply
    if torch.compiler.is_compiling():  # not a decorator: that would import torch._dynamo for all
        apply = torch.compiler.disable(_apply)
    return apply(op, a, b, scale, normalize, reduction, group, joint)


def _apply(
    op: str,
    a: Tensor,
    b: Tensor,
    scale: Tensor,
    normalize: bool,
    reduction: Reduction,
    group: Group,
    joint: bool,
) -> Tensor:
    process_group = _process_group(op, group)
    a, b = heads.unit(a, normalize), heads.unit(b, normalize)
    layout = _agree(op, a, process_group)
    return _GlobalLoss.apply(a, b, scale, joint, reduction, layout)


# -------------------------------------------------------------------------------------- ranks


class _Layout(NamedTuple):
    """Which rows of the joined batch are where."""

    sizes: tuple[int, ...]  # [W] samples of each rank
    rank: int
    group: Any  # None: the default group

    @property
    def first(self) -> int:
        """Number of this rank's first sample in the joined batch."""
        return sum(self.sizes[: self.rank])


def _process_group(op: str, group: Group) -> Any:
    if not (dist.is_available() and dist.is_initialized()):
        raise ValueError(
            f"{op}: group needs torch.distributed to be initialised "
            f"(torch.distributed.init_process_group), got group={group!r} without it"
        )
    if group is True:
        return None
    if group is dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError(f"{op}: group must contain this process (rank {dist.get_rank()})")
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            f"{op}: group must be a torch.distributed ProcessGroup, True or None, got {group!r}"
        )
    return group


def _agree(op: str, x: Tensor, group: Any) -> _Layout:
    """Exchange shapes and dtypes: a mismatch raises everywhere, where a gather would hang."""
    mine = torch.tensor([x.shape[0], x.shape[1], _DTYPES.index(x.dtype)], device=x.device)
    world = dist.get_world_size(group)
    parts = [torch.empty_like(mine) for _ in range(world)]
    dist.all_gather(parts, mine, group=group)
    table = torch.stack(parts).tolist()
    if any(row[1:] != table[0][1:] for row in table):
        got = ", ".join(f"rank {r}: [{n}, {d}] {_DTYPES[t]}" for r, (n, d, t) in enumerate(table))
        raise ValueError(f"{op}: D and dtype must be the same on every rank of group, got {got}")
    return _Layout(tuple(row[0] for row in table), dist.get_rank(group), group)


def _gather(x: Tensor, layout: _Layout, rows_per_sample: int) -> Tensor:
    """[R_global, ...]: rows of every rank in the order of ranks."""
    sizes = [n * rows_per_sample for n in layout.sizes]
    longest = max(sizes)
    if longest == 0:
        return x
    padded = x.contiguous()
    if len(x) < longest:  # a collective wants equal shapes
        padded = torch.cat((padded, x.new_zeros(longest - len(x), *x.shape[1:])))
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded, group=layout.group)
    return torch.cat([part[:n] for part, n in zip(parts, sizes, strict=True)])


def _sample_ids(layout: _Layout, views: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Sample numbers of the local rows and of all rows; both views of a sample share one."""
    first, blocks = 0, []
    for n in layout.sizes:
        blocks.append(torch.arange(first, first + n, device=device).repeat(views))
        first += n
    return blocks[layout.rank], torch.cat(blocks)


# --------------------------------------------------------------------------------------- loss


class _GlobalLoss(torch.autograd.Function):
    """The loss in *directions*: one for NT-Xent (rows cat(a, b) against themselves), two for CLIP.

    Direction d has local ``queries[d]``, their ``positives[d]`` and the gathered ``keys[d]``.  The
    keys of a direction are the queries of direction ``-1 - d`` over all ranks.
    """

    @staticmethod
    def forward(
        ctx: Any,
        a: Tensor,
        b: Tensor,
        scale: Tensor,
        joint: bool,
        reduction: Reduction,
        layout: _Layout,
    ) -> Tensor:
        queries, positives = _directions(a, b, joint)
        views = 2 if joint else 1
        ids_q, ids_k = _sample_ids(layout, views, a.device)
        gathered = _gather(torch.cat(queries, 1), layout, views)
        keys = [k.contiguous() for k in reversed(gathered.chunk(len(queries), 1))]
        backend = registry.resolve(a.device)
        with no_autocast(a.device):
            numbers = [
                backend.pairwise_forward(
                    "lse", Tiles(q, k, scale, None, ids_q, ids_k), False, Thresholds()
                ).row
                for q, k in zip(queries, keys, strict=True)
            ]
            numbers.append(heads.dots(queries[0], positives[0]) * scale)
            every = _gather(torch.stack(numbers, 1), layout, views)  # [R_global, directions + 1]
            if reduction == "none":
                loss = _losses(torch.stack(numbers, 1))
            else:
                loss = heads.reduce(_losses(every), reduction)
        ctx.joint, ctx.reduction, ctx.layout = joint, reduction, layout
        ctx.backend = registry.override()
        ctx.save_for_backward(a, b, scale, every, *keys)
        return loss

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> Any:
        saved = ctx.saved_tensors  # once: checkpointing computes them again for each reading

        def compute() -> list[Tensor | None]:
            return list(_GlobalLoss.gradients(ctx, saved, dloss))

        return (
            *once("sslkernels::global_loss", compute, (dloss, *saved)),
            None,
            None,
            None,
        )

    @staticmethod
    def gradients(
        ctx: Any, saved: tuple[Tensor, ...], dloss: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Of a, b and scale."""
        a, b, scale, every, *keys = saved
        layout: _Layout = ctx.layout
        views = 2 if ctx.joint else 1
        need_scale = ctx.needs_input_grad[2]
        if need_scale:  # dscale divides by it; see ops/pairwise.py
            scale = torch.where(scale == 0, torch.full_like(scale, TINY), scale)
        queries, positives = _directions(a, b, ctx.joint)
        ids_q, ids_k = _sample_ids(layout, views, a.device)
        local = slice(layout.first * views, (layout.first + len(a)) * views)
        lse, positive = every[:, :-1], every[:, -1:]
        weight = torch.sigmoid(lse - positive) / len(keys)  # [R_global, directions]
        if ctx.reduction == "none":
            weight = weight * _gather(dloss.contiguous(), layout, views)[:, None]
        else:
            rows = max(1, len(every)) if ctx.reduction == "mean" else 1
            weight = weight * (dloss * (len(layout.sizes) / rows))
        # The weight of each local row as a positive of its positive.
        partner = weight[local].flip(1) if len(keys) == 2 else weight[local].roll(len(a), 0)

        gradients, shares = [], []
        with no_autocast(a.device), registry.backend(ctx.backend):
            backend = registry.resolve(a.device)
            for d, (q, p, k) in enumerate(zip(queries, positives, keys, strict=True)):
                other = len(keys) - 1 - d
                row = RowState(lse[local, d].contiguous(), weight[local, d].contiguous())
                col = RowState(lse[:, other].contiguous(), weight[:, other].contiguous())
                tiles = Tiles(q, k, scale, None, ids_q, ids_k)
                dq = backend.pairwise_backward("lse", tiles, row, col, Wanted(True, False)).dq
                dq = dq - (scale * (weight[local, d] + partner[:, d]))[:, None] * p.to(dq.dtype)
                gradients.append(dq.to(q.dtype))
                shares.append((q.to(dq.dtype) * dq).sum(1))
        # The loss is a function of scale * <x, x'>, so sum <x, dx> over all rows of all ranks
        # counts scale * dscale twice, once for either side.
        dscale = fixed_sum(torch.cat(shares)) / (2 * scale) if need_scale else None
        da, db = gradients[0].tensor_split(2) if ctx.joint else gradients
        return da, db, dscale


def _directions(a: Tensor, b: Tensor, joint: bool) -> tuple[list[Tensor], list[Tensor]]:
    """Queries and their positives for each direction."""
    if joint:
        return [torch.cat((a, b))], [torch.cat((b, a))]
    return [a, b], [b, a]


def _losses(numbers: Tensor) -> Tensor:
    """[R] from columns lse (one a direction) and positive logit: the mean of -log softmax."""
    return heads.nll(numbers[:, :-1], numbers[:, -1:]).mean(1)
