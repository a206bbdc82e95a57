"""The report counts what it says, on the data and on sampled points, and can be read and drawn."""

from __future__ import annotations

import csv
import io
import json
import math
import warnings
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from monokernel import audit, fused_mono_penalty, plot_audit, probing
from tests.support import WITHOUT_DERIVATIVE, Reads, mlp, points, quantized


class Slopes(nn.Module):
    """y = [x1·z0, -z0 + z1²]: slopes ∂y/∂z = [[x1, 0], [-1, 2·z1]], known at every row."""

    def forward(self, x: Tensor) -> Tensor:
        x1, z0, z1 = x.unbind(-1)
        return torch.stack([x1 * z0, -z0 + z1.square()], -1)


X1 = torch.tensor([[1.0], [-3.0], [2.0], [-1.0]])
X2 = torch.tensor([[0.0, 1.0], [0.5, -2.0], [1.0, 3.0], [0.2, 0.1]])


def test_rates_worst_slopes_rows_and_points() -> None:
    report = audit(Slopes(), X1, X2, direction=[[1, 0], [-1, 1]])
    nan = math.nan
    assert report.rows == 4
    torch.testing.assert_close(report.rate, torch.tensor([[0.5, nan], [0.0, 0.25]]), equal_nan=True)
    torch.testing.assert_close(
        report.worst_slope, torch.tensor([[-3.0, nan], [1.0, -4.0]]), equal_nan=True
    )
    assert report.worst_row[0].tolist() == [1, -1]
    assert report.worst_row[1, 1] == 1
    assert report.worst_point[0, 0].tolist() == [-3.0, 0.5, -2.0]
    assert report.worst_point[0, 1].isnan().all()
    assert report.violation_rate == pytest.approx(0.25)
    assert report.worst == -4.0
    assert report.sampled is None


def test_margin_and_nan_count_as_violations() -> None:
    assert audit(Slopes(), X1, X2, direction=[[0, 0], [-1, 0]], margin=1.5).violation_rate == 1.0
    x1 = X1.clone()
    x1[3] = math.nan
    report = audit(Slopes(), x1, X2, direction=[[1, 0], [0, 0]])
    assert report.violation_rate == 0.5
    assert math.isnan(report.worst)
    assert report.worst_row[0, 0] == 3


def test_any_leading_shape_and_no_free_inputs() -> None:
    mlp = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 3))
    flat = audit(mlp, X2[:, :0], X2)
    shaped = audit(mlp, X2[:, :0].reshape(2, 2, 0), X2.reshape(2, 2, 2))
    assert flat.to_dict() == shaped.to_dict()
    assert flat.rate.shape == (3, 2)


def test_empty_batch() -> None:
    report = audit(Slopes(), X1[:0], X2[:0])
    assert report.rows == 0
    assert str(report).startswith("0 rows: no slope to count")
    assert math.isnan(report.violation_rate)
    assert report.worst_point.shape == (2, 2, 3)
    assert (report.worst_row == -1).all()


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(1)
    mlp = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)).double()
    x1, x2 = torch.randn(700, 2).double(), torch.randn(700, 2).double()
    whole = audit(mlp, x1, x2)
    monkeypatch.setattr(import_module("monokernel.audit"), "SLOPES_AT_A_TIME", 40)
    assert audit(mlp, x1, x2).worst_row.tolist() == whole.worst_row.tolist()
    torch.testing.assert_close(audit(mlp, x1, x2).rate, whole.rate)


def test_on_sampled_points_violations_between_the_data_are_found() -> None:
    """∂y/∂z1 = 2·z1 is right on all data, z1 >= 0, but not at every point of the wider box."""
    x2 = X2.abs()
    seed = torch.Generator().manual_seed(0)
    want = [[0, 0], [0, 1]]
    clean = audit(Slopes(), X1, x2, direction=want, sample=500, generator=seed)
    assert clean.violation_rate == 0
    assert clean.sampled is not None
    assert clean.sampled.rows == 500
    assert clean.sampled.violation_rate == 0
    noisy = audit(Slopes(), X1, x2, direction=want, sample=500, strategy="noise", generator=seed)
    assert noisy.violation_rate == 0
    assert noisy.sampled is not None
    assert 0 < noisy.sampled.violation_rate < 0.5


def test_evaluation_mode_for_the_audit_only() -> None:
    mlp = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(0.9), nn.Linear(8, 1))
    mlp[1].eval()
    report = audit(mlp, X1, X2)
    assert audit(mlp, X1, X2).to_dict() == report.to_dict()
    assert [m.training for m in mlp] == [True, False, True, True]
    assert mlp.training


def test_text_table() -> None:
    report = audit(Slopes(), X1, X2, direction=[[1, 0], [-1, 1]], sample=10)
    first, second, _, header, *entries = str(report).split("\n\n")[0].splitlines()
    assert first == "4 rows: 25.00% of the constrained slopes violate, worst slope -4"
    assert second == "4 of them moved along each column: 50.00% fall on the way, deepest by 4"
    assert header.split() == [
        *("output", "column", "sign", "violating", "worst", "slope", "row", "x", "there"),
        *("falling", "drop", "from", "x", "to", "x"),
    ]
    # The worst first: z1², which falls in every row, then x1·z0 with its two negative x1.
    assert entries[0].split()[:7] == ["1", "1", "+1", "25.00%", "-4", "1", "-2"]
    assert entries[0].split()[7] == "100.00%"
    assert entries[1].split() == [
        "0",
        "0",
        "+1",
        "50.00%",
        "-3",
        "1",
        "0.5",
        "50.00%",
        "3",
        "0",
        "1",
    ]
    assert entries[2].split() == ["1", "0", "-1", "0.00%", "1", "0", "0", "0.00%"]
    assert len(entries) == 3
    assert "10 sampled points: " in str(report)


