"""The path of programs: any network of nodes that is no chain of layers.

The walk is that of ``handwritten.py``, over all rows: linear nodes are products of PyTorch's
(cuBLAS), with one launch for each node between them (``light.py``). The active pairs are listed on
the device (``pairs.py``), and what runs for them alone takes their number from there: products are
Triton's (``layer.py``), light nodes the same kernels as for all rows.

Two chains come down for the pairs. Their seeds p, unless the P of all rows is kept, which they then
take theirs from; and the curvatures q, where g is not at hand to take them: with the kept P it is
gy∘P and its q is the pairs', and without a gradient of y there is nothing else. Otherwise each
curvature joins g in its rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ...activations import ACTIVATIONS, Activation
from ...nodes import RULES, columns_of
from ...problem import Problem, accumulate_dtype
from ...program import Node
from ..handwritten import (
    _blocks,
    _Down,
    _Facts,
    _facts_of,
    _parameters,
    _Step,
    _way_down,
    saved_like,
)
from . import light
from .config import LIGHT_TILE, WIDEST_ROW
from .launch import accumulator, activation_code, launch, processors
from .layer import pairs_down, pairs_up, pairs_weight
from .layered import Active, hinged, list_active, product_config, product_options, product_tile
from .pairs import gather_inputs

__all__ = ["backward", "forward", "refuses", "saved_like"]

Params = Sequence[Tensor | None]
X2 = -1  # the number of the last k columns of x, where they have cotangents of their own
IDENTITY = (0, 0.0, 0.0, 0.0)

BY_ROW = {
    "normalise": light.NORMALISE.value,
    "root_mean_square": light.ROOT_MEAN_SQUARE.value,
    "softmax": light.SOFTMAX.value,
    "log_softmax": light.LOG_SOFTMAX.value,
}
OF_VALUE = ("softmax", "log_softmax")  # their Jacobian is known from v
SERVED = frozenset(RULES)


def refuses(problem: Problem, x: Tensor) -> str | None:
    """Why this path cannot serve, or None."""
    unknown = {node.kind for node in problem.nodes} - SERVED
    if unknown:
        return f"the kernels do not know {', '.join(sorted(unknown))}"
    for node, width in _rows_held(problem):
        if width > WIDEST_ROW:
            return f"a {node.kind} is {width} wide; the kernels hold rows of up to {WIDEST_ROW}"
    return None


def _rows_held(problem: Problem) -> Iterator[tuple[Node, int]]:
    """Nodes that hold a row in registers, and how wide it is."""
    widths = problem.d, *[node.width for node in problem.nodes]
    for node in problem.nodes:
        if node.kind in BY_ROW or node.kind in ("total", "expand"):
            yield node, max(node.width, widths[node.inputs[0]])


# --- operands and launches -----------------------------------------------------------------------
#
# A stack (T, n, H) has T parts of n rows; (T, H) is one row of each part, the same for all n. The
# number of dimensions says which, since n may be 1.


class OfRows(NamedTuple):
    """A stack of all rows, of which the pairs take theirs."""

    t: Tensor


Operand = Tensor | OfRows


def _tensor(operand: Operand | None) -> Tensor | None:
    return operand.t if isinstance(operand, OfRows) else operand


def _one_row(operand: Operand | None) -> bool:
    t = _tensor(operand)
    return t is None or t.dim() == 2


def _layout(operand: Operand | None, pairs: bool) -> tuple[int, int, int]:
    """As ``light.py`` has it."""
    t = _tensor(operand)
    if t is None:
        return 0, 0, 0
    if t.dim() == 2:
        return t.stride(0), t.stride(1), light.ONE_ROW.value
    how = light.GATHERED if pairs and isinstance(operand, OfRows) else light.OWN_ROW
    return t.stride(1), t.stride(2), how.value


def _power_of_two(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


class Factor(NamedTuple):
    """The factor of an element-wise node (see ``light.py``)."""

    kind: int = light.ONE.value
    u: Operand | None = None
    F: Operand | None = None
    act: tuple[int, float, float, float] = IDENTITY

    @property
    def one_row(self) -> bool:
        return _one_row(self.u) and _one_row(self.F)


ONE = Factor()


@dataclass(frozen=True)
class On:
    """What a chain runs over: ``count`` rows, or as many pairs at most."""

    x: Tensor
    count: int
    active: Active | None = None

    def new(self, T: int, H: int, one_row: bool = False) -> Tensor:
        return self.x.new_empty(T, H) if one_row else self.x.new_empty(T, self.count, H)

    def _rows(self) -> tuple[Tensor | None, Tensor | None]:
        return (None, None) if self.active is None else (self.active.rows, self.active.total)

    def combine(
        self,
        out: Tensor | None,
        P: Operand | None,
        *,
        c: float = 1.0,
        base: Operand | None = None,
        c_base: float = 1.0,
        constant: float = 0.0,
        factor: Factor | None = None,
        value: Tensor | None = None,
        bent: tuple[Operand, Tensor] | None = None,
    ) -> None:
        """out = constant + c_base·base + c·factor ∘ P; of a factor σ' also value = σ(u), and σ'' ∘
        what is ``bent`` is added."""
        to = out if out is not None else value
        assert to is not None
        factor, pairs = factor or Factor(), self.active is not None
        p, s = bent or (None, None)
        H, N = to.shape[-1], 1 if to.dim() == 2 else self.count
        BN = min(64, _power_of_two(H))
        BM = LIGHT_TILE // BN
        if not to.numel():
            return
        launch(
            light.combine, (-(-N // BM), -(-H // BN)), self.x,
            out, _tensor(P), _tensor(base), _tensor(factor.u), _tensor(factor.F), value,
            _tensor(p), s, *self._rows(), float(constant), float(c), float(c_base), N,
            FACTOR=factor.kind, ACT=factor.act, H=H, T=1 if out is None else out.shape[0],
            O=_layout(out, pairs), P_=_layout(P, pairs), B=_layout(base, pairs),
            U=_layout(factor.u, pairs), F_=_layout(factor.F, pairs), V=_layout(value, pairs),
            BENT=_layout(p, pairs), S=_layout(s, pairs),
            BM=BM, BN=BN, A=accumulator(self.x.dtype),
        )  # fmt: skip

    def by_row(
        self,
        out: Tensor,
        P: Operand,
        kind: int,
        does: int = light.VALUE.value,
        *,
        u: Operand | None = None,
        s: Operand | None = None,
        base: Operand | None = None,
        scale: Operand | None = None,
        shift: Operand | None = None,
        plain: Tensor | None = None,
        epsilon: float = 0.0,
    ) -> None:
        """out = base + what a node of that kind does to P, scaled and shifted."""
        t, pairs = _tensor(P), self.active is not None
        assert t is not None
        H, N = t.shape[-1], 1 if out.dim() == 2 else self.count
        BN = _power_of_two(H)
        BM = max(1, LIGHT_TILE // BN)
        if not out.numel():
            return
        launch(
            light.by_row, (-(-N // BM),), self.x,
            out, t, _tensor(base), _tensor(u), _tensor(s), _tensor(scale), _tensor(shift), plain,
            *self._rows(), float(epsilon), N,
            KIND=kind, DOES=does, H=H, T=out.shape[0],
            O=_layout(out, pairs), P_=_layout(P, pairs), B=_layout(base, pairs),
            U=_layout(u, pairs), S=_layout(s, pairs), SCALE=_layout(scale, pairs),
            SHIFT=_layout(shift, pairs), V=_layout(plain, pairs),
            BM=BM, BN=BN, A=accumulator(self.x.dtype),
            num_warps=min(16, max(4, BN // 512)),
        )  # fmt: skip

    def sums(self, P: Operand, factor: Factor | None = None) -> Tensor:
        """factor ∘ P summed over rows: (programs, H), to be added up."""
        t, pairs = _tensor(P), self.active is not None
        assert t is not None
        factor, H = factor or Factor(), t.shape[-1]
        BN = min(64, _power_of_two(H))
        BM = LIGHT_TILE // BN
        programs = min(-(-self.count // BM), 4 * processors(self.x.device))
        sums = self.x.new_empty(programs, H, dtype=accumulate_dtype(self.x.dtype))
        launch(
            light.column_sums, (programs, -(-H // BN)), self.x,
            sums, t, _tensor(factor.u), _tensor(factor.F), *self._rows(), self.count,
            FACTOR=factor.kind, H=H, P_=_layout(P, pairs), U=_layout(factor.u, pairs),
            F_=_layout(factor.F, pairs), BM=BM, BN=BN, A=accumulator(self.x.dtype),
        )  # fmt: skip
        return sums

    def dense(self, t: Tensor) -> Tensor:
        """The pairs' t (1, M, H) as a product wants it."""
        if t.is_contiguous():
            return t
        out = self.new(1, t.shape[-1])
        self.combine(out, t)
        return out


