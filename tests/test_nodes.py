"""The table of nodes against PyTorch's own functions and their autograd, in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from monokernel.columns import last_columns
from monokernel.nodes import RULES, parameter_shapes, rule, wrong_nodes
from monokernel.problem import Hinge, Problem, pack, unpack
from monokernel.program import Node
from tests.support import ELEMENTWISE, assert_same

Tensors = Sequence[Tensor]
Plain = Callable[[Tensors, Tensors], Tensor]

N, T = 6, 3  # rows, tangents or cotangents at once


class Case(NamedTuple):
    """A node, the widths of its inputs, PyTorch's spelling of it, and its parameters' shapes
    (-1 for the rows)."""

    node: Node
    widths: tuple[int, ...]
    plain: Plain
    shapes: tuple[tuple[int, ...], ...] = ()
    positive: bool = False  # defined for positive inputs alone
    missing: frozenset[int] = frozenset()  # places of parameters that are None

    def values(self, rows: int = N) -> tuple[list[Tensor], list[Tensor]]:
        """Inputs u and parameters θ, which autograd is to follow."""
        u = [torch.randn(rows, H, dtype=torch.float64) for H in self.widths]
        if self.positive:
            u = [t.abs() + 0.1 for t in u]
        shapes = [tuple([rows if n == -1 else n for n in s]) for s in self.shapes]
        θ = [torch.randn(s, dtype=torch.float64) for s in shapes]
        return [t.requires_grad_() for t in u], [t.requires_grad_() for t in θ]

    def given(self, θ: Tensors) -> list[Tensor | None]:
        """θ as the call has it: None where there is no parameter."""
        own = iter(θ)
        return [None if p in self.missing else next(own) for p in self.node.params]


def node(
    kind: str, width: int, *numbers: float, inputs: int = 1, params: tuple[int, ...] = ()
) -> Node:
    return Node(kind, tuple(range(inputs)), params, numbers, width)


H = 5
CASES: dict[str, Case] = {
    "linear": Case(
        node("linear", 3, params=(0, 1)), (H,), lambda u, θ: F.linear(u[0], *θ), ((3, H), (3,))
    ),
    "linear, no bias": Case(
        node("linear", 3, params=(0, 1)),
        (H,),
        lambda u, θ: F.linear(u[0], *θ),
        ((3, H),),
        missing=frozenset({1}),
    ),
    "linear of no columns": Case(
        node("linear", 3, params=(0, 1)), (0,), lambda u, θ: F.linear(u[0], *θ), ((3, 0), (3,))
    ),
    "linear to no columns": Case(
        node("linear", 0, params=(0, 1)), (H,), lambda u, θ: F.linear(u[0], *θ), ((0, H), (0,))
    ),
    "prelu": Case(node("prelu", H, params=(0,)), (H,), lambda u, θ: F.prelu(u[0], θ[0]), ((H,),)),
    "prelu, one number": Case(
        node("prelu", H, params=(0,)), (H,), lambda u, θ: F.prelu(u[0], θ[0]), ((1,),)
    ),
    "scale": Case(node("scale", H, params=(0,)), (H,), lambda u, θ: u[0] * θ[0], ((H,),)),
    "scale, one number": Case(
        node("scale", H, params=(0,)), (H,), lambda u, θ: u[0] * θ[0], ((1,),)
    ),
    "dropout": Case(
        node("dropout", H, 0.4, 2.0, params=(0,)),
        (H,),
        lambda u, θ: u[0] * θ[0],
        ((-1, H),),  # the mask that at_rows makes of the key
    ),
    "shift": Case(node("shift", H, params=(0,)), (H,), lambda u, θ: u[0] + θ[0], ((H,),)),
    "shift, one number": Case(
        node("shift", H, params=(0,)), (H,), lambda u, θ: u[0] + θ[0], ((1,),)
    ),
    "line": Case(node("line", H, 1.5, -0.3), (H,), lambda u, θ: 1.5 * u[0] - 0.3),
    "line, slope 1": Case(node("line", H, 1.0, 0.7), (H,), lambda u, θ: u[0] + 0.7),
    "line, only a slope": Case(node("line", H, -1.0, 0.0), (H,), lambda u, θ: -u[0]),
    "sum": Case(
        node("sum", H, 1.0, -2.0, 0.5, inputs=3),
        (H, H, H),
        lambda u, θ: u[0] - 2 * u[1] + 0.5 * u[2],
    ),
    "sum of one": Case(node("sum", H, -3.0), (H,), lambda u, θ: -3 * u[0]),
    "product": Case(node("product", H, inputs=2), (H, H), lambda u, θ: u[0] * u[1]),
    "expand": Case(node("expand", 4), (1,), lambda u, θ: u[0].repeat(1, 4)),
    "expand to no columns": Case(node("expand", 0), (1,), lambda u, θ: u[0].expand(-1, 0)),
    "total": Case(node("total", 1), (H,), lambda u, θ: u[0].sum(1, keepdim=True)),
    "total of no columns": Case(node("total", 1), (0,), lambda u, θ: u[0].sum(1, keepdim=True)),
    "concat": Case(node("concat", H + 3, inputs=3), (1, H, 2), lambda u, θ: torch.cat(list(u), 1)),
    "concat with no columns": Case(
        node("concat", H, inputs=2), (0, H), lambda u, θ: torch.cat(list(u), 1)
    ),
    "columns": Case(node("columns", 2, 1.0, 1.0), (H,), lambda u, θ: u[0][:, 1:3]),
    "columns, step 2": Case(node("columns", 3, 0.0, 2.0), (H,), lambda u, θ: u[0][:, ::2]),
    "columns, the last": Case(node("columns", 1, 4.0, 3.0), (H,), lambda u, θ: u[0][:, 4:]),
    "columns, none": Case(node("columns", 0, 2.0, 1.0), (H,), lambda u, θ: u[0][:, 2:2]),
    "normalise": Case(
        node("normalise", H, 0.1), (H,), lambda u, θ: F.layer_norm(u[0], (H,), eps=0.1)
    ),
    "root_mean_square": Case(
        node("root_mean_square", H, 0.1), (H,), lambda u, θ: F.rms_norm(u[0], (H,), eps=0.1)
    ),
    "softmax": Case(node("softmax", H), (H,), lambda u, θ: torch.softmax(u[0], 1)),
    "softmax of one": Case(node("softmax", 1), (1,), lambda u, θ: torch.softmax(u[0], 1)),
    "log_softmax": Case(node("log_softmax", H), (H,), lambda u, θ: torch.log_softmax(u[0], 1)),
    **{
        name: Case(
            node(σ.kind, H, *σ[1:]),
            (H,),
            lambda u, θ, f=f: f(u[0]),  # type: ignore[misc]
            positive=σ.kind in ("sqrt", "log"),
        )
        for name, (σ, f) in ELEMENTWISE.items()
    },
    "no columns": Case(node("silu", 0, 0.0, 0.0, 0.0), (0,), lambda u, θ: F.silu(u[0])),
}
EVERY = pytest.mark.parametrize("name", CASES)
WITH_PARAMETERS = pytest.mark.parametrize("name", [n for n, c in CASES.items() if c.shapes])
LEADING = pytest.mark.parametrize("leading", [(), (T,)], ids=["rows", "several"])


def directions(case: Case, leading: tuple[int, ...], rows: int = N) -> list[list[Tensor | None]]:
    """Tangents of the inputs, with every choice of those that are zero but all."""
    choices = [c for c in product([True, False], repeat=len(case.widths)) if any(c)]
    return [
        [
            torch.randn(*leading, rows, W, dtype=torch.float64) if moves else None
            for W, moves in zip(case.widths, choice, strict=True)
        ]
        for choice in choices
    ]


class Truth(NamedTuple):
    """The gradients of ⟨f'(u; θ)ᵀP, u̇⟩ in P, u and θ: push, curvature and the parameters' terms."""

    push: Tensor
    curvature: list[Tensor]
    parameters: list[Tensor]


def truth(case: Case, u: Tensors, θ: Tensors, u_dot: Sequence[Tensor | None], P: Tensor) -> Truth:
    """By PyTorch's functions and one double backward: its third order of layer_norm is wrong.

    For several tangents and cotangents at once, one after the other; the parameters' terms are
    then their sums.
    """
    if P.dim() > 2:
        each = [
            truth(case, u, θ, [None if t is None else t[i] for t in u_dot], p)
            for i, p in enumerate(P)
        ]
        push, curvature, parameters = zip(*each, strict=True)
        return Truth(
            torch.stack(push),
            [torch.stack(c) for c in zip(*curvature, strict=True)],
            [torch.stack(c).sum(0) for c in zip(*parameters, strict=True)],
        )
    P = P.detach().requires_grad_()
    pulled = torch.autograd.grad(case.plain(u, θ), u, P, create_graph=True, materialize_grads=True)
    moved = [(g * t).sum() for g, t in zip(pulled, u_dot, strict=True) if t is not None]
    total = torch.stack(moved).sum()
    push, *rest = torch.autograd.grad(total, [P, *u, *θ], materialize_grads=True)
    return Truth(push, rest[: len(u)], rest[len(u) :])


class Collected:
    """The sums as the definition reads: over every row."""

    def __init__(self, θ: Sequence[Tensor | None]) -> None:
        self.d = [None if t is None else torch.zeros_like(t) for t in θ]

    def _of(self, place: int) -> Tensor:
        found = self.d[place]
        assert found is not None
        return found

    def product(self, place: int, left: Tensor, right: Tensor) -> None:
        left, right = (t.expand(*torch.broadcast_shapes(left.shape[:-1], right.shape[:-1]), -1)
                       for t in (left, right))  # fmt: skip
        self._of(place).add_(torch.einsum("...o,...i->oi", left, right))

    def rows(self, place: int, t: Tensor) -> None:
        self._of(place).add_(t.sum_to_size(self._of(place).shape))


def test_every_kind_has_a_case() -> None:
    assert {case.node.kind for case in CASES.values()} == set(RULES)
    curved = {kind for kind, of in RULES.items() if of.curved}
    assert {"normalise", "root_mean_square", "softmax", "log_softmax", "product"} < curved


@EVERY
@pytest.mark.parametrize("rows", [0, 1, N])
def test_value(name: str, rows: int) -> None:
    case = CASES[name]
    u, θ = case.values(rows)
    v = rule(case.node).value(case.node, u, case.given(θ))
    assert v.shape == (rows, case.node.width)
    assert_same([v], [case.plain(u, θ)], 1e-14)


@EVERY
@LEADING
def test_push(name: str, leading: tuple[int, ...]) -> None:
    case = CASES[name]
    of, (u, θ) = rule(case.node), case.values()
    v = of.value(case.node, u, case.given(θ))
    P = torch.zeros(*leading, *v.shape, dtype=torch.float64)
    for u_dot in directions(case, leading):
        got = of.push(case.node, u, v, u_dot, case.given(θ))
        assert_same([got], [truth(case, u, θ, u_dot, P).push], 1e-13)


@EVERY
def test_push_of_one_tangent_for_all_rows(name: str) -> None:
    """(T, 1, H): the directions of a program's input."""
    case = CASES[name]
    of, (u, θ) = rule(case.node), case.values()
    v = of.value(case.node, u, case.given(θ))
    u_dot = [torch.randn(T, 1, W, dtype=torch.float64) for W in case.widths]
    got = of.push(case.node, u, v, u_dot, case.given(θ))
    want = of.push(case.node, u, v, [t.expand(T, N, -1) for t in u_dot], case.given(θ))
    assert_same([got.expand_as(want)], [want], 1e-13)


