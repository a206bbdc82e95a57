"""Points to penalise on: a network that is monotone on its data alone may be anything between."""

from __future__ import annotations

import torch
from torch import Tensor

from .arguments import check_choice

__all__ = ["STRATEGIES", "sample_points"]

STRATEGIES = ("data", "uniform", "mixup", "noise")

Bounds = tuple[Tensor | float, Tensor | float]


@torch.no_grad()
def sample_points(
    x: Tensor,
    n: int,
    strategy: str = "uniform",
    *,
    bounds: Bounds | None = None,
    noise: float = 0.1,
    generator: torch.Generator | None = None,
) -> Tensor:
    """n points drawn from, between or around the rows of x, for a penalty away from the data.

    Sample the joined inputs, so that free and monotone ones belong together, and split the points:
    ``x1, x2 = sample_points(torch.cat([x1, x2], -1), 256).split([d1, k], -1)``.

    Args:
        x: data (..., d), floating point; leading dimensions are rows.
        n: how many points.
        strategy: "uniform" in the box of the data's range (or of ``bounds``); "data", rows as they
            are, drawn with replacement; "mixup", a uniform point on the segment between two rows;
            "noise", rows plus Gaussian noise.
        bounds: (low, high), each a number or (d,): the box of "uniform" instead of the data's
            range, and what points of "noise" are clamped to.
        noise: for "noise", its standard deviation in standard deviations of each column.
        generator: on the device of x, for reproducible points.

    Returns:
        Points (n, d) of the dtype and on the device of x, without a gradient.
    """
    rows = _check(x, n, strategy, bounds, noise)
    N, d = rows.shape

    def pick() -> Tensor:
        return rows[torch.randint(N, (n,), generator=generator, device=x.device)]

    def share(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, device=x.device, dtype=x.dtype)

    if strategy == "data":
        return pick()
    if strategy == "mixup":
        return torch.lerp(pick(), pick(), share(n, 1))
    box = (
        None
        if bounds is None
        else tuple(torch.as_tensor(b, dtype=x.dtype, device=x.device).expand(d) for b in bounds)
    )
    if strategy == "uniform":
        low, high = box or (rows.amin(0), rows.amax(0))
        return torch.lerp(low.expand(n, d), high.expand(n, d), share(n, d))
    jitter = torch.randn(n, d, generator=generator, device=x.device, dtype=x.dtype)
    points = pick() + jitter * noise * rows.std(0, correction=0)
    return points if box is None else points.clamp(*box)


def _check(x: Tensor, n: int, strategy: str, bounds: Bounds | None, noise: float) -> Tensor:
    """x as rows (N, d)."""
    if not isinstance(x, Tensor) or not x.dtype.is_floating_point:
        came = str(x.dtype) if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"x: expected a floating-point tensor, got {came.removeprefix('torch.')}")
    if x.dim() < 2:
        raise ValueError(f"x: expected shape (..., d) with rows, got {tuple(x.shape)}")
    if isinstance(n, bool) or not isinstance(n, int) or n < 0:
        raise ValueError(f"n: expected a number of points >= 0, got {n!r}")
    check_choice("strategy", strategy, STRATEGIES)
    if noise < 0:
        raise ValueError(f"noise: expected a standard deviation >= 0, got {noise}")
    d = x.shape[-1]
    for b in bounds or ():
        if isinstance(b, Tensor) and b.dim() and b.shape != (d,):
            raise ValueError(f"bounds: expected numbers or shape ({d},), got {tuple(b.shape)}")
    if bounds is not None:
        low, high = (torch.as_tensor(b).cpu() for b in bounds)
        if (low > high).any():
            raise ValueError("bounds: expected low <= high in every column")
    rows = x.detach().reshape(-1, d)
    if n and not rows.shape[0] and (bounds is None or strategy != "uniform"):
        raise ValueError(f"x: expected at least one row for strategy {strategy!r}, got none")
    return rows
