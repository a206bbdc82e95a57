"""Ranges of a program over boxes: of every value, and of the slopes of y.

A box is one interval for each column of x. The table here says of each kind of node (``nodes.py``)
what its value lies in, given what its inputs lie in, and how an interval of tangents is pushed
through it. All are sound in floating point and differentiable in the parameters.

Tangents and not cotangents: σ' is known better in the first layers, whose inputs are the box, than
in the last ones, and an interval that is multiplied early is widened by every layer that follows.
Pulled from the outputs, intervals came out as wide or wider in every network tried: 1.5 times for
SiLU with two hidden layers and a small box, 20 times for tanh with three.

Where exact arithmetic would give an end, the tensor holds a number outwards of it: a product with W
(n columns) is taken of centre and radius, the radius growing by γ(|W||c| + |W|r) with γ = (n + 8)ε,
twice the γ_n of Higham, "Accuracy and Stability of Numerical Algorithms" (2002), section 3.1, for
sums in any order, with or without fused multiply-add. What overflows becomes infinite or NaN, which
bounds nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .activations import ACTIVATIONS, Activation
from .nodes import columns_of
from .program import Node
from .ranges import curves, hull
from .symbols import Param

__all__ = ["Interval", "jacobian", "without_range"]


class Interval(NamedTuple):
    """All between ``lower`` and ``upper`` (..., H), which are ±inf only where not ``finite``."""

    lower: Tensor
    upper: Tensor
    finite: bool = True


Intervals = Sequence[Interval]
ENDS = -math.inf, math.inf
Maybe = Sequence[Interval | None]


class Rule:
    """What a kind of node makes of intervals; leading axes broadcast, as in ``nodes.py``."""

    def value(self, node: Node, u: Intervals, θ: Sequence[Param]) -> Interval:
        raise NotImplementedError

    def push(self, node: Node, u: Intervals, v: Interval, t: Maybe, θ: Sequence[Param]) -> Interval:
        raise NotImplementedError


# --- arithmetic ----------------------------------------------------------------------------------


def _outward(lower: Tensor, upper: Tensor, finite: bool = True, ε: float = 2) -> Interval:
    """Ends that were rounded, each by ``ε`` epsilons at most."""
    info = torch.finfo(lower.dtype)
    low, high = lower.detach(), upper.detach()
    return Interval(
        lower - (ε * info.eps * low.abs() + info.tiny),
        upper + (ε * info.eps * high.abs() + info.tiny),
        finite,
    )


def _each(a: Interval, f: Callable[[Tensor], Tensor]) -> Interval:
    """f of both ends, for f that rises."""
    return Interval(f(a.lower), f(a.upper), a.finite)


def _known(t: Param) -> Tensor:
    assert isinstance(t, Tensor)
    return t


def _exactly(t: Tensor) -> Interval:
    return Interval(t, t)


def _add(a: Interval, b: Interval) -> Interval:
    return _outward(a.lower + b.lower, a.upper + b.upper, a.finite and b.finite)


def _times(a: Interval, b: Interval) -> Interval:
    """The products of all in a with all in b."""
    finite = a.finite and b.finite
    corners = [_product(x, y, finite) for x in a[:2] for y in b[:2]]
    stacked = torch.stack(corners)
    return _outward(stacked.amin(0), stacked.amax(0), finite)


def _sloped(s: Interval, t: Interval) -> Interval:
    """Slopes in s times tangents in t by centre and radius: up to a tenth wider than the products'
    own range, but without a branch. ``csrc/intervals.h`` has the same: both give one bound."""
    middle, radius = 0.5 * s.lower + 0.5 * s.upper, 0.5 * s.upper - 0.5 * s.lower
    c, r = 0.5 * t.lower + 0.5 * t.upper, 0.5 * t.upper - 0.5 * t.lower
    centre, spread = middle * c, c.abs() * radius + r * (middle.abs() + radius)
    info = torch.finfo(centre.dtype)
    size = centre.detach().abs() + spread.detach()
    spread = spread + (8 * info.eps * size + info.tiny)
    return Interval(centre - spread, centre + spread)


def _product(x: Tensor, y: Tensor, finite: bool) -> Tensor:
    if finite:
        return x * y
    # 0 times what is as large as you like is 0; and no gradient comes from what is infinite.
    x, y = torch.broadcast_tensors(x, y)
    infinite = x.isinf() | y.isinf()
    zero = infinite & ((x == 0) | (y == 0))
    product = x.masked_fill(infinite, 0) * y.masked_fill(infinite, 0)
    return torch.where(infinite, (x * y).detach().masked_fill(zero, 0), product)


def _still(a: Interval) -> Interval:
    """a without a gradient where it is infinite."""
    if a.finite:
        return a
    return _each(a, lambda end: torch.where(end.isinf(), end.detach(), end))


def _scaled(a: Interval, c: float) -> Interval:
    if c == 1:
        return a
    ends = c * a.lower, c * a.upper
    return _outward(*(ends if c > 0 else ends[::-1]), a.finite)


def _linear(a: Interval, W: Tensor, b: Tensor | None = None) -> Interval:
    """W u + b for all u in a: (..., n) to (..., m)."""
    info = torch.finfo(W.dtype)
    γ = (W.shape[-1] + 8) * info.eps
    lower, upper = _finite_part(a)
    c, r = 0.5 * lower + 0.5 * upper, 0.5 * upper - 0.5 * lower
    rounding = γ * (c.detach().abs() + r.detach()) + info.tiny
    centre = F.linear(c, W, b)
    radius = F.linear(r + rounding, W.abs())
    radius = radius + (γ * (radius.detach() + 2 * centre.detach().abs()) + info.tiny)
    low, high = centre - radius, centre + radius
    if not a.finite:
        # An infinite end of u counts where its weight is not zero.
        rising, falling = (W.detach().clamp(min=0), (-W.detach()).clamp(min=0))
        down, up = (
            (end.detach() == s * math.inf).to(W.dtype) for end, s in ((a.lower, -1), (a.upper, 1))
        )
        low = low - _infinite(down @ rising.mT + up @ falling.mT)
        high = high + _infinite(up @ rising.mT + down @ falling.mT)
    return Interval(low, high, a.finite)


def _infinite(weight: Tensor) -> Tensor:
    """Infinity where there is weight on it, to be added: what is NaN stays NaN."""
    return torch.zeros_like(weight).masked_fill(weight > 0, math.inf)


def _finite_part(a: Interval) -> tuple[Tensor, Tensor]:
    """The ends, in the place of an infinite one the other, or 0."""
    if a.finite:
        return a.lower, a.upper
    zero, (low, high) = torch.zeros_like(a.lower), (end.isinf() for end in a[:2])
    lower = torch.where(low, torch.where(high, zero, a.upper), a.lower)
    upper = torch.where(high, torch.where(low, zero, a.lower), a.upper)
    return lower, upper


def _total(a: Interval) -> Interval:
    """The sum over the columns."""
    return _linear(a, torch.ones(1, a.lower.shape[-1], dtype=a.lower.dtype, device=a.lower.device))


def _both(a: Interval, b: Interval) -> Interval:
    """What lies in a and in b."""
    return Interval(
        torch.maximum(a.lower, b.lower), torch.minimum(a.upper, b.upper), a.finite or b.finite
    )


def _sum(terms: Sequence[Interval]) -> Interval:
    total = terms[0]
    for term in terms[1:]:
        total = _add(total, term)
    return total


def _magnitude(a: Interval) -> Tensor:
    return torch.maximum(a.lower.abs(), a.upper.abs())


# --- the kinds -----------------------------------------------------------------------------------


class Linear(Rule):
    def value(self, node: Node, u: Intervals, θ: Sequence[Param]) -> Interval:
        b = θ[1]
        return _linear(u[0], _known(θ[0]), None if b is None else _known(b))

    def push(self, node: Node, u: Intervals, v: Interval, t: Maybe, θ: Sequence[Param]) -> Interval:
        return _linear(_moving(t[0]), _known(θ[0]))


def _moving(t: Interval | None) -> Interval:
    assert t is not None
    return t


class Diagonal(Rule):
    """v_j depends on u_j alone."""

    def slope(self, node: Node, u: Interval, θ: Sequence[Param]) -> Interval:
        raise NotImplementedError

    def push(self, node: Node, u: Intervals, v: Interval, t: Maybe, θ: Sequence[Param]) -> Interval:
        return _sloped(self.slope(node, u[0], θ), _moving(t[0]))


# Kinds whose value is finite wherever its input is known, or not.
_SATURATED = ("hardtanh", "softsign", "tanh", "sigmoid", "hardsigmoid", "sin", "cos")


class Elementwise(Diagonal):
    def value(self, node: Node, u: Intervals, θ: Sequence[Param]) -> Interval:
        finite = u[0].finite or node.kind in _SATURATED
        return Interval(*hull(curves(_σ(node))[0], *u[0][:2]), finite)

    def slope(self, node: Node, u: Interval, θ: Sequence[Param]) -> Interval:
        return Interval(*hull(curves(_σ(node))[1], u.lower, u.upper))


def _σ(node: Node) -> Activation:
    return Activation(node.kind, *node.numbers)


class PReLU(Diagonal):
    """max(u, 0) + θ∘min(u, 0)."""

    def value(self, node: Node, u: Intervals, θ: Sequence[Param]) -> Interval:
        lower, upper, finite = u[0]
        positive = Interval(torch.relu(lower), torch.relu(upper), finite)
        negative = Interval(lower.clamp(max=0), upper.clamp(max=0), finite)
        return _add(positive, _times(negative, _exactly(_known(θ[0]))))

    def slope(self, node: Node, u: Interval, θ: Sequence[Param]) -> Interval:
        lower, upper, _ = u
        s = _known(θ[0]).expand_as(lower)
        one = torch.ones_like(s)
        low, high = torch.minimum(s, one), torch.maximum(s, one)
        rises, falls = lower > 0, upper < 0
        low = torch.where(rises, one, torch.where(falls, s, low))
        high = torch.where(rises, one, torch.where(falls, s, high))
        known = lower <= upper
        return _each(Interval(low, high), lambda end: end.masked_fill(~known, math.nan))


class Scale(Diagonal):
    def value(self, node: Node, u: Intervals, θ: Sequence[Param]) -> Interval:
        return _times(u[0], _exactly(_known(θ[0]))._replace(finite=u[0].finite))

    def slope(self, node: Node, u: Interval, θ: Sequence[Param]) -> Interval:
        return _exactly(_known(θ[0]))


class Dropout(Diagonal):
    """θ∘u with a mask that is 0 or 1/(1 - p): all of what it can be, and all between."""

    def value(self, node: Node, u: Intervals, θ: Sequence[Param]) -> Interval:
        return _times(u[0], self.slope(node, u[0], θ)._replace(finite=u[0].finite))

    def slope(self, node: Node, u: Interval, θ: Sequence[Param]) -> Interval:
        p = node.numbers[0]
        kept = 0.0 if p == 1 else 1 / (1 - p)
        one = torch.ones_like(u.lower, requires_grad=False)
        return Interval(0 * one, (1 + 4 * torch.finfo(one.dtype).eps) * kept * one)


class Shift(Rule):
    def value(self, node: Node, u: Intervals, θ: Sequence[Param]) -> Interval:
        return _add(u[0], _exactly(_known(θ[0])))

    def push(self, node: Node, u: Intervals, v: Interval, t: Maybe, θ: Sequence[Param]) -> Interval:
        return _moving(t[0])


class Line(Rule):
    def value(self, node: Node, u: Intervals, θ: Sequence[Param]) -> Interval:
        p, q = node.numbers
        scaled = _scaled(u[0], p)
        return _outward(scaled.lower + q, scaled.upper + q, u[0].finite, 4) if q else scaled

    def push(self, node: Node, u: Intervals, v: Interval, t: Maybe, θ: Sequence[Param]) -> Interval:
        return _scaled(_moving(t[0]), node.numbers[0])


class Sum(Rule):
    def value(self, node: Node, u: Intervals, θ: Sequence[Param]) -> Interval:
        return _sum([_scaled(a, c) for a, c in zip(u, node.numbers, strict=True)])

    def push(self, node: Node, u: Intervals, v: Interval, t: Maybe, θ: Sequence[Param]) -> Interval:
        terms = zip(t, node.numbers, strict=True)
        return _sum([_scaled(a, c) for a, c in terms if a is not None])


class Product(Rule):
    def value(self, node: Node, u: Intervals, θ: Sequence[Param]) -> Interval:
        if node.inputs[0] == node.inputs[1]:
            square = hull(curves(Activation("square"))[0], *u[0][:2])
            return Interval(*square, u[0].finite)
        return _times(*u)

    def push(self, node: Node, u: Intervals, v: Interval, t: Maybe, θ: Sequence[Param]) -> Interval:
        pairs = zip(t, u[::-1], strict=True)
        return _sum([_times(other, own) for own, other in pairs if own is not None])


class Expand(Rule):
    def value(self, node: Node, u: Intervals, θ: Sequence[Param]) -> Interval:
        return self.push(node, u, u[0], u, θ)

    def push(self, node: Node, u: Intervals, v: Interval, t: Maybe, θ: Sequence[Param]) -> Interval:
        return _each(_moving(t[0]), lambda end: end.expand(*end.shape[:-1], node.width))


class Total(Rule):
    def value(self, node: Node, u: Intervals, θ: Sequence[Param]) -> Interval:
        return _total(u[0])

    def push(self, node: Node, u: Intervals, v: Interval, t: Maybe, θ: Sequence[Param]) -> Interval:
        return _total(_moving(t[0]))


class Concat(Rule):
    def value(self, node: Node, u: Intervals, θ: Sequence[Param]) -> Interval:
        lower, upper = (torch.cat(ends, -1) for ends in _ends(u))
        return Interval(lower, upper, all(a.finite for a in u))

    def push(self, node: Node, u: Intervals, v: Interval, t: Maybe, θ: Sequence[Param]) -> Interval:
        rows = torch.broadcast_shapes(*(a.lower.shape[:-1] for a in t if a is not None))
        parts = []
        for a, own in zip(t, u, strict=True):
            a = a or _exactly(own.lower.new_zeros(own.lower.shape[-1]))
            parts.append(_each(a, lambda end: end.expand(*rows, end.shape[-1])))
        lower, upper = (torch.cat(ends, -1) for ends in _ends(parts))
        return Interval(lower, upper)


def _ends(u: Intervals) -> tuple[list[Tensor], list[Tensor]]:
    return [a.lower for a in u], [a.upper for a in u]


class Columns(Rule):
    def value(self, node: Node, u: Intervals, θ: Sequence[Param]) -> Interval:
        return self.push(node, u, u[0], u, θ)

    def push(self, node: Node, u: Intervals, v: Interval, t: Maybe, θ: Sequence[Param]) -> Interval:
        return _each(_moving(t[0]), lambda end: end[..., columns_of(node)])


class Normalised(Rule):
    """x̂ = r·c(u), c(u) the centred u or u itself, r = 1/sqrt(mean c(u)² + ε).

    |x̂| is at most sqrt(H), and the mean of x̂∘b at most the norm of b over sqrt(H), whatever u is:
    both bounds are taken where they are better than those of the intervals.
    """

    def __init__(self, centres: bool) -> None:
        self.centres = centres

    def _centred(self, t: Interval) -> Interval:
        if not self.centres:
            return t
        H = t.lower.shape[-1]
        C = torch.eye(H, dtype=t.lower.dtype, device=t.lower.device) - 1 / H
        # 1/H is rounded.
        size = _magnitude(Interval(*_finite_part(t))).detach().amax(-1, keepdim=True)
        mean = 4 * torch.finfo(t.lower.dtype).eps * size
        centred = _linear(t, C)
        return Interval(centred.lower - mean, centred.upper + mean, t.finite)

    def _r(self, node: Node, u: Interval) -> Interval:
        c = _still(self._centred(u))
        square = Interval(*hull(curves(Activation("square"))[0], *c[:2]), u.finite)
        mean = _scaled(_total(square), 1 / u.lower.shape[-1])
        ε = node.numbers[0]
        low, high, _ = _outward(mean.lower.clamp(min=0) + ε, mean.upper + ε, u.finite, 4)
        return _outward(torch.rsqrt(high), torch.rsqrt(low.clamp(min=0)), True, 16)

    def value(self, node: Node, u: Intervals, θ: Sequence[Param]) -> Interval:
        most = math.sqrt(node.width) * (1 + 1e-6)
        v = _times(_still(self._centred(u[0])), self._r(node, u[0])._replace(finite=u[0].finite))
        return Interval(v.lower.clamp(min=-most), v.upper.clamp(max=most))

    def push(self, node: Node, u: Intervals, v: Interval, t: Maybe, θ: Sequence[Param]) -> Interval:
        r, b, H = self._r(node, u[0]), self._centred(_moving(t[0])), node.width
        along = _scaled(_total(_times(v, b)), 1 / H)
        info = torch.finfo(b.lower.dtype)
        square = _magnitude(b).square().sum(-1, keepdim=True) + H * info.tiny
        most = square.sqrt() * ((1 + (H + 32) * info.eps) / math.sqrt(H))
        along = _both(along, Interval(-most, most))
        return _times(r, _add(b, _scaled(_times(v, along), -1.0)))


class Softmax(Rule):
    def value(self, node: Node, u: Intervals, θ: Sequence[Param]) -> Interval:
        return _probabilities(u[0])

    def push(self, node: Node, u: Intervals, v: Interval, t: Maybe, θ: Sequence[Param]) -> Interval:
        a = _moving(t[0])
        return _times(v, _add(a, _scaled(_mean(v, a), -1.0)))


class LogSoftmax(Rule):
    def value(self, node: Node, u: Intervals, θ: Sequence[Param]) -> Interval:
        return _softmax(u[0], F.logsigmoid)._replace(finite=u[0].finite)

    def push(self, node: Node, u: Intervals, v: Interval, t: Maybe, θ: Sequence[Param]) -> Interval:
        a = _moving(t[0])
        return _add(a, _scaled(_mean(_probabilities(u[0]), a), -1.0))


def _mean(v: Interval, a: Interval) -> Interval:
    """Σ_j v_j a_j for weights v of sum 1."""
    hull = Interval(a.lower.amin(-1, keepdim=True), a.upper.amax(-1, keepdim=True))
    return _both(_total(_times(v, a)), hull)


def _probabilities(u: Interval) -> Interval:
    low, high, _ = _softmax(u, torch.sigmoid)
    return Interval(low.clamp(min=0), high.clamp(max=1))


def _softmax(u: Interval, f: Callable[[Tensor], Tensor]) -> Interval:
    """f(u_i - log Σ_{j≠i} exp(u_j)), which rises in u_i and falls in all others. With f the sigmoid
    that is the softmax."""
    H = u.lower.shape[-1]
    info = torch.finfo(u.lower.dtype)
    own = torch.eye(H, dtype=torch.bool, device=u.lower.device)

    def value(end: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
        rest = others.unsqueeze(-2).expand(*others.shape, H).masked_fill(own, -math.inf)
        rest = torch.logsumexp(rest, -1)
        size = 1 + end.detach().abs() + rest.detach().abs().masked_fill(rest == -math.inf, 0)
        return f(end - rest), (H + 32) * info.eps * size

    low, below = value(u.lower, u.upper)
    high, above = value(u.upper, u.lower)
    return Interval(low - below, high + above)


RULES: dict[str, Rule] = {
    "linear": Linear(),
    "prelu": PReLU(),
    "scale": Scale(),
    "dropout": Dropout(),
    "shift": Shift(),
    "line": Line(),
    "sum": Sum(),
    "product": Product(),
    "expand": Expand(),
    "total": Total(),
    "concat": Concat(),
    "columns": Columns(),
    "normalise": Normalised(centres=True),
    "root_mean_square": Normalised(centres=False),
    "softmax": Softmax(),
    "log_softmax": LogSoftmax(),
    **{kind: Elementwise() for kind in ACTIVATIONS},
}


def without_range(nodes: Sequence[Node]) -> str:
    """The first kind among the nodes that has no rule here, or ""."""
    return next((node.kind for node in nodes if node.kind not in RULES), "")


# --- a program -----------------------------------------------------------------------------------


def jacobian(
    nodes: Sequence[Node], params: Sequence[Param], box: Interval, columns: Sequence[int]
) -> Interval:
    """What ∂y/∂x of a program lies in over boxes.

    Args:
        nodes, params: the program; parameters in the dtype of the box.
        box: ends (B, d), float32 or float64.
        columns: the k columns of x that are asked for.

    Returns:
        Ends (B, D, k).
    """
    d = box.lower.shape[-1]
    unit = torch.eye(d, dtype=box.lower.dtype, device=box.lower.device)[list(columns)]
    values = [box]
    tangents: list[Interval | None] = [_exactly(unit.unsqueeze(1))]
    for node in nodes:
        u, t = [values[i] for i in node.inputs], [tangents[i] for i in node.inputs]
        θ, rule = [params[i] for i in node.params], RULES[node.kind]
        v = _still(rule.value(node, u, θ))
        values.append(v)
        moves = any(a is not None for a in t)
        tangents.append(rule.push(node, u, v, t, θ) if moves else None)
    y, t_y = values[-1], _moving(tangents[-1])
    unknown = y.lower.isnan() | y.upper.isnan()  # by the rule for NaN
    ends = (end.expand(-1, *unknown.shape).masked_fill(unknown, math.nan) for end in t_y[:2])
    lower, upper = (end.permute(1, 2, 0) for end in ends)
    return Interval(lower, upper)
