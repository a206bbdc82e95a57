"""Does the penalty cost accuracy, and does it hold on rows that were never trained on?

    python -m benchmarks accuracy            four data sets, ten seeds, about ten minutes
    python -m benchmarks accuracy --seeds 2 --data diabetes

Four data sets that ship with Python packages. Each seed draws 30 % of the rows to hold out and a
fifth of the rest to stop early on; every method sees the same split. One setting serves all data
sets: nothing of ours is tuned to one of them. Times are processor seconds of one thread, so that a
busy machine does not show in them. Results go to a CSV and, as a table, into docs/accuracy.md.
"""

from __future__ import annotations

import csv
import importlib.util
import time
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import torch
from threadpoolctl import threadpool_limits
from torch import Tensor, nn
from torch.nn import functional as F

from monokernel import Monotone, audit, fused_mono_penalty, sample_points

from .measure import machine
from .options import parser_of
from .tables import write_between

__all__ = ["main", "table"]

RESULTS = Path(__file__).parent / "results" / "accuracy.csv"
PAGE = Path(__file__).parent.parent / "docs" / "accuracy.md"
BEGIN, END = "<!-- table: written by python -m benchmarks accuracy -->", "<!-- end of table -->"

WIDTH, BATCH, STEPS, LOOK_EVERY, PATIENCE = 64, 256, 2000, 25, 16
LEARNING_RATE, WEIGHT_DECAY = 2e-3, 0.1
PENALTY_WEIGHT, MARGIN = 10.0, 0.02
LIPSCHITZ_CONSTANTS = (1.0, 3.0, 10.0)
MOST_TREES, TREES_WITHOUT_CHANGE = 1000, 10
GRID_POINTS, GRID_ROWS = 33, 500
STEEPEST_NOISE = 1e-5  # a slope below -1e-5 on the grid counts; float32 noise is smaller

Scores = Callable[[Tensor], Tensor]  # rows (n, d) -> standardised target, or log-odds (n,)


@dataclass(frozen=True)
class Split:
    """Standardised rows x (n, d), the monotone columns last, and targets t (n,)."""

    x: Tensor
    t: Tensor


@dataclass(frozen=True)
class Task:
    name: str
    classification: bool
    directions: tuple[int, ...]  # of the last columns
    train: Split
    valid: Split
    held_out: Split
    target_std: float

    @property
    def free(self) -> int:
        return self.train.x.shape[1] - len(self.directions)

    def loss(self, score: Tensor, t: Tensor) -> Tensor:
        if self.classification:
            return F.binary_cross_entropy_with_logits(score, t)
        return F.mse_loss(score, t)

    def reported(self, score: Tensor, t: Tensor) -> float:
        """Log loss, or the root mean square error in the target's own units."""
        loss = self.loss(score, t).item()
        return loss if self.classification else loss**0.5 * self.target_std


# --- the data -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    """A data set: how to load it, and which columns must rise (+1) or fall (-1) in the target."""

    load: Callable[[], tuple[dict[str, np.ndarray], np.ndarray]]
    classification: bool
    monotone: dict[str, int]


def _sklearn(name: str) -> tuple[dict[str, np.ndarray], np.ndarray]:
    from sklearn import datasets

    raw = getattr(datasets, f"load_{name}")()
    columns = dict(zip(map(str, raw.feature_names), raw.data.T, strict=True))
    # In breast_cancer 0 is malignant; the target here is malignancy.
    return columns, raw.target if name == "diabetes" else 1 - raw.target


def _statsmodels(name: str, target: str, leave: Sequence[str] = ()) -> tuple:  # type: ignore[type-arg]
    import statsmodels.datasets

    frame = getattr(statsmodels.datasets, name).load_pandas().data
    columns = {c: frame[c].to_numpy(float) for c in frame.columns if c not in (target, *leave)}
    return columns, frame[target].to_numpy(float)


def _fair() -> tuple[dict[str, np.ndarray], np.ndarray]:
    columns, affairs = _statsmodels("fair", "affairs")
    return columns, affairs > 0


def _randhie() -> tuple[dict[str, np.ndarray], np.ndarray]:
    columns, visits = _statsmodels("randhie", "mdvis")
    return columns, np.log1p(visits)


SOURCES = {
    "diabetes": Source(lambda: _sklearn("diabetes"), False, {"bmi": 1, "bp": 1}),
    "breast_cancer": Source(
        lambda: _sklearn("breast_cancer"),
        True,
        {"worst radius": 1, "worst texture": 1, "worst smoothness": 1, "worst concave points": 1},
    ),
    "fair": Source(_fair, True, {"rate_marriage": -1, "religious": -1, "yrs_married": 1}),
    "randhie": Source(_randhie, False, {"lncoins": -1, "disea": 1, "physlm": 1}),
}


