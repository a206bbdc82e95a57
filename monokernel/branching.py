"""Branch and bound over boxes: what the bounds of ``forms`` leave open is cut and tried again.

The boxes of all verdicts are one list. A round takes some from its end, bounds every slope that is
open there, cheapest tier first, keeps of each box what may lie below the margin (its linear form
says which part that is) and halves it along the column that is most to blame. The corner where a
form is lowest is a point to look for a violation at.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from . import forms, quadratic
from .enclosures import Slopes, U
from .forms import AFFINE, INTERVALS, LINEAR, QUADRATIC, TIERS
from .layers import Layers, Straight

__all__ = [
    "Boxes",
    "Branches",
    "Constraints",
    "Crew",
    "Found",
    "endless",
    "extent",
    "middle",
    "search",
]

# Boxes at a time, by tier: about what keeps a pass over the forms in the cache.
AT_A_TIME = {INTERVALS: 512, AFFINE: 256, LINEAR: 128, QUADRATIC: 1024}
# About what a box costs by each tier. One that decides too few to pay for itself is passed over,
# and asked again every so many rounds.
COST = {INTERVALS: 1.0, AFFINE: 6.0, LINEAR: 15.0, QUADRATIC: 1.5}
BY_PYTORCH = 12.0  # the last of them without the native library
AGAIN = 32
SLACK = 1e-9  # relative; cuts are wider by it than rounding could make them
STEEP = 0.4  # what a linear change counts beside an error of its size in the choice of a column


class Constraints(NamedTuple):
    """Q constraints sign·∂y_output/∂x_column >= margin: the first three are (Q,)."""

    outputs: Tensor
    columns: Tensor
    signs: Tensor
    margin: float


class Boxes(NamedTuple):
    """n boxes to be decided: their ends (n, d), the verdict that each belongs to (n,), which
    constraints are open there (n, Q), and lower bounds of them (n, Q)."""

    lower: Tensor
    upper: Tensor
    owner: Tensor
    wanted: Tensor
    known: Tensor

    def at(self, rows: Tensor | slice) -> Boxes:
        return Boxes(*(t[rows] for t in self))

    @staticmethod
    def joined(parts: list[Boxes]) -> Boxes:
        return parts[0] if len(parts) == 1 else Boxes(*map(torch.cat, zip(*parts, strict=True)))


class Branches(NamedTuple):
    """n branches: the pair (n,) of box and constraint that each is of, its decided switches (n, H)
    of all hidden neurons, +1 on, -1 off, 0 open, what a lies in there as far as the slope is below
    the margin (n, H) twice, and the bound of its parent (n,)."""

    pair: Tensor
    switch: Tensor
    low: Tensor
    high: Tensor
    known: Tensor

    def at(self, rows: Tensor | slice) -> Branches:
        return Branches(*(t[rows] for t in self))

    @staticmethod
    def joined(parts: list[Branches]) -> Branches:
        return parts[0] if len(parts) == 1 else Branches(*map(torch.cat, zip(*parts, strict=True)))

    def decided(self, neuron: Tensor, way: int) -> Branches:
        """With one more switch (n, 1) decided in each."""
        low, high = self.low, self.high
        if way > 0:
            low = low.scatter(1, neuron, low.gather(1, neuron).clamp(min=0))
        else:
            high = high.scatter(1, neuron, high.gather(1, neuron).clamp(max=0))
        way_ = torch.full_like(neuron, way, dtype=self.switch.dtype)
        return self._replace(switch=self.switch.scatter(1, neuron, way_), low=low, high=high)


class Found(NamedTuple):
    """Lower bounds (B, Q) over each of B boxes, what is left open, how many boxes were bounded, and
    how many constraints each tier proved in them."""

    lower: Tensor
    left: Boxes
    boxes: int
    proved: dict[str, int]


class Step(NamedTuple):
    """What it came to that some boxes were bounded: lower bounds (B, Q) over what was decided,
    infinite where nothing was, of how many constraints, and the boxes that are still open. Of the
    last tier also a point in each to try, its verdict and its constraint, and the boxes to go on
    with: both halves of what may violate, and those that no number lies inside of."""

    lower: Tensor
    proved: int
    boxes: Boxes
    point: tuple[Tensor, Tensor, Tensor]
    halves: Boxes
    whole: Boxes


Part = TypeVar("Part")
Result = TypeVar("Result")

# Of points x (n, d), the verdicts (n,) and the constraints (n,) they are for: a mask (B,) of the
# verdicts that are "violated" by now.
Witness = Callable[[Tensor, Tensor, Tensor], Tensor]


def middle(lower: Tensor, upper: Tensor) -> Tensor:
    """A number between both ends, finite also where one of them is not: in the middle, at 0 of all
    numbers, and twice as far out as the end of what has one."""
    far = torch.where(upper.isinf(), 2 * lower.clamp(min=0) + 1, 2 * upper.clamp(max=0) - 1)
    far = torch.where(lower.isinf() & upper.isinf(), 0.0, far)
    return torch.where(lower.isfinite() & upper.isfinite(), 0.5 * lower + 0.5 * upper, far)


def endless(lower: Tensor, upper: Tensor) -> Tensor:
    """Which of the boxes (n,) have an end that is infinite."""
    return (lower.isinf() | upper.isinf()).any(1)


def extent(lower: Tensor, upper: Tensor, squeezed: Tensor) -> Tensor:
    """How wide the columns of the boxes are (n, d): of those ``squeezed`` (n,) by a measure of all
    numbers that is finite, x / (1 + |x|)."""
    low, high = ((x / (1 + x.abs())).nan_to_num(1.0).copysign(x) for x in (lower, upper))
    return torch.where(squeezed.unsqueeze(1), high - low, upper - lower)


def search(
    layers: Layers | Straight,
    constraints: Constraints,
    start: Boxes,
    verdicts: int,
    witness: Witness,
    deadline: float,
    tell: Callable[[int, int], None],
) -> Found:
    """Decides the boxes of ``start``, as far as there is time until ``deadline`` of
    ``time.monotonic``; a verdict that is violated is followed no further. ``tell`` hears after
    every round how many boxes were bounded and how many are open."""
    lower = start.lower.new_full((verdicts, len(constraints.signs)), torch.inf)
    stack, stuck, boxes = [start] if len(start.owner) else [], list[Boxes](), 0
    with Crew(start.lower.device) as crew:
        tiers = _Tiers(layers, start, crew)
        while stack and time.monotonic() < deadline:
            taken = _taken(stack, tiers.at_a_time)
            boxes += len(taken.owner)
            steps = tiers.bounded(layers, constraints, taken, lower)
            if steps:
                points = zip(*(of.point for of in steps), strict=True)
                violated = witness(*(torch.cat(part) for part in points))
                stack += [of.halves for of in steps]
                stuck += [of.whole for of in steps if len(of.whole.owner)]
                if violated.any():
                    for parts in (stack, stuck):
                        for i, left in enumerate(parts):
                            _lower(lower, left.at(violated[left.owner]))
                            parts[i] = left.at(~violated[left.owner])
                stack = [left for left in stack if len(left.owner)]
            tell(boxes, sum(len(left.owner) for left in stack))
    left = Boxes.joined([start.at(slice(0, 0)), *stack, *stuck])
    _lower(lower, left)
    return Found(lower, left, boxes, tiers.proved)


def _taken(stack: list[Boxes], n: int) -> Boxes:
    """The last n boxes, or as many as there are, taken from the stack."""
    parts: list[Boxes] = []
    while stack and n > 0:
        part = stack.pop()
        if len(part.owner) > n:
            stack.append(part.at(slice(n, None)))
            part = part.at(slice(0, n))
        parts.append(part)
        n -= len(part.owner)
    return Boxes.joined(parts)


def _lower(lower: Tensor, boxes: Boxes, wanted: Tensor | None = None) -> None:
    """Takes the bounds of the boxes' open constraints into those of their verdicts (B, Q)."""
    wanted = boxes.wanted if wanted is None else wanted
    known = torch.where(wanted, boxes.known, torch.inf)
    lower.scatter_reduce_(0, boxes.owner.unsqueeze(1).expand_as(known), known, "amin")


