"""The passes of the whole-network backward over the layers, each with one chain in registers.

What they hand on to each other lies in the program's scratch slots, each L tiles of BM rows:
σ'(a_l); h_l; ḣ_l; σ''(a_l), times ȧ_l, times P_l. Whatever takes special functions is evaluated
once, on the way up. (Tangents beside activations in one pass, as in the forward, spill at width
128.)
"""

# ruff: noqa: RET505 (see ``device/__init__.py``)

from __future__ import annotations

import triton
import triton.language as tl

from ..device.activations import activation_of
from ..device.columns import first_of, last_of, place_of
from ..device.hinge import slope_cotangent
from ..device.tiles import weight_tile
from .sums import gather, gather_bias, inner_gradient, unchanged
from .tiles import (
    affine_up,
    after,
    as_operand,
    barrier,
    first_layer,
    get,
    keep,
    matmul,
    padded_width,
    product_down,
    product_up,
    put,
    recall,
    through,
)

__all__ = ["down_pass", "seed_pass", "slots", "tangent_pass", "up_pass"]

IDENTITY = tl.constexpr(0)
SLOPE_SLOT = tl.constexpr(0)
H_SLOT = tl.constexpr(1)
H_DOT_SLOT = tl.constexpr(2)
CURVATURE_SLOT = tl.constexpr(3)
PASSING_SLOT = tl.constexpr(4)  # one tile


@triton.constexpr_function
def slots(acts):
    """How many tiles of scratch a program has."""
    return 4 * len(acts) + 1


@triton.constexpr_function
def curved(act):
    """Whether σ'' is not zero everywhere (the kinds up to hardtanh are piecewise linear)."""
    return act[0] > 3


