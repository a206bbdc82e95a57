"""Forward node by node: values up, tangents beside them in tangent mode, else chains down."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ....columns import take
from ....problem import Problem
from ....program import Node
from ...schedule import (
    X2,
    Facts,
    Params,
    Step,
    blocks,
    dtypes_of,
    facts_of,
    parameters_of,
    saved_like,
    weight_of,
)
from ..slopes import hinged
from .cotangents import Cotangents, parted_of
from .fusion import deferred_of, ups
from .nodes import CURVES, At, at_step, deferred, push, value_of
from .operands import Deferred, On, converted, flattened, given, slope_of

__all__ = ["contiguous", "forward"]


def forward(
    problem: Problem, x: Tensor, weight: Tensor | None, params: Params, save: bool
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """y (N, D), the penalty or J, and the saved tensors (none unless ``save``)."""
    N, D, k, facts = x.shape[0], problem.D, problem.k, facts_of(problem)
    saved = saved_like(problem, x) if save else []
    y = x.new_empty(N, D)
    x, params = x.contiguous(), contiguous(params)
    J = x.new_empty(0, D, k)
    for rows in blocks(problem, facts, x):
        ascent = Ascent(problem, facts, x[rows], parameters_of(facts, params, rows, x))
        buffers = {v: t[rows] for v, t in zip(facts.saved, saved, strict=False)}
        ascent.run(buffers, y[rows])
        if problem.mode == "tangent":
            slopes = ascent.tangent_slopes()
        else:
            rest = zip(facts.pulled, saved[len(facts.saved) :], strict=False)
            kept = save and problem.keeps_adjoint
            slopes = ascent.adjoint_slopes(
                facts.kept if kept else facts.moving, {v: t[rows] for v, t in rest}
            )
        if rows.stop - rows.start == N:
            J = slopes
        else:
            if not rows.start:
                J = x.new_empty(N, D, k)
            J[rows] = slopes
    return y, hinged(problem, J, y, weight, saved), saved


def contiguous(params: Params) -> list[Tensor | None]:
    return [None if t is None else t.contiguous() for t in params]


class Ascent:
    """One block of rows on its way up, and down again for its slopes in adjoint mode."""

    def __init__(self, problem: Problem, facts: Facts, x: Tensor, θ: dict[int, Params]) -> None:
        self.facts, self.θ, self.k, self.D = facts, θ, problem.k, problem.D
        self.x2 = problem.columns
        self.tangent, self.dtypes = problem.mode == "tangent", dtypes_of(problem, x.dtype)
        self.on = On(x, x.shape[0])
        self.values: dict[int, Tensor] = {0: x.unsqueeze(0)}
        self.deferred: dict[int, Deferred] = {}
        self.dots: dict[int, Tensor] = {}  # (k, n, H), or (k, H) where it is the same in all rows

    def at(self, step: Step) -> At:
        return at_step(step, self.values, self.deferred, self.θ, self.dtypes)

    def run(self, buffers: dict[int, Tensor], y: Tensor) -> None:
        """The values, those of linear nodes in ``buffers`` if given, the outputs in y; in tangent
        mode the tangents beside them."""
        last, later = self.facts.steps[-1].v, deferred_of(self.facts.steps)
        for step, affine, spent in ups(self.facts.steps):
            v, node, _, linear, _ = step
            beside = self.tangent and self.facts.moving[v]
            if affine is not None:
                at, dtype = self.at(affine.first), self.dtypes[v]
                value = self.values[v] = self.on.new(1, node.width, dtype)
                affine.value(self.on, at, value, self.θ, None)
                if beside:
                    t: Tensor = given(self._dots_of(at.node)[0])
                    self.dots[v] = affine.push(self.on, at, t, dtype, self.θ, None)
            elif linear:
                to = y if v == last else buffers.get(v)
                self.values[v] = linear_value(self.values[node.inputs[0]], self.θ[v], to)
                if beside:
                    self.dots[v] = self._linear_dots(node, self.θ[v])
            elif beside and v not in later and node.kind in CURVES:
                self._activation(step)
            else:
                if v in later:
                    self.deferred[v] = deferred(self.at(step))
                else:
                    self.values[v] = value_of(self.on, self.at(step))
                if beside:
                    self.dots[v] = push(self.on, self.at(step), self._dots_of(node))
            for u in spent:
                if self.tangent or not self.facts.read[u]:
                    self.values.pop(u, None)
                    self.deferred.pop(u, None)
                self.dots.pop(u, None)
        if not self.facts.steps[-1].linear:
            y.copy_(self.values[last][0])

    def _activation(self, step: Step) -> None:
        """σ and σ'∘u̇ in one pass over u."""
        at, (t,) = self.at(step), self._dots_of(step.node)
        value, out = (self.on.new(T, step.node.width, at.dtype) for T in (1, self.k))
        self.on.combine(out, t, factor=slope_of(step.node, at.u[0]), value=value)
        self.values[step.v], self.dots[step.v] = value, out

    def _linear_dots(self, node: Node, θ: Params) -> Tensor:
        u, W = node.inputs[0], weight_of(θ)
        if not u:  # a one-hot times W is a choice of its columns, not a product
            return take(W, self.x2).t()
        t = converted(self.dots[u], W.dtype)
        return torch.mm(flattened(t), W.t()).view(*t.shape[:-1], W.shape[0])

    def _dots_of(self, node: Node) -> list[Tensor | None]:
        if 0 in node.inputs and 0 not in self.dots:
            self.dots[0] = take(one_hot(self.on.x, self.facts.widths[0]), self.x2, 0)
        return [self.dots.get(u) for u in node.inputs]

    def tangent_slopes(self) -> Tensor:
        """J (n, D, k)."""
        y_dot = self.dots.get(self.facts.steps[-1].v)
        if y_dot is None:
            return self._no_slopes()
        if y_dot.dim() == 2:
            return y_dot.t().expand(self.on.count, -1, -1)
        return y_dot.permute(1, 2, 0)

    def _no_slopes(self) -> Tensor:
        return self.on.x.new_zeros(1, 1, 1).expand(self.on.count, self.D, self.k)

    def adjoint_slopes(self, wanted: Sequence[bool], pulled: dict[int, Tensor]) -> Tensor:
        """J (n, D, k) by D chains side by side.

        P runs down to the values that are ``wanted``; ``pulled`` is filled with what linear nodes
        pull.
        """
        facts = self.facts
        last, filled = facts.steps[-1], set[int]()
        chain = Cotangents(self.on, self.dtypes, parted_of(facts.widths, facts.steps))
        if not last.linear:
            chain.add(last.v, one_hot(self.on.x, self.D))
        for step, affine, _ in reversed(ups(facts.steps)):
            v, node, _, linear, _ = step
            if not wanted[v]:
                continue
            if v in pulled:
                chain.add(v, pulled[v].unsqueeze(0))
            P = chain.pop(v)
            if not linear:
                at = self.at(affine.first if affine else step)
                at = affine.pulling(at, self.θ) if affine else at
                for i, u in enumerate(at.node.inputs):
                    if wanted[u] or not u:
                        chain.add_pulled(at, given(P), i)
                continue
            u, W = node.inputs[0], weight_of(self.θ[v])
            if not u:
                u, W = X2, take(W, self.x2)
            elif not wanted[u]:
                continue
            if P is None:  # of y, the identity
                chain.add(u, W)
            elif facts.uniform[v] or u not in pulled:
                chain.add_product(u, P, W)
            else:
                add_product(pulled[u], converted(P[0], W.dtype), W, fresh=u not in filled)
                filled.add(u)
        of_x = chain.pop(0)
        if of_x is not None:
            chain.add(X2, take(of_x, self.x2))
        slopes = chain.of.get(X2)
        if slopes is None:
            return self._no_slopes()
        if slopes.dim() == 2:
            return slopes.expand(self.on.count, -1, -1)
        return slopes.transpose(0, 1)


def linear_value(h: Tensor, θ: Params, out: Tensor | None) -> Tensor:
    W, b = weight_of(θ), θ[1]
    flat = flattened(converted(h, W.dtype))
    if out is not None and out.dtype is not W.dtype:
        return out.copy_(linear_value(h, θ, None)[0]).unsqueeze(0)
    to = torch.mm(flat, W.t(), out=out) if b is None else torch.addmm(b, flat, W.t(), out=out)
    return to.unsqueeze(0)


def add_product(out: Tensor, P: Tensor, W: Tensor, fresh: bool) -> None:
    """out = P W, or added to it; out may be wider."""
    if out.dtype is not W.dtype:
        found = torch.mm(P, W)
        _ = out.copy_(found) if fresh else out.add_(found)
    elif fresh:
        torch.mm(P, W, out=out)
    else:
        out.addmm_(P, W)


def one_hot(x: Tensor, n: int) -> Tensor:
    """(n, n): part c is e_c, for every row."""
    return torch.eye(n, dtype=x.dtype, device=x.device)
