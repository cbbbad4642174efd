# SPDX-License-Identifier: Apache-2.0
"""`make gpu-check`: test and measure the GPU backend, and write one report file.

On a machine with a GPU: the correctness suite on the device, torch.compile and CUDA graphs, the
benchmark against eager PyTorch, torch.compile and Inf-CL (if installed: ``pip install --no-deps
inf_cl==1.2.1``), EMA and queue.  Without one it runs all of its parts at tiny sizes in Triton's
interpreter and reports that nothing was measured.

    python -m benchmarks.gpu_check [--out FILE] [--quick] [--tune]
"""

from __future__ import annotations

import argparse
import datetime
import gc
import importlib
import os
import platform
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import sslkernels
from benchmarks import cuda_updates, gpu_model, measure
from benchmarks.cases import LOGIT_SCALE, Case
from benchmarks.contenders import CONTENDERS
from sslkernels.backends.triton import why_unavailable

ROOT = Path(__file__).parents[1]
NOTHING = "no GPU: nothing measured"
GIB = 1 << 30
# (op, rows or queue size, D): N = 1k to 256k, D = 64 to 1024.
SHAPES = [
    ("nt_xent", 1024, 128), ("nt_xent", 4096, 128), ("nt_xent", 16384, 128), ("nt_xent", 65536, 128),
    ("nt_xent", 262144, 128), ("nt_xent", 8192, 64), ("nt_xent", 8192, 256), ("nt_xent", 8192, 512),
    ("nt_xent", 8192, 1024), ("moco", 65536, 128), ("moco", 65536, 256), ("clip", 4096, 512),
    ("clip", 32768, 512), ("clip", 262144, 1024), ("siglip", 32768, 768), ("sup_con", 8192, 128),
    ("triplet", 4096, 256), ("vae", 8192, 784), ("reparameterize", 16384, 128), ("features", 16, 128),
]  # fmt: skip
# float32 products run at a fifteenth of the bfloat16 rate: larger shapes would take minutes a call.
FLOAT32_FLOPS = 1e14
QUICK = [
    ("nt_xent", 4096, 128),
    ("nt_xent", 65536, 128),
    ("moco", 65536, 128),
    ("clip", 32768, 512),
    ("features", 16, 128),
]
TINY = [
    ("nt_xent", 64, 32), ("moco", 96, 32), ("clip", 48, 32), ("siglip", 48, 32), ("vae", 4, 20),
    ("reparameterize", 5, 32), ("features", 2, 1),
]  # fmt: skip
PROVIDERS = ("sslkernels", "eager", "torch.compile", "inf_cl")
DENSE = ("eager", "torch.compile")  # hold the N x N matrix


class Report:
    """Markdown lines, printed as they come and written to a file at the end."""

    def __init__(self, path: Path) -> None:
        self.path, self.lines, self.failures = path, [], 0

    def say(self, *lines: str) -> None:
        for line in lines or ("",):
            print(line, flush=True)
            self.lines.append(line)

    def section(self, title: str, part: Callable[[], None]) -> None:
        """Run one part; a failure is reported and does not stop the others."""
        self.say("", f"## {title}", "")
        try:
            part()
        except Exception as error:
            self.failures += 1
            self.say(f"**FAILED**: {type(error).__name__}: {error}")
            self.say("```", *traceback.format_exc().splitlines()[-8:], "```")

    def write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text("\n".join(self.lines) + "\n", encoding="utf-8")


def environment(report: Report, on_gpu: bool) -> None:
    report.say(f"- date: {datetime.datetime.now(datetime.timezone.utc):%Y-%m-%d %H:%M} UTC")
    report.say(f"- commit: {cuda_updates.git_sha()}", f"- machine: {platform.platform()}")
    if on_gpu:
        properties = torch.cuda.get_device_properties(0)
        report.say(
            f"- device: {properties.name}, {properties.multi_processor_count} multiprocessors, "
            f"{properties.total_memory / GIB:.0f} GiB, CUDA {torch.version.cuda}, HIP {torch.version.hip}"
        )
    else:
        report.say(f"- device: none. **{NOTHING}**")
    report.say("```", *str(sslkernels.info()).splitlines(), "```")


