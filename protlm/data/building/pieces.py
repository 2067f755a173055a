"""Piece files, which hold a parsed piece of a source until the dataset is written: its records as columns, its faults.

They are many and short-lived, so their format is plainer than HDF5 and opens twenty times faster.
"""

import json
import mmap
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from protlm import files
from protlm.data.nucleotides import nucleic_acids
from protlm.data.parsing.reader import ParsedPiece
from protlm.data.parsing.record_table import RecordTable
from protlm.data.storage import columns
from protlm.data.storage.shards import LABEL_COLUMNS
from protlm.data.strings import Strings
from protlm.errors import ProtlmError

_MAGIC = b"protlm-piece 3\n"
_HEADER_SIZE = struct.Struct("<q")
# Enough for the header of any piece, since all its columns are known.
_COLUMNS_START = 1 << 14


@dataclass(frozen=True, slots=True)
class PieceFile:
    """The path and the summary of a finished piece; its columns are mapped by `Piece`.

    Attributes:
        path: The file.
        path_of_source: The file that its records come from, for messages.
        role: The role of that file: `input`, or the ready-made split that it is.
        text_hash: Hash of the text that was parsed.
        num_records: Number of good records.
        num_lines: Number of line ends in the text.
        num_entries: Number of records, good or bad.
        fault_counts: Number of records and lines that could not be used, by reason.
        first_fault: Number and message of the first fault to raise if nothing may be skipped.
        repairs: Letters repaired, by rule.
        has_numbered_ids: Whether an id holds a `#`.
        num_nucleotides: Number of good records that are nucleic acids.
    """

    path: Path
    path_of_source: str
    role: str
    text_hash: str
    num_records: int
    num_lines: int
    num_entries: int
    fault_counts: Mapping[str, int]
    first_fault: tuple[int, str] | None
    repairs: Mapping[str, int] = field(default_factory=dict)
    has_numbered_ids: bool = False
    num_nucleotides: int = 0


class Piece:
    """The mapped columns of a finished piece.

    Attributes:
        about: The summary that a `PieceFile` is made from.
    """

    def __init__(self, path: Path) -> None:
        """Opens a finished piece.

        Raises:
            ProtlmError: The file is damaged, or of another version.
        """
        with path.open("rb") as file:
            try:
                self._content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
                start = len(_MAGIC) + _HEADER_SIZE.size
                if self._content[: len(_MAGIC)] != _MAGIC:
                    raise ValueError("of another version")
                (size,) = _HEADER_SIZE.unpack(self._content[len(_MAGIC) : start])
                header = json.loads(self._content[start : start + size])
                self._places: dict[str, tuple[str, int, int]] = header["columns"]
                self.about: dict[str, Any] = header["about"]
                if header["size"] != len(self._content):
                    raise ValueError("cut short")
            except (ValueError, KeyError, struct.error) as error:
                raise ProtlmError(f"{path}: a damaged piece ({error}); remove its folder to start afresh") from error

    def __getitem__(self, name: str) -> np.ndarray:
        dtype, offset, count = self._places[name]
        return np.frombuffer(self._content, dtype=dtype, count=count, offset=offset)

    def __contains__(self, name: str) -> bool:
        return name in self._places

    @cached_property
    def lengths(self) -> np.ndarray:
        """Residues of each record, int64 (records)."""
        return np.diff(self["offsets"])

    def strings(self, name: str) -> Strings:
        """Returns a column of strings."""
        return Strings(self[f"{name}/bytes"], self[f"{name}/offsets"])

    def faults(self) -> Iterator[tuple[int, str, str]]:
        """Yields the line in the piece, the id and the reason of each fault."""
        reasons = list(self.about["fault_counts"])
        codes = self["faults/codes"].tobytes()
        return zip(
            self["faults/lines"].tolist(), self.strings("faults/ids"), map(reasons.__getitem__, codes), strict=True
        )

    def fault(self, number: int) -> tuple[int, str, str]:
        """Returns the line in the piece, the id and the reason of one fault."""
        reason = list(self.about["fault_counts"])[self["faults/codes"][number]]
        return int(self["faults/lines"][number]), self.strings("faults/ids")[number], reason


