"""The hand-written forward and backward of both modes, in PyTorch operations.

What ``auto`` uses wherever no compiled kernel serves: any program of nodes. For chains it is the
readable twin of those kernels: the same four functions, the same walk over blocks of rows.

Both modes have one backward. With gJ = ∂loss/∂J, the loss depends on the slopes through
Σ_m s_mᵀ J(x_{n_m}) ẋ_m over the *active* pairs m only, those with a gJ that is not zero:

* tangent mode, a pair is (row n, column c): ẋ = e_c, s = gJ[n, :, c];
* adjoint mode, a pair is (row n, output d): ẋ = gJ[n, d, :], s = e_d.

The tangent ẋ is pushed up the program, the seed s pulled down it (P, the cotangent of a value under
the pair's seed). A node adds what its parameters do to its value and to its slope, and its
curvature joins the cotangent g of its inputs. For one output in adjoint mode the seed's chain P is
kept from the forward and g = gy∘P + q in every value, with q the chain of the curvature alone:
rows without a violation cost no input-gradient product at all.

Linear nodes are what costs: their values are saved, and the cotangents that they pull where P is
kept. Whatever stands between two of them is computed again in each block of the backward.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..columns import Columns, add, spread, take
from ..hinge import nan_rule, slope_cotangent, slope_weights
from ..nodes import columns_of
from ..problem import Problem, accumulate_dtype
from ..program import Node
from .schedule import (
    X2,
    Down,
    Facts,
    Params,
    Step,
    WayDown,
    blocks,
    facts_of,
    parameters_of,
    saved_like,
    way_down,
    weight_of,
)

__all__ = ["backward", "forward", "refuses", "saved_like", "step"]

Values = dict[int, Tensor]  # by number: 0 is x, i + 1 what node i made


def refuses(problem: Problem, x: Tensor) -> str | None:
    """Why this backend cannot serve the problem, or None. It serves every program."""
    return None if problem.cast is None else "it serves operands of one dtype"


def step() -> None:
    """It has no operator for a whole step of its own."""


class _Cotangents:
    """The cotangent of each value, summed over the nodes that read it.

    A sum is written in place only where its memory is known to be no one else's.
    """

    def __init__(self) -> None:
        self.of: Values = {}
        self.own = set[int]()

    def add(self, v: int, t: Tensor, own: bool) -> None:
        """Adds t, whose memory is new if ``own``."""
        held = self.of.get(v)
        if held is None:
            self.of[v] = t
        elif v in self.own and held.shape == t.shape:
            held.add_(t)
            return
        elif own and held.shape == t.shape:
            self.of[v] = t.add_(held)
        else:
            self.of[v], own = held + t, True
        if own:
            self.own.add(v)

    def add_pulled(
        self, step: Step, u: list[Tensor], v: Tensor, P: Tensor, θ: Params, mine: Sequence[bool]
    ) -> None:
        """Adds what a light node pulls down of P to those of its inputs that are ``mine``."""
        node, of = step.node, step.rule
        if node.kind == "columns":
            if mine[0]:
                self._add_columns(node, u[0].shape[-1], P)
            return
        for i, wanted, t in zip(node.inputs, mine, of.pull_now(node, u, v, P, θ), strict=True):
            if wanted:
                self.add(i, t, of.varies)

    def _add_columns(self, node: Node, width: int, P: Tensor) -> None:
        """The parts of a chunk go to where they belong: the pull of each by itself is mostly 0."""
        (u,), columns = node.inputs, columns_of(node)
        if u not in self.own or self.of[u].shape[:-1] != P.shape[:-1]:
            self.add(u, P.new_zeros(*P.shape[:-1], width), True)
        self.of[u][..., columns].add_(P)

    def add_product(self, v: int, g: Tensor, W: Tensor) -> None:
        """Adds g W."""
        held = self.of.get(v)
        if held is None:
            self.of[v] = g @ W
            self.own.add(v)
        elif held.shape[:-1] != g.shape[:-1]:
            self.add(v, g @ W, True)
        else:
            flat, g = held.flatten(0, -2), g.flatten(0, -2)
            if v in self.own:
                flat.addmm_(g, W)
            else:
                self.of[v] = torch.addmm(flat, g, W).view(held.shape)
                self.own.add(v)


# --- forward ------------------------------------------------------------------------------------


def forward(
    problem: Problem, x: Tensor, weight: Tensor | None, params: Params, save: bool
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """y (N, D), the penalty (or J where there is no hinge), and what the backward needs."""
    N, D, k, x2, facts = x.shape[0], problem.D, problem.k, problem.columns, facts_of(problem)
    saved = saved_like(problem, x) if save else []
    y = x.new_empty(N, D)
    J = x.new_empty(N, D, k, dtype=accumulate_dtype(x.dtype))
    for rows in blocks(problem, facts, x):
        θ = parameters_of(facts, params, rows, x)
        buffers = {v: t[rows] for v, t in zip(facts.saved, saved, strict=False)}
        values = _values(facts, x[rows], θ, buffers, y[rows])
        if problem.mode == "tangent":
            slopes = _tangent_slopes(facts, x2, values, θ)
        else:
            rest = zip(facts.pulled, saved[len(facts.saved) :], strict=False)
            pulled = {v: t[rows] for v, t in rest}
            wanted = facts.kept if save and problem.keeps_adjoint else facts.moving
            slopes = _adjoint_slopes(facts, x2, values, θ, wanted, pulled)
        J[rows] = 0.0 if slopes is None else slopes
    J = nan_rule(y, J)
    if problem.hinge is None:
        return y, J, saved
    penalty, S = slope_weights(J, problem.hinge, weight)
    if save:
        saved[-1] = S
    return y, penalty if problem.hinge.elementwise else penalty.sum(), saved


def _values(facts: Facts, x: Tensor, θ: dict[int, Params], buffers: Values, y: Tensor) -> Values:
    """The values of a block that its slopes read, those of linear nodes in ``buffers`` if given;
    the outputs in y."""
    values, last = {0: x}, facts.steps[-1].v
    for v, node, of, linear, spent in facts.steps:
        if linear:
            values[v] = _linear(values[node.inputs[0]], θ[v], y if v == last else buffers.get(v))
        else:
            values[v] = of.value_now(node, [values[u] for u in node.inputs], θ[v])
        for u in spent:
            if not facts.read[u]:
                del values[u]
    if not facts.steps[-1].linear:
        y.copy_(values[last])
    return values


def _linear(h: Tensor, θ: Params, out: Tensor | None) -> Tensor:
    W, b = weight_of(θ), θ[1]
    return torch.mm(h, W.t(), out=out) if b is None else torch.addmm(b, h, W.t(), out=out)


def _tangent_slopes(
    facts: Facts, x2: Columns, values: Values, θ: dict[int, Params]
) -> Tensor | None:
    """J (n or 1, D, k) of a block, all k tangents side by side; None where x2 does not reach y."""
    dots: Values = {}  # (k, n or 1, H)
    for v, node, of, linear, spent in facts.steps:
        if not facts.moving[v]:
            continue
        if linear:
            u, W = node.inputs[0], weight_of(θ[v])
            # A one-hot times W is a choice of its columns, not a product.
            dots[v] = dots[u] @ W.t() if u else take(W, x2).t().unsqueeze(1)
        else:
            if 0 in node.inputs and 0 not in dots:
                dots[0] = take(_one_hot(values[0], facts.widths[0]), x2, 0)
            at, u_dot = [values[u] for u in node.inputs], [dots.get(u) for u in node.inputs]
            dots[v] = of.push_now(node, at, values[v] if of.reads_v else at[0], u_dot, θ[v])
        for u in spent:
            dots.pop(u, None)
    y_dot = dots.get(facts.steps[-1].v)
    return None if y_dot is None else y_dot.permute(1, 2, 0)


def _adjoint_slopes(
    facts: Facts,
    x2: Columns,
    values: Values,
    θ: dict[int, Params],
    wanted: Sequence[bool],
    pulled: Values,
) -> Tensor | None:
    """J (n or 1, D, k) of a block, all D chains side by side; None where x2 does not reach y.

    P runs down to the values that are ``wanted``; ``pulled`` is filled with what linear nodes pull.
    """
    last, filled = facts.steps[-1], set[int]()
    P = _Cotangents()  # (D, n or 1, H)
    if not last.linear:
        P.add(last.v, _one_hot(values[last.v], last.node.width), True)
    for step in reversed(facts.steps):
        v, node, of, linear, _ = step
        if not wanted[v]:
            continue
        if v in pulled:
            P.add(v, pulled[v].unsqueeze(0), False)
        p = P.of.pop(v, None)
        if not linear:
            assert p is not None
            at = [values[u] for u in node.inputs]
            value = values[v] if of.reads_v else at[0]
            mine = [wanted[u] or not u for u in node.inputs]
            P.add_pulled(step, at, value, p, θ[v], mine)
            continue
        u, W = node.inputs[0], weight_of(θ[v])
        if not u:
            u, W = X2, take(W, x2)
        elif not wanted[u]:
            continue
        if p is None:  # of y, the identity
            P.add(u, W.unsqueeze(1), False)
        elif facts.uniform[v] or u not in pulled:
            P.add_product(u, p, W)
        elif u in filled:
            pulled[u].addmm_(p.squeeze(0), W)
        else:
            torch.mm(p.squeeze(0), W, out=pulled[u])
            filled.add(u)
    if 0 in P.of:
        P.add(X2, take(P.of[0], x2), False)
    slopes = P.of.get(X2)
    return None if slopes is None else slopes.transpose(0, 1)


def _one_hot(like: Tensor, n: int) -> Tensor:
    """(n, 1, n): row c is e_c, for every row of a batch."""
    return torch.eye(n, dtype=like.dtype, device=like.device).unsqueeze(1)


# --- backward -----------------------------------------------------------------------------------


def backward(
    problem: Problem,
    gy: Tensor | None,
    gout: Tensor | None,
    x: Tensor,
    params: Params,
    saved: Sequence[Tensor],
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """The gradients of x and of every parameter, None where not needed (``needs``, x first)."""
    grads = _Gradients(x, params, needs)
    gJ = _slope_cotangent(problem, gout, saved)
    if gy is None and gJ is None:
        return grads.result()
    facts = facts_of(problem)
    way = way_down(problem, needs)
    for rows in blocks(problem, facts, x):
        _Block(problem, facts, way, x, params, saved, gy, gJ, rows).add_to(grads)
    return grads.result()


def _slope_cotangent(
    problem: Problem, gout: Tensor | None, saved: Sequence[Tensor]
) -> Tensor | None:
    if gout is None or problem.hinge is None:
        return gout
    return slope_cotangent(gout, saved[-1])


class _Gradients:
    """The sums of the gradients, in the accumulation dtype: ``Sums`` of the table of nodes.

    What is first added to a sum begins it, if it covers the parameter.
    """

    def __init__(self, x: Tensor, params: Params, needs: Sequence[bool]) -> None:
        self.params, self.dtype = params, accumulate_dtype(x.dtype)
        self.dx = torch.zeros_like(x, memory_format=torch.contiguous_format) if needs[0] else None
        self.wanted = needs[1:]
        self.sums: dict[int, Tensor] = {}

    def product(self, place: int, left: Tensor, right: Tensor) -> None:
        """dW += leftᵀ right."""
        if not self.wanted[place]:
            return
        dW = self.sums.get(place)
        if dW is not None and dW.dtype == left.dtype:
            dW.addmm_(left.t(), right)
        else:
            self._add(place, left.t() @ right)

    def product_of_x2(self, place: int, left: Tensor, right: Tensor, x2: Columns) -> None:
        """The same in the columns x2 of dW alone, as many as right (m, k) has."""
        if self.wanted[place]:
            if place not in self.sums:
                self.sums[place] = self._zeros(place)
            add(self.sums[place], x2, left.t() @ right)

    def rows(self, place: int, t: Tensor) -> None:
        """dθ += the sum of t (m, H) over its rows, and over its columns where θ is one number."""
        θ = self.params[place]
        if not self.wanted[place] or θ is None:
            return
        if θ.shape[0] == t.shape[1]:
            self._add(place, t.sum(0, dtype=self.dtype))
        else:
            self._add(place, t.sum((0, 1), dtype=self.dtype).view(1))

    def _add(self, place: int, t: Tensor) -> None:
        found = self.sums.get(place)
        if found is None:
            self.sums[place] = t if t.dtype is self.dtype else t.to(self.dtype)
        else:
            found.add_(t)

    def _zeros(self, place: int) -> Tensor:
        θ = self.params[place]
        assert θ is not None
        return θ.new_zeros(θ.shape, dtype=self.dtype)

    def result(self) -> list[Tensor | None]:
        """The gradients in their parameters' dtypes, x first: zeros where nothing was added."""
        found: list[Tensor | None] = [self.dx]
        for place, (θ, wanted) in enumerate(zip(self.params, self.wanted, strict=True)):
            d = self.sums.get(place)
            if d is None and wanted and θ is not None:
                d = self._zeros(place)
            found.append(d if d is None or θ is None or d.dtype is θ.dtype else d.to(θ.dtype))
        return found


