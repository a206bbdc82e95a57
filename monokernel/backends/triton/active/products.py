"""Products of one layer over the active pairs, with as many rows as the device counted.

The grid covers every pair, and programs beyond the count leave at once: so the cost follows the
share of violations without the host ever knowing it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..device.activations import activation
from ..device.columns import place_of
from ..device.tiles import bias_row, of_rows, pre_activation

__all__ = ["pairs_down", "pairs_product", "pairs_weight"]


@triton.jit
def pairs_product(
    left, W, rows, total, a, x, W_first, b, out, h_dot_out,
    INPUTS: tl.constexpr, OUTPUTS: tl.constexpr, W_IN: tl.constexpr, W_OUT: tl.constexpr,
    ADD: tl.constexpr, ACT: tl.constexpr, FAN: tl.constexpr, FAN_TILE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, C: tl.constexpr, A: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """out[i, j] = Σ_k left[i, k] W[k, j], whose strides are W_IN and W_OUT; with ADD it is added to
    what ``out`` has. On the way up it is ȧ, and ḣ = σ'(a)∘ȧ of this layer is the epilogue."""
    count = tl.load(total)
    if tl.program_id(0) * BM >= count:
        return
    i = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    j = tl.program_id(1) * BN + tl.arange(0, BN)
    acc = tl.zeros((BM, BN), A)
    for start in range(0, INPUTS, BK):
        k = start + tl.arange(0, BK)
        part = tl.load(
            left + i[:, None] * INPUTS + k[None, :],
            mask=(i[:, None] < count) & (k[None, :] < INPUTS),
            other=0.0,
        )
        w = tl.load(
            W + j[None, :] * W_OUT + k[:, None] * W_IN,
            mask=(j[None, :] < OUTPUTS) & (k[:, None] < INPUTS),
            other=0.0,
        )
        acc += tl.dot(part.to(C), w.to(C), input_precision=PRECISION)
    mask = (i[:, None] < count) & (j[None, :] < OUTPUTS)
    at = i[:, None] * OUTPUTS + j[None, :]
    if out is not None:
        if ADD:
            acc += tl.load(out + at, mask=mask, other=0.0).to(A)
        tl.store(out + at, acc, mask=mask)
    if h_dot_out is not None:
        n = tl.load(rows + i, mask=i < count, other=0).to(tl.int64)
        own = pre_activation(
            a, x, W_first, b, n, j, i < count, OUTPUTS, OUTPUTS, FAN, FAN_TILE, C, A, PRECISION
        )
        _h, slope, _curvature = activation(own, ACT)
        tl.store(h_dot_out + at, slope * acc, mask=mask)


