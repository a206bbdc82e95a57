"""The whole network backward in one kernel: every gradient, with work that follows the hinge.

Both modes have one backward (see ``backends/handwritten.py``): an active pair is a row with a
tangent ẋ that runs forward and a seed s that runs backward,

* tangent mode, column c: ẋ = e_c, s = gJ[row, :, c];
* adjoint mode, output e: ẋ = gJ[row, e, :], s = e_e.

A persistent program owns every P-th tile of rows. It first lists its own rows, those with a gJ that
is not zero in front: the first tiles of its list run tangents and cotangents, the others the
cotangent alone (or nothing, without gy). So the compaction costs no launch and no host
synchronisation, and the tile where active rows end is filled up with others.

Activations are computed again rather than read back. Weight gradients gather in registers where
they fit, else in the program's own slice of ``partials``; ``reduce.py`` adds the slices in order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .device import activation, slope_cotangent, weight_tile
from .network import first_layer, keep, layer_up, matmul, padded_width, recall

__all__ = ["network_backward"]


@triton.jit
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
    BM: tl.constexpr,
    SCAN: tl.constexpr,
    IN_REGISTERS: tl.constexpr,
    C: tl.constexpr,
    A: tl.constexpr,
    PRECISION: tl.constexpr,
):
    L: tl.constexpr = len(ACTS)
    PAIRS: tl.constexpr = WIDTHS[L] if ADJOINT else K
    pid = tl.program_id(0)
    tiles = tl.cdiv(N, BM)
    mine = tiles // tl.num_programs(0) + (pid < tiles % tl.num_programs(0)).to(tl.int32)
    before = pid * (tiles // tl.num_programs(0)) + tl.minimum(
        pid, tiles % tl.num_programs(0)
    )
    own = mine * BM  # of them real rows: the last tile of all may be cut
    own -= tl.where(
        (mine > 0) & ((mine - 1) * tl.num_programs(0) + pid == tiles - 1),
        tiles * BM - N,
        0,
    )
    mine_partials = partials + pid.to(tl.int64) * OFFSETS[2 * L]
    acc = fresh_accumulators(
        mine_partials, WIDTHS, NEEDS, OFFSETS, H, PD, BK, IN_REGISTERS, A
    )
    active = 0
    if gout is not None:
        active = list_rows(
            gout, slopes, rows + before.to(tl.int64) * BM, N, pid, mine, own,
            WIDTHS[L] * K, OUT, BM, SCAN,
        )  # fmt: skip
        tl.debug_barrier()
        for tile in range(0, tl.cdiv(active, BM)):
            at = tile * BM + tl.arange(0, BM)
            ok = at < own
            n = tl.load(rows + before.to(tl.int64) * BM + at, mask=ok, other=0).to(
                tl.int64
            )
            for pair in range(PAIRS):
                acc = gradients_of_tile(
                    acc, n, ok, pair, True, x, gy, gout, slopes, ws, bs, dx, mine_partials, scratch,
                    WIDTHS, ACTS, BIAS, NEEDS, OFFSETS, K, ADJOINT, OUT, H, PD, BK, IN_REGISTERS,
                    C, A, PRECISION,
                )  # fmt: skip
    for tile in range(tl.cdiv(active, BM), mine):
        at = tile * BM + tl.arange(0, BM)
        ok = at < own
        if gout is None:
            n = ((tile * tl.num_programs(0) + pid) * BM + tl.arange(0, BM)).to(tl.int64)
        else:
            n = tl.load(rows + before.to(tl.int64) * BM + at, mask=ok, other=0).to(
                tl.int64
            )
        if gy is not None:
            acc = gradients_of_tile(
                acc, n, ok, 0, False, x, gy, gout, slopes, ws, bs, dx, mine_partials, scratch,
                WIDTHS, ACTS, BIAS, NEEDS, OFFSETS, K, ADJOINT, OUT, H, PD, BK, IN_REGISTERS,
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
    if IN_REGISTERS:
        store_accumulators(acc, mine_partials, WIDTHS, NEEDS, OFFSETS, H, PD, BK)


@triton.jit
def list_rows(
    gout, slopes, rows, N, pid, mine, own,
    ENTRIES: tl.constexpr, OUT: tl.constexpr, BM: tl.constexpr, SCAN: tl.constexpr,
):  # fmt: skip
    """Writes this program's rows to ``rows``, active ones from the front, the others from the back.

    Returns how many are active. NaN counts as active.
    """
    front = 0
    back = own
    for start in range(0, mine * BM, SCAN):
        local = start + tl.arange(0, SCAN)
        n = ((local // BM) * tl.num_programs(0) + pid) * BM + local % BM
        ok = (local < mine * BM) & (n < N)
        active = tl.zeros((SCAN,), tl.int32)
        for e in range(ENTRIES):
            g = slope_cotangent(gout, slopes, n.to(tl.int64) * ENTRIES + e, ok, OUT)
            active = tl.where(ok & (g != 0), 1, active)
        clean = tl.where(ok, 1 - active, 0)
        # Inclusive counts: the r-th active row goes to front + r - 1.
        place = tl.where(
            active == 1, front - 1 + tl.cumsum(active, 0), back - tl.cumsum(clean, 0)
        )
        tl.store(rows + place, n.to(tl.int32), mask=ok)
        front += tl.sum(active)
        back -= tl.sum(clean)
    return front


@triton.jit
def gradients_of_tile(
    acc, n, ok, pair, ACTIVE: tl.constexpr, x, gy, gout, slopes, ws, bs, dx, partials, scratch,
    WIDTHS: tl.constexpr, ACTS: tl.constexpr, BIAS: tl.constexpr, NEEDS: tl.constexpr,
    OFFSETS: tl.constexpr, K: tl.constexpr, ADJOINT: tl.constexpr, OUT: tl.constexpr,
    H: tl.constexpr, PD: tl.constexpr, BK: tl.constexpr, IN_REGISTERS: tl.constexpr,
    C: tl.constexpr, A: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``acc`` with what the rows n give for pair number ``pair`` (gy counts with pair 0)."""
    L: tl.constexpr = len(ACTS)
    D: tl.constexpr = WIDTHS[L]
    d: tl.constexpr = WIDTHS[0]
    BM: tl.constexpr = n.shape[0]
    FIRST: tl.constexpr = padded_width(0, L, H, PD)
    SLOTS: tl.constexpr = 2 * L
    LOWEST: tl.constexpr = lowest_layer(NEEDS, dx is not None, L)
    tl.debug_barrier()  # the slots may still be read by the tile before

    # Up: a_l, and ȧ_l of the pair's direction.
    a = first_layer(x, n, ok, ws[0], bs[0], WIDTHS, BIAS[0], FIRST, BK, C, A, PRECISION)
    a_dot = tl.zeros_like(a)
    if ACTIVE:
        unit = tl.arange(0, FIRST)
        for start in range((d - K) // BK * BK, d, BK):
            column = start + tl.arange(0, BK)
            x_dot = tangent_of_input(
                n, ok, pair, column, gout, slopes, d, D, K, ADJOINT, OUT, A
            )
            w = weight_tile(ws[0], unit, column, WIDTHS[1], d, C)
            a_dot += matmul(x_dot, tl.trans(w), C, PRECISION)
    kept = ()
    kept_dot = ()
    for l in tl.static_range(L):
        kept = keep(kept, a.to(C), scratch, l, H, SLOTS)
        if ACTIVE:
            kept_dot = keep(kept_dot, a_dot.to(C), scratch, L + l, H, SLOTS)
        if l < L - 1:
            OUTPUTS: tl.constexpr = padded_width(l + 1, L, H, PD)
            w = weight_tile(
                ws[l + 1],
                tl.arange(0, OUTPUTS),
                tl.arange(0, H),
                WIDTHS[l + 2],
                WIDTHS[l + 1],
                C,
            )
            h, slope, curvature = activation(a, ACTS[l])
            a = layer_up(h, w, bs[l + 1], BIAS[l + 1], WIDTHS[l + 2], C, A, PRECISION)
            if ACTIVE:
                a_dot = matmul(slope * a_dot, tl.trans(w), C, PRECISION)
    tl.debug_barrier()

    # Down: the cotangents of h_l (gh) and of ḣ_l (P).
    output = tl.arange(0, PD)
    real = ok[:, None] & (output[None, :] < D)
    gh = tl.zeros((BM, PD), A)
    if gy is not None:
        gh = tl.load(
            gy + n[:, None] * D + output[None, :], mask=real & (pair == 0), other=0.0
        )
        gh = gh.to(A)
    P = tl.zeros((BM, PD), A)
    if ACTIVE:
        if ADJOINT:
            P = tl.where(ok[:, None] & (output == pair)[None, :], 1.0, P)
        else:
            at = n[:, None] * (D * K) + output[None, :] * K + pair
            P = slope_cotangent(gout, slopes, at, real, OUT).to(A)
    dW_of = ()
    db_of = ()
    for i in tl.static_range(L):
        l: tl.constexpr = L - 1 - i
        if l >= LOWEST:
            OUTPUTS: tl.constexpr = padded_width(l, L, H, PD)
            a = recall(kept, l, scratch, l, BM, OUTPUTS, H, SLOTS, A)
            h, slope, curvature = activation(a, ACTS[l])
            g = slope * gh
            p = slope * P
            if ACTIVE:
                a_dot = recall(kept_dot, l, scratch, L + l, BM, OUTPUTS, H, SLOTS, A)
                g += curvature * a_dot * P
            bias = acc[2 * l + 1]
            if NEEDS[2 * l + 1]:
                bias = add_bias(
                    bias, g, partials + OFFSETS[2 * l + 1], WIDTHS[l + 1], IN_REGISTERS
                )
            db_of = (bias,) + db_of
            gradient = acc[2 * l]
            if l > 0:
                INPUTS: tl.constexpr = padded_width(l - 1, L, H, PD)
                if NEEDS[2 * l]:
                    below = recall(kept, l - 1, scratch, l - 1, BM, INPUTS, H, SLOTS, A)
                    h, slope, curvature = activation(below, ACTS[l - 1])
                    product = matmul(tl.trans(g.to(C)), h, C, PRECISION)
                    if ACTIVE:
                        a_dot = recall(
                            kept_dot, l - 1, scratch, L + l - 1, BM, INPUTS, H, SLOTS, A
                        )
                        product += matmul(
                            tl.trans(p.to(C)), slope * a_dot, C, PRECISION
                        )
                    gradient = add_weight(
                        gradient, product, tl.arange(0, INPUTS), partials + OFFSETS[2 * l],
                        WIDTHS[l + 1], WIDTHS[l], IN_REGISTERS,
                    )  # fmt: skip
                if l > LOWEST:
                    w = weight_tile(
                        ws[l], tl.arange(0, OUTPUTS), tl.arange(0, INPUTS),
                        WIDTHS[l + 1], WIDTHS[l], C,
                    )  # fmt: skip
                    gh = matmul(g, w, C, PRECISION)
                    if ACTIVE:
                        P = matmul(p, w, C, PRECISION)
            else:
                unit = tl.arange(0, OUTPUTS)
                for start in range(0, d, BK):
                    column = start + tl.arange(0, BK)
                    inside = ok[:, None] & (column[None, :] < d)
                    at = n[:, None] * d + column[None, :]
                    if NEEDS[0]:
                        h = tl.load(x + at, mask=inside, other=0.0)
                        product = matmul(tl.trans(g.to(C)), h, C, PRECISION)
                        if ACTIVE:
                            x_dot = tangent_of_input(
                                n,
                                ok,
                                pair,
                                column,
                                gout,
                                slopes,
                                d,
                                D,
                                K,
                                ADJOINT,
                                OUT,
                                A,
                            )
                            product += matmul(tl.trans(p.to(C)), x_dot, C, PRECISION)
                        gradient = add_weight(
                            gradient, product, column, partials, WIDTHS[1], d,
                            IN_REGISTERS and d <= BK,
                        )  # fmt: skip
                    if dx is not None:
                        w = weight_tile(ws[0], unit, column, WIDTHS[1], d, C)
                        share = matmul(g, w, C, PRECISION)
                        if ACTIVE:
                            # The tile's earlier pairs have left theirs (this thread's own store).
                            share += tl.load(
                                dx + at, mask=inside & (pair > 0), other=0.0
                            ).to(A)
                        tl.store(dx + at, share, mask=inside)
            dW_of = (gradient,) + dW_of
        else:
            dW_of = (acc[2 * l],) + dW_of
            db_of = (acc[2 * l + 1],) + db_of
    new = ()
    for l in tl.static_range(L):
        new = new + (dW_of[l], db_of[l])
    return new


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
    chosen = ok[:, None] & (j == pair)[None, :]
    return tl.where(chosen, tl.full(chosen.shape, 1, A), tl.zeros(chosen.shape, A))


# --- accumulators: one tile for each W_l and b_l, in registers or (a placeholder here) in memory ----


@triton.jit
def fresh_accumulators(
    partials, WIDTHS: tl.constexpr, NEEDS: tl.constexpr, OFFSETS: tl.constexpr, H: tl.constexpr,
    PD: tl.constexpr, BK: tl.constexpr, IN_REGISTERS: tl.constexpr, A: tl.constexpr,
):  # fmt: skip
    L: tl.constexpr = len(WIDTHS) - 1
    acc = ()
    if not (IN_REGISTERS and WIDTHS[0] <= BK):
        zero_fill(partials, OFFSETS[2 * L])
    for l in tl.static_range(L):
        OUTPUTS: tl.constexpr = padded_width(l, L, H, PD)
        INPUTS: tl.constexpr = BK if l == 0 else H
        if NEEDS[2 * l] and IN_REGISTERS and (l > 0 or WIDTHS[0] <= BK):
            acc = acc + (tl.zeros((OUTPUTS, INPUTS), A),)
        else:
            acc = acc + (tl.zeros((1, 1), A),)
        if NEEDS[2 * l + 1] and IN_REGISTERS:
            acc = acc + (tl.zeros((OUTPUTS,), A),)
        else:
            acc = acc + (tl.zeros((1,), A),)
    return acc


@triton.jit
def zero_fill(partials, SIZE: tl.constexpr):
    for start in range(0, SIZE, 1024):
        i = start + tl.arange(0, 1024)
        tl.store(
            partials + i, tl.zeros((1024,), partials.dtype.element_ty), mask=i < SIZE
        )
    tl.debug_barrier()


@triton.jit
def add_weight(
    acc, product, column, partials, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    IN_REGISTERS: tl.constexpr,
):  # fmt: skip
    if IN_REGISTERS:
        return acc + product
    row = tl.arange(0, product.shape[0])
    at = partials + row[:, None] * COLUMNS + column[None, :]
    mask = (row[:, None] < ROWS) & (column[None, :] < COLUMNS)
    tl.store(at, tl.load(at, mask=mask, other=0.0) + product, mask=mask)
    return acc


@triton.jit
def add_bias(acc, g, partials, ROWS: tl.constexpr, IN_REGISTERS: tl.constexpr):
    if IN_REGISTERS:
        return acc + tl.sum(g, 0)
    row = tl.arange(0, g.shape[1])
    at = partials + row
    tl.store(
        at, tl.load(at, mask=row < ROWS, other=0.0) + tl.sum(g, 0), mask=row < ROWS
    )
    return acc


@triton.jit
def store_accumulators(
    acc, partials, WIDTHS: tl.constexpr, NEEDS: tl.constexpr, OFFSETS: tl.constexpr,
    H: tl.constexpr, PD: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    L: tl.constexpr = len(WIDTHS) - 1
    for l in tl.static_range(L):
        row = tl.arange(0, padded_width(l, L, H, PD))
        column = tl.arange(0, BK if l == 0 else H)
        if NEEDS[2 * l] and (l > 0 or WIDTHS[0] <= BK):
            mask = (row[:, None] < WIDTHS[l + 1]) & (column[None, :] < WIDTHS[l])
            at = partials + OFFSETS[2 * l] + row[:, None] * WIDTHS[l] + column[None, :]
            tl.store(at, acc[2 * l], mask=mask)
        if NEEDS[2 * l + 1]:
            tl.store(
                partials + OFFSETS[2 * l + 1] + row,
                acc[2 * l + 1],
                mask=row < WIDTHS[l + 1],
            )