class _Block:
    """One block of rows on its way back. Where gy is None only its active rows are left in it."""

    def __init__(
        self,
        problem: Problem,
        facts: Facts,
        way: WayDown,
        x: Tensor,
        params: Params,
        saved: Sequence[Tensor],
        gy: Tensor | None,
        gJ: Tensor | None,
        rows: slice,
    ) -> None:
        self.facts, self.way = facts, way
        self.rows: slice | Tensor = rows
        gJ = None if gJ is None else gJ[rows]
        if gy is None and gJ is not None:
            some = (gJ != 0).flatten(1).any(1).nonzero().squeeze(1)
            gJ, self.rows = gJ[some], some + rows.start
        self.gy = None if gy is None else gy[rows]
        self.pairs = None if gJ is None else _Pairs.of(problem, gJ, x.dtype)
        self.θ = parameters_of(facts, params, self.rows, x)
        self.values: Values = {0: x[self.rows]}
        # The cotangents g of values, and P (n or 1, H) of those that have g = gy∘P + q.
        self.g, self.P = _Cotangents(), _Cotangents()
        for v, t in zip(facts.saved, saved, strict=False):
            self.values[v] = t[self.rows]
        for v, t in zip(facts.pulled, saved[len(facts.saved) :], strict=False):
            self.P.add(v, t[self.rows], False)

    def add_to(self, grads: _Gradients) -> None:
        """Adds what the block's rows give to the gradients."""
        if self.gy is None and self.pairs is None:
            return
        values, y = self.values, self.facts.steps[-1].v
        for v, node, of, *_ in self.way.again:
            values[v] = of.value_now(node, [values[u] for u in node.inputs], self.θ[v])
        if self.facts.kept[y]:
            self.P.add(y, values[0].new_ones(1, 1), False)
        elif self.gy is not None:
            self.g.add(y, self.gy, False)
        if self.pairs is not None:
            self.pairs.run_tangent(self)
        for down in self.way.nodes:
            (self._linear if down.step.linear else self._light)(down, grads)
            values.pop(down.step.v, None)
            if self.pairs is not None:
                self.pairs.forget(down.step.v)
        dx = self.g.of.get(0)
        if grads.dx is not None and dx is not None:
            grads.dx[self.rows] = dx

    def _cotangent(self, v: int, P: Tensor | None, passed: Tensor | None) -> Tensor | None:
        """g of value v, from its P and q where it is kept by those."""
        if not self.facts.kept[v]:
            return self.g.of.pop(v, None)
        return self._join(None if self.gy is None or P is None else self.gy * P, passed)

    def _join(self, g: Tensor | None, q: Tensor | None) -> Tensor | None:
        """g + q, of the block and of its pairs, in the memory of g."""
        if q is None or self.pairs is None:
            return g
        if g is None:
            if self.pairs.everything:
                return q
            g = q.new_zeros(self.values[0].shape[0], q.shape[1])
        self.pairs.scatter_add(g, q)
        return g

    def _linear(self, down: Down, grads: _Gradients) -> None:
        (v, node, *_), trained, (direct,), (kept,), _ = down
        θ, u, P, pairs = self.θ[v], node.inputs[0], self.P.of.pop(v, None), self.pairs
        q = None if pairs is None else pairs.chain.of.pop(v, None)
        if trained or direct:
            g = self._cotangent(v, P, q)
            if g is not None and trained:
                grads.product(node.params[0], g, self.values[u])
                if θ[1] is not None:
                    grads.rows(node.params[1], g)
            if g is not None and direct:
                self.g.add_product(u, g, weight_of(θ))
        if pairs is not None:
            pairs.linear(self, down, P, q, grads)
        if kept and P is not None and self.facts.uniform[v]:  # else it was saved
            self.P.add_product(u, P, weight_of(θ))

    def _light(self, down: Down, grads: _Gradients) -> None:
        (v, node, of, *_), trained, direct, kept, _ = down
        θ, u, P = self.θ[v], [self.values[u] for u in node.inputs], self.P.of.pop(v, None)
        value = self.values[v] if of.reads_v else u[0]
        q: Tensor | None = None
        curvature: Sequence[Tensor | None] = ()
        if self.pairs is not None:
            q = self.pairs.chain.of.pop(v, None)
            curvature = self.pairs.light(self, down, P, q, grads)
        if trained or True in direct:
            g = self._cotangent(v, P, q)
            if trained and g is not None:
                of.parameters(node, u, g, θ, grads)
            if g is not None and True in direct:
                self.g.add_pulled(down.step, u, value, g, θ, direct)
            for i, mine, c in zip(node.inputs, direct, curvature, strict=False):
                if mine and c is not None and g is not None and self.pairs is not None:
                    self.pairs.scatter_add(self.g.of[i], c)  # a curved node's pull is new memory
                elif mine and (joined := self._join(None, c)) is not None:
                    self.g.add(i, joined, True)
        if P is not None and True in kept:
            self.P.add_pulled(down.step, u, value, P, θ, kept)


