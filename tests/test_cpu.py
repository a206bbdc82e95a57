"""The native CPU kernel by itself: its functions against their twin in PyTorch, its activations
against float64, its threads, its instruction sets. The public call is in test_penalty.py."""

from __future__ import annotations

import copy
import gc
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import mpmath as mp
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from monokernel import again, boundary, fused_mono_penalty, plan, value_and_jacobian
from monokernel.activations import ACTIVATIONS, Activation
from monokernel.backends import cpu, handwritten, native, operators
from monokernel.backends.cpu import Params
from monokernel.boundary import FusedMonoPenalty
from monokernel.problem import Hinge, Mode, Problem
from monokernel.program import Node
from tests.exact import EXACT
from tests.problems import EVERY_KIND, IDENTITY, UNRULY, problem, run
from tests.support import assert_same, mlp, points

ROOT = Path(__file__).resolve().parent.parent

pytestmark = pytest.mark.skipif(cpu.isa() is None, reason="the native kernel was not built")

TABLE = EVERY_KIND
HALF = [torch.bfloat16, torch.float16]
EVERY_ACTIVATION = pytest.mark.parametrize("σ", TABLE, ids=ACTIVATIONS)
TAME = [σ for σ in TABLE if σ.kind not in UNRULY]


def parameters(p: Problem, dtype: torch.dtype, bias: bool = True) -> list[Tensor | None]:
    params: list[Tensor | None] = []
    layers = [node.width for node in p.nodes if node.kind == "linear"]
    for fan_in, out in zip([p.d, *layers], layers, strict=False):
        params += [torch.randn(out, fan_in, dtype=dtype) * 1.3 / fan_in**0.5]
        params += [torch.randn(out, dtype=dtype) if bias else None]
    return params


# --- against the twin in PyTorch ----------

HINGES = st.one_of(
    st.none(),
    st.builds(
        Hinge,
        direction=st.sampled_from([(1,), (-1,)]),
        margin=st.sampled_from([-0.2, 0.0, 0.3, 50.0]),
        squared=st.booleans(),
        elementwise=st.booleans(),
    ),
)


@given(
    hidden=st.lists(st.integers(1, 70), max_size=4),
    d1=st.sampled_from([0, 1, 3, 8, 60]),
    k=st.integers(1, 40),
    D=st.integers(1, 40),
    N=st.sampled_from([0, 1, 7, 64, 97, 210]),
    σ=st.sampled_from(TAME),
    mode=st.sampled_from(["tangent", "adjoint"]),
    hinge=HINGES,
    last=st.booleans(),
    bias=st.booleans(),
    task=st.booleans(),
)
def test_same_as_the_twin(
    hidden: list[int],
    d1: int,
    k: int,
    D: int,
    N: int,
    σ: Activation,
    mode: Mode,
    hinge: Hinge | None,
    last: bool,
    bias: bool,
    task: bool,
) -> None:
    p = problem((d1 + k, *hidden, D), σ, k, mode, hinge, σ if last else IDENTITY)
    x, params = torch.randn(N, p.d, dtype=torch.float64), parameters(p, torch.float64, bias)
    got, want = (run(b, p, x, params, task=task) for b in (cpu, handwritten))
    assert_same(got, want, 1e-11)


@pytest.mark.parametrize("mode", ["tangent", "adjoint"])
@pytest.mark.parametrize("D", [1, 3])
@pytest.mark.parametrize("rows", [False, True], ids=["weight-Dk", "weight-NDk"])
def test_weights_and_mixed_directions(mode: Mode, D: int, rows: bool) -> None:
    direction = tuple([1, -1, 0, 1, 1, -1][: 2 * D]) if D > 1 else (1, -1)
    p = problem((5, 33, 20, D), TABLE[7], 2, mode, Hinge(direction, 0.1, True))
    x, params = torch.randn(130, 5, dtype=torch.float64), parameters(p, torch.float64)
    weight = torch.rand((130, D, 2) if rows else (D, 2), dtype=torch.float64)
    got, want = (run(b, p, x, params, weight) for b in (cpu, handwritten))
    assert_same(got, want, 1e-11)


