"""``python -m benchmarks.host``: the host's part of a step of the Triton kernels, without a device.

The package runs above a stub of the CUDA driver (``tests/stub_device.py``): all of a step is there
but what a driver does in a launch, and the kernels. Beside it, in turns: the same step launched by
Python, and where Triton is asked for each kernel anew; an autograd.Function that makes and keeps as
many tensors and does nothing else; and the plain step of one row, by PyTorch's operations on the
CPU. Needs a C compiler and no TRITON_INTERPRET.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from benchmarks.measure import interleave, machine
from monokernel import fused_mono_penalty
from monokernel.backends.triton import launch
from monokernel.backends.triton.target import interpreting
from tests.stub_device import build, stub_device
from tests.support import mlp, points

__all__ = ["main"]

Step = Callable[[], object]
ROWS = 1024
WIDTH = 64  # of three hidden layers, in bfloat16
AT_ONCE = (
    50  # steps between two looks at the clock: in a loop of training nothing else comes between
)


class Nothing(torch.autograd.Function):
    """Makes y, a penalty and gradients, keeps what a step keeps, and fills none of it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *params: Tensor) -> tuple[Tensor, Tensor]:
        y, penalty = x.new_empty(len(x), 1), x.new_empty((), dtype=torch.float32)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, *params, x.new_empty(len(x), 1, 1, dtype=torch.float32))
        return y, penalty

    @staticmethod
    def backward(ctx: Any, *_: Tensor | None) -> Any:
        _x, *params, _slopes = ctx.saved_tensors
        return None, *map(torch.empty_like, params)


def steps() -> dict[str, Step]:
    """Forward and backward with given gradients of y and the penalty, some steps in a row; the
    gradients of the parameters are dropped."""
    net = mlp(7, 1, 1, (WIDTH,) * 3, nn.SiLU(), dtype=torch.bfloat16)
    params = list(net.parameters())
    (x1, x2), one = points(ROWS, 7, 1, torch.bfloat16), points(1, 7, 1, torch.bfloat16)
    gy, of_one = (torch.ones(n, 1, dtype=torch.bfloat16) for n in (ROWS, 1))
    both = gy, torch.ones(())

    def step(call: Callable[[], Any], gradients: tuple[Tensor, ...] = both) -> Step:
        def run() -> None:
            for _ in range(AT_ONCE):
                torch.autograd.backward(call(), gradients)
                for p in params:
                    p.grad = None

        return run

    ours = step(lambda: fused_mono_penalty(net, x1, x2, return_output=True))

    def yes() -> bool:  # a mock would take longer than what it stands for
        return True

    def by_python() -> None:
        with mock.patch.object(launch, "watched", yes):
            ours()

    def asked() -> None:
        with mock.patch.object(launch, "specialised", None):
            by_python()

    return {
        "penalised": ours,
        "penalised, launched by Python": by_python,
        "penalised, Triton asked at each launch": asked,
        "an empty Function": step(lambda: Nothing.apply(torch.cat([x1, x2], -1), *params)),
        "plain, of one row": step(lambda: (net(torch.cat(one, -1)),), (of_one,)),
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.host", description=__doc__)
    parser.add_argument("--seconds", type=float, default=10.0)
    options = parser.parse_args(arguments)
    if interpreting():
        print("TRITON_INTERPRET is set: nothing is launched", file=sys.stderr)
        return 2
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        try:
            library = build(Path(folder))
        except RuntimeError as missing:
            print(missing, file=sys.stderr)
            return 2
        print(machine())
        with stub_device(library, "sm_90"):
            times, _ = interleave(steps(), options.seconds, lambda: None, clock=time.process_time)
        for name, found in times.items():
            print(f"{median(found) / AT_ONCE * 1e6:6.0f} us  {name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
