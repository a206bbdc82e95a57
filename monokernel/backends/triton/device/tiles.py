"""Masked tiles of a layer: of its parameters, and of its value before the activation."""

# ruff: noqa: RET505 (see ``device/__init__.py``)

from __future__ import annotations

import triton
import triton.language as tl

__all__ = [
    "bias_row",
    "input_tile",
    "input_weights",
    "of_rows",
    "pre_activation",
    "weight_tile",
]


@triton.jit
def weight_tile(W, row, column, ROWS: tl.constexpr, COLUMNS: tl.constexpr, C: tl.constexpr):
    """The tile W[row, column] of a weight (ROWS, COLUMNS), zero outside of it."""
    mask = (row[:, None] < ROWS) & (column[None, :] < COLUMNS)
    return tl.load(W + row[:, None] * COLUMNS + column[None, :], mask=mask, other=0.0).to(C)


@triton.jit
def bias_row(b, column, COLUMNS: tl.constexpr, A: tl.constexpr):
    """b[column] as a row of the accumulation dtype, zero outside of it: what every tile reads again
    and the L1 cache is asked to keep."""
    row = tl.load(b + column, mask=column < COLUMNS, other=0.0, eviction_policy="evict_last")
    return row.to(A)[None, :]


@triton.jit
def of_rows(t, n, ok, A: tl.constexpr):
    """t[n], one number for each row, as a column; zero beyond ``ok``. Of all columns of tiles."""
    return tl.load(t + n, mask=ok, other=0.0, eviction_policy="evict_last").to(A)[:, None]


@triton.jit
def pre_activation(
    a, x, W, b, n, j, ok, ROW: tl.constexpr, H: tl.constexpr, FAN: tl.constexpr,
    FAN_TILE: tl.constexpr, C: tl.constexpr, A: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """a[n, j] of a layer (N, H), rows beyond ``ok`` 0: as it was kept, in rows that lie ROW apart,
    or again from its FAN inputs x, by W (H, FAN) and b."""
    if FAN == 0:
        mask = ok[:, None] & (j[None, :] < H)
        return tl.load(a + n[:, None] * ROW + j[None, :], mask=mask, other=0.0).to(A)
    else:
        w, bias = input_weights(W, b, j, H, FAN, FAN_TILE, C, A)
        left = input_tile(x, n, ok, FAN, FAN_TILE, C)
        return tl.dot(left, w, input_precision=PRECISION).to(A) + bias


@triton.jit
def input_weights(
    W, b, j, H: tl.constexpr, FAN: tl.constexpr, FAN_TILE: tl.constexpr,
    C: tl.constexpr, A: tl.constexpr,
):  # fmt: skip
    """Wᵀ (FAN_TILE, columns) of a layer of few inputs, and b as a row, zero outside of them."""
    i = tl.arange(0, FAN_TILE)
    mask = (j[None, :] < H) & (i[:, None] < FAN)
    w = tl.load(W + j[None, :] * FAN + i[:, None], mask=mask, other=0.0).to(C)
    bias = bias_row(b, j, H, A) if b is not None else tl.zeros((1, j.shape[0]), A)
    return w, bias


@triton.jit
def input_tile(x, n, ok, FAN: tl.constexpr, FAN_TILE: tl.constexpr, C: tl.constexpr):
    """The rows x[n] (FAN) as an operand, zero beyond ``ok``."""
    i = tl.arange(0, FAN_TILE)
    mask = ok[:, None] & (i[None, :] < FAN)
    return tl.load(x + n[:, None] * FAN + i[None, :], mask=mask, other=0.0).to(C)
