"""The CSV tables that a run writes: their columns, how a resumed run continues them, how long ones are read quickly."""

from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import BinaryIO

import numpy as np

from protlm import files
from protlm.errors import RunError
from protlm.files import open_regular

METRICS = (
    "step", "epoch", "tokens", "train/loss", "train/accuracy", "train/perplexity", "train/transfer_loss",
    "train/distill_loss", "lr", "muon_lr", "grad_norm",
    "valid/loss", "valid/accuracy", "valid/perplexity",
)  # fmt: skip
"""Columns of metrics.csv, a row per update: only numbers that two equal runs share."""

ADDED_METRICS = frozenset({"tokens", "muon_lr", "train/transfer_loss", "train/distill_loss"})
"""Columns that the metrics.csv of earlier versions lacks, all or some of them."""

SPEED = ("step", "seconds", "residues_per_second", "data_wait_fraction", "peak_memory_bytes")
"""Columns of speed.csv, a row per update: numbers that depend on the machine and its load."""

HEALTH = (
    "step", "layer", "q_norm", "k_norm", "max_q_norm", "max_k_norm", "effective_features", "dead_features",
)  # fmt: skip
"""Columns of health.csv, a row per layer at every measured step."""

MOST_BYTES = 2**34
"""Of a table that is read: the rows of about sixty million updates."""
_MOST_LINE_BYTES = 4096


class CsvLog:
    """A table that grows during a run; `append` hands each row to the operating system before it returns.

    Attributes:
        last_step: The last step that was kept from before; 0 for none.
    """

    def __init__(
        self, path: Path, columns: Sequence[str], *, last_step: int = 0, added: Set[str] = frozenset()
    ) -> None:
        """Opens the file, keeping the rows up to last_step and dropping those past it.

        Args:
            path: The file; made if there is none.
            columns: Names of the columns; the first is `step`.
            last_step: The step that the run resumes from.
            added: Columns that a file of an earlier version lacks; they are empty in its rows.

        Raises:
            RunError: The file is not a table with these columns.
        """
        self._columns = tuple(columns)
        self.last_step = 0
        with files.written_whole(path) as partial, partial.open("wb") as kept:
            kept.write(_line(columns))
            for line in _lines_with_added(path, columns, added) if path.exists() else ():
                step = int(line.partition(b",")[0])
                if step <= last_step:
                    kept.write(line)
                    self.last_step = step
        self._file = path.open("ab")

    def append(self, row: Mapping[str, float | None]) -> None:
        """Adds one row; a column that is None or missing stays empty. Floats are written with all their digits.

        Raises:
            ValueError: The table has no such column.
        """
        unknown = sorted(row.keys() - set(self._columns))
        if unknown:
            raise ValueError(f"row: expected the columns {', '.join(self._columns)}, got also {', '.join(unknown)}")
        self._file.write(_line(_text(row.get(column)) for column in self._columns))
        self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def read_rows(path: Path, columns: Sequence[str]) -> Iterator[dict[str, str]]:
    """Yields the complete rows of a table as strings by column; a row cut off by a kill is left out.

    Raises:
        RunError: The file is not a table with these columns.
    """
    for line in _lines(path, columns):
        yield _fields(line, columns)


def read_thinned(
    path: Path, columns: Sequence[str], most_steps: int, *, block_bytes: int = 2**24
) -> list[dict[str, str]]:
    """Returns rows spread evenly over a table of any length, in order, the last one included.

    As many of the rows whose last column is filled are added, so that rare measurements are not missed. One pass over
    the bytes locates the lines, and only the chosen ones are parsed: a million lines take a fraction of a second.

    Args:
        path: A table of `CsvLog`.
        columns: Its columns.
        most_steps: The most steps to take evenly; of each, all rows.
        block_bytes: How much of the file to hold at a time.

    Raises:
        RunError: The file is not a table with these columns.
    """
    with _open(path) as file:
        _check_header(path, file.readline(_MOST_LINE_BYTES), columns)
        starts, has_last = _find_lines(file, block_bytes)
        num_rows = len(has_last)
        rows_per_step = _rows_of_first_step(file, int(starts[0]), columns)
        steps = _spread(np.arange(0, num_rows, rows_per_step), most_steps)
        chosen = np.concatenate(
            ((steps[:, None] + np.arange(rows_per_step)).ravel(), _spread(has_last.nonzero()[0], most_steps))
        )
        rows = []
        for number in np.unique(chosen[chosen < num_rows]):
            file.seek(starts[number])
            line = file.readline(_MOST_LINE_BYTES)
            if _is_row(line, columns):
                rows.append(_fields(line, columns))
    return rows


