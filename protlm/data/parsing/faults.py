"""Records and lines of a text that could not be used, listed in little memory even if they are most of it."""

from array import array
from collections import Counter

from protlm.errors import RecordError

ANNOTATION = "alignment_annotation"
"""The reason given for rows of an alignment that hold no protein; they are counted but are no fault."""
_NOT_ENTRIES = ("text_above_first_header", "byte_order_mark")


class Faults:
    """The line, id and reason of each fault in order, and the whole error of the first one.

    Attributes:
        lines: Lines in the text, from 1.
        ids: Ids, empty where a fault has none.
        reasons: Reasons.
        first: The first error to raise if nothing may be skipped.
    """

    def __init__(self) -> None:
        self.lines = array("q")
        self.ids: list[str] = []
        self.reasons: list[str] = []
        self.first: RecordError | None = None

    def __len__(self) -> int:
        return len(self.lines)

    def add(self, error: RecordError) -> None:
        """Adds the fault that comes next in the text."""
        self.lines.append(error.line)
        self.ids.append(error.record_id)
        self.reasons.append(error.reason)
        if self.first is None and error.reason != ANNOTATION:
            self.first = error

    @property
    def num_entries(self) -> int:
        """Number of faults that are records, and not text above the first one."""
        counts = Counter(self.reasons)
        return len(self) - sum(counts[reason] for reason in _NOT_ENTRIES)


def is_entry(error: RecordError) -> bool:
    """Returns whether a fault is a record, and not text above the first one."""
    return error.reason not in _NOT_ENTRIES
