# SPDX-License-Identifier: Apache-2.0
"""Machine code of a compiled kernel: instructions, loops, and the paths through a loop.

Reads what ``nvdisasm -c`` prints (Triton ships the tool).  A kernel of tiles has one loop that matters,
the one with the tensor-core instructions; inside it branches leave a short path, which nearly every tile
takes, and longer ones for tiles at an edge.  A loop inside that loop (over chunks of D) is expanded.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

_LINE = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?(\S+)\s*(.*?)\s*;\s*$")
_LABEL = re.compile(r"^(\.L_[\w.]+):")
_TARGET = re.compile(r"`\((\.L_[\w.]+)\)")
_PREDICATE = re.compile(r"^!?U?P(\d|T)$")
_REGISTER = re.compile(r"\b(U?R)(\d+)\b")

GLOBAL = (
    "LDG",
    "LDGSTS",
    "STG",
    "ATOM",
    "ATOMG",
    "RED",
    "REDG",
    "UTMALDG",
    "UTMASTG",
    "UTMAREDG",
    "UBLKCP",
)
TENSOR = ("HGMMA", "HMMA", "QGMMA", "IMMA", "UTCHMMA", "UTCQMMA", "UTCMMA")
_NO_RESULT = (
    "BAR", "BRA", "BSSY", "BSYNC", "DEPBAR", "ERRBAR", "EXIT", "FENCE", "LDGDEPBAR", "LDGSTS", "MEMBAR",
    "NOP", "RED", "RET", "STG", "STL", "STS", "STSM", "SYNCS", "UTMALDG", "WARPGROUP", "WARPSYNC",
)  # fmt: skip


@dataclass(frozen=True)
class Instruction:
    """One line of the listing."""

    address: int
    opcode: str  # with its modifiers, such as "LDS.64"
    operands: tuple[str, ...]
    predicate: str | None  # "P0", "!UP1"
    target: str | None  # label it may jump to

    @property
    def base(self) -> str:
        """The opcode without modifiers."""
        return self.opcode.partition(".")[0]

    @property
    def conditional(self) -> bool:
        """Whether a jump may fall through."""
        return self.predicate is not None or any(
            _PREDICATE.match(operand) for operand in self.operands
        )

    def registers(self) -> tuple[list[str], list[str]]:
        """(Registers and predicates read, written), register ranges written out."""
        parts = list(self.operands)
        targets: list[str] = []
        if self.base not in _NO_RESULT and parts:
            while parts and _PREDICATE.match(parts[0]):  # of comparisons and shuffles
                targets.append(parts.pop(0))
            if parts and (not targets or self.base in ("SHFL", "LOP3", "PLOP3")):
                targets.append(parts.pop(0))
                while len(parts) > 2 and _PREDICATE.match(parts[0]):  # carries
                    targets.append(parts.pop(0))
        written = [name for part in targets for name in _names(part, self._width(True))]
        read = [name for part in parts for name in _names(part, self._width(False))]
        if self.base == "HGMMA" and parts[0].startswith(
            "R"
        ):  # a first factor in registers: 4 of them
            read = _names(parts[0], 4) + [
                n for p in parts[1:] for n in _names(p, self._width(False))
            ]
        if self.predicate is not None:
            read += _names(self.predicate, 1)
        return read, written

    def _width(self, result: bool) -> int:
        """Registers of one operand."""
        found = re.match(r"HGMMA\.64x(\d+)x", self.opcode)
        if found:
            return int(found[1]) // 2  # sums
        if self.base == "HMMA" or ".128" in self.opcode or self.opcode.startswith("LDSM.16.M88.4"):
            return 4
        if ".64" in self.opcode or (result and ".WIDE" in self.opcode) or self.base == "CS2R":
            return 2
        return 1


def _names(operand: str, width: int) -> list[str]:
    """Registers and predicates that an operand names; RZ and PT are none."""
    found = [
        f"{kind}{int(number) + i}"
        for kind, number in _REGISTER.findall(operand)
        for i in range(width if not operand.startswith("[") and "desc" not in operand else 2)
    ]
    plain = operand.lstrip("!")
    if _PREDICATE.match(plain) and not plain.endswith("T"):
        found.append(plain)
    return found


def category(instruction: Instruction) -> str:
    """What budgets are kept in: TENSOR, MUFU, FMA, ALU, SHFL, BAR, SHARED, GLOBAL, CONVERT, OTHER."""
    base = instruction.base
    if base in TENSOR:
        return "TENSOR"
    if base in ("MUFU", "SHFL", "BAR"):
        return base
    if base in ("FADD", "FMUL", "FFMA", "FFMA2", "FADD2", "FMUL2", "IMAD", "HFMA2"):
        return "FMA"
    if base in ("LDS", "STS", "LDSM", "STSM"):
        # "@!PT LDS RZ, [RZ]" only separates; it moves nothing.
        return "OTHER" if instruction.operands[:1] == ("RZ",) else "SHARED"
    if base in ("LDG", "STG", "LDGSTS", "RED", "ATOM", "ATOMG", "UTMALDG", "LD", "ST"):
        return "GLOBAL"
    if base in ("F2FP", "F2F", "F2I", "I2F", "I2FP"):
        return "CONVERT"
    if base.startswith("U") or base in ("BRA", "NOP", "MOV", "DEPBAR", "LDGDEPBAR", "WARPGROUP"):
        return "OTHER"
    alu = ("FSEL", "FSETP", "FMNMX", "ISETP", "SEL", "IADD3", "VIADD", "LEA", "LOP3", "SHF", "PRMT",
           "VIMNMX", "PLOP3", "P2R", "R2P", "IABS", "FMNMX3", "VIADDMNMX", "SGXT", "BMSK")  # fmt: skip
    return "ALU" if base in alu else "OTHER"


class Code:
    """The control-flow graph of one kernel.

    Args:
        listing: What ``nvdisasm -c`` printed.

    Raises:
        ValueError: If the listing holds no instruction.
    """

    def __init__(self, listing: str) -> None:
        """See the class."""
        self.instructions: list[Instruction] = []
        labels: dict[str, int] = {}
        for line in listing.splitlines():
            label = _LABEL.match(line)
            if label:
                labels[label[1]] = len(self.instructions)
                continue
            found = _LINE.match(line)
            if found:
                operands = tuple(part.strip() for part in found[4].split(",") if part.strip())
                target = _TARGET.search(found[4])
                self.instructions.append(
                    Instruction(
                        int(found[1], 16),
                        found[3],
                        operands,
                        found[2],
                        target[1] if target else None,
                    )
                )
        if not self.instructions:
            raise ValueError(f"gpu_sass: no instruction in a listing of {len(listing)} characters")
        # The listing ends with a jump to itself and padding; a loop that an EXIT leaves may come before.
        ends = [i for i, x in enumerate(self.instructions) if labels.get(x.target or "") == i]
        self.instructions = self.instructions[: ends[-1]] if ends else self.instructions
        count = len(self.instructions)
        starts = {0, *(i for i in labels.values() if i < count)}
        jumps = ("BRA", "EXIT", "RET")
        starts |= {i + 1 for i, x in enumerate(self.instructions) if x.base in jumps}
        ordered = sorted(i for i in starts if i < count)
        self.blocks = list(zip(ordered, [*ordered[1:], count], strict=True))
        number = {start: i for i, (start, _) in enumerate(self.blocks)}
        self.next: list[list[int]] = []
        for i, (_, end) in enumerate(self.blocks):
            jump, following = self.instructions[end - 1], [i + 1] if end < count else []
            if jump.base == "BRA":
                there = labels.get(jump.target or "", count)
                ways = [number[there]] if there < count else []
                self.next.append(ways + (following if jump.conditional else []))
            elif jump.base in ("EXIT", "RET"):
                self.next.append(following if jump.conditional else [])
            else:
                self.next.append(following)

    @property
    def waits_first(self) -> bool:
        """Whether the launches before have ended before this one reads or writes global memory.

        Looked at is every way from the entry to the instruction that waits, or to the end.
        """
        seen, todo = set(), [0]
        while todo:
            block = todo.pop()
            if block in seen:
                continue
            seen.add(block)
            bases = [x.base for x in self.of([block])]
            waits = "ACQBULK" in bases
            before = bases[: bases.index("ACQBULK")] if waits else bases
            if set(before) & set(GLOBAL):
                return False
            todo += [] if waits else self.next[block]
        return any(x.base == "ACQBULK" for x in self.instructions)

    def of(self, blocks: Iterator[int] | list[int]) -> list[Instruction]:
        """The instructions of some blocks, in that order."""
        return [x for b in blocks for x in self.instructions[slice(*self.blocks[b])]]

    def loops(self) -> dict[int, frozenset[int]]:
        """Header -> blocks of each natural loop."""
        back: dict[int, list[int]] = {}
        for block, ways in enumerate(self.next):
            for way in ways:
                back.setdefault(way, []).append(block)
        found: dict[int, frozenset[int]] = {}
        for block, ways in enumerate(self.next):
            for header in (way for way in ways if way <= block):
                body, todo = {header}, [block]
                while todo:
                    here = todo.pop()
                    if here not in body and here >= header:
                        body.add(here)
                        todo += back.get(here, [])
                found[header] = frozenset(found.get(header, frozenset()) | body)
        return found

    def paths(self, header: int, trips: int = 1, limit: int = 1 << 14) -> list[list[Instruction]]:
        """Every way once through a loop, shortest first.

        Args:
            header: A key of ``loops()``.
            trips: How often a loop inside it runs.
            limit: Paths to look at, at most.
        """
        loops = self.loops()
        body = loops[header]
        inner = {h: b for h, b in loops.items() if h != header and h in body}
        found: list[list[int]] = []

        def walk(block: int, path: list[int]) -> None:
            if len(found) >= limit:
                return
            if block in inner:
                shortest = min(self._walks(block, inner[block]), key=self._length)
                path = path + shortest * trips
                ways = [w for b in inner[block] for w in self.next[b] if w not in inner[block]]
            else:
                path = [*path, block]
                ways = self.next[block]
            for way in dict.fromkeys(ways):
                if way == header:
                    found.append(path)
                elif way in body and way > block:
                    walk(way, path)

        walk(header, [])
        if inner:  # as often as asked, not "not at all"
            found = [path for path in found if any(block in inner for block in path)]
        return [self.of(path) for path in sorted(found, key=self._length)]

    def _walks(self, header: int, body: frozenset[int]) -> list[list[int]]:
        """Ways once through a loop that holds no other."""
        found: list[list[int]] = []

        def walk(block: int, path: list[int]) -> None:
            path = [*path, block]
            for way in self.next[block]:
                if way == header:
                    found.append(path)
                elif way in body and way > block:
                    walk(way, path)

        walk(header, [])
        return found

    def _length(self, path: list[int]) -> int:
        return sum(end - start for start, end in (self.blocks[b] for b in path))

    def tile_loop(self, trips: int = 0) -> list[list[Instruction]]:
        """Paths of the loop over tiles, shortest first: the first loop with tensor-core instructions.

        A kernel may have more than one such loop: the first is that of the ordinary case.

        Args:
            trips: How often a loop over chunks of D inside it runs; 0 where there is none.

        Raises:
            ValueError: If there is no such loop.
        """
        loops = self.loops()
        inner = [
            header
            for header, body in sorted(loops.items())
            if any(x.base in TENSOR for x in self.of(sorted(body)))
            and not any(other < body and h in body for h, other in loops.items() if h != header)
        ]
        if not inner:
            raise ValueError("gpu_sass: no loop has a tensor-core instruction")
        header = inner[0]
        if trips:
            around = [h for h, body in loops.items() if h != header and header in body]
            if not around:
                raise ValueError("gpu_sass: no loop around the loop over chunks")
            header = min(around, key=lambda h: len(loops[h]))
        return self.paths(header, max(1, trips))

    def longest_loop(self) -> list[Instruction]:
        """The shortest path of the loop with the most instructions; [] if nothing is repeated."""
        loops = self.loops()
        if not loops:
            return []
        header = max(loops, key=lambda h: len(self.of(sorted(loops[h]))))
        return self.paths(header)[0]


def counts(path: list[Instruction]) -> Counter[str]:
    """Instructions by category, and "all"."""
    found = Counter(category(x) for x in path)
    found["all"] = len(path)
    return found
