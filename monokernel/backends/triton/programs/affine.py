"""A norm and the scale and shift that follow it, as one step with one launch."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from torch import Tensor

from ...schedule import Params, Step
from . import light
from .nodes import BY_ROW, At
from .operands import On, Operand, as_row, given

__all__ = ["Affine", "affine_of", "ups"]


class Affine(NamedTuple):
    """A norm, the scale and the shift that it alone has after it: one launch for all of them."""

    norm: Step
    scale: Step
    shift: Step | None

    @property
    def last(self) -> Step:
        return self.shift or self.scale

    def row(self, θ: dict[int, Params]) -> Tensor:
        """The scale."""
        return as_row(given(θ[self.scale.v][0]), self.scale.node.width)

    def run(self, on: On, at: At, out: Tensor, P: Operand, does: int, θ: dict[int, Params],
            plain: Tensor | None = None) -> None:  # fmt: skip
        """Value or tangent (of P) in ``out``, that of the norm itself in ``plain``."""
        H = self.norm.node.width
        shift = None
        if self.shift is not None and does == light.VALUE.value:
            shift = as_row(given(θ[self.shift.v][0]), H)
        on.by_row(
            out, P, BY_ROW[self.norm.node.kind], does,
            u=None if does == light.VALUE.value else at.u[0],
            scale=self.row(θ), shift=shift, plain=plain, epsilon=at.epsilon,
        )  # fmt: skip


@lru_cache(maxsize=1024)
def affine_of(steps: tuple[Step, ...]) -> dict[int, Affine]:
    """By the number of its last value."""
    readers: dict[int, list[Step]] = {}
    for step in steps:
        for u in step.node.inputs:
            readers.setdefault(u, []).append(step)

    def only(step: Step | None, kind: str) -> Step | None:
        after = [] if step is None else readers.get(step.v, [])
        return after[0] if len(after) == 1 and after[0].node.kind == kind else None

    found: dict[int, Affine] = {}
    for norm in steps:
        if norm.node.kind in ("normalise", "root_mean_square"):
            scale = only(norm, "scale")
            if scale is not None:
                one = Affine(norm, scale, only(scale, "shift"))
                found[one.last.v] = one
    return found


class Up(NamedTuple):
    """A step of the forward: a node, or a norm with what follows it."""

    step: Step  # that makes the value
    affine: Affine | None
    spent: tuple[int, ...]


@lru_cache(maxsize=1024)
def ups(steps: tuple[Step, ...]) -> tuple[Up, ...]:
    affine, last = affine_of(steps), dict[int, int]()
    within = {s.v for a in affine.values() for s in (a.norm, a.scale) if s is not a.last}
    found: list[Up] = []
    for step in steps:
        if step.v in within:
            continue
        of = affine.get(step.v)
        for u in (of.norm if of else step).node.inputs:
            last[u] = len(found)
        found.append(Up(step, of, ()))
    spent: list[list[int]] = [[] for _ in found]
    for u, i in last.items():
        spent[i].append(u)
    return tuple([up._replace(spent=tuple(us)) for up, us in zip(found, spent, strict=True)])
