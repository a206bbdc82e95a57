"""Every network of the zoo through the public calls, against double backward in float64."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

from monokernel import MonotonePenalty, audit, fused_mono_penalty, plan, value_and_jacobian
from tests.support import (
    HANDWRITTEN,
    assert_same,
    gradients,
    oracle,
    oracle_penalties,
    points,
    ways,
)
from tests.zoo import ACTIVE, ZOO, network

ROWS, FREE, WIDTH = 33, 3, 8
STEP = 1e-6  # of central differences
EVERY = pytest.mark.parametrize("name", ZOO)
# Their forward is a function of x alone, so that two calls can be compared.
QUIET = pytest.mark.parametrize("name", [name for name in ZOO if name not in ACTIVE])
DRAWING = pytest.mark.parametrize("name", ACTIVE)
OUTPUTS = pytest.mark.parametrize("D", [1, 3])
SIGNS = torch.tensor([1.0, -1.0])


def build(name: str, D: int, k: int = 2) -> nn.Module:
    """With a seed for which all have slopes of both signs, which is asserted below."""
    return network(name, FREE + k, D, WIDTH, torch.float64, seed=7)


@EVERY
@OUTPUTS
def test_is_an_ordinary_network(name: str, D: int) -> None:
    """Slopes of either sign, every parameter used, rows that know nothing of each other."""
    net, (x1, x2) = build(name, D), points(ROWS, FREE, 2)
    torch.manual_seed(1)
    y, J = oracle(net, x1, x2)
    assert y.shape == ((ROWS,) if (name, D) == ("squeezed", 1) else (ROWS, D))
    assert y.dtype == torch.float64
    share = (J < 0).double().mean().item()
    assert 0.05 < share < 0.95
    grads = gradients(y.square().sum() + J.square().sum(), *net.parameters())
    assert all(bool(g.any()) for g in grads)
    if name not in ACTIVE:
        assert_same([net(torch.cat([x1[3:5], x2[3:5]], -1))], [y[3:5]], 1e-12)
        assert_same(oracle(build(name, D), x1, x2), [y, J], 0)  # the same for the same seed


@EVERY
@OUTPUTS
def test_is_served_without_double_backward(name: str, D: int) -> None:
    net, (x1, x2) = build(name, D), points(ROWS, FREE, 2)
    assert plan(net, x1, x2).backend == HANDWRITTEN[-1]


@QUIET
@OUTPUTS
def test_value_penalty_and_gradients(name: str, D: int) -> None:
    net, (x1, x2) = build(name, D), points(ROWS, FREE, 2)
    x1, x2 = x1.requires_grad_(), x2.requires_grad_()
    inputs = [x1, x2, *net.parameters()]
    y, _ = oracle(net, x1, x2)
    gy, weight = torch.randn_like(y), torch.rand(D, 2, dtype=torch.float64)
    for hinge in ("linear", "squared"):
        _, J = oracle(net, x1, x2)
        entries = oracle_penalties(J, SIGNS, 0.05, hinge, weight)
        assert 0.05 < (entries > 0).double().mean() < 0.95
        mix = torch.randn_like(entries)
        want = gradients((entries * mix).sum(), *inputs)
        y, J = oracle(net, x1, x2)
        entries = oracle_penalties(J, SIGNS, 0.05, hinge, weight)
        want_both = gradients((y * gy).sum() + entries.sum(), *inputs)
        for way in ways(net, x1, x2):
            options = {"direction": SIGNS, "margin": 0.05, "hinge": hinge, "weight": weight} | way
            got_y, got = fused_mono_penalty(net, x1, x2, return_output=True, **options)
            assert_same([got_y, got], [y, entries.sum()])
            assert_same(gradients((got_y * gy).sum() + got, *inputs), want_both)
            alone = fused_mono_penalty(net, x1, x2, reduction="none", **options)
            assert_same([alone], [entries])
            assert_same(gradients((alone * mix).sum(), *inputs), want)


@QUIET
@OUTPUTS
def test_slopes_and_their_gradients(name: str, D: int) -> None:
    net, (x1, x2) = build(name, D, k=1), points(ROWS, FREE, 1)
    x1, x2 = x1.requires_grad_(), x2.requires_grad_()
    inputs = [x1, x2, *net.parameters()]
    y, J = oracle(net, x1, x2)
    gy, gJ = torch.randn_like(y), torch.randn_like(J)
    gJ[torch.rand(ROWS) < 0.5] = 0  # rows that the backward may skip
    want = gradients((y * gy).sum() + (J * gJ).sum(), *inputs)
    for way in ways(net, x1, x2):
        got_y, got = value_and_jacobian(net, x1, x2, **way)
        assert_same([got_y, got], [y, J])
        assert_same(gradients((got_y * gy).sum() + (got * gJ).sum(), *inputs), want)


@QUIET
@OUTPUTS
def test_leading_axes(name: str, D: int) -> None:
    net = build(name, D)
    if any(isinstance(m, (nn.BatchNorm1d, nn.PReLU)) for m in net.modules()):
        pytest.skip("the channels of BatchNorm1d and PReLU are the second axis")
    x1, x2 = (t.reshape(3, 4, -1) for t in points(12, FREE, 2))
    y, J = value_and_jacobian(net, x1, x2)
    flat_y, flat_J = value_and_jacobian(net, x1.reshape(12, -1), x2.reshape(12, -1))
    assert_same([y, J], [flat_y.reshape(3, 4, *flat_y.shape[1:]), flat_J.reshape(3, 4, D, 2)])


@QUIET
@OUTPUTS
def test_audit_counts_its_violations(name: str, D: int) -> None:
    net, (x1, x2) = build(name, D), points(ROWS, FREE, 2)
    report = audit(net, x1, x2, direction=SIGNS)
    J = oracle(net, x1, x2)[1].detach() * SIGNS
    assert_same([report.rate.double()], [(J < 0).double().mean(0)], 1e-6)
    assert_same([report.worst_slope.double()], [J.amin(0)], 1e-6)
    assert not report.blind.any()


@QUIET
def test_module_copy_and_pickle(name: str) -> None:
    net, (x1, x2) = build(name, 1), points(ROWS, FREE, 2)
    module = MonotonePenalty(net, direction=SIGNS, margin=0.05)
    y, J = oracle(net, x1, x2)
    want = oracle_penalties(J, SIGNS, 0.05).sum()
    grads = gradients(y.sum() + want, *net.parameters())
    module(x1, x2)  # a copy of what has been called
    for twin in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        got_y, got = twin(x1, x2)
        assert_same([got_y, got], [y, want])
        assert_same(gradients(got_y.sum() + got, *twin.parameters()), grads)


@QUIET
def test_a_changed_weight_and_mode_are_seen(name: str) -> None:
    """What a call says holds for that call alone."""
    net, (x1, x2) = build(name, 1), points(ROWS, FREE, 2)
    value_and_jacobian(net, x1, x2)
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(0.7)
    assert_same(value_and_jacobian(net, x1, x2), oracle(net, x1, x2))
    twin = build(name, 1).train()
    if any(isinstance(m, nn.BatchNorm1d) for m in twin.modules()):
        with pytest.raises(ValueError, match="statistics of the batch"):
            value_and_jacobian(twin, x1, x2)
    elif any(isinstance(m, nn.Dropout) for m in twin.modules()):
        first, second = (value_and_jacobian(twin, x1, x2)[0] for _ in range(2))
        assert not torch.equal(first, second)


@pytest.mark.parametrize("D", [1, 2])
@pytest.mark.parametrize(
    "name", ["tabular ResNet", "pre-norm LayerNorm", "DCN-v2", "mixture of experts", "squeezed"]
)
def test_a_compiled_step(name: str, D: int) -> None:
    torch._dynamo.reset()
    net, (x1, x2) = build(name, D), points(ROWS, FREE, 2)

    def loss(x1: Tensor, x2: Tensor) -> Tensor:
        y, penalty = fused_mono_penalty(net, x1, x2, margin=0.05, return_output=True)
        return y.square().sum() + penalty

    want = loss(x1, x2)
    got = torch.compile(loss, fullgraph=True, backend="aot_eager")(x1, x2)
    assert_same([got], [want])
    assert_same(gradients(got, *net.parameters()), gradients(want, *net.parameters()))


# --- autocast -------------------------------------------------------------------------------------


@QUIET
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(name: str, dtype: torch.dtype) -> None:
    """The output's dtype is PyTorch's; the slopes lose nothing, where the native kernel serves."""
    net, (x1, x2) = network(name, FREE + 2, 2, 12), points(ROWS, FREE, 2, torch.float32)
    want, slopes = oracle(copy.deepcopy(net).double(), x1.double(), x2.double())
    with torch.autocast("cpu", dtype):
        plain = net(torch.cat([x1, x2], -1))
        y, J = value_and_jacobian(net, x1, x2)
        served = plan(net, x1, x2).backend
        out, penalty = fused_mono_penalty(net, x1, x2, return_output=True)
    assert y.dtype == out.dtype == plain.dtype
    error = (plain.double() - want).abs().max()
    assert (y.double() - want).abs().max() <= 2 * error
    if served == "cpu":
        assert_same([J.double()], [slopes], 1e-5)
    for g in gradients(out.float().square().sum() + penalty, *net.parameters()):
        assert g.dtype == torch.float32


# --- active dropout -------------------------------------------------------------------------------


def seeded(
    net: nn.Module, x1: Tensor, x2: Tensor, seed: int = 5, **way: str
) -> tuple[Tensor, Tensor]:
    """y and a smooth penalty of a call that draws its masks from this seed."""
    torch.manual_seed(seed)
    out: tuple[Tensor, Tensor] = fused_mono_penalty(
        net, x1, x2, margin=0.3, hinge="squared", return_output=True, **way
    )
    return out


@DRAWING
@OUTPUTS
def test_the_seed_decides_the_masks(name: str, D: int) -> None:
    net, (x1, x2) = build(name, D), points(ROWS, FREE, 2)
    first, again, other = (seeded(net, x1, x2, seed) for seed in (5, 5, 6))
    assert all(map(torch.equal, first, again))
    assert not torch.equal(first[0], other[0])
    torch.manual_seed(5)
    before = torch.rand(3)
    fused_mono_penalty(net, x1, x2)
    assert not torch.equal(before, torch.rand(3))  # what is drawn is PyTorch's own generator's


@DRAWING
@OUTPUTS
def test_slopes_and_gradients_belong_to_the_values_masks(name: str, D: int) -> None:
    """Central differences at the same seed, in x2 and in a direction of all that is trained."""
    net, (x1, x2) = build(name, D), points(ROWS, FREE, 2)
    for way in ways(net, x1, x2):
        torch.manual_seed(5)
        _, J = value_and_jacobian(net, x1, x2, **way)
        for c, e in enumerate(torch.eye(2, dtype=torch.float64)):
            up, down = (seeded(net, x1, x2 + s * STEP * e, **way)[0] for s in (1, -1))
            assert_same([J[:, :, c]], [(up - down) / (2 * STEP)], 1e-7)
        slope, want = along(net, x1, x2, way)
        assert_same([slope], [want], 1e-6)


def along(net: nn.Module, x1: Tensor, x2: Tensor, way: dict[str, str]) -> tuple[Tensor, Tensor]:
    """The loss's derivative along a random direction: by its gradients, by a difference."""
    inputs = [x1.clone().requires_grad_(), x2.clone().requires_grad_(), *net.parameters()]
    steps = [torch.randn_like(t) for t in inputs]

    def loss() -> Tensor:
        y, penalty = seeded(net, inputs[0], inputs[1], **way)
        return y.square().sum() + penalty

    products = [(g * s).sum() for g, s in zip(gradients(loss(), *inputs), steps, strict=True)]
    moved = []
    with torch.no_grad():
        for shift in (STEP, -2 * STEP, STEP):  # and back
            for t, s in zip(inputs, steps, strict=True):
                t.add_(s, alpha=shift)
            moved.append(loss())
    return torch.stack(products).sum(), (moved[0] - moved[1]) / (2 * STEP)


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_rate_and_scale_are_pytorchs(p: float) -> None:
    """Through a network that hands on what its dropout leaves of x: 0 or x / (1 - p)."""
    N = 20_000
    net = nn.Sequential(nn.Dropout(p), Own())
    x1, x2 = torch.ones(N, 1, dtype=torch.float64), torch.ones(N, 2, dtype=torch.float64)
    torch.manual_seed(3)
    y, J = value_and_jacobian(net, x1, x2)
    kept = y != 0
    assert_same([y[kept]], [torch.full_like(y[kept], 1 / (1 - p))], 1e-12)
    deviation = (p * (1 - p) / N) ** 0.5
    assert ((~kept).double().mean(0) - p).abs().max() < 5 * deviation
    both = (kept[:, 0] & kept[:, 1]).double().mean().item()  # columns know nothing of each other
    assert abs(both - (1 - p) ** 2) < 5 * deviation
    assert_same([J], [torch.diag_embed(y)[:, :, 1:]], 1e-12)


class Own(nn.Module):
    """x as it is, in a forward of one's own."""

    def forward(self, x: Tensor) -> Tensor:
        return 1.0 * x
