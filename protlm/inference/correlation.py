"""Correlations of values and of ranks, with weights: how often a resampling draws each value."""

import numpy as np


def ranks(values: np.ndarray) -> np.ndarray:
    """Returns the rank of every value, from 1; equal values share their mean rank, float64."""
    _, groups, counts = np.unique(values, return_inverse=True, return_counts=True)
    return mean_ranks(counts.astype(np.float64))[groups]


def mean_ranks(counts: np.ndarray) -> np.ndarray:
    """Returns the mean rank of each group of equal values, given how many there are of each, in rising order."""
    means: np.ndarray = np.cumsum(counts) - (counts - 1) / 2
    return means


def pearson(x: np.ndarray, y: np.ndarray, weights: np.ndarray | None = None) -> float | None:
    """Returns the correlation of two series; None if one of them is constant or fewer than 3 values are drawn.

    Args:
        x: The one.
        y: The other.
        weights: How often each pair is drawn; None: once.
    """
    weights = np.ones(len(x)) if weights is None else weights
    drawn = weights > 0
    if np.count_nonzero(drawn) < 3 or not np.ptp(x[drawn]) or not np.ptp(y[drawn]):
        return None
    total = weights.sum()
    x, y = x - (weights @ x) / total, y - (weights @ y) / total
    weighted_x, weighted_y = weights * x, weights * y
    return float((weighted_x @ y) / np.sqrt((weighted_x @ x) * (weighted_y @ y)))


def spearman(x: np.ndarray, y: np.ndarray) -> float | None:
    """Returns the correlation of the ranks of two series; None as for `pearson`."""
    return pearson(ranks(x), ranks(y))
