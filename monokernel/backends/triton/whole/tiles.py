"""Pieces of the two whole-network kernels: their compile-time description and the chain's steps.

A tile holds BM rows of one layer in registers. Hidden layers share one padded width H; the last
layer's outputs are padded to PD. Padding costs nothing that is stored: weights are zero there, so
whatever σ(0) is in a padded unit meets a zero on its way on, and no cotangent comes back to it.
Only an inf times such a zero would be a NaN: products are ``within`` their width.
"""

# ruff: noqa: RET505 (see ``device/__init__.py``)

from __future__ import annotations

import triton
import triton.language as tl

from ..device.activations import APPROXIMATE
from ..device.tiles import bias_row, weight_tile

__all__ = [
    "affine_up",
    "after",
    "as_operand",
    "barrier",
    "first_layer",
    "get",
    "get_rows",
    "keep",
    "matmul",
    "padded_width",
    "product_down",
    "product_up",
    "put",
    "recall",
    "through",
    "unmoving",
]


@triton.jit
def matmul(a, b, C: tl.constexpr, PRECISION: tl.constexpr):
    """a @ b with operands in the compute dtype and the sum in the accumulation dtype."""
    return tl.dot(a.to(C), b.to(C), input_precision=PRECISION)


@triton.jit
def within(tile, WIDTH: tl.constexpr):
    """The tile, zero in its padded columns."""
    if tile.shape[1] == WIDTH:
        return tile
    else:
        inside = tl.arange(0, tile.shape[1])[None, :] < WIDTH
        return tl.where(inside, tile, tl.zeros_like(tile))


@triton.constexpr_function
def padded_width(l, L, H, PD):
    """The padded number of units after layer l (counted from 0) of L."""
    return PD if l == L - 1 else H


