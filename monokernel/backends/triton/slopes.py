"""The hinge where slopes come from a matrix product: the last launch of a forward in pieces."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ...problem import Problem, accumulate_dtype
from ...signs import shared_direction_table
from .constants import accumulator, output_code, power_of_two
from .device.hinge import PENALTY_SUM, hinge_epilogue
from .launch import launch
from .reduce import reduce_sum
from .target import processors

__all__ = [
    "Hinging",
    "direction_of",
    "hinge_slopes",
    "hinged",
    "hinging",
    "margins_of",
    "output_like",
]


def output_like(problem: Problem, y: Tensor) -> Tensor:
    """The second output, uninitialised: the sum of the penalties, or one number for each slope."""
    wide = accumulate_dtype(y.dtype)
    if problem.hinge is not None and not problem.hinge.elementwise:
        return y.new_empty((), dtype=wide)
    return y.new_empty(y.shape[0], problem.D, problem.k, dtype=wide)


def direction_of(problem: Problem, out: Tensor) -> Tensor | None:
    """The signs (D, k), as the second output ``out`` has its dtype and device."""
    if problem.hinge is None:
        return None
    signs = problem.hinge.direction
    return shared_direction_table(signs, problem.D, problem.k, out.dtype, out.device)


def margins_of(problem: Problem, out: Tensor) -> tuple[float, Tensor | None]:
    """The margin, a number at run time, or in its place those of every constraint (D, k)."""
    margin = 0.0 if problem.hinge is None else problem.hinge.margin
    if not isinstance(margin, tuple):
        return float(margin), None
    return 0.0, shared_direction_table(margin, problem.D, problem.k, out.dtype, out.device)


class Hinging(NamedTuple):
    """What ``hinge_epilogue`` is given: ``args`` in its order from direction to slopes, and the
    buffer of each program's sum last; and the second output."""

    out: Tensor
    sums: Tensor | None
    args: tuple[object, ...]
    options: dict[str, Any]

    def total(self, y: Tensor) -> Tensor:
        """The second output, once the programs have run."""
        if self.sums is not None:
            launch(reduce_sum, (1,), y, self.sums, self.out, len(self.sums), BLOCK=1024)
        return self.out


def hinging(
    problem: Problem, y: Tensor, weight: Tensor | None, saved: list[Tensor], programs: int
) -> Hinging:
    """Of a launch of so many programs."""
    D, k, hinge, out = problem.D, problem.k, problem.hinge, output_like(problem, y)
    summed = hinge is not None and not hinge.elementwise
    sums = out.new_empty(programs) if summed else None
    args = (
        direction_of(problem, out), weight,
        D * k if weight is not None and weight.dim() == 3 else 0,
        *margins_of(problem, out),
        None if summed else out, saved[-1] if saved and hinge is not None else None, sums,
    )  # fmt: skip
    options = {
        "OUT": output_code(problem),
        "SQUARED": hinge is not None and hinge.squared,
        "SAVE": bool(saved) and hinge is not None,
    }
    return Hinging(out, sums, args, options)


def hinged(
    problem: Problem, J: Tensor, y: Tensor, weight: Tensor | None, saved: list[Tensor]
) -> Tensor:
    """The second output from the slopes J (N, D, k) of any strides."""
    N, D, k = y.shape[0], problem.D, problem.k
    if N == 0:
        return output_like(problem, y).zero_()
    BE = min(32, power_of_two(D * k))
    BM = max(16, 1024 // BE)
    P = min(-(-N // BM), 4 * processors(y.device))
    hinge = hinging(problem, y, weight, saved, P)
    launch(
        hinge_slopes, (P,), y, J, y, *hinge.args, N, *J.stride(), D=D, K=k, **hinge.options,
        BM=BM, BE=BE, A=accumulator(y.dtype),
    )  # fmt: skip
    return hinge.total(y)


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
    margins,
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
                value, own, n, ok, at, inside, direction, weight, weight_row, margin, margins, out,
                slopes, D * K, OUT, SQUARED, SAVE,
            )  # fmt: skip
            total += tl.sum(penalty, 1)
    if OUT == PENALTY_SUM:
        tl.store(sums + tl.program_id(0), tl.sum(total))
