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
from .cotangents import Bent, Cotangents, parted_of
from .forward import contiguous
from .fusion import Affine, affine_of, deferred_of
from .gradients import Gradients
from .nodes import At, at_step, deferred, value_of
from .operands import Collected, Deferred, On, Operand, given
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
        self.parts = {s.v: one for one in self.affine.values() for s in one.parts}
        self.dtypes, self.cast = dtypes_of(problem, x.dtype), problem.cast or x.dtype
        x = x[rows]
        self.θ = parameters_of(facts, params, rows, x)
        self.on = On(x, x.shape[0])
        self.values: dict[int, Tensor] = {0: x.unsqueeze(0)}
        self.deferred: dict[int, Deferred] = {}
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
        return at_step(step, self.values, self.deferred, self.θ, self.dtypes)

    def run(self, way: WayDown, grads: Gradients) -> None:
        self._again(way.again, grads)
        if self.pairs is not None:
            self.pairs.run_tangent(way.tangents, grads)
        for down in way.nodes:
            (self._linear if down.step.linear else self._light)(down, grads)
            self.values.pop(down.step.v, None)
            self.deferred.pop(down.step.v, None)
            if self.pairs is not None:
                self.pairs.dots.pop(down.step.v, None)
        if not grads.wants_dx:
            return
        g = self.g.pop(0)
        dx = grads.inputs(self.rows, None if g is None else g[0], 0 in self.g.own)
        q = None if self.pairs is None else self.pairs.q.pop(0)
        if self.pairs is not None and q is not None:
            self.pairs.join(dx.unsqueeze(0), q)

    def _again(self, steps: Sequence[Step], grads: Gradients) -> None:
        """The values of light nodes, once more."""
        within, later = self.fused(steps), deferred_of(self.facts.steps)
        for step in steps:
            affine = within.get(step.v)
            if step.v in later:
                self.deferred[step.v] = deferred(self.at(step))
            elif affine is None:
                self.values[step.v] = value_of(self.on, self.at(step))
            elif step.v == affine.last.v:
                out = self.on.new(1, step.node.width, self.dtypes[step.v])
                plain = self.plain(self.on, affine, grads)
                affine.value(self.on, self.at(affine.first), out, self.θ, plain)
                # Of what is in no one's gradient nodes ask the width alone.
                self.values |= {s.v: out for s in affine.parts}
                if plain is not None:
                    self.values[affine.first.v] = plain

    def fused(self, steps: Sequence[Step]) -> dict[int, Affine]:
        """By the values in it, each scale of which all that goes with it is among these steps."""
        here, within = {step.v for step in steps}, dict[int, Affine]()
        for one in self.affine.values():
            parts = {step.v for step in one.parts}
            if parts <= here:
                within |= dict.fromkeys(parts, one)
        return within

    def plain(self, on: On, affine: Affine, grads: Gradients) -> Tensor | None:
        """Where what the norm itself makes goes, which its scale's gradient is of."""
        norm = affine.norm
        if norm is None or not grads.wanted[affine.scale.node.params[0]]:
            return None
        return on.new(1, norm.node.width, self.dtypes[norm.v])

    def _pulling(self, at: At, step: Step) -> At:
        """The node as it pulls: a scale after a norm leaves its part to the norm."""
        one = self.parts.get(step.v)
        if one is None or step.node.kind == "shift":
            return at
        if step.v == one.first.v:
            return one.pulling(at, self.θ)
        return at._replace(node=at.node._replace(kind="identity", params=(), numbers=(0, 0, 0)))

    def _collected(
        self, v: int, P: Tensor | None, q: Tensor | None, bent: Bent | None = None
    ) -> Collected:
        """Of what the cotangent of value v is made."""
        gy = self.gy if self.facts.kept[v] and P is not None else None
        if gy is None:
            P = None if self.facts.kept[v] else self.g.pop(v)
        else:
            gy = gy.expand(-1, -1, self.facts.widths[v])
        place = None if self.pairs is None else self.pairs.active.place
        return Collected(P, gy, q, bent, place, self.fan)

    def _cotangent(
        self, v: int, of: Collected, stored: bool, grads: Gradients, plain: int | None = None,
        scaled: int | None = None, u: Operand | None = None, below: bool = False,
    ) -> Tensor | None:  # fmt: skip
        """The cotangent g of value v, q in it, if it is to be ``stored`` or needs no making; None
        where there is none but the pairs' own. Its sums go to the gradients of the parameters in
        these places."""
        H, made = self.facts.widths[v], of.gy is not None or (of.P is not None and of.q is not None)
        g = None
        if made and stored:
            mine = of.gy is None and v in self.g.own
            g = of.P if mine else self.on.new(1, H, self.dtypes[v])
        if of.P is None and of.q is None:
            plain = None
            scaled = scaled if of.bent else None
        sums = grads.rows(plain, H), grads.rows(scaled, H)
        if g is not None or sums != (None, None):
            self.on.collect(grads.parts, of, g, u, below, *sums)
        return g if made else of.P

    def _linear(self, down: Down, grads: Gradients) -> None:
        (v, node, *_), _, (direct,), (kept,), _ = down
        W, u, P = weight_of(self.θ[v]), node.inputs[0], self.P.pop(v)
        trained = grads.wanted[node.params[0]]
        q = None if self.pairs is None else self.pairs.q.pop(v)
        of = self._collected(v, P, q)
        g = self._cotangent(v, of, trained or direct, grads, node.params[1])
        if g is not None and trained:
            grads.product(node.params[0], g, self.values[u])
        if g is not None and direct:
            self.g.add_product(u, g, W)
        if self.pairs is not None:
            self.pairs.linear(down, P, q, grads, of.P is not None)
        if kept and P is not None and self.facts.uniform[v]:  # else it was saved
            self.P.add_product(u, P, W)

    def _light(self, down: Down, grads: Gradients) -> None:
        step, trained, direct, kept, _ = down
        v, P = step.v, self.P.pop(step.v)
        at = self.at(step)
        pulling = self._pulling(at, step)
        p, q, u_dot = None, None, list[Tensor | None]()
        if self.pairs is not None:
            p, q, u_dot = self.pairs.at(down, P)
        joined = False
        if trained or True in direct:
            plain, scaled = self._collecting(step, grads) if trained else (None, None)
            bent = None if p is None or scaled is None else (p, given(u_dot[0]))
            of = self._collected(v, P, q, bent)
            below = step.node.kind == "prelu"
            g = self._cotangent(v, of, True in direct, grads, plain, scaled, at.u[0], below)
            joined = g is not None
            for i, mine in enumerate(direct):
                if mine and g is not None:
                    self.g.add_pulled(pulling, g, i)
        if self.pairs is not None:
            self.pairs.light(down, pulling, p, q, u_dot, joined)
        for i, mine in enumerate(kept):
            if mine and P is not None:
                self.P.add_pulled(pulling, P, i)

    def _collecting(self, step: Step, grads: Gradients) -> tuple[int | None, int | None]:
        """The places of the parameters whose sums are taken at this node: plain ones and those
        times its input. The shift behind a scale is summed there, of the same cotangent."""
        node, one = step.node, self.parts.get(step.v)
        if node.kind != "shift":
            shift = None if one is None or one.shift is None else one.shift.node.params[0]
            return shift, node.params[0]
        later = one is not None and grads.wanted[one.scale.node.params[0]]
        return None if later else node.params[0], None