def _times(F: Operand) -> Factor:
    return Factor(light.TIMES.value, F=F)


def _slope(node: Node, u: Operand) -> Factor:
    return Factor(light.SLOPE.value, u, act=_act(node))


def _act(node: Node) -> tuple[int, float, float, float]:
    return activation_code(Activation(node.kind, *node.numbers))


def _flat(t: Tensor) -> Tensor:
    """The rows of a stack one below the other."""
    return t.reshape(-1, t.shape[-1])


def _row(θ: Tensor, H: int) -> Tensor:
    """A parameter of H columns, or one number, as a row."""
    return θ.expand(H).unsqueeze(0)


def _given(t: Any) -> Any:
    assert t is not None
    return t


def _weight(θ: Params) -> Tensor:
    W: Tensor = _given(θ[0])
    return W


# --- the nodes -----------------------------------------------------------------------------------


class At(NamedTuple):
    """A light node with what it reads. A norm may have the scale after it in what it pulls."""

    node: Node
    u: list[Operand]
    v: Operand
    θ: Params
    scale: Operand | None = None

    @property
    def parameter(self) -> Operand:
        """Of a scale, shift or PReLU; the mask of a dropout, with one for each row."""
        θ: Tensor = _given(self.θ[0])
        return _row(θ, self.node.width) if θ.dim() == 1 else OfRows(θ.unsqueeze(0))

    def factor(self, i: int) -> tuple[Factor, float]:
        """How an element-wise node's input i enters its tangent: a factor and a number."""
        kind, numbers = self.node.kind, self.node.numbers
        if kind in ("scale", "dropout"):
            return _times(self.parameter), 1.0
        if kind == "prelu":
            return Factor(light.KINK.value, self.u[0], self.parameter), 1.0
        if kind == "product":
            return _times(self.u[1 - i]), 1.0
        if kind == "line":
            return ONE, numbers[0]
        if kind == "sum":
            return ONE, numbers[i]
        if kind in ACTIVATIONS and kind != "identity":
            return _slope(self.node, self.u[0]), 1.0
        return ONE, 1.0  # shift, identity

    @property
    def epsilon(self) -> float:
        return self.node.numbers[0] if self.node.numbers else 0.0

    @property
    def point(self) -> Operand:
        """Where a node that looks at whole rows has its Jacobian."""
        return self.v if self.node.kind in OF_VALUE else self.u[0]


def _value(on: On, at: At) -> Tensor:
    """v; a view of its input where that is all it is."""
    node, H = at.node, at.node.width
    kind, u = node.kind, [_given(_tensor(t)) for t in at.u]
    if kind in BY_ROW or kind == "total":
        out = on.new(1, H)
        on.by_row(out, u[0], BY_ROW.get(kind, light.SUM.value), epsilon=at.epsilon)
    elif kind in ("columns", "expand", "concat", "identity", "sum"):
        return _linear_push(on, at, u)
    else:
        out = on.new(1, H)
        if kind in ACTIVATIONS:
            on.combine(None, None, factor=_slope(node, u[0]), value=out)
        elif kind == "shift":
            on.combine(out, u[0], base=at.parameter)
        else:
            factor, c = at.factor(0)
            on.combine(out, u[0], c=c, constant=node.numbers[1] if kind == "line" else 0.0,
                       factor=factor)  # fmt: skip
    return out


