# SPDX-License-Identifier: Apache-2.0
"""The losses part of `make gpu-check`: what is measured, who takes part, and the rows of the report."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import sslkernels
from benchmarks import gpu_model, gpu_times, measure
from benchmarks.cases import LOGIT_SCALE, Case
from benchmarks.contenders import CONTENDERS, OURS

NOTHING = "no GPU: nothing measured"
GIB = 1 << 30
# (op, rows or queue size, D), in bfloat16 and float32.
SHAPES = [
    ("nt_xent", 256, 128), ("nt_xent", 512, 128), ("nt_xent", 1024, 128), ("nt_xent", 2048, 128),
    ("nt_xent", 4096, 128), ("nt_xent", 8192, 128), ("nt_xent", 16384, 128), ("nt_xent", 65536, 128),
    ("nt_xent", 262144, 128), ("nt_xent", 8192, 64), ("nt_xent", 8192, 256), ("nt_xent", 8192, 512),
    ("nt_xent", 8192, 1024), ("nt_xent", 65536, 256), ("moco", 4096, 128), ("moco", 65536, 128),
    ("moco", 65536, 256), ("info_nce", 8192, 128), ("clip", 1024, 512), ("clip", 4096, 512),
    ("clip", 32768, 512), ("clip", 262144, 1024), ("siglip", 4096, 768), ("siglip", 32768, 768),
    ("sup_con", 8192, 128), ("triplet", 4096, 256), ("vae", 8192, 784), ("reparameterize", 16384, 128),
    ("features", 16, 128),
]  # fmt: skip
HALVES = [
    ("nt_xent", 256, 128),
    ("nt_xent", 8192, 128),
    ("nt_xent", 8192, 512),
    ("moco", 65536, 128),
    ("clip", 4096, 512),
    ("siglip", 4096, 768),
]
# Where one exponential a pair is no longer enough, and shifts are needed.
COLD = 0.01
COLD_SHAPES = [("nt_xent", 8192, 128), ("moco", 65536, 128)]
QUICK = [
    ("nt_xent", 512, 128),
    ("nt_xent", 4096, 128),
    ("nt_xent", 65536, 128),
    ("moco", 65536, 128),
    ("clip", 32768, 512),
    ("features", 16, 128),
]
TINY = [
    ("nt_xent", 64, 32),
    ("moco", 96, 32),
    ("clip", 48, 32),
    ("siglip", 48, 32),
    ("vae", 4, 20),
    ("reparameterize", 5, 32),
    ("features", 2, 1),
]
# float32 products run at a fifteenth of the bfloat16 rate: larger shapes would take minutes a call.
FLOAT32_FLOPS = 1e14
PROVIDERS = (
    OURS,
    "sslkernels bf16",
    "sslkernels tf32x3",
    "sslkernels bf16x3",
    "chunked",
    "eager",
    "torch.compile",
    "F.linear_cross_entropy",
    "lightly",
    "MoCo [D, K]",
    "info-nce-pytorch",
    "inf_cl",
    "memeff",
    "siglip-kernel",
)
# Those that hold the N x N matrix, and those that are ours with other products of float32.
DENSE = ("eager", "torch.compile", "lightly", "MoCo [D, K]", "info-nce-pytorch")
PRODUCTS = ("sslkernels bf16", "sslkernels tf32x3", "sslkernels bf16x3")
HEAD = (
    "op",
    "shape",
    "dtype",
    "provider",
    "ms (p25, p50, p75)",
    "host ms",
    "graph ms",
    "kernels: ms",
    "model ms",
    "extra MiB",
    "% of tensor peak",
    "error",
)
LEGEND = f"""\
Contenders take turns in one run, with the L2 cache flushed before each call; the error is the largest of
loss and gradients, by norm, against float64. Of two numbers with a plus the first is the forward and the
second the backward pass.

* ms: from the first launch to the end on the device, the host included where it is the slower one.
* host ms: until the calls have returned, on a device that had nothing to do.
* graph ms: the device alone, replaying a CUDA graph.
* kernels: how many ran on the device in a step, and the sum of their times, by the profiler.
* model ms: what `benchmarks/gpu_model.py` gives the launches in bfloat16 on an H100 at
  {gpu_model.CLOCK / 1e9:.2f} GHz, in a graph: to be compared with "graph ms", and corrected if it is off.
