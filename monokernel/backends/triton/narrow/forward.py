"""A narrow chain of one output forward: y, the slopes, the hinge, and what the backward takes.

A persistent program walks over tiles of BM rows. The weights of the hidden layers lie in shared
memory all the while, where each serves the way up and the way down; a_l runs up and ∂y/∂h_l down in
registers, and what is kept of either leaves from there.
"""

# ruff: noqa: RET505 (see ``device/__init__.py``)

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ....problem import Problem
from ... import Params
from ..device.activations import APPROXIMATE, activation_of
from ..device.columns import column_of
from ..device.hinge import PENALTY_SUM, hinge_epilogue
from ..device.tiles import bias_row, input_tile, input_weights, weight_tile
from ..launch import launch
from ..layered.config import kept_chain, saved_like
from ..slopes import hinging, output_like
from ..target import processors, register_limit
from ..whole.config import split
from ..whole.tiles import after, matmul, packed, unmoving, unpacked, within
from .config import FORWARD, shape_of

__all__ = ["forward", "narrow_forward"]


def forward(
    problem: Problem, x: Tensor, weight: Tensor | None, params: Params, save: bool
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """y (N, 1), the penalty or J, and the saved tensors (none unless ``save``)."""
    N = len(x)
    saved = saved_like(problem, x) if save else []
    y = x.new_empty(N, 1)
    if N == 0:
        return y, output_like(problem, y).zero_(), saved
    P = min(-(-N // FORWARD.rows), processors(x.device))
    hinge = hinging(problem, y, weight, saved, P)
    ws, bs = split(params)
    launch(
        narrow_forward, (P,), x, x.contiguous(), ws, bs, y,
        tuple(saved[: problem.depth - 2]) or None,
        (tuple(kept_chain(problem, saved)) or None) if save else None, *hinge.args, N,
        BIAS=tuple(b is not None for b in bs), **hinge.options, BM=FORWARD.rows,
        **shape_of(problem, x), **register_limit(x.device), num_warps=FORWARD.warps, num_stages=1,
    )  # fmt: skip
    return y, hinge.total(y), saved


@triton.jit(do_not_specialize=["N"])
def narrow_forward(
    x, ws, bs, y, a_out, P_out, direction, weight, weight_row, margin, margins, out, slopes, sums,
    N,
    WIDTHS: tl.constexpr, ACTS: tl.constexpr, BIAS: tl.constexpr, K: tl.constexpr,
    RUNS: tl.constexpr, OUT: tl.constexpr, SQUARED: tl.constexpr,
    SAVE: tl.constexpr, H: tl.constexpr, FAN_TILE: tl.constexpr, BM: tl.constexpr,
    C: tl.constexpr, A: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Of a_l what is stored in ``a_out`` begins with the second layer's, in ``P_out`` ∂y/∂h_l of
    all hidden layers but the last."""
    d: tl.constexpr = WIDTHS[0]
    weights = hidden_weights(ws, WIDTHS, H, C)
    zero = N >> 31  # see ``after`` in whole/tiles.py
    total = tl.zeros((BM,), A)
    for tile in tl.range(tl.program_id(0), tl.cdiv(N, BM), tl.num_programs(0), disable_licm=True):
        start = tile * tl.full((), BM, tl.int64)  # 64 bits, also where tile is a Python int
        n = tl.arange(0, BM)
        still = unmoving(tile)
        ok = n < N - tile * BM
        inputs = input_tile(x + start * d, n, ok, d, FAN_TILE, C)
        p, value, kept = up(
            inputs, start, n, ok, weights, ws, bs, y, a_out, zero, still, WIDTHS, ACTS, BIAS, H,
            FAN_TILE, C, A, PRECISION,
        )  # fmt: skip
        p = down(p, start, n, ok, weights, kept, P_out, zero, WIDTHS, ACTS, H, C, A, PRECISION)
        weight_ = weight
        if weight is not None:
            weight_ = weight + start * weight_row
        out_ = out
        if out is not None:
            out_ = out + start * K
        slopes_ = slopes
        if slopes is not None:
            slopes_ = slopes + start * K
        # One slope at a time: a tile of four spilled 64 bytes.
        for c in tl.static_range(K):
            J = slope_of(p, ws[0] + still, c, WIDTHS[1], d, RUNS, A)
            one = c + tl.arange(0, 1)
            penalty = hinge_epilogue(
                J, value[:, None], n, ok, one, one < K, direction, weight_, weight_row, margin,
                margins, out_, slopes_, K, OUT, SQUARED, SAVE,
            )  # fmt: skip
            total += tl.sum(penalty, 1)
    if OUT == PENALTY_SUM:
        tl.store(sums + tl.program_id(0), tl.sum(total))


@triton.jit
def hidden_weights(ws, WIDTHS: tl.constexpr, H: tl.constexpr, C: tl.constexpr):
    """The tiles of W_2, W_3, … of the hidden layers."""
    unit = tl.arange(0, H)
    found = ()
    for l in tl.static_range(1, len(WIDTHS) - 2):
        w = weight_tile(ws[l], unit, unit, WIDTHS[l + 1], WIDTHS[l], C)
        found = found + (w,)  # type: ignore[assignment] # noqa: RUF005 (Triton unpacks no tuples)
    return found


@triton.jit
def up(
    inputs, start, n, ok, weights, ws, bs, y, a_out, zero, still, WIDTHS: tl.constexpr,
    ACTS: tl.constexpr, BIAS: tl.constexpr, H: tl.constexpr, FAN_TILE: tl.constexpr,
    C: tl.constexpr, A: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """a_l runs up: p = σ'∘∂y/∂h of the last hidden layer, y, and σ' of the others."""
    L: tl.constexpr = len(ACTS)
    HOW: tl.constexpr = ACTS[0][4]
    unit = tl.arange(0, H)
    w, bias = input_weights(ws[0], bs[0], unit, WIDTHS[1], WIDTHS[0], FAN_TILE, C, A)
    a = within(tl.dot(inputs, w, input_precision=PRECISION).to(A), WIDTHS[1]) + bias
    h, slope, _curvature = activation_of(a, ACTS, 0)
    kept = ()
    for l in tl.static_range(1, L - 1):
        first = packed(slope, C, HOW)
        kept = kept + (first,)  # type: ignore[assignment] # noqa: RUF005 (Triton unpacks no tuples)
        h = after(first, h, zero, C, HOW)
        a = within(matmul(h, tl.trans(weights[l - 1]), C, PRECISION), WIDTHS[l + 1])
        if BIAS[l]:
            a += bias_row(bs[l] + still, unit, WIDTHS[l + 1], A)
        if a_out is not None:
            leave(a_out[l - 1], a, start, n, ok, WIDTHS[l + 1])
        h, slope, _curvature = activation_of(a, ACTS, l)
    last = bias_row(ws[L - 1] + still, unit, WIDTHS[L - 1], A)
    value = tl.sum(within(h * last, WIDTHS[L - 1]), 1)
    if BIAS[L - 1]:
        value += tl.load(bs[L - 1]).to(A)
    tl.store(y + start + n, value, mask=ok)
    return slope * last, value, kept


@triton.jit
def down(
    p, start, n, ok, weights, kept, P_out, zero, WIDTHS: tl.constexpr, ACTS: tl.constexpr,
    H: tl.constexpr, C: tl.constexpr, A: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """∂y/∂h_l runs down: p of the first layer."""
    L: tl.constexpr = len(ACTS)
    HOW: tl.constexpr = ACTS[0][4]
    for l in tl.static_range(L - 3, -1, -1):
        P = within(matmul(p, weights[l], C, PRECISION), WIDTHS[l + 1])
        if P_out is not None:
            leave(P_out[l], P, start, n, ok, WIDTHS[l + 1])
        p = P * later(kept[l], P, zero, C, HOW).to(A)
    return p


@triton.jit
def later(kept, tile, zero, C: tl.constexpr, HOW: tl.constexpr):
    """What was packed, not before ``tile`` is there: the compiler would take it apart at once, and
    hold two registers for each."""
    if HOW == APPROXIMATE:
        return unpacked(kept | (packed(tile, C, HOW) & zero.to(tl.uint32)), C, HOW)
    else:
        return kept


@triton.jit
def leave(out, tile, start, n, ok, WIDTH: tl.constexpr):
    """The tile as rows start + n of a tensor of WIDTH columns."""
    j = tl.arange(0, tile.shape[1])
    at = n[:, None] * WIDTH + j[None, :]
    mask = ok[:, None] & (j[None, :] < WIDTH)
    tl.store(out + start * WIDTH + at, tile.to(out.dtype.element_ty), mask=mask)


@triton.jit
def slope_of(
    p, W, c: tl.constexpr, ROWS: tl.constexpr, d: tl.constexpr, RUNS: tl.constexpr,
    A: tl.constexpr,
):  # fmt: skip
    """p W of the constrained column c: a sum, where a product would be of 16 columns."""
    unit = tl.arange(0, p.shape[1])
    w = tl.load(
        W + unit * d + column_of(c, RUNS), mask=unit < ROWS, other=0.0,
        eviction_policy="evict_last",
    ).to(A)  # fmt: skip
    return tl.sum(within(p * w[None, :], ROWS), 1)[:, None]
