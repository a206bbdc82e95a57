"""How the cost of a step grows with each axis, beside what the cost table says.

    python -m benchmarks scaling             measure (about two minutes), then draw
    python -m benchmarks scaling --draw      draw from the CSV

One axis varies at a time. Ratios are to PyTorch's plain step at the same size; the dashed line is
the cost table's count of matrix products over the plain step's 3. Adjoint mode switched off is
measured; compaction switched off is the cost at v = 1, which every row would then pay.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .cases import Case, Job
from .figures import pyplot, save
from .measure import Clock
from .options import add_timing, clock_of, parser_of
from .rivals import BASE, Rival, ours, usual
from .step import append, run_case, show
from .tables import read_rows

__all__ = ["main"]

RESULTS = Path(__file__).parent / "results" / "scaling.csv"
FIGURES = Path(__file__).parent.parent / "docs" / "figures"
SECONDS = 2.0
ONE = Case(4096, 128, 1, 4, "silu", 0.05)
MANY = replace(ONE, outputs=8, columns=1)


@dataclass(frozen=True)
class Axis:
    """A panel: the field of the case that varies, from ``base`` through ``values``."""

    key: str
    title: str
    label: str
    base: Case
    field: str
    values: tuple[float, ...]
    tangent_too: bool = False

    def cases(self) -> Iterator[Case]:
        for value in self.values:
            changed: dict[str, Any] = {self.field: value}
            yield replace(self.base, **changed)


AXES = [
    Axis("rows", "rows", "N", ONE, "rows", (256, 1024, 4096, 16384, 65536)),
    Axis("width", "width", "hidden width", ONE, "width", (32, 64, 128, 256, 512)),
    Axis("outputs", "outputs, one column", "D", MANY, "outputs", (2, 4, 8, 16, 32)),
    Axis("columns", "columns, one output", "k", ONE, "columns", (1, 2, 4, 8), tangent_too=True),
    Axis("columns8", "columns, eight outputs", "k", MANY, "columns", (1, 2, 4, 8, 16)),
    Axis("share", "violating share", "v", ONE, "share", (0.0, 0.1, 0.25, 0.5, 0.75, 1.0)),
]


def measure(path: Path, axes: Sequence[Axis], patience: float, clock: Clock) -> None:
    for axis in axes:
        for case in axis.cases():

            def contenders(job: Job, tangent: bool = axis.tangent_too) -> Iterable[Rival]:
                yield BASE
                yield from ours(job)
                if tangent:
                    yield from ours(job, "tangent")
                yield usual(job)

            rows = run_case(case, "cpu", contenders, SECONDS, False, patience, clock)
            show(case, rows)
            for row in rows:
                row["note"] = f"{axis.key} {row['note']}".strip()
            append(path, rows)


# --- the figures ----------------------------------------------------------------------------------

LOOKS = {  # rival -> colour, label
    "monokernel cpu": ("#1b6ca8", "monokernel, C++ kernel"),
    "monokernel torch": ("#6fb1d6", "monokernel, PyTorch operations"),
    "monokernel cpu, tangent mode": ("#9467bd", "C++ kernel, adjoint mode off"),
    "double backward": ("#d1495b", "double backward"),
}


def draw(path: Path, folder: Path) -> None:
    """One SVG of six panels, from the newest measurement of every point."""
    rows = read_rows(path)
    last = rows[-1]
    rows = [row for row in rows if all(row[key] == last[key] for key in ("threads", "clock"))]
    figure, panels = pyplot().subplots(2, 3, figsize=(12, 7.2))
    for panel, axis in zip(panels.flat, AXES, strict=True):
        own = [row for row in rows if row["note"].split()[:1] == [axis.key]]
        points = {(r["rival"], round(float(r[axis.field]), 2)): r for r in own}  # the newest wins
        _panel(panel, axis, points)
    handles: dict[str, Any] = {}
    for panel in panels.flat:
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    figure.legend(
        list(handles.values()), list(handles), loc="lower center", ncols=len(handles), frameon=False
    )
    figure.suptitle(
        f"Step with penalty over plain step   ({last['processor']}, {last['threads']} thread(s), "
        f"{last['clock']} time, torch {last['torch']}, float32)",
        fontsize=11,
        color="0.3",
    )
    figure.tight_layout(rect=(0, 0.045, 1, 1))
    save(figure, folder / "scaling.svg")


def _panel(panel, axis: Axis, points: dict[tuple[str, float], dict[str, str]]) -> None:  # type: ignore[no-untyped-def]
    for name, (colour, label) in LOOKS.items():
        names = ("sum of outputs", "loop of double backward") if "double" in name else (name,)
        line = sorted(
            (value, float(row["ratio"]))
            for (rival, value), row in points.items()
            if rival in names and row["ratio"]
        )
        if line:
            panel.plot(*zip(*line, strict=True), "o-", color=colour, markersize=4, label=label)
    expected = [case.products / 3 for case in axis.cases()]
    panel.plot(axis.values, expected, "--", color="0.35", linewidth=1, label="cost table")
    if axis.field != "share":
        panel.set_xscale("log", base=2)
        panel.set_xticks(axis.values, [f"{v:g}" for v in axis.values])
        panel.minorticks_off()
    panel.set_yscale("log", base=2)
    panel.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
    low, high = panel.get_ylim()
    panel.set_ylim(min(low, 0.5), max(high, 4.2))
    panel.axhline(1, color="0.7", linewidth=0.8, zorder=0)
    base, fixed = axis.base, []
    for key, letter in (("rows", "N"), ("width", "width"), ("outputs", "D"), ("columns", "k")):
        if key != axis.field:
            fixed.append(f"{letter} = {getattr(base, key)}")
    if axis.field != "share":
        fixed.append(f"v = {base.share:g}")
    panel.set_title(axis.title, loc="left", fontsize=11, fontweight="bold", pad=18)
    panel.text(0, 1.02, ", ".join(fixed), transform=panel.transAxes, fontsize=8, color="0.4")
    panel.set_xlabel(axis.label)
    panel.grid(alpha=0.25, linewidth=0.6)
    panel.spines[["top", "right"]].set_visible(False)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = parser_of("scaling", __doc__)
    keys = [axis.key for axis in AXES]
    parser.add_argument("--draw", action="store_true", help="only draw")
    parser.add_argument("--axes", nargs="+", choices=keys, default=keys)
    add_timing(parser, "at each point", processor_time=True)
    parser.add_argument("--csv", type=Path, default=RESULTS)
    parser.add_argument("--figures", type=Path, default=FIGURES)
    options = parser.parse_args(arguments)
    clock = clock_of(options)
    if not options.draw:
        measure(options.csv, [a for a in AXES if a.key in options.axes], options.wait, clock)
    draw(options.csv, options.figures)


if __name__ == "__main__":
    main()
