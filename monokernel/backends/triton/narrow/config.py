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
    "COLUMNS",
    "DEEPEST",
    "FORWARD",
    "INPUTS",
    "SERVED",
    "WIDEST",
    "NarrowConfig",
    "gradients_config",
    "is_padded",
    "pairs_config",
    "shape_of",
]

# Hidden units that a tile holds, linear layers of which a program's registers hold the sums, inputs
# that one product takes, and constrained columns whose slopes are found one by one.
WIDEST, DEEPEST, INPUTS, COLUMNS = 128, 4, 16, 4
# Others spill: 8 bytes with GELU's tanh form, 64 in the forward with leaky ReLU, 96 with tanh, 256
# with GELU, 1048 with Mish.
SERVED = ("relu", "hardtanh", "silu")


class NarrowConfig(NamedTuple):
    """A kernel of narrow chains: tiles of ``rows``, ``warps``."""

    rows: int
    warps: int


FORWARD = NarrowConfig(128, 8)
PAIRS = NarrowConfig(32, 8)
PADDED_PAIRS = NarrowConfig(16, 8)
GRADIENTS = NarrowConfig(32, 8)
PADDED_GRADIENTS = NarrowConfig(16, 8)


def pairs_config(problem: Problem) -> NarrowConfig:
    """With masks for the columns of a padded layer 32 pairs spill 112 bytes."""
    return PADDED_PAIRS if is_padded(problem) else PAIRS


def gradients_config(problem: Problem) -> NarrowConfig:
    """With those masks 32 rows spill 8 to 16 bytes."""
    return PADDED_GRADIENTS if is_padded(problem) else GRADIENTS


def is_padded(problem: Problem) -> bool:
    """Whether a hidden layer has fewer units than a tile."""
    return set(problem.widths[1:-1]) != {WIDEST}


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
