# SPDX-License-Identifier: Apache-2.0
"""Peers' losses and ours on two gloo processes: the value and the gradients of each rank."""

from __future__ import annotations

import os
import sys
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="torch without gloo")
WORLD, N, D = 2, 5, 6
CLIP = [(local, grad) for local in (False, True) for grad in (False, True)]


def inputs(rank: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Two normalised views of this rank, a scale and a bias."""
    generator = torch.Generator().manual_seed(rank)
    x = torch.randn(N, D, generator=generator, dtype=torch.float64)
    y = x + 0.5 * torch.randn(N, D, generator=generator, dtype=torch.float64)
    x, y = (torch.nn.functional.normalize(z, dim=1) for z in (x, y))
    return x, y, torch.tensor(4.0, dtype=torch.float64), torch.tensor(-2.0, dtype=torch.float64)


def run(loss: Any, arguments: tuple[Tensor, ...]) -> list[Tensor]:
    """Loss and gradients; the scale's is averaged over ranks, as DDP does it."""
    leaves = [x.clone().requires_grad_() for x in arguments]
    value = loss(*leaves)
    gradients = torch.autograd.grad(value, leaves, materialize_grads=True)
    out = [value.detach(), *gradients]
    for parameter in out[3:]:
        dist.all_reduce(parameter)
    return out


def solo(function: Any, x: Tensor, y: Tensor) -> Tensor:
    if "simclr" in function.__name__:
        ids = torch.arange(N).repeat(2) + N * dist.get_rank()
        return function(torch.cat((x, y)), ids, 0.3)
    return function(x, y, 0.3)


def weight(x: Tensor, y: Tensor) -> Tensor:
    """A ``weight_fn`` of DCL that is not symmetric and has a gradient."""
    return (2 * x - y).square().sum(1)


def rank_(loss: Any, x: Tensor, y: Tensor) -> Tensor:
    """Queries, positives, and the positives of the next as hard negatives."""
    return loss.compute_loss_from_embeddings([x, y, y.roll(1, 0)], None)


def pairs(rank: int) -> dict[str, tuple[Any, Any, int]]:
    """Name → (ours, theirs, how many of the inputs they take)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made: dict[str, tuple[Any, Any, int]] = {}
        try:
            from open_clip import loss as their_clip

            from sslkernels.integrations import open_clip as our_clip

            for local, grad in CLIP:
                arguments = (local, grad, False, rank, WORLD)
                mine, other = (m.ClipLoss(*arguments) for m in (our_clip, their_clip))
                made[f"clip {local} {grad}"] = mine, other, 3
            for kind in ("bidir", "shift", "reduce", "gather"):
                made[f"siglip {kind}"] = (
                    our_clip.SigLipLoss(False, rank, WORLD, kind),
                    their_clip.SigLipLoss(False, rank, WORLD, kind),
                    4,
                )
        except ImportError:
            pass
        try:
            from lightly import loss as their_lightly

            from sslkernels.integrations import lightly as our_lightly

            for name in ("NTXentLoss", "DCLLoss", "DCLWLoss"):
                mine, other = (
                    getattr(m, name)(0.3, gather_distributed=True)
                    for m in (our_lightly, their_lightly)
                )
                made[f"lightly {name}"] = mine, other, 2
            mine, other = (m.DCLLoss(-0.3, weight, True) for m in (our_lightly, their_lightly))
            made["lightly DCLLoss weight_fn"] = mine, other, 2
            torch.manual_seed(7)
            mine = our_lightly.NTXentLoss(0.3, (13, D), gather_distributed=True)
            torch.manual_seed(7)
            other = their_lightly.NTXentLoss(0.3, (13, D), gather_distributed=True)
            made["lightly bank"] = mine.double(), other.double(), 2
        except ImportError:
            pass
        try:
            from sentence_transformers.sentence_transformer import losses as their_st

            from sslkernels.integrations import sentence_transformers as our_st

            every = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")
            for directions in (every[:1], every):
                mine, other = (
                    m.MultipleNegativesRankingLoss(
                        torch.nn.Identity(), gather_across_devices=True, directions=directions
                    )
                    for m in (our_st, their_st)
                )
                made[f"ranking {len(directions)}"] = partial(rank_, mine), partial(rank_, other), 2
        except ImportError:
            pass
        try:
            from solo import losses as their_solo

            from sslkernels.integrations import solo_learn as our_solo

            for name in ("simclr_loss_func", "mocov3_loss_func"):
                made[f"solo {name}"] = (
                    partial(solo, getattr(our_solo, name)),
                    partial(solo, getattr(their_solo, name)),
                    2,
                )
        except ImportError:
            pass
        return made


def worker(rank: int, folder: str) -> None:
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=WORLD)
    out = {}
    for name, (mine, other, n) in pairs(rank).items():
        arguments = inputs(rank)[:n]
        out[name] = run(mine, arguments), run(other, arguments)
        if name == "lightly bank":
            out["bank"] = [mine.memory_bank.bank], [other.memory_bank.bank]
    torch.save(out, Path(folder) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(worker, (str(folder),), nprocs=WORLD)
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)]


def test_values_and_gradients_of_each_rank(results: list[Any]) -> None:
    if not results[0]:
        pytest.skip("none of the libraries is installed")
    for result in results:
        for name, (mine, other) in result.items():
            for i, (a, b) in enumerate(zip(mine, other, strict=True)):
                torch.testing.assert_close(a, b, msg=lambda m, n=name, i=i: f"{n}, {i}: {m}")
