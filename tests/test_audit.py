"""The report counts what it says, on the data and on sampled points, and can be read and drawn."""

from __future__ import annotations

import json
import math
import warnings
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from monokernel import audit, fused_mono_penalty, plot_audit
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
    first, header, *entries = str(report).split("\n\n")[0].splitlines()
    assert first == "4 rows: 25.00% of the constrained slopes violate, worst slope -4"
    assert header.split() == [
        *("output", "column", "sign", "violating", "worst", "slope", "row", "x", "there"),
    ]
    assert entries[0].split() == ["0", "0", "+1", "50.00%", "-3", "1", "0.5"]
    assert len(entries) == 3
    assert "10 sampled points: " in str(report)
    many = str(audit(nn.Linear(5, 60), torch.randn(9, 3), torch.randn(9, 2)))
    assert many.endswith("... and 80 more constraints")


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
    for text in str(report).split("\n\n"):
        assert "UNKNOWN how many of the constrained slopes violate" in text
        assert "In column 1 the derivative is 0 in every row, yet y changes" in text
        entries = [line.split() for line in text.splitlines()[-4:]]
        assert [e[3:] for e in entries[1::2]] == [["unknown", "unknown"]] * 2
        assert all("%" in e[3] for e in entries[::2])


@pytest.mark.parametrize("layers", [[nn.Linear], ["0"], ["4"]])
@pytest.mark.filterwarnings("ignore:quantized")
def test_a_quantised_network_is_no_all_clear(layers: list[Any]) -> None:
    report = audit(quantized(layers), *points(50, 3, 2, torch.float32))
    assert report.blind.all()
    assert "In columns 0, 1 the derivative is 0" in str(report)
    assert "%" not in str(report)


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
    audit(net, x1, x2)
    assert sum(calls) <= 3000 + 18 * 256
    calls.clear()
    audit(net, x1, x2, direction=[1, 0])
    assert sum(calls) == 3000


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
    assert title.endswith("100.0% of rows violate, unknown on sampled points")


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


def test_plot_of_slopes_that_are_all_equal_or_nan() -> None:
    pytest.importorskip("matplotlib")
    linear = nn.Linear(3, 1)
    plot_audit(linear, X1, X2, most=1)
    with torch.no_grad():
        linear.weight.fill_(math.nan)
    plot_audit(linear, X1, X2, most=1)


def test_plot_of_nothing_says_so() -> None:
    pytest.importorskip("matplotlib")
    with pytest.raises(ValueError, match="at least one row and one constrained slope"):
        plot_audit(nn.Linear(3, 1), X1, X2, direction=0)


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
