"""gradcheck, gradgradcheck, and what a second derivative does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from monokernel import fused_mono_penalty, value_and_jacobian
from tests.support import (
    ACTIVATION_MODULES,
    BACKENDS,
    HANDWRITTEN,
    assert_same,
    mlp,
    points,
    skip_unless_served,
)

MODES = ["tangent", "adjoint"]


class Call(nn.Module):
    """A public call as a module, whose parameters ``functional_call`` can replace."""

    def __init__(self, net: nn.Module, call: Callable[..., Any], **options: Any) -> None:
        super().__init__()
        self.net, self.call, self.options = net, call, options

    def forward(self, x1: Tensor, x2: Tensor) -> Any:
        return self.call(self.net, x1, x2, **self.options)


def functional(
    name: str, D: int, call: Callable[..., Any], **options: Any
) -> tuple[Callable[..., Any], list[Tensor]]:
    """``call`` as a function of x1, x2 and every parameter, and a point to check it at."""
    module = Call(mlp(2, 2, D, (3, 3), ACTIVATION_MODULES[name]), call, **options)
    params = dict(module.named_parameters())
    inputs = [*points(4, 2, 2), *(p.detach().clone() for p in params.values())]

    def f(x1: Tensor, x2: Tensor, *values: Tensor) -> Any:
        return torch.func.functional_call(module, dict(zip(params, values, strict=True)), (x1, x2))

    return f, [t.requires_grad_() for t in inputs]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ACTIVATION_MODULES)
def test_gradcheck(name: str, mode: str, backend: str) -> None:
    skip_unless_served(name, backend)
    options: dict[str, Any] = {"mode": mode, "backend": backend}
    f, inputs = functional(name, 2, value_and_jacobian, **options)
    assert torch.autograd.gradcheck(f, inputs)
    # Far from the hinge's kink: every slope violates, quadratically.
    options |= {"return_output": True, "margin": 3.0, "hinge": "squared"}
    f, inputs = functional(name, 1, fused_mono_penalty, **options)
    assert torch.autograd.gradcheck(f, inputs)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["Tanh", "SiLU", "GELU-tanh", "Softplus", "ReLU"])
def test_gradgradcheck_of_the_reference(name: str, mode: str) -> None:
    f, inputs = functional(name, 1, value_and_jacobian, mode=mode, backend="reference")
    assert torch.autograd.gradgradcheck(f, inputs)


@pytest.mark.parametrize("backend", HANDWRITTEN)
@pytest.mark.parametrize("mode", MODES)
def test_a_second_derivative_raises_and_names_the_reference(mode: str, backend: str) -> None:
    net, (x1, x2) = mlp(2, 2, 2), points(5, 2, 2)
    x2.requires_grad_()
    for call in (fused_mono_penalty, value_and_jacobian):
        out = call(net, x1, x2, mode=mode, backend=backend)
        loss = out.sum() if isinstance(out, Tensor) else out[0].sum() + out[1].square().sum()
        first = torch.autograd.grad(loss, [x2, net[0].weight], create_graph=True)
        reference = call(net, x1, x2, mode=mode, backend="reference")
        loss = (
            reference.sum()
            if isinstance(reference, Tensor)
            else reference[0].sum() + reference[1].square().sum()
        )
        want = torch.autograd.grad(loss, [x2, net[0].weight], create_graph=True)
        assert_same(first, want)
        for g in first:
            with pytest.raises(RuntimeError, match="backend='reference'"):
                torch.autograd.grad(g.sum(), net[2].weight, retain_graph=True)
        torch.autograd.grad(want[0].sum(), net[2].weight)  # the reference does it


@pytest.mark.parametrize("backend", HANDWRITTEN)
def test_weights_changed_before_the_backward_are_noticed(backend: str) -> None:
    net, (x1, x2) = mlp(2, 2, 2), points(5, 2, 2)
    penalty = fused_mono_penalty(net, x1, x2, margin=1.0, backend=backend)
    with torch.no_grad():
        net[2].weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        penalty.backward()
