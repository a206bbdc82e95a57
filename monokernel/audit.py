"""An honest word on where a network stands: a penalty proves nothing, this report counts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .api import value_and_jacobian
from .arguments import Direction, check_direction, check_inputs
from .problem import direction_table

__all__ = ["Audit", "audit"]

ROWS_AT_A_TIME = 16384


@dataclass(frozen=True)
class Audit:
    """Violations of the wanted direction on N rows, for every output d and column c.

    A slope counts in its direction (``direction · ∂y/∂x2``): negative means a violation, as does
    one below the margin or a NaN. Entries of direction 0 are NaN in the tables and never count.

    Attributes:
        rows: N.
        direction: the signs (D, k).
        rate: the share of violating rows (D, k), in 0 to 1.
        worst_slope: the lowest slope in its direction (D, k), units of y per unit of x2.
        worst_row: its row (D, k), an index into the flattened leading shape; -1 where there is none.
    """

    rows: int
    direction: Tensor
    rate: Tensor
    worst_slope: Tensor
    worst_row: Tensor

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
        """Plain numbers and nested lists."""
        return {
            "rows": self.rows,
            "violation_rate": self.violation_rate,
            "worst": self.worst,
            "direction": self.direction.tolist(),
            "rate": self.rate.tolist(),
            "worst_slope": self.worst_slope.tolist(),
            "worst_row": self.worst_row.tolist(),
        }

    def __str__(self) -> str:
        lines = [
            f"{self.rows} rows: {self.violation_rate:.2%} of the constrained slopes violate, "
            f"worst slope {self.worst:.4g}",
            f"{'output':>6} {'column':>6} {'sign':>4} {'violating':>9} {'worst slope':>11} {'row':>8}",
        ]
        for d, c in (self.direction != 0).nonzero().tolist():
            lines.append(
                f"{d:>6} {c:>6} {int(self.direction[d, c]):>+4} {self.rate[d, c].item():>9.2%} "
                f"{self.worst_slope[d, c].item():>11.4g} {int(self.worst_row[d, c]):>8}"
            )
        return "\n".join(lines)


@torch.no_grad()
def audit(
    mlp: nn.Module, x1: Tensor, x2: Tensor, *, direction: Any = 1, margin: float = 0.0
) -> Audit:
    """Measures violations on the given rows, with the network in evaluation mode.

    Args:
        mlp, x1, x2, direction, margin: as for :func:`~monokernel.fused_mono_penalty`.

    Returns:
        An :class:`Audit`; print it for a table.
    """
    inputs = check_inputs(x1, x2)
    signs = check_direction(direction, inputs.k)
    x1 = inputs.x1.reshape(inputs.batch.numel(), -1) if inputs.x1.numel() else inputs.x1
    x1 = x1.reshape(inputs.batch.numel(), inputs.x1.shape[-1])
    x2 = inputs.x2.reshape(inputs.batch.numel(), inputs.k)
    training = [m for m in mlp.modules() if m.training]
    mlp.eval()
    try:
        return _measure(mlp, x1, x2, signs, margin)
    finally:
        for m in training:
            m.training = True


def _measure(mlp: nn.Module, x1: Tensor, x2: Tensor, signs: Direction, margin: float) -> Audit:
    N = x2.shape[0]
    counts, worst, where = [], [], []
    table = None
    for start in range(0, max(N, 1), ROWS_AT_A_TIME):
        rows = slice(start, start + ROWS_AT_A_TIME)
        _, J = value_and_jacobian(mlp, x1[rows], x2[rows])
        D, k = J.shape[-2:]
        table = direction_table(signs.for_network(D), D, k, J.dtype, J.device)
        slope = table * J
        counts.append((~(slope >= margin)).sum(0))
        if N:
            low, row = slope.min(0)  # NaN is the lowest of all
            worst.append(low)
            where.append(row + start)
    assert table is not None
    free = table == 0
    if not N:
        nan, none = torch.full_like(table, torch.nan), torch.full(table.shape, -1)
        return Audit(0, table.cpu(), nan.cpu(), nan.cpu(), none)
    low, block = torch.stack(worst).min(0)
    row = torch.stack(where).gather(0, block.unsqueeze(0)).squeeze(0)
    rate = torch.stack(counts).sum(0).to(table.dtype) / N
    return Audit(
        N,
        table.cpu(),
        rate.masked_fill(free, torch.nan).cpu(),
        low.masked_fill(free, torch.nan).cpu(),
        row.masked_fill(free, -1).cpu(),
    )
