"""Sound bounds of a chain's slopes over many boxes at once: affine forms in float64.

A value over a box is an affine form c + Σ_s g_s ε_s ± e, with every ε_s in [-1, 1]. The first ε
are the box itself, x_i = m_i + r_i ε_i, so a form knows how a value moves with x; each later one is
what a curve was off its line in one neuron, which cancels like any other term in the layers behind.
``e`` is what is not followed any further, rounding in the first place. Three tiers are one code,
the fourth is ``quadratic.py``:

=========  =======================  =========================================================
INTERVALS  no ε at all              centre and radius, two products of a hidden layer
AFFINE     the ε of the box         first order in x exactly, the rest by intervals
LINEAR     and one for each neuron  what linear (CROWN-type) bounds with parallel lines give
QUADRATIC  the ε and their products second order in x exactly, for σ with a third derivative
=========  =======================  =========================================================

Every σ and σ' is replaced by a line and its error over the range of its argument; the slopes are
the adjoint recursion of ``docs/mathematics.md``, p_l = σ_l'(a_l) ∘ P_l and P_{l-1} = W_lᵀ p_l,
where a product of two forms keeps what is linear and bounds the rest.

Floating point: a product over n terms is off by at most γ_n = n u / (1 - n u) times the product of
the absolute values, in any order of summation, with or without FMA; curves are off by what
``ranges`` says; every such term goes into ``e``. What is not finite bounds nothing: it comes out as
-inf.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import quadratic, ranges
from .activations import Activation
from .enclosures import SHORT, TINY, Slopes, U, box, spread, γ
from .intervals import Interval, jacobian
from .layers import Layers, Straight

__all__ = [
    "AFFINE",
    "INTERVALS",
    "LINEAR",
    "QUADRATIC",
    "TIERS",
    "Form",
    "Line",
    "along",
    "centred",
    "input_form",
    "moving",
    "slopes",
    "through",
    "tiers",
    "values",
]

INTERVALS, AFFINE, LINEAR, QUADRATIC = 0, 1, 2, 3
TIERS = ("intervals", "affine forms", "linear bounds", "quadratic forms")

KNOTS = 9  # of a line along σ'


class Form(NamedTuple):
    """c (B, H), g (B, S, H), e (B, H) >= 0, and a bound r (B, H) of how far it may be from c."""

    c: Tensor
    g: Tensor
    e: Tensor
    r: Tensor


class Line(NamedTuple):
    """f(a) = slope·(a - c) + at ± off for every a within a radius of c, each (B, H)."""

    slope: Tensor
    at: Tensor
    off: Tensor


# --- lines along curves --------------------------------------------------------------------------


def line(σ: Activation, order: int, c: Tensor, r: Tensor, flat: bool = False) -> Line:
    """A line along σ (order 0) or σ' (order 1) over [c - r, c + r], c and r (B, H).

    The closest of some, each sound by itself: the curve's range, a line of slope 0 and with
    ``flat`` the only one; the mean value theorem's f(c) + f'(·)(a - c); and lines that lie by the
    curve's values at knots, between two of which, 2ρ apart, it is within ½ρ² max |f''| of the
    straight line from one to the other. Piecewise linear curves are extreme at a kink or an end.
    """
    f, derivative = ranges.known_curves(σ)[order : order + 2]
    wide = r * (1 + 4 * U) + 4 * U * c.abs()  # so that both ends are outside, rounded
    lower, upper = c - wide, c + wide
    low, high = ranges.hull(f, lower, upper)
    zero = torch.zeros_like(c)
    candidates = [(zero, low, high)]
    # Those of which the value jumps have a range and nothing else.
    if flat or (order and σ.piecewise_linear) or σ.kind in ("hardshrink", "threshold"):
        return _best(zero, wide, candidates)
    knots = 2 if σ.piecewise_linear else KNOTS
    t = torch.linspace(-1, 1, knots, dtype=c.dtype, device=c.device).view(-1, 1, 1)
    away = t * wide
    at = f.formula(c + away)
    noise = _noise(f, at.abs().amax(0)) + SHORT * (c.abs() + wide)  # for the knots are rounded
    bent = _bent(σ, order, lower, upper)
    if σ.piecewise_linear:
        for turn in derivative.turns:
            place = torch.full_like(c, turn.place).clamp(lower, upper).unsqueeze(0)
            away, at = torch.cat((away, place - c)), torch.cat((at, f.formula(place)))
        slopes = [((at[1] - at[0]) / (2 * wide)).nan_to_num(0.0, 0.0, 0.0)]
    else:
        least, most = ranges.hull(derivative, lower, upper)
        middle, mean = 0.5 * least + 0.5 * most, (0.5 * most - 0.5 * least) * wide
        candidates.append((middle, at[knots // 2] - mean, at[knots // 2] + mean))
        slopes = [((at * t).sum(0) / (wide * t.square().sum())).nan_to_num(0.0, 0.0, 0.0)]
    between = 0.5 * bent * (wide / (knots - 1)).square()
    for slope in slopes:
        off = at - slope * away
        candidates.append((slope, off.amin(0) - between, off.amax(0) + between))
    return _best(noise, wide, candidates)


def _bent(σ: Activation, order: int, lower: Tensor, upper: Tensor) -> Tensor:
    """A bound of the curve's second derivative on the interval, infinite where there is none."""
    if σ.piecewise_linear:
        return torch.zeros_like(lower)
    if order == 0:
        low, high = ranges.bounds(σ, 2, lower, upper)
        return torch.maximum(high, -low)
    bound, _ = ranges.THIRD.get(σ.kind, (torch.inf, torch.inf))
    if σ.kind == "softplus" and σ.q >= ranges.SMOOTH and abs(σ.p) <= 4:
        bound = 0.0963 * σ.p * σ.p
    return torch.full_like(lower, bound)


