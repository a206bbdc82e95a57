"""Where the penalised step costs less than the plain one: rows by width, by activation, by outputs.

    python -m benchmarks grid                measure (about seven minutes), then draw and write
    python -m benchmarks grid --draw         the figure and the table of docs/performance.md alone

The native kernel in turns with PyTorch's plain step and with double backward, the way people write
the penalty today.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from .cases import Case, Job
from .figures import pyplot, save
from .options import parser_of
from .rivals import BASE, Rival, ours, usual
from .step import append, run_case, show
from .tables import read_rows, write_between

__all__ = ["main"]

RESULTS = Path(__file__).parent / "results" / "grid.csv"
DOCS = Path(__file__).parent.parent / "docs"
FIGURES, PAGE = DOCS / "figures", DOCS / "performance.md"
SECONDS = 0.8
MEMORY_FROM = 8192  # rows; below, the peak is mostly PyTorch's own

WIDTHS = (32, 64, 128, 256, 512)
ROWS = (256, 1024, 8192)
ACTIVATIONS = ("relu", "silu", "tanh", "gelu", "softplus")


def _product(*axes: Sequence[Any]) -> list[Case]:
    return [Case(*point) for point in itertools.product(*axes)]


CASES = [
    *_product(ROWS, WIDTHS, (1,), (4,), ("relu", "silu"), (0.05, 1.0)),
    *_product((1024, 8192), (32, 64, 128), (1,), (1, 8), ("relu", "silu"), (0.05, 1.0)),
    *_product((256,), (64,), (1,), (1, 8), ("relu", "silu"), (0.0, 0.05)),
    *_product((1024, 8192), (32, 64, 128, 256), (8,), (1,), ("relu", "silu"), (0.05, 1.0)),
    *_product((1024, 8192), (64, 128), (1,), (1,), ("tanh", "gelu", "softplus"), (0.05, 1.0)),
    *_product((65536,), (32, 64, 128), (1,), (1,), ("relu", "silu"), (0.05,)),
]


def contenders(job: Job) -> Iterable[Rival]:
    yield BASE
    yield from (rival for rival in ours(job) if rival.name == "monokernel cpu")
    yield usual(job)


def measure(path: Path, cases: Sequence[Case], patience: float) -> None:
    for case in cases:
        rows = run_case(case, "cpu", contenders, SECONDS, case.rows >= MEMORY_FROM, patience)
        show(case, rows)
        append(path, rows)


# --- the table ------------------------------------------------------------------------------------

BEGIN, END = "<!-- table: written by python -m benchmarks grid -->", "<!-- end of table -->"
HEAD = ("D", "k", "σ", "N", "width", "v = 0.05", "v = 1", "double backward", "memory")
Point = tuple[str, ...]


def table(rows: Sequence[dict[str, str]]) -> str:
    """Ratios to the plain step at both shares; double backward's at v = 0.05 over ours; memory."""
    keys = ("outputs", "columns", "activation", "rows", "width")
    points: dict[Point, dict[tuple[str, str], dict[str, str]]] = {}
    for row in rows:  # the newest wins
        rival = "ours" if row["rival"] == "monokernel cpu" else row["rival"]
        rival = "usual" if rival in ("sum of outputs", "loop of double backward") else rival
        point = points.setdefault(tuple(row[key] for key in keys), {})
        point[rival, row["wanted_share"]] = row
    lines = [f"| {' | '.join(HEAD)} |", "|---" * len(HEAD) + "|"]
    for point in sorted(points, key=_place):
        found = points[point]
        ours, usual_ = found.get(("ours", "0.05")), found.get(("usual", "0.05"))
        full = found.get(("ours", "1"))
        if ours is None or usual_ is None:
            continue
        times = float(usual_["ratio"]) / float(ours["ratio"]) if usual_["ratio"] else None
        cells = [ours["ratio"], full["ratio"] if full else "", f"{times:.1f} ×" if times else ""]
        lines.append(f"| {' | '.join([*point, *cells, ours['peak_ratio']])} |")
    return "\n".join(lines)


def _place(point: Point) -> tuple[float, ...]:
    outputs, columns, activation, rows, width = point
    return (
        float(outputs),
        float(columns) if columns != "4" else 0.0,  # the complete one first
        float(ACTIVATIONS.index(activation)),
        float(rows),
        float(width),
    )


def write(path: Path, page: Path) -> None:
    """The table into the page."""
    write_between(page, BEGIN, END, table(read_rows(path)))


# --- the figure -----------------------------------------------------------------------------------

# Title and fixed fields of the panels; each shows the ratio over the width.
PANELS: list[tuple[str, dict[str, str]]] = [
    *[
        (f"N = {rows}, one output, k = 4", {"rows": str(rows), "outputs": "1", "columns": "4"})
        for rows in ROWS
    ],
    ("N = 8192, eight outputs, k = 1", {"rows": "8192", "outputs": "8", "columns": "1"}),
]
COLOURS = {"relu": "#1b6ca8", "silu": "#d1495b"}
STYLES = {"0.05": "-", "1": "--"}


def draw(path: Path, folder: Path) -> None:
    """One SVG of four panels, from the newest measurement of every point."""
    rows = [row for row in read_rows(path) if row["rival"] == "monokernel cpu"]
    figure, panels = pyplot().subplots(1, len(PANELS), figsize=(12, 3.6), sharey=True)
    for panel, (title, fixed) in zip(panels, PANELS, strict=True):
        own = [row for row in rows if all(row[key] == value for key, value in fixed.items())]
        for (activation, colour), (share, style) in itertools.product(
            COLOURS.items(), STYLES.items()
        ):
            points = {
                int(row["width"]): float(row["ratio"])
                for row in own
                if row["activation"] == activation and row["wanted_share"] == share and row["ratio"]
            }
            label = f"{activation}, v = {share}"
            line = sorted(points.items())
            if line:
                panel.plot(
                    *zip(*line, strict=True),
                    style,
                    marker="o",
                    markersize=4,
                    color=colour,
                    label=label,
                )
        panel.axhline(1, color="0.5", linewidth=0.8, zorder=0)
        panel.set_xscale("log", base=2)
        panel.set_xticks(WIDTHS, [str(width) for width in WIDTHS])
        panel.minorticks_off()
        panel.set_title(title, loc="left", fontsize=9)
        panel.set_xlabel("hidden width")
        panel.grid(alpha=0.25, linewidth=0.6)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylim(bottom=0)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=len(labels), frameon=False)
    last = rows[-1]
    figure.suptitle(
        f"Step with penalty over plain step   ({last['processor']}, {last['threads']} threads, "
        f"torch {last['torch']}, float32, three hidden layers)",
        fontsize=10,
        color="0.3",
    )
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    save(figure, folder / "grid.svg")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = parser_of("grid", __doc__)
    parser.add_argument("--draw", action="store_true", help="only draw")
    parser.add_argument(
        "--wait", type=float, default=0, help="seconds to wait, at each point, for a quiet machine"
    )
    parser.add_argument("--csv", type=Path, default=RESULTS)
    parser.add_argument("--figures", type=Path, default=FIGURES)
    parser.add_argument("--page", type=Path, default=PAGE)
    options = parser.parse_args(arguments)
    if not options.draw:
        measure(options.csv, CASES, options.wait)
    draw(options.csv, options.figures)
    write(options.csv, options.page)


if __name__ == "__main__":
    main()
