"""Forwards of one's own under torch.compile: the fused kernel serves them, and sees what they are.

Chains of layers, and how a loss is compiled, are in ``test_operator.py`` and ``test_training.py``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint

from monokernel import (
    MonotonePenalty,
    capture,
    fused_mono_penalty,
    plan,
    value_and_jacobian,
)
from tests.support import HANDWRITTEN, NEEDS_COMPILER, Cube, assert_same, gradients, points
from tests.zoo import ZOO, network

D1, K, WIDTH = 3, 2, 8
FORWARD = torch.ops.monokernel.forward.default

Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]


class Recorder:
    """A compiler that runs the traced graphs as they are, and keeps those of the forward."""

    def __init__(self) -> None:
        self.graphs: list[torch.fx.GraphModule] = []
        self._compile = aot_autograd(
            fw_compiler=self._keep, bw_compiler=lambda graph, _: make_boxed_func(graph.forward)
        )

    def _keep(self, graph: torch.fx.GraphModule, _: Any) -> Any:
        self.graphs.append(graph)
        return make_boxed_func(graph.forward)

    def __call__(self, graph: torch.fx.GraphModule, inputs: Any) -> Any:
        return self._compile(graph, inputs)

    @property
    def fused(self) -> list[int]:
        """How many calls of a kernel each graph has."""
        return [len(g.graph.find_nodes(op="call_function", target=FORWARD)) for g in self.graphs]


@pytest.fixture(autouse=True)
def recorder() -> Iterator[Recorder]:
    torch._dynamo.reset()
    yield Recorder()
    torch._dynamo.reset()


def build(name: str, D: int = 2, dtype: torch.dtype = torch.float64) -> nn.Module:
    return network(name, D1 + K, D, WIDTH, dtype, seed=7)


def loss_of(net: nn.Module, x1: Tensor, x2: Tensor) -> Tensor:
    y, penalty = fused_mono_penalty(net, x1, x2, margin=0.1, return_output=True)
    return y.square().mean() + penalty


def compare(
    compiled: Loss,
    net: nn.Module,
    N: int = 33,
    loss: Loss = loss_of,
    dtype: torch.dtype = torch.float64,
    tolerance: float = 1e-12,
) -> None:
    """Value and every gradient of a compiled loss are those of the loss in eager mode."""
    x1, x2 = (x.requires_grad_() for x in points(N, D1, K, dtype))
    inputs = [x1, x2, *[p for p in net.parameters() if p.requires_grad]]
    found = []
    for f in (compiled, loss):
        torch.manual_seed(1)
        value = f(net, x1, x2)
        found.append([value, *gradients(value, *inputs)])
    assert_same(*found, tolerance)
    assert found[1][0] != 0


@pytest.mark.parametrize("name", ZOO)
def test_the_zoo_is_fused(name: str, recorder: Recorder) -> None:
    net = build(name, 1 if name == "squeezed" else 3)
    compare(torch.compile(loss_of, fullgraph=True, dynamic=True, backend=recorder), net)
    assert recorder.fused == [1]


@pytest.mark.parametrize("name", ["MLP with dropout", "tabular ResNet"])
def test_two_calls_and_the_network_itself_in_one_function(name: str, recorder: Recorder) -> None:
    """A chain of layers and a program: in both modes, and then as the plain network that it is."""

    def loss(net: nn.Module, x1: Tensor, x2: Tensor) -> Tensor:
        total = net(torch.cat([x1, x2], -1)).square().sum()
        for mode in ("tangent", "adjoint"):
            y, penalty = fused_mono_penalty(net, x1, x2, mode=mode, return_output=True)
            total = total + y.square().mean() + penalty
        return total + net(torch.cat([x1, -x2], -1)).square().sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend=recorder)
    compare(compiled, build(name), loss=loss)
    assert recorder.fused == [2]


def test_few_graphs_serve_every_number_of_rows(recorder: Recorder) -> None:
    """As for any compiled function: one row has a graph of its own."""
    compiled = torch.compile(loss_of, fullgraph=True, dynamic=True, backend=recorder)
    net = build("squeezed", 1)
    for N in (7, 1, 300, 2, 5000):
        compare(compiled, net, N)
    assert recorder.fused == [1, 1]


@NEEDS_COMPILER
def test_inductor() -> None:
    compiled = torch.compile(loss_of, fullgraph=True, dynamic=True)
    compare(compiled, build("wide and deep", 1))


class Net(nn.Module):
    """Everything that a forward may read of its module."""

    factor: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(5, 8), nn.Linear(8, 8), nn.Linear(8, 2)
        self.norm, self.drop = nn.LayerNorm(8), nn.Dropout(0.3)
        self.log_scale = nn.Parameter(0.1 * torch.randn(8))
        self.register_buffer("factor", 0.5 + torch.rand(8))
        self.skip, self.slope = True, 0.2
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        z = F.leaky_relu(self.a(x), self.slope)
        h = z + self.drop(torch.tanh(self.b(self.norm(z)))) * self.log_scale.exp()
        y: Tensor = self.c(h * self.factor + z if self.skip else h * self.factor)
        return y


def _attribute(net: Net) -> None:
    net.skip = False


def _number(net: Net) -> None:
    net.slope = 0.7


def _layer(net: Net) -> None:
    net.b = nn.Linear(8, 8, bias=False).double()


def _kind(net: Net) -> None:
    net.norm = nn.RMSNorm(8).double()  # type: ignore[assignment]


def _eps(net: Net) -> None:
    net.norm.eps = 0.3


def _dropout(net: Net) -> None:
    net.drop.p = 0.8


def _hook(net: Net) -> None:
    net.drop.p = 0.0  # which PyTorch cannot differentiate twice at a symbolic size
    net.b.register_forward_hook(lambda m, args, y: 3 * y)


def _pre_hook(net: Net) -> None:
    net.drop.p = 0.0
    net.norm.register_forward_pre_hook(lambda m, args: (2 * args[0].sin(),))


def _parametrization(net: Net) -> None:
    parametrizations.weight_norm(net.b)
    net.b.parametrizations.weight.original0.data.mul_(2)


def _own_parametrization(net: Net) -> None:
    parametrize.register_parametrization(net.c, "weight", nn.Softplus())


def _data(net: Net) -> None:
    net.b.weight.data = 2 * net.b.weight.data.flip(0)


def _parameter(net: Net) -> None:
    net.log_scale = nn.Parameter(torch.randn(8).double())


def _frozen(net: Net) -> None:
    net.b.weight.requires_grad_(False)
    net.b.weight.mul_(3)


def _buffer(net: Net) -> None:
    net.factor.mul_(-2)


def _new_buffer(net: Net) -> None:
    net.factor = torch.tensor(3.0).double()


def _forward(net: Net) -> None:
    net.forward = lambda x: net.c(torch.sin(net.a(x)))  # type: ignore[method-assign]


def _unreadable(net: Net) -> None:
    net.drop = nn.Softmin(-1)  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("dynamic", "changes"),
    [
        (None, [_number, _eps, _dropout, _attribute, nn.Module.eval]),
        (True, [_number, _eps, _dropout]),
        (None, [_layer, _kind, _own_parametrization, _parametrization]),
        (None, [_data, _parameter, _frozen, _buffer, _new_buffer]),
        (None, [_hook, _pre_hook]),
        (None, [_forward]),
        (None, [_unreadable]),
    ],
    ids=["attributes", "numbers", "layers", "tensors", "hooks", "forward", "unreadable"],
)
def test_a_change_of_the_network_is_seen(
    dynamic: bool | None, changes: list[Callable[[Net], object]]
) -> None:
    """As an answer given before would be a slope of another network."""
    torch.manual_seed(0)
    net = Net()
    compiled = torch.compile(loss_of, fullgraph=True, dynamic=dynamic, backend="eager")
    compare(compiled, net)
    for change in changes:
        with torch.no_grad():
            change(net)
        compare(compiled, net)


def test_networks_of_one_kind_share_a_graph(recorder: Recorder) -> None:
    compiled = torch.compile(loss_of, fullgraph=True, dynamic=True, backend=recorder)
    for seed in range(10):
        compare(compiled, network("highway", D1 + K, 2, WIDTH, torch.float64, seed))
    assert recorder.fused == [1]


def test_a_change_within_the_compiled_function_is_seen(recorder: Recorder) -> None:
    """The compiler makes it in the module itself only when the function is over."""

    def loss(net: Net, x1: Tensor, x2: Tensor) -> Tensor:
        first = loss_of(net, x1, x2)
        net.skip = not net.skip
        net.slope = net.slope + 0.3
        second = loss_of(net, x1, x2)
        net.drop.eval()
        third = loss_of(net, x1, x2)
        net.skip, net.slope = not net.skip, 0.2
        net.drop.train()
        return first + 2 * second + 3 * third

    compare(torch.compile(loss, fullgraph=True, backend=recorder), Net(), loss=loss)
    assert recorder.fused == [3]


# --- all that may be asked ------------------------------------------------------------------------


def _slopes(net: nn.Module, x1: Tensor, x2: Tensor) -> Tensor:
    y, J = value_and_jacobian(net, x1, x2)
    return y.sum() + J.square().sum()


def _asked(**options: Any) -> Loss:
    def loss(net: nn.Module, x1: Tensor, x2: Tensor) -> Tensor:
        penalty = fused_mono_penalty(net, x1, x2, **options)
        assert isinstance(penalty, Tensor)
        return penalty.square().sum()

    return loss


_REFERENCE = _asked(backend="reference")


@pytest.mark.parametrize(
    "loss",
    [
        _slopes,
        _asked(direction=[[1, 0], [-1, 1]], hinge="squared", margin=0.3, reduction="mean"),
        _asked(weight=torch.rand(33, 2, 2).double(), reduction="none", direction=[1, -1]),
        _asked(weight=0.3, backend=HANDWRITTEN[0]),
        _REFERENCE,
    ],
    ids=["slopes", "mean", "none", "number", "reference"],
)
def test_whatever_is_asked(loss: Loss, recorder: Recorder) -> None:
    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend=recorder)
    compare(compiled, build("wide and deep"), loss=loss)
    assert recorder.fused == [loss is not _REFERENCE]


@pytest.mark.parametrize("kind", ["chain", "program", "not read"])
def test_a_weight_that_is_a_number_makes_no_graph_for_each_value(kind: str) -> None:
    net: nn.Module = Inside(partial(torch.cumsum, dim=-1) if kind == "not read" else torch.sin)
    if kind == "chain":
        net = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 2)).double()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(fused_mono_penalty, fullgraph=True, backend=counter)
    x1, x2 = points(9, D1, K)
    for weight in (0.3, 0.7, 1.9, 0.01):
        assert_same(
            [compiled(net, x1, x2, margin=0.2, weight=weight)],
            [fused_mono_penalty(net, x1, x2, margin=0.2, weight=weight)],
            1e-12,
        )
    assert counter.frame_count == 2  # the second value makes it symbolic


def test_batches_of_two_axes_and_x2_without_an_axis(recorder: Recorder) -> None:
    def loss(net: nn.Module, x1: Tensor, x2: Tensor) -> Tensor:
        x = torch.cat([x1, x2], -1).unflatten(0, (3, -1))
        y, penalty = fused_mono_penalty(net, x[..., :4], x[..., 4], return_output=True)
        return y.square().sum() + penalty

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend=recorder)
    for N in (33, 60):
        compare(compiled, build("wide and deep"), N, loss)
    assert recorder.fused == [1]


def test_a_weight_that_is_trained_and_a_network_that_is_not(recorder: Recorder) -> None:
    net, weight = build("SwiGLU").requires_grad_(False), nn.Parameter(torch.rand(2, 2).double())
    x1, x2 = points(33, D1, K)
    found = []
    for f in (fused_mono_penalty, torch.compile(fused_mono_penalty, backend=recorder)):
        penalty = f(net, x1, x2, weight=weight)
        found.append([penalty, *gradients(penalty, weight)])
    assert_same(*found, 1e-12)
    assert recorder.fused == [1]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode: Callable[[], AbstractContextManager[None]]) -> None:
    net, (x1, x2) = build("highway"), points(33, D1, K)
    with mode():
        got = torch.compile(fused_mono_penalty, fullgraph=True, backend="aot_eager")(net, x1, x2)
        assert_same([got], [fused_mono_penalty(net, x1, x2)], 1e-12)
    assert not got.requires_grad


def test_half_precision(recorder: Recorder) -> None:
    """The same bits as in eager mode, in a network of that dtype and under autocast."""
    dtype = torch.bfloat16

    def under_autocast(net: nn.Module, x1: Tensor, x2: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=dtype):
            y, penalty = fused_mono_penalty(net, x1, x2, margin=0.3, return_output=True)
        assert y.dtype == dtype
        return y.float().square().mean() + penalty

    compiled = torch.compile(loss_of, fullgraph=True, backend=recorder)
    compare(compiled, build("tabular ResNet", dtype=dtype), dtype=dtype, tolerance=0)
    compiled = torch.compile(under_autocast, fullgraph=True, backend=recorder)
    net = build("tabular ResNet", dtype=torch.float32)
    compare(compiled, net, loss=under_autocast, dtype=torch.float32, tolerance=0)
    assert recorder.fused == [1, 1]


@NEEDS_COMPILER
def test_active_dropout_draws_in_every_call() -> None:
    """And the same again from the same seed: by the compiler's own generator, too."""
    net, (x1, x2) = build("MLP with active dropout", dtype=torch.float32), points(64, D1, K)
    x1, x2 = x1.float(), x2.float()
    for backend in ("aot_eager", "inductor"):
        torch._dynamo.reset()
        compiled = torch.compile(loss_of, fullgraph=True, backend=backend)
        compiled(net, x1, x2)
        torch.manual_seed(5)
        first, second = compiled(net, x1, x2), compiled(net, x1, x2)
        torch.manual_seed(5)
        again = compiled(net, x1, x2)
        assert first == again
        assert first != second


