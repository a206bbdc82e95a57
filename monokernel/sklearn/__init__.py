"""Estimators for tables, as scikit-learn has them: monotone networks with ``fit`` and ``predict``.

``table`` turns a DataFrame with categories and missing values into rows of numbers, ``training``
holds the network and its loop, ``estimators`` what a user calls. Needs scikit-learn, which the rest
of the package does not.
"""

try:
    import sklearn  # noqa: F401
except ImportError as error:
    raise ImportError(
        "monokernel.sklearn: expected scikit-learn, which pip install 'monokernel[sklearn]' brings"
    ) from error

from .estimators import MonotoneClassifier, MonotoneRegressor

__all__ = ["MonotoneClassifier", "MonotoneRegressor"]
