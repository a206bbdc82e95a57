"""The whole network forward in one kernel: y, the slopes and the hinge, in either mode.

A persistent program walks over tiles of BM rows. Nothing but the outputs (and ∂penalty/∂J when the
backward will need it) goes to memory; the penalties leave as one partial sum per program.
"""

from __future__ import annotations

from functools import lru_cache, partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ....problem import Problem, accumulate_dtype
from ... import Params
from ..constants import as_compiled
from ..device.activations import activation_of
from ..device.columns import column_of
from ..device.hinge import PENALTY_SUM, hinge_epilogue
from ..launch import launch
from ..reduce import reduce_sum
from ..slopes import direction_of, margins_of, output_like
from ..target import approximate, compute_dtype, processors, products, register_limit
from ..tuning import tuned
from .config import (
    WholeConfig,
    candidates,
    dtypes_of,
    forward_config,
    padded,
    precision_of,
    shape_of,
    split,
)
from .tiles import (
    affine_up,
    first_layer,
    keep,
    matmul,
    padded_width,
    product_down,
    product_up,
    recall,
    through,
)

__all__ = ["forward", "launch_forward", "saved_like", "whole_forward"]


def saved_like(problem: Problem, x: Tensor) -> list[Tensor]:
    """∂penalty/∂J (N, D, k) where there is a hinge: activations are computed again."""
    if problem.hinge is None:
        return []
    N = x.shape[0]
    return [x.new_empty(N, problem.D, problem.k, dtype=accumulate_dtype(x.dtype))]