# --- ways of training -----------------------------------------------------------------------------


def test_a_module_compiled_as_a_whole_trains_as_in_eager_mode(recorder: Recorder) -> None:
    found = []
    for compiled in (False, True):
        torch.manual_seed(0)
        net = build("tabular ResNet").train()
        model = MonotonePenalty(net, direction=[1, -1], weight=2.0, batch_stats="running")
        model.mlp.eval()
        if compiled:
            model.compile(fullgraph=True, backend=recorder)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
        for _ in range(3):
            y, penalty = model(*points(33, D1, K))
            (y.square().mean() + penalty / 33).backward()
            optimizer.step()
            optimizer.zero_grad()
        found.append([p.detach() for p in net.parameters()])
    assert_same(*found, 1e-12)
    assert recorder.fused == [1]


def test_checkpoint_within(recorder: Recorder) -> None:
    def loss(net: nn.Module, x1: Tensor, x2: Tensor) -> Tensor:
        value: Tensor = checkpoint(loss_of, net, x1, x2, use_reentrant=False)
        return value

    for name in ("SwiGLU", "MLP with active dropout"):
        torch._dynamo.reset()
        compare(torch.compile(loss, fullgraph=True, backend=recorder), build(name), loss=loss)
    assert recorder.fused == [1, 1]


