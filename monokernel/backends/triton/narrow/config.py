"""What the kernels of narrow chains are launched with, and whom they serve.

The numbers come from ahead-of-time compiles (``tools/compile_report.py``: registers, no spill), not
from a device: none could be had.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from ....columns import runs_of
from ....problem import Problem
from ..active.config import product_types
from ..constants import activation_table, power_of_two

__all__ = [
    "DEEPEST",
    "FORWARD",
    "GRADIENTS",
    "INPUTS",
    "PAIRS",
    "WIDEST",
    "NarrowConfig",
    "shape_of",
]

# Hidden units that a tile holds, linear layers of which a program's registers hold the sums, and
# inputs that one product takes.
WIDEST, DEEPEST, INPUTS = 128, 4, 16


class NarrowConfig(NamedTuple):
    """A kernel of narrow chains: tiles of ``rows``, ``warps``."""

    rows: int
    warps: int


FORWARD = NarrowConfig(128, 8)
PAIRS = NarrowConfig(32, 8)
GRADIENTS = NarrowConfig(32, 8)


def shape_of(problem: Problem, x: Tensor) -> dict[str, Any]:
    """What all kernels know of the network at compile time."""
    return {
        "WIDTHS": problem.widths,
        "ACTS": activation_table(problem, x.dtype),
        "K": problem.k,
        "RUNS": runs_of(problem.columns),
        "H": power_of_two(max(problem.widths[1:-1]), 16),
        "FAN_TILE": power_of_two(problem.d, 16),
        **product_types(x.dtype),
    }
