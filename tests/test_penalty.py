"""The public call against the oracle: value, penalty and gradients, over shapes and options."""

from __future__ import annotations

import gc
import math
import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from monokernel import MonotonePenalty, fused_mono_penalty, value_and_jacobian
from tests.support import (
    ACTIVATION_MODULES,
    BACKENDS,
    HANDWRITTEN,
    activations_of,
    assert_same,
    gradients,
    mlp,
    oracle,
    oracle_penalties,
    points,
    skip_unless_served,
)

EVERY_BACKEND = pytest.mark.parametrize("backend", BACKENDS)
BOTH_MODES = pytest.mark.parametrize("mode", ["tangent", "adjoint"])


@EVERY_BACKEND
@BOTH_MODES
def test_the_problem_statement(backend: str, mode: str) -> None:
    """f(x, z) = [x + 3z, x + 4z, x + 5z]: the slopes are 3, 4, 5, not their sum 12."""
    f = nn.Linear(2, 3, bias=False)
    f.weight = nn.Parameter(torch.tensor([[1.0, 3.0], [1.0, 4.0], [1.0, 5.0]]))
    net, x, z = nn.Sequential(f), torch.randn(6, 1), torch.randn(6, 1)
    _, J = value_and_jacobian(net, x, z, mode=mode, backend=backend)
    assert torch.equal(J, torch.tensor([[[3.0], [4.0], [5.0]]]).expand(6, 3, 1))
    # [x + 3z, x - 4z]: the sum is -1, the violation 4.
    f = nn.Linear(2, 2, bias=False)
    f.weight = nn.Parameter(torch.tensor([[1.0, 3.0], [1.0, -4.0]]))
    assert fused_mono_penalty(nn.Sequential(f), x, z, mode=mode, backend=backend).item() == 24.0


@EVERY_BACKEND
@BOTH_MODES
@pytest.mark.parametrize("last", [False, True], ids=["", "activation-last"])
@pytest.mark.parametrize("name", ACTIVATION_MODULES)
def test_every_activation(name: str, last: bool, mode: str, backend: str) -> None:
    skip_unless_served(name, backend)
    activation = ACTIVATION_MODULES[name]
    for D, k in ((1, 1), (1, 3), (3, 2)):
        net = mlp(3, k, D, activation=activation, last=activation if last else None)
        compare(net, *points(37, 3, k), mode=mode, backend=backend, margin=0.05)


def compare(
    net: nn.Module,
    x1: Tensor,
    x2: Tensor,
    *,
    direction: Tensor | float = 1.0,
    weight: Tensor | float | None = None,
    margin: float = 0.0,
    hinge: str = "linear",
    reduction: str = "sum",
    mode: str = "auto",
    backend: str = "auto",
) -> None:
    """y, penalty and every gradient (parameters, x1, x2) of a task loss plus the penalty."""
    x1, x2 = x1.detach().requires_grad_(), x2.detach().requires_grad_()
    inputs = [x1, x2, *net.parameters()]
    y, J = oracle(net, x1, x2)
    want = oracle_penalties(J, direction, margin, hinge, weight)
    constrained = torch.as_tensor(direction).expand_as(J) != 0
    if reduction == "sum":
        want = want.sum()
    elif reduction == "mean":
        want = want[constrained].sum() / constrained.sum()
    task, mix = torch.randn_like(y), torch.randn_like(want)
    want_grads = gradients((y * task).sum() + (want * mix).sum(), *inputs)
    got_y, got = fused_mono_penalty(
        net,
        x1,
        x2,
        direction=direction,
        weight=weight,
        margin=margin,
        hinge=hinge,
        reduction=reduction,
        return_output=True,
        mode=mode,
        backend=backend,
    )
    got_grads = gradients((got_y * task).sum() + (got * mix).sum(), *inputs)
    assert_same([got_y, got, *got_grads], [y, want, *want_grads])
    # The penalty alone: no cotangent reaches y.
    alone = fused_mono_penalty(
        net, x1, x2, direction=direction, weight=weight, margin=margin, hinge=hinge,
        reduction=reduction, mode=mode, backend=backend,
    )  # fmt: skip
    y, J = oracle(net, x1, x2)
    want = oracle_penalties(J, direction, margin, hinge, weight)
    want = want[constrained].sum() / constrained.sum() if reduction == "mean" else want
    want = want.sum() if reduction == "sum" else want
    assert_same(
        gradients((alone * mix).sum(), *inputs), gradients((want * mix).sum(), *inputs), 1e-10
    )