def test_parametrized_weights(recorder: Recorder) -> None:
    """The power iteration of spectral_norm sets attributes: it takes the general path."""
    for computed, fused in ((parametrizations.weight_norm, 1), (parametrizations.spectral_norm, 0)):
        net, twin = build("highway"), build("highway")
        for m in (net, twin):
            computed(m.first)
        twin.load_state_dict(net.state_dict())
        compiled = torch.compile(loss_of, fullgraph=True, backend=recorder)
        x1, x2 = points(9, D1, K)
        for _ in range(2):
            found = []
            for f, m in ((compiled, net), (loss_of, twin)):
                value = f(m, x1, x2)
                found.append([value, *gradients(value, *m.parameters()), *m.buffers()])
            assert_same(*found, 1e-12)
        assert recorder.fused.pop() == fused


class Settings:
    scale = 0.3


class Configured(nn.Module):
    """Reads a number that is not its own, which PyTorch knows in one place of a graph alone."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.settings = nn.Linear(5, 8), nn.Linear(8, 2), Settings()
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.b(torch.tanh(self.a(x)) * self.settings.scale)
        return y


def test_a_number_elsewhere_used_in_two_calls() -> None:
    def loss(net: nn.Module, x1: Tensor, x2: Tensor) -> Tensor:
        return loss_of(net, x1, x2) + loss_of(net, -x1, x2)

    net = Configured()
    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    for scale in (0.3, 0.7):
        net.settings.scale = scale
        compare(compiled, net, loss=loss)


def test_functional_call(recorder: Recorder) -> None:
    net, other = build("highway"), network("highway", D1 + K, 2, WIDTH, torch.float64, seed=8)
    params = dict(other.named_parameters())

    def loss(net: nn.Module, x1: Tensor, x2: Tensor) -> Tensor:
        model = MonotonePenalty(net)
        swapped = {f"mlp.{name}": p for name, p in params.items()}
        y, penalty = torch.func.functional_call(model, swapped, (x1, x2))
        return y.square().mean() + penalty

    x1, x2 = points(33, D1, K)
    got = torch.compile(loss, backend=recorder)(net, x1, x2)
    y, penalty = MonotonePenalty(other)(x1, x2)
    assert_same([got], [y.square().mean() + penalty], 1e-12)


# --- what the kernel does not serve ---------------------------------------------------------------


SEEN: list[int] = []


class Counts(nn.Module):
    """A forward that changes an attribute of its module, a list in it or elsewhere, or a buffer in
    place."""

    calls: Tensor

    def __init__(self, how: str) -> None:
        super().__init__()
        self.a, self.b, self.how, self.count = nn.Linear(5, 8), nn.Linear(8, 2), how, 0
        self.widths: list[int] = []
        self.register_buffer("calls", torch.zeros(()))
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "attribute":
            self.count += 1
        elif self.how == "list":
            self.widths.append(x.shape[-1])
        elif self.how == "elsewhere":
            SEEN.append(x.shape[-1])
        else:
            self.calls.add_(1)
        y: Tensor = self.b(torch.tanh(self.a(x)) * (1 + 0.1 * self.calls))
        return y


@pytest.mark.parametrize("how", ["attribute", "list", "elsewhere", "buffer"])
def test_a_forward_that_changes_something_changes_it_once(how: str, recorder: Recorder) -> None:
    nets = Counts(how), Counts(how)
    nets[1].load_state_dict(nets[0].state_dict())
    compiled = torch.compile(loss_of, fullgraph=True, backend=recorder)
    x1, x2 = points(9, D1, K)
    for call in range(1, 4):
        found = []
        for f, net in zip((compiled, loss_of), nets, strict=True):
            SEEN.clear()
            value = f(net, x1, x2)
            found.append([value, *gradients(value, *net.parameters())])
            changed = net.count, len(net.widths), int(net.calls)
            assert changed == tuple(call * (how == h) for h in ("attribute", "list", "buffer"))
            assert len(SEEN) == (how == "elsewhere")
        assert_same(*found, 1e-12)
    assert recorder.fused[0] == (how == "buffer")


class Layered(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 8), nn.Linear(8, 2)
        self.register_buffer("mean", torch.zeros(8))
        self.last: Tensor | None = None
        self.double()

    def hidden(self, x: Tensor) -> Tensor:
        h: Tensor = torch.tanh(self.a(x))
        return h


class Stores(Layered):
    def forward(self, x: Tensor) -> Tensor:
        self.last = self.hidden(x)
        y: Tensor = self.b(self.last)
        return y


class Replaces(Layered):
    def forward(self, x: Tensor) -> Tensor:
        h = self.hidden(x)
        self.mean = 0.9 * self.mean + 0.1 * h.detach().mean(0)
        y: Tensor = self.b(h - self.mean)
        return y


class Averages(Layered):
    """In place, in a network that is not read."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.hidden(x).cumsum(-1)
        with torch.no_grad():
            self.mean.lerp_(h.mean(0), 0.1)
        y: Tensor = self.b(h - self.mean)
        return y


