"""The sums of the whole-network backward: each program's own slice, which stays in the L2 cache."""

# ruff: noqa: RET505 (see ``device/__init__.py``)

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import get, get_rows, matmul, padded_width

__all__ = [
    "fresh_sums",
    "gather",
    "gather_bias",
    "inner_gradient",
    "leave_sums",
    "unchanged",
    "zero_fill",
]

ONES = tl.constexpr(16)  # columns of ones: the fewest that a product takes


@triton.jit
def zero_fill(partials, SIZE: tl.constexpr):
    for start in range(0, SIZE, 1024):
        i = start + tl.arange(0, 1024)
        tl.store(partials + i, tl.zeros((1024,), partials.dtype.element_ty), mask=i < SIZE)
    tl.debug_barrier()


@triton.constexpr_function
def turned(units):
    """Whether a sum in registers is the transposed one: fewer than 64 rows take no wgmma, and then
    every warp holds the operands."""
    return units < 64


@triton.jit
def fresh_sums(
    WIDTHS: tl.constexpr, H: tl.constexpr, PD: tl.constexpr, BK: tl.constexpr, C: tl.constexpr,
    A: tl.constexpr,
):  # fmt: skip
    """Sums in registers, zero: of dW_1, db_1, dW_2, …"""
    L: tl.constexpr = len(WIDTHS) - 1
    sums = ()
    for l in tl.static_range(L):
        if turned(padded_width(l, L, H, PD)):
            weight = tl.zeros((H if l else BK, padded_width(l, L, H, PD)), A)
        else:
            weight = tl.zeros((padded_width(l, L, H, PD), H if l else BK), A)
        if turned(padded_width(l, L, H, PD)) or C.primitive_bitwidth > 16:
            bias = tl.zeros((padded_width(l, L, H, PD),), A)
        else:
            bias = tl.zeros((padded_width(l, L, H, PD), ONES), A)
        sums = sums + (weight, bias)  # type: ignore[assignment] # noqa: RUF005 (Triton unpacks none)
    return sums


@triton.jit
def gather(
    sums, place: tl.constexpr, left, right, column, partials, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(sum number ``place`` and leftᵀ right,), or () with that added in the program's slice."""
    if len(sums):
        if turned(left.shape[1]):
            return (sums[place] + matmul(tl.trans(right), left, C, PRECISION),)
        else:
            return (sums[place] + matmul(tl.trans(left), right, C, PRECISION),)
    else:
        product = matmul(tl.trans(left), right, C, PRECISION)
        put_weight(product, column, partials, ROWS, COLUMNS, True)
        return ()


@triton.jit
def unchanged(sums, place: tl.constexpr):
    """The same where nothing is added."""
    if len(sums):
        return (sums[place],)
    else:
        return ()


@triton.jit
def gather_bias(
    sums, place: tl.constexpr, g, partials, ROWS: tl.constexpr, C: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The same of db: Σ g over the rows. In registers by a product with ones, in which no thread
    waits for another's sum."""
    if len(sums) == 0:
        put_bias(tl.sum(g, 0), partials, ROWS, True)
        return ()
    elif len(sums[place].shape) == 1:
        return (sums[place] + tl.sum(g, 0),)
    else:
        ones = tl.full((g.shape[0], ONES), 1, C)
        return (sums[place] + matmul(tl.trans(g.to(C)), ones, C, PRECISION),)


@triton.jit
def leave_sums(
    sums, partials, WIDTHS: tl.constexpr, NEEDS: tl.constexpr, OFFSETS: tl.constexpr,
    H: tl.constexpr, PD: tl.constexpr,
):  # fmt: skip
    """Sums in registers become the program's slice."""
    L: tl.constexpr = len(WIDTHS) - 1
    for l in tl.static_range(L):
        weight = sums[2 * l]
        bias = sums[2 * l + 1]
        if turned(padded_width(l, L, H, PD)):
            weight = tl.trans(weight)
        if len(bias.shape) == 2:
            bias = tl.sum(bias, 1) * (1 / ONES)  # its columns are the same
        if NEEDS[2 * l]:
            column = tl.arange(0, weight.shape[1])
            at = partials + OFFSETS[2 * l]
            put_weight(weight, column, at, WIDTHS[l + 1], WIDTHS[l], False)
        if NEEDS[2 * l + 1]:
            put_bias(bias, partials + OFFSETS[2 * l + 1], WIDTHS[l + 1], False)


@triton.jit
def put_weight(
    product, column, partials, ROWS: tl.constexpr, COLUMNS: tl.constexpr, ADD: tl.constexpr
):
    """The product, added to what the slice has if asked to."""
    row = tl.arange(0, product.shape[0])
    at = partials + row[:, None] * COLUMNS + column[None, :]
    mask = (row[:, None] < ROWS) & (column[None, :] < COLUMNS)
    if ADD:
        product += tl.load(at, mask=mask, other=0.0)
    tl.store(at, product, mask=mask)


@triton.jit
def put_bias(total, partials, ROWS: tl.constexpr, ADD: tl.constexpr):
    row = tl.arange(0, total.shape[0])
    if ADD:
        total += tl.load(partials + row, mask=row < ROWS, other=0.0)
    tl.store(partials + row, total, mask=row < ROWS)


@triton.jit
def inner_gradient(
    sums, place: tl.constexpr, g, g_slot: tl.constexpr, hs, number: tl.constexpr,
    slot: tl.constexpr, scratch, partials, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    H: tl.constexpr, WIDE: tl.constexpr, INNER: tl.constexpr, CHUNK: tl.constexpr,
    C: tl.constexpr, A: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dW += gᵀ h, with the h kept as ``number``, or in a slot: for sums in memory CHUNK columns at
    a time, in steps of INNER rows."""
    BM: tl.constexpr = g.shape[0]
    column = tl.arange(0, H)
    if scratch is None:
        h = hs[number]
        return gather(sums, place, g, h, column, partials, ROWS, COLUMNS, C, PRECISION)
    elif len(sums):
        h = get(scratch, slot, BM, H, WIDE, 0)
        return gather(sums, place, g, h, column, partials, ROWS, COLUMNS, C, PRECISION)
    else:
        for first in tl.range(0, H, CHUNK, disable_licm=True):
            if INNER == 0 or INNER >= BM:
                right = get(scratch, slot, BM, CHUNK, WIDE, first)
                product = matmul(tl.trans(g), right, C, PRECISION)
            else:
                product = tl.zeros((g.shape[1], CHUNK), A)
                for row in tl.range(0, BM, INNER, disable_licm=True):
                    left = get_rows(scratch, g_slot, BM, INNER, g.shape[1], WIDE, row, 0)
                    right = get_rows(scratch, slot, BM, INNER, CHUNK, WIDE, row, first)
                    product += matmul(tl.trans(left), right, C, PRECISION)
            put_weight(product, first + tl.arange(0, CHUNK), partials, ROWS, COLUMNS, True)
        return ()
