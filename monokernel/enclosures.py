"""What is known of slopes over boxes, and the rounding of float64 that it accounts for."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["SHORT", "TINY", "Slopes", "U", "box", "spread", "γ"]

U = 2.0**-53  # the unit roundoff of float64
# So much of its terms' size a short expression may be off: 8 roundings, and room to spare.
SHORT = 16 * U
TINY = 1e-300  # where products underflow


def γ(n: int) -> float:
    """What a sum of n products may be off by, as a share of the sum of their sizes."""
    return n * U / (1 - n * U)


class Slopes(NamedTuple):
    """Slopes in K columns over each of B boxes as forms: ``centre`` (B, K), ``slant`` and ``bend``
    (B, d, K), the coefficients of ε and of 2ε² - 1 of each column, ε in half-widths of the box from
    its middle, and ``error`` (B, K) for all else; ``lower`` and ``upper`` (B, K), which may be
    closer than those that follow. Without its error the form changes by ``rise`` (B, d, K) at least
    with each ε, 0 where it is not known to rise or to fall. ``blame`` (B, d, K) shares out over the
    columns what makes the bounds wide; no bound rests on it."""

    centre: Tensor
    slant: Tensor
    bend: Tensor
    error: Tensor
    rise: Tensor
    blame: Tensor
    lower: Tensor
    upper: Tensor

    @staticmethod
    def unknown(like: Tensor, K: int) -> Slopes:
        """Of K slopes over as many boxes as ``like`` (B, d)."""
        B, d = like.shape
        end = like.new_full((B, K), torch.inf)
        slant, bend, rise, blame = like.new_zeros(4, B, d, K)
        return Slopes(like.new_zeros(B, K), slant, bend, end, rise, blame, -end, end.clone())

    @staticmethod
    def linear(centre: Tensor, slant: Tensor, error: Tensor, blame: Tensor) -> Slopes:
        """Forms without a bend."""
        r = (slant.abs().sum(1) + error) * (1 + 4 * (slant.shape[1] + 4) * U)
        off = r + 2 * U * (centre.abs() + r)
        bend, rise = torch.zeros_like(slant), slant.abs()
        return Slopes(centre, slant, bend, error, rise, blame, centre - off, centre + off)

    def radius(self) -> Tensor:
        """(B, K); the slope lies within it around the centre."""
        size = self.slant.abs().sum(1) + self.bend.abs().sum(1) + self.error
        return size * (1 + 4 * (self.slant.shape[1] + 2) * U)

    def times(self, sign: Tensor) -> Slopes:
        """Those of which each is multiplied by its sign (K,), 1 or -1."""
        return self._replace(
            centre=sign * self.centre,
            slant=sign * self.slant,
            bend=sign * self.bend,
            lower=torch.where(sign > 0, self.lower, -self.upper),
            upper=torch.where(sign > 0, self.upper, -self.lower),
        )

    def at(self, rows: Tensor) -> Slopes:
        return Slopes(*(t[rows] for t in self))

    def put(self, rows: Tensor, columns: Tensor, part: Slopes) -> None:
        """Takes over the slopes of some boxes in some of the K columns, both by number."""
        for to, of in zip(self, part, strict=True):
            to.movedim(-1, 1)[rows.unsqueeze(1), columns] = of.movedim(-1, 1)


def box(c: Tensor, r: Tensor, moving: Tensor, terms: int) -> tuple[Tensor, Tensor]:
    """x itself, c ± r (B, d): coefficients (B, terms, d), of which the first are one ε for each
    moving column, and what the others were rounded by, (B, d)."""
    g, e = c.new_zeros(len(c), terms, c.shape[1]), r.clone()
    if len(moving):
        g[:, torch.arange(len(moving)), moving] = r[:, moving]
        e[:, moving] = 0
    return g, e


def spread(t: Tensor, moving: Tensor, d: int) -> Tensor:
    """What is known along the moving columns, (B, m, K), along all d, (B, d, K)."""
    if len(moving) == d:
        return t
    return t.new_zeros(len(t), d, t.shape[2]).index_copy_(1, moving, t)
