"""What one split tells of another: sequences that are part of longer ones, and labels that occur on both sides.

Sequences are found by windows of a few residues, read as one number. Where a sequence stands in the outer tokens, one of
its first `stride` windows stands at a multiple of `stride`; so that many windows of each inner sequence are indexed, one
window in `stride` of the outer tokens is looked up, and what fits is compared letter by letter.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, combinations, pairwise, permutations
from typing import Literal

import numpy as np
import xxhash

from protlm.data.dataset import Contained, Leakage, Shared
from protlm.data.shards import ShardReader
from protlm.data.splits import SPLIT_NAMES, SplitName
from protlm.data.table import bounds_of

MIN_LENGTH = 12
"""Shorter sequences are not looked for: so few residues occur in unrelated proteins too."""

LabelColumn = Literal["cluster_id", "family"]
Shards = Sequence[ShardReader]

_WORD = 8
_BLOCK_RESIDUES = 1 << 26
_CHUNK_WORDS = 1 << 16
_BATCH = 1 << 20
_FACTOR = np.uint64(0x9E3779B97F4A7C15)
_HASH_BITS = 40
_MAX_SLOT_BITS = 29
_PROBES = 8
# A form is a hash with a place and the rank of a length below it.
_FORM_BITS = np.uint64(64 - _HASH_BITS)
_FORM_MASK = np.uint64((1 << 64 - _HASH_BITS) - 1)


@dataclass(frozen=True, slots=True)
class _Level:
    """How inner sequences of `shortest` to `longest` residues are found: all have `span` residues."""

    width: int
    stride: int
    shortest: int
    longest: int = 1 << 62

    @property
    def span(self) -> int:
        """Any stretch of so many residues holds a whole window at a multiple of the stride."""
        return self.width + self.stride - 1


# Fewer windows of the larger side are read: of a large outer side one in 32 residues, of a large inner side a few for
# each sequence.
_LARGE_OUTER = (_Level(8, 32, 39), _Level(5, 8, MIN_LENGTH, 38))
_LARGE_INNER = _Level(8, 4, MIN_LENGTH)


def look_for_leaks(splits: Mapping[SplitName, Shards], exact_duplicates_removed: int, *, substrings: bool) -> Leakage:
    """Compares all pairs of splits that have records.

    Args:
        splits: The shards of each split.
        exact_duplicates_removed: Records left out because an earlier split has their sequence.
        substrings: Look for sequences that are part of longer ones, too; this reads all tokens.
    """
    filled = {name: splits[name] for name in SPLIT_NAMES if any(shard.num_records for shard in splits.get(name, ()))}
    shared: dict[LabelColumn, tuple[Shared, ...] | None] = {"cluster_id": None, "family": None}
    for column in shared:
        if any(getattr(shard, column) is not None for shard in chain.from_iterable(filled.values())):
            labels = {name: _label_digests(shards, column) for name, shards in filled.items()}
            shared[column] = tuple(
                Shared(first=first, second=second, num_labels=_num_common(labels[first], labels[second]))
                for first, second in combinations(filled, 2)
            )
    return Leakage(
        exact_duplicates_removed=exact_duplicates_removed,
        substrings=_contained_pairs(filled) if substrings else None,
        clusters=shared["cluster_id"],
        families=shared["family"],
    )


def _contained_pairs(splits: Mapping[SplitName, Shards]) -> tuple[Contained, ...]:
    """Compares each split with all smaller ones at once, both ways."""
    counts: dict[tuple[SplitName, SplitName], int] = {}
    waiting = sorted(splits, key=lambda name: _num_residues(splits[name]))
    while len(waiting) > 1:
        large = waiting.pop()
        smaller = [splits[name] for name in waiting]
        for name, count in zip(waiting, _small_in_large(smaller, splits[large]), strict=True):
            counts[name, large] = count
        for name, count in zip(waiting, _large_in_small(splits[large], smaller), strict=True):
            counts[large, name] = count
    return tuple(
        Contained(inner=inner, outer=outer, num_records=counts[inner, outer])
        for inner, outer in permutations(splits, 2)
    )


def shared_labels(first: Shards, second: Shards, column: LabelColumn) -> int:
    """Returns how many distinct labels occur on both sides; 8 bytes of memory each, told apart by xxh3-64."""
    return _num_common(_label_digests(first, column), _label_digests(second, column))


def _num_common(first: np.ndarray, second: np.ndarray) -> int:
    return len(np.intersect1d(first, second, assume_unique=True))


def _label_digests(shards: Shards, column: LabelColumn) -> np.ndarray:
    """Returns the xxh3-64 of each distinct label, rising."""
    found = np.zeros(0, dtype=np.uint64)
    for shard in shards:
        strings = getattr(shard, column)
        if strings is None:
            continue
        text, bounds = strings.text.tobytes(), strings.offsets.tolist()
        labels = {text[start:end] for start, end in pairwise(bounds)}
        if column == "family":
            labels = {label for joined in labels for label in joined.split(b";")}
        labels.discard(b"")
        digests = np.fromiter(map(xxhash.xxh3_64_intdigest, labels), dtype=np.uint64, count=len(labels))
        found = _distinct(np.concatenate([found, digests]))
    return found


def contained(inner: Shards, outer: Shards) -> int:
    """Returns how many records of `inner` are part of a longer record of `outer`: all residues stand there in a row.

    Records of fewer than `MIN_LENGTH` residues are not looked for. What is found is exact.

    Both sides are read shard by shard, and the inner sequences that are looked for at once are bounded, as is what is
    noted of the outer ones. Time is linear in the residues for proteins. Repeats, whose windows fit in many places, cost
    at most a comparison for each outer residue and each length that occurs among the inner records, not for each pair
    of records; and what was found once is not looked for again.
    """
    if _num_residues(inner) > _num_residues(outer):
        return _large_in_small(inner, [outer])[0]
    return _small_in_large([inner], outer)[0]


def _small_in_large(inners: Sequence[Shards], outer: Shards) -> list[int]:
    """Returns for each inner side how many of its records are part of a longer outer one, which is read once."""
    counts = np.zeros(len(inners), dtype=np.int64)
    together = [shard for inner in inners for shard in inner]
    bounds = bounds_of([sum(shard.num_records for shard in inner) for inner in inners])
    for level in _LARGE_OUTER:
        for needles in _needles(together, None, level):
            found = _search(needles, outer, level)
            counts += np.bincount(np.searchsorted(bounds, found, side="right") - 1, minlength=len(inners))
    return counts.tolist()


def _large_in_small(inner: Shards, outers: Sequence[Shards]) -> list[int]:
    """Returns for each outer side how many of the inner records are part of a longer one of it.

    Only inner records that share windows with an outer side are looked at more closely.
    """
    found: list[list[np.ndarray]] = [[np.zeros(0, dtype=np.int64)] for _ in outers]
    for block in _blocks([(number, shard) for number, outer in enumerate(outers) for shard in outer]):
        windows = _windows_of([shard for _, shard in block], _LARGE_INNER)
        for needles in _needles(inner, windows, _LARGE_INNER):
            for number, shard in block:
                found[number].append(_search(needles, [shard], _LARGE_INNER))
    # A record may have been found in several shards.
    return [len(_distinct(np.concatenate(numbers))) for numbers in found]


def _blocks(shards: Sequence[tuple[int, ShardReader]]) -> list[list[tuple[int, ShardReader]]]:
    """Returns the shards in groups of about `_BLOCK_RESIDUES`."""
    blocks: list[list[tuple[int, ShardReader]]] = []
    size = _BLOCK_RESIDUES
    for number, shard in shards:
        if size >= _BLOCK_RESIDUES:
            blocks.append([])
            size = 0
        blocks[-1].append((number, shard))
        size += shard.num_residues
    return blocks


def _num_residues(shards: Shards) -> int:
    return sum(shard.num_residues for shard in shards)


def _distinct(numbers: np.ndarray) -> np.ndarray:
    """Returns the distinct numbers, rising; many times faster than np.unique, which goes through a hash table."""
    numbers = np.sort(numbers)
    return numbers[np.concatenate([np.ones(min(len(numbers), 1), dtype=np.bool_), numbers[1:] != numbers[:-1]])]


class _HashSet:
    """Hashes, by a part of their bits: has all that were put in, and few others."""

    def __init__(self, num_slots: int) -> None:
        bits = min(max(20, num_slots.bit_length()), _MAX_SLOT_BITS)
        self._shift = np.uint64(_HASH_BITS - bits)
        self._bytes = np.zeros(1 << bits - 3, dtype=np.uint8)

    def add(self, hashes: np.ndarray) -> None:
        slots = hashes >> self._shift
        bits = slots.astype(np.uint8) & np.uint8(7)
        # One bit after the other: within each, several hashes of a byte write the same.
        for bit in range(8):
            self._bytes[(slots[bits == bit] >> np.uint64(3)).view(np.int64)] |= np.uint8(1 << bit)

    def has(self, hashes: np.ndarray) -> np.ndarray:
        slots = hashes >> self._shift
        held: np.ndarray = self._bytes.take((slots >> np.uint64(3)).view(np.int64))
        held >>= slots.astype(np.uint8) & np.uint8(7)
        held &= np.uint8(1)
        return held.view(np.bool_)


def _hashed(words: np.ndarray, width: int) -> np.ndarray:
    """Returns a hash of `_HASH_BITS` bits of the first `width` residues of each word."""
    # The shifted factor moves the others out at the top.
    return (words * (_FACTOR << np.uint64(8 * (_WORD - width)))) >> _FORM_BITS


def _window_chunks(tokens: np.ndarray, level: _Level) -> Iterator[tuple[int, np.ndarray]]:
    """Yields the hashes of the windows at multiples of the stride; each chunk with the place of its first window.

    Within a chunk the windows stand `max(_WORD, level.stride)` residues apart.
    """
    for shift in range(0, _WORD, level.stride):
        for start in range(shift, len(tokens), _WORD * _CHUNK_WORDS):
            chunk = tokens[start : start + _WORD * _CHUNK_WORDS]
            if len(chunk) % _WORD:
                chunk = np.concatenate([chunk, np.zeros(-len(chunk) % _WORD, dtype=np.uint8)])
            words = chunk.view("<u8")[:: max(1, level.stride // _WORD)]
            yield start, _hashed(words, level.width)


def _windows_of(shards: Shards, level: _Level) -> _HashSet:
    found = _HashSet(16 * _num_residues(shards) // level.stride)
    for shard in shards:
        for _, hashes in _window_chunks(shard.tokens, level):
            found.add(hashes)
    return found


def _words_at(tokens: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Returns the 8 residues from each place on as one number, zeros after the end of the tokens."""
    tokens = np.ascontiguousarray(tokens)
    words = np.ndarray(max(0, len(tokens) - _WORD + 1), dtype="<u8", buffer=tokens.data, strides=(1,))
    whole = np.minimum(places, len(words) - 1)
    return words[whole] >> ((places - whole) << 3).astype(np.uint64)


