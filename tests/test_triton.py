"""Every Triton kernel under Triton's interpreter, against the twin in PyTorch."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

pytest.importorskip("triton")

import triton
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder

import monokernel
from monokernel.activations import KINDS, Activation
from monokernel.backends import handwritten
from monokernel.backends import triton as backend
from monokernel.backends.triton import layered, whole
from monokernel.backends.triton.constants import activation_code
from monokernel.backends.triton.device.activations import activation as device_activation
from monokernel.backends.triton.launch import recorded
from monokernel.backends.triton.layered import config as layered_config
from monokernel.backends.triton.slopes import hinge_slopes
from monokernel.backends.triton.target import assumed, interpreting
from monokernel.problem import Hinge, Mode, Problem
from tests.problems import (
    EVERY_KIND,
    assert_as_precise_as_pytorch,
    inputs,
    problem,
    run,
)
from tests.strategies import HINGES
from tests.support import assert_same, gradients, mlp, oracle, points

pytestmark = pytest.mark.skipif(not interpreting(), reason="runs under TRITON_INTERPRET=1")

BOTH = pytest.mark.parametrize("path", [whole, layered], ids=["whole", "layered"])


@triton.jit
def _evaluate(a, value, first, second, N, ACT: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    v, f, s = device_activation(tl.load(a + i, mask=i < N, other=0.0), ACT)
    tl.store(value + i, v, mask=i < N)
    tl.store(first + i, f, mask=i < N)
    tl.store(second + i, s, mask=i < N)


@pytest.mark.parametrize("σ", EVERY_KIND, ids=lambda σ: σ.kind)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("how", [0, 2], ids=["exact", "approximate"])
def test_activations_are_those_of_the_table(σ: Activation, dtype: torch.dtype, how: int) -> None:
    fixed = [0.0, -0.75, 1.125, 1e-4, -1e-4, 30.0, -30.0, 95.0, -95.0, 1e3, -1e3, 6e4, -6e4]
    fixed += [float("nan")]
    a = torch.cat([torch.linspace(-8, 8, 101, dtype=dtype), torch.tensor(fixed, dtype=dtype)])
    got = [torch.empty_like(a) for _ in range(3)]
    _evaluate[(1,)](a, *got, len(a), activation_code(σ, how), 128)
    exact = a.double()
    for ours, truth in zip(got, [σ.value(exact), σ.first(exact), σ.second(exact)], strict=True):
        truth = truth.to(dtype).double()  # which may overflow
        if ours is not got[0]:
            ours, truth = ours[:-1], truth[:-1]  # σ'(NaN): the epilogue's rule speaks for it
        # Derivatives, and the tails of GELU, cancel in PyTorch too: to the order of one there.
        least = 1e-3 if ours is got[0] and "gelu" not in σ.kind else 1.0
        error = (ours.double() - truth).abs() / truth.abs().clamp(min=least)
        assert torch.equal(ours.isnan(), truth.isnan())
        assert error.nan_to_num().max() < (1e-5 if dtype == torch.float32 else 1e-10)


SHAPES = st.tuples(
    st.lists(st.integers(1, 20), min_size=0, max_size=3),
    st.integers(1, 7),  # D
    st.integers(1, 4),  # k
    st.integers(0, 3),  # d1
    st.integers(0, 150),  # N
)


@BOTH
@settings(max_examples=20)
@given(
    shape=SHAPES,
    hinge=HINGES,
    mode=st.sampled_from(["tangent", "adjoint"]),
    σ=st.sampled_from(["silu", "relu", "tanh"]),
    last=st.sampled_from(["identity", "identity", "softplus", "leaky_relu"]),
    bias=st.booleans(),
    cotangents=st.sampled_from([(True, True), (True, True), (True, False), (False, True)]),
)
def test_agrees_with_its_twin(
    path: ModuleType, shape, hinge, mode, σ, last, bias, cotangents
) -> None:
    hidden, D, k, d1, N = shape
    p = problem((d1 + k, *hidden, D), σ, k, mode, hinge, last)
    x, params = inputs(p, N, bias=bias)
    task, slopes = cotangents
    assert_same(
        run(path, p, x, params, task=task, slopes=slopes),
        run(handwritten, p, x, params, task=task, slopes=slopes),
    )


@BOTH
@pytest.mark.parametrize(("mode", "D"), [("tangent", 2), ("adjoint", 2), ("adjoint", 1)])
@pytest.mark.parametrize("columns", [(0, 3), (1, 2, 40)])
def test_columns_anywhere(path: ModuleType, mode: Mode, D: int, columns: tuple[int, ...]) -> None:
    """Also further apart than a tile of inputs; and with a margin of each constraint."""
    k = len(columns)
    margins = tuple(0.1 + 0.05 * i for i in range(D * k))
    p = problem((41, 9, 7, D), "silu", k, mode)._replace(columns=columns)
    x, params = inputs(p, 40)
    weight = torch.rand(40, D, k, dtype=torch.float64)
    for hinge, options in (
        (None, {}),
        (Hinge(margin=margins[:k]), {"task": False}),
        (Hinge((1, -1, 1)[:k], margins, True, True), {"weight": weight}),
    ):
        own = p._replace(hinge=hinge)
        want = run(handwritten, own, x, params, **options)
        assert_same(run(path, own, x, params, **options), want)


@BOTH
@pytest.mark.parametrize("kind", KINDS)
def test_every_activation(path: ModuleType, kind: str) -> None:
    for mode, last in (("adjoint", "identity"), ("tangent", kind)):
        p = problem((4, 12, 9, 2), kind, 2, mode, Hinge(), last)
        x, params = inputs(p, 70)
        assert_same(run(path, p, x, params), run(handwritten, p, x, params))


@BOTH
@pytest.mark.parametrize("share", [0.0, 0.05, 0.5, 1.0])
@pytest.mark.parametrize("task", [True, False])
def test_active_rows(path: ModuleType, share: float, task: bool) -> None:
    """Any share of active rows: none, a part of a tile, more than a tile, all."""
    p = problem((6, 16, 16, 1), "silu", 2, "adjoint", None)
    x, params = inputs(p, 517)
    violating = torch.rand(517) < share
    assert_same(
        run(path, p, x, params, task=task, violating=violating),
        run(handwritten, p, x, params, task=task, violating=violating),
    )


@BOTH
def test_direction_and_weight(path: ModuleType) -> None:
    direction = (1, 0, -1, -1, 1, 0)
    for elementwise in (True, False):
        p = problem((5, 11, 3), "gelu", 2, "tangent", Hinge(direction, 0.1, True, elementwise))
        x, params = inputs(p, 33)
        for weight in (torch.rand(3, 2).double(), torch.rand(33, 3, 2).double()):
            want = run(handwritten, p, x, params, weight)
            assert_same(run(path, p, x, params, weight), want)


@BOTH
def test_only_what_is_needed(path: ModuleType) -> None:
    p = problem((4, 10, 10, 2), "silu", 2, "adjoint", Hinge())
    x, params = inputs(p, 40)
    for on in range(7):
        needs = [i == on for i in range(7)]
        got = run(path, p, x, params, needs=needs)
        assert_same(got, run(handwritten, p, x, params, needs=needs))
    y, out, saved = path.forward(p, x, None, params, False)
    assert saved == []
    assert_same([y, out], run(handwritten, p, x, params)[:2])


@pytest.mark.parametrize("mode", ["tangent", "adjoint"])
@pytest.mark.parametrize("σ", ["silu", "relu"])
@pytest.mark.parametrize("elementwise", [True, False])
@pytest.mark.parametrize("task", [True, False])
def test_pairs_of_a_block_of_rows_at_once(
    mode: Mode, σ: str, elementwise: bool, task: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where there is no room for those of all rows: the last block is shorter, and one has no
    active pair."""
    p = problem((5, 12, 9, 3), σ, 2, mode, Hinge(margin=0.2, elementwise=elementwise), "softplus")
    x, params = inputs(p, 300)
    violating = torch.arange(300) < 200 if elementwise else None
    monkeypatch.setattr(layered_config, "ROOM", 64)
    with recorded() as launched:
        run(layered, p, x, params, task=task)
    lists = [call for call in launched if call.kernel.fn.__name__ == "list_pairs"]
    assert len(lists) == (2 if mode == "tangent" else 3)
    for needs in (None, [False] * 3 + [True] * 4, [True] + [False] * 6):
        asked: dict[str, Any] = {"task": task, "violating": violating, "needs": needs}
        got = run(layered, p, x, params, **asked)
        assert_same(got, run(handwritten, p, x, params, **asked))


