"""Cotangents on their way down a program: each value's is a sum over the nodes that read it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ....nodes import columns_of
from ...schedule import Step
from . import light
from .nodes import BY_ROW, At
from .operands import (
    ONE,
    Factor,
    On,
    Operand,
    converted,
    flattened,
    given,
    is_one_row,
    tensor_of,
)
from .products import Products

__all__ = ["Bent", "Cotangents", "parted_of"]

Bent = tuple[Operand, Tensor]
MOVES = ("expand", "total", "concat", "columns")  # nodes that move columns: none has a curvature


class Cotangents:
    """A cotangent of each value, summed over the nodes that read it.

    A sum is written in place only where its memory is known to be no one else's, and of the dtype
    of its value.
    """

    def __init__(
        self,
        on: On,
        dtypes: Sequence[torch.dtype],
        parted: dict[int, tuple[slice, ...]],
        products: Products | None = None,
    ) -> None:
        self.on, self.dtypes, self.parted, self.products = on, dtypes, parted, products
        self.of: dict[int, Tensor] = {}
        self.own = set[int]()
        # Of a value that is nothing but its parts, those that have no sum yet.
        self.missing: dict[int, list[slice]] = {}

    def pop(self, v: int) -> Tensor | None:
        self._complete(v)
        return self.of.pop(v, None)

    def _complete(self, v: int) -> None:
        for columns in self.missing.pop(v, ()):
            self.of[v][..., columns].zero_()

    def _dtype(self, v: int) -> torch.dtype:
        return self.dtypes[max(v, 0)]  # X2 is a part of x

    def _target(self, v: int, T: int, H: int, one_row: bool) -> tuple[Tensor, Tensor | None]:
        """Where the next sum of v goes, and what it begins with."""
        held = self.of.get(v)
        if held is not None and v in self.own and held.dim() == (2 if one_row else 3):
            return held, held
        out = self.of[v] = self.on.new(T, H, self._dtype(v), one_row)
        self.own.add(v)
        return out, held

    def add(
        self,
        v: int,
        P: Tensor | None,
        c: float = 1.0,
        factor: Factor = ONE,
        bent: Bent | None = None,
    ) -> None:
        """Adds c·factor ∘ P, and what is bent, or takes P itself where that is all."""
        held = self.of.get(v)
        if held is None and P is not None and bent is None and factor.kind == ONE.kind and c == 1:
            self.of[v] = P
            return
        t: Tensor = given(tensor_of(bent[0] if P is None and bent else P))
        # What the pairs take from a row is theirs.
        one_row = t.dim() == 2 and factor.one_row and is_one_row(held) and self.products is None
        out, base = self._target(v, t.shape[0], t.shape[-1], one_row)
        self.on.combine(out, P, c=c, base=base, factor=factor, bent=bent)

    def add_by_row(
        self, v: int, P: Tensor | None, kind: int, does: int, H: int, bent: Bent | None = None,
        **more: Any,
    ) -> None:  # fmt: skip
        t = given(tensor_of(bent[0] if P is None and bent else P))
        held = self.of.get(v)
        one_row = t.dim() == 2 and is_one_row(more.get("u")) and is_one_row(held)
        one_row = one_row and self.products is None
        out, base = self._target(v, t.shape[0], H, one_row)
        self.on.by_row(out, P, kind, does, base=base, bent=bent, **more)

    def add_product(self, v: int, P: Tensor, W: Tensor) -> None:
        """Adds P W."""
        held = self.of.get(v)
        mine = held is not None and v in self.own and held.dim() == P.dim()
        if self.products is not None:
            out = self.products.down(P, W, held if mine else None, self._dtype(v))
            if mine:
                return
        else:
            left = flattened(converted(P, W.dtype))
            if mine and given(held).dtype is W.dtype:
                flattened(given(held)).addmm_(left, W)
                return
            out = torch.mm(left, W).view(*P.shape[:-1], W.shape[1])
        if held is None:
            self.of[v] = out
            if out.dtype is self._dtype(v):
                self.own.add(v)
        else:
            self.add(v, out)

    def add_pulled(self, at: At, P: Tensor | None, i: int, bent: Bent | None = None) -> None:
        """Adds what a light node pulls down of P to its input i, and what its curvature makes of
        what is bent."""
        node, kind, v = at.node, at.node.kind, at.node.inputs[i]
        if P is None and bent is None:
            return
        width = given(tensor_of(at.u[i])).shape[-1]
        if kind in BY_ROW:
            does = light.PULL.value
            more = {"u": at.point, "scale": at.scale, "epsilon": at.epsilon}
            self.add_by_row(v, P, BY_ROW[kind], does, width, bent, **more)
        elif P is None or kind not in MOVES:
            factor, c = at.factor(i)
            self.add(v, P, c, factor, bent)
        elif kind == "expand":
            self.add_by_row(v, P, light.SUM.value, light.VALUE.value, 1)
        elif kind == "total":
            self.add(v, P.expand(*P.shape[:-1], width))
        elif kind == "concat":
            start = sum(given(tensor_of(u)).shape[-1] for u in at.u[:i])
            self.add(v, P[..., start : start + width])
        else:
            self._add_columns(v, P, columns_of(node), width)

    def _add_columns(self, v: int, P: Tensor, columns: slice, width: int) -> None:
        """Adds P to those columns. The parts of a chunk go to where they belong: the pull of each
        by itself is mostly 0."""
        held = self.of.get(v)
        if held is None and v in self.parted:
            held, _ = self._target(v, P.shape[0], width, P.dim() == 2)
            self.missing[v] = list(self.parted[v])
        missing = self.missing.get(v, [])
        if held is not None and columns in missing and held.dim() == P.dim():
            missing.remove(columns)
            self.on.combine(held[..., columns], P)
            return
        self._complete(v)
        if held is None or v not in self.own or held.dim() < P.dim():
            out, base = self._target(v, P.shape[0], width, P.dim() == 2 and is_one_row(held))
            if base is None:
                out.zero_()
            else:
                self.on.combine(out, base)
        part = self.of[v][..., columns]
        self.on.combine(part, P, base=part)


@lru_cache(maxsize=1024)
def parted_of(widths: tuple[int, ...], steps: tuple[Step, ...]) -> dict[int, tuple[slice, ...]]:
    """The values that are read in columns alone, each column once: the chunks of a gate."""
    found: dict[int, list[slice] | None] = {}
    for _, node, *_ in steps:
        for u in node.inputs:
            parts = found.setdefault(u, [])
            if node.kind != "columns" or parts is None:
                found[u] = None
            else:
                parts.append(columns_of(node))
    return {
        u: tuple(parts)
        for u, parts in found.items()
        if parts
        and sorted(c for part in parts for c in range(widths[u])[part]) == [*range(widths[u])]
    }