def forward(
    problem: Problem, x: Tensor, weight: Tensor | None, params: Params, save: bool
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """y (N, D), the penalty or J, and the saved tensors (none unless ``save``)."""
    known = as_compiled(problem)
    rule = _rule(known, x.dtype, products(x.device), precision_of(x.dtype))
    run = partial(launch_forward, problem, x, weight, params, save)
    return tuned(rule, candidates, ("forward", known, save), x, run)


@lru_cache(maxsize=256)
def _rule(problem: Problem, dtype: torch.dtype, way: str, precision: str) -> WholeConfig:
    shape = shape_of(problem, dtype)
    width = max(shape["H"], shape["PD"])
    return forward_config(width, shape["ADJOINT"], way, precision == "tf32x3")


def launch_forward(
    problem: Problem,
    x: Tensor,
    weight: Tensor | None,
    params: Params,
    save: bool,
    config: WholeConfig,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    N, D, hinge = x.shape[0], problem.D, problem.hinge
    saved = saved_like(problem, x) if save else []
    y = x.new_empty(N, D)
    out = output_like(problem, y)
    if N == 0:
        return y, out.zero_(), saved
    ws, bs = split(params)
    bias, types = tuple([b is not None for b in bs]), (approximate(x.dtype), precision_of(x.dtype))
    constants = _constants(as_compiled(problem), x.dtype, types, bias, bool(saved), config)
    tiles = -(-N // config.rows)
    P = min(tiles, processors(x.device) * config.per_processor)
    summed = hinge is not None and not hinge.elementwise
    sums = out.new_empty(P) if summed else None
    scratch = None
    if not config.in_registers:
        size = P * (len(ws) + 1) * config.rows * max(constants["H"], constants["PD"])
        scratch = x.new_empty(size, dtype=compute_dtype(x.dtype))
    launch(
        whole_forward, (P,), x, x.contiguous(), weight, direction_of(problem, out), ws, bs, y,
        None if summed else out, saved[0] if saved else None, sums, scratch, N,
        D * problem.k if weight is not None and weight.dim() == 3 else 0,
        *margins_of(problem, out), **constants, **register_limit(x.device),
    )  # fmt: skip
    if sums is not None:
        launch(reduce_sum, (1,), x, sums, out, P, BLOCK=1024)
    return y, out, saved


@lru_cache(maxsize=256)
def _constants(
    problem: Problem,
    dtype: torch.dtype,
    types: tuple[int, str],  # what ``approximate`` and ``precision_of`` say of the dtype now
    bias: tuple[bool, ...],
    save: bool,
    config: WholeConfig,
) -> dict[str, Any]:
    """What the kernel is compiled for."""
    hinge = problem.hinge
    return {
        **shape_of(problem, dtype), **dtypes_of(dtype), "BIAS": bias,
        "SQUARED": hinge is not None and hinge.squared, "SAVE": save,
        "PK": padded(problem.k), "BK": min(padded(problem.d), config.chunk),
        "INNER": config.inner, "BM": config.rows,
        "num_warps": config.warps, "num_stages": config.stages,
    }  # fmt: skip


@triton.constexpr_function
def forward_slots(acts):
    """Tiles of scratch: two in passing, and σ'(a_l) of the hidden layers."""
    return len(acts) + 1


@triton.jit(do_not_specialize=["N"])
def whole_forward(
    x,
    weight,
    direction,
    ws,
    bs,
    y,
    out,
    slopes,
    sums,
    scratch,
    N,
    weight_row,
    margin,
    margins,
    WIDTHS: tl.constexpr,
    ACTS: tl.constexpr,
    BIAS: tl.constexpr,
    K: tl.constexpr,
    RUNS: tl.constexpr,
    ADJOINT: tl.constexpr,
    OUT: tl.constexpr,
    SQUARED: tl.constexpr,
    SAVE: tl.constexpr,
    H: tl.constexpr,
    PD: tl.constexpr,
    PK: tl.constexpr,
    BK: tl.constexpr,
    INNER: tl.constexpr,
    BM: tl.constexpr,
    C: tl.constexpr,
    A: tl.constexpr,
    PRECISION: tl.constexpr,
):
    d: tl.constexpr = WIDTHS[0]
    D: tl.constexpr = WIDTHS[len(ACTS)]
    if scratch is not None:
        scratch = scratch + tl.program_id(0).to(tl.int64) * (forward_slots(ACTS) * BM * max(H, PD))
    total = tl.zeros((BM,), A)
    for tile in tl.range(tl.program_id(0), tl.cdiv(N, BM), tl.num_programs(0), disable_licm=True):
        start = tile * tl.full((), BM, tl.int64)  # 64 bits, also where tile is a Python int
        n = tl.arange(0, BM)
        ok = n < N - tile * BM
        x_ = x + start * d
        weight_ = weight
        if weight is not None:
            weight_ = weight + start * weight_row
        y_ = y + start * D
        out_ = out
        if out is not None:
            out_ = out + start * (D * K)
        slopes_ = slopes
        if slopes is not None:
            slopes_ = slopes + start * (D * K)
        if ADJOINT:
            total += adjoint_tile(
                n, ok, x_, weight_, direction, ws, bs, y_, out_, slopes_, scratch, weight_row,
                margin, margins, WIDTHS, ACTS, BIAS, K, RUNS, OUT, SQUARED, SAVE, H, PD, PK, BK,
                INNER,
                C, A, PRECISION,
            )  # fmt: skip
        else:
            for c in tl.range(0, K, disable_licm=True):
                total += tangent_tile(
                    n, ok, c, x_, weight_, direction, ws, bs, y_, out_, slopes_, scratch,
                    weight_row, margin, margins,
                    WIDTHS, ACTS, BIAS, K, RUNS, OUT, SQUARED, SAVE, H, PD, BK, INNER,
                    C, A, PRECISION,
                )  # fmt: skip
    if OUT == PENALTY_SUM:
        tl.store(sums + tl.program_id(0), tl.sum(total))


@triton.jit
def tangent_tile(
    n, ok, c, x, weight, direction, ws, bs, y, out, slopes, scratch, weight_row, margin, margins,
    WIDTHS: tl.constexpr, ACTS: tl.constexpr, BIAS: tl.constexpr, K: tl.constexpr,
    RUNS: tl.constexpr, OUT: tl.constexpr, SQUARED: tl.constexpr, SAVE: tl.constexpr,
    H: tl.constexpr, PD: tl.constexpr, BK: tl.constexpr, INNER: tl.constexpr,
    C: tl.constexpr, A: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Column c: the tangent ȧ travels with the activations, one weight tile serves both products.

    With several columns the activations are computed again for each: registers, not products, are
    what a narrow network is short of.
    """
    L: tl.constexpr = len(ACTS)
    D: tl.constexpr = WIDTHS[L]
    d: tl.constexpr = WIDTHS[0]
    BM: tl.constexpr = n.shape[0]
    FIRST: tl.constexpr = padded_width(0, L, H, PD)
    WIDE: tl.constexpr = max(H, PD)
    a = first_layer(x, n, ok, ws[0], bs[0], WIDTHS, BIAS[0], FIRST, BK, C, A, PRECISION)
    unit = tl.arange(0, FIRST)
    w1 = tl.load(ws[0] + unit * d + column_of(c, RUNS), mask=unit < WIDTHS[1], other=0.0)
    a_dot = tl.broadcast_to(w1.to(A)[None, :], (BM, FIRST))
    h, slope, _curvature = activation_of(a, ACTS, 0)
    h_dot = slope * a_dot
    for l in tl.static_range(1, L):
        h = through(scratch, 0, h.to(C), WIDE, INNER)
        h_dot = through(scratch, 1, h_dot.to(C), WIDE, INNER)
        a = affine_up(h, scratch, 0, ws, bs, l, WIDTHS, BIAS, H, PD, INNER, C, A, PRECISION)
        a_dot = product_up(h_dot, scratch, 1, ws, l, WIDTHS, H, PD, INNER, C, A, PRECISION)
        if INNER:
            tl.debug_barrier()  # the slots are read by all before they are written again
        h, slope, _curvature = activation_of(a, ACTS, l)
        h_dot = slope * a_dot
    output = tl.arange(0, PD)
    mask = ok[:, None] & (output[None, :] < D)
    tl.store(y + n[:, None] * D + output[None, :], h, mask=mask & (c == 0))
    penalty = hinge_epilogue(
        h_dot, h, n, ok, output * K + c, output < D, direction, weight, weight_row, margin, margins,
        out, slopes, D * K, OUT, SQUARED, SAVE,
    )  # fmt: skip
    return tl.sum(penalty, 1)


@triton.jit
def adjoint_tile(
    n, ok, x, weight, direction, ws, bs, y, out, slopes, scratch, weight_row, margin, margins,
    WIDTHS: tl.constexpr, ACTS: tl.constexpr, BIAS: tl.constexpr, K: tl.constexpr,
    RUNS: tl.constexpr, OUT: tl.constexpr, SQUARED: tl.constexpr, SAVE: tl.constexpr,
    H: tl.constexpr, PD: tl.constexpr, PK: tl.constexpr, BK: tl.constexpr, INNER: tl.constexpr,
    C: tl.constexpr, A: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Up once, keeping σ'(a_l); then one chain down per output gives all K columns at once."""
    L: tl.constexpr = len(ACTS)
    D: tl.constexpr = WIDTHS[L]
    d: tl.constexpr = WIDTHS[0]
    BM: tl.constexpr = n.shape[0]
    FIRST: tl.constexpr = padded_width(0, L, H, PD)
    WIDE: tl.constexpr = max(H, PD)
    a = first_layer(x, n, ok, ws[0], bs[0], WIDTHS, BIAS[0], FIRST, BK, C, A, PRECISION)
    kept = ()
    for l in tl.static_range(1, L):
        h, slope, _curvature = activation_of(a, ACTS, l - 1)
        kept = keep(kept, slope, scratch, l + 1, WIDE, C, ACTS[0][4])
        h = through(scratch, 0, h.to(C), WIDE, INNER)
        a = affine_up(h, scratch, 0, ws, bs, l, WIDTHS, BIAS, H, PD, INNER, C, A, PRECISION)
        if scratch is not None:
            tl.debug_barrier()  # the slots are read by all before they are written again
    h, last_slope, _curvature = activation_of(a, ACTS, L - 1)
    output = tl.arange(0, PD)
    mask = ok[:, None] & (output[None, :] < D)
    tl.store(y + n[:, None] * D + output[None, :], h, mask=mask)
    h = tl.where(mask, h, tl.zeros_like(h))
    total = tl.zeros((BM,), A)
    column = tl.arange(0, PK)
    for e in tl.range(0, D, disable_licm=True):
        chosen = (output == e)[None, :]
        p = tl.where(chosen, last_slope, tl.zeros_like(last_slope))
        p = down_to_first(
            p, kept, scratch, ws, WIDTHS, ACTS, H, PD, INNER, C, A, PRECISION
        )  # fmt: skip
        unit = tl.arange(0, FIRST)
        inside = (unit[:, None] < WIDTHS[1]) & (column[None, :] < K)
        w1 = tl.load(
            ws[0] + unit[:, None] * d + column_of(column, RUNS)[None, :],
            mask=inside,
            other=0.0,
        )
        J = matmul(p, w1, C, PRECISION)
        own = tl.sum(tl.where(chosen, h, tl.zeros_like(h)), 1)[:, None]
        penalty = hinge_epilogue(
            J, tl.broadcast_to(own, (BM, PK)), n, ok, column + e * K, column < K, direction, weight,
            weight_row, margin, margins, out, slopes, D * K, OUT, SQUARED, SAVE,
        )  # fmt: skip
        total += tl.sum(penalty, 1)
    return total


@triton.jit
def down_to_first(
    p, kept, scratch, ws, WIDTHS: tl.constexpr, ACTS: tl.constexpr, H: tl.constexpr,
    PD: tl.constexpr, INNER: tl.constexpr, C: tl.constexpr, A: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """p_L to p_1: p_{l-1} = σ'(a_{l-1}) ∘ (p_l W_l)."""
    L: tl.constexpr = len(ACTS)
    WIDE: tl.constexpr = max(H, PD)
    for l in tl.static_range(L - 1, 0, -1):
        p = through(scratch, 1, p.to(C), WIDE, INNER)
        P = product_down(p, scratch, 1, ws, l, WIDTHS, H, PD, INNER, C, A, PRECISION)
        p = P * recall(kept, l - 1, scratch, l + 1, p.shape[0], H, WIDE, C, A, ACTS[0][4])
        if scratch is not None:
            tl.debug_barrier()
    return p