def correctness(report: Report, on_gpu: bool, quick: bool) -> None:
    """The kernel tests on the device (here: a part of them in the interpreter)."""
    names = (
        [
            "test_engine.py",
            "test_branches.py",
            "test_updates.py",
            "test_losses.py",
            "test_autoencoders.py",
        ]
        if on_gpu
        else ["test_losses.py"]
    )
    chosen = ["-k", "nt_xent"] if quick and not on_gpu else []
    environment = dict(os.environ)
    if on_gpu:
        environment["SSLKERNELS_TEST_DEVICE"] = "cuda"
        environment["CUBLAS_WORKSPACE_CONFIG"] = (
            ":4096:8"  # the reference runs deterministically too
        )
    files = [str(ROOT / "tests" / "triton_interpreter" / name) for name in names]
    if on_gpu:
        files.append(str(ROOT / "tests" / "test_cuda_device.py"))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *chosen, *files]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    report.say("```", *done.stdout.strip().splitlines()[-25:], "```")
    if done.returncode:
        raise RuntimeError(f"pytest ended with status {done.returncode}")


def _step(z: Tensor) -> Tensor:
    return sslkernels.nt_xent_loss(z[::2], z[1::2], 0.1)


def _elements(x: Tensor) -> Tensor:
    """What autoencoders take: noise, the variational loss, feature maps."""
    z = sslkernels.reparameterize(x, x, 7)
    maps = sslkernels.feature_reconstruction_loss([x, z], [z.detach(), x.detach()])
    return maps + sslkernels.vae_loss(z, (x > 0).to(x.dtype), x, x)


