# SPDX-License-Identifier: Apache-2.0
"""Readable tables, the CSV, plots, and the block of README, all from rows of the CSV."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.cases import LOSSES
from benchmarks.contenders import OURS
from benchmarks.runner import COLUMNS, DEFAULT, KEPT, Row

BLOCK = re.compile(
    r"(<!-- (?:bench:start|benchmarks:begin) -->\n).*?(<!-- (?:bench:end|benchmarks:end) -->)",
    re.DOTALL,
)
TITLES = {
    "nt_xent": "NT-Xent, forward + backward",
    "moco": "InfoNCE with a queue (MoCo), forward + backward",
    "enqueue": "Normalise and enqueue keys",
    "ema": "EMA update",
    "info_nce": "InfoNCE in the batch, forward + backward",
    "clip": "CLIP loss, forward + backward",
    "siglip": "SigLIP loss, forward + backward",
    "sup_con": "SupCon loss, forward + backward",
    "triplet": "Batch-hard triplet loss, forward + backward",
    "vae": "Loss of a variational autoencoder, forward + backward",
    "vae_step": "Reparameterise, a linear decoder and that loss, forward + backward",
    "reparameterize": "Reparameterise, forward + backward",
    "features": "Feature reconstruction, forward + backward",
    "adversarial": "Adversarial loss of a discriminator, forward + backward",
}
# One contender has one colour and one marker in every plot.
STYLES = {
    "sslkernels": ("#0072b2", "o"),
    "sslkernels bf16": ("#56b4e9", "o"),
    "sslkernels EMA module": ("#332288", "o"),
    "eager": ("#d55e00", "s"),
    "torch.compile": ("#e69f00", "D"),
    "chunked": ("#009e73", "^"),
    "lightly": ("#cc79a7", "v"),
    "pytorch-metric-learning": ("#882255", "P"),
    "info-nce-pytorch": ("#999933", "X"),
    "inf_cl": ("#117733", "<"),
    "F.linear_cross_entropy": ("#ee3377", "s"),
    "sentence-transformers": ("#004488", "D"),
    "MONAI": ("#88ccee", "^"),
    "open_clip": ("#ddaa33", "v"),
    "MoCo [D, K]": ("#7f7f7f", ">"),
    "torch [K, D]": ("#b15928", "h"),
    "_foreach_lerp_": ("#bfa500", "d"),
    "timm style": ("#aa4499", "*"),
    "mul_ add_ loop": ("#44aa99", "p"),
    "MoCo .data loop": ("#444444", "8"),
    "torch.nn.functional": ("#661100", "H"),
    "torch.distributions": ("#6699cc", "1"),
    "sslkernels tf32x3": ("#1f9ed1", "o"),
    "sslkernels bf16x3": ("#0b5394", "o"),
    "memeff": ("#228833", "<"),
    "siglip-kernel": ("#ccbb44", "<"),
}
NOT_MEASURED = ("missing", "wrong", "failed", "left out")


def write_csv(rows: Iterable[Row], path: Path) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def read_csv(path: Path) -> list[Row]:
    """Rows with numbers where there are numbers."""
    with path.open(newline="", encoding="utf-8") as file:
        rows: list[Row] = [dict(row) for row in csv.DictReader(file)]
    for row in rows:
        for name in ("p25", "p50", "p75"):
            row[name] = float(row[name]) if row[name] else None
        for name in ("size", "dim", "batch"):
            row[name] = int(row[name]) if row[name] else None
    return rows


def _pick(rows: list[Row], **wanted: Any) -> list[Row]:
    return [row for row in rows if all(row[key] == value for key, value in wanted.items())]


def _seconds(s: float) -> str:
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if s >= scale or unit == "µs":
            return f"{s / scale:.3g} {unit}" if s / scale < 1000 else f"{s / scale:.0f} {unit}"
    raise AssertionError("unreachable")


def _time(row: Row) -> str:
    spread = 50 * (row["p75"] - row["p25"]) / row["p50"]
    return f"{_seconds(row['p50'])} ±{spread:.0f}%"


def _memory(row: Row) -> str:
    return f"{row['p50'] / 2**20:.1f} MiB"


def _table(header: list[str], lines: list[list[str]]) -> str:
    """Markdown, padded so that it is readable in a terminal too."""
    widths = [max(len(line[i]) for line in [header, *lines]) for i in range(len(header))]
    rule = ["-" * width for width in widths]
    return "\n".join(
        "| "
        + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        + " |"
        for line in [header, rule, *lines]
    )


def _unique(values: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(values))


def _cases(rows: list[Row]) -> list[tuple[str, str, str]]:
    return _unique((row["shape"], row["dtype"], row["allocator"]) for row in rows)


def _comparison(rows: list[Row], metric: str, show: Callable[[Row], str]) -> str:
    """Lines are shapes, columns are providers; ``(2.1x)``: that many times as much as ours."""
    measured = _pick(rows, metric=metric)
    providers = _unique(row["provider"] for row in measured)
    providers.sort(key=lambda name: name != OURS)
    lines = []
    for shape, dtype, allocator in _cases(measured):
        here = _pick(rows, shape=shape, dtype=dtype, allocator=allocator)
        values = {row["provider"]: row for row in here if row["metric"] == metric}
        reasons = {row["provider"]: row["metric"] for row in here if row["metric"] in NOT_MEASURED}
        label = shape if dtype == "float32" else f"{shape} {dtype}"
        cells = [label if allocator == DEFAULT else f"{label}, malloc {allocator}"]
        ours = values.get(OURS)
        for name in providers:
            if name not in values:
                cells.append(reasons.get(name, "–") if metric == "time" else "–")
                continue
            cell = show(values[name])
            if ours is not None and name != OURS and ours["p50"]:
                cell += f" ({values[name]['p50'] / ours['p50']:.3g}x)"
            cells.append(cell)
        if metric == "time":
            cells += [_share(here)]
        lines.append(cells)
    # As code: Markdown would take the underscores of _foreach_lerp_ for emphasis.
    names = [f"`{name}`" if "_" in name else name for name in providers]
    header = ["shape", *names] + (["ours of the ceiling"] if metric == "time" else [])
    return _table(header, lines)


def _share(here: list[Row]) -> str:
    share = _pick(here, metric="share", provider=OURS)
    rate = _pick(here, metric="rate", provider=OURS)
    if not rate:
        return "–"
    text = f"{rate[0]['p50'] / 1e9:.4g} G{rate[0]['unit']}"
    return text + (f" = {share[0]['p50']:.0f}%" if share else "")


def _losses(rows: list[Row]) -> list[str]:
    """Every case where another contender is faster than ours, by more than 1 %."""
    lines = []
    times = _pick(rows, metric="time")
    for ours in _pick(times, provider=OURS):
        same = {k: ours[k] for k in ("op", "shape", "dtype", "allocator")}
        for row in _pick(times, **same):
            if not row["provider"].startswith(OURS) and row["p50"] < 0.99 * ours["p50"]:
                lines.append(
                    f"- {row['op']} {row['shape']}: {row['provider']} takes "
                    f"{_seconds(row['p50'])}, ours {_seconds(ours['p50'])}"
                )
    return lines


def _missing(rows: list[Row]) -> list[str]:
    groups: dict[tuple[str, str, str, str], list[str]] = {}
    for row in rows:
        if row["metric"] in NOT_MEASURED:
            key = (row["op"], row["provider"], row["metric"], row["note"])
            groups.setdefault(key, []).append(row["shape"])
    return [
        f"- {op}: {provider} {metric}: {note} ({'; '.join(_unique(shapes))})"
        for (op, provider, metric, note), shapes in groups.items()
    ]


def _heading(rows: list[Row]) -> str:
    first = rows[0]
    ceilings = {row["provider"]: row for row in _pick(rows, metric="ceiling")}
    text = (
        f"{first['cpu']}, {first['isa']}, {first['threads']} threads, device {first['device']}, "
        f"torch {first['torch']}, sslkernels {first['sslkernels']} at {first['commit']}, "
        f"{first['date']}."
    )
    if ceilings:
        parts = [
            f"{n} {r['p50'] / 1e9:.1f} G{r['unit']} ({r['note']})" for n, r in ceilings.items()
        ]
        text += " Ceilings measured in the same run: " + ", ".join(parts) + "."
    trips = [row["p50"] for row in _pick(rows, metric="round_trip")]
    if trips:
        text += (
            f" From one core to the other and back a cache line took {1e9 * median(trips):.0f} ns "
            f"({1e9 * min(trips):.0f} to {1e9 * max(trips):.0f}; medians of the cases)."
        )
    return text


NOTE = (
    "Medians; ± is half the distance of the quartiles. (2x): that contender takes twice as long, "
    "or twice as much memory, as ours. Every contender was checked against float64 before it was "
    "timed, and all took turns in one process. malloc: `default`, or `pages kept`: glibc told to "
    "keep freed memory, which spares eager PyTorch the page faults of its large buffers."
)


def tables(rows: list[Row], ops: Iterable[str] = TITLES) -> str:
    """Markdown of all tables."""
    parts = [_heading(rows), NOTE]
    for op in ops:
        here = _pick(rows, op=op)
        if _pick(here, metric="time"):
            parts += [f"**{TITLES[op]}**", _comparison(here, "time", _time)]
        if _pick(here, metric="extra_memory"):
            title = f"**{TITLES[op]}: extra peak memory, gradients included, a fresh process each**"
            parts += [title, _comparison(here, "extra_memory", _memory)]
    worse = _losses(rows)
    parts += ["**Where we lose**", "\n".join(worse) if worse else "Nowhere in this run."]
    missing = _missing(rows)
    if missing:
        parts += ["**Not measured**", "\n".join(missing)]
    return "\n\n".join(parts) + "\n"


def write_readme(rows: list[Row], readme: Path) -> None:
    """Replace what is between the two markers of README."""
    text = readme.read_text("utf-8")
    if len(BLOCK.findall(text)) != 1:
        raise ValueError(
            f"benchmarks: {readme} must have one pair of <!-- bench:start/end --> marks"
        )
    block = "\n" + tables(rows) + "\n"
    readme.write_text(BLOCK.sub(lambda m: m[1] + block + m[2], text), "utf-8")


def write_all(rows: list[Row], folder: Path) -> str:
    """bench.md and plots into the folder; returns the text."""
    text = tables(rows)
    text += "\n" + plots(rows, folder) + "\n"
    (folder / "bench.md").write_text(text, "utf-8")
    return text


def plots(rows: list[Row], folder: Path) -> str:
    """Time, extra memory and share of the ceiling over size; says what was drawn."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError as error:
        return f"No plots: {error}."
    drawn = []
    for op in LOSSES:
        size_name = "K" if op == "moco" else "N"
        for metric, title, scale, unit in (
            ("time", "time", 1e3, "ms"),
            ("extra_memory", "extra peak memory", 2**-20, "MiB"),
            ("share", "share of the FMA ceiling", 1.0, "%"),
        ):
            found = [
                row
                for row in _pick(rows, op=op, metric=metric, dtype="float32")
                if row["allocator"] in (DEFAULT, KEPT)
            ]
            found = _most_common_shape(found)
            if len({row["size"] for row in found}) < 2:
                continue
            figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
            for provider, allocator in _unique((r["provider"], r["allocator"]) for r in found):
                line = sorted(
                    _pick(found, provider=provider, allocator=allocator), key=lambda r: r["size"]
                )
                kept = allocator == KEPT
                colour, marker = STYLES[provider]
                axes.plot(
                    [r["size"] for r in line],
                    [r["p50"] * scale for r in line],
                    color=colour,
                    marker=marker,
                    ms=4,
                    lw=2.5 if provider == OURS else 1.2,
                    ls="--" if kept else "-",
                    label=provider + (", pages kept" if kept else ""),
                )
            if metric == "time" and op in ("nt_xent", "moco"):
                _ideal(axes, found, rows, op, scale)
            axes.set_xscale("log", base=2)
            axes.set_yscale("linear" if metric == "share" else "log")
            if metric == "share":
                axes.set_ylim(0, 100)
            axes.set(xlabel=size_name, ylabel=f"{title} [{unit}]", title=f"{TITLES[op]}: {title}")
            axes.grid(True, which="major", alpha=0.3)
            axes.legend(fontsize=7, handlelength=4)
            for suffix in ("png", "svg"):
                figure.savefig(folder / f"{op}_{metric}.{suffix}", dpi=130)
            pyplot.close(figure)
            drawn.append(f"{op}_{metric}")
    return f"Plots (PNG and SVG): {', '.join(drawn)}." if drawn else "No plots: one size an op."


def _most_common_shape(rows: list[Row]) -> list[Row]:
    """Rows of the dim and batch that most rows have: one plot has one of each."""
    if not rows:
        return rows
    kinds = [(row["dim"], row["batch"]) for row in rows]
    dim, batch = max(set(kinds), key=kinds.count)
    return _pick(rows, dim=dim, batch=batch)


def _ideal(axes: Any, found: list[Row], rows: list[Row], op: str, scale: float) -> None:
    """The line of the FLOPs that count at the measured ceiling: 4 N^2 D or 4 n K D."""
    ceiling = _pick(rows, metric="ceiling", provider="fma")
    if not ceiling:
        return
    sizes = sorted({row["size"] for row in found})
    dim, batch = found[0]["dim"], found[0]["batch"]
    flops = [4.0 * (n * n if op == "nt_xent" else n * batch) * dim for n in sizes]
    label = ("4N²D" if op == "nt_xent" else "4nKD") + " at the ceiling"
    axes.plot(sizes, [f / ceiling[0]["p50"] * scale for f in flops], "k:", lw=1, label=label)
