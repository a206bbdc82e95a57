"""The training step (task loss, penalty, backward) beside every way a user might write it.

    python -m benchmarks                         the quick set, under two minutes
    python -m benchmarks --all                   the whole grid, hours
    python -m benchmarks --rows 8192 --outputs 1 8 --width 128 --activation silu --share 0

Rows are appended to a CSV with machine, versions and date. Before anything is timed every rival's
loss and gradient are compared with the reference in float64; one that disagrees gets no ratio.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from .cases import Case, Job
from .measure import (
    QUIET,
    Clock,
    append_rows,
    interleave,
    machine,
    matmul_flops,
    peak_bytes,
    spread,
)
from .options import add_timing, clock_of, parser_of
from .rivals import PLAIN, Rival, Step, rivals
from .tables import read_rows

__all__ = ["append", "busy", "main", "run_case", "show"]

RESULTS = Path(__file__).parent / "results"
TOLERANCE = 1e-3
SECONDS_PER_CASE = 1.5
SLOWEST_STEP = 3.0  # seconds; a rival slower than this at a size is skipped
MEMORY_LIMIT = 8e9
MEMORY_ROWS = 1024  # below this the peak is noise
TINY_ROWS, TINY_WIDTH = 2, 8  # of a step that only loads the code

GRID: dict[str, list[object]] = {
    "rows": [256, 1024, 8192, 65536],
    "width": [64, 128, 512],
    "outputs": [1, 8],
    "columns": [1, 4],
    "activation": ["relu", "silu"],
    "share": [0.0, 0.05, 1.0],
}
QUICK = [
    Case(256, 64, 1, 1, "relu", 0.05),
    Case(1024, 64, 1, 4, "relu", 0.0),
    Case(8192, 128, 1, 4, "silu", 0.0),
    Case(8192, 128, 1, 4, "silu", 0.05),
    Case(8192, 128, 1, 4, "silu", 1.0),
    Case(1024, 128, 8, 1, "relu", 0.05),
    Case(8192, 128, 8, 1, "silu", 0.05),
    Case(1024, 64, 8, 4, "silu", 1.0),
]
# What docs/benchmarks.md shows besides.
PAGE = [
    *QUICK,
    Case(8192, 128, 1, 1, "relu", 0.0),
    Case(8192, 128, 1, 1, "relu", 1.0),
    Case(8192, 128, 8, 4, "silu", 0.05),
    Case(8192, 512, 1, 4, "silu", 0.05),
    Case(65536, 128, 1, 4, "silu", 0.05),
    Case(65536, 128, 8, 1, "silu", 0.05),
]
# Compiling costs up to a minute a case, so the quick set does it for one.
QUICK_COMPILED = {QUICK[3]}
PAGE_COMPILED = {QUICK[0], QUICK[3], QUICK[4], QUICK[6]}

FIELDS = [
    *["date", "machine", "processor", "threads", "python", "torch", "jax", "device", "clock"],
    *[
        "rows",
        "width",
        "depth",
        "outputs",
        "columns",
        "activation",
        "wanted_share",
        "share",
        "mode",
    ],
    *["rival", "rounds", "p20_ms", "p50_ms", "p80_ms", "ratio"],
    *["peak_mib", "peak_ratio", "matmul_gflops", "of_matmul_rate", "others", "error", "note"],
]
Row = dict[str, object]


Contenders = Callable[[Job], Iterable[Rival]]


def run_case(
    case: Case,
    device: str,
    contenders: Contenders,
    seconds: float,
    with_memory: bool,
    patience: float = 0.0,
    clock: Clock = time.perf_counter,
) -> list[Row]:
    """One row for each rival: timed, or with a note why not. Waits so long for a quiet machine."""
    job = Job(case, device)
    sync = _sync(device)
    matmul_flops(device, sync, clock)
    rows: dict[str, Row] = {}
    steps: dict[str, Step] = {}
    pooling: set[str] = set()
    for rival in contenders(job):
        if rival.pools:
            pooling.add(rival.name)
        row = rows[rival.name] = _row(case, job, device, rival.name)
        step, note, error = _admit(rival, job)
        row["note"], row["error"] = note, "" if error is None else f"{error:.1e}"
        if step is not None:
            steps[rival.name] = step
    runs = {name: step.run for name, step in steps.items()}
    times, others = interleave(runs, seconds, sync, patience, clock)
    for name, each in times.items():
        rows[name] |= spread(each)
    rate = matmul_flops(device, sync, clock)
    for row in rows.values():
        row["clock"] = "wall" if clock is time.perf_counter else "processor"
        row |= {"matmul_gflops": f"{rate / 1e9:.0f}", "others": f"{others:.3f}"}
    if with_memory and device == "cpu" and case.rows >= MEMORY_ROWS:
        for name in times.keys() - pooling:
            peak = peak_bytes(prepared, case, name)
            if peak is not None:
                rows[name]["peak_mib"] = f"{peak / 2**20:.1f}"
    _ratios(case, rows)
    return list(rows.values())


def prepared(case: Case, name: str) -> Callable[[], object]:
    """A rival's step, for the peak of its memory: nothing is left to load or to compile, and every
    buffer that grows with the rows is yet to be made."""
    job = Job(case)
    rival = next(r for r in rivals(job, with_compiled=True, with_peers=True) if r.name == name)
    step = rival.make(job)
    if rival.compiled:
        step.run()
    else:
        rival.make(Job(replace(case, rows=TINY_ROWS, width=TINY_WIDTH))).run()
    for p in job.parameters():
        p.grad = None
    return step.run


def _row(case: Case, job: Job, device: str, name: str) -> Row:
    return {
        **machine(),
        "device": device if device == "cpu" else torch.cuda.get_device_name(),
        "rows": case.rows,
        "width": case.width,
        "depth": case.depth,
        "outputs": case.outputs,
        "columns": case.columns,
        "activation": case.activation,
        "wanted_share": f"{case.share:g}",
        "share": f"{job.share:.4g}",
        "mode": case.mode,
        "rival": name,
    }


def _admit(rival: Rival, job: Job) -> tuple[Step | None, str, float | None]:
    """The rival's step if it is affordable here, a note, and its error against the truth."""
    if rival.bytes_needed(job.case) > MEMORY_LIMIT:
        return None, "skipped: too much memory", None
    step = rival.make(job)
    if rival.compiled:
        step.run()
    for _ in range(2):  # the first call also warms up
        begin = time.perf_counter()
        loss, gradient = step.outcome()
        seconds = time.perf_counter() - begin
        if seconds < SLOWEST_STEP or seconds > 10 * SLOWEST_STEP:
            break
    if seconds > SLOWEST_STEP:
        return None, f"skipped: {seconds:.0f} s a step", None
    if not rival.same_function:
        return step, "another function", None
    if not rival.penalised:
        return step, "", None
    error = job.error(loss, gradient)
    return step, "" if error <= TOLERANCE else "disagrees with the reference", error