def test_the_text_is_at_most_a_screen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of whatever network: with every part, many constraints, long names and sentences."""
    monkeypatch.setattr(import_module("monokernel.audit"), "STARTS", 1)
    names = [f"a column with a very long name, number {c}" for c in range(12)]
    x = torch.randn(9, 12)
    report = audit(
        Hides(), x, direction=[1] * 12, columns=names, outputs=names[:3], sample=9, attack=True
    )
    lines = str(report).splitlines()
    assert len(lines) <= 24
    assert max(map(len, lines)) <= 140
    assert any("more constraints, none worse" in line for line in lines)
    assert "a column w… number 3" in str(report)
    assert len(report.to_frame()["column"]) == 3 * 3 * 12


class Hides(nn.Module):
    """Outputs that read half of the columns by their roundings, and average over the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([x[..., :6].round(), x[..., 6:]], -1)
        y: Tensor = self.linear(x)
        return y - y.mean(0)


def test_to_dict_is_plain_data() -> None:
    report = audit(Slopes(), X1, X2, direction=[[1, 0], [-1, 1]], sample=10)
    plain = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert plain["rate"] == [[0.5, None], [0.0, 0.25]]
    assert plain["direction"] == [[1, 0], [-1, 1]]
    assert plain["worst_point"][1][1] == [-3.0, 0.5, -2.0]
    assert plain["sampled"]["rows"] == 10


@pytest.mark.parametrize("margin", [0.0, 0.5])
@pytest.mark.parametrize("kind", WITHOUT_DERIVATIVE)
def test_a_derivative_that_says_nothing_is_no_all_clear(kind: str, margin: float) -> None:
    net = Reads(WITHOUT_DERIVATIVE[kind])
    x1, x2 = points(50, 3, 2, torch.float32)
    report = audit(net, x1, 3 * x2, margin=margin, sample=40)
    assert report.sampled is not None
    for part in (report, report.sampled):
        assert part.blind.tolist() == [[False, True], [False, True]]
        assert part.rate.isnan().tolist() == part.blind.tolist()
        assert part.worst_slope.isnan().tolist() == part.blind.tolist()
        assert part.worst_row[:, 1].tolist() == [-1, -1]
        assert math.isnan(part.violation_rate)
        assert math.isnan(part.worst)
    plain = report.to_dict()
    assert plain["blind"] == [[False, True], [False, True]]
    assert plain["rate"][0][1] is None
    assert plain["rate"][0][0] == report.rate[0, 0].item()
    assert not report.all_clear
    assert "In column 1 the derivative is 0 in every row, yet y changes" in str(report)
    for part, text in zip((report, report.sampled), str(report).split("\n\n"), strict=True):
        assert "UNKNOWN how many of the constrained slopes violate" in text
        entries = [line.split() for line in text.splitlines() if line[:8].strip().isdecimal()]
        assert [e[3:5] for e in entries[:2]] == [["unknown", "unknown"]] * 2
        assert all("%" in e[3] for e in entries[2:])
        # Steps see what slopes do not: y falls with what it subtracts.
        assert part.steps is not None
        assert (part.steps.rate[:, 1] == 1).all()


@pytest.mark.parametrize("layers", [[nn.Linear], ["0"], ["4"]])
@pytest.mark.filterwarnings("ignore:quantized")
def test_a_quantised_network_is_no_all_clear(layers: list[Any]) -> None:
    report = audit(quantized(layers), *points(50, 3, 2, torch.float32))
    assert report.blind.all()
    assert "In columns 0, 1 the derivative is 0" in str(report)
    entries = [line.split() for line in str(report).splitlines()[-4:]]
    assert all(e[3:5] == ["unknown", "unknown"] for e in entries)
    assert report.steps is not None
    assert not report.steps.rate.isnan().any()


@pytest.mark.parametrize("trained", [False, True])
def test_an_output_without_any_gradient_is_no_all_clear(trained: bool) -> None:
    class Detached(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(2), requires_grad=trained)

        def forward(self, x: Tensor) -> Tensor:
            return self.scale * x[..., -2:].detach()

    report = audit(Detached(), *points(50, 3, 2, torch.float32))
    assert report.blind.tolist() == [[True, False], [False, True]]
    assert report.worst_slope[0, 1] == 0


