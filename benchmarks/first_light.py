"""``python -m benchmarks.first_light``: what to run on a card before its times are believed.

    smoke     each kind of problem once on each path, against the float64 twin; --processes 12
    stress    the same step again and again: a result that moves is a race
    one       two steps of each path and nothing else, for compute-sanitizer and profilers
    sweep     times of launch configurations beside those that the rules take
    host      the host's part of an eager step, at sizes where the device waits for it

In which order is said in docs/triton.md. Nothing stops at a failure; the exit status tells of one.
``--device cpu`` tries smoke, stress and one under Triton's interpreter, on tiny sizes.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from types import ModuleType
from typing import Any, cast

import torch
from torch import Tensor

from benchmarks.cases import PRECISIONS, Case, Job
from benchmarks.rivals import BASE, MONOKERNEL
from monokernel.backends import handwritten
from monokernel.backends.triton import layered, narrow, whole
from monokernel.backends.triton.target import interpreting, products
from monokernel.backends.triton.whole.backward import launch_backward
from monokernel.backends.triton.whole.config import WholeConfig, backward_config, forward_config
from monokernel.backends.triton.whole.forward import launch_forward
from monokernel.problem import Hinge, Mode, Problem
from tests.problems import errors, inputs, problem, run

__all__ = ["main"]

PATHS: dict[str, ModuleType] = {"whole": whole, "narrow": narrow, "layered": layered}
LINEAR = Hinge()
PATIENCE = 300.0  # seconds for one trial in a process of its own


@dataclass(frozen=True)
class Trial:
    """A network of three hidden layers on one path, in a precision of ``PRECISIONS``."""

    path: str
    precision: str
    width: int
    D: int = 1
    k: int = 1
    mode: Mode = "adjoint"
    hinge: Hinge | None = LINEAR
    rows: tuple[int, ...] = (1000,)

    @property
    def problem(self) -> Problem:
        hidden = (self.width,) * 3
        return problem((8 + self.k, *hidden, self.D), "silu", self.k, self.mode, self.hinge)

    @property
    def dtype(self) -> torch.dtype:
        return PRECISIONS[self.precision][0]

    @property
    def needs(self) -> list[bool]:
        """All gradients, but on the narrow path that of x, for which it has no kernel."""
        return [self.path != "narrow"] + [True] * (2 * self.problem.depth)

    def run(self, N: int, device: str) -> list[Tensor] | None:
        """y, out and the gradients; None where the path does not serve the problem."""
        torch.set_float32_matmul_precision(PRECISIONS[self.precision][1])
        x, params = inputs(self.problem, N, self.dtype, device)
        if PATHS[self.path].refuses(self.problem, x) is not None:
            return None
        return run(PATHS[self.path], self.problem, x, params, needs=self.needs)

    def __str__(self) -> str:
        hinge = "Jacobian" if self.hinge is None else f"margin {self.hinge.margin:g}"
        if self.hinge is not None:
            hinge += " squared" * self.hinge.squared + " each" * self.hinge.elementwise
        return (
            f"{self.path:7} {self.precision} width={self.width} D={self.D} k={self.k} "
            f"{self.mode} {hinge}"
        )


# --- smoke ----------------------------------------------------------------------------------------

# Errors beyond these are more than rounding.
WORST = {"fp16": 5e-3, "bf16": 4e-2, "tf32": 5e-3, "fp32": 1e-5}


def trials() -> Iterator[Trial]:
    """Each path in every precision, with and without a hinge, of 1 row and of many."""
    hinges = (None, Hinge(margin=9.0), Hinge(margin=0.1, squared=True, elementwise=True))
    shapes: tuple[tuple[int, int, int, Mode], ...] = (
        (64, 1, 1, "adjoint"),
        (64, 1, 4, "adjoint"),
        (128, 1, 1, "adjoint"),
        (32, 8, 1, "tangent"),
        (128, 3, 2, "tangent"),
    )
    for path, precision, hinge, shape in itertools.product(PATHS, WORST, hinges, shapes):
        yield Trial(path, precision, *shape, hinge, rows=(1, 1000))


def smoke(options: argparse.Namespace) -> bool:
    todo = _tiny(trials(), options.device)
    check = partial(_check, device=options.device)
    well = True
    if options.processes == 1:
        for trial in todo:
            well &= _say(*check(trial))
        return well
    # Not forked, which CUDA does not survive; each trial in a process of its own, which an error of
    # the device cannot outlive.
    context = multiprocessing.get_context("spawn")
    with context.Pool(options.processes, maxtasksperchild=1) as pool:
        waiting = [(trial, pool.apply_async(check, (trial,))) for trial in todo]
        for trial, result in waiting:
            try:
                told = result.get(PATIENCE)
            except Exception as failure:  # a hang, or a process that died
                told = [f"FAIL {trial} {_cause(failure)}"], False
            well &= _say(*told)
    return well


def _check(trial: Trial, device: str) -> tuple[list[str], bool]:
    """A line for each number of rows, and whether all are well."""
    lines, well = [], True
    for N in trial.rows:
        began = time.perf_counter()
        try:
            got = trial.run(N, device)
            if got is None:
                return [f"none {trial}: not served"], True
            error, finite = 0.0, all(bool(t.isfinite().all()) for t in got)
            # Near its kink the hinge falls on either side in low precision: only the margin that is
            # above every slope is compared.
            if trial.hinge is None or trial.hinge.margin > 1:
                p = trial.problem
                want = run(handwritten, p, *inputs(p, N), needs=trial.needs)
                error = max(errors(got, want))
            good = finite and error < WORST[trial.precision]
            told = f"error {error:.1e}{'' if finite else ', not finite'}"
        except Exception as failure:
            good, told = False, _cause(failure)
        well &= good
        word = "ok  " if good else "BAD "
        lines.append(f"{word} {trial} N={N} {told} {time.perf_counter() - began:.1f} s")
    return lines, well


def _say(lines: list[str], well: bool) -> bool:
    print("\n".join(lines), flush=True)
    return well


def _cause(failure: BaseException) -> str:
    """What a failure came of, in one line; Triton says what is wrong in the last of its causes."""
    while failure.__cause__ is not None:
        failure = failure.__cause__
    return f"{type(failure).__name__}: {' '.join(str(failure).split())[-160:]}"


def _tiny(todo: Iterable[Trial], device: str) -> list[Trial]:
    """The trials as they are, or of sizes for the interpreter."""
    if device != "cpu":
        return list(todo)
    return [replace(t, width=16, rows=tuple(min(N, 70) for N in t.rows)) for t in todo]


# --- stress, one ----------------------------------------------------------------------------------


STRESSED = [
    Trial("whole", "fp16", 32, rows=(9001,)),
    Trial("whole", "bf16", 64, rows=(9001,)),
    Trial("whole", "fp16", 64, rows=(131_072,)),
    Trial("whole", "bf16", 128, rows=(9001,)),
    Trial("whole", "fp16", 128, rows=(131_072,)),
    Trial("layered", "bf16", 256, rows=(9001,)),
    Trial("narrow", "bf16", 128, rows=(9001,)),
]


def stress(options: argparse.Namespace) -> bool:
    """Runs that differ in a bit from the first."""
    well = True
    for trial in _tiny(STRESSED, options.device):
        (N,) = trial.rows
        first = cast(list[Tensor], trial.run(N, options.device))
        differ = 0
        for _ in range(options.rounds):
            again = cast(list[Tensor], trial.run(N, options.device))
            differ += any(not torch.equal(a, b) for a, b in zip(first, again, strict=True))
        well &= _say([f"{trial} N={N}: {differ} of {options.rounds} runs differ"], not differ)
    return well


# Two tiles and two rows of a third.
ONE = [
    Trial("whole", "bf16", 64, rows=(130,)),
    Trial("whole", "bf16", 128, rows=(130,)),
    Trial("narrow", "bf16", 128, rows=(130,)),
    Trial("layered", "bf16", 256, rows=(130,)),
]


def one(options: argparse.Namespace) -> bool:
    """A step that compiles, and the same again."""
    well = True
    for trial in _tiny(ONE, options.device):
        for N in trial.rows * 2:
            got = cast(list[Tensor], trial.run(N, options.device))
        broken = sum(not bool(t.isfinite().all()) for t in got)
        well &= _say([f"{trial}: {broken} of {len(got)} tensors not finite"], not broken)
    return well


# --- sweep ----------------------------------------------------------------------------------------


def configurations(width: int) -> Iterator[tuple[str, WholeConfig]]:
    """What the rules take in half precision, and what else a card may like better."""
    way = products(torch.device("cuda"))
    forward = forward_config(width, False, way, False)
    backward = backward_config(width, 2, way, False)
    yield "forward", forward
    yield "forward", replace(forward, per_processor=1)
    yield "backward", backward
    yield "backward", replace(backward, per_processor=1)
    if width > 64:
        yield "backward", replace(backward, chunk=64)
        yield "backward", replace(backward, chunk=128)
    else:
        yield "forward", replace(forward, rows=128, warps=8, per_processor=1)
        yield "backward", replace(backward, active_rows=64)
        yield "backward", backward_config(width, 2, way, False, few=False)


def sweep(options: argparse.Namespace) -> bool:
    """Microseconds of each configuration, and how far it is off the rule's result."""
    well = True
    for width, share in itertools.product((64, 128), (0.05, 0.0, 1.0)):
        # ∂loss/∂J is given, so that the share that violates is exact.
        trial = Trial("whole", "bf16", width, hinge=None)
        p, N = trial.problem, options.rows
        x, params = inputs(p, N, trial.dtype, options.device)
        y, J, _ = whole.forward(p, x, None, params, True)
        gy = torch.randn_like(y) / N
        gJ = torch.rand_like(J) * (torch.rand_like(J) < share) / N
        needs = [False] + [True] * len(params)
        rules: dict[str, Tensor] = {}
        for kind, config in configurations(width):
            if kind == "forward" and share:
                continue  # which the forward does not know
            call: partial[Any]
            if kind == "forward":
                call, result = partial(launch_forward, p, x, None, params, True, config), 0
            else:  # a hidden layer's weight
                call, result = partial(launch_backward, p, gy, gJ, x, params, [], needs, config), 5
            name = f"{kind:8} width={width} v={share:<4g} {config}"
            try:
                found = cast(Tensor, call()[result]).float()
                rule = rules.setdefault(kind, found)
                off = float((found - rule).norm() / rule.norm())
                well &= _say([f"{microseconds(call):9.1f} us  off {off:.0e}  {name}"], off < 0.01)
            except Exception as failure:
                well &= _say([f"     FAIL  {name}: {_cause(failure)}"], False)
    return well


