"""What an audit counts, as a picture (needs matplotlib, which nothing else here does)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .arguments import check_constraints, check_inputs, check_outputs, check_table
from .audit import audit, slopes_in_direction
from .probing import evaluating
from .report import Audit
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
) -> Figure:
    """The constraints that violate most, each with the distribution of its slopes and the response
    curves through its worst points. Where the derivative says nothing (``Audit.blind``) there are
    response curves alone, and they come first.

    Args:
        mlp, x1, x2, direction, margin, sample, strategy, generator: as for
            ``audit``.
        most: how many constraints.
        curves: how many of the worst points: y over the column there, all other inputs held.
        columns: as for ``audit``; names that are shown instead of numbers.
        outputs: likewise the D names of the outputs.

    Returns:
        A matplotlib figure, to show or save.
    """
    from matplotlib.figure import Figure

    (x1, names), (x2, own) = check_table("x1", x1, mlp), check_table("x2", x2, mlp)
    if columns is None:
        columns = names if x2 is None else own
    inputs, signs, margins, named = check_constraints(
        check_inputs(x1, x2), direction, columns, margin
    )
    x = inputs.joined().reshape(-1, inputs.d)
    report = audit(mlp, x1, x2, direction=direction, columns=columns, margin=margin)
    points = sample_points(x, sample, strategy, generator=generator) if sample else None
    hidden = report.blind  # where slopes on the points say nothing
    if points is not None:
        parts = points.split([t.shape[-1] for t in inputs.blocks], -1)
        hidden = audit(mlp, *parts, direction=direction, columns=columns).blind
    (D, k), label = report.direction.shape, "x" if x2 is None else "x2"
    outputs = None if outputs is None else check_outputs(outputs, D)
    chosen = _most_violating(report, most)
    if not chosen or not report.rows:
        raise ValueError(
            "plot_audit: expected at least one row and one constrained slope, got none"
        )

    def slopes(rows: Tensor, d: int, c: int) -> Tensor:
        blocks = slopes_in_direction(mlp, rows, inputs.columns, signs)
        return torch.cat([slope[:, d, c] for slope, _ in blocks]).float().cpu()

    figure = Figure(figsize=(9, 2.7 * len(chosen)), layout="constrained")
    axes = figure.subplots(len(chosen), 2, squeeze=False)
    with evaluating(mlp):
        for (left, right), (d, c) in zip(axes, chosen, strict=True):
            sign = int(report.direction[d, c])
            output = outputs[d] if outputs else f"output {d}"
            column = str(named[c]) if named else f"{label}[{report.labels[c]}]"
            s, limit = slopes(x, d, c), margin_at(margins, d, k, c)
            blind = bool(report.blind[d, c])
            away = None if points is None or hidden[d, c] else slopes(points, d, c)
            _distribution(left, None if blind else s, away, limit)
            must = "rise" if sign > 0 else "fall"
            share = f"{report.rate[d, c].item():.1%} of rows violate"
            if blind:
                share = "unknown: its derivative says nothing"
            elif hidden[d, c]:
                share += ", unknown on sampled points"
            left.set_title(f"{output} must {must} with {column}\n{share}", loc="left", fontsize=10)
            column_of_x = report.columns[c]
            _responses(right, mlp, x, s, d, column_of_x, None if blind else limit, curves)
            which = "some" if blind else "the worst"
            right.set_title(f"{output} through {which} rows", loc="left", fontsize=10)
            right.set_xlabel(column)
    return figure


def margin_at(margins: float | tuple[float, ...], d: int, k: int, c: int) -> float:
    """That of output d and column c of k."""
    if not isinstance(margins, tuple):
        return margins
    return margins[d * k + c if len(margins) > k else c]


def _most_violating(report: Audit, most: int) -> list[tuple[int, int]]:
    """(d, c) of the constrained entries: the blind ones, then by falling rate and rising slope."""
    entries = [(d, c) for d, c in (report.direction != 0).nonzero().tolist()]

    def badness(entry: tuple[int, int]) -> tuple[float, float]:
        if report.blind[entry]:
            return -torch.inf, 0.0
        return -report.rate[entry].item(), report.worst_slope[entry].item()

    return sorted(entries, key=badness)[:most]


def _distribution(axis: Axes, slopes: Tensor | None, away: Tensor | None, margin: float) -> None:
    """Histogram of the slopes in their direction, what violates in red; sampled points outlined."""
    both = [(s[s.isfinite()], s is away) for s in (slopes, away) if s is not None]
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
) -> None:
    """y[d] over the data's range of one column of x, through the rows with the lowest slopes, each
    marked with a dot: red where the row violates, grey where without a margin nothing is known of
    that."""
    order = slopes.nan_to_num(-torch.inf).argsort()[:curves]
    worst = x[order.to(x.device)]
    grid = torch.linspace(0, 1, CURVE_POINTS, dtype=x.dtype, device=x.device)
    grid = torch.lerp(x[:, column].min(), x[:, column].max(), grid)
    sweep = worst.unsqueeze(1).repeat(1, CURVE_POINTS, 1)
    sweep[..., column] = grid

    def response(rows: Tensor) -> Tensor:
        y: Tensor = mlp(rows.reshape(-1, x.shape[1]))
        return y.reshape(rows.shape[0], -1, y.shape[-1] if y.dim() > 1 else 1)[..., d].float().cpu()

    lines, dots = response(sweep), response(worst.unsqueeze(1))
    for i in range(len(order)):
        color = UNKNOWN
        if margin is not None:
            color = GOOD if slopes[order[i]] >= margin else BAD
        axis.plot(grid.float().cpu().numpy(), lines[i].numpy(), color=color, linewidth=1.2)
        at = worst[i, column].float().item()
        axis.plot([at], [dots[i, 0].item()], "o", color=color, markersize=4)
    _bare(axis)


def _bare(axis: Axes) -> None:
    axis.spines[["top", "right"]].set_visible(False)