def load(name: str, seed: int) -> Task:
    source = SOURCES[name]
    columns, target = source.load()
    order = [c for c in columns if c not in source.monotone] + list(source.monotone)
    x = torch.from_numpy(np.stack([columns[c] for c in order], 1)).float()
    t = torch.from_numpy(target.astype(np.float64)).float()
    rows = torch.from_numpy(np.random.default_rng(seed).permutation(len(t)))
    out = len(t) * 3 // 10
    fifth = (len(t) - out) // 5
    held_out, valid, train = rows.split([out, fifth, len(t) - out - fifth])
    x = (x - x[train].mean(0)) / x[train].std(0)
    std = 1.0
    if not source.classification:
        std = t[train].std().item()
        t = (t - t[train].mean()) / std
    parts = [Split(x[part], t[part]) for part in (train, valid, held_out)]
    directions = tuple(source.monotone.values())
    return Task(name, source.classification, directions, parts[0], parts[1], parts[2], std)


# --- the methods ----------------------------------------------------------------------------------


def network(task: Task) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(task.train.x.shape[1], WIDTH),
        nn.SiLU(),
        nn.Linear(WIDTH, WIDTH),
        nn.SiLU(),
        nn.Linear(WIDTH, 1),
    )


def fit(
    task: Task, net: nn.Module, loss_of: Callable[[Tensor, Tensor], Tensor], seed: int, rate: float
) -> float:
    """Trains in place, keeps the parameters of the best validation loss and returns that loss."""
    rows = torch.Generator().manual_seed(seed)
    adam = torch.optim.AdamW(net.parameters(), lr=rate, weight_decay=WEIGHT_DECAY)
    best, best_state, since = float("inf"), deepcopy(net.state_dict()), 0
    for i in range(STEPS):
        batch = torch.randint(len(task.train.t), (BATCH,), generator=rows)
        adam.zero_grad()
        loss_of(task.train.x[batch], task.train.t[batch]).backward()
        adam.step()
        if (i + 1) % LOOK_EVERY:
            continue
        with torch.no_grad():
            loss = task.loss(net(task.valid.x).squeeze(-1), task.valid.t).item()
        if loss < best:
            best, best_state, since = loss, deepcopy(net.state_dict()), 0
        elif (since := since + 1) == PATIENCE:
            break
    net.load_state_dict(best_state)
    return best


def unpenalised(task: Task, seed: int) -> tuple[Scores, nn.Module]:
    net = network(task)
    fit(task, net, lambda x, t: task.loss(net(x).squeeze(-1), t), seed, LEARNING_RATE)
    return _scores(net), net


def penalised(task: Task, seed: int) -> tuple[Scores, nn.Module]:
    """The penalty on the batch, and on the batch with x2 drawn anew from the box of its range."""
    net, free = network(task), task.free
    points = torch.Generator().manual_seed(seed)

    def loss_of(x: Tensor, t: Tensor) -> Tensor:
        x2 = sample_points(task.train.x[:, free:], len(x), "uniform", generator=points)
        y, penalty = fused_mono_penalty(
            net,
            torch.cat([x[:, :free], x[:, :free]]),
            torch.cat([x[:, free:], x2]),
            direction=task.directions,
            margin=MARGIN,
            reduction="mean",
            return_output=True,
        )
        return task.loss(y[: len(x), 0], t) + PENALTY_WEIGHT * penalty

    fit(task, net, loss_of, seed, LEARNING_RATE)
    return _scores(net), net


def constructed(everywhere: bool) -> Callable[[Task, int], tuple[Scores, nn.Module]]:
    """Monotone by construction, on all of space or on the box of the columns' range in training."""

    def make(task: Task, seed: int) -> tuple[Scores, nn.Module]:
        x = task.train.x
        box = (-torch.inf, torch.inf) if everywhere else (x.amin(0), x.amax(0))
        net = Monotone(network(task), *box, direction=signs(task))
        fit(task, net, lambda x, t: task.loss(net(x).squeeze(-1), t), seed, LEARNING_RATE)
        return _scores(net), net

    return make


def lipschitz_monotone(task: Task, seed: int) -> tuple[Scores, None]:
    """monotonicnetworks, its Lipschitz constant chosen on the validation rows."""
    import monotonicnetworks as lmn

    best, chosen = float("inf"), None
    for constant in LIPSCHITZ_CONSTANTS:
        torch.manual_seed(seed)
        each = constant ** (1 / 3)
        layers = nn.Sequential(
            lmn.LipschitzLinear(task.train.x.shape[1], WIDTH, lipschitz_const=each, kind="one-inf"),
            lmn.GroupSort(2),
            lmn.LipschitzLinear(WIDTH, WIDTH, lipschitz_const=each, kind="inf"),
            lmn.GroupSort(2),
            lmn.LipschitzLinear(WIDTH, 1, lipschitz_const=each, kind="inf"),
        )
        net = lmn.MonotonicWrapper(
            layers, lipschitz_const=constant, monotonic_constraints=signs(task)
        )

        def loss_of(x: Tensor, t: Tensor, net: nn.Module = net) -> Tensor:
            return task.loss(net(x).squeeze(-1), t)

        loss = fit(task, net, loss_of, seed, 5 * LEARNING_RATE)
        if loss < best:
            best, chosen = loss, net
    assert chosen is not None
    return _scores(chosen), None


