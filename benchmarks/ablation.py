"""What each idea of the native kernel is worth: stacking, compaction and the choice of mode, off.

    python -m benchmarks ablation            measure (a few minutes), then print the table
    python -m benchmarks ablation --table    print the table from the CSV

Ratios are to PyTorch's plain step. "No stacking": primal and tangent rows go through separate
products, each reading the weights again (in adjoint mode forward has one chain, so only the weight
gradients are stacked; piecewise-linear activations with one output merge both factors and have
nothing to stack). "No compaction": every row takes part in the backward of the slopes. "Other
mode": tangent where ``auto`` takes adjoint, adjoint where it takes tangent.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from monokernel.backends import cpu

from .cases import Case, Job
from .options import add_timing, clock_of, parser_of
from .rivals import BASE, Rival, Step, monokernel
from .step import append, run_case, show
from .tables import read_rows

__all__ = ["main"]

RESULTS = Path(__file__).parent / "results" / "ablation.csv"
SECONDS = 2.0
ROWS, WIDTH = 8192, 128
CASES = [
    Case(ROWS, WIDTH, outputs, columns, activation, share)
    for (outputs, columns), activation, share in itertools.product(
        [(1, 4), (8, 1), (4, 4)], ["relu", "silu"], [0.05, 1.0]
    )
]
FULL, UNSTACKED, UNCOMPACTED, OTHER = "full", "no stacking", "no compaction", "other mode"

Result = TypeVar("Result")


def variants(job: Job) -> Iterator[Rival]:
    yield BASE
    yield Rival(FULL, _switched(True, True))
    yield Rival(UNSTACKED, _switched(False, True))
    yield Rival(UNCOMPACTED, _switched(True, False))
    other = "tangent" if job.case.mode == "adjoint" else "adjoint"
    yield Rival(OTHER, _switched(True, True, other))


def _switched(stacks: bool, compacts: bool, mode: str = "auto") -> Callable[[Job], Step]:
    """The step of the native kernel with these switches, which it sets for itself alone."""

    def make(job: Job) -> Step:
        step = monokernel("cpu", mode)(job)

        def within(run: Callable[[], Result]) -> Callable[[], Result]:
            def switched() -> Result:
                cpu.switch(stacks, compacts)
                try:
                    return run()
                finally:
                    cpu.switch(True, True)

            return switched

        return Step(within(step.run), within(step.outcome))

    return make


def table(path: Path) -> str:
    """Markdown, from the newest measurement of every case."""
    newest = {(_case(row), row["rival"]): row["ratio"] for row in read_rows(path)}
    names = [FULL, UNSTACKED, UNCOMPACTED, OTHER]
    lines = [f"| D | k | mode | σ | v | {' | '.join(names)} |", "|---" * (5 + len(names)) + "|"]
    for case in dict.fromkeys(case for case, _ in newest):
        cells = [newest.get((case, name), "") for name in names]
        head = [case.outputs, case.columns, case.mode, case.activation, f"{case.share:g}"]
        lines.append(f"| {' | '.join(map(str, [*head, *cells]))} |")
    return "\n".join(lines)


def _case(row: dict[str, str]) -> Case:
    rows, width, outputs, columns = (
        int(row[key]) for key in ("rows", "width", "outputs", "columns")
    )
    return Case(rows, width, outputs, columns, row["activation"], float(row["wanted_share"]))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = parser_of("ablation", __doc__)
    parser.add_argument("--table", action="store_true", help="only print the table")
    add_timing(parser, "in each case")
    parser.add_argument("--csv", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    clock_of(options)
    if not options.table:
        for case in CASES:
            rows = run_case(case, "cpu", variants, SECONDS, False, options.wait)
            show(case, rows)
            append(options.csv, rows)
    print(table(options.csv))


if __name__ == "__main__":
    main()