@triton.jit
def first_layer(
    x,
    n,
    ok,
    W,
    b,
    WIDTHS: tl.constexpr,
    BIAS: tl.constexpr,
    OUT: tl.constexpr,
    BK: tl.constexpr,
    C: tl.constexpr,
    A: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """a_1 of the rows n of x, in chunks of BK input columns."""
    d: tl.constexpr = WIDTHS[0]
    BM: tl.constexpr = n.shape[0]
    unit = tl.arange(0, OUT)
    a = tl.zeros((BM, OUT), A)
    for start in range(0, d, BK):
        column = start + tl.arange(0, BK)
        h = tl.load(
            x + n[:, None] * d + column[None, :],
            mask=ok[:, None] & (column[None, :] < d),
            other=0.0,
        )
        w = weight_tile(W, unit, column, WIDTHS[1], d, C)
        a += matmul(h, tl.trans(w), C, PRECISION)
    a = within(a, WIDTHS[1])
    if BIAS:
        a += bias_row(b, unit, WIDTHS[1], A)
    return a


# A slot's place is a scalar and the offsets in it are the same for all, so that they cost registers
# once.
#
# What is needed again on the way back stays in registers (a tuple of tiles), or, where those would
# spill, in this program's own slots of a scratch buffer, which stays in the L2 cache.


@triton.jit
def put(scratch, slot: tl.constexpr, tile, WIDE: tl.constexpr):
    """Leaves a tile (BM, ≤ WIDE) in a slot of the program's scratch."""
    i = tl.arange(0, tile.shape[0])
    j = tl.arange(0, tile.shape[1])
    base = scratch + slot * tile.shape[0] * WIDE
    tl.store(base + (i[:, None] * WIDE + j[None, :]), tile)


@triton.jit
def get(
    scratch, slot: tl.constexpr, BM: tl.constexpr, WIDTH: tl.constexpr, WIDE: tl.constexpr, first
):
    """WIDTH columns, from ``first`` on, of the tile in a slot."""
    return get_rows(scratch, slot, BM, BM, WIDTH, WIDE, 0, first)


@triton.jit
def get_rows(
    scratch, slot: tl.constexpr, BM: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
    WIDE: tl.constexpr, row, column,
):  # fmt: skip
    """ROWS x WIDTH elements, from (row, column) on, of the tile of BM rows in a slot."""
    i = tl.arange(0, ROWS)
    j = tl.arange(0, WIDTH)
    base = scratch + slot * BM * WIDE + row * WIDE + column
    return tl.load(base + (i[:, None] * WIDE + j[None, :]))


@triton.jit
def through(scratch, slot: tl.constexpr, tile, WIDE: tl.constexpr, INNER: tl.constexpr):
    """The tile, by way of a slot if products take their operand from memory (INNER > 0).

    With one product feeding the next the compiler gives every warp all columns: 64 registers for a
    64 x 128 sum. A detour through memory hides the chain from it, and 8 warps take 32.
    """
    if INNER == 0:
        return tile
    else:
        put(scratch, slot, tile, WIDE)
        tl.debug_barrier()
        return get(scratch, slot, tile.shape[0], tile.shape[1], WIDE, 0)


@triton.jit
def product_up(
    h, scratch, slot: tl.constexpr, ws, l: tl.constexpr, WIDTHS: tl.constexpr, H: tl.constexpr,
    PD: tl.constexpr, INNER: tl.constexpr, C: tl.constexpr, A: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """h W_lᵀ for any layer but the first; in steps of INNER columns of h, from its slot.

    Before Hopper every warp holds the weights that it multiplies with: 256 registers of a thread
    for 128 x 128 in half precision, unless they come in steps.
    """
    row = tl.arange(0, padded_width(l, len(WIDTHS) - 1, H, PD))
    if INNER == 0 or INNER >= H:
        w = weight_tile(ws[l], row, tl.arange(0, H), WIDTHS[l + 1], WIDTHS[l], C)
        return within(matmul(h, tl.trans(w), C, PRECISION), WIDTHS[l + 1])
    else:
        total = tl.zeros((h.shape[0], row.shape[0]), A)
        for first in tl.range(0, H, INNER, disable_licm=True):
            part = get(scratch, slot, h.shape[0], INNER, max(H, PD), first)
            column = first + tl.arange(0, INNER)
            w = weight_tile(ws[l], row, column, WIDTHS[l + 1], WIDTHS[l], C)
            total += matmul(part, tl.trans(w), C, PRECISION)
        return within(total, WIDTHS[l + 1])


@triton.jit
def product_down(
    p, scratch, slot: tl.constexpr, ws, l: tl.constexpr, WIDTHS: tl.constexpr, H: tl.constexpr,
    PD: tl.constexpr, INNER: tl.constexpr, C: tl.constexpr, A: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """p W_l for any layer but the first; in steps of INNER columns of p, from its slot."""
    OUT: tl.constexpr = p.shape[1]
    column = tl.arange(0, H)
    if INNER == 0 or INNER >= OUT:
        w = weight_tile(ws[l], tl.arange(0, OUT), column, WIDTHS[l + 1], WIDTHS[l], C)
        return within(matmul(p, w, C, PRECISION), WIDTHS[l])
    else:
        total = tl.zeros((p.shape[0], H), A)
        for first in tl.range(0, OUT, INNER, disable_licm=True):
            part = get(scratch, slot, p.shape[0], INNER, max(H, PD), first)
            row = first + tl.arange(0, INNER)
            w = weight_tile(ws[l], row, column, WIDTHS[l + 1], WIDTHS[l], C)
            total += matmul(part, w, C, PRECISION)
        return within(total, WIDTHS[l])


@triton.jit
def affine_up(
    h, scratch, slot: tl.constexpr, ws, bs, l: tl.constexpr, WIDTHS: tl.constexpr,
    BIAS: tl.constexpr, H: tl.constexpr, PD: tl.constexpr, INNER: tl.constexpr,
    C: tl.constexpr, A: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """a_l = h W_lᵀ + b_l."""
    a = product_up(h, scratch, slot, ws, l, WIDTHS, H, PD, INNER, C, A, PRECISION)
    if BIAS[l]:
        a += bias_row(bs[l], tl.arange(0, a.shape[1]), WIDTHS[l + 1], A)
    return a


@triton.jit
def keep(
    kept, tile, scratch, slot: tl.constexpr, WIDE: tl.constexpr, C: tl.constexpr, HOW: tl.constexpr
):
    """``kept`` with one more tile: in registers, or in a slot of the scratch if there is one."""
    if scratch is None:
        return kept + (packed(tile, C, HOW),)  # noqa: RUF005 (Triton unpacks no tuples)
    else:
        put(scratch, slot, tile.to(C), WIDE)
        return kept


@triton.jit
def recall(
    kept, number: tl.constexpr, scratch, slot: tl.constexpr, BM: tl.constexpr, WIDTH: tl.constexpr,
    WIDE: tl.constexpr, C: tl.constexpr, A: tl.constexpr, HOW: tl.constexpr,
):  # fmt: skip
    """The tile that was kept as ``number``, or in a slot of the scratch if there is one."""
    if scratch is None:
        return widened(kept[number], C, HOW).to(A)
    else:
        return get(scratch, slot, BM, WIDTH, WIDE, 0).to(A)


@triton.jit
def as_operand(kept, tile, scratch, slot: tl.constexpr, WIDE: tl.constexpr):
    """``kept`` with one more tile that products take: as it is, which leaves it in shared memory,
    or in a slot of the scratch if there is one."""
    if scratch is None:
        return kept + (tile,)  # noqa: RUF005 (Triton unpacks no tuples)
    else:
        put(scratch, slot, tile, WIDE)
        return kept


# Of half precision an NVIDIA card holds two numbers in a register if it is told to: else a tile
# that is kept for long takes twice the registers.


@triton.jit
def packed(tile, C: tl.constexpr, HOW: tl.constexpr):
    """The tile in the compute dtype, two neighbours in a word where it is of half precision."""
    if HOW == APPROXIMATE:
        low, high = tl.split(
            tl.reshape(tile.to(tl.float32), (tile.shape[0], tile.shape[1] // 2, 2))
        )
        if C.is_bf16():
            return tl.inline_asm_elementwise(
                "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", [low, high], tl.uint32, True, 1
            )
        else:
            return tl.inline_asm_elementwise(
                "cvt.rn.f16x2.f32 $0, $2, $1;", "=r,f,f", [low, high], tl.uint32, True, 1
            )
    else:
        return tile.to(C)


@triton.jit
def unpacked(tile, C: tl.constexpr, HOW: tl.constexpr):
    """What was packed, in the compute dtype."""
    if HOW == APPROXIMATE:
        low = (tile & 0xFFFF).to(tl.uint16).to(C, bitcast=True)
        high = (tile >> 16).to(tl.uint16).to(C, bitcast=True)
        return tl.reshape(tl.join(low, high), (tile.shape[0], tile.shape[1] * 2))
    else:
        return tile


@triton.jit
def widened(tile, C: tl.constexpr, HOW: tl.constexpr):
    """What was packed, to compute with: a bfloat16 is the upper half of a float32, which Triton
    before 3.9 does not find by itself."""
    if HOW == APPROXIMATE and C.is_bf16():
        low = (tile << 16).to(tl.float32, bitcast=True)
        high = (tile & 0xFFFF0000).to(tl.float32, bitcast=True)
        return tl.reshape(tl.join(low, high), (tile.shape[0], tile.shape[1] * 2))
    else:
        return unpacked(tile, C, HOW)


@triton.jit
def after(first, tile, zero, C: tl.constexpr, HOW: tl.constexpr):
    """The tile in the compute dtype, not before ``first``, which is packed.

    ``zero`` is 0, which the compiler cannot know. It would take the next product before σ', and
    hold what σ' is made of meanwhile: three registers for half of one, 136 bytes spilled at width
    64 on sm_90.
    """
    if HOW == APPROXIMATE:
        return unpacked(packed(tile, C, HOW) | (first & zero.to(tl.uint32)), C, HOW)
    else:
        return tile.to(C)


@triton.jit
def unmoving(tile):
    """0, which the compiler cannot know: with it an address or an offset stays in the loop over
    tiles. Triton 3.6 takes what is the same for all tiles out of it, whatever the loop says of
    that, and holds it in registers: 32 to 48 bytes spilled in ``narrow_forward``."""
    return tile >> 31


@triton.jit
def barrier(scratch):
    """Between what threads leave in the scratch and what others take, if there is one."""
    if scratch is not None:
        tl.debug_barrier()
