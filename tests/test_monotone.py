"""Networks that are monotone by construction: the bound is never contradicted, and they train."""

from __future__ import annotations

import copy
import gc
import io
import itertools
import math
import pickle
import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from benchmarks import soundness
from monokernel import Monotone, audit, certify, fused_mono_penalty, value_and_jacobian
from monokernel.activations import KINDS
from monokernel.arguments import check_inputs
from monokernel.backends import cpu
from monokernel.intervals import Interval, jacobian
from monokernel.reading import read
from monokernel.symbols import Key

from . import zoo
from .support import mlp as network
from .test_training import grads

INF, NAN = math.inf, math.nan
DIRECTION = (0, 1, 0, -1, 1)
D = 5


pytestmark = pytest.mark.usefixtures("one_thread")


def chain(
    σ: Callable[[], nn.Module] = nn.SiLU,
    outputs: int = 2,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    width: int = 16,
) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(D, width), σ(), nn.Linear(width, width), σ(), nn.Linear(width, outputs)
    ).to(dtype)


def model(mlp: nn.Module | None = None, **options: Any) -> Monotone:
    mlp = chain() if mlp is None else mlp
    return Monotone(mlp, **({"lower": -1, "upper": 2, "direction": DIRECTION} | options))


def slopes(net: nn.Module, x: Tensor) -> Tensor:
    """∂y/∂x (N, D, d) in float64."""
    x = x.double()
    return value_and_jacobian(copy.deepcopy(net).double().eval(), x[:, :0], x)[1]


def sampled(lower: float, upper: float, n: int = 400, d: int = D) -> Tensor:
    """Rows in the box, its corners among them; where it is infinite, out to 100."""
    low, high = max(lower, -100), min(upper, 100)
    u = torch.rand(n, d)
    u[: n // 4] = u[: n // 4].round()
    return low + (high - low) * u


# --- bounds ---------------------------------------------------------------------------------------


ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    σ.__name__: σ
    for σ in (
        nn.Identity, nn.ReLU, nn.LeakyReLU, nn.ReLU6, nn.Hardtanh, nn.ELU, nn.SELU, nn.CELU,
        nn.GELU, nn.SiLU, nn.Mish, nn.Softplus, nn.Softsign, nn.Tanh, nn.Sigmoid, nn.LogSigmoid,
        nn.Hardsigmoid, nn.Hardswish, nn.Tanhshrink, nn.PReLU, nn.Softshrink,
    )
}  # fmt: skip
ACTIVATIONS["CELU below 0"] = lambda: nn.CELU(-0.7)
ACTIVATIONS["LeakyReLU steep"] = lambda: nn.LeakyReLU(1.5)
ACTIVATIONS["Softplus steep"] = lambda: nn.Softplus(2.0, 25.0)
ACTIVATIONS["GELU tanh"] = lambda: nn.GELU("tanh")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_no_slope_contradicts_the_bound_of_a_chain(name: str, dtype: torch.dtype) -> None:
    """Boxes of every size, a point among them; weights of every scale and made to cancel."""
    for seed, scale in enumerate((0.3, 1.0, 4.0)):
        mlp = chain(ACTIVATIONS[name], dtype=dtype, seed=seed, width=8)
        with torch.no_grad():
            for p in mlp.parameters():
                p.mul_(scale)
            first = mlp[0].weight
            assert isinstance(first, Tensor)
            if seed == 1:  # every slope is a difference of two that are equal but for rounding
                first[4:] = first[:4] * (1 + torch.finfo(dtype).eps)
                mlp[2].weight[:, 4:] = -mlp[2].weight[:, :4]  # type: ignore[index, operator]
        boxes = [(0.0, 0.0), (0.5, 0.5001), (-1, 1), (-30, 5), (0, INF), (-INF, INF)]
        for lower, upper in boxes[:2] if name == "CELU below 0" else boxes:  # which is exp below 0
            m = Monotone(mlp, lower, upper, direction=DIRECTION, parts=1 + 3 * (seed == 2))
            x = sampled(lower, upper, 64).to(dtype)
            bound = m.bound.detach().double()
            with torch.no_grad():
                got = slopes(mlp, x) * torch.tensor(DIRECTION)
            # The slopes' own rounding, in float64.
            noise = 1e-14 * (1 + scale) ** 3 * (1 + x.abs().max().item())
            constrained = torch.tensor(DIRECTION) != 0
            assert bound[:, ~constrained].isnan().all()
            assert (got >= bound - noise)[..., constrained].all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", zoo.ZOO)
def test_no_slope_contradicts_the_intervals_of_the_zoo(name: str, dtype: torch.dtype) -> None:
    """Both ends, of every kind of node that ordinary networks have."""
    net = zoo.network(name, D, 1 if name == "squeezed" else 2, 8, dtype)
    for half in (0.0, 0.01, 0.3, 3.0):
        middle = torch.randn(3, D, dtype=dtype)
        inputs = check_inputs(middle[:2, :0], middle[:2])
        found = read(net, inputs, rehearsal=True, fold=False)
        assert not isinstance(found, str), found
        box = Interval(middle - half, middle + half)
        J = jacobian(found.nodes, found.params, box, range(D))
        for i in range(3):
            u = torch.rand(50, D, dtype=torch.float64)
            u[:25] = u[:25].round()
            rows = torch.lerp(box.lower[i].double(), box.upper[i].double(), u)
            with torch.no_grad():
                got = slopes(net, rows)
            if name in zoo.ACTIVE:
                got = torch.cat([got, _dropped(net, rows)])
            noise = 1e-9 * (J.upper[i] - J.lower[i]) + 1e-12
            assert (got >= J.lower[i] - noise).all()
            assert (got <= J.upper[i] + noise).all()
            if dtype == torch.float64:  # in float32 an RMSNorm has another ε
                m = Monotone(net, box.lower[i], box.upper[i], direction=(1, -1, 1, -1, 1))
                assert (got * torch.tensor(m.direction) >= m.bound.detach() - noise).all()


def _dropped(net: nn.Module, rows: Tensor) -> Tensor:
    active = copy.deepcopy(net).double().train()
    with torch.no_grad():
        return torch.cat([value_and_jacobian(active, rows[:, :0], rows)[1] for _ in range(4)])


def test_the_bound_of_a_point_is_its_slope() -> None:
    """But for rounding; so the intervals lose nothing that is not the box's."""
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.float64, 1e-12)):
        mlp = chain(dtype=dtype)
        m = model(mlp, lower=0.3, upper=0.3)
        want = slopes(mlp, torch.full((1, D), 0.3, dtype=dtype))[0] * torch.tensor(DIRECTION)
        got = m.bound.double()
        assert (got <= want + 1e-14)[:, 1].all()
        torch.testing.assert_close(got[:, [1, 3, 4]], want[:, [1, 3, 4]], rtol=0, atol=tolerance)


