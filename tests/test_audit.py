"""The report counts what it says, on the data and on sampled points, and can be read and drawn."""

from __future__ import annotations

import json
import math
from importlib import import_module
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from monokernel import audit, plot_audit


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
        *("output", "column", "sign", "violating", "worst", "slope", "row", "x2", "there"),
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
