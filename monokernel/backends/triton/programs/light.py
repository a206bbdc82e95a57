"""The nodes between the products of a program, each pass over memory one launch of three kernels.

Value, push, pull and curvature of an element-wise node are all ``out = constant + c_base·base +
c·factor ∘ P`` with a factor of a few kinds (``combine``); what its parameters collect is a sum of
factor ∘ P over the rows (``column_sums``). Nodes that look at a whole row (norms, softmax, totals)
hold it in registers (``by_row``).

Both kinds of chains run through the same kernels: those of all rows, and those of the active pairs,
whose number is on the device (``total``) and whose values are those of their rows (``rows``).

Operands are stacks (T, n, H), one part after the other, of any strides within a part. The layout
of one is (row stride, column stride, how): ``ONE_ROW`` for all n, with the row stride between the
parts, ``OWN_ROW`` number i, or row number ``rows[i]`` (``GATHERED``). Strides follow the network,
never the number of rows.
"""

# ruff: noqa: RET505 (see ``device/__init__.py``)

from __future__ import annotations

import triton
import triton.language as tl

from ..device.activations import activation

__all__ = ["by_row", "column_sums", "combine"]

ONE_ROW = tl.constexpr(0)
OWN_ROW = tl.constexpr(1)
GATHERED = tl.constexpr(2)

# Factors of an element-wise node with the input u and another operand F.
ONE = tl.constexpr(0)
TIMES = tl.constexpr(1)  # F
SLOPE = tl.constexpr(2)  # σ'(u)
CURVATURE = tl.constexpr(3)  # σ''(u)∘F
KINK = tl.constexpr(4)  # 1 where u > 0, else F
BELOW = tl.constexpr(5)  # 0 where u > 0, else F

# What is done with whole rows.
VALUE = tl.constexpr(0)
PUSH = tl.constexpr(1)
PULL = tl.constexpr(2)
BEND = tl.constexpr(3)
# And the kinds of nodes that do it.
SUM = tl.constexpr(0)
NORMALISE = tl.constexpr(1)
ROOT_MEAN_SQUARE = tl.constexpr(2)
SOFTMAX = tl.constexpr(3)
LOG_SOFTMAX = tl.constexpr(4)


@triton.jit
def place_of(i, n, j, t, N, LAYOUT: tl.constexpr):
    """Where rows (i, or n if gathered) and columns j of part t lie in a stack."""
    ROW: tl.constexpr = LAYOUT[0]
    COLUMN: tl.constexpr = LAYOUT[1]
    HOW: tl.constexpr = LAYOUT[2]
    t = tl.full((), 1, tl.int64) * t
    if HOW == ONE_ROW:
        return (t * ROW + 0 * i)[:, None] + (j * COLUMN)[None, :]
    elif HOW == OWN_ROW:
        return ((t * N + i) * ROW)[:, None] + (j * COLUMN)[None, :]
    else:
        return (n * ROW)[:, None] + (j * COLUMN)[None, :]


@triton.jit
def rows_of(rows, i, count):
    """The rows that the i-th of a chain has its values from."""
    if rows is None:
        return i
    else:
        return tl.load(rows + i, mask=i < count, other=0).to(tl.int64)


@triton.jit
def count_of(total, N):
    if total is None:
        return N
    else:
        return tl.load(total)


@triton.jit
def factor_of(
    u, F, i, n, j, mask, N, FACTOR: tl.constexpr, ACT: tl.constexpr, U: tl.constexpr,
    F_: tl.constexpr, A: tl.constexpr,
):  # fmt: skip
    """The factor; σ(u) and σ''(u) where it is one of σ."""
    factor = tl.zeros(mask.shape, A) + 1
    value = factor
    second = factor
    if F is not None:
        factor = tl.load(F + place_of(i, n, j, 0, N, F_), mask=mask, other=0.0).to(A)
    if u is not None:
        a = tl.load(u + place_of(i, n, j, 0, N, U), mask=mask, other=0.0).to(A)
        if FACTOR == KINK:
            factor = tl.where(a > 0, tl.zeros_like(a) + 1, factor)
        elif FACTOR == BELOW:
            factor = tl.where(a > 0, tl.zeros_like(a), factor)
        else:
            value, first, second = activation(a, ACT)
            if FACTOR == SLOPE:
                factor = first
            else:
                factor *= second
    return factor, value, second