class Checkpoints(Layered):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.b(checkpoint(self.hidden, x, use_reentrant=False))
        return y


class Attends(Layered):
    """With PyTorch's fused attention, were it not for the second derivative."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.MultiheadAttention(8, 2, batch_first=True).double()

    def forward(self, x: Tensor) -> Tensor:
        h = self.hidden(x).unsqueeze(1)
        y: Tensor = self.b(self.heads(h, h, h)[0].squeeze(1).tanh())
        return y


def _statistics(net: nn.Module, x1: Tensor, x2: Tensor) -> Tensor:
    """Two calls in one function, each of which moves them."""
    total = x1.new_zeros(())
    for x in (x2, -x2):
        y, penalty = fused_mono_penalty(
            net, x1, x, margin=0.1, return_output=True, batch_stats="running"
        )
        total = total + y.square().mean() + penalty
    return total


class Normalised(Layered):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(8).double()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.b(self.norm(self.hidden(x)))
        return y


@pytest.mark.parametrize(
    ("kind", "loss"),
    [
        (Stores, loss_of),
        (Replaces, loss_of),
        (Averages, loss_of),
        (Checkpoints, loss_of),
        (Attends, loss_of),
        (Stores, _asked(backend="reference")),
        (Normalised, _statistics),
    ],
)
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_state_and_checkpoints_of_a_network_that_is_not_captured(
    kind: type[Layered], loss: Loss, backend: str
) -> None:
    net = kind()
    twin, (x1, x2) = copy.deepcopy(net), points(9, D1, K)
    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend=backend)
    for _ in range(2):
        found = []
        for f, m in ((compiled, net), (loss, twin)):
            value = f(m, x1, x2)
            if m.last is not None:
                value = value + m.last.square().sum()
            found.append([value, *gradients(value, *m.parameters()), *m.buffers()])
        assert_same(*found, 1e-12)


class Recurs(Layered):
    """The compiler does not even look at an LSTM."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTM(8, 8, batch_first=True).double()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.b(self.cell(self.hidden(x).unsqueeze(1))[0].squeeze(1))
        return y