@EVERY_BACKEND
@given(data=st.data())
def test_shapes_and_options(backend: str, data: st.DataObject) -> None:
    draw = data.draw
    torch.manual_seed(draw(st.integers(0, 2**16)))
    k, D, d1 = draw(st.integers(1, 7)), draw(st.integers(1, 7)), draw(st.integers(0, 4))
    hidden = draw(st.lists(st.integers(1, 19), max_size=3))
    batch = draw(st.sampled_from([(1,), (2,), (7,), (33,), (2, 5), (3, 1, 2), ()]))
    net = mlp(
        d1,
        k,
        D,
        hidden,
        draw(st.sampled_from(list(activations_of(backend).values()))),
        bias=draw(st.booleans()),
        last=draw(st.sampled_from([None, nn.Softplus(), nn.ReLU()])),
    )
    x1 = torch.randn(*batch, d1, dtype=torch.float64)
    x2 = torch.randn(*batch, k, dtype=torch.float64)
    signs = st.sampled_from([-1.0, 0.0, 1.0])
    shape = draw(st.sampled_from([(), (k,), (D, k)]))
    count = math.prod(shape)
    direction = torch.tensor(draw(st.lists(signs, min_size=count, max_size=count)))
    direction = direction.double().reshape(shape)
    reduction = draw(st.sampled_from(["sum", "none", "mean"]))
    if reduction == "mean" and not direction.any():
        reduction = "sum"
    shapes = [(), (k,), (D, 1), (D, k), (*batch, D, k), (*batch, 1, 1)]
    compare(
        net,
        x1,
        x2,
        direction=direction,
        weight=draw(
            st.sampled_from([None, 2.5, *(torch.rand(s, dtype=torch.float64) for s in shapes)])
        ),
        margin=draw(st.sampled_from([0.0, 0.1, -0.1])),
        hinge=draw(st.sampled_from(["linear", "squared"])),
        reduction=reduction,
        mode=draw(st.sampled_from(["auto", "tangent", "adjoint"])),
        backend=backend,
    )


@EVERY_BACKEND
@BOTH_MODES
@given(data=st.data())
def test_value_and_jacobian(backend: str, mode: str, data: st.DataObject) -> None:
    draw = data.draw
    torch.manual_seed(draw(st.integers(0, 2**16)))
    k, D, d1, N = (draw(st.integers(a, b)) for a, b in ((1, 4), (1, 4), (0, 3), (1, 40)))
    net = mlp(d1, k, D, draw(st.lists(st.integers(1, 9), max_size=3)), nn.Tanh())
    x1, x2 = (t.requires_grad_() for t in points(N, d1, k))
    inputs = [x1, x2, *net.parameters()]
    want = oracle(net, x1, x2)
    got = value_and_jacobian(net, x1, x2, mode=mode, backend=backend)
    assert_same(got, want)
    gy, gJ = torch.randn_like(want[0]), torch.randn_like(want[1])
    gJ[torch.rand(N) < 0.5] = 0  # rows that the backward may skip

    def loss(y: Tensor, J: Tensor) -> Tensor:
        return (y * gy).sum() + (J * gJ).sum()

    assert_same(gradients(loss(*got), *inputs), gradients(loss(*want), *inputs))


@EVERY_BACKEND
@BOTH_MODES
def test_empty_batch(backend: str, mode: str) -> None:
    net = mlp(2, 2, 3)
    x1, x2 = points(0, 2, 2)
    for reduction, shape in (("sum", ()), ("none", (0, 3, 2))):
        y, penalty = fused_mono_penalty(
            net, x1, x2, return_output=True, reduction=reduction, mode=mode, backend=backend
        )
        assert y.shape == (0, 3)
        assert penalty.shape == shape
        grads = gradients(y.sum() + penalty.sum(), *net.parameters())
        assert all(not g.any() for g in grads)
    mean = fused_mono_penalty(net, x1, x2, reduction="mean", mode=mode, backend=backend)
    assert mean == 0  # and no NaN, which would end a training


