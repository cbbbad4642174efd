# SPDX-License-Identifier: Apache-2.0
"""Leave a barrier, a tail or a mask out of a CUDA kernel, and the emulated checks must fail.

A mutant is one replacement in the text of a kernel.  It is compiled as the kernels are and put
through the short checks that the unchanged kernels pass.  A pattern that no longer occurs exactly
once fails too, so that the list follows the sources.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import pytest
from cuda_emulation import checks, toolchain
from cuda_emulation.client import Emulator

pytestmark = [
    pytest.mark.skipif(toolchain.compiler() is None, reason="no C++ compiler"),
    pytest.mark.skipif(
        toolchain.sanitizer_library() is None, reason="the compiler has no address sanitizer"
    ),
]

CHECKS: dict[str, Callable[[Emulator], None]] = {
    "ema.cu": checks.check_ema_small,
    "queue.cu": checks.check_enqueue_small,
}


@dataclass(frozen=True)
class Mutant:
    """One change of one kernel file."""

    name: str
    file: str
    pattern: str  # a regular expression that matches once
    replacement: str

    def text(self) -> str:
        """The changed source."""
        changed, n = re.subn(
            self.pattern,
            self.replacement,
            (toolchain.CUDA / self.file).read_text(),
            flags=re.DOTALL,
        )
        assert n == 1, f"{self.name}: the pattern occurs {n} times in {self.file}, must be once"
        return changed


MUTANTS = [
    Mutant("ema barrier", "ema.cu", r"__syncthreads\(\);", ""),
    Mutant("ema last block", "ema.cu", r"&& is_last_block\(step\)", ""),
    Mutant("ema step", "ema.cu", r"\*step = \(random\.step \+ 1ull\)",
           "*step = (random.step + 0ull)"),
    Mutant("ema head", "ema.cu", r"int head = min\(to_boundary, count\);", "int head = 0;"),
    Mutant("ema head mask", "ema.cu", r"min\(to_boundary, count\)", "to_boundary"),
    Mutant("ema head loop", "ema.cu", r"int i = threadIdx\.x; i < head;",
           "int i = head; i < head;"),
    Mutant("ema source alignment", "ema.cu", r"if \(!is_vector_aligned\(src \+ head\)\)",
           "if (false)"),
    Mutant("ema tail loop", "ema.cu", r"(threadIdx\.x); i < count;", r"\1; i < head;"),
    Mutant("ema tail mask", "ema.cu", r"(threadIdx\.x); i < count;", r"\1; i < count + 1;"),
    Mutant("ema vector mask", "ema.cu", r"for \(; v < n_vectors; v", "for (; v <= n_vectors; v"),
    Mutant("ema pair mask", "ema.cu", r"v \+ kEmaThreads < n_vectors;",
           "v + kEmaThreads <= n_vectors;"),
    Mutant("ema vector remainder", "ema.cu", r"for \(; v < n_vectors; v", "for (; v < 0; v"),
    Mutant("ema grid stride", "ema.cu", r"c < args\.n_chunks; c \+= gridDim\.x",
           "c < args.n_chunks; c += args.n_chunks"),
    Mutant("ema chunk of last tensor", "ema.cu", r"left < kEmaChunk \? left : kEmaChunk",
           "left < kEmaChunk - 1 ? left : kEmaChunk"),
    Mutant("queue barrier", "queue.cu", r"__syncthreads\(\);", ""),
    Mutant("queue last block", "queue.cu", r"&& is_last_block\(args\.queue_ptr\)", ""),
    Mutant("queue row mask", "queue.cu", r"for \(; row < args\.N;", "for (; row <= args.N;"),
    Mutant("queue wrap of a row", "queue.cu", r"place = wrap\((.*?), args\.K\);", r"place = \1;"),
    Mutant("queue wrap of the pointer", "queue.cu",
           r"wrap\(begin \+ \(args\.N - first\), args\.K\)", "(begin + (args.N - first))"),
    Mutant("queue newest rows", "queue.cu", r"args\.N > args\.K \? args\.N - args\.K : 0", "0"),
    Mutant("queue norm tail", "queue.cu",
           r"(int64_t d = n_vectors \* kWidth \+ lane); d < D;", r"\1; d < 0;"),
    Mutant("queue write tail", "queue.cu", r"d < args\.D;", "d < n_vectors * kWidth;"),
    Mutant("queue tail mask", "queue.cu", r"d < args\.D;", "d <= args.D;"),
    Mutant("queue alignment", "queue.cu", r"is_vector_aligned\(key\) && is_vector_aligned\(slot\)",
           "true"),
    Mutant("queue shuffle step", "queue.cu", r"offset > 0; offset /= 2", "offset > 1; offset /= 2"),
    Mutant("queue shuffle mask", "queue.cu", r"0xffffffffu", "0x7fffffffu"),
    Mutant("queue fill", "queue.cu", r"fill < args\.K \? fill : args\.K", "fill"),
    Mutant("queue lane mask of labels", "queue.cu", r"if \(lane == 0 && (args\.labels)",
           r"if (warp == 0 && \1"),
]  # fmt: skip


# One of each kind for each kernel is tried by every run, all of them by the campaigns.
ALWAYS = {
    "ema barrier",
    "ema last block",
    "ema tail mask",
    "ema vector remainder",
    "queue barrier",
    "queue last block",
    "queue write tail",
    "queue wrap of a row",
}


def test_unchanged_kernels_pass() -> None:
    with Emulator(toolchain.build_module("sanitized")) as emulator:
        for check in CHECKS.values():
            check(emulator)


def test_every_barrier_is_among_the_mutants() -> None:
    for file in toolchain.KERNELS:
        barriers = (toolchain.CUDA / file).read_text().count("__syncthreads(")
        mutants = [m for m in MUTANTS if m.file == file and "__syncthreads" in m.pattern]
        assert barriers == len(mutants), f"{file}: {barriers} barriers, {len(mutants)} mutants"
        assert {m.name for m in mutants} <= ALWAYS <= {m.name for m in MUTANTS}


@pytest.mark.slow
@pytest.mark.parametrize(
    "mutant",
    [
        pytest.param(m, id=m.name, marks=[] if m.name in ALWAYS else pytest.mark.campaign)
        for m in MUTANTS
    ],
)
def test_mutant_fails(mutant: Mutant) -> None:
    # The checks raise AssertionError: a wrong result, or a worker that a sanitizer stopped.
    module = toolchain.build_module("sanitized", {mutant.file: mutant.text()})
    with Emulator(module) as emulator, pytest.raises(AssertionError):
        CHECKS[mutant.file](emulator)
