"""Programs of nodes by the backends that serve any of them, against plain PyTorch.

The truth is the program's value alone, differentiated twice by autograd: no push, pull or curvature
of the table takes part in it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from monokernel import fused_mono_penalty
from monokernel import hinge as hinges
from monokernel.backends import cpu, handwritten, load, reference, schedule
from monokernel.columns import last_columns
from monokernel.hinge import nan_rule
from monokernel.nodes import RULES, parameter_shapes, rule, wrong_nodes
from monokernel.operands import check_forward
from monokernel.problem import Hinge, Mode, Problem
from monokernel.program import Node
from tests import test_nodes
from tests.problems import UNRULY
from tests.support import ELEMENTWISE, HANDWRITTEN, assert_same, mlp, points
from tests.test_cost import SLACK, Operations

BOTH_MODES = pytest.mark.parametrize("mode", ["tangent", "adjoint"])
TAME = {σ.kind: σ for σ, _ in ELEMENTWISE.values() if σ.kind not in UNRULY}
Params = list[Tensor | None]


# --- the truth ----------------------------------------------------------------------------------


def value_of(p: Problem, x: Tensor, params: Params) -> Tensor:
    values = [x]
    for node in p.nodes:
        θ = [params[place] for place in node.params]
        θ = rule(node).at_rows(node, θ, torch.arange(len(x)), x.dtype)
        values.append(rule(node).value(node, [values[v] for v in node.inputs], θ))
    return values[-1]


def oracle(p: Problem, x: Tensor, params: Params) -> tuple[Tensor, Tensor]:
    """y (N, D) and J (N, D, k) by a reverse pass for each output, ready for a second backward."""
    inner = x.clone() if x.requires_grad else x.detach().requires_grad_()
    y = value_of(p, inner, params)
    rows = [
        torch.autograd.grad(y[:, d].sum(), inner, create_graph=True, materialize_grads=True)[0]
        if y.requires_grad
        else torch.zeros_like(x)
        for d in range(p.D)
    ]
    return y, nan_rule(y, torch.stack(rows, 1)[..., p.columns])


def penalised(p: Problem, J: Tensor, weight: Tensor | None) -> Tensor:
    if p.hinge is None:
        return J
    found = hinges.penalties(J, p.hinge, weight)
    return found if p.hinge.elementwise else found.sum()


def gradients(loss: Tensor, operands: Sequence[Tensor]) -> list[Tensor]:
    if not operands or not loss.requires_grad:
        return [torch.zeros_like(t) for t in operands]
    return list(torch.autograd.grad(loss, operands, materialize_grads=True))


def check(
    p: Problem,
    x: Tensor,
    params: Params,
    needs: Sequence[bool],
    weight: Tensor | None = None,
    task: bool = True,
    slopes: bool = True,
    tolerance: float = 1e-10,
) -> None:
    """Every backend: y, the penalty (or J), and every gradient that is needed (x first)."""
    operands = [
        None if t is None else t.detach().clone().requires_grad_(need)
        for t, need in zip((x, *params), needs, strict=True)
    ]
    leaf, leaves = operands[0], operands[1:]
    assert leaf is not None
    wanted = [t for t in operands if t is not None and t.requires_grad]
    y, J = oracle(p, leaf, leaves)
    out = penalised(p, J, weight)
    gy, gout = torch.randn_like(y), torch.rand_like(out)
    loss = (y * gy).sum() * task + (out * gout).sum() * slopes
    want = gradients(loss, wanted)

    ours_y, ours_J = reference.value_and_jacobian(p, leaf, leaves)
    assert_same([ours_y, ours_J], [y, J], tolerance)
    ours = penalised(p, ours_J, weight)
    loss = (ours_y * gy).sum() * task + (ours * gout).sum() * slopes
    assert_same(gradients(loss, wanted), want, tolerance)

    plain = [None if t is None else t.detach() for t in params]
    check_forward(p, x, weight, plain)
    cotangents = gy if task else None, gout if slopes else None
    for name in HANDWRITTEN:
        backend = load(name)
        assert backend.refuses(p, x) is None
        for save in (False, True):
            got_y, got, saved = backend.forward(p, x, weight, plain, save)
            assert_same([got_y, got], [y, out], tolerance)
        assert [t.shape for t in saved] == [t.shape for t in backend.saved_like(p, x)]
        if name == "torch":  # the native kernel's rows have ends that nobody reads
            assert not any(t.isnan().any() for t in saved), "a buffer was not filled"
        before = [t.clone() for t in saved]
        for _ in range(2):  # a graph that is retained may be walked again
            grads = backend.backward(p, *cotangents, x, plain, saved, needs)
            assert [g is not None for g in grads] == list(needs)
            assert_same([g for g in grads if g is not None], want, tolerance)
        same = [
            torch.equal(t.nan_to_num(), b.nan_to_num()) for t, b in zip(saved, before, strict=True)
        ]
        assert all(same), "the backward wrote to what was saved"


# --- random programs ----------------------------------------------------------------------------


Made = tuple[str, tuple[int, ...], tuple[float, ...], int]  # kind, inputs, numbers and width


def some_kind(draw: Any, H: int) -> str:
    kinds = [kind for kind in RULES if kind not in UNRULY and (kind != "expand" or H == 1)]
    more = ["linear", "linear", "linear", "sum", "product", *["split"] * (3 * (H >= 32))]
    return str(draw(st.sampled_from([*kinds, *more])))


def nodes_of(draw: Any, kind: str, v: int, widths: list[int]) -> list[Made]:
    """A node of the kind that reads value v and perhaps others; of "split" the parts of v."""
    H = widths[v]
    alike = st.sampled_from([u for u, width in enumerate(widths) if width == H])
    numbers: tuple[float, ...] = ()
    inputs, width = (v,), H
    if kind == "split":  # all of it, or all but what is no whole vector
        starts = draw(st.permutations(range(0, H - H % 16, 16)))
        return [("columns", (v,), (float(start), 1.0), 16) for start in starts]
    if kind == "linear":
        width = draw(st.one_of(st.integers(1, 6), st.sampled_from([17, 32, 40, 48])))
    elif kind in TAME:
        numbers = TAME[kind][1:]
    elif kind == "sum":
        inputs = tuple(draw(st.lists(alike, min_size=1, max_size=3)))
        signs = st.sampled_from([1.0, -1.0, 0.5])
        numbers = tuple([draw(signs) for _ in inputs])
    elif kind == "product":
        inputs = (v, draw(alike))
    elif kind == "concat":
        inputs = (v, *draw(st.lists(st.integers(0, len(widths) - 1), max_size=2)))
        width = sum(widths[u] for u in inputs)
    elif kind == "columns":
        start, step = draw(st.integers(0, H - 1)), draw(st.integers(1, 2))
        numbers = float(start), float(step)
        width = draw(st.integers(1, (H - 1 - start) // step + 1))
    elif kind == "line":
        numbers = draw(st.sampled_from([(1.0, 0.5), (-0.75, 0.0)]))
    elif kind == "expand":
        width = draw(st.integers(1, 3))
    elif kind == "total":
        width = 1
    elif kind in ("normalise", "root_mean_square"):
        numbers = (0.25,)
    elif kind == "dropout":
        numbers = draw(st.sampled_from([0.0, 0.3])), draw(st.integers(0, 2))
    return [(kind, inputs, numbers, width)]


@st.composite
def programs(draw: Any, d: int, D: int) -> tuple[Node, ...]:
    """A random program over d columns with D outputs: any node may read any value before it."""
    nodes: list[Node] = []
    widths, places = [d], 0
    shared: dict[tuple[str, tuple[int, ...]], tuple[int, ...]] = {}  # parameters used before

    def append(kind: str, inputs: tuple[int, ...], numbers: tuple[float, ...], width: int) -> None:
        nonlocal places
        node = Node(kind, inputs, (), numbers, width)
        shapes = rule(node).shapes(node, [widths[v] for v in inputs])
        key = kind, tuple([widths[v] for v in inputs] + [width])
        if shapes and key in shared and draw(st.booleans()):
            params = shared[key]
        else:
            params = tuple(range(places, places + len(shapes)))
            places += len(shapes)
            shared[key] = params
        nodes.append(node._replace(params=params))
        widths.append(width)

    for _ in range(draw(st.integers(0, 9))):
        v = draw(st.integers(0, len(nodes)))
        for made in nodes_of(draw, some_kind(draw, widths[v]), v, widths):
            append(*made)
    if widths[-1] != D or not nodes or draw(st.booleans()):
        append("linear", (draw(st.integers(0, len(nodes))),), (), D)
    return tuple(nodes)


def operands(
    d: int, nodes: tuple[Node, ...], N: int, bias: bool = True, single: bool = False
) -> tuple[Tensor, Params]:
    """x (N, d) and the parameters; a parameter that may be one number is one if ``single``."""
    shapes_of = parameter_shapes(d, nodes)
    params: Params = [None] * len(shapes_of)
    biases = {node.params[1] for node in nodes if node.kind == "linear"}
    for place, (node, shapes) in shapes_of.items():
        if place in biases and not bias:
            continue
        shape = shapes[-1] if single else shapes[0]
        params[place] = torch.randn(shape, dtype=torch.float64) * 0.7
        if node.kind == "dropout":
            params[place] = torch.randint(0, 256, shape).double()
    return torch.randn(N, d, dtype=torch.float64), params


class RandomCall(NamedTuple):
    """A random program with operands for it, and what is asked of its backward."""

    problem: Problem
    x: Tensor
    params: Params
    weight: Tensor | None
    needs: list[bool]
    task: bool  # whether y is in the loss
    slopes: bool  # whether the penalties or slopes are
    block_rows: int

    @contextmanager
    def blocks(self) -> Iterator[None]:
        """Blocks of ``block_rows`` in the walk in PyTorch operations."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(schedule, "BLOCK_ELEMENTS", {"cpu": 1})
            patch.setattr(schedule, "FEWEST_ROWS", self.block_rows)
            yield