@triton.jit
def pairs_down(
    P, Q, rows, total, a, x, W_first, b, a_dot, seed, p_out, q_out,
    H: tl.constexpr, KEPT: tl.constexpr, ONE_ROW: tl.constexpr, ACT: tl.constexpr,
    CURVED: tl.constexpr, FAN: tl.constexpr, FAN_TILE: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, C: tl.constexpr, A: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """p = σ'∘P and q = σ'∘Q + σ''∘ȧ∘P of a layer (H) from the products P and Q of the one above,
    whose place they may take. P that was KEPT is that of all rows, or their ONE_ROW, times the
    pair's ``seed`` if there is one."""
    count = tl.load(total)
    j = tl.program_id(1) * BN + tl.arange(0, BN)
    for tile in range(tl.program_id(0), tl.cdiv(count, BM), tl.num_programs(0)):
        i = tile * tl.full((), BM, tl.int64) + tl.arange(0, BM)
        ok = i < count
        mask = ok[:, None] & (j[None, :] < H)
        at = i[:, None] * H + j[None, :]
        n = tl.load(rows + i, mask=ok, other=0).to(tl.int64)
        own = pre_activation(a, x, W_first, b, n, j, ok, H, H, FAN, FAN_TILE, C, A, PRECISION)
        _h, slope, curvature = activation(own, ACT)
        if ONE_ROW:
            above = bias_row(P, j, H, A) + tl.zeros_like(slope)
        else:
            from_row = n[:, None] * H + j[None, :] if KEPT else at
            above = tl.load(P + from_row, mask=mask, other=0.0).to(A)
        if seed is not None:
            above *= of_rows(seed, i, ok, A)
        if q_out is not None:
            q = tl.zeros_like(slope)
            if Q is not None:
                q += slope * tl.load(Q + at, mask=mask, other=0.0).to(A)
            if CURVED:
                q += curvature * tl.load(a_dot + at, mask=mask, other=0.0).to(A) * above
            tl.store(q_out + at, q, mask=mask)
        tl.store(p_out + at, slope * above, mask=mask)


@triton.jit
def pairs_weight(
    p, q, h_dot, a, x, W_first, b, rows, total, dW, db,
    OUTPUTS: tl.constexpr, INPUTS: tl.constexpr, LEFT: tl.constexpr, RUNS: tl.constexpr,
    TANGENTS: tl.constexpr, BELOW_ROW: tl.constexpr, ACT: tl.constexpr, FRESH: tl.constexpr,
    SIZE: tl.constexpr, FAN: tl.constexpr, FAN_TILE: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, BR: tl.constexpr, C: tl.constexpr, A: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dW += qᵀ h + pᵀ ḣ and db += Σ q over a part of the pairs, by one program per tile: a fixed
    order. Of several parts each has a slice of its own, SIZE apart.

    h = σ of ``pre_activation``, or the input itself (ACT is the identity there), in rows that lie
    BELOW_ROW apart. ``h_dot`` has TANGENTS columns, which stand for those RUNS of INPUTS. LEFT says
    how p lies: the strides of its rows and columns, and whether they are those of all rows, of
    which the pairs take theirs. FRESH: the sums begin at 0.
    """
    count = tl.load(total)
    o = tl.program_id(0) * BM + tl.arange(0, BM)
    j = tl.program_id(1) * BN + tl.arange(0, BN)
    t = place_of(j, RUNS)
    acc = tl.zeros((BM, BN), A)
    bias = tl.zeros((BM,), A)
    each = tl.cdiv(tl.cdiv(count, BR), tl.num_programs(2)) * BR
    begin = tl.program_id(2) * each
    for start in range(begin, tl.minimum(begin + each, count), BR):
        i = start + tl.arange(0, BR)
        ok = i < count
        i = i.to(tl.int64)
        inside = (o[:, None] < OUTPUTS) & ok[None, :]
        if p is not None:
            own = i
            if LEFT[2]:
                own = tl.load(rows + i, mask=ok, other=0).to(tl.int64)
            at = p + own[None, :] * LEFT[0] + o[:, None] * LEFT[1]
            left = tl.load(at, mask=inside, other=0.0)
            right = tl.load(
                h_dot + i[:, None] * TANGENTS + t[None, :],
                mask=ok[:, None] & (t[None, :] >= 0) & (t[None, :] < TANGENTS),
                other=0.0,
            )
            acc += tl.dot(left.to(C), right.to(C), input_precision=PRECISION)
        if q is not None:
            left = tl.load(q + i[None, :] * OUTPUTS + o[:, None], mask=inside, other=0.0)
            n = tl.load(rows + i, mask=ok, other=0).to(tl.int64)
            own = pre_activation(
                a, x, W_first, b, n, j, ok, BELOW_ROW, INPUTS, FAN, FAN_TILE, C, A, PRECISION
            )
            h, _slope, _curvature = activation(own, ACT)
            acc += tl.dot(left.to(C), h.to(C), input_precision=PRECISION)
            bias += tl.sum(left.to(A), 1)
    mask = (o[:, None] < OUTPUTS) & (j[None, :] < INPUTS)
    shift = tl.program_id(2).to(tl.int64) * SIZE
    at = shift + o[:, None] * INPUTS + j[None, :]
    if dW is not None:
        if not FRESH:
            acc += tl.load(dW + at, mask=mask, other=0.0).to(A)
        tl.store(dW + at, acc, mask=mask)
    if db is not None:
        once = o < tl.where(tl.program_id(1) == 0, OUTPUTS, 0)
        if not FRESH:
            bias += tl.load(db + shift + o, mask=once, other=0.0).to(A)
        tl.store(db + shift + o, bias, mask=once)
