"""Ranges of σ, σ' and σ'' over intervals: never contradicted, tight, and with a gradient."""

from __future__ import annotations

import math
from collections.abc import Callable

import mpmath
import pytest
import torch
from torch import Tensor

from monokernel.activations import ACTIVATIONS, SELU_ALPHA, SELU_SCALE, Activation
from monokernel.backends import cpu
from monokernel.ranges import bounds, curves, described
from tests.exact import EXACT, Number

CASES = [
    Activation("leaky_relu", 0.1),
    Activation("leaky_relu", -0.5),
    Activation("hardtanh", -1.0, 2.0),
    Activation("elu", 1.0, 1.0, 1.0),
    Activation("elu", SELU_SCALE, SELU_ALPHA, 1.0),
    Activation("elu", 1.0, 1.7, 1 / 1.7),
    Activation("elu", 1.0, -0.8, 1.0),
    Activation("softplus", 1.0, 20.0),
    Activation("softplus", 3.0, 2.0),
    Activation("softshrink", 0.5),
    Activation("hardshrink", 0.5),
    Activation("threshold", 0.3, 0.3),
    Activation("threshold", 0.3, -1.0),
    Activation("threshold", 0.3, 2.0),
    Activation("clamp", -0.5, 0.7),
    Activation("clamp", 0.0, math.inf),
]
CASES += [Activation(kind) for kind in ACTIVATIONS if kind not in {σ.kind for σ in CASES}]
POSITIVE = ("sqrt", "log")
names = [f"{σ.kind}-{σ.p:.3g}-{σ.q:.3g}" for σ in CASES]


def derivative(σ: Activation, order: int, a: Tensor) -> Tensor:
    return (σ.value, σ.first, σ.second)[order](a)


def intervals(σ: Activation, dtype: torch.dtype, n: int = 120) -> tuple[Tensor, Tensor]:
    """Of every size and place, some without extent."""
    middle = torch.randn(n, dtype=torch.float64) * 10.0 ** torch.randint(-3, 3, (n,))
    radius = torch.rand(n, dtype=torch.float64) * 10.0 ** torch.randint(-6, 3, (n,))
    radius[::10] = 0
    lower, upper = (middle - radius).to(dtype), (middle + radius).to(dtype)
    if σ.kind in POSITIVE:
        lower, upper = lower.abs(), lower.abs() + (upper - lower)
    return lower, upper


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize("σ", CASES, ids=names)
def test_no_point_contradicts(σ: Activation, order: int, dtype: torch.dtype) -> None:
    lower, upper = intervals(σ, dtype)
    low, high = bounds(σ, order, lower, upper)
    assert low.dtype == high.dtype == dtype
    share = torch.rand(65, 1, dtype=torch.float64)
    share[:2] = torch.tensor([[0.0], [1.0]])
    a = torch.lerp(lower.double(), upper.double(), share).clamp(lower.double(), upper.double())
    f = derivative(σ, order, a)
    # The table's own spelling loses some digits where it cancels.
    noise = 8e-16 * (1 + a.abs()) ** (5 if σ.kind == "gelu_tanh" else 1) * (1 + f.abs())
    assert (f >= low - noise).all()
    assert (f <= high + noise).all()
    assert (f.nan_to_num() == f).all()


@pytest.mark.parametrize("σ", CASES, ids=names)
def test_tight(σ: Activation) -> None:
    """The range is that of a fine grid, within what the grid can miss."""
    lower = torch.linspace(0.01 if σ.kind in POSITIVE else -6, 5, 41, dtype=torch.float64)
    upper = lower + torch.rand(41, dtype=torch.float64) * 3
    grid = torch.lerp(lower, upper, torch.linspace(0, 1, 2001, dtype=torch.float64).unsqueeze(1))
    for order in range(3):
        low, high = bounds(σ, order, lower, upper)
        f = derivative(σ, order, grid)
        step = (f.diff(dim=0).abs().amax(0) + 1e-8) * 1.01
        finite = low.isfinite() & high.isfinite()
        if σ == Activation("softplus", 3.0, 2.0):  # whose jump is allowed for everywhere
            step = step + 6 * math.exp(-2)
        assert finite.any() or σ.kind == "hardshrink"
        assert (f.amin(0) - low <= step)[finite].all()
        assert (high - f.amax(0) <= step)[finite].all()


def definition(σ: Activation) -> Callable[[Number], Number]:
    """σ in arbitrary precision, as its formula has it: a softplus bends on past its threshold."""
    numbers = [mpmath.mpf(number) for number in σ[1:]]
    if σ.kind == "softplus":
        numbers[1] = mpmath.inf
    return lambda a: EXACT[σ.kind](a, *numbers)