def _push(on: On, at: At, u_dot: Sequence[Tensor | None]) -> Tensor:
    """The tangent of v; None stands for no tangent."""
    node = at.node
    if node.kind in BY_ROW:
        t: Tensor = _given(u_dot[0])
        out = on.new(t.shape[0], node.width)
        on.by_row(out, t, BY_ROW[node.kind], light.PUSH.value, u=at.point, epsilon=at.epsilon)
        return out
    return _linear_push(on, at, u_dot)


def _linear_push(on: On, at: At, u_dot: Sequence[Tensor | None]) -> Tensor:
    """What an element-wise node, or one that moves columns, makes of tangents; of the values too
    where it does the same with them."""
    node, kind, H = at.node, at.node.kind, at.node.width
    moving = [(i, t) for i, t in enumerate(u_dot) if t is not None]
    first, T = moving[0][1], moving[0][1].shape[0]
    if kind == "columns":
        return first[..., columns_of(node)]
    if kind == "expand":
        return first.expand(*first.shape[:-1], H)
    if kind == "total":
        out = on.new(T, 1, first.dim() == 2)
        on.by_row(out, first, light.SUM.value)
        return out
    if kind == "concat":
        out, start = on.new(T, H, all(t.dim() == 2 for _, t in moving)), 0
        for u, t in zip(at.u, u_dot, strict=True):
            width = _given(_tensor(u)).shape[-1]
            part = out[..., start : start + width]
            if t is None:
                part.zero_()
            else:
                on.combine(part, t)
            start += width
        return out
    found: Tensor | None = None
    c_found, own = 1.0, False
    for i, t in moving:
        factor, c = at.factor(i)
        if found is None and factor.kind == ONE.kind:
            found, c_found = t, c  # joins the next term, or is all
            continue
        one_row = t.dim() == 2 and factor.one_row and _one_row(found)
        if found is not None and own and found.dim() == (2 if one_row else 3):
            out = found
        else:
            out = on.new(T, H, one_row)
        on.combine(out, t, c=c, base=found, c_base=c_found, factor=factor)
        found, c_found, own = out, 1.0, True
    assert found is not None
    if c_found == 1:
        return found
    out = on.new(T, H, found.dim() == 2)
    on.combine(out, found, c=c_found)
    return out


class _Chain:
    """A cotangent of each value, summed over the nodes that read it.

    A sum is written in place only where its memory is known to be no one else's.
    """

    def __init__(
        self, on: On, parted: dict[int, tuple[slice, ...]], products: _Products | None = None
    ) -> None:
        self.on, self.parted, self.products = on, parted, products
        self.of: dict[int, Tensor] = {}
        self.own = set[int]()
        # Of a value that is nothing but its parts, those that have no sum yet.
        self.missing: dict[int, list[slice]] = {}

    def pop(self, v: int) -> Tensor | None:
        self._complete(v)
        return self.of.pop(v, None)

    def _complete(self, v: int) -> None:
        for columns in self.missing.pop(v, ()):
            self.of[v][..., columns].zero_()

    def _target(self, v: int, T: int, H: int, one_row: bool) -> tuple[Tensor, Tensor | None]:
        """Where the next sum of v goes, and what it begins with."""
        held = self.of.get(v)
        if held is not None and v in self.own and held.dim() == (2 if one_row else 3):
            return held, held
        out = self.of[v] = self.on.new(T, H, one_row)
        self.own.add(v)
        return out, held

    def add(
        self,
        v: int,
        P: Operand,
        c: float = 1.0,
        factor: Factor = ONE,
        bent: tuple[Operand, Tensor] | None = None,
    ) -> None:
        """Adds c·factor ∘ P, and what is bent, or takes P itself where that is all."""
        held = self.of.get(v)
        if held is None and factor.kind == ONE.kind and c == 1 and not isinstance(P, OfRows):
            self.of[v] = P
            return
        t: Tensor = _given(_tensor(P))
        # What the pairs take from a row is theirs.
        one_row = t.dim() == 2 and factor.one_row and _one_row(held) and self.products is None
        out, base = self._target(v, t.shape[0], t.shape[-1], one_row)
        self.on.combine(out, P, c=c, base=base, factor=factor, bent=bent)

    def add_by_row(self, v: int, P: Operand, kind: int, does: int, H: int, **more: Any) -> None:
        t = _given(_tensor(P))
        held = self.of.get(v)
        one_row = t.dim() == 2 and _one_row(more.get("u")) and _one_row(held)
        one_row = one_row and self.products is None
        out, base = self._target(v, t.shape[0], H, one_row)
        self.on.by_row(out, P, kind, does, base=base, **more)

    def add_product(self, v: int, P: Tensor, W: Tensor) -> None:
        """Adds P W."""
        held = self.of.get(v)
        mine = held is not None and v in self.own and held.dim() == P.dim()
        if self.products is not None:
            out = self.products.down(P, W, held if mine else None)
        elif mine:
            _flat(_given(held)).addmm_(_flat(P), W)
            return
        else:
            out = torch.mm(_flat(P), W).view(*P.shape[:-1], W.shape[1])
        if mine:
            return
        if held is None:
            self.of[v] = out
            self.own.add(v)
        else:
            self.add(v, out)

    def add_pulled(self, at: At, P: Tensor, i: int) -> None:
        """Adds what a light node pulls down of P to its input i."""
        node, kind, v = at.node, at.node.kind, at.node.inputs[i]
        width = _given(_tensor(at.u[i])).shape[-1]
        if kind in BY_ROW:
            does = light.PULL.value
            more = {"u": at.point, "scale": at.scale, "epsilon": at.epsilon}
            self.add_by_row(v, P, BY_ROW[kind], does, width, **more)
        elif kind == "expand":
            self.add_by_row(v, P, light.SUM.value, light.VALUE.value, 1)
        elif kind == "total":
            self.add(v, P.expand(*P.shape[:-1], width))
        elif kind == "concat":
            start = sum(_given(_tensor(u)).shape[-1] for u in at.u[:i])
            self.add(v, P[..., start : start + width])
        elif kind == "columns":
            self._add_columns(v, P, columns_of(node), width)
        else:
            factor, c = at.factor(i)
            self.add(v, P, c, factor)

    def _add_columns(self, v: int, P: Tensor, columns: slice, width: int) -> None:
        """Adds P to those columns. The parts of a chunk go to where they belong: the pull of each
        by itself is mostly 0."""
        held = self.of.get(v)
        if held is None and v in self.parted:
            held, _ = self._target(v, P.shape[0], width, P.dim() == 2)
            self.missing[v] = list(self.parted[v])
        missing = self.missing.get(v, [])
        if held is not None and columns in missing and held.dim() == P.dim():
            missing.remove(columns)
            self.on.combine(held[..., columns], P)
            return
        self._complete(v)
        if held is None or v not in self.own or held.dim() < P.dim():
            out, base = self._target(v, P.shape[0], width, P.dim() == 2 and _one_row(held))
            if base is None:
                out.zero_()
            else:
                self.on.combine(out, base)
        part = self.of[v][..., columns]
        self.on.combine(part, P, base=part)


