"""Programs on the Triton backend under its interpreter, against the twin in PyTorch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton")

from monokernel import fused_mono_penalty, plan
from monokernel.backends import handwritten
from monokernel.backends.triton import programs as path
from monokernel.backends.triton.launch import interpreting
from monokernel.nodes import wrong_nodes
from monokernel.problem import Hinge, Mode, Problem
from tests.gpu.cases import run
from tests.support import assert_same, gradients, points
from tests.test_programs import BOTH_MODES, CASES, operands, programs
from tests.zoo import ACTIVE, ZOO, network

pytestmark = pytest.mark.skipif(not interpreting(), reason="runs under TRITON_INTERPRET=1")

Params = list[Tensor | None]


def assert_agrees(p: Problem, x: Tensor, params: Params, **options: Any) -> None:
    got, want = (run(backend, p, x, params, **options) for backend in (path, handwritten))
    assert_same(got, want)


@settings(max_examples=50)
@given(data=st.data())
def test_random_programs(data: st.DataObject) -> None:
    draw = data.draw
    torch.manual_seed(draw(st.integers(0, 2**16)))
    k, D = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    d = k + draw(st.integers(0, 3))
    nodes = draw(programs(d, D))
    assert wrong_nodes(d, nodes) == ""
    N = draw(st.sampled_from([0, 1, 16, 29]))
    x, params = operands(d, nodes, N, draw(st.booleans()), draw(st.booleans()))
    signs = tuple([(1, 0, -1)[i % 3] for i in range(D * k)])
    hinges = None, Hinge(), Hinge((1, -1)[:k], 0.1, True), Hinge(signs, 0.2, False, True)
    hinge = draw(st.sampled_from(hinges))
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
    violating = torch.rand(N) < 0.5 if hinge is None or hinge.elementwise else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(handwritten, "BLOCK_ELEMENTS", {"cpu": 1})
        patch.setattr(handwritten, "FEWEST_ROWS", draw(st.sampled_from([5, 1000])))
        assert_agrees(
            Problem(d, nodes, k, mode, hinge), x, params, weight=weight, task=task, slopes=slopes,
            needs=needs, violating=violating,
        )  # fmt: skip


@BOTH_MODES
@pytest.mark.parametrize("name", CASES)
def test_value_slopes_and_gradients(name: str, mode: Mode) -> None:
    d, nodes = CASES[name]
    x, params = operands(d, nodes, 22, single=name == "one number for two widths")
    violating = torch.rand(22) < 0.5
    p = Problem(d, nodes, 2, mode, None)
    assert_agrees(p, x, params, violating=violating)
    assert_agrees(p, x, params, violating=violating, task=False)


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
