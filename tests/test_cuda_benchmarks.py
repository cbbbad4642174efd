# SPDX-License-Identifier: Apache-2.0
"""The model of bytes and the GPU benchmark: in step with the sources, and able to run."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import pytest
import torch

from benchmarks import cuda_bytes, cuda_updates

LAUNCHERS = Path(__file__).resolve().parents[1] / "csrc" / "cuda" / "launchers.h"


def test_document_holds_the_generated_tables(capsys: pytest.CaptureFixture[str]) -> None:
    assert cuda_bytes.main(["--check"]) == 0, capsys.readouterr().out


def test_a_stale_table_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_bytes, "BANDWIDTH", 1e12)
    assert cuda_bytes.main(["--check"]) == 1


def test_constants_are_those_of_the_kernels() -> None:
    text = LAUNCHERS.read_text(encoding="utf-8")
    assert f"kEmaChunk = {cuda_bytes.EMA_CHUNK};" in text
    rows = re.findall(r"static_assert\(sizeof\(Ema(Tensor|Chunk)\) == (\d+)\)", text)
    assert dict(rows) == {
        "Tensor": str(cuda_bytes.EMA_TENSOR_BYTES),
        "Chunk": str(cuda_bytes.EMA_CHUNK_BYTES),
    }


def test_resnet50() -> None:
    """torchvision's ResNet-50: 161 parameters, 25,557,032 elements."""
    sizes = cuda_bytes.resnet50_sizes()
    assert len(sizes) == 161 and sum(sizes) == 25_557_032


@pytest.mark.parametrize(
    ("sizes", "limits", "launches"),
    [
        ([], (64, 320), 0),
        ([0, 0], (64, 320), 0),
        ([1] * 64, (64, 320), 1),
        ([1] * 65, (64, 320), 2),
        ([65536 * 320], (64, 320), 1),
        ([65536 * 320 + 1], (64, 320), 2),
        ([65536 * 3, 5], (64, 2), 2),
    ],
)
def test_foreach_launches(sizes: list[int], limits: tuple[int, int], launches: int) -> None:
    assert cuda_bytes.foreach_launches(sizes, *limits) == launches


def test_dry_run_writes_a_row_for_every_contender(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    assert cuda_updates.main(["--dry-run", "--csv", str(path)]) == 0
    with path.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert {row["op"] for row in rows} == {"ema", "enqueue"}
    assert all(row["device"] == "cpu (dry run)" and float(row["p50"]) > 0 for row in rows)
    assert {"sslkernels", "foreach_lerp", "official_moco"} <= {row["provider"] for row in rows}


def test_nothing_is_timed_that_is_wrong() -> None:
    case = cuda_updates.ema_case("a", [5], torch.float32, "cpu")
    case.contenders[1].step = lambda: None
    with pytest.raises(RuntimeError, match="foreach_lerp is off by"):
        cuda_updates.verify(case)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert cuda_updates.main([]) == 2
    assert "no CUDA device" in capsys.readouterr().out
