# SPDX-License-Identifier: Apache-2.0
"""MoCo written with lightly's classes, before and after ``sslkernels.patch("lightly")``.

    python examples/moco_lightly.py

The function `train` is what a user of lightly writes, and does not change. What to expect: nearly the
same losses in both runs (they draw the same numbers; the patched bank does not drop the tail of a batch
at its end), and less time a step with the patch, since lightly copies its whole bank at each step.
"""

import argparse
import copy
import time

import torch
from torch import nn

import sslkernels

try:
    from lightly import loss as lightly_loss
    from lightly.models.utils import deactivate_requires_grad
    from sklearn.datasets import load_digits
except ModuleNotFoundError as missing:
    raise SystemExit(
        f"moco_lightly.py needs {missing.name}: pip install lightly scikit-learn"
    ) from None


def train(images: torch.Tensor, steps: int, bank: int) -> tuple[list[float], float]:
    """Losses of each step and seconds a step."""
    from lightly.models.utils import update_momentum  # looked up now: patched or not

    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 128))
    momentum = copy.deepcopy(backbone)
    deactivate_requires_grad(momentum)
    criterion = lightly_loss.NTXentLoss(temperature=0.1, memory_bank_size=(bank, 128))
    optimizer = torch.optim.SGD(backbone.parameters(), lr=0.06, momentum=0.9)

    losses, begin = [], time.perf_counter()
    for _ in range(steps):
        batch = images[torch.randint(len(images), (256,))]
        view_1, view_2 = (batch + 0.2 * torch.randn_like(batch) for _ in range(2))
        update_momentum(backbone, momentum, m=0.99)
        query = backbone(view_1)
        with torch.no_grad():
            key = momentum(view_2)
        loss = criterion(query, key)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, (time.perf_counter() - begin) / steps


def main() -> None:
    """Train twice and compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--bank", type=int, default=16384)
    args = parser.parse_args()
    images = torch.tensor(load_digits().data, dtype=torch.float32) / 16

    plain, plain_s = train(images, args.steps, args.bank)
    with sslkernels.patch("lightly"):  # or without `with`, for the rest of the process
        patched, patched_s = train(images, args.steps, args.bank)

    for step in sorted({0, args.steps // 2, args.steps - 1}):
        print(f"step {step}: loss {plain[step]:.4f} with lightly, {patched[step]:.4f} patched")
    print(f"{plain_s * 1e3:.1f} ms a step with lightly, {patched_s * 1e3:.1f} ms patched")


if __name__ == "__main__":
    main()
