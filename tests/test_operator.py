"""The operator boundary: torch.compile, opcheck, functorch, forward-mode AD, autocast."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo import compiled_autograd
from torch._dynamo.testing import CompileCounter
from torch.autograd import forward_ad

from monokernel import MonotonePenalty, fused_mono_penalty, plan, value_and_jacobian
from monokernel.activations import Activation
from monokernel.boundary import _forward_op  # the eager implementation of the operator
from monokernel.problem import Hinge, accumulate_dtype, chain_problem, pack
from tests.support import (
    HANDWRITTEN,
    NEEDS_COMPILER,
    assert_same,
    gradients,
    mlp,
    oracle,
    oracle_penalties,
    points,
)


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch._dynamo.reset()


def step(net: nn.Module, **options: Any) -> Callable[[Tensor, Tensor], Tensor]:
    def run(x1: Tensor, x2: Tensor) -> Tensor:
        y, penalty = fused_mono_penalty(net, x1, x2, return_output=True, **options)
        return y.square().mean() + penalty.sum()

    return run


@NEEDS_COMPILER
@pytest.mark.parametrize("backend", HANDWRITTEN)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"mode": "adjoint", "hinge": "squared", "direction": [1, -1]},
        {"reduction": "none", "weight": torch.rand(3, 2, dtype=torch.float64), "margin": 0.1},
        {"reduction": "mean", "direction": [[1, 0], [0, -1], [1, 1]]},
    ],
    ids=["plain", "adjoint", "elementwise", "mean"],
)
def test_compiles_as_one_graph(options: dict[str, Any], backend: str) -> None:
    net = mlp(3, 2, 3)
    run = step(net, backend=backend, **options)
    x1, x2 = points(12, 3, 2)
    x1.requires_grad_()
    inputs = [x1, *net.parameters()]
    compiled = torch.compile(run, fullgraph=True)
    want, got = run(x1, x2), compiled(x1, x2)
    assert_same([got], [want], 1e-12)
    assert_same(gradients(got, *inputs), gradients(want, *inputs), 1e-12)


@pytest.mark.parametrize("backend", HANDWRITTEN)
def test_compiles_with_a_dynamic_batch_without_recompiling(backend: str) -> None:
    net = mlp(3, 2, 1)
    run, graphs = step(net, backend=backend), []

    def count(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend=count)
    for N in (4, 9, 300):
        x1, x2 = points(N, 3, 2)
        assert_same(
            gradients(compiled(x1, x2), *net.parameters()),
            gradients(run(x1, x2), *net.parameters()),
            1e-12,
        )
    assert len(graphs) == 1


@NEEDS_COMPILER
def test_module_compiles_and_so_does_the_jacobian() -> None:
    net, (x1, x2) = mlp(3, 2, 2), points(6, 3, 2)
    module = MonotonePenalty(net, direction=[1, -1], weight=torch.rand(2, 2).double())
    assert_same(torch.compile(module, fullgraph=True)(x1, x2), module(x1, x2), 1e-12)

    def jacobian_loss(x1: Tensor, x2: Tensor) -> Tensor:
        y, J = value_and_jacobian(net, x1, x2)
        return y.sum() + J.square().sum()

    got, want = torch.compile(jacobian_loss, fullgraph=True)(x1, x2), jacobian_loss(x1, x2)
    assert_same(gradients(got, *net.parameters()), gradients(want, *net.parameters()), 1e-12)


def test_a_network_outside_the_table_compiles_as_one_graph_too() -> None:
    net = nn.Sequential(nn.Linear(5, 6), nn.GroupNorm(2, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    x1, x2 = points(7, 3, 2)
    assert plan(net, x1, x2).backend == "reference"
    run = step(net)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    got, want = compiled(x1, x2), run(x1, x2)
    assert_same([got], [want], 1e-12)
    assert_same(gradients(got, *net.parameters()), gradients(want, *net.parameters()), 1e-12)


@pytest.mark.parametrize("backend", [*HANDWRITTEN, "reference"])
@pytest.mark.parametrize("drawn", [False, True])
def test_the_backward_of_an_eager_step_compiles(backend: str, drawn: bool) -> None:
    """Compiled autograd: one graph serves other numbers, each step by its own plan."""
    net = mlp(3, 2, 2, activation=nn.Sequential(nn.Dropout(0.3), nn.Tanh()) if drawn else nn.Tanh())
    net.train(drawn and backend != "reference")
    x1, x2 = points(9, 3, 2)
    params, weight = list(net.parameters()), torch.rand(2, 2, dtype=torch.float64)
    graphs = CompileCounter()
    compiler = torch.compile(backend=graphs)
    for i in range(3):
        found = []
        for compiled in (False, True):
            torch.manual_seed(i)
            loss = step(net, backend=backend, margin=0.3 * i, weight=weight + i)(x1, x2)
            net.zero_grad()
            with compiled_autograd._enable(compiler) if compiled else nullcontext():
                loss.backward()
            found.append([p.grad for p in params])
        assert_same(*found)
    assert graphs.frame_count > 0


def test_a_compiled_network_is_read_through() -> None:
    net, (x1, x2) = mlp(3, 2, 2), points(6, 3, 2)
    compiled = torch.compile(net)
    assert_same([fused_mono_penalty(compiled, x1, x2)], [fused_mono_penalty(net, x1, x2)])
    assert plan(compiled, x1, x2).backend == plan(net, x1, x2).backend


@pytest.mark.parametrize("backend", HANDWRITTEN)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_compiled_half_precision_is_the_eager_one(dtype: torch.dtype, backend: str) -> None:
    net = mlp(3, 2, 3, dtype=dtype)
    x1, x2 = points(12, 3, 2, dtype)
    run = step(net, backend=backend, margin=0.5)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    want, got = run(x1, x2), compiled(x1, x2)
    assert torch.equal(got, want)
    params = list(net.parameters())
    assert all(map(torch.equal, gradients(got, *params), gradients(want, *params)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", HANDWRITTEN)
@pytest.mark.parametrize("mode", ["tangent", "adjoint"])
@pytest.mark.parametrize("D", [1, 2])
def test_opcheck(D: int, mode: Any, backend: str, dtype: torch.dtype) -> None:
    widths = (5, 6, D)
    problem = chain_problem(
        widths,
        (Activation("silu"), Activation("softplus", 1.0, 20.0)),
        2,
        mode,
        Hinge((1,), 0.5, elementwise=True),
    )
    x = torch.randn(7, 5, dtype=dtype)
    params = [torch.randn(6, 5), None, torch.randn(D, 6), torch.randn(D)]
    params = [None if t is None else t.to(dtype) for t in params]
    weight = torch.rand(D, 2, dtype=accumulate_dtype(dtype))
    arguments = (x, weight, params, True, backend, *pack(problem))
    torch.library.opcheck(torch.ops.monokernel.forward.default, arguments)
    y, out, *saved = _forward_op(*arguments)
    needs = [True, True, False, True, False]
    arguments = (
        torch.randn_like(y), torch.rand_like(out), x, params, saved, needs, backend,
        *pack(problem),
    )  # fmt: skip
    torch.library.opcheck(torch.ops.monokernel.backward.default, arguments)


@pytest.mark.parametrize("backend", HANDWRITTEN)
def test_operands_of_two_dtypes_are_for_triton_alone(backend: str) -> None:
    problem = chain_problem((3, 1), (Activation("identity"),), 1, "adjoint", None)
    packed = pack(problem._replace(cast=torch.bfloat16))
    params = [torch.randn(1, 3, dtype=torch.bfloat16), None]
    with pytest.raises(ValueError, match="cannot serve"):
        torch.ops.monokernel.forward(torch.randn(2, 3), None, params, False, backend, *packed)


# --- functorch and forward mode: the reference path, never a silent zero -------------------------


def penalty_of(net: nn.Module, x1: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda x2: fused_mono_penalty(net, x1, x2, margin=1.0, hinge="squared")


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_functorch_transforms(compiled: bool) -> None:
    net, (x1, x2) = mlp(3, 2, 2, hidden=(6,)), points(5, 3, 2)
    f = penalty_of(net, x1)
    net.requires_grad_(False)
    x = x2.clone().requires_grad_()
    _, J = oracle(net, x1, x)
    (want,) = gradients(oracle_penalties(J, margin=1.0, hinge="squared").sum(), x)
    v = torch.randn_like(x2)

    def grad(x2: Tensor) -> Tensor:
        return torch.func.grad(f)(x2)

    def jvp(x2: Tensor) -> Tensor:
        return torch.func.jvp(f, (x2,), (v,))[1]

    for transformed, expected in ((grad, want), (jvp, (want * v).sum())):
        if compiled:
            transformed = torch.compile(transformed, fullgraph=True, backend="aot_eager")
        assert_same([transformed(x2)], [expected])


def test_vmap_of_an_ensemble() -> None:
    nets = [mlp(3, 2, 2, hidden=(6,)) for _ in range(3)]
    x1, x2 = points(5, 3, 2)
    params, buffers = torch.func.stack_module_state([MonotonePenalty(n) for n in nets])
    base = MonotonePenalty(nets[0])

    def one(params: dict[str, Tensor], buffers: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        return torch.func.functional_call(base, (params, buffers), (x1, x2))

    y, penalty = torch.func.vmap(one)(params, buffers)
    want = [fused_mono_penalty(n, x1, x2, return_output=True) for n in nets]
    assert_same([y, penalty], [torch.stack(t) for t in zip(*want, strict=True)])


def test_forward_mode_dual_numbers() -> None:
    net, (x1, x2) = mlp(3, 2, 2), points(5, 3, 2)
    v = torch.randn_like(x2)
    f = penalty_of(net, x1)
    with forward_ad.dual_level():
        got = forward_ad.unpack_dual(f(forward_ad.make_dual(x2, v))).tangent
    assert got is not None
    assert_same([got], [torch.func.jvp(f, (x2,), (v,))[1]])


def test_a_kernel_asked_for_by_name_refuses_transforms() -> None:
    net, (x1, x2) = mlp(3, 2, 2), points(5, 3, 2)
    with pytest.raises(ValueError, match="functorch"):
        torch.func.grad(lambda z: fused_mono_penalty(net, x1, z, backend="torch"))(x2)


# --- autocast ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mode", ["tangent", "adjoint"])
@pytest.mark.parametrize("backend", ["auto", "torch", "reference"])
def test_autocast(backend: str, mode: str, dtype: torch.dtype) -> None:
    net = mlp(3, 2, 2, hidden=(16, 16), dtype=torch.float32)
    x1, x2 = points(64, 3, 2, torch.float32)
    exact_y, exact = fused_mono_penalty(net, x1, x2, margin=0.5, return_output=True, mode=mode)
    exact_grads = gradients(exact_y.square().mean() + exact / 64, *net.parameters())
    with torch.autocast("cpu", dtype=dtype):
        y, penalty = fused_mono_penalty(
            net, x1, x2, margin=0.5, return_output=True, mode=mode, backend=backend
        )
        assert y.dtype == net(torch.cat([x1, x2], -1)).dtype == dtype
        assert penalty.dtype == torch.float32
        loss = y.float().square().mean() + penalty / 64
    grads = gradients(loss, *net.parameters())
    assert all(g.dtype == torch.float32 for g in grads)
    assert_same([penalty, *grads], [exact, *exact_grads], 0.05)


def test_float64_is_exempt_from_autocast() -> None:
    net, (x1, x2) = mlp(3, 2, 2), points(5, 3, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = fused_mono_penalty(net, x1, x2)
    assert_same([got], [fused_mono_penalty(net, x1, x2)])


def test_a_weight_that_outlived_its_transform() -> None:
    """functorch leaves a wrapper without storage; PyTorch's operators see through it."""
    net, (x1, x2) = mlp(3, 2, 1, [4]), points(6, 3, 2)
    leaked: list[Tensor] = []
    torch.func.grad(lambda w: (leaked.append(w), w.sum())[1])(net[0].weight.detach().clone())
    swapped = {"mlp.0.weight": leaked[0]}
    got = torch.func.functional_call(MonotonePenalty(net), swapped, (x1, x2))
    assert_same(got, MonotonePenalty(net)(x1, x2))
