"""An honest word on where a network stands: a penalty proves nothing, this report counts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import attack as descent
from .api import slopes
from .arguments import (
    Direction,
    check_constraints,
    check_count,
    check_flag,
    check_inputs,
    check_table,
)
from .backends import general
from .columns import Columns
from .layers import layers_of
from .network import ending, unwrap
from .planning import choose
from .problem import direction_table
from .sampling import sample_points

__all__ = ["Audit", "audit"]

# Rows and slopes held at a time, which bounds the memory of an audit whatever N, D and k.
ROWS_AT_A_TIME, SLOPES_AT_A_TIME = 1 << 14, 1 << 22
LINES = 40
# In so many rows a column whose slopes are all 0 is moved, over twice so many values.
PROBED_ROWS, PROBED_VALUES = 256, 9
# Descents of an attack, from rows and as many from elsewhere, for each constraint and altogether.
STARTS, MOST_STARTS = 48, 1024


@dataclass(frozen=True)
class Audit:
    """Violations of the wanted direction on N rows, for every output d and column c.

    A slope counts in its direction (``direction · ∂y/∂x2``): a negative one is a violation, as is
    one below the margin or a NaN. Entries of direction 0 are NaN in the tables and never count.

    A slope of 0 is an all-clear only if the derivative tells of y at all. An entry is ``blind``
    where it does not: 0 in every row (or absent), while y changes with the column. Rise and fall
    are unknown there: its entries are NaN, and so are ``violation_rate`` and ``worst``.

    Attributes:
        rows: N.
        direction: the signs (D, k).
        rate: the share of violating rows (D, k), in 0 to 1.
        worst_slope: the lowest slope in its direction (D, k), units of y per unit of x2.
        worst_row: its row (D, k), an index into the flattened leading shape; -1 where none is.
        worst_point: the inputs there, cat[x1, x2] (D, k, d).
        blind: where the derivative says nothing (D, k).
        sampled: the same on points sampled away from the data, where they were asked for.
        attacked: the same on the points at which an attack ended, where it was asked for: one for
            each start and constraint, so that its rates are no shares of any data.
        columns: the columns of x that the k are.
        labels: what the report calls them: their names where they have any, else their numbers,
            among the columns of x2 or of x.
        nan_row: the first row with a NaN among its inputs, -1 where none has.
        nan_rows: how many have one.
    """

    rows: int
    direction: Tensor
    rate: Tensor
    worst_slope: Tensor
    worst_row: Tensor
    worst_point: Tensor
    blind: Tensor
    sampled: Audit | None = None
    attacked: Audit | None = None
    columns: Columns = ()
    labels: tuple[Any, ...] = ()
    nan_row: int = -1
    nan_rows: int = 0

    @property
    def violation_rate(self) -> float:
        """The share of violating entries among all constrained ones; NaN where any is blind."""
        return self.rate[self.direction != 0].mean().item()

    @property
    def worst(self) -> float:
        """The lowest slope in its direction, over all constrained entries; NaN where any is
        blind."""
        worst = self.worst_slope[self.direction != 0]
        return worst.min().item() if worst.numel() else float("nan")

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and nested lists (D, k); None for entries that are blind or of direction
        0."""
        known = (self.direction != 0) & ~self.blind

        def constrained(table: Tensor) -> list[list[Any]]:
            pairs = zip(table.tolist(), known.tolist(), strict=True)
            return [[v if s else None for v, s in zip(*pair, strict=True)] for pair in pairs]

        return {
            "rows": self.rows,
            "columns": list(self.columns),
            "labels": list(self.labels),
            "nan_row": self.nan_row,
            "nan_rows": self.nan_rows,
            "violation_rate": self.violation_rate,
            "worst": self.worst,
            "direction": self.direction.int().tolist(),
            "rate": constrained(self.rate),
            "worst_slope": constrained(self.worst_slope),
            "worst_row": constrained(self.worst_row),
            "worst_point": constrained(self.worst_point),
            "blind": self.blind.tolist(),
            "sampled": None if self.sampled is None else self.sampled.to_dict(),
            "attacked": None if self.attacked is None else self.attacked.to_dict(),
        }

    def __str__(self) -> str:
        parts = [self._table("rows")]
        if self.sampled is not None:
            parts.append(self.sampled._table("sampled points"))
        if self.attacked is not None:
            seen = min(a.worst for a in (self, self.sampled) if a is not None)
            worse = self.attacked.worst < seen
            parts.append(
                f"The attack found {'a worse slope than' if worse else 'no worse slope than'} any "
                f"above: {self.attacked.worst:.4g}, where {seen:.4g} was the worst\n"
                f"{self.attacked._table('points of the attack')}"
            )
        return "\n\n".join(parts)

    def _table(self, what: str) -> str:
        labels = [str(label) for label in self.labels]
        width = max(6, *map(len, labels))
        lines = [
            *self._summary(what),
            f"{'output':>6} {'column':>{width}} {'sign':>4} {'violating':>9} {'worst slope':>11} "
            f"{'row':>8} {'x there':>9}",
        ]
        entries = (self.direction != 0).nonzero().tolist()
        for d, c in entries[:LINES]:
            entry = f"{d:>6} {labels[c]:>{width}} {int(self.direction[d, c]):>+4} "
            if self.blind[d, c]:
                lines.append(f"{entry}{'unknown':>9} {'unknown':>11}")
                continue
            at = self.worst_point[d, c, self.columns[c]].item()
            lines.append(
                f"{entry}{self.rate[d, c].item():>9.2%} {self.worst_slope[d, c].item():>11.4g} "
                f"{int(self.worst_row[d, c]):>8} {at:>9.4g}"
            )
        if len(entries) > LINES:
            lines.append(f"... and {len(entries) - LINES} more constraints")
        return "\n".join(lines)

    def _summary(self, what: str) -> list[str]:
        blind = [self.labels[c] for c in self.blind.any(0).nonzero().flatten().tolist()]
        known = (self.direction != 0) & ~self.blind
        counted = (
            f"{self.rate[known].mean().item():.2%} of the constrained slopes violate, worst slope "
            f"{self.worst_slope[known].min().item() if known.any() else torch.nan:.4g}"
        )
        bad = []
        if self.nan_rows:
            s = "s" * (self.nan_rows > 1)
            bad = [f"{self.nan_rows} row{s} with NaN among the inputs, first row {self.nan_row}"]
        if not blind:
            return [f"{self.rows} {what}: {counted}", *bad]
        columns = f"column{'s' * (len(blind) > 1)} {', '.join(map(str, blind))}"
        lines = [
            f"{self.rows} {what}: UNKNOWN how many of the constrained slopes violate",
            *bad,
            f"In {columns} the derivative is 0 in every row, yet y changes with the column.",
            f"It says nothing of rise or fall, as behind {general.WITHOUT_DERIVATIVE}.",
        ]
        return [*lines, f"Elsewhere {counted}"] if known.any() else lines


