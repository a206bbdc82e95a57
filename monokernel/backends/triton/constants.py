"""A problem as kernels take it at compile time: activations, outputs and dtypes by Triton's names.

What may move from step to step (the margin, the directions) is an argument and no part of it.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import triton.language as tl

from ...activations import ACTIVATIONS, Activation
from ...problem import Hinge, Problem, accumulate_dtype
from .target import approximate

__all__ = [
    "IDENTITY",
    "TL_DTYPES",
    "ActivationCode",
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


ActivationCode = tuple[int, float, float, float, int]
IDENTITY: ActivationCode = (0, 0.0, 0.0, 0.0, 0)


def activation_code(a: Activation, how: int) -> ActivationCode:
    """(code, p, q, r, how to exponentiate)."""
    return CODES[a.kind], a.p, a.q, a.r, how


def activation_table(problem: Problem, dtype: torch.dtype) -> tuple[ActivationCode, ...]:
    """The code of each layer's activation, for operands of a dtype."""
    return _activation_table(problem, approximate(dtype))


@lru_cache(maxsize=256)
def _activation_table(problem: Problem, how: int) -> tuple[ActivationCode, ...]:
    return tuple([activation_code(a, how) for a in problem.activations])


def output_code(problem: Problem) -> int:
    """JACOBIAN, PENALTIES or PENALTY_SUM of ``device/hinge.py``."""
    return 0 if problem.hinge is None else 1 if problem.hinge.elementwise else 2


def as_compiled(problem: Problem) -> Problem:
    """The problem without the numbers that are arguments of a kernel: what may be kept by it stays
    found while a margin moves."""
    d, nodes, columns, mode, hinge, cast = problem
    if hinge is None:
        return problem
    return Problem(d, nodes, columns, mode, Hinge((), 0.0, hinge.squared, hinge.elementwise), cast)


def power_of_two(n: int, least: int = 1) -> int:
    """The next power of two, at least ``least``: how wide a tile of n columns is."""
    return max(least, 1 << max(n - 1, 0).bit_length())
