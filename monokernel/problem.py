"""What one call asks of a backend, as plain data.

A :class:`Problem` holds every static fact of a call (program, mode, hinge), no tensor. Every
backend with a hand-written backward serves the same four functions of it (see
``backends/handwritten.py``, their readable twin). The letters are those of ``docs/mathematics.md``.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import lt
from typing import Literal, NamedTuple

import torch

from .activations import Activation
from .columns import Columns, last_columns
from .nodes import wrong_nodes
from .program import Chain, Node, chain_of, nodes_of

__all__ = [
    "Hinge",
    "Mode",
    "Packed",
    "Problem",
    "accumulate_dtype",
    "chain_problem",
    "cheaper_mode",
    "pack",
    "unpack",
]

Mode = Literal["tangent", "adjoint"]


class Hinge(NamedTuple):
    """The penalty on the slopes J (N, D, k): w·h(margin - direction·J), h = relu or relu².

    ``direction`` is row-major with 1, k or D·k entries in {-1, 0, 1}. Entries of direction 0 never
    count. ``margin`` is one number, or k or D·k of them. With ``elementwise`` the penalty is
    (N, D, k), otherwise its sum, a scalar.
    """

    direction: tuple[int, ...] = (1,)
    margin: float | tuple[float, ...] = 0.0
    squared: bool = False
    elementwise: bool = False


class Problem(NamedTuple):
    """A program over x (N, d) (see ``program.py``), its mode and its hinge.

    The monotone inputs x2 are k ``columns`` of x, in ascending order. With ``hinge`` None the
    second output is the Jacobian J (N, D, k) itself. With ``cast``, the dtype of an autocast, the
    parameters of linear nodes are of that dtype, which they compute in, and all other operands of
    the dtype of x.
    """

    d: int
    nodes: tuple[Node, ...]
    columns: Columns
    mode: Mode
    hinge: Hinge | None
    cast: torch.dtype | None = None

    @property
    def k(self) -> int:
        return len(self.columns)

    @property
    def D(self) -> int:
        return self.nodes[-1].width

    @property
    def chain(self) -> Chain | None:
        """The chain of layers that the program is, if it is one."""
        return chain_of(self.d, self.nodes)

    @property
    def keeps_adjoint(self) -> bool:
        """Adjoint mode with one output: its chain is also the task loss's own backward."""
        return self.mode == "adjoint" and self.D == 1

    # Of a chain, for the kernels that serve nothing else.

    @property
    def widths(self) -> tuple[int, ...]:
        return self._layers.widths

    @property
    def activations(self) -> tuple[Activation, ...]:
        return self._layers.activations

    @property
    def depth(self) -> int:
        return len(self._layers.activations)

    @property
    def _layers(self) -> Chain:
        chain = self.chain
        assert chain is not None
        return chain


def chain_problem(
    widths: Sequence[int],
    activations: Sequence[Activation],
    k: int,
    mode: Mode,
    hinge: Hinge | None,
) -> Problem:
    """The problem of a chain in its last k inputs: ``widths`` is (d, H_1, …, D), one activation for
    each layer."""
    d, nodes = widths[0], nodes_of(tuple(widths), tuple(activations))
    return Problem(d, nodes, last_columns(d, k), mode, hinge)


Packed = tuple[
    int,
    tuple[str, ...],
    tuple[int, ...],
    tuple[float, ...],
    Columns,
    Mode,
    bool,
    tuple[int, ...],
    tuple[float, ...],
    bool,
    bool,
    torch.dtype | None,
]


def pack(problem: Problem) -> Packed:
    """The problem as plain numbers and strings: what a registered operator can take.

    The nodes are their kinds; for each node its width and its counts of inputs, parameters and
    numbers, then the inputs and the parameters; all numbers in turn.
    """
    hinge = problem.hinge or Hinge()
    shapes: tuple[int, ...] = ()
    numbers: tuple[float, ...] = ()
    for node in problem.nodes:
        counts = node.width, len(node.inputs), len(node.params), len(node.numbers)
        shapes += (*counts, *node.inputs, *node.params)
        numbers += node.numbers
    return (
        problem.d,
        tuple([node.kind for node in problem.nodes]),
        shapes,
        numbers,
        problem.columns,
        problem.mode,
        problem.hinge is not None,
        hinge.direction,
        hinge.margin if isinstance(hinge.margin, tuple) else (hinge.margin,),
        hinge.squared,
        hinge.elementwise,
        problem.cast,
    )


def unpack(
    d: int,
    kinds: Sequence[str],
    shapes: Sequence[int],
    numbers: Sequence[float],
    columns: Sequence[int],
    mode: Mode,
    penalised: bool,
    direction: Sequence[int],
    margin: Sequence[float],
    squared: bool,
    elementwise: bool,
    cast: torch.dtype | None = None,
) -> Problem:
    """The problem that ``pack`` made these of. Raises a ValueError where they make none."""
    nodes, at, taken = [], 0, 0
    for i, kind in enumerate(kinds):
        counts = shapes[at : at + 4]
        if len(counts) < 4 or min(counts) < 0:
            raise ValueError(f"shapes: expected four counts for node {i}, got {list(counts)}")
        width, inputs, params, own = counts
        at += 4
        places = tuple(shapes[at : at + inputs + params])
        at += len(places)
        mine = tuple(numbers[taken : taken + own])
        taken += own
        if len(places) < inputs + params or len(mine) < own:
            raise ValueError(f"shapes, numbers: expected more for node {i}, a {kind}")
        nodes.append(Node(kind, places[:inputs], places[inputs:], mine, width))
    wrong, k = wrong_nodes(d, tuple(nodes)), len(columns)
    if at != len(shapes) or taken != len(numbers):
        wrong = f"shapes, numbers: expected {at} and {taken}, got {len(shapes)} and {len(numbers)}"
    elif not wrong and not (
        k and columns[0] >= 0 and columns[-1] < d and all(map(lt, columns, columns[1:]))
    ):
        wrong = f"columns: expected some of 0 to {d - 1} in ascending order, got {list(columns)}"
    elif not wrong and mode not in ("tangent", "adjoint"):
        wrong = f"mode: expected 'tangent' or 'adjoint', got {mode!r}"
    elif not wrong and (
        len(direction) not in (1, k, nodes[-1].width * k) or not set(direction) <= {-1, 0, 1}
    ):
        wrong = f"direction: expected 1, k or D·k of -1, 0, 1, got {list(direction)}"
    elif not wrong and len(margin) not in (1, k, nodes[-1].width * k):
        wrong = f"margin: expected 1, k or D·k numbers, got {list(margin)}"
    elif not wrong and cast not in (None, torch.float16, torch.bfloat16):
        wrong = f"cast: expected None, float16 or bfloat16, got {cast}"
    if wrong:
        raise ValueError(wrong)
    given = margin[0] if len(margin) == 1 else tuple(margin)
    hinge = Hinge(tuple(direction), given, squared, elementwise) if penalised else None
    return Problem(d, tuple(nodes), tuple(columns), mode, hinge, cast)


def cheaper_mode(D: int, k: int) -> Mode:
    """The cost rule: adjoint (D chains) or tangent (k passes), whichever needs fewer products."""
    return "adjoint" if D == 1 or k > D else "tangent"


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of J, the hinge and every sum: float32 for half precision, else ``dtype``."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