@EVERY_BACKEND
def test_inputs_of_any_layout(backend: str) -> None:
    net = mlp(3, 2, 2)
    x1, x2 = points(11, 3, 2)
    want = fused_mono_penalty(net, x1, x2, backend=backend)
    strided = (torch.randn(3, 11, dtype=torch.float64).t().copy_(x1), x2.repeat(1, 3)[:, ::3])
    strided = (strided[0], torch.stack([x2, x2], -1)[..., 0])
    assert_same([fused_mono_penalty(net, *strided, backend=backend)], [want])
    row = fused_mono_penalty(net, x1[:1].expand(5, 3), x2[:1].expand(5, 2), backend=backend)
    assert_same([row], [5 * fused_mono_penalty(net, x1[:1], x2[:1], backend=backend)])
    one = mlp(3, 1, 2)
    flat = fused_mono_penalty(one, x1, x2[:, 0], backend=backend)
    assert_same([flat], [fused_mono_penalty(one, x1, x2[:, :1], backend=backend)])
    y, penalty = fused_mono_penalty(
        one, x1[0], x2[0, 0], return_output=True, reduction="none", backend=backend
    )
    assert (y.shape, penalty.shape) == ((2,), (2, 1))


@EVERY_BACKEND
def test_transposed_and_strided_weights(backend: str) -> None:
    net = mlp(3, 2, 2)
    for m in net:
        if isinstance(m, nn.Linear):
            m.weight = nn.Parameter(m.weight.detach().t().contiguous().t())
            m.bias = nn.Parameter(torch.stack([m.bias.detach()] * 2, 1)[:, 0])
    compare(net, *points(9, 3, 2), backend=backend)


@EVERY_BACKEND
@BOTH_MODES
def test_frozen_and_shared_parameters(backend: str, mode: str) -> None:
    shared = nn.Linear(6, 6)
    net = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), shared, nn.Tanh(), shared, nn.Linear(6, 1))
    net = net.double()
    x1, x2 = points(20, 3, 2)
    compare(net, x1, x2, mode=mode, backend=backend)
    for frozen in ([net[0].weight], [net[0].weight, net[0].bias, shared.weight], [net[5].bias]):
        for p in frozen:
            p.requires_grad_(False)
        free = [p for p in net.parameters() if p.requires_grad]
        y, J = oracle(net, x1, x2)
        want = gradients(y.square().sum() + torch.relu(-J).sum(), *free)
        y, penalty = fused_mono_penalty(net, x1, x2, return_output=True, mode=mode, backend=backend)
        assert_same(gradients(y.square().sum() + penalty, *free), want)
        for p in frozen:
            p.requires_grad_(True)
    net.requires_grad_(False)
    assert not fused_mono_penalty(net, x1, x2, mode=mode, backend=backend).requires_grad


@EVERY_BACKEND
@pytest.mark.parametrize("norm", ["weight_norm", "spectral_norm", "orthogonal"])
def test_parametrized_weights(backend: str, norm: str) -> None:
    net = mlp(3, 2, 2, hidden=(6, 6))
    getattr(nn.utils.parametrizations, norm)(net[2])
    net.eval()  # spectral_norm: no power iteration between the two calls
    compare(net, *points(8, 3, 2), backend=backend)


@pytest.mark.parametrize("backend", HANDWRITTEN)
def test_spectral_norm_iterates_once_a_call(backend: str) -> None:
    net = mlp(3, 2, 2, hidden=(6, 6))
    nn.utils.parametrizations.spectral_norm(net[2])
    twin = mlp(3, 2, 2, hidden=(6, 6))
    nn.utils.parametrizations.spectral_norm(twin[2])
    twin.load_state_dict(net.state_dict())
    x1, x2 = points(8, 3, 2)
    y, _ = fused_mono_penalty(net, x1, x2, return_output=True, backend=backend)
    assert_same([y], [twin(torch.cat([x1, x2], -1))])
    assert_same([b for _, b in net.named_buffers()], [b for _, b in twin.named_buffers()], 1e-14)


