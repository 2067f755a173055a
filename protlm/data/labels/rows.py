"""The formats of label files: TSV, such as that of MMseqs2, and CD-HIT's clusters; parsed in bounded memory."""

import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from protlm.data.parsing.sources import SourceBlocks
from protlm.data.records import shown
from protlm.data.splits import SPLIT_NAMES
from protlm.errors import ProtlmError, RecordError

CD_HIT_CLUSTER = b">Cluster"
"""Beginning of the line that opens a cluster of CD-HIT."""

_HEAD_BYTES = 1 << 16
_MAX_LINE_BYTES = 16 << 20
_TAB, _NEWLINE = b"\t\n"
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
"""Windows editors write it before a text; it stands before other lines where such files were joined."""
_MARKS = {
    b"\xff\xfe": "UTF-16 text: save the file as plain text",
    b"\xfe\xff": "UTF-16 text: save the file as plain text",
}
_ABOVE_ROWS = re.compile(rb"(?:\s|#[^\r\n]*(?:[\r\n]|$))*")
_CD_HIT_MEMBER = re.compile(rb"\d+\t\d+(?:aa|nt), >(.+)\.\.\. (\*|at .*)")
_BATCH_ROWS = 1 << 17


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows of a label file: the id and the label of each, and its line in the file, int64."""

    ids: Sequence[bytes]
    labels: Sequence[bytes]
    lines: np.ndarray


@dataclass(slots=True)
class Cluster:
    """A cluster: its name, its members, and the line of each."""

    name: bytes = b""
    ids: list[bytes] = field(default_factory=list)
    lines: list[int] = field(default_factory=list)


class LabelText:
    """The text of a label file, read once, without byte order marks.

    Attributes:
        path: The file.
        source: Its bytes.
        start: The beginning of its text from the first row on.
        num_marks: Byte order marks found so far.
    """

    def __init__(self, path: str | Path) -> None:
        """Opens a file and reads its beginning.

        Raises:
            ProtlmError: A file that is missing, damaged or no text.
        """
        self.path, self.source = path, SourceBlocks(path)
        blocks = iter(self.source)
        head = b""
        while len(head) < _HEAD_BYTES and (block := next(blocks, b"")):
            head += block
        self.num_marks = int(head.startswith(_BYTE_ORDER_MARK))
        head = head.removeprefix(_BYTE_ORDER_MARK)
        for mark, message in _MARKS.items():
            if head.startswith(mark):
                raise ProtlmError(f"{path}: {message}")
        if b"\0" in head:
            raise ProtlmError(f"{path}: a binary file; expected text with an id and its label on each line")
        above = _ABOVE_ROWS.match(head)
        assert above is not None
        self.start = head[above.end() :]
        self.blocks: Iterator[bytes] = itertools.chain([head], blocks)

    def whole_lines(self) -> Iterator[tuple[int, bytes]]:
        r"""Yields stretches of whole lines with `\n` line ends, each with the number of its first line."""
        line, pending = 1, b""
        for block in itertools.chain(self.blocks, [b""]):
            text = pending + block if block else pending + b"\n" if pending else b""
            # The `\n` of a CRLF may be the first byte of the next block.
            held = b"\r" if block and text.endswith(b"\r") else b""
            if b"\r" in text:
                text = text[: len(text) - len(held)].replace(b"\r\n", b"\n").replace(b"\r", b"\n")
            end = text.rfind(b"\n") + 1
            text, pending = text[:end], text[end:] + held
            if len(pending) > _MAX_LINE_BYTES:
                raise RecordError(self.path, line + text.count(b"\n"), f"a line of more than {_MAX_LINE_BYTES:,} bytes")
            if text:
                text = self._without_marks(text)
                _check_utf8(self.path, text, line)
                yield line, text
                line += text.count(b"\n")

    def _without_marks(self, text: bytes) -> bytes:
        """Returns whole lines without the marks before them, which are counted."""
        if _BYTE_ORDER_MARK not in text:
            return text
        self.num_marks += text.startswith(_BYTE_ORDER_MARK) + text.count(b"\n" + _BYTE_ORDER_MARK)
        return text.removeprefix(_BYTE_ORDER_MARK).replace(b"\n" + _BYTE_ORDER_MARK, b"\n")


def _check_utf8(path: str | Path, text: bytes, line: int) -> None:
    if not text.isascii():
        try:
            text.decode()
        except UnicodeDecodeError as error:
            at = line + text.count(b"\n", 0, error.start)
            raise RecordError(path, at, "this line is not UTF-8 text; convert the file") from error


def tsv_rows(text: LabelText, expected: str) -> Iterator[Rows]:
    """Yields rows of two fields, taking the first as the id."""
    for line, stretch in text.whole_lines():
        fields = stretch.replace(b"\n", b"\t").split(b"\t")
        if _are_pairs(stretch):
            yield Rows(fields[0:-1:2], fields[1::2], np.arange(line, line + len(fields) // 2))
            continue
        ids, labels, lines = [], [], []
        for number, row in enumerate(stretch[:-1].split(b"\n"), start=line):
            if row.startswith(b"#") or not row.strip():
                continue
            fields = row.split(b"\t")
            if len(fields) != 2 or not all(fields):
                message = f"expected `{expected}`, got {shown(row.decode())}"
                raise RecordError(text.path, number, message, reason="malformed_row")
            ids.append(fields[0])
            labels.append(fields[1])
            lines.append(number)
        yield Rows(ids, labels, np.array(lines, dtype=np.int64))


def _are_pairs(text: bytes) -> bool:
    """Returns whether every line has two fields and is no comment, so that lines need not be split one by one."""
    if text.startswith(b"#") or b"\n#" in text:
        return False
    letters = np.frombuffer(text, dtype=np.uint8)
    marks = np.flatnonzero((letters == _TAB) | (letters == _NEWLINE))
    if len(marks) % 2 or marks[0] == 0 or (np.diff(marks) == 1).any():
        return False
    return bool((letters[marks[0::2]] == _TAB).all() and (letters[marks[1::2]] == _NEWLINE).all())


def split_rows(text: LabelText) -> Iterator[Rows]:
    """Yields rows of an id and a split."""
    allowed = {split.encode() for split in SPLIT_NAMES}
    for rows in tsv_rows(text, "id<TAB>split"):
        if not allowed.issuperset(rows.labels):
            place = next(place for place, split in enumerate(rows.labels) if split not in allowed)
            message = f"expected one of {', '.join(SPLIT_NAMES)}, got {shown(rows.labels[place].decode())}"
            raise RecordError(text.path, int(rows.lines[place]), message, reason="malformed_row")
        yield rows


def cd_hit_clusters(text: LabelText) -> Iterator[Cluster]:
    """Yields the clusters of a .clstr file, each named by its representative."""
    cluster = Cluster()
    for line, stretch in text.whole_lines():
        for number, row in enumerate(stretch[:-1].split(b"\n"), start=line):
            if row.startswith(CD_HIT_CLUSTER):
                if cluster.lines:
                    yield _named(text.path, cluster)
                cluster = Cluster()
            elif member := _CD_HIT_MEMBER.fullmatch(row):
                cluster.ids.append(member[1])
                cluster.lines.append(number)
                if member[2] == b"*":
                    cluster.name = member[1]
            elif row.strip() and not row.startswith(b"#"):
                message = f"expected a line of CD-HIT such as `0 120aa, >id... *`, got {shown(row.decode())}"
                raise RecordError(text.path, number, message, reason="malformed_row")
    if cluster.lines:
        yield _named(text.path, cluster)


def _named(path: str | Path, cluster: Cluster) -> Cluster:
    if not cluster.name:
        message = "a cluster without a representative, which CD-HIT marks by `*`; make the file again"
        raise RecordError(path, cluster.lines[-1], message, reason="malformed_row")
    return cluster


def rows_of(clusters: Iterable[Cluster]) -> Iterator[Rows]:
    """Yields the members of clusters as rows, those of many clusters at a time."""
    ids: list[bytes] = []
    labels: list[bytes] = []
    lines: list[int] = []
    for cluster in clusters:
        ids += cluster.ids
        labels += [cluster.name] * len(cluster.ids)
        lines += cluster.lines
        if len(ids) > _BATCH_ROWS:
            yield Rows(ids, labels, np.array(lines, dtype=np.int64))
            ids, labels, lines = [], [], []
    yield Rows(ids, labels, np.array(lines, dtype=np.int64))
