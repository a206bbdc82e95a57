"""The range of σ, σ' and σ'' of every kind of the activation table over an interval.

A function that is monotone between its turning points takes its extremes over an interval at the
interval's ends or at a turning point inside. So each kind is written down as three curves, each a
formula and its turning points, and the range is as tight as rounding allows.

**Sound in floating point.** The formulas are evaluated by PyTorch's functions, each of which is
trusted to a few units in the last place (their vector libraries promise 1 or 2; the tests measure
the formulas against arbitrary precision), and are written such that nothing cancels but what the
error term counts. Constants are rounded, which the same term covers.

**At a kink** the slope is both of its one-sided limits and all between them, and the curvature
reaches to infinity; where the value itself jumps (hardshrink, threshold, reciprocal at 0) so does
the slope. With that, the mean-value theorem holds along every line through the interval.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .activations import (
    GELU_CUBIC,
    INV_SQRT_2PI,
    SQRT_2_OVER_PI,
    SQRT_HALF,
    TWO_OVER_SQRT_PI,
    Activation,
)

__all__ = ["Curve", "Curves", "Turn", "bounds", "curves", "described", "hull"]

INF = math.inf
NOISE = 16.0  # what a formula may be off by, in epsilons of the size of its terms
FAR = 1000.0  # beyond it a tail is below the smallest number, and what it decays to is exact
SMOOTH = 20.0  # PyTorch's own threshold: from there on a softplus is within 2.1e-9 of a line

Formula = Callable[[Tensor], Tensor]


class Turn(NamedTuple):
    """A place that contributes to the range of the intervals around it, all in [low, high]: a local
    extreme (``low`` inf where it is a maximum, ``high`` -inf where a minimum) or the one-sided
    limits at a jump."""

    place: float
    low: float
    high: float


class Curve(NamedTuple):
    """f = σ, σ' or σ'' of one activation, monotone between its turns.

    The formula is within epsilon·(``relative``·|f| + ``absolute``) of f, and what PyTorch computes
    in its place within ``slack`` of that. With a ``period``, the turns are there again after it.
    """

    formula: Formula
    turns: tuple[Turn, ...] = ()
    relative: float = NOISE
    absolute: float = 0.0
    slack: float = 0.0
    period: float = 0.0


Curves = tuple[Curve, Curve, Curve]

# Bounds of |σ'''| and of |σ''''|, for those σ of which both are known everywhere.
THIRD = {
    "erf": (2.257, 4.405),
    "gelu": (0.779, 1.596),
    "gelu_tanh": (0.777, 1.604),
    "logsigmoid": (0.0963, 0.1251),
    "mish": (0.589, 1.102),
    "sigmoid": (0.1251, 0.1277),
    "silu": (0.309, 0.501),
    "tanh": (2.001, 4.087),
    "tanhshrink": (2.001, 4.087),
}


def bounds(σ: Activation, order: int, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
    """Two tensors between which σ (order 0), σ' (1) or σ'' (2) lies on [lower, upper].

    Args:
        σ: an activation of the table.
        order: 0, 1 or 2.
        lower, upper: float32 or float64, of one shape; may be infinite, or equal.

    Returns:
        The lower and the upper bound, of that shape and dtype: infinite where σ's are, NaN where an
        end is NaN or the interval is none, or where σ is not defined on all of it. A gradient flows
        to the end at which a bound is attained, and none from a turning point inside.
    """
    return hull(curves(σ)[order], lower, upper)


def curves(σ: Activation) -> Curves:
    """σ, σ' and σ'' as curves."""
    return _CURVES[σ.kind](*σ[1:])


known_curves = lru_cache(maxsize=1024)(curves)


