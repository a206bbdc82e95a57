"""What the penalty costs on ordinary networks: all of ``tests/zoo.py``, beside their plain steps.

    python -m benchmarks zoo                 measure, then write the table
    python -m benchmarks zoo --table         the table of docs/performance.md alone
    python -m benchmarks zoo --networks "pre-norm LayerNorm" SwiGLU --rows 8192

One row of the CSV for each network and size, with who served it. Before it is timed its loss and
gradient are compared with double backward in float64; one that disagrees gets no ratio.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median

from monokernel import plan
from tests.zoo import ACTIVE, ZOO

from . import rivals
from .cases import Case, Job
from .measure import QUIET, append_rows, interleave, machine, peak_bytes, spread
from .options import add_timing, clock_of, parser_of
from .step import MEMORY_ROWS, TINY_ROWS, TINY_WIDTH
from .tables import read_rows, write_between

__all__ = ["WIDTH", "case_of", "main", "measure", "table"]

RESULTS = Path(__file__).parent / "results" / "zoo.csv"
PAGE = Path(__file__).parent.parent / "docs" / "performance.md"
SECONDS = 1.0
TOLERANCE = 1e-3

NETWORKS = tuple(ZOO)
ROWS, OUTPUTS, COLUMNS = (8192, 256), (1, 8), (1, 4)
WIDTH, SHARE = 128, 0.05
OURS = rivals.monokernel("auto")

FIELDS = [
    *["date", "machine", "processor", "threads", "python", "torch"],
    *["network", "rows", "width", "outputs", "columns", "wanted_share", "share"],
    *["backend", "mode", "rounds", "plain_ms", "p20_ms", "p50_ms", "p80_ms", "ratio"],
    *["plain_mib", "peak_mib", "peak_ratio", "others", "error", "note"],
]
Row = dict[str, str]


def case_of(
    name: str, rows: int, outputs: int, columns: int, width: int = WIDTH, share: float = SHARE
) -> Case:
    """A network of the zoo on N rows, with D outputs, each to rise with k inputs."""
    return Case(rows, width, outputs, columns, "", share, network=name)


def measure(case: Case, seconds: float = SECONDS, patience: float = 0.0) -> Row:
    """The row of a case: both steps in turns, or a note why there is no ratio."""
    job = Job(case)
    route = plan(job.net, job.x1, job.x2)
    plain, ours = rivals.plain(job), OURS(job)
    row = {
        **{key: value for key, value in machine().items() if key in FIELDS},
        "network": case.network,
        "rows": str(case.rows),
        "width": str(case.width),
        "outputs": str(case.outputs),
        "columns": str(case.columns),
        "wanted_share": f"{case.share:g}",
        "share": f"{job.share:.4g}",
        "backend": route.backend,
        "mode": route.mode,
    }
    if case.network in ACTIVE:  # two steps are not the same step
        row["note"] = "draws masks: not compared"
    else:
        error = job.error(*ours.outcome())
        row["error"] = f"{error:.1e}"
        if not error <= TOLERANCE:
            return row | {"note": "disagrees with double backward"}
    steps = {"plain": plain.run, "ours": ours.run}
    times, others = interleave(steps, seconds, lambda: None, patience)
    base, middle = median(times["plain"]), median(times["ours"])
    return row | {
        **(_peaks(case, job.margin) if case.rows >= MEMORY_ROWS else {}),
        **spread(times["ours"]),
        "plain_ms": f"{1e3 * base:.4f}",
        "ratio": f"{middle / base:.2f}",
        "others": f"{others:.3f}",
    }


def _peaks(case: Case, margin: float) -> Row:
    """Of both steps, each in a process of its own."""
    plain, ours = (peak_bytes(prepared, case, margin, own) for own in (False, True))
    if not plain or ours is None:
        return {}
    return {
        "plain_mib": f"{plain / 2**20:.1f}",
        "peak_mib": f"{ours / 2**20:.1f}",
        "peak_ratio": f"{ours / plain:.2f}",
    }


def prepared(case: Case, margin: float, own: bool) -> Callable[[], object]:
    """One of the two steps, for the peak of its memory: the code is loaded, and every buffer that
    grows with the rows is yet to be made."""
    make = OURS if own else rivals.plain
    make(Job(replace(case, rows=TINY_ROWS, width=TINY_WIDTH), known=margin)).run()
    return make(Job(case, known=margin)).run


# --- the table ------------------------------------------------------------------------------------

BEGIN, END = "<!-- table: written by python -m benchmarks zoo -->", "<!-- end of zoo -->"
SIZES = [(str(N), str(D), str(k)) for N, D, k in itertools.product(ROWS, OUTPUTS, COLUMNS)]


def table(rows: Sequence[Row]) -> str:
    """Ratios to the plain step, one line for each network, from the newest row of each case; of
    the peaks of memory the largest."""
    found = {(r["network"], r["rows"], r["outputs"], r["columns"]): r for r in rows}
    heads = [f"{N} × {D}, k = {k}" for N, D, k in SIZES] + [f"memory, D = {D}" for D in OUTPUTS]
    lines = [f"| network | served by | {' | '.join(heads)} |", "|---" * (2 + len(heads)) + "|"]
    for name in NETWORKS:
        own = [found.get((name, *size)) for size in SIZES]
        backends = dict.fromkeys(row["backend"] for row in own if row)
        if backends:
            cells = [_cell(row) for row in own]
            for D in OUTPUTS:
                peaks = [r["peak_ratio"] for r in own if r and r["outputs"] == str(D)]
                cells.append(max(filter(None, peaks), default=""))
            lines.append(f"| {name} | {', '.join(backends)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(row: Row | None) -> str:
    if row is None or not row["ratio"]:
        return ""
    return f"{'~' if float(row['others']) > QUIET else ''}{row['ratio']}"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = parser_of("zoo", __doc__)
    parser.add_argument("--table", action="store_true", help="only write the table")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=NETWORKS)
    parser.add_argument("--rows", nargs="+", type=int, default=ROWS)
    parser.add_argument("--outputs", nargs="+", type=int, default=OUTPUTS)
    parser.add_argument("--columns", nargs="+", type=int, default=COLUMNS)
    parser.add_argument("--width", type=int, default=WIDTH)
    parser.add_argument("--share", type=float, default=SHARE)
    add_timing(parser, "in each case")
    parser.add_argument("--csv", type=Path, default=RESULTS)
    parser.add_argument("--page", type=Path, default=PAGE)
    options = parser.parse_args(arguments)
    clock_of(options)
    if not options.table:
        print(f"{'network':<24}{'N':>6}{'D':>3}{'k':>3}  {'served by':<10}", end="")
        print(f"{'plain ms':>9}{'ours ms':>9}{'ratio':>7}{'error':>9}{'others':>8}")
        axes = (options.networks, options.rows, options.outputs, options.columns)
        for name, N, D, k in itertools.product(*axes):
            row = measure(
                case_of(name, N, D, k, options.width, options.share), patience=options.wait
            )
            append_rows(options.csv, FIELDS, [row])
            numbers = [row.get(key, "") for key in ("plain_ms", "p50_ms")]
            cells = [f"{float(number):.3f}" if number else "" for number in numbers]
            rest = [row.get(key, "") for key in ("ratio", "error", "others", "note")]
            print(f"{name:<24}{N:>6}{D:>3}{k:>3}  {row['backend']:<10}", end="")
            print(
                f"{cells[0]:>9}{cells[1]:>9}{rest[0]:>7}{rest[1]:>9}{rest[2]:>8}  {rest[3]}",
                flush=True,
            )
    write_between(options.page, BEGIN, END, table(read_rows(options.csv)))


if __name__ == "__main__":
    main()
