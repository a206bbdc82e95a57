"""Programs on the Triton backend under its interpreter, against the twin in PyTorch."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn
from torch.nn import functional as F

pytest.importorskip("triton")

from monokernel import fused_mono_penalty, plan, value_and_jacobian
from monokernel.activations import ACTIVATIONS, KINDS
from monokernel.backends import handwritten
from monokernel.backends import triton as backend
from monokernel.backends.schedule import facts_of
from monokernel.backends.triton import programs as path
from monokernel.backends.triton.launch import recorded
from monokernel.backends.triton.programs.config import WIDEST_ROW
from monokernel.backends.triton.programs.fusion import deferred_of
from monokernel.backends.triton.target import assumed, interpreting
from monokernel.columns import last_columns
from monokernel.problem import Hinge, Mode, Problem
from monokernel.program import Node
from tests.problems import activation, errors, run
from tests.support import assert_same, gradients, oracle, points
from tests.test_programs import BOTH_MODES, CASES, RandomCall, operands, random_calls
from tests.zoo import ACTIVE, ZOO, network

pytestmark = pytest.mark.skipif(not interpreting(), reason="runs under TRITON_INTERPRET=1")

Params = list[Tensor | None]


def assert_agrees(p: Problem, x: Tensor, params: Params, **options: Any) -> None:
    got, want = (run(backend, p, x, params, **options) for backend in (path, handwritten))
    assert_same(got, want)


@settings(max_examples=50)
@given(call=random_calls([0, 1, 16, 29]))
def test_random_programs(call: RandomCall) -> None:
    hinge = call.problem.hinge
    violating = None
    if hinge is None or hinge.elementwise:
        violating = torch.rand(len(call.x)) < 0.5
    with call.blocks():
        assert_agrees(
            call.problem, call.x, call.params, weight=call.weight, task=call.task,
            slopes=call.slopes, needs=call.needs, violating=violating,
        )  # fmt: skip


@BOTH_MODES
@pytest.mark.parametrize("name", CASES)
def test_value_slopes_and_gradients(name: str, mode: Mode) -> None:
    d, nodes = CASES[name]
    x, params = operands(d, nodes, 22, single=name == "one number for two widths")
    violating = torch.rand(22) < 0.5
    p = Problem(d, nodes, last_columns(d, min(d, 2)), mode, None)
    keys = {place for node in nodes if node.kind == "dropout" for place in node.params}
    needs = [True, *(t is not None and i not in keys for i, t in enumerate(params))]
    assert_agrees(p, x, params, violating=violating, needs=needs)
    assert_agrees(p, x, params, violating=violating, needs=needs, task=False)


@pytest.mark.parametrize("kind", [kind for kind in ACTIVATIONS if kind not in KINDS])
def test_every_activation_that_programs_alone_have(kind: str) -> None:
    """Those with a code for whole networks are in test_triton.py."""
    nodes = [linear(0, 0, 4)]
    if kind in ("sqrt", "log", "reciprocal"):  # of positive numbers away from 0
        nodes += [
            Node("square", (1,), (), (0.0, 0.0, 0.0), 4),
            Node("line", (2,), (), (1.0, 0.5), 4),
        ]
    nodes += [Node(kind, (len(nodes),), (), activation(kind)[1:], 4), linear(len(nodes) + 1, 2, 2)]
    x, params = operands(3, tuple(nodes), 22)
    p = Problem(3, tuple(nodes), last_columns(3, 2), "adjoint", None)
    assert_agrees(p, x, params, violating=torch.rand(22) < 0.5)


@BOTH_MODES
@pytest.mark.parametrize("name", ["pre-norm RMSNorm", "DCN-v2", "wide and deep"])
def test_columns_anywhere(name: str, mode: Mode) -> None:
    net = network(name, 5, 2, 6, torch.float64, seed=7)
    x = torch.randn(22, 5, dtype=torch.float64, requires_grad=True)
    inputs = [x, *net.parameters()]
    options = {"direction": {0: 1, 3: -1, 4: 1}, "margin": (0.1, 0.3, 0.2), "mode": mode}
    found = []
    for served in ("triton", "torch"):
        y, penalty = fused_mono_penalty(net, x, return_output=True, backend=served, **options)
        grads = gradients(y.square().sum() + penalty, *inputs)
        found.append([y, penalty, *grads])
    assert_same(*found)


# Chains of layers, which have kernels of their own.
CHAINS = ("MLP with dropout", "standardised", "shared layer", "own forward", "squeezed")


@pytest.mark.parametrize(
    ("name", "D", "k", "mode"),
    [(name, 1, 3, "adjoint") for name in ZOO if name not in (*ACTIVE, *CHAINS)]
    + [(name, 3, 1, "tangent") for name in ZOO if name not in (*ACTIVE, *CHAINS)]
    + [("pre-norm RMSNorm", 3, 3, "adjoint"), ("DCN-v2", 1, 1, "tangent")],
)
def test_the_zoo(name: str, D: int, k: int, mode: Mode) -> None:
    dtype = torch.float32 if mode == "tangent" else torch.float64
    net, (x1, x2) = network(name, 3 + k, D, 12, dtype, seed=7), points(40, 3, k, dtype)
    assert plan(net, x1, x2, backend="triton").backend == "triton"
    leaves = [x1.requires_grad_(), x2.requires_grad_(), *net.parameters()]
    found = []
    for way in ({"backend": "triton", "mode": mode}, {"backend": "reference"}):
        # Squared: without a jump in the derivative that rounding could cross.
        y, penalty = fused_mono_penalty(
            net, x1, x2, margin=0.05, hinge="squared", return_output=True, **way
        )
        grads = gradients(y.square().sum() + penalty, *leaves)
        found.append([y.detach(), penalty.detach(), *grads])
    assert_same(*found, 1e-4 if dtype == torch.float32 else 1e-10)


# --- what random programs may miss ---------------------------------------------------------------


def linear(u: int, place: int, width: int) -> Node:
    return Node("linear", (u,), (place, place + 1), (), width)


AFFINE = (
    linear(0, 0, 6),
    Node("normalise", (1,), (), (1e-3,), 6),
    Node("scale", (2,), (2,), (), 6),
    Node("shift", (3,), (3,), (), 6),
    Node("silu", (4,), (), (0.0, 0.0, 0.0), 6),
    linear(5, 4, 1),
)


STANDARDISED = (*AFFINE[:1], *[n._replace(inputs=(n.inputs[0] - 1,)) for n in AFFINE[2:]])


@BOTH_MODES
@pytest.mark.parametrize("nodes", [AFFINE, STANDARDISED], ids=["behind a norm", "by themselves"])
@pytest.mark.parametrize("task", [True, False])
def test_a_scale_and_what_goes_with_it_with_any_of_them_frozen(
    mode: Mode, nodes: tuple[Node, ...], task: bool
) -> None:
    """Which is one launch for all, and one for their sums, at the scale where that is trained."""
    p = Problem(4, nodes, last_columns(4, 2), mode, None)
    for single in (False, True):
        x, params = operands(4, nodes, 22, single=single)
        assert_agrees(p, x, params, task=task)
        for on in ((0,), (3,), (4,), (3, 4), (2, 4)):  # x, the scale, the shift, both, a bias
            assert_agrees(p, x, params, task=task, needs=[i in on for i in range(7)])


GATED = (
    linear(0, 0, 6),
    Node("sigmoid", (1,), (), (0.0, 0.0, 0.0), 6),
    linear(0, 2, 6),
    Node("tanh", (3,), (), (0.0, 0.0, 0.0), 6),
    Node("product", (2, 4), (), (), 6),  # of which one factor is made by it
    Node("product", (3, 1), (), (), 6),
    Node("sum", (5, 6, 1), (), (0.5, -2.0, 1.0), 6),  # which makes both
    Node("columns", (0,), (), (0.0, 1.0), 1),
    linear(8, 4, 6),
    Node("silu", (9,), (), (0.0, 0.0, 0.0), 6),
    Node("product", (7, 10), (), (), 6),  # with a factor that x2 does not reach
    linear(11, 6, 1),
)


@BOTH_MODES
@pytest.mark.parametrize("k", [1, 2])
def test_what_its_only_reader_makes(mode: Mode, k: int) -> None:
    p = Problem(4, GATED, last_columns(4, k), mode, None)
    x, params = operands(4, GATED, 22)
    assert deferred_of(facts_of(p).steps) == {2, 5, 6, 10}
    for task in (True, False):
        assert_agrees(p, x, params, task=task, violating=torch.rand(22) < 0.5)
        for on in ((0,), (1,), (3, 4), (5, 6)):
            assert_agrees(p, x, params, task=task, needs=[i in on for i in range(9)])


@BOTH_MODES
@pytest.mark.parametrize("task", [True, False])
def test_rows_and_pairs_in_parts(mode: Mode, task: bool) -> None:
    """More than one slice of the rows, and of the pairs; a layer that serves twice adds to both."""
    nodes = (
        linear(0, 0, 12),
        Node("silu", (1,), (), (0.0, 0.0, 0.0), 12),
        linear(2, 2, 12),
        Node("tanh", (3,), (), (0.0, 0.0, 0.0), 12),
        linear(4, 2, 12),
        linear(5, 4, 1),
    )
    p = Problem(5, nodes, last_columns(5, 1), mode, None)
    x, params = operands(5, nodes, 1100)
    with assumed("wgmma", 40), recorded() as launched:
        run(path, p, x, params, task=task)
    parts = {call.kernel.fn.__name__: call.programs for call in launched}
    assert parts["pairs_weight"][2] > 1
    assert parts["collect"][0] > 1
    with assumed("wgmma", 40):
        assert_agrees(p, x, params, task=task, violating=torch.rand(1100) < 0.5)


def test_chunks_of_which_one_has_no_part_in_the_slopes() -> None:
    """The columns of its cotangent are zero, and nobody wrote them."""
    nodes = (
        linear(0, 0, 8),
        Node("columns", (1,), (), (0.0, 2.0), 4),
        Node("columns", (1,), (), (1.0, 2.0), 4),
        Node("silu", (2,), (), (0.0, 0.0, 0.0), 4),
        Node("sum", (3, 4), (), (1.0, -0.5), 4),
        linear(5, 2, 1),
    )
    for mode in ("tangent", "adjoint"):
        x, params = operands(4, nodes, 22)
        for task in (True, False):
            assert_agrees(Problem(4, nodes, last_columns(4, 2), mode, None), x, params, task=task)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@BOTH_MODES
def test_precision(dtype: torch.dtype, mode: Mode) -> None:
    """As precise as PyTorch at the same precision, and the same bits in a second run."""
    d, nodes = CASES["gates"]
    p = Problem(d, nodes, last_columns(d, 2), mode, None)
    # The same numbers in every precision.
    x, params = operands(d, nodes, 60)
    x, params = x.bfloat16(), [None if t is None else t.bfloat16() for t in params]
    truth = run(handwritten, p, x.double(), [None if t is None else t.double() for t in params])
    x = x.to(dtype)
    low = [None if t is None else t.to(dtype) for t in params]
    ours = run(path, p, x, low)
    torchs = errors(run(handwritten, p, x, low), truth)
    # What sums of a few terms lose is luck. Where the interpreter stores bfloat16 it truncates,
    # which devices round: towards zero, so that no sum averages it out.
    factor = 32 if dtype == torch.bfloat16 else 3
    for i, (a, b) in enumerate(zip(errors(ours, truth), torchs, strict=True)):
        assert a <= factor * b + 8 * torch.finfo(dtype).eps, f"tensor {i}: {a:.2e}, PyTorch {b:.2e}"
    assert all(map(torch.equal, ours, run(path, p, x, low)))


def test_what_is_given_out_shares_no_memory() -> None:
    for name in ("x itself is y", "pre-norm", "gates"):
        d, nodes = CASES[name]
        p = Problem(d, nodes, last_columns(d, 2), "adjoint", Hinge())
        x, params = operands(d, nodes, 20)
        y, out, saved = path.forward(p, x, None, params, True)
        gy, needs = torch.ones_like(y), [True] * (1 + len(params))
        grads = path.backward(p, gy, torch.ones_like(out), x, params, saved, needs)
        tensors = [t for t in (x, y, out, gy, *params, *saved, *grads) if t is not None]
        places = {t.untyped_storage().data_ptr() for t in tensors}
        assert len(places) == len(tensors)


def test_refuses_rows_that_no_program_of_a_kernel_holds() -> None:
    x = torch.empty(2, 3)
    for width, refused in ((WIDEST_ROW, False), (WIDEST_ROW + 1, True)):
        nodes = (linear(0, 0, width), Node("softmax", (1,), (), (), width), linear(2, 2, 1))
        why = backend.refuses(Problem(3, nodes, last_columns(3, 1), "adjoint", None), x)
        assert (why is not None) == refused
        assert not refused or f"a softmax is {width} wide" in str(why)


# --- autocast ------------------------------------------------------------------------------------


@settings(max_examples=50)
@given(call=random_calls([0, 1, 16, 29]))
def test_random_programs_of_two_dtypes(call: RandomCall) -> None:
    """As under autocast, but linear nodes are in float32 and the rest in float64: so near to the
    twin that nothing can be missing. Without a hinge, whose sign rounding could change."""
    p = call.problem._replace(hinge=None)
    layers = {place for node in p.nodes if node.kind == "linear" for place in node.params}
    options = {
        "task": call.task, "slopes": call.slopes, "needs": call.needs,
        "violating": torch.rand(len(call.x)) < 0.5,
    }  # fmt: skip
    params = [t.float() if t is not None and i in layers else t for i, t in enumerate(call.params)]
    with call.blocks():
        got = run(path, p._replace(cast=torch.float32), call.x, params, **options)
        want = run(handwritten, p, call.x, call.params, **options)
    assert_same([t.double() for t in got], want, 1e-4)


def results(net: nn.Module, x1: Tensor, x2: Tensor, J_of: Any) -> list[Tensor]:
    """y, J and all gradients of a smooth loss of both: no hinge, whose sign may flip near zero."""
    leaves = [x1.clone().requires_grad_(), x2.clone().requires_grad_()]
    y, J = J_of(net, *leaves)
    torch.manual_seed(1)
    gy, gJ = torch.randn(y.shape, dtype=torch.float64), torch.randn(J.shape, dtype=torch.float64)
    loss = ((y * gy.to(y.dtype)).sum() + (J * gJ.to(J.dtype)).sum()) / len(y)
    return [y, J, *gradients(loss, *leaves, *net.parameters())]


def assert_as_good_as_autocast(
    net: nn.Module, x1: Tensor, x2: Tensor, dtype: torch.dtype, **way: str
) -> None:
    def ours(*call: Any) -> Any:
        return value_and_jacobian(*call, backend="triton", **way)

    with torch.autocast("cpu", dtype):
        assert plan(net, x1, x2, backend="triton").backend == "triton"
        own, got = results(net, x1, x2, oracle), results(net, x1, x2, ours)
    truth = results(copy.deepcopy(net).double(), x1.double(), x2.double(), oracle)
    assert got[0].dtype == own[0].dtype
    assert got[1].dtype == torch.float32
    assert all(g.dtype == torch.float32 for g in got[2:])
    # Where the interpreter stores bfloat16 it truncates, which devices round.
    factor = 8 if dtype == torch.bfloat16 else 2
    for i, (g, o, t) in enumerate(zip(got, own, truth, strict=True)):
        size = max(t.square().mean().sqrt().item(), 1e-12)
        a, b = ((f.double() - t).square().mean().sqrt().item() / size for f in (g, o))
        b = max(b, torch.finfo(dtype).eps)
        assert a <= factor * b, f"tensor {i}: {a:.2e}, PyTorch {b:.2e}"


# A parameter is added to its output, and may be of another dtype: it is not served under autocast.
UNKNOWN = ("additive",)


@pytest.mark.parametrize(
    ("D", "k", "mode", "dtype"),
    [(1, 2, "adjoint", torch.float16), (3, 1, "tangent", torch.bfloat16)],
    ids=["adjoint", "tangent"],
)
@pytest.mark.parametrize("name", [n for n in ZOO if n not in (*ACTIVE, *CHAINS, *UNKNOWN)])
def test_autocast(name: str, D: int, k: int, mode: Mode, dtype: torch.dtype) -> None:
    """Nothing is more than twice as wrong as PyTorch's own."""
    net, (x1, x2) = network(name, 3 + k, D, 16, seed=3), points(200, 3, k, torch.float32)
    assert_as_good_as_autocast(net, x1, x2, dtype, mode=mode)