@st.composite
def random_calls(draw: Any, rows: Sequence[int]) -> RandomCall:
    """``rows`` are the numbers of rows to choose from."""
    torch.manual_seed(draw(st.integers(0, 2**16)))
    k, D = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    d = k + draw(st.integers(0, 3))
    nodes = draw(programs(d, D))
    assert wrong_nodes(d, nodes) == ""
    N = draw(st.sampled_from(rows))
    x, params = operands(d, nodes, N, draw(st.booleans()), draw(st.booleans()))
    signs = tuple([(1, 0, -1)[i % 3] for i in range(D * k)])
    margins = tuple([0.1 + 0.1 * i for i in range(D * k)])
    hinges = None, Hinge(), Hinge((1, -1)[:k], 0.1, True), Hinge(signs, margins, False, True)
    hinge = draw(st.sampled_from(hinges))
    weight = None
    if hinge is not None and draw(st.booleans()):
        # Weights that are 0 leave some pairs without a violation.
        shape = draw(st.sampled_from([(D, k), (N, D, k)]))
        weight = torch.randint(0, 2, shape).double() * 1.5
    keys = {place for node in nodes if node.kind == "dropout" for place in node.params}
    needs = [draw(st.booleans())]
    needs += [
        t is not None and i not in keys and draw(st.sampled_from([True, True, False]))
        for i, t in enumerate(params)
    ]
    mode: Mode = draw(st.sampled_from(["tangent", "adjoint"]))
    task, slopes = draw(st.sampled_from([(True, True), (True, False), (False, True)]))
    block_rows = draw(st.sampled_from([5, 1000]))
    columns = tuple(sorted(draw(st.sets(st.integers(0, d - 1), min_size=k, max_size=k))))
    p = Problem(d, nodes, columns, mode, hinge)
    return RandomCall(p, x, params, weight, needs, task, slopes, block_rows)


