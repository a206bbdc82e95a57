"""A call like one that was kept goes straight to the backend, and whatever changed since is seen:
it gives what a network gives that was never served."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from decimal import Decimal
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from monokernel import MonotonePenalty, again, api, fused_mono_penalty, value_and_jacobian
from monokernel.backends import cpu

from .support import mlp, points

pytestmark = pytest.mark.skipif(cpu.step() is None, reason="the operator was not built")

D1, K, D, N = 3, 2, 2, 7
Outcome = tuple[str, list[Tensor]]


def served() -> tuple[nn.Sequential, Tensor, Tensor]:
    """A network with inactive dropout, and inputs, of which a call was kept."""
    torch.manual_seed(0)
    net = mlp(D1, K, D, activation=nn.LeakyReLU(0.1), dtype=torch.float32)
    net.append(nn.Dropout(0.5)).eval()
    x1, x2 = points(N, D1, K, torch.float32)
    fused_mono_penalty(net, x1, x2)
    value_and_jacobian(net, x1, x2)
    return net, x1, x2


def outcome(call: Callable[[], Any], net: nn.Module, *inputs: Any) -> Outcome:
    """What the call gives, with the gradients of all that wants one, or what it says."""
    torch.manual_seed(1)
    try:
        found = call()
    except (TypeError, ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}", []
    results = list(found) if isinstance(found, tuple) else [found]
    leaves = [t for t in [*net.parameters(), *inputs] if isinstance(t, Tensor) and t.requires_grad]
    total = sum(t.float().square().sum() for t in results)
    if not total.requires_grad:
        return "no gradient", results
    grads = torch.autograd.grad(total, leaves, allow_unused=True)
    return "", [*results, *(torch.zeros(()) if g is None else g for g in grads)]


def assert_seen(net: nn.Module, x1: Any, x2: Any, **asked: Any) -> None:
    """Twice by the network that was served, and by a copy that never was."""
    for function in (fused_mono_penalty, value_and_jacobian):
        own = {} if function is value_and_jacobian else {"return_output": True, **asked}
        fresh = copy.deepcopy(net)
        assert id(fresh) not in again._served
        given = x1, x2, own.get("weight")
        want = outcome(lambda n=fresh, o=own, f=function: f(n, x1, x2, **o), fresh, *given)
        for _ in range(2):
            got = outcome(lambda o=own, f=function: f(net, x1, x2, **o), net, *given)
            assert got[0] == want[0]
            assert len(got[1]) == len(want[1])
            assert all(map(same, got[1], want[1])), asked


def same(a: Tensor, b: Tensor) -> bool:
    """Bit for bit, but for which NaN it is."""
    return a.shape == b.shape and torch.equal(a.nan_to_num(7e30), b.nan_to_num(7e30))


class LooksOn(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **kwargs or {})


@pytest.fixture
def straight(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of each call that follows, whether it went straight to the backend."""
    seen: list[bool] = []

    def repeated(*asked: Any) -> Any:
        found = again.repeated(*asked)
        seen.append(found is not None)
        return found

    monkeypatch.setattr(api, "repeated", repeated)
    return seen


@pytest.mark.parametrize(
    "asked",
    [
        {},
        {"direction": -1, "reduction": "mean"},
        {"direction": (1, -1), "hinge": "squared"},
        {"direction": ((1, 0), (0, -1)), "reduction": "none", "mode": "adjoint"},
        {"direction": (1, 0), "columns": ("a", "b"), "margin": 0.25, "backend": "cpu"},
        {"mode": "tangent", "batch_stats": "running"},
        {"direction": [1, -1], "margin": [0.1, 0.2]},
        {"direction": {"b": -1}, "columns": ["a", "b"], "margin": {"b": 0.5}},
        {"direction": {0: [1, -1]}, "margin": 1},
        {"weight": 0.5, "margin": 0.3},
        {"weight": torch.tensor([0.5, 2.0]), "reduction": "none"},
    ],
    ids=str,
)
def test_the_second_call_goes_straight_and_is_the_same(
    asked: dict[str, Any], straight: list[bool]
) -> None:
    net, x1, x2 = served()
    assert_seen(net, x1, x2, **asked)
    straight.clear()
    fresh = copy.deepcopy(net)
    want = outcome(lambda: fused_mono_penalty(fresh, x1[:3], x2[:3], **asked), fresh)
    for rows in (N, 3):
        got = outcome(lambda n=rows: fused_mono_penalty(net, x1[:n], x2[:n], **asked), net)
    assert straight == [False, False, True] if "mode" in asked else [False, True, True]
    assert all(map(same, got[1], want[1]))


