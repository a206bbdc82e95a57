"""The gradients of a chain's parameters as they are found."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ... import Params
from ..reduce import Sums

__all__ = ["Gradients"]


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

    def sums(self, places: Sequence[int], slices: int, at_once: int, x: Tensor) -> Sums:
        """Partial sums of those that are wanted."""
        return Sums(self.params, [p for p in places if self.wanted[p]], slices, at_once, x)
