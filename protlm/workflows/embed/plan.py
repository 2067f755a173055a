"""The division of embed's work into portions and rows.

A plan depends only on the sequences and the options, so all processes of a run, and a resumed run, have the same one.
"""

from collections.abc import Iterator

import numpy as np

from protlm.config import SPECIAL_TOKENS_PER_SEGMENT
from protlm.data.batching.rows import ROWS_PER_PORTION, pack, portion_bounds
from protlm.data.storage.protein_store import ProteinStore
from protlm.inference.long_proteins import Cut, Window
from protlm.workflows.embed.settings import EmbedSettings

_PORTION_BYTES = 128 << 20


class Plan:
    """The portions of a run: consecutive records that are computed together and written as one file.

    A sequence is computed in the portion of the first record that has it.

    Attributes:
        num_portions: Number of portions.
        bounds: The first record of each portion, then the number of records.
    """

    def __init__(
        self, lengths: np.ndarray, first: np.ndarray, cut: Cut, tokens_per_batch: int, bytes_per_residue: int
    ) -> None:
        """Plans a run.

        Args:
            lengths: Residues of each record.
            first: For each record the first one with the same sequence.
            cut: The treatment of long proteins.
            tokens_per_batch: Budget of a row.
            bytes_per_residue: Bytes stored for a residue; they bound a portion, which is computed in memory.
        """
        self._lengths, self._first = lengths, first
        self._cut, self._tokens_per_batch = cut, tokens_per_batch
        self._kept = cut.kept(lengths)
        most_residues = _PORTION_BYTES // max(1, bytes_per_residue)
        budget = max(tokens_per_batch, min(ROWS_PER_PORTION * tokens_per_batch, most_residues))
        self.bounds = portion_bounds(self._costs(), budget)
        self.num_portions = len(self.bounds) - 1

    @classmethod
    def of(cls, proteins: ProteinStore, settings: EmbedSettings) -> "Plan":
        """Returns the plan for proteins in a store."""
        return cls(proteins.lengths, proteins.first, settings.cut, settings.tokens_per_batch, settings.num_bytes(0, 1))

    def _costs(self) -> np.ndarray:
        is_first = self._first == np.arange(len(self._first))
        return np.where(is_first, self._kept + SPECIAL_TOKENS_PER_SEGMENT, 0)

    def records(self, portion: int) -> range:
        """Returns the records of a portion."""
        return range(int(self.bounds[portion]), int(self.bounds[portion + 1]))

    def computed(self, portion: int) -> list[int]:
        """Returns the records of a portion that are computed: the first ones with their sequence."""
        start, stop = self.bounds[portion], self.bounds[portion + 1]
        numbers: list[int] = (np.flatnonzero(self._first[start:stop] == np.arange(start, stop)) + start).tolist()
        return numbers

    def portion_of(self, record: int) -> int:
        """Returns the portion that a record belongs to."""
        return int(np.searchsorted(self.bounds, record, side="right")) - 1

    def last_use(self) -> np.ndarray:
        """Returns for each portion the last one with a record whose sequence it computes, int64 (portions,)."""
        portions = np.searchsorted(self.bounds, np.arange(len(self._first)), side="right") - 1
        last = np.arange(self.num_portions)
        np.maximum.at(last, portions[self._first], portions)
        return last

    def num_residues(self, portion: int) -> int:
        """Returns the number of residues computed in a portion, without the overlap of windows."""
        return int(self._kept[self.computed(portion)].sum())

    def rows(self, portion: int) -> Iterator[list[Window]]:
        """Yields the windows of each row of a portion, the longest first, so that a row has those of similar length."""
        windows = [
            window
            for record in self.computed(portion)
            for window in self._cut.windows(record, int(self._lengths[record]))
        ]
        windows.sort(key=lambda window: window.start - window.stop)
        sizes = np.array([window.stop - window.start for window in windows], dtype=np.int64)
        for row in pack(sizes, self._tokens_per_batch):
            yield windows[row]
