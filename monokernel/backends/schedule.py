"""When what of a program is computed: all that its nodes say whatever its operands.

In which order nodes run and which values they are done with, which values have a tangent, which
need a cotangent and how they come by it, what the forward saves and what the backward computes
again; and the blocks of rows that a backend walks over. ``handwritten.py`` and the Triton kernels
for programs follow it. The letters are those of ``handwritten.py``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from ..columns import Columns
from ..nodes import Rule, moving, rule, used
from ..problem import Problem, accumulate_dtype
from ..program import Node
from . import Params

__all__ = [
    "X2",
    "Down",
    "Facts",
    "Params",
    "Step",
    "WayDown",
    "blocks",
    "dtypes_of",
    "facts_of",
    "parameters_of",
    "saved_like",
    "way_down",
    "weight_of",
]

X2 = -1  # the number of the columns of x2, where they have cotangents of their own

# Elements of one activation block. On the CPU 2^18 (1 MiB of float32) keeps a block in the L2
# cache through a layer's element-wise passes; elsewhere only the temporaries' size is bounded.
BLOCK_ELEMENTS = {"cpu": 1 << 18}
BLOCK_ELEMENTS_ELSEWHERE = 1 << 26
FEWEST_ROWS = 256


class Step(NamedTuple):
    """A node that y depends on; it makes value v."""

    v: int
    node: Node
    rule: Rule
    linear: bool
    # The values that no later node reads. What is done with is let go at once: the next result
    # then lies in warm memory.
    spent: tuple[int, ...]


class Facts(NamedTuple):
    """What a program says of itself whatever its operands; the flags are by value."""

    widths: tuple[int, ...]
    steps: tuple[Step, ...]  # from x up
    moving: tuple[bool, ...]  # whether x2 reaches it
    uniform: tuple[bool, ...]  # whether its P is the same in every row
    kept: tuple[bool, ...]  # whether the backward has its g as gy∘P + q
    read: tuple[bool, ...]  # whether slopes read it: not where linear nodes alone do
    saved: tuple[int, ...]  # the values of linear nodes, but for y
    pulled: tuple[int, ...]  # the kept values to which linear nodes pull a P of N rows


def facts_of(problem: Problem) -> Facts:
    return _facts(problem.d, problem.nodes, problem.columns, problem.keeps_adjoint)


@lru_cache(maxsize=1024)
def _facts(d: int, nodes: tuple[Node, ...], columns: Columns, keeps_adjoint: bool) -> Facts:
    moves, y = moving(d, columns, nodes), len(nodes)
    trains = [False]  # whether there is a parameter at the value or below it
    for node in nodes:
        trains.append(bool(node.params) or any(trains[v] for v in node.inputs))
    # Below the lowest parameter only x wants a gradient, which nobody knows while the forward runs.
    kept = [keeps_adjoint and v > 0 and (moves[v] or trains[v]) for v in range(y + 1)]
    uniform, read = [True] * (y + 1), [False] * (y + 1)
    pulled, seen, steps = set[int](), set[int](), list[Step]()
    for i in reversed(used(nodes)):
        node, of, linear = nodes[i], rule(nodes[i]), nodes[i].kind == "linear"
        steps.insert(0, Step(i + 1, node, of, linear, tuple(set(node.inputs) - seen)))
        seen.update(node.inputs)
        read[i + 1] |= of.reads_v
        for v in node.inputs:
            uniform[v] &= uniform[i + 1] and not (of.varies or of.per_row)
            read[v] |= not linear
            if linear and kept[v] and not uniform[i + 1]:
                pulled.add(v)
    return Facts(
        widths=(d, *[node.width for node in nodes]),
        steps=tuple(steps),
        moving=moves,
        uniform=tuple(uniform),
        kept=tuple(kept),
        read=tuple(read),
        saved=tuple([step.v for step in steps if step.linear and step.v < y]),
        pulled=tuple(sorted(pulled)),
    )


class Down(NamedTuple):
    """A node on the way down from y. The flags of its inputs are in their order."""

    step: Step
    trained: bool  # whether its own parameters want a gradient
    direct: tuple[bool, ...]  # whether a gradient is wanted of the input, by its cotangent g,
    kept: tuple[bool, ...]  # or by gy∘P + q
    by_pairs: tuple[bool, ...]  # whether the pairs' chain goes on to it


class WayDown(NamedTuple):
    """What the backward walks over for the gradients that it is asked for."""

    nodes: tuple[Down, ...]  # those at or below which a gradient is wanted, from y down
    again: tuple[Step, ...]  # light nodes whose values are computed again, from x up
    tangents: tuple[Step, ...]  # nodes whose tangents the pairs need, from x up


def way_down(problem: Problem, needs: Sequence[bool]) -> WayDown:
    """For the gradients of x and of every parameter, where ``needs`` is true."""
    return _way_down(problem.d, problem.nodes, problem.columns, problem.keeps_adjoint, tuple(needs))


@lru_cache(maxsize=1024)
def _way_down(
    d: int, nodes: tuple[Node, ...], columns: Columns, keeps_adjoint: bool, needs: tuple[bool, ...]
) -> WayDown:
    facts = _facts(d, nodes, columns, keeps_adjoint)
    wanted = [needs[0]]  # of each value, whether a gradient is wanted at it or below
    for node in nodes:
        own = any(needs[1 + place] for place in node.params)
        wanted.append(own or any(wanted[v] for v in node.inputs))
    down, values, dots = list[Down](), set[int](), set[int]()
    for step in reversed(facts.steps):
        v, node, of = step.v, step.node, step.rule
        trained = any(needs[1 + place] for place in node.params)
        if of.per_row and trained:
            raise RuntimeError(f"mlp: expected a {node.kind} that is drawn, got one to be trained")
        moves = facts.moving[v]
        if wanted[v]:
            direct = tuple([wanted[u] and not facts.kept[u] for u in node.inputs])
            kept = tuple([wanted[u] and facts.kept[u] for u in node.inputs])
            by_pairs = tuple(
                [wanted[u] and (facts.kept[u] or (u > 0 and facts.moving[u])) for u in node.inputs]
            )
            down.append(Down(step, trained, direct, kept, by_pairs))
            if moves and (trained or of.curved):
                dots.update(node.inputs)
        if moves and v in dots:
            dots.update(node.inputs)
        used_on_the_way = wanted[v] if not step.linear else trained
        if used_on_the_way or (not step.linear and (v in values or v in dots)):
            values.update((*node.inputs, v) if of.reads_v else node.inputs)
    return WayDown(
        nodes=tuple(down),
        again=tuple([s for s in facts.steps if s.v in values and not s.linear]),
        tangents=tuple([s for s in facts.steps if s.v in dots and facts.moving[s.v]]),
    )


def saved_like(problem: Problem, x: Tensor) -> list[Tensor]:
    """Uninitialised buffers for what the backward needs again, in the order the forward fills them:

    the values (N, H) of linear nodes but for y itself, the cotangents (N, H) that they pull where
    the adjoint chain is kept, ∂penalty/∂J (N, D, k) when there is a hinge.
    """
    N, facts, dtypes = x.shape[0], facts_of(problem), dtypes_of(problem, x.dtype)
    saved = [
        x.new_empty(N, facts.widths[v], dtype=dtypes[v]) for v in (*facts.saved, *facts.pulled)
    ]
    if problem.hinge is not None:
        saved.append(x.new_empty(N, problem.D, problem.k, dtype=accumulate_dtype(x.dtype)))
    return saved


# Under autocast these are float32 whatever they read: autocast sees to it (on CUDA; to a root where
# it is written as a power), or a parameter that is none of a linear layer.
FULL = frozenset(
    ("normalise", "root_mean_square", "softmax", "log_softmax", "total", "scale", "shift", "exp",
     "log", "reciprocal", "softplus", "square", "sqrt")
)  # fmt: skip


def dtypes_of(problem: Problem, dtype: torch.dtype) -> tuple[torch.dtype, ...]:
    """The dtype that each value is stored in, and its tangents and cotangents, for x of a dtype."""
    return _dtypes(facts_of(problem), problem.cast or dtype, dtype)


@lru_cache(maxsize=1024)
def _dtypes(facts: Facts, cast: torch.dtype, dtype: torch.dtype) -> tuple[torch.dtype, ...]:
    found = [dtype] * len(facts.widths)
    read, lightly = set[int](), set[int]()
    for _, node, _, linear, _ in facts.steps:
        read.update(node.inputs)
        lightly.update(() if linear else node.inputs)
    for v, node, _, linear, _ in facts.steps:
        kept = node.kind not in FULL and all(found[u] is cast for u in node.inputs)
        # What linear nodes alone read they would round themselves.
        if linear or kept or (v in read and v not in lightly):
            found[v] = cast
    return tuple(found)


def blocks(problem: Problem, facts: Facts, x: Tensor) -> Iterator[slice]:
    fan = problem.k if problem.mode == "tangent" else problem.D
    budget = BLOCK_ELEMENTS.get(x.device.type, BLOCK_ELEMENTS_ELSEWHERE)
    size = max(FEWEST_ROWS, budget // max(1, fan * max(facts.widths)))
    for start in range(0, x.shape[0], size):
        yield slice(start, min(start + size, x.shape[0]))


def parameters_of(
    facts: Facts, params: Params, rows: slice | Tensor, x: Tensor
) -> dict[int, Params]:
    """θ of each value's node, for a block's rows of x."""
    found: dict[int, Params] = {}
    for v, node, of, *_ in facts.steps:
        θ: Params = [params[place] for place in node.params]
        if of.per_row:
            if isinstance(rows, slice):
                rows = torch.arange(rows.start, rows.stop, device=x.device)
            θ = of.at_rows(node, θ, rows, x.dtype)
        found[v] = θ
    return found


def weight_of(θ: Params) -> Tensor:
    """W of a linear node: never None, unlike a bias."""
    W = θ[0]
    assert W is not None
    return W
