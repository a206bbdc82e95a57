"""The native CPU kernel: the library of ``csrc/`` (``native.py``) behind the four functions of a
backend, and what ``monotone.py`` and ``certify.py`` have of it.

It computes in float32 or float64. Of a network in half precision it reads operands converted to
float32, and y and the gradients are rounded once, to the network's dtype, on the way out.

Where ``csrc/boundary.cpp`` was built for this PyTorch, eager steps go through its one operator
instead (``step``), autograd included, which saves small steps 30 µs. ``docs/native.md`` has the
measurements behind these choices.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from ctypes import c_double, c_int64, c_void_p
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from ..activations import ACTIVATIONS, Activation
from ..enclosures import Slopes
from ..problem import Problem
from ..program import Node
from ..ranges import THIRD, described
from . import Prepare, Step, native, operators
from .native import NativeProblem, check, codes_of, isa, missing, required

if TYPE_CHECKING:
    from ..layers import Layers

__all__ = [
    "Piecewise",
    "Search",
    "activation",
    "backward",
    "boundary",
    "chain_slopes",
    "forward",
    "isa",
    "lift",
    "missing",
    "refuses",
    "saved_like",
    "step",
    "switch",
]

Params = Sequence[Tensor | None]

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def refuses(problem: Problem, x: Tensor) -> str | None:
    """Why the kernel cannot serve the problem on tensors like x, or None."""
    if x.device.type != "cpu":
        return f"it serves CPU tensors, got {x.device}"
    if x.dtype not in _DTYPES:
        came = str(x.dtype).removeprefix("torch.")
        return f"it serves float32, float64, bfloat16 and float16, got {came}"
    if problem.cast is not None:
        return "it casts no operands, it takes all of them as they are"
    library = native.library()
    if isinstance(library, str):
        return library
    unknown = {node.kind for node in problem.nodes} - codes_of(library).keys()
    return f"it does not know {', '.join(sorted(unknown))}" if unknown else None


def saved_like(problem: Problem, x: Tensor) -> list[Tensor]:
    """One uninitialised buffer, flat: values, cotangents P and ∂penalty/∂J."""
    own = _native(problem, x.dtype)
    return [x.new_empty(x.shape[0] * own.row_size, dtype=own.dtype)] if own.row_size else []


def forward(
    problem: Problem, x: Tensor, weight: Tensor | None, params: Params, save: bool
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """y (N, D), the penalty (or J where there is no hinge), and what the backward needs."""
    own = _native(problem, x.dtype)
    N, dtype = x.shape[0], x.dtype
    x, params = own.operand(x), own.operands(params)
    y = x.new_empty(N, problem.D)
    out = x.new_empty(() if own.summed else (N, problem.D, problem.k))
    saved = own.buffers(x) if save else []
    weight = None if weight is None else weight.contiguous()
    status = own.library.mk_forward(
        own.handle,
        N,
        torch.get_num_threads(),
        x.data_ptr(),
        None if weight is None else weight.data_ptr(),
        weight is not None and weight.dim() == 3,
        own.pointers(params),
        own.sizes(params),
        y.data_ptr(),
        out.data_ptr(),
        own.places(saved, N) if save else None,
    )
    check(status)
    return y.to(dtype), out, saved


def backward(
    problem: Problem,
    gy: Tensor | None,
    gout: Tensor | None,
    x: Tensor,
    params: Params,
    saved: Sequence[Tensor],
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """The gradients of x and of every parameter, None where ``needs`` is false."""
    own = _native(problem, x.dtype)
    if any(needs[1 + place] for place in own.keys):
        raise RuntimeError("mlp: expected a dropout that is drawn, got one to be trained")
    dtype = x.dtype
    x, params = own.operand(x), own.operands(params)
    saved = [t.contiguous() for t in saved]
    grads: list[Tensor | None] = [
        torch.empty_like(t) if need and t is not None else None
        for t, need in zip((x, *params), needs, strict=True)
    ]
    gy = None if gy is None else own.operand(gy)
    gout = None if gout is None else gout.contiguous()
    status = own.library.mk_backward(
        own.handle,
        x.shape[0],
        torch.get_num_threads(),
        x.data_ptr(),
        own.pointers(params),
        own.sizes(params),
        None if gy is None else gy.data_ptr(),
        None if gout is None else gout.data_ptr(),
        own.places(saved, x.shape[0]),
        None if grads[0] is None else grads[0].data_ptr(),
        own.pointers(grads[1:]),
    )
    check(status)
    return [None if g is None else g.to(dtype) for g in grads]


@lru_cache(maxsize=1024)
def _native(problem: Problem, dtype: torch.dtype) -> NativeProblem:
    return NativeProblem(required(), problem, dtype)


def step() -> Prepare | None:
    """What prepares y and the penalty or J by one operator that autograd knows, if there is one for
    this PyTorch (and MONOKERNEL_BOUNDARY is not 0). ``boundary.py`` asks once."""
    connected = _operators()
    if connected is None:
        return None
    operator: Any = connected.cpu_step.default

    def prepare(problem: Problem, dtype: torch.dtype) -> Step:
        own = _native(problem, dtype)  # which lasts as long as what is prepared
        return lambda x, weight, params: operator(own.handle, x, weight, params)

    return prepare


def _operators() -> Any:
    """The operators in C++, or None where they were not built or not wanted."""
    opened = operators.opened()
    return None if opened is None else _connected(opened)


@cache
def _connected(opened: ctypes.CDLL) -> Any:
    """The operators, which are told of the library once."""
    library = native.library()
    if isinstance(library, str):
        return None
    opened.mk_connect(operators.addresses_of([getattr(library, f"mk_{name}") for name in CALLS]))
    return torch.ops.monokernel


# What the operators call, in the order of their ``Kernel``.
CALLS = (
    *("node_names", "problem_shape", "problem_keep", "problem_drop"),
    *("take", "give_back", "forward", "backward", "lift", "lift_backward"),
)


# A program's rows and parameters → y (N, D) with the linear term and the bound (D, k).
ByPyTorch = Callable[[Tensor, Params], tuple[Tensor, Tensor]]


class Lift:
    """A program and the linear term that ``monotone.py`` adds to it, by one operator that autograd
    knows. Second derivatives are those of ``by_pytorch``."""

    def __init__(self, own: NativeProblem, operator: Any, by_pytorch: ByPyTorch | None) -> None:
        self._native, self._operator, self.by_pytorch = own, operator, by_pytorch
        _lifts[own.handle] = self

    def __call__(self, x: Tensor, params: Params) -> tuple[Tensor, Tensor]:
        """y (N, D) with the linear term for x (N, d), and the bound (D, k)."""
        found: tuple[Tensor, Tensor] = self._operator(self._native.handle, x, None, params)
        return found


# By the handle of its problem.
_lifts: WeakValueDictionary[int, Lift] = WeakValueDictionary()


def _lift_by_pytorch(problem: int, x: Tensor, params: Params) -> tuple[Tensor, Tensor]:
    """What the operator calls for gradients that have gradients."""
    lift = _lifts.get(problem)
    if lift is None or lift.by_pytorch is None:
        raise RuntimeError(
            "Monotone: a second derivative was asked for when the model was gone, expected it to "
            "be there"
        )
    return lift.by_pytorch(x, params)


_fragment = torch.library.Library("monokernel", "FRAGMENT")
_fragment.define("lift_by_pytorch(int problem, Tensor x, Tensor?[] params) -> (Tensor, Tensor)")
_fragment.impl("lift_by_pytorch", _lift_by_pytorch, "CompositeImplicitAutograd")


def lift(
    d: int,
    nodes: tuple[Node, ...],
    dtype: torch.dtype,
    boxes: Sequence[tuple[Sequence[float], Sequence[float]]],
    columns: Sequence[int],
    direction: Sequence[Sequence[int]],
    middle: Sequence[float],
    margin: float,
    by_pytorch: ByPyTorch | None = None,
) -> Lift | None:
    """For a program over x (N, d) and operands of a dtype; None where there is no operator or the
    library has no rule for one of the nodes.

    Args:
        boxes: (lower, upper) of each, d numbers.
        columns: the k columns of x in which slopes are bounded.
        direction: for each output its k signs.
        middle: for each of the columns, where the linear term is 0.
        margin: what the term makes of every slope, at least.
        by_pytorch: the same in PyTorch's operations, for derivatives of any order.
    """
    connected, library = _operators(), native.library()
    if connected is None or isinstance(library, str):
        return None
    own = NativeProblem(library, Problem(d, nodes, (), "tangent", None), dtype)
    ends = [end for side in zip(*boxes, strict=True) for row in side for end in row]
    signs = [sign for row in direction for sign in row]
    curves = [
        number
        for node in nodes
        if node.kind in ACTIVATIONS
        for number in described(Activation(node.kind, *node.numbers))
    ]
    serves = library.mk_problem_box(
        own.handle,
        len(boxes),
        len(columns),
        (c_double * len(ends))(*ends),
        (c_int64 * len(columns))(*columns),
        (c_double * len(signs))(*signs),
        (c_double * len(middle))(*middle),
        margin,
        (c_double * len(curves))(*curves),
    )
    return Lift(own, connected.cpu_step.default, by_pytorch) if serves else None


class _Layer(ctypes.Structure):
    """mk_layer of ``csrc/c_api.h``."""

    _fields_ = (
        ("width", c_int64),
        ("out", c_int64),
        ("kind", c_int64),
        ("numbers", c_double * 3),
        ("third", c_double),
        ("fourth", c_double),
        ("curves", c_void_p),
        ("W", c_void_p),
        ("b", c_void_p),
    )


def chain_slopes(
    layers: Layers,
    c: Tensor,
    r: Tensor,
    moving: Tensor,
    output: int,
    columns: Tensor,
    wanted: Tensor | None = None,
) -> Slopes:
    """``quadratic.slopes`` by the library, in the thread that calls."""
    library = required()
    codes = codes_of(library)
    held = list[Any]()  # what the library is given the places of
    chain = (_Layer * len(layers.W))()
    for to, W, b, σ in zip(chain, layers.W, layers.b, layers.σ, strict=True):
        curves = None
        if σ.kind != "identity":
            numbers = described(σ, 3)
            curves = (c_double * len(numbers))(*numbers)
        W, b = W.contiguous(), b.contiguous()
        held += (W, b, curves)
        to.out, to.width = W.shape
        to.kind, to.numbers = codes[σ.kind], (σ.p, σ.q, σ.r)
        to.third, to.fourth = THIRD.get(σ.kind, (0.0, 0.0))
        to.curves = None if curves is None else ctypes.addressof(curves)
        to.W, to.b = W.data_ptr(), b.data_ptr()
    c, r = c.contiguous(), r.contiguous()
    moving, columns = moving.contiguous(), columns.contiguous()
    wanted = None if wanted is None else wanted.contiguous()
    found = Slopes.unknown(c, len(columns))
    status = library.mk_chain_slopes(
        len(chain),
        chain,
        layers.folded,
        len(c),
        c.data_ptr(),
        r.data_ptr(),
        len(moving),
        moving.data_ptr(),
        output,
        len(columns),
        columns.data_ptr(),
        None if wanted is None else wanted.data_ptr(),
        (c_void_p * len(found))(*(t.data_ptr() for t in found)),
    )
    check(status)
    return found


POINTS = 8  # of one run of a search, at most


class _Piecewise(ctypes.Structure):
    """mk_piecewise of ``csrc/c_api.h``."""

    _fields_ = (
        ("d", c_int64),
        ("layers", c_int64),
        ("folded", c_int64),
        ("widths", c_void_p),
        ("W", c_void_p),
        ("b", c_void_p),
        ("left", c_void_p),
    )


class Run(NamedTuple):
    """``points`` (n, d) between the kinks where the slope may be below the margin, how many
    branches were bounded, were proved and are open, and a bound of the slope wherever below."""

    points: Tensor
    bounded: int
    proved: int
    open: int
    least: float


class Search:
    """Looks for points of a box where a slope is below a margin, as ``csrc/switches.cpp`` does."""

    def __init__(self, library: ctypes.CDLL, memory: int | None, chain: Piecewise) -> None:
        if not memory:
            check(1)
        self._library, self._memory, self._chain = library, memory, chain

    def __del__(self) -> None:
        if getattr(self, "_memory", None):
            self._library.mk_search_drop(self._memory)

    def split(self) -> Search | None:
        """Another, with half of the open branches; None where there are too few."""
        memory = self._library.mk_search_split(self._memory)
        return Search(self._library, memory, self._chain) if memory else None

    def run(self, most: int, seconds: float) -> Run:
        """Bounds at most so many more branches, and takes little longer than so many seconds."""
        points = torch.empty(POINTS, self._chain.d, dtype=torch.float64)
        tally, least = (c_int64 * 4)(), c_double()
        check(
            self._library.mk_search_run(
                self._memory, most, seconds, points.data_ptr(), tally, ctypes.byref(least)
            )
        )
        bounded, proved, open_, found = tally
        return Run(points[:found], bounded, proved, open_, least.value)


class Piecewise:
    """A chain of ReLUs or LeakyReLUs as the library knows it: W_l and b_l of its hidden layers on
    the CPU in float64, their slopes left of 0, and how many roundings made each weight."""

    def __init__(
        self, W: Sequence[Tensor], b: Sequence[Tensor], left: Sequence[float], folded: int
    ) -> None:
        library = required()
        self._library, self.d, L = library, W[0].shape[1], len(W)
        tensors = [t.contiguous() for t in (*W, *b)]
        places = (c_void_p * L)(*[t.data_ptr() for t in tensors[:L]])
        beside = (c_void_p * L)(*[t.data_ptr() for t in tensors[L:]])
        widths, slopes = (c_int64 * L)(*map(len, W)), (c_double * L)(*left)
        arrays: tuple[ctypes.Array[Any], ...] = (widths, places, beside, slopes)
        starts = [ctypes.addressof(array) for array in arrays]
        self._chain = _Piecewise(self.d, L, folded, *starts)
        self._kept = tensors, arrays

    def search(
        self,
        row: Tensor,
        column: Tensor,
        margin: float,
        centre: Tensor,
        radius: Tensor,
        moving: Sequence[int],
    ) -> Search:
        """Of the slope that ``row`` (H_L,) of the last layer and ``column`` (H_1,) of the first
        make, in the box centre ± radius (d,) with an extent in the columns ``moving``."""
        row, column, centre, radius = (t.contiguous() for t in (row, column, centre, radius))
        memory = self._library.mk_search_new(
            ctypes.byref(self._chain),
            row.data_ptr(),
            column.data_ptr(),
            margin,
            centre.data_ptr(),
            radius.data_ptr(),
            len(moving),
            (c_int64 * len(moving))(*moving),
        )
        return Search(self._library, memory, self)


def activation(σ: Activation, a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """σ(a), σ'(a), σ''(a) as the kernel computes them, for the test that holds the tables equal."""
    library = required()
    a = a.contiguous()
    out = torch.empty_like(a), torch.empty_like(a), torch.empty_like(a)
    library.mk_activation(
        a.dtype == torch.float64,
        codes_of(library)[σ.kind],
        (c_double * 3)(σ.p, σ.q, σ.r),
        a.numel(),
        a.data_ptr(),
        *(t.data_ptr() for t in out),
    )
    return out


def switch(stacks: bool = True, compacts: bool = True) -> None:
    """Turns ideas of the kernel off, for ``benchmarks/ablation.py``; results stay right."""
    library = required()
    library.mk_switch(stacks, compacts)


def boundary() -> str:
    """Whether eager steps on the CPU go through the operator of ``csrc/boundary.cpp``, in words."""
    return "none without the native kernel" if missing() else operators.in_words()
