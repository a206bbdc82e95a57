"""``python -m benchmarks.gpu``: the training step on a GPU, unattended, in under eight minutes.

Plain steps (eager, compiled, as a CUDA graph), the usual ways to the penalty, and monokernel in
each precision, of the networks and rivals of ``cases.py`` and ``rivals.py``. Cases come in the
order of their importance; what the time limit leaves undone is said. One row for each rival is
appended to ``results/gpu.csv``: times, peak memory, and the share of the roofline, of three
ceilings (tensor cores, memory bandwidth, special functions) the one that binds. Before anything is
timed a rival's loss and gradient are compared with float64.

Compiling is most of the work: before the first case, processes on every core compile what will be
timed, and what they find is in the caches of Triton and Inductor when its turn comes. Then each
rival of a case takes steps until it compiles nothing more, and only then does the clock begin.
``--no-jax`` leaves JAX out, which keeps no such cache.

``--device cpu --limit 20`` runs a few small cases without a GPU, to see that the program works; its
numbers are printed and not kept.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib.util
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from monokernel import plan

from .cases import FREE_INPUTS, PRECISIONS, Case, Job
from .measure import append_rows, captured, interleave, machine, spread
from .rivals import BASE, COMPILED_JVP, COMPILED_PLAIN, JAX, MONOKERNEL, Rival, Step, usual

__all__ = ["graphed", "main"]

RESULTS = Path(__file__).parent / "results" / "gpu.csv"
# Error of loss and gradient against float64 beyond which a rival's time does not count.
TOLERANCE = {"fp32": 1e-3, "tf32": 2e-2, "bf16": 1e-1, "fp16": 3e-2}


def cases() -> Iterator[Case]:
    """What the project promises first, then the grid along one axis at a time."""
    base = Case(65536, 64, 1, 1, "silu", 0.05, precision="bf16")
    for precision in ("tf32", "bf16"):
        yield replace(base, precision=precision)
        yield replace(base, precision=precision, width=128)
        yield replace(base, precision=precision, rows=1024)
        yield replace(base, precision=precision, width=1024)
        yield replace(base, precision=precision, width=128, outputs=8)
    for share in (0.0, 1.0):
        yield replace(base, share=share)
        yield replace(base, share=share, width=128)
        yield replace(base, share=share, width=1024)
    for rows in (1 << 20, 1 << 22):
        yield replace(base, rows=rows)
        yield replace(base, rows=rows, width=128)
    for precision in ("fp16", "fp32"):
        yield replace(base, precision=precision)
        yield replace(base, precision=precision, width=128)
    for width in (32, 256, 512, 2048):
        yield replace(base, width=width)
    yield replace(base, columns=4)
    yield replace(base, columns=4, width=128)
    yield replace(base, columns=4, width=1024)
    yield replace(base, outputs=8, columns=4)
    yield replace(base, activation="relu")
    yield replace(base, activation="relu", width=128)
    yield replace(base, rows=4096)
    yield replace(base, rows=16384)


def small_cases() -> Iterator[Case]:
    """For a machine without a GPU."""
    yield Case(256, 16, 1, 1, "silu", 0.05)
    yield Case(256, 16, 2, 1, "silu", 1.0)


# --- rivals that only a card has ------------------------------------------------------------------


def graphed(rival: Rival) -> Rival:
    """The whole step captured once and replayed."""

    def make(job: Job) -> Step:
        step = rival.make(job)
        graph, loss = captured(step.run)
        assert isinstance(loss, Tensor)
        grads = [p.grad for p in job.parameters() if p.grad is not None]

        def outcome() -> tuple[float, Tensor]:
            graph.replay()
            return loss.item(), torch.cat([g.flatten() for g in grads])

        return Step(graph.replay, outcome)

    return replace(rival, name=f"{rival.name}, CUDA graph", make=make, pools=True)


def jax_step(job: Job) -> Step:
    """JAX's, whose compilations are counted."""
    step = JAX.make(job)
    import jax

    jax.monitoring.register_event_duration_secs_listener(
        lambda event, *_, **__: Compiled.note() if "compile" in event else None
    )
    return step


def contenders(job: Job, gpu: bool, thorough: bool, jax: bool) -> Iterator[Rival]:
    """``gpu``: also as CUDA graphs; ``thorough``: what compiles for the shapes, JAX if ``jax``."""
    yield BASE
    yield MONOKERNEL
    yield usual(job)
    if gpu:
        yield graphed(BASE)
        yield graphed(MONOKERNEL)
    if thorough:
        yield COMPILED_PLAIN
        yield COMPILED_JVP
        if jax and importlib.util.find_spec("jax"):
            yield replace(JAX, make=jax_step, pools=True)


