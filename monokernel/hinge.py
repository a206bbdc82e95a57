"""The hinge on the slopes, in differentiable PyTorch: for the reference and the general path.

The kernels compute the same in their epilogue; ``slope_weights`` is what their backward needs.

The zero rule: a slope that violates nothing has a penalty of 0 and a derivative of 0 whatever its
weight or the gradient from outside, also where IEEE has 0·inf = NaN. A slope that is NaN violates.

The NaN rule: ``nan_rule``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .problem import Hinge
from .signs import direction_table, shared_direction_table

__all__ = ["mean", "nan_rule", "penalties", "slope_cotangent", "slope_weights", "weighted"]


def penalties(J: Tensor, hinge: Hinge, weight: Tensor | None) -> Tensor:
    """w·h(margin - direction·J) for every entry of J (N, D, k); 0 where the direction is 0."""
    direction = direction_table(hinge.direction, J.shape[-2], J.shape[-1], J.dtype, J.device)
    r = torch.relu(_margin(J, hinge) - direction * J)
    if hinge.squared:
        r = r.square()
    if 0 in hinge.direction:
        r = torch.where(direction == 0, 0.0, r)
    return r if weight is None else weighted(r, weight)


def _margin(J: Tensor, hinge: Hinge, table: Any = direction_table) -> float | Tensor:
    """One number, or a table (D, k)."""
    if not isinstance(hinge.margin, tuple):
        return hinge.margin
    margins: Tensor = table(hinge.margin, J.shape[-2], J.shape[-1], J.dtype, J.device)
    return margins


def weighted(penalties: Tensor, weight: Tensor) -> Tensor:
    """Their product by the zero rule, differentiable in both."""
    return torch.where(penalties == 0, 0.0, weight) * penalties


def slope_weights(J: Tensor, hinge: Hinge, weight: Tensor | None) -> tuple[Tensor, Tensor]:
    """The penalties of J (N, D, k) and their derivatives in J, both (N, D, k). Not for autograd."""
    direction = shared_direction_table(hinge.direction, J.shape[-2], J.shape[-1], J.dtype, J.device)
    r = _margin(J, hinge, shared_direction_table) - direction * J
    free = r <= 0 if 0 not in hinge.direction else (r <= 0) | (direction == 0)
    r.masked_fill_(free, 0.0)
    # The derivative at a slope of exactly the margin is 0, and NaN is no violation of r <= 0.
    S = (-2 * direction) * r if hinge.squared else torch.where(free, 0.0, -direction)
    if hinge.squared:
        r = r.square()
    if weight is None:
        return r, S
    weight = torch.where(free, 0.0, weight)
    return weight * r, weight * S


def slope_cotangent(gout: Tensor, S: Tensor) -> Tensor:
    """∂loss/∂J from that of the penalty (a scalar or (N, D, k)) and S of ``slope_weights``."""
    return torch.where(S == 0, 0.0, gout) * S


def mean(total: Tensor, direction: tuple[int, ...], N: int, D: int, k: int) -> Tensor:
    """The total over those of the N·D·k slopes that the direction constrains. Over none it is 0,
    and so is every gradient: a NaN, as ``torch.mean`` has it, would end a training."""
    entries = N * (D * k // len(direction)) * sum(s != 0 for s in direction)
    return total / max(entries, 1)


def nan_rule(y: Tensor, J: Tensor) -> Tensor:
    """Where the output (N, D) is NaN so is its slope (N, D, k): no NaN becomes a zero penalty.

    Without it PyTorch's σ'(NaN) = 1 of ReLU would give a finite slope to a row that has no value.
    """
    return torch.where(y.isnan().unsqueeze(-1), torch.nan, J)