def write_piece(path: Path, parsed: ParsedPiece, *, text_hash: str, split: np.ndarray | None = None) -> None:
    """Writes a piece, whole or not at all.

    Args:
        path: The file.
        parsed: The parsed piece.
        text_hash: Hash of the text that was parsed, by which the piece is recognised later.
        split: The code of the split of each record according to a split file, uint8 (records).
    """
    table = parsed.table
    named_columns = _columns_of(table)
    if split is not None:
        named_columns["split"] = split
    faults = parsed.faults
    ids = faults.ids
    nucleotides = nucleic_acids(table.tokens, table.offsets, table.descriptions)
    named_columns |= {
        "nucleotides": nucleotides,
        "faults/lines": np.array(faults.lines, dtype=np.int64),
        "faults/codes": np.frombuffer(bytes(faults.codes), dtype=np.uint8),
        "faults/ids/bytes": ids.text,
        "faults/ids/offsets": ids.offsets,
    }
    about = {
        "text_hash": text_hash,
        "num_records": len(table),
        "num_lines": parsed.num_lines,
        "num_entries": len(table) + parsed.faults.num_entries,
        "fault_counts": faults.counts,
        # Its id stays in the columns: it may be as long as the file.
        "first_fault": None if faults.first is None else [faults.first_place, faults.first.message],
        "repairs": dict(table.repairs),
        "has_numbered_ids": b"#" in table.ids.text.tobytes(),
        "num_nucleotides": len(nucleotides),
    }
    with files.written_whole(path) as temporary:
        _write_columns(temporary, named_columns, about)


def _write_columns(path: Path, named_columns: Mapping[str, np.ndarray], about: Mapping[str, Any]) -> None:
    """Writes a magic number, a header with the place of each column, and the columns, aligned."""
    places: dict[str, tuple[str, int, int]] = {}
    offset = _COLUMNS_START
    for name, column in named_columns.items():
        places[name] = (column.dtype.str, offset, len(column))
        offset += -(-column.nbytes // columns.ALIGNMENT_BYTES) * columns.ALIGNMENT_BYTES
    header = json.dumps({"columns": places, "about": about, "size": offset}).encode()
    assert len(_MAGIC) + _HEADER_SIZE.size + len(header) <= _COLUMNS_START
    with path.open("wb") as file:
        file.write(_MAGIC + _HEADER_SIZE.pack(len(header)) + header)
        for name, column in named_columns.items():
            file.seek(places[name][1])
            file.write(np.ascontiguousarray(column).data)
        file.truncate(offset)


def _columns_of(table: RecordTable) -> dict[str, np.ndarray]:
    named_columns = {"tokens": table.tokens, "offsets": table.offsets, "lines": table.lines}
    strings = {"ids": table.ids, "descriptions": table.descriptions}
    labels = dict(zip(LABEL_COLUMNS, (table.cluster_ids, table.families), strict=True))
    strings |= {name: label for name, label in labels.items() if label is not None}
    for name, column in strings.items():
        named_columns |= {f"{name}/bytes": column.text, f"{name}/offsets": column.offsets}
    for kind, digests in (("sequence", table.digests), ("id", table.id_digests)):
        named_columns |= {f"{kind}_digest/high": digests[:, 0], f"{kind}_digest/low": digests[:, 1]}
    return named_columns | {"cluster_size": table.cluster_size, "taxon_id": table.taxon_id}


def open_piece_file(path: Path, path_of_source: str, role: str, text_hash: str | None = None) -> PieceFile | None:
    """Returns a finished piece; None if there is none, or it is of another text or another version of protlm."""
    try:
        about = Piece(path).about
    except (FileNotFoundError, ProtlmError):
        return None
    return PieceFile(path, path_of_source, role, **about) if text_hash in (None, about["text_hash"]) else None