@pytest.mark.parametrize("mode", ["tangent", "adjoint"])
@pytest.mark.parametrize("D", [1, 3])
@pytest.mark.parametrize("σ", [TABLE[1], TABLE[7]], ids=["relu", "silu"])
@pytest.mark.parametrize("margin", [0.1, 50.0], ids=["some-rows", "every-row"])
def test_without_stacking_or_compaction(mode: Mode, D: int, σ: Activation, margin: float) -> None:
    p = problem((8, 33, 20, 17, D), σ, 6, mode, Hinge(margin=margin))
    x, params = torch.randn(130, 8, dtype=torch.float64), parameters(p, torch.float64)
    want = run(handwritten, p, x, params)
    for stacks, compacts in ((True, True), (False, True), (True, False), (False, False)):
        cpu.switch(stacks, compacts)
        try:
            assert_same(run(cpu, p, x, params), want, 1e-11)
        finally:
            cpu.switch()


def test_any_strides_and_partly_wanted_gradients() -> None:
    p = problem((6, 40, 24, 1), TABLE[1], 2, "adjoint", Hinge(margin=0.2))
    params = parameters(p, torch.float64)
    x = torch.randn(6, 200, dtype=torch.float64).t()
    strided = [None if q is None else torch.stack([q, q], -1)[..., 0] for q in params]
    assert_same(run(cpu, p, x, strided), run(handwritten, p, x.contiguous(), params), 1e-11)
    expanded = x[:1].expand(50, -1)
    assert_same(run(cpu, p, expanded, params), run(handwritten, p, expanded, params), 1e-11)
    y, out, saved = cpu.forward(p, x, None, params, True)
    needs = [False, True, False, False, True, True, False]
    full = cpu.backward(p, y, out, x, params, saved, [True] * 7)
    some = cpu.backward(p, y, out, x, params, saved, needs)
    for need, a, b in zip(needs, some, full, strict=True):
        assert (a is not None and b is not None and torch.equal(a, b)) if need else a is None


@pytest.mark.parametrize("σ", TAME, ids=[σ.kind for σ in TAME])
@pytest.mark.parametrize("mode", ["tangent", "adjoint"])
def test_float32_is_as_exact_as_pytorch(σ: Activation, mode: Mode) -> None:
    """Root-mean-square error against float64 at most twice that of PyTorch's own float32."""
    p = problem((8, 64, 64, 1), σ, 3, mode, None, last=σ)
    params = parameters(p, torch.float32)
    x = torch.randn(500, 8)
    truth = run(handwritten, p, x.double(), [q if q is None else q.double() for q in params])
    got, plain = run(cpu, p, x, params), run(handwritten, p, x, params)
    for g, f, w in zip(got, plain, truth, strict=True):
        error, its = ((t.double() - w).square().mean().sqrt() for t in (g, f))
        # Of a single number PyTorch's error may happen to be next to nothing.
        assert error <= 2 * its + (2e-7 if w.numel() > 8 else 1e-6) * w.abs().max()


# --- half precision: float32 inside, rounded once ----------


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("N", [0, 1, 300])
@pytest.mark.parametrize(("D", "mode"), [(1, "adjoint"), (3, "tangent")])
@pytest.mark.parametrize("hinge", [None, Hinge(margin=0.2)], ids=["slopes", "penalty"])
def test_half_precision_is_float32_rounded_once(
    hinge: Hinge | None, D: int, mode: Mode, N: int, dtype: torch.dtype
) -> None:
    p = problem((5, 24, 20, D), TABLE[7], 2, mode, hinge)
    x, params = torch.randn(5, N).to(dtype).t(), parameters(p, dtype)
    wide = [None if t is None else t.float() for t in params]
    y, out, saved = cpu.forward(p, x, None, params, True)
    wide_y, wide_out, wide_saved = cpu.forward(p, x.float(), None, wide, True)
    assert y.dtype == dtype
    assert torch.equal(y, wide_y.to(dtype))
    assert torch.equal(out, wide_out)
    assert all(map(torch.equal, saved, wide_saved))
    needs = [True, False, True, True, True, True, True]
    got = cpu.backward(p, y, out, x, params, saved, needs)
    want = cpu.backward(p, y.float(), out, x.float(), wide, saved, needs)
    for g, w in zip(got, want, strict=True):
        assert (g is None) == (w is None)
        assert g is None or (g.dtype == dtype and torch.equal(g, w.to(dtype)))  # type: ignore[union-attr]


