"""Taking turns with the clock, the peak of the memory, and what machine it was.

Variants are timed round-robin in one process, so that whatever else the machine does falls on all
of them alike; medians are reported. Peak memory is the resident set's high-water mark over one
step, in a fresh child process for each rival: it sees what every library allocates, PyTorch's or
not.
"""

from __future__ import annotations

import csv
import gc
import multiprocessing
import os
import platform
import random
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from statistics import median, quantiles
from typing import TypeVar

import torch

__all__ = [
    "QUIET",
    "Bystanders",
    "Timings",
    "append_rows",
    "captured",
    "interleave",
    "machine",
    "matmul_flops",
    "peak_bytes",
    "spread",
]

MOST_ROUNDS, FEWEST_ROUNDS, WARM_UP = 200, 5, 2
BOUT = 0.3  # seconds; the system counts in hundredths
# A step shorter than this runs three times in a row and the third counts. The threads of the
# neighbour's library spin on for some milliseconds before they sleep (OpenMP's against JAX's own),
# and the system clears away memory that a long neighbour gave back: the second run of a step of
# 6 ms took 12 to 14 after double backward of 200 ms, the third 6 again.
LONG, RUNS = 0.1, 3
QUIET = 0.05  # the share of the machine that others may take in a measurement to be trusted

Timings = dict[str, list[float]]
Clock = Callable[[], float]
Prepare = Callable[..., Callable[[], object]]


@dataclass
class Bout:
    """A few rounds in a row, and the share of the machine that others took meanwhile."""

    times: Timings
    seconds: float
    others: float

    @property
    def rounds(self) -> int:
        return len(next(iter(self.times.values())))


def interleave(
    steps: Mapping[str, Callable[[], object]],
    seconds: float,
    sync: Callable[[], None],
    patience: float = 0.0,
    clock: Clock = time.perf_counter,
) -> tuple[Timings, float]:
    """Seconds of each call, the steps taking turns, and the share of the machine others took.

    Goes on for about so many seconds and at least five rounds. Bouts that other processes disturb
    do not count if there are enough others; with ``patience`` it waits so long for those. With
    ``clock=time.process_time`` (for one thread) others do not matter.
    """
    order, shuffle = list(steps), random.Random(0)
    bouts: list[Bout] = []
    collecting = gc.isenabled()
    gc.disable()
    try:
        _rounds(steps, order, shuffle, 0.0, sync, clock, WARM_UP)
        begin = time.perf_counter()
        while True:
            bouts.append(_rounds(steps, order, shuffle, BOUT, sync, clock))
            quiet = [bout for bout in bouts if not bout.others > QUIET]
            if _enough(quiet, seconds):
                break
            left = max(patience, seconds) - (time.perf_counter() - begin)
            if left < 0 and _enough(bouts, 0.0):
                break
            if patience and bouts[-1].others > QUIET:
                Bystanders().wait(min(left, 10.0))
    finally:
        if collecting:
            gc.enable()
    if not _enough(quiet, 0.0):
        quiet = bouts
    times = {name: [t for bout in quiet for t in bout.times[name]] for name in steps}
    length = sum(bout.seconds for bout in quiet)
    return times, sum(bout.others * bout.seconds for bout in quiet) / length


def _enough(bouts: Sequence[Bout], seconds: float) -> bool:
    rounds = sum(bout.rounds for bout in bouts)
    return rounds >= FEWEST_ROUNDS and (
        rounds >= MOST_ROUNDS or sum(bout.seconds for bout in bouts) >= seconds
    )


def _rounds(
    steps: Mapping[str, Callable[[], object]],
    order: list[str],
    shuffle: random.Random,
    seconds: float,
    sync: Callable[[], None],
    clock: Clock,
    fewest: int = 1,
) -> Bout:
    times: Timings = {name: [] for name in steps}
    bystanders, start, done = Bystanders(), time.perf_counter(), 0
    while done < fewest or time.perf_counter() - start < seconds:
        shuffle.shuffle(order)  # nobody always follows the same neighbour
        for name in order:
            for _ in range(RUNS):
                sync()
                begin = clock()
                steps[name]()
                sync()
                took = clock() - begin
                if took > LONG:
                    break
            times[name].append(took)
        done += 1
    others = bystanders.share() if clock is time.perf_counter else 0.0
    return Bout(times, time.perf_counter() - start, others)