@triton.jit
def up_pass(
    zero, n, ok, ACTIVE: tl.constexpr, x, ws, bs, scratch,
    WIDTHS: tl.constexpr, ACTS: tl.constexpr, BIAS: tl.constexpr, H: tl.constexpr,
    PD: tl.constexpr, BK: tl.constexpr, INNER: tl.constexpr, C: tl.constexpr, A: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """a_l runs up: keeps h_l, σ'(a_l) and, for an active tile, σ''(a_l).

    Gives h_l and σ'(a_l) where there is no scratch to leave them in.
    """
    L: tl.constexpr = len(ACTS)
    HOW: tl.constexpr = ACTS[0][4]
    FIRST: tl.constexpr = padded_width(0, L, H, PD)
    WIDE: tl.constexpr = max(H, PD)
    hs = ()
    first = ()
    a = first_layer(x, n, ok, ws[0], bs[0], WIDTHS, BIAS[0], FIRST, BK, C, A, PRECISION)
    for l in tl.static_range(L):
        h, slope, curvature = activation_of(a, ACTS, l)
        if scratch is None or ACTS[l][0] != IDENTITY:
            first = keep(first, slope, scratch, SLOPE_SLOT * L + l, WIDE, C, HOW)
        if ACTIVE and curved(ACTS[l]):
            put(scratch, CURVATURE_SLOT * L + l, curvature.to(C), WIDE)
        if l < L - 1:
            h = after(first[l], h, zero, C, HOW) if scratch is None else h.to(C)
            if INNER == 0:
                hs = as_operand(hs, h, scratch, H_SLOT * L + l, WIDE)
            h = through(scratch, H_SLOT * L + l, h, WIDE, INNER)
            a = affine_up(
                h, scratch, H_SLOT * L + l, ws, bs, l + 1,
                WIDTHS, BIAS, H, PD, INNER, C, A, PRECISION,
            )  # fmt: skip
    return hs, first


@triton.jit
def tangent_pass(
    n, ok, pair, gout, slopes, ws, scratch,
    WIDTHS: tl.constexpr, ACTS: tl.constexpr, K: tl.constexpr, RUNS: tl.constexpr,
    ADJOINT: tl.constexpr, OUT: tl.constexpr, H: tl.constexpr, PD: tl.constexpr,
    BK: tl.constexpr, INNER: tl.constexpr, C: tl.constexpr, A: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The pair's direction ẋ runs up: keeps ḣ_l, and σ''∘ȧ_l in the place of σ''."""
    L: tl.constexpr = len(ACTS)
    d: tl.constexpr = WIDTHS[0]
    BM: tl.constexpr = n.shape[0]
    FIRST: tl.constexpr = padded_width(0, L, H, PD)
    WIDE: tl.constexpr = max(H, PD)
    unit = tl.arange(0, FIRST)
    a_dot = tl.zeros((BM, FIRST), A)
    for start in range(first_of(RUNS) // BK * BK, last_of(RUNS), BK):
        column = start + tl.arange(0, BK)
        x_dot = tangent_of_input(
            n, ok, pair, column, gout, slopes, WIDTHS[L], K, RUNS, ADJOINT, OUT, A
        )
        w = weight_tile(ws[0], unit, column, WIDTHS[1], d, C)
        a_dot += matmul(x_dot, tl.trans(w), C, PRECISION)
    for l in tl.static_range(L):
        if curved(ACTS[l]):
            scale_slot(scratch, CURVATURE_SLOT * L + l, a_dot, WIDE, C, A)
        if l < L - 1:
            if ACTS[l][0] != IDENTITY:
                a_dot *= get(scratch, SLOPE_SLOT * L + l, BM, a_dot.shape[1], WIDE, 0).to(A)
            h_dot = a_dot.to(C)
            if INNER == 0:
                put(scratch, H_DOT_SLOT * L + l, h_dot, WIDE)
            h_dot = through(scratch, H_DOT_SLOT * L + l, h_dot, WIDE, INNER)
            a_dot = product_up(
                h_dot, scratch, H_DOT_SLOT * L + l, ws, l + 1,
                WIDTHS, H, PD, INNER, C, A, PRECISION,
            )  # fmt: skip
    tl.debug_barrier()


@triton.jit
def scale_slot(
    scratch, slot: tl.constexpr, tile, WIDE: tl.constexpr, C: tl.constexpr, A: tl.constexpr
):
    """The tile in a slot, times ``tile``."""
    old = get(scratch, slot, tile.shape[0], tile.shape[1], WIDE, 0).to(A)
    tl.debug_barrier()  # read by all before it is overwritten
    put(scratch, slot, (old * tile).to(C), WIDE)


@triton.jit
def seed_pass(
    n, ok, pair, gout, slopes, ws, sums, partials, scratch,
    WIDTHS: tl.constexpr, ACTS: tl.constexpr, NEEDS: tl.constexpr, OFFSETS: tl.constexpr,
    DX: tl.constexpr, K: tl.constexpr, RUNS: tl.constexpr, ADJOINT: tl.constexpr, OUT: tl.constexpr,
    H: tl.constexpr, PD: tl.constexpr, BK: tl.constexpr, INNER: tl.constexpr,
    CHUNK: tl.constexpr, C: tl.constexpr, A: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The seed s runs down: p_l meets ḣ_{l-1}, and σ''∘ȧ_l∘P_l is left in the place of σ''∘ȧ_l.

    Gives the sums.
    """
    L: tl.constexpr = len(ACTS)
    d: tl.constexpr = WIDTHS[0]
    D: tl.constexpr = WIDTHS[L]
    BM: tl.constexpr = n.shape[0]
    WIDE: tl.constexpr = max(H, PD)
    LOWEST: tl.constexpr = lowest_layer(NEEDS, DX, L)
    found = ()
    output = tl.arange(0, PD)
    if ADJOINT:
        chosen = ok[:, None] & (output == pair)[None, :]
        P = tl.where(chosen, tl.full((BM, PD), 1, A), tl.zeros((BM, PD), A))
    else:
        at = n[:, None] * (D * K) + output[None, :] * K + pair
        inside = ok[:, None] & (output[None, :] < D)
        P = slope_cotangent(gout, slopes, at, inside, OUT).to(A)
    for l in tl.static_range(L - 1, -1, -1):
        dW = unchanged(sums, 2 * l)
        if l >= LOWEST:
            if curved(ACTS[l]):
                scale_slot(scratch, CURVATURE_SLOT * L + l, P, WIDE, C, A)
            if ACTS[l][0] != IDENTITY:
                at = SLOPE_SLOT * L + l
                P *= get(scratch, at, BM, padded_width(l, L, H, PD), WIDE, 0).to(A)
            p = through(scratch, PASSING_SLOT * L, P.to(C), WIDE, INNER)
            if l > 0:
                if NEEDS[2 * l]:
                    dW = inner_gradient(
                        sums, 2 * l, p, PASSING_SLOT * L, (), 0, H_DOT_SLOT * L + l - 1, scratch,
                        partials + OFFSETS[2 * l], WIDTHS[l + 1], WIDTHS[l], H, WIDE, INNER, CHUNK,
                        C, A, PRECISION,
                    )  # fmt: skip
                if l > LOWEST:
                    P = product_down(
                        p, scratch, PASSING_SLOT * L, ws, l,
                        WIDTHS, H, PD, INNER, C, A, PRECISION,
                    )  # fmt: skip
            elif NEEDS[0]:
                for start in range(first_of(RUNS) // BK * BK, last_of(RUNS), BK):
                    column = start + tl.arange(0, BK)
                    x_dot = tangent_of_input(
                        n, ok, pair, column, gout, slopes, D, K, RUNS, ADJOINT, OUT, A
                    )
                    dW = gather(sums, 0, p, x_dot, column, partials, WIDTHS[1], d, C, PRECISION)
            tl.debug_barrier()
        found = dW + unchanged(sums, 2 * l + 1) + found
    return found


@triton.jit
def down_pass(
    n, ok, pair, ACTIVE: tl.constexpr, x, gy, ws, dx, hs, first, sums, partials, scratch,
    WIDTHS: tl.constexpr, ACTS: tl.constexpr, NEEDS: tl.constexpr, OFFSETS: tl.constexpr,
    H: tl.constexpr, PD: tl.constexpr, BK: tl.constexpr, INNER: tl.constexpr,
    CHUNK: tl.constexpr, C: tl.constexpr, A: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The cotangent g_l of a_l runs down, joined by σ''∘ȧ_l∘P_l, and meets h_{l-1}.

    Gives the sums.
    """
    L: tl.constexpr = len(ACTS)
    HOW: tl.constexpr = ACTS[0][4]
    D: tl.constexpr = WIDTHS[L]
    BM: tl.constexpr = n.shape[0]
    WIDE: tl.constexpr = max(H, PD)
    LOWEST: tl.constexpr = lowest_layer(NEEDS, dx is not None, L)
    found = ()
    gh = tl.zeros((BM, PD), A)
    if gy is not None:
        output = tl.arange(0, PD)
        inside = ok[:, None] & (output[None, :] < D) & (pair == 0)
        gh = tl.load(gy + n[:, None] * D + output[None, :], mask=inside, other=0.0).to(A)
    for l in tl.static_range(L - 1, -1, -1):
        dW = unchanged(sums, 2 * l)
        db = unchanged(sums, 2 * l + 1)
        if l >= LOWEST:
            g = gh
            if ACTS[l][0] != IDENTITY:
                at = SLOPE_SLOT * L + l
                g *= recall(first, l, scratch, at, BM, padded_width(l, L, H, PD), WIDE, C, A, HOW)
            if ACTIVE and curved(ACTS[l]):
                at = CURVATURE_SLOT * L + l
                g += get(scratch, at, BM, padded_width(l, L, H, PD), WIDE, 0).to(A)
            if NEEDS[2 * l + 1]:
                db = gather_bias(
                    sums, 2 * l + 1, g, partials + OFFSETS[2 * l + 1], WIDTHS[l + 1], C, PRECISION
                )
            g = through(scratch, PASSING_SLOT * L, g.to(C), WIDE, INNER)
            if l == 0:
                dW = first_gradients(
                    g, n, ok, pair, ACTIVE, x, ws[0], dx, sums, partials, WIDTHS, NEEDS[0], BK, C,
                    A, PRECISION,
                )  # fmt: skip
            else:
                if NEEDS[2 * l]:
                    dW = inner_gradient(
                        sums, 2 * l, g, PASSING_SLOT * L, hs, l - 1, H_SLOT * L + l - 1, scratch,
                        partials + OFFSETS[2 * l], WIDTHS[l + 1], WIDTHS[l], H, WIDE,
                        INNER, CHUNK, C, A, PRECISION,
                    )  # fmt: skip
                if l > LOWEST:
                    gh = product_down(
                        g, scratch, PASSING_SLOT * L, ws, l,
                        WIDTHS, H, PD, INNER, C, A, PRECISION,
                    )  # fmt: skip
            # Also keeps the compiler from pulling the next layer's loads up here.
            barrier(scratch)
        found = dW + db + found
    return found


@triton.jit
def first_gradients(
    g, n, ok, pair, ACTIVE: tl.constexpr, x, W, dx, sums, partials, WIDTHS: tl.constexpr,
    NEEDS_WEIGHT: tl.constexpr, BK: tl.constexpr, C: tl.constexpr, A: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dW_1 += gᵀ x and dx = g W_1, in chunks of BK input columns; sums in registers are of one."""
    d: tl.constexpr = WIDTHS[0]
    dW = unchanged(sums, 0)
    unit = tl.arange(0, g.shape[1])
    for start in range(0, d, BK):
        column = start + tl.arange(0, BK)
        inside = ok[:, None] & (column[None, :] < d)
        at = n[:, None] * d + column[None, :]
        if NEEDS_WEIGHT:
            h = tl.load(x + at, mask=inside, other=0.0)
            dW = gather(sums, 0, g, h, column, partials, WIDTHS[1], d, C, PRECISION)
        if dx is not None:
            share = matmul(g, weight_tile(W, unit, column, WIDTHS[1], d, C), C, PRECISION)
            if ACTIVE:
                # What the tile's earlier pairs left: this thread's own stores.
                share += tl.load(dx + at, mask=inside & (pair > 0), other=0.0).to(A)
            tl.store(dx + at, share, mask=inside)
    return dW


@triton.constexpr_function
def lowest_layer(needs, dx, L):
    """The lowest layer whose cotangent is needed: L if none is."""
    if dx:
        return 0
    for l in range(L):
        if needs[2 * l] or needs[2 * l + 1]:
            return l
    return L


@triton.jit
def tangent_of_input(
    n, ok, pair, column, gout, slopes, D: tl.constexpr, K: tl.constexpr, RUNS: tl.constexpr,
    ADJOINT: tl.constexpr, OUT: tl.constexpr, A: tl.constexpr,
):  # fmt: skip
    """The columns ``column`` of ẋ, zero but in the K monotone ones."""
    j = place_of(column, RUNS)
    if ADJOINT:
        inside = ok[:, None] & ((j >= 0) & (j < K))[None, :]
        at = n[:, None] * (D * K) + pair * K + j[None, :]
        return slope_cotangent(gout, slopes, at, inside, OUT).to(A)
    else:
        chosen = ok[:, None] & (j == pair)[None, :]
        return tl.where(chosen, tl.full(chosen.shape, 1, A), tl.zeros(chosen.shape, A))
