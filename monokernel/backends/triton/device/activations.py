"""σ, σ' and σ'' on the device: the third spelling of ``monokernel/activations.py``."""

# ruff: noqa: RET505 (see ``device/__init__.py``)

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["activation", "activation_of"]

# Kinds, as indices of ``activations.ACTIVATIONS``, which begins with ``KINDS``.
RELU = tl.constexpr(1)
LEAKY_RELU = tl.constexpr(2)
HARDTANH = tl.constexpr(3)
ELU = tl.constexpr(4)
GELU = tl.constexpr(5)
GELU_TANH = tl.constexpr(6)
SILU = tl.constexpr(7)
MISH = tl.constexpr(8)
SOFTPLUS = tl.constexpr(9)
SOFTSIGN = tl.constexpr(10)
TANH = tl.constexpr(11)
SIGMOID = tl.constexpr(12)
LOGSIGMOID = tl.constexpr(13)
HARDSIGMOID = tl.constexpr(14)
HARDSWISH = tl.constexpr(15)
SOFTSHRINK = tl.constexpr(16)
HARDSHRINK = tl.constexpr(17)
THRESHOLD = tl.constexpr(18)
CLAMP = tl.constexpr(19)
TANHSHRINK = tl.constexpr(20)
ABS = tl.constexpr(21)
SQUARE = tl.constexpr(22)
SQRT = tl.constexpr(23)
EXP = tl.constexpr(24)
LOG = tl.constexpr(25)
RECIPROCAL = tl.constexpr(26)
SIN = tl.constexpr(27)
COS = tl.constexpr(28)
ERF = tl.constexpr(29)

SQRT_HALF = tl.constexpr(0.7071067811865476)
INV_SQRT_2PI = tl.constexpr(0.3989422804014327)
TWO_OVER_SQRT_PI = tl.constexpr(1.1283791670955126)
SQRT_2_OVER_PI = tl.constexpr(0.7978845608028654)
GELU_CUBIC = tl.constexpr(0.044715)


# How to exponentiate and divide. Triton's own spelling keeps subnormal numbers, which takes more
# instructions; here they are as good as 0. Either is within two units of the last place.
APPROXIMATE = tl.constexpr(1)
EMULATED = tl.constexpr(2)  # with an error as large as the instructions may have
LOG2_E = tl.constexpr(1.4426950408889634)
LEAST = tl.constexpr(1.1754943508222875e-38)  # of what is not subnormal in float32
TWO_UNITS = tl.constexpr(1 + 2**-22)
LARGEST = tl.constexpr(3.4028234663852886e38)  # of float32


@triton.jit
def exp(x, HOW: tl.constexpr):
    if HOW == APPROXIMATE:
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x * LOG2_E], tl.float32, True, 1
        )
    elif HOW == EMULATED and x.dtype == tl.float32:
        e = tl.exp(x) * TWO_UNITS
        return tl.where(e < LEAST, tl.zeros_like(e), e)
    else:
        return tl.exp(x)


@triton.jit
def reciprocal(x, HOW: tl.constexpr):
    if HOW == APPROXIMATE:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1
        )
    elif HOW == EMULATED and x.dtype == tl.float32:
        r = 1 / x * TWO_UNITS
        return tl.where(tl.abs(r) < LEAST, tl.zeros_like(r), r)
    else:
        return 1 / x


@triton.jit
def expm1(x, HOW: tl.constexpr):
    """exp(x) - 1. In float32 a polynomial near 0, where the difference would cancel."""
    direct = exp(x, HOW) - 1
    if x.dtype == tl.float64:
        return direct
    else:
        # Taylor to x^8: at |x| = 0.5 the first term left out is 5e-9 of the value.
        p = 1 / 5040 + x * (1 / 40320)
        p = 1 / 24 + x * (1 / 120 + x * (1 / 720 + x * p))
        near = x * (1 + x * (1 / 2 + x * (1 / 6 + x * p)))
        return tl.where(tl.abs(x) < 0.5, near, direct)


