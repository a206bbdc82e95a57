"""The sums of a program's gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ....problem import accumulate_dtype
from ...schedule import Params
from ..active.config import ProductConfig
from ..reduce import Sums
from ..target import processors
from .operands import Slices, converted, flattened, given

__all__ = ["Gradients"]


FEWEST_ROWS = 32  # of a part of the sums over rows
MOST_SUMS = 1 << 25  # numbers that all parts of the pairs' sums have


class Gradients:
    """The sums of the gradients. Those of rows of parameters, and of the pairs' part of weights,
    are in parts until the end, when a launch adds up all of each."""

    def __init__(self, x: Tensor, params: Params, needs: Sequence[bool]) -> None:
        self.x, self.params, self.wants_dx = x, params, needs[0]
        self.wanted = [n and p is not None for n, p in zip(needs[1:], params, strict=True)]
        self.dx: Tensor | None = None
        self.weights: dict[int, Tensor] = {}
        self.parts = min(-(-len(x) // FEWEST_ROWS), 4 * processors(x.device))
        self.of_rows = Sums(params, self._places(1), self.parts, 32, x)
        self.of_pairs: Sums | None = None
        self.begun: set[int] = set()
        # Of one number that serves nodes of several widths, the parts of each.
        self.numbers: dict[int, list[Tensor]] = {}

    def _places(self, dim: int) -> list[int]:
        """Of the parameters of so many dimensions that want a gradient."""
        wanted = zip(self.params, self.wanted, strict=True)
        return [place for place, (θ, w) in enumerate(wanted) if w and given(θ).dim() == dim]

    def inputs(self, rows: slice, g: Tensor | None, own: bool) -> Tensor:
        """dx of a block of rows, that begins with g (none is zeros): in the memory of g if that is
        no one else's and the block is all rows."""
        whole, dtype = self.x.shape, self.x.dtype
        if g is not None and own and self.dx is None and (g.shape, g.dtype) == (whole, dtype):
            self.dx = g
            return g
        if self.dx is None:
            self.dx = torch.empty_like(self.x)
        dx = self.dx[rows]
        return dx.zero_() if g is None else dx.copy_(g)

    def product(self, place: int, left: Tensor, right: Tensor) -> None:
        """dW += leftᵀ right."""
        held, dtype = self.weights.get(place), given(self.params[place]).dtype
        left, right = (flattened(converted(t, dtype)) for t in (left, right))
        if held is None:
            self.weights[place] = torch.mm(left.t(), right)
        else:
            held.addmm_(left.t(), right)

    def weight(self, place: int, pairs: int, config: ProductConfig) -> tuple[Sums, Slices]:
        """The sums over the pairs, of which there are so many at most, and the part of this dW."""
        if self.of_pairs is None:
            places = self._places(2)
            shapes = [given(self.params[at]).shape for at in places]
            O, I = max(shapes, key=torch.Size.numel)
            parts = config.fitted(I).parts(pairs, (O, I), self.x.device)
            most = MOST_SUMS // sum(shape.numel() for shape in shapes)
            self.of_pairs = Sums(self.params, places, max(1, min(parts, most)), 4, self.x)
        return self.of_pairs, self._slices(self.of_pairs, place)

    def _slices(self, sums: Sums, place: int) -> Slices:
        add = place in self.begun
        self.begun.add(place)
        return Slices(given(sums.part(place)), add)

    def rows(self, place: int | None, H: int) -> Slices | None:
        """The sums over rows of a parameter of H columns, None if it wants none."""
        if place is None or not self.wanted[place]:
            return None
        if given(self.params[place]).numel() != H:
            out = self.x.new_empty(self.parts, H, dtype=accumulate_dtype(self.x.dtype))
            self.numbers.setdefault(place, []).append(out)
            return Slices(out, False)
        return self._slices(self.of_rows, place)

    def result(self) -> list[Tensor | None]:
        """x first: zeros where nothing was added."""
        found: list[Tensor | None] = [self.dx]
        if self.wants_dx and self.dx is None:
            found[0] = torch.zeros_like(self.x)
        self._add_up()
        for place, (θ, wanted) in enumerate(zip(self.params, self.wanted, strict=True)):
            if not wanted or θ is None:
                found.append(None)
                continue
            total = self.weights.get(place)
            numbers = self.numbers.get(place)
            if numbers is not None:
                own = [p.sum().view(1) for p in numbers]
                own += [] if total is None else [total.to(own[0].dtype)]
                total = (own[0] if len(own) == 1 else torch.stack(own).sum(0)).to(θ.dtype)
            found.append(torch.zeros_like(θ) if total is None else total)
        return found

    def _add_up(self) -> None:
        """What was begun of the partial sums."""
        for sums in (self.of_rows, self.of_pairs):
            begun = [] if sums is None else [at for at in sums.places if at in self.begun]
            if sums is None or not begun:
                continue
            add = any(place in self.weights for place in begun)
            for place in begun:
                θ = given(self.params[place])
                if place not in self.weights:
                    self.weights[place] = torch.zeros_like(θ) if add else torch.empty_like(θ)
            own = {place: self.weights[place] for place in begun}
            sums.add_up(own.get, add)