def test_more_parts_and_smaller_boxes_never_loosen_the_bound() -> None:
    mlp = chain()
    bounds = [model(mlp, parts=parts).bound.nan_to_num() for parts in (1, 2, 8, 27)]
    assert all((b >= a - 1e-6).all() for a, b in itertools.pairwise(bounds))
    assert (bounds[3] > bounds[0])[:, 1].all()
    assert (model(mlp, lower=0, upper=1).bound >= model(mlp).bound).any()


def test_parts_cut_the_box_of_the_constrained_columns() -> None:
    from monokernel.monotone import cut

    lower, upper = (0.0, -INF, 0.0, 1.0), (6.0, INF, 1.0, 1.0)
    boxes = cut(lower, upper, (0, 1, 3), 4)
    assert [(l[0], u[0]) for l, u in boxes] == [(0.0, 1.5), (1.5, 3.0), (3.0, 4.5), (4.5, 6.0)]
    assert all(l[1:] == lower[1:] and u[1:] == upper[1:] for l, u in boxes)
    assert len(cut((0.0,) * 3, (1.0,) * 3, (0, 2), 7)) == 6


@pytest.mark.parametrize("seed", range(8))
def test_no_point_contradicts_in_random_programs(seed: int) -> None:
    """As ``--of programs`` tries them."""
    _, outside, what = soundness.programs(1000 + seed)
    assert outside == 0, what


@pytest.mark.parametrize("seed", range(8))
def test_no_point_contradicts_in_random_networks_and_boxes(seed: int) -> None:
    """A few hundred pairs of those that ``python -m benchmarks soundness`` tries in numbers."""
    pairs, outside, what = soundness.trial(1000 + seed)
    assert pairs >= 50
    assert outside == 0, what


