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
    W, s, o, scale, fixed = hinges
    x = torch.maximum(torch.minimum(x, c + 0.9 * r), c - 0.9 * r)
    w = s * (x @ W.mT) + o
    # Over the hinge by ``above`` its zero, by ``over`` its slope; both stay positive.
    above = w.clamp(min=0) + 0.1 * (r @ W.abs().mT) + 1e-12
    over = above - w
    cap = scale * λ.unsqueeze(1) + fixed
    live = cap > 0
    τ = cap * above / (above + over)
    spare = torch.ones_like(λ)
    if room is not None:
        spare = (room - (scale * above).sum(1)).clamp(min=0.1 * room.abs() + 1e-9)
    g = A + (τ * s) @ W
    mean = g.abs().mean(1, keepdim=True) + 1e-12
    from_low, from_high = mean + g.clamp(min=0), mean + (-g).clamp(min=0)
    # Of each programme half of the complementary products, one for each multiplier and slack.
    count = live.sum(1) + x.shape[1] + (0.5 if room is not None else 0.0)
    best, found = torch.full_like(λ, -torch.inf), Optimum(τ, λ, x)
    for step in range(steps):
        cap = scale * λ.unsqueeze(1) + fixed
        left = cap - τ
        g = A + (τ * s) @ W
        value = (τ * o).sum(1) + (g * c).sum(1) - (g.abs() * r).sum(1)
        if room is not None:
            value = value - λ * room
        better = value > best
        best = torch.where(better, value, best)
        rows = better.unsqueeze(1)
        found = Optimum(
            torch.where(rows, τ, found.weight), torch.where(better, λ, found.λ), found.x
        )
        if step == steps - 1:
            break
        low, high = x - (c - r), (c + r) - x
        gap = (τ * over + left * above).sum(1) + (from_low * low + from_high * high).sum(1)
        if room is not None:
            gap = gap + λ * spare
        μ = (CENTRING * gap / (2 * count)).unsqueeze(1)
        # Newton's step in x and λ; that of a hinge follows from it.
        Δ = torch.where(live, left * over + τ * above, 1.0)
        bend = torch.where(live, left * τ / Δ, 0.0)
        dτ = torch.where(live, (left * τ * w + μ * (left - τ)) / Δ, 0.0)
        H = (W.mT * bend.unsqueeze(1)) @ W
        H.diagonal(dim1=1, dim2=2).add_(from_low / low + from_high / high)
        rest = μ / low - μ / high - g - (dτ * s) @ W
        dλ = torch.zeros_like(λ)
        if room is None:
            dx = torch.linalg.solve_ex(H, rest)[0]
        else:
            moved = torch.where(live, τ * above * scale / Δ, 0.0)
            h = (moved * s) @ W
            own = torch.where(live, scale * scale * over * above / Δ, 0.0).sum(1) * λ + spare
            raised = torch.where(
                live, (over * (μ - left * above) + above * (μ - τ * over)) / Δ, 0.0
            )
            missing = room - (scale * above).sum(1) - spare
            other = μ[:, 0] - λ * (spare + missing) + λ * (scale * raised).sum(1)
            both = torch.linalg.solve_ex(H, torch.stack((rest, h), 2))[0]
            first, second = both.unbind(2)
            dλ = (other + λ * (h * first).sum(1)) / (own + λ * (h * second).sum(1))
            dx = first - second * dλ.unsqueeze(1)
            dτ = dτ + moved * dλ.unsqueeze(1)
        dw = s * (dx @ W.mT)
        dcap = scale * dλ.unsqueeze(1)
        d_above = over * (μ - (left + dcap) * above) + above * (μ - τ * over + τ * dw)
        d_above = torch.where(live, d_above / Δ, 0.0)
        d_over = torch.where(live, d_above - dw, 0.0)
        dτ = dτ + bend * dw
        d_low, d_high = (
            (μ - from_low * dx) / low - from_low,
            (μ + from_high * dx) / high - from_high,
        )
        primal = [(low, dx), (high, -dx), (above, d_above), (over, d_over)]
        dual = [(from_low, d_low), (from_high, d_high), (τ, dτ), (left, dcap - dτ)]
        if room is not None:
            d_spare = missing - (scale * d_above).sum(1)
            primal.append((spare.unsqueeze(1), d_spare.unsqueeze(1)))
            dual.append((λ.unsqueeze(1), dλ.unsqueeze(1)))
        α, β = _far(primal), _far(dual)
        if room is not None:
            spare, λ = spare + α[:, 0] * d_spare, λ + β[:, 0] * dλ
        x, above, over = x + α * dx, above + α * d_above, over + α * d_over
        w = above - over
        τ, from_low, from_high = τ + β * dτ, from_low + β * d_low, from_high + β * d_high
    return found._replace(x=x)


def _far(parts: list[tuple[Tensor, Tensor]]) -> Tensor:
    """How far along (n, 1), 1 at most, all that is positive stays so."""
    ends = [torch.where(by < 0, -at / by, torch.inf).amin(1) for at, by in parts]
    return (STEP * torch.stack(ends).amin(0)).clamp(max=1).unsqueeze(1)
