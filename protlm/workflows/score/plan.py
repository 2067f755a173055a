"""The division of score's work into portions and rows of passes.

A site is a position of a protein whose probabilities are computed. A plan depends only on the sites and the options, so
all processes of a run, and a resumed run, have the same one.
"""

from collections.abc import Iterator

import numpy as np

from protlm.choices import ScoreStrategy
from protlm.config import SPECIAL_TOKENS_PER_SEGMENT
from protlm.data.batching.rows import ROWS_PER_PORTION, portion_bounds
from protlm.data.storage.protein_store import ProteinStore
from protlm.inference.long_proteins import Cut
from protlm.inference.marginals import CONTEXTS, Pass, packed_passes, passes_of
from protlm.vocabulary import VOCABULARY_SIZE
from protlm.workflows.score.sites import Sites


class Plan:
    """The portions of a run: consecutive sites that are computed together and written as one file.

    Attributes:
        bounds: The first site of each portion, then the number of sites.
        num_portions: Number of portions.
        num_columns: Numbers that are kept of a site: of all tokens, or for pseudo-perplexities of the true one.
        sites: The positions that are computed.
    """

    def __init__(
        self, proteins: ProteinStore, sites: Sites, strategy: ScoreStrategy, cut: Cut, tokens_per_batch: int
    ) -> None:
        """Plans a run.

        Args:
            proteins: All proteins.
            sites: The positions that are computed.
            strategy: How mutants are scored.
            cut: The treatment of long proteins.
            tokens_per_batch: Budget of a row.
        """
        self._proteins, self._cut, self._tokens_per_batch = proteins, cut, tokens_per_batch
        self.sites = sites
        self._context = CONTEXTS[strategy]
        self.num_columns = 1 if strategy == "pseudo-perplexity" else VOCABULARY_SIZE
        counts = np.diff(sites.bounds)
        tokens = self._sizes(np.asarray(proteins.lengths)) + SPECIAL_TOKENS_PER_SEGMENT
        budget = ROWS_PER_PORTION * tokens_per_batch
        if self._context == "masked":
            self.bounds = portion_bounds(tokens, budget, counts)
        else:
            touched = np.flatnonzero(counts)
            records = np.append(touched, len(counts))[portion_bounds(tokens[touched], budget)]
            self.bounds = sites.bounds[records]
        self.num_portions = len(self.bounds) - 1

    def portion_sizes(self) -> list[int]:
        """Returns the number of sites in each portion."""
        sizes: list[int] = np.diff(self.bounds).tolist()
        return sizes

    def rows(self, portion: int) -> Iterator[list[Pass]]:
        """Yields the passes of each row of a portion, in the order of its sites."""
        return packed_passes(self._passes(portion), self._tokens_per_batch)

    def num_residues(self, portion: int) -> int:
        """Returns the residues that the passes of a portion see."""
        stretches = list(self._stretches(portion))
        records = [record for record, _, _ in stretches]
        counts = [stop - start for _, start, stop in stretches]
        lengths = np.asarray(self._proteins.lengths)[records]
        if self._context == "masked":
            return int((self._sizes(lengths) * counts).sum())
        return sum(len(each.tokens) for each in self._passes(portion))

    def _passes(self, portion: int) -> Iterator[Pass]:
        for record, start, stop in self._stretches(portion):
            positions = self.sites.positions(record, start, stop)
            yield from passes_of(record, self._proteins.tokens(record), positions, self._context, self._cut)

    def _stretches(self, portion: int) -> Iterator[tuple[int, int, int]]:
        """Yields the proteins of a portion, each with its first site in it and the end of its sites in it."""
        start, stop = int(self.bounds[portion]), int(self.bounds[portion + 1])
        bounds = self.sites.bounds
        record = int(np.searchsorted(bounds, start, side="right")) - 1
        while start < stop:
            end = min(int(bounds[record + 1]), stop)
            if end > start:
                yield record, start, end
            start, record = end, record + 1

    def _sizes(self, lengths: np.ndarray) -> np.ndarray:
        """Returns the residues that a pass sees of proteins of these lengths."""
        return lengths if self._cut.window is None else np.minimum(lengths, self._cut.window)

    def pass_sizes(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns the residues of each kind of pass, and how often it is made, int64; for an estimate of the time."""
        counts = np.diff(self.sites.bounds)
        touched = counts > 0
        lengths = np.asarray(self._proteins.lengths)[touched]
        if self._context == "masked":
            return self._sizes(lengths), counts[touched]
        # Windows without a position are not computed.
        seen = [len(each.tokens) for portion in range(self.num_portions) for each in self._passes(portion)]
        return np.array(seen, dtype=np.int64), np.ones(len(seen), dtype=np.int64)
