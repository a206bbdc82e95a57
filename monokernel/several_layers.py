"""Branch and bound over the switches of a network with several hidden layers of (Leaky)ReLUs.

Between its kinks such a network is linear, so its slopes change where a neuron switches and nowhere
else. With z in {0, 1} the switch of a neuron, r = max(a, 0) and q = P z,

    h = s0 a + (1 - s0) r,      p = s0 P + (1 - s0) q,      a_l = W_l h_{l-1} + b_l,
    P_{l-1} = W_lᵀ p_l,         ∂y/∂x_c = ⟨W_1 e_c, p_1⟩

is exact, and linear but for r, z and q of the undecided neurons. For those hold, with a in [l, u]
and P in [P⁻, P⁺],

    q >= P⁻ z,    q >= P - P⁺ (1 - z),      q <= P⁺ z,    q <= P - P⁻ (1 - z),
    z >= 0,       z >= a / u,               z <= 1,       z <= 1 - a / l,
    r >= 0,       r >= a,                   r <= u (a - l) / (u - l),

so choosing one of each pair, whichever is closer at some x, and running backward from the slope to
x gives a linear function of x below it; and so for every a of a later layer.

A branch is a polytope: the box, a half-space a >= 0 or a <= 0 for each neuron that was decided, and
⟨g, x⟩ + g0 <= margin for each linear function found below the slope, for only there can the slope
be below the margin. Over it the range of every open neuron and the least value of such a function
are linear programmes in the columns of x, small enough for the simplex method: ranges that end on
one side of 0 decide their neurons, the others are closer to the polytope the smaller it gets, and
where it is empty, or the least value no less than the margin, the branch is proved. Of a neuron of
a later layer the half-space is that of a linear function below or above a, and is moved where the
layers before it are known better. Where all neurons are decided all of this is exact.

What is proved rests on the programmes' multipliers alone. Any are right: the bound is that of weak
duality, Σ λ_r (⟨g_r, x⟩ - g0_r) <= 0 for every λ >= 0, with its rounding bounded by the sizes of
what it was made of. The native library does it (``csrc/switches.cpp``).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from .branching import Boxes, Constraints, Crew, Witness
from .enclosures import U
from .layers import Layers

if TYPE_CHECKING:
    from .backends import cpu

__all__ = ["search", "serves"]

BRANCHES = 32  # of one run: some milliseconds
SIDE_BY_SIDE = 8  # searches for each thread


class _Going(NamedTuple):
    """A search, the pair of box and constraint that it is of, and how many branches are open."""

    search: cpu.Search
    pair: int
    open: int


def serves() -> bool:
    """Whether the native library is there."""
    from .backends import cpu  # opened when it is first of use

    return not cpu.missing()


def search(
    layers: Layers,
    constraints: Constraints,
    start: Boxes,
    witness: Witness,
    deadline: float,
    tell: Callable[[int, int], None],
) -> tuple[Tensor, Tensor, int, int]:
    """Decides every pair of box and open constraint, in the order of ``start.wanted.nonzero()``.

    Returns their lower bounds (n,), which of them are left open (n,), and how many branches were
    bounded and proved. Those of a verdict that is violated are followed no further.
    """
    place, margin = start.lower.device, constraints.margin
    box, q = (t.tolist() for t in start.wanted.nonzero(as_tuple=True))
    owner = start.owner[box].tolist()
    make = _Maker(layers.to(torch.device("cpu")), constraints, start)
    # Of each pair what is finished of it, and whether anything else is left.
    least, left = [margin] * len(q), [False] * len(q)
    waiting, going = list(range(len(q)))[::-1], list[_Going]()
    violated = [False] * (max(owner, default=-1) + 1)
    count = proved = 0

    def run(of: _Going) -> cpu.Run:
        return of.search.run(BRANCHES, deadline - time.monotonic())

    with Crew(torch.device("cpu")) as crew:
        while (waiting or going) and time.monotonic() < deadline:
            while waiting and len(going) < SIDE_BY_SIDE * crew.threads:
                pair = waiting.pop()
                if violated[owner[pair]]:
                    least[pair] = -torch.inf
                else:
                    going.append(_Going(make(box[pair], q[pair]), pair, 1))
            going += _shared(going, crew.threads)
            runs = crew.map(run, going)
            pairs = [of.pair for of, some in zip(going, runs, strict=True) for _ in some.points]
            if pairs:
                rows = torch.tensor([box[pair] for pair in pairs])
                x = make.inside(rows, torch.cat([some.points for some in runs]))
                of_q = torch.tensor([q[pair] for pair in pairs], device=place)
                violated = witness(x.to(place), start.owner[rows.to(place)], of_q).tolist()
            after = list[_Going]()
            for of, some in zip(going, runs, strict=True):
                count, proved = count + some.bounded, proved + some.proved
                if some.open and not violated[owner[of.pair]]:
                    after.append(of._replace(open=some.open))
                else:
                    least[of.pair] = min(least[of.pair], some.least)
                    left[of.pair] |= some.least < margin
            going = after
            tell(count, sum(of.open for of in going) + len(waiting))
    for of in going:
        least[of.pair], left[of.pair] = min(least[of.pair], of.search.run(0, 0.0).least), True
    for pair in waiting:
        least[pair], left[pair] = -torch.inf, True
    found = torch.tensor(least, dtype=torch.float64, device=place)
    known = start.known[box, q].clamp(max=margin)
    over = [some and not violated[owner[pair]] for pair, some in enumerate(left)]
    return (
        torch.maximum(found, known),
        torch.tensor(over, dtype=torch.bool, device=place),
        count,
        proved,
    )


def _shared(going: list[_Going], threads: int) -> list[_Going]:
    """More searches while there are fewer than threads, out of those with the most to do."""
    more = list[_Going]()
    for of in sorted(going, key=lambda of: -of.open):
        if len(going) + len(more) >= threads:
            break
        other = of.search.split()
        more += [] if other is None else [_Going(other, of.pair, of.open)]
    return more


class _Maker:
    """Begins the search of a pair."""

    def __init__(self, layers: Layers, constraints: Constraints, start: Boxes) -> None:
        from .backends import cpu

        left = [σ.p if σ.kind == "leaky_relu" else 0.0 for σ in layers.σ[:-1]]
        self.chain = cpu.Piecewise(layers.W[:-1], layers.b[:-1], left, layers.folded)
        self.layers, self.margin = layers, constraints.margin
        self.outputs, self.columns, self.signs = (t.cpu() for t in constraints[:3])
        self.lower, self.upper = start.lower.cpu(), start.upper.cpu()
        middle = 0.5 * self.lower + 0.5 * self.upper
        c, r = middle, torch.maximum(self.upper - middle, middle - self.lower) * (1 + 2 * U)
        for offset in layers.offsets:
            c = c + offset
            r = (r + 2 * U * c.abs()) * (1 + 2 * U)
        self.c, self.r, self.shift = c, r, c - middle

    def __call__(self, box: int, q: int) -> cpu.Search:
        row = self.signs[q] * self.layers.W[-1][self.outputs[q]]
        column = self.layers.W[0][:, self.columns[q]]
        moving = (self.lower[box] < self.upper[box]).nonzero().flatten().tolist()
        return self.chain.search(row, column, self.margin, self.c[box], self.r[box], moving)

    def inside(self, box: Tensor, x: Tensor) -> Tensor:
        """Points of the search as points of their boxes."""
        return (x - self.shift[box]).maximum(self.lower[box]).minimum(self.upper[box])
