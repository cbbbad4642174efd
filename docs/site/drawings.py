# SPDX-License-Identifier: Apache-2.0
"""Draws the SVG pictures of the documentation into docs/assets: ``python docs/site/drawings.py``.

A test draws them again and compares, so what is committed is what this file says.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from html import escape
from pathlib import Path

ASSETS = Path(__file__).resolve().parents[1] / "assets"
CELL = 22
INK, FAINT, LINE = "#1f2933", "#5f6b7a", "#c3cad4"
FILL = {
    "tile": "#b9ccf3",  # computed in tiles
    "mirror": "#e6ecf9",  # known from its mirror image
    "pair": "#f4a742",  # a dot product of its own
    "none": "#ffffff",  # takes no part
    "far": "#f4a742",
    "near": "#3f8f5f",
}
Mark = Callable[[int, int], str]


def text(x: float, y: float, words: str, anchor: str = "start", **style: object) -> str:
    """Words at a place; size 13 unless said."""
    given = {"font-size": 13, "fill": INK, **{k.replace("_", "-"): v for k, v in style.items()}}
    attributes = " ".join(f'{k}="{v}"' for k, v in given.items())
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" {attributes}>{escape(words)}</text>'


def box(
    x: float, y: float, w: float, h: float, fill: str, stroke: str = LINE, **more: object
) -> str:
    """A rectangle."""
    style = "".join(f' {k.replace("_", "-")}="{v}"' for k, v in more.items())
    place = f'x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}"'
    return f'<rect {place} fill="{fill}" stroke="{stroke}"{style}/>'


def arrow(x1: float, y1: float, x2: float, y2: float, colour: str = FAINT) -> str:
    """A line with a head."""
    ends = f'x1="{x1:g}" y1="{y1:g}" x2="{x2:g}" y2="{y2:g}"'
    return f'<line {ends} stroke="{colour}" stroke-width="1.5" marker-end="url(#head)"/>'


def page(width: float, height: float, title: str, *parts: str) -> str:
    """A picture with its title for screen readers."""
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" width="{width:g}" '
        f'height="{height:g}" role="img" font-family="system-ui, sans-serif">'
        f"<title>{escape(title)}</title>"
        '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
        f'orient="auto"><path d="M0 0L8 4L0 8z" fill="{FAINT}"/></marker></defs>'
    )
    ground = box(0, 0, width, height, "#ffffff", "none")
    return "\n".join([head, ground, *parts, "</svg>"]) + "\n"


def grid(x: float, y: float, rows: int, columns: int, mark: Mark) -> Iterator[str]:
    """Cells of S by what happens to them."""
    for i in range(rows):
        for j in range(columns):
            kind = mark(i, j)
            left, top = x + j * CELL, y + i * CELL
            yield box(left, top, CELL, CELL, FILL[kind])
            if kind == "none":
                yield text(left + CELL / 2, top + 15, "×", "middle", fill="#98a2b0", font_size=12)


def matrix(
    title: str,
    shape: tuple[int, int],
    mark: Mark,
    sides: tuple[str, str],
    legend: Sequence[tuple[str, str]],
    results: Sequence[tuple[str, str]],
    *,
    block: tuple[int, int] | None = (0, 4),
) -> str:
    """S with the part of every cell, what is reduced along which side, and a legend.

    Args:
        title: Of the picture.
        shape: Rows and columns drawn.
        mark: The kind of cell (i, j).
        sides: What rows and columns are.
        legend: Kind and words.
        results: "row" or "column" and what is taken along it.
        block: Row and column at which the highlighted tile of 4 x 4 begins.
    """
    rows, columns = shape
    x, y = 96, 52
    right, bottom = x + columns * CELL, y + rows * CELL
    parts = [*grid(x, y, rows, columns, mark)]
    parts.append(text((x + right) / 2, 30, sides[1], "middle"))
    middle = (y + bottom) / 2
    rotate = f"rotate(-90 40 {middle:g})"
    parts.append(text(40, middle, sides[0], "middle", transform=rotate))
    if block is not None:
        corner = (x + block[1] * CELL, y + block[0] * CELL)
        parts.append(box(*corner, 4 * CELL, 4 * CELL, "none", "#2346a8", stroke_width=3))
    legend_x, extra = right + 40, 0
    for side, words in results:
        if side == "row":
            parts += [arrow(right + 4, y + 11, right + 34, y + 11)]
            parts += [text(right + 40, y + 15, words)]
        else:
            parts += [arrow(x + 11, bottom + 4, x + 11, bottom + 30)]
            parts += [text(x + 22, bottom + 28, words)]
            extra = 34
    entries = [*legend, *([("block", "one tile: computed, reduced, forgotten")] if block else [])]
    top = y + 52
    for n, (kind, words) in enumerate(entries):
        place = (legend_x, top + n * 26, 16, 16)
        if kind == "block":
            parts.append(box(*place, "none", "#2346a8", stroke_width=3))
        else:
            parts.append(box(*place, FILL[kind]))
        if kind == "none":
            parts.append(
                text(legend_x + 8, top + n * 26 + 12, "×", "middle", fill="#98a2b0", font_size=12)
            )
        parts.append(text(legend_x + 24, top + n * 26 + 13, words))
    height = max(bottom + 24 + extra, top + len(entries) * 26 + 10)
    return page(legend_x + 360, height, title, *parts)


# ------------------------------------------------------------------------------------- losses

POSITIVE = ("pair", "positive: a dot product of its own")
NEGATIVE = ("tile", "negative: in the tiles")
OUT = ("none", "takes no part")


def _nt_xent(i: int, j: int) -> str:
    if i == j:
        return "none"
    return "pair" if abs(i - j) == 4 else "tile" if j > i else "mirror"


def _dcl(i: int, j: int) -> str:
    return "none" if i == j else _nt_xent(i, j)


def _diagonal(i: int, j: int) -> str:
    return "pair" if i == j else "tile"


CLASSES = (0, 0, 0, 1, 1, 2, 2, 2)


def _sup_con(i: int, j: int) -> str:
    if i == j:
        return "none"
    return "tile" if j > i else "mirror"


def _triplet(i: int, j: int) -> str:
    if i == j:
        return "none"
    if i == 3 and j == 4:
        return "far"
    if i == 3 and j == 6:
        return "near"
    return "tile"


def losses() -> dict[str, str]:
    """A picture for each loss."""
    both = "z1 above z2"
    mirror = ("mirror", "S = Sᵀ: taken from the other triangle")
    return {
        "nt_xent": matrix(
            "NT-Xent: the upper triangle of 2N by 2N similarities",
            (8, 8),
            _nt_xent,
            (both, both),
            [POSITIVE, NEGATIVE, mirror, ("none", "a row with itself")],
            [("row", "log-sum-exp of each row")],
        ),
        "info_nce": matrix(
            "InfoNCE in the batch: queries by keys",
            (6, 6),
            _diagonal,
            ("queries", "keys of the batch"),
            [POSITIVE, NEGATIVE],
            [("row", "log-sum-exp of each row")],
            block=(0, 2),
        ),
        "info_nce_queue": matrix(
            "InfoNCE with a queue: queries by the own key and the queue",
            (6, 12),
            lambda i, j: "pair" if j == 0 else "tile",
            ("queries", "own key | queue"),
            [POSITIVE, ("tile", "queue: read once, no gradient, never copied")],
            [("row", "log-sum-exp and weighted mean key")],
            block=(1, 5),
        ),
        "clip": matrix(
            "CLIP: images by texts, reduced along both sides",
            (6, 6),
            _diagonal,
            ("images", "texts"),
            [POSITIVE, NEGATIVE],
            [
                ("row", "log-sum-exp of each image"),
                ("column", "log-sum-exp of each text, same pass"),
            ],
            block=(0, 2),
        ),
        "siglip": matrix(
            "SigLIP: images by texts, a sum of softplus",
            (6, 6),
            _diagonal,
            ("images", "texts"),
            [("pair", "softplus(−l) of N dot products"), ("tile", "softplus(l): in the tiles")],
            [("row", "sum of each row")],
            block=(0, 2),
        ),
        "sup_con": matrix(
            "SupCon: all rows by all rows, positives through sums of classes",
            (8, 8),
            _sup_con,
            ("rows", "rows"),
            [("tile", "denominator: every other row"), mirror, ("none", "a row with itself")],
            [
                ("row", "log-sum-exp of each row"),
                ("column", "numerators: zᵢ · (sum of its class − zᵢ)"),
            ],
        ),
        "dcl": matrix(
            "DCL: the positive is not in the denominator",
            (8, 8),
            _dcl,
            (both, both),
            [("pair", "positive: numerator only"), NEGATIVE, mirror, ("none", "a row with itself")],
            [("row", "log-sum-exp of each row")],
        ),
        "byol": matrix(
            "BYOL and SimSiam: N dot products and nothing else",
            (6, 6),
            lambda i, j: "pair" if i == j else "none",
            ("predictions", "targets"),
            [("pair", "one cosine a row"), ("none", "never computed")],
            [("row", "2 − 2 cos")],
            block=None,
        ),
        "triplet": matrix(
            "Batch-hard triplet: the largest and the smallest distance of each row",
            (8, 8),
            _triplet,
            ("anchors", "rows, sorted by class"),
            [
                ("far", "farthest row of the class of row 4"),
                ("near", "nearest row of another class"),
                ("tile", "distance: in the tiles"),
                ("none", "a row with itself"),
            ],
            [("row", "arg-max and arg-min of each row")],
        ),
        "pairs": matrix(
            "Pair losses: N distances and nothing else",
            (6, 6),
            lambda i, j: "pair" if i == j else "none",
            ("a", "b"),
            [("pair", "one distance a pair"), ("none", "never computed")],
            [("row", "depends on sameᵢ and margin")],
            block=None,
        ),
        "uniformity": matrix(
            "Uniformity: all pairs of rows once",
            (8, 8),
            lambda i, j: "none" if j <= i else "tile",
            ("rows", "rows"),
            [("tile", "exp(−t d²): in the tiles"), ("none", "the same pair, or a row with itself")],
            [("row", "log of the mean over all pairs")],
        ),
    }


# ------------------------------------------------------------------------------- how it works


def card(x: float, y: float, w: float, lines: Sequence[str], fill: str = "#eef2fb") -> str:
    """A box with centred lines, the first one bold."""
    parts = [box(x, y, w, 18 + 18 * len(lines), fill, "#8fa3c8", rx=6)]
    for n, line in enumerate(lines):
        weight = 600 if n == 0 else 400
        parts.append(text(x + w / 2, y + 22 + 18 * n, line, "middle", font_weight=weight))
    return "\n".join(parts)


def engine() -> str:
    """Forward and backward pass of one tile."""

    def row(y: float, cards: Sequence[tuple[float, float, Sequence[str]]]) -> list[str]:
        parts = []
        for n, (x, w, lines) in enumerate(cards):
            parts.append(card(x, y, w, lines))
            if n:
                before = cards[n - 1]
                parts.append(arrow(before[0] + before[1] + 2, y + 36, x - 2, y + 36))
        return parts

    first = [
        (20, 150, ["64 rows of Q,", "64 rows of K", "packed, in cache"]),
        (205, 150, ["S = scale · Q Kᵀ", "8 × 32 at a time,", "in registers"]),
        (390, 150, ["exp(S − max)", "masked at edges", "in registers"]),
        (575, 205, ["sum of rows and columns", "N numbers each:", "all that is kept"]),
    ]
    second = [
        (20, 150, ["the same rows", "and the log-sum-exps", "of the forward pass"]),
        (205, 150, ["S again", "recomputed, not", "read from memory"]),
        (390, 150, ["G = a e^(S−row)", "+ b e^(S−column)", "64 × 64 in L1"]),
        (575, 205, ["dQ += G K,  dK += Gᵀ Q", "dscale += Σ G S / scale", "G is forgotten"]),
    ]
    return page(
        800,
        270,
        "A tile in the forward and in the backward pass",
        text(20, 26, "forward", font_weight=600),
        *row(38, first),
        text(20, 158, "backward", font_weight=600),
        *row(170, second),
    )


def register_tile() -> str:
    """The micro-kernel of the CPU engine with AVX-512."""
    x, y, cell, step = 170, 80, 20, 9
    parts = [text(20, 26, "for each feature k:", font_weight=600)]
    for j in range(32):  # a packed row of K: two registers
        fill = "#b9ccf3" if j < 16 else "#dbe4f8"
        parts.append(box(x + j * step, y - 34, step, cell, fill))
    parts.append(text(x + 16 * step, y - 42, "32 numbers of K: 2 loads", "middle", font_size=12))
    for i in range(8):
        parts.append(box(x - 40, y + i * cell, 20, cell, "#f4a742"))
        for half in range(2):
            place = (x + half * 16 * step, y + i * cell, 16 * step, cell)
            parts.append(box(*place, "#eef2fb", "#8fa3c8"))
    parts.append(text(x - 48, y + 75, "8 numbers of Q:", "end", font_size=12))
    parts.append(text(x - 48, y + 92, "8 broadcasts", "end", font_size=12))
    right = x + 32 * step + 16
    parts.append(text(right, y + 40, "16 registers of sums:"))
    parts.append(text(right, y + 60, "16 multiply-adds"))
    parts.append(text(right, y + 96, "after the last k they hold S:"))
    parts.append(text(right, y + 116, "mask, exp, sums of rows, sums of columns"))
    return page(800, 256, "A tile in registers", *parts)


def rounds(blocks: int = 4) -> list[list[tuple[int, int]]]:
    """The tournament of ``blocks`` groups: first each alone, then rounds of disjoint pairs."""
    seats = list(range(blocks))
    found = [[(i, i) for i in seats]]
    for _ in range(blocks - 1):
        pairs = zip(seats[: blocks // 2], reversed(seats[blocks // 2 :]), strict=True)
        found.append(sorted((min(p), max(p)) for p in pairs))
        seats = [seats[0], seats[-1], *seats[1:-1]]
    return found


def tournament() -> str:
    """Which blocks of S = Sᵀ are computed together."""
    parts = []
    for n, pairs in enumerate(rounds()):
        x = 20 + n * 170
        title = "each group with itself" if n == 0 else f"round {n}"
        parts.append(text(x + 60, 24, title, "middle", font_weight=600))
        for i in range(4):
            for j in range(4):
                on = (i, j) in pairs
                fill = (
                    ("#f4a742", "#3f8f5f", "#2346a8", "#b2567d")[pairs.index((i, j))]
                    if on
                    else "#f3f5f8"
                )
                parts.append(box(x + j * 30, 36 + i * 30, 30, 30, fill))
    words = "Within a round no two pairs share a group, so two threads never add to the same rows:"
    parts.append(text(20, 182, words))
    parts.append(
        text(
            20,
            202,
            "no locks, no atomics, and an order of additions that does not depend on the threads.",
        )
    )
    return page(700, 216, "The schedule of blocks", *parts)


def queue() -> str:
    """A batch that wraps around the end of a queue."""
    parts = []
    for i in range(10):
        new = i in (8, 9, 0, 1)
        parts.append(box(30 + i * 48, 50, 48, 40, "#f4a742" if new else "#b9ccf3"))
        parts.append(text(54 + i * 48, 75, f"row {i}", "middle", font_size=12))
    parts.append(text(30, 32, "before: queue_ptr = 8; a batch of 4 keys goes to rows 8, 9, 0, 1"))
    parts.append(arrow(126 + 24, 124, 126 + 24, 94))
    parts.append(text(30, 150, "after: queue_ptr = 2, the row that is written next; fill = 10"))
    parts += [
        box(330, 104, 16, 16, "#f4a742"),
        text(352, 117, "newest"),
        box(420, 104, 16, 16, "#b9ccf3"),
        text(442, 117, "older"),
    ]
    return page(560, 166, "A queue is a ring", *parts)


def grad_cache() -> str:
    """The three passes of cached_step."""
    parts = []
    for n, title in enumerate(
        ("1  encode, keep no activations", "2  one loss", "3  encode again, backward")
    ):
        parts.append(text(20 + n * 250, 24, title, font_weight=600))
    for i in range(4):
        y = 40 + i * 34
        parts += [box(20, y, 90, 26, "#e6ecf9"), text(65, y + 18, f"part {i + 1}", "middle")]
        parts += [
            arrow(114, y + 13, 146, y + 13),
            box(150, y, 50, 26, "#b9ccf3"),
            text(175, y + 18, "z", "middle"),
        ]
        parts += [box(410, y, 60, 26, "#f4a742"), text(440, y + 18, "dL/dz", "middle")]
        parts += [arrow(474, y + 13, 516, y + 13), box(520, y, 90, 26, "#b9ccf3")]
        parts += [text(565, y + 18, f"part {i + 1}", "middle"), text(622, y + 18, "→ .grad")]
    parts += [
        box(270, 40, 90, 128, "#eef2fb", "#8fa3c8", rx=6),
        text(315, 100, "loss of all z", "middle", font_size=12),
    ]
    parts += [arrow(204, 104, 266, 104), arrow(364, 104, 406, 104)]
    parts.append(
        text(
            20,
            200,
            "Activations are held for one part at a time, in pass 3 only. All z and dL/dz are N · D numbers.",
        )
    )
    return page(740, 216, "cached_step in three passes", *parts)


def tree() -> str:
    """Which loss fits: questions to the left, answers to the right."""
    steps = [
        (
            "Do you have labels?",
            "yes: a class a row",
            ["sup_con_loss", "triplet_loss for distances"],
        ),
        (
            "Two towers (image, text)?",
            "yes",
            ["clip_loss; siglip_loss where no", "softmax over the batch is wanted"],
        ),
        ("Given pairs, same or not?", "yes", ["contrastive_loss, margin_loss"]),
        (
            "Do you want negatives at all?",
            "no",
            ["byol_loss, with an EMA target;", "simsiam_loss without one"],
        ),
        (
            "Is the batch large enough?",
            "no, and memory is short",
            ["MoCoLoss: a queue of keys;", "or cached_step: a larger batch"],
        ),
        ("Must a query find its key?", "yes", ["info_nce_loss (MoCo v3, retrieval)"]),
    ]
    parts, y = [], 20
    for question, answer, names in steps:
        parts.append(card(20, y, 250, [question]))
        parts.append(arrow(272, y + 18, 448, y + 18))
        parts.append(text(360, y + 12, answer, "middle", font_size=12, fill=FAINT))
        parts.append(card(452, y, 268, names, "#fdf1dd"))
        down = "no" if answer.startswith("yes") else "yes"
        parts.append(arrow(145, y + 38, 145, y + 76))
        parts.append(text(154, y + 60, down, font_size=12, fill=FAINT))
        y += 78
    parts.append(
        card(20, y, 250, ["nt_xent_loss (SimCLR);", "dcl_loss for small batches"], "#fdf1dd")
    )
    return page(740, y + 70, "Which loss fits", *parts)


def drawings() -> dict[str, str]:
    """File name to picture."""
    named = {f"tile_{name}": picture for name, picture in losses().items()}
    named |= {
        "register_tile": register_tile(),
        "engine": engine(),
        "tournament": tournament(),
        "queue": queue(),
    }
    named |= {"grad_cache": grad_cache(), "choose": tree()}
    return {f"{name}.svg": picture for name, picture in named.items()}


if __name__ == "__main__":
    for name, picture in drawings().items():
        ASSETS.joinpath(name).write_text(picture, "utf-8")
