"""The nodes between the products of a program, each pass over memory one launch of three kernels.

Value, push, pull and curvature of an element-wise node are all ``out = constant + c_base·base +
c·factor ∘ P`` with a factor of a few kinds (``combine``). Nodes that look at a whole row (norms,
softmax, totals) hold it in registers (``by_row``). The cotangent of a node with parameters, and
what they collect of it over the rows, is a third (``collect``).

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

__all__ = ["by_row", "collect", "combine"]

ONE_ROW = tl.constexpr(0)
OWN_ROW = tl.constexpr(1)
GATHERED = tl.constexpr(2)

# Factors of an element-wise node with the input u and another operand F.
ONE = tl.constexpr(0)
TIMES = tl.constexpr(1)  # F
SLOPE = tl.constexpr(2)  # σ'(u)
KINK = tl.constexpr(3)  # 1 where u > 0, else F
ACTIVATED = tl.constexpr(4)  # σ(u)

# What is done with whole rows.
VALUE = tl.constexpr(0)
PUSH = tl.constexpr(1)
PULL = tl.constexpr(2)  # the curvature beside it, of a p and a tangent s
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
    """The factor; σ(u) and σ''(u) where it is σ'(u), else ones."""
    factor = tl.zeros(mask.shape, A) + 1
    value = factor
    second = factor
    if F is not None:
        factor = tl.load(F + place_of(i, n, j, 0, N, F_), mask=mask, other=0.0).to(A)
    if u is not None:
        a = tl.load(u + place_of(i, n, j, 0, N, U), mask=mask, other=0.0).to(A)
        if FACTOR == KINK:
            factor = tl.where(a > 0, tl.zeros_like(a) + 1, factor)
        elif FACTOR == ACTIVATED:
            factor, _first, _second = activation(a, ACT)
        else:
            value, factor, second = activation(a, ACT)
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

    With p and s the curvature joins what is pulled, or is all without a P: σ''(u)∘s∘p of a factor
    σ'(u), s∘p of others.
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
            found = tl.zeros((BM, BN), A) + constant
            if P is not None:
                own_P = tl.load(P + place_of(i, n, j, t, N, P_), mask=mask, other=0.0).to(A)
                found += c * (factor * own_P)
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


@triton.jit
def leave(to, sums, j, stride, H: tl.constexpr, ADD: tl.constexpr):
    """The sums of a tile's columns j in the program's slice; with ADD to what is there."""
    at = to + tl.program_id(0).to(tl.int64) * stride + j
    found = tl.sum(sums, 0)
    if ADD:
        found += tl.load(at, mask=j < H, other=0.0)
    tl.store(at, found, mask=j < H)


@triton.jit(do_not_specialize=["N"])
def collect(
    out, P, gy, q, p, u, u_dot, place, plain, scaled, N, stride_plain, stride_scaled,
    H: tl.constexpr, T: tl.constexpr, BELOW: tl.constexpr, O: tl.constexpr, P_: tl.constexpr,
    GY: tl.constexpr, Q: tl.constexpr, SEED: tl.constexpr, U: tl.constexpr, DOT: tl.constexpr,
    IN_PLACE: tl.constexpr, ADD_PLAIN: tl.constexpr, ADD_SCALED: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, A: tl.constexpr,
):  # fmt: skip
    """The cotangent g = gy∘P + Σ_t q of all rows, each with what its pairs (n, t) give, in ``out``
    (IN_PLACE of P: where it has pairs), and over each program's rows, in a fixed order, the sums

        plain[program] = Σ g,   scaled[program] = Σ (g∘u + Σ_t p∘u̇),

    which are ∂/∂θ of a bias or shift and of a scale; BELOW: of a PReLU, which counts them where u
    is not above 0. Whatever is None is not there: without gy, g begins with P. With ADD the sums
    are added to what is there."""
    j = tl.program_id(1) * BN + tl.arange(0, BN)
    sums = tl.zeros((BM, BN), A)
    products = tl.zeros((BM, BN), A)
    for tile in range(tl.program_id(0), tl.cdiv(N, BM), tl.num_programs(0)):
        i = tile * tl.full((), BM, tl.int64) + tl.arange(0, BM)
        mask = (i[:, None] < N) & (j[None, :] < H)
        g = tl.zeros((BM, BN), A)
        by_slope = tl.zeros((BM, BN), A)
        changed = mask
        if IN_PLACE:
            changed = mask & (i[:, None] < 0)
        if P is not None:
            g += tl.load(P + place_of(i, i, j, 0, N, P_), mask=mask, other=0.0).to(A)
        if gy is not None:
            g *= tl.load(gy + place_of(i, i, j, 0, N, GY), mask=mask, other=0.0).to(A)
        if place is not None:
            for t in range(T):
                of = place + i + tl.full((), 1, tl.int64) * t * N
                pair = tl.load(of, mask=i < N, other=-1).to(tl.int64)
                there = mask & (pair[:, None] >= 0)
                changed |= there
                if q is not None:
                    at = place_of(pair, i, j, 0, N, Q)
                    g += tl.load(q + at, mask=there, other=0.0).to(A)
                if p is not None:
                    at = place_of(pair, i, j, 0, N, SEED)
                    seed = tl.load(p + at, mask=there, other=0.0).to(A)
                    at = place_of(pair, i, j, 0, N, DOT)
                    by_slope += seed * tl.load(u_dot + at, mask=there, other=0.0).to(A)
        if out is not None:
            tl.store(out + place_of(i, i, j, 0, N, O), g, mask=changed)
        if plain is not None:
            sums += g
        if scaled is not None:
            x = tl.load(u + place_of(i, i, j, 0, N, U), mask=mask, other=0.0).to(A)
            found = g * x + by_slope
            if BELOW:
                found = tl.where(x > 0, tl.zeros_like(x), found)
            products += found
    if plain is not None:
        leave(plain, sums, j, stride_plain, H, ADD_PLAIN)
    if scaled is not None:
        leave(scaled, products, j, stride_scaled, H, ADD_SCALED)


