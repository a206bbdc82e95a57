"""Products of one layer over the active pairs, with as many rows as the device counted.

The grid covers every pair, and programs beyond the count leave at once: so the cost follows the
share of violations without the host ever knowing it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..device.activations import activation
from ..device.columns import place_of

__all__ = ["pairs_down", "pairs_up", "pairs_weight"]


@triton.jit
def pairs_up(
    h_dot, W, rows, total, a, a_dot_out, h_dot_out,
    INPUTS: tl.constexpr, OUTPUTS: tl.constexpr, W_ROW: tl.constexpr, ACT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, C: tl.constexpr, A: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """ȧ = ḣ Wᵀ, and ḣ = σ'(a)∘ȧ of this layer in the epilogue."""
    count = tl.load(total)
    if tl.program_id(0) * BM >= count:
        return
    i = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    j = tl.program_id(1) * BN + tl.arange(0, BN)
    acc = tl.zeros((BM, BN), A)
    for start in range(0, INPUTS, BK):
        k = start + tl.arange(0, BK)
        left = tl.load(
            h_dot + i[:, None] * INPUTS + k[None, :],
            mask=(i[:, None] < count) & (k[None, :] < INPUTS),
            other=0.0,
        )
        w = tl.load(
            W + j[None, :] * W_ROW + k[:, None],
            mask=(j[None, :] < OUTPUTS) & (k[:, None] < INPUTS),
            other=0.0,
        )
        acc += tl.dot(left.to(C), w.to(C), input_precision=PRECISION)
    mask = (i[:, None] < count) & (j[None, :] < OUTPUTS)
    at = i[:, None] * OUTPUTS + j[None, :]
    if a_dot_out is not None:
        tl.store(a_dot_out + at, acc, mask=mask)
    if h_dot_out is not None:
        n = tl.load(rows + i, mask=i < count, other=0).to(tl.int64)
        own = tl.load(a + n[:, None] * OUTPUTS + j[None, :], mask=mask, other=0.0).to(A)
        _h, slope, _curvature = activation(own, ACT)
        tl.store(h_dot_out + at, slope * acc, mask=mask)


