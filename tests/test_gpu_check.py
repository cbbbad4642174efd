# SPDX-License-Identifier: Apache-2.0
"""`make gpu-check`: the dry run, and the parts for a GPU with stand-ins for the device."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import HANGS_S
from torch import Tensor

pytest.importorskip("triton", reason="the GPU backend needs triton (pip install triton)")

from benchmarks import (  # noqa: E402
    gpu_check,
    gpu_contenders,
    gpu_losses,
    gpu_roofline,
    gpu_state,
    gpu_times,
    measure,
)
from benchmarks.cases import LOGIT_SCALE, Case  # noqa: E402
from benchmarks.contender import Contender, Missing  # noqa: E402
from benchmarks.contenders import CONTENDERS  # noqa: E402
from sslkernels import reference  # noqa: E402
from sslkernels.backends.triton import configs  # noqa: E402

ROOT = Path(__file__).parents[1]


@pytest.fixture
def report(tmp_path: Path) -> gpu_check.Report:
    return gpu_check.Report(tmp_path / "report.md")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Just enough of a device for code that asks about one."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (80 << 30, 80 << 30))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(measure, "MIN_ROUNDS", 2)
    monkeypatch.setattr(measure, "MAX_ROUNDS", 2)


def case(op: str, size: int, dim: int = 64) -> gpu_losses.DeviceCase:
    return gpu_losses.DeviceCase(op, size, dim, 16, "float32", "cpu")


def fake_inf_cl(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Inf-CL's function by its definition: the loss of each row with the positives on the diagonal."""
    head_dims: list[int] = []

    def cal_flash_loss(
        q: Tensor, k: Tensor, labels: Any = None, scale: Any = None, head_dim: int = 256
    ) -> Tensor:
        assert labels is None and q.shape[1] % head_dim == 0
        head_dims.append(head_dim)
        logits = (scale * q) @ k.T
        return logits.logsumexp(1) - logits.diagonal()

    module = types.ModuleType("inf_cl")
    module.cal_flash_loss = cal_flash_loss  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "inf_cl", module)
    return head_dims


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_the_dry_run_ends_and_says_that_nothing_was_measured(tmp_path: Path) -> None:
    out = tmp_path / "gpu-check.md"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu_check", "--quick", "--out", str(out)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=HANGS_S,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    text = out.read_text()
    assert "no GPU: nothing measured" in text and "0 parts failed" in text
    assert text.splitlines() == done.stdout.splitlines()[:-1]  # the last line names the report
    for title in (
        "Environment",
        "Under load",
        "Correctness",
        "torch.compile, CUDA graphs",
        "Overlapping launches",
        "Losses, forward and backward",
        "Tuning",
        "EMA and queue",
        "Several GPUs",
    ):
        assert f"## {title}" in text
    assert re.search(r"\d+ passed", text)
    assert not re.search(r"\d (ms|us|µs|GB/s)", text)
    for op, size, _ in gpu_losses.TINY:
        assert re.search(rf"\| {op} \| .*{size}.* \| sslkernels \| no GPU", text), op


def test_every_provider_is_a_contender() -> None:
    """A name that no table knows would be left out without a word."""
    known = {name for table in CONTENDERS.values() for name in table}
    providers = set(gpu_losses.PROVIDERS)
    assert providers <= known and set(gpu_losses.DENSE + gpu_losses.PRODUCTS) <= providers
    assert {n for t in gpu_contenders.CONTENDERS.values() for n in t} <= providers


def test_what_is_measured(gpu: None) -> None:
    """N from 256 to 262144, three dtypes, a low temperature; the dry run and --quick take a part."""
    whole = list(gpu_losses.cases(True, False))
    sizes = {c.size for c in whole if c.op == "nt_xent"}
    assert (min(sizes), max(sizes)) == (256, 1 << 18) and {64, 1024} <= {c.dim for c in whole}
    assert {c.dtype for c in whole} == {"bfloat16", "float32", "float16"}
    cold = {(c.op, c.dtype) for c in whole if c.temperature == gpu_losses.COLD}
    assert len(cold) == 6 and all("T=0.01" in c.shape for c in whole if c.temperature == 0.01)
    assert len(set(whole)) == len(whole)
    quick, tiny = (list(gpu_losses.cases(*x)) for x in ((True, True), (False, False)))
    assert 0 < len(quick) < len(whole) / 3 and {c.device for c in tiny} == {"cpu"}