@lru_cache(maxsize=1024)
def _parted(widths: tuple[int, ...], steps: tuple[_Step, ...]) -> dict[int, tuple[slice, ...]]:
    """The values that are read in columns alone, each column once: the chunks of a gate."""
    found: dict[int, list[slice] | None] = {}
    for _, node, *_ in steps:
        for u in node.inputs:
            parts = found.setdefault(u, [])
            if node.kind != "columns" or parts is None:
                found[u] = None
            else:
                parts.append(columns_of(node))
    return {
        u: tuple(parts)
        for u, parts in found.items()
        if parts
        and sorted(c for part in parts for c in range(widths[u])[part]) == [*range(widths[u])]
    }


def _bend(
    at: At, u_dot: Sequence[Tensor | None], P: Operand, i: int
) -> tuple[Operand, Factor] | None:
    """The curvature of an element-wise node in its input i, as a factor of an operand."""
    kind = at.node.kind
    if kind == "product":
        t = u_dot[1 - i]
        return None if t is None else (P, _times(t))
    t = _given(u_dot[0])
    return P, Factor(light.CURVATURE.value, at.u[0], t, _act(at.node))


class _Affine(NamedTuple):
    """A norm, the scale and the shift that it alone has after it: one launch for all of them."""

    norm: _Step
    scale: _Step
    shift: _Step | None

    @property
    def last(self) -> _Step:
        return self.shift or self.scale

    def row(self, θ: dict[int, Params]) -> Tensor:
        """The scale."""
        return _row(_given(θ[self.scale.v][0]), self.scale.node.width)

    def run(self, on: On, at: At, out: Tensor, P: Operand, does: int, θ: dict[int, Params],
            plain: Tensor | None = None) -> None:  # fmt: skip
        """Value or tangent (of P) in ``out``, that of the norm itself in ``plain``."""
        H = self.norm.node.width
        shift = None
        if self.shift is not None and does == light.VALUE.value:
            shift = _row(_given(θ[self.shift.v][0]), H)
        on.by_row(
            out, P, BY_ROW[self.norm.node.kind], does,
            u=None if does == light.VALUE.value else at.u[0],
            scale=self.row(θ), shift=shift, plain=plain, epsilon=at.epsilon,
        )  # fmt: skip


@lru_cache(maxsize=1024)
def _affine(steps: tuple[_Step, ...]) -> dict[int, _Affine]:
    """By the number of its last value."""
    readers: dict[int, list[_Step]] = {}
    for step in steps:
        for u in step.node.inputs:
            readers.setdefault(u, []).append(step)

    def only(step: _Step | None, kind: str) -> _Step | None:
        after = [] if step is None else readers.get(step.v, [])
        return after[0] if len(after) == 1 and after[0].node.kind == kind else None

    found: dict[int, _Affine] = {}
    for norm in steps:
        if norm.node.kind in ("normalise", "root_mean_square"):
            scale = only(norm, "scale")
            if scale is not None:
                one = _Affine(norm, scale, only(scale, "shift"))
                found[one.last.v] = one
    return found


class _Up(NamedTuple):
    """A step of the forward: a node, or a norm with what follows it."""

    step: _Step  # that makes the value
    affine: _Affine | None
    spent: tuple[int, ...]


@lru_cache(maxsize=1024)
def _ups(steps: tuple[_Step, ...]) -> tuple[_Up, ...]:
    affine, last = _affine(steps), dict[int, int]()
    within = {s.v for a in affine.values() for s in (a.norm, a.scale) if s is not a.last}
    found: list[_Up] = []
    for step in steps:
        if step.v in within:
            continue
        of = affine.get(step.v)
        for u in (of.norm if of else step).node.inputs:
            last[u] = len(found)
        found.append(_Up(step, of, ()))
    spent: list[list[int]] = [[] for _ in found]
    for u, i in last.items():
        spent[i].append(u)
    return tuple([up._replace(spent=tuple(us)) for up, us in zip(found, spent, strict=True)])


# --- forward ------------------------------------------------------------------------------------