@triton.jit
def log1p_exp(x, HOW: tl.constexpr):
    """log(1 + exp(x)) for x <= 0, with its relative accuracy kept where exp(x) is small."""
    e = exp(x, HOW)
    direct = tl.log(1 + e)
    if x.dtype == tl.float64:
        return direct
    else:
        near = e * (1 - e * (1 / 2 - e * (1 / 3 - e * (1 / 4))))
        return tl.where(e < 0.02, near, direct)


@triton.jit
def tanh(x, HOW: tl.constexpr):
    """tanh(x), and 1 - tanh(x)² as accurately where that is small."""
    e = expm1(-2 * tl.abs(x), HOW)  # in (-1, 0]: nothing overflows
    d = reciprocal(2 + e, HOW)
    t = -e * d
    return tl.where(x < 0, -t, t), 4 * (1 + e) * d * d


@triton.jit
def sigmoids(x, HOW: tl.constexpr):
    """σ(x), and 1 - σ(x) as accurately where that is small; 0 for both where σ(x) underflows."""
    e = exp(-x, HOW)
    s = reciprocal(1 + e, HOW)
    return s, tl.minimum(e, LARGEST) * s  # inf·0 would be NaN


@triton.jit
def sigmoid(x, HOW: tl.constexpr):
    """The same, but with a difference where σ(x) is exact to the last digit."""
    if HOW:
        return sigmoids(x, HOW)
    else:
        s = 1 / (1 + tl.exp(-x))
        return s, 1 - s