class Far(nn.Module):
    """Inputs that half precision cannot tell apart, which a norm brings near."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.layer, self.out = nn.LayerNorm(5), nn.Linear(5, 16), nn.Linear(16, 1)

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.out(F.silu(self.layer(self.norm(500 + x))))
        return h


class Beside(nn.Module):
    """An input that goes on as it is, beside a small part of a network."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.out = nn.Linear(5, 16), nn.Linear(16, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x[..., -1:] + 0.01 * self.out(torch.tanh(self.layer(x))).softmax(-1) * x[..., :1]


@pytest.mark.parametrize("make", [Far, Beside])
def test_autocast_rounds_nothing_that_pytorch_does_not(make: type[nn.Module]) -> None:
    x1, x2 = points(60, 3, 2, torch.float32)
    assert_as_good_as_autocast(make(), x1, x2, torch.float16)


@pytest.mark.parametrize("name", ACTIVE)
def test_an_active_dropout_under_autocast(name: str) -> None:
    """The same masks as without: the value is as far off as autocast alone makes it."""
    net, (x1, x2) = network(name, 5, 1, 16).train(), points(60, 3, 2, torch.float32)
    found = []
    for enabled in (True, False):
        torch.manual_seed(5)
        with torch.autocast("cpu", torch.float16, enabled=enabled):
            found.append(value_and_jacobian(net, x1, x2, backend="triton"))
    assert_same([t.float() for t in found[0]], list(found[1]), 0.01)


def test_a_compiled_step_under_autocast() -> None:
    net, (x1, x2) = network("SwiGLU", 5, 1, 16), points(40, 3, 2, torch.float32)

    def loss() -> Tensor:
        with torch.autocast("cpu", torch.float16):
            y, penalty = fused_mono_penalty(
                net, x1, x2, margin=0.05, return_output=True, backend="triton"
            )
        return y.float().square().sum() + penalty

    want = loss()
    got = torch.compile(loss, fullgraph=True, backend="aot_eager")()
    assert torch.equal(got, want)
    params = [*net.parameters()]
    assert all(map(torch.equal, gradients(got, *params), gradients(want, *params)))
