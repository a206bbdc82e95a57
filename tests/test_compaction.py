"""Compaction on the general path: the same gradients from fewer rows, and never where it is wrong.

How many rows the module was given tells whether its backward was compacted.
"""

from __future__ import annotations

import gc
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from monokernel import MonotonePenalty, fused_mono_penalty, value_and_jacobian
from monokernel.backends import compaction
from tests.support import (
    Attention,
    Recurrent,
    assert_same,
    gradients,
    mlp,
    oracle,
    oracle_penalties,
    points,
)
from tests.test_cost import SLACK, H, L, products
from tests.test_cost import N as ROWS

D1, K, D, N = 3, 2, 3, 40


@pytest.fixture(autouse=True)
def _worthwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    """The networks here are small."""
    monkeypatch.setitem(compaction.WORTHWHILE, "cpu", 0)


class Counts(nn.Module):
    """Calls ``inner``, and notes how many rows each call had. It cannot be read as a program."""

    def __init__(self, inner: nn.Module | Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.inner = inner
        self.rows: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        assert isinstance(x, Tensor)  # what no symbol answers
        self.rows.append(len(x))
        y: Tensor = self.inner(x)
        return y


def few(rows: int = N, pairs: int = 6, rest: tuple[int, ...] = ()) -> Tensor:
    """Weights (rows, *rest, D, k) that are 0 but for a few pairs."""
    weight = torch.zeros(rows, *rest, D, K, dtype=torch.float64)
    for i in range(pairs):
        weight[(7 * i + i // 2) % rows, ..., i % D, :] = 1.0 + i
    return weight


def normed(width: int = 8) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(D1 + K, width), nn.LayerNorm(width), nn.SiLU(), nn.Linear(width, D)
    ).double()


def compare(
    net: nn.Module,
    x1: Tensor,
    x2: Tensor,
    weight: Tensor,
    more: tuple[Tensor, ...] = (),
    tolerance: float = 1e-10,
) -> None:
    """Values and gradients of a task loss and a penalty that all slopes would have by the margin,
    against the oracle."""
    inputs = [t for t in (x1, x2, *net.parameters(), *more) if t.requires_grad]
    y, J = oracle(net, x1, x2)
    want = oracle_penalties(J, 1.0, 50.0, weight=weight).sum()
    task = torch.randn_like(y)
    expected: list[Tensor] = []
    if inputs:
        loss = (y * task).sum() + want
        expected += torch.autograd.grad(loss, inputs, retain_graph=True, materialize_grads=True)
    if isinstance(net, Counts):
        net.rows.clear()
    got_y, got = fused_mono_penalty(net, x1, x2, margin=50.0, weight=weight, return_output=True)
    assert_same([got_y, got], [y, want], tolerance)
    loss = (got_y * task).sum() + got
    assert_same(gradients(loss, *inputs) if inputs else [], expected, tolerance)


def inputs(rows: int = N) -> tuple[Tensor, Tensor]:
    x1, x2 = (t.requires_grad_() for t in points(rows, D1, K))
    return x1, x2


# --- where it is right ----------------------------------------------------------------------------


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(D1 + K, D), nn.Linear(D1 + K, D)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(self.a(x)) * torch.sigmoid(self.b(x)) + x[:, -1:] ** 2


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = normed(), nn.Linear(D, D).double()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.b(checkpoint(self.a, x, use_reentrant=False))
        return y


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "layer-norm": normed,
    "gated": lambda: Gated().double(),
    "recurrent": lambda: Recurrent(D1 + K, D).double(),
    "attention": lambda: Attention(D1 + K, D).double(),
    "checkpointed": Checkpointed,
    "batch-norm-eval": lambda: nn.Sequential(normed(), nn.BatchNorm1d(D)).double().eval(),
    "frozen": lambda: normed().requires_grad_(False),
    "scripted": lambda: torch.jit.script(normed()),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", NETWORKS)
def test_gradients_come_from_the_pairs_alone(name: str) -> None:
    net, weight = Counts(NETWORKS[name]()), few()
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        compare(net, *inputs(), weight)
    assert net.rows == [N, 6]


def test_no_violation_no_second_call() -> None:
    net = Counts(normed())
    compare(net, *inputs(), few(pairs=0))
    assert net.rows == [N]


def test_many_violations_take_one_call() -> None:
    net = Counts(normed())
    compare(net, *inputs(), torch.ones(N, D, K).double())
    assert net.rows == [N]


def test_a_small_step_takes_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    net = Counts(normed())
    size = N * D * sum(p.numel() for p in net.parameters())
    for least, rows in ((size + 1, [N]), (size, [N, 6])):
        monkeypatch.setitem(compaction.WORTHWHILE, "cpu", least)
        compare(net, *inputs(), few())
        assert net.rows == rows


@pytest.mark.parametrize("share", [0.0, 1 / 16, 1 / 4])
def test_products_of_the_backward(share: float) -> None:
    """2 + 6Dv: weight and input gradient of the task loss; for v of the pairs the forward, the
    chain, and two products for each of the two in double backward. Counted as the cost table is."""
    net = Counts(mlp(4, 1, 4, [H] * L, nn.SiLU(), dtype=torch.float32))
    weight = torch.zeros(ROWS, 4, 1)
    weight[: round(share * ROWS)] = 1.0
    x1, x2 = points(ROWS, 4, 1, torch.float32)
    y, penalty = fused_mono_penalty(net, x1, x2, margin=1e6, weight=weight, return_output=True)
    loss = y.square().sum() + penalty
    assert products(loss.backward) == pytest.approx(2 + 6 * 4 * share, rel=SLACK)


@pytest.mark.parametrize("tracked", [(True, False), (False, True), (False, False)])
def test_inputs_that_want_no_gradient(tracked: tuple[bool, bool]) -> None:
    x1, x2 = (t.detach().requires_grad_(w) for t, w in zip(inputs(), tracked, strict=True))
    net = Counts(normed())
    compare(net, x1, x2, few())
    assert net.rows == [N, 6]


def test_inputs_that_others_computed() -> None:
    """Both parts of one split, and a third part that the module reads by itself."""
    z = torch.randn(N, D1 + K + 1, dtype=torch.float64, requires_grad=True)
    x1, x2, _ = z.sin().split([D1, K, 1], -1)
    net = Counts(normed())
    compare(net, x1, x2, few(), (z,))
    assert net.rows == [N, 6]


def test_directions_weights_and_hinges() -> None:
    net, (x1, x2) = Counts(normed()), inputs()
    signs = [[1, 0], [0, -1], [0, 0]]
    weight = torch.zeros(N, 1, K, dtype=torch.float64)
    weight[::9] = 0.7
    weight.requires_grad_()
    leaves = [x1, x2, weight, *net.parameters()]
    _, J = oracle(net, x1, x2)
    net.rows.clear()
    want = oracle_penalties(J, torch.tensor(signs), 50.0, "squared", weight)
    for reduction in ("none", "sum", "mean"):
        penalty = fused_mono_penalty(
            net,
            x1,
            x2,
            direction=signs,
            margin=50.0,
            hinge="squared",
            weight=weight,
            reduction=reduction,
        )
        reduced = {"none": want, "sum": want.sum(), "mean": want.sum() / (2 * N)}[reduction]
        assert_same([penalty], [reduced])
        expected = torch.autograd.grad(
            reduced.sum(), leaves, retain_graph=True, materialize_grads=True
        )
        assert_same(gradients(penalty.sum(), *leaves), list(expected))
    assert net.rows == [N, 10, N, 10, N, 10]


def test_the_jacobian_itself_by_its_cotangent() -> None:
    net, (x1, x2) = Counts(normed()), inputs()
    leaves = [x1, x2, *net.parameters()]
    y, J = oracle(net, x1, x2)
    for gJ, rows in ((few(), [N, 6]), (torch.ones(N, D, K).double(), [N])):
        want = gradients((J * gJ).sum() + y.sum(), *leaves) if rows == [N] else None
        if want is None:
            want = list(torch.autograd.grad((J * gJ).sum() + y.sum(), leaves, retain_graph=True))
        net.rows.clear()
        got_y, got = value_and_jacobian(net, x1, x2)
        assert_same([got_y, got], [y, J])
        assert_same(gradients((got * gJ).sum() + got_y.sum(), *leaves), want)
        assert net.rows == rows


def test_sequences_whose_steps_mix() -> None:
    """Rows are counted along the first dimension; a slope there is that of all steps' outputs."""

    class Steps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = normed()

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.net(x + 0.3 * x.flip(1).sin())
            return y

    x1, x2 = (torch.randn(12, 4, n, dtype=torch.float64, requires_grad=True) for n in (D1, K))
    net = Counts(Steps())
    compare(net, x1, x2, few(12, 4, (4,)))
    assert net.rows == [12, 4]


def test_an_output_without_its_dimension() -> None:
    class Squeezed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = normed()

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.net(x).prod(-1)
            return y

    net, (x1, x2) = Counts(Squeezed()), inputs()
    leaves = [x1, x2, *net.parameters()]
    (slopes,) = torch.autograd.grad(net(torch.cat([x1, x2], -1)).sum(), x2, create_graph=True)
    weight = few()[:, 0]
    want = gradients((weight * torch.relu(50 - slopes)).sum(), *leaves)
    net.rows.clear()
    penalty = fused_mono_penalty(net, x1, x2, margin=50.0, weight=weight.unsqueeze(1))
    assert_same(gradients(penalty, *leaves), want)
    assert net.rows == [N, int((weight != 0).any(-1).sum())]


def test_a_tensor_in_a_closure_gets_its_gradient() -> None:
    """It is no parameter of any module, and still a leaf of the graph."""
    scale = torch.randn(D, dtype=torch.float64, requires_grad=True)
    inner = normed()

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x) * scale

    net = Counts(Scaled())
    compare(net, *inputs(), few(), (scale,))
    assert net.rows == [N, 6]


def test_sparse_gradients_of_an_embedding() -> None:
    class Embedded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.net = nn.Embedding(4, 5, sparse=True), normed()

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.net(x + self.table((x[:, 0] > 0).long()))
            return y

    net, (x1, x2) = Counts(Embedded().double()), points(N, D1, K)
    y, penalty = fused_mono_penalty(net, x1, x2, margin=50.0, weight=few(), return_output=True)
    (y.sum() + penalty).backward()
    assert net.rows == [N, 6]
    table = net.inner.table.weight  # type: ignore[union-attr]
    got = table.grad
    assert isinstance(got, Tensor)
    assert got.is_sparse
    y, J = oracle(net, x1, x2)
    loss = y.sum() + oracle_penalties(J, 1.0, 50.0, weight=few()).sum()
    (want,) = torch.autograd.grad(loss, [table])
    assert_same([got.to_dense()], [want.to_dense()])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_as_it_was(dtype: torch.dtype) -> None:
    """The second call, in the backward and outside autocast, runs in the same precision."""
    net, weight = Counts(normed().float()), few().float()
    seen: list[torch.dtype] = []
    inner = net.inner

    def noting(x: Tensor) -> Tensor:
        y: Tensor = inner(x)
        seen.append(y.dtype)
        return y

    net.inner = None  # type: ignore[assignment]
    del net._modules["inner"]
    net.__dict__["inner"] = noting
    x1, x2 = points(N, D1, K, torch.float32)
    with torch.autocast("cpu", dtype=dtype):
        y, penalty = fused_mono_penalty(net, x1, x2, margin=50.0, weight=weight, return_output=True)
    got = gradients(y.float().sum() + penalty, *inner.parameters())
    assert net.rows == [N, 6]
    assert seen == [dtype, dtype]
    with torch.autocast("cpu", dtype=dtype):
        y, J = oracle(net, x1, x2)
    want = oracle_penalties(J.float(), 1.0, 50.0, weight=weight).sum()
    assert_same(got, gradients(y.float().sum() + want, *inner.parameters()), 0.05)


def test_float32_within_rounding() -> None:
    net = Counts(normed(64).float())
    x1, x2 = points(2000, D1, K, torch.float32)
    compare(net, x1, x2, few(2000, 60).float(), tolerance=1e-4)
    assert net.rows == [2000, 60]


def test_saved_tensor_hooks_and_a_second_backward() -> None:
    net, (x1, x2) = Counts(normed()), inputs()
    leaves = [x1, x2, *net.parameters()]
    with torch.autograd.graph.save_on_cpu():
        y, penalty = fused_mono_penalty(net, x1, x2, margin=50.0, weight=few(), return_output=True)
    loss = y.sum() + penalty
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    assert_same(gradients(loss, *leaves), list(first))
    y, J = oracle(net, x1, x2)
    loss = y.sum() + oracle_penalties(J, 1.0, 50.0, weight=few()).sum()
    assert_same(list(first), gradients(loss, *leaves))


@pytest.mark.parametrize("mixing", [False, True])
def test_checkpointing_around_the_penalty(mixing: bool) -> None:
    net, (x1, x2) = Counts(Mixing(centred) if mixing else normed()), inputs()
    leaves = [x1, x2, *net.parameters()]
    model = MonotonePenalty(net, margin=50.0, weight=few())
    y, penalty = checkpoint(model, x1, x2, use_reentrant=False)
    got = gradients(y.sum() + penalty, *leaves)
    y, J = oracle(net, x1, x2)
    loss = y.sum() + oracle_penalties(J, 1.0, 50.0, weight=few()).sum()
    assert_same(got, gradients(loss, *leaves))


def test_hooks_of_parameters_fire_once_with_the_whole_gradient() -> None:
    """What DistributedDataParallel builds on."""
    net, (x1, x2) = Counts(normed()), points(N, D1, K)
    fired: list[Tensor] = []
    weight = next(net.parameters())
    weight.register_post_accumulate_grad_hook(lambda p: fired.append(p.grad.clone()))
    y, penalty = fused_mono_penalty(net, x1, x2, margin=50.0, weight=few(), return_output=True)
    (y.sum() + penalty).backward()
    y, J = oracle(net, x1, x2)
    want = gradients(y.sum() + oracle_penalties(J, 1.0, 50.0, weight=few()).sum(), weight)
    assert len(fired) == 1
    assert_same(fired, want)


def test_all_orders_of_derivative() -> None:
    """With ``create_graph=True`` all rows are differentiated."""
    net = Counts(Gated().double())
    x1, x2 = (t.requires_grad_() for t in points(9, D1, K))
    weight = few(9, 2)

    def f(x1: Tensor, x2: Tensor, p: Tensor) -> Tensor:
        return fused_mono_penalty(net, x1, x2, margin=3.0, hinge="squared", weight=weight)

    weights = next(net.parameters())
    assert torch.autograd.gradgradcheck(f, (x1, x2, weights))
    penalty = f(x1, x2, weights)
    net.rows.clear()
    torch.autograd.grad(penalty, x1, create_graph=True)
    assert net.rows == []


def test_nothing_is_kept_after_the_step() -> None:
    net, (x1, x2) = normed(), points(N, D1, K)

    def step() -> None:
        y, penalty = fused_mono_penalty(net, x1, x2, margin=50.0, weight=few(), return_output=True)
        (y.sum() + penalty).backward()

    def alive() -> int:
        return sum(isinstance(o, Tensor) for o in gc.get_objects())

    step()
    gc.collect()
    gc.disable()
    try:
        before = alive()
        step()
        assert alive() <= before
    finally:
        gc.enable()


# --- where it would be wrong ----------------------------------------------------------------------


def centred(x: Tensor) -> Tensor:
    return x - x.mean(0)


def scaled(x: Tensor) -> Tensor:
    """The row with the largest entry decides for all; the others' values do not show it."""
    return x / x.abs().amax()


def across(x: Tensor) -> Tensor:
    return torch.softmax(x @ x.mT, -1) @ x


def by_position(x: Tensor) -> Tensor:
    return x * torch.arange(1, len(x) + 1, dtype=x.dtype).unsqueeze(-1).sqrt()


def fixed_size(x: Tensor) -> Tensor:
    return x + x.reshape(N // 2, 2, -1).mean(1).repeat_interleave(2, 0)


class Mixing(nn.Module):
    def __init__(self, mix: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.net, self.mix = normed(), mix

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.net(self.mix(x))
        return y


@pytest.mark.parametrize("mix", [centred, scaled, across, by_position, fixed_size])
@pytest.mark.parametrize("share", [1, 6])
def test_rows_that_mix_are_noticed(mix: Callable[[Tensor], Tensor], share: int) -> None:
    net = Counts(Mixing(mix))
    x1, x2 = inputs()
    weight = few(pairs=share)
    if mix is scaled:  # the row that decides for all is among those that violate
        with torch.no_grad():
            x1[0] *= 9
    compare(net, x1, x2, weight)
    assert net.rows[0] == N
    assert len(net.rows) == 2


class Spectral(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.Linear(D1 + K, D)
        self.a = nn.utils.parametrizations.spectral_norm(layer)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(self.a(x))


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = normed()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls = self.calls + 1  # another tensor, no other version
        y: Tensor = self.net(x) * self.calls
        return y


def hooked() -> nn.Module:
    net = normed()
    net[1].register_forward_hook(lambda m, args, out: 0.5 * out)
    return net


ONCE: dict[str, Callable[[], nn.Module]] = {
    "dropout": lambda: nn.Sequential(normed(), nn.Dropout(0.3)),
    "rrelu": lambda: nn.Sequential(normed(), nn.RReLU()),
    "spectral-norm": lambda: Spectral().double(),
    "buffer": Counting,
    "hooks": hooked,
}


@pytest.mark.parametrize("name", ONCE)
def test_what_must_not_be_repeated_is_called_once(name: str) -> None:
    net, (x1, x2) = Counts(ONCE[name]()), inputs()
    leaves = [x1, x2, *net.parameters()]
    state, seed = {n: t.clone() for n, t in net.state_dict().items()}, torch.get_rng_state()
    y, penalty = fused_mono_penalty(net, x1, x2, margin=50.0, weight=few(), return_output=True)
    got = gradients(y.sum() + penalty, *leaves)
    assert net.rows == [N]
    after = torch.get_rng_state()
    net.load_state_dict(state)
    torch.set_rng_state(seed)
    y, J = oracle(net, x1, x2)
    assert torch.equal(torch.get_rng_state(), after)
    loss = y.sum() + oracle_penalties(J, 1.0, 50.0, weight=few()).sum()
    assert_same(got, gradients(loss, *leaves))


def test_a_generator_of_its_own_is_noticed() -> None:
    generator = torch.Generator()

    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = normed()

        def forward(self, x: Tensor) -> Tensor:
            noise = torch.randn(x.shape, generator=generator, dtype=x.dtype)
            y: Tensor = self.net(x + noise)
            return y

    net, (x1, x2) = Noisy(), inputs()
    leaves = [x1, x2, *net.parameters()]
    value_and_jacobian(net, x1, x2)  # its first call finds that it cannot be read
    generator.manual_seed(0)
    y, penalty = fused_mono_penalty(net, x1, x2, margin=50.0, weight=few(), return_output=True)
    got = gradients(y.sum() + penalty, *leaves)
    generator.manual_seed(0)
    y, J = oracle(net, x1, x2)
    loss = y.sum() + oracle_penalties(J, 1.0, 50.0, weight=few()).sum()
    assert_same(got, gradients(loss, *leaves))


def test_weights_that_others_computed() -> None:
    """Their graph is the task loss's too: it must not be run through and freed on its own."""
    source = torch.randn(D, D1 + K, dtype=torch.float64, requires_grad=True)
    weight = source.sin()

    class Reads(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(x @ weight.T)

    net, (x1, x2) = Counts(Reads()), inputs()
    y, penalty = fused_mono_penalty(net, x1, x2, margin=50.0, weight=few(), return_output=True)
    got = gradients(y.sum() + penalty, x1, x2, source)
    assert net.rows == [N]
    weight = source.sin()
    y, J = oracle(net, x1, x2)
    loss = y.sum() + oracle_penalties(J, 1.0, 50.0, weight=few()).sum()
    assert_same(got, gradients(loss, x1, x2, source))


def test_parameters_that_are_gone_when_the_backward_comes() -> None:
    net, (x1, x2) = normed(), points(N, D1, K)
    values = {n: torch.randn_like(p).requires_grad_() for n, p in net.named_parameters()}
    model = MonotonePenalty(net, margin=50.0, weight=few())
    inside = {f"mlp.{n}": v for n, v in values.items()}
    y, penalty = torch.func.functional_call(model, inside, (x1, x2))
    got = gradients(y.sum() + penalty, *values.values())
    with torch.nn.utils.stateless._reparametrize_module(net, values):
        y, J = oracle(net, x1, x2)
    loss = y.sum() + oracle_penalties(J, 1.0, 50.0, weight=few()).sum()
    assert_same(got, gradients(loss, *values.values()))


@pytest.mark.parametrize("change", ["mode", "buffer", "attribute", "frozen"])
def test_a_network_that_changed_before_the_backward_is_differentiated_as_it_was(
    change: str,
) -> None:
    class Changes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.drop = normed(), nn.Dropout(0.5)
            self.register_buffer("scale", torch.ones(D, dtype=torch.float64))
            self.factor = 1.0

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.drop(self.net(x)) + self.scale.detach().sum() * self.factor * x[:, -1:]
            return y

    net, (x1, x2) = Changes().eval(), inputs()
    leaves = [x1, x2, *net.parameters()]
    y, J = oracle(net, x1, x2)
    loss = y.sum() + oracle_penalties(J, 1.0, 50.0, weight=few()).sum()
    want = gradients(loss, *leaves)
    seed = torch.get_rng_state()
    y, penalty = fused_mono_penalty(net, x1, x2, margin=50.0, weight=few(), return_output=True)
    if change == "mode":
        net.train()
    elif change == "buffer":
        net.scale = net.scale * 2
    elif change == "attribute":
        net.factor = 2.0
    else:
        net.requires_grad_(False)
    (y.sum() + penalty).backward()
    got = leaves[:2] if change == "frozen" else leaves  # PyTorch then gives parameters none
    assert_same([t.grad for t in got], want[: len(got)])  # type: ignore[misc]
    assert torch.equal(torch.get_rng_state(), seed)


def test_a_weight_changed_before_the_backward_is_an_error() -> None:
    net, (x1, x2) = normed(), points(N, D1, K)
    penalty = fused_mono_penalty(net, x1, x2, margin=50.0, weight=few())
    with torch.no_grad():
        net[0].weight.add_(1e-9)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        penalty.backward()


def test_inputs_changed_before_the_backward() -> None:
    """The batch's buffer is filled anew: the network's input was a copy."""
    net, (x1, x2) = normed(), points(N, D1, K)
    y, J = oracle(net, x1, x2)
    loss = y.sum() + oracle_penalties(J, 1.0, 50.0, weight=few()).sum()
    want = gradients(loss, *net.parameters())
    y, penalty = fused_mono_penalty(net, x1, x2, margin=50.0, weight=few(), return_output=True)
    x1.zero_()
    x2.zero_()
    y.sub_(1.0)
    assert_same(gradients(y.sum() + penalty, *net.parameters()), want)


def test_slopes_that_are_not_numbers_take_all_rows() -> None:
    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(D1 + K, D).double()

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.net(x.abs().sqrt())
            return y

    net, (x1, x2) = Root(), points(N, D1, K)
    x2[0] = 0.0
    penalty = fused_mono_penalty(net, x1, x2, margin=50.0, weight=few())
    assert penalty.isnan()
    assert all(g.isnan().any() for g in gradients(penalty, net.net.weight))