def test_all_inputs_as_one(straight: list[bool]) -> None:
    net, x1, x2 = served()
    x, asked = torch.cat([x1, x2], -1), {"direction": (0, 0, 0, 1, -1), "reduction": "mean"}
    for _ in range(3):
        assert_seen(net, x, None, **asked)
    assert_seen(net, x[:6].view(2, 3, D1 + K), None, **asked)
    assert_seen(net, x[0], None, **asked)
    with torch.inference_mode():
        made_there = x.clone()
    assert_seen(net, made_there, None, **asked)
    fused_mono_penalty(net, x, **asked)
    straight.clear()
    want = fused_mono_penalty(copy.deepcopy(net), x, **asked)
    assert torch.equal(fused_mono_penalty(net, x, **asked), want)
    assert straight == [False, True]


def test_one_column_may_come_without_its_dimension(straight: list[bool]) -> None:
    net = mlp(4, 1, 1, dtype=torch.float32)
    x1, x2 = points(N, 4, 1, torch.float32)
    first = fused_mono_penalty(net, x1, x2[:, 0])
    assert torch.equal(fused_mono_penalty(net, x1, x2[:, 0]), first)
    assert torch.equal(fused_mono_penalty(net, x1, x2), first)
    assert straight == [False, True, True]


def test_a_penalty_module_goes_straight(straight: list[bool]) -> None:
    net, x1, x2 = served()
    model = MonotonePenalty(net, direction=torch.tensor([1, -1]), margin=0.1).train()
    net[-1].eval()
    found = [model(x1, x2)[1] for _ in range(3)]
    assert torch.equal(found[0], found[2])
    assert straight[-1]


def test_a_margin_may_move(straight: list[bool]) -> None:
    net, x1, x2 = served()
    for margin in (0.0, 0.1, 0.2, -0.0, -1.0, 0.1):
        assert_seen(net, x1, x2, margin=margin)
        fused_mono_penalty(net, x1, x2, margin=margin)
        assert straight[-1]
    for wrong in (float("nan"), float("inf"), "1", None, True, (0.1, 0.1, 0.1), 10**400):
        assert_seen(net, x1, x2, margin=wrong)


@pytest.mark.parametrize("shape", [(), (1,), (2, 3), (2, 0, 3)])
def test_rows_of_any_batch(shape: tuple[int, ...], straight: list[bool]) -> None:
    net, _, _ = served()
    x1, x2 = torch.randn(*shape, D1), torch.randn(*shape, K)
    for asked in ({}, {"reduction": "none"}, {"reduction": "mean", "weight": 2.0}):
        fused_mono_penalty(net, x1, x2, **asked)
        assert_seen(net, x1, x2, **asked)
        fused_mono_penalty(net, x1, x2, **asked)
        assert straight[-1]


def test_what_is_kept_does_not_follow_a_list_or_a_dict_that_changes(straight: list[bool]) -> None:
    net, x1, x2 = served()
    for signs in ([1, -1], {0: 1, 1: -1}):
        for _ in range(2):
            assert_seen(net, x1, x2, direction=signs)
        signs[1] = 0
        assert_seen(net, x1, x2, direction=signs)
        fused_mono_penalty(net, x1, x2, direction=signs)
        assert straight[-1]


def test_many_kinds_of_calls_are_kept_and_no_more(straight: list[bool]) -> None:
    net, x1, x2 = served()
    signs = [(a, b) for a in (-1, 0, 1) for b in (-1, 0, 1) if (a, b) != (0, 0)]
    calls = [{"direction": s, "hinge": h} for s in signs for h in ("linear", "squared")]
    for _ in range(2):
        for asked in calls[: again.MOST_CALLS - 2]:
            fused_mono_penalty(net, x1, x2, **asked)
    assert all(straight[again.MOST_CALLS :])
    for _ in range(2):
        for asked in [*calls, {}, {"reduction": "none"}]:
            assert_seen(net, x1, x2, **asked)
    assert len(again._served[id(net)].calls) <= again.MOST_CALLS


