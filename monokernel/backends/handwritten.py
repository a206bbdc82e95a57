"""The hand-written forward and backward of both modes, in PyTorch operations.

What ``auto`` uses wherever no compiled kernel serves, and the readable twin of those kernels: the
same four functions, the same saved state, the same walk over blocks of rows.

Both modes have one backward. With gJ = ∂loss/∂J, the loss depends on the slopes through
Σ_m s_mᵀ J(x_{r_m}) ẋ_m over the *active* pairs m only, those with a gJ that is not zero:

* tangent mode, a pair is (row, column c): ẋ = e_c, s = gJ[row, :, c];
* adjoint mode, a pair is (row, output d): ẋ = gJ[row, d, :], s = e_d.

The tangent ẋ runs forward (ȧ, ḣ), the seed s runs backward (P_L = s, p_l = σ'∘P_l,
P_{l-1} = p_l W_l), and the gradient is dW_l += p_lᵀ ḣ_{l-1} together with the curvature
σ''(a_l)∘ȧ_l∘P_l, which joins the cotangent of a_l. For one output in adjoint mode the seed's chain
is kept from the forward: gy∘p_l *is* the task loss's cotangent, so rows without a violation cost no
input-gradient product at all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..hinge import slope_cotangent, slope_weights
from ..problem import Problem, accumulate_dtype, nan_rule
from .reference import weight_of

__all__ = ["backward", "forward", "kept_layers", "refuses", "saved_like"]

Params = Sequence[Tensor | None]

# Elements of one activation block. On the CPU 2^18 (1 MiB of float32) keeps a block in the L2
# cache through a layer's element-wise passes; elsewhere only the temporaries' size is bounded.
BLOCK_ELEMENTS = {"cpu": 1 << 18}
BLOCK_ELEMENTS_ELSEWHERE = 1 << 26


def refuses(problem: Problem, x: Tensor) -> str | None:
    """Why this backend cannot serve the problem, or None. It serves every one."""
    return None


def saved_like(problem: Problem, x: Tensor) -> list[Tensor]:
    """Uninitialised buffers for what the backward needs again, in the order the forward fills them:

    a_l (N, H_l) for each layer whose value is not y itself, P_l (N, H_l) of the hidden layers when
    the adjoint chain is kept, ∂penalty/∂J (N, D, k) when there is a hinge.
    """
    N, widths = x.shape[0], problem.widths
    saved = [x.new_empty(N, H) for H in widths[1 : kept_layers(problem) + 1]]
    if problem.keeps_adjoint:
        saved += [x.new_empty(N, H) for H in widths[1:-1]]
    if problem.hinge is not None:
        saved.append(x.new_empty(N, problem.D, problem.k, dtype=accumulate_dtype(x.dtype)))
    return saved


def kept_layers(problem: Problem) -> int:
    """The number of layers whose a_l is saved: all, but the last where y is a_L."""
    return problem.depth - (problem.activations[-1].kind == "identity")


def _blocks(problem: Problem, x: Tensor) -> Iterator[slice]:
    fan = problem.k if problem.mode == "tangent" else problem.D
    budget = BLOCK_ELEMENTS.get(x.device.type, BLOCK_ELEMENTS_ELSEWHERE)
    size = max(256, budget // max(1, fan * max(problem.widths)))
    for start in range(0, x.shape[0], size):
        yield slice(start, min(start + size, x.shape[0]))


# --- forward ------------------------------------------------------------------------------------


def forward(
    problem: Problem, x: Tensor, weight: Tensor | None, params: Params, save: bool
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """y (N, D), the penalty (or J where there is no hinge), and what the backward needs."""
    N, D, k, L = x.shape[0], problem.D, problem.k, problem.depth
    saved = saved_like(problem, x) if save else []
    y = x.new_empty(N, D)
    J = x.new_empty(N, D, k, dtype=accumulate_dtype(x.dtype))
    for rows in _blocks(problem, x):
        buffers = [t[rows] for t in saved[: kept_layers(problem)]]
        a = _values(problem, x[rows], params, buffers, y[rows])
        if problem.mode == "tangent":
            J[rows] = _tangent_slopes(problem, a, params)
        else:
            kept = saved[kept_layers(problem) :][: L - 1] if problem.keeps_adjoint else []
            J[rows] = _adjoint_slopes(problem, a, params, [t[rows] for t in kept])
    J = nan_rule(y, J)
    if problem.hinge is None:
        return y, J, saved
    penalty, S = slope_weights(J, problem.hinge, weight)
    if save:
        saved[-1] = S
    return y, penalty if problem.hinge.elementwise else penalty.sum(), saved


def _values(
    problem: Problem, h: Tensor, params: Params, buffers: Sequence[Tensor], y: Tensor
) -> list[Tensor]:
    """The pre-activations a_1 … a_L of a block, in ``buffers`` if given; the outputs in ``y``."""
    a: list[Tensor] = []
    for l, σ in enumerate(problem.activations):
        last = l == problem.depth - 1
        out = y if last and σ.kind == "identity" else buffers[l] if l < len(buffers) else None
        a.append(_linear(h, weight_of(params, l), params[2 * l + 1], out))
        h = σ.value(a[-1])
    if h is not y:
        y.copy_(h)
    return a


def _linear(h: Tensor, W: Tensor, b: Tensor | None, out: Tensor | None) -> Tensor:
    if b is None:
        return torch.mm(h, W.t(), out=out)
    return torch.addmm(b, h, W.t(), out=out)


def _tangent_slopes(problem: Problem, a: Sequence[Tensor], params: Params) -> Tensor:
    """J (n, D, k) of a block: all k tangents side by side, (k, n, H)."""
    k, n = problem.k, a[0].shape[0]
    W = weight_of(params, 0)
    a_dot = W[:, problem.d - k :].t().unsqueeze(1).expand(k, n, W.shape[0])
    h_dot = problem.activations[0].pull(a_dot, a[0].expand(k, -1, -1))
    for l in range(1, problem.depth):
        a_dot = h_dot @ weight_of(params, l).t()
        h_dot = problem.activations[l].pull(a_dot, a[l].expand(k, -1, -1))
    return h_dot.permute(1, 2, 0)


def _adjoint_slopes(
    problem: Problem, a: Sequence[Tensor], params: Params, kept: Sequence[Tensor]
) -> Tensor:
    """J (n, D, k) of a block: all D chains side by side, (D, n, H). Fills ``kept`` with P_l."""
    n, D, L = a[0].shape[0], problem.D, problem.depth
    # P_L is the identity, so p_L W_L is a scaling of W_L's rows, not a product.
    p = problem.activations[-1].pull(a[-1].new_ones(n, D), a[-1]).t().unsqueeze(-1)
    for l in range(L - 1, 0, -1):
        W = weight_of(params, l)
        out = kept[l - 1].unsqueeze(0) if kept else None
        P = torch.mul(p, W.unsqueeze(1), out=out) if l == L - 1 else torch.matmul(p, W, out=out)
        p = problem.activations[l - 1].pull(P, a[l - 1].expand(D, -1, -1))
    W = weight_of(params, 0)[:, problem.d - problem.k :]
    return (p * W.unsqueeze(1) if L == 1 else p @ W).transpose(0, 1)


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
    for rows in _blocks(problem, x):
        _Block(problem, x, params, saved, gy, gJ, rows).add_to(grads)
    return grads.result()


def _slope_cotangent(
    problem: Problem, gout: Tensor | None, saved: Sequence[Tensor]
) -> Tensor | None:
    if gout is None or problem.hinge is None:
        return gout
    return slope_cotangent(gout, saved[-1])


class _Gradients:
    """The accumulators, in the accumulation dtype; ``lowest`` is the first layer that needs any."""

    def __init__(self, problem: Problem, x: Tensor, params: Params, needs: Sequence[bool]) -> None:
        self.params = params
        self.dx = torch.zeros_like(x, memory_format=torch.contiguous_format) if needs[0] else None
        self.d: list[Tensor | None] = [
            p.new_zeros(p.shape, dtype=accumulate_dtype(p.dtype))
            if need and p is not None
            else None
            for p, need in zip(params, needs[1:], strict=True)
        ]
        needed = [i // 2 for i, need in enumerate(needs[1:]) if need]
        self.lowest = 0 if needs[0] else min(needed, default=problem.depth)

    def weight(self, l: int, left: Tensor, right: Tensor, columns: slice = slice(None)) -> None:
        """dW_l[:, columns] += leftᵀ right."""
        dW = self.d[2 * l]
        if dW is None:
            return
        dW = dW[:, columns]
        if dW.dtype == left.dtype:
            dW.addmm_(left.t(), right)
        else:
            dW.add_(left.t() @ right)

    def bias(self, l: int, g: Tensor) -> None:
        db = self.d[2 * l + 1]
        if db is not None:
            db.add_(g.sum(0, dtype=db.dtype))

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
        x: Tensor,
        params: Params,
        saved: Sequence[Tensor],
        gy: Tensor | None,
        gJ: Tensor | None,
        rows: slice,
    ) -> None:
        self.problem, self.params = problem, params
        self.rows: slice | Tensor = rows
        L, kept = problem.depth, kept_layers(problem)
        gJ = None if gJ is None else gJ[rows]
        if gy is None and gJ is not None:
            some = (gJ != 0).flatten(1).any(1).nonzero().squeeze(1)
            gJ, self.rows = gJ[some], some + rows.start
        self.gy = None if gy is None else gy[rows]
        self.gJ = gJ
        self.a = [t[self.rows] for t in saved[:kept]]
        self.P = [t[self.rows] for t in saved[kept:][: L - 1]] if problem.keeps_adjoint else []
        self.h = [x[self.rows]]
        for σ, a in zip(problem.activations, self.a[: L - 1], strict=False):
            self.h.append(σ.value(a))

    def pull(self, l: int, g: Tensor) -> Tensor:
        """σ'(a_l) ∘ g. Where a_L was not kept it is y itself, and σ_L the identity."""
        return self.problem.activations[l].pull(g, self.a[l]) if l < len(self.a) else g

    def add_to(self, grads: _Gradients) -> None:
        pairs = None if self.gJ is None else _Pairs.of(self, self.gJ)
        if pairs is not None and not len(pairs.row):
            pairs = None
        if pairs is not None:
            pairs.run_tangent(self)
        if self.problem.keeps_adjoint:
            self._kept_chain(grads, pairs)
        else:
            self._task_chain(grads, pairs)

    def _kept_chain(self, grads: _Gradients, pairs: _Pairs | None) -> None:
        """One output: the cotangent of a_l is gy∘p_l + q_l, with q_l on the active rows alone."""
        problem = self.problem
        qh: Tensor | None = None  # the cotangent of h_l through q
        for l in range(problem.depth - 1, grads.lowest - 1, -1):
            last = l == problem.depth - 1
            P = self.h[0].new_ones(self.h[0].shape[0], 1) if last else self.P[l]
            p = self.pull(l, P)
            q = None
            if pairs is not None:
                pairs.add_weight(grads, l, pairs.take(p))
                q = pairs.curvature(self, l, pairs.take(P))
                if qh is not None:
                    q = pairs.pull(self, l, qh) if q is None else q.add_(pairs.pull(self, l, qh))
            self._add_layer(grads, l, None if self.gy is None else self.gy * p, q, pairs)
            qh = q @ weight_of(self.params, l) if q is not None and l > grads.lowest else None

    def _task_chain(self, grads: _Gradients, pairs: _Pairs | None) -> None:
        """The task loss's own chain; the curvature of the slopes joins it layer by layer."""
        gh, seed = self.gy, None if pairs is None else pairs.seed
        for l in range(self.problem.depth - 1, grads.lowest - 1, -1):
            W = weight_of(self.params, l)
            q = None
            if pairs is not None and seed is not None:
                q = pairs.curvature(self, l, seed)
                p = pairs.pull(self, l, seed)
                pairs.add_weight(grads, l, p)
                seed = p @ W if l > grads.lowest else None
            g = None if gh is None else self.pull(l, gh)
            g = self._add_layer(grads, l, g, q, pairs)
            gh = g @ W if g is not None and l > grads.lowest else None

    def _add_layer(
        self, grads: _Gradients, l: int, g: Tensor | None, q: Tensor | None, pairs: _Pairs | None
    ) -> Tensor | None:
        """Joins q (of the pairs) to g (of the block), the cotangent of a_l; adds what follows."""
        if q is not None and pairs is not None:
            if g is None:
                g = q.new_zeros(self.h[0].shape[0], q.shape[1])
            elif g is self.gy:
                g = g.clone()
            pairs.scatter_add(g, q)
        if g is None:
            return None
        grads.weight(l, g, self.h[l])
        grads.bias(l, g)
        if l == 0 and grads.dx is not None:
            grads.dx[self.rows] = g @ weight_of(self.params, 0)
        return g


