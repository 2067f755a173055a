"""The baseline of an alignment: a residue's frequency at its site, whatever stands at the others."""

import numpy as np

from protlm.data.mutations import Substitution
from protlm.data.parsing.alignment import AlignedCounts
from protlm.vocabulary import NUM_STANDARD_RESIDUES, RESIDUES


class SiteFrequencies:
    """The frequencies of the standard residues at the sites of a protein, smoothed by adding one to every count.

    Sequences are not weighted by their similarity.

    Attributes:
        num_sequences: Sequences of the alignment, the protein's own among them.
        num_covered: Sites of the protein that the alignment covers.
        log_frequencies: Of each standard residue at each site, (num_residues, 20), in the order of
            `vocabulary.RESIDUES`.
    """

    def __init__(self, alignment: AlignedCounts, protein: str) -> None:
        """Finds the first sequence of the alignment in the protein.

        Raises:
            ValueError: It is not there, or several times.
        """
        places = [place for place in range(len(protein)) if protein.startswith(alignment.query, place)]
        if len(places) != 1:
            where = "several times in" if places else "not in"
            raise ValueError(
                f"the first sequence of the alignment, of {len(alignment.query):,} residues, is {where} the protein; "
                "expected the protein itself, or a stretch of it"
            )
        counts = np.zeros((len(protein), NUM_STANDARD_RESIDUES))
        counts[places[0] : places[0] + len(alignment.query)] = alignment.counts
        self.log_frequencies = np.log((counts + 1) / (counts + 1).sum(axis=1, keepdims=True))
        self.num_sequences, self.num_covered = alignment.num_sequences, len(alignment.query)

    def score(self, substitutions: tuple[Substitution, ...]) -> float:
        """Returns Σ_i (log f_i(mutant_i) − log f_i(wild type_i)); NaN for a letter that is no standard residue.

        A site that the alignment does not cover adds 0.
        """
        return float(
            sum(self._log(position, mutant) - self._log(position, wild) for position, wild, mutant in substitutions)
        )

    def _log(self, position: int, letter: str) -> float:
        column = RESIDUES.index(letter)
        return float(self.log_frequencies[position, column]) if column < NUM_STANDARD_RESIDUES else np.nan