@triton.jit
def centred(t, inside, H: tl.constexpr, KIND: tl.constexpr):
    if KIND == NORMALISE:
        return tl.where(inside, t - tl.sum(t, 1)[:, None] / H, tl.zeros_like(t))
    else:
        return t


@triton.jit
def row_value(t, inside, epsilon, H: tl.constexpr, KIND: tl.constexpr):
    """What the node is of t."""
    if KIND == SOFTMAX or KIND == LOG_SOFTMAX:  # noqa: SIM109 (not in Triton)
        least = tl.zeros_like(t) - float("inf")
        t = t - tl.max(tl.where(inside, t, least), 1)[:, None]
        e = tl.where(inside, tl.exp(t), tl.zeros_like(t))
        found = e / tl.sum(e, 1)[:, None] if KIND == SOFTMAX else t - tl.log(tl.sum(e, 1)[:, None])
    else:
        found = centred(t, inside, H, KIND)
        found *= 1 / tl.sqrt(tl.sum(found * found, 1)[:, None] / H + epsilon)
    return found


@triton.jit
def row_slope(x, r, t, inside, H: tl.constexpr, KIND: tl.constexpr, DOES: tl.constexpr):
    """The tangent that t is pushed to, or the cotangent that it is pulled to."""
    if KIND == SOFTMAX:
        found = x * (t - tl.sum(x * t, 1)[:, None])
    elif KIND == LOG_SOFTMAX:
        found = t - tl.sum(x * t, 1)[:, None] if DOES == PUSH else t - x * tl.sum(t, 1)[:, None]
    else:
        b = centred(t, inside, H, KIND)
        found = r * (b - x * (tl.sum(x * b, 1)[:, None] / H))
    return found


@triton.jit
def row_curvature(x, r, t, s, inside, H: tl.constexpr, KIND: tl.constexpr):
    """The cotangent that the curvature makes of t and a tangent s."""
    if KIND == SOFTMAX:
        alpha = tl.sum(x * t, 1)[:, None]
        beta = tl.sum(x * s, 1)[:, None]
        bent = t * s - beta * t - alpha * s
        found = x * (bent - tl.sum(x * bent, 1)[:, None])
    elif KIND == LOG_SOFTMAX:
        slope = x * (s - tl.sum(x * s, 1)[:, None])
        found = -tl.sum(t, 1)[:, None] * slope
    else:
        a = centred(t, inside, H, KIND)
        b = centred(s, inside, H, KIND)
        alpha = tl.sum(x * a, 1)[:, None] / H
        beta = tl.sum(x * b, 1)[:, None] / H
        both = tl.sum(a * b, 1)[:, None] / H - 3 * alpha * beta
        found = -r * r * (alpha * b + beta * a + x * both)
    return found


@triton.jit(do_not_specialize=["N"])
def by_row(
    out, P, base, u, p, s, scale, shift, plain, rows, total, epsilon, N,
    KIND: tl.constexpr, DOES: tl.constexpr, H: tl.constexpr, T: tl.constexpr,
    O: tl.constexpr, P_: tl.constexpr, B: tl.constexpr, U: tl.constexpr, BENT: tl.constexpr,
    S: tl.constexpr, SCALE: tl.constexpr, SHIFT: tl.constexpr, V: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, A: tl.constexpr,
):  # fmt: skip
    """out = base + what a node that looks at whole rows (H) does, for T parts.

    Value, sum: of P. Push and pull: of P, at the input u of a norm or the value u of a softmax. The
    curvature of p and the tangent s joins what is pulled, or is all without a P. A norm's x̂ is
    computed again from u: that is less to read.

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
    γ = tl.zeros((BM, BN), A) + 1
    if scale is not None:
        γ = tl.load(scale + place_of(i, n, j, 0, N, SCALE), mask=mask, other=0.0).to(A)
    for part in range(T):
        found = tl.zeros((BM, BN), A)
        if P is not None:
            t = tl.load(P + place_of(i, n, j, part, N, P_), mask=mask, other=0.0).to(A)
            if scale is not None and DOES == PULL:
                t *= γ
            if KIND == SUM:
                found = t
            elif DOES == VALUE:
                found = row_value(t, inside, epsilon, H, KIND)
            else:
                found = row_slope(x, r, t, inside, H, KIND, DOES)
        if p is not None:
            t = tl.load(p + place_of(i, n, j, part, N, BENT), mask=mask, other=0.0).to(A)
            if scale is not None:
                t *= γ
            b = tl.load(s + place_of(i, n, j, part, N, S), mask=mask, other=0.0).to(A)
            found += row_curvature(x, r, t, b, inside, H, KIND)
        if KIND == SUM:
            single = tl.arange(0, 1)
            one = tl.sum(found, 1)[:, None]
            at = place_of(i, n, single, part, N, O)
            if base is not None:
                more = base + place_of(i, n, single, part, N, B)
                one += tl.load(more, mask=i[:, None] < count, other=0.0).to(A)
            tl.store(out + at, one, mask=i[:, None] < count)
        else:
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
