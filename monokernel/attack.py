"""Looks for points at which a slope is lowest: what a proof would look for in vain.

Gradient descent on the slope from many starts, each step followed to the corners of its box. A
piecewise linear network's slope has no gradient, since it changes at kinks alone; there the descent
follows that of the slope averaged over a little of each kink's neighbourhood, (σ(a + w) - σ(a - w))
/ 2w with w falling, which knows on which side of what kink the slope is lower. Only true slopes
count. Networks that are no chain are asked for slopes and their gradients; where those are 0
everywhere, steps are random.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .layers import Layers, Straight

__all__ = ["STEPS", "Lowest", "descend", "of_layers", "of_network"]

STEPS = 40
WIDEST, NARROWEST = 0.5, 0.02  # w, in standard deviations of the neuron's arguments

# The slopes (n,) of points (n, d), each of its own constraint (n,), as they are and, as a function
# to descend, smoothed by a share in (0, 1] that falls.
Slope = Callable[[Tensor, Tensor], Tensor]
Smooth = Callable[[Tensor, Tensor, float], Tensor]


class Lowest(NamedTuple):
    """Of every start the lowest slope on its way (n,) and where that was (n, d)."""

    slope: Tensor
    x: Tensor


def descend(
    slope: Slope,
    smooth: Smooth,
    x: Tensor,
    lower: Tensor,
    upper: Tensor,
    q: Tensor,
    generator: torch.Generator | None = None,
    steps: int = STEPS,
    deadline: float = math.inf,
) -> Lowest:
    """Follows every start x (n, d) downhill inside its own box [lower, upper] (n, d).

    Args:
        slope: what is to be low, of points (n, d) and their constraints (n,).
        smooth: the same as a function with a gradient; where that is 0 in every point, steps are
            random.
        x, lower, upper, q: starts, their boxes and their constraints.
        deadline: of ``time.monotonic``; from then on no further step is made.
    """
    best = Lowest(slope(x, q), x)
    width = upper - lower
    for step in range(steps):
        if time.monotonic() > deadline:
            break
        left = 1 - step / steps
        with torch.enable_grad():
            at = x.detach().requires_grad_()
            value = smooth(at, q, WIDEST * (NARROWEST / WIDEST) ** (1 - left))
            g = torch.zeros_like(x)
            if value.requires_grad:
                (g,) = torch.autograd.grad(value.sum(), at, materialize_grads=True)
        g = (g * width).nan_to_num(0.0)
        if not g.any():
            chance = torch.rand(2, *x.shape, generator=generator, dtype=x.dtype, device=x.device)
            by = (chance[0] - 0.5) * (chance[1] < 0.5)
            tried = best.x + by * width * (left**2 + 0.01)
            best = _better(best, slope, tried.clamp(lower, upper), q)
            continue
        size = g.abs().amax(1, keepdim=True)
        unit = torch.where(size > 0, g / size, 0.0)
        x = (x - 0.25 * left * width * unit).clamp(lower, upper)
        best = _better(best, slope, x, q)
        if step % 8 == 0:
            corner = torch.where(g > 0, lower, torch.where(g < 0, upper, x))
            best = _better(best, slope, corner, q)
            # A descent that has lost its way goes on from its best point.
            x = best.x if step % 16 == 8 else x
    return best


def _better(best: Lowest, slope: Slope, x: Tensor, q: Tensor) -> Lowest:
    found = slope(x, q)
    lower = found < best.slope
    return Lowest(torch.where(lower, found, best.slope), torch.where(lower.unsqueeze(1), x, best.x))


def of_layers(
    layers: Layers | Straight, outputs: Tensor, columns: Tensor, signs: Tensor
) -> tuple[Slope, Smooth]:
    """sign·∂y_output/∂x_column of the Q constraints (Q,), as ``descend`` takes them."""
    if isinstance(layers, Straight):
        return of_network(layers.jacobian, outputs, columns, signs)

    def smooth(x: Tensor, q: Tensor, share: float) -> Tensor:
        for offset in layers.offsets:
            x = x + offset
        tangent = layers.W[0].mT[columns[q]]
        last = len(layers.W) - 1
        for l, (W, b, σ) in enumerate(zip(layers.W, layers.b, layers.σ, strict=True)):
            a = torch.addmm(b, x, W.mT)
            if l:
                tangent = tangent @ W.mT
            if share and σ.piecewise_linear and σ.kind != "identity":
                w = share * a.detach().std(0, correction=0).clamp(min=1e-6)
                tangent = tangent * (σ.value(a + w) - σ.value(a - w)) / (2 * w)
            else:
                tangent = tangent * σ.first(a)
            x = σ.value(a) if l < last else a
        return signs[q] * tangent.gather(1, outputs[q].unsqueeze(1)).squeeze(1)

    def slope(x: Tensor, q: Tensor) -> Tensor:
        with torch.no_grad():
            return smooth(x, q, 0.0)

    return slope, smooth


def of_network(
    slopes: Callable[[Tensor], Tensor], outputs: Tensor, columns: Tensor, signs: Tensor
) -> tuple[Slope, Smooth]:
    """The same of any network, by ``slopes`` of points (n, d): (n, D, k). Where no gradient of them
    is to be had, the descent goes by random steps."""

    def smooth(x: Tensor, q: Tensor, share: float) -> Tensor:
        J = slopes(x)
        return signs[q] * J[torch.arange(len(q), device=q.device), outputs[q], columns[q]]

    def slope(x: Tensor, q: Tensor) -> Tensor:
        with torch.no_grad():
            return smooth(x, q, 0.0)

    return slope, smooth
