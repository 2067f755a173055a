"""How protein records are written in files: formats, compression, line ends, headers, and what is wrong with a bad one.

A file is read once, in blocks of a few MiB that are cut at record starts; lines are only counted, and looked at one by
one when an error needs its exact place.
"""

import hashlib
import os
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal, get_args

from protlm import vocabulary
from protlm.errors import ProtlmError, RecordError

OnBadRecord = Literal["error", "skip"]

_RAW_BLOCK_BYTES = 1 << 20
_BLOCK_BYTES = 4 << 20
_GZIP_MAGIC = b"\x1f\x8b"
_GZIP_WINDOW_BITS = 31
_UTF8_MARK = b"\xef\xbb\xbf"
_UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")
# Nine digits always fit the int32 columns; whatever is longer is no cluster size and no taxon.
_CLUSTER_SIZE = re.compile(rb"(?:^|\s)n=(\d{1,9})(?!\S)")
_TAXON_ID = re.compile(rb"(?:^|\s)(?:TaxID|OX)=(\d{1,9})(?!\S)")
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
    """

    id: str
    description: str
    sequence: str
    cluster_size: int | None = None
    taxon_id: int | None = None
    line: int = 0


@dataclass(frozen=True, slots=True)
class Source:
    """A file that was read to its end: its base name, and the sha256 of its bytes as they lie on disk."""

    name: str
    sha256: str


class RecordReader:
    """Iterates once over the records of some files, in order, and counts what it had to repair or reject.

    Memory is bounded by a few blocks and the largest single record.

    Attributes:
        repairs: Letters repaired, by the rules of `vocabulary.REPAIRS`.
        rejects: Records skipped, by reason; only under `on_bad_record="skip"`.
        sources: The files read to their end so far.
    """

    def __init__(
        self,
        paths: Sequence[str | Path],
        *,
        on_bad_record: OnBadRecord = "error",
        progress: Callable[[int], object] | None = None,
    ) -> None:
        """Prepares to read; no file is opened yet.

        Args:
            paths: FASTA files, plain or gzip (told by their content).
            on_bad_record: Raise the error of a bad record, or count it in `rejects` and go on.
            progress: Called with the number of bytes of each block read from disk.
        """
        if on_bad_record not in get_args(OnBadRecord):
            raise ValueError(f"on_bad_record: expected one of {get_args(OnBadRecord)}, got {on_bad_record!r}")
        self.repairs: Counter[str] = Counter()
        self.rejects: Counter[str] = Counter()
        self.sources: list[Source] = []
        self._on_bad_record = on_bad_record
        self._progress = progress
        self._records = (record for path in paths for record in self._read(path))

    def __iter__(self) -> Iterator[Record]:
        return self._records

    def _read(self, path: str | Path) -> Iterator[Record]:
        digest = hashlib.sha256()
        with Path(path).open("rb") as file:
            blocks = _decompressed(path, self._raw_blocks(file, digest.update))
            line = 0
            for text in self._record_texts(path, _with_plain_line_ends(blocks)):
                if not text.startswith(b"\n>"):
                    line += text.count(b"\n")
                    continue
                # A text is "\n>record\n>record…"; its first part is what stands before the first "\n>": nothing.
                for part in text.split(b"\n>")[1:]:
                    line += 1
                    try:
                        yield self._parse(path, part, line)
                    except RecordError as error:
                        self._reject(error)
                    line += part.count(b"\n")
        # A file name may hold bytes that are no text.
        name = os.fsencode(Path(path).name).decode("utf-8", "backslashreplace")
        self.sources.append(Source(name, digest.hexdigest()))

    def _raw_blocks(self, file: BinaryIO, update_digest: Callable[[bytes], object]) -> Iterator[bytes]:
        while block := file.read(_RAW_BLOCK_BYTES):
            update_digest(block)
            if self._progress is not None:
                self._progress(len(block))
            yield block

    def _record_texts(self, path: str | Path, blocks: Iterator[bytes]) -> Iterator[bytes]:
        r"""Yields whole records, many at a time, each from its `\n>`; before them what is above the first."""
        pending: list[bytes] = []
        line, is_rejected = 0, False
        for block in blocks:
            if not pending:
                start = block.find(b"\n>")
                above, block = (block, b"") if start < 0 else (block[:start], block[start:])
                if above.strip() and not is_rejected:
                    self._reject(_fault_above_first_header(path, above, line))
                    is_rejected = True
                line += above.count(b"\n")
                yield above
            cut = block.rfind(b"\n>")
            if cut >= 0:
                whole, pending = b"".join((*pending, block[:cut])), [block[cut:]]
                yield whole
            elif block:
                pending.append(block)
        if not pending:
            raise RecordError(path, max(line, 1), "no records: expected FASTA, a line `>id …` and lines of residues")
        yield b"".join(pending)

    def _parse(self, path: str | Path, part: bytes, line: int) -> Record:
        header, _, body = part.partition(b"\n")
        words = header.split(None, 1)
        if not words:
            raise RecordError(path, line, "expected an id after `>`, got none", reason="empty_id")
        try:
            record_id = words[0].decode()
            description = words[1].rstrip().decode() if len(words) > 1 else ""
        except UnicodeDecodeError as error:
            message = f"the header of {_shown(words[0])} is not UTF-8 text; convert the file"
            raise RecordError(path, line, message, reason="header_not_utf8") from error
        try:
            residues, repairs = vocabulary.clean(body.replace(b"\n", b""))
        except vocabulary.IllegalLetterError as error:
            at, column = _place(body, error.offset)
            message = f"record {_shown(words[0])}: illegal character {error.letter!r} in column {column}"
            raise RecordError(path, line + at, message, reason="illegal_character") from error
        if not residues:
            message = f"record {_shown(words[0])} has no sequence"
            raise RecordError(path, line, message, reason="empty_sequence")
        if repairs:
            self.repairs.update(repairs)
        cluster_size = taxon_id = None
        if len(words) > 1 and b"=" in words[1]:
            cluster_size = _number(_CLUSTER_SIZE, words[1])
            taxon_id = _number(_TAXON_ID, words[1])
        return Record(record_id, description, residues.decode(), cluster_size, taxon_id, line)

    def _reject(self, error: RecordError) -> None:
        if self._on_bad_record == "error":
            raise error
        self.rejects[error.reason] += 1


def read_records(*paths: str | Path, on_bad_record: OnBadRecord = "error") -> Iterator[Record]:
    """Yields the protein records of FASTA files, plain or gzip, in order; `RecordReader` also counts and hashes.

    Args:
        paths: The files.
        on_bad_record: Raise the error of a bad record, or leave it out.

    Raises:
        RecordError: A record that cannot be used, with its file and line; a file without records.
        ProtlmError: A damaged .gz file.
    """
    return iter(RecordReader(paths, on_bad_record=on_bad_record))


class UniqueIds:
    """Makes ids unique: the n-th repeat of an id gets `#n`, n ≥ 2, the next free number if that one is taken.

    Keeps every id in memory, about 100 bytes each.
    """

    def __init__(self) -> None:
        self._next_number: dict[str, int] = {}

    def __call__(self, record_id: str) -> str:
        """Returns the id itself at its first use, a numbered one later."""
        number = self._next_number.get(record_id)
        unique = record_id
        if number is not None:
            while (unique := f"{record_id}#{number}") in self._next_number:
                number += 1
            self._next_number[record_id] = number + 1
        self._next_number[unique] = 2
        return unique


def _decompressed(path: str | Path, raw_blocks: Iterator[bytes]) -> Iterator[bytes]:
    first = next(raw_blocks, b"")
    if not first.startswith(_GZIP_MAGIC):
        yield first
        yield from raw_blocks
        return
    data, member = first, zlib.decompressobj(_GZIP_WINDOW_BITS)
    while True:
        try:
            # The bound keeps a small file that unpacks to gigabytes from doing so all at once.
            block = member.decompress(data, _BLOCK_BYTES)
        except zlib.error as error:
            raise ProtlmError(f"{path}: damaged gzip data ({error}); copy or download the file again") from error
        if block:
            yield block
        data = member.unused_data if member.eof else member.unconsumed_tail
        if member.eof:
            # Another member may follow, as in files put together with cat; zeros are padding.
            while not (data := data.lstrip(b"\0")):
                if not (data := next(raw_blocks, b"")):
                    return
            member = zlib.decompressobj(_GZIP_WINDOW_BITS)
        elif not data and len(block) < _BLOCK_BYTES and not (data := next(raw_blocks, b"")):
            raise ProtlmError(f"{path}: the gzip data end too early; copy or download the file again")


def _with_plain_line_ends(blocks: Iterator[bytes]) -> Iterator[bytes]:
    r"""Turns CRLF and CR into LF; makes every record start with `\n>`, and never across two blocks.

    For this the text gets one `\n` before its start, and no block but the last ends with one.
    """
    held_return, held_newline = b"", b"\n"
    for raw_block in blocks:
        block = held_return + raw_block if held_return else raw_block
        # The `\n` of a CRLF may be the first byte of the next block.
        held_return = b"\r" if block.endswith(b"\r") else b""
        if held_return:
            block = block[:-1]
        if b"\r" in block:
            block = block.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        block = held_newline + block if held_newline else block
        held_newline = b"\n" if block.endswith(b"\n") else b""
        if held_newline:
            block = block[:-1]
        if block:
            yield block
    rest = held_newline + (b"\n" if held_return else b"")
    if rest:
        yield rest


def _fault_above_first_header(path: str | Path, above: bytes, line: int) -> RecordError:
    at = line + above[: len(above) - len(above.lstrip())].count(b"\n")
    text = above.lstrip()
    if text.startswith(_UTF8_MARK):
        return RecordError(path, at, "a UTF-8 byte order mark: save the file without", reason="byte_order_mark")
    if text.startswith(_UTF16_MARKS):
        return RecordError(path, at, "UTF-16 text: save the file as plain text", reason="text_above_first_header")
    shown = text.split(b"\n", 1)[0][:_SHOWN_ID_LETTERS].decode("ascii", "replace")
    message = f"expected FASTA, a line that starts with `>`, got {shown!r}"
    return RecordError(path, at, message, reason="text_above_first_header")


def _place(body: bytes, offset: int) -> tuple[int, int]:
    """Finds a letter: how many lines below the header, from 1, and its column, from 1; `offset` counts no line ends."""
    lines = body.split(b"\n")
    for number, text in enumerate(lines, start=1):
        if offset < len(text):
            return number, offset + 1
        offset -= len(text)
    raise AssertionError("an offset lies inside its sequence")


def _number(pattern: re.Pattern[bytes], description: bytes) -> int | None:
    found = pattern.search(description)
    return int(found[1]) if found else None


def _shown(record_id: bytes) -> str:
    text = record_id.decode("utf-8", "replace")
    return repr(text if len(text) <= _SHOWN_ID_LETTERS else text[:_SHOWN_ID_LETTERS] + "…")