@torch.no_grad()
def audit(
    mlp: nn.Module,
    x1: Any,
    x2: Any = None,
    *,
    direction: Any = 1,
    columns: Any = None,
    margin: Any = 0.0,
    sample: int = 0,
    strategy: str = "uniform",
    generator: torch.Generator | None = None,
    attack: bool = False,
) -> Audit:
    """Measures violations on the given rows, with the network in evaluation mode.

    Args:
        mlp, x1, x2, direction, columns, margin: as for ``fused_mono_penalty``. The inputs may be
            DataFrames, which bring the names of their columns.
        sample: also measure on this many points away from the data, drawn as
            ``sample_points`` does by ``strategy`` and ``generator``; they are in
            the report's ``.sampled``.
        attack: also descend on every constrained slope from rows and points within the range of
            the rows, by gradients where there are any and past the kinks of ReLUs where there are
            none; where that ended is in the report's ``.attacked``.

    Returns:
        An ``Audit``; print it for a table.
    """
    (x1, names), (x2, own) = check_table("x1", x1, mlp), check_table("x2", x2, mlp)
    if columns is None:
        columns = names if x2 is None else own
    inputs = check_inputs(x1, x2)
    inputs, signs, margin, columns = check_constraints(inputs, direction, columns, margin)
    numbers = inputs.columns if x2 is None else tuple(range(inputs.k))
    asked = _Asked(inputs.columns, columns or numbers, signs, margin)
    check_count("sample", sample)
    check_flag("attack", attack)
    x = inputs.joined().reshape(-1, inputs.d)
    with evaluating(mlp):
        sampled = None
        if sample:
            points = sample_points(_without_nan(x), sample, strategy, generator=generator)
            sampled = _measure(mlp, points, asked, None)
        report = _measure(mlp, x, asked, sampled)
        if attack and len(x):
            points = _attacked(mlp, x, report, generator)
            if len(points):
                attacked = _measure(mlp, points, asked, None)
                report = replace(report, attacked=attacked)
        return report


