# SPDX-License-Identifier: Apache-2.0
"""The cost model: reading machine code, a multiprocessor on paper, dealing a grid, what is launched."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the GPU backend needs triton (pip install triton)")

from benchmarks import gpu_model, gpu_sass, gpu_sim  # noqa: E402

ROOT = Path(__file__).parents[1]

# A loop over tiles as nvdisasm prints it: two products, and an edge that most tiles skip.
LISTING = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/                   S2R R0, SR_CTAID.X ;
.L_x_0:
        /*0020*/                   LDS.128 R4, [R0] ;
        /*0030*/                   HMMA.16816.F32.BF16 R8, R4, R2, R8 ;
        /*0040*/                   HMMA.16816.F32.BF16 R8, R4, R2, R8 ;
        /*0050*/              @!P1 BRA `(.L_x_1) ;
        /*0060*/                   FSEL R8, R8, -INF , P2 ;
        /*0070*/                   FSEL R9, R9, -INF , P2 ;
.L_x_1:
        /*0080*/                   FFMA R10, R8, R3, R5 ;
        /*0090*/                   MUFU.EX2 R10, R10 ;
        /*00a0*/                   SHFL.BFLY PT, R11, R10, 0x1, 0x1f ;
        /*00b0*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*00c0*/                   IADD3 R0, R0, 0x1, RZ ;
        /*00d0*/              @P0  BRA `(.L_x_0) ;
        /*00e0*/                   STG.E [R6.64], R10 ;
        /*00f0*/                   EXIT ;
.L_x_2:
        /*0100*/                   BRA `(.L_x_2) ;
"""


def test_paths_of_a_loop() -> None:
    """The short path skips the edge; what comes before and after the loop is no part of it."""
    short, long = gpu_sass.Code(LISTING).tile_loop()
    assert [x.base for x in long if x not in short] == ["FSEL", "FSEL"]
    found = gpu_sass.counts(short)
    assert found == {
        "TENSOR": 2,
        "SHARED": 1,
        "OTHER": 2,
        "FMA": 1,
        "MUFU": 1,
        "SHFL": 1,
        "BAR": 1,
        "ALU": 1,
        "all": 10,
    }
    assert gpu_sass.counts(long)["ALU"] == 3


def test_a_loop_that_is_left_by_an_exit() -> None:
    """What stands behind the EXIT and jumps back belongs to the loop; the jump to itself ends the listing."""
    text = """
.L_x_0:
        /*0000*/                   HMMA.16816.F32.BF16 R8, R4, R2, R8 ;
        /*0010*/               @P0 EXIT ;
        /*0020*/                   IADD3 R1, R1, 0x1, RZ ;
        /*0030*/                   BRA `(.L_x_0) ;
.L_x_1:
        /*0040*/                   BRA `(.L_x_1);
        /*0050*/                   NOP ;
"""
    (only,) = gpu_sass.Code(text).tile_loop()
    assert [x.base for x in only] == ["HMMA", "EXIT", "IADD3", "BRA"]


def test_whether_a_kernel_waits_before_it_touches_memory() -> None:
    """On every way to the wait, and not after it."""
    text = """
        /*0000*/                   S2R R0, SR_TID.X ;
        /*0010*/               @P0 BRA `(.L_x_0) ;
        /*0020*/                   {} ;
.L_x_0:
        /*0030*/                   ACQBULK ;
        /*0040*/                   LDG.E R2, [R4.64] ;
        /*0050*/                   EXIT ;
"""
    assert gpu_sass.Code(text.format("STS [R0], R1")).waits_first
    assert not gpu_sass.Code(text.format("LDG.E R1, [R2.64]")).waits_first
    assert not gpu_sass.Code(text.format("EXIT").replace("ACQBULK", "NOP")).waits_first
    without = text.format("NOP").replace("ACQBULK", "NOP").replace("LDG.E R2, [R4.64]", "NOP")
    assert not gpu_sass.Code(without).waits_first


