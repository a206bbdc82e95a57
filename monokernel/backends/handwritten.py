"""The hand-written forward and backward of both modes, in PyTorch operations.

What ``auto`` uses wherever no compiled kernel serves: any program of nodes. For chains it is the
readable twin of those kernels: the same four functions, the same walk over blocks of rows.

Both modes have one backward. With gJ = ∂loss/∂J, the loss depends on the slopes through
Σ_m s_mᵀ J(x_{r_m}) ẋ_m over the *active* pairs m only, those with a gJ that is not zero:

* tangent mode, a pair is (row, column c): ẋ = e_c, s = gJ[row, :, c];
* adjoint mode, a pair is (row, output d): ẋ = gJ[row, d, :], s = e_d.

The tangent ẋ is pushed up the program, the seed s pulled down it (P, the cotangent of a value under
the pair's seed). A node adds what its parameters do to its value and to its slope, and its
curvature joins the cotangent g of its inputs. For one output in adjoint mode the seed's chain P is
kept from the forward and g = gy∘P + q in every value, with q the chain of the curvature alone:
rows without a violation cost no input-gradient product at all.

Linear nodes are what costs: their values are saved, and the cotangents that they pull where P is
kept. Whatever stands between two of them is computed again in each block of the backward.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..hinge import slope_cotangent, slope_weights
from ..nodes import moving, rule, used
from ..problem import Problem, accumulate_dtype, nan_rule
from ..program import Node

__all__ = ["backward", "forward", "refuses", "saved_like"]

Params = Sequence[Tensor | None]
Values = dict[int, Tensor]  # by number: 0 is x, i + 1 what node i made

# Elements of one activation block. On the CPU 2^18 (1 MiB of float32) keeps a block in the L2
# cache through a layer's element-wise passes; elsewhere only the temporaries' size is bounded.
BLOCK_ELEMENTS = {"cpu": 1 << 18}
BLOCK_ELEMENTS_ELSEWHERE = 1 << 26
FEWEST_ROWS = 256


def refuses(problem: Problem, x: Tensor) -> str | None:
    """Why this backend cannot serve the problem, or None. It serves every one."""
    return None


def saved_like(problem: Problem, x: Tensor) -> list[Tensor]:
    """Uninitialised buffers for what the backward needs again, in the order the forward fills them:

    the values (N, H) of linear nodes but for y itself, the cotangents (N, H) that they pull where
    the adjoint chain is kept, ∂penalty/∂J (N, D, k) when there is a hinge.
    """
    N, facts = x.shape[0], _facts_of(problem)
    saved = [x.new_empty(N, facts.widths[v]) for v in (*facts.saved, *facts.pulled)]
    if problem.hinge is not None:
        saved.append(x.new_empty(N, problem.D, problem.k, dtype=accumulate_dtype(x.dtype)))
    return saved


class _Facts(NamedTuple):
    """What a program says of itself whatever its operands. Flags are by value."""

    widths: tuple[int, ...]  # columns of each value
    used: tuple[int, ...]  # the nodes that y depends on
    moving: tuple[bool, ...]  # whether x2 reaches it
    uniform: tuple[bool, ...]  # whether its P is the same in every row
    kept: tuple[bool, ...]  # whether g = gy∘P + q is what the backward has of it
    saved: tuple[int, ...]  # values of linear nodes, but for y
    pulled: tuple[int, ...]  # kept values to which linear nodes pull a P of N rows
    # By node. What is done with is let go at once: the next result then lies in warm memory.
    spent: tuple[tuple[int, ...], ...]  # the values that no later node reads
    read: tuple[bool, ...]  # by value: whether slopes read it, and not linear nodes alone


def _facts_of(problem: Problem) -> _Facts:
    return _facts(problem.d, problem.nodes, problem.k, problem.keeps_adjoint)


@lru_cache(maxsize=1024)
def _facts(d: int, nodes: tuple[Node, ...], k: int, keeps_adjoint: bool) -> _Facts:
    needed, moves, y = used(nodes), moving(d, k, nodes), len(nodes)
    trains = [False]  # whether there is a parameter at the value or below it
    for node in nodes:
        trains.append(bool(node.params) or any(trains[v] for v in node.inputs))
    # Below the lowest parameter only x wants a gradient, which nobody knows while the forward runs.
    kept = [keeps_adjoint and v > 0 and (moves[v] or trains[v]) for v in range(y + 1)]
    uniform, pulled = [True] * (y + 1), set[int]()
    for i in reversed(needed):
        node, of = nodes[i], rule(nodes[i])
        for v in node.inputs:
            if not uniform[i + 1] or of.varies or of.per_row:
                uniform[v] = False
            if node.kind == "linear" and kept[v] and not uniform[i + 1]:
                pulled.add(v)
    spent: list[tuple[int, ...]] = [()] * y
    read, seen = [False] * (y + 1), set[int]()
    for i in reversed(needed):
        node, inputs = nodes[i], set(nodes[i].inputs)
        spent[i] = tuple(inputs - seen)
        seen |= inputs
        if node.kind != "linear":
            for v in inputs:
                read[v] = True
        read[i + 1] |= rule(node).reads_v
    return _Facts(
        (d, *[node.width for node in nodes]),
        needed,
        moves,
        tuple(uniform),
        tuple(kept),
        tuple([i + 1 for i in needed if nodes[i].kind == "linear" and i + 1 < y]),
        tuple(sorted(pulled)),
        tuple(spent),
        tuple(read),
    )


def _blocks(problem: Problem, x: Tensor) -> Iterator[slice]:
    fan = problem.k if problem.mode == "tangent" else problem.D
    budget = BLOCK_ELEMENTS.get(x.device.type, BLOCK_ELEMENTS_ELSEWHERE)
    size = max(FEWEST_ROWS, budget // max(1, fan * max(_facts_of(problem).widths)))
    for start in range(0, x.shape[0], size):
        yield slice(start, min(start + size, x.shape[0]))


def _parameters(
    problem: Problem, params: Params, rows: slice | Tensor
) -> list[list[Tensor | None]]:
    """θ of each node, of a block's rows where a parameter has one for each."""
    found: list[list[Tensor | None]] = []
    for node in problem.nodes:
        θ = [params[place] for place in node.params]
        found.append([t if t is None else t[rows] for t in θ] if rule(node).per_row else θ)
    return found


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

    def add_product(self, v: int, g: Tensor, W: Tensor) -> None:
        """Adds g W."""
        held = self.of.get(v)
        if held is None or held.shape[:-1] != g.shape[:-1]:
            self.add(v, g @ W, True)
        elif v in self.own:
            held.view(-1, held.shape[-1]).addmm_(g.reshape(-1, g.shape[-1]), W)
        else:
            total = torch.addmm(held.reshape(-1, held.shape[-1]), g.reshape(-1, g.shape[-1]), W)
            self.of[v] = total.view(held.shape)
            self.own.add(v)


