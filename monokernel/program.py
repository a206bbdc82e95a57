"""A network as a program: a straight line of row-wise nodes over values v_0 = x, v_1, …, v_I = y.

Each value is (N, H_i). Node number i makes v_{i+1} from earlier values; what each kind computes is
one row of the table in ``nodes.py``. Plain data, so that it can be hashed, compared and passed
through a registered operator. A chain of linear layers is the simplest program.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache, reduce
from operator import or_
from typing import NamedTuple

from .activations import ACTIVATIONS, IDENTITY, KINDS, Activation

__all__ = ["Chain", "Node", "chain_of", "nodes_of", "unread"]


class Node(NamedTuple):
    """One node: v = f(u; θ).

    ``inputs`` are the values u that it reads (0 is x, i + 1 what node i made), ``params`` the
    places of θ among the call's parameters, ``numbers`` what its kind needs besides, ``width`` the
    columns H of v.
    """

    kind: str
    inputs: tuple[int, ...]
    params: tuple[int, ...]
    numbers: tuple[float, ...]
    width: int


class Chain(NamedTuple):
    """L linear layers and the activation that follows each (identity where none does): what the
    whole-network kernels serve. ``widths`` is (d, H_1, …, D)."""

    widths: tuple[int, ...]
    activations: tuple[Activation, ...]


@lru_cache(maxsize=1024)
def nodes_of(widths: tuple[int, ...], activations: tuple[Activation, ...]) -> tuple[Node, ...]:
    """The chain's program. Its parameters are W_1, b_1 (or None), W_2, …"""
    nodes: list[Node] = []
    for l, σ in enumerate(activations):
        nodes.append(Node("linear", (len(nodes),), (2 * l, 2 * l + 1), (), widths[l + 1]))
        if σ.kind != "identity":
            nodes.append(Node(σ.kind, (len(nodes),), (), (σ.p, σ.q, σ.r), widths[l + 1]))
    return tuple(nodes)


@lru_cache(maxsize=1024)
def chain_of(d: int, nodes: tuple[Node, ...]) -> Chain | None:
    """The chain that the program is, or None: linear layers in turn with activations that the
    kernels know."""
    widths, activations = [d], list[Activation]()
    for i, node in enumerate(nodes):
        if node.inputs != (i,):
            return None
        if node.kind == "linear":
            l = len(activations)
            if node.params != (2 * l, 2 * l + 1):
                return None
            activations.append(IDENTITY)
            widths.append(node.width)
        elif node.kind in KINDS and activations and activations[-1] is IDENTITY:
            activations[-1] = Activation(node.kind, *node.numbers)
        else:
            return None
    return Chain(tuple(widths), tuple(activations)) if activations else None


def unread(d: int, nodes: tuple[Node, ...]) -> tuple[int, ...]:
    """The columns of x that y does not depend on, whatever the numbers: they were sliced away."""
    reach = [[1 << c for c in range(d)]]  # for each column of a value the columns of x behind it
    for node in nodes:
        u = [reach[i] for i in node.inputs]
        if node.kind == "columns":
            start, step = map(int, node.numbers)
            v = u[0][start :: max(1, step)][: node.width]
        elif node.kind == "concat":
            v = [mask for part in u for mask in part]
        elif node.kind in BY_COLUMN:
            v = [_union(masks) for masks in zip(*u, strict=True)]
        else:
            v = [_union(mask for part in u for mask in part)] * node.width
        reach.append(v)
    read = _union(reach[-1])
    return tuple([c for c in range(d) if not read >> c & 1])


# Of which a column comes from the same column of what is read; the others mix them.
BY_COLUMN = {"prelu", "scale", "shift", "line", "dropout", "sum", "product", *ACTIVATIONS}


def _union(masks: Iterable[int]) -> int:
    return reduce(or_, masks, 0)
