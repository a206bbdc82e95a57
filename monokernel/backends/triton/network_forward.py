"""The whole network forward in one kernel: y, the slopes and the hinge, in either mode.

A persistent program walks over tiles of BM rows. Nothing but the outputs (and ∂penalty/∂J when the
backward will need it) goes to memory; the penalties leave as one partial sum per program.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .device import PENALTY_SUM, activation, hinge_epilogue, weight_tile
from .network import first_layer, keep, layer_up, matmul, padded_width, recall

__all__ = ["network_forward"]


@triton.jit
def network_forward(
    x,
    weight,
    direction,
    ws,
    bs,
    y,
    out,
    slopes,
    sums,
    scratch,
    N,
    weight_row,
    WIDTHS: tl.constexpr,
    ACTS: tl.constexpr,
    BIAS: tl.constexpr,
    K: tl.constexpr,
    ADJOINT: tl.constexpr,
    OUT: tl.constexpr,
    MARGIN: tl.constexpr,
    SQUARED: tl.constexpr,
    SAVE: tl.constexpr,
    H: tl.constexpr,
    PD: tl.constexpr,
    PK: tl.constexpr,
    BK: tl.constexpr,
    BM: tl.constexpr,
    C: tl.constexpr,
    A: tl.constexpr,
    PRECISION: tl.constexpr,
):
    total = tl.zeros((BM,), A)
    for tile in range(tl.program_id(0), tl.cdiv(N, BM), tl.num_programs(0)):
        i = tile * BM + tl.arange(0, BM)
        ok = i < N
        n = i.to(tl.int64)
        if ADJOINT:
            total += adjoint_tile(
                n, ok, x, weight, direction, ws, bs, y, out, slopes, scratch, weight_row,
                WIDTHS, ACTS, BIAS, K, OUT, MARGIN, SQUARED, SAVE, H, PD, PK, BK, C, A, PRECISION,
            )  # fmt: skip
        else:
            for c in range(K):
                total += tangent_tile(
                    n, ok, c, x, weight, direction, ws, bs, y, out, slopes, weight_row,
                    WIDTHS, ACTS, BIAS, K, OUT, MARGIN, SQUARED, SAVE, H, PD, BK, C, A, PRECISION,
                )  # fmt: skip
    if OUT == PENALTY_SUM:
        tl.store(sums + tl.program_id(0), tl.sum(total))


@triton.jit
def tangent_tile(
    n, ok, c, x, weight, direction, ws, bs, y, out, slopes, weight_row,
    WIDTHS: tl.constexpr, ACTS: tl.constexpr, BIAS: tl.constexpr, K: tl.constexpr,
    OUT: tl.constexpr, MARGIN: tl.constexpr, SQUARED: tl.constexpr, SAVE: tl.constexpr,
    H: tl.constexpr, PD: tl.constexpr, BK: tl.constexpr,
    C: tl.constexpr, A: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Column c: the tangent ȧ travels with the activations, one weight tile serves both products.

    With several columns the activations are computed again for each: registers, not products, are
    what a narrow network is short of.
    """
    L: tl.constexpr = len(ACTS)
    D: tl.constexpr = WIDTHS[L]
    d: tl.constexpr = WIDTHS[0]
    BM: tl.constexpr = n.shape[0]
    FIRST: tl.constexpr = padded_width(0, L, H, PD)
    a = first_layer(x, n, ok, ws[0], bs[0], WIDTHS, BIAS[0], FIRST, BK, C, A, PRECISION)
    unit = tl.arange(0, FIRST)
    w1 = tl.load(ws[0] + unit * d + (d - K) + c, mask=unit < WIDTHS[1], other=0.0)
    a_dot = tl.broadcast_to(w1.to(A)[None, :], (BM, FIRST))
    h, slope, curvature = activation(a, ACTS[0])
    h_dot = slope * a_dot
    for l in tl.static_range(1, L):
        OUTPUTS: tl.constexpr = padded_width(l, L, H, PD)
        w = weight_tile(
            ws[l], tl.arange(0, OUTPUTS), tl.arange(0, H), WIDTHS[l + 1], WIDTHS[l], C
        )
        a = layer_up(h, w, bs[l], BIAS[l], WIDTHS[l + 1], C, A, PRECISION)
        a_dot = matmul(h_dot, tl.trans(w), C, PRECISION)
        h, slope, curvature = activation(a, ACTS[l])
        h_dot = slope * a_dot
    output = tl.arange(0, PD)
    mask = ok[:, None] & (output[None, :] < D)
    tl.store(y + n[:, None] * D + output[None, :], h, mask=mask & (c == 0))
    penalty = hinge_epilogue(
        h_dot, h, n, ok, output * K + c, output < D, direction, weight, weight_row, out, slopes,
        D * K, OUT, MARGIN, SQUARED, SAVE,
    )  # fmt: skip
    return tl.sum(penalty, 1)


