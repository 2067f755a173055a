"""Columns of strings: their bytes back to back and the bounds between them, in memory or mapped from a file."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from protlm.errors import ShardError


@dataclass(frozen=True, slots=True)
class Strings:
    """A column of strings; index it to get one.

    Attributes:
        text: The UTF-8 bytes of all strings back to back, uint8.
        offsets: The bounds of each string in `text`, int64 (strings + 1).
        where: File and column for messages, if the bytes come from a file, which may be damaged.
    """

    text: np.ndarray
    offsets: np.ndarray
    where: str = ""

    @classmethod
    def of(cls, strings: Iterable[str]) -> "Strings":
        """Returns a column in memory of these strings."""
        encoded = [text.encode() for text in strings]
        return cls(np.frombuffer(b"".join(encoded), dtype=np.uint8), bounds_of([len(text) for text in encoded]))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> str:
        return self._decode(self.bytes_of(range(len(self))[index]))

    def __iter__(self) -> Iterator[str]:
        return map(self._decode, self.encoded())

    def bytes_of(self, index: int) -> bytes:
        """Returns the UTF-8 bytes of one string; the index is not negative."""
        content: bytes = self.text[self.offsets[index] : self.offsets[index + 1]].tobytes()
        return content

    def encoded(self, num_at_once: int = 1 << 16) -> Iterator[bytes]:
        """Yields the UTF-8 bytes of each string, in order, reading many strings at a time."""
        for start in range(0, len(self), num_at_once):
            bounds = self.offsets[start : start + num_at_once + 1]
            text, first = self.text[bounds[0] : bounds[-1]].tobytes(), int(bounds[0])
            for begin, end in itertools.pairwise(bounds.tolist()):
                yield text[begin - first : end - first]

    def to_list(self) -> list[str]:
        """Returns all strings."""
        text, bounds = self.text.tobytes(), self.offsets.tolist()
        return [self._decode(text[start:end]) for start, end in itertools.pairwise(bounds)]

    def _decode(self, text: bytes) -> str:
        try:
            return text.decode()
        except UnicodeDecodeError as error:
            assert self.where, text[:20]
            raise ShardError(f"{self.where}: expected UTF-8 text, got {text[:20]!r}; the file is damaged") from error


def bounds_of(lengths: Sequence[int] | np.ndarray) -> np.ndarray:
    """Returns the bounds of intervals of these lengths that lie back to back from 0, int64 (lengths + 1)."""
    bounds = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.cumsum(lengths, out=bounds[1:])
    return bounds
