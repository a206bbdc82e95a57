"""BatchNorm in training mode: y by the batch, slopes by the running statistics."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from monokernel import MonotonePenalty, fused_mono_penalty, plan, value_and_jacobian
from tests.support import assert_same, gradients, mlp, points

D1, K, D, N = 3, 2, 3, 40


def network(momentum: float | None = 0.1, affine: bool = True) -> nn.Sequential:
    """In training mode, with running statistics that are not the initial ones."""
    net = nn.Sequential(
        nn.Linear(D1 + K, 7),
        nn.BatchNorm1d(7, momentum=momentum, affine=affine),
        nn.SiLU(),
        nn.Linear(7, 6),
        nn.BatchNorm1d(6, momentum=momentum),
        nn.Tanh(),
        nn.Linear(6, D),
    ).double()
    net(2 * torch.randn(50, D1 + K, dtype=torch.float64) + 1)
    return net


def normalised(h: Tensor, norm: nn.BatchNorm1d, mean: Tensor | None, var: Tensor | None) -> Tensor:
    if mean is None or var is None:
        mean, var = h.mean(0), h.var(0, correction=0)
    h = (h - mean) / (var + norm.eps).sqrt()
    return h if norm.weight is None else h * norm.weight + norm.bias


def by_hand(net: nn.Sequential, x1: Tensor, x2: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
    """y by the statistics of the batch, J by the running ones that this leaves, and these, written
    out. The network's own statistics stay as they are."""
    a, norm, σ, b, norm2, τ, c = net
    statistics: list[Tensor] = []
    h = torch.cat([x1, x2], -1)
    for linear, n, act in ((a, norm, σ), (b, norm2, τ)):
        h = linear(h)
        m = 1 / (int(n.num_batches_tracked) + 1) if n.momentum is None else n.momentum
        for old, new in ((n.running_mean, h.mean(0)), (n.running_var, h.var(0, correction=1))):
            statistics.append(((1 - m) * old + m * new).detach())
        h = act(normalised(h, n, None, None))
    y = c(h)
    if not x2.requires_grad:
        x2 = x2.detach().requires_grad_()
    h = torch.cat([x1, x2], -1)
    h = σ(normalised(a(h), norm, *statistics[:2]))
    h = c(τ(normalised(b(h), norm2, *statistics[2:])))
    slopes = [torch.autograd.grad(o.sum(), x2, create_graph=True)[0] for o in h.unbind(-1)]
    return y, torch.stack(slopes, -2), statistics


@pytest.mark.parametrize("few", [True, False])
@pytest.mark.parametrize(("momentum", "affine"), [(0.1, True), (None, True), (0.5, False)])
def test_values_slopes_and_gradients(momentum: float | None, affine: bool, few: bool) -> None:
    net = network(momentum, affine)
    x1, x2 = (t.requires_grad_() for t in points(N, D1, K))
    leaves = [x1, x2, *net.parameters()]
    y, J, statistics = by_hand(net, x1, x2)
    weight = torch.ones(N, D, K, dtype=torch.float64)
    if few:
        weight[3:] = 0
    task = torch.randn_like(y)
    want = gradients((y * task).sum() + (weight * torch.relu(9 - J)).sum(), *leaves)
    batches = int(net[1].num_batches_tracked)
    got_y, got = fused_mono_penalty(
        net, x1, x2, margin=9.0, weight=weight, return_output=True, batch_stats="running"
    )
    assert_same([got_y, got], [y, (weight * torch.relu(9 - J)).sum()])
    assert_same(gradients((got_y * task).sum() + got, *leaves), want)
    assert all(m.training for m in net.modules())
    assert_same(
        [net[1].running_mean, net[1].running_var, net[4].running_mean, net[4].running_var],
        statistics,
    )
    assert int(net[1].num_batches_tracked) == batches + 1


def test_the_slopes_are_those_of_evaluation_mode_after_the_call() -> None:
    net, (x1, x2) = network(), points(N, D1, K)
    y, J = value_and_jacobian(net, x1, x2, batch_stats="running")
    deployed = copy.deepcopy(net).eval()
    want_y, want = value_and_jacobian(deployed, x1, x2)
    assert_same([J], [want])
    assert (y - want_y).abs().max() > 0.1
    model = MonotonePenalty(network(), batch_stats="running", reduction="none")
    _, penalty = model(x1, x2)
    want = torch.relu(-value_and_jacobian(copy.deepcopy(model.mlp).eval(), x1, x2)[1])
    assert_same([penalty], [want])