@pytest.mark.parametrize("built", ["1", "0"])
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_autocast_takes_the_weights_as_they_are(
    dtype: torch.dtype, built: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same bits as without autocast but for y and its gradient, which are in autocast's dtype:
    weights that were rounded first give other slopes."""
    monkeypatch.setenv("MONOKERNEL_BOUNDARY", built)
    boundary.preparing.cache_clear()
    net, (x1, x2) = mlp(3, 2, 2, dtype=torch.float32), points(50, 3, 2, torch.float32)
    net[2].requires_grad_(False)
    params = [t for t in net.parameters() if t.requires_grad]
    with torch.autocast("cpu", dtype=dtype):
        y, J = value_and_jacobian(net, x1, x2, backend="cpu")
        assert plan(net, x1, x2).backend == "cpu"
    assert (y.dtype, J.dtype) == (dtype, torch.float32)
    got = torch.autograd.grad([y, J], params, [torch.ones_like(y), torch.ones_like(J)])
    wide, same_J = value_and_jacobian(net, x1, x2, backend="cpu")
    want = torch.autograd.grad([wide, same_J], params, [torch.ones_like(wide), torch.ones_like(J)])
    assert torch.equal(y, wide.to(dtype))
    assert torch.equal(J, same_J)
    assert all(map(torch.equal, got, want))
    net.to(dtype)
    rounded = value_and_jacobian(net, x1.to(dtype), x2.to(dtype), backend="cpu")[1]
    assert (rounded - J).abs().max() > 10 * torch.finfo(torch.float32).eps * J.abs().max()
    monkeypatch.undo()
    boundary.preparing.cache_clear()


def test_autocast_brings_dtypes_together() -> None:
    """A network of two dtypes, as PyTorch runs it under autocast: each has gradients of its own."""
    net, (x1, x2) = mlp(3, 2, 2, dtype=torch.float32), points(50, 3, 2, torch.bfloat16)
    net[2].bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, J = value_and_jacobian(net, x1, x2, backend="cpu")
    assert (y.dtype, J.dtype) == (torch.bfloat16, torch.float32)
    grads = torch.autograd.grad(y.sum() + J.sum(), list(net.parameters()))
    assert [g.dtype for g in grads] == [t.dtype for t in net.parameters()]
    wide = copy.deepcopy(net).float()
    assert torch.equal(value_and_jacobian(wide, x1.float(), x2.float(), backend="cpu")[1], J)


# --- activations ----------


def truth(σ: Activation, a: Tensor) -> tuple[Tensor, ...]:
    """σ, σ', σ'' of a by 40-digit arithmetic, rounded to float64."""
    if σ.piecewise_linear:
        return σ.value(a.double()), σ.first(a.double()), σ.second(a.double())
    with mp.workdps(40):
        rows = [
            [
                float(mp.diff(lambda t: EXACT[σ.kind](t, *σ[1:]), mp.mpf(v), order))
                for order in range(3)
            ]
            for v in a.tolist()
        ]
    return tuple(torch.tensor(column, dtype=torch.float64) for column in zip(*rows, strict=True))


@EVERY_ACTIVATION
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_activations_to_a_few_ulp(σ: Activation, dtype: torch.dtype) -> None:
    """Units in the last place of the value, or of 1/4 where it is smaller (it may cross zero)."""
    torch.manual_seed(0)
    a = torch.cat([torch.linspace(-12, 12, 241) + 0.003, torch.randn(60) * 2]).to(dtype)
    if σ.kind in ("sqrt", "log"):
        a = a.abs()
    # gelu_tanh rounds u(a) before exp, tanhshrink is a difference, tanh'' without FMA a product of
    # three that are rounded.
    allowed = 8 if σ.kind in ("gelu_tanh", "tanhshrink", "tanh") else 4
    for got, want in zip(cpu.activation(σ, a), truth(σ, a), strict=True):
        ulp = torch.finfo(dtype).eps * want.abs().clamp(min=0.25)
        assert ((got.double() - want).abs() / ulp).max() <= allowed


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    "kind",
    [
        σ.kind
        for σ in TABLE
        # No negative numbers, or a difference of two that nearly cancel.
        if not σ.piecewise_linear and σ.kind not in ("sqrt", "log", "hardswish", "tanhshrink")
    ],
)
def test_small_values_keep_their_digits(kind: str, dtype: torch.dtype) -> None:
    σ = TABLE[list(ACTIVATIONS).index(kind)]
    a = -torch.logspace(-4, 0.9, 100).to(dtype)
    want = truth(σ, a)[0]
    # Rounding exp's argument (a, or a²/2 and u(a) of GELU) costs that many halves of a unit; it
    # does so in PyTorch, too.
    argument = a.double() ** 2 / 2 if kind == "gelu" else a.double().abs()
    argument = 2 * (argument + 0.1 * argument**3) if kind == "gelu_tanh" else argument
    ulp = torch.finfo(dtype).eps * want.abs() * (4 + 2 * argument)
    assert ((cpu.activation(σ, a)[0].double() - want).abs() <= ulp).all()


