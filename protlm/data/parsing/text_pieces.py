"""Pieces of whole records, to be parsed independently: hides where the text of each format may be cut."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from protlm.data.parsing import fasta
from protlm.data.parsing.marks import BYTE_ORDER_MARK
from protlm.data.parsing.sources import sniff_format
from protlm.data.parsing.xml_text import check_prolog
from protlm.data.records import MAX_RECORD_BYTES, Format
from protlm.errors import ProtlmError

PIECE_BYTES = 8 << 20
"""Small enough that the allocator reuses the memory of one piece for the next."""

_HEAD_BYTES = 1 << 16
_LONGEST_MARK = 16


@dataclass(frozen=True, slots=True)
class TextPiece:
    """The text of some whole records of a file.

    Attributes:
        format: Format of the file.
        text: The text, with the line ends of the file.
        start: Offset of its first byte in the uncompressed file.
        is_first: Whether the file begins with it.
        is_last: Whether the file ends with it.
        oversized_lines: 0, except for a single record that is too long: its number of lines; `text` is its beginning.
    """

    format: Format
    text: bytes
    start: int
    is_first: bool
    is_last: bool
    oversized_lines: int = 0


def cut_into_pieces(
    path: str | Path, blocks: Iterable[bytes], *, piece_bytes: int = PIECE_BYTES
) -> Iterator[TextPiece]:
    """Yields the text of a file in pieces of whole records; a piece may be one record longer than `piece_bytes`.

    Memory is bounded by one piece and one record of `MAX_RECORD_BYTES`, however long the records of the file are.

    Args:
        path: The file, for messages.
        blocks: Its uncompressed text.
        piece_bytes: A piece of at least this size ends at the next end of a record.
    """
    remaining = iter(blocks)
    head = b""
    while len(head) < _HEAD_BYTES and (block := next(remaining, b"")):
        head += block
    cutter = _Cutter(_format_of(path, head), piece_bytes)
    held: TextPiece | None = None
    for text, oversized_lines in cutter.cut(head, remaining):
        if held is not None:
            yield held
        held = TextPiece(cutter.format, text, cutter.start, held is None, False, oversized_lines)
        cutter.start += cutter.size
    if held is not None:
        yield TextPiece(held.format, held.text, held.start, held.is_first, True, held.oversized_lines)


class _Cutter:
    def __init__(self, text_format: Format, piece_bytes: int) -> None:
        self.format = text_format
        self.start = 0
        self.size = 0
        self._last_end, self._first_end = _ENDS[text_format]
        self._piece_bytes = piece_bytes

    def cut(self, head: bytes, blocks: Iterator[bytes]) -> Iterator[tuple[bytes, int]]:
        """Yields texts of whole records, each with 0, or with the number of lines of a record cut to its beginning.

        At each yield `size` is the number of bytes that the text takes in its file.
        """
        pending, num_bytes = [head], len(head)
        limit = self._piece_bytes + MAX_RECORD_BYTES
        while True:
            end = self._last_end(pending[-1]) if num_bytes >= self._piece_bytes else 0
            if not end and num_bytes > limit:
                # The last end of a record may be in an earlier block.
                pending = [b"".join(pending)]
                end = self._last_end(pending[0])
                if not end:
                    text, lines, rest = self._drop(pending.pop(), blocks)
                    yield text, lines
                    pending, num_bytes = [rest], len(rest)
                    continue
            if end:
                pending, rest = [*pending[:-1], pending[-1][:end]], pending[-1][end:]
                self.size = num_bytes - len(rest)
                yield b"".join(pending), 0
                pending, num_bytes = [rest], len(rest)
                if num_bytes > limit:
                    continue
            if not (block := next(blocks, b"")):
                break
            pending.append(block)
            num_bytes += len(block)
        if num_bytes or not self.start:
            self.size = num_bytes
            yield b"".join(pending), 0

    def _drop(self, text: bytes, blocks: Iterator[bytes]) -> tuple[bytes, int, bytes]:
        """Skips the rest of a record that is too long; returns its beginning, its number of lines and the next text."""
        beginning, tail = text[:_HEAD_BYTES], text[-_LONGEST_MARK:]
        line_end = b"\n" if b"\n" in beginning or b"\r" not in beginning else b"\r"
        lines, self.size = text.count(line_end), len(text)
        while block := next(blocks, b""):
            # The mark of an end may be split between two blocks.
            end = self._first_end(tail + block) - len(tail)
            if end > 0:
                self.size += end
                return beginning, max(lines + block[:end].count(line_end), 1), block[end:]
            lines, self.size = lines + block.count(line_end), self.size + len(block)
            tail = (tail + block)[-_LONGEST_MARK:]
        return beginning, max(lines, 1), b""


def _format_of(path: str | Path, head: bytes) -> Format:
    head = head.removeprefix(BYTE_ORDER_MARK)
    if head.lstrip().startswith(b"<"):
        check_prolog(path, head)
    text_format = sniff_format(head, path)
    if text_format == "fasta" and (kind := fasta.refused_kind(head)):
        raise ProtlmError(f"{path}: {kind}")
    return "a3m" if text_format == "fasta" and fasta.is_a3m(head) else text_format


def _last_fasta_end(text: bytes) -> int:
    return text.rfind(b"\n>") + 1 or text.rfind(b"\r>") + 1


def _first_fasta_end(text: bytes) -> int:
    return text.find(b"\n>") + 1 or text.find(b"\r>") + 1


def _last_flatfile_end(text: bytes) -> int:
    return _after_line(text, text.rfind(b"\n//\n")) or _after_line(text, text.rfind(b"\n//\r"))


def _first_flatfile_end(text: bytes) -> int:
    return _after_line(text, text.find(b"\n//\n")) or _after_line(text, text.find(b"\n//\r"))


def _after_line(text: bytes, start: int) -> int:
    """Returns the offset after a line `//`; 0 if there is no such line."""
    return text.find(b"\n", start + 1) + 1 if start >= 0 else 0


def _last_entry_end(text: bytes) -> int:
    start = text.rfind(b"</entry>")
    return start + len(b"</entry>") if start >= 0 else 0


def _first_entry_end(text: bytes) -> int:
    start = text.find(b"</entry>")
    return start + len(b"</entry>") if start >= 0 else 0


_Ends = tuple[Callable[[bytes], int], Callable[[bytes], int]]
_ENDS: dict[Format, _Ends] = {
    "fasta": (_last_fasta_end, _first_fasta_end),
    "a3m": (_last_fasta_end, _first_fasta_end),
    "flatfile": (_last_flatfile_end, _first_flatfile_end),
    "uniprot-xml": (_last_entry_end, _first_entry_end),
    "uniref-xml": (_last_entry_end, _first_entry_end),
}
