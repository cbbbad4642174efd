# SPDX-License-Identifier: Apache-2.0
"""SimCLR in several processes under DDP, with negatives from all of them.

    torchrun --nproc-per-node 2 examples/ddp_simclr.py

With ``group=True`` the loss is that of the joined batch. What to expect: the same loss on every rank,
equal to that of one process with the whole batch, and parameter gradients that differ from its
gradients by rounding (about 1e-6).
"""

import argparse
import os

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import sslkernels


def make_network() -> nn.Module:
    """The same on each rank: LayerNorm, since BatchNorm would see its own share only."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 128), nn.LayerNorm(128), nn.ReLU(), nn.Linear(128, 32))


def main() -> None:
    """Train some steps; rank 0 repeats each one alone."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=512, help="of all processes together")
    args = parser.parse_args()
    if "LOCAL_RANK" not in os.environ:
        raise SystemExit("start it with: torchrun --nproc-per-node 2 examples/ddp_simclr.py")
    cuda = torch.cuda.is_available()
    dist.init_process_group("nccl" if cuda else "gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")

    network, alone = make_network().to(device), make_network().to(device)
    ddp = DistributedDataParallel(network)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (network, alone)]
    data = torch.Generator().manual_seed(1)
    for step in range(args.steps):
        views = torch.rand(2, args.batch_size, 64, generator=data)  # every rank knows all of it
        views[1] = views[0] + 0.1 * torch.randn(views[0].shape, generator=data)
        views = views.to(device)
        own = views[:, rank::world].flatten(0, 1)
        for optimizer in optimizers:
            optimizer.zero_grad()

        z1, z2 = ddp(own).chunk(2)  # one forward pass for both views
        loss = sslkernels.nt_xent_loss(z1, z2, temperature=0.2, group=True)
        loss.backward()

        whole = sslkernels.nt_xent_loss(alone(views[0]), alone(views[1]), temperature=0.2)
        whole.backward()
        gradients = [
            torch.cat([p.grad.flatten() for p in m.parameters()]) for m in (network, alone)
        ]
        difference = (gradients[0] - gradients[1]).norm() / gradients[1].norm()
        for optimizer in optimizers:
            optimizer.step()
        if rank == 0:
            print(
                f"step {step}: loss {loss.item():.6f} in {world} processes, {whole.item():.6f} in one, "
                f"gradients differ by {difference.item():.1e}"
            )
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
