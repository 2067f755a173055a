"""From files of any format to records: one at a time, or a whole piece as columns."""

import dataclasses
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from protlm.data import compiled
from protlm.data.parsing import compiled_fasta, fasta, flatfile, uniprot_xml, uniref_xml
from protlm.data.parsing.faults import ANNOTATION, Faults, is_entry
from protlm.data.parsing.marks import without_marks
from protlm.data.parsing.record_table import RecordTable, table_of
from protlm.data.parsing.sources import SourceBlocks
from protlm.data.parsing.text_pieces import TextPiece, cut_into_pieces
from protlm.data.records import MAX_RECORD_BYTES, OnBadRecord, Record
from protlm.errors import RecordError
from protlm.runtime.progress import Advance, no_advance

# Small, so that the first record of a large file is available at once.
_READ_PIECE_BYTES = 1 << 20
_ENTRY_START = re.compile(rb"<entry[\s>]")
_ENTRY_END = b"</entry>"
_ROOT_END = re.compile(rb"</(?:uniprot|UniRef(?:100|90|50)?)\s*>")
_NO_RECORDS = "no records: expected protein FASTA, a line `>id …` and lines of residues"


@dataclass(frozen=True, slots=True)
class ParsedPiece:
    """The content of a piece of text; lines are counted from 1 at the start of the piece.

    Attributes:
        table: Its good records.
        faults: Its records and lines that could not be used, in order.
        num_lines: Number of line ends in the piece.
    """

    table: RecordTable
    faults: Faults
    num_lines: int


@dataclass(frozen=True, slots=True)
class Source:
    """A file that was read to its end: its base name, and the sha256 of its bytes on disk."""

    name: str
    sha256: str


class RecordReader:
    """Iterates once over the records of some files, in order, and counts repairs and rejects.

    Memory is bounded by a few blocks and the largest single record.

    Attributes:
        repairs: Letters repaired, by the rules of `vocabulary.REPAIRS`.
        rejects: Records left out, by reason: bad ones if `on_bad_record="skip"`, and rows of an alignment that are no
            proteins.
        sources: The files read to their end so far.
    """

    def __init__(
        self,
        paths: Sequence[str | Path],
        *,
        on_bad_record: OnBadRecord = "error",
        advance: Advance = no_advance,
    ) -> None:
        """Prepares to read; no file is opened yet.

        Args:
            paths: Protein files; format and compression are recognised by their content, `-` is the standard input.
            on_bad_record: Raise the error of a bad record, or count it in `rejects` and go on.
            advance: Called with the number of bytes of each block read from disk.
        """
        if on_bad_record not in get_args(OnBadRecord):
            raise ValueError(f"on_bad_record: expected one of {get_args(OnBadRecord)}, got {on_bad_record!r}")
        self.repairs: Counter[str] = Counter()
        self.rejects: Counter[str] = Counter()
        self.sources: list[Source] = []
        self._on_bad_record = on_bad_record
        self._advance = advance
        self._records = (record for path in paths for record in self._read(path))

    def __iter__(self) -> Iterator[Record]:
        return self._records

    def _read(self, path: str | Path) -> Iterator[Record]:
        source = SourceBlocks(path, advance=self._advance)
        num_lines = num_entries = 0
        for piece in cut_into_pieces(path, source, piece_bytes=_READ_PIECE_BYTES):
            text = without_marks(piece.text, self.repairs)
            for record in records_in(path, piece, text, self.repairs):
                if isinstance(record, RecordError):
                    num_entries += is_entry(record)
                    self._reject(record.moved(num_lines))
                else:
                    num_entries += 1
                    yield _moved_record(record, num_lines)
            num_lines += count_lines(piece, text)
        if not num_entries:
            raise no_records(path, num_lines)
        self.sources.append(Source(source.name, source.sha256))

    def _reject(self, error: RecordError) -> None:
        if self._on_bad_record == "error" and error.reason != ANNOTATION:
            raise error
        self.rejects[error.reason] += 1


def read_records(*paths: str | Path, on_bad_record: OnBadRecord = "error") -> Iterator[Record]:
    """Yields the protein records of files, in order; `RecordReader` also counts and hashes.

    Args:
        paths: FASTA, A3M, UniProtKB flat files or XML, UniRef XML; plain, .gz, .bz2, .xz or .zst, recognised by their
            content; `-` is the standard input.
        on_bad_record: Raise the error of a bad record, or leave it out.

    Raises:
        RecordError: A record that cannot be used, with its file and line; a file without records.
        ProtlmError: A damaged compressed file, or one of another kind.
    """
    return iter(RecordReader(paths, on_bad_record=on_bad_record))


def parse_piece(path: str | Path, piece: TextPiece) -> ParsedPiece:
    """Returns a piece of text as columns: FASTA by the compiled parser where it was built, other formats in Python."""
    repairs: Counter[str] = Counter()
    text = without_marks(piece.text, repairs)
    if piece.format == "fasta" and not piece.oversized_lines and compiled.is_available():
        above, rest = fasta.split_head(text)
        if rest:
            return _parse_compiled(path, above, rest, repairs)
    records: list[Record] = []
    faults = Faults()
    for record in records_in(path, piece, text, repairs):
        if isinstance(record, RecordError):
            faults.add(record)
        else:
            records.append(record)
    return ParsedPiece(table_of(records, +repairs), faults, count_lines(piece, text))


