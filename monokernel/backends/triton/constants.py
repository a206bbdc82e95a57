"""A problem as kernels take it at compile time: activations, outputs and dtypes by Triton's names.

What may move from step to step (the margin, the directions) is an argument and no part of it.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import triton.language as tl

from ...activations import ACTIVATIONS, Activation
from ...problem import Problem, accumulate_dtype

__all__ = [
    "TL_DTYPES",
    "accumulator",
    "activation_code",
    "activation_table",
    "as_compiled",
    "output_code",
    "power_of_two",
]

TL_DTYPES = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}
# What the kernels call an activation's kind; those that whole-network kernels serve come first.
CODES = {kind: code for code, kind in enumerate(ACTIVATIONS)}


def accumulator(dtype: torch.dtype) -> Any:
    """The accumulation dtype, in Triton's name."""
    return TL_DTYPES[accumulate_dtype(dtype)]


def activation_code(a: Activation) -> tuple[int, float, float, float]:
    """(code, p, q, r)."""
    return CODES[a.kind], a.p, a.q, a.r


@lru_cache(maxsize=256)
def activation_table(problem: Problem) -> tuple[tuple[int, float, float, float], ...]:
    """The code of each layer's activation."""
    return tuple(map(activation_code, problem.activations))


def output_code(problem: Problem) -> int:
    """JACOBIAN, PENALTIES or PENALTY_SUM of ``device/hinge.py``."""
    return 0 if problem.hinge is None else 1 if problem.hinge.elementwise else 2


def as_compiled(problem: Problem) -> Problem:
    """The problem without the numbers that are arguments of a kernel."""
    if problem.hinge is None:
        return problem
    return problem._replace(hinge=problem.hinge._replace(direction=(), margin=0.0))


def power_of_two(n: int, least: int = 1) -> int:
    """The next power of two, at least ``least``: how wide a tile of n columns is."""
    return max(least, 1 << max(n - 1, 0).bit_length())