@EVERY
@LEADING
def test_pull(name: str, leading: tuple[int, ...]) -> None:
    case = CASES[name]
    of, (u, θ) = rule(case.node), case.values()
    v = of.value(case.node, u, case.given(θ))
    P = torch.randn(*leading, N, case.node.width, dtype=torch.float64)
    got = of.pull(case.node, u, v, P, case.given(θ))
    plain = case.plain(u, θ)
    each = [
        torch.autograd.grad(plain, u, p, retain_graph=True, materialize_grads=True)
        for p in (P if leading else [P])
    ]
    want = [torch.stack(g) if leading else g[0] for g in zip(*each, strict=True)]
    assert_same(got, want, 1e-13)


@EVERY
@LEADING
def test_curvature(name: str, leading: tuple[int, ...]) -> None:
    case = CASES[name]
    of, (u, θ) = rule(case.node), case.values()
    v = of.value(case.node, u, case.given(θ))
    P = torch.randn(*leading, N, case.node.width, dtype=torch.float64)
    seen = False
    for u_dot in directions(case, leading):
        got = of.curvature(case.node, u, v, u_dot, P, case.given(θ))
        assert of.curved or got == [None] * len(u)
        want = truth(case, u, θ, u_dot, P).curvature
        assert_same(
            [torch.zeros_like(w) if c is None else c for c, w in zip(got, want, strict=True)],
            want,
            1e-12,
        )
        seen |= any(bool(w.any()) for w in want)
    assert seen == (of.curved and case.node.width > 1)


