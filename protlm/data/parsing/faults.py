"""What could not be used of a text, held in little memory however much it is."""

from array import array
from collections import Counter

from protlm.errors import RecordError

ANNOTATION = "alignment_annotation"
"""The reason of rows of an alignment that hold no protein: they are counted, and are no fault."""
_NOT_ENTRIES = ("text_above_first_header", "byte_order_mark")


class Faults:
    """The place, id and reason of each thing that could not be used, in order; the whole error of the first one only.

    Attributes:
        lines: Lines in the text, from 1.
        ids: Ids, empty where there is none.
        reasons: Reasons.
        first: The first error that is to be raised where nothing may be skipped.
    """

    def __init__(self) -> None:
        self.lines = array("q")
        self.ids: list[str] = []
        self.reasons: list[str] = []
        self.first: RecordError | None = None

    def __len__(self) -> int:
        return len(self.lines)

    def add(self, error: RecordError) -> None:
        """Adds what comes next in the text."""
        self.lines.append(error.line)
        self.ids.append(error.record_id)
        self.reasons.append(error.reason)
        if self.first is None and error.reason != ANNOTATION:
            self.first = error

    @property
    def num_entries(self) -> int:
        """How many are records, and not only text above the first one."""
        counts = Counter(self.reasons)
        return len(self) - sum(counts[reason] for reason in _NOT_ENTRIES)


def is_entry(error: RecordError) -> bool:
    """Says whether what cannot be used is a record, and not only text above the first one."""
    return error.reason not in _NOT_ENTRIES
