"""Sums over programs in a fixed order: no atomics, so two runs give the same bits."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import triton
import triton.language as tl
from torch import Tensor

from ...problem import accumulate_dtype
from .launch import launch

__all__ = ["Sums", "reduce_gradients", "reduce_sum"]


class Sums:
    """Partial sums of the gradients of some parameters, one slice (S, SIZE) for each part of the
    rows, for kernels to fill and one launch to add up, some ``at_once``: a fixed order, and one
    rounding. That number is of the kernel, and must not follow the rows."""

    def __init__(
        self, params: Sequence[Tensor | None], places: Sequence[int], slices: int, at_once: int,
        x: Tensor,
    ) -> None:  # fmt: skip
        self.places, self.slices, self.at_once = places, slices, at_once
        self.offsets = [0]
        for place in places:
            p = params[place]
            assert p is not None
            self.offsets.append(self.offsets[-1] + p.numel())
        self.partials = x.new_empty(slices, self.offsets[-1], dtype=accumulate_dtype(x.dtype))

    def part(self, place: int) -> Tensor | None:
        """The slices of one (S, its numbers), None if it is none of them."""
        if place not in self.places:
            return None
        i = self.places.index(place)
        return self.partials[:, self.offsets[i] : self.offsets[i + 1]]

    def add_up(self, gradient: Callable[[int], Tensor | None], add: bool) -> None:
        """Into the gradient of each place, if there is one: ``add`` to what it is, or as what it
        begins with."""
        if not self.places:
            return
        block = min(256, 2048 // self.at_once)
        launch(
            reduce_gradients, (-(-self.offsets[-1] // block),), self.partials, self.partials,
            tuple([gradient(place) for place in self.places]), self.slices,
            OFFSETS=tuple(self.offsets), ADD=add, BLOCK=block, SLICES=self.at_once,
        )  # fmt: skip


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
