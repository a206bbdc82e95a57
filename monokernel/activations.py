"""The activation table: σ, σ' and σ'' of every element-wise kind.

This is the one place where PyTorch's modules are mapped to kinds. Each is spelled here in PyTorch
and in ``csrc`` for the CPU and in ``backends/triton`` for the GPU, whose whole-network kernels know
the 14 of ``KINDS`` alone, and tests hold the spellings equal. Conventions at a kink are PyTorch's:
σ'(0) of ReLU is 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["ACTIVATIONS", "IDENTITY", "KINDS", "Activation", "of_module"]

SELU_SCALE = 1.0507009873554804934193349852946
SELU_ALPHA = 1.6732632423543772848170429916717
SQRT_HALF = math.sqrt(0.5)
INV_SQRT_2PI = 1.0 / math.sqrt(2.0 * math.pi)
SQRT_2_OVER_PI = math.sqrt(2.0 / math.pi)
GELU_CUBIC = 0.044715
TWO_OVER_SQRT_PI = 2.0 / math.sqrt(math.pi)


class Activation(NamedTuple):
    """One activation: a kind of the table and its (up to three) numbers.

    ======================  =====================================================================
    kind                    σ(a), with p, q, r the numbers
    ======================  =====================================================================
    identity                a
    relu                    max(a, 0)
    leaky_relu              a if a > 0 else p·a
    hardtanh                min(max(a, p), q)                            (ReLU6 is p, q = 0, 6)
    elu                     p·a if a > 0 else p·q·(exp(r·a) - 1)         (ELU, SELU, CELU)
    gelu, gelu_tanh         a·Φ(a), exact and by the tanh approximation
    silu, mish              a·sigmoid(a), a·tanh(softplus(a))
    softplus                log(1 + exp(p·a)) / p, and a where p·a > q
    softsign                a / (1 + |a|)
    tanh, sigmoid           as named
    logsigmoid              log(sigmoid(a))
    hardsigmoid, hardswish  m(a) = min(max(a/6 + 1/2, 0), 1), and a·m(a)
    softshrink              a - p if a > p, a + p if a < -p, else 0
    hardshrink              0 if -p <= a <= p, else a
    threshold               a if a > p, else q
    clamp                   min(max(a, p), q), with slope 1 also where a is p or q
    tanhshrink              a - tanh(a)
    abs, square, sqrt       as named
    exp, log, reciprocal    as named
    sin, cos, erf           as named
    ======================  =====================================================================
    """

    kind: str
    p: float = 0.0
    q: float = 0.0
    r: float = 0.0

    @property
    def code(self) -> int:
        """The index of the kind in ``KINDS``. A ValueError where Triton's kernels have none."""
        return KINDS.index(self.kind)

    @property
    def piecewise_linear(self) -> bool:
        """Whether σ'' is zero everywhere, so that the curvature terms of the backward vanish."""
        return ACTIVATIONS[self.kind].piecewise_linear

    def value(self, a: Tensor) -> Tensor:
        """σ(a), differentiable."""
        return ACTIVATIONS[self.kind].value(a, self)

    def first(self, a: Tensor) -> Tensor:
        """σ'(a), differentiable to all orders."""
        return ACTIVATIONS[self.kind].first(a, self)

    def second(self, a: Tensor) -> Tensor:
        """σ''(a), differentiable to all orders."""
        return ACTIVATIONS[self.kind].second(a, self)

    def pull(self, g: Tensor, a: Tensor) -> Tensor:
        """σ'(a) ∘ g, in one pass where PyTorch has an operator for it. Not for autograd."""
        return ACTIVATIONS[self.kind].pull(g, a, self)


Unary = Callable[[Tensor, Activation], Tensor]


@dataclass(frozen=True)
class Spelling:
    """How PyTorch computes one kind. ``pull`` is σ'(a) ∘ g as PyTorch's own backward has it."""

    value: Unary
    first: Unary
    second: Unary
    pull: Callable[[Tensor, Tensor, Activation], Tensor]
    piecewise_linear: bool = False


def _zero(a: Tensor, _: Activation) -> Tensor:
    return torch.zeros_like(a)


def _step(a: Tensor, low: float, high: float) -> Tensor:
    return torch.where(a > 0, high, torch.full_like(a, low))


def _elu_tail(a: Tensor, s: Activation, order: int) -> Tensor:
    """p·q·r^order·exp(r·a) for a ≤ 0. Clamped, so that the branch not taken cannot overflow."""
    return s.p * s.q * s.r**order * torch.exp(s.r * a.clamp(max=0))