class Crew:
    """Threads that bound boxes side by side, as many as PyTorch has on the CPU, with one each for
    its operations: those are too small to be shared out."""

    def __init__(self, device: torch.device) -> None:
        self.threads = torch.get_num_threads() if device.type == "cpu" else 1
        self._pool: ThreadPoolExecutor | None = None

    def __enter__(self) -> Crew:
        if self.threads > 1:
            self._pool = ThreadPoolExecutor(self.threads)
            torch.set_num_threads(1)
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown()
            torch.set_num_threads(self.threads)

    def map(self, of: Callable[[Part], Result], parts: Sequence[Part]) -> list[Result]:
        if self._pool is None or len(parts) == 1:
            return [of(part) for part in parts]
        return list(self._pool.map(of, parts))


class _Tiers:
    """Which tiers are asked, and what they proved."""

    def __init__(self, layers: Layers | Straight, start: Boxes, crew: Crew) -> None:
        self.crew = crew
        self.intervals_alone = isinstance(layers, Straight)
        few = int((start.lower < start.upper).any(0).sum()) <= quadratic.MOST_COLUMNS
        smooth = isinstance(layers, Layers) and quadratic.serves(layers)
        self.last = QUADRATIC if smooth and few else LINEAR
        self.cost = COST | ({} if quadratic.native(start.lower) else {QUADRATIC: BY_PYTORCH})
        self.proved = dict.fromkeys(TIERS, 0)
        self.share = {INTERVALS: 1.0, AFFINE: 1.0}
        self.rounds = 0

    @property
    def at_a_time(self) -> int:
        return AT_A_TIME[min(self._asked())] * self.crew.threads

    def _asked(self) -> list[int]:
        asked = [self.last]
        if self.intervals_alone:
            return asked
        for tier in (AFFINE, INTERVALS):
            share = 1.0 if self.rounds % AGAIN == 0 else self.share[tier]
            if share * self.cost[asked[0]] > self.cost[tier]:
                asked.insert(0, tier)
        return asked

    def bounded(
        self,
        layers: Layers | Straight,
        constraints: Constraints,
        boxes: Boxes,
        lower: Tensor,
    ) -> list[Step]:
        """Cheapest first, to what is still open after each; nothing where nothing is. Bounds of
        what was decided go into ``lower``."""
        steps = list[Step]()
        asked = self._asked()
        self.rounds += 1
        for tier in asked:
            if not (before := len(boxes.owner)):
                return []
            n = min(AT_A_TIME[tier], -(-before // self.crew.threads))
            few = [boxes.at(slice(i, i + n)) for i in range(0, before, n)]
            step = partial(_step, layers, constraints, tier, tier == self.last, lower)
            steps = self.crew.map(step, few)
            for of in steps:
                torch.minimum(lower, of.lower, out=lower)
            name = TIERS[INTERVALS if self.intervals_alone else tier]
            self.proved[name] += sum(of.proved for of in steps)
            boxes = Boxes.joined([of.boxes for of in steps])
            if tier in self.share:
                share = 1 - len(boxes.owner) / before
                self.share[tier] = 0.7 * self.share[tier] + 0.3 * share
        return steps if len(boxes.owner) else []


def _step(
    layers: Layers | Straight,
    constraints: Constraints,
    tier: int,
    last: bool,
    lower: Tensor,
    boxes: Boxes,
) -> Step:
    found, lower = _bounds(layers, constraints, tier, boxes), torch.full_like(lower, torch.inf)
    boxes = boxes._replace(known=torch.maximum(boxes.known, found.lower))
    done = boxes.wanted & (boxes.known >= constraints.margin)
    _lower(lower, boxes, done)
    boxes = boxes._replace(wanted=boxes.wanted & ~done)
    still = boxes.wanted.any(1)
    boxes, found = boxes.at(still), found.at(still)
    proved = int(done.sum())
    if not last:
        none = boxes.at(slice(0, 0))
        return Step(lower, proved, boxes, (none.lower, none.owner, none.owner), none, none)
    point = _corners(constraints, boxes, found)
    return Step(lower, proved, boxes, point, *_halves(constraints, boxes, found, lower))


def _bounds(layers: Layers | Straight, constraints: Constraints, tier: int, boxes: Boxes) -> Slopes:
    """The forms of all constraints over the boxes; where one is not open, of whatever there is."""
    found = Slopes.unknown(boxes.lower, len(constraints.signs))
    for output in constraints.outputs.unique().tolist():
        of = (constraints.outputs == output).nonzero().flatten()
        rows = boxes.wanted[:, of].any(1).nonzero().flatten()
        if len(rows):
            columns = constraints.columns[of]
            lower, upper, open_ = boxes.lower[rows], boxes.upper[rows], boxes.wanted[rows][:, of]
            s = forms.slopes(layers, lower, upper, output, columns, tier, open_)
            found.put(rows, of, s.times(constraints.signs[of]))
    return found


def _worst(boxes: Boxes) -> Tensor:
    """The open constraint (n,) of the lowest bound in each box."""
    return torch.where(boxes.wanted, boxes.known, torch.inf).argmin(1)


def _corners(constraints: Constraints, boxes: Boxes, form: Slopes) -> tuple[Tensor, Tensor, Tensor]:
    """Where the form of each box's worst constraint is lowest: points, verdicts, constraints."""
    q = _worst(boxes)
    rows = torch.arange(len(q), device=q.device)
    slant, bend = form.slant[rows, :, q], form.bend[rows, :, q]
    between = middle(boxes.lower, boxes.upper)
    x = torch.where(slant > 0, boxes.lower, torch.where(slant < 0, boxes.upper, between))
    inside = slant.abs() < 4 * bend
    r = 0.5 * boxes.upper - 0.5 * boxes.lower
    turn = (between - slant / (4 * bend).where(inside, 1.0) * r).clamp(boxes.lower, boxes.upper)
    return torch.where(inside, turn, x), boxes.owner, q


def _halves(
    constraints: Constraints, boxes: Boxes, form: Slopes, lower: Tensor
) -> tuple[Boxes, Boxes]:
    """Both halves of what may violate in each box, and the boxes that no number lies inside of."""
    if not len(boxes.owner):
        return boxes, boxes
    low, high = _cuts(constraints, boxes, form)
    m, r = middle(boxes.lower, boxes.upper), 0.5 * (boxes.upper - boxes.lower)
    # Rounded outward; what is cut off lies above the margin in every open constraint.
    off = 4 * U * (m.abs() + r)
    new_lower = torch.maximum(boxes.lower, m + low * r - off)
    new_upper = torch.minimum(boxes.upper, m + high * r + off)
    new_upper = torch.maximum(new_lower, new_upper)
    cut = ((new_lower > boxes.lower) | (new_upper < boxes.upper)).any(1, keepdim=True)
    _lower(
        lower,
        boxes._replace(known=torch.full_like(boxes.known, constraints.margin)),
        boxes.wanted & cut,
    )
    boxes = boxes._replace(lower=new_lower, upper=new_upper)
    rows = torch.arange(len(boxes.owner), device=r.device)
    q = _worst(boxes)
    share = (new_upper - new_lower) / (2 * r)
    score = (form.blame[rows, :, q] + STEEP * form.slant[rows, :, q].abs()) * share.nan_to_num(0.0)
    between = middle(new_lower, new_upper)
    inside = (between > new_lower) & (between < new_upper)
    # Where no form tells one column from another, the widest.
    wide = extent(new_lower, new_upper, endless(new_lower, new_upper))
    score = torch.where(inside, score + 1e-9 * wide, -1.0)
    best, column = score.max(1)
    whole = boxes.at(best < 0)
    boxes, column, between = (boxes.at(best >= 0), column[best >= 0], between[best >= 0])
    at = between.gather(1, column.unsqueeze(1))
    return (
        Boxes.joined(
            [
                boxes._replace(upper=boxes.upper.scatter(1, column.unsqueeze(1), at)),
                boxes._replace(lower=boxes.lower.scatter(1, column.unsqueeze(1), at)),
            ]
        ),
        whole,
    )


def _cuts(constraints: Constraints, boxes: Boxes, form: Slopes) -> tuple[Tensor, Tensor]:
    """The part of each box, in half-widths (n, d) twice, that holds every point where an open
    constraint can be below the margin. A form that rises by ρ or more with ε_i is at ε_i at least
    its lower bound and ρ (1 + ε_i)."""
    size, t = form.rise, constraints.margin - form.lower
    whole = form.centre.abs() + form.error + (form.slant.abs() + form.bend.abs()).sum(1)
    t = t + SLACK * (abs(constraints.margin) + whole)
    end = (t.unsqueeze(1) / size - 1).clamp(min=-1)  # of ε_i, or of -ε_i where the form falls
    end = torch.where(size > 0, end, torch.inf)
    # Of a constraint that is not open nothing has to be kept.
    end = torch.where(boxes.wanted.unsqueeze(1), end, -torch.inf)
    high = torch.where(form.slant > 0, end, torch.where(boxes.wanted.unsqueeze(1), 1.0, -1.0))
    low = torch.where(form.slant < 0, -end, torch.where(boxes.wanted.unsqueeze(1), -1.0, 1.0))
    return low.amin(2).clamp(-1, 1), high.amax(2).clamp(-1, 1)
