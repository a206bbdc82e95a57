"""Columns anywhere: the input in one tensor, and signs, names and margins of its columns."""

from __future__ import annotations

import itertools
import math
import re
import warnings
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from monokernel import Monotone as MonotoneNet
from monokernel import (
    MonotonePenalty,
    audit,
    certify,
    fused_mono_penalty,
    plan,
    value_and_jacobian,
)
from monokernel.backends import compaction
from monokernel.columns import add, last_columns, runs_of, spread, take
from tests.support import BACKENDS, assert_same, gradients, mlp, oracle, oracle_penalties, ways
from tests.zoo import ACTIVE, ZOO, network

ROWS, WIDTH, D_IN = 21, 8, 6
QUIET = [name for name in ZOO if name not in ACTIVE]
NAMES = ("age", "income", "debt", "years", "rooms", "size")
# Signs of the six columns: far apart, at both ends, side by side but not last.
SCATTERED = {
    "apart": (0, 1, 0, -1, 0, 0),
    "ends": (-1, 0, 0, 0, 0, 1),
    "beside": (0, 0, 1, -1, 0, 0),
}


class Series:
    """What pandas' Series and DataFrame have of a mapping."""

    def __init__(self, entries: dict[Any, Any]) -> None:
        self.entries = entries

    def keys(self) -> list[Any]:
        return list(self.entries)

    def items(self) -> Any:
        return self.entries.items()


class Frame:
    """What pandas' DataFrame has of a table."""

    def __init__(self, values: Tensor, columns: tuple[str, ...]) -> None:
        self.values, self.columns = values, columns

    def to_numpy(self) -> Any:
        return self.values.numpy()


