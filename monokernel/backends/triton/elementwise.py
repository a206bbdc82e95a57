"""What stands between the matrix products of the layer-by-layer path, each pass over memory fused.

The products themselves are PyTorch's (cuBLAS), over stacked rows: row t·N + n of a stack (T·N, H)
is row n's part number t.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .device import PENALTY_SUM, activation, bias_row, hinge_epilogue

__all__ = ["hinge_slopes", "layer_back", "layer_down", "layer_up"]


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
    K: tl.constexpr,
    ACT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    A: tl.constexpr,
):
    """h = σ(a) and ḣ_t = σ'(a)∘ȧ_t, stacked (1+T)·N rows, from z = [a - b; ȧ_1; …].

    In the first layer z is a - b alone: ȧ_t is the column d-K+t of W_1. ``a_out`` keeps a.
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
            w = tl.load(W1 + j * d + (d - K) + t, mask=j < H, other=0.0).to(A)
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


@triton.jit(do_not_specialize=["N"])
def layer_back(
    a,
    P,
    gy,
    g_out,
    h_out,
    N,
    H: tl.constexpr,
    ACT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    A: tl.constexpr,
):
    """g = σ'(a)∘P, times gy of the row where P is the adjoint chain of one output; and h = σ(a)."""
    n = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    j = tl.program_id(1) * BN + tl.arange(0, BN)
    mask = (n[:, None] < N) & (j[None, :] < H)
    at = n[:, None] * H + j[None, :]
    h, slope, _curvature = activation(tl.load(a + at, mask=mask, other=0.0).to(A), ACT)
    if g_out is not None:
        g = slope * tl.load(P + at, mask=mask, other=0.0).to(A)
        if gy is not None:
            g *= tl.load(gy + n, mask=n < N, other=0.0).to(A)[:, None]
        tl.store(g_out + at, g, mask=mask)
    if h_out is not None:
        tl.store(h_out + at, h, mask=mask)


@triton.jit(
    do_not_specialize=["N", "stride_n", "stride_d", "stride_k"],
    do_not_specialize_on_alignment=["J"],
)
def hinge_slopes(
    J,
    y,
    direction,
    weight,
    weight_row,
    margin,
    out,
    slopes,
    sums,
    N,
    stride_n,
    stride_d,
    stride_k,
    D: tl.constexpr,
    K: tl.constexpr,
    OUT: tl.constexpr,
    SQUARED: tl.constexpr,
    SAVE: tl.constexpr,
    BM: tl.constexpr,
    BE: tl.constexpr,
    A: tl.constexpr,
):
    """The epilogue on slopes J (N, D, K) of any strides that came from a matrix product."""
    total = tl.zeros((BM,), A)
    for tile in range(tl.program_id(0), tl.cdiv(N, BM), tl.num_programs(0)):
        n = tile * tl.full((), BM, tl.int64) + tl.arange(0, BM)
        ok = n < N
        for start in range(0, D * K, BE):
            at = start + tl.arange(0, BE)
            inside = at < D * K
            mask = ok[:, None] & inside[None, :]
            place = (at // K).to(tl.int64) * stride_d + (at % K).to(tl.int64) * stride_k
            value = tl.load(J + n[:, None] * stride_n + place[None, :], mask=mask, other=0.0).to(A)
            own = tl.load(y + n[:, None] * D + (at // K)[None, :], mask=mask, other=0.0).to(A)
            penalty = hinge_epilogue(
                value, own, n, ok, at, inside, direction, weight, weight_row, margin, out, slopes,
                D * K, OUT, SQUARED, SAVE,
            )  # fmt: skip
            total += tl.sum(penalty, 1)
    if OUT == PENALTY_SUM:
        tl.store(sums + tl.program_id(0), tl.sum(total))