def tables(**options: Any) -> Callable[[Task, int], tuple[Scores, None]]:
    """The estimator as it is, which stops early on rows of its own choice, a fifth too."""

    def make(task: Task, seed: int) -> tuple[Scores, None]:
        from monokernel import sklearn

        kind = "Classifier" if task.classification else "Regressor"
        model = getattr(sklearn, f"Monotone{kind}")(signs(task), random_state=seed, **options)
        return _fitted(task, model), None

    return make


def boosting(constrained: bool) -> Callable[[Task, int], tuple[Scores, None]]:
    """scikit-learn's, which stops early on rows of its own choice, a fifth as for the networks."""

    def make(task: Task, seed: int) -> tuple[Scores, None]:
        from sklearn import ensemble

        kind = "Classifier" if task.classification else "Regressor"
        model = getattr(ensemble, f"HistGradientBoosting{kind}")(
            monotonic_cst=signs(task) if constrained else None,
            early_stopping=True,
            validation_fraction=0.2,
            random_state=seed,
        )
        return _fitted(task, model), None

    return make


def xgboost(task: Task, seed: int) -> tuple[Scores, None]:
    """With a constraint; the validation rows and the patience are those of the other trees."""
    import xgboost

    kind = xgboost.XGBClassifier if task.classification else xgboost.XGBRegressor
    model = kind(
        monotone_constraints=tuple(signs(task)),
        n_estimators=MOST_TREES,
        learning_rate=0.1,
        early_stopping_rounds=TREES_WITHOUT_CHANGE,
        random_state=seed,
        n_jobs=1,
    )
    x, t = task.valid.x.numpy(), task.valid.t.numpy()
    model.fit(task.train.x.numpy(), task.train.t.numpy(), eval_set=[(x, t)], verbose=False)
    more = {"output_margin": True} if task.classification else {}
    return lambda x: torch.from_numpy(model.predict(x.numpy(), **more)).float(), None


def lightgbm(task: Task, seed: int) -> tuple[Scores, None]:
    """As XGBoost."""
    import lightgbm

    kind = lightgbm.LGBMClassifier if task.classification else lightgbm.LGBMRegressor
    model = kind(
        monotone_constraints=signs(task),
        n_estimators=MOST_TREES,
        random_state=seed,
        n_jobs=1,
        verbose=-1,
    )
    stop = lightgbm.early_stopping(TREES_WITHOUT_CHANGE, verbose=False)
    x, t = task.valid.x.numpy(), task.valid.t.numpy()
    model.fit(task.train.x.numpy(), task.train.t.numpy(), eval_set=[(x, t)], callbacks=[stop])
    more = {"raw_score": True} if task.classification else {}
    return lambda x: torch.from_numpy(model.predict(x.numpy(), **more)).float(), None


def signs(task: Task) -> list[int]:
    return [0] * task.free + list(task.directions)


def _fitted(task: Task, model: Any) -> Scores:
    x, t = torch.cat([task.train.x, task.valid.x]), torch.cat([task.train.t, task.valid.t])
    model.fit(x.numpy(), t.numpy())
    score = model.decision_function if task.classification else model.predict
    return lambda x: torch.from_numpy(score(x.numpy())).float()


def _scores(net: nn.Module) -> Scores:
    @torch.no_grad()
    def scores(x: Tensor) -> Tensor:
        y: Tensor = net(x)
        return y.squeeze(-1)

    return scores


Method = Callable[[Task, int], tuple[Scores, nn.Module | None]]


def methods() -> dict[str, Method]:
    found: dict[str, Method] = {
        "network, no penalty": unpenalised,
        "network, penalty by monokernel": penalised,
        "Monotone, on the training box": constructed(everywhere=False),
        "Monotone, everywhere": constructed(everywhere=True),
        "monokernel.sklearn": tables(),
        "monokernel.sklearn, guarantee": tables(guarantee=True),
        "HistGradientBoosting": boosting(constrained=False),
        "HistGradientBoosting, monotonic_cst": boosting(constrained=True),
    }
    optional: dict[str, tuple[str, Method]] = {
        "monotonicnetworks": ("monotonicnetworks", lipschitz_monotone),
        "xgboost": ("XGBoost, monotone_constraints", xgboost),
        "lightgbm": ("LightGBM, monotone_constraints", lightgbm),
    }
    installed = (optional[package] for package in optional if importlib.util.find_spec(package))
    return found | dict(installed)