def _noise(f: ranges.Curve, size: Tensor) -> Tensor:
    """What the formula of a curve may be off where it is of that size."""
    return 4 * U * (f.relative * size + f.absolute) + f.slack


def _best(noise: Tensor, r: Tensor, candidates: Sequence[tuple[Tensor, Tensor, Tensor]]) -> Line:
    """Of lines (slope, lowest, highest of f(a) - slope·(a - c)) for each neuron the closest; where
    none is known one that is off by infinity, and no NaN."""
    best: Line | None = None
    for slope, low, high in candidates:
        at, off = 0.5 * low + 0.5 * high, 0.5 * high - 0.5 * low
        size = at.abs() + slope.abs() * r
        off = off.clamp_(min=0).add_(noise).mul_(1 + SHORT).add_(size, alpha=SHORT).add_(TINY)
        closer = off < (torch.inf if best is None else best.off)  # no NaN is
        best = Line(
            torch.where(closer, slope, 0.0 if best is None else best.slope),
            torch.where(closer, at, 0.0 if best is None else best.at),
            torch.where(closer, off, torch.inf if best is None else best.off),
        )
    assert best is not None
    return best


def _sizes(g: Tensor) -> Tensor:
    """Σ_s |g_s| of g (B, S, H). PyTorch's norm is no vector code over that axis."""
    return g.abs().sum(1)


# --- forms ---------------------------------------------------------------------------------------


def along(a: Form, f: Line) -> Form:
    """f(a) for the line's a."""
    steep = f.slope.abs()
    e = steep * a.e + f.off + SHORT * (steep * a.r + f.at.abs() + f.off)
    r = (steep * a.r + e) * (1 + SHORT)
    return Form(f.at, f.slope.unsqueeze(1) * a.g, e, r)


