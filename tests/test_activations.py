"""The activation table in PyTorch's spelling against PyTorch's own modules and autograd."""

from __future__ import annotations

import pytest
import torch

from monokernel.activations import ACTIVATIONS, Activation, of_module
from tests.support import ACTIVATION_MODULES, assert_same

POINTS = torch.cat(
    [torch.linspace(-9, 9, 721, dtype=torch.float64), torch.tensor([-40.0, 40.0]).double()]
)
CASES = pytest.mark.parametrize("name", ACTIVATION_MODULES)


def table_entry(name: str) -> Activation:
    entry = of_module(ACTIVATION_MODULES[name])
    assert entry is not None
    return entry


def test_every_kind_is_reached_by_some_module() -> None:
    assert {table_entry(name).kind for name in ACTIVATION_MODULES} == set(ACTIVATIONS)


@CASES
def test_value_and_derivatives_are_autograds(name: str) -> None:
    σ, a = table_entry(name), POINTS.clone().requires_grad_()
    y = ACTIVATION_MODULES[name](a)
    (first,) = torch.autograd.grad(y.sum(), a, create_graph=True)
    assert_same([σ.value(a), σ.first(a)], [y, first], 1e-13)
    second = torch.zeros_like(a)
    if first.requires_grad:
        (second,) = torch.autograd.grad(first.sum(), a, materialize_grads=True)
    assert_same([σ.second(a)], [second], 1e-12)
    assert σ.piecewise_linear == bool((second == 0).all())


@CASES
def test_pull_is_the_first_derivative_times_g(name: str) -> None:
    σ, g = table_entry(name), torch.randn_like(POINTS)
    assert_same([σ.pull(g, POINTS)], [σ.first(POINTS) * g], 1e-13)
    k = 3  # as tangent mode calls it, one pre-activation for k tangents
    g = torch.randn(k, *POINTS.shape, dtype=torch.float64)
    assert_same([σ.pull(g, POINTS.expand(k, -1))], [σ.first(POINTS) * g], 1e-13)


@CASES
def test_kinks_follow_pytorch(name: str) -> None:
    σ = table_entry(name)
    a = torch.tensor([0.0, σ.p, σ.q, -0.0], dtype=torch.float64).requires_grad_()
    (first,) = torch.autograd.grad(ACTIVATION_MODULES[name](a).sum(), a)
    assert torch.equal(σ.first(a.detach()), first)


@CASES
def test_higher_derivatives_stay_finite_far_out(name: str) -> None:
    a = torch.tensor([-800.0, -90.0, 90.0, 800.0], dtype=torch.float64).requires_grad_()
    σ = table_entry(name)
    for derivative in (σ.first, σ.second):
        out = derivative(a)
        assert out.isfinite().all()
        if out.requires_grad:
            (further,) = torch.autograd.grad(out.sum(), a)
            assert further.isfinite().all()
