"""Which columns of x are constrained: runs of neighbours, known at compile time."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["column_of", "first_of", "last_of", "place_of"]


@triton.jit
def column_of(c, RUNS: tl.constexpr):
    """The columns of x that number ``c`` of the constrained ones are."""
    column = c + (RUNS[0][0] - RUNS[0][1])
    for r in tl.static_range(1, len(RUNS)):
        column = tl.where(c >= RUNS[r][1], c + (RUNS[r][0] - RUNS[r][1]), column)
    return column


@triton.jit
def place_of(column, RUNS: tl.constexpr):
    """Which of the constrained ones the columns of x are; below 0 where they are none, or beyond
    them. Of one run that the compiler sees to be contiguous, so that loads by it are wide."""
    if len(RUNS) == 1:
        place = column - (RUNS[0][0] - RUNS[0][1])
    else:
        place = tl.full(column.shape, -1, tl.int32)
        for r in tl.static_range(len(RUNS)):
            inside = (column >= RUNS[r][0]) & (column < RUNS[r][0] + RUNS[r][2])
            place = tl.where(inside, column - (RUNS[r][0] - RUNS[r][1]), place)
    return place


@triton.constexpr_function
def first_of(runs):
    """The first of the constrained columns."""
    return runs[0][0]


@triton.constexpr_function
def last_of(runs):
    """The column after the last of them."""
    return runs[-1][0] + runs[-1][2]