def test_a_bound_that_is_not_rounded_outwards_is_contradicted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What is tried so often sees an end that is off by the last digits of float64."""

    def nearest(*given: Any) -> Interval:
        lower, upper, _ = jacobian(*given)
        middle, radius = 0.5 * (lower + upper), 0.5 * (upper - lower)
        points = radius <= 1e-11 * middle.abs()  # a box without extent
        return Interval(torch.where(points, middle, lower), torch.where(points, middle, upper))

    monkeypatch.setattr(soundness, "jacobian", nearest)
    assert sum(soundness.trial(seed)[1] for seed in range(12)) > 0


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_weights_that_are_no_numbers_prove_nothing(value: float) -> None:
    """Wherever they are: neither the bound nor an output is a number that could be trusted."""
    count = len(list(chain().parameters()))
    for box in ((-1.0, 2.0), (-INF, INF)):
        for σ in (nn.ReLU, nn.Tanh, nn.SiLU):
            for i in range(count):
                m = model(chain(σ), lower=box[0], upper=box[1])
                with torch.no_grad():
                    list(m.parameters())[i].view(-1)[0] = value
                bound = m.bound[:, 1]
                # The other output does not see the last layer's first row.
                assert not bound[0].isfinite(), (i, σ)
                assert not m(torch.zeros(1, D))[0, 0].isfinite()
                with pytest.raises(ValueError, match="finite bound"):
                    m.frozen()


def test_bounds_hold_against_numbers_of_more_digits() -> None:
    """In float64 the rounding of a sampled slope is as large as that of the bound: here the slope
    is computed with eleven bits more."""
    numpy = pytest.importorskip("numpy")
    if numpy.finfo(numpy.longdouble).eps > 2e-19:
        pytest.skip("this processor has no longer floats")
    slopes_of = {
        nn.ReLU: (lambda a: numpy.maximum(a, 0), lambda a: (a > 0) * 1.0),
        nn.Tanh: (numpy.tanh, lambda a: 1 - numpy.tanh(a) ** 2),
        nn.Sigmoid: (lambda a: 1 / (1 + numpy.exp(-a)), lambda a: 1 / (2 + 2 * numpy.cosh(a))),
    }
    for σ, (value, slope) in slopes_of.items():
        for seed in range(15):
            mlp = chain(σ, dtype=torch.float64, seed=seed, width=8)
            with torch.no_grad():
                mlp[0].weight[4:] = mlp[0].weight[:4]  # type: ignore[index, operator]
                mlp[0].bias[4:] = mlp[0].bias[:4]  # type: ignore[index, operator]
                mlp[2].weight[:, 4:] = -mlp[2].weight[:, :4]  # type: ignore[index, operator]
                mlp[2].weight[:, 4:] += 1e-13 * torch.randn(8, 4)  # type: ignore[index, operator]
            x = torch.randn(D, dtype=torch.float64)
            m = model(mlp, lower=x.tolist(), upper=x.tolist())
            h, J = x.numpy().astype(numpy.longdouble), numpy.eye(D, dtype=numpy.longdouble)
            for layer in mlp:
                if isinstance(layer, nn.Linear):
                    W = layer.weight.detach().numpy().astype(numpy.longdouble)
                    h, J = W @ h + layer.bias.detach().numpy(), W @ J
                else:
                    h, J = value(h), slope(h)[:, None] * J
            exact = J * numpy.array(DIRECTION)
            bound = m.bound.detach().numpy()
            assert (exact >= bound)[:, [1, 3, 4]].all()
            term = m._linear_term(x)[0].detach().numpy() * numpy.array(DIRECTION)
            assert (exact + term >= 0)[:, [1, 3, 4]].all()
            assert (exact - bound)[:, [1, 3, 4]].max() < 1e-11


def test_the_gradient_of_the_bound() -> None:
    mlp = chain(nn.Tanh, dtype=torch.float64, width=4)
    m = model(mlp, lower=-0.2, upper=0.3)
    columns = [1, 3, 4]
    names = [n for n, _ in m.named_parameters()]

    def bound(*values: Tensor) -> Tensor:
        weights = dict(zip(names, values, strict=True))
        held = copy.copy(m)
        return torch.func.functional_call(
            Bound(held), {f"m.{n}": w for n, w in weights.items()}, ()
        )

    class Bound(nn.Module):
        def __init__(self, m: Monotone) -> None:
            super().__init__()
            self.m = m

        def forward(self) -> Tensor:
            return self.m.bound[:, columns]

    params = tuple(p.detach().clone().requires_grad_() for p in m.parameters())
    assert torch.autograd.gradcheck(bound, params, atol=1e-6)


# --- the native bound -----------------------------------------------------------------------------

native = pytest.mark.skipif(cpu._operators() is None, reason="the native operators were not built")


class Normed(nn.Module):
    """Norms with all that lies around them: a residual, scales, shifts, a second norm."""

    def __init__(self, norm: Callable[[int], nn.Module] = nn.LayerNorm) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(D, 8), norm(8), nn.Linear(8, 8)
        self.other, self.o = norm(8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        h = h + nn.functional.silu(self.b(self.norm(h)))
        y: Tensor = self.o(torch.tanh(self.other(h)))
        return y


class Mixed(nn.Module):
    """The kinds of nodes that ordinary networks seldom have."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.o = nn.Linear(D, 8), nn.Linear(8, 8), nn.Linear(8, 2)
        self.each, self.one, self.dropout = nn.PReLU(8), nn.PReLU(), nn.Dropout(0.3)
        self.scale, self.shift = nn.Parameter(torch.randn(8)), nn.Parameter(torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        h = self.each(self.a(x))
        g = self.one(self.b(h)) * self.scale + self.shift
        g = 2.5 - 0.5 * torch.cat([g[:, ::2], self.dropout(h)[:, :4]], 1)
        g = g * h + g * g
        y: Tensor = self.o(g + self.b(g).sum(-1, keepdim=True))
        return y


PROGRAMS: dict[str, Callable[[], nn.Module]] = {
    name: lambda name=name: zoo.network(name, D, 1 if name == "squeezed" else 2, 8)  # type: ignore[misc]
    for name in zoo.ZOO
    if name not in ("softmax", "log-softmax", "mixture of experts")
}
PROGRAMS |= {name: lambda σ=σ: chain(σ) for name, σ in ACTIVATIONS.items()}  # type: ignore[misc]
PROGRAMS |= {"LayerNorm twice": Normed, "RMSNorm twice": lambda: Normed(nn.RMSNorm)}
PROGRAMS["mixed"] = Mixed


def by_intervals(m: Monotone) -> Monotone:
    """The same, computed by PyTorch alone."""
    plain = copy.copy(m)
    plain._lift = lambda *_: None  # type: ignore[method-assign]
    return plain


def native_of(m: Monotone) -> tuple[cpu.Lift, list[Tensor | None]]:
    """What bounds it, and the parameters."""
    nodes, params, dtype, exact = m._program()
    lift = m._lift(nodes, dtype)
    assert exact
    assert lift is not None
    return lift, [p for p in params if not isinstance(p, Key)]


def bounds_of(m: Monotone) -> tuple[Tensor, list[Tensor]]:
    """The bound, and the gradient of a combination of it."""
    bound = m.bound[:, [1, 3, 4]]
    factors = torch.linspace(-1, 2, bound.numel(), dtype=bound.dtype).view_as(bound)
    params = list(m.parameters())
    found = torch.autograd.grad((bound * factors).sum(), params, materialize_grads=True)
    return bound.detach(), list(found)


@native
@pytest.mark.parametrize("box", [(-1.0, 2.0), (-0.1, 0.1), (0.3, 0.3), (-INF, INF), (-1.0, INF)])
@pytest.mark.parametrize("name", PROGRAMS)
def test_the_native_bound_is_that_of_the_intervals(
    name: str, box: tuple[float, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for rounding, as is its gradient; and where there is none, neither has one."""
    monkeypatch.setattr(Monotone, "_check_bounded", lambda *_: None)
    torch.manual_seed(0)
    mlp = PROGRAMS[name]().double()
    for parts in (1, 3):
        m = model(mlp, lower=box[0], upper=box[1], parts=parts)
        native_of(m)
        (bound, grads), (want, expected) = bounds_of(m), bounds_of(by_intervals(m))
        assert torch.equal(bound.isfinite(), want.isfinite())
        if not bound.isfinite().all():
            assert math.isinf(box[1]) or name == "CELU below 0"
            continue
        near = 1e-7 if name.startswith("Softplus") else 1e-9  # within 2e-9 of a line
        torch.testing.assert_close(bound, want, rtol=near, atol=near)
        size = max(float(g.abs().max()) for g in expected)
        for g, e in zip(grads, expected, strict=True):
            torch.testing.assert_close(g, e, rtol=near, atol=max(near * size, 1e-100))


@native
@pytest.mark.parametrize("open_", [{0: 1}, {0: -1}, {0: 1, 3: 1}, {0: 1, 3: -1}, {0: 0}])
@pytest.mark.parametrize("away", [0.0, 6.0])
@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
def test_the_native_bound_of_a_norm_over_a_box_with_one_end(
    norm: Callable[[int], nn.Module], away: float, open_: dict[int, int]
) -> None:
    """Of the columns that have no upper (1), lower (-1) or no end at all (0). Each goes into one
    input of the norm alone, so that the others have ends; ``away`` from 0 all of them have a least
    square."""
    torch.manual_seed(3)
    mlp = nn.Sequential(nn.Linear(D, 6), norm(6), nn.Tanh(), nn.Linear(6, 2)).double()
    lower, upper = [-0.3] * D, [0.4] * D
    with torch.no_grad():
        mlp[0].bias.mul_(2).add_(away)  # type: ignore[union-attr, operator]
        mlp[1].weight.add_(0.3 * torch.randn(6))  # type: ignore[operator]
        for c, side in open_.items():
            mlp[0].weight[:, c] = 0  # type: ignore[index, operator]
            mlp[0].weight[c, c] = 0.7  # type: ignore[index, operator]
            lower[c] = lower[c] if side > 0 else -INF
            upper[c] = upper[c] if side < 0 else INF
    m = model(mlp, lower=lower, upper=upper, margin=2.0)
    (bound, grads), (want, expected) = bounds_of(m), bounds_of(by_intervals(m))
    torch.testing.assert_close(bound, want, rtol=1e-9, atol=1e-9)
    for g, e in zip(grads, expected, strict=True):
        torch.testing.assert_close(g, e, rtol=1e-9, atol=1e-9)
    assert any(e.abs().max() > 0 for e in expected)
    lift, params = native_of(m)
    x = torch.rand(3, D, dtype=torch.float64)
    values = [p.detach().clone().requires_grad_() for p in params if p is not None]
    there = values[0].detach() != 0  # a weight that is not is none by which the bound has a rate

    def step(W: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        return lift(x, [W * there, *rest])

    assert torch.autograd.gradcheck(step, values, atol=1e-6)


@native
@pytest.mark.parametrize("name", [*ACTIVATIONS, "LayerNorm twice", "mixed"])
def test_the_native_bound_in_float32_is_that_of_the_same_weights_in_float64(name: str) -> None:
    """It is computed in double, and rounded once, downwards."""
    torch.manual_seed(1)
    mlp = PROGRAMS[name]()
    box = (0.1, 0.2) if name == "CELU below 0" else (-0.5, 0.5)
    bound = model(mlp, lower=box[0], upper=box[1]).bound
    exact = model(mlp.double(), lower=box[0], upper=box[1]).bound
    known = ~exact.isnan()
    assert (bound.double() <= exact)[known].all()
    torch.testing.assert_close(bound.double()[known], exact[known], rtol=2e-7, atol=1e-30)


@native
@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("net", [Normed, lambda: Normed(nn.RMSNorm), Mixed])
def test_parameters_of_any_node_that_are_no_numbers_prove_nothing(
    net: Callable[[], nn.Module], value: float
) -> None:
    for i in range(len(list(net().parameters()))):
        torch.manual_seed(0)
        m = model(net(), lower=-0.5, upper=0.5)
        assert m.bound[0, 1].isfinite()
        with torch.no_grad():
            list(m.parameters())[i].view(-1)[0] = value
        assert not m.bound[0, 1].isfinite(), i
        assert not m(torch.zeros(1, D))[0, 0].isfinite()


# What PyTorch itself computes with numbers of float32, or as a line.
COARSE = ("Hardsigmoid", "CELU below 0", "Softplus", "Softplus steep")


@native
@pytest.mark.parametrize(
    ("name", "dtype"),
    # Of the others intervals.py rounds too much in float32 to be compared with.
    [(name, torch.float64) for name in PROGRAMS] + [(name, torch.float32) for name in ACTIVATIONS],
)
def test_the_native_step_is_that_of_pytorch(name: str, dtype: torch.dtype) -> None:
    """y and its gradient, where the network, the bound and the linear term are one call."""
    torch.manual_seed(2)
    box = (0.1, 0.2) if name == "CELU below 0" else (-0.3, 0.3)
    m = model(PROGRAMS[name]().to(dtype).eval(), lower=box[0], upper=box[1], margin=0.5, parts=2)
    x = sampled(-1, 1, 60).to(dtype)
    assert m._in_one(x) is not None
    found = []
    for each in (m, by_intervals(m)):
        y = each(x)
        factors = torch.linspace(-1, 2, y.numel(), dtype=dtype).view_as(y)
        found.append((y, torch.autograd.grad((y * factors).mean(), list(m.parameters()))))
    (y, grads), (want, expected) = found
    near = 2e-3 if dtype == torch.float32 else 1e-6 if name in COARSE else 1e-9
    torch.testing.assert_close(y, want, rtol=near, atol=near * want.abs().max().item())
    size = max(float(g.abs().max()) for g in expected)
    for g, e in zip(grads, expected, strict=True):
        torch.testing.assert_close(g, e, rtol=near, atol=near * size)


@native
@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("σ", [nn.SiLU, nn.ReLU, nn.LeakyReLU, nn.Softplus, nn.ELU])
def test_the_gradient_of_the_native_step(σ: type[nn.Module], parts: int) -> None:
    """Against differences; of x too, which the module leaves to PyTorch."""
    mlp = chain(σ, dtype=torch.float64, width=4)
    m = model(mlp, lower=-0.3, upper=0.4, margin=2.0, parts=parts)
    lift, params = native_of(m)
    x = (torch.rand(7, D, dtype=torch.float64) - 0.5).requires_grad_()
    values = [p.detach().clone().requires_grad_() for p in params if p is not None]
    assert torch.autograd.gradcheck(lambda x, *θ: lift(x, θ), (x, *values), atol=1e-6)


@native
def test_what_the_native_operator_is_not_asked_for() -> None:
    """Nodes without a rule in the library, parameters that are computed."""
    x = sampled(-1, 2, 8)
    assert model(zoo.network("softmax", D, 2, 8))._in_one(x) is None
    norm = nn.Sequential(nn.Linear(D, 8), nn.BatchNorm1d(8), nn.Linear(8, 2)).eval()
    assert model(norm)._in_one(x) is None  # its scale and shift are rounded to float32
    assert model(norm.double())._in_one(x.double()) is not None


@native
@pytest.mark.parametrize("make", [chain, Normed, Mixed])
def test_where_x_wants_a_gradient(make: Callable[[], nn.Module]) -> None:
    """One native step, and PyTorch's second derivatives, of x and of the weights."""
    m = model(make().double().eval(), lower=-0.3, upper=0.4, margin=1.0)
    x = (torch.rand(9, D, dtype=torch.float64) - 0.5).requires_grad_()
    assert m._in_one(x) is not None
    found = []
    for each in (m, by_intervals(m)):
        y = each(x)
        first = torch.autograd.grad(y.square().sum(), [x, *m.parameters()], create_graph=True)
        second = torch.autograd.grad(
            sum(g.square().sum() for g in first), [x, *m.parameters()], materialize_grads=True
        )
        plain = torch.autograd.grad(each(x).square().sum(), [x, *m.parameters()])
        found.append([y, *first, *second, *plain])
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-8 * want.abs().max().item())


@native
def test_backward_twice_where_x_wants_a_gradient() -> None:
    m = model(chain(dtype=torch.float64))
    x = torch.rand(4, D, dtype=torch.float64).requires_grad_()
    loss = m(x).square().sum()
    loss.backward(retain_graph=True)
    once = [x.grad, *grads(m)]
    x.grad = None
    m.zero_grad()
    loss.backward()
    torch.testing.assert_close([x.grad, *grads(m)], once, rtol=0, atol=0)


@native
def test_many_gradients_of_x_at_once() -> None:
    m = model(chain(dtype=torch.float64))
    x = torch.rand(4, D, dtype=torch.float64)
    J = torch.autograd.functional.jacobian(m, x, vectorize=True)
    want = torch.autograd.functional.jacobian(by_intervals(m), x)
    torch.testing.assert_close(J, want, rtol=1e-9, atol=1e-9)


@native
def test_second_derivatives_in_the_weights_alone() -> None:
    """Of y and of the bound; whoever asks for one too late is told so."""
    m = model(chain(dtype=torch.float64), margin=3.0)
    x, params = torch.rand(4, D, dtype=torch.float64), list(m.parameters())
    found = []
    for each in (m, by_intervals(m)):
        for y in (each(x), each.bound[:, 1]):
            first = torch.autograd.grad(
                y.square().sum(), params, create_graph=True, materialize_grads=True
            )
            total = sum(g.square().sum() for g in first)
            found.append(torch.autograd.grad(total, params, materialize_grads=True))  # type: ignore[arg-type]
    for got, want in zip(found[:2], found[2:], strict=True):
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8 * b.abs().max().item())
    y = m(x)
    m._lifts.clear()
    del m, each
    gc.collect()
    torch.autograd.grad(y.sum(), params, retain_graph=True)
    with pytest.raises(RuntimeError, match="Monotone: a second derivative was asked for"):
        torch.autograd.grad(y.sum(), params, create_graph=True)


@native
def test_autocast_of_rows_that_are_rounded_and_of_weights_that_are_not_its_own() -> None:
    x = sampled(-1, 2, 5)
    m = model()
    with torch.autocast("cpu", torch.bfloat16):
        y = m._in_one(x.bfloat16())
        assert y is not None
        torch.testing.assert_close(y, m(x.bfloat16().float()), rtol=0, atol=0)
        double = model(chain(dtype=torch.float64))
        assert double._in_one(x) is None
        assert double(x.double()).dtype == torch.float64
    half = model().bfloat16()
    with torch.autocast("cpu", torch.float16):
        assert half(x).dtype == torch.float16


@native
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["wide and deep", "pre-norm LayerNorm", "squeezed", "SwiGLU"])
def test_autocast_in_one(name: str, dtype: torch.dtype) -> None:
    """Of the weights as they are: y is that of float32, rounded once, its dtype the network's."""
    net = zoo.network(name, D, 1 if name == "squeezed" else 2, 8)
    for mlp in (net, chain()):
        m = model(mlp, lower=0.0, upper=1e-4)
        x = torch.rand(9, D) - 0.5
        plain = m(x)
        for rows in (x, x.clone().requires_grad_()):
            with torch.autocast("cpu", dtype=dtype):
                want = mlp(rows)
                y = m._in_one(rows)
            assert y is not None
            assert (y.dtype, y.shape) == (want.dtype, want.shape)
            torch.testing.assert_close(y, plain.to(dtype), rtol=0, atol=0)
            y.float().square().sum().backward()
            assert all(p.grad is not None and p.grad.isfinite().all() for p in mlp.parameters())
    assert rows.grad is not None


