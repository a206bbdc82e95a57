"""Forward layer by layer: PyTorch's products, one fused launch between two.

Row t·N + n of a stack (T·N, H) is row n's part number t. A bias is in its product, so that what a
product writes is the a_l that is kept; the first layer of few inputs is made in the kernels.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ....columns import runs_of, take
from ....problem import Problem
from ... import Params
from ..active.config import product_types
from ..constants import activation_table, power_of_two
from ..device.activations import activation
from ..device.columns import column_of
from ..device.hinge import PENALTY_SUM, hinge_epilogue
from ..device.tiles import bias_row, of_rows, pre_activation
from ..launch import launch
from ..slopes import Hinging, hinged, hinging
from ..target import OLD_TRITON, register_limit
from .config import (
    Values,
    kept_chain,
    kept_layers,
    row_tile,
    saved_like,
    tiles_of,
    values_like,
    weight_of,
)

__all__ = ["chain_down", "forward", "layer_down", "layer_up"]

MOST_COLUMNS = 64  # of the slopes that a kernel sums by itself
FEW = tl.constexpr(4)  # of those that it sums without a product, which takes 16


def forward(
    problem: Problem, x: Tensor, weight: Tensor | None, params: Params, save: bool
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """y (N, D), the penalty or J, and the saved tensors (none unless ``save``)."""
    N = x.shape[0]
    saved = saved_like(problem, x) if save else []
    if N == 0:
        y = x.new_empty(0, problem.D)
        return y, hinged(problem, x.new_empty(0, problem.D, problem.k), y, weight, saved), saved
    run = _Forward(problem, x.contiguous(), params, saved)
    if problem.mode == "tangent":
        y, J = run.tangents()
    elif problem.keeps_adjoint and problem.depth > 1:
        y, out = run.with_chain(weight)
        return y, out, saved
    else:
        y = run.value()
        J = run.adjoint_slopes()
    return y, hinged(problem, J, y, weight, saved), saved


class _Forward:
    def __init__(self, problem: Problem, x: Tensor, params: Params, saved: list[Tensor]) -> None:
        self.problem, self.x, self.params, self.saved = problem, x, params, saved
        self.a = Values.saved(problem, x, params, saved or values_like(problem, x))
        self.chain = kept_chain(problem, saved) if saved else ()
        self.table = activation_table(problem, x.dtype)
        self.types = product_types(x.dtype)

    def _product(self, h: Tensor, l: int, out: Tensor | None = None) -> Tensor:
        """h Wᵀ + b of layer l."""
        W, b = weight_of(self.params, l), self.params[2 * l + 1]
        if b is None:
            return torch.mm(h, W.t()) if out is None else torch.mm(h, W.t(), out=out)
        return torch.addmm(b, h, W.t()) if out is None else torch.addmm(b, h, W.t(), out=out)

    def _make(self, h: Tensor, l: int) -> None:
        """a of layer l, but where kernels make it themselves."""
        if l == len(self.a.a):  # y is a_L, and nothing keeps it
            self.a.a.append(self._product(h, l))
        elif (a := self.a.a[l]) is not None:
            self._product(h, l, a)

    def _up(self, l: int, z: Tensor | None, T: int) -> Tensor:
        """[h; ḣ_1; …] ((1 + T)·N, H) of layer l from its a, and the tangents' products z."""
        N, H = self.x.shape[0], self.problem.widths[l + 1]
        h = self.x.new_empty((1 + T) * N, H)
        grid, tile = tiles_of(N, H, self.a.a[l] is None)
        a, x, W, b = self.a.of(l)
        first = T > 0 and z is None
        launch(
            layer_up, grid, self.x, a, x, weight_of(self.params, 0) if first else W, b, z, h, N,
            H=H, T=T, FIRST=first, d=self.problem.d, RUNS=runs_of(self.problem.columns),
            ACT=self.table[l], **self.a.inputs(l), **tile, **self.types,
        )  # fmt: skip
        return h

    def _hidden(self, l: int) -> Tensor:
        """The input of layer l."""
        h = self.x
        for below in range(l):
            self._make(h, below)
            h = self._up(below, None, 0)
        return h

    def value(self) -> Tensor:
        """y, with a_l kept."""
        l = self.problem.depth - 1
        h = self._hidden(l)
        if self.problem.activations[l].kind == "identity":
            return self._product(h, l)
        self._make(h, l)
        return self._up(l, None, 0)

    def tangents(self) -> tuple[Tensor, Tensor]:
        """y and J (N, D, k): the products of h, and of ḣ_1, …, ḣ_k together."""
        problem, N, k = self.problem, self.x.shape[0], self.problem.k
        stack, z = self.x, None
        for l in range(problem.depth):
            if l:
                z = torch.mm(stack[N:], weight_of(self.params, l).t())
            if z is not None and l >= kept_layers(problem):
                return self._product(stack[:N], l), z.view(k, N, problem.D).permute(1, 2, 0)
            self._make(stack[:N], l)
            stack = self._up(l, z, k)
        # y is a part of the stack: given out, it would keep all of it alive.
        return stack[:N].clone(), stack[N:].view(k, N, problem.D).permute(1, 2, 0)

    def adjoint_slopes(self) -> Tensor:
        """J (N, D, k) by D stacked chains."""
        D, k, L, N = self.problem.D, self.problem.k, self.problem.depth, self.x.shape[0]
        last = self.problem.activations[-1]
        first = take(weight_of(self.params, 0), self.problem.columns)
        a_last = None if last.kind == "identity" else self.a.a[L - 1]
        if L == 1:
            J = first.unsqueeze(0)
            return J.expand(N, D, k) if a_last is None else last.first(a_last).unsqueeze(2) * J
        P: Tensor | None = None
        for l in range(L - 2, -1, -1):
            H = self.problem.widths[l + 1]
            p = self.x.new_empty(D * N, H)
            if P is not None:
                P = torch.mm(P, weight_of(self.params, l + 1))
            grid, tile = tiles_of(N, H)
            launch(
                layer_down, grid, p, *self.a.of(l), P, a_last, weight_of(self.params, L - 1), p, N,
                H=H, D=D, ACT=self.table[l], LAST_ACT=self.table[L - 1], **self.a.inputs(l),
                **tile, **self.types,
            )  # fmt: skip
            P = p
        assert P is not None
        return torch.mm(P, first).view(D, N, k).transpose(0, 1)

    def with_chain(self, weight: Tensor | None) -> tuple[Tensor, Tensor]:
        """y (N, 1) and the second output, by the chain ∂a_L/∂h_l of the one output. The first
        launch sums y, the last one the slopes: what they read is read once."""
        problem, top = self.problem, self.problem.depth - 2
        N, k = self.x.shape[0], problem.k
        first = take(weight_of(self.params, 0), problem.columns)
        y = self.x.new_empty(N, 1)
        self._make(self._hidden(top), top)
        P = weight_of(self.params, top + 1)
        summed = k <= MOST_COLUMNS
        (programs,), _ = row_tile(N, problem.widths[1])
        hinge = hinging(problem, y, weight, self.saved, programs) if summed else None
        for l in range(top, -1, -1):
            if l < top:
                W = weight_of(self.params, l + 1)
                P = torch.mm(P, W, out=self.chain[l]) if self.chain else torch.mm(P, W)
            ends = hinge if l == 0 else None
            p = None if ends else self.x.new_empty(N, problem.widths[l + 1])
            self._down(l, P, y, p, first, ends)
            P = P if p is None else p
        if hinge is not None:
            return y, hinge.total(y)
        J = torch.mm(P, first).unsqueeze(1)
        if problem.activations[-1].kind != "identity":
            a_last = self.a.a[-1]
            assert a_last is not None
            J = problem.activations[-1].first(a_last).unsqueeze(2) * J
        return y, hinged(problem, J, y, weight, self.saved)

    def _down(
        self, l: int, P: Tensor, y: Tensor, p: Tensor | None, first: Tensor, hinge: Hinging | None
    ) -> None:
        problem, top = self.problem, self.problem.depth - 2
        H, b = problem.widths[l + 1], self.params[2 * top + 3]
        grid, tile = row_tile(len(y), H)
        linear = problem.activations[-1].kind == "identity"
        args, options = ((None,) * 8, {}) if hinge is None else (hinge.args, hinge.options)
        # Triton 3.6 spills 8 bytes with the slopes of four columns. Elsewhere with a limit ptxas
        # takes more than it needs, and the kernel waits for memory.
        tight = OLD_TRITON and hinge is not None and problem.k <= FEW.value
        limit = register_limit(y.device) if tight else {}
        launch(
            chain_down, grid, y, *self.a.of(l), P, b if l == top else None,
            None if linear else self.a.a[-1], y, p, None if hinge is None else first, *args,
            len(y), H=H, TOP=l == top, ACT=self.table[l], LAST_ACT=self.table[-1],
            K=problem.k, K_TILE=power_of_two(problem.k, 16), W_ROW=first.stride(0),
            **({"OUT": 0, "SQUARED": False, "SAVE": False} | options), **self.a.inputs(l), **tile,
            **self.types, **limit,
        )  # fmt: skip


