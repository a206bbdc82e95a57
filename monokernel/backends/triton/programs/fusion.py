"""Light nodes that share a launch.

A scale, the norm before it and the shift after it are one launch: in the forward, in what the
backward computes again, in the pairs' tangents, and of their parameters' sums. The value of a
product that a sum alone reads, and of an activation that a product alone reads, is made by its
reader. The tangent of an activation of a linear node is an epilogue of the pairs' product.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from ...schedule import Params, Step
from . import light
from .nodes import BY_ROW, CURVES, At
from .operands import On, as_row, given, tensor_of, times

__all__ = ["Affine", "activations_of", "affine_of", "deferred_of", "ups"]


class Affine(NamedTuple):
    """A scale and what goes with it in one launch: the norm before it, if it alone reads it, and
    the shift after it, if that alone reads it."""

    norm: Step | None
    scale: Step
    shift: Step | None

    @property
    def first(self) -> Step:
        return self.norm or self.scale

    @property
    def last(self) -> Step:
        return self.shift or self.scale

    @property
    def parts(self) -> tuple[Step, ...]:
        return tuple([step for step in self if step is not None])

    def row(self, θ: dict[int, Params]) -> Tensor:
        """The scale."""
        return as_row(given(θ[self.scale.v][0]), self.scale.node.width)

    def pulling(self, at: At, θ: dict[int, Params]) -> At:
        """The first of them as what pulls for all: a shift changes no cotangent."""
        return at if self.norm is None else at._replace(scale=self.row(θ))

    def value(
        self, on: On, at: At, out: Tensor, θ: dict[int, Params], plain: Tensor | None
    ) -> None:
        """What they make of the input of ``at``, the first of them, in ``out``, and what the norm
        itself does in ``plain``."""
        u, row, shift = at.u[0], self.row(θ), None
        if self.shift is not None:
            shift = as_row(given(θ[self.shift.v][0]), self.shift.node.width)
        if self.norm is None:
            on.combine(out, given(tensor_of(u)), base=shift, factor=times(row))
            return
        on.by_row(
            out, given(tensor_of(u)), BY_ROW[at.node.kind], scale=row, shift=shift, plain=plain,
            epsilon=at.epsilon,
        )  # fmt: skip

    def push(
        self, on: On, at: At, t: Tensor, dtype: torch.dtype, θ: dict[int, Params],
        plain: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """The tangent of that dtype from t of their input, and that of the norm in ``plain``."""
        T, H, row = t.shape[0], at.node.width, self.row(θ)
        out = on.new(T, H, dtype, one_row=self.norm is None and t.dim() == 2)
        if self.norm is None:
            on.combine(out, t, factor=times(row))
        else:
            does, kind = light.PUSH.value, BY_ROW[at.node.kind]
            on.by_row(out, t, kind, does, u=at.u[0], scale=row, plain=plain, epsilon=at.epsilon)
        return out


def only_reader(steps: tuple[Step, ...]) -> Callable[[Step, str], Step | None]:
    """Which gives the step of that kind that alone reads a value, once."""
    readers: dict[int, list[Step]] = {}
    for step in steps:
        for u in step.node.inputs:
            readers.setdefault(u, []).append(step)

    def only(step: Step, kind: str) -> Step | None:
        after = readers.get(step.v, [])
        return after[0] if len(after) == 1 and after[0].node.kind == kind else None

    return only


@lru_cache(maxsize=1024)
def deferred_of(steps: tuple[Step, ...]) -> frozenset[int]:
    """The values that are made by their only reader: of the inputs of a product one at most."""
    only, found, reading = only_reader(steps), set[int](), set[int]()
    for step in steps:
        kind = step.node.kind
        if kind == "product" and only(step, "sum"):
            found.add(step.v)
        elif kind in CURVES:
            reader = only(step, "product")
            if reader is not None and reader.v not in reading:
                found.add(step.v)
                reading.add(reader.v)
    return frozenset(found)


@lru_cache(maxsize=1024)
def activations_of(steps: tuple[Step, ...]) -> dict[int, Step]:
    """By the value of a linear node the first activation of it: what it does to a tangent is the
    epilogue of the product."""
    linear = {step.v for step in steps if step.linear}
    found: dict[int, Step] = {}
    for step in steps:
        kind, u = step.node.kind, step.node.inputs[0]
        if kind in CURVES and u in linear:
            found.setdefault(u, step)
    return found


@lru_cache(maxsize=1024)
def affine_of(steps: tuple[Step, ...]) -> dict[int, Affine]:
    """By the number of its last value."""
    only = only_reader(steps)
    norms = {
        scale.v: norm
        for norm in steps
        if norm.node.kind in ("normalise", "root_mean_square")
        and (scale := only(norm, "scale")) is not None
    }
    every = [
        Affine(norms.get(step.v), step, only(step, "shift"))
        for step in steps
        if step.node.kind == "scale"
    ]
    return {one.last.v: one for one in every if one.norm or one.shift}


class Up(NamedTuple):
    """A step of the forward: a node, or a scale with what goes with it."""

    step: Step  # that makes the value
    affine: Affine | None
    spent: tuple[int, ...]


@lru_cache(maxsize=1024)
def ups(steps: tuple[Step, ...]) -> tuple[Up, ...]:
    affine, last = affine_of(steps), dict[int, int]()
    within = {s.v for a in affine.values() for s in a.parts if s is not a.last}
    found: list[Up] = []
    for step in steps:
        if step.v in within:
            continue
        of = affine.get(step.v)
        for u in (of.first if of else step).node.inputs:
            last[u] = len(found)
        found.append(Up(step, of, ()))
    spent: list[list[int]] = [[] for _ in found]
    for u, i in last.items():
        spent[i].append(u)
    return tuple([up._replace(spent=tuple(us)) for up, us in zip(found, spent, strict=True)])
