"""The sums of the whole-network backward: each program's own slice, which stays in the L2 cache."""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import get, get_rows, matmul

__all__ = ["add_bias", "add_weight", "inner_gradient", "zero_fill"]


@triton.jit
def zero_fill(partials, SIZE: tl.constexpr):
    for start in range(0, SIZE, 1024):
        i = start + tl.arange(0, 1024)
        tl.store(partials + i, tl.zeros((1024,), partials.dtype.element_ty), mask=i < SIZE)
    tl.debug_barrier()


@triton.jit
def add_weight(product, column, partials, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row = tl.arange(0, product.shape[0])
    at = partials + row[:, None] * COLUMNS + column[None, :]
    mask = (row[:, None] < ROWS) & (column[None, :] < COLUMNS)
    tl.store(at, tl.load(at, mask=mask, other=0.0) + product, mask=mask)


@triton.jit
def add_bias(g, partials, ROWS: tl.constexpr):
    row = tl.arange(0, g.shape[1])
    at = partials + row
    tl.store(at, tl.load(at, mask=row < ROWS, other=0.0) + tl.sum(g, 0), mask=row < ROWS)


@triton.jit
def inner_gradient(
    g, g_slot: tl.constexpr, slot: tl.constexpr, scratch, partials, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, H: tl.constexpr, WIDE: tl.constexpr, INNER: tl.constexpr,
    CHUNK: tl.constexpr, C: tl.constexpr, A: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dW += gᵀ h, with the h in a slot, CHUNK columns at a time, in steps of INNER rows."""
    BM: tl.constexpr = g.shape[0]
    for first in tl.range(0, H, CHUNK, disable_licm=True):
        if INNER == 0 or INNER >= BM:
            h = get(scratch, slot, BM, CHUNK, WIDE, first)
            product = matmul(tl.trans(g), h, C, PRECISION)
        else:
            product = tl.zeros((g.shape[1], CHUNK), A)
            for row in tl.range(0, BM, INNER, disable_licm=True):
                left = get_rows(scratch, g_slot, BM, INNER, g.shape[1], WIDE, row, 0)
                h = get_rows(scratch, slot, BM, INNER, CHUNK, WIDE, row, first)
                product += matmul(tl.trans(left), h, C, PRECISION)
        add_weight(product, first + tl.arange(0, CHUNK), partials, ROWS, COLUMNS)