@WITH_PARAMETERS
@LEADING
def test_parameters(name: str, leading: tuple[int, ...]) -> None:
    case = CASES[name]
    of, (u, θ) = rule(case.node), case.values()
    g = torch.randn(*leading, N, case.node.width, dtype=torch.float64)
    sums = Collected(case.given(θ))
    of.parameters(case.node, u, g, case.given(θ), sums)
    v = case.plain(u, θ)
    want = torch.autograd.grad(v, θ, g.sum(0) if leading else g, materialize_grads=True)
    if of.per_row:
        want = tuple(torch.zeros_like(t) for t in want)
    assert_same([t for t in sums.d if t is not None], want, 1e-13)


@WITH_PARAMETERS
@LEADING
def test_slope_parameters(name: str, leading: tuple[int, ...]) -> None:
    case = CASES[name]
    of, (u, θ) = rule(case.node), case.values()
    (u_dot,) = directions(case, leading)
    P = torch.randn(*leading, N, case.node.width, dtype=torch.float64)
    sums = Collected(case.given(θ))
    of.slope_parameters(case.node, u, u_dot, P, case.given(θ), sums)
    want = truth(case, u, θ, u_dot, P).parameters
    if of.per_row:
        want = [torch.zeros_like(t) for t in want]
    assert_same([t for t in sums.d if t is not None], want, 1e-13)