@native
@pytest.mark.parametrize("served", [True, False])
def test_a_forward_of_ones_own_runs_once_a_call(served: bool) -> None:
    """As PyTorch runs it, though it is read as well."""

    class Counting(Normed):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            y = super().forward(x)
            return y if served else torch.softmax(y, -1)

    m = model(Counting(), lower=-0.1, upper=0.1)
    assert isinstance(m.mlp, Counting)
    for i in range(3):
        m(torch.rand(4, D))
        assert m.mlp.calls == i + 1
    assert m._readable == {(True, torch.float32, False): served}


@native
def test_an_operator_that_is_called_with_anything() -> None:
    """It looks at every operand before the library does."""
    m = model(chain())
    lift, params = native_of(m)
    x = torch.zeros(3, D)
    with pytest.raises(RuntimeError, match="expected float32 of shape"):
        lift(x[:, :4], params)
    with pytest.raises(RuntimeError, match="weight of linear layer 1: expected float32"):
        lift(x, [params[1], *params[1:]])
    y, bound = lift(x, params)
    with torch.no_grad():
        m.mlp[2].weight.untyped_storage().resize_(0)  # type: ignore[index, union-attr, operator]
    with pytest.raises(RuntimeError, match="with 0 of its"):
        (y.sum() + bound.sum()).backward()


