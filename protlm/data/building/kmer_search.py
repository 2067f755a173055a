"""The search for sequences that are part of longer ones: hides how it avoids comparing all pairs.

It uses k-mers of a few residues, read as one number. Wherever an inner sequence occurs in the outer tokens, one of its
first `stride` k-mers begins at a multiple of `stride`. So the first `stride` k-mers of each inner sequence are indexed,
one k-mer in `stride` of the outer tokens is looked up, and candidates are compared letter by letter.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash

from protlm.data.building.kmers import HASH_BITS, WORD, KmerSet, Level, first_kmers, mixed, words_at
from protlm.data.storage.shards import ShardReader
from protlm.data.strings import bounds_of
from protlm.runtime.workers import check_wanted

MIN_LENGTH = 12
"""Shorter sequences are not searched for: so few residues occur in unrelated proteins too."""
BLOCK_RESIDUES = 1 << 26
"""Residues of the sequences that are searched for at once, and of shards whose k-mers are kept at once."""

Shards = Sequence[ShardReader]

_BATCH = 1 << 20
# A key is a hash with a tail in its low bits: the rank of a length and the place of a k-mer.
_TAIL_BITS = np.uint64(64 - HASH_BITS)
_TAIL_MASK = np.uint64((1 << 64 - HASH_BITS) - 1)

# Fewer k-mers of the larger side are read: of a large outer side one in 32 residues, of a large inner side a few for
# each sequence.
LARGE_OUTER = (Level(8, 32, 39), Level(5, 8, MIN_LENGTH, 38))
LARGE_INNER = Level(8, 4, MIN_LENGTH)


def num_residues(shards: Shards) -> int:
    """Returns the number of residues in shards."""
    return sum(shard.num_residues for shard in shards)


def distinct(numbers: np.ndarray) -> np.ndarray:
    """Returns the distinct numbers, ascending; many times faster than np.unique, which uses a hash table."""
    numbers = np.sort(numbers)
    kept: np.ndarray = numbers[
        np.concatenate([np.ones(min(len(numbers), 1), dtype=np.bool_), numbers[1:] != numbers[:-1]])
    ]
    return kept


def kmers_of(shards: Shards, level: Level) -> KmerSet:
    """Returns the k-mers of shards."""
    kmers = KmerSet(16 * num_residues(shards) // level.stride, level)
    for shard in shards:
        kmers.add_all(shard.tokens)
    return kmers


@dataclass(frozen=True, slots=True)
class _Needles:
    """Inner sequences that are searched for at once.

    Attributes:
        tokens: Their tokens back to back.
        bounds: The bounds between them.
        numbers: Their running numbers among all records of the inner shards.
    """

    tokens: np.ndarray
    bounds: np.ndarray
    numbers: np.ndarray

    @classmethod
    def of(cls, shard: ShardReader, records: np.ndarray, numbers: np.ndarray) -> "_Needles":
        """Returns the given records of a shard."""
        starts, ends = shard.offsets[records], shard.offsets[records + 1]
        sequences = [shard.tokens[start:end] for start, end in zip(starts.tolist(), ends.tolist(), strict=True)]
        return cls(np.concatenate([np.zeros(0, dtype=np.uint8), *sequences]), bounds_of(ends - starts), numbers)

    @classmethod
    def joined(cls, several: Sequence["_Needles"]) -> "_Needles":
        """Returns the sequences of several objects as one."""
        lengths = np.concatenate([np.diff(needles.bounds) for needles in several])
        return cls(
            np.concatenate([needles.tokens for needles in several]),
            bounds_of(lengths),
            np.concatenate([needles.numbers for needles in several]),
        )

    def sequence(self, place: int) -> np.ndarray:
        """Returns the tokens of one sequence."""
        return self.tokens[self.bounds[place] : self.bounds[place + 1]]

    def chosen(self, kept: np.ndarray) -> "_Needles":
        """Returns the sequences for which `kept` is true."""
        lengths = np.diff(self.bounds)
        return _Needles(self.tokens[np.repeat(kept, lengths)], bounds_of(lengths[kept]), self.numbers[kept])


def needles_of(inner: Iterable[tuple[Path, int]], kmers: KmerSet | None, level: Level) -> Iterator[_Needles]:
    """Yields the inner sequences of a level in blocks.

    If the k-mers of an outer side are given, sequences are left out that have a stretch without any of them.
    """
    waiting: list[_Needles] = []
    for path, num_before in inner:
        check_wanted()
        shard = ShardReader(path)
        starts, ends = shard.offsets[:-1], shard.offsets[1:]
        wanted = np.flatnonzero((ends - starts >= level.shortest) & (ends - starts <= level.longest))
        if kmers is not None:
            wanted = wanted[kmers.are_known(shard.tokens, starts[wanted], (ends - starts)[wanted])]
        blocks = np.cumsum((ends - starts)[wanted]) // BLOCK_RESIDUES
        for block in np.split(wanted, np.flatnonzero(np.diff(blocks)) + 1):
            waiting.append(_Needles.of(shard, block, block + num_before))
            if sum(len(needles.tokens) for needles in waiting) >= BLOCK_RESIDUES:
                yield _Needles.joined(waiting)
                waiting = []
    if any(len(needles.numbers) for needles in waiting):
        yield _Needles.joined(waiting)


class _Index:
    """An index of inner sequences: by a k-mer near their start, then by their end and length, then by all residues.

    A key is a candidate for a k-mer of the outer tokens: the hash of an inner k-mer, with the rank of the length of its
    sequence and the place of the k-mer in it. Sequences that differ only elsewhere share a key.
    """

    def __init__(self, needles: _Needles, level: Level) -> None:
        starts, lengths = needles.bounds[:-1], np.diff(needles.bounds)
        self._needles, self._level = needles, level
        self._lengths, ranks = np.unique(lengths, return_inverse=True)
        hashes = first_kmers(needles.tokens, starts, level)
        self._kmers = KmerSet(64 * hashes.size, level)
        self._kmers.add(hashes.ravel())
        tails = (ranks[:, None] * level.stride + np.arange(level.stride)).astype(np.uint64)
        self._keys = distinct(((hashes << _TAIL_BITS) | tails).ravel())
        self._ends = distinct(_end_marks(needles.tokens, starts, lengths))
        digests = _digests(needles.tokens, starts, lengths)
        self._order = np.argsort(digests, kind="stable")
        self._digests = digests[self._order]

    def hits(self, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns the places and hashes of the k-mers of outer tokens that may be in the index."""
        return self._kmers.find(tokens)

    def batches(self, hashes: np.ndarray) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """Yields the keys of k-mers in batches of about `_BATCH`.

        Yields:
            The number of k-mers finished with this batch; then pairs of a k-mer, by its index in `hashes`, and a key.
        """
        lows = np.searchsorted(self._keys, hashes << _TAIL_BITS)
        known = np.flatnonzero(self._keys[np.minimum(lows, len(self._keys) - 1)] >> _TAIL_BITS == hashes)
        lows = lows[known]
        counts = np.searchsorted(self._keys, (hashes[known] << _TAIL_BITS) | _TAIL_MASK, side="right") - lows
        # The number of keys of the k-mers before each one.
        before = bounds_of(counts)
        batches = before[:-1] // _BATCH
        for chosen in np.split(np.arange(len(known)), np.flatnonzero(np.diff(batches)) + 1):
            if len(chosen):
                pairs = np.repeat(chosen, counts[chosen])
                within = np.arange(before[chosen[0]], before[chosen[-1] + 1]) - before[pairs]
                yield int(known[chosen[-1]]) + 1, known[pairs], self._keys[lows[pairs] + within]

    def matches(self, shard: ShardReader, places: np.ndarray, keys: np.ndarray) -> list[int]:
        """Returns the inner sequences that occur, letter by letter, at these candidates: places of k-mers and keys."""
        tails = (keys & _TAIL_MASK).astype(np.int64)
        starts, lengths = places - tails % self._level.stride, self._lengths[tails // self._level.stride]
        records = np.searchsorted(shard.offsets, places, side="right") - 1
        firsts, ends = shard.offsets[records], shard.offsets[records + 1]
        fits = (starts >= firsts) & (starts + lengths <= ends) & (lengths < ends - firsts)
        starts, lengths = starts[fits], lengths[fits]
        marks = _end_marks(shard.tokens, starts, lengths)
        fits = self._ends[np.minimum(np.searchsorted(self._ends, marks), len(self._ends) - 1)] == marks
        return self._equal(shard.tokens, starts[fits], lengths[fits])

    def _equal(self, tokens: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> list[int]:
        digests = _digests(tokens, starts, lengths)
        lows = np.searchsorted(self._digests, digests)
        highs = np.searchsorted(self._digests, digests, side="right")
        matches: list[int] = []
        # By digest, the sequences without a match so far.
        missing: dict[int, list[int]] = {}
        for place in np.flatnonzero(highs > lows).tolist():
            low, start = int(lows[place]), int(starts[place])
            if low not in missing:
                missing[low] = self._order[low : highs[place]].tolist()
            if missing[low]:
                sequence = tokens[start : start + int(lengths[place])]
                equal = {number for number in missing[low] if np.array_equal(self._needles.sequence(number), sequence)}
                missing[low] = [number for number in missing[low] if number not in equal]
                matches += equal
        return matches


def _end_marks(tokens: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Returns a hash of the length and the last residues of each sequence."""
    return mixed(words_at(tokens, starts + lengths - WORD) ^ (lengths.astype(np.uint64) << _TAIL_BITS))


def _digests(tokens: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    bounds = zip(starts.tolist(), (starts + lengths).tolist(), strict=True)
    content = np.ascontiguousarray(tokens).data
    digests = (xxhash.xxh3_64_intdigest(content[start:end]) for start, end in bounds)
    return np.fromiter(digests, dtype=np.uint64, count=len(starts))


def search(needles: _Needles, outer: Shards, level: Level) -> np.ndarray:
    """Returns the numbers of the inner sequences that are part of a longer record of the outer side."""
    contained = [np.zeros(0, dtype=np.int64)]
    index, missing = _Index(needles, level), np.ones(len(needles.numbers), dtype=np.bool_)
    for shard in outer:
        check_wanted()
        places, hashes = index.hits(shard.tokens)
        while len(places):
            for num_done, kmers, keys in index.batches(hashes):
                missing[index.matches(shard, places[kmers], keys)] = False
                # A sequence is searched for until its first match. Each new index has at most half of the one before.
                if 2 * int(missing.sum()) <= len(missing):
                    places, hashes = places[num_done:], hashes[num_done:]
                    break
            else:
                break
            contained.append(needles.numbers[~missing])
            needles = needles.chosen(missing)
            if not len(needles.numbers):
                return np.concatenate(contained)
            index, missing = _Index(needles, level), np.ones(len(needles.numbers), dtype=np.bool_)
    return np.concatenate([*contained, needles.numbers[~missing]])
