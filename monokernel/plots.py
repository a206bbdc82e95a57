"""What an audit counts, as a picture (needs matplotlib, which nothing else here does)."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from .arguments import (
    check_constraints,
    check_count,
    check_inputs,
    check_outputs,
    check_scaler,
    check_tables,
)
from .audit import audit, slopes_in_direction, without_nan
from .probing import evaluating
from .sampling import sample_points

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["plot_audit"]

BAD, GOOD, UNKNOWN = "#c0392b", "#2c6e9b", "#7f7f7f"
BINS = 50
CURVE_POINTS = 121


@torch.no_grad()
def plot_audit(
    mlp: nn.Module,
    x1: Any,
    x2: Any = None,
    *,
    direction: Any = 1,
    margin: Any = 0.0,
    sample: int = 0,
    strategy: str = "uniform",
    generator: torch.Generator | None = None,
    most: int = 4,
    curves: int = 5,
    outputs: Sequence[str] | None = None,
    columns: Any = None,
    x_scaler: Any = None,
    y_scaler: Any = None,
) -> Figure:
    """The constraints that violate most, each with the distribution of its slopes and the response
    curves through its worst points. Where the derivative says nothing (``Audit.blind``) there are
    response curves alone, and they come first. Above all stands what makes the counts doubtful
    (``Audit.doubts``).

    Args:
        mlp, x1, x2, direction, margin, sample, strategy, generator: as for
            ``audit``.
        most: how many constraints.
        curves: how many of the worst points: y over the column there, all other inputs held.
        columns: as for ``audit``; names that are shown instead of numbers.
        outputs: likewise the D names of the outputs.
        x_scaler, y_scaler: as for ``audit``: the axes are in the units before them.

    Returns:
        A matplotlib figure, to show or save.
    """
    from matplotlib.figure import Figure

    check_count("most", most, 1, "constraints")
    check_count("curves", curves, 1, "curves")
    x1, x2, columns, every = check_tables(mlp, x1, x2, columns)
    inputs, signs, margins, named = check_constraints(
        check_inputs(x1, x2), direction, columns, margin
    )
    x = inputs.joined().reshape(-1, inputs.d)
    report = audit(mlp, x1, x2, direction=direction, columns=columns, margin=margin)
    whole = without_nan(x)
    points = sample_points(whole, sample, strategy, generator=generator) if sample else None
    hidden = report.blind  # where slopes on the points say nothing
    if points is not None:
        parts = points.split([t.shape[-1] for t in inputs.blocks], -1)
        hidden = audit(mlp, *parts, direction=direction, columns=columns, steps=0).blind
    (D, k), label = report.direction.shape, "x" if x2 is None else "x2"
    outputs = None if outputs is None else check_outputs(outputs, D)
    xs = _units("x_scaler", x_scaler, inputs.d, every)
    ys = _units("y_scaler", y_scaler, D, outputs)
    chosen = report.entries()[:most]
    if not chosen or not len(whole):
        raise ValueError(
            "plot_audit: expected at least one row without NaN and one constrained slope, got none"
        )

    def slopes(rows: Tensor, d: int, c: int) -> Tensor:
        blocks = slopes_in_direction(mlp, rows, inputs.columns, signs)
        return torch.cat([slope[:, d, c] for slope, _ in blocks]).float().cpu()

    figure = Figure(figsize=(9, 2.7 * len(chosen)), layout="constrained")
    axes = figure.subplots(len(chosen), 2, squeeze=False)
    if report.doubts:
        figure.suptitle("\n".join(textwrap.wrap(report.doubts[0], 100)), fontsize=9, color=BAD)
    with evaluating(mlp):
        for (left, right), (d, c) in zip(axes, chosen, strict=True):
            sign = int(report.direction[d, c])
            output = outputs[d] if outputs else f"output {d}"
            column = str(named[c]) if named else f"{label}[{report.labels[c]}]"
            s, limit = slopes(x, d, c), margin_at(margins, d, k, c)
            blind, column_of_x = bool(report.blind[d, c]), report.columns[c]
            away = None if points is None or hidden[d, c] else slopes(points, d, c)
            units = _Axes(*xs[column_of_x], *ys[d])
            _distribution(left, None if blind else s, away, limit, units)
            must = "rise" if sign > 0 else "fall"
            share = f"{report.rate[d, c].item():.1%} of rows violate"
            if blind:
                share = "unknown: its derivative says nothing"
            elif hidden[d, c]:
                share += ", unknown on sampled points"
            if report.steps is not None and not report.steps.rate[d, c].isnan():
                share += f"; {report.steps.rate[d, c].item():.1%} fall along it"
            left.set_title(f"{output} must {must} with {column}\n{share}", loc="left", fontsize=10)
            limits = None if blind else limit
            _responses(right, mlp, x, s, d, column_of_x, limits, curves, units)
            which = "some" if blind else "the worst"
            right.set_title(f"{output} through {which} rows", loc="left", fontsize=10)
            right.set_xlabel(column)
    return figure


class _Axes(NamedTuple):
    """What makes a column's and an output's own units of the network's."""

    x_mean: float
    x_scale: float
    y_mean: float
    y_scale: float


