"""The kernels that list the active pairs, and give back to the rows what was found for them.

A pair is number t·N + n: row n and, in tangent mode, column t (ẋ = e_t, s = gJ[n, :, t]), in
adjoint mode output t (ẋ = gJ[n, t, :], s = e_t). Two launches, a count by block and a list: the
order of the pairs is kept, so that two runs give the same bits. There are less than 2^31 of them,
which whoever lists them sees to: a division by N in 64 bits is a call.
"""

# ruff: noqa: RET505 (see ``device/__init__.py``)

from __future__ import annotations

import triton
import triton.language as tl

from ..device.hinge import slope_cotangent

__all__ = ["count_pairs", "gather_inputs", "list_pairs"]


@triton.jit
def entries_of(n, t, e, D: tl.constexpr, K: tl.constexpr, ADJOINT: tl.constexpr):
    """Where entry number e of a pair's part of gJ lies in (N, D, K)."""
    if ADJOINT:
        return n * (D * K) + t * K + e
    else:
        return n * (D * K) + e * K + t


@triton.jit
def is_active(
    gout, slopes, n, t, ok,
    D: tl.constexpr, K: tl.constexpr, ADJOINT: tl.constexpr, OUT: tl.constexpr,
):  # fmt: skip
    active = n < 0
    for e in range(K if ADJOINT else D):
        at = entries_of(n, t, e, D, K, ADJOINT)
        active |= slope_cotangent(gout, slopes, at, ok, OUT) != 0
    return (ok & active).to(tl.int32)


@triton.jit(do_not_specialize=["N"])
def count_pairs(
    gout, slopes, counts, N, D: tl.constexpr, K: tl.constexpr, ADJOINT: tl.constexpr,
    OUT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """counts[block] = how many of the block's pairs are active."""
    pair = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    ok = pair < N * (D if ADJOINT else K)
    n = (pair % N).to(tl.int64)
    active = is_active(gout, slopes, n, pair // N, ok, D, K, ADJOINT, OUT)
    tl.store(counts + tl.program_id(0), tl.sum(active))


@triton.jit(do_not_specialize=["N"])
def list_pairs(
    gout, slopes, counts, rows, place, x_dot, seed, total, N,
    D: tl.constexpr, K: tl.constexpr, ADJOINT: tl.constexpr, OUT: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Row, ẋ (K) and s (D) of the i-th active pair at place i; its number's place; their count.

    A pair that is not active has place -1.
    """
    block = tl.program_id(0)
    before = 0
    for start in range(0, block, BLOCK):
        i = start + tl.arange(0, BLOCK)
        before += tl.sum(tl.load(counts + i, mask=i < block, other=0))
    pair = block * BLOCK + tl.arange(0, BLOCK)
    ok = pair < N * (D if ADJOINT else K)
    n = (pair % N).to(tl.int64)
    t = pair // N
    active = is_active(gout, slopes, n, t, ok, D, K, ADJOINT, OUT)
    i = before + tl.cumsum(active, 0) - 1
    tl.store(place + pair, tl.where(active == 1, i, -1), mask=ok)
    chosen = ok & (active == 1)
    tl.store(rows + i, n.to(tl.int32), mask=chosen)
    i = i.to(tl.int64)
    for e in range(K if ADJOINT else D):
        g = slope_cotangent(gout, slopes, entries_of(n, t, e, D, K, ADJOINT), chosen, OUT)
        if ADJOINT:
            tl.store(x_dot + i * K + e, g, mask=chosen)
        else:
            tl.store(seed + i * D + e, g, mask=chosen)
    for e in range(D if ADJOINT else K):
        one = tl.where(t == e, 1.0, 0.0)
        if ADJOINT:
            tl.store(seed + i * D + e, one, mask=chosen)
        else:
            tl.store(x_dot + i * K + e, one, mask=chosen)
    tl.store(total, before + tl.sum(active), mask=block == tl.num_programs(0) - 1)


@triton.jit(do_not_specialize=["N"])
def gather_inputs(
    dx, part, place, N, d: tl.constexpr, ROW: tl.constexpr, COLUMN: tl.constexpr, T: tl.constexpr,
    FRESH: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, A: tl.constexpr,
):  # fmt: skip
    """dx[n] += Σ_t part[place of pair (n, t)], in the order of t; dx begins at 0 if FRESH.

    dx is (N, d) of the strides ROW and COLUMN. Unless FRESH, rows without a pair are left alone.
    """
    n = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    j = tl.program_id(1) * BN + tl.arange(0, BN)
    mask = (n[:, None] < N) & (j[None, :] < d)
    at = n[:, None] * ROW + j[None, :] * COLUMN
    total = tl.zeros((BM, BN), A)
    touched = n < 0
    for t in range(T):
        i = tl.load(place + n + tl.full((), 1, tl.int64) * t * N, mask=n < N, other=-1).to(tl.int64)
        touched |= i >= 0
        there = mask & (i[:, None] >= 0)
        total += tl.load(part + i[:, None] * d + j[None, :], mask=there, other=0.0).to(A)
    if not FRESH:
        mask = mask & touched[:, None]
        total += tl.load(dx + at, mask=mask, other=0.0).to(A)
    tl.store(dx + at, total, mask=mask)
