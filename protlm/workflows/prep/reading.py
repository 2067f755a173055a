"""From files to finished pieces, the first half of prep: workers share the files and pieces, and none is made twice.

A file is unpacked and hashed from its beginning to its end, so that is one worker's task, and several files are
unpacked at once. Of a plain file that is larger than the share of a worker, this process only hashes the text, and the
workers read it by pieces.
"""

import contextlib
import dataclasses
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash

from protlm.data.building.pieces import Piece, PieceFile, open_piece_file, write_piece
from protlm.data.building.selection import NO_SPLIT
from protlm.data.labels.labels import Labels
from protlm.data.nucleotides import refusal
from protlm.data.parsing import reader
from protlm.data.parsing.record_table import RecordTable
from protlm.data.parsing.sources import STDIN, SourceBlocks, is_compressed
from protlm.data.parsing.text_pieces import PIECE_BYTES, TextPiece, cut_into_pieces
from protlm.data.records import NUCLEOTIDES, UNKNOWN, Format, Nucleotides, OnBadRecord
from protlm.data.splits import SPLIT_NAMES
from protlm.errors import ProtlmError, RecordError
from protlm.runtime.local_workers import LocalWorkers
from protlm.runtime.progress import Advance
from protlm.runtime.workers import Workers, check_wanted
from protlm.workflows.prep.folder import FinishedSource, InputFile, PrepFolder, pieces_hash_of

_NOTE_SECONDS = 0.5
"""Time between two notes of a worker on how much of a file it has read."""


@dataclass(frozen=True, slots=True)
class LabelFiles:
    """The labels of records by id, from the files that the user gave."""

    clusters: Labels | None = None
    families: Labels | None = None
    splits: Labels | None = None


@dataclass(frozen=True, slots=True)
class FaultRules:
    """Which records end the command."""

    on_bad_record: OnBadRecord
    nucleotides: Nucleotides


@dataclass(frozen=True, slots=True)
class PrepWork:
    """What all tasks of prep share.

    Attributes:
        folder: The folder of the run, with paths as the workers see them.
        labels: The labels from files.
        rules: Which records end the command.
    """

    folder: PrepFolder
    labels: LabelFiles
    rules: FaultRules


@dataclass(frozen=True, slots=True)
class PieceTask:
    """A piece of text to read.

    Attributes:
        path_of_source: The file that it comes from.
        number: The number of that file.
        index: The number of the piece in it.
        text: The piece; its text is empty if the worker is to read it from the file itself.
        num_bytes: Size of its text.
        text_hash: Hash of the piece.
    """

    path_of_source: str
    number: int
    index: int
    text: TextPiece
    num_bytes: int
    text_hash: str

    @property
    def title(self) -> str:
        """The file and the place of the piece."""
        return f"{self.path_of_source}, from byte {self.text.start:,} on"


@dataclass(frozen=True, slots=True)
class SourceTask:
    """A file to read to its end.

    Attributes:
        title: Its path.
        number: Its number.
    """

    title: str
    number: int


def read_sources(
    work: PrepWork, inputs: Sequence[InputFile], numbers: Sequence[int], workers: Workers, advance: Advance
) -> None:
    """Reads files to their ends, and writes their pieces into the folder, except those that are there already.

    Args:
        work: What the tasks share.
        inputs: All files.
        numbers: The numbers of those to read.
        workers: The workers.
        advance: Called with the bytes that were read.

    Raises:
        RecordError: A bad record or a nucleic acid, unless it is skipped or kept; a file without records.
        ProtlmError: A damaged file.
        OSError: A file cannot be read, or the disk is full.
    """
    share = sum(inputs[number].num_bytes for number in numbers) / workers.number
    whole = [] if workers.are_here else [number for number in numbers if _is_one_task(inputs[number], share)]
    notes = _ReadingNotes(work.folder.reading_path, whole, advance)
    tasks = (SourceTask(inputs[number].path, number) for number in whole)
    read = workers.in_order(_read_alone, tasks, ahead=len(whole), meanwhile=notes.look)
    for number, (source, num_bytes) in zip(whole, read, strict=True):
        work.folder.know_finished(number, source)
        notes.finish(number, num_bytes)
    for number in sorted(set(numbers).difference(whole)):
        _read_source(work, number, workers, advance)


