"""The path of narrow chains: the whole network in one kernel, forward and backward.

Forward in 1 launch (2 with a summed penalty), backward in 2. Serves chains whose hidden layers and
outputs fit a tile in registers. ``forward.py`` and ``backward.py`` have a kernel each and what
launches it; both are made of the pieces in ``tiles.py``, the backward also of ``passes.py`` and
``sums.py``.
"""

from __future__ import annotations

from torch import Tensor

from ....problem import Problem
from .backward import backward
from .config import DEEPEST, WIDEST, strict
from .forward import forward, saved_like

__all__ = ["backward", "forward", "refuses", "saved_like"]


def refuses(problem: Problem, x: Tensor) -> str | None:
    """Why the network does not fit into one kernel, or None."""
    widest = WIDEST[x.element_size()]
    if max(problem.widths[1:]) > widest:
        return f"a layer is wider than {widest}, what one kernel serves in {x.dtype}"
    if problem.k > 128:
        return f"k = {problem.k} monotone inputs; one kernel serves up to 128"
    if problem.depth > DEEPEST:
        return f"{problem.depth} layers; one kernel serves up to {DEEPEST}"
    if x.shape[0] >= 2**31 - 2**16:
        return f"N = {x.shape[0]} rows; one kernel serves below 2^31"
    if strict(x.dtype):
        return (
            "strict float32 products (torch.get_float32_matmul_precision() is 'highest') leave "
            "no tensor core to a fused network"
        )
    return None
