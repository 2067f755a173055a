"""Equality of sequences and of ids: two with the same xxh3-128 are one, and the first of them is kept."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import xxhash

DIGEST_BYTES = 16


def sequence_digest(residues: bytes) -> bytes:
    """Returns the xxh3-128 of a cleaned sequence, 16 bytes."""
    return xxhash.xxh3_128_digest(residues)


def digests_of(texts: Iterable[bytes]) -> np.ndarray:
    """Returns the xxh3-128 of each text, uint64 (texts, 2), high half first."""
    joined = b"".join(map(xxhash.xxh3_128_digest, texts))
    return np.frombuffer(joined, dtype=">u8").astype(np.uint64).reshape(-1, 2)


@dataclass(frozen=True, slots=True)
class Digests:
    """Digests of many records, to be compared with each other.

    Attributes:
        high: High halves, uint64.
        low: Low halves, uint64.
        index: Number of the record that each digest belongs to, in the whole input, int64.
    """

    high: np.ndarray
    low: np.ndarray
    index: np.ndarray


def duplicates(digests: Digests, splits: np.ndarray, *, dedupe: bool) -> tuple[np.ndarray, np.ndarray]:
    """Returns the numbers of the records to leave out because another one has the same digest.

    The earliest split that has a sequence keeps it, and within that split the first record.

    Args:
        digests: The digests to compare.
        splits: Rank of each record's split in the order in which splits claim sequences, uint8.
        dedupe: Leave out repeats within a split too; repeats across splits are always left out.

    Returns:
        Repeats within a split, and records whose sequence an earlier split has.
    """
    places, rank, first = _groups(digests, splits)
    is_elsewhere = splits[places] != splits[first]
    is_repeat = (rank > 0) & ~is_elsewhere if dedupe else np.zeros(len(places), dtype=bool)
    return digests.index[places[is_repeat]], digests.index[places[is_elsewhere]]


def repeats(digests: Digests) -> tuple[np.ndarray, np.ndarray]:
    """Returns the records that are not the first with their digest.

    Returns:
        Their numbers, and how many records up to each have its digest, from 2; both int64.
    """
    places, rank, _ = _groups(digests, np.zeros(len(digests.index), dtype=np.uint8))
    return digests.index[places[rank > 0]], rank[rank > 0] + 1


def firsts(digests: Digests) -> tuple[np.ndarray, np.ndarray]:
    """Returns the records that are not the first with their digest, each with the first one.

    Returns:
        Their numbers, and the numbers of the first ones; both int64.
    """
    places, rank, first = _groups(digests, np.zeros(len(digests.index), dtype=np.uint8))
    return digests.index[places[rank > 0]], digests.index[first[rank > 0]]


def _groups(digests: Digests, splits: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the indices of repeated digests, their ranks among equal ones, and the indices of the first of each."""
    order = np.argsort(digests.high)
    high = digests.high[order]
    has_equal = np.zeros(len(order), dtype=bool)
    is_equal = high[1:] == high[:-1]
    has_equal[1:] |= is_equal
    has_equal[:-1] |= is_equal
    places = order[has_equal]
    places = places[np.lexsort((digests.index[places], splits[places], digests.low[places], digests.high[places]))]
    high, low = digests.high[places], digests.low[places]
    starts = np.arange(len(places))
    # A group of equal high halves may consist of several groups by their low halves.
    starts[1:][(high[1:] == high[:-1]) & (low[1:] == low[:-1])] = 0
    starts = np.maximum.accumulate(starts) if len(starts) else starts
    return places, np.arange(len(places)) - starts, places[starts]
