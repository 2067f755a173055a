"""Which records are part of longer ones, found without comparing all pairs.

Sequences are found by windows of a few residues, read as one number. Where a sequence stands in the outer tokens, one
of its first `stride` windows stands at a multiple of `stride`. So that many windows of each inner sequence are indexed,
one window in `stride` of the outer tokens is looked up, and what fits is compared letter by letter.
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import xxhash

from protlm.data.storage.shards import ShardReader
from protlm.data.strings import bounds_of

MIN_LENGTH = 12
"""Shorter sequences are not looked for: so few residues occur in unrelated proteins too."""

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


def small_in_large(inners: Sequence[Shards], outer: Shards) -> list[int]:
    """Returns for each inner side how many of its records are part of a longer outer one, which is read once."""
    counts = np.zeros(len(inners), dtype=np.int64)
    bounds = bounds_of([sum(shard.num_records for shard in inner) for inner in inners])
    for level in _LARGE_OUTER:
        for needles in _needles(itertools.chain.from_iterable(inners), None, level):
            found = _search(needles, outer, level)
            counts += np.bincount(np.searchsorted(bounds, found, side="right") - 1, minlength=len(inners))
    return counts.tolist()


def large_in_small(inner: Shards, outers: Sequence[Shards]) -> list[int]:
    """Returns for each outer side how many of the inner records are part of a longer one of it.

    Only inner records that share windows with an outer side are looked at more closely.
    """
    found: list[list[np.ndarray]] = [[np.zeros(0, dtype=np.int64)] for _ in outers]
    for block in _blocks(outers):
        size = sum(outers[number][place].num_residues for number, place in block)
        windows = _windows_of((outers[number][place] for number, place in block), size, _LARGE_INNER)
        for needles in _needles(inner, windows, _LARGE_INNER):
            for number, place in block:
                found[number].append(_search(needles, [outers[number][place]], _LARGE_INNER))
    # A record may have been found in several shards.
    return [len(distinct(np.concatenate(numbers))) for numbers in found]


def _blocks(sides: Sequence[Shards]) -> list[list[tuple[int, int]]]:
    """Returns the shards of some sides, by side and place, in groups of about `_BLOCK_RESIDUES`; none is kept open."""
    blocks: list[list[tuple[int, int]]] = []
    size = _BLOCK_RESIDUES
    for number, shards in enumerate(sides):
        for place, shard in enumerate(shards):
            if size >= _BLOCK_RESIDUES:
                blocks.append([])
                size = 0
            blocks[-1].append((number, place))
            size += shard.num_residues
    return blocks


def num_residues(shards: Shards) -> int:
    """Returns how many residues shards hold."""
    return sum(shard.num_residues for shard in shards)


def distinct(numbers: np.ndarray) -> np.ndarray:
    """Returns the distinct numbers, rising; many times faster than np.unique, which goes through a hash table."""
    numbers = np.sort(numbers)
    kept: np.ndarray = numbers[
        np.concatenate([np.ones(min(len(numbers), 1), dtype=np.bool_), numbers[1:] != numbers[:-1]])
    ]
    return kept


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


def _windows_of(shards: Iterable[ShardReader], size: int, level: _Level) -> _HashSet:
    """Returns the windows of shards that hold `size` residues."""
    found = _HashSet(16 * size // level.stride)
    for shard in shards:
        for _, hashes in _window_chunks(shard.tokens, level):
            found.add(hashes)
    return found


def _words_at(tokens: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Returns the 8 residues from each place on as one number, zeros after the end of the tokens."""
    tokens = np.ascontiguousarray(tokens)
    words = np.ndarray(max(0, len(tokens) - _WORD + 1), dtype="<u8", buffer=tokens.data, strides=(1,))
    whole = np.minimum(places, len(words) - 1)
    found: np.ndarray = words[whole] >> ((places - whole) << 3).astype(np.uint64)
    return found


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

    def sequence(self, place: int) -> np.ndarray:
        """Returns one of them."""
        return self.tokens[self.bounds[place] : self.bounds[place + 1]]

    def chosen(self, kept: np.ndarray) -> "_Needles":
        """Returns some of them."""
        lengths = np.diff(self.bounds)
        return _Needles(self.tokens[np.repeat(kept, lengths)], bounds_of(lengths[kept]), self.numbers[kept])