def _first_windows(tokens: np.ndarray, starts: np.ndarray, level: _Level) -> np.ndarray:
    """Returns the hashes of the windows at each start and the next ones, (starts, stride)."""
    places = starts[:, None] + np.arange(level.stride)
    return _hashed(_words_at(tokens, places), level.width)


@dataclass(frozen=True, slots=True)
class _Needles:
    """Inner sequences that are looked for at once.

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
        """Returns some records of a shard."""
        starts, ends = shard.offsets[records], shard.offsets[records + 1]
        parts = [shard.tokens[start:end] for start, end in zip(starts.tolist(), ends.tolist(), strict=True)]
        return cls(np.concatenate([np.zeros(0, dtype=np.uint8), *parts]), bounds_of(ends - starts), numbers)

    @classmethod
    def joined(cls, parts: Sequence["_Needles"]) -> "_Needles":
        """Returns several as one."""
        lengths = np.concatenate([np.diff(part.bounds) for part in parts])
        return cls(
            np.concatenate([part.tokens for part in parts]),
            bounds_of(lengths),
            np.concatenate([part.numbers for part in parts]),
        )

    def chosen(self, kept: np.ndarray) -> "_Needles":
        """Returns some of them."""
        lengths = np.diff(self.bounds)
        return _Needles(self.tokens[np.repeat(kept, lengths)], bounds_of(lengths[kept]), self.numbers[kept])


def _needles(inner: Shards, windows: _HashSet | None, level: _Level) -> Iterator[_Needles]:
    """Yields the inner sequences of a level in blocks.

    Where the windows of an outer side are given, those are left out that have a stretch with none of them.
    """
    num_before = 0
    waiting: list[_Needles] = []
    for shard in inner:
        starts, ends = shard.offsets[:-1], shard.offsets[1:]
        wanted = np.flatnonzero((ends - starts >= level.shortest) & (ends - starts <= level.longest))
        if windows is not None:
            for probe in range(_PROBES):
                firsts = starts[wanted] + (ends - starts - level.span)[wanted] * probe // (_PROBES - 1)
                wanted = wanted[windows.has(_first_windows(shard.tokens, firsts, level)).any(axis=1)]
        blocks = np.cumsum((ends - starts)[wanted]) // _BLOCK_RESIDUES
        for block in np.split(wanted, np.flatnonzero(np.diff(blocks)) + 1):
            waiting.append(_Needles.of(shard, block, block + num_before))
            if sum(len(needles.tokens) for needles in waiting) >= _BLOCK_RESIDUES:
                yield _Needles.joined(waiting)
                waiting = []
        num_before += shard.num_records
    if any(len(needles.numbers) for needles in waiting):
        yield _Needles.joined(waiting)


class _Index:
    """Finds where inner sequences may stand: by a window near their start, then by their end and length.

    Its forms are what is worth trying where a window fits: distinct hashes of a window, with the rank of the length of
    its sequence and the place of the window in it. Sequences that differ elsewhere only share a form.
    """

    def __init__(self, needles: _Needles, level: _Level) -> None:
        starts, lengths = needles.bounds[:-1], np.diff(needles.bounds)
        self._needles, self._level = needles, level
        self._lengths, ranks = np.unique(lengths, return_inverse=True)
        within = np.arange(level.stride)
        places = (starts[:, None] + within).ravel()
        hashes = _hashed(_words_at(needles.tokens, places), level.width)
        self._windows = _HashSet(64 * len(hashes))
        self._windows.add(hashes)
        tails = (ranks[:, None] * level.stride + within).ravel().astype(np.uint64)
        self._forms = _distinct((hashes << _FORM_BITS) | tails)
        self._ends = _distinct(_end_marks(needles.tokens, starts, lengths))
        digests = _digests(needles.tokens, starts, lengths)
        self._order = np.argsort(digests, kind="stable")
        self._digests = digests[self._order]

    def hits(self, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns the windows of outer tokens that are in the index: their places and hashes."""
        places, kept = [np.zeros(0, dtype=np.int64)], [np.zeros(0, dtype=np.uint64)]
        for first, hashes in _window_chunks(tokens, self._level):
            hits = np.flatnonzero(self._windows.has(hashes))
            places.append(hits * max(_WORD, self._level.stride) + first)
            kept.append(hashes[hits])
        return self._known(np.concatenate(places), np.concatenate(kept))

    def _known(self, places: np.ndarray, hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns those windows whose hashes are in the index."""
        firsts = np.minimum(np.searchsorted(self._forms, hashes << _FORM_BITS), len(self._forms) - 1)
        known = self._forms[firsts] >> _FORM_BITS == hashes
        return places[known], hashes[known]

    def next_batch(self, hashes: np.ndarray, start: int) -> tuple[int, np.ndarray, np.ndarray]:
        """Returns the forms of windows from `start` on, of as many windows as give about `_BATCH` of them.

        Returns:
            Where the next batch starts; and in pairs the windows, by place in `hashes`, and the forms.
        """
        wanted = hashes[start : start + _BATCH] << _FORM_BITS
        lows = np.searchsorted(self._forms, wanted)
        counts = np.searchsorted(self._forms, wanted | _FORM_MASK, side="right") - lows
        size = max(1, int(np.searchsorted(np.cumsum(counts), _BATCH, side="right")))
        lows, counts = lows[:size], counts[:size]
        windows = np.repeat(np.arange(size), counts)
        within = np.arange(len(windows)) - np.repeat(np.cumsum(counts) - counts, counts)
        return start + size, windows + start, self._forms[lows[windows] + within]

    def found_at(self, shard: ShardReader, places: np.ndarray, forms: np.ndarray) -> list[int]:
        """Returns the inner sequences that stand, letter by letter, where these windows and forms say."""
        tails = (forms & _FORM_MASK).astype(np.int64)
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
        found: set[int] = set()
        for place in np.flatnonzero(highs > lows).tolist():
            sequence = tokens[starts[place] : starts[place] + lengths[place]]
            for number in self._order[lows[place] : highs[place]].tolist():
                own = self._needles.tokens[self._needles.bounds[number] : self._needles.bounds[number + 1]]
                if number not in found and np.array_equal(own, sequence):
                    found.add(number)
        return list(found)


def _end_marks(tokens: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Returns a hash of the length and the last residues of each sequence."""
    last = _words_at(tokens, starts + lengths - _WORD)
    return (last ^ (lengths.astype(np.uint64) << _FORM_BITS)) * _FACTOR


def _digests(tokens: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    bounds = zip(starts.tolist(), (starts + lengths).tolist(), strict=True)
    found = (xxhash.xxh3_64_intdigest(tokens[start:end]) for start, end in bounds)
    return np.fromiter(found, dtype=np.uint64, count=len(starts))


def _search(needles: _Needles, outer: Shards, level: _Level) -> np.ndarray:
    """Returns the numbers of the inner sequences that stand in a longer record of the outer side."""
    found = [np.zeros(0, dtype=np.int64)]
    index, missing = _Index(needles, level), np.ones(len(needles.numbers), dtype=np.bool_)
    for shard in outer:
        places, hashes = index.hits(shard.tokens)
        start = 0
        while start < len(places):
            start, windows, forms = index.next_batch(hashes, start)
            missing[index.found_at(shard, places[windows], forms)] = False
            # Each new index has at most half of the sequences of the one before.
            if 2 * int(missing.sum()) <= len(missing):
                found.append(needles.numbers[~missing])
                needles = needles.chosen(missing)
                if not len(needles.numbers):
                    return np.concatenate(found)
                index, missing = _Index(needles, level), np.ones(len(needles.numbers), dtype=np.bool_)
    return np.concatenate([*found, needles.numbers[~missing]])
