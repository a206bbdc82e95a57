"""The active pairs of a narrow chain: up and down the layers in one kernel.

A tile of pairs walks with the tangent up and with the curvature's cotangent down, in registers. It
leaves p, q, h and ḣ of its hidden layers, of which the sums are made: see ``gradients.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ....problem import Problem
from ..active import list_active
from ..device.activations import activation_of
from ..device.columns import place_of
from ..device.tiles import bias_row, input_tile, input_weights, weight_tile
from ..launch import launch
from ..target import register_limit
from ..whole.tiles import matmul, within
from .config import pairs_config
from .forward import leave

__all__ = ["narrow_pairs", "walk"]


def walk(
    problem: Problem, gout: Tensor | None, x: Tensor, ws: Sequence[Tensor],
    b: Tensor | None, a: tuple[Tensor, ...] | None, chain: tuple[Tensor, ...] | None,
    saved: Sequence[Tensor], shape: dict[str, Any],
) -> tuple[Any, ...]:  # fmt: skip
    """rows, total, ẋ, p, q, h and ḣ of the active pairs, as ``narrow_gradients`` takes them."""
    if gout is None:
        return (None,) * 7
    active = list_active(
        problem, gout.contiguous(), None if problem.hinge is None else saved[-1], x
    )
    M, hidden, config = len(active.rows), problem.widths[1:-1], pairs_config(problem)
    p, q, h_dot = (tuple(x.new_empty(M, H) for H in hidden) for _ in range(3))
    h = tuple(x.new_empty(M, H) for H in hidden[:-1]) or None
    launch(
        narrow_pairs, (-(-M // config.rows),), x, x, tuple(ws), b, a, chain, active.rows,
        active.total, active.x_dot, p, q, h, h_dot, BM=config.rows, **shape,
        **register_limit(x.device), num_warps=config.warps, num_stages=1,
    )  # fmt: skip
    return active.rows, active.total, active.x_dot, p, q, h, h_dot


@triton.jit
def narrow_pairs(
    x, ws, b, a, chain, rows, total, x_dot, p_out, q_out, h_out, h_dot_out,
    WIDTHS: tl.constexpr, ACTS: tl.constexpr, RUNS: tl.constexpr, K: tl.constexpr,
    H: tl.constexpr, FAN_TILE: tl.constexpr, BM: tl.constexpr, C: tl.constexpr, A: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of BM pairs, of which there are ``total``."""
    L: tl.constexpr = len(ACTS)
    count = tl.load(total)
    first = tl.program_id(0) * BM
    if first >= count:
        return
    start = first.to(tl.int64)
    i = tl.arange(0, BM)
    ok = i < count - first
    n = tl.load(rows + start + i, mask=ok, other=0).to(tl.int64)
    slopes, curves = pairs_up(
        start, i, n, ok, x, ws, b, a, chain, x_dot, p_out, h_out, h_dot_out, WIDTHS, ACTS, RUNS, K,
        H, FAN_TILE, C, A, PRECISION,
    )  # fmt: skip
    unit = tl.arange(0, H)
    q = curves[L - 2]
    leave(q_out[L - 2], q, start, i, ok, WIDTHS[L - 1])
    for l in tl.static_range(L - 3, -1, -1):
        w = weight_tile(ws[l + 1], unit, unit, WIDTHS[l + 2], WIDTHS[l + 1], C)
        Q = within(matmul(q, w, C, PRECISION), WIDTHS[l + 1])
        q = slopes[l] * Q + curves[l]
        leave(q_out[l], q, start, i, ok, WIDTHS[l + 1])


@triton.jit
def pairs_up(
    start, i, n, ok, x, ws, b, a, chain, x_dot, p_out, h_out, h_dot_out, WIDTHS: tl.constexpr,
    ACTS: tl.constexpr, RUNS: tl.constexpr, K: tl.constexpr, H: tl.constexpr,
    FAN_TILE: tl.constexpr, C: tl.constexpr, A: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The tangent runs up: σ' and σ''∘ȧ∘P of the hidden layers."""
    L: tl.constexpr = len(ACTS)
    unit = tl.arange(0, H)
    w, bias = input_weights(ws[0], b, unit, WIDTHS[1], WIDTHS[0], FAN_TILE, C, A)
    inputs = input_tile(x, n, ok, WIDTHS[0], FAN_TILE, C)
    own = within(tl.dot(inputs, w, input_precision=PRECISION).to(A), WIDTHS[1]) + bias
    place = place_of(tl.arange(0, FAN_TILE), RUNS)
    inside = ok[:, None] & ((place >= 0) & (place < K))[None, :]
    at = i[:, None] * K + place[None, :]
    h_dot = tl.load(x_dot + start * K + at, mask=inside, other=0.0).to(C)
    a_dot = within(tl.dot(h_dot, w, input_precision=PRECISION).to(A), WIDTHS[1])
    slopes = ()
    curves = ()
    for l in tl.static_range(L - 1):
        mask = ok[:, None] & (unit[None, :] < WIDTHS[l + 1])
        at = n[:, None] * WIDTHS[l + 1] + unit[None, :]
        if l > 0:
            own = tl.load(a[l - 1] + at, mask=mask, other=0.0).to(A)
        h, slope, curvature = activation_of(own, ACTS, l)
        if l == L - 2:
            P = bias_row(ws[L - 1], unit, WIDTHS[L - 1], A)
        else:
            P = tl.load(chain[l] + at, mask=mask, other=0.0).to(A)
            leave(h_out[l], h, start, i, ok, WIDTHS[l + 1])
        leave(p_out[l], slope * P, start, i, ok, WIDTHS[l + 1])
        if l > 0:
            w, _bias = input_weights(ws[l], None, unit, WIDTHS[l + 1], WIDTHS[l], H, C, A)
            a_dot = within(matmul(h_dot, w, C, PRECISION), WIDTHS[l + 1])
        h_dot = (slope * a_dot).to(C)
        leave(h_dot_out[l], h_dot, start, i, ok, WIDTHS[l + 1])
        slopes = slopes + (slope,)  # type: ignore[assignment] # noqa: RUF005
        curves = curves + (curvature * P * a_dot,)  # type: ignore[assignment] # noqa: RUF005
    return slopes, curves
