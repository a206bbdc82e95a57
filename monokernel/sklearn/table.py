"""A table as numbers and codes: what its columns are, what is missing, which categories it has."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..arguments import check_column

__all__ = ["Categories", "Number", "Table", "is_frame"]

Floats = NDArray[np.float64]
Codes = NDArray[np.int64]

NUMBERS, REFUSED = "biuf", "mMc"  # kinds of NumPy's dtypes: times and complex numbers are no inputs


@dataclass(frozen=True)
class Number:
    """A column of numbers. ``median`` stands for a missing one, and where the table that was fitted
    had any, a column of its own tells which they are."""

    name: str
    median: float
    missing: bool


@dataclass(frozen=True)
class Categories:
    """A column of categories: its values have the codes 1, 2, …; 0 is for what is missing, or was
    not there when the table was fitted."""

    name: str
    codes: dict[Any, int]

    @property
    def numeric(self) -> bool:
        """Whether all of them are numbers, of a column whose dtype does not say so."""
        return all(isinstance(v, (int, float)) for v in self.codes)


def is_frame(X: Any) -> bool:
    """A DataFrame as pandas has it."""
    return hasattr(X, "iloc") and hasattr(X, "columns")


@dataclass(frozen=True)
class Table:
    """What the columns of a table are.

    Attributes:
        numbers, categories: with the place of each in the table.
    """

    numbers: dict[int, Number]
    categories: dict[int, Categories]

    @classmethod
    def of(cls, X: Any, names: list[str], categorical: Any) -> Table:
        """Of a DataFrame or of an array (n, d) of numbers."""
        chosen = _categorical(X, names, categorical)
        numbers: dict[int, Number] = {}
        categories: dict[int, Categories] = {}
        for i, name in enumerate(names):
            if i in chosen:
                values = (v for v in _values(X, i) if not _is_missing(v))
                codes = {v: code for code, v in enumerate(dict.fromkeys(values), 1)}
                categories[i] = Categories(name, codes)
            else:
                column = _floats(X, i, name)
                known = column[~np.isnan(column)]
                median = float(np.median(known)) if len(known) else 0.0
                numbers[i] = Number(name, median, len(known) < len(column))
        return cls(numbers, categories)

    @property
    def names(self) -> list[str]:
        """Of the columns of numbers, then of those that tell what is missing in them."""
        told = [f"{n.name} is missing" for n in self.numbers.values() if n.missing]
        return [n.name for n in self.numbers.values()] + told

    def encode(self, X: Any) -> tuple[Floats, Codes]:
        """The numbers (n, p), medians for missing ones and 0 or 1 for what is missing, and the
        codes of the categories (n, c)."""
        columns, told = [], []
        for i, number in self.numbers.items():
            column = _floats(X, i, number.name)
            missing = np.isnan(column)
            columns.append(np.where(missing, number.median, column))
            if number.missing:
                told.append(missing.astype(np.float64))
        codes = [
            np.array([c.codes.get(_key(v), 0) for v in _values(X, i)], dtype=np.int64)
            for i, c in self.categories.items()
        ]
        n = len(X)
        return (
            np.stack([*columns, *told], 1) if columns else np.empty((n, 0)),
            np.stack(codes, 1) if codes else np.empty((n, 0), dtype=np.int64),
        )


def _categorical(X: Any, names: list[str], given: Any) -> set[int]:
    """The places of the columns of categories."""
    if isinstance(given, str) and given == "from_dtype":
        if not is_frame(X):
            return set()
        kinds = [getattr(dtype, "kind", "O") for dtype in X.dtypes]
        for name, kind, dtype in zip(names, kinds, X.dtypes, strict=True):
            if kind in REFUSED:
                raise TypeError(f"X: expected numbers or categories in {name!r}, got {dtype}")
        return {i for i, kind in enumerate(kinds) if kind not in NUMBERS}
    if given is None:
        return set()
    if isinstance(given, str) or not isinstance(given, Iterable):
        raise TypeError(
            "categorical_features: expected 'from_dtype', None, or names, numbers or a mask of "
            f"columns, got {given!r}"
        )
    chosen = list(given)
    if chosen and all(isinstance(c, (bool, np.bool_)) for c in chosen):
        if len(chosen) != len(names):
            raise ValueError(
                f"categorical_features: expected a mask of {len(names)} columns, got {len(chosen)}"
            )
        return {i for i, c in enumerate(chosen) if c}
    named = tuple(names)
    return {
        check_column("categorical_features", c, len(names), named if isinstance(c, str) else None)
        for c in chosen
    }


def _values(X: Any, i: int) -> list[Any]:
    """A column as Python's own values."""
    return (X.iloc[:, i] if is_frame(X) else X[:, i]).tolist()  # type: ignore[no-any-return]


def _floats(X: Any, i: int, name: str) -> Floats:
    """A column as numbers, NaN where one is missing."""
    if not is_frame(X):
        return np.asarray(X[:, i], dtype=np.float64)
    try:
        column = X.iloc[:, i].to_numpy(dtype=np.float64, na_value=np.nan)
    except (TypeError, ValueError):
        raise ValueError(
            f"X: expected numbers in {name!r}, got {X.dtypes.iloc[i]}; columns of categories go by "
            "their dtype or are named in categorical_features"
        ) from None
    if np.isinf(column).any():
        raise ValueError(f"X: expected finite or missing numbers in {name!r}, got infinity")
    return column  # type: ignore[no-any-return]


def _is_missing(value: Any) -> bool:
    # pandas' NA is equal to nothing, not even to itself, and says so by no bool.
    return value is None or type(value).__name__ == "NAType" or bool(value != value)


def _key(value: Any) -> Any:
    return None if _is_missing(value) else value
