# SPDX-License-Identifier: Apache-2.0
"""The ranks of a torch.distributed group, and two ways for rows to meet those of all ranks.

``Gathered``: every rank gets the rows of all at once.  ``Ring``: blocks of rows are passed round, one
from each rank, and a rank holds a few blocks at a time, however many ranks there are.  What is computed
of a block for its owner (the gradient of its rows, say) is added up over the ranks and ends at the
owner.  Sums and products of several ranks are taken in an order that depends on the number of ranks and
on nothing else, so results have the same bits run to run.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
MODES = ("auto", "gather", "ring")
# "auto" takes the ring when the gathered rows are larger than this.  A choice, not a measurement: below
# it they are small beside the activations of any encoder, and a ring of W ranks has W steps' latency.
GATHER_BYTES = 1 << 28

# What is computed of a block: its tensors and its owner (None: rows of all ranks) to what its owner is
# to get, [rows of the block, ...], or None.
Compute = Callable[[list[Tensor], int | None], Tensor | None]
Combine = Callable[[Tensor, Tensor], Tensor]


# ---------------------------------------------------------------------------------- communication


class Ranks:
    """A group, and what is communicated in it."""

    def __init__(self, group: Any) -> None:
        """A group that ``connect`` has checked; None is the default one."""
        self.group = group
        self.rank: int = dist.get_rank(group)
        self.size: int = dist.get_world_size(group)

    def stack(self, x: Tensor) -> Tensor:
        """[W, ...]: x, of the same shape on every rank, in the order of ranks."""
        parts = [torch.empty_like(x) for _ in range(self.size)]
        dist.all_gather(parts, x.contiguous(), group=self.group)
        return torch.stack(parts)

    def gather(self, x: Tensor, rows: Sequence[int]) -> Tensor:
        """[sum of rows, ...]: x [rows[rank], ...] of every rank in the order of ranks."""
        longest = max(rows)
        if longest == 0 or self.size == 1:
            return x
        padded = x.contiguous()
        if len(x) < longest:  # a collective wants equal shapes
            padded = torch.cat((padded, x.new_zeros(longest - len(x), *x.shape[1:])))
        parts = [torch.empty_like(padded) for _ in rows]
        dist.all_gather(parts, padded, group=self.group)
        return torch.cat([part[:n] for part, n in zip(parts, rows, strict=True)])

    def exchange(self, x: Tensor, rows: Sequence[int]) -> list[Tensor]:
        """What every rank has for this one: W times [rows[rank], ...], of x [sum of rows, ...].

        With the sum that the caller takes it is a reduce-scatter, for ranks with different numbers of
        rows and in an order that is the caller's.
        """
        if self.size == 1:
            return [x]
        own = rows[self.rank]
        found = x.new_empty((self.size * own, *x.shape[1:]))
        dist.all_to_all_single(
            found, x.contiguous(), [own] * self.size, list(rows), group=self.group
        )
        return list(found.split(own)) if own else [found] * self.size

    def shift(
        self, send: Sequence[Tensor], receive: Sequence[Tensor], tag: int
    ) -> Callable[[], None]:
        """Start to send tensors to the next rank, and to receive from the previous one.

        Returns:
            To be called before ``receive`` is read or ``send`` is written.
        """
        operations = []
        for function, tensors, step in ((dist.isend, send, 1), (dist.irecv, receive, -1)):
            peer = (self.rank + step) % self.size
            if self.group is not None:
                peer = dist.get_global_rank(self.group, peer)
            operations += [
                dist.P2POp(function, x, peer, self.group, tag) for x in tensors if x.numel()
            ]
        works = dist.batch_isend_irecv(operations) if operations else []

        def wait() -> None:
            for work in works:
                work.wait()
            operations.clear()  # which keep the tensors alive until here

        return wait


def connect(op: str, group: Any) -> Ranks:
    """The ranks of a group, or of the default one for True.

    Raises:
        TypeError: If group is no group.
        ValueError: If torch.distributed is not initialised or this process is not in the group.
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise ValueError(
            f"{op}: group needs torch.distributed to be initialised "
            f"(torch.distributed.init_process_group), got group={group!r} without it"
        )
    if group is True:
        return Ranks(None)
    if group is dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError(f"{op}: group must contain this process (rank {dist.get_rank()})")
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            f"{op}: group must be a torch.distributed ProcessGroup, True or None, got {group!r}"
        )
    return Ranks(group)