def hook(module: Any, *_: Any) -> Tensor:
    result: Tensor = _[-1] * 2
    return result


def grow(net: nn.Sequential) -> None:
    net.insert(2, nn.Tanh())
    net.insert(2, nn.Linear(9, 9))


def widen(net: nn.Sequential) -> None:
    net[0], net[2] = nn.Linear(5, 8), nn.Linear(8, 7)


class Tripled(Tensor):
    """A weight with a way of its own to be multiplied with."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear:
            args = args[0], 3 * args[1].as_subclass(Tensor), *args[2:]
        return super().__torch_function__(func, (), args, kwargs or {})

    def __deepcopy__(self, memo: Any) -> Any:
        return nn.Parameter(self.detach().clone().as_subclass(Tripled))


def attribute(layer: nn.Module, name: str, t: Tensor) -> None:
    delattr(layer, name)
    setattr(layer, name, t)


def attributes(net: nn.Sequential) -> None:
    for layer, inputs, outputs in ((net[0], 5, 16), (net[2], 16, 7)):
        attribute(layer, "weight", torch.ones(outputs, inputs))
        attribute(layer, "bias", torch.ones(outputs))


CHANGES: dict[str, Callable[[nn.Sequential], object]] = {
    "other weights": lambda net: net[0].weight.data.mul_(-2),
    "a frozen layer": lambda net: net[0].requires_grad_(False),
    "another weight": lambda net: setattr(net[0], "weight", nn.Parameter(torch.ones(9, 5))),
    "wider layers": widen,
    "a smaller weight": lambda net: setattr(net[0], "weight", nn.Parameter(torch.ones(8, 5))),
    "more inputs": lambda net: setattr(net[0], "weight", nn.Parameter(torch.ones(9, 6))),
    "a weight with a way of its own": lambda net: setattr(
        net[0], "weight", nn.Parameter(net[0].weight.detach().as_subclass(Tripled))
    ),
    "a weight that is no parameter": lambda net: attribute(net[0], "weight", torch.ones(9, 5)),
    "a bias of another size": lambda net: attribute(net[0], "bias", torch.ones(1)),
    "attributes": attributes,
    "a weight in half precision": lambda net: net[0].half(),
    "a weight elsewhere": lambda net: net[0].to("meta"),
    "no bias": lambda net: setattr(net[0], "bias", None),
    "a layer more": grow,
    "a layer less": lambda net: net.__delitem__(1),
    "an activation's number": lambda net: setattr(net[1], "negative_slope", 0.7),
    "another activation": lambda net: net.__setitem__(1, nn.Tanh()),
    "active dropout": lambda net: net.train(),
    "no dropout": lambda net: setattr(net[-1], "p", 0.0),
    "a forward hook": lambda net: net[1].register_forward_hook(hook),
    "a hook of the whole": lambda net: net.register_forward_hook(hook),
    "a forward of its own": lambda net: setattr(net[1], "forward", torch.tanh),
    "float64": lambda net: net.double(),
    "parametrized": lambda net: nn.utils.parametrizations.weight_norm(net[0]),
    "another class": lambda net: setattr(net[1], "__class__", nn.Tanh),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_of_the_network_is_seen(name: str) -> None:
    net, x1, x2 = served()
    CHANGES[name](net)
    assert_seen(net, x1, x2)


def test_a_hook_of_all_modules_is_seen() -> None:
    net, x1, x2 = served()
    handle = nn.modules.module.register_module_forward_hook(hook)
    try:
        assert_seen(net, x1, x2)
    finally:
        handle.remove()
    assert_seen(net, x1, x2)


INPUTS: dict[str, Callable[[Tensor, Tensor], tuple[Any, Any]]] = {
    "no tensor": lambda x1, x2: ([1.0], x2),
    "integers": lambda x1, x2: (x1.long(), x2),
    "float64": lambda x1, x2: (x1.double(), x2.double()),
    "two dtypes": lambda x1, x2: (x1.double(), x2),
    "x2 in bfloat16": lambda x1, x2: (x1, x2.bfloat16()),
    "bfloat16": lambda x1, x2: (x1.bfloat16(), x2.bfloat16()),
    "another device": lambda x1, x2: (x1.to("meta"), x2.to("meta")),
    "two devices": lambda x1, x2: (x1, x2.to("meta")),
    "a column less": lambda x1, x2: (x1[:, :2], x2),
    "other columns": lambda x1, x2: (torch.cat([x1, x2[:, :1]], -1), x2[:, 1:]),
    "no columns": lambda x1, x2: (torch.cat([x1, x2], -1), x2[:, :0]),
    "all columns": lambda x1, x2: (x1[:, :0], torch.cat([x1, x2], -1)),
    "a row less": lambda x1, x2: (x1[1:], x2),
    "one row of x2": lambda x1, x2: (x1, x2[:1]),
    "no row of x2": lambda x1, x2: (x1, x2[:0]),
    "x2 has more dimensions": lambda x1, x2: (x1, x2[None]),
    "x2 has none": lambda x1, x2: (x1, x2[0, 0]),
    "both sparse": lambda x1, x2: (x1.to_sparse(), x2.to_sparse()),
    "no rows": lambda x1, x2: (x1[:0], x2[:0]),
    "a batch": lambda x1, x2: (x1[:6].view(2, 3, D1), x2[:6].view(2, 3, K)),
    "one row": lambda x1, x2: (x1[0], x2[0]),
    "sparse": lambda x1, x2: (x1.to_sparse(), x2),
    "x2 is sparse": lambda x1, x2: (x1, x2.to_sparse()),
    "nested": lambda x1, x2: (torch.nested.nested_tensor([*x1]), x2),
    "x2 is nested": lambda x1, x2: (x1, torch.nested.nested_tensor([*x2])),
    "wanting gradients": lambda x1, x2: (x1.requires_grad_(), x2.requires_grad_()),
    "transposed": lambda x1, x2: (x1.T.contiguous().T, x2.T.contiguous().T),
    "parameters": lambda x1, x2: (nn.Parameter(x1), nn.Parameter(x2)),
    "NaN": lambda x1, x2: (x1 * torch.nan, x2),
    "nothing in x1": lambda x1, x2: (torch.empty(0), torch.cat([x1, x2], -1)),
    "x1 alone": lambda x1, x2: (torch.cat([x1, x2], -1), None),
}


@pytest.mark.parametrize("name", INPUTS)
def test_other_inputs_are_seen(name: str) -> None:
    net, *x = served()
    assert_seen(net, *INPUTS[name](*x))


@pytest.mark.parametrize(
    "asked",
    [
        {"direction": 2},
        {"direction": (1, 1, 1)},
        {"direction": [1, [1]]},
        {"direction": torch.tensor([1, -1])},
        {"direction": Decimal(1)},
        {"direction": 1 + 0j},
        {"direction": True},
        {"margin": (0.1, True)},
        {"direction": {2: 1}},
        {"direction": {"a": 1}},
        {"direction": {0: torch.tensor(1)}},
        {"direction": "1"},
        {"columns": ("a",)},
        {"columns": ("a", "a")},
        {"hinge": "none"},
        {"reduction": "all"},
        {"reduction": ["sum"]},
        {"mode": "adjoin"},
        {"backend": "torch"},
        {"backend": "gpu"},
        {"backend": "reference"},
        {"batch_stats": "none"},
        {"weight": -0.5},
        {"weight": True},
        {"weight": "1"},
        {"weight": torch.tensor([0.5, -2.0])},
        {"weight": torch.tensor([1, 2])},
        {"weight": torch.ones(3)},
        {"weight": torch.linspace(0, 1, N)},
        {"weight": torch.linspace(0, 1, 4 * N).view(N, 2, 2)},
        {"weight": torch.ones(2, requires_grad=True)},
        {"weight": torch.ones(2).to_sparse()},
        {"weight": torch.tensor([torch.nan, 1.0])},
    ],
    ids=lambda asked: " ".join(f"{asked}".split()),
)
def test_other_arguments_are_seen(asked: dict[str, Any]) -> None:
    assert_seen(*served(), **asked)


def test_the_first_argument_that_is_wrong_is_named() -> None:
    net, x1, x2 = served()
    for weight in (torch.ones(7), -1.0, "1"):
        assert_seen(net, x1, x2[1:], weight=weight)
        assert_seen(net, x1, x2.to("meta"), weight=weight)


def test_a_way_to_call_all_layers_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    net, x1, x2 = served()

    def call(layer: nn.Module, x: Tensor) -> Any:
        return 3 * nn.Module.__call__(layer, x)

    monkeypatch.setattr(nn.Linear, "__call__", call)
    assert_seen(net, x1, x2)


@pytest.mark.parametrize("D", [1, 3])
def test_what_was_known_of_another_network_keeps_no_call(D: int) -> None:
    """In between the general path serves, with another number of outputs."""
    asked = {"direction": ((1, -1),) * D}
    for other in (
        nn.utils.parametrizations.weight_norm(nn.Linear(7, D)),
        nn.Sequential(nn.Linear(7, D), Raises(())),
    ):
        net, x1, x2 = served()
        last, net[4] = net[4], other.float()
        assert_seen(net, x1, x2, **asked)
        net[4] = last
        assert_seen(net, x1, x2, **asked)


class Raises(nn.Module):
    """In the calls with these numbers."""

    def __init__(self, calls: tuple[int, ...]) -> None:
        super().__init__()
        self.calls, self.count = calls, 0

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        if self.count in self.calls:
            raise RuntimeError("on purpose")
        return x + 0 * x.sum() if self.count < 0 else x


def test_an_error_of_a_layer_comes_once() -> None:
    net, x1, x2 = served()
    net[5] = Raises((1,))
    net[5].register_forward_hook(lambda *_: None)
    with pytest.raises(RuntimeError, match="on purpose"):
        fused_mono_penalty(net, x1, x2)
    assert net[5].count == 1


def test_an_error_of_a_hook_on_saved_tensors_comes_once() -> None:
    net, x1, x2 = served()
    packed = []

    def pack(t: Tensor) -> Tensor:
        packed.append(t)
        raise RuntimeError("on purpose")

    for own in (copy.deepcopy(net), net):
        packed.clear()
        with (
            torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t),
            pytest.raises(RuntimeError, match="on purpose"),
        ):
            fused_mono_penalty(own, x1, x2)
        assert len(packed) == 1


def test_a_trace_that_fails_says_so() -> None:
    net, x1, x2 = served()
    with pytest.raises(RuntimeError, match="requires grad as a constant"):
        torch.jit.trace(lambda a, b: fused_mono_penalty(net, a, b), (x1, x2), check_trace=False)


AROUND: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "a dispatch mode": LooksOn,
    "nothing": nullcontext,
}


@pytest.mark.parametrize("name", AROUND)
def test_what_is_around_the_call_is_seen(name: str) -> None:
    net, x1, x2 = served()
    with AROUND[name]():
        assert_seen(net, x1, x2)
    assert_seen(net, x1, x2)


def test_transforms_are_seen() -> None:
    net, x1, x2 = served()

    def total(x: Tensor) -> Tensor:
        y, penalty = fused_mono_penalty(net, x1, x, margin=1.0, return_output=True)
        return y.sum() + penalty

    x = x2.clone().requires_grad_()
    assert_seen(net, x1, x2, margin=1.0)
    (want,) = torch.autograd.grad(total(x), x)
    assert torch.allclose(torch.func.grad(total)(x2), want, rtol=1e-4)
    v = torch.randn_like(x2)
    _, along = torch.func.jvp(total, (x2,), (v,))
    assert torch.allclose(along, (want * v).sum(), rtol=1e-4)


def test_a_fused_call_may_be_traced_after_an_eager_one() -> None:
    net, x1, x2 = served()
    want = fused_mono_penalty(net, x1, x2, margin=0.5)
    step = torch.compile(lambda a, b: fused_mono_penalty(net, a, b, margin=0.5), backend="eager")
    assert torch.allclose(step(x1, x2), want)
    assert torch.equal(fused_mono_penalty(net, x1, x2, margin=0.5), want)


def test_weights_made_in_inference_mode_are_refused_in_words() -> None:
    net, x1, x2 = served()
    with torch.inference_mode():
        net[0].weight = nn.Parameter(torch.ones(9, 5))
    for _ in range(2):
        with pytest.raises(RuntimeError, match="inference_mode"):
            fused_mono_penalty(net, x1, x2)