# --- forward ------------------------------------------------------------------------------------


def forward(
    problem: Problem, x: Tensor, weight: Tensor | None, params: Params, save: bool
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """y (N, D), the penalty (or J where there is no hinge), and what the backward needs."""
    N, D, k, facts = x.shape[0], problem.D, problem.k, _facts_of(problem)
    saved = saved_like(problem, x) if save else []
    kept = saved[len(facts.saved) :]
    y = x.new_empty(N, D)
    J = x.new_empty(N, D, k, dtype=accumulate_dtype(x.dtype))
    for rows in _blocks(problem, x):
        θ = _parameters(problem, params, rows)
        buffers = {v: t[rows] for v, t in zip(facts.saved, saved, strict=False)}
        values = _values(problem, x[rows], θ, buffers, y[rows])
        if problem.mode == "tangent":
            slopes = _tangent_slopes(problem, values, θ)
        else:
            pulled = {v: t[rows] for v, t in zip(facts.pulled, kept, strict=False)}
            slopes = _adjoint_slopes(problem, values, θ, pulled, save)
        J[rows] = 0.0 if slopes is None else slopes
    J = nan_rule(y, J)
    if problem.hinge is None:
        return y, J, saved
    penalty, S = slope_weights(J, problem.hinge, weight)
    if save:
        saved[-1] = S
    return y, penalty if problem.hinge.elementwise else penalty.sum(), saved


def _values(problem: Problem, x: Tensor, θ: Sequence[Params], buffers: Values, y: Tensor) -> Values:
    """The values of a block, those of linear nodes in ``buffers`` if given; the outputs in y."""
    values, last = {0: x}, len(problem.nodes) - 1
    facts = _facts_of(problem)
    for i in facts.used:
        node = problem.nodes[i]
        if node.kind == "linear":
            out = y if i == last else buffers.get(i + 1)
            values[i + 1] = _linear(values[node.inputs[0]], θ[i], out)
        else:
            u = [values[v] for v in node.inputs]
            values[i + 1] = rule(node).value_now(node, u, θ[i])
        for v in facts.spent[i]:
            if not facts.read[v]:
                del values[v]
    if problem.nodes[last].kind != "linear":
        y.copy_(values[last + 1])
    return values


def _linear(h: Tensor, θ: Params, out: Tensor | None) -> Tensor:
    W, b = _weight(θ), θ[1]
    return torch.mm(h, W.t(), out=out) if b is None else torch.addmm(b, h, W.t(), out=out)


def _weight(θ: Params) -> Tensor:
    """W of a linear node: never None, unlike a bias."""
    W = θ[0]
    assert W is not None
    return W


def _tangent_slopes(problem: Problem, values: Values, θ: Sequence[Params]) -> Tensor | None:
    """J (n or 1, D, k) of a block, all k tangents side by side; None where x2 does not reach y."""
    d, k, nodes, facts = problem.d, problem.k, problem.nodes, _facts_of(problem)
    dots: Values = {}  # (k, n or 1, H)
    for i in facts.used:
        node = nodes[i]
        if not facts.moving[i + 1]:
            continue
        if node.kind == "linear":
            u, W = node.inputs[0], _weight(θ[i])
            # A one-hot times W is a choice of its columns, not a product.
            dots[i + 1] = dots[u] @ W.t() if u else W[:, d - k :].t().unsqueeze(1)
        else:
            if 0 in node.inputs and 0 not in dots:
                dots[0] = _one_hot(values[0], d)[d - k :]
            of, at = rule(node), [values[v] for v in node.inputs]
            v, u_dot = values[i + 1] if of.reads_v else at[0], [dots.get(v) for v in node.inputs]
            dots[i + 1] = of.push_now(node, at, v, u_dot, θ[i])
        for u in facts.spent[i]:
            dots.pop(u, None)
    y_dot = dots.get(len(nodes))
    return None if y_dot is None else y_dot.permute(1, 2, 0)


def _adjoint_slopes(
    problem: Problem, values: Values, θ: Sequence[Params], pulled: Values, save: bool
) -> Tensor | None:
    """J (n or 1, D, k) of a block, all D chains side by side; None where x2 does not reach y.

    Fills ``pulled`` with what linear nodes pull.
    """
    d, k, nodes, facts = problem.d, problem.k, problem.nodes, _facts_of(problem)
    wanted = facts.kept if save and problem.keeps_adjoint else facts.moving
    last = len(nodes) - 1
    P, filled = _Cotangents(), set[int]()  # (D, n or 1, H), of x2 alone for x
    if nodes[last].kind != "linear":
        P.add(last + 1, _one_hot(values[last + 1], problem.D), True)
    for i in reversed(facts.used):
        node = nodes[i]
        if not wanted[i + 1]:
            continue
        if i + 1 in pulled:
            P.add(i + 1, pulled[i + 1].unsqueeze(0), False)
        p = P.of.pop(i + 1, None)
        if node.kind != "linear":
            assert p is not None
            of, at = rule(node), [values[v] for v in node.inputs]
            v = values[i + 1] if of.reads_v else at[0]
            for u, t in zip(node.inputs, of.pull_now(node, at, v, p, θ[i]), strict=True):
                P.add(u, t if u else t[..., d - k :], of.varies)
            continue
        u, W = node.inputs[0], _weight(θ[i])
        if u and not wanted[u]:
            continue
        W = W if u else W[:, d - k :]
        if p is None:  # of y, the identity
            P.add(u, W.unsqueeze(1), False)
        elif facts.uniform[i + 1] or u not in pulled:
            P.add_product(u, p, W)
        elif u in filled:
            pulled[u].addmm_(p.squeeze(0), W)
        else:
            torch.mm(p.squeeze(0), W, out=pulled[u])
            filled.add(u)
    slopes = P.of.get(0)
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
    weight: Tensor | None,
    params: Params,
    saved: Sequence[Tensor],
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """The gradients of x and of every parameter, None where not needed (``needs``, x first)."""
    grads = _Gradients(problem, x, params, needs)
    gJ = _slope_cotangent(problem, gout, saved)
    if gy is None and gJ is None:
        return grads.result()
    way = _way_down(problem.d, problem.nodes, problem.k, problem.keeps_adjoint, tuple(needs))
    for rows in _blocks(problem, x):
        _Block(problem, way, x, params, saved, gy, gJ, rows).add_to(grads)
    return grads.result()


def _slope_cotangent(
    problem: Problem, gout: Tensor | None, saved: Sequence[Tensor]
) -> Tensor | None:
    if gout is None or problem.hinge is None:
        return gout
    return slope_cotangent(gout, saved[-1])


class _WayDown(NamedTuple):
    """What the backward walks over for the gradients that it is asked for."""

    wanted: tuple[bool, ...]  # of each value, whether a gradient is wanted at it or below
    trained: tuple[bool, ...]  # of each node, whether its own parameters want one
    nodes: tuple[int, ...]  # those whose value is wanted, from y down
    again: tuple[int, ...]  # light nodes whose values are computed again, from x up
    tangents: tuple[int, ...]  # nodes whose tangents pairs need, from x up


@lru_cache(maxsize=1024)
def _way_down(
    d: int, nodes: tuple[Node, ...], k: int, keeps_adjoint: bool, needs: tuple[bool, ...]
) -> _WayDown:
    facts = _facts(d, nodes, k, keeps_adjoint)
    trained = [any(needs[1 + place] for place in node.params) for node in nodes]
    wanted = [needs[0]]
    for node, own in zip(nodes, trained, strict=True):
        wanted.append(own or any(wanted[v] for v in node.inputs))
    down = [i for i in reversed(facts.used) if wanted[i + 1]]
    values, tangents = set[int](), set[int]()
    for i in down:
        node, of = nodes[i], rule(nodes[i])
        if of.per_row and trained[i]:
            raise RuntimeError(f"mlp: expected a {node.kind} that is drawn, got one to be trained")
        linear = node.kind == "linear"
        if trained[i] or not linear:
            values.update((*node.inputs, i + 1) if of.reads_v else node.inputs)
        if facts.moving[i + 1] and (trained[i] or of.curved):
            tangents.update(node.inputs)
    for i in reversed(facts.used):
        if i + 1 in values and nodes[i].kind != "linear":
            values.update(nodes[i].inputs)
        if i + 1 in tangents and facts.moving[i + 1]:
            tangents.update(nodes[i].inputs)
            if nodes[i].kind != "linear":
                values.update(nodes[i].inputs)
                if rule(nodes[i]).reads_v:
                    values.add(i + 1)
    again = [i for i in facts.used if i + 1 in values and nodes[i].kind != "linear"]
    dots = [i for i in facts.used if i + 1 in tangents and facts.moving[i + 1]]
    return _WayDown(tuple(wanted), tuple(trained), tuple(down), tuple(again), tuple(dots))


class _Gradients:
    """The accumulators, in the accumulation dtype: ``Sums`` of the table of nodes."""

    def __init__(self, problem: Problem, x: Tensor, params: Params, needs: Sequence[bool]) -> None:
        self.params = params
        self.dx = torch.zeros_like(x, memory_format=torch.contiguous_format) if needs[0] else None
        self.d: list[Tensor | None] = [
            p.new_zeros(p.shape, dtype=accumulate_dtype(p.dtype))
            if need and p is not None
            else None
            for p, need in zip(params, needs[1:], strict=True)
        ]

    def product(
        self, place: int, left: Tensor, right: Tensor, columns: slice = slice(None)
    ) -> None:
        """dW[:, columns] += leftᵀ right."""
        dW = self.d[place]
        if dW is None:
            return
        dW = dW[:, columns]
        if dW.dtype == left.dtype:
            dW.addmm_(left.t(), right)
        else:
            dW.add_(left.t() @ right)

    def rows(self, place: int, t: Tensor) -> None:
        """dθ += the sum of t (m, H) over its rows, and over its columns where θ is one number."""
        dθ = self.d[place]
        if dθ is not None:
            axes = (0,) if dθ.shape == t.shape[1:] else (0, 1)
            dθ.add_(t.sum(axes, dtype=dθ.dtype))

    def result(self) -> list[Tensor | None]:
        cast = [
            d if d is None or p is None else d.to(p.dtype)
            for d, p in zip(self.d, self.params, strict=True)
        ]
        return [self.dx, *cast]


class _Block:
    """One block of rows on its way back. Where gy is None only its active rows are left in it."""

    def __init__(
        self,
        problem: Problem,
        way: _WayDown,
        x: Tensor,
        params: Params,
        saved: Sequence[Tensor],
        gy: Tensor | None,
        gJ: Tensor | None,
        rows: slice,
    ) -> None:
        self.nodes, self.way, self.facts = problem.nodes, way, _facts_of(problem)
        self.rows: slice | Tensor = rows
        gJ = None if gJ is None else gJ[rows]
        if gy is None and gJ is not None:
            some = (gJ != 0).flatten(1).any(1).nonzero().squeeze(1)
            gJ, self.rows = gJ[some], some + rows.start
        self.gy = None if gy is None else gy[rows]
        self.pairs = None if gJ is None else _Pairs.of(problem, gJ, x.dtype)
        self.θ = _parameters(problem, params, self.rows)
        self.values: Values = {0: x[self.rows]}
        # The cotangents g of values, and P (n or 1, H) of those that have g = gy∘P + q.
        self.g, self.P = _Cotangents(), _Cotangents()
        for v, t in zip(self.facts.saved, saved, strict=False):
            self.values[v] = t[self.rows]
        for v, t in zip(self.facts.pulled, saved[len(self.facts.saved) :], strict=False):
            self.P.add(v, t[self.rows], False)

    def add_to(self, grads: _Gradients) -> None:
        """Adds what the block's rows give to the gradients."""
        if self.gy is None and self.pairs is None:
            return
        values = self.values
        for i in self.way.again:
            node = self.nodes[i]
            u = [values[v] for v in node.inputs]
            values[i + 1] = rule(node).value_now(node, u, self.θ[i])
        y = len(self.nodes)
        if self.facts.kept[y]:
            self.P.add(y, values[0].new_ones(1, 1), False)
        elif self.gy is not None:
            self.g.add(y, self.gy, False)
        if self.pairs is not None:
            self.pairs.run_tangent(self)
        for i in self.way.nodes:
            (self._linear if self.nodes[i].kind == "linear" else self._light)(i, grads)
            self.values.pop(i + 1, None)
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

    def _linear(self, i: int, grads: _Gradients) -> None:
        node, θ, v, facts = self.nodes[i], self.θ[i], i + 1, self.facts
        u, trained = node.inputs[0], self.way.trained[i]
        wanted, kept = self.way.wanted[u], facts.kept[u]
        P = self.P.of.pop(v, None)
        passed = None if self.pairs is None else self.pairs.linear(self, i, P, grads)
        if trained or (wanted and not kept):
            g = self._cotangent(v, P, passed)
            if g is not None:
                if trained:
                    grads.product(node.params[0], g, self.values[u])
                    if θ[1] is not None:
                        grads.rows(node.params[1], g)
                if wanted and not kept:
                    self.g.add_product(u, g, _weight(θ))
        if wanted and kept and P is not None and facts.uniform[v]:  # else it was saved
            self.P.add_product(u, P, _weight(θ))

    def _light(self, i: int, grads: _Gradients) -> None:
        node, θ, v, of = self.nodes[i], self.θ[i], i + 1, rule(self.nodes[i])
        trained, wanted = self.way.trained[i], self.way.wanted
        kept = [wanted[j] and self.facts.kept[j] for j in node.inputs]  # these by P and q,
        whole = [wanted[j] and not self.facts.kept[j] for j in node.inputs]  # these by g
        u = [self.values[j] for j in node.inputs]
        value = self.values[v] if of.reads_v else u[0]
        P = self.P.of.pop(v, None)
        passed: Tensor | None = None
        curvature: list[Tensor | None] = [None] * len(u)
        if self.pairs is not None:
            passed, curvature = self.pairs.light(self, i, P, grads)
        if trained or any(whole):
            g = self._cotangent(v, P, passed)
            if trained and g is not None:
                of.parameters(node, u, g, θ, grads)
            down = [None] * len(u) if g is None else of.pull_now(node, u, value, g, θ)
            for j, mine, t, c in zip(node.inputs, whole, down, curvature, strict=True):
                t = self._join(t, c) if mine else None
                if t is not None:
                    self.g.add(j, t, of.varies)
        if P is not None and any(kept):
            pulled = of.pull_now(node, u, value, P, θ)
            for j, mine, p in zip(node.inputs, kept, pulled, strict=True):
                if mine:
                    self.P.add(j, p, of.varies)


class _Pairs:
    """The active pairs of a block: rows r, tangents ẋ (m, k), seeds s (m, D), grouped.

    A group shares one column (tangent mode) or one output (adjoint mode), so that its rows are
    distinct and a scatter is free of collisions: deterministic on every device. ``chain`` is what
    comes down the program for the pairs alone: P, or q where P is kept.
    """

    def __init__(
        self, row: Tensor, x_dot: Tensor, seed: Tensor, groups: list[int], everything: bool
    ) -> None:
        self.row, self.x_dot, self.seed, self.groups = row, x_dot, seed, groups
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
        return cls(row, x_dot, seed, groups, groups == [active.shape[1]])

    def take(self, t: Tensor) -> Tensor:
        """The pairs' rows of a block's tensor."""
        return t if self.everything else t.index_select(0, self.row)

    def scatter_add(self, g: Tensor, q: Tensor) -> None:
        """g[row] += q, group by group."""
        if self.everything:
            g.add_(q)
            return
        for rows, part in zip(self.row.split(self.groups), q.split(self.groups), strict=True):
            g.index_add_(0, rows, part)

    def run_tangent(self, block: _Block) -> None:
        """The tangents that the walk down needs, for the directions ẋ; the seeds of y."""
        for i in block.way.tangents:
            node = block.nodes[i]
            if node.kind == "linear":
                u, W = node.inputs[0], _weight(block.θ[i])
                dot = (self.dots[u] if u else self.x_dot) @ (W if u else self._of_x2(W)).t()
            else:
                u_dot = [self._dot(block, v) for v in node.inputs]
                at, value, θ = self._operands(block, i)
                dot = rule(node).push_now(node, at, value, u_dot, θ)
            self.dots[i + 1] = dot
        y = len(block.nodes)
        if block.facts.moving[y] and not block.facts.kept[y]:
            self.chain.add(y, self.seed, False)

    def linear(self, block: _Block, i: int, P: Tensor | None, grads: _Gradients) -> Tensor | None:
        """The slopes' part in dW. The chain, which goes down the node, as it arrived."""
        node, passed = block.nodes[i], self.chain.of.pop(i + 1, None)
        u = node.inputs[0]
        if block.way.trained[i]:
            p = self._seeds(block, i + 1, P, passed)
            if p is not None and u:
                grads.product(node.params[0], p, self.dots[u])
            elif p is not None:
                grads.product(node.params[0], p, self.x_dot, slice(-self.x_dot.shape[1], None))
        if passed is not None and self._goes_on(block, u):
            self.chain.add_product(u, passed, _weight(block.θ[i]))
        return passed

    def light(
        self, block: _Block, i: int, P: Tensor | None, grads: _Gradients
    ) -> tuple[Tensor | None, list[Tensor | None]]:
        """The slopes' part in dθ. The chain, which goes down the node, as it arrived; the node's
        curvature in each of its inputs."""
        node, of, trained = block.nodes[i], rule(block.nodes[i]), block.way.trained[i]
        passed = self.chain.of.pop(i + 1, None)
        p = self._seeds(block, i + 1, P, passed) if trained or of.curved else None
        curvature: list[Tensor | None] = [None] * len(node.inputs)
        if passed is None and p is None:
            return None, curvature
        at, value, θ = self._operands(block, i)
        if p is not None:
            u_dot = [self._dot(block, v) for v in node.inputs]
            if trained:
                of.slope_parameters(node, at, u_dot, p, θ, grads)
            if of.curved:
                curvature = of.curvature(node, at, value, u_dot, p, θ)
        goes_on = [self._goes_on(block, u) for u in node.inputs]
        if passed is not None and any(goes_on):
            down = of.pull_now(node, at, value, passed, θ)
            for u, mine, t in zip(node.inputs, goes_on, down, strict=True):
                if mine:
                    self.chain.add(u, t, of.varies)
        for u, mine, c in zip(node.inputs, goes_on, curvature, strict=True):
            if mine and c is not None and block.facts.kept[u]:
                self.chain.add(u, c, True)
        return passed, curvature

    def _goes_on(self, block: _Block, u: int) -> bool:
        """Whether the chain has to go down to value u."""
        return block.way.wanted[u] and (block.facts.kept[u] or (u > 0 and block.facts.moving[u]))

    def _seeds(
        self, block: _Block, v: int, P: Tensor | None, passed: Tensor | None
    ) -> Tensor | None:
        """The pairs' own P (m, H) of value v; None where x2 does not reach it."""
        if not block.facts.moving[v]:
            return None
        if P is None:
            return passed
        return P.expand(len(self.row), -1) if block.facts.uniform[v] else self.take(P)

    def _operands(self, block: _Block, i: int) -> tuple[list[Tensor], Tensor, Params]:
        """u, v and θ of a light node for the pairs: rows of those alone that the node reads."""
        node, of, θ = block.nodes[i], rule(block.nodes[i]), block.θ[i]
        u = [self._value(block, v) if of.varies else block.values[v] for v in node.inputs]
        value = self._value(block, i + 1) if of.reads_v else u[0]
        if of.per_row:
            θ = [t if t is None else self.take(t) for t in θ]
        return u, value, θ

    def _value(self, block: _Block, v: int) -> Tensor:
        found = self.values.get(v)
        if found is None:
            found = self.values[v] = self.take(block.values[v])
        return found

    def _dot(self, block: _Block, v: int) -> Tensor | None:
        """The tangent of value v, None where it has none."""
        if not v and 0 not in self.dots:
            d, k = block.facts.widths[0], self.x_dot.shape[1]
            self.dots[0] = F.pad(self.x_dot, (d - k, 0))
        return self.dots.get(v)

    def _of_x2(self, W: Tensor) -> Tensor:
        return W[:, W.shape[1] - self.x_dot.shape[1] :]
