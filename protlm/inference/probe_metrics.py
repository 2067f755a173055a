"""How well a probe predicts labels: metrics with a bootstrap over proteins or clusters, paired between probes."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from protlm.inference.correlation import mean_ranks
from protlm.inference.metrics import FEWEST_UNITS, NUM_REPLICATES, Estimate, estimate, replicate_weights

CLASS_METRICS = ("accuracy", "macro_f1", "mcc")
VALUE_METRICS = ("spearman", "r2", "mae")
"""The metrics of each kind of label; the first one decides."""

_MANY_UNITS = 5000
"""With more of them, each replicate takes time, and fewer are drawn."""


@dataclass(frozen=True, kw_only=True)
class ProbeScores:
    """The metrics of several probes of the same rows.

    Attributes:
        metrics: The estimate of each metric, by the name of the probe.
        gains: The first metric of the first probe minus that of each other, paired.
    """

    metrics: dict[str, dict[str, Estimate]]
    gains: dict[str, Estimate]


def measure_probes(
    truth: np.ndarray,
    predictions: Mapping[str, Sequence[np.ndarray]],
    units: np.ndarray,
    keys: Sequence[bytes],
    seed: int,
    *,
    is_regression: bool,
    folds: Sequence[np.ndarray] | None = None,
) -> ProbeScores:
    """Returns the metrics of some probes, each the mean over its predictions, with the spread of a bootstrap.

    For classes: accuracy; the mean F1 of all classes that occur or are predicted (macro F1); the Matthews correlation
    of all classes together (MCC, Gorodkin's R_K). For values: Spearman's correlation; R², 1 − the squared errors over
    those of the mean; the mean absolute error. Where rows were predicted in several folds, ranks are those within the
    fold: between folds, a prediction without any knowledge is low where the labels of the fold are high. Cost: O(rows)
    for each replicate and prediction.

    Args:
        truth: The label of each row: the number of a class, int64, or a value, float64.
        predictions: By the name of a probe, its predictions of these rows, one for each seed.
        units: Of each row the number of what is resampled with it, int64.
        keys: The name of each unit, by which it is drawn; fewer than `FEWEST_UNITS` units have no intervals.
        seed: Of the bootstrap.
        is_regression: Whether labels are values.
        folds: For each seed the number of the fold of each row, int64; None: one fold.
    """
    names = VALUE_METRICS if is_regression else CLASS_METRICS
    num_replicates = NUM_REPLICATES if len(keys) <= _MANY_UNITS else NUM_REPLICATES // 5
    weights = replicate_weights(keys, seed, num_replicates) if len(keys) >= FEWEST_UNITS else np.zeros((len(keys), 0))
    values: dict[str, np.ndarray] = {}
    replicates: dict[str, np.ndarray] = {}
    for name, of_seeds in predictions.items():
        measured = [
            _value_metrics(truth, predicted, units, np.zeros(len(truth), dtype=np.int64) if folds is None else folds[n])
            if is_regression
            else _class_metrics(truth, predicted, units)
            for n, predicted in enumerate(of_seeds)
        ]
        ones = np.ones(len(keys))
        values[name] = np.mean([measure(ones) for measure in measured], axis=0)
        replicates[name] = np.array(
            [np.mean([measure(column) for measure in measured], axis=0) for column in weights.T]
        ).reshape(num_replicates if weights.size else 0, len(names))
    first, *others = predictions
    return ProbeScores(
        metrics={
            name: {
                metric: estimate(float(values[name][column]), replicates[name][:, column])
                for column, metric in enumerate(names)
            }
            for name in predictions
        },
        gains={
            name: estimate(float(values[first][0] - values[name][0]), replicates[first][:, 0] - replicates[name][:, 0])
            for name in others
        },
    )


def _class_metrics(truth: np.ndarray, predicted: np.ndarray, units: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """Returns the function from the weight of each unit to the metrics."""
    size = int(max(truth.max(), predicted.max())) + 1
    # Many residues of a protein have the same label and prediction.
    pairs = (units * size + truth) * size + predicted
    distinct, counts = np.unique(pairs, return_counts=True)
    rest, of_predicted = np.divmod(distinct, size)
    of_units, of_truth = np.divmod(rest, size)
    is_correct = of_truth == of_predicted

    def measure(weights: np.ndarray) -> np.ndarray:
        drawn = counts * weights[of_units]
        total = drawn.sum()
        if not total:
            return np.full(len(CLASS_METRICS), np.nan)
        true, guessed = (np.bincount(of, drawn, minlength=size) for of in (of_truth, of_predicted))
        right = np.bincount(of_truth[is_correct], drawn[is_correct], minlength=size)
        occurs = (true > 0) | (guessed > 0)
        f1 = 2 * right[occurs] / (true + guessed)[occurs]
        spread = (total**2 - (guessed**2).sum()) * (total**2 - (true**2).sum())
        # As for scikit-learn: a prediction without differences has no correlation.
        mcc = (right.sum() * total - guessed @ true) / np.sqrt(spread) if spread > 0 else 0.0
        return np.array([right.sum() / total, f1.mean(), mcc])

    return measure


def _value_metrics(
    truth: np.ndarray, predicted: np.ndarray, units: np.ndarray, folds: np.ndarray
) -> Callable[[np.ndarray], np.ndarray]:
    """Returns the function from the weight of each unit to the metrics."""
    squares, distances = (truth - predicted) ** 2, np.abs(truth - predicted)
    parts = [np.flatnonzero(folds == number) for number in np.unique(folds)]
    # Equal values of a fold, numbered in rising order.
    groups = [[np.unique(of[rows], return_inverse=True)[1] for of in (truth, predicted)] for rows in parts]

    def measure(weights: np.ndarray) -> np.ndarray:
        drawn = weights[units]
        total = drawn.sum()
        if not total or not np.ptp(truth[drawn > 0]):
            return np.full(len(VALUE_METRICS), np.nan)
        ranks = np.zeros((2, len(truth)))
        for rows, of_fold in zip(parts, groups, strict=True):
            of_rows = drawn[rows]
            if size := of_rows.sum():
                for place, numbers in enumerate(of_fold):
                    # From −½ to ½ in every fold, whose mean rank is 0.
                    in_fold = mean_ranks(np.bincount(numbers, of_rows))[numbers]
                    ranks[place, rows] = (in_fold - (size + 1) / 2) / size
        squared = [drawn @ each**2 for each in ranks]
        # A constant prediction ranks nothing; labels that differ in no fold tell nothing.
        spearman = 0.0 if squared[0] else np.nan
        if min(squared) > 0:
            spearman = drawn @ (ranks[0] * ranks[1]) / np.sqrt(squared[0] * squared[1])
        variance = drawn @ (truth - drawn @ truth / total) ** 2
        return np.array([spearman, 1 - drawn @ squares / variance, drawn @ distances / total])

    return measure
