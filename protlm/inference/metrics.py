"""The metrics of a model on a split, and their uncertainty by a bootstrap over proteins, in bounded memory.

Every metric is a function of sums over the scored residues. Resampling the proteins multiplies the terms of each
protein by a weight; with Poisson(1) weights, drawn for each protein on its own, the replicates can be summed while the
stream of scores goes by, and the weights of a protein are the same for every model that is measured on it. So
differences between models are paired.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import xxhash

from protlm.inference.residue_scores import ResidueScores

NUM_REPLICATES = 1000
FEWEST_UNITS = 10
"""Proteins or clusters that an interval needs at least."""
TOP_RANKS = 5
NUM_CONFIDENCE_BINS = 20
_BOOTSTRAP_COUNTER = np.array([0, 0, 0, 3], dtype=np.uint64)
"""Keeps the weights apart from the masks, whose generator has the same key; `data.batching.draws` lists the others."""

_ROUNDING = 1e-12

_NUM_TARGETS, _NLL, _NUM_CORRECT, _NUM_TOP = range(4)
_BINS = 4
NUM_SUMS = _BINS + 3 * NUM_CONFIDENCE_BINS
"""Targets, negative log likelihood, correct, among the first ranks; then per bin of confidence its targets, the sum of
their confidence, and how many are correct."""

METRICS = ("accuracy", "top5_accuracy", "perplexity", "bits_per_residue", "calibration_error")


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A metric with its uncertainty.

    Attributes:
        value: On the proteins of the split.
        stderr: Standard deviation over the replicates; None where they do not differ, as of a single protein or
            cluster, or where some are infinite.
        low: 2.5th percentile of the replicates.
        high: 97.5th percentile.
    """

    value: float
    stderr: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True, kw_only=True)
class Score:
    """The accuracy, a fraction, and the perplexity of a model on a split."""

    accuracy: float
    perplexity: float

    @property
    def loss(self) -> float:
        """Mean negative log likelihood in nats."""
        return math.log(self.perplexity)


def sums_by_protein(scores: ResidueScores) -> tuple[np.ndarray, np.ndarray]:
    """Returns the records of a row that have targets, and the sums of each, float64 (records, NUM_SUMS)."""
    records, places = np.unique(scores.records, return_inverse=True)
    ranks = scores.ranks()
    correct = ranks == 0
    confidence = np.exp(scores.log_probabilities.max(axis=1).astype(np.float64))
    # The NaN of a model that overflows stays in the sums, and counts in the first bin.
    bins = np.minimum((np.nan_to_num(confidence) * NUM_CONFIDENCE_BINS).astype(np.int64), NUM_CONFIDENCE_BINS - 1)
    size = len(records)
    columns = [
        np.bincount(places, weights=weights, minlength=size)
        for weights in (np.ones(len(scores)), -scores.true_log_probabilities(), correct, ranks < TOP_RANKS)
    ]
    cells = places * NUM_CONFIDENCE_BINS + bins
    binned = [
        np.bincount(cells, weights=weights, minlength=size * NUM_CONFIDENCE_BINS).reshape(size, NUM_CONFIDENCE_BINS)
        for weights in (np.ones(len(scores)), confidence, correct)
    ]
    sums = np.concatenate([np.stack(columns, axis=1), *binned], axis=1)
    return records, sums


def replicate_weights(keys: Sequence[bytes], seed: int, num_replicates: int = NUM_REPLICATES) -> np.ndarray:
    """Returns how often each replicate draws each protein, float64 (proteins, replicates).

    The Poisson bootstrap: a draw with replacement from many proteins takes each a number of times that is close to
    Poisson(1), independently (Chamandy et al. 2012).

    Args:
        keys: The name of each protein's cluster, or the bytes of its sequence: proteins with the same key get the same
            weights, and so are resampled together.
        seed: Of the bootstrap.
        num_replicates: Number of replicates.
    """
    weights = np.empty((len(keys), num_replicates))
    for place, key in enumerate(keys):
        digest = xxhash.xxh3_128_digest(key, seed=seed)
        philox = np.random.Philox(key=np.frombuffer(digest, dtype=np.uint64), counter=_BOOTSTRAP_COUNTER)
        generator = np.random.Generator(philox)
        weights[place] = generator.poisson(1.0, num_replicates)
    return weights


def replicated(weights: np.ndarray, sums: np.ndarray) -> np.ndarray:
    """Returns the sums of every replicate, float64 (replicates, columns).

    Args:
        weights: How often each replicate draws each protein, float64 (proteins, replicates).
        sums: The sums of each protein, float64 (proteins, columns).
    """
    # Loaded here: who only reads reports does not wait for it.
    import torch

    # By torch: NumPy's threads would spin after each product, on the cores of the next forward pass. Copied, since
    # where an array begins in memory may change the last digit.
    product: np.ndarray = (torch.tensor(weights).T @ torch.tensor(sums)).numpy()
    return product


