"""The sums of a program's gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...schedule import Params
from .operands import Factor, On, Operand, converted, flattened, given

__all__ = ["Gradients"]


class Gradients:
    """The sums of the gradients. Those of rows of parameters are parts until the end."""

    def __init__(self, x: Tensor, params: Params, needs: Sequence[bool]) -> None:
        self.x, self.params, self.wants_dx = x, params, needs[0]
        self.wanted = [n and p is not None for n, p in zip(needs[1:], params, strict=True)]
        self.dx: Tensor | None = None
        self.weights: dict[int, Tensor] = {}
        self.parts: dict[int, list[Tensor]] = {}

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
        self.parts.setdefault(place, []).append(on.sums(P, factor))

    def result(self) -> list[Tensor | None]:
        """x first: zeros where nothing was added."""
        found: list[Tensor | None] = [self.dx]
        if self.wants_dx and self.dx is None:
            found[0] = torch.zeros_like(self.x)
        for place, (θ, wanted) in enumerate(zip(self.params, self.wanted, strict=True)):
            if not wanted or θ is None:
                found.append(None)
            elif place in self.weights:
                found.append(self.weights[place])
            elif place in self.parts:
                # One number may serve nodes of several widths.
                parts = [p.sum(0) if p.shape[1] == θ.shape[0] else p.sum().view(1)
                         for p in self._joined(place)]  # fmt: skip
                total = parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)
                found.append(total.to(θ.dtype))
            else:
                found.append(torch.zeros_like(θ))
        return found

    def _joined(self, place: int) -> list[Tensor]:
        parts = self.parts[place]
        alike = len({p.shape[1] for p in parts}) == 1
        return [torch.cat(parts)] if alike and len(parts) > 1 else parts