class _Pairs:
    """The active pairs of a block: rows r, tangents ẋ (m, k), seeds s (m, D), grouped.

    A group shares one column (tangent mode) or one output (adjoint mode), so that its rows are
    distinct and a scatter is free of collisions: deterministic on every device. ``chain`` is what
    comes down the program for the pairs alone: P, or q where P is kept.
    """

    def __init__(
        self,
        x2: Columns,
        row: Tensor,
        x_dot: Tensor,
        seed: Tensor,
        groups: list[int],
        everything: bool,
    ) -> None:
        self.x2, self.row, self.x_dot, self.seed, self.groups = x2, row, x_dot, seed, groups
        self.rows = row.split(groups) if len(groups) > 1 else (row,)
        self.everything = everything  # one group, all rows: nothing to gather
        self.values: Values = {}
        self.dots: Values = {}
        self.chain = _Cotangents()

    @classmethod
    def of(cls, problem: Problem, gJ: Tensor, dtype: torch.dtype) -> _Pairs | None:
        """Those of gJ (n, D, k) that are not zero, None where all are."""
        tangent = problem.mode == "tangent"
        by_group = gJ.permute(2, 0, 1) if tangent else gJ.permute(1, 0, 2)
        active = (by_group != 0).any(2)  # (groups, n)
        group, row = active.nonzero(as_tuple=True)
        if not len(row):
            return None
        own = by_group[group, row].to(dtype)
        other = torch.zeros(len(row), active.shape[0], dtype=dtype, device=gJ.device)
        other.scatter_(1, group.unsqueeze(1), 1.0)
        x_dot, seed = (other, own) if tangent else (own, other)
        groups = active.sum(1).tolist()
        return cls(problem.columns, row, x_dot, seed, groups, groups == [active.shape[1]])

    def take(self, t: Tensor) -> Tensor:
        """The pairs' rows of a block's tensor."""
        return t if self.everything else t.index_select(0, self.row)

    def scatter_add(self, g: Tensor, q: Tensor) -> None:
        """g[row] += q, group by group."""
        if self.everything:
            g.add_(q)
            return
        parts = q.split(self.groups) if len(self.groups) > 1 else (q,)
        for rows, part in zip(self.rows, parts, strict=True):
            g.index_add_(0, rows, part)

    def forget(self, v: int) -> None:
        """Lets go of what the walk down is done with."""
        self.values.pop(v, None)
        self.dots.pop(v, None)

    def run_tangent(self, block: _Block) -> None:
        """The tangents that the walk down needs, for the directions ẋ; the seeds of y."""
        dots, x_dot = self.dots, self.x_dot
        for step in block.way.tangents:
            v, node, of, linear, _ = step
            if not linear:
                u, value, θ = self._operands(block, step)
                dots[v] = of.push_now(node, u, value, self._dots(block, node), θ)
            elif node.inputs[0]:
                dots[v] = dots[node.inputs[0]] @ weight_of(block.θ[v]).t()
            else:
                dots[v] = x_dot @ take(weight_of(block.θ[v]), self.x2).t()
        y = block.facts.steps[-1].v
        if block.facts.moving[y] and not block.facts.kept[y]:
            self.chain.add(y, self.seed, False)

    def linear(
        self,
        block: _Block,
        down: Down,
        P: Tensor | None,
        passed: Tensor | None,
        grads: _Gradients,
    ) -> None:
        """The slopes' part in dW; the chain goes down the node."""
        v, node, *_ = down.step
        u = node.inputs[0]
        p = self._seeds(block, v, P, passed) if down.trained else None
        if p is not None and u:
            grads.product(node.params[0], p, self.dots[u])
        elif p is not None:
            grads.product_of_x2(node.params[0], p, self.x_dot, self.x2)
        if passed is not None and down.by_pairs[0]:
            self.chain.add_product(u, passed, weight_of(block.θ[v]))

    def light(
        self,
        block: _Block,
        down: Down,
        P: Tensor | None,
        passed: Tensor | None,
        grads: _Gradients,
    ) -> Sequence[Tensor | None]:
        """The slopes' part in dθ; the chain goes down the node. The node's curvature in each of its
        inputs, if it has any."""
        v, node, of, *_ = down.step
        p = self._seeds(block, v, P, passed) if down.trained or of.curved else None
        if passed is None and p is None:
            return ()
        curvature: Sequence[Tensor | None] = ()
        u, value, θ = self._operands(block, down.step)
        if p is not None:
            u_dot = self._dots(block, node)
            if down.trained:
                of.slope_parameters(node, u, u_dot, p, θ, grads)
            if of.curved:
                curvature = of.curvature(node, u, value, u_dot, p, θ)
        if passed is not None and True in down.by_pairs:
            self.chain.add_pulled(down.step, u, value, passed, θ, down.by_pairs)
        for i, mine, c in zip(node.inputs, down.kept, curvature, strict=False):
            if mine and c is not None:
                self.chain.add(i, c, True)
        return curvature

    def _seeds(
        self, block: _Block, v: int, P: Tensor | None, passed: Tensor | None
    ) -> Tensor | None:
        """The pairs' own P (m, H) of value v; None where x2 does not reach it."""
        if not block.facts.moving[v]:
            return None
        if P is None:
            return passed
        return P.expand(len(self.row), -1) if block.facts.uniform[v] else self.take(P)

    def _operands(self, block: _Block, step: Step) -> tuple[list[Tensor], Tensor, Params]:
        """u, v and θ of a light node for the pairs: rows of those alone that the node reads."""
        v, node, of, *_ = step
        u = [self._value(block, i) if of.varies else block.values[i] for i in node.inputs]
        θ: Params = block.θ[v]
        if of.per_row:
            θ = [t if t is None else self.take(t) for t in θ]
        return u, self._value(block, v) if of.reads_v else u[0], θ

    def _value(self, block: _Block, v: int) -> Tensor:
        found = self.values.get(v)
        if found is None:
            found = self.values[v] = self.take(block.values[v])
        return found

    def _dots(self, block: _Block, node: Node) -> list[Tensor | None]:
        """The tangents of the node's inputs, None where one has none."""
        if 0 in node.inputs and 0 not in self.dots:
            self.dots[0] = spread(self.x_dot, self.x2, block.facts.widths[0])
        return [self.dots.get(u) for u in node.inputs]
