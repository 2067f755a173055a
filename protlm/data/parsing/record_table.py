"""Records as columns: how many parsed records are held at once without one Python object each."""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import xxhash

from protlm import vocabulary
from protlm.data.records import Record

UNKNOWN = -1
"""What stands for no value in the columns of numbers."""


@dataclass(frozen=True, slots=True)
class Strings:
    """Strings back to back: their UTF-8 bytes, uint8, and the (strings + 1) bounds between them, int64."""

    text: np.ndarray
    offsets: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @classmethod
    def of(cls, strings: Iterable[str]) -> "Strings":
        """Returns strings as a column."""
        encoded = [text.encode() for text in strings]
        return cls(np.frombuffer(b"".join(encoded), dtype=np.uint8), bounds_of([len(text) for text in encoded]))

    def to_list(self) -> list[str]:
        """Returns all strings."""
        text, bounds = self.text.tobytes(), self.offsets.tolist()
        return [text[start:end].decode() for start, end in itertools.pairwise(bounds)]


@dataclass(frozen=True, slots=True)
class RecordTable:
    """Records in order, as columns.

    Attributes:
        tokens: Residue tokens of all records back to back, uint8 (residues).
        offsets: The bounds of each record in `tokens`, int64 (records + 1).
        ids: Record ids.
        descriptions: The rest of each header.
        digests: xxh3-128 of each cleaned sequence, its letters in upper case; uint64 (records, 2), high half first.
        id_digests: xxh3-128 of each id's UTF-8 bytes, as `digests`.
        cluster_size: Members of the record's UniRef cluster, int32 (records), `UNKNOWN` if not told.
        taxon_id: NCBI taxonomy id, int32 (records), `UNKNOWN` if not told.
        lines: Line of each header in the text it came from, int64 (records), from 1.
        cluster_ids: Name of each record's cluster, empty if not told; None if told for none.
        families: Names of each record's families joined by `;`, empty if not told; None if told for none.
        repairs: Letters repaired, by the rules of `vocabulary.REPAIRS`; only rules that were needed.
    """

    tokens: np.ndarray
    offsets: np.ndarray
    ids: Strings
    descriptions: Strings
    digests: np.ndarray
    id_digests: np.ndarray
    cluster_size: np.ndarray
    taxon_id: np.ndarray
    lines: np.ndarray
    cluster_ids: Strings | None = None
    families: Strings | None = None
    repairs: Mapping[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.offsets) - 1


def bounds_of(lengths: Sequence[int] | np.ndarray) -> np.ndarray:
    """Returns the bounds of things of these lengths that stand back to back, int64 (lengths + 1), from 0."""
    bounds = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.cumsum(lengths, out=bounds[1:])
    return bounds


def digests_of(texts: Iterable[bytes]) -> np.ndarray:
    """Returns the xxh3-128 of each text, uint64 (texts, 2), high half first."""
    joined = b"".join(map(xxhash.xxh3_128_digest, texts))
    return np.frombuffer(joined, dtype=">u8").astype(np.uint64).reshape(-1, 2)


def table_of(records: Iterable[Record], repairs: Mapping[str, int]) -> RecordTable:
    """Returns records as columns, with the repairs that were made on the way to them."""
    kept = list(records)
    sequences = [record.sequence.encode() for record in kept]
    numbers = {
        name: np.array([UNKNOWN if (value := getattr(r, name)) is None else value for r in kept], dtype=np.int32)
        for name in ("cluster_size", "taxon_id")
    }
    return RecordTable(
        tokens=vocabulary.encode(b"".join(sequences)),
        offsets=bounds_of([len(sequence) for sequence in sequences]),
        ids=Strings.of(record.id for record in kept),
        descriptions=Strings.of(record.description for record in kept),
        digests=digests_of(sequences),
        id_digests=digests_of(record.id.encode() for record in kept),
        cluster_size=numbers["cluster_size"],
        taxon_id=numbers["taxon_id"],
        lines=np.array([record.line for record in kept], dtype=np.int64),
        cluster_ids=_optional_strings([record.cluster_id for record in kept]),
        families=_optional_strings([";".join(record.families) for record in kept]),
        repairs=dict(repairs),
    )


def _optional_strings(strings: list[str]) -> Strings | None:
    return Strings.of(strings) if any(strings) else None
