"""How far a similarity of amino acids agrees with BLOSUM62."""

from dataclasses import dataclass
from functools import cache

import numpy as np
from Bio.Align import substitution_matrices

from protlm.vocabulary import NUM_STANDARD_RESIDUES, RESIDUES

STANDARD_RESIDUES = RESIDUES[:NUM_STANDARD_RESIDUES]
"""The 20 standard residues, in the order of all matrices here."""


@dataclass(frozen=True, kw_only=True)
class BlosumAgreement:
    """The agreement of a similarity of amino acids with BLOSUM62, over the 190 pairs of two different residues.

    Attributes:
        pearson: Correlation of the values; None if either side is constant or there are fewer than 3 pairs.
        spearman: Correlation of the ranks, equal values sharing their mean rank; None likewise.
        num_pairs: Pairs with a finite similarity.
    """

    pearson: float | None
    spearman: float | None
    num_pairs: int


def compare_with_blosum62(similarity: np.ndarray) -> BlosumAgreement:
    """Returns the agreement of a symmetric similarity (20, 20), in the order of STANDARD_RESIDUES, with BLOSUM62."""
    pairs = np.triu_indices(NUM_STANDARD_RESIDUES, k=1)
    values, scores = np.asarray(similarity, dtype=np.float64)[pairs], blosum62()[pairs]
    is_finite = np.isfinite(values)
    values, scores = values[is_finite], scores[is_finite]
    return BlosumAgreement(
        pearson=_correlation(values, scores),
        spearman=_correlation(_ranks(values), _ranks(scores)),
        num_pairs=len(values),
    )


@cache
def blosum62() -> np.ndarray:
    """Returns BLOSUM62 for the standard residues in half bits, float64 (20, 20), read-only."""
    matrix = substitution_matrices.load("BLOSUM62")  # type: ignore[no-untyped-call]
    scores = np.array([[matrix[a, b] for b in STANDARD_RESIDUES] for a in STANDARD_RESIDUES], dtype=np.float64)
    scores.flags.writeable = False
    return scores


def _ranks(values: np.ndarray) -> np.ndarray:
    """Returns the rank of every value; equal values share their mean rank."""
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    means = np.cumsum(counts) - (counts - 1) / 2
    ranks: np.ndarray = means[places]
    return ranks


def _correlation(x: np.ndarray, y: np.ndarray) -> float | None:
    if len(x) < 3 or not np.ptp(x) or not np.ptp(y):
        return None
    return float(np.corrcoef(x, y)[0, 1])
