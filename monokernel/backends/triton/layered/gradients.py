"""The gradients of a chain's parameters as they are found."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ....problem import accumulate_dtype
from ... import Params
from ..launch import launch
from ..reduce import reduce_gradients

__all__ = ["Gradients", "Sums"]


class Gradients:
    """dW_1, db_1, dW_2, … of those that are wanted; a missing one has had nothing added."""

    def __init__(self, params: Params, wanted: Sequence[bool]) -> None:
        self.params, self.wanted = params, wanted
        self.of: dict[int, Tensor] = {}

    @property
    def lowest(self) -> int:
        """The lowest layer of which one is wanted: the depth if none is."""
        found = [i // 2 for i, want in enumerate(self.wanted) if want]
        return min(found, default=len(self.params) // 2)

    def begun(self, place: int) -> Tensor | None:
        """The sum of a wanted one, uninitialised if nothing was added yet."""
        p = self.params[place]
        if not self.wanted[place] or p is None:
            return None
        if place not in self.of:
            self.of[place] = torch.empty_like(p, memory_format=torch.contiguous_format)
        return self.of[place]

    def result(self) -> list[Tensor | None]:
        """None where not wanted, zeros where nothing was added."""
        found: list[Tensor | None] = []
        for place, (p, wanted) in enumerate(zip(self.params, self.wanted, strict=True)):
            d = self.of.get(place)
            if d is None and wanted and p is not None:
                d = torch.zeros_like(p, memory_format=torch.contiguous_format)
            found.append(d)
        return found


class Sums:
    """Partial sums of some gradients, one slice (S, SIZE) for each part of the rows, for kernels to
    fill and one launch to add up, some ``at_once``: a fixed order, and one rounding. That number
    is of the kernel, and must not follow the rows."""

    def __init__(
        self, grads: Gradients, places: Sequence[int], slices: int, at_once: int, x: Tensor
    ) -> None:
        self.grads, self.slices, self.at_once = grads, slices, at_once
        self.places = [place for place in places if grads.wanted[place]]
        self.offsets = [0]
        for place in self.places:
            p = grads.params[place]
            assert p is not None
            self.offsets.append(self.offsets[-1] + p.numel())
        self.partials = x.new_empty(slices, self.offsets[-1], dtype=accumulate_dtype(x.dtype))

    def part(self, place: int) -> Tensor | None:
        """The slices of one (S, its numbers), None if it is none of them."""
        if place not in self.places:
            return None
        i = self.places.index(place)
        return self.partials[:, self.offsets[i] : self.offsets[i + 1]]

    def add_up(self, add: bool) -> None:
        """Into the gradients: ``add`` to what they are, or as what they begin with."""
        if not self.places:
            return
        block = min(256, 2048 // self.at_once)
        launch(
            reduce_gradients, (-(-self.offsets[-1] // block),), self.partials, self.partials,
            tuple(self.grads.begun(place) for place in self.places), self.slices,
            OFFSETS=tuple(self.offsets), ADD=add, BLOCK=block, SLICES=self.at_once,
        )  # fmt: skip
