"""What can be read from a sequence without a model: the features that a probe of a model is compared with.

None of them knows more than letters, how often each occurs and which stand beside each other.
"""

from collections.abc import Iterable

import numpy as np

from protlm.vocabulary import FIRST_RESIDUE, NUM_RESIDUES, NUM_STANDARD_RESIDUES

WINDOW_RADIUS = 7
"""Residues on each side of the one that a window is around: 15 in all, as in early predictors of secondary structure
(Qian and Sejnowski 1988 take 13)."""

MOST_VARIANT_FEATURES = 4096
"""With more of them the variants of one protein have no one-hot baseline."""

_STATES = NUM_RESIDUES + 1
_BEYOND = NUM_RESIDUES


def composition(tokens: np.ndarray) -> np.ndarray:
    """Returns the fraction of each of the 25 residue letters in a protein, float32 (25,)."""
    counts = np.bincount(tokens - FIRST_RESIDUE, minlength=NUM_RESIDUES)
    return (counts / len(tokens)).astype(np.float32)


def dipeptides(tokens: np.ndarray) -> np.ndarray:
    """Returns the fraction of each pair of neighbours, of standard residues, among all pairs, float32 (400,)."""
    size = NUM_STANDARD_RESIDUES
    first, second = tokens[:-1].astype(np.int64) - FIRST_RESIDUE, tokens[1:].astype(np.int64) - FIRST_RESIDUE
    is_standard = (first < size) & (second < size)
    counts = np.bincount(first[is_standard] * size + second[is_standard], minlength=size * size)
    return (counts / max(1, len(tokens) - 1)).astype(np.float32)


def variant_columns(proteins: Iterable[np.ndarray], length: int) -> np.ndarray | None:
    """Returns the columns of a one-hot coding of proteins of one length: the residues of each position that varies.

    Args:
        proteins: Residue tokens of each.
        length: The residues of each.

    Returns:
        Position and token of each column, int64 (columns, 2); None for more than `MOST_VARIANT_FEATURES`.
    """
    occurs = np.zeros((length, NUM_RESIDUES), dtype=bool)
    positions = np.arange(length)
    for tokens in proteins:
        occurs[positions, tokens - FIRST_RESIDUE] = True
    occurs[occurs.sum(axis=1) == 1] = False
    columns = np.argwhere(occurs) + np.array([0, FIRST_RESIDUE])
    return columns if len(columns) <= MOST_VARIANT_FEATURES else None


def variant_one_hot(tokens: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Returns whether a protein has the residue of each column of `variant_columns`, float32 (columns,)."""
    is_there: np.ndarray = tokens[columns[:, 0]] == columns[:, 1]
    return is_there.astype(np.float32)


class WindowFeatures:
    """The residues around each residue, one-hot; a place beyond an end of the protein is a state of its own.

    Attributes:
        dim: Number of features of a residue.
    """

    def __init__(self, tokens: np.ndarray, offsets: np.ndarray, radius: int = WINDOW_RADIUS) -> None:
        """Prepares.

        Args:
            tokens: Residue tokens of all proteins back to back, uint8.
            offsets: The bounds of each protein, int64 (proteins + 1).
            radius: Residues on each side; 0 for the residue alone.
        """
        lengths = np.diff(offsets)
        self._radius = radius
        # Between two proteins lie as many places beyond an end as a window reaches, so that none sees a neighbour.
        self._shift = np.repeat(np.arange(len(lengths)) * radius, lengths) + radius
        self._states = np.full(len(tokens) + radius * (len(lengths) + 1), _BEYOND, dtype=np.uint8)
        self._states[np.arange(len(tokens)) + self._shift] = tokens - FIRST_RESIDUE
        self.dim = (2 * radius + 1) * _STATES

    def rows(self, numbers: np.ndarray) -> np.ndarray:
        """Returns the features of residues by their numbers among all, float32 (residues, dim)."""
        offsets = np.arange(-self._radius, self._radius + 1)
        states = self._states[(numbers + self._shift[numbers])[:, None] + offsets]
        one_hot = np.zeros((len(numbers), len(offsets), _STATES), dtype=np.float32)
        np.put_along_axis(one_hot, states[:, :, None].astype(np.int64), 1, axis=2)
        return one_hot.reshape(len(numbers), self.dim)