def _product(P: Form, s: Form) -> Form:
    """P∘s; the ε of s are the first of those of P.

    What is quadratic, ΔP·Δs = ((t ΔP + Δs)² - (t ΔP - Δs)²)/4t, lies in [-b²/4t, a²/4t] for the
    radii a and b of sum and difference and any t > 0; where the ε of both differ in sign, that is
    a fraction of the product of the radii.
    """
    S = s.g.shape[1]
    c, quadratic = P.c * s.c, P.r * s.r
    linear = s.c.abs() * P.r + P.c.abs() * s.r
    size = c.abs() + linear + quadratic
    if S:
        t = (s.r / P.r).nan_to_num(1.0, 1.0, 1.0).clamp(1e-16, 1e16)
        scaled = P.g[:, :S] * t.unsqueeze(1)
        rest = (_sizes(P.g[:, S:]) + P.e) * t + s.e
        more = (1 + 4 * (P.g.shape[1] + 4) * U) / (4 * t)
        b = (_sizes(scaled - s.g) + rest).square() * more
        a = (_sizes(scaled.add_(s.g)) + rest).square() * more
        closer = 0.5 * (a + b) < quadratic
        c = c + torch.where(closer, 0.5 * (a - b), 0.0)
        quadratic = torch.where(closer, 0.5 * (a + b), quadratic)
    e = s.c.abs() * P.e + P.c.abs() * s.e + quadratic + SHORT * size + TINY
    g = P.g * s.c.unsqueeze(1)
    g[:, :S].addcmul_(s.g, P.c.unsqueeze(1))
    return Form(c, g, e, (linear + e) * (1 + SHORT))


def _contracted(P: Form, s: Form, W: Tensor, layers: Layers) -> tuple[Form, Tensor]:
    """Wᵀ(P∘s) for W (H, K), the first layer's, where the only ε of s are the m of the box; and how
    much of its error each of these is to blame for, (B, m, K).

    What is quadratic is one form εᵀMε for each output, M (S, m) = Σ_j W_j g_P,j g_s,jᵀ, in which
    the neurons cancel; of its diagonal ε² is in [0, 1].
    """
    m, K, H = s.g.shape[1], W.shape[1], W.shape[0]
    γ_n = γ(H + 4 + layers.folded)
    g = P.g * s.c.unsqueeze(1)
    g[:, :m].addcmul_(s.g, P.c.unsqueeze(1))
    lumped = s.c.abs() * P.e + P.c.abs() * s.e + P.r * s.e + P.e * s.r
    rounding = (P.c.abs() + P.r) * (s.c.abs() + s.r) * (4 * γ_n) + TINY
    error = ((lumped * (1 + SHORT) + rounding) @ W.abs()) * (1 + 2 * γ_n)
    c, blame = (P.c * s.c) @ W, P.c.new_zeros(len(P.c), m, K)
    for k in range(K):
        M = P.g @ (s.g * W[:, k]).mT  # (B, S, m)
        square = M[:, :m]
        diagonal = square.diagonal(dim1=1, dim2=2)
        c[:, k] += 0.5 * diagonal.sum(1)
        crossed = (square + square.mT).abs()
        size = 0.5 * crossed.sum(1) - 0.5 * diagonal.abs() + M[:, m:].abs().sum(1)
        error[:, k] += size.sum(1) * (1 + 4 * (m + 4) * U)
        blame[:, :, k] = size
    return Form(c, g @ W, error, error), blame


def _through(h: Form, W: Tensor, layers: Layers, b: Tensor | None, keep: bool) -> Form:
    """W h + b, W (out, in). With ``keep`` what h was off becomes one ε for each of its columns."""
    γ_n = γ(W.shape[1] + 2 + layers.folded)
    rounding = γ_n * (h.c.abs() + h.r)
    c = h.c @ W.mT if b is None else torch.addmm(b, h.c, W.mT)
    g = h.g @ W.mT
    if keep:
        g = torch.cat((g, h.e.unsqueeze(2) * W.mT), 1)
    else:
        rounding = rounding + h.e
    e = (rounding @ W.abs().mT) * (1 + 2 * γ_n) + TINY
    if b is not None:
        e = e + γ_n * (b.abs() + c.abs())
    return Form(c, g, e, (_sizes(g) + e) * (1 + 2 * (g.shape[1] + 2) * U))


def tiers(layers: Layers) -> tuple[int, ...]:
    """Those that serve the chain."""
    return (INTERVALS, AFFINE, LINEAR, *([QUADRATIC] if quadratic.serves(layers) else []))


