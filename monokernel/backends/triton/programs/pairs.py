"""The active pairs of a program's backward.

Two chains come down for them. Their seeds p, unless the P of all rows is kept, which they then take
theirs from; and the curvatures q, where g is not at hand to take them: with the kept P it is gy∘P
and its q is the pairs', and without a gradient of y there is nothing else. Otherwise each curvature
joins g in its rows: at once, or where it is of a linear node's value with that node's own sums.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from ....columns import spread, take
from ....program import Node
from ...schedule import Down, Step, weight_of
from ..active import Active
from ..active.listing import gather_inputs
from ..constants import accumulator
from ..launch import launch
from .config import tile
from .cotangents import Cotangents
from .fusion import Affine, activations_of
from .gradients import Gradients
from .nodes import At, bent, push
from .operands import OfRows, On, Operand, given
from .products import Products

if TYPE_CHECKING:
    from .backward import Descent

__all__ = ["Pairs"]


class Pairs:
    """The active pairs of a block: their tangents, their seeds p and their curvatures q."""

    def __init__(self, block: Descent, active: Active) -> None:
        self.block, self.active, self.facts = block, active, block.facts
        self.on = On(block.on.x, active.rows.shape[0], active)
        self.products = Products(self.on, active, block.cast)
        self.p = Cotangents(self.on, block.dtypes, block.parted, self.products)
        self.q = Cotangents(self.on, block.dtypes, block.parted, self.products)
        self.x_dot = active.x_dot.unsqueeze(0)
        self.dots: dict[int, Tensor] = {}
        self.keeps = self.facts.kept[block.y]
        # With g at hand in every row a curvature joins it there.
        self.joins = block.gy is not None and not self.keeps
        self.joined_at = {step.v for step in self.facts.steps if step.linear}
        if self.facts.moving[block.y] and not self.keeps:
            self.p.add(block.y, active.seed.unsqueeze(0))

    def run_tangent(self, steps: Sequence[Step], grads: Gradients) -> None:
        """The tangents that the walk down needs."""
        within, after = self.block.fused(steps), activations_of(tuple(steps))
        for step in steps:
            v, node, _, linear, _ = step
            if v in self.dots:
                continue
            affine = within.get(v)
            if affine is not None:
                if v == affine.scale.v:  # a shift changes no tangent
                    self._push(affine, grads)
                elif v == affine.last.v:
                    self.dots[v] = self.dots[affine.scale.v]
                continue
            if not linear:
                self.dots[v] = push(self.on, self.block.at(step), self._dots_of(node))
                continue
            u, W = node.inputs[0], weight_of(self.block.θ[v])
            t = self.dots[u] if u else self.x_dot
            W = W if u else take(W, self.block.x2)
            if v not in after:
                self.dots[v] = self.products.up(t, W)
                continue
            of, a = after[v], self.block.values[v]
            out = self.on.new(1, node.width, self.block.dtypes[of.v])
            self.dots[v] = self.products.up(t, W, of.node, a, out)
            self.dots[of.v] = out

    def _push(self, affine: Affine, grads: Gradients) -> None:
        at, dtype = self.block.at(affine.first), self.block.dtypes[affine.scale.v]
        t: Tensor = given(self._dots_of(at.node)[0])
        plain = self.block.plain(self.on, affine, grads)
        self.dots[affine.scale.v] = affine.push(self.on, at, t, dtype, self.block.θ, plain)
        if plain is not None:
            self.dots[affine.first.v] = plain

    def _dots_of(self, node: Node) -> list[Tensor | None]:
        if 0 in node.inputs and 0 not in self.dots:
            self.dots[0] = spread(self.x_dot, self.block.x2, self.facts.widths[0])
        return [self.dots.get(u) for u in node.inputs]

    def _seeds(self, v: int, P: Tensor | None) -> Operand | None:
        """The pairs' own P of value v; None where x2 does not reach it."""
        if not self.facts.moving[v]:
            return None
        if not self.keeps:
            return self.p.pop(v)
        return None if P is None else P if P.dim() == 2 else OfRows(P)

    def join(self, g: Tensor, q: Tensor) -> None:
        """g += q in the pairs' rows."""
        block, H = self.block, g.shape[-1]
        BM, BN = tile(H)
        launch(
            gather_inputs, (-(-block.on.count // BM), -(-H // BN)), q, g, self.on.dense(q),
            self.active.place, block.on.count,
            d=H, ROW=g.stride(1), COLUMN=g.stride(2), T=block.fan, FRESH=False, BM=BM, BN=BN,
            A=accumulator(q.dtype),
        )  # fmt: skip

    def linear(
        self, down: Down, P: Tensor | None, q: Tensor | None, grads: Gradients, joined: bool
    ) -> None:
        """The pairs' part in dW; p and q go down the node. If q ``joined`` g its part is in there,
        also in what g hands down."""
        (v, node, *_), _, (direct,), (kept,), _ = down
        u, W = node.inputs[0], weight_of(self.block.θ[v])
        p = self._seeds(v, P)
        alone = None if joined else q
        if grads.wanted[node.params[0]] and not (p is None and alone is None):
            u_dot = None if p is None else self.dots[u] if u else self.x_dot
            below, x2 = self.block.values[u], None if u else self.block.x2
            self.products.weight(grads, node.params[0], p, alone, u_dot, below, x2)
        if not (direct or kept):
            return
        if q is not None and not (joined and direct):
            self.q.add_product(u, q, W)
        if not self.keeps and isinstance(p, Tensor) and u and self.facts.moving[u]:
            self.p.add_product(u, p, W)

    def at(
        self, down: Down, P: Tensor | None
    ) -> tuple[Operand | None, Tensor | None, list[Tensor | None]]:
        """p and q of a light node's value, and the tangents of its inputs where they are needed."""
        node, v = down.step.node, down.step.v
        needed = self.facts.moving[v] and (down.trained or down.step.rule.curved)
        return self._seeds(v, P), self.q.pop(v), self._dots_of(node) if needed else []

    def light(
        self,
        down: Down,
        at: At,
        p: Operand | None,
        q: Tensor | None,
        u_dot: Sequence[Tensor | None],
        joined: bool,
    ) -> None:
        """p and q go down the node, and its curvature joins q, or g in the pairs' rows. A q that
        ``joined`` g goes down in what g hands down."""
        node, curved = down.step.node, p is not None and down.step.rule.curved
        for i, u in enumerate(node.inputs):
            if not (down.direct[i] or down.kept[i]):
                continue
            if not self.keeps and isinstance(p, Tensor) and u and self.facts.moving[u]:
                self.p.add_pulled(at, p, i)
            bends = bent(at, u_dot, given(p), i) if curved else None
            if not self.joins or u in self.joined_at:  # which join it to g themselves
                own = None if joined and down.direct[i] else q
                self.q.add_pulled(at, own, i, bends)
            elif bends is not None:
                alone = Cotangents(self.on, self.block.dtypes, {}, self.products)
                alone.add_pulled(at, None, i, bends)
                self.join(self.block.g.of[u], alone.of[u])