def test_an_output_that_is_a_view_of_the_input() -> None:
    class View(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.detach()[..., -2:]

    report = audit(View(), *points(50, 3, 2, torch.float32))
    assert report.blind.tolist() == [[True, False], [False, True]]


def test_only_what_is_constrained_and_hidden_is_blind() -> None:
    class Half(nn.Module):
        """The first output reads the column, the second its rounding, the third not at all."""

        def forward(self, x: Tensor) -> Tensor:
            c = x[..., -1]
            return torch.stack([c, c.round(), x[..., 0]], -1)

    x1, x2 = points(50, 3, 2, torch.float32)
    report = audit(Half(), x1, x2)
    assert report.blind.tolist() == [[False, False], [False, True], [False, False]]
    free = audit(Half(), x1, x2, direction=[[1, 1], [1, 0], [1, 1]])
    assert not free.blind.any()
    assert free.violation_rate == 0


def dead_column() -> nn.Sequential:
    net = mlp(3, 2, 2, dtype=torch.float32)
    with torch.no_grad():
        net[0].weight[:, -1] = 0
    return net


class Constant(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.new_ones(*x.shape[:-1], 2)


@pytest.mark.parametrize(
    "net",
    [
        dead_column(),
        nn.Sequential(dead_column(), nn.LayerNorm(2), nn.Dropout(0.5)),
        Reads(lambda net, c: 0 * c),
        Reads(lambda net, c: net.table.weight[0]),
        Constant(),
    ],
)
def test_a_column_that_y_does_not_read_has_a_true_slope_of_zero(net: nn.Module) -> None:
    direction = [[0, 1], [0, 1]]
    for N in (1, 50):
        report = audit(net.train(), *points(N, 3, 2, torch.float32), direction=direction)
        assert not report.blind.any()
        assert report.flat.tolist() == [[False, True]] * 2
        assert "In column 1 every slope is 0 and y does not move with it." in str(report)
        assert (report.violation_rate, report.worst) == (0, 0)


@pytest.mark.parametrize("places", [[0.0, 4.0], [0.0, 4.0, 5.0, 6.0]])
def test_a_chain_that_is_flat_at_every_row_and_not_between(places: list[float]) -> None:
    """y rises from 1 to 2 and falls from 2 to 3; rows lie elsewhere."""
    net = nn.Sequential(nn.Linear(1, 3), nn.ReLU(), nn.Linear(3, 1))
    for p, values in zip(
        net.parameters(),
        ([1.0, 1.0, 1.0], [-1.0, -2.0, -3.0], [1.0, -2.0, 1.0], [0.0]),
        strict=True,
    ):
        p.data = torch.tensor(values).reshape(p.shape)
    x2 = torch.tensor(places)
    assert audit(net, torch.empty(len(x2), 0), x2).blind.all()
    assert audit(net, torch.empty(2, 0), torch.tensor([4.0, 6.0])).violation_rate == 0


@pytest.mark.parametrize("value", [0.0, 3.0, -2.0, 0.4])
@pytest.mark.parametrize("kind", ["embedding", "rounding", "step", "detach"])
def test_a_column_of_one_value(kind: str, value: float) -> None:
    net = Reads(WITHOUT_DERIVATIVE[kind])
    for N in (1, 7):
        x1, x2 = points(N, 3, 2, torch.float32)
        x2[:, 1] = value
        assert audit(net, x1, x2).blind.tolist() == [[False, True], [False, True]]


def test_a_network_that_refuses_a_value_reads_it() -> None:
    """Categories count from 1 here: at 0 the table is asked for entry -1."""
    net = Reads(lambda net, c: net.table(c.squeeze(-1).long() - 1))
    x1, x2 = points(7, 3, 2, torch.float32)
    x2[:, 1] = 4
    assert audit(net, x1, x2).blind.tolist() == [[False, True], [False, True]]


def test_a_value_that_is_nan_everywhere_does_not_move() -> None:
    net = Reads(lambda net, c: torch.where(net.smooth.weight[:, 0] > 9, c.round(), torch.nan))
    report = audit(net, *points(7, 3, 2, torch.float32))
    assert not report.blind.any()
    assert report.violation_rate == 1


def test_probing_is_bounded_and_only_for_columns_in_doubt() -> None:
    calls: list[int] = []
    net = Reads(WITHOUT_DERIVATIVE["rounding"])
    net.register_forward_hook(lambda m, args, out: calls.append(len(args[0])))
    x1, x2 = points(3000, 3, 2, torch.float32)
    audit(net, x1, x2, steps=0)
    mixing = 64 + 64 + 32 + 32
    assert sum(calls) <= mixing + 3000 + 18 * 256
    calls.clear()
    audit(net, x1, x2, direction=[1, 0], steps=0)
    assert sum(calls) == mixing + 3000
    calls.clear()
    report = audit(net, x1, x2, direction=[1, 0], steps=20)
    assert report.steps is not None
    assert all(10 < v <= 20 for v in report.steps.values)
    evaluated = 1024 * (1 + report.steps.values[0])
    assert report.steps.evaluations == sum(calls) - mixing - 3000 == evaluated


def test_the_audit_warns_in_its_report_alone_and_leaves_the_penalty_its_warning() -> None:
    net, (x1, x2) = Reads(WITHOUT_DERIVATIVE["step"]), points(7, 3, 2, torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        audit(net, x1, x2)
    with pytest.warns(RuntimeWarning, match="audit"):
        fused_mono_penalty(net, x1, x2)


def test_plot_shows_what_is_unknown_first() -> None:
    pytest.importorskip("matplotlib")
    x1, x2 = points(50, 3, 2, torch.float32)
    for kind in WITHOUT_DERIVATIVE:
        net = Reads(WITHOUT_DERIVATIVE[kind])
        figure = plot_audit(net, x1, 3 * x2, sample=30, most=3)
        titles = [a.get_title("left") for a in figure.axes[::2]]
        unknown = "must rise with x2[1]\nunknown: its derivative says nothing"
        assert [unknown in t for t in titles] == [True, True, False]
        assert not figure.axes[0].patches  # no histogram of slopes that are none
        assert figure.axes[1].lines


def test_plot_of_sampled_points_that_are_unknown() -> None:
    """The data lie on both sides of a kink, the sampled points between them where nothing moves."""
    pytest.importorskip("matplotlib")
    net = Reads(lambda net, c: torch.where(c.abs() < 5, c.round(), c))
    x1, x2 = points(200, 3, 2, torch.float32)
    x2[:, 1] = torch.where(x2[:, 1] > 0, 5.0, -5.0)
    figure = plot_audit(net, x1, x2, sample=30, direction=[0, 1], strategy="uniform")
    title = figure.axes[0].get_title("left")
    assert title.endswith("100.0% of rows violate, unknown on sampled points; 100.0% fall along it")


def test_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    torch.manual_seed(0)
    mlp = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 3))
    x1, x2 = torch.randn(60, 2), torch.randn(60, 2)
    figure = plot_audit(mlp, x1, x2, direction=[1, -1], sample=200, most=3, columns=["age", "bmi"])
    figure.savefig(tmp_path / "audit.png")
    assert len(figure.axes) == 6
    assert (tmp_path / "audit.png").stat().st_size > 10_000
    titles = [a.get_title("left") for a in figure.axes]
    assert all("must rise with age" in t or "must fall with bmi" in t for t in titles[::2])


def test_a_plot_in_the_user_s_own_units_with_doubts_and_nan() -> None:
    pytest.importorskip("matplotlib")
    x = torch.cat([X1, X2], -1)
    x[3, 1] = math.nan
    options: dict[str, Any] = {"direction": [0, 0, 1], "outputs": ["price", "rent"], "sample": 5}
    figure = plot_audit(Slopes(), x, x_scaler=([0, 0, 10], [1, 1, 2]), y_scaler=(50, 4), **options)
    _, right = figure.axes[:2]
    xs, ys = right.lines[2].get_data()
    assert (xs[0], xs[-1]) == (10 - 2 * 2, 10 + 3 * 2)
    assert "fall along it" in figure.axes[0].get_title("left")
    assert right.lines[3].get_data()[0] == [10 - 2 * 2]  # behind the row with NaN row 1 is worst
    want = 50 + 4 * (-x[1, 1] + ((torch.tensor(xs[7]) - 10) / 2).square())
    torch.testing.assert_close(torch.tensor(ys[7]), want)
    mixes = Mixes(MIXES["mean"])
    drawn = plot_audit(mixes, *points(30, 3, 2, torch.float32))
    assert "ROWS INFLUENCE EACH OTHER" in drawn.get_suptitle()


def test_plot_of_slopes_that_are_all_equal_or_nan() -> None:
    pytest.importorskip("matplotlib")
    linear = nn.Linear(3, 1)
    plot_audit(linear, X1, X2, most=1)
    with torch.no_grad():
        linear.weight.fill_(math.nan)
    plot_audit(linear, X1, X2, most=1)


def test_plot_of_nothing_says_so() -> None:
    pytest.importorskip("matplotlib")
    with pytest.raises(ValueError, match="at least one row without NaN and one constrained"):
        plot_audit(nn.Linear(3, 1), X1, X2, direction=0)
    with pytest.raises(ValueError, match="at least one row without NaN and one constrained"):
        plot_audit(nn.Linear(3, 1), X1 * math.nan, X2)
    for options in ({"most": 0}, {"curves": 0}, {"most": -1}):
        with pytest.raises(ValueError, match=r"^(most|curves): expected a number of .* >= 1, got"):
            plot_audit(nn.Linear(3, 1), X1, X2, **options)


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.SiLU(), nn.Hardtanh()])
def test_an_attack_finds_worse_slopes_than_sampling(activation: nn.Module) -> None:
    """Within the range of the rows, and says so."""
    torch.manual_seed(3)
    net = mlp(3, 2, 2, (24, 24), activation)
    x1, x2 = torch.randn(200, 3).double(), torch.randn(200, 2).double()
    direction = [[1, 0], [-1, 1]]
    seed = torch.Generator().manual_seed(0)
    report = audit(net, x1, x2, direction=direction, sample=2000, generator=seed, attack=True)
    assert report.attacked is not None
    assert report.sampled is not None
    wanted = torch.tensor(direction) != 0
    sampled = torch.minimum(report.sampled.worst_slope, report.worst_slope)
    assert (report.attacked.worst_slope[wanted] < sampled[wanted] - 1e-3).all()
    x = torch.cat([x1, x2], -1)
    points = report.attacked.worst_point[wanted]
    assert ((points >= x.amin(0)) & (points <= x.amax(0))).all()
    assert "The attack found a worse slope than any above" in str(report)
    assert report.to_dict()["attacked"]["worst"] == report.attacked.worst


