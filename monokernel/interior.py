"""Linear programmes in a few columns by the interior-point method, thousands at a time.

Each is the least value over a box of a linear function and H hinges that share their rows W,

    ⟨A, x⟩ + Σ_j cap_j max(0, s_j ⟨W_j, x⟩ + o_j),      cap = λ scale + fixed,

with λ = 1; or the least value of ⟨A, x⟩ + Σ_j fixed_j max(0, …) where
Σ_j scale_j max(0, …) <= room, and λ is the multiplier of that. A hinge with a large cap is a
constraint.

What comes back are multipliers (the weight of each hinge, 0 to its cap, and λ): of a point on the
way, not of the solution, and rounded. Any are right, for the dual is evaluated elsewhere: they only
say how close it comes. Mehrotra's path without the predictor; a Newton step takes one factorisation
of a matrix of the size of x, since hinges are eliminated by hand.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Hinges", "Optimum", "least"]

CENTRING = 0.1  # each step aims at so much of the gap
STEP = 0.95  # of the way to the next end


class Hinges(NamedTuple):
    """W (H, d) of all programmes; of each s (n, H), +1 or -1, o, scale and fixed (n, H)."""

    W: Tensor
    s: Tensor
    o: Tensor
    scale: Tensor
    fixed: Tensor


class Optimum(NamedTuple):
    """The hinges' weights (n, H), λ (n,) and the point x (n, d)."""

    weight: Tensor
    λ: Tensor
    x: Tensor


class _Programmes(NamedTuple):
    """What is given of all: rows, objective, box, room; which hinges are there at all (n, H); and
    half the number of complementary products (n,), one for each multiplier and slack."""

    hinges: Hinges
    A: Tensor
    c: Tensor
    r: Tensor
    room: Tensor | None
    live: Tensor
    products: Tensor

    def value(self, at: _Point, g: Tensor) -> Tensor:
        """The dual's, (n,)."""
        value = (at.τ * self.hinges.o).sum(1) + (g * self.c).sum(1) - (g.abs() * self.r).sum(1)
        return value if self.room is None else value - at.λ * self.room

    def slack(self, at: _Point) -> Tensor:
        """What is left of each hinge's weight, (n, H)."""
        return self.hinges.scale * at.λ.unsqueeze(1) + self.hinges.fixed - at.τ

    def slope(self, τ: Tensor) -> Tensor:
        return self.A + (τ * self.hinges.s) @ self.hinges.W


class _Point(NamedTuple):
    """A point on the way. Over the hinge by ``above`` (n, H) is its zero, by ``over`` its slope;
    ``τ`` is the hinges' weight, ``from_low`` and ``from_high`` (n, d) are the multipliers of the
    box's ends, ``spare`` (n,) is what is left of the room. All but x are positive, and stay so."""

    x: Tensor
    above: Tensor
    over: Tensor
    τ: Tensor
    from_low: Tensor
    from_high: Tensor
    λ: Tensor
    spare: Tensor


def least(
    hinges: Hinges,
    A: Tensor,
    c: Tensor,
    r: Tensor,
    x: Tensor,
    steps: int,
    λ: Tensor,
    room: Tensor | None = None,
) -> Optimum:
    """The best multipliers of some steps from x (n, d) on, in the boxes c ± r (n, d), r > 0.

    With ``room`` (n,) the hinges are a constraint, and ``λ`` (n,) is where its multiplier starts;
    without, λ stays as it is.
    """
    live = hinges.scale * λ.unsqueeze(1) + hinges.fixed > 0
    products = live.sum(1) + x.shape[1] + (0.5 if room is not None else 0.0)
    of = _Programmes(hinges, A, c, r, room, live, products)
    at = _start(of, torch.maximum(torch.minimum(x, c + 0.9 * r), c - 0.9 * r), λ)
    best, found = torch.full_like(λ, -torch.inf), Optimum(at.τ, λ, at.x)
    for step in range(steps):
        g = of.slope(at.τ)
        value = of.value(at, g)
        better = value > best
        best = torch.where(better, value, best)
        found = Optimum(
            torch.where(better.unsqueeze(1), at.τ, found.weight),
            torch.where(better, at.λ, found.λ),
            found.x,
        )
        if step < steps - 1:
            at = _moved(of, at, _newton(of, at, g))
    return found._replace(x=at.x)


