"""Inputs as plain text: hides files, folders, patterns and the standard input, and how the bytes are compressed."""

import glob
import hashlib
import os
import re
import stat
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

from protlm import files
from protlm.data.parsing.compression import compression_of, decompressed, gathered
from protlm.data.parsing.marks import BYTE_ORDER_MARK
from protlm.data.parsing.uniref_xml import UNIREF_ROOTS
from protlm.data.parsing.xml_text import root_name
from protlm.data.records import TextFormat
from protlm.errors import ProtlmError
from protlm.runtime.progress import Advance, no_advance

STDIN = "-"
"""The input that stands for the standard input."""

# Enough for every mark below; that of a tar archive comes last.
_MAGIC_BYTES = 512
_HEAD_BYTES = 1 << 16

# A FASTA file may begin with blank lines and, as A3M and old FASTA, with comments.
_FASTA_START = re.compile(rb"(?:\s|[#;][^\r\n]*[\r\n])*>")
_FASTA_RECORD = re.compile(rb"[\r\n]>[^\r\n]+[\r\n]+[A-Za-z]{3}")
_FASTA_NAME = re.compile(r"\.(?:fasta|fas|fa|faa|fsa|a3m|a2m)(?:\.[a-z0-9]+)?", re.IGNORECASE)
_UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")
_SHOWN_BYTES = 30
_UNREADABLE_KINDS = (
    (
        re.compile(rb"(?s)PK\x03\x04.{26}(?:\[Content_Types\]|_rels/|xl/|word/|mimetypeapplication/vnd\.oasis)"),
        "a spreadsheet or another Office file (.xlsx, .docx, .ods); write its sequences as FASTA",
    ),
    (re.compile(rb"\xd0\xcf\x11\xe0"), "an old Office file (.xls, .doc); write its sequences as FASTA"),
    (re.compile(rb"%PDF-"), "a PDF document; write its sequences as FASTA"),
    (re.compile(rb"\{\\rtf"), "a text with formatting (.rtf); save it as plain text"),
    (re.compile(rb"PK(?:\x03\x04|\x05\x06|\x07\x08)"), "a zip archive; unpack it and name the files that were in it"),
    (re.compile(rb"7z\xbc\xaf\x27\x1c"), "a 7z archive; unpack it and name the files that were in it"),
    (re.compile(rb"(?s).{257}ustar"), "a tar archive; unpack it and name the files that were in it"),
    (re.compile(rb"\x89HDF\r\n\x1a\n"), "an HDF5 file; expected protein sequences, not a dataset or embeddings"),
    (re.compile(rb"\x1f\x9d"), "a file of the old `compress` program; unpack it first"),
    (re.compile(rb"\x04\x22\x4d\x18"), "an lz4 file; unpack it first"),
)


@dataclass(frozen=True, slots=True)
class Expanded:
    """The files that inputs name.

    Attributes:
        paths: The files to read, in order; `STDIN` stays as it is.
        left_out: Files and folders in a named folder that are no protein files, each with the reason.
    """

    paths: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)


class SourceBlocks:
    """Iterates once over the uncompressed bytes of a file, in blocks of a few MiB at most.

    Memory is bounded, however far the file expands. A file that is written to in the meantime is an error at its end:
    what was read may be neither its old content nor its new one.

    Attributes:
        block_bytes: Read from disk at once, by all instances.
        feed_bytes: Fed to a decompressor at once, by all instances. It copies the bytes after a member, so files of
            many small members need this small.
        name: Base name of the file; bytes that are not UTF-8 are written as escapes.
        sha256: Hash of the bytes on disk, in hex; empty before the end is reached.
        is_plain: Whether the file is neither compressed nor a pipe, so that any stretch of it can be read by itself;
            set once the first block was read.
    """

    block_bytes: ClassVar[int] = 1 << 20
    feed_bytes: ClassVar[int] = 1 << 18

    def __init__(self, path: str | Path, *, advance: Advance = no_advance) -> None:
        """Prepares to read; the file is opened when iteration begins.

        Args:
            path: The file; `STDIN` is the standard input.
            advance: Called with the number of bytes of each block read from disk.
        """
        self.name = STDIN if str(path) == STDIN else files.as_text(Path(path).name)
        self.sha256 = ""
        self.is_plain = False
        self._path = path
        self._advance = advance

    def __iter__(self) -> Iterator[bytes]:
        digest = hashlib.sha256()
        try:
            with _open(self._path) as file:
                state = _state(file)
                yield from self._unpacked(self._raw_blocks(file, digest.update), is_pipe=not file.seekable())
                if _state(file) != state:
                    raise ProtlmError(
                        f"{self._path}: changed while it was read; wait until it is complete, and start again"
                    )
        except OSError as error:
            raise _unreadable(self._path, error) from error
        self.sha256 = digest.hexdigest()

    def _unpacked(self, raw_blocks: Iterator[bytes], *, is_pipe: bool) -> Iterator[bytes]:
        """Yields the uncompressed bytes of a file, after checking that they are of a kind that is read."""
        first = _beginning(raw_blocks)
        if message := _unreadable_kind(first):
            raise ProtlmError(f"{self._path}: {message}")
        compression = compression_of(first)
        if compression is None:
            self.is_plain = not is_pipe
            if first:
                yield first
            yield from raw_blocks
            return
        blocks = gathered(decompressed(self._path, compression, _small_blocks(first, raw_blocks, self.feed_bytes)))
        first = _beginning(blocks)
        if message := _unreadable_kind(first):
            raise ProtlmError(f"{self._path}: {compression.name} data that hold {message}")
        if inner := compression_of(first):
            raise ProtlmError(f"{self._path}: {inner.name} data inside {compression.name} data; unpack the file once")
        if first:
            yield first
        yield from blocks

    def _raw_blocks(self, file: BinaryIO, update_digest: Callable[[bytes], object]) -> Iterator[bytes]:
        while block := file.read(self.block_bytes):
            update_digest(block)
            self._advance(len(block))
            yield block