def microseconds(call: Callable[[], object], calls: int = 20, rounds: int = 9) -> float:
    """The median time of one call, by replays of a graph of ``calls``."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            call()
    times: list[float] = []
    for _ in range(rounds):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / calls)
    return sorted(times)[rounds // 2]


# --- host -----------------------------------------------------------------------------------------


def host(options: argparse.Namespace) -> bool:
    """Microseconds of a step, eager and as a graph: what lies between them is the host's."""
    for width in (64, 128, 1024):
        case = Case(1024, width, 1, 1, "silu", 0.05, precision="bf16")
        job = Job(case, options.device)
        told = []
        for rival in (BASE, MONOKERNEL):
            step = rival.make(job).run
            for _ in range(20):
                step()
            torch.cuda.synchronize()
            began = time.perf_counter()
            for _ in range(options.rounds):
                step()
            torch.cuda.synchronize()
            eager = (time.perf_counter() - began) / options.rounds * 1e6
            told.append(f"{rival.name}: eager {eager:.0f}, graph {microseconds(step, 1):.0f}")
        _say([f"{case}: {'; '.join(told)} us"], True)
    return True


PARTS: dict[str, Callable[[argparse.Namespace], bool]] = {
    "smoke": smoke,
    "stress": stress,
    "one": one,
    "sweep": sweep,
    "host": host,
}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="benchmarks.first_light",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("part", choices=list(PARTS))
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--processes", type=int, default=1, help="smoke side by side: it compiles")
    parser.add_argument("--rounds", type=int, default=200, help="repetitions of stress and host")
    parser.add_argument("--rows", type=int, default=65_536, help="rows of the sweep")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("no GPU here (--device cpu tries the program)", file=sys.stderr)
        return 2
    if options.device == "cpu" and (options.part in ("sweep", "host") or not interpreting()):
        print("the CPU runs smoke, stress and one, with TRITON_INTERPRET=1", file=sys.stderr)
        return 2
    return 0 if PARTS[options.part](options) else 1


if __name__ == "__main__":
    sys.exit(main())