def _start(of: _Programmes, x: Tensor, λ: Tensor) -> _Point:
    W, s, o, scale, fixed = of.hinges
    w = s * (x @ W.mT) + o
    above = w.clamp(min=0) + 0.1 * (of.r @ W.abs().mT) + 1e-12
    over = above - w
    τ = (scale * λ.unsqueeze(1) + fixed) * above / (above + over)
    spare = torch.ones_like(λ)
    if of.room is not None:
        spare = (of.room - (scale * above).sum(1)).clamp(min=0.1 * of.room.abs() + 1e-9)
    g = of.slope(τ)
    mean = g.abs().mean(1, keepdim=True) + 1e-12
    return _Point(x, above, over, τ, mean + g.clamp(min=0), mean + (-g).clamp(min=0), λ, spare)


def _newton(of: _Programmes, at: _Point, g: Tensor) -> _Point:
    """Newton's step in x and λ; what follows from it, of hinges and ends."""
    (W, s, _, scale, _), live = of.hinges, of.live
    x, above, over, τ, from_low, from_high, λ, spare = at
    low, high, left, w = x - (of.c - of.r), (of.c + of.r) - x, of.slack(at), above - over
    gap = (τ * over + left * above).sum(1) + (from_low * low + from_high * high).sum(1)
    if of.room is not None:
        gap = gap + λ * spare
    μ = (CENTRING * gap / (2 * of.products)).unsqueeze(1)
    Δ = torch.where(live, left * over + τ * above, 1.0)
    bend = torch.where(live, left * τ / Δ, 0.0)
    dτ = torch.where(live, (left * τ * w + μ * (left - τ)) / Δ, 0.0)
    H = (W.mT * bend.unsqueeze(1)) @ W
    H.diagonal(dim1=1, dim2=2).add_(from_low / low + from_high / high)
    rest = μ / low - μ / high - g - (dτ * s) @ W
    dλ = d_spare = torch.zeros_like(λ)
    if of.room is None:
        dx = torch.linalg.solve_ex(H, rest)[0]
    else:
        moved = torch.where(live, τ * above * scale / Δ, 0.0)
        h = (moved * s) @ W
        own = torch.where(live, scale * scale * over * above / Δ, 0.0).sum(1) * λ + spare
        raised = torch.where(live, (over * (μ - left * above) + above * (μ - τ * over)) / Δ, 0.0)
        missing = of.room - (scale * above).sum(1) - spare
        other = μ[:, 0] - λ * (spare + missing) + λ * (scale * raised).sum(1)
        both = torch.linalg.solve_ex(H, torch.stack((rest, h), 2))[0]
        first, second = both.unbind(2)
        dλ = (other + λ * (h * first).sum(1)) / (own + λ * (h * second).sum(1))
        dx = first - second * dλ.unsqueeze(1)
        dτ = dτ + moved * dλ.unsqueeze(1)
    dw = s * (dx @ W.mT)
    d_left = scale * dλ.unsqueeze(1)
    d_above = over * (μ - (left + d_left) * above) + above * (μ - τ * over + τ * dw)
    d_above = torch.where(live, d_above / Δ, 0.0)
    d_over = torch.where(live, d_above - dw, 0.0)
    d_low = (μ - from_low * dx) / low - from_low
    d_high = (μ + from_high * dx) / high - from_high
    if of.room is not None:
        d_spare = missing - (scale * d_above).sum(1)
    return _Point(dx, d_above, d_over, dτ + bend * dw, d_low, d_high, dλ, d_spare)


def _moved(of: _Programmes, at: _Point, by: _Point) -> _Point:
    """As far as all that is positive stays so: the point itself, and its multipliers."""
    low, high = at.x - (of.c - of.r), (of.c + of.r) - at.x
    d_left = of.hinges.scale * by.λ.unsqueeze(1) - by.τ
    primal = [(low, by.x), (high, -by.x), (at.above, by.above), (at.over, by.over)]
    dual = [(at.from_low, by.from_low), (at.from_high, by.from_high), (at.τ, by.τ)]
    dual.append((of.slack(at), d_left))
    λ, spare = at.λ, at.spare
    if of.room is not None:
        primal.append((spare.unsqueeze(1), by.spare.unsqueeze(1)))
        dual.append((λ.unsqueeze(1), by.λ.unsqueeze(1)))
    α, β = _far(primal), _far(dual)
    if of.room is not None:
        λ, spare = λ + β[:, 0] * by.λ, spare + α[:, 0] * by.spare
    return _Point(
        at.x + α * by.x,
        at.above + α * by.above,
        at.over + α * by.over,
        at.τ + β * by.τ,
        at.from_low + β * by.from_low,
        at.from_high + β * by.from_high,
        λ,
        spare,
    )


def _far(parts: list[tuple[Tensor, Tensor]]) -> Tensor:
    """How far along (n, 1), 1 at most, all that is positive stays so."""
    ends = [torch.where(by < 0, -at / by, torch.inf).amin(1) for at, by in parts]
    return (STEP * torch.stack(ends).amin(0)).clamp(max=1).unsqueeze(1)