@EVERY_ACTIVATION
def test_activations_at_kinks_and_far_out(σ: Activation) -> None:
    a = torch.tensor([0.0, -0.0, σ.p, σ.q, 90, -90, 800, -800, 3e38, -3e38], dtype=torch.float64)
    got = cpu.activation(σ, a)
    if σ.kind in UNRULY:  # some are infinite, or nowhere defined
        torch.testing.assert_close(got, (σ.value(a), σ.first(a), σ.second(a)), equal_nan=True)
    else:
        assert_same(got[:2], [σ.value(a), σ.first(a)], 1e-14)
    nan = cpu.activation(σ, torch.tensor([float("nan")]))
    assert nan[0].isnan()


# --- NaN, reruns, threads ----------


@pytest.mark.parametrize("mode", ["tangent", "adjoint"])
@pytest.mark.parametrize("D", [1, 2])
def test_nan_is_never_a_zero_penalty(mode: Mode, D: int) -> None:
    p = problem((4, 10, D), TABLE[1], 2, mode, Hinge((1,), 0.0, False, True))
    x, params = torch.randn(20, 4), parameters(p, torch.float32)
    x[7, 0] = float("nan")
    y, penalty, _ = cpu.forward(p, x, None, params, False)
    assert y[7].isnan().all()
    assert penalty[7].isnan().all()
    rest = torch.arange(20) != 7
    assert penalty[rest].isfinite().all()
    free = problem((4, 10, D), TABLE[1], 2, mode, Hinge((0,), 1.0, False, True))
    assert (cpu.forward(free, x, None, params, False)[1] == 0).all()


def test_infinite_slopes_of_clean_rows_leave_gradients_alone() -> None:
    """An infinite gout meets inactive entries only: their gradient is zero, not NaN."""
    p = problem((4, 10, 1), TABLE[1], 2, "adjoint", Hinge((1,), -1e9))
    x, params = torch.randn(20, 4), parameters(p, torch.float32)
    _, out, saved = cpu.forward(p, x, None, params, True)
    inf = torch.full_like(out, float("inf"))
    grads = cpu.backward(p, None, inf, x, params, saved, [True] * 5)
    assert all((g == 0).all() for g in grads if g is not None)


@pytest.mark.parametrize("mode", ["tangent", "adjoint"])
def test_two_runs_give_the_same_bits(mode: Mode) -> None:
    p = problem((6, 50, 34, 2), TABLE[7], 2, mode, Hinge(margin=0.1))
    x, params = torch.randn(1000, 6), parameters(p, torch.float32)
    first, second = run(cpu, p, x, params), run(cpu, p, x, params)
    assert all(map(torch.equal, first, second))


