"""Branch and bound over the switches of a network of ReLUs or LeakyReLUs: each on or off.

Between its kinks such a network is linear, so its slopes change where a neuron switches and nowhere
else. Neurons are decided one by one, until a bound of the slope in each branch is no less than the
margin. With one hidden layer the bounds are those of ``one_layer``, of many branches at once; with
several the native library does it all, as ``several_layers`` says.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from . import several_layers
from .branching import Boxes, Branches, Constraints, Crew, Witness
from .layers import Layers
from .one_layer import OneLayer

__all__ = ["METHOD", "Split", "search", "serves"]

METHOD = "neuron splitting"
AT_A_TIME = 512  # small operations: with 128 they took twice as long
KINDS = ("relu", "leaky_relu")


class Split(NamedTuple):
    """Lower bounds (B, Q), the boxes that are not decided, and how many branches were bounded and
    proved."""

    lower: Tensor
    left: Boxes
    boxes: int
    proved: int


def serves(layers: Layers) -> bool:
    """Whether the network is one of such neurons, with a hidden layer, and nothing behind."""
    *hidden, last = layers.σ
    ours = bool(hidden) and last.kind == "identity" and all(σ.kind in KINDS for σ in hidden)
    return ours and (len(hidden) == 1 or several_layers.serves())


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
    if len(layers.W) > 2:
        least, open_, count, proved = several_layers.search(
            layers, constraints, start, witness, deadline, tell
        )
        _lower(lower, start.owner[box], q, least)
        return Split(lower, _left(start, box[open_], q[open_], least[open_]), count, proved)
    return _one_layer(layers, constraints, start, lower, witness, deadline, tell)


def _one_layer(
    layers: Layers,
    constraints: Constraints,
    start: Boxes,
    lower: Tensor,
    witness: Witness,
    deadline: float,
    tell: Callable[[int, int], None],
) -> Split:
    """Many branches at a time; ``lower`` takes the bounds."""
    box, q = start.wanted.nonzero(as_tuple=True)
    bounds = OneLayer(layers, constraints, start, box, q)
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
    rest = Branches.joined([*stack, *stuck]) if stack or stuck else None
    if rest is None:
        return Split(lower, start.at(slice(0, 0)), count, proved)
    _lower(lower, start.owner[box[rest.pair]], q[rest.pair], rest.known)
    return Split(lower, _left(start, box[rest.pair], q[rest.pair], rest.known), count, proved)


def _left(start: Boxes, box: Tensor, q: Tensor, known: Tensor) -> Boxes:
    """The boxes of these pairs, with the lowest bound of each pair."""
    wanted = torch.zeros_like(start.wanted)
    wanted[box, q] = True
    lowest = torch.full_like(start.known, torch.inf)
    _lower(lowest, box, q, known)
    return start._replace(wanted=wanted, known=lowest).at(wanted.any(1))


def _parts(branches: Branches) -> list[slice]:
    n = len(branches.pair)
    return [slice(i, i + AT_A_TIME) for i in range(0, max(n, 1), AT_A_TIME)]


def _narrowed(
    crew: Crew, bounds: OneLayer, branches: Branches, x: Tensor, score: Tensor
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