@EVERY_BACKEND
def test_gradient_reaches_the_weight(backend: str) -> None:
    net = mlp(3, 2, 3)
    x1, x2 = points(12, 3, 2)
    weight = torch.rand(3, 2, dtype=torch.float64, requires_grad=True)
    _, J = oracle(net, x1, x2)
    want = gradients((torch.relu(-J) * weight).sum(), weight, *net.parameters())
    penalty = fused_mono_penalty(net, x1, x2, weight=weight, backend=backend)
    assert_same(gradients(penalty, weight, *net.parameters()), want)


@EVERY_BACKEND
@BOTH_MODES
def test_nan_is_never_a_zero_penalty(backend: str, mode: str) -> None:
    for activation in (nn.ReLU(), nn.Tanh(), nn.Hardtanh(), nn.Softplus()):
        net = mlp(3, 2, 2, activation=activation)
        x1, x2 = points(6, 3, 2)
        for bad in (x1, x2):
            before = bad[2, 1].item()
            bad[2, 1] = math.nan
            entries = fused_mono_penalty(net, x1, x2, reduction="none", mode=mode, backend=backend)
            assert entries[2].isnan().all()
            assert entries[[0, 1, 3, 4, 5]].isfinite().all()
            assert fused_mono_penalty(net, x1, x2, mode=mode, backend=backend).isnan()
            bad[2, 1] = before
        with torch.no_grad():
            net[2].weight[0, 0] = math.nan
        assert fused_mono_penalty(net, x1, x2, mode=mode, backend=backend).isnan()


NOT_ORDINARY = [math.inf, -math.inf, math.nan, 1e38, -1e38, 3e38, -2e19, 1e-45, -104.0, 0.0]