def _is_one_task(input_file: InputFile, share: float) -> bool:
    """Returns whether one worker reads a file by itself; `share` is the bytes of all files for each worker."""
    if input_file.state is None:
        return False
    return input_file.num_bytes <= share or is_compressed(input_file.path)


def _read_alone(work: PrepWork, task: SourceTask) -> tuple[FinishedSource, int]:
    """Reads a file in the process of a worker, and returns its record and its bytes on disk."""
    path = work.folder.reading_path / f"{task.number:05d}"
    note = _ReadingNote(path)
    try:
        with LocalWorkers(1, work) as workers:
            source = _read_source(work, task.number, workers, note.advance)
    finally:
        path.unlink(missing_ok=True)
    return source, note.num_bytes


class _ReadingNote:
    """A file in which a worker notes how many bytes it has read of a file."""

    def __init__(self, path: Path) -> None:
        self.num_bytes = 0
        self._path, self._written = path, time.monotonic()

    def advance(self, done: int) -> None:
        check_wanted()
        self.num_bytes += done
        if time.monotonic() > self._written + _NOTE_SECONDS:
            self._written = time.monotonic()
            self._path.write_text(str(self.num_bytes), encoding="ascii")


class _ReadingNotes:
    """The notes of all workers on some files."""

    def __init__(self, folder: Path, numbers: Sequence[int], advance: Advance) -> None:
        self._folder, self._advance = folder, advance
        # Other parts have notes there too.
        self._names = {f"{number:05d}" for number in numbers}
        self._told: dict[int, int] = {}
        self._looked = time.monotonic()

    def look(self) -> None:
        """Advances the progress by the bytes that the workers have noted."""
        if time.monotonic() < self._looked + _NOTE_SECONDS:
            return
        self._looked = time.monotonic()
        for name in self._names.intersection(os.listdir(self._folder)):
            # One that is removed, or half written, in this moment.
            with contextlib.suppress(OSError, ValueError):
                self._tell(int(name), int((self._folder / name).read_text(encoding="ascii")))

    def finish(self, number: int, num_bytes: int) -> None:
        """Tells that a file was read to its end."""
        self._tell(number, num_bytes)

    def _tell(self, number: int, num_bytes: int) -> None:
        # A file whose worker was lost is read again from its beginning.
        if num_bytes > self._told.get(number, 0):
            self._advance(num_bytes - self._told.get(number, 0))
            self._told[number] = num_bytes


def _read_source(work: PrepWork, number: int, workers: Workers, advance: Advance) -> FinishedSource:
    input_file = work.folder.inputs[number]
    # Before reading, so that a change in the meantime is noticed.
    state = input_file.state
    source = SourceBlocks(input_file.path, advance=advance)
    formats: list[Format] = []
    text_hashes: list[str] = []
    num_records = num_lines = num_entries = 0
    for piece in workers.in_order(make_piece, _tasks(input_file, number, source, workers, formats)):
        raise_first_fault(piece, num_lines, work.rules)
        text_hashes.append(piece.text_hash)
        num_records += piece.num_records
        num_lines += piece.num_lines
        num_entries += piece.num_entries
    if not num_entries:
        raise reader.no_records(input_file.path, num_lines)
    finished = FinishedSource(
        name=source.name, sha256=source.sha256, format=formats[0], num_pieces=len(text_hashes),
        pieces_hash=pieces_hash_of(text_hashes), num_records=num_records, state=state,
    )  # fmt: skip
    work.folder.finish_source(number, finished)
    return finished