@pytest.mark.parametrize("name", [n for n, case in CASES.items() if case.node.width])
def test_all_orders(name: str) -> None:
    """Value, push and pull are differentiable again, and right when they are."""
    case = CASES[name]
    of, (u, θ) = rule(case.node), case.values(2)
    (u_dot, *_) = directions(case, (2,), 2)
    moving = [t.requires_grad_() for t in u_dot if t is not None]
    P = torch.randn(2, 2, case.node.width, dtype=torch.float64, requires_grad=True)
    n, m = len(u), len(u) + len(θ)

    def value(*t: Tensor) -> Tensor:
        return of.value(case.node, t[:n], case.given(t[n:m]))

    def push(*t: Tensor) -> Tensor:
        return of.push(case.node, t[:n], value(*t), t[m:], case.given(t[n:m]))

    def pull(*t: Tensor) -> tuple[Tensor, ...]:
        return tuple(of.pull(case.node, t[:n], value(*t), t[m], case.given(t[n:m])))

    assert torch.autograd.gradgradcheck(value, (*u, *θ))
    assert torch.autograd.gradgradcheck(push, (*u, *θ, *moving))
    assert torch.autograd.gradgradcheck(pull, (*u, *θ, P))


@EVERY
@LEADING
@torch.no_grad()
def test_what_is_not_for_autograd_is_the_same(name: str, leading: tuple[int, ...]) -> None:
    """Nor does it change what it is given, nor read what the rule says that it does not."""
    case = CASES[name]
    of, (u, parameters) = rule(case.node), case.values()
    θ = case.given(parameters)
    v = of.value(case.node, u, θ)
    P = torch.randn(*leading, N, case.node.width, dtype=torch.float64)
    before = [t.clone() for t in (*u, *parameters, v, P)]
    assert_same([of.value_now(case.node, u, θ)], [v], 1e-14)
    assert_same(of.pull_now(case.node, u, v, P, θ), of.pull(case.node, u, v, P, θ), 1e-13)
    assert all(map(torch.equal, (*u, *parameters, v, P), before))
    unread_u = u if of.varies else [torch.full_like(t, torch.nan) for t in u]
    unread_v = v if of.reads_v else torch.full_like(v, torch.nan)
    assert_same(
        of.pull_now(case.node, unread_u, unread_v, P, θ), of.pull(case.node, u, v, P, θ), 1e-13
    )
    for u_dot in directions(case, leading):
        given = [None if t is None else t.clone() for t in u_dot]
        want = of.push(case.node, u, v, u_dot, θ)
        assert_same([of.push_now(case.node, unread_u, unread_v, u_dot, θ)], [want], 1e-13)
        bent = of.curvature(case.node, unread_u, unread_v, u_dot, P, θ)
        assert not any(t is not None and t.isnan().any() for t in bent)
        for t, kept in zip(u_dot, given, strict=True):
            assert t is kept or (t is not None and kept is not None and torch.equal(t, kept))


