"""The whole network backward in one kernel: every gradient, with work that follows the hinge.

Both modes have one backward (see ``backends/handwritten.py``): an active pair is a row with a
tangent ẋ that runs forward and a seed s that runs backward,

* tangent mode, column c: ẋ = e_c, s = gJ[row, :, c];
* adjoint mode, output e: ẋ = gJ[row, e, :], s = e_e.

A persistent program owns a run of tiles of rows. It first lists its own rows, those with a gJ that
is not zero in front: the first tiles of its list run tangents and cotangents, the others the
cotangent alone (or nothing, without gy). So the compaction costs no launch and no host
synchronisation, and the tile where active rows end is filled up with others.

Activations are computed again rather than saved by the forward. Within a tile they, their slopes
and the tangents lie in scratch slots of the program; weight gradients gather in the program's own
slice of ``partials``, and ``reduce.py`` adds the slices in order. Both stay in the L2 cache. (In
registers they do not fit: with the sums there, width 64 spilled 464 bytes at 255 registers.)
"""

# ruff: noqa: RET505 (see ``device.py``)

from __future__ import annotations

import triton
import triton.language as tl

from .device import PENALTY_SUM, activation_of, slope_cotangent, weight_tile
from .network import (
    first_layer,
    get,
    get_rows,
    layer_up,
    matmul,
    padded_width,
    product_down,
    product_up,
    put,
    through,
)

__all__ = ["network_backward"]

IDENTITY = tl.constexpr(0)

# Scratch slots, each L tiles of BM rows: σ'(a_l); h_l; ḣ_l; σ''(a_l), times ȧ_l, times P_l.
# Whatever takes special functions is evaluated once, on the way up.
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