def test_an_attack_on_what_is_no_chain() -> None:
    """By the slopes' own gradients where there are any, and by chance where there are none."""
    report = audit(Slopes(), X1, X2, direction=[[0, 0], [0, 1]], attack=True)
    assert report.attacked is not None
    assert report.attacked.worst == pytest.approx(-4.0)

    class Kinked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 16).double(), nn.Linear(16, 1).double()

        def forward(self, x: Tensor) -> Tensor:
            h = torch.relu(self.a(x))
            return self.b(h) + 0.1 * torch.relu(h.sum(-1, keepdim=True))

    torch.manual_seed(1)
    x1, x2 = torch.randn(30, 1).double(), torch.randn(30, 2).double()
    found = audit(Kinked(), x1, x2, attack=True)
    assert found.attacked is not None
    assert found.attacked.worst <= found.worst
    with pytest.raises(TypeError, match=r"^attack: expected True or False, got int"):
        audit(Kinked(), x1, x2, attack=1)  # type: ignore[arg-type]


# --- finite steps ---------------------------------------------------------------------------------


def test_steps_measure_the_deepest_fall_and_where_it_is() -> None:
    """z1² falls from the left end to 0 and rises from there: by 4 over the whole data, from -2."""
    report = audit(Slopes(), X1, X2, direction=[[0, 0], [0, 1]], steps=200)
    steps = report.steps
    assert steps is not None
    assert steps.rate[1, 1] == 1
    assert steps.worst_drop[1, 1].item() == pytest.approx(4, abs=1e-2)
    assert steps.drop_from[1, 1] == -2
    assert abs(steps.drop_to[1, 1]) < 0.03
    point = torch.cat([X1, X2], -1)[steps.worst_row[1, 1]]
    assert torch.equal(steps.worst_point[1, 1], point)
    assert steps.worst_point[0].isnan().all()
    assert steps.worst_drop[0].isnan().all()
    assert steps.worst_row[0].tolist() == [-1, -1]
    # x1·z0 falls in the rows of negative x1, the deepest by 3·(1 - 0) in row 1.
    steps = audit(Slopes(), X1, X2, direction=[[1, 0], [-1, 0]]).steps
    assert steps is not None
    assert steps.rate[:, 0].tolist() == [0.5, 0]
    assert (steps.worst_drop[0, 0], steps.worst_row[0, 0]) == (3, 1)
    assert (steps.drop_from[0, 0], steps.drop_to[0, 0]) == (0, 1)
    assert (steps.worst_drop[1, 0], steps.worst_row[1, 0]) == (0, -1)
    assert steps.violation_rate == 0.25