def test_thread_counts_agree_and_may_change_before_backward() -> None:
    p = problem((6, 50, 34, 1), TABLE[7], 2, "adjoint", Hinge(margin=0.1))
    x, params = torch.randn(3000, 6, dtype=torch.float64), parameters(p, torch.float64)
    before = torch.get_num_threads()
    want = run(handwritten, p, x, params)
    try:
        for forward, backward in ((1, 1), (2, 2), (3, 1), (1, 5)):
            torch.set_num_threads(forward)
            y, out, saved = cpu.forward(p, x, None, params, True)
            torch.set_num_threads(backward)
            grads = cpu.backward(p, y, out, x, params, saved, [True] * 7)
            assert_same([y, out], want[:2], 1e-12)
            one = handwritten.forward(p, x, None, params, True)
            twin = handwritten.backward(p, one[0], one[1], x, params, one[2], [True] * 7)
            assert_same(grads, twin, 1e-11)  # type: ignore[arg-type]
    finally:
        torch.set_num_threads(before)


def test_python_threads_do_not_disturb_each_other() -> None:
    p = problem((6, 40, 40, 1), TABLE[7], 2, "adjoint", Hinge(margin=0.1))
    inputs = [(torch.randn(400, 6), parameters(p, torch.float32)) for _ in range(4)]
    want = [run(cpu, p, x, params) for x, params in inputs]
    wrong: list[int] = []

    def work(i: int) -> None:
        for _ in range(20):
            if not all(map(torch.equal, run(cpu, p, *inputs[i]), want[i])):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_with_one_thread_computes() -> None:
    """As a DataLoader's worker does: PyTorch gives it one thread."""
    script = """
import os, torch
from tests.test_cpu import *
p = problem((6, 40, 40, 1), TABLE[7], 2, "adjoint", Hinge(margin=0.1))
x, params = torch.randn(4000, 6), parameters(p, torch.float32)
want = run(cpu, p, x, params)
child = os.fork()
if child == 0:
    torch.set_num_threads(1)
    got = run(cpu, p, x, params)
    os._exit(0 if all(map(torch.allclose, got[:2], want[:2])) else 1)
assert os.waitpid(child, 0)[1] == 0
assert all(map(torch.equal, run(cpu, p, x, params), want))
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120, cwd=ROOT)


@pytest.mark.parametrize("depth", [128, 130], ids=["chain", "program"])
def test_a_deep_network_needs_no_deep_stack(depth: int) -> None:
    """What the kernel knows of each layer lies in its scratch memory: in a thread of 64 KiB."""
    script = f"""
from tests.test_cpu import *
p = problem((4,) * {depth} + (1,), TABLE[7], 2, "adjoint", Hinge(margin=0.1))
x, params = torch.randn(50, 4), parameters(p, torch.float32)
want, got = run(cpu, p, x, params), []
torch.set_num_threads(1)
threading.stack_size(64 * 1024)
thread = threading.Thread(target=lambda: got.extend(run(cpu, p, x, params)))
thread.start()
thread.join()
assert all(map(torch.equal, got, want))
assert len(got) == len(want)
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120, cwd=ROOT)


# --- the boundary ----------

BOUNDARY = pytest.mark.skipif(cpu.step() is None, reason="not built for this PyTorch")


def by_python(p: Problem, x: Tensor, weight: Tensor | None, params: Params) -> Any:
    return FusedMonoPenalty.apply(p, "cpu", weight, x, *params)


def by_operator(p: Problem, x: Tensor, weight: Tensor | None, params: Params) -> Any:
    prepare = cpu.step()
    assert prepare is not None
    return prepare(p, x.dtype)(x, weight, params)


def leaves(
    p: Problem, bias: bool = True, dtype: torch.dtype = torch.float32
) -> list[Tensor | None]:
    params = parameters(p, dtype, bias)
    return [None if t is None else t.requires_grad_() for t in params]


@pytest.mark.skipif(
    not (native.PACKAGE / native.LIBRARY).exists(), reason="built without a compiler"
)
@pytest.mark.skipif(not (ROOT / ".venv" / ".ready").exists(), reason="not built by the Makefile")
def test_the_boundary_was_built() -> None:
    """Where the kernel was built against this PyTorch its operator was too, or fails to compile."""
    assert (native.PACKAGE / operators.BOUNDARY.format(*torch.__version__.split(".")[:2])).exists()


