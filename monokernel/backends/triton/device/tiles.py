"""Masked tiles of a layer's parameters."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["bias_row", "weight_tile"]


@triton.jit
def weight_tile(W, row, column, ROWS: tl.constexpr, COLUMNS: tl.constexpr, C: tl.constexpr):
    """The tile W[row, column] of a weight (ROWS, COLUMNS), zero outside of it."""
    mask = (row[:, None] < ROWS) & (column[None, :] < COLUMNS)
    return tl.load(W + row[:, None] * COLUMNS + column[None, :], mask=mask, other=0.0).to(C)


@triton.jit
def bias_row(b, column, COLUMNS: tl.constexpr, A: tl.constexpr):
    """b[column] as a row of the accumulation dtype, zero outside of it."""
    return tl.load(b + column, mask=column < COLUMNS, other=0.0).to(A)[None, :]
