# SPDX-License-Identifier: Apache-2.0
"""Ranks without processes: threads that pass tensors to each other, and one rank all by itself."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from helpers import HANGS_S, threads
from torch import Tensor

from sslkernels._ranks import Ranks


class World:
    """What W threads share."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.barrier = threading.Barrier(size)
        self.board: list[Any] = [None] * size
        self.boxes: dict[tuple[int, int], queue.Queue[list[Tensor]]] = {
            (rank, tag): queue.Queue() for rank in range(size) for tag in (0, 1)
        }

    def run(self, rank_step: Callable[[ThreadRank], Any]) -> list[Any]:
        """The results of all ranks; the first exception of any."""

        def step(rank: int) -> Any:
            try:
                torch.set_num_threads(1)
                return rank_step(ThreadRank(self, rank))
            except BaseException:
                self.barrier.abort()
                raise

        with threads(1), ThreadPoolExecutor(self.size) as pool:
            return list(pool.map(step, range(self.size)))


class ThreadRank(Ranks):
    """A rank that is a thread of this process."""

    def __init__(self, world: World, rank: int) -> None:
        self.world, self.rank, self.size = world, rank, world.size
        self.steps = 0  # of rings

    def shared(self, x: Tensor) -> list[Tensor]:
        """x of every rank."""
        self.world.barrier.wait(HANGS_S)
        self.world.board[self.rank] = x
        self.world.barrier.wait(HANGS_S)
        return list(self.world.board)

    def stack(self, x: Tensor) -> Tensor:
        return torch.stack(self.shared(x))

    def gather(self, x: Tensor, rows: Sequence[int]) -> Tensor:
        parts = self.shared(x)
        assert [len(part) for part in parts] == list(rows)
        return torch.cat(parts)

    def exchange(self, x: Tensor, rows: Sequence[int]) -> list[Tensor]:
        return [part.split(list(rows))[self.rank].clone() for part in self.shared(x)]

    def shift(
        self, send: Sequence[Tensor], receive: Sequence[Tensor], tag: int
    ) -> Callable[[], None]:
        self.steps += tag == 0
        following = (self.rank + 1) % self.size
        self.world.boxes[following, tag].put([x.clone() for x in send])
        for x in receive:
            x.fill_(torch.nan if x.is_floating_point() else -1)  # not there before the wait

        def wait() -> None:
            arrived = self.world.boxes[self.rank, tag].get(timeout=HANGS_S)
            for x, y in zip(receive, arrived, strict=True):
                assert x.shape == y.shape and x.dtype == y.dtype
                x.copy_(y)

        return wait


class LonelyRank(Ranks):
    """Rank 0 of W whose neighbours send what it has itself: for counting memory."""

    def __init__(self, size: int) -> None:
        self.rank, self.size = 0, size
        self.sent = 0  # bytes of rows; sizes and sums are not counted
        self.shifts = 0

    def stack(self, x: Tensor) -> Tensor:
        return x.expand(self.size, *x.shape)

    def gather(self, x: Tensor, rows: Sequence[int]) -> Tensor:
        self.sent += (self.size - 1) * x.nbytes
        return x.repeat(self.size, *[1] * (x.ndim - 1))

    def exchange(self, x: Tensor, rows: Sequence[int]) -> list[Tensor]:
        self.sent += x.nbytes // self.size * (self.size - 1)
        return [part.clone() for part in x.split(list(rows))]

    def shift(
        self, send: Sequence[Tensor], receive: Sequence[Tensor], tag: int
    ) -> Callable[[], None]:
        self.sent += sum(x.nbytes for x in send)
        self.shifts += 1
        held = list(send)  # until they are sent

        def wait() -> None:
            for x, y in zip(receive, held, strict=True):
                x.copy_(y)
            held.clear()

        return wait
