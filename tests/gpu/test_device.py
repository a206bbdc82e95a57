"""The cases of the interpreter's tests on a real device, and what only a device has."""

from __future__ import annotations

import copy
from types import ModuleType

import pytest
import torch
from torch import nn

pytest.importorskip("triton")

import monokernel
from benchmarks.measure import captured
from monokernel.activations import KINDS
from monokernel.backends import handwritten, load
from monokernel.backends.triton import layered, programs, whole
from monokernel.columns import last_columns
from monokernel.problem import Hinge, Mode, Problem
from tests.problems import assert_as_precise_as_pytorch, errors, inputs, problem, run
from tests.support import mlp, oracle, points
from tests.test_programs import CASES, operands
from tests.zoo import network

pytestmark = [pytest.mark.gpu]

BOTH = pytest.mark.parametrize("path", [whole, layered], ids=["whole", "layered"])
LOW = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
MODES = pytest.mark.parametrize("mode", ["tangent", "adjoint"])


@pytest.fixture
def _tf32() -> object:
    """TF32 for float32, here and in PyTorch, so that whole-network kernels serve it."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision(before)


@BOTH
@LOW
@MODES
@pytest.mark.parametrize("width", [20, 32, 64, 128])
@pytest.mark.usefixtures("_tf32")
def test_precision(path: ModuleType, dtype: torch.dtype, mode: Mode, width: int) -> None:
    if path is whole and dtype == torch.float32 and width > 64:
        pytest.skip("one kernel serves float32 up to 64")
    D, k = (1, 3) if mode == "adjoint" else (3, 1)
    p = problem((6, width, width, D), "silu", k, mode, Hinge(margin=9.0))
    assert_as_precise_as_pytorch(path, p, 1000, dtype, "cuda")


@pytest.mark.parametrize("kind", KINDS)
@BOTH
@pytest.mark.usefixtures("_tf32")
def test_every_activation(path: ModuleType, kind: str) -> None:
    p = problem((5, 40, 24, 2), kind, 2, "tangent", Hinge(margin=9.0), kind)
    assert_as_precise_as_pytorch(path, p, 333, torch.float32, "cuda")


def test_strict_float32() -> None:
    p = problem((6, 96, 96, 1), "silu", 2, "adjoint", Hinge(margin=9.0))
    truth = run(handwritten, p, *inputs(p, 500))
    x, params = inputs(p, 500, torch.float32, "cuda")
    assert max(errors(run(load("triton"), p, x, params), truth)) < 1e-5  # type: ignore[arg-type]


@MODES
def test_three_products_for_one(mode: Mode, monkeypatch: pytest.MonkeyPatch) -> None:
    """Close to strict float32, whose rounding is 6e-8: TF32 alone is off by 1e-3."""
    monkeypatch.setenv("MONOKERNEL_FP32", "tf32x3")
    D, k = (1, 3) if mode == "adjoint" else (3, 1)
    p = problem((6, 64, 64, D), "silu", k, mode, Hinge(margin=9.0))
    truth = run(handwritten, p, *inputs(p, 500))
    x, params = inputs(p, 500, torch.float32, "cuda")
    assert whole.refuses(p, x) is None
    assert max(errors(run(whole, p, x, params), truth)) < 1e-5  # type: ignore[arg-type]


@BOTH
@pytest.mark.parametrize("share", [0.0, 0.05, 1.0])
@pytest.mark.parametrize("N", [1, 63, 64, 65, 20_000])
def test_active_rows(path: ModuleType, share: float, N: int) -> None:
    p = problem((8, 64, 64, 1), "silu", 4, "adjoint", None)
    violating = torch.rand(N) < share
    x, params = inputs(p, N, torch.float16, "cuda")
    got = run(path, p, x, params, violating=violating.cuda())
    truth = run(handwritten, p, *inputs(p, N), violating=violating)
    torchs = run(handwritten, p, x, params, violating=violating.cuda())
    for a, b in zip(errors(got, truth), errors(torchs, truth), strict=True):
        assert a <= 2 * b + 5e-4


@BOTH
def test_two_runs_give_the_same_bits(path: ModuleType) -> None:
    p = problem((8, 64, 64, 1), "silu", 4, "adjoint", Hinge())
    x, params = inputs(p, 50_000, torch.float16, "cuda")
    for a, b in zip(run(path, p, x, params), run(path, p, x, params), strict=True):
        assert torch.equal(a, b)


@MODES
@pytest.mark.parametrize("name", CASES)
def test_programs(name: str, mode: Mode) -> None:
    """Strict float32 against float64, and the same bits in a second run."""
    d, nodes = CASES[name]
    p = Problem(d, nodes, last_columns(d, min(d, 2)), mode, None)
    x, params = operands(d, nodes, 3000, single=name == "one number for two widths")
    violating = torch.rand(3000) < 0.3
    truth = run(handwritten, p, x, params, violating=violating)
    low, violating = [None if t is None else t.float().cuda() for t in params], violating.cuda()
    ours = run(programs, p, x.float().cuda(), low, violating=violating)
    torchs = run(handwritten, p, x.float().cuda(), low, violating=violating)
    for a, b in zip(errors(ours, truth), errors(torchs, truth), strict=True):
        assert a <= 3 * b + 1e-5
    again = run(programs, p, x.float().cuda(), low, violating=violating)
    assert all(map(torch.equal, ours, again))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["tabular ResNet", "pre-norm LayerNorm", "SwiGLU", "softmax"])
def test_programs_under_autocast(name: str, dtype: torch.dtype) -> None:
    """Value and slopes at most twice as far off as PyTorch's own; the output's dtype is its."""
    net, (x1, x2) = network(name, 8, 3, 64), points(3000, 6, 2, torch.float32)
    y, J = oracle(copy.deepcopy(net).double(), x1.double(), x2.double())
    net, x1, x2 = net.cuda(), x1.cuda(), x2.cuda()
    with torch.autocast("cuda", dtype):
        assert monokernel.plan(net, x1, x2).backend == "triton"
        ours, torchs = monokernel.value_and_jacobian(net, x1, x2), oracle(net, x1, x2)
    assert ours[0].dtype == torchs[0].dtype
    for a, b in zip(errors(ours, (y, J)), errors(torchs, (y, J)), strict=True):
        assert a <= 2 * max(b, torch.finfo(dtype).eps)


@pytest.mark.parametrize("name", [64, 300, "pre-norm LayerNorm", "nested GLU"])
def test_a_step_is_captured_in_a_cuda_graph(name: int | str) -> None:
    """No host synchronisation anywhere: the replay follows new inputs and new violations."""
    if isinstance(name, int):
        net: nn.Module = mlp(6, 2, 1, hidden=(name, name), dtype=torch.float16).cuda()
    else:
        net = network(name, 8, 1, 64, torch.float16).cuda()
    x1, x2 = (t.cuda() for t in points(4096, 6, 2, torch.float16))

    def step() -> torch.Tensor:
        y, penalty = monokernel.fused_mono_penalty(
            net, x1, x2, return_output=True, backend="triton"
        )
        loss = y.float().square().mean() + 1e-3 * penalty
        for q in net.parameters():
            q.grad = None
        loss.backward()
        return loss

    graph, loss = captured(step)
    grads = [q.grad for q in net.parameters()]
    for scale in (1.0, -1.0, 3.0):
        x1.mul_(scale)
        x2.mul_(scale)
        graph.replay()
        replayed = [loss.clone(), *(g.clone() for g in grads if g is not None)]
        want = step().detach()
        eager = [want, *(q.grad for q in net.parameters() if q.grad is not None)]
        for q, g in zip(net.parameters(), grads, strict=True):
            q.grad = g
        for a, b in zip(replayed, eager, strict=True):
            assert torch.equal(a, b)


def test_auto_takes_the_kernels() -> None:
    net = mlp(6, 2, 1, hidden=(64, 64), dtype=torch.float16).cuda()
    x1, x2 = (t.cuda() for t in points(64, 6, 2, torch.float16))
    assert "triton" in str(monokernel.plan(net, x1, x2))
