"""When two sequences count as the same, and in which split a sequence was seen first."""

import xxhash

from protlm.data.splits import SplitName

DIGEST_BYTES = 16


def sequence_digest(residues: bytes) -> bytes:
    """Returns the 16 bytes that stand for a cleaned sequence: its xxh3-128."""
    return xxhash.xxh3_128_digest(residues)


class SeenSequences:
    """Remembers the split in which each sequence was seen first.

    Keeps a dict of digests: about 100 bytes a sequence.
    """

    def __init__(self) -> None:
        self._splits: dict[bytes, SplitName] = {}

    def first_split(self, residues: bytes, split: SplitName) -> SplitName | None:
        """Returns the split that had a cleaned sequence first; None, and notes it for `split`, if it is new."""
        digest = sequence_digest(residues)
        first = self._splits.get(digest)
        if first is None:
            self._splits[digest] = split
        return first
