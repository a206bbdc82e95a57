"""Sums over programs in a fixed order: no atomics, so two runs give the same bits."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["reduce_gradients", "reduce_sum"]


@triton.jit(do_not_specialize=["P"])
def reduce_sum(sums, total, P, BLOCK: tl.constexpr):
    """total = Σ sums (P,), by one program."""
    part = tl.zeros((BLOCK,), sums.dtype.element_ty)
    for start in range(0, P, BLOCK):
        i = start + tl.arange(0, BLOCK)
        part += tl.load(sums + i, mask=i < P, other=0.0)
    tl.store(total, tl.sum(part))


@triton.jit(do_not_specialize=["P"])
def reduce_gradients(
    partials, grads, P, OFFSETS: tl.constexpr, ADD: tl.constexpr, BLOCK: tl.constexpr,
    SLICES: tl.constexpr,
):  # fmt: skip
    """grads[i] = Σ over the P programs' slices, each tensor cast to its own dtype; with ADD it is
    added to what is there.

    ``OFFSETS`` says where each tensor begins in a slice, and last the slice's size. A grad that is
    None is not needed (and its part of the slices was never written).
    """
    SIZE: tl.constexpr = OFFSETS[len(OFFSETS) - 1]
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    slices = tl.arange(0, SLICES)
    total = tl.zeros((BLOCK,), partials.dtype.element_ty)
    for start in range(0, P, SLICES):
        s = start + slices
        part = partials + s[:, None].to(tl.int64) * SIZE + i[None, :]
        total += tl.sum(tl.load(part, mask=(s[:, None] < P) & (i[None, :] < SIZE), other=0.0), 0)
    for t in tl.static_range(len(OFFSETS) - 1):
        if grads[t] is not None:
            inside = (i >= OFFSETS[t]) & (i < OFFSETS[t + 1])
            at = grads[t] + (i - OFFSETS[t])
            found = total
            if ADD:
                found += tl.load(at, mask=inside, other=0.0).to(total.dtype)
            tl.store(at, found, mask=inside)