def compile_and_graphs(report: Report, on_gpu: bool) -> None:
    """torch.compile(fullgraph=True) and, on a GPU, capture and replay in a CUDA graph."""
    device = "cuda" if on_gpu else "cpu"
    n, dim = (512, 128) if on_gpu else (48, 16)
    z = torch.randn(n, dim, device=device)

    def gradient(call: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        leaf = z.clone().requires_grad_()
        loss = call(leaf)
        return loss.detach(), torch.autograd.grad(loss, leaf)[0]

    def whole(x: Tensor) -> Tensor:
        return _step(x) + _elements(x)

    plain = gradient(whole)
    backend = "inductor" if on_gpu else "aot_eager"
    compiled = gradient(torch.compile(whole, fullgraph=True, backend=backend))
    for ours, want in zip(compiled, plain, strict=True):
        torch.testing.assert_close(ours, want)
    report.say(f"- torch.compile(fullgraph=True, backend={backend!r}): same loss and gradient")
    if not on_gpu:
        report.say(f"- CUDA graph: {NOTHING}")
        return
    queue = sslkernels.KeyQueue(4096, dim).cuda()
    queue.enqueue(torch.randn(4096, dim, device=device))
    target, source = [torch.zeros(1000, device=device)], [torch.ones(1000, device=device)]
    sslkernels.ema_update_(target, source, 0.99)  # makes the plan, outside of the capture
    leaf = z.clone().requires_grad_()

    def everything() -> tuple[Tensor, Tensor, Tensor]:
        loss = whole(leaf) + sslkernels.info_nce_loss(leaf, leaf.detach(), queue.keys, 0.1)
        gradient = torch.autograd.grad(loss, leaf)[0]
        queue.enqueue(leaf.detach())
        sslkernels.ema_update_(target, source, 0.99)
        return loss.detach(), gradient, queue.queue

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            everything()
    torch.cuda.current_stream().wait_stream(stream)
    state = [t.clone() for t in (queue.queue, queue.queue_ptr, target[0])]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = everything()
    for tensor, value in zip((queue.queue, queue.queue_ptr, target[0]), state, strict=True):
        tensor.copy_(value)
    with torch.no_grad():
        leaf.copy_(torch.randn_like(leaf))
    graph.replay()
    replayed = [t.clone() for t in captured] + [target[0].clone()]
    for tensor, value in zip((queue.queue, queue.queue_ptr, target[0]), state, strict=True):
        tensor.copy_(value)
    for ours, want in zip(replayed, [*everything(), target[0]], strict=True):
        torch.testing.assert_close(ours, want, rtol=0, atol=0)
    report.say("- CUDA graph of losses, backward, enqueue and EMA: replay gives the same bits")
    torch.cuda.set_sync_debug_mode("error")
    try:
        everything()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    report.say("- no host synchronisation in losses, backward, enqueue and EMA")


class DeviceCase(Case):
    """A case whose truth fits into memory at any size: float64 in blocks, not N x N matrices."""

    def truth(self) -> list[Tensor]:
        if self.op not in ("clip", "siglip", "moco", "sup_con"):
            return super().truth()
        x = self.inputs()
        leaves = [leaf.detach().double().requires_grad_() for leaf in x["leaves"]]
        with sslkernels.backend("chunked"):
            if self.op == "clip":
                loss = sslkernels.clip_loss(*leaves, LOGIT_SCALE)
            elif self.op == "siglip":
                loss = sslkernels.siglip_loss(*leaves, LOGIT_SCALE, -10.0)
            elif self.op == "sup_con":
                loss = sslkernels.sup_con_loss(leaves[0], x["labels"], 0.1)
            else:
                loss = sslkernels.info_nce_loss(
                    leaves[0], x["key"].double(), x["queue"].double(), 0.1
                )
        return [loss.detach(), *torch.autograd.grad(loss, leaves)]


def _names(case: Case, on_gpu: bool) -> tuple[list[str], list[str]]:
    """Who can run this case in the memory there is, and why the others can not."""
    names, notes = [], []
    rows = case.batch if case.op == "moco" else case.size
    # Eager holds several N x N matrices of float32 at once; six is what NT-Xent's graph peaks at.
    needed = 6 * 4 * rows * case.size
    free = torch.cuda.mem_get_info()[0] if on_gpu else 4 * GIB
    for name in PROVIDERS:
        if name not in CONTENDERS[case.op]:
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


def benchmark(report: Report, on_gpu: bool, shapes: list[tuple[str, int, int]]) -> None:
    """Forward and backward of each loss, verified before it is timed."""
    if not on_gpu:
        report.say(f"**{NOTHING}**: the lines below show that this part of the program runs.", "")
    report.say(
        "Contenders take turns in one run, with the L2 cache flushed before each call; the error is the "
        "largest of loss and gradients, by norm, against float64.",
        "",
        "% of tensor peak: FLOPs that count over those of a large matrix product in the same run. Model: "
        "what benchmarks/gpu_model.py gives the launches in bfloat16 on an H100 at 1.83 GHz, without the "
        "host; where it differs from what was measured, the model is to be corrected.",
        "",
        "| op | shape | dtype | provider | ms (p25, p50, p75) | model ms | extra MiB | % of tensor peak | "
        "error |",
        "|---|---|---|---|---|---:|---:|---:|---:|",
    )
    peaks: dict[str, float] = {}
    for op, size, dim in shapes:
        for dtype in ("bfloat16", "float32") if on_gpu else ("float32",):
            if dtype not in peaks:
                torch.backends.cuda.matmul.allow_tf32 = False
                peaks[dtype] = matmul_peak(dtype, on_gpu)
            case = DeviceCase(
                op, size, dim, 256 if on_gpu else 32, dtype, "cuda" if on_gpu else "cpu"
            )
            if dtype == "float32" and (case.flops or 0.0) > FLOAT32_FLOPS:
                report.say(
                    f"| {op} | {case.shape} | {dtype} | left out: minutes a call | | | | | |"
                )
                continue
            _one_case(report, case, peaks[dtype], on_gpu)
            gc.collect()
            if on_gpu:
                torch.cuda.empty_cache()


def model_ms(case: Case) -> str:
    """What the model predicts for a case; empty where it has no opinion."""
    if case.dtype != "bfloat16" or case.device != "cuda":
        return ""
    seconds = gpu_model.predicted(case.op, case.size, case.dim, case.batch)
    return "" if seconds is None else f"{1e3 * seconds:.3f}"


def _one_case(report: Report, case: Case, peak: float, on_gpu: bool) -> None:
    names, notes = _names(case, on_gpu)
    records: list[measure.Record] = []
    while names:
        try:
            records = measure.measure_times(case, names, 2.0 if on_gpu else 0.0)
            break
        except torch.cuda.OutOfMemoryError:
            # Not known whose memory it was: first without those that hold the matrix, then singly.
            dense = [name for name in names if name in DENSE]
            left = dense or names[-1:]
            notes += [f"{name}: out of memory" for name in left]
            names = [name for name in names if name not in left]
        gc.collect()
        torch.cuda.empty_cache()
    errors = {r["provider"]: r["values"][0] for r in records if r["metric"] == "error"}
    for record in records:
        name = record["provider"]
        if record["metric"] in ("missing", "wrong", "failed"):
            notes.append(f"{name}: {record['note']}")
        if record["metric"] != "time":
            continue
        if not on_gpu:
            cells = [NOTHING, "", "", "", f"{errors[name]:.1e}"]
        else:
            extra = measure.measure_memory(case, name)[0]
            quartiles = ", ".join(f"{1e3 * s:.3f}" for s in record["values"])
            memory = f"{extra['values'][0] / 2**20:.1f}" if "values" in extra else ""
            share = (
                "" if case.flops is None else f"{100 * case.flops / record['values'][1] / peak:.0f}"
            )
            model = model_ms(case) if name == "sslkernels" else ""
            cells = [quartiles, model, memory, share, f"{errors[name]:.1e}"]
        report.say(
            f"| {case.op} | {case.shape} | {case.dtype} | {name} | " + " | ".join(cells) + " |"
        )
    for note in notes:
        report.say(f"| {case.op} | {case.shape} | {case.dtype} | {note} | | | | | |")


def tune(report: Report, on_gpu: bool) -> None:
    """Candidates beside the table's entries; what differs is worth a change of the table."""
    from sslkernels.backends.triton import tuning

    device = "cuda" if on_gpu else "cpu"
    shapes = [(8192, D, "bfloat16") for D in (64, 128, 256, 512, 1024)] + [(8192, 128, "float32")]
    if not on_gpu:
        shapes = [(32, 16, "float32")]
        report.say(f"**{NOTHING}**: one candidate a table, to show that this part runs.", "")
    report.say("| N | D | dtype | table | default ms | best ms | best | tried |", "|---" * 8 + "|")
    for N, D, dtype in shapes:
        found = tuning.autotune(N, D, getattr(torch, dtype), device, limit=None if on_gpu else 1)
        for m in found:
            times = f"{m.default_ms:.3f} | {m.ms:.3f}" if on_gpu else f"{NOTHING} | "
            report.say(f"| {N} | {D} | {dtype} | {m.table} | {times} | {m.config} | {m.tried} |")
    tuning.forget()


def updates(report: Report, on_gpu: bool) -> None:
    """EMA and queue: the CUDA extension where it is built, and Triton's fallback."""
    try:
        extension = importlib.import_module("sslkernels.backends.cuda")
    except ImportError as error:
        report.say(f"- CUDA extension: {error}")
    else:
        reason = extension.why_unavailable(torch.device("cuda"))
        report.say(f"- CUDA extension: {reason or 'available'}")
    if not on_gpu:
        report.say(f"- {NOTHING}")
    arguments = ["--seconds", "1.0"] if on_gpu else ["--dry-run", "--seconds", "0.01"]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.cuda_updates", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    # A dry run's times are those of this CPU at sizes that mean nothing.
    lines = done.stdout.strip().splitlines() if on_gpu else []
    lines += done.stderr.strip().splitlines()[-5:]
    report.say(*(["```", *lines, "```"] if lines else ["- benchmarks.cuda_updates ran to its end"]))
    if done.returncode:
        raise RuntimeError(f"benchmarks.cuda_updates ended with status {done.returncode}")


def run(args: argparse.Namespace) -> int:
    on_gpu = torch.cuda.is_available()
    report = Report(args.out)
    begin = time.perf_counter()
    report.say("# GPU check of sslkernels")
    if not on_gpu:
        report.say("", f"**{NOTHING}.** Every part ran at a tiny size in Triton's interpreter.")
    reason = why_unavailable(torch.device("cuda" if on_gpu else "cpu"))
    if reason:
        report.say("", f"The GPU backend can not run here: {reason}.")
        report.write()
        return 1
    shapes = TINY if not on_gpu else QUICK if args.quick else SHAPES
    report.section("Environment", lambda: environment(report, on_gpu))
    report.section("Correctness", lambda: correctness(report, on_gpu, args.quick))
    with sslkernels.backend(None if on_gpu else "triton"):
        report.section("torch.compile, CUDA graphs", lambda: compile_and_graphs(report, on_gpu))
        report.section("Losses, forward and backward", lambda: benchmark(report, on_gpu, shapes))
        if args.tune or not on_gpu:
            report.section("Tuning", lambda: tune(report, on_gpu))
    report.section("EMA and queue", lambda: updates(report, on_gpu))
    report.say("", f"{report.failures} parts failed; {time.perf_counter() - begin:.0f} s.")
    if not on_gpu:
        report.say(f"{NOTHING}.")
    report.write()
    print(f"report: {args.out}")
    return 1 if report.failures else 0


def main() -> int:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.gpu_check", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "gpu-check.md")
    parser.add_argument("--quick", action="store_true", help="a few shapes; dry run: a few tests")
    parser.add_argument("--tune", action="store_true", help="also time candidates of every kernel")
    args = parser.parse_args()
    if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        # Triton reads the variable when it is imported, which has happened: start over.
        environment = {**os.environ, "TRITON_INTERPRET": "1"}
        command = [sys.executable, "-m", "benchmarks.gpu_check", *sys.argv[1:]]
        return subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode
    return run(args)


if __name__ == "__main__":
    sys.exit(main())
