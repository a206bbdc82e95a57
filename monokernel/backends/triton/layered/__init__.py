"""The path of all other chains: wide networks, and strict float32.

Products over all rows are PyTorch's (cuBLAS), with fused element-wise kernels between them
(``forward.py``, ``backward.py``); products over the active pairs alone are Triton's (``active``),
since only a kernel can take its number of rows from the device. Products per hidden layer, as in
``docs/mathematics.md``: the task's three, the forward's tangents or chains, and what follows v.

Between products every number of rows and units is read or written as few times as it can be: a
bias is in its product, few inputs are multiplied where their layer is needed, sums over rows or
columns (y, the slopes, gradients of biases, of few inputs, of one output) are those of a launch
that reads the operands anyway. docs/triton.md counts the passes.

Node by node (``programs``) a chain would take the same products and twice the launches of the
backward: here what stands between two products of a pair is in their epilogues.
"""

from __future__ import annotations

from torch import Tensor

from ....problem import Problem
from ..active import BLOCK
from .backward import backward
from .config import saved_like
from .forward import forward

__all__ = ["backward", "forward", "refuses", "saved_like"]


def refuses(problem: Problem, x: Tensor) -> str | None:
    """Why the layer-by-layer path cannot serve, or None."""
    pairs = x.shape[0] * (problem.D if problem.mode == "adjoint" else problem.k)
    if pairs >= 2**31 - BLOCK:
        return f"{pairs} row and column pairs; the kernels count to 2^31"
    return None