@triton.jit(do_not_specialize=["N"])
def network_backward(
    x,
    gy,
    gout,
    slopes,
    ws,
    bs,
    dx,
    partials,
    rows,
    scratch,
    N,
    WIDTHS: tl.constexpr,
    ACTS: tl.constexpr,
    BIAS: tl.constexpr,
    NEEDS: tl.constexpr,
    OFFSETS: tl.constexpr,
    K: tl.constexpr,
    ADJOINT: tl.constexpr,
    OUT: tl.constexpr,
    H: tl.constexpr,
    PD: tl.constexpr,
    BK: tl.constexpr,
    INNER: tl.constexpr,
    BM: tl.constexpr,
    SCAN: tl.constexpr,
    CHUNK: tl.constexpr,
    C: tl.constexpr,
    A: tl.constexpr,
    PRECISION: tl.constexpr,
):
    L: tl.constexpr = len(ACTS)
    PAIRS: tl.constexpr = WIDTHS[L] if ADJOINT else K
    pid = tl.program_id(0)
    tiles = tl.cdiv(N, BM)
    mine = tiles // tl.num_programs(0) + (pid < tiles % tl.num_programs(0)).to(tl.int32)
    before = pid * (tiles // tl.num_programs(0)) + tl.minimum(pid, tiles % tl.num_programs(0))
    first = before.to(tl.int64) * BM
    own = tl.minimum(mine * BM, N - before * BM)  # the last tile of all may be cut
    x = x + first * WIDTHS[0]
    # Pointers move by 64 bits once; tiles then have 32-bit offsets, at half the registers. Not in a
    # helper: in Triton 3.6 none may return None.
    if dx is not None:
        dx = dx + first * WIDTHS[0]
    if gy is not None:
        gy = gy + first * WIDTHS[L]
    if slopes is not None:
        slopes = slopes + first * (WIDTHS[L] * K)
    if OUT != PENALTY_SUM:  # noqa: SIM102 (each is resolved by the compiler)
        if gout is not None:
            gout = gout + first * (WIDTHS[L] * K)
    partials = partials + pid.to(tl.int64) * OFFSETS[2 * L]
    scratch = scratch + pid.to(tl.int64) * (slots(ACTS) * BM * max(H, PD))
    zero_fill(partials, OFFSETS[2 * L])
    active = 0
    if gout is not None:
        rows = rows + first
        active = list_rows(gout, slopes, rows, own, WIDTHS[L] * K, OUT, SCAN)
        tl.debug_barrier()
        for tile in tl.range(0, tl.cdiv(active, BM), disable_licm=True):
            at = tile * BM + tl.arange(0, BM)
            ok = at < own
            n = tl.load(rows + at, mask=ok, other=0)
            for pair in tl.range(0, PAIRS, disable_licm=True):
                gradients_of_tile(
                    n, ok, pair, True, x, gy, gout, slopes, ws, bs, dx, partials, scratch,
                    WIDTHS, ACTS, BIAS, NEEDS, OFFSETS, K, ADJOINT, OUT, H, PD, BK, INNER, CHUNK,
                    C, A, PRECISION,
                )  # fmt: skip
    for tile in tl.range(tl.cdiv(active, BM), mine, disable_licm=True):
        at = tile * BM + tl.arange(0, BM)
        ok = at < own
        n = at
        if gout is not None:
            n = tl.load(rows + at, mask=ok, other=0)
        if gy is not None:
            gradients_of_tile(
                n, ok, 0, False, x, gy, gout, slopes, ws, bs, dx, partials, scratch,
                WIDTHS, ACTS, BIAS, NEEDS, OFFSETS, K, ADJOINT, OUT, H, PD, BK, INNER, CHUNK,
                C, A, PRECISION,
            )  # fmt: skip
        elif dx is not None:
            for start in range(0, WIDTHS[0], BK):
                column = start + tl.arange(0, BK)
                tl.store(
                    dx + n[:, None] * WIDTHS[0] + column[None, :],
                    tl.zeros((BM, BK), C),
                    mask=ok[:, None] & (column[None, :] < WIDTHS[0]),
                )


@triton.jit
def list_rows(
    gout, slopes, rows, own, ENTRIES: tl.constexpr, OUT: tl.constexpr, SCAN: tl.constexpr
):
    """Writes this program's rows to ``rows``, active ones from the front, the others from the back.

    Returns how many are active. NaN counts as active.
    """
    front = 0
    back = own
    for start in range(0, own, SCAN):
        n = start + tl.arange(0, SCAN)
        ok = n < own
        active = tl.zeros((SCAN,), tl.int32)
        for e in range(ENTRIES):
            g = slope_cotangent(gout, slopes, n * ENTRIES + e, ok, OUT)
            active = tl.where(ok & (g != 0), 1, active)
        clean = tl.where(ok, 1 - active, 0)
        # Inclusive counts: the r-th active row goes to front + r - 1.
        place = tl.where(active == 1, front - 1 + tl.cumsum(active, 0), back - tl.cumsum(clean, 0))
        tl.store(rows + place, n, mask=ok)
        front += tl.sum(active)
        back -= tl.sum(clean)
    return front


@triton.jit
def gradients_of_tile(
    n, ok, pair, ACTIVE: tl.constexpr, x, gy, gout, slopes, ws, bs, dx, partials, scratch,
    WIDTHS: tl.constexpr, ACTS: tl.constexpr, BIAS: tl.constexpr, NEEDS: tl.constexpr,
    OFFSETS: tl.constexpr, K: tl.constexpr, ADJOINT: tl.constexpr, OUT: tl.constexpr,
    H: tl.constexpr, PD: tl.constexpr, BK: tl.constexpr, INNER: tl.constexpr, CHUNK: tl.constexpr,
    C: tl.constexpr, A: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds what the rows n give for pair number ``pair`` (gy counts with pair 0).

    Passes over the layers, each with one chain in registers; what they hand on lies in the scratch
    slots. (Tangents beside activations in one pass, as in the forward, spill at width 128.)
    """
    tl.debug_barrier()  # the slots may still be read by the tile before
    up_pass(
        n, ok, ACTIVE, x, ws, bs, scratch, WIDTHS, ACTS, BIAS, H, PD, BK, INNER, C, A, PRECISION
    )
    tl.debug_barrier()
    if ACTIVE:
        tangent_pass(
            n, ok, pair, gout, slopes, ws, scratch,
            WIDTHS, ACTS, K, ADJOINT, OUT, H, PD, BK, INNER, C, A, PRECISION,
        )  # fmt: skip
        seed_pass(
            n, ok, pair, gout, slopes, ws, partials, scratch,
            WIDTHS, ACTS, NEEDS, OFFSETS, dx is not None, K, ADJOINT, OUT, H, PD, BK, INNER, CHUNK,
            C, A, PRECISION,
        )  # fmt: skip
    down_pass(
        n, ok, pair, ACTIVE, x, gy, ws, dx, partials, scratch,
        WIDTHS, ACTS, NEEDS, OFFSETS, H, PD, BK, INNER, CHUNK, C, A, PRECISION,
    )  # fmt: skip


@triton.jit
def up_pass(
    n, ok, ACTIVE: tl.constexpr, x, ws, bs, scratch,
    WIDTHS: tl.constexpr, ACTS: tl.constexpr, BIAS: tl.constexpr, H: tl.constexpr,
    PD: tl.constexpr, BK: tl.constexpr, INNER: tl.constexpr, C: tl.constexpr, A: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """a_l runs up: keeps h_l, σ'(a_l) and, for an active tile, σ''(a_l)."""
    L: tl.constexpr = len(ACTS)
    FIRST: tl.constexpr = padded_width(0, L, H, PD)
    WIDE: tl.constexpr = max(H, PD)
    a = first_layer(x, n, ok, ws[0], bs[0], WIDTHS, BIAS[0], FIRST, BK, C, A, PRECISION)
    for l in tl.static_range(L):
        h, slope, curvature = activation_of(a, ACTS, l)
        if ACTS[l][0] != IDENTITY:
            put(scratch, SLOPE_SLOT * L + l, slope.to(C), WIDE)
        if ACTIVE and curved(ACTS[l]):
            put(scratch, CURVATURE_SLOT * L + l, curvature.to(C), WIDE)
        if l < L - 1:
            h = h.to(C)
            if INNER == 0:
                put(scratch, H_SLOT * L + l, h, WIDE)
            h = through(scratch, H_SLOT * L + l, h, WIDE, INNER)
            a = layer_up(
                h, scratch, H_SLOT * L + l, ws, bs, l + 1,
                WIDTHS, BIAS, H, PD, INNER, C, A, PRECISION,
            )  # fmt: skip


@triton.jit
def tangent_pass(
    n, ok, pair, gout, slopes, ws, scratch,
    WIDTHS: tl.constexpr, ACTS: tl.constexpr, K: tl.constexpr, ADJOINT: tl.constexpr,
    OUT: tl.constexpr, H: tl.constexpr, PD: tl.constexpr, BK: tl.constexpr, INNER: tl.constexpr,
    C: tl.constexpr, A: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The pair's direction ẋ runs up: keeps ḣ_l, and σ''∘ȧ_l in the place of σ''."""
    L: tl.constexpr = len(ACTS)
    d: tl.constexpr = WIDTHS[0]
    BM: tl.constexpr = n.shape[0]
    FIRST: tl.constexpr = padded_width(0, L, H, PD)
    WIDE: tl.constexpr = max(H, PD)
    unit = tl.arange(0, FIRST)
    a_dot = tl.zeros((BM, FIRST), A)
    for start in range((d - K) // BK * BK, d, BK):
        column = start + tl.arange(0, BK)
        x_dot = tangent_of_input(
            n, ok, pair, column, gout, slopes, d, WIDTHS[L], K, ADJOINT, OUT, A
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
    n, ok, pair, gout, slopes, ws, partials, scratch,
    WIDTHS: tl.constexpr, ACTS: tl.constexpr, NEEDS: tl.constexpr, OFFSETS: tl.constexpr,
    DX: tl.constexpr, K: tl.constexpr, ADJOINT: tl.constexpr, OUT: tl.constexpr,
    H: tl.constexpr, PD: tl.constexpr, BK: tl.constexpr, INNER: tl.constexpr,
    CHUNK: tl.constexpr, C: tl.constexpr, A: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The seed s runs down: p_l meets ḣ_{l-1}, and σ''∘ȧ_l∘P_l is left in the place of σ''∘ȧ_l."""
    L: tl.constexpr = len(ACTS)
    d: tl.constexpr = WIDTHS[0]
    D: tl.constexpr = WIDTHS[L]
    BM: tl.constexpr = n.shape[0]
    WIDE: tl.constexpr = max(H, PD)
    LOWEST: tl.constexpr = lowest_layer(NEEDS, DX, L)
    output = tl.arange(0, PD)
    if ADJOINT:
        chosen = ok[:, None] & (output == pair)[None, :]
        P = tl.where(chosen, tl.full((BM, PD), 1, A), tl.zeros((BM, PD), A))
    else:
        at = n[:, None] * (D * K) + output[None, :] * K + pair
        inside = ok[:, None] & (output[None, :] < D)
        P = slope_cotangent(gout, slopes, at, inside, OUT).to(A)
    for l in tl.static_range(L - 1, -1, -1):
        if l >= LOWEST:
            if curved(ACTS[l]):
                scale_slot(scratch, CURVATURE_SLOT * L + l, P, WIDE, C, A)
            if ACTS[l][0] != IDENTITY:
                at = SLOPE_SLOT * L + l
                P *= get(scratch, at, BM, padded_width(l, L, H, PD), WIDE, 0).to(A)
            p = through(scratch, PASSING_SLOT * L, P.to(C), WIDE, INNER)
            if l > 0:
                if NEEDS[2 * l]:
                    inner_gradient(
                        p, PASSING_SLOT * L, H_DOT_SLOT * L + l - 1, scratch,
                        partials + OFFSETS[2 * l], WIDTHS[l + 1], WIDTHS[l], H, WIDE, INNER, CHUNK,
                        C, A, PRECISION,
                    )  # fmt: skip
                if l > LOWEST:
                    P = product_down(
                        p, scratch, PASSING_SLOT * L, ws, l,
                        WIDTHS, H, PD, INNER, C, A, PRECISION,
                    )  # fmt: skip
            elif NEEDS[0]:
                for start in range((d - K) // BK * BK, d, BK):
                    column = start + tl.arange(0, BK)
                    x_dot = tangent_of_input(
                        n, ok, pair, column, gout, slopes, d, D, K, ADJOINT, OUT, A
                    )
                    product = matmul(tl.trans(p), x_dot, C, PRECISION)
                    add_weight(product, column, partials, WIDTHS[1], d)
            tl.debug_barrier()


@triton.jit
def down_pass(
    n, ok, pair, ACTIVE: tl.constexpr, x, gy, ws, dx, partials, scratch,
    WIDTHS: tl.constexpr, ACTS: tl.constexpr, NEEDS: tl.constexpr, OFFSETS: tl.constexpr,
    H: tl.constexpr, PD: tl.constexpr, BK: tl.constexpr, INNER: tl.constexpr,
    CHUNK: tl.constexpr, C: tl.constexpr, A: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The cotangent g_l of a_l runs down, joined by σ''∘ȧ_l∘P_l, and meets h_{l-1}."""
    L: tl.constexpr = len(ACTS)
    D: tl.constexpr = WIDTHS[L]
    BM: tl.constexpr = n.shape[0]
    WIDE: tl.constexpr = max(H, PD)
    LOWEST: tl.constexpr = lowest_layer(NEEDS, dx is not None, L)
    gh = tl.zeros((BM, PD), A)
    if gy is not None:
        output = tl.arange(0, PD)
        inside = ok[:, None] & (output[None, :] < D) & (pair == 0)
        gh = tl.load(gy + n[:, None] * D + output[None, :], mask=inside, other=0.0).to(A)
    for l in tl.static_range(L - 1, -1, -1):
        if l >= LOWEST:
            g = gh
            if ACTS[l][0] != IDENTITY:
                at = SLOPE_SLOT * L + l
                g *= get(scratch, at, BM, padded_width(l, L, H, PD), WIDE, 0).to(A)
            if ACTIVE and curved(ACTS[l]):
                at = CURVATURE_SLOT * L + l
                g += get(scratch, at, BM, padded_width(l, L, H, PD), WIDE, 0).to(A)
            if NEEDS[2 * l + 1]:
                add_bias(g, partials + OFFSETS[2 * l + 1], WIDTHS[l + 1])
            g = through(scratch, PASSING_SLOT * L, g.to(C), WIDE, INNER)
            if l == 0:
                first_gradients(
                    g, n, ok, pair, ACTIVE, x, ws[0], dx, partials, WIDTHS, NEEDS[0], BK, C, A,
                    PRECISION,
                )  # fmt: skip
            else:
                if NEEDS[2 * l]:
                    inner_gradient(
                        g, PASSING_SLOT * L, H_SLOT * L + l - 1, scratch,
                        partials + OFFSETS[2 * l], WIDTHS[l + 1], WIDTHS[l], H, WIDE, INNER, CHUNK,
                        C, A, PRECISION,
                    )  # fmt: skip
                if l > LOWEST:
                    gh = product_down(
                        g, scratch, PASSING_SLOT * L, ws, l,
                        WIDTHS, H, PD, INNER, C, A, PRECISION,
                    )  # fmt: skip
            # Also keeps the compiler from pulling the next layer's loads up here.
            tl.debug_barrier()


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


@triton.jit
def first_gradients(
    g, n, ok, pair, ACTIVE: tl.constexpr, x, W, dx, partials, WIDTHS: tl.constexpr,
    NEEDS_WEIGHT: tl.constexpr, BK: tl.constexpr, C: tl.constexpr, A: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dW_1 += gᵀ x and dx = g W_1, in chunks of BK input columns."""
    d: tl.constexpr = WIDTHS[0]
    unit = tl.arange(0, g.shape[1])
    for start in range(0, d, BK):
        column = start + tl.arange(0, BK)
        inside = ok[:, None] & (column[None, :] < d)
        at = n[:, None] * d + column[None, :]
        if NEEDS_WEIGHT:
            product = matmul(tl.trans(g), tl.load(x + at, mask=inside, other=0.0), C, PRECISION)
            add_weight(product, column, partials, WIDTHS[1], d)
        if dx is not None:
            share = matmul(g, weight_tile(W, unit, column, WIDTHS[1], d, C), C, PRECISION)
            if ACTIVE:
                # What the tile's earlier pairs left: this thread's own stores.
                share += tl.load(dx + at, mask=inside & (pair > 0), other=0.0).to(A)
            tl.store(dx + at, share, mask=inside)


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
    n, ok, pair, column, gout, slopes, d: tl.constexpr, D: tl.constexpr, K: tl.constexpr,
    ADJOINT: tl.constexpr, OUT: tl.constexpr, A: tl.constexpr,
):  # fmt: skip
    """The columns ``column`` of ẋ, zero but in the K monotone ones, which are x's last."""
    j = column - (d - K)
    if ADJOINT:
        inside = ok[:, None] & ((j >= 0) & (j < K))[None, :]
        at = n[:, None] * (D * K) + pair * K + j[None, :]
        return slope_cotangent(gout, slopes, at, inside, OUT).to(A)
    else:
        chosen = ok[:, None] & (j == pair)[None, :]
        return tl.where(chosen, tl.full(chosen.shape, 1, A), tl.zeros(chosen.shape, A))


# --- the program's slice of the partial sums, which stays in the L2 cache -----------------------


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