def _ratios(case: Case, rows: dict[str, Row]) -> None:
    """To the plain step, for those that agree; and the share of the matrix-product rate."""
    base = rows[PLAIN]
    for name, row in rows.items():
        if "p50_ms" not in row or row["note"] == "disagrees with the reference":
            continue
        row["ratio"] = f"{_number(row['p50_ms']) / _number(base['p50_ms']):.2f}"
        products = 3.0 if name.endswith("plain step") else case.products
        if row["note"] == "":
            rate = case.flops(products) / (1e-3 * _number(row["p50_ms"]))
            row["of_matmul_rate"] = f"{rate / (1e9 * _number(row['matmul_gflops'])):.2f}"
        if row.get("peak_mib") and _number(base["peak_mib"]) > 0:
            row["peak_ratio"] = f"{_number(row['peak_mib']) / _number(base['peak_mib']):.2f}"


def _number(value: object) -> float:
    return float(str(value))


def _sync(device: str) -> Callable[[], None]:
    return torch.cuda.synchronize if device != "cpu" else lambda: None


# --- the table and the file -----------------------------------------------------------------------


def show(case: Case, rows: Sequence[Row]) -> None:
    share, rate = rows[0]["share"], rows[0]["matmul_gflops"]
    print(f"\n{case}   violating share measured {share}, matrix products {rate} GFLOP/s")
    print(f"  {'':<28}{'p50 ms':>9}{'p20':>9}{'p80':>9}{'ratio':>8}{'peak MiB':>10}{'of rate':>9}")
    if busy(rows):
        share = _number(rows[0]["others"])
        print(f"  others took {share:.0%} of the machine: these times are not to be trusted")
    for row in rows:
        cells = [str(row.get(key) or "") for key in ("p50_ms", "p20_ms", "p80_ms")]
        cells = [f"{float(cell):.3f}" if cell else "" for cell in cells]
        rest = [str(row.get(key) or "") for key in ("ratio", "peak_mib", "of_matmul_rate", "note")]
        print(
            f"  {row['rival']:<28}{cells[0]:>9}{cells[1]:>9}{cells[2]:>9}"
            f"{rest[0]:>8}{rest[1]:>10}{rest[2]:>9}  {rest[3]}",
            flush=True,
        )