@settings(max_examples=400)
@given(call=random_calls([0, 1, 7, 29, 97]))
def test_random_programs(call: RandomCall) -> None:
    with call.blocks():
        check(call.problem, call.x, call.params, call.needs, call.weight, call.task, call.slopes)


# --- what random programs may miss ---------------------------------------------------------------


def linear(u: int, place: int, width: int) -> Node:
    return Node("linear", (u,), (place, place + 1), (), width)


def silu(u: int, width: int) -> Node:
    return Node("silu", (u,), (), (0.0, 0.0, 0.0), width)


def pre_norm(d: int, H: int, D: int, blocks: int) -> tuple[Node, ...]:
    """A residual network: h + W silu(W' γ x̂(h)), its parameters in the order of the nodes."""
    nodes, places = [linear(0, 0, H)], 2
    for _ in range(blocks):
        h = len(nodes)
        nodes.append(Node("normalise", (h,), (), (1e-5,), H))
        nodes.append(Node("scale", (h + 1,), (places,), (), H))
        nodes.append(linear(h + 2, places + 1, H))
        nodes.append(silu(h + 3, H))
        nodes.append(linear(h + 4, places + 3, H))
        nodes.append(Node("sum", (h, h + 5), (), (1.0, 1.0), H))
        places += 5
    return (*nodes, linear(len(nodes), places, D))


