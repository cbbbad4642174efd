# SPDX-License-Identifier: Apache-2.0
"""A training step under ``torch.compile(fullgraph=True)``: network, loss and temperature in one graph.

    python examples/torch_compile.py
    python examples/torch_compile.py --backend aot_eager      # without a C++ compiler

What to expect: the same loss and gradients as without the compiler, to rounding. The losses are custom
ops, so the compiler fuses what is around them and leaves the kernels as they are. The first call
compiles (some ten seconds).
"""

import argparse
import time

import torch
from torch import Tensor, nn

import sslkernels


class SimCLR(nn.Module):
    """Views to loss, with a learnt temperature."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 128))
        self.log_temperature = nn.Parameter(torch.tensor(-2.0))

    def forward(self, view_1: Tensor, view_2: Tensor) -> Tensor:
        """The loss of a batch."""
        z1, z2 = self.network(view_1), self.network(view_2)
        return sslkernels.nt_xent_loss(z1, z2, self.log_temperature.exp())


def step(model: nn.Module, views: Tensor) -> tuple[float, list[Tensor], float]:
    """Loss, gradients and seconds of a step."""
    model.zero_grad()
    begin = time.perf_counter()
    loss = model(*views)
    loss.backward()
    seconds = time.perf_counter() - begin
    return loss.item(), [p.grad.clone() for p in model.parameters()], seconds


def main() -> None:
    """The same step, eager and compiled."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--backend", default="inductor")
    args = parser.parse_args()
    torch.manual_seed(0)
    model, views = SimCLR(), torch.rand(2, args.rows, 64)
    compiled = torch.compile(model, fullgraph=True, backend=args.backend)

    *_, first = step(compiled, views)
    results = {}
    for name, run in (("eager", model), ("compiled", compiled)):
        runs = [step(run, views) for _ in range(args.steps)]
        results[name] = runs[-1]
        print(f"{name}: loss {runs[-1][0]:.6f}, {min(r[2] for r in runs) * 1e3:.2f} ms at best")
    print(f"first compiled call: {first:.1f} s")
    pairs = zip(results["eager"][1], results["compiled"][1], strict=True)
    worst = max(((a - b).norm() / a.norm()).item() for a, b in pairs)
    print(f"gradients differ by at most {worst:.1e} of their norm")


if __name__ == "__main__":
    main()
