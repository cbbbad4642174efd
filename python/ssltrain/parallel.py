# SPDX-License-Identifier: Apache-2.0
"""One process or many: what torchrun sets in the environment, and the few calls it needs."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import sslkernels
from ssltrain.config import Amp, TrainConfig
from ssltrain.errors import UserError
from ssltrain.norms import synchronised


@dataclass(frozen=True)
class World:
    """The processes of a run and the device of this one."""

    rank: int
    size: int
    device: torch.device
    sync_norms: bool = True  # batch norm has the statistics of all of them

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and prints."""
        return self.rank == 0

    def mean(self, values: Tensor) -> Tensor:
        """The mean of ``values`` over the processes."""
        if self.size == 1:
            return values
        values = values.clone()
        dist.all_reduce(values)
        return values / self.size

    def gather(self, value: Any) -> list[Any]:
        """The picklable ``value`` of every process, in the order of ranks, on all of them."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def gather_rows(self, rows: Tensor) -> Tensor:
        """Rows [N, D] of every process in the order of ranks, [size * N, D], without gradient."""
        if self.size == 1:
            return rows
        found = [torch.empty_like(rows) for _ in range(self.size)]
        dist.all_gather(found, rows.contiguous())
        return torch.cat(found)

    def shuffled(self, rows: Tensor, encode: Callable[[Tensor], Tensor], seed: int) -> Tensor:
        """``encode(rows)``, computed of batches that are a random mix of all processes' rows.

        MoCo's shuffling: the statistics of batch norm then say nothing about which keys were encoded
        together with the query's.

        Args:
            rows: [N, ...], as many on every process.
            encode: Rows to keys [N, D].
            seed: Of the order; the same on every process.
        """
        if self.size == 1:
            return encode(rows)
        everyone = self.gather_rows(rows)
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(everyone), generator=generator).to(rows.device)
        own = slice(self.rank * len(rows), (self.rank + 1) * len(rows))
        keys = self.gather_rows(encode(everyone[order[own]]))  # keys[i] is of everyone[order[i]]
        back = torch.empty_like(keys)
        back[order] = keys
        return back[own]

    def wrap(self, module: nn.Module) -> nn.Module:
        """``module`` under DDP, with batch norm over all processes if it is to be so."""
        module.to(self.device)
        if self.size == 1:
            return module
        gpu = self.device.type == "cuda"
        if self.sync_norms:
            convert = nn.SyncBatchNorm.convert_sync_batchnorm if gpu else synchronised
            module = convert(module)
        ids = [self.device.index] if gpu else None
        return nn.parallel.DistributedDataParallel(module, device_ids=ids)


@contextmanager
def world(config: TrainConfig) -> Iterator[World]:
    """Join the processes that torchrun started, or be the only one; leave them at the end."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    rank = int(os.environ.get("RANK", "0"))
    device = choose_device(config.device, int(os.environ.get("LOCAL_RANK", "0")))
    if config.threads:
        torch.set_num_threads(config.threads)
    if size == 1:
        yield World(0, 1, device)
        return
    if config.batch_size % size:
        raise UserError(f"--batch-size {config.batch_size} must divide by the {size} processes")
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield World(rank, size, device, config.norms == "sync")
    except RuntimeError as error:
        if not _others_are_gone(error):
            raise
        raise UserError(
            "another process of the run has ended or does not answer, so this one ends too; the last "
            f"checkpoint is whole, go on with --resume ({str(error).splitlines()[0]})"
        ) from error
    finally:
        dist.destroy_process_group()


def _others_are_gone(error: RuntimeError) -> bool:
    """Whether communication failed; gloo has no exception of its own for that."""
    text = str(error)
    return isinstance(error, dist.DistError) or any(
        words in text
        for words in ("gloo/", "Connection closed by peer", "Connection reset by peer")
    )


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """The device that ``--device`` names; ``auto`` takes a GPU where there is one.

    Raises:
        UserError: torch does not know the device or cannot reach it.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type == "cuda" and ":" not in name:
            device = torch.device("cuda", local_rank)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--device {name} cannot be used here: {reason}") from error
    return device


def computes_bf16(device: torch.device) -> bool:
    """Whether a device multiplies bfloat16 itself: elsewhere autocast is slower than float32.

    On a CPU with AVX2 only, a convolution in bfloat16 takes twelve times as long as in float32.
    """
    if device.type == "cuda":
        return bool(torch.version.hip) or torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu" and "avx512_bf16" in sslkernels.info().available_isas


def choose_amp(name: Amp, world: World) -> Amp:
    """What ``--amp`` means on these processes: ``auto`` is bf16 if every one computes it, or none."""
    if name != "auto":
        return name
    return "bf16" if all(world.gather(computes_bf16(world.device))) else "none"


def unwrap(module: nn.Module) -> Any:
    """The module below DDP."""
    return module.module if isinstance(module, nn.parallel.DistributedDataParallel) else module
