"""What the host does in a call of the Triton kernels: it launches, and waits for nothing.

A copy between the host and the device, or a value read from it, would stop the queue of kernels,
and the capture of a CUDA graph refuses it. Tensors here lie on the meta device, which has no values
to read, and kernels are written down in place of running.
"""

from __future__ import annotations

import weakref
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

pytest.importorskip("triton")

import monokernel
from monokernel import fused_mono_penalty, signs
from monokernel.backends.triton import launch, layered, programs, tuning, whole
from monokernel.backends.triton.launch import Launch, recorded
from monokernel.backends.triton.target import interpreting
from monokernel.backends.triton.whole import config
from monokernel.columns import last_columns
from monokernel.problem import Hinge, Mode, Problem
from monokernel.signs import direction_table, shared_direction_table
from tests.problems import inputs, problem
from tests.support import mlp, points
from tests.test_programs import CASES, operands
from tests.zoo import network

BOTH = pytest.mark.parametrize("path", [whole, layered], ids=["whole", "layered"])
MODES = pytest.mark.parametrize("mode", ["tangent", "adjoint"])
MIXED = (1, 0, -1, -1, 1, 0)
CPU, META = torch.device("cpu"), torch.device("meta")

Launches = list[Launch]


# What makes a tensor of the host's numbers, or reads a tensor to the host.
WAITING = {"tensor", "as_tensor", "asarray", "from_numpy", "cpu", "numpy", "tolist", "item"}
WAITING |= {"nonzero", "masked_select", "unique", "__bool__", "__int__", "__float__", "__index__"}