@native
@pytest.mark.parametrize("shape", [(D,), (0, D), (2, 3, D)])
def test_any_leading_axes_in_one(shape: tuple[int, ...]) -> None:
    m = model()
    x = torch.rand(shape)
    assert m._in_one(x) is not None
    torch.testing.assert_close(m(x), by_intervals(m)(x), rtol=1e-4, atol=1e-4)
    assert m(x).shape == (*shape[:-1], 2)


# --- the promise ----------------------------------------------------------------------------------


def falling(x: Tensor) -> Tensor:
    """A target that goes the wrong way in every constrained column."""
    t = -x[:, 1:2] + x[:, 3:4] - x[:, 4:5] + x[:, :1].sin()
    return torch.cat([t, t], 1)


def lowest(net: nn.Module, x: Tensor) -> float:
    return (slopes(net, x) * torch.tensor(DIRECTION))[..., [1, 3, 4]].min().item()


@pytest.mark.parametrize("box", [(-1.0, 2.0), (-INF, INF)])
@pytest.mark.parametrize("σ", [nn.ReLU, nn.SiLU, nn.Tanh])
def test_monotone_at_every_step_of_training(σ: type[nn.Module], box: tuple[float, float]) -> None:
    mlp = chain(σ)
    m = model(mlp, lower=box[0], upper=box[1], margin=0.05)
    optimizer = torch.optim.Adam(m.parameters(), lr=0.02)
    x = sampled(*box, 128).clamp(-2, 2)
    losses = []
    for _ in range(25):
        optimizer.zero_grad()
        loss = (m(x) - falling(x)).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        assert lowest(m, sampled(*box, 100)) >= 0.05 - 1e-9
    assert losses[-1] < losses[0]


def test_nothing_jumps_at_the_start() -> None:
    """The linear term is 0 in the middle of the box, whatever it lifts."""
    mlp = chain()
    m = model(mlp, lower=[-1, 0, 2, -3, 1], upper=[1, 4, 3, -1, INF])
    x = torch.tensor([[0.0, 2.0, 2.5, -2.0, 0.0]])
    torch.testing.assert_close(m(x), mlp(x), rtol=1e-5, atol=1e-5)
    assert (m.lift >= 0).all()
    assert m.lift[:, 1].max() > 0


def test_no_term_where_the_network_is_monotone_already() -> None:
    mlp = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1))
    with torch.no_grad():
        mlp[0].weight.abs_()
        mlp[2].weight.abs_()  # type: ignore[operator]
    m = Monotone(mlp, -1, 1, direction=(1, 1))
    assert (m.bound > 0).all()
    assert (m.lift == 0).all()
    x = torch.randn(8, 2)
    torch.testing.assert_close(m(x), mlp(x), rtol=1e-6, atol=1e-6)


def test_directions_of_each_output() -> None:
    mlp = chain()
    m = model(mlp, direction=[(1, 0, 0, 0, 0), (0, 0, -1, 0, 1)])
    free = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 0, 1, 0]]).bool()
    assert torch.equal(m.bound.isnan(), free)
    assert (m.lift[free] == 0).all()
    J = slopes(m, sampled(-1, 2))
    assert (J[:, 0, 0] >= -1e-9).all()
    assert (J[:, 1, 2] <= 1e-9).all()
    assert (J[:, 1, 4] >= -1e-9).all()
    untouched = (J - slopes(mlp, sampled(-1, 2)))[:, free]
    assert untouched.abs().max() < 10  # other rows: only that it runs
    x = sampled(-1, 2)
    torch.testing.assert_close(slopes(m, x)[:, free], slopes(mlp, x)[:, free])


def test_squeezed_outputs_and_any_leading_axes() -> None:
    net = zoo.network("squeezed", D, 1, 8)
    m = model(net, lower=-0.5, upper=0.5)
    x = torch.rand(3, 4, D)
    assert m(x).shape == (3, 4)
    torch.testing.assert_close(m(x)[1, 2], m(x[1, 2].unsqueeze(0))[0])
    assert model()(x).shape == (3, 4, 2)


def test_dropout_is_monotone_for_every_mask() -> None:
    net = zoo.network("MLP with active dropout", D, 2, 8)
    m = model(net)
    x = sampled(-1, 2).double()
    m = m.double().train()
    J = value_and_jacobian(m, x[:, :0], x)[1] * torch.tensor(DIRECTION)
    assert (J[..., [1, 3, 4]] >= -1e-9).all()