def test_registers_of_an_instruction() -> None:
    """Ranges are written out, predicates included; a shuffle writes two results."""
    short, _ = gpu_sass.Code(LISTING).tile_loop()
    load, product, shuffle = short[0], short[1], next(x for x in short if x.base == "SHFL")
    assert load.registers() == (["R0", "R1"], ["R4", "R5", "R6", "R7"])
    assert set(product.registers()[1]) == {"R8", "R9", "R10", "R11"}
    assert shuffle.registers() == (["R10"], ["R11"])


def test_a_listing_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="no instruction"):
        gpu_sass.Code("nothing here")
    plain = re.sub(r".*HMMA.*\n", "", LISTING)
    with pytest.raises(ValueError, match="no loop has a tensor-core instruction"):
        gpu_sass.Code(plain).tile_loop()


def test_a_multiprocessor_on_paper() -> None:
    """Never faster than any resource allows; more programs hide latency; the longer path takes longer."""
    short, long = gpu_sass.Code(LISTING).tile_loop()
    bounds = gpu_sim.bounds(short, 4)
    # 4 warps, 4 schedulers: 10 instructions to issue, 8 clocks of MUFU, 2 products of 2048 multiply-adds.
    assert bounds["issue"] == 10 and bounds["special"] == 8
    assert bounds["tensor"] == 2 * 16 * 8 * 16 / (gpu_sim.TENSOR_MACS / 4)
    one, two = (gpu_sim.simulate(short, 4, programs) for programs in (1, 2))
    assert max(bounds.values()) <= two.clocks < one.clocks
    assert 0 < one.issue < two.issue <= 1 and 0 < one.tensor < two.tensor <= 1
    assert gpu_sim.simulate(long, 4, 1).clocks > one.clocks


def test_dealing_a_grid() -> None:
    """(Makespan, efficiency) by hand."""
    assert gpu_model.deal([3, 3, 3], 2) == (6, 9 / 12)
    assert gpu_model.deal([4, 1, 1, 1, 1], 2) == (4, 1.0)
    assert gpu_model.deal([5], 10) == (5, 0.1)


def test_programs_that_fit() -> None:
    """By registers, by shared memory, by warps."""
    assert gpu_model.programs_that_fit(168, 82_432, 4) == 2
    assert gpu_model.programs_that_fit(255, 0, 4) == 2
    assert gpu_model.programs_that_fit(32, 0, 8) == 8
    assert gpu_model.programs_that_fit(255, 98_304, 8) == 1


@pytest.mark.parametrize("problem", gpu_model.PROBLEMS, ids=lambda p: p.name)
def test_what_a_loss_launches(problem: gpu_model.Problem) -> None:
    """Few launches, no second wave, and a schedule that keeps the multiprocessors busy."""
    with gpu_model.recorded() as seen:
        for run in problem.make():
            run()
    assert seen
    if (
        "NT-Xent" in problem.name and int(problem.name.split()[1]) <= 8192
    ):  # beyond, slots are folded
        assert len(seen) <= 8
    for launched in seen:
        if "share" not in launched.arguments or "total" not in launched.arguments:
            continue
        lengths = gpu_model.tiles_of(launched)
        assert sum(lengths) == launched.arguments["total"] and min(lengths) > 0
        config = launched.arguments
        slots = gpu_model.MULTIPROCESSORS * (2 if config["num_warps"] == 4 else 1)
        assert len(lengths) <= max(slots, 1), launched.name
        if "rows" not in problem.name or int(problem.name.split()[1]) >= 8192:
            assert gpu_model.deal(lengths, slots)[1] >= 0.92, launched.name
        else:
            assert len(lengths) >= 128, launched.name


def test_the_committed_model_is_called_one() -> None:
    """docs/gpu.md has the tables, under a heading that says what they are."""
    text = (ROOT / "docs" / "gpu.md").read_text()
    assert "## From machine code: a model, never a measurement" in text
    part = text.split("<!-- generated: model -->")[1].split("<!-- end: model -->")[0]
    for problem in gpu_model.PROBLEMS:
        assert f"| {problem.name} | forward |" in part, "run `make gpu-report`"
