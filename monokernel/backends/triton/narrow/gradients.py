"""The gradients of a narrow chain's parameters: sums over the rows, and over the active pairs.

Each program has a share of the rows and of the pairs, and carries its sums in registers through
both; what products take lies in shared memory, where the compiler puts it. With the kept chain the
cotangent of a row is gy·σ'∘P, so that no product is left but those of the sums themselves.
"""

# ruff: noqa: RET505 (see ``device/__init__.py``)

from __future__ import annotations

import triton
import triton.language as tl

from ..device.activations import activation_of
from ..device.columns import place_of
from ..device.tiles import bias_row, input_tile, input_weights, of_rows
from ..whole.sums import put_bias, put_weight
from ..whole.tiles import matmul, packed, unpacked

__all__ = ["narrow_gradients"]

ONES = tl.constexpr(16)  # Triton 3.6 has no wgmma of fewer columns, and holds the operands


@triton.jit(do_not_specialize=["N"])
def narrow_gradients(
    x, W, b, last, a, chain, gy, rows, total, x_dot, p, q, h, h_dot, partials, N,
    WIDTHS: tl.constexpr, ACTS: tl.constexpr, NEEDS: tl.constexpr, OFFSETS: tl.constexpr,
    RUNS: tl.constexpr, K: tl.constexpr, H: tl.constexpr, FAN_TILE: tl.constexpr,
    BM: tl.constexpr, C: tl.constexpr, A: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``last`` is the row of W_L. Of the pairs, of which there are ``total``, p, q, h and ḣ of the
    hidden layers are in the order of their list."""
    partials = partials + tl.program_id(0).to(tl.int64) * OFFSETS[len(OFFSETS) - 1]
    sums = no_sums(WIDTHS, H, FAN_TILE, A)
    output = tl.zeros((BM,), A)
    unit = tl.arange(0, H)
    w, _bias = input_weights(W, None, unit, WIDTHS[1], WIDTHS[0], FAN_TILE, C, A)
    for tile in tl.range(tl.program_id(0), tl.cdiv(N, BM), tl.num_programs(0), disable_licm=True):
        start = tile * tl.full((), BM, tl.int64)
        n = tl.arange(0, BM)
        ok = n < N - tile * BM
        sums = of_tile(
            sums, start, n, ok, x, w, b, last, a, chain, gy, WIDTHS, ACTS, NEEDS, H, FAN_TILE, C, A,
            PRECISION,
        )  # fmt: skip
        if NEEDS[len(NEEDS) - 1]:
            output += tl.load(gy + start + n, mask=ok, other=0.0).to(A)
    if total is not None:
        count = tl.load(total)
        for tile in tl.range(
            tl.program_id(0), tl.cdiv(count, BM), tl.num_programs(0), disable_licm=True
        ):
            start = tile * tl.full((), BM, tl.int64)
            i = tl.arange(0, BM)
            sums = of_pairs(
                sums, start, i, i < count - tile * BM, x, rows, x_dot, p, q, h, h_dot, WIDTHS,
                NEEDS, RUNS, K, H, FAN_TILE, C, A, PRECISION,
            )  # fmt: skip
    leave_sums(sums, output, partials, WIDTHS, NEEDS, OFFSETS)


@triton.jit
def no_sums(WIDTHS: tl.constexpr, H: tl.constexpr, FAN_TILE: tl.constexpr, A: tl.constexpr):
    """Zeros for dW and db of the hidden layers, and last for dW of the output. db of the first is
    a column of its dW; of the others all columns are the same."""
    sums = ()
    for l in tl.static_range(len(WIDTHS) - 2):
        weight = tl.zeros((H, H if l else FAN_TILE), A)
        sums = sums + (weight,)  # type: ignore[assignment] # noqa: RUF005
        if l > 0:
            sums = sums + (tl.zeros((H, ONES), A),)  # type: ignore[assignment] # noqa: RUF005
    return sums + (tl.zeros((H, ONES), A),)  # noqa: RUF005 (Triton unpacks no tuples)


@triton.jit
def of_tile(
    sums, start, n, ok, x, w, b, last, a, chain, gy, WIDTHS: tl.constexpr, ACTS: tl.constexpr,
    NEEDS: tl.constexpr, H: tl.constexpr, FAN_TILE: tl.constexpr, C: tl.constexpr, A: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The sums with what some rows give."""
    L: tl.constexpr = len(ACTS)
    HOW: tl.constexpr = ACTS[0][4]
    unit = tl.arange(0, H)
    below = with_ones(input_tile(x + start * WIDTHS[0], n, ok, WIDTHS[0], FAN_TILE, C), WIDTHS[0])
    factor = of_rows(gy + start, n, ok, A)
    own = tl.dot(below, w, input_precision=PRECISION).to(A)
    if b is not None:
        own += bias_row(b, unit, WIDTHS[1], A)
    found = ()
    for l in tl.static_range(L - 1):
        if l > 0:
            own = rows_of(a[l - 1], start, n, ok, unit, WIDTHS[l + 1], A)
        value, slope, _curvature = activation_of(own, ACTS, l)
        if l > 0 and l < L - 2:
            # Else the compiler takes σ and σ' of a_l in two layouts, each by itself.
            slope = unpacked(packed(slope, C, HOW), C, HOW).to(A)
        if l == L - 2:
            above = bias_row(last, unit, WIDTHS[L - 1], A)
        else:
            above = rows_of(chain[l], start, n, ok, unit, WIDTHS[l + 1], A)
        g = (slope * above * factor).to(C)
        found = found + added(
            sums[place_of_weight(l)], sums, l, g, below, NEEDS, C, PRECISION
        )  # fmt: skip
        below = value.to(C)
    output = sums[2 * L - 3]
    if NEEDS[2 * L - 2]:
        every = tl.broadcast_to(factor.to(C), (n.shape[0], ONES))
        output += matmul(tl.trans(below), every, C, PRECISION)
    return found + (output,)  # noqa: RUF005 (Triton unpacks no tuples)


@triton.jit
def rows_of(t, start, n, ok, unit, WIDTH: tl.constexpr, DTYPE: tl.constexpr):
    """The rows start + n of a tensor of WIDTH columns."""
    at = n[:, None] * WIDTH + unit[None, :]
    mask = ok[:, None] & (unit[None, :] < WIDTH)
    return tl.load(t + start * WIDTH + at, mask=mask, other=0.0).to(DTYPE)


@triton.jit
def with_ones(inputs, d: tl.constexpr):
    """The tile with a column of ones behind the d inputs: db_1 is then a column of dW_1."""
    last = tl.arange(0, inputs.shape[1]) == d
    return tl.where(last[None, :], tl.full(inputs.shape, 1, inputs.dtype), inputs)


@triton.constexpr_function
def place_of_weight(l):
    """Which of the sums is dW of layer l; its db is the next, but that of the first."""
    return max(2 * l - 1, 0)


@triton.jit
def added(
    weight, sums, l: tl.constexpr, left, right, NEEDS: tl.constexpr, C: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """(dW, db) of layer l with leftᵀ right and the sum of left over the rows."""
    if NEEDS[2 * l] or (l == 0 and NEEDS[1]):
        weight += matmul(tl.trans(left), right, C, PRECISION)
    if l == 0:
        return (weight,)
    else:
        bias = sums[2 * l]
        if NEEDS[2 * l + 1]:
            ones = tl.full((left.shape[0], ONES), 1, C)
            bias += matmul(tl.trans(left), ones, C, PRECISION)
        return (weight, bias)


@triton.jit
def of_pairs(
    sums, start, i, ok, x, rows, x_dot, p, q, h, h_dot, WIDTHS: tl.constexpr,
    NEEDS: tl.constexpr, RUNS: tl.constexpr, K: tl.constexpr, H: tl.constexpr,
    FAN_TILE: tl.constexpr, C: tl.constexpr, A: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The sums with what some pairs give: pᵀ ḣ + qᵀ h, and q."""
    L: tl.constexpr = len(WIDTHS) - 1
    unit = tl.arange(0, H)
    n = tl.load(rows + start + i, mask=ok, other=0).to(tl.int64)
    below = with_ones(input_tile(x, n, ok, WIDTHS[0], FAN_TILE, C), WIDTHS[0])
    place = place_of(tl.arange(0, FAN_TILE), RUNS)
    inside = ok[:, None] & ((place >= 0) & (place < K))[None, :]
    at = i[:, None] * K + place[None, :]
    below_dot = tl.load(x_dot + start * K + at, mask=inside, other=0.0).to(C)
    found = ()
    for l in tl.static_range(L - 1):
        weight = sums[place_of_weight(l)]
        if NEEDS[2 * l]:
            left = rows_of(p[l], start, i, ok, unit, WIDTHS[l + 1], C)
            weight += matmul(tl.trans(left), below_dot, C, PRECISION)
        left = rows_of(q[l], start, i, ok, unit, WIDTHS[l + 1], C)
        found = found + added(weight, sums, l, left, below, NEEDS, C, PRECISION)
        below_dot = rows_of(h_dot[l], start, i, ok, unit, WIDTHS[l + 1], C)
        if l < L - 2:
            below = rows_of(h[l], start, i, ok, unit, WIDTHS[l + 1], C)
    output = sums[2 * L - 3]
    if NEEDS[2 * L - 2]:
        ones = tl.full((n.shape[0], ONES), 1, C)
        output += matmul(tl.trans(below_dot), ones, C, PRECISION)
    return found + (output,)  # noqa: RUF005 (Triton unpacks no tuples)


@triton.jit
def leave_sums(
    sums, output, partials, WIDTHS: tl.constexpr, NEEDS: tl.constexpr, OFFSETS: tl.constexpr
):
    """The sums become the program's slice."""
    L: tl.constexpr = len(WIDTHS) - 1
    first = sums[0]
    if NEEDS[0]:
        column = tl.arange(0, first.shape[1])
        put_weight(first, column, partials + OFFSETS[0], WIDTHS[1], WIDTHS[0], False)
    if NEEDS[1]:
        last = tl.arange(0, first.shape[1]) == WIDTHS[0]
        own = tl.where(last[None, :], first, tl.zeros_like(first))
        put_bias(tl.sum(own, 1), partials + OFFSETS[1], WIDTHS[1], False)
    for l in tl.static_range(1, L - 1):
        if NEEDS[2 * l]:
            weight = sums[2 * l - 1]
            column = tl.arange(0, weight.shape[1])
            put_weight(weight, column, partials + OFFSETS[2 * l], WIDTHS[l + 1], WIDTHS[l], False)
        if NEEDS[2 * l + 1]:
            at = partials + OFFSETS[2 * l + 1]
            put_bias(tl.sum(sums[2 * l], 1) * (1 / ONES), at, WIDTHS[l + 1], False)
    if NEEDS[2 * L - 2]:
        at = partials + OFFSETS[2 * L - 2]
        put_bias(tl.sum(sums[2 * L - 3], 1) * (1 / ONES), at, WIDTHS[L - 1], False)
    if NEEDS[2 * L - 1]:
        tl.store(partials + OFFSETS[2 * L - 1], tl.sum(output))
