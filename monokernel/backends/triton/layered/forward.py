"""Forward layer by layer: PyTorch's products over stacked rows, one fused launch between two.

Row t·N + n of a stack (T·N, H) is row n's part number t.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ....columns import runs_of, take
from ....problem import Problem
from ... import Params
from ..constants import accumulator, activation_table
from ..device.activations import activation
from ..device.columns import column_of
from ..device.tiles import bias_row
from ..launch import launch
from ..slopes import hinged
from .config import kept_chain, kept_layers, saved_like, tiles_of, weight_of

__all__ = ["forward", "layer_down", "layer_up"]


def forward(
    problem: Problem, x: Tensor, weight: Tensor | None, params: Params, save: bool
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """y (N, D), the penalty or J, and the saved tensors (none unless ``save``)."""
    N = x.shape[0]
    saved = saved_like(problem, x) if save else []
    if N == 0:
        y = x.new_empty(0, problem.D)
        return y, hinged(problem, x.new_empty(0, problem.D, problem.k), y, weight, saved), saved
    if problem.mode == "tangent":
        y, J = _tangent_forward(problem, x.contiguous(), params, saved)
    else:
        keep = saved[: kept_layers(problem)] or [x.new_empty(N, H) for H in problem.widths[1:]]
        y = _values(problem, x.contiguous(), params, keep)
        kept = kept_chain(problem, saved) if save else ()
        J = _adjoint_slopes(problem, params, keep, kept)
    return y, hinged(problem, J, y, weight, saved), saved


def _tangent_forward(
    problem: Problem, x: Tensor, params: Params, saved: list[Tensor]
) -> tuple[Tensor, Tensor]:
    """y and J (N, D, k): one product over the stacked rows [h; ḣ_1; …; ḣ_k] for each layer."""
    N, k, D, L = x.shape[0], problem.k, problem.D, problem.depth
    table, z = activation_table(problem, x.dtype), x
    for l in range(L):
        W, b, H = weight_of(params, l), params[2 * l + 1], problem.widths[l + 1]
        z = torch.mm(z, W.t())
        last_is_linear = l == L - 1 and problem.activations[l].kind == "identity"
        a = saved[l] if saved and l < kept_layers(problem) else None
        if last_is_linear and L > 1:
            y = z[:N] if b is None else z[:N] + b
            return y, z[N:].view(k, N, D).permute(1, 2, 0)
        h = x.new_empty((1 + k) * N, H)
        grid, tile = tiles_of(N, H)
        launch(
            layer_up, grid, x, z, b if b is None else b.contiguous(), W, a, h, N,
            H=H, T=k, FIRST=l == 0, d=problem.d, RUNS=runs_of(problem.columns), ACT=table[l],
            **tile, A=accumulator(x.dtype),
        )  # fmt: skip
        z = h
    # y is a part of the stack: given out, it would keep all of it alive.
    return z[:N].clone(), z[N:].view(k, N, D).permute(1, 2, 0)


def _values(problem: Problem, x: Tensor, params: Params, keep: list[Tensor]) -> Tensor:
    """y, with a_l in ``keep``."""
    N, L, h = x.shape[0], problem.depth, x
    table = activation_table(problem, x.dtype)
    for l in range(L):
        W, b, H = weight_of(params, l), params[2 * l + 1], problem.widths[l + 1]
        if l == L - 1 and problem.activations[l].kind == "identity":
            return torch.mm(h, W.t()) if b is None else torch.addmm(b, h, W.t())
        z = torch.mm(h, W.t())
        h = torch.empty_like(z)
        grid, tile = tiles_of(N, H)
        launch(
            layer_up, grid, x, z, b if b is None else b.contiguous(), W, keep[l], h, N,
            H=H, T=0, FIRST=False, d=0, RUNS=(), ACT=table[l], **tile, A=accumulator(x.dtype),
        )  # fmt: skip
    return h


def _adjoint_slopes(
    problem: Problem, params: Params, a: list[Tensor], kept: Sequence[Tensor]
) -> Tensor:
    """J (N, D, k) by D stacked chains. ``kept`` receives P_l."""
    D, k, L = problem.D, problem.k, problem.depth
    N, nonlinear = a[0].shape[0] if a else 0, problem.activations[-1].kind != "identity"
    first = take(weight_of(params, 0), problem.columns)
    table = activation_table(problem, first.dtype)
    if L == 1:
        J = first.unsqueeze(0)
        if nonlinear:
            return problem.activations[0].first(a[0]).unsqueeze(2) * J
        return J.expand(N, D, k)
    P = a[0]  # not read below the last layer
    for l in range(L - 2, -1, -1):
        H = problem.widths[l + 1]
        p = a[0].new_empty(D * N, H)
        top = l == L - 2
        if not top:
            below = weight_of(params, l + 1)
            P = torch.mm(P, below, out=kept[l]) if kept else torch.mm(P, below)
        grid, tile = tiles_of(N, H)
        launch(
            layer_down, grid, p, a[l], P, a[L - 1] if nonlinear else None,
            weight_of(params, L - 1), p, kept[l] if kept and top else None, N,
            H=H, D=D, LAST=top, ACT=table[l], LAST_ACT=table[L - 1], **tile,
            A=accumulator(p.dtype),
        )  # fmt: skip
        P = p
    return torch.mm(P, first).view(D, N, k).transpose(0, 1)


@triton.jit(do_not_specialize=["N"])
def layer_up(
    z,
    b,
    W1,
    a_out,
    h_out,
    N,
    H: tl.constexpr,
    T: tl.constexpr,
    FIRST: tl.constexpr,
    d: tl.constexpr,
    RUNS: tl.constexpr,
    ACT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    A: tl.constexpr,
):
    """h = σ(a) and ḣ_t = σ'(a)∘ȧ_t, stacked (1+T)·N rows, from z = [a - b; ȧ_1; …].

    In the first layer z is a - b alone: ȧ_t is column number t of x2 in W_1. ``a_out`` keeps a.
    """
    n = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    j = tl.program_id(1) * BN + tl.arange(0, BN)
    mask = (n[:, None] < N) & (j[None, :] < H)
    at = n[:, None] * H + j[None, :]
    a = tl.load(z + at, mask=mask, other=0.0).to(A)
    if b is not None:
        a += bias_row(b, j, H, A)
    if a_out is not None:
        tl.store(a_out + at, a, mask=mask)
    h, slope, _curvature = activation(a, ACT)
    tl.store(h_out + at, h, mask=mask)
    for t in range(T):
        shift = tl.full((), 1, tl.int64) * N * (t + 1) * H
        if FIRST:
            w = tl.load(W1 + j * d + column_of(t, RUNS), mask=j < H, other=0.0).to(A)
            tl.store(h_out + shift + at, slope * w[None, :], mask=mask)
        else:
            a_dot = tl.load(z + shift + at, mask=mask, other=0.0).to(A)
            tl.store(h_out + shift + at, slope * a_dot, mask=mask)


@triton.jit(do_not_specialize=["N"])
def layer_down(
    a,
    P,
    a_last,
    W_last,
    p_out,
    P_out,
    N,
    H: tl.constexpr,
    D: tl.constexpr,
    LAST: tl.constexpr,
    ACT: tl.constexpr,
    LAST_ACT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    A: tl.constexpr,
):
    """p = σ'(a)∘P for D stacked chains. Below the last layer P is no product: σ_L'(a_L)·W_L's row.

    ``P_out`` keeps that P for the backward.
    """
    n = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    j = tl.program_id(1) * BN + tl.arange(0, BN)
    mask = (n[:, None] < N) & (j[None, :] < H)
    at = n[:, None] * H + j[None, :]
    _h, slope, _curvature = activation(tl.load(a + at, mask=mask, other=0.0).to(A), ACT)
    for e in range(D):
        shift = tl.full((), 1, tl.int64) * N * e * H
        if LAST:
            w = tl.load(W_last + e * H + j, mask=j < H, other=0.0).to(A)
            seed = tl.full((BM,), 1, A)
            if a_last is not None:
                top = tl.load(a_last + n * D + e, mask=n < N, other=0.0).to(A)
                _y, seed, _c = activation(top, LAST_ACT)
            value = seed[:, None] * w[None, :]
            if P_out is not None:
                tl.store(P_out + shift + at, value, mask=mask)
        else:
            value = tl.load(P + shift + at, mask=mask, other=0.0).to(A)
        tl.store(p_out + shift + at, slope * value, mask=mask)
