"""The whole network backward in one kernel: every gradient, with work that follows the hinge.

Both modes have one backward (see ``backends/handwritten.py``): an active pair is a row with a
tangent ẋ that runs forward and a seed s that runs backward,

* tangent mode, column c: ẋ = e_c, s = gJ[row, :, c];
* adjoint mode, output e: ẋ = gJ[row, e, :], s = e_e.

A persistent program owns a run of tiles of rows. It first lists its own rows, those with a gJ that
is not zero in front: the first tiles of its list run tangents and cotangents, the others the
cotangent alone (or nothing, without gy). So the compaction costs no launch and no host
synchronisation, and the tile where active rows end is filled up with others.

Activations are computed again rather than saved by the forward. Within a tile they, their slopes
and the tangents lie in scratch slots of the program; weight gradients gather in the program's own
slice of ``partials``, and ``reduce.py`` adds the slices in order. Both stay in the L2 cache. Where
registers hold them (see ``config.py``), the sums and what a tile without a violation keeps do not
go there: what products take then lies in shared memory, where the compiler puts it for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache, partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ....problem import Problem, accumulate_dtype
from ... import Params
from ..constants import as_compiled
from ..device.hinge import PENALTY_SUM, slope_cotangent
from ..launch import launch
from ..reduce import reduce_gradients
from ..target import (
    OLD_TRITON,
    approximate,
    compute_dtype,
    processors,
    products,
    register_limit,
)
from ..tuning import tuned
from .config import (
    SMALL_TILE,
    WholeConfig,
    backward_config,
    candidates,
    dtypes_of,
    precision_of,
    shape_of,
    split,
)
from .passes import down_pass, seed_pass, slots, tangent_pass, up_pass
from .sums import fresh_sums, leave_sums, zero_fill
from .tiles import barrier

__all__ = ["backward", "gradients_like", "launch_backward", "offsets_of", "whole_backward"]

# With 32 input columns at a time, 40 inputs with dx at width 64 spill up to 424 bytes in Triton
# 3.6.
INPUTS_AT_A_TIME = 16


def backward(
    problem: Problem,
    gy: Tensor | None,
    gout: Tensor | None,
    x: Tensor,
    params: Params,
    saved: Sequence[Tensor],
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """The gradients of x and of every parameter, None where ``needs`` is false."""
    known = as_compiled(problem)
    small = len(x) <= SMALL_TILE * processors(x.device)
    rule = _rule(known, x.dtype, products(x.device), precision_of(x.dtype), needs[0], small)
    run = partial(launch_backward, problem, gy, gout, x, params, saved, needs)
    return tuned(rule, candidates, ("backward", known, tuple(needs)), x, run)


@lru_cache(maxsize=256)
def _rule(
    problem: Problem, dtype: torch.dtype, way: str, precision: str, dx: bool, small: bool
) -> WholeConfig:
    shape = shape_of(problem, dtype)
    few = problem.depth <= 4 and max(problem.d, problem.D) <= INPUTS_AT_A_TIME and not dx
    # Triton 3.6 spills 8 bytes with four columns and ReLU.
    if OLD_TRITON and dtype == torch.bfloat16 and problem.k > 3:
        few = few and not all(σ.piecewise_linear for σ in problem.activations)
    width = max(shape["H"], shape["PD"])
    dear = problem.depth > 4 and any(σ.kind == "mish" for σ in problem.activations)
    return backward_config(width, dtype.itemsize, way, precision == "tf32x3", few, dear, small)


def launch_backward(
    problem: Problem,
    gy: Tensor | None,
    gout: Tensor | None,
    x: Tensor,
    params: Params,
    saved: Sequence[Tensor],
    needs: Sequence[bool],
    config: WholeConfig,
) -> list[Tensor | None]:
    N = x.shape[0]
    dx = torch.empty_like(x, memory_format=torch.contiguous_format) if needs[0] else None
    grads = gradients_like(params, needs[1:])
    wanted = tuple([g is not None for g in grads])
    if N == 0 or (gy is None and gout is None):
        return [None if g is None else g.zero_() for g in (dx, *grads)]
    ws, bs = split(params)
    bias, types = tuple([b is not None for b in bs]), (approximate(x.dtype), precision_of(x.dtype))
    constants = _constants(as_compiled(problem), x.dtype, types, bias, wanted, config)
    tiles = -(-N // config.rows)
    P = min(tiles, processors(x.device) * config.per_processor)
    offsets, wide = constants["OFFSETS"], max(constants["H"], constants["PD"])
    size = P * (4 * len(ws) + 1) * constants["ACTIVE_ROWS"] * wide
    scratch = x.new_empty(size, dtype=compute_dtype(x.dtype))
    partials = x.new_empty(P * offsets[-1], dtype=accumulate_dtype(x.dtype))
    rows = None if gout is None else x.new_empty(tiles * config.rows, dtype=torch.int32)
    launch(
        whole_backward, (P,), x, x.contiguous(),
        None if gy is None else gy.contiguous(), None if gout is None else gout.contiguous(),
        saved[0] if saved else None, ws, bs, dx, partials, rows, scratch, N,
        **constants, **register_limit(x.device),
    )  # fmt: skip
    if any(wanted):
        block = 64
        launch(
            reduce_gradients, (-(-offsets[-1] // block),), x, partials, grads, P,
            OFFSETS=offsets, ADD=False, BLOCK=block, SLICES=32,
        )  # fmt: skip
    return [dx, *grads]


def gradients_like(params: Params, needs: Sequence[bool]) -> tuple[Tensor | None, ...]:
    """Uninitialised memory for the gradients of the parameters, None for those not needed."""
    return tuple(
        [
            torch.empty_like(p, memory_format=torch.contiguous_format)
            if p is not None and need
            else None
            for p, need in zip(params, needs, strict=True)
        ]
    )


@lru_cache(maxsize=256)
def _constants(
    problem: Problem,
    dtype: torch.dtype,
    types: tuple[int, str],  # what ``approximate`` and ``precision_of`` say of the dtype now
    bias: tuple[bool, ...],
    needs: tuple[bool, ...],
    config: WholeConfig,
) -> dict[str, Any]:
    """What the kernel is compiled for."""
    shape, BM = shape_of(problem, dtype), config.rows
    return {
        **shape, **dtypes_of(dtype), "BIAS": bias, "NEEDS": needs, "OFFSETS": offsets_of(problem),
        "BK": INPUTS_AT_A_TIME, "INNER": config.inner, "BM": BM, "SCAN": max(BM, 256),
        "ACTIVE_ROWS": config.active_rows or BM, "IN_REGISTERS": config.in_registers,
        "CHUNK": min(config.chunk, shape["H"]),
        "num_warps": config.warps, "num_stages": config.stages,
    }  # fmt: skip


@lru_cache(maxsize=256)
def offsets_of(problem: Problem) -> tuple[int, ...]:
    """Where W_1, b_1, W_2, … begin in a program's slice of the partial sums, and its size."""
    offsets = [0]
    for rows, columns in zip(problem.widths[1:], problem.widths, strict=False):
        offsets += [offsets[-1] + rows * columns, offsets[-1] + rows * columns + rows]
    return tuple(offsets)


