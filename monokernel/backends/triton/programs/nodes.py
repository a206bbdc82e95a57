"""What a light node does to stacks: value, push, and of what its curvature is.

What it pulls is in ``cotangents.py``, where it is added to what is there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ....activations import ACTIVATIONS
from ....nodes import columns_of
from ....program import Node
from ...schedule import Params, Step
from . import light
from .operands import (
    ONE,
    Deferred,
    Factor,
    OfRows,
    On,
    Operand,
    activated,
    as_row,
    given,
    is_one_row,
    slope_of,
    tensor_of,
    times,
)

__all__ = [
    "BY_ROW",
    "CURVES",
    "At",
    "at_step",
    "bent",
    "deferred",
    "linear_push",
    "push",
    "value_of",
]

BY_ROW = {
    "normalise": light.NORMALISE.value,
    "root_mean_square": light.ROOT_MEAN_SQUARE.value,
    "softmax": light.SOFTMAX.value,
    "log_softmax": light.LOG_SOFTMAX.value,
}
CURVES = ACTIVATIONS.keys() - {"identity"}  # activations with a slope of their own
OF_VALUE = ("softmax", "log_softmax")  # their Jacobian is known from v


class At(NamedTuple):
    """A light node with what it reads, and the dtype of what it makes. In the place of inputs that
    are ``deferred`` it has something of as many columns. A norm may have the scale after it in what
    it pulls."""

    node: Node
    u: list[Operand]
    v: Operand
    θ: Params
    dtype: torch.dtype
    deferred: dict[int, Deferred]
    scale: Operand | None = None

    @property
    def parameter(self) -> Operand:
        """Of a scale, shift or PReLU; the mask of a dropout, with one for each row."""
        θ: Tensor = given(self.θ[0])
        return as_row(θ, self.node.width) if θ.dim() == 1 else OfRows(θ.unsqueeze(0))

    def factor(self, i: int) -> tuple[Factor, float]:
        """How an element-wise node's input i enters its tangent: a factor and a number."""
        kind, numbers = self.node.kind, self.node.numbers
        if kind in ("scale", "dropout"):
            return times(self.parameter), 1.0
        if kind == "prelu":
            return Factor(light.KINK.value, self.u[0], self.parameter), 1.0
        if kind == "product":
            other = self.deferred.get(1 - i)
            return times(self.u[1 - i]) if other is None else other.factor, 1.0
        if kind == "line":
            return ONE, numbers[0]
        if kind == "sum":
            return ONE, numbers[i]
        if kind in CURVES:
            return slope_of(self.node, self.u[0]), 1.0
        return ONE, 1.0  # shift, identity

    @property
    def epsilon(self) -> float:
        return self.node.numbers[0] if self.node.numbers else 0.0

    @property
    def point(self) -> Operand:
        """Where a node that looks at whole rows has its Jacobian."""
        return self.v if self.node.kind in OF_VALUE else self.u[0]


def at_step(
    step: Step,
    values: dict[int, Tensor],
    made_later: dict[int, Deferred],
    θ: dict[int, Params],
    dtypes: Sequence[torch.dtype],
) -> At:
    """The light node among the values of a block of rows."""
    u: list[Operand] = []
    later: dict[int, Deferred] = {}
    for i, at in enumerate(step.node.inputs):
        if at in made_later:
            later[i] = made_later[at]
        u.append(later[i].as_wide if i in later else OfRows(values[at]))
    v = values.get(step.v)
    return At(step.node, u, u[0] if v is None else OfRows(v), θ[step.v], dtypes[step.v], later)


def deferred(at: At) -> Deferred:
    """v, for its reader to make."""
    if at.node.kind in ACTIVATIONS:
        return Deferred(activated(at.node, at.u[0]))
    i = next(iter({0, 1} - at.deferred.keys()))  # of a product
    return Deferred(at.factor(i)[0], at.u[i])