* % of tensor peak: FLOPs that count, in the time of the first column, over those of a large matrix product
  in the same run."""


class DeviceCase(Case):
    """A case whose truth fits into memory at any size: float64 in blocks, not N x N matrices."""

    def truth(self) -> list[Tensor]:
        if self.op not in ("clip", "siglip", "moco", "info_nce", "sup_con"):
            return super().truth()
        x = self.inputs()
        leaves = [leaf.detach().double().requires_grad_() for leaf in x["leaves"]]
        with sslkernels.backend("chunked"):
            if self.op == "clip":
                loss = sslkernels.clip_loss(*leaves, LOGIT_SCALE)
            elif self.op == "siglip":
                loss = sslkernels.siglip_loss(*leaves, LOGIT_SCALE, -10.0)
            elif self.op == "sup_con":
                loss = sslkernels.sup_con_loss(leaves[0], x["labels"], self.temperature)
            elif self.op == "info_nce":
                loss = sslkernels.info_nce_loss(*leaves, temperature=self.temperature)
            else:
                loss = sslkernels.info_nce_loss(
                    leaves[0], x["key"].double(), x["queue"].double(), self.temperature
                )
        return [loss.detach(), *torch.autograd.grad(loss, leaves)]


def cases(on_gpu: bool, quick: bool) -> Iterator[DeviceCase]:
    """What is measured, in the order of the report."""
    if not on_gpu:
        for op, size, dim in TINY:
            yield DeviceCase(op, size, dim, 32, "float32", "cpu")
        return
    for op, size, dim in QUICK if quick else SHAPES:
        for dtype in ("bfloat16", "float32"):
            yield DeviceCase(op, size, dim, 256, dtype, "cuda")
    if quick:
        return
    for op, size, dim in HALVES:
        yield DeviceCase(op, size, dim, 256, "float16", "cuda")
    for op, size, dim in COLD_SHAPES:
        for dtype in ("bfloat16", "float16", "float32"):
            yield DeviceCase(op, size, dim, 256, dtype, "cuda", COLD)


def who(case: Case, on_gpu: bool) -> tuple[list[str], list[str]]:
    """Who can run this case in the memory there is, and why the others can not."""
    names, notes = [], []
    rows = case.batch if case.op == "moco" else case.size
    # Eager holds several N x N matrices of float32 at once; six is what NT-Xent's graph peaks at.
    needed = 6 * 4 * rows * case.size
    free = torch.cuda.mem_get_info()[0] if on_gpu else 4 * GIB
    for name in PROVIDERS:
        if name not in CONTENDERS[case.op] or (name in PRODUCTS and case.dtype != "float32"):
            continue
        if name in DENSE and needed > 0.9 * free:
            notes.append(f"{name}: needs about {needed / GIB:.0f} GiB")
        elif name == "torch.compile" and not on_gpu:
            notes.append(f"{name}: {NOTHING}")
        else:
            names.append(name)
    return names, notes


def matmul_peak(dtype: str, on_gpu: bool) -> float:
    """FLOP/s of a large matrix product: the ceiling that percentages refer to."""
    n = 8192 if on_gpu else 64
    a = torch.randn(n, n, device="cuda" if on_gpu else "cpu").to(getattr(torch, dtype))
    timer = measure._timer("cuda" if on_gpu else "cpu")
    timer(lambda: a @ a, 3)
    return 2.0 * n**3 / min(timer(lambda: a @ a, 3) for _ in range(5))


class Losses:
    """Measures case after case, and remembers which kernels ours took.

    Args:
        say: Takes a line of the report.
        on_gpu: Whether there is something to measure; else results are verified only.
    """

    def __init__(self, say: Callable[[str], None], on_gpu: bool) -> None:
        self.say, self.on_gpu = say, on_gpu
        self.peaks: dict[str, float] = {}
        self.kernels: list[tuple[str, gpu_times.Kernels, list[gpu_model.Estimate]]] = []

    def row(self, case: Case, provider: str, *cells: str) -> None:
        filled = [case.op, case.shape, case.dtype, provider, *cells]
        self.say("| " + " | ".join(filled + [""] * (len(HEAD) - len(filled))) + " |")

    def run(self, case: DeviceCase) -> None:
        """One case."""
        if case.dtype == "float32" and self.on_gpu and (case.flops or 0.0) > FLOAT32_FLOPS:
            self.row(case, "left out: minutes a call")
            return
        if case.dtype not in self.peaks:
            torch.backends.cuda.matmul.allow_tf32 = False
            self.peaks[case.dtype] = matmul_peak(case.dtype, self.on_gpu)
        names, notes = who(case, self.on_gpu)
        records = self._times(case, names, notes)
        times = {r["provider"]: r["values"] for r in records if r["metric"] == "time"}
        for record in records:
            name = record["provider"]
            if record["metric"] in ("missing", "wrong", "failed"):
                notes.append(f"{name}: {record['note']}")
            elif record["metric"] == "error" and self.on_gpu:
                cells, found = self._measured(case, name, times[name])
                self.row(case, name, *cells, f"{record['values'][0]:.1e}")
                notes += [f"{name}: {note}" for note in found]
            elif record["metric"] == "error":
                cells = [NOTHING] + [""] * (len(HEAD) - 6)
                self.row(case, name, *cells, f"{record['values'][0]:.1e}")
        for note in notes:
            self.row(case, note)
        gc.collect()
        if self.on_gpu:
            torch.cuda.empty_cache()

    def _times(self, case: Case, names: list[str], notes: list[str]) -> list[measure.Record]:
        """Records of those that the memory holds."""
        while names:
            try:
                rounds = None if self.on_gpu else 0
                return measure.measure_times(case, names, 2.0, rounds)
            except torch.cuda.OutOfMemoryError:
                # Not known whose memory it was: first without those that hold the matrix, then singly.
                dense = [name for name in names if name in DENSE]
                left = dense or names[-1:]
                notes += [f"{name}: out of memory" for name in left]
                names = [name for name in names if name not in left]
            gc.collect()
            torch.cuda.empty_cache()
        return []

    def _measured(self, case: Case, name: str, seconds: list[float]) -> tuple[list[str], list[str]]:
        """Cells from the times to the share of the peak, and notes."""
        extra = measure.measure_memory(case, name)[0]
        contender = measure.make(name, case)
        contender.step()
        split = gpu_times.split(contender, measure._timer(case.device), torch.cuda.synchronize)
        notes = list(split.notes)
        model = ""
        if name == OURS and case.dtype == "bfloat16":
            model, note = self._model(case, split.kernels)
            notes += [note] if note else []
        peak = self.peaks[case.dtype]
        cells = [
            ", ".join(f"{1e3 * s:.3f}" for s in seconds),
            gpu_times.parts(split.host),
            gpu_times.parts(split.graph),
            f"{split.kernels.launches}: {1e3 * split.kernels.seconds:.3f}"
            if split.kernels.times
            else "",
            model,
            f"{extra['values'][0] / 2**20:.1f}" if "values" in extra else "",
            "" if case.flops is None else f"{100 * case.flops / seconds[1] / peak:.0f}",
        ]
        return cells, notes

    def _model(self, case: Case, kernels: gpu_times.Kernels) -> tuple[str, str]:
        """What the model gives both passes, empty where it has no opinion; and a note."""
        try:
            passes = gpu_model.expected(case.op, case.size, case.dim, case.batch)
        except Exception as error:  # it compiles for sm_90, which this machine's tools may not
            return "", f"model: {type(error).__name__}: {error}"[:200]
        if passes is None:
            return "", ""
        self.kernels.append((f"{case.op} {case.shape}", kernels, passes[0] + passes[1]))
        return " + ".join(f"{1e3 * gpu_model.seconds(found):.3f}" for found in passes), ""


def kernel_table(
    seen: list[tuple[str, gpu_times.Kernels, list[gpu_model.Estimate]]],
) -> list[str]:
    """Markdown: each kernel of a step, measured and by the model."""
    lines = [
        "| case | kernel | launches | of the model | µs | µs of the model | measured / model |",
        "|---|---|" + "---:|" * 5,
    ]
    for case, kernels, model in seen:
        by_name: dict[str, list[float]] = {}
        for launched in model:
            by_name.setdefault(launched.name, []).append(launched.seconds)
        for name in [*by_name, *(n for n in kernels.times if n not in by_name)]:
            times, expected = kernels.times.get(name, []), by_name.get(name, [])
            ratio = f"{sum(times) / sum(expected):.2f}" if times and expected else ""
            cells: list[Any] = [case, name[:60].replace("|", "/"), len(times), len(expected)]
            cells += [f"{1e6 * sum(x):.2f}" if x else "" for x in (times, expected)]
            lines.append("| " + " | ".join(str(cell) for cell in [*cells, ratio]) + " |")
    return lines
