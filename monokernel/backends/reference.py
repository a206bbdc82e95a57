"""The reference: both modes in plain differentiable PyTorch, as the mathematics is written.

The truth of every test, and what runs under functorch transforms. All orders of derivative, every
dtype and device. The letters are those of ``docs/mathematics.md``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..columns import take
from ..hinge import nan_rule
from ..nodes import Maybe, moving, rule, used
from ..problem import Problem, accumulate_dtype
from ..program import Node
from . import Params

__all__ = ["value", "value_and_jacobian"]


def value(nodes: tuple[Node, ...], x: Tensor, params: Params) -> Tensor:
    """The output y (N, D) of a program."""
    return _values(nodes, x, params)[0][len(nodes)]


def value_and_jacobian(problem: Problem, x: Tensor, params: Params) -> tuple[Tensor, Tensor]:
    """The output y (N, D) and its slopes J (N, D, k) in k columns of x (N, d).

    ``params`` are those of the program's nodes, each at its place.
    """
    values, θ = _values(problem.nodes, x, params)
    y = values[len(problem.nodes)]
    J = (_tangent if problem.mode == "tangent" else _adjoint)(problem, values, θ)
    if J is None:
        J = y.new_zeros(())
    J = J.expand(x.shape[0], problem.D, problem.k)
    return y, nan_rule(y, J.to(accumulate_dtype(J.dtype)))


def _values(
    nodes: tuple[Node, ...], x: Tensor, params: Params
) -> tuple[dict[int, Tensor], dict[int, Maybe]]:
    """Every value that y depends on, and θ of the node that it is of."""
    values: dict[int, Tensor] = {0: x}
    θ: dict[int, Maybe] = {}
    for i in used(nodes):
        node = nodes[i]
        θ[i + 1] = _parameters(node, params, x)
        values[i + 1] = rule(node).value(node, [values[v] for v in node.inputs], θ[i + 1])
    return values, θ


def _parameters(node: Node, params: Params, x: Tensor) -> Maybe:
    """θ of a node, for every row of x."""
    θ: Maybe = [params[place] for place in node.params]
    if rule(node).per_row:
        return rule(node).at_rows(node, θ, torch.arange(x.shape[0], device=x.device), x.dtype)
    return θ


def _tangent(problem: Problem, values: dict[int, Tensor], θ: dict[int, Maybe]) -> Tensor | None:
    """J (N or 1, D, k), or None where x2 does not reach y."""
    d, x2, nodes = problem.d, problem.columns, problem.nodes
    moves = moving(d, x2, nodes)
    dots: dict[int, Tensor] = {}  # (k, N or 1, H)
    dots[0] = take(_one_hot(values[0], d), x2, 0)
    for i in used(nodes):
        node = nodes[i]
        if not moves[i + 1]:
            continue
        if node.kind == "linear" and node.inputs == (0,):
            W = θ[i + 1][0]
            assert W is not None
            dots[i + 1] = take(W, x2).mT.unsqueeze(1)  # no product by a one-hot
        else:
            u, u_dot = [values[v] for v in node.inputs], [dots.get(v) for v in node.inputs]
            dots[i + 1] = rule(node).push(node, u, values[i + 1], u_dot, θ[i + 1])
    y_dot = dots.get(len(nodes))
    return None if y_dot is None else y_dot.permute(1, 2, 0)


def _adjoint(problem: Problem, values: dict[int, Tensor], θ: dict[int, Maybe]) -> Tensor | None:
    """J (N or 1, D, k), or None where x2 does not reach y."""
    x2, nodes = problem.columns, problem.nodes
    moves = moving(problem.d, x2, nodes)
    P: dict[int, Tensor] = {}  # (D, N or 1, H), of x2 alone for x
    P[len(nodes)] = _one_hot(values[len(nodes)], problem.D)
    for i in reversed(used(nodes)):
        node = nodes[i]
        if not moves[i + 1]:
            continue
        if node.kind == "linear" and node.inputs == (0,):
            W = θ[i + 1][0]
            assert W is not None
            pulled = [P[i + 1] @ take(W, x2)]
        else:
            u = [values[v] for v in node.inputs]
            pulled = rule(node).pull(node, u, values[i + 1], P[i + 1], θ[i + 1])
            pulled = [t if v else take(t, x2) for v, t in zip(node.inputs, pulled, strict=True)]
        for v, t in zip(node.inputs, pulled, strict=True):
            P[v] = P[v] + t if v in P else t
    x_bar = P.get(0)
    return None if x_bar is None else x_bar.transpose(0, 1)


def _one_hot(like: Tensor, n: int) -> Tensor:
    """(n, 1, n): row c is e_c, for every row of a batch."""
    return torch.eye(n, dtype=like.dtype, device=like.device).unsqueeze(1)
