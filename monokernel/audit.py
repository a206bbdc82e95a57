"""An honest word on where a network stands: a penalty proves nothing, this report counts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import attack as descent
from .again import twice
from .api import slopes
from .arguments import (
    Direction,
    Inputs,
    check_constraints,
    check_count,
    check_flag,
    check_inputs,
    check_outputs,
    check_scaler,
    check_tables,
    check_values,
)
from .backends import general
from .columns import Columns
from .layers import layers_of
from .network import unwrap
from .planning import choose
from .probing import doubts, evaluating, hidden, output, spread, untouched
from .report import Audit
from .sampling import sample_points
from .signs import direction_table
from .steps import Steps, along

__all__ = ["audit"]

# Rows and slopes held at a time, which bounds the memory of an audit whatever N, D and k.
ROWS_AT_A_TIME, SLOPES_AT_A_TIME = 1 << 14, 1 << 22
# Descents of an attack, from rows and as many from elsewhere, for each constraint and altogether.
STARTS, MOST_STARTS = 48, 1024


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
    steps: int = 32,
    outputs: Any = None,
    x_scaler: Any = None,
    y_scaler: Any = None,
) -> Audit:
    """Measures violations on the given rows, with the network in evaluation mode.

    By slopes, and by steps: at most 1024 of the rows are moved along each constrained column, all
    else held. That is at most 1024 · ``steps`` evaluated rows a column, and 2^19 altogether. What
    the network changes of itself, and of random generators, while it is called for its values
    alone is put back. Rows that influence each other, and outputs that are drawn anew in each call,
    are found by calling up to 64 rows together and in halves (``Audit.doubts``).

    Args:
        mlp, x1, x2, direction, columns, margin: as for ``fused_mono_penalty``. The inputs may be
            DataFrames of numbers (x2 also a Series), which bring the names of their columns.
        sample: also measure on this many points away from the data, drawn as
            ``sample_points`` does by ``strategy`` and ``generator``; they are in
            the report's ``.sampled``.
        attack: also descend on every constrained slope from rows and points within the range of
            the rows, by gradients where there are any and past the kinks of ReLUs where there are
            none; where that ended is in the report's ``.attacked``.
        steps: how many values each column takes at most, over its range in the given rows: half
            evenly, half as they are in the data (whole numbers, or two values, if it has no
            others). 0 leaves the steps out.
        outputs: the D names of the outputs, which the report shows instead of numbers.
        x_scaler, y_scaler: what standardised the d inputs and the D outputs, for a report in the
            units before: a pair (mean, scale) of numbers or (d,) and (D,), where the network sees
            ``(own - mean) / scale`` (also by name, as of a pandas Series), or a fitted scaler with
            an ``inverse_transform`` that does the same, as scikit-learn's. ``margin`` stays in the
            units of the network.

    Returns:
        An ``Audit``; print it, or see its ``to_dict``, ``to_frame``, ``to_html``, ``to_csv``.
    """
    x1, x2, columns, every = check_tables(mlp, x1, x2, columns)
    inputs = check_inputs(x1, x2)
    inputs, signs, margin, names = check_constraints(inputs, direction, columns, margin)
    check_count("sample", sample)
    check_flag("attack", attack)
    check_values("steps", steps)
    x = inputs.joined().reshape(-1, inputs.d)
    units = check_scaler("x_scaler", x_scaler, inputs.d, every)
    if sample and len(x) and x.isnan().any(1).all():
        raise ValueError("sample: expected a row of x1 without NaN to draw from, got none")
    asked = _Asked(inputs.columns, names or inputs.numbers, signs, margin, steps, x)
    with evaluating(mlp):
        report = _measure(mlp, x, asked)
        with untouched(mlp, x.device):
            said, mixing = doubts(mlp, x)
        report = replace(report, doubts=said)
        D = len(report.direction)
        called = check_outputs(outputs, D)
        heights = check_scaler("y_scaler", y_scaler, D, outputs)
        sampled = attacked = None
        if sample:
            points = sample_points(without_nan(x), sample, strategy, generator=generator)
            sampled = _measure(mlp, points, asked)
        if attack and len(x):
            points = _attacked(mlp, x, report, generator)
            if len(points):
                attacked = _measure(mlp, points, asked._replace(steps=0))

    def shown(part: Audit) -> Audit:
        part = replace(part, outputs=called, mixing=mixing)
        return part.in_units(units, heights) if units or heights else part

    own, others = shown(report), [part and shown(part) for part in (sampled, attacked)]
    return replace(own, sampled=others[0], attacked=others[1])


class _Asked(NamedTuple):
    """Of which columns of x what is asked, and what they are called."""

    columns: Columns
    labels: tuple[Any, ...]
    signs: Direction
    margin: float | tuple[float, ...]
    steps: int  # values that a column takes
    data: Tensor  # (M, d), over whose range it does

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
    x = without_nan(x)
    lower, upper = x.amin(0).double(), x.amax(0).double()
    starts = torch.cat(
        [
            without_nan(worst),
            spread(x, each),
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


def _falls(mlp: nn.Module, x: Tensor, columns: Columns, flat: Tensor, moved: Steps) -> Tensor:
    """Of the entries (D, k) in which every slope is 0, those where y falls by more than rounding as
    the column moves: in two calls of the one row that fell farthest, which round alike. Of many
    rows, or in a batch of another size, a product may round otherwise, and a norm over few units
    makes much of that."""
    found = flat & (moved.rate > 0).to(flat.device)
    for d, i in found.nonzero().tolist():
        peak, behind = (x[moved.worst_row[d, i]].unsqueeze(0).clone() for _ in range(2))
        peak[:, columns[i]] = moved.drop_from[d, i].to(x.dtype)
        behind[:, columns[i]] = moved.drop_to[d, i].to(x.dtype)
        try:
            found[d, i] = bool((output(mlp, peak)[0, d] != output(mlp, behind)[0, d]).item())
        except Exception:  # a network that wants more rows is taken at its word
            continue
    return found


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
    return twice(_slopes_once, unwrap(mlp), check_inputs(x)._replace(columns=columns))


def _slopes_once(mlp: nn.Module, inputs: Inputs) -> Tensor:
    route = choose(mlp, inputs, "auto", "auto")
    if route.network is None:
        return general.value_and_jacobian(mlp, inputs, route.transformed, audited=True)[1]
    return slopes(mlp, inputs, route)[1]


def _measure(mlp: nn.Module, x: Tensor, asked: _Asked) -> Audit:
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
    blind, flat, moved = torch.zeros_like(free), torch.zeros_like(free), None
    if N:
        low, block = torch.stack(worst).min(0)
        row = torch.stack(where).gather(0, block.unsqueeze(0)).squeeze(0)
        rate = torch.stack(counts).sum(0).to(table.dtype) / N
        point = x[row]
        flat = ~torch.stack(moving).any(0) & ~free
        with untouched(mlp, x.device):
            blind = hidden(mlp, x, flat, asked.columns)
            if asked.steps:
                how = asked.columns, asked.labels, table, asked.steps
                moved = along(mlp, x, asked.data, *how)
            if moved is not None:
                blind |= _falls(mlp, x, asked.columns, flat & ~blind, moved)
        flat &= ~blind
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
        flat=flat.cpu(),
        steps=moved,
        columns=asked.columns,
        labels=asked.labels,
        nan_row=bad[0] if bad else -1,
        nan_rows=len(bad),
    )


def without_nan(x: Tensor) -> Tensor:
    """The rows that have a place in a range."""
    return x[~x.isnan().any(1)]