class Cubes(Layered):
    """Has a derivative of its own, inside a part that is compiled with the rest."""

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = Cube.apply(self.hidden(x))  # type: ignore[no-untyped-call]
        y: Tensor = self.b(checkpoint(torch.tanh, h, use_reentrant=False))
        return y


class Breaks(Layered):
    """The compiler gives up in the middle of its forward."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.hidden(x)
        torch._dynamo.graph_break()
        y: Tensor = self.b(h * h)
        return y


class BreaksUnread(Breaks):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).cumsum(-1)


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        (Cubes, "mlp: it has an autograd.Function, whose backward torch.compile does not"),
        (Breaks, r"mlp: the compiler cannot trace its forward as one graph \(Call to"),
        (Recurs, r"mlp: the compiler cannot trace its forward as one graph \(it has an RNN"),
        (BreaksUnread, r"mlp: the compiler cannot trace its forward as one graph \(Call to"),
    ],
)
@pytest.mark.parametrize("loss", [loss_of, _REFERENCE])
def test_where_the_compiler_gives_up_eager_mode_serves(
    kind: type[Layered], why: str, loss: Loss
) -> None:
    """Or, where all is to be one graph, there is an error."""
    net = kind()
    for backend in ("eager", "aot_eager"):
        torch._dynamo.reset()
        compare(torch.compile(loss, backend=backend), net, loss=loss)
        with pytest.raises(torch._dynamo.exc.Unsupported, match=why):
            torch.compile(loss, backend=backend, fullgraph=True)(net, *points(9, D1, K))
    net.requires_grad_(False)
    for context in (torch.enable_grad, torch.no_grad):
        torch._dynamo.reset()
        with context(), pytest.raises(torch._dynamo.exc.Unsupported, match=why):
            torch.compile(loss, backend="eager", fullgraph=True)(net, *points(9, D1, K))


def test_a_break_that_no_trial_told_of_makes_no_slopes_of_zero(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As in a graph of their own they would be."""
    monkeypatch.setattr(capture, "_trial", lambda *_: "")
    with pytest.raises(torch._dynamo.exc.Unsupported, match="graph_break"):
        torch.compile(loss_of, backend="aot_eager")(BreaksUnread(), *points(9, D1, K))


