"""The activation table in PyTorch's spelling against PyTorch's own functions and autograd."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from monokernel.activations import ACTIVATIONS, KINDS, Activation
from tests.support import ELEMENTWISE, assert_same, hardsigmoid

EVERY = pytest.mark.parametrize("name", ELEMENTWISE)

POINTS = torch.cat(
    [torch.linspace(-9, 9, 721, dtype=torch.float64), torch.tensor([-40.0, 40.0]).double()]
)
# Where a function is smooth: no pole at 0, a real value.
DOMAINS = {
    "sqrt": POINTS[POINTS > 0],
    "log": POINTS[POINTS > 0],
    "reciprocal": POINTS[POINTS.abs() > 0.01],
}
# They overflow as they should, or are nowhere defined far out to the left.
UNBOUNDED = ("exp", "sqrt", "log")
KINKS = (0.0, -0.0, 3.0, -3.0, 6.0)  # and ±p, ±q


def points(name: str) -> Tensor:
    return DOMAINS.get(name, POINTS).clone()


def test_every_kind_is_reached() -> None:
    assert {σ.kind for σ, _ in ELEMENTWISE.values()} == set(ACTIVATIONS)


def test_tritons_kinds_are_those_with_a_code() -> None:
    assert ACTIVATIONS.keys() >= set(KINDS)
    for kind in ACTIVATIONS:
        if kind in KINDS:
            assert KINDS[Activation(kind).code] == kind
        else:
            with pytest.raises(ValueError, match="not in tuple"):
                _ = Activation(kind).code


def test_hardsigmoid_is_pytorchs() -> None:
    a = torch.cat([POINTS, torch.tensor(KINKS).double()]).requires_grad_()
    y, want = hardsigmoid(a), F.hardsigmoid(a)
    assert_same([y], [want], 1e-15)
    first, of_pytorch = (torch.autograd.grad(v.sum(), a)[0] for v in (y, want))
    assert_same([first], [of_pytorch], 1e-7)  # which has 1/6 in float32


@EVERY
def test_value_and_derivatives_are_autograds(name: str) -> None:
    (σ, f), a = ELEMENTWISE[name], points(name).requires_grad_()
    y = f(a)
    (first,) = torch.autograd.grad(y.sum(), a, create_graph=True)
    assert_same([σ.value(a), σ.first(a)], [y, first], 1e-13)
    second = torch.zeros_like(a)
    if first.requires_grad:
        (second,) = torch.autograd.grad(first.sum(), a, materialize_grads=True)
    assert_same([σ.second(a)], [second], 1e-12)
    assert σ.piecewise_linear == bool((second == 0).all())


@EVERY
def test_derivatives_are_differentiable_to_all_orders(name: str) -> None:
    σ, a = ELEMENTWISE[name][0], points(name).requires_grad_()
    for lower, upper in ((σ.value, σ.first), (σ.first, σ.second)):
        out = lower(a)
        got = torch.zeros_like(a)
        if out.requires_grad:
            (got,) = torch.autograd.grad(out.sum(), a, materialize_grads=True)
        assert_same([got], [upper(a)], 1e-12)


@EVERY
def test_pull_is_the_first_derivative_times_g(name: str) -> None:
    σ, a = ELEMENTWISE[name][0], points(name)
    g = torch.randn_like(a)
    assert_same([σ.pull(g, a)], [σ.first(a) * g], 1e-13)
    k = 3  # as tangent mode calls it, one pre-activation for k tangents
    g = torch.randn(k, *a.shape, dtype=torch.float64)
    assert_same([σ.pull(g, a.expand(k, -1))], [σ.first(a) * g], 1e-13)


@EVERY
def test_kinks_follow_pytorch(name: str) -> None:
    σ, f = ELEMENTWISE[name]
    a = torch.tensor([*KINKS, σ.p, σ.q, -σ.p, -σ.q], dtype=torch.float64)
    a = a[(a >= 0) | torch.tensor(name not in DOMAINS)].requires_grad_()
    (first,) = torch.autograd.grad(f(a).sum(), a)
    torch.testing.assert_close(σ.first(a.detach()), first, rtol=1e-12, atol=0)


@EVERY
def test_higher_derivatives_stay_finite_far_out(name: str) -> None:
    if name in UNBOUNDED:
        pytest.skip("it is not finite far out itself")
    a = torch.tensor([-800.0, -90.0, 90.0, 800.0], dtype=torch.float64).requires_grad_()
    σ = ELEMENTWISE[name][0]
    for derivative in (σ.first, σ.second):
        out = derivative(a)
        assert out.isfinite().all()
        if out.requires_grad:
            (further,) = torch.autograd.grad(out.sum(), a)
            assert further.isfinite().all()