@triton.jit(do_not_specialize=["N"])
def combine(
    out, P, base, u, F, value, p, s, rows, total, constant, c, c_base, N,
    FACTOR: tl.constexpr, ACT: tl.constexpr, H: tl.constexpr, T: tl.constexpr,
    O: tl.constexpr, P_: tl.constexpr, B: tl.constexpr, U: tl.constexpr, F_: tl.constexpr,
    V: tl.constexpr, BENT: tl.constexpr, S: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, A: tl.constexpr,
):  # fmt: skip
    """out = constant + c_base·base + c·factor ∘ P for T parts, and value = σ(u).

    With p and s, of a factor σ'(u), σ''(u)∘s∘p is added: the curvature joins what is pulled.
    """
    count = count_of(total, N)
    if tl.program_id(0) * BM >= count:
        return
    i = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    n = rows_of(rows, i, count)
    j = tl.program_id(1) * BN + tl.arange(0, BN)
    mask = (i[:, None] < count) & (j[None, :] < H)
    factor, own, second = factor_of(u, F, i, n, j, mask, N, FACTOR, ACT, U, F_, A)
    if out is not None:
        for t in range(T):
            found = tl.load(P + place_of(i, n, j, t, N, P_), mask=mask, other=0.0).to(A)
            found = c * (factor * found) + constant
            if base is not None:
                at = place_of(i, n, j, t, N, B)
                found += c_base * tl.load(base + at, mask=mask, other=0.0).to(A)
            if p is not None:
                bent = tl.load(p + place_of(i, n, j, t, N, BENT), mask=mask, other=0.0).to(A)
                bent *= tl.load(s + place_of(i, n, j, t, N, S), mask=mask, other=0.0).to(A)
                found += second * bent
            tl.store(out + place_of(i, n, j, t, N, O), found, mask=mask)
    if value is not None:
        tl.store(value + place_of(i, n, j, 0, N, V), own, mask=mask)


@triton.jit(do_not_specialize=["N"])
def column_sums(
    sums, P, u, F, rows, total, N, stride,
    FACTOR: tl.constexpr, H: tl.constexpr, P_: tl.constexpr, U: tl.constexpr, F_: tl.constexpr,
    ADD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, A: tl.constexpr,
):  # fmt: skip
    """sums[program] (of a stride) = Σ factor ∘ P over the program's rows, in a fixed order; with
    ADD it is added to what is there."""
    count = count_of(total, N)
    j = tl.program_id(1) * BN + tl.arange(0, BN)
    acc = tl.zeros((BM, BN), A)
    for tile in range(tl.program_id(0), tl.cdiv(count, BM), tl.num_programs(0)):
        i = tile * tl.full((), BM, tl.int64) + tl.arange(0, BM)
        n = rows_of(rows, i, count)
        mask = (i[:, None] < count) & (j[None, :] < H)
        factor, _value, _second = factor_of(
            u, F, i, n, j, mask, N, FACTOR, (0, 0.0, 0.0, 0.0, 0), U, F_, A
        )
        own = tl.load(P + place_of(i, n, j, 0, N, P_), mask=mask, other=0.0).to(A)
        acc += tl.where(mask, factor * own, tl.zeros_like(own))
    at = sums + tl.program_id(0).to(tl.int64) * stride + j
    found = tl.sum(acc, 0)
    if ADD:
        found += tl.load(at, mask=j < H, other=0.0)
    tl.store(at, found, mask=j < H)


@triton.jit
def centred(t, inside, H: tl.constexpr, KIND: tl.constexpr):
    if KIND == NORMALISE:
        return tl.where(inside, t - tl.sum(t, 1)[:, None] / H, tl.zeros_like(t))
    else:
        return t


