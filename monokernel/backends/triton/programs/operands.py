"""Stacks of values, tangents and cotangents, and the launches that make one of others.

A stack (T, n, H) has T parts of n rows; (T, H) is one row of each part, the same for all n. The
number of dimensions says which, since n may be 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ....activations import Activation
from ....program import Node
from ..active import Active
from ..constants import IDENTITY, ActivationCode, accumulator, activation_code
from ..launch import launch
from ..target import approximate
from . import light
from .config import row_tile, tile

__all__ = [
    "ONE",
    "Collected",
    "Deferred",
    "Factor",
    "OfRows",
    "On",
    "Operand",
    "Slices",
    "activated",
    "as_row",
    "compiled_act",
    "converted",
    "flattened",
    "given",
    "is_one_row",
    "slope_of",
    "tensor_of",
    "times",
]


class OfRows(NamedTuple):
    """A stack of all rows, of which the pairs take theirs."""

    t: Tensor


Operand = Tensor | OfRows


def tensor_of(operand: Operand | None) -> Tensor | None:
    return operand.t if isinstance(operand, OfRows) else operand


def is_one_row(operand: Operand | None) -> bool:
    t = tensor_of(operand)
    return t is None or t.dim() == 2


def layout_of(operand: Operand | None, pairs: bool) -> tuple[int, int, int]:
    """As ``light.py`` has it."""
    t = tensor_of(operand)
    if t is None:
        return 0, 0, 0
    if t.dim() == 2:
        return t.stride(0), t.stride(1), light.ONE_ROW.value
    how = light.GATHERED if pairs and isinstance(operand, OfRows) else light.OWN_ROW
    return t.stride(1), t.stride(2), how.value


class Factor(NamedTuple):
    """The factor of an element-wise node (see ``light.py``)."""

    kind: int = light.ONE.value
    u: Operand | None = None
    F: Operand | None = None
    act: ActivationCode = IDENTITY

    @property
    def one_row(self) -> bool:
        return is_one_row(self.u) and is_one_row(self.F)


ONE = Factor()


class Deferred(NamedTuple):
    """A value that is nowhere in memory, since its only reader makes it: factor∘t, or without a t
    the factor."""

    factor: Factor
    t: Operand | None = None

    @property
    def as_wide(self) -> Operand:
        """An operand of as many columns."""
        u: Operand = given(self.factor.u if self.t is None else self.t)
        return u


class Collected(NamedTuple):
    """Of what the cotangent of a node is made, and what its parameters collect of it: gy∘P, or P
    alone, in all rows; of the pairs, by their places, q, and p with the tangent that is bent."""

    P: Tensor | None = None
    gy: Tensor | None = None
    q: Tensor | None = None
    bent: tuple[Operand, Tensor] | None = None
    place: Tensor | None = None
    fan: int = 1


class Slices(NamedTuple):
    """Partial sums (parts, H), or of a weight (parts, its numbers), to be filled or added to."""

    parts: Tensor
    add: bool


@dataclass(frozen=True)
class On:
    """What a chain runs over: ``count`` rows, or as many pairs at most."""

    x: Tensor
    count: int
    active: Active | None = None

    def new(self, T: int, H: int, dtype: torch.dtype, one_row: bool = False) -> Tensor:
        shape = (T, H) if one_row else (T, self.count, H)
        return self.x.new_empty(shape, dtype=dtype)

    def _rows(self) -> tuple[Tensor | None, Tensor | None]:
        return (None, None) if self.active is None else (self.active.rows, self.active.total)

    def combine(
        self,
        out: Tensor | None,
        P: Operand | None,
        *,
        c: float = 1.0,
        base: Operand | None = None,
        c_base: float = 1.0,
        constant: float = 0.0,
        factor: Factor | None = None,
        value: Tensor | None = None,
        bent: tuple[Operand, Tensor] | None = None,
    ) -> None:
        """out = constant + c_base·base + c·factor ∘ P; of a factor σ' also value = σ(u). What is
        ``bent``, p and s, adds s∘p, times σ'' of a factor σ'."""
        to = out if out is not None else value
        assert to is not None
        factor, pairs = factor or Factor(), self.active is not None
        p, s = bent or (None, None)
        H, N = to.shape[-1], 1 if to.dim() == 2 else self.count
        BM, BN = tile(H)
        if not to.numel():
            return
        launch(
            light.combine, (-(-N // BM), -(-H // BN)), self.x,
            out, tensor_of(P), tensor_of(base), tensor_of(factor.u), tensor_of(factor.F), value,
            tensor_of(p), s, *self._rows(), float(constant), float(c), float(c_base), N,
            FACTOR=factor.kind, ACT=compiled_act(factor.act, self.x.dtype),
            H=H, T=1 if out is None else out.shape[0],
            O=layout_of(out, pairs), P_=layout_of(P, pairs), B=layout_of(base, pairs),
            U=layout_of(factor.u, pairs), F_=layout_of(factor.F, pairs), V=layout_of(value, pairs),
            BENT=layout_of(p, pairs), S=layout_of(s, pairs),
            BM=BM, BN=BN, A=accumulator(self.x.dtype),
        )  # fmt: skip

    def by_row(
        self,
        out: Tensor,
        P: Operand | None,
        kind: int,
        does: int = light.VALUE.value,
        *,
        u: Operand | None = None,
        bent: tuple[Operand, Tensor] | None = None,
        base: Operand | None = None,
        scale: Operand | None = None,
        shift: Operand | None = None,
        plain: Tensor | None = None,
        epsilon: float = 0.0,
    ) -> None:
        """out = base + what a node of that kind does to P, scaled and shifted; the curvature of
        what is ``bent``, p and s, beside what is pulled."""
        pairs = self.active is not None
        p, s = bent or (None, None)
        t: Tensor = given(tensor_of(p if P is None else P))
        H, N = t.shape[-1], 1 if out.dim() == 2 else self.count
        BM, BN, warps = row_tile(H)
        if not out.numel():
            return
        launch(
            light.by_row, (-(-N // BM),), self.x,
            out, tensor_of(P), tensor_of(base), tensor_of(u), tensor_of(p), s, tensor_of(scale),
            tensor_of(shift), plain, *self._rows(), float(epsilon), N,
            KIND=kind, DOES=does, H=H, T=out.shape[0],
            O=layout_of(out, pairs), P_=layout_of(P, pairs), B=layout_of(base, pairs),
            U=layout_of(u, pairs), BENT=layout_of(p, pairs), S=layout_of(s, pairs),
            SCALE=layout_of(scale, pairs), SHIFT=layout_of(shift, pairs),
            V=layout_of(plain, pairs),
            BM=BM, BN=BN, A=accumulator(self.x.dtype),
            num_warps=warps,
        )  # fmt: skip

    def collect(
        self,
        parts: int,
        of: Collected,
        out: Tensor | None,
        u: Operand | None,
        below: bool,
        plain: Slices | None,
        scaled: Slices | None,
    ) -> None:
        """The cotangent in ``out`` and its sums over the rows, in so many parts (see ``light.py``):
        those of a scale, or if they count only ``below`` 0 of a PReLU, are of its input u."""
        kept = plain or scaled
        H = given(out).shape[-1] if kept is None else kept.parts.shape[-1]
        BM, BN = tile(H)
        p, u_dot = of.bent if of.bent and scaled else (None, None)
        own = u if scaled else None
        pairs = of.q is not None or p is not None
        launch(
            light.collect, (parts, -(-H // BN)), self.x,
            out, of.P, of.gy, of.q, tensor_of(p), tensor_of(own), u_dot,
            of.place if pairs else None,
            plain and plain.parts, scaled and scaled.parts, self.count,
            plain.parts.stride(0) if plain else 0, scaled.parts.stride(0) if scaled else 0,
            H=H, T=of.fan, BELOW=below, O=layout_of(out, False), P_=layout_of(of.P, False),
            GY=layout_of(of.gy, False), Q=layout_of(of.q, True), SEED=layout_of(p, True),
            U=layout_of(own, False), DOT=layout_of(u_dot, True),
            IN_PLACE=out is not None and out is of.P, ADD_PLAIN=bool(plain and plain.add),
            ADD_SCALED=bool(scaled and scaled.add), BM=BM, BN=BN, A=accumulator(self.x.dtype),
        )  # fmt: skip

    def dense(self, t: Tensor) -> Tensor:
        """The pairs' t (1, M, H) as a product wants it."""
        if t.is_contiguous():
            return t
        out = self.new(1, t.shape[-1], t.dtype)
        self.combine(out, t)
        return out


def times(F: Operand) -> Factor:
    return Factor(light.TIMES.value, F=F)


def slope_of(node: Node, u: Operand) -> Factor:
    return Factor(light.SLOPE.value, u, act=act_of(node))


def activated(node: Node, u: Operand) -> Factor:
    return Factor(light.ACTIVATED.value, u, act=act_of(node))


def act_of(node: Node) -> ActivationCode:
    return activation_code(Activation(node.kind, *node.numbers), 0)


def compiled_act(act: ActivationCode, dtype: torch.dtype) -> ActivationCode:
    """For operands of that dtype."""
    return (*act[:4], approximate(dtype))


def flattened(t: Tensor) -> Tensor:
    """The rows of a stack one below the other."""
    return t.reshape(-1, t.shape[-1])


def converted(t: Tensor, dtype: torch.dtype) -> Tensor:
    """As PyTorch's products want it, which take one dtype."""
    return t if t.dtype is dtype else t.to(dtype)


def as_row(θ: Tensor, H: int) -> Tensor:
    """A parameter of H columns, or one number, as a row."""
    return θ.expand(H).unsqueeze(0)


def given(t: Any) -> Any:
    assert t is not None
    return t