@triton.jit
def activation(a, ACT: tl.constexpr):
    """σ(a), σ'(a), σ''(a) of the kind and numbers ACT = (code, p, q, r, how to exponentiate).

    What the caller does not use is dead code to the compiler. Comparisons are written so that a NaN
    in ``a`` stays one in σ(a).
    """
    CODE: tl.constexpr = ACT[0]
    p: tl.constexpr = ACT[1]
    q: tl.constexpr = ACT[2]
    r: tl.constexpr = ACT[3]
    HOW: tl.constexpr = ACT[4]
    zero = tl.zeros_like(a)
    value = a
    first = zero + 1
    second = zero
    if CODE == RELU:
        value = tl.where(a <= 0, zero, a)
        first = tl.where(a > 0, zero + 1, zero)
    elif CODE == LEAKY_RELU:
        value = tl.where(a > 0, a, a * p)
        first = tl.where(a > 0, zero + 1, zero + p)
    elif CODE == HARDTANH:
        value = tl.where(a <= p, zero + p, tl.where(a >= q, zero + q, a))
        first = tl.where((a > p) & (a < q), zero + 1, zero)
    elif CODE == ELU:
        x = tl.where(a > 0, zero, a) * r
        tail = exp(x, HOW) * (p * q * r)
        value = tl.where(a > 0, a * p, expm1(x, HOW) * (p * q))
        first = tl.where(a > 0, zero + p, tail)
        second = tl.where(a > 0, zero, tail * r)
    elif CODE == GELU:
        normal = 0.5 * (1 + tl.erf(a * SQRT_HALF))
        density = exp(-0.5 * a * a, HOW) * INV_SQRT_2PI
        value = a * normal
        first = normal + a * density
        second = density * (2 - a * a)
    elif CODE == GELU_TANH:
        s, c = sigmoids((a + a * a * a * GELU_CUBIC) * (2 * SQRT_2_OVER_PI), HOW)  # (1 + tanh)/2
        u1 = (1 + a * a * (3 * GELU_CUBIC)) * SQRT_2_OVER_PI
        u2 = a * (6 * SQRT_2_OVER_PI * GELU_CUBIC)
        value = a * s
        first = s + 2 * a * s * c * u1
        second = 4 * s * c * (u1 + 0.5 * a * (u2 - 2 * (s - c) * u1 * u1))
    elif CODE == SILU:
        s, c = sigmoid(a, HOW)
        value = a * s
        first = s * (1 + a * c)
        second = s * c * (2 + a * (c - s))
    elif CODE == MISH:
        # By the approximate instructions seven layers of 64 spill 8 bytes on sm_90.
        t, d = tanh(tl.where(a > 0, a, zero) + log1p_exp(-tl.abs(a), 0), 0)
        s, c = sigmoid(a, HOW)
        value = a * t
        first = t + a * s * d
        second = d * s * (2 + a * (c - 2 * t * s))
    elif CODE == SOFTPLUS:
        x = a * p
        s, c = sigmoid(x, HOW)
        value = tl.where(x > q, a, (tl.where(x > 0, x, zero) + log1p_exp(-tl.abs(x), HOW)) / p)
        first = tl.where(x > q, zero + 1, s)
        second = tl.where(x > q, zero, s * c * p)
    elif CODE == SOFTSIGN:
        d = reciprocal(1 + tl.abs(a), HOW)
        value = a * d
        first = d * d
        second = tl.where(a > 0, -2 * d * d * d, tl.where(a < 0, 2 * d * d * d, zero))
    elif CODE == TANH:
        value, first = tanh(a, HOW)
        second = -2 * value * first
    elif CODE == SIGMOID:
        value, c = sigmoid(a, HOW)
        first = value * c
        second = first * (c - value)
    elif CODE == LOGSIGMOID:
        first, s = sigmoid(-a, HOW)
        value = tl.where(a < 0, a, zero) - log1p_exp(-tl.abs(a), HOW)
        second = -s * first
    elif CODE == HARDSIGMOID:
        value = tl.where(a <= -3, zero, tl.where(a >= 3, zero + 1, a / 6 + 0.5))
        first = tl.where((a > -3) & (a < 3), (zero + 1) / 6, zero)
    elif CODE == HARDSWISH:
        inside = (a > -3) & (a < 3)
        value = a * tl.where(a <= -3, zero, tl.where(a >= 3, zero + 1, a / 6 + 0.5))
        first = tl.where(a <= -3, zero, tl.where(a < 3, a / 3 + 0.5, zero + 1))
        second = tl.where(inside, (zero + 1) / 3, zero)
    elif CODE == SOFTSHRINK:
        flat = (a >= -p) & (a <= p)
        value = tl.where(flat, zero, tl.where(a > 0, a - p, a + p))
        first = tl.where(flat, zero, zero + 1)
    elif CODE == HARDSHRINK:
        flat = (a >= -p) & (a <= p)
        value = tl.where(flat, zero, a)
        first = tl.where(flat, zero, zero + 1)
    elif CODE == THRESHOLD:
        value = tl.where(a <= p, zero + q, a)
        first = tl.where(a <= p, zero, zero + 1)
    elif CODE == CLAMP:
        value = tl.where(a <= p, zero + p, tl.where(a >= q, zero + q, a))
        first = tl.where((a >= p) & (a <= q), zero + 1, zero)
    elif CODE == TANHSHRINK:
        t, c = tanh(a, 0)  # a - t has fewer digits
        value = a - t
        first = t * t
        second = 2 * t * c
    elif CODE == ABS:
        value = tl.abs(a)
        first = tl.where(a > 0, zero + 1, tl.where(a < 0, zero - 1, zero))
    elif CODE == SQUARE:
        value = a * a
        first = 2 * a
        second = zero + 2
    elif CODE == SQRT:
        value = tl.sqrt(a)
        first = 0.5 / value
        second = -0.25 / (a * value)
    elif CODE == EXP:
        value = tl.exp(a)
        first = value
        second = value
    elif CODE == LOG:
        value = tl.log(a)
        first = 1 / a
        second = -1 / (a * a)
    elif CODE == RECIPROCAL:
        value = 1 / a
        first = -1 / (a * a)
        second = 2 / (a * a * a)
    elif CODE == SIN:
        value = tl.sin(a)
        first = tl.cos(a)
        second = -value
    elif CODE == COS:
        value = tl.cos(a)
        first = -tl.sin(a)
        second = -value
    elif CODE == ERF:
        value = tl.erf(a)
        first = exp(-a * a, HOW) * TWO_OVER_SQRT_PI
        second = -2 * a * first
    return value, first, second


@triton.jit
def activation_of(a, ACTS: tl.constexpr, l: tl.constexpr):
    """The same of layer l. Triton 3.6 takes an element of a constexpr tuple as an argument only
    where it is named a constexpr first."""
    ACT: tl.constexpr = ACTS[l]
    return activation(a, ACT)
