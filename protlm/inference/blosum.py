"""BLOSUM62: how far a similarity of amino acids agrees with it, and the score that it gives a mutant."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

import numpy as np
from Bio.Align import substitution_matrices

from protlm.data.mutations import Substitution
from protlm.inference.correlation import pearson, spearman
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
        pearson=pearson(values, scores),
        spearman=spearman(values, scores),
        num_pairs=len(values),
    )


@cache
def blosum62() -> np.ndarray:
    """Returns BLOSUM62 for the standard residues in half bits, float64 (20, 20), read-only."""
    matrix = substitution_matrices.load("BLOSUM62")  # type: ignore[no-untyped-call]
    scores = np.array([[matrix[a, b] for b in STANDARD_RESIDUES] for a in STANDARD_RESIDUES], dtype=np.float64)
    scores.flags.writeable = False
    return scores


def blosum62_score(substitutions: Iterable[Substitution]) -> float:
    """Returns Σ_i (B(wild type_i, mutant_i) − B(wild type_i, wild type_i)) with B = BLOSUM62, in half bits.

    Like the score of a model it is 0 for the wild type. NaN for a letter that is no standard residue.
    """
    matrix = blosum62()
    total = 0.0
    for _, wild_type, mutant in substitutions:
        before, after = RESIDUES.index(wild_type), RESIDUES.index(mutant)
        is_standard = max(before, after) < NUM_STANDARD_RESIDUES
        total += float(matrix[before, after] - matrix[before, before]) if is_standard else np.nan
    return total
