"""What becomes of a protein that is longer than a model, or a user, wants to see at once: windows, or its beginning."""

import itertools
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np


class Segment(NamedTuple):
    """A stretch of one protein that is computed by itself, in residues from 0.

    Attributes:
        record: The protein.
        start: The first residue that the model sees.
        stop: The end of what it sees.
        core_start: The first residue whose embedding is taken from here; the others are context.
        core_stop: The end of those.
    """

    record: int
    start: int
    stop: int
    core_start: int
    core_stop: int


@dataclass(frozen=True)
class Cut:
    """What becomes of a long protein.

    Attributes:
        window: Residues of the overlapping windows that a longer protein is computed in; None for no windows.
        truncate: Only so many residues of a longer protein are embedded; None for all.
    """

    window: int | None = None
    truncate: int | None = None

    def kept(self, lengths: np.ndarray) -> np.ndarray:
        """Returns the residues of each protein that are embedded."""
        return lengths if self.truncate is None else np.minimum(lengths, self.truncate)

    def segments(self, record: int, num_residues: int) -> list[Segment]:
        """Returns what is computed of a protein.

        Neighbouring windows overlap by half or more. Each residue is taken from the window in whose middle it stands
        most nearly.
        """
        kept = num_residues if self.truncate is None else min(num_residues, self.truncate)
        if self.window is None or kept <= self.window:
            return [Segment(record, 0, kept, 0, kept)]
        count = int(self._num_windows(np.int64(kept)))
        starts = [number * (kept - self.window) // (count - 1) for number in range(count)]
        # The middle of each overlap, which parts two windows.
        bounds = [0, *((before + after + self.window) // 2 for before, after in itertools.pairwise(starts)), kept]
        return [
            Segment(record, start, start + self.window, bounds[number], bounds[number + 1])
            for number, start in enumerate(starts)
        ]

    def sizes(self, num_residues: np.ndarray) -> np.ndarray:
        """Returns the residues of everything that is computed of some proteins, int64; the order is none of theirs."""
        kept = self.kept(num_residues)
        if self.window is None:
            return kept
        is_long = kept > self.window
        num_windows = int(self._num_windows(kept[is_long]).sum())
        return np.concatenate([kept[~is_long], np.full(num_windows, self.window, dtype=np.int64)])

    def _num_windows(self, num_residues: Any) -> Any:
        """Returns the windows of proteins longer than one."""
        assert self.window is not None
        stride = max(1, self.window // 2)
        return -(-(num_residues - self.window) // stride) + 1
