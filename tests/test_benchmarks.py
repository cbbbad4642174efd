# SPDX-License-Identifier: Apache-2.0
"""The benchmark from end to end on tiny cases, and that it can't report what is not so."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import __main__ as cli
from benchmarks import contender, measure, report, runner
from benchmarks.cases import OPS, Case
from benchmarks.contender import Missing, loss_contender
from benchmarks.contenders import CONTENDERS, OURS
from sslkernels import reference

SKIPPED = ("torch.compile", "pytorch-metric-learning", "lightly", "info-nce-pytorch")


@pytest.fixture
def instant_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ceilings take seconds; the test of the runner needs only that they reach the rows."""
    run = runner._run

    def instead(job: dict[str, Any], *args: Any, **kwargs: Any) -> list[runner.Row]:
        if job["kind"] != "ceilings":
            return run(job, *args, **kwargs)
        return [
            {"provider": name, "metric": "ceiling", "values": [rate] * 3, "unit": unit, "note": "t"}
            for name, rate, unit in (("fma", 1e12, "FLOP/s"), ("bandwidth", 1e11, "B/s"))
        ]

    monkeypatch.setattr(runner, "_run", instead)


def test_one_command_writes_everything(
    instant_ceilings: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--op", "nt_xent", "--sizes", "64", "--dim", "16", "--time", "0.01"]
    arguments += ["--threads", "2", "--contenders", OURS, "eager", "nobody"]
    assert cli.main([*arguments, "--out", str(tmp_path)]) == 0
    assert "nobody missing: no such contender" in capsys.readouterr().out
    with (tmp_path / "bench.csv").open(newline="", encoding="utf-8") as file:
        header = next(csv.reader(file))
    assert tuple(header) == runner.COLUMNS
    rows = report.read_csv(tmp_path / "bench.csv")
    for metric in ("error", "time", "rate", "share"):
        found = {row["provider"] for row in rows if row["metric"] == metric}
        assert found == {OURS, "eager"}, metric
    for row in rows:
        assert row["cpu"] and row["isa"] and row["commit"] and row["date"] and row["torch"]
        if row["metric"] in ("time", "rate", "share"):
            assert 0 < row["p25"] <= row["p50"] <= row["p75"]
    trips = [row["p50"] for row in rows if row["metric"] == "round_trip"]
    assert len(trips) == 1 and 1e-9 < trips[0] < 1e-2
    assert "a cache line took" in (tmp_path / "bench.md").read_text("utf-8")
    time, rate, share = (
        next(r["p50"] for r in rows if r["metric"] == m and r["provider"] == OURS)
        for m in ("time", "rate", "share")
    )
    assert rate == pytest.approx(4 * 64**2 * 16 / time)
    assert share == pytest.approx(100 * rate / 1e12)

    readme = tmp_path / "README.md"
    shutil.copy(runner.ROOT / "README.md", readme)
    before = readme.read_text("utf-8")
    assert cli.main(["readme", "--csv", str(tmp_path / "bench.csv"), "--readme", str(readme)]) == 0
    after = readme.read_text("utf-8")
    assert "nobody missing" in after and "N=64 D=16" in after
    outside = [report.BLOCK.sub("", text) for text in (before, after)]
    assert outside[0] == outside[1]


def test_readme_without_marks_is_refused(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("no marks", "utf-8")
    with pytest.raises(ValueError, match="one pair"):
        report.write_readme([_row()], readme)
    assert readme.read_text("utf-8") == "no marks"


@pytest.mark.parametrize("op", OPS)
def test_every_contender_here_is_verified(op: str) -> None:
    case = Case(
        op, {"enqueue": 32, "moco": 48, "ema": 3, "features": 2}.get(op, 24), dim=8, batch=16
    )
    truth = case.truth()
    for name in CONTENDERS[op]:
        if name in SKIPPED:
            continue
        try:
            made = measure.make(name, case)
        except Missing:
            assert name not in (OURS, "chunked", "eager")
            continue
        measure.verify(name, case, made, truth)


def test_truth_in_blocks_is_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.cases.TRUTH_BLOCK", 5)
    case = Case("nt_xent", 26, dim=8)
    leaves = [x.detach().double().requires_grad_() for x in case.inputs()["leaves"]]
    loss = reference.nt_xent_loss(*leaves, 0.1)
    assert isinstance(loss, torch.Tensor)
    for got, want in zip(case.truth(), [loss, *torch.autograd.grad(loss, leaves)], strict=True):
        torch.testing.assert_close(got, want.detach(), rtol=1e-12, atol=1e-14)


def test_a_wrong_contender_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(case: Case, x: contender.Inputs) -> contender.Contender:
        return loss_contender(x, lambda a, b: 1.01 * reference.nt_xent_loss(a, b, 0.1))

    monkeypatch.setitem(CONTENDERS["nt_xent"], "wrong", wrong)
    records = measure.measure_times(Case("nt_xent", 16, dim=8), ["wrong"], 0.0)
    assert [record["metric"] for record in records] == ["wrong"]
    assert "float64" in records[0]["note"]


def test_a_contender_that_fails_leaves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(case: Case, x: contender.Inputs) -> contender.Contender:
        raise RuntimeError("not today")

    monkeypatch.setitem(CONTENDERS["nt_xent"], "broken", broken)
    case = Case("nt_xent", 16, dim=8, dtype="float64")
    records = measure.measure_times(case, ["broken", "sslkernels bf16", OURS], 0.0)
    kinds = {record["provider"]: record["metric"] for record in records}
    assert kinds["broken"] == "failed" and kinds["sslkernels bf16"] == "missing"
    assert kinds[OURS] == "time"
    assert records[0]["note"] == "RuntimeError: not today"


def test_a_library_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> Any:
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(contender.importlib, "import_module", absent)
    case = Case("nt_xent", 16, dim=8)
    records = measure.measure_times(case, ["pytorch-metric-learning"], 0.0)
    assert records[0]["metric"] == "missing"
    assert "No module named 'pytorch_metric_learning.losses'" in records[0]["note"]


def test_peak_memory_sees_the_matrix() -> None:
    """Eager holds N x N floats; 1024 rows are 4 MiB each."""
    try:
        before = Path("/proc/self/clear_refs").write_text("5", "ascii")
    except OSError as error:
        pytest.skip(f"the peak can't be reset here: {error}")
    assert before
    (record,) = measure.measure_memory(Case("nt_xent", 1024, dim=16), "eager")
    assert 4 * 2**20 < record["values"][1] < 100 * 2**20


def _row(**changes: Any) -> runner.Row:
    row = {**dict.fromkeys(runner.COLUMNS, ""), "op": "nt_xent", "metric": "time", "size": 64}
    row |= {"provider": OURS, "shape": "N=64 D=16", "dtype": "float32", "allocator": "default"}
    return {**row, "p25": 1.0, "p50": 1.0, "p75": 1.0, **changes}


def test_cases_that_we_lose_are_listed() -> None:
    assert "Nowhere in this run" in report.tables([_row(), _row(provider="eager", p50=2.0)])
    text = report.tables([_row(), _row(provider="eager", p50=0.5)])
    assert "eager takes 500 ms, ours 1 s" in text and "Nowhere in this run" not in text


def test_one_contender_has_one_colour() -> None:
    names = {name for table in CONTENDERS.values() for name in table}
    assert names == set(report.STYLES)
    assert len({colour for colour, _ in report.STYLES.values()}) == len(names)


def test_plots_draw_kept_pages_dashed_in_the_same_colour(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    axes = pytest.importorskip("matplotlib.axes")
    drawn: dict[str, tuple[str, str]] = {}
    plot = axes.Axes.plot

    def note(self: Any, *args: Any, **kwargs: Any) -> Any:
        drawn[kwargs["label"]] = (kwargs["color"], kwargs["ls"])
        return plot(self, *args, **kwargs)

    monkeypatch.setattr(axes.Axes, "plot", note)
    rows = [
        _row(op="clip", size=size, provider=provider, allocator=allocator)
        for size in (64, 128)
        for provider in (OURS, "eager")
        for allocator in (runner.DEFAULT, runner.KEPT)
    ]
    assert "clip_time" in report.plots(rows, tmp_path)
    assert (tmp_path / "clip_time.svg").stat().st_size > 1000
    for provider in (OURS, "eager"):
        colour = report.STYLES[provider][0]
        assert drawn[provider] == (colour, "-")
        assert drawn[f"{provider}, pages kept"] == (colour, "--")
    assert drawn[OURS][0] != drawn["eager"][0]


def test_plans_name_only_contenders_that_exist() -> None:
    for plan in (runner.headline_plan, runner.full_plan):
        jobs = plan({}, None)
        assert {job.case.op for job in jobs} == set(OPS)
        assert {job.allocator for job in jobs} == {runner.DEFAULT, runner.KEPT}
        for job in jobs:
            named = set(job.names) | set(job.left_out)
            assert named <= set(CONTENDERS[job.case.op])
            if job.kind == "time":
                assert named == set(CONTENDERS[job.case.op]), "somebody was dropped silently"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(("nothing", 4), "op must be one of"), (("nt_xent", 5), "even number"), (("moco", 0), "1")],
)
def test_bad_cases_are_refused(arguments: tuple[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Case(*arguments)