def test_frozen_is_the_same_function_and_an_ordinary_module() -> None:
    m = model(margin=0.1)
    x = sampled(-1, 2)
    f = m.frozen()
    torch.testing.assert_close(f(x), m(x))
    assert lowest(f, x) >= 0.1 - 1e-12
    assert all(not p.requires_grad for p in f.parameters())
    with torch.no_grad():
        for p in m.parameters():
            p.zero_()
    assert f(x).abs().max() > 0  # a copy
    torch.testing.assert_close(pickle.loads(pickle.dumps(f))(x), f(x), rtol=0, atol=0)
    rows = torch.export.Dim("rows")
    program = torch.export.export(f, (x,), dynamic_shapes=({0: rows},))
    torch.testing.assert_close(program.module()(x[:7]), f(x[:7]))
    assert not any("monokernel" in str(node.target) for node in program.graph.nodes)
    scripted = torch.jit.trace(f, x)
    torch.testing.assert_close(scripted(x), f(x))


def test_frozen_onnx() -> None:
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    f = model().frozen()
    assert torch.onnx.export(f, (torch.zeros(3, D),), dynamo=True) is not None


def test_frozen_squeezes_as_the_network_does() -> None:
    m = model(zoo.network("squeezed", D, 1, 8), lower=0, upper=0.1)
    x = torch.rand(6, D)
    torch.testing.assert_close(m.frozen()(x), m(x))
    assert m.training
    assert not m.frozen().training


def test_the_penalty_takes_it_as_any_network() -> None:
    m = model(chain(dtype=torch.float64))
    x = sampled(-1, 2).double()
    y, penalty = fused_mono_penalty(
        m, x[:, :0], x, direction=DIRECTION, margin=0.5, return_output=True
    )
    torch.testing.assert_close(y, m(x))
    want = torch.relu(0.5 - slopes(m, x) * torch.tensor(DIRECTION))[..., [1, 3, 4]].sum()
    torch.testing.assert_close(penalty, want)
    (y.sum() + penalty).backward()
    got = grads(m)
    m.zero_grad()
    again, by_autograd = fused_mono_penalty(
        m, x[:, :0], x, direction=DIRECTION, margin=0.5, return_output=True, backend="reference"
    )
    (again.sum() + by_autograd).backward()
    torch.testing.assert_close(got, grads(m), rtol=1e-9, atol=1e-9)
    assert audit(m, x[:, :0], x, direction=DIRECTION).violation_rate == 0


# --- every way of training ------------------------------------------------------------------------


def data(dtype: torch.dtype = torch.float64, seed: int = 1) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    x = torch.rand(48, D, generator=g, dtype=dtype) * 3 - 1
    return x, falling(x)


def train(forward: Callable[[Tensor], Tensor], m: nn.Module, steps: int = 4) -> None:
    optimizer = torch.optim.SGD(m.parameters(), lr=0.01, momentum=0.9)
    for i in range(steps):
        x, t = (v[: 48 - 9 * i].clone() for v in data(seed=i))
        optimizer.zero_grad()
        with torch._dynamo.config.patch(error_on_recompile=i > 0):
            y = forward(x)
        (y - t).square().mean().backward()
        optimizer.step()


def shallow() -> Monotone:
    """The tracing of a bound is what takes time."""
    torch.manual_seed(0)
    return model(nn.Sequential(nn.Linear(D, 16), nn.SiLU(), nn.Linear(16, 2)).double())


def trained(forward_of: Callable[[Monotone], Callable[[Tensor], Tensor]]) -> list[Tensor]:
    m = shallow()
    train(forward_of(m), m)
    return [p.detach() for p in m.parameters()]


def test_compile_and_checkpoint_train_as_the_plain_loop_does() -> None:
    """In one graph for every step and number of rows."""
    torch._dynamo.reset()
    plain = trained(lambda m: m)
    ways: Sequence[Callable[[Monotone], Callable[[Tensor], Tensor]]] = (
        lambda m: torch.compile(m, fullgraph=True, dynamic=True, backend="aot_eager"),
        lambda m: lambda x: checkpoint(m, x, use_reentrant=False),
        lambda m: lambda x: checkpoint(m, x.clone().requires_grad_(), use_reentrant=True),
    )
    for way in ways:
        torch.testing.assert_close(trained(way), plain, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", zoo.ZOO)
def test_the_zoo_compiles_in_one_graph(name: str) -> None:
    """The compiler's graph is run as it is; what AOTAutograd makes of it is tried on one."""
    torch._dynamo.reset()
    net = zoo.network(name, D, 1 if name == "squeezed" else 2, 8, torch.float64)
    m = model(net, lower=-0.3, upper=0.4, margin=0.5)
    whole = name == "own forward"
    compiled = torch.compile(m, fullgraph=True, backend="aot_eager" if whole else "eager")
    x = torch.rand(9, D, dtype=torch.float64) - 0.4
    found = []
    for f in (compiled, m):
        for rows in (x, x.clone().requires_grad_()):
            torch.manual_seed(3)
            y = f(rows)
            inputs = [*net.parameters(), *([rows] if rows.requires_grad else [])]
            found.append([y, *torch.autograd.grad(y.square().mean(), inputs, allow_unused=True)])
    for got, want in zip(found[0] + found[1], found[2] + found[3], strict=True):
        assert (got is None) == (want is None)
        if want is not None:
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9 * want.abs().max().item())


@native  # PyTorch's own step in eager mode draws another mask
def test_compiled_it_sees_what_changes() -> None:
    """The margin, a layer, the mode; the rows as they come."""
    torch._dynamo.reset()
    m = model(zoo.network("MLP with active dropout", D, 2, 8, torch.float64).eval())
    compiled = torch.compile(m, fullgraph=True, dynamic=True, backend="eager")
    for change in (
        lambda: None,
        lambda: setattr(m, "margin", 3.0),
        lambda: m.mlp.__setitem__(2, nn.Identity()),  # type: ignore[operator]
        m.train,
    ):
        change()
        for n in (2, 7):
            x = torch.rand(n, D, dtype=torch.float64)
            torch.manual_seed(1)
            y = compiled(x)
            torch.manual_seed(1)
            torch.testing.assert_close(y, m(x), rtol=1e-9, atol=1e-9)


def test_compile_under_autocast() -> None:
    torch._dynamo.reset()
    m = model(zoo.network("wide and deep", D, 2, 8))
    compiled = torch.compile(m, fullgraph=True, backend="eager")
    x = torch.rand(5, D)
    with torch.autocast("cpu", torch.bfloat16):
        y = compiled(x)
        assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, m(x).bfloat16())


