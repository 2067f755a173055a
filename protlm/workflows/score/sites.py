"""The sites of a run, positions whose probabilities are computed: hides whether each is listed or all are meant."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

BOUNDS_NAME, POSITIONS_NAME = "site_bounds.npy", "sites.npy"


@dataclass(frozen=True)
class Sites:
    """The positions whose probabilities are computed, protein after protein.

    Attributes:
        bounds: The first site of each protein of the store, then the number of sites, int64.
        listed: The position of each site in its protein, from 0, int64. None: a protein has either no site or one at
            every position, so that sequences to be computed whole cost no memory for each residue.
    """

    bounds: np.ndarray
    listed: np.ndarray | None = None

    def __len__(self) -> int:
        return int(self.bounds[-1])

    def positions(self, record: int, start: int, stop: int) -> np.ndarray:
        """Returns the positions of the sites from `start` to `stop`, which are those of one protein, int64."""
        if self.listed is None:
            first = int(self.bounds[record])
            return np.arange(start - first, stop - first)
        return np.asarray(self.listed[start:stop])

    def write(self, folder: Path) -> None:
        """Writes them into a folder; see `read_sites`."""
        np.save(folder / BOUNDS_NAME, self.bounds)
        if self.listed is not None:
            np.save(folder / POSITIONS_NAME, self.listed)


def read_sites(folder: Path) -> Sites:
    """Returns the sites that were written into a folder; their positions are mapped."""
    path = folder / POSITIONS_NAME
    return Sites(
        np.load(folder / BOUNDS_NAME, allow_pickle=False),
        np.load(path, mmap_mode="r", allow_pickle=False) if path.exists() else None,
    )
