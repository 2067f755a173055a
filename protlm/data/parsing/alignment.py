"""Alignments in A3M or aligned FASTA: the residues of each column of their first sequence, counted as a stream."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from protlm.data.parsing.sources import SourceBlocks
from protlm.errors import RecordError
from protlm.vocabulary import NUM_STANDARD_RESIDUES, RESIDUES

_MOST_SEQUENCE_BYTES = 64 << 20
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_INSERTIONS = bytes(range(ord("a"), ord("z") + 1)) + b"."
_STANDARD = RESIDUES[:NUM_STANDARD_RESIDUES].encode()
_TO_COLUMN = bytes(_STANDARD.index(byte) if byte in _STANDARD else NUM_STANDARD_RESIDUES for byte in range(256))


@dataclass(frozen=True)
class AlignedCounts:
    """The residues of an alignment, column by column.

    Attributes:
        query: The residues of the first sequence, which has no gap here.
        counts: Standard residues in each of its columns, in the order of `vocabulary.RESIDUES`, int64
            (len(query), 20).
        num_sequences: Sequences that were counted, the first among them.
    """

    query: str
    counts: np.ndarray
    num_sequences: int


def count_alignment(path: str | Path, *, most_columns: int) -> AlignedCounts:
    """Returns the residue counts of an alignment; memory is that of one sequence and of the counts.

    Small letters and points are insertions, as in A3M, and are left out; `-` is a gap. All letters but those of the 20
    standard residues count as gaps. Columns in which the first sequence has a gap are left out.

    Args:
        path: The file, plain or compressed.
        most_columns: Most residues that the first sequence may have.

    Raises:
        ProtlmError: A file that cannot be read; with the line, a first sequence of more residues, one of another
            aligned length than the first, or something that is no alignment.
    """
    counter = _Counter(path, most_columns)
    pending, line = b"", 0
    for block in SourceBlocks(path):
        *lines, pending = (pending + block).split(b"\n")
        for text in lines:
            line += 1
            counter.add(line, text)
        if len(pending) > _MOST_SEQUENCE_BYTES:
            raise RecordError(path, line + 1, f"a line of more than {_MOST_SEQUENCE_BYTES:,} bytes; expected A3M")
    counter.add(line + 1, pending)
    return counter.finish()


class _Counter:
    """Gathers the lines of a sequence and counts it once it is complete."""

    def __init__(self, path: str | Path, most_columns: int) -> None:
        self._path, self._most_columns = path, most_columns
        self._header_line = 0
        # One buffer: thousands of short lines would take many times their bytes.
        self._aligned = bytearray()
        self._query: np.ndarray | None = None
        self._letters = b""
        self._counts = np.zeros((0, NUM_STANDARD_RESIDUES + 1), dtype=np.int64)
        self._num_sequences = 0

    def add(self, line: int, text: bytes) -> None:
        if line == 1:
            text = text.removeprefix(_BYTE_ORDER_MARK)
        if text.startswith(b">"):
            self._end()
            self._header_line = line
        elif text.startswith(b"#") and not self._header_line:
            return  # the comment of a3m files of HH-suite, before the first sequence
        elif text.strip():
            if not self._header_line:
                raise RecordError(self._path, line, "expected a line that begins with '>'; give an alignment in A3M")
            self._aligned += text.strip()
            if len(self._aligned) > _MOST_SEQUENCE_BYTES:
                message = f"a sequence of more than {_MOST_SEQUENCE_BYTES:,} bytes; expected A3M"
                raise RecordError(self._path, self._header_line, message)

    def _end(self) -> None:
        if not self._header_line:
            return
        aligned = bytes(self._aligned.translate(None, delete=_INSERTIONS))
        self._aligned.clear()
        if self._query is None:
            self._start(aligned)
        columns = np.frombuffer(aligned.translate(_TO_COLUMN), dtype=np.uint8)
        assert self._query is not None
        if len(columns) != len(self._query):
            raise RecordError(
                self._path, self._header_line,
                f"expected {len(self._query)} aligned letters, as in the first sequence, got {len(columns)}; give an "
                "alignment in A3M",
            )  # fmt: skip
        kept = columns[self._query]
        self._counts[np.arange(len(kept)), kept] += 1
        self._num_sequences += 1

    def _start(self, aligned: bytes) -> None:
        self._query = np.frombuffer(aligned, dtype=np.uint8) != ord("-")
        self._letters = aligned.replace(b"-", b"")
        if not self._letters or not self._letters.isalpha():
            raise RecordError(self._path, self._header_line, "expected an aligned protein as the first sequence")
        if len(self._letters) > self._most_columns:
            raise RecordError(
                self._path, self._header_line,
                f"the first sequence has {len(self._letters):,} residues, and the protein {self._most_columns:,}; "
                "expected the protein itself, or a stretch of it",
            )  # fmt: skip
        self._counts = np.zeros((len(self._letters), NUM_STANDARD_RESIDUES + 1), dtype=np.int64)

    def finish(self) -> AlignedCounts:
        self._end()
        if self._query is None:
            raise RecordError(self._path, 1, "expected an alignment in A3M, got no sequence")
        return AlignedCounts(
            self._letters.decode("ascii"), self._counts[:, :NUM_STANDARD_RESIDUES], self._num_sequences
        )
