# SPDX-License-Identifier: Apache-2.0
"""`make gpu-check`: test and measure the GPU backend, and write one report file.

On a machine with a GPU: driver, clocks and power, the correctness suite on the device, torch.compile and
CUDA graphs, the losses against what else there is (``gpu_losses.py``), EMA and queue; with two GPUs, launches
on one that is not the current one, and losses over both.  Without a GPU it runs all of its parts at tiny
sizes in Triton's interpreter and reports that nothing was measured.

    python -m benchmarks.gpu_check [--out FILE] [--quick] [--tune]
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib
import io
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

if __name__ == "__main__" and not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported, which no line above does

import sslkernels
from benchmarks import cuda_updates, gpu_losses, gpu_model, gpu_state, gpu_times, measure
from benchmarks.gpu_losses import GIB, NOTHING
from sslkernels.backends.triton import why_unavailable

ROOT = Path(__file__).parents[1]
LOAD_SECONDS = 3.0


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
    if not on_gpu:
        report.say(f"- device: none. **{NOTHING}**")
    for index in range(torch.cuda.device_count() if on_gpu else 0):
        properties = torch.cuda.get_device_properties(index)
        report.say(
            f"- device {index}: {properties.name}, compute capability {properties.major}.{properties.minor}, "
            f"{properties.multi_processor_count} multiprocessors, {properties.total_memory / GIB:.0f} GiB, "
            f"CUDA {torch.version.cuda}, HIP {torch.version.hip}",
            f"  - {gpu_state.line(gpu_state.state(_selector(index)))}",
        )
    report.say("```", *str(sslkernels.info()).splitlines(), "```")


def _selector(index: int) -> str:
    """What nvidia-smi knows a device by: numbers differ where CUDA_VISIBLE_DEVICES is set."""
    uuid = getattr(torch.cuda.get_device_properties(index), "uuid", None)
    return str(index) if uuid is None else f"GPU-{uuid}"


def under_load(report: Report, on_gpu: bool) -> None:
    """Clocks and power while matrix products run: what times of long kernels are to be read with."""
    if not on_gpu:
        report.say(f"- {NOTHING}", f"- state: {gpu_state.line(gpu_state.state('0'))}")
        return
    n = 8192
    a = torch.randn(n, n, device="cuda", dtype=torch.bfloat16)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    once = time.perf_counter()
    a @ a
    torch.cuda.synchronize()
    calls = max(1, min(900, int(LOAD_SECONDS / (time.perf_counter() - once))))
    report.say(f"- before: {gpu_state.line(gpu_state.state(_selector(0)), gpu_state.MOVING)}")
    begin.record()
    for _ in range(calls):
        a @ a
    end.record()
    found = gpu_state.state(_selector(0))  # asked while the device works
    over = end.query()
    end.synchronize()
    rate = 2.0 * n**3 * calls / (1e-3 * begin.elapsed_time(end))
    report.say(
        f"- {'after' if over else 'during'} {calls} products of {n} x {n} in bfloat16, "
        f"{rate / 1e12:.0f} TFLOP/s: {gpu_state.line(found, gpu_state.MOVING)}",
        f"- the model assumes {gpu_model.CLOCK / 1e6:.0f} MHz and at most {gpu_model.PEAK_FLOPS / 1e12:.0f} "
        "TFLOP/s",
    )


def correctness(report: Report, on_gpu: bool, quick: bool) -> None:
    """The kernel tests on the device (here: a part of them in the interpreter)."""
    names = ["test_losses.py"]
    if on_gpu:
        names += [f"test_{part}.py" for part in ("engine", "branches", "updates", "autoencoders")]
    # The suite runs them all: here it counts that this part of the program works.
    chosen = ["-k", "test_loss and nt_xent_loss"] if quick and not on_gpu else []
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

    gpu_times.warm_up(everything)
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


def overlapping(report: Report, on_gpu: bool) -> None:
    """Launches that may begin before the ones before them have ended give the same bits; what they save."""
    from sslkernels.backends.triton import configs

    sizes, steps = ((256, 1024, 4096, 16384), 50) if on_gpu else ((48,), 2)
    for n in sizes:
        z = torch.randn(n, 128 if on_gpu else 16, device="cuda" if on_gpu else "cpu").bfloat16()
        leaf = z.requires_grad_()

        def step(leaf: Tensor = leaf) -> list[Tensor]:
            loss = _step(leaf) + sslkernels.clip_loss(leaf[::2], leaf[1::2], 10.0)
            return [loss.detach(), torch.autograd.grad(loss, leaf)[0]]

        found: dict[bool, list[list[Tensor]]] = {}
        seconds = {}
        for overlap in (False, True):
            with configs.override(overlap=overlap):
                found[overlap] = [step() for _ in range(steps)]
                if on_gpu:
                    timer = measure._timer("cuda")
                    seconds[overlap] = gpu_times.graph_seconds(step, timer, gpu_times.captured)
        for without, overlapped in zip(found[False], found[True], strict=True):
            torch.testing.assert_close(overlapped, without, rtol=0, atol=0)
        saved = (
            f"{1e6 * seconds[False]:.1f} us in a CUDA graph without, {1e6 * seconds[True]:.1f} us with"
            if on_gpu
            else NOTHING
        )
        report.say(f"- N = {n}, {steps} steps: the same bits with launches that overlap; {saved}")


def losses(report: Report, on_gpu: bool, quick: bool) -> None:
    """Forward and backward of each loss, verified before it is timed."""
    if not on_gpu:
        report.say(f"**{NOTHING}**: the lines below show that this part of the program runs.", "")
    report.say(*gpu_losses.LEGEND.splitlines(), "")
    report.say("| " + " | ".join(gpu_losses.HEAD) + " |", "|---" * len(gpu_losses.HEAD) + "|")
    table = gpu_losses.Losses(report.say, on_gpu)
    for case in gpu_losses.cases(on_gpu, quick):
        try:
            table.run(case)
        except Exception as error:  # the other cases are measured all the same
            report.failures += 1
            table.row(case, f"**FAILED**: {type(error).__name__}: {error}"[:300].replace("\n", " "))
    if on_gpu:
        report.say(
            "", "Kernels of a step, beside the model. Launches themselves are not in it.", ""
        )
        report.say(*gpu_losses.kernel_table(table.kernels))


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
    arguments = ["--seconds", "1.0"] if on_gpu else ["--dry-run", "--seconds", "0"]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        status = cuda_updates.main(arguments)
    # A dry run's times are those of this CPU at sizes that mean nothing.
    lines = printed.getvalue().strip().splitlines() if on_gpu else []
    report.say(*(["```", *lines, "```"] if lines else ["- benchmarks.cuda_updates ran to its end"]))
    if status:
        raise RuntimeError(f"benchmarks.cuda_updates ended with status {status}")


def several(report: Report, devices: list[str]) -> None:
    """With two GPUs: launches on the one that is not current, and losses over the ranks of both."""
    if len(devices) < 2:
        report.say(
            f"- {len(devices)} GPUs: nothing was launched on another device than the current one"
        )
        return
    results = []
    for current in (1, 0):
        with torch.cuda.device(current):
            generator = torch.Generator().manual_seed(0)
            leaf = torch.randn(512, 128, generator=generator).to(devices[1]).requires_grad_()
            queue = sslkernels.KeyQueue(1024, 128).to(devices[1])
            target = torch.zeros(1000, device=devices[1])
            loss = _step(leaf) + _elements(leaf)
            queue.enqueue(leaf.detach())
            sslkernels.ema_update_([target], [torch.ones_like(target)], 0.9)
            gradient = torch.autograd.grad(loss, leaf)[0]
            results.append([loss.detach(), gradient, queue.queue, target])
            if torch.cuda.current_device() != current:
                raise RuntimeError(f"the current device was {current} and is another one now")
    for here, there in zip(*results, strict=True):
        torch.testing.assert_close(there, here, rtol=0, atol=0)
    report.say(f"- {devices[1]} gives the same bits whether it is the current device or not")
    command = [sys.executable, "-m", "benchmarks.distributed", "--device", "cuda", "--ranks", "2"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    report.say("```", *done.stdout.strip().splitlines(), *done.stderr.splitlines()[-5:], "```")
    if done.returncode:
        raise RuntimeError(f"benchmarks.distributed ended with status {done.returncode}")


def run(args: argparse.Namespace) -> int:
    on_gpu = torch.cuda.is_available()
    devices = [f"cuda:{index}" for index in range(torch.cuda.device_count() if on_gpu else 0)]
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
    report.section("Environment", lambda: environment(report, on_gpu))
    report.section("Under load", lambda: under_load(report, on_gpu))
    report.section("Correctness", lambda: correctness(report, on_gpu, args.quick))
    with sslkernels.backend(None if on_gpu else "triton"):
        report.section("torch.compile, CUDA graphs", lambda: compile_and_graphs(report, on_gpu))
        report.section("Overlapping launches", lambda: overlapping(report, on_gpu))
        report.section("Losses, forward and backward", lambda: losses(report, on_gpu, args.quick))
        if args.tune or not on_gpu:
            report.section("Tuning", lambda: tune(report, on_gpu))
    report.section("EMA and queue", lambda: updates(report, on_gpu))
    report.section("Several GPUs", lambda: several(report, devices))
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
    return run(args)


if __name__ == "__main__":
    sys.exit(main())