def expand_inputs(inputs: Sequence[str | Path]) -> Expanded:
    """Returns the files that inputs name.

    Args:
        inputs: Files, pipes, folders (the files directly in each by name, without hidden ones), patterns such as
            `*.fasta` (their matches by name) or `STDIN`.

    Raises:
        ProtlmError: An input that does not exist, is a dangling link or cannot be read; a folder without protein files;
            a pattern without matches.
    """
    expanded = Expanded()
    for path in map(str, inputs):
        if path == STDIN:
            expanded.paths.append(path)
        elif os.path.lexists(path):
            _expand(path, expanded)
        elif glob.has_magic(path):
            if not (matches := sorted(glob.glob(path, recursive=True))):
                raise ProtlmError(f"{path}: no file matches this pattern; check its folder and its spelling")
            for match in matches:
                _expand(match, expanded)
        else:
            raise ProtlmError(f"{path}: no such file; check the spelling")
    return expanded


def _expand(path: str, expanded: Expanded) -> None:
    mode = _mode(path)
    if stat.S_ISDIR(mode):
        _expand_folder(path, expanded)
    elif stat.S_ISREG(mode) or stat.S_ISFIFO(mode):
        expanded.paths.append(path)
    else:
        raise ProtlmError(f"{path}: a device or a socket; expected a file, a folder, a pipe or `-`")


def _expand_folder(folder: str, expanded: Expanded) -> None:
    try:
        names = sorted(name for name in os.listdir(folder) if not name.startswith("."))
    except OSError as error:
        raise _unreadable(folder, error) from error
    if not names:
        raise ProtlmError(f"{folder}: an empty folder; expected protein files in it")
    num_before = len(expanded.paths)
    for path in (os.path.join(folder, name) for name in names):
        reason = _reason_to_leave_out(path, _mode(path))
        if reason is None:
            expanded.paths.append(path)
        else:
            expanded.left_out.append(f"{path}: {reason}")
    if len(expanded.paths) == num_before:
        raise ProtlmError(
            f"{folder}: a folder without protein files; expected FASTA, UniProtKB or UniRef files in it, "
            f"got {expanded.left_out[-1].removeprefix(os.path.join(folder, ''))}"
        )


def _mode(path: str) -> int:
    try:
        return os.stat(path).st_mode
    except FileNotFoundError as error:
        if os.path.islink(path):
            target = os.readlink(path)
            raise ProtlmError(
                f"{path}: a link to {target}, which does not exist; correct or remove the link"
            ) from error
        raise ProtlmError(f"{path}: no such file; check the spelling") from error
    except OSError as error:
        raise _unreadable(path, error) from error


def _reason_to_leave_out(path: str, mode: int) -> str | None:
    """Returns why an entry of a folder is not read; None if it is, be it only for the error that reading it gives."""
    if not stat.S_ISREG(mode):
        return "a folder in a folder" if stat.S_ISDIR(mode) else "no file"
    reason, head = _judge(path)
    if reason is None or _FASTA_NAME.fullmatch("".join(Path(path).suffixes[-2:])) or _FASTA_RECORD.search(head):
        return None
    return reason