def forward(
    problem: Problem, x: Tensor, weight: Tensor | None, params: Params, save: bool
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """y (N, D), the penalty or J, and the saved tensors (none unless ``save``)."""
    N, D, k, facts = x.shape[0], problem.D, problem.k, _facts_of(problem)
    saved = saved_like(problem, x) if save else []
    y = x.new_empty(N, D)
    if N == 0:
        wide = accumulate_dtype(x.dtype)
        summed = problem.hinge is not None and not problem.hinge.elementwise
        return y, x.new_zeros((), dtype=wide) if summed else x.new_empty(N, D, k, dtype=wide), saved
    x, params = x.contiguous(), _contiguous(params)
    J: Tensor | None = None
    for rows in _blocks(problem, facts, x):
        ascent = _Ascent(problem, facts, x[rows], _parameters(facts, params, rows, x))
        buffers = {v: t[rows] for v, t in zip(facts.saved, saved, strict=False)}
        ascent.run(buffers, y[rows])
        if problem.mode == "tangent":
            slopes = ascent.tangent_slopes()
        else:
            rest = zip(facts.pulled, saved[len(facts.saved) :], strict=False)
            kept = save and problem.keeps_adjoint
            slopes = ascent.adjoint_slopes(
                facts.kept if kept else facts.moving, {v: t[rows] for v, t in rest}
            )
        if rows.stop - rows.start == N:
            J = slopes
        else:
            J = x.new_empty(N, D, k) if J is None else J
            J[rows] = slopes
    assert J is not None
    return y, hinged(problem, J, y, weight, saved), saved


def _contiguous(params: Params) -> list[Tensor | None]:
    return [None if t is None else t.contiguous() for t in params]


class _Ascent:
    """One block of rows on its way up, and down again for its slopes in adjoint mode."""

    def __init__(self, problem: Problem, facts: _Facts, x: Tensor, θ: dict[int, Params]) -> None:
        self.facts, self.θ, self.k, self.D = facts, θ, problem.k, problem.D
        self.tangent = problem.mode == "tangent"
        self.on = On(x, x.shape[0])
        self.values: dict[int, Tensor] = {0: x.unsqueeze(0)}
        self.dots: dict[int, Tensor] = {}  # (k, n, H), or (k, H) where it is the same in all rows

    def at(self, step: _Step) -> At:
        of = OfRows
        u: list[Operand] = [of(self.values[i]) for i in step.node.inputs]
        v = self.values.get(step.v)
        return At(step.node, u, u[0] if v is None else of(v), self.θ[step.v])

    def run(self, buffers: dict[int, Tensor], y: Tensor) -> None:
        """The values, those of linear nodes in ``buffers`` if given, the outputs in y; in tangent
        mode the tangents beside them."""
        last = self.facts.steps[-1].v
        for step, affine, spent in _ups(self.facts.steps):
            v, node, _, linear, _ = step
            beside = self.tangent and self.facts.moving[v]
            if affine is not None:
                at = self.at(affine.norm)
                value = self.values[v] = self.on.new(1, node.width)
                affine.run(self.on, at, value, at.u[0], light.VALUE.value, self.θ)
                if beside:
                    t: Tensor = _given(self._dots_of(at.node)[0])
                    dot = self.dots[v] = self.on.new(t.shape[0], node.width)
                    affine.run(self.on, at, dot, t, light.PUSH.value, self.θ)
            elif linear:
                to = y if v == last else buffers.get(v)
                self.values[v] = _linear(self.values[node.inputs[0]], self.θ[v], to)
                if beside:
                    self.dots[v] = self._linear_dots(node, self.θ[v])
            elif beside and node.kind in ACTIVATIONS and node.kind != "identity":
                self._activation(step)
            else:
                self.values[v] = _value(self.on, self.at(step))
                if beside:
                    self.dots[v] = _push(self.on, self.at(step), self._dots_of(node))
            for u in spent:
                if self.tangent or not self.facts.read[u]:
                    del self.values[u]
                self.dots.pop(u, None)
        if not self.facts.steps[-1].linear:
            y.copy_(self.values[last][0])

    def _activation(self, step: _Step) -> None:
        """σ and σ'∘u̇ in one pass over u."""
        at, (t,) = self.at(step), self._dots_of(step.node)
        value, out = self.on.new(1, step.node.width), self.on.new(self.k, step.node.width)
        self.on.combine(out, t, factor=_slope(step.node, at.u[0]), value=value)
        self.values[step.v], self.dots[step.v] = value, out

    def _linear_dots(self, node: Node, θ: Params) -> Tensor:
        u, W = node.inputs[0], _weight(θ)
        if not u:  # a one-hot times W is a choice of its columns, not a product
            return W[:, W.shape[1] - self.k :].t()
        t = self.dots[u]
        return torch.mm(_flat(t), W.t()).view(*t.shape[:-1], W.shape[0])

    def _dots_of(self, node: Node) -> list[Tensor | None]:
        if 0 in node.inputs and 0 not in self.dots:
            self.dots[0] = _one_hot(self.on.x, self.facts.widths[0])[-self.k :]
        return [self.dots.get(u) for u in node.inputs]

    def tangent_slopes(self) -> Tensor:
        """J (n, D, k)."""
        y_dot = self.dots.get(self.facts.steps[-1].v)
        if y_dot is None:
            return self._no_slopes()
        if y_dot.dim() == 2:
            return y_dot.t().expand(self.on.count, -1, -1)
        return y_dot.permute(1, 2, 0)

    def _no_slopes(self) -> Tensor:
        return self.on.x.new_zeros(1, 1, 1).expand(self.on.count, self.D, self.k)

    def adjoint_slopes(self, wanted: Sequence[bool], pulled: dict[int, Tensor]) -> Tensor:
        """J (n, D, k) by D chains side by side.

        P runs down to the values that are ``wanted``; ``pulled`` is filled with what linear nodes
        pull.
        """
        facts, k, d = self.facts, self.k, self.facts.widths[0]
        last, filled = facts.steps[-1], set[int]()
        chain = _Chain(self.on, _parted(facts.widths, facts.steps))
        if not last.linear:
            chain.add(last.v, _one_hot(self.on.x, self.D))
        for step, affine, _ in reversed(_ups(facts.steps)):
            v, node, _, linear, _ = step
            if not wanted[v]:
                continue
            if v in pulled:
                chain.add(v, pulled[v].unsqueeze(0))
            P = chain.pop(v)
            if not linear:
                at = self.at(step if affine is None else affine.norm)
                if affine is not None:
                    node, at = at.node, at._replace(scale=affine.row(self.θ))
                for i, u in enumerate(node.inputs):
                    if wanted[u] or not u:
                        chain.add_pulled(at, _given(P), i)
                continue
            u, W = node.inputs[0], _weight(self.θ[v])
            if not u:
                u, W = X2, W[:, d - k :]
            elif not wanted[u]:
                continue
            if P is None:  # of y, the identity
                chain.add(u, W)
            elif facts.uniform[v] or u not in pulled:
                chain.add_product(u, P, W)
            elif u in filled:
                pulled[u].addmm_(P[0], W)
            else:
                torch.mm(P[0], W, out=pulled[u])
                filled.add(u)
        of_x = chain.pop(0)
        if of_x is not None:
            chain.add(X2, of_x[..., d - k :])
        slopes = chain.of.get(X2)
        if slopes is None:
            return self._no_slopes()
        if slopes.dim() == 2:
            return slopes.expand(self.on.count, -1, -1)
        return slopes.transpose(0, 1)


def _linear(h: Tensor, θ: Params, out: Tensor | None) -> Tensor:
    W, b = _weight(θ), θ[1]
    flat = _flat(h)
    to = torch.mm(flat, W.t(), out=out) if b is None else torch.addmm(b, flat, W.t(), out=out)
    return to.unsqueeze(0)


def _one_hot(x: Tensor, n: int) -> Tensor:
    """(n, n): part c is e_c, for every row."""
    return torch.eye(n, dtype=x.dtype, device=x.device)


# --- backward -----------------------------------------------------------------------------------


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
    x, params = x.contiguous(), _contiguous(params)
    gy = None if gy is None else gy.contiguous()
    gout = None if gout is None else gout.contiguous()
    grads = _Gradients(x, params, needs)
    facts = _facts_of(problem)
    way = _way_down(problem.d, problem.nodes, problem.k, problem.keeps_adjoint, tuple(needs))
    if x.shape[0] and not (gy is None and gout is None) and way.nodes:
        for rows in _blocks(problem, facts, x):
            _Descent(problem, facts, x, params, saved, gy, gout, rows).run(way, grads)
        grads.written = True
    return grads.result()


class _Gradients:
    """The sums of the gradients. Those of rows of parameters are parts until the end."""

    def __init__(self, x: Tensor, params: Params, needs: Sequence[bool]) -> None:
        self.params, self.written = params, False
        self.dx = torch.empty_like(x) if needs[0] else None
        self.wanted = [n and p is not None for n, p in zip(needs[1:], params, strict=True)]
        self.weights: dict[int, Tensor] = {}
        self.parts: dict[int, list[Tensor]] = {}

    def product(self, place: int, left: Tensor, right: Tensor) -> None:
        """dW += leftᵀ right."""
        held = self.weights.get(place)
        if held is None:
            self.weights[place] = torch.mm(_flat(left).t(), _flat(right))
        else:
            held.addmm_(_flat(left).t(), _flat(right))

    def weight(self, place: int) -> tuple[Tensor, bool]:
        """dW to be added to, and whether it is empty yet."""
        held = self.weights.get(place)
        if held is not None:
            return held, False
        self.weights[place] = torch.empty_like(_given(self.params[place]))
        return self.weights[place], True

    def rows(self, place: int, on: On, P: Operand, factor: Factor | None = None) -> None:
        """dθ += factor ∘ P summed over the rows."""
        self.parts.setdefault(place, []).append(on.sums(P, factor))

    def result(self) -> list[Tensor | None]:
        """x first: zeros where nothing was added."""
        if self.dx is not None and not self.written:
            self.dx.zero_()
        found: list[Tensor | None] = [self.dx]
        for place, (θ, wanted) in enumerate(zip(self.params, self.wanted, strict=True)):
            if not wanted or θ is None:
                found.append(None)
            elif place in self.weights:
                found.append(self.weights[place])
            elif place in self.parts:
                # One number may serve nodes of several widths.
                parts = [p.sum(0) if p.shape[1] == θ.shape[0] else p.sum().view(1)
                         for p in self._joined(place)]  # fmt: skip
                total = parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)
                found.append(total.to(θ.dtype))
            else:
                found.append(torch.zeros_like(θ))
        return found

    def _joined(self, place: int) -> list[Tensor]:
        parts = self.parts[place]
        alike = len({p.shape[1] for p in parts}) == 1
        return [torch.cat(parts)] if alike and len(parts) > 1 else parts


