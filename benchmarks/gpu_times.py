# SPDX-License-Identifier: Apache-2.0
"""Where the time of a step goes: host and device apart, forward and backward apart, kernel by kernel.

* host: until the calls have returned, on a device that had nothing to do;
* graph: the device alone, which replays the step from a CUDA graph, with the L2 cache flushed before each;
* kernels: what torch's profiler saw on the device, and the sum of their times.  What the graph takes beyond
  that sum are the gaps between them.

The backward pass is the step less the forward pass.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from benchmarks.contender import Contender

Step = Callable[[], object]
Timer = Callable[[Step, int], float]
SAMPLES = 21
LEAST = 3
GRAPH_SECONDS = 0.2  # of replays, for each step
HOST_SECONDS = 1.0  # after which LEAST samples of the host are enough


@dataclass(frozen=True)
class Kernels:
    """What the device did in one step: name -> times in seconds, in the order in which they began."""

    times: dict[str, list[float]] = field(default_factory=dict)

    @property
    def launches(self) -> int:
        return sum(len(times) for times in self.times.values())

    @property
    def seconds(self) -> float:
        return sum(sum(times) for times in self.times.values())


@dataclass
class Split:
    """Seconds of "step" and "forward", as far as they could be measured; ``notes`` say why not."""

    host: dict[str, float] = field(default_factory=dict)
    graph: dict[str, float] = field(default_factory=dict)
    kernels: Kernels = field(default_factory=Kernels)
    notes: list[str] = field(default_factory=list)


def host_seconds(step: Step, wait: Callable[[], None]) -> float:
    """Median time until a step returns, each on an idle device."""
    seconds: list[float] = []
    begin = time.perf_counter()
    while len(seconds) < SAMPLES:
        wait()
        start = time.perf_counter()
        if len(seconds) >= LEAST and start - begin > HOST_SECONDS:
            break
        step()
        seconds.append(time.perf_counter() - start)
    wait()
    return statistics.median(seconds)


def warm_up(step: Step) -> None:
    """Three times on another stream, which a capture asks for."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)


def captured(step: Step) -> Step:
    """A CUDA graph of a step, to be replayed."""
    warm_up(step)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def profiled(step: Step, wait: Callable[[], None]) -> Kernels:
    """What the profiler sees on the device in one step."""
    step()
    wait()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        step()
        wait()
    seen = [
        (event.time_range.start, event.name, event.time_range.elapsed_us() * 1e-6)
        for event in profiler.events() or []
        if event.device_type == torch.autograd.DeviceType.CUDA
    ]
    times: dict[str, list[float]] = {}
    for _, name, seconds in sorted(seen):
        times.setdefault(name, []).append(seconds)
    return Kernels(times)


def graph_seconds(step: Step, timer: Timer, graph: Callable[[Step], Step]) -> float:
    """Median time of a replayed step."""
    replay = graph(step)
    once = timer(replay, 1)
    repeats = max(1, min(SAMPLES, int(GRAPH_SECONDS / max(once, 1e-6))))
    return statistics.median(timer(replay, 1) for _ in range(repeats))


def split(
    contender: Contender,
    timer: Timer,
    wait: Callable[[], None],
    graph: Callable[[Step], Step] = captured,
    profile: Callable[[Step, Callable[[], None]], Kernels] = profiled,
) -> Split:
    """Measure one contender, which has run before.

    Args:
        contender: Whose step; without ``forward`` only the whole is measured.
        timer: (step, repeats) -> seconds a call on the device.
        wait: Until the device has nothing to do.
        graph: Captures a step and returns how to replay it.
        profile: Kernels of a step.
    """
    found = Split()
    steps = {"step": contender.step, "forward": contender.forward}
    for name, step in steps.items():
        if step is None:
            continue
        found.host[name] = host_seconds(step, wait)
        try:
            found.graph[name] = graph_seconds(step, timer, graph)
        except torch.cuda.OutOfMemoryError:
            found.notes.append(f"CUDA graph of the {name}: out of memory")
        except Exception as error:  # whatever a library does in a capture
            found.notes.append(f"CUDA graph of the {name}: {_short(error)}")
    try:
        found.kernels = profile(contender.step, wait)
    except Exception as error:  # CUPTI may be missing, or another program may hold it
        found.notes.append(f"profiler: {_short(error)}")
    return found


def _short(error: Exception) -> str:
    lines = str(error).splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:150]}"


def parts(seconds: dict[str, float]) -> str:
    """Milliseconds of forward and backward pass; of the step where they were not measured apart."""
    if "step" not in seconds:
        return ""
    whole = 1e3 * seconds["step"]
    if "forward" not in seconds:
        return f"{whole:.3f}"
    forward = 1e3 * seconds["forward"]
    return f"{forward:.3f} + {max(0.0, whole - forward):.3f}"
