# SPDX-License-Identifier: Apache-2.0
"""`make gpu-check`: the dry run, and the parts for a GPU with stand-ins for the device."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import HANGS_S
from torch import Tensor

pytest.importorskip("triton", reason="the GPU backend needs triton (pip install triton)")

from benchmarks import contenders, gpu_check, gpu_roofline, measure  # noqa: E402
from benchmarks.cases import LOGIT_SCALE  # noqa: E402
from benchmarks.contenders import CONTENDERS, Missing  # noqa: E402

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


def case(op: str, size: int, dim: int = 64) -> gpu_check.DeviceCase:
    return gpu_check.DeviceCase(op, size, dim, 16, "float32", "cpu")


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
        "Correctness",
        "torch.compile, CUDA graphs",
        "Losses, forward and backward",
        "Tuning",
        "EMA and queue",
    ):
        assert f"## {title}" in text
    assert re.search(r"\d+ passed", text)
    assert not re.search(r"\d (ms|us|µs|GB/s)", text)
    for op, size, _ in gpu_check.TINY:
        assert re.search(rf"\| {op} \| .*{size}.* \| sslkernels \| no GPU", text), op


def test_every_provider_is_a_contender() -> None:
    """A name that no table knows would be left out without a word."""
    known = {name for table in CONTENDERS.values() for name in table}
    assert set(gpu_check.PROVIDERS) <= known and set(gpu_check.DENSE) <= set(gpu_check.PROVIDERS)
    sizes = {size for _, size, _ in gpu_check.SHAPES}
    assert min(sizes) <= 1024 and max(sizes) >= 1 << 18
    assert {64, 1024} <= {dim for *_, dim in gpu_check.SHAPES}


def test_who_runs_and_why_the_others_do_not(gpu: None) -> None:
    names, notes = gpu_check._names(case("nt_xent", 4096), True)
    assert names == ["sslkernels", "eager", "torch.compile"] and not notes
    names, notes = gpu_check._names(case("nt_xent", 1 << 18), True)
    assert names == ["sslkernels"]
    assert [note.split(":")[0] for note in notes] == ["eager", "torch.compile"]
    assert "GiB" in notes[0]


def test_a_case_with_a_device(gpu: None, report, monkeypatch: pytest.MonkeyPatch) -> None:
    """Times, memory, share of the peak and error of each provider; Inf-CL named as missing."""
    monkeypatch.setattr(gpu_check, "PROVIDERS", ("sslkernels", "eager", "inf_cl"))
    gpu_check._one_case(report, case("clip", 48), 1e12, True)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in report.lines]
    assert [row[3].split(":")[0] for row in rows] == ["sslkernels", "eager", "inf_cl"]
    for row in rows[:2]:
        assert re.fullmatch(r"[\d.]+, [\d.]+, [\d.]+", row[4])
        assert re.fullmatch(r"\d+", row[7]) and float(row[8]) < 1e-3
    assert "Inf-CL needs a GPU" in rows[2][3]


def test_the_model_stands_beside_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """For the cases and the dtype that it is a model of."""
    asked = []

    def predicted(*arguments: Any) -> float | None:
        asked.append(arguments)
        return None if arguments[0] == "siglip" else 1.5e-3

    monkeypatch.setattr(gpu_check.gpu_model, "predicted", predicted)
    on_gpu = {"dtype": "bfloat16", "device": "cuda"}
    shown = [gpu_check.model_ms(case(op, 64).at(**on_gpu)) for op in ("clip", "siglip")]
    assert shown == ["1.500", ""] and asked == [("clip", 64, 64, 16), ("siglip", 64, 64, 16)]
    assert gpu_check.model_ms(case("clip", 64).at(device="cuda")) == ""  # float32
    assert len(asked) == 2


def test_out_of_memory_leaves_out_the_matrix_first(gpu, report, monkeypatch) -> None:
    """Then one at a time, and every name is in the report."""
    tried = []

    def measure_times(case: Any, names: list[str], budget: float) -> list[dict[str, Any]]:
        tried.append(list(names))
        if len(names) > 1 or names == ["eager"]:
            raise torch.cuda.OutOfMemoryError("no more")
        return [{"provider": names[0], "metric": "missing", "note": "as it may be"}]

    monkeypatch.setattr(measure, "measure_times", measure_times)
    gpu_check._one_case(report, case("clip", 48), 1e12, True)
    assert tried == [
        ["sslkernels", "eager", "torch.compile", "inf_cl"],
        ["sslkernels", "inf_cl"],
        ["sslkernels"],
    ]
    text = "\n".join(report.lines)
    for name in ("eager", "torch.compile", "inf_cl"):
        assert f"{name}: out of memory" in text
    assert "as it may be" in text


@pytest.mark.parametrize(("dim", "head_dim"), [(64, 64), (96, 32), (512, 256), (768, 256)])
def test_inf_cl(dim: int, head_dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both directions and their mean are the CLIP loss of the truth."""
    head_dims = fake_inf_cl(monkeypatch)
    small = case("clip", 20, dim)
    contender = contenders._inf_cl(small.at(device="cuda"), small.inputs())
    assert (
        measure.verify("inf_cl", small, contender, small.truth()) < 5e-4
    )  # lse - positive cancels
    assert set(head_dims) == {head_dim}
    with pytest.raises(Missing, match="multiple of 16"):
        contenders._inf_cl(small.at(device="cuda", dim=100), small.inputs())
    monkeypatch.setitem(sys.modules, "inf_cl", None)
    with pytest.raises(Missing, match="import inf_cl"):
        contenders._inf_cl(small.at(device="cuda"), small.inputs())


@pytest.mark.parametrize("op", ["nt_xent", "moco", "clip", "siglip", "sup_con", "triplet"])
def test_the_truth_in_blocks_is_the_truth(op: str) -> None:
    """The float64 results that fit into memory at any size, against those of the reference."""
    small = case(op, 64)
    plain = gpu_check.Case(op, 64, 64, 16, "float32", "cpu")
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