class Resampled(NamedTuple):
    """The proteins of a row that have targets, and how often each replicate draws them.

    Attributes:
        records: Their numbers in the split, rising.
        keys: The key of each, by which it is resampled.
        weights: float64 (proteins, replicates), of `replicate_weights`.
    """

    records: np.ndarray
    keys: Sequence[bytes]
    weights: np.ndarray


class MetricSums:
    """The sums of one model over a split, and those of every replicate.

    Attributes:
        total: float64 (NUM_SUMS,).
        replicates: float64 (replicates, NUM_SUMS).
    """

    def __init__(self, num_replicates: int = NUM_REPLICATES) -> None:
        self.total = np.zeros(NUM_SUMS)
        self.replicates = np.zeros((num_replicates, NUM_SUMS))
        self._units: set[bytes] = set()

    @classmethod
    def of(cls, total: np.ndarray) -> "MetricSums":
        """Returns sums over a split, (NUM_SUMS,), that have no replicates."""
        sums = cls(num_replicates=0)
        sums.total = total
        return sums

    def add(self, sums: np.ndarray, weights: np.ndarray, keys: Sequence[bytes] = ()) -> None:
        """Adds proteins.

        Args:
            sums: Of each protein, (proteins, NUM_SUMS).
            weights: Of each protein, (proteins, replicates).
            keys: The keys of the weights; only the first different ones are kept, to see whether there are enough.
        """
        if keys and len(self._units) < FEWEST_UNITS:
            self._units.update(keys)
        self.total += sums.sum(axis=0)
        self.replicates += replicated(weights, sums)

    def resampled(self) -> np.ndarray:
        """Returns the replicates, (replicates, NUM_SUMS); NaN if fewer than `FEWEST_UNITS` proteins were resampled.

        From a few proteins a bootstrap gives intervals that are far too narrow.
        """
        is_enough = not self._units or len(self._units) >= FEWEST_UNITS
        return self.replicates if is_enough else np.full_like(self.replicates, np.nan)

    @property
    def num_targets(self) -> int:
        """Scored residues."""
        return round(float(self.total[_NUM_TARGETS]))

    def values(self) -> dict[str, float]:
        """Returns every metric of `METRICS`."""
        return {name: float(column[0]) for name, column in metric_values(self.total[None]).items()}

    def score(self) -> Score:
        """Returns accuracy and perplexity."""
        values = self.values()
        return Score(accuracy=values["accuracy"], perplexity=values["perplexity"])

    def estimates(self) -> dict[str, Estimate]:
        """Returns every metric with its standard error and interval."""
        replicates = metric_values(self.resampled())
        return {name: estimate(value, replicates[name]) for name, value in self.values().items()}


def metric_values(sums: np.ndarray) -> dict[str, np.ndarray]:
    """Returns every metric of each row of sums, (rows, NUM_SUMS); NaN for a row without targets."""
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        num_targets = sums[:, _NUM_TARGETS]
        nll = sums[:, _NLL] / num_targets
        _, confidence, correct = np.split(sums[:, _BINS:], 3, axis=1)
        return {
            "accuracy": sums[:, _NUM_CORRECT] / num_targets,
            "top5_accuracy": sums[:, _NUM_TOP] / num_targets,
            "perplexity": np.exp(nll),
            "bits_per_residue": nll / math.log(2),
            "calibration_error": np.abs(confidence - correct).sum(axis=1) / num_targets,
        }


def confidence_bins(sums: np.ndarray) -> list[dict[str, float]]:
    """Returns the calibration curve of some sums, (NUM_SUMS,): one row for each bin of confidence that has targets."""
    in_bin, confidence, correct = np.split(sums[_BINS:], 3)
    return [
        {
            "low": place / NUM_CONFIDENCE_BINS,
            "num_targets": int(in_bin[place]),
            "confidence": float(confidence[place] / in_bin[place]),
            "accuracy": float(correct[place] / in_bin[place]),
        }
        for place in np.flatnonzero(in_bin).tolist()
    ]


def estimate(value: float, replicates: np.ndarray) -> Estimate:
    """Returns a value with the spread of its replicates, of which those without targets, NaN, are left out."""
    replicates = replicates[~np.isnan(replicates)]
    has_spread = len(replicates) > 1 and bool(np.isfinite(replicates).all())
    # The replicates of a single protein or cluster differ by rounding only.
    if not has_spread or np.ptp(replicates) <= _ROUNDING * np.abs(replicates).max():
        return Estimate(value=value, stderr=None, low=None, high=None)
    low, high = np.percentile(replicates, [2.5, 97.5])
    return Estimate(value=value, stderr=float(replicates.std(ddof=1)), low=float(low), high=float(high))
