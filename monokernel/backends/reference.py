"""The reference: both modes in plain differentiable PyTorch, as the mathematics is written.

The truth of every test, and what runs under functorch transforms. All orders of derivative, every
dtype and device. The letters are those of ``docs/mathematics.md``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ..problem import Problem, accumulate_dtype, nan_rule

__all__ = ["value_and_jacobian"]


def value_and_jacobian(
    problem: Problem, x: Tensor, params: Sequence[Tensor | None]
) -> tuple[Tensor, Tensor]:
    """The output y (N, D) and its slopes J (N, D, k) in the last k columns of x (N, d).

    ``params`` is [W_1, b_1 or None, W_2, …], W_l of shape (H_l, H_{l-1}).
    """
    layers = [(weight_of(params, l), params[2 * l + 1]) for l in range(problem.depth)]
    run = _tangent if problem.mode == "tangent" else _adjoint
    y, J = run(problem, x, layers)
    return y, nan_rule(y, J.to(accumulate_dtype(J.dtype)))


def weight_of(params: Sequence[Tensor | None], l: int) -> Tensor:
    """W_{l+1}: never None, unlike a bias."""
    W = params[2 * l]
    assert W is not None
    return W


Layers = list[tuple[Tensor, Tensor | None]]


def _tangent(problem: Problem, x: Tensor, layers: Layers) -> tuple[Tensor, Tensor]:
    h = x
    h_dot = x.new_zeros(0)
    for l, ((W, b), σ) in enumerate(zip(layers, problem.activations, strict=True)):
        a = F.linear(h, W, b)
        a_dot = F.linear(h_dot, W) if l else W[:, problem.d - problem.k :].mT.unsqueeze(1)
        h, h_dot = σ.value(a), σ.first(a) * a_dot  # (N, H), (k, N, H)
    return h, h_dot.permute(1, 2, 0)


def _adjoint(problem: Problem, x: Tensor, layers: Layers) -> tuple[Tensor, Tensor]:
    h, a = x, []
    for (W, b), σ in zip(layers, problem.activations, strict=True):
        a.append(F.linear(h, W, b))
        h = σ.value(a[-1])
    P = torch.eye(problem.D, dtype=h.dtype, device=h.device)  # P_L: one row per output
    for l in range(problem.depth - 1, -1, -1):
        p = problem.activations[l].first(a[l]).unsqueeze(1) * P  # (N, D, H_l)
        W = layers[l][0]
        P = p @ (W if l else W[:, problem.d - problem.k :])
    return h, P
