"""Points to penalise on: a network that is monotone on its data alone may be anything between."""

from __future__ import annotations

import torch
from torch import Tensor

from .arguments import check_choice, check_count, check_number

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
    rows, box = _check(x, n, strategy, bounds, noise)
    N, d = rows.shape

    def pick() -> Tensor:
        return rows[torch.randint(N, (n,), generator=generator, device=x.device)]

    def share(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, device=x.device, dtype=x.dtype)

    if strategy == "data":
        return pick()
    if strategy == "mixup":
        return torch.lerp(pick(), pick(), share(n, 1))
    if strategy == "uniform":
        low, high = box or (rows.amin(0), rows.amax(0))
        return torch.lerp(low.expand(n, d), high.expand(n, d), share(n, d))
    jitter = torch.randn(n, d, generator=generator, device=x.device, dtype=x.dtype)
    points = pick() + jitter * noise * rows.std(0, correction=0)
    return points if box is None else points.clamp(*box)


def _check(
    x: Tensor, n: int, strategy: str, bounds: Bounds | None, noise: float
) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """x as rows (N, d), and the bounds as a box ((d,), (d,)) if there are any."""
    if not isinstance(x, Tensor) or not x.dtype.is_floating_point:
        came = str(x.dtype) if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"x: expected a floating-point tensor, got {came.removeprefix('torch.')}")
    if x.dim() < 2:
        raise ValueError(f"x: expected shape (..., d) with rows, got {tuple(x.shape)}")
    check_count("n", n)
    check_choice("strategy", strategy, STRATEGIES)
    check_number("noise", noise)
    if not noise >= 0:
        raise ValueError(f"noise: expected a standard deviation >= 0, got {noise}")
    d = x.shape[-1]
    if d == 0:
        raise ValueError(f"x: expected at least one column, got shape {tuple(x.shape)}")
    box = None if bounds is None else _box(bounds, x)
    rows = x.detach().reshape(-1, d)
    if n and not rows.shape[0] and (bounds is None or strategy != "uniform"):
        raise ValueError(f"x: expected at least one row for strategy {strategy!r}, got none")
    return rows, box


def _box(bounds: Bounds, x: Tensor) -> tuple[Tensor, Tensor]:
    """Both bounds as (d,)."""
    d, box = x.shape[-1], []
    if not isinstance(bounds, (tuple, list)) or len(bounds) != 2:
        raise TypeError(f"bounds: expected (low, high), got {bounds!r}")
    for b in bounds:
        try:
            box.append(torch.as_tensor(b, dtype=x.dtype, device=x.device).expand(d))
        except (TypeError, ValueError, RuntimeError):
            came = tuple(b.shape) if isinstance(b, Tensor) else repr(b)
            raise ValueError(f"bounds: expected numbers or shape ({d},), got {came}") from None
    low, high = box
    if not x.is_meta and not (low <= high).all():
        raise ValueError("bounds: expected low <= high in every column")
    return low, high
