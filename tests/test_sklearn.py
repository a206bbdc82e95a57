"""The estimators for tables: scikit-learn's contract, and what they promise of a table."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn")
pd = pytest.importorskip("pandas")

from sklearn.base import clone  # noqa: E402
from sklearn.exceptions import NotFittedError  # noqa: E402
from sklearn.utils.estimator_checks import parametrize_with_checks  # noqa: E402

from monokernel.sklearn import MonotoneClassifier, MonotoneRegressor  # noqa: E402
from monokernel.sklearn.training import LIMIT, Scale  # noqa: E402

CREDIT = Path(__file__).parents[1] / "examples" / "german_credit.csv"
SIGNS = {"duration": 1, "amount": 1, "instalment": 1, "savings": -1, "employed": -1}
QUICK: dict[str, Any] = {"hidden_layer_sizes": (16,), "max_iter": 100, "learning_rate": 0.02}

Frame = tuple[Any, Any]


@parametrize_with_checks(
    [MonotoneRegressor(**QUICK, batch_size=64), MonotoneClassifier(**QUICK, batch_size=64)],
    expected_failed_checks=lambda estimator: {
        "check_sample_weight_equivalence_on_dense_data": (
            "a row that is repeated is drawn, held out and moved to other points one by one"
        )
    },
)
def test_scikit_learns_own_checks(estimator: Any, check: Any) -> None:
    check(estimator)


@pytest.fixture(scope="module")
def credit() -> Frame:
    table = pd.read_csv(CREDIT)
    return table, table.pop("default")


@pytest.fixture(scope="module")
def sure(credit: Frame) -> MonotoneClassifier:
    model = MonotoneClassifier(SIGNS, guarantee=True, random_state=0, **QUICK)
    return model.fit(*credit)  # type: ignore[no-any-return]


def falling(n: int = 300) -> tuple[np.ndarray, np.ndarray]:
    """Rows (n, 3) and a target that falls in the first column."""
    X = np.random.default_rng(0).normal(size=(n, 3))
    return X, np.sin(2 * X[:, 1]) - X[:, 0]


def test_guarantee_holds_for_rows_that_no_table_had(
    credit: Frame, sure: MonotoneClassifier
) -> None:
    """Far outside of the range, for unknown categories and beside missing values."""
    rows = credit[0].head(40).copy()
    rows.loc[:9, "purpose"] = "a yacht"
    rows.loc[10:19, "history"] = None
    rows.loc[20:29, "savings"] = np.nan
    rows["residence"] = [-1e9, 1e9] * 20
    for name, sign in SIGNS.items():
        previous = None
        for value in (-1e300, -1e6, -30.0, 0.0, 1.0, 7.5, 60.0, 900.0, 1e5, 1e300):
            odds = sure.decision_function(rows.assign(**{name: value}))
            assert previous is None or (sign * (odds - previous) >= -1e-12).all()
            previous = odds
    certificate = sure.certify(progress=False)
    assert certificate.status == "proved"
    assert certificate.lower_bound[0].nan_to_num(1.0).min() >= 0


def test_penalty_turns_a_target_that_falls() -> None:
    X, y = falling()
    free = MonotoneRegressor([1, 0, 0], penalty=0.0, random_state=0, **QUICK).fit(X, y)
    held = MonotoneRegressor([1, 0, 0], random_state=0, **QUICK).fit(X, y)
    assert free.audit(X).violation_rate > 0.9
    assert held.audit(X, sample=500).violation_rate < 0.05
    assert held.audit(X).worst > -0.05 > free.audit(X).worst
    assert free.certify(seconds=5, progress=False).status == "violated"
    rows = free.certify(X[:5], seconds=5, progress=False)
    assert rows.verdicts == ("violated",) * 5


def test_audit_is_in_the_units_of_the_table(credit: Frame) -> None:
    table, bad = credit
    model = MonotoneClassifier(SIGNS, random_state=0, **QUICK).fit(table, bad)
    report = model.audit(table)
    assert report.labels == ("duration", "amount", "savings", "employed", "instalment")
    for c, name in enumerate(report.labels):
        row = table.iloc[[int(report.worst_row[0, c])]]
        step = 1e-4 * table[name].std()
        ends = [
            model.decision_function(row.assign(**{name: row[name].fillna(0.0) + side * step}))[0]
            for side in (-1, 1)
        ]
        if row[name].isna().any():
            continue
        slope = SIGNS[name] * (ends[1] - ends[0]) / (2 * step)
        assert report.worst_slope[0, c].item() == pytest.approx(slope, rel=1e-3, abs=1e-9)


def test_signs_by_name_by_place_and_as_a_series_are_one(credit: Frame) -> None:
    table, bad = credit
    listed = [SIGNS.get(name, 0) for name in table.columns]
    quick = QUICK | {"max_iter": 25}
    odds = [
        MonotoneClassifier(given, random_state=0, **quick).fit(table, bad).decision_function(table)
        for given in (SIGNS, listed, pd.Series(SIGNS))
    ]
    assert (odds[0] == odds[1]).all()
    assert (odds[0] == odds[2]).all()


def test_what_is_refused_is_named(credit: Frame) -> None:
    table, bad = credit
    for given, message in (
        ({"purpose": 1}, "0 for the categories 'purpose'"),
        ({"ammount": 1}, "nearest is 'amount'"),
        ([1], "got shape|expected"),
        ({"amount": 2}, "monotonic_cst: expected entries in"),
    ):
        with pytest.raises(ValueError, match=message):
            MonotoneClassifier(given).fit(table, bad)
    with pytest.raises(ValueError, match="two classes, got 3"):
        MonotoneClassifier(SIGNS).fit(table, table["instalment"].clip(upper=3))
    with pytest.raises(ValueError, match="batch_norm: expected False"):
        MonotoneClassifier(SIGNS, guarantee=True, batch_norm=True).fit(table, bad)
    with pytest.raises(ValueError, match="expected numbers in 'checking'"):
        MonotoneClassifier(categorical_features=None).fit(table, bad)
    with pytest.raises(TypeError, match="'day'"):
        MonotoneClassifier().fit(table.assign(day=pd.Timestamp("2026-01-01")), bad)
    for quantile in (None, 1.5, [0.9, 0.1]):
        with pytest.raises(ValueError, match="quantile: expected"):
            MonotoneRegressor(loss="quantile", quantile=quantile).fit(*falling())


@pytest.mark.filterwarnings("ignore:X does not have valid feature names")
def test_what_else_goes_wrong_is_one_sentence(credit: Frame) -> None:
    table, bad = credit
    words = table[["duration", "purpose"]].to_numpy()
    model = MonotoneClassifier({"duration": 1}, random_state=0, **QUICK | {"max_iter": 5})
    fitted = clone(model).fit(table[["duration", "purpose"]], bad)
    with pytest.raises(ValueError, match=r"^X: expected an array of numbers, .* in a DataFrame$"):
        fitted.predict(words)
    with pytest.raises(ValueError, match=r"^X: expected an array of numbers, .* in a DataFrame$"):
        MonotoneClassifier().fit(words, bad)
    with pytest.raises(NotFittedError):
        model.certify()
    free = MonotoneClassifier(random_state=0, **QUICK | {"max_iter": 5}).fit(table, bad)
    with pytest.raises(ValueError, match=r"^monotonic_cst: expected a constraint to certify"):
        free.certify(progress=False)
    with pytest.raises(ValueError, match="got 1; column 1 is called 'duration'"):
        MonotoneClassifier({1: 1}).fit(table, bad)
    with pytest.raises(ValueError, match=r"^monotonic_cst: expected \(d,\) = \(16,\)"):
        MonotoneClassifier([1, 0]).fit(table, bad)
    with pytest.raises(ValueError, match=r"numbers of dtype object by pandas.to_numeric"):
        clone(model).fit(table.astype({"duration": object}), bad)
    with pytest.raises(ValueError, match=r"one class, 1$"):
        clone(model).fit(table, bad * 0 + 1)
    with pytest.raises(ValueError, match=r"^y: expected numbers, got 'good'$"):
        MonotoneRegressor().fit(table, np.where(bad, "bad", "good"))
    with pytest.raises(ValueError, match=r"^batch_size: expected two rows at least"):
        MonotoneRegressor(batch_norm=True, batch_size=1).fit(*falling())
    with pytest.raises(ValueError, match=r"^batch_norm: expected False for a fit of one row"):
        MonotoneRegressor(batch_norm=True).fit([[1.0, 2.0]], [1.0])


def test_missing_values_and_categories(sure: MonotoneClassifier, credit: Frame) -> None:
    table = credit[0].head(3)
    columns = list(sure.columns_)
    rows = sure.encode(table)
    assert columns[len(sure.table_.numbers)] == "savings is missing"
    assert rows.shape == (3, len(columns))
    assert rows[:, columns.index("savings is missing")].tolist() == [1.0, 0.0, 0.0]
    assert rows[0, columns.index("savings")] == credit[0]["savings"].median()
    # No age was missing in the table: one that is takes the median, and nothing tells.
    age = credit[0]["age"].median()
    odds = sure.decision_function
    assert (odds(table.assign(age=np.nan)) == odds(table.assign(age=age))).all()
    # A category that was not there is as one that is missing: the mean of those that were.
    assert (odds(table.assign(purpose="a yacht")) == odds(table.assign(purpose=None))).all()
    place = columns.index("purpose[0]")
    mean = sure.encode(credit[0])[:, place].mean().item()
    assert sure.encode(table.assign(purpose=None))[0, place].item() == pytest.approx(mean)


def test_arrays_have_categories_by_place() -> None:
    rng = np.random.default_rng(0)
    X = np.stack([rng.integers(0, 4, 300), rng.normal(size=300)], 1).astype(float)
    y = np.array([0.0, 3.0, -3.0, 1.0])[X[:, 0].astype(int)] + X[:, 1]
    model = MonotoneRegressor([0, 1], categorical_features=[0], random_state=0, **QUICK)
    assert model.fit(X, y).score(X, y) > 0.9
    assert model.columns_ == ("x1", "x0[0]", "x0[1]", "x0[2]")


@pytest.mark.parametrize("guarantee", [False, True])
def test_quantiles_do_not_cross(guarantee: bool) -> None:
    rng = np.random.default_rng(1)
    X = rng.uniform(-1, 1, size=(600, 2))
    y = X[:, 0] + (0.3 + 0.2 * X[:, 1]) * rng.normal(size=600)
    levels = [0.1, 0.5, 0.9]
    options = QUICK | {"max_iter": 400, "guarantee": guarantee, "random_state": 0}
    model = MonotoneRegressor([1, 0], loss="quantile", quantile=levels, **options).fit(X, y)
    found = model.predict(X)
    assert found.shape == (600, 3)
    assert (np.diff(found, axis=1) >= 0).all()
    assert (y[:, None] < found).mean(0) == pytest.approx(levels, abs=0.05)
    assert 0 < model.score(X, y) < 1
    assert model.direction_ == (1, 0, 1)
    if guarantee:
        raw = model.network_(model.encode(X)).reshape(-1, 3)
        assert (raw.diff(dim=1) >= 0).all()
        assert model.certify(progress=False).status == "proved"
    one = clone(model).set_params(quantile=0.9).fit(X, y)
    assert (y < one.predict(X)).mean() == pytest.approx(0.9, abs=0.05)


def test_a_seed_repeats_a_fit_and_leaves_the_process_as_it_was(credit: Frame) -> None:
    table, bad = credit
    model = MonotoneClassifier(
        SIGNS, batch_norm=True, dropout=0.2, random_state=3, **QUICK | {"max_iter": 50}
    )
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    first = model.fit(table, bad).predict_proba(table)
    assert (torch.get_rng_state() == before).all()
    assert torch.get_num_threads() == threads
    torch.rand(3)
    assert (clone(model).fit(table, bad).predict_proba(table) == first).all()
    assert (pickle.loads(pickle.dumps(model)).predict_proba(table) == first).all()


def test_weights() -> None:
    """Rows of weight 0 are not there, the scale of weights does not matter, great ones count."""
    X, y = falling()
    model = MonotoneRegressor(random_state=0, **QUICK)
    weight = np.where(np.arange(300) < 200, 2.0, 0.0)
    y[200:] = 1e3
    some = clone(model).fit(X, y, sample_weight=weight).predict(X)
    assert (some == clone(model).fit(X[:200], y[:200]).predict(X)).all()
    two = np.where(np.arange(200) % 2, 1.0, -1.0)
    heavy = np.where(two > 0, 9.0, 1.0)
    constant = clone(model).set_params(early_stopping=False).fit(0 * X[:200], two, heavy)
    assert constant.predict(X[:1] * 0)[0] == pytest.approx(0.8, abs=0.02)


def test_progress_line_and_early_stopping(capsys: pytest.CaptureFixture[str]) -> None:
    X, _ = falling()
    model = MonotoneRegressor(
        n_iter_no_change=50, verbose=1, random_state=0, hidden_layer_sizes=(8,)
    )
    model.fit(X, np.random.default_rng(0).normal(size=len(X)))
    assert model.n_iter_ < model.max_iter
    assert (
        f"{model.n_iter_} steps, validation {model.validation_loss_:.4g}" in capsys.readouterr().err
    )


def test_scaling_rises_everywhere_and_is_undone() -> None:
    x = torch.tensor(np.random.default_rng(0).lognormal(size=(200, 2)))
    scale = Scale(x, 3)
    far = torch.tensor([-1e300, -1e3, -1.0, 0.0, 0.5, 3.0, 50.0, 1e4, 1e300], dtype=x.dtype)
    z = scale(far.unsqueeze(1).expand(-1, 3))
    assert (z.diff(dim=0)[1:-1] > 0).all()
    assert (z.diff(dim=0) >= 0).all()
    assert (z[:, :2].abs() < LIMIT).all()
    assert (z[:, 2] == far.clamp(-1e6, 1e6)).all()
    assert torch.allclose(scale.inverse(z[1:-1]), far[1:-1, None].expand(-1, 3), rtol=1e-6)
