"""What embed computes, and in which order: hides how proteins become parts and rows.

The plan is a function of lengths and options, so every process of a run and every resumed run has the same.
"""

from collections.abc import Iterator

import numpy as np

from protlm.config import SPECIAL_TOKENS_PER_SEGMENT
from protlm.data.batching.batches import pack
from protlm.data.storage.protein_store import ProteinStore
from protlm.inference.long_proteins import Cut, Segment
from protlm.workflows.embed.settings import EmbedSettings

_ROWS_PER_PART = 16
_PART_BYTES = 128 << 20
_PART_RECORDS = 1 << 16


class Plan:
    """The parts of a run: consecutive records, of which each sequence is computed where it comes first.

    Attributes:
        num_parts: Number of parts.
        bounds: The first record of each part, and the number of all.
    """

    def __init__(
        self, lengths: np.ndarray, first: np.ndarray, cut: Cut, tokens_per_batch: int, bytes_per_residue: int
    ) -> None:
        """Plans a run.

        Args:
            lengths: Residues of each record.
            first: For each record the first one with the same sequence.
            cut: What becomes of long proteins.
            tokens_per_batch: Budget of a row.
            bytes_per_residue: What is stored of a residue; a part is held in memory while it is computed.
        """
        self._lengths, self._first = lengths, first
        self._cut, self._tokens_per_batch = cut, tokens_per_batch
        self._kept = cut.kept(lengths)
        most = _PART_BYTES // max(1, bytes_per_residue)
        self.bounds = _part_bounds(self._costs(), max(tokens_per_batch, min(_ROWS_PER_PART * tokens_per_batch, most)))
        self.num_parts = len(self.bounds) - 1

    @classmethod
    def of(cls, proteins: ProteinStore, settings: EmbedSettings) -> "Plan":
        """Returns the plan for some proteins."""
        return cls(proteins.lengths, proteins.first, settings.cut, settings.tokens_per_batch, settings.num_bytes(0, 1))

    def _costs(self) -> np.ndarray:
        is_first = self._first == np.arange(len(self._first))
        return np.where(is_first, self._kept + SPECIAL_TOKENS_PER_SEGMENT, 0)

    def records(self, part: int) -> range:
        """Returns the records of a part."""
        return range(int(self.bounds[part]), int(self.bounds[part + 1]))

    def computed(self, part: int) -> list[int]:
        """Returns the records of a part whose sequence stands in it for the first time."""
        start, stop = self.bounds[part], self.bounds[part + 1]
        numbers: list[int] = (np.flatnonzero(self._first[start:stop] == np.arange(start, stop)) + start).tolist()
        return numbers

    def part_of(self, record: int) -> int:
        """Returns the part that has a record."""
        return int(np.searchsorted(self.bounds, record, side="right")) - 1

    def last_use(self) -> np.ndarray:
        """Returns for each part the last one that has a record with a sequence of it, int64 (parts,)."""
        parts = np.searchsorted(self.bounds, np.arange(len(self._first)), side="right") - 1
        last = np.arange(self.num_parts)
        np.maximum.at(last, parts[self._first], parts)
        return last

    def num_residues(self, part: int) -> int:
        """Returns the residues of the proteins computed in a part, each once."""
        return int(self._kept[self.computed(part)].sum())

    def rows(self, part: int) -> Iterator[list[Segment]]:
        """Yields the rows of a part: the longest segments first, so that neighbours are of like length."""
        segments = [
            segment
            for record in self.computed(part)
            for segment in self._cut.segments(record, int(self._lengths[record]))
        ]
        segments.sort(key=lambda segment: segment.start - segment.stop)
        sizes = np.array([segment.stop - segment.start for segment in segments], dtype=np.int64)
        for stretch in pack(sizes, self._tokens_per_batch):
            yield segments[stretch]


def _part_bounds(costs: np.ndarray, budget: int) -> np.ndarray:
    """Returns where parts begin: each as long as the costs in it fit into the budget, and never empty."""
    ends = np.cumsum(costs)
    bounds, start, used = [0], 0, 0
    while start < len(ends):
        stop = int(ends.searchsorted(used + budget, side="right"))
        start = min(max(start + 1, stop), start + _PART_RECORDS)
        used = int(ends[start - 1])
        bounds.append(start)
    return np.array(bounds, dtype=np.int64)
