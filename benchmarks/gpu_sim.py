# SPDX-License-Identifier: Apache-2.0
"""One multiprocessor on paper: how long its warps take for the machine code of a loop.

**A model, never a measurement.**  Four schedulers issue one instruction a clock each, in order within a
warp, as soon as its registers are ready, its unit is free and what it waits for has come.  Programs that
share the multiprocessor run the same loop.  Figures are of an H100 (compute capability 9.0):

* issue rates and units: throughput table of the CUDA C++ programming guide;
* tensor units: 4096 16-bit FLOPs a clock and multiprocessor (H100 data sheet, 989 TFLOP/s on 132 of them at
  1.83 GHz);
* shared memory: 128 bytes a clock; a product reads both of its operands from there, unless the first one is
  in registers;
* latencies: published microbenchmarks of Hopper and Ampere, rounded up.  They are the weakest part, and
  matter least where several programs share a multiprocessor.

Left out: bank conflicts, instruction fetch, register bank conflicts, clocks that fall under load.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from benchmarks.gpu_sass import Instruction, category

SCHEDULERS = 4
TENSOR_MACS = 2048  # 16-bit multiply-adds a clock and multiprocessor
SHARED_BYTES = 128.0  # a clock and multiprocessor
L2_BYTES = 27.5  # a clock and multiprocessor: 5.5 TB/s were published for 114 of them at 1.755 GHz
L2_LATENCY = 280
BARRIER_LATENCY = 20
FENCE_LATENCY = 20
PRODUCT_LATENCY = 30  # from the last multiply-add to the registers


@dataclass(frozen=True)
class Cost:
    """What one instruction of a warp takes."""

    unit: str  # the unit of its scheduler; "" for issue alone
    busy: float  # clocks the unit is taken
    latency: int  # clocks until its result can be read
    shared: float = 0.0  # clocks of the shared memory of the multiprocessor
    l2: float = 0.0  # bytes from the L2 cache


def _bytes(instruction: Instruction) -> int:
    """Bytes a warp moves."""
    for bits in (128, 64, 16):
        if f".{bits}" in instruction.opcode:
            return 32 * bits // 8
    return 128


def cost(x: Instruction) -> Cost:
    """What an instruction takes, by its opcode."""
    kind, base = category(x), x.base
    if base == "HGMMA":
        found = re.match(r"HGMMA\.64x(\d+)x(\d+)", x.opcode)
        if found is None:
            raise ValueError(f"gpu_sim: unknown product {x.opcode}")
        n, k = int(found[1]), int(found[2])
        clocks = 64 * n * k / TENSOR_MACS
        first = 0 if x.operands[1].startswith("R") else 64 * k * 2
        # A quarter each: the four warps of a group issue one product together.
        shared = (first + n * k * 2) / SHARED_BYTES / 4
        return Cost("tensor", clocks, PRODUCT_LATENCY, shared)
    if kind == "TENSOR":  # mma.sync 16 x 8 x 16
        return Cost("tensor", 16 * 8 * 16 / (TENSOR_MACS / SCHEDULERS), 33)
    if kind == "MUFU":
        return Cost("special", 8, 23)
    if kind == "CONVERT":
        return Cost("alu" if base == "F2FP" else "special", 2 if base == "F2FP" else 8, 6)
    if kind == "FMA":
        return Cost("fma", 2 if base == "IMAD" else 1, 5)
    if kind == "ALU":
        return Cost("alu", 2, 5)
    if kind == "SHFL":
        return Cost("memory", 2, 24, 1.0)
    if kind == "SHARED":
        return Cost("memory", 2, 30, _bytes(x) / SHARED_BYTES)
    if kind == "GLOBAL":
        size = float(_bytes(x))
        if base == "LDGSTS":
            return Cost("memory", 2, L2_LATENCY, size / SHARED_BYTES, size)
        if base == "LDG" and size >= 512:  # a tile that goes through registers
            return Cost("memory", 2, L2_LATENCY, size / SHARED_BYTES, size)
        if (
            base == "LDG"
        ):  # short vectors that all warps of a program read: once from L2, then from L1
            return Cost("memory", 2, 40, size / SHARED_BYTES)
        return Cost("memory", 2, 0, 0.0, size)
    if base in ("MEMBAR", "FENCE"):
        return Cost("memory", 2, FENCE_LATENCY)
    return Cost("", 1, 10 if base.startswith("U") or base in ("R2UR", "S2R") else 5)


@dataclass
class _Warp:
    program: int
    position: int = 0
    rounds: int = 0
    blocked_until: float = 0.0
    ready: dict[str, float] = field(default_factory=dict)
    products: list[float] = field(default_factory=list)  # end of each group of products
    last_product: float = 0.0
    copies: list[float] = field(default_factory=list)  # end of each group of copies
    last_copy: float = 0.0
    arrived: int = 0  # barriers this warp has come to


@dataclass(frozen=True)
class Steady:
    """A loop in its steady state on one multiprocessor."""

    clocks: float  # a round of one program, all programs of the multiprocessor counted
    issue: float  # share of issue slots that were used
    tensor: float  # share of time the tensor units worked
    bounds: dict[str, float]  # least clocks a round by each resource alone

    @property
    def reason(self) -> str:
        """The resource with the largest bound."""
        return max(self.bounds, key=lambda name: self.bounds[name])


def bounds(path: list[Instruction], warps: int) -> dict[str, float]:
    """Least clocks a multiprocessor needs for one round of a program, by each resource alone."""
    found: dict[str, float] = {"issue": len(path) * warps / SCHEDULERS, "shared": 0.0, "L2": 0.0}
    for x in path:
        c = cost(x)
        if c.unit:
            found[c.unit] = found.get(c.unit, 0.0) + c.busy * warps / SCHEDULERS
        found["shared"] += c.shared * warps
        found["L2"] += c.l2 * warps / L2_BYTES
    return found


def simulate(path: list[Instruction], warps: int, programs: int, rounds: int = 10) -> Steady:
    """Run a loop body on one multiprocessor.

    Args:
        path: One round, as ``gpu_sass`` gives it.
        warps: Of a program.
        programs: That share the multiprocessor.
        rounds: Of each program; the first third is left out of the figures.
    """
    costs = [cost(x) for x in path]
    names = [x.registers() for x in path]
    units: list[dict[str, float]] = [{} for _ in range(SCHEDULERS)]
    # Reads of products and of everything else are arbitrated: a queue of products delays no load.
    products_free = shared_free = l2_free = 0.0
    all_warps = [_Warp(p) for p in range(programs) for _ in range(warps)]
    per_round = len(path)
    for warp in all_warps:  # not in step: programs start and drift apart
        warp.blocked_until = warp.program * per_round * warps / SCHEDULERS / max(1, programs)
    queues = [all_warps[s::SCHEDULERS] for s in range(SCHEDULERS)]
    arrivals: dict[tuple[int, int], list[_Warp]] = {}
    finished: list[list[float]] = [[] for _ in range(programs)]
    done_warps: dict[tuple[int, int], int] = {}
    now, issued, busy_tensor = 0.0, 0, 0.0
    mark: tuple[float, int, float] | None = None
    skip = rounds // 3
    while any(len(f) < rounds for f in finished):
        soonest = float("inf")
        for s, queue in enumerate(queues):
            for index, warp in enumerate(queue):
                if warp.rounds >= rounds + 2:
                    continue
                x, c = path[warp.position], costs[warp.position]
                read, written = names[warp.position]
                start = warp.blocked_until
                if c.unit and x.base != "HGMMA":
                    start = max(start, units[s].get(c.unit, 0.0))
                for name in read:
                    start = max(start, warp.ready.get(name, 0.0))
                if x.base == "WARPGROUP" and "DEPBAR" in x.opcode:
                    start = max(start, _wait(warp.products, x))
                elif x.base == "DEPBAR":
                    start = max(start, _wait(warp.copies, x))
                if start > now:
                    soonest = min(soonest, start)
                    continue
                # Issue it.
                issued += 1
                warp.blocked_until = now + 1
                if c.unit and x.base != "HGMMA":
                    units[s][c.unit] = now + c.busy
                end = now + c.latency
                if c.shared and x.base != "HGMMA":
                    shared_free = max(shared_free, now) + c.shared
                    end = max(end, shared_free + c.latency)
                if x.base == "HGMMA":
                    products_free = max(products_free, now) + c.shared
                    # Asynchronous: products queue, and the warp goes on.
                    over = max(max(now, units[s].get("tensor", 0.0)) + c.busy, products_free)
                    units[s]["tensor"] = over
                    busy_tensor += c.busy
                    warp.last_product = over
                    end = over + PRODUCT_LATENCY
                    if "gsb0" in x.operands:
                        warp.products.append(end)
                    end = now  # its registers are waited for by the group
                elif category(x) == "TENSOR":
                    busy_tensor += c.busy
                if c.l2:
                    l2_free = max(l2_free, now) + c.l2 / L2_BYTES
                    if x.base == "LDG":
                        end = l2_free + c.latency
                    if x.base == "LDGSTS":
                        warp.last_copy = max(warp.last_copy, l2_free + c.latency)
                if x.base == "LDGDEPBAR":
                    warp.copies.append(warp.last_copy)
                if x.base == "BAR":
                    key = (warp.program, warp.arrived)
                    warp.arrived += 1
                    here = arrivals.setdefault(key, [])
                    here.append(warp)
                    warp.blocked_until = float("inf")
                    if len(here) == warps:
                        for other in here:
                            other.blocked_until = now + BARRIER_LATENCY
                        del arrivals[key]
                elif x.base in ("MEMBAR", "FENCE"):
                    warp.blocked_until = now + c.latency
                for name in written:
                    warp.ready[name] = end
                warp.position += 1
                if warp.position == per_round:
                    warp.position = 0
                    warp.rounds += 1
                    count = done_warps[warp.program, warp.rounds] = (
                        done_warps.get((warp.program, warp.rounds), 0) + 1
                    )
                    if count == warps:
                        finished[warp.program].append(now)
                        if mark is None and all(len(f) >= skip for f in finished):
                            mark = (now, issued, busy_tensor)
                queue.append(queue.pop(index))  # round robin
                soonest = min(soonest, now + 1)
                break
        if soonest == float("inf"):
            raise RuntimeError("gpu_sim: every warp waits for another one")
        now = max(now + 1, float(int(soonest + 0.999999)))
    if mark is None:
        raise RuntimeError("gpu_sim: too few rounds")
    time = now - mark[0]
    rounds_done = (issued - mark[1]) / (per_round * warps)
    return Steady(
        time / rounds_done,
        (issued - mark[1]) / (time * SCHEDULERS),
        (busy_tensor - mark[2]) / (time * SCHEDULERS),
        bounds(path, warps),
    )


def _wait(groups: list[float], x: Instruction) -> float:
    """When at most n groups are left, n being the last operand of the waiting instruction."""
    left = int(x.operands[-1], 16)
    return groups[-1 - left] if len(groups) > left else 0.0