@triton.jit
def adjoint_tile(
    n, ok, x, weight, direction, ws, bs, y, out, slopes, scratch, weight_row,
    WIDTHS: tl.constexpr, ACTS: tl.constexpr, BIAS: tl.constexpr, K: tl.constexpr,
    OUT: tl.constexpr, MARGIN: tl.constexpr, SQUARED: tl.constexpr, SAVE: tl.constexpr,
    H: tl.constexpr, PD: tl.constexpr, PK: tl.constexpr, BK: tl.constexpr,
    C: tl.constexpr, A: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Up once, keeping a_l; then one chain down per output, which gives all K columns at once."""
    L: tl.constexpr = len(ACTS)
    D: tl.constexpr = WIDTHS[L]
    d: tl.constexpr = WIDTHS[0]
    BM: tl.constexpr = n.shape[0]
    FIRST: tl.constexpr = padded_width(0, L, H, PD)
    a = first_layer(x, n, ok, ws[0], bs[0], WIDTHS, BIAS[0], FIRST, BK, C, A, PRECISION)
    kept = ()
    tl.debug_barrier()  # the slots may still be read by the tile before
    for l in tl.static_range(1, L):
        kept = keep(kept, a.to(C), scratch, l - 1, H, L - 1)
        OUTPUTS: tl.constexpr = padded_width(l, L, H, PD)
        w = weight_tile(
            ws[l], tl.arange(0, OUTPUTS), tl.arange(0, H), WIDTHS[l + 1], WIDTHS[l], C
        )
        h, slope, curvature = activation(a, ACTS[l - 1])
        a = layer_up(h, w, bs[l], BIAS[l], WIDTHS[l + 1], C, A, PRECISION)
    tl.debug_barrier()
    h, last_slope, curvature = activation(a, ACTS[L - 1])
    output = tl.arange(0, PD)
    mask = ok[:, None] & (output[None, :] < D)
    tl.store(y + n[:, None] * D + output[None, :], h, mask=mask)
    h = tl.where(mask, h, tl.zeros_like(h))
    total = tl.zeros((BM,), A)
    column = tl.arange(0, PK)
    for e in range(D):
        chosen = (output == e)[None, :]
        p = tl.where(chosen, last_slope, tl.zeros_like(last_slope))
        for i in tl.static_range(1, L):
            l: tl.constexpr = L - i  # the layer that p has reached, counted from 0
            INPUTS: tl.constexpr = padded_width(l - 1, L, H, PD)
            OUTPUTS: tl.constexpr = padded_width(l, L, H, PD)
            w = weight_tile(
                ws[l],
                tl.arange(0, OUTPUTS),
                tl.arange(0, INPUTS),
                WIDTHS[l + 1],
                WIDTHS[l],
                C,
            )
            a = recall(kept, l - 1, scratch, l - 1, BM, INPUTS, H, L - 1, A)
            h_, slope, curvature = activation(a, ACTS[l - 1])
            p = slope * matmul(p, w, C, PRECISION)
        unit = tl.arange(0, FIRST)
        inside = (unit[:, None] < WIDTHS[1]) & (column[None, :] < K)
        w1 = tl.load(
            ws[0] + unit[:, None] * d + (d - K) + column[None, :],
            mask=inside,
            other=0.0,
        )
        J = matmul(p, w1, C, PRECISION)
        own = tl.sum(tl.where(chosen, h, tl.zeros_like(h)), 1)[:, None]
        penalty = hinge_epilogue(
            J, tl.broadcast_to(own, (BM, PK)), n, ok, column + e * K, column < K, direction, weight,
            weight_row, out, slopes, D * K, OUT, MARGIN, SQUARED, SAVE,
        )  # fmt: skip
        total += tl.sum(penalty, 1)
    return total
