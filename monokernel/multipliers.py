"""A weight for every constraint that finds itself: the primal-dual form of the penalty.

Instead of one λ tuned by hand, "minimise the task loss such that no constraint violates more than
``target``": the network descends on task + Σ λ·violation, each multiplier λ[d, c] >= 0 ascends on
how far its own constraint is above the target, and rests where it is met.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .arguments import check_choice, check_number

__all__ = ["Multipliers"]

MEASURES = ("violation", "rate")


class Multipliers(nn.Module):
    """One multiplier per constraint (D, k), a buffer: saved, loaded and moved with the module.

    ::

        y, v = fused_mono_penalty(mlp, x1, x2, reduction="none", return_output=True)
        loss = task(y) + multipliers(v)
        loss.backward()
        optimizer.step()
        multipliers.update(v)

    Args:
        shape: (D, k), or what broadcasts to it: (k,) shares a multiplier between the outputs.
        target: what each constraint may still violate, in units of ``measure``.
        measure: "rate", the share of violating rows (the network still descends on the violations,
            which have a gradient); or "violation", the mean penalty itself.
        lr: step size of the ascent.
        initial: the value all start from.
        most: no multiplier grows beyond it, which keeps a constraint that cannot be met from
            drowning the task.

    Attributes:
        weight: the multipliers, to be passed as ``weight=`` where the penalty should come reduced.
    """

    weight: Tensor

    def __init__(
        self,
        shape: Sequence[int],
        *,
        target: float = 0.0,
        measure: str = "rate",
        lr: float = 0.1,
        initial: float = 0.0,
        most: float = math.inf,
    ) -> None:
        super().__init__()
        if not isinstance(shape, Sequence) or not all(isinstance(n, int) for n in shape):
            raise TypeError(f"shape: expected (D, k), got {shape!r}")
        check_choice("measure", measure, MEASURES)
        for name, value in (("target", target), ("lr", lr), ("initial", initial), ("most", most)):
            check_number(name, value)
            if not value >= 0:
                raise ValueError(f"{name}: expected a number >= 0, got {value}")
        self.target, self.measure, self.lr, self.most = target, measure, lr, most
        self.register_buffer("weight", torch.full(tuple(shape), float(initial)))

    def forward(self, violations: Tensor) -> Tensor:
        """Σ λ[d, c] · mean over rows of the violations (..., D, k): what joins the task loss."""
        rows = self._rows(violations)
        return (self.weight * rows.sum(0)).sum() / max(rows.shape[0], 1)

    @torch.no_grad()
    def update(self, violations: Tensor) -> Tensor:
        """One ascent step, λ ← max(0, λ + lr·(measured - target)).

        Args:
            violations: unweighted penalties (..., D, k) with ``reduction="none"``.

        Returns:
            What was measured, (D, k). A constraint that measured NaN or infinite (or over no row)
            keeps its multiplier: one step that overflowed must not spoil it for ever.
        """
        rows = self._rows(violations)
        if self.measure == "rate":
            rows = (~(rows <= 0)).to(self.weight.dtype)  # NaN is a violation
        measured = rows.mean(0)
        excess = torch.where(measured.isfinite(), measured - self.target, 0.0)
        # A multiplier that several constraints share ascends on their mean.
        step = excess.to(self.weight.dtype).sum_to_size(self.weight.shape)
        step = step * (self.weight.numel() / max(excess.numel(), 1))
        self.weight.add_(self.lr * step).clamp_(0.0, self.most)
        return measured

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, target={self.target}, measure={self.measure!r}"

    def _rows(self, violations: Tensor) -> Tensor:
        """The violations as (N, D, k)."""
        if not isinstance(violations, Tensor):
            raise TypeError(f"violations: expected a tensor, got {type(violations).__name__}")
        constraints = violations.shape[-2:]
        try:
            fits = torch.broadcast_shapes(self.weight.shape, constraints) == constraints
        except RuntimeError:
            fits = False
        if violations.dim() < 2 or not fits:
            raise ValueError(
                "violations: expected the penalties (..., D, k) of reduction='none' to go with "
                f"multipliers of shape {tuple(self.weight.shape)}, got {tuple(violations.shape)}"
            )
        return violations.reshape(-1, *constraints)
