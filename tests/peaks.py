# SPDX-License-Identifier: Apache-2.0
"""Peak memory as a function of shapes: torch's profiler counts tensors, the extension workspaces."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

_C = pytest.importorskip("sslkernels._C", reason="the C++ extension is not built")

Step = Callable[[], None]


def tensor_peak(step: Step, folder: Path) -> int:
    """Bytes of tensors that a step held at once, at most, beyond those before it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    trace = folder / "trace.json"
    profiler.export_chrome_trace(str(trace))
    events = json.loads(trace.read_text("utf-8"))["traceEvents"]
    # Without a device: CPU.  Events of equal time are in the order of the trace.
    memory = [e for e in events if e.get("name") == "[memory]" and e["args"]["Device Id"] == -1]
    held = peak = 0
    for event in sorted(memory, key=lambda e: (e["ts"], e["args"]["Ev Idx"])):
        held += event["args"]["Bytes"]
        peak = max(peak, held)
    assert memory, "the profiler saw no allocation"
    return peak


def counted_peak(step: Step, folder: Path) -> int:
    """Bytes of tensors and workspaces, as if both had their peaks at once."""
    _C.reset_workspace_peak()
    tensors = tensor_peak(step, folder)
    return tensors + _C.workspace_peak()


class Training:
    """Forward and backward of a loss, on leaves whose gradients are then there."""

    def __init__(self, loss: Callable[..., Tensor], *inputs: Tensor) -> None:
        self.loss, self.leaves = loss, [x.detach().requires_grad_() for x in inputs]

    def step(self) -> None:
        self.loss(*self.leaves).backward()

    def peak(self, folder: Path) -> int:
        """Of a process that has done it before: the first time, torch makes things that stay."""
        collects = gc.isenabled()
        gc.disable()  # what ran before may have left tensors in cycles, which are not to be freed now
        try:
            self.step()
            for leaf in self.leaves:
                leaf.grad = None
            return counted_peak(self.step, folder)
        finally:
            if collects:
                gc.enable()
