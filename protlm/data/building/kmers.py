"""k-mers of residues and sets of them: by compiled code where it was built, by NumPy elsewhere.

A k-mer is read as one number, and known by a hash of it.
"""

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from protlm.data import compiled
from protlm.data.compiled import Integer, Pointer

HASH_BITS = 40
WORD = 8
"""Residues that are read as one number."""

_CHUNK_KMERS = 1 << 18
_FACTOR = np.uint64(0x9E3779B97F4A7C15)
_UNUSED_BITS = np.uint64(64 - HASH_BITS)
_MAX_SLOT_BITS = 29
_PROBES = 8


@dataclass(frozen=True, slots=True)
class Level:
    """The k-mers by which inner sequences of `shortest` to `longest` residues are searched for.

    Attributes:
        width: Number of residues of a k-mer, at most `WORD`.
        stride: Distance between the k-mers of the outer tokens that are looked up.
        shortest: Length of the shortest sequences; at least `span`.
        longest: Length of the longest ones.
    """

    width: int
    stride: int
    shortest: int
    longest: int = 1 << 62

    @property
    def span(self) -> int:
        """Length from which any stretch of residues holds a whole k-mer at a multiple of the stride."""
        return self.width + self.stride - 1


class _CompiledSet(ctypes.Structure):
    """The C++ struct `KmerSet`."""

    _fields_ = [("bits", Pointer), ("shift", Integer), ("factor", ctypes.c_uint64), ("stride", Integer)]


