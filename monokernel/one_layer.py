"""Bounds of the slopes of a network with one hidden layer of ReLUs or LeakyReLUs.

There a slope is a sum of steps, Σ_j c_j z_j and a constant, c_j = (s1 - s0) v_j W_jc, with z_j in
{0, 1} the switch of a neuron: 1 only where a_j = ⟨W_j, x⟩ + b_j >= 0, and 0 only where a_j <= 0.
For a in [l, u] each step has a closest convex function below it,

    c z >= c max(0, a / u)  for c > 0,        c z >= c + |c| max(0, a / l)  for c < 0,

and a neuron that is decided gives a constraint, a >= l or a <= u. The least value of their sum is a
linear programme with a hinge for each neuron in the columns of x alone, which ``interior`` solves.
Weights of the hinges make a linear function below the slope, whose least value in the box is what
is proved: by whatever weights, with its rounding bounded by the sizes of what it was made of.

Only what violates has to be kept. There λ (slope - margin) <= 0 for every λ >= 0, so the least
value of ±a_j + λ (slope - margin), which is bounded in the same way, bounds ±a_j from below. The
neurons whose hinges miss most are narrowed so before one of them is decided: their hinges get
closer, some are decided by it, and where nothing is left of a range there is nothing left to prove.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import forms
from .branching import Boxes, Branches, Constraints
from .enclosures import U
from .interior import Hinges, Optimum, least
from .layers import Layers

__all__ = ["OneLayer"]

STEPS, NARROWING = 10, 9  # of the interior-point method: for a bound and for a range
NARROWED = 8  # neurons of each branch
AT_A_TIME = 256  # ranges
# What a constraint may cost over its neuron's range in the box, against all that is at stake; where
# all is decided nothing but the constraints can prove, by showing that no point is left.
DEAR, DEAREST = 50.0, 1e4


class _Terms(NamedTuple):
    """Of n branches: what the slope is but for the hinges (n,), and of these, sign·a + end, the
    sign, the end, the steepest that each may be, and 1 for a constraint, which may be as steep as
    it likes, each (n, H)."""

    constant: Tensor
    sign: Tensor
    end: Tensor
    steepest: Tensor
    constraint: Tensor


class OneLayer:
    """Bounds of each pair of box and constraint in a branch, as ``switches`` asks for them."""

    def __init__(
        self, layers: Layers, constraints: Constraints, start: Boxes, box: Tensor, q: Tensor
    ) -> None:
        self.layers, self.box, self.margin = layers, box, constraints.margin
        σ = layers.σ[0]
        s0 = σ.p if σ.kind == "leaky_relu" else 0.0
        W, v = layers.W[0], layers.W[1][constraints.outputs[q]]
        slopes = constraints.signs[q].unsqueeze(1) * v * W.mT[constraints.columns[q]]
        self.steps, self.constant = (1.0 - s0) * slopes, s0 * slopes.sum(1)
        self.sizes = slopes.abs().sum(1) * (1 + 2 * abs(s0))
        c = 0.5 * start.lower + 0.5 * start.upper
        r = torch.maximum(start.upper - c, c - start.lower) * (1 + 2 * U)
        for offset in layers.offsets:
            c = c + offset
            r = (r + 2 * U * c.abs()) * (1 + 2 * U)
        self.c, self.r, self.lower, self.upper = c, r, start.lower, start.upper
        self.shift = c - (0.5 * start.lower + 0.5 * start.upper)
        # The method needs an inside; what is proved does not rest on it.
        self.room = torch.maximum(r, 1e-6 * r.amax(1, keepdim=True)) + 1e-12
        parts = [
            forms.values(layers, start.lower[i : i + 512], start.upper[i : i + 512])[0]
            for i in range(0, len(c), 512)
        ]
        self.low, self.high = (torch.cat(ends) for ends in zip(*parts, strict=True))
        self.width = self.high - self.low
        # What u is to a sum that is as long as any here.
        self.rounding = 4 * U * (max(len(W), layers.d) + 64 + layers.folded)

    def ranges(self) -> tuple[Tensor, Tensor]:
        """What every a lies in, for each pair: (n, H) twice."""
        return self.low[self.box], self.high[self.box]

    def bounded(self, branches: Branches) -> tuple[Tensor, Tensor, Tensor]:
        """As ``switches`` says."""
        pair, switch, low, high, _ = branches
        terms = self._terms(branches)
        one = torch.ones_like(terms.constant)
        none = one.new_zeros(len(one), self.layers.d)
        dear = torch.where((switch == 0).any(1), DEAR, DEAREST) * self.steps[pair].abs().amax(1)
        start = self.c[self.box[pair]]
        weight, _, x = self._solved(pair, terms, none, start, STEPS, dear, one)
        # The hinges left out are a bound too, and all of it where a cell's slope is known.
        weights = weight, torch.zeros_like(weight)
        bound = torch.stack([self._bound(pair, terms, w, one) for w in weights]).amax(0)
        a = torch.addmm(self.layers.b[0], x, self.layers.W[0].mT)
        # The hinge goes from 0 to 1; a step is farthest from it in the middle.
        line = torch.where(terms.sign > 0, a / high, a / low).clamp(0, 1)
        score = self.steps[pair].abs() * torch.minimum(line, 1 - line)
        score = torch.where(switch == 0, score.nan_to_num(0.0, 0.0), -1.0)
        box = self.box[pair]
        x = (x - self.shift[box]).maximum(self.lower[box]).minimum(self.upper[box])
        return bound, x, score

    def narrowed(self, branches: Branches, x: Tensor, score: Tensor) -> Branches:
        """Those neurons' that score highest."""
        pair, switch, low, high, known = branches
        best, neurons = score.topk(min(NARROWED, score.shape[1]), 1)
        row, place = (best > 0).nonzero(as_tuple=True)
        neuron = neurons[row, place]
        row, neuron = row.repeat(2), neuron.repeat(2)
        sign = torch.ones_like(row, dtype=low.dtype)
        sign[len(row) // 2 :] = -1
        terms, x = self._terms(branches), x + self.shift[self.box[pair]]
        found = []
        for i in range(0, len(row), AT_A_TIME):
            at, j, s = (t[i : i + AT_A_TIME] for t in (row, neuron, sign))
            width = (high - low)[at, j]
            λ = 0.3 * width / (self.margin - known[at])
            some = _Terms(*(t[at] for t in terms))
            A = s.unsqueeze(1) * self.layers.W[0][j]
            room = self.margin - some.constant
            weight, λ, _ = self._solved(pair[at], some, A, x[at], NARROWING, DEAR * width, λ, room)
            found.append(self._bound(pair[at], some, weight, λ, (A, s * self.layers.b[0][j])))
        if found:
            under, over = torch.cat(found).chunk(2)
            rows, of = row[: len(under)], neuron[: len(under)]
            low, high = low.clone(), high.clone()
            low[rows, of] = torch.maximum(low[rows, of], under)
            high[rows, of] = torch.minimum(high[rows, of], -over)
        certain = (low > 0).to(switch.dtype) - (high < 0).to(switch.dtype)
        switch = torch.where(switch == 0, certain, switch)
        return branches._replace(switch=switch, low=low, high=high)

    def _terms(self, branches: Branches) -> _Terms:
        pair, switch, low, high, _ = branches
        c, on, off = self.steps[pair], switch > 0, switch < 0
        open_ = ~(on | off)
        down = open_ & (c < 0)
        constant = self.constant[pair] + torch.where(on | down, c, 0.0).sum(1)
        # A range may be taken as wider than it is, and has to be where an end is 0.
        box = self.box[pair]
        width = 1e-9 * self.width[box]
        steepest = c.abs() / torch.where(c > 0, high.maximum(width), -low.minimum(-width))
        steepest = torch.where(open_ & (c != 0), steepest * (1 - 8 * U), 0.0)
        # What the box itself says is no constraint.
        constraint = (on & (low > self.low[box])) | (off & (high < self.high[box]))
        end = torch.where(constraint, torch.where(on, low, -high), 0.0)
        sign = torch.where(down | on, -1.0, torch.ones_like(c))
        return _Terms(constant, sign, end, steepest, constraint.to(c.dtype))

    def _solved(
        self,
        pair: Tensor,
        terms: _Terms,
        A: Tensor,
        x: Tensor,
        steps: int,
        dear: Tensor,
        λ: Tensor,
        room: Tensor | None = None,
    ) -> Optimum:
        """Weights of the hinges that are nearly best."""
        box = self.box[pair]
        fixed = torch.where(
            terms.constraint > 0, dear.unsqueeze(1) / self.width[box].clamp(min=1e-300), 0.0
        )
        o = terms.sign * self.layers.b[0] + terms.end
        hinges = Hinges(self.layers.W[0], terms.sign, o, terms.steepest, fixed)
        return least(hinges, A, self.c[box], self.room[box], x, steps, λ, room)

    def _bound(
        self,
        pair: Tensor,
        terms: _Terms,
        weight: Tensor,
        λ: Tensor,
        beside: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """The least value (n,) of λ·slope over the box; beside A and a constant of
        ⟨A, x⟩ + constant + λ·(slope - margin). It is -inf where none is known."""
        W, b, box = self.layers.W[0], self.layers.b[0], self.box[pair]
        c, r, λ = self.c[box], self.r[box], λ.clamp(min=0)
        most = torch.where(terms.constraint > 0, torch.inf, λ.unsqueeze(1) * terms.steepest)
        α = weight.clamp(min=0).minimum(most)
        value = λ * terms.constant + (α * terms.end).sum(1)
        size = λ * self.sizes[pair] + (α * terms.end.abs()).sum(1)
        β = terms.sign * α
        value, size = value + β @ b, size + α @ b.abs()
        h, h_size = β @ W, α @ W.abs()
        if beside is not None:
            A, constant = beside
            value, size = value + constant - λ * self.margin, size + constant.abs()
            size = size + 2 * λ * abs(self.margin)
            h, h_size = h + A, h_size + A.abs()
        value = value + (h * c).sum(1) - (h.abs() * r).sum(1)
        size = size + (h_size * (c.abs() + r)).sum(1)
        bound = value - self.rounding * size
        return torch.where(bound.isfinite(), bound, -torch.inf)