def slopes(
    layers: Layers | Straight,
    lower: Tensor,
    upper: Tensor,
    output: int,
    columns: Tensor,
    tier: int,
    wanted: Tensor | None = None,
) -> Slopes:
    """Forms of ∂y_output/∂x_c for the K columns c over the boxes [lower, upper] (B, d), float64.

    ``tier`` is one of the four, QUADRATIC where that serves; of programs that are no chain, and
    over boxes without an end, there are only intervals. What is not finite has an infinite error,
    and so may have what is not ``wanted`` (B, K).
    """
    if isinstance(layers, Straight):
        return _by_intervals(layers, lower, upper, output, columns)
    endless = (lower.isinf() | upper.isinf()).any(1)
    if endless.any():
        return _partly_endless(layers, lower, upper, output, columns, tier, endless)
    moves = moving(lower, upper)
    if tier == QUADRATIC:
        c, r = centred(layers, lower, upper)
        return quadratic.slopes(layers, c, r, moves, output, columns, wanted)
    first = _first_derivatives(layers, lower, upper, output, tier)
    P, blame = _backward(layers, lower, output, columns, tier, first, len(moves))
    return _found(P, blame, moves, layers.d, tier)


def _first_derivatives(
    layers: Layers, lower: Tensor, upper: Tensor, output: int, tier: int
) -> list[Form | None]:
    """σ'(a) of every layer along the boxes; None where σ is the identity."""
    h, L, flat = _input(layers, lower, upper, tier), len(layers.W), tier == INTERVALS
    first: list[Form | None] = []
    for l, (W, b, σ) in enumerate(zip(layers.W, layers.b, layers.σ, strict=True)):
        if l == L - 1:
            if σ.kind == "identity":
                first.append(None)
                break
            W, b = W[output : output + 1], b[output : output + 1]
        a = _through(h, W, layers, b, tier == LINEAR and l > 0)
        if σ.kind == "identity":
            first.append(None)
            h = a
            continue
        first.append(along(a, line(σ, 1, a.c, a.r, flat)))
        if l < L - 1:
            h = along(a, line(σ, 0, a.c, a.r, flat))
    return first


def _backward(
    layers: Layers,
    lower: Tensor,
    output: int,
    columns: Tensor,
    tier: int,
    first: Sequence[Form | None],
    m: int,
) -> tuple[Form, Tensor | None]:
    """The slopes, by the adjoint recursion, and how much of their error each of the m moving
    columns is to blame for, where that is known."""
    B, L, keep = len(lower), len(layers.W), tier == LINEAR
    known = 0 if tier == INTERVALS else m
    known = max((s.g.shape[1] for s in first if s is not None), default=known)
    P: Form | None = None
    for l in range(L - 1, -1, -1):
        W, s = layers.W[l], first[l]
        if l == L - 1:
            W = W[output : output + 1]
        if l == 0:
            W = W[:, columns]
        if P is None and s is None:  # a row of weights itself, without a product
            row = W.expand(B, -1)
            off = layers.folded * SHORT * row.abs()
            P = _constant(row, known)._replace(e=off, r=off)
            continue
        p = _constant(lower.new_ones(B, 1), known) if P is None else P
        if s is not None and l == 0 and tier != INTERVALS:
            return _contracted(p, s, W, layers)
        p = p if s is None else _product(p, s)
        P = _through(p, W.mT, layers, None, keep and l > 0)
    assert P is not None
    return P, None


def _found(P: Form, blame: Tensor | None, moves: Tensor, d: int, tier: int) -> Slopes:
    """What the slopes' form says of them."""
    m = len(moves)
    if tier == INTERVALS:
        slant, error = P.c.new_zeros(len(P.c), m, P.c.shape[1]), P.e
    else:
        slant = P.g[:, :m]
        error = (_sizes(P.g[:, m:]) + P.e) * (1 + 2 * (P.g.shape[1] + 2) * U)
    known = torch.isfinite(P.c) & torch.isfinite(error) & torch.isfinite(slant).all(1)
    blame = torch.zeros_like(slant) if blame is None else blame.nan_to_num(1.0, 1.0)
    return Slopes.linear(
        torch.where(known, P.c, 0.0),
        spread(torch.where(known.unsqueeze(1), slant, 0.0), moves, d),
        torch.where(known, error, torch.inf),
        spread(blame, moves, d),
    )