class KmerSet:
    """An approximate set of the k-mers of a level, by the high bits of their hashes.

    It has all that were added, and few others.
    """

    def __init__(self, num_slots: int, level: Level) -> None:
        """Starts without k-mers.

        Args:
            num_slots: About how many bits it should have; the more, the fewer others.
            level: The level, whose k-mers it has.
        """
        bits = min(max(20, num_slots.bit_length()), _MAX_SLOT_BITS)
        self._level = level
        self._shift = np.uint64(HASH_BITS - bits)
        self._bytes = np.zeros(1 << bits - 3, dtype=np.uint8)

    def add(self, hashes: np.ndarray) -> None:
        """Adds k-mers by their hashes, uint64 of one axis."""
        slots = hashes >> self._shift
        bits = slots.astype(np.uint8) & np.uint8(7)
        # One bit after the other, since several hashes of a byte then write the same value.
        for bit in range(8):
            self._bytes[(slots[bits == bit] >> np.uint64(3)).view(np.int64)] |= np.uint8(1 << bit)

    def add_all(self, tokens: np.ndarray) -> None:
        """Adds the k-mers of tokens at multiples of the stride."""
        tokens = np.ascontiguousarray(tokens)
        if compiled.is_available():
            compiled.library().protlm_add_kmers(self._compiled(), tokens.ctypes.data, len(tokens))
            return
        for places in self._chunks(len(tokens)):
            self.add(_hashes_from(tokens, places, self._level))

    def find(self, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns the k-mers of tokens at multiples of the stride that may be in the set.

        Returns:
            Their places, ascending, int64, and their hashes, uint64.
        """
        tokens = np.ascontiguousarray(tokens)
        find = self._find_compiled if compiled.is_available() else self._find
        kmers_of_chunks = [find(tokens, places) for places in self._chunks(len(tokens))]
        return (
            np.concatenate([np.zeros(0, dtype=np.int64), *(places for places, _ in kmers_of_chunks)]),
            np.concatenate([np.zeros(0, dtype=np.uint64), *(hashes for _, hashes in kmers_of_chunks)]),
        )

    def _find(self, tokens: np.ndarray, among: range) -> tuple[np.ndarray, np.ndarray]:
        hashes = _hashes_from(tokens, among, self._level)
        held = np.flatnonzero(self._has(hashes))
        return held * among.step + among.start, hashes[held]

    def _find_compiled(self, tokens: np.ndarray, among: range) -> tuple[np.ndarray, np.ndarray]:
        places, hashes = np.empty(len(among), dtype=np.int64), np.empty(len(among), dtype=np.uint64)
        num_found = compiled.library().protlm_find_kmers(
            self._compiled(), tokens.ctypes.data, len(tokens), among.start, among.stop, places.ctypes.data,
            hashes.ctypes.data,
        )  # fmt: skip
        # Without the room that was not needed.
        return places[:num_found].copy(), hashes[:num_found].copy()

    def are_known(self, tokens: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Tells which sequences may be part of tokens all of whose k-mers at multiples of the stride were added.

        Every stretch of such a sequence has one of them; a few stretches are looked at.

        Args:
            tokens: Tokens of all sequences.
            starts: First place of each in the tokens, int64 (sequences,).
            lengths: Length of each, int64 (sequences,); at least `Level.span`.

        Returns:
            Whether each may be part of them, bool (sequences,).
        """
        level = self._level
        if compiled.is_available():
            tokens, starts, lengths = map(np.ascontiguousarray, (tokens, starts, lengths))
            marks = np.empty(len(starts), dtype=np.bool_)
            compiled.library().protlm_mark_known(
                self._compiled(), tokens.ctypes.data, len(tokens), starts.ctypes.data, lengths.ctypes.data,
                len(starts), level.span, _PROBES, marks.ctypes.data,
            )  # fmt: skip
            return marks
        known = np.ones(len(starts), dtype=np.bool_)
        for probe in range(_PROBES):
            wanted = np.flatnonzero(known)
            firsts = starts[wanted] + (lengths[wanted] - level.span) * probe // (_PROBES - 1)
            known[wanted] = self._has(first_kmers(tokens, firsts, level)).any(axis=1)
        return known

    def _has(self, hashes: np.ndarray) -> np.ndarray:
        slots = hashes >> self._shift
        held: np.ndarray = self._bytes.take((slots >> np.uint64(3)).view(np.int64))
        held >>= slots.astype(np.uint8) & np.uint8(7)
        held &= np.uint8(1)
        return held.view(np.bool_)

    def _chunks(self, num_tokens: int) -> Iterator[range]:
        """Yields the multiples of the stride, as many as are looked up at once."""
        size = self._level.stride * _CHUNK_KMERS
        for start in range(0, num_tokens, size):
            yield range(start, min(start + size, num_tokens), self._level.stride)

    def _compiled(self) -> Any:
        level = self._level
        return ctypes.byref(
            _CompiledSet(self._bytes.ctypes.data, int(self._shift), int(_factor(level.width)), level.stride)
        )


def first_kmers(tokens: np.ndarray, starts: np.ndarray, level: Level) -> np.ndarray:
    """Returns the hashes of the first `stride` k-mers from each start on, uint64 (starts, stride)."""
    return _hashed(words_at(tokens, starts[:, None] + np.arange(level.stride)), level.width)


def words_at(tokens: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Returns the `WORD` residues from each place on as one number, uint64, with zeros after the end of the tokens."""
    words = _words(tokens)
    whole = np.minimum(places, len(words) - 1)
    words_at: np.ndarray = words[whole] >> ((places - whole) << 3).astype(np.uint64)
    return words_at


def mixed(words: np.ndarray) -> np.ndarray:
    """Returns numbers, uint64, whose high bits depend on all bits of the given ones."""
    return words * _FACTOR


def _words(tokens: np.ndarray) -> np.ndarray:
    """Returns the words at all places up to the last whole one, of which there is at least one, as a view."""
    tokens = np.ascontiguousarray(np.pad(tokens, (0, WORD - len(tokens))) if len(tokens) < WORD else tokens)
    return np.ndarray(len(tokens) - WORD + 1, dtype="<u8", buffer=tokens.data, strides=(1,))


def _hashes_from(tokens: np.ndarray, places: range, level: Level) -> np.ndarray:
    """Returns the hashes of the k-mers at these places."""
    # A slice reads the whole words many times faster than their places do.
    whole = _words(tokens)[places.start : places.stop : places.step]
    rest = np.arange(places.start, places.stop, places.step)[len(whole) :]
    return _hashed(np.concatenate([whole, words_at(tokens, rest)]), level.width)


def _hashed(words: np.ndarray, width: int) -> np.ndarray:
    """Returns the hash, of `HASH_BITS` bits, of the first `width` residues of each word."""
    hashes: np.ndarray = (words * _factor(width)) >> _UNUSED_BITS
    return hashes


def _factor(width: int) -> np.uint64:
    # Shifted, it moves residues after the first `width` ones out at the top.
    return _FACTOR << np.uint64(8 * (WORD - width))
