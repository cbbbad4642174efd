# SPDX-License-Identifier: Apache-2.0
"""Gather beside ring on processes of this machine: time of a step, forward and backward.

    python -m benchmarks.distributed                              2 ranks, 4096 rows each, D = 128
    python -m benchmarks.distributed --ranks 4 --rows 1024 --losses clip
    python -m benchmarks.distributed --device cuda                a GPU for each rank, over NCCL

On CPUs (gloo) ranks share the cores, so what is measured is the library's own overhead and the copies, not a
network.
Both modes are compared with each other before they are timed, and take turns within one run; printed
are the median and the range of the slowest rank's times.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

import sslkernels as ssl

MODES = ("gather", "ring")
LOSSES = ("nt_xent", "info_nce", "clip", "siglip", "sup_con", "dcl")


def call(name: str, x: Tensor, y: Tensor, scale: Tensor, mode: str) -> Tensor:
    """A loss of the batch of all ranks."""
    keywords = {"group": True, "group_mode": mode}
    if name == "clip":
        return ssl.clip_loss(x, y, scale, normalize=True, **keywords)
    if name == "siglip":
        return ssl.siglip_loss(x, y, scale, -scale.detach(), normalize=True, **keywords)
    if name == "sup_con":
        return ssl.sup_con_loss(
            x, torch.arange(len(x), device=x.device) % 100, 1 / scale, **keywords
        )
    if name == "info_nce":
        return ssl.info_nce_loss(x, y, None, 1 / scale, **keywords)
    function = ssl.nt_xent_loss if name == "nt_xent" else ssl.dcl_loss
    return function(x, y, 1 / scale, **keywords)


def step(name: str, leaves: list[Tensor], mode: str) -> tuple[float, list[Tensor]]:
    """Seconds, and loss and gradients."""
    on_gpu = leaves[0].is_cuda
    dist.barrier()
    if on_gpu:
        torch.cuda.synchronize()
    started = time.perf_counter()
    value = call(name, *leaves, mode)
    gradients = torch.autograd.grad(value, leaves, allow_unused=True)
    if on_gpu:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    return seconds, [value.detach(), *(g for g in gradients if g is not None)]


def worker(rank: int, folder: str, args: argparse.Namespace) -> None:
    """One rank."""
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(args.threads)
    device = torch.device("cpu")
    if args.device == "cuda":
        device = torch.device("cuda", rank)
        torch.cuda.set_device(device)
    transport = "nccl" if args.device == "cuda" else "gloo"
    dist.init_process_group(transport, f"file://{folder}/store", rank=rank, world_size=args.ranks)
    generator = torch.Generator().manual_seed(rank)
    x = torch.randn(args.rows, args.dim, generator=generator)
    y = x + torch.randn(args.rows, args.dim, generator=generator)
    leaves = [t.to(device).requires_grad_() for t in (x, y, torch.tensor(10.0))]
    if rank == 0:
        print(
            f"{args.ranks} ranks, {args.rows} rows each, D = {args.dim}, {args.threads} threads each"
        )
        print(f"{'loss':<10}{'mode':<8}{'median ms':>10}{'least':>8}{'most':>8}{'ring/gather':>13}")
    for name in args.losses:
        results = [step(name, leaves, mode)[1] for mode in MODES]  # warm, too
        torch.testing.assert_close(*results, rtol=1e-3, atol=1e-5)
        times: dict[str, list[float]] = {mode: [] for mode in MODES}
        for _ in range(args.rounds):
            for mode in MODES:
                seconds = torch.tensor(step(name, leaves, mode)[0], dtype=torch.float64).to(device)
                dist.all_reduce(seconds, dist.ReduceOp.MAX)
                times[mode].append(1e3 * seconds.item())
        if rank == 0:
            middle = {mode: sorted(found)[len(found) // 2] for mode, found in times.items()}
            for mode, found in times.items():
                ratio = f"{middle['ring'] / middle['gather']:.2f}" if mode == "ring" else ""
                print(
                    f"{name:<10}{mode:<8}{middle[mode]:>10.1f}{min(found):>8.1f}{max(found):>8.1f}"
                    f"{ratio:>13}",
                    flush=True,
                )
    dist.destroy_process_group()


def main(arguments: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.distributed",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rows", type=int, default=4096, help="of each rank")
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--losses", nargs="+", choices=LOSSES, default=list(LOSSES))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, help="of each rank; default: cores / ranks")
    args = parser.parse_args(arguments)
    if args.threads is None:
        args.threads = max(1, (os.cpu_count() or 1) // args.ranks)
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(worker, (str(Path(folder)), args), nprocs=args.ranks)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