def _partly_endless(
    layers: Layers,
    lower: Tensor,
    upper: Tensor,
    output: int,
    columns: Tensor,
    tier: int,
    endless: Tensor,
) -> Slopes:
    """Those boxes by intervals, with ends that may be infinite, and the others as they come."""
    found = Slopes.unknown(lower, len(columns))
    every = torch.arange(len(columns), device=lower.device)
    program = layers.straight()
    whole, rest = endless.nonzero().flatten(), (~endless).nonzero().flatten()
    found.put(whole, every, _by_intervals(program, lower[whole], upper[whole], output, columns))
    found.put(rest, every, slopes(layers, lower[rest], upper[rest], output, columns, tier))
    return found


def _by_intervals(
    program: Straight, lower: Tensor, upper: Tensor, output: int, columns: Tensor
) -> Slopes:
    for offset in program.offsets:
        lower, upper = lower + offset, upper + offset
        lower, upper = lower - 2 * U * lower.abs(), upper + 2 * U * upper.abs()
    box = Interval(lower, upper, bool((lower.isfinite() & upper.isfinite()).all()))
    low, high, _ = jacobian(program.nodes, program.params, box, columns.tolist())
    low, high = (end[:, output].expand(len(lower), -1) for end in (low, high))
    c = (0.5 * low + 0.5 * high).nan_to_num(0.0, 0.0, 0.0)
    error = torch.maximum(high - c, c - low) * (1 + 4 * U) + TINY
    none = c.new_zeros(len(c), program.d, len(columns))
    error = torch.where(torch.isfinite(error), error, torch.inf)
    return Slopes.linear(c, none, error, none)


def values(
    layers: Layers, lower: Tensor, upper: Tensor, tier: int = INTERVALS
) -> list[tuple[Tensor, Tensor]]:
    """Both bounds of every a_l (B, H_l) over the boxes (B, d)."""
    h, found = _input(layers, lower, upper, tier), []
    for l, (W, b, σ) in enumerate(zip(layers.W, layers.b, layers.σ, strict=True)):
        a = _through(h, W, layers, b, tier == LINEAR and l > 0)
        found.append((a.c - a.r * (1 + 2 * U), a.c + a.r * (1 + 2 * U)))
        h = a if σ.kind == "identity" else along(a, line(σ, 0, a.c, a.r, tier == INTERVALS))
    return found


def input_form(layers: Layers, lower: Tensor, upper: Tensor) -> Form:
    """x over the boxes (B, d), with one ε for each moving column."""
    return _input(layers, lower, upper, LINEAR)


def through(h: Form, layers: Layers, l: int) -> Form:
    """a_l of h_{l-1}; what h was off of its lines becomes an ε for each neuron."""
    return _through(h, layers.W[l], layers, layers.b[l], l > 0)


def _input(layers: Layers, lower: Tensor, upper: Tensor, tier: int) -> Form:
    """x as a form."""
    c, r = centred(layers, lower, upper)
    if tier == INTERVALS:
        return Form(c, c.new_zeros(len(c), 0, c.shape[1]), r, r)
    moves = moving(lower, upper)
    return Form(c, *box(c, r, moves, len(moves)), r)


def centred(layers: Layers, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
    """c and r such that c ± r holds the boxes behind the chain's offsets."""
    c = 0.5 * lower + 0.5 * upper
    r = torch.maximum(upper - c, c - lower) * (1 + 2 * U)
    for offset in layers.offsets:
        c = c + offset
        r = (r + 2 * U * c.abs()) * (1 + 2 * U)
    return c, r


def moving(lower: Tensor, upper: Tensor) -> Tensor:
    """The columns in which any of the boxes has an extent."""
    return (lower < upper).any(0).nonzero().flatten()


def _constant(c: Tensor, known: int) -> Form:
    """The same number everywhere in the box, with room for so many ε."""
    zero = torch.zeros_like(c)
    return Form(c, c.new_zeros(len(c), known, c.shape[1]), zero, zero)