@triton.jit(do_not_specialize=["N"])
def whole_backward(
    x,
    gy,
    gout,
    slopes,
    ws,
    bs,
    dx,
    partials,
    rows,
    scratch,
    N,
    WIDTHS: tl.constexpr,
    ACTS: tl.constexpr,
    BIAS: tl.constexpr,
    NEEDS: tl.constexpr,
    OFFSETS: tl.constexpr,
    K: tl.constexpr,
    RUNS: tl.constexpr,
    ADJOINT: tl.constexpr,
    OUT: tl.constexpr,
    H: tl.constexpr,
    PD: tl.constexpr,
    BK: tl.constexpr,
    INNER: tl.constexpr,
    BM: tl.constexpr,
    SCAN: tl.constexpr,
    ACTIVE_ROWS: tl.constexpr,
    IN_REGISTERS: tl.constexpr,
    CHUNK: tl.constexpr,
    C: tl.constexpr,
    A: tl.constexpr,
    PRECISION: tl.constexpr,
):
    L: tl.constexpr = len(ACTS)
    PAIRS: tl.constexpr = WIDTHS[L] if ADJOINT else K
    pid = tl.program_id(0)
    tiles = tl.cdiv(N, BM)
    mine = tiles // tl.num_programs(0) + (pid < tiles % tl.num_programs(0)).to(tl.int32)
    before = pid * (tiles // tl.num_programs(0)) + tl.minimum(pid, tiles % tl.num_programs(0))
    first = before.to(tl.int64) * BM
    own = tl.minimum(mine * BM, N - before * BM)  # the last tile of all may be cut
    x = x + first * WIDTHS[0]
    # Pointers move by 64 bits once; tiles then have 32-bit offsets, at half the registers. Not in a
    # helper: in Triton 3.6 none may return None.
    if dx is not None:
        dx = dx + first * WIDTHS[0]
    if gy is not None:
        gy = gy + first * WIDTHS[L]
    if slopes is not None:
        slopes = slopes + first * (WIDTHS[L] * K)
    if OUT != PENALTY_SUM:  # noqa: SIM102 (each is resolved by the compiler)
        if gout is not None:
            gout = gout + first * (WIDTHS[L] * K)
    partials = partials + pid.to(tl.int64) * OFFSETS[2 * L]
    scratch = scratch + pid.to(tl.int64) * (slots(ACTS) * ACTIVE_ROWS * max(H, PD))
    sums = ()
    if IN_REGISTERS:
        sums = fresh_sums(WIDTHS, H, PD, BK, C, A)
    else:
        zero_fill(partials, OFFSETS[2 * L])
    zero = N >> 31  # see ``after`` in tiles.py
    done = 0
    if gout is not None:
        rows = rows + first
        active = list_rows(gout, slopes, rows, own, WIDTHS[L] * K, OUT, SCAN)
        done = tl.minimum(tl.cdiv(active, ACTIVE_ROWS) * ACTIVE_ROWS, own)
        tl.debug_barrier()
        for start in tl.range(0, active, ACTIVE_ROWS, disable_licm=True):
            at = start + tl.arange(0, ACTIVE_ROWS)
            ok = at < own
            n = tl.load(rows + at, mask=ok, other=0)
            for pair in tl.range(0, PAIRS, disable_licm=True):
                sums = gradients_of_tile(
                    zero, n, ok, pair, True, x, gy, gout, slopes, ws, bs, dx, sums, partials,
                    scratch, WIDTHS, ACTS, BIAS, NEEDS, OFFSETS, K, RUNS, ADJOINT, OUT, H, PD, BK,
                    INNER, CHUNK, C, A, PRECISION,
                )  # fmt: skip
    for start in tl.range(done, own, BM, disable_licm=True):
        at = start + tl.arange(0, BM)
        ok = at < own
        n = at
        if gout is not None:
            n = tl.load(rows + at, mask=ok, other=0)
        if gy is not None:
            sums = gradients_of_tile(
                zero, n, ok, 0, False, x, gy, gout, slopes, ws, bs, dx, sums, partials,
                None if IN_REGISTERS else scratch,
                WIDTHS, ACTS, BIAS, NEEDS, OFFSETS, K, RUNS, ADJOINT, OUT, H, PD, BK,
                0 if IN_REGISTERS else INNER, CHUNK, C, A, PRECISION,
            )  # fmt: skip
        elif dx is not None:
            for column in range(0, WIDTHS[0], BK):
                j = column + tl.arange(0, BK)
                tl.store(
                    dx + n[:, None] * WIDTHS[0] + j[None, :],
                    tl.zeros((BM, BK), C),
                    mask=ok[:, None] & (j[None, :] < WIDTHS[0]),
                )
    if IN_REGISTERS:
        leave_sums(sums, partials, WIDTHS, NEEDS, OFFSETS, H, PD)


@triton.jit
def list_rows(
    gout, slopes, rows, own, ENTRIES: tl.constexpr, OUT: tl.constexpr, SCAN: tl.constexpr
):
    """Writes this program's rows to ``rows``, active ones from the front, the others from the back.

    Returns how many are active. NaN counts as active.
    """
    front = 0
    back = own
    for start in range(0, own, SCAN):
        n = start + tl.arange(0, SCAN)
        ok = n < own
        active = tl.zeros((SCAN,), tl.int32)
        for e in range(ENTRIES):
            g = slope_cotangent(gout, slopes, n * ENTRIES + e, ok, OUT)
            active = tl.where(ok & (g != 0), 1, active)
        clean = tl.where(ok, 1 - active, 0)
        # Inclusive counts: the r-th active row goes to front + r - 1.
        place = tl.where(active == 1, front - 1 + tl.cumsum(active, 0), back - tl.cumsum(clean, 0))
        tl.store(rows + place, n, mask=ok)
        front += tl.sum(active)
        back -= tl.sum(clean)
    return front


@triton.jit
def gradients_of_tile(
    zero, n, ok, pair, ACTIVE: tl.constexpr, x, gy, gout, slopes, ws, bs, dx, sums, partials,
    scratch,
    WIDTHS: tl.constexpr, ACTS: tl.constexpr, BIAS: tl.constexpr, NEEDS: tl.constexpr,
    OFFSETS: tl.constexpr, K: tl.constexpr, RUNS: tl.constexpr, ADJOINT: tl.constexpr,
    OUT: tl.constexpr, H: tl.constexpr, PD: tl.constexpr, BK: tl.constexpr,
    INNER: tl.constexpr, CHUNK: tl.constexpr, C: tl.constexpr, A: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds what the rows n give for pair number ``pair`` (gy counts with pair 0) to the sums."""
    barrier(scratch)  # the slots may still be read by the tile before
    hs, first = up_pass(
        zero, n, ok, ACTIVE, x, ws, bs, scratch,
        WIDTHS, ACTS, BIAS, H, PD, BK, INNER, C, A, PRECISION,
    )  # fmt: skip
    barrier(scratch)
    if ACTIVE:
        tangent_pass(
            n, ok, pair, gout, slopes, ws, scratch,
            WIDTHS, ACTS, K, RUNS, ADJOINT, OUT, H, PD, BK, INNER, C, A, PRECISION,
        )  # fmt: skip
        sums = seed_pass(
            n, ok, pair, gout, slopes, ws, sums, partials, scratch,
            WIDTHS, ACTS, NEEDS, OFFSETS, dx is not None, K, RUNS, ADJOINT, OUT, H, PD, BK, INNER,
            CHUNK, C, A, PRECISION,
        )  # fmt: skip
    return down_pass(
        n, ok, pair, ACTIVE, x, gy, ws, dx, hs, first, sums, partials, scratch,
        WIDTHS, ACTS, NEEDS, OFFSETS, H, PD, BK, INNER, CHUNK, C, A, PRECISION,
    )  # fmt: skip
