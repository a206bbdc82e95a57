"""``MonotoneRegressor`` and ``MonotoneClassifier``: from a table to a network that is monotone in
the columns that must be, with scikit-learn's interface."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
from sklearn.metrics import d2_pinball_score
from sklearn.model_selection import train_test_split
from sklearn.utils import assert_all_finite, check_random_state
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import (
    _check_sample_weight,
    check_consistent_length,
    check_is_fitted,
    column_or_1d,
    validate_data,
)
from torch import Tensor, nn
from torch.nn import functional as F

from ..arguments import check_choice, check_direction, check_flag, check_number, plain
from ..audit import audit
from ..certify import Certificate, certify
from ..monotone import Monotone
from ..report import Audit
from .table import Table, is_frame
from .training import (
    ACTIVATIONS,
    LIMIT,
    Embeddings,
    Model,
    Rows,
    Scale,
    Training,
    alone,
    build,
    rescaled,
)

__all__ = ["MonotoneClassifier", "MonotoneRegressor"]

Floats = NDArray[np.float64]
Loss = Callable[[Tensor, Tensor], Tensor]

FLOAT = torch.float32  # of the training; what was fitted is in float64
ROWS_AT_A_TIME = 1 << 14
# What a guaranteed slope is at least, in scaled units, so that ``certify``, which rounds otherwise
# than the construction does, proves it too.
SOME_RISE = 1e-9
LOSSES = ("squared_error", "absolute_error", "quantile")


class _Task(NamedTuple):
    """What the network is to learn: targets (n,), so many outputs, the losses (n,) of its y and
    targets, scale and shift that make y a prediction, and the levels (Q,) of quantiles as normal
    scores."""

    target: Tensor
    outputs: int
    loss: Loss
    scale: float = 1.0
    shift: float | Tensor = 0.0
    levels: Tensor | None = None


class _Estimator(BaseEstimator):
    """What both have in common: the table, the training and the questions that may be asked."""

    def __init__(
        self,
        monotonic_cst: Any = None,
        *,
        guarantee: bool = False,
        categorical_features: Any = "from_dtype",
        hidden_layer_sizes: Any = (64, 64),
        activation: str = "silu",
        dropout: float = 0.0,
        batch_norm: bool = False,
        penalty: float = 10.0,
        margin: float = 0.02,
        learning_rate: float = 2e-3,
        weight_decay: float = 0.1,
        batch_size: int = 256,
        max_iter: int = 5000,
        early_stopping: bool = True,
        validation_fraction: float = 0.2,
        n_iter_no_change: int = 400,
        random_state: Any = None,
        verbose: int = 0,
    ) -> None:
        self.monotonic_cst = monotonic_cst
        self.guarantee = guarantee
        self.categorical_features = categorical_features
        self.hidden_layer_sizes = hidden_layer_sizes
        self.activation = activation
        self.dropout = dropout
        self.batch_norm = batch_norm
        self.penalty = penalty
        self.margin = margin
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.batch_size = batch_size
        self.max_iter = max_iter
        self.early_stopping = early_stopping
        self.validation_fraction = validation_fraction
        self.n_iter_no_change = n_iter_no_change
        self.random_state = random_state
        self.verbose = verbose

    # --- fitting ----------------------------------------------------------------------------------

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> Any:
        """Fits to the table X (n, d), a DataFrame or an array, and targets y (n,).

        Args:
            sample_weight: (n,), how much each row counts. Rows of weight 0 are left out.
        """
        self._check_parameters()
        X, y = self._check_table(X, y)
        weight = None
        if sample_weight is not None:
            weight = _check_sample_weight(sample_weight, X, ensure_non_negative=True)
            kept = np.flatnonzero(weight)
            if not len(kept):
                raise ValueError("sample_weight: expected a weight above 0, got none")
            X, y, weight = _at(X, kept), y[kept], weight[kept] / weight[kept].mean()
        seed = check_random_state(self.random_state).randint(2**31)
        with alone(seed):
            self._fit(X, y, weight, seed)
        return self

    def _fit(self, X: Any, y: NDArray[Any], weight: Floats | None, seed: int) -> None:
        names = getattr(self, "feature_names_in_", None)
        if names is None:
            names = [f"x{i}" for i in range(self.n_features_in_)]
        self.table_ = table = Table.of(X, list(names), self.categorical_features)
        signs = self._signs(table)
        task = self._task(y, weight, any(signs))
        self.levels_ = task.levels
        embeddings = Embeddings([len(c.codes) for c in table.categories.values()]).to(FLOAT)
        self._name_columns(signs, embeddings.widths)
        constrained = any(self.direction_)
        box = self._everywhere() if self.guarantee and constrained else None
        core: nn.Module = build(
            len(self.columns_),
            task.outputs,
            self.hidden_layer_sizes,
            self.activation,
            self.dropout,
            self.batch_norm,
        ).to(FLOAT)
        if box is not None:
            core = Monotone(core, *box, direction=self.direction_)
        numbers, codes = self._encoded(X)
        scale = Scale(numbers[:, : len(signs)], len(self.columns_))
        scaled = scale.of_numbers(numbers).to(FLOAT)
        counts = None if weight is None else torch.from_numpy(weight).to(FLOAT)
        self.n_iter_, self.validation_loss_ = Training(
            loss=task.loss,
            direction=self.direction_,
            penalty=self.penalty if constrained and box is None else 0.0,
            margin=self.margin,
            rate=self.learning_rate,
            decay=self.weight_decay,
            batch=self.batch_size,
            steps=self.max_iter,
            patience=self.n_iter_no_change,
            seed=seed,
            verbose=bool(self.verbose),
        ).run(
            Model(core, embeddings, task.levels),
            *self._split(Rows(scaled, codes, task.target, counts), y, seed),
        )
        self.embeddings_ = embeddings.double().requires_grad_(False)
        self.embeddings_.settle(codes)
        fitted = core.mlp if isinstance(core, Monotone) else core
        last: nn.Module = rescaled(fitted, task.scale, task.shift)
        if box is not None:
            rise = SOME_RISE * task.scale
            last = Monotone(last, *box, direction=self.direction_, margin=rise).frozen()
        self.network_ = nn.Sequential(scale, last).eval().requires_grad_(False)
        # What ``certify`` speaks of: everything, or the range of the numbers and one row of each
        # combination of categories and missing values.
        self.box_ = box
        self.range_ = tuple(numbers[:, : len(signs)].aminmax(dim=0))
        medians = numbers.new_tensor([n.median for n in table.numbers.values()])
        medians = medians.expand(len(numbers), len(signs))
        self.kinds_ = torch.cat([medians, numbers[:, len(signs) :], codes], 1).unique(dim=0)

    def _name_columns(self, signs: list[int], widths: list[int]) -> None:
        """Numbers, indicators of what is missing, embeddings, the level of several quantiles."""
        table, level = self.table_, [] if self.levels_ is None else ["quantile"]
        pairs = zip(table.categories.values(), widths, strict=True)
        embedded = [f"{c.name}[{i}]" for c, width in pairs for i in range(width)]
        self.columns_ = (*table.names, *embedded, *level)
        free = len(table.names) - len(signs) + len(embedded)
        self.direction_ = (*signs, *[0] * free, *[1] * len(level))

    def _everywhere(self) -> tuple[Tensor, Tensor]:
        """The box (d,), (d,) of all rows that there can be, scaled."""
        m, p = len(self.table_.numbers), len(self.table_.names)
        upper = torch.full((len(self.columns_),), math.inf, dtype=torch.float64)
        upper[:m], upper[m:p] = LIMIT, 1.0
        lower = -upper
        lower[m:p] = 0.0
        if self.levels_ is not None:
            lower[-1], upper[-1] = self.levels_[0], self.levels_[-1]
        return lower, upper

    def _signs(self, table: Table) -> list[int]:
        """Of the columns of numbers. A category has no order that could be kept."""
        d = self.n_features_in_
        if self.monotonic_cst is None:
            return [0] * len(table.numbers)
        names = getattr(self, "feature_names_in_", None)
        given = plain(self.monotonic_cst)
        try:
            direction = check_direction(given, d, None if names is None else tuple(names), "d")
        except (ValueError, TypeError) as error:
            raise type(error)(str(error).replace("direction", "monotonic_cst", 1)) from None
        if direction.shape != (d,):
            raise ValueError(
                f"monotonic_cst: expected a mapping from columns to signs or a sign for each of "
                f"{d} columns, got {given!r}"
            )
        for i, column in table.categories.items():
            if direction.flat[i]:
                raise ValueError(
                    f"monotonic_cst: expected 0 for the categories {column.name!r}, which have no "
                    f"order, got {direction.flat[i]}; give their ranks as numbers if they have one"
                    + ", and numbers of dtype object by pandas.to_numeric"
                    * column.numeric
                )
        return [direction.flat[i] for i in table.numbers]

    def _split(self, rows: Rows, y: NDArray[Any], seed: int) -> tuple[Rows, Rows | None]:
        """The rows to fit and those to stop early on."""
        n = len(rows)
        held = round(n * self.validation_fraction)
        stops = self.early_stopping and 0 < held < n
        if self.batch_norm and n - held * stops < 2:
            raise ValueError(
                "batch_norm: expected False for a fit of one row, whose spread is not known, got "
                "True"
            )
        if not stops:
            return rows, None
        try:
            fit, valid = train_test_split(
                np.arange(n), test_size=held, random_state=seed, stratify=self._strata(y)
            )
        except ValueError:  # too few of some class
            fit, valid = train_test_split(np.arange(n), test_size=held, random_state=seed)
        return rows.take(torch.from_numpy(fit)), rows.take(torch.from_numpy(valid))

    def _check_table(self, X: Any, y: Any) -> tuple[Any, NDArray[Any]]:
        if is_frame(X):
            X, y = validate_data(self, X, y, skip_check_array=True)
            y = column_or_1d(y, warn=True)
            check_consistent_length(X, y)
            if not len(X):
                raise ValueError("X: expected at least one row, got none")
        else:
            with _words():
                X, y = validate_data(self, X, y, dtype=np.float64, ensure_all_finite="allow-nan")
        return X, self._check_target(y)

    # --- afterwards -------------------------------------------------------------------------------

    def encode(self, X: Any) -> Tensor:
        """The rows that ``network_`` is called with, for a table X (n, d): (n, len(columns_))
        float64, or each row once for each level of several quantiles, one after the other."""
        X = self._seen(X)
        return self._rows(*self._encoded(X), self.levels_)

    def _seen(self, X: Any) -> Any:
        """A table like the one that was fitted."""
        check_is_fitted(self)
        if is_frame(X):
            validate_data(self, X, reset=False, skip_check_array=True)
        else:
            with _words():
                X = validate_data(
                    self, X, reset=False, dtype=np.float64, ensure_all_finite="allow-nan"
                )
        return X

    def _encoded(self, X: Any) -> tuple[Tensor, Tensor]:
        numbers, codes = self.table_.encode(X)
        return torch.from_numpy(numbers), torch.from_numpy(codes)

    def _rows(self, numbers: Tensor, codes: Tensor, levels: Tensor | None) -> Tensor:
        return Model(nn.Identity(), self.embeddings_, levels).rows(numbers, codes)

    @torch.no_grad()
    def _outputs(self, X: Any) -> Floats:
        """y of the network (n, D), or (n, Q) with levels."""
        rows = self.encode(X)
        Q = 1 if self.levels_ is None else len(self.levels_)
        y = [self.network_(part) for part in rows.split(ROWS_AT_A_TIME * Q)]
        out: Floats = torch.cat(y).numpy()
        return out.reshape(-1, Q) if Q > 1 else out

    def audit(self, X: Any, **options: Any) -> Audit:
        """Where the fitted network stands on the rows of a table X: ``monokernel.audit`` of
        ``network_`` on ``encode(X)``, in the table's own units and by its names.

        Args:
            options: ``sample``, ``strategy``, ``generator``, ``attack`` and ``margin``.
        """
        rows = self.encode(X)
        return audit(
            self.network_, rows, direction=self.direction_, columns=self.columns_, **options
        )

    @torch.no_grad()
    def certify(self, X: Any = None, **options: Any) -> Certificate:
        """Proves that the fitted network is monotone, or finds where it is not:
        ``monokernel.certify`` of ``network_[1]``, which stands behind the scaling of the columns
        ``network_[0]``. That rises everywhere and keeps all signs. Ends and witnesses of the
        certificate are scaled; ``network_[0].inverse`` has them in the table's units.

        Args:
            X: a table (n, d): each of its rows is a box, "this customer, whatever the income": all
                constrained columns over their whole range in the table that was fitted, the others
                as they are. Without it the boxes have every column of numbers over its whole range,
                one box for each combination of categories and missing values that was seen. With
                ``guarantee=True`` it is one box that holds every row there can be.
            options: ``seconds``, ``seed`` and ``progress``.
        """
        check_is_fitted(self)
        if not any(self.direction_):
            raise ValueError("monotonic_cst: expected a constraint to certify, got none")
        lower, upper = self._boxes(X)
        return certify(
            self.network_[1],
            lower,
            upper,
            direction=self.direction_,
            columns=self.columns_,
            **options,
        )

    def _boxes(self, X: Any) -> tuple[Tensor, Tensor]:
        """Lower and upper ends (d,) or (B, d), scaled."""
        if X is None and self.box_ is not None:
            return self.box_
        p, m = len(self.table_.names), len(self.table_.numbers)
        if X is None:
            numbers, codes = self.kinds_[:, :p], self.kinds_[:, p:].long()
            wide = torch.ones(m, dtype=torch.bool)
        else:
            numbers, codes = self._encoded(self._seen(X))
            wide = torch.tensor(self.direction_[:m]) != 0
        wide = wide.repeat(len(numbers), 1)
        told = [i for i, n in enumerate(self.table_.numbers.values()) if n.missing]
        wide[:, told] &= numbers[:, m:] == 0  # what is missing is at its median and nowhere else
        ends = []
        for of, extreme, level in (
            (torch.minimum, self.range_[0], 0),
            (torch.maximum, self.range_[1], -1),
        ):
            there = numbers.clone()
            there[:, :m] = torch.where(wide, of(numbers[:, :m], extreme), numbers[:, :m])
            at = None if self.levels_ is None else self.levels_[[level]]
            ends.append(self.network_[0](self._rows(there, codes, at)))
        return ends[0], ends[1]

    # --- parameters -------------------------------------------------------------------------------

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.allow_nan = True
        return tags

    def _check_parameters(self) -> None:
        for name in ("guarantee", "batch_norm", "early_stopping"):
            check_flag(name, getattr(self, name))
        for name in ("batch_size", "max_iter", "n_iter_no_change"):
            _check_range(name, getattr(self, name), 1, integer=True)
        for name in ("penalty", "margin", "learning_rate", "weight_decay"):
            _check_range(name, getattr(self, name), 0)
        for name in ("dropout", "validation_fraction"):
            _check_range(name, getattr(self, name), 0, below=1)
        check_choice("activation", self.activation, tuple(ACTIVATIONS))
        if not isinstance(self.hidden_layer_sizes, Sequence):
            raise TypeError(
                "hidden_layer_sizes: expected a sequence of widths, got "
                f"{type(self.hidden_layer_sizes).__name__}"
            )
        for width in self.hidden_layer_sizes:
            _check_range("hidden_layer_sizes", width, 1, integer=True)
        if self.batch_norm and self.batch_size < 2:
            raise ValueError(
                "batch_size: expected two rows at least with batch_norm=True, got "
                f"{self.batch_size}"
            )
        if self.guarantee and self.batch_norm:
            raise ValueError(
                "batch_norm: expected False with guarantee=True, whose bound no batch may move, "
                "got True"
            )


class MonotoneRegressor(RegressorMixin, _Estimator):
    """A regression for tables, monotone in the columns in which it must be.

    Columns of numbers are scaled by median and quartiles and drawn in smoothly; their missing
    values take the median, and a column of its own says which they were, so that a missing value is
    a kind of its own and "monotone" speaks of rows that have one. Categories are embedded; missing
    and unknown ones share a vector. Training is in float32 on one thread, predictions are in
    float64. Neither PyTorch's random numbers nor its number of threads are other ones afterwards.

    Args:
        monotonic_cst: as scikit-learn's ``HistGradientBoosting`` takes it: a mapping from columns
            to +1 (the prediction must not fall), -1 (must not rise) or 0, or one of these for each
            column. Categories cannot be constrained: they have no order.
        loss: "squared_error", "absolute_error" or "quantile".
        quantile: with ``loss="quantile"`` a level between 0 and 1, or several in rising order: one
            network, with the level as one more input in which it must rise.
        guarantee: monotone by construction, for every row there can be, inside the table's range or
            not (``monokernel.Monotone``). Without it a penalty is trained with, which proves
            nothing: see ``audit`` and ``certify``.
        categorical_features: "from_dtype" (of a DataFrame whatever is no number or bool), None, or
            names, numbers or a mask of columns.
        hidden_layer_sizes, activation, dropout, batch_norm: the network; "silu", "relu", "gelu" or
            "tanh". ``batch_norm`` does not go with ``guarantee``.
        penalty, margin: weight of the mean penalty on rows and points away from them, and the
            slope from which on there is none, in scaled units.
        learning_rate, weight_decay, batch_size: of AdamW. The weights that are kept are a running
            average.
        max_iter: steps at most.
        early_stopping, validation_fraction, n_iter_no_change: the best of the steps is kept, by
            loss and penalty on so great a share of the rows, and training ends after so many steps
            without one whose sum of losses there is lower by 1.
        random_state: an int makes every fit the same.
        verbose: 1 for a line on the standard error while it trains.

    Attributes:
        network_: a float64 module from ``encode(X)`` to predictions (n, 1); ``network_[0]`` scales
            the columns, ``network_[1]`` is the rest.
        columns_, direction_: what the columns of ``encode(X)`` are called, and their signs.
        table_: what is known of the table: medians, categories.
        n_iter_, validation_loss_: steps that were made, and the best loss on the validation rows.
        levels_: normal scores of the levels of several quantiles, or None.
        n_features_in_, feature_names_in_: as in scikit-learn.
    """

    def __init__(
        self,
        monotonic_cst: Any = None,
        *,
        loss: str = "squared_error",
        quantile: Any = None,
        guarantee: bool = False,
        categorical_features: Any = "from_dtype",
        hidden_layer_sizes: Any = (64, 64),
        activation: str = "silu",
        dropout: float = 0.0,
        batch_norm: bool = False,
        penalty: float = 10.0,
        margin: float = 0.02,
        learning_rate: float = 2e-3,
        weight_decay: float = 0.1,
        batch_size: int = 256,
        max_iter: int = 5000,
        early_stopping: bool = True,
        validation_fraction: float = 0.2,
        n_iter_no_change: int = 400,
        random_state: Any = None,
        verbose: int = 0,
    ) -> None:
        super().__init__(
            monotonic_cst,
            guarantee=guarantee,
            categorical_features=categorical_features,
            hidden_layer_sizes=hidden_layer_sizes,
            activation=activation,
            dropout=dropout,
            batch_norm=batch_norm,
            penalty=penalty,
            margin=margin,
            learning_rate=learning_rate,
            weight_decay=weight_decay,
            batch_size=batch_size,
            max_iter=max_iter,
            early_stopping=early_stopping,
            validation_fraction=validation_fraction,
            n_iter_no_change=n_iter_no_change,
            random_state=random_state,
            verbose=verbose,
        )
        self.loss = loss
        self.quantile = quantile

    def predict(self, X: Any) -> Floats:
        """(n,), or (n, Q) for a list of Q quantiles, which never cross: they are sorted where the
        network has them in the wrong order."""
        y = self._outputs(X)
        found: Floats = np.sort(y, 1) if self._several else y[:, 0]
        return found

    def score(self, X: Any, y: Any, sample_weight: Any = None) -> float:
        """R², or with ``loss="quantile"`` D²: the share of the pinball loss of the best constant
        that is gone, averaged over the levels. 1 is perfect, 0 as good as that constant."""
        if self.loss != "quantile":
            return float(super().score(X, y, sample_weight))
        columns = self.predict(X).reshape(len(y), -1).T
        pairs = zip(columns, np.atleast_1d(self.quantile), strict=True)
        return float(
            np.mean(
                [d2_pinball_score(y, c, sample_weight=sample_weight, alpha=q) for c, q in pairs]
            )
        )

    @property
    def _several(self) -> bool:
        return self.loss == "quantile" and np.ndim(self.quantile) == 1

    def _check_parameters(self) -> None:
        super()._check_parameters()
        check_choice("loss", self.loss, LOSSES)
        levels = np.atleast_1d(np.asarray(self.quantile)) if self.quantile is not None else None
        if (levels is None) == (self.loss == "quantile"):
            raise ValueError(
                'quantile: expected levels with loss="quantile" and None otherwise, got '
                f"{self.quantile!r} with loss={self.loss!r}"
            )
        if levels is not None and not (
            levels.ndim == 1
            and levels.dtype.kind == "f"
            and len(levels)
            and (levels > 0).all()
            and (levels < 1).all()
            and (np.diff(levels) > 0).all()
        ):
            raise ValueError(
                "quantile: expected a level between 0 and 1, or such levels in rising order, got "
                f"{self.quantile!r}"
            )

    def _check_target(self, y: Any) -> NDArray[Any]:
        try:
            target: Floats = np.asarray(y, dtype=np.float64)
        except ValueError:
            raise ValueError(f"y: expected numbers, got {y.tolist()[0]!r}") from None
        assert_all_finite(target, input_name="y")
        return target

    def _strata(self, y: NDArray[Any]) -> None:
        return None

    def _task(self, y: NDArray[Any], weight: Floats | None, constrained: bool) -> _Task:
        mean = np.average(y, weights=weight)
        spread = math.sqrt(np.average((y - mean) ** 2, weights=weight)) or 1.0
        target = torch.from_numpy((y - mean) / spread).to(FLOAT)
        scales = float(spread), float(mean)
        if self.loss == "squared_error":
            return _Task(target, 1, lambda y, t: (y.squeeze(1) - t).square(), *scales)
        if self.loss == "absolute_error":
            return _Task(target, 1, lambda y, t: (y.squeeze(1) - t).abs(), *scales)
        at = torch.tensor(np.atleast_1d(self.quantile))
        levels = torch.special.ndtri(at) if self._several else None
        tau = at.to(FLOAT)

        def pinball(y: Tensor, t: Tensor) -> Tensor:
            over = t.unsqueeze(1) - y
            return torch.maximum(tau * over, (tau - 1) * over).mean(1)

        return _Task(target, 1, pinball, *scales, levels)


class MonotoneClassifier(ClassifierMixin, _Estimator):
    """A classifier for tables: of two classes the second one's probability is monotone in the
    columns in which it must be. Several classes cannot be constrained.

    Columns of numbers are scaled by median and quartiles and drawn in smoothly; their missing
    values take the median, and a column of its own says which they were, so that a missing value is
    a kind of its own and "monotone" speaks of rows that have one. Categories are embedded; missing
    and unknown ones share a vector. Training is in float32 on one thread, predictions are in
    float64. Neither PyTorch's random numbers nor its number of threads are other ones afterwards.

    Args:
        monotonic_cst: as scikit-learn's ``HistGradientBoosting`` takes it: a mapping from columns
            to +1 (the prediction must not fall), -1 (must not rise) or 0, or one of these for each
            column. Categories cannot be constrained: they have no order.
        guarantee: monotone by construction, for every row there can be, inside the table's range or
            not (``monokernel.Monotone``). Without it a penalty is trained with, which proves
            nothing: see ``audit`` and ``certify``.
        categorical_features: "from_dtype" (of a DataFrame whatever is no number or bool), None, or
            names, numbers or a mask of columns.
        hidden_layer_sizes, activation, dropout, batch_norm: the network; "silu", "relu", "gelu" or
            "tanh". ``batch_norm`` does not go with ``guarantee``.
        penalty, margin: weight of the mean penalty on rows and points away from them, and the
            slope from which on there is none, in scaled units.
        learning_rate, weight_decay, batch_size: of AdamW. The weights that are kept are a running
            average.
        max_iter: steps at most.
        early_stopping, validation_fraction, n_iter_no_change: the best of the steps is kept, by
            loss and penalty on so great a share of the rows, and training ends after so many steps
            without one whose sum of losses there is lower by 1.
        random_state: an int makes every fit the same.
        verbose: 1 for a line on the standard error while it trains.

    Attributes:
        network_: a float64 module from ``encode(X)`` to log-odds (n, 1) or logits (n, K);
            ``network_[0]`` scales the columns, ``network_[1]`` is the rest.
        columns_, direction_: what the columns of ``encode(X)`` are called, and their signs.
        table_: what is known of the table: medians, categories.
        n_iter_, validation_loss_: steps that were made, and the best loss on the validation rows.
        classes_: the classes, sorted.
        n_features_in_, feature_names_in_: as in scikit-learn.
    """

    def decision_function(self, X: Any) -> Floats:
        """Log-odds of the second class (n,), or the logarithms of K classes' probabilities, but for
        a constant of each row (n, K)."""
        y = self._outputs(X)
        return y[:, 0] if len(self.classes_) == 2 else y

    def predict_proba(self, X: Any) -> Floats:
        """The probability of each class (n, K), in the order of ``classes_``."""
        y = torch.from_numpy(self._outputs(X))
        if y.shape[1] == 1:
            return torch.cat([torch.sigmoid(-y), torch.sigmoid(y)], 1).numpy()
        return y.softmax(1).numpy()

    def predict(self, X: Any) -> NDArray[Any]:
        """The likelier class of each row (n,)."""
        y = self._outputs(X)
        best = (y[:, 0] > 0).astype(int) if y.shape[1] == 1 else y.argmax(1)
        return self.classes_[best]  # type: ignore[no-any-return]

    def _check_target(self, y: Any) -> NDArray[Any]:
        assert_all_finite(y, input_name="y")
        check_classification_targets(y)
        return np.asarray(y)

    def _strata(self, y: NDArray[Any]) -> NDArray[Any]:
        return y

    def _task(self, y: NDArray[Any], weight: Floats | None, constrained: bool) -> _Task:
        self.classes_, code = np.unique(y, return_inverse=True)
        K = len(self.classes_)
        if K < 2:
            raise ValueError(f"y: expected two classes at least, got one class, {y.tolist()[0]!r}")
        if K > 2 and constrained:
            raise ValueError(
                f"monotonic_cst: expected a target of two classes, got {K}: the probabilities of "
                "several sum to 1 and cannot all rise"
            )
        share = np.bincount(code, weights=weight) / len(y)
        if K > 2:
            logs = torch.from_numpy(np.log(share))
            prior = logs.to(FLOAT)

            def of_several(y: Tensor, t: Tensor) -> Tensor:
                return F.cross_entropy(y + prior, t, reduction="none")

            return _Task(torch.from_numpy(code), K, of_several, shift=logs)
        odds = math.log(share[1] / share[0])

        def of_two(y: Tensor, t: Tensor) -> Tensor:
            return F.binary_cross_entropy_with_logits(y.squeeze(1) + odds, t, reduction="none")

        return _Task(torch.from_numpy(code).to(FLOAT), 1, of_two, shift=odds)


@contextmanager
def _words() -> Iterator[None]:
    """Of an array that holds words: what is told is not a number alone, but what to do."""
    try:
        yield
    except ValueError as error:
        if "could not convert string" not in str(error):
            raise
        raise ValueError(
            f"X: expected an array of numbers, got one with words ({error}); categories come in a "
            "DataFrame"
        ) from None


def _at(X: Any, rows: NDArray[np.int64]) -> Any:
    return X.iloc[rows] if is_frame(X) else X[rows]


def _check_range(
    name: str, value: Any, least: float, below: float = math.inf, integer: bool = False
) -> None:
    """A number in [least, below)."""
    check_number(name, value)
    if not least <= value < below or (integer and int(value) != value):
        kind = "a whole number" if integer else "a number"
        most = "" if below == math.inf else f" and below {below:g}"
        raise ValueError(f"{name}: expected {kind} of {least:g} at least{most}, got {value!r}")