def _elu(a: Tensor, s: Activation) -> Tensor:
    return torch.where(a > 0, s.p * a, s.p * s.q * torch.expm1(s.r * a.clamp(max=0)))


def _phi(a: Tensor) -> Tensor:
    return INV_SQRT_2PI * torch.exp(-0.5 * a * a)


def _gelu_first(a: Tensor, _: Activation) -> Tensor:
    return 0.5 * (1 + torch.erf(SQRT_HALF * a)) + a * _phi(a)


def _gelu_tanh_parts(a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """t = tanh(u), u' and u'' of the tanh approximation's inner polynomial u(a)."""
    t = torch.tanh(SQRT_2_OVER_PI * (a + GELU_CUBIC * a * a * a))
    return t, SQRT_2_OVER_PI * (1 + 3 * GELU_CUBIC * a * a), SQRT_2_OVER_PI * 6 * GELU_CUBIC * a


def _gelu_tanh_first(a: Tensor, _: Activation) -> Tensor:
    t, u1, _u2 = _gelu_tanh_parts(a)
    return 0.5 * (1 + t) + 0.5 * a * (1 - t * t) * u1


def _gelu_tanh_second(a: Tensor, _: Activation) -> Tensor:
    t, u1, u2 = _gelu_tanh_parts(a)
    return (1 - t * t) * (u1 + 0.5 * a * (u2 - 2 * t * u1 * u1))


def _silu_first(a: Tensor, _: Activation) -> Tensor:
    s = torch.sigmoid(a)
    return s * (1 + a * (1 - s))


def _silu_second(a: Tensor, _: Activation) -> Tensor:
    s = torch.sigmoid(a)
    return torch.addcmul(s, s, s, value=-1) * torch.addcmul(a + 2, a, s, value=-2)


def _mish_first(a: Tensor, _: Activation) -> Tensor:
    t, s = torch.tanh(F.softplus(a)), torch.sigmoid(a)
    return t + a * s * (1 - t * t)


def _mish_second(a: Tensor, _: Activation) -> Tensor:
    t, s = torch.tanh(F.softplus(a)), torch.sigmoid(a)
    return (1 - t * t) * s * (2 + a * (1 - s - 2 * t * s))


def _softplus_first(a: Tensor, s: Activation) -> Tensor:
    return torch.where(s.p * a > s.q, 1.0, torch.sigmoid(s.p * a))


def _softplus_second(a: Tensor, s: Activation) -> Tensor:
    m = torch.sigmoid(s.p * a)
    return torch.where(s.p * a > s.q, 0.0, s.p * m * (1 - m))


def _softsign_first(a: Tensor, _: Activation) -> Tensor:
    return 1 / (1 + a.abs()).square()


def _softsign_second(a: Tensor, _: Activation) -> Tensor:
    return -2 * torch.sign(a) / (1 + a.abs()) ** 3


def _tanh_first(a: Tensor, _: Activation) -> Tensor:
    return 1 - torch.tanh(a).square()


def _tanh_second(a: Tensor, _: Activation) -> Tensor:
    t = torch.tanh(a)
    return -2 * t * (1 - t * t)


def _sigmoid_first(a: Tensor, _: Activation) -> Tensor:
    s = torch.sigmoid(a)
    return s * (1 - s)


def _sigmoid_second(a: Tensor, _: Activation) -> Tensor:
    s = torch.sigmoid(a)
    return s * (1 - s) * (1 - 2 * s)


def _logsigmoid_second(a: Tensor, _: Activation) -> Tensor:
    s = torch.sigmoid(a)
    return -s * (1 - s)


def _hardswish_first(a: Tensor, _: Activation) -> Tensor:
    return torch.where(a <= -3, 0.0, torch.where(a < 3, a / 3 + 0.5, 1.0))


def _outside(a: Tensor, s: Activation) -> Tensor:
    """1 where a is not in [-p, p], a NaN included."""
    return (~((a >= -s.p) & (a <= s.p))).to(a.dtype)


def _tanhshrink_second(a: Tensor, s: Activation) -> Tensor:
    return -_tanh_second(a, s)


def _erf_first(a: Tensor, _: Activation) -> Tensor:
    return TWO_OVER_SQRT_PI * torch.exp(-a * a)


def _by_first(g: Tensor, a: Tensor, s: Activation) -> Tensor:
    return s.first(a).mul_(g)


_aten = torch.ops.aten

# What every kernel knows. The order is the code they switch on: append to the table, never reorder.
_COMPILED: dict[str, Spelling] = {
    "identity": Spelling(
        lambda a, s: a, lambda a, s: torch.ones_like(a), _zero, lambda g, a, s: g, True
    ),
    "relu": Spelling(
        lambda a, s: F.relu(a),
        lambda a, s: _step(a, 0.0, 1.0),
        _zero,
        lambda g, a, s: _aten.threshold_backward.default(g, a, 0),
        True,
    ),
    "leaky_relu": Spelling(
        lambda a, s: F.leaky_relu(a, s.p),
        lambda a, s: _step(a, s.p, 1.0),
        _zero,
        lambda g, a, s: _aten.leaky_relu_backward.default(g, a, s.p, False),
        True,
    ),
    "hardtanh": Spelling(
        lambda a, s: F.hardtanh(a, s.p, s.q),
        lambda a, s: ((a > s.p) & (a < s.q)).to(a.dtype),
        _zero,
        lambda g, a, s: _aten.hardtanh_backward.default(g, a, s.p, s.q),
        True,
    ),
    "elu": Spelling(
        _elu,
        lambda a, s: torch.where(a > 0, s.p, _elu_tail(a, s, 1)),
        lambda a, s: torch.where(a > 0, 0.0, _elu_tail(a, s, 2)),
        lambda g, a, s: _aten.elu_backward.default(g, s.q, s.p, s.r, False, a),
    ),
    "gelu": Spelling(
        lambda a, s: F.gelu(a),
        _gelu_first,
        lambda a, s: _phi(a) * (2 - a * a),
        lambda g, a, s: _aten.gelu_backward.default(g, a),
    ),
    "gelu_tanh": Spelling(
        lambda a, s: F.gelu(a, approximate="tanh"),
        _gelu_tanh_first,
        _gelu_tanh_second,
        lambda g, a, s: _aten.gelu_backward.default(g, a, approximate="tanh"),
    ),
    "silu": Spelling(
        lambda a, s: F.silu(a),
        _silu_first,
        _silu_second,
        lambda g, a, s: _aten.silu_backward.default(g, a),
    ),
    "mish": Spelling(
        lambda a, s: F.mish(a),
        _mish_first,
        _mish_second,
        lambda g, a, s: _aten.mish_backward.default(g, a),
    ),
    "softplus": Spelling(
        lambda a, s: F.softplus(a, s.p, s.q),
        _softplus_first,
        _softplus_second,
        lambda g, a, s: _aten.softplus_backward.default(g, a, s.p, s.q),
    ),
    "softsign": Spelling(lambda a, s: F.softsign(a), _softsign_first, _softsign_second, _by_first),
    "tanh": Spelling(
        lambda a, s: torch.tanh(a),
        _tanh_first,
        _tanh_second,
        lambda g, a, s: _aten.tanh_backward.default(g, torch.tanh(a)),
    ),
    "sigmoid": Spelling(
        lambda a, s: torch.sigmoid(a),
        _sigmoid_first,
        _sigmoid_second,
        lambda g, a, s: _aten.sigmoid_backward.default(g, torch.sigmoid(a)),
    ),
    "logsigmoid": Spelling(
        lambda a, s: F.logsigmoid(a),
        lambda a, s: torch.sigmoid(-a),
        _logsigmoid_second,
        _by_first,
    ),
}
KINDS: tuple[str, ...] = tuple(_COMPILED)

# What Triton's kernels of programs know, and those of whole networks do not.
_OTHERS: dict[str, Spelling] = {
    # PyTorch's own has no second derivative, and 1/6 in float32 whatever the dtype.
    "hardsigmoid": Spelling(
        lambda a, s: F.hardtanh(a, -3, 3) / 6 + 0.5,
        lambda a, s: ((a > -3) & (a < 3)).to(a.dtype) / 6,
        _zero,
        _by_first,
        True,
    ),
    "hardswish": Spelling(
        lambda a, s: F.hardswish(a),
        _hardswish_first,
        lambda a, s: ((a > -3) & (a < 3)).to(a.dtype) / 3,
        lambda g, a, s: _aten.hardswish_backward.default(g, a),
    ),
    "softshrink": Spelling(
        lambda a, s: F.softshrink(a, s.p),
        _outside,
        _zero,
        lambda g, a, s: _aten.softshrink_backward.default(g, a, s.p),
        True,
    ),
    "hardshrink": Spelling(
        lambda a, s: F.hardshrink(a, s.p),
        _outside,
        _zero,
        lambda g, a, s: _aten.hardshrink_backward.default(g, a, s.p),
        True,
    ),
    "threshold": Spelling(
        lambda a, s: F.threshold(a, s.p, s.q),
        lambda a, s: (~(a <= s.p)).to(a.dtype),
        _zero,
        lambda g, a, s: _aten.threshold_backward.default(g, a, s.p),
        True,
    ),
    "clamp": Spelling(
        lambda a, s: a.clamp(s.p, s.q),
        lambda a, s: ((a >= s.p) & (a <= s.q)).to(a.dtype),
        _zero,
        _by_first,
        True,
    ),
    "tanhshrink": Spelling(
        lambda a, s: F.tanhshrink(a),
        lambda a, s: torch.tanh(a).square(),
        _tanhshrink_second,
        _by_first,
    ),
    "abs": Spelling(lambda a, s: torch.abs(a), lambda a, s: torch.sign(a), _zero, _by_first, True),
    "square": Spelling(
        lambda a, s: torch.square(a),
        lambda a, s: 2 * a,
        lambda a, s: torch.full_like(a, 2),
        _by_first,
    ),
    "sqrt": Spelling(
        lambda a, s: torch.sqrt(a),
        lambda a, s: 0.5 * torch.rsqrt(a),
        lambda a, s: -0.25 * torch.rsqrt(a) / a,
        _by_first,
    ),
    "exp": Spelling(
        lambda a, s: torch.exp(a), lambda a, s: torch.exp(a), lambda a, s: torch.exp(a), _by_first
    ),
    "log": Spelling(
        lambda a, s: torch.log(a),
        lambda a, s: 1 / a,
        lambda a, s: -1 / a.square(),
        lambda g, a, s: g / a,
    ),
    "reciprocal": Spelling(
        lambda a, s: 1 / a, lambda a, s: -1 / a.square(), lambda a, s: 2 / a**3, _by_first
    ),
    "sin": Spelling(
        lambda a, s: torch.sin(a),
        lambda a, s: torch.cos(a),
        lambda a, s: -torch.sin(a),
        _by_first,
    ),
    "cos": Spelling(
        lambda a, s: torch.cos(a),
        lambda a, s: -torch.sin(a),
        lambda a, s: -torch.cos(a),
        _by_first,
    ),
    "erf": Spelling(
        lambda a, s: torch.erf(a),
        _erf_first,
        lambda a, s: -2 * a * _erf_first(a, s),
        _by_first,
    ),
}
ACTIVATIONS: dict[str, Spelling] = _COMPILED | _OTHERS
IDENTITY = Activation("identity")

# PyTorch's modules, by exact type: a subclass may compute anything.
_MODULES: dict[type[nn.Module], Callable[..., Activation]] = {
    nn.Identity: lambda m: IDENTITY,
    nn.ReLU: lambda m: Activation("relu"),
    nn.LeakyReLU: lambda m: Activation("leaky_relu", float(m.negative_slope)),
    nn.ReLU6: lambda m: Activation("hardtanh", 0.0, 6.0),
    nn.Hardtanh: lambda m: Activation("hardtanh", float(m.min_val), float(m.max_val)),
    nn.ELU: lambda m: Activation("elu", 1.0, float(m.alpha), 1.0),
    nn.SELU: lambda m: Activation("elu", SELU_SCALE, SELU_ALPHA, 1.0),
    nn.CELU: lambda m: Activation("elu", 1.0, float(m.alpha), 1.0 / float(m.alpha)),
    nn.GELU: lambda m: Activation("gelu" if m.approximate == "none" else "gelu_tanh"),
    nn.SiLU: lambda m: Activation("silu"),
    nn.Mish: lambda m: Activation("mish"),
    nn.Softplus: lambda m: Activation("softplus", float(m.beta), float(m.threshold)),
    nn.Softsign: lambda m: Activation("softsign"),
    nn.Tanh: lambda m: Activation("tanh"),
    nn.Sigmoid: lambda m: Activation("sigmoid"),
    nn.LogSigmoid: lambda m: Activation("logsigmoid"),
    nn.Hardsigmoid: lambda m: Activation("hardsigmoid"),
    nn.Hardswish: lambda m: Activation("hardswish"),
    nn.Softshrink: lambda m: Activation("softshrink", float(m.lambd)),
    nn.Hardshrink: lambda m: Activation("hardshrink", float(m.lambd)),
    nn.Threshold: lambda m: Activation("threshold", float(m.threshold), float(m.value)),
    nn.Tanhshrink: lambda m: Activation("tanhshrink"),
}


def of_module(module: nn.Module) -> Activation | None:
    """The table's entry for a PyTorch activation module, or None if it has none."""
    read = _MODULES.get(type(module))
    return None if read is None else read(module)
