"""How well scores predict a measurement: Spearman, AUC, MCC and NDCG as ProteinGym defines them, with intervals.

The definitions are those of the benchmark's own script (OATML-Markslab/ProteinGym, performance_DMS_benchmarks.py;
Notin et al., NeurIPS 2023), in code of our own. The bootstrap draws variants with replacement, the same ones for every
prediction, so that differences between predictions are paired.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from protlm.inference.correlation import mean_ranks, pearson
from protlm.inference.metrics import FEWEST_UNITS, NUM_REPLICATES, Estimate, estimate

METRICS = ("spearman", "auc", "mcc", "ndcg")
TOP_SHARE = 0.1
"""The share of variants, best scores first, that NDCG looks at."""

_MOST_VARIANTS = 20_000
"""With more of them fewer replicates do: each takes time in proportion to the variants."""
_PURPOSE = 4
"""Keeps the draws of this bootstrap apart from all others."""


class AssayMetrics(NamedTuple):
    """The metrics of one prediction; NaN where it has none.

    Attributes:
        spearman: Correlation of the ranks of score and measurement, equal values sharing their mean rank.
        auc: Probability that a fit variant scores above an unfit one; equal scores count half.
        mcc: Matthews correlation of fitness with the upper half of the scores: those that reach their median.
        ndcg: Discounted gains of the top tenth by score over those of the top tenth by measurement; the gain of a
            variant is its measurement on a scale from 0, the lowest, to 1, the highest. NaN for fewer than 10 variants.
    """

    spearman: float
    auc: float
    mcc: float
    ndcg: float


@dataclass(frozen=True, kw_only=True)
class Measured:
    """The metrics of several predictions of one assay.

    Attributes:
        metrics: The estimate of each of `METRICS`, by the name of the prediction.
        gains: Spearman of the first prediction minus that of each other, paired.
    """

    metrics: dict[str, dict[str, Estimate]]
    gains: dict[str, Estimate]


def measure(
    measured: np.ndarray,
    is_fit: np.ndarray,
    predictions: Mapping[str, np.ndarray],
    seed: int,
    num_replicates: int | None = None,
) -> Measured:
    """Returns the metrics of some predictions, with the 95 % intervals of a bootstrap over variants.

    Cost: O(variants) for each replicate, metric and prediction.

    Args:
        measured: The measurement of each variant; higher is fitter.
        is_fit: Whether each counts as fit.
        predictions: Scores of the variants by name, higher for fitter; the first is compared with the others.
        seed: Of the bootstrap.
        num_replicates: Number of replicates; None for `NUM_REPLICATES`, and for a tenth of them beyond 20,000 variants,
            whose intervals are narrow. Fewer than `FEWEST_UNITS` variants have no intervals.
    """
    if num_replicates is None:
        num_replicates = NUM_REPLICATES if len(measured) <= _MOST_VARIANTS else NUM_REPLICATES // 10
    assays = {name: _Assay(measured, is_fit, scores) for name, scores in predictions.items()}
    values = {name: np.array(assay.metrics()) for name, assay in assays.items()}
    size = len(measured)
    replicates = {name: np.full((num_replicates, len(METRICS)), np.nan) for name in assays}
    if size >= FEWEST_UNITS:
        generator = np.random.Generator(np.random.Philox(key=seed, counter=np.array([0, 0, 0, _PURPOSE], np.uint64)))
        for number in range(num_replicates):
            counts = np.bincount(generator.integers(size, size=size), minlength=size).astype(np.float64)
            for name, assay in assays.items():
                replicates[name][number] = assay.metrics(counts)
    first, *others = assays
    return Measured(
        metrics={
            name: {
                metric: estimate(float(values[name][column]), replicates[name][:, column])
                for column, metric in enumerate(METRICS)
            }
            for name in assays
        },
        gains={
            name: estimate(float(values[first][0] - values[name][0]), replicates[first][:, 0] - replicates[name][:, 0])
            for name in others
        },
    )


class _Assay:
    """One prediction and its measurement, sorted once for all replicates."""

    def __init__(self, measured: np.ndarray, is_fit: np.ndarray, scores: np.ndarray) -> None:
        self._measured, self._is_fit, self._scores = measured, is_fit.astype(np.float64), scores
        (self._levels, self._score_groups), (_, self._measured_groups) = (
            np.unique(values, return_inverse=True) for values in (scores, measured)
        )
        # The best first; of equal ones the earlier.
        self._by_score, self._by_measured = (np.argsort(-values, kind="stable") for values in (scores, measured))

    def metrics(self, counts: np.ndarray | None = None) -> AssayMetrics:
        """Returns the metrics where each variant is drawn so many times; None: once."""
        counts = np.ones(len(self._measured)) if counts is None else counts
        of_levels = np.bincount(self._score_groups, counts)
        ranks = mean_ranks(of_levels)[self._score_groups]
        measured_ranks = mean_ranks(np.bincount(self._measured_groups, counts))[self._measured_groups]
        spearman = pearson(ranks, measured_ranks, counts)
        return AssayMetrics(
            spearman=np.nan if spearman is None else spearman,
            auc=self._auc(ranks, counts),
            mcc=self._mcc(of_levels, counts),
            ndcg=self._ndcg(counts),
        )

    def _auc(self, ranks: np.ndarray, counts: np.ndarray) -> float:
        fit = counts * self._is_fit
        num_fit = fit.sum()
        num_pairs = num_fit * (counts.sum() - num_fit)
        if not num_pairs:
            return np.nan
        return float((fit @ ranks - num_fit * (num_fit + 1) / 2) / num_pairs)

    def _mcc(self, of_levels: np.ndarray, counts: np.ndarray) -> float:
        ends = np.cumsum(of_levels)
        size = ends[-1]
        middle = [np.searchsorted(ends, place, side="right") for place in ((size - 1) // 2, size // 2)]
        is_predicted = (self._scores >= self._levels[middle].mean()).astype(np.float64)
        correlation = pearson(is_predicted, self._is_fit, counts)
        # As for scikit-learn: a prediction without differences has no correlation.
        return 0.0 if correlation is None else correlation

    def _ndcg(self, counts: np.ndarray) -> float:
        drawn = self._measured[counts > 0]
        low, high = float(drawn.min()), float(drawn.max())
        num_top = int(counts.sum() * TOP_SHARE)
        if not num_top or low == high:
            return np.nan
        gains = (self._measured - low) / (high - low)
        # Variants of one score have its mean gain, whatever their order.
        of_scores = np.bincount(self._score_groups, counts)
        means = np.bincount(self._score_groups, counts * gains) / np.maximum(of_scores, 1)
        discounts = 1 / np.log2(np.arange(2, num_top + 2))
        ours, best = (
            np.repeat(values[order], counts[order].astype(np.int64))[:num_top] @ discounts
            for values, order in ((means[self._score_groups], self._by_score), (gains, self._by_measured))
        )
        return float(ours / best)


def fit_by_median(measured: np.ndarray) -> np.ndarray:
    """Returns whether each measurement is above the median, where an assay does not say which variants are fit."""
    is_fit: np.ndarray = measured > np.median(measured)
    return is_fit


@dataclass(frozen=True, kw_only=True)
class AssayValue:
    """A metric of one assay of a benchmark.

    Attributes:
        protein: The protein; a function of a protein that several assays measured counts once.
        function: The kind of function that was measured.
        value: The metric; NaN if the assay has none.
    """

    protein: str
    function: str
    value: float


def benchmark_mean(assays: Sequence[AssayValue], seed: int) -> tuple[dict[str, float], Estimate]:
    """Returns the mean of each type of function, and the mean of these with a bootstrap interval.

    As in ProteinGym: assays of one function of one protein are averaged first, then the proteins of a type, then the
    types; the bootstrap draws the proteins within each type. (The benchmark's script rounds the value of each assay to
    three decimals before that; this does not.) There is no interval if a type has a single protein, whose mean would
    seem to be certain, or for fewer than `FEWEST_UNITS` proteins.
    """
    by_protein: dict[tuple[str, str], list[float]] = {}
    for assay in assays:
        if not np.isnan(assay.value):
            by_protein.setdefault((assay.function, assay.protein), []).append(assay.value)
    by_function: dict[str, list[float]] = {}
    for (function, _), values in sorted(by_protein.items()):
        by_function.setdefault(function, []).append(float(np.mean(values)))
    means = {function: float(np.mean(values)) for function, values in by_function.items()}
    value = float(np.mean(list(means.values()))) if means else np.nan
    generator = np.random.Generator(np.random.Philox(key=seed, counter=np.array([0, 0, 1, _PURPOSE], np.uint64)))
    draws = [
        np.array(values)[generator.integers(len(values), size=(NUM_REPLICATES, len(values)))].mean(axis=1)
        for values in by_function.values()
    ]
    is_enough = len(by_protein) >= FEWEST_UNITS and all(len(values) > 1 for values in by_function.values())
    return means, estimate(value, np.mean(draws, axis=0) if is_enough else np.full(NUM_REPLICATES, np.nan))
