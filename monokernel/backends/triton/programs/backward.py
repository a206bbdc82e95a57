"""Backward node by node, over all rows; what is for the active pairs alone is in ``pairs.py``."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ....problem import Problem
from ...schedule import (
    Down,
    Facts,
    Params,
    Step,
    WayDown,
    blocks,
    dtypes_of,
    facts_of,
    parameters_of,
    way_down,
    weight_of,
)
from ..active import list_active
from . import light
from .affine import Affine, affine_of
from .cotangents import Cotangents, parted_of
from .forward import contiguous
from .gradients import Gradients
from .nodes import At, by_value, value_of
from .operands import OfRows, On, Operand, times
from .pairs import Pairs

__all__ = ["backward"]


def backward(
    problem: Problem,
    gy: Tensor | None,
    gout: Tensor | None,
    x: Tensor,
    params: Params,
    saved: Sequence[Tensor],
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """The gradients of x and of every parameter, None where ``needs`` is false."""
    x, params = x.contiguous(), contiguous(params)
    gy = None if gy is None else gy.contiguous()
    gout = None if gout is None else gout.contiguous()
    grads = Gradients(x, params, needs)
    facts = facts_of(problem)
    way = way_down(problem, needs)
    if x.shape[0] and not (gy is None and gout is None) and way.nodes:
        for rows in blocks(problem, facts, x):
            Descent(problem, facts, x, params, saved, gy, gout, rows).run(way, grads)
    return grads.result()


class Descent:
    """One block of rows on its way back."""

    def __init__(
        self,
        problem: Problem,
        facts: Facts,
        x: Tensor,
        params: Params,
        saved: Sequence[Tensor],
        gy: Tensor | None,
        gout: Tensor | None,
        rows: slice,
    ) -> None:
        self.facts, self.x2, self.rows = facts, problem.columns, rows
        self.fan = problem.D if problem.mode == "adjoint" else problem.k
        self.y = facts.steps[-1].v
        self.affine = affine_of(facts.steps)
        self.parts = {
            s.v: one for one in self.affine.values() for s in (one.norm, one.scale, one.last)
        }
        self.dtypes, self.cast = dtypes_of(problem, x.dtype), problem.cast or x.dtype
        x = x[rows]
        self.θ = parameters_of(facts, params, rows, x)
        self.on = On(x, x.shape[0])
        self.values: dict[int, Tensor] = {0: x.unsqueeze(0)}
        for v, t in zip(facts.saved, saved, strict=False):
            self.values[v] = t[rows].unsqueeze(0)
        # Of all rows: g of the values that have it for themselves, P of those with gy∘P + q.
        self.parted = parted_of(facts.widths, facts.steps)
        self.g, self.P = (Cotangents(self.on, self.dtypes, self.parted) for _ in range(2))
        for v, t in zip(facts.pulled, saved[len(facts.saved) :], strict=False):
            self.P.add(v, t[rows].unsqueeze(0))
        self.gy = None if gy is None else gy[rows].unsqueeze(0)
        if facts.kept[self.y]:
            self.P.add(self.y, x.new_ones(1, 1))
        elif self.gy is not None:
            self.g.add(self.y, self.gy)
        self.pairs: Pairs | None = None
        if gout is not None:
            gout = gout[rows] if gout.dim() else gout
            S = None if problem.hinge is None else saved[-1][rows]
            self.pairs = Pairs(self, list_active(problem, gout, S, x))

    def at(self, step: Step) -> At:
        u: list[Operand] = [OfRows(self.values[i]) for i in step.node.inputs]
        v = self.values.get(step.v)
        of_v = u[0] if v is None else OfRows(v)
        return At(step.node, u, of_v, self.θ[step.v], self.dtypes[step.v])

    def run(self, way: WayDown, grads: Gradients) -> None:
        self._again(way.again)
        if self.pairs is not None:
            self.pairs.run_tangent(way.tangents)
        for down in way.nodes:
            (self._linear if down.step.linear else self._light)(down, grads)
            self.values.pop(down.step.v, None)
            if self.pairs is not None:
                self.pairs.dots.pop(down.step.v, None)
        if not grads.wants_dx:
            return
        g = self.g.pop(0)
        dx = grads.inputs(self.rows, None if g is None else g[0], 0 in self.g.own)
        q = None if self.pairs is None else self.pairs.q.pop(0)
        if self.pairs is not None and q is not None:
            self.pairs.join(dx.unsqueeze(0), q)

    def _again(self, steps: Sequence[Step]) -> None:
        """The values of light nodes, once more."""
        here = {step.v for step in steps}
        within = dict[int, Affine]()
        for one in self.affine.values():
            inner = [s.v for s in (one.norm, one.scale) if s is not one.last]
            if here.issuperset((*inner, one.last.v)):
                within |= dict.fromkeys((*inner, one.last.v), one)
        for step in steps:
            affine = within.get(step.v)
            if affine is None:
                self.values[step.v] = value_of(self.on, self.at(step))
            elif step.v == affine.last.v:
                at, H = self.at(affine.norm), step.node.width
                plain = self.on.new(1, H, self.dtypes[affine.norm.v])
                out = self.on.new(1, H, self.dtypes[step.v])
                affine.run(self.on, at, out, at.u[0], light.VALUE.value, self.θ, plain)
                # A shift asks of its input the width alone.
                self.values |= {affine.norm.v: plain, affine.scale.v: out, step.v: out}

    def _pulling(self, at: At, step: Step) -> At:
        """The node as it pulls: a scale after a norm leaves its part to the norm."""
        one = self.parts.get(step.v)
        if one is None or step.node.kind == "shift":
            return at
        if step.v == one.norm.v:
            return at._replace(scale=one.row(self.θ))
        return at._replace(node=at.node._replace(kind="identity", params=(), numbers=(0, 0, 0)))

    def _cotangent(self, v: int, P: Tensor | None) -> Tensor | None:
        """g of value v for all rows, without what is the pairs'."""
        if not self.facts.kept[v]:
            return self.g.pop(v)
        if self.gy is None or P is None:
            return None
        out = self.on.new(1, P.shape[-1], self.dtypes[v])
        gy = self.gy.expand(-1, -1, P.shape[-1])
        self.on.combine(out, P, factor=times(gy))
        return out

    def _linear(self, down: Down, grads: Gradients) -> None:
        (v, node, *_), _, (direct,), (kept,), _ = down
        W, u, P = weight_of(self.θ[v]), node.inputs[0], self.P.pop(v)
        trained = [grads.wanted[place] for place in node.params]
        g = self._cotangent(v, P) if any(trained) or direct else None
        q = None if self.pairs is None else self.pairs.q.pop(v)
        if g is not None:
            if self.pairs is not None and q is not None:
                self.pairs.join(g, q)
            if trained[0]:
                grads.product(node.params[0], g, self.values[u])
            if trained[1]:
                grads.rows(node.params[1], self.on, g)
            if direct:
                self.g.add_product(u, g, W)
        if self.pairs is not None:
            self.pairs.linear(down, P, q, trained, grads, g is not None)
        if kept and P is not None and self.facts.uniform[v]:  # else it was saved
            self.P.add_product(u, P, W)

    def _light(self, down: Down, grads: Gradients) -> None:
        step, trained, direct, kept, _ = down
        v, node, P = step.v, step.node, self.P.pop(step.v)
        at = self.at(step)
        pulling = self._pulling(at, step)
        g = self._cotangent(v, P) if trained or True in direct else None
        if g is not None:
            if trained:
                grads.rows(node.params[0], self.on, g, by_value(at))
            for i, mine in enumerate(direct):
                if mine:
                    self.g.add_pulled(pulling, g, i)
        if self.pairs is not None:
            self.pairs.light(down, at, pulling, P, grads)
        for i, mine in enumerate(kept):
            if mine and P is not None:
                self.P.add_pulled(pulling, P, i)
