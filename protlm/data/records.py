"""What one protein record is, in whatever format it was written, and how repeated ids are told apart."""

import re
from collections import defaultdict
from dataclasses import dataclass
from typing import Literal

OnBadRecord = Literal["error", "skip"]

MAX_RECORD_BYTES = 64 << 20
"""The longest protein known has some 45,000 residues; what takes more than this in its file is no protein."""

_SHOWN_ID_LETTERS = 60
# As repeats are numbered, and no longer than they ever will be.
_NUMBERED_ID = re.compile(r"(.*)#([1-9][0-9]{0,17})", re.DOTALL)


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


class NumberedIds:
    """The numbers that no repeat of an id may get, since `id#n` is an id of its own; some 200 bytes each."""

    def __init__(self) -> None:
        self._taken: defaultdict[str, set[int]] = defaultdict(set)
        self._next: dict[str, int] = {}

    def __contains__(self, record_id: object) -> bool:
        """Says whether a number of this id is taken."""
        return record_id in self._taken

    def add(self, record_id: str, number: int) -> None:
        """Takes a number of an id."""
        self._taken[record_id].add(number)

    def next_free(self, record_id: str) -> int:
        """Returns the number of the next repeat of an id, from 2."""
        number = self._next.get(record_id, 2)
        while number in self._taken.get(record_id, ()):
            number += 1
        self._next[record_id] = number + 1
        return number


def numbered_id(text: str) -> tuple[str, int] | None:
    """Returns the id and the number if a repeat of that id could be called so, else None."""
    found = _NUMBERED_ID.fullmatch(text)
    return None if found is None else (found[1], int(found[2]))


def shown(record_id: str) -> str:
    """Returns an id as a message shows it: quoted, without control characters, and cut if it is long."""
    return repr(record_id if len(record_id) <= _SHOWN_ID_LETTERS else record_id[:_SHOWN_ID_LETTERS] + "…")