def value_of(on: On, at: At) -> Tensor:
    """v; a view of its input where that is all it is."""
    node, H = at.node, at.node.width
    kind, u = node.kind, [given(tensor_of(t)) for t in at.u]
    if kind in BY_ROW or kind == "total":
        out = on.new(1, H, at.dtype)
        on.by_row(out, u[0], BY_ROW.get(kind, light.SUM.value), epsilon=at.epsilon)
    elif kind in ("columns", "expand", "concat", "identity", "sum"):
        return linear_push(on, at, u, values=True)
    else:
        out = on.new(1, H, at.dtype)
        if kind in ACTIVATIONS:
            on.combine(None, None, factor=slope_of(node, u[0]), value=out)
        elif kind == "product":
            made = deferred(at)
            on.combine(out, made.t, factor=made.factor)
        elif kind == "shift":
            on.combine(out, u[0], base=at.parameter)
        else:
            factor, c = at.factor(0)
            on.combine(out, u[0], c=c, constant=node.numbers[1] if kind == "line" else 0.0,
                       factor=factor)  # fmt: skip
    return out


def push(on: On, at: At, u_dot: Sequence[Tensor | None]) -> Tensor:
    """The tangent of v; None stands for no tangent."""
    node = at.node
    if node.kind in BY_ROW:
        t: Tensor = given(u_dot[0])
        out = on.new(t.shape[0], node.width, at.dtype)
        on.by_row(out, t, BY_ROW[node.kind], light.PUSH.value, u=at.point, epsilon=at.epsilon)
        return out
    return linear_push(on, at, u_dot)


def linear_push(on: On, at: At, u_dot: Sequence[Tensor | None], values: bool = False) -> Tensor:
    """What an element-wise node, or one that moves columns, makes of tangents; of the ``values``
    too where it does the same with them."""
    node, kind, H = at.node, at.node.kind, at.node.width
    moving = [(i, t) for i, t in enumerate(u_dot) if t is not None]
    first, T = moving[0][1], moving[0][1].shape[0]
    if kind == "columns":
        return first[..., columns_of(node)]
    if kind == "expand":
        return first.expand(*first.shape[:-1], H)
    if kind == "total":
        out = on.new(T, 1, at.dtype, first.dim() == 2)
        on.by_row(out, first, light.SUM.value)
        return out
    if kind == "concat":
        out, start = on.new(T, H, at.dtype, all(t.dim() == 2 for _, t in moving)), 0
        for u, t in zip(at.u, u_dot, strict=True):
            width = given(tensor_of(u)).shape[-1]
            part = out[..., start : start + width]
            if t is None:
                part.zero_()
            else:
                on.combine(part, t)
            start += width
        return out
    if kind == "product" and len(moving) == 2 and T == 1:
        i = 1 if 0 in at.deferred else 0
        out = on.new(1, H, at.dtype)
        on.combine(out, u_dot[i], factor=at.factor(i)[0], bent=(at.u[i], given(u_dot[1 - i])))
        return out
    found: Tensor | None = None
    c_found, own = 1.0, False
    moving.sort(key=lambda term: term[0] in at.deferred)  # a sum begins with what is there
    for i, t in moving:
        factor, c = at.factor(i)
        if values and i in at.deferred:
            factor, t = at.deferred[i].factor, given(tensor_of(at.deferred[i].t))
        if found is None and factor.kind == ONE.kind:
            found, c_found = t, c  # joins the next term, or is all
            continue
        one_row = t.dim() == 2 and factor.one_row and is_one_row(found)
        if found is not None and own and found.dim() == (2 if one_row else 3):
            out = found
        else:
            out = on.new(T, H, at.dtype, one_row)
        on.combine(out, t, c=c, base=found, c_base=c_found, factor=factor)
        found, c_found, own = out, 1.0, True
    assert found is not None
    if c_found == 1:
        return found
    out = on.new(T, H, at.dtype, found.dim() == 2)
    on.combine(out, found, c=c_found)
    return out


def bent(
    at: At, u_dot: Sequence[Tensor | None], p: Operand, i: int
) -> tuple[Operand, Tensor] | None:
    """Of what the curvature in input i is: p and a tangent, None where that does not move."""
    s = u_dot[1 - i] if at.node.kind == "product" else u_dot[0]
    return None if s is None else (p, s)