@EVERY
def test_shapes_of_the_parameters(name: str) -> None:
    case = CASES[name]
    of, (_, θ) = rule(case.node), case.values()
    given = [t for t in case.given(θ) if t is not None]
    shapes = of.shapes(case.node, case.widths)
    assert len(shapes) == len(case.node.params)
    kept = [s for p, s in zip(case.node.params, shapes, strict=True) if p not in case.missing]
    for t, s in zip(given, kept, strict=True):
        assert of.per_row or t.shape in (s, (1,))


# --- what makes no program ------------------------------------------------------------------------


def program(case: Case) -> tuple[int, tuple[Node, ...]]:
    """A program over 8 columns that the case's node ends: each input is a slice of x."""
    slices = tuple(Node("columns", (0,), (), (0.0, 1.0), W) for W in case.widths)
    inputs = tuple(range(1, len(slices) + 1))
    return 8, (*slices, case.node._replace(inputs=inputs))


@EVERY
def test_every_case_makes_a_program(name: str) -> None:
    d, nodes = program(CASES[name])
    assert wrong_nodes(d, nodes) == ""
    for width in (-1, nodes[-1].width + 1):
        fits = nodes[-1].kind in ("linear", "expand", "columns") and width > 0
        wrong = wrong_nodes(d, (*nodes[:-1], nodes[-1]._replace(width=width)))
        assert fits or one_sentence(wrong)
    for changed in (
        nodes[-1]._replace(numbers=(*nodes[-1].numbers, 1.0)),
        nodes[-1]._replace(params=(*nodes[-1].params, 7)),
        nodes[-1]._replace(inputs=()),
        nodes[-1]._replace(inputs=(len(nodes),)),
        nodes[-1]._replace(inputs=(-1,)),
    ):
        assert one_sentence(wrong_nodes(d, (*nodes[:-1], changed))), changed


def one_sentence(text: str) -> bool:
    return ": expected " in text and "\n" not in text


