"""Parsed records as columns: hides how many of them are held in memory without a Python object for each."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np

from protlm import vocabulary
from protlm.data.digests import digests_of
from protlm.data.records import UNKNOWN, Record
from protlm.data.strings import Strings, bounds_of


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
        cluster_size: Members of the record's UniRef cluster, int32 (records), `UNKNOWN` if not given.
        taxon_id: NCBI taxonomy id, int32 (records), `UNKNOWN` if not given.
        lines: Line of each header in the text it came from, int64 (records), from 1.
        cluster_ids: Name of each record's cluster, empty if not given; None if no record has one.
        families: Names of each record's families joined by `;`, empty if not given; None if no record has any.
        repairs: Letters repaired, by the rules of `vocabulary.REPAIRS`; only rules that were applied.
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


def table_of(records: Iterable[Record], repairs: Mapping[str, int]) -> RecordTable:
    """Returns records as columns, together with the repairs that parsing them took."""
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