def raise_first_fault(piece: PieceFile, num_lines: int, rules: FaultRules) -> None:
    """Raises the error of the first record of a piece that ends the command.

    Args:
        piece: The piece.
        num_lines: Lines of its file before it.
        rules: What ends the command.
    """
    errors = []
    if rules.on_bad_record == "error" and piece.first_fault is not None:
        number, message = piece.first_fault
        line, record_id, reason = Piece(piece.path).fault(number)
        errors.append(RecordError(piece.path_of_source, line, message, reason=reason, record_id=record_id))
    if rules.nucleotides == "error" and piece.num_nucleotides:
        columns = Piece(piece.path)
        place = int(columns["nucleotides"][0])
        line, record_id = int(columns["lines"][place]), columns.strings("ids")[place]
        errors.append(
            RecordError(piece.path_of_source, line, refusal(record_id), reason=NUCLEOTIDES, record_id=record_id)
        )
    if errors:
        raise min(errors, key=lambda error: error.line).moved(num_lines)


def _tasks(
    input_file: InputFile, number: int, source: SourceBlocks, workers: Workers, formats: list[Format]
) -> Iterator[PieceTask]:
    for index, piece in enumerate(cut_into_pieces(input_file.path, source, piece_bytes=PIECE_BYTES)):
        if not formats:
            formats.append(piece.format)
        num_bytes, text_hash = len(piece.text), _hash_of(piece)
        # A worker can read the text of a plain file itself, which is faster than a pipe.
        if not workers.are_here and source.is_plain and not piece.oversized_lines and input_file.path != STDIN:
            piece = dataclasses.replace(piece, text=b"")
        yield PieceTask(input_file.path, number, index, piece, num_bytes, text_hash)


def _hash_of(piece: TextPiece) -> str:
    """Returns a hash of everything that decides the records of a piece."""
    digest = xxhash.xxh3_128(f"{piece.format} {piece.is_first} {piece.is_last} {piece.oversized_lines}\n".encode())
    digest.update(piece.text)
    return digest.hexdigest()


def make_piece(work: PrepWork, task: PieceTask) -> PieceFile:
    """Parses a piece of text and writes its records, unless its file is there already."""
    input_file, piece_path = work.folder.inputs[task.number], work.folder.piece_path(task.number, task.index)
    path, role = input_file.path, input_file.role
    if (existing := open_piece_file(piece_path, path, role, task.text_hash)) is not None:
        return existing
    text = task.text
    if not text.text and task.num_bytes:
        text = dataclasses.replace(text, text=_read_range(path, text.start, task.num_bytes))
        if _hash_of(text) != task.text_hash:
            raise ProtlmError(f"{path}: changed while it was read; prepare it again")
    parsed = reader.parse_piece(path, text)
    table, split_codes = _labelled(parsed.table, work.labels)
    parsed = dataclasses.replace(parsed, table=table)
    write_piece(piece_path, parsed, text_hash=task.text_hash, split=split_codes)
    written = open_piece_file(piece_path, path, role, task.text_hash)
    assert written is not None
    return written


def _read_range(path: str, start: int, num_bytes: int) -> bytes:
    with Path(path).open("rb") as file:
        file.seek(start)
        return file.read(num_bytes)


def _labelled(table: RecordTable, labels: LabelFiles) -> tuple[RecordTable, np.ndarray | None]:
    """Returns the table with the labels from files, which replace those in the records, and the code of each split."""
    if labels.clusters is not None:
        clusters = labels.clusters.of_records(table)
        sizes = np.where(clusters < 0, UNKNOWN, labels.clusters.sizes[clusters]).astype(np.int32)
        table = dataclasses.replace(table, cluster_ids=labels.clusters.names(clusters), cluster_size=sizes)
    if labels.families is not None:
        families = labels.families.of_records(table)
        table = dataclasses.replace(table, families=labels.families.names(families))
    if labels.splits is None:
        return table, None
    splits = labels.splits.of_records(table)
    codes = [SPLIT_NAMES.index(labels.splits.name(index)) for index in range(len(labels.splits))]
    return table, np.array([*codes, NO_SPLIT], dtype=np.uint8)[splits]
