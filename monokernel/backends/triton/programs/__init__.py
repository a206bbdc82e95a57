"""The path of programs: any network of nodes that is no chain of layers.

The walk is that of ``handwritten.py``, over all rows: linear nodes are products of PyTorch's
(cuBLAS), with one launch for each node between them (``light.py``), or for several that go together
(``fusion.py``). The active pairs are listed on the device, and what runs for them alone takes their
number from there: products are Triton's (``active``), light nodes the same kernels as for all rows.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from ....nodes import RULES
from ....problem import Problem
from ....program import Node
from ...schedule import saved_like
from .backward import backward
from .config import WIDEST_ROW
from .forward import forward
from .nodes import BY_ROW

__all__ = ["backward", "forward", "refuses", "saved_like"]

SERVED = frozenset(RULES)


def refuses(problem: Problem, x: Tensor) -> str | None:
    """Why this path cannot serve, or None."""
    unknown = {node.kind for node in problem.nodes} - SERVED
    if unknown:
        return f"the kernels do not know {', '.join(sorted(unknown))}"
    for node, width in _rows_held(problem):
        if width > WIDEST_ROW:
            return f"a {node.kind} is {width} wide; the kernels hold rows of up to {WIDEST_ROW}"
    return None


def _rows_held(problem: Problem) -> Iterator[tuple[Node, int]]:
    """Nodes that hold a row in registers, and how wide it is."""
    widths = problem.d, *[node.width for node in problem.nodes]
    for node in problem.nodes:
        if node.kind in BY_ROW or node.kind in ("total", "expand"):
            yield node, max(node.width, widths[node.inputs[0]])