class _Asked(NamedTuple):
    """Of which columns of x what is asked, and what they are called."""

    columns: Columns
    labels: tuple[Any, ...]
    signs: Direction
    margin: float | tuple[float, ...]

    def margins(self, table: Tensor) -> float | Tensor:
        """As they are compared with slopes that have a table (D, k) of signs."""
        if not isinstance(self.margin, tuple):
            return self.margin
        D, k = table.shape
        return direction_table(self.margin, D, k, table.dtype, table.device)


def _attacked(
    mlp: nn.Module, x: Tensor, report: Audit, generator: torch.Generator | None
) -> Tensor:
    """Where descents on every constrained slope end (n, d), within the range of the rows (N, d)."""
    d = x.shape[1]
    outputs, columns = (report.direction != 0).nonzero(as_tuple=True)
    if not len(columns) or report.nan_rows == len(x):
        return x[:0]
    signs = report.direction[outputs, columns].to(x.device, torch.float64)
    outputs, places = outputs.to(x.device), columns.to(x.device)
    columns = torch.tensor(report.columns, device=x.device)[places]
    each = max(1, min(STARTS, MOST_STARTS // len(signs)))
    worst = x[report.worst_row.flatten().clamp(min=0).unique().to(x.device)]
    x = _without_nan(x)
    lower, upper = x.amin(0).double(), x.amax(0).double()
    starts = torch.cat(
        [
            _without_nan(worst),
            _spread(x, each),
            sample_points(x, each, generator=generator),
        ]
    ).double()
    q = torch.arange(len(signs), device=x.device).repeat_interleave(len(starts))
    starts = starts.repeat(len(signs), 1)
    box = lower.expand_as(starts), upper.expand_as(starts)
    chain = layers_of(unwrap(mlp), d)
    if isinstance(chain, str):
        slope, smooth = descent.of_network(_slopes_at(mlp, report.columns), outputs, places, signs)
        steps = descent.STEPS // 2
    else:
        layers = chain[0].to(x.device)
        slope, smooth = descent.of_layers(layers, outputs, columns, signs)
        steps = descent.STEPS
    found = descent.descend(slope, smooth, starts, *box, q, generator, steps)
    return found.x.to(x.dtype)


def _slopes_at(mlp: nn.Module, columns: Columns) -> Callable[[Tensor], Tensor]:
    """∂y/∂x2 (n, D, k) at points (n, d), with a gradient where the network has one."""
    dtype = next((p.dtype for p in mlp.parameters() if p.is_floating_point()), torch.float32)

    def slopes_at(x: Tensor) -> Tensor:
        return _slopes(mlp, x.to(dtype), columns).double()

    return slopes_at


@contextmanager
def evaluating(mlp: nn.Module) -> Iterator[None]:
    """In evaluation mode, and afterwards every part in the mode in which it was."""
    if not isinstance(mlp, nn.Module):
        raise TypeError(f"mlp: expected an nn.Module, got {type(mlp).__name__}")
    training = [m for m in mlp.modules() if m.training]
    try:
        with ending():
            mlp.eval()
        yield
    finally:
        for m in training:
            m.training = True


def slopes_in_direction(
    mlp: nn.Module, x: Tensor, columns: Columns, signs: Direction
) -> Iterator[tuple[Tensor, Tensor]]:
    """direction · ∂y/∂x (n, D, k) in these columns, of one block of the rows x (N, d) after the
    other, at least one block, and the signs (D, k). 0 where there is no derivative: see
    ``Audit.blind``."""
    start, size, k = 0, 256, len(columns)
    while start < max(x.shape[0], 1):
        J = _slopes(mlp, x[start : start + size], columns)
        D = J.shape[-2]
        table = direction_table(signs.for_network(D), D, k, J.dtype, J.device)
        yield table * J, table
        start += size
        size = min(ROWS_AT_A_TIME, max(1, SLOPES_AT_A_TIME // max(1, D * k)))


def _slopes(mlp: nn.Module, x: Tensor, columns: Columns) -> Tensor:
    mlp, inputs = unwrap(mlp), check_inputs(x)._replace(columns=columns)
    route = choose(mlp, inputs, "auto", "auto")
    if route.network is None:
        return general.value_and_jacobian(mlp, inputs, route.transformed, audited=True)[1]
    return slopes(mlp, inputs, route)[1]


def _measure(mlp: nn.Module, x: Tensor, asked: _Asked, sampled: Audit | None) -> Audit:
    N, start = x.shape[0], 0
    counts, worst, where, moving = [], [], [], []
    for slope, table in slopes_in_direction(mlp, x, asked.columns, asked.signs):
        free = table == 0
        counts.append((~(slope >= asked.margins(table))).sum(0))
        moving.append((slope != 0).any(0))
        if N:
            low, row = slope.min(0)  # NaN is the lowest of all
            worst.append(low)
            where.append(row + start)
            start += slope.shape[0]
    blind = torch.zeros_like(free)
    if N:
        low, block = torch.stack(worst).min(0)
        row = torch.stack(where).gather(0, block.unsqueeze(0)).squeeze(0)
        rate = torch.stack(counts).sum(0).to(table.dtype) / N
        point = x[row]
        blind = ~torch.stack(moving).any(0) & ~free
        for c in blind.any(0).nonzero().flatten().tolist():
            blind[:, c] &= _changes(mlp, x, asked.columns[c])
    else:
        low = rate = torch.full_like(table, torch.nan)
        row = torch.full_like(table, -1, dtype=torch.int64)
        point = low.unsqueeze(-1).expand(*low.shape, x.shape[1])
    unknown = free | blind
    bad = x.isnan().any(1).nonzero().flatten().tolist()
    return Audit(
        rows=N,
        direction=table.cpu(),
        rate=rate.masked_fill(unknown, torch.nan).cpu(),
        worst_slope=low.masked_fill(unknown, torch.nan).cpu(),
        worst_row=row.masked_fill(unknown, -1).cpu(),
        worst_point=point.masked_fill(unknown.unsqueeze(-1), torch.nan).cpu(),
        blind=blind.cpu(),
        sampled=sampled,
        columns=asked.columns,
        labels=asked.labels,
        nan_row=bad[0] if bad else -1,
        nan_rows=len(bad),
    )


def _without_nan(x: Tensor) -> Tensor:
    """The rows that have a place in a range."""
    return x[~x.isnan().any(1)]


def _changes(mlp: nn.Module, x: Tensor, column: int) -> Tensor:
    """Whether each output (D,) changes in any row of x (N, d) as one column moves, the others held:
    evenly over its range, and over values that it has in the data. A column of one value, which has
    no range, is moved over what that spans with 0 and 1.
    """
    values = x[:, column]
    values = values[values.isfinite()].unique()
    ends = values if len(values) > 1 else torch.cat([values, values.new_tensor([0, 1])])
    even = torch.linspace(0, 1, PROBED_VALUES, dtype=x.dtype, device=x.device)
    even = torch.lerp(ends.amin(), ends.amax(), even)
    rows = _spread(x, PROBED_ROWS)
    first = changed = None
    for value in torch.cat([even, _spread(values, PROBED_VALUES)]):
        rows = rows.clone()  # the last y may be a view of them
        rows[:, column] = value
        try:
            y = unwrap(mlp)(rows).reshape(len(rows), -1)
        except Exception:  # whatever it is, a network that refuses a value reads it
            return torch.ones((), dtype=torch.bool, device=x.device)
        if first is None or changed is None:
            first, changed = y, torch.zeros_like(y[0], dtype=torch.bool)
        changed |= ((y != first) & ~(y.isnan() & first.isnan())).any(0)
    assert changed is not None
    return changed


def _spread(t: Tensor, most: int) -> Tensor:
    """At most so many entries of t (n, …), first and last among them, as a copy."""
    n = len(t)
    at = torch.linspace(0, max(n - 1, 0), min(n, most), dtype=torch.float64).round().long()
    return t[at.to(t.device)]
