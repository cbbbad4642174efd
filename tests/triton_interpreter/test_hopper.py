# SPDX-License-Identifier: Apache-2.0
"""Tiles of Hopper's table that the interpreter's own does not have: many chunks, held or on chip."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from test_engine import backward, between, forward, make

from sslkernels.backends import triton as backend
from sslkernels.backends.triton import configs, tuning
from sslkernels.backends.triton.runtime import recorded_launches


def hopper(table: str, D: int) -> configs.Config:
    """The tile of the table; the interpreter's are other ones."""
    config = configs.lookup(table, "sm_90", D, torch.bfloat16)
    assert config is not None
    assert config in tuning.candidates(table, D, torch.bfloat16)
    return config


@pytest.mark.parametrize("kind", ["lse", "softplus"])
def test_512_features_on_chip(kind: str) -> None:
    """Hopper's tile in place of panels: the same gradients and weighted keys."""
    case = make(40, 33, 512, kind, dtype=torch.bfloat16)
    drow, dcol = torch.linspace(-1, 1, 40), torch.linspace(-1, 2, 33)
    found = []
    for config, kernel in ((hopper("fused", 512), "backward_kernel"), (None, "panel_kernel")):
        with configs.override(fused=config), recorded_launches() as log:
            grads = backward(case, drow, dcol, True, True)
            found.append(list(grads[:2]))
            if kind == "lse":
                found[-1].append(backend.attend(case.tiles, None).mean_key)
        assert kernel in {entry.kernel for entry in log}
    for ours, panels in zip(*found, strict=True):
        assert ours.any()
        assert (ours - panels).float().norm() < 1e-2 * panels.float().norm()


@pytest.mark.parametrize(("cross", "D"), [(False, 768), (True, 300)])
def test_many_chunks_held(cross: bool, D: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hopper's tiles whose next chunk waits in registers, panels too: what streaming both sides gives."""
    N, M = (200, 180) if cross else (270, None)
    # So few that the wide tiles are taken, not only the narrow ones.
    monkeypatch.setattr(configs, "multiprocessors", lambda device: 4)
    case = make(N, M, D, dtype=torch.bfloat16)
    thresholds = (between(case, 1), between(case, 0) if cross else None)
    drow, dcol = torch.linspace(-1, 1, N), torch.linspace(-1, 2, M or 1)
    found = []
    for held in (True, False):
        tables = {name: hopper(name, D) for name in ("forward", "narrow", "panel")}
        if not held:
            tables = {
                name: dataclasses.replace(config, hold_x=False, prefetch=0)
                for name, config in tables.items()
            }
        with configs.override(fused=None, **tables), recorded_launches() as log:
            sums, ranks = forward(case, cross), forward(case, cross, *thresholds)
            grads = backward(case, drow, dcol if cross else None, True, cross)
        launched = [entry.flags for entry in log if "PREFETCH" in entry.flags]
        assert {flags["BLOCK_N"] for flags in launched} == {64, 128}
        assert {flags["PREFETCH"] for flags in launched} == {int(held)}
        found.append(([sums.row, sums.col, ranks.rank_row, ranks.rank_col], grads[:2]))
    (exact, close), (streamed, near) = found
    for ours, theirs in zip(exact, streamed, strict=True):
        assert torch.equal(ours, theirs)
    for ours, theirs in zip(close, near, strict=True):
        assert (ours - theirs).float().norm() <= 1e-2 * theirs.float().norm()


@pytest.mark.parametrize("M", [150, None])
def test_a_program_sweeps_all_tiles_of_a_panel(M: int | None) -> None:
    """Gradients are those of one tile a program; the bias sums over the tiles of a sweep."""
    case = make(150, M, 24, "softplus")
    drow, dcol = torch.linspace(-1, 1, 150), torch.linspace(-1, 2, 150)
    found = []
    for programs in (1, 1000):
        with configs.override(fused=None, programs=programs), recorded_launches() as log:
            found.append(backward(case, drow, dcol if M else None, True, M is not None))
        shares = {e.arguments["share"] for e in log if e.kernel == "panel_kernel"}
        assert shares == {3 if programs == 1 else 1}
    for ours, tiles in zip(*found, strict=True):
        torch.testing.assert_close(ours, tiles, rtol=1e-5, atol=1e-6)
