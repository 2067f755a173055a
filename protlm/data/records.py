"""A protein record, independent of the format that it was written in, and the choices for reading records."""

from dataclasses import dataclass
from typing import Literal

OnBadRecord = Literal["error", "skip"]
"""Treatment of a bad record: it ends the command, or is left out and counted."""

Nucleotides = Literal["error", "skip", "keep"]
"""Treatment of a nucleic acid among proteins: it ends the command, is left out and counted, or is kept and counted."""

NUCLEOTIDES = "nucleotides"
"""The reason given for nucleic acids that are rejected."""

TextFormat = Literal["fasta", "flatfile", "uniprot-xml", "uniref-xml"]
"""The formats by their syntax."""

Format = Literal[TextFormat, "a3m"]
"""The formats that are read; A3M is FASTA of aligned sequences."""

UNKNOWN = -1
"""The value that marks a missing number in a column."""

MAX_RECORD_BYTES = 64 << 20
"""Size of the longest record that is read; the longest protein known has some 45,000 residues."""

_SHOWN_ID_LETTERS = 60


@dataclass(frozen=True, slots=True)
class Record:
    """One protein as read from a file.

    Attributes:
        id: The first word of the header, verbatim.
        description: The rest of the header.
        sequence: The cleaned residues.
        cluster_size: Members of its UniRef cluster (`n=`), None if not given.
        taxon_id: NCBI taxonomy id (`TaxID=` or `OX=`), None if not given.
        line: Line of the header in its file, from 1.
        cluster_id: Name of its cluster, empty if not given.
        families: Names of its families, such as `PF00012`.
    """

    id: str
    description: str
    sequence: str
    cluster_size: int | None = None
    taxon_id: int | None = None
    line: int = 0
    cluster_id: str = ""
    families: tuple[str, ...] = ()


def shown(record_id: str) -> str:
    """Returns an id for a message: quoted, without control characters, and cut if it is long."""
    return repr(record_id if len(record_id) <= _SHOWN_ID_LETTERS else record_id[:_SHOWN_ID_LETTERS] + "…")