@triton.jit(do_not_specialize=["N"])
def by_row(
    out, P, base, u, s, scale, shift, plain, rows, total, epsilon, N,
    KIND: tl.constexpr, DOES: tl.constexpr, H: tl.constexpr, T: tl.constexpr,
    O: tl.constexpr, P_: tl.constexpr, B: tl.constexpr, U: tl.constexpr, S: tl.constexpr,
    SCALE: tl.constexpr, SHIFT: tl.constexpr, V: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, A: tl.constexpr,
):  # fmt: skip
    """out = base + what a node that looks at whole rows (H) does, for T parts.

    Value, sum: of P. Push and pull: of P, at the input u of a norm or the value u of a softmax.
    Curvature: of P and the tangent s. A norm's x̂ is computed again from u: that is less to read.

    A norm may have a scale after it, and its value a shift: ``plain`` is what it is without them.
    """
    count = count_of(total, N)
    if tl.program_id(0) * BM >= count:
        return
    i = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    n = rows_of(rows, i, count)
    j = tl.arange(0, BN)
    inside = j[None, :] < H
    mask = (i[:, None] < count) & inside
    x = tl.zeros((BM, BN), A)
    r = tl.zeros((BM, 1), A)
    if u is not None:
        x = tl.load(u + place_of(i, n, j, 0, N, U), mask=mask, other=0.0).to(A)
        if KIND == SOFTMAX:
            pass
        elif KIND == LOG_SOFTMAX:
            x = tl.where(inside, tl.exp(x), tl.zeros_like(x))
        else:
            x = centred(x, inside, H, KIND)
            r = 1 / tl.sqrt(tl.sum(x * x, 1)[:, None] / H + epsilon)
            x *= r
    for part in range(T):
        t = tl.load(P + place_of(i, n, j, part, N, P_), mask=mask, other=0.0).to(A)
        if scale is not None:
            γ = tl.load(scale + place_of(i, n, j, 0, N, SCALE), mask=mask, other=0.0).to(A)
            if DOES >= PULL:
                t *= γ
        if KIND == SUM:
            single = tl.arange(0, 1)
            found = tl.sum(t, 1)[:, None]
            at = place_of(i, n, single, part, N, O)
            if base is not None:
                more = base + place_of(i, n, single, part, N, B)
                found += tl.load(more, mask=i[:, None] < count, other=0.0).to(A)
            tl.store(out + at, found, mask=i[:, None] < count)
        else:
            if DOES == VALUE:
                if KIND == SOFTMAX or KIND == LOG_SOFTMAX:  # noqa: SIM109 (not in Triton)
                    least = tl.zeros_like(t) - float("inf")
                    t = t - tl.max(tl.where(inside, t, least), 1)[:, None]
                    e = tl.where(inside, tl.exp(t), tl.zeros_like(t))
                    if KIND == SOFTMAX:
                        found = e / tl.sum(e, 1)[:, None]
                    else:
                        found = t - tl.log(tl.sum(e, 1)[:, None])
                else:
                    found = centred(t, inside, H, KIND)
                    found *= 1 / tl.sqrt(tl.sum(found * found, 1)[:, None] / H + epsilon)
            elif DOES == BEND:
                b = tl.load(s + place_of(i, n, j, part, N, S), mask=mask, other=0.0).to(A)
                if KIND == SOFTMAX:
                    alpha = tl.sum(x * t, 1)[:, None]
                    beta = tl.sum(x * b, 1)[:, None]
                    bent = t * b - beta * t - alpha * b
                    found = x * (bent - tl.sum(x * bent, 1)[:, None])
                elif KIND == LOG_SOFTMAX:
                    slope = x * (b - tl.sum(x * b, 1)[:, None])
                    found = -tl.sum(t, 1)[:, None] * slope
                else:
                    a = centred(t, inside, H, KIND)
                    b = centred(b, inside, H, KIND)
                    alpha = tl.sum(x * a, 1)[:, None] / H
                    beta = tl.sum(x * b, 1)[:, None] / H
                    both = tl.sum(a * b, 1)[:, None] / H - 3 * alpha * beta
                    found = -r * r * (alpha * b + beta * a + x * both)
            elif KIND == SOFTMAX:
                found = x * (t - tl.sum(x * t, 1)[:, None])
            elif KIND == LOG_SOFTMAX:
                if DOES == PUSH:
                    found = t - tl.sum(x * t, 1)[:, None]
                else:
                    found = t - x * tl.sum(t, 1)[:, None]
            else:
                b = centred(t, inside, H, KIND)
                found = r * (b - x * (tl.sum(x * b, 1)[:, None] / H))
            if plain is not None:
                tl.store(plain + place_of(i, n, j, part, N, V), found, mask=mask)
            if scale is not None and DOES < PULL:
                found *= γ
            if shift is not None:
                at = place_of(i, n, j, 0, N, SHIFT)
                found += tl.load(shift + at, mask=mask, other=0.0).to(A)
            if base is not None:
                more = base + place_of(i, n, j, part, N, B)
                found += tl.load(more, mask=mask, other=0.0).to(A)
            tl.store(out + place_of(i, n, j, part, N, O), found, mask=mask)