class _Pairs:
    """The active pairs of a block: rows r, tangents ẋ (m, k), seeds s (m, D), grouped.

    A group shares one column (tangent mode) or one output (adjoint mode), so that its rows are
    distinct and a scatter is free of collisions: deterministic on every device.
    """

    def __init__(
        self, row: Tensor, x_dot: Tensor, seed: Tensor, groups: list[int], everything: bool
    ) -> None:
        self.row, self.x_dot, self.seed, self.groups = row, x_dot, seed, groups
        self.everything = everything  # one group, all rows: nothing to gather
        self.a: list[Tensor] = []
        self.a_dot: list[Tensor] = []
        self.h_dot: list[Tensor] = []

    @classmethod
    def of(cls, block: _Block, gJ: Tensor) -> _Pairs:
        tangent = block.problem.mode == "tangent"
        by_group = gJ.permute(2, 0, 1) if tangent else gJ.permute(1, 0, 2)
        active = (by_group != 0).any(2)  # (groups, n)
        group, row = active.nonzero(as_tuple=True)
        dtype = block.h[0].dtype
        own = by_group[group, row].to(dtype)
        other = torch.zeros(len(row), active.shape[0], dtype=dtype, device=gJ.device)
        other.scatter_(1, group.unsqueeze(1), 1.0)
        x_dot, seed = (other, own) if tangent else (own, other)
        groups = active.sum(1).tolist()
        return cls(row, x_dot, seed, groups, groups == [active.shape[1]])

    def take(self, t: Tensor) -> Tensor:
        """The pairs' rows of a block's tensor."""
        return t if self.everything else t.index_select(0, self.row)

    def pull(self, block: _Block, l: int, g: Tensor) -> Tensor:
        """σ'(a_l) ∘ g for the pairs."""
        return block.problem.activations[l].pull(g, self.a[l]) if l < len(self.a) else g

    def run_tangent(self, block: _Block) -> None:
        """ȧ_l and ḣ_l of every layer for the pairs' directions ẋ."""
        problem = block.problem
        self.a = [self.take(a) for a in block.a]
        h_dot = self.x_dot
        for l in range(problem.depth):
            W = weight_of(block.params, l)
            a_dot = h_dot @ (W if l else W[:, problem.d - problem.k :]).t()
            h_dot = self.pull(block, l, a_dot)
            self.a_dot.append(a_dot)
            self.h_dot.append(h_dot)

    def add_weight(self, grads: _Gradients, l: int, p: Tensor) -> None:
        """dW_l += pᵀ ḣ_{l-1}; in the first layer ḣ_0 is ẋ, in the monotone columns alone."""
        if l:
            grads.weight(l, p, self.h_dot[l - 1])
        else:
            grads.weight(0, p, self.x_dot, slice(-self.x_dot.shape[1], None))

    def curvature(self, block: _Block, l: int, P: Tensor) -> Tensor | None:
        """σ''(a_l) ∘ ȧ_l ∘ P_l, or None where σ'' is zero everywhere."""
        σ = block.problem.activations[l]
        if σ.piecewise_linear:
            return None
        return σ.second(self.a[l]).mul_(self.a_dot[l]).mul_(P)

    def scatter_add(self, g: Tensor, q: Tensor) -> None:
        """g[row] += q, group by group."""
        if self.everything:
            g.add_(q)
            return
        for rows, part in zip(self.row.split(self.groups), q.split(self.groups), strict=True):
            g.index_add_(0, rows, part)
