"""From files to finished pieces, the first half of prep: worker processes share the pieces, and none is made twice."""

import dataclasses
from collections.abc import Iterator
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
from protlm.data.parsing.sources import STDIN, SourceBlocks
from protlm.data.parsing.text_pieces import PIECE_BYTES, TextPiece, cut_into_pieces
from protlm.data.records import NUCLEOTIDES, UNKNOWN, Format, Nucleotides, OnBadRecord
from protlm.data.splits import SPLIT_NAMES
from protlm.errors import ProtlmError, RecordError
from protlm.runtime.progress import Advance
from protlm.runtime.workers import Workers
from protlm.workflows.prep.folder import FinishedSource, InputFile, PrepFolder


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
class PieceTask:
    """A piece of text to read.

    Attributes:
        input_file: The file that it comes from.
        text: The piece; its text is empty if the worker is to read it from the file itself.
        num_bytes: Size of its text.
        text_hash: Hash of the piece.
        path: The file of the finished piece.
    """

    input_file: InputFile
    text: TextPiece
    num_bytes: int
    text_hash: str
    path: Path


def read_source(
    folder: PrepFolder,
    number: int,
    workers: Workers,
    rules: FaultRules,
    advance: Advance,
) -> None:
    """Reads a file to its end and writes its pieces into the folder, except those that are there already.

    Raises:
        RecordError: A bad record or a nucleic acid, unless it is skipped or kept; a file without records.
        ProtlmError: A damaged file.
        OSError: The file cannot be read, or the disk is full.
    """
    input_file = folder.inputs[number]
    # Before reading, so that a change in the meantime is noticed.
    state = input_file.state
    source = SourceBlocks(input_file.path, advance=advance)
    formats: list[Format] = []
    num_pieces = num_records = num_lines = num_entries = 0
    for piece in workers.in_order(make_piece, _tasks(folder, number, source, workers, formats)):
        raise_first_fault(piece, num_lines, rules)
        num_pieces += 1
        num_records += piece.num_records
        num_lines += piece.num_lines
        num_entries += piece.num_entries
    if not num_entries:
        raise reader.no_records(input_file.path, num_lines)
    finished = FinishedSource(
        name=source.name, sha256=source.sha256, format=formats[0], num_pieces=num_pieces, num_records=num_records,
        state=state,
    )  # fmt: skip
    folder.finish_source(number, finished)


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
    folder: PrepFolder, number: int, source: SourceBlocks, workers: Workers, formats: list[Format]
) -> Iterator[PieceTask]:
    input_file = folder.inputs[number]
    for index, piece in enumerate(cut_into_pieces(input_file.path, source, piece_bytes=PIECE_BYTES)):
        if not formats:
            formats.append(piece.format)
        num_bytes, text_hash = len(piece.text), _hash_of(piece)
        # A worker can read the text of a plain file itself, which is faster than a pipe.
        if workers.number > 1 and source.is_plain and not piece.oversized_lines and input_file.path != STDIN:
            piece = dataclasses.replace(piece, text=b"")
        yield PieceTask(input_file, piece, num_bytes, text_hash, folder.piece_path(number, index))


def _hash_of(piece: TextPiece) -> str:
    """Returns a hash of everything that decides the records of a piece."""
    digest = xxhash.xxh3_128(f"{piece.format} {piece.is_first} {piece.is_last} {piece.oversized_lines}\n".encode())
    digest.update(piece.text)
    return digest.hexdigest()


def make_piece(labels: LabelFiles, task: PieceTask) -> PieceFile:
    """Parses a piece of text and writes its records, unless its file is there already."""
    path, role = task.input_file.path, task.input_file.role
    if (existing := open_piece_file(task.path, path, role, task.text_hash)) is not None:
        return existing
    text = task.text
    if not text.text and task.num_bytes:
        text = dataclasses.replace(text, text=_read_range(path, text.start, task.num_bytes))
        if _hash_of(text) != task.text_hash:
            raise ProtlmError(f"{path}: changed while it was read; prepare it again")
    parsed = reader.parse_piece(path, text)
    table, split_codes = _labelled(parsed.table, labels)
    parsed = dataclasses.replace(parsed, table=table)
    write_piece(task.path, parsed, text_hash=task.text_hash, split=split_codes)
    written = open_piece_file(task.path, path, role, task.text_hash)
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
