"""The path of narrow chains of one output whose weights' gradients no one kernel can hold.

Layer by layer in what is saved (``layered.saved_like``), but with all layers in one kernel: a
launch forward; the active pairs, the sums and their addition backward. Weights lie in shared
memory, tiles of activations in registers. What is asked for more rarely, the inputs' gradient or
the penalty's alone, the backward leaves to ``layered``.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ....problem import Problem
from ... import Params
from .. import layered
from ..layered import saved_like
from ..target import OLD_TRITON, interpreting, products
from .backward import gradients
from .config import COLUMNS, DEEPEST, INPUTS, SERVED, WIDEST, is_padded
from .forward import forward

__all__ = ["backward", "forward", "refuses", "saved_like"]


def refuses(problem: Problem, x: Tensor) -> str | None:
    """Why these kernels do not serve, or None."""
    if not problem.keeps_adjoint or problem.activations[-1].kind != "identity":
        return "more than one linear output in adjoint mode"
    if not 2 <= problem.depth <= DEEPEST or max(problem.widths) > WIDEST:
        return f"not of 2 to {DEEPEST} layers of up to {WIDEST} units"
    if OLD_TRITON and is_padded(problem):
        return f"not of {WIDEST} units in each hidden layer, with which Triton 3.6 spills"
    kinds = {σ.kind for σ in problem.activations[:-1]} - set(SERVED)
    if kinds:
        return f"{' and '.join(sorted(kinds))}, with which a kernel spills"
    if problem.d > INPUTS or problem.k > COLUMNS:
        return f"more than {INPUTS} inputs, or {COLUMNS} constrained columns"
    if products(x.device) != "wgmma" or (x.element_size() > 2 and not interpreting()):
        return "no half precision on a card of Hopper's kind"
    if x.shape[0] >= 2**31 - 2**16:
        return f"N = {x.shape[0]} rows; the kernels count to 2^31"
    return None


def backward(
    problem: Problem,
    gy: Tensor | None,
    gout: Tensor | None,
    x: Tensor,
    params: Params,
    saved: Sequence[Tensor],
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """The gradients of x and of every parameter, None where ``needs`` is false."""
    # Without pairs the sums spill 8 bytes in Triton 3.6.
    if gy is None or needs[0] or not x.shape[0] or (OLD_TRITON and gout is None):
        return layered.backward(problem, gy, gout, x, params, saved, needs)
    return gradients(problem, gy, gout, x, params, saved, needs[1:])
