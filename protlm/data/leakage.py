"""What one split tells of another: sequences that are part of longer ones, and labels that occur on both sides.

Sequences are found by windows of a few residues, read as one number. Where a sequence stands in the outer tokens, one of
its first `stride` windows stands at a multiple of `stride`; so that many windows of each inner sequence are indexed, one
window in `stride` of the outer tokens is looked up, and what fits is compared letter by letter.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, combinations, pairwise
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
_CHUNK_WORDS = 1 << 15
_BATCH = 1 << 20
_FACTOR = np.uint64(0x9E3779B97F4A7C15)
_HASH_BITS = 40
_MAX_SLOT_BITS = 26
_PROBES = 8
# A form is a hash with a place and the rank of a length below it.
_FORM_BITS = np.uint64(64 - _HASH_BITS)
_FORM_MASK = np.uint64((1 << 64 - _HASH_BITS) - 1)


@dataclass(frozen=True, slots=True)
class _Level:
    """How inner sequences of `shortest` to `longest` residues are found: all have width + stride - 1 residues."""

    width: int
    stride: int
    shortest: int
    longest: int = 1 << 62


# The fewer windows of the larger side are read, the better: of a large outer side one in 16, of a large inner side one
# for each sequence.
_LARGE_OUTER = (_Level(8, 16, 23), _Level(5, 8, MIN_LENGTH, 22))
_LARGE_INNER = (_Level(8, 1, MIN_LENGTH),)


def look_for_leaks(splits: Mapping[SplitName, Shards], exact_duplicates_removed: int, *, substrings: bool) -> Leakage:
    """Compares all pairs of splits that have records.

    Args:
        splits: The shards of each split.
        exact_duplicates_removed: Records left out because an earlier split has their sequence.
        substrings: Look for sequences that are part of longer ones, too; this reads all tokens.
    """
    filled = {name: splits[name] for name in SPLIT_NAMES if any(shard.num_records for shard in splits.get(name, ()))}
    counts: dict[tuple[SplitName, SplitName], int] = {}
    for outer in filled if substrings else ():
        inner = [name for name in filled if name != outer]
        found = _contained([filled[name] for name in inner], filled[outer])
        counts.update(zip(((name, outer) for name in inner), found, strict=True))
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
        substrings=tuple(
            Contained(inner=inner, outer=outer, num_records=counts[inner, outer])
            for inner in filled for outer in filled if inner != outer
        ) if substrings else None,
        clusters=shared["cluster_id"],
        families=shared["family"],
    )  # fmt: skip


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
    noted of a shard of the outer side. Time is linear in the residues for proteins. Repeats, whose windows fit in many
    places, cost at most a comparison for each outer residue and each length that occurs among the inner records, not
    for each pair of records; and what was found once is not looked for again.
    """
    return _contained([inner], outer)[0]


def _contained(inners: Sequence[Shards], outer: Shards) -> list[int]:
    """Returns for each of several inner sides how many of their records are part of a longer outer one.

    The outer side is read once for all inner ones that are smaller.
    """
    is_larger = [_num_residues(inner) > _num_residues(outer) for inner in inners]
    counts = [0] * len(inners)
    for number in np.flatnonzero(is_larger).tolist():
        found = [np.zeros(0, dtype=np.int64)]
        for shard in outer:
            windows = _windows_of(shard, _LARGE_INNER[0])
            for needles in _needles(inners[number], windows, _LARGE_INNER[0]):
                found.append(_search(needles, [shard], _LARGE_INNER[0]))
        counts[number] = len(_distinct(np.concatenate(found)))
    smaller = np.flatnonzero(np.logical_not(is_larger)).tolist()
    together = [shard for number in smaller for shard in inners[number]]
    starts = np.cumsum([0] + [sum(shard.num_records for shard in inners[number]) for number in smaller])
    for level in _LARGE_OUTER:
        for needles in _needles(together, None, level):
            found_by_side = np.histogram(_search(needles, outer, level), starts)[0]
            for number, count in zip(smaller, found_by_side.tolist(), strict=True):
                counts[number] += count
    return counts


def _num_residues(shards: Shards) -> int:
    return sum(shard.num_residues for shard in shards)


