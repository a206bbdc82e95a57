"""What the penalty costs under ``torch.compile``: networks of the zoo, both steps compiled.

    python -m benchmarks compiled            prints the table of docs/performance.md

Time of one thread, so that others on the machine do not matter; loss and gradient of the compiled
step are compared with the eager one's before it is timed.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from statistics import quantiles

import torch
from torch import Tensor

from tests.zoo import ZOO

from .measure import interleave
from .zoo import WIDTH, Case, Job

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
        "plain": torch.compile(job.plain, fullgraph=True),
        "compiled": torch.compile(job.penalised, fullgraph=True),
        "eager": job.penalised,
    }
    steps = {name: job.step(loss) for name, loss in losses.items()}
    if not case.draws:
        (got, grads), (want, truth) = (_found(job, steps[name]) for name in ("compiled", "eager"))
        error = max(abs(got - want) / abs(want), float((grads - truth).norm() / truth.norm()))
        if not error <= TOLERANCE:
            raise RuntimeError(f"{case.network}: the compiled step is off by {error:.1e}")
    times, _ = interleave(steps, seconds, lambda: None, clock=time.thread_time)
    low = {name: quantiles(times[name], n=10, method="inclusive")[0] for name in steps}
    ratios = [f"{low[name] / low['plain']:.2f}" for name in ("compiled", "eager")]
    return f"| {case.network} | {case.rows} | {1e3 * low['plain']:.2f} | {' | '.join(ratios)} |"


def _found(job: Job, step: object) -> tuple[float, Tensor]:
    assert callable(step)
    loss = step()
    return loss, torch.cat([p.grad.flatten() for p in job.net.parameters() if p.grad is not None])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks compiled",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
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
            case = Case(name, rows, options.outputs, 1, options.width)
            print(line(case, options.seconds), flush=True)


if __name__ == "__main__":
    main()
