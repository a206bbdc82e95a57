"""The general path: value and slopes of any module, by autograd alone. All orders of derivative.

The module is called exactly once, so that dropout has one mask for value and slopes, buffers are
updated once and hooks fire once. From its one graph the slopes are D reverse passes (adjoint mode).
There is no tangent mode here: PyTorch's forward-mode rules may be silently wrong where they are
differentiated again. The parameter gradients of ``torch.func.jvp`` through LayerNorm and
InstanceNorm lack the terms of the statistics, and an operator without a forward-mode rule can give
a tangent of zero. A reverse pass is what every module that trains is known to do right.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..arguments import Inputs
from ..network import ending
from ..problem import accumulate_dtype, nan_rule

__all__ = ["value_and_jacobian"]


def value_and_jacobian(mlp: nn.Module, inputs: Inputs, transformed: bool) -> tuple[Tensor, Tensor]:
    """y as ``mlp`` gives it and J (*batch, D, k).

    ``transformed`` says that a functorch transform or torch.compile is at work, where
    ``torch.autograd.grad`` is not available and ``torch.func.vjp`` does the same.
    """
    if (
        not transformed and torch.is_inference_mode_enabled()
    ):  # its tensors can take no part in autograd
        with torch.inference_mode(False), torch.no_grad():
            copies = inputs._replace(x1=inputs.x1.clone(), x2=inputs.x2.clone())
            return value_and_jacobian(mlp, copies, transformed)
    run = _by_func if transformed else _by_autograd
    with _twice_differentiable(mlp):
        y, J = run(mlp, inputs)
    return y, nan_rule(y.reshape(J.shape[:-1]), J.to(accumulate_dtype(J.dtype)))


def _by_autograd(mlp: nn.Module, inputs: Inputs) -> tuple[Tensor, Tensor]:
    further = torch.is_grad_enabled()
    with torch.enable_grad():
        # A node of its own, so that no path from x2 through x1 counts as a slope.
        tracked = inputs.x2.requires_grad and further
        x2 = inputs.x2.view_as(inputs.x2) if tracked else inputs.x2.detach().requires_grad_()
        with ending():
            y = _call(mlp, inputs, x2)
        if not y.requires_grad:
            raise ValueError(
                "mlp: its output has no gradient (it was detached, or computed under no_grad), so "
                "its slopes cannot be known"
            )
        slopes = [
            torch.autograd.grad(
                out.sum(), x2, create_graph=further, retain_graph=True, materialize_grads=True
            )[0]
            for out in _outputs(y, inputs).unbind(-1)
        ]
        J = torch.stack(slopes, -2)
    return (y, J) if further else (y.detach(), J)


def _by_func(mlp: nn.Module, inputs: Inputs) -> tuple[Tensor, Tensor]:
    y, pull, *_ = torch.func.vjp(lambda x2: _call(mlp, inputs, x2), inputs.x2)
    out = _outputs(y, inputs)
    slopes = []
    for d in range(out.shape[-1]):
        e = torch.zeros_like(out)
        e[..., d] = 1
        slopes.append(pull(e.reshape(y.shape))[0])
    return y, torch.stack(slopes, -2)


def _call(mlp: nn.Module, inputs: Inputs, x2: Tensor) -> Tensor:
    y = mlp(inputs._replace(x2=x2).joined())
    if not isinstance(y, Tensor):
        raise TypeError(f"mlp: expected to return a tensor, got {type(y).__name__}")
    if y.shape != inputs.batch and (y.dim() == 0 or y.shape[:-1] != inputs.batch):
        raise ValueError(
            f"mlp: expected an output of shape {(*inputs.batch, 'D')} for inputs of leading shape "
            f"{tuple(inputs.batch)}, got {tuple(y.shape)}"
        )
    return y


def _outputs(y: Tensor, inputs: Inputs) -> Tensor:
    """y as (*batch, D); a network that squeezes its one output has D = 1."""
    return y.unsqueeze(-1) if y.shape == inputs.batch else y


def _twice_differentiable(mlp: nn.Module) -> AbstractContextManager[object]:
    """Fused attention and cuDNN's recurrent layers have no second derivative; others have."""
    stack = ExitStack()
    modules = list(mlp.modules())
    if any(isinstance(m, (nn.MultiheadAttention, nn.TransformerEncoderLayer)) for m in modules):
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
    if torch.backends.cudnn.enabled and any(isinstance(m, nn.RNNBase) for m in modules):
        stack.enter_context(torch.backends.cudnn.flags(enabled=False))
    return stack
