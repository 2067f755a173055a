"""Long proteins can be computed in overlapping windows, or cut to their beginning."""

import itertools
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np


class Window(NamedTuple):
    """Consecutive residues of a protein, counted from 0, that are computed together; a short protein is one window.

    Attributes:
        record: The protein.
        start: The first residue that the model sees.
        stop: The end of the residues that it sees.
        core_start: The first residue whose embedding is taken from this window; those outside the core are context.
        core_stop: The end of the core.
    """

    record: int
    start: int
    stop: int
    core_start: int
    core_stop: int


@dataclass(frozen=True)
class Cut:
    """The treatment of long proteins.

    Attributes:
        window: Length of the overlapping windows in which a longer protein is computed, in residues; None: no windows.
        truncate: Number of residues of a longer protein that are embedded, from its first on; None: all.
    """

    window: int | None = None
    truncate: int | None = None

    def kept(self, lengths: np.ndarray) -> np.ndarray:
        """Returns the number of residues of each protein that are embedded."""
        return lengths if self.truncate is None else np.minimum(lengths, self.truncate)

    def windows(self, record: int, num_residues: int) -> list[Window]:
        """Returns the windows of a protein.

        Neighbouring windows overlap by half or more. The embedding of a residue is taken from the window whose middle
        is nearest to it.
        """
        kept = num_residues if self.truncate is None else min(num_residues, self.truncate)
        if self.window is None or kept <= self.window:
            return [Window(record, 0, kept, 0, kept)]
        count = int(self._num_windows(np.int64(kept)))
        starts = [number * (kept - self.window) // (count - 1) for number in range(count)]
        # The cores of two neighbours meet in the middle of their overlap.
        bounds = [0, *((before + after + self.window) // 2 for before, after in itertools.pairwise(starts)), kept]
        return [
            Window(record, start, start + self.window, bounds[number], bounds[number + 1])
            for number, start in enumerate(starts)
        ]

    def sizes(self, num_residues: np.ndarray) -> np.ndarray:
        """Returns the number of residues of every window of some proteins, int64, in no particular order."""
        kept = self.kept(num_residues)
        if self.window is None:
            return kept
        is_long = kept > self.window
        num_windows = int(self._num_windows(kept[is_long]).sum())
        return np.concatenate([kept[~is_long], np.full(num_windows, self.window, dtype=np.int64)])

    def _num_windows(self, num_residues: Any) -> Any:
        """Returns the number of windows of proteins that are longer than one window."""
        assert self.window is not None
        stride = max(1, self.window // 2)
        return -(-(num_residues - self.window) // stride) + 1
