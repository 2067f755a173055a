"""CSV and TSV files of anyone: hides separator, byte order mark, line ends and compression; read as a stream."""

import csv
import io
from collections.abc import Iterator
from pathlib import Path

from protlm.data.parsing.sources import SourceBlocks
from protlm.data.records import shown
from protlm.errors import ProtlmError, RecordError
from protlm.runtime.progress import Advance, no_advance

_SEPARATORS = "\t;,"
_MOST_LINE_BYTES = 4 << 20
_MOST_LINES = 1000
"""Of one row: fields in quotes may have line ends."""
_UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")
_SHOWN_COLUMNS = 12


class Table:
    """Iterates once over the rows of a table: the line of each in its file, from 1, and its fields.

    Attributes:
        path: The file.
        columns: The names in the first row, all different.
    """

    def __init__(self, path: str | Path, *, advance: Advance = no_advance) -> None:
        """Opens a file and reads the names of its columns. The separator is the most frequent one in their line.

        Args:
            path: The file, plain or compressed; `-` is the standard input.
            advance: Called with the number of bytes of each block read.

        Raises:
            ProtlmError: A file that is missing, damaged, empty or no text, or two columns of one name.
        """
        self.path = path
        self._file = io.BufferedReader(_Stream(SourceBlocks(path, advance=advance)))
        self._num_lines = self._rows_end = 0
        header = (self._next_line() or "").removeprefix("\ufeff")
        if "\r" in header.rstrip("\r\n"):
            raise ProtlmError(f"{path}: line ends of old Macs (CR alone); save the table with others")
        if not header.strip():
            raise ProtlmError(f"{path}: expected a table with the names of its columns in the first line, got none")
        separator = max(_SEPARATORS, key=header.count)
        try:
            self.columns = [name.strip() for name in next(csv.reader([header], delimiter=separator))]
        except csv.Error as error:
            raise RecordError(path, 1, f"no names of columns: {error}; expected a table, CSV or TSV") from None
        twice = next((name for name in self.columns if self.columns.count(name) > 1), None)
        if twice is not None:
            raise ProtlmError(f"{path}: expected columns of different names, got {shown(twice)} twice")
        # Strict, so that a quote without its end does not take all rows after it.
        self._reader = csv.reader(iter(self._next_line, None), delimiter=separator, strict=True)

    def __iter__(self) -> Iterator[tuple[int, list[str]]]:
        try:
            self._rows_end = self._num_lines
            for fields in self._reader:
                self._rows_end = self._num_lines
                if fields:
                    yield self._num_lines, fields
        except csv.Error as error:
            first = self._rows_end + 1
            raise RecordError(self.path, first, f"no row of a table: {error}; mend or remove it") from None

    def place(self, name: str) -> int | None:
        """Returns the place of a column; None if there is none of that name."""
        return self.columns.index(name) if name in self.columns else None

    def required(self, *names: str) -> int:
        """Returns the place of the first of some columns that there is.

        Raises:
            ProtlmError: There is none of them.
        """
        for name in names:
            if name in self.columns:
                return self.columns.index(name)
        listed = ", ".join(shown(name) for name in self.columns[:_SHOWN_COLUMNS])
        more = ", …" if len(self.columns) > _SHOWN_COLUMNS else ""
        raise ProtlmError(f"{self.path}: expected a column {' or '.join(names)}, got {listed}{more}")

    def check_width(self, line: int, fields: list[str]) -> None:
        """Raises RecordError if a row has more or fewer fields than there are columns."""
        if len(fields) != len(self.columns):
            raise RecordError(
                self.path, line, f"expected {len(self.columns)} fields, as in the first line, got {len(fields)}",
                reason="malformed_row",
            )  # fmt: skip

    def _next_line(self) -> str | None:
        # One that does not end would be read into memory whole.
        line = self._file.readline(_MOST_LINE_BYTES)
        if not line:
            return None
        self._num_lines += 1
        if self._rows_end and self._num_lines - self._rows_end > _MOST_LINES:
            message = f"no row of a table: it has more than {_MOST_LINES:,} lines; a quote may lack its end"
            raise RecordError(self.path, self._rows_end + 1, message)
        if len(line) == _MOST_LINE_BYTES:
            message = f"a line of {_MOST_LINE_BYTES:,} bytes and more; expected a table, CSV or TSV"
            raise RecordError(self.path, self._num_lines, message)
        if b"\0" in line and not line.startswith(_UTF16_MARKS):
            raise ProtlmError(f"{self.path}: a binary file; expected a table as text, CSV or TSV")
        try:
            return line.decode()
        except UnicodeDecodeError:
            message = "this is no UTF-8 text; save the table as CSV in UTF-8"
            raise RecordError(self.path, self._num_lines, message) from None  # the bytes would tell a user nothing


class _Stream(io.RawIOBase):
    """Blocks as a file."""

    def __init__(self, blocks: SourceBlocks) -> None:
        self._blocks = iter(blocks)
        self._rest = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]  # the type of a buffer is newer than 3.11
        while not self._rest:
            block = next(self._blocks, None)
            if block is None:
                return 0
            self._rest = memoryview(block)
        size = min(len(buffer), len(self._rest))
        buffer[:size] = self._rest[:size]
        self._rest = self._rest[size:]
        return size