class Picks(nn.Module):
    """Columns by a buffer, which tells them in eager mode alone."""

    columns: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("columns", torch.tensor([4, 2, 0]))
        self.a = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2)).double()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.a(x[:, self.columns])
        return y


@pytest.mark.parametrize("dynamic", [False, True])
def test_what_is_read_in_eager_mode_alone_takes_the_general_path(
    dynamic: bool, recorder: Recorder
) -> None:
    net = Picks()
    assert plan(net, *points(9, D1, K)).backend != "reference"
    compare(torch.compile(loss_of, fullgraph=True, dynamic=dynamic, backend=recorder), net)
    assert recorder.fused == [0]


def test_transforms() -> None:
    net, (x1, x2) = build("highway").requires_grad_(False), points(9, D1, K)

    def gradient(x2: Tensor) -> Tensor:
        return torch.func.grad(lambda x: fused_mono_penalty(net, x1, x, margin=0.5))(x2)

    compiled = torch.compile(gradient, fullgraph=True, backend="aot_eager")
    assert_same([compiled(x2)], [gradient(x2)], 1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"direction": [[1, 1]]}, "direction: expected a scalar"),
        ({"weight": torch.rand(3, 2).double()}, "weight: expected a shape"),
        ({"mode": "sideways"}, "mode: expected one of"),
    ],
)
def test_errors_say_what_they_say_in_eager_mode(options: dict[str, Any], message: str) -> None:
    net, (x1, x2) = build("own forward"), points(9, D1, K)
    compiled = torch.compile(fused_mono_penalty, backend="eager")
    for f in (fused_mono_penalty, compiled):
        with pytest.raises(ValueError, match=message):
            f(net, x1, x2, **options)


