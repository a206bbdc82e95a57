"""The tables of docs/benchmarks.md, from the measured rows. ``python -m benchmarks pages``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from .measure import QUIET
from .rivals import PLAIN
from .tables import read_rows, write_between

__all__ = ["main", "tables"]

RESULTS = Path(__file__).parent / "results" / "step.csv"
PAGE = Path(__file__).parent.parent / "docs" / "benchmarks.md"
BEGIN, END = "<!-- tables: written by python -m benchmarks pages -->", "<!-- end of tables -->"

# Column headings; two rivals share one where they are the same recipe.
COLUMNS = {
    "monokernel cpu": "monokernel `cpu`",
    "monokernel torch": "monokernel `torch`",
    "loop of double backward": "double backward",
    "sum of outputs": "double backward",
    "torch.func.jvp": "`func.jvp`",
    "vmap(jacrev)": "`vmap(jacrev)`",
    "JAX jit": "JAX `jit`",
    "compiled plain step": "compiled plain step",
    "compiled monokernel": "compiled monokernel",
    "compiled double backward": "compiled double backward",
    "compiled hand-written jvp": "compiled jvp",
    "compiled hand-written vjp": "compiled vjp",
    "positive weights": "positive weights *",
    "monotonicnetworks": "`monotonicnetworks` *",
}
# Side by side they are wider than a page.
PARTS = (
    ("", lambda name: not name.startswith("compiled") and not name.endswith("*")),
    (", compiled", lambda name: name.startswith("compiled")),
    (", of another function", lambda name: name.endswith("*")),
)
CONDITIONS = ("processor", "threads", "clock", "torch")
CASE = ("outputs", "columns", "activation", "rows", "width", "share")
Row = dict[str, str]
Table = dict[tuple[str, ...], dict[str, Row]]  # case -> rival -> row


def chosen(rows: Iterable[Row]) -> Table:
    """For each case and rival the newest undisturbed row, or the least disturbed one.

    A ratio's base is the plain step of the same run, so rows of several runs may stand together.
    """
    best: Table = {}
    for row in rows:
        found = best.setdefault(tuple(row[key] for key in CASE), {})
        known = found.get(row["rival"])
        if known is None or _others(row) <= max(QUIET, _others(known)):
            found[row["rival"]] = row
    return dict(sorted(best.items(), key=lambda item: [_key(word) for word in item[0]]))


def tables(measured: Sequence[Row]) -> str:
    """Ratios of time, then peaks of memory, which are not a matter of other processes.

    Of rows measured under the conditions of the last one.
    """
    last = measured[-1]
    measured = [row for row in measured if all(row[key] == last[key] for key in CONDITIONS)]
    times = chosen(measured)
    peaks = chosen({**row, "others": "0"} for row in measured if row["peak_mib"])
    lines = [
        f"{last['processor']}, {last['threads']} thread(s), {last['clock']} time, Python "
        f"{last['python']}, torch {last['torch']}, {last['date'][:10]}; float32, three hidden "
        "layers.",
    ]
    for part, belongs in PARTS:
        names = [name for name in dict.fromkeys(COLUMNS.values()) if belongs(name)]
        lines += ["", f"**Time of a step{part}, as a multiple of PyTorch's plain step:**", ""]
        lines += _table(times, names, "ratio", "p50_ms", "plain, ms")
    for part, belongs in PARTS:
        names = [name for name in dict.fromkeys(COLUMNS.values()) if belongs(name)]
        lines += ["", f"**Peak memory of a step{part}, MiB:**", ""]
        lines += _table(peaks, names, "peak_mib", "peak_mib", "plain")
    return "\n".join(lines)


def _table(cases: Table, names: Sequence[str], key: str, base: str, base_name: str) -> list[str]:
    """Of the columns and of the cases of which there is anything."""

    def any_of(rows: Iterable[Row], names: Sequence[str]) -> bool:
        return any(row[key] and COLUMNS.get(row["rival"]) in names for row in rows)

    cases = {case: found for case, found in cases.items() if any_of(found.values(), names)}
    used = [n for n in names if any(any_of(found.values(), [n]) for found in cases.values())]
    lines = [
        f"| D | k | σ | N | width | v | {base_name} | {' | '.join(used)} |",
        "|" + "---|" * (7 + len(used)),
    ]
    for case, found in cases.items():
        plain = found[PLAIN]
        cells = [*case[:5], f"{float(case[5]):.2g}", f"{float(plain[base]):.3g}"]
        own = {COLUMNS[n]: _cell(row, key) for n, row in found.items() if n in COLUMNS}
        cells += [own.get(name, "") for name in used]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _cell(row: Row, key: str) -> str:
    if row[key]:
        disturbed = key == "ratio" and _others(row) > QUIET
        return f"{'~' if disturbed else ''}{float(row[key]):.3g}"
    return "–" if row["note"].startswith("skipped") else ""


def _others(row: Row) -> float:
    return float(row["others"] or "nan")


def _key(word: str) -> tuple[float, str]:
    try:
        return float(word), ""
    except ValueError:
        return 0.0, word


def main(arguments: Sequence[str] | None = None) -> None:
    write_between(PAGE, BEGIN, END, tables(read_rows(RESULTS)))
    print(f"written into {PAGE.name}")


if __name__ == "__main__":
    main()
