# SPDX-License-Identifier: Apache-2.0
"""What a rank sends and holds for a loss over W ranks, gathered or in a ring: a model, not a measurement.

Bytes are counted from what ``sslkernels._ranks`` sends and keeps (tests compare both with the code).
Overlap compares the time of a block's products with that of its transfer on an assumed machine, given
below; no time here was measured.

    python -m benchmarks.distributed_model           print the table
    python -m benchmarks.distributed_model --write   put it into docs/distributed.md
    python -m benchmarks.distributed_model --check   exit with 1 if docs/distributed.md is not up to date
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "distributed.md"
BEGIN = "<!-- begin benchmarks/distributed_model.py -->"
END = "<!-- end benchmarks/distributed_model.py -->"

# The assumed machine: products of 16-bit rows on one accelerator, and its share of the network.
FLOPS = 300e12  # multiplications and additions a second
LINK = 25e9  # bytes a second, in and out at once
ACC = 4  # bytes of a float32, in which states and gradients are

RANKS = (8, 64, 512, 4096)
ROWS = (256, 2048, 8192)
DIMS = (128, 1024)


@dataclass(frozen=True)
class Step:
    """Forward and backward pass of a loss on one of W ranks, each with N samples of D features."""

    loss: str  # "nt_xent" (also dcl, sup_con: columns are rows) or "clip"
    ranks: int  # W
    rows: int  # N
    dim: int  # D
    element: int = 2  # bytes

    @property
    def block_rows(self) -> int:
        """Rows that one rank holds: both views in NT-Xent."""
        return self.rows * (2 if self.loss == "nt_xent" else 1)

    @property
    def block(self) -> int:
        """Bytes of the rows of one rank."""
        return self.block_rows * self.dim * self.element

    @property
    def gradient(self) -> int:
        """Bytes of the gradient of a block of columns; none travels where columns are rows."""
        return 0 if self.loss == "nt_xent" else self.block_rows * self.dim * ACC

    @property
    def states(self) -> int:
        """Bytes of what the backward pass knows of a block: log-sum-exp and its gradient."""
        return 2 * ACC * self.block_rows

    @property
    def sums(self) -> int:
        """Bytes of the forward pass's sums over columns, for CLIP."""
        return 0 if self.loss == "nt_xent" else ACC * self.block_rows

    def sent(self, mode: str) -> int:
        """Bytes that a rank sends in a step."""
        others = self.ranks - 1
        if mode == "gather":
            return others * (self.block + self.sums + self.states + self.gradient)
        # Rows travel in both passes; sums and gradients make the last step home.
        back = self.ranks * (self.sums + self.gradient)
        return others * (2 * self.block + self.states) + back

    def held(self, mode: str) -> int:
        """Bytes that a rank holds for the columns at most, beside its own rows."""
        if mode == "gather":
            received = self.ranks * self.block
            forward = 2 * received  # parts, and the tensor that they are joined to
            return max(forward, received + self.ranks * (2 * self.gradient + self.states))
        return 2 * (self.block + self.states) + 3 * self.gradient

    def hidden(self) -> float:
        """Share of the ring's transfers that is under way while products are computed."""
        product = 2 * self.block_rows**2 * self.dim / FLOPS  # one of the matrix products
        passes = (
            (product, self.block + self.sums),
            (
                (2 if self.loss == "nt_xent" else 3) * product,
                self.block + self.states + self.gradient,
            ),
        )
        transfer = sum(size / LINK for _, size in passes)
        return sum(min(time, size / LINK) for time, size in passes) / transfer


def size(count: float) -> str:
    """Bytes for people."""
    for unit in ("B", "KB", "MB", "GB", "TB"):
        if count < 999.5 or unit == "TB":
            return f"{count:.3g} {unit}"
        count /= 1000
    return ""


def table() -> str:
    """The table of the document."""
    lines = [
        "A model: 16-bit rows; per rank and step, forward and backward. Held: what a rank holds of others",
        "at most. Hidden: share of the ring's transfers while products are computed, if a rank computes",
        f"{FLOPS / 1e12:.0f} TFLOP/s and its link carries {LINK / 1e9:.0f} GB/s each way. Pairs are",
        "NT-Xent / CLIP.",
        "",
        "| W | N | D | gather holds | ring holds | gather sends | ring sends | ring hidden |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for ranks in RANKS:
        for rows in ROWS:
            for dim in DIMS:
                steps = [Step(loss, ranks, rows, dim) for loss in ("nt_xent", "clip")]
                cells = [f"{ranks}", f"{rows}", f"{dim}"]
                for count in ("held", "sent"):
                    for mode in ("gather", "ring"):
                        cells.append(" / ".join(size(getattr(s, count)(mode)) for s in steps))
                cells.append(" / ".join(f"{100 * s.hidden():.0f} %" for s in steps))
                lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.distributed_model",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args(arguments)
    text = DOCUMENT.read_text(encoding="utf-8")
    head, _, rest = text.partition(BEGIN)
    _, _, tail = rest.partition(END)
    fresh = f"{head}{BEGIN}\n\n{table()}\n\n{END}{tail}"
    if args.write:
        DOCUMENT.write_text(fresh, encoding="utf-8")
    elif args.check:
        if text != fresh:
            print("docs/distributed.md is stale: python -m benchmarks.distributed_model --write")
            return 1
    else:
        print(table())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