def is_protein_file(path: str | Path) -> bool:
    """Returns whether a file begins like one of the formats that protlm reads.

    Damaged compressed data count as one, so that they are reported instead of being passed over.

    Raises:
        ProtlmError: The file cannot be opened.
    """
    return _judge(path)[0] is None


def is_compressed(path: str | Path) -> bool:
    """Returns whether a file is compressed, by its first bytes.

    Raises:
        ProtlmError: The file cannot be opened.
    """
    try:
        with _open(path) as file:
            return compression_of(file.read(_HEAD_BYTES)) is not None
    except OSError as error:
        raise _unreadable(path, error) from error


def _judge(path: str | Path) -> tuple[str | None, bytes]:
    """Returns why a file is none with proteins, None if it begins like one, and the beginning of its text."""
    try:
        with _open(path) as file:
            raw = file.read(_HEAD_BYTES)
    except OSError as error:
        raise _unreadable(path, error) from error
    if message := _unreadable_kind(raw):
        return message, b""
    compression = compression_of(raw)
    head = raw
    if compression is not None:
        try:
            head = compression.new().decompress(raw, _HEAD_BYTES)
        except compression.error:
            return None, b""
    if message := _unreadable_kind(head):
        return message, b""
    try:
        text_format = sniff_format(head)
    except ProtlmError as error:
        return str(error), head
    if head.startswith(_UTF16_MARKS):
        return "UTF-16 text", b"\n" + head.replace(b"\0", b"").removeprefix(head[:2])
    if text_format != "fasta" or _FASTA_START.match(head.removeprefix(BYTE_ORDER_MARK)):
        return None, head
    kind = "an empty file" if not head.strip() else "a binary file" if b"\0" in head else ""
    return kind or f"text that begins with {head.split()[0][:_SHOWN_BYTES].decode('utf-8', 'replace')!r}", head


def sniff_format(head: bytes, path: str | Path | None = None) -> TextFormat:
    """Returns the format of a sequence file by its first bytes.

    A file of no known format is taken for FASTA, and the FASTA parser then reports the line at fault.

    Args:
        head: The first 64 KiB of the text.
        path: The file, for messages.

    Raises:
        ProtlmError: XML with another root element than those that protlm reads.
    """
    text = head.removeprefix(BYTE_ORDER_MARK).lstrip()
    if text.startswith(b"ID   "):
        return "flatfile"
    if not text.startswith(b"<"):
        return "fasta"
    root = root_name(text)
    if root == "uniprot":
        return "uniprot-xml"
    if root in UNIREF_ROOTS:
        return "uniref-xml"
    where = f"{path}: " if path is not None else ""
    if root.lower() == "html":
        raise ProtlmError(f"{where}a web page (HTML), with the root element <{root}>; download the file again")
    got = f"XML with the root element <{root}>" if root else "text that begins with `<` and has no XML root element"
    raise ProtlmError(f"{where}{got}; expected FASTA, or XML of UniProtKB (<uniprot>) or UniRef (<UniRef>)")


def _open(path: str | Path) -> Any:
    if str(path) == STDIN:
        if sys.stdin is None:
            raise ProtlmError(f"{STDIN}: there is no standard input; name a file")
        return nullcontext(sys.stdin.buffer)
    return open(path, "rb")


def _state(file: BinaryIO) -> tuple[int, int] | None:
    """Returns the size of an open file and the time of its last change, None for what is no file on disk."""
    try:
        status = os.fstat(file.fileno())
    except OSError:
        return None
    return (status.st_size, status.st_mtime_ns) if stat.S_ISREG(status.st_mode) else None


def _unreadable(path: str | Path, error: OSError) -> ProtlmError:
    reason = {
        FileNotFoundError: "no such file; check the spelling",
        IsADirectoryError: "a folder; expected a file",
        PermissionError: "no permission to read it; change that, or copy the file",
    }.get(type(error), f"cannot be read: {error.strerror or error}")
    return ProtlmError(f"{path}: {reason}")


def _unreadable_kind(beginning: bytes) -> str | None:
    return next((message for magic, message in _UNREADABLE_KINDS if magic.match(beginning)), None)


def _beginning(blocks: Iterator[bytes]) -> bytes:
    """Returns the first block, joined with the next ones while it is too short to hold every mark."""
    first = b""
    while len(first) < _MAGIC_BYTES and (block := next(blocks, b"")):
        first = first + block if first else block
    return first


def _small_blocks(first: bytes, raw_blocks: Iterator[bytes], num_bytes: int) -> Iterator[bytes]:
    block = first
    while block:
        for start in range(0, len(block), num_bytes):
            yield block[start : start + num_bytes]
        block = next(raw_blocks, b"")
