"""What one protein record is, in whatever format it was written."""

from dataclasses import dataclass
from typing import Literal

OnBadRecord = Literal["error", "skip"]
"""Whether a bad record ends the command, or is left out and counted."""

Format = Literal["fasta", "a3m", "flatfile", "uniprot-xml", "uniref-xml"]
"""How the records of a text are written."""

MAX_RECORD_BYTES = 64 << 20
"""The longest protein known has some 45,000 residues; what takes more than this in its file is no protein."""

_SHOWN_ID_LETTERS = 60


@dataclass(frozen=True, slots=True)
class Record:
    """One protein as read from a file.

    Attributes:
        id: The first word of the header, verbatim.
        description: The rest of the header.
        sequence: The cleaned residues.
        cluster_size: Members of its UniRef cluster (`n=`), None if not told.
        taxon_id: NCBI taxonomy id (`TaxID=` or `OX=`), None if not told.
        line: Line of the header in its file, from 1.
        cluster_id: Name of its cluster, empty if not told.
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
    """Returns an id as a message shows it: quoted, without control characters, and cut if it is long."""
    return repr(record_id if len(record_id) <= _SHOWN_ID_LETTERS else record_id[:_SHOWN_ID_LETTERS] + "…")
