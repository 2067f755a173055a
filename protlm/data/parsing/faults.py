"""Records and lines of a text that could not be used, listed in little memory even if they are most of it."""

from array import array

import numpy as np

from protlm.data.strings import Strings
from protlm.errors import RecordError

ANNOTATION = "alignment_annotation"
"""The reason given for rows of an alignment that hold no protein; they are counted but are no fault."""
_NOT_ENTRY = "text_above_first_header"


class Faults:
    """The line, id and reason of each fault in order, as columns, and the whole error of the first one.

    Attributes:
        lines: Lines in the text, from 1.
        reasons: The reasons that occur.
        codes: For each fault the number of its reason in `reasons`.
        first: The first error to raise if nothing may be skipped.
        first_place: The number of that fault; it means nothing where `first` is None.
    """

    def __init__(self) -> None:
        self.lines = array("q")
        self.reasons: list[str] = []
        self.codes = bytearray()
        self.first: RecordError | None = None
        self.first_place = 0
        self._ids = bytearray()
        self._id_bounds = array("q", [0])

    def __len__(self) -> int:
        return len(self.lines)

    @property
    def ids(self) -> Strings:
        """Ids, empty where a fault has none."""
        return Strings(np.frombuffer(bytes(self._ids), dtype=np.uint8), np.array(self._id_bounds, dtype=np.int64))

    def add(self, error: RecordError) -> None:
        """Adds the fault that comes next in the text."""
        self._note_first(error)
        self.lines.append(error.line)
        self.codes.append(self._code(error.reason))
        self._ids += error.record_id.encode()
        self._id_bounds.append(len(self._ids))

    def add_many(
        self, first: RecordError, lines: np.ndarray, ids: Strings, reasons: np.ndarray, names: tuple[str, ...]
    ) -> None:
        """Adds the faults that come next in the text.

        Args:
            first: The whole error of the first of them.
            lines: Their lines, int64.
            ids: Their ids.
            reasons: Numbers of their reasons in `names`, uint8.
            names: Reasons, none of them an annotation.
        """
        self._note_first(first)
        numbers = np.zeros(len(names), dtype=np.uint8)
        for number in np.unique(reasons).tolist():
            numbers[number] = self._code(names[number])
        self.lines.frombytes(lines.astype(np.int64).tobytes())
        self.codes += numbers[reasons].tobytes()
        self._id_bounds.frombytes((ids.offsets[1:] + len(self._ids)).astype(np.int64).tobytes())
        self._ids += ids.text.tobytes()

    @property
    def counts(self) -> dict[str, int]:
        """Number of faults with each reason."""
        numbers = np.bincount(np.frombuffer(bytes(self.codes), dtype=np.uint8), minlength=len(self.reasons))
        return dict(zip(self.reasons, numbers.tolist(), strict=True))

    @property
    def num_entries(self) -> int:
        """Number of faults that are records, and not text above the first one."""
        return sum(count for reason, count in self.counts.items() if reason != _NOT_ENTRY)

    def _note_first(self, error: RecordError) -> None:
        if self.first is None and error.reason != ANNOTATION:
            self.first, self.first_place = error, len(self)

    def _code(self, reason: str) -> int:
        if reason not in self.reasons:
            self.reasons.append(reason)
        return self.reasons.index(reason)


def is_entry(error: RecordError) -> bool:
    """Returns whether a fault is a record, and not text above the first one."""
    return error.reason != _NOT_ENTRY