class Host(TorchFunctionMode):
    """Writes down what would wait for the device, or for the host."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.__name__ in WAITING:
            self.waits.append(func.__name__)
        out = func(*args, **(kwargs or {}))
        devices = {t.device for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor)}
        if len(devices) > 1:
            self.waits.append(f"{func.__name__} from one device to the other")
        return out


@BOTH
@MODES
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "hinge",
    [None, Hinge(), Hinge(MIXED, 0.1, True, True)],
    ids=["jacobian", "sum", "none"],
)
def test_kernels_wait_for_nothing(
    path: ModuleType, mode: Mode, hinge: Hinge | None, bias: bool
) -> None:
    p = problem((5, 11, 11, 3), "gelu", 2, mode, hinge, "softplus")
    x, params = inputs(p, 33, torch.float16, bias=bias)
    x, params = x.to(META), [None if t is None else t.to(META) for t in params]
    weight = torch.empty(33, 3, 2, device=META)

    def step() -> Launches:
        with recorded() as seen:
            y, out, saved = path.forward(p, x, weight, params, True)
            needs = [True, *(t is not None for t in params)]
            path.backward(p, y, out, x, params, saved, needs)
        return seen

    step()
    with Host() as host:
        seen = step()
    assert host.waits == []
    handed_over = [t for _, _, args, _ in seen for t in tree_leaves(args) if isinstance(t, Tensor)]
    assert len(handed_over) > 10
    assert {t.device for t in handed_over} == {META}


@MODES
@pytest.mark.parametrize("cotangents", ["both", "slopes"])
@pytest.mark.parametrize("name", CASES)
def test_programs_wait_for_nothing(name: str, mode: Mode, cotangents: str) -> None:
    """Of whatever number of rows: what is launched is the same. (One row is all of them.)"""
    d, nodes = CASES[name]
    p = Problem(d, nodes, last_columns(d, min(d, 2)), mode, Hinge(elementwise=True))
    keys = {place for node in nodes if node.kind == "dropout" for place in node.params}
    seen: dict[int, Launches] = {}
    for N in (33, 2):
        x, params = operands(d, nodes, N, single=name == "one number for two widths")
        x, params = x.to(META), [None if t is None else t.to(META) for t in params]

        def step() -> Launches:
            with recorded() as found:
                y, out, saved = programs.forward(p, x, None, params, True)  # noqa: B023
                gy = y if cotangents == "both" else None
                needs = [True, *(i not in keys for i in range(len(params)))]  # noqa: B023
                programs.backward(p, gy, out, x, params, saved, needs)  # noqa: B023
            return found

        step()
        with Host() as host:
            seen[N] = step()
        assert host.waits == []
    kernels = [[(kernel, options) for kernel, _, _, options in found] for found in seen.values()]
    assert kernels[0] == kernels[1]
    assert len(kernels[0]) > 2


@pytest.mark.skipif(not interpreting(), reason="runs under TRITON_INTERPRET=1")
@pytest.mark.parametrize("hidden", [(9, 7), (90, 70)], ids=["whole", "layered"])
def test_the_public_calls_wait_for_nothing(hidden: tuple[int, ...]) -> None:
    net = mlp(3, 2, 3, hidden, dtype=torch.float32)
    x1, x2 = points(20, 3, 2, torch.float32)

    def step() -> None:
        y, penalty = monokernel.fused_mono_penalty(
            net, x1, x2, direction=[1, -1], weight=0.3, return_output=True, backend="triton"
        )
        (y.sum() + penalty).backward()
        y, J = monokernel.value_and_jacobian(net, x1, x2, backend="triton")
        (y.sum() + J.sum()).backward()

    with recorded() as seen:
        step()
        with Host() as host:
            step()
    assert host.waits == []
    assert len(seen) > 10


def test_a_wait_would_be_seen() -> None:
    with Host() as host:
        two = torch.tensor([1.0, 2.0])
        two.tolist()
        two.nonzero()
        assert two[0]
        two.to(META)
    seen = ["tensor", "tolist", "nonzero", "__bool__", "to from one device to the other"]
    assert host.waits == seen
    with pytest.raises((RuntimeError, NotImplementedError)):
        torch.ones((), device=META).item()


# --- the table of directions ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("direction", "want"),
    [
        ((-1,), [[-1, -1], [-1, -1], [-1, -1]]),
        ((1, 0), [[1, 0], [1, 0], [1, 0]]),
        ((1, 1), [[1, 1], [1, 1], [1, 1]]),
        (MIXED, [[1, 0], [-1, -1], [1, 0]]),
    ],
)
def test_direction_table(direction: tuple[int, ...], want: list[list[int]]) -> None:
    for make in (direction_table, shared_direction_table):
        table = make(direction, 3, 2, torch.float64, CPU)
        assert table.tolist() == want
        assert table.is_contiguous()
    with Host() as host:
        direction_table(direction, 3, 2, torch.float64, META)
    assert host.waits == []


def test_a_shared_table_is_never_dropped() -> None:
    """A captured graph keeps its address."""
    first = shared_direction_table((1, 0, 1), 1, 3, torch.float32, CPU)
    for D in range(1, 400):
        shared_direction_table((1, 0, 1), D, 3, torch.float32, CPU)
    assert shared_direction_table((1, 0, 1), 1, 3, torch.float32, CPU) is first


def test_a_table_made_in_a_capture_is_the_graphs_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signs, "capturing", lambda device: True)
    asked = (0, 1, 1, 0), 2, 2, torch.float32, CPU
    own = shared_direction_table(*asked)
    assert shared_direction_table(*asked) is not own
    with Host() as host:
        shared_direction_table((0, 1, 1, 0), 2, 2, torch.float32, META)
    assert host.waits == []
    monkeypatch.setattr(signs, "capturing", lambda device: False)
    shared = shared_direction_table(*asked)
    assert shared is not own
    monkeypatch.setattr(signs, "capturing", lambda device: True)
    assert shared_direction_table(*asked) is shared


def test_no_mode_of_the_caller_reaches_a_shared_table() -> None:
    with FakeTensorMode():
        table = shared_direction_table((1, -1), 7, 2, torch.float32, CPU)
    assert type(table) is Tensor
    with torch.inference_mode():
        table = shared_direction_table((1, -1), 8, 2, torch.float32, CPU)
    assert not table.is_inference()


def test_one_kernel_takes_no_strict_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does a backward of a forward without them: three TF32 products stand for one."""
    monkeypatch.setattr(config, "interpreting", lambda: False)
    monkeypatch.delenv("MONOKERNEL_FP32", raising=False)
    p = problem((4, 16, 16, 1), "silu", 1, "tangent", Hinge())
    x, params = inputs(p, 50, torch.float32)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        assert whole.refuses(p, x) is None
        with recorded() as forward:
            y, out, saved = whole.forward(p, x, None, params, True)
        torch.set_float32_matmul_precision("highest")
        assert "strict float32" in str(whole.refuses(p, x))
        with recorded() as backward:
            whole.backward(p, y, out, x, params, saved, [False, *(t is not None for t in params)])
    finally:
        torch.set_float32_matmul_precision(before)
    assert forward[0].options["PRECISION"] == "tf32"
    assert backward[0].options["PRECISION"] == "tf32x3"