def _units(name: str, scaler: Any, n: int, names: Any) -> list[tuple[float, float]]:
    """The mean and the scale of each of n columns."""
    found = check_scaler(name, scaler, n, names)
    return [(0.0, 1.0)] * n if found is None else list(zip(*found, strict=True))


def margin_at(margins: float | tuple[float, ...], d: int, k: int, c: int) -> float:
    """That of output d and column c of k."""
    if not isinstance(margins, tuple):
        return margins
    return margins[d * k + c if len(margins) > k else c]


def _distribution(
    axis: Axes, slopes: Tensor | None, away: Tensor | None, margin: float, units: _Axes
) -> None:
    """Histogram of the slopes in their direction, what violates in red; sampled points outlined."""
    steep = units.y_scale / units.x_scale
    margin *= steep
    both = [(steep * s[s.isfinite()], s is away) for s in (slopes, away) if s is not None]
    ends = torch.cat([torch.tensor([margin]), *(s for s, _ in both)])
    low, high = ends.min().item(), ends.max().item()
    if low == high:
        low, high = low - 0.5, high + 0.5
    edges = torch.linspace(low, high, BINS + 1)
    for s, sampled in both:
        if not s.numel():
            continue
        share = torch.histc(s, BINS, low, high) / s.numel()
        if sampled:
            axis.stairs(share.numpy(), edges.numpy(), color="black", label="sampled points")
            axis.legend(frameon=False)
            continue
        colors = [BAD if m < margin else GOOD for m in ((edges[1:] + edges[:-1]) / 2).tolist()]
        axis.bar(edges[:-1].numpy(), share.numpy(), (high - low) / BINS, align="edge", color=colors)
    axis.axvline(margin, color="black", linewidth=0.8, linestyle=":")
    axis.set_xlabel("slope in its direction")
    axis.set_yticks([])
    _bare(axis)


def _responses(
    axis: Axes,
    mlp: nn.Module,
    x: Tensor,
    slopes: Tensor,
    d: int,
    column: int,
    margin: float | None,
    curves: int,
    units: _Axes,
) -> None:
    """y[d] over the data's range of one column of x, through the rows with the lowest slopes, each
    marked with a dot: red where the row violates, grey where without a margin nothing is known of
    that."""
    order = slopes.nan_to_num(-torch.inf).argsort()[:curves]
    worst = x[order.to(x.device)]
    grid = torch.linspace(0, 1, CURVE_POINTS, dtype=x.dtype, device=x.device)
    values = x[:, column]
    values = values[values.isfinite()]
    grid = torch.lerp(values.min(), values.max(), grid)
    sweep = worst.unsqueeze(1).repeat(1, CURVE_POINTS, 1)
    sweep[..., column] = grid

    def response(rows: Tensor) -> Tensor:
        y: Tensor = mlp(rows.reshape(-1, x.shape[1]))
        y = y.reshape(rows.shape[0], -1, y.shape[-1] if y.dim() > 1 else 1)[..., d]
        return y.float().cpu() * units.y_scale + units.y_mean

    def own(t: Tensor) -> Tensor:
        return t.float().cpu() * units.x_scale + units.x_mean

    lines, dots = response(sweep), response(worst.unsqueeze(1))
    for i in range(len(order)):
        color = UNKNOWN
        if margin is not None:
            color = GOOD if slopes[order[i]] >= margin else BAD
        axis.plot(own(grid).numpy(), lines[i].numpy(), color=color, linewidth=1.2)
        at = own(worst[i, column]).item()
        axis.plot([at], [dots[i, 0].item()], "o", color=color, markersize=4)
    _bare(axis)


def _bare(axis: Axes) -> None:
    axis.spines[["top", "right"]].set_visible(False)
