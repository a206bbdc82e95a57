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

SQRT_HALF = tl.constexpr(0.7071067811865476)
INV_SQRT_2PI = tl.constexpr(0.3989422804014327)
SQRT_2_OVER_PI = tl.constexpr(0.7978845608028654)
GELU_CUBIC = tl.constexpr(0.044715)


@triton.jit
def expm1(x):
    """exp(x) - 1. In float32 a polynomial near 0, where the difference would cancel."""
    direct = tl.exp(x) - 1
    if x.dtype == tl.float64:
        return direct
    else:
        # Taylor to x^8: at |x| = 0.5 the first term left out is 5e-9 of the value.
        p = 1 / 5040 + x * (1 / 40320)
        p = 1 / 24 + x * (1 / 120 + x * (1 / 720 + x * p))
        near = x * (1 + x * (1 / 2 + x * (1 / 6 + x * p)))
        return tl.where(tl.abs(x) < 0.5, near, direct)


@triton.jit
def log1p_exp(x):
    """log(1 + exp(x)) for x <= 0, with its relative accuracy kept where exp(x) is small."""
    e = tl.exp(x)
    direct = tl.log(1 + e)
    if x.dtype == tl.float64:
        return direct
    else:
        near = e * (1 - e * (1 / 2 - e * (1 / 3 - e * (1 / 4))))
        return tl.where(e < 0.02, near, direct)


@triton.jit
def tanh(x):
    e = expm1(-2 * tl.abs(x))  # in (-1, 0]: nothing overflows
    t = -e / (2 + e)
    return tl.where(x < 0, -t, t)


@triton.jit
def sigmoid(x):
    return 1 / (1 + tl.exp(-x))


@triton.jit
def activation(a, ACT: tl.constexpr):
    """σ(a), σ'(a), σ''(a) of the kind and numbers ACT = (code, p, q, r).

    What the caller does not use is dead code to the compiler. Comparisons are written so that a NaN
    in ``a`` stays one in σ(a).
    """
    CODE: tl.constexpr = ACT[0]
    p: tl.constexpr = ACT[1]
    q: tl.constexpr = ACT[2]
    r: tl.constexpr = ACT[3]
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
        tail = tl.exp(x) * (p * q * r)
        value = tl.where(a > 0, a * p, expm1(x) * (p * q))
        first = tl.where(a > 0, zero + p, tail)
        second = tl.where(a > 0, zero, tail * r)
    elif CODE == GELU:
        normal = 0.5 * (1 + tl.erf(a * SQRT_HALF))
        density = tl.exp(-0.5 * a * a) * INV_SQRT_2PI
        value = a * normal
        first = normal + a * density
        second = density * (2 - a * a)
    elif CODE == GELU_TANH:
        t = tanh((a + a * a * a * GELU_CUBIC) * SQRT_2_OVER_PI)
        u1 = (1 + a * a * (3 * GELU_CUBIC)) * SQRT_2_OVER_PI
        u2 = a * (6 * SQRT_2_OVER_PI * GELU_CUBIC)
        value = 0.5 * a * (1 + t)
        first = 0.5 * (1 + t) + 0.5 * a * (1 - t * t) * u1
        second = (1 - t * t) * (u1 + 0.5 * a * (u2 - 2 * t * u1 * u1))
    elif CODE == SILU:
        s = sigmoid(a)
        value = a * s
        first = s * (1 + a * (1 - s))
        second = s * (1 - s) * (2 + a * (1 - 2 * s))
    elif CODE == MISH:
        t = tanh(tl.where(a > 0, a, zero) + log1p_exp(-tl.abs(a)))
        s = sigmoid(a)
        value = a * t
        first = t + a * s * (1 - t * t)
        second = (1 - t * t) * s * (2 + a * (1 - s - 2 * t * s))
    elif CODE == SOFTPLUS:
        x = a * p
        s = sigmoid(x)
        value = tl.where(x > q, a, (tl.where(x > 0, x, zero) + log1p_exp(-tl.abs(x))) / p)
        first = tl.where(x > q, zero + 1, s)
        second = tl.where(x > q, zero, s * (1 - s) * p)
    elif CODE == SOFTSIGN:
        d = 1 / (1 + tl.abs(a))
        value = a * d
        first = d * d
        second = tl.where(a > 0, -2 * d * d * d, tl.where(a < 0, 2 * d * d * d, zero))
    elif CODE == TANH:
        value = tanh(a)
        first = 1 - value * value
        second = -2 * value * first
    elif CODE == SIGMOID:
        value = sigmoid(a)
        first = value * (1 - value)
        second = first * (1 - 2 * value)
    elif CODE == LOGSIGMOID:
        s = sigmoid(a)
        value = tl.where(a < 0, a, zero) - log1p_exp(-tl.abs(a))
        first = 1 - s
        second = -s * (1 - s)
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
        t = tanh(a)
        value = a - t
        first = t * t
        second = 2 * t * (1 - t * t)
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
    return value, first, second


@triton.jit
def activation_of(a, ACTS: tl.constexpr, l: tl.constexpr):
    """The same of layer l. Triton 3.6 takes an element of a constexpr tuple as an argument only
    where it is named a constexpr first."""
    ACT: tl.constexpr = ACTS[l]
    return activation(a, ACT)
