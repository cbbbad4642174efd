# SPDX-License-Identifier: Apache-2.0
"""What is measured: inputs of every op, the float64 truth, and the work that counts.

Sizes mean, per op: nt_xent, info_nce, clip, siglip, sup_con, triplet: N (rows in all for nt_xent,
sup_con and triplet, pairs for info_nce, clip and siglip); moco and enqueue: K, the rows of the
queue, with ``batch`` queries or keys; ema: the number of tensors, 161 for the parameters of
ResNet-50, otherwise tensors of 64 elements; losses of autoencoders and adversaries: see generative.py.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import generative
from benchmarks.cuda_bytes import resnet50_sizes
from sslkernels import reference

TEMPERATURE = 0.1
DECAY = 0.99
LOGIT_SCALE, LOGIT_BIAS = 10.0, -10.0
LOSSES = ("nt_xent", "moco", "info_nce", "clip", "siglip", "sup_con", "triplet")
OPS = (*LOSSES, *generative.OPS, "enqueue", "ema")
TRUTH_BLOCK = 1024  # rows of the similarity matrix that the truth holds at a time


@dataclass(frozen=True)
class Case:
    """One op at one shape."""

    op: str
    size: int
    dim: int = 128
    batch: int = 256
    dtype: str = "float32"
    device: str = "cpu"
    temperature: float = TEMPERATURE  # of the losses that have one

    def __post_init__(self) -> None:
        if self.op not in OPS:
            raise ValueError(f"benchmarks: op must be one of {OPS}, got {self.op!r}")
        if min(self.size, self.dim, self.batch) < 1:
            raise ValueError(f"benchmarks: sizes must be at least 1, got {asdict(self)}")
        if self.op == "nt_xent" and self.size % 2:
            raise ValueError(f"benchmarks: nt_xent needs an even number of rows, got {self.size}")

    @property
    def mode(self) -> str:
        return "update" if self.op in ("enqueue", "ema") else "forward+backward"

    @property
    def shape(self) -> str:
        if self.op in ("moco", "enqueue"):
            return f"n={self.batch} K={self.size} D={self.dim}" + self._cold
        if self.op == "ema":
            return f"tensors={self.size} elements={sum(self.tensor_sizes())}"
        return f"N={self.size} D={self.dim}" + self._cold

    @property
    def _cold(self) -> str:
        return "" if self.temperature == TEMPERATURE else f" T={self.temperature:g}"

    @property
    def flops(self) -> float | None:
        """Floating-point operations that count; None where time alone is meaningful.

        What an exact method in O(N D) memory does: S twice and a product for each gradient, 8 N^2 D
        for info_nce, clip and siglip; half of it where S is symmetric (nt_xent, sup_con); one triangle
        of S, once, for triplet, whose gradient needs two rows a row; one pass over a queue without
        gradient, 4 n K D.
        """
        if self.op in ("nt_xent", "sup_con"):
            return 4.0 * self.size**2 * self.dim
        if self.op == "moco":
            return 4.0 * self.batch * self.size * self.dim
        if self.op in ("info_nce", "clip", "siglip"):
            return 8.0 * self.size**2 * self.dim
        if self.op == "triplet":
            return 1.0 * self.size**2 * self.dim
        return None

    @property
    def bytes_moved(self) -> float | None:
        """12 bytes an element for EMA: read target and source, write target (float32)."""
        if self.op in generative.OPS:
            return generative.bytes_moved(self)
        return 12.0 * sum(self.tensor_sizes()) if self.op == "ema" else None

    def tensor_sizes(self) -> list[int]:
        return resnet50_sizes() if self.size == 161 else [64] * self.size

    def at(self, **changes: Any) -> Case:
        return replace(self, **changes)

    def inputs(self) -> dict[str, Any]:
        """The same tensors for every contender; leaves that need a gradient require it."""
        if self.op in generative.OPS:
            return generative.inputs(self)
        dtype: torch.dtype = getattr(torch, self.dtype)
        generator = torch.Generator().manual_seed(0)

        def rows(n: int) -> Tensor:
            x = torch.randn(n, self.dim, generator=generator)
            return x.to(self.device, dtype)

        def views(n: int) -> tuple[Tensor, Tensor]:
            # At a low temperature only views that hardly agree have a loss above 0.
            noise = 0.5 if self.temperature == TEMPERATURE else 3.0
            a = rows(n)
            return a.requires_grad_(), (a.detach() + noise * rows(n)).requires_grad_()

        if self.op == "nt_xent":
            z1, z2 = views(self.size // 2)
            return {"leaves": [z1, z2]}
        if self.op == "moco":
            query, key = views(self.batch)
            queue = F.normalize(rows(self.size), dim=1)
            return {"leaves": [query], "key": key.detach(), "queue": queue}
        if self.op == "info_nce":
            return {"leaves": list(views(self.size))}
        if self.op in ("clip", "siglip"):
            a, b = views(self.size)
            return {"leaves": [F.normalize(x.detach(), dim=1).requires_grad_() for x in (a, b)]}
        if self.op in ("sup_con", "triplet"):
            labels = (torch.arange(self.size) % max(2, self.size // 8)).to(self.device)
            return {"leaves": [rows(self.size).requires_grad_()], "labels": labels}
        if self.op == "enqueue":
            return {"keys": rows(self.batch)}
        sizes = self.tensor_sizes()
        target, source = (
            [torch.randn(n, generator=generator).to(self.device, dtype) for n in sizes]
            for _ in range(2)
        )
        return {"targets": target, "sources": source}

    def truth(self) -> list[Tensor]:
        """Float64 results: [loss, gradients of the leaves...], or the tensors after one update."""
        if self.op in generative.OPS:
            return generative.truth(self)
        x = self.inputs()
        if self.op == "enqueue":
            return [F.normalize(x["keys"].double(), dim=1)]
        if self.op == "ema":
            pairs = zip(x["targets"], x["sources"], strict=True)
            return [DECAY * t.double() + (1 - DECAY) * s.double() for t, s in pairs]
        leaves = [leaf.detach().double().requires_grad_() for leaf in x["leaves"]]
        if self.op == "nt_xent":
            loss = _nt_xent_truth(torch.cat(leaves), self.temperature)
            return [loss.detach(), *torch.autograd.grad(loss, leaves)]
        if self.op == "moco":
            loss = reference.info_nce_loss(
                leaves[0], x["key"].double(), x["queue"].double(), self.temperature
            )
        elif self.op == "info_nce":
            loss = reference.info_nce_loss(*leaves, temperature=self.temperature)
        elif self.op == "clip":
            loss = reference.clip_loss(*leaves, LOGIT_SCALE)
        elif self.op == "siglip":
            loss = reference.siglip_loss(*leaves, LOGIT_SCALE, LOGIT_BIAS)
        elif self.op == "sup_con":
            loss = reference.sup_con_loss(leaves[0], x["labels"], self.temperature)
        else:
            loss = reference.triplet_loss(leaves[0], x["labels"], normalize=True)
        return [loss.detach(), *torch.autograd.grad(loss, leaves)]


class _RowBlocks(torch.autograd.Function):
    """NT-Xent of unit rows; both directions of the derivative are computed block by block.

    The reference would need several N x N matrices of float64: 8 GB each at N = 32768.
    """

    @staticmethod
    def forward(ctx: Any, unit: Tensor, temperature: float) -> Tensor:
        n = len(unit)
        gradient = torch.zeros_like(unit)
        total = unit.new_zeros(())
        for start in range(0, n, TRUTH_BLOCK):
            rows = torch.arange(start, min(start + TRUTH_BLOCK, n), device=unit.device)
            here = torch.arange(len(rows), device=unit.device)
            logits = unit[rows] @ unit.T / temperature
            logits[here, rows] = float("-inf")
            positive = (rows + n // 2) % n
            log_p = logits.log_softmax(1)
            total -= log_p[here, positive].sum()
            g = log_p.exp_()
            g[here, positive] -= 1
            gradient[rows] += g @ unit
            gradient += g.T @ unit[rows]
        ctx.save_for_backward(gradient / (n * temperature))
        return total / n

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] * ctx.saved_tensors[0], None


def _nt_xent_truth(z: Tensor, temperature: float) -> Tensor:
    return _RowBlocks.apply(F.normalize(z, dim=1), temperature)