class _Products:
    """Products over the active pairs alone."""

    def __init__(self, on: On, active: Active) -> None:
        self.on, self.active = on, active
        self.config = product_config(on.x)
        self.options = product_options(on.x.dtype, self.config)

    def _grid(self, columns: int) -> tuple[int, int]:
        return -(-self.on.count // self.config.rows), -(-columns // self.config.columns)

    def up(self, t: Tensor, W: Tensor) -> Tensor:
        """t Wᵀ."""
        outputs, inputs = W.shape
        out = self.on.new(1, outputs)
        launch(
            pairs_up, self._grid(outputs), t, self.on.dense(t), W, self.active.rows,
            self.active.total, None, out, None,
            INPUTS=inputs, OUTPUTS=outputs, W_ROW=W.stride(0), ACT=IDENTITY,
            **product_tile(self.config), **self.options,
        )  # fmt: skip
        return out

    def down(self, P: Tensor, W: Tensor, held: Tensor | None) -> Tensor:
        """P W, added to ``held`` in its memory."""
        outputs, inputs = W.shape
        out = self.on.new(1, inputs) if held is None else held
        P = self.on.dense(P)
        launch(
            pairs_down, self._grid(inputs), P, P, P, W, self.active.rows, self.active.total,
            None, None, None, out,
            OUTPUTS=outputs, INPUTS=inputs, ACT=IDENTITY, CURVED=False, ADD=held is not None,
            **product_tile(self.config), **self.options,
        )  # fmt: skip
        return out

    def weight(
        self, p: Tensor | None, q: Tensor | None, u_dot: Tensor | None, u: Tensor,
        dW: Tensor, fresh: bool,
    ) -> None:  # fmt: skip
        """dW += pᵀ u̇ + qᵀ u, u̇ the last columns alone if it has no more."""
        outputs, inputs = dW.shape
        if u.stride(2) != 1 and q is not None:
            u = u.contiguous()
        config = self.config
        launch(
            pairs_weight, (-(-outputs // config.rows), -(-inputs // config.columns)), u,
            None if p is None else self.on.dense(p), None if q is None else self.on.dense(q),
            None if p is None else self.on.dense(_given(u_dot)), u,
            self.active.rows, self.active.total, dW, None,
            OUTPUTS=outputs, INPUTS=inputs,
            TANGENTS=inputs if u_dot is None else u_dot.shape[-1], BELOW_ROW=u.stride(1),
            ACT=IDENTITY, FRESH=fresh,
            BM=config.rows, BN=config.columns, BR=config.inner, **self.options,
        )  # fmt: skip


class _Descent:
    """One block of rows on its way back."""

    def __init__(
        self,
        problem: Problem,
        facts: _Facts,
        x: Tensor,
        params: Params,
        saved: Sequence[Tensor],
        gy: Tensor | None,
        gout: Tensor | None,
        rows: slice,
    ) -> None:
        self.facts, self.k, self.rows = facts, problem.k, rows
        self.fan = problem.D if problem.mode == "adjoint" else problem.k
        self.y = facts.steps[-1].v
        self.affine = _affine(facts.steps)
        self.parts = {
            s.v: one for one in self.affine.values() for s in (one.norm, one.scale, one.last)
        }
        x = x[rows]
        self.θ = _parameters(facts, params, rows, x)
        self.on = On(x, x.shape[0])
        self.values: dict[int, Tensor] = {0: x.unsqueeze(0)}
        for v, t in zip(facts.saved, saved, strict=False):
            self.values[v] = t[rows].unsqueeze(0)
        # Of all rows: g of the values that have it for themselves, P of those with gy∘P + q.
        self.parted = _parted(facts.widths, facts.steps)
        self.g, self.P = _Chain(self.on, self.parted), _Chain(self.on, self.parted)
        for v, t in zip(facts.pulled, saved[len(facts.saved) :], strict=False):
            self.P.add(v, t[rows].unsqueeze(0))
        self.gy = None if gy is None else gy[rows].unsqueeze(0)
        if facts.kept[self.y]:
            self.P.add(self.y, x.new_ones(1, 1))
        elif self.gy is not None:
            self.g.add(self.y, self.gy)
        self.pairs: _Pairs | None = None
        if gout is not None:
            gout = gout[rows] if gout.dim() else gout
            S = None if problem.hinge is None else saved[-1][rows]
            self.pairs = _Pairs(self, list_active(problem, gout, S, x))

    def at(self, step: _Step) -> At:
        u: list[Operand] = [OfRows(self.values[i]) for i in step.node.inputs]
        v = self.values.get(step.v)
        return At(step.node, u, u[0] if v is None else OfRows(v), self.θ[step.v])

    def run(self, way: Any, grads: _Gradients) -> None:
        self._again(way.again)
        if self.pairs is not None:
            self.pairs.run_tangent(way.tangents)
        for down in way.nodes:
            (self._linear if down.step.linear else self._light)(down, grads)
            self.values.pop(down.step.v, None)
            if self.pairs is not None:
                self.pairs.dots.pop(down.step.v, None)
        if grads.dx is None:
            return
        dx, g = grads.dx[self.rows], self.g.pop(0)
        if g is None:
            dx.zero_()
        else:
            dx.copy_(g[0])
        q = None if self.pairs is None else self.pairs.q.pop(0)
        if self.pairs is not None and q is not None:
            self.pairs.join(dx.unsqueeze(0), q)

    def _again(self, steps: Sequence[_Step]) -> None:
        """The values of light nodes, once more."""
        here = {step.v for step in steps}
        within = dict[int, _Affine]()
        for one in self.affine.values():
            inner = [s.v for s in (one.norm, one.scale) if s is not one.last]
            if here.issuperset((*inner, one.last.v)):
                within |= dict.fromkeys((*inner, one.last.v), one)
        for step in steps:
            affine = within.get(step.v)
            if affine is None:
                self.values[step.v] = _value(self.on, self.at(step))
            elif step.v == affine.last.v:
                at, H = self.at(affine.norm), step.node.width
                plain, out = self.on.new(1, H), self.on.new(1, H)
                affine.run(self.on, at, out, at.u[0], light.VALUE.value, self.θ, plain)
                # A shift asks of its input the width alone.
                self.values |= {affine.norm.v: plain, affine.scale.v: out, step.v: out}

    def _pulling(self, at: At, step: _Step) -> At:
        """The node as it pulls: a scale after a norm leaves its part to the norm."""
        one = self.parts.get(step.v)
        if one is None or step.node.kind == "shift":
            return at
        if step.v == one.norm.v:
            return at._replace(scale=one.row(self.θ))
        return at._replace(node=at.node._replace(kind="identity", params=(), numbers=(0, 0, 0)))

    def _cotangent(self, v: int, P: Tensor | None) -> Tensor | None:
        """g of value v for all rows, without what is the pairs'."""
        if not self.facts.kept[v]:
            return self.g.pop(v)
        if self.gy is None or P is None:
            return None
        out = self.on.new(1, P.shape[-1])
        gy = self.gy.expand(-1, -1, P.shape[-1])
        self.on.combine(out, P, factor=_times(gy))
        return out

    def _linear(self, down: _Down, grads: _Gradients) -> None:
        (v, node, *_), _, (direct,), (kept,), _ = down
        W, u, P = _weight(self.θ[v]), node.inputs[0], self.P.pop(v)
        trained = [grads.wanted[place] for place in node.params]
        g = self._cotangent(v, P) if any(trained) or direct else None
        if g is not None:
            if trained[0]:
                grads.product(node.params[0], g, self.values[u])
            if trained[1]:
                grads.rows(node.params[1], self.on, g)
            if direct:
                self.g.add_product(u, g, W)
        if self.pairs is not None:
            self.pairs.linear(down, P, trained, grads)
        if kept and P is not None and self.facts.uniform[v]:  # else it was saved
            self.P.add_product(u, P, W)

    def _light(self, down: _Down, grads: _Gradients) -> None:
        step, trained, direct, kept, _ = down
        v, node, P = step.v, step.node, self.P.pop(step.v)
        at = self.at(step)
        pulling = self._pulling(at, step)
        g = self._cotangent(v, P) if trained or True in direct else None
        if g is not None:
            if trained:
                grads.rows(node.params[0], self.on, g, _by_value(at))
            for i, mine in enumerate(direct):
                if mine:
                    self.g.add_pulled(pulling, g, i)
        if self.pairs is not None:
            self.pairs.light(down, at, pulling, P, grads)
        for i, mine in enumerate(kept):
            if mine and P is not None:
                self.P.add_pulled(pulling, P, i)


def _by_value(at: At) -> Factor:
    """∂/∂θ of ⟨g, f(u; θ)⟩ as a factor of g."""
    if at.node.kind == "scale":
        return _times(at.u[0])
    if at.node.kind == "prelu":
        return Factor(light.BELOW.value, at.u[0], at.u[0])
    return ONE  # shift


def _by_slope(at: At, u_dot: Tensor) -> Factor | None:
    """∂/∂θ of ⟨P, f'(u; θ) u̇⟩ as a factor of P, None where it is zero."""
    if at.node.kind == "scale":
        return _times(u_dot)
    if at.node.kind == "prelu":
        return Factor(light.BELOW.value, at.u[0], u_dot)
    return None


class _Pairs:
    """The active pairs of a block: their tangents, their seeds p and their curvatures q."""

    def __init__(self, block: _Descent, active: Active) -> None:
        self.block, self.active, self.facts = block, active, block.facts
        self.on = On(block.on.x, active.rows.shape[0], active)
        self.products = _Products(self.on, active)
        self.p = _Chain(self.on, block.parted, self.products)
        self.q = _Chain(self.on, block.parted, self.products)
        self.x_dot = active.x_dot.unsqueeze(0)
        self.dots: dict[int, Tensor] = {}
        self.keeps = self.facts.kept[block.y]
        # With g at hand in every row a curvature joins it there.
        self.joins = block.gy is not None and not self.keeps
        if self.facts.moving[block.y] and not self.keeps:
            self.p.add(block.y, active.seed.unsqueeze(0))

    def run_tangent(self, steps: Sequence[_Step]) -> None:
        """The tangents that the walk down needs."""
        for step in steps:
            v, node, _, linear, _ = step
            if not linear:
                self.dots[v] = _push(self.on, self.block.at(step), self._dots_of(node))
                continue
            u, W = node.inputs[0], _weight(self.block.θ[v])
            t = self.dots[u] if u else self.x_dot
            self.dots[v] = self.products.up(t, W if u else W[:, W.shape[1] - self.block.k :])

    def _dots_of(self, node: Node) -> list[Tensor | None]:
        if 0 in node.inputs and 0 not in self.dots:
            self.dots[0] = F.pad(self.x_dot, (self.facts.widths[0] - self.block.k, 0))
        return [self.dots.get(u) for u in node.inputs]

    def _seeds(self, v: int, P: Tensor | None) -> Operand | None:
        """The pairs' own P of value v; None where x2 does not reach it."""
        if not self.facts.moving[v]:
            return None
        if not self.keeps:
            return self.p.pop(v)
        return None if P is None else P if P.dim() == 2 else OfRows(P)

    def join(self, g: Tensor, q: Tensor) -> None:
        """g += q in the pairs' rows."""
        block, H = self.block, g.shape[-1]
        BN = min(64, _power_of_two(H))
        BM = LIGHT_TILE // BN
        launch(
            gather_inputs, (-(-block.on.count // BM), -(-H // BN)), q, g, self.on.dense(q),
            self.active.place, block.on.count,
            d=H, ROW=g.stride(1), COLUMN=g.stride(2), T=block.fan, FRESH=False, BM=BM, BN=BN,
            A=accumulator(q.dtype),
        )  # fmt: skip

    def linear(
        self, down: _Down, P: Tensor | None, trained: Sequence[bool], grads: _Gradients
    ) -> None:
        """The pairs' part in dW and db; p and q go down the node."""
        (v, node, *_), _, (direct,), (kept,), _ = down
        u, wanted = node.inputs[0], direct or kept
        p, q = self._seeds(v, P), self.q.pop(v)
        if trained[0] and not (p is None and q is None):
            seeds: Tensor | None = None
            if p is not None:
                seeds = self._own(p)
            u_dot = None if p is None else self.dots[u] if u else self.x_dot
            dW, fresh = grads.weight(node.params[0])
            self.products.weight(seeds, q, u_dot, self.block.values[u], dW, fresh)
        if trained[1] and q is not None:
            grads.rows(node.params[1], self.on, q)
        if not wanted:
            return
        if q is not None:
            self.q.add_product(u, q, _weight(self.block.θ[v]))
        if not self.keeps and isinstance(p, Tensor) and u and self.facts.moving[u]:
            self.p.add_product(u, p, _weight(self.block.θ[v]))

    def _own(self, p: Operand) -> Tensor:
        """p of the pairs in memory of their own."""
        if isinstance(p, Tensor) and p.dim() == 3:
            return p
        out = self.on.new(1, _given(_tensor(p)).shape[-1])
        self.on.combine(out, p)
        return out

    def light(self, down: _Down, at: At, pulling: At, P: Tensor | None, grads: _Gradients) -> None:
        """The pairs' part in dθ; p and q go down the node, and its curvature joins them or g."""
        step, trained, direct, kept, _ = down
        v, node = step.v, step.node
        p, q = self._seeds(v, P), self.q.pop(v)
        u_dot = self._dots_of(node) if trained or step.rule.curved else []
        if trained and p is not None:
            factor = _by_slope(at, _given(u_dot[0]))
            if factor is not None:
                grads.rows(node.params[0], self.on, p, factor)
        if trained and q is not None:
            grads.rows(node.params[0], self.on, q, _by_value(at))
        for i, u in enumerate(node.inputs):
            if not (direct[i] or kept[i]):
                continue
            if not self.keeps and isinstance(p, Tensor) and u and self.facts.moving[u]:
                self.p.add_pulled(pulling, p, i)
            curved = p is not None and step.rule.curved
            if q is not None and curved and node.kind in ACTIVATIONS:
                self.q.add(u, q, 1.0, _slope(node, at.u[0]), (_given(p), _given(u_dot[0])))
                continue
            if q is not None:
                self.q.add_pulled(pulling, q, i)
            if curved:
                self._curve(pulling, u_dot, _given(p), i)

    def _curve(self, at: At, u_dot: Sequence[Tensor | None], p: Operand, i: int) -> None:
        """The curvature in input i joins g of its rows, or q."""
        node, u = at.node, at.node.inputs[i]
        chain = _Chain(self.on, {}, self.products) if self.joins else self.q
        if node.kind in BY_ROW:
            chain.add_by_row(
                u, p, BY_ROW[node.kind], light.BEND.value, node.width, u=at.point,
                s=_given(u_dot[0]), scale=at.scale, epsilon=at.epsilon,
            )  # fmt: skip
        else:
            bent = _bend(at, u_dot, p, i)
            if bent is None:
                return
            chain.add(u, bent[0], factor=bent[1])
        if self.joins:
            self.join(self.block.g.of[u], chain.of[u])
