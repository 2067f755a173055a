"""The proteins on which a swap is calibrated or measured: a sample of a file, read as a stream."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from protlm import vocabulary
from protlm.data.nucleotides import is_nucleic_acid
from protlm.data.parsing.reader import RecordReader
from protlm.data.parsing.sources import STDIN
from protlm.data.records import NUCLEOTIDES, Record, shown
from protlm.errors import ProtlmError, RecordError
from protlm.runtime.progress import StartProgress

MOST_PROTEINS = 256
_LONGEST = 4096
"""Residues of a protein that are looked at: of a longer one its beginning."""
_COUNTER = np.array([0, 0, 0, 5], dtype=np.uint64)
"""Keeps this choice apart from other draws with the same seed; `data.batching.draws` lists the others."""


@dataclass(frozen=True)
class SampledProteins:
    """Some proteins of a file, in its order.

    Attributes:
        residues: Residue tokens of each, uint8.
        num_read: Proteins of the file.
        num_cut: Of the sample, those of which only the beginning is taken.
    """

    residues: list[np.ndarray]
    num_read: int
    num_cut: int

    @property
    def lengths(self) -> np.ndarray:
        """Residues of each, int64."""
        return np.array([len(tokens) for tokens in self.residues], dtype=np.int64)

    def __len__(self) -> int:
        return len(self.residues)

    def tokens(self, record: int) -> np.ndarray:
        """Returns the residue tokens of a protein."""
        return self.residues[record]

    def key(self, record: int) -> bytes:
        """Returns the bytes by which equal proteins are known."""
        return self.residues[record].tobytes()


def sample_proteins(
    path: str | Path, option: str, max_residues: int | None, seed: int, start_progress: StartProgress
) -> SampledProteins:
    """Returns at most `MOST_PROTEINS` proteins of a file, every choice of them as likely; memory is that of these.

    Args:
        path: A protein file, plain or compressed; `-` is the standard input.
        option: The option that names the file, for messages.
        max_residues: Longest protein that the model's positions reach; None: any.
        seed: Of the choice.
        start_progress: Starts the stage `read` (bytes).

    Raises:
        ProtlmError: A file that cannot be read, a record that is no protein, or no protein at all.
    """
    size = 0 if str(path) == STDIN else Path(path).stat().st_size
    reader = RecordReader([path], advance=start_progress("read", size))
    generator = np.random.Generator(np.random.Philox(key=seed, counter=_COUNTER))
    limit = min(_LONGEST, max_residues or _LONGEST)
    kept: list[tuple[int, np.ndarray]] = []
    num_read, cut = 0, set()
    for record in _proteins(reader, path):
        number, num_read = num_read, num_read + 1
        # Vitter's algorithm R: the n-th is taken with probability MOST_PROTEINS / n, in the place of any other.
        place = number if number < MOST_PROTEINS else int(generator.integers(num_read))
        if place >= MOST_PROTEINS:
            continue
        tokens = vocabulary.encode(record.sequence[:limit].encode())
        if len(record.sequence) > limit:
            cut.add(number)
        if place == len(kept):
            kept.append((number, tokens))
        else:
            kept[place] = (number, tokens)
    if not kept:
        raise ProtlmError(f"{path}: no protein; {option} needs some of the kind that the model is for")
    kept.sort(key=lambda each: each[0])
    return SampledProteins([tokens for _, tokens in kept], num_read, sum(number in cut for number, _ in kept))


def _proteins(reader: RecordReader, path: str | Path) -> Iterator[Record]:
    for record in reader:
        if is_nucleic_acid(record.sequence.encode(), record.description):
            message = f"record {shown(record.id)} is a nucleic acid, by its header or its letters; translate it"
            raise RecordError(path, record.line, message, reason=NUCLEOTIDES, record_id=record.id)
        yield record
