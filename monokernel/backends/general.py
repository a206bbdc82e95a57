"""The general path: value and slopes of any module, by autograd alone.

The module is called exactly once, so that dropout has one mask for value and slopes, buffers are
updated once and hooks fire once. From its one graph the slopes are D reverse passes (adjoint mode)
or k forward-mode passes (tangent mode). A forward-mode pass is the transpose of the reverse pass:
u ↦ (∂y/∂x2)ᵀ u is linear in u, and its own reverse pass is the wanted ∂y/∂x2 · e_c. All orders of
derivative.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..arguments import Inputs
from ..problem import Mode, accumulate_dtype, cheaper_mode, nan_rule

__all__ = ["value_and_jacobian"]


def value_and_jacobian(
    mlp: nn.Module, inputs: Inputs, mode: Mode | None, transformed: bool
) -> tuple[Tensor, Tensor]:
    """y as ``mlp`` gives it and J (*batch, D, k). ``mode`` None takes the cheaper one.

    ``transformed`` says that a functorch transform or torch.compile is at work, where
    ``torch.autograd.grad`` is not available and ``torch.func`` does the same.
    """

    def f(x2: Tensor) -> Tensor:
        y = mlp(Inputs(inputs.x1, x2).joined())
        _check_output(y, inputs)
        return y

    run = _by_func if transformed else _by_autograd
    y, J = run(f, inputs, mode)
    return y, nan_rule(y.reshape(J.shape[:-1]), J.to(accumulate_dtype(J.dtype)))


def _check_output(y: Tensor, inputs: Inputs) -> None:
    if not isinstance(y, Tensor):
        raise TypeError(f"mlp: expected to return a tensor, got {type(y).__name__}")
    if y.shape not in (inputs.batch, (*inputs.batch, y.shape[-1] if y.dim() else 1)):
        raise ValueError(
            f"mlp: expected an output of shape {(*inputs.batch, 'D')} for inputs of leading shape "
            f"{tuple(inputs.batch)}, got {tuple(y.shape)}"
        )


def _outputs(y: Tensor, inputs: Inputs) -> Tensor:
    """y as (*batch, D); a network that squeezes its one output has D = 1."""
    return y.unsqueeze(-1) if y.shape == inputs.batch else y


def _by_autograd(
    f: Callable[[Tensor], Tensor], inputs: Inputs, mode: Mode | None
) -> tuple[Tensor, Tensor]:
    further = torch.is_grad_enabled()
    with torch.enable_grad():
        # An alias, so that no path from x2 through x1 counts as a slope.
        x2 = inputs.x2.view_as(inputs.x2) if inputs.x2.requires_grad and further else None
        x2 = inputs.x2.detach().requires_grad_() if x2 is None else x2
        y = f(x2)
        if not y.requires_grad:
            raise ValueError(
                "mlp: its output has no gradient (it was detached, or computed under no_grad), so "
                "its slopes cannot be known"
            )
        out = _outputs(y, inputs)
        D, k = out.shape[-1], inputs.k

        def slope(of: Tensor, by: Tensor, last: bool) -> Tensor:
            (g,) = torch.autograd.grad(
                of.sum(), by, create_graph=further, retain_graph=True, materialize_grads=True
            )
            return g

        if (mode or cheaper_mode(D, k)) == "adjoint":
            J = torch.stack([slope(out[..., d], x2, d == D - 1) for d in range(D)], -2)
        else:
            u = torch.zeros_like(out, requires_grad=True)
            (g,) = torch.autograd.grad(out, x2, u, create_graph=True, materialize_grads=True)
            columns = [slope(g[..., c], u, c == k - 1) for c in range(k)] if g.requires_grad else []
            J = torch.stack(columns, -1) if columns else out.new_zeros(*out.shape, k)
    return (y, J) if further else (y.detach(), J.detach())


def _by_func(
    f: Callable[[Tensor], Tensor], inputs: Inputs, mode: Mode | None
) -> tuple[Tensor, Tensor]:
    y, pull = torch.func.vjp(lambda x2: _outputs(f(x2), inputs), inputs.x2)
    D, k = y.shape[-1], inputs.k

    def basis(of: Tensor, i: int) -> Tensor:
        e = torch.zeros_like(of)
        e[..., i] = 1
        return e

    if (mode or cheaper_mode(D, k)) == "adjoint":
        J = torch.stack([pull(basis(y, d))[0] for d in range(D)], -2)
    else:
        _, push = torch.func.vjp(lambda u: pull(u)[0], torch.zeros_like(y))
        J = torch.stack([push(basis(inputs.x2, c))[0] for c in range(k)], -1)
    return y, J