@triton.jit
def pairs_down(
    p, q, W, rows, total, a, a_dot, kept, p_out, q_out,
    OUTPUTS: tl.constexpr, INPUTS: tl.constexpr, ACT: tl.constexpr, CURVED: tl.constexpr,
    ADD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, C: tl.constexpr,
    A: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """P = p W and Q = q W with one weight tile; below, p = σ'∘P and q = σ'∘Q + σ''∘ȧ∘P.

    W is (OUTPUTS, INPUTS). Where the P of all rows were ``kept`` it is theirs and no product.
    Without p_out only Q is wanted (and ACT does not count); with ADD it is added to what q_out has.
    """
    count = tl.load(total)
    if tl.program_id(0) * BM >= count:
        return
    i = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    j = tl.program_id(1) * BN + tl.arange(0, BN)
    P = tl.zeros((BM, BN), A)
    Q = tl.zeros((BM, BN), A)
    if q is not None or kept is None:
        for start in range(0, OUTPUTS, BK):
            k = start + tl.arange(0, BK)
            inside = (i[:, None] < count) & (k[None, :] < OUTPUTS)
            at = i[:, None] * OUTPUTS + k[None, :]
            w = tl.load(
                W + k[:, None] * INPUTS + j[None, :],
                mask=(k[:, None] < OUTPUTS) & (j[None, :] < INPUTS),
                other=0.0,
            ).to(C)
            if p_out is not None and kept is None:
                left = tl.load(p + at, mask=inside, other=0.0).to(C)
                P += tl.dot(left, w, input_precision=PRECISION)
            if q is not None:
                left = tl.load(q + at, mask=inside, other=0.0).to(C)
                Q += tl.dot(left, w, input_precision=PRECISION)
    mask = (i[:, None] < count) & (j[None, :] < INPUTS)
    at = i[:, None] * INPUTS + j[None, :]
    if p_out is None:
        if ADD:
            Q += tl.load(q_out + at, mask=mask, other=0.0).to(A)
        tl.store(q_out + at, Q, mask=mask)
    else:
        n = tl.load(rows + i, mask=i < count, other=0).to(tl.int64)
        own = tl.load(a + n[:, None] * INPUTS + j[None, :], mask=mask, other=0.0).to(A)
        _h, slope, curvature = activation(own, ACT)
        if kept is not None:
            P = tl.load(kept + n[:, None] * INPUTS + j[None, :], mask=mask, other=0.0).to(A)
        tl.store(p_out + at, slope * P, mask=mask)
        if q_out is not None:
            Q *= slope
            if CURVED:
                Q += curvature * tl.load(a_dot + at, mask=mask, other=0.0).to(A) * P
            tl.store(q_out + at, Q, mask=mask)


@triton.jit
def pairs_weight(
    p, q, h_dot, below, rows, total, dW, db,
    OUTPUTS: tl.constexpr, INPUTS: tl.constexpr, RUNS: tl.constexpr, TANGENTS: tl.constexpr,
    BELOW_ROW: tl.constexpr, ACT: tl.constexpr, FRESH: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, BR: tl.constexpr, C: tl.constexpr, A: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dW += qᵀ h + pᵀ ḣ and db += Σ q over the pairs, by one program per tile: a fixed order.

    h = σ(below[row]), or below[row] itself for the input (ACT is the identity there), in rows that
    lie BELOW_ROW apart. ``h_dot`` has TANGENTS columns, which stand for those RUNS of INPUTS.
    FRESH: the sums begin at 0.
    """
    count = tl.load(total)
    o = tl.program_id(0) * BM + tl.arange(0, BM)
    j = tl.program_id(1) * BN + tl.arange(0, BN)
    t = place_of(j, RUNS)
    acc = tl.zeros((BM, BN), A)
    bias = tl.zeros((BM,), A)
    for start in range(0, count, BR):
        i = start + tl.arange(0, BR)
        ok = i < count
        i = i.to(tl.int64)
        inside = (o[:, None] < OUTPUTS) & ok[None, :]
        if p is not None:
            left = tl.load(p + i[None, :] * OUTPUTS + o[:, None], mask=inside, other=0.0)
            right = tl.load(
                h_dot + i[:, None] * TANGENTS + t[None, :],
                mask=ok[:, None] & (t[None, :] >= 0) & (t[None, :] < TANGENTS),
                other=0.0,
            )
            acc += tl.dot(left.to(C), right.to(C), input_precision=PRECISION)
        if q is not None:
            left = tl.load(q + i[None, :] * OUTPUTS + o[:, None], mask=inside, other=0.0)
            n = tl.load(rows + i, mask=ok, other=0).to(tl.int64)
            own = tl.load(
                below + n[:, None] * BELOW_ROW + j[None, :],
                mask=ok[:, None] & (j[None, :] < INPUTS),
                other=0.0,
            )
            h, _slope, _curvature = activation(own.to(A), ACT)
            acc += tl.dot(left.to(C), h.to(C), input_precision=PRECISION)
            bias += tl.sum(left.to(A), 1)
    mask = (o[:, None] < OUTPUTS) & (j[None, :] < INPUTS)
    at = o[:, None] * INPUTS + j[None, :]
    if dW is not None:
        if not FRESH:
            acc += tl.load(dW + at, mask=mask, other=0.0).to(A)
        tl.store(dW + at, acc, mask=mask)
    if db is not None:
        once = o < tl.where(tl.program_id(1) == 0, OUTPUTS, 0)
        if not FRESH:
            bias += tl.load(db + o, mask=once, other=0.0).to(A)
        tl.store(db + o, bias, mask=once)