@EVERY_BACKEND
@BOTH_MODES
@pytest.mark.parametrize("name", ACTIVATION_MODULES)
def test_a_nan_of_output_or_slope_is_a_nan_of_the_penalty(
    backend: str, mode: str, name: str
) -> None:
    """Whatever made it: inputs, weights and biases that are not finite, or so large that products
    of them are not. The other rows keep their finite penalties."""
    skip_unless_served(name, backend)
    met = 0
    for seed in range(12):
        torch.manual_seed(seed)
        net = mlp(2, 2, 2, (5, 4), ACTIVATION_MODULES[name], dtype=torch.float32)
        x1, x2 = points(24, 2, 2, torch.float32)
        with torch.no_grad():
            for t in (x1, x2) if seed % 2 else net.parameters():
                places = torch.randint(t.numel(), (1 + t.numel() // 16,))
                t.view(-1)[places] = torch.tensor(NOT_ORDINARY)[torch.randint(10, places.shape)]
        options = {"mode": mode, "backend": backend}
        y, J = value_and_jacobian(net, x1, x2, **options)
        entries = fused_mono_penalty(net, x1, x2, margin=0.1, reduction="none", **options)
        assert J[y.isnan()].isnan().all()
        assert torch.equal(entries.isnan(), J.isnan())
        total = fused_mono_penalty(net, x1, x2, margin=0.1, **options)
        assert not J.isnan().any() or total.isnan()
        met += int(J.isnan().any())
    assert met >= 3


@EVERY_BACKEND
@BOTH_MODES
@pytest.mark.parametrize("hinge", ["linear", "squared"])
def test_what_violates_nothing_is_zero_whatever_its_weight(
    backend: str, mode: str, hinge: str
) -> None:
    net = mlp(3, 2, 2)
    x1, x2 = points(40, 3, 2)
    options = {"hinge": hinge, "mode": mode, "backend": backend}
    plain = fused_mono_penalty(net, x1, x2, reduction="none", **options)
    holds = plain == 0
    assert holds.any()
    assert not holds.all()
    params = list(net.parameters())
    want = gradients(plain.sum(), *params)
    for odd in (math.inf, -math.inf, math.nan):
        weight = torch.where(holds, odd, 1.0)
        factors = () if odd < 0 else (weight, weight.clone().requires_grad_())  # < 0 is refused
        for factor in factors:
            entries = fused_mono_penalty(net, x1, x2, weight=factor, reduction="none", **options)
            assert_same([entries, *gradients(entries.sum(), *params)], [plain, *want])
        entries = fused_mono_penalty(net, x1, x2, reduction="none", **options)
        got = torch.autograd.grad(entries, params, weight, materialize_grads=True)
        assert_same(got, want)


@EVERY_BACKEND
@BOTH_MODES
def test_free_entries_never_count(backend: str, mode: str) -> None:
    """Not with a margin, and not where the slope is NaN."""
    net = mlp(3, 2, 2)
    x1, x2 = points(6, 3, 2)
    entries = fused_mono_penalty(
        net, x1, x2, direction=[1, 0], margin=5.0, reduction="none", mode=mode, backend=backend
    )
    assert (entries[..., 1] == 0).all()
    assert (entries[..., 0] > 0).all()
    x1[0, 0] = math.nan
    options = {"direction": 0, "margin": 5.0, "mode": mode, "backend": backend}
    y, penalty = fused_mono_penalty(net, x1, x2, return_output=True, **options)
    assert y[0].isnan().all()
    assert penalty.item() == 0.0


@EVERY_BACKEND
def test_the_hinge_has_no_slope_at_the_margin(backend: str) -> None:
    """A slope of exactly the margin: zero penalty and, as torch's relu has it, zero gradient."""
    linear = nn.Linear(2, 1, bias=False)
    linear.weight = nn.Parameter(torch.tensor([[0.3, 0.5]]))
    penalty = fused_mono_penalty(
        nn.Sequential(linear), torch.randn(4, 1), torch.randn(4, 1), margin=0.5, backend=backend
    )
    (g,) = gradients(penalty, linear.weight)
    assert penalty.item() == 0.0
    assert not g.any()


@EVERY_BACKEND
@BOTH_MODES
def test_two_runs_give_the_same_bits(backend: str, mode: str) -> None:
    net = mlp(5, 3, 2, hidden=(33, 17), dtype=torch.float32)
    x1, x2 = points(3000, 5, 3, torch.float32)

    def run() -> list[Tensor]:
        y, penalty = fused_mono_penalty(net, x1, x2, return_output=True, mode=mode, backend=backend)
        return [y, penalty, *gradients(y.square().sum() + penalty, *net.parameters())]

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


@EVERY_BACKEND
@BOTH_MODES
def test_nothing_outlives_the_step(backend: str, mode: str) -> None:
    """No reference cycle holds the graph, so memory does not grow over the iterations."""
    net = mlp(3, 2, 2)
    gc.collect()
    gc.disable()
    try:
        y, penalty = fused_mono_penalty(
            net, *points(7, 3, 2), return_output=True, mode=mode, backend=backend
        )
        alive = [weakref.ref(t) for t in (y, penalty)]
        (y.sum() + penalty).backward()
        del y, penalty
        assert all(ref() is None for ref in alive)
    finally:
        gc.enable()


@EVERY_BACKEND
def test_module(backend: str) -> None:
    net = mlp(3, 2, 2)
    x1, x2 = points(7, 3, 2)
    weight = torch.rand(2, 2, dtype=torch.float64)
    options = {"direction": [1, -1], "margin": 0.1, "hinge": "squared", "reduction": "mean"}
    module = MonotonePenalty(net, weight=weight, backend=backend, **options)
    want = fused_mono_penalty(
        net, x1, x2, weight=weight, return_output=True, backend=backend, **options
    )
    assert_same(module(x1, x2), want)
    own = {"weight", "_extra_state"}
    assert set(module.state_dict()) == own | {f"mlp.{n}" for n in net.state_dict()}


def test_without_grad_nothing_is_tracked() -> None:
    net = mlp(3, 2, 2)
    x1, x2 = points(7, 3, 2)
    want = fused_mono_penalty(net, x1, x2)
    with torch.no_grad():
        assert_same([fused_mono_penalty(net, x1, x2)], [want.detach()])
    with torch.inference_mode():
        assert_same([fused_mono_penalty(net, x1, x2)], [want.detach()])
        assert_same([fused_mono_penalty(net, x1, x2, backend="reference")], [want.detach()])


@pytest.mark.parametrize("backend", HANDWRITTEN)
def test_large_batches_go_through_in_blocks(backend: str) -> None:
    """More rows than one block of any backend holds."""
    net = mlp(3, 1, 2, hidden=(40, 300), activation=nn.ReLU())
    x1, x2 = points(2500, 3, 1)
    compare(net, x1, x2, mode="tangent", backend=backend)
    compare(mlp(3, 1, 1, hidden=(40, 300)), x1, x2, mode="adjoint", backend=backend)