@pytest.mark.parametrize("mode", ["tangent", "adjoint"])
@pytest.mark.parametrize("way", ["wgmma", "tcgen05", "warp", "wave"])
@pytest.mark.parametrize("width", [20, 40, 70])
def test_every_way_to_multiply(way: str, mode, width: int) -> None:
    """In registers, by way of memory, and in steps: what each kind of device runs."""
    p = problem((6, width, width, 2), "silu", 2, mode, Hinge(margin=0.2))
    with assumed(way):
        assert_as_precise_as_pytorch(whole, p, 100, torch.float16)


@pytest.mark.parametrize(("way", "D", "task"), [("wgmma", 1, True), ("wave", 2, False)])
def test_rows_and_pairs_in_parts(way: str, D: int, task: bool) -> None:
    """Layer by layer: more than one slice of the rows, and of the pairs."""
    p = problem((5, 12, 12, D), "silu", 1, "adjoint", None)
    x, params = inputs(p, 1100 // D)
    with assumed(way, 40), recorded() as launched:
        run(layered, p, x, params, task=task)
    parts = {call.kernel.fn.__name__: call.programs for call in launched}
    assert parts["pairs_weight"][2] > 1
    assert not task or parts["layer_back"][0] > 1
    with assumed(way, 40):
        got = run(layered, p, x, params, task=task)
    assert_same(got, run(handwritten, p, x, params, task=task))


@pytest.mark.parametrize("mode", ["tangent", "adjoint"])
def test_three_products_for_one(mode, monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter multiplies exactly: this runs the steps, a device shows the precision."""
    monkeypatch.setenv("MONOKERNEL_FP32", "tf32x3")
    p = problem((6, 40, 40, 2), "silu", 2, mode, Hinge(margin=0.2))
    x, params = inputs(p, 100, torch.float32)
    assert_same(run(whole, p, x, params), run(handwritten, p, x, params), 1e-5)


@BOTH
def test_wide_input_and_many_columns(path: ModuleType) -> None:
    p = problem((70, 8, 1), "softplus", 68, "adjoint", Hinge())
    x, params = inputs(p, 20)
    assert_same(run(path, p, x, params), run(handwritten, p, x, params))


@BOTH
def test_strides(path: ModuleType) -> None:
    p = problem((4, 10, 2), "silu", 2, "tangent", Hinge())
    x, params = inputs(p, 40)
    want = run(handwritten, p, x, params)
    x = x.t().contiguous().t()
    params = [q if q is None or q.dim() == 1 else q.t().contiguous().t() for q in params]
    assert_same(run(path, p, x, params), want)
    one = x[:1].expand(40, -1)
    assert_same(run(path, p, one, params), run(handwritten, p, one.contiguous(), params))


@BOTH
def test_nan_stays_nan(path: ModuleType) -> None:
    p = problem((3, 8, 2), "relu", 1, "tangent", Hinge(elementwise=True))
    x, params = inputs(p, 9)
    x[4, 0] = float("nan")
    y, penalty, _ = path.forward(p, x, None, params, True)
    for t in (y, penalty):
        assert t[4].isnan().all()
        assert not t[:4].isnan().any()
    p = problem((3, 8, 2), "relu", 1, "tangent", Hinge((0,), margin=1.0))
    assert path.forward(p, x, None, params, False)[1] == 0


@BOTH
@pytest.mark.parametrize("mode", ["tangent", "adjoint"])
def test_a_nan_of_output_or_slope_is_a_nan_of_the_penalty(path: ModuleType, mode: Mode) -> None:
    odd = [float("inf"), float("-inf"), float("nan"), 1e300, -1e300, 1e160]
    met = 0
    for seed, kind in enumerate(("relu", "silu", "gelu", "elu", "tanh", "hardtanh")):
        torch.manual_seed(seed)
        p = problem((4, 6, 5, 2), kind, 2, mode, Hinge(margin=0.1, elementwise=True))
        x, params = inputs(p, 20)
        for t in [x] if seed % 2 else params:
            assert t is not None
            t.view(-1)[torch.randint(t.numel(), (1,))] = odd[seed]
        y, J, _ = path.forward(p._replace(hinge=None), x, None, params, False)
        penalty = path.forward(p, x, None, params, False)[1]
        assert J[y.isnan()].isnan().all()
        assert torch.equal(penalty.isnan(), J.isnan())
        met += int(J.isnan().any())
    assert met >= 2


@BOTH
@pytest.mark.parametrize("mode", ["tangent", "adjoint"])
def test_an_infinite_unit_is_what_it_is_in_pytorch(path: ModuleType, mode: Mode) -> None:
    """Also beside padded units, whose weights are zero: inf·0 would be a NaN everywhere."""
    p = problem((3, 9, 11, 2), "relu", 1, mode, None)
    x, params = inputs(p, 6)
    params = [None if t is None else t.abs() for t in params]
    x[2, 0] = float("inf")
    y, J, _ = path.forward(p, x.abs(), None, params, False)
    assert y[2].isinf().all()
    want, slopes, _ = handwritten.forward(p, x.abs(), None, params, False)
    torch.testing.assert_close(y, want, rtol=1e-10, atol=0.0)
    assert_same([J], [slopes])


@BOTH
@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize("odd", [float("inf"), float("nan")])
def test_what_violates_nothing_is_zero_whatever_its_weight(
    path: ModuleType, squared: bool, odd: float
) -> None:
    p = problem((4, 8, 2), "silu", 2, "adjoint", Hinge(squared=squared, elementwise=True))
    x, params = inputs(p, 30)
    _, plain, saved = path.forward(p, x, None, params, True)
    holds = plain == 0
    assert holds.any()
    assert not holds.all()
    weight = torch.where(holds, odd, 1.0).double()
    _, weighted, _ = path.forward(p, x, weight, params, True)
    assert torch.equal(weighted, plain)
    needs = [True] * 5
    want = path.backward(p, None, torch.ones_like(plain), x, params, saved, needs)
    assert_same(path.backward(p, None, weight, x, params, saved, needs), want)


@BOTH
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("mode", ["tangent", "adjoint"])
def test_precision(path: ModuleType, dtype: torch.dtype, mode) -> None:
    D, k = (1, 3) if mode == "adjoint" else (3, 1)
    p = problem((6, 30, 30, D), "silu", k, mode, Hinge(margin=9.0))
    # The interpreter truncates where it stores bfloat16, which devices round.
    factor = 8 if path is layered and dtype == torch.bfloat16 else 2
    assert_as_precise_as_pytorch(path, p, 130, dtype, factor=factor)


@BOTH
def test_two_runs_give_the_same_bits(path: ModuleType) -> None:
    p = problem((6, 20, 20, 2), "silu", 2, "adjoint", Hinge())
    x, params = inputs(p, 300, torch.float32)
    for a, b in zip(run(path, p, x, params), run(path, p, x, params), strict=True):
        assert torch.equal(a, b)


def test_saved_and_gradients_share_no_memory() -> None:
    for path, mode in ((whole, "adjoint"), (layered, "adjoint"), (layered, "tangent")):
        p = problem((5, 9, 8, 1), "silu", 2, mode, Hinge(), "softplus")
        x, params = inputs(p, 20)
        y, out, saved = path.forward(p, x, None, params, True)
        grads = path.backward(
            p, torch.ones_like(y), torch.ones_like(out), x, params, saved, [True] * 7
        )
        tensors = [t for t in [x, y, out, *params, *saved, *grads] if t is not None]
        places = {t.untyped_storage().data_ptr() for t in tensors}
        assert len(places) == len(tensors)
        assert [s.shape for s in saved] == [s.shape for s in path.saved_like(p, x)]


def _launches(p: Problem, N: int) -> tuple[int, int]:
    x, params = inputs(p, N, torch.float32)
    with recorded() as up:
        y, out, saved = whole.forward(p, x, None, params, True)
    needs = [True] * (1 + len(params))
    with recorded() as down:
        whole.backward(p, torch.ones_like(y), torch.ones_like(out), x, params, saved, needs)
    return len(up), len(down)


@pytest.mark.parametrize("mode", ["tangent", "adjoint"])
@pytest.mark.parametrize("depth", [1, 2, 4])
def test_launches_do_not_depend_on_depth(mode, depth: int) -> None:
    """A summed penalty: two forward (network, sum), two backward (network, sum of gradients)."""
    p = problem((5, *(16,) * (depth - 1), 2), "silu", 2, mode, Hinge())
    assert _launches(p, 100) == (2, 2)
    p = problem((5, *(16,) * (depth - 1), 2), "silu", 2, mode, None)
    assert _launches(p, 100) == (1, 2)


@BOTH
@pytest.mark.parametrize("margin", [0.1, 1.0, float("inf")])
def test_the_margin_in_full_precision(path: ModuleType, margin: float) -> None:
    p = problem((5, 9, 2), "silu", 2, "tangent", Hinge(margin=margin, elementwise=True))
    x, params = inputs(p, 40)
    got, want = (b.forward(p, x, None, params, False)[1] for b in (path, handwritten))
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_slopes_far_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """The columns of a large J lie further apart than 32 bits count. No memory is read here."""
    apart, J = 2**30, torch.zeros(1)
    seen: set[int] = set()

    def on_load(self: Any, at: Any, mask: Any, other: Any, *rest: Any) -> Any:
        seen.update((at.data[mask.data].astype("int64") - J.data_ptr()).tolist())
        return other

    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", on_load)
    hinge_slopes[(1,)](
        J, J, None, None, 0, 0.0, None, torch.empty(3), None, None, 1, 1, 1, apart,
        D=1, K=3, OUT=0, SQUARED=False, SAVE=False, BM=16, BE=16, A=tl.float32,
    )  # fmt: skip
    assert {0, 4 * apart, 8 * apart} <= seen


def test_narrow_networks_are_one_kernel_and_wide_ones_are_not() -> None:
    x = torch.empty(8, 6)
    assert whole.refuses(problem((6, 64, 64, 1)), x) is None
    assert "wider than 64" in str(whole.refuses(problem((6, 65, 1)), x))
    assert whole.refuses(problem((6, 128, 1)), x.half()) is None
    assert "wider than 128" in str(whole.refuses(problem((6, 129, 1)), x.half()))
    assert "9 layers" in str(whole.refuses(problem((6, *(8,) * 8, 1)), x))
    assert "k = 129" in str(whole.refuses(problem((129, 8, 1), k=129), x[:, :1].expand(8, 129)))
    for p in (problem((6, 65, 1)), problem((6, *(8,) * 8, 1))):
        assert backend.refuses(p, x) is None
        x_, params = inputs(p, 8)
        assert_same(run(backend, p, x_, params), run(handwritten, p, x_, params))


def test_refuses_what_it_cannot_serve() -> None:
    p = problem((3, 8, 1))
    assert "complex64" in str(backend.refuses(p, torch.empty(2, 3, dtype=torch.complex64)))


def test_the_public_call() -> None:
    net, (x1, x2) = mlp(3, 2, 2), points(70, 3, 2)
    x1.requires_grad_()
    x2.requires_grad_()
    y, penalty = monokernel.fused_mono_penalty(net, x1, x2, return_output=True, backend="triton")
    got = gradients(y.square().sum() + penalty, x1, x2, *net.parameters())
    y_, J = oracle(net, x1, x2)
    want = gradients(y_.square().sum() + torch.relu(-J).sum(), x1, x2, *net.parameters())
    assert_same([y, *got], [y_, *want])


def test_autocast() -> None:
    net = mlp(3, 1, 1, activation=nn.SiLU(), dtype=torch.float32)
    x1, x2 = points(40, 3, 1, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        penalty = monokernel.fused_mono_penalty(net, x1, x2, margin=5.0, backend="triton")
    assert penalty.dtype == torch.float32
    penalty.backward()
    truth = monokernel.fused_mono_penalty(net, x1, x2, margin=5.0, backend="reference")
    assert (penalty - truth).abs() < 0.02 * truth
    for q in net.parameters():
        assert q.grad is None or q.grad.dtype == torch.float32


def _loaded_by(statement: str) -> list[str]:
    code = f"{statement}; import sys; print([m for m in sys.modules if m == 'triton'])"
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    found: list[str] = eval(out.stdout)
    return found


def test_importing_the_package_does_not_import_triton() -> None:
    assert _loaded_by("import torch") == _loaded_by("import monokernel")


def test_off_the_gpu_it_says_so() -> None:
    code = (
        "import os; os.environ.pop('TRITON_INTERPRET', None)\n"
        "import torch\n"
        "from monokernel.backends import triton\n"
        "from tests.problems import problem\n"
        "print(triton.refuses(problem((3, 8, 1)), torch.empty(2, 3)))"
    )
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert "x is on the cpu" in out.stdout


def test_autotuning_keeps_the_quickest() -> None:
    from monokernel.backends.triton import tuning

    ran: list[int] = []
    clock = iter([3.0, 1.0, 2.0])

    def seconds(call: Callable[[], object]) -> float:
        call()
        return next(clock)

    for _ in range(2):  # the second time without a run
        assert tuning.choose("a call", [10, 20, 30], ran.append, seconds) == 20
    assert ran == [10, 20, 30]
    assert not tuning.enabled(torch.device("cpu"))