def test_two_calls_before_one_backward() -> None:
    """The second updates the statistics that the first one's slopes were computed with."""
    net, batches = network(), [points(N, D1, K) for _ in range(2)]
    weight = torch.zeros(N, 1, 1, dtype=torch.float64)
    weight[:4] = 1
    twin, want = copy.deepcopy(net), torch.zeros((), dtype=torch.float64)
    for x1, x2 in batches:
        y, J, statistics = by_hand(twin, x1, x2)
        want = want + y.square().sum() + (weight * torch.relu(9 - J)).sum()
        for n, mean, var in ((twin[1], *statistics[:2]), (twin[4], *statistics[2:])):
            n.running_mean, n.running_var = mean, var
    loss = torch.zeros((), dtype=torch.float64)
    for x1, x2 in batches:
        y, penalty = fused_mono_penalty(
            net, x1, x2, margin=9.0, weight=weight, return_output=True, batch_stats="running"
        )
        loss = loss + y.square().sum() + penalty
    assert_same([loss], [want])
    assert_same(gradients(loss, *net.parameters()), gradients(want, *twin.parameters()))


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_grad(context: type) -> None:
    net, (x1, x2) = network(), points(N, D1, K)
    y, J, statistics = by_hand(net, x1, x2)
    with context():
        got = value_and_jacobian(net, x1, x2, batch_stats="running")
    assert not any(t.requires_grad for t in got)
    assert_same(got, [y, J])
    assert net[1].running_mean is not None
    assert_same([net[1].running_mean], statistics[:1])


def test_other_layers_keep_their_mode() -> None:
    """Dropout stays active, with a mask of its own for the slopes."""
    net = nn.Sequential(
        nn.BatchNorm1d(D1 + K, affine=False), nn.Dropout(0.5), nn.Linear(D1 + K, 1)
    ).double()
    _, J = value_and_jacobian(net, *points(200, D1, K), batch_stats="running")
    assert 0.3 < (J == 0).double().mean() < 0.7


def test_where_it_changes_nothing() -> None:
    for net in (mlp(D1, K, D), network().eval()):
        x1, x2 = points(N, D1, K)
        want = value_and_jacobian(net, x1, x2)
        assert_same(value_and_jacobian(net, x1, x2, batch_stats="running"), want)
        options = {"batch_stats": "running"}
        assert plan(net, x1, x2, **options) == plan(net, x1, x2)  # type: ignore[arg-type]


def test_what_cannot_be_asked_for() -> None:
    net, (x1, x2) = network(), points(N, D1, K)
    with pytest.raises(ValueError, match=r"mlp: 1 \(BatchNorm1d\) .*batch_stats='running' .*mode"):
        fused_mono_penalty(net, x1, x2)
    with pytest.raises(ValueError, match="batch_stats: expected one of 'error', 'running', got 1"):
        fused_mono_penalty(net, x1, x2, batch_stats=1)  # type: ignore[call-overload]
    assert "batch_stats='running'" in plan(net, x1, x2).error
    assert plan(net, x1, x2, batch_stats="running").backend == "reference"
    before = [t.clone() for t in net.buffers()]
    net[4] = nn.BatchNorm1d(6, track_running_stats=False).double()
    for module in (net, net.eval()):
        with pytest.raises(ValueError, match=r"mlp: 4 \(BatchNorm1d\) .* a layer that keeps none"):
            value_and_jacobian(module, x1, x2, batch_stats="running")
    assert_same([net[1].running_mean], [before[0]])  # type: ignore[list-item]


def test_a_compiled_loss() -> None:
    net, (x1, x2) = network(), points(N, D1, K)
    y, J, statistics = by_hand(net, x1, x2)
    want = gradients(y.square().sum() + torch.relu(-J).sum(), *net.parameters())

    @torch.compile(fullgraph=True, backend="aot_eager")
    def loss(x1: Tensor, x2: Tensor) -> Tensor:
        y, penalty = fused_mono_penalty(net, x1, x2, return_output=True, batch_stats="running")
        return y.square().sum() + penalty

    assert_same(gradients(loss(x1, x2), *net.parameters()), want)
    assert net[1].running_mean is not None
    assert_same([net[1].running_mean], statistics[:1])