def test_steps_of_many_columns_move_fewer_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    net, x = nn.Linear(40, 1), torch.randn(500, 40)
    monkeypatch.setattr(import_module("monokernel.steps"), "EVALUATIONS", 40 * 16 * 100)
    steps = audit(net, x, direction=[1] * 40, steps=16).steps
    assert steps is not None
    assert steps.rows == 100
    assert steps.evaluations <= 100 * (40 * 16 + 1)
    assert (steps.rate[0] == (net.weight[0] < 0)).all()


def test_steps_see_a_fall_between_the_rows_that_no_slope_shows() -> None:
    """y rises at every row and falls over the gap between them."""

    class Saw(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x - 4 * torch.relu(x - 1) + 4 * torch.relu(x - 3)

    x2 = torch.cat([torch.linspace(0, 1, 20), torch.linspace(3.1, 4, 20)])
    report = audit(Saw(), torch.empty(40, 0), x2)
    assert (report.violation_rate, report.all_clear) == (0, False)
    assert report.steps is not None
    assert report.steps.rate.item() == 1
    assert report.steps.worst_drop.item() == pytest.approx(6, abs=0.6)
    assert "STEPS DISAGREE WITH SLOPES: in column 0 no slope violates" in str(report)
    assert audit(Saw(), torch.empty(40, 0), x2, steps=0).all_clear


def test_steps_see_the_fall_of_an_activation_that_jumps() -> None:
    """5 below 0 and x above: no slope is negative, and y falls by 5."""
    net = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Threshold(0.0, 5.0))
    net[0].weight.data.fill_(1.0)
    report = audit(net, torch.empty(50, 0), torch.linspace(-1, 1, 50))
    assert report.violation_rate == 0
    assert report.steps is not None
    assert report.steps.rate.item() == 1
    assert report.steps.worst_drop.item() == pytest.approx(5, abs=0.1)
    assert not report.all_clear


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.Tanh(), nn.Hardtanh()])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_is_no_fall(activation: nn.Module, dtype: torch.dtype) -> None:
    """Of a network that rises, saturated over most of the range, where y only rounds."""
    net = mlp(0, 2, 2, (64, 64), activation, dtype=dtype)
    with torch.no_grad():
        for p in net.parameters():
            p.abs_()
    x2 = (30 * torch.randn(300, 2)).to(dtype)
    report = audit(net, x2[:, :0], x2, sample=200)
    assert report.all_clear
    assert report.steps is not None
    assert report.steps.worst == 0


