# SPDX-License-Identifier: Apache-2.0
"""pytorch-metric-learning with and without ``sslkernels.patch``: the same numbers, less memory.

    python examples/metric_learning.py

What to expect: losses and gradients that agree to rounding. NTXentLoss of the library holds a matrix of
positive times negative pairs: hundreds of megabytes at 192 rows, tens of gigabytes at 512 (careful),
against a few.
"""

import argparse
import resource
import time

import torch

import sslkernels

try:
    from pytorch_metric_learning import losses, miners
except ModuleNotFoundError as missing:
    raise SystemExit(
        f"metric_learning.py needs {missing.name}: pip install pytorch-metric-learning"
    ) from None


def peak_mib() -> float:
    """The most memory that this process has held (Linux counts KiB)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def evaluate(name: str, z: torch.Tensor, labels: torch.Tensor) -> tuple[float, torch.Tensor]:
    """Loss and gradient, as a user of the library writes it; prints time and memory."""
    if name == "NTXentLoss":
        criterion, mined = losses.NTXentLoss(temperature=0.1), None
    elif name == "SupConLoss":
        criterion, mined = losses.SupConLoss(temperature=0.1), None
    else:
        criterion, mined = losses.TripletMarginLoss(margin=0.2), miners.BatchHardMiner()
    leaf = z.clone().requires_grad_()
    before, begin = peak_mib(), time.perf_counter()
    triplets = mined(leaf, labels) if mined is not None else None
    loss = criterion(leaf, labels, triplets)
    loss.backward()
    seconds = time.perf_counter() - begin
    print(f"    {type(criterion).__module__.split('.')[0]}: loss {loss.item():.6f}, ", end="")
    print(f"{seconds * 1e3:.1f} ms, peak of the process + {peak_mib() - before:.0f} MiB")
    assert leaf.grad is not None
    return loss.item(), leaf.grad


def main() -> None:
    """Each loss patched first, so that its peak is seen, then the original."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=192)
    parser.add_argument("--classes", type=int, default=32)
    args = parser.parse_args()

    torch.manual_seed(0)
    labels = torch.arange(args.rows) % args.classes
    z = torch.nn.functional.normalize(torch.randn(args.rows, 64) + torch.eye(64)[labels % 64])
    for name in ("TripletMarginLoss", "SupConLoss", "NTXentLoss"):
        print(f"{name}, {args.rows} rows of {args.classes} classes")
        with sslkernels.patch("pytorch_metric_learning"):
            ours, our_gradient = evaluate(name, z, labels)
        theirs, gradient = evaluate(name, z, labels)
        difference = ((our_gradient - gradient).norm() / gradient.norm()).item()
        print(
            f"    loss differs by {abs(ours - theirs):.1e}, gradient by {difference:.1e} of its norm"
        )


if __name__ == "__main__":
    main()
