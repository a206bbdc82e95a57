"""The backward of a narrow chain: the active pairs' walk, the sums, and what adds them up."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ....problem import Problem, accumulate_dtype
from ... import Params
from ..constants import power_of_two
from ..launch import launch
from ..layered.config import kept_chain
from ..reduce import reduce_gradients
from ..target import processors, register_limit
from ..whole.backward import gradients_like, offsets_of
from ..whole.config import split
from .config import gradients_config, shape_of
from .gradients import narrow_gradients
from .pairs import walk

__all__ = ["gradients"]

# Rows at a time: the pairs take a tensor of as many rows for each of 11 of their values.
MOST = 1 << 18


def gradients(
    problem: Problem,
    gy: Tensor,
    gout: Tensor | None,
    x: Tensor,
    params: Params,
    saved: Sequence[Tensor],
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """None for x, and the gradients of every parameter, None where ``needs`` is false."""
    grads = gradients_like(params, needs)
    wanted = tuple([g is not None for g in grads])
    if not any(wanted):
        return [None, *grads]
    N, x, gy = len(x), x.contiguous(), gy.contiguous()
    P = min(-(-min(N, MOST) // gradients_config(problem).rows), processors(x.device))
    offsets, block = offsets_of(problem), 64
    parts = range(0, N, MOST)
    partials = x.new_empty(len(parts) * P, offsets[-1], dtype=accumulate_dtype(x.dtype))
    for i, begin in enumerate(parts):
        rows = slice(begin, begin + MOST)
        own = gout[rows] if gout is not None and gout.dim() else gout
        _sums(
            problem, gy[rows], own, x[rows], params, [t[rows] for t in saved], wanted,
            partials[i * P : (i + 1) * P],
        )  # fmt: skip
    launch(
        reduce_gradients, (-(-offsets[-1] // block),), x, partials, grads, len(partials),
        OFFSETS=offsets, ADD=False, BLOCK=block, SLICES=32,
    )  # fmt: skip
    return [None, *grads]


def _sums(
    problem: Problem,
    gy: Tensor,
    gout: Tensor | None,
    x: Tensor,
    params: Params,
    saved: Sequence[Tensor],
    wanted: tuple[bool, ...],
    partials: Tensor,
) -> None:
    """Each program's sums over some rows and their active pairs."""
    shape, (ws, bs), config = shape_of(problem, x), split(params), gradients_config(problem)
    a = tuple(saved[: problem.depth - 2]) or None
    chain = tuple(kept_chain(problem, saved)) or None
    pairs = walk(problem, gout, x, ws, bs[0], a, chain, saved, shape)
    launch(
        narrow_gradients, (len(partials),), x, x, ws[0], bs[0], ws[-1], a, chain, gy, *pairs,
        partials, len(x), NEEDS=wanted, OFFSETS=offsets_of(problem), BM=config.rows,
        **shape | {"FAN_TILE": power_of_two(problem.d + 1, 16)}, **register_limit(x.device),
        num_warps=config.warps, num_stages=1,
    )  # fmt: skip