@pytest.mark.parametrize(
    ("values", "taken"),
    [
        ([0.5, 0.5, 0.5], 1),  # no range
        ([-0.3, 2.1, 2.1], 2),  # a flag
        ([1.0, 2.0, 4.0], 4),  # a count: 3 lies between
        ([0.0, 0.5, 4.0], 8 + 1),
    ],
)
def test_the_values_that_a_column_takes(values: list[float], taken: int) -> None:
    seen: list[float] = []

    class Notes(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if not x.requires_grad:
                seen.extend(x[:, 0].tolist())
            return x if x.sum() < 1e9 else -x

    report = audit(
        Notes(), torch.empty(3, 0).double(), torch.tensor(values, dtype=torch.float64), steps=16
    )
    assert report.steps is not None
    assert report.steps.values == (taken,)
    assert set(seen) >= set(values)
    if all(v == round(v) for v in values):
        assert all(v == round(v) for v in seen)
    assert report.steps.rate.isnan().item() == (taken == 1)


def test_a_network_that_refuses_what_it_never_sees_is_moved_over_the_data() -> None:
    codes = [3, 7, 12]
    net = Reads(lambda net, c: net.table(torch.tensor([codes.index(v) for v in c[:, 0].tolist()])))
    x1, x2 = points(30, 3, 2, torch.float32)
    x2[:, 1] = torch.tensor(codes).float().repeat(10)
    report = audit(net, x1, x2)
    assert report.steps is not None
    assert report.steps.values[1] == 3
    assert not report.steps.rate[:, 1].isnan().any()
    assert report.blind[:, 1].all()

    def never(net: Reads, c: Tensor) -> Tensor:
        known = dict(zip(*(t.tolist() for t in (x1[:, 0], x2[:, 1])), strict=True))
        assert all(v in known.values() for v in c[:, 0].tolist())
        if len(set(c[:, 0].tolist())) < 3 and len(c) > 1:
            raise KeyError("one code in all rows")
        return c.round()

    report = audit(Reads(never), x1, x2, steps=16, direction=[0, 1])
    assert report.steps is not None
    assert not report.all_clear


def test_rows_with_nan_are_not_moved_and_a_y_that_becomes_nan_falls() -> None:
    class Root(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.where(x[:, :1] > 2, torch.nan, x[:, 1:] + x[:, :1])

    x = torch.tensor([[0.0, 1.0], [3.0, 1.0], [1.0, math.nan], [1.0, 2.0]])
    report = audit(Root(), x, direction=[1, 1])
    steps = report.steps
    assert steps is not None
    assert steps.rows == 3
    assert steps.rate[0, 0] == 1
    assert steps.worst_drop[0, 0].isnan()
    assert (report.nan_row, report.all_clear) == (2, False)
    assert "1 row with NaN among the inputs, first row 2" in str(report)
    json.dumps(report.to_dict(), allow_nan=False)


# --- rows that mix --------------------------------------------------------------------------------


class Mixes(nn.Module):
    """y of a row depends on other rows, by ``how``."""

    def __init__(self, how: Any) -> None:
        super().__init__()
        self.linear, self.how = nn.Linear(5, 2), how

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.how(self.linear(x))
        return y


MIXES = {
    "mean": lambda y: y - 0.01 * y.mean(0),
    "sum along the batch": lambda y: y.cumsum(0),
    "maximum": lambda y: y / y.abs().amax(0),
    "neighbour": lambda y: y + y.roll(1, 0),
    "rank": lambda y: y + 0.1 * y.argsort(0).argsort(0),
    "norm": lambda y: nn.functional.batch_norm(y, None, None, training=True),
}


@pytest.mark.parametrize("kind", MIXES)
def test_rows_that_influence_each_other_are_found_and_named(kind: str) -> None:
    net = nn.Sequential(nn.Linear(5, 5), nn.Sequential(Mixes(MIXES[kind]), nn.Tanh()))
    report = audit(net, *points(100, 3, 2, torch.float32), sample=20)
    assert report.mixing
    assert "ROWS INFLUENCE EACH OTHER in mlp.1.0 (Mixes): y of a row changes by" in report.doubts[0]
    first, second = str(report).splitlines()[:2]
    assert first.endswith("UNKNOWN how many of the constrained slopes violate")
    assert second.startswith("ROWS INFLUENCE EACH OTHER")
    assert math.isnan(report.violation_rate)
    assert math.isnan(report.worst)
    assert report.sampled is not None
    assert math.isnan(report.sampled.violation_rate)
    assert not report.all_clear


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    "make",
    [
        lambda: mlp(3, 2, 2, (200, 200), nn.ReLU()),
        lambda: nn.Sequential(nn.Linear(5, 64), nn.LayerNorm(64), nn.Linear(64, 1), nn.Flatten(0)),
        lambda: nn.Sequential(nn.Linear(5, 64), nn.BatchNorm1d(64), nn.GELU(), nn.Linear(64, 2)),
        lambda: nn.Sequential(nn.Linear(5, 8), nn.Softmax(-1)),
    ],
)
def test_rounding_that_differs_between_batches_is_no_influence(
    make: Any, dtype: torch.dtype
) -> None:
    net = make().to(dtype)
    for N in (1, 2, 3, 300):
        report = audit(net, *points(N, 3, 2, dtype), steps=0)
        assert (report.mixing, report.doubts) == (False, ())


def test_an_output_that_is_drawn_anew_is_said_and_nothing_is_left_of_the_audit() -> None:
    class Draws(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.calls = nn.Linear(5, 2), 0
            self.register_buffer("count", torch.zeros(()))
            self.generator = torch.Generator().manual_seed(3)

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            self.count += 1
            noise = torch.rand(len(x), 1, generator=self.generator) + torch.rand(len(x), 1)
            y: Tensor = self.linear(x) * noise
            return y if y.sum() < 1e9 else -y

    net, (x1, x2) = Draws(), points(20, 3, 2, torch.float32)
    random, own = torch.get_rng_state(), net.generator.get_state()
    with torch.no_grad():
        probing.doubts(net, x1[:0])
    with probing.untouched(net, x1.device):
        said, mixing = probing.doubts(net, torch.cat([x1, x2], -1))
    assert not mixing
    assert "differs by up to" in said[0]
    assert (net.calls, net.count.item()) == (0, 0)
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.equal(net.generator.get_state(), own)
    report = audit(net, x1, x2)
    assert (report.doubts[0].split(" by")[0], report.all_clear) == (said[0].split(" by")[0], False)
    assert net.calls == 1  # for the slopes


def test_a_network_made_for_one_size_of_batch_says_so() -> None:
    class Fixed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x.reshape(20, 5) if len(x) in (20, 40) else x.reshape(-1, 7)).sin()

    report = audit(Fixed(), *points(20, 3, 2, torch.float32))
    assert report.doubts[0].startswith("mlp takes all of 20 rows but not 10 of them: RuntimeError")
    assert not report.all_clear


# --- names, units and forms -----------------------------------------------------------------------


class Scaler:
    """As scikit-learn's StandardScaler: x = z · scale + mean."""

    def __init__(self, mean: Tensor, scale: Tensor) -> None:
        self.mean, self.scale = mean, scale

    def inverse_transform(self, rows: Any) -> Any:
        return (torch.tensor(rows) * self.scale + self.mean).numpy()


def test_the_report_is_in_the_user_s_own_units() -> None:
    """As if the network took and gave these units itself."""
    net = mlp(3, 2, 2)
    x = torch.randn(50, 5).double()
    mean, scale = torch.randn(5).double(), torch.rand(5).double() + 0.5
    ymean, yscale = torch.randn(2).double(), 100 * torch.rand(2).double() + 0.5

    class Own(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = net((x - mean) / scale)
            return y * yscale + ymean

    asked: dict[str, Any] = {"direction": [0, 1, 0, -1, 0], "steps": 16}
    want = audit(Own(), x * scale + mean, **asked)
    for scalers in (
        ((mean.tolist(), scale.tolist()), (ymean, yscale)),
        (Scaler(mean, scale), Scaler(ymean, yscale)),
    ):
        got = audit(net, x, x_scaler=scalers[0], y_scaler=scalers[1], **asked)
        assert got.steps is not None
        assert want.steps is not None
        for name in ("rate", "worst_slope", "worst_row", "worst_point"):
            torch.testing.assert_close(
                getattr(got, name), getattr(want, name), rtol=1e-5, atol=1e-5, equal_nan=True
            )
        for name in ("rate", "worst_drop", "worst_row", "worst_point", "drop_from", "drop_to"):
            torch.testing.assert_close(
                getattr(got.steps, name), getattr(want.steps, name), rtol=1e-5, atol=1e-5,
                equal_nan=True,
            )  # fmt: skip


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"x_scaler": 3}, r"x_scaler: expected a pair \(mean, scale\) or a fitted scaler, got int"),
        ({"x_scaler": (0, 0)}, "x_scaler: expected finite means and scales above 0, got 0.0 and 0"),
        ({"x_scaler": ([0, 1], 1)}, r"x_scaler: expected a number or shape \(3,\), got \(2,\)"),
        ({"y_scaler": ("a", 1)}, "y_scaler: expected numbers as mean and scale, got str"),
        (
            {"x_scaler": Scaler(torch.zeros(2), torch.ones(2))},
            "x_scaler: expected a fitted scaler of 3 columns, got RuntimeError: The size",
        ),
        (
            {"x_scaler": Scaler(torch.zeros(3), torch.rand(3, 3, 1))},
            "x_scaler: expected a fitted scaler of 3 columns, got TypeError",
        ),
        ({"outputs": ["price"]}, "outputs: expected 2 names, one for each output, got 1"),
        ({"steps": 1}, "steps: expected a number of values >= 2, or 0 for none, got 1"),
        ({"steps": True}, "steps: expected a number of values >= 2, or 0 for none, got True"),
        ({"x_scaler": ({0: 0, 2: 1}, 1)}, "x_scaler: expected a number for each of the 3 columns"),
        ({"x_scaler": ({"a": 0}, 1)}, "x_scaler: expected to be given the names of the 3 columns"),
        (
            {"y_scaler": ({"prise": 0, "rent": 1}, 1), "outputs": ["price", "rent"]},
            "y_scaler: expected names of columns, got 'prise'; the nearest is 'price'",
        ),
    ],
)
def test_what_an_audit_is_not_asked_for(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises((TypeError, ValueError), match=f"^{sentence}"):
        audit(Slopes(), X1, X2, **options)


def test_a_scaler_by_name_is_in_no_order() -> None:
    """As the means of a DataFrame's columns are, which may be in any."""
    x, names, outputs = torch.cat([X1, X2], -1), ["a", "b", "c"], ["price", "rent"]
    asked: dict[str, Any] = {"direction": [0, 1, 1], "columns": names, "outputs": outputs}
    want = audit(Slopes(), x, x_scaler=([1, 2, 3], [4, 5, 6]), y_scaler=([7, 8], [9, 10]), **asked)
    mean, scale = {"c": 3, "a": 1, "b": 2}, {"b": 5, "a": 4, "c": 6}
    heights = {"rent": 8, "price": 7}, {"price": 9, "rent": 10}
    got = audit(Slopes(), x, x_scaler=(mean, scale), y_scaler=heights, **asked)
    assert got.to_dict() == want.to_dict()


def test_what_is_so_of_some_outputs_is_said_of_these() -> None:
    """Output 1 falls between the rows alone, output 0 is seen to fall by its slope, too."""

    class Falls(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([-x[:, 0], x[:, 0] - 3 * (x[:, 0] > 0.5), x[:, 0].round()], 1)

    report = audit(Falls(), torch.tensor([[0.0], [1.0]]), direction=[1], outputs=["a", "b", "c"])
    said = " ".join(str(report).split())
    assert "in column 0 (output b) no slope violates and y falls all the same" in said
    assert "In column 0 (output c) the derivative is 0 in every row, yet y changes" in said


def test_one_row_is_one() -> None:
    assert str(audit(Slopes(), X1[:1], X2[:1])).startswith("1 row: ")
    assert "\n\n1 sampled point: " in str(audit(Slopes(), X1, X2, sample=1))


def test_a_y_that_becomes_nan_is_said_with_its_row() -> None:
    x = torch.tensor([[0.5, 1.0], [math.inf, 2.0], [0.1, 3.0]])
    said = str(
        audit(nn.Sequential(nn.Linear(2, 4), nn.SiLU(), nn.Linear(4, 1)), x, direction=[0, 1])
    )
    assert "fall on the way, y becomes NaN, in row 1 first" in said


def test_nothing_can_be_drawn_from_rows_with_nan() -> None:
    x = torch.full((4, 3), math.nan)
    with pytest.raises(ValueError, match=r"^sample: expected a row of x1 without NaN"):
        audit(Slopes(), x, direction=[0, 1, 1], sample=5)
    assert audit(Slopes(), x, direction=[0, 1, 1]).nan_rows == 4


def test_a_scaler_that_is_no_scale_of_each_column() -> None:
    class Rotates(Scaler):
        def inverse_transform(self, rows: Any) -> Any:
            return (torch.tensor(rows) @ self.scale).numpy()

    rotates = Rotates(torch.zeros(3), torch.tensor([[1.0, 1, 0], [0, 1, 1], [0, 0, 1]]))
    sentence = "x_scaler: expected a scaler that shifts and scales each column by itself, got Rot"
    with pytest.raises(ValueError, match=sentence):
        audit(Slopes(), X1, X2, x_scaler=rotates)


def test_frame_csv_and_html(tmp_path: Path) -> None:
    names, outputs = ["size", "age <b>"], ["price, net", "rent"]
    report = audit(Slopes(), X1, X2, columns=names, outputs=outputs, sample=5, direction=[1, -1])
    frame = report.to_frame()
    assert {len(column) for column in frame.values()} == {8}
    assert frame["points"] == ["rows"] * 4 + ["sampled"] * 4
    worst = max(zip(frame["violating"][:4], frame["falling"][:4], strict=True), key=max)
    assert (frame["violating"][0], frame["falling"][0]) == worst
    json.dumps(frame, allow_nan=False)
    rows = list(csv.DictReader(io.StringIO(report.to_csv(tmp_path / "audit.csv"))))
    assert (tmp_path / "audit.csv").read_text() == report.to_csv()
    assert [row["output"] for row in rows] == frame["output"]
    assert [float(row["worst_slope"]) for row in rows] == frame["worst_slope"]
    page = report.to_html(tmp_path / "audit.html")
    assert page in (tmp_path / "audit.html").read_text()
    assert report._repr_html_() == page
    assert "age &lt;b&gt;" in page
    assert "<b>" not in page
    assert page.count("<tr>") == 2 * 5
    assert "price, net" in str(report)
    assert report.outputs == tuple(outputs)


def test_a_share_is_never_rounded_to_none_or_to_all() -> None:
    class Once(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.where(x > 0, x, -x) if x.sum() < 1e9 else x

    x2 = torch.linspace(0.1, 1, 30_001)
    x2[7] = -1e-3
    text = str(audit(Once(), torch.empty(30_001, 0), x2, steps=0))
    assert "<0.01% of the constrained slopes violate" in text
    assert " 0.00%" not in text
    text = str(audit(Once(), torch.empty(30_001, 0), x2, steps=0, direction=-1))
    assert ">99.99%" in text
    assert "100.00%" not in text


def test_nothing_is_known_is_no_all_clear() -> None:
    net = nn.Linear(2, 1)
    with torch.no_grad():
        net.weight.fill_(1.0)
    assert audit(net, torch.randn(5, 2), direction=[1, 1], sample=5, attack=True).all_clear
    assert not audit(net, torch.randn(0, 2), direction=[1, 1]).all_clear
    assert not audit(net, torch.randn(5, 2), direction=[1, -1]).all_clear
    net.weight.data[0, 0] = -1e-30
    assert not audit(net, torch.randn(5, 2), direction=[1, 1]).all_clear