def refuse_different(
    what: str, values: Sequence[Any], show: Callable[[int], str] | None = None
) -> None:
    """Raise the same error on every rank if values, one a rank, are not all the same.

    Args:
        what: What they are, for the message.
        values: Of each rank.
        show: How the value of a rank is written; by default as it is.

    Raises:
        ValueError: It names the different values, each with the first rank that has it.
    """
    first: dict[Any, int] = {}
    for rank, value in enumerate(values):
        first.setdefault(value, rank)
    if len(first) > 1:
        named = [(rank, show(rank) if show else value) for value, rank in first.items()]
        got = ", ".join(f"rank {rank}: {value}" for rank, value in named[:8])
        raise ValueError(f"{what} must be the same on every rank of group, got {got}")


class PackedGather:
    """Rows of all ranks, of which ranks have different numbers, in one collective.

    Every rank sends a header and as many bytes as the most that any has sent so far.  A second
    collective brings what is longer than that: the first time, and when a batch is larger than all before.
    """

    _HEADER = 5  # int64: bytes, rows, D, dtype, whether there are labels

    def __init__(self) -> None:
        """See the class."""
        self._capacity = 0  # bytes, the same on every rank

    def __call__(
        self, op: str, ranks: Ranks, keys: Tensor, labels: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Keys [N, D], any floating dtype, and labels [N] int64 of all ranks, in the order of ranks.

        Raises:
            ValueError: If D, dtype or whether there are labels differ, on every rank.
        """
        if ranks.size == 1:
            return keys, labels
        parts = [x.contiguous().view(-1) for x in (labels, keys) if x is not None]
        content = torch.cat(
            [x.view(torch.uint8) for x in parts if x.numel()]
            or [keys.new_empty(0, dtype=torch.uint8)]
        )
        numbers = [len(content), *keys.shape, DTYPES.index(keys.dtype), labels is not None]
        header = torch.tensor(numbers, dtype=torch.int64, device=keys.device).view(torch.uint8)
        room = content.new_zeros(self._capacity)
        if len(content) <= self._capacity:
            room[: len(content)] = content
        found = ranks.stack(torch.cat((header, room)))
        table = found[:, : len(header)].contiguous().view(torch.int64).tolist()
        refuse_different(
            f"{op}: D and dtype of keys",
            [tuple(row[2:4]) for row in table],
            lambda rank: f"{table[rank][1:3]} {DTYPES[table[rank][3]]}",
        )
        refuse_different(f"{op}: whether there are labels", [bool(row[4]) for row in table])
        found = found[:, len(header) :]
        longest = max(row[0] for row in table)
        if longest > self._capacity:
            self._capacity = longest
            found = ranks.stack(torch.cat((content, content.new_zeros(longest - len(content)))))
        all_keys, all_labels = [], []
        for part, (length, n, d, *_) in zip(found, table, strict=True):
            start = 0 if labels is None else 8 * n
            all_labels.append(part[:start].clone().view(torch.int64))  # a copy begins aligned
            all_keys.append(part[start:length].clone().view(keys.dtype).view(n, d))
        return torch.cat(all_keys), None if labels is None else torch.cat(all_labels)


# ------------------------------------------------------------------------------------------- rows


class Gathered:
    """Rows of all ranks at once: one collective there, one for what goes back to the owners."""

    def __init__(self, ranks: Ranks, rows: Sequence[int]) -> None:
        """rows: how many each rank has."""
        self.ranks: Ranks = ranks
        self.rows: tuple[int, ...] = tuple(rows)

    def collect(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """What ``visit`` wants of tensors [rows[rank], ...] that are visited more than once."""
        return [self.ranks.gather(x, self.rows) for x in tensors]

    def visit(
        self,
        collected: Sequence[Tensor],
        more: Sequence[Tensor],
        compute: Compute,
        combine: Combine = torch.add,
    ) -> Tensor | None:
        """Compute something of every rank's rows; what every rank computed of this one's is combined.

        Args:
            collected: From ``collect``.
            more: [rows[rank], ...], visited once.
            compute: Called with collected and more of a block; all ranks return a tensor, or none.
            combine: Of what two ranks have computed of the same rows.

        Returns:
            [rows[rank], ...], or None if there is nothing to combine.
        """
        found = compute([*collected, *self.collect(more)], None)
        if found is None:
            return None
        return functools.reduce(combine, self.ranks.exchange(found, self.rows))


class Ring(Gathered):
    """Rows in blocks that are passed round; the next one is under way while one is computed.

    What is computed of a block follows it one step later, and after W steps arrives at its owner.  A
    rank holds two blocks, and as many times what is computed of one as its sum takes: three.
    """

    def collect(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Nothing travels ahead of time."""
        return list(tensors)

    def visit(
        self,
        collected: Sequence[Tensor],
        more: Sequence[Tensor],
        compute: Compute,
        combine: Combine = torch.add,
    ) -> Tensor | None:
        """See ``Gathered.visit``."""
        ranks, rows = self.ranks, self.rows
        block = [x.contiguous() for x in (*collected, *more)]
        arriving: Tensor | None = None
        wait_block = wait_found = _nothing
        for step in range(ranks.size):
            owner = (ranks.rank - step) % ranks.size
            following = rows[owner - 1]  # of the block that comes next, and of what comes with it
            last = step + 1 == ranks.size
            coming = [] if last else [x.new_empty((following, *x.shape[1:])) for x in block]
            wait_block = _nothing if last else ranks.shift(block, coming, tag=0)
            found = compute(block, owner)
            if found is not None and ranks.size > 1:
                wait_found()
                if arriving is not None:
                    found = combine(arriving, found)
                arriving = found.new_empty((following, *found.shape[1:]))
                # One batch to and fro: a receive alone could wait for a send behind it.
                wait_found = ranks.shift([found.contiguous()], [arriving], tag=1)
            elif found is not None:
                arriving = found
            del found
            wait_block()
            block = coming
        wait_found()
        return arriving


def _nothing() -> None:
    pass


class Layout(NamedTuple):
    """Which samples of the joined batch are where."""

    ranks: Ranks
    sizes: tuple[int, ...]  # [W] samples of each rank
    ring: bool

    @property
    def total(self) -> int:
        """Samples of all ranks."""
        return sum(self.sizes)

    def rows(self, views: int) -> Gathered:
        """The way of rows, ``views`` for each sample."""
        rows = [n * views for n in self.sizes]
        return Ring(self.ranks, rows) if self.ring else Gathered(self.ranks, rows)

    def sample_ids(self, owner: int | None, views: int, device: torch.device) -> Tensor:
        """Numbers of the samples of a rank (None: of all) by rows; the views of one share its number."""
        if owner is None and views == 1:
            return torch.arange(self.total, device=device)
        ids, first = [], 0
        for r, n in enumerate(self.sizes):
            if owner in (None, r):
                ids.append(torch.arange(first, first + n, device=device).repeat(views))
            first += n
        return torch.cat(ids)


def agree(
    op: str, ranks: Ranks, x: Tensor, mode: str, views: int, call: Mapping[str, bool]
) -> Layout:
    """Exchange sizes, and what must be alike: a mismatch raises everywhere, and nothing hangs.

    Args:
        op: For messages; one of ``OPS``.
        ranks: Of the group.
        x: [N, D], what the caller gave.
        mode: One of ``MODES``.
        views: How many there are.
        call: What else must be the same, true or false, by what it is.

    Raises:
        ValueError: If ranks differ in D, dtype, op, mode or call, on every rank.
    """
    facts = [DTYPES.index(x.dtype), OPS.index(op), MODES.index(mode), views]
    mine = [*x.shape, *facts, *map(int, call.values())]
    table = ranks.stack(torch.tensor(mine, device=x.device)).tolist()
    refuse_different(f"{op}: the loss", [OPS[row[3]] for row in table])
    refuse_different(
        f"{op}: D and dtype",
        [tuple(row[1:3]) for row in table],
        lambda rank: f"{table[rank][:2]} {DTYPES[table[rank][2]]}",
    )
    refuse_different(f"{op}: group_mode", [MODES[row[4]] for row in table])
    refuse_different(f"{op}: the number of views", [row[5] for row in table])
    for i, name in enumerate(call):
        refuse_different(f"{op}: whether {name}", [bool(row[6 + i]) for row in table])
    sizes = tuple(row[0] for row in table)
    large = sum(sizes) * x.shape[1] * x.element_size() > GATHER_BYTES
    ring = mode == "ring" or (mode == "auto" and large)
    return Layout(ranks, sizes, ring and len(sizes) > 1)


OPS = ("nt_xent_loss", "info_nce_loss", "clip_loss", "siglip_loss", "sup_con_loss", "dcl_loss")
