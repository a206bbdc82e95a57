"""The sums of a program's gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ....problem import accumulate_dtype
from ...schedule import Params
from ..launch import launch
from ..reduce import reduce_gradients
from ..target import processors
from .operands import Factor, On, Operand, converted, flattened, given, tensor_of

__all__ = ["Gradients"]


FEWEST_ROWS = 32  # of a part of the sums over rows


class Gradients:
    """The sums of the gradients. Those of rows of parameters are parts until the end, when one
    launch adds up all of them."""

    def __init__(self, x: Tensor, params: Params, needs: Sequence[bool]) -> None:
        self.x, self.params, self.wants_dx = x, params, needs[0]
        self.wanted = [n and p is not None for n, p in zip(needs[1:], params, strict=True)]
        self.dx: Tensor | None = None
        self.weights: dict[int, Tensor] = {}
        # Parts (parts, H) of the rows of parameters side by side, and of one number that serves
        # nodes of several widths those of each.
        self.offsets = [0]
        self.places = [
            place
            for place, (θ, wanted) in enumerate(zip(params, self.wanted, strict=True))
            if wanted and given(θ).dim() == 1
        ]
        for place in self.places:
            self.offsets.append(self.offsets[-1] + given(params[place]).numel())
        self.partials: Tensor | None = None
        self.begun: set[int] = set()
        self.numbers: dict[int, list[Tensor]] = {}

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

    def weight(self, place: int) -> tuple[Tensor, bool]:
        """dW to be added to, and whether it is empty yet."""
        held = self.weights.get(place)
        if held is not None:
            return held, False
        self.weights[place] = torch.empty_like(given(self.params[place]))
        return self.weights[place], True

    def rows(self, place: int, on: On, P: Operand, factor: Factor | None = None) -> None:
        """dθ += factor ∘ P summed over the rows."""
        H, i = given(tensor_of(P)).shape[-1], self.places.index(place)
        begin, end = self.offsets[i], self.offsets[i + 1]
        if end - begin != H:
            out = self._parts(H)
            self.numbers.setdefault(place, []).append(out)
            on.sums(out, P, factor, False)
            return
        if self.partials is None:
            self.partials = self._parts(self.offsets[-1])
        on.sums(self.partials[:, begin:end], P, factor, place in self.begun)
        self.begun.add(place)

    def _parts(self, H: int) -> Tensor:
        parts = min(-(-len(self.x) // FEWEST_ROWS), 4 * processors(self.x.device))
        return self.x.new_empty(parts, H, dtype=accumulate_dtype(self.x.dtype))

    def result(self) -> list[Tensor | None]:
        """x first: zeros where nothing was added."""
        found: list[Tensor | None] = [self.dx]
        if self.wants_dx and self.dx is None:
            found[0] = torch.zeros_like(self.x)
        added = self._added_up()
        for place, (θ, wanted) in enumerate(zip(self.params, self.wanted, strict=True)):
            if not wanted or θ is None:
                found.append(None)
                continue
            total = self.weights.get(place, added.get(place))
            numbers = self.numbers.get(place)
            if numbers is not None:
                own = [p.sum().view(1) for p in numbers]
                own += [] if total is None else [total.to(own[0].dtype)]
                total = (own[0] if len(own) == 1 else torch.stack(own).sum(0)).to(θ.dtype)
            found.append(torch.zeros_like(θ) if total is None else total)
        return found

    def _added_up(self) -> dict[int, Tensor]:
        """Of the rows of parameters to which anything was added."""
        if self.partials is None:
            return {}
        found = {place: torch.empty_like(given(self.params[place])) for place in sorted(self.begun)}
        block = 64
        launch(
            reduce_gradients, (-(-self.offsets[-1] // block),), self.x, self.partials,
            tuple(found.get(place) for place in self.places), len(self.partials),
            OFFSETS=tuple(self.offsets), ADD=False, BLOCK=block, SLICES=32,
        )  # fmt: skip
        return found