CASES: dict[str, tuple[int, tuple[Node, ...]]] = {
    "columns of x are y": (5, (Node("columns", (0,), (), (1.0, 2.0), 2),)),
    "columns of x1 are y": (5, (Node("columns", (0,), (), (0.0, 1.0), 2),)),
    "x itself is y": (3, (Node("identity", (0,), (), (0.0, 0.0, 0.0), 3),)),
    "a value that nobody reads": (5, (linear(0, 0, 4), silu(1, 4), linear(0, 2, 1))),
    "x2 past a network of x1": (
        5,
        (
            Node("columns", (0,), (), (0.0, 1.0), 3),
            linear(1, 0, 4),
            silu(2, 4),
            linear(3, 2, 2),
            Node("columns", (0,), (), (3.0, 1.0), 2),
            Node("product", (4, 5), (), (), 2),
            Node("total", (6,), (), (), 1),
        ),
    ),
    "one layer twice": (4, (linear(0, 0, 4), silu(1, 4), linear(2, 0, 4), linear(3, 2, 1))),
    "one number for two widths": (
        4,
        (
            linear(0, 0, 6),
            Node("prelu", (1,), (2,), (), 6),
            linear(2, 3, 3),
            Node("prelu", (3,), (2,), (), 3),
            Node("scale", (4,), (5,), (), 3),
            Node("shift", (5,), (6,), (), 3),
        ),
    ),
    "a standardised input": (
        5,
        (
            Node("scale", (0,), (0,), (), 5),
            Node("shift", (1,), (1,), (), 5),
            linear(2, 2, 6),
            silu(3, 6),
            linear(4, 4, 1),
        ),
    ),
    "a squared value": (
        5,
        (linear(0, 0, 3), Node("product", (1, 1), (), (), 3), Node("total", (2,), (), (), 1)),
    ),
    "pre-norm": (5, pre_norm(5, 6, 1, 2)),
    "pre-norm, several outputs": (5, pre_norm(5, 6, 3, 2)),
    "each value twice": (
        4,
        (
            linear(0, 0, 5),
            Node("concat", (1, 1, 0), (), (), 14),
            Node("sum", (2, 2), (), (0.5, 0.75), 14),
            Node("tanh", (3,), (), (0.0, 0.0, 0.0), 14),
            Node("product", (4, 4), (), (), 14),
            linear(5, 2, 1),
            Node("sum", (6, 6, 6), (), (1.0, -2.0, 0.5), 1),
        ),
    ),
    "columns of columns": (
        6,
        (
            Node("columns", (0,), (), (1.0, 1.0), 5),
            linear(1, 0, 23),
            silu(2, 23),
            Node("columns", (3,), (), (3.0, 1.0), 18),
            Node("columns", (4,), (), (1.0, 2.0), 8),
            Node("columns", (5,), (), (2.0, 1.0), 5),
            Node("product", (6, 1), (), (), 5),
            linear(7, 2, 19),
            Node("columns", (8,), (), (7.0, 1.0), 11),
            Node("softmax", (9,), (), (), 11),
            linear(10, 4, 1),
        ),
    ),
    "one column throughout": (
        1,
        (
            linear(0, 0, 1),
            Node("normalise", (1,), (), (0.5,), 1),
            Node("root_mean_square", (1,), (), (0.5,), 1),
            Node("sum", (2, 3), (), (1.0, 1.0), 1),
            Node("scale", (4,), (2,), (), 1),
            Node("prelu", (5,), (3,), (), 1),
            Node("log_softmax", (6,), (), (), 1),
            Node("product", (6, 7), (), (), 1),
            Node("sum", (8, 6), (), (1.0, 1.0), 1),
            Node("expand", (9,), (), (), 1),
            Node("total", (10,), (), (), 1),
        ),
    ),
    "wide": (
        70,
        (
            linear(0, 0, 301),
            silu(1, 301),
            Node("normalise", (2,), (), (1e-5,), 301),
            Node("concat", (3, 0), (), (), 371),
            Node("dropout", (4,), (2,), (0.3, 1.0), 371),
            Node("log_softmax", (5,), (), (), 371),
            Node("scale", (6,), (3,), (), 371),
            linear(7, 4, 200),
            Node("total", (8,), (), (), 1),
        ),
    ),
    "parts of parts": (
        5,
        (
            linear(0, 0, 64),
            Node("columns", (1,), (), (48.0, 1.0), 16),
            Node("columns", (1,), (), (0.0, 1.0), 16),
            Node("columns", (1,), (), (16.0, 1.0), 32),
            silu(2, 16),
            Node("columns", (4,), (), (0.0, 1.0), 16),
            Node("columns", (4,), (), (16.0, 1.0), 16),
            Node("product", (5, 7), (), (), 16),
            Node("sum", (8, 3), (), (1.0, 0.5), 16),
            linear(9, 2, 1),
            linear(6, 4, 1),
            Node("sum", (10, 11), (), (1.0, 1.0), 1),
        ),
    ),
    "parts, one of which only gates": (
        4,
        (
            linear(0, 0, 32),
            Node("columns", (1,), (), (0.0, 1.0), 16),
            Node("columns", (1,), (), (16.0, 1.0), 16),
            silu(3, 16),
            Node("sum", (2, 4), (), (1.0, 1.0), 16),
            Node("total", (5,), (), (), 1),
        ),
    ),
    "only x1": (
        4,
        (Node("columns", (0,), (), (0.0, 1.0), 2), linear(1, 0, 5), silu(2, 5), linear(3, 2, 1)),
    ),
    "gates": (
        4,
        (
            linear(0, 0, 8),
            Node("columns", (1,), (), (0.0, 1.0), 4),
            Node("columns", (1,), (), (4.0, 1.0), 4),
            silu(3, 4),
            Node("product", (2, 4), (), (), 4),
            Node("concat", (5, 0), (), (), 8),
            Node("root_mean_square", (6,), (), (1e-3,), 8),
            linear(7, 2, 1),
            Node("softplus", (8,), (), (1.0, 20.0, 0.0), 1),
        ),
    ),
}


