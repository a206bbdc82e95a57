"""Points to penalise on lie where their strategy says, and come again with the same generator."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from monokernel import sample_points
from monokernel.sampling import STRATEGIES


def rows(N: int = 20, d: int = 3) -> Tensor:
    return torch.randn(N, d, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@given(
    st.integers(1, 9),
    st.integers(1, 4),
    st.integers(0, 11),
    st.sampled_from(STRATEGIES),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
def test_shape_dtype_and_no_gradient(
    N: int, d: int, n: int, strategy: str, dtype: torch.dtype
) -> None:
    x = rows(N, d).to(dtype).requires_grad_()
    p = sample_points(x, n, strategy)
    assert p.shape == (n, d)
    assert p.dtype == dtype
    assert not p.requires_grad
    assert p.isfinite().all()


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_same_generator_same_points(strategy: str) -> None:
    a, b, c = (sample_points(rows(), 50, strategy, generator=seeded(s)) for s in (1, 1, 2))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_leading_dimensions_are_rows(strategy: str) -> None:
    x = rows(20)
    a = sample_points(x, 9, strategy, generator=seeded())
    b = sample_points(x.reshape(4, 5, 3), 9, strategy, generator=seeded())
    assert torch.equal(a, b)


def test_data_are_rows_of_x_and_all_of_them_come() -> None:
    x = rows()
    p = sample_points(x, 500, "data", generator=seeded())
    assert {tuple(r) for r in p.tolist()} == {tuple(r) for r in x.tolist()}


def test_uniform_fills_the_box_of_the_data() -> None:
    x = rows()
    p = sample_points(x, 4000, "uniform", generator=seeded())
    low, high = x.amin(0), x.amax(0)
    assert (p >= low).all()
    assert (p <= high).all()
    share = (p - low) / (high - low)
    torch.testing.assert_close(share.mean(0), torch.full((3,), 0.5).double(), atol=0.03, rtol=0)
    torch.testing.assert_close(share.var(0), torch.full((3,), 1 / 12).double(), atol=0.01, rtol=0)


def test_uniform_in_given_bounds_needs_no_data() -> None:
    bounds = (torch.tensor([0.0, -1.0, 5.0]), torch.tensor([1.0, -1.0, 7.0]))
    p = sample_points(torch.empty(0, 3), 200, "uniform", bounds=bounds, generator=seeded())
    assert (p[:, 1] == -1).all()
    assert (p >= bounds[0]).all()
    assert (p <= bounds[1]).all()
    q = sample_points(rows(), 200, "uniform", bounds=(-0.5, 0.5), generator=seeded())
    assert q.abs().max() <= 0.5


def test_mixup_lies_on_segments_between_rows() -> None:
    x = rows(2)
    p = sample_points(x, 300, "mixup", generator=seeded())
    share = (p - x[0]) / (x[1] - x[0])
    torch.testing.assert_close(share, share[:, :1].expand(-1, 3))
    assert (share >= -1e-12).all()
    assert (share <= 1 + 1e-12).all()
    assert share.std() > 0.2


def test_noise_is_in_units_of_each_columns_deviation() -> None:
    x = rows(1).repeat(2, 1)
    x[1] += torch.tensor([1.0, 100.0, 0.0])
    p = sample_points(x, 20000, "noise", noise=0.01, generator=seeded())
    off = torch.minimum((p - x[0]).abs(), (p - x[1]).abs())
    scale = torch.tensor([0.5, 50.0]).double() * 0.01
    torch.testing.assert_close(off[:, :2].square().mean(0).sqrt(), scale, rtol=0.03, atol=0)
    assert (off[:, 2] == 0).all()  # a column without spread stays as it is
    clamped = sample_points(rows(), 500, "noise", noise=2.0, bounds=(-0.1, 0.1))
    assert clamped.abs().max() <= 0.1


@pytest.mark.parametrize(
    ("call", "error", "sentence"),
    [
        (lambda: sample_points(torch.ones(3, 2, dtype=torch.int64), 1), TypeError, "got int64"),
        (lambda: sample_points([[1.0]], 1), TypeError, "got list"),  # type: ignore[arg-type]
        (lambda: sample_points(torch.ones(3), 1), ValueError, r"shape \(..., d\)"),
        (lambda: sample_points(rows(), -1), ValueError, "n: expected a number"),
        (lambda: sample_points(rows(), 1.5), ValueError, "n: expected"),  # type: ignore[arg-type]
        (lambda: sample_points(rows(), 1, "grid"), ValueError, "strategy: expected one of"),
        (lambda: sample_points(rows(), 1, "noise", noise=-1), ValueError, "noise: expected"),
        (lambda: sample_points(rows(0), 1, "mixup"), ValueError, "at least one row"),
        (lambda: sample_points(rows(), 1, bounds=(1.0, 0.0)), ValueError, "low <= high"),
        (
            lambda: sample_points(rows(), 1, bounds=(torch.zeros(2), 1.0)),
            ValueError,
            r"bounds: expected numbers or shape \(3,\), got \(2,\)",
        ),
        (
            lambda: sample_points(rows(), 1, bounds=([0.0, 0.0], 1.0)),  # type: ignore[arg-type]
            ValueError,
            r"bounds: expected numbers or shape \(3,\), got \[0.0, 0.0\]",
        ),
        (
            lambda: sample_points(rows(), 1, bounds=3),  # type: ignore[arg-type]
            TypeError,
            r"bounds: expected \(low, high\), got 3",
        ),
        (lambda: sample_points(rows(), 1, bounds=(math.nan, 1.0)), ValueError, "low <= high"),
        (
            lambda: sample_points(rows(), 1, "noise", noise="a"),  # type: ignore[arg-type]
            TypeError,
            "noise: expected a number, got str",
        ),
        (
            lambda: sample_points(rows(), 1, "noise", noise=math.nan),
            ValueError,
            "noise: expected a standard deviation >= 0, got nan",
        ),
        (
            lambda: sample_points(rows()[:, :0], 1),
            ValueError,
            r"x: expected at least one column, got shape \(\d+, 0\)",
        ),
    ],
)
def test_bad_input_gets_one_sentence(call: object, error: type[Exception], sentence: str) -> None:
    with pytest.raises(error, match=sentence):
        call()  # type: ignore[operator]
