"""Branch and bound over the switches of a network of ReLUs or LeakyReLUs: each on or off.

Between its kinks such a network is linear, so its slopes change where a neuron switches and nowhere
else. With z in {0, 1} the switch of a neuron, r = max(a, 0) and q = P z,

    h = s0 a + (s1 - s0) r,      p = s0 P + (s1 - s0) q,      a_l = W_l h_{l-1} + b_l,
    P_{l-1} = W_lᵀ p_l,          ∂y/∂x_c = ⟨W_1 e_c, p_1⟩

is exact, and linear but for r, z and q of the undecided neurons. For those hold, with a in [l, u]
and P in [P⁻, P⁺],

    t P⁻ z + (1 - t) (P - P⁺ (1 - z)) <= q <= t P⁺ z + (1 - t) (P - P⁻ (1 - z)),
    t a / u <= z <= 1 - t a / l,      t a <= r <= u (a - l) / (u - l)      for every t in [0, 1],

and in a branch a >= 0 or a <= 0 of each neuron that was decided, times any β >= 0. So for every
choice of the t and β, running backward from the slope to x gives a linear function of x below it,
and its least value in the box is a lower bound: the dual of a linear programme, of which any point
will do. A few steps of gradient ascent choose t and β; what is proved rests on the last evaluation
alone, with its rounding bounded by the sizes of what it was made of.

Networks with one hidden layer have closer bounds, those of ``one_layer``.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from . import forms
from .branching import Boxes, Branches, Constraints, Crew, Witness
from .enclosures import SHORT, U
from .layers import Layers
from .one_layer import OneLayer

__all__ = ["METHOD", "Dual", "Split", "search", "serves"]

METHOD = "neuron splitting"
AT_A_TIME = 512  # small operations: with 128 they took twice as long
STEPS, RATE = 24, 0.25  # of the ascent in each branch
KINDS = ("relu", "leaky_relu")


# Of z, r and q in a hidden layer, each (n, H).
Weights = tuple[Tensor, Tensor, Tensor]


class Split(NamedTuple):
    """Lower bounds (B, Q), the boxes that are not decided, and how many branches were bounded and
    proved."""

    lower: Tensor
    left: Boxes
    boxes: int
    proved: int


class _Ranges(NamedTuple):
    """Of n boxes or branches, for every hidden layer (n, H): bounds of a and of P."""

    low: list[Tensor]
    high: list[Tensor]
    P_low: list[Tensor]
    P_high: list[Tensor]


class _Bounds(Protocol):
    """Bounds of each pair of box and constraint in a branch of switches."""

    def ranges(self) -> tuple[Tensor, Tensor]:
        """What the box has every a in, for each pair: (n, H) twice."""

    def bounded(self, branches: Branches) -> tuple[Tensor, Tensor, Tensor]:
        """Of n branches the bound (n,), a point (n, d) of the box where the slope may be lowest,
        and for every neuron a score (n, H) of how much it would help to decide it, -1 for those
        that are decided."""

    def narrowed(self, branches: Branches, x: Tensor, score: Tensor) -> Branches:
        """The branches with narrower ranges of what violates, and the switches that they decide."""


def serves(layers: Layers) -> bool:
    """Whether the network is one of such neurons, with a hidden layer, and nothing behind."""
    *hidden, last = layers.σ
    return bool(hidden) and last.kind == "identity" and all(σ.kind in KINDS for σ in hidden)


def search(
    layers: Layers,
    constraints: Constraints,
    start: Boxes,
    verdicts: int,
    witness: Witness,
    deadline: float,
    tell: Callable[[int, int], None],
) -> Split:
    """Decides the boxes of ``start``, as ``branching.search`` does, constraint by constraint."""
    lower = start.lower.new_full((verdicts, len(constraints.signs)), torch.inf)
    box, q = start.wanted.nonzero(as_tuple=True)
    if not len(q):
        return Split(lower, start, 0, 0)
    of_kind = OneLayer if len(layers.W) == 2 else Dual
    bounds: _Bounds = of_kind(layers, constraints, start, box, q)
    low, high = bounds.ranges()
    # One that may be 0 and nothing above is off: so PyTorch has it.
    switch = (low > 0).to(torch.int8) - (high <= 0).to(torch.int8)
    pair = torch.arange(len(q), device=q.device)
    stack = [Branches(pair, switch, low, high, start.known[box, q])]
    stuck, count, proved = list[Branches](), 0, 0
    margin = constraints.margin
    with Crew(low.device) as crew:
        while stack and time.monotonic() < deadline:
            taken = stack.pop()
            most = AT_A_TIME * crew.threads
            if len(taken.pair) > most:
                stack.append(taken.at(slice(0, -most)))
                taken = taken.at(slice(-most, None))
            count += len(taken.pair)
            parts = crew.map(bounds.bounded, [taken.at(part) for part in _parts(taken)])
            bound, x, score = (torch.cat(of) for of in zip(*parts, strict=True))
            # Ranges are those of what violates: of the rest nothing is known but that it does not.
            taken = taken._replace(known=torch.maximum(taken.known, bound.clamp(max=margin)))
            violated = witness(x, start.owner[box[taken.pair]], q[taken.pair])
            going = (taken.known < margin) & ~violated[start.owner[box[taken.pair]]]
            narrowed = _narrowed(crew, bounds, taken.at(going), x[going], score[going])
            empty = (narrowed.low > narrowed.high).any(1)
            over = taken.at(~going)
            nothing = narrowed.at(empty)
            nothing = nothing._replace(known=nothing.known.clamp(min=margin))
            for s in (over, nothing):
                proved += int((s.known >= margin).sum())
                _lower(lower, start.owner[box[s.pair]], q[s.pair], s.known)
            before = taken.switch[going][~empty]
            taken, score = narrowed.at(~empty), score[going][~empty]
            score = torch.where(taken.switch == 0, score, -1.0)
            open_, neuron = score.max(1)
            # Where narrowing has decided all that was left, that is to be bounded once more.
            again = (open_ < 0) & (taken.switch != before).any(1)
            stuck.append(taken.at((open_ < 0) & ~again))
            cut, neuron = taken.at(open_ >= 0), neuron[open_ >= 0].unsqueeze(1)
            stack += [taken.at(again), *(cut.decided(neuron, way) for way in (1, -1))]
            stack = [_going(s, violated, lower, start, box, q) for s in stack]
            stack = _merged([s for s in stack if len(s.pair)], most)
            tell(count, sum(len(s.pair) for s in stack))
    wanted = torch.zeros_like(start.wanted)
    known = torch.full_like(start.known, torch.inf)
    for s in (*stack, *stuck):
        _lower(lower, start.owner[box[s.pair]], q[s.pair], s.known)
        wanted[box[s.pair], q[s.pair]] = True
        _lower(known, box[s.pair], q[s.pair], s.known)
    left = start._replace(wanted=wanted, known=known).at(wanted.any(1))
    return Split(lower, left, count, proved)


def _parts(branches: Branches) -> list[slice]:
    n = len(branches.pair)
    return [slice(i, i + AT_A_TIME) for i in range(0, max(n, 1), AT_A_TIME)]


def _narrowed(
    crew: Crew, bounds: _Bounds, branches: Branches, x: Tensor, score: Tensor
) -> Branches:
    def of(part: slice) -> Branches:
        return bounds.narrowed(branches.at(part), x[part], score[part])

    return Branches.joined(crew.map(of, _parts(branches)))


def _merged(stack: list[Branches], most: int) -> list[Branches]:
    """The last two as one, while both are short."""
    while len(stack) > 1 and len(stack[-1].pair) + len(stack[-2].pair) <= most:
        last, before = stack.pop(), stack.pop()
        stack.append(Branches.joined([before, last]))
    return stack


def _going(
    s: Branches, violated: Tensor, lower: Tensor, start: Boxes, box: Tensor, q: Tensor
) -> Branches:
    """Without those of a verdict that is violated."""
    owner = start.owner[box[s.pair]]
    over = violated[owner]
    if not over.any():
        return s
    _lower(lower, owner[over], q[s.pair[over]], s.known[over])
    return s.at(~over)


def _lower(table: Tensor, rows: Tensor, columns: Tensor, values: Tensor) -> None:
    place = rows * table.shape[1] + columns
    table.view(-1).scatter_reduce_(0, place, values, "amin")


class Dual:
    """The lower bound of each pair of box and constraint in a branch of switches."""

    def __init__(
        self, layers: Layers, constraints: Constraints, start: Boxes, box: Tensor, q: Tensor
    ) -> None:
        self.layers, self.constraints, self.box, self.q = layers, constraints, box, q
        self.margin = constraints.margin
        self.s0, self.rise = [], []
        for σ in layers.σ[:-1]:
            left = σ.p if σ.kind == "leaky_relu" else 0.0
            self.s0.append(left)
            self.rise.append(1.0 - left)
        self.sizes = [len(W) for W in layers.W[:-1]]
        c = 0.5 * start.lower + 0.5 * start.upper
        self.r = torch.maximum(start.upper - c, c - start.lower) * (1 + 2 * U)
        for offset in layers.offsets:
            c = c + offset
            self.r = (self.r + 2 * U * c.abs()) * (1 + 2 * U)
        self.c = c
        self.lower, self.upper = start.lower, start.upper
        self.W_abs = [W.abs() for W in layers.W]

    # --- ranges ---

    def ranges(self) -> tuple[Tensor, Tensor]:
        """By linear bounds."""
        found = []
        for i in range(0, len(self.lower), AT_A_TIME):
            lower, upper = self.lower[i : i + AT_A_TIME], self.upper[i : i + AT_A_TIME]
            *hidden, _ = forms.values(self.layers, lower, upper, forms.LINEAR)
            found.append([torch.cat(ends, 1) for ends in zip(*hidden, strict=True)])
        low, high = (torch.cat(ends)[self.box] for ends in zip(*found, strict=True))
        return low, high

    def _ranges(self, branches: Branches) -> _Ranges:
        """By linear bounds of a, the box's own and those of the branch, and by intervals of P."""
        box, q = self.box[branches.pair], self.q[branches.pair]
        lows, highs, switches = (t.split(self.sizes, 1) for t in branches[2:4] + branches[1:2])
        lower, upper = self.lower[box], self.upper[box]
        h, low, high = forms.input_form(self.layers, lower, upper), [], []
        for l, switch in enumerate(switches):
            a = forms.through(h, self.layers, l)
            low.append(lows[l].maximum(a.c - a.r * (1 + 2 * U)))
            high.append(highs[l].minimum(a.c + a.r * (1 + 2 * U)))
            if l < len(switches) - 1:
                h = forms.along(a, self._line(a.c, low[l], high[l], l, switch))
        P_low, P_high = list(low), list(high)  # of the same shapes
        row = self.layers.W[-1][self.constraints.outputs[q]]
        sign = self.constraints.signs[q].unsqueeze(1)
        c, r = sign * row, SHORT * self.layers.folded * row.abs()
        for l in range(len(low) - 1, -1, -1):
            P_low[l], P_high[l] = c - r, c + r
            if l == 0:
                break
            on, off = self._decided(_Ranges(low, high, [], []), l, switches[l])
            # As tensors: of two numbers ``where`` makes float32.
            s0, s1 = (torch.full_like(c, s) for s in (self.s0[l], self.s0[l] + self.rise[l]))
            least = torch.where(on, s1, torch.where(off, s0, torch.minimum(s0, s1)))
            most = torch.where(on, s1, torch.where(off, s0, torch.maximum(s0, s1)))
            ends = torch.stack([P * s for P in (P_low[l], P_high[l]) for s in (least, most)])
            p_low, p_high = ends.amin(0), ends.amax(0)
            p, p_r = 0.5 * p_low + 0.5 * p_high, 0.5 * p_high - 0.5 * p_low
            n = self.layers.W[l].shape[0] + 4 + self.layers.folded
            γ = n * U / (1 - n * U)
            c = p @ self.layers.W[l]
            r = ((p_r * (1 + SHORT) + 2 * γ * (p.abs() + p_r)) @ self.W_abs[l]) * (1 + 2 * γ)
        return _Ranges(low, high, P_low, P_high)

    def _line(self, c: Tensor, low: Tensor, high: Tensor, l: int, switch: Tensor) -> forms.Line:
        """Along h = s0 a + (s1 - s0) max(a, 0) for a in [low, high]."""
        on, off = self._decided(_Ranges([low], [high], [], []), 0, switch)
        kinked = ~(on | off)
        low, high = torch.where(kinked, low, -1.0).clamp(max=0), torch.where(kinked, high, 1.0)
        steep = torch.where(kinked, high / (high - low), on.to(c.dtype)).nan_to_num(1.0, 1.0, 1.0)
        gap = torch.where(kinked, -0.5 * steep * low, 0.0) * (1 + SHORT)
        slope = self.s0[l] + self.rise[l] * steep
        at = slope * c + self.rise[l] * gap
        off_by = abs(self.rise[l]) * gap + SHORT * (at.abs() + (slope * c).abs() + gap)
        return forms.Line(slope, at, off_by)

    def narrowed(self, branches: Branches, x: Tensor, score: Tensor) -> Branches:
        return branches  # its ranges follow from the switches

    # --- the bound ---

    def bounded(self, branches: Branches) -> tuple[Tensor, Tensor, Tensor]:
        """The point is the mean of those at which the linear functions on the way are lowest, which
        goes to the solution of the linear programme."""
        ranges = self._ranges(branches)
        n, H = branches.switch.shape
        # The t of q, z and r, and β.
        free = self.c.new_tensor([0.5, 0.0, 0.5, 0.0]).view(4, 1, 1).repeat(1, n, H)
        best, best_free = self.c.new_full((n,), -torch.inf), free
        mean, square = torch.zeros_like(free), torch.zeros_like(free)
        total, counted = self.c.new_zeros(n, self.layers.d), 0
        for step in range(STEPS + 1):
            with torch.enable_grad():
                at = free.detach().requires_grad_()
                bound, _, x, _ = self._backward(branches, ranges, at)
                (g,) = torch.autograd.grad(bound.sum(), at)
            if step >= STEPS // 3 or not step:
                total, counted = (total if step > STEPS // 3 else 0 * total) + x, counted + 1
                counted = counted if step > STEPS // 3 else 1
            better = bound.detach() > best
            best = torch.where(better, bound.detach(), best)
            best_free = torch.where(better.view(1, -1, 1), free, best_free)
            if step == STEPS or bool((best > self.margin).all()):
                break
            mean.mul_(0.8).add_(g, alpha=0.2)
            square.mul_(0.95).addcmul_(g, g, value=0.05)
            # Adam's step, uphill.
            size = (square / (1 - 0.95 ** (step + 1))).sqrt_().add_(1e-12)
            rate = RATE * (1 - step / STEPS) + 0.02
            free = (free + rate / (1 - 0.8 ** (step + 1)) * mean / size).clamp_(min=0)
            free[:3].clamp_(max=1)
        with torch.no_grad():
            bound, size, _, weights = self._backward(branches, ranges, best_free)
            widest = max(*self.sizes, self.layers.d) + 64 + self.layers.folded
            bound = bound - 4 * U * widest * (len(self.sizes) + 2) * size
            box = self.box[branches.pair]
            x = (total / counted).maximum(self.lower[box]).minimum(self.upper[box])
            score = self._score(branches, ranges, weights, x)
        return bound.nan_to_num(-torch.inf, -torch.inf, -torch.inf), x, score.nan_to_num(0.0)

    def _score(
        self,
        branches: Branches,
        ranges: _Ranges,
        weights: list[Weights],
        x: Tensor,
    ) -> Tensor:
        """By how much the lines of z and r miss them at x."""
        found = []
        switches = branches.switch.split(self.sizes, 1)
        values = self.layers.values(x)[:-1]
        for l, (a, switch, (z, r, q)) in enumerate(zip(values, switches, weights, strict=True)):
            on, off = self._decided(ranges, l, switch)
            low, high = ranges.low[l].clamp(max=-1e-300), ranges.high[l].clamp(min=1e-300)
            a = a.maximum(low).minimum(high)
            over, under = (
                torch.where(a > 0, 1 - a / high, 0.0),
                torch.where(a > 0, 0.0, 1 - a / low),
            )
            missed = z.abs() * torch.where(z > 0, over, under) + q.abs() * torch.maximum(
                over, under
            )
            chord = high * (a - low) / (high - low) - a.clamp(min=0)
            missed = missed + r.clamp(max=0).abs() * chord + 1e-9 * (z.abs() + r.abs())
            found.append(torch.where(on | off, -1.0, missed))
        return torch.cat(found, 1)

    def _backward(
        self, branches: Branches, ranges: _Ranges, free: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, list[Weights]]:
        """The bound as it is rounded, the sizes of all terms that it was made of, by which it can
        be off a few units in the last place, the lowest point and the weights of z, r and q."""
        layers, s0, rise = self.layers, self.s0, self.rise
        box, of = self.box[branches.pair], self.q[branches.pair]
        switches = [s.double() for s in branches.switch.split(self.sizes, 1)]
        t_q, t_z, t_r, β = (part.split(self.sizes, 1) for part in free)
        last = len(self.sizes) - 1
        sign = self.constraints.signs[of].unsqueeze(1)
        row = sign * layers.W[-1][self.constraints.outputs[of]]
        decided = [self._decided(ranges, l, s) for l, s in enumerate(switches)]
        z_weights, q_sizes, weights = [], [], []
        # From the slope to the output: the weights of p, then of q, P and z. P has the sign in it.
        w = layers.W[0].mT[self.constraints.columns[of]]
        constant = size = w.new_zeros(len(w))
        for l in range(last + 1):
            on, off = decided[l]
            undecided = ~(on | off)
            P_low, P_high = ranges.P_low[l], ranges.P_high[l]
            P_size = torch.maximum(P_low.abs(), P_high.abs())
            q = torch.where(undecided, rise[l] * w, 0.0)
            P = torch.where(on, (s0[l] + rise[l]) * w, s0[l] * w)
            near = torch.where(q >= 0, P_low, P_high)
            far = torch.where(q >= 0, P_high, P_low)
            if l == last:  # a constant, but for how it was folded
                z = q * (0.5 * near + 0.5 * far)
                constant = constant - ((q.abs() + P.abs()) * (P_high - P_low)).sum(1)
            else:
                z = q * torch.lerp(far, near, t_q[l])
                constant = constant - (q * (1 - t_q[l]) * far).sum(1)
                P = P + q * (1 - t_q[l])
            size = size + 2 * ((q.abs() + P.abs() + w.abs()) * P_size).sum(1)
            z_weights.append(z)
            q_sizes.append(q.abs() * (P_high - P_low) if l < last else 0 * q)
            if l < last:
                w = P @ layers.W[l + 1].mT
                p_size = torch.maximum(ranges.P_low[l + 1].abs(), ranges.P_high[l + 1].abs())
                p_size = p_size * max(abs(s0[l + 1]), abs(s0[l + 1] + rise[l + 1]))
                size = size + ((P.abs() @ self.W_abs[l + 1].mT) * p_size).sum(1)
        constant = constant + (P * row).sum(1)
        # From the output to x: the weights of z, r and a.
        h = torch.zeros_like(P)
        for l in range(last, -1, -1):
            on, off = decided[l]
            undecided = ~(on | off)
            low, high = ranges.low[l], ranges.high[l]
            a_size = torch.maximum(low.abs(), high.abs())
            kinked = (low < 0) & (high > 0)
            low, high = torch.where(kinked, low, -1.0), torch.where(kinked, high, 1.0)
            z = z_weights[l]
            # z >= t a/u or z <= 1 - t a/l, rounded to the safe side.
            slope = torch.where(z >= 0, t_z[l] / high, t_z[l] / -low) * (1 - 8 * U)
            slope = torch.where(kinked, slope, 0.0)
            constant = constant + z.clamp(max=0).sum(1)
            r = torch.where(undecided, rise[l] * h, 0.0)
            steep = high / (high - low) * (1 + 8 * U)
            a = torch.where(on, (s0[l] + rise[l]) * h, s0[l] * h)
            a = a + z * slope + r * torch.where(r < 0, steep, t_r[l]) - β[l] * switches[l]
            constant = constant - (r.clamp(max=0) * steep * low).sum(1)
            made = z.abs() * slope + (1 + abs(s0[l]) + abs(rise[l])) * h.abs() + β[l]
            size = size + (z.abs() + made * a_size - r.abs() * steep * low).sum(1)
            weights.append((z, r, q_sizes[l]))
            W, b = layers.W[l], layers.b[l]
            constant = constant + a @ b
            h_size = self._h_size(l, box, ranges)
            size = size + (a.abs() * (b.abs() + h_size @ self.W_abs[l].mT)).sum(1)
            h = a @ W
        c, radius = self.c[box], self.r[box]
        bound = constant + (h * c).sum(1) - (h.abs() * radius).sum(1)
        size = size + (h.abs() * (c.abs() + radius)).sum(1)
        h = h.detach()
        x = torch.where(h > 0, self.lower[box], self.upper[box])
        x = torch.where(h == 0, 0.5 * self.lower[box] + 0.5 * self.upper[box], x)
        return bound, size, x, weights[::-1]

    def _decided(self, ranges: _Ranges, l: int, switch: Tensor) -> tuple[Tensor, Tensor]:
        """Which neurons are on and which off. One that may be 0 is on only where it was decided:
        at 0 PyTorch has it off, which is the other branch's."""
        off = (switch < 0) | (ranges.high[l] <= 0)
        return ((switch > 0) | (ranges.low[l] > 0)) & ~off, off

    def _h_size(self, l: int, box: Tensor, ranges: _Ranges) -> Tensor:
        """A bound of |h_{l-1}|, of |x| for the first layer."""
        if l == 0:
            return self.c[box].abs() + self.r[box]
        size = torch.maximum(ranges.low[l - 1].abs(), ranges.high[l - 1].abs())
        return size * max(abs(self.s0[l - 1]), abs(self.s0[l - 1] + self.rise[l - 1]))