# --- what a step costs ---------------------------------------------------------------------------


def pair_products(launched: Launches, width: int) -> int:
    """Products of hidden layers over the active pairs: in each launch with as many columns on both
    sides, one for each operand that is there."""
    operands = {"pairs_product": ["left"], "pairs_weight": ["p", "q"]}
    found = 0
    for kernel, _, args, options in launched:
        name = kernel.fn.__name__
        if name in operands and options["INPUTS"] == options["OUTPUTS"] == width:
            given = dict(zip(kernel.arg_names, args, strict=False))
            found += sum(given[operand] is not None for operand in operands[name])
    return found


@pytest.mark.parametrize("path", [layered, programs], ids=["layered", "programs"])
@pytest.mark.parametrize(
    ("D", "k", "mode", "task", "products"),
    [
        (1, 4, "adjoint", True, 3),  # tangent, its weight gradient, and the curvature's way down
        (8, 1, "tangent", True, 3),  # the seed's instead
        (1, 4, "adjoint", False, 4),  # no g that takes the curvature's weight gradient
        (8, 1, "tangent", False, 5),  # and a chain more
    ],
)
def test_products_over_the_active_pairs(
    path: ModuleType, D: int, k: int, mode: Mode, task: bool, products: int
) -> None:
    """For each hidden layer, as in the cost table: the ranges of T are in the number of pairs."""
    hidden = 3
    p = problem((9, *(20,) * hidden, D), "silu", k, mode, Hinge())
    x, params = inputs(p, 50, torch.float32)
    with recorded():
        y, out, saved = path.forward(p, x, None, params, True)
    with recorded() as seen:
        needs = [False, *(t is not None for t in params)]
        path.backward(p, y if task else None, out, x, params, saved, needs)
    assert pair_products(seen, 20) == products * (hidden - 1)


@MODES
def test_layer_by_layer_takes_fewer_launches_than_node_by_node(mode: Mode) -> None:
    """Why chains have a path of their own; docs/triton.md has the numbers."""
    found = []
    for path in (layered, programs):
        D, k = (1, 4) if mode == "adjoint" else (8, 1)
        p = problem((9, 20, 20, 20, D), "silu", k, mode, Hinge())
        x, params = inputs(p, 50, torch.float32)
        with recorded() as up:
            y, out, saved = path.forward(p, x, None, params, True)
        with recorded() as down:
            path.backward(p, y, out, x, params, saved, [False, *(t is not None for t in params)])
        found.append((len(up), len(down)))
    assert found == ([(6, 19), (8, 26)] if mode == "adjoint" else [(5, 20), (5, 30)])


LAUNCHES = {
    "PReLU": (6, 20),
    "pre-norm LayerNorm": (14, 50),
    "SwiGLU": (16, 62),
    "tabular ResNet": (16, 44),
    "DCN-v2": (17, 38),
    "highway": (26, 69),
    "mixture of experts": (28, 82),
}


@pytest.mark.parametrize("name", LAUNCHES)
def test_the_launches_of_ordinary_networks(name: str) -> None:
    """As docs/triton.md has them: y and a penalty of one output, the parameters' gradients."""
    net, (x1, x2) = network(name, 4, 1, 12, torch.float32, seed=7), points(64, 3, 1, torch.float32)
    with recorded() as up:
        y, penalty = fused_mono_penalty(net, x1, x2, return_output=True, backend="triton")
    with recorded() as down:
        (y.sum() + penalty).backward()
    assert (len(up), len(down)) == LAUNCHES[name]