def busy(rows: Sequence[Row]) -> bool:
    """Whether other processes took part of the machine while the rivals were timed."""
    return _number(rows[0]["others"]) > QUIET


def append(path: Path, rows: Sequence[Row]) -> None:
    append_rows(path, FIELDS, rows)


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parse(arguments)
    clock = clock_of(options)
    chosen = {axis: getattr(options, axis) for axis in GRID}
    if options.all or any(chosen.values()):
        axes = [chosen[axis] or values for axis, values in GRID.items()]
        cases = [Case(*point) for point in itertools.product(*axes)]
    else:
        cases = PAGE if options.page else QUICK
    compile_for = PAGE_COMPILED if cases is PAGE else QUICK_COMPILED if cases is QUICK else cases
    for key, value in machine().items():
        print(f"{key}: {value}", end="   ")
    print(
        "\nratio: to PyTorch's plain step. of rate: needed matrix products over the machine's own."
    )
    print("With one output the loop of double backward is the sum of outputs.")
    done = _undisturbed(options.csv) if options.resume else set()
    for case in cases:
        if case in done:
            continue
        thorough = case in compile_for
        compiled = thorough and not options.no_compiled
        memory = (thorough or options.page) and not options.no_memory

        def contenders(job: Job, compiled: bool = compiled) -> Iterable[Rival]:
            for rival in rivals(job, compiled, not options.no_peers):
                # JAX's threads cannot be held to one, which processor time is for.
                if options.processor_time and rival.name.startswith("JAX"):
                    continue
                if not options.rivals or rival.name in (PLAIN, *options.rivals):
                    yield rival

        rows = run_case(
            case, options.device, contenders, SECONDS_PER_CASE, memory, options.wait, clock
        )
        show(case, rows)
        append(options.csv, rows)
    print(f"\nappended to {options.csv}")


def _undisturbed(path: Path) -> set[Case]:
    """The cases that the CSV has already, measured on a quiet machine."""
    if not path.exists():
        return set()
    rows = [row for row in read_rows(path) if float(row["others"] or 1) <= QUIET]
    keys = ("rows", "width", "outputs", "columns", "activation", "wanted_share")
    kinds = (int, int, int, int, str, float)
    return {Case(*(kind(row[key]) for kind, key in zip(kinds, keys, strict=True))) for row in rows}


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = parser_of("", __doc__)
    parser.add_argument("--all", action="store_true", help="the whole grid")
    parser.add_argument("--page", action="store_true", help="the sizes of docs/benchmarks.md")
    parser.add_argument(
        "--resume", action="store_true", help="leave out what the CSV has from a quiet machine"
    )
    for axis, values in GRID.items():
        kind = type(values[-1])
        parser.add_argument(f"--{axis}", nargs="+", type=kind, help=f"of the grid's {values}")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rivals", nargs="+", metavar="NAME", help="only these, and the base")
    parser.add_argument("--no-compiled", action="store_true", help="without torch.compile's rivals")
    parser.add_argument("--no-peers", action="store_true", help="without JAX and architectures")
    parser.add_argument("--no-memory", action="store_true", help="without the memory column")
    add_timing(parser, "in each case", processor_time=True)
    parser.add_argument("--csv", type=Path, default=RESULTS / "step.csv")
    return parser.parse_args(arguments)
