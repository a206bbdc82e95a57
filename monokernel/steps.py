"""Finite steps: one column moved alone over its range, which is what a tree's user calls monotone.

They ask for no derivative, so that no embedding, rounding or detached input hides a fall from them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .columns import Columns
from .probing import output, rounding, spread

__all__ = ["Steps", "along"]

# Rows that are moved, fewer where many columns would make of them more evaluations than this.
STEPPED_ROWS, EVALUATIONS, LEAST_ROWS = 1024, 1 << 19, 64
ROWS_AT_A_TIME = 1 << 14  # evaluated in one call
# Roundings of the largest |y| that are no fall; half precision rounds in every layer.
FALL_ROUNDINGS, FALL_ROUNDINGS_HALF = 16, 2


@dataclass(frozen=True)
class Steps:
    """Falls of y in the wanted direction as one column moves from its lowest value to its highest,
    all others held: for every output d and column c, over a number of rows.

    A row falls if y is anywhere along the way lower than it was before, by more than rounding
    (16 units in the last place of the largest ``|y|``, 2 in half precision), or is NaN. The values
    that a column takes lie half evenly over its range and half as the data has them: whole numbers
    if all of the data are, those two if there are two. Entries of direction 0 and of columns with
    one value are NaN (-1 in ``worst_row``), as they are where the network refuses the values.

    Attributes:
        rows: how many rows were moved, evenly among those without a NaN: at most 1024, and so many
            that no more than 2^19 are evaluated altogether (but 64).
        values: how many values each column took (k,).
        rate: the share of rows that fall (D, k), in 0 to 1.
        worst_drop: the deepest fall (D, k) from a peak to what follows it, units of y; 0 if none.
        worst_row: its row (D, k), an index into the flattened leading shape; -1 where none falls.
        worst_point: the inputs of that row (D, k, d), before its column is moved.
        drop_from, drop_to: the values of the column at that peak and behind it (D, k).
        evaluations: rows of the network that were evaluated altogether.
        refused: one sentence for each column that the network could not be moved along.
    """

    rows: int
    values: tuple[int, ...]
    rate: Tensor
    worst_drop: Tensor
    worst_row: Tensor
    worst_point: Tensor
    drop_from: Tensor
    drop_to: Tensor
    evaluations: int
    refused: tuple[str, ...] = ()

    @property
    def violation_rate(self) -> float:
        """The share of rows that fall, averaged over the constrained entries that were moved."""
        known = self.rate[~self.rate.isnan()]
        return known.mean().item() if known.numel() else float("nan")

    @property
    def worst(self) -> float:
        """The deepest fall of all; 0 where there is none, NaN where y became NaN."""
        known = self.worst_drop[~self.rate.isnan()]
        return known.max().item() if known.numel() else float("nan")

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and nested lists (D, k)."""
        return {
            "rows": self.rows,
            "values": list(self.values),
            "violation_rate": self.violation_rate,
            "worst": self.worst,
            **{name: getattr(self, name).tolist() for name in (*TABLES, "worst_point")},
            "evaluations": self.evaluations,
            "refused": list(self.refused),
        }


TABLES = "rate", "worst_drop", "worst_row", "drop_from", "drop_to"


class _Found(NamedTuple):
    """Of one column, for every output (D,)."""

    falls: Tensor  # how many rows
    drop: Tensor
    row: Tensor
    high: Tensor  # the column's value at the peak
    low: Tensor


def _nothing(size: Tensor) -> _Found:
    """Of a column that was not moved."""
    nan = torch.full_like(size, torch.nan, dtype=torch.float64)
    return _Found(nan, nan, torch.full_like(nan, -1, dtype=torch.int64), nan, nan)