def _find_lines(file: BinaryIO, block_bytes: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the starts of the lines after the header and the end of the last one, and which have a last field."""
    ends, has_last = [np.array([file.tell()])], []
    place, before = file.tell(), np.frombuffer(b"\n\n", np.uint8)
    while block := file.read(block_bytes):
        # With two bytes of the previous block: the field before a line's end may lie there.
        seen = np.concatenate((before, np.frombuffer(block, np.uint8)))
        newlines = (seen[2:] == ord("\n")).nonzero()[0]
        ends.append(place + newlines + 1)
        has_last.append(seen[newlines] != ord(","))
        place, before = place + len(block), seen[-2:]
    return np.concatenate(ends), np.concatenate(has_last) if has_last else np.zeros(0, dtype=bool)


def _rows_of_first_step(file: BinaryIO, start: int, columns: Sequence[str]) -> int:
    """Returns the number of rows per step, at least 1; a log writes the same number at every step."""
    file.seek(start)
    first, count = b"", 0
    for line in _bounded_lines(file):
        step = line.partition(b",")[0]
        if not _is_row(line, columns) or (count and step != first):
            break
        first, count = step, count + 1
    return max(1, count)


def _spread(numbers: np.ndarray, most: int) -> np.ndarray:
    if len(numbers) <= most:
        return numbers
    return numbers[np.linspace(0, len(numbers) - 1, most).round().astype(np.int64)]


def _line(fields: Iterable[str]) -> bytes:
    return ",".join(fields).encode() + b"\r\n"


def _check_header(path: Path, line: bytes, columns: Sequence[str]) -> None:
    if line.rstrip(b"\r\n") != _line(columns).rstrip(b"\r\n"):
        raise RunError(
            f"{path}: line 1: expected the columns {', '.join(columns)}, got {line[:80].decode(errors='replace')!r}; "
            "move the file away"
        )


def _lines_with_added(path: Path, columns: Sequence[str], added: Set[str]) -> Iterator[bytes]:
    """Yields the lines of the complete rows, with empty fields for added columns that the table lacks."""
    with _open(path) as file:
        header = file.readline(_MOST_LINE_BYTES).rstrip(b"\r\n")
    present = header.decode(errors="replace").split(",")
    earlier = [column for column in columns if column in present or column not in added]
    if earlier == list(columns) or header != _line(earlier).rstrip(b"\r\n"):
        yield from _lines(path, columns)
        return
    for row in read_rows(path, earlier):
        yield _line(row.get(column, "") for column in columns)


def _lines(path: Path, columns: Sequence[str]) -> Iterator[bytes]:
    """Yields the lines of the complete rows."""
    with _open(path) as file:
        _check_header(path, file.readline(_MOST_LINE_BYTES), columns)
        yield from (line for line in _bounded_lines(file) if _is_row(line, columns))


def _open(path: Path) -> BinaryIO:
    try:
        return open_regular(path, max_bytes=MOST_BYTES)
    except OSError as error:
        raise RunError(f"{path}: {error.strerror}; move the file away") from None


def _bounded_lines(file: BinaryIO) -> Iterator[bytes]:
    """Yields the lines of a file from its place on; one that is longer than any row comes in pieces."""
    return iter(lambda: file.readline(_MOST_LINE_BYTES), b"")


def _is_row(line: bytes, columns: Sequence[str]) -> bool:
    return line.endswith(b"\n") and line.count(b",") == len(columns) - 1 and line.partition(b",")[0].isdigit()


def _fields(line: bytes, columns: Sequence[str]) -> dict[str, str]:
    return dict(zip(columns, line.rstrip(b"\r\n").decode(errors="replace").split(","), strict=True))


def _text(value: float | None) -> str:
    if value is None:
        return ""
    return str(value) if isinstance(value, int) else repr(float(value))