def spread(times: Sequence[float]) -> dict[str, str]:
    """What a row of the CSV says of a step's times."""
    p20, _, _, p80 = quantiles(times, n=5, method="inclusive")
    found = {"p20_ms": p20, "p50_ms": median(times), "p80_ms": p80}
    return {"rounds": str(len(times)), **{key: f"{1e3 * s:.4f}" for key, s in found.items()}}


class Bystanders:
    """The share of the machine that other processes take, between two looks (on Linux)."""

    def __init__(self) -> None:
        self.before = self._look()

    def share(self) -> float:
        """Since the last call, or since the beginning."""
        before, self.before = self.before, self._look()
        if before is None or self.before is None:
            return 0.0
        (all0, idle0, own0), (all1, idle1, own1) = before, self.before
        whole = max(all1 - all0, 1e-9)
        return min(1.0, max(0.0, (whole - (idle1 - idle0) - (own1 - own0)) / whole))

    @staticmethod
    def _look() -> tuple[float, float, float] | None:
        """Seconds of all processors: in all, idle, and ours."""
        try:
            with open("/proc/stat") as lines:
                ticks = [int(word) for word in lines.readline().split()[1:9]]
        except OSError:
            return None
        second = os.sysconf("SC_CLK_TCK")
        own = os.times()
        return sum(ticks) / second, (ticks[3] + ticks[4]) / second, own.user + own.system

    def wait(self, seconds: float) -> None:
        """Until the machine has been quiet for half a second, or for so long."""
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            self.share()
            time.sleep(0.5)
            if self.share() < QUIET:
                break


def append_rows(path: Path, fields: Sequence[str], rows: Sequence[Mapping[str, object]]) -> None:
    """To a CSV, which is only ever added to."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fields, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(rows)


Loss = TypeVar("Loss")


def captured(step: Callable[[], Loss]) -> tuple[torch.cuda.CUDAGraph, Loss]:
    """The whole step as a CUDA graph to be replayed, and its loss, which each replay fills."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step()
    return graph, loss


_best_flops: dict[str, float] = {}


def matmul_flops(device: str, sync: Callable[[], None], clock: Clock = time.perf_counter) -> float:
    """The best rate of large float32 matrix products seen so far, operations per second."""
    best = _best_flops.get(device, 0.0)
    repeats = 2 if best else 8
    for n in (1024, 2048):
        a, b = torch.randn(n, n, device=device), torch.randn(n, n, device=device)
        for _ in range(repeats):
            sync()
            begin = clock()
            torch.mm(a, b)
            sync()
            best = max(best, 2 * n**3 / (clock() - begin))
    _best_flops[device] = best
    return best


def machine() -> dict[str, str]:
    """What a row of the CSV says of its conditions."""
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    try:
        import jax

        versions["jax"] = jax.__version__
    except ImportError:
        versions["jax"] = ""
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M"),
        "machine": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "threads": str(torch.get_num_threads()),
        **versions,
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            names = [line.split(":", 1)[1].strip() for line in lines if "model name" in line]
    except OSError:
        names = []
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{name} ({torch.backends.cpu.get_cpu_capability()})"


# --- memory ---------------------------------------------------------------------------------------


def peak_bytes(prepare: Prepare, *arguments: object) -> int | None:
    """Bytes by which the step that ``prepare`` makes of the arguments raises the peak; None where
    Linux does not tell. It also runs a small one, so that the code is loaded."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.measure"])
    threads = torch.get_num_threads()
    try:
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            return pool.submit(_peak, prepare, arguments, threads).result()
    except (OSError, BrokenProcessPool):
        return None


def _peak(prepare: Prepare, arguments: Sequence[object], threads: int) -> int:
    torch.set_num_threads(threads)
    step = prepare(*arguments)
    gc.collect()
    _trim()
    before = _status("VmRSS")
    with open("/proc/self/clear_refs", "w") as reset:
        reset.write("5")  # the high-water mark starts anew
    step()
    return max(0, _status("VmHWM") - before)


def _status(key: str) -> int:
    with open("/proc/self/status") as lines:
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith(key))


def _trim() -> None:
    """Hands freed memory back to the system, so that reusing it counts as using it."""
    import ctypes

    try:
        ctypes.CDLL(None).malloc_trim(0)
    except AttributeError:  # not glibc
        return