def along(
    mlp: nn.Module,
    x: Tensor,
    data: Tensor,
    columns: Columns,
    labels: Sequence[Any],
    signs: Tensor,
    most: int,
) -> Steps | None:
    """Moves rows of x (N, d) along each of the columns, over at most so many values in the range of
    the data (M, d); ``signs`` are (D, k). None where there is no row to move."""
    rows_for_all = EVALUATIONS // max(1, most * len(columns))
    movable = (~x.isnan().any(1)).nonzero().flatten()
    at = spread(movable, max(LEAST_ROWS, min(STEPPED_ROWS, rows_for_all)))
    if not len(at) or not len(signs):
        return None
    rows = x[at]
    y = output(mlp, rows)
    size = torch.where(y.isfinite(), y, 0).abs().amax(0)
    evaluations, values, found, refused = len(rows), list[int](), list[_Found](), list[str]()
    for c, label, sign in zip(columns, labels, signs.to(y.device).unbind(1), strict=True):
        seen = spread(_values(data[:, c]), most)
        moved, error = _nothing(size), ""
        for way in (grid(data[:, c], most), seen):
            if len(way) < 2 or not sign.any():
                break
            evaluations += len(rows) * len(way)
            try:
                moved, error = _moved(mlp, rows, c, way, sign, size), ""
                break
            except Exception as raised:  # whatever a network says to a value that it never sees
                error = f"{type(raised).__name__}: {raised}".splitlines()[0]
        values.append(len(way))
        found.append(moved)
        if error:
            refused.append(f"mlp cannot be moved along column {label}: {error}")
    falls, drop, row, high, low = (torch.stack(part, -1).cpu() for part in zip(*found, strict=True))
    free = signs.cpu() == 0
    still = free | (row < 0)
    row = torch.where(still, -1, at.cpu()[row.clamp(min=0)])
    return Steps(
        rows=len(rows),
        values=tuple(values),
        rate=(falls / len(rows)).masked_fill(free, torch.nan),
        worst_drop=drop.masked_fill(free, torch.nan),
        worst_row=row,
        worst_point=x.cpu()[row.clamp(min=0)].masked_fill(still.unsqueeze(-1), torch.nan),
        drop_from=high.masked_fill(still, torch.nan),
        drop_to=low.masked_fill(still, torch.nan),
        evaluations=evaluations,
        refused=tuple(refused),
    )


def grid(column: Tensor, most: int) -> Tensor:
    """At most so many values, ascending, over the range of those in the data (M,)."""
    values = _values(column)
    if len(values) <= 2:
        return values
    even = torch.linspace(0, 1, max(2, most - most // 2), dtype=torch.float64, device=column.device)
    even = torch.lerp(values[0].double(), values[-1].double(), even)
    if (values == values.round()).all():  # a category or a count
        even = even.round()
    found: Tensor = torch.cat([even.to(values.dtype), spread(values, most // 2)]).unique()
    return found


def _values(column: Tensor) -> Tensor:
    values: Tensor = column[column.isfinite()].unique()
    return values


def _moved(
    mlp: nn.Module, rows: Tensor, c: int, values: Tensor, sign: Tensor, size: Tensor
) -> _Found:
    """Of the rows (n, d), each with these values (V,) in column c; ``size`` (D,) is the largest
    |y|."""
    V, parts = len(values), list[_Found]()
    each = max(1, ROWS_AT_A_TIME // V)
    for start in range(0, len(rows), each):
        part = rows[start : start + each]
        swept = part.unsqueeze(1).repeat(1, V, 1)
        swept[..., c] = values
        y = output(mlp, swept.reshape(-1, swept.shape[-1])).reshape(len(part), V, -1)
        half = y.dtype in (torch.float16, torch.bfloat16)
        share = rounding(y.dtype, FALL_ROUNDINGS_HALF if half else FALL_ROUNDINGS)
        largest = torch.where(y.isfinite(), y, 0).abs().amax(1).maximum(size)
        y = y.double() * sign
        peak, peaked = y.cummax(1)
        drop, fell = torch.where(y == peak, 0, peak - y).max(1)  # NaN is the deepest of all
        falls = ~(drop <= share * largest.double())
        drop = torch.where(falls, drop, 0)
        deepest, row = drop.max(0)
        fell = fell.gather(0, row.unsqueeze(0))  # (1, D)
        peaked = peaked.gather(0, row.expand(1, V, -1)).squeeze(0).gather(0, fell).squeeze(0)
        row = torch.where(falls.any(0), row + start, -1)
        ends = values[peaked].double(), values[fell.squeeze(0)].double()
        parts.append(_Found(falls.sum(0).double(), deepest, row, *ends))
    drop, block = torch.stack([p.drop for p in parts]).max(0)
    picked = [torch.stack([p[i] for p in parts]).gather(0, block[None])[0] for i in (2, 3, 4)]
    return _Found(torch.stack([p.falls for p in parts]).sum(0), drop, *picked)