class Peak(TorchDispatchMode):
    """The most bytes that tensors made meanwhile held at once."""

    def __init__(self) -> None:
        super().__init__()
        self.held = self.most = 0
        self.known: dict[int, int] = {}

    def _drop(self, storage: int) -> None:
        self.held -= self.known.pop(storage)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, Tensor) and (storage := t.untyped_storage())._cdata not in self.known:
                own = storage._cdata
                self.known[own] = storage.nbytes()
                weakref.finalize(storage, self._drop, own)
                self.held += storage.nbytes()
                self.most = max(self.most, self.held)
        return out


class Forgotten(list[Launch]):
    """Of launches: kept, they would hold their tensors."""

    def append(self, _: Launch) -> None:
        pass


def backward_bytes(D: int, k: int, mode: Mode, rows: int, width: int) -> tuple[int, int]:
    """What a backward layer by layer holds at the most beside what it is given, and what the
    hidden layers' values take."""
    p = problem((9, *(width,) * 3, D), "silu", k, mode, Hinge())
    x, params = inputs(p, 1, torch.bfloat16)
    x, params = (
        x.to(META).expand(rows, -1).contiguous(),
        [t if t is None else t.to(META) for t in params],
    )
    with mock.patch.object(launch, "_records", [Forgotten()]):
        y, out, saved = layered.forward(p, x, None, params, True)
        with Peak() as peak:
            layered.backward(p, y, out, x, params, saved, [False, *(t is not None for t in params)])
    return peak.most, 3 * rows * width * x.element_size()


@MODES
def test_the_memory_of_a_backward_does_not_follow_the_number_of_pairs(mode: Mode) -> None:
    """docs/triton.md has the numbers at 65,536 x 1024."""
    one, values = backward_bytes(8, 1, "tangent", 65_536, 1024)
    for D, k in ((8, 8), (16, 9)):
        several, _ = backward_bytes(D, k, mode, 65_536, 1024)
        assert several < 1.1 * one
    assert one < 5 * values


# --- what is compiled -----------------------------------------------------------------------------


@BOTH
@MODES
def test_a_margin_that_moves_is_not_tuned_again(
    path: ModuleType, mode: Mode, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuned: list[Any] = []

    def choose(key: Any, candidates: list[Any], run: Any) -> Any:
        tuned.append(key)
        return candidates[0]

    monkeypatch.setattr(tuning, "enabled", lambda device: True)
    monkeypatch.setattr(tuning, "choose", choose)
    for margin in (0.3, 0.4):
        p = problem((5, 9, 2), "silu", 2, mode, Hinge(margin=margin))
        x, params = inputs(p, 40)
        with recorded():
            y, out, saved = path.forward(p, x, None, params, True)
            path.backward(p, y, out, x, params, saved, [True] * 5)
    assert len(tuned) == 2 * len(set(tuned)) > 0


@BOTH
@MODES
def test_a_margin_that_moves_compiles_nothing_again(path: ModuleType, mode: Mode) -> None:
    def launched(margin: float) -> tuple[list[tuple[Any, dict[str, object]]], list[object]]:
        p = problem((5, 9, 2), "silu", 2, mode, Hinge(margin=margin))
        x, params = inputs(p, 40)
        with recorded() as seen:
            path.forward(p, x, None, params, True)
        numbers = [a for _, _, args, _ in seen for a in args if isinstance(a, (int, float))]
        return [(kernel, options) for kernel, _, _, options in seen], numbers

    compiled, numbers = launched(0.3)
    for margin in (0.0, 1.0):  # integers equal to 1 would be compile-time constants
        again, others = launched(margin)
        assert again == compiled
        assert [type(n) for n in others] == [type(n) for n in numbers]
        assert [n for n in numbers if isinstance(n, float)] == [0.3]
        assert [n for n in others if isinstance(n, float)] == [margin]