class Changing(nn.Module):
    """Its forward changes an attribute, which no captured forward may."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.calls = nn.Linear(D, 2), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        y: Tensor = self.net(x) + x[..., :1]
        return y


def test_compile_says_what_it_does_not_serve() -> None:
    torch._dynamo.reset()
    m = model(Changing())
    with pytest.raises(Exception, match="expected nodes of which a range is known"):
        torch.compile(m, fullgraph=True, backend="eager")(torch.zeros(3, D))


# --- weights that are computed --------------------------------------------------------------------


def spectral() -> Monotone:
    """Its power iterations have not converged, so each gives other weights."""
    torch.manual_seed(0)
    layers = [parametrizations.spectral_norm(nn.Linear(n, m)) for n, m in ((D, 8), (8, 2))]
    m = model(nn.Sequential(layers[0], nn.Tanh(), layers[1]).double(), margin=2.0).train()
    with torch.no_grad():
        for layer in layers:
            weight = layer.parametrizations.weight.original  # type: ignore[union-attr]
            weight.copy_(torch.randn_like(weight))  # type: ignore[arg-type]
    return m


@pytest.mark.parametrize("way", ["plain", "x", "autocast", "vmap", "compile", "PyTorch"])
def test_bound_and_network_have_the_same_weights(way: str) -> None:
    """Those of one power iteration, which is what a call of the network takes."""
    torch._dynamo.reset()
    m, twin = spectral(), spectral()
    x = sampled(-1, 2, 6).double()
    if way == "x":
        y = m(x.clone().requires_grad_())
    elif way == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            y = m(x)
    elif way == "vmap":
        y = torch.func.vmap(lambda row: m(row.unsqueeze(0))[0])(x)
    elif way == "compile":
        y = torch.compile(m, backend="eager")(x)
    else:
        y = (m if way == "plain" else by_intervals(m))(x)
    twin.mlp(x)
    for got, want in zip(m.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    twin.eval()
    torch.testing.assert_close(y, twin(x).to(y.dtype), rtol=1e-10, atol=1e-10)


def test_who_asks_for_the_bound_changes_nothing() -> None:
    """Nor does who makes the module: the next call takes its power iteration from where it was."""
    torch.manual_seed(0)
    mlp = nn.Sequential(
        nn.utils.parametrizations.spectral_norm(nn.Linear(D, 16)),
        nn.Tanh(),
        nn.utils.parametrizations.spectral_norm(nn.Linear(16, 2)),
    ).double()
    before = {name: t.clone() for name, t in mlp.state_dict().items()}
    m = model(mlp)
    bound, lift = m.bound, m.lift
    m.frozen()
    assert all(torch.equal(t, before[name]) for name, t in mlp.state_dict().items())
    assert torch.equal(bound.nan_to_num(), m.bound.nan_to_num())
    assert torch.equal(lift, m.lift)
    m(torch.zeros(3, D, dtype=torch.float64))
    assert any(not torch.equal(t, before[name]) for name, t in mlp.state_dict().items())
    bound.nansum().backward()
    assert all(p.grad is not None for p in mlp.parameters() if p.dim() == 2)


# --- without numbers ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["chain", "wide and deep", "squeezed", "pre-norm LayerNorm"])
def test_on_the_meta_device(name: str) -> None:
    """Shapes and dtypes, whether it was made there or moved; what needs numbers says so."""
    outputs = 1 if name == "squeezed" else 2
    net = chain() if name == "chain" else zoo.network(name, D, outputs, 8)
    moved = model(copy.deepcopy(net), lower=-0.1, upper=0.1).to("meta")
    made = model(copy.deepcopy(net).to("meta"), lower=-0.1, upper=0.1)
    x = torch.rand(2, 3, D)
    for m in (moved, made):
        y, want = m(x.to("meta")), net(x)
        assert (y.shape, y.dtype, y.is_meta) == (want.shape, want.dtype, True)
        assert y.requires_grad
        for ask in (lambda m=m: m.bound, lambda m=m: m.lift, lambda m=m: m.frozen()):  # type: ignore[misc]
            with pytest.raises(ValueError, match="expected weights with numbers, got some on"):
                ask()
    made.to_empty(device="cpu")
    made.mlp.load_state_dict(net.state_dict())
    torch.testing.assert_close(made(x), model(net, lower=-0.1, upper=0.1)(x), rtol=0, atol=0)


def test_lbfgs() -> None:
    m = model(chain(dtype=torch.float64))
    x, t = data()
    optimizer = torch.optim.LBFGS(m.parameters(), max_iter=6, line_search_fn="strong_wolfe")

    def closure() -> float:
        optimizer.zero_grad()
        loss = (m(x) - t).square().mean()
        loss.backward()
        return loss.item()

    first = closure()
    optimizer.step(closure)
    assert closure() < first
    assert lowest(m, x) >= -1e-12


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_computes_the_bound_in_full_precision(dtype: torch.dtype) -> None:
    m = model()
    x, t = data(torch.float32)
    plain = m.bound
    with torch.autocast("cpu", dtype=dtype):
        assert torch.equal(m.bound.nan_to_num(), plain.nan_to_num())
        y = m(x)
    assert y.dtype == dtype
    torch.testing.assert_close(y.float(), m(x), rtol=0.05, atol=0.05)
    (y.float() - t).square().mean().backward()
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in grads(m))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_networks(dtype: torch.dtype) -> None:
    m = model().to(dtype)
    x, _ = data(torch.float32)
    assert m(x.to(dtype)).dtype == dtype
    assert m.bound.dtype == torch.float32
    J = slopes(m.mlp, x) * torch.tensor(DIRECTION)
    assert (m.bound.double() - 1e-9 <= J)[..., [1, 3, 4]].all()
    m(x.to(dtype)).sum().backward()
    assert lowest(m.frozen(), x) >= -1e-6


@pytest.mark.parametrize("way", ["state_dict", "pickle", "torch.save", "deepcopy"])
def test_persistence(way: str) -> None:
    m = model(margin=0.1, parts=3)
    x = sampled(-1, 2)
    m(x).sum().backward()
    if way == "state_dict":
        assert set(m.state_dict()) == {f"mlp.{n}" for n in chain().state_dict()}
        fresh = model(chain(seed=9), margin=0.1, parts=3)
        fresh.load_state_dict(m.state_dict())
    elif way == "pickle":
        fresh = pickle.loads(pickle.dumps(m))
    elif way == "torch.save":
        buffer = io.BytesIO()
        torch.save(m, buffer)
        buffer.seek(0)
        fresh = torch.load(buffer, weights_only=False)
    else:
        fresh = copy.deepcopy(m)
    torch.testing.assert_close(fresh(x), m(x), rtol=0, atol=0)
    with torch.no_grad():
        for p in fresh.parameters():
            p.zero_()
    assert m(x).abs().max() > 0


def test_functional_call_and_vmap_over_an_ensemble() -> None:
    members = [model(chain(dtype=torch.float64, seed=s)) for s in range(3)]
    params, buffers = torch.func.stack_module_state(members)  # type: ignore[arg-type]
    x, _ = data()

    def call(params: dict[str, Tensor], buffers: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(members[0], (params, buffers), (x,))

    got = torch.func.vmap(call)(params, buffers)
    torch.testing.assert_close(got, torch.stack([m(x) for m in members]))


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"lower": 3}, "lower: expected at most upper = 2.0 in column 0, got 3.0"),
        ({"upper": [1, 2]}, r"upper: expected a number or shape \(d,\) = \(5,\)"),
        ({"lower": NAN}, "lower: expected an interval in column 0"),
        ({"lower": INF, "upper": INF}, "expected an interval in column 0"),
        ({"lower": "low"}, "lower: expected a number, a sequence"),
        ({"direction": 1}, "direction: expected"),
        ({"direction": (1, 2, 0, 0, 0)}, r"direction: expected entries in \{-1, 0, 1\}"),
        ({"direction": (1, 0)}, "direction: expected"),
        ({"direction": [DIRECTION] * 3}, "direction: expected"),
        ({"margin": INF}, "margin: expected a finite number"),
        ({"margin": "much"}, "margin: expected a number"),
        ({"parts": 0}, "parts: expected a number of parts >= 1, got 0"),
        ({"mlp": 3}, "mlp: expected an nn.Module"),
        ({"mlp": nn.Sequential(nn.Linear(D, 4), nn.Conv1d(1, 1, 1))}, "mlp: expected nodes .*Conv"),
        ({"mlp": nn.Sequential(nn.Linear(D, 4), nn.BatchNorm1d(4))}, "mlp: expected .*BatchNorm"),
        (
            {"mlp": nn.Sequential(nn.Linear(D, 4), nn.GLU(), nn.Linear(2, 1)), "lower": -INF},
            "mlp: expected slopes that are bounded on the box, got no finite bound for output 0",
        ),
        (
            {"mlp": nn.Sequential(nn.Linear(D, 4), nn.Hardshrink(), nn.Linear(4, 1))},
            "mlp: expected slopes that are bounded on the box",
        ),
    ],
)
def test_bad_input_is_one_sentence(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises((ValueError, TypeError), match=sentence) as error:
        model(**({"mlp": chain()} | options))
    assert not re.search(r"\n", str(error.value))


def test_every_kind_of_the_kernels_has_a_range() -> None:
    from monokernel.intervals import RULES
    from monokernel.nodes import RULES as NODES

    assert set(NODES) <= set(RULES)
    assert set(KINDS) <= set(RULES)


# --- what is changed after the start --------------------------------------------------------------


def test_a_network_that_was_changed_is_the_one_that_is_bounded() -> None:
    model = Monotone(network(2, 1, 2), -1.0, 1.0, direction=(0, 1, -1), margin=0.1)
    x = torch.zeros(2, 3, dtype=torch.float64)
    x[1, 1] = 1.0
    model.margin = 2.0
    y = model(x)
    assert (y[1] - y[0] >= 2.0 - 1e-9).all()
    last = len(model.mlp) - 1  # type: ignore[arg-type]
    model.mlp[last] = nn.Linear(model.mlp[last].in_features, 50).double()  # type: ignore[index]
    for rows in (x, x.clone().requires_grad_()):
        with pytest.raises(ValueError, match="expected 2 outputs, as many as it had"):
            model(rows)


def test_constants_of_inference_serve_a_training_step() -> None:
    model = Monotone(network(2, 1, 1), -1.0, 1.0, direction=(0, 1, -1))
    model._constants.clear()
    model._lifts.clear()
    x = torch.zeros(2, 3, dtype=torch.float64)
    with torch.inference_mode():
        model(x)
    model(x.requires_grad_()).sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_frozen_in_half_precision_is_called_and_proved(dtype: torch.dtype) -> None:
    """All of it in one dtype, its line rounded away from 0 where that is the wrong way."""
    m = model(margin=0.1, lower=-0.5, upper=0.5).to(dtype)
    deployed, x = m.frozen(), (torch.rand(5, D) - 0.5).to(dtype)
    assert deployed(x).dtype == dtype
    torch.testing.assert_close(deployed(x), m(x), rtol=0.05, atol=0.05)
    lift = deployed.linear.weight * torch.tensor(DIRECTION)  # type: ignore[operator, union-attr]
    assert (lift.double() >= m.lift.double()).all()
    box = -0.5 * torch.ones(D), 0.5 * torch.ones(D)
    found = certify(deployed, *box, direction=DIRECTION, margin=0.1, progress=False)
    assert found.status == "proved"


# --- what else may be done with it ---------------------------------------------------------------


def test_without_a_constraint_it_is_the_network() -> None:
    net, x = chain(), sampled(-1, 2, 4)
    m = Monotone(net, -1, 2, direction=[0] * D)
    assert torch.equal(m(x), net(x))
    assert m.bound.isnan().all()
    assert (m.lift == 0).all()
    assert torch.equal(m.frozen()(x), net(x))


def test_who_exports_or_traces_it_is_told_of_the_frozen_network() -> None:
    x = sampled(-1, 2, 4)
    for m in (model(), model(zoo.network("wide and deep", D, 2, 8))):
        for write in (partial(torch.export.export, m, (x,)), partial(torch.jit.trace, m, x)):
            with pytest.raises(ValueError, match=r"Monotone: expected its frozen\(\) to be export"):
                write()


def test_rows_that_are_none_of_its_box() -> None:
    m = model()
    with pytest.raises(ValueError, match=r"^x: expected shape \(..., 5\), got \(3, 4\)$"):
        m(torch.zeros(3, 4))
    with pytest.raises(TypeError, match=r"^x: expected a tensor, got list$"):
        m([[0.0] * 5])


def test_made_where_tensors_are_fake() -> None:
    with FakeTensorMode():
        m = model(zoo.ZOO["wide and deep"](D, 2, 8))
        assert m(torch.empty(3, D)).shape == (3, 2)


def test_a_weight_that_is_there_twice() -> None:
    net = nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, D), nn.Tanh(), nn.Linear(D, 2))
    net[2].weight = net[0].weight
    m = model(net.double(), margin=1.0)
    x = torch.rand(6, D, dtype=torch.float64)
    for rows in (x, x.clone().requires_grad_()):
        found = []
        for each in (m, by_intervals(m)):
            y = each(rows)
            found.append([y, *torch.autograd.grad(y.square().sum(), list(net.parameters()))])
        torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoint_of_a_dropout_where_x_wants_a_gradient(reentrant: bool) -> None:
    m = model(zoo.network("MLP with active dropout", D, 2, 8, torch.float64))
    found = []
    for f in (m, lambda x: checkpoint(m, x, use_reentrant=reentrant)):
        x = torch.linspace(-1, 2, 6 * D, dtype=torch.float64).view(6, D).requires_grad_()
        torch.manual_seed(5)
        m.zero_grad()
        y = f(x)
        y.square().sum().backward()
        found.append([y, x.grad, *grads(m)])
    torch.testing.assert_close(found[1], found[0], rtol=1e-12, atol=1e-12)
