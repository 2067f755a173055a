"""A linear probe: how well a regularised linear model reads a label from features; hides scikit-learn.

The strength of the regularisation is chosen on rows that are neither fitted nor tested; then the fit is made again on
both. Every set of features goes through the same steps on the same rows.
"""

import warnings
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

CLASSIFICATION_STRENGTHS = (1e4, 1e3, 1e2, 1e1, 1e0, 1e-1)
"""Strengths of the penalty of logistic regression, the inverse of scikit-learn's C, on standardised features."""
REGRESSION_STRENGTHS = (1e5, 1e4, 1e3, 1e2, 1e1, 1e0, 1e-1)
"""Strengths of ridge regression, scikit-learn's alpha, on standardised features."""

_PATIENCE = 2
"""Weaker penalties, which take long, are tried until so many in a row were no better than one that was better than the
strongest: that one may leave nothing but the most frequent class, and so may the next ones."""
_SEARCH_TOLERANCE, _TOLERANCE = 1e-3, 1e-4
_MOST_ITERATIONS = 1000
_ROWS_AT_ONCE = 1 << 14


class Features(Protocol):
    """The features of rows, proteins or residues."""

    def rows(self, numbers: np.ndarray) -> np.ndarray:
        """Returns the features of some rows by their numbers, (rows, dim)."""


class StoredFeatures:
    """Features that lie in an array, in memory or in a file."""

    def __init__(self, array: np.ndarray) -> None:
        """Takes features, (rows, dim)."""
        self._array = array

    def rows(self, numbers: np.ndarray) -> np.ndarray:
        """Returns the features of some rows, (rows, dim)."""
        return np.asarray(self._array[numbers])


@dataclass(frozen=True, eq=False)
class Fold:
    """A division of rows, by their numbers: int64, rising.

    Attributes:
        train: Fitted.
        valid: On which the strength of the regularisation and the layer are chosen.
        test: Predicted in the end.
    """

    train: np.ndarray
    valid: np.ndarray
    test: np.ndarray

    def __eq__(self, other: object) -> bool:
        """Returns whether two folds have the same rows."""
        return isinstance(other, Fold) and all(
            np.array_equal(*rows)
            for rows in ((self.train, other.train), (self.valid, other.valid), (self.test, other.test))
        )


@dataclass(frozen=True)
class Fit:
    """The result of one set of features in one fold.

    Attributes:
        valid_score: Accuracy, or R², on the rows `valid` with the chosen strength.
        strength: The chosen strength.
        predicted: The prediction of each row of `test`.
        is_converged: Whether every fit came to its end.
    """

    valid_score: float
    strength: float
    predicted: np.ndarray
    is_converged: bool


def fit_probe(features: Features, targets: np.ndarray, fold: Fold, *, is_regression: bool) -> Fit:
    """Returns the predictions of a linear model for the test rows of a fold.

    Logistic regression, or ridge regression; both penalise the squares of the weights, by a strength that has the best
    accuracy or R² on the rows `valid`. In the end these are fitted too, with the same strength, which then weighs a
    little less. Features are standardised by the rows that are fitted. Cost: O(rows · dim) for each iteration of a
    fit, and O(rows · dim²) for a ridge.

    Args:
        features: The features of all rows.
        targets: The target of every row: a number of a class, or a value.
        fold: The rows; at least two classes among those to fit.
        is_regression: Whether the targets are values.
    """
    strengths = REGRESSION_STRENGTHS if is_regression else CLASSIFICATION_STRENGTHS
    scaler, train = _Scaler.fitted(features.rows(fold.train))
    model = _new_model(is_regression)
    # The weaker penalty goes on from the weights of the stronger one, and wins only where it is better.
    best, best_score, num_worse, converged = strengths[0], -np.inf, 0, True
    for strength in strengths:
        converged &= _fit(model, train, targets[fold.train], strength, _SEARCH_TOLERANCE)
        score = _score(targets[fold.valid], _predict(model, scaler, features, fold.valid), is_regression=is_regression)
        num_worse += 1
        if score > best_score:
            best, best_score, num_worse = strength, score, 0
        elif num_worse >= _PATIENCE and best != strengths[0]:
            break
    both = np.sort(np.concatenate([fold.train, fold.valid]))
    del train
    scaler, rows = _Scaler.fitted(features.rows(both))
    model = _new_model(is_regression)
    converged &= _fit(model, rows, targets[both], best, _TOLERANCE)
    return Fit(best_score, best, _predict(model, scaler, features, fold.test), converged)


def predict_constant(targets: np.ndarray, fold: Fold, *, is_regression: bool, is_known: bool) -> np.ndarray:
    """Returns for every test row the mean, or the most frequent class.

    Args:
        targets: The target of every row.
        fold: The rows.
        is_regression: Whether the targets are values.
        is_known: Take that of all targets, those tested included, and not that of the others. Where several folds are
            put together, the others have little of what is frequent among the tested ones: such a guess is worse than
            none.
    """
    values = targets if is_known else targets[np.concatenate([fold.train, fold.valid])]
    value = values.mean() if is_regression else np.bincount(values).argmax()
    return np.full(len(fold.test), value, dtype=targets.dtype)


@dataclass(frozen=True)
class _Scaler:
    mean: np.ndarray
    scale: np.ndarray

    @classmethod
    def fitted(cls, rows: np.ndarray) -> "tuple[_Scaler, np.ndarray]":
        """Returns the scaler of some rows, and these standardised, float64."""
        rows = rows.astype(np.float64)
        mean, deviation = rows.mean(axis=0), rows.std(axis=0)
        # A feature without differences, but for rounding, says nothing.
        is_constant = deviation <= 1e-9 * np.abs(mean)
        scaler = cls(mean, np.where(is_constant, np.inf, deviation))
        return scaler, scaler(rows)

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        standardised: np.ndarray = (rows - self.mean) / self.scale
        return standardised


def _new_model(is_regression: bool) -> Any:
    """Returns a model of scikit-learn, which takes a second to import and has no types."""
    from sklearn.linear_model import LogisticRegression, Ridge

    return Ridge() if is_regression else LogisticRegression(max_iter=_MOST_ITERATIONS, warm_start=True)


def _fit(model: Any, rows: np.ndarray, targets: np.ndarray, strength: float, tolerance: float) -> bool:
    """Fits a model of scikit-learn; returns whether it came to its end."""
    from sklearn.exceptions import ConvergenceWarning

    is_ridge = hasattr(model, "alpha")
    model.set_params(**({"alpha": strength} if is_ridge else {"C": 1 / strength, "tol": tolerance}))
    with warnings.catch_warnings():
        # Told by the return value.
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(rows, targets)
    return is_ridge or int(np.max(model.n_iter_)) < _MOST_ITERATIONS


def _predict(model: Any, scaler: _Scaler, features: Features, numbers: np.ndarray) -> np.ndarray:
    pieces = [
        model.predict(scaler(features.rows(numbers[start : start + _ROWS_AT_ONCE])))
        for start in range(0, len(numbers), _ROWS_AT_ONCE)
    ]
    return np.concatenate(pieces)


def _score(targets: np.ndarray, predicted: np.ndarray, *, is_regression: bool) -> float:
    if not is_regression:
        return float((targets == predicted).mean())
    # Of the chosen ones all have the same variance, so that the smallest error is the largest R².
    variance = float(targets.var()) or 1.0
    return 1 - float(((targets - predicted) ** 2).mean()) / variance
