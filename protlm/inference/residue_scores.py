"""The stream of scores: what a model predicted at every scored residue; every measurement is a reduction of it."""

from dataclasses import dataclass, replace

import numpy as np

from protlm.vocabulary import FIRST_RESIDUE


@dataclass(frozen=True, slots=True)
class ResidueScores:
    """The predictions at the scored residues of one row, in the order of the row.

    Attributes:
        records: Number of each residue's record in its split, int64 (targets,).
        positions: Position of each residue in its protein, from 0, int64 (targets,).
        targets: The true tokens, int64 (targets,).
        log_probabilities: Natural logarithms of the predicted distribution over all tokens, float32 or float64
            (targets, 33).
    """

    records: np.ndarray
    positions: np.ndarray
    targets: np.ndarray
    log_probabilities: np.ndarray

    def __len__(self) -> int:
        return len(self.targets)

    @property
    def residues(self) -> np.ndarray:
        """The true residues by their place in `vocabulary.RESIDUES`, int64 (targets,)."""
        return self.targets - FIRST_RESIDUE

    def predicted_as(self, log_probabilities: np.ndarray) -> "ResidueScores":
        """Returns another prediction at the same targets, (targets, 33)."""
        return replace(self, log_probabilities=log_probabilities)

    def true_log_probabilities(self) -> np.ndarray:
        """Returns the log-probability of each true residue, float64 (targets,)."""
        true: np.ndarray = self.log_probabilities[np.arange(len(self)), self.targets].astype(np.float64)
        return true

    def ranks(self) -> np.ndarray:
        """Returns the rank of each true residue among all 33 tokens, int64 (targets,); 0 is the first.

        Of equal probabilities the token with the lower number ranks first, as for argmax. A true residue whose
        log-probability is NaN ranks last.
        """
        true = self.log_probabilities[np.arange(len(self)), self.targets][:, None]
        before = np.arange(self.log_probabilities.shape[1]) < self.targets[:, None]
        is_ahead = (self.log_probabilities > true) | ((self.log_probabilities == true) & before)
        ranks: np.ndarray = is_ahead.sum(axis=1)
        ranks[np.isnan(true[:, 0])] = self.log_probabilities.shape[1] - 1
        return ranks