X = 4
LINEAR = Node("linear", (0,), (0, 1), (), 3)
WRONG: dict[str, tuple[int, tuple[Node, ...]]] = {
    "no node": (X, ()),
    "fewer than no columns": (-1, (LINEAR,)),
    "no such kind": (X, (LINEAR._replace(kind="attention"),)),
    "two inputs of one": (X, (LINEAR._replace(inputs=(0, 0)),)),
    "one input of two": (X, (node("product", X),)),
    "what is made later": (X, (node("relu", X, 0, 0, 0)._replace(inputs=(1,)),)),
    "a parameter before the first": (X, (LINEAR._replace(params=(-1, 1)),)),
    "too few parameters": (X, (LINEAR._replace(params=(0,)),)),
    "numbers of an activation": (X, (node("relu", X),)),
    "widths that differ in a sum": (X, (LINEAR, Node("sum", (0, 1), (), (1.0, 1.0), X))),
    "widths that differ in a product": (X, (LINEAR, Node("product", (0, 1), (), (), X))),
    "one factor of two terms": (X, (Node("sum", (0, 0), (), (1.0,), X),)),
    "a total of two columns": (X, (node("total", 2),)),
    "several columns, expanded": (X, (node("expand", X),)),
    "columns that x has not": (X, (node("columns", 2, 3.0, 1.0),)),
    "columns before the first": (X, (node("columns", 2, -1.0, 1.0),)),
    "columns that do not go on": (X, (node("columns", 2, 0.0, 0.0),)),
    "columns between columns": (X, (node("columns", 2, 0.5, 1.0),)),
    "infinitely far columns": (X, (node("columns", 0, float("inf"), 1.0),)),
    "a column that is no number": (X, (node("columns", 1, float("nan"), 1.0),)),
    "columns of a concat": (X, (Node("concat", (0, 0), (), (), X),)),
    "a parameter that nobody reads": (X, (LINEAR._replace(params=(0, 2)),)),
    "the norm of nothing": (0, (node("normalise", 0, 1e-5),)),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_program_gets_one_sentence(name: str) -> None:
    d, nodes = WRONG[name]
    assert one_sentence(wrong_nodes(d, nodes))
    with pytest.raises(ValueError, match="expected"):
        unpack(*pack(Problem(d, nodes, last_columns(d, 1), "adjoint", None)))


PROBLEMS = [
    Problem(*program(case), columns, mode, hinge)
    for i, case in enumerate(CASES.values())
    for columns, mode, hinge in [
        ((1,), "adjoint", None),
        ((0, 2), "tangent", Hinge((1, -1), (0.1, 0.2), True, True)),
    ][i % 2 :][:1]
]
PROBLEMS[1] = PROBLEMS[1]._replace(cast=torch.bfloat16)


@pytest.mark.parametrize("problem", PROBLEMS, ids=CASES)
def test_unpack_undoes_pack(problem: Problem) -> None:
    assert unpack(*pack(problem)) == problem
    assert hash(unpack(*pack(problem))) == hash(problem)


INTEGERS = st.one_of(st.integers(-3, 12), st.sampled_from([2**31, -(2**31), 2**62]))
FLOATS = st.one_of(st.floats(-3, 12), st.sampled_from([float("inf"), float("nan"), 1e300, -1.0]))
WORDS = st.one_of(st.sampled_from([*RULES, "tangent", "adjoint"]), st.text(max_size=5))


@given(data=st.data())
def test_a_mutated_program_is_another_or_gets_one_sentence(data: st.DataObject) -> None:
    packed: list[object] = list(pack(data.draw(st.sampled_from(PROBLEMS))))
    for _ in range(data.draw(st.integers(1, 3))):
        i = data.draw(st.integers(0, len(packed) - 1))
        packed[i] = data.draw(mutation(packed[i]))
    wrong = ""
    try:
        problem = unpack(*packed)  # type: ignore[arg-type]
    except ValueError as error:
        wrong = str(error)
    if wrong:
        assert one_sentence(wrong), wrong
        return
    told = slice(None) if problem.hinge else slice(7)  # without a hinge its numbers mean nothing
    assert pack(problem)[told] == tuple(packed[told])
    places = parameter_shapes(problem.d, problem.nodes)
    assert sorted(places) == list(range(len(places)))


def mutation(field: object) -> st.SearchStrategy[object]:
    """Another value of the field, of its type."""
    if isinstance(field, tuple):
        of = {str: WORDS, float: FLOATS}.get(type(field[0]) if field else float, INTEGERS)
        return st.one_of(
            st.tuples(st.integers(0, len(field)), st.integers(0, 2), st.lists(of, max_size=2)).map(
                lambda m: (*field[: m[0]], *m[2], *field[m[0] + m[1] :])
            )
        )
    if isinstance(field, bool):
        return st.booleans()
    if field is None or isinstance(field, torch.dtype):
        return st.sampled_from([None, torch.float16, torch.bfloat16, torch.float64])
    return {int: INTEGERS, float: FLOATS, str: WORDS}[type(field)]
