"""Numbers by digest: how millions of ids or sequences are kept and found in sorted NumPy columns."""

import numpy as np

UNLABELLED = -1
"""The number of what is not in an index."""


class Index:
    """Numbers by digest, in columns sorted by digest, each digest once."""

    def __init__(self, high: np.ndarray, low: np.ndarray, numbers: np.ndarray) -> None:
        self.high, self.low, self.numbers = high, low, numbers

    def __len__(self) -> int:
        return len(self.high)

    def find(self, high: np.ndarray, low: np.ndarray) -> np.ndarray:
        """Returns the number of each digest, int64, `UNLABELLED` for a digest that is not in the index."""
        numbers = np.full(len(high), UNLABELLED, dtype=np.int64)
        waiting, places = np.arange(len(high)), np.searchsorted(self.high, high)
        while True:
            # Different digests with the same high half are neighbours.
            is_near = places < len(self)
            is_near[is_near] = self.high[places[is_near]] == high[waiting[is_near]]
            waiting, places = waiting[is_near], places[is_near]
            if not len(waiting):
                return numbers
            is_equal = self.low[places] == low[waiting]
            numbers[waiting[is_equal]] = self.numbers[places[is_equal]]
            waiting, places = waiting[~is_equal], places[~is_equal] + 1

    def extended(self, high: np.ndarray, low: np.ndarray, numbers: np.ndarray) -> "Index":
        """Returns an index with further digests, none of which it has yet."""
        pairs = ((self.high, high), (self.low, low), (self.numbers, numbers))
        return Index(*sorted_columns([np.concatenate(pair) for pair in pairs]))


def sorted_columns(columns: list[np.ndarray]) -> list[np.ndarray]:
    """Returns the same list with rows sorted by the first two columns, and equal ones by their old order."""
    order = np.argsort(columns[0])
    for place in range(len(columns)):
        # One after the other, so that only one column is in memory twice.
        columns[place] = columns[place][order]
    high, low = columns[:2]
    is_tied = np.zeros(len(order), dtype=bool)
    is_tied[1:] = high[1:] == high[:-1]
    is_tied[:-1] |= is_tied[1:]
    if is_tied.any():
        tied = np.flatnonzero(is_tied)
        sources = tied[np.lexsort((order[tied], low[tied], high[tied]))]
        for column in columns:
            column[tied] = column[sources]
    return columns