# --- what is measured -----------------------------------------------------------------------------


def grid_slopes(task: Task, scores: Scores) -> Tensor:
    """Slopes in their direction along each monotone column, over its range in training.

    Differences between neighbours of a grid, for held-out rows whose other inputs stay: the same
    measure for networks and for the steps of trees. (rows, columns, grid points - 1)
    """
    x, slopes = task.held_out.x[:GRID_ROWS], []
    for c, sign in enumerate(task.directions, start=task.free):
        low, high = task.train.x[:, c].min(), task.train.x[:, c].max()
        grid = torch.linspace(0, 1, GRID_POINTS) * (high - low) + low
        rows = x.repeat_interleave(GRID_POINTS, 0)
        rows[:, c] = grid.repeat(len(x))
        y = scores(rows).reshape(len(x), GRID_POINTS)
        slopes.append(sign * y.diff(dim=1) / (grid[1] - grid[0]))
    return torch.stack(slopes, 1)


Row = dict[str, str]


def measure(name: str, method: str, seed: int) -> Row:
    task = load(name, seed)
    torch.manual_seed(seed)
    begin = time.process_time()
    with threadpool_limits(1):
        scores, net = methods()[method](task, seed)
    seconds = time.process_time() - begin
    slopes = grid_slopes(task, scores)
    row = {
        **machine(),
        "data": name,
        "rows": str(sum(len(part.t) for part in (task.train, task.valid, task.held_out))),
        "method": method,
        "seed": str(seed),
        "measure": "log loss" if task.classification else "RMSE",
        "loss": f"{task.reported(scores(task.held_out.x), task.held_out.t):.5g}",
        "violation_rate": f"{(slopes < -STEEPEST_NOISE).double().mean().item():.6f}",
        "worst_slope": f"{slopes.min().item():.5g}",
        "held_out_rate": "",
        "seconds": f"{seconds:.3f}",
    }
    if net is not None:  # the derivative itself, at the held-out rows as they are
        x1, x2 = task.held_out.x[:, : task.free], task.held_out.x[:, task.free :]
        report = audit(net, x1, x2, direction=task.directions, steps=0)
        row["held_out_rate"] = f"{report.violation_rate:.6f}"
    return row


# --- the table ------------------------------------------------------------------------------------


def table(rows: Sequence[Row]) -> str:
    """Markdown: mean over the seeds, ± the standard deviation for the loss."""
    lines = [
        "| data | method | loss | violations | worst slope | derivative violations | seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, method in dict.fromkeys((row["data"], row["method"]) for row in rows):
        own = [row for row in rows if (row["data"], row["method"]) == (name, method)]
        losses = [float(row["loss"]) for row in own]
        spread = stdev(losses) if len(losses) > 1 else 0.0
        digits = 3 if mean(losses) < 10 else 1
        rates = [float(row["held_out_rate"]) for row in own if row["held_out_rate"]]
        cells = [
            f"{name}, {own[0]['measure']}",
            method,
            f"{mean(losses):.{digits}f} ± {spread:.{digits}f}",
            f"{mean(float(row['violation_rate']) for row in own):.2%}",
            f"{min(float(row['worst_slope']) for row in own):.3f}",
            f"{mean(rates):.2%}" if rates else "",
            f"{mean(float(row['seconds']) for row in own):.1f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _runs(
    names: Sequence[str], chosen: Sequence[str], seeds: int
) -> Iterator[tuple[str, str, int]]:
    for name in names:
        for method in chosen:
            for seed in range(seeds):
                yield name, method, seed


def main(arguments: Sequence[str] | None = None) -> None:
    parser = parser_of("accuracy", __doc__)
    parser.add_argument("--data", nargs="+", choices=SOURCES, default=list(SOURCES))
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--methods", nargs="+", choices=list(methods()), default=list(methods()))
    parser.add_argument("--csv", type=Path, default=RESULTS)
    parser.add_argument("--page", action="store_true", help="write the table into docs/accuracy.md")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # networks this small gain nothing from a second
    rows: list[Row] = []
    for name, method, seed in _runs(options.data, options.methods, options.seeds):
        rows.append(row := measure(name, method, seed))
        print(
            f"{name:<14}{method:<36}seed {seed}   {row['measure']} {row['loss']:<9} violations "
            f"{float(row['violation_rate']):7.2%}  worst slope {float(row['worst_slope']):8.3f}  "
            f"{float(row['seconds']):5.1f} s",
            flush=True,
        )
    options.csv.parent.mkdir(parents=True, exist_ok=True)
    with options.csv.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    print(f"\n{table(rows)}\n\nwritten to {options.csv}")
    if options.page:
        write_between(PAGE, BEGIN, END, table(rows))


if __name__ == "__main__":
    main()