@triton.jit(do_not_specialize=["N"])
def layer_up(
    a, x, W, b, z, h_out, N,
    H: tl.constexpr, T: tl.constexpr, FIRST: tl.constexpr, d: tl.constexpr, RUNS: tl.constexpr,
    ACT: tl.constexpr, FAN: tl.constexpr, FAN_TILE: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, C: tl.constexpr, A: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """h = σ(a) and ḣ_t = σ'(a)∘ȧ_t, stacked (1+T)·N rows, of ``pre_activation`` and z = [ȧ_1; …].

    In the FIRST layer there is no z: ȧ_t is column number t of x2 in W.
    """
    n = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    j = tl.program_id(1) * BN + tl.arange(0, BN)
    mask = (n[:, None] < N) & (j[None, :] < H)
    at = n[:, None] * H + j[None, :]
    own = pre_activation(a, x, W, b, n, j, n < N, H, H, FAN, FAN_TILE, C, A, PRECISION)
    h, slope, _curvature = activation(own, ACT)
    tl.store(h_out + at, h, mask=mask)
    if T > 0:  # the compiler reads a loop's body also where it goes round no time
        for t in range(T):
            below = tl.full((), 1, tl.int64) * N * t * H
            if FIRST:
                w = tl.load(W + j * d + column_of(t, RUNS), mask=j < H, other=0.0).to(A)
                value = slope * w[None, :]
            else:
                value = slope * tl.load(z + below + at, mask=mask, other=0.0).to(A)
            tl.store(h_out + (below + tl.full((), 1, tl.int64) * N * H) + at, value, mask=mask)


@triton.jit(do_not_specialize=["N"])
def layer_down(
    a, x, W, b, P, a_last, W_last, p_out, N,
    H: tl.constexpr, D: tl.constexpr, ACT: tl.constexpr, LAST_ACT: tl.constexpr,
    FAN: tl.constexpr, FAN_TILE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    C: tl.constexpr, A: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """p = σ'(a)∘P for D stacked chains. Below the last layer P is no product: it is None, and
    stands for σ_L'(a_L)·W_L's row."""
    n = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    j = tl.program_id(1) * BN + tl.arange(0, BN)
    mask = (n[:, None] < N) & (j[None, :] < H)
    at = n[:, None] * H + j[None, :]
    own = pre_activation(a, x, W, b, n, j, n < N, H, H, FAN, FAN_TILE, C, A, PRECISION)
    _h, slope, _curvature = activation(own, ACT)
    for e in range(D):
        shift = tl.full((), 1, tl.int64) * N * e * H
        if P is None:
            value = bias_row(W_last + e * H, j, H, A) + tl.zeros_like(slope)
            if a_last is not None:
                _y, seed, _c = activation(of_rows(a_last, n * D + e, n < N, A), LAST_ACT)
                value *= seed
        else:
            value = tl.load(P + shift + at, mask=mask, other=0.0).to(A)
        tl.store(p_out + shift + at, slope * value, mask=mask)


@triton.jit(do_not_specialize=["N"])
def chain_down(
    a, x, W, b, P, b_last, a_last, y, p_out, first, direction, weight, weight_row, margin, margins,
    out, slopes, sums, N,
    H: tl.constexpr, TOP: tl.constexpr, ACT: tl.constexpr, LAST_ACT: tl.constexpr,
    K: tl.constexpr, K_TILE: tl.constexpr, W_ROW: tl.constexpr,
    OUT: tl.constexpr, SQUARED: tl.constexpr, SAVE: tl.constexpr,
    FAN: tl.constexpr, FAN_TILE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    C: tl.constexpr, A: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """p = σ'(a)∘P of the chain of a_L, the one output, for all columns of a tile of rows.

    At the TOP P is the row of W_L, and y = σ_L(a_L) of a_L = P·h + b_L is made here. With
    ``first``, (H, K) in rows that lie W_ROW apart, p ends in the slopes σ_L'(a_L)·p·first and their
    hinge.
    """
    n = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    ok = n < N
    c = tl.arange(0, K_TILE)
    products = tl.zeros((BM, BN), A)
    J = tl.zeros((BM, K_TILE), A)
    for start in range(0, H, BN):
        j = start + tl.arange(0, BN)
        at = n[:, None] * H + j[None, :]
        mask = ok[:, None] & (j[None, :] < H)
        own = pre_activation(a, x, W, b, n, j, ok, H, H, FAN, FAN_TILE, C, A, PRECISION)
        h, slope, _curvature = activation(own, ACT)
        if TOP:
            w = bias_row(P, j, H, A)
            products += tl.where(mask, h * w, tl.zeros_like(h))
            p = slope * w
        else:
            p = slope * tl.load(P + at, mask=mask, other=0.0).to(A)
        if p_out is not None:
            tl.store(p_out + at, p, mask=mask)
        if first is not None and K <= FEW:
            for t in tl.static_range(K):
                w = tl.load(
                    first + j * W_ROW + t, mask=j < H, other=0.0, eviction_policy="evict_last"
                ).to(A)  # fmt: skip
                part = tl.sum(tl.where(mask, p * w[None, :], tl.zeros_like(p)), 1)
                J += tl.where(c[None, :] == t, part[:, None], tl.zeros_like(J))
        elif first is not None:
            w_first = tl.load(
                first + j[:, None] * W_ROW + c[None, :],
                mask=(j[:, None] < H) & (c[None, :] < K), other=0.0,
            )  # fmt: skip
            p = tl.where(mask, p, tl.zeros_like(p))
            J += tl.dot(p.to(C), w_first.to(C), input_precision=PRECISION).to(A)
    if TOP:
        total = tl.sum(products, 1)
        if b_last is not None:
            total += tl.load(b_last).to(A)
        if a_last is not None:
            tl.store(a_last + n, total, mask=ok)
        value, seed, _c = activation(total, LAST_ACT)
        tl.store(y + n, value, mask=ok)
    elif first is not None:
        value = tl.load(y + n, mask=ok, other=0.0).to(A)
        seed = tl.full((BM,), 1, A)
        if a_last is not None:
            last = tl.load(a_last + n, mask=ok, other=0.0).to(A)
            _value, seed, _c = activation(last, LAST_ACT)
    if first is not None:
        J *= seed[:, None]
        own_y = value[:, None] + tl.zeros_like(J)
        penalty = hinge_epilogue(
            J, own_y, n, ok, c, c < K, direction, weight, weight_row, margin, margins, out, slopes,
            K, OUT, SQUARED, SAVE,
        )  # fmt: skip
        if OUT == PENALTY_SUM:
            tl.store(sums + tl.program_id(0), tl.sum(penalty))