def _distinct(numbers: np.ndarray) -> np.ndarray:
    """Returns the distinct numbers, rising; many times faster than np.unique, which goes through a hash table."""
    numbers = np.sort(numbers)
    return numbers[np.concatenate([np.ones(min(len(numbers), 1), dtype=np.bool_), numbers[1:] != numbers[:-1]])]


class _HashSet:
    """Hashes, by a part of their bits: has all that were put in, and a few others."""

    def __init__(self, num_slots: int) -> None:
        bits = min(max(16, num_slots.bit_length()), _MAX_SLOT_BITS)
        self._shift = np.uint64(_HASH_BITS - bits)
        self._slots = np.zeros(1 << bits, dtype=np.bool_)

    def add(self, hashes: np.ndarray) -> None:
        self._slots[(hashes >> self._shift).view(np.int64)] = True

    def has(self, hashes: np.ndarray) -> np.ndarray:
        held: np.ndarray = self._slots.take((hashes >> self._shift).view(np.int64))
        return held


def _hashed(windows: np.ndarray) -> np.ndarray:
    """Returns a hash of `_HASH_BITS` bits of each window."""
    return (windows * _FACTOR) >> _FORM_BITS


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
            yield start, _hashed(words if level.width == _WORD else words & _mask(level.width))


def _windows_of(shard: ShardReader, level: _Level) -> _HashSet:
    found = _HashSet(2 * shard.num_residues)
    for _, hashes in _window_chunks(shard.tokens, level):
        found.add(hashes)
    return found


def _windows_at(tokens: np.ndarray, places: np.ndarray, width: int) -> np.ndarray:
    """Returns the windows of `width` residues from each place on; all must lie within the tokens, of which 8 are there."""
    tokens = np.ascontiguousarray(tokens)
    words = np.ndarray(max(0, len(tokens) - _WORD + 1), dtype="<u8", buffer=tokens.data, strides=(1,))
    # A short window near the end is the upper part of the last word.
    whole = np.minimum(places, len(words) - 1)
    windows = words[whole] >> ((places - whole) << 3).astype(np.uint64)
    return windows if width == _WORD else windows & _mask(width)


def _mask(width: int) -> np.uint64:
    return np.uint64((1 << 8 * width) - 1)


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

    def chosen(self, kept: np.ndarray) -> "_Needles":
        """Returns some of them."""
        lengths = np.diff(self.bounds)
        return _Needles(self.tokens[np.repeat(kept, lengths)], bounds_of(lengths[kept]), self.numbers[kept])


def _needles(inner: Shards, windows: _HashSet | None, level: _Level) -> Iterator[_Needles]:
    """Yields the inner sequences of a level in blocks.

    Where the windows of an outer side are given, at a stride of 1, those are left out of which one is not among them.
    """
    num_before = 0
    for shard in inner:
        starts, ends = shard.offsets[:-1], shard.offsets[1:]
        wanted = np.flatnonzero((ends - starts >= level.shortest) & (ends - starts <= level.longest))
        if windows is not None:
            for probe in range(_PROBES):
                places = starts[wanted] + (ends - starts - level.width)[wanted] * probe // (_PROBES - 1)
                wanted = wanted[windows.has(_hashed(_windows_at(shard.tokens, places, level.width)))]
        lengths = (ends - starts)[wanted]
        blocks = np.cumsum(lengths) // _BLOCK_RESIDUES
        for block in np.split(wanted, np.flatnonzero(np.diff(blocks)) + 1):
            if len(block):
                parts = [shard.tokens[a:b] for a, b in zip(starts[block].tolist(), ends[block].tolist(), strict=True)]
                yield _Needles(np.concatenate(parts), bounds_of((ends - starts)[block]), block + num_before)
        num_before += shard.num_records


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
        hashes = _hashed(_windows_at(needles.tokens, places, level.width))
        self._windows = _HashSet(32 * len(hashes))
        self._windows.add(hashes)
        tails = (ranks[:, None] * level.stride + within).ravel().astype(np.uint64)
        self._forms = _distinct((hashes << _FORM_BITS) | tails)
        self._ends = _distinct(_end_marks(needles.tokens, starts, lengths))
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
    last = _windows_at(tokens, starts + lengths - _WORD, _WORD)
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
