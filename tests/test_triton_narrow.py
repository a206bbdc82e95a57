"""The kernels of narrow chains under Triton's interpreter: what they serve, and against the twin.

Their saved tensors, NaN rule and precision are those of every path; what is theirs alone is here:
tiles of the forward, the walk of the pairs, the sums over both, and blocks of rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from monokernel import fused_mono_penalty
from monokernel.activations import KINDS
from monokernel.backends import handwritten
from monokernel.backends.triton import layered, narrow, path_of, whole
from monokernel.backends.triton.launch import recorded
from monokernel.backends.triton.target import assumed, interpreting
from monokernel.problem import Hinge, Problem
from tests.problems import assert_as_precise_as_pytorch, inputs, problem, run
from tests.strategies import HINGES
from tests.support import assert_same, mlp, points

needs_interpreter = pytest.mark.skipif(not interpreting(), reason="runs under TRITON_INTERPRET=1")


@contextmanager
def blocks(rows: int) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(import_module(f"{narrow.__name__}.backward"), "MOST", rows)
        yield


def assert_agrees(p: Problem, N: int, bias: bool = True, **how: object) -> None:
    x, params = inputs(p, N, bias=bias)
    how.setdefault("needs", [False, *(t is not None for t in params)])
    assert_same(run(narrow, p, x, params, **how), run(handwritten, p, x, params, **how))


@needs_interpreter
@settings(max_examples=40)
@given(
    hidden=st.lists(st.integers(1, 20), min_size=1, max_size=3),
    k=st.integers(1, 5),
    d1=st.integers(0, 9),
    N=st.integers(0, 300),
    hinge=HINGES,
    σ=st.sampled_from(["silu", "relu", "tanh"]),
    bias=st.booleans(),
    cotangents=st.sampled_from([(True, True), (True, True), (True, False), (False, True)]),
    dx=st.booleans(),
)
def test_agrees_with_its_twin(hidden, k, d1, N, hinge, σ, bias, cotangents, dx) -> None:
    p = problem((d1 + k, *hidden, 1), σ, k, "adjoint", hinge)
    task, slopes = cotangents
    needs = [dx, *(bias or i % 2 == 0 for i in range(2 * p.depth))]
    assert_agrees(p, N, bias, needs=needs, task=task, slopes=slopes)


@needs_interpreter
@pytest.mark.parametrize("share", [0.0, 0.05, 0.5, 1.0])
@pytest.mark.parametrize("block", [1 << 18, 200])
def test_any_share_of_active_rows(share: float, block: int) -> None:
    """None, a part of a tile, more than a tile for each program, all; also some rows at a time."""
    p = problem((6, 16, 12, 16, 1), "silu", 2)
    with blocks(block):
        assert_agrees(p, 517, violating=torch.rand(517) < share)


@needs_interpreter
@pytest.mark.parametrize("elementwise", [True, False])
def test_some_rows_at_a_time(elementwise: bool) -> None:
    p = problem((4, 10, 10, 1), "silu", 2, "adjoint", Hinge(margin=0.3, elementwise=elementwise))
    x, params = inputs(p, 130, torch.float32)
    needs = [False] + [True] * 6
    whole_batch = run(narrow, p, x, params, needs=needs)
    with blocks(64):
        assert_same(run(narrow, p, x, params, needs=needs), whole_batch, 1e-5)
    for a, b in zip(whole_batch, run(narrow, p, x, params, needs=needs), strict=True):
        assert torch.equal(a, b)


@needs_interpreter
@pytest.mark.parametrize("kind", KINDS)
def test_every_activation(kind: str) -> None:
    """Also those with which they do not serve, as they spill."""
    assert_agrees(problem((4, 9, 12, 1), kind, 2, "adjoint", Hinge(margin=0.2)), 40)


@needs_interpreter
def test_columns_anywhere_with_weights_and_margins_of_their_own() -> None:
    margins = (0.1, 0.2, 0.3)
    for hinge in (None, Hinge((1, -1, 1), margins, True, True)):
        p = problem((13, 9, 7, 1), "gelu", 3, "adjoint", hinge)._replace(columns=(0, 3, 9))
        for weight in (None, torch.rand(1, 3).double(), torch.rand(150, 1, 3).double()):
            assert_agrees(p, 150, weight=weight if hinge else None)


@needs_interpreter
def test_only_what_is_needed() -> None:
    p = problem((4, 10, 10, 10, 1), "silu", 2, "adjoint", Hinge(margin=0.2))
    for on in range(9):
        assert_agrees(p, 40, needs=[i == on for i in range(9)])
    x, params = inputs(p, 40)
    y, out, saved = narrow.forward(p, x, None, params, False)
    assert saved == []
    assert_same([y, out], run(handwritten, p, x, params)[:2])
    assert narrow.backward(p, y, out, x, params, saved, [False] * 9) == [None] * 9


@needs_interpreter
def test_the_public_call() -> None:
    x1, x2 = points(150, 3, 2)
    found = []
    for backend in ("triton", "reference"):
        torch.manual_seed(0)
        net = mlp(3, 2, 1, (66, 70))
        y, penalty = fused_mono_penalty(
            net, x1, x2, margin=0.2, return_output=True, backend=backend
        )  # fmt: skip
        (y.square().sum() + penalty).backward()
        found.append([y, penalty, *(p.grad for p in net.parameters())])
    assert_same(*found)


@needs_interpreter
def test_strides_are_whatever_they_are() -> None:
    p = problem((4, 10, 11, 1), "silu", 2, "adjoint", Hinge(margin=0.2))
    x, params = inputs(p, 40)
    needs = [False] + [True] * 6
    want = run(narrow, p, x, params, needs=needs)
    params = [q if q is None or q.dim() == 1 else q.t().contiguous().t() for q in params]
    assert_same(run(narrow, p, x.t().contiguous().t(), params, needs=needs), want)


@needs_interpreter
def test_what_is_not_finite_stays_so_beside_padded_units() -> None:
    p = problem((3, 9, 11, 1), "relu", 1, "adjoint", None)
    x, params = inputs(p, 6)
    params = [None if t is None else t.abs() for t in params]
    x = x.abs()
    x[2, 0], x[4, 0] = float("inf"), float("nan")
    y, J, _ = narrow.forward(p, x, None, params, True)
    want, slopes, _ = handwritten.forward(p, x, None, params, False)
    assert y[2].isinf().all()
    torch.testing.assert_close(y, want, rtol=1e-10, atol=0.0, equal_nan=True)
    torch.testing.assert_close(J, slopes, rtol=1e-10, atol=0.0, equal_nan=True)
    penalty = narrow.forward(p._replace(hinge=Hinge(elementwise=True)), x, None, params, True)[1]
    assert penalty.isnan().flatten().tolist() == [i == 4 for i in range(6)]


@needs_interpreter
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_precision(dtype: torch.dtype) -> None:
    p = problem((6, 30, 30, 1), "silu", 3, "adjoint", Hinge(margin=9.0))
    # The interpreter truncates where it stores bfloat16, which devices round.
    assert_as_precise_as_pytorch(narrow, p, 130, dtype, factor=8 if dtype == torch.bfloat16 else 2)


def test_what_is_saved_is_what_layers_save() -> None:
    """So that the backward may go either way."""
    p = problem((5, 9, 8, 1), "silu", 2, "adjoint", Hinge())
    x, _ = inputs(p, 20)
    shapes = [t.shape for t in narrow.saved_like(p, x)]
    assert shapes == [t.shape for t in layered.saved_like(p, x)]


def test_who_is_served() -> None:
    """Of half precision, on Hopper: one linear output, two to four layers, some wider than what one
    kernel's registers hold."""
    x = torch.empty(40, 6, dtype=torch.bfloat16)

    def served(*widths: int, mode: str = "adjoint", way: str = "wgmma", x=x, last="identity"):
        with assumed(way):
            return path_of(problem((x.shape[1], *widths), "silu", 1, mode, last=last), x)

    assert served(65, 65, 65, 1) is served(128, 20, 1) is narrow
    assert served(64, 64, 64, 1) is whole
    assert served(128, 128, 2) is served(128, 128, 1, mode="tangent") is whole
    assert served(128, 1, last="softplus") is served(*[128] * 4, 1) is whole
    assert served(129, 128, 1) is layered
    assert served(128, 128, 1, x=torch.empty(40, 17, dtype=torch.bfloat16)) is whole
    assert (
        path_of(problem((6, 128, 1), "gelu"), x) is path_of(problem((6, 128, 1), k=5), x) is whole
    )
    assert served(128, 128, 1, way="warp") is served(128, 128, 1, way="tcgen05") is whole


@pytest.mark.parametrize("depth", [2, 3, 4])
def test_launches_do_not_depend_on_depth(depth: int) -> None:
    """The network and the sum of the penalty; a count and a list of the pairs, their walk, the
    sums, and their sum."""
    p = problem((5, *(16,) * (depth - 1), 1), "silu", 2, "adjoint", Hinge())
    x, params = inputs(p, 100, torch.float32)
    needs = [False, *(t is not None for t in params)]
    found = []
    for gout in (True, False):
        with recorded() as seen:
            y, out, saved = narrow.forward(p, x, None, params, True)
            narrow.backward(p, y, out if gout else None, x, params, saved, needs)
        found.append([call.kernel.__name__ for call in seen])
    ends = ["narrow_forward", "reduce_sum"], ["narrow_gradients", "reduce_gradients"]
    pairs = ["count_pairs", "list_pairs", "narrow_pairs"]
    assert found == [[*ends[0], *pairs, *ends[1]], [*ends[0], *ends[1]]]