CURVED = [σ for σ in CASES if σ.kind in EXACT]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("σ", CURVED, ids=[f"{σ.kind}-{σ.p:.3g}-{σ.q:.3g}" for σ in CURVED])
def test_formulas_are_within_half_their_error_term(σ: Activation, dtype: torch.dtype) -> None:
    """Against arbitrary precision, in vectors as long as the libraries have code for."""
    a = torch.cat([torch.randn(22) * 3, torch.linspace(-30, 30, 10)]).to(dtype)
    if σ.kind in POSITIVE:
        a = a.abs() + 1e-3
    eps = torch.finfo(dtype).eps
    with mpmath.workdps(60):
        f = definition(σ)

        for order, curve in enumerate(curves(σ)):
            got = curve.formula(a)
            for x, y in zip(a.tolist(), got.tolist(), strict=True):
                t = mpmath.diff(f, mpmath.mpf(x), order) if order else f(mpmath.mpf(x))
                allowed = eps * (curve.relative * abs(t) + curve.absolute) + 1e-35
                assert abs(mpmath.mpf(y) - t) <= allowed / 2, (order, x, y, t)


@pytest.mark.skipif(cpu.isa() is None, reason="the native kernel was not built")
@pytest.mark.parametrize("σ", CURVED, ids=[f"{σ.kind}-{σ.p:.3g}-{σ.q:.3g}" for σ in CURVED])
def test_native_formulas_are_within_half_their_error_term(σ: Activation) -> None:
    """Those that ``csrc/bound_forward.h`` takes, by the terms that it is told."""
    a = torch.cat([torch.randn(22) * 3, torch.linspace(-30, 30, 10)]).double()
    if σ.kind in POSITIVE:
        a = a.abs() + 1e-3
    numbers = described(σ)
    with mpmath.workdps(60):
        f = definition(σ)

        for order, got in enumerate(cpu.activation(σ, a)[:2]):
            relative, absolute, turns = numbers[2], numbers[3], int(numbers[5])
            numbers = numbers[6 + 3 * turns :]
            slack = curves(σ)[order].slack
            for x, y in zip(a.tolist(), got.tolist(), strict=True):
                t = mpmath.diff(f, mpmath.mpf(x), order) if order else f(mpmath.mpf(x))
                allowed = 2.0**-52 * relative * abs(t) + absolute - slack
                assert abs(mpmath.mpf(y) - t) <= allowed / 2 + slack, (order, x, y, t)
    assert not numbers


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("σ", CASES, ids=names)
def test_infinite_intervals(σ: Activation, dtype: torch.dtype) -> None:
    """They contain what every finite one has, and no NaN."""
    inf = math.inf
    start = 0.5 if σ.kind in POSITIVE else -inf
    lower = torch.tensor([start, start, -2.0, 1e30, -1e30, -inf, inf], dtype=dtype)
    upper = torch.tensor([inf, 3.0, inf, inf, 1e30, -inf, inf], dtype=dtype)
    if σ.kind in POSITIVE:
        lower, upper = lower.clamp(min=0.25), upper.clamp(min=0.5)
    a = torch.linspace(0.5 if σ.kind in POSITIVE else -50, 50, 4001, dtype=torch.float64)
    for order in range(3):
        low, high = bounds(σ, order, lower, upper)
        assert not low.isnan().any()
        assert not high.isnan().any()
        f = derivative(σ, order, a)
        for l, u, b, t in zip(lower, upper, low, high, strict=True):
            inside = f[(a >= l) & (a <= u)]
            noise = 1e-13
            assert (inside >= b - noise).all()
            assert (inside <= t + noise).all()


@pytest.mark.parametrize("σ", CASES, ids=names)
def test_nan_and_empty_intervals_say_nothing(σ: Activation) -> None:
    nan = math.nan
    lower, upper = torch.tensor([nan, 1.0, nan, 2.0]), torch.tensor([1.0, nan, nan, 1.0])
    for order in range(3):
        for bound in bounds(σ, order, lower, upper):
            assert bound.isnan().all()


@pytest.mark.parametrize("order", [0, 1])
@pytest.mark.parametrize("σ", CASES, ids=names)
def test_gradient_reaches_the_end_at_which_the_bound_is_attained(σ: Activation, order: int) -> None:
    lower, upper = intervals(σ, torch.float64, 60)
    upper = torch.maximum(upper, lower + 1e-3)
    if σ.kind == "softplus":
        lower, upper = (end.clamp(max=0.5 * σ.q / σ.p) for end in (lower, upper))
    lower[-1] = 0.25 if σ.kind in POSITIVE else -math.inf
    upper[-1] = math.inf
    lower.requires_grad_()
    upper.requires_grad_()
    for bound in bounds(σ, order, lower, upper):
        if not bound.requires_grad:
            continue
        got = torch.autograd.grad(bound.sum(), (lower, upper), retain_graph=True, allow_unused=True)
        at = [derivative(σ, order, end.detach()) for end in (lower, upper)]
        slopes = [derivative(σ, order + 1, end.detach()) for end in (lower, upper)]
        for g, f, slope in zip(got, at, slopes, strict=True):
            if g is None:
                continue
            assert g.isfinite()[:-1].all()
            assert not g[-1].isnan() or σ.kind in ("square", "exp")  # where the bound is infinite
            near = curves(σ)[order].slack + 1e-13 * (1 + f.abs())
            attained = ((f - bound.detach()).abs() <= near) & (f.abs() < 1e6)
            ordinary = attained & (at[0] - at[1]).abs().gt(1e-9)
            ordinary[-1] = False
            torch.testing.assert_close(g[ordinary], slope[ordinary], rtol=1e-9, atol=1e-9)
            assert (g[~attained] == 0)[:-1].all() or σ.kind in ("reciprocal", "square", "exp")