def test_batch_normalisation_put_into_training_within_the_compiled_function() -> None:
    net = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 2)).double()
    x1, x2 = points(9, 3, 2)

    def loss(net: nn.Module, **how: str) -> Tensor:
        net.train()
        y, penalty = fused_mono_penalty(net, x1, x2, return_output=True, **how)
        return y.square().mean() + penalty

    twin, other = copy.deepcopy(net).eval(), net.eval()
    want = loss(twin, batch_stats="running")
    got = torch.compile(loss, backend="aot_eager")(other, batch_stats="running")
    assert_same([got], [want])
    grads = [gradients(t, *n.parameters()) for t, n in ((got, other), (want, twin))]
    assert_same(*grads)
    torch._dynamo.reset()
    with pytest.raises(Exception, match="statistics of the batch"):
        torch.compile(loss, backend="aot_eager")(net.eval())


# --- compiled inside, called in eager mode --------------------------------------------------------


class Inside(nn.Module):
    def __init__(self, run: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.run, self.a, self.b = run, nn.Linear(5, 8), nn.Linear(8, 2)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.b(self.run(self.a(x)))
        return y


@pytest.mark.parametrize(
    ("what", "run", "fused"),
    [
        ("network", torch.sin, True),
        ("network", partial(torch.cumsum, dim=-1), False),
        ("network in place", torch.sin, True),
        ("part", torch.sin, True),
        ("part in place", torch.sin, True),
        ("part in place", partial(torch.cumsum, dim=-1), False),
    ],
)
def test_what_is_compiled_inside_a_network_runs_as_it_is_written(
    what: str, run: Callable[[Tensor], Tensor], fused: bool
) -> None:
    """A compiled form has no second derivative."""
    net = Inside(run)
    twin, (x1, x2) = copy.deepcopy(net), points(9, D1, K)
    if "in place" in what:
        (net.b if "part" in what else net).compile(backend="aot_eager")
    elif what == "part":
        net.b = torch.compile(net.b, backend="aot_eager")
    outer = torch.compile(net, backend="aot_eager") if what == "network" else net
    x = torch.cat([x1, x2], -1)
    for _ in range(2):  # and the compiled form serves who calls it
        assert_same([outer(x)], [twin(x)])
        found = []
        for m, called in ((net, outer), (twin, twin)):
            value = loss_of(called, x1, x2)
            found.append([value, *gradients(value, *m.parameters())])
        assert_same(*found)
        assert (plan(outer, x1, x2).backend != "reference") == fused