def _needles(inner: Iterable[ShardReader], windows: _HashSet | None, level: _Level) -> Iterator[_Needles]:
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
        hashes = _first_windows(needles.tokens, starts, level)
        self._windows = _HashSet(64 * hashes.size)
        self._windows.add(hashes.ravel())
        tails = (ranks[:, None] * level.stride + np.arange(level.stride)).astype(np.uint64)
        self._forms = distinct(((hashes << _FORM_BITS) | tails).ravel())
        self._ends = distinct(_end_marks(needles.tokens, starts, lengths))
        digests = _digests(needles.tokens, starts, lengths)
        self._order = np.argsort(digests, kind="stable")
        self._digests = digests[self._order]

    def hits(self, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns the windows of outer tokens that may be in the index: their places and hashes."""
        places, kept = [np.zeros(0, dtype=np.int64)], [np.zeros(0, dtype=np.uint64)]
        for first, hashes in _window_chunks(tokens, self._level):
            hits = np.flatnonzero(self._windows.has(hashes))
            places.append(hits * max(_WORD, self._level.stride) + first)
            kept.append(hashes[hits])
        return np.concatenate(places), np.concatenate(kept)

    def batches(self, hashes: np.ndarray) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """Yields the forms of windows, about `_BATCH` at a time.

        Yields:
            How many windows are done with this batch; and in pairs the windows, by place in `hashes`, and the forms.
        """
        lows = np.searchsorted(self._forms, hashes << _FORM_BITS)
        known = np.flatnonzero(self._forms[np.minimum(lows, len(self._forms) - 1)] >> _FORM_BITS == hashes)
        lows = lows[known]
        counts = np.searchsorted(self._forms, (hashes[known] << _FORM_BITS) | _FORM_MASK, side="right") - lows
        # How many forms the windows before each one have.
        before = bounds_of(counts)
        batches = before[:-1] // _BATCH
        for chosen in np.split(np.arange(len(known)), np.flatnonzero(np.diff(batches)) + 1):
            if len(chosen):
                pairs = np.repeat(chosen, counts[chosen])
                within = np.arange(before[chosen[0]], before[chosen[-1] + 1]) - before[pairs]
                yield int(known[chosen[-1]]) + 1, known[pairs], self._forms[lows[pairs] + within]

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
        found: list[int] = []
        # Sequences of one digest that were not found yet.
        missing: dict[int, list[int]] = {}
        for place in np.flatnonzero(highs > lows).tolist():
            low, start = int(lows[place]), int(starts[place])
            if low not in missing:
                missing[low] = self._order[low : highs[place]].tolist()
            if missing[low]:
                sequence = tokens[start : start + int(lengths[place])]
                equal = {number for number in missing[low] if np.array_equal(self._needles.sequence(number), sequence)}
                missing[low] = [number for number in missing[low] if number not in equal]
                found += equal
        return found


def _end_marks(tokens: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Returns a hash of the length and the last residues of each sequence."""
    last = _words_at(tokens, starts + lengths - _WORD)
    marks: np.ndarray = (last ^ (lengths.astype(np.uint64) << _FORM_BITS)) * _FACTOR
    return marks


def _digests(tokens: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    bounds = zip(starts.tolist(), (starts + lengths).tolist(), strict=True)
    content = np.ascontiguousarray(tokens).data
    found = (xxhash.xxh3_64_intdigest(content[start:end]) for start, end in bounds)
    return np.fromiter(found, dtype=np.uint64, count=len(starts))


def _search(needles: _Needles, outer: Shards, level: _Level) -> np.ndarray:
    """Returns the numbers of the inner sequences that stand in a longer record of the outer side."""
    found = [np.zeros(0, dtype=np.int64)]
    index, missing = _Index(needles, level), np.ones(len(needles.numbers), dtype=np.bool_)
    for shard in outer:
        places, hashes = index.hits(shard.tokens)
        while len(places):
            for num_done, windows, forms in index.batches(hashes):
                missing[index.found_at(shard, places[windows], forms)] = False
                # What was found is not looked for again. Each new index has at most half of the one before.
                if 2 * int(missing.sum()) <= len(missing):
                    places, hashes = places[num_done:], hashes[num_done:]
                    break
            else:
                break
            found.append(needles.numbers[~missing])
            needles = needles.chosen(missing)
            if not len(needles.numbers):
                return np.concatenate(found)
            index, missing = _Index(needles, level), np.ones(len(needles.numbers), dtype=np.bool_)
    return np.concatenate([*found, needles.numbers[~missing]])
