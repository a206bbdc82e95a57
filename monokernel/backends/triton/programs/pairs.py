"""The active pairs of a program's backward.

Two chains come down for them. Their seeds p, unless the P of all rows is kept, which they then take
theirs from; and the curvatures q, where g is not at hand to take them: with the kept P it is gy∘P
and its q is the pairs', and without a gradient of y there is nothing else. Otherwise each curvature
joins g in its rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from ....activations import ACTIVATIONS
from ....columns import spread, take
from ....program import Node
from ...schedule import Down, Step, weight_of
from ..active import Active
from ..active.listing import gather_inputs
from ..constants import accumulator
from ..launch import launch
from . import light
from .config import tile
from .cotangents import Cotangents
from .gradients import Gradients
from .nodes import BY_ROW, At, bend, by_slope, by_value, push
from .operands import OfRows, On, Operand, given, slope_of, tensor_of
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
        if self.facts.moving[block.y] and not self.keeps:
            self.p.add(block.y, active.seed.unsqueeze(0))

    def run_tangent(self, steps: Sequence[Step]) -> None:
        """The tangents that the walk down needs."""
        for step in steps:
            v, node, _, linear, _ = step
            if not linear:
                self.dots[v] = push(self.on, self.block.at(step), self._dots_of(node))
                continue
            u, W = node.inputs[0], weight_of(self.block.θ[v])
            t = self.dots[u] if u else self.x_dot
            self.dots[v] = self.products.up(t, W if u else take(W, self.block.x2))

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
        self,
        down: Down,
        P: Tensor | None,
        q: Tensor | None,
        trained: Sequence[bool],
        grads: Gradients,
        joined: bool,
    ) -> None:
        """The pairs' part in dW and db; p and q go down the node. If q ``joined`` g its part is in
        there, also in what g hands down."""
        (v, node, *_), _, (direct,), (kept,), _ = down
        u, wanted = node.inputs[0], direct or kept
        p = self._seeds(v, P)
        alone = None if joined else q
        if trained[0] and not (p is None and alone is None):
            seeds: Tensor | None = None
            if p is not None:
                seeds = self._own(p)
            u_dot = None if p is None else self.dots[u] if u else self.x_dot
            dW, fresh = grads.weight(node.params[0])
            x2 = None if u else self.block.x2
            self.products.weight(seeds, alone, u_dot, self.block.values[u], dW, fresh, x2)
        if trained[1] and alone is not None:
            grads.rows(node.params[1], self.on, alone)
        if not wanted:
            return
        if q is not None and not (joined and direct):
            self.q.add_product(u, q, weight_of(self.block.θ[v]))
        if not self.keeps and isinstance(p, Tensor) and u and self.facts.moving[u]:
            self.p.add_product(u, p, weight_of(self.block.θ[v]))

    def _own(self, p: Operand) -> Tensor:
        """p of the pairs in memory of their own."""
        if isinstance(p, Tensor) and p.dim() == 3:
            return p
        t = given(tensor_of(p))
        out = self.on.new(1, t.shape[-1], t.dtype)
        self.on.combine(out, p)
        return out

    def light(self, down: Down, at: At, pulling: At, P: Tensor | None, grads: Gradients) -> None:
        """The pairs' part in dθ; p and q go down the node, and its curvature joins them or g."""
        step, trained, direct, kept, _ = down
        v, node = step.v, step.node
        p, q = self._seeds(v, P), self.q.pop(v)
        u_dot = self._dots_of(node) if trained or step.rule.curved else []
        if trained and p is not None:
            factor = by_slope(at, given(u_dot[0]))
            if factor is not None:
                grads.rows(node.params[0], self.on, p, factor)
        if trained and q is not None:
            grads.rows(node.params[0], self.on, q, by_value(at))
        for i, u in enumerate(node.inputs):
            if not (direct[i] or kept[i]):
                continue
            if not self.keeps and isinstance(p, Tensor) and u and self.facts.moving[u]:
                self.p.add_pulled(pulling, p, i)
            curved = p is not None and step.rule.curved
            if q is not None and curved and node.kind in ACTIVATIONS:
                self.q.add(u, q, 1.0, slope_of(node, at.u[0]), (given(p), given(u_dot[0])))
                continue
            if q is not None:
                self.q.add_pulled(pulling, q, i)
            if curved:
                self._curve(pulling, u_dot, given(p), i)

    def _curve(self, at: At, u_dot: Sequence[Tensor | None], p: Operand, i: int) -> None:
        """The curvature in input i joins g of its rows, or q."""
        node, u = at.node, at.node.inputs[i]
        chain = self.q
        if self.joins:
            chain = Cotangents(self.on, self.block.dtypes, {}, self.products)
        if node.kind in BY_ROW:
            chain.add_by_row(
                u, p, BY_ROW[node.kind], light.BEND.value, node.width, u=at.point,
                s=given(u_dot[0]), scale=at.scale, epsilon=at.epsilon,
            )  # fmt: skip
        else:
            bent = bend(at, u_dot, p, i)
            if bent is None:
                return
            chain.add(u, bent[0], factor=bent[1])
        if self.joins:
            self.join(self.block.g.of[u], chain.of[u])