def hull(f: Curve, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
    """The bounds of f on [lower, upper], as ``bounds`` gives them."""
    info = torch.finfo(lower.dtype)
    ends = f.formula(torch.stack((lower, upper)))
    low, high = ends.amin(0), ends.amax(0)
    for turn in f.turns:
        inside = _inside(turn.place, f.period, lower, upper, 4 * info.eps)
        if turn.low < INF:
            low = torch.where(inside, low.clamp(max=turn.low), low)
        if turn.high > -INF:
            high = torch.where(inside, high.clamp(min=turn.high), high)
    if f.relative:
        # Past the largest number a lower bound is that number, and what underflowed is not 0.
        low = (low - _error(f, low, info)).clamp(max=info.max)
        high = (high + _error(f, high, info)).clamp(min=-info.max)
    none = ~(lower <= upper)
    return low.masked_fill(none, math.nan), high.masked_fill(none, math.nan)


@lru_cache(maxsize=1024)
def described(σ: Activation, orders: int = 2) -> tuple[float, ...]:
    """What the native library has to know of σ, of σ' and, with three orders, of σ'': of each its
    limits at -∞ and ∞, its relative error in epsilons and its absolute one, its period, how many
    turns it has, and of each turn the place and what it contributes.

    The errors are those of the native kernel's own formulas in float64, which ``tests/test_cpu.py``
    holds within 4 units in the last place, the unit that of a number of 1/4 at least.
    """
    info = torch.finfo(torch.float64)
    ends = torch.tensor([-INF, INF], dtype=torch.float64)
    floor = max(1.0, abs(σ.p * σ.q), abs(σ.p * σ.q * σ.r)) if σ.kind == "elu" else 1.0
    numbers: list[float] = []
    for curve in curves(σ)[:orders]:
        absolute = info.eps * (curve.absolute + NOISE * floor) + curve.slack + 4 * FAR * info.tiny
        errors = (curve.relative, absolute) if curve.relative else (0.0, 0.0)
        numbers += (*curve.formula(ends).tolist(), *errors, curve.period, len(curve.turns))
        numbers += (number for turn in curve.turns for number in turn)
    return tuple(numbers)


def _inside(place: float, period: float, lower: Tensor, upper: Tensor, ε: float) -> Tensor:
    """Whether the place, which is rounded, lies in the interval."""
    if not period:
        near = ε * abs(place)
        return (lower <= place + near) & (upper >= place - near)
    first, last = ((end.detach() - place) / period for end in (lower, upper))
    rounded = ε * (1 + torch.maximum(first.abs(), last.abs()))
    # NaN where an end is infinite: then there is one inside.
    return ~((first - rounded).ceil() > (last + rounded).floor())


def _error(f: Curve, value: Tensor, info: torch.finfo) -> Tensor:
    size = f.relative * value.detach().abs().clamp(max=info.max / f.relative) + f.absolute
    return info.eps * size + (f.slack + 4 * FAR * info.tiny)


# --- the curves ----------------------------------------------------------------------------------
# Letters: s = sigmoid(a), z = 1 - s = sigmoid(-a). ``_far`` keeps inf·0 out of tails.


def _least(place: float, value: float) -> Turn:
    return Turn(place, value, -INF)


def _most(place: float, value: float) -> Turn:
    return Turn(place, INF, value)


def _between(place: float, *limits: float) -> Turn:
    return Turn(place, min(limits), max(limits))


def _bend(place: float, left: float, right: float, *curvatures: float) -> Turn:
    """σ'' at a kink from slope ``left`` to slope ``right``."""
    if math.isclose(left, right, rel_tol=1e-12):
        return _between(place, *curvatures)
    return _between(place, *curvatures, math.copysign(INF, right - left))


def _bounded(formula: Formula, *turns: Turn) -> Curve:
    """A formula of which the terms are of the size of 1 at most."""
    return Curve(formula, turns, absolute=NOISE)


def _exact(formula: Formula, *turns: Turn) -> Curve:
    return Curve(formula, turns, relative=0.0)


def _constant(value: float, *turns: Turn) -> Curve:
    return Curve(lambda a: torch.full_like(a, value), turns)


def _piecewise_linear(value: Curve, slope: Curve, *kinks: tuple[float, float, float]) -> Curves:
    """Of kinks (place, slope on the left, slope on the right)."""
    return (
        value,
        slope._replace(turns=tuple([_between(*kink) for kink in kinks])),
        _exact(torch.zeros_like, *(_bend(*kink, 0.0) for kink in kinks)),
    )


def _far(a: Tensor) -> Tensor:
    return a.clamp(-FAR, FAR)


def _sz(a: Tensor) -> Tensor:
    """sigmoid'(a), of full relative accuracy in both tails."""
    return torch.sigmoid(a) * torch.sigmoid(-a)


def _tail(weight: Formula) -> Formula:
    """a·weight(a) for a weight that goes to 0 as a falls and to 1 as it rises."""

    def formula(a: Tensor) -> Tensor:
        a = a.clamp(min=-FAR)
        return a * weight(a.clamp(max=FAR))

    return formula


def _identity(*_: float) -> Curves:
    return _exact(lambda a: a), _exact(torch.ones_like), _exact(torch.zeros_like)


def _relu(*_: float) -> Curves:
    return _piecewise_linear(_exact(torch.relu), _step(lambda a: a > 0), (0.0, 0.0, 1.0))


def _step(condition: Formula, high: float = 1.0, low: float = 0.0) -> Curve:
    exact = high == int(high) and low == int(low)
    return Curve(
        lambda a: torch.where(condition(a), high, torch.full_like(a, low)),
        relative=0.0 if exact else NOISE,
    )


def _leaky_relu(p: float, *_: float) -> Curves:
    value = Curve(lambda a: torch.where(a > 0, a, p * a), (_between(0.0, 0.0),))
    return _piecewise_linear(value, _step(lambda a: a > 0, low=p), (0.0, p, 1.0))


def _clamp(p: float, q: float, _: float) -> Curves:
    slope = _step(lambda a: (a > p) & (a < q))
    return _piecewise_linear(Curve(lambda a: a.clamp(p, q)), slope, (p, 0.0, 1.0), (q, 1.0, 0.0))


def _hardsigmoid(*_: float) -> Curves:
    return _piecewise_linear(
        Curve(lambda a: a.clamp(-3, 3) / 6 + 0.5, absolute=NOISE),
        _step(lambda a: (a > -3) & (a < 3), high=1 / 6),
        (-3.0, 0.0, 1 / 6),
        (3.0, 1 / 6, 0.0),
    )


def _hardswish(*_: float) -> Curves:
    def first(a: Tensor) -> Tensor:
        return torch.where(a <= -3, 0.0, torch.where(a < 3, a / 3 + 0.5, 1.0))

    def value(a: Tensor) -> Tensor:
        a = a.clamp(min=-3)
        return a * (a.clamp(max=3) / 6 + 0.5)

    middle = _step(lambda a: (a > -3) & (a < 3), high=1 / 3)
    bends = _bend(-3.0, 0.0, -0.5, 0.0, 1 / 3), _bend(3.0, 1.5, 1.0, 0.0, 1 / 3)
    return (
        _bounded(value, _least(-1.5, -0.375)),
        _bounded(first, _between(-3.0, -0.5, 0.0), _between(3.0, 1.0, 1.5)),
        middle._replace(turns=bends),
    )


def _softshrink(p: float, *_: float) -> Curves:
    return _piecewise_linear(
        Curve(lambda a: a - a.clamp(-p, p), absolute=NOISE * p),
        _step(lambda a: a.abs() > p),
        (-p, 1.0, 0.0),
        (p, 0.0, 1.0),
    )


def _hardshrink(p: float, *_: float) -> Curves:
    return (
        _exact(
            lambda a: torch.where(a.abs() > p, a, 0.0),
            _between(-p, -p, 0.0),
            _between(p, 0.0, p),
        )._replace(relative=NOISE),
        _step(lambda a: a.abs() > p)._replace(turns=(_between(-p, 0, INF), _between(p, 0, INF))),
        _exact(torch.zeros_like, _between(-p, -INF, INF), _between(p, -INF, INF)),
    )


def _threshold(p: float, q: float, _: float) -> Curves:
    jump = 1.0 if p == q else math.copysign(INF, p - q)
    bend = _bend(p, 0.0, 1.0, 0.0) if p == q else _between(p, -INF, INF)
    return (
        Curve(lambda a: torch.where(a > p, a, q), (_between(p, p, q),)),
        _step(lambda a: a > p)._replace(turns=(_between(p, 0.0, 1.0, jump),)),
        _exact(torch.zeros_like, bend),
    )


def _abs(*_: float) -> Curves:
    slope = _step(lambda a: a > 0, low=-1.0)
    return _piecewise_linear(_exact(torch.abs, _least(0.0, 0.0)), slope, (0.0, -1.0, 1.0))


def _elu(p: float, q: float, r: float) -> Curves:
    def tail(a: Tensor) -> Tensor:
        return torch.exp(r * a.clamp(max=0))

    left = p * q * r
    return (
        Curve(
            lambda a: torch.where(a > 0, p * a, p * q * torch.expm1(r * a.clamp(max=0))),
            (_between(0.0, 0.0),),
        ),
        Curve(
            lambda a: torch.where(a > 0, p, left * tail(a)),
            (_between(0.0, left, p),),
            absolute=NOISE * abs(left),
        ),
        Curve(
            lambda a: torch.where(a > 0, 0.0, left * r * tail(a)),
            (_bend(0.0, left, p, 0.0, left * r),),
            absolute=NOISE * abs(left * r),
        ),
    )


def _φ(a: Tensor) -> Tensor:
    return INV_SQRT_2PI * torch.exp(-0.5 * a * a)


def _Φ(a: Tensor) -> Tensor:
    return 0.5 * torch.erfc(-SQRT_HALF * a)


def _gelu(*_: float) -> Curves:
    def first(a: Tensor) -> Tensor:
        a = _far(a)
        return _Φ(a) + a * _φ(a)

    def second(a: Tensor) -> Tensor:
        a = _far(a)
        return _φ(a) * (2 - a * a)

    bottom = -0.10798193302637610  # -2·φ(2)
    return (
        _bounded(_tail(_Φ), _least(-0.75179152469356446, -0.16997120747990366)),
        _bounded(
            first,
            _least(-1.4142135623730950, -0.12890414518515479),
            _most(1.4142135623730950, 1.1289041451851548),
        ),
        _bounded(
            second,
            _least(-2.0, bottom),
            _most(0.0, 0.79788456080286536),
            _least(2.0, bottom),
        ),
    )


def _gelu_tanh(*_: float) -> Curves:
    def inner(a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """w, w' and w'' of σ = a·sigmoid(w)."""
        c, k = 2 * SQRT_2_OVER_PI, GELU_CUBIC
        return c * a * (1 + k * a * a), c * (1 + 3 * k * a * a), 6 * c * k * a

    def first(a: Tensor) -> Tensor:
        a = _far(a)
        w, w1, _ = inner(a)
        return torch.sigmoid(w) + a * _sz(w) * w1

    def second(a: Tensor) -> Tensor:
        a = _far(a)
        w, w1, w2 = inner(a)
        return _sz(w) * (2 * w1 + a * (w2 + torch.tanh(-0.5 * w) * w1 * w1))

    bottom = -0.10791351589036792
    return (
        _bounded(
            _tail(lambda a: torch.sigmoid(inner(a)[0])),
            _least(-0.75246142207101626, -0.17004075057125405),
        ),
        _bounded(
            first,
            _least(-1.4185040087908284, -0.12899306865877177),
            _most(1.4185040087908284, 1.1289930686587718),
        ),
        _bounded(
            second,
            _least(-2.0134807246242579, bottom),
            _most(0.0, 0.79788456080286536),
            _least(2.0134807246242579, bottom),
        ),
    )


def _silu(*_: float) -> Curves:
    def first(a: Tensor) -> Tensor:
        a = _far(a)
        return torch.sigmoid(a) + a * _sz(a)

    def second(a: Tensor) -> Tensor:
        a = _far(a)
        return _sz(a) * (2 - a * torch.tanh(0.5 * a))

    bottom = -0.036914373199893186
    return (
        Curve(_tail(torch.sigmoid), (_least(-1.2784645427610738, -0.27846454276107380),)),
        _bounded(
            first,
            _least(-2.3993572805154677, -0.099839320128866917),
            _most(2.3993572805154677, 1.0998393201288669),
        ),
        _bounded(
            second,
            _least(-3.4358409935351107, bottom),
            _most(0.0, 0.5),
            _least(3.4358409935351107, bottom),
        ),
    )


def _mish(*_: float) -> Curves:
    def softplus(a: Tensor) -> Tensor:
        return -F.logsigmoid(-a)

    def first(a: Tensor) -> Tensor:
        a = _far(a)
        m = softplus(a)
        return torch.tanh(m) + a * torch.sigmoid(a) * 4 * _sz(2 * m)

    def second(a: Tensor) -> Tensor:
        a = _far(a)
        m, s = softplus(a), torch.sigmoid(a)
        bent = 2 + a * (torch.sigmoid(-a) - 2 * torch.tanh(m) * s)
        return 4 * _sz(2 * m) * s * bent

    return (
        Curve(
            _tail(lambda a: torch.tanh(softplus(a))),
            (_least(-1.1924312145154952, -0.30884341301725041),),
        ),
        _bounded(
            first,
            _least(-2.2563763763607931, -0.11252612238944256),
            _most(1.4905711794854285, 1.0884981612517279),
        ),
        _bounded(
            second,
            _least(-3.2673378465204046, -0.041732070706611025),
            _most(-0.087934431314914211, 0.64420463723697243),
            _least(2.1148425630208771, -0.059033356953936293),
        ),
    )


def _softplus(p: float, q: float, _: float) -> Curves:
    """log(1 + exp(p·a)) / p; PyTorch's is a line from p·a = q on, with a jump that is no jump where
    it is that of rounding, or 2.1e-9."""
    rest = math.exp(min(-q, 700.0))
    jumps = q < SMOOTH
    place = q / p
    top = _most(0.0, p / 4) if p > 0 else _least(0.0, p / 4)
    return (
        Curve(
            lambda a: F.logsigmoid(-p * a) / -p,
            (_between(place, place),) if jumps else (),
            absolute=NOISE / abs(p),
            slack=rest / abs(p),
        ),
        Curve(
            lambda a: torch.sigmoid(p * a),
            (Turn(place, -INF, INF),) if jumps else (),
            absolute=NOISE,
            slack=rest,
        ),
        Curve(
            lambda a: p * _sz(p * a),
            (top, Turn(place, -INF, INF)) if jumps else (top,),
            absolute=NOISE * abs(p),
            slack=abs(p) * min(rest, 0.25),
        ),
    )


def _softsign(*_: float) -> Curves:
    def reciprocal(a: Tensor) -> Tensor:
        return (1 + a.abs()).reciprocal()

    def value(a: Tensor) -> Tensor:
        a = a.clamp(-1e30, 1e30)
        return a * reciprocal(a)

    def first(a: Tensor) -> Tensor:
        r = reciprocal(a)
        return r * r

    def second(a: Tensor) -> Tensor:
        r = reciprocal(a)
        return -2 * torch.sign(a) * r * r * r

    return (
        Curve(value),
        Curve(first, (_most(0.0, 1.0),)),
        Curve(second, (_between(0.0, -2.0, 2.0),)),
    )


def _tanh(*_: float) -> Curves:
    steepest = 0.65847894846240835, 0.76980035891950102
    return (
        Curve(torch.tanh),
        Curve(_tanh_first, (_most(0.0, 1.0),)),
        Curve(
            lambda a: -2 * torch.tanh(a) * _tanh_first(a),
            (_most(-steepest[0], steepest[1]), _least(steepest[0], -steepest[1])),
        ),
    )


def _tanh_first(a: Tensor) -> Tensor:
    return 4 * _sz(2 * a)


def _tanhshrink(*_: float) -> Curves:
    tanh = _tanh()
    second = Curve(
        lambda a: 2 * torch.tanh(a) * _tanh_first(a),
        tuple([Turn(-t.place, t.low, t.high) for t in tanh[2].turns]),
    )
    return (
        _bounded(lambda a: a - torch.tanh(a)),
        Curve(lambda a: torch.tanh(a).square(), (_least(0.0, 0.0),)),
        second,
    )


def _sigmoid(*_: float) -> Curves:
    steepest = 1.3169578969248167, 0.096225044864937627
    return (
        Curve(torch.sigmoid),
        Curve(_sz, (_most(0.0, 0.25),)),
        Curve(
            lambda a: -_sz(a) * torch.tanh(0.5 * a),
            (_most(-steepest[0], steepest[1]), _least(steepest[0], -steepest[1])),
        ),
    )


def _logsigmoid(*_: float) -> Curves:
    return (
        Curve(F.logsigmoid),
        Curve(lambda a: torch.sigmoid(-a)),
        Curve(lambda a: -_sz(a), (_least(0.0, -0.25),)),
    )


def _square(*_: float) -> Curves:
    return Curve(torch.square, (_least(0.0, 0.0),)), Curve(lambda a: 2 * a), _constant(2.0)


def _sqrt(*_: float) -> Curves:
    return (
        Curve(torch.sqrt),
        Curve(lambda a: 0.5 * torch.rsqrt(a)),
        Curve(lambda a: -0.25 * torch.rsqrt(a) / a),
    )


def _exp(*_: float) -> Curves:
    return Curve(torch.exp), Curve(torch.exp), Curve(torch.exp)


def _log(*_: float) -> Curves:
    return (
        Curve(torch.log),
        Curve(torch.reciprocal),
        Curve(lambda a: -torch.reciprocal(a).square()),
    )


def _reciprocal(*_: float) -> Curves:
    pole = (Turn(0.0, -INF, INF),)
    return (
        Curve(torch.reciprocal, pole),
        Curve(lambda a: -torch.reciprocal(a).square(), pole),
        Curve(lambda a: 2 * torch.reciprocal(a) ** 3, pole),
    )


def _wave(phase: int) -> Curve:
    """sin(a + phase·π/2)."""
    formula = (torch.sin, torch.cos, lambda a: -torch.sin(a), lambda a: -torch.cos(a))[phase % 4]
    return Curve(
        lambda a: formula(a.masked_fill(a.isinf(), 0.0)),
        (_most((1 - phase) * math.pi / 2, 1.0), _least((3 - phase) * math.pi / 2, -1.0)),
        absolute=NOISE,
        period=2 * math.pi,
    )


def _sin(*_: float) -> Curves:
    return _wave(0), _wave(1), _wave(2)


def _cos(*_: float) -> Curves:
    return _wave(1), _wave(2), _wave(3)


def _erf(*_: float) -> Curves:
    def first(a: Tensor) -> Tensor:
        a = _far(a)
        return TWO_OVER_SQRT_PI * torch.exp(-a * a)

    steepest = 0.70710678118654752, 0.96788289807657340
    return (
        Curve(torch.erf),
        _bounded(first, _most(0.0, TWO_OVER_SQRT_PI)),
        _bounded(
            lambda a: -2 * _far(a) * first(a),
            _most(-steepest[0], steepest[1]),
            _least(steepest[0], -steepest[1]),
        ),
    )


_CURVES: dict[str, Callable[[float, float, float], Curves]] = {
    "identity": _identity,
    "relu": _relu,
    "leaky_relu": _leaky_relu,
    "hardtanh": _clamp,
    "elu": _elu,
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "silu": _silu,
    "mish": _mish,
    "softplus": _softplus,
    "softsign": _softsign,
    "tanh": _tanh,
    "sigmoid": _sigmoid,
    "logsigmoid": _logsigmoid,
    "hardsigmoid": _hardsigmoid,
    "hardswish": _hardswish,
    "softshrink": _softshrink,
    "hardshrink": _hardshrink,
    "threshold": _threshold,
    "clamp": _clamp,
    "tanhshrink": _tanhshrink,
    "abs": _abs,
    "square": _square,
    "sqrt": _sqrt,
    "exp": _exp,
    "log": _log,
    "reciprocal": _reciprocal,
    "sin": _sin,
    "cos": _cos,
    "erf": _erf,
}