# --- compiling ------------------------------------------------------------------------------------

SETTLED = 2  # steps in a row without a compilation, after which a contender is ready
RESTLESS = 20  # steps after which it will never be


class Compiled:
    """How much Triton's JIT and XLA have compiled in this process."""

    total = 0

    @classmethod
    def note(cls, *_: object, **__: object) -> None:
        cls.total += 1


def listen_to_triton() -> None:
    with contextlib.suppress(ImportError):
        from triton import knobs

        knobs.runtime.jit_post_compile_hook = Compiled.note


def compilations() -> int:
    """What has been compiled in this process, by Dynamo and all behind it, by Triton and by XLA."""
    counters = torch._dynamo.utils.counters  # each compilation moves some of them, a step none
    return Compiled.total + sum(sum(kind.values()) for kind in counters.values())


def settle(run: Callable[[], object]) -> None:
    """Runs until nothing is compiled any more."""
    quiet = 0
    for _ in range(RESTLESS):
        before = compilations()
        run()
        quiet = quiet + 1 if compilations() == before else 0
        if quiet == SETTLED:
            return
    raise RuntimeError(f"something was compiled again in {RESTLESS} steps")


# --- the card -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ceilings:
    """What the card can do in a second: products, bytes, special functions."""

    flops: float
    bytes: float
    special: float