def _parse_compiled(path: str | Path, above: bytes, text: bytes, repairs: Counter[str]) -> ParsedPiece:
    table, bad_records = compiled_fasta.parse_fasta(text)
    num_above = above.count(b"\n")
    faults = Faults()
    if (fault := fasta.fault_above(path, above, repairs)) is not None:
        faults.add(fault)
    if bad_records:
        # Only the first needs words: all of them may be bad, and each shall cost no more than a good one.
        first = bad_records[0]
        error = next(fasta.parse_fasta(path, text[first.start : first.end], Counter()))
        assert isinstance(error, RecordError)
        lines = bad_records.lines + num_above
        reasons, names = bad_records.reasons, compiled_fasta.REASONS
        faults.add_many(error.moved(num_above + first.line - 1), lines, bad_records.ids, reasons, names)
    # The lines up to the last record are counted already.
    last_line = max(table.lines[-1] if len(table) else 0, bad_records[-1].line if bad_records else 0)
    num_lines = num_above + int(last_line) - 1 + text.count(b"\n", text.rfind(b"\n>") + 1)
    table.lines[:] += num_above
    table = dataclasses.replace(table, repairs=dict(+(repairs + Counter(table.repairs))))
    return ParsedPiece(table, faults, num_lines)


def records_in(
    path: str | Path, piece: TextPiece, text: bytes, repairs: Counter[str]
) -> Iterator[Record | RecordError]:
    r"""Yields the records of a piece in order; in place of a record that cannot be used, its error.

    Args:
        path: The file, for messages.
        piece: The piece.
        text: Its text with `\n` line ends.
        repairs: The repaired letters are added to it.
    """
    if piece.oversized_lines:
        yield _oversized(path, text)
        return
    if piece.format in ("fasta", "a3m"):
        records = _fasta_records(path, text, repairs)
    elif piece.format == "flatfile":
        records = _flatfile_records(path, text, repairs)
    else:
        records = _xml_records(path, piece, text, repairs)
    for record in records:
        name = record.record_id if isinstance(record, RecordError) else record.id
        if piece.format == "a3m" and name in fasta.ANNOTATION_IDS:
            yield RecordError(path, record.line, f"{name} is no protein", reason=ANNOTATION, record_id=name)
        else:
            yield record


def _fasta_records(path: str | Path, text: bytes, repairs: Counter[str]) -> Iterator[Record | RecordError]:
    above, rest = fasta.split_head(text)
    if (fault := fasta.fault_above(path, above, repairs)) is not None:
        yield fault
    num_above = above.count(b"\n")
    if rest:
        for record in fasta.parse_fasta(path, rest, repairs):
            yield record.moved(num_above) if isinstance(record, RecordError) else _moved_record(record, num_above)


def _flatfile_records(path: str | Path, text: bytes, repairs: Counter[str]) -> Iterator[Record | RecordError]:
    start, line = 0, 1
    while start < len(text):
        end = text.find(b"\n//\n", start) + 4
        if end < 4:
            # The last entry may lack the end of its last line.
            end = len(text)
        entry = text[start:end]
        stripped = entry.lstrip()
        if stripped:
            yield from _entry(flatfile.parse_entry, path, stripped, line + _lines_before(entry, stripped), repairs)
        line += entry.count(b"\n")
        start = end


def _xml_records(
    path: str | Path, piece: TextPiece, text: bytes, repairs: Counter[str]
) -> Iterator[Record | RecordError]:
    parse = uniprot_xml.parse_entry if piece.format == "uniprot-xml" else uniref_xml.parse_entry
    place, line = 0, 1
    while (start := _ENTRY_START.search(text, place)) is not None:
        end = text.find(_ENTRY_END, start.start()) + len(_ENTRY_END)
        line += text.count(b"\n", place, start.start())
        if end < len(_ENTRY_END):
            yield RecordError(path, line, "the entry does not end: the file is cut short", reason="malformed_entry")
            return
        yield from _entry(parse, path, text[start.start() : end], line, repairs)
        line += text.count(b"\n", start.start(), end)
        place = end
    if piece.is_last and not _ROOT_END.search(text, place):
        line += text.count(b"\n", place)
        yield RecordError(path, line, "the XML does not end: the file is cut short", reason="malformed_entry")


def _entry(
    parse: Callable[[str | Path, bytes, int], tuple[Record, Counter[str]]],
    path: str | Path,
    text: bytes,
    line: int,
    repairs: Counter[str],
) -> Iterator[Record | RecordError]:
    try:
        if len(text) > MAX_RECORD_BYTES:
            raise fasta.too_long(path, line, "")
        record, made = parse(path, text, line)
    except RecordError as error:
        yield error
    else:
        repairs.update(made)
        yield record


def no_records(path: str | Path, num_lines: int) -> RecordError:
    """Returns the error of a file without any record, good or bad."""
    return RecordError(path, max(num_lines, 1), _NO_RECORDS)


def count_lines(piece: TextPiece, text: bytes) -> int:
    r"""Returns the number of line ends of a piece; `text` is its text with `\n` line ends."""
    return piece.oversized_lines or text.count(b"\n")


def _moved_record(record: Record, num_lines: int) -> Record:
    return dataclasses.replace(record, line=record.line + num_lines) if num_lines else record


def _oversized(path: str | Path, text: bytes) -> RecordError:
    words = text.lstrip(b">").split(None, 1)
    return fasta.too_long(path, 1, words[0].decode("utf-8", "replace") if words and text.startswith(b">") else "")


def _lines_before(entry: bytes, stripped: bytes) -> int:
    return entry[: len(entry) - len(stripped)].count(b"\n")
