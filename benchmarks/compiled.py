"""What the penalty costs under ``torch.compile``: networks of the zoo, both steps compiled.

    python -m benchmarks compiled            prints the table of docs/performance.md

Time of one thread, so that others on the machine do not matter; loss and gradient of the compiled
step are compared with the eager one's before it is timed.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from statistics import quantiles

import torch

from tests.zoo import ACTIVE, ZOO

from . import rivals
from .cases import Case, Job
from .measure import interleave
from .options import parser_of
from .zoo import WIDTH, case_of

__all__ = ["main"]

NETWORKS = (
    *("MLP with active dropout", "tabular ResNet", "pre-norm LayerNorm"),
    *("SwiGLU", "DCN-v2", "highway", "own forward"),
)
TOLERANCE = 1e-4
HEAD = "| network | rows | plain step, compiled, ms | penalised, compiled | penalised, eager |"


def line(case: Case, seconds: float) -> str:
    """One line of the table: ratios to the compiled plain step, lowest tenths."""
    job = Job(case)
    losses = {
        "plain": torch.compile(rivals.plain_loss, fullgraph=True),
        "compiled": torch.compile(rivals.penalised_loss, fullgraph=True),
        "eager": rivals.penalised_loss,
    }
    steps = {name: rivals.step_of(job, partial(loss, job)) for name, loss in losses.items()}
    if case.network not in ACTIVE:
        (got, grads), (want, truth) = (steps[name].outcome() for name in ("compiled", "eager"))
        error = max(abs(got - want) / abs(want), float((grads - truth).norm() / truth.norm()))
        if not error <= TOLERANCE:
            raise RuntimeError(f"{case.network}: the compiled step is off by {error:.1e}")
    runs = {name: step.run for name, step in steps.items()}
    times, _ = interleave(runs, seconds, lambda: None, clock=time.thread_time)
    low = {name: quantiles(times[name], n=10, method="inclusive")[0] for name in steps}
    ratios = [f"{low[name] / low['plain']:.2f}" for name in ("compiled", "eager")]
    return f"| {case.network} | {case.rows} | {1e3 * low['plain']:.2f} | {' | '.join(ratios)} |"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = parser_of("compiled", __doc__)
    parser.add_argument("--networks", nargs="+", choices=tuple(ZOO), default=NETWORKS)
    parser.add_argument("--rows", nargs="+", type=int, default=(8192,))
    parser.add_argument("--outputs", type=int, default=1)
    parser.add_argument("--width", type=int, default=WIDTH)
    parser.add_argument("--seconds", type=float, default=6.0)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    print(HEAD, "|---" * HEAD.count(" | ") + "|---|", sep="\n")
    for rows in options.rows:
        for name in options.networks:
            torch._dynamo.reset()
            case = case_of(name, rows, options.outputs, 1, options.width)
            print(line(case, options.seconds), flush=True)


if __name__ == "__main__":
    main()