@lru_cache
def ceilings(precision: str, gpu: bool) -> Ceilings:
    """Measured: a large product, a large copy; special functions by the card's clock and width."""
    if not gpu:
        return Ceilings(float("nan"), float("nan"), float("nan"))
    dtype, _ = PRECISIONS[precision]
    a, b = (torch.randn(8192, 8192, device="cuda").to(dtype) for _ in range(2))
    flops = 2 * 8192**3 / _seconds(lambda: a @ b)
    source = torch.empty(1 << 29, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    rate = 2 * source.numel() / _seconds(lambda: target.copy_(source))
    card = torch.cuda.get_device_properties(0)
    clock = 1e3 * getattr(card, "clock_rate", 1_755_000)  # kHz, where this torch says it
    return Ceilings(flops, rate, card.multi_processor_count * 16 * clock)


def roofline(case: Case, limits: Ceilings) -> tuple[float, str]:
    """The least seconds that a step needs, and which ceiling says so."""
    size = PRECISIONS[case.precision][0].itemsize
    N, D, k, width = case.rows, case.outputs, case.columns, case.width
    hidden = case.flops(case.products)
    outer = 2 * N * width * (FREE_INPUTS + k + D) * 3
    # Inputs, targets, outputs and slopes once; activations once each way for wide networks.
    least = N * size * (2 * (FREE_INPUTS + k) + 4 * D) + 8 * N * D * k
    if width > 128:
        least += 6 * case.depth * N * width * size
    # exp and a reciprocal: forward, and once more where the backward computes them again.
    special = 4 * case.depth * N * width if case.activation == "silu" else 0
    by = {
        "tensor cores": (hidden + outer) / limits.flops,
        "memory": least / limits.bytes,
        "special functions": special / limits.special,
    }
    name = max(by, key=by.__getitem__)
    return by[name], name


def _seconds(call: Callable[[], object]) -> float:
    """The median of a few calls, on the card's clock of events around them."""
    for _ in range(3):
        call()
    times = []
    for _ in range(5):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return median(times)


def peak(run: Callable[[], object]) -> float:
    """MiB that a step holds beyond what was there."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return float(torch.cuda.max_memory_allocated() - before) / 2**20


# --- measuring ------------------------------------------------------------------------------------

FIELDS = [
    *["date", "card", "processor", "python", "torch", "triton", "jax"],
    *["precision", "rows", "width", "outputs", "columns", "activation", "wanted_share", "share"],
    *["rival", "kernels", "rounds", "p20_ms", "p50_ms", "p80_ms", "ratio"],
    *["peak_mib", "peak_ratio", "bound_by", "of_roofline", "others", "error", "note"],
]
Row = dict[str, object]


@dataclass(frozen=True)
class Prepared:
    """A case whose rivals have compiled: their steps, and a row for each."""

    job: Job
    gpu: bool
    rows: dict[str, Row]
    steps: dict[str, Step]
    pooling: set[str]  # those whose peak does not show what they hold


def admit(job: Job, rival: Rival) -> tuple[Step | None, Row]:
    """The step, which compiles nothing any more, or none; and what its row says of it."""
    row: Row = {"rival": rival.name, "note": ""}
    try:
        step = rival.make(job)
        loss, gradient = step.outcome()
        if rival.penalised:
            error = job.error(loss, gradient)
            row["error"] = f"{error:.1e}"
            if not error <= TOLERANCE[job.case.precision]:
                return None, row | {"note": "disagrees with float64"}
        settle(step.run)
        return step, row
    except Exception as failure:  # one rival's failure is a row of the table, not the end of it
        first = (str(failure).splitlines() or [""])[0]
        return None, row | {"note": f"{type(failure).__name__}: {first[:120]}"}


def prepare(case: Case, device: str, thorough: bool, jax: bool) -> Prepared:
    """Everything that compiles; ``thorough`` and ``jax`` as for ``contenders``."""
    gpu = device == "cuda"
    listen_to_triton()
    torch._dynamo.reset()
    gc.collect()  # the networks and graphs of the case before
    torch.set_float32_matmul_precision(PRECISIONS[case.precision][1])
    ceilings(case.precision, gpu)
    job = Job(case, device)
    ready = Prepared(job, gpu, {}, {}, set())
    for rival in contenders(job, gpu, thorough, jax):
        step, ready.rows[rival.name] = admit(job, rival)
        if rival.name.startswith(MONOKERNEL.name):
            ready.rows[rival.name]["kernels"] = str(plan(job.net, job.x1, job.x2)).splitlines()[0]
        if rival.pools:
            ready.pooling.add(rival.name)
        if step is not None:
            ready.steps[rival.name] = step
    return ready


def measure(ready: Prepared, seconds: float) -> list[Row]:
    """One row for each rival."""
    job, case, gpu, rows = ready.job, ready.job.case, ready.gpu, ready.rows
    least, bound = roofline(case, ceilings(case.precision, gpu))
    runs = {name: step.run for name, step in ready.steps.items()}
    before = compilations()
    times, others = interleave(runs, seconds, torch.cuda.synchronize if gpu else lambda: None)
    for name, each in times.items():
        row = rows[name]
        row |= spread(each)
        if compilations() != before:
            row["note"] = "something was compiled meanwhile"
        if gpu and name not in ready.pooling:
            row["peak_mib"] = f"{peak(runs[name]):.1f}"
        if name.startswith(MONOKERNEL.name):
            row |= {"bound_by": bound, "of_roofline": f"{least / median(each):.3f}"}
    base = rows[BASE.name]
    for row in rows.values():
        for key, ratio in (("p50_ms", "ratio"), ("peak_mib", "peak_ratio")):
            if key in row and float(str(base.get(key, 0))) > 0:
                row[ratio] = f"{float(str(row[key])) / float(str(base[key])):.3f}"
    common: Row = {
        **{key: value for key, value in machine().items() if key in FIELDS},
        "card": torch.cuda.get_device_name() if gpu else "none",
        "triton": _triton_version(),
        "precision": case.precision,
        "rows": case.rows,
        "width": case.width,
        "outputs": case.outputs,
        "columns": case.columns,
        "activation": case.activation,
        "wanted_share": f"{case.share:g}",
        "share": f"{job.share:.4g}",
        "others": f"{others:.3f}",
    }
    if gpu:
        torch.cuda.synchronize()  # raises if a rival left the device broken
    return [common | row for row in rows.values()]


def _triton_version() -> str:
    try:
        import triton

        return str(triton.__version__)
    except ImportError:
        return ""


# --- in processes of their own --------------------------------------------------------------------

PATIENCE = 120.0  # seconds for the compilations of a case, and again for its times

# Not forked: CUDA does not survive that.
SPAWN = multiprocessing.get_context("spawn")


def compile_ahead(todo: list[tuple[Case, bool]], device: str, seconds: float) -> None:
    """Takes a step of what will be timed, on every core, for the caches of what it compiles."""
    # What Triton compiles is the same for many rows as for few, and for any share.
    jobs = {
        (case if thorough else replace(case, rows=min(case.rows, 16384), share=0.05), thorough)
        for case, thorough in todo
    }
    end = time.perf_counter() + seconds
    with SPAWN.Pool(min(os.cpu_count() or 1, len(jobs))) as pool:
        waiting = [pool.apply_async(_take_a_step, (*job, device)) for job in jobs]
        for result in waiting:
            # A failure is the case's own to report; leaving the pool ends what still runs.
            with contextlib.suppress(Exception):
                result.get(max(0.0, end - time.perf_counter()))


def _take_a_step(case: Case, thorough: bool, device: str) -> None:
    torch.set_float32_matmul_precision(PRECISIONS[case.precision][1])
    job = Job(case, device)
    for rival in contenders(job, False, thorough, jax=False):  # JAX keeps nothing on disk
        admit(job, rival)


_ready: list[Prepared] = []  # the child's case


def _prepare(*case: Any) -> None:
    _ready[:] = [prepare(*case)]


def _measure(seconds: float) -> list[Row]:
    return measure(_ready.pop(), seconds)


class Child:
    """A process that runs the cases, and a new one after a failure or a case that hangs."""

    def __init__(self) -> None:
        self.pool = SPAWN.Pool(1)

    def prepare(self, patience: float, *case: object) -> None:
        """``prepare`` in the child, which keeps the case for ``measure``."""
        self._run(patience, _prepare, *case)

    def measure(self, patience: float, seconds: float) -> list[Row]:
        rows: list[Row] = self._run(patience, _measure, seconds)
        return rows

    def _run(self, patience: float, task: Callable[..., Any], *arguments: object) -> Any:
        try:
            return self.pool.apply_async(task, arguments).get(patience)
        except Exception:
            self.pool.terminate()
            self.pool = SPAWN.Pool(1)
            raise


def with_rivals(todo: Iterable[Case]) -> Iterator[tuple[Case, bool]]:
    """Each case, and whether what compiles for its shapes runs: once for each width and D."""
    seen: set[tuple[int, int]] = set()
    for case in todo:
        shape = (case.width, case.outputs)
        yield case, shape not in seen and case.rows <= 65536
        seen.add(shape)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.gpu", description=__doc__)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--limit", type=float, default=440, help="seconds for everything")
    parser.add_argument("--seconds", type=float, default=1.5, help="seconds of timing for a case")
    parser.add_argument("--no-jax", dest="jax", action="store_false", help="leave JAX out")
    options = parser.parse_args(arguments)
    gpu = options.device == "cuda"
    if gpu and not torch.cuda.is_available():
        print("no GPU here: nothing to measure (--device cpu tries the program)", file=sys.stderr)
        return 2
    end = time.perf_counter() + options.limit
    todo = list(with_rivals(cases() if gpu else small_cases()))
    # Each of the processes compiles one thing at a time.
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    compile_ahead(todo, options.device, options.limit / 3)
    print(f"compiled ahead, {end - time.perf_counter():.0f} s left", flush=True)

    def left(keep: float = 0.0) -> float:
        return max(1.0, min(PATIENCE, end - time.perf_counter() - keep))

    child, slowest = Child(), 0.0
    for i, (case, thorough) in enumerate(todo):
        if time.perf_counter() + slowest > end:
            print("\ntime is up: not measured are\n  " + "\n  ".join(str(c) for c, _ in todo[i:]))
            break
        try:
            # What compiles late takes the time of later cases, never that of measuring this one.
            asked = case, options.device
            try:
                child.prepare(left(slowest) / (1 + thorough), *asked, thorough, options.jax)
            except multiprocessing.TimeoutError:
                if not thorough:
                    raise
                print(f"\n{case}   what compiles for its shapes took too long", flush=True)
                child.prepare(left(slowest), *asked, False, False)
            began = time.perf_counter()
            rows = child.measure(left(), options.seconds)
            slowest = max(slowest, time.perf_counter() - began)
        except Exception as failure:
            print(f"\n{case}   failed: {type(failure).__name__}: {failure}", flush=True)
            continue
        if gpu:
            append_rows(RESULTS, FIELDS, rows)
        print(f"\n{case}   share {rows[0]['share']}", flush=True)
        for row in rows:
            print(
                f"  {row['rival']!s:32} {row.get('p50_ms', '-')!s:>10} ms  ratio "
                f"{row.get('ratio', '-')!s:>7}  peak {row.get('peak_mib', '-')!s:>9} MiB  roofline "
                f"{row.get('of_roofline', '')!s:6} error {row.get('error', '')!s:8} {row['note']}",
                flush=True,
            )
    child.pool.terminate()
    return 0


if __name__ == "__main__":
    sys.exit(main())