@BOUNDARY
@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("N", [0, 1, 300, 5000])  # the last saves in the library's pool
@pytest.mark.parametrize(
    ("hinge", "weighted"),
    [
        (None, False),
        (Hinge(margin=0.2), False),
        (Hinge(margin=0.2), True),
        (Hinge(margin=0.2, elementwise=True), True),
    ],
)
@pytest.mark.parametrize(("D", "mode"), [(1, "adjoint"), (3, "tangent")])
def test_the_operator_does_what_the_function_does(
    D: int, mode: Mode, hinge: Hinge | None, weighted: bool, N: int, dtype: torch.dtype
) -> None:
    p = problem((5, 24, 20, D), TABLE[7], 2, mode, hinge)
    params = leaves(p, N != 1, dtype)
    first = params[0]
    assert first is not None
    first.requires_grad_(N != 300)  # one that is frozen
    x = torch.randn(5, N).to(dtype).t().requires_grad_(N == 300)  # and one that is not contiguous
    weight = torch.rand(N, D, 2) if weighted else None
    wanted = [t for t in (x, *params) if t is not None and t.requires_grad]
    found = []
    for way in (by_python, by_operator):
        y, out = way(p, x, weight, params)
        both = torch.autograd.grad([y, out], wanted, [y, out], retain_graph=True)
        one = torch.autograd.grad(out, wanted, torch.ones_like(out), retain_graph=True)
        other = torch.autograd.grad(y[:, 0].sum(), wanted)
        assert [g.dtype for g in (y, *both)] == [dtype] * (1 + len(wanted))
        assert out.dtype == torch.float32
        found.append([y, out, *both, *one, *other])
    assert all(map(torch.equal, *found))


@BOUNDARY
def test_the_operator_says_which_dtype_it_expected() -> None:
    p = problem((5, 24, 1), TABLE[7], 2, "adjoint")
    step = torch.ops.monokernel.cpu_step
    for own, came in [
        (torch.float32, torch.float64),
        (torch.float32, torch.int64),
        (torch.float64, torch.float32),
        (torch.float64, torch.bfloat16),
    ]:
        expected = f"x1, x2: expected {own} .* got {came} ".replace("torch.", "")
        with pytest.raises(RuntimeError, match=expected):
            step(cpu._native(p, own).handle, torch.ones(3, 5, dtype=came), None, parameters(p, own))


@BOUNDARY
def test_the_operator_keeps_what_backward_needs() -> None:
    p = problem((5, 24, 1), TABLE[7], 2, "adjoint", Hinge(margin=0.2))
    x, params = torch.randn(40, 5), leaves(p)
    want = torch.autograd.grad(by_operator(p, x, None, params)[1], params)  # type: ignore[arg-type]
    y, penalty = by_operator(p, x, None, params)
    cpu._native.cache_clear()  # nobody else owns it now
    gc.collect()
    assert all(map(torch.equal, torch.autograd.grad(penalty, params), want))  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        y.sum().backward()
    y, penalty = by_operator(p, x, None, params)
    with torch.no_grad():
        params[0].add_(1)  # type: ignore[union-attr]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        penalty.backward()


@BOUNDARY
def test_the_operator_is_differentiable_once() -> None:
    p = problem((5, 24, 1), TABLE[7], 2, "adjoint", Hinge(margin=0.2))
    x, params = torch.randn(40, 5), leaves(p)
    y, _ = by_operator(p, x, None, params)
    (g,) = torch.autograd.grad(y.sum(), params[:1], create_graph=True)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="backend='reference' supports"):
        g.sum().backward()
    with torch.no_grad():
        assert not by_operator(p, x, None, params)[0].requires_grad
    fixed = [None if t is None else t.detach() for t in params]
    assert not by_operator(p, x, None, fixed)[0].requires_grad


