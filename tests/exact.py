"""The definition of every activation that bends, in arbitrary precision: in mpmath's arithmetic,
which PyTorch brings along. Those of straight pieces are exact as PyTorch has them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mpmath as mp

__all__ = ["EXACT", "Number"]

Number = Any  # one of mpmath's


def _sigmoid(a: Number) -> Number:
    return 1 / (1 + mp.exp(-a))


def _gelu_tanh(a: Number, *_: Number) -> Number:
    return a * _sigmoid(mp.sqrt(8 / mp.pi) * (a + mp.mpf("0.044715") * a**3))


def _elu(a: Number, p: Number, q: Number, r: Number) -> Number:
    return p * a if a > 0 else p * q * mp.expm1(r * a)


def _softplus(a: Number, p: Number, q: Number, _: Number) -> Number:
    return a if p * a > q else mp.log1p(mp.exp(p * a)) / p


# σ(a) by kind, of a and the activation's three numbers.
EXACT: dict[str, Callable[..., Number]] = {
    "elu": _elu,
    "gelu": lambda a, *_: a * mp.erfc(-a / mp.sqrt(2)) / 2,
    "gelu_tanh": _gelu_tanh,
    "silu": lambda a, *_: a * _sigmoid(a),
    "mish": lambda a, *_: a * mp.tanh(mp.log1p(mp.exp(a))),
    "softplus": _softplus,
    "softsign": lambda a, *_: a / (1 + abs(a)),
    "tanh": lambda a, *_: mp.tanh(a),
    "sigmoid": lambda a, *_: _sigmoid(a),
    "logsigmoid": lambda a, *_: -mp.log1p(mp.exp(-a)),
    "hardswish": lambda a, *_: a * min(max(a / 6 + mp.mpf(1) / 2, 0), 1),
    "tanhshrink": lambda a, *_: a - mp.tanh(a),
    "square": lambda a, *_: a * a,
    "sqrt": lambda a, *_: mp.sqrt(a),
    "exp": lambda a, *_: mp.exp(a),
    "log": lambda a, *_: mp.log(a),
    "reciprocal": lambda a, *_: 1 / a,
    "sin": lambda a, *_: mp.sin(a),
    "cos": lambda a, *_: mp.cos(a),
    "erf": lambda a, *_: mp.erf(a),
}
