"""An honest word on where a network stands: a penalty proves nothing, this report counts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .api import value_and_jacobian
from .arguments import Direction, check_direction, check_inputs
from .network import ending
from .problem import direction_table
from .sampling import sample_points

__all__ = ["Audit", "audit"]

# Rows and slopes held at a time, which bounds the memory of an audit whatever N, D and k.
ROWS_AT_A_TIME, SLOPES_AT_A_TIME = 1 << 14, 1 << 22
LINES = 40


@dataclass(frozen=True)
class Audit:
    """Violations of the wanted direction on N rows, for every output d and column c.

    A slope counts in its direction (``direction · ∂y/∂x2``): a negative one is a violation, as is
    one below the margin or a NaN. Entries of direction 0 are NaN in the tables and never count.

    Attributes:
        rows: N.
        direction: the signs (D, k).
        rate: the share of violating rows (D, k), in 0 to 1.
        worst_slope: the lowest slope in its direction (D, k), units of y per unit of x2.
        worst_row: its row (D, k), an index into the flattened leading shape; -1 where none is.
        worst_point: the inputs there, cat[x1, x2] (D, k, d).
        sampled: the same on points sampled away from the data, where they were asked for.
    """

    rows: int
    direction: Tensor
    rate: Tensor
    worst_slope: Tensor
    worst_row: Tensor
    worst_point: Tensor
    sampled: Audit | None = None

    @property
    def violation_rate(self) -> float:
        """The share of violating entries among all constrained ones."""
        return self.rate[self.direction != 0].mean().item()

    @property
    def worst(self) -> float:
        """The lowest slope in its direction over all constrained entries."""
        worst = self.worst_slope[self.direction != 0]
        return worst.min().item() if worst.numel() else float("nan")

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and nested lists (D, k); None for entries of direction 0."""

        def constrained(table: Tensor) -> list[list[Any]]:
            pairs = zip(table.tolist(), self.direction.tolist(), strict=True)
            return [[v if s else None for v, s in zip(*pair, strict=True)] for pair in pairs]

        return {
            "rows": self.rows,
            "violation_rate": self.violation_rate,
            "worst": self.worst,
            "direction": self.direction.int().tolist(),
            "rate": constrained(self.rate),
            "worst_slope": constrained(self.worst_slope),
            "worst_row": constrained(self.worst_row),
            "worst_point": constrained(self.worst_point),
            "sampled": None if self.sampled is None else self.sampled.to_dict(),
        }

    def __str__(self) -> str:
        text = self._table("rows")
        return (
            text if self.sampled is None else f"{text}\n\n{self.sampled._table('sampled points')}"
        )

    def _table(self, what: str) -> str:
        lines = [
            f"{self.rows} {what}: {self.violation_rate:.2%} of the constrained slopes violate, "
            f"worst slope {self.worst:.4g}",
            f"{'output':>6} {'column':>6} {'sign':>4} {'violating':>9} {'worst slope':>11} "
            f"{'row':>8} {'x2 there':>9}",
        ]
        k = self.direction.shape[1]
        entries = (self.direction != 0).nonzero().tolist()
        for d, c in entries[:LINES]:
            at = self.worst_point[d, c, c - k].item()
            lines.append(
                f"{d:>6} {c:>6} {int(self.direction[d, c]):>+4} {self.rate[d, c].item():>9.2%} "
                f"{self.worst_slope[d, c].item():>11.4g} {int(self.worst_row[d, c]):>8} {at:>9.4g}"
            )
        if len(entries) > LINES:
            lines.append(f"... and {len(entries) - LINES} more constraints")
        return "\n".join(lines)


@torch.no_grad()
def audit(
    mlp: nn.Module,
    x1: Tensor,
    x2: Tensor,
    *,
    direction: Any = 1,
    margin: float = 0.0,
    sample: int = 0,
    strategy: str = "uniform",
    generator: torch.Generator | None = None,
) -> Audit:
    """Measures violations on the given rows, with the network in evaluation mode.

    Args:
        mlp, x1, x2, direction, margin: as for ``fused_mono_penalty``.
        sample: also measure on this many points away from the data, drawn as
            ``sample_points`` does by ``strategy`` and ``generator``; they are in
            the report's ``.sampled``.

    Returns:
        An ``Audit``; print it for a table.
    """
    inputs = check_inputs(x1, x2)
    signs = check_direction(direction, inputs.k)
    x = inputs.joined().reshape(-1, inputs.d)
    with evaluating(mlp):
        sampled = None
        if sample:
            points = sample_points(x, sample, strategy, generator=generator)
            sampled = _measure(mlp, points, inputs.k, signs, margin, None)
        return _measure(mlp, x, inputs.k, signs, margin, sampled)


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
    mlp: nn.Module, x: Tensor, k: int, signs: Direction
) -> Iterator[tuple[Tensor, Tensor]]:
    """direction · ∂y/∂x2 (n, D, k) of one block of the rows x (N, d) after the other, at least one
    block, and the signs (D, k)."""
    start, size = 0, 256
    while start < max(x.shape[0], 1):
        rows = x[start : start + size]
        _, J = value_and_jacobian(mlp, rows[:, : x.shape[1] - k], rows[:, x.shape[1] - k :])
        D = J.shape[-2]
        table = direction_table(signs.for_network(D), D, k, J.dtype, J.device)
        yield table * J, table
        start += size
        size = min(ROWS_AT_A_TIME, max(1, SLOPES_AT_A_TIME // (D * k)))


def _measure(
    mlp: nn.Module, x: Tensor, k: int, signs: Direction, margin: float, sampled: Audit | None
) -> Audit:
    N, start = x.shape[0], 0
    counts, worst, where = [], [], []
    for slope, table in slopes_in_direction(mlp, x, k, signs):
        free = table == 0
        counts.append((~(slope >= margin)).sum(0))
        if N:
            low, row = slope.min(0)  # NaN is the lowest of all
            worst.append(low)
            where.append(row + start)
            start += slope.shape[0]
    if N:
        low, block = torch.stack(worst).min(0)
        row = torch.stack(where).gather(0, block.unsqueeze(0)).squeeze(0)
        rate = torch.stack(counts).sum(0).to(table.dtype) / N
        point = x[row].masked_fill(free.unsqueeze(-1), torch.nan)
    else:
        low = rate = torch.full_like(table, torch.nan)
        row = torch.full_like(table, -1, dtype=torch.int64)
        point = low.unsqueeze(-1).expand(*low.shape, x.shape[1])
    return Audit(
        rows=N,
        direction=table.cpu(),
        rate=rate.masked_fill(free, torch.nan).cpu(),
        worst_slope=low.masked_fill(free, torch.nan).cpu(),
        worst_row=row.masked_fill(free, -1).cpu(),
        worst_point=point.cpu(),
        sampled=sampled,
    )