def test_who_runs_and_why_the_others_do_not(gpu: None) -> None:
    names, notes = gpu_losses.who(case("nt_xent", 4096), True)
    assert names == [n for n in gpu_losses.PROVIDERS if n in CONTENDERS["nt_xent"]] and not notes
    half, _ = gpu_losses.who(case("nt_xent", 4096).at(dtype="bfloat16"), True)
    assert set(names) - set(half) == set(gpu_losses.PRODUCTS)
    names, notes = gpu_losses.who(case("nt_xent", 1 << 18), True)
    assert names == ["sslkernels", *gpu_losses.PRODUCTS, "chunked"]
    assert [note.split(":")[0] for note in notes] == ["eager", "torch.compile", "lightly"]
    assert "GiB" in notes[0]


def cells(lines: list[str]) -> list[list[str]]:
    """Of the rows of a table."""
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]


def on_device(small: Case, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The rows of a case that believes it is on a GPU; parts of its time from stand-ins."""
    replay = gpu_times.Kernels({"forward_kernel": [2e-6, 1e-6], "a|b": [1e-6]})
    split = gpu_times.split
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(
        gpu_times, "split", lambda c, t, w: split(c, t, w, lambda s: s, lambda *_: replay)
    )
    lines: list[str] = []
    table = gpu_losses.Losses(lines.append, True)
    table.peaks = {small.dtype: 1e12}
    table.run(small)  # type: ignore[arg-type]
    return lines


def test_a_case_with_a_device(gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Times apart, kernels, memory, share of the peak and error of each; Inf-CL named as missing."""
    monkeypatch.setattr(gpu_losses, "PROVIDERS", ("sslkernels", "eager", "inf_cl"))
    rows = cells(on_device(case("clip", 48), monkeypatch))
    assert [row[3].split(":")[0] for row in rows] == ["sslkernels", "eager", "inf_cl"]
    assert all(len(row) == len(gpu_losses.HEAD) for row in rows)
    for row in rows[:2]:
        found = dict(zip(gpu_losses.HEAD, row, strict=True))
        assert re.fullmatch(r"[\d.]+, [\d.]+, [\d.]+", found["ms (p25, p50, p75)"])
        for name in ("host ms", "graph ms"):
            assert re.fullmatch(r"\d+\.\d+ \+ \d+\.\d+", found[name])
        assert found["kernels: ms"] == "3: 0.004" and found["model ms"] == ""  # float32
        assert re.fullmatch(r"\d+", found["% of tensor peak"]) and float(found["error"]) < 1e-3
    assert "Inf-CL needs a GPU" in rows[2][3]


def test_the_model_stands_beside_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """For the cases that it is a model of, by pass and by kernel; what fails is a note."""
    estimate = gpu_losses.gpu_model.Estimate
    forward = [estimate("forward_kernel", 4e-6, 1, 1.0, 0.0)]
    backward = [estimate("backward_kernel", 5e-6, 1, 1.0, 0.0)]

    def expected(op: str, *rest: Any) -> Any:
        if op == "moco":
            raise RuntimeError("no compiler")
        return None if op == "siglip" else (forward, backward)

    monkeypatch.setattr(gpu_losses.gpu_model, "expected", expected)
    table = gpu_losses.Losses(lambda line: None, True)
    measured = gpu_times.Kernels({"forward_kernel": [2e-6, 1e-6], "void a|b": [1e-6]})
    found = [table._model(case(op, 64), measured) for op in ("clip", "siglip", "moco")]
    launch = gpu_losses.gpu_model.LAUNCH  # nothing overlaps with the only launch of a pass
    assert found[0] == (f"{1e3 * (4e-6 + launch):.3f} + {1e3 * (5e-6 + launch):.3f}", "")
    assert found[1] == ("", "") and found[2] == ("", "model: RuntimeError: no compiler")
    rows = cells(gpu_losses.kernel_table(table.kernels))[2:]
    assert rows == [
        ["clip N=64 D=64", "forward_kernel", "2", "1", "3.00", "4.00", "0.75"],
        ["clip N=64 D=64", "backward_kernel", "0", "1", "", "5.00", ""],
        ["clip N=64 D=64", "void a/b", "1", "0", "1.00", "", ""],
    ]


def test_out_of_memory_leaves_out_the_matrix_first(gpu, monkeypatch) -> None:
    """Then one at a time, and every name is in the report."""
    tried = []

    def measure_times(case: Any, names: list[str], *rest: Any) -> list[dict[str, Any]]:
        tried.append(list(names))
        if len(names) > 1 or names == ["eager"]:
            raise torch.cuda.OutOfMemoryError("no more")
        return [{"provider": names[0], "metric": "missing", "note": "as it may be"}]

    monkeypatch.setattr(measure, "measure_times", measure_times)
    names = ("sslkernels", "eager", "torch.compile", "inf_cl")
    monkeypatch.setattr(gpu_losses, "PROVIDERS", names)
    text = "\n".join(on_device(case("clip", 48), monkeypatch))
    assert tried == [list(names), ["sslkernels", "inf_cl"], ["sslkernels"]]
    for name in names[1:]:
        assert f"{name}: out of memory" in text
    assert "as it may be" in text


def test_host_and_device_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both passes of each; what can't be captured or profiled is a note, and the rest is measured."""
    log: list[str] = []

    def step() -> None:
        log.append("step")

    def graph(step: Any) -> Any:
        if step is forward:
            raise RuntimeError("operation not permitted\nwhen stream is capturing")
        return lambda: log.append("replay")

    def forward() -> None:
        log.append("forward")

    def timer(step: Any, repeats: int) -> float:
        step()
        return 0.5 if log[-1] == "replay" else 0.0

    def profile(step: Any, wait: Any) -> gpu_times.Kernels:
        raise RuntimeError("CUPTI is busy")

    monkeypatch.setattr(gpu_times, "HOST_SECONDS", float("inf"))
    contender = Contender(step, lambda: [], forward=forward)
    found = gpu_times.split(contender, timer, lambda: log.append("wait"), graph, profile)
    assert set(found.host) == {"step", "forward"} and found.graph == {"step": 0.5}
    assert log.count("step") == log.count("forward") == gpu_times.SAMPLES
    assert log.count("wait") == 2 * (gpu_times.SAMPLES + 1) and not found.kernels.launches
    assert found.notes == [
        "CUDA graph of the forward: RuntimeError: operation not permitted",
        "profiler: RuntimeError: CUPTI is busy",
    ]
    monkeypatch.setattr(
        gpu_times, "HOST_SECONDS", -1.0
    )  # a step of seconds is not repeated as often
    log.clear()
    assert gpu_times.host_seconds(step, lambda: None) >= 0
    assert log.count("step") == gpu_times.LEAST
    assert gpu_times.parts({"step": 3e-3, "forward": 1e-3}) == "1.000 + 2.000"
    assert gpu_times.parts({"step": 3e-3}) == "3.000" and gpu_times.parts({}) == ""


def test_the_state_of_a_gpu() -> None:
    """What a driver does not know is said plainly, and does not hide the rest."""
    names = list(gpu_state.FIELDS)

    def ask(command: list[str]) -> str:
        asked = command[1].split("=")[1].split(",")
        assert "--id=GPU-1" in command
        if "mig.mode.current" in asked:  # an older driver refuses the whole question
            return ""
        return ", ".join("[N/A]" if x == "power.limit" else f"<{x}>" for x in asked) + "\n"

    found = gpu_state.state("GPU-1", ask)
    assert list(found) == list(gpu_state.FIELDS.values())
    for field, name in gpu_state.FIELDS.items():
        absent = field in ("mig.mode.current", "power.limit")
        assert found[name] == (gpu_state.ABSENT if absent else f"<{field}>")
    nothing = gpu_state.state("0", lambda command: "")
    assert set(nothing.values()) == {gpu_state.ABSENT} and len(nothing) == len(names)
    assert set(gpu_state.MOVING) < set(found)
    assert gpu_state.line(found, ("driver", "MIG")) == "driver <driver_version>, MIG not known"
    assert gpu_state._ask(["/nowhere/nvidia-smi"]) == ""


class FakeEvent:
    """A CUDA event that takes a second from one to the next."""

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None: ...
    def synchronize(self) -> None: ...
    def query(self) -> bool:
        return False

    def elapsed_time(self, other: FakeEvent) -> float:
        return 1e3


def test_clocks_under_load(report: gpu_check.Report, monkeypatch: pytest.MonkeyPatch) -> None:
    """The state is asked for while products run, and their rate is that of the time between events."""
    monkeypatch.setattr(torch, "randn", lambda *a, **k: torch.zeros(2, 2))
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(gpu_check, "_selector", str)
    monkeypatch.setattr(gpu_check, "LOAD_SECONDS", 1e9)
    monkeypatch.setattr(gpu_state, "state", lambda name: dict.fromkeys(gpu_state.MOVING, name))
    gpu_check.under_load(report, True)
    assert report.lines[0].startswith("- before: SM clock 0")
    assert report.lines[1].startswith(
        "- during 900 products of 8192 x 8192 in bfloat16, 990 TFLOP/s"
    )
    assert "1830 MHz" in report.lines[2]


def test_another_device_than_the_current_one(report, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other bits, or another current device afterwards, are failures."""
    stack = [0]

    @contextlib.contextmanager
    def device(index: int) -> Iterator[None]:
        stack.append(index)
        yield
        stack.pop()

    ran: list[list[str]] = []

    def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        ran.append(command)
        return subprocess.CompletedProcess(command, len(ran) - 1, "gather ring", "why")

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: stack[-1])
    monkeypatch.setattr(gpu_check.subprocess, "run", run)
    gpu_check.several(report, ["cpu", "cpu"])
    assert "same bits" in report.lines[0] and "gather ring" in report.lines
    assert "--device" in ran[0] and "cuda" in ran[0]
    with pytest.raises(RuntimeError, match="benchmarks.distributed ended with status 1"):
        gpu_check.several(report, ["cpu", "cpu"])
    monkeypatch.setattr(gpu_check, "_step", lambda leaf: leaf.sum() * (1 + stack[-1]))
    with pytest.raises(AssertionError):
        gpu_check.several(report, ["cpu", "cpu"])
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    with pytest.raises(RuntimeError, match="the current device was 1"):
        gpu_check.several(report, ["cpu", "cpu"])
    gpu_check.several(report, ["cuda:0"])
    assert report.lines[-1].startswith("- 1 GPUs: nothing was launched")


def test_a_case_that_fails_leaves_the_others(gpu, report, monkeypatch) -> None:
    def run(self: Any, case: Case) -> None:
        if case.op == "moco":
            raise RuntimeError("broken\nhere")
        self.row(case, "fine")

    monkeypatch.setattr(gpu_losses.Losses, "run", run)
    gpu_check.losses(report, False, True)
    assert report.failures == 1
    assert sum("| fine |" in line for line in report.lines) == len(gpu_losses.TINY) - 1
    assert any("**FAILED**: RuntimeError: broken here" in line for line in report.lines)


def fake_library(name: str, monkeypatch: pytest.MonkeyPatch, **functions: Any) -> None:
    module = types.ModuleType(name)
    for key, value in functions.items():
        setattr(module, key, value)
    monkeypatch.setitem(sys.modules, name, module)


def test_memeff(monkeypatch: pytest.MonkeyPatch) -> None:
    """The textbook gradient, of features that are normalised already."""

    def make(temperature: float, normalized_inputs: bool, stable: bool) -> Any:
        assert normalized_inputs and not stable
        return lambda a, b: reference.clip_loss(a, b, 1 / temperature)

    fake_library("memeff", monkeypatch, MemoryEfficientCLIPLoss=make)
    small = case("clip", 20)
    contender = gpu_contenders._memeff(small.at(device="cuda"), small.inputs())
    assert measure.verify("memeff", small, contender, small.truth()) < 1e-5
    with pytest.raises(Missing, match="needs a GPU"):
        gpu_contenders._memeff(small, small.inputs())


def test_siglip_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes the logarithm of the scale."""

    def fused(a: Tensor, b: Tensor, log_scale: Tensor, bias: Tensor) -> Tensor:
        return reference.siglip_loss(a, b, log_scale.exp(), bias)  # type: ignore[return-value]

    fake_library("siglip_kernel", monkeypatch, fused_siglip_loss=fused)
    small = case("siglip", 20)
    contender = gpu_contenders._siglip_kernel(small.at(device="cuda"), small.inputs())
    assert measure.verify("siglip-kernel", small, contender, small.truth()) < 1e-5


@pytest.mark.parametrize("precision", ["tf32x3", "bf16x3"])
def test_split_products(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Step, forward pass and results run with the products that were asked for; halves have none."""
    asked: list[str] = []

    def loss(a: Tensor, b: Tensor, temperature: float) -> Tensor:
        asked.append(configs.precision())
        return reference.nt_xent_loss(a, b, temperature)  # type: ignore[return-value]

    monkeypatch.setattr(gpu_contenders.sslkernels, "nt_xent_loss", loss)
    small = case("nt_xent", 20)
    factory = gpu_contenders.CONTENDERS["nt_xent"][f"sslkernels {precision}"]
    contender = factory(small.at(device="cuda"), small.inputs())
    assert measure.verify(precision, small, contender, small.truth()) < 1e-5
    contender.step()
    assert contender.forward is not None
    contender.forward()
    assert asked == [precision] * 3 and configs.precision() == "ieee"
    with pytest.raises(Missing, match="is for float32, not bfloat16"):
        factory(small.at(device="cuda", dtype="bfloat16"), small.inputs())


def test_a_low_temperature_reaches_everyone() -> None:
    """The truth and those that are measured at it."""
    for op in ("nt_xent", "moco", "sup_con", "info_nce"):
        cold = case(op, 24).at(temperature=0.01)
        assert abs(float(cold.truth()[0]) - float(case(op, 24).truth()[0])) > 0.1
        for name in ("sslkernels", "chunked", "eager", "MoCo [D, K]", "info-nce-pytorch"):
            if name in CONTENDERS[op]:
                made = measure.make(name, cold)
                measure.verify(name, cold, made, cold.truth())


@pytest.mark.parametrize(("dim", "head_dim"), [(64, 64), (96, 32), (512, 256), (768, 256)])
def test_inf_cl(dim: int, head_dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both directions and their mean are the CLIP loss of the truth."""
    head_dims = fake_inf_cl(monkeypatch)
    small = case("clip", 20, dim)
    contender = gpu_contenders._inf_cl(small.at(device="cuda"), small.inputs())
    assert (
        measure.verify("inf_cl", small, contender, small.truth()) < 5e-4
    )  # lse - positive cancels
    assert set(head_dims) == {head_dim}
    with pytest.raises(Missing, match="multiple of 16"):
        gpu_contenders._inf_cl(small.at(device="cuda", dim=100), small.inputs())
    monkeypatch.setitem(sys.modules, "inf_cl", None)
    with pytest.raises(Missing, match="import inf_cl"):
        gpu_contenders._inf_cl(small.at(device="cuda"), small.inputs())


@pytest.mark.parametrize(
    "op", ["nt_xent", "moco", "info_nce", "clip", "siglip", "sup_con", "triplet"]
)
def test_the_truth_in_blocks_is_the_truth(op: str) -> None:
    """The float64 results that fit into memory at any size, against those of the reference."""
    small = case(op, 64)
    plain = Case(op, 64, 64, 16, "float32", "cpu")
    for blocks, dense in zip(small.truth(), plain.truth(), strict=True):
        assert torch.allclose(blocks, dense, rtol=1e-9, atol=1e-12)
    assert LOGIT_SCALE == 10.0


def test_a_failing_part_is_reported_and_counted(report: gpu_check.Report) -> None:
    def part() -> None:
        raise RuntimeError("broken")

    report.section("A part", part)
    report.section("Another", lambda: report.say("fine"))
    report.write()
    text = report.path.read_text()
    assert report.failures == 1 and "**FAILED**: RuntimeError: broken" in text and "fine" in text


def test_the_roofline_counts_what_kernels_do() -> None:
    """4 N^2 D for the self backward pass, one exponential a pair, panels only for large D."""
    works = {name.split(":")[0].split(" (")[0]: work for name, work in gpu_roofline.KERNELS.items()}
    N, D = 4096, 128
    backward = works["backward, self"](N, N, D, 2)
    assert backward.flops == 4 * N * N * D and backward.exps == N * N
    assert backward.bytes == 6 * N * D
    assert works["forward, self"](N, N, D, 2).flops == N * N * D
    wide = works["backward, self"](N, N, 1024, 2)
    assert wide.bytes > 4 * N * N  # G written and read
    seconds, reason = gpu_roofline.bound(gpu_roofline.DEVICES[0], backward, 2)
    assert reason == "products" and seconds == backward.flops / 989e12
