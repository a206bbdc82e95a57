"""Slopes of a chain of layers in NumPy's longest floats, eleven bits more than float64 on x86-64:
what bounds in float64 are held against, whose own rounding is that of a slope in float64.

Written down by itself, from the definitions of the activations.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from monokernel.activations import Activation

__all__ = ["UNIT", "curve", "slopes"]

LONG = np.longdouble
UNIT = float(np.finfo(LONG).eps)
ROOT = np.sqrt(LONG(2) / (4 * np.arctan(LONG(1))))  # sqrt(2/π)


def slopes(
    layers: Sequence[tuple[Tensor, Tensor | None, Activation]], x: Tensor
) -> tuple[Tensor, Tensor]:
    """∂y/∂x (N, D, d) at points x (N, d), as the float64 next to it, and how far off that may be at
    most: the errors of each step in ``UNIT``, carried along. Which side of a kink a point is on is
    taken as it comes."""
    h, J = _long(x), np.broadcast_to(np.eye(x.shape[1], dtype=LONG), (*x.shape, x.shape[1]))
    of_h, of_J = np.zeros(h.shape), np.zeros(J.shape)
    for W, b, σ in layers:
        weight, bias = _long(W), LONG(0) if b is None else _long(b)
        size, n = np.abs(weight).astype(np.float64), W.shape[1] + 2
        of_a = of_h @ size.T + n * (_size(h) @ size.T + _size(bias))
        of_J = of_J @ size.T + n * (_size(J) @ size.T)
        a, J = h @ weight.T + bias, J @ weight.T
        h, first = curve(σ, a)
        # |σ'| is 1.13 at most, |σ''| that of SELU, and both formulas are good to a few units.
        of_h = 1.2 * of_a + 8 * (_size(h) + 1)
        of_J = 1.2 * of_J + _size(J) * (2 * of_a + 16)[:, None]
        J = J * first[:, None]
    S, error = (torch.from_numpy(t.astype(np.float64)).mT for t in (J, UNIT * of_J))
    return S, error + 2e-16 * S.abs()


def _size(t: Any) -> Any:
    return np.abs(t).astype(np.float64)


def _long(t: Tensor) -> Any:
    return t.detach().double().numpy().astype(LONG)


def curve(σ: Activation, a: Any) -> tuple[Any, Any]:
    """σ(a) and σ'(a), at a kink one of its two."""
    with np.errstate(all="ignore"):
        return _CURVES[σ.kind](a, *σ[1:])


def _sigmoid(a: Any) -> Any:
    small = np.exp(-np.abs(a))
    return np.where(a >= 0, 1, small) / (1 + small)


def _softplus(a: Any) -> Any:
    return np.maximum(a, 0) + np.log1p(np.exp(-np.abs(a)))


def _elu(a: Any, p: float, q: float, r: float) -> tuple[Any, Any]:
    p, q, r = LONG(p), LONG(q), LONG(r)
    low = np.minimum(r * a, 0)
    return np.where(a > 0, p * a, p * q * np.expm1(low)), np.where(
        a > 0, p, p * q * r * np.exp(low)
    )


def _clamp(a: Any, p: float, q: float, _: float) -> tuple[Any, Any]:
    return np.clip(a, LONG(p), LONG(q)), (a > p) & (a < q)


def _gelu(a: Any, *_: float) -> tuple[Any, Any]:
    """Φ(a) = (1 + erf(a/√2)) / 2 = 1/2 + φ(a) (a + a³/3 + a⁵/15 + …)."""
    near = np.clip(a, -12, 12)
    φ = ROOT / 2 * np.exp(-near * near / 2)
    term, total = near, near
    for n in range(3, 401, 2):
        term = term * near * near / n
        total = total + term
    Φ = LONG(0.5) + φ * total
    return a * Φ, Φ + a * φ


def _gelu_tanh(a: Any, *_: float) -> tuple[Any, Any]:
    c = LONG("0.044715")
    t = np.tanh(ROOT * (a + c * a**3))
    return a / 2 * (1 + t), (1 + t) / 2 + a / 2 * (1 - t) * (1 + t) * ROOT * (1 + 3 * c * a * a)


def _silu(a: Any, *_: float) -> tuple[Any, Any]:
    s = _sigmoid(a)
    return a * s, s + a * s * _sigmoid(-a)


def _mish(a: Any, *_: float) -> tuple[Any, Any]:
    t = np.tanh(_softplus(a))
    return a * t, t + a * (1 - t) * (1 + t) * _sigmoid(a)


def _tanh(a: Any, *_: float) -> tuple[Any, Any]:
    small = np.exp(-2 * np.abs(a))
    return np.tanh(a), 4 * small / (1 + small) ** 2


def _tanhshrink(a: Any, *_: float) -> tuple[Any, Any]:
    t = np.tanh(a)
    return a - t, t * t


def _softsign(a: Any, *_: float) -> tuple[Any, Any]:
    return a / (1 + np.abs(a)), 1 / (1 + np.abs(a)) ** 2


def _hardswish(a: Any, *_: float) -> tuple[Any, Any]:
    value = a * np.clip(a + 3, 0, 6) / 6
    return value, np.where(a < -3, 0, np.where(a > 3, 1, (2 * a + 3) / 6))


_CURVES: dict[str, Any] = {
    "identity": lambda a, *_: (a, np.ones_like(a)),
    "relu": lambda a, *_: (np.maximum(a, 0), a > 0),
    "leaky_relu": lambda a, p, *_: (np.where(a > 0, a, LONG(p) * a), np.where(a > 0, 1, LONG(p))),
    "hardtanh": _clamp,
    "elu": _elu,
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "silu": _silu,
    "mish": _mish,
    "softplus": lambda a, p, *_: (_softplus(LONG(p) * a) / LONG(p), _sigmoid(LONG(p) * a)),
    "softsign": _softsign,
    "tanh": _tanh,
    "sigmoid": lambda a, *_: (_sigmoid(a), _sigmoid(a) * _sigmoid(-a)),
    "logsigmoid": lambda a, *_: (-_softplus(-a), _sigmoid(-a)),
    "hardsigmoid": lambda a, *_: (np.clip(a + 3, 0, 6) / 6, ((a > -3) & (a < 3)) / LONG(6)),
    "hardswish": _hardswish,
    "softshrink": lambda a, p, *_: (a - np.clip(a, -LONG(p), LONG(p)), np.abs(a) > p),
    "tanhshrink": _tanhshrink,
}
