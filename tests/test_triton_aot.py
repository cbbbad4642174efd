# SPDX-License-Identifier: Apache-2.0
"""GPU kernels compiled without a GPU: spills, shared memory, tensor cores, 64-bit divisions.

Compiled here is a sample of the grid of ``make gpu-report``: every kernel on every architecture, with
the configuration that a launch would choose, at dimensions and dtypes that reach every table entry of the
16-bit types, and some D that are no whole chunks.  The whole grid is in ``docs/gpu.md``, and the tests
hold the committed table to the code as it is.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="the GPU backend needs triton (pip install triton)")

from benchmarks import gpu_model, gpu_roofline  # noqa: E402
from sslkernels.backends.triton import aot, configs  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs" / "gpu.md"


def _covering() -> list[aot.Case]:
    found = aot.cases(dims=[128], dtypes=["bfloat16"])  # held x, fused
    found += aot.cases(
        dims=[64], dtypes=["bfloat16"], variants=["forward self", "ranks self", "backward"]
    )
    found += aot.cases(
        dims=[256], dtypes=["float16"], variants=["forward self", "ranks self", "backward ids"]
    )
    found += aot.cases(dims=[256], dtypes=["bfloat16"], variants=["extremes"])
    # Entries of Hopper alone; those that compare ids take the most registers.
    found += aot.cases(("sm_90",), [160], ["float16"], ["backward ids"])
    found += aot.cases(
        ("sm_90",),
        [512],
        ["float16"],
        ["backward", "backward ids", "backward softplus", "attend ids ranks", "extremes"],
    )
    found += aot.cases(("sm_90",), [640, 768], ["float16"], ["panel ids"])
    found += aot.cases(("sm_90",), [768], ["bfloat16"], ["forward rows+cols ids", "ranks self"])
    found += aot.cases(
        dims=[1024],
        dtypes=["float16"],
        variants=[
            "forward self",
            "forward softplus",
            "extremes",
            "panel",
            "panel ids",
            "panel softplus",
            "product",
        ],
    )
    found += aot.cases(dims=[64], dtypes=["float32"], variants=["forward self", "attend"])
    found += aot.cases(dims=[768], dtypes=["float32"], variants=["panel", "product"])
    # Masked chunks whose rows are whole 16 and whole 8 bytes; an odd D.
    found += aot.cases(
        dims=[200],
        dtypes=["float16"],
        variants=["forward self", "backward", "backward softplus", "attend", "extremes"],
    )
    found += aot.cases(dims=[100], dtypes=["float16"], variants=["backward softplus"])
    found += aot.cases(dims=[33], dtypes=["float16"], variants=["forward rows+cols"])
    found += aot.cases(dims=[300], dtypes=["float16"], variants=["panel", "product"])
    return list(dict.fromkeys(found)) + aot.small_cases(dtypes=["bfloat16"])


def test_the_covering_part_covers() -> None:
    """Each kernel on each architecture, and each configuration of their tables."""
    found = _covering()
    kernels = [*aot.VARIANTS, *aot.SMALL]
    assert {(c.variant, c.arch) for c in found} == {(v, a) for v in kernels for a in aot.ARCHS}
    compiled = {(c.arch, aot.VARIANTS[c.variant][1], c.config) for c in found if c.config}
    for arch in aot.ARCHS:
        for table in configs.TABLES:
            for dtype in (torch.float32, torch.bfloat16):
                for D in (64, 128, 160, 200, 256, 512, 640, 768, 1024):
                    config = configs.lookup(table, arch, D, dtype)
                    fused = configs.lookup("fused", arch, D, dtype) is not None
                    if fused and table in ("panel", "product"):
                        continue
                    if config is not None and dtype == torch.bfloat16:
                        assert (arch, table, config) in compiled, (arch, table, D)


@pytest.mark.slow
def test_budgets() -> None:
    """No spills, shared memory within the limit, tensor cores for 16 bits, no 64-bit division."""
    results = aot.compile_cases(_covering(), jobs=2)
    bad = [f"{r.case}: {'; '.join(r.problems)}" for r in results if r.problems]
    assert not bad, "\n".join(bad)
    families = {r.case.arch: set() for r in results}
    for r in results:
        if r.case.dtype != "float32" and r.case.config is not None:
            families[r.case.arch].add(r.usage.tensor_core)
    assert families == {
        "sm_80": {"mma"},
        "sm_90": {"wgmma"},
        "sm_100": {"tcgen05"},
        "gfx942": {"mfma"},
    }


def test_instruction_budgets() -> None:
    """Instructions, shuffles and barriers of the loops over tiles, spills, programs a multiprocessor."""
    assert not gpu_model.budget_lines()


@pytest.mark.parametrize("arch", ["sm_90", "sm_100", "sm_120"])
def test_machine_code_waits_its_turn(arch: str) -> None:
    """Placed while the launch before it runs, a kernel waits before it touches memory: not in PTX alone."""
    config = configs.lookup("fused", arch, 128, torch.bfloat16)
    assert config is not None
    for _, compiled in (
        aot.compile_kernel("backward", arch, "bfloat16", 128, config),
        aot.compile_small("sum", arch, "bfloat16"),
    ):
        assert compiled.metadata.launch_pdl
        assert gpu_model.disassembled(compiled).waits_first


def test_launches_overlap_where_the_device_can() -> None:
    """From compute capability 9.0 on, unless asked otherwise."""
    assert [a for a in aot.ARCHS if configs.compiler_options(a).get("launch_pdl")] == [
        "sm_90",
        "sm_100",
    ]
    assert not any(configs.compiler_options(a, False).get("launch_pdl") for a in aot.ARCHS)
    early = "ld.global.b32 %r1, [%rd1];\ngriddepcontrol.wait;\n"
    late = "griddepcontrol.wait;\nld.global.b32 %r1, [%rd1];\n"
    assert [aot.waits_first(ptx) for ptx in (early, late, "ret;")] == [False, True, False]
    hasty = aot.Usage(64, 0, 0, 101_376, 0, "wgmma", 0, in_turn=False)
    assert hasty.problems("bfloat16") == [
        "reads or writes before the launches before it have ended"
    ]


@pytest.mark.parametrize(
    ("rows", "unit"), [("float32", "*bf16"), ("bfloat16", "*fp32"), ("float16", "*fp32")]
)
@pytest.mark.parametrize("arch", aot.ARCHS)
def test_rows_written_in_another_dtype(arch: str, rows: str, unit: str) -> None:
    """A float32 queue for ``compute_dtype``, and halves of paired keys in float32."""
    usage, compiled = aot.compile_small("normalize", arch, rows, {"unit_ptr": unit})
    assert not usage.problems(rows, "normalize")
    assert unit.removeprefix("*") in str(compiled.src.signature["unit_ptr"])


@pytest.mark.parametrize("name", [*aot.VARIANTS, *aot.SMALL])
def test_nothing_is_assumed_that_a_launch_would_not_find(name: str) -> None:
    """An argument that is not specialised has no alignment, or figures are those of another kernel."""
    if name in aot.SMALL:
        kernel, constants, types = aot.SMALL[name]
    else:
        (kernel, _, constants), types = aot.VARIANTS[name], None
    made = aot.source(kernel, "bfloat16", 128, constants, types)
    for position, *member in made.attrs:
        parameter = kernel.params[position]
        if made.signature[parameter.name][:1] == "*":
            assert not parameter.do_not_specialize_on_alignment, parameter.name
        elif not member:
            assert not parameter.do_not_specialize, parameter.name


def test_a_kernel_over_its_budget_is_reported() -> None:
    """The checks see a spill, a lack of shared memory and a missing tensor core."""
    wide = aot.Case("backward", "sm_80", "bfloat16", 512, configs.Config(128, 64, 128, 8, 2))
    result = aot.compile_case(wide)
    assert any("spilled" in problem for problem in result.problems)
    usage = aot.Usage(64, 0, 200_000, 101_376, 0, "", 5)
    assert [p.split()[0] for p in usage.problems("bfloat16")] == ["shared", "no", "5"]
    assert len(usage.problems("float32")) == 2
    empty = aot.Usage(4, 0, 0, 101_376, 0, "wgmma", 0, stores=False)
    assert [p.split(":")[0] for p in empty.problems("float32", "combine")] == ["writes nothing"]
    # A queue position is divided by K once a key, a place on the line of tiles once a program: outside of
    # any loop.
    few = aot.Usage(64, 0, 0, 101_376, 0, "mma", 3)
    assert not few.problems("bfloat16", "enqueue") and not few.problems("bfloat16", "backward")
    assert few.problems("bfloat16", "normalize") == ["3 64-bit divisions"]


def test_wide_divisions_are_counted() -> None:
    """By a run-time value only: a constant divisor is compiled to shifts or a product."""
    llir = "%1 = sdiv i64 %a, %b\n%2 = urem i64 %a, %c\n%3 = sdiv i64 %a, 128\n%4 = sdiv i32 %d, %e"
    assert aot._wide_divisions(llir) == 2


@pytest.mark.campaign  # a change of a kernel makes `make gpu-report` necessary, which takes minutes
def test_the_committed_table_is_of_these_kernels() -> None:
    """docs/gpu.md was generated from the code as it is: else run `make gpu-report`."""
    text = DOCS.read_text()
    found = re.search(r"kernels and configurations `([0-9a-f]{16})`", text)
    assert found is not None, "docs/gpu.md holds no compiled table: run `make gpu-report`"
    assert found[1] == aot.fingerprint(), "run `make gpu-report`"
    pin = re.search(r"^triton==([\d.]+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert pin is not None and f"with Triton {pin[1]};" in text, (
        "another compiler: `make gpu-report`"
    )
    table = text.split("<!-- generated: compiled -->")[1].split("<!-- end: compiled -->")[0]
    assert "**" not in table, "the committed table has kernels over their budget"
    # Every kernel of the grid has its figures.
    assert len(re.findall(r"\d+ r, \d+ K", table)) == len(aot.grid())


def test_the_committed_roofline_is_that_of_the_model() -> None:
    """And is called a model."""
    text = DOCS.read_text()
    part = text.split("<!-- generated: roofline -->")[1].split("<!-- end: roofline -->")[0]
    assert part.strip().splitlines() == gpu_roofline.table(), "run `make gpu-report`"
    assert "## Roofline: a model, never a measurement" in text


def test_chunks_waste_little() -> None:
    """Widths and counts that cover D; half a chunk where that is less."""
    config = configs.Config(64, 64, 128, 4, 1)
    expected = {
        1: (16, 1),
        16: (16, 1),
        24: (32, 1),
        64: (64, 1),
        96: (128, 1),
        100: (128, 1),
        128: (128, 1),
        129: (64, 3),
        200: (128, 2),
        768: (128, 6),
    }
    assert configs.chunks(configs.Config(128, 64, 256, 8, 3), 300) == (128, 3)
    for D, wanted in expected.items():
        assert configs.chunks(config, D) == wanted
        width, count = wanted
        assert width * (count - 1) < D <= width * count
