"""Multipliers rise where a constraint is violated beyond its target, fall elsewhere, stay >= 0."""

from __future__ import annotations

import math
import re
import runpy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from monokernel import Multipliers, fused_mono_penalty

EXAMPLE = Path(__file__).parents[1] / "examples" / "multipliers.py"


def violations(*columns: list[float]) -> Tensor:
    """(N, D = 1, k) from one list of rows per column."""
    return torch.tensor(columns).T.unsqueeze(1)


def test_ascent_on_the_rate_above_its_target() -> None:
    m = Multipliers((1, 2), target=0.25, lr=0.5, initial=1.0)
    measured = m.update(violations([3.0, 0.0, 1.0, 7.0], [0.0, 0.0, 0.0, 0.0]))
    torch.testing.assert_close(measured, torch.tensor([[0.75, 0.0]]))
    torch.testing.assert_close(m.weight, torch.tensor([[1.25, 0.875]]))


def test_ascent_on_the_mean_violation() -> None:
    m = Multipliers((1, 2), target=1.0, measure="violation", lr=2.0)
    m.update(violations([3.0, 0.0, 2.0, 7.0], [0.1, 0.0, 0.0, 0.0]))
    torch.testing.assert_close(m.weight, torch.tensor([[4.0, 0.0]]))  # projected to >= 0


def test_multipliers_stop_at_most() -> None:
    m = Multipliers((1, 1), lr=1.0, most=2.5)
    for _ in range(5):
        m.update(violations([1.0]))
    assert m.weight.item() == 2.5


def test_forward_is_the_weighted_mean_and_has_no_gradient_in_the_multipliers() -> None:
    m = Multipliers((2, 2))
    m.weight.copy_(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    v = torch.rand(5, 3, 2, 2, requires_grad=True)
    loss = m(v)
    torch.testing.assert_close(loss, (m.weight * v.mean((0, 1))).sum())
    loss.backward()
    torch.testing.assert_close(v.grad, (m.weight / 15).expand_as(v))
    assert not list(m.parameters())  # an optimizer must not descend on them


def test_weight_in_the_reduced_penalty_is_the_same_loss() -> None:
    torch.manual_seed(0)
    mlp = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    x1, x2 = torch.randn(11, 2).double(), torch.randn(11, 2).double()
    m = Multipliers((3, 2)).double()
    m.weight.copy_(torch.rand(3, 2))
    v = fused_mono_penalty(mlp, x1, x2, reduction="none")
    mean = fused_mono_penalty(mlp, x1, x2, weight=m.weight, reduction="mean")
    torch.testing.assert_close(m(v), mean * m.weight.numel())


def test_one_multiplier_shared_between_outputs_ascends_on_their_mean() -> None:
    m = Multipliers((2,), measure="violation", lr=1.0)
    v = torch.tensor([[[1.0, 0.0], [3.0, 0.0], [5.0, 0.0]]])  # (1, 3, 2)
    m.update(v)
    torch.testing.assert_close(m.weight, torch.tensor([3.0, 0.0]))
    torch.testing.assert_close(m(v), torch.tensor(27.0))


def test_overflow_and_empty_batches_keep_the_multipliers() -> None:
    m = Multipliers((1, 3), measure="violation", lr=1.0, initial=1.0)
    m.update(torch.tensor([[[math.nan, math.inf, 2.0]]]))
    torch.testing.assert_close(m.weight, torch.tensor([[1.0, 1.0, 3.0]]))
    m.update(torch.empty(0, 1, 3))
    torch.testing.assert_close(m.weight, torch.tensor([[1.0, 1.0, 3.0]]))
    assert m(torch.empty(0, 1, 3)) == 0
    rate = Multipliers((1, 1), lr=1.0)
    rate.update(torch.tensor([[[math.nan]]]))
    assert rate.weight.item() == 1.0  # NaN is a violation


def test_state_dict_keeps_them() -> None:
    a, b = Multipliers((2, 1), lr=1.0), Multipliers((2, 1), lr=1.0)
    a.update(torch.tensor([[[1.0], [0.0]]]))
    b.load_state_dict(a.state_dict())
    assert torch.equal(b.weight, torch.tensor([[1.0], [0.0]]))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"target": -0.1}, "target: expected a number >= 0"),
        ({"lr": math.nan}, "lr: expected"),
        ({"measure": "mean"}, "measure: expected one of"),
    ],
)
def test_bad_options(options: dict[str, object], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        Multipliers((1, 1), **options)  # type: ignore[arg-type]


def test_arguments_of_another_type() -> None:
    with pytest.raises(TypeError, match="target: expected a number, got str"):
        Multipliers((1, 1), target="0.1")  # type: ignore[arg-type]
    for shape in (3, "ab", (1.0, 2)):
        with pytest.raises(TypeError, match=r"shape: expected \(D, k\), got"):
            Multipliers(shape)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="violations: expected a tensor, got NoneType"):
        Multipliers((1, 1)).update(None)  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [(), (4,), (5, 3, 2), (5, 1, 2)])
def test_reduced_or_foreign_penalties_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="violations: expected the penalties"):
        Multipliers((2, 2)).update(torch.zeros(shape))


def test_training_reaches_a_violation_target() -> None:
    """Two outputs fall in x2 and the third rises: the target is met, with no multiplier in vain."""
    torch.manual_seed(0)
    mlp = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 3))
    x1, x2 = torch.rand(200, 2), torch.rand(200, 1)
    target = torch.cat([-x2, -3 * x2, x2 + x1.sum(1, keepdim=True)], 1)
    multipliers = Multipliers((3, 1), target=0.05, lr=0.3)
    optimizer = torch.optim.Adam(mlp.parameters(), lr=0.01)
    for _ in range(500):
        y, v = fused_mono_penalty(mlp, x1, x2, reduction="none", return_output=True)
        optimizer.zero_grad()
        ((y - target).square().mean() + multipliers(v)).backward()
        optimizer.step()
        measured = multipliers.update(v)
    assert measured.max() <= 0.1
    assert multipliers.weight[2] < 0.1 * multipliers.weight[:2].min()


def test_the_example_reaches_its_targets(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn")
    threads = torch.get_num_threads()
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    torch.set_num_threads(threads)
    _, *lines = capsys.readouterr().out.splitlines()
    rates = {
        line.split()[0]: max(float(r) for r in re.findall(r"([\d.]+)%[, ]", line)[-3:])
        for line in lines
    }
    assert rates["none"] > 15
    assert rates["10%"] <= 11
    assert rates["1%"] <= 2
