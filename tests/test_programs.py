"""Programs of nodes by the two backends that serve any of them, against plain PyTorch.

The truth is the program's value alone, differentiated twice by autograd: no push, pull or curvature
of the table takes part in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from monokernel import hinge as hinges
from monokernel.backends import handwritten, reference
from monokernel.nodes import RULES, parameter_shapes, rule, wrong_nodes
from monokernel.operands import check_forward
from monokernel.problem import Hinge, Mode, Problem, nan_rule
from monokernel.program import Node
from tests.gpu.cases import NUMBERS
from tests.support import assert_same

BOTH_MODES = pytest.mark.parametrize("mode", ["tangent", "adjoint"])
ELEMENTWISE = [kind for kind in RULES if type(RULES[kind]).__name__ == "Elementwise"]
Params = list[Tensor | None]


# --- the truth ----------------------------------------------------------------------------------


def value_of(p: Problem, x: Tensor, params: Params) -> Tensor:
    values = [x]
    for node in p.nodes:
        θ = [params[place] for place in node.params]
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
    return y, nan_rule(y, torch.stack(rows, 1)[..., p.d - p.k :])


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
    """Both backends: y, the penalty (or J), and every gradient that is needed (x first)."""
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

    plain = [None if t is None else t.detach() for t in (x, *params)]
    check_forward(p, x, weight, plain[1:])
    for save in (False, True):
        got_y, got, saved = handwritten.forward(p, x, weight, plain[1:], save)
        assert_same([got_y, got], [y, out], tolerance)
    assert [t.shape for t in saved] == [t.shape for t in handwritten.saved_like(p, x)]
    assert not any(t.isnan().any() for t in saved), "a buffer was not filled"
    before = [t.clone() for t in saved]
    for _ in range(2):  # a graph that is retained may be walked again
        grads = handwritten.backward(
            p,
            gy if task else None,
            gout if slopes else None,
            x,
            weight,
            plain[1:],
            saved,
            needs,
        )
        assert [g is not None for g in grads] == list(needs)
        assert_same([g for g in grads if g is not None], want, tolerance)
    assert all(map(torch.equal, saved, before)), "the backward wrote to what was saved"


# --- random programs ----------------------------------------------------------------------------


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
        H = widths[v]
        alike = st.sampled_from([u for u, width in enumerate(widths) if width == H])
        kinds = [kind for kind in RULES if kind != "expand" or H == 1]
        kind = draw(st.sampled_from([*kinds, "linear", "linear", "linear", "sum", "product"]))
        if kind == "linear":
            append(kind, (v,), (), draw(st.integers(1, 6)))
        elif kind in ELEMENTWISE:
            numbers = NUMBERS.get(kind, (0.0, 0.0, 0.0))
            append(kind, (v,), numbers, H)
        elif kind == "sum":
            inputs = tuple(draw(st.lists(alike, min_size=1, max_size=3)))
            signs = st.sampled_from([1.0, -1.0, 0.5])
            append(kind, inputs, tuple([draw(signs) for _ in inputs]), H)
        elif kind == "product":
            append(kind, (v, draw(alike)), (), H)
        elif kind == "concat":
            values = st.integers(0, len(nodes))
            inputs = (v, *draw(st.lists(values, max_size=2)))
            append(kind, inputs, (), sum(widths[u] for u in inputs))
        elif kind == "columns":
            start, step = draw(st.integers(0, H - 1)), draw(st.integers(1, 2))
            most = (H - 1 - start) // step + 1
            append(kind, (v,), (float(start), float(step)), draw(st.integers(1, most)))
        elif kind == "line":
            append(kind, (v,), draw(st.sampled_from([(1.0, 0.5), (-0.75, 0.0)])), H)
        elif kind == "expand":
            append(kind, (v,), (), draw(st.integers(1, 3)))
        elif kind == "total":
            append(kind, (v,), (), 1)
        elif kind in ("normalise", "root_mean_square"):
            append(kind, (v,), (0.25,), H)
        else:
            append(kind, (v,), (), H)
    if widths[-1] != D or not nodes or draw(st.booleans()):
        append("linear", (draw(st.integers(0, len(nodes))),), (), D)
    return tuple(nodes)


def operands(
    d: int, nodes: tuple[Node, ...], N: int, bias: bool = True, single: bool = False
) -> tuple[Tensor, Params]:
    """x (N, d) and the parameters; a parameter that may be one number is one if ``single``."""
    params: Params = [None] * (1 + max((p for node in nodes for p in node.params), default=-1))
    biases = {node.params[1] for node in nodes if node.kind == "linear"}
    for place, (node, shapes) in parameter_shapes(d, nodes).items():
        if place in biases and not bias:
            continue
        shape = shapes[-1] if single else shapes[0]
        size = [N if n == -1 else n for n in shape]
        params[place] = torch.randn(size, dtype=torch.float64) * 0.7
        if node.kind == "mask":
            params[place] = (torch.rand(size) < 0.7).double() / 0.7
    return torch.randn(N, d, dtype=torch.float64), params


@settings(max_examples=400)
@given(data=st.data())
def test_random_programs(data: st.DataObject) -> None:
    draw = data.draw
    torch.manual_seed(draw(st.integers(0, 2**16)))
    k, D = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    d = k + draw(st.integers(0, 3))
    nodes = draw(programs(d, D))
    assert wrong_nodes(d, nodes) == ""
    N = draw(st.sampled_from([0, 1, 17, 29]))
    x, params = operands(d, nodes, N, draw(st.booleans()), draw(st.booleans()))
    hinge = draw(
        st.sampled_from(
            [
                None,
                Hinge(),
                Hinge((1, -1)[:k], 0.1, True),
                Hinge(tuple([(1, 0, -1)[i % 3] for i in range(D * k)]), 0.2, False, True),
            ]
        )
    )
    weight = None
    if hinge is not None and draw(st.booleans()):
        # Weights that are 0 leave some pairs without a violation.
        shape = draw(st.sampled_from([(D, k), (N, D, k)]))
        weight = torch.randint(0, 2, shape).double() * 1.5
    masks = {place for node in nodes if node.kind == "mask" for place in node.params}
    needs = [draw(st.booleans())]
    needs += [
        t is not None and i not in masks and draw(st.sampled_from([True, True, False]))
        for i, t in enumerate(params)
    ]
    mode: Mode = draw(st.sampled_from(["tangent", "adjoint"]))
    task, slopes = draw(st.sampled_from([(True, True), (True, False), (False, True)]))
    p = Problem(d, nodes, k, mode, hinge)
    rows = draw(st.sampled_from([5, 1000]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(handwritten, "BLOCK_ELEMENTS", {"cpu": 1})
        patch.setattr(handwritten, "FEWEST_ROWS", rows)
        check(p, x, params, needs, weight, task, slopes)
