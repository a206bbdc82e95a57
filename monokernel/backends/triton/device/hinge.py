"""The hinge as the last thing that a kernel does with its slopes, and its share in the backward."""

# ruff: noqa: RET505 (see ``device/__init__.py``)

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["JACOBIAN", "PENALTIES", "PENALTY_SUM", "hinge_epilogue", "slope_cotangent"]

# What the second output is.
JACOBIAN = tl.constexpr(0)
PENALTIES = tl.constexpr(1)
PENALTY_SUM = tl.constexpr(2)


@triton.jit
def hinge(J, direction, weight, margin, SQUARED: tl.constexpr):
    """w·h(margin - direction·J), its derivative in J. NaN is no r <= 0, so it stays a penalty.

    Where nothing is violated both are 0 whatever the weight: the zero rule of ``hinge.py``.
    """
    r = margin - direction * J
    free = (r <= 0) | (direction == 0)
    r = tl.where(free, tl.zeros_like(r), r)
    weight = tl.where(free, tl.zeros_like(r), weight)
    if SQUARED:
        return weight * r * r, weight * (-2 * direction * r)
    else:
        slope = tl.where(free, tl.zeros_like(r), -direction + tl.zeros_like(r))
        return weight * r, weight * slope


@triton.jit
def hinge_epilogue(
    J,
    y,
    n,
    ok,
    at,
    inside,
    direction,
    weight,
    weight_row,
    margin,
    margins,
    out,
    slopes,
    ENTRIES: tl.constexpr,
    OUT: tl.constexpr,
    SQUARED: tl.constexpr,
    SAVE: tl.constexpr,
):
    """Writes what was asked for of a tile of slopes J; returns its penalties, 0 outside the mask.

    J[i, j] is the entry ``at[j]`` of the ENTRIES = D·k slopes of row n[i]. Where y is NaN the slope
    is too: no NaN becomes a penalty of zero. The ``margins`` of the entries, if there are any, take
    the place of the one ``margin``.
    """
    J = tl.where(y == y, J, tl.zeros_like(J) + float("nan"))
    mask = ok[:, None] & inside[None, :]
    entry = n[:, None] * ENTRIES + at[None, :]
    if OUT == JACOBIAN:
        tl.store(out + entry, J, mask=mask)
        return tl.zeros_like(J)
    else:
        sign = tl.load(direction + at, mask=inside, other=0.0)[None, :]
        if weight is None:
            w = tl.zeros_like(J) + 1
        else:
            w = tl.load(weight + n[:, None] * weight_row + at[None, :], mask=mask, other=0.0)
        if margins is None:
            penalty, S = hinge(J, sign, w, margin, SQUARED)
        else:
            own = tl.load(margins + at, mask=inside, other=0.0)[None, :]
            penalty, S = hinge(J, sign, w, own, SQUARED)
        if OUT == PENALTIES:
            tl.store(out + entry, penalty, mask=mask)
        if SAVE:
            tl.store(slopes + entry, S, mask=mask)
        return tl.where(mask, penalty, tl.zeros_like(penalty))


@triton.jit
def slope_cotangent(gout, slopes, entry, mask, OUT: tl.constexpr):
    """gJ = ∂loss/∂J at the offsets ``entry``: gout itself, or gout·∂penalty/∂J by the zero rule."""
    if OUT == JACOBIAN:
        return tl.load(gout + entry, mask=mask, other=0.0)
    else:
        S = tl.load(slopes + entry, mask=mask, other=0.0)
        if OUT == PENALTIES:
            g = tl.load(gout + entry, mask=mask, other=0.0)
        else:
            g = tl.load(gout) + tl.zeros_like(S)
        return tl.where(S == 0, tl.zeros_like(S), S * g)