@BOTH_MODES
@pytest.mark.parametrize("name", CASES)
def test_value_slopes_and_gradients(name: str, mode: Mode, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole batches, and blocks of 7 rows with one of a single row at the end."""
    d, nodes = CASES[name]
    for k, hinge in ((1, Hinge((1,), 0.3)), (min(d, 2), None)):
        p = Problem(d, nodes, last_columns(d, k), mode, hinge)
        x, params = operands(d, nodes, 22, single=name == "one number for two widths")
        masks = {place for node in nodes if node.kind == "dropout" for place in node.params}
        needs = [True] + [i not in masks for i in range(len(params))]
        check(p, x, params, needs)
        check(p, x, params, needs, task=False)
        monkeypatch.setattr(schedule, "BLOCK_ELEMENTS", {"cpu": 1})
        monkeypatch.setattr(schedule, "FEWEST_ROWS", 7)
        check(p, x, params, needs)
        check(p, x, params, [True] + [False] * len(params))
        monkeypatch.undo()
        last = [i == len(params) - 1 for i in range(len(params))]
        check(p, x, params, [False, *last])


@BOTH_MODES
@pytest.mark.parametrize("N", [0, 1, 7, 95, 96, 97, 400])
@pytest.mark.parametrize("name", ["pre-norm", "pre-norm, several outputs", "gates"])
def test_any_number_of_rows(name: str, N: int, mode: Mode) -> None:
    d, nodes = CASES[name]
    x, params = operands(d, nodes, N)
    needs = [True] * (1 + len(params))
    weight = torch.rand(N, nodes[-1].width, 2, dtype=torch.float64)
    p = Problem(d, nodes, last_columns(d, 2), mode, Hinge((1,), 0.1, False, True))
    check(p, x, params, needs, weight)
    check(p._replace(hinge=Hinge((1,), 0.3, True)), x, params, needs, weight, task=False)
    check(p._replace(hinge=Hinge((1,), -1e6)), x, params, needs)


@pytest.mark.parametrize(("D", "mode"), [(1, "adjoint"), (2, "tangent"), (2, "adjoint")])
@pytest.mark.parametrize("name", test_nodes.CASES)
def test_every_node_between_layers(name: str, D: int, mode: Mode) -> None:
    """Its inputs are layers of x, or what makes them positive, and it is the input of the last."""
    case, nodes, places = test_nodes.CASES[name], list[Node](), 0
    inputs = []
    for width in case.widths:
        nodes.append(linear(0, places, width))
        places += 2
        if case.positive:
            nodes.append(Node("softplus", (len(nodes),), (), (1.0, 20.0, 0.0), width))
            nodes.append(Node("line", (len(nodes),), (), (1.0, 0.1), width))
        inputs.append(len(nodes))
    own = [places + i for i in range(len(case.node.params))]
    nodes.append(case.node._replace(inputs=tuple(inputs), params=tuple(own)))
    nodes.append(linear(len(nodes), places + len(own), D))
    x, params = operands(4, tuple(nodes), 19)
    given = case.given(case.values(19)[1])
    for place, t in zip(own, given, strict=True):
        params[place] = None if t is None else t.detach()
    if case.node.kind == "dropout":  # the case has the mask itself
        params[own[0]] = torch.randint(0, 256, (8,)).double()
    trained = [t is not None for t in params]
    if case.node.kind == "dropout":
        trained[own[0]] = False
    check(Problem(4, tuple(nodes), last_columns(4, 3), mode, None), x, params, [True, *trained])
    p = Problem(4, tuple(nodes), last_columns(4, 1), mode, Hinge((1,), 0.2, True))
    check(p, x, params, [False, *trained], task=False)


@BOTH_MODES
def test_more_layers_than_the_kernel_of_chains_serves(mode: Mode) -> None:
    nodes: list[Node] = []
    for l in range(130):
        nodes += [linear(2 * l, 2 * l, 3), Node("tanh", (2 * l + 1,), (), (0.0, 0.0, 0.0), 3)]
    nodes.append(linear(260, 260, 1))
    x, params = operands(3, tuple(nodes), 9)
    p = Problem(3, tuple(nodes), last_columns(3, 1), mode, Hinge((1,), 1.0))
    check(p, x, params, [True] * (1 + len(params)))


# Threads, reruns, low precision and numbers that are not finite, of what has a bit of everything.
MIXED = (
    linear(0, 0, 40),
    silu(1, 40),
    Node("normalise", (2,), (), (1e-5,), 40),
    Node("scale", (3,), (2,), (), 40),
    linear(4, 3, 33),
    Node("prelu", (5,), (5,), (), 33),
    Node("concat", (6, 0), (), (), 39),
    linear(7, 6, 39),
    Node("product", (8, 7), (), (), 39),
    linear(9, 8, 1),
)
NATIVE = pytest.mark.skipif("cpu" not in HANDWRITTEN, reason="the native kernel was not built")


def run(backend: str, p: Problem, x: Tensor, params: Params) -> list[Tensor]:
    """y, the penalty or J, and every gradient of y and 2 J."""
    of = load(backend)
    y, out, saved = of.forward(p, x, None, params, True)
    needs = [True] * (1 + len(params))
    grads = of.backward(p, torch.ones_like(y), 2 * torch.ones_like(out), x, params, saved, needs)
    return [y, out, *(g for g in grads if g is not None)]


@NATIVE
@BOTH_MODES
def test_thread_counts_agree_and_reruns_give_the_same_bits(mode: Mode) -> None:
    p = Problem(6, MIXED, last_columns(6, 2), mode, Hinge((1,), 0.1))
    x, params = operands(6, MIXED, 700)
    want, before = run("torch", p, x, params), torch.get_num_threads()
    of, needs = load("cpu"), [True] * (1 + len(params))
    try:
        for forward, backward in ((1, 1), (2, 2), (3, 1), (1, 5)):
            found = []
            for _ in range(2):
                torch.set_num_threads(forward)
                y, out, saved = of.forward(p, x, None, params, True)
                gy, gout = torch.ones_like(y), 2 * torch.ones_like(out)
                torch.set_num_threads(backward)
                grads = of.backward(p, gy, gout, x, params, saved, needs)
                found.append([y, out, *(g for g in grads if g is not None)])
            assert all(map(torch.equal, *found))
            assert_same(found[0], want, 1e-11)
    finally:
        torch.set_num_threads(before)


@NATIVE
@BOTH_MODES
def test_without_compaction(mode: Mode) -> None:
    p = Problem(6, MIXED, last_columns(6, 2), mode, Hinge((1,), 0.1))
    x, params = operands(6, MIXED, 130)
    want = run("torch", p, x, params)
    try:
        cpu.switch(compacts=False)
        assert_same(run("cpu", p, x, params), want, 1e-11)
    finally:
        cpu.switch()


@NATIVE
@BOTH_MODES
@pytest.mark.parametrize("name", ["pre-norm", "gates", "wide", "mixed"])
def test_float32_is_as_exact_as_pytorch(name: str, mode: Mode) -> None:
    """Root-mean-square error against float64 at most twice that of PyTorch's own float32."""
    d, nodes = CASES[name] if name != "mixed" else (6, MIXED)
    p = Problem(d, nodes, last_columns(d, 2), mode, None)
    x, params = operands(d, nodes, 200)
    # Numbers of float32, and a mask that is none of the gradients.
    x, params = x.float(), [None if t is None else t.float() for t in params]
    scale = {"kind": "scale", "numbers": ()}
    nodes = tuple([n if n.kind != "dropout" else n._replace(**scale) for n in nodes])
    if nodes != p.nodes:
        p, params[2] = p._replace(nodes=nodes), torch.rand(1)
    truth = run("torch", p, x.double(), [None if t is None else t.double() for t in params])
    got, plain = run("cpu", p, x, params), run("torch", p, x, params)
    for g, f, w in zip(got, plain, truth, strict=True):
        error, its = ((t.double() - w).square().mean().sqrt() for t in (g, f))
        # Of a few numbers PyTorch's error may happen to be next to nothing.
        assert error <= 2 * its + (2e-7 if w.numel() > 8 else 1e-6) * w.abs().max()


@BOTH_MODES
@pytest.mark.parametrize("name", CASES)
def test_no_nan_becomes_a_finite_penalty(name: str, mode: Mode) -> None:
    """In a row of x, which leaves the others alone, or in a parameter: y is NaN where the reference
    says so, and there the penalty is, too."""
    d, nodes = CASES[name]
    p = Problem(d, nodes, last_columns(d, 1), mode, Hinge((1,), 0.0, False, True))
    x, params = operands(d, nodes, 20, single=name == "one number for two widths")
    rest = torch.arange(20) != 7
    want, J = reference.value_and_jacobian(p, x, params)
    clean = [want[rest], penalised(p, J, None)[rest]]
    for number in (torch.nan, torch.inf):
        x[7, 0] = number
        for place in (None, *range(len(params))):
            given = [t if t is None or i != place else t.clone() for i, t in enumerate(params)]
            if place is not None:
                given[place].view(-1)[0] = number  # type: ignore[union-attr]
            want, _ = reference.value_and_jacobian(p, x, given)
            for backend in HANDWRITTEN:
                y, penalty, _ = load(backend).forward(p, x, None, given, True)
                assert torch.equal(y.isnan(), want.isnan())
                assert penalty[y.isnan()].isnan().all()
                if place is None:
                    assert_same([y[rest], penalty[rest]], clean, 1e-12)


@BOTH_MODES
@pytest.mark.parametrize("backend", HANDWRITTEN)
@pytest.mark.parametrize("name", ["pre-norm", "pre-norm, several outputs", "gates"])
def test_an_infinite_gradient_leaves_clean_rows_alone(name: str, backend: str, mode: Mode) -> None:
    """It meets inactive entries only: their gradient is zero, not NaN."""
    d, nodes = CASES[name]
    p = Problem(d, nodes, last_columns(d, 1), mode, Hinge((1,), -1e9))
    x, params = operands(d, nodes, 20)
    _, out, saved = load(backend).forward(p, x, None, params, True)
    needs = [True] * (1 + len(params))
    inf = torch.full_like(out, torch.inf)
    grads = load(backend).backward(p, None, inf, x, params, saved, needs)
    assert all((g == 0).all() for g in grads if g is not None)


@BOTH_MODES
@pytest.mark.parametrize("name", [name for name in CASES if name != "wide"])
def test_the_reference_has_a_second_derivative(name: str, mode: Mode) -> None:
    d, nodes = CASES[name]
    p = Problem(d, nodes, last_columns(d, 1), mode, None)
    x, params = operands(d, nodes, 2, single=name == "one number for two widths")
    leaves = [t.requires_grad_() for t in (x, *params) if t is not None]

    def slopes(x: Tensor, *params: Tensor) -> tuple[Tensor, ...]:
        both = reference.value_and_jacobian(p, x, params)
        return tuple([t for t in both if t.requires_grad])

    assert torch.autograd.gradcheck(slopes, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(slopes, leaves, fast_mode=True)


def test_one_number_or_one_for_each_column() -> None:
    d, nodes = CASES["a standardised input"]
    p = Problem(d, nodes, last_columns(d, 1), "adjoint", None)
    x, params = operands(d, nodes, 3)
    for size, fits in ((5, True), (1, True), (2, False)):
        params[0] = torch.ones(size, dtype=torch.float64)
        if fits:
            check_forward(p, x, None, params)
        else:
            with pytest.raises(RuntimeError, match="mlp: the parameter of its scale: expected"):
                check_forward(p, x, None, params)
    d, nodes = CASES["one number for two widths"]
    x, params = operands(d, nodes, 3, single=True)
    params[2] = torch.ones(6, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="mlp: the parameter of its prelu: expected"):
        check_forward(Problem(d, nodes, last_columns(d, 1), "adjoint", None), x, None, params)


def test_a_drawn_mask_has_no_gradient_and_says_so() -> None:
    nodes = (Node("dropout", (0,), (0,), (0.5, 0.0), 3), linear(1, 1, 1))
    p = Problem(3, nodes, last_columns(3, 1), "adjoint", None)
    x, params = operands(3, nodes, 4)
    for name in HANDWRITTEN:
        y, J, saved = load(name).forward(p, x, None, params, True)
        with pytest.raises(RuntimeError, match="expected a dropout that is drawn"):
            load(name).backward(p, y, J, x, params, saved, [False, True, True, True])


@pytest.mark.parametrize("backend", HANDWRITTEN)
def test_one_prelu_after_layers_of_several_widths(backend: str) -> None:
    """Through the public call: its one number is one for all columns of both."""
    net = mlp(3, 2, 1, (64, 20), nn.PReLU())
    x1, x2 = points(50, 3, 2)
    params = list(net.parameters())
    found = []
    for name in ("reference", backend):
        y, penalty = fused_mono_penalty(net, x1, x2, margin=0.3, return_output=True, backend=name)
        found.append([y, penalty, *gradients(y.square().sum() + penalty, params)])
    assert_same(*found)


# --- what it costs ------------------------------------------------------------------------------


@pytest.mark.parametrize("v", [0.0, 0.25, 1.0])
@pytest.mark.parametrize(("D", "mode"), [(1, "adjoint"), (3, "tangent"), (3, "adjoint")])
def test_a_residual_network_costs_the_products_of_a_chain(D: int, mode: Mode, v: float) -> None:
    """3 + 3v, 3 + k + 3kv and 3 + D + 3Dv of each layer: skips and norms are no products."""
    N, H, blocks = 512, 64, 2
    nodes = pre_norm(5, H, D, blocks)
    p = Problem(5, nodes, last_columns(5, 1), mode, Hinge((1,), 1e6))
    x, params = operands(5, nodes, N)
    weight = torch.zeros(N, D, 1, dtype=torch.float64)
    weight[torch.randperm(N)[: round(v * N)]] = 1.0
    with Operations() as counter:
        y, penalty, saved = handwritten.forward(p, x, weight, params, True)
        needs = [False] + [True] * len(params)
        handwritten.backward(p, y, torch.ones_like(penalty), x, params, saved, needs)
    fan = D if mode == "adjoint" and D > 1 else 1
    want = 3 + 3 * v if mode == "adjoint" and D == 1 else 3 + fan + 3 * fan * v
    assert counter.total / (2 * N * H * H * 2 * blocks) == pytest.approx(want, rel=SLACK)


def test_rows_without_a_violation_cost_nothing_where_the_penalty_alone_is_wanted() -> None:
    nodes = pre_norm(5, 16, 1, 1)
    p = Problem(5, nodes, last_columns(5, 1), "adjoint", Hinge((1,), -1e6))
    x, params = operands(5, nodes, 40)
    _, penalty, saved = handwritten.forward(p, x, None, params, True)
    needs = [True] * (1 + len(params))
    with Operations() as counter:
        grads = handwritten.backward(p, None, torch.ones_like(penalty), x, params, saved, needs)
    assert counter.total == 0
    assert not any(g.any() for g in grads if g is not None)


def test_what_is_saved_is_what_linear_nodes_make() -> None:
    """Neither y nor what stands between two of them; P too where it is kept, and not where the last
    layer pulls the same row of W everywhere."""
    nodes = pre_norm(5, 6, 1, 2)
    x, _ = operands(5, nodes, 3)
    adjoint, tangent = (
        Problem(5, nodes, last_columns(5, 1), mode, None) for mode in ("adjoint", "tangent")
    )
    assert len(handwritten.saved_like(tangent, x)) == 5  # not y
    # What the two layers of each block pull; the second of the last block gets w from the last.
    assert len(handwritten.saved_like(adjoint, x)) == 5 + 3