class General(nn.Module):
    """A forward that nobody reads: it branches on values."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.net(x)
        return y if y.sum() < 1e9 else -y


def truth(net: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """y and J (N, D, d) of every column, by double backward."""
    return oracle(net, x[:, :0], x)


def constrained(signs: tuple[int, ...]) -> list[int]:
    return [c for c, s in enumerate(signs) if s]


@pytest.mark.parametrize("D", [1, 3])
@pytest.mark.parametrize("name", QUIET)
def test_the_zoo(name: str, D: int) -> None:
    """Value, penalty and every gradient, of x too, by every backend and mode."""
    net = network(name, D_IN, D, WIDTH, torch.float64, seed=7)
    x = torch.randn(ROWS, D_IN, dtype=torch.float64, requires_grad=True)
    inputs = [x, *net.parameters()]
    y, _ = truth(net, x)
    gy = torch.randn_like(y)
    for signs in SCATTERED.values():
        c = constrained(signs)
        direction = torch.tensor(signs, dtype=torch.float64)[c]
        weight = torch.rand(ROWS, D, 2, dtype=torch.float64)
        y, J = truth(net, x)
        S = direction * J[..., c]
        margin = S.detach().flatten(0, 1).median(0).values + 1e-6  # about half violate
        entries = torch.relu(margin - S) * weight
        assert 0.3 < (entries > 0).double().mean() < 0.7
        want = gradients((y * gy).sum() + entries.sum(), *inputs)
        for way in ways(net, x):
            got_y, got = fused_mono_penalty(
                net, x, direction=signs, margin=margin, weight=weight, return_output=True, **way
            )
            assert_same([got_y, got], [y, entries.sum()])
            assert_same(gradients((got_y * gy).sum() + got, *inputs), want)


@pytest.mark.parametrize("D", [1, 3])
@pytest.mark.parametrize("net", [mlp(6, 0, 1), mlp(6, 0, 3)][:0] or ["chain", "program", "general"])
def test_every_choice_of_columns(net: str, D: int) -> None:
    """All 31 of five columns: slopes in the order asked for, and their gradients."""
    kinds = {"chain": "shared layer", "program": "DCN-v2", "general": "DCN-v2"}
    torch.manual_seed(2)
    module = network(kinds[net], 5, D, 7, torch.float64, seed=3)
    module = General(module) if net == "general" else module
    x = torch.randn(9, 5, dtype=torch.float64, requires_grad=True)
    inputs = [x, *module.parameters()]
    for size in range(1, 6):
        for columns in itertools.combinations(range(5), size):
            order = torch.randperm(size).tolist()
            asked = [columns[i] for i in order]
            y, J = truth(module, x)
            mix = torch.randn(9, D, size, dtype=torch.float64)
            mix[torch.rand(9) < 0.5] = 0
            want = gradients((J[..., asked] * mix).sum() + y.sum(), *inputs)
            for way in ways(module, x):
                got_y, got = value_and_jacobian(module, x, columns=asked, **way)
                assert_same([got_y, got], [y, J[..., asked]])
                assert_same(gradients((got * mix).sum() + got_y.sum(), *inputs), want)


@pytest.mark.parametrize("name", ["standardised", "pre-norm LayerNorm"])
def test_x_is_handed_over_as_it_is(name: str) -> None:
    """No copy of N rows: a kernel gets the memory of x."""
    net = network(name, D_IN, 2, WIDTH, torch.float64)
    x, met = torch.randn(ROWS, D_IN, dtype=torch.float64), list[int]()
    import monokernel.api as api

    def evaluate(problem: Any, backend: str, rows: Tensor, *rest: Any) -> Any:
        met.append(rows.data_ptr())
        return real(problem, backend, rows, *rest)

    real = api.evaluate
    with mock.patch.object(api, "evaluate", evaluate):
        fused_mono_penalty(net, x, direction=SCATTERED["apart"])
        value_and_jacobian(net, x, columns=[4, 0])
    assert met == [x.data_ptr()] * 2


def test_the_two_forms_agree() -> None:
    net, x = mlp(4, 2, 2), torch.randn(ROWS, 6, dtype=torch.float64, requires_grad=True)
    for options in ({}, {"reduction": "none"}, {"reduction": "mean", "hinge": "squared"}):
        want = fused_mono_penalty(net, x[:, :4], x[:, 4:], direction=(1, -1), **options)
        got = fused_mono_penalty(net, x, direction=(0, 0, 0, 0, 1, -1), **options)
        assert_same([got], [want])
        assert_same(gradients(got.sum(), x), gradients(want.sum(), x))
    assert plan(net, x, direction=(0, 0, 0, 0, 0, 1)).mode == "tangent"
    assert plan(net, x).mode == "adjoint"  # six columns, two outputs


def test_leading_axes_and_signs_of_each_output() -> None:
    net, x = mlp(5, 0, 2), torch.randn(3, 7, 5, dtype=torch.float64)
    signs = ((0, 1, 0, 0, -1), (1, 0, 0, 0, -1))
    got = fused_mono_penalty(net, x, direction=signs, margin=0.1, reduction="none")
    J = truth(net, x.reshape(-1, 5))[1][..., [0, 1, 4]]
    want = oracle_penalties(J, torch.tensor([[0, 1, -1], [1, 0, -1]]), 0.1)
    assert_same([got], [want.reshape(3, 7, 2, 3)])


# --- names ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrap", [dict, Series])
def test_columns_by_name(wrap: Any) -> None:
    net, x = mlp(6, 0, 2), torch.randn(ROWS, 6, dtype=torch.float64)
    signs = SCATTERED["apart"]
    want = fused_mono_penalty(net, x, direction=signs, margin=(0.3, 0.1), reduction="none")
    by_name = {
        "direction": wrap({"years": -1, "income": 1}), "columns": NAMES,
        "margin": wrap({"years": 0.1, "income": 0.3}),
    }  # fmt: skip
    assert_same([fused_mono_penalty(net, x, reduction="none", **by_name)], [want])
    by_number = {"direction": {3: -1, 1: 1}, "margin": {1: 0.3, 3: 0.1}}
    assert_same([fused_mono_penalty(net, x, reduction="none", **by_number)], [want])
    each = {"income": (1, 0), "years": (-1, -1)}
    got = fused_mono_penalty(net, x, direction=each, columns=NAMES, reduction="none")
    table = torch.tensor([[1, -1], [0, -1]])
    assert_same([got], [oracle_penalties(truth(net, x)[1][..., [1, 3]], table)])
    two = fused_mono_penalty(net, x[:, :3], x[:, 3:], direction={"a": 1}, columns=("b", "a", "c"))
    assert_same([two], [fused_mono_penalty(net, x, direction={4: 1})])
    named = value_and_jacobian(net, x, columns=["years", "income"], names=NAMES)[1]
    assert_same([named], [value_and_jacobian(net, x)[1][..., [3, 1]]])


NET, X = mlp(6, 0, 2), torch.randn(5, 6, dtype=torch.float64)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({}, "direction: expected a sign for each of the d = 6 columns of x1 where x2 is left out"),
        ({"direction": (0,) * 6}, r"direction: expected \+1 or -1 for at least one column"),
        ({"direction": {}}, r"direction: expected \+1 or -1 for at least one column"),
        ({"direction": (0, 1)}, r"direction: expected \(d,\) = \(6,\) or \(D, d\) = \(D, 6\), got"),
        ({"direction": ["up", "down"]}, r"expected entries in \{-1, 0, 1\}, got 'up'"),
        ({"direction": ["up"] * 6}, r"expected entries in \{-1, 0, 1\}, got 'up'"),
        ({"direction": "up"}, r"expected entries in \{-1, 0, 1\}, got 'up'"),
        ({"direction": {"income": 1}}, "expected to be given the names of the 6 columns too"),
        ({"direction": {6: 1}}, "direction: expected columns 0 to 5, got 6"),
        ({"direction": {-1: 1}}, "direction: expected columns 0 to 5, got -1"),
        ({"direction": {True: 1}}, "direction: expected columns 0 to 5, got True"),
        ({"direction": {1: 2}}, r"expected entries in \{-1, 0, 1\}, got 2"),
        ({"direction": {1: (1, 0), 2: (1,)}}, "a number for each column, or"),
        (
            {"direction": {"incme": 1}, "columns": NAMES},
            "direction: expected names of columns, got 'incme'; the nearest is 'income'",
        ),
        (
            {"direction": {3: 1}, "columns": NAMES},
            "expected names of columns, got 3; column 3 is called 'years'",
        ),
        ({"direction": {"INCOME": 1}, "columns": NAMES}, "got 'INCOME'; the nearest is 'income'"),
        ({"direction": {3: 1}, "columns": set(NAMES)}, "a sequence of names, got set"),
        ({"direction": {3: 1}, "margin": math.nan}, "margin: expected finite numbers, got nan"),
        ({"direction": {3: 1}, "margin": {3: math.inf}}, "margin: expected finite numbers"),
        (
            {"direction": {3: 1}, "margin": torch.zeros(1, requires_grad=True)},
            "margin: expected numbers, got a tensor that wants a gradient",
        ),
        ({"direction": {3: 1}, "columns": NAMES[:5]}, "columns: expected 6 names.*got 5"),
        ({"direction": {3: 1}, "columns": ("a",) * 6}, "each name once, got 'a' twice"),
        ({"direction": {3: 1}, "columns": "abcdef"}, "a sequence of names, got str"),
        ({"direction": {3: 1}, "margin": {2: 0.1}}, "constrained columns, got 2, which is free"),
        ({"direction": {3: 1}, "margin": {3: "a"}}, "margin: expected numbers, got 'a'"),
        (
            {"direction": {3: 1}, "margin": (0.1, 0.2)},
            r"margin: expected a scalar, \(k,\) = \(1,\)",
        ),
        ({"direction": {3: 1}, "margin": [[0.1]] * 3}, r"margin: expected a scalar.*\(2, 1\)"),
        ({"direction": {3: 1}, "margin": None}, "margin: expected a number, got NoneType"),
    ],
)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_sentences(options: dict[str, Any], sentence: str, backend: str) -> None:
    with pytest.raises((ValueError, TypeError), match=sentence) as caught:
        fused_mono_penalty(NET, X, **({"backend": backend} | options))
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"columns": [1, 1]}, "one or more columns, each once"),
        ({"columns": []}, "one or more columns, each once"),
        ({"columns": 3}, "columns: expected a sequence of columns, got int"),
        ({"columns": "income"}, "columns: expected a sequence of columns, got str"),
        ({"columns": ["income"]}, "the names of the 6 columns too"),
        ({"columns": ["yers"], "names": NAMES}, "the nearest is 'years'"),
        ({"columns": [1], "names": NAMES[:2]}, "names: expected 6 names"),
        ({"names": NAMES[:2]}, "names: expected 6 names"),
        ({"names": NAMES[:1], "x2": X[:, :1]}, "names: expected none beside x2"),
        ({"columns": [1], "x2": X[:, :1]}, "columns: expected none beside x2"),
    ],
)
def test_sentences_of_slopes(arguments: dict[str, Any], sentence: str) -> None:
    with pytest.raises((ValueError, TypeError), match=sentence):
        value_and_jacobian(NET, X, **arguments)


def test_a_network_of_another_width_and_an_input_without_columns() -> None:
    with pytest.raises(ValueError, match="x1: expected 6 columns, the inputs of mlp's first layer"):
        value_and_jacobian(NET, X[:, :4])
    with pytest.raises(ValueError, match="x1: expected at least one column"):
        value_and_jacobian(NET, X[:, :0])


# --- margins and weights --------------------------------------------------------------------------


@pytest.mark.parametrize("general", [False, True])
def test_margins_of_each_constraint(general: bool) -> None:
    net = mlp(6, 0, 2)
    module: nn.Module = General(net) if general else net
    x = torch.randn(ROWS, 6, dtype=torch.float64, requires_grad=True)
    inputs = [x, *net.parameters()]
    table = torch.tensor([[1, -1, 0], [1, 1, -1]])
    signs = torch.zeros(2, 6, dtype=torch.int64)
    signs[:, [1, 2, 5]] = table
    J = truth(net, x)[1][..., [1, 2, 5]]
    for margin in (0.1, (0.1, 0.4, -0.2), ((0.1, 0.4, -0.2), (0.5, 0.0, 0.3))):
        asked = torch.tensor(margin, dtype=torch.float64)
        for hinge in ("linear", "squared"):
            want = oracle_penalties(J, table, asked, hinge)  # type: ignore[arg-type]
            mix = torch.rand_like(want)
            slopes = gradients((truth_of(net, x, table, asked, hinge) * mix).sum(), *inputs)
            for way in ways(module, x):
                options = {"direction": signs, "hinge": hinge} | way
                got = fused_mono_penalty(module, x, margin=margin, reduction="none", **options)
                assert_same([got], [want])
                assert_same(gradients((got * mix).sum(), *inputs), slopes)
                mean = fused_mono_penalty(module, x, margin=asked, reduction="mean", **options)
                assert_same([mean], [want.sum() / (5 * ROWS)])


def truth_of(net: nn.Module, x: Tensor, table: Tensor, margin: Tensor, hinge: str) -> Tensor:
    J = truth(net, x)[1][..., [1, 2, 5]]
    return oracle_penalties(J, table, margin, hinge)  # type: ignore[arg-type]


@pytest.mark.parametrize("backend", BACKENDS)
def test_weights_of_each_row(backend: str) -> None:
    net, signs = mlp(6, 0, 2), SCATTERED["apart"]
    x = torch.randn(4, 5, 6, dtype=torch.float64)
    for rows in (x.reshape(20, 6), x):
        weight = torch.rand(rows.shape[:-1], dtype=torch.float64, requires_grad=True)
        each = fused_mono_penalty(net, rows, direction=signs, reduction="none", backend=backend)
        want = (each * weight[..., None, None]).sum()
        for w in (weight, weight.detach()):
            got = fused_mono_penalty(net, rows, direction=signs, weight=w, backend=backend)
            assert_same([got], [want])
        got = fused_mono_penalty(net, rows, direction=signs, weight=weight, backend=backend)
        assert_same(gradients(got, weight), gradients(want, weight))
    with pytest.raises(ValueError, match="one for each row or broadcasts"):
        fused_mono_penalty(net, x[0, :2], direction=signs, weight=torch.rand(2).double())
    for bad in (-0.5, -torch.rand(20).double(), torch.tensor(-1.0).double()):
        with pytest.raises(ValueError, match="weight: expected none below 0, got -"):
            fused_mono_penalty(net, x.reshape(20, 6), direction=signs, weight=bad, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_mean_over_nothing_is_zero(backend: str) -> None:
    net = mlp(6, 0, 2)
    empty = fused_mono_penalty(net, X[:0], direction={1: 1}, reduction="mean", backend=backend)
    free = fused_mono_penalty(
        net, X[:, :5], X[:, 5:], direction=0, reduction="mean", backend=backend
    )
    for penalty in (empty, free):
        assert penalty == 0
        assert all(not g.any() for g in gradients(penalty, *net.parameters()))


# --- the general path -----------------------------------------------------------------------------


@pytest.mark.parametrize("D", [1, 3])
def test_the_general_path_compacts_scattered_columns(D: int) -> None:
    torch.manual_seed(4)
    net = General(mlp(6, 0, D))
    x = torch.randn(60, 6, dtype=torch.float64, requires_grad=True)
    inputs = [x, *net.parameters()]
    J = truth(net, x)[1][..., [1, 3]]
    # Between two slopes: of one that is the margin itself rounding would say whether it violates.
    margin = (J.detach() * torch.tensor([1, -1])).flatten().sort().values[5:7].mean().item()
    y, J = truth(net, x)
    want_penalty = oracle_penalties(J[..., [1, 3]], torch.tensor([1, -1]), margin).sum()
    want = gradients(y.square().sum() + want_penalty, *inputs)
    with (
        mock.patch.dict(compaction.WORTHWHILE, cpu=0),
        mock.patch.object(compaction, "_of_pairs", wraps=compaction._of_pairs) as pairs,
    ):
        y, penalty = fused_mono_penalty(
            net, x, direction=SCATTERED["apart"], margin=margin, return_output=True
        )
        got = gradients(y.square().sum() + penalty, *inputs)
    assert pairs.call_count == 1
    assert_same([penalty], [want_penalty])
    assert_same(got, want)


class Sliced(nn.Module):
    """A program that leaves the columns 0 and 3 alone."""

    def __init__(self) -> None:
        super().__init__()
        self.near, self.far = nn.Linear(2, 3), nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        gate, rest = x[:, 0:4:3].tanh(), x[:, 1:3]  # the gate goes nowhere
        h = torch.cat([self.near(rest), gate], 1)
        y: Tensor = self.far(h[:, :3]) + x[:, 4:].sum(1, keepdim=True)
        return y


def test_a_column_that_a_program_does_not_use_is_said() -> None:
    net, names = Sliced().double(), list("abcdef")
    asked: dict[str, Any] = {"direction": dict.fromkeys("abdf", 1), "columns": names}
    sentence = "in columns a, d every slope of mlp (Sliced) is exactly 0, since its forward does"
    assert plan(net, X, **asked).backend == "cpu"
    assert [sentence in said for said in plan(net, X, **asked).doubts] == [True]
    with pytest.warns(RuntimeWarning, match="^x1: " + re.escape(sentence)) as caught:
        fused_mono_penalty(net, X, **asked)
    assert caught[0].filename == __file__
    assert not plan(net, X, direction={1: 1, 4: -1}).doubts
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        MonotonePenalty(net, **asked)(X)  # said once
        fused_mono_penalty(Sliced().double(), X, direction={1: 1, 4: -1})
    x = X.clone().requires_grad_()
    (g,) = torch.autograd.grad(net(x).sum(), x)
    assert [c for c in range(6) if not g[:, c].any()] == [0, 3]


@pytest.mark.parametrize("compiled", [False, True])
def test_a_column_without_a_derivative_is_named(compiled: bool) -> None:
    class Rounds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 1).double()

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.linear(torch.cat([x[:, :2], x[:, 2:3].round(), x[:, 3:]], 1))
            return y if y.sum() < 1e9 else -y

    def penalty(net: nn.Module, **asked: Any) -> Tensor:
        found: Tensor = fused_mono_penalty(net, X[:, :4], **asked)
        return found

    if compiled:
        torch._dynamo.reset()
        penalty = torch.compile(penalty, backend="aot_eager")
    with pytest.warns(RuntimeWarning, match="x1: in column 2 every slope") as caught:
        penalty(Rounds(), direction=(0, 1, 1, 0))
    assert compiled or caught[0].filename == __file__
    with pytest.warns(RuntimeWarning, match="x1: in column debt every slope"):
        penalty(Rounds(), direction={"debt": 1}, columns=("age", "income", "debt", "years"))


# --- modules, reports and proofs ------------------------------------------------------------------


def test_what_is_constrained_travels_with_the_module() -> None:
    module = MonotonePenalty(
        mlp(6, 0, 1), direction=Series({"income": 1, "years": -1}), columns=list(NAMES),
        margin={"years": torch.tensor(0.25)},
    )  # fmt: skip
    y, penalty = module(X)
    text = repr(module)
    assert "direction={'income': 1, 'years': -1}" in text
    assert "columns=('age', 'income'," in text
    assert "margin={'years': 0.25}" in text
    other = MonotonePenalty(mlp(6, 0, 1), direction=(1, 0, 0, 0, 0, 0))
    state = module.state_dict()
    other.load_state_dict(state)
    assert_same(other(X), (y, penalty), 0)
    assert repr(other) == text
    del state["_extra_state"]  # what an earlier version saved
    third = MonotonePenalty(mlp(6, 0, 1), direction=(0, 1, 0, -1, 0, 0), margin=(0.0, 0.25))
    third.load_state_dict(state)
    assert_same(third(X), (y, penalty), 0)
    whole = nn.Sequential(nn.Identity(), module)
    whole.load_state_dict(whole.state_dict())


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"direction": "up"}, "direction: expected entries in"),
        ({"direction": {"incme": 1}, "columns": NAMES}, "direction: .*nearest is 'income'"),
        (
            {"direction": {"debt": 1}, "columns": NAMES, "margin": {"dept": 1}},
            "margin: .*nearest is 'debt'",
        ),
        ({"hinge": "cubic"}, "hinge: expected one of"),
        ({"reduction": "average"}, "reduction: expected one of"),
        ({"mode": "forward"}, "mode: expected one of"),
        ({"backend": "cuda"}, "backend: expected one of"),
        ({"batch_stats": True}, "batch_stats: expected one of"),
        ({"weight": [1.0, 2.0]}, "weight: expected a number or a tensor, got list"),
        ({"weight": -1.0}, "weight: expected none below 0, got -1"),
        ({"mlp": None}, "mlp: expected an nn.Module, got NoneType"),
    ],
)
def test_a_module_says_at_once_what_is_wrong(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises((ValueError, TypeError), match=f"^{sentence}"):
        MonotonePenalty(**({"mlp": NET} | options))


def test_the_state_can_be_loaded_as_weights_alone(tmp_path: Any) -> None:
    module = MonotonePenalty(mlp(6, 0, 1), direction={"income": 1}, columns=NAMES)
    torch.save(module.state_dict(), tmp_path / "state.pt")
    other = MonotonePenalty(mlp(6, 0, 1), direction={0: 1})
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert other.direction == {"income": 1}


def test_the_audit_speaks_of_names() -> None:
    net, x = mlp(6, 0, 2, dtype=torch.float32), torch.randn(40, 6)
    asked: dict[str, Any] = {"direction": {"income": 1, "rooms": -1}, "margin": {"rooms": 0.1}}
    report = audit(net, x, columns=NAMES, **asked)
    J = truth(net, x)[1][..., [1, 4]].detach() * torch.tensor([1, -1])
    assert_same([report.worst_slope], [J.amin(0)], 1e-5)
    assert_same([report.rate], [(torch.tensor([0.0, 0.1]) > J).float().mean(0)], 1e-5)
    assert report.columns == (1, 4)
    assert report.labels == ("income", "rooms")
    frame = report.to_frame()
    assert sorted(frame["column"]) == ["income"] * 2 + ["rooms"] * 2
    printed = str(report).splitlines()[-4:]
    assert [line.split()[1] for line in printed] == frame["column"]
    for d, column, row, at in zip(
        *(frame[name] for name in ("output", "column", "worst_row", "worst_x")), strict=True
    ):
        assert row == report.worst_row[d, report.labels.index(column)]
        assert at == x[row, NAMES.index(column)]
    assert audit(net, Frame(x, NAMES), **asked).to_dict() == report.to_dict()
    halves = audit(
        net, Frame(x[:, :4], NAMES[:4]), Frame(x[:, 4:], NAMES[4:]), direction={"rooms": -1}
    )
    assert halves.labels == ("rooms", "size")
    assert_same([halves.worst_slope[:, 0]], [report.worst_slope[:, 1]], 0)
    numbers = audit(net, x, direction={1: 1, 4: -1}, margin={4: 0.1}, attack=True, sample=30)
    assert numbers.labels == (1, 4)
    assert numbers.attacked is not None
    assert (numbers.attacked.worst_slope <= numbers.worst_slope + 1e-4).all()


def test_tables_as_pandas_has_them() -> None:
    """Bools are numbers, a missing one is NaN, and what is none is named; x2 may be a Series."""
    pd = pytest.importorskip("pandas")
    net, table = mlp(6, 0, 2, dtype=torch.float32), pd.DataFrame(X.numpy(), columns=NAMES)
    table["age"] = table["age"] > 0
    table["debt"] = pd.array([None, 1, 2, 3, 4], dtype="Int64")
    asked: dict[str, Any] = {"direction": {"income": 1}, "steps": 0}
    x = torch.tensor(table.astype(float).to_numpy(), dtype=torch.float32)
    assert audit(net, table, **asked).to_dict() == audit(net, x, columns=NAMES, **asked).to_dict()
    assert audit(net, table, **asked).nan_row == 0
    with pytest.raises(TypeError, match=r"^x1: expected numbers in every column, got 'rooms' of"):
        audit(net, table.assign(rooms="3"), **asked)
    series = audit(net, table[list(NAMES[:5])], table["size"], direction=1, steps=0)
    assert series.labels == ("size",)
    with pytest.raises(TypeError, match="x1: expected a tensor, got Series"):
        audit(net, table["size"], direction=1)


def test_the_audit_names_the_first_row_with_nan() -> None:
    net, x = mlp(6, 0, 1, dtype=torch.float32), torch.randn(40, 6)
    x[17, 2] = x[30, 1] = math.nan
    report = audit(net, x, direction={4: 1}, sample=20, attack=True)
    assert (report.nan_row, report.nan_rows) == (17, 2)
    assert "2 rows with NaN among the inputs, first row 17" in str(report)
    assert report.sampled is not None
    assert report.sampled.nan_row == -1
    assert "NaN among" not in str(report.sampled)


def test_a_plot_shows_names() -> None:
    pytest.importorskip("matplotlib")
    from monokernel import plot_audit

    net, x = mlp(6, 0, 2, dtype=torch.float32), torch.randn(40, 6)
    asked: dict[str, Any] = {"direction": {"income": 1, "rooms": -1}, "margin": {"rooms": 0.1}}
    figure = plot_audit(net, x, columns=NAMES, outputs=["low", "high"], sample=20, **asked)
    titles = " ".join(axis.get_title(loc="left") for axis in figure.axes)
    assert "high must rise with income" in titles
    assert "low must fall with rooms" in titles
    assert "x[4]" in plot_audit(net, x, direction={4: -1}).axes[0].get_title(loc="left")
    with pytest.raises(ValueError, match="columns: expected 6 names"):
        plot_audit(net, x, columns=NAMES[:4], **asked)
    with pytest.raises(ValueError, match="outputs: expected 2 names"):
        plot_audit(net, x, columns=NAMES, outputs=["low"], **asked)


def test_proofs_speak_of_names(tmp_path: Any) -> None:
    net = mlp(4, 0, 1, hidden=(5,))
    names = NAMES[:4]
    found = certify(net, -1.0, 1.0, direction={"debt": 1}, columns=names, margin=-50.0)
    plain = certify(net, (-1.0,) * 4, 1.0, direction=(0, 0, 1, 0), margin=-50.0)
    assert_same([found.lower_bound[:, 2]], [plain.lower_bound[:, 2]], 0)
    assert found.names == names
    assert "   0   debt   +1" in str(found)
    assert "free columns age: [-1, 1], income" in str(found)
    found.save(tmp_path / "proof.json")
    assert type(found).load(tmp_path / "proof.json").names == names
    model = MonotoneNet(net, -1.0, 1.0, direction={"debt": 1}, columns=names)
    assert model.direction == ((0, 0, 1, 0),)
    assert "columns=('age'," in repr(model)
    assert MonotoneNet(net, (-1.0,) * 4, 1.0, direction={2: 1}).direction == model.direction
    with pytest.raises(ValueError, match="the nearest is 'debt'"):
        MonotoneNet(net, -1.0, 1.0, direction={"debts": 1}, columns=names)
    with pytest.raises(ValueError, match="the nearest is 'debt'"):
        certify(net, -1.0, 1.0, direction={"debts": 1}, columns=names)
    assert MonotoneNet(net, -1.0, 1.0, direction={2: 1}).direction == model.direction
    with pytest.raises(ValueError, match="columns: expected the names of all columns"):
        MonotoneNet(nn.Tanh(), -1.0, 1.0, direction={2: 1})


# --- under other regimes --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["standardised", "pre-norm LayerNorm", "DCN-v2"])
def test_a_compiled_step(name: str) -> None:
    torch._dynamo.reset()
    net = network(name, D_IN, 2, WIDTH, torch.float64)
    module = MonotonePenalty(
        net, direction={"income": 1, "years": -1}, columns=NAMES, margin={"years": 0.3}
    )

    def loss(x: Tensor) -> Tensor:
        y, penalty = module(x)
        slopes = value_and_jacobian(net, x, columns=[5, 2])[1]
        return y.square().sum() + penalty + (slopes * slopes[..., :1]).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for N in (ROWS, ROWS + 4):
        x = torch.randn(N, D_IN, dtype=torch.float64, requires_grad=True)
        want, got = loss(x), compiled(x)
        assert_same([got], [want])
        inputs = [x, *net.parameters()]
        assert_same(gradients(got, *inputs), gradients(want, *inputs))


def test_vmap_goes_over_scattered_columns() -> None:
    net, x = mlp(6, 0, 2), torch.randn(3, 4, 6, dtype=torch.float64)

    def penalty(x: Tensor) -> Tensor:
        return fused_mono_penalty(net, x, direction=SCATTERED["ends"], margin=(0.1, 0.2))

    assert_same([torch.vmap(penalty)(x)], [torch.stack([penalty(t) for t in x])])
    assert_same(
        [torch.func.grad(penalty)(x[0])],
        gradients(penalty(rows := x[0].requires_grad_()), rows),
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype) -> None:
    net, x = network("pre-norm LayerNorm", D_IN, 2, 12), torch.randn(ROWS, D_IN)
    want = value_and_jacobian(net, x, columns=[4, 1])[1]
    with torch.autocast("cpu", dtype):
        got = value_and_jacobian(net, x, columns=[4, 1])[1]
    assert (got - want).abs().max() < 0.1 * want.abs().max()


@pytest.mark.parametrize("general", [False, True])
def test_tensors_of_inference_mode(general: bool) -> None:
    net = mlp(6, 0, 1)
    module: nn.Module = General(net) if general else net
    want = fused_mono_penalty(module, X, direction={1: 1}, margin=1.0)
    with torch.inference_mode():
        x = X.clone()
        assert_same([fused_mono_penalty(module, x, direction={1: 1}, margin=1.0)], [want])
        made = mlp(6, 0, 1)
    got = fused_mono_penalty(module, x, direction={1: 1}, margin=1.0)
    assert_same(gradients(got, *net.parameters()), gradients(want, *net.parameters()))
    bad: nn.Module = General(made) if general else made
    for backend in ("auto", "reference") if general else ("auto", "torch"):
        with pytest.raises(RuntimeError, match="mlp: expected parameters that autograd may keep"):
            fused_mono_penalty(bad, X, direction={1: 1}, backend=backend)


# --- the pieces -----------------------------------------------------------------------------------


def test_runs_take_and_spread() -> None:
    assert runs_of((1, 2, 5, 7, 8)) == ((1, 0, 2), (5, 2, 1), (7, 3, 2))
    assert runs_of(last_columns(6, 2)) == ((4, 0, 2),)
    t = torch.arange(30.0).view(3, 10)
    for columns in ((0,), (2, 3, 4), (1, 2, 5, 7, 8), (9, 3)):
        assert torch.equal(take(t, columns), t[:, list(columns)])
        assert torch.equal(take(t.t(), columns, 0), t.t()[list(columns)])
        part = take(t, columns)
        whole = spread(part, columns, 10)
        assert torch.equal(take(whole, columns), part)
        assert whole.count_nonzero() == part.count_nonzero()
        add(whole, columns, part)
        assert torch.equal(take(whole, columns), 2 * part)
    assert take(t, (2, 3, 4)).data_ptr() == t[:, 2:].data_ptr()  # no copy of neighbours


def test_what_is_kept_of_a_direction_does_not_go_stale() -> None:
    """Directions are read once; one that may change is read in every call."""
    net, x = mlp(6, 0, 1), torch.randn(9, 6, dtype=torch.float64)
    falls = fused_mono_penalty(net, x, direction={1: -1})
    by_name: dict[Any, Any] = {1: 1}
    tensor = torch.tensor([0, 1, 0, 0, 0, 0])
    entries = (0, torch.tensor(1), 0, 0, 0, 0)
    rises = fused_mono_penalty(net, x, direction=by_name)
    assert not torch.equal(rises, falls)
    for given in (by_name, tensor, entries):
        assert torch.equal(fused_mono_penalty(net, x, direction=given), rises)
    by_name[1], tensor[1] = -1, -1
    entries[1].fill_(-1)  # type: ignore[attr-defined]
    for given in (by_name, tensor, entries):
        assert torch.equal(fused_mono_penalty(net, x, direction=given), falls)
    with pytest.raises(TypeError, match="margin: expected a number, got bool"):
        fused_mono_penalty(net, x, direction={1: 1}, margin=False)