@BOUNDARY
def test_the_operator_serves_the_public_call(monkeypatch: pytest.MonkeyPatch) -> None:
    net, (x1, x2) = mlp(3, 2, 1), points(50, 3, 2)
    params = list(net.parameters())
    found = []
    for way in ("1", "0"):
        monkeypatch.setenv("MONOKERNEL_BOUNDARY", way)
        boundary.preparing.cache_clear()
        again._served.clear()
        y, penalty = fused_mono_penalty(net, x1, x2, margin=0.1, return_output=True)
        assert ("CppFunction" in type(y.grad_fn).__name__) == (way == "1")
        found.append([y, penalty, *torch.autograd.grad(y.sum() + penalty, params)])
    monkeypatch.undo()
    boundary.preparing.cache_clear()
    assert all(map(torch.equal, *found))


# --- the library ----------


@pytest.mark.parametrize("name", ["baseline", "avx2"])
def test_every_instruction_set_of_this_processor(name: str) -> None:
    script = f"""
from tests.test_cpu import *
torch.manual_seed(0)
# The first call of PyTorch's own, by two threads at once, was seen to be off by 1e-10.
torch.zeros(9, dtype=torch.float64).exp().erf()
if cpu.isa() == {name!r}:
    for dtype, tolerance in ((torch.float64, 1e-11), (torch.float32, 2e-3)):
        for mode in ("tangent", "adjoint"):
            for widths, k in (((7, 37, 50, 1), 3), ((5, 24, 19, 3), 2)):
                p = problem(widths, TABLE[5], k, mode, Hinge(margin=0.1))
                x, params = torch.randn(150, widths[0], dtype=dtype), parameters(p, dtype)
                assert_same(run(cpu, p, x, params), run(handwritten, p, x, params), tolerance)
    for σ in TABLE:
        for dtype in (torch.float32, torch.float64):
            test_activations_to_a_few_ulp(σ, dtype)
    from tests.test_certify import test_the_native_forms_are_those_of_pytorch as forms_too
    for kind in ("silu", "gelu", "tanh"):
        forms_too(kind)
"""
    environment = {**os.environ, "MONOKERNEL_ISA": name}
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT, env=environment)


def test_refuses_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    p = problem((4, 10, 1), TABLE[1], 2, "adjoint")
    assert cpu.refuses(p, torch.empty(0, 4)) is None
    assert cpu.refuses(p, torch.empty(0, 4, dtype=torch.float16)) is None
    assert "got float8" in (cpu.refuses(p, torch.empty(0, 4, dtype=torch.float8_e5m2)) or "")
    unknown = p._replace(nodes=(Node("arctan", (0,), (), (), 4), Node("fold", (1,), (), (), 4)))
    assert cpu.refuses(unknown, torch.empty(0, 4)) == "it does not know arctan, fold"
    meta = torch.empty(0, 4, device="meta")
    assert cpu.refuses(p, meta) == "it serves CPU tensors, got meta"
    monkeypatch.setenv("MONOKERNEL_LIBRARY", str(tmp_path / "none.so"))
    monkeypatch.setattr(native, "PACKAGE", tmp_path)
    (tmp_path / native.BUILD_LOG).write_text("no C++ compiler was found\n")
    assert native._open() == "the native kernel is missing: no C++ compiler was found"
    with pytest.warns(RuntimeWarning, match=r"no C\+\+ compiler was found; on the CPU PyTorch"):
        assert isinstance(native.library.__wrapped__(), str)
    (tmp_path / "none.so").write_text("not a library")
    assert "could not be opened" in str(native._open())
    other = next((Path(torch.__file__).parent / "lib").glob("*c10.*"))
    monkeypatch.setenv("MONOKERNEL_LIBRARY", str(other))
    assert native._open() == "the native kernel is of another version, it has no mk_isa"


def test_no_memory_is_lost_over_many_calls() -> None:
    resource = pytest.importorskip("resource")
    p = problem((6, 64, 64, 1), TABLE[7], 2, "adjoint", Hinge(margin=0.1))
    x, params = torch.randn(2000, 6), parameters(p, torch.float32)
    for _ in range(5):
        run(cpu, p, x, params)
    gc.collect()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(50):
        run(cpu, p, x, params)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20_000  # KiB
